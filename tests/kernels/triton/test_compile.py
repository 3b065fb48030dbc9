"""Every kernel with every tile, compiled for GPUs that need not be there: the right instructions, enough registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

_SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes that a block may have
_STACK = 64  # bytes
_TENSOR = {80: ("mma.sync",), 90: ("wgmma.mma_async", "mma.sync"), 100: ("tcgen05.mma", "mma.sync")}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """By a process of its own, since triton either interprets or compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_tile_compiles_well(compiled: list[dict[str, Any]]) -> None:
    assert len({c["variant"] for c in compiled}) == 22
    for c in compiled:
        assert c["shared"] <= _SHARED[c["architecture"]], c
        assert c["stack"] <= _STACK and c["spills"] == 0, c


def test_products_use_the_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    for c in (c for c in compiled if "BLOCK_P" in c["tile"]):
        if c["precision"] == "ieee":
            assert c["instructions"] == ["fma.rn.f32"], c
        else:
            wide = c["tile"]["BLOCK_P"] >= 64
            assert _TENSOR[c["architecture"]][0 if wide else -1] in c["instructions"], c
            assert ("tf32" in c["instructions"]) == (c["precision"] == "tf32"), c


def test_products_read_ahead(compiled: list[dict[str, Any]]) -> None:
    assert all(c["copies"] for c in compiled if "BLOCK_P" in c["tile"])


def test_no_sum_depends_on_the_order_of_programs(compiled: list[dict[str, Any]]) -> None:
    assert not any(c["atomics"] for c in compiled)
