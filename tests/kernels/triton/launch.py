"""Compile for a GPU that need not be there what the launchers would launch: `python launch.py` prints a JSON line each.

What the interpreter leaves out is seen here: how arguments are told apart, which of them a kernel is compiled for.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["SVDIFF_AUTOTUNE"] = "0"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from svdiff_kernels.triton import bank, expand, frozen, group, linear, product

HALF, MODEL = torch.float16, torch.bfloat16


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_alone() -> list[int]:
    """Have every launch end when the kernel is compiled; what returns will grow by one with each that is."""
    compiled: list[int] = []
    run = JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        cache = self.device_caches[0][0]
        before = len(cache)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.extend([1] * (len(cache) - before))
        return kernel

    JITFunction.run = warm
    return compiled


def main() -> None:
    """Call every launcher, and say how much was compiled."""
    driver.set_active(Hopper())
    compiled = compile_alone()

    def say(what: str, *launches: Any) -> None:
        compiled.clear()
        for launch in launches:
            launch()
        print(json.dumps({"what": what, "compiled": len(compiled)}), flush=True)

    x, y = torch.randn(6, 32, 320, dtype=MODEL), torch.randn(6, 32, 160, dtype=MODEL)
    Vh, U, kept = (torch.randn(s, dtype=HALF) for s in ((96, 320), (160, 96), (6, 32, 96)))
    scale, bias = torch.rand(2, 96), torch.randn(160, dtype=MODEL)
    alphas = [4.0, 1.0, 0.5]
    say("frozen", *(lambda alpha=a: frozen.frozen_linear(x, Vh, None, HALF, alpha) for a in (0.25, 2.0, 16.0)))
    say("expand", lambda: expand.expand(kept, U, scale, bias, MODEL))
    say("expand_backward", lambda: expand.expand_backward(y, kept, U, scale, True))
    linear.fits_one_launch = lambda *sizes: True
    say("linear", *(lambda alpha=a: linear.linear(x, U, scale, Vh, bias, alpha, True) for a in (2.0, 4.0)))
    three = [U] * 3, [scale] * 3, [Vh] * 3
    say("group", lambda: group.linear_group(x, *three, [None, bias, None], alphas, True))
    say("group backward", lambda: group.linear_group_backward([y] * 3, [kept] * 3, *three, alphas, True, True))
    say("split", lambda: product.product(x, Vh, torch.empty(6, 32, 96), None, None, HALF, 2))
    base, mix = torch.rand(3000), torch.rand(2, 9)
    deltas = [torch.zeros(n) for _ in range(9) for n in (2944, 56)]
    say("bank", lambda: bank.gains(base, base, mix, deltas))
    held = torch.zeros(2, 3000, dtype=torch.bool)
    say("bank backward", lambda: bank.gains_backward(torch.rand(2, 3000), held, mix, [0, 3, 8]))
    tuned = (product._product_kernel, expand._expand_bwd_kernel, linear._linear_kernel)
    chosen = {str(tile) for kernel in tuned for tile in kernel.cache.values()}
    print(json.dumps({"what": "tiles", "compiled": len(chosen)}), flush=True)


if __name__ == "__main__":
    main()
