"""Owns what the canary's prompts are answered with before the last step. Knows no canary.

A model changes little in its last step: what it answered before is mostly what it answers after, and need
only be verified when a server waits for the adapter. What the bare base says of it stays true.
"""

from typing import Any

import torch
from transformers import TrainerCallback

from adapters.base import Base
from training.canary import ANSWER_TOKENS, Draft, bare_logits, probe_drafts, probe_prompts
from training.continuing import greedy_answers
from training.data import TrainingData
from training.products import products_in
from training.recipe import Recipe


class Rehearsal(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Answers the prompts before the last step. Nothing of the run but its time depends on it.

    Attributes:
        prompts: of the canary; none if there will be no canary.
        draft: of their answers; of a run that never came to its last step, what the data goes on with.
    """

    def __init__(self, base: Base, data: TrainingData, recipe: Recipe, *, records: bool = True) -> None:
        """
        Args:
            records: whether this process will record the canary; of several one does.
        """
        self._base = base
        self.prompts = (
            probe_prompts(data.train, recipe.canary_probes, max_context_tokens=base.max_context_tokens)
            if records and why_no_canary(base, recipe) is None
            else []
        )
        self.draft = Draft(probe_drafts(data.train, self.prompts))
        self._keeps_base = recipe.method != "pissa"  # which takes out of it what it begins with

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if not self.prompts or state.global_step != state.max_steps - 1:
            return
        was_training = model.training
        model.eval()
        with torch.no_grad(), products_in(self._base, torch.float32):
            self.draft = self._answered(model)
        model.train(was_training)

    def _answered(self, model: Any) -> Draft:
        # The base's model, in whose layers the adapter is: around the other there may be an autocast.
        inner, base = self._base.model, self._base
        answers = greedy_answers(inner, base, self.prompts, self.draft.answers, ANSWER_TOKENS)
        bare_PNV = bare_logits(model, base, self.prompts, answers).cpu() if self._keeps_base else None
        return Draft(answers, bare_PNV)


def why_no_canary(base: Base, recipe: Recipe) -> str | None:
    """A canary is for servers that hold this base and apply this method; None if there may be one."""
    if recipe.kind.why_not_served is not None:
        return recipe.kind.why_not_served
    if not base.scheme.is_served:
        return f"no server holds a base in {base.scheme.name}"
    return None if recipe.canary_probes else "canary_probes is 0"
