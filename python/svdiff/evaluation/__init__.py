"""How good pictures are: how well they follow prompts and subject, how varied they are, and what else moved.

`Encoder` turns pictures and prompts into features, the functions of `metrics` turn features into figures, and
`estimate` says how sure these are::

    clip = load_clip("openai/clip-vit-large-patch14")
    images, texts = clip.images(pictures), clip.texts(prompts)
    estimate(partial(text_alignment, images, texts), len(images))  # Estimate(value=0.31, low=0.30, high=0.32, count=64)
"""

from __future__ import annotations

from .encoders import Encoder, load_clip, load_dino, load_inception, load_miniature_encoder
from .intervals import Estimate, bootstrap_interval, estimate
from .lpips import LPIPS, load_lpips
from .metrics import cosine_distances, diversity, drift, fid, image_alignment, kid, mean, text_alignment
from .pictures import Judged, judged_pictures

__all__ = [
    "LPIPS",
    "Encoder",
    "Estimate",
    "Judged",
    "bootstrap_interval",
    "cosine_distances",
    "diversity",
    "drift",
    "estimate",
    "fid",
    "image_alignment",
    "judged_pictures",
    "kid",
    "load_clip",
    "load_dino",
    "load_inception",
    "load_lpips",
    "load_miniature_encoder",
    "mean",
    "text_alignment",
]
