"""How the CUDA sources are compiled: what setup.py and the tests have in common. CMakeLists.txt says the same in CMake.

nvcc is called directly, a source at a time, since each has architectures of its own: what torch's BuildExtension gives
to one .cu file it gives to all.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).parent
PLAIN = ("expand_pointwise", "bank")
"""Kernels for every architecture."""
GEMMS = {"gemm_sm90": "9.0a", "gemm_sm100": "10.0a"}
"""Kernels that need CUTLASS, and the one architecture that each is for."""
USUAL = ("8.0", "9.0", "10.0", "12.0")
"""Machine code for one of these runs on all of its generation."""
# NDEBUG: the calls behind an assertion would have ptxas wait for every single wgmma.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC")


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler, and the toolkit that it belongs to."""

    program: str

    @cached_property
    def version(self) -> str:
        """As in "13.0.88"."""
        told = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"V([\d.]+)", told)
        return found[1] if found else "unknown"

    @cached_property
    def root(self) -> Path:
        """Where include/ and the libraries lie; the program itself may be a script elsewhere."""
        command = [self.program, "--dryrun", "-x", "cu", "-E", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
        return Path(found[1] if found else self.program).resolve()

    @cached_property
    def architectures(self) -> list[str]:
        """Of the usual, those that it knows."""
        told = subprocess.run([self.program, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        return [a for a in USUAL if f"sm_{a.replace('.', '')}" in told.split()]

    def command(self, source: str, architectures: list[str], out: Path) -> list[str]:
        """What compiles ``source``, a name of PLAIN or GEMMS, to an object."""
        include = [f"-I{path}" for path in cutlass_includes()] if source in GEMMS else []
        targets = [f"-gencode={target(a)}" for a in architectures]
        return [self.program, *FLAGS, *include, *targets, "-c", str(HERE / f"{source}.cu"), "-o", str(out)]


def find_nvcc() -> Nvcc | None:
    """That of ``CUDA_HOME``, or the one on the PATH, or where CUDA installs itself."""
    places = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    program = shutil.which("nvcc", path=str(places[0])) if places else None
    program = program or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Nvcc(program) if program else None


def cutlass_includes() -> list[Path]:
    """CUTLASS's headers: those of ``CUTLASS_PATH``, a checkout, or of the package ``nvidia-cutlass``; else nothing."""
    root = Path(os.environ["CUTLASS_PATH"]) if os.environ.get("CUTLASS_PATH") else None
    if root is None:
        package = importlib.util.find_spec("cutlass_library")
        root = Path(package.origin).parent / "source" if package and package.origin else None
    if root is None or not (root / "include" / "cutlass" / "cutlass.h").exists():
        return []
    return [root / "include", root / "tools" / "util" / "include"]


def cutlass_version() -> str:
    """As in "4.2.0"."""
    text = (cutlass_includes()[0] / "cutlass" / "version.h").read_text()
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", text))


def wanted_architectures(nvcc: Nvcc) -> list[str]:
    """Of ``TORCH_CUDA_ARCH_LIST``, such as "8.0;9.0a+PTX"; if that is not set, one of each generation."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    return asked or [*nvcc.architectures[:-1], f"{nvcc.architectures[-1]}+PTX"]


def is_architecture(name: str) -> bool:
    """Is it a number such as "8.0", "9.0a" or "12.0+PTX"?"""
    return re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name) is not None


def number(architecture: str) -> float:
    """9.0 for "9.0a"."""
    return float(re.sub(r"[af]?(\+PTX)?$", "", architecture))


def target(architecture: str) -> str:
    """An architecture as nvcc's -gencode names it."""
    name = architecture.removesuffix("+PTX").replace(".", "")
    code = f"[sm_{name},compute_{name}]" if architecture.endswith("+PTX") else f"sm_{name}"
    return f"arch=compute_{name},code={code}"


def plan(architectures: list[str]) -> dict[str, list[str]]:
    """Which source to compile for which architectures."""
    numbers = {number(a) for a in architectures}
    sources = {name: architectures for name in PLAIN}
    if cutlass_includes():
        sources |= {name: [only] for name, only in GEMMS.items() if number(only) in numbers}
    return sources


def definitions(sources: dict[str, list[str]]) -> dict[str, str | None]:
    """The macros by which the C++ side knows which GEMMs there are."""
    return {f"SVDIFF_{name.removeprefix('gemm_').upper()}": None for name in sources if name in GEMMS}
