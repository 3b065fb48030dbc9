"""The examples in docstrings: they run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import svdiff

import svdiff_kernels
from svdiff_kernels import nn

ROOT = Path(__file__).parents[2]
SOURCES = {
    ".".join(source.relative_to(base).with_suffix("").parts): source
    for base, package in ((ROOT, "svdiff_kernels"), (ROOT / "python", "svdiff"))
    for source in (base / package).rglob("*.py")
}


@pytest.mark.parametrize("name", sorted(name for name, source in SOURCES.items() if ">>> " in source.read_text()))
def test_examples_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    "thing",
    [
        svdiff_kernels.decompose,
        svdiff_kernels.Factors,
        svdiff_kernels.FactorCache,
        svdiff_kernels.Bank,
        svdiff_kernels.spectral_linear,
        svdiff_kernels.spectral_conv2d,
        svdiff_kernels.spectral_embedding,
        nn.SpectralLinear,
        svdiff.attach,
        svdiff.load,
    ],
    ids=lambda thing: thing.__qualname__,
)
def test_what_users_start_from_has_an_example(thing: Any) -> None:
    assert doctest.DocTestParser().get_examples(thing.__doc__)
