"""DreamBooth's objective: pictures of subjects, and of their class so that it is not forgotten (arXiv 2208.12242)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chance import Order, generator
from .cutmix import PLAIN, CutMix, Mixture
from .data import Loaded, Size
from .families import Family
from .noising import Noising
from .resizing import UNCHANGED, draw_resizing
from .sources import Captions, Latents, Piece
from .unmix import Unmix


class Batch(NamedTuple):
    """What one call of the denoiser needs; the subjects' samples first, then as many of their classes.

    Attributes:
        noisy: latents ``[B, C, h, w]``, in the denoiser's dtype.
        target: what it should say of them, ``[B, C, h, w]`` in fp32.
        timesteps: ``[B]``.
        weights: of the losses, ``[B]``.
        captions: ``[B]``, as `Captions.embed` numbers them.
        sizes: ``[B, 6]``, see `Family.predict`.
        arrangements: ``[B]``, see `cutmix`.
        masks: ``[B, 1, h, w]``, how much each place counts, 1 on average.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    weights: Tensor
    captions: Tensor
    sizes: Tensor
    arrangements: Tensor
    masks: Tensor


class Pool:
    """Pictures of which each batch takes some: the subjects', or the classes'.

    Args:
        name: of the pool, for its chance.
        numbers: of its pictures.
        pictures: all pictures, by number.
        captions: of all pictures.
        cut_mix: which samples are mixtures; None for none.
        seed: of the run.
        resized: whether pictures are made smaller or larger by chance, see `resizing`.
    """

    def __init__(
        self,
        name: str,
        numbers: Sequence[int],
        pictures: Sequence[Loaded],
        captions: Sequence[str],
        cut_mix: CutMix | None,
        seed: int,
        *,
        resized: bool = False,
    ) -> None:
        self.name, self.numbers, self.captions, self.cut_mix = name, numbers, captions, cut_mix
        self.resized = resized
        self._buckets: dict[Size, list[int]] = {}
        for number in numbers:
            self._buckets.setdefault(pictures[number].bucket, []).append(number)
        self._orders = {
            bucket: Order(len(members), seed, f"{name}/{bucket}") for bucket, members in self._buckets.items()
        }
        self._turns, self._counts = Order(len(numbers), seed, f"{name}/turns"), Counter[Size]()
        self.sizes = [pictures[number].bucket for number in numbers]
        self._turns_taken: list[tuple[Size, int]] = []  # of each batch so far: its size, and how many had it before

    def size_of(self, batch: int) -> Size:
        """Of the pictures in a batch: sizes come as often as pictures have them."""
        return self._turn(batch)[0]

    def pictures_of(self, batch: int, places: range, total: int) -> list[int]:
        """Those in some places of a batch of `total`; each picture once before any comes again."""
        size, before = self._turn(batch)
        members, order = self._buckets[size], self._orders[size]
        return [members[order[before * total + place]] for place in places]

    def _turn(self, batch: int) -> tuple[Size, int]:
        while len(self._turns_taken) <= batch:
            size = self.sizes[self._turns[len(self._turns_taken)]]
            self._turns_taken.append((size, self._counts[size]))
            self._counts[size] += 1
        return self._turns_taken[batch]


class DreamBooth:
    """Draws batches and gives their loss: that of the subjects + `prior_weight` times that of the classes.

    Which sample is where depends on the number of the batch and the place in it, over all processes: see `chance`.

    Args:
        family: of the pipeline.
        noising: what the denoiser is asked.
        latents: of all pictures.
        captions: of all pictures and mixtures.
        pools: the subjects' pictures; for prior preservation the classes' too.
        batch_size: samples of each pool in a batch of this process.
        prior_weight: lambda in SVDiff's equation 3.
        random_flip: mirror pictures by chance; mixtures are not.
        unmix: its loss is added; None for not.
        unmix_weight: times this.
        seed: of the run.
        process: number of this process.
        processes: how many there are.
    """

    def __init__(
        self,
        family: Family,
        noising: Noising,
        latents: Latents,
        captions: Captions,
        pools: Sequence[Pool],
        *,
        batch_size: int,
        prior_weight: float = 1.0,
        random_flip: bool = False,
        unmix: Unmix | None = None,
        unmix_weight: float = 0.0,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._family, self._noising, self._latents, self._captions = family, noising, latents, captions
        self._pools, self._prior_weight, self._random_flip = pools, prior_weight, random_flip
        self._unmix, self._unmix_weight, self._seed = unmix, unmix_weight, seed
        self._total = batch_size * processes
        self._places = range(process * batch_size, (process + 1) * batch_size)
        self._dtype = family.denoiser.dtype  # read once: diffusers looks through all modules for it

    def prepare(self) -> None:
        """Encode what can be encoded beforehand."""
        flips = (False, True) if self._random_flip else (False,)
        own = {number: size for number, size in zip(self._pools[0].numbers, self._pools[0].sizes, strict=True)}
        sizes = sorted(set(own.values()))
        pieces = [Piece(number, size, flip=flip) for number, size in own.items() for flip in flips]
        for pool in self._pools[1:]:  # of classes: cut to the size of the subjects' pictures in the batch
            pieces += [Piece(number, size, flip=flip) for number in pool.numbers for size in sizes for flip in flips]
        for pool in self._pools:
            for number, half in pool.cut_mix.pieces() if pool.cut_mix else ():
                pieces += [Piece(number, size, half) for size in sizes]
        self._latents.prepare(pieces)

    def draw(self, batch: int) -> Batch:
        """The batch of this number; all chance is here."""
        size = self._pools[0].size_of(batch)
        samples = [sample for pool in self._pools for sample in self._samples(pool, batch, size)]
        latents = torch.cat([sample.latents for sample in samples])
        question = self._noising.ask(latents, [sample.rng for sample in samples])
        return Batch(
            question.noisy.to(self._dtype),
            question.target,
            question.timesteps,
            question.weights,
            self._captions.numbers([sample.caption for sample in samples]),
            torch.cat([sample.sizes for sample in samples]),
            torch.tensor([sample.arrangement for sample in samples]).to(latents.device),
            torch.cat([sample.masks for sample in samples]),
        )

    def loss(
        self,
        noisy: Tensor,
        target: Tensor,
        timesteps: Tensor,
        weights: Tensor,
        captions: Tensor,
        sizes: Tensor,
        arrangements: Tensor,
        masks: Tensor,
    ) -> Tensor:
        """The loss of a `Batch`, whose parts are the arguments; the CPU does not wait for the device."""
        conditions = tuple(part.to(self._dtype) for part in self._captions.embed(captions))
        if self._unmix is not None:
            self._unmix.start()
        predicted = self._family.predict(noisy, timesteps, conditions, sizes)
        squares = F.mse_loss(predicted.float(), target, reduction="none") * masks
        losses = squares.flatten(1).mean(dim=1) * weights
        by_pool = losses.reshape(len(self._pools), -1).mean(dim=1)
        loss = by_pool[0] if len(by_pool) == 1 else by_pool[0] + self._prior_weight * by_pool[1]
        if self._unmix is not None:
            loss = loss + self._unmix_weight * self._unmix.loss(captions, arrangements, noisy.shape[-2:])
        return loss

    def release(self) -> None:
        """Give the denoiser back as it was."""
        if self._unmix is not None:
            self._unmix.release()

    def _samples(self, pool: Pool, batch: int, size: Size) -> Iterator[_Sample]:
        numbers = pool.pictures_of(batch, self._places, self._total)
        rngs = [generator(self._seed, pool.name, batch * self._total + place) for place in self._places]
        mixtures = [pool.cut_mix.draw(rng) if pool.cut_mix else None for rng in rngs]
        flips = [self._random_flip and bool(torch.rand((), generator=rng) < 0.5) for rng in rngs]
        resizings = [draw_resizing(rng) if pool.resized else UNCHANGED for rng in rngs]
        plain = [i for i, mixture in enumerate(mixtures) if mixture is None]
        pieces = [Piece(numbers[i], size, flip=flips[i], ratio=resizings[i].ratio) for i in plain]
        wholes = self._latents.draw(pieces, [rngs[i] for i in plain]) if plain else ()
        rows = zip(*(part.split(1) for part in wholes), strict=True)
        for number, mixture, resizing, rng in zip(numbers, mixtures, resizings, rngs, strict=True):
            if mixture is None:
                latents, sizes, masks = next(rows)
                yield _Sample(latents, sizes, masks, resizing.words + pool.captions[number], PLAIN, rng)
            else:
                latents, sizes, masks = self._mix(mixture, size, rng)
                yield _Sample(latents, sizes, masks, mixture.caption, mixture.arrangement, rng)

    def _mix(self, mixture: Mixture, size: Size, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Two halves are put together as latents: so each is encoded but once."""
        pieces = [Piece(number, size, half) for number, half in zip(mixture.pictures, mixture.halves, strict=True)]
        (one, _, mask), (other, _, other_mask) = (self._latents.draw([piece], [rng]) for piece in pieces)
        axis = mixture.halves[0].axis
        mixed = torch.cat([one, other], dim=axis)
        return mixed, torch.tensor([[*size, 0, 0, *size]], device=mixed.device), torch.cat([mask, other_mask], dim=axis)


class _Sample(NamedTuple):
    """Of a batch: what `Latents.draw` gives of one piece, and a source of chance that has been drawn from."""

    latents: Tensor
    sizes: Tensor
    masks: Tensor
    caption: str
    arrangement: int
    rng: torch.Generator
