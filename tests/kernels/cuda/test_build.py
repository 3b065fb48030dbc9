"""What setup.py makes of a machine's CUDA, and how the built kernels come to serve. In processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from csrc.cuda import build
from tests.kernels.cuda import toolchain

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[3]
SETUP = """
import runpy, sys, torch
from types import SimpleNamespace
from csrc.cuda import build
build.find_nvcc = lambda: SimpleNamespace(version="13.0.88", architectures=["9.0", "10.0"], root=build.HERE)
torch.version.cuda = "13.0"
{changes}
sys.argv = ["setup.py", "--name"]
runpy.run_path("setup.py")
"""
SERVE = """
import torch
from svdiff_kernels import SVDiffError, backends, ops, reference
torch.ops.load_library({library!r})
here = torch.library.Library("svdiff_cuda", "IMPL")
gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for name in ("expand", "expand_backward"):
    op = getattr(torch.ops.svdiff_cuda, name).default
    here.impl(name, lambda *arguments, op=op: op.redispatch(gpu, *arguments), "CPU")
backends._register("CUDA", ["cuda"])
z, U, scale, dy = torch.randn(6, 3), torch.randn(5, 3), torch.rand(2, 3), torch.randn(6, 5)
for kind in (torch.float32, torch.float64):
    z, U, dy = z.to(kind), U.to(kind), dy.to(kind)
    y = torch.ops.svdiff.expand.default.redispatch(gpu, z, U, scale, None, None)
    grads = torch.ops.svdiff.expand_backward.default.redispatch(gpu, dy, z, U, scale, True)
    truth = reference.expand_backward(dy, z, U, scale, True)
    print(torch.allclose(y, reference.expand(z, U, scale)), all(map(torch.allclose, grads, truth)))
backends._choice = "cuda"
try:
    torch.ops.svdiff.expand.default.redispatch(gpu, z[:4], U, scale, None, None)
except SVDiffError as error:
    print(error)
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path} | env
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("changes", "arch_list", "message"),
    [
        ("torch.version.cuda = None", "", "is built without CUDA"),
        (
            "build.find_nvcc = lambda: None",
            "",
            "there is no nvcc (not in CUDA_HOME, on the PATH or in /usr/local/cuda)",
        ),
        ("torch.version.cuda = '12.8'", "", "nvcc is of CUDA 13.0.88, but torch is built with 12.8"),
        ("", "9.0a;Hopper", "TORCH_CUDA_ARCH_LIST names 'Hopper', expected numbers such as 9.0a"),
    ],
)
def test_a_build_that_was_asked_for_says_what_it_lacks(changes: str, arch_list: str, message: str) -> None:
    done = python(SETUP.format(changes=changes), SVDIFF_BUILD="cuda", TORCH_CUDA_ARCH_LIST=arch_list)
    assert done.returncode == 1 and done.stderr.startswith("SVDIFF_BUILD=cuda, but ")
    assert done.stderr.endswith(message + "\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("choice", "reason"), [("auto", "there is no nvcc"), ("cpu", "SVDIFF_BUILD=cpu")])
def test_a_build_without_cuda_says_why(choice: str, reason: str) -> None:
    done = python(SETUP.format(changes="build.find_nvcc = lambda: None"), SVDIFF_BUILD=choice)
    assert done.returncode == 0 and done.stdout == "svdiff-kernels\n"
    assert f"built without kernels for GPUs: {reason}" in done.stderr


@pytest.mark.parametrize("found", [True, False])
def test_gemms_are_built_where_cutlass_and_their_architecture_are(
    found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    if found:
        (tmp_path / "include" / "cutlass" / "cutlass.h").touch()
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    sources = build.plan(["8.0", "9.0", "12.0+PTX"])
    assert (sources.get("gemm_sm90") == ["9.0a"]) == found and "gemm_sm100" not in sources
    assert build.definitions(build.plan(["10.0a"])) == ({"SVDIFF_SM100": None} if found else {})


def test_a_build_without_cutlass_says_so(tmp_path: Path) -> None:
    done = python(SETUP.format(changes=""), CUTLASS_PATH=str(tmp_path))
    assert done.returncode == 0 and "no CUTLASS (pip install" in done.stderr


@pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc: its headers are wanted")
def test_built_kernels_serve_what_they_can() -> None:
    done = python(SERVE.format(library=str(toolchain.emulated())), SVDIFF_BACKEND="reference")
    assert done.returncode == 0, done.stderr[-2000:]
    *served, refused = done.stdout.splitlines()
    assert served == ["True True", "True True"]  # fp64 by the reference
    assert refused == "SVDIFF_BACKEND=cuda cannot serve expand of float64, float32 on cpu"
