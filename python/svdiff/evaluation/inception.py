"""Inception-v3 as FID and KID are defined with it: the network of 2015 that TensorFlow's release holds.

Its arithmetic differs from torchvision's in how it pools (arXiv 1706.08500's code; pytorch-fid and clean-fid compute
the same), so torchvision's ImageNet weights are refused. Parameters have torchvision's names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from svdiff_kernels import SVDiffError

from .weights import read_weights

_SIDE = 299
_CLASSES = 1008  # of the release's classifier, where a file has it: torchvision's has 1000

_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_largest = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halving = partial(F.max_pool2d, kernel_size=3, stride=2)
_TALL, _WIDE = {"kernel_size": (7, 1), "padding": (3, 0)}, {"kernel_size": (1, 7), "padding": (0, 3)}
_SQUARE3, _SQUARE5 = {"kernel_size": 3, "padding": 1}, {"kernel_size": 5, "padding": 2}
_ROW3, _COLUMN3 = {"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, **shape: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **({"kernel_size": 1} | shape))  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, h, w]``."""
        return F.relu(self.bn(self.conv(x)))


class _Branches(nn.Module):
    """Chains of convolutions beside one another, whose outputs are concatenated."""

    def _chain(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = getattr(self, name)(x)
        return x


class _A(_Branches):
    """Mixed_5b to 5d."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1 = _Conv(inputs, 48)
        self.branch5x5_2 = _Conv(48, 64, **_SQUARE5)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, **_SQUARE3)
        self.branch3x3dbl_3 = _Conv(96, 96, **_SQUARE3)
        self.branch_pool = _Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, h, w]``."""
        return torch.cat(
            [
                self.branch1x1(x),
                self._chain(x, "branch5x5_1", "branch5x5_2"),
                self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                self.branch_pool(_average(x)),
            ],
            1,
        )


class _B(_Branches):
    """Mixed_6a, which halves the sides."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, **_SQUARE3)
        self.branch3x3dbl_3 = _Conv(96, 96, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, h, w]``."""
        double = self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch3x3(x), double, _halving(x)], 1)


class _C(_Branches):
    """Mixed_6b to 6e."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192)
        self.branch7x7_1 = _Conv(768, width)
        self.branch7x7_2 = _Conv(width, width, **_WIDE)
        self.branch7x7_3 = _Conv(width, 192, **_TALL)
        self.branch7x7dbl_1 = _Conv(768, width)
        self.branch7x7dbl_2 = _Conv(width, width, **_TALL)
        self.branch7x7dbl_3 = _Conv(width, width, **_WIDE)
        self.branch7x7dbl_4 = _Conv(width, width, **_TALL)
        self.branch7x7dbl_5 = _Conv(width, 192, **_WIDE)
        self.branch_pool = _Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, h, w]``."""
        return torch.cat(
            [
                self.branch1x1(x),
                self._chain(x, *(f"branch7x7_{i}" for i in (1, 2, 3))),
                self._chain(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
                self.branch_pool(_average(x)),
            ],
            1,
        )


class _D(_Branches):
    """Mixed_7a, which halves the sides."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192)
        self.branch3x3_2 = _Conv(192, 320, kernel_size=3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192)
        self.branch7x7x3_2 = _Conv(192, 192, **_WIDE)
        self.branch7x7x3_3 = _Conv(192, 192, **_TALL)
        self.branch7x7x3_4 = _Conv(192, 192, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, h, w]``."""
        three = self._chain(x, "branch3x3_1", "branch3x3_2")
        seven = self._chain(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
        return torch.cat([three, seven, _halving(x)], 1)


class _E(_Branches):
    """Mixed_7b and 7c, which differ in how they pool."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1 = _Conv(inputs, 384)
        self.branch3x3_2a = _Conv(384, 384, **_ROW3)
        self.branch3x3_2b = _Conv(384, 384, **_COLUMN3)
        self.branch3x3dbl_1 = _Conv(inputs, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, **_SQUARE3)
        self.branch3x3dbl_3a = _Conv(384, 384, **_ROW3)
        self.branch3x3dbl_3b = _Conv(384, 384, **_COLUMN3)
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, h, w]``."""
        single, double = self.branch3x3_1(x), self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(self.pool(x)),
            ],
            1,
        )


class InceptionV3(nn.Module):
    """Pictures to the 2048 features before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, **_SQUARE3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, kernel_size=3)
        self.Mixed_5b = _A(192, pooled=32)
        self.Mixed_5c = _A(256, pooled=64)
        self.Mixed_5d = _A(288, pooled=64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b = _C(128)
        self.Mixed_6c = _C(160)
        self.Mixed_6d = _C(160)
        self.Mixed_6e = _C(192)
        self.Mixed_7a = _D()
        self.Mixed_7b = _E(1280, _average)
        self.Mixed_7c = _E(2048, _largest)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, 299, 299]`` of `prepared` to ``[B, 2048]``."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halving(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halving(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    @staticmethod
    def prepared(image: Image.Image) -> Tensor:
        """A picture in RGB as ``[3, 299, 299]`` in about -1..1."""
        bands = [
            np.asarray(Image.fromarray(np.asarray(band, np.float32)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
            for band in image.split()
        ]
        return (torch.from_numpy(np.stack(bands)).clamp(0, 255) - 128) / 128


def load_inception_weights(model: InceptionV3, path: str) -> None:
    """Fill the network from a safetensors file with the weights of ``pt_inception-2015-12-05``.

    Raises:
        SVDiffError: no such file, torchvision's weights, or others.
    """
    found = read_weights(path)
    if "fc.weight" in found and len(found["fc.weight"]) != _CLASSES:
        raise SVDiffError(
            f"{path} holds an Inception-v3 of {len(found['fc.weight'])} classes; FID and KID are defined with that of "
            f"TensorFlow's release of 2015, which has {_CLASSES} (pt_inception-2015-12-05)"
        )
    unused = [name for name in found if name.startswith(("fc.", "AuxLogits."))]
    for name in unused:
        del found[name]
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        model.load_state_dict(counters | found)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise SVDiffError(f"{path} does not hold the weights of Inception-v3: {reason}") from error
