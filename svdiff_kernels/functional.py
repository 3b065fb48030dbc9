"""Spectral layers as functions, for those who keep factors and shifts themselves: arguments are checked at the door."""

from __future__ import annotations

import torch
from torch import Tensor

from .recomposed import IntPair
from .scaled import scaled_conv2d, scaled_embedding, scaled_linear


def spectral_gain(sigma: Tensor, delta: Tensor, *, residual: bool = False) -> Tensor:
    """What multiplies ``Vh x``: ``relu(sigma + delta)``, or in the residual form that minus sigma.

    The latter is taken as ``max(delta, -sigma)``, which loses no bits of a small delta. The gradient is exactly zero
    where ``sigma + delta <= 0``.
    """
    if not residual:
        return torch.relu(sigma + delta)
    return torch.where(sigma + delta > 0, delta, -sigma)


def spectral_linear(
    x: Tensor,
    U: Tensor,
    sigma: Tensor,
    Vh: Tensor,
    delta: Tensor,
    bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """A linear layer whose frozen weight ``U diag(sigma) Vh`` is shifted by delta along its singular directions.

    Args:
        x: ``[*, N]``.
        U: ``[M, r]``, frozen, in x's dtype; with x in bf16 both factors may be in fp16, which is eight times finer.
        sigma: ``[r]``, fp32.
        Vh: ``[r, N]``, frozen, in x's dtype.
        delta: ``[r]``, fp32; or ``[S, r]`` for S samples, which split x's first dimension evenly.
        bias: ``[M]``, frozen.
        weight: ``[M, N]``: the residual form, ``weight @ x`` plus what delta changes; exact to the bit at delta = 0
            in fp32, and right for factors of a lower rank than the weight.

    Returns:
        ``[*, M]`` in x's dtype (autocast's, under autocast).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import torch
        >>> from svdiff_kernels import decompose, spectral_linear
        >>> weight, x = torch.randn(5, 3), torch.randn(2, 3)
        >>> f = decompose(weight)
        >>> delta = torch.zeros(f.rank, requires_grad=True)
        >>> y = spectral_linear(x, f.U, f.sigma, f.Vh, delta)
        >>> torch.allclose(y, x @ weight.T, atol=1e-5)
        True
        >>> y.square().sum().backward()
        >>> delta.grad.shape
        torch.Size([3])
    """
    _check_factors(U, sigma, Vh, delta, x.shape[0] if x.dim() > 1 else 1)
    _check(Vh.dim() == 2, "Vh", Vh, "r", "N")
    _check(x.dim() > 0 and x.shape[-1] == Vh.shape[1], "x", x, "*", Vh.shape[1])
    _check_optional(U, bias, weight, Vh.shape[1:])
    return scaled_linear(x, U, spectral_gain(sigma, delta, residual=weight is not None), Vh, bias, weight=weight)


def spectral_conv2d(
    x: Tensor,
    U: Tensor,
    sigma: Tensor,
    Vh: Tensor,
    delta: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    weight: Tensor | None = None,
) -> Tensor:
    """A 2-D convolution whose frozen kernel ``U diag(sigma) Vh`` is shifted by delta; see `spectral_linear`.

    Args:
        x: ``[B, C_in, H, W]`` or ``[C_in, H, W]``, in either memory format; the result keeps it.
        U: ``[C_out, r]``.
        sigma: ``[r]``.
        Vh: ``[r, C_in / groups, kh, kw]``.
        delta: ``[r]``, or ``[S, r]`` with S dividing B.
        bias: ``[C_out]``, frozen.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`. With ``groups > 1`` U would mix groups,
            so the kernel is recomposed in every call.
        weight: ``[C_out, C_in / groups, kh, kw]``: the residual form.

    Returns:
        ``[B, C_out, H', W']`` (or without B).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import torch
        >>> from svdiff_kernels import decompose, spectral_conv2d
        >>> weight, x = torch.randn(6, 4, 3, 3), torch.randn(2, 4, 8, 8)
        >>> f = decompose(weight)  # of the weight as a matrix [6, 36]
        >>> Vh = f.Vh.unflatten(1, weight.shape[1:])
        >>> y = spectral_conv2d(x, f.U, f.sigma, Vh, torch.zeros(f.rank), padding=1)
        >>> torch.allclose(y, torch.conv2d(x, weight, padding=1), atol=1e-4)
        True
    """
    _check(x.dim() in (3, 4), "x", x, "*", "C_in", "H", "W")
    _check_factors(U, sigma, Vh, delta, x.shape[0] if x.dim() == 4 else 1)
    _check(Vh.dim() == 4, "Vh", Vh, "r", "C_in / groups", "kh", "kw")
    _check(x.shape[-3] == Vh.shape[1] * groups, "x", x, "*", Vh.shape[1] * groups, "H", "W")
    _check_optional(U, bias, weight, Vh.shape[1:])
    gain = spectral_gain(sigma, delta, residual=weight is not None)
    return scaled_conv2d(x, U, gain, Vh, bias, stride, padding, dilation, groups, weight=weight)


def spectral_embedding(
    ids: Tensor,
    U: Tensor,
    sigma: Tensor,
    Vh: Tensor,
    delta: Tensor,
    *,
    padding_idx: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """An embedding whose frozen table ``U diag(sigma) Vh`` is shifted by delta; see `spectral_linear`.

    Args:
        ids: integers of any shape; rows of the table.
        U: ``[vocabulary, r]``.
        sigma: ``[r]``.
        Vh: ``[r, dim]``.
        delta: ``[r]``, or ``[S, r]`` for S samples, which split the first dimension of ids evenly.
        padding_idx: this row adds nothing to delta's gradient.
        weight: ``[vocabulary, dim]``: the residual form.

    Returns:
        ``[*ids.shape, dim]``.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import torch
        >>> from svdiff_kernels import decompose, spectral_embedding
        >>> table, ids = torch.randn(10, 4), torch.tensor([[7, 2, 2]])
        >>> f = decompose(table)
        >>> y = spectral_embedding(ids, f.U, f.sigma, f.Vh, torch.zeros(f.rank))
        >>> torch.allclose(y, table[ids], atol=1e-5)
        True
    """
    _check_factors(U, sigma, Vh, delta, ids.shape[0] if ids.dim() else 1)
    _check(Vh.dim() == 2, "Vh", Vh, "r", "dim")
    if ids.is_floating_point():
        raise ValueError(f"ids must be integers, not {ids.dtype}")
    _check_optional(U, None, weight, Vh.shape[1:])
    gain = spectral_gain(sigma, delta, residual=weight is not None)
    return scaled_embedding(ids, U, gain, Vh, padding_idx=padding_idx, weight=weight)


def _check(ok: bool, name: str, tensor: Tensor, *wanted: int | str) -> None:
    if not ok:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [{', '.join(map(str, wanted))}]")


def _check_factors(U: Tensor, sigma: Tensor, Vh: Tensor, delta: Tensor, first: int) -> None:
    _check(sigma.dim() == 1, "sigma", sigma, "r")
    r = sigma.shape[0]
    _check(U.dim() == 2 and U.shape[1] == r, "U", U, "M", r)
    _check(Vh.dim() > 1 and Vh.shape[0] == r, "Vh", Vh, r, "...")
    _check(delta.dim() in (1, 2) and delta.shape[-1] == r, "delta", delta, "S or nothing", r)
    if delta.dim() == 2 and (delta.shape[0] == 0 or first % delta.shape[0]):
        raise ValueError(
            f"delta is for {delta.shape[0]} samples, which do not split the first dimension, {first}, evenly"
        )


def _check_optional(U: Tensor, bias: Tensor | None, weight: Tensor | None, inner: torch.Size) -> None:
    M = U.shape[0]
    if bias is not None:
        _check(tuple(bias.shape) == (M,), "bias", bias, M)
    if weight is not None:
        _check(weight.shape == (M, *inner), "weight", weight, M, *inner)
