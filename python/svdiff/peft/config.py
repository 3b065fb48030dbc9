"""SVDiffConfig: what an adapter of PEFT's is told, and what its adapter_config.json says."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

from peft import PeftConfig

from svdiff_kernels import SVDiffError

Parametrization = Literal["shift", "scale"]
Form = Literal["auto", "factored", "residual"]
Bias = Literal["none", "all", "svdiff_only"]


class SVDiffType(str, Enum):  # noqa: UP042  (a StrEnum prints as its value; PEFT splits "SVDiffType.SVDIFF")
    """Stands in for a member of `peft.PeftType`, which cannot be added to; it is equal to, and hashes as, its name."""

    SVDIFF = "SVDIFF"


@dataclass
class SVDiffConfig(PeftConfig):
    """Of an SVDiff adapter: the shifts of the singular values of some weights.

    All adapters of a model share its decompositions, so `rank`, `rank_pattern` and `form` are the same for all of them.

    Args:
        target_modules: which modules, as in `peft.LoraConfig`: ends of their names, or a regular expression of the
            whole name, or "all-linear". None is all linear layers (transformers' `Conv1D` too) and 2-D convolutions
            but the output layer of a language model. An `nn.Embedding` has to be named.
        exclude_modules: which of these not; ends of names or a regular expression.
        rank: train this many largest singular values of each weight; None trains all.
        rank_pattern: other ranks by module, as in `peft.LoraConfig`.
        parametrization: what is trained of each singular value: "shift" is SVDiff's delta, for
            ``relu(sigma + delta)``; "scale" is the z of SVF (Transformer^2), for ``relu(sigma * z)``. Of the latter
            z - 1 is kept and stored, which is 0 at the start as delta is, so that weight decay draws it to the base.
        form: "factored" computes ``U (scale * Vh x)``; "residual" adds what changed to the weight's own product, which
            leaves the base exact to the bit and is finer in half precision; "auto" is residual below full rank, else
            factored.
        bias: which biases are trained too: "none", "all", or "svdiff_only", those of adapted layers.
        modules_to_save: modules that are trained whole, and saved with the adapter.
        init_weights: start at the base. False starts at random shifts, for tests.
        layers_to_transform: adapt only layers of these numbers.
        layers_pattern: the name of the list that they are counted in.
        svd_cache_dir: where decompositions are kept; None is the user's cache, see `svdiff_kernels.FactorCache`. It is
            of this machine, and not saved.

    Raises:
        SVDiffError: a value is not one of those above.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank: int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    parametrization: Parametrization = "shift"
    form: Form = "auto"
    bias: Bias = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    svd_cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SVDiffType.SVDIFF
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT adds to it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for name, kind in {"parametrization": Parametrization, "form": Form, "bias": Bias}.items():
            if getattr(self, name) not in get_args(kind):
                raise SVDiffError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank is not None and rank < 1:
                raise SVDiffError(f"rank must be at least 1, not {rank}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise SVDiffError("layers_pattern says where layers_to_transform counts: give both, or neither")

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        values: dict[str, Any] = super().to_dict()
        del values["svd_cache_dir"]
        return values
