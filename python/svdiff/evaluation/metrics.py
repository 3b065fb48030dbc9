"""What is measured, as functions of features.

Every function takes `weights`, how often each picture counts: None for once each, or ``[B, N]`` for B weightings at a
time, which gives ``[B]`` values. Resamples of a bootstrap are such weightings (see `estimate`), and a difference of two
models on the same prompts is a difference of two calls. All is computed in fp64.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from svdiff_kernels import SVDiffError


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of one value a picture.

    Args:
        values: ``[N]``.
        weights: see above.

    Raises:
        SVDiffError: there is no value.
    """
    if not len(values):
        raise SVDiffError("there is no picture to average over")
    return _mean(values.double(), _weights(weights, len(values)))


def text_alignment(images: Tensor, texts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cosine of each picture and its own prompt, in -1..1.

    With features of CLIP it is CLIP-T of DreamBooth (arXiv 2208.12242, section 4.1); 2.5 times that, where positive, is
    CLIPScore (arXiv 2104.08718), as Custom Diffusion reports it.

    Args:
        images: ``[N, D]``.
        texts: ``[N, D]``, of the k-th picture's prompt.
        weights: see above.

    Raises:
        SVDiffError: no pictures, or other numbers of pictures and texts.
    """
    return mean(_pair_cosines(images, texts, "prompts"), weights)


def image_alignment(images: Tensor, references: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cosine of each picture and each picture of the subject, in -1..1.

    With features of CLIP it is CLIP-I of DreamBooth, with those of DINO its DINO score (arXiv 2208.12242, section 4.1).

    Args:
        images: ``[N, D]``.
        references: ``[M, D]``.
        weights: of `images`, see above; references count once each.

    Raises:
        SVDiffError: there are none of either, or the features are not of one length.
    """
    _check_features(images, references)
    return mean((_unit(images) @ _unit(references).T).mean(1), weights)


def drift(images: Tensor, base: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of 1 - cosine of each picture and the base model's of the same prompt and seed: 0 where nothing moved.

    Args:
        images: ``[N, D]``.
        base: ``[N, D]``.
        weights: see above.

    Raises:
        SVDiffError: no pictures, or other numbers of them.
    """
    return mean(1 - _pair_cosines(images, base, "the base model's pictures"), weights)


def cosine_distances(features: Tensor) -> Tensor:
    """1 - cosine of every two pictures: ``[N, D]`` to ``[N, N]``."""
    unit = _unit(features)
    return 1 - unit @ unit.T


def diversity(distances: Tensor, prompts: Sequence[Hashable], weights: Tensor | None = None) -> Tensor:
    """Mean distance of two pictures of the same prompt.

    With LPIPS distances it is DIV of DreamBooth (arXiv 2208.12242, section 4.4).

    Args:
        distances: ``[N, N]``, of `cosine_distances`, or of LPIPS.
        prompts: N of them; whatever tells which pictures belong together.
        weights: see above; a picture that counts twice is still no pair with itself.

    Raises:
        SVDiffError: no two pictures have the same prompt, or there are other numbers of prompts.
    """
    if len(prompts) != len(distances):
        raise SVDiffError(
            f"diversity needs a prompt for each picture: {len(distances)} pictures, {len(prompts)} prompts"
        )
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([numbers[prompt] for prompt in prompts], device=distances.device)
    together = (group[:, None] == group).double().fill_diagonal_(0)
    if not together.any():
        raise SVDiffError("diversity needs at least two pictures of a prompt")
    weights = _weights(weights, len(prompts), distances)
    return _between(weights, together * distances.double(), weights) / _between(weights, together, weights)


def kid(images: Tensor, references: Tensor, weights: Tensor | None = None) -> Tensor:
    """Kernel distance of two sets: the squared MMD with the kernel ``(x.y / D + 1)^3`` (arXiv 1801.01401, section 4).

    It is the unbiased estimate from all pictures of both sets, so it may be negative; the mean over subsets of them
    that other programs report comes to the same, but for the chance in drawing subsets.

    Args:
        images: ``[N, D]``.
        references: ``[M, D]``; M need not be N.
        weights: of `images`, see above; a picture that counts twice is still not compared with itself.

    Raises:
        SVDiffError: fewer than two pictures in a set, or features not of one length.
    """
    _check_features(images, references, least=2, who="KID")
    x, y = images.double(), references.double()
    weights = _weights(weights, len(x), images)
    other = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    within = _between(weights, _kernel(x, x) * other, weights) / _between(weights, other, weights)
    among = (_kernel(y, y).sum() - _kernel(y, y).trace()) / (len(y) * (len(y) - 1))
    return within + among - 2 * _mean(_kernel(x, y).mean(1), weights)


def fid(images: Tensor, references: Tensor, weights: Tensor | None = None) -> Tensor:
    """Fréchet distance of two sets, each taken for a Gaussian (arXiv 1706.08500, equation 6).

    ``|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))``. With ``C = A^T A`` the trace of the root is the sum of the
    singular values of ``A_x A_y^T``, which is exact where there are fewer pictures than features, too. It falls with
    the number of pictures: compare only sets of the same size.

    Args:
        images: ``[N, D]``.
        references: ``[M, D]``.
        weights: of `images`, see above.

    Raises:
        SVDiffError: fewer than two pictures in a set, or features not of one length.
    """
    _check_features(images, references, least=2, who="FID")
    x, y = images.double(), references.double()
    weights = _weights(weights, len(x), images)
    mean_y, root_y = _gaussian(y, torch.ones(len(y), dtype=y.dtype, device=y.device))
    values = []
    for row in weights.reshape(-1, len(x)):
        mean_x, root_x = _gaussian(x, row)
        shared = torch.linalg.svdvals(root_x @ root_y.T).sum()
        values.append((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * shared)
    return torch.stack(values).reshape(weights.shape[:-1])


def _gaussian(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and a root A of the covariance ``A^T A``, with at most D rows."""
    mean = weights @ x / weights.sum()
    root = (weights / (weights.sum() - 1)).sqrt()[:, None] * (x - mean)
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _between(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """``left^T matrix right`` for each row of weights."""
    return ((left @ matrix) * right).sum(-1)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return weights.to(values.device) @ values / weights.sum(-1).to(values.device)


def _weights(weights: Tensor | None, count: int, like: Tensor | None = None) -> Tensor:
    device = None if like is None else like.device
    if weights is None:
        return torch.ones(count, dtype=torch.float64, device=device)
    if weights.shape[-1] != count:
        raise SVDiffError(f"weights are of {weights.shape[-1]} pictures, not of {count}")
    return weights.to(torch.float64).to(device)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.double(), dim=-1)


def _pair_cosines(images: Tensor, others: Tensor, what: str) -> Tensor:
    if len(images) != len(others):
        raise SVDiffError(f"{len(images)} pictures cannot be paired with {len(others)} of {what}")
    _check_features(images, others)
    return (_unit(images) * _unit(others)).sum(-1)


def _check_features(images: Tensor, references: Tensor, least: int = 1, who: str = "a mean") -> None:
    for features, what in ((images, "pictures"), (references, "pictures to compare with")):
        if features.ndim != 2:
            raise SVDiffError(f"features must be [pictures, numbers], not of shape {list(features.shape)}")
        if len(features) < least:
            raise SVDiffError(f"{who} needs at least {least} {what}, not {len(features)}")
    if images.shape[1] != references.shape[1]:
        raise SVDiffError(
            f"features of {images.shape[1]} numbers cannot be compared with those of {references.shape[1]}"
        )
