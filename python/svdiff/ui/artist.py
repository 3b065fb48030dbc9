"""The pipeline that the page draws with: loaded when the first picture is asked for, and adapters when they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..adapter import Adapter
from ..attach import attach
from ..checkpoint import FILE_NAMES
from ..generate import DTYPES, GenerateConfig
from ..mixtures import named_paths
from ..pipelines import default_resolution, device_of_choice, load_pipeline, set_scheduler
from ..sampling import sample, wanted_pictures
from ..training.families import family_of

OnStep = Callable[[int, int], None]
"""Told after each step of the sampler how many are done, and of how many."""


class Artist:
    """Draws what `GenerateConfig` describes, one call at a time; the model stays in memory.

    Args:
        model: folder, hub id, or miniature.
        dtype: see `GenerateConfig`.
    """

    def __init__(self, model: str, dtype: str) -> None:
        self._model, self._dtype = model, dtype
        self._lock = threading.Lock()
        self._pipeline: Any = None
        self._adapter: Adapter | None = None
        self._own_scheduler: Any = None
        self._loaded: dict[str, tuple[Path, tuple[int, ...]]] = {}

    def draw(self, config: GenerateConfig, mixes: Sequence[Mapping[str, float]], on_step: OnStep) -> list[Image]:
        """As `svdiff.generate` draws, prompt by prompt.

        Args:
            config: what to draw.
            mixes: how much of which of its shifts, for all prompts; nothing for the base model.
            on_step: see there.

        Raises:
            SVDiffError: the model cannot be loaded, or shifts do not fit it.
        """
        with self._lock:
            pipeline, adapter = self._load()
            for name, path in named_paths(config.spectral_shifts_ckpt or []).items():
                self._load_shifts(adapter, name, Path(path))
            pipeline.scheduler = self._own_scheduler
            if config.scheduler_type is not None:
                set_scheduler(pipeline, config.scheduler_type)
            wanted = wanted_pictures(config.prompt, config.num_images_per_prompt, config.seed)
            side = default_resolution(pipeline)
            with adapter.mixed({_inside(name): weight for name, weight in (mixes[0] if mixes else {}).items()}):
                images = sample(
                    pipeline,
                    [picture.prompt for picture in wanted],
                    [picture.seed for picture in wanted],
                    batch_size=config.batch_size,
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    resolution=(config.height or side, config.width or side),
                    negative_prompt=config.negative_prompt,
                    on_step=on_step,
                )
                return list(images)

    def _load(self) -> tuple[Any, Adapter]:
        if self._adapter is None:
            pipeline = load_pipeline(self._model)
            encoders = family_of(pipeline).trainable_encoders()  # T5, which nobody trains, is not worth decomposing
            adapter = attach(pipeline, text_encoder=list(encoders))
            pipeline.to(device_of_choice())
            if self._dtype != "fp32":
                pipeline.to(DTYPES[self._dtype])
            self._pipeline, self._adapter, self._own_scheduler = pipeline, adapter, pipeline.scheduler
        return self._pipeline, self._adapter

    def _load_shifts(self, adapter: Adapter, name: str, path: Path) -> None:
        """Unless they are loaded; but a run may have been gone on with since then."""
        files = filter(Path.exists, (path / name for name in FILE_NAMES.values()))
        found = path, tuple(file.stat().st_mtime_ns for file in files)
        if self._loaded.get(name) != found:
            adapter.load_weights(path, _inside(name), activate=False)
            self._loaded[name] = found


def _inside(name: str) -> str:
    """What the adapter of a run is called here: a run may be called "default" too."""
    return f"run {name}"
