"""svdiff merge: concepts that were trained each by itself, made one in closed form.

Of whole keys and values by Custom Diffusion's constrained least squares (arXiv 2212.04488) or by plain ones, of
spectral shifts of the same layers by least squares over the shifts; `closed_form` has the arithmetic.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from svdiff_kernels import FactorCache, SVDiffError

from . import checkpoint, custom_diffusion
from .attached import layout_of, weight_of
from .checkpoint import DeltaFile
from .closed_form import CAPTION_WEIGHT, directions, fit_weights, merge_shifts, merge_weights, shares_of, summary
from .combine import blend
from .custom_diffusion import WeightFile
from .miniature import NAME as MINIATURE
from .outputs import run_directory, write_run_file
from .pipelines import denoiser_of, device_of_choice, load_pipeline
from .targets import matching, select
from .tokens import add_token, read_tokens, token_files_of
from .training.data import CAPTIONS_FILE
from .training.families import Family, family_of

__all__ = ["MergeConfig", "MergeResult", "fit_weights", "merge", "merge_shifts", "merge_weights"]

_BATCH = 32
_MINIATURE_CAPTIONS = 1000
_SAME = 1e-4  # of a feature's size, by which encoding in another batch may change it


@dataclass
class MergeConfig:
    """Settings of `merge`; each is a flag of ``svdiff merge``."""

    ckpt: list[str] = field(
        metadata={
            "help": "a folder or file for each concept: all with Custom Diffusion's weights, or all with shifts of "
            "keys and values of cross-attention (svdiff train --targets cross_attn_kv)"
        }
    )
    pretrained_model_name_or_path: str = field(metadata={"help": "their base: folder, hub id, or miniature"})
    prompt: list[str] | None = field(
        default=None,
        metadata={"help": "what each is called in prompts, such as 'a sks toy'; default: all that it was trained with"},
    )
    captions: str | None = field(
        default=None,
        metadata={
            "help": "what should be drawn as before: a file with a caption a line, or a folder with metadata.jsonl; a "
            "thousand or so; the miniature has its own"
        },
    )
    caption_weight: float | None = field(
        default=None,
        metadata={
            "help": "how much captions count beside the words of one concept; default: of shifts "
            f"{CAPTION_WEIGHT}, of weights they give way: words are answered exactly"
        },
    )
    others: Literal["refuse", "add"] = field(
        default="refuse",
        metadata={"help": "of shifts of other layers of the denoiser, which see no text: refuse them, or add them up"},
    )
    output_dir: str = field(default="outputs/merge", metadata={"help": "a new folder for the result"})
    svd_cache_dir: str | None = field(
        default=None, metadata={"help": "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    variant: str | None = field(default=None, metadata={"help": "of the weight files, such as fp16"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})


@dataclass(frozen=True)
class Figures:
    """How good a merge is, over all keys and values.

    Attributes:
        target_error: ``|W c - W_k c| / |W_k c - W0 c|`` over the words c of every concept k: 0 answers them as the
            concept alone did, 1 is no better than the base.
        drift: ``|W c - W0 c| / |W0 c|`` over captions.
    """

    target_error: float
    drift: float


@dataclass(frozen=True)
class MergeResult:
    """What `merge` made.

    Attributes:
        path: the file with what was merged.
        merged: how good it is.
        added: how good it would be to add up what the concepts change.
        alone: of each concept by itself, on its own words.
        constraint_error: of weights as they are written, in fp32, the largest ``|W c - W_k c| / |W_k c|`` of a target
            word in a layer; None where none is met exactly.
        seconds: of the closed form, without loading and encoding.
    """

    path: Path
    merged: Figures
    added: Figures
    alone: list[Figures]
    constraint_error: float | None
    seconds: float

    def __str__(self) -> str:
        rows = {"merged": self.merged, "added up": self.added}
        rows |= {f"concept {i} alone": one for i, one in enumerate(self.alone, start=1)}
        lines = [f"{'':16}{'target error':>14}{'drift':>10}"]
        lines += [f"{name:16}{one.target_error:14.4f}{one.drift:10.4f}" for name, one in rows.items()]
        if self.constraint_error is not None:
            lines.append(f"target words are answered to {self.constraint_error:.1e}")
        return "\n".join([*lines, f"{self.path}, in {self.seconds:.2f} s"])


def merge(config: MergeConfig) -> MergeResult:
    """Merge concepts that were trained each by itself into one file of the same kind.

    Learned tokens that stand beside them are read, and copied beside the result.

    Raises:
        SVDiffError: settings that make no sense, files that cannot be read, are of two kinds or for another base, or
            shifts of layers that see no text. No folder is made then.
    """
    _check(config)
    concepts = _read(config)
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        pipeline = load_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
        family = family_of(pipeline)
        if not family.has_cross_attention:
            raise SVDiffError(f"merge: a {type(pipeline).__name__} has no cross-attention whose keys could be merged")
        prompts = _prompts(config, concepts)
        learn_tokens(pipeline, token_files(config.ckpt))
        for encoder in family.text_encoders.values():
            encoder.to(device_of_choice())
        # Exactly answered can be few words, and the paper's are those of the prompt; of least squares there may be any.
        padding = config.caption_weight is not None or isinstance(concepts[0], DeltaFile)
        encoded = iter(text_features(family, [prompt for own in prompts for prompt in own], padding=padding))
        targets = target_words([[next(encoded) for _ in own] for own in prompts], prompts)
        captions = summary(torch.cat(text_features(family, _captions(config), padding=padding)))
        if isinstance(concepts[0], WeightFile):
            merged = _merge_weights(config, pipeline, concepts, targets, captions, staging, _said(config, prompts))
        else:
            merged = _merge_shifts(config, pipeline, concepts, targets, captions, staging, _said(config, prompts))
        for name, file in token_files(config.ckpt).items():
            shutil.copyfile(file, staging / name)
        told = {key: value for key, value in asdict(merged).items() if key != "path"}
        write_run_file(staging, "merge", asdict(config), file=merged.path.name, prompts=prompts, **told)
    return MergeResult(**{**merged.__dict__, "path": Path(config.output_dir) / merged.path.name})


def text_features(family: Family, prompts: Sequence[str], *, padding: bool) -> list[Tensor]:
    """What keys and values see of each prompt: ``[L, d]`` in fp32, from its first token on.

    With `padding` that is all: cross-attention looks at padding as at words, and what an encoder makes of it sums up
    what stands before. Without, up to the token that ends the prompt.
    """
    device, found = family.pipeline.device, []
    end = family.pipeline.tokenizer.eos_token_id
    with torch.no_grad():
        for start in range(0, len(prompts), _BATCH):
            ids = {name: family.tokens(name, prompts[start : start + _BATCH]) for name in family.text_encoders}
            encoded = {name: family.encode(name, own.to(device)) for name, own in ids.items()}
            context = family.conditions(encoded)[0].float().cpu()
            lengths = (ids["text_encoder"][:, 1:] == end).int().argmax(1) + 2
            found += [one if padding else one[:length] for one, length in zip(context, lengths.tolist(), strict=True)]
    return found


def target_words(features: Sequence[Sequence[Tensor]], prompts: Sequence[Sequence[str]]) -> list[Tensor]:
    """Of each concept's prompts ``[L, d]`` the words that are its own, ``[n, d]``.

    What begins prompts of two concepts alike (the start of text, "a") is of neither: the encoder, which does not look
    ahead, gives it the same features in both, and they could not be answered as both concepts do.

    Raises:
        SVDiffError: a concept has no word of its own.
    """
    words = [torch.cat([one[1:] for one in own]) for own in features]  # without the start of text
    found = []
    for k, own in enumerate(words):
        kept = torch.ones(len(own), dtype=torch.bool)
        for other in words[:k] + words[k + 1 :]:
            kept &= torch.cdist(own, other).amin(1) > _SAME * torch.linalg.vector_norm(own, dim=1)
        if not kept.any():
            raise SVDiffError(f"prompt {prompts[k][0]!r} has no word of its own: another concept is called the same")
        found.append(own[kept])
    return found


def token_files(paths: Sequence[str]) -> dict[str, Path]:
    """The files with learned tokens beside what was trained with them, by a name that each can have in one folder."""
    found: dict[str, Path] = {}
    for path in paths:
        place = Path(path).expanduser()
        for file in token_files_of(place if place.is_dir() else place.parent):
            if file in found.values():
                continue
            names = chain([file.name], (f"{file.stem}_{number}.safetensors" for number in count(2)))
            found[next(name for name in names if name not in found)] = file
    return found


def learn_tokens(pipeline: Any, files: Mapping[str, Path]) -> None:
    """Give a pipeline the tokens that files hold.

    Raises:
        SVDiffError: a file is no textual inversion of this pipeline's encoder, or two define one token.
    """
    known: dict[str, Path] = {}
    for file in files.values():
        for token, vectors in read_tokens(file).items():
            if token in known:
                raise SVDiffError(
                    f"{known[token]} and {file} both call their concept {token}: train one of them with another "
                    "--modifier_token"
                )
            known[token] = file
            add_token(pipeline, token, vectors)


def _check(config: MergeConfig) -> None:
    if not config.ckpt:
        raise SVDiffError("ckpt: there is nothing to merge")
    if config.prompt is not None and len(config.prompt) != len(config.ckpt):
        raise SVDiffError(f"prompt: {len(config.prompt)} for {len(config.ckpt)} of ckpt")
    if config.prompt is not None and not all(prompt.strip() for prompt in config.prompt):
        raise SVDiffError("a prompt is empty: say what the concept is called")
    if config.others not in get_args(Literal["refuse", "add"]):
        raise SVDiffError(f"others {config.others!r} is not one of refuse, add")
    if (weight := config.caption_weight) is not None and not (math.isfinite(weight) and weight > 0):
        raise SVDiffError(f"caption_weight must be a number above 0, not {weight}")
    if config.captions is None and config.pretrained_model_name_or_path != MINIATURE:
        raise SVDiffError("captions: give a file or folder with captions of what should be drawn as before")
    if config.captions is not None:
        _captions(config)  # before the model loads


def _read(config: MergeConfig) -> list[WeightFile] | list[DeltaFile]:
    """The concepts' files, all of one kind."""
    found = [custom_diffusion.find(path) for path in config.ckpt]
    weights = [custom_diffusion.read(file) for file in found if file is not None]
    if len(weights) == len(found):
        return weights
    if weights:
        shifts = config.ckpt[found.index(None)]
        raise SVDiffError(f"{weights[0].path} holds weights, {shifts} does not: concepts of one kind can be merged")
    deltas = []
    for path in config.ckpt:
        files = checkpoint.read_all(path)
        if encoders := [part for part in files if part != "denoiser"]:
            raise SVDiffError(
                f"{files[encoders[0]].path} shifts the {encoders[0]}, and with it what all layers see: concepts can be "
                "merged that were trained without train_text_encoder"
            )
        deltas.append(files["denoiser"])
    return deltas


def _prompts(config: MergeConfig, concepts: Sequence[WeightFile | DeltaFile]) -> list[list[str]]:
    """Of each concept."""
    if config.prompt is not None:
        return [[prompt] for prompt in config.prompt]
    found = []
    for file in concepts:
        try:
            said = json.loads(file.metadata.get("instance_prompts", "[]"))
        except ValueError:
            said = []
        if not isinstance(said, list) or not said:
            raise SVDiffError(f"{file.path} does not tell its prompt: say by prompt what its concept is called")
        if len(said) > 1 and isinstance(file, WeightFile) and config.caption_weight is None:
            raise SVDiffError(
                f"{file.path} was trained with {len(said)} captions, too many words to be answered exactly: say by "
                "prompt what its concept is called, or give a caption_weight"
            )
        found.append([str(prompt) for prompt in said])
    return found


def _captions(config: MergeConfig) -> list[str]:
    if config.captions is None:
        from .miniature import world

        rng = random.Random(0)
        return [world.caption(world.sample_scene(rng)) for _ in range(_MINIATURE_CAPTIONS)]
    place = Path(config.captions).expanduser()
    file = place / CAPTIONS_FILE if place.is_dir() else place
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if file.suffix == ".jsonl":
            lines = [str(json.loads(line)["text"]) for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise SVDiffError(f"cannot read captions in {file}: {getattr(error, 'strerror', None) or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SVDiffError(f'{file} must have lines such as {{"file_name": "a.png", "text": "a caption"}}') from error
    if not lines:
        raise SVDiffError(f"{file} has no captions")
    return lines


def _said(config: MergeConfig, prompts: Sequence[Sequence[str]]) -> dict[str, object]:
    """What the file says of its origin; names of folders alone, since these are private."""
    names = [Path(path).absolute().name for path in config.ckpt]
    return {
        "instance_prompts": [prompt for own in prompts for prompt in own],
        "recipe": {"operation": "merge", "inputs": names},
    }


def _merge_weights(
    config: MergeConfig,
    pipeline: Any,
    concepts: Sequence[Any],
    targets: Sequence[Tensor],
    captions: Tensor,
    staging: Path,
    said: Mapping[str, object],
) -> MergeResult:
    layers: dict[str, nn.Linear] = {}
    for file in concepts:
        layers |= file.layers_of(pipeline)
    ledger, merged = _Ledger(targets, captions), {}
    start = time.perf_counter()
    asked, exact = torch.cat(list(targets)).double(), config.caption_weight is None
    if config.caption_weight is None:
        update = directions(asked, captions)
    else:
        shares = shares_of(targets, captions, config.caption_weight)
    for path, layer in layers.items():
        W0 = layer.weight.detach().cpu().double()
        own = [file.weights[path].double() if path in file.weights else W0 for file in concepts]
        changes = [W - W0 for W in own]
        if exact:
            wanted = torch.cat([c.double() @ change.T for c, change in zip(targets, changes, strict=True)])
            merged[path] = (W0 + wanted.T @ update).float()
        else:
            merged[path] = (W0 + sum(change @ one for change, one in zip(changes, shares, strict=True))).float()
        ledger.enter(W0, merged[path].double() - W0, changes)
    seconds = time.perf_counter() - start
    metadata = {**said, "base_model": concepts[0].metadata.get("base_model", "")}
    tokens = [token for file in concepts for token in (file.told("modifier_tokens") or [])]
    if tokens:
        metadata["modifier_tokens"] = tokens
    hashes = custom_diffusion.hashes_of({path: layer.weight for path, layer in layers.items()})
    file = custom_diffusion.write(staging, merged, metadata, hashes=hashes)
    return ledger.result(file, ledger.constraint_error if exact else None, seconds)


def _merge_shifts(
    config: MergeConfig,
    pipeline: Any,
    concepts: Sequence[Any],
    targets: Sequence[Tensor],
    captions: Tensor,
    staging: Path,
    said: Mapping[str, object],
) -> MergeResult:
    possible = select(denoiser_of(pipeline))
    common = checkpoint.common_layout(concepts)
    if unknown := sorted(common.shapes.keys() - possible.keys()):
        raise SVDiffError(f"{concepts[0].path.name}: key {unknown[0]}.delta belongs to no layer of this model")
    chosen = {path: module for path, module in possible.items() if path in common.shapes}
    layout = layout_of(chosen, rank=common.rank, one_dim=common.one_dim, base_model=common.base_model)
    deltas = [file.for_layout(layout) for file in concepts]
    seeing = set(matching("cross_attn_kv", chosen, "targets"))
    others = [path for path in chosen if path not in seeing]
    if others and config.others == "refuse":
        raise SVDiffError(
            f"{others[0]} is no key or value of cross-attention (and {len(others) - 1} more): pass --others add to add "
            "up shifts of such layers, or train with --targets cross_attn_kv"
        )
    if not seeing:
        raise SVDiffError("the files shift no key or value of cross-attention: there is nothing to merge by words")
    result = blend(deltas, layout.shapes, {path: [1.0] * len(deltas) for path in chosen})
    caption_weight = CAPTION_WEIGHT if config.caption_weight is None else config.caption_weight
    store, ledger, seconds = FactorCache(config.svd_cache_dir), _Ledger(targets, captions), 0.0
    weights = {path: weight_of(chosen[path]).detach().cpu() for path in chosen if path in seeing}
    for path, factors in store.iterate(weights, layout.rank, contents=layout.hashes):
        start = time.perf_counter()
        U, sigma, Vh = factors.U.double(), factors.sigma.double(), factors.Vh.double()
        own = [one.get(path, torch.zeros_like(sigma)).double() for one in deltas]
        shift = merge_shifts(Vh, sigma, own, targets, captions, caption_weight)

        def change(delta: Tensor, U: Tensor = U, sigma: Tensor = sigma, Vh: Tensor = Vh) -> Tensor:
            return (U * torch.maximum(delta, -sigma)) @ Vh

        ledger.enter(weights[path].double(), change(shift), [change(one) for one in own], change(sum(own)))
        result[path] = shift.float()
        seconds += time.perf_counter() - start
    file = staging / checkpoint.FILE_NAMES["denoiser"]
    checkpoint.write({file: checkpoint.encode(result, layout, ["denoiser"], said)})
    return ledger.result(file, None, seconds)


class _Ledger:
    """Adds up over layers what `Figures` are made of."""

    def __init__(self, targets: Sequence[Tensor], captions: Tensor) -> None:
        self._targets, self._captions = [one.double() for one in targets], captions.double()
        self.constraint_error = 0.0
        self._base = 0.0
        self._missed: dict[str, float] = {"merged": 0.0, "added": 0.0}
        self._drift: dict[str, float] = {"merged": 0.0, "added": 0.0}
        self._asked = 0.0
        self._alone = [0.0] * len(targets)

    def enter(self, W0: Tensor, merged: Tensor, own: Sequence[Tensor], added: Tensor | None = None) -> None:
        """A layer: what is changed of W0 by the merge, by each concept, and by all of them."""
        self._base += _square(self._captions @ W0.T)
        for name, change in (("merged", merged), ("added", torch.stack(list(own)).sum(0) if added is None else added)):
            self._drift[name] += _square(self._captions @ change.T)
            for words, one in zip(self._targets, own, strict=True):
                self._missed[name] += _square(words @ (change - one).T)
        for k, (words, one) in enumerate(zip(self._targets, own, strict=True)):
            self._asked += _square(words @ one.T)
            self._alone[k] += _square(self._captions @ one.T)
            error = torch.linalg.vector_norm(words @ (merged - one).T, dim=1)
            size = torch.linalg.vector_norm(words @ (W0 + one).T, dim=1)
            self.constraint_error = max(self.constraint_error, float((error / size).max()))

    def result(self, path: Path, constraint_error: float | None, seconds: float) -> MergeResult:
        """What came of it."""
        merged, added = (
            Figures(math.sqrt(self._missed[name] / (self._asked or 1.0)), math.sqrt(self._drift[name] / self._base))
            for name in ("merged", "added")
        )
        alone = [Figures(0.0, math.sqrt(one / self._base)) for one in self._alone]
        return MergeResult(path, merged, added, alone, constraint_error, seconds)


def _square(matrix: Tensor) -> float:
    return float(matrix.square().sum())
