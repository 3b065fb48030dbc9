"""svdiff demo: teach the miniature a subject it has never seen, from four pictures, and measure what came of it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from svdiff_kernels import SVDiffError

from .attach import load
from .miniature import load_pipeline, world
from .miniature.evaluate import STEPS
from .miniature.task import Task, agreeing, recognised, unchanged
from .outputs import run_directory, write_run_file
from .sampling import save_picture
from .train import TrainConfig, train

_SHOWN = 8  # pictures a row of the grid
_PLAIN = 16  # toys that are drawn without the rare token, to see whether the subject has taken their place


@dataclass
class DemoConfig:
    """Settings of `demo`."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "a new folder for the grid, metrics and shifts"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})
    subject: str = field(default="mushroom", metadata={"help": "what to teach", "choices": sorted(world.SUBJECTS)})
    max_train_steps: int = field(default=350, metadata={"help": "optimiser steps"})
    num_prompts: int = field(default=64, metadata={"help": "new prompts, and class prompts, to judge by"})
    seed: int = field(default=0, metadata={"help": "of pictures, training and noise"})


@dataclass(frozen=True)
class DemoResult:
    """What `demo` measured; ``metrics.json`` holds `metrics`."""

    output_dir: Path
    metrics: dict[str, float]

    def __str__(self) -> str:
        m = self.metrics
        return (
            f"subject recognised in {m['subject_accuracy_base']:.0%} of new prompts before and "
            f"{m['subject_accuracy']:.0%} after, class prompts right in {m['class_accuracy_base']:.0%} and "
            f"{m['class_accuracy']:.0%}, {m['delta_bytes']:,} bytes, {m['seconds']:.0f} s\n"
            f"look at {self.output_dir / 'grid.png'}"
        )


def demo(config: DemoConfig) -> DemoResult:
    """The whole job on the built-in model: draw four pictures of a subject, train on them, compare before and after.

    Writes ``grid.png`` (the four pictures; before; after), ``metrics.json``, the delta file, and the training run.

    Raises:
        SVDiffError: output_dir cannot be used, or the miniature's weights are missing.
    """
    if config.num_prompts < 1:
        raise SVDiffError(f"num_prompts must be at least 1, not {config.num_prompts}")
    if config.subject not in world.SUBJECTS:
        raise SVDiffError(f"subject {config.subject!r} is not one of {', '.join(sorted(world.SUBJECTS))}")
    start = time.perf_counter()
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        pipeline = load_pipeline()
        base_bytes = _bytes_in_float32(pipeline)  # before its weights make way for factors
        task = Task((config.subject,), config.seed)
        pictures = task.write_pictures(staging / "instance_images", config.subject)
        asked, others = task.new_scenes(config.num_prompts), task.other_scenes(config.num_prompts)
        prompts, class_prompts = [task.prompt(scene) for scene in asked], [world.caption(scene) for scene in others]

        before, class_before = task.draw(pipeline, prompts), task.draw(pipeline, class_prompts)
        result = train(_train_config(config, task, staging))
        adapter = load(pipeline, result.output_dir)
        after, class_after = task.draw(pipeline, prompts), task.draw(pipeline, class_prompts)
        plain = [f"a {world.CLASS_NOUN} {world.place(scene.items[0].position)}" for scene in asked[:_PLAIN]]
        generic = task.draw(pipeline, plain)

        for file in result.files:
            shutil.copy(file, staging)
        metrics: dict[str, float] = {
            "subject_accuracy_base": recognised(before, asked),
            "subject_accuracy": recognised(after, asked),
            "placed_accuracy": agreeing(after, asked),
            "class_accuracy_base": unchanged(class_before, others),
            "class_accuracy": unchanged(class_after, others),
            "subject_in_plain_toys": recognised(generic, asked[:_PLAIN]),
            "num_parameters": adapter.num_parameters(),
            "delta_bytes": sum(file.stat().st_size for file in result.files),
            "base_bytes": base_bytes,
            "train_seconds": round(result.seconds, 1),
            "seconds": round(time.perf_counter() - start, 1),
        }
        rows = [
            (f"a {task.token(config.subject)} {world.CLASS_NOUN}: the four pictures", pictures, [""] * len(pictures))
        ]
        picked = [i * len(asked) // _SHOWN for i in range(min(_SHOWN, len(asked)))]
        captions = [prompts[i].removeprefix("a ") for i in picked]
        rows.append(("before", [before[i] for i in picked], captions))
        rows.append(("after", [after[i] for i in picked], captions))
        save_picture(_sheet(rows), staging / "grid.png")
        (staging / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        write_run_file(staging, "demo", asdict(config), **metrics)
    return DemoResult(Path(config.output_dir), metrics)


def _train_config(config: DemoConfig, task: Task, folder: Path) -> TrainConfig:
    class_prompts = task.class_prompts()
    return TrainConfig(
        pretrained_model_name_or_path="miniature",
        instance_data_dir=str(folder / "instance_images"),
        output_dir=str(folder / "training"),
        with_prior_preservation=True,
        class_prompt=class_prompts,
        num_class_images=len(class_prompts),
        sample_batch_size=32,
        prior_generation_scheduler_type="dpm++",
        prior_generation_num_inference_steps=STEPS,
        prior_generation_guidance_scale=2.0,  # weaker than for show: what is learnt from is guided once more
        train_text_encoder=True,  # or it says too little of the rare token, and the UNet takes it for any toy
        train_batch_size=8,
        learning_rate=1e-2,  # ten times the default: a small model, few steps
        learning_rate_1d=1e-2,
        lr_scheduler="cosine",
        max_train_steps=config.max_train_steps,
        seed=config.seed,
        report_to="none",
    )


def _bytes_in_float32(pipeline: Any) -> int:
    return sum(4 * p.numel() for part in ("unet", "text_encoder", "vae") for p in getattr(pipeline, part).parameters())


def _sheet(rows: list[tuple[str, list[Image.Image], list[str]]]) -> Image.Image:
    """Rows of pictures, enlarged, each with a title above and its caption below."""
    side, margin, title, line = 144, 12, 30, 14
    font, small = ImageFont.load_default(18), ImageFont.load_default(11)
    height = sum(title + side + margin + (3 * line if any(captions) else 0) for _, _, captions in rows)
    sheet = Image.new("RGB", (_SHOWN * (side + margin) + margin, height + margin), "white")
    draw, y = ImageDraw.Draw(sheet), margin // 2
    for name, images, captions in rows:
        draw.text((margin, y), name, "black", font)
        y += title
        for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x = margin + k * (side + margin)
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgray")
            draw.multiline_text((x, y + side + 3), _wrapped(caption, small, side), "dimgray", small, spacing=2)
        y += side + margin + (3 * line if any(captions) else 0)
    return sheet


def _wrapped(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
