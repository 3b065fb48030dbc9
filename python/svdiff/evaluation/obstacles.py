"""What keeps a metric from being computed, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..miniature import NAME as MINIATURE
from .measuring import Entry
from .pictures import Judged

if TYPE_CHECKING:
    from ..evaluate import EvaluateConfig


def obstacle(
    metric: str,
    config: EvaluateConfig,
    clip: str | None,
    entries: Sequence[Entry],
    references: Sequence[Judged],
    base: Sequence[Judged],
) -> str | None:
    """Why a metric cannot be computed of all entries, or None.

    Args:
        metric: a key of `KINDS`.
        config: what is given.
        clip: the model that is taken for CLIP, if there is one.
        entries: what is judged.
        references: the subject's pictures.
        base: the base model's class pictures.
    """
    is_class = metric in ("drift", "class_kid", "class_fid", "class_captions_read")
    judged = [(entry.name, entry.class_pictures if is_class else entry.pictures) for entry in entries]
    dino, inception, lpips = config.dino, config.inception, config.lpips
    networks = {
        "text_alignment": (clip, "clip"),
        "image_alignment": (clip or dino, "clip or dino"),
        "diversity": (lpips or clip or dino, "lpips, clip or dino"),
        "drift": (lpips or clip or dino, "lpips, clip or dino"),
        **dict.fromkeys(
            ("kid", "fid", "class_kid", "class_fid"), (clip or dino or inception, "clip, dino or inception")
        ),
    }
    if metric in networks and not networks[metric][0]:
        return f"no {networks[metric][1]} is given"
    if metric in ("subject_shown", "captions_read", "class_captions_read") and clip != MINIATURE:
        return "pictures are not of the miniature's world"
    if metric == "subject_shown" and config.subject is None:
        return "no subject is given"
    if metric in ("image_alignment", "kid", "fid") and not references:
        return "no reference_dir is given"
    if is_class and not base:
        return "there are no class pictures"
    if metric in ("drift", "class_kid", "class_fid") and all(entry.class_pictures is base for entry in entries):
        return "there is no model but the base"
    if metric in ("kid", "fid", "class_kid", "class_fid"):
        others = base if is_class else references
        for name, count in (*((name, len(one)) for name, one in judged), ("what they are compared with", len(others))):
            if count < 2:
                return f"it takes at least two pictures, and there is one of {name}"
    if metric in ("text_alignment", "diversity", "captions_read", "class_captions_read"):
        for name, pictures in judged:
            if any(picture.prompt is None for picture in pictures):
                return f"pictures of {name} have no prompts (a run file, metadata.jsonl, or .txt files tell them)"
    if metric == "diversity":
        for name, pictures in judged:
            if max(Counter(picture.prompt for picture in pictures).values()) < 2:
                return f"no two pictures of {name} have the same prompt"
    if metric in ("captions_read", "class_captions_read"):
        from ..miniature.claims import said

        for name, pictures in judged:
            if not all(said(picture.prompt or "").items for picture in pictures):
                return f"a prompt of {name} names no position, as captions of the miniature's world do"
    return None
