"""The wheels: what is in them, and what they do where there is nothing but what they ask for."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from svdiff_kernels import __version__

ROOT = Path(__file__).parents[2]
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "build", "dist", "site", "outputs", "bench-*", "*.egg-info", "*.so", "__pycache__", "venv"
)
KERNELS = """
import torch, svdiff_kernels as k
weight, x = torch.randn(5, 3), torch.randn(2, 3, requires_grad=True)
f = k.FactorCache("factors").get(weight)
delta = torch.zeros(3, requires_grad=True)
y = k.spectral_linear(x, f.U, f.sigma, f.Vh, delta)
y.square().sum().backward()
assert torch.allclose(y, x @ weight.T, atol=1e-4)
assert torch.allclose(x.grad, 2 * y @ weight, atol=1e-4) and delta.grad.abs().min() > 0
layer = k.nn.SpectralLinear.from_module(torch.nn.Linear(3, 5))
bank = k.Bank({"layer": layer})
bank.load_delta_dict("ink", {"layer": torch.ones(3)})
before = layer(x)
bank.set_mix({"ink": 1.0})
assert not torch.allclose(layer(x), before)
print(k.__file__, k.backends.serving("cpu"))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository without what was built in it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "svdiff-kernels", ignore=LEFT_BEHIND)


def build(checkout: Path, choice: str) -> Path:
    """The wheel of a choice of SVDIFF_BUILD, by way of the source distribution: see `make wheel`."""
    folder = checkout.parent / choice
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    ninja = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it is there, if anywhere
    env = os.environ | {"SVDIFF_BUILD": choice, "PATH": ninja}
    done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def pure(checkout: Path) -> Path:
    """The wheel of Python alone."""
    return build(checkout, "none")


@pytest.fixture(scope="module")
def compiled(checkout: Path) -> Path:
    """The wheel with the extension for CPUs."""
    return build(checkout, "cpu")


def link_requirements(site: Path, extra: str) -> None:
    """Give an environment what the wheel in it requires, and what that requires, from the one that runs this test.

    All but Triton, which a CUDA build of torch brings.
    """
    (own,) = distributions(path=[str(site)])
    waiting, seen = [(own, extra)], {"triton"}
    while waiting:
        dist, extra = waiting.pop()
        for line in dist.requires or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            if (name := requirement.name.lower()) not in seen:
                seen.add(name)
                waiting.append((distribution(name), ""))
                link(waiting[-1][0], site)


def link(dist: Distribution, site: Path) -> None:
    for top in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(dist.locate_file(top))


class Environment:
    """A virtual environment with a wheel in it and what that requires; no compiler is on its PATH."""

    def __init__(self, where: Path, wheel: Path, extra: str = "") -> None:
        self.where, self.bin = where, where / "venv" / "bin"
        venv.create(where / "venv", with_pip=False, symlinks=True)
        python = str(self.bin / "python")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", str(wheel)]
        done = subprocess.run(pip, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (self.site,) = (where / "venv" / "lib").glob("python*/site-packages")
        link_requirements(self.site, extra)

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "HOME": str(self.where), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [str(self.bin / program), *arguments]
        return subprocess.run(command, env=env, cwd=self.where, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def bare(pure: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The pure wheel, without diffusers, transformers, PEFT, Triton and a compiler."""
    return Environment(tmp_path_factory.mktemp("bare"), pure)


@pytest.fixture(scope="module")
def full(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """``pip install svdiff-kernels[diffusers]``, of the wheel with the extension."""
    return Environment(tmp_path_factory.mktemp("full"), compiled, "diffusers")


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheels_hold_the_packages_and_nothing_else(checkout: Path, pure: Path, compiled: Path) -> None:
    ours = {
        str(file.relative_to(base))
        for base, package in ((checkout, "svdiff_kernels"), (checkout / "python", "svdiff"))
        for file in (base / package).rglob("*")
        if file.is_file()
    }
    assert {"svdiff_kernels/py.typed", "svdiff/py.typed", "svdiff/miniature/weights/model_index.json"} <= ours
    assert contents(pure) == ours
    (extension,) = contents(compiled) - ours
    assert re.fullmatch(r"svdiff_kernels/_C\.[\w-]+\.so", extension) and contents(compiled) > ours


def test_the_wheels_are_tagged_by_where_they_run(pure: Path, compiled: Path) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert pure.name == f"svdiff_kernels-{__version__}-py3-none-any.whl"
    assert compiled.name == f"svdiff_kernels-{__version__}-{python}-{python}-linux_{platform.machine()}.whl"


def test_the_source_distribution_holds_what_cuda_is_built_from(checkout: Path, pure: Path) -> None:
    (archive,) = pure.parent.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    sources = {str(file.relative_to(checkout)) for file in (checkout / "csrc").rglob("*") if file.is_file()}
    assert "csrc/cuda/expand_pointwise.cu" in sources and sources <= names
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"} <= names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/", "docs/", "examples/"))}


def test_there_is_one_version() -> None:
    said = {
        "CMakeLists.txt": r"^project\(svdiff_kernels VERSION (\S+)",
        "CITATION.cff": r"^version: (\S+)",
        "CHANGELOG.md": r"^## (\S+)",
    }
    for name, pattern in said.items():
        found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert found and found[1] == __version__, name


def test_kernels_need_nothing_optional(bare: Environment) -> None:
    done = bare.run("python", "-c", KERNELS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{bare.site}/svdiff_kernels/__init__.py reference\n"
    optional = ["diffusers", "transformers", "peft", "triton", "accelerate", "PIL"]
    absent = f"import importlib.util as i; print([m for m in {optional} if i.find_spec(m)])"
    assert bare.run("python", "-c", absent).stdout == "[]\n"


@pytest.mark.parametrize("command", [("python", "-m", "svdiff_kernels.info"), ("svdiff", "info")], ids=" ".join)
def test_info_says_what_is_missing_and_why(command: tuple[str, ...], bare: Environment) -> None:
    done = bare.run(*command)
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert facts["svdiff_kernels"] == __version__, done.stderr
    assert facts["extension"].startswith("not used: it was not built")
    assert facts["C++ compiler"] == "none ('c++' is not on the PATH)"
    assert facts["triton"] == "not used: triton is not installed"
    assert facts["expand on cpu"] == "reference"


def test_the_command_line_is_there(bare: Environment) -> None:
    assert bare.run("svdiff", "--version").stdout == f"{__version__}\n"
    assert "teach a model a subject" in bare.run("svdiff", "--help").stdout
    assert bare.run("svdiff", "info", "--help").stdout.startswith("usage: svdiff info")
    assert bare.run("svdiff", "info", "more").stderr == (
        "svdiff: error: unrecognized arguments: more (see svdiff info --help)\n"
    )


def test_a_command_without_its_libraries_names_the_extra(bare: Environment) -> None:
    done = bare.run("svdiff", "train", "--instance_data_dir", "photos")
    assert done.returncode == 2
    line = re.compile(r'svdiff: error: svdiff (\w+) needs \w+: pip install "svdiff-kernels\[diffusers\]"\n')
    assert line.fullmatch(done.stderr), done.stderr
    every = "from svdiff import cli; print([cli.main([name]) for name in cli.COMMANDS if name != 'info'])"
    done = bare.run("python", "-c", every)
    told = [line.fullmatch(text) for text in done.stderr.splitlines(keepends=True)]
    assert all(told) and len({match[1] for match in told if match}) == len(told), done.stderr
    assert done.stdout == f"{[2] * len(told)}\n" and len(told) > 8


def test_svdiff_attaches_to_any_module_and_names_the_extra_of_the_rest(bare: Environment) -> None:
    code = """
import torch, svdiff
model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
adapter = svdiff.attach(model)
print(adapter.num_parameters())
adapter.unload()
for name in sorted(set(svdiff.__all__)):
    try:
        getattr(svdiff, name)
    except Exception as error:
        print(name, type(error).__name__, error)
"""
    done = bare.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    number, *errors = done.stdout.splitlines()
    assert number == "8"
    pattern = re.compile(r'(\w+) SVDiffError svdiff\.\1 needs \w+: pip install "svdiff-kernels\[diffusers\]"')
    names = [match[1] for line in errors if (match := pattern.fullmatch(line))]
    assert len(names) == len(errors) and {"train", "TrainConfig", "generate", "edit", "combine"} <= set(names)


def test_the_extra_brings_all_that_the_command_line_needs(full: Environment) -> None:
    done = full.run("python", "-c", KERNELS)
    assert done.stdout == f"{full.site}/svdiff_kernels/__init__.py cpu\n", done.stderr
    done = full.run(
        *("svdiff", "generate", "--pretrained_model_name_or_path", "miniature", "--prompt", "a red circle"),
        *("--num_inference_steps", "2", "--output_dir", "out"),
    )
    assert done.returncode == 0, done.stderr
    assert list((full.where / "out").glob("*.png"))


def test_what_needs_the_repository_says_so(full: Environment) -> None:
    done = full.run("svdiff", "bench", "unet")
    assert done.returncode == 2
    assert done.stderr == (
        "svdiff: error: the benchmarks are not part of the wheel: run this from a checkout of the repository\n"
    )
