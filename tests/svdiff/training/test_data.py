"""Pictures and captions: found, cut, encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from svdiff.training.data import (
    Half,
    Loaded,
    Picture,
    bucket_of,
    buckets_of,
    cut,
    dataset_pictures,
    find_pictures,
    half,
    load_picture,
)
from svdiff.training.families import family_of
from svdiff.training.sources import Captions, Latents, Piece
from tiny import RESOLUTION, tiny_vae
from torch import Tensor

from svdiff_kernels import SVDiffError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "c.webp", ".hidden.png"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name)
    (tmp_path / "notes.md").write_text("not a picture")
    return tmp_path


def test_captions_by_file_then_beside_then_prompt(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "first", "phrase": "a red one"}\n\n')
    (folder / "b.txt").write_text("second\n")
    found = find_pictures(folder, "third")
    assert [(p.path.name, p.caption) for p in found] == [("a.jpg", "first"), ("b.png", "second"), ("c.webp", "third")]
    assert [p.phrase for p in found] == ["a red one", None, None]


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


@pytest.fixture
def own_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of a folder goes where the test's files are."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()


def read(pictures: list[Picture]) -> list[tuple[str, tuple[int, int, int]]]:
    """Captions, and the colour of each picture."""
    loaded = [load_picture(picture, [(4, 4)]) for picture in pictures]
    return [(p.caption, one.image.getpixel((0, 0))) for p, one in zip(pictures, loaded, strict=True)]


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(params=["folder", "parquet"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path, own_datasets: None) -> Path:
    """A red picture with a caption and a blue one without, as files or in one file."""
    import datasets

    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, colour in {"one": RED, "two": BLUE}.items():
        Image.new("RGB", (8, 6), colour).save(folder / f"{name}.png")
    if request.param == "folder":
        lines = '{"file_name": "one.png", "text": "red"}\n{"file_name": "two.png", "text": null}\n'
        (folder / "metadata.jsonl").write_text(lines)
        return folder
    contents = [{"bytes": (folder / f"{name}.png").read_bytes(), "path": None} for name in ("one", "two")]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": contents, "text": ["red", None]}, features=features)
    (tmp_path / "packed").mkdir()
    table.to_parquet(tmp_path / "packed" / "train.parquet")
    return tmp_path / "packed"


def test_pictures_of_a_dataset(dataset: Path) -> None:
    def find(**changes: Any) -> list[Picture]:
        return dataset_pictures(
            str(dataset), **{"image_column": "image", "caption_column": "text", "prompt": None, **changes}
        )

    assert sorted(read(find(prompt="a thing"))) == [("a thing", BLUE), ("red", RED)]
    assert sorted(read(find(prompt="a thing", caption_column=None))) == [("a thing", BLUE), ("a thing", RED)]
    with pytest.raises(SVDiffError, match=r"\[1\] has no caption: give caption_column or instance_prompt"):
        find()
    with pytest.raises(SVDiffError, match="has no column 'caption', only image, text"):
        find(caption_column="caption")
    with pytest.raises(SVDiffError, match="cannot load the dataset"):
        find(config_name="large")


def test_what_is_wrong_with_a_dataset(tmp_path: Path, own_datasets: None) -> None:
    import datasets

    how: dict[str, Any] = {"image_column": "image", "prompt": "x", "caption_column": None}
    with pytest.raises(SVDiffError, match="cannot load the dataset"):
        dataset_pictures(str(tmp_path / "gone"), **how)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    content = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    table = datasets.Dataset.from_dict({"image": [content, None], "text": [["a", "b"], ["c"]]}, features=features)
    (tmp_path / "packed").mkdir()
    table.to_parquet(tmp_path / "packed" / "train.parquet")
    with pytest.raises(SVDiffError, match=r"\[1\] has no picture in column 'image'"):
        dataset_pictures(str(tmp_path / "packed"), **how)
    with pytest.raises(SVDiffError, match=r"\[0\] has in column 'text' no text, but list"):
        dataset_pictures(str(tmp_path / "packed"), **how | {"caption_column": "text"})


@pytest.mark.parametrize("text", ["", ";", "64", "64,48,32", "64,x", "64x48"])
def test_buckets_that_are_none(text: str) -> None:
    with pytest.raises(SVDiffError, match="is neither auto nor height,width"):
        buckets_of(text, 64, 8)


def test_each_picture_goes_to_the_bucket_most_like_it() -> None:
    buckets = buckets_of("64,64;48,96;96,48;", 64, 8)
    assert buckets == [(64, 64), (48, 96), (96, 48)]
    for size, wanted in {(500, 480): (64, 64), (100, 300): (48, 96), (100, 149): (48, 96), (149, 100): (96, 48),
                         (100, 135): (64, 64), (3, 2): (96, 48)}.items():  # fmt: skip
        assert bucket_of(size, buckets) == wanted
    with pytest.raises(SVDiffError, match="60 is not a multiple of 8"):
        buckets_of("64,60", 64, 8)


def test_pictures_are_upright_and_fit(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    turned = load_picture(Picture(tmp_path / "turned.jpg", ""), [(16, 16)])
    assert turned.original == (40, 20) and turned.image.size == (16, 32)
    Image.new("L", (5, 7)).save(tmp_path / "small.png")
    assert load_picture(Picture(tmp_path / "small.png", ""), [(16, 16)]).image.size == (16, 22)
    Image.new("RGBA", (16, 16)).save(tmp_path / "clear.png")
    clear = load_picture(Picture(Path("of a dataset"), "", (tmp_path / "clear.png").read_bytes()), [(16, 16)])
    assert clear.image.size == (16, 16) and clear.image.mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_an_unreadable_picture_is_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "photo.png"
    if content == "half":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:1500]
    path.write_bytes(content)
    with pytest.raises(SVDiffError, match=r"photo\.png"):
        load_picture(Picture(path, ""), [(16, 16)])


def loaded(height: int, width: int, seed: int = 0) -> Loaded:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Loaded(Image.fromarray(pixels), (height, width), (RESOLUTION, RESOLUTION))


def pixels_of(picture: Loaded) -> Tensor:
    return torch.from_numpy(np.asarray(picture.image)).permute(2, 0, 1).float()


def test_cuts() -> None:
    picture, rng = loaded(6, 10), torch.Generator().manual_seed(0)
    whole = pixels_of(picture)
    centre = cut(picture, (6, 4), center=True, flip=False, rng=rng)
    torch.testing.assert_close((centre.pixels + 1) * 127.5, whole[:, :, 3:7])
    assert (centre.original, centre.corner) == ((6, 10), (0, 3))
    assert torch.equal(cut(picture, (6, 4), center=True, flip=True, rng=rng).pixels, centre.pixels.flip(-1))
    corners = {cut(picture, (6, 4), center=False, flip=False, rng=rng).corner for _ in range(200)}
    assert corners == {(0, left) for left in range(7)}
    tall = cut(loaded(40, 10), (8, 8), center=True, flip=False, rng=rng)  # scaled to cover: 32 x 8
    assert tall.pixels.shape == (3, 8, 8) and tall.corner == (12, 0)


@pytest.mark.parametrize("place", [4, 20, 40])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("axis", [-1, -2])
def test_the_half_with_the_subject_is_taken(place: int, side: int, axis: int) -> None:
    canvas = np.full((64, 64, 3), 200, np.uint8)
    subject = np.random.default_rng(0).integers(0, 256, (20, 20, 3))
    canvas[22:42, place : place + 20] = subject
    if axis == -2:
        canvas = canvas.transpose(1, 0, 2)
    picture = Loaded(Image.fromarray(canvas), (64, 64), (64, 64))
    found = half(picture, (64, 64), Half(axis, side))
    corner = found.corner[axis]
    assert corner <= place and place + 20 <= corner + 32
    assert found.pixels.shape == (3, 64, 64)
    own, other = Half(axis, side).of(found.pixels), Half(axis, 1 - side).of(found.pixels)
    whole = pixels_of(picture) / 127.5 - 1
    torch.testing.assert_close(own, whole.narrow(axis, corner, 32))
    assert torch.equal(other, own.flip(axis))  # where they meet, the canvas goes on


def test_the_half_of_nothing_is_the_middle() -> None:
    picture = Loaded(Image.new("RGB", (64, 64), "red"), (64, 64), (64, 64))
    assert half(picture, (64, 64), Half(-1, 0)).corner == (0, 16)
    assert half(picture, (64, 64), Half(-2, 1)).corner == (16, 0)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("axis", [-1, -2])
def test_halves_of_latents_make_a_whole_without_a_seam(axis: int, cache: bool) -> None:
    """As if the VAE had seen the mixture, where both halves are plain at their edges; nine latents a side are 5 + 4."""
    vae, plain = tiny_vae(), Image.new("RGB", (18, 18), "gray")
    latents = Latents(vae, [Loaded(plain, (18, 18), (18, 18))] * 2, center_crop=False, cache=cache)
    halves = [
        latents.draw([Piece(number, (18, 18), Half(axis, number))], [torch.Generator().manual_seed(0)])[0]
        for number in (0, 1)
    ]
    assert [half.shape[axis] for half in halves] == [5, 4]
    mixture = latents._encode([cut(latents._pictures[0], (18, 18), center=True, flip=False, rng=torch.Generator())])
    rng = [torch.Generator().manual_seed(0) for _ in halves]
    noise = [torch.randn(half.shape[1:], generator=one) for half, one in zip(halves, rng, strict=True)]
    expected = mixture.mean + mixture.std * torch.cat(noise, dim=axis)
    torch.testing.assert_close(torch.cat(halves, dim=axis), expected)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_cached_latents_are_what_encoding_gives(kind: str) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = tiny_vae() if kind == "kl" else AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, scaling_factor=0.5,
    ).eval()  # fmt: skip
    pictures = [loaded(RESOLUTION, RESOLUTION, seed) for seed in range(3)]
    pieces = [Piece(2, (16, 16)), Piece(0, (16, 16), flip=True), Piece(0, (16, 16)), Piece(1, (16, 16))]
    drawn = [
        Latents(vae, pictures, center_crop=False, cache=cache).draw(
            pieces, [torch.Generator().manual_seed(seed) for seed in range(4)]
        )
        for cache in (True, False)
    ]
    torch.testing.assert_close(*drawn)
    assert drawn[0][0].shape[1] == 4
    assert drawn[0][1].tolist() == [[16, 16, 0, 0, 16, 16]] * 4


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (40, 24)])
def test_latents_are_a_sample_of_what_the_vae_says_in_the_denoisers_units(size: tuple[int, int]) -> None:
    """Which are those that pipelines decode: latents / scaling_factor + shift_factor."""
    vae = tiny_vae(latent_channels=6, shift_factor=0.3, scaling_factor=1.7)
    drawn, sizes, masks = Latents(vae, [loaded(*size)], center_crop=True, cache=True).draw(
        [Piece(0, size)], [torch.Generator().manual_seed(5)]
    )
    pixels = pixels_of(loaded(*size))[None] / 127.5 - 1
    with torch.no_grad():
        spread = vae.encode(pixels).latent_dist
    noise = torch.randn(6, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn / 1.7 + 0.3, spread.mean + spread.std * noise)
    assert spread.std.mean() > 0.1
    assert sizes.tolist() == [[*size, 0, 0, *size]]
    assert torch.equal(masks, torch.ones(1, 1, size[0] // 2, size[1] // 2))


@pytest.mark.parametrize("beforehand", [True, False])
def test_latents_are_encoded_once(monkeypatch: pytest.MonkeyPatch, beforehand: bool) -> None:
    vae, calls = tiny_vae(), []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    latents = Latents(vae, [loaded(16, 16), loaded(16, 40)], center_crop=False, cache=True)
    square, wide = Piece(0, (16, 16)), Piece(1, (16, 16))
    if beforehand:
        latents.prepare([square, square, wide])
        assert calls == [1]
    for _ in range(2):
        latents.draw([square, wide, wide], [torch.Generator()] * 3)
    assert calls == [1, 2, 2]  # those that are cut at random, together


def test_a_random_crop_is_encoded_afresh() -> None:
    pictures = [loaded(RESOLUTION, 40)]
    for center in (True, False):
        latents = Latents(tiny_vae(), pictures, center_crop=center, cache=True)
        piece = Piece(0, (16, 16))
        assert latents.is_fixed(piece) == center
        drawn = {
            tuple(latents.draw([piece], [torch.Generator().manual_seed(seed)])[1][0].tolist()) for seed in range(9)
        }
        assert (len(drawn) == 1) == center


def test_captions_are_encoded_once_if_the_encoder_is_frozen(pipeline: Any) -> None:
    family = family_of(pipeline)
    texts = ["a cat", "a dog"]
    kept, live = (Captions(family, texts, trained=trained) for trained in ((), ("text_encoder",)))
    numbers = live.numbers(["a dog", "a cat", "a dog"])
    assert torch.equal(kept.numbers(["a dog", "a cat", "a dog"]), numbers)
    (found,), (again,) = kept.embed(numbers), live.embed(numbers)
    torch.testing.assert_close(found, again)
    dog, cat, same_dog = found
    assert torch.equal(dog, same_dog)
    assert not torch.allclose(dog, cat)
    assert again.requires_grad
    assert not dog.requires_grad
