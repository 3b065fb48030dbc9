"""examples/cpp: the CMake project as others use it, and the program that loads exported layers."""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import EXAMPLES, ROOT, python, run
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]


def build(folder: Path, *options: str, prefix: Path | None = None) -> Path:
    """The program, built by CMake."""
    prefixes = ";".join(map(str, filter(None, (torch.utils.cmake_prefix_path, prefix))))
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    find = f"-DCMAKE_PREFIX_PATH={prefixes}"
    for command in (
        ["cmake", *generator, "-S", EXAMPLES / "cpp", "-B", folder, find, *options],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "warning:" not in done.stdout + done.stderr  # of the compiler
    return folder / "spectral_layer"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library was built, as a part of the program, and its test."""
    folder = tmp_path_factory.mktemp("subdirectory")
    build(folder, f"-DSVDIFF_SOURCE_DIR={ROOT}", "-DSVDIFF_BUILD_TESTS=ON", "-DSVDIFF_CUDA=OFF")
    return folder


@pytest.fixture(scope="module")
def program(tree: Path) -> Path:
    return tree / "spectral_layer"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    python("cpp/export_layer.py", folder, "--seed", "3")
    return folder


def check(program: Path, exported: Path) -> None:
    """It computes what Python does, under each fine-tune and under both at once, and says how long a call takes."""
    done = run(program, exported, "5")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+) +(\w+) +relative error (\S+)$", done.stdout, re.MULTILINE)
    assert {(layer, which) for layer, which, _ in found} == {
        (layer, which) for layer in ("conv", "linear") for which in ("first", "second", "both")
    }
    assert all(float(error) < 1e-5 for *_, error in found)
    timed = re.findall(r"^(conv|linear) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in timed] == ["conv", "linear"]
    assert all(float(time) > 0 for _, *times in timed for time in times)


def test_ops_from_cpp(tree: Path) -> None:
    done = run(tree / "svdiff_kernels" / "ops_test")
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


def test_built_along_with_the_program(program: Path, exported: Path) -> None:
    check(program, exported)


def test_found_where_it_is_installed(tree: Path, exported: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    done = run("cmake", "--install", tree, "--prefix", prefix)
    assert done.returncode == 0, done.stderr
    assert (prefix / "include" / "svdiff" / "ops.h").is_file()
    (package,) = prefix.glob("lib*/cmake/svdiff_kernels")
    told = "".join(file.read_text() for file in package.iterdir())
    assert str(ROOT) not in told and str(Path(torch.__file__).parent) not in told  # it can be moved, and so can torch
    check(build(tmp_path / "build", prefix=prefix), exported)


def test_layers_of_a_lower_rank(program: Path, tmp_path: Path) -> None:
    python("cpp/export_layer.py", tmp_path, "--rank", "24")
    layers = load_file(tmp_path / "layers.safetensors")
    assert layers["linear.sigma"].shape == (24,) and layers["linear.weight"].shape == (640, 320)  # the residual form
    check(program, tmp_path)


def test_another_answer_is_noticed(program: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "second" / "spectral_shifts.safetensors"
    deltas = load_file(path)
    deltas["conv.delta"][0] += 1.0
    save_file(deltas, path)
    done = run(program, tmp_path, "1")
    assert done.returncode == 1 and done.stderr == "not what Python computed\n"


def header(changes: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        told = json.loads(content[8 : 8 + length])
        changes(told)
        text = json.dumps(told).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return change


def claim(key: str, **what: object) -> Callable[[bytes], bytes]:
    return header(lambda told: told[key].update(what))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:5], "it is too short"),
        (lambda content: content[:-4], "a tensor lies outside of the file"),
        (lambda content: struct.pack("<Q", 1 << 60) + content[8:], "its header is longer than the file"),
        (lambda content: content[:8] + b"[" + content[9:], "its header lacks a '{'"),
        (lambda content: struct.pack("<Q", 20) + content[8:28], "its header"),
        (claim("conv.delta", dtype="C64"), "type C64 is not read here"),
        (claim("conv.delta", shape=[1 << 40, 1 << 40]), "a tensor is too large"),
        (claim("conv.delta", shape=[95]), "a tensor's place does not fit its shape"),
        (claim("conv.delta", data_offsets=[96, 0]), "a tensor lies outside of the file"),
        (claim("conv.delta", offset=0), "its header says 'offset' of a tensor"),
    ],
)
def test_a_damaged_file_is_refused(
    damage: Callable[[bytes], bytes], message: str, program: Path, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "second" / "spectral_shifts.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    done = run(program, tmp_path, "1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{path} is not a readable safetensors file: ") and message in done.stderr


def test_shifts_of_another_layer_are_refused(program: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "first" / "spectral_shifts.safetensors"
    save_file({"conv.delta": torch.zeros(7), "linear.delta": torch.zeros(320)}, path)
    done = run(program, tmp_path, "1")
    assert done.returncode == 1 and done.stderr == "the delta is for a layer of another rank\n"


def test_what_cannot_be_exported_is_refused() -> None:
    code = (
        "import sys; sys.path.insert(0, {folder!r}); import svdiff, export_layer; from pathlib import Path; "
        "from torch import nn; model = nn.Sequential({layer}); svdiff.attach(model, cache=False); "
        "export_layer.export(model, Path('never'))"
    )
    for layer in ("nn.LayerNorm(4)", "nn.Conv2d(4, 4, 3, padding='same')", "nn.Conv2d(4, 4, 3, groups=2)"):
        done = run(sys.executable, "-c", code.format(folder=str(EXAMPLES / "cpp"), layer=layer))
        assert done.returncode == 1 and "SVDiffError: 0 cannot be exported" in done.stderr, done.stderr
