"""Real pictures of a class, chosen by their captions (Custom Diffusion).

Of pictures that the base model draws of a class a fine-tune learns its flaws too. So Custom Diffusion (arXiv
2212.04488) takes 200 real ones from a large captioned set, of such captions as are similar to the class prompt: a
cosine of at least 0.85 in the feature space of CLIP's text encoder. Each keeps its own caption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svdiff_kernels import SVDiffError

from ..outputs import writing
from ..pipelines import loading
from ..processes import by_the_first, say, share
from ..progress import progress_bar
from .concepts import Concept
from .config import TrainConfig
from .data import Picture, PictureDataset, find_pictures
from .families import Family

CHOSEN_FILE = "real_prior.json"
"""In the output folder: which pictures were chosen, and how similar their captions are."""

Embed = Callable[[Sequence[str]], Tensor]
"""Gives texts as rows of length 1, ``[len(texts), D]`` in fp32."""

_BATCH = 64
_DIGITS = 4  # beyond them a similarity depends on how captions fall into batches, and they on the number of processes


class Chosen(NamedTuple):
    """A picture, and how similar its caption is to the class prompt."""

    picture: Picture
    similarity: float


def real_classes(
    config: TrainConfig, host: Any, family: Family, concepts: Sequence[Concept], directory: Path
) -> list[list[Picture]]:
    """Pictures of each concept's class, the most similar first; what was chosen is told in `CHOSEN_FILE`.

    Of several class prompts the most similar counts. Captions are compared as `config.real_prior_clip` embeds them,
    by its projected features, as in the paper. By default it is the pipeline's first text encoder, whose pooled state
    is not projected, if that encoder has no projection (SD 1.x and 2.x, SDXL, FLUX): nothing else has to be loaded, but
    cosines are others then, and so is what 0.85 lets in. The miniature's encoder has never been taught which texts are
    similar: its cosines tell likeness of words more than of things.

    Args:
        config: settings of the run.
        host: accelerate's handle; processes share the captions.
        family: of the pipeline, whose text encoder goes to the device.
        concepts: the subjects.
        directory: the output folder.

    Raises:
        SVDiffError: pictures or captions cannot be read, the CLIP cannot be loaded, or too few are similar enough.
    """
    embed = _embed_by_clip(config.real_prior_clip, host) if config.real_prior_clip else _embed_by_own(family, host)
    sources: dict[str | None, _Source] = {}
    found: dict[tuple[str | None, tuple[str, ...]], list[Chosen]] = {}
    for concept in concepts:
        key = concept.class_data_dir, concept.class_prompt
        if key in found:
            continue
        if concept.class_data_dir not in sources:
            sources[concept.class_data_dir] = _source(config, concept)
        source = sources[concept.class_data_dir]
        similarities = _similarities(source.captions, concept.class_prompt, embed, host)
        numbers = choose(similarities, config, ", ".join(concept.class_prompt))
        pictures = source.pictures(numbers)
        found[key] = [Chosen(picture, similarities[i]) for picture, i in zip(pictures, numbers, strict=True)]
        say(
            f"chose {len(numbers)} of {len(similarities)} real pictures for {', '.join(concept.class_prompt)!r}, of "
            f"similarity {similarities[numbers[-1]]:.{_DIGITS}f} to {similarities[numbers[0]]:.{_DIGITS}f}"
        )
    by_the_first(host, lambda: _tell(directory, config, found))
    return [[chosen.picture for chosen in found[concept.class_data_dir, concept.class_prompt]] for concept in concepts]


def choose(similarities: Sequence[float], config: TrainConfig, prompt: str) -> list[int]:
    """The numbers of the `num_class_images` most similar, the most similar first; of equal ones the first come first.

    Raises:
        SVDiffError: fewer are similar enough.
    """
    order = sorted(range(len(similarities)), key=lambda i: -similarities[i])
    enough = [i for i in order if similarities[i] >= config.real_prior_min_similarity]
    if len(enough) < config.num_class_images:
        best = f"the best has {similarities[order[0]]:.{_DIGITS}f}" if order else "none has a caption"
        raise SVDiffError(
            f"real_prior: of {len(similarities)} pictures {len(enough)} have a similarity of at least "
            f"{config.real_prior_min_similarity:g} to {prompt!r}, {config.num_class_images} are wanted, and {best}: "
            "lower real_prior_min_similarity or num_class_images, or choose from more pictures"
        )
    return enough[: config.num_class_images]


class _Source(NamedTuple):
    """Captions to choose by, and the pictures of some of them by number."""

    captions: list[str]
    pictures: Callable[[Sequence[int]], list[Picture]]


def _source(config: TrainConfig, concept: Concept) -> _Source:
    folder = concept.class_data_dir or config.real_prior_dir
    if folder is not None:
        found = find_pictures(folder)
        return _Source([picture.caption for picture in found], lambda numbers: [found[i] for i in numbers])
    assert config.real_prior_dataset is not None
    dataset = PictureDataset(
        config.real_prior_dataset,
        None if config.dataset_name else config.dataset_config_name,
        image_column=config.image_column,
        caption_column=config.caption_column or "text",
    )
    told = [i for i, text in enumerate(dataset.captions) if isinstance(text, str) and text.strip()]
    return _Source(
        [dataset.captions[i].strip() for i in told], lambda numbers: dataset.pictures([told[i] for i in numbers])
    )


def _similarities(captions: Sequence[str], prompts: Sequence[str], embed: Embed, host: Any) -> list[float]:
    """Of each caption to that prompt which it is most similar to; processes share the work, and all know all."""
    distinct = list(dict.fromkeys(captions))
    if not distinct:
        return []
    wanted = embed(prompts)
    mine = share(distinct, host.process_index, host.num_processes)
    batches = [mine[start : start + _BATCH] for start in range(0, len(mine), _BATCH)]
    parts = [(embed(batch) @ wanted.T).amax(dim=1) for batch in progress_bar(batches, "Comparing captions", delay=3)]
    everyone = host.gather(torch.cat(parts))[: len(distinct)].double().tolist()
    known = {caption: round(one, _DIGITS) for caption, one in zip(distinct, everyone, strict=True)}
    return [known[caption] for caption in captions]


def _embed_by_own(family: Family, host: Any) -> Embed:
    tokenizer, encoder = (getattr(family.pipeline, name) for name in family.readers[0])
    return _embed_by(tokenizer, encoder, host)


def _embed_by_clip(name: str, host: Any) -> Embed:
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection

    where = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    with loading(name):
        config = AutoConfig.from_pretrained(where)
        if config.model_type not in ("clip", "clip_text_model"):
            raise SVDiffError(f"it is a {config.model_type}, no CLIP")
        text = getattr(config, "text_config", config)
        text.projection_dim = config.projection_dim  # of a whole CLIP's the inner one need not be right
        encoder, told = CLIPTextModelWithProjection.from_pretrained(
            where, config=text, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(told["missing_keys"]):
            raise SVDiffError(f"it has no {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(where)
    return _embed_by(tokenizer, encoder.eval(), host)


def _embed_by(tokenizer: Any, encoder: Any, host: Any) -> Embed:
    encoder.to(host.device)
    longest = encoder.config.max_position_embeddings

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        out = encoder(tokens.input_ids.to(host.device))  # what follows a text's end has no influence on it
        features = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        return F.normalize(features.float(), dim=-1)

    return embed


def _tell(directory: Path, config: TrainConfig, found: dict[tuple[str | None, tuple[str, ...]], list[Chosen]]) -> None:
    """In the order of the concepts."""
    classes = [
        {
            "class_prompt": list(prompts),
            "chosen": [
                {"file": str(picture.path), "caption": picture.caption, "similarity": similarity}
                for picture, similarity in chosen
            ],
        }
        for (_, prompts), chosen in found.items()
    ]
    told = {"text_encoder": config.real_prior_clip or config.pretrained_model_name_or_path, "classes": classes}
    partial = directory / f".{CHOSEN_FILE}.partial"
    with writing(directory):
        partial.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(directory / CHOSEN_FILE)
