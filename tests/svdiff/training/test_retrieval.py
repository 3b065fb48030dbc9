"""Real class pictures, chosen by what their captions say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from svdiff import TrainConfig, train
from svdiff.pipelines import load_pipeline
from svdiff.training import retrieval
from svdiff.training.concepts import Concept, concepts_of
from svdiff.training.data import Picture
from svdiff.training.families import family_of
from svdiff.training.retrieval import CHOSEN_FILE, real_classes
from tiny import RESOLUTION, tiny_tokenizer

from svdiff_kernels import SVDiffError

WORLD = [
    "a house at the top", "a large blue fish on a white background", "a photo of a flower", "a photo of a red fish",
    "a picture of a fish", "a small fish", "a tree and a house", "fish",
]  # fmt: skip
HOST = SimpleNamespace(
    device=torch.device("cpu"), process_index=0, num_processes=1, is_main_process=True,
    gather=lambda tensor: tensor, reduce=lambda tensor, how: tensor,
)  # fmt: skip


def write(folder: Path, captions: list[str]) -> Path:
    """A folder of pictures, whose names are in the order of their captions."""
    folder.mkdir()
    for i, caption in enumerate(captions):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{caption}\n")
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write(tmp_path / "world", WORLD)


@pytest.fixture(scope="module")
def family() -> Any:
    """Of the miniature, whose text encoder knows what it reads."""
    return family_of(load_pipeline("miniature"))


@pytest.fixture
def config(world: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        "miniature", "photos", instance_prompt="a photo of a sks fish", with_prior_preservation=True,
        class_prompt=["a photo of a fish"], num_class_images=2, real_prior=True, real_prior_dir=str(world),
        real_prior_min_similarity=0.5, output_dir=str(tmp_path / "run"),
    )  # fmt: skip


def chosen(config: TrainConfig, family: Any, concepts: list[Concept] | None = None) -> list[list[Picture]]:
    directory = Path(config.output_dir)
    directory.mkdir(exist_ok=True)
    return real_classes(config, HOST, family, concepts or concepts_of(config), directory)


def told(config: TrainConfig) -> Any:
    return json.loads((Path(config.output_dir) / CHOSEN_FILE).read_text())


def cosines(family: Any, captions: list[str], prompt: str) -> list[float]:
    """As they are defined: of what the text encoder makes of a caption where it ends, one caption at a time."""

    def pooled(text: str) -> torch.Tensor:
        ids = family.tokens("text_encoder", [text])
        with torch.no_grad():
            return family.pipeline.text_encoder(ids).pooler_output[0]

    return [float(F.cosine_similarity(pooled(text), pooled(prompt), dim=0)) for text in captions]


def test_the_most_similar_captions_are_chosen(config: TrainConfig, family: Any, capsys: Any) -> None:
    """As the miniature's own text encoder sees it; each picture keeps its caption, and all is told."""
    similarities = cosines(family, WORLD, "a photo of a fish")
    order = sorted(range(len(WORLD)), key=lambda i: -similarities[i])
    ((*first,),) = chosen(config, family)
    assert [(p.path.name, p.caption) for p in first] == [(f"{i}.png", WORLD[i]) for i in order[:2]]
    assert first[0].caption == "a picture of a fish"
    (one,) = told(config)["classes"]
    assert one["class_prompt"] == ["a photo of a fish"] and told(config)["text_encoder"] == "miniature"
    assert [entry["file"] for entry in one["chosen"]] == [str(p.path) for p in first]
    assert [entry["caption"] for entry in one["chosen"]] == [p.caption for p in first]
    found = [entry["similarity"] for entry in one["chosen"]]
    assert found == pytest.approx([similarities[i] for i in order[:2]], abs=1e-4)
    assert "chose 2 of 8 real pictures for 'a photo of a fish', of similarity 0." in capsys.readouterr().out
    (again,) = chosen(config, family)
    assert again == first


def test_too_few_are_said_with_the_way_out(config: TrainConfig, family: Any) -> None:
    similarities = sorted(cosines(family, WORLD, "a photo of a fish"), reverse=True)
    between = (similarities[2] + similarities[3]) / 2
    chosen(replace(config, num_class_images=3, real_prior_min_similarity=between), family)
    wanted = rf"of 8 pictures 3 have .* at least .* to 'a photo of a fish', 4 are wanted, .*has {similarities[0]:.4f}: "
    with pytest.raises(SVDiffError, match=f"{wanted}lower real_prior_min_similarity or num_class_images, or choose"):
        chosen(replace(config, num_class_images=4, real_prior_min_similarity=between), family)


def test_equal_captions_come_by_name(config: TrainConfig, family: Any, tmp_path: Path) -> None:
    """And of several class prompts the most similar counts."""
    folder = write(tmp_path / "same", ["a tree", "fish", "a house", "fish", "a tree"])
    config = replace(config, real_prior_dir=str(folder), num_class_images=4, class_prompt=["a tree", "fish"])
    (found,) = chosen(config, family)
    assert [p.path.name for p in found] == ["0.png", "1.png", "3.png", "4.png"]
    assert {entry["similarity"] for entry in told(config)["classes"][0]["chosen"]} == {1.0}


def test_each_class_has_its_own(config: TrainConfig, family: Any, world: Path, tmp_path: Path) -> None:
    """From one folder for all, or each from its own; and concepts of one class share."""
    fish, house = (Concept("x", "a sks", (name,)) for name in ("a photo of a fish", "a tree and a house"))
    one, two, three = chosen(replace(config, num_class_images=1), family, [fish, house, fish])
    assert [group[0].caption for group in (one, two, three)] == [
        "a picture of a fish", "a tree and a house", "a picture of a fish"
    ]  # fmt: skip
    assert len(told(config)["classes"]) == 2
    own = write(tmp_path / "own", ["a house and a tree"])
    own_folders = [replace(fish, class_data_dir=str(world)), replace(house, class_data_dir=str(own))]
    found = chosen(replace(config, real_prior_dir=None, num_class_images=1), family, own_folders)
    assert [group[0].path.parent for group in found] == [world, own]


def test_processes_share_the_captions(config: TrainConfig, family: Any, tmp_path: Path) -> None:
    """Two of them see together what one sees, in the same order."""
    ((*alone,),) = chosen(config, family)
    parts: list[torch.Tensor] = []
    for process in (0, 1):
        host = SimpleNamespace(**{**vars(HOST), "process_index": process, "num_processes": 2})
        host.gather = lambda tensor: parts.append(tensor) or tensor.repeat(2)
        real_classes(replace(config, real_prior_min_similarity=-1), host, family, concepts_of(config), tmp_path)
    assert [len(part) for part in parts] == [4, 4]
    similarities = [round(value, 4) for value in torch.cat(parts).tolist()]
    order = sorted(range(8), key=lambda i: -similarities[i])[:2]
    assert [WORLD[i] for i in order] == [p.caption for p in alone]


@pytest.fixture
def clip(tmp_path: Path) -> Any:
    """A tiny CLIP with random weights, and the folder that it is in."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 64, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.save_pretrained(folder)
    return SimpleNamespace(model=model, tokenizer=tokenizer, folder=folder)


def text_config(config: Any) -> Any:
    config.text_config.projection_dim = config.projection_dim
    return config.text_config


def test_another_clip_may_judge(config: TrainConfig, family: Any, clip: Any) -> None:
    """By its projected features, as the paper has it; a whole one, or its text encoder alone."""
    from transformers import CLIPTextModelWithProjection

    def features(texts: list[str]) -> torch.Tensor:
        tokens = clip.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = clip.model.get_text_features(**tokens)
        return F.normalize(getattr(found, "pooler_output", found), dim=-1)

    similarities = (features(WORLD) @ features(["a photo of a fish"]).T).flatten()
    config = replace(config, real_prior_clip=str(clip.folder), num_class_images=3, real_prior_min_similarity=-1.0)
    (found,) = chosen(config, family)
    assert [p.caption for p in found] == [WORLD[i] for i in similarities.argsort(descending=True, stable=True)[:3]]
    said = [entry["similarity"] for entry in told(config)["classes"][0]["chosen"]]
    assert said == pytest.approx(similarities.sort(descending=True).values[:3].tolist(), abs=1e-4)
    assert told(config)["text_encoder"] == str(clip.folder)
    text = clip.folder.parent / "text alone"
    half = CLIPTextModelWithProjection.from_pretrained(clip.folder, config=text_config(clip.model.config))
    half.save_pretrained(text)
    clip.tokenizer.save_pretrained(text)
    assert chosen(replace(config, real_prior_clip=str(text)), family) == [found]
    (own,) = chosen(replace(config, real_prior_clip=None), family)
    assert own != found


def test_no_clip_is_unpickled(config: TrainConfig, family: Any, clip: Any) -> None:
    (clip.folder / "model.safetensors").unlink()
    torch.save(clip.model.state_dict(), clip.folder / "pytorch_model.bin")
    with pytest.raises(SVDiffError, match=r"cannot load the model .*clip"):
        chosen(replace(config, real_prior_clip=str(clip.folder)), family)


def test_what_is_no_clip_does_not_judge(config: TrainConfig, family: Any, clip: Any) -> None:
    """Nor one without its projection, which would be made up."""
    save_file(
        {k: v for k, v in load_file(clip.folder / "model.safetensors").items() if "text_projection" not in k},
        clip.folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    with pytest.raises(SVDiffError, match=r"it has no text_projection\.weight"):
        chosen(replace(config, real_prior_clip=str(clip.folder)), family)
    (clip.folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SVDiffError, match="it is a bert, no CLIP"):
        chosen(replace(config, real_prior_clip=str(clip.folder)), family)


def test_from_a_dataset(config: TrainConfig, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is chosen is read; what has no caption cannot be."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    content = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    captions = [None, *WORLD, " "]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = [content if caption in ("a picture of a fish", "a photo of a flower") else None for caption in captions]
    table = datasets.Dataset.from_dict({"image": images, "text": captions}, features=features)
    (tmp_path / "packed").mkdir()
    table.to_parquet(tmp_path / "packed" / "train.parquet")
    wanted = chosen(config, family)[0]
    dataset = replace(config, real_prior_dir=None, real_prior_dataset=str(tmp_path / "packed"))
    (found,) = chosen(dataset, family)
    assert [p.caption for p in found] == [p.caption for p in wanted]
    assert [p.path.name for p in found] == [f"packed[{int(p.path.stem) + 1}]" for p in wanted]
    assert all(p.content == content["bytes"] for p in found)
    with pytest.raises(SVDiffError, match="has no column 'caption'"):
        chosen(replace(dataset, caption_column="caption"), family)
    with pytest.raises(SVDiffError, match="has no picture in column 'image'"):
        chosen(replace(dataset, num_class_images=8, real_prior_min_similarity=-1.0), family)


def test_where_there_is_nothing_to_choose_from(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(SVDiffError, match="real_prior has no pictures to choose from: give real_prior_dir"):
        concepts_of(replace(config, real_prior_dir=None))
    file = tmp_path / "concepts.json"
    entry = {"instance_data_dir": "x", "class_prompt": "a fish", "class_data_dir": "y"}
    file.write_text(json.dumps([entry]))
    listed = replace(config, concepts_list=str(file))
    with pytest.raises(SVDiffError, match=r"it has a class_data_dir, and there is .*world to choose from"):
        concepts_of(listed)
    assert concepts_of(replace(listed, real_prior_dir=None))[0].class_data_dir == "y"


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux dev"])
def test_training_with_real_pictures(
    config: TrainConfig, name: str, base_of: Callable[[str], Path], pictures: Path, loaded: list[Any], capsys: Any
) -> None:
    """None is drawn; a run that goes on chooses the same, and ends the same to the bit."""
    config = replace(
        config, pretrained_model_name_or_path=str(base_of(name)), instance_data_dir=str(pictures), report_to="none",
        resolution=RESOLUTION, max_train_steps=4, checkpointing_steps=2, real_prior_min_similarity=-1.0,
    )  # fmt: skip
    whole = train(config)
    assert not (whole.output_dir / "class_images").exists()
    said = told(config)
    assert len(said["classes"][0]["chosen"]) == 2
    shutil.rmtree(whole.output_dir / "checkpoint-4")
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert resumed.losses == whole.losses and told(config) == said
    other = train(replace(config, class_prompt=["xyz"], output_dir=f"{config.output_dir}-other"))
    assert other.losses != whole.losses or told(replace(config, output_dir=str(other.output_dir))) != said


def test_what_cannot_be_written_is_said(config: TrainConfig, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHOSEN_FILE", "no/such/folder.json")
    with pytest.raises(SVDiffError, match=r"cannot write .*run"):
        chosen(config, family)
