"""One subject, from six pictures: does it come when it is called, as asked, and what else has moved?

Three tables are made of such runs: all contenders on all subjects (``subjects``); spectral shifts of some layers only
(``layers``); and rates, of which each contender's best is its setting in the others (``rates``).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import svdiff
import torch
from filelock import FileLock
from PIL.Image import Image
from PIL.Image import open as open_image
from svdiff import TrainConfig
from svdiff.miniature import load_pipeline, world
from svdiff.miniature.evaluate import draw
from svdiff.miniature.task import Task, recognised, unchanged
from svdiff.outputs import is_finished
from svdiff.sampling import grid, save_picture
from svdiff.training import state

from .contenders import CONTENDERS, LAYERS, RATES, Contender
from .marks import class_marks, subject_marks, toy_marks
from .runs import Figures, Run
from .teach import config_of, layer_changes, link_class_images, task_of, trained

STEPS, BATCH = 500, 4
_PROMPTS = 64
_TOYS = 24
_FEWER_PROMPTS = 16  # where there are many models to be judged
_CURVES, _CURVE_POINTS = 2, 4  # subjects whose course is looked at
_GROUPS = 16
_COLUMNS = 8
_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SUBJECTS = tuple(world.SUBJECTS)

CASES: dict[str, dict[str, Contender]] = {"subjects": CONTENDERS, "layers": LAYERS, "rates": RATES}


def run(one: Run, work: Path) -> Figures:
    """Teach, draw and judge."""
    folder, task, config = one.folder(work), *_asked(one, work)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        result = svdiff.train(config)
    pipeline = trained(config, result.output_dir, fused=True)
    figures: Figures = {
        "numbers": result.num_parameters,
        "bytes": sum(file.stat().st_size for file in result.files),
        "steps": result.steps,
        "loss": result.loss,
        **_judged(pipeline, task, folder, _of_the_base(work, task)),
    }
    first = one.experiment == "subjects" and one.seed == 0
    if first:
        changes = layer_changes(pipeline).items()
        figures["changes"] = {name: float(f"{change:.3g}") for name, change in changes if change}
    found = state.checkpoints(result.output_dir)
    if found:
        figures["curve"] = {state.load(path).step: _short(trained(config, path), task) for path in found}
    if first and one.contender == "shifts":
        pipeline = load_pipeline()
        adapter = svdiff.load(pipeline, result.output_dir)
        figures["spectrum"] = _spectrum(adapter)
        figures["scales"] = {}
        for scale in _SCALES:
            adapter.set_adapters("default", scale)
            figures["scales"][scale] = _short(pipeline, task)
    for path in [*found, result.output_dir / "pipeline"]:  # what is large, and told already
        shutil.rmtree(path, ignore_errors=True)
    return figures


def learnt(contender: str, subject: str, seed: int, work: Path) -> Path:
    """The folder of what a contender has learnt of a subject for the first table; it is taught if it has not been."""
    one = Run("subjects", contender, subject, seed)
    folder = one.folder(work)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        _, config = _asked(one, work)
        learnt_in = Path(config.output_dir)
        if not is_finished(learnt_in):
            svdiff.train(config)
    return learnt_in


def _asked(one: Run, work: Path) -> tuple[Task, TrainConfig]:
    contender = CASES[one.experiment][one.contender]
    task = task_of((one.case,), one.seed, new_words=contender.new_words)
    curve = one.experiment == "subjects" and one.seed == 0 and one.case in SUBJECTS[:_CURVES]
    return task, _config(contender, task, one.folder(work), work, curve=curve)


def _spectrum(adapter: Any) -> dict[str, list[float]]:
    """How much singular values have moved, from the largest to the smallest: means of ``|delta| / sigma_1`` by kind.

    The singular values of each matrix are cut into as many groups by their order; matrices of fewer are left out.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for part in adapter.parts:
        paths = [path for path, layer in part.layers.items() if not layer.one_dim]
        for path, (sigma, delta) in zip(paths, part.singular_values("default"), strict=True):
            if len(sigma) >= _GROUPS:
                groups = torch.tensor_split((delta.abs() / sigma[0]), _GROUPS)
                found.setdefault(kind_of(f"{part.role}.{path}"), []).append(torch.stack([g.mean() for g in groups]))
    return {kind: [float(f"{x:.4g}") for x in torch.stack(rows).mean(0)] for kind, rows in found.items()}


def cut(sheet: Image, side: int) -> list[Image]:
    """The pictures of a grid, row by row."""
    return [
        sheet.crop((left, top, left + side, top + side))
        for top in range(0, sheet.height, side)
        for left in range(0, sheet.width, side)
    ]


def kind_of(path: str) -> str:
    """Which of `KINDS` a layer is: of `unet.` or `denoiser.` and `text_encoder.` paths."""
    if path.startswith("text_encoder"):
        return "text encoder"
    if ".attn2.to_k" in path or ".attn2.to_v" in path:
        return "cross-attention, K and V"
    if ".attn2." in path:
        return "cross-attention, Q and out"
    if ".attn1." in path:
        return "self-attention"
    if ".ff." in path:
        return "feed-forward"
    if ".conv" in path or "conv_shortcut" in path or "samplers" in path:
        return "convolutions"
    return "norms" if "norm" in path else "others"


KINDS = (
    "cross-attention, K and V", "cross-attention, Q and out", "self-attention", "feed-forward", "convolutions",
    "norms", "others", "text encoder",
)  # fmt: skip


def _short(pipeline: Any, task: Task) -> Figures:
    """The two marks that a course or a scale is shown by."""
    scenes, others = task.new_scenes(_FEWER_PROMPTS), task.other_scenes(_FEWER_PROMPTS)
    return {
        "recognised": recognised(task.draw(pipeline, [task.prompt(scene) for scene in scenes]), scenes),
        "unchanged": unchanged(task.draw(pipeline, [world.caption(scene) for scene in others]), others),
    }


def _judged(pipeline: Any, task: Task, folder: Path, base: Sequence[Image]) -> Figures:
    """All marks of what a pipeline has learnt of the subject of a task; pictures are kept in a folder."""
    subject = task.subjects[0]
    scenes, others = task.new_scenes(_PROMPTS), task.other_scenes(_PROMPTS)
    images = task.draw(pipeline, [task.prompt(scene) for scene in scenes])
    plain = task.draw(pipeline, [world.caption(scene) for scene in others])
    toys = draw(pipeline, [f"a {world.CLASS_NOUN}"] * _TOYS, 5000 * (task.seed + 1))
    for name, group in (("subject", images), ("others", plain), ("toys", toys)):
        save_picture(grid(group, _COLUMNS), folder / f"{name}.png")
    return {
        **subject_marks(images, scenes, task.examples(subject)),
        **class_marks(plain, others, base),
        **toy_marks(toys, subject),
    }


def _of_the_base(work: Path, task: Task) -> list[Image]:
    """What the base draws of the other prompts of a seed, which is the same for all contenders."""
    file = work / "base" / f"others_{task.seed}.png"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        images = task.draw(load_pipeline(), [world.caption(scene) for scene in task.other_scenes(_PROMPTS)])
        save_picture(grid(images, _COLUMNS), file)
    with open_image(file) as sheet:
        return cut(sheet.convert("RGB"), world.IMAGE_SIZE)[:_PROMPTS]


def _config(contender: Contender, task: Task, folder: Path, work: Path, *, curve: bool) -> TrainConfig:
    link_class_images(folder, work, task)
    settings: dict[str, Any] = {
        "max_train_steps": STEPS,
        "train_batch_size": BATCH,
        "overwrite": True,
        **contender.settings,
    }
    steps = settings["max_train_steps"]
    settings["checkpointing_steps"] = steps // _CURVE_POINTS if curve else 10 * steps
    return config_of(task, folder, **settings)
