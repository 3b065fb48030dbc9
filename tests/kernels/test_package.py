"""What importing does, which backend serves, and what a build without a compiler gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from svdiff_kernels import backends
from svdiff_kernels.info import info

ROOT = Path(__file__).parents[2]


def python(*code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code], env=os.environ | env, cwd=ROOT, capture_output=True, text=True, timeout=250
    )


def test_importing_needs_torch_alone() -> None:
    heavy = "('diffusers', 'transformers', 'triton', 'peft', 'accelerate', 'svdiff')"
    done = python(
        "-c",
        "import sys, torch; before = set(sys.modules); import svdiff_kernels as k; "
        f"new = set(sys.modules) - before; print([m for m in {heavy} if m in new]); "
        "print(torch.cuda.is_initialized(), k.__version__, sorted(k.__all__))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[]"
    assert done.stdout.splitlines()[1].startswith("False 0.1.0 ['Bank', 'FactorCache', 'Factors', 'SVDiffError'")


def test_the_kernels_do_not_know_the_diffusers_layer() -> None:
    for source in (ROOT / "svdiff_kernels").rglob("*.py"):
        text = source.read_text()
        assert "import svdiff\n" not in text and "from svdiff " not in text and "from svdiff." not in text, source
        assert "diffusers" not in text.replace("svdiff-pytorch", ""), source


def test_reference_backend_can_be_forced() -> None:
    script = "import svdiff_kernels as k; print(k.backends.serving('cpu'), k.backends.why_no_extension)"
    done = python("-c", script, SVDIFF_BACKEND="reference")
    assert done.stdout == "reference SVDIFF_BACKEND=reference asks for plain torch\n"


def test_functionals_hold_on_the_reference_backend() -> None:
    done = python(
        "-m",
        "pytest",
        "tests/kernels/test_functional.py",
        "-k",
        "(fp64_recomposition and float32) or memory_format or no_rows or small_gradient",
        "-p",
        "no:cacheprovider",
        SVDIFF_BACKEND="reference",
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_an_unknown_backend_is_refused() -> None:
    done = python("-c", "import svdiff_kernels", SVDIFF_BACKEND="gpu")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "SVDIFF_BACKEND='gpu' is not one of auto, reference, cpu, cuda, triton"
    )


def importing_from(folder: Path) -> str:
    """The start of a script that imports from there, and not what an editable install of this checkout would add."""
    return (
        f"import sys; sys.path.insert(0, {str(folder)!r}); "
        "sys.meta_path = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']; "
    )


def copy_of_the_package(where: Path) -> Path:
    """The sources without what was built in place."""
    shutil.copytree(
        ROOT / "svdiff_kernels", where / "svdiff_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return where


def test_a_forced_extension_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    run = (
        importing_from(copy_of_the_package(tmp_path)) + "import svdiff_kernels as k; print(k.backends.why_no_extension)"
    )
    done = python("-c", run, SVDIFF_BACKEND="cpu")
    assert done.returncode == 1
    assert "SVDIFF_BACKEND=cpu, but there is no C++ extension: it was not built" in done.stderr.splitlines()[-1]
    assert "it was not built" in python("-c", run).stdout


@pytest.mark.skipif(not backends.why_no_cuda, reason="there are CUDA kernels")
def test_forced_cuda_kernels_that_were_not_built_are_an_error() -> None:
    done = python("-c", "import svdiff_kernels", SVDIFF_BACKEND="cuda")
    assert done.returncode == 1
    why = "there is no C++ extension" if backends.extension is None else "no CUDA kernels were built"
    assert f"SVDIFF_BACKEND=cuda, but {why}" in done.stderr.splitlines()[-1]


def test_info_tells_what_serves() -> None:
    facts = info()
    assert facts["expand on cpu"] == backends.serving("cpu")
    if backends.extension is not None:
        assert "built against torch" in facts["extension"] and "OpenMP True" in facts["extension"]
    assert facts["cuda kernels"].startswith("not used: " if backends.why_no_cuda else "CUDA ")
    done = python("-m", "svdiff_kernels.info", SVDIFF_BACKEND="reference")
    lines = dict(
        line.split(None, 1) for line in done.stdout.splitlines() if line.startswith(("svdiff", "ext", "SVDIFF"))
    )
    assert lines["svdiff_kernels"] == "0.1.0" and lines["SVDIFF_BACKEND"] == "reference"
    assert lines["extension"] == "not used: SVDIFF_BACKEND=reference asks for plain torch"


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "svdiff_kernels", "python"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "-v", "--no-build-isolation", "--no-deps", "-w", "wheels"]
    return subprocess.run(command, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, timeout=280)


def unpacked(tmp_path: Path) -> Path:
    """What the wheel that `build` made would put into site-packages."""
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    return tmp_path / "site"


@pytest.mark.parametrize(
    ("env", "notice"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler ('no-such-compiler' is not on the PATH)"),
        ({"CXX": "false"}, "extension not built, the reference backend serves"),
    ],
    ids=["no compiler", "broken compiler"],
)
def test_builds_without_the_extension(env: dict[str, str], notice: str, tmp_path: Path) -> None:
    done = build(tmp_path, **env)
    assert done.returncode == 0, done.stdout[-2000:]
    assert notice in done.stdout + done.stderr
    site = unpacked(tmp_path)
    assert not list(site.rglob("*.so")) and (site / "svdiff" / "__init__.py").exists()
    run = "import svdiff_kernels as k; print(k.__file__, k.backends.serving('cpu'))"
    done = python("-c", importing_from(site) + run)
    assert done.stdout.startswith(str(site)) and done.stdout.endswith(" reference\n"), done.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"SVDIFF_BUILD": "cpu", "CXX": "no-such-compiler"},
        {"SVDIFF_BUILD": "cuda", "CXX": "no-such-compiler"},
        {"SVDIFF_BUILD": "gpu"},
    ],
    ids=str,
)
def test_a_build_that_was_asked_for_must_not_fail_silently(env: dict[str, str], tmp_path: Path) -> None:
    done = build(tmp_path, **env)
    assert done.returncode != 0
    assert "SVDIFF_BUILD" in done.stdout + done.stderr
