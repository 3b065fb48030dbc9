"""Many adapters in one pipeline: a mixture for every prompt, for every call, for every group of layers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from svdiff.pipelines import load_pipeline

from svdiff_kernels import SVDiffError

NAMES = ("dog", "ink", "cat")
PROMPTS = [f"a {color} {thing}" for color in ("red", "blue", "green", "old") for thing in ("dog", "car", "hat", "sky")]
MIXES: list[dict[str, Any]] = [
    {"dog": 1.0},
    {"ink": 1.0},
    {},
    {"dog": 0.5, "ink": 0.5},
    *({"dog": w, "cat": 1 - w} for w in (-0.5, 0.25, 2.0)),
    *({name: {"up": w, "text_encoder": 1.5}} for w in (0.0, 0.5, -1.0) for name in NAMES),
]
assert len(MIXES) == len(PROMPTS) == 16


@pytest.fixture
def mixable(base_of: Callable[[str], Path]) -> Callable[[str], tuple[Any, svdiff.Adapter]]:
    """A pipeline with three adapters; large shifts, so that who has which is plain to see."""

    def make(name: str) -> tuple[Any, svdiff.Adapter]:
        pipeline = load_pipeline(str(base_of(name)))
        encoders = [part for part in ("text_encoder", "text_encoder_2") if getattr(pipeline, part, None) is not None]
        clips = [part for part in encoders if "CLIP" in type(getattr(pipeline, part)).__name__]
        adapter = svdiff.attach(pipeline, text_encoder=clips)
        for i, adapter_name in enumerate(NAMES):
            add(adapter, adapter_name, seed=i)
        return pipeline, adapter

    return make


def add(adapter: svdiff.Adapter, name: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    deltas = {
        part.role: {
            path: 0.2 * torch.randn(delta.shape, generator=rng)
            for path, delta in part.bank.delta_dict("default").items()
        }
        for part in adapter._attached()
    }
    adapter.load_deltas(deltas, name, activate=False)


def draw(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], count: int = 1, **how: Any) -> np.ndarray:
    """Latents of each prompt's pictures, one after the other; their noise depends on the seed alone."""
    result = pipeline(
        list(prompts),
        num_images_per_prompt=count,
        num_inference_steps=2,
        height=16,
        width=16,
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds for _ in range(count)],
        **how,
    ).images
    return np.asarray(result.detach())


def one_by_one(pipeline: Any, adapter: svdiff.Adapter, mixes: Sequence[Mapping[str, Any]], **how: Any) -> np.ndarray:
    found = []
    for i, mix in enumerate(mixes):
        adapter.set_adapters(list(mix), list(mix.values()))
        found.append(draw(pipeline, PROMPTS[i : i + 1], [i], **how))
    return np.concatenate(found)


@pytest.mark.parametrize(("guidance", "count"), [(3.0, 1), (1.0, 1), (3.0, 2)])
def test_sixteen_samples_with_sixteen_mixtures_are_what_each_is_alone(
    mixable: Callable[[str], tuple[Any, svdiff.Adapter]], guidance: float, count: int
) -> None:
    pipeline, adapter = mixable("sd")
    how = {"guidance_scale": guidance, "count": count}
    alone = one_by_one(pipeline, adapter, MIXES, **how)
    adapter.set_adapters_per_sample(MIXES, num_images_per_prompt=count)
    together = draw(pipeline, PROMPTS, range(16), **how)
    assert np.abs(together - alone).max() <= 1e-5 * np.abs(alone).max()
    apart = np.abs(alone[:, None] - alone[None]).max((2, 3, 4))[::count, ::count]
    assert (apart + 10 * np.eye(16)).min() > 0.01  # no two of them are alike


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev"])
def test_other_families_have_mixtures_of_samples_too(
    mixable: Callable[[str], tuple[Any, svdiff.Adapter]], name: str
) -> None:
    pipeline, adapter = mixable(name)
    mixes = [{"dog": 1.0}, {}, {"ink": {"text_encoder": 0.5}, "cat": 0.5}]
    alone = one_by_one(pipeline, adapter, mixes, count=2)
    adapter.set_adapters_per_sample(mixes, num_images_per_prompt=2)
    together = draw(pipeline, PROMPTS[:3], range(3), count=2)
    assert np.abs(together - alone).max() <= 1e-5 * np.abs(alone).max()
    assert np.abs(alone[0] - alone[2]).max() > 0.01


def test_text_encoders_follow_the_prompt(mixable: Callable[[str], tuple[Any, svdiff.Adapter]]) -> None:
    pipeline, adapter = mixable("sd")
    only_text: list[Any] = [{"dog": {"denoiser": 0.0}}, {"ink": {"denoiser": 0.0}}]
    adapter.set_adapters("dog", {"denoiser": 0.0})
    assert adapter.get_active_adapters() == ["dog"]
    base = one_by_one(pipeline, adapter, [{}, {}])
    adapter.set_adapters_per_sample(only_text)
    moved = draw(pipeline, PROMPTS[:2], range(2))
    assert np.abs(moved - base).max((1, 2, 3)).min() > 1e-3
    np.testing.assert_allclose(moved, one_by_one(pipeline, adapter, only_text), atol=1e-5)


def test_calls_from_two_threads_have_mixtures_of_their_own(
    mixable: Callable[[str], tuple[Any, svdiff.Adapter]],
) -> None:
    pipeline, adapter = mixable("sd")
    mixes = [{"dog": 1.0}, {"ink": 1.0, "cat": 0.5}]
    alone = one_by_one(pipeline, adapter, mixes)
    adapter.set_adapters([])
    bare = draw(pipeline, PROMPTS[:1], [0])
    drawn: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}

    def work(i: int) -> None:
        stateful = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("scheduler", "tokenizer")}
        own = type(pipeline)(**pipeline.components | stateful)
        own.set_progress_bar_config(disable=True)
        for _ in range(3):
            if i == 2:
                drawn[i].append(draw(own, PROMPTS[:1], [0]))
            else:
                with adapter.mixed(mixes[i]):
                    drawn[i].append(draw(own, PROMPTS[i : i + 1], [i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate([*alone, *bare]):
        assert len(drawn[i]) == 3
        for one in drawn[i]:
            np.testing.assert_allclose(one[0], expected, atol=1e-6)


def test_loading_and_deleting_while_a_picture_is_drawn(
    mixable: Callable[[str], tuple[Any, svdiff.Adapter]], tmp_path: Path
) -> None:
    pipeline, adapter = mixable("sd")
    adapter.save_weights(tmp_path, "cat")
    adapter.set_adapters("dog")
    expected = draw(pipeline, PROMPTS[:1], [0])
    weights = {name: p.data_ptr() for name, p in pipeline.unet.named_parameters()}

    def meanwhile(pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        adapter.load_weights(tmp_path, f"new {step}", activate=False)
        adapter.delete_adapters("ink" if step == 0 else "new 0")
        return arguments

    actual = draw(pipeline, PROMPTS[:1], [0], callback_on_step_end=meanwhile)
    np.testing.assert_array_equal(actual, expected)
    assert adapter.get_list_adapters() == ["default", "dog", "cat", "new 1"]
    assert adapter.get_active_adapters() == ["dog"]
    assert {name: p.data_ptr() for name, p in pipeline.unet.named_parameters()} == weights


def test_weights_of_groups_of_layers(mixable: Callable[[str], tuple[Any, svdiff.Adapter]]) -> None:
    _, adapter = mixable("sd")
    denoiser, text_encoder = adapter._attached()
    dog = denoiser.bank.delta_dict("dog")

    def share(path: str) -> float:
        layer = denoiser.bank._layers[path]
        return float(((layer.shifted() - layer.sigma) / dog[path])[layer.shifted() > 0].mean())

    adapter.set_adapters("dog", {"all": 0.1, "up": 0.5, "cross_attn": 0.25, r"to_q$": 0.75, "denoiser": {"mid": -0.5}})
    for path in dog:
        expected = 0.5 if path.startswith("up_blocks") else 0.1
        expected = 0.25 if ".attn2." in path else expected
        expected = 0.75 if path.endswith("to_q") else expected
        expected = -0.5 if path.startswith("mid_block") else expected
        assert share(path) == pytest.approx(expected, abs=1e-4), path
    assert text_encoder.bank.get_mix() == {"dog": 1.0}
    adapter.set_adapters(["dog", "ink"], [{"text_encoder": 0.0}, 0.5])
    assert text_encoder.bank.get_mix() == {"ink": 0.5} and denoiser.bank.get_mix() == {"dog": 1.0, "ink": 0.5}
    for weight, message in [
        ({"sideways": 1.0}, "'sideways' matches no"),
        ({"(": 1.0}, "neither a subset nor"),
        ({"level7": 1.0}, "there is no level7: the adapted layers have level0 to level"),
        ({"up": float("nan")}, "finite"),
        ({"text_encoder": {"sideways": 1.0}}, "'sideways' matches no"),
        ({"text_encoder": float("inf")}, "finite"),
    ]:
        with pytest.raises(SVDiffError, match=message):
            adapter.set_adapters("dog", weight)
        assert denoiser.bank.get_mix() == {"dog": 1.0, "ink": 0.5}


def test_a_wrong_mixture_changes_nothing(mixable: Callable[[str], tuple[Any, svdiff.Adapter]]) -> None:
    pipeline, adapter = mixable("sd")
    adapter.set_adapters("ink")
    for mixes, message in [([{"dog": 1.0}, {"cow": 1.0}], "no adapter 'cow'"), ([], "no samples")]:
        with pytest.raises(SVDiffError, match=message):
            adapter.set_adapters_per_sample(mixes)
        with pytest.raises(SVDiffError, match=message), adapter.mixed(mixes):
            pass
    assert adapter.get_active_adapters() == ["ink"]
    adapter.set_adapters_per_sample(MIXES[:3])
    with pytest.raises(SVDiffError, match="3 samples does not split a batch of 2"):
        draw(pipeline, PROMPTS[:2], range(2))


def test_files_of_other_layers_share_a_pipeline(base: Path, tmp_path: Path) -> None:
    """One shifts cross-attention, one the norms and the text encoder too: what a file lacks is not shifted."""
    pipeline = load_pipeline(str(base))
    for name, how in {"small": {"targets": "cross_attn", "one_dim": "none"}, "whole": {"text_encoder": True}}.items():
        adapter = svdiff.attach(pipeline, **how)
        add(adapter, "default", seed=len(name))
        adapter.save_weights(tmp_path / name)
        adapter.unload()
    alone = {}
    for name in ("small", "whole"):
        adapter = svdiff.load(pipeline, tmp_path / name)
        alone[name] = draw(pipeline, PROMPTS[:1], [0])
        adapter.unload()
    adapter = svdiff.load(pipeline, {"small": tmp_path / "small", "whole": tmp_path / "whole"})
    assert adapter.get_list_adapters() == ["default", "small", "whole"]
    assert adapter.get_active_adapters() == ["small"]
    adapter.set_adapters_per_sample([{"whole": 1.0}, {"small": 1.0}])
    drawn = draw(pipeline, [PROMPTS[0]] * 2, [0, 0])
    np.testing.assert_allclose(drawn, np.concatenate([alone["whole"], alone["small"]]), atol=1e-4)
    adapter.load_weights(tmp_path / "small", "again")
    np.testing.assert_allclose(draw(pipeline, PROMPTS[:1], [0]), alone["small"], atol=1e-4)
