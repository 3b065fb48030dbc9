"""Spectral layers as modules: drop-in replacements of torch's, with a frozen SVD and a trainable shift.

Example::

    layer = SpectralLinear.from_module(linear)
    layer.delta  # the only trainable tensor
    layer.merge()  # a plain nn.Linear again, with the shifted weight
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import factor_dtype
from .decompose import decompose
from .errors import SVDiffError
from .factors import Factors
from .lazy import LazyWeight
from .module import SpectralModule
from .norms import SpectralGroupNorm, SpectralLayerNorm
from .recomposed import recomposed_conv2d, recomposed_embedding, recomposed_linear, recomposed_weight
from .scaled import scaled_conv2d, scaled_embedding, scaled_linear, scaled_linears

__all__ = [
    "FORMS",
    "SpectralConv2d",
    "SpectralEmbedding",
    "SpectralGroupNorm",
    "SpectralLayerNorm",
    "SpectralLinear",
    "SpectralModule",
    "linears",
    "range_shift",
]

FORMS = ("factored", "residual", "recomposed")


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
        self._load: Callable[[], Factors] | None = None
        self._apply(lambda t: t)  # brings the factors into the type that they are kept in

    def defer(self, load: Callable[[], Factors]) -> None:
        """Take U and Vh, on the meta device so far, from `load` when they are first needed."""
        self._load = load

    def ready(self) -> None:
        """Have U and Vh at hand, if they were deferred.

        Raises:
            SVDiffError: what is loaded has other singular values than the layer was made with.
        """
        if self._load is None:
            return
        factors = self._load().to(self.sigma.device)
        if not torch.allclose(
            factors.sigma.to(self.sigma.dtype), self.sigma, rtol=1e-3, atol=1e-6
        ):  # made again, maybe
            raise SVDiffError(
                "the stored decomposition of a layer has changed since the model was attached: attach again"
            )
        self._load, self.alpha = None, 1.0
        self.U, self.Vh = factors.U, factors.Vh.unflatten(1, self.Vh.shape[1:])
        self._apply(lambda t: t)

    def factors(self) -> Factors:
        """``U diag(sigma) Vh`` of the unshifted weight, in the type that the layer keeps."""
        self.ready()
        return Factors(self.U * self.alpha, self.sigma, self.Vh.flatten(1))

    @property
    def weight(self) -> Tensor:
        """The shifted weight. Its dtype, device and shape cost nothing; any other use recomposes it, which is slow."""
        if torch.compiler.is_compiling():
            return self.recomposed_weight()  # dropped from the graph where only its dtype is asked for
        return LazyWeight.make(
            self.sigma.new_empty(0, dtype=self.dtype), (self.U.shape[0], *self.Vh.shape[1:]), self.recomposed_weight
        )

    def recomposed_weight(self, base: Tensor | None = None) -> Tensor:
        """The shifted weight, as large as the original.

        Args:
            base: the original, if it is at hand: then what is rebuilt is the shift alone, which is added to it in fp32,
                and where that is zero the original comes out to the bit.
        """
        self.ready()
        gain = self.one_gain()
        if self.base is None and base is not None:
            gain = gain - self.sigma
        else:
            base = self.base
        return recomposed_weight(self.U, gain, self.Vh, base, alpha=self.alpha, dtype=self.dtype)

    def _merge_into(self, plain: nn.Module, base: Tensor | None) -> Any:
        plain.weight = nn.Parameter(self.recomposed_weight(base).detach(), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        like = fn(self.sigma.new_empty(0, dtype=self.dtype))
        self.dtype = like.dtype
        dtype = factor_dtype(like.dtype, like.device)
        finer = dtype != like.dtype and self.range_safe
        alpha = 2.0**-self._shift if finer else 1.0
        ratios = {id(self.U): self.alpha / alpha, id(self.Vh): 1.0}
        self.alpha = alpha

        def convert(t: Tensor) -> Tensor:
            ratio = ratios.get(id(t))
            if ratio is not None and self._load is not None:
                return t
            out = fn(t)
            if ratio is None or (ratio == 1 and out.dtype == dtype):
                return out
            # Not of what fn returns, which may have lost bits that dtype can hold.
            wide = torch.promote_types(t.dtype, dtype)
            return t.to(out.device, wide).mul(ratio).to(dtype)

        return super()._apply(convert, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.ready()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.alpha != 1:
            destination[prefix + "U"] = self.U * self.alpha

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.ready()
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


class SpectralLinear(_SpectralMatrix, nn.Linear):  # type: ignore[override]
    """`functional.spectral_linear` as a module; stands in for `nn.Linear`, and is one to whoever asks.

    Example:
        >>> import torch
        >>> from svdiff_kernels.nn import SpectralLinear
        >>> linear = torch.nn.Linear(3, 5)
        >>> layer = SpectralLinear.from_module(linear)
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['delta']
        >>> layer
        SpectralLinear(3, 5, rank=3, form=factored)
        >>> torch.allclose(layer.merge().weight, linear.weight, atol=1e-6)  # a plain nn.Linear again
        True
    """

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
        self.ready()
        x, gain = self.gain_for(x)
        run = recomposed_linear if self.form == "recomposed" else scaled_linear
        return run(x, self.U, gain, self.Vh, self.bias, weight=self.base, alpha=self.alpha)

    def merge(self, base: Tensor | None = None) -> nn.Linear:
        """A plain linear layer with the shifted weight; base as in `recomposed_weight`."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return self._merge_into(plain, base)

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, form={self.form}"


def linears(x: Tensor, layers: Sequence[SpectralLinear]) -> list[Tensor]:
    """What each of several linear layers makes of the same input, such as an attention's q, k and v.

    On a GPU factored layers of one shape take one launch a stage instead of one each.
    """
    if any(layer.form != "factored" for layer in layers):
        return [layer(x) for layer in layers]
    for layer in layers:
        layer.ready()
    U, Vh, bias = [layer.U for layer in layers], [layer.Vh for layer in layers], [layer.bias for layer in layers]
    gains, alpha = [layer.gain() for layer in layers], [layer.alpha for layer in layers]
    x, _ = layers[0].gain_for(x)
    return scaled_linears(x, U, gains, Vh, bias, alpha=alpha)


class SpectralConv2d(_SpectralMatrix, nn.Conv2d):  # type: ignore[override]
    """`functional.spectral_conv2d` as a module; stands in for `nn.Conv2d`. A grouped one is always recomposed."""

    kernel_size: Any  # pairs, as nn.Conv2d keeps them
    stride: Any
    padding: Any
    dilation: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """PEFT makes the factors of a LoRA of the class of the layer beneath: numbers mean a plain convolution."""
        if args and not isinstance(args[0], nn.Module):
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls)

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
        self.ready()
        batch, gain = self.gain_for(x if x.dim() == 4 else x[None])
        x, padding = batch if x.dim() == 4 else batch[0], self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._padding_around, mode=self.padding_mode), 0
        run = recomposed_conv2d if self.form == "recomposed" else scaled_conv2d
        rest = (self.bias, self.stride, padding, self.dilation, self.groups)
        return run(x, self.U, gain, self.Vh, *rest, weight=self.base, alpha=self.alpha)

    def merge(self, base: Tensor | None = None) -> nn.Conv2d:
        """A plain convolution with the shifted kernel; base as in `recomposed_weight`."""
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
        return self._merge_into(plain, base)

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"rank={self.rank}, form={self.form}"
        )


class SpectralEmbedding(_SpectralMatrix, nn.Embedding):  # type: ignore[override]
    """`functional.spectral_embedding` as a module; stands in for `nn.Embedding`."""

    range_safe = False  # what it scales are rows of U

    def __init__(self, module: nn.Embedding, factors: Factors, form: str) -> None:
        super().__init__(module.weight, factors, form, None)
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx = module.padding_idx
        self.max_norm, self.norm_type = None, module.norm_type
        self.scale_grad_by_freq = self.sparse = False

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
        self.ready()
        ids, gain = self.gain_for(ids)
        how: Any = {"padding_idx": self.padding_idx, "dtype": self.dtype}
        if self.form == "recomposed":
            return recomposed_embedding(ids, self.U, gain, self.Vh, **how)
        return scaled_embedding(ids, self.U, gain, self.Vh, weight=self.base, **how)

    def merge(self, base: Tensor | None = None) -> nn.Embedding:
        """A plain embedding with the shifted table; base as in `recomposed_weight`."""
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return self._merge_into(plain, base)

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, form={self.form}"
