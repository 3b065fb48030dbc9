"""svdiff merge: what merged files answer to words and captions, what they say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
from safetensors.torch import load_file, save_file
from svdiff import MergeConfig, checkpoint, custom_diffusion, merge
from svdiff.cli import main
from svdiff.merge import fit_weights, learn_tokens, merge_shifts, target_words, text_features, token_files
from svdiff.pipelines import load_pipeline
from svdiff.targets import select
from svdiff.training.families import family_of
from tiny_pipelines import draw
from torch import Tensor

from svdiff_kernels import SVDiffError

PROMPTS = ["a s t", "a z t"]
CAPTIONS = ["a cat on a mat", "the dog", "a house in a wood by a lake", "zebra", "some quick fox", "a box"]


def layers_of(pipeline: Any) -> dict[str, Any]:
    return select(pipeline.unet, "cross_attn_kv", one_dim=False)


def weights(base: Any, folder: Path, seed: int, prompts: list[str] | None = None, size: float = 0.3) -> str:
    """A folder with Custom Diffusion's weights."""
    pipeline, rng = load_pipeline(str(base)), torch.Generator().manual_seed(seed)
    originals = {path: layer.weight.detach() for path, layer in layers_of(pipeline).items()}
    trained = {path: one + size * torch.randn(one.shape, generator=rng) for path, one in originals.items()}
    said = {"base_model": "tiny"} | ({"instance_prompts": prompts} if prompts else {})
    custom_diffusion.write(folder, trained, said, hashes=custom_diffusion.hashes_of(originals))
    return str(folder)


def shifts(base: Any, folder: Path, seed: int, size: float = 0.1, **how: Any) -> str:
    """A folder with shifts."""
    adapter = svdiff.attach(load_pipeline(str(base)), **({"targets": "cross_attn_kv"} | how))
    torch.manual_seed(seed)
    for group in adapter.param_groups():
        for parameter in group["params"]:
            torch.nn.init.normal_(parameter, std=size)
    adapter.save_weights(folder)
    return str(folder)


@pytest.fixture
def captions(tmp_path: Path) -> str:
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(CAPTIONS) + "\n\n")
    return str(file)


def run(folders: list[str], base: Path, output: Path, captions: str, **settings: Any) -> svdiff.MergeResult:
    return merge(
        MergeConfig(folders, str(base), captions=captions, output_dir=str(output), **({"prompt": PROMPTS} | settings))
    )


def seen(pipeline: Any, prompt: str, *, padding: bool = False) -> Tensor:
    """All that keys and values see of a prompt, by diffusers' own way."""
    context, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    return context[0] if padding else context[0, : len(pipeline.tokenizer(prompt).input_ids)]


def assert_met(words: Tensor, W: Tensor, own: Tensor) -> None:
    """Words are answered as by a concept's own weight, but for what fp32 keeps of features and weights."""
    error = (words.double() @ (W.double() - own.double()).T).norm()
    assert error < 1e-6 * words.norm() * (W.norm() + own.norm()), error


def test_text_features_are_what_diffusers_encodes(pipeline: Any) -> None:
    prompts = [*PROMPTS, *CAPTIONS] * 6  # several batches, of prompts of several lengths
    for padding in (False, True):
        for prompt, own in zip(prompts, text_features(family_of(pipeline), prompts, padding=padding), strict=True):
            torch.testing.assert_close(own, seen(pipeline, prompt, padding=padding), atol=1e-5, rtol=1e-5)


def test_text_features_of_two_encoders(base_of: Any) -> None:
    pipeline = load_pipeline(str(base_of("sdxl")))
    (own,) = text_features(family_of(pipeline), ["a dog"], padding=False)
    context = pipeline.encode_prompt("a dog", "a dog", "cpu", 1, False)[0]
    torch.testing.assert_close(own, context[0, : len(own)], atol=1e-5, rtol=1e-5)
    assert len(own) == 6  # start, a, d, o, g, end


def test_words_of_a_concept_are_those_after_what_all_share(pipeline: Any) -> None:
    features = text_features(family_of(pipeline), PROMPTS, padding=False)
    own = target_words([[one] for one in features], [[prompt] for prompt in PROMPTS])
    for found, whole in zip(own, features, strict=True):
        assert len(whole) == 5 and torch.equal(found, whole[2:])  # start, a | s, t, end
    (alone,) = target_words([features], [PROMPTS])  # one concept, two prompts
    assert torch.equal(alone, torch.cat([features[0][1:], features[1][1:]]))
    with pytest.raises(SVDiffError, match="prompt 'a s t' has no word of its own"):
        target_words([features[:1], features], [PROMPTS[:1], PROMPTS])


def test_merged_weights_answer_as_each_concept_does(base: Path, pipeline: Any, tmp_path: Path, captions: str) -> None:
    folders = [weights(base, tmp_path / name, i) for i, name in enumerate(["one", "two"])]
    result = run(folders, base, tmp_path / "out", captions)
    assert result.path == tmp_path / "out" / custom_diffusion.FILE_NAME
    assert result.constraint_error is not None and result.constraint_error < 1e-3  # fp32 of large weights
    merged, own = custom_diffusion.read(result.path), [custom_diffusion.read(folder) for folder in folders]
    assert merged.weights.keys() == own[0].weights.keys()
    lost, drifted, added = 0.0, 0.0, 0.0
    text = torch.cat([seen(pipeline, caption) for caption in CAPTIONS]).double()
    for path, layer in layers_of(pipeline).items():
        W, W0 = merged.weights[path].double(), layer.weight.detach().double()
        for prompt, file in zip(PROMPTS, own, strict=True):
            words = seen(pipeline, prompt)[2:].double()
            assert_met(words, W, file.weights[path])
        lost += float((text @ W0.T).square().sum())
        drifted += float((text @ (W - W0).T).square().sum())
        added += float((text @ sum(file.weights[path].double() - W0 for file in own).T).square().sum())
    assert result.merged.drift == pytest.approx((drifted / lost) ** 0.5, rel=1e-3)
    assert result.added.drift == pytest.approx((added / lost) ** 0.5, rel=1e-3)
    assert result.merged.target_error < 1e-3 < result.added.target_error
    said = json.loads((tmp_path / "out" / "run.json").read_text())
    assert said["command"] == "merge" and said["merged"]["drift"] == result.merged.drift
    assert (
        said["prompts"] == [[prompt] for prompt in PROMPTS]
        and said["added"]["target_error"] == result.added.target_error
    )
    assert merged.told("recipe") == {"operation": "merge", "inputs": ["one", "two"]}
    assert merged.told("instance_prompts") == PROMPTS
    custom_diffusion.load(pipeline, tmp_path / "out")  # and it is for this base
    draw(pipeline)


def test_prompts_and_captions_from_files(base: Path, tmp_path: Path, captions: str) -> None:
    folders = [weights(base, tmp_path / f"{i}", i, [prompt]) for i, prompt in enumerate(PROMPTS)]
    told = run(folders, base, tmp_path / "told", captions)
    lines = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    found = run(folders, base, tmp_path / "found", str(tmp_path / "photos"), prompt=None)
    assert found.merged == told.merged
    tensors = load_file(found.path)
    assert all(torch.equal(one, tensors[key]) for key, one in load_file(told.path).items())


def test_weights_by_least_squares(base: Path, pipeline: Any, tmp_path: Path, captions: str) -> None:
    prompts = [["a s t", "a s on a t"], ["a z t", "a q z t by a t", "a z"]]  # more words than features have numbers
    folders = [weights(base, tmp_path / f"{i}", i, own) for i, own in enumerate(prompts)]
    with pytest.raises(SVDiffError, match="was trained with 2 captions, too many words to be answered exactly"):
        run(folders, base, tmp_path / "out", captions, prompt=None)
    result = run(folders, base, tmp_path / "out", captions, prompt=None, caption_weight=0.3)
    assert result.constraint_error is None
    assert result.merged.target_error < result.added.target_error and result.merged.drift < result.added.drift
    words = target_words([[seen(pipeline, prompt, padding=True) for prompt in own] for own in prompts], prompts)
    assert sum(map(len, words)) > words[0].shape[1]
    text = torch.cat([seen(pipeline, caption, padding=True) for caption in CAPTIONS])
    merged, own = custom_diffusion.read(result.path), [custom_diffusion.read(folder) for folder in folders]
    for path, layer in layers_of(pipeline).items():
        expected = fit_weights(layer.weight.detach(), [one.weights[path] for one in own], words, text, 0.3)
        torch.testing.assert_close(merged.weights[path].double(), expected, rtol=1e-3, atol=1e-3)


def test_merged_shifts_are_of_the_closed_form(base: Path, pipeline: Any, tmp_path: Path, captions: str) -> None:
    folders = [shifts(base, tmp_path / name, i, size=0.5) for i, name in enumerate(["one", "two"])]
    result = run(folders, base, tmp_path / "out", captions, caption_weight=0.3)
    assert result.constraint_error is None and result.path == tmp_path / "out" / "spectral_shifts.safetensors"
    own = [checkpoint.read(Path(folder) / result.path.name).deltas for folder in folders]
    merged = checkpoint.read(result.path)
    words = [seen(pipeline, prompt, padding=True)[2:] for prompt in PROMPTS]
    text = torch.cat([seen(pipeline, caption, padding=True) for caption in CAPTIONS])
    clamped = 0
    for path, layer in layers_of(pipeline).items():
        _, sigma, Vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        deltas = [one[path] for one in own]
        clamped += sum(int((sigma + delta < 0).sum()) for delta in deltas)
        expected = merge_shifts(Vh, sigma, deltas, words, text, 0.3)
        torch.testing.assert_close(merged.deltas[path].double(), expected, rtol=1e-3, atol=1e-5)
    assert clamped  # or the ReLU would not be in this test
    assert result.merged.target_error < result.added.target_error and result.merged.drift < result.added.drift
    adapter = svdiff.load(pipeline, tmp_path / "out")
    assert adapter.clamped().count == 0
    assert json.loads(merged.metadata["recipe"]) == {"operation": "merge", "inputs": ["one", "two"]}


def test_shifts_of_other_layers(base: Path, tmp_path: Path, captions: str) -> None:
    wide = shifts(base, tmp_path / "wide", 0, targets="cross_attn")
    narrow = shifts(base, tmp_path / "narrow", 1)
    with pytest.raises(SVDiffError, match=r"attn2\.to_q is no key or value of cross-attention .*pass --others add"):
        run([wide, narrow], base, tmp_path / "out", captions)
    result = run([wide, narrow, wide], base, tmp_path / "out", captions, others="add", prompt=[*PROMPTS, "a q t"])
    merged, own = checkpoint.read(result.path).deltas, checkpoint.read_all(wide)["denoiser"].deltas
    assert merged.keys() == own.keys()
    for path, delta in own.items():
        assert torch.allclose(merged[path], 2 * delta) == (not path.endswith(("to_k", "to_v")))
    encoder = shifts(base, tmp_path / "encoder", 2, text_encoder=True)
    with pytest.raises(SVDiffError, match="shifts the text_encoder, and with it what all layers see"):
        run([encoder, narrow], base, tmp_path / "out", captions)
    only = shifts(base, tmp_path / "only", 2, targets="conv_in", one_dim="none")
    with pytest.raises(SVDiffError, match="nothing to merge by words"):
        run([only, only], base, tmp_path / "none", captions, others="add")


def learned(folder: str, token: str, pipeline: Any, vectors: int = 1) -> Tensor:
    embedding = torch.randn(vectors, pipeline.text_encoder.config.hidden_size)
    save_file({token: embedding}, Path(folder) / "learned_embeds.safetensors")
    return embedding


def test_learned_tokens_are_read_and_go_along(base: Path, pipeline: Any, tmp_path: Path, captions: str) -> None:
    folders = [weights(base, tmp_path / name, i) for i, name in enumerate(["one", "two"])]
    embeddings = [learned(folders[0], "<new1>", pipeline), learned(folders[1], "<new2>", pipeline, vectors=2)]
    prompts = ["a <new1> t", "a <new2> t"]
    result = run(folders, base, tmp_path / "out", captions, prompt=prompts)
    files = ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    for file, token, embedding in zip(files, ["<new1>", "<new2>"], embeddings, strict=True):
        assert torch.equal(load_file(tmp_path / "out" / file)[token], embedding)
    learn_tokens(pipeline, token_files([str(tmp_path / "out")]))
    lengths = [len(one) for one in text_features(family_of(pipeline), prompts, padding=False)]
    assert lengths == [5, 6]  # <new2> is two tokens
    merged = custom_diffusion.read(result.path)
    for i, folder in enumerate(folders):
        words = text_features(family_of(pipeline), prompts, padding=False)[i][2:]
        for path, weight in custom_diffusion.read(folder).weights.items():
            assert_met(words, merged.weights[path], weight)
    learned(folders[1], "<new1>", pipeline)
    with pytest.raises(SVDiffError, match="both call their concept <new1>"):
        run(folders, base, tmp_path / "more", captions, prompt=prompts)
    save_file({"<new2>": torch.ones(1, 5)}, Path(folders[1]) / "learned_embeds.safetensors")
    with pytest.raises(SVDiffError, match=r"<new2> has vectors \[1, 5\], but .* 12 wide"):
        run(folders, base, tmp_path / "more", captions, prompt=prompts)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ckpt": []}, "there is nothing to merge"),
        ({"prompt": ["a s"]}, "prompt: 1 for 2 of ckpt"),
        ({"prompt": ["a s", " "]}, "a prompt is empty"),
        ({"prompt": None}, "does not tell its prompt: say by prompt what its concept is called"),
        ({"prompt": ["a s t", "a s t"]}, "prompt 'a s t' has no word of its own"),
        ({"prompt": ["a b c d e f g h", "z y x w v u"]}, "target words are more than text features have numbers"),
        ({"others": "drop"}, "others 'drop' is not one of refuse, add"),
        ({"caption_weight": 0.0}, "caption_weight must be a number above 0"),
        ({"captions": None}, "captions: give a file or folder"),
        ({"captions": "nowhere"}, "cannot read captions in nowhere"),
        ({"captions": "empty.txt"}, "empty.txt has no captions"),
        ({"captions": "bad.jsonl"}, "bad.jsonl must have lines such as"),
        ({"ckpt": ["one", "shifts"]}, "shifts does not: concepts of one kind can be merged"),
        ({"ckpt": ["one", "nowhere"]}, "nowhere does not: concepts of one kind"),
        ({"ckpt": ["nowhere", "nowhere"]}, "there is no delta file"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    base: Path, tmp_path: Path, captions: str, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("bad.jsonl").write_text('{"file_name": "a.png"}\n')
    for i, name in enumerate(["one", "two"]):
        weights(base, Path(name), i)
    shifts(base, Path("shifts"), 0)
    given = {"ckpt": ["one", "two"], "prompt": PROMPTS, "captions": captions, "output_dir": "out"} | settings
    with pytest.raises(SVDiffError, match=message) as caught:
        merge(MergeConfig(pretrained_model_name_or_path=str(base), **given))
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_a_transformer_is_refused(base_of: Any, base: Path, tmp_path: Path, captions: str) -> None:
    folders = [weights(base, tmp_path / f"{i}", i) for i in range(2)]
    with pytest.raises(SVDiffError, match="a StableDiffusion3Pipeline has no cross-attention"):
        run(folders, base_of("sd3 without t5"), tmp_path / "out", captions)


@pytest.mark.parametrize("kind", ["weights", "shifts"])
def test_the_command_on_the_miniature(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = {"weights": weights, "shifts": shifts}[kind]
    folders = [make("miniature", tmp_path / f"{i}", i, size=0.03) for i in range(2)]
    command = ["merge", "--pretrained_model_name_or_path", "miniature", "--ckpt", *folders]
    command += ["--prompt", "a sks toy", "a zwx toy", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    said = json.loads((tmp_path / "out" / "run.json").read_text())
    assert said["merged"]["target_error"] < said["added"]["target_error"]
    assert said["merged"]["drift"] < said["added"]["drift"]
    assert said["seconds"] < 2
    if kind == "weights":
        assert said["constraint_error"] < 1e-5 and "target words are answered to" in printed
    for row in ("merged", "added"):
        assert f"{said[row]['drift']:.4f}" in printed
    assert (tmp_path / "out" / said["file"]).is_file()
