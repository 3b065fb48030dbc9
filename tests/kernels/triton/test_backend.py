"""Triton behind the ops: whole layers by it, and what it says where it cannot serve. In processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LAYER = """
import torch
from svdiff_kernels import spectral_linear
x, U, sigma, Vh, delta = torch.randn(5, 7), torch.randn(9, 3), torch.rand(3), torch.randn(3, 7), torch.zeros(3)
print(spectral_linear(x.to({dtype}), U.to({dtype}), sigma, Vh.to({dtype}), delta).shape)
"""


def python(*arguments: str, interpret: str = "1") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"SVDIFF_BACKEND": "triton", "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_functional.py", "fp64_recomposition and float32 and (linear or conv)"),
        ("test_bank.py", "not compile and not casting"),
        ("test_mixes.py", "not compile"),
    ],
)
def test_whole_layers_and_models_behave_as_ever(file: str, chosen: str) -> None:
    done = python("-m", "pytest", f"tests/kernels/{file}", "-k", chosen, "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("dtype", "interpret", "message"),
    [
        ("torch.float64", "1", "SVDIFF_BACKEND=triton cannot serve linear of float64, float32 on cpu"),
        ("torch.float32", "0", "SVDIFF_BACKEND=triton cannot serve linear of float32 on cpu"),
    ],
)
def test_what_it_cannot_serve_is_an_error(dtype: str, interpret: str, message: str) -> None:
    done = python("-c", LAYER.format(dtype=dtype), interpret=interpret)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(message)


def test_info_names_it() -> None:
    done = python("-m", "svdiff_kernels.info")
    facts = dict(line.split(None, 1) for line in done.stdout.splitlines() if line.startswith("triton"))
    assert facts["triton"][0].isdigit()
