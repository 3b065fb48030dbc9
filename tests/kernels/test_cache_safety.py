"""FactorCache between processes: killed, at once, short of disk, pruning what others use."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from processes import Signal, alone, ended, exit_code, fork, killed, run_alone
from torch import Tensor

from svdiff_kernels import FactorCache, Factors, decompose, objects
from svdiff_kernels import cache as cache_module
from svdiff_kernels.decompose import decomposed
from svdiff_kernels.objects import content_hash


def model() -> dict[str, Tensor]:
    """Weights of which two are equal; some are worth compacting, and some have rows that are stored."""
    torch.manual_seed(0)
    sizes = [(60 + 12 * (i % 5), 60 + 17 * (i % 7)) for i in range(18)]
    weights = {f"layer {i}": torch.randn(size) for i, size in enumerate(sizes)}
    weights["conv"] = torch.randn(40, 15, 3, 3)
    weights["rank 1"] = torch.ones(70, 90)
    return weights | {"again": weights["layer 3"].clone()}


DISTINCT = 20


def same(a: Factors, b: Factors, *, tolerance: float = 0) -> bool:
    pairs = zip((a.U, a.sigma, a.Vh), (b.U, b.sigma, b.Vh), strict=True)
    return all((x - y).abs().max() <= tolerance for x, y in pairs)


def all_same(found: dict[str, Factors], expected: dict[str, Factors]) -> bool:
    # A factor that was rebuilt is rounded in another order than the one that was decomposed.
    return list(found) == list(expected) and all(same(found[name], expected[name], tolerance=2e-6) for name in expected)


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


@contextmanager
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def count_computations(file: Path) -> None:
    """Have this process note in a file what it decomposes."""

    def counted(weights: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        with file.open("a") as lines:
            lines.write("".join(f"{content_hash(W)}\n" for W in weights))
        return decomposed(weights, *args, **kwargs)

    cache_module.decomposed = counted


@alone
def test_two_hundred_kills_leave_nothing_wrong(tmp_path: Path) -> None:
    weights, folder, chance = model(), tmp_path / "shared", random.Random(0)
    expected = {name: decompose(W) for name, W in weights.items()}

    window, unfinished, locks, partials = 0.3, 0, 0, 0
    for _ in range(100):
        builders = [
            fork(lambda layout=layout: FactorCache(folder, layout=layout).get_many(weights))
            for layout in objects.LAYOUTS
        ]
        time.sleep(chance.uniform(0, window))
        assert all(killed(process) in (0, -signal.SIGKILL) for process in builders)
        locks += bool(names(folder, "work/*.lock"))
        partials += bool(names(folder, "work/*.partial"))
        if len(names(folder, "objects/*/*")) < DISTINCT:
            unfinished += 1
            window *= 1.1
        else:
            window *= 0.9
        for path in folder.glob("objects/*/*"):
            if chance.random() < 0.5:
                path.unlink()
    # Or the kills came before or after what they were meant to hit.
    assert unfinished > 25 and locks > 25 and partials > 2, (unfinished, locks, partials)

    warnings.simplefilter("error")  # an object that is damaged would be one
    cache = FactorCache(folder)
    assert all_same(cache.get_many(weights), expected)
    assert all_same(cache.get_many(weights), expected)
    assert cache.size()[0] == DISTINCT and cache.verify() == {}
    assert len(names(folder, "objects/*/*")) == DISTINCT
    assert names(folder, "work/*") == []
    assert [name.split("-")[0] for name in names(folder, "readers/*")] == [str(os.getpid())]


@alone
def test_eight_at_once_compute_each_weight_once(tmp_path: Path) -> None:
    weights = model()
    expected = {name: decompose(W) for name, W in weights.items()}
    for layout in objects.LAYOUTS:
        folder, computed, begin = tmp_path / layout, tmp_path / f"{layout} computed", Signal()

        def build(folder: Path = folder, layout: str = layout, file: Path = computed, begin: Signal = begin) -> None:
            count_computations(file)
            begin.wait()
            assert all_same(FactorCache(folder, layout=layout).get_many(weights), expected)

        builders = [fork(build) for _ in range(8)]
        begin.give()
        assert [ended(process) for process in builders] == [0] * 8
        contents = computed.read_text().split()
        assert len(contents) == len(set(contents)) == DISTINCT
        assert FactorCache(folder).size()[0] == DISTINCT and FactorCache(folder).verify() == {}
        assert names(folder, "work/*") == []


@alone
def test_who_waits_for_one_that_is_killed_does_its_work(tmp_path: Path) -> None:
    W, folder, begun = torch.randn(60, 90), tmp_path / "shared", Signal()

    def hang() -> None:
        def at_it(*_: Any, **__: Any) -> None:
            begun.give()
            time.sleep(100)

        cache_module.decomposed = at_it
        FactorCache(folder).get(W)

    def wait() -> None:
        assert same(FactorCache(folder).get(W), decompose(W))

    first = fork(hang)
    begun.wait()
    second = fork(wait)
    time.sleep(0.3)
    assert os.waitpid(second, os.WNOHANG) == (0, 0)  # it waits
    assert killed(first) == -signal.SIGKILL
    assert ended(second) == 0
    assert names(folder, "work/*") == [] and len(names(folder, "objects/*/*")) == 1


@alone
def test_a_disk_that_is_full_half_way_costs_one_warning(tmp_path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails, as on a full disk
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = model()
    expected = {name: decompose(W) for name, W in weights.items()}
    for layout in objects.LAYOUTS:
        folder = tmp_path / layout
        cache = FactorCache(folder, layout=layout)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
        with recorded() as caught:
            assert all_same(cache.get_many(weights), expected)
        assert len(caught) == 1 and "cannot be written" in str(caught[0].message), caught
        with recorded() as caught:
            assert all_same(cache.get_many(weights), expected)
        assert caught == []
        assert names(folder, "work/*") == [] and cache.size() == (0, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert all_same(FactorCache(folder, layout=layout).get_many(weights), expected)
        assert cache.size()[0] == DISTINCT and cache.verify() == {}


@alone
def test_where_nothing_can_be_written_hits_are_served(tmp_path: Path) -> None:
    weights, folder = model(), tmp_path / "shared"
    expected = {name: decompose(W) for name, W in weights.items()}
    assert ended(fork(lambda: FactorCache(folder).get_many(weights))) == 0
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    cache = FactorCache(folder)
    with recorded() as caught:
        assert all_same(cache.get_many(weights), expected)
        assert cache.verify() == {}
    assert caught == []
    with recorded() as caught:
        for i in range(3):
            assert same(cache.get(torch.ones(3, 4 + i)), decompose(torch.ones(3, 4 + i)))
    assert len(caught) == 1 and "cannot be written" in str(caught[0].message)
    assert cache.size()[0] == DISTINCT and names(folder, "work/*") == []


@alone
def test_prune_spares_what_living_processes_use(tmp_path: Path) -> None:
    weights, folder, mapped = model(), tmp_path / "shared", Signal()
    used = {name: weights[name] for name in ("layer 1", "conv")}
    mine = {"layer 2": weights["layer 2"]}
    cache = FactorCache(folder, layout="full")
    paths = {name: wanted.path for name, wanted in cache.wanted(weights).items()}

    def use() -> None:
        found = FactorCache(folder).get_many(used)
        mapped.give()
        signal.pause()
        del found

    assert ended(fork(lambda: cache.get_many(weights))) == 0
    cache.get_many(mine)  # the lease that the next process does not take over from this one
    user = fork(use)
    mapped.wait()

    def spared() -> set[str]:
        return {name for name, path in paths.items() if path.exists()}

    assert ended(fork(lambda: FactorCache(folder).prune(0))) == 0
    assert spared() == {*used, *mine}
    assert cache.prune(0) == 0 and spared() == {*used, *mine}
    assert killed(user) == -signal.SIGKILL
    assert cache.prune(0) > 0 and spared() == {*mine}
    assert len(names(folder, "readers/*")) == 1


@alone
def test_the_limit_holds_for_one_process_after_another(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    assert ended(fork(lambda: FactorCache(folder).get(torch.ones(30, 40)))) == 0
    limit = int(3.5 * FactorCache(folder).size()[1])
    for i in range(8):
        assert ended(fork(lambda i=i: FactorCache(folder, limit).get(torch.full((30, 40), 2.0 + i)))) == 0
        assert FactorCache(folder).size()[1] <= limit
    kept = FactorCache(folder).wanted({f"{i}": torch.full((30, 40), 2.0 + i) for i in range(8)})
    assert [name for name, wanted in kept.items() if wanted.path.exists()] == ["5", "6", "7"]


@alone
def test_processes_prune_at_once(tmp_path: Path) -> None:
    weights, folder, begin = model(), tmp_path / "shared", Signal()
    assert ended(fork(lambda: FactorCache(folder).get_many(weights))) == 0

    def churn(seed: int) -> None:
        begin.wait()
        for i in range(15):
            cache = FactorCache(folder, max_bytes=20_000)
            W = torch.full((20, 30), 1.0 + i % 4 + seed % 2)
            assert same(cache.get(W), decompose(W))
            cache.prune(0)
            cache.size()
            cache.verify()

    processes = [fork(lambda seed=seed: churn(seed)) for seed in range(4)]
    begin.give()
    assert [ended(process) for process in processes] == [0] * 4
    assert FactorCache(folder).prune(0) >= 0 and FactorCache(folder).size() == (0, 0)
    assert names(folder, "work/*") == names(folder, "readers/*") == []


@alone
def test_an_object_is_whole_from_the_moment_it_is_there(tmp_path: Path) -> None:
    W, source, cache = torch.randn(300, 3000), FactorCache(tmp_path / "source", layout="full"), FactorCache(tmp_path)
    source.get(W)
    (origin,) = source.dir.glob("objects/*/*")
    wanted = cache.wanted({"a": W})["a"]

    def write() -> None:
        for _ in range(100):
            assert cache.add(origin, wanted)
            wanted.path.unlink()

    writer, seen = fork(write), 0
    while os.waitid(os.P_PID, writer, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with suppress(FileNotFoundError):
            objects.check(wanted.path)
            seen += 1
    assert ended(writer) == 0 and seen > 5, seen


@alone
def test_a_forked_process_can_hash(tmp_path: Path) -> None:
    W = torch.randn(1000, 1000)
    content = content_hash(W)  # by threads that the child does not have

    def hash_again() -> None:
        assert content_hash(W) == content

    assert exit_code(fork(hash_again), seconds=20) == 0


if __name__ == "__main__":
    run_alone()
