"""Concepts: one subject of the settings, or a list of them from a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from svdiff import TrainConfig, train
from svdiff.training.concepts import Concept, concepts_of, instance_pictures
from svdiff.training.data import find_pictures

from svdiff_kernels import SVDiffError


@pytest.fixture
def listed(tmp_path: Path) -> Any:
    """Settings with a concepts_list of these entries."""

    def config(entries: Any, **changes: Any) -> TrainConfig:
        path = tmp_path / "concepts.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return TrainConfig("base", concepts_list=str(path), **changes)

    return config


def test_one_subject_from_the_settings() -> None:
    config = TrainConfig("base", "photos", instance_prompt="a sks dog", class_prompt=["a dog", "a cat"])
    (concept,) = concepts_of(config)
    assert (concept.instance_data_dir, concept.instance_prompt) == ("photos", "a sks dog")
    assert concept.class_prompt == ("a dog", "a cat")


def test_a_list_of_subjects(listed: Any, pictures: Path) -> None:
    """Of this project, and as other scripts write it."""
    first, second = concepts_of(
        listed(
            [
                {"instance_data_dir": str(pictures), "instance_prompt": "a sks dog", "class_prompt": "a dog"},
                {
                    "instance_data_dir": "b",
                    "class_prompt": ["a cat", "cats"],
                    "class_data_dir": "c",
                    "num_class_images": 9,
                },
            ]
        )
    )
    assert (first.class_prompt, first.class_data_dir) == (("a dog",), None)
    assert (second.class_prompt, second.class_data_dir, second.instance_prompt) == (("a cat", "cats"), "c", None)
    assert [p.caption for p in instance_pictures(TrainConfig("base"), first)] == ["a sks dog"] * 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("no json", "cannot read concepts_list"),
        ([], "must hold a list"),
        ({"instance_data_dir": "a"}, "must hold a list"),
        (["a"], "concept 1 is no object"),
        ([{"instance_data_dir": "a"}, {"instance_prompt": "a dog"}], "concept 2 has no instance_data_dir"),
        ([{"instance_data_dir": "a", "prompt": "b"}], "unknown key 'prompt'"),
        ([{"instance_data_dir": "a", "instance_prompt": " "}], "every value must be a text"),
        ([{"instance_data_dir": "a", "class_prompt": ["a", 3]}], "every value must be a text"),
    ],
)
def test_what_is_wrong_with_a_list(listed: Any, entries: Any, message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        concepts_of(listed(entries))


def test_what_the_settings_want_of_a_list(listed: Any, tmp_path: Path) -> None:
    dog = {"instance_data_dir": "a", "instance_prompt": "a sks dog", "class_prompt": "a dog"}
    with pytest.raises(SVDiffError, match="concept b: with_prior_preservation needs its class_prompt"):
        concepts_of(listed([dog, {"instance_data_dir": "b"}], with_prior_preservation=True))
    with pytest.raises(SVDiffError, match="has one concept"):
        concepts_of(listed([dog], cut_mix_probability=0.6))
    with pytest.raises(SVDiffError, match="no token of its own"):
        concepts_of(listed([dog | {"instance_prompt": "a dog"}] * 2, cut_mix_probability=0.6, unmix_loss_weight=1.0))
    with pytest.raises(SVDiffError, match="cannot read concepts_list"):
        concepts_of(TrainConfig("base", concepts_list=str(tmp_path / "gone.json")))


def test_names_and_tokens() -> None:
    plain = Concept("a", "A photo of a sks dog ", ("photo of a dog",))
    assert plain.names() == ("a sks dog", "a dog")
    assert plain.own_token() == "sks"
    named = replace(plain, phrase="the [V] hound", class_phrase="a hound", token="[V] hound")
    assert named.names() == ("the [V] hound", "a hound")
    assert plain.is_named("A Dog, running") and not plain.is_named("dogs") and not plain.is_named("a hound")
    assert named.own_token() == "[V] hound"
    assert Concept("a", "an image of a sks toy").names() == ("a sks toy", "a sks toy")
    with pytest.raises(SVDiffError, match="concept a: mixed pictures need an instance_prompt"):
        Concept("a").names()
    with pytest.raises(SVDiffError, match="no token of its own in 'a sks dog'"):
        replace(plain, token="cat").own_token()


def test_two_subjects_train_with_their_classes(base: Path, listed: Any, pictures: Path, tmp_path: Path) -> None:
    """Subjects of one class share its pictures; another class has its own."""
    entry = {"instance_data_dir": str(pictures)}
    config = listed(
        [
            entry | {"instance_prompt": "a sks dog", "class_prompt": "a dog"},
            entry | {"instance_prompt": "a zwx dog", "class_prompt": "a dog"},
            entry | {"instance_prompt": "a xyz cat", "class_prompt": "a cat"},
        ],
        with_prior_preservation=True,
        num_class_images=2,
        prior_generation_num_inference_steps=1,
        max_train_steps=2,
        report_to="none",
        output_dir=str(tmp_path / "run"),
    )
    train(replace(config, pretrained_model_name_or_path=str(base)))
    drawn = {
        folder.name: [p.caption for p in find_pictures(folder)]
        for folder in sorted((tmp_path / "run" / "class_images").iterdir())
    }
    assert drawn == {"1": ["a dog"] * 2, "2": ["a cat"] * 2}
