"""svdiff cache: build, share and look after decompositions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import svdiff
import torch
from svdiff.cli import main
from svdiff.pipelines import load_pipeline

from svdiff_kernels import FactorCache
from svdiff_kernels import cache as cache_module


class Command:
    """``svdiff cache`` with a cache directory of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        code = main(["cache", *map(str, arguments), "--svd_cache_dir", str(self.folder)])
        out, err = self._capsys.readouterr()
        # Other libraries, loaded before the command could quieten them, show bars.
        lines = [line for line in err.splitlines() if line and not line.startswith("Loading weights")]
        return code, out.splitlines()[-1] if out else "", "\n".join(lines)

    @property
    def objects(self) -> set[str]:
        return {path.name for path in self.folder.glob("objects/*/*")}


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "cache", capsys)


@pytest.fixture
def other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "other", capsys)


@pytest.mark.parametrize("layout", ["full", "compact"])
def test_what_build_makes_is_what_attach_takes(
    command: Command, base: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told, _ = command("build", base, "--text_encoder", "--layout", layout)
    assert code == 0 and told.startswith("all ") and str(command.folder) in told
    monkeypatch.setattr(cache_module, "decomposed", None)  # nothing is left to decompose
    svdiff.attach(load_pipeline(str(base)), text_encoder=True, cache=FactorCache(command.folder))
    assert command("verify")[1].endswith("all sound")
    assert list((command.folder / "work").iterdir()) == []


def test_build_makes_truncated_ones_too(command: Command, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("build", base, "--rank", "3")[0] == 0
    monkeypatch.setattr(cache_module, "decomposed", None)
    svdiff.attach(load_pipeline(str(base)), rank=3, cache=FactorCache(command.folder))


@pytest.mark.slow
def test_processes_share_a_build(tmp_path: Path, base: Path) -> None:
    """Each decomposition is made once, and only the first process speaks."""
    flags = ["cache", "build", str(base), "--svd_cache_dir", str(tmp_path / "shared")]
    counted = tmp_path / "count.py"
    counted.write_text(
        "import os, sys\n"
        "from svdiff_kernels import cache\n"
        "made = cache.decomposed\n"
        "def counting(weights, *a, **k):\n"
        "    with open(os.environ['MADE'], 'a') as file:\n"
        "        file.write('.' * len(weights))\n"
        "    return made(weights, *a, **k)\n"
        "cache.decomposed = counting\n"
        "from svdiff.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", counted, *flags],
        env=os.environ | {"MADE": str(tmp_path / "made"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    store = FactorCache(tmp_path / "shared")
    assert store.verify() == {} and run.stdout.count("weights are decomposed") == 1
    assert len((tmp_path / "made").read_text()) == store.size()[0]


def test_one_folder_serves_all(command: Command, other: Command, base: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert command("push", base, shared)[2] == (
        "svdiff: error: 33 weights, such as denoiser.conv_in, are not in the cache: svdiff cache build makes them"
    ).replace("33", str(len(denoiser_weights(base))))
    command("build", base)
    assert command("push", base, shared)[1].startswith(f"{len(command.objects)} decompositions copied")
    assert command("push", base, shared)[1].startswith("0 decompositions copied")
    assert other("pull", base, shared)[1] == f"{len(command.objects)} decompositions pulled, 0 were there"
    assert other.objects == command.objects
    assert other("pull", base, shared)[1].startswith("all ")
    assert other("verify")[0] == 0


def denoiser_weights(base: Path) -> list[str]:
    unet = load_pipeline(str(base)).unet
    return [name for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]


def test_what_is_pulled_is_checked(command: Command, other: Command, base: Path, tmp_path: Path) -> None:
    command("build", base)
    command("push", base, tmp_path / "shared")
    first, second, *_ = sorted((tmp_path / "shared").glob("objects/*/*"))
    shutil.copy(second, first)
    code, _, error = other("pull", base, tmp_path / "shared")
    assert code == 2 and len(error.splitlines()) == 1 and first.name in error and "not " in error
    first.write_bytes(first.read_bytes()[:-7])
    code, _, error = other("pull", base, tmp_path / "shared")
    assert code == 2 and "damaged" in error
    assert first.name not in other.objects
    first.unlink()
    assert "1 are not in" in other("pull", base, tmp_path / "shared")[1]


class Hub:
    """A hub whose repositories are folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        for pattern in allow_patterns:
            (found,) = Path(folder_path).glob(pattern)
            place = self.folder / repo_id / found.relative_to(folder_path)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, place)

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], local_dir: str) -> None:
        for pattern in allow_patterns:
            for found in (self.folder / repo_id).glob(pattern):
                place = Path(local_dir) / found.relative_to(self.folder / repo_id)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, place)


def test_one_repository_serves_all(
    command: Command, other: Command, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    command("build", base, "--layout", "compact")
    (command.folder / "objects" / "private.txt").write_text("not to be shared")
    assert command("push", base, "somebody/factors")[1].endswith("pushed to somebody/factors")
    assert {path.name for path in hub.folder.rglob("*") if path.is_file()} == {
        name for name in command.objects if name.endswith(".safetensors")
    }
    assert other("pull", base, "somebody/factors")[0] == 0
    assert other("verify")[1] == f"{len(denoiser_weights(base))} decompositions, all sound"
    assert list((other.folder / "work").iterdir()) == []
    code, _, error = other("pull", base, "somebody/nothing", "--rank", "2")
    assert code == 2 and "no decomposition that this model lacks" in error


def test_a_hub_out_of_reach_is_one_line(command: Command, base: Path) -> None:
    code, _, error = command("pull", base, "somebody/factors")
    assert code == 2 and len(error.splitlines()) == 1 and "somebody/factors" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "build needs a model: svdiff cache build MODEL"),
        (["push", "miniature"], "push needs a place: svdiff cache push MODEL PLACE"),
        (["pull", "miniature", "nowhere"], "'nowhere' is neither a folder"),
        (["pull", "miniature", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["prune"], "prune needs max_bytes"),
    ],
)
def test_mistakes_are_one_line(command: Command, arguments: list[str], message: str) -> None:
    code, _, error = command(*arguments)
    assert code == 2 and error.startswith(f"svdiff: error: {message}") and len(error.splitlines()) == 1


def test_ls_lists_what_there_is(command: Command, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("build", base, "--layout", "compact", "--factor_dtype", "float16")
    main(["cache", "ls", "--svd_cache_dir", str(command.folder)])
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == len(command.objects) and all(" float16 " in line for line in lines)
    assert total.startswith(f"{len(lines)} decompositions, ")
