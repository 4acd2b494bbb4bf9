"""Owns what a merge certificate says: how far a merged model is from its live adapter, and if that will do.

Knows figures, neither models nor files. KL divergences are in nats, of the live adapter's next token to that
of the other model, over the tokens of the reference answers.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from training.document import Document, Heading, Items, Paragraph, Table

FORMAT: Final = 1
_NOTHING_GAINED: Final = 0.01
"""Nats per token: an adapter that gains less on the rows has no gain to recover."""
_SHOWN_LAYERS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a merge must hold.

    Attributes:
        kl_over_noise: mean KL, in terms of the measured noise.
        recovered: share of what the adapter gains in loss over the bare base.
        agreement: share of tokens at which both find the same one likeliest.
        control: mean KL, in terms of the bare base's: what is merged must be nearer to the adapter by this.
    """

    kl_over_noise: float = 10.0
    recovered: float = 0.98
    agreement: float = 0.995
    control: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far another model is from the live adapter.

    Attributes:
        mean_kl, p99_kl, max_kl: over tokens.
        max_logprob: largest difference of a log-probability of a reference token.
        agreement: share of tokens at which both find the same one likeliest.
        loss: mean over the reference tokens, in nats.
    """

    mean_kl: float
    p99_kl: float
    max_kl: float
    max_logprob: float
    agreement: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """A weight of the artefact beside what it should be, in float32.

    Attributes:
        of_weight: Frobenius norm of the difference, relative to the weight's.
        of_delta: the same, relative to what the adapter adds to it; None if it adds nothing.
    """

    name: str
    of_weight: float
    of_delta: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was measured of a merged model, reloaded from its folder.

    Attributes:
        into: what the adapter was folded into, as training/merge.py has it.
        dtype: of the artefact's weights.
        rows, tokens: of the reference answers that were compared.
        live_loss: of the live adapter, in nats per token.
        merged, noise, bare: the artefact; the live adapter itself with its products in bfloat16, which is
            by how much two machines that serve it may differ; the base without it, as a control.
        greedy_matches: rows whose greedy answers have the same tokens, of `rows`.
        same_tokens: whether the artefact's own tokenizer and template turn every row into the same tokens.
        layers: all that the adapter changes.
        unchanged_error: largest relative error among all other weights.
        versions: of the libraries.
    """

    adapter_digest: str
    base: str
    base_fingerprint: str
    into: str
    dtype: str
    rows: int
    tokens: int
    live_loss: float
    merged: Distance
    noise: Distance
    bare: Distance
    greedy_matches: int
    same_tokens: bool
    layers: tuple[LayerError, ...]
    unchanged_error: float
    thresholds: Thresholds
    versions: Mapping[str, str]

    @property
    def perplexity_ratio(self) -> float:
        """The artefact's over the live adapter's."""
        return math.exp(self.merged.loss - self.live_loss)

    @property
    def recovered(self) -> float | None:
        """Share of the adapter's gain over the bare base; None if it gains next to nothing on these rows."""
        gain = self.bare.loss - self.live_loss
        return None if gain < _NOTHING_GAINED else (self.bare.loss - self.merged.loss) / gain

    @property
    def failures(self) -> list[str]:
        """Why the artefact will not do; none if it will."""
        limits, found = self.thresholds, []
        allowed = limits.kl_over_noise * self.noise.mean_kl
        if self.merged.mean_kl > allowed:
            found.append(
                f"mean KL to the live adapter is {self.merged.mean_kl:.3g}, {allowed:.3g} is allowed: "
                f"{limits.kl_over_noise:g} times the noise of {self.noise.mean_kl:.3g}"
            )
        if self.merged.agreement < limits.agreement:
            found.append(
                f"the likeliest token is the same at {self.merged.agreement:.2%} of all tokens, "
                f"{limits.agreement:.2%} is needed"
            )
        if self.recovered is not None and self.recovered < limits.recovered:
            found.append(
                f"{self.recovered:.1%} of what the adapter gains in loss is recovered, "
                f"{limits.recovered:.1%} is needed"
            )
        if self.merged.mean_kl > limits.control * self.bare.mean_kl:
            found.append(
                f"mean KL to the live adapter is {self.merged.mean_kl:.3g}, and that of the bare base is "
                f"{self.bare.mean_kl:.3g}: it is hardly nearer to the adapter than the base is"
            )
        if not self.same_tokens:
            found.append("its tokenizer or chat template turns rows into other tokens")
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_mapping(self) -> dict[str, Any]:
        """Plain values: merge_certificate.json."""
        return {
            "format": FORMAT,
            "passed": self.passed,
            "failures": self.failures,
            "perplexity_ratio": self.perplexity_ratio,
            "recovered": self.recovered,
            **dataclasses.asdict(self),
        }


def certificate_document(certificate: Certificate) -> Document:
    """The same for people."""
    layers = sorted(certificate.layers, key=lambda layer: -(layer.of_delta or 0.0))
    return Document(
        title="Merge certificate: passed" if certificate.passed else "Merge certificate: FAILED",
        blocks=[
            *(Paragraph(failure) for failure in certificate.failures),
            Items(summary(certificate)),
            Heading("Whose distance from the live adapter"),
            Table(
                ["", "mean KL", "99 %", "largest", "log-probability", "same likeliest", "loss"],
                [
                    _row("merged model", certificate.merged),
                    _row("noise: the live adapter in bfloat16", certificate.noise),
                    _row("control: the bare base", certificate.bare),
                ],
            ),
            Heading(f"Layers, the {min(_SHOWN_LAYERS, len(layers))} worst of {len(layers)}"),
            Table(
                ["weight", "error of what was added", "error of the weight"],
                [
                    [
                        layer.name,
                        "-" if layer.of_delta is None else f"{layer.of_delta:.2e}",
                        f"{layer.of_weight:.2e}",
                    ]
                    for layer in layers[:_SHOWN_LAYERS]
                ],
            ),
        ],
    )


def summary(certificate: Certificate) -> list[tuple[str, str]]:
    """Facts by name."""
    recovered = certificate.recovered
    return [
        ("compared", f"{certificate.tokens} tokens of {certificate.rows} answers, in float32"),
        ("mean KL to the live adapter", f"{certificate.merged.mean_kl:.3g} nats"),
        ("the same in terms of the noise", f"{_ratio(certificate.merged, certificate.noise):.2f} times"),
        ("same likeliest token", f"{certificate.merged.agreement:.2%}"),
        ("same greedy answer", f"{certificate.greedy_matches} of {certificate.rows}"),
        ("perplexity over the live adapter's", f"{certificate.perplexity_ratio:.5f}"),
        (
            "recovered of the adapter's gain",
            "it gains nothing on these rows" if recovered is None else f"{recovered:.2%}",
        ),
        ("largest error of a weight that the adapter leaves alone", f"{certificate.unchanged_error:.2e}"),
        ("weights", f"{certificate.dtype}, of the {certificate.into} base"),
        ("base", f"{certificate.base}, {certificate.base_fingerprint}"),
        ("adapter", certificate.adapter_digest),
        ("made with", ", ".join(f"{name} {version}" for name, version in certificate.versions.items())),
    ]


def _row(name: str, distance: Distance) -> list[str]:
    kls = [f"{kl:.2e}" for kl in (distance.mean_kl, distance.p99_kl, distance.max_kl)]
    return [name, *kls, f"{distance.max_logprob:.2e}", f"{distance.agreement:.2%}", f"{distance.loss:.4f}"]


def _ratio(one: Distance, other: Distance) -> float:
    return one.mean_kl / other.mean_kl if other.mean_kl else math.inf
