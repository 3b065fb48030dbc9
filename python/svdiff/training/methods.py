"""What trains: spectral shifts, a LoRA, all weights, some of them, or none; and new words. The loop is the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import override

from svdiff_kernels import FactorCache, SVDiffError

from .. import custom_diffusion
from ..adapter import Adapter
from ..attach import attach, base_model_of
from ..attached import weight_of
from ..cache import build
from ..checkpoint import read_all
from ..pipelines import load_pipeline
from ..targets import select
from ..tokens import (
    LearnedTokens,
    add_token,
    initial_vectors,
    learned_tokens,
    read_tokens,
    save_tokens,
    token_files_of,
    vectors_of,
)
from .chance import seed_of
from .config import TrainConfig, resizes
from .data import Picture
from .families import Family, family_of
from .inversion_network import InversionNetwork, image_states, save_network
from .resizing import resized_captions

_SAME = 1e-6  # of the largest singular value, below which a direction of features is but rounding
_LORA_FILE = "pytorch_lora_weights.safetensors"
_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of a LoRA, as in diffusers' scripts


class Method:
    """What trains in a pipeline.

    Args:
        config: settings of the run.
        family: of the pipeline, on its device, in fp32.
        pictures: of the subjects.
    """

    def __init__(self, config: TrainConfig, family: Family, pictures: Sequence[Picture] = ()) -> None:
        self._config, self._family = config, family
        self._captions = sorted({picture.caption for picture in pictures})
        self.encoders = family.trainable_encoders() if config.train_text_encoder else {}
        self._prepare()
        self._tokens = self._add_tokens() if config.modifier_token else {}
        self._networks: dict[str, InversionNetwork] = {}
        self._starts: dict[str, Tensor] = {}  # what they make the words' embeddings of
        if config.image_encoder is not None:
            self._networks = self._invert(config.image_encoder, pictures)
        for tokens in () if self._networks else self._tokens.values():
            tokens.vectors.requires_grad_(True)

    def _prepare(self) -> None:
        """Freeze what does not train, and make what does."""
        raise NotImplementedError

    @property
    def readers(self) -> dict[str, Any]:
        """The text encoders, by name, whose answers change: something trains in them."""
        return self.encoders or {name: self._family.text_encoders[name] for name in self._tokens}

    @property
    def models(self) -> list[nn.Module]:
        """The models that something trains in."""
        return [self._family.denoiser, *self.readers.values()]

    def param_groups(self, lr: float, lr_1d: float, lr_encoders: float, lr_tokens: float) -> list[dict[str, Any]]:
        """What trains, as groups for an optimiser."""
        groups = self._weight_groups(lr, lr_1d, lr_encoders)
        tokens = {
            "params": self._token_parameters(),
            "lr": lr_tokens,
            "weight_decay": 0.0,
        }  # it would move unused words
        groups.append(tokens)
        return [group for group in groups if group["params"]]

    def _weight_groups(self, lr: float, lr_1d: float, lr_encoders: float) -> list[dict[str, Any]]:
        """Without the tokens."""
        tokens = {id(parameter) for parameter in self._token_parameters()}
        groups = []
        for model, rate in [(self._family.denoiser, lr), *((m, lr_encoders) for m in self.encoders.values())]:
            trained = [p for p in model.parameters() if p.requires_grad and id(p) not in tokens]
            groups.append({"params": trained, "lr": rate})
        return groups

    def _token_parameters(self) -> list[nn.Parameter]:
        """Of new words: their embeddings, or the networks that give them."""
        return [p for tokens in self._tokens.values() for p in tokens.parameters() if p.requires_grad]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by a name that lasts."""
        parts = {"denoiser": self._family.denoiser, **self.readers}
        return {
            f"{role}.{name}": parameter
            for role, model in parts.items()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def penalty(self) -> Tensor | float:
        """To be added to the loss."""
        return 0.0

    def after_step(self) -> None:
        """Put what trains back to where it may be."""

    def cast(self, dtype: torch.dtype) -> None:
        """Have what is frozen in a narrower type."""
        trained = {name: p.data for name, p in self.parameters().items()}
        for model in (self._family.denoiser, *self._family.text_encoders.values()):
            model.to(dtype)
        for name, parameter in self.parameters().items():
            parameter.data = trained[name]

    def save(self, directory: Path, **told: Any) -> list[Path]:
        """Write what has been learnt, in the form that others read; returns the files."""
        files = self._save_weights(directory, **told)
        if self._networks:
            (token,) = self._config.modifier_token or []
            how = {"token": token, "image_encoder": str(self._config.image_encoder)}
            files.append(save_network(directory, self._networks, self._starts, **how))
        tokens = vectors_of(self._family.pipeline)  # those of an earlier run too
        return [*files, *save_tokens(directory, tokens)] if tokens else files

    def _save_weights(self, directory: Path, **told: Any) -> list[Path]:
        """Without the tokens."""
        raise NotImplementedError

    def _add_tokens(self) -> dict[str, LearnedTokens]:
        """New words, by text encoder; CLIP's alone learn them."""
        family, count = self._family, self._config.num_vectors
        readers = family.trainable_encoders()
        for name in readers.keys() - self.encoders.keys():
            readers[name].requires_grad_(False)
        for token, word in zip(self._config.modifier_token or [], self._config.initializer_token or [], strict=True):
            add_token(family.pipeline, token, initial_vectors(family.pipeline, word, count, list(readers)))
        return {name: learned for name, encoder in readers.items() if (learned := learned_tokens(encoder))}

    def _invert(self, image_encoder: str, pictures: Sequence[Picture]) -> dict[str, InversionNetwork]:
        """A network for each text encoder; all look at all pictures that the word is said of.

        Not each sample at its own picture: the embedding would be told of what is particular to that, and of which
        embedding would be saved none would have been trained.
        """
        config = self._config
        (token,) = config.modifier_token or []
        device = next(iter(self._tokens.values())).vectors.device
        states = image_states(image_encoder, [picture for picture in pictures if token in picture.caption], device)
        networks = {}
        for name, tokens in self._tokens.items():
            self._starts[name] = tokens.vectors.detach().clone()
            torch.manual_seed(seed_of(config.seed, "inversion network", name))
            how: dict[str, Any] = {"layers": config.inversion_layers, "dropout": config.inversion_dropout}
            networks[name] = InversionNetwork(tokens.vectors.shape[1], states.shape[1], **how).to(device)
            tokens.invert_by(networks[name], states)
        return networks

    def start_from(self, directory: Path) -> None:
        """Begin with what an earlier run has saved, as concepts learnt one after the other do; before `cast`.

        Its new words are known from then on. One that is not learnt here too stays as it is, and is saved again.

        Raises:
            SVDiffError: it is not of this method, or of another base, of other targets or of another rank. Nothing is
                changed.
        """
        earlier = read_tokens(directory)
        self._load_weights(directory)
        known = vectors_of(self._family.pipeline)
        for token, vectors in earlier.items():
            if token not in known:
                add_token(self._family.pipeline, token, vectors)
                continue
            for name, learned in self._tokens.items():
                own = learned.vectors.data[learned.spans[token]]
                if name not in vectors or own.shape != vectors[name].shape:
                    raise SVDiffError(f"init_from {directory}: {token} has other vectors there: see num_vectors")
                own.copy_(vectors[name])

    def _load_weights(self, directory: Path) -> None:
        """Without the tokens."""
        raise SVDiffError(f"init_from: method {self._config.method} cannot begin with what an earlier run has learnt")


class SpectralShifts(Method):
    """SVDiff: shifts of singular values."""

    @override
    def _prepare(self) -> None:
        config, family = self._config, self._family
        store = FactorCache(config.svd_cache_dir)
        if config.shard_factors:  # so that layers can wait for their factors: no process may have room for all
            layers = select(family.denoiser, config.targets, one_dim=False)
            build(store, {path: weight_of(layer).detach() for path, layer in layers.items()}, config.rank)
        self.adapter: Adapter = attach(
            family.pipeline,
            targets=config.targets,
            rank=config.rank,
            form=config.form,
            one_dim=config.one_dim,
            cache=store,
            text_encoder=tuple(self.encoders),
            lazy=config.shard_factors,
        )
        self._matrices = [part.bank.trained[0] for part in self.adapter.parts]

    @override
    def _weight_groups(self, lr: float, lr_1d: float, lr_encoders: float) -> list[dict[str, Any]]:
        return self.adapter.param_groups(lr, lr_1d, lr_text_encoder=lr_encoders)

    @override
    def penalty(self) -> Tensor | float:
        if not self._config.shift_penalty:
            return 0.0
        return self._config.shift_penalty * sum(shifts.square().sum() for shifts in self._matrices)

    @override
    def _save_weights(self, directory: Path, **told: Any) -> list[Path]:
        return self.adapter.save_weights(directory, None, **told)

    @override
    def _load_weights(self, directory: Path) -> None:
        try:
            earlier = read_all(directory)
            if lacking := sorted(earlier.keys() - {part.role for part in self.adapter.parts}):
                raise SVDiffError(f"it has shifts of the {lacking[0]}: train that too, with train_text_encoder")
            self.adapter.load_weights(directory)
        except SVDiffError as error:
            raise SVDiffError(f"init_from {directory}: {error}") from error


class Lora(Method):
    """A LoRA by PEFT, for comparison."""

    @override
    def _prepare(self) -> None:
        from peft import LoraConfig

        config, family = self._config, self._family
        for model in (family.denoiser, *family.text_encoders.values()):
            model.requires_grad_(False)
        paths = map(re.escape, select(family.denoiser, config.targets, one_dim=False))
        torch.manual_seed(seed_of(config.seed, "lora"))
        how = {"r": config.lora_rank, "lora_alpha": config.lora_rank, "init_lora_weights": "gaussian"}
        family.denoiser.add_adapter(LoraConfig(target_modules="|".join(paths), **how))  # a list would match path ends
        for encoder in self.encoders.values():
            encoder.add_adapter(LoraConfig(target_modules=_ENCODER_TARGETS, **how))

    @override
    def _save_weights(self, directory: Path, **told: Any) -> list[Path]:
        from peft.utils import get_peft_model_state_dict

        layers = {f"{role}_lora_layers": get_peft_model_state_dict(model) for role, model in self._by_role().items()}
        self._family.pipeline.save_lora_weights(directory, **layers)
        return [directory / _LORA_FILE]

    @override
    def _load_weights(self, directory: Path) -> None:
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

        file = directory / _LORA_FILE
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise SVDiffError(f"init_from {directory}: cannot read {_LORA_FILE}: {error}") from error
        own = {
            f"{role}.{key}": tensor
            for role, model in self._by_role().items()
            for key, tensor in get_peft_model_state_dict(model).items()
        }
        if differing := sorted(found.keys() ^ own.keys()):
            raise SVDiffError(
                f"init_from {file}: {differing[0]} is {'not trained here' if differing[0] in found else 'not there'}: "
                "it is of other targets, another base, or other text encoders"
            )
        for key, tensor in own.items():
            if found[key].shape != tensor.shape:
                raise SVDiffError(
                    f"init_from {file}: {key} has shape {list(found[key].shape)}, not {list(tensor.shape)}: "
                    "it is of another lora_rank or another base"
                )
        for role, model in self._by_role().items():
            begin = f"{role}."
            set_peft_model_state_dict(
                model, {k.removeprefix(begin): v for k, v in found.items() if k.startswith(begin)}
            )

    def _by_role(self) -> dict[str, Any]:
        role = "unet" if hasattr(self._family.pipeline, "unet") else "transformer"
        return {role: self._family.denoiser, **self.encoders}


class AllWeights(Method):
    """Full fine-tuning, for comparison."""

    @override
    def _prepare(self) -> None:
        for model in self._family.text_encoders.values():
            model.requires_grad_(False)
        for model in (self._family.denoiser, *self.encoders.values()):
            model.requires_grad_(True)

    @override
    def cast(self, dtype: torch.dtype) -> None:
        """Nothing: autocast computes in that type, and what does not train is saved as it was."""

    @override
    def _save_weights(self, directory: Path, **told: Any) -> list[Path]:
        self._family.pipeline.save_pretrained(directory / "pipeline")
        return sorted(path for path in (directory / "pipeline").rglob("*.safetensors"))

    @override
    def _load_weights(self, directory: Path) -> None:
        folder = directory / "pipeline"
        if not folder.is_dir():
            raise SVDiffError(f"init_from: there is no folder {folder}, which a run of method full leaves")
        earlier = family_of(load_pipeline(str(folder)))
        own = self._all_models(self._family)
        for role, other in self._all_models(earlier).items():
            shapes = [
                {name: t.shape for name, t in model.state_dict().items()} for model in (own.get(role), other) if model
            ]
            if len(shapes) < 2 or shapes[0] != shapes[1]:
                raise SVDiffError(f"init_from {folder}: its {role} is of another base")
        for role, other in self._all_models(earlier).items():
            own[role].load_state_dict(other.state_dict())

    @staticmethod
    def _all_models(family: Family) -> dict[str, Any]:
        return {"denoiser": family.denoiser, **family.text_encoders}


class CustomDiffusion(Method):
    """Custom Diffusion (arXiv 2212.04488): keys and values of cross-attention, as weights of their own.

    With ``keep_prefix`` their change is kept orthogonal to the features of the words that stand before a new one, the
    start of text first of all. The encoder does not look ahead, so that these are the same in prompts without the new
    word: a change there is one of all prompts, on which training leans, and of which two concepts have two.
    """

    @override
    def _prepare(self) -> None:
        family = self._family
        for model in (family.denoiser, *family.text_encoders.values()):
            model.requires_grad_(False)
        self._layers = select(family.denoiser, "cross_attn_kv", one_dim=False)
        weights = {path: weight_of(layer) for path, layer in self._layers.items()}
        self._hashes = custom_diffusion.hashes_of(weights)
        self._kept = self._prefix_directions() if self._config.keep_prefix else None
        self._start: dict[str, Tensor] = {}
        self._note_start()
        for layer in self._layers.values():
            weight_of(layer).requires_grad_(True)

    def _note_start(self) -> None:
        if self._kept is not None:
            self._start = {path: weight_of(layer).detach().clone() for path, layer in self._layers.items()}

    @torch.no_grad()
    def _prefix_directions(self) -> Tensor:
        """``[k, d]``, orthonormal: what the features of words before a new one span."""
        family, found = self._family, []
        captions = self._captions
        if resizes(self._config):
            captions = [one for caption in captions for one in (caption, *resized_captions(caption))]
        tokens = self._config.modifier_token or []
        prefixes = {
            min((c.partition(token)[0] for token in tokens if token in c), key=len, default="") for c in captions
        }
        for prefix in sorted(prefixes):
            ids = {name: family.tokens(name, [prefix]) for name in family.text_encoders}
            encoded = {name: family.encode(name, own.to(family.pipeline.device)) for name, own in ids.items()}
            ends = ids["text_encoder"][0] == family.pipeline.tokenizer.eos_token_id
            found.append(family.conditions(encoded)[0][0, : int(ends.int().argmax())])
        _, sizes, directions = torch.linalg.svd(torch.cat(found).double(), full_matrices=False)
        return directions[sizes > _SAME * sizes[0]].float()

    @override
    @torch.no_grad()
    def after_step(self) -> None:
        if self._kept is not None:
            for path, layer in self._layers.items():
                weight = weight_of(layer)
                weight.sub_(((weight - self._start[path]) @ self._kept.T) @ self._kept)

    @override
    def _save_weights(self, directory: Path, **told: Any) -> list[Path]:
        weights = {path: weight_of(layer).detach() for path, layer in self._layers.items()}
        said = {**told, "base_model": base_model_of(self._family.pipeline)}
        if tokens := list(vectors_of(self._family.pipeline)):
            said["modifier_tokens"] = tokens
        return [custom_diffusion.write(directory, weights, said, hashes=self._hashes)]

    @override
    def _load_weights(self, directory: Path) -> None:
        try:
            custom_diffusion.load(self._family.pipeline, directory)
        except SVDiffError as error:
            raise SVDiffError(f"init_from {directory}: {error}") from error
        self._note_start()


class TextualInversion(Method):
    """Textual inversion (arXiv 2208.01618): nothing but new words."""

    @override
    def _prepare(self) -> None:
        for model in (self._family.denoiser, *self._family.text_encoders.values()):
            model.requires_grad_(False)

    @override
    def _save_weights(self, directory: Path, **told: Any) -> list[Path]:
        return []

    @override
    def _load_weights(self, directory: Path) -> None:
        if not token_files_of(directory):
            raise SVDiffError(f"init_from {directory}: there are no learned tokens")


METHODS: Mapping[str, type[Method]] = {
    "svdiff": SpectralShifts,
    "lora": Lora,
    "full": AllWeights,
    "custom_diffusion": CustomDiffusion,
    "textual_inversion": TextualInversion,
}
