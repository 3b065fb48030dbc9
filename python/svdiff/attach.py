"""attach: make a model's layers spectral. load: the same, for what a delta file needs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from svdiff_kernels import FactorCache, Factors, SVDiffError
from svdiff_kernels.bank import TRAINED
from svdiff_kernels.decompose import decomposed
from svdiff_kernels.nn import SpectralModule

from . import checkpoint
from .adapter import Adapter
from .attached import ONE_DIM_LAYERS, AttachedModel, layout_of
from .checkpoint import DeltaFile, Layout
from .parking import ParkingLot
from .pipelines import denoiser_of, text_encoders_of
from .targets import select

Form = Literal["auto", "factored", "residual", "recomposed"]
OneDim = Literal["vector", "scalar", "none"]


def attach(
    model_or_pipeline: Any,
    *,
    targets: str | Collection[str] = "all",
    rank: int | None = None,
    form: Form = "auto",
    one_dim: OneDim = "vector",
    cache: FactorCache | bool | None = None,
    text_encoder: bool | Collection[str] = False,
    lazy: bool = False,
) -> Adapter:
    """Give a model's layers spectral shifts: one trainable, active adapter "default", at zero.

    The model computes what it did before, everything else in it is frozen, and `Adapter.unload` undoes it all.

    Args:
        model_or_pipeline: a UNet, transformer or text encoder, or a diffusers pipeline that holds them. A LoRA
            of PEFT's may be in it, and stays as it is: the layers beneath are taken.
        targets: which layers of the denoiser: "all", "cross_attn", "cross_attn_kv", "up", "down", "mid", a regular
            expression searched for in module paths, or a collection of the very paths. A pipeline's text encoders are
            taken whole.
        rank: train this many largest singular values of each weight; None trains all.
        form: "factored" (the weight is dropped from memory), "residual" (it stays, and the base is exact to the bit),
            "recomposed" (rebuilt in every call), or "auto": residual below full rank, else factored.
        one_dim: weights of norms as vectors, as one scalar each (svdiff-pytorch's way), or not at all ("none").
        cache: where decompositions are kept; None or True is the user's cache, False is none.
        text_encoder: of a pipeline, take the text encoders too; or those named, such as ``["text_encoder_2"]``.
        lazy: let each layer load what the cache has of it when it first computes, instead of now; its weight stays in
            memory until then. What the cache lacks is decomposed now.

    Raises:
        SVDiffError: the model has spectral layers already, `targets` matches nothing, there is no such text
            encoder, or a weight holds NaN or inf. The model is then as it was.

    Example:
        >>> import svdiff
        >>> from svdiff.miniature import load_pipeline
        >>> pipeline = load_pipeline()
        >>> adapter = svdiff.attach(pipeline, targets="cross_attn_kv")
        >>> adapter.get_active_adapters()
        ['default']
        >>> groups = adapter.param_groups(lr=1e-3, lr_1d=1e-6)  # for any optimiser
        >>> adapter.num_parameters() == sum(p.numel() for group in groups for p in group["params"])
        True
        >>> adapter.unload()  # the original pipeline, to the bit
    """
    if one_dim not in get_args(OneDim):
        raise SVDiffError(f"one_dim {one_dim!r} is not one of {', '.join(get_args(OneDim))}")
    if rank is not None and rank < 1:
        raise SVDiffError(f"rank must be at least 1, not {rank}")
    models = models_of(model_or_pipeline)
    lone = isinstance(model_or_pipeline, nn.Module)
    named = set() if isinstance(text_encoder, bool) else set(text_encoder)
    if unknown := sorted(named - models.keys()):
        raise SVDiffError(f"this pipeline has no {unknown[0]!r}, only {', '.join(models)}")
    chosen = {
        role: select(
            model,
            targets if lone or role == "denoiser" else "all",
            one_dim=one_dim != "none",
            embeddings=role != "denoiser",
        )
        for role, model in models.items()
        if lone or role == "denoiser" or text_encoder is True or role in named
    }
    base_model = base_model_of(model_or_pipeline)
    layouts = {
        role: layout_of(modules, rank=rank, one_dim=one_dim, base_model=base_model) for role, modules in chosen.items()
    }
    return _attach(models, chosen, layouts, form, cache, lazy)


def load(
    model_or_pipeline: Any,
    path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    form: Form = "auto",
    cache: FactorCache | bool | None = None,
    lazy: bool = False,
) -> Adapter:
    """Attach just what delta files need, and load them; the first adapter acts.

    Args:
        model_or_pipeline: see `attach`.
        path: a folder with delta files, or the denoiser's file, for the adapter "default"; svdiff-pytorch's files will
            do. Or several of these by the names that the adapters are to have.
        form: see `attach`.
        cache: see `attach`.
        lazy: see `attach`.

    Raises:
        SVDiffError: no file, a damaged one, or one for another base. The model is then as it was.

    Example:
        >>> import svdiff
        >>> from svdiff.miniature import load_pipeline
        >>> pipeline = load_pipeline()
        >>> adapter = svdiff.attach(pipeline, targets="cross_attn_kv")
        >>> adapter.save_weights("my-dog")
        [PosixPath('my-dog/spectral_shifts.safetensors')]
        >>> adapter.unload()
        >>> svdiff.load(pipeline, {"dog": "my-dog"}).get_active_adapters()
        ['dog']
    """
    models = models_of(model_or_pipeline)
    adapters = {
        name: checkpoint.read_all(own) for name, own in (path if isinstance(path, Mapping) else {TRAINED: path}).items()
    }
    if isinstance(model_or_pipeline, nn.Module):
        adapters = {
            name: {role: file for role, file in files.items() if role in models} for name, files in adapters.items()
        }
    for files in adapters.values():
        if absent := [role for role in files if role not in models]:
            raise SVDiffError(f"{files[absent[0]].path} is for a {absent[0]}, which this pipeline does not have")
    by_role = {role: [files[role] for files in adapters.values() if role in files] for role in models}
    by_role = {role: files for role, files in by_role.items() if files}
    if not by_role:
        raise SVDiffError(f"{path} holds no shifts for a {next(iter(models))}")
    base_model = base_model_of(model_or_pipeline)
    chosen, layouts = {}, {}
    for role, of_role in by_role.items():
        possible = select(models[role], embeddings=role != "denoiser")
        paths = {checkpoint.model_path(p, possible) for file in of_role for p in file.deltas}
        chosen[role] = {p: module for p, module in possible.items() if p in paths}
        one_dim = _one_dim_of(of_role, possible)
        layouts[role] = layout_of(chosen[role], rank=of_role[0].rank, one_dim=one_dim, base_model=base_model)
    deltas = {  # before decomposing for nothing
        name: {role: file.for_layout(layouts[role]) for role, file in files.items()} for name, files in adapters.items()
    }
    adapter = _attach(models, chosen, layouts, form, cache, lazy)
    for name, of_adapter in deltas.items():
        adapter.load_deltas(of_adapter, name, activate=False)
    adapter.set_adapters(next(iter(deltas)))
    return adapter


def _attach(
    models: Mapping[str, nn.Module],
    chosen: Mapping[str, Mapping[str, nn.Module]],
    layouts: Mapping[str, Layout],
    form: str,
    cache: FactorCache | bool | None,
    lazy: bool,
) -> Adapter:
    if form not in get_args(Form):
        raise SVDiffError(f"form {form!r} is not one of {', '.join(get_args(Form))}")
    store = FactorCache() if cache is None or cache is True else cache or None
    lot = ParkingLot(None if store is None else Path(store.dir))
    attached: list[AttachedModel] = []
    try:
        for role, modules in chosen.items():
            layout = layouts[role]
            _check_plain(models[role])
            part = AttachedModel(
                role,
                models[role],
                modules,
                layout,
                form=form,
                factors_of=partial(_factors_of, store=store, layout=layout),
                sigmas_of=partial(_sigmas_of, store=store if lazy else None, layout=layout),
                lot=lot,
            )
            attached.append(part)
    except BaseException:
        for part in attached:
            part.detach()
        lot.close()
        raise
    return Adapter(attached, lot, left_out=models.keys() - chosen.keys())


def _factors_of(
    weights: Mapping[str, Tensor], *, store: FactorCache | None, layout: Layout
) -> Iterator[tuple[str, Factors]]:
    if store is not None:
        yield from store.iterate(weights, layout.rank, contents=layout.hashes)
        return
    paths = list(weights)
    for i, factors in decomposed(list(weights.values()), layout.rank, names=paths):
        yield paths[i], factors


def _sigmas_of(weights: Mapping[str, Tensor], *, store: FactorCache | None, layout: Layout) -> dict[str, Tensor]:
    """Of those weights that the store has."""
    if store is None:
        return {}
    found = {path: store.sigma(w, layout.rank, content=layout.hashes[path]) for path, w in weights.items()}
    return {path: sigma for path, sigma in found.items() if sigma is not None}


def models_of(model_or_pipeline: Any) -> dict[str, nn.Module]:
    """What can be adapted, by its role in a pipeline."""
    if isinstance(model_or_pipeline, nn.Module):
        from_transformers = any(c.__module__.startswith("transformers.") for c in type(model_or_pipeline).__mro__)
        return {"text_encoder" if from_transformers else "denoiser": model_or_pipeline}
    return {"denoiser": denoiser_of(model_or_pipeline), **text_encoders_of(model_or_pipeline)}


def base_model_of(model_or_pipeline: Any) -> str:
    """Hub id of the base, or the last part of its folder's path: files are shared, folders are private."""
    config = getattr(model_or_pipeline, "config", None)
    name = str(getattr(config, "_name_or_path", None) or type(model_or_pipeline).__name__)
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


def _check_plain(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, SpectralModule):
            raise SVDiffError(f"{type(model).__name__} has spectral layers already ({path}): unload its adapter first")


def _one_dim_of(files: Sequence[DeltaFile], possible: Mapping[str, nn.Module]) -> OneDim:
    """From the shapes, which files without metadata have too."""
    sizes = {
        delta.numel()
        for file in files
        for path, delta in file.deltas.items()
        if type(possible.get(checkpoint.model_path(path, possible))) in ONE_DIM_LAYERS
    }
    return "none" if not sizes else "scalar" if sizes == {1} else "vector"
