"""Builds the optional extension ``svdiff_kernels._C``; all metadata lives in pyproject.toml.

``SVDIFF_BUILD`` chooses what to build: ``auto`` (the default: what this machine can), ``cpu`` (fail if it cannot) or
``none`` (Python only, the reference backend serves every op).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
NAMES = ("bindings", "dispatch", "autograd", "layers", "cpu/expand", "cpu/frozen", "cpu/gemm")
SOURCES = [f"csrc/{name}.cpp" for name in NAMES]
HEADERS = ["csrc/ops.h", "csrc/dispatch.h", "csrc/autograd.h", "csrc/cpu/gemm.h"]


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


def extension_arguments() -> dict[str, Any]:
    """The part of setup()'s arguments that builds the extension; empty where it is not wanted or not possible."""
    choice = os.environ.get("SVDIFF_BUILD", "auto")
    if choice not in ("auto", "cpu", "none"):
        sys.exit(f"SVDIFF_BUILD={choice!r} is not one of auto, cpu, none")
    if choice == "none":
        return {}
    if lacking := missing_tool():
        if choice == "cpu":
            sys.exit(f"SVDIFF_BUILD=cpu, but {lacking}")
        print(
            f"svdiff-kernels: built without its C++ extension, the reference backend serves: {lacking}", file=sys.stderr
        )
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """BuildExtension whose failure is a notice unless the extension was asked for by name."""

        extensions: list[Any]

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if choice == "cpu":
                    raise
                self.extensions = []
                cause = str(error).strip().splitlines()[-1]
                print(f"svdiff-kernels: extension not built, the reference backend serves: {cause}", file=sys.stderr)

    extension = CppExtension(
        "svdiff_kernels._C",
        SOURCES,
        depends=HEADERS,
        extra_compile_args={"cxx": ["-O3", "-fopenmp", "-fno-math-errno", "-Wall"]},
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
    package_data={"svdiff_kernels": ["py.typed"], "svdiff.miniature": miniature_data()},
    **extension_arguments(),
)
