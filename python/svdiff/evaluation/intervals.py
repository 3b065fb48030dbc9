"""How sure a figure is: bootstrap intervals over the pictures it was computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdiff_kernels import SVDiffError

Metric = Callable[[Tensor], Tensor]
"""A figure as a function of ``weights [B, N]``, ``[B]``: those of `metrics` with the features given."""

_AT_ONCE = 4_000_000  # entries of weights


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: of the pictures there are.
        low: lower end of the interval.
        high: upper end of it.
        count: of pictures.
    """

    value: float
    low: float
    high: float
    count: int


def estimate(
    metric: Metric,
    count: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    centred: bool = False,
) -> Estimate:
    """A figure with its `bootstrap_interval`: ``estimate(partial(kid, images, references), len(images))``.

    Args:
        metric: see `Metric`.
        count: N, of pictures.
        confidence: see `bootstrap_interval`.
        resamples: see `bootstrap_interval`.
        seed: see `bootstrap_interval`.
        centred: see `bootstrap_interval`.

    Raises:
        SVDiffError: see `bootstrap_interval`, and what the metric raises.
    """
    value = metric(torch.ones(1, count, dtype=torch.float64)).item()
    how = {"confidence": confidence, "resamples": resamples, "seed": seed}
    low, high = bootstrap_interval(metric, count, centred=centred, **how)  # type: ignore[arg-type]
    return Estimate(value, low, high, count)


def bootstrap_interval(
    metric: Metric,
    count: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    centred: bool = False,
) -> tuple[float, float]:
    """The percentile interval of a figure over resamples of the pictures, with replacement (Efron, 1979).

    What pictures are compared with is not resampled. The same seed draws the same resamples for every metric of so many
    pictures. It tells what other seeds of the same prompts would change, not what other prompts would.

    Args:
        metric: see `Metric`.
        count: N, of pictures.
        confidence: share of resamples inside.
        resamples: how many.
        seed: of drawing them.
        centred: move the interval by what resampling adds to the figure on average. FID needs it: a resample has fewer
            different pictures, and so a larger distance.

    Raises:
        SVDiffError: a confidence outside of 0..1, or no resamples or pictures.
    """
    if not 0 < confidence < 1:
        raise SVDiffError(f"confidence must be between 0 and 1, not {confidence}")
    if resamples < 1 or count < 1:
        raise SVDiffError(f"an interval needs resamples and pictures, not {resamples} of {count}")
    rng = torch.Generator().manual_seed(seed)
    values = []
    for start in range(0, resamples, rows := max(1, _AT_ONCE // count)):
        drawn = torch.randint(count, (min(rows, resamples - start), count), generator=rng)
        weights = torch.zeros(drawn.shape, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(drawn.shape))
        values.append(metric(weights).cpu())
    found = torch.cat(values)
    found = found[found.isfinite()]  # of few pictures, a resample may be one picture many times, and have no pairs
    if not len(found):
        return float("nan"), float("nan")
    if centred:
        found = found - found.mean() + metric(torch.ones(1, count, dtype=torch.float64)).cpu()
    tail = (1 - confidence) / 2
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
