"""svdiff evaluate as a whole: what is measured of which pictures, what is written, and what is refused."""

from __future__ import annotations

import html.parser
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
from PIL import Image
from safetensors.torch import save_file
from svdiff import EvaluateConfig, evaluate
from svdiff.evaluation import fid, image_alignment, kid, load_clip, load_dino, text_alignment
from svdiff.evaluation.table import KINDS
from svdiff.miniature import world
from svdiff.pipelines import load_pipeline
from svdiff.sampling import slug
from tiny_encoders import lpips_weights, pattern, save_tiny_clip, save_tiny_dino
from torch import nn

from svdiff_kernels import SVDiffError

PROMPTS = ["a sks dog", "a sks dog at sea"]


def write_run(folder: Path, prompts: list[str], each: int, seed: int) -> Path:
    """Pictures as svdiff generate leaves them."""
    folder.mkdir()
    listed = []
    for i, prompt in enumerate(prompts):
        for k in range(each):
            listed.append({"file": f"{i}_{slug(prompt)}_{k}.png", "prompt": prompt, "seed": i * each + k})
            Image.fromarray(pattern(40, seed + i * each + k)).save(folder / listed[-1]["file"])
    Image.new("RGB", (80, 80)).save(folder / "grid.png")
    (folder / "run.json").write_text(json.dumps({"command": "generate", "config": {}, "pictures": listed}))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_run(place / "ours", PROMPTS, 3, 0)
    write_run(place / "theirs", PROMPTS, 3, 100)
    write_run(place / "class_ours", ["a cat"], 4, 200)
    write_run(place / "class_theirs", ["a cat"], 4, 300)
    write_run(place / "class_base", ["a cat"], 4, 400)
    write_run(place / "class_other", ["a cow"], 4, 400)
    write_run(place / "class_few", ["a cat"], 3, 400)
    for name, count in (("subject", 4), ("one", 1), ("uncaptioned", 3)):
        (place / name).mkdir()
        for i in range(count):
            Image.fromarray(pattern(48, 500 + i)).save(place / name / f"{i}.png")
    (place / "empty").mkdir()
    save_tiny_clip(place / "clip")
    save_tiny_dino(place / "dino", 2)
    save_file(lpips_weights("alex"), place / "lpips.safetensors")
    return place


@pytest.fixture
def config(place: Path, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(
        pictures=[f"ours={place / 'ours'}", f"theirs={place / 'theirs'}"],
        reference_dir=str(place / "subject"),
        class_pictures=[f"theirs={place / 'class_theirs'}", f"ours={place / 'class_ours'}"],
        base_class_pictures=str(place / "class_base"),
        modifier_token=["sks"],
        clip=str(place / "clip"),
        dino=str(place / "dino"),
        lpips=str(place / "lpips.safetensors"),
        output_dir=str(tmp_path / "out"),
        resamples=50,
    )


def figures(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    told = json.loads((folder / "metrics.json").read_text())
    return {(one["entry"], one["metric"], one["features"]): one for one in told["metrics"]}


class Page(html.parser.HTMLParser):
    """What a page shows: its words, and how many pictures it holds itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.pictures, self.elsewhere = "", 0, []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href"):
                self.pictures += (value or "").startswith("data:image/")
                self.elsewhere += [] if (value or "").startswith("data:image/") else [value]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_every_metric_of_two_entries(config: EvaluateConfig, place: Path) -> None:
    result = evaluate(config)
    out = result.output_dir
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "report.html", "report.png", "run.json"]
    found = figures(out)
    expected = {("text_alignment", "CLIP"), ("diversity", "LPIPS, AlexNet"), ("drift", "LPIPS, AlexNet")}
    expected |= {(m, f) for m in ("image_alignment", "kid", "fid", "diversity", "drift", "class_kid", "class_fid")
                 for f in ("CLIP", "DINOv2")}  # fmt: skip
    assert found.keys() == {(entry, *pair) for entry in ("ours", "theirs") for pair in expected}
    for one in found.values():
        assert one["low"] <= one["value"] <= one["high"], one
        assert one["count"] == (4 if one["metric"] in ("drift", "class_kid", "class_fid") else 6)

    def pixels(name: str) -> list[Path]:
        return sorted(p for p in (place / name).glob("*.png") if p.name != "grid.png")

    clip, dino = load_clip(config.clip or ""), load_dino(config.dino or "")
    ours, subject = clip.images(pixels("theirs")), clip.images(pixels("subject"))
    texts = clip.texts(["a dog"] * 3 + ["a dog at sea"] * 3)
    by_hand = {"text_alignment": text_alignment(ours, texts), "image_alignment": image_alignment(ours, subject)}
    by_hand |= {"kid": kid(ours, subject), "fid": fid(ours, subject)}
    by_hand |= {"class_kid": kid(clip.images(pixels("class_theirs")), clip.images(pixels("class_base")))}
    for metric, value in by_hand.items():
        assert found["theirs", metric, "CLIP"]["value"] == pytest.approx(value.item(), rel=1e-5, abs=1e-7)
    dinos = image_alignment(dino.images(pixels("ours")), dino.images(pixels("subject")))
    assert found["ours", "image_alignment", "DINOv2"]["value"] == pytest.approx(dinos.item(), rel=1e-5)


def test_the_report(config: EvaluateConfig, place: Path) -> None:
    result = evaluate(replace(config, dino=None, lpips=None))
    page = Page((result.output_dir / "report.html").read_text())
    assert page.elsewhere == []  # one file that needs no other
    assert page.pictures == 1 + 4 + 2 * 6 + 3 * 4  # plot, subject, pictures of two, class pictures of three
    for words in ("text alignment (CLIP)", "KID x 1000 (CLIP)", "a sks dog at sea", "ours", str(place / "clip")):
        assert words in page.words
    assert "subject shown: pictures are not of the miniature's world" in page.words
    with Image.open(result.output_dir / "report.png") as plot:
        assert plot.width > 1000
    assert json.loads((result.output_dir / "run.json").read_text())["command"] == "evaluate"
    lines = str(result).splitlines()
    assert lines[0].split() == ["ours", "theirs"]
    one = figures(result.output_dir)["ours", "text_alignment", "CLIP"]
    assert f"{one['value']:.3f} [{one['low']:.3f} to {one['high']:.3f}]" in lines[1]


def test_markup_in_prompts_is_text(tmp_path: Path, config: EvaluateConfig) -> None:
    write_run(tmp_path / "run", ["<b>bold</b> & 'quoted' \"twice\""], 2, 0)
    result = evaluate(replace(config, pictures=[str(tmp_path / "run")], class_pictures=None, base_class_pictures=None))
    text = (result.output_dir / "report.html").read_text()
    assert "<b>" not in text
    assert "<b>bold</b> & 'quoted' \"twice\"" in Page(text).words


def test_what_cannot_be_computed_is_told(config: EvaluateConfig, place: Path, tmp_path: Path) -> None:
    """Pictures without prompts, and nothing to compare classes with."""
    alone = replace(config, pictures=[str(place / "uncaptioned")], class_pictures=None, base_class_pictures=None)
    result = evaluate(alone)
    assert {figure.metric for figure in result.figures} == {"image_alignment", "kid", "fid"}
    assert result.left_out.keys() == KINDS.keys() - {"image_alignment", "kid", "fid"}
    assert "have no prompts" in result.left_out["text_alignment"]
    chosen = evaluate(replace(alone, metrics=["kid"], output_dir=str(tmp_path / "kid")))
    assert {figure.metric for figure in chosen.figures} == {"kid"}
    assert chosen.left_out == {}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"pictures": None}, "what is to be judged"),
    "both": ({"pretrained_model_name_or_path": "miniature"}, "what is to be judged"),
    "no folder": ({"pictures": ["{0}/gone"], "class_pictures": None, "base_class_pictures": None},
                  "there is no picture folder {0}/gone"),
    "no pictures": ({"reference_dir": "{0}/empty"}, "no pictures in {0}/empty"),
    "no prompts": ({"pictures": ["{0}/uncaptioned"], "class_pictures": ["{0}/class_ours"],
                    "metrics": ["text_alignment"]}, "text_alignment cannot be computed: pictures of uncaptioned"),
    "no such metric": ({"metrics": ["is"]}, "metric 'is' is not one of text_alignment, image_alignment, kid"),
    "one picture": ({"reference_dir": "{0}/one", "metrics": ["kid"]}, "there is one of what they are compared with"),
    "no network": ({"clip": None, "dino": None, "lpips": None}, "nothing can be measured; text_alignment: no clip"),
    "no reference": ({"reference_dir": None, "metrics": ["image_alignment"]}, "no reference_dir is given"),
    "same names": ({"pictures": ["{0}/ours", "{0}/x/ours"]}, "two folders are called 'ours'"),
    "other numbers": ({"base_class_pictures": "{0}/class_few"}, "class pictures of ours: 4, but 3 of the base model"),
    "other prompts": ({"base_class_pictures": "{0}/class_other"}, "has the prompt 'a cat', but the base model's"),
    "class alone": ({"base_class_pictures": None}, "belong together"),
    "other names": ({"class_pictures": ["x={0}/class_ours", "theirs={0}/class_ours"]}, "but class_pictures of x"),
    "prompt": ({"prompt": ["a dog"]}, "prompt is of drawing pictures"),
    "subject": ({"subject": "mushroom"}, "subject is of the miniature's world"),
    "no such subject": ({"clip": "miniature", "subject": "dog"}, "subject 'dog' is not one of fish, flower"),
    "base alone": ({"pictures": None, "class_pictures": None, "base_class_pictures": None, "prompt": ["a dog"],
                    "class_prompt": ["a cat"], "pretrained_model_name_or_path": "miniature", "metrics": ["drift"]},
                   "there is no model but the base"),
    "confidence": ({"confidence": 95.0}, "confidence must be between 0 and 1, not 95.0"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1"),
    "not drawn": ({"pictures": None, "class_pictures": None, "base_class_pictures": None,
                   "pretrained_model_name_or_path": "miniature"}, "prompt is missing"),
    "drawn class": ({"pictures": None, "pretrained_model_name_or_path": "miniature"}, "are drawn from class_prompt"),
    "name base": ({"pictures": None, "class_pictures": None, "base_class_pictures": None, "prompt": ["a dog"],
                   "pretrained_model_name_or_path": "miniature", "spectral_shifts_ckpt": ["base=x"]},
                  "'base' is the name of the model without shifts"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, config: EvaluateConfig, place: Path) -> None:
    changes, said = MISTAKES[name]

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(one) for one in value]
        return value.format(place) if isinstance(value, str) else value

    with pytest.raises(SVDiffError) as error:
        evaluate(replace(config, **{key: filled(value) for key, value in changes.items()}))
    assert said.format(place) in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(config.output_dir).exists()


def test_from_the_command_line(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "svdiff.cli", "evaluate", "--output_dir", str(tmp_path / "out")]
    flags = ["--clip", str(place / "clip"), "--resamples", "20", "--pictures", str(place / "ours")]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "text alignment (CLIP), higher is better" in done.stdout
    assert f"look at {tmp_path / 'out' / 'report.html'}" in done.stdout
    done = subprocess.run([*command, *flags, "--metrics", "fid"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "svdiff: error: fid cannot be computed: no reference_dir is given\n"


def test_the_whole_on_the_miniature(tmp_path: Path) -> None:
    """It draws, judges by its own encoder and recogniser, and finds shifts of nothing to move nothing."""
    pipeline = load_pipeline("miniature")
    adapter = svdiff.attach(pipeline)
    adapter.save_weights(tmp_path / "nothing")
    for group in adapter.param_groups():
        for parameter in group["params"]:
            nn.init.normal_(parameter, std=1.0)
    adapter.save_weights(tmp_path / "noise")
    rng, subject = random.Random(0), tmp_path / "subject"
    subject.mkdir()
    for i, scene in enumerate(world.subject_scenes("mushroom")[:4]):
        world.render(scene, rng).save(subject / f"{i}.png")
    result = evaluate(
        EvaluateConfig(
            pretrained_model_name_or_path="miniature",
            spectral_shifts_ckpt=[str(tmp_path / "nothing"), str(tmp_path / "noise")],
            prompt=["a large red circle on the left, white background", "a small sks toy on the right"],
            class_prompt=["a large blue star in the center, gray background, solid", "a red cross on the right"],
            num_images_per_prompt=4,
            num_inference_steps=10,
            guidance_scale=2.5,
            scheduler_type="dpm++",
            reference_dir=str(subject),
            subject="mushroom",
            modifier_token=["sks"],
            output_dir=str(tmp_path / "out"),
            resamples=100,
        )
    )
    found = figures(result.output_dir)
    assert {features for _, _, features in found} == {"miniature encoder", "recogniser"}  # never called CLIP
    assert {metric for _, metric, _ in found} == KINDS.keys()
    own, read = "miniature encoder", "recogniser"
    for name in ("text_alignment", "image_alignment", "kid", "fid", "diversity"):
        assert found["nothing", name, own]["value"] == pytest.approx(found["base", name, own]["value"], abs=2e-3)
    assert found["nothing", "drift", own]["value"] < 1e-3 < 0.05 < found["noise", "drift", own]["value"]
    assert found["nothing", "class_kid", own]["value"] < found["noise", "class_kid", own]["value"]
    assert found["base", "class_captions_read", read]["value"] > 0.7
    assert found["noise", "class_captions_read", read]["value"] < 0.3
    assert found["noise", "text_alignment", own]["high"] < found["base", "text_alignment", own]["low"]
    assert found["base", "subject_shown", read] == found["nothing", "subject_shown", read] | {"entry": "base"}
    assert ("base", "drift", own) not in found
    drawn = {kind: result.output_dir / kind / "noise" for kind in ("pictures", "class_pictures")}
    assert [len(list(folder.glob("0*.png"))) for folder in drawn.values()] == [8, 8]
    again = evaluate(
        EvaluateConfig(
            pictures=[str(drawn["pictures"])],
            class_pictures=[str(drawn["class_pictures"])],
            base_class_pictures=str(result.output_dir / "class_pictures" / "base"),
            reference_dir=str(subject),
            clip="miniature",
            subject="mushroom",
            modifier_token=["sks"],
            output_dir=str(tmp_path / "again"),
            resamples=100,
        )
    )
    assert [figure.as_json() for figure in again.figures] == [one for key, one in found.items() if key[0] == "noise"]
    page = Page((result.output_dir / "report.html").read_text())
    assert "(miniature encoder)" in page.words
    assert "CLIP" not in page.words


def test_a_subject_is_found_where_it_is(tmp_path: Path) -> None:
    """Rendered pictures, so that what should come out is known."""
    rng, folders = random.Random(0), {}
    for name in ("mushroom", "fish"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        lines = []
        for i, scene in enumerate(world.subject_scenes(name)):
            world.render(scene, rng).save(folders[name] / f"{i:02d}.png")
            text = world.with_rare_tokens(scene, {name: "sks"})
            lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": text}))
        (folders[name] / "metadata.jsonl").write_text("\n".join(lines))
    result = evaluate(
        EvaluateConfig(
            pictures=[str(folder) for folder in folders.values()],
            reference_dir=str(folders["mushroom"]),
            clip="miniature",
            subject="mushroom",
            modifier_token=["sks"],
            output_dir=str(tmp_path / "out"),
            resamples=100,
        )
    )
    found = figures(result.output_dir)
    assert found["mushroom", "subject_shown", "recogniser"]["value"] == 1
    assert found["fish", "subject_shown", "recogniser"]["value"] == 0
    own = "miniature encoder"
    assert found["mushroom", "image_alignment", own]["low"] > found["fish", "image_alignment", own]["high"]
    assert found["mushroom", "kid", own]["value"] < found["fish", "kid", own]["value"]
    assert found["mushroom", "fid", own]["value"] == pytest.approx(0, abs=1e-6)
    for entry in folders:
        assert found[entry, "captions_read", "recogniser"]["value"] > 0.9


def test_features_of_torch_are_those_of_the_run(config: EvaluateConfig) -> None:
    """A batch of one, or of all, gives the same figures."""
    one = evaluate(replace(config, batch_size=1, lpips=None))
    all_ = evaluate(replace(config, batch_size=64, lpips=None, output_dir=config.output_dir + "_all"))
    for a, b in zip(one.figures, all_.figures, strict=True):
        assert a.estimate.value == pytest.approx(b.estimate.value, rel=1e-4, abs=1e-6)
    assert torch.get_default_dtype() == torch.float32
