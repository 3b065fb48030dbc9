"""How each metric of ``svdiff evaluate`` is computed from an entry's pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..miniature import NAME as MINIATURE
from ..pipelines import device_of_choice
from . import metrics
from .encoders import Encoder, load_clip, load_dino, load_inception
from .intervals import Metric, estimate
from .lpips import load_lpips
from .pictures import Judged, open_picture
from .table import Figure

if TYPE_CHECKING:
    from ..evaluate import EvaluateConfig

_FID_RESAMPLES = 200  # each takes a singular value decomposition


@dataclass(frozen=True)
class Entry:
    """What is judged under one name.

    Attributes:
        name: of it.
        pictures: of the subject, or of whatever the prompts say.
        class_pictures: of other things.
    """

    name: str
    pictures: list[Judged]
    class_pictures: list[Judged]


class Networks:
    """What is loaded, once for all metrics, and the features that it has given."""

    def __init__(self, config: EvaluateConfig, clip: str | None) -> None:
        device = device_of_choice(config.device)
        self.clip = load_clip(clip, device) if clip else None
        self.dino = load_dino(config.dino, device) if config.dino else None
        self.inception = load_inception(config.inception, device) if config.inception else None
        self.lpips = load_lpips(config.lpips, device) if config.lpips else None
        self.sources = {one.name: one.source for one in (self.clip, self.dino, self.inception) if one}
        if self.lpips and config.lpips:
            self.sources[self.lpips.name] = config.lpips
        if clip == MINIATURE:
            self.sources["recogniser"] = "rules of the miniature's world"
        self._batch_size = config.batch_size
        self._known: dict[tuple[str, tuple[Path, ...]], Tensor] = {}

    def features(self, encoder: Encoder, pictures: Sequence[Judged]) -> Tensor:
        """Of pictures ``[N, D]``."""
        key = encoder.name, tuple(picture.path for picture in pictures)
        if key not in self._known:
            self._known[key] = encoder.images(pictures, self._batch_size)
        return self._known[key]


@dataclass(frozen=True)
class Measurement:
    """One metric of one entry, and what it is computed from."""

    config: EvaluateConfig
    networks: Networks
    entry: Entry
    references: Sequence[Judged]
    base: Sequence[Judged]
    metric: str

    @property
    def pictures(self) -> Sequence[Judged]:
        """The entry's, of its prompts."""
        return self.entry.pictures

    def figure(self, features: str, metric: Metric, count: int) -> Figure:
        """The metric of so many pictures, with its interval."""
        is_fid = self.metric.endswith("fid")
        found = estimate(
            metric,
            count,
            confidence=self.config.confidence,
            resamples=min(self.config.resamples, _FID_RESAMPLES) if is_fid else self.config.resamples,
            seed=self.config.seed,
            centred=is_fid,
        )
        if is_fid:  # which is never less than 0, but its interval has been moved
            found = replace(found, low=max(0.0, found.low))
        return Figure(self.entry.name, self.metric, features, found)

    def compared(
        self,
        metric: Callable[..., Tensor],
        encoders: Sequence[Encoder | None],
        pictures: Sequence[Judged],
        others: Sequence[Judged],
    ) -> list[Figure]:
        """A metric of two sets' features, for each encoder."""
        found = []
        for encoder in filter(None, encoders):
            images, theirs = self.networks.features(encoder, pictures), self.networks.features(encoder, others)
            found.append(self.figure(encoder.name, partial(metric, images, theirs), len(pictures)))
        return found

    def share(self, right: Callable[[Judged], bool], pictures: Sequence[Judged]) -> list[Figure]:
        """In how many of the pictures the recogniser finds it right."""
        values = torch.tensor([float(right(picture)) for picture in pictures])
        return [self.figure("recogniser", partial(metrics.mean, values), len(pictures))]


def _text_alignment(m: Measurement) -> list[Figure]:
    clip = m.networks.clip
    assert clip is not None
    prompts = [without(picture.prompt or "", m.config.modifier_token or []) for picture in m.pictures]
    images, texts = m.networks.features(clip, m.pictures), clip.texts(prompts)
    return [m.figure(clip.name, partial(metrics.text_alignment, images, texts), len(images))]


def without(prompt: str, words: Sequence[str]) -> str:
    """A prompt with some words left out."""
    for word in words:
        prompt = re.sub(rf"(?<!\S){re.escape(word)}(?![^\s,.;:!?])", " ", prompt)
    return " ".join(prompt.split())


def _image_alignment(m: Measurement) -> list[Figure]:
    return m.compared(metrics.image_alignment, (m.networks.clip, m.networks.dino), m.pictures, m.references)


def _distance_of_sets(metric: Callable[..., Tensor], m: Measurement) -> list[Figure]:
    pictures, others = (m.entry.class_pictures, m.base) if m.metric.startswith("class") else (m.pictures, m.references)
    if pictures is others:
        return []  # the base model itself
    return m.compared(metric, (m.networks.clip, m.networks.dino, m.networks.inception), pictures, others)


def _diversity(m: Measurement) -> list[Figure]:
    prompts = [picture.prompt for picture in m.pictures]
    found = []
    if m.networks.lpips:
        distances = m.networks.lpips.distances(m.pictures, [prompt or "" for prompt in prompts])
        found.append(m.figure(m.networks.lpips.name, partial(metrics.diversity, distances, prompts), len(prompts)))
    for encoder in filter(None, (m.networks.clip, m.networks.dino)):
        distances = metrics.cosine_distances(m.networks.features(encoder, m.pictures))
        found.append(m.figure(encoder.name, partial(metrics.diversity, distances, prompts), len(prompts)))
    return found


def _drift(m: Measurement) -> list[Figure]:
    pictures = m.entry.class_pictures
    if pictures is m.base:
        return []
    found = m.compared(metrics.drift, (m.networks.clip, m.networks.dino), pictures, m.base)
    if m.networks.lpips:
        values = m.networks.lpips.pairs(pictures, m.base)
        found.append(m.figure(m.networks.lpips.name, partial(metrics.mean, values), len(pictures)))
    return found


def _subject_shown(m: Measurement) -> list[Figure]:
    from ..miniature.recogniser import shows_subject

    subject = m.config.subject or ""
    return m.share(lambda picture: shows_subject(open_picture(picture), subject), m.pictures)


def _captions_read(m: Measurement) -> list[Figure]:
    from ..miniature.claims import of_reading, said, true
    from ..miniature.recogniser import read

    pictures = m.entry.class_pictures if m.metric.startswith("class") else m.pictures
    return m.share(lambda picture: true(said(picture.prompt or ""), of_reading(read(open_picture(picture)))), pictures)


MEASURES: dict[str, Callable[[Measurement], list[Figure]]] = {
    "text_alignment": _text_alignment,
    "image_alignment": _image_alignment,
    "kid": partial(_distance_of_sets, metrics.kid),
    "fid": partial(_distance_of_sets, metrics.fid),
    "diversity": _diversity,
    "drift": _drift,
    "class_kid": partial(_distance_of_sets, metrics.kid),
    "class_fid": partial(_distance_of_sets, metrics.fid),
    "subject_shown": _subject_shown,
    "captions_read": _captions_read,
    "class_captions_read": _captions_read,
}
