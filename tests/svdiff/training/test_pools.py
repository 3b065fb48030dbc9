"""Pools and the objective: which pictures are in a batch, of what size, and what their losses weigh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from svdiff import TrainConfig, train
from svdiff.training.data import Loaded, Size, buckets_of
from svdiff.training.dreambooth import DreamBooth, Pool
from svdiff.training.families import family_of
from svdiff.training.noising import Diffusion
from svdiff.training.sources import Captions, Latents
from tiny import RESOLUTION
from torch import Tensor

from svdiff_kernels import SVDiffError

SQUARE, WIDE, TALL = (16, 16), (16, 32), (32, 16)


def picture(size: Size, seed: int) -> Loaded:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Loaded(Image.fromarray(pixels), size, size)


def pool(sizes: Sequence[Size], name: str = "instance", seed: int = 0, first: int = 0) -> Pool:
    pictures = [picture(size, i) for i, size in enumerate(sizes)]
    numbers = list(range(first, len(sizes)))
    return Pool(name, numbers, pictures, [str(i) for i in range(len(sizes))], None, seed)


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_every_picture_comes_once_before_any_comes_again(total: int) -> None:
    one = pool([SQUARE] * 5)
    drawn = [number for batch in range(10) for number in one.pictures_of(batch, range(total), total)]
    for start in range(0, len(drawn) - 4, 5):
        assert sorted(drawn[start : start + 5]) == list(range(5))
    assert drawn[:5] != drawn[5:10]


def test_a_batch_has_one_size_and_sizes_come_as_often_as_pictures_have_them() -> None:
    sizes = [SQUARE, WIDE, WIDE, SQUARE, WIDE, TALL]
    one = pool(sizes)
    counts: Counter[int] = Counter()
    for batch in range(6 * 4):
        numbers = one.pictures_of(batch, range(3), 3)
        assert {sizes[number] for number in numbers} == {one.size_of(batch)}
        counts.update(numbers)
    assert set(counts.values()) == {3 * 4}  # a round of six batches shows each picture as often as a batch has places
    first_round = Counter(one.size_of(batch) for batch in range(6))
    assert first_round == Counter(sizes)


def test_a_batch_is_the_same_whoever_asks_and_when() -> None:
    """Two processes draw the halves of what one would, and a resumed run what an uninterrupted one would."""
    sizes = [SQUARE, WIDE, WIDE, TALL]
    whole = [pool(sizes).pictures_of(batch, range(4), 4) for batch in range(9)]
    first, second = pool(sizes), pool(sizes)
    halves = [first.pictures_of(b, range(2), 4) + second.pictures_of(b, range(2, 4), 4) for b in reversed(range(9))]
    assert halves[::-1] == whole
    assert [pool(sizes, seed=1).pictures_of(batch, range(4), 4) for batch in range(9)] != whole
    assert [pool(sizes, name="class").pictures_of(batch, range(4), 4) for batch in range(9)] != whole


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 8), (512, 8), (512, 64), (1024, 16)])
def test_automatic_buckets(resolution: int, multiple: int) -> None:
    sizes = buckets_of("auto", resolution, multiple)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes) <= 9
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 0.45 <= height / width <= 2.2
        assert height * width == pytest.approx(resolution**2, rel=0.2)
        assert (width, height) in sizes


def objective(pipeline: Any, sizes: Sequence[Size], classes: int = 0, **settings: Any) -> DreamBooth:
    """Of a subject's pictures of some sizes, and square ones of its class."""
    pictures = [picture(size, i) for i, size in enumerate([*sizes, *[SQUARE] * classes])]
    captions = ["a sks dog"] * len(sizes) + ["a dog"] * classes
    numbers = range(len(pictures))
    pools = [Pool("instance", numbers[: len(sizes)], pictures, captions, None, 0)]
    if classes:
        pools.append(Pool("class", numbers[len(sizes) :], pictures, captions, None, 0))
    family = family_of(pipeline)
    return DreamBooth(
        family,
        settings.pop("noising", None) or Diffusion(pipeline.scheduler),
        Latents(pipeline.vae, pictures, center_crop=True, cache=settings.pop("cache", True)),
        Captions(family, sorted(set(captions))),
        pools,
        **{"batch_size": 2, **settings},
    )


def test_the_class_weighs_what_it_shall(pipeline: Any) -> None:
    """Against the formula: mean square of the subjects' samples + weight x that of the classes'."""
    noising = Diffusion(pipeline.scheduler, snr_gamma=0.01)  # so that all weights differ

    def losses(weight: float) -> tuple[Tensor, Tensor]:
        one = objective(pipeline, [SQUARE] * 3, classes=2, prior_weight=weight, noising=noising)
        batch = one.draw(3)
        assert len(set(batch.weights.tolist())) == 4
        with torch.no_grad():
            context = one._captions.embed(batch.captions)[0]
            answer = pipeline.unet(batch.noisy, batch.timesteps, context).sample
            return one.loss(*batch), F.mse_loss(answer, batch.target, reduction="none").mean((1, 2, 3)) * batch.weights

    for weight in (0.0, 1.0, 2.5):
        found, each = losses(weight)
        assert each.shape == (4,)
        torch.testing.assert_close(found, each[:2].mean() + weight * each[2:].mean())
        assert each.min() > 0 and len(set(each.tolist())) == 4


def test_class_pictures_are_cut_to_the_size_of_the_batch(pipeline: Any) -> None:
    one = objective(pipeline, [WIDE, TALL, SQUARE], classes=2)
    one.prepare()
    seen = set()
    for number in range(6):
        batch = one.draw(number)
        height, width = batch.noisy.shape[2] * 2, batch.noisy.shape[3] * 2
        seen.add((height, width))
        assert batch.noisy.shape == batch.target.shape == (4, 4, height // 2, width // 2)
        assert (batch.sizes[:, 4:] == torch.tensor([height, width])).all()
        assert (batch.sizes[2:, :2] == 16).all()  # of the class, whose pictures are square
        assert torch.isfinite(one.loss(*batch))
    assert seen == {WIDE, TALL, SQUARE}


@pytest.mark.parametrize("random_flip", [False, True])
def test_batches_are_the_same_with_and_without_a_cache(
    pipeline: Any, random_flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [WIDE, SQUARE, SQUARE]
    cached, live = (
        objective(pipeline, sizes, classes=2, random_flip=random_flip, cache=cache) for cache in (True, False)
    )
    cached.prepare()
    for number in range(5):
        for one, other in zip(cached.draw(number), live.draw(number), strict=True):
            torch.testing.assert_close(one, other)

    def encode(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(pipeline.vae, "encode", encode)
    cached.draw(5)
    with pytest.raises(AssertionError, match="again"):
        live.draw(5)


def test_half_of_the_pictures_are_mirrored(pipeline: Any) -> None:
    flipped = []
    one = objective(pipeline, [SQUARE], random_flip=True, batch_size=1)
    draw = one._latents.draw
    one._latents.draw = lambda pieces, rngs: flipped.extend(p.flip for p in pieces) or draw(pieces, rngs)
    for number in range(60):
        one.draw(number)
    assert 18 < sum(flipped) < 42


def test_processes_share_a_batch(pipeline: Any) -> None:
    """The samples of two processes are those of one with twice the batch."""
    whole = objective(pipeline, [SQUARE, WIDE], classes=1, batch_size=4).draw(2)
    parts = [
        objective(pipeline, [SQUARE, WIDE], classes=1, batch_size=2, process=process, processes=2).draw(2)
        for process in (0, 1)
    ]
    for name, (kind, part) in product(whole._fields, enumerate((slice(0, 2), slice(2, 4)))):
        mine = torch.cat([getattr(one, name)[part] for one in parts])
        torch.testing.assert_close(mine, getattr(whole, name)[kind * 4 : kind * 4 + 4])


def test_epochs_count_every_picture_as_often_as_it_repeats(base: Path, pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        str(base), str(pictures), instance_prompt="a sks dog", output_dir=str(tmp_path / "run"), report_to="none",
        num_train_epochs=2, repeats=3, train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=999,
    )  # fmt: skip
    assert train(config).steps == 5  # of 2 x 3 x 3 samples, the last step has a few to spare


@pytest.mark.parametrize("name", ["sd", "sd3", "flux dev"])
def test_buckets_train(name: str, base_of: Callable[[str], Path], pictures: Path, tmp_path: Path) -> None:
    """Three pictures of noise, two of them square at heart and one wide, with their class."""
    config = TrainConfig(
        str(base_of(name)), str(pictures), instance_prompt="a sks dog", output_dir=str(tmp_path / "run"),
        report_to="none", resolution=RESOLUTION, aspect_ratio_buckets="16,16;16,32;32,16", max_train_steps=3,
        train_batch_size=2, with_prior_preservation=True, class_prompt=["a dog"], num_class_images=2,
        prior_generation_num_inference_steps=1, random_flip=True,
    )  # fmt: skip
    result = train(config)
    assert all(0 < loss < 20 for loss in result.losses)
    with pytest.raises(SVDiffError, match="aspect_ratio_buckets: 20 is not a multiple of 8"):
        train(replace(config, aspect_ratio_buckets="16,20", output_dir=str(tmp_path / "no")))
