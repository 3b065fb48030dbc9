"""What data sheets allow: `python -m benchmarks.predict`, written before anything was measured on a GPU.

They are optimistic on purpose: what the hardware allows, not what a program will reach. The ratios between methods are
what they are for. Assumed:

- A product takes the longer of two: its operations at the chip's dense half-precision peak, in whole waves of
  128 x 128 tiles over the multiprocessors, the inner dimension split where that fills them better; and its bytes
  (`cost.Product`: a conv is an implicit product that reads each pixel once) at the memory's bandwidth. Caches are left
  out, and no product of a real library reaches the peak of a data sheet.
- Kernels in a CUDA graph follow one another after 1.5 us. In eager mode a launch takes 5 us of the host, which runs
  ahead: a step takes as long as its launches or as its kernels, whichever is more. Python takes more than that.
- Ours is 5 kernels a layer: z; `expand`; its backward, which also reads z and writes a partial sum of dscale for each
  tile of rows; the sum of those; dx. All in 16 bits.
- Frozen is y and dx; every other method has them too, so it is the floor.
- LoRA is PEFT's, r = 16 on every layer: two small products forward and four backward, and scaling and adding y and dx
  as kernels of their own.
- svdiff-pytorch's arithmetic keeps fp32 factors and runs under autocast: both factors are cast in each forward, then
  ``U @ diag(scale) @ Vh``, the layer, dW, and two products back to the shift; 16 kernels.
- The remainder of a step (attention, norms, element-wise) is an estimate of eager mode, the same for every method:
  `remainder.py`. The loss, the optimiser, our bank and changes of memory layout are left out.
- One batch with 8 deltas is our forward pass against that of the dense base.
- `expand` against a plain product of its shape moves scale, z and partial sums besides: "overlapped" hides them behind
  the products as the rest of the bytes, "apart" adds their time. Scaling z inside the kernel is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import cost, registry, runner
from .cost import Product
from .op import shapes as expand_shapes
from .registry import Layer
from .remainder import remainder

_SIZE = 2  # bytes of a number in bf16
_TILE, _LEAST_INNER, _MOST_SPLITS = 128, 256, 16
_GAP, _LAUNCH = 1.5e-6, 5e-6
LORA_RANK = 16
LORA = f"lora r={LORA_RANK}"
NAMES = (runner.OURS, LORA, runner.NAIVE, runner.FROZEN)
MODELS = {"sd15": 512, "sdxl": 1024}
BATCHES = (1, 4)
MIXED, INFER_BATCH = f"{runner.OURS}, 8 deltas", 8
FORWARD, BACKWARD = "expand forward", "expand backward"


@dataclass(frozen=True)
class Chip:
    """Of a data sheet: dense half precision and memory, in operations and bytes a second."""

    name: str
    flops: float
    bandwidth: float
    multiprocessors: int


CHIPS = (
    Chip("A100", 312e12, 2.04e12, 108),  # SXM, 80 GB
    Chip("H100", 989e12, 3.35e12, 132),  # SXM
    Chip("H200", 989e12, 4.8e12, 132),
    Chip("B200", 2250e12, 8.0e12, 148),
)


@dataclass(frozen=True)
class Kernel:
    """A product, or none, and bytes that it moves besides."""

    product: Product | None
    extra: float = 0.0

    def cost(self) -> cost.Cost:
        """Operations and bytes."""
        return (self.product.cost(_SIZE) if self.product else cost.Cost(0.0, 0.0)) + cost.Cost(0.0, self.extra)

    def seconds(self, chip: Chip) -> float:
        """From its start to its end."""
        moved = self.extra / chip.bandwidth
        return moved if self.product is None else product_seconds(chip, self.product, self.extra)


@dataclass(frozen=True)
class Prediction:
    """One line; milliseconds.

    Attributes:
        what: "layer" and "step" (forward and backward), "infer" (forward), or "expand".
        subject: a layer, an expansion, or a part of the step: "layers", "remainder".
        graph_ms, eager_ms: as one CUDA graph, and launched one by one.
        tiles, waves: of the layer's output.
        gemm_ms, overlapped_ms, apart_ms: of an expansion without gaps between kernels, and of the plain product.
    """

    chip: str
    model: str
    pixels: int
    batch: int
    what: str
    subject: str
    name: str
    count: int
    kernels: int
    flop: float
    bytes: float
    graph_ms: float
    eager_ms: float
    tiles: int | None = None
    waves: int | None = None
    gemm_ms: float | None = None
    overlapped_ms: float | None = None
    apart_ms: float | None = None


def waves(chip: Chip, tiles: int) -> int:
    """How often the multiprocessors must go round."""
    return math.ceil(tiles / chip.multiprocessors)


def tiles_of(product: Product) -> int:
    """Of its result."""
    return math.ceil(product.rows / _TILE) * math.ceil(product.columns / _TILE)


def product_seconds(chip: Chip, product: Product, extra: float = 0.0) -> float:
    """Seconds of one product in half precision that moves `extra` bytes besides."""
    best, splits = math.inf, 1
    while splits == 1 or (splits <= _MOST_SPLITS and product.inner >= splits * _LEAST_INNER):
        inner = math.ceil(product.inner / splits)
        operations = waves(chip, tiles_of(product) * splits) * chip.multiprocessors * 2.0 * _TILE * _TILE * inner
        partial = 2 * 4.0 * splits * product.rows * product.columns if splits > 1 else 0.0  # fp32, written and read
        moved = product.cost(_SIZE).bytes + partial + extra
        best = min(best, max(operations / chip.flops, moved / chip.bandwidth))
        splits *= 2
    return best


def kernels(name: str, layer: Layer, batch: int) -> list[Kernel]:
    """What one layer launches in a step."""
    M, N, T, fold = layer.M, layer.N, layer.T * batch, layer.fold
    r = min(M, N)
    y, x = float(_SIZE * T * M), float(_SIZE * T * N) * fold
    if name == runner.OURS:
        z, expanded, dz, dx = cost.factored_products(M, N, T, fold=fold)
        return [Kernel(z), _expand(expanded), *_expand_backward(dz), Kernel(dx)]
    if name == LORA:
        scaled_and_added = [Kernel(None, 2 * y), Kernel(None, 3 * y), Kernel(None, 2 * y), Kernel(None, 3 * x)]
        return [*map(Kernel, cost.lora_products(M, N, T, LORA_RANK, fold)), *scaled_and_added]
    if name == runner.NAIVE:
        factors = [Kernel(None, 6.0 * M * r), Kernel(None, 6.0 * r * N)]
        diagonal = [Kernel(None, 6.0 * r * r)] * 2 + [Kernel(None, 4.0 * r * r)]  # cast, its gradient cast; filled
        vectors = [Kernel(None, 12.0 * r)] * 4  # sum and relu, forward and backward
        return [*map(Kernel, cost.svdiff_pytorch_products(M, N, T, fold)), *factors, *diagonal, *vectors]
    return [*map(Kernel, cost.frozen_products(M, N, T, fold))]


def _expand(product: Product, samples: int = 1) -> Kernel:
    return Kernel(product, 4.0 * samples * product.inner)


def _expand_backward(product: Product) -> tuple[Kernel, Kernel]:
    T, r = product.rows, product.columns
    partial = 4.0 * math.ceil(T / _TILE) * r
    return Kernel(product, _SIZE * T * r + 4.0 * r + partial), Kernel(None, partial + 4.0 * r)


def forward_kernels(name: str, layer: Layer, batch: int) -> list[Kernel]:
    """What one layer launches in a forward pass: ours with a delta for each sample, or the base."""
    shape = layer.M, layer.N, layer.T * batch
    if name == MIXED:
        z, expanded, *_ = cost.factored_products(*shape, fold=layer.fold)
        return [Kernel(z), _expand(expanded, batch)]
    return [Kernel(cost.frozen_products(*shape, layer.fold)[0])]


@dataclass(frozen=True)
class Total:
    """Of many kernels, one after the other."""

    kernels: int
    seconds: float
    cost: cost.Cost

    @classmethod
    def of(cls, chip: Chip, launched: Iterable[tuple[Kernel, int]]) -> Total:
        """Of kernels and how often each runs."""
        count, seconds, spent = 0, 0.0, cost.Cost(0.0, 0.0)
        for kernel, times in launched:
            count += times
            seconds += times * kernel.seconds(chip)
            spent += times * kernel.cost()
        return cls(count, seconds, spent)

    def __add__(self, other: Total) -> Total:
        return Total(self.kernels + other.kernels, self.seconds + other.seconds, self.cost + other.cost)

    @property
    def graph(self) -> float:
        return self.seconds + self.kernels * _GAP

    @property
    def eager(self) -> float:
        return max(self.graph, self.kernels * _LAUNCH)

    def line(
        self, chip: Chip, model: str, batch: int, what: str, subject: str, name: str, *, count: int = 1, **more: Any
    ) -> Prediction:
        """As a prediction."""
        return Prediction(
            chip=chip.name,
            model=model,
            pixels=MODELS[model],
            batch=batch,
            what=what,
            subject=subject,
            name=name,
            count=count,
            kernels=self.kernels,
            flop=_short(self.cost.flop),
            bytes=_short(self.cost.bytes),
            graph_ms=_short(1e3 * self.graph),
            eager_ms=_short(1e3 * self.eager),
            **more,
        )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _remainder(chip: Chip, model: str, batch: int, *, forward: bool = False) -> Total:
    found = remainder(model, MODELS[model])[0 if forward else 1]
    spent = cost.Cost(batch * found.flop, batch * _SIZE * found.numbers)
    return Total(found.kernels, spent.flop / chip.flops + spent.bytes / chip.bandwidth, spent)


@cache
def predictions() -> tuple[Prediction, ...]:
    """All of them, chip by chip."""
    found: list[Prediction] = []
    for chip in CHIPS:
        for model in MODELS:
            found += _layers(chip, model)
            found += _expansions(chip, model)
            for batch in BATCHES:
                found += _whole(chip, model, batch, "step")
            found += _whole(chip, model, INFER_BATCH, "infer")
    return tuple(found)


def _layers(chip: Chip, model: str) -> list[Prediction]:
    found = []
    for layer, count in registry.layers(model, MODELS[model]).items():
        tiles = tiles_of(cost.frozen_products(layer.M, layer.N, layer.T)[0])
        about = {"count": count, "tiles": tiles, "waves": waves(chip, tiles)}
        for name in NAMES:
            total = Total.of(chip, ((kernel, 1) for kernel in kernels(name, layer, 1)))
            found.append(total.line(chip, model, 1, "layer", str(layer), name, **about))
    return found


def _expansions(chip: Chip, model: str) -> list[Prediction]:
    found = []
    for (M, r, T), count in expand_shapes(model, MODELS[model]).items():
        forward, (backward, last) = _expand(Product(T, r, M)), _expand_backward(Product(T, M, r))
        for name, launched in ((FORWARD, [forward]), (BACKWARD, [backward, last])):
            product = launched[0].product
            assert product is not None
            plain = product_seconds(chip, product)
            total = Total.of(chip, ((kernel, 1) for kernel in launched))
            apart = plain + sum(kernel.extra for kernel in launched) / chip.bandwidth
            seconds = {"gemm_ms": plain, "overlapped_ms": total.seconds, "apart_ms": apart}
            about: dict[str, Any] = {key: _short(1e3 * value) for key, value in seconds.items()}
            found.append(total.line(chip, model, 1, "expand", f"expand {r} to {M}, T={T}", name, count=count, **about))
    return found


def _whole(chip: Chip, model: str, batch: int, what: str) -> list[Prediction]:
    """The layers of a step or of a forward pass, and then what surrounds them, which every method shares."""
    layers = registry.layers(model, MODELS[model])
    launch, names = (kernels, NAMES) if what == "step" else (forward_kernels, (MIXED, runner.DENSE))
    rest = _remainder(chip, model, batch, forward=what == "infer")
    found = [rest.line(chip, model, batch, what, "remainder", "every method")]
    for name in names:
        total = Total.of(
            chip, ((kernel, count) for layer, count in layers.items() for kernel in launch(name, layer, batch))
        )
        found.append(total.line(chip, model, batch, what, "layers", name))
        found.append((total + rest).line(chip, model, batch, what, "whole", name))
    return found


def read(file: Path) -> list[Prediction]:
    """What `write` wrote."""
    return [Prediction(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, lines: Iterable[Prediction]) -> None:
    """One JSON line each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(asdict(line))}\n" for line in lines), encoding="utf-8")


def table(lines: Sequence[Prediction], chip: str | None = None) -> str:
    """For people: whole steps and forward passes, `expand` against a plain product; of one chip each layer too."""
    text = ["chip   TFLOP/s   GB/s   multiprocessors"]
    text += [f"{c.name:7}{c.flops / 1e12:7.0f}{c.bandwidth / 1e9:7.0f}{c.multiprocessors:18}" for c in CHIPS]
    for what, title in (("step", "forward and backward"), ("infer", f"forward, batch {INFER_BATCH}")):
        for parts, of in (
            (("layers",), "the linear and conv layers"),
            (("remainder", "whole"), "and with the remainder"),
        ):
            text += ["", f"{title}, {of}: ms as a CUDA graph / eager", _head(f"{'kernels':>8}{'TFLOP':>8}")]
            text += _totals([line for line in lines if line.what == what and line.subject in parts])
    text += ["", "expand, batch 1: its rate relative to a plain product's, apart to overlapped", _head(f"{'':16}")]
    text += _rates([line for line in lines if line.what == "expand"])
    if chip:
        text += ["", f"each layer on {chip}, batch 1, us as a graph", *_each(lines, chip)]
    return "\n".join(text)


def _head(columns: str) -> str:
    return f"{'':30}{columns}" + "".join(f"{c.name:>18}" for c in CHIPS)


def _totals(lines: list[Prediction]) -> list[str]:
    text = []
    for model, batch in dict.fromkeys((line.model, line.batch) for line in lines):
        mine = [line for line in lines if (line.model, line.batch) == (model, batch)]
        text.append(f"{model} at {MODELS[model]} px, batch {batch}")
        for name in dict.fromkeys(line.name for line in mine):
            row = [line for line in mine if line.name == name]
            cells = "".join(f"{f'{line.graph_ms:.2f} / {line.eager_ms:.2f}':>18}" for line in row)
            text.append(f"  {name:28}{row[0].kernels:8}{row[0].flop / 1e12:8.2f}{cells}")
    return text


def _rates(lines: list[Prediction]) -> list[str]:
    text = []
    for model, name in dict.fromkeys((line.model, line.name) for line in lines):
        for title in ("the slowest", "all together"):
            row = f"  {model + ', ' + name:28}{title:16}"
            for chip in CHIPS:
                mine = [line for line in lines if (line.model, line.name, line.chip) == (model, name, chip.name)]
                row += f"{f'{rate(mine, title, False):.3f} to {rate(mine, title, True):.3f}':>18}"
            text.append(row)
    return text


def rate(lines: Sequence[Prediction], title: str = "all together", overlapped: bool = True) -> float:
    """Of expansions relative to plain products, weighted by how often each occurs."""
    pairs = []
    for line in lines:
        taken = line.overlapped_ms if overlapped else line.apart_ms
        assert line.gemm_ms is not None and taken is not None
        pairs.append((line.count * line.gemm_ms, line.count * taken))
    if title == "the slowest":
        return min(gemm / taken for gemm, taken in pairs)
    return sum(gemm for gemm, _ in pairs) / sum(taken for _, taken in pairs)


def _each(lines: Sequence[Prediction], chip: str) -> list[str]:
    text = []
    layers = [line for line in lines if line.what == "layer" and line.chip == chip]
    for model in MODELS:
        text += ["", f"{model:40}{'MB':>8}{'tiles':>8}{'waves':>7}" + "".join(f"{name:>28}" for name in NAMES)]
        subjects: dict[str, dict[str, Prediction]] = {}
        for line in layers:
            if line.model == model:
                subjects.setdefault(line.subject, {})[line.name] = line
        for subject, named in subjects.items():
            floor = named[runner.FROZEN]
            row = f"{f'{floor.count} x {subject}':40}{floor.bytes / 1e6:8.1f}{floor.tiles:8}{floor.waves:7}"
            text.append(row + "".join(f"{1e3 * named[name].graph_ms:28.1f}" for name in NAMES))
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Roofline predictions from data sheets.")
    parser.add_argument("--layers", choices=[chip.name for chip in CHIPS], help="also each layer on this chip")
    parser.add_argument("--output", type=Path, help="also write JSON lines to this file")
    options = parser.parse_args(argv)
    lines = predictions()
    print(table(lines, options.layers))
    if options.output:
        write(options.output, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
