"""How attach starts: from what is on disk, now or later, and without copying what lies in a file already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_unchanged, output, snapshot
from torch import nn

from svdiff_kernels import FactorCache
from svdiff_kernels import nn as snn


def deferred(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, snn.SpectralLinear) and m.U.is_meta]


def test_lazily_a_layer_loads_its_factors_when_it_first_computes(unet: Any) -> None:
    eager = svdiff.attach(unet)
    expected = output(unet)
    eager.unload()
    before = snapshot(unet)
    adapter = svdiff.attach(unet, lazy=True)
    assert len(deferred(unet)) > 20
    assert torch.equal(output(unet), expected)
    assert deferred(unet) == []
    adapter.unload()
    assert_unchanged(unet, before)


def test_what_was_never_loaded_unloads_and_saves_too(unet: Any) -> None:
    svdiff.attach(unet).unload()
    before = snapshot(unet)
    adapter = svdiff.attach(unet, lazy=True)
    adapter.unload()
    assert_unchanged(unet, before)
    svdiff.attach(unet, lazy=True)
    unet.to(torch.bfloat16)
    layer = unet.get_submodule(deferred(unet)[0])
    assert layer.weight.dtype == torch.bfloat16 and layer.U.is_meta
    assert torch.isfinite(layer.weight + 0).all() and layer.U.dtype == torch.bfloat16
    assert not any(t.is_meta for t in unet.state_dict().values())


def test_lazily_what_the_cache_lacks_is_decomposed_now(unet: Any) -> None:
    svdiff.attach(unet, targets="mid").unload()
    svdiff.attach(unet, lazy=True)
    assert deferred(unet) and all("mid" in path for path in deferred(unet))


def test_lazily_a_damaged_object_is_made_again(unet: Any) -> None:
    cache = FactorCache()
    svdiff.attach(unet, cache=cache).unload()
    base = output(unet)
    svdiff.attach(unet, cache=cache, lazy=True)
    for path in cache.dir.glob("objects/*/*"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="damaged"):
        torch.testing.assert_close(output(unet), base, atol=1e-4, rtol=1e-4)


def test_weights_that_lie_in_a_file_stay_there(tmp_path: Path) -> None:
    layers = {"a.weight": torch.randn(60, 70), "b.weight": torch.randn(50, 60)}
    save_file(layers, tmp_path / "model.safetensors")
    model = nn.ModuleDict({"a": nn.Linear(70, 60, bias=False), "b": nn.Linear(60, 50, bias=False)})
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    adapter = svdiff.attach(model, cache=FactorCache(tmp_path / "cache"))
    opened = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path)) and path.endswith("(deleted)")]
    assert model["a"].weight.shape == (60, 70)
    adapter.unload()
    for name, expected in layers.items():
        assert torch.equal(model.get_parameter(name), expected)
