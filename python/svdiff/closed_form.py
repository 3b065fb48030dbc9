"""Several fine-tunes of the keys and values of cross-attention made one in closed form: the arithmetic of `merge`.

A key or value layer sees nothing but text features ``c [d]``, and answers ``W c``. So what a merged layer must do is
known: to the words of each concept what the concept's own layer answers, to any other text what the base answers.

All in fp64. Rows are words: ``targets [n, d]`` of concepts, ``captions [N, d]`` of ordinary text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdiff_kernels import SVDiffError

_CHUNK = 8192
_SINGULAR = 1e-6
"""Captions that fill no more than this of a direction, next to the one that they fill most, leave it free; a ridge then
keeps the metric definite. Its root is as large, so that the constraint is met to about 1e-10."""
_DEPENDENT = 1e-10
_UNSEEN = 1e-3
"""Of the direction that words and captions fill most: where they fill less, `fit_weights` leaves the base alone."""

CAPTION_WEIGHT = 0.3
"""How much captions count beside the words of one concept, in `merge_shifts`."""


def merge_weights(W0: Tensor, targets: Tensor, values: Tensor, captions: Tensor) -> Tensor:
    """The weight nearest to the base on captions that answers target words as asked (Custom Diffusion, section 3.3).

    It minimises ``|W captions^T - W0 captions^T|`` subject to ``W targets^T = values^T``:
    ``W = W0 + v^T d`` with ``d = C (C_reg^T C_reg)^-1`` and ``v^T = (V - W0 C^T)(d C^T)^-1``, by way of a QR of C_reg,
    which loses half as many digits. The constraint holds whatever captions there are; where they leave directions
    free, a ridge of 1e-12 of the largest square decides. Rows of targets that depend on one another and are asked for
    what contradicts are met in the mean: of a word that occurs twice the two values' average.

    Args:
        W0: ``[m, d]``, the base's weight.
        targets: ``[n, d]``, text features of target words, ``n <= d``.
        values: ``[n, m]``, what is wanted for each: ``W_k c`` of the concept's own weight.
        captions: ``[N, d]``, text features of what should stay as it is; or their `summary`.

    Returns:
        ``[m, d]`` in fp64.

    Raises:
        SVDiffError: shapes that do not fit, more target words than features, or captions that are all zero.

    Example:
        >>> import torch
        >>> from svdiff.closed_form import merge_weights
        >>> W0, word, captions = torch.randn(5, 3), torch.randn(1, 3), torch.randn(20, 3)
        >>> W = merge_weights(W0, word, torch.ones(1, 5), captions)
        >>> torch.allclose(W @ word[0].double(), torch.ones(5, dtype=torch.float64))
        True
    """
    if values.shape != (targets.shape[0], W0.shape[0]) or targets.shape[1] != W0.shape[1]:
        raise SVDiffError(
            f"merge_weights: targets {list(targets.shape)} and values {list(values.shape)} do not fit a weight of "
            f"{list(W0.shape)}: [n, d], [n, m] and [m, d] are wanted"
        )
    wanted = values.double() - targets.double() @ W0.double().T
    return W0.double() + wanted.T @ directions(targets, captions)


def directions(targets: Tensor, captions: Tensor) -> Tensor:
    """``(d C^T)^-1 d`` of `merge_weights`, ``[n, d]``: the same for all layers that see these features.

    Row i is the change of the answers that asks the least of captions, among those that answer target i with one and
    the other targets with zero.

    Raises:
        SVDiffError: see `merge_weights`.
    """
    n, d = targets.shape
    if captions.dim() != 2 or captions.shape[1] != d or not n or not captions.shape[0]:
        raise SVDiffError(
            f"captions {list(captions.shape)} and targets {list(targets.shape)} must be [N, d] and [n, d]"
        )
    if n > d:
        raise SVDiffError(f"{n} target words are more than text features have numbers ({d}): merge shorter prompts")
    root = _definite(_root(captions))
    # X = root dW^T is to be as small as can be, with (C root^-1) X given: the least-norm solution.
    seen = torch.linalg.solve_triangular(root, targets.double(), upper=True, left=False)  # [n, d]
    size = torch.linalg.vector_norm(seen, dim=1, keepdim=True).clamp_min(torch.finfo(seen.dtype).tiny)
    inverse = torch.linalg.pinv(seen / size, rtol=_DEPENDENT) / size.T  # [d, n]
    return torch.linalg.solve_triangular(root, inverse, upper=True).T


def fit_weights(
    W0: Tensor,
    weights: Sequence[Tensor],
    targets: Sequence[Tensor],
    captions: Tensor,
    caption_weight: float = CAPTION_WEIGHT,
) -> Tensor:
    """The weight that comes nearest to each concept's on its words, and to the base's on captions.

    It minimises ``sum over concepts k of mean over words of |(W - W_k) c|^2 + caption_weight * mean over captions of
    |(W - W0) c|^2``, what `merge_shifts` does for shifts. No word is met exactly, but there may be any number of them,
    and alike: ``W = W0 + (sum_k (W_k - W0) S_k) (sum_k S_k + caption_weight G)^-1``, where S_k and G are the mean of
    ``c c^T`` over the words of k and over captions. A ridge of 1e-6 of the largest square of that sum leaves W0 alone
    where neither look; without it what rounding leaves there would count.

    Args:
        W0: ``[m, d]``, the base's weight.
        weights: of each concept, ``[m, d]``.
        targets: of each concept text features of its words, ``[n_k, d]``.
        captions: ``[N, d]``; or their `summary`.
        caption_weight: how much captions count beside the words of one concept.

    Returns:
        ``[m, d]`` in fp64.

    Raises:
        SVDiffError: shapes that do not fit, or a weight that is not above 0.
    """
    if len(weights) != len(targets) or any(one.shape != W0.shape for one in weights):
        shapes = [list(one.shape) for one in weights]
        raise SVDiffError(f"fit_weights: weights {shapes} for {len(targets)} targets do not fit W0 {list(W0.shape)}")
    shares = shares_of(targets, captions, caption_weight)
    return W0.double() + sum((W.double() - W0.double()) @ own for W, own in zip(weights, shares, strict=True))


def shares_of(targets: Sequence[Tensor], captions: Tensor, caption_weight: float = CAPTION_WEIGHT) -> list[Tensor]:
    """``S_k (sum_k S_k + caption_weight G)^-1`` of `fit_weights`, ``[d, d]`` each: the same for all layers.

    Raises:
        SVDiffError: see `fit_weights`.
    """
    d = captions.shape[-1]
    if not caption_weight > 0:
        raise SVDiffError(f"caption_weight must be above 0 for weights: {caption_weight}")
    if any(one.dim() != 2 or not one.shape[0] or one.shape[1] != d for one in (*targets, captions)):
        raise SVDiffError(
            f"captions {list(captions.shape)} and targets {[list(t.shape) for t in targets]} must be [_, d]"
        )
    rows = [one.double() / len(one) ** 0.5 for one in targets]
    root = _root(torch.cat([*rows, captions.double() * (caption_weight / len(captions)) ** 0.5]))
    root = _ridged(root, _UNSEEN * float(torch.linalg.matrix_norm(root, 2)))
    inverse = torch.cholesky_inverse(root, upper=True)
    return [one.T @ (one @ inverse) for one in rows]


def merge_shifts(
    Vh: Tensor,
    sigma: Tensor,
    deltas: Sequence[Tensor],
    targets: Sequence[Tensor],
    captions: Tensor,
    caption_weight: float = CAPTION_WEIGHT,
) -> Tensor:
    """The shift that comes nearest to each concept's on its words, and to none on captions.

    With ``e = max(delta, -sigma)``, which is what the ReLU of ``relu(sigma + delta)`` leaves of a shift, it minimises
    ``sum over concepts k of mean over words of |(e - e_k) * Vh c|^2 + caption_weight * mean over captions of
    |e * Vh c|^2``. U is orthonormal, so that this is in the answers of the layer; each singular direction stands for
    itself: ``e_i = sum_k s_ki e_ki / (caption_weight g_i + sum_k s_ki)``, where s_ki and g_i are the mean squares of
    ``(Vh c)_i`` over the words of k and over captions.

    No constraint is met exactly, as by `merge_weights`: one word of one concept decides all r numbers.

    Args:
        Vh: ``[r, d]`` of the base's weight.
        sigma: ``[r]``.
        deltas: of each concept, ``[r]``.
        targets: of each concept text features of its words, ``[n_k, d]``.
        captions: ``[N, d]``; or their `summary`.
        caption_weight: how much captions count beside the words of one concept; 0 leaves them out.

    Returns:
        ``[r]`` in fp64, nowhere below ``-sigma``.

    Raises:
        SVDiffError: shapes that do not fit, or a negative weight.

    Example:
        >>> import torch
        >>> from svdiff.closed_form import merge_shifts
        >>> Vh, words = torch.eye(2), [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> deltas = [torch.tensor([0.5, 9.0]), torch.tensor([9.0, -0.2])]
        >>> merge_shifts(Vh, torch.ones(2), deltas, words, torch.ones(1, 2), caption_weight=0.0).tolist()
        [0.5, -0.20000000298023224]
    """
    r, d = Vh.shape
    fits = all(delta.shape == sigma.shape == (r,) for delta in deltas)
    fits &= all(one.dim() == 2 and one.shape[0] and one.shape[1] == d for one in (*targets, captions))
    if not fits or len(deltas) != len(targets):
        raise SVDiffError(
            f"merge_shifts: {len(deltas)} shifts {[list(delta.shape) for delta in deltas]} and {len(targets)} targets "
            f"{[list(one.shape) for one in targets]} do not fit Vh {list(Vh.shape)}"
        )
    if not caption_weight >= 0:
        raise SVDiffError(f"caption_weight must not be negative: {caption_weight}")
    shifts = torch.stack([torch.maximum(delta.double(), -sigma.double()) for delta in deltas])  # [K, r]
    squares = torch.stack([_mean_square(one, Vh) for one in targets])
    total = squares.sum(0) + caption_weight * _mean_square(captions, Vh)
    return (squares * shifts).sum(0) / torch.where(total == 0, 1.0, total)


def summary(captions: Tensor) -> Tensor:
    """Features ``[d, d]`` that may stand for captions ``[N, d]``: in the mean they are as large along any direction."""
    N, d = captions.shape
    return _root(captions) * (d / N) ** 0.5


def _root(captions: Tensor) -> Tensor:
    """Upper triangular R with ``R^T R = captions^T captions``."""
    root = captions.new_zeros(0, captions.shape[1], dtype=torch.float64)
    for chunk in captions.split(_CHUNK):
        root = torch.linalg.qr(torch.cat([root, chunk.double()]), mode="r").R
    missing = captions.shape[1] - root.shape[0]
    return torch.nn.functional.pad(root, (0, 0, 0, missing))


def _definite(root: Tensor) -> Tensor:
    """The same with a ridge, if need be."""
    sizes = torch.linalg.svdvals(root)
    if not sizes[0] > 0:
        raise SVDiffError("the captions' text features are all zero")
    return root if sizes[-1] > _SINGULAR * sizes[0] else _ridged(root, _SINGULAR * float(sizes[0]))


def _ridged(root: Tensor, size: float) -> Tensor:
    """The root of ``R^T R + size^2 I``."""
    ridge = size * torch.eye(root.shape[0], dtype=root.dtype, device=root.device)
    return torch.linalg.qr(torch.cat([root, ridge]), mode="r").R


def _mean_square(features: Tensor, Vh: Tensor) -> Tensor:
    return (features.double() @ Vh.double().T).square().mean(0)
