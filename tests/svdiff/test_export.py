"""svdiff export: what each consumer makes of what was written for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from svdiff import ExportConfig, checkpoint, export, lora
from svdiff.cli import main
from svdiff.pipelines import load_pipeline
from tiny import tiny_pipeline, tiny_text_encoder, tiny_unet
from tiny_pipelines import draw, tiny_sdxl_pipeline

from svdiff_kernels import SVDiffError

Shifts = Callable[..., str]


def sd2_pipeline(folder: Path) -> Any:
    """SD 2.x: OpenCLIP's text encoder, linear projections."""
    pipeline = tiny_pipeline(folder)
    unet = tiny_unet(use_linear_projection=True)
    pipeline.register_modules(unet=unet, text_encoder=tiny_text_encoder(hidden_act="gelu"))
    return pipeline


def xl_pipeline(folder: Path) -> Any:
    """SDXL, whose second encoder's projection is square, as the original's."""
    pipeline = tiny_sdxl_pipeline(folder)
    unet = tiny_unet(
        cross_attention_dim=12 + 20,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20 + 6 * 4,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipeline.register_modules(unet=unet, text_encoder_2=tiny_text_encoder(hidden_size=20, projection_dim=20))
    return pipeline


BASES = {"sd": tiny_pipeline, "sd 2": sd2_pipeline, "sdxl": xl_pipeline}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder of each kind of pipeline."""
    made = {}
    for name, make in BASES.items():
        folder = tmp_path_factory.mktemp("base")
        make(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
        made[name] = str(folder)
    return made


@pytest.fixture
def shifts(tmp_path: Path) -> Shifts:
    """Makes a folder with random shifts, of a share of sigma, for a base; what `attach` takes may be said."""

    def make(base: str, share: float = 0.2, only: str = "", **how: Any) -> str:
        adapter = svdiff.attach(load_pipeline(base), **how)
        deltas = {
            part.role: {
                path: share * layer.sigma * torch.randn_like(layer.sigma).clamp(-3, 3)
                for path, layer in part.layers.items()
                if part.role == "denoiser" or only in path
            }
            for part in adapter.parts
        }
        adapter.load_deltas(deltas)
        folder = tmp_path / "shifts"
        adapter.save_weights(folder)
        return str(folder)

    return make


def exported(tmp_path: Path, format: str, base: str, shifts: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The result, and what run.json says of it."""
    config = ExportConfig(format, base, shifts, output_dir=str(tmp_path / "out"), **changes)
    result = export(config)
    return result, json.loads((tmp_path / "out" / "run.json").read_text())


def attached(base: str, shifts: str) -> Any:
    pipeline = load_pipeline(base)
    svdiff.load(pipeline, shifts)
    return pipeline


def distance(pipeline: Any, expected: Any) -> float:
    """The largest difference of a picture's values, which are in 0..1; it must not be the base's picture."""
    return float(np.abs(draw(pipeline) - draw(expected)).max())


@pytest.mark.parametrize("kind", BASES)
def test_merged_folder(kind: str, bases: dict[str, str], shifts: Shifts, tmp_path: Path) -> None:
    given = shifts(bases[kind], share=0.5, text_encoder=True)  # some are clamped
    result, told = exported(tmp_path, "merged", bases[kind], given)
    plain = type(load_pipeline(bases[kind])).from_pretrained(result.path)
    expected = attached(bases[kind], given)
    assert distance(plain, expected) < 1e-5 < 1e-3 < distance(load_pipeline(bases[kind]), expected)
    assert told["fidelity"]["error"] == result.fidelity.error < 1e-5
    assert result.fidelity.left_out == 0


@pytest.mark.parametrize("kind", BASES)
def test_single_file(kind: str, bases: dict[str, str], shifts: Shifts, tmp_path: Path) -> None:
    given = shifts(bases[kind], share=0.5, text_encoder=True)
    result, told = exported(tmp_path, "single_file", bases[kind], given)
    assert result.path.name == told["file"] == "model.safetensors"
    consumer = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    plain = consumer.from_single_file(str(result.path), config=bases[kind], safety_checker=None, local_files_only=True)
    assert distance(plain, attached(bases[kind], given)) < 1e-5


def test_single_file_of_another_kind_of_vae_is_without(shifts: Shifts, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="holds no VAE"):
        result, _ = exported(tmp_path, "single_file", "miniature", shifts("miniature"))
    assert not any(key.startswith("first_stage_model") for key in load_file(result.path))


@pytest.mark.parametrize("format", ["lora", "kohya"])
@pytest.mark.parametrize("kind", BASES)
def test_lora_of_full_rank(kind: str, format: str, bases: dict[str, str], shifts: Shifts, tmp_path: Path) -> None:
    given = shifts(bases[kind], only="layers.", text_encoder=True, one_dim="none")
    result, _ = exported(tmp_path, format, bases[kind], given)
    plain = load_pipeline(bases[kind])
    plain.load_lora_weights(result.path.parent, weight_name=result.path.name)
    expected = attached(bases[kind], given)
    assert distance(plain, expected) < 1e-4 < 1e-3 < distance(load_pipeline(bases[kind]), expected)
    assert result.fidelity.error < 1e-5


def test_lora_of_a_transformer(base_of: Callable[[str], Path], shifts: Shifts, tmp_path: Path) -> None:
    base = str(base_of("sd3"))
    given = shifts(base, one_dim="none")
    result, _ = exported(tmp_path, "lora", base, given)
    plain = load_pipeline(base)
    plain.load_lora_weights(result.path.parent, weight_name=result.path.name)
    assert distance(plain, attached(base, given)) < 1e-4
    for format, message in [("kohya", "export lora instead"), ("single_file", "export merged instead")]:
        with pytest.raises(SVDiffError, match=message):
            exported(tmp_path / format, format, base, given)
        assert not (tmp_path / format / "out").exists()


@pytest.mark.parametrize("format", ["lora", "kohya"])
@pytest.mark.parametrize("wanted", [{"rank": 2}, {"energy": 0.7}, {"max_error": 0.3}, {"max_error": 0.3, "rank": 3}])
def test_rank(format: str, wanted: dict[str, float], bases: dict[str, str], shifts: Shifts, tmp_path: Path) -> None:
    """The error is that of the dropped singular values, and diffusers multiplies each layer by the right factor."""
    given = shifts(bases["sd"], one_dim="none")
    result, _ = exported(tmp_path, format, bases["sd"], given, **wanted)
    plain = load_pipeline(bases["sd"])
    plain.load_lora_weights(result.path.parent, weight_name=result.path.name)
    plain.fuse_lora()
    plain.unload_lora_weights()
    base, adapter = load_pipeline(bases["sd"]), svdiff.attach(load_pipeline(bases["sd"]), one_dim="none")
    adapter.load_weights(given)
    all_squares = lost_squares = 0.0
    for path, layer in adapter.parts[0].layers.items():
        dsigma = (layer.shifted() - layer.sigma).detach().abs().sort(descending=True).values
        change = (plain.unet.get_submodule(path).weight - base.unet.get_submodule(path).weight).detach().flatten(1)
        kept = int(torch.linalg.matrix_rank(change, atol=1e-5))
        dropped = dsigma[kept:].square().sum()
        assert math.isclose(change.square().sum(), dsigma[:kept].square().sum(), rel_tol=1e-3)  # the largest ones
        if "rank" in wanted:
            assert kept <= wanted["rank"]
        if "energy" in wanted:
            assert dropped <= 0.3 * dsigma.square().sum() < dropped + dsigma[kept - 1].square()
        all_squares, lost_squares = all_squares + dsigma.square().sum(), lost_squares + dropped
    assert math.isclose(result.fidelity.error, math.sqrt(lost_squares / all_squares), rel_tol=1e-3)
    if wanted == {"max_error": 0.3}:
        assert 0.27 < result.fidelity.error <= 0.3


def test_max_error_spends_rank_where_it_counts() -> None:
    dsigma = {"large": torch.tensor([8.0, -4.0, 0.5]), "small": torch.tensor([1.0, 0.9]), "still": torch.zeros(2)}
    assert lora.choose_ranks(dsigma) == {"large": 3, "small": 2, "still": 0}
    assert lora.choose_ranks(dsigma, max_error=0.2) == {"large": 2, "small": 0, "still": 0}
    assert lora.choose_ranks(dsigma, max_error=0.0) == {"large": 3, "small": 2, "still": 0}
    assert lora.choose_ranks(dsigma, energy=0.95) == {"large": 2, "small": 2, "still": 0}
    assert lora.choose_ranks(dsigma, energy=0.5, rank=1) == {"large": 1, "small": 1, "still": 0}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_kohya_layout(kind: str, bases: dict[str, str], shifts: Shifts, tmp_path: Path) -> None:
    """sd-scripts: the path with underscores behind a prefix; of SDXL's UNet the path in the original layout."""
    given = shifts(bases[kind], text_encoder=True)
    result, _ = exported(tmp_path, "kohya", bases[kind], given, rank=4)
    tensors = load_file(result.path)
    names = {key.split(".")[0] for key in tensors}
    encoder = "lora_te1_" if kind == "sdxl" else "lora_te_"
    assert f"{encoder}text_model_encoder_layers_0_self_attn_q_proj" in names
    if kind == "sdxl":
        assert "lora_te2_text_model_encoder_layers_1_mlp_fc1" in names
        assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q" in names
        assert "lora_unet_output_blocks_3_0_in_layers_2" in names and "lora_unet_time_embed_0" in names
        assert "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj" in names
    else:
        assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in names
        assert "lora_unet_down_blocks_0_resnets_0_conv1" in names and "lora_unet_conv_in" in names
    assert len({float(t) for key, t in tensors.items() if key.endswith(".alpha")}) == 1
    for name in names:
        keys = {key.removeprefix(name) for key in tensors if key.split(".")[0] == name}
        assert keys in ({".lora_down.weight", ".lora_up.weight", ".alpha"}, {".w_norm", ".b_norm"})
    expected = attached(bases[kind], given)
    norm = expected.unet.conv_norm_out
    of_norm = "lora_unet_out_0" if kind == "sdxl" else "lora_unet_conv_norm_out"
    assert torch.equal(tensors[f"{of_norm}.w_norm"], norm.delta)
    assert not tensors[f"{of_norm}.b_norm"].any()
    with safe_open(result.path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == "4"
    assert metadata["ss_base_model_version"] == ("sdxl_base_v1-0" if kind == "sdxl" else "sd_v1")
    without, _ = exported(tmp_path / "without", "kohya", bases[kind], given, rank=4, norms=False)
    assert {key for key in load_file(without.path)} == {key for key in tensors if "_norm" not in key.rsplit(".", 1)[1]}
    assert without.fidelity.left_out > result.fidelity.left_out  # embeddings have no place in either


def test_svdiff_pytorchs_files(bases: dict[str, str], shifts: Shifts, tmp_path: Path) -> None:
    """All of sigma, also where only some were trained; and a number for each norm."""
    given = shifts(bases["sd"], text_encoder=True, rank=3, one_dim="vector")
    result, _ = exported(tmp_path, "svdiff_pytorch", bases["sd"], given)
    files = checkpoint.read_all(result.path)
    unet, encoder = load_pipeline(bases["sd"]).unet, load_pipeline(bases["sd"]).text_encoder
    for part, model in (("denoiser", unet), ("text_encoder", encoder)):
        for path, delta in files[part].deltas.items():
            weight = model.get_submodule(checkpoint.model_path(path, dict(model.named_modules()))).weight
            full = min(weight.shape[0], weight[0].numel()) if weight.dim() > 1 else 1
            assert delta.shape == (full,) and delta.dtype == torch.float32
            assert not delta[3:].any()
    mine = checkpoint.read_all(given)["denoiser"].deltas
    for path, delta in files["denoiser"].deltas.items():
        if "norm" not in path:
            assert torch.equal(delta[: mine[path].numel()], mine[path])
    assert result.fidelity.worst_error > 0.5 and "norm" in result.fidelity.worst_layer  # one number for a vector
    again, _ = exported(tmp_path / "again", "svdiff_pytorch", bases["sd"], str(result.path))
    assert again.fidelity.error < 1e-6
    assert distance(attached(bases["sd"], str(again.path)), attached(bases["sd"], str(result.path))) < 1e-5


def test_scale_and_dtype(bases: dict[str, str], shifts: Shifts, tmp_path: Path) -> None:
    given = shifts(bases["sd"], share=0.3)
    result, _ = exported(tmp_path, "merged", bases["sd"], given, spectral_shifts_scale=-0.5, dtype="fp16")
    plain = StableDiffusionPipeline.from_pretrained(result.path, torch_dtype=torch.float16)
    expected = load_pipeline(bases["sd"])
    svdiff.load(expected, given).set_adapters("default", -0.5)
    weight = plain.unet.conv_in.weight
    torch.testing.assert_close(weight.float(), expected.unet.conv_in.weight + 0.0, rtol=1e-3, atol=1e-3)
    assert weight.dtype == torch.float16
    assert 1e-4 < result.fidelity.error < 1e-2  # weights are rounded, and with them what the shifts changed


def test_on_the_command_line(
    bases: dict[str, str], shifts: Shifts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = shifts(bases["sd"])
    where = ["--pretrained_model_name_or_path", bases["sd"], "--spectral_shifts_ckpt", given]
    assert main(["export", "lora", *where, "--rank", "2", "--output_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert str(tmp_path / "out" / "pytorch_lora_weights.safetensors") in told
    assert "of the change is lost, most in" in told and "have no place in this format" in told
    assert main(["export", "lora", *where, "--rank", "0", "--output_dir", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err == "svdiff: error: rank must be at least 1, not 0\n"
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "gguf"}, "format 'gguf' is not one of merged, single_file, lora, kohya, svdiff_pytorch"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"spectral_shifts_scale": math.nan}, "not a finite number"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"energy": 0.0}, "energy must be above 0"),
        ({"max_error": 1.0}, "max_error must be from 0 to below 1"),
        ({"energy": 0.9, "max_error": 0.1}, "exclude each other"),
        ({"format": "merged", "rank": 2}, "rank is for LoRAs"),
        ({"spectral_shifts_ckpt": "nowhere"}, "there is no delta file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str, shifts: Shifts, tmp_path: Path) -> None:
    config = ExportConfig("lora", "miniature", "shifts", output_dir=str(tmp_path / "out"))
    if "spectral_shifts_ckpt" not in changes:
        config = replace(config, spectral_shifts_ckpt=shifts("miniature"))
    with pytest.raises(SVDiffError, match=message):
        export(replace(config, **changes))
    assert not (tmp_path / "out").exists()


def test_shifts_of_norms_alone_are_no_lora(bases: dict[str, str], shifts: Shifts, tmp_path: Path) -> None:
    given = shifts(bases["sd"], targets=r"norm")
    with pytest.raises(SVDiffError, match="changes nothing that the format lora can hold"):
        exported(tmp_path, "lora", bases["sd"], given)
