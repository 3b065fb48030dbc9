"""Two subjects in one picture: taught together, or each by itself and then merged or added up.

Who is taught together may see cut-and-mixed pictures. Pairs are asked for on the ground that the pictures had, and on
others; each subject alone too, as in `subjects`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import svdiff
import torch
from svdiff import MergeConfig, TrainConfig, custom_diffusion
from svdiff.miniature import load_pipeline, world
from svdiff.miniature.task import EXAMPLES, Task, agreeing, both_in_place, share, unchanged
from svdiff.sampling import grid, save_picture

from .contenders import CONTENDERS, CUSTOM, LORA_16, SHIFTS, Contender
from .runs import Figures, Run
from .subjects import BATCH, learnt
from .teach import config_of, link_class_images, look, task_of, trained

TOGETHER = 800
_PROMPTS = 32
_CAPTION_WEIGHT = 1.0
_ROUNDS = 2  # of each of the scenes that no picture showed
PAIRS = {
    "mushroom+robot": ("mushroom", "robot"),
    "house+fish": ("house", "fish"),
    "flower+lolly": ("flower", "lolly"),
    "robot+lolly": ("robot", "lolly"),
}
CUT_MIX: dict[str, Any] = {
    "cut_mix_probability": 0.6,
    "cut_mix_prompts": [
        "{first} on the left and {second} on the right, gray background",
        "{second} on the right and {first} on the left, gray background",
    ],
}


@dataclass(frozen=True)
class Together:
    """Two subjects taught in one run.

    Attributes:
        contender: see there.
    """

    contender: Contender


@dataclass(frozen=True)
class Apart:
    """Each subject taught by itself, as for the first table.

    Attributes:
        contender: its name there.
        ends: by label, what is made of the two: a pipeline of their folders.
    """

    contender: str
    ends: dict[str, Callable[[Sequence[Path], Task, Path], tuple[Any, Figures]]]


def run(one: Run, work: Path) -> Figures:
    """Teach, draw and judge; by name of the end, where there are several."""
    way, subjects, folder = WAYS[one.contender], PAIRS[one.case], one.folder(work)
    if isinstance(way, Together):
        task = task_of(subjects, one.seed, new_words=way.contender.new_words)
        link_class_images(folder, work, task)
        config = _config(way.contender, task, folder)
        result = svdiff.train(config)
        return {
            "bytes": sum(file.stat().st_size for file in result.files),
            **judged(trained(config, result.output_dir), task, folder),
        }
    task = task_of(subjects, one.seed, new_words=CONTENDERS[way.contender].new_words, apart=True)
    folders = [learnt(way.contender, subject, one.seed, work) for subject in subjects]
    figures = {}
    for name, end in way.ends.items():
        pipeline, told = end(folders, task, folder)
        figures[name] = {**told, **judged(pipeline, task, folder, name)}
    return {"ends": figures}


def judged(pipeline: Any, task: Task, folder: Path, name: str = "pair") -> Figures:
    """All marks of what a pipeline knows of two subjects; pictures are kept in a folder."""
    found: Figures = {}
    for mark, elsewhere in (("both_in_place", False), ("both_elsewhere", True)):
        prompts, pairs = zip(*task.pairs(_PROMPTS, elsewhere=elsewhere), strict=True)
        images = task.draw(pipeline, prompts)
        found[mark] = both_in_place(images, pairs)
        save_picture(grid(images, 8), folder / f"{name}_{mark}.png")
    right = []
    for subject in task.subjects:  # both at the same places, in the same sizes, on the same grounds
        scenes = _ROUNDS * [scene for scene in world.subject_scenes(subject) if look(scene) not in EXAMPLES]
        images = task.draw(pipeline, [task.prompt(scene) for scene in scenes])
        save_picture(grid(images, 8), folder / f"{name}_{subject}.png")
        right.append([agreeing([image], [scene]) == 1 for image, scene in zip(images, scenes, strict=True)])
    found["agreeing"] = share([*right[0], *right[1]])
    found["worse"] = min(share(right[0]), share(right[1]))
    found["both_right"] = share(a and b for a, b in zip(*right, strict=True))
    others = task.other_scenes(_PROMPTS)
    plain = task.draw(pipeline, [world.caption(scene) for scene in others])
    return {**found, "unchanged": unchanged(plain, others)}


def _config(contender: Contender, task: Task, folder: Path) -> TrainConfig:
    how: dict[str, Any] = {
        "max_train_steps": TOGETHER,
        "train_batch_size": BATCH,
        "checkpointing_steps": 10 * TOGETHER,
        "overwrite": True,
    }
    return config_of(task, folder, **{**how, **contender.settings})


def _merged(folders: Sequence[Path], task: Task, folder: Path) -> tuple[Any, Figures]:
    result = svdiff.merge(
        MergeConfig(
            ckpt=[str(one) for one in folders],
            pretrained_model_name_or_path="miniature",
            caption_weight=_CAPTION_WEIGHT,  # by least squares over all captions that they were trained with
            output_dir=str(folder / "merged"),
            overwrite=True,
        )
    )
    pipeline = load_pipeline()
    if custom_diffusion.find(result.path) is None:
        svdiff.load(pipeline, result.path)
    else:
        custom_diffusion.load(pipeline, result.path)
    svdiff.load_tokens(pipeline, result.path.parent)
    told = {
        "merge_seconds": result.seconds,
        "constraint_error": result.constraint_error,
        "target_error": result.merged.target_error,
        "target_error_added": result.added.target_error,
        "text_drift": result.merged.drift,
        "text_drift_added": result.added.drift,
    }
    return pipeline, told


def _added_weights(folders: Sequence[Path], task: Task, folder: Path) -> tuple[Any, Figures]:
    """W0 + sum of the changes."""
    pipeline = load_pipeline()
    files = [custom_diffusion.read(one) for one in folders]
    for path in files[0].weights:
        layer = pipeline.unet.get_submodule(path)
        base = layer.weight.data.clone()
        with torch.no_grad():
            layer.weight += sum(file.weights[path] - base for file in files)
    for one in folders:
        svdiff.load_tokens(pipeline, one)
    return pipeline, {}


def _added_shifts(folders: Sequence[Path], task: Task, folder: Path) -> tuple[Any, Figures]:
    """relu(sigma + d1 + d2)."""
    pipeline = load_pipeline()
    names = {subject: str(one) for subject, one in zip(task.subjects, folders, strict=True)}
    adapter = svdiff.load(pipeline, names)
    adapter.set_adapters(list(names), [1.0] * len(names))
    for one in folders:
        svdiff.load_tokens(pipeline, one)
    return pipeline, {}


WAYS: dict[str, Together | Apart] = {
    "joint": Together(SHIFTS),
    "cutmix": Together(replace(SHIFTS, settings=CUT_MIX)),
    "unmix": Together(replace(SHIFTS, settings={**CUT_MIX, "unmix_loss_weight": 1.0})),
    "lora": Together(LORA_16),
    "custom": Together(CUSTOM),
    "custom_apart": Apart("custom", {"merged": _merged}),
    "mergeable_apart": Apart("mergeable", {"merged": _merged, "added": _added_weights}),
    "shifts_apart": Apart("shifts", {"added": _added_shifts}),
    "kv_apart": Apart("shifts_kv", {"merged": _merged, "added": _added_shifts}),
}
LABELS = {
    "joint": "shifts, together",
    "cutmix": "shifts, together, cut-mix",
    "unmix": "shifts, together, cut-mix and unmix",
    "lora": "LoRA r = 16, together",
    "custom": "Custom Diffusion, together",
    "custom_apart/merged": "Custom Diffusion, apart, merged",
    "mergeable_apart/merged": "Custom Diffusion, keep_prefix, apart, merged",
    "mergeable_apart/added": "Custom Diffusion, keep_prefix, apart, added up",
    "shifts_apart/added": "shifts, apart, added up",
    "kv_apart/merged": "shifts of K and V, apart, merged",
    "kv_apart/added": "shifts of K and V, apart, added up",
}
