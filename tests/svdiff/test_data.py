"""Pictures and captions; output folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from svdiff.data import crop, find_pictures, load_picture
from svdiff.outputs import RUN_FILE, run_directory, write_run_file
from svdiff.sources import Captions, Latents
from tiny import RESOLUTION, tiny_tokenizer, tiny_vae

from svdiff_kernels import SVDiffError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "c.webp", ".hidden.png"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name)
    (tmp_path / "notes.md").write_text("not a picture")
    return tmp_path


def test_captions_by_file_then_beside_then_prompt(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "first"}\n\n')
    (folder / "b.txt").write_text("second\n")
    found = find_pictures(folder, "third")
    assert [(p.path.name, p.caption) for p in found] == [("a.jpg", "first"), ("b.png", "second"), ("c.webp", "third")]


def test_what_is_wrong_with_a_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SVDiffError, match="no picture folder"):
        find_pictures(tmp_path / "gone", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SVDiffError, match="no pictures"):
        find_pictures(tmp_path / "empty", "x")
    with pytest.raises(SVDiffError, match=r"a\.jpg has no caption"):
        find_pictures(folder)
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(SVDiffError, match=r"a\.jpg has no caption"):
        find_pictures(folder, "x")
    for wrong in ("{", '{"file_name": "a.jpg"}', "[1]"):
        (folder / "metadata.jsonl").write_text(wrong)
        with pytest.raises(SVDiffError, match="line 1"):
            find_pictures(folder, "x")


def test_pictures_are_upright_and_fit(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_picture(tmp_path / "turned.jpg", 16).shape == (3, 32, 16)
    Image.new("L", (5, 7)).save(tmp_path / "small.png")
    assert load_picture(tmp_path / "small.png", 16).shape == (3, 22, 16)
    Image.new("RGBA", (16, 16)).save(tmp_path / "clear.png")
    assert load_picture(tmp_path / "clear.png", 16).shape == (3, 16, 16)


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_an_unreadable_picture_is_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "photo.png"
    if content == "half":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:1500]
    path.write_bytes(content)
    with pytest.raises(SVDiffError, match=r"photo\.png"):
        load_picture(path, 16)


def test_crops() -> None:
    image = torch.arange(3 * 6 * 10, dtype=torch.uint8).view(3, 6, 10)
    rng = torch.Generator().manual_seed(0)
    centre = crop(image, 4, center=True, flip=False, rng=rng)
    torch.testing.assert_close((centre + 1) * 127.5, image[:, 1:5, 3:7].float())
    assert torch.equal(crop(image, 4, center=True, flip=True, rng=rng), centre.flip(-1))
    corners = {crop(image, 4, center=False, flip=False, rng=rng)[0, 0, 0].item() for _ in range(200)}
    assert len(corners) == 3 * 7


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_cached_latents_are_what_encoding_gives(kind: str) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = tiny_vae() if kind == "kl" else AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, scaling_factor=0.5,
    ).eval()  # fmt: skip
    images = [torch.randint(0, 256, (3, RESOLUTION, RESOLUTION), dtype=torch.uint8) for _ in range(3)]
    drawn = [
        Latents(vae, images, RESOLUTION, center_crop=False, random_flip=True, cache=cache).draw(
            [2, 0, 0, 1], torch.Generator().manual_seed(5)
        )
        for cache in (True, False)
    ]
    torch.testing.assert_close(*drawn)
    assert drawn[0].shape[1] == 4


def test_a_random_crop_is_encoded_afresh() -> None:
    images = [torch.randint(0, 256, (3, RESOLUTION, 40), dtype=torch.uint8)]
    for center in (True, False):
        latents = Latents(tiny_vae(), images, RESOLUTION, center_crop=center, random_flip=False, cache=True)
        rng = torch.Generator()
        drawn = [latents._encode([0], [False], rng.manual_seed(seed))[0].sum().item() for seed in range(4)]
        assert (latents._moments is not None) == center == (len(set(drawn)) == 1)


def test_captions_are_encoded_once_if_the_encoder_is_frozen(tmp_path: Path) -> None:
    from tiny import tiny_text_encoder

    tokenizer, encoder = tiny_tokenizer(tmp_path), tiny_text_encoder()
    texts = ["a dog", "a cat", "a dog"]
    cached, live = (Captions(tokenizer, encoder, texts, cache=cache) for cache in (True, False))
    numbers = live.numbers([0, 1, 2, 1])
    assert torch.equal(cached.numbers([0, 1, 2, 1]), numbers)
    torch.testing.assert_close(cached.embed(numbers), live.embed(numbers))
    dog, cat, same_dog, _ = cached.embed(numbers)
    assert torch.equal(dog, same_dog)
    assert not torch.allclose(dog, cat)
    assert live.embed(numbers).requires_grad
    assert not dog.requires_grad


def test_an_output_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with run_directory(target) as staging:
        (staging / "a").write_text("1")
        write_run_file(staging, "train", {"seed": 3}, loss=0.5)
        assert not target.exists()
    assert json.loads((target / RUN_FILE).read_text()) == {"command": "train", "config": {"seed": 3}, "loss": 0.5}
    assert [p.name for p in target.parent.iterdir()] == ["run"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_directory(tmp_path / "run") as staging:
        (staging / "a").write_text("1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_is_replaced_on_request_only(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with run_directory(target) as staging:
        write_run_file(staging, "train", {})
        (staging / "old").write_text("")
    with pytest.raises(SVDiffError, match="already holds a run"), run_directory(target):
        pytest.fail("entered")
    with run_directory(target, overwrite=True) as staging:
        write_run_file(staging, "train", {})
    assert [p.name for p in target.iterdir()] == [RUN_FILE]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_peoples_files_are_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SVDiffError, match="not empty"), run_directory(tmp_path, overwrite=overwrite):
        pytest.fail("entered")
    with pytest.raises(SVDiffError, match="is a file"), run_directory(tmp_path / "thesis.tex", overwrite=overwrite):
        pytest.fail("entered")


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SVDiffError, match="cannot write"), run_directory(tmp_path / "file" / "run"):
        pytest.fail("entered")
