"""Builds the optional extension ``svdiff_kernels._C``; all metadata lives in pyproject.toml.

``SVDIFF_BUILD`` chooses what to build: ``auto`` (the default: what this machine can), ``cuda`` or ``cpu`` (fail if it
cannot) or ``none`` (Python only, the reference backend serves every op). ``TORCH_CUDA_ARCH_LIST`` says for which GPUs;
the GEMMs of Hopper and Blackwell need CUTLASS, from the package ``nvidia-cutlass`` or from ``CUTLASS_PATH``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip does not

from csrc.cuda import build as cuda  # noqa: E402

NAMES = ("bindings", "dispatch", "autograd", "layers", "cpu/expand", "cpu/frozen", "cpu/gemm", "cpu/eigh")
SOURCES = [f"csrc/{name}.cpp" for name in NAMES]
HEADERS = ["csrc/ops.h", "csrc/dispatch.h", "csrc/autograd.h", "csrc/cpu/gemm.h"]
CHOICES = ("auto", "none", "cpu", "cuda")
CUDA_LIBRARIES = ("c10_cuda", "torch_cuda", "cudart")


def notice(text: str) -> None:
    """Tell the person who builds."""
    print(f"svdiff-kernels: {text}", file=sys.stderr)


def missing_tool() -> str | None:
    """What this machine lacks for a build, in words, or None."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment (install torch, then use --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler!r} is not on the PATH)"
    return None


def missing_for_cuda() -> str | None:
    """What is lacking besides for kernels on GPUs, in words, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = cuda.find_nvcc()
    if nvcc is None:
        return "there is no nvcc (not in CUDA_HOME, on the PATH or in /usr/local/cuda)"
    if nvcc.version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {nvcc.version}, but torch is built with {torch.version.cuda}"
    if odd := [a for a in cuda.wanted_architectures(nvcc) if not cuda.is_architecture(a)]:
        return f"TORCH_CUDA_ARCH_LIST names {odd[0]!r}, expected numbers such as 9.0a"
    return None


def compiled_for_gpus(sources: dict[str, list[str]], folder: Path) -> list[str]:
    """Compile the CUDA sources, MAX_JOBS at a time."""
    nvcc = cuda.find_nvcc()
    assert nvcc is not None
    folder.mkdir(parents=True, exist_ok=True)
    commands = {name: nvcc.command(name, targets, folder / f"{name}.o") for name, targets in sources.items()}
    for command in commands.values():
        print(" ".join(command))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:  # with CUTLASS, each takes 5 GB
        list(pool.map(lambda command: subprocess.run(command, check=True), commands.values()))
    return [str(folder / f"{name}.o") for name in commands]


def cuda_arguments(sources: dict[str, list[str]]) -> dict[str, Any]:
    """What the extension needs besides, when it has kernels for GPUs."""
    nvcc = cuda.find_nvcc()
    assert nvcc is not None
    targets = sorted({t for targets in sources.values() for t in targets}, key=lambda t: (cuda.number(t), t))
    has_gemms = any(name in sources for name in cuda.GEMMS)
    gemms = f"with GEMMs of CUTLASS {cuda.cutlass_version()}" if has_gemms else "without GEMMs of CUTLASS"
    told = f"CUDA {nvcc.version} for {' '.join(targets)}, {gemms}"
    macros: list[tuple[str, str | None]] = [(name, None) for name in cuda.definitions(sources)]
    return {
        "define_macros": [*macros, ("SVDIFF_CUDA", f'"{told}"')],
        "include_dirs": [str(nvcc.root / "include")],
        "library_dirs": [str(nvcc.root / "lib64"), str(nvcc.root / "lib")],
        "libraries": list(CUDA_LIBRARIES),
    }


def extension_arguments() -> dict[str, Any]:
    """The part of setup()'s arguments that builds the extension; empty where it is not wanted or not possible."""
    choice = os.environ.get("SVDIFF_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"SVDIFF_BUILD={choice!r} is not one of {', '.join(CHOICES)}")
    if choice == "none":
        return {}
    if lacking := missing_tool():
        if choice != "auto":
            sys.exit(f"SVDIFF_BUILD={choice}, but {lacking}")
        notice(f"built without its C++ extension, the reference backend serves: {lacking}")
        return {}
    without_cuda = "SVDIFF_BUILD=cpu" if choice == "cpu" else missing_for_cuda()
    if choice == "cuda" and without_cuda:
        sys.exit(f"SVDIFF_BUILD=cuda, but {without_cuda}")

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources: dict[str, list[str]] = {}
    if without_cuda:
        notice(f"built without kernels for GPUs: {without_cuda}")
    else:
        nvcc = cuda.find_nvcc()
        assert nvcc is not None
        sources = cuda.plan(cuda.wanted_architectures(nvcc))
        if not cuda.cutlass_includes():
            notice("built without GEMMs of its own for GPUs: no CUTLASS (pip install --no-deps nvidia-cutlass)")

    class OptionalBuild(BuildExtension):
        """BuildExtension whose failure is a notice unless the extension was asked for by name."""

        extensions: list[Any]

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if choice != "auto":
                    raise
                self.extensions = []
                notice(f"extension not built, the reference backend serves: {str(error).strip().splitlines()[-1]}")

        def build_extensions(self) -> None:
            (extension,) = self.extensions
            try:
                extension.extra_objects += compiled_for_gpus(sources, Path(self.build_temp) / "cuda")
            except subprocess.CalledProcessError as error:
                if choice != "auto":
                    raise
                notice(f"built without kernels for GPUs: nvcc failed on {error.cmd[-3]}")
                extension.sources = SOURCES
                extension.define_macros.clear()
                extension.libraries = [name for name in extension.libraries if name not in CUDA_LIBRARIES]
            super().build_extensions()

    extension = CppExtension(
        "svdiff_kernels._C",
        [*SOURCES, *(["csrc/cuda/bindings.cpp"] if sources else [])],
        depends=HEADERS + [str(f.relative_to(ROOT)) for f in (ROOT / "csrc" / "cuda").iterdir() if sources],
        # -g0: Python's own flags ask for debug symbols, most of the file and of the time.
        extra_compile_args={"cxx": ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-Wall"]},
        **(cuda_arguments(sources) if sources else {}),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


def svdiff_packages() -> list[str]:
    """``svdiff`` and its sub-packages, which live under python/."""
    base = ROOT / "python"
    return sorted(".".join(init.parent.relative_to(base).parts) for init in (base / "svdiff").rglob("__init__.py"))


def kernel_packages() -> list[str]:
    """``svdiff_kernels`` and its sub-packages."""
    return sorted(
        ".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "svdiff_kernels").rglob("__init__.py")
    )


def miniature_data() -> list[str]:
    """Every file below svdiff/miniature that is not code: the weights that ship with the package."""
    base = ROOT / "python" / "svdiff" / "miniature"
    return [str(f.relative_to(base)) for f in base.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")]


setup(
    packages=kernel_packages() + svdiff_packages(),
    package_data={"svdiff_kernels": ["py.typed"], "svdiff": ["py.typed"], "svdiff.miniature": miniature_data()},
    **extension_arguments(),
)
