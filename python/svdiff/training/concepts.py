"""What is to be learnt: one subject, or a list of them, and the pictures of each and of its class."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from svdiff_kernels import SVDiffError

from .config import TrainConfig
from .data import Picture, dataset_pictures, find_pictures

_OPENING = re.compile(r"^\s*(?:an?\s+)?(?:photo|picture|image|painting|rendering)\s+of\s+", re.IGNORECASE)
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class Concept:
    """One subject.

    Attributes:
        instance_data_dir: folder with its pictures; None if they come from a dataset.
        instance_prompt: caption of pictures without one.
        class_prompt: what its class is called; several prompts are taken in turn.
        class_data_dir: folder with pictures of the class.
        token: the word that stands for it, such as "sks".
        phrase: what mixed captions call it, such as "a sks dog".
        class_phrase: what they call its class, such as "a dog".
    """

    instance_data_dir: str | None
    instance_prompt: str | None = None
    class_prompt: tuple[str, ...] = ()
    class_data_dir: str | None = None
    token: str | None = None
    phrase: str | None = None
    class_phrase: str | None = None

    def names(self) -> tuple[str, str]:
        """`(phrase, class_phrase)`, by default the prompts without "a photo of".

        Raises:
            SVDiffError: there is nothing to make them of.
        """
        phrase = self.phrase or (self.instance_prompt and _OPENING.sub("", self.instance_prompt))
        class_phrase = self.class_phrase or (_OPENING.sub("", self.class_prompt[0]) if self.class_prompt else None)
        if not phrase:
            raise SVDiffError(f"{self}: mixed pictures need an instance_prompt, or a phrase such as 'a sks dog'")
        return phrase.strip(), (class_phrase or phrase).strip()

    def is_named(self, caption: str) -> bool:
        """Whether a caption names the class: of class pictures, others than those cannot pass for it in a mixture."""
        words = set(_WORDS.findall(self.names()[1].lower())) - {"a", "an", "the"}
        return words <= set(_WORDS.findall(caption.lower()))

    def own_token(self) -> str:
        """`token`, by default the words of the phrase that the class's phrase lacks.

        Raises:
            SVDiffError: there are none.
        """
        phrase, class_phrase = self.names()
        words = [word for word in phrase.split() if word not in class_phrase.split()]
        token = self.token or " ".join(words)
        if not token or token not in phrase:
            raise SVDiffError(f"{self}: no token of its own in {phrase!r}: give token, phrase and class_phrase")
        return token

    def __str__(self) -> str:
        return f"concept {self.instance_data_dir or self.phrase}"


def concepts_of(config: TrainConfig) -> list[Concept]:
    """The concepts that a run is about.

    Raises:
        SVDiffError: the list cannot be read, is empty, or has an entry that makes no sense.
    """
    if config.concepts_list is None:
        prompts = tuple(config.class_prompt or ())
        only = Concept(config.instance_data_dir, config.instance_prompt, prompts, config.class_data_dir)
        _check_real_prior(config, [only])
        return [only]
    path = Path(config.concepts_list).expanduser()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SVDiffError(f"cannot read concepts_list {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise SVDiffError(f"{path} must hold a list of concepts")
    found = [_concept(entry, f"{path}, concept {i}") for i, entry in enumerate(entries, start=1)]
    if config.with_prior_preservation and (lacking := [c for c in found if not c.class_prompt]):
        raise SVDiffError(f"{lacking[0]}: with_prior_preservation needs its class_prompt")
    _check_real_prior(config, found)
    if config.cut_mix_probability and len(found) < 2:
        raise SVDiffError(f"{path} has one concept: cut_mix_probability needs two or more")
    for concept in found if config.unmix_loss_weight else []:
        concept.own_token()
    return found


def _check_real_prior(config: TrainConfig, concepts: Sequence[Concept]) -> None:
    for concept in concepts if config.real_prior else []:
        common = config.real_prior_dir or config.real_prior_dataset
        if common and concept.class_data_dir:
            raise SVDiffError(
                f"{concept}: it has a class_data_dir, and there is {common} to choose from: leave one out"
            )
        if not common and not concept.class_data_dir:
            raise SVDiffError(
                "real_prior has no pictures to choose from: give real_prior_dir, real_prior_dataset or class_data_dir"
            )


def _concept(entry: object, where: str) -> Concept:
    known = {f.name for f in fields(Concept)}
    if not isinstance(entry, dict):
        raise SVDiffError(f"{where} is no object with {', '.join(sorted(known))}")
    values = dict(entry)
    values.pop("num_class_images", None)  # in lists that were made for other scripts: ours has one for all
    if unknown := sorted(values.keys() - known):
        raise SVDiffError(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    prompts = values.get("class_prompt") or []
    values["class_prompt"] = tuple(prompts) if isinstance(prompts, list) else (prompts,)
    texts = [value for key, value in values.items() if key != "class_prompt" and value is not None]
    if not all(isinstance(text, str) and text.strip() for text in (*texts, *values["class_prompt"])):
        raise SVDiffError(f"{where}: every value must be a text that is not empty")
    if values.get("instance_data_dir") is None:
        raise SVDiffError(f"{where} has no instance_data_dir")
    return Concept(**values)


def instance_pictures(config: TrainConfig, concept: Concept) -> Sequence[Picture]:
    """The pictures of a subject, with captions; errors as of `find_pictures` and `dataset_pictures`."""
    if concept.instance_data_dir is not None:
        return find_pictures(concept.instance_data_dir, concept.instance_prompt)
    assert config.dataset_name is not None
    return dataset_pictures(
        config.dataset_name,
        config.dataset_config_name,
        image_column=config.image_column,
        caption_column=config.caption_column,
        prompt=concept.instance_prompt,
    )
