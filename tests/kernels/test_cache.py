"""FactorCache: found by content, whole or not at all, and the same whichever way it is stored."""

from __future__ import annotations

import fcntl
import os
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from filelock import FileLock
from numerics import SVD_ORTHONORMALITY, SVD_RECONSTRUCTION, relative
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdiff_kernels import FactorCache, Factors, SVDiffError, decompose, leases, objects, solvers
from svdiff_kernels import cache as cache_module
from svdiff_kernels.decompose import decomposed
from svdiff_kernels.leases import Lease, in_use, lease_of
from svdiff_kernels.objects import content_hash


def same(a: Factors, b: Factors) -> bool:
    return torch.equal(a.U, b.U) and torch.equal(a.sigma, b.sigma) and torch.equal(a.Vh, b.Vh)


def copied(f: Factors) -> Factors:
    """Not mapped from the file."""
    return Factors(f.U.clone(), f.sigma.clone(), f.Vh.clone())


def all_objects(cache: FactorCache) -> list[Path]:
    return sorted(cache.dir.glob("objects/*/*.safetensors"))


def only_object(cache: FactorCache) -> Path:
    (path,) = all_objects(cache)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def end_of_process() -> None:
    """As for the cache: nothing that was asked for so far is in use any more."""
    lease_of.cache_clear()


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that were really decomposed."""
    done: list[torch.Size] = []

    def counted(weights: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        done.extend(W.shape for W in weights)
        return decomposed(weights, *args, **kwargs)

    monkeypatch.setattr(cache_module, "decomposed", counted)
    return done


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_hash_is_of_shape_and_fp32_values() -> None:
    W = torch.randn(7, 30).half()
    assert content_hash(W) == content_hash(W.float()) == content_hash(W.T.contiguous().T)
    assert content_hash(W) != content_hash(W.view(7, 5, 3, 2))
    assert content_hash(W) != content_hash(W + 1)
    large = torch.randn(1500, 1500)  # hashed in pieces where it is to be converted, and by several threads
    assert content_hash(large) == content_hash(large.double())
    assert content_hash(large) == blake3(b"(1500, 1500)" + large.numpy().tobytes()).hexdigest()
    # Written down so that no change of the code changes it unseen: adapters carry these hashes.
    hashed = content_hash(torch.arange(6.0).view(2, 3))
    assert hashed == blake3(b"(2, 3)" + struct.pack("<6f", *range(6))).hexdigest()
    assert hashed.startswith("fecd14a2f33f8f44")


def test_second_time_is_read(decompositions: list[torch.Size]) -> None:
    W = torch.randn(13, 29)
    first = FactorCache().get(W)
    second = FactorCache().get(W.double())
    assert same(first, second) and same(first, decompose(W))
    assert len(decompositions) == 1
    assert second.U.dtype == torch.float32
    exact = torch.randn(13, 29, dtype=torch.float64)  # whoever is first, what was hashed is decomposed
    assert same(FactorCache().get(exact), decompose(exact.float()))


def test_rank_is_part_of_the_key(decompositions: list[torch.Size]) -> None:
    cache, W = FactorCache(), torch.randn(13, 29)
    assert same(cache.get(W, 4), decompose(W, 4))
    assert cache.get(W).rank == 13
    assert cache.get(W, 13).rank == cache.get(W, 99).rank == 13  # the full one
    assert len(decompositions) == 2 and cache.size()[0] == 2


def test_objects_say_what_they_are() -> None:
    cache, W = FactorCache(layout="full"), torch.randn(13, 5, 3, 1)
    cache.get(W, 4)
    path = only_object(cache)
    assert path.parent.name == path.stem[:2]
    metadata = metadata_of(path)
    assert len(metadata.pop("checksum")) == 64
    assert metadata == {
        "format": "svdiff-factors",
        "format_version": str(objects.FORMAT_VERSION),
        "algorithm_version": str(cache_module.ALGORITHM_VERSION),
        "layout": "full",
        "rebuilt": "0",
        "content": content_hash(W),
        "shape": "[13, 15]",
        "rank": "4",
        "dtype": "float32",
    }
    assert torch.equal(objects.read_sigma(path), decompose(W, 4).sigma)
    assert cache.size() == (1, path.stat().st_size)


def test_full_factors_are_mapped_not_read() -> None:
    cache, W = FactorCache(layout="full"), torch.randn(130, 290)
    factors = cache.get(W)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if only_object(cache).name in line]
    assert mapped and factors.U.is_contiguous()


def spectrum(M: int, N: int, sigma: Tensor) -> Tensor:
    U, V = (torch.linalg.qr(torch.randn(n, len(sigma), dtype=torch.float64)).Q for n in (M, N))
    return ((U * sigma) @ V.T).float()


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "wide": lambda: torch.randn(130, 470),
    "tall": lambda: torch.randn(470, 130),
    "square": lambda: torch.randn(150, 150),
    "power law": lambda: spectrum(120, 233, torch.arange(1, 121, dtype=torch.float64) ** -1.5),
    "tall power law": lambda: spectrum(233, 120, torch.arange(1, 121, dtype=torch.float64) ** -0.5),
    "graded": lambda: spectrum(90, 110, torch.logspace(0, -8, 90, dtype=torch.float64)),
    "orthogonal": lambda: spectrum(64, 64, torch.ones(64, dtype=torch.float64)),
    "rank 7": lambda: spectrum(53, 29, torch.rand(7, dtype=torch.float64) + 1),
    "ones": lambda: torch.ones(13, 7),
    "zero": lambda: torch.zeros(5, 8),
    "conv": lambda: torch.randn(24, 17, 3, 3),
    "row": lambda: torch.randn(1, 9),
    "column": lambda: torch.randn(9, 1),
}


def assert_right(W: Tensor, f: Factors, exact: Factors) -> None:
    """Orthonormal and of the weight's values, and but for rounding those that were decomposed."""
    U, sigma, Vh, eye = f.U.double(), f.sigma.double(), f.Vh.double(), torch.eye(f.rank, dtype=torch.float64)
    assert f.U.is_contiguous() and f.Vh.is_contiguous()
    assert (U.T @ U - eye).abs().max() <= SVD_ORTHONORMALITY
    assert (Vh @ Vh.T - eye).abs().max() <= SVD_ORTHONORMALITY
    assert torch.equal(f.sigma, exact.sigma)
    assert max(relative(f.U, exact.U), relative(f.Vh, exact.Vh)) <= SVD_RECONSTRUCTION
    if f.rank == min(f.shape):
        assert relative((U * sigma) @ Vh, W.flatten(1)) <= SVD_RECONSTRUCTION


@pytest.mark.parametrize("rank", [None, 2, 9])
@pytest.mark.parametrize("case", WEIGHTS)
def test_compact_objects_give_the_same_factors(case: str, rank: int | None, decompositions: list[torch.Size]) -> None:
    W, cache = WEIGHTS[case](), FactorCache(layout="compact")
    exact = decompose(W, rank)
    first = cache.get(W, rank)
    assert_right(W, first, exact)
    assert same(cache.get(W.clone(), rank), first)
    assert len(decompositions) == 1

    M, N = exact.shape
    rebuilt = int(metadata_of(only_object(cache))["rebuilt"])
    assert rebuilt == solvers.rows_by_product(exact.sigma, min(M, N))
    assert torch.equal(first.U, exact.U) if M <= N else torch.equal(first.Vh, exact.Vh)
    if M <= N:
        assert torch.equal(first.Vh[rebuilt:], exact.Vh[rebuilt:])
    else:
        assert torch.equal(first.U[:, rebuilt:], exact.U[:, rebuilt:])


@pytest.mark.parametrize(("shape", "share"), [((130, 640), 1.02), ((640, 130), 1.02), ((192, 192), 1.1)])
def test_compact_objects_are_little_more_than_the_square_factor(shape: tuple[int, int], share: float) -> None:
    cache, W = FactorCache(layout="compact"), torch.randn(shape)
    cache.get(W)
    m = min(shape)
    header = 4 * m + 1000
    assert 4 * m * m < cache.size()[1] <= share * 4 * m * m + header
    assert metadata_of(only_object(cache))["layout"] == "compact"


def test_rows_of_small_singular_values_are_stored() -> None:
    cache, W = FactorCache(layout="compact"), WEIGHTS["graded"]()
    cache.get(W)
    with safe_open(only_object(cache), framework="pt") as file:
        stored = file.get_slice("Vh").get_shape()
    rebuilt = int(metadata_of(only_object(cache))["rebuilt"])
    assert 0 < rebuilt < 40 and stored == [90 - rebuilt, 110]


@pytest.mark.parametrize(("written", "read"), [("full", "compact"), ("compact", "full")])
def test_each_layout_is_read_whatever_the_cache_writes(
    written: str, read: str, decompositions: list[torch.Size]
) -> None:
    W = torch.randn(130, 290)
    first = FactorCache(layout=written).get(W)
    before = only_object(FactorCache()).read_bytes()
    assert same(FactorCache(layout=read).get(W), first)
    assert len(decompositions) == 1 and only_object(FactorCache()).read_bytes() == before


@pytest.mark.parametrize(("gpu", "layout"), [(True, "compact"), (False, "full")])
def test_layout_follows_the_machine(gpu: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    FactorCache().get(torch.randn(13, 29))
    assert metadata_of(only_object(FactorCache()))["layout"] == layout


@pytest.mark.parametrize("layout", objects.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_on_disk(dtype: torch.dtype, layout: str, decompositions: list[torch.Size]) -> None:
    W, name = torch.randn(130, 290), str(dtype).removeprefix("torch.")
    exact = decompose(W)
    cache = FactorCache(layout=layout, dtype=name)
    for factors in (cache.get(W), cache.get(W)):
        assert factors.U.dtype == factors.Vh.dtype == dtype
        assert torch.equal(factors.sigma, exact.sigma)
        assert torch.equal(factors.U, exact.U.to(dtype))
        eps = torch.finfo(dtype).eps
        assert relative(factors.Vh, exact.Vh) <= (eps / 2 if layout == "full" else 2 * eps)
        assert relative((factors.U.double() * factors.sigma) @ factors.Vh.double(), W) <= 2 * eps
    assert len(decompositions) == 1
    assert same(FactorCache(layout="full").get(W), exact)  # an object of its own
    assert len(decompositions) == 2 and cache.size()[0] == 2


def test_bad_choices_are_refused() -> None:
    with pytest.raises(SVDiffError, match="cache layout 'small' is not one of full, compact"):
        FactorCache(layout="small")
    with pytest.raises(SVDiffError, match="cache dtype 'float64' is not one of float32, bfloat16, float16"):
        FactorCache(dtype="float64")


def test_settings_do_not_change_what_is_read() -> None:
    cache, W = FactorCache(layout="compact"), torch.randn(130, 290)
    expected = cache.get(W)
    assert int(metadata_of(only_object(cache))["rebuilt"]) == 130
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(cache.get(W), expected)
    torch.set_float32_matmul_precision("medium")
    try:
        assert same(cache.get(W), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert same(cache.get(torch.nn.Parameter(W)), expected)
    assert same(cache.get(W.double()), expected)


def test_of_a_fine_tune_only_what_changed_is_computed(decompositions: list[torch.Size]) -> None:
    base = {f"layer {i}": torch.randn(20 + i, 31) for i in range(20)}
    FactorCache().get_many(base)
    decompositions.clear()
    tuned = {f"unet.{name}": W.clone() for name, W in base.items()}
    for i in (3, 11, 19):
        tuned[f"unet.layer {i}"] += 0.01
    found = FactorCache().get_many(tuned)
    assert sorted(decompositions) == [(23, 31), (31, 31), (39, 31)]
    assert all(same(found[name], decompose(W)) for name, W in tuned.items())
    assert FactorCache().size()[0] == 23


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[len(content) // 2] ^= 4
    elif how == "last bit":
        content[-1] ^= 128
    elif how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "garbage":
        content = bytearray(b"\xff" * len(content))
    elif how == "header":
        content[12] ^= 1
    elif how == "metadata":
        metadata = metadata_of(path)
        save_file(load_file(path), path, metadata | {"rebuilt": str(int(metadata["rebuilt"]) + 1)})
        return
    elif how == "other version":
        save_file(load_file(path), path, metadata_of(path) | {"format_version": "1"})
        return
    else:
        save_file(load_file(path), path, {"format": "something else"})
        return
    path.write_bytes(bytes(content))


WAYS = ["flipped bit", "last bit", "truncated", "empty", "garbage", "header", "metadata", "other version", "other"]


@pytest.mark.parametrize("layout", objects.LAYOUTS)
@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_object_is_made_again(how: str, layout: str, decompositions: list[torch.Size]) -> None:
    cache, W = FactorCache(layout=layout), torch.randn(13, 29)
    expected = copied(cache.get(W))
    cache.get(torch.randn(5, 6))
    (path,) = (path for path in all_objects(cache) if metadata_of(path)["content"] == content_hash(W))
    damage(path, how)
    assert list(cache.verify()) == [path]
    with pytest.warns(UserWarning, match=f"{path} is damaged .* made again") as caught:
        assert same(cache.get(W), expected)
    assert len(caught) == 1
    assert len(decompositions) == 3
    assert cache.verify() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cache.get(W), expected)
    assert len(decompositions) == 3


@pytest.mark.parametrize("layout", objects.LAYOUTS)
def test_no_flipped_bit_goes_unseen(layout: str, tmp_path: Path) -> None:
    W, path = spectrum(3, 5, torch.tensor([1.0, 0.7, 0.01]).double()), tmp_path / "object"
    objects.write(path, decompose(W), content="c", rank="full", layout=layout, dtype=torch.float32)
    content = path.read_bytes()
    for i in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(bytes(flipped))
        with pytest.raises(cache_module._DAMAGED):
            objects.read(path, W)


@pytest.mark.parametrize("where", ["file/below", "file"])
def test_an_unwritable_directory_costs_one_warning(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    cache, weights = FactorCache(tmp_path / where), {f"{i}": torch.randn(13, 29 + i) for i in range(3)}
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        found = cache.get_many(weights)
    assert len(caught) == 1
    assert all(same(found[name], decompose(W)) for name, W in weights.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cache.get(weights["0"]), decompose(weights["0"]))


def test_a_full_disk_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def full(_: object, path: Path, *__: object) -> None:
        attempts.append(path.write_bytes(b"half of it"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects, "save_file", full)
    cache, weights = FactorCache(), {f"{i}": torch.randn(13 + i % 2, 29 + i) for i in range(5)}
    with pytest.warns(UserWarning, match="No space left") as caught:
        found = cache.get_many(weights)
    assert len(caught) == len(attempts) == 1
    assert all(same(found[name], decompose(W)) for name, W in weights.items())
    assert [p for p in cache.dir.rglob("*") if p.is_file() and p.parent.name != "readers"] == []


def test_where_no_lock_can_be_made_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache, weights = FactorCache(), {f"{i}": torch.randn(13 + i % 2, 29 + i) for i in range(5)}
    monkeypatch.setattr(FileLock, "_acquire", fails)
    with pytest.warns(UserWarning, match="No space left") as caught:
        found = cache.get_many(weights)
    assert len(caught) == 1
    assert all(same(found[name], decompose(W)) for name, W in weights.items())
    assert cache.size() == (0, 0)


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    cache, weights = FactorCache(), {f"{i}": torch.randn(13, 29 + i) for i in range(3)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flock not supported")  # filelock's, which then locks in another way
        found = cache.get_many(weights)
        assert all(same(found[name], cache.get(W)) for name, W in weights.items())
        assert cache.size()[0] == 3 and cache.verify() == {}
        assert [p for name in ("work", "readers") for p in (cache.dir / name).glob("*")] == []
        assert cache.prune(0) > 0


def test_damage_in_a_read_only_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, W = FactorCache(), torch.randn(13, 29)
    expected = copied(cache.get(W))
    damage(only_object(cache), "flipped bit")
    monkeypatch.setattr(FactorCache, "_prepare", lambda _: False)
    with pytest.warns(UserWarning, match="is damaged"):
        assert same(cache.get(W), expected)


def test_hits_in_a_read_only_cache(monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    weights = {f"{i}": torch.randn(13, 29 + i) for i in range(3)}
    expected = FactorCache().get_many(weights)
    end_of_process()
    really_open = os.open

    def read_only(*_: object, **__: object) -> Any:
        raise OSError(30, "Read-only file system")

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        return read_only() if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else really_open(path, flags)

    monkeypatch.setattr(os, "open", opened)
    for place, name in [(os, "mkdir"), (os, "utime"), (os, "unlink"), (os, "rename"), (os, "replace")]:
        monkeypatch.setattr(place, name, read_only)
    monkeypatch.setattr(FactorCache, "_prepare", read_only)
    cache = FactorCache()
    assert all(same(found, expected[name]) for name, found in cache.get_many(weights).items())
    assert cache.verify() == {} and cache.size()[0] == 3


def test_other_versions_are_other_objects(monkeypatch: pytest.MonkeyPatch, decompositions: list[torch.Size]) -> None:
    cache, W = FactorCache(), torch.randn(13, 29)
    cache.get(W)
    path = only_object(cache)
    before = path.read_bytes(), path.stat().st_mtime_ns
    for module, name in [(objects, "FORMAT_VERSION"), (cache_module, "ALGORITHM_VERSION")]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, getattr(module, name) + 1)
            decompositions.clear()
            assert same(FactorCache().get(W), decompose(W))
            assert len(decompositions) == 1
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert cache.size()[0] == 3


def test_an_object_of_another_version_is_not_misread(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, W = FactorCache(), torch.randn(13, 29)
    wanted = cache.wanted({"a": W})["a"]
    other = FactorCache(cache.dir / "other")
    with monkeypatch.context() as patch:
        patch.setattr(objects, "FORMAT_VERSION", 3)
        other.get(W + 1)
    wanted.path.parent.mkdir(parents=True)
    only_object(other).rename(wanted.path)
    assert "format version 2" in cache.verify()[wanted.path]
    with pytest.warns(UserWarning, match="damaged .not a factor object of format version 2"):
        assert same(cache.get(W), decompose(W))
    assert metadata_of(wanted.path)["format_version"] == "2"


def test_prune_forgets_what_was_used_longest_ago(quiet: None) -> None:
    cache = FactorCache(layout="full")
    weights = [torch.randn(13, 29) for _ in range(4)]
    paths = [wanted.path for wanted in cache.wanted({f"{i}": W for i, W in enumerate(weights)}).values()]
    for W in weights:
        cache.get(W)
    for age, path in enumerate(paths):  # made in this order, long ago
        os.utime(path, ns=(0, 10**9 * (10**9 + age)))
    end_of_process()
    kept = cache.get(weights[0])  # and used now
    end_of_process()
    one = paths[0].stat().st_size
    assert cache.prune() == 0  # no limit
    assert cache.prune(int(2.5 * one)) == 2 * one
    assert [path.exists() for path in paths] == [True, False, False, True]
    assert kept.U.sum().isfinite()  # still mapped
    assert FactorCache(max_bytes=one).prune() == one
    assert [path.exists() for path in paths] == [True, False, False, False]
    assert cache.prune(0) == one and cache.size() == (0, 0)


def test_prune_spares_what_this_process_uses() -> None:
    cache, used, unused = FactorCache(), torch.randn(13, 29), torch.randn(13, 29)
    cache.get(unused)
    end_of_process()
    cache.get(used)
    assert cache.prune(0) == cache.size()[1] > 0
    assert same(cache.get(used), decompose(used)) and cache.size()[0] == 1
    assert cache.prune(0) == 0
    end_of_process()
    assert cache.prune(0) > 0
    assert list((cache.dir / "readers").glob("*")) == []


@pytest.mark.parametrize("many", [False, True], ids=["get", "get_many"])
def test_limit_is_kept_on_writing(many: bool) -> None:
    probe = FactorCache()
    probe.get(torch.randn(13, 29))
    limit = int(2.5 * probe.size()[1])
    cache = FactorCache(max_bytes=limit)
    for _ in range(5):
        end_of_process()
        W = torch.randn(13, 29)
        assert same(cache.get_many({"a": W})["a"] if many else cache.get(W), decompose(W))
        assert cache.size()[1] <= limit
    assert cache.size()[0] == 2


def test_a_lease_that_was_taken_for_one_left_behind_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, attempts = fcntl.flock, []

    def slowly(file: Any, how: int) -> None:
        if how & fcntl.LOCK_EX and not attempts:
            attempts.append(file)
            assert in_use(tmp_path) == set()  # another process comes by before the file is locked
        flock(file, how)

    monkeypatch.setattr(leases.fcntl, "flock", slowly)
    lease = Lease(tmp_path)
    lease.add("a")
    lease.add("b")
    assert attempts and in_use(tmp_path) == {"a", "b"}
    assert len(list(tmp_path.iterdir())) == 1
    del lease
    assert in_use(tmp_path) == set() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sweep", [FactorCache.prune, lambda cache: cache.get(torch.randn(5, 7))], ids=["prune", "get"])
def test_leftovers_of_killed_processes_go(sweep: Callable[[FactorCache], Any]) -> None:
    cache = FactorCache()
    cache.get(torch.randn(13, 29))
    work, readers = cache.dir / "work", cache.dir / "readers"
    for name in ("a.partial", "c.partial", "held.partial"):
        (work / name / "sub").mkdir(parents=True)
        (work / name / "sub" / ".any").write_bytes(b"123")
    for name in ("a.lock", "b.lock"):
        (work / name).touch()
    (readers / "1-dead").write_text("a\n")
    with FileLock(work / "held.lock"):  # by a process that is at it
        sweep(cache)
        assert sorted(path.name for path in work.iterdir()) == ["held.lock", "held.partial"]
    assert not (readers / "1-dead").exists() and len(list(readers.iterdir())) == 1
    assert cache.prune() == 3
    assert list(work.iterdir()) == []


def test_scratch_stays_while_it_is_used() -> None:
    cache = FactorCache()
    with cache.scratch() as folder:
        (folder / "any").write_bytes(b"123")
        assert cache.prune() == 0 and FactorCache().prune() == 0
        assert (folder / "any").exists()
    assert list((cache.dir / "work").iterdir()) == []


def test_objects_may_vanish_while_they_are_looked_at(monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    cache = FactorCache()
    gone = cache.dir / "objects" / "ab" / "abc.safetensors"
    monkeypatch.setattr(FactorCache, "_objects", lambda self: iter([gone]))
    assert cache.size() == (0, 0) and cache.verify() == {} and cache.prune(0) == 0


@pytest.mark.parametrize("layout", objects.LAYOUTS)
def test_add(layout: str, tmp_path: Path, decompositions: list[torch.Size], quiet: None) -> None:
    source, cache, W = FactorCache(tmp_path / "source", layout=layout), FactorCache(), torch.randn(13, 29)
    expected = source.get(W)
    wanted = cache.wanted({"a": W})["a"]
    assert (wanted.name, wanted.rank, wanted.content) == ("a", None, content_hash(W))
    assert cache.add(only_object(source), wanted)
    assert wanted.path.read_bytes() == only_object(source).read_bytes()
    assert not cache.add(only_object(source), wanted)
    assert same(cache.get(W), expected) and len(decompositions) == 1
    assert list((cache.dir / "work").iterdir()) == []


def test_add_refuses_what_is_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache, W = FactorCache(tmp_path / "source"), FactorCache(), torch.randn(13, 29)
    source.get(W)
    path = only_object(source)
    half = FactorCache(dtype="float16")
    for receiver, asked, rank, what in [
        (cache, W + 1, None, "content .*, not "),
        (cache, W, 4, "rank full, not 4"),
        (half, W, None, "dtype float32, not float16"),
    ]:
        with pytest.raises(SVDiffError, match=rf"is not the decomposition of b that is wanted: {what}"):
            receiver.add(path, receiver.wanted({"b": asked}, rank)["b"])
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "ALGORITHM_VERSION", 99)
        with pytest.raises(SVDiffError, match="algorithm_version 2, not 99"):
            cache.add(path, cache.wanted({"b": W})["b"])
    damage(path, "last bit")
    with pytest.raises(SVDiffError, match=f"{path} is damaged: its checksum does not match"):
        cache.add(path, cache.wanted({"b": W})["b"])
    with pytest.raises(SVDiffError, match="is damaged"):
        cache.add(tmp_path / "missing", cache.wanted({"b": W})["b"])
    assert cache.size() == (0, 0)


def test_add_where_nothing_can_be_written(tmp_path: Path) -> None:
    source, W = FactorCache(tmp_path / "source"), torch.randn(13, 29)
    source.get(W)
    (tmp_path / "file").touch()
    cache = FactorCache(tmp_path / "file")
    with pytest.raises(SVDiffError, match="cannot be written"), pytest.warns(UserWarning, match="cannot be written"):
        cache.add(only_object(source), cache.wanted({"a": W})["a"])


def test_many_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"a.b": torch.randn(13, 29), "c": torch.randn(5, 4, 3, 3), "d": torch.randn(29, 13)}
    FactorCache().get(weights["d"], 3)  # so that it comes first
    found = FactorCache().get_many(weights, rank=3, progress=True)
    assert list(found) == ["a.b", "c", "d"]
    assert all(same(f, decompose(weights[name], 3)) for name, f in found.items())
    assert "factors: 100%" in capsys.readouterr().err
    assert [name for name, _ in FactorCache().iterate(weights, 3)] == list(weights)
    assert FactorCache().get_many({}) == {}


@pytest.mark.parametrize("ready", [False, True], ids=["missing", "there"])
def test_errors_name_the_weight(ready: bool) -> None:
    good = {"a": torch.randn(3, 3), "b": torch.randn(4, 5)}
    if ready:
        FactorCache().get_many(good)
    for bad, message in [
        (torch.full((3, 3), float("nan")), "NaN"),
        (torch.randn(0, 3), "empty"),
        (torch.randn(3), "matrix"),
        (torch.ones(3, 3, dtype=torch.int8), "int8"),
        (torch.ones(3, 3, device="meta"), "meta"),
    ]:
        with pytest.raises(SVDiffError, match=rf"^unet\.c: .*{message}") as error:
            FactorCache().get_many(good | {"unet.c": bad})
        assert "\n" not in str(error.value)
    with pytest.raises(SVDiffError, match="rank must be at least 1, not 0"):
        FactorCache().get_many(good, 0)
    assert list((FactorCache().dir / "work").glob("*")) == []


def test_equal_weights_are_computed_once(decompositions: list[torch.Size], quiet: None) -> None:
    W = torch.randn(13, 29)
    weights = {"a": W, "b": torch.randn(13, 29), "c": W.clone(), "d": W.half().float(), "e": W.half()}
    found = FactorCache().get_many(weights)
    assert list(found) == list(weights)
    assert len(decompositions) == 3 and FactorCache().size()[0] == 3
    assert all(same(f, decompose(weights[name])) for name, f in found.items())


def test_what_was_hashed_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.randn(13, 29), "b": torch.randn(5, 4)}
    contents = {name: content_hash(W) for name, W in weights.items()}
    expected = FactorCache().get_many(weights)
    monkeypatch.setattr(cache_module, "content_hash", None)
    for name, factors in FactorCache().iterate(weights, contents=contents):
        assert same(factors, expected[name])
    assert same(FactorCache().get(weights["a"], content=contents["a"]), expected["a"])


def test_a_hit_leaves_the_time_of_use(quiet: None) -> None:
    cache, W = FactorCache(), torch.randn(13, 29)
    cache.get(W)
    before = only_object(cache).stat().st_mtime_ns
    time.sleep(0.02)
    cache.get(W)
    assert only_object(cache).stat().st_mtime_ns > before  # the time of use


def test_where_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_CACHE", str(tmp_path / "env"))
    assert FactorCache().dir == tmp_path / "env"
    assert FactorCache(tmp_path / "arg").dir == tmp_path / "arg"
    monkeypatch.delenv("SVDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert FactorCache().dir == tmp_path / "xdg" / "svdiff"
