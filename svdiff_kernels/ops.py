"""The ops behind every spectral layer: their schemas, shapes and gradients. No arithmetic lives here.

`expand` is what SVDiff adds to a network. Two are products with frozen weights, torch's own but for what they keep for
the backward pass (the weight alone) and for how they sum half precision. `linear` is a whole layer and `linear_group`
several with one input, for backends that gain by seeing all of it. `gains` is the bank of a whole model. `eigh` is
what `solvers.py` decomposes weights by; it has no gradient.

Implementations register themselves with torch's dispatcher: `reference.py` for every device, ``csrc/cpu`` over it for
CPUs. Gradients are those of ``csrc/autograd.cpp``, or the same in Python from here where the extension is missing.
`backends.py` says what serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = torch.library.Library("svdiff", "DEF")
library.define("expand(Tensor z, Tensor U, Tensor scale, Tensor? bias, ScalarType? dtype) -> Tensor", tags=_TAGS)
library.define(
    "expand_backward(Tensor dy, Tensor? z, Tensor U, Tensor scale, bool need_dz) -> (Tensor, Tensor)", tags=_TAGS
)
library.define(
    "frozen_linear(Tensor x, Tensor weight, Tensor? bias, ScalarType? dtype, float alpha) -> Tensor", tags=_TAGS
)
library.define(
    "frozen_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
    "ScalarType? dtype, bool exact) -> Tensor",
    tags=_TAGS,
)
library.define(
    "frozen_conv2d_backward(Tensor dy, Tensor weight, SymInt[2] size, int[2] stride, int[2] padding, int[2] dilation) "
    "-> Tensor",
    tags=_TAGS,
)
library.define(
    "linear(Tensor x, Tensor U, Tensor scale, Tensor Vh, Tensor? bias, float alpha, bool scaled) -> (Tensor, Tensor)",
    tags=_TAGS,
)
library.define(
    "linear_backward(Tensor dy, Tensor? kept, Tensor U, Tensor scale, Tensor Vh, float alpha, bool scaled, "
    "bool need_dx) -> (Tensor, Tensor)",
    tags=_TAGS,
)
library.define(
    "linear_group(Tensor x, Tensor[] U, Tensor[] scale, Tensor[] Vh, Tensor?[] bias, float[] alpha, bool scaled) "
    "-> (Tensor[], Tensor[])",
    tags=_TAGS,
)
library.define(
    "linear_group_backward(Tensor[] dy, Tensor[] kept, Tensor[] U, Tensor[] scale, Tensor[] Vh, float[] alpha, "
    "bool scaled, bool need_dx) -> (Tensor, Tensor[])",
    tags=_TAGS,
)
library.define("gains(Tensor base, Tensor floor, Tensor mix, Tensor[] deltas) -> (Tensor, Tensor)", tags=_TAGS)
library.define("gains_backward(Tensor dgain, Tensor held, Tensor mix, int[] adapters) -> Tensor", tags=_TAGS)
library.define("eigh(Tensor G) -> (Tensor, Tensor)", tags=_TAGS)


def expand(
    z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``y = (z * scale[sample]) @ U.T + bias``: scale projected rows, and expand them to the output's width.

    The middle of SVDiff's ``y = U (scale * (Vh x)) + b`` (Han et al. 2023, eq. 2) once ``z = Vh x`` is there. With
    ``b = dy @ U`` its gradient is ``dz = scale * b`` and ``dscale = sum over a sample's rows of z * b``; U is frozen.

    Args:
        z: ``[*, r]``, T rows in all. Of a conv in NCHW it is ``[B, P, r]`` with the pixels dense (stride 1): then y is
            laid out like that too, and nothing is copied. The gradient is laid out as dy is.
        U: ``[M, r]``, frozen, in z's dtype, any strides.
        scale: ``[S, r]``, fp32 (fp64 with z in fp64), one row for each of S samples. They split z's first dimension
            evenly, in order; with S = 1 all rows share one scale.
        bias: ``[M]``, or None.
        dtype: of the result; z's if not given. A bf16 model may keep U and z in fp16 and still wants y in bf16.

    Returns:
        ``[*, M]``. All sums accumulate in fp32 or wider, and are rounded once. dz is in dy's dtype.
    """
    return torch.ops.svdiff.expand.default(z, U, scale, bias, dtype)


def expand_backward(dy: Tensor, z: Tensor | None, U: Tensor, scale: Tensor, need_dz: bool) -> tuple[Tensor, Tensor]:
    """Gradients of `expand`: ``(dz, dscale)``, each empty where it is not wanted; dscale is wanted if z is given.

    Args:
        dy: ``[*, M]``, of half precision even where z and U are of another.
        z, U, scale: as they were given to `expand`.
        need_dz: whether dz is wanted; it is in dy's dtype.
    """
    return torch.ops.svdiff.expand_backward.default(dy, z, U, scale, need_dz)


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """``alpha * x @ weight.T + bias`` with a frozen weight and bias; all sums accumulate in fp32 or wider.

    Args:
        x: ``[*, N]``.
        weight: ``[M, N]``, in any dtype but fp64, unless x is in that too; any strides.
        bias: ``[M]``, or None.
        dtype: of the result; x's if not given. fp32 is what the residual form needs to round its sum once.
        alpha: a power of two. x is multiplied by it before it is rounded to the type of the product, so that x in bf16
            may be larger than fp16 can hold.

    Returns:
        ``[*, M]``. The gradient of x is in x's dtype.
    """
    return torch.ops.svdiff.frozen_linear.default(x, weight, bias, dtype, alpha)


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    exact: bool = False,
) -> Tensor:
    """``F.conv2d`` with a frozen weight and bias, of one group; torch's own keeps x although no weight gradient is due.

    Args:
        x: ``[B, C_in, H, W]`` in either memory format, which the result has too.
        weight: ``[C_out, C_in, kh, kw]``, in any dtype but fp64, unless x is in that too.
        bias: ``[C_out]``, or None.
        stride, padding, dilation: pairs of numbers.
        dtype: see `frozen_linear`.
        exact: sum in torch's order, so that full precision gives the same bits as ``F.conv2d``.

    Returns:
        ``[B, C_out, H', W']``. The gradient of x is in x's dtype.
    """
    return torch.ops.svdiff.frozen_conv2d.default(x, weight, bias, stride, padding, dilation, dtype, exact)


def frozen_conv2d_backward(
    dy: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of `frozen_conv2d`: ``dx [B, C_in, *size]`` in dy's dtype, for dy ``[B, C_out, H', W']``."""
    return torch.ops.svdiff.frozen_conv2d_backward.default(dy, weight, size, stride, padding, dilation)


def linear(
    x: Tensor, U: Tensor, scale: Tensor, Vh: Tensor, bias: Tensor | None, *, alpha: float = 1.0, scaled: bool = False
) -> tuple[Tensor, Tensor]:
    """A whole layer, ``y = (scale[sample] * z) @ U.T + bias`` with ``z = alpha * x @ Vh.T``, without a graph.

    Args:
        x: ``[*, N]``.
        U, scale, bias: see `expand`. The factors may be in fp16 with x in bf16.
        Vh: ``[r, N]``, in U's dtype.
        alpha: see `frozen_linear`.
        scaled: what to keep for `linear_backward`. Keeping the scaled z lets the first product scale it on its way out,
            but dscale is then ``column sums / scale``, for a scale whose gradient is zero where it is not positive.

    Returns:
        y ``[*, M]`` in x's dtype, and z, times scale if `scaled`, ``[*, r]`` in Vh's dtype.
    """
    return torch.ops.svdiff.linear.default(x, U, scale, Vh, bias, alpha, scaled)


def linear_backward(
    dy: Tensor,
    kept: Tensor | None,
    U: Tensor,
    scale: Tensor,
    Vh: Tensor,
    *,
    alpha: float = 1.0,
    scaled: bool = False,
    need_dx: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of `linear`: ``(dx, dscale)``, each empty where it is not wanted; dscale is wanted if kept is given.

    Args:
        dy: ``[*, M]``.
        kept: what `linear` returned besides y.
        U, scale, Vh, alpha, scaled: as they were given to `linear`.
        need_dx: whether dx is wanted; it is in dy's dtype.
    """
    return torch.ops.svdiff.linear_backward.default(dy, kept, U, scale, Vh, alpha, scaled, need_dx)


def linear_group(
    x: Tensor,
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    Vh: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    *,
    alpha: Sequence[float],
    scaled: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """`linear` of several layers with the same input, shapes and types, such as an attention's q, k and v.

    Of each layer there is one U, scale, Vh, bias and alpha; y and kept come likewise.
    """
    return torch.ops.svdiff.linear_group.default(x, U, scale, Vh, bias, alpha, scaled)


def linear_group_backward(
    dy: Sequence[Tensor],
    kept: Sequence[Tensor],
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    Vh: Sequence[Tensor],
    *,
    alpha: Sequence[float],
    scaled: bool,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `linear_group`: dx, the sum over the layers (empty unless need_dx), and dscale of each."""
    return torch.ops.svdiff.linear_group_backward.default(dy, kept, U, scale, Vh, alpha, scaled, need_dx)


def gains(base: Tensor, floor: Tensor, mix: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``max(base + sum of mix[a] * delta_a, floor)``: the gains of a whole model, see `bank.Bank`; without a graph.

    Args:
        base: ``[R]``, fp32 or fp64, as all others.
        floor: ``[R]``.
        mix: ``[A]``, or ``[S, A]`` for S samples.
        deltas: of each adapter the shifts of its matrices, and those of its 1-D weights; together ``[R]``.

    Returns:
        The gains ``[R]``, or ``[S, R]``, and whether the floor holds them (ties included), likewise.
    """
    return torch.ops.svdiff.gains.default(base, floor, mix, deltas)


def gains_backward(dgain: Tensor, held: Tensor, mix: Tensor, adapters: Sequence[int]) -> Tensor:
    """Gradients of `gains`, zero where the floor held: ``[len(adapters), R]``, of the adapters with these numbers.

    Args:
        dgain: ``[R]`` or ``[S, R]``, any strides.
        held, mix: from and to `gains`.
        adapters: whose gradients are wanted.
    """
    return torch.ops.svdiff.gains_backward.default(dgain, held, mix, adapters)


def eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors, as columns, of a batch of symmetric matrices; without a graph.

    Args:
        G: ``[B, n, n]``, fp32 or fp64; only what is on and below the diagonal is read.

    Returns:
        ``[B, n]`` and ``[B, n, n]``.

    Raises:
        torch.linalg.LinAlgError: the solver did not converge.
    """
    return torch.ops.svdiff.eigh.default(G)


def columns_dense(z: Tensor) -> bool:
    """Is z ``[B, P, r]`` with neighbouring rows, not columns, next to one another (NCHW)?"""
    return z.dim() == 3 and z.stride(1) == 1 and z.stride(2) != 1


def empty_rows_like(z: Tensor, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised ``[*, columns]`` laid out as z is: rows dense, or columns dense."""
    if columns_dense(z):
        return z.new_empty(z.shape[0], columns, z.shape[1], dtype=dtype or z.dtype).transpose(1, 2)
    return z.new_empty(*z.shape[:-1], columns, dtype=dtype or z.dtype)


@torch.library.register_fake("svdiff::expand", lib=library)
def _expand_fake(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    return empty_rows_like(z, U.shape[0], dtype)


@torch.library.register_fake("svdiff::expand_backward", lib=library)
def _expand_backward_fake(
    dy: Tensor, z: Tensor | None, U: Tensor, scale: Tensor, need_dz: bool
) -> tuple[Tensor, Tensor]:
    dz = empty_rows_like(dy, U.shape[1]) if need_dz else dy.new_empty(0)
    return dz, scale.new_empty(scale.shape if z is not None else 0)


def is_half(dtype: torch.dtype) -> bool:
    """Is it a 16-bit floating-point type?"""
    return dtype in (torch.bfloat16, torch.float16)


@torch.library.register_fake("svdiff::frozen_linear", lib=library)
def _frozen_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None, alpha: float = 1.0
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype or x.dtype)


@torch.library.register_fake("svdiff::frozen_conv2d", lib=library)
def _frozen_conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype | None = None,
    exact: bool = False,
) -> Tensor:
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    y = x.new_empty(x.shape[0], weight.shape[0], *size, dtype=dtype or x.dtype)
    return y.to(memory_format=memory_format_of(x))


@torch.library.register_fake("svdiff::frozen_conv2d_backward", lib=library)
def _frozen_conv2d_backward_fake(
    dy: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    dx = dy.new_empty(dy.shape[0], weight.shape[1], *size)
    return dx.to(memory_format=memory_format_of(dy))


@torch.library.register_fake("svdiff::linear", lib=library)
def _linear_fake(
    x: Tensor, U: Tensor, scale: Tensor, Vh: Tensor, bias: Tensor | None, alpha: float, scaled: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], U.shape[0]), x.new_empty(*x.shape[:-1], Vh.shape[0], dtype=Vh.dtype)


@torch.library.register_fake("svdiff::linear_backward", lib=library)
def _linear_backward_fake(
    dy: Tensor, kept: Tensor | None, U: Tensor, scale: Tensor, Vh: Tensor, alpha: float, scaled: bool, need_dx: bool
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], Vh.shape[1]) if need_dx else dy.new_empty(0)
    return dx, scale.new_empty(scale.shape if kept is not None else 0)


@torch.library.register_fake("svdiff::linear_group", lib=library)
def _linear_group_fake(
    x: Tensor,
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    Vh: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    alpha: Sequence[float],
    scaled: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [_linear_fake(x, u, s, v, None, 1.0, scaled) for u, s, v in zip(U, scale, Vh, strict=True)]
    return [y for y, _ in pairs], [kept for _, kept in pairs]


@torch.library.register_fake("svdiff::linear_group_backward", lib=library)
def _linear_group_backward_fake(
    dy: Sequence[Tensor],
    kept: Sequence[Tensor],
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    Vh: Sequence[Tensor],
    alpha: Sequence[float],
    scaled: bool,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor]]:
    dx = dy[0].new_empty(*dy[0].shape[:-1], Vh[0].shape[1]) if need_dx else dy[0].new_empty(0)
    return dx, [s.new_empty(s.shape) for s in scale]


@torch.library.register_fake("svdiff::gains", lib=library)
def _gains_fake(base: Tensor, floor: Tensor, mix: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape = (*mix.shape[:-1], base.shape[0])
    return base.new_empty(shape), base.new_empty(shape, dtype=torch.bool)


@torch.library.register_fake("svdiff::gains_backward", lib=library)
def _gains_backward_fake(dgain: Tensor, held: Tensor, mix: Tensor, adapters: Sequence[int]) -> Tensor:
    return dgain.new_empty(len(adapters), dgain.shape[-1])


@torch.library.register_fake("svdiff::eigh", lib=library)
def _eigh_fake(G: Tensor) -> tuple[Tensor, Tensor]:
    return G.new_empty(G.shape[:2]), G.new_empty(G.shape)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Of ``[B, C, H, W]``: channels last where the channels lie next to one another."""
    return torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format


def _expand_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, U, scale, *_ = inputs
    if ctx.needs_input_grad[1]:
        raise ValueError("svdiff::expand: U requires grad, but the factors of a spectral layer are frozen")
    # z is wanted for dscale alone, and it is the only tensor of activation size that is kept.
    ctx.save_for_backward(U, scale, *([z] if ctx.needs_input_grad[2] else []))


def _expand_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_dz, _, need_dscale, need_dbias, _ = ctx.needs_input_grad
    U, scale, *kept = ctx.saved_tensors
    dz, dscale, dbias = None, None, None
    if need_dz or need_dscale:
        z = kept[0] if kept else None
        dz, dscale = expand_backward(dy, z, U, scale, need_dz)
    if need_dbias:
        dbias = dy.flatten(0, -2).sum(0)
    return dz if need_dz else None, None, dscale if need_dscale else None, dbias, None


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.rest = inputs
    if ctx.needs_input_grad[1]:
        raise ValueError("svdiff: a frozen weight requires grad")
    ctx.save_for_backward(weight)
    ctx.dtype, ctx.size = x.dtype, x.shape[2:]


def _frozen_linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return frozen_linear(dy.to(ctx.dtype), weight.T, alpha=ctx.rest[-1]), *(None,) * 4


def _frozen_conv2d_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    dx = frozen_conv2d_backward(dy.to(ctx.dtype), weight, ctx.size, *ctx.rest[:3])
    return dx, *(None,) * 7


def register_autograd() -> None:
    """Give the ops the gradients that the extension would bring."""
    for name, backward, setup_context in (
        ("expand", _expand_backward, _expand_setup_context),
        ("frozen_linear", _frozen_linear_backward, _keep_weight),
        ("frozen_conv2d", _frozen_conv2d_backward, _keep_weight),
    ):
        torch.library.register_autograd(f"svdiff::{name}", backward, setup_context=setup_context, lib=library)
