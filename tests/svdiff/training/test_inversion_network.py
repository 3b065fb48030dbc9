"""InST's inversion: what the network computes, what its encoder sees, and what training makes of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from svdiff import TrainConfig, train
from svdiff.pipelines import load_pipeline
from svdiff.tokens import add_token, initial_vectors, read_tokens, vectors_of
from svdiff.training.data import find_pictures, load_picture
from svdiff.training.inversion_network import InversionNetwork, image_states, load_network
from tiny import RESOLUTION, assert_unchanged, snapshot, tiny_clip

from svdiff_kernels import SVDiffError

WIDTH, CONTEXT = 12, 20


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    return folder


@pytest.fixture
def config(base: Path, pictures: Path, clip: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        str(base), str(pictures), instance_prompt="a dog in <style>", output_dir=str(tmp_path / "run"),
        max_train_steps=4, resolution=RESOLUTION, learning_rate=0.01, report_to="none", method="textual_inversion",
        modifier_token=["<style>"], initializer_token=["d"], image_encoder=str(clip), checkpointing_steps=2,
    )  # fmt: skip


def network(**changes: Any) -> InversionNetwork:
    """One that has been trained, as far as its numbers tell."""
    made = InversionNetwork(WIDTH, CONTEXT, **changes)
    rng = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng)
    return made.eval()


def test_it_begins_with_the_initial_word_and_then_follows_the_pictures() -> None:
    start, states = torch.randn(3, WIDTH), torch.randn(7, CONTEXT)
    assert torch.equal(InversionNetwork(WIDTH, CONTEXT)(start, states), start)
    trained = network()
    found = trained(start, states)
    assert found.shape == (3, WIDTH)
    assert (found - trained(start, torch.randn(7, CONTEXT))).abs().max() > 1e-3
    torch.testing.assert_close(trained(start, states.repeat(3, 1)), found)  # a mean over them, however many
    torch.testing.assert_close(trained(start, states.flip(0)), found)


def test_each_layer_is_softmax_attention_as_it_is_written() -> None:
    """By hand, with the weights of one."""
    trained = network(layers=1).double()
    start, states = torch.randn(2, WIDTH).double(), torch.randn(5, CONTEXT).double()
    unit, (layer,) = start.square().mean().sqrt(), trained.layers
    weights = dict(layer.attention.named_parameters())
    q_bias, k_bias, v_bias = weights["in_proj_bias"].chunk(3)
    context = trained.norm_context(states)
    heads = math.gcd(8, WIDTH)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (heads, -1)).transpose(0, 1)

    q = split(layer.norm(start / unit) @ weights["q_proj_weight"].T + q_bias)
    k = split(context @ weights["k_proj_weight"].T + k_bias)
    v = split(context @ weights["v_proj_weight"].T + v_bias)
    seen = (q @ k.transpose(1, 2) / (WIDTH / heads) ** 0.5).softmax(-1) @ v
    hidden = start / unit + layer.attention.out_proj(seen.transpose(0, 1).flatten(1))
    torch.testing.assert_close(trained(start, states), start + unit * trained.out(trained.norm(hidden)))


def test_gradients() -> None:
    trained = network().double()
    start, states = torch.randn(2, WIDTH).double().requires_grad_(), torch.randn(3, CONTEXT).double().requires_grad_()
    names = ["out.weight", "layers.0.attention.k_proj_weight", "norm_context.weight"]
    values = [trained.get_parameter(name) for name in names]

    def call(start: torch.Tensor, states: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(trained, dict(zip(names, values, strict=True)), (start, states))

    assert torch.autograd.gradcheck(call, (start, states, *values), fast_mode=True)


def test_dropout_is_of_training_alone() -> None:
    trained, start, states = network(dropout=0.5), torch.randn(1, WIDTH), torch.randn(7, CONTEXT)
    assert torch.equal(trained(start, states), trained(start, states))
    trained.train()
    assert not torch.equal(trained(start, states), trained(start, states))


@pytest.mark.parametrize("kind", ["clip", "vision alone"])
def test_states_are_those_of_transformers(clip: Path, pictures: Path, tmp_path: Path, kind: str) -> None:
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, folder = tiny_clip(), clip
    if kind != "clip":
        alone = CLIPVisionModelWithProjection(model.config.vision_config)
        alone.vision_model.load_state_dict(model.vision_model.state_dict())
        alone.save_pretrained(folder := tmp_path / "vision")
    found = find_pictures(pictures, "x")
    states = image_states(str(folder), found)
    assert states.shape == (3 * (1 + 4), CONTEXT)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    image = load_picture(found[1], [(16, 16)]).image
    pixels = processor(images=[image], return_tensors="pt").pixel_values
    torch.testing.assert_close(states[5:10], model.vision_model(pixels).last_hidden_state[0])


def test_encoders_that_are_none(clip: Path, base: Path, tmp_path: Path, pictures: Path) -> None:
    found = find_pictures(pictures, "x")
    with pytest.raises(SVDiffError, match="cannot load the model"):
        image_states(str(tmp_path), found)
    with pytest.raises(SVDiffError, match="is a clip_text_model, not a CLIPModel"):
        image_states(str(base / "text_encoder"), found)
    tensors = load_file(clip / "model.safetensors")
    name = next(key for key in tensors if key.startswith("vision_model"))
    save_file(
        {key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(SVDiffError, match=f"{name} is missing"):
        image_states(str(tmp_path), found)


@pytest.mark.parametrize("method", ["textual_inversion", "svdiff"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_saved_is_what_was_trained(
    config: TrainConfig, base: Path, clip: Path, pictures: Path, loaded: list[Any], method: Any, precision: Any
) -> None:
    before = load_pipeline(str(base))
    encoder = snapshot(before.text_encoder)
    config = replace(config, method=method, mixed_precision=precision, num_vectors=2, inversion_layers=3)
    result = train(replace(config, initializer_token=["d"]))
    names = [file.name for file in result.files]
    assert names[-2:] == ["inversion_network.safetensors", "learned_embeds.safetensors"]
    tokens = read_tokens(result.output_dir)["<style>"]["text_encoder"]
    assert torch.equal(tokens, vectors_of(loaded[-1])["<style>"]["text_encoder"])
    (network,), (start,) = (list(part.values()) for part in load_network(result.output_dir))
    first = initial_vectors(before, "d", 2, ["text_encoder"])["text_encoder"]
    assert torch.equal(start, first) and (tokens - first).abs().max() > 1e-4
    seen = image_states(str(clip), find_pictures(pictures, "x"))
    with torch.no_grad():
        torch.testing.assert_close(network(start, seen), tokens)
    own = sum(parameter.numel() for parameter in network.parameters())
    assert (result.num_parameters == own) == (method == "textual_inversion")
    if precision == "no":
        loaded[-1].text_encoder.get_submodule(_holder(loaded[-1])).__delattr__("learned_tokens")
        assert_unchanged(loaded[-1].text_encoder, encoder)


def _holder(pipeline: Any) -> str:
    """Where in the text encoder the learned tokens are."""
    return next(name for name, m in pipeline.text_encoder.named_modules() if hasattr(m, "learned_tokens"))


def test_sdxl_has_a_network_for_each_encoder(config: TrainConfig, base_of: Callable[[str], Path]) -> None:
    result = train(replace(config, pretrained_model_name_or_path=str(base_of("sdxl")), max_train_steps=2))
    networks, starts = load_network(result.output_dir)
    assert {name: start.shape[1] for name, start in starts.items()} == {"text_encoder": 12, "text_encoder_2": 20}
    assert networks.keys() == starts.keys()
    pipeline = load_pipeline(str(base_of("sdxl")))
    assert svdiff.load_tokens(pipeline, result.output_dir) == ["<style>"]


def test_a_run_goes_on_to_the_bit(config: TrainConfig) -> None:
    """Dropout included, which is the same wherever a run began."""
    config = replace(config, method="svdiff", inversion_dropout=0.5, use_ema=True)
    whole = train(config)
    other = train(replace(config, inversion_dropout=0.0, output_dir=f"{config.output_dir}-other"))
    assert other.losses[1:] != whole.losses[1:]
    again = train(replace(config, resume_from_checkpoint="checkpoint-2"))
    assert again.losses == whole.losses
    one, two = (load_file(result.files[-2]) for result in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_only_pictures_of_the_style_are_looked_at(config: TrainConfig, tmp_path: Path, loaded: list[Any]) -> None:
    """Others, whose captions do not name it, have another; and a file of it makes no token of another picture's."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), color).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("a plain dog")
    train(replace(config, instance_data_dir=str(folder), max_train_steps=1))
    from svdiff.tokens import learned_tokens

    (_, states) = learned_tokens(loaded[-1].text_encoder)._given  # type: ignore[union-attr]
    alone = image_states(str(config.image_encoder), find_pictures(folder, "x")[:1])
    assert torch.equal(states, alone)


def test_another_word_may_come_behind(config: TrainConfig, loaded: list[Any]) -> None:
    """And what the network made of the first stays."""
    train(config)
    pipeline = loaded[-1]
    before = vectors_of(pipeline)["<style>"]["text_encoder"]
    add_token(pipeline, "<other>", {"text_encoder": torch.ones(1, 12)})
    assert torch.equal(vectors_of(pipeline)["<style>"]["text_encoder"], before)
    assert torch.equal(vectors_of(pipeline)["<other>"]["text_encoder"], torch.ones(1, 12))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"modifier_token": None, "initializer_token": None, "method": "svdiff"},
            "image_encoder needs one modifier_token",
        ),
        (
            {"modifier_token": ["<a>", "<b>"], "initializer_token": ["d", "o"]},
            "one modifier_token, such as <style>, not 2",
        ),
        ({"image_encoder": None, "inversion_layers": 3}, "inversion_layers is of a network"),
        ({"inversion_layers": 0}, "inversion_layers must be at least 1"),
        ({"inversion_dropout": 1.0}, "inversion_dropout must be at least 0 and below 1"),
        ({"image_encoder": "/nowhere"}, "cannot load the model /nowhere"),
    ],
)
def test_settings_that_make_no_sense(config: TrainConfig, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SVDiffError, match=complaint) as caught:
        train(replace(config, **changes))
    assert "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SVDiffError, match="there is no file"):
        load_network(tmp_path)
    file = tmp_path / "inversion_network.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(SVDiffError, match="is no inversion network"):
        load_network(tmp_path)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(SVDiffError, match="is no inversion network"):
        load_network(file)
