"""Pictures of one shape each, filled or as an outline, drawn with torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHAPES = ("disc", "square", "triangle", "cross", "bar", "star", "half disc", "corner")


def draw(count: int, generator: torch.Generator, *, outlined: bool, size: int = 24) -> tuple[Tensor, Tensor]:
    """Pictures ``[count, 1, size, size]`` around zero, and which of `SHAPES` each shows, ``[count]``.

    Place, size, angle, brightness and noise are the generator's.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    line = torch.linspace(-1, 1, size)
    radius, angle = uniform(0.5, 0.75), uniform(-0.35, 0.35)
    y, x = line[:, None] - uniform(-0.2, 0.2), line[None, :] - uniform(-0.2, 0.2)
    u, v = (x * angle.cos() + y * angle.sin()) / radius, (y * angle.cos() - x * angle.sin()) / radius
    levels = _levels(u, v).gather(0, labels[None, :, None, None].expand(1, -1, size, size))[0]
    shape = torch.sigmoid(12 * (1 - levels))
    if outlined:
        shape = shape - torch.sigmoid(12 * (0.7 - levels))
    pictures = uniform(-0.9, -0.5) + shape * uniform(1.2, 1.8)
    noise = torch.randn(count, size, size, generator=generator)
    return (pictures + 0.15 * noise)[:, None], labels


def _levels(u: Tensor, v: Tensor) -> Tensor:
    """For each shape a function of the plane that is below 1 inside, ``[shapes, *]``."""
    r, theta = torch.hypot(u, v), torch.atan2(u, -v)
    triangle = torch.stack([2 * (u * math.sin(a) + v * math.cos(a)) for a in (0, 2 * math.pi / 3, -2 * math.pi / 3)])
    return torch.stack(
        [
            r,
            1.2 * torch.maximum(u.abs(), v.abs()),
            triangle.amax(0),
            torch.minimum(torch.maximum(u.abs(), 3.2 * v.abs()), torch.maximum(v.abs(), 3.2 * u.abs())),
            torch.maximum(u.abs(), 2.6 * v.abs()),
            r * (1.35 - 0.55 * torch.cos(5 * theta)),
            torch.maximum(r, 1 + 2.5 * v),
            torch.minimum(
                torch.maximum(3 * (u + 0.6).abs(), v.abs() * 1.1), torch.maximum(u.abs() * 1.1, 3 * (v - 0.6).abs())
            ),
        ]
    )
