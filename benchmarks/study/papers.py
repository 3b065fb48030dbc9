"""What the papers report, to stand beside what is found here; the same rows and columns."""

from __future__ import annotations

CUSTOM_DIFFUSION = {
    "source": "Custom Diffusion, arXiv 2212.04488, one concept",
    "columns": ("text alignment", "image alignment", "KID x 1000"),
    "rows": {
        "custom": ("Custom Diffusion", 0.795, 0.775, 20.96),
        "full": ("DreamBooth", 0.781, 0.776, 32.53),
        "inversion": ("Textual Inversion", 0.670, 0.827, 22.27),
    },
}
"""By contender of `subjects`. Features are CLIP's; KID is of pictures of the class against real ones."""

SVD_INST = {
    "source": "SVD-InST, a course report",
    "columns": ("FID", "LPIPS"),
    "rows": {
        "inst": ("InST", 127.5, 0.53),
        "svd_inst": ("SVD-InST", 125.1, 0.54),
        "": ("CycleGAN", 178.3, None),
        " ": ("StyTr2", 171.3, None),
    },
}
"""By contender of `styles`; those without a name are not run here. FID to the style, LPIPS to the content."""

SVDIFF = {
    "source": "SVDiff, arXiv 2303.11305, Stable Diffusion 1.5",
    "columns": ("file",),
    "rows": {"shifts": ("SVDiff", 1.7e6), "full": ("DreamBooth", 3.66e9)},
}
"""By contender of `subjects`, in bytes."""
