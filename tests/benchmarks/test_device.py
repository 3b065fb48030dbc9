"""What differs on a GPU, against a torch.cuda that only writes down what it is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from svdiff.bench import BenchConfig, bench
from torch import nn

from benchmarks import baselines, device, runner
from svdiff_kernels import SVDiffError
from svdiff_kernels.nn import SpectralLinear


class FakeCuda:
    """A GPU that takes `milliseconds` for whatever lies between two events."""

    def __init__(self, milliseconds: float = 4.0) -> None:
        self.did: list[str] = []
        self.milliseconds = milliseconds

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            self.did.append(name)

        return call

    def is_available(self) -> bool:
        return True

    def get_device_name(self) -> str:
        return "NVIDIA Imaginary"

    def mem_get_info(self) -> tuple[int, int]:
        return 10**9, 8 * 10**9

    def max_memory_allocated(self) -> int:
        self.did.append("max_memory_allocated")
        return 123

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        return SimpleNamespace(record=lambda: self.did.append("record"), elapsed_time=lambda last: self.milliseconds)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [device.select(wanted) for wanted in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(SVDiffError, match="torch sees no GPU here"):
        device.select("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device.select(wanted) for wanted in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]


def test_calls_lie_between_events_and_the_gpu_is_waited_for(cuda: FakeCuda) -> None:
    taken = device.seconds("cuda", lambda: cuda.did.append("step"), 2)
    assert cuda.did == ["synchronize", "record", "step", "step", "record", "synchronize"]
    assert taken == pytest.approx(0.002)


def test_short_steps_run_often_in_a_timing(cuda: FakeCuda) -> None:
    assert device.calls_per_timing("cuda", lambda: None) == 3  # of 4 ms each, for 10 ms at least
    cuda.milliseconds = 1e-4
    assert device.calls_per_timing("cuda", lambda: None) == 1000
    assert device.calls_per_timing("cpu", lambda: None) == 1


def test_a_graph_is_captured_once_and_replayed(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []

    def capture(step: device.Step, calls: int) -> Any:
        captures.append(calls)
        step()
        return SimpleNamespace(replay=lambda: cuda.did.append("replay"))

    monkeypatch.setattr(device, "_capture", capture)
    cuda.milliseconds = 20.0
    timings = runner.interleave(
        {"ours": lambda: None, "rival": lambda: None}, 3, subject="s", device="cuda", graph=True
    )
    assert captures == [10, 10] and cuda.did.count("replay") == 2 * (1 + 1) + 3 * 3
    assert [t.name for t in timings] == ["ours", "rival", runner.CONTROL]
    assert all(t.p50 == pytest.approx(0.002) for t in timings)


def test_a_capture_comes_after_warm_up_and_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, order = MagicMock(), []
    graph = cuda.CUDAGraph.return_value
    graph.capture_begin.side_effect = lambda: order.append("begin")
    graph.capture_end.side_effect = lambda: order.append("end")
    graph.replay.side_effect = lambda: order.append("replay")
    cuda.stream.return_value.__exit__.return_value = None
    monkeypatch.setattr(torch, "cuda", cuda)
    step = device.graphed(lambda: order.append("step"), calls=2)
    step()
    step()
    assert order == [*["step"] * 3, "begin", "step", "step", "end", "replay", "replay"]
    assert cuda.stream.call_args_list == [((cuda.Stream.return_value,),)] * 2


def test_memory_is_what_tensors_take_from_then_on(cuda: FakeCuda) -> None:
    device.forget_peak()
    assert cuda.did == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert device.peak_bytes() == 123 and cuda.did[-2:] == ["synchronize", "max_memory_allocated"]


def test_lines_say_which_gpu(cuda: FakeCuda) -> None:
    on_gpu, on_cpu = runner.environment("cuda"), runner.environment("cpu")
    assert on_gpu["gpu"] == "NVIDIA Imaginary" and on_gpu["backend"] == "triton" and on_gpu["triton"]
    assert {"cuda", "driver", "cpu", "torch", "commit"} <= on_gpu.keys()
    assert on_cpu["gpu"] is None and on_cpu["backend"] in ("cpu", "reference")


def test_a_rival_that_cannot_run_keeps_its_line() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory\nand more")

    ours, control, failed = runner.interleave({"ours": lambda: None, "rival": fail}, 1, subject="s")
    assert (ours.name, control.name, failed.failure) == ("ours", runner.CONTROL, "out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.interleave({"ours": fail}, 1, subject="s")


@pytest.mark.parametrize("way", ["diag", "broadcast", "parametrize"])
def test_under_autocast_wide_factors_give_the_weight_in_the_models_type(way: baselines.Way) -> None:
    plain = nn.ModuleDict({"a": nn.Linear(12, 9)}).to(torch.bfloat16).requires_grad_(False)
    spectral = SpectralLinear.from_module(plain["a"])
    truth = plain["a"].weight.float()
    (shift,) = baselines.recompose(plain, {"a": spectral}, way, kept=torch.float32)
    recomposition = next(m for m in plain.modules() if isinstance(m, baselines.Recomposition))
    assert recomposition.U.dtype == recomposition.Vh.dtype == torch.float32
    weight = recomposition()
    assert weight.dtype == torch.bfloat16
    assert (weight.float() - truth).norm() < 0.02 * truth.norm()
    plain["a"](torch.randn(4, 12).to(torch.bfloat16)).sum().backward()
    assert shift.grad is not None and shift.grad.dtype == torch.float32


def test_wide_factors_are_kept_on_a_gpu_in_half_precision_alone() -> None:
    assert baselines.master(torch.bfloat16, "cuda") == torch.float32
    assert baselines.master(torch.float32, "cuda") is None and baselines.master(torch.bfloat16, "cpu") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"level": "op", "device": "cuda"}, "torch sees no GPU"), ({"level": "op", "graph": True}, "needs --device cuda")],
)
def test_what_needs_a_gpu_says_so(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SVDiffError, match=message):
        bench(BenchConfig(**settings))


@pytest.mark.parametrize("level", ["pipeline", "loop", "start", "attach", "levers"])
def test_levels_of_cpus_refuse_a_gpu(level: Any, cuda: FakeCuda) -> None:
    with pytest.raises(SVDiffError, match=f"bench {level} measures CPUs only"):
        bench(BenchConfig(level, device="cuda"))
