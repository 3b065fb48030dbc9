"""Folders to be judged: run files, captions, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from svdiff.evaluation import Judged, judged_pictures
from svdiff.evaluation.measuring import without
from svdiff.evaluation.pictures import check_pairs, open_picture
from svdiff.evaluation.report import chosen

from svdiff_kernels import SVDiffError


def write(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)


def test_a_run_file_lists_pictures_in_its_order_and_no_others(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "a.png", "grid.png")
    listed = [{"file": "b.png", "prompt": "two", "seed": 4}, {"file": "a.png", "prompt": "one", "seed": 5}]
    (tmp_path / "run.json").write_text(json.dumps({"command": "generate", "pictures": listed}))
    assert judged_pictures(tmp_path) == [Judged(tmp_path / "b.png", "two", 4), Judged(tmp_path / "a.png", "one", 5)]
    (tmp_path / "a.png").unlink()
    with pytest.raises(SVDiffError, match=r"run\.json lists a\.png, which is not there"):
        judged_pictures(tmp_path)


def test_captions_as_training_folders_have_them_or_none(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')
    (tmp_path / "b.txt").write_text("two\n")
    assert [picture.prompt for picture in judged_pictures(tmp_path)] == ["one", "two", None]
    (tmp_path / "run.json").write_text('{"command": "train", "config": {}}')  # tells of no pictures
    assert len(judged_pictures(tmp_path)) == 3


def test_no_folder_and_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(SVDiffError, match="there is no picture folder"):
        judged_pictures(tmp_path / "gone")
    with pytest.raises(SVDiffError, match="no pictures in"):
        judged_pictures(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(SVDiffError, match=r"cannot read the picture .*a\.png"):
        open_picture(judged_pictures(tmp_path)[0])


def test_pictures_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGBA", (8, 4)).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    image = open_picture(tmp_path / "a.jpg")
    assert (image.size, image.mode) == ((4, 8), "RGB")


def test_pairs_have_prompts_and_seeds_in_common() -> None:
    base = [Judged(Path("a.png"), "one", 1), Judged(Path("b.png"), "two", 2)]
    check_pairs(base, base, "x")
    check_pairs([Judged(Path("c.png")), base[1]], base, "x")  # what is not told is not compared
    with pytest.raises(SVDiffError, match="class pictures of x: 1, but 2 of the base model"):
        check_pairs(base[:1], base, "x")
    with pytest.raises(SVDiffError, match=r"a\.png has the prompt 'one', but the base model's b\.png 'two'"):
        check_pairs([base[0]], [base[1]], "x")
    with pytest.raises(SVDiffError, match="has the seed 3, but"):
        check_pairs([Judged(Path("a.png"), "one", 3)], base[:1], "x")


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a sks dog", "a dog"),
        ("a photo of sks, on the beach", "a photo of , on the beach"),
        ("a sksdog, masks", "a sksdog, masks"),
        ("a <new1> cat and sks.", "a cat and ."),
    ],
)
def test_words_are_left_out_whole(prompt: str, told: str) -> None:
    assert without(prompt, ["sks", "<new1>"]) == told


def test_a_strip_shows_every_prompt_before_a_second_of_one() -> None:
    pictures = [Judged(Path(f"{p}{i}"), p) for p in "abc" for i in range(3)]
    assert [picture.path.name for picture in chosen(pictures, 4)] == ["a0", "a1", "b0", "c0"]
    assert chosen(pictures, 20) == pictures
