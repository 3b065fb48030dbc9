"""Cut-mix and unmix: what is put together, what is said of it, and which attention is punished."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from svdiff import TrainConfig, train
from svdiff.training.concepts import Concept
from svdiff.training.cutmix import COLUMNS, PLAIN, PROMPTS, ROWS, CutMix
from svdiff.training.data import Half, Loaded
from svdiff.training.dreambooth import DreamBooth, Pool
from svdiff.training.families import family_of
from svdiff.training.noising import Diffusion
from svdiff.training.sources import Captions, Latents, Piece
from svdiff.training.unmix import Unmix
from tiny import output, tiny_unet, unet_inputs
from torch import Tensor

from svdiff_kernels import SVDiffError

DOG = Concept("dogs", "a photo of a sks dog", ("a photo of a dog",))
SIZE = (16, 16)


NAMES = [{0: "a sks dog", 1: "a sks dog"}, {2: "a zwx cat"}, dict.fromkeys((3, 4, 5), "a qrl mouse")]


def mixes(prompts: list[str] | None = None) -> CutMix:
    return CutMix(NAMES, prompts, probability=0.6)


def drawn(cut_mix: CutMix, count: int = 600) -> list[Any]:
    return [cut_mix.draw(torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_six_of_ten_samples_are_mixtures_of_any_two_subjects() -> None:
    found = drawn(mixes())
    mixtures = [mixture for mixture in found if mixture is not None]
    assert 0.55 < len(mixtures) / len(found) < 0.65
    subject = {0: "sks dog", 1: "sks dog", 2: "zwx cat", 3: "qrl mouse", 4: "qrl mouse", 5: "qrl mouse"}
    for mixture in mixtures:
        first, second = (subject[number] for number in mixture.pictures)
        assert first != second
        places = ("on the left", "on the right") if mixture.arrangement == COLUMNS else ("at the top", "at the bottom")
        assert f"a {first} {places[0]}" in mixture.caption and f"a {second} {places[1]}" in mixture.caption
    pairs = Counter(tuple(subject[number] for number in mixture.pictures) for mixture in mixtures)
    assert len(pairs) == 6 and min(pairs.values()) > 30
    assert {number for mixture in mixtures for number in mixture.pictures} == set(range(6))
    assert {mixture.arrangement for mixture in mixtures} == {COLUMNS, ROWS}
    assert {mixture.caption for mixture in mixtures} == set(mixes().captions())
    assert len(mixes().captions()) == 6 * len(PROMPTS)


def test_a_picture_may_have_a_name_of_its_own() -> None:
    names = [{0: "a small sks dog", 1: "a large sks dog"}, {0: "a zwx cat", 2: "a zwx cat"}]
    found = CutMix(names, ["{second} right, {first} left"], probability=1.0)
    expected = {(f"a {size} sks dog", "a zwx cat") for size in ("small", "large")}
    assert found.captions() == {
        f"{names[1 - turn]} right, {names[turn]} left": (turn, 1 - turn) for names in expected for turn in (0, 1)
    }
    mixtures = drawn(found, 100)
    assert {mixture.caption for mixture in mixtures} == set(found.captions())
    for mixture in mixtures:
        right, left = mixture.caption.removesuffix(" left").split(" right, ")
        first, second = found.captions()[mixture.caption]
        assert (names[first][mixture.pictures[0]], names[second][mixture.pictures[1]]) == (left, right)
        assert mixture.arrangement == COLUMNS


def test_every_half_that_may_be_needed_is_known_beforehand() -> None:
    columns, rows = [Half(-1, 0), Half(-1, 1)], [Half(-2, 0), Half(-2, 1)]
    assert mixes().pieces() == [(picture, half) for picture in range(6) for half in columns + rows]
    assert mixes(prompts=["{first} left {second}"]).pieces() == list(itertools.product(range(6), columns))


def test_names_that_cannot_be_told() -> None:
    with pytest.raises(SVDiffError, match="left and right, or top and bottom"):
        mixes(prompts=["{first} near {second}"])
    assert DOG.own_token() == "sks"
    assert Concept("x", "sks", ("dog",)).own_token() == "sks"
    with pytest.raises(SVDiffError, match="no token of its own"):
        Concept("x", "a dog", ("a dog",)).own_token()
    with pytest.raises(SVDiffError, match="no token of its own"):
        Concept("x", "a sks dog", ("a dog",), token="zwx").own_token()
    with pytest.raises(SVDiffError, match="need an instance_prompt"):
        Concept("x", None, ("a dog",)).names()


def pictures(count: int) -> list[Loaded]:
    rng = np.random.default_rng(0)
    return [Loaded(Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)), SIZE, SIZE) for _ in range(count)]


@pytest.mark.parametrize("arrangement", [COLUMNS, ROWS])
def test_a_mixture_is_two_halves(pipeline: Any, arrangement: int) -> None:
    prompt = PROMPTS[0] if arrangement == COLUMNS else PROMPTS[2]
    loaded = pictures(2)
    cut_mix = CutMix([{0: "a sks dog"}, {1: "a zwx cat"}], [prompt], probability=1.0)
    pool = Pool("instance", [0, 1], loaded, ["a dog", "a cat"], cut_mix, 0)
    family = family_of(pipeline)
    latents = Latents(pipeline.vae, loaded, center_crop=True, cache=True)
    captions = Captions(family, sorted(cut_mix.captions()))
    objective = DreamBooth(family, Diffusion(pipeline.scheduler), latents, captions, [pool], batch_size=3)
    objective.prepare()
    batch = objective.draw(0)
    assert batch.noisy.shape == (3, 4, 8, 8)
    assert batch.arrangements.tolist() == [arrangement] * 3
    assert batch.sizes.tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    axis = -1 if arrangement == COLUMNS else -2
    places = Half(axis, 0), Half(axis, 1)
    means = {
        (number, half): half.of(latents._known[Piece(number, SIZE, half)].mean) for number in (0, 1) for half in places
    }
    assert latents._known.keys() == {*(Piece(n, SIZE) for n in (0, 1)), *(Piece(n, SIZE, half) for n, half in means)}
    for sample in objective._samples(pool, 0, SIZE):
        order = (0, 1) if sample.caption.index("dog") < sample.caption.index("cat") else (1, 0)
        wanted, other = (
            torch.cat([means[pair] for pair in zip(numbers, places, strict=True)], dim=axis)
            for numbers in (order, order[::-1])
        )
        assert (sample.latents - wanted).abs().mean() < (sample.latents - other).abs().mean()


def spots() -> Tensor:
    """Of three captions of five tokens: plain; first at 1, second at 3; first at 2 and 3, second at 4."""
    found = torch.zeros(3, 2, 5)
    found[1, 0, 1] = found[1, 1, 3] = found[2, 0, 2] = found[2, 0, 3] = found[2, 1, 4] = 1
    return found


def probabilities(unet: Any, inputs: Any) -> dict[str, Tensor]:
    """Attention of every cross-attention layer, by a way of its own: ``[B, heads, T, 5]``."""
    found: dict[str, Tensor] = {}

    def watch(module: Any, args: Any, kwargs: Any, name: str) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        q, k = (
            part.unflatten(-1, (module.heads, -1)).transpose(1, 2)
            for part in (module.to_q(hidden), module.to_k(kwargs["encoder_hidden_states"]))
        )
        found[name] = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)

    hooks = [
        module.register_forward_pre_hook(lambda m, a, k, name=name: watch(m, a, k, name), with_kwargs=True)
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    ]
    unet(*inputs)
    for hook in hooks:
        hook.remove()
    return found


DEEP = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
SHALLOW = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (16, 8)], ids=["square", "wide", "high"])
@pytest.mark.parametrize(
    ("changes", "looked_at"),
    [({}, 1), (DEEP, 2 + 1 + 4), (SHALLOW, 3)],
    ids=["one layer", "several levels", "full resolution only"],
)
def test_the_unmix_loss_is_attention_to_a_subject_from_the_others_half(
    changes: dict[str, Any], looked_at: int, size: tuple[int, int]
) -> None:
    unet = tiny_unet(**changes)
    _, t, context = unet_inputs()
    inputs = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1)), t, context
    unmix = Unmix(unet, spots())
    unet(*inputs)  # as for a validation picture
    unmix.start()
    unet(*inputs)
    found = unmix.loss(torch.tensor([1, 2]), torch.tensor([COLUMNS, ROWS]), size)
    unmix.release()

    outer = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.") if len(unet.up_blocks) > 1 else ()
    seen_by = [seen for name, seen in probabilities(unet, inputs).items() if not name.startswith(outer)]
    assert len(seen_by) == looked_at
    losses = []
    for seen in seen_by:
        height = next(h for h in (16, 8, 4, 2) if h * (h * size[1] // size[0]) == seen.shape[2])
        width = seen.shape[2] // height
        place = torch.arange(height * width)
        right, below = place % width >= width / 2, place // width >= height / 2
        left_token, right_token = seen[0, :, :, 1], seen[0, :, :, 3]
        top_token, bottom_token = seen[1, :, :, 2] + seen[1, :, :, 3], seen[1, :, :, 4]
        for first, second, there in ((left_token, right_token, right), (top_token, bottom_token, below)):
            square = torch.cat([first[:, there].square(), second[:, ~there].square()], dim=1)
            losses.append(square.sum(dim=1).mean() / (height * width))
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_a_denoiser_without_cross_attention_has_nothing_to_unmix() -> None:
    plain = tiny_unet(
        down_block_types=("DownBlock2D",) * 2, mid_block_type="UNetMidBlock2D", up_block_types=("UpBlock2D",) * 2
    )
    with pytest.raises(SVDiffError, match="has no cross-attention to look at"):
        Unmix(plain, spots())


def test_plain_pictures_add_nothing_and_mixtures_can_be_learnt_from() -> None:
    unet = tiny_unet()
    x, t, context = unet_inputs()
    unmix = Unmix(unet, spots())

    def loss(*arrangements: int) -> Tensor:
        unmix.start()
        unet(x, t, context)
        return unmix.loss(torch.tensor([1, 2]), torch.tensor(arrangements), (8, 8))

    assert loss(PLAIN, PLAIN) == 0
    torch.testing.assert_close(loss(COLUMNS, PLAIN) + loss(PLAIN, ROWS), loss(COLUMNS, ROWS))
    assert not unmix._maps  # or they, and their graph, would stay until the next step
    before = loss(COLUMNS, ROWS)
    optimizer = torch.optim.SGD(unet.parameters(), lr=10.0)
    for _ in range(5):
        optimizer.zero_grad()
        loss(COLUMNS, ROWS).backward()
        optimizer.step()
    assert loss(COLUMNS, ROWS) < 0.9 * before


def test_recording_changes_nothing_else() -> None:
    unet = tiny_unet()
    before, processors = output(unet), dict(unet.attn_processors)
    unmix = Unmix(unet, spots())
    changed = {name for name, one in unet.attn_processors.items() if one is not processors[name]}
    assert changed and all(
        "attn2" in name and not name.startswith(("down_blocks.0", "up_blocks.1")) for name in changed
    )
    torch.testing.assert_close(output(unet), before)
    unmix.release()
    assert torch.equal(output(unet), before)
    assert all(one is processors[name] for name, one in unet.attn_processors.items())
    assert not any("get_attention_scores" in vars(module) for module in unet.modules())


@pytest.fixture
def config(base: Path, pictures: Path, tmp_path: Path) -> TrainConfig:
    concepts = [
        {"instance_data_dir": str(pictures), "instance_prompt": f"a {token} {noun}", "class_prompt": f"a {noun}"}
        for token, noun in (("b", "dog"), ("x", "cat"))
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    return TrainConfig(
        str(base),
        concepts_list=str(tmp_path / "concepts.json"),
        output_dir=str(tmp_path / "run"),
        max_train_steps=3,
        train_batch_size=2,
        cut_mix_probability=1.0,
        cut_mix_prompts=["{first} left {second}"],
        report_to="none",
    )


@pytest.mark.parametrize("prior", [False, True], ids=["", "prior"])
def test_training_with_mixtures(config: TrainConfig, tmp_path: Path, prior: bool) -> None:
    config = replace(config, with_prior_preservation=prior, num_class_images=2, prior_generation_num_inference_steps=1)
    plain = train(replace(config, cut_mix_probability=0.0, output_dir=str(tmp_path / "plain")))
    mixed = train(replace(config, output_dir=str(tmp_path / "mixed")))
    unmixed = train(replace(config, unmix_loss_weight=1.0, output_dir=str(tmp_path / "unmixed")))
    assert plain.losses != mixed.losses
    assert all(more > less for more, less in zip(unmixed.losses[:1], mixed.losses[:1], strict=True))
    assert unmixed.losses[1:] != mixed.losses[1:]


def test_only_class_pictures_that_name_the_class_are_mixed(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other is a prior picture by itself: of it a mixture's caption would not be true."""
    concepts = json.loads((tmp_path / "concepts.json").read_text())
    shown = {"dog": ["a dog", "a Dog's nose", "a tree"], "cat": ["a tree", "a house"]}
    for concept, (noun, captions) in zip(concepts, shown.items(), strict=True):
        (folder := tmp_path / noun).mkdir()
        for i, caption in enumerate(captions):
            Image.effect_noise(SIZE, 60).convert("RGB").save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(caption)
        concept["class_data_dir"] = str(folder)
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    made = []

    def watched(*args: Any, **kwargs: Any) -> CutMix:
        made.append([list(group.values()) for group in args[0]])
        return CutMix(*args, **kwargs)

    monkeypatch.setattr("svdiff.training.objective.CutMix", watched)
    train(replace(config, with_prior_preservation=True, num_class_images=2, max_train_steps=1))
    of_classes = made[1]
    assert of_classes == [["a dog"] * 2, ["a cat"] * 2]  # no caption names a cat: then it is any of them


def test_a_pictures_phrase_is_what_mixtures_call_it(
    config: TrainConfig, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(pictures, tmp_path / "own")
    told = {"file_name": "a.png", "text": "a dog", "phrase": "a red b dog"}
    (own / "metadata.jsonl").write_text(json.dumps(told))
    concepts = json.loads((tmp_path / "concepts.json").read_text())
    (tmp_path / "concepts.json").write_text(json.dumps([concepts[0] | {"instance_data_dir": str(own)}, concepts[1]]))
    asked: list[str] = []
    captions = CutMix.captions
    monkeypatch.setattr(CutMix, "captions", lambda self: asked.extend(captions(self)) or captions(self))
    train(replace(config, max_train_steps=1))
    pairs = [("a b dog", "a x cat"), ("a red b dog", "a x cat")]
    assert set(asked) == {f"{one} left {other}" for pair in pairs for one, other in (pair, pair[::-1])}


def test_a_token_that_is_cut_off_is_told(config: TrainConfig) -> None:
    long = ["left " + "a b c d e f g " * 3 + "{first} {second}"]
    with pytest.raises(SVDiffError, match="is not in the caption"):
        train(replace(config, unmix_loss_weight=1.0, cut_mix_prompts=long))
