"""LPIPS: how different two pictures look, by the features of a network (Zhang et al., arXiv 1801.03924, equation 1)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from svdiff_kernels import SVDiffError

from ..termination import exit_if_told
from .encoders import Pictures
from .pictures import open_picture
from .weights import read_weights

_ALEXNET = ((64, 11, 4, 2), (3,), (192, 5, 1, 2), (3,), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
_VGG16 = tuple(
    (2,) if width == 0 else (width, 3, 1, 1)
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
)
_PLANS: dict[str, tuple[tuple[int, ...], ...]] = {"AlexNet": _ALEXNET, "VGG16": _VGG16}
"""Of a convolution its channels, side, stride and padding; of a pooling its side, its stride is 2."""
_TAPS = {"AlexNet": (1, 4, 7, 9, 11), "VGG16": (3, 8, 15, 22, 29)}  # the ReLUs whose outputs are compared
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_SMALL = 1e-10


class LPIPS(nn.Module):
    """The distance with one of two networks.

    Args:
        network: ``AlexNet``, the authors' choice for comparing pictures, or ``VGG16``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: str) -> None:
        super().__init__()
        self.name = f"LPIPS, {network}"
        layers: list[nn.Module] = []
        channels, widths = 3, []
        for shape in _PLANS[network]:
            if len(shape) == 1:
                layers.append(nn.MaxPool2d(shape[0], 2))
                continue
            outputs, side, stride, padding = shape
            layers += [nn.Conv2d(channels, outputs, side, stride, padding), nn.ReLU()]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.taps = _TAPS[network]
        for tap in self.taps:
            conv = layers[tap - 1]
            assert isinstance(conv, nn.Conv2d)
            widths.append(conv.out_channels)
        self.lin = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in widths)
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Pictures ``[B, 3, H, W]`` in -1..1 to five maps ``[B, C, h, w]``, of unit length at every place."""
        x, found = (pixels - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + _SMALL))
        return found

    def between(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Distances ``[B]`` of pictures whose maps are given."""
        parts = [
            torch.einsum("bchw,c->bhw", (a - b).square(), lin).mean((1, 2))
            for a, b, lin in zip(left, right, self.lin, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Distances ``[B]`` of pictures ``[B, 3, H, W]`` in -1..1."""
        return self.between(self.maps(left), self.maps(right))

    @torch.inference_mode()
    def pairs(self, left: Pictures, right: Pictures) -> Tensor:
        """The distance of each picture from its counterpart ``[N]``, which is scaled to its size if it has another.

        Raises:
            SVDiffError: other numbers of pictures, one that cannot be read, or that is too small.
        """
        if len(left) != len(right):
            raise SVDiffError(f"{len(left)} pictures cannot be paired with {len(right)}")
        found = []
        for one, other in zip(left, right, strict=True):
            exit_if_told()
            image = open_picture(one)
            found.append(self(self._pixels(image), self._pixels(open_picture(other), image.size)))
        return torch.cat(found).float().cpu()

    @torch.inference_mode()
    def distances(self, pictures: Pictures, prompts: Sequence[str]) -> Tensor:
        """The distances ``[N, N]`` of pictures with the same prompt; of others, 0.

        Raises:
            SVDiffError: one cannot be read, or is too small.
        """
        found = torch.zeros(len(pictures), len(pictures))
        for prompt in dict.fromkeys(prompts):
            members = [i for i, other in enumerate(prompts) if other == prompt]
            if len(members) < 2:
                continue
            first = open_picture(pictures[members[0]])
            maps = {i: self.maps(self._pixels(open_picture(pictures[i]), first.size)) for i in members}
            for i, j in itertools.combinations(members, 2):
                found[i, j] = found[j, i] = self.between(maps[i], maps[j]).item()
            exit_if_told()
        return found

    def _pixels(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        if size is not None and image.size != size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        if min(image.size) < 32:
            raise SVDiffError(f"LPIPS needs pictures of at least 32 pixels a side, not {image.width}x{image.height}")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        return pixels.to(self.lin[0].device)


def load_lpips(path: str, device: torch.device | str = "cpu") -> LPIPS:
    """LPIPS with the weights of the authors' package, network and linear layers, from one safetensors file.

    The file is ``lpips.LPIPS(net="alex")`` (or ``net="vgg"``), its ``state_dict()``; docs/evaluation.md has the lines
    that write it.

    Raises:
        SVDiffError: no such file, or other weights.
    """
    given = read_weights(path)
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        if match := re.fullmatch(r"net\.slice\d\.(\d+\.(?:weight|bias))", name):
            found[f"features.{match[1]}"] = value
        elif match := re.fullmatch(r"lin(\d)\.model\.\d\.weight", name):
            found[f"lin.{match[1]}"] = value.flatten()
    first = found.get("features.0.weight")
    network = "AlexNet" if first is not None and first.shape[-1] == 11 else "VGG16"
    model = LPIPS(network)
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise SVDiffError(f"{path} does not hold the weights of LPIPS with AlexNet or VGG16: {reason}") from error
    return model.eval().requires_grad_(False).to(device)
