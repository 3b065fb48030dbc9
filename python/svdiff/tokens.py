"""Learned tokens: new words whose embeddings were trained, by textual inversion (arXiv 2208.01618) or beside weights.

They are not rows of the text encoder's table, whose decomposition and content hash must not change: a hook on the
module that holds the table puts them where their ids are. So they live with spectral shifts, in any order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svdiff_kernels import SVDiffError

from .outputs import writing
from .pipelines import text_encoders_of
from .sampling import slug

FILE_NAME = "learned_embeds.safetensors"
"""As diffusers' ``load_textual_inversion`` looks for it."""

_ATTRIBUTE = "learned_tokens"
_OF_SEVERAL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # keys of a file for a pipeline with two CLIPs

Vectors = Mapping[str, Tensor]
"""What a token stands for in each text encoder: ``[vectors, dim]`` by the encoder's name."""


class LearnedTokens(nn.Module):
    """The embeddings of the new words of one text encoder.

    Attributes:
        vectors: ``[n, dim]``, of all new words one after the other; in the encoder's dtype, or in fp32 to be trained.
        spans: by token, which of them are its own.
        network: gives what the words stand for, in place of `vectors`, while it trains; see `invert_by`.

    Args:
        encoder: of transformers, with a table of input embeddings. It gets these as a submodule.
        first: id of the first new word; all ids below are the table's.

    Raises:
        SVDiffError: it has no such table.
    """

    def __init__(self, encoder: nn.Module, first: int) -> None:
        super().__init__()
        holder, self._table = _holder_of(encoder)
        table = getattr(holder, self._table).weight
        width = _width(encoder)
        self.vectors = nn.Parameter(table.new_empty(0, width), requires_grad=False)
        self.spans: dict[str, slice] = {}
        self.network: nn.Module | None = None
        self._given: tuple[Tensor, ...] = ()  # to the network; no buffers, which a narrower dtype would round
        self._first = first
        holder.register_forward_pre_hook(self._embed, with_kwargs=True)
        holder.add_module(_ATTRIBUTE, self)

    def add(self, token: str, vectors: Tensor) -> None:
        """Another word, ``[n, dim]``; what an optimiser holds of `vectors` is no longer of use."""
        start = len(self.vectors)
        self.spans[token] = slice(start, start + len(vectors))
        grown = torch.cat([self.now().detach().to(self.vectors), vectors.to(self.vectors)])
        self.vectors = nn.Parameter(grown, requires_grad=self.vectors.requires_grad)
        self.network = None

    def invert_by(self, network: nn.Module, *given: Tensor) -> None:
        """From now on the words stand for what a network makes of their vectors and of `given`."""
        self.network, self._given = network, (self.vectors.detach().clone(), *given)

    def now(self) -> Tensor:
        """``[n, dim]``: what the words stand for."""
        return self.vectors if self.network is None else self.network(*self._given)

    def _embed(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the holder looks ids up: it is given embeddings instead."""
        named = dict(zip(("input_ids", "position_ids", "inputs_embeds"), args, strict=False)) | kwargs
        ids = named.pop("input_ids", None)
        if ids is None:
            return None
        embeds = getattr(holder, self._table)(ids.clamp(max=self._first - 1))
        own = F.embedding((ids - self._first).clamp(min=0, max=len(self.vectors) - 1), self.now())
        named["inputs_embeds"] = torch.where((ids >= self._first)[..., None], own.to(embeds.dtype), embeds)
        return (), named


def add_token(pipeline: Any, token: str, vectors: Vectors) -> None:
    """Teach a pipeline's tokenizers and text encoders a new word; prompts may hold it from now on.

    A word of several vectors is as many tokens, ``<toy>``, ``<toy>_1``, ...; a prompt names the first, and pipelines of
    diffusers that know textual inversion write the others behind it.

    Args:
        pipeline: of diffusers, with shifts or without.
        token: the word, such as ``<new1>``.
        vectors: see `Vectors`.

    Raises:
        SVDiffError: the tokenizer knows the word already, the pipeline lacks a text encoder, or its width is another.
    """
    encoders = text_encoders_of(pipeline)
    for name, own in vectors.items():
        if name not in encoders:
            raise SVDiffError(f"{token} is for a {name}, which a {type(pipeline).__name__} does not have")
        width = _width(encoders[name])
        if own.ndim != 2 or not len(own) or own.shape[1] != width:
            raise SVDiffError(f"{token} has vectors {list(own.shape)}, but the {name}'s are {width} wide: another base")
        if len(own) > 1 and not hasattr(pipeline, "maybe_convert_prompt"):
            raise SVDiffError(f"{token} has {len(own)} vectors: prompts of a {type(pipeline).__name__} take one a word")
    names = _parts(token, max(map(len, vectors.values())))
    for name in vectors:
        tokenizer = tokenizer_of(pipeline, name)
        if known := [part for part in names if part in tokenizer.get_vocab()]:
            raise SVDiffError(f"{known[0]} is a word of the tokenizer already: choose another, such as <new1>")
    for name, own in vectors.items():
        tokenizer, encoder = tokenizer_of(pipeline, name), encoders[name]
        learned = learned_tokens(encoder) or LearnedTokens(encoder, len(tokenizer))
        _see_the_end(encoder, tokenizer)
        tokenizer.add_tokens(names)
        learned.add(token, own)


def initial_vectors(pipeline: Any, word: str, count: int, encoders: Sequence[str]) -> dict[str, Tensor]:
    """What a new token may begin with: the embeddings of a known word, in each of some text encoders.

    Args:
        pipeline: of diffusers.
        word: such as "dog"; of several tokens if there are as many vectors.
        count: vectors ``[count, dim]`` in each.
        encoders: names of text encoders.

    Raises:
        SVDiffError: the tokenizer cuts the word into another number of tokens.
    """
    found = {}
    for name in encoders:
        ids = tokenizer_of(pipeline, name)(word, add_special_tokens=False).input_ids
        if len(ids) not in (1, count) or not ids:
            raise SVDiffError(
                f"initializer_token {word!r} is {len(ids)} tokens for {count} vectors: choose a word of one"
            )
        holder, table = _holder_of(text_encoders_of(pipeline)[name])
        known = getattr(holder, table)
        with torch.no_grad():
            rows = known(torch.tensor(ids, device=known.weight.device)).float()
        if len(ids) < count:  # the same vector many times would get the same gradient many times, but for its place
            rng = torch.Generator().manual_seed(0)
            spread = rows.std() * 0.1 * torch.randn(count, rows.shape[1], generator=rng)
            rows = rows + spread.to(rows.device)
        found[name] = rows
    return found


def learned_tokens(encoder: nn.Module) -> LearnedTokens | None:
    """Those of a text encoder, if it has any."""
    return next((module for module in encoder.modules() if isinstance(module, LearnedTokens)), None)


def vectors_of(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """What each learned token of a pipeline stands for, see `Vectors`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, encoder in text_encoders_of(pipeline).items():
        learned = learned_tokens(encoder)
        if learned is not None:
            training = learned.training
            with torch.no_grad():
                vectors = learned.eval().now().float().cpu()  # without the dropout of a network in training
            learned.train(training)
            for token, span in learned.spans.items():
                found.setdefault(token, {})[name] = vectors[span].clone()
    return found


def save_tokens(directory: str | os.PathLike[str], tokens: Mapping[str, Vectors]) -> list[Path]:
    """Write learned tokens, one file each, as diffusers' ``load_textual_inversion`` reads them; returns the files.

    One token is in ``learned_embeds.safetensors``, of several each has its name behind that. A file for one text
    encoder has the token for a key, one for two has ``clip_l`` and ``clip_g``.

    Raises:
        SVDiffError: the folder cannot be written.
    """
    directory = Path(directory)
    files = []
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for token, vectors in tokens.items():
            name = FILE_NAME if len(tokens) == 1 else FILE_NAME.replace(".", f"_{slug(token)}.")
            keys = dict.fromkeys(vectors, token) if len(vectors) == 1 else _OF_SEVERAL
            partial = directory / f".{name}.{os.getpid()}.partial"
            tensors = {keys[encoder]: own.contiguous() for encoder, own in vectors.items()}
            save_file(tensors, partial, {"token": token, "format": "pt"})
            partial.replace(directory / name)
            files.append(directory / name)
    return files


def read_tokens(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Learned tokens of a file, or of all such files in a folder (none is not an error), see `Vectors`.

    Raises:
        SVDiffError: there is no such file, or it is no safetensors file of embeddings.
    """
    given = Path(path).expanduser()
    files = token_files_of(given) if given.is_dir() else [given]
    found: dict[str, dict[str, Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (no mapping)
                token = (handle.metadata() or {}).get("token")
        except FileNotFoundError as error:
            raise SVDiffError(f"there is no file {file}") from error
        except (SafetensorError, OSError) as error:
            raise SVDiffError(f"{file} is not a readable safetensors file: {error}") from error
        if tensors.keys() <= set(_OF_SEVERAL.values()) and token:
            found[token] = {name: tensors[key] for name, key in _OF_SEVERAL.items() if key in tensors}
        else:
            found |= {key: {"text_encoder": tensor} for key, tensor in tensors.items()}
    for token, vectors in found.items():
        for name, own in vectors.items():
            own = own[None] if own.ndim == 1 else own
            if own.ndim != 2 or not own.is_floating_point() or not own.isfinite().all():
                raise SVDiffError(f"{path}: {token} is no embedding {list(own.shape)} of finite numbers")
            vectors[name] = own
    return found


def token_files_of(folder: Path) -> list[Path]:
    """The files with learned tokens in a folder, by name."""
    return sorted(folder.glob(FILE_NAME.replace(".", "*.")))


def load_tokens(pipeline: Any, path: str | os.PathLike[str]) -> list[str]:
    """Teach a pipeline the learned tokens of a file or folder, with shifts in it or without; returns their names.

    Raises:
        SVDiffError: see `read_tokens` and `add_token`.

    Example:
        >>> import svdiff, torch
        >>> from svdiff.miniature import load_pipeline
        >>> files = svdiff.save_tokens("my-toy", {"<toy>": {"text_encoder": torch.randn(1, 96)}})
        >>> pipeline = load_pipeline()
        >>> svdiff.load_tokens(pipeline, "my-toy")
        ['<toy>']
        >>> pipeline("a <toy> on the left", num_inference_steps=2).images[0].size
        (64, 64)
    """
    tokens = read_tokens(path)
    for token, vectors in tokens.items():
        add_token(pipeline, token, vectors)
    return list(tokens)


def tokenizer_of(pipeline: Any, encoder: str) -> Any:
    """The tokenizer that goes with a text encoder, by the encoder's name."""
    return getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))


def _parts(token: str, count: int) -> list[str]:
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def _width(encoder: Any) -> int:
    return int(encoder.config.hidden_size)


def _holder_of(encoder: Any) -> tuple[nn.Module, str]:
    """The module that holds the table of input embeddings, and what it calls it."""
    table = encoder.get_input_embeddings()
    for module in encoder.modules():
        for name, child in module.named_children():
            if child is table:
                return module, name
    raise SVDiffError(f"{type(encoder).__name__} has no table of input embeddings")


def _see_the_end(encoder: nn.Module, tokenizer: Any) -> None:
    """Old CLIPs take the largest id for the end of the text, which it is until there are new words."""
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id
