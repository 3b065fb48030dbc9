"""What training draws from: latents of pictures and embeddings of captions, cached where possible."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..latents import encode
from ..processes import share
from ..progress import progress_bar
from .data import Cut, Half, Loaded, Size, cut, half, leaves_no_choice, resized
from .families import Conditions, Family


class Piece(NamedTuple):
    """What is seen of a picture.

    Attributes:
        picture: its number.
        size: of the canvas, in pixels.
        half: which the picture fills with what has most in it; None for all of the canvas.
        flip: whether it is mirrored; halves are not.
        ratio: how large it is, see `data.resized`.
    """

    picture: int
    size: Size
    half: Half | None = None
    flip: bool = False
    ratio: float = 1.0


class Encoded(NamedTuple):
    """Latents of pieces, as a distribution, and where the pieces are from.

    Attributes:
        mean: ``[B, C, h, w]``, in the denoiser's units.
        std: likewise.
        sizes: ``[B, 6]``, see `Family.predict`.
        masks: ``[B, 1, h, w]``, how much each place counts: 0 where no picture is, and 1 on average.
    """

    mean: Tensor
    std: Tensor
    sizes: Tensor
    masks: Tensor

    def row(self, i: int) -> Encoded:
        """Of the i-th piece alone."""
        return Encoded(*(part[i : i + 1] for part in self))

    def cut(self, half: Half | None) -> Encoded:
        """Only a half of each canvas, if not all of it is asked for."""
        if half is None:
            return self
        return self._replace(mean=half.of(self.mean), std=half.of(self.std), masks=half.of(self.masks))


class Latents:
    """Latents of pictures, sampled anew at each draw.

    Args:
        vae: an AutoencoderKL, or one without a distribution (AutoencoderTiny).
        pictures: what pieces are cut from.
        center_crop: cut pieces from the centre, not from anywhere.
        cache: encode a piece once. One that is cut at random is encoded at each draw all the same.
        scale: pixels a latent, along each side.
        process: number of this process.
        processes: how many there are.
        gather: gives each process the rows of a tensor of all of them, in the order of their numbers.
    """

    def __init__(
        self,
        vae: Any,
        pictures: Sequence[Loaded],
        *,
        center_crop: bool,
        cache: bool,
        scale: int = 8,
        process: int = 0,
        processes: int = 1,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._vae, self._pictures = vae, pictures
        self._center_crop, self._cache, self._scale = center_crop, cache, scale
        self._process, self._processes, self._gather = process, processes, gather
        self._known: dict[Piece, Encoded] = {}

    def is_fixed(self, piece: Piece) -> bool:
        """Whether a piece is the same at each draw."""
        if piece.ratio != 1:
            return False
        image = self._pictures[piece.picture].image
        return piece.half is not None or self._center_crop or leaves_no_choice(image, piece.size)

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Encode those that are the same at each draw; each process encodes its share, and all get all."""
        by_size: dict[Size, list[Piece]] = {}  # for only latents of one shape can be exchanged
        for piece in dict.fromkeys(pieces):
            if self._cache and self.is_fixed(piece) and piece not in self._known:
                by_size.setdefault(piece.size, []).append(piece)
        shares = [share(group, self._process, self._processes) for group in by_size.values()]
        encoded = {
            piece: self._encode_fixed(piece)
            for piece in progress_bar([piece for mine in shares for piece in mine], "Encoding pictures", delay=3)
        }
        for group, mine in zip(by_size.values(), shares, strict=True):
            parts = zip(*(encoded[piece] for piece in mine), strict=True)
            everyone = Encoded(*(self._gather(torch.cat(part)) for part in parts))
            self._known |= {piece: everyone.row(i) for i, piece in enumerate(group)}

    def draw(self, pieces: Sequence[Piece], rngs: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """Of pieces of one shape, with a generator each: latents ``[B, C, h, w]``, sizes and masks as of `Encoded`."""
        for piece in pieces:
            if self._cache and piece not in self._known and self.is_fixed(piece):
                self._known[piece] = self._encode_fixed(piece)
        new = [i for i, piece in enumerate(pieces) if piece not in self._known]
        made = self._encode([self._cut(pieces[i], rngs[i]) for i in new]) if new else None
        rows = [
            (self._known[piece] if made is None or i not in new else made.row(new.index(i))).cut(piece.half)
            for i, piece in enumerate(pieces)
        ]
        mean, std, sizes, masks = (torch.cat(parts) for parts in zip(*rows, strict=True))
        noise = torch.stack([torch.randn(mean.shape[1:], generator=rng) for rng in rngs])
        return mean + std * noise.to(mean.device), sizes, masks

    def _encode_fixed(self, piece: Piece) -> Encoded:
        """By itself: of a batch the rounding would depend on its neighbours."""
        return self._encode([self._cut(piece, torch.Generator())])  # which decides nothing

    def _cut(self, piece: Piece, rng: torch.Generator) -> Cut:
        picture = self._pictures[piece.picture]
        if piece.half is not None:
            return half(picture, piece.size, piece.half)
        how: dict[str, Any] = {"center": self._center_crop, "flip": piece.flip, "rng": rng}
        if piece.ratio != 1:
            return resized(picture, piece.size, piece.ratio, step=self._scale, **how)
        return cut(picture, piece.size, **how)

    def _encode(self, cuts: Sequence[Cut]) -> Encoded:
        mean, std = encode(self._vae, torch.stack([one.pixels for one in cuts]))
        sizes = [[*one.original, *one.corner, *one.pixels.shape[1:]] for one in cuts]
        masks = torch.stack([self._mask(one, (mean.shape[-2], mean.shape[-1])) for one in cuts])
        return Encoded(mean, std, torch.tensor(sizes, device=mean.device), masks.to(mean.device))

    def _mask(self, one: Cut, size: Size) -> Tensor:
        """``[1, h, w]``. Latents at a picture's edge, of which the VAE saw the ground too, count no more than that."""
        if one.place is None:
            return torch.ones(1, *size)
        top, left, bottom, right = (side // self._scale for side in one.place)
        rows, columns = _inner(top, bottom), _inner(left, right)
        mask = torch.zeros(1, *size)
        mask[:, rows, columns] = 1
        return mask * (mask.numel() / mask.sum())


def _inner(first: int, end: int) -> slice:
    """Without the outermost ones, if any are left then."""
    return slice(first + 1, end - 1) if end - first > 2 else slice(first, end)


class Captions:
    """What the denoiser is told of captions.

    Args:
        family: of the pipeline.
        captions: distinct ones.
        trained: text encoders whose answers change; those of the others are kept.
    """

    def __init__(self, family: Family, captions: Sequence[str], *, trained: Collection[str] = ()) -> None:
        self._family = family
        self._numbers = {caption: i for i, caption in enumerate(captions)}
        self._ids: dict[str, Tensor] = {}
        self._kept: dict[str, tuple[Tensor, ...]] = {}
        for name, encoder in family.text_encoders.items():
            self._ids[name] = family.tokens(name, captions).to(next(encoder.parameters()).device)
            if name not in trained:
                with torch.no_grad():
                    parts = [family.encode(name, ids) for ids in self._ids[name].split(8)]
                self._kept[name] = tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def numbers(self, captions: Sequence[str]) -> Tensor:
        """By which `embed` knows these captions, ``[len(captions)]``."""
        device = next(iter(self._ids.values())).device
        return torch.tensor([self._numbers[caption] for caption in captions]).to(device)

    def embed(self, numbers: Tensor) -> Conditions:
        """What the denoiser is told of captions by `numbers`."""
        encoded = {
            name: tuple(part[numbers] for part in self._kept[name])
            if name in self._kept
            else self._family.encode(name, ids[numbers])
            for name, ids in self._ids.items()
        }
        return self._family.conditions(encoded)
