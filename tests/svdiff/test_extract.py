"""svdiff extract: shifts fitted to other fine-tunes, and how much of these they have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
from safetensors.torch import load_file, save_file
from svdiff import ExportConfig, ExtractConfig, checkpoint, export, extract
from svdiff.cli import main
from svdiff.extract import fit
from svdiff.pipelines import load_pipeline
from tiny import output
from torch import nn

from svdiff_kernels import SVDiffError
from svdiff_kernels.nn import SpectralConv2d, SpectralLayerNorm, SpectralLinear


@pytest.fixture
def given(base: Path, tmp_path: Path) -> str:
    """A folder with shifts, some below zero."""
    adapter = svdiff.attach(load_pipeline(str(base)), text_encoder=True)
    deltas = {
        part.role: {path: 0.4 * layer.sigma * torch.randn_like(layer.sigma) for path, layer in part.layers.items()}
        for part in adapter.parts
    }
    adapter.load_deltas(deltas)
    adapter.save_weights(tmp_path / "given")
    return str(tmp_path / "given")


def extracted(tmp_path: Path, source: str | Path, base: Path, **changes: Any) -> Any:
    return extract(ExtractConfig(str(source), str(base), output_dir=str(tmp_path / "shifts"), **changes))


def outputs(base: Path, shifts: Path | str) -> torch.Tensor:
    pipeline = load_pipeline(str(base))
    svdiff.load(pipeline, shifts)
    return output(pipeline.unet)


@pytest.mark.parametrize("format", ["merged", "single_file"])
def test_shifts_come_back_from_merged_weights(format: str, given: str, base: Path, tmp_path: Path) -> None:
    merged = export(ExportConfig(format, str(base), given, output_dir=str(tmp_path / "merged")))
    result = extracted(tmp_path, merged.path, base)
    assert result.captured > 0.9999 and set(result.by_part) == {"denoiser", "text_encoder"}
    told = json.loads((tmp_path / "shifts" / "run.json").read_text())
    assert told["captured"] == result.captured
    torch.testing.assert_close(outputs(base, result.output_dir), outputs(base, given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["lora", "kohya"])
def test_shifts_come_back_from_a_lora(format: str, given: str, base: Path, tmp_path: Path) -> None:
    config = ExportConfig(format, str(base), given, output_dir=str(tmp_path / "lora"), norms=False)
    result = extracted(tmp_path, export(config).path, base)
    assert result.captured > 0.9999
    was, found = (
        checkpoint.read_all(given)["denoiser"].deltas,
        checkpoint.read_all(result.output_dir)["denoiser"].deltas,
    )
    sigma = {path: layer.sigma for path, layer in svdiff.attach(load_pipeline(str(base))).parts[0].layers.items()}
    for path, delta in found.items():
        expected = torch.zeros_like(delta) if "norm" in path else torch.maximum(was[path], -sigma[path])
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-4, msg=path)


def test_a_fine_tune_is_projected(base: Path, tmp_path: Path) -> None:
    """Of a random change of a square matrix the diagonal is one number in n; nothing else comes nearer."""
    tuned = load_pipeline(str(base))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.unet.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp_path / "tuned")
    result = extracted(tmp_path, tmp_path / "tuned", base)
    assert set(result.by_part) == {"denoiser"} and result.by_part["denoiser"] == result.captured
    plain, unet = load_pipeline(str(base)).unet, tuned.unet
    adapter = svdiff.load(load_pipeline(str(base)), result.output_dir)
    total = left = 0.0
    for name, parameter in plain.named_parameters():
        change = unet.get_parameter(name).detach() - parameter.detach()
        layer = adapter.parts[0].layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        caught = 0 if layer is None else layer.weight.detach() - parameter.detach()
        total, left = total + float(change.square().sum()), left + float((change - caught).square().sum())
    assert math.isclose(result.captured, 1 - left / total, abs_tol=1e-4)
    assert 0.02 < result.captured < 0.3


@pytest.mark.parametrize("make", ["linear", "conv", "vector", "scalar"])
def test_nothing_comes_nearer(make: str) -> None:
    if make == "linear":
        layer: Any = SpectralLinear.from_module(nn.Linear(7, 5))
    elif make == "conv":
        layer = SpectralConv2d.from_module(nn.Conv2d(3, 5, 3), rank=4)
    else:
        norm = nn.LayerNorm(6)
        nn.init.normal_(norm.weight)
        layer = SpectralLayerNorm.from_module(norm, mode=make)
    weight = layer.weight.detach().clone()
    change = torch.randn(weight.shape)
    delta, captured = fit(layer, change)

    def left(shift: torch.Tensor) -> float:
        layer.delta.data = shift
        return float((change - (layer.weight.detach() - weight)).square().sum())

    best = left(delta)
    assert math.isclose(captured, float(change.square().sum()) - best, rel_tol=1e-4, abs_tol=1e-5)
    for _ in range(20):
        assert left(delta + 0.05 * torch.randn_like(delta)) >= best - 1e-5


def test_svf(base: Path, tmp_path: Path) -> None:
    """Transformer^2 multiplies sigma."""
    pipeline = load_pipeline(str(base))
    adapter = svdiff.attach(pipeline, one_dim="none", targets="cross_attn")
    factors = {path: 1 + 0.3 * torch.randn(layer.rank) for path, layer in adapter.parts[0].layers.items()}
    save_file({f"{path}.z": z for path, z in factors.items()}, tmp_path / "svf.safetensors")
    result = extracted(tmp_path, tmp_path / "svf.safetensors", base)
    assert result.captured == 1.0
    deltas = load_file(result.output_dir / "spectral_shifts.safetensors")
    for path, z in factors.items():
        sigma = adapter.parts[0].layers[path].sigma
        torch.testing.assert_close(deltas[f"{path}.delta"], sigma * (z - 1))


def test_the_authors_keys(base: Path, given: str, tmp_path: Path) -> None:
    """phymhan/SVDiff parametrizes weights; its norms are vectors, as ours."""
    file = checkpoint.read_all(given)["denoiser"]
    key = "{}.parametrizations.weight.0.eigenvalues_delta"
    save_file({key.format(path): delta for path, delta in file.deltas.items()}, tmp_path / "authors.safetensors")
    pipeline, expected = load_pipeline(str(base)), load_pipeline(str(base))
    svdiff.load(pipeline, tmp_path / "authors.safetensors")
    svdiff.load(expected.unet, given)
    assert torch.equal(output(pipeline.unet), output(expected.unet))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere.safetensors", "there is no file"),
        (lambda folder: written(folder / "lora.bin"), "is no .safetensors file: nothing else is read"),
        (lambda folder: written(folder / "broken.safetensors"), "is not a readable safetensors file"),
        (lambda folder: saved(folder / "svf.safetensors", {"conv_in.z": torch.ones(3)}), "must be 8 finite numbers"),
        (lambda folder: saved(folder / "svf.safetensors", {"conv_in.z": torch.ones(8)}), "all its factors are 1"),
        (lambda folder: saved(folder / "svf.safetensors", {"other.z": torch.ones(3)}), "has no layer 'other'"),
        (lambda folder: saved(folder / "lora.safetensors", {"a.lora.b": torch.ones(3)}), "does not differ from"),
        (lambda folder: "miniature", "is for another model"),
    ],
)
def test_bad_sources_are_named(make: Callable[[Path], Path | str], message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SVDiffError, match=message):
        extracted(tmp_path, make(tmp_path), base)
    assert not (tmp_path / "shifts").exists()


def test_nothing_to_extract(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(tmp_path / "shifts")]
    assert main(["extract", str(base), *where]) == 2
    assert capsys.readouterr().err.endswith(f"svdiff: error: {base} does not differ from {base}\n")


def written(path: Path) -> Path:
    path.write_bytes(b"not a model")
    return path


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path
