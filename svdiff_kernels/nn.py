"""Spectral layers as modules: drop-in replacements of torch's, with a frozen SVD and a trainable shift.

layer = SpectralLinear.from_module(linear)
layer.delta          # the only trainable tensor
layer.merge()        # a plain nn.Linear again, with the shifted weight
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as SF
from .backends import factor_dtype
from .decompose import decompose
from .errors import SVDiffError
from .factors import Factors
from .lazy import LazyWeight

if TYPE_CHECKING:
    from .bank import Bank

FORMS = ("factored", "residual", "recomposed")


class SpectralModule(nn.Module):
    """What all spectral layers share: the shift, and where its gain comes from.

    Attributes:
        sigma: buffer ``[r]``, at least fp32 whatever the module is cast to.
        delta: parameter ``[r]`` in sigma's dtype; once a `Bank` has adopted the layer, a view of the bank's vector.
        form: "factored", "residual" or "recomposed" (of a norm: "vector" or "scalar").
        one_dim: whether the weight is a vector; those learn at a rate of their own.
    """

    sigma: Tensor
    delta: Tensor
    bias: Tensor | None
    form: str
    one_dim: ClassVar[bool] = False

    def __init__(self, sigma: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        sigma = sigma.detach().to(torch.promote_types(sigma.dtype, torch.float32))
        self.register_buffer("sigma", sigma)
        self.delta = nn.Parameter(torch.zeros_like(sigma))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._bank: Bank | None = None
        self._bank_gain: Tensor | None = None

    @property
    def rank(self) -> int:
        """How many numbers are trained."""
        return self.sigma.shape[0]

    def scale(self) -> Tensor:
        """``relu(sigma + delta)``, ``[r]`` (of a norm in vector mode ``sigma + delta``)."""
        gain = self.gain()
        return self.sigma + gain if self.form == "residual" else gain

    def gain(self) -> Tensor:
        """What the forward pass multiplies by: `scale`, less sigma in the residual form."""
        if self._bank is None:
            return SF.spectral_gain(self.sigma, self.delta, residual=self.form == "residual")
        if not torch.compiler.is_compiling():  # compiled, only the bank's hook refreshes
            self._bank.ensure_fresh()
        assert self._bank_gain is not None
        return self._bank_gain

    def one_gain(self) -> Tensor:
        """`gain`, where all samples must share it.

        Raises:
            SVDiffError: the bank's mix differs from sample to sample.
        """
        gain = self.gain()
        if gain.dim() == 2:
            raise SVDiffError("there is no one weight while samples have mixes of their own: set one mix for all")
        return gain

    def gain_terms(self) -> tuple[Tensor, Tensor]:
        """``(base, floor)`` with ``gain = max(base + delta, floor)``: how a bank computes it."""
        if self.form == "residual":
            return torch.zeros_like(self.sigma), -self.sigma
        return self.sigma, torch.zeros_like(self.sigma)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        delta = self._parameters.get("delta")
        kept = {id(t) for t in (self.sigma, delta, None if delta is None else delta.grad) if t is not None}
        return super()._apply(lambda t: keep_wide(fn, t) if id(t) in kept else fn(t), recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bank_gain": None}  # not a leaf: cannot be copied; the bank makes it again


def keep_wide(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn(tensor)``, except that a cast below fp32 only moves: half precision would eat small shifts."""
    out = fn(tensor)
    return out if out.dtype == tensor.dtype else tensor.to(out.device, torch.promote_types(out.dtype, torch.float32))


def range_shift(sigma: Tensor) -> int:
    """The power of two by which a layer with factors in fp16 divides x, and multiplies U.

    Its z and scaled z are in fp16 too, although x in bf16 may be of any size. Divided by the size of the largest sigma,
    the scaled z is no larger than x; and since the power is at least 6, x itself may be 64 times what fp16 holds. More
    than 10 would push small z below what fp16 resolves.
    """
    largest = 1.0 if sigma.is_meta or sigma.numel() == 0 else max(float(sigma.max()), 1.0)
    return min(max(math.ceil(math.log2(largest)), 6), 10)


class _SpectralMatrix(SpectralModule):
    """A layer with U ``[M, r]``, Vh ``[r, ...]`` and, in the residual form, the weight itself as ``base``.

    Attributes:
        alpha: U is held multiplied by ``1 / alpha``, and x is multiplied by alpha. It is 1 unless the factors of a bf16
            layer are in fp16: see `range_shift`. A state dict holds U itself.
        dtype: what the layer computes for; on a GPU its factors may be in another.
    """

    U: Tensor
    Vh: Tensor
    base: Tensor | None
    dtype: torch.dtype
    range_safe: ClassVar[bool] = True

    def __init__(self, weight: Tensor, factors: Factors, form: str, bias: Tensor | None) -> None:
        shift = range_shift(factors.sigma)  # before it is on a GPU, for whose answer the CPU would wait
        factors = factors.to(weight.device)
        super().__init__(factors.sigma, bias)
        self.form, self.alpha, self._shift = form, 1.0, shift
        self.register_buffer("U", factors.U)
        self.register_buffer("Vh", factors.Vh.unflatten(1, weight.shape[1:]))
        self.register_buffer("base", weight.detach() if form == "residual" else None)
        self.dtype = weight.dtype
        self._apply(lambda t: t)  # brings the factors into the type that they are kept in

    def factors(self) -> Factors:
        """``U diag(sigma) Vh`` of the unshifted weight, in the type that the layer keeps."""
        return Factors(self.U * self.alpha, self.sigma, self.Vh.flatten(1))

    @property
    def weight(self) -> Tensor:
        """The shifted weight. Its dtype, device and shape cost nothing; any other use recomposes it, which is slow."""
        if torch.compiler.is_compiling():
            return self.recomposed_weight()  # dropped from the graph where only its dtype is asked for
        return LazyWeight.make(
            self.U.new_empty(0, dtype=self.dtype), (self.U.shape[0], *self.Vh.shape[1:]), self.recomposed_weight
        )

    def recomposed_weight(self) -> Tensor:
        """The shifted weight, as large as the original."""
        gain = self.one_gain()
        return SF.recomposed_weight(self.U, gain, self.Vh, self.base, alpha=self.alpha, dtype=self.dtype)

    def _merge_into(self, plain: nn.Module) -> Any:
        plain.weight = nn.Parameter(self.recomposed_weight().detach(), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        like = fn(self.U.new_empty(0, dtype=self.dtype))
        self.dtype = like.dtype
        dtype = factor_dtype(like.dtype, like.device)
        finer = dtype != like.dtype and self.range_safe
        alpha = 2.0**-self._shift if finer else 1.0
        ratios = {id(self.U): self.alpha / alpha, id(self.Vh): 1.0}
        self.alpha = alpha

        def convert(t: Tensor) -> Tensor:
            out = fn(t)
            ratio = ratios.get(id(t))
            if ratio is None or (ratio == 1 and out.dtype == dtype):
                return out
            # Not of what fn returns, which may have lost bits that dtype can hold.
            wide = torch.promote_types(t.dtype, dtype)
            return t.to(out.device, wide).mul(ratio).to(dtype)

        return super()._apply(convert, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.alpha != 1:
            destination[prefix + "U"] = self.U * self.alpha

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "U"
        if self.alpha != 1 and key in state_dict:
            state_dict = state_dict | {key: state_dict[key].float() / self.alpha}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _prepare(
    weight: Tensor, factors: Factors | None, rank: int | None, form: str, *, can_factor: bool = True
) -> tuple[Factors, str]:
    """The factors, wherever they are, and the form that "auto" stands for."""
    matrix_shape = (weight.shape[0], weight[0].numel())
    if factors is None:
        wide = torch.float64 if weight.dtype == torch.float64 else None
        factors = decompose(weight, rank, dtype=wide)
    elif factors.shape != matrix_shape:
        raise SVDiffError(f"factors of shape {factors.shape} do not belong to a weight of shape {tuple(weight.shape)}")
    elif rank is not None:
        factors = factors.truncated(rank)
    if form == "auto":
        form = "residual" if factors.rank < min(matrix_shape) else "factored"
        form = form if can_factor else "recomposed"
    if form not in FORMS:
        raise SVDiffError(f"form {form!r} is not one of auto, {', '.join(FORMS)}")
    if form != "recomposed" and not can_factor:
        raise SVDiffError(f"a grouped convolution has only the recomposed form, not {form!r}")
    return factors, form


class SpectralLinear(_SpectralMatrix):
    """`functional.spectral_linear` as a module; stands in for `nn.Linear`."""

    def __init__(self, module: nn.Linear, factors: Factors, form: str) -> None:
        super().__init__(module.weight, factors, form, module.bias)
        self.in_features, self.out_features = module.in_features, module.out_features

    @classmethod
    def from_module(
        cls, module: nn.Linear, factors: Factors | None = None, rank: int | None = None, form: str = "auto"
    ) -> SpectralLinear:
        """The spectral version of a linear layer; it shares the bias and copies nothing else.

        Args:
            module: the layer, left as it is.
            factors: its decomposition, if at hand (from a `FactorCache`).
            rank: train this many largest singular values; None trains all.
            form: "factored", "residual", "recomposed", or "auto": residual below full rank, else factored.

        Raises:
            SVDiffError: the weight cannot be decomposed, or factors do not belong to it.
        """
        return cls(module, *_prepare(module.weight, factors, rank, form))

    def forward(self, x: Tensor) -> Tensor:
        """``[*, in_features]`` to ``[*, out_features]``."""
        run = SF.recomposed_linear if self.form == "recomposed" else SF.scaled_linear
        return run(x, self.U, self.gain(), self.Vh, self.bias, weight=self.base, alpha=self.alpha)

    def merge(self) -> nn.Linear:
        """A plain linear layer with the shifted weight."""
        return self._merge_into(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, form={self.form}"


def linears(x: Tensor, layers: Sequence[SpectralLinear]) -> list[Tensor]:
    """What each of several linear layers makes of the same input, such as an attention's q, k and v.

    On a GPU factored layers of one shape take one launch a stage instead of one each.
    """
    if any(layer.form != "factored" for layer in layers):
        return [layer(x) for layer in layers]
    U, Vh, bias = [layer.U for layer in layers], [layer.Vh for layer in layers], [layer.bias for layer in layers]
    gains, alpha = [layer.gain() for layer in layers], [layer.alpha for layer in layers]
    return SF.scaled_linears(x, U, gains, Vh, bias, alpha=alpha)


class SpectralConv2d(_SpectralMatrix):
    """`functional.spectral_conv2d` as a module; stands in for `nn.Conv2d`. A grouped one is always recomposed."""

    kernel_size: Any  # pairs, as nn.Conv2d keeps them
    stride: Any
    padding: Any
    dilation: Any

    def __init__(self, module: nn.Conv2d, factors: Factors, form: str) -> None:
        super().__init__(module.weight, factors, form, module.bias)
        self.in_channels, self.out_channels = module.in_channels, module.out_channels
        self.kernel_size, self.stride = module.kernel_size, module.stride
        self.padding, self.dilation, self.groups = module.padding, module.dilation, module.groups
        self.padding_mode = module.padding_mode
        self._padding_around = module._reversed_padding_repeated_twice

    @classmethod
    def from_module(
        cls, module: nn.Conv2d, factors: Factors | None = None, rank: int | None = None, form: str = "auto"
    ) -> SpectralConv2d:
        """The spectral version of a convolution; see `SpectralLinear.from_module`."""
        return cls(module, *_prepare(module.weight, factors, rank, form, can_factor=module.groups == 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` to ``[B, C_out, H', W']``, or both without B."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._padding_around, mode=self.padding_mode), 0
        run = SF.recomposed_conv2d if self.form == "recomposed" else SF.scaled_conv2d
        rest = (self.bias, self.stride, padding, self.dilation, self.groups)
        return run(x, self.U, self.gain(), self.Vh, *rest, weight=self.base, alpha=self.alpha)

    def merge(self) -> nn.Conv2d:
        """A plain convolution with the shifted kernel."""
        plain = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
        )
        return self._merge_into(plain)

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"rank={self.rank}, form={self.form}"
        )


class SpectralEmbedding(_SpectralMatrix):
    """`functional.spectral_embedding` as a module; stands in for `nn.Embedding`."""

    range_safe = False  # what it scales are rows of U

    def __init__(self, module: nn.Embedding, factors: Factors, form: str) -> None:
        super().__init__(module.weight, factors, form, None)
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx = module.padding_idx

    @classmethod
    def from_module(
        cls, module: nn.Embedding, factors: Factors | None = None, rank: int | None = None, form: str = "auto"
    ) -> SpectralEmbedding:
        """The spectral version of an embedding; see `SpectralLinear.from_module`."""
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise SVDiffError("an embedding with max_norm, scale_grad_by_freq or sparse has no spectral version")
        return cls(module, *_prepare(module.weight, factors, rank, form))

    def forward(self, ids: Tensor) -> Tensor:
        """``[*]`` integers to ``[*, embedding_dim]``."""
        how: Any = {"padding_idx": self.padding_idx, "dtype": self.dtype}
        if self.form == "recomposed":
            return SF.recomposed_embedding(ids, self.U, self.gain(), self.Vh, **how)
        return SF.scaled_embedding(ids, self.U, self.gain(), self.Vh, weight=self.base, **how)

    def merge(self) -> nn.Embedding:
        """A plain embedding with the shifted table."""
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return self._merge_into(plain)

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, form={self.form}"


class _SpectralVector(SpectralModule):
    """A norm's weight ``w [n]``: ``w + delta`` ("vector"), or ``relu(||w|| + delta) w / ||w||`` ("scalar").

    The scalar mode is the SVD of w as a matrix of one row, as in svdiff-pytorch.
    """

    direction: Tensor | None
    dtype: torch.dtype
    one_dim: ClassVar[bool] = True

    def __init__(self, weight: Tensor | None, bias: Tensor | None, mode: str) -> None:
        if weight is None:
            raise SVDiffError("a norm without a weight (affine=False) has nothing to shift")
        if not torch.isfinite(weight).all():
            raise SVDiffError(f"cannot shift a norm weight of shape {tuple(weight.shape)}: it holds NaN or inf")
        if mode not in ("vector", "scalar"):
            raise SVDiffError(f"mode {mode!r} of a norm is not one of vector, scalar")
        w = weight.detach().flatten().to(torch.promote_types(weight.dtype, torch.float32))
        length = torch.linalg.vector_norm(w)[None]
        super().__init__(w.clone() if mode == "vector" else length, bias)
        self.form = mode
        self.register_buffer("direction", w / length.clamp_min(1e-30) if mode == "scalar" else None)
        self.dtype, self._weight_shape = weight.dtype, weight.shape

    def gain(self) -> Tensor:
        """`scale`."""
        if self._bank is None and self.form == "vector":
            return self.sigma + self.delta
        return super().gain()

    def gain_terms(self) -> tuple[Tensor, Tensor]:
        """See `SpectralModule.gain_terms`."""
        if self.form == "vector":
            return self.sigma, torch.full_like(self.sigma, -torch.inf)
        return super().gain_terms()

    def _shifted(self, gain: Tensor) -> Tensor:
        """The weight, at least in fp32: rounded to half precision it would lose its small shift."""
        return gain if self.direction is None else gain * self.direction

    def _affine(self, normed: Callable[[Tensor, Tensor | None, Tensor | None], Tensor], x: Tensor, dim: int) -> Tensor:
        """``normed(x, weight, bias)`` in fp32; the weight, one per sample if they differ, runs along x's dim."""
        weight = self._shifted(self.gain())
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        wide = x.to(weight.dtype)
        if weight.dim() == 1:
            return normed(wide, weight.view(self._weight_shape), bias).to(x.dtype)
        samples, y = len(weight), normed(wide, None, None)
        if y.shape[0] % samples:
            raise ValueError(f"a mix for {samples} samples, which do not split a batch of {y.shape[0]} evenly")
        tail = [1] * (y.dim() - dim - len(self._weight_shape))
        of_weight = [1] * (dim - 1) + [*self._weight_shape, *tail]
        y = y * weight.repeat_interleave(y.shape[0] // samples, 0).view(-1, *of_weight)
        return (y if bias is None else y + bias.view(*of_weight)).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The shifted weight, in the dtype of the model."""
        return self._shifted(self.one_gain()).view(self._weight_shape).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.sigma.device)).dtype
        return super()._apply(fn, recurse)

    def _merge_into(self, plain: nn.Module) -> Any:
        plain.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return plain.train(self.training)


class SpectralLayerNorm(_SpectralVector):
    """Stands in for `nn.LayerNorm`; only its weight moves."""

    def __init__(self, module: nn.LayerNorm, mode: str) -> None:
        super().__init__(module.weight, module.bias, mode)
        self.normalized_shape, self.eps = module.normalized_shape, module.eps

    @classmethod
    def from_module(cls, module: nn.LayerNorm, mode: str = "vector") -> SpectralLayerNorm:
        """The spectral version of a layer norm; mode is "vector" (one number each) or "scalar" (one in all)."""
        return cls(module, mode)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        shape, eps = self.normalized_shape, self.eps
        return self._affine(lambda x, w, b: F.layer_norm(x, shape, w, b, eps), x, x.dim() - len(shape))

    def merge(self) -> nn.LayerNorm:
        """A plain layer norm with the shifted weight."""
        plain = nn.LayerNorm(self.normalized_shape, self.eps, bias=self.bias is not None, device="meta")
        return self._merge_into(plain)


class SpectralGroupNorm(_SpectralVector):
    """Stands in for `nn.GroupNorm`; only its weight moves."""

    def __init__(self, module: nn.GroupNorm, mode: str) -> None:
        super().__init__(module.weight, module.bias, mode)
        self.num_groups, self.num_channels, self.eps = module.num_groups, module.num_channels, module.eps

    @classmethod
    def from_module(cls, module: nn.GroupNorm, mode: str = "vector") -> SpectralGroupNorm:
        """The spectral version of a group norm; mode is "vector" (one number each) or "scalar" (one in all)."""
        return cls(module, mode)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        return self._affine(lambda x, w, b: F.group_norm(x, self.num_groups, w, b, self.eps), x, 1)

    def merge(self) -> nn.GroupNorm:
        """A plain group norm with the shifted weight."""
        return self._merge_into(nn.GroupNorm(self.num_groups, self.num_channels, self.eps, device="meta"))
