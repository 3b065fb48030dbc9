"""Who takes part, with settings that suit the miniature: of the rates that are tried, each has its best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A way to learn.

    Attributes:
        label: in tables.
        settings: of `TrainConfig`, beside those that all share.
        new_words: whether subjects are called by learned tokens.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    new_words: bool = False


_LORA = {"method": "lora", "targets": "attention", "learning_rate": 1e-3}  # as diffusers' scripts have it
_ALONE = {"train_text_encoder": False}  # the text encoder stays as it is, but for a new word
WORD: dict[str, Any] = {
    **_ALONE,
    "initializer_token": "vtn",  # a rare one, as Custom Diffusion has it
    "num_vectors": 4,
    "learning_rate_tokens": 1e-2,
}

# Of one subject: the first table.
SHIFTS = Contender("shifts (SVDiff)")
LORA_1 = Contender("LoRA r = 1", {**_LORA, "lora_rank": 1})
LORA_4 = Contender("LoRA r = 4", {**_LORA, "lora_rank": 4})
LORA_16 = Contender("LoRA r = 16", {**_LORA, "lora_rank": 16})
FULL = Contender("all weights (DreamBooth)", {"method": "full", "learning_rate": 1e-4})
CUSTOM = Contender(
    "Custom Diffusion",
    # captions here tell the size of what they show, so that words for the size of the picture would contradict them
    {**WORD, "method": "custom_diffusion", "learning_rate": 2e-3, "noaug": True},
    new_words=True,
)
MERGEABLE = Contender(
    "Custom Diffusion, keep_prefix",
    {**CUSTOM.settings, "keep_prefix": True, "learning_rate": 3e-3},
    new_words=True,
)
SHIFTS_KV = Contender(
    "shifts of K and V, new word", {**WORD, "targets": "cross_attn_kv", "learning_rate": 3e-2}, new_words=True
)
INVERSION = Contender(
    "textual inversion",
    {**WORD, "method": "textual_inversion", "with_prior_preservation": False, "learning_rate": 1e-2},
    new_words=True,
)

CONTENDERS: dict[str, Contender] = {
    "shifts": SHIFTS,
    "lora1": LORA_1,
    "lora4": LORA_4,
    "lora16": LORA_16,
    "full": FULL,
    "custom": CUSTOM,
    "mergeable": MERGEABLE,
    "shifts_kv": SHIFTS_KV,
    "inversion": INVERSION,
}

LAYERS: dict[str, Contender] = {
    "all": Contender("all, and the text encoder"),
    "unet": Contender("all of the UNet", _ALONE),
    **{
        name: Contender(label, {"targets": name})
        for name, label in (
            ("attention", "attention"),
            ("cross_attn", "cross-attention"),
            ("cross_attn_kv", "its keys and values"),
            ("down", "down blocks"),
            ("mid", "middle"),
            ("up", "up blocks"),
        )
    },
}
"""Spectral shifts of some layers of the UNet; the text encoder's are all there, but for one."""

_TRIED: dict[str, tuple[Contender, tuple[float, ...]]] = {
    "shifts": (SHIFTS, (1e-3, 3e-3, 1e-2, 3e-2)),
    "lora4": (LORA_4, (3e-4, 1e-3, 3e-3)),
    "full": (FULL, (3e-5, 1e-4, 3e-4)),
    "custom": (CUSTOM, (1e-3, 2e-3, 4e-3)),
}

RATES: dict[str, Contender] = {
    f"{name}_{rate:g}": replace(
        contender,
        label=f"{contender.label}, {rate:g}",
        settings={**contender.settings, "learning_rate": rate, "learning_rate_1d": rate},
    )
    for name, (contender, rates) in _TRIED.items()
    for rate in rates
}

ALREADY: dict[str, str] = {
    "all": "shifts",
    **{f"{name}_{rate:g}": name for name, rate in (("shifts", 1e-2), ("lora4", 1e-3), ("full", 1e-4))},
    f"custom_{CUSTOM.settings['learning_rate']:g}": "custom",
}
"""Of `LAYERS` and `RATES`, those that the first table has, by their names there: they are not taught again."""

_STYLE_WORD: dict[str, Any] = {"modifier_token": ["<style>"], "initializer_token": ["style"]}
_LOOKING: dict[str, Any] = {**_STYLE_WORD, "image_encoder": "miniature", "learning_rate_tokens": 1e-3}
_STYLE_SHIFTS: dict[str, Any] = {"learning_rate": 8e-3, "learning_rate_1d": 8e-3}

STYLISTS: dict[str, Contender | None] = {
    "none": None,
    "svd_inst": Contender("SVD-InST", {**_LOOKING, **_STYLE_SHIFTS}, new_words=True),
    "inst": Contender(
        "InST", {**_LOOKING, "method": "textual_inversion", "learning_rate_tokens": 5e-3}, new_words=True
    ),
    "inversion": Contender(
        "textual inversion",
        {**_STYLE_WORD, "method": "textual_inversion", "learning_rate": 1e-2},
        new_words=True,
    ),
    "shifts": Contender("shifts (SVDiff)", _STYLE_SHIFTS),
    "lora4": LORA_4,
    "full": FULL,
    "custom": Contender(
        CUSTOM.label,
        {
            **_ALONE,
            **_STYLE_WORD,
            "method": "custom_diffusion",
            "learning_rate": 1e-3,
            "learning_rate_tokens": 5e-3,
            "noaug": True,
        },
        new_words=True,
    ),
}
"""Of a style; none preserves a prior, and text encoders stay as they are. `None` has not learnt it."""

EDITORS: dict[str, Contender | None] = {
    "none": None,
    "shifts": SHIFTS,
    "lora4": Contender(LORA_4.label, LORA_4.settings),
    "full": FULL,
}
"""Of one picture. `None` has not learnt it."""

NAMERS: dict[str, Contender] = {
    "inversion": Contender(
        INVERSION.label,
        {
            "method": "textual_inversion",
            "modifier_token": ["<sks>"],
            "initializer_token": ["toy"],
            "learning_rate": 1e-2,
        },
        new_words=True,
    ),
    "shifts": Contender(SHIFTS.label, {"train_text_encoder": True, "learning_rate": 1e-2, "learning_rate_1d": 1e-2}),
    "lora4": Contender(LORA_4.label, {**LORA_4.settings, "train_text_encoder": True}),
}
"""Of a word for something known."""
