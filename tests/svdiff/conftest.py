"""Fixtures for svdiff: a tiny pipeline, on disk and in memory, and pictures to train it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline, tiny_unet


@pytest.fixture(autouse=True, scope="session")
def _cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No test touches the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as a folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(base: Path) -> Any:
    """The pipeline in memory."""
    from svdiff.pipelines import load_pipeline

    return load_pipeline(str(base))


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
