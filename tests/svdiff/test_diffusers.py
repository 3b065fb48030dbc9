"""What diffusers does to a pipeline, done to an attached one and to a plain one with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from PIL import Image
from svdiff.pipelines import load_pipeline, set_scheduler
from tiny import RESOLUTION, tiny_unet

from svdiff_kernels import SVDiffError

Pipeline = Any
Operation = Callable[[Pipeline, Path], Pipeline | None]

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((RESOLUTION // 2, RESOLUTION // 2))).astype(np.uint8))


@pytest.fixture(scope="module")
def shifts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shifts of UNet and text encoder, some of which are clamped."""
    adapter = svdiff.attach(load_pipeline(str(base)), text_encoder=True)
    torch.manual_seed(1)
    adapter.load_deltas(
        {
            part.role: {path: 0.4 * layer.sigma * torch.randn_like(layer.sigma) for path, layer in part.layers.items()}
            for part in adapter.parts
        }
    )
    folder = tmp_path_factory.mktemp("shifts")
    adapter.save_weights(folder)
    return folder


@pytest.fixture(scope="module")
def merged(base: Path, shifts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain pipeline with the shifted weights, as a folder."""
    folder = tmp_path_factory.mktemp("merged") / "out"
    svdiff.export(svdiff.ExportConfig("merged", str(base), str(shifts), output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def trained_lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of UNet and text encoder, in diffusers' layout."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = load_pipeline(str(base))
    states = {}
    for name, targets in {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["q_proj", "fc1"]}.items():
        model = getattr(pipeline, name)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights="gaussian"))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.5)
        states[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, **states)
    return folder


def draw(pipeline: Pipeline, **changes: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "prompt": ["a dog", "a cat in the snow"],
        "height": RESOLUTION,
        "width": RESOLUTION,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }
    settings |= changes
    return np.asarray(pipeline(**{key: value for key, value in settings.items() if value is not None}).images)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of values in 0..1."""
    assert a.shape == b.shape and np.isfinite(a).all()
    return float(np.abs(a - b).max())


# Done to the pipeline; what they return is drawn with instead, if it is something.
OPERATIONS: dict[str, Operation] = {
    "nothing": lambda p, _: None,
    "to the CPU": lambda p, _: p.to("cpu"),
    "float64": lambda p, _: p.to(torch.float64),
    "channels last": lambda p, _: _all(lambda: p.unet.to(memory_format=torch.channels_last)),
    "ddim": lambda p, _: set_scheduler(p, "ddim"),
    "ddpm": lambda p, _: set_scheduler(p, "ddpm"),
    "dpm++": lambda p, _: set_scheduler(p, "dpm++"),
    "euler": lambda p, _: set_scheduler(p, "euler"),
    "euler_ancestral": lambda p, _: set_scheduler(p, "euler_ancestral"),
    "heun": lambda p, _: set_scheduler(p, "heun"),
    "lms": lambda p, _: set_scheduler(p, "lms"),
    "pndm": lambda p, _: set_scheduler(p, "pndm"),
    "unipc": lambda p, _: set_scheduler(p, "unipc"),
    "AttnProcessor": lambda p, _: p.unet.set_attn_processor(_processor("AttnProcessor")),
    "AttnProcessor2_0": lambda p, _: p.unet.set_attn_processor(_processor("AttnProcessor2_0")),
    "default attention processors": lambda p, _: p.unet.set_default_attn_processor(),
    "attention slicing": lambda p, _: p.enable_attention_slicing(1),
    "fused q, k and v": lambda p, _: p.fuse_qkv_projections(),
    "q, k and v fused and taken apart": lambda p, _: _all(p.fuse_qkv_projections, p.unfuse_qkv_projections),
    "VAE slicing": lambda p, _: p.vae.enable_slicing(),
    "VAE tiling": lambda p, _: p.vae.enable_tiling(),
    "FreeU": lambda p, _: p.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "gradient checkpointing": lambda p, _: p.unet.enable_gradient_checkpointing(),
    "offload, module by module": lambda p, _: _offloaded(p),
    "offload, model by model": lambda p, _: _hooked(p),
    "layerwise casting": lambda p, _: p.unet.enable_layerwise_casting(torch.float64, torch.float32),
    "compiled": lambda p, _: p.unet.compile(backend="aot_eager"),
    "compiled block by block": lambda p, _: p.unet.compile_repeated_blocks(backend="eager"),
    "a copy": lambda p, _: copy.deepcopy(p),
    "training mode, and back": lambda p, _: _all(p.unet.train, p.unet.eval),
    "saved and loaded": lambda p, folder: (p.save_pretrained(folder), load_pipeline(str(folder)))[1],
    "UNet saved and loaded": lambda p, folder: _saved(p, "unet", folder),
    "text encoder saved and loaded": lambda p, folder: _saved(p, "text_encoder", folder),
    "from_pipe": lambda p, _: type(p).from_pipe(p),
    "components": lambda p, _: type(p)(**p.components, requires_safety_checker=False),
}
# What a call is asked for.
CALLS: dict[str, dict[str, Any]] = {
    "several pictures of a prompt": {"num_images_per_prompt": 2},
    "no guidance": {"guidance_scale": 1.0},
    "a negative prompt": {"negative_prompt": ["red", "blue"]},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "eta": {"eta": 0.5},
    "embeddings": {
        "prompt": None,
        "prompt_embeds": torch.ones(1, 16, 12),
        "negative_prompt_embeds": torch.zeros(1, 16, 12),
    },
    "cross_attention_kwargs": {"cross_attention_kwargs": {}},
    "a callback": {"callback_on_step_end": lambda pipe, i, t, kept: kept},
    "latents": {"output_type": "latent"},
}


@pytest.fixture
def pair(base: Path, merged: Path, shifts: Path) -> tuple[Pipeline, Pipeline]:
    """An attached pipeline, and the plain one that it should equal."""
    attached = load_pipeline(str(base))
    svdiff.load(attached, shifts)
    return attached, load_pipeline(str(merged))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, pair: tuple[Pipeline, Pipeline], base: Path, tmp_path: Path) -> None:
    drawn = []
    for i, pipeline in enumerate(pair):
        operated = OPERATIONS[name](pipeline, tmp_path / str(i))
        drawn.append(draw(pipeline if operated is None else operated))
    assert distance(*drawn) < 1e-5
    assert distance(drawn[1], draw(load_pipeline(str(base)))) > 0.01  # the shifts are seen


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str, pair: tuple[Pipeline, Pipeline]) -> None:
    assert distance(*(draw(pipeline, **CALLS[name]) for pipeline in pair)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, pair: tuple[Pipeline, Pipeline]) -> None:
    """No further from fp32 than the plain pipeline in that precision, or hardly."""
    exact = draw(pair[1])
    attached, plain = (draw(pipeline.to(dtype)) for pipeline in pair)
    assert np.abs(attached - exact).mean() < 2 * np.abs(plain - exact).mean()


@pytest.mark.parametrize("task", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_other_pipelines_from_the_same_components(task: str, pair: tuple[Pipeline, Pipeline]) -> None:
    import diffusers

    inputs: dict[str, Any] = {"image": PICTURE, "strength": 0.8, "prompt": "a dog", "num_inference_steps": 5}
    if "Img2Img" in task:
        inputs |= {"height": None, "width": None}
    else:
        inputs["mask_image"] = MASK
    drawn = [
        draw(getattr(diffusers, task)(**pipeline.components, requires_safety_checker=False), **inputs)
        for pipeline in pair
    ]
    assert distance(*drawn) < 1e-5


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint"])
def test_controlnet(task: str, pair: tuple[Pipeline, Pipeline]) -> None:
    import diffusers

    torch.manual_seed(0)
    control = diffusers.ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(4, 8))
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inputs: dict[str, Any] = {"prompt": "a dog"}
    inputs |= {"image": PICTURE} if not task else {"image": PICTURE, "control_image": PICTURE, "strength": 0.8}
    inputs |= {"mask_image": MASK} if task == "Inpaint" else {}
    kind = getattr(diffusers, f"StableDiffusionControlNet{task}Pipeline")
    drawn = [
        draw(kind(**p.components, controlnet=control, requires_safety_checker=False), **inputs, num_inference_steps=5)
        for p in pair
    ]
    assert distance(*drawn) < 1e-5


def test_controlnet_made_of_a_fused_unet(base: Path, merged: Path, shifts: Path) -> None:
    """It takes the state dicts of the UNet's layers, which of spectral ones have other keys."""
    from diffusers import ControlNetModel

    attached = load_pipeline(str(base))
    svdiff.load(attached, shifts).fuse()
    controls = [
        ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
        for unet in (attached.unet, load_pipeline(str(merged)).unet)
    ]
    for key, value in controls[1].mid_block.state_dict().items():
        torch.testing.assert_close(controls[0].mid_block.state_dict()[key], value)


def test_lora_on_top(pair: tuple[Pipeline, Pipeline], trained_lora: Path) -> None:
    attached, plain = pair
    before = draw(attached)
    for pipeline in pair:
        pipeline.load_lora_weights(trained_lora, adapter_name="lora")
    both = [draw(pipeline) for pipeline in pair]
    assert distance(*both) < 1e-5 and distance(both[0], before) > 0.01
    for pipeline in pair:
        pipeline.set_adapters("lora", 0.5)
    half = [draw(pipeline) for pipeline in pair]
    assert distance(*half) < 1e-5 and distance(half[0], both[0]) > 0.001
    with pytest.raises(SVDiffError, match="fuse the shifts first"):
        attached.fuse_lora()
    for pipeline in pair:
        pipeline.unload_lora_weights()
    assert distance(draw(attached), before) == 0
    assert distance(draw(attached), draw(plain)) < 1e-5


def test_lora_beneath(base: Path, merged: Path, shifts: Path, trained_lora: Path) -> None:
    attached, plain = load_pipeline(str(base)), load_pipeline(str(merged))
    before = load_pipeline(str(base))
    for pipeline in (attached, plain, before):
        pipeline.load_lora_weights(trained_lora, adapter_name="lora")
    adapter = svdiff.load(attached, shifts)
    assert distance(draw(attached), draw(plain)) < 1e-5
    adapter.fuse()
    assert distance(draw(attached), draw(plain)) < 1e-5
    attached.fuse_lora()  # into plain layers it can
    assert distance(draw(attached), draw(plain)) < 1e-5
    attached.unfuse_lora()
    adapter.unfuse()
    for pipeline in (attached, plain):
        pipeline.unload_lora_weights()
    assert distance(draw(attached), draw(plain)) < 1e-5
    adapter.unload()
    before.unload_lora_weights()
    assert distance(draw(attached), draw(before)) == 0


def test_a_learned_token(base: Path, merged: Path, shifts: Path, tmp_path: Path) -> None:
    """Textual inversion writes a row into an embedding: into a plain one, of a fused model."""
    from safetensors.torch import save_file

    save_file({"<x>": torch.randn(12)}, tmp_path / "learned_embeds.safetensors")
    attached, plain = load_pipeline(str(base)), load_pipeline(str(merged))
    adapter = svdiff.load(attached, shifts)
    learned = {"weight_name": "learned_embeds.safetensors", "token": "<x>"}
    with pytest.raises(SVDiffError, match="fuse the shifts first"):
        attached.load_textual_inversion(tmp_path, **learned)
    attached = load_pipeline(str(base))
    adapter = svdiff.load(attached, shifts)
    adapter.fuse()
    for pipeline in (attached, plain):
        pipeline.load_textual_inversion(tmp_path, **learned)
    assert distance(*(draw(pipeline, prompt="a <x> dog") for pipeline in (attached, plain))) < 1e-5


def test_saving_what_cannot_be_one_model(pair: tuple[Pipeline, Pipeline], tmp_path: Path) -> None:
    attached, _ = pair
    with pytest.raises(SVDiffError, match="save the model that it was copied from"):
        copy.deepcopy(attached.unet).save_pretrained(tmp_path)


def _processor(name: str) -> Any:
    from diffusers.models import attention_processor

    return getattr(attention_processor, name)()


def _all(*functions: Callable[[], Any]) -> None:
    for function in functions:
        function()


def _saved(pipeline: Pipeline, part: str, folder: Path) -> Pipeline:
    """The pipeline with one part that was saved and loaded."""
    getattr(pipeline, part).save_pretrained(folder)
    parts = pipeline.components
    parts[part] = type(parts[part]).from_pretrained(folder)
    return type(pipeline)(**parts, requires_safety_checker=False)


def _offloaded(pipeline: Pipeline) -> None:
    """As `enable_sequential_cpu_offload` does for a GPU."""
    from accelerate import cpu_offload

    for model in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


def _hooked(pipeline: Pipeline) -> None:
    """As `enable_model_cpu_offload` does."""
    from accelerate import cpu_offload_with_hook

    hook = None
    for model in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
        _, hook = cpu_offload_with_hook(model, torch.device("cpu"), prev_module_hook=hook)
