"""Size augmentation: what becomes of pictures and captions, and which places the loss looks at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from svdiff import TrainConfig, train
from svdiff.training.data import Loaded, Picture, cut, load_picture, resized
from svdiff.training.dreambooth import DreamBooth, Pool
from svdiff.training.families import family_of
from svdiff.training.noising import Diffusion
from svdiff.training.resizing import LARGE, LARGEST, SMALL, SMALLEST, UNCHANGED, draw_resizing, resized_captions
from svdiff.training.sources import Captions, Latents, Piece
from tiny import RESOLUTION, tiny_vae
from torch import Tensor

CANVAS = (16, 32)


def picture(height: int, width: int, seed: int = 0) -> Loaded:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Loaded(Image.fromarray(pixels), (height, width), (height, width))


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_is_drawn() -> None:
    """4 in 15 shrink to 1/3 .. 0.6, 5 grow to 1.2 .. 1.4, and their captions say so; the others stay as they are."""
    found = [draw_resizing(chance(seed)) for seed in range(3000)]
    small, large = ([one for one in found if one.words in words] for words in (SMALL, LARGE))
    assert len(small) / 3000 == pytest.approx(4 / 15, abs=0.03)
    assert len(large) / 3000 == pytest.approx(5 / 15, abs=0.03)
    assert len(small) + len(large) + found.count(UNCHANGED) == 3000
    for group, low, high in ((small, SMALLEST, 0.6), (large, 1.2, LARGEST)):
        ratios = sorted(one.ratio for one in group)
        assert low <= ratios[0] < low + 0.01 and high - 0.01 < ratios[-1] <= high
        counts = Counter(one.words for one in group)
        assert len(counts) == 2 and min(counts.values()) > 0.4 * len(group)
    words = {*SMALL, *LARGE}
    assert resized_captions("photo of a dog") == [f"{one}photo of a dog" for one in (*SMALL, *LARGE)]
    assert {one.words for one in found} == words | {""}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("ratio", [SMALLEST, 0.45, 0.59])
def test_a_smaller_picture_is_somewhere_on_gray(ratio: float, flip: bool) -> None:
    """In steps of two pixels, whole but for what that takes of its shape; and the place that is told is where it is."""
    source, places = picture(*CANVAS), set()
    size = (round(16 * ratio / 2) * 2, round(32 * ratio / 2) * 2)
    expected = cut(source, size, center=True, flip=flip, rng=chance()).pixels
    for seed in range(150):
        found = resized(source, CANVAS, ratio, step=2, center=True, flip=flip, rng=chance(seed))
        top, left, bottom, right = found.place
        assert (bottom - top, right - left) == size and found.original == CANVAS
        assert torch.equal(found.pixels[:, top:bottom, left:right], expected)
        ground = torch.ones(CANVAS, dtype=torch.bool)
        ground[top:bottom, left:right] = False
        assert (found.pixels[:, ground] == 0).all()
        places.add((top, left))
    rows, columns = (set(range(0, side - own + 1, 2)) for side, own in zip(CANVAS, size, strict=True))
    assert {top for top, _ in places} == rows and {left for _, left in places} == columns


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_of_a_larger_picture_there_is_a_piece(flip: bool, center: bool) -> None:
    """Any; even where pictures are cut at their centres, else each would be seen at one size in one way."""
    source, corners = picture(16, 40), set()
    large = torch.from_numpy(np.array(source.image.resize((55, 22), Image.Resampling.LANCZOS))).permute(2, 0, 1)
    for seed in range(300):
        found = resized(source, CANVAS, 1.4, step=2, center=center, flip=flip, rng=chance(seed))
        top, left = found.corner
        piece = large[:, top : top + 16, left : left + 32].float() / 127.5 - 1
        torch.testing.assert_close(found.pixels, piece.flip(-1) if flip else piece)
        assert found.place is None
        corners.add((top, left))
    assert {top for top, _ in corners} == set(range(7))
    lefts = {left for _, left in corners}
    if center:  # of 55 columns the middle 44
        assert lefts == set(range(5, 18))
    else:  # where it is cut, and what of that is taken, are left to chance: the outermost are rare
        assert set(range(3, 21)) <= lefts <= set(range(24))


def test_pictures_that_will_be_enlarged_are_kept_larger(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    one, two = (load_picture(Picture(tmp_path / "a.png", ""), [(20, 20)], detail=detail) for detail in (1.0, 1.4))
    assert (one.image.size, two.image.size) == ((30, 20), (42, 28))
    assert one.bucket == two.bucket == (20, 20) and one.original == two.original == (200, 300)


def test_masks_are_where_the_picture_is_but_for_its_edge() -> None:
    source = picture(*CANVAS)
    latents = Latents(tiny_vae(), [source], center_crop=True, cache=True, scale=2)
    piece = Piece(0, CANVAS, ratio=0.5)
    assert not latents.is_fixed(piece) and latents.is_fixed(Piece(0, CANVAS))
    for seed in range(20):
        drawn, sizes, masks = latents.draw([piece, Piece(0, CANVAS)], [chance(seed), chance(seed)])
        assert drawn.shape == (2, 4, 8, 16) and masks.shape == (2, 1, 8, 16)
        assert sizes[:, 4:].tolist() == [[*CANVAS]] * 2
        top, left, bottom, right = (
            side // 2 for side in resized(source, CANVAS, 0.5, step=2, center=True, flip=False, rng=chance(seed)).place
        )
        wanted = torch.zeros(8, 16)
        wanted[top + 1 : bottom - 1, left + 1 : right - 1] = 128 / (2 * 6)
        torch.testing.assert_close(masks[0, 0], wanted)
        assert torch.equal(masks[1], torch.ones(1, 8, 16))
        assert masks[0].mean() == pytest.approx(1)
    assert latents._known.keys() == {Piece(0, CANVAS)}


def test_a_picture_of_one_or_two_latents_is_not_all_edge() -> None:
    latents = Latents(tiny_vae(), [picture(16, 16)], center_crop=True, cache=True, scale=2)
    for ratio, count in ((1 / 16, 1), (1 / 4, 4), (3 / 8, 1)):
        masks = latents.draw([Piece(0, (16, 16), ratio=ratio)], [chance()])[2]
        assert masks.count_nonzero() == count and masks.mean() == pytest.approx(1)


def objective(pipeline: Any, **settings: Any) -> DreamBooth:
    pictures = [picture(*CANVAS, seed) for seed in range(4)]
    captions = ["a dog"] * 4
    family = family_of(pipeline)
    return DreamBooth(
        family,
        Diffusion(pipeline.scheduler),
        Latents(pipeline.vae, pictures, center_crop=True, cache=True, scale=2),
        Captions(family, ["a dog", *resized_captions("a dog")]),
        [
            Pool("instance", [0, 1], pictures, captions, None, 0, resized=settings.pop("resized", True)),
            Pool("class", [2, 3], pictures, captions, None, 0),
        ],
        **{"batch_size": 8, **settings},
    )


def test_only_where_the_picture_is_counts(pipeline: Any) -> None:
    """Against the formula, by hand: of each sample the mean over its valid latents, then the mean over samples."""
    one = objective(pipeline, prior_weight=2.5)
    batch = one.draw(1)
    subjects, classes = batch.masks[:8], batch.masks[8:]
    assert torch.equal(classes, torch.ones_like(classes)) and (subjects == 0).any() and (subjects == 1).any()
    with torch.no_grad():
        context = one._captions.embed(batch.captions)[0]
        errors = (pipeline.unet(batch.noisy, batch.timesteps, context).sample - batch.target).square()
        each = [error[:, mask[0] > 0].mean() for error, mask in zip(errors, batch.masks, strict=True)]
        found = one.loss(*batch)
    torch.testing.assert_close(found, torch.stack(each[:8]).mean() + 2.5 * torch.stack(each[8:]).mean())
    whole = errors.flatten(1).mean(dim=1)
    assert abs(found - (whole[:8].mean() + 2.5 * whole[8:].mean())) > 1e-3


def test_full_masks_change_nothing(pipeline: Any) -> None:
    """Loss and gradients are those of a loss without masks, to the bit."""
    one = objective(pipeline, resized=False)
    batch = one.draw(1)
    assert torch.equal(batch.masks, torch.ones(16, 1, 8, 16))
    parameter = pipeline.unet.conv_in.weight

    def gradient(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss, parameter)[0]

    predicted = pipeline.unet(batch.noisy, batch.timesteps, one._captions.embed(batch.captions)[0]).sample
    losses = F.mse_loss(predicted.float(), batch.target, reduction="none").flatten(1).mean(dim=1) * batch.weights
    plain = gradient(losses[:8].mean() + losses[8:].mean())
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(gradient(one.loss(*batch)), plain, strict=True))


def test_what_is_not_resized_is_drawn_as_ever(pipeline: Any) -> None:
    """Classes are, whatever becomes of the subjects; and so is all where nothing is resized."""
    resizing, plain = (objective(pipeline, resized=resized) for resized in (True, False))
    for number in range(3):
        changed, same = resizing.draw(number), plain.draw(number)
        assert torch.equal(changed.noisy[8:], same.noisy[8:]) and torch.equal(changed.captions[8:], same.captions[8:])
        assert not torch.equal(changed.noisy[:8], same.noisy[:8])
        assert (same.captions == 0).all() and set(changed.captions[:8].tolist()) > {0}


def test_captions_and_sizes_belong_together(pipeline: Any) -> None:
    one = objective(pipeline)
    seen = set()
    for number in range(20):
        batch = one.draw(number)
        for caption, mask in zip(batch.captions[:8].tolist(), batch.masks[:8], strict=True):
            assert (caption in (1, 2)) == bool((mask == 0).any())  # as `objective` numbers them
            seen.add(caption)
    assert seen == {0, 1, 2, 3, 4}


def test_processes_share_a_resized_batch(pipeline: Any) -> None:
    whole = objective(pipeline, batch_size=8).draw(2)
    parts = [objective(pipeline, batch_size=4, process=process, processes=2).draw(2) for process in (0, 1)]
    for name in whole._fields:
        for kind in (0, 1):
            mine = torch.cat([getattr(one, name)[kind * 4 : kind * 4 + 4] for one in parts])
            torch.testing.assert_close(mine, getattr(whole, name)[kind * 8 : kind * 8 + 8])


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux dev"])
def test_it_trains(name: str, base_of: Callable[[str], Path], pictures: Path, tmp_path: Path) -> None:
    """With buckets, mirrored pictures, classes and a text encoder that trains; `noaug` turns it off."""
    config = TrainConfig(
        str(base_of(name)), str(pictures), instance_prompt="a sks dog", output_dir=str(tmp_path / "run"),
        report_to="none", resolution=RESOLUTION, aspect_ratio_buckets="16,16;16,32;32,16", max_train_steps=3,
        train_batch_size=4, with_prior_preservation=True, class_prompt=["a dog"], num_class_images=2,
        prior_generation_num_inference_steps=1, random_flip=True, train_text_encoder=name != "flux dev",
        size_augmentation=True,
    )  # fmt: skip
    result = train(config)
    assert all(0 < loss < 20 for loss in result.losses)
    off = train(replace(config, size_augmentation=False, noaug=True, output_dir=str(tmp_path / "off")))
    plain = train(replace(config, size_augmentation=False, output_dir=str(tmp_path / "plain")))
    assert off.losses == plain.losses != result.losses
