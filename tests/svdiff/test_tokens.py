"""Learned tokens: what others make of the files, beside shifts, and what training changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from safetensors.torch import load_file, save_file
from svdiff import GenerateConfig, TrainConfig, custom_diffusion, generate, train
from svdiff.pipelines import load_pipeline
from svdiff.tokens import add_token, initial_vectors, learned_tokens, read_tokens, save_tokens, vectors_of
from svdiff.training.families import family_of
from tiny import RESOLUTION, assert_unchanged, snapshot
from tiny_pipelines import draw

from svdiff_kernels import SVDiffError

PROMPT = "a <new> dog"


def draw_new(pipeline: Any, prompt: str = PROMPT) -> np.ndarray:
    return draw(pipeline, prompt)


@pytest.fixture
def config(base: Path, pictures: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        str(base), str(pictures), instance_prompt=PROMPT, output_dir=str(tmp_path / "run"), max_train_steps=3,
        resolution=RESOLUTION, learning_rate=0.05, report_to="none", method="textual_inversion",
        modifier_token=["<new>"], initializer_token=["d"],
    )  # fmt: skip


def vectors(count: int = 1, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_reads_the_file_and_draws_the_same(base: Path, tmp_path: Path, count: int) -> None:
    (file,) = save_tokens(tmp_path, {"<new>": {"text_encoder": vectors(count)}})
    assert file.name == "learned_embeds.safetensors"
    ours, theirs = load_pipeline(str(base)), load_pipeline(str(base))
    before = draw_new(ours)  # the word in letters
    assert svdiff.load_tokens(ours, tmp_path) == ["<new>"]
    theirs.load_textual_inversion(tmp_path)
    assert np.abs(draw_new(ours) - draw_new(theirs)).max() < 1e-5
    assert np.abs(draw_new(ours) - before).max() > 1e-3
    assert np.array_equal(draw_new(ours, "a dog"), draw_new(load_pipeline(str(base)), "a dog"))


def test_sdxl_has_a_vector_for_each_encoder_as_diffusers_reads_them(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    own = {"text_encoder": vectors(), "text_encoder_2": vectors(width=20)}
    (file,) = save_tokens(tmp_path, {"<new>": own})
    theirs = load_pipeline(str(base_of("sdxl")))
    tensors = load_file(file)
    for key, encoder, tokenizer in (
        ("clip_l", "text_encoder", "tokenizer"),
        ("clip_g", "text_encoder_2", "tokenizer_2"),
    ):
        theirs.load_textual_inversion(
            tensors[key], token="<new>", text_encoder=getattr(theirs, encoder), tokenizer=getattr(theirs, tokenizer)
        )
    ours = load_pipeline(str(base_of("sdxl")))
    svdiff.load_tokens(ours, file)
    assert np.abs(draw_new(ours) - draw_new(theirs)).max() < 1e-5


def test_old_clips_still_find_the_end_of_the_text(base_of: Callable[[str], Path]) -> None:
    """They look for the largest id, which a new word's would be; its summary is what SDXL is told of the prompt."""
    pipeline = load_pipeline(str(base_of("sdxl")))
    encoder, tokenizer = pipeline.text_encoder_2, pipeline.tokenizer_2
    legacy = copy.deepcopy(encoder)
    for module in (m for m in legacy.modules() if hasattr(m, "eos_token_id")):
        module.eos_token_id = 2
    pipeline.text_encoder_2 = legacy
    d = tokenizer("a d o g", padding="max_length", max_length=16, return_tensors="pt").input_ids
    summary = encoder(d)[0]
    add_token(pipeline, "<new>", initial_vectors(pipeline, "o", 1, ["text_encoder_2"]))
    ids = tokenizer("a d <new> g", padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert int(ids.max()) > tokenizer.eos_token_id
    torch.testing.assert_close(legacy(ids)[0], summary)


@pytest.mark.parametrize("first", ["tokens", "shifts"])
def test_they_live_with_shifts_of_the_text_encoder(base: Path, tmp_path: Path, first: str) -> None:
    """In any order; and the table's decomposition is the one that files were made for."""
    pipeline, own = load_pipeline(str(base)), {"text_encoder": vectors()}
    if first == "tokens":
        add_token(pipeline, "<new>", own)
    adapter = svdiff.attach(pipeline, text_encoder=True)
    if first == "shifts":
        add_token(pipeline, "<new>", own)
    rng = torch.Generator().manual_seed(0)
    for parameter in (p for group in adapter.param_groups() for p in group["params"]):
        parameter.data += 0.3 * torch.rand(parameter.shape, generator=rng)
    shifted = draw_new(pipeline)
    adapter.save_weights(tmp_path)
    save_tokens(tmp_path, vectors_of(pipeline))
    fresh = load_pipeline(str(base))
    svdiff.load_tokens(fresh, tmp_path)
    svdiff.load(fresh, tmp_path)
    assert np.array_equal(draw_new(fresh), shifted)
    adapter.unload()
    plain = load_pipeline(str(base))
    add_token(plain, "<new>", own)
    assert np.array_equal(draw_new(pipeline), draw_new(plain))


def test_several_words_one_after_another(base: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(base))
    one, two = {"text_encoder": vectors(2)}, {"text_encoder": vectors(seed=1)}
    add_token(pipeline, "<one>", one)
    alone = draw_new(pipeline, "a <one>")
    add_token(pipeline, "<two>", two)
    assert np.array_equal(draw_new(pipeline, "a <one>"), alone)
    files = save_tokens(tmp_path, vectors_of(pipeline))
    assert [file.name for file in files] == ["learned_embeds_one.safetensors", "learned_embeds_two.safetensors"]
    found = read_tokens(tmp_path)
    assert torch.equal(found["<one>"]["text_encoder"], one["text_encoder"])
    assert torch.equal(found["<two>"]["text_encoder"], two["text_encoder"])


def test_a_word_begins_as_another_one(pipeline: Any) -> None:
    """A picture of "d" and of a new word that begins with it are the same."""
    add_token(pipeline, "<new>", initial_vectors(pipeline, "d", 1, ["text_encoder"]))
    assert np.abs(draw_new(pipeline, "a <new>") - draw_new(pipeline, "a d")).max() < 1e-6
    rows = initial_vectors(pipeline, "d", 4, ["text_encoder"])["text_encoder"]
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_textual_inversion_trains_the_word_and_nothing_else(config: TrainConfig, base: Path, loaded: list[Any]) -> None:
    result = train(config)
    assert result.num_parameters == 12
    (file,) = result.files
    fresh = load_pipeline(str(base))
    start = initial_vectors(fresh, "d", 1, ["text_encoder"])["text_encoder"]
    assert (load_file(file)["<new>"] - start).abs().min() > 1e-2  # Adam moves each by about the rate a step
    for part in ("unet", "vae"):
        assert_unchanged(getattr(loaded[0], part), snapshot(getattr(fresh, part)))
    theirs = load_pipeline(str(base))
    theirs.load_textual_inversion(result.output_dir)
    assert np.abs(draw_new(theirs) - draw_new(loaded[0])).max() < 1e-5
    assert "load_tokens" in (result.output_dir / "README.md").read_text()


def test_gradients_are_those_of_a_table_whose_row_trains(base: Path) -> None:
    """By autograd through a grown table of transformers' own."""
    ours, theirs = load_pipeline(str(base)), load_pipeline(str(base))
    own = vectors(2)
    add_token(ours, "<new>", {"text_encoder": own})
    learned = learned_tokens(ours.text_encoder)
    assert learned is not None
    learned.vectors.requires_grad_(True)
    theirs.load_textual_inversion({"<new>": own})
    caption = ours.maybe_convert_prompt(PROMPT, ours.tokenizer)
    assert caption == "a <new> <new>_1 dog"
    for pipe in (ours, theirs):
        ids = pipe.tokenizer(caption, padding="max_length", max_length=16, return_tensors="pt").input_ids
        pipe.text_encoder(ids)[0].square().sum().backward()
    grads = theirs.text_encoder.get_input_embeddings().weight.grad[-2:]
    torch.testing.assert_close(learned.vectors.grad, grads)


@pytest.mark.parametrize("method", ["svdiff", "lora", "custom_diffusion"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_beside_other_methods(config: TrainConfig, method: Any, precision: Any, loaded: list[Any]) -> None:
    extra = {} if method == "custom_diffusion" else {"train_text_encoder": True}
    alone = train(replace(config, method=method, modifier_token=None, initializer_token=None, **extra))
    config = replace(config, method=method, mixed_precision=precision, output_dir=f"{config.output_dir}-2", **extra)
    result = train(replace(config, num_vectors=2, learning_rate_tokens=0.1))
    assert result.num_parameters == alone.num_parameters + 24
    tokens = read_tokens(result.output_dir)["<new>"]["text_encoder"]
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, vectors_of(loaded[-1])["<new>"]["text_encoder"])
    assert result.files[-1].name == "learned_embeds.safetensors"


def test_a_run_goes_on_to_the_bit(config: TrainConfig) -> None:
    config = replace(config, method="svdiff", max_train_steps=6, checkpointing_steps=3)
    whole = train(config)
    again = train(replace(config, resume_from_checkpoint="checkpoint-3"))
    assert again.losses == whole.losses
    one, two = (read_tokens(result.output_dir)["<new>"]["text_encoder"] for result in (whole, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["svdiff", "custom_diffusion", "textual_inversion"])
def test_one_concept_after_the_other(config: TrainConfig, method: Any, base: Path, loaded: list[Any]) -> None:
    """The first's word stays as it is, to the bit, and is saved with the second's; what both train goes on."""
    config = replace(config, method=method)
    one = train(config)
    folder = Path(f"{config.output_dir}-two")
    (folder / "pictures").mkdir(parents=True)
    second = replace(
        config, instance_prompt="a <two> cat", modifier_token=["<two>"], initializer_token=["c"],
        output_dir=str(folder / "run"), init_from=str(one.output_dir), max_train_steps=1, learning_rate=1e-9,
    )  # fmt: skip
    two = train(second)
    names = {"learned_embeds_new.safetensors", "learned_embeds_two.safetensors"}
    assert {file.name for file in two.files[-2:]} == names
    before, after = (read_tokens(run.output_dir) for run in (one, two))
    assert torch.equal(after["<new>"]["text_encoder"], before["<new>"]["text_encoder"])
    assert np.abs(draw_new(loaded[1]) - draw_new(loaded[0])).max() < 1e-4  # a tiny step: the first concept is all there
    again = train(replace(config, output_dir=str(folder / "again"), init_from=str(one.output_dir), learning_rate=1e-9))
    token = read_tokens(again.output_dir)["<new>"]["text_encoder"]
    assert torch.allclose(token, before["<new>"]["text_encoder"], atol=1e-6)  # gone on with, not begun anew
    with pytest.raises(SVDiffError, match="init_from"):
        train(replace(second, init_from=str(folder / "pictures"), output_dir=str(folder / "none")))


def test_custom_diffusion_trains_keys_and_values_and_generate_takes_them(
    config: TrainConfig, base: Path, tmp_path: Path, loaded: list[Any]
) -> None:
    result = train(replace(config, method="custom_diffusion", learning_rate=1e-2))
    fresh = load_pipeline(str(base))
    trained = dict(loaded[0].unet.named_parameters())
    moved = {name for name, p in fresh.unet.named_parameters() if not torch.equal(p, trained[name])}
    assert moved and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in moved)
    assert moved == {name for name in trained if ".attn2.to_k.weight" in name or ".attn2.to_v.weight" in name}
    how: dict[str, Any] = {"prompt": [PROMPT], "num_inference_steps": 2, "height": RESOLUTION, "width": RESOLUTION}
    ours = generate(
        GenerateConfig(str(base), custom_diffusion_ckpt=str(result.output_dir), output_dir=str(tmp_path / "a"), **how)
    )
    word = generate(
        GenerateConfig(str(base), learned_embeds=[str(result.output_dir)], output_dir=str(tmp_path / "b"), **how)
    )
    assert ours.pictures[0].read_bytes() != word.pictures[0].read_bytes()
    custom_diffusion.load(fresh, result.output_dir)
    svdiff.load_tokens(fresh, result.output_dir)
    assert np.abs(draw_new(fresh) - draw_new(loaded[0])).max() < 1e-6
    both = GenerateConfig(
        str(base), custom_diffusion_ckpt=str(result.output_dir), spectral_shifts_ckpt=[str(result.output_dir)],
        output_dir=str(tmp_path / "c"), **how,
    )  # fmt: skip
    with pytest.raises(SVDiffError):
        generate(both)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_words_before_a_new_one_are_answered_as_before(
    config: TrainConfig, base_of: Callable[[str], Path], loaded: list[Any], name: str
) -> None:
    """They are the same in prompts without it; all others are answered differently. Without the flag, these too."""
    config = replace(
        config, pretrained_model_name_or_path=str(base_of(name)), method="custom_diffusion", learning_rate=1e-2,
        noaug=True,
    )  # fmt: skip
    for keep in (True, False):
        train(replace(config, keep_prefix=keep, output_dir=f"{config.output_dir}-{keep}"))
        pipeline, fresh = loaded[-1], load_pipeline(str(base_of(name)))
        family = family_of(pipeline)
        with torch.no_grad():
            encoded = {key: family.encode(key, family.tokens(key, [PROMPT])) for key in family.text_encoders}
            words = family.conditions(encoded)[0][0]  # start, "a", the new word, "d", ...
            for path in custom_diffusion.read(f"{config.output_dir}-{keep}").weights:
                moved = pipeline.unet.get_submodule(path)(words) - fresh.unet.get_submodule(path)(words)
                sizes = moved.norm(dim=1)
                assert (sizes[:2] < 1e-5).all() == keep
                assert (sizes[2:6] > 1e-3).all()


def test_generate_takes_those_beside_the_shifts(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    result = train(replace(config, method="svdiff"))
    how: dict[str, Any] = {"prompt": [PROMPT], "num_inference_steps": 2, "height": RESOLUTION, "width": RESOLUTION}
    shifts = [str(result.output_dir)]
    both = generate(GenerateConfig(str(base), spectral_shifts_ckpt=shifts, output_dir=str(tmp_path / "a"), **how))
    result.files[-1].rename(tmp_path / "elsewhere.safetensors")
    named = generate(
        GenerateConfig(
            str(base), spectral_shifts_ckpt=shifts, learned_embeds=[str(tmp_path / "elsewhere.safetensors")],
            output_dir=str(tmp_path / "b"), **how,
        )
    )  # fmt: skip
    without = generate(GenerateConfig(str(base), spectral_shifts_ckpt=shifts, output_dir=str(tmp_path / "c"), **how))
    assert both.pictures[0].read_bytes() == named.pictures[0].read_bytes() != without.pictures[0].read_bytes()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"modifier_token": None, "initializer_token": None}, "needs a modifier_token"),
        ({"initializer_token": None}, "0 words for 1"),
        ({"initializer_token": ["dog"]}, "is 3 tokens for 1 vectors"),
        ({"modifier_token": ["d"]}, "a word of the tokenizer already"),
        ({"modifier_token": ["<a b>"]}, "no single word"),
        ({"modifier_token": ["<x>"]}, "<x> is in no caption"),
        ({"method": "full"}, "exclude each other"),
        ({"train_text_encoder": True}, "nothing but its tokens"),
        ({"method": "custom_diffusion", "targets": "up"}, "trains cross_attn_kv"),
        ({"num_vectors": 0}, "at least 1"),
        ({"keep_prefix": True}, "keep_prefix is of method custom_diffusion"),
    ],
)
def test_settings_that_make_no_sense(config: TrainConfig, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SVDiffError, match=complaint):
        train(replace(config, **changes))
    assert not Path(config.output_dir).exists()


def test_files_that_are_none(pipeline: Any, tmp_path: Path) -> None:
    assert read_tokens(tmp_path) == {}
    with pytest.raises(SVDiffError, match="there is no file"):
        read_tokens(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(SVDiffError, match="not a readable"):
        read_tokens(broken)
    save_file({"<x>": torch.full((1, 12), torch.nan)}, broken)
    with pytest.raises(SVDiffError, match="finite"):
        read_tokens(broken)
    save_file({"<x>": torch.zeros(1, 13)}, broken)
    with pytest.raises(SVDiffError, match="12 wide"):
        svdiff.load_tokens(pipeline, broken)
