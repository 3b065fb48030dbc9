"""What every test starts from: a fixed seed and no cache but its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Set before any of these libraries is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from svdiff_kernels.leases import lease_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is one."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SVDIFF_CACHE", str(tmp_path / "factor-cache"))
    yield
    lease_of.cache_clear()  # or each test's would be kept open to the end


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """For tests that compile: no compiled code of other tests, which counts towards dynamo's recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
