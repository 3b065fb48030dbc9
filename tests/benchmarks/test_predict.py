"""Predictions agree with the counts they are made of, and with what must hold on any chip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost, predict, registry, remainder, runner
from benchmarks.predict import CHIPS, Kernel, Prediction
from benchmarks.registry import Layer

COMMITTED = Path(predict.__file__).parent / "results" / "predicted.jsonl"
Step = tuple[str, str, int, str]


@pytest.fixture(scope="module")
def lines() -> tuple[Prediction, ...]:
    return predict.predictions()


@pytest.fixture(scope="module")
def steps(lines: tuple[Prediction, ...]) -> dict[Step, Prediction]:
    return {(p.chip, p.model, p.batch, p.name): p for p in lines if p.what == "step" and p.subject == "layers"}


@pytest.mark.parametrize(
    ("model", "batch", "tflop"),
    [
        ("sd15", 1, (1.70, 1.43, 7.43, 1.35)),
        ("sd15", 4, (6.82, 5.71, 13.5, 5.42)),
        ("sdxl", 1, (16.3, 12.4, 39.7, 11.9)),
        ("sdxl", 4, (65.1, 49.5, 93.5, 47.8)),
    ],
)
def test_operations_are_those_of_the_design(
    model: str, batch: int, tflop: tuple[float, ...], steps: dict[Step, Prediction]
) -> None:
    for name, expected in zip(predict.NAMES, tflop, strict=True):
        assert steps["H200", model, batch, name].flop / 1e12 == pytest.approx(expected, rel=0.01), name


def test_nothing_is_below_the_frozen_floor_or_the_roofline(lines: tuple[Prediction, ...]) -> None:
    chips = {chip.name: chip for chip in CHIPS}
    floor = {(p.chip, p.model, p.batch, p.what, p.subject): p for p in lines if p.name == runner.FROZEN}
    for p in lines:
        if p.what == "expand":
            assert p.gemm_ms <= p.overlapped_ms <= p.apart_ms
            continue
        chip = chips[p.chip]
        assert p.graph_ms * 1.001 >= 1e3 * max(p.flop / chip.flops, p.bytes / chip.bandwidth)
        assert p.eager_ms >= p.graph_ms
        if p.what in ("layer", "step") and p.subject != "remainder":
            frozen = floor[p.chip, p.model, p.batch, p.what, p.subject]
            assert p.graph_ms >= frozen.graph_ms and p.eager_ms >= frozen.eager_ms and p.flop >= frozen.flop


def test_a_larger_batch_and_a_smaller_chip_take_longer(steps: dict[Step, Prediction]) -> None:
    for chip, model, batch, name in steps:
        assert steps[chip, model, 4, name].graph_ms > steps[chip, model, 1, name].graph_ms
        times = [steps[c, model, batch, name].graph_ms for c in ("A100", "H100", "H200", "B200")]
        assert times == sorted(times, reverse=True)


def test_few_tiles_are_split_and_the_last_wave_counts_in_full() -> None:
    chip = predict.Chip("ten", flops=10 * 2.0 * 128 * 128, bandwidth=1e30, multiprocessors=10)
    full = predict.product_seconds(chip, cost.Product(128 * 10, 100, 128))  # ten tiles, a multiprocessor each
    assert full == pytest.approx(100)
    assert predict.product_seconds(chip, cost.Product(128 * 11, 100, 128)) == pytest.approx(200)
    alone = predict.product_seconds(chip, cost.Product(128, 2048, 128))
    assert alone == pytest.approx(2048 / 8)  # eight of the ten have a share of the inner dimension
    slow = predict.Chip("slow memory", flops=1e30, bandwidth=1.0, multiprocessors=10)
    assert predict.product_seconds(slow, cost.Product(3, 5, 7), extra=4.0) == 2 * (15 + 35 + 21) + 4.0


def test_a_conv_reads_each_of_its_pixels_once() -> None:
    layer = Layer("conv", 20, 27, 25, (1, 3, 5, 5), kernel=3, stride=1, padding=1)
    assert layer.fold == pytest.approx(1 / 9)
    y, dx = predict.kernels(runner.FROZEN, layer, 2)
    moved = 2 * (2 * 3 * 5 * 5 + 27 * 20 + 2 * 25 * 20)
    assert y.cost().bytes == pytest.approx(moved) and dx.cost().bytes == pytest.approx(moved)


def test_the_products_of_each_method_are_those_that_cost_counts() -> None:
    layer = Layer("linear", 640, 320, 77, (1, 77, 320))
    shape = 640, 320, 2 * 77, 2
    counts = {
        runner.OURS: cost.factored(*shape),
        predict.LORA: cost.lora(*shape, predict.LORA_RANK),
        runner.NAIVE: cost.svdiff_pytorch(*shape),
        runner.FROZEN: cost.frozen(*shape),
    }
    for name, counted in counts.items():
        launched = predict.kernels(name, layer, 2)
        assert sum(kernel.cost().flop for kernel in launched) == pytest.approx(counted.flop, rel=0.01)
        assert sum(kernel.cost().bytes for kernel in launched) >= counted.bytes
    assert [len(predict.kernels(name, layer, 2)) for name in predict.NAMES] == [5, 12, 16, 2]


def test_launches_bound_what_is_eager() -> None:
    total = predict.Total.of(CHIPS[2], [(Kernel(None, 4.8e12), 1), (Kernel(None, 0.0), 999_999)])
    assert total.graph == pytest.approx(1 + 1.5) and total.eager == pytest.approx(5)


def test_the_remainder_is_attention_as_torch_counts_it() -> None:
    forward, step = remainder.remainder("sd15", 512)
    config = json.loads((registry.CONFIGS / registry.MODELS["sd15"]).read_text())
    with torch.device("meta"):
        network, inputs = registry.network_of(config, 512)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(**inputs)
    products = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
    attention = sum(flop for op, flop in products.items() if "bmm" in op or "attention" in op)
    assert forward.flop == pytest.approx(attention)
    assert step.flop == pytest.approx(3.5 * forward.flop)
    assert step.kernels > 2 * forward.kernels and step.numbers > 2 * forward.numbers


def test_the_committed_file_is_what_the_command_writes(lines: tuple[Prediction, ...], tmp_path: Path) -> None:
    predict.write(tmp_path / "predicted.jsonl", lines)
    assert predict.read(tmp_path / "predicted.jsonl") == list(lines)
    committed = predict.read(COMMITTED)
    assert len(committed) == len(lines)
    for now, then in zip(lines, committed, strict=True):
        if then.subject in ("remainder", "whole"):  # what surrounds the layers is read off the installed diffusers
            assert now.graph_ms == pytest.approx(then.graph_ms, rel=0.2)
        else:
            assert now == then


def test_the_table_has_every_chip_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["--layers", "H200"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*(chip.name for chip in CHIPS), *predict.NAMES, predict.MIXED))
    assert all(str(layer) in shown for layer in registry.layers("sdxl", 1024))
