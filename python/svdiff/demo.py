"""svdiff demo: teach the miniature a subject it has never seen, from four pictures, and measure what came of it."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from svdiff_kernels import SVDiffError

from .attach import load
from .miniature import load_pipeline, recogniser, world
from .miniature.evaluate import GUIDANCE, STEPS
from .outputs import run_directory, write_run_file
from .sampling import sample, save_picture
from .train import TrainConfig, train

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

TOKEN = world.RARE_TOKENS[0]
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
        examples, new = _split(world.subject_scenes(config.subject), config.seed)
        pictures = _write_instances(staging / "instance_images", examples, config.seed)
        rng = random.Random(config.seed)
        asked = [new[i % len(new)] for i in range(config.num_prompts)]
        others = [world.sample_scene(rng, 1, held_out_only=True) for _ in range(config.num_prompts)]
        prompts = [world.with_rare_token(scene, TOKEN) for scene in asked]
        class_prompts = [world.caption(scene) for scene in others]

        before = _draw(pipeline, prompts, config.seed)
        class_before = _draw(pipeline, class_prompts, config.seed)
        result = train(_train_config(config, staging))
        adapter = load(pipeline, result.output_dir)
        after = _draw(pipeline, prompts, config.seed)
        class_after = _draw(pipeline, class_prompts, config.seed)
        plain = [f"a {world.CLASS_NOUN} {world.place(scene.items[0].position)}" for scene in asked[:_PLAIN]]
        generic = _draw(pipeline, plain, config.seed)

        for file in result.files:
            shutil.copy(file, staging)
        metrics: dict[str, float] = {
            "subject_accuracy_base": _subject_share(before, config.subject),
            "subject_accuracy": _subject_share(after, config.subject),
            "placed_accuracy": _placed_share(after, asked),
            "class_accuracy_base": _class_share(class_before, others),
            "class_accuracy": _class_share(class_after, others),
            "subject_in_plain_toys": _subject_share(generic, config.subject),
            "num_parameters": adapter.num_parameters(),
            "delta_bytes": sum(file.stat().st_size for file in result.files),
            "base_bytes": base_bytes,
            "train_seconds": round(result.seconds, 1),
            "seconds": round(time.perf_counter() - start, 1),
        }
        rows = [(f"a {TOKEN} {world.CLASS_NOUN}: the four pictures", pictures, [""] * len(pictures))]
        picked = [i * len(asked) // _SHOWN for i in range(min(_SHOWN, len(asked)))]
        captions = [prompts[i].removeprefix("a ") for i in picked]
        rows.append(("before", [before[i] for i in picked], captions))
        rows.append(("after", [after[i] for i in picked], captions))
        save_picture(_sheet(rows), staging / "grid.png")
        (staging / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        write_run_file(staging, "demo", asdict(config))
    return DemoResult(Path(config.output_dir), metrics)


def _train_config(config: DemoConfig, folder: Path) -> TrainConfig:
    class_prompts = _class_prompts(config.seed)
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


def _class_prompts(seed: int) -> list[str]:
    """Toys of no kind wherever the subject is taught to stand, and plain scenes, which should stay what they are."""
    rng = random.Random(f"prior/{seed}")
    toys = [
        f"a {size} {world.CLASS_NOUN} {world.place(position)}, {background} background"
        for position in world.POSITIONS
        for size in world.SIZES
        for background in world.BACKGROUNDS
    ]
    return toys + [world.caption(world.sample_scene(rng, 1)) for _ in range(142)]


def _split(scenes: list[world.Scene], seed: int) -> tuple[list[world.Scene], list[world.Scene]]:
    """Four scenes to learn from, which show every position, size and background, and the others, shuffled."""
    by_look = {(s.items[0].position, s.items[0].size, s.background): s for s in scenes}
    examples = [
        by_look["left", "large", "white"],
        by_look["right", "small", "gray"],
        by_look["center", "large", "black"],
        by_look["center", "small", "white"],
    ]
    others = [scene for scene in scenes if scene not in examples]
    random.Random(seed).shuffle(others)
    return examples, others


def _write_instances(folder: Path, scenes: Sequence[world.Scene], seed: int) -> list[Image.Image]:
    """Render the examples, with their captions in ``metadata.jsonl``."""
    folder.mkdir()
    rng, images, lines = random.Random(seed), [], []
    for i, scene in enumerate(scenes):
        images.append(world.render(scene, rng))
        images[-1].save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": world.with_rare_token(scene, TOKEN)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return images


def _draw(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    from diffusers import DPMSolverMultistepScheduler

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    seeds = range(1000 * (seed + 1), 1000 * (seed + 1) + len(prompts))
    size = (world.IMAGE_SIZE, world.IMAGE_SIZE)
    return list(
        sample(
            pipeline,
            prompts,
            list(seeds),
            batch_size=32,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            resolution=size,
        )
    )


def _subject_share(images: Sequence[Image.Image], subject: str) -> float:
    return sum(recogniser.shows_subject(image, subject) for image in images) / len(images)


def _placed_share(images: Sequence[Image.Image], scenes: Sequence[world.Scene]) -> float:
    """Share of pictures with the subject alone, where and on what the prompt says."""
    right = 0
    for image, scene in zip(images, scenes, strict=True):
        reading = recogniser.read(image)
        wanted = scene.items[0]
        seen = [(s.subject, s.item.position) for s in reading.seen]
        right += seen == [(wanted.shape, wanted.position)] and reading.background == scene.background
    return right / len(images)


def _class_share(images: Sequence[Image.Image], scenes: Sequence[world.Scene]) -> float:
    return sum(recogniser.agrees(image, scene) for image, scene in zip(images, scenes, strict=True)) / len(images)


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
