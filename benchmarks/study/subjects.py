"""One subject, from six pictures: does it come when it is called, as asked, and what else has moved?

Three tables are made of such runs: all contenders on all subjects (``subjects``); spectral shifts of some layers only
(``layers``); and rates, of which each contender's best is its setting in the others (``rates``).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import svdiff
import torch
from svdiff import TrainConfig
from svdiff.miniature import load_pipeline, world
from svdiff.miniature.evaluate import draw
from svdiff.miniature.task import Task, recognised, unchanged
from svdiff.sampling import grid, save_picture
from svdiff.training import state

from .contenders import CONTENDERS, LAYERS, RATES, Contender
from .marks import class_marks, subject_marks, toy_marks
from .runs import Figures, Run
from .teach import PICTURES, config_of, layer_changes, link_class_images, trained

STEPS = 500
_PROMPTS = 64
_TOYS = 24
_FEWER_PROMPTS = 24
_CURVE_POINTS = 4
_GROUPS = 16
_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SUBJECTS = tuple(world.SUBJECTS)

CASES: dict[str, dict[str, Contender]] = {"subjects": CONTENDERS, "layers": LAYERS, "rates": RATES}


def run(one: Run, work: Path) -> Figures:
    """Teach, draw and judge."""
    contender = CASES[one.experiment][one.contender]
    folder = one.folder(work)
    task = Task((one.case,), one.seed, PICTURES, contender.new_words)
    config = _config(contender, task, folder, work, curve=one.experiment == "subjects" and one.seed == 0)
    result = svdiff.train(config)
    pipeline = trained(config, result.output_dir, fused=True)
    figures: Figures = {
        "numbers": result.num_parameters,
        "bytes": sum(file.stat().st_size for file in result.files),
        "steps": result.steps,
        "loss": result.loss,
        **judged(pipeline, task, folder),
        "changes": {name: float(f"{change:.3g}") for name, change in layer_changes(pipeline).items() if change},
    }
    found = state.checkpoints(result.output_dir)
    if found:
        figures["curve"] = {state.load(path).step: _short(trained(config, path), task) for path in found}
    if one.experiment == "subjects" and one.contender == "shifts":
        pipeline = load_pipeline()
        adapter = svdiff.load(pipeline, result.output_dir)
        figures["scales"] = {}
        for scale in _SCALES:
            adapter.set_adapters("default", scale)
            figures["scales"][scale] = _short(pipeline, task)
        figures["spectrum"] = _spectrum(adapter)
    for path in [*found, result.output_dir / "pipeline"]:  # what is large, and told already
        shutil.rmtree(path, ignore_errors=True)
    return figures


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


def kind_of(path: str) -> str:
    """What a layer is, for tables: `unet.` or `denoiser.` and `text_encoder.` paths."""
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


def _short(pipeline: Any, task: Task) -> Figures:
    """The two marks that a course or a scale is shown by."""
    scenes, others = task.new_scenes(_FEWER_PROMPTS), task.other_scenes(_FEWER_PROMPTS)
    return {
        "recognised": recognised(task.draw(pipeline, [task.prompt(scene) for scene in scenes]), scenes),
        "unchanged": unchanged(task.draw(pipeline, [world.caption(scene) for scene in others]), others),
    }


def judged(pipeline: Any, task: Task, folder: Path | None = None) -> Figures:
    """All marks of what a pipeline has learnt of the (first) subject of a task; pictures are kept in a folder."""
    subject = task.subjects[0]
    examples = task.examples(subject)
    scenes, others = task.new_scenes(_PROMPTS), task.other_scenes(_PROMPTS)
    class_prompts = [world.caption(scene) for scene in others]
    images = task.draw(pipeline, [task.prompt(scene) for scene in scenes])
    plain = task.draw(pipeline, class_prompts)
    toys = draw(pipeline, [f"a {world.CLASS_NOUN}"] * _TOYS, 5000 * (task.seed + 1))
    if folder is not None:
        for name, group in (("subject", images), ("others", plain), ("toys", toys)):
            save_picture(grid(group, 8), folder / f"{name}.png")
    return {
        **subject_marks(images, scenes, examples),
        **class_marks(plain, others, task.draw(load_pipeline(), class_prompts)),
        **toy_marks(toys, subject),
    }


def _config(contender: Contender, task: Task, folder: Path, work: Path, *, curve: bool) -> TrainConfig:
    link_class_images(folder, work, task)
    settings: dict[str, Any] = {"max_train_steps": STEPS, "overwrite": True, **contender.settings}
    steps = settings["max_train_steps"]
    settings["checkpointing_steps"] = steps // _CURVE_POINTS if curve else 10 * steps
    return config_of(task, folder, **settings)
