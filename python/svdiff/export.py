"""svdiff export: what was trained as what other programs read: merged weights, LoRAs, svdiff-pytorch's files."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdiff_kernels import FactorCache, SVDiffError

from . import checkpoint, custom_diffusion, ldm, lora
from .attach import load
from .attached import weight_of
from .changes import Change, Fidelity, changes_of, compare
from .outputs import run_directory, write_run_file
from .pipelines import DENOISERS, DTYPES, load_pipeline

Format = Literal["merged", "single_file", "lora", "kohya", "svdiff_pytorch"]

SINGLE_FILE = "model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora.safetensors"

_ARCHITECTURES = {"1": "v1", "2": "v2-512", "xl": "xl-v1-base"}  # as modelspec calls them


@dataclass
class ExportConfig:
    """Settings of `export`; each is a flag of ``svdiff export``."""

    format: Format = field(
        metadata={
            "help": "merged: a folder for diffusers; single_file: a checkpoint of SD 1.x, 2.x or XL; lora: for "
            "diffusers; kohya: a LoRA for A1111, ComfyUI, sd-scripts; svdiff_pytorch: its files"
        }
    )
    pretrained_model_name_or_path: str = field(metadata={"help": "the base: folder, hub id, or miniature"})
    spectral_shifts_ckpt: str = field(
        metadata={"help": "folder or file with trained shifts, or with Custom Diffusion's weights"}
    )
    output_dir: str = field(default="outputs/export", metadata={"help": "a new folder for the result"})
    spectral_shifts_scale: float = field(default=1.0, metadata={"help": "weight of what was trained"})
    rank: int | None = field(default=None, metadata={"help": "of a LoRA, at most; default: all that moves"})
    energy: float | None = field(
        default=None, metadata={"help": "of a LoRA: the lowest rank of each layer that keeps this share of its square"}
    )
    max_error: float | None = field(
        default=None, metadata={"help": "of a LoRA: the lowest ranks by which no more of the whole change is lost"}
    )
    share: float | None = field(
        default=None,
        metadata={
            "help": "of a LoRA: the lowest rank of each layer that keeps this share of the sum of its change's "
            "singular values; 0.6 is Custom Diffusion's"
        },
    )
    norms: bool = field(
        default=True, metadata={"help": "of kohya: shifts of norms too, which diffusers refuses to read in a LoRA"}
    )
    dtype: Literal["fp32", "fp16", "bf16"] = field(default="fp32", metadata={"help": "of the result"})
    svd_cache_dir: str | None = field(
        default=None, metadata={"help": "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    variant: str | None = field(default=None, metadata={"help": "of the weight files, such as fp16"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})


@dataclass(frozen=True)
class ExportResult:
    """What `export` made.

    Attributes:
        path: the file, or the folder.
        fidelity: how exact it is.
    """

    path: Path
    fidelity: Fidelity

    def __str__(self) -> str:
        return f"{self.path}: {self.fidelity}"


def export(config: ExportConfig) -> ExportResult:
    """Write shifts, or Custom Diffusion's weights, in another format, into a new folder.

    The error against the model as it was trained is measured on what is written, and stored in run.json beside it.

    Raises:
        SVDiffError: settings that make no sense, a file that does not fit the base, or a format that has no place for
            this kind of model. No folder is made then.
    """
    _check(config)
    weights = custom_diffusion.find(config.spectral_shifts_ckpt)
    if weights is None:
        checkpoint.read_all(config.spectral_shifts_ckpt)
    elif config.format == "svdiff_pytorch":
        raise SVDiffError(f"{weights} holds weights, which have no place in files of shifts")
    else:
        custom_diffusion.read(weights)
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        pipeline = load_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
        trained: _Trained = _Shifts(config, pipeline) if weights is None else _Weights(config, pipeline)
        with torch.no_grad():
            name, fidelity = _WRITERS[config.format](config, pipeline, trained, staging)
        write_run_file(staging, "export", asdict(config), file=name, fidelity=asdict(fidelity))
    return ExportResult(Path(config.output_dir) / name, fidelity)


def _check(config: ExportConfig) -> None:
    if config.format not in get_args(Format):
        raise SVDiffError(f"format {config.format!r} is not one of {', '.join(get_args(Format))}")
    if config.dtype not in DTYPES:
        raise SVDiffError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    if not math.isfinite(config.spectral_shifts_scale):
        raise SVDiffError(f"spectral_shifts_scale is {config.spectral_shifts_scale}, not a finite number")
    for name in ("rank", "energy", "max_error", "share"):
        if getattr(config, name) is not None and config.format not in ("lora", "kohya"):
            raise SVDiffError(f"{name} is for LoRAs; the format {config.format} holds all that was trained")
    if config.rank is not None and config.rank < 1:
        raise SVDiffError(f"rank must be at least 1, not {config.rank}")
    for name in ("energy", "share"):
        if (value := getattr(config, name)) is not None and not 0 < value <= 1:
            raise SVDiffError(f"{name} must be above 0 and at most 1, not {value}")
    if config.max_error is not None and not 0 <= config.max_error < 1:
        raise SVDiffError(f"max_error must be from 0 to below 1, not {config.max_error}")
    if config.energy is not None and config.max_error is not None:
        raise SVDiffError("energy and max_error exclude each other: the one is about each layer, the other about all")
    if config.share is not None and (config.energy is not None or config.max_error is not None):
        raise SVDiffError("share and energy or max_error exclude each other: they are several ways to choose ranks")


class _Trained(Protocol):
    """What was trained, for a pipeline that is a plain one until `put_in` or has spectral layers."""

    def changes(self) -> list[Change]:
        """Of all layers."""

    def put_in(self) -> None:
        """Make the pipeline a plain one, with what was trained in its weights."""

    def change_now(self, change: Change) -> Tensor:
        """Of a layer, after `put_in`: how its weight differs from the base's, in the shape of `Change.weight`."""


class _Shifts:
    def __init__(self, config: ExportConfig, pipeline: Any) -> None:
        self.adapter = load(pipeline, config.spectral_shifts_ckpt, cache=FactorCache(config.svd_cache_dir), lazy=True)
        self.adapter.set_adapters("default", config.spectral_shifts_scale)
        self._scale = config.spectral_shifts_scale

    def changes(self) -> list[Change]:
        return changes_of(self.adapter, self._scale)

    def put_in(self) -> None:
        self.adapter.fuse()

    def change_now(self, change: Change) -> Tensor:
        (part,) = (part for part in self.adapter.parts if part.role == change.role)
        weight = weight_of(part.model.get_submodule(change.path)).float() - part.original_weight(change.path).float()
        return weight if change.layer.one_dim else weight.flatten(1)


class _Weights:
    def __init__(self, config: ExportConfig, pipeline: Any) -> None:
        self._config, self._pipeline = config, pipeline
        self._file = custom_diffusion.read(config.spectral_shifts_ckpt)
        self._layers = self._file.layers_of(pipeline)
        self._originals = {path: layer.weight.data for path, layer in self._layers.items()}

    def changes(self) -> list[Change]:
        return custom_diffusion.changes_of(self._originals, self._file.weights, self._config.spectral_shifts_scale)

    def put_in(self) -> None:
        custom_diffusion.load(self._pipeline, self._file.path, self._config.spectral_shifts_scale)

    def change_now(self, change: Change) -> Tensor:
        return self._layers[change.path].weight.float() - self._originals[change.path].float()


def _write_merged(config: ExportConfig, pipeline: Any, trained: _Trained, staging: Path) -> tuple[str, Fidelity]:
    fidelity = _merge(config, pipeline, trained)
    pipeline.save_pretrained(staging, safe_serialization=True)
    return "", fidelity


def _write_single_file(config: ExportConfig, pipeline: Any, trained: _Trained, staging: Path) -> tuple[str, Fidelity]:
    fidelity = _merge(config, pipeline, trained)
    if not ldm.holds_vae(pipeline):
        kind = type(pipeline.vae).__name__
        warnings.warn(f"{SINGLE_FILE} holds no VAE: the layout has no place for an {kind}", stacklevel=2)
    save_file(ldm.checkpoint_of(pipeline), staging / SINGLE_FILE, {"format": "pt", **_model_spec(config)})
    return SINGLE_FILE, fidelity


def _merge(config: ExportConfig, pipeline: Any, trained: _Trained) -> Fidelity:
    """Make the pipeline a plain one, in the dtype that is wanted."""
    trained.put_in()
    pipeline.to(DTYPES[config.dtype])
    return compare(trained.changes(), trained.change_now)


def _write_lora(config: ExportConfig, pipeline: Any, trained: _Trained, staging: Path) -> tuple[str, Fidelity]:
    denoiser = next(name for name in DENOISERS if getattr(pipeline, name, None) is not None)
    pairs, _, fidelity = _low_rank(config, trained, lora.diffusers_names(denoiser), norms=False)
    save_file(lora.diffusers_tensors(pairs), staging / LORA_FILE, {"format": "pt"})
    return LORA_FILE, fidelity


def _write_kohya(config: ExportConfig, pipeline: Any, trained: _Trained, staging: Path) -> tuple[str, Fidelity]:
    if not hasattr(pipeline, "unet"):
        raise SVDiffError(f"kohya's names are for UNets, not for a {type(pipeline).__name__}: export lora instead")
    generation = ldm.generation_of(pipeline)
    names = lora.kohya_names(pipeline.unet.config, xl=generation == "xl")
    pairs, norms, fidelity = _low_rank(config, trained, names, norms=config.norms)
    rank = str(max((pair.rank for pair in pairs.values()), default=0))
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": rank}),
        "ss_base_model_version": {"1": "sd_v1", "2": "sd_v2", "xl": "sdxl_base_v1-0"}[generation],
        "ss_v2": str(generation == "2"),
        **_model_spec(config),
        "modelspec.architecture": f"stable-diffusion-{_ARCHITECTURES[generation]}/lora",
    }
    save_file(lora.kohya_tensors(pairs, norms), staging / KOHYA_FILE, metadata)
    return KOHYA_FILE, fidelity


def _low_rank(
    config: ExportConfig, trained: _Trained, names: lora.Names, *, norms: bool
) -> tuple[dict[str, lora.Pair], dict[str, Tensor], Fidelity]:
    """What a LoRA holds, by the names of its format: pairs, and if wanted the changes of norms."""
    dtype = DTYPES[config.dtype]
    changes = trained.changes()
    named = {name: change for change in changes if (name := names(change)) is not None}
    matrices = {name: change.dsigma for name, change in named.items() if not change.layer.one_dim}
    ranks = lora.choose_ranks(
        matrices, rank=config.rank, energy=config.energy, max_error=config.max_error, share=config.share
    )
    pairs: dict[str, lora.Pair] = {}
    of_norms: dict[str, Tensor] = {}

    def written(change: Change) -> Tensor | None:
        name = names(change)
        if name is None or (change.layer.one_dim and not norms):
            return None
        if change.layer.one_dim:
            of_norms[name] = change.weight().to(dtype)
            return of_norms[name].float()
        if not ranks[name]:
            return torch.zeros(())
        alpha = max(ranks.values()) if config.format == "kohya" else ranks[name]
        pairs[name] = lora.make_pair(change, ranks[name], alpha, dtype)
        return pairs[name].product()

    fidelity = compare(changes, written)
    if not pairs and not of_norms:
        raise SVDiffError(f"{config.spectral_shifts_ckpt} changes nothing that the format {config.format} can hold")
    return pairs, of_norms, fidelity


def _write_svdiff_pytorch(
    config: ExportConfig, pipeline: Any, trained: _Trained, staging: Path
) -> tuple[str, Fidelity]:
    assert isinstance(trained, _Shifts)
    adapter, changes = trained.adapter, trained.changes()
    roles = [part.role for part in adapter.parts]
    content = {}
    for part in adapter.parts:
        layout = replace(part.layout, rank=None, one_dim="scalar")
        deltas = {change.path: _as_scalar(change) for change in changes if change.role == part.role}
        file = staging / checkpoint.FILE_NAMES[part.role]
        content[file] = checkpoint.encode(deltas, layout, roles, {}, DTYPES[config.dtype])
    checkpoint.write(content)
    written = {file.name: checkpoint.read(file).deltas for file in content}

    def read(change: Change) -> Tensor:
        dsigma = written[checkpoint.FILE_NAMES[change.role]][checkpoint.file_path(change.path)].float()
        layer = change.layer
        if not layer.one_dim:
            return replace(change, dsigma=dsigma[: layer.rank]).weight()
        return dsigma * _direction(layer)

    return "", compare(changes, read)


def _as_scalar(change: Change) -> Tensor:
    """A shift of svdiff-pytorch's: of all singular values, the untrained ones too; of a norm one number."""
    layer = change.layer
    if layer.one_dim:
        return (change.weight() @ _direction(layer))[None]
    missing = min(layer.weight.shape[0], layer.weight[0].numel()) - layer.rank
    return torch.nn.functional.pad(change.dsigma, (0, missing))


def _direction(layer: Any) -> Tensor:
    """The unit vector along which one number moves a norm's weight."""
    if layer.direction is not None:
        return layer.direction.cpu()
    weight = layer.sigma.cpu()
    return weight / torch.linalg.vector_norm(weight).clamp_min(1e-30)


def _model_spec(config: ExportConfig) -> dict[str, str]:
    return {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": Path(config.spectral_shifts_ckpt).absolute().name}


_WRITERS: dict[str, Callable[[ExportConfig, Any, _Trained, Path], tuple[str, Fidelity]]] = {
    "merged": _write_merged,
    "single_file": _write_single_file,
    "lora": _write_lora,
    "kohya": _write_kohya,
    "svdiff_pytorch": _write_svdiff_pytorch,
}
