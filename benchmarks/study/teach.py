"""Teaching the miniature, by any method, and what came of it as a pipeline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import svdiff
import torch
from PIL.Image import Image
from svdiff import TrainConfig, custom_diffusion
from svdiff.miniature import load_pipeline, world
from svdiff.miniature.evaluate import STEPS
from svdiff.miniature.task import Task
from svdiff.pipelines import set_scheduler
from svdiff.training.prior import class_pictures

PICTURES = 6  # of each subject to learn from
RARE = {"mushroom": "sks", "house": "sks", "lolly": "sks", "robot": "zwx", "fish": "zwx", "flower": "zwx"}
"""The word for each subject: two that are paired have two."""


def task_of(subjects: Sequence[str], seed: int, *, new_words: bool, apart: bool = False) -> Task:
    """What is taught to all contenders, but for the words."""
    return Task(tuple(subjects), seed, PICTURES, new_words, apart, tuple(RARE[subject] for subject in subjects))


def config_of(task: Task, folder: Path, subjects: Sequence[str] | None = None, **settings: Any) -> TrainConfig:
    """How a task is taught, or some of its subjects: pictures are written into the folder.

    `settings` are beside what all share; there is one initializer token for all new words.
    """
    subjects = subjects or task.subjects
    prompts = task.class_prompts()
    concepts = []
    for subject in subjects:
        task.write_pictures(folder / subject, subject)
        name = f"a {task.token(subject)} {world.CLASS_NOUN}"
        concepts.append(
            {
                "instance_data_dir": str(folder / subject),
                "token": task.token(subject),
                "phrase": name,
                "class_phrase": f"a {world.CLASS_NOUN}",
                "class_prompt": prompts,
                "class_data_dir": str(folder / "class_images"),
            }
        )
    (folder / "concepts.json").write_text(json.dumps(concepts))
    steps = 700 if len(concepts) == 1 else 1000
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": "miniature",
        "concepts_list": str(folder / "concepts.json"),
        "output_dir": str(folder / "run"),
        "with_prior_preservation": True,
        "num_class_images": len(prompts),
        "train_text_encoder": True,
        "prior_loss_weight": 0.3,
        "train_batch_size": 8,
        "learning_rate": 1e-2,
        "learning_rate_1d": 1e-2,
        "lr_scheduler": "cosine",
        "max_train_steps": steps,
        "checkpointing_steps": steps // 4,
        "seed": task.seed,
        "report_to": "none",
    }
    if task.new_words:
        shared |= {"modifier_token": [task.token(subject) for subject in subjects]}
        settings = settings | {"initializer_token": len(subjects) * [settings["initializer_token"]]}
    return TrainConfig(**{**shared, **settings})


def config_of_pictures(folder: Path, pictures: Iterable[tuple[Image, str]], **settings: Any) -> TrainConfig:
    """How captioned pictures are learnt, without a prior: they are written into the folder."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (image, caption) in enumerate(pictures):
        image.save(folder / "pictures" / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": caption}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": "miniature",
        "instance_data_dir": str(folder / "pictures"),
        "output_dir": str(folder / "run"),
        "checkpointing_steps": 10_000,
        "lr_scheduler": "cosine",
        "train_batch_size": 8,
        "report_to": "none",
        "overwrite": True,
    }
    return TrainConfig(**{**shared, **settings})


def draw_class_pictures(config: TrainConfig, task: Task, folder: Path) -> None:
    """Those of the task's class prompts, as the base model draws them."""
    pipeline = load_pipeline()
    set_scheduler(pipeline, "dpm++")
    class_pictures(
        pipeline,
        folder,
        task.class_prompts(),
        config.num_class_images,
        batch_size=32,
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        resolution=world.IMAGE_SIZE,
        seed=task.seed,
        device=pipeline.device,
    )


def trained(config: TrainConfig, folder: Path, *, fused: bool = False) -> Any:
    """A pipeline with what a run, or a checkpoint of it, has learnt; `fused` into plain weights, if that is wanted."""
    if config.method == "full":
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline = load_pipeline()
    if config.method == "svdiff":
        adapter = svdiff.load(pipeline, folder)
        if fused:
            adapter.fuse()
    elif config.method == "lora":
        pipeline.load_lora_weights(folder)
        if fused:
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    elif config.method == "custom_diffusion":
        custom_diffusion.load(pipeline, folder)
    svdiff.load_tokens(pipeline, folder)
    return pipeline


def look(scene: world.Scene) -> tuple[str, str, str]:
    """What tells the scenes of a subject apart, as `task.EXAMPLES` has them."""
    return scene.items[0].position, scene.items[0].size, scene.background


def prepare(work: Path, seeds: int, *, several: bool) -> None:
    """Draw the class pictures that all runs of a seed share, those that are missing."""
    for seed in range(seeds):
        task = task_of(("mushroom", "robot") if several else ("mushroom",), seed, new_words=False)
        folder = class_images(work, task)
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            draw_class_pictures(config_of(task, partial / "task"), task, partial / "pictures")
            (partial / "pictures").rename(folder)
            shutil.rmtree(partial)


def class_images(work: Path, task: Task) -> Path:
    """Where they are."""
    return work / "class_images" / f"{'several' if task.side_by_side else 'one'}_{task.seed}"


def link_class_images(folder: Path, work: Path, task: Task) -> None:
    """Where `config_of` looks for them, without another copy."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "class_images"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(class_images(work, task), folder))


def layer_changes(pipeline: Any) -> dict[str, float]:
    """By how much each weight has moved from the base's, relative to its norm; of a `trained` and fused pipeline."""
    base, found = load_pipeline(), {}
    for part in ("unet", "text_encoder"):
        before = dict(getattr(base, part).named_parameters())
        for name, weight in getattr(pipeline, part).named_parameters():
            if name in before and name.endswith(".weight"):
                moved = torch.linalg.vector_norm(weight.detach().float() - before[name].float())
                found[f"{part}.{name.removesuffix('.weight')}"] = (
                    moved / torch.linalg.vector_norm(before[name])
                ).item()
    return found
