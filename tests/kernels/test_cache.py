"""FactorCache: found by content, whole or not at all, shared by processes, never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdiff_kernels import FactorCache, Factors, SVDiffError, decompose, objects
from svdiff_kernels import cache as cache_module
from svdiff_kernels.decompose import decomposed
from svdiff_kernels.objects import content_hash


def same(a: Factors, b: Factors) -> bool:
    return torch.equal(a.U, b.U) and torch.equal(a.sigma, b.sigma) and torch.equal(a.Vh, b.Vh)


def only_object(cache: FactorCache) -> Path:
    (path,) = cache.dir.glob("objects/*/*.safetensors")
    return path


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that were really decomposed."""
    done: list[torch.Size] = []
    monkeypatch.setattr(
        cache_module, "decomposed", lambda Ws, *a, **k: done.extend(W.shape for W in Ws) or decomposed(Ws, *a, **k)
    )
    return done


def test_hash_is_of_shape_and_fp32_values() -> None:
    W = torch.randn(7, 30).half()
    assert content_hash(W) == content_hash(W.float()) == content_hash(W.T.contiguous().T)
    assert len(content_hash(W)) == 64
    assert content_hash(W) != content_hash(W.view(7, 5, 3, 2))
    assert content_hash(W) != content_hash(W + 1)
    # Written down so that no change of the code changes it unseen: adapters carry these hashes.
    assert content_hash(torch.arange(6.0).view(2, 3)).startswith("cc1a28b15d973cd3")


def test_second_time_is_read(decompositions: list[torch.Size]) -> None:
    W = torch.randn(13, 29)
    first = FactorCache().get(W)
    second = FactorCache().get(W.double())
    assert same(first, second) and same(first, decompose(W))
    assert len(decompositions) == 1
    assert second.U.dtype == torch.float32


def test_rank_is_part_of_the_key(decompositions: list[torch.Size]) -> None:
    cache, W = FactorCache(), torch.randn(13, 29)
    assert cache.get(W, 4).rank == 4
    assert cache.get(W).rank == 13
    assert cache.get(W, 13).rank == cache.get(W, 99).rank == 13  # the full one
    assert len(decompositions) == 2 and cache.size()[0] == 2


def test_objects_say_what_they_are() -> None:
    cache, W = FactorCache(), torch.randn(13, 5, 3, 1)
    cache.get(W, 4)
    path = only_object(cache)
    assert path.parent.name == path.stem[:2]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "svdiff-factors" and metadata["format_version"] == "1"
    assert metadata["layout"] == "full" and metadata["rank"] == "4" and metadata["shape"] == "[13, 15]"
    assert metadata["content"] == content_hash(W) and len(metadata["checksum"]) == 64


def test_factors_are_mapped_not_read() -> None:
    cache, W = FactorCache(), torch.randn(130, 290)
    factors = cache.get(W)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if only_object(cache).name in line]
    assert mapped and factors.U.is_contiguous()


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[len(content) // 2] ^= 4
    elif how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "garbage":
        content = bytearray(b"\xff" * len(content))
    elif how == "header":
        content[12] ^= 1
    else:
        save_file(load_file(path), path, {"format": "something else"})
        return
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "empty", "garbage", "header", "other format"])
def test_a_damaged_object_is_made_again(how: str, decompositions: list[torch.Size]) -> None:
    cache, W = FactorCache(), torch.randn(13, 29)
    expected = decompose(W)
    cache.get(W)
    damage(only_object(cache), how)
    assert list(cache.verify()) == [only_object(cache)]
    with pytest.warns(UserWarning, match="damaged"):
        assert same(cache.get(W), expected)
    assert len(decompositions) == 2
    assert cache.verify() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cache.get(W), expected)


@pytest.mark.parametrize("where", ["file/below", "file"])
def test_an_unwritable_directory_costs_one_warning(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    cache, W = FactorCache(tmp_path / where), torch.randn(13, 29)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert same(cache.get(W), decompose(W))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cache.get(W), decompose(W))


def test_a_full_disk_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects, "save_file", full)
    cache, W = FactorCache(), torch.randn(13, 29)
    with pytest.warns(UserWarning, match="No space left"):
        assert same(cache.get(W), decompose(W))
    assert [p for p in cache.dir.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_processes_share_one_computation(tmp_path: Path) -> None:
    script = """
import sys, torch
from svdiff_kernels import FactorCache, cache, decompose
def counted(W, *a):
    print("computed", flush=True)
    return decompose(W, *a)
cache.decompose = counted
for seed in range(5):
    W = torch.randn(60, 90, generator=torch.Generator().manual_seed(seed))
    f = FactorCache().get(W)
    assert torch.allclose(f.reconstruct(), W, atol=1e-4)
"""
    env = os.environ | {"SVDIFF_CACHE": str(tmp_path / "shared"), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum(output.count("computed") for output in outputs) == 5
    assert FactorCache(tmp_path / "shared").verify() == {}


def test_prune_forgets_what_was_used_longest_ago() -> None:
    cache = FactorCache()
    weights = [torch.randn(13, 29 + i) for i in range(4)]
    for i, W in enumerate(weights):
        cache.get(W)
        now = time.time_ns()
        for path in cache.dir.glob("objects/*/*.safetensors"):
            if path.stat().st_mtime > 1e9 + 100:
                os.utime(path, ns=(now, 10**9 * (10**9 + i)))
    kept = cache.get(weights[0])
    one = cache.size()[1] // 4
    assert cache.prune() == 0
    assert cache.prune(int(2.5 * one)) > 0
    assert cache.size()[0] == 2
    assert kept.U.sum().isfinite()  # still mapped
    assert cache.prune(0) > 0 and cache.size() == (0, 0)


def test_limit_is_kept_on_writing() -> None:
    probe = FactorCache()
    probe.get(torch.randn(13, 29))
    limit = int(2.5 * probe.size()[1])
    cache = FactorCache(max_bytes=limit)
    for _ in range(5):
        cache.get(torch.randn(13, 29))
    assert 0 < cache.size()[1] <= limit


def test_leftovers_of_killed_writers_are_pruned() -> None:
    cache = FactorCache()
    cache.get(torch.randn(13, 29))
    folder = only_object(cache).parent
    old, new = folder / "a.1.tmp", folder / "b.2.tmp"
    for path in (old, new):
        path.write_bytes(b"123")
    os.utime(old, (1, 1))
    assert cache.prune() == 3
    assert not old.exists() and new.exists()


def test_many_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"a.b": torch.randn(13, 29), "c": torch.randn(5, 4, 3, 3)}
    found = FactorCache().get_many(weights, rank=3, progress=True)
    assert list(found) == ["a.b", "c"] and all(f.rank == 3 for f in found.values())
    assert "factors" in capsys.readouterr().err
    with pytest.raises(SVDiffError, match=r"^c: .*NaN"):
        FactorCache().get_many({"c": torch.full((3, 3), float("nan"))})


def test_where_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_CACHE", str(tmp_path / "env"))
    assert FactorCache().dir == tmp_path / "env"
    assert FactorCache(tmp_path / "arg").dir == tmp_path / "arg"
    monkeypatch.delenv("SVDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert FactorCache().dir == tmp_path / "xdg" / "svdiff"
