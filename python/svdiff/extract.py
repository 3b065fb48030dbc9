"""svdiff extract: the shifts that come nearest to what another fine-tune changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svdiff_kernels import FactorCache, SVDiffError

from .adapter import Adapter
from .attach import OneDim, attach, models_of
from .attached import weight_of
from .outputs import run_directory, write_run_file
from .pipelines import load_pipeline, loading
from .progress import arithmetic_bar

_SVF_SUFFIX = ".z"


@dataclass
class ExtractConfig:
    """Settings of `extract`; each is a flag of ``svdiff extract``."""

    source: str = field(
        metadata={
            "help": "what was fine-tuned: a folder or hub id of a whole model; or a .safetensors file: a single-file "
            "checkpoint, a LoRA that diffusers can load, or SVF's factors, <module path>.z"
        }
    )
    pretrained_model_name_or_path: str = field(metadata={"help": "its base: folder, hub id, or miniature"})
    output_dir: str = field(default="outputs/extract", metadata={"help": "a new folder for the shifts"})
    targets: str = field(
        default="all", metadata={"help": "layers of the denoiser: all, cross_attn, ..., or a regular expression"}
    )
    rank: int | None = field(default=None, metadata={"help": "shift so many singular values; default: all"})
    one_dim: OneDim = field(default="vector", metadata={"help": "weights of norms: vector, scalar or none"})
    svd_cache_dir: str | None = field(
        default=None, metadata={"help": "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})


@dataclass(frozen=True)
class ExtractResult:
    """What `extract` made.

    Attributes:
        output_dir: the folder with the delta files.
        captured: share of ``|W' - W|^2``, over every parameter of the parts that differ, that the shifts have.
        by_part: the same for each part of the pipeline.
    """

    output_dir: Path
    captured: float
    by_part: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {share:.1%}" for part, share in self.by_part.items())
        return f"{self.output_dir}: the shifts capture {self.captured:.1%} of the squared change ({parts})"


def extract(config: ExtractConfig) -> ExtractResult:
    """Fit shifts to a fine-tune: ``delta = diag(U^T (W' - W) V)``, the best there is in the Frobenius norm.

    What a fine-tune changes is seldom diagonal in the basis of its base; how much of it is, is told.

    Raises:
        SVDiffError: the source cannot be read, is for another kind of model, or does not differ from its base. No
            folder is made then.
    """
    kind = _kind_of(config.source)
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        base = load_pipeline(config.pretrained_model_name_or_path)
        fitted = _from_svf(config, base) if kind == "svf" else _from_weights(config, base, _load(config, kind))
        fitted.adapter.save_weights(staging, extracted_from=Path(config.source).name, captured=fitted.captured)
        result = ExtractResult(Path(config.output_dir), fitted.captured, fitted.by_part)
        write_run_file(staging, "extract", asdict(config), captured=result.captured, by_part=result.by_part)
    return result


@dataclass(frozen=True)
class _Fitted:
    adapter: Adapter
    captured: float
    by_part: dict[str, float]


def fit(layer: Any, change: Tensor) -> tuple[Tensor, float]:
    """The shift of a spectral layer that comes nearest to a change of its weight.

    Args:
        layer: of `svdiff_kernels.nn`.
        change: ``W' - W``, in the weight's shape.

    Returns:
        The shift ``[r]``, which moves no singular value below zero, and how much of ``|change|^2`` it captures.
    """
    sigma, change = layer.sigma.cpu(), change.detach().cpu().float()
    if layer.one_dim and layer.form == "vector":
        wanted = delta = change.flatten()
    else:
        if layer.one_dim:
            wanted = (change.flatten() @ layer.direction.cpu())[None]
        else:
            factors = layer.factors()
            wanted = ((factors.U.float().T @ change.flatten(1)) * factors.Vh.float()).sum(1)
        delta = torch.maximum(wanted, -sigma)
    captured = 2 * torch.dot(delta.double(), wanted.double()) - delta.double().square().sum()
    return delta, float(captured)


def _from_weights(config: ExtractConfig, base: Any, tuned: Any) -> _Fitted:
    """Fit every layer of the denoiser, and of the text encoders that differ."""
    mine, theirs = models_of(base), models_of(tuned)
    changed = {
        role: square
        for role, model in mine.items()
        if (square := _squared_difference(config.source, role, model, theirs.get(role)))
    }
    if not changed:
        raise SVDiffError(f"{config.source} does not differ from {config.pretrained_model_name_or_path}")
    adapter = attach(
        base,
        targets=config.targets,
        rank=config.rank,
        one_dim=config.one_dim,
        cache=FactorCache(config.svd_cache_dir),
        text_encoder=changed.keys() - {"denoiser"},
        lazy=True,
    )
    deltas: dict[str, dict[str, Tensor]] = {part.role: {} for part in adapter.parts}
    captured = dict.fromkeys(changed, 0.0)
    parts = [part for part in adapter.parts if part.role in changed]
    work = sum(layer.weight.numel() for part in parts for layer in part.layers.values())
    with arithmetic_bar(work, "Fitting", delay=3) as bar:
        for part in parts:
            for path, layer in part.layers.items():
                weight = weight_of(theirs[part.role].get_submodule(path)).float()
                delta, own = fit(layer, weight - part.original_weight(path).float())
                deltas[part.role][path] = delta
                captured[part.role] += own
                bar.advance(layer.weight.numel())
    adapter.load_deltas(deltas)
    shares = {role: captured[role] / square for role, square in changed.items()}
    return _Fitted(adapter, sum(captured.values()) / sum(changed.values()), shares)


def _squared_difference(source: str, role: str, mine: nn.Module, other: nn.Module | None) -> float:
    """``|W' - W|^2`` over all parameters of a model."""
    theirs = {} if other is None else dict(other.named_parameters())
    total = 0.0
    for name, parameter in mine.named_parameters():
        if name not in theirs or theirs[name].shape != parameter.shape:
            shape = list(theirs[name].shape) if name in theirs else "not there"
            raise SVDiffError(
                f"{source} is for another model: {role} {name} is {shape}, of the base it is {list(parameter.shape)}"
            )
        total += float((theirs[name].detach().float() - parameter.detach().float()).double().square().sum())
    return total


def _from_svf(config: ExtractConfig, base: Any) -> _Fitted:
    """``sigma * z`` is ``sigma + delta`` with ``delta = sigma * (z - 1)`` (SVF, arXiv 2501.06252)."""
    with safe_open(config.source, framework="pt") as file:
        factors = {key.removesuffix(_SVF_SUFFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adapter = attach(base, targets=list(factors), one_dim="none", cache=FactorCache(config.svd_cache_dir), lazy=True)
    (part,) = adapter.parts
    deltas, wanted, lost = {}, 0.0, 0.0
    for path, layer in part.layers.items():
        z = factors[path].float().flatten()
        if z.shape != layer.sigma.shape or not torch.isfinite(z).all():
            raise SVDiffError(
                f"{config.source}: {path}{_SVF_SUFFIX} must be {layer.rank} finite numbers, not {z.numel()}"
            )
        exact = layer.sigma.cpu() * (z - 1)
        deltas[path] = torch.maximum(exact, -layer.sigma.cpu())
        wanted += float(exact.double().square().sum())
        lost += float((exact - deltas[path]).double().square().sum())
    if not wanted:
        raise SVDiffError(f"{config.source} changes nothing: all its factors are 1")
    adapter.load_deltas({part.role: deltas})
    share = 1 - lost / wanted
    return _Fitted(adapter, share, {part.role: share})


def _kind_of(source: str) -> Literal["model", "checkpoint", "lora", "svf"]:
    """What a fine-tune is: a folder or hub id, or one of three kinds of files."""
    path = Path(source).expanduser()
    if path.is_dir() or not (path.exists() or path.suffix):
        return "model"
    if path.suffix != ".safetensors":
        raise SVDiffError(f"{source} is no .safetensors file: nothing else is read, since it could run code")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except FileNotFoundError as error:
        raise SVDiffError(f"there is no file {source}") from error
    except (SafetensorError, OSError) as error:
        raise SVDiffError(f"{source} is not a readable safetensors file: {error}") from error
    if keys and all(key.endswith(_SVF_SUFFIX) for key in keys):
        return "svf"
    return "lora" if any("lora" in key for key in keys) else "checkpoint"


def _load(config: ExtractConfig, kind: str) -> Any:
    """The fine-tuned pipeline, by diffusers' own loaders."""
    if kind == "model":
        return load_pipeline(config.source)
    tuned = load_pipeline(config.pretrained_model_name_or_path)
    file = Path(config.source).expanduser()
    with loading(config.source):
        if kind == "lora":
            tuned.load_lora_weights(file.parent, weight_name=file.name)
            tuned.fuse_lora()
            tuned.unload_lora_weights()
            return tuned
        return type(tuned).from_single_file(
            str(file), config=config.pretrained_model_name_or_path, vae=tuned.vae, torch_dtype=torch.float32
        )
