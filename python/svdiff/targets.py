"""Which modules of a model get spectral shifts, and which of them a setting by groups of layers is about."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from svdiff_kernels import SVDiffError

# The paper's subsets (section 4.4) and others, as what a module path must contain.
SUBSETS = {
    "all": r"",
    "attention": r"(^|\.)(attn\d?|self_attn)\.",
    "self_attn": r"(^|\.)(attn1|self_attn)\.",
    "cross_attn": r"(^|\.)attn2\.",
    "cross_attn_kv": r"(^|\.)attn2\.to_[kv]$",
    "up": r"^up_blocks?\.",
    "down": r"^down_blocks?\.",
    "mid": r"^mid_block\.",
}

V = TypeVar("V")

_MATRICES = (nn.Linear, nn.Conv2d)
_ONE_DIM = (nn.LayerNorm, nn.GroupNorm)


def select(
    model: nn.Module, targets: str | Collection[str] = "all", *, one_dim: bool = True, embeddings: bool = False
) -> dict[str, nn.Module]:
    """The modules to replace, by path, in the order of the model.

    Args:
        model: the network to look through.
        targets: an expression for `matching`, or the very paths.
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
        path: module for path, module in own_modules(model) if type(module) in kinds and _is_plain(module.weight)
    }
    if isinstance(targets, str):
        chosen = set(matching(targets, possible, "targets"))
        if not chosen:
            names = ", ".join(SUBSETS)
            raise SVDiffError(f"targets {targets!r} matches no layer of {type(model).__name__} (subsets: {names})")
        return {path: module for path, module in possible.items() if path in chosen}
    if unknown := sorted(set(targets) - possible.keys()):
        raise SVDiffError(f"{type(model).__name__} has no layer {unknown[0]!r} that can take spectral shifts")
    return {path: module for path, module in possible.items() if path in targets}


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model as if it had no adapters of PEFT's: a layer in a wrapper has the path of that."""
    wrappers = {path for path, module in model.named_modules() if hasattr(module, "base_layer")}
    for path, module in model.named_modules():
        inside = [(wrapper, path.removeprefix(f"{wrapper}.")) for wrapper in wrappers if path.startswith(f"{wrapper}.")]
        if all(rest.startswith("base_layer") for _, rest in inside) and path not in wrappers:
            yield ".".join(name for name in path.split(".") if name != "base_layer"), module


def matching(expression: str, paths: Collection[str], setting: str) -> list[str]:
    """The module paths that an expression stands for.

    Args:
        expression: a name of `SUBSETS`; ``level0``, ``level1``, ... for the blocks of a UNet that work at the latents'
            resolution, at half of it, and so on; or a regular expression to be searched for.
        paths: of all modules.
        setting: what to call the expression in an error.

    Raises:
        SVDiffError: it is no valid regular expression, or asks for levels where there are none.
    """
    level = re.fullmatch(r"level(\d+)", expression)
    pattern = _level(int(level[1]), paths) if level else SUBSETS.get(expression, expression)
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise SVDiffError(f"{setting} {expression!r} is neither a subset nor a regular expression: {error}") from error
    return [path for path in paths if found.search(path)]


def by_layer(
    entries: Iterable[tuple[str, V | Mapping[str, V]]],
    paths: Collection[str],
    default: V,
    *,
    part: str,
    parts: Collection[str],
) -> dict[str, V]:
    """The value of each layer of a part of a pipeline: of the last entry that is about it.

    Args:
        entries: a name of `parts`, with a value for the whole part or a table by expressions for `matching`; or such an
            expression, which is about the denoiser, or the only part.
        paths: of the layers.
        default: the value of a layer that no entry is about.
        part: whose layers they are.
        parts: all that there are.

    Raises:
        SVDiffError: see `matching`; or an expression matches nothing.
    """
    takes_expressions = part == "denoiser" or len(parts) == 1
    values = dict.fromkeys(paths, default)
    for name, value in entries:
        if name == part:
            table: Mapping[str, Any] = value if isinstance(value, Mapping) else {"all": value}
        else:
            table = {name: value} if takes_expressions and name not in parts else {}
        for expression, one in table.items():
            found = matching(expression, paths, "layers")
            if not found:
                raise SVDiffError(f"layers {expression!r} matches no adapted layer (subsets: {', '.join(SUBSETS)})")
            values |= dict.fromkeys(found, one)
    return values


def _level(level: int, paths: Collection[str]) -> str:
    """What the paths of a UNet's level must contain; the last level has the middle too."""
    down = [int(found[1]) for path in paths if (found := re.match(r"down_blocks\.(\d+)\.", path))]
    last = max(down, default=-1)
    if level > last:
        there = f"level0 to level{last}" if down else "no levels"
        raise SVDiffError(f"there is no level{level}: the adapted layers have {there}")
    own = [rf"down_blocks\.{level}", rf"up_blocks\.{last - level}"]
    own += ["mid_block"] * (level == last) + ["conv_in", "conv_norm_out", "conv_out"] * (level == 0)
    return rf"^({'|'.join(own)})(\.|$)"


def _is_plain(weight: object) -> bool:
    """An ordinary floating-point parameter: no quantised tensor, no norm's missing weight."""
    return isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()
