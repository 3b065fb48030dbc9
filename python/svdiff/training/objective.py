"""What a run trains on, put together: from settings, pictures and a model to batches and their loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from svdiff_kernels import SVDiffError

from ..progress import progress_bar
from .concepts import Concept
from .config import TrainConfig, resizes
from .cutmix import CutMix
from .data import Picture, Size, load_picture
from .dreambooth import DreamBooth, Pool
from .families import Family
from .noising import noising_of
from .resizing import LARGEST, resized_captions
from .sources import Captions, Latents
from .unmix import Unmix


def make_objective(
    config: TrainConfig,
    host: Any,
    family: Family,
    concepts: Sequence[Concept],
    instances: Sequence[Sequence[Picture]],
    classes: Sequence[Sequence[Picture]],
    buckets: Sequence[Size],
    trained_encoders: Collection[str],
) -> DreamBooth:
    """Batches and their loss; several processes have shared what can be encoded beforehand.

    Args:
        config: settings of the run.
        host: accelerate's handle.
        family: of the pipeline, whose models are where they compute.
        concepts: the subjects.
        instances: pictures of each subject.
        classes: pictures of each subject's class; empty without prior preservation.
        buckets: sizes that pictures are cut to.
        trained_encoders: text encoders that change while the run goes on.

    Raises:
        SVDiffError: a picture is damaged, or a subject's token is not in a caption.
    """
    numbers: dict[Picture, int] = {}
    for picture in (picture for group in (*instances, *classes) for picture in group):
        numbers.setdefault(picture, len(numbers))
    subjects = {picture for group in instances for picture in group} if resizes(config) else set()
    loaded = [
        load_picture(picture, buckets, detail=LARGEST if picture in subjects else 1.0)
        for picture in progress_bar(list(numbers), "Reading pictures", delay=3)
    ]
    captions = [picture.caption for picture in numbers]
    pools = []
    mixtures: dict[str, tuple[int, int]] = {}
    for name, groups in (("instance", instances), ("class", classes)):
        if not groups:
            continue
        cut_mix = None
        if config.cut_mix_probability:
            of_classes = name == "class"
            named = [_named(concept, group, of_classes) for concept, group in zip(concepts, groups, strict=True)]
            cut_mix = CutMix(
                [{numbers[picture]: phrase for picture, phrase in group.items()} for group in named],
                config.cut_mix_prompts,
                probability=config.cut_mix_probability,
            )
            mixtures |= dict.fromkeys(cut_mix.captions(), (-1, -1)) if of_classes else cut_mix.captions()
        distinct = list(dict.fromkeys(numbers[picture] for group in groups for picture in group))
        resized = resizes(config) and name == "instance"
        pools.append(Pool(name, distinct, loaded, captions, cut_mix, config.seed, resized=resized))
    changed = [text for picture in subjects for text in resized_captions(picture.caption)]
    distinct_captions = sorted({*captions, *mixtures, *changed})
    unmix = None
    if config.unmix_loss_weight:
        spots = _spots(family, concepts, distinct_captions, mixtures)
        unmix = Unmix(family.denoiser, spots.to(host.device))
    objective = DreamBooth(
        family,
        noising_of(config, family.pipeline, flow=family.flow),
        Latents(
            family.pipeline.vae,
            loaded,
            center_crop=config.center_crop,
            cache=config.cache_latents,
            scale=family.pipeline.vae_scale_factor,
            process=host.process_index,
            processes=host.num_processes,
            gather=host.gather,
        ),
        Captions(family, distinct_captions, trained=trained_encoders),
        pools,
        batch_size=config.train_batch_size,
        prior_weight=config.prior_loss_weight,
        random_flip=config.random_flip,
        unmix=unmix,
        unmix_weight=config.unmix_loss_weight,
        seed=config.seed,
        process=host.process_index,
        processes=host.num_processes,
    )
    if host.num_processes > 1:  # one alone encodes a picture when it is first drawn, and begins sooner
        objective.prepare()
    return objective


def _named(concept: Concept, pictures: Sequence[Picture], of_classes: bool) -> dict[Picture, str]:
    """What mixtures are made of, and what captions call it.

    Of class pictures such as name the class, if any do: of another "a dog on the left" would not be true.
    """
    phrase = concept.names()[of_classes]
    if of_classes:
        pictures = [picture for picture in pictures if concept.is_named(picture.caption)] or pictures
    return {picture: picture.phrase or phrase for picture in pictures}


def _spots(
    family: Family, concepts: Sequence[Concept], captions: Sequence[str], mixtures: dict[str, tuple[int, int]]
) -> torch.Tensor:
    """``[captions, 2, L]``: which tokens of a mixture's caption are the first subject's own, and the second's."""
    encoder = next(iter(family.text_encoders))
    spots = torch.zeros(len(captions), 2, family.tokens(encoder, captions[:1]).shape[1])
    for row, caption in enumerate(captions):
        for i, concept in enumerate(mixtures.get(caption, ())):
            if concept < 0:  # of classes, which have no token of their own
                continue
            token = concepts[concept].own_token()
            places = family.token_places(encoder, caption, token)
            if not places:
                raise SVDiffError(f"the token {token!r} is not in the caption {caption!r}, or was cut off")
            spots[row, i, places] = 1
    return spots
