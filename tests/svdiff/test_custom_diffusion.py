"""Custom Diffusion's file: what diffusers makes of it, what we make of diffusers', what is refused; and its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from svdiff import ExportConfig, custom_diffusion, export
from svdiff.pipelines import load_pipeline
from svdiff.targets import select
from tiny import assert_unchanged, output, snapshot
from tiny_pipelines import draw
from torch import Tensor

from svdiff_kernels import SVDiffError

K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"


def layers_of(unet: Any) -> dict[str, Any]:
    return select(unet, "cross_attn_kv", one_dim=False)


def trained(unet: Any, size: float = 0.5) -> dict[str, Tensor]:
    """Weights that differ from the base's."""
    rng = torch.Generator().manual_seed(4)
    layers = layers_of(unet)
    return {
        path: one.weight.detach() + size * torch.randn(one.weight.shape, generator=rng) for path, one in layers.items()
    }


def hashes(unet: Any) -> dict[str, str]:
    return custom_diffusion.hashes_of({path: layer.weight for path, layer in layers_of(unet).items()})


def written(unet: Any, folder: Path, **metadata: Any) -> Path:
    return custom_diffusion.write(folder, trained(unet), {"base_model": "tiny", **metadata}, hashes=hashes(unet))


def test_what_is_written_is_read(unet: Any, tmp_path: Path) -> None:
    weights = trained(unet)
    file = custom_diffusion.write(
        tmp_path / "run", weights, {"base_model": "tiny", "modifier_tokens": ["<new1>"]}, hashes=hashes(unet)
    )
    assert file == tmp_path / "run" / "pytorch_custom_diffusion_weights.safetensors"
    for place in (file, file.parent):
        assert custom_diffusion.find(place) == file
        read = custom_diffusion.read(place)
        assert read.weights.keys() == weights.keys() and all(
            torch.equal(read.weights[p], w) for p, w in weights.items()
        )
    assert read.metadata["base_model"] == "tiny" and read.told("modifier_tokens") == ["<new1>"]
    assert read.layers_of(unet) == layers_of(unet)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert custom_diffusion.find(tmp_path) is None and custom_diffusion.find(tmp_path / "nowhere.safetensors") is None


def test_diffusers_draws_with_our_file_what_we_draw(pipeline: Any, base: Path, tmp_path: Path) -> None:
    before = draw(pipeline)
    file = written(pipeline.unet, tmp_path)
    placed = custom_diffusion.load(pipeline, tmp_path)
    ours = draw(pipeline)
    other = load_pipeline(str(base))
    # 0.42 sets the processors only if it is told the pipeline
    other.unet.load_attn_procs(str(tmp_path), weight_name=file.name, _pipeline=other)
    assert type(other.unet.attn_processors[f"{K.removesuffix('.to_k')}.processor"]).__name__.startswith(
        "CustomDiffusion"
    )
    theirs = draw(other)
    assert abs(ours - before).max() > 0.01
    assert abs(ours - theirs).max() < 1e-5
    placed.unload()
    assert (draw(pipeline) == before).all()


def test_the_file_of_diffusers_is_read(pipeline: Any, base: Path, tmp_path: Path) -> None:
    written(pipeline.unet, tmp_path / "ours")
    other = load_pipeline(str(base))
    name = custom_diffusion.FILE_NAME
    other.unet.load_attn_procs(str(tmp_path / "ours"), weight_name=name, _pipeline=other)
    other.unet.save_attn_procs(str(tmp_path / "theirs"), weight_name=name)
    theirs = custom_diffusion.read(tmp_path / "theirs")
    for path, weight in trained(pipeline.unet).items():
        assert torch.equal(theirs.weights[path], weight)
    assert theirs.base_hashes() == {}
    custom_diffusion.load(pipeline, tmp_path / "theirs")


def test_loading_and_the_way_back(unet: Any, tmp_path: Path) -> None:
    before, plain = snapshot(unet), output(unet)
    written(unet, tmp_path)
    placed = custom_diffusion.load(unet, tmp_path)
    whole = output(unet)
    for path, weight in trained_from(before, tmp_path).items():
        assert torch.equal(unet.get_submodule(path).weight, weight)
    placed.unload()
    assert_unchanged(unet, before)
    placed = custom_diffusion.load(unet, tmp_path, scale=0.5)
    for path, weight in trained_from(before, tmp_path).items():
        torch.testing.assert_close(unet.get_submodule(path).weight, (weight + before[f"{path}.weight"]) / 2)
    assert not torch.allclose(output(unet), plain) and not torch.allclose(output(unet), whole)
    unet.half()
    placed.unload()
    assert torch.equal(unet.get_submodule(K).weight, before[f"{K}.weight"].half())


def trained_from(before: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    weights = custom_diffusion.read(folder).weights
    assert all(f"{path}.weight" in before for path in weights)
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({KEY: t[KEY] * float("nan")}), f"key {KEY} holds NaN or inf"),
        (lambda t: t.update({KEY: t[KEY].long()}), f"key {KEY} is no matrix"),
        (lambda t: t.pop(KEY), f"key {KEY} is missing"),
        (
            lambda t: t.update({KEY: t[KEY][1:]}),
            r"to_k_custom_diffusion.weight has shape \[7, 12\], but the model's has",
        ),
        (
            lambda t: t.update({KEY.replace("to_k", "to_q"): t[KEY].clone()}),
            "to_q_custom_diffusion.weight is not of a key's",
        ),
        (
            lambda t: t.update({"a.processor.to_k_custom_diffusion.weight": t[KEY].clone()}),
            "a.processor.to_v_.* is missing",
        ),
        (
            lambda t: t.update({f"a.processor.to_{x}_custom_diffusion.weight": t[KEY].clone() for x in "kv"}),
            "key a.processor.to_k_custom_diffusion.weight: UNet2DConditionModel has no such linear layer",
        ),
        (lambda t: [t.pop(key) for key in list(t) if t[key].numel()], "holds no weights of Custom Diffusion"),
    ],
)
def test_a_wrong_file_is_one_line(unet: Any, tmp_path: Path, change: Any, message: str) -> None:
    file = written(unet, tmp_path / "good")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors", {})
    before = snapshot(unet)
    with pytest.raises(SVDiffError, match=message) as caught:
        custom_diffusion.load(unet, tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)
    assert_unchanged(unet, before)


def test_wrong_bases_versions_and_places(unet: Any, tmp_path: Path) -> None:
    file = written(unet, tmp_path)
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    save_file(load_file(file), tmp_path / "new.safetensors", said | {"format_version": "2"})
    with pytest.raises(SVDiffError, match="has format version 2; this library reads version 1"):
        custom_diffusion.read(tmp_path / "new.safetensors")
    save_file(load_file(file), tmp_path / "few.safetensors", said | {"base_hashes": "ab"})
    with pytest.raises(SVDiffError, match="its metadata has 1 base hashes for"):
        custom_diffusion.load(unet, tmp_path / "few.safetensors")
    with pytest.raises(SVDiffError, match="there is no file of Custom Diffusion"):
        custom_diffusion.read(tmp_path / "nowhere")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(SVDiffError, match="is not a readable safetensors file"):
        custom_diffusion.read(tmp_path / "text.safetensors")
    adapter = svdiff.attach(unet, cache=False)
    with pytest.raises(SVDiffError, match=r"has spectral layers .*: unload its adapter first"):
        custom_diffusion.load(unet, file)
    adapter.unload()
    with torch.no_grad():
        unet.get_submodule(K).weight[0, 0] += 1
    with pytest.raises(
        SVDiffError, match=f"{KEY} was trained on other weights than this model's: the file is for tiny"
    ):
        custom_diffusion.load(unet, file)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "there are no weights to write"),
        ({"mid_block.attentions.0.proj_in": torch.ones(2, 2)}, "keys and values of cross-attention, not 'mid_block"),
        ({"a.attn2.to_k": torch.ones(2, 2)}, "to_v_custom_diffusion.weight is missing"),
        ({"a.attn2.to_k": torch.ones(2, 2), "a.attn2.to_v": torch.full((2, 2), torch.inf)}, "holds NaN or inf"),
    ],
)
def test_what_cannot_be_written(weights: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(SVDiffError, match=message):
        custom_diffusion.write(tmp_path / "run", weights)
    assert not any(tmp_path.iterdir())


def run_export(kind: Any, base: Path, ckpt: Path, output_dir: Path, **settings: Any) -> svdiff.ExportResult:
    return export(ExportConfig(kind, str(base), str(ckpt), output_dir=str(output_dir), **settings))


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_a_lora_of_all_that_changed_draws_the_same(pipeline: Any, base: Path, tmp_path: Path, scale: float) -> None:
    written(pipeline.unet, tmp_path / "run")
    result = run_export("lora", base, tmp_path / "run", tmp_path / "lora", spectral_shifts_scale=scale)
    assert result.fidelity.error < 1e-5 and result.fidelity.left_out == 0
    other = load_pipeline(str(base))
    other.load_lora_weights(str(result.path))
    custom_diffusion.load(pipeline, tmp_path / "run", scale)
    assert abs(draw(other) - draw(pipeline)).max() < 1e-4


def test_a_share_of_the_singular_values(pipeline: Any, base: Path, tmp_path: Path) -> None:
    file = written(pipeline.unet, tmp_path / "run")
    result = run_export("lora", base, file, tmp_path / "lora", share=0.6)
    tensors = load_file(result.path)
    lost, whole = 0.0, 0.0
    for path, layer in layers_of(pipeline.unet).items():
        S = torch.linalg.svdvals((trained(pipeline.unet)[path] - layer.weight.detach()).double())
        kept = tensors[f"unet.{path}.lora_A.weight"].shape[0]
        assert S[: kept - 1].sum() < 0.6 * S.sum() <= S[:kept].sum()  # the fewest
        lost, whole = lost + float(S[kept:].square().sum()), whole + float(S.square().sum())
    assert result.fidelity.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert json.loads((tmp_path / "lora" / "run.json").read_text())["fidelity"]["error"] == result.fidelity.error
    assert f"{result.fidelity.error:.2e} of the change is lost" in str(result)


@pytest.mark.parametrize("kind", ["merged", "kohya"])
def test_other_formats(pipeline: Any, base: Path, tmp_path: Path, kind: str) -> None:
    written(pipeline.unet, tmp_path / "run")
    result = run_export(kind, base, tmp_path / "run", tmp_path / "out")
    assert result.fidelity.error < 1e-5
    other = load_pipeline(str(tmp_path / "out" if kind == "merged" else base))
    if kind == "kohya":
        other.load_lora_weights(str(result.path))
    custom_diffusion.load(pipeline, tmp_path / "run")
    assert abs(draw(other) - draw(pipeline)).max() < 1e-4


def test_what_export_refuses(pipeline: Any, base: Path, tmp_path: Path) -> None:
    written(pipeline.unet, tmp_path / "run")
    with pytest.raises(SVDiffError, match="holds weights, which have no place in files of shifts"):
        run_export("svdiff_pytorch", base, tmp_path / "run", tmp_path / "out")
    with pytest.raises(SVDiffError, match=r"share must be above 0 and at most 1, not 1\.5"):
        run_export("lora", base, tmp_path / "run", tmp_path / "out", share=1.5)
    with pytest.raises(SVDiffError, match="share and energy or max_error exclude each other"):
        run_export("lora", base, tmp_path / "run", tmp_path / "out", share=0.5, energy=0.5)
    assert not (tmp_path / "out").exists()
