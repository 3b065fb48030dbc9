"""Compile every kernel for GPUs that need not be there: `python aot.py` prints a JSON line for each.

What the test of it wants to know is in the machine code: which instructions multiply, and whether registers sufficed.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svdiff_kernels.triton import expand, product

ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "fma.rn.f32")


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched.

    Attributes:
        name: for people.
        kernel: the kernel, tuned or not.
        types: of the arguments that are pointers, in order.
        constants: besides those of a tile.
        dense: strides that are 1.
        architectures: to compile for; every kernel and tile sees all of them in some variant.
    """

    name: str
    kernel: Any
    types: tuple[str, ...]
    constants: dict[str, Any]
    dense: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES


def variants() -> list[Variant]:
    """Every kernel with every mixture of types that it serves, rows dense and columns dense."""
    hopper = (90,)
    found = []
    rows, columns = ("stride_xk", "stride_wk", "stride_ym"), ("stride_xp", "stride_wk", "stride_yp")
    flags = {"HAS_SCALE": True, "HAS_BIAS": True, "SPLITS": 1, "PRECISION": "ieee"}
    both = {"NEED_DZ": True, "NEED_DSCALE": True, "PRECISION": "ieee"}
    for kept, out, layout, where in (
        ("fp16", "bf16", "rows", ARCHITECTURES),
        ("fp32", "fp32", "rows", ARCHITECTURES),
        ("fp16", "bf16", "columns", hopper),
        ("fp16", "fp16", "rows", hopper),
        ("bf16", "bf16", "rows", hopper),
    ):
        x, dy = (kept, kept, "fp32", out, out), (out, kept, kept, "fp32", out, "fp32")
        dense = rows if layout == "rows" else columns
        name = f"expand {kept} to {out}, {layout}"
        found.append(Variant(name, product._product_kernel, x, {**flags, "COMPUTE": kept}, dense, where))
        dense = ("stride_dm", "stride_zr", "stride_gr") if layout == "rows" else ("stride_dp", "stride_zp", "stride_gp")
        name = f"expand_backward {out} by {kept}, {layout}"
        found.append(Variant(name, expand._expand_bwd_kernel, dy, both, (*dense, "stride_ur"), where))
    plain = flags | {"HAS_SCALE": False, "HAS_BIAS": False}
    for name, out, dense in (("z", "fp16", rows), ("dx", "bf16", ("stride_xk", "stride_wm", "stride_ym"))):
        types, constants = ("bf16", "fp16", "fp32", "bf16", out), plain | {"COMPUTE": out}
        found.append(Variant(f"frozen_linear for {name}", product._product_kernel, types, constants, dense, hopper))
    types, constants = (
        ("fp16", "fp16", "fp32", "fp16", "fp32"),
        flags | {"HAS_BIAS": False, "SPLITS": 4, "COMPUTE": "fp16"},
    )
    found.append(Variant("split", product._product_kernel, types, constants, rows, hopper))
    constants = {"HAS_BIAS": True, "SPLITS": 4, "BLOCK": product.BLOCK}
    found.append(Variant("sum of splits", product._sum_kernel, ("fp32", "bf16", "bf16"), constants, ("stride_ym",)))
    return found


@dataclass(frozen=True)
class Compiled:
    """What became of a variant with one tile on an architecture: bytes of stack and shared memory, stores by spills."""

    variant: str
    architecture: int
    tile: dict[str, int]
    full: bool
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: list[str]


def tiles(variant: Variant) -> list[triton.Config]:
    """Those that may be tried for the variant's types."""
    if not hasattr(variant.kernel, "configs"):
        return [triton.Config({})]
    return variant.kernel.tiles(full=variant.types[1] == "fp32")


def compile_for(name: str, index: int, architecture: int) -> Compiled:
    """One variant by name, with one of its tiles by number."""
    variant = next(v for v in variants() if v.name == name)
    tile = tiles(variant)[index]
    function = variant.kernel.fn if hasattr(variant.kernel, "configs") else variant.kernel
    constants = {**variant.constants, **tile.kwargs, **dict.fromkeys(variant.dense, 1)}
    if "COMPUTE" in constants:
        constants["COMPUTE"] = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[constants["COMPUTE"]]
    types, signature, hints = list(variant.types), {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = f"*{types.pop(0)}" if argument.endswith("_ptr") else "i32"
        if argument not in ("P", "P_bucket", "images"):  # what of real layers is a multiple of 16
            hints[i,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=hints)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([_CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = [i for i in _INSTRUCTIONS if i in kernel.asm["ptx"]]
    full = variant.types[1] == "fp32"
    return Compiled(
        variant=name,
        architecture=architecture,
        tile=tile.kwargs,
        full=full,
        registers=registers,
        stack=stack,
        spills=len(re.findall(r"\bSTL\b", code)),
        shared=kernel.metadata.shared,
        instructions=instructions,
    )


def main() -> None:
    """Compile everything, on two cores."""
    jobs = [
        (variant.name, index, architecture)
        for variant in variants()
        for index in range(len(tiles(variant)))
        for architecture in variant.architectures
    ]
    with ProcessPoolExecutor(2) as pool:
        for result in pool.map(compile_for, *zip(*jobs, strict=True)):
            print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
