"""Compile every kernel for GPUs that need not be there: `python aot.py` prints a JSON line for each.

What the test of it wants to know is in the machine code: which instructions multiply, and whether registers sufficed.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svdiff_kernels.triton import bank, expand, linear, product

ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "tf32", "fma.rn.f32")
_ATOMICS = r"(?<![.\w])(?:atom|red|cp\.reduce)\."
_ALIGNED = [["tt.divisibility", 16]]
_UNALIGNED = ("P", "P_bucket", "S", "images")
"""Integers that of real layers are not multiples of 16."""


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched.

    Attributes:
        name: for people.
        kernel: the kernel, tuned or not.
        types: of the arguments that are pointers, in order; None of one that is not given.
        constants: besides those of a tile.
        dense: strides that are 1.
        architectures: to compile for; every kernel and tile sees all of them in some variant.
        members: the length of arguments that are tuples.
    """

    name: str
    kernel: Any
    types: tuple[str | None, ...]
    constants: dict[str, Any]
    dense: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES
    members: int = 1

    @property
    def full(self) -> bool:
        """Is it of fp32?"""
        return self.types[1] == "fp32"

    @property
    def precision(self) -> str:
        """How fp32 is multiplied, "ieee" or "tf32"; nothing where it is not."""
        return self.constants.get("PRECISION", "") if self.full else ""


def variants() -> list[Variant]:
    """Every kernel with every mixture of types that it serves, rows dense and columns dense."""
    hopper = (90,)
    found = []

    def add(name: str, kernel: Any, types: tuple[str | None, ...], constants: dict[str, Any], *rest: Any) -> None:
        found.append(Variant(name, kernel, types, constants, *rest))

    rows, columns = ("stride_xk", "stride_wk", "stride_ym"), ("stride_xp", "stride_wk", "stride_yp")
    flags = dict.fromkeys(("SCALES_X", "SCALES_Y", "HAS_BIAS", "HAS_ALPHA", "SUMMED"), False)
    flags |= {"SPLITS": 1, "TYPES": "", "PRECISION": "ieee"}
    middle = flags | {"SCALES_X": True, "HAS_BIAS": True}
    both = {"NEED_DZ": True, "NEED_DSCALE": True, "TYPES": "", "PRECISION": "ieee"}
    for kept, out, layout, where, members in (
        ("fp16", "bf16", "rows", ARCHITECTURES, 1),
        ("fp32", "fp32", "rows", ARCHITECTURES, 1),
        ("fp16", "bf16", "columns", hopper, 1),
        ("bf16", "bf16", "rows", hopper, 3),
    ):
        x, dy = (kept, kept, "fp32", out, out), (out, kept, kept, "fp32", out, "fp32")
        dense = rows if layout == "rows" else columns
        kind = f"{layout}, {members} layers"
        add(
            f"expand {kept} to {out}, {kind}",
            product._product_kernel,
            x,
            middle | {"COMPUTE": kept},
            dense,
            where,
            members,
        )
        dense = ("stride_dm", "stride_zr", "stride_gr") if layout == "rows" else ("stride_dp", "stride_zp", "stride_gp")
        dense = (*dense, "stride_ur")
        add(f"expand_backward {out} by {kept}, {kind}", expand._expand_bwd_kernel, dy, both, dense, where, members)

    project = flags | {"SCALES_Y": True, "HAS_ALPHA": True, "COMPUTE": "fp16"}
    add("project", product._product_kernel, ("bf16", "fp16", "fp32", None, "fp16"), project, rows, hopper)
    split = flags | {"SPLITS": 4, "COMPUTE": "fp16"}
    add("split", product._product_kernel, ("fp16", "fp16", None, None, "fp32"), split, rows, hopper)
    together = flags | {"SUMMED": True, "HAS_ALPHA": True, "COMPUTE": "bf16"}
    dense = ("stride_xk", "stride_wm", "stride_ym")
    add("dx of 3 layers", product._product_kernel, ("bf16", "fp16", None, None, "bf16"), together, dense, hopper, 3)
    constants = {"HAS_BIAS": True, "SPLITS": 4, "BLOCK": product.BLOCK}
    add("sum of splits", product._sum_kernel, ("fp32", "bf16", "bf16"), constants, ("stride_ym",))

    constants = {"UNSCALE": True, "BLOCK_T": expand.SUM_BLOCK[0], "BLOCK_R": expand.SUM_BLOCK[1]}
    add("sum of tiles", expand._sum_tiles_kernel, ("fp32", "fp32", "fp32"), constants, (), ARCHITECTURES, 3)

    for kept, out, layout, where in (
        ("fp16", "bf16", "rows", ARCHITECTURES),
        ("fp32", "fp32", "rows", ARCHITECTURES),
        ("fp16", "bf16", "columns", hopper),
        ("bf16", "bf16", "rows", hopper),
    ):
        types = (out, kept, "fp32", kept, out, out, kept)
        constants = {"SCALED": True, "HAS_BIAS": True, "HAS_ALPHA": kept != out, "PRECISION": "ieee"}
        dense = ("stride_xn", "stride_ym", "stride_kr") if layout == "rows" else ("stride_xp", "stride_yp", "stride_kp")
        name = f"linear {kept} to {out}, {layout}"
        add(name, linear._linear_kernel, types, constants, (*dense, "stride_ur", "stride_vn"), where)

    constants = {"LAST": True, "BLOCK": bank.BLOCK}
    add("gains", bank._gains_kernel, (*("fp32",) * 6, "i1"), constants, ("stride_ma",), ARCHITECTURES, 3)
    types, constants = ("fp32", "i1", "fp32", "fp32"), {"BLOCK": bank.BLOCK}
    add("gradient of gains", bank._gains_bwd_kernel, types, constants, ("stride_dr",))
    in_tf32 = (
        replace(v, name=f"{v.name}, tf32", constants=v.constants | {"PRECISION": "tf32"}) for v in found if v.precision
    )
    return [*found, *in_tf32]


@dataclass(frozen=True)
class Compiled:
    """What became of a variant with one tile on an architecture: bytes of stack and shared memory, stores by spills.

    Attributes:
        precision: see `Variant.precision`.
        instructions: which of those that multiply there are.
        copies: how many read ahead of the products, from memory into shared memory.
        atomics: how many add to memory in whatever order programs come.
    """

    variant: str
    architecture: int
    tile: dict[str, int]
    precision: str
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: list[str]
    copies: int
    atomics: int


def tiles(variant: Variant) -> list[triton.Config]:
    """Those that may be tried for the variant's types."""
    if not hasattr(variant.kernel, "configs"):
        return [triton.Config({})]
    return variant.kernel.tiles(full=variant.full)


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
        summed = argument == "y_ptrs" and constants.get("SUMMED")
        members = 1 if summed else variant.members
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("alpha", "alphas"):
            signature[argument] = "fp32" if argument == "alpha" else ("fp32",) * members
        elif "_ptr" not in argument:
            signature[argument] = "i32"
            if argument not in _UNALIGNED:
                hints[i,] = _ALIGNED
        elif (kind := types.pop(0)) is None:
            signature[argument], constants[argument] = "constexpr", None
        elif argument.endswith("_ptrs"):
            signature[argument] = (f"*{kind}",) * members
            hints |= {(i, j): _ALIGNED for j in range(members)}
        else:
            signature[argument] = f"*{kind}"
            hints[i,] = _ALIGNED
    source = ASTSource(function, signature, constexprs=constants, attrs=hints)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", _dump("-res-usage", file.name)).groups())
        code = _dump("-sass", file.name) if stack else ""  # seconds, and registers are spilled to the stack alone
    instructions = [i for i in _INSTRUCTIONS if i in kernel.asm["ptx"]]
    return Compiled(
        variant=name,
        architecture=architecture,
        tile=tile.kwargs,
        precision=variant.precision,
        registers=registers,
        stack=stack,
        spills=len(re.findall(r"\bSTL\b", code)),
        shared=kernel.metadata.shared,
        instructions=instructions,
        copies=kernel.asm["ptx"].count("cp.async.c"),
        atomics=len(re.findall(_ATOMICS, kernel.asm["ptx"])),
    )


def _dump(what: str, file: str) -> str:
    return subprocess.run([_CUOBJDUMP, what, file], capture_output=True, text=True, check=True).stdout


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
