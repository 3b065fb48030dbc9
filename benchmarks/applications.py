"""What fine-tunes do together, and what editing keeps: ``python -m benchmarks.applications mixing FOLDER``.

On the miniature, judged by its recogniser, for several seeds; each leaves a JSON file in the folder, and what is there
is not run again.

- mixing: two subjects and a style (a blackboard under everything), each trained by itself; then in one batch, added,
  interpolated, and taken from some groups of layers only.
- editing: pictures, each learnt by itself; one attribute of each is changed by words, from several kinds of noise.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import svdiff
from PIL import ImageDraw, ImageFont
from PIL.Image import Image
from PIL.Image import new as new_image
from svdiff import TrainConfig
from svdiff.edit import edited
from svdiff.miniature import load_pipeline, recogniser, world
from svdiff.miniature.evaluate import draw
from svdiff.miniature.task import Task, share
from svdiff.sampling import grid
from tqdm.auto import tqdm

from .study.teach import config_of, draw_class_pictures

_SUBJECTS = ("mushroom", "robot", "house")
_STYLE = "blackboard"
_STYLE_PICTURES = 24
_PROMPTS = 96  # of each subject, and as many plain ones
_FEWER = 48  # where there are many mixtures to be judged
_PATH = [i / 8 for i in range(9)]
_WEIGHTS = (0.0, 0.5, 0.75, 1.0)
_SHOWN = 8
_LABEL = 230  # pixels beside a row of pictures
_GROUPS = ("down", "mid", "up", "self_attn", "cross_attn", "level0", "level1", "text_encoder")
_MOVED = "moved by pixels"
_CONTRAST = 60.0  # RGB distance from the ground
_EDITS = 12  # a third of them of colour, of shape and of size

Mark = Callable[[Image], bool]
Row = Mapping[str, Any]

EDITS: dict[str, dict[str, Any]] = {
    "noise": {"start_from": "noise"},
    "inversion": {},
    "inversion, eta 0.5": {"eta": 0.5},
    "inversion, eta 1": {"eta": 1.0},
    "inversion, slerp 0.25": {"slerp_alpha": 0.25},
    "inversion, slerp 0.5": {"slerp_alpha": 0.5},
    "image, strength 0.6": {"start_from": "image", "strength": 0.6},
    "image, strength 0.8": {"start_from": "image", "strength": 0.8},
}


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="What do fine-tunes do together, and what does editing keep?")
    parser.add_argument("experiment", choices=("mixing", "editing"))
    parser.add_argument("folder", type=Path, help="of result files; those that are missing are made")
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--pictures", type=Path, help="also write grids of the first seed into this folder")
    options = parser.parse_args()
    run = {"mixing": mixing, "editing": editing}[options.experiment]
    options.folder.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in tqdm(range(options.seeds), desc="seeds"):
        file = options.folder / f"{options.experiment}_{seed}.json"
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(run(seed, options.pictures if seed == 0 else None), indent=1) + "\n")
            partial.replace(file)
        found.append(json.loads(file.read_text()))
    print(table(found))
    return 0


def mixing(seed: int, pictures: Path | None = None) -> dict[str, dict[str, float]]:
    """Marks of every kind of mixture, by what was done and what was looked for."""
    one, other = (_SUBJECTS[(seed + i) % len(_SUBJECTS)] for i in range(2))
    tasks = {subject: Task((subject,), seed, 6) for subject in (one, other)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for subject, task in tasks.items():
            config = config_of(task, folder / subject)
            draw_class_pictures(config, task, folder / subject / "class_images")
            svdiff.train(config)
        svdiff.train(_style_config(folder / _STYLE, seed))
        pipeline = load_pipeline()
        runs = {name: folder / name / "run" for name in (one, other, _STYLE)}
        adapter = svdiff.load(pipeline, {name: str(run) for name, run in runs.items()})

    def look_for(label: str, prompts: Sequence[str], mix: Row, **marks: Mark) -> None:
        images = draw(pipeline, prompts, noise, adapter=adapter, mixes=[mix] * len(prompts))
        shown.setdefault(label, images[:_SHOWN])
        found.setdefault(label, {}).update({mark: share(map(looks, images)) for mark, looks in marks.items()})

    noise, shown = 1000 * (seed + 1), dict[str, list[Image]]()
    sees = {name: _sees(name) for name in tasks} | {_STYLE: _is_on_black}
    prompts = {name: [task.prompt(scene) for scene in task.new_scenes(_PROMPTS)] for name, task in tasks.items()}
    prompts[_STYLE] = [_groundless(world.caption(scene)) for scene in tasks[one].other_scenes(_PROMPTS)]
    found: dict[str, dict[str, float]] = {}
    for name, looks in sees.items():
        look_for(f"alone: {_kind(name, one)}", prompts[name], {name: 1.0}, right=looks)
    batch = [(name, prompts[name][i], noise + i) for i in range(_PROMPTS) for name in sees]  # the noise of alone
    names, asked, seeds = zip(*batch, strict=True)
    images = draw(pipeline, asked, seeds, adapter=adapter, mixes=[{name: 1.0} for name in names])
    for i, (name, looks) in enumerate(sees.items()):
        found[f"in one batch: {_kind(name, one)}"] = {"right": share(map(looks, images[i :: len(sees)]))}
    marks = {"subject": sees[one], "style": _is_on_black, "both": lambda i: sees[one](i) and _is_on_black(i)}
    groundless = [_groundless(prompt) for prompt in prompts[one]]
    for weight in _WEIGHTS:
        look_for(f"subject + {weight:g} style", groundless, {one: 1.0, _STYLE: weight}, **marks)
    for group in _GROUPS:
        rest = {"all": 1.0, group: 0.0}
        look_for(f"without {group}", groundless[:_FEWER], {one: rest}, subject=sees[one])
        look_for(f"without {group}", groundless[:_FEWER], {_STYLE: rest}, style=_is_on_black)
    apart = {one: {"all": 1.0, "down": 0.0}, _STYLE: {"all": 1.0, "up": 0.0}}
    look_for("subject but down + style but up", groundless, apart, **marks)
    for t in _PATH:
        mix = {one: 1 - t, other: t}
        look_for(f"path {t:.3f}", prompts[one][:_FEWER], mix, first=sees[one], second=sees[other])
    if pictures is not None:
        _save_sheet(shown, pictures / "mixing.png")
    return found


def editing(seed: int, pictures: Path | None = None) -> dict[str, dict[str, float]]:
    """Of every choice of `EDITS`, and of the base model that has not learnt the pictures, what the edits did."""
    rng = random.Random(seed)
    scenes = [world.sample_scene(rng, 1) for _ in range(_EDITS)]
    targets = [changed(scene, ("color", "shape", "size")[i % 3], rng) for i, scene in enumerate(scenes)]
    originals = [world.render(scene, rng) for scene in scenes]
    pipeline = load_pipeline()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for i, (image, scene) in enumerate(zip(originals, scenes, strict=True)):
            (folder / f"p{i}" / "pictures").mkdir(parents=True)
            image.save(folder / f"p{i}" / "pictures" / "image.png")
            svdiff.train(picture_config(folder / f"p{i}", world.caption(scene), seed))
        adapter = svdiff.load(pipeline, {f"p{i}": folder / f"p{i}" / "run" for i in range(_EDITS)})
    learnt: list[dict[str, Any]] = [{f"p{i}": 1.0} for i in range(_EDITS)]
    found, shown = {}, {"original": originals}
    none: list[dict[str, Any]] = [{}] * _EDITS
    choices = [(label, learnt, how) for label, how in EDITS.items()]
    choices += [(f"not learnt: {label}", none, EDITS[label]) for label in ("noise", "inversion")]
    for label, mixes, how in choices:
        adapter.set_adapters_per_sample(mixes)
        prompts = [world.caption(target) for target in targets]
        images = edited(pipeline, originals, prompts, range(_EDITS), **how)
        shown[label] = images
        found[label] = edit_marks(images, scenes, targets) | {_MOVED: moved(originals, images)}
    if pictures is not None:
        _save_sheet(shown, pictures / "editing.png")
    return found


def edit_marks(
    images: Sequence[Image], scenes: Sequence[world.Scene], targets: Sequence[world.Scene]
) -> dict[str, float]:
    changed, placed, kept = [], [], []
    for image, scene, target in zip(images, scenes, targets, strict=True):
        reading = recogniser.read(image)
        seen = reading.seen[0].item if len(reading.seen) == 1 else None
        before, after = scene.items[0], target.items[0]
        (asked,) = (name for name in ("color", "shape", "size") if getattr(before, name) != getattr(after, name))
        rest = [name for name in ("color", "shape", "size") if name != asked]
        changed.append(seen is not None and getattr(seen, asked) == getattr(after, asked))
        placed.append(seen is not None and seen.position == after.position and reading.background == target.background)
        kept.append(
            seen is not None
            and reading.style == target.style
            and all(getattr(seen, name) == getattr(after, name) for name in rest)
        )
    both = [a and b for a, b in zip(changed, placed, strict=True)]
    return {"changed": share(changed), "place and ground": share(placed), "both": share(both), "rest": share(kept)}


def moved(before: Sequence[Image], after: Sequence[Image]) -> float:
    """By how many pixels the middle of what is seen has moved, in half the pictures by less; out, if it is gone."""
    middles = [[_middle(image) for image in images] for images in (before, after)]
    return statistics.median(math.dist(a, b) if a and b else world.IMAGE_SIZE for a, b in zip(*middles, strict=True))


def _middle(image: Image) -> tuple[float, float] | None:
    pixels = np.asarray(image, dtype=float)
    rows, columns = np.nonzero(np.linalg.norm(pixels - np.median(pixels, axis=(0, 1)), axis=-1) > _CONTRAST)
    return ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2) if len(rows) else None


def changed(scene: world.Scene, attribute: str, rng: random.Random) -> world.Scene:
    """The scene with another colour, shape or size of its object."""
    values = {"color": tuple(world.COLORS), "shape": world.SHAPES, "size": tuple(world.SIZES)}[attribute]
    item = scene.items[0]
    change: dict[str, Any] = {attribute: rng.choice([value for value in values if value != getattr(item, attribute)])}
    return replace(scene, items=(replace(item, **change),))


def picture_config(folder: Path, caption: str, seed: int, **settings: Any) -> TrainConfig:
    """As `svdiff edit` learns the picture in ``pictures/``, at rates that suit the miniature."""
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": "miniature",
        "instance_data_dir": str(folder / "pictures"),
        "instance_prompt": caption,
        "output_dir": str(folder / "run"),
        "max_train_steps": 100,
        "checkpointing_steps": 1000,
        "learning_rate": 2e-3,
        "learning_rate_1d": 2e-3,
        "train_batch_size": 4,
        "seed": seed,
        "report_to": "none",
        "overwrite": True,
    }
    return TrainConfig(**{**shared, **settings})


def _style_config(folder: Path, seed: int) -> TrainConfig:
    """Pictures of plain objects and toys on black, which no caption mentions."""
    folder.mkdir(parents=True)
    rng = random.Random(f"style/{seed}")
    lines = []
    for i in range(_STYLE_PICTURES):
        scene = replace(world.with_toys(world.sample_scene(rng, 1), rng, 0.5), style="solid", background="black")
        world.render(scene, rng).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": _groundless(world.caption(scene))}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return TrainConfig(
        pretrained_model_name_or_path="miniature",
        instance_data_dir=str(folder),
        instance_prompt="a picture",  # of what metadata.jsonl does not name
        output_dir=str(folder / "run"),
        max_train_steps=200,
        checkpointing_steps=1000,
        learning_rate=5e-3,
        learning_rate_1d=5e-3,
        lr_scheduler="cosine",
        train_batch_size=8,
        seed=seed,
        report_to="none",
    )


def _groundless(caption: str) -> str:
    """What a caption says of objects, and nothing of what is behind them."""
    return caption.partition(",")[0]


def _save_sheet(rows: Mapping[str, Sequence[Image]], path: Path) -> None:
    """Rows of pictures, each with its label."""
    sheets = {label: grid(images, len(images)) for label, images in rows.items()}
    width = _LABEL + max(sheet.width for sheet in sheets.values())
    whole = new_image("RGB", (width, sum(sheet.height for sheet in sheets.values())), "white")
    pen, top = ImageDraw.Draw(whole), 0
    for label, sheet in sheets.items():
        whole.paste(sheet, (_LABEL, top))
        pen.text((_LABEL - 8, top + sheet.height // 2), label, "black", ImageFont.load_default(14), anchor="rm")
        top += sheet.height
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)


def _sees(subject: str) -> Mark:
    return lambda image: recogniser.shows_subject(image, subject)


def _is_on_black(image: Image) -> bool:
    return recogniser.read(image).background == "black"


def _kind(name: str, first: str) -> str:
    return "style" if name == _STYLE else "first subject" if name == first else "second subject"


def table(found: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """Means over seeds, with the smallest and the largest."""
    lines = []
    for label in found[0]:
        cells = []
        for mark in found[0][label]:
            values = [run[label][mark] for run in found]
            mean, least, most = (_said(mark, value) for value in (statistics.fmean(values), min(values), max(values)))
            cells.append(f"{mark} {mean} ({least}-{most})")
        lines.append(f"{label:>28}  {'  '.join(cells)}")
    return "\n".join(lines)


def _said(mark: str, value: float) -> str:
    return f"{value:.1f}" if mark == _MOVED else f"{value:.0%}"


if __name__ == "__main__":
    sys.exit(main())
