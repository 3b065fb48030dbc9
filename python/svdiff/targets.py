"""Which modules of a model get spectral shifts."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import Tensor, nn

from svdiff_kernels import SVDiffError

# The paper's subsets (section 4.4), as what a module path must contain.
SUBSETS = {
    "all": r"",
    "attention": r"(^|\.)attn\d?\.",
    "cross_attn": r"(^|\.)attn2\.",
    "cross_attn_kv": r"(^|\.)attn2\.to_[kv]$",
    "up": r"^up_blocks?\.",
    "down": r"^down_blocks?\.",
    "mid": r"^mid_block\.",
}

_MATRICES = (nn.Linear, nn.Conv2d)
_ONE_DIM = (nn.LayerNorm, nn.GroupNorm)


def select(
    model: nn.Module, targets: str | Collection[str] = "all", *, one_dim: bool = True, embeddings: bool = False
) -> dict[str, nn.Module]:
    """The modules to replace, by path, in the order of the model.

    Args:
        model: the network to look through.
        targets: a name of `SUBSETS`, a regular expression searched for in the module paths, or the very paths.
        one_dim: take the weights of LayerNorm and GroupNorm too.
        embeddings: take embedding tables too.

    Raises:
        SVDiffError: `targets` matches no module, is no valid expression, or names a path that cannot be taken.
    """
    kinds: tuple[type[nn.Module], ...] = _MATRICES
    if one_dim:
        kinds += _ONE_DIM
    if embeddings:
        kinds += (nn.Embedding,)
    # Exact types only: a subclass (of PEFT, a quantiser, ...) does something else with its weight.
    possible = {
        path: module for path, module in model.named_modules() if type(module) in kinds and _is_plain(module.weight)
    }
    if isinstance(targets, str):
        pattern = _compile(SUBSETS.get(targets, targets))
        chosen = {path: module for path, module in possible.items() if pattern.search(path)}
        if not chosen:
            names = ", ".join(SUBSETS)
            raise SVDiffError(f"targets {targets!r} matches no layer of {type(model).__name__} (subsets: {names})")
        return chosen
    if unknown := sorted(set(targets) - possible.keys()):
        raise SVDiffError(f"{type(model).__name__} has no layer {unknown[0]!r} that can take spectral shifts")
    return {path: module for path, module in possible.items() if path in targets}


def _is_plain(weight: object) -> bool:
    """An ordinary floating-point parameter: no quantised tensor, no norm's missing weight."""
    return isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()


def _compile(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise SVDiffError(f"targets {expression!r} is neither a subset nor a regular expression: {error}") from error
