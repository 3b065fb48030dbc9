"""Stands in for svdiff-pytorch 0.2 (mkshing), on current diffusers: its functions, models, modules and files.

A script imports from ``svdiff.compat.svdiff_pytorch`` what it imported from ``svdiff_pytorch``; `utils`, `layers` and
`pipeline_stable_diffusion_ddim_inversion` are where they were. It optimises the same parameters by the same names, and
reads and writes the same files. No weight is rebuilt in a forward pass, and decompositions are kept in the user's
`svdiff_kernels.FactorCache`, so that only the first load of a model takes long.

What differs: a state dict has ``U``, ``sigma`` and ``Vh`` (of a norm ``sigma`` and ``direction``) where it had
``weight``, which is dropped; scripts take the keys with "delta" out of it and do not notice. Shifts stay in fp32 when a
model is cast to half precision. See docs/compat.md.
"""

from __future__ import annotations

from svdiff_kernels import SVDiffError

try:
    import diffusers  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise SVDiffError(
        'svdiff.compat.svdiff_pytorch needs diffusers and transformers: pip install "svdiff-kernels[diffusers]"'
    ) from error

from .models import CLIPTextModelForSVDiff, UNet2DConditionModelForSVDiff
from .pipeline_stable_diffusion_ddim_inversion import StableDiffusionPipelineWithDDIMInversion
from .utils import (
    SCHEDULER_MAPPING,
    image_grid,
    load_text_encoder_for_svdiff,
    load_unet_for_svdiff,
    slerp,
    slerp_tensor,
)

__all__ = [
    "SCHEDULER_MAPPING",
    "CLIPTextModelForSVDiff",
    "StableDiffusionPipelineWithDDIMInversion",
    "UNet2DConditionModelForSVDiff",
    "image_grid",
    "load_text_encoder_for_svdiff",
    "load_unet_for_svdiff",
    "slerp",
    "slerp_tensor",
]
