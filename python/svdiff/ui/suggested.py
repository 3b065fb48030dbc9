"""What the page's fields say at first: settings of the three commands that suit a model."""

from __future__ import annotations

from ..edit import EditConfig
from ..generate import GenerateConfig
from ..miniature import NAME
from ..miniature.evaluate import GUIDANCE, STEPS
from ..train import TrainConfig


def to_train(model: str) -> TrainConfig:
    """Settings of training; for the miniature such that it knows a subject in about a minute."""
    if model != NAME:
        return TrainConfig(model, report_to="tensorboard", prior_generation_scheduler_type="dpm++",
                           prior_generation_num_inference_steps=25)  # fmt: skip
    return TrainConfig(
        model,
        train_text_encoder=True,
        train_batch_size=4,
        learning_rate=1e-2,
        learning_rate_1d=1e-2,
        lr_scheduler="cosine",
        max_train_steps=200,
        num_class_images=48,
        sample_batch_size=16,
        prior_generation_scheduler_type="dpm++",
        prior_generation_num_inference_steps=STEPS,
        prior_generation_guidance_scale=2.0,
        checkpointing_steps=100,
        validation_steps=50,
        validation_num_inference_steps=STEPS,
        validation_guidance_scale=GUIDANCE,
        report_to="tensorboard",
    )


def to_generate(model: str) -> GenerateConfig:
    """Settings of drawing."""
    if model != NAME:
        return GenerateConfig(model, [], num_images_per_prompt=4, num_inference_steps=30)
    return GenerateConfig(
        model, [], num_images_per_prompt=4, num_inference_steps=STEPS, guidance_scale=GUIDANCE, scheduler_type="dpm++"
    )


def to_edit(model: str) -> EditConfig:
    """Settings of editing."""
    if model != NAME:
        return EditConfig(model, "", "", [])
    return EditConfig(
        model, "", "", [], max_train_steps=100, learning_rate=2e-3, learning_rate_1d=2e-3, train_batch_size=4
    )
