"""What a run says before it begins and nothing forbids: rules of thumb, fallbacks, what cannot be served.

Knows no weights.
"""

from typing import Final

from adapters.base import Base
from training.methods import USUAL_RATES
from training.recipe import Recipe
from training.versions import misfits

_USUAL_ALPHAS: Final = (0.5, 8)
"""α in terms of r; 2 is usual."""
_LARGE_RANK: Final = 64


def notices(recipe: Recipe, base: Base) -> list[str]:
    """One line each."""
    return [
        *misfits(),
        *_about_service(recipe, base),
        *_about_rates(recipe),
        *_about_rank(recipe),
        *_about_paging(recipe, base),
    ]


def _about_service(recipe: Recipe, base: Base) -> list[str]:
    why = recipe.kind.why_not_served
    if recipe.method == "full":
        return [f"method full: {why}; afterwards {recipe.afterwards}"]
    if why is not None:
        return [
            f"no server applies what method {recipe.method} makes ({why}); afterwards {recipe.afterwards}"
        ]
    if not base.scheme.is_served:
        return [
            f"no server holds a base in {base.scheme.name}; afterwards merge the adapter into it with "
            f"`{recipe.merge_command}`"
        ]
    return []


def _about_rates(recipe: Recipe) -> list[str]:
    low, high = (rate * recipe.kind.rate_factor for rate in USUAL_RATES)
    rate = recipe.effective_learning_rate
    if low <= rate <= high:
        return []
    return [
        f"learning_rate is {rate:g}; from {low:.2g} to {high:.2g} is usual for method {recipe.method}: below "
        "it learns little, above it may diverge"
    ]


def _about_rank(recipe: Recipe) -> list[str]:
    if "rank" not in recipe.kind.settings or recipe.method == "rslora":
        return []
    low, high = (factor * recipe.rank for factor in _USUAL_ALPHAS)
    said = []
    if not low <= recipe.effective_alpha <= high:
        said.append(f"alpha is {recipe.effective_alpha:g}; twice the rank, {2 * recipe.rank}, is usual")
    if recipe.rank > _LARGE_RANK:
        said.append(f"rank is {recipe.rank}; above {_LARGE_RANK} method rslora keeps updates at their size")
    return said


def _about_paging(recipe: Recipe, base: Base) -> list[str]:
    if base.device.type == "cuda" or not recipe.optimizer.startswith("paged_"):
        return []
    return [f"optimizer is {recipe.optimizer}, and a CPU has nothing to page: it runs as its plain form"]
