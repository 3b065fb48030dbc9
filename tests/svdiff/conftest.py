"""Fixtures for svdiff: a tiny pipeline, on disk and in memory, and pictures to train it on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from svdiff import TrainConfig, termination
from tiny import tiny_unet
from tiny_pipelines import PIPELINES


@pytest.fixture(autouse=True, scope="session")
def _cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No test touches the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in a terminal: shells start background jobs, as the tests may be, deaf to Ctrl-C. No test leaves a handler."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(termination, "_received", None)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives each of `PIPELINES` as a folder."""

    @cache
    def saved(name: str) -> Path:
        folder = tmp_path_factory.mktemp("base")
        PIPELINES[name](tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def base(base_of: Callable[[str], Path]) -> Path:
    """The pipeline as a folder."""
    return base_of("sd")


@pytest.fixture
def pipeline(base: Path) -> Any:
    """The pipeline in memory."""
    from svdiff.pipelines import load_pipeline

    return load_pipeline(str(base))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines that `train` has loaded in this test, the newest last: as it has left them."""
    from svdiff.pipelines import load_pipeline

    kept: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        kept.append(load_pipeline(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(import_module("svdiff.train"), "load_pipeline", load)
    return kept


@pytest.fixture
def unet() -> Any:
    """The denoiser alone."""
    return tiny_unet()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of noise, of different sizes and shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (16, 16), "b.png": (24, 20), "c.jpg": (17, 31)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def config(base: Path, pictures: Path, tmp_path: Path) -> TrainConfig:
    """Of a short training of the tiny pipeline."""
    return TrainConfig(
        str(base),
        str(pictures),
        instance_prompt="a sks dog",
        output_dir=str(tmp_path / "run"),
        max_train_steps=4,
        prior_generation_num_inference_steps=2,
        validation_num_inference_steps=2,
        report_to="none",
    )
