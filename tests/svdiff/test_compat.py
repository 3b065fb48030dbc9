"""svdiff.compat.svdiff_pytorch: scripts of svdiff-pytorch train and draw what its formula says, and exchange files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import svdiff_pytorch_fixtures as original
import torch
from numerics import EXACT, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from svdiff.compat.svdiff_pytorch import (
    SCHEDULER_MAPPING,
    CLIPTextModelForSVDiff,
    StableDiffusionPipelineWithDDIMInversion,
    UNet2DConditionModelForSVDiff,
    image_grid,
    load_text_encoder_for_svdiff,
    load_unet_for_svdiff,
    slerp,
    slerp_tensor,
)
from tiny import tiny_pipeline, tiny_text_encoder, tiny_unet, unet_inputs
from torch import Tensor, nn

from svdiff_kernels import FactorCache, SVDiffError
from svdiff_kernels.module import SpectralModule

TOLERANCE = EXACT[torch.float32]
IDS = torch.tensor([[0, 5, 9, 33, 40, 1, 1], [0, 7, 8, 21, 63, 2, 1]])


@dataclass
class Base:
    """A pipeline's folder, its models, and a run of the original's on them."""

    folder: Path
    unet: Any
    text_encoder: Any
    unet_deltas: dict[str, Tensor]
    text_deltas: dict[str, Tensor]
    run: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder, run = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("run")
    pipeline = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))
    for model in (pipeline.unet, pipeline.text_encoder):
        original.randomise_norms(model)
    pipeline.save_pretrained(folder)
    unet_deltas, text_deltas = (
        original.some_deltas(original.decomposed(model)) for model in (pipeline.unet, pipeline.text_encoder)
    )
    original.save_deltas(run, unet_deltas, text_deltas)
    return Base(folder, pipeline.unet, pipeline.text_encoder, unet_deltas, text_deltas, run)


@pytest.fixture
def unet(trained: Base) -> UNet2DConditionModelForSVDiff:
    return load_unet_for_svdiff(trained.folder, subfolder="unet")


@pytest.fixture
def text_encoder(trained: Base) -> CLIPTextModelForSVDiff:
    return load_text_encoder_for_svdiff(trained.folder, subfolder="text_encoder")


def predicted(unet: Any) -> Tensor:
    x, t, context = unet_inputs()
    return unet(x.to(unet.dtype), t, context.to(unet.dtype)).sample


def embedded(text_encoder: Any) -> Tensor:
    return text_encoder(IDS)[0]


def deltas_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "delta" in key}


def set_scale(model: nn.Module, scale: float) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale(scale=scale)


class TestFiles:
    @pytest.mark.parametrize("scale", [1.0, 0.5])
    @pytest.mark.parametrize("place", ["file", "folder"])
    @torch.no_grad()
    def test_outputs_are_those_of_the_formula(self, trained: Base, place: str, scale: float) -> None:
        unet_at, text_at = (
            trained.run if place == "folder" else trained.run / name
            for name in (original.UNET_FILE, original.TEXT_FILE)
        )
        unet = load_unet_for_svdiff(str(trained.folder), spectral_shifts_ckpt=str(unet_at), subfolder="unet")
        text = load_text_encoder_for_svdiff(
            str(trained.folder), spectral_shifts_ckpt=str(text_at), subfolder="text_encoder"
        )
        assert unet.conv_out.scale == 1.0
        for model in (unet, text):
            set_scale(model, scale)
        assert unet.conv_out.scale == scale
        truth = original.shifted(trained.unet, trained.unet_deltas, scale)
        assert relative(predicted(unet), predicted(truth)) <= TOLERANCE
        assert relative(predicted(unet), predicted(trained.unet)) > 0.01
        truth = original.shifted(trained.text_encoder, trained.text_deltas, scale)
        assert relative(embedded(text), embedded(truth)) <= TOLERANCE
        assert relative(embedded(text), embedded(trained.text_encoder)) > 0.01

    @torch.no_grad()
    def test_without_a_file_nothing_is_shifted(self, trained: Base, unet: Any, text_encoder: Any) -> None:
        assert relative(predicted(unet), predicted(trained.unet)) <= TOLERANCE
        assert relative(embedded(text_encoder), embedded(trained.text_encoder)) <= TOLERANCE

    @torch.no_grad()
    def test_a_run_of_the_unet_alone(self, trained: Base, tmp_path: Path) -> None:
        original.save_deltas(tmp_path, trained.unet_deltas)
        text = load_text_encoder_for_svdiff(trained.folder, tmp_path, subfolder="text_encoder")
        assert relative(embedded(text), embedded(trained.text_encoder)) <= TOLERANCE

    @torch.no_grad()
    def test_what_a_file_lacks_is_not_shifted(self, trained: Base, tmp_path: Path) -> None:
        few = {path: delta for path, delta in trained.unet_deltas.items() if ".attn2." in path}
        unet = load_unet_for_svdiff(trained.folder, original.save_deltas(tmp_path, few), subfolder="unet")
        rest = {path: few.get(path, torch.zeros_like(delta)) for path, delta in trained.unet_deltas.items()}
        assert relative(predicted(unet), predicted(original.shifted(trained.unet, rest))) <= TOLERANCE

    def test_keys_and_shapes_are_the_same_both_ways(self, trained: Base, tmp_path: Path) -> None:
        unet = load_unet_for_svdiff(trained.folder, trained.run, subfolder="unet")
        text = load_text_encoder_for_svdiff(trained.folder, trained.run, subfolder="text_encoder")
        for model, name in ((unet, original.UNET_FILE), (text, original.TEXT_FILE)):
            save_file(deltas_in(model.state_dict()), tmp_path / name)
            ours, theirs = load_file(tmp_path / name), load_file(trained.run / name)
            assert ours.keys() == theirs.keys()
            for key, delta in theirs.items():
                assert ours[key].dtype == torch.float32 and torch.equal(ours[key], delta), key

    def test_svdiff_reads_what_scripts_save_and_the_other_way_round(self, trained: Base, tmp_path: Path) -> None:
        from svdiff.pipelines import load_pipeline

        pipeline = load_pipeline(str(trained.folder))
        adapter = svdiff.load(pipeline, trained.run)
        with torch.no_grad():
            truth = predicted(original.shifted(trained.unet, trained.unet_deltas))
            assert relative(predicted(pipeline.unet), truth) <= TOLERANCE
            adapter.save_weights(tmp_path)
            for place in (tmp_path, trained.run):
                again = load_unet_for_svdiff(trained.folder, place, subfolder="unet")
                assert relative(predicted(again), truth) <= TOLERANCE
            again = load_text_encoder_for_svdiff(trained.folder, tmp_path, subfolder="text_encoder")
            truth = embedded(original.shifted(trained.text_encoder, trained.text_deltas))
            assert relative(embedded(again), truth) <= TOLERANCE

    @pytest.mark.parametrize("part", ["unet", "text_encoder"])
    def test_the_names_of_stable_diffusion_1_5(self, part: str, tmp_path: Path) -> None:
        """Its depth, in a fiftieth of its width, on which no name depends."""
        if part == "unet":
            kinds = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
            plain = tiny_unet(
                block_out_channels=(8, 16, 24, 24), layers_per_block=2, down_block_types=kinds,
                up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
            )  # fmt: skip
            plain.save_pretrained(tmp_path)
            names = deltas_in(dict(load_unet_for_svdiff(tmp_path).named_parameters()))
            wanted, counts = {f"{path}.delta" for path in original.decomposed(plain)}, (282, 109)
            some = {
                "conv_in.delta", "time_embedding.linear_2.delta", "conv_norm_out.delta", "conv_out.delta",
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.delta",
                "down_blocks.2.downsamplers.0.conv.delta", "mid_block.attentions.0.proj_in.delta",
                "up_blocks.1.resnets.2.conv_shortcut.delta", "up_blocks.3.resnets.0.time_emb_proj.delta",
                "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.delta",
                "up_blocks.0.upsamplers.0.conv.delta", "mid_block.attentions.0.transformer_blocks.0.norm3.delta",
            }  # fmt: skip
        else:
            plain = tiny_text_encoder(num_hidden_layers=12)
            plain.save_pretrained(tmp_path)
            names = deltas_in(dict(load_text_encoder_for_svdiff(tmp_path).named_parameters()))
            wanted, counts = {original.text_key(path) for path in original.decomposed(plain)}, (74, 25)
            some = {
                "text_model.embeddings.token_embedding.delta", "text_model.embeddings.position_embedding.delta",
                "text_model.encoder.layers.11.self_attn.out_proj.delta", "text_model.encoder.layers.0.mlp.fc1.delta",
                "text_model.encoder.layers.0.layer_norm2.delta", "text_model.final_layer_norm.delta",
            }  # fmt: skip
        assert names.keys() == wanted
        assert some <= names.keys()
        norms = [name for name in names if "norm" in name]
        assert (len(names) - len(norms), len(norms)) == counts
        assert all(names[name].shape == (1,) for name in norms)


class TestModels:
    def test_layers_own_their_deltas_and_drop_their_weights(self, unet: Any, text_encoder: Any) -> None:
        for model in (unet, text_encoder):
            layers = [module for module in model.modules() if isinstance(module, SpectralModule)]
            for layer in layers:
                assert isinstance(layer.delta, nn.Parameter) and layer.delta.dtype == torch.float32
                assert isinstance(layer.scale, float)
                layer.perform_svd()
            trainable = [name for name, p in model.named_parameters() if p.requires_grad]
            assert trainable == [name for name, _ in model.named_parameters() if "delta" in name]
            assert len(trainable) == len(layers) and not model.training
            assert not [key for key in model.state_dict() if key.endswith(".weight")]

    def test_a_text_encoder_is_none_of_transformers(self, text_encoder: Any) -> None:
        """inference.py takes one that is a `CLIPTextModel` for one without shifts, which it does not scale."""
        from transformers import CLIPTextModel

        assert not isinstance(text_encoder, CLIPTextModel)
        assert text_encoder.get_input_embeddings() is text_encoder.text_model.embeddings.token_embedding

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @torch.no_grad()
    def test_half_precision_leaves_shifts_alone(self, trained: Base, dtype: torch.dtype) -> None:
        for load, part, run in (
            (load_unet_for_svdiff, "unet", predicted), (load_text_encoder_for_svdiff, "text_encoder", embedded),
        ):  # fmt: skip
            exact = load(trained.folder, trained.run, subfolder=part)
            deltas = deltas_in(exact.state_dict())
            want = run(exact)
            asked = load(trained.folder, trained.run, subfolder=part, torch_dtype=dtype)
            for model in (asked, exact.to(dtype=dtype)):
                assert model.dtype == dtype
                out = run(model)
                assert out.dtype == dtype
                assert relative(out, want) <= (0.03 if dtype == torch.bfloat16 else 0.004)
                kept = deltas_in(model.state_dict())
                assert all(kept[key].dtype == torch.float32 and torch.equal(kept[key], deltas[key]) for key in deltas)

    def test_a_checkpoint_in_half_precision_is_decomposed_in_fp32(self, tmp_path: Path) -> None:
        tiny_unet().half().save_pretrained(tmp_path / "unet")
        tiny_text_encoder().half().save_pretrained(tmp_path / "text")
        for model in (load_unet_for_svdiff(tmp_path / "unet"), load_text_encoder_for_svdiff(tmp_path / "text")):
            assert model.dtype == torch.float32
            assert all(tensor.dtype != torch.float16 for tensor in model.state_dict().values())

    def test_a_second_load_decomposes_nothing(self, trained: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        first = load_unet_for_svdiff(trained.folder, trained.run, subfolder="unet")
        assert FactorCache().size()[0] > 0
        monkeypatch.setattr("svdiff_kernels.cache.decomposed", lambda *_, **__: pytest.fail("decomposed again"))
        again = load_unet_for_svdiff(trained.folder, trained.run, subfolder="unet")
        assert torch.equal(predicted(first), predicted(again))

    def test_ddp_leaves_the_factors_where_they_are(self, unet: Any, text_encoder: Any, tmp_path: Path) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            for model in (unet, text_encoder):
                wrapped = nn.parallel.DistributedDataParallel(model)
                assert not [buffer for buffer in wrapped.modules_buffers if buffer.is_floating_point()]
        finally:
            torch.distributed.destroy_process_group()

    def test_saving_a_whole_model_is_refused(self, unet: Any, text_encoder: Any, tmp_path: Path) -> None:
        for model in (unet, text_encoder):
            with pytest.raises(SVDiffError, match="is no checkpoint to save"):
                model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))


def groups(*models: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """As train_svdiff.py picks them: of matrices, and of norms."""
    params: list[nn.Parameter] = []
    params_1d: list[nn.Parameter] = []
    for model in models:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "delta" in name:
                parameter.requires_grad = True
                (params_1d if "norm" in name else params).append(parameter)
    return params, params_1d


def adamw(params: list[Any], params_1d: list[Any]) -> torch.optim.Optimizer:
    """With an epsilon above the rounding of gradients, whose signs Adam would take for steps."""
    return torch.optim.AdamW(
        [{"params": params}, {"params": params_1d, "lr": 1e-4}], lr=1e-2, weight_decay=1e-2, eps=1e-6
    )


class TestTraining:
    def test_steps_are_those_of_autograd_through_the_formula(self, trained: Base, tmp_path: Path) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        unet = load_unet_for_svdiff(trained.folder, subfolder="unet", revision=None, low_cpu_mem_usage=True)
        text = load_text_encoder_for_svdiff(trained.folder, subfolder="text_encoder", revision=None)
        params, params_1d = groups(unet, text)
        assert accelerator.unwrap_model(unet).dtype == accelerator.unwrap_model(text).dtype == torch.float32
        unet.enable_gradient_checkpointing()
        text.gradient_checkpointing_enable()
        optimizer = adamw(params, params_1d)
        unet, text, optimizer = accelerator.prepare(unet, text, optimizer)

        models = {"unet": trained.unet, "text": trained.text_encoder}
        plain = {name: original.shifted(model, original_zeros(model)) for name, model in models.items()}
        factors = {name: original.decomposed(model) for name, model in models.items()}
        shifts = {
            name: {path: torch.zeros_like(S).requires_grad_() for path, (_, S, _, _) in factors[name].items()}
            for name in models
        }
        flat = [(path, delta) for own in shifts.values() for path, delta in own.items()]
        expected = adamw([d for path, d in flat if "norm" not in path], [d for path, d in flat if "norm" in path])

        x, t, _ = unet_inputs()
        target = torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
        unet.train()
        text.train()
        for _ in range(4):
            with accelerator.accumulate(unet):
                loss = (unet(x, t, text(IDS)[0]).sample.float() - target).square().mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_([*unet.parameters(), *text.parameters()], 1.0)
                optimizer.step()
                optimizer.zero_grad()
            call, now = torch.func.functional_call, {n: original.weights(factors[n], shifts[n]) for n in models}
            context = call(plain["text"], now["text"], (IDS,))[0]
            truth = (call(plain["unet"], now["unet"], (x.double(), t, context)).sample - target).square().mean()
            truth.backward()
            torch.nn.utils.clip_grad_norm_([delta for _, delta in flat], 1.0)
            expected.step()
            expected.zero_grad()
            assert relative(loss, truth) <= TOLERANCE

        for model, name, file in ((unet, "unet", original.UNET_FILE), (text, "text", original.TEXT_FILE)):
            state = accelerator.unwrap_model(model, keep_fp32_wrapper=True).state_dict()
            save_file(deltas_in(state), tmp_path / file)
            saved = load_file(tmp_path / file)
            wanted = {
                original.text_key(path) if name == "text" else f"{path}.delta": delta
                for path, delta in shifts[name].items()
            }
            assert saved.keys() == wanted.keys()
            assert all(saved[key].shape == wanted[key].shape for key in wanted)
            one, other = (torch.cat([tensors[key].flatten() for key in sorted(wanted)]) for tensors in (saved, wanted))
            assert one.norm() > 0.1
            assert relative(one, other) <= TOLERANCE

    def test_a_state_of_accelerate_comes_back(self, trained: Base, tmp_path: Path) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        unet = load_unet_for_svdiff(trained.folder, trained.run, subfolder="unet")
        optimizer = adamw(*groups(unet))
        unet, optimizer = accelerator.prepare(unet, optimizer)
        before = predicted(unet).detach()
        accelerator.save_state(str(tmp_path / "state"))
        for parameter in unet.parameters():
            if parameter.requires_grad:
                nn.init.zeros_(parameter)
        assert relative(predicted(unet), before) > 0.01
        accelerator.load_state(str(tmp_path / "state"))
        assert torch.equal(predicted(unet), before)


def original_zeros(model: nn.Module) -> dict[str, Tensor]:
    return {path: torch.zeros_like(S) for path, (_, S, _, _) in original.decomposed(model).items()}


SCRIPT = """
import os
import sys

import torch
from diffusers import StableDiffusionPipeline
from svdiff_pytorch import SCHEDULER_MAPPING, image_grid, load_text_encoder_for_svdiff, load_unet_for_svdiff
from transformers import CLIPTextModel

base, run, scale, precision, out = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4], sys.argv[5]
half = precision == "fp16"
device = "cuda" if torch.cuda.is_available() else "cpu"
shifts_of_text = os.path.join(run, "spectral_shifts_te.safetensors")
unet = load_unet_for_svdiff(base, spectral_shifts_ckpt=run, subfolder="unet").to(device)
if os.path.exists(shifts_of_text):
    text_encoder = load_text_encoder_for_svdiff(
        pretrained_model_name_or_path=base, spectral_shifts_ckpt=shifts_of_text, subfolder="text_encoder"
    )
else:
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
for model in (unet, text_encoder):
    for module in model.modules():
        if hasattr(module, "perform_svd"):
            module.perform_svd()
if half:
    unet, text_encoder = unet.to(device, dtype=torch.float16), text_encoder.to(device, dtype=torch.float16)
pipe = StableDiffusionPipeline.from_pretrained(
    base,
    unet=unet,
    text_encoder=text_encoder,
    requires_safety_checker=False,
    safety_checker=None,
    feature_extractor=None,
    scheduler=SCHEDULER_MAPPING["dpm_solver++"].from_pretrained(base, subfolder="scheduler"),
    torch_dtype=torch.float16 if half else None,
).to(device)
if pipe.unet.conv_out.scale != scale:
    parts = [pipe.unet]
    if not isinstance(pipe.text_encoder, CLIPTextModel):
        parts.append(pipe.text_encoder)
    for part in parts:
        for module in part.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(scale=scale)
generator = torch.Generator(device=device).manual_seed(3)
images = []
with torch.autocast(device, enabled=precision == "autocast"), torch.inference_mode():
    for prompt in ("a dog", "a cat"):
        images.extend(
            pipe(
                prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator, num_images_per_prompt=2,
                height=16, width=16,
            ).images
        )
image_grid(images, 2, 2).save(out)
"""


class TestInference:
    @pytest.mark.parametrize(
        ("scale", "precision", "trained_text"),
        [
            (1.0, "fp32", True),
            (0.5, "fp32", True),
            (1.0, "fp32", False),
            (1.0, "autocast", True),
            (1.0, "fp16", True),
        ],
    )
    def test_a_script_runs_with_its_import_line_changed(
        self, trained: Base, tmp_path: Path, scale: float, precision: str, trained_text: bool
    ) -> None:
        changed = SCRIPT.replace("from svdiff_pytorch import", "from svdiff.compat.svdiff_pytorch import")
        (tmp_path / "inference.py").write_text(changed)
        text_deltas = trained.text_deltas if trained_text else None
        run = original.save_deltas(tmp_path / "run", trained.unet_deltas, text_deltas)
        command = [sys.executable, tmp_path / "inference.py", trained.folder, run, scale, precision]
        done = subprocess.run([*map(str, command), str(tmp_path / "grid.png")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        drawn = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
        assert drawn.shape == (32, 32, 3)
        wanted = self.expected(trained, scale, text_deltas)
        if precision == "fp32":
            assert np.abs(drawn - wanted).max() <= 1
        else:
            assert np.abs(drawn - wanted).mean() < 0.2 * np.abs(wanted - self.expected(trained, 0, None)).mean()

    @staticmethod
    def expected(trained: Base, scale: float, text_deltas: dict[str, Tensor] | None) -> np.ndarray:
        """The same four pictures by diffusers' own models with weights of the formula."""
        from diffusers import StableDiffusionPipeline

        text = trained.text_encoder
        pipe = StableDiffusionPipeline.from_pretrained(
            trained.folder,
            unet=original.shifted(trained.unet, trained.unet_deltas, scale).float(),
            text_encoder=text if text_deltas is None else original.shifted(text, text_deltas, scale).float(),
            safety_checker=None,
            scheduler=SCHEDULER_MAPPING["dpm_solver++"].from_pretrained(trained.folder, subfolder="scheduler"),
        )
        pipe.set_progress_bar_config(disable=True)
        generator, images = torch.Generator().manual_seed(3), []
        how: Any = {"num_inference_steps": 3, "guidance_scale": 4.0, "num_images_per_prompt": 2}
        for prompt in ("a dog", "a cat"):
            images += pipe(prompt, generator=generator, height=16, width=16, **how).images
        rows = [np.concatenate([np.asarray(image) for image in images[i : i + 2]], axis=1) for i in (0, 2)]
        return np.concatenate(rows).astype(int)


@pytest.fixture
def inverting(trained: Base) -> Any:
    """As README.md of svdiff-pytorch puts it together."""
    from diffusers import DDIMScheduler

    pipe = StableDiffusionPipelineWithDDIMInversion.from_pretrained(
        trained.folder,
        unet=load_unet_for_svdiff(trained.folder, trained.run, subfolder="unet"),
        text_encoder=load_text_encoder_for_svdiff(trained.folder, trained.run, subfolder="text_encoder"),
        safety_checker=None,
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((32, 16))


class TestInversion:
    def test_what_it_finds_draws_the_picture_again(self) -> None:
        """The miniature, whose latents and noise are those of a trained model."""
        from svdiff.miniature import load_pipeline, world
        from svdiff.pipelines import set_scheduler

        pipe = StableDiffusionPipelineWithDDIMInversion(**load_pipeline().components, requires_safety_checker=False)
        set_scheduler(pipe, "ddim")
        pipe.set_progress_bar_config(disable=True)
        scene = world.Scene((world.Item("square", "red", "left", "large"),), "white")
        drawing = world.render(scene)
        pixels = pipe.image_processor.preprocess(drawing)
        steps: Any = {"num_inference_steps": 20, "guidance_scale": 1.0}
        for given in (drawing, pixels, [drawing]):
            found = pipe.invert(world.caption(scene), image=given, **steps)
            again = pipe(world.caption(scene), latents=found.latents, output_type="latent", **steps).images
            latents = pipe.vae.encode(pixels).latents * pipe.vae.config.scaling_factor
            assert (again - latents).norm() < 0.1 * latents.norm()

    def test_what_comes_back(self, inverting: Any, picture: Image.Image) -> None:
        scheduler, seen = inverting.scheduler, []
        rng = lambda: torch.Generator().manual_seed(1)  # noqa: E731
        found = inverting.invert(
            "a dog", image=picture, num_inference_steps=4, generator=rng(), callback_steps=2,
            callback=lambda step, timestep, latents: seen.append((step, int(timestep), latents.shape)),
        )  # fmt: skip
        assert found.latents.shape == (1, 4, 8, 16) and found.images[0].size == (32, 16)
        assert [step for step, _, _ in seen] == [0, 2] and seen[0][1] < seen[1][1]
        assert inverting.scheduler is scheduler and inverting._progress_bar_config == {"disable": True}
        latents, images = inverting.invert(
            ["a dog"], image=[picture], num_inference_steps=4, generator=rng(), return_dict=False, output_type="np"
        )
        assert torch.equal(latents, found.latents)
        assert np.abs(images[0] - np.asarray(found.images[0]) / 255).max() <= 1 / 255
        embeds, _ = inverting.encode_prompt("a dog", "cpu", 1, False)
        by_embeds = inverting.invert(
            prompt_embeds=embeds, image=picture, num_inference_steps=4, generator=rng(), output_type="latent"
        )
        assert torch.equal(by_embeds.latents, latents) and torch.equal(by_embeds.images, latents)
        other = inverting.invert("a dog", image=picture, num_inference_steps=4, output_type="latent").latents
        assert not torch.equal(other, latents)  # a sample of the VAE's
        several = inverting.invert(["a dog", "a cat"], latents=latents[:, :, :, :8], num_inference_steps=2).latents
        assert several.shape == (2, 4, 8, 8) and not torch.equal(several[0], several[1])

    def test_editing_as_the_readme_does_it(self, inverting: Any, picture: Image.Image) -> None:
        inv_latents = inverting.invert("a cat", image=picture, guidance_scale=1.0, num_inference_steps=3).latents
        noise_latents = inverting.prepare_latents(
            inv_latents.shape[0], inv_latents.shape[1], 16, 32,
            dtype=inv_latents.dtype, device=inverting.device, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        mixed = slerp_tensor(0.5, inv_latents, noise_latents)
        image = inverting("a cat", latents=mixed, guidance_scale=3, eta=0.5, num_inference_steps=3).images[0]
        assert image.size == (32, 16)

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"prompt": "a dog"}, "needs an image"),
            ({"prompt": "a dog", "image": []}, "needs an image"),
            ({"image": torch.zeros(1, 3, 16, 16)}, "either a prompt or prompt_embeds"),
            ({"prompt": "a dog", "image": torch.zeros(2, 3, 16, 16)}, "2 pictures for 1 prompts"),
            ({"prompt": "a dog", "image": "photo.png"}, "a PIL image or a tensor"),
            ({"prompt": "a dog", "image": torch.zeros(3, 16, 16), "num_reg_steps": 5}, "num_reg_steps 5"),
        ],
    )
    def test_mistakes(self, inverting: Any, how: dict[str, Any], message: str) -> None:
        with pytest.raises(SVDiffError, match=message) as caught:
            inverting.invert(**how)
        assert "\n" not in str(caught.value)


def test_slerp() -> None:
    rng = torch.Generator().manual_seed(0)
    low, high = torch.randn(2, 5, generator=rng, dtype=torch.double), torch.randn(2, 5, generator=rng).double()
    omega = torch.arccos((low * high).sum(1) / low.norm(dim=1) / high.norm(dim=1))[:, None]
    truth = (torch.sin(0.7 * omega) * low + torch.sin(0.3 * omega) * high) / torch.sin(omega)
    assert relative(slerp(0.3, low, high), truth) <= 1e-12
    a, b = torch.randn(2, 3, 4, 6, generator=rng), torch.randn(2, 3, 4, 6, generator=rng)
    assert torch.equal(slerp_tensor(0.3, a, b), slerp(0.3, a.flatten(1), b.flatten(1)).view(a.shape))
    by_pixel = slerp(0.3, a, b)  # along dimension 1
    assert relative(by_pixel[:, :, 1, 2], slerp(0.3, a[:, :, 1, 2], b[:, :, 1, 2])) <= 1e-6
    assert torch.equal(slerp(0.5, a, a), a)  # no division by the sine of nothing


def test_image_grid() -> None:
    colours = ["red", "green", "blue", "white", "black", "gray"]
    images = [Image.new("RGB", (3, 2), colour) for colour in colours]
    sheet = image_grid(images, 2, 3)
    assert sheet.size == (9, 4)
    assert [sheet.getpixel((3 * i % 9, 2 * (i // 3))) for i in range(6)] == [im.getpixel((0, 0)) for im in images]
    with pytest.raises(SVDiffError, match="6 pictures do not fill a grid of 2 x 2"):
        image_grid(images, 2, 2)


def test_schedulers() -> None:
    import diffusers

    names = {
        "ddim": "DDIM", "plms": "PNDM", "lms": "LMSDiscrete", "euler": "EulerDiscrete",
        "euler_ancestral": "EulerAncestralDiscrete", "dpm_solver++": "DPMSolverMultistep",
    }  # fmt: skip
    found = {name: getattr(diffusers, f"{kind}Scheduler") for name, kind in names.items()}
    assert found == SCHEDULER_MAPPING


def test_modules_are_where_they_were() -> None:
    from svdiff.compat.svdiff_pytorch import layers, utils
    from svdiff.compat.svdiff_pytorch import pipeline_stable_diffusion_ddim_inversion as inversion

    assert inversion.StableDiffusionPipelineWithDDIMInversion is StableDiffusionPipelineWithDDIMInversion
    assert utils.slerp_tensor is slerp_tensor
    for name in ("SVDConv2d", "SVDLinear", "SVDEmbedding", "SVDLayerNorm", "SVDGroupNorm"):
        assert issubclass(getattr(layers, name), SpectralModule)


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_without_diffusers_it_says_so(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import svdiff.compat; import svdiff.compat.svdiff_pytorch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "svdiff_kernels.errors.SVDiffError: svdiff.compat.svdiff_pytorch needs diffusers and transformers: "
        'pip install "svdiff-kernels[diffusers]"'
    )


def of_another_width(trained: Base, run: Path) -> None:
    wide = tiny_unet(cross_attention_dim=20)
    original.save_deltas(run, original.some_deltas(original.decomposed(wide)))


def of_another_depth(trained: Base, run: Path) -> None:
    deep = tiny_unet(layers_per_block=2)
    original.save_deltas(run, original.some_deltas(original.decomposed(deep)))


def reshaped_as_kohya(trained: Base, run: Path) -> None:
    """Another reshape of kernels: ``(co ci h) w``, say, has other singular values, and fewer."""
    lengths = {path: m.weight.shape[-1] for path, m in trained.unet.named_modules() if isinstance(m, nn.Conv2d)}
    deltas = {path: delta[: lengths.get(path)] for path, delta in trained.unet_deltas.items()}
    original.save_deltas(run, deltas)


def of_the_text_encoder(trained: Base, run: Path) -> None:
    original.save_deltas(run, trained.text_deltas)


def of_vectors(trained: Base, run: Path) -> None:
    svdiff.attach(tiny_unet()).save_weights(run)


def of_other_weights(trained: Base, run: Path) -> None:
    """Of the same shapes; the file says on which it was trained."""
    svdiff.attach(tiny_unet(), one_dim="scalar").save_weights(run)


def pickled(trained: Base, run: Path) -> None:
    run.mkdir()
    torch.save(trained.unet_deltas, run / original.UNET_FILE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_another_width, r"attn2\.to_[kv]\.delta has shape"),
        (of_another_depth, "belongs to no adapted layer of this model"),
        (reshaped_as_kohya, r"has shape \[[13]\], but the model's has .*conv reshape"),
        (of_the_text_encoder, "belongs to no adapted layer of this model"),
        (of_vectors, "one-dim mode"),
        (of_other_weights, "was trained on other weights than this model's"),
        (pickled, "is not a readable safetensors file"),
        (lambda trained, run: run.mkdir(), "there is no delta file"),
        (lambda trained, run: None, "there is no delta file"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(
    trained: Base, tmp_path: Path, make: Callable[[Base, Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(trained, tmp_path / "run")
    monkeypatch.setattr(FactorCache, "iterate", lambda *_, **__: pytest.fail("decomposed for nothing"))
    with pytest.raises(SVDiffError, match=message) as caught:
        load_unet_for_svdiff(trained.folder, tmp_path / "run", subfolder="unet")
    assert "\n" not in str(caught.value)


def test_models_that_are_not_there(trained: Base, tmp_path: Path) -> None:
    for load in (load_unet_for_svdiff, load_text_encoder_for_svdiff):
        with pytest.raises(SVDiffError, match="cannot load the model") as caught:
            load(tmp_path / "nowhere")
        assert "\n" not in str(caught.value)


class TestHub:
    """A repository stands for what `hf_hub_download` makes of it."""

    def downloads(self, monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[dict[str, Any]]:
        from svdiff.compat.svdiff_pytorch import utils

        asked: list[dict[str, Any]] = []

        def download(repo_id: str, filename: str, **how: Any) -> str:
            asked.append({"repo_id": repo_id, "filename": filename, **how})
            if isinstance(answer, Exception):
                raise answer
            return str(answer / filename)

        monkeypatch.setattr(utils, "hf_hub_download", download)
        return asked

    @torch.no_grad()
    def test_shifts_come_from_there(self, trained: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.downloads(monkeypatch, trained.run)
        kwargs = {"revision": "main"}
        unet = load_unet_for_svdiff(trained.folder, "someone/dog", hf_hub_kwargs=kwargs, subfolder="unet")
        load_text_encoder_for_svdiff(trained.folder, "someone/dog", subfolder="text_encoder")
        assert asked == [
            {"repo_id": "someone/dog", "filename": original.UNET_FILE, "revision": "main"},
            {"repo_id": "someone/dog", "filename": original.TEXT_FILE},
        ]
        assert relative(predicted(unet), predicted(trained.unet)) > 0.01

    @torch.no_grad()
    def test_one_without_a_text_encoder(self, trained: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        self.downloads(monkeypatch, EntryNotFoundError("404"))
        text = load_text_encoder_for_svdiff(trained.folder, "someone/dog", subfolder="text_encoder")
        assert relative(embedded(text), embedded(trained.text_encoder)) <= TOLERANCE
        with pytest.raises(SVDiffError, match="there is no delta file someone/dog, nor can"):
            load_unet_for_svdiff(trained.folder, "someone/dog", subfolder="unet")
        self.downloads(monkeypatch, LocalEntryNotFoundError("offline\nand not in the cache"))
        with pytest.raises(SVDiffError, match="offline and not in the cache"):
            load_text_encoder_for_svdiff(trained.folder, "someone/dog", subfolder="text_encoder")
