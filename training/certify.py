"""Measures a merged model, reloaded from its folder, beside the live adapter. Writes nothing.

Everything is computed in float32, so that what is measured is the weights and not the arithmetic. Models are
in memory one after the other.

N tokens of a row's reference answer, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from adapters.base import Base, load_base
from adapters.fold import Target, checked_bundle, fold_in_place, open_folding
from adapters.model_folder import stored_weights
from adapters.quantize import Quantization, Scheme
from training.applied import applied, encoder_for
from training.cases import Answer, Case
from training.certificate import Certificate, Distance, LayerError, Thresholds
from training.encoding import RowEncoder
from training.errors import CertificateError
from training.merge import merge_base, target_of
from training.products import is_autocast, products_in
from training.reference_loss import AnswerTokens, answer_logits, answer_tokens
from training.reference_model import ReferenceModel
from training.versions import installed_versions

_MAX_VALUES: Final = 2**28  # of the live adapter's log-probabilities, which stay in memory: 1 GiB
_ANSWER_TOKENS: Final = 64
_TINY: Final = 1e-30


def certify(
    base_source: str,
    adapter: Path,
    merged: Path,
    cases: Sequence[Case],
    *,
    quantization: Quantization = "nf4",
    double_quantization: bool = True,
    thresholds: Thresholds | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Certificate:
    """What a merged model folder is worth.

    Args:
        base_source, adapter, quantization, double_quantization: as the merge was given them.
        cases: questions and answers that the adapter did not learn.

    Raises:
        CertificateError: the rows are too many.
        AdapterError, BaseModelError, DataError: something cannot be read, or the folder is no merge of these.
    """
    quantized: dict[str, Any] = {
        "quantization": quantization,
        "double_quantization": double_quantization,
        "cache_dir": cache_dir,
        "progress": progress,
    }
    base = load_base(base_source, purpose="train", dtype="float32", **quantized)
    checked_bundle(adapter, base)
    tokens = _tokens(encoder_for(base, adapter), cases, base.max_context_tokens)
    _check_size(tokens, base)
    live = _Live(base, adapter, tokens, progress)
    noise, bare = live.noise(), live.distance(base, "base")
    greedy = _greedy(base, adapter, cases, progress)
    name, fingerprint = base.name, base.fingerprint
    del base
    found = _reloaded(merged, cache_dir, progress)
    distance = live.distance(found, "merged")
    same_tokens = _tokens(encoder_for(found, None), cases, found.max_context_tokens) == tokens
    matches = sum(map(eq, greedy, _greedy(found, None, cases, progress)))
    del found
    into = target_of(merged)
    expected = merge_base(
        base_source, Scheme(quantization, double_quantization), into, cache_dir=cache_dir, progress=progress
    )
    weights = _compared(expected, adapter, merged, into)
    return Certificate(
        adapter_digest=weights.digest,
        base=name,
        base_fingerprint=fingerprint,
        into=into,
        dtype=weights.dtype,
        rows=len(cases),
        tokens=sum(each.count for each in tokens),
        live_loss=live.loss,
        merged=distance,
        noise=noise,
        bare=bare,
        greedy_matches=matches,
        same_tokens=same_tokens,
        layers=weights.layers,
        unchanged_error=weights.unchanged_error,
        thresholds=thresholds or Thresholds(),
        versions=installed_versions(),
    )


class _Live:
    """The live adapter's log-probabilities, and how far others are from them.

    Attributes:
        loss: of the reference answers, in nats per token.
    """

    def __init__(self, base: Base, adapter: Path, tokens: Sequence[AnswerTokens], progress: bool) -> None:
        self._base, self._adapter, self._tokens, self._progress = base, adapter, tokens, progress
        with applied(base, adapter) as worn, _computing_in(base, torch.float32):
            self._rows_NV = list(self._logprobs(worn.model, base, "live"))
        self.loss = _mean_loss(self._rows_NV, tokens)

    def noise(self) -> Distance:
        """Of the same adapter on the same base, its products in bfloat16."""
        with applied(self._base, self._adapter) as worn, _computing_in(self._base, torch.bfloat16):
            return self._distance(worn.model, self._base, "noise")

    def distance(self, base: Base, what: str) -> Distance:
        """Of a base without any adapter."""
        with _computing_in(base, torch.float32):
            return self._distance(base.model, base, what)

    def _distance(self, model: Any, base: Base, what: str) -> Distance:
        gathered = [
            _row_distance(live_NV, other_NV, tokens)
            for live_NV, other_NV, tokens in zip(
                self._rows_NV, self._logprobs(model, base, what), self._tokens, strict=True
            )
        ]
        kl, apart, same, nats = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        return Distance(
            mean_kl=float(kl.mean()),
            p99_kl=float(kl.quantile(0.99)),
            max_kl=float(kl.max()),
            max_logprob=float(apart.max()),
            agreement=float(same.double().mean()),
            loss=float(nats.mean()),
        )

    def _logprobs(self, model: Any, base: Base, what: str) -> Iterator[Tensor]:
        from tqdm import tqdm

        for tokens in tqdm(self._tokens, desc=what, unit="row", disable=not self._progress):
            with torch.no_grad():
                yield torch.log_softmax(answer_logits(model, base, tokens).float().cpu(), dim=-1)


@dataclass(frozen=True, slots=True)
class _Weights:
    """The artefact's weights beside what they should be."""

    digest: str
    dtype: str
    layers: tuple[LayerError, ...]
    unchanged_error: float


def _compared(base: Base, adapter: Path, merged: Path, into: Target) -> _Weights:
    """Every weight of the folder beside base + adapter in float32.

    Raises:
        BaseModelError: the folder lacks a weight, or has one of another shape.
    """
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    folding = open_folding(base, adapter)
    fold_in_place(base, folding, into)
    layers, unchanged, dtypes = [], 0.0, set()
    stored = stored_weights(merged, base.model)
    for name, expected in base.model.named_parameters():
        found = stored(name, expected)
        dtypes.add(str(found.dtype).removeprefix("torch."))
        error = float((found.float() - expected).norm())
        # A head that an adapter changes was the embedding until then.
        added = float((expected - before.get(name, base.model.get_input_embeddings().weight)).norm())
        of_weight = error / max(float(expected.norm()), _TINY)
        if added > 0:
            layers.append(LayerError(name=name, of_weight=of_weight, of_delta=error / added))
        else:
            unchanged = max(unchanged, of_weight)
    return _Weights(folding.digest, ", ".join(sorted(dtypes)), tuple(layers), unchanged)


def _row_distance(
    live_NV: Tensor, other_NV: Tensor, tokens: AnswerTokens
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each token: KL, difference of the reference token's log-probability, same likeliest, nats; [N]."""
    live, other = live_NV.double(), other_NV.double()
    answer_N1 = torch.tensor(tokens.answer).unsqueeze(1)
    kl_N = (live.exp() * (live - other)).sum(dim=-1).clamp(min=0.0)
    ours_N, theirs_N = live.gather(1, answer_N1).squeeze(1), other.gather(1, answer_N1).squeeze(1)
    same_N = live_NV.argmax(dim=-1) == other_NV.argmax(dim=-1)
    return kl_N, (ours_N - theirs_N).abs(), same_N, -theirs_N


def _mean_loss(rows_NV: Sequence[Tensor], tokens: Sequence[AnswerTokens]) -> float:
    nats = [
        -row_NV.double().gather(1, torch.tensor(each.answer).unsqueeze(1))
        for row_NV, each in zip(rows_NV, tokens, strict=True)
    ]
    return float(torch.cat(nats).mean())


def _tokens(encoder: RowEncoder, cases: Sequence[Case], limit: int) -> list[AnswerTokens]:
    return [answer_tokens(encoder, case, limit) for case in cases]


def _greedy(base: Base, adapter: Path | None, cases: Sequence[Case], progress: bool) -> list[Answer]:
    return ReferenceModel(base, adapter, _ANSWER_TOKENS).answers(cases, progress=progress)


def _reloaded(folder: Path, cache_dir: Path | None, progress: bool) -> Base:
    return load_base(
        str(folder), purpose="train", quantization="none", dtype="float32", cache_dir=cache_dir,
        progress=progress,
    )  # fmt: skip


@contextmanager
def _computing_in(base: Base, dtype: torch.dtype) -> Iterator[None]:
    """Within the block products with the base's weights are of this type."""
    with (
        products_in(base, dtype),
        torch.autocast(base.device.type, torch.bfloat16, enabled=is_autocast(base, dtype)),
    ):
        yield


def _check_size(tokens: Sequence[AnswerTokens], base: Base) -> None:
    values = sum(each.count for each in tokens) * base.model.config.vocab_size
    if values > _MAX_VALUES:
        raise CertificateError(
            f"{len(tokens)} rows have {values} log-probabilities, {_MAX_VALUES} are kept at most; give --rows"
        )
