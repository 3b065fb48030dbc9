"""Compiles the CUDA sources on a machine without a GPU, and says what became of them.

Results are kept in the user's cache directory by the content of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock

from csrc.cuda import build

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = platformdirs.user_cache_path("svdiff-kernels") / "tests"
ARCHITECTURES = ("8.0", "9.0a", "10.0a")
_KEEP = 30 * 24 * 3600  # seconds since it was last wanted
JOBS = 2  # a source with CUTLASS takes 5 GB
# Those that add up in whatever order they come. (ATOMS.OR, by which CUTLASS allots tensor memory, does not.)
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG", "ATOMS.ADD", "ATOMS.CAS", "ATOMS.CAST")
_INSTRUCTIONS = ("HGMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "LDG.E.128", "STG.E.128", "STL", "LDL", *ATOMICS)
_HOST_FLAGS = ("-std=c++20", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing")


@dataclass(frozen=True)
class Kernel:
    """A kernel in machine code: bytes of stack, and how often the instructions that matter occur."""

    source: str
    architecture: str
    name: str
    registers: int
    stack: int
    instructions: dict[str, int]


def cuobjdump() -> Path | None:
    """CUDA's, or the one that triton brings."""
    beside = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if beside:
        return Path(beside)
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return bundled if bundled and bundled.exists() else None


def compile_kernels() -> list[Kernel]:
    """Every kernel for every architecture that it is for."""
    jobs = [(source, only) for source, only in build.GEMMS.items() if build.cutlass_includes()]
    jobs += [(source, architecture) for source in build.PLAIN for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(JOBS) as pool:
        found = list(pool.map(lambda job: _kernels_of(*job), jobs))
    return [kernel for kernels in found for kernel in kernels]


def compile_binding() -> None:
    """The binding against this torch. A CPU build of torch has nothing to link it to."""
    flags = (*_HOST_FLAGS, "-DSVDIFF_SM90", "-DSVDIFF_SM100", f"-I{HERE / 'stub'}", *_includes())
    depends = [*_sources(), *(HERE / "stub").rglob("*.h")]
    _cached("binding.o", flags, depends, lambda out: _host("bindings.cpp", out, flags))


def refusals() -> list[str]:
    """What the GEMMs should have refused, and did not."""
    source = HERE / "refusals.cpp"
    objects = [str(_object_of(name, only)) for name, only in build.GEMMS.items()]
    folders = [f"-L{nvcc().root / folder}" for folder in ("lib64", "lib")]
    libraries = [*folders, "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/refusals"
        _run(["g++", "-std=c++17", f"-I{SOURCES}", *_includes(), str(source), *objects, *libraries, "-o", program])
        return _run([program]).splitlines()


def emulated() -> Path:
    """The ops as a library for CPUs: the binding and the kernels as they are, on the device of emulator/."""
    emulator = HERE / "emulator"
    flags = (*_HOST_FLAGS, "-O1", "-DSVDIFF_SM90", f"-I{emulator}", f"-I{SOURCES}", *_includes())
    names = ["bindings.cpp", *(f"{name}.cu" for name in build.PLAIN), str(emulator / "device.cpp")]

    def link(out: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
            objects = [Path(folder) / f"{i}.o" for i in range(len(names))]
            list(pool.map(lambda name, o: _host(name, o, flags), names, objects))
            lib = Path(torch.__file__).parent / "lib"
            torch_libraries = (f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}")
            _run(["g++", "-shared", "-o", str(out), *map(str, objects), *torch_libraries])

    return _cached("emulated.so", flags, [*_sources(), *(p for p in emulator.rglob("*") if p.is_file())], link)


@cache
def nvcc() -> build.Nvcc | None:
    """The compiler that setup.py would use."""
    return build.find_nvcc()


def _object_of(source: str, architecture: str) -> Path:
    headers = [p for p in _sources() if p.suffix in (".h", ".cuh") and (source in build.GEMMS or p.stem != "gemm")]
    depends = [SOURCES / f"{source}.cu", *headers]
    flags = [nvcc().version, *nvcc().command(source, [architecture], Path("out"))]
    flags += [build.cutlass_version()] if source in build.GEMMS else []
    return _cached(f"{source}.o", flags, depends, lambda out: _run(nvcc().command(source, [architecture], out)))


def _kernels_of(source: str, architecture: str) -> list[Kernel]:
    kernels = _object_of(source, architecture)

    def read(out: Path) -> None:
        usage, code = (_run([str(cuobjdump()), what, str(kernels)]) for what in ("-res-usage", "-sass"))
        out.write_text(json.dumps([asdict(k) for k in _read(source, architecture, usage, code)]))

    found = _cached("kernels.json", [kernels.name, str(_INSTRUCTIONS)], [], read)
    return [Kernel(**k) for k in json.loads(found.read_text())]


def _read(source: str, architecture: str, usage: str, code: str) -> Iterable[Kernel]:
    bodies = dict(zip(*[iter(re.split(r"Function : (\S+)", code)[1:])] * 2, strict=True))
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        body = bodies[name]
        counts = Counter({i: len(re.findall(rf"(?<![.\w]){re.escape(i)}\b", body)) for i in _INSTRUCTIONS})
        yield Kernel(source, architecture, name, int(registers), int(stack), dict(+counts))


def _host(name: str, out: Path, flags: Iterable[str]) -> None:
    language = ["-x", "c++"] if name.endswith(".cu") else []
    _run(["g++", *flags, *language, "-c", str(SOURCES / name), "-o", str(out)])


def _includes() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    folders = (nvcc().root / "include", include, include / "torch" / "csrc" / "api" / "include")
    return [part for folder in folders for part in ("-isystem", str(folder))]


def _sources() -> list[Path]:
    return [p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".cu", ".cuh", ".h")]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
    return done.stdout


def _cached(name: str, flags: Iterable[str], depends: Iterable[Path], make: Callable[[Path], object]) -> Path:
    """What `make` writes, unless it was written before for the same flags, files, torch and compilers."""
    told = [flag.replace(str(ROOT), "") for flag in flags]  # the same in every checkout
    key = hashlib.sha256(json.dumps([*told, torch.__version__, _run(["g++", "--version"])]).encode())
    for path in sorted(depends):
        key.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    kept = CACHE / f"{key.hexdigest()[:32]}-{name}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):  # tests run two at a time
        if kept.exists():
            kept.touch()
        else:
            for old in CACHE.glob(f"*-{name}*"):
                if time.time() - old.stat().st_mtime > _KEEP:
                    old.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                made = Path(folder) / name
                make(made)
                os.replace(made, kept)  # whole or not at all
    return kept
