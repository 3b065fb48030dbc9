"""Settings of `svdiff train`: every flag, and what may not go together."""

# ruff: noqa: RUF009 (_flag makes a dataclass field)

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from svdiff_kernels import SVDiffError

from ..attach import Form, OneDim
from ..pipelines import SCHEDULERS

Method = Literal["svdiff", "lora", "full", "custom_diffusion", "textual_inversion"]
Tracker = Literal["auto", "tensorboard", "wandb", "all", "none"]


def _flag(default: Any, text: str, *, alias: str | None = None) -> Any:
    return field(default=default, metadata={"help": text} | ({"aliases": [alias]} if alias else {}))


@dataclass
class TrainConfig:
    """Settings of `train`; each is a flag of ``svdiff train``."""

    pretrained_model_name_or_path: str = field(metadata={"help": "folder, hub id, or miniature"})
    instance_data_dir: str | None = _flag(
        None, "folder with the subject's pictures; captions in metadata.jsonl or a .txt beside a picture"
    )
    instance_prompt: str | None = _flag(None, "caption of pictures without one, such as 'a photo of sks dog'")
    concepts_list: str | None = _flag(
        None, "JSON file instead, for several subjects: [{instance_data_dir, instance_prompt, class_prompt, ...}, ...]"
    )
    dataset_name: str | None = _flag(None, "instead of a folder: a dataset of the hub, or a folder `datasets` reads")
    dataset_config_name: str | None = _flag(None, "which of the dataset's configurations")
    image_column: str = _flag("image", "of the dataset")
    caption_column: str | None = _flag(None, "of the dataset; default: instance_prompt for all")
    output_dir: str = _flag("outputs/train", "a folder for shifts, checkpoints and pictures")
    overwrite: bool = _flag(False, "replace an earlier run in output_dir")
    revision: str | None = _flag(None, "branch, tag or commit on the hub")
    variant: str | None = _flag(None, "of the weight files, such as fp16")

    with_prior_preservation: bool = _flag(False, "train on pictures of the class too, so that it is not forgotten")
    prior_loss_weight: float = _flag(1.0, "weight of their loss")
    class_data_dir: str | None = _flag(None, "folder with class pictures; default: class_images in output_dir")
    class_prompt: list[str] | None = _flag(None, "what the class is called; several prompts are taken in turn")
    num_class_images: int = _flag(100, "class pictures; those missing are drawn by the base model")
    sample_batch_size: int = _flag(4, "pictures drawn at a time")
    prior_generation_precision: Literal["model", "fp32", "fp16", "bf16"] = _flag(
        "model", "in which class pictures are drawn; model: that of mixed_precision"
    )
    prior_generation_scheduler_type: str | None = _flag(None, "ddim, dpm++, ...; default: the model's own")
    prior_generation_num_inference_steps: int = _flag(50, "steps per class picture")
    prior_generation_guidance_scale: float | None = _flag(None, "guidance of class pictures; default: the pipeline's")

    real_prior: bool = _flag(False, "choose class pictures by their captions from pictures that there are; draw none")
    real_prior_dir: str | None = _flag(
        None, "folder to choose from, with a caption for each picture; default: class_data_dir"
    )
    real_prior_dataset: str | None = _flag(
        None, "dataset to choose from instead; captions are in caption_column, or else in text"
    )
    real_prior_min_similarity: float = _flag(
        0.85, "cosine of a caption's and the class prompt's embeddings, for a picture to be chosen"
    )
    real_prior_clip: str | None = _flag(
        None, "CLIP to embed them with, a folder or hub id; default: the model's own text encoder, before projection"
    )

    cut_mix_probability: float = _flag(
        0.0, "of two subjects side by side in a training picture; 0.6 is the paper's, for several subjects"
    )
    cut_mix_prompts: list[str] | None = _flag(
        None,
        "captions of such pictures, with {first} and {second}; default: on the left and right, at the top and bottom",
    )
    unmix_loss_weight: float = _flag(0.0, "weight of the loss that keeps a subject's token off the other's half")

    method: Method = _flag(
        "svdiff",
        "what trains: spectral shifts, a LoRA (PEFT), all weights, keys and values of cross-attention (Custom "
        "Diffusion), or learned tokens alone",
    )
    modifier_token: list[str] | None = _flag(
        None, "new words in the captions, such as <new1>, whose embeddings train beside whatever else does"
    )
    initializer_token: list[str] | None = _flag(None, "a known word for each of them to begin with, such as dog")
    keep_prefix: bool = _flag(
        False,
        "of method custom_diffusion: leave what is said to the words before a new one, with which other prompts begin "
        "too, so that concepts can be merged",
    )
    num_vectors: int = _flag(1, "embeddings that a new word stands for")
    learning_rate_tokens: float | None = _flag(None, "of new words' embeddings; default: learning_rate")
    image_encoder: str | None = _flag(
        None,
        "a CLIP (folder, hub id, or miniature): what it sees in the pictures is made the new word's embedding by a "
        "network, which trains instead (InST)",
    )
    inversion_layers: int = _flag(2, "layers of cross-attention in that network")
    inversion_dropout: float = _flag(0.05, "of that network, while it trains")
    targets: str = _flag(
        "all", "all, attention, cross_attn, cross_attn_kv, up, down, mid, or a regular expression of paths"
    )
    rank: int | None = _flag(None, "train this many largest singular values of each weight; default: all")
    form: Form = _flag("auto", "how spectral layers compute")
    one_dim: OneDim = _flag("vector", "how weights of norms move")
    lora_rank: int = _flag(4, "of method lora")
    train_text_encoder: bool = _flag(False, "train the text encoders too (CLIP's; T5 stays as it is)")
    init_from: str | None = _flag(
        None, "folder of an earlier run: begin with what it has learnt, for one concept after the other"
    )
    svd_cache_dir: str | None = _flag(None, "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache")

    resolution: int | None = _flag(None, "side of the training pictures; default: what the model was trained at")
    aspect_ratio_buckets: str | None = _flag(
        None, "sizes height,width;height,width;... : each picture is cut to the one most like it; auto: of equal area"
    )
    center_crop: bool = _flag(False, "cut pictures at the centre, not anywhere")
    random_flip: bool = _flag(False, "mirror pictures by chance", alias="--hflip")
    size_augmentation: bool = _flag(
        False, "make the subject smaller or larger by chance, and say so in the caption; method custom_diffusion does"
    )
    noaug: bool = _flag(False, "do not, though the method does")
    cache_latents: bool = _flag(True, "encode pictures once, unless they are cut at random")
    train_batch_size: int = _flag(1, "subject pictures per step and process; as many class pictures come on top")
    num_train_epochs: int | None = _flag(None, "rounds through the subject's pictures, instead of max_train_steps")
    repeats: int = _flag(1, "how often a picture counts in a round")
    max_train_steps: int = _flag(800, "optimiser steps")
    gradient_accumulation_steps: int = _flag(1, "batches per optimiser step")
    gradient_checkpointing: bool = _flag(False, "less memory, more time")
    mixed_precision: Literal["no", "fp16", "bf16"] = _flag("no", "of the frozen model; what trains is always fp32")
    allow_tf32: bool = _flag(False, "on NVIDIA GPUs: fp32 products of the frozen model by TF32")
    learning_rate: float = _flag(1e-3, "of the shifts of matrices and kernels; of LoRA about 1e-4, of all weights 5e-6")
    learning_rate_1d: float = _flag(1e-6, "of the shifts of norms")
    text_encoder_lr: float | None = _flag(None, "of text encoders' matrices; default: learning_rate")
    scale_lr: bool = _flag(False, "multiply the rates by batch size, accumulation steps and processes")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
        "piecewise_constant",
    ] = _flag("constant", "course of the learning rates")  # fmt: skip
    lr_warmup_steps: int = _flag(0, "steps of warm-up")
    lr_num_cycles: int = _flag(1, "of cosine_with_restarts")
    lr_power: float = _flag(1.0, "of polynomial")
    lr_step_rules: str | None = _flag(None, "of piecewise_constant, such as 1:10,0.1:20,0.01:30,0.005")
    optimizer: Literal["adamw", "prodigy"] = _flag("adamw", "prodigy finds the rate itself: give learning_rate 1")
    use_8bit_adam: bool = _flag(False, "AdamW with 8-bit moments (bitsandbytes)")
    adam_beta1: float = _flag(0.9, "of either optimiser")
    adam_beta2: float = _flag(0.999, "of either optimiser")
    adam_weight_decay: float = _flag(1e-2, "of either optimiser")
    adam_epsilon: float = _flag(1e-8, "of either optimiser")
    prodigy_beta3: float | None = _flag(None, "of prodigy; default: the root of adam_beta2")
    prodigy_decouple: bool = _flag(True, "of prodigy: weight decay as in AdamW")
    prodigy_use_bias_correction: bool = _flag(True, "of prodigy")
    prodigy_safeguard_warmup: bool = _flag(True, "of prodigy")
    max_grad_norm: float = _flag(1.0, "gradients are clipped to this norm; 0: not at all")
    shift_penalty: float = _flag(0.0, "times the sum of squared shifts is added to the loss")
    use_ema: bool = _flag(False, "save the exponential mean of what trains")
    ema_decay: float = _flag(0.999, "of that mean")
    seed: int = _flag(0, "the same seed gives the same result, bit for bit, on one machine")

    snr_gamma: float | None = _flag(None, "min-SNR weighting of the loss (arXiv 2303.09556); 5 is usual")
    noise_offset: float = _flag(0.0, "share of the noise that is one number per channel")
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = _flag(
        "logit_normal", "flow-matching models: how timesteps are drawn, or losses weighted"
    )
    logit_mean: float = _flag(0.0, "of logit_normal")
    logit_std: float = _flag(1.0, "of logit_normal")
    mode_scale: float = _flag(1.29, "of mode")
    guidance_scale: float = _flag(1.0, "FLUX: the guidance that the transformer is told in training")
    max_sequence_length: int | None = _flag(None, "tokens of a T5 prompt; default: what the pipeline takes")

    checkpointing_steps: int = _flag(500, "steps between checkpoints, from which a run can go on")
    checkpoints_total_limit: int | None = _flag(None, "keep so many, the newest")
    resume_from_checkpoint: str | None = _flag(None, "go on from this checkpoint; latest: the newest in output_dir")

    validation_prompt: list[str] | None = _flag(None, "prompts to draw while training, into validation/")
    validation_steps: int = _flag(100, "steps between drawings")
    num_validation_images: int = _flag(4, "pictures of each prompt")
    validation_num_inference_steps: int = _flag(25, "steps per picture")
    validation_guidance_scale: float | None = _flag(None, "classifier-free guidance; default: the pipeline's own")
    cuda_graphs: bool = _flag(False, "replay a step as one CUDA graph: faster for small batches, on an NVIDIA GPU")
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = _flag(
        None, "a mode of torch.compile for the denoiser; minutes before the first step"
    )
    shard_factors: bool = _flag(False, "over several processes: each keeps a part of the frozen weights (FSDP2)")
    report_to: Tracker = _flag("auto", "where curves and pictures go; auto: tensorboard if installed")
    logging_dir: str = _flag("logs", "for them, in output_dir")
    push_to_hub: bool = _flag(False, "upload shifts, model card and pictures when done")
    hub_model_id: str | None = _flag(None, "repository to upload to; default: the name of output_dir")
    hub_private: bool = _flag(False, "make a new repository a private one")


_AT_LEAST_ONE = """
num_class_images sample_batch_size prior_generation_num_inference_steps train_batch_size max_train_steps
gradient_accumulation_steps validation_steps num_validation_images validation_num_inference_steps lora_rank
repeats checkpointing_steps num_train_epochs checkpoints_total_limit resolution rank max_sequence_length lr_num_cycles
num_vectors inversion_layers
""".split()  # noqa: SIM905
_NOT_NEGATIVE = """
learning_rate learning_rate_1d learning_rate_tokens text_encoder_lr prior_loss_weight adam_weight_decay max_grad_norm
shift_penalty unmix_loss_weight noise_offset snr_gamma lr_warmup_steps lr_power adam_epsilon logit_std
""".split()  # noqa: SIM905


def check(config: TrainConfig) -> None:
    """Refuse settings that cannot be met, before anything is loaded.

    Raises:
        SVDiffError: naming the setting.
    """
    _check_choices(config)
    _check_numbers(config)
    _check_sources(config)
    _check_combinations(config)
    _check_tokens(config)
    _check_libraries(config)


def resizes(config: TrainConfig) -> bool:
    """Whether subjects' pictures are made smaller or larger by chance."""
    return not config.noaug and (config.size_augmentation or config.method == "custom_diffusion")


def differences(before: dict[str, Any], config: TrainConfig) -> list[str]:
    """Settings of a run to be resumed that its checkpoint was not made with, as ``name old -> new``."""
    free = {"output_dir", "overwrite", "resume_from_checkpoint", "checkpoints_total_limit", "checkpointing_steps"}
    free |= {"report_to", "logging_dir", "push_to_hub", "hub_model_id", "hub_private", "svd_cache_dir"}
    now = asdict(config)
    return [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name] and name not in free and not name.startswith("validation_")
    ]


def _check_choices(config: TrainConfig) -> None:
    """What a command line's parser would refuse, for settings that come from elsewhere."""
    for name, hint in get_type_hints(TrainConfig).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        options = [option for kind in kinds if get_origin(kind) is Literal for option in get_args(kind)]
        value = getattr(config, name)
        if options and value not in options and not (value is None and NoneType in kinds):
            raise SVDiffError(f"{name} {value!r} is not one of {', '.join(options)}")
    kind = config.prior_generation_scheduler_type
    if kind is not None and kind not in SCHEDULERS:
        raise SVDiffError(f"prior_generation_scheduler_type {kind!r} is not one of {', '.join(SCHEDULERS)}")


def _check_numbers(config: TrainConfig) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise SVDiffError(f"{name} must be at least 1, not {value}")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise SVDiffError(f"{name} must be a finite number, not below 0, not {value}")
    for name in ("cut_mix_probability", "ema_decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise SVDiffError(f"{name} must be from 0 to 1, not {getattr(config, name)}")
    for name in ("adam_beta1", "adam_beta2", "inversion_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 0 and below 1, not {getattr(config, name)}")
    if not -1 <= config.real_prior_min_similarity <= 1:
        raise SVDiffError(f"real_prior_min_similarity must be from -1 to 1, not {config.real_prior_min_similarity}")
    if not 0 <= config.seed < 2**32:
        raise SVDiffError(f"seed must be from 0 to {2**32 - 1}, not {config.seed}")


def _check_sources(config: TrainConfig) -> None:
    given = [name for name in ("instance_data_dir", "concepts_list", "dataset_name") if getattr(config, name)]
    if not given:
        raise SVDiffError("no pictures: give instance_data_dir, concepts_list or dataset_name")
    if len(given) > 1:
        raise SVDiffError(f"{' and '.join(given)} exclude each other: choose one")
    for name in ("instance_prompt", "class_prompt", "class_data_dir"):
        if config.concepts_list and getattr(config, name):
            raise SVDiffError(f"{name} belongs to each subject: write it into the concepts_list")
    for name in ("instance_prompt", "class_prompt", "validation_prompt", "cut_mix_prompts"):
        prompts = getattr(config, name)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if prompts is not None and not all(prompt.strip() for prompt in prompts):
            raise SVDiffError(f"{name} is empty: say what the pictures show")
    for prompt in config.cut_mix_prompts or []:
        if "{first}" not in prompt or "{second}" not in prompt:
            raise SVDiffError(f"cut_mix_prompts: {prompt!r} lacks {{first}} or {{second}}")
    if config.with_prior_preservation and not config.class_prompt and not config.concepts_list:
        raise SVDiffError("with_prior_preservation needs a class_prompt")
    if config.real_prior and not config.with_prior_preservation:
        raise SVDiffError("real_prior needs with_prior_preservation and a class_prompt")
    for name in ("real_prior_dir", "real_prior_dataset", "real_prior_clip"):
        if getattr(config, name) and not config.real_prior:
            raise SVDiffError(f"{name} needs real_prior")
    given = [name for name in ("class_data_dir", "real_prior_dir", "real_prior_dataset") if getattr(config, name)]
    if config.real_prior and len(given) > 1:
        raise SVDiffError(f"{' and '.join(given)} exclude each other with real_prior: choose one to choose from")
    if config.init_from and not os.path.isdir(os.path.expanduser(config.init_from)):
        raise SVDiffError(f"init_from: there is no folder {config.init_from}")


def _check_combinations(config: TrainConfig) -> None:
    for name in ("compile", "gradient_checkpointing", "aspect_ratio_buckets", "shard_factors"):
        if config.cuda_graphs and getattr(config, name):
            raise SVDiffError(f"cuda_graphs and {name} exclude each other: choose one")
    if config.compile and config.shard_factors:
        raise SVDiffError("compile and shard_factors exclude each other: choose one")
    if config.cuda_graphs and not has_cuda():
        raise SVDiffError("cuda_graphs needs an NVIDIA GPU, and torch sees none")
    if config.use_8bit_adam and config.optimizer != "adamw":
        raise SVDiffError(f"use_8bit_adam and optimizer {config.optimizer} exclude each other: choose one")
    if config.unmix_loss_weight and not config.cut_mix_probability:
        raise SVDiffError("unmix_loss_weight needs mixed pictures: set cut_mix_probability, such as 0.6")
    if config.cut_mix_probability and not config.concepts_list:
        raise SVDiffError("cut_mix_probability needs several subjects: give a concepts_list")
    if config.aspect_ratio_buckets and config.cut_mix_probability:
        raise SVDiffError("aspect_ratio_buckets and cut_mix_probability exclude each other: choose one")
    if config.size_augmentation and config.noaug:
        raise SVDiffError("size_augmentation and noaug exclude each other: choose one")
    if config.cut_mix_probability and resizes(config):
        way_out = "leave it out" if config.size_augmentation else "pass noaug"
        raise SVDiffError(f"cut_mix_probability and size_augmentation exclude each other: {way_out}")
    if config.method != "svdiff":
        for name, default in (("rank", None), ("shift_penalty", 0.0), ("shard_factors", False)):
            if getattr(config, name) != default:
                raise SVDiffError(f"{name} is of method svdiff, not of {config.method}")
    if config.lr_scheduler == "piecewise_constant" and not config.lr_step_rules:
        raise SVDiffError("lr_scheduler piecewise_constant needs lr_step_rules")


def _check_tokens(config: TrainConfig) -> None:
    tokens, words = config.modifier_token or [], config.initializer_token or []
    if config.method == "textual_inversion":
        if not tokens:
            raise SVDiffError("method textual_inversion needs a modifier_token, such as <new1>: nothing else trains")
        if config.train_text_encoder:
            raise SVDiffError("train_text_encoder: method textual_inversion trains nothing but its tokens")
    if config.method == "custom_diffusion":
        if config.targets not in ("all", "cross_attn_kv"):
            raise SVDiffError(f"targets {config.targets}: method custom_diffusion trains cross_attn_kv, and no others")
        if config.train_text_encoder:
            raise SVDiffError(
                "train_text_encoder: method custom_diffusion leaves it as it is, but for a modifier_token"
            )
    if config.keep_prefix and not (config.method == "custom_diffusion" and tokens):
        raise SVDiffError("keep_prefix is of method custom_diffusion with a modifier_token")
    if config.method == "full" and tokens:
        raise SVDiffError("modifier_token and method full exclude each other: of all weights, a rare word will do")
    if len(words) != len(tokens):
        raise SVDiffError(
            f"initializer_token: {len(words)} words for {len(tokens)} of modifier_token; give one for each"
        )
    if not tokens and (config.num_vectors != 1 or config.learning_rate_tokens is not None):
        raise SVDiffError("num_vectors and learning_rate_tokens are of a modifier_token")
    if config.image_encoder is not None and len(tokens) != 1:
        raise SVDiffError(f"image_encoder needs one modifier_token, such as <style>, not {len(tokens)}")
    if config.image_encoder is not None and config.init_from is not None:
        raise SVDiffError("image_encoder and init_from exclude each other: a network begins with initializer_token")
    for name, default in (("inversion_layers", 2), ("inversion_dropout", 0.05)):
        if config.image_encoder is None and getattr(config, name) != default:
            raise SVDiffError(f"{name} is of a network that image_encoder asks for")
    for token in tokens:
        if not token.strip() or token.split() != [token]:
            raise SVDiffError(f"modifier_token {token!r} is no single word: choose one such as <new1>")
    if len(set(tokens)) < len(tokens):
        raise SVDiffError("modifier_token has a word twice")


def _check_libraries(config: TrainConfig) -> None:
    needed = {
        "tensorboard": ("tensorboard", config.report_to in ("tensorboard", "all")),
        "wandb": ("wandb", config.report_to in ("wandb", "all")),
        "bitsandbytes": ("bitsandbytes", config.use_8bit_adam),
        "prodigyopt": ("prodigyopt", config.optimizer == "prodigy"),
        "peft": ("peft", config.method == "lora"),
        "datasets": ("datasets", (config.dataset_name or config.real_prior_dataset) is not None),
    }
    for package, (module, wanted) in needed.items():
        if wanted and not installed(module):
            raise SVDiffError(f"this needs {package}, which is not installed: pip install {package}")
    if config.push_to_hub:
        from huggingface_hub import get_token

        if not get_token():
            raise SVDiffError("push_to_hub needs a token: run `hf auth login`, or set HF_TOKEN")


def has_cuda() -> bool:
    """Whether torch sees an NVIDIA GPU."""
    return torch.cuda.is_available()


def installed(module: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(module) is not None


def default_hub_id(config: TrainConfig) -> str:
    """The name of the output folder, which the hub completes by the user's."""
    return config.hub_model_id or os.path.basename(os.path.abspath(config.output_dir))
