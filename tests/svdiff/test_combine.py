"""svdiff combine: what the files of a combination hold, what they say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from svdiff import CombineConfig, combine
from svdiff.cli import main
from svdiff.pipelines import load_pipeline
from torch import Tensor

from svdiff_kernels import SVDiffError

FILES = ("spectral_shifts.safetensors", "spectral_shifts_te.safetensors")


@pytest.fixture(scope="module")
def shifts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with shifts for one base: dog and cat, and ink, which has only cross-attention and no text encoder."""
    pipeline, made = load_pipeline(str(base)), {}
    for i, (name, how) in enumerate(
        {
            "dog": {"text_encoder": True},
            "cat": {"text_encoder": True},
            "ink": {"targets": "cross_attn", "one_dim": "none"},
        }.items()
    ):
        torch.manual_seed(i)
        adapter = svdiff.attach(pipeline, **how)
        for group in adapter.param_groups():
            for parameter in group["params"]:
                torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path_factory.mktemp(name)
        adapter.save_weights(folder)
        adapter.unload()
        made[name] = str(folder)
    return made


def content(folder: str | Path) -> dict[str, Tensor]:
    found = {}
    for name in FILES:
        if (Path(folder) / name).exists():
            found |= {f"{name}/{key}": t.double() for key, t in load_file(Path(folder) / name).items()}
    return found


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-7, msg=key)


def run(folders: list[str], output: Path, **settings: Any) -> svdiff.CombineResult:
    return combine(CombineConfig(spectral_shifts_ckpt=folders, output_dir=str(output), **settings))


@pytest.mark.parametrize(
    ("operation", "weights", "factors"),
    [
        ("add", None, (1, 1)),
        ("add", [0.5, -2.0], (0.5, -2)),
        ("subtract", None, (1, -1)),
        ("subtract", [1.0, 0.25], (1, -0.25)),
        ("average", None, (0.5, 0.5)),
        ("average", [3.0, 1.0], (0.75, 0.25)),
    ],
)
def test_sums(
    shifts: dict[str, str], tmp_path: Path, operation: Any, weights: Any, factors: tuple[float, float]
) -> None:
    result = run([shifts["dog"], shifts["cat"]], tmp_path / "out", operation=operation, weights=weights)
    dog, cat = content(shifts["dog"]), content(shifts["cat"])
    close(content(tmp_path / "out"), {key: factors[0] * dog[key] + factors[1] * cat[key] for key in dog})
    assert result.folders == [tmp_path / "out"] and result.clamped == []


def test_scale_and_a_file_of_fewer_layers(shifts: dict[str, str], tmp_path: Path) -> None:
    run([shifts["ink"]], tmp_path / "double", operation="scale", weights=[2.0])
    ink, dog = content(shifts["ink"]), content(shifts["dog"])
    close(content(tmp_path / "double"), {key: 2 * t for key, t in ink.items()})
    run([shifts["dog"], shifts["ink"]], tmp_path / "both")
    close(content(tmp_path / "both"), {key: t + ink.get(key, torch.zeros(())) for key, t in dog.items()})


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_half_the_file_and_held_so(
    shifts: dict[str, str], base: Path, tmp_path: Path, dtype: str, kind: torch.dtype
) -> None:
    run([shifts["dog"]], tmp_path / "half", operation="scale", dtype=dtype)
    whole, half = load_file(Path(shifts["dog"]) / FILES[0]), load_file(tmp_path / "half" / FILES[0])
    assert all(half[key].dtype == kind and torch.equal(half[key], whole[key].to(kind)) for key in whole)
    adapter = svdiff.load(load_pipeline(str(base)), {"half": tmp_path / "half", "whole": shifts["dog"]})
    held = adapter.read_weights(tmp_path / "half")
    assert {delta.dtype for deltas in held.values() for delta in deltas.values()} == {kind}
    adapter.save_weights(tmp_path / "again", "half")
    again = load_file(tmp_path / "again" / FILES[0])
    assert all(torch.equal(again[key], half[key].float()) for key in half)
    adapter.save_weights(tmp_path / "small", "whole", dtype=kind)
    assert all(torch.equal(delta, half[key]) for key, delta in load_file(tmp_path / "small" / FILES[0]).items())


def test_a_shift_too_large_for_half_precision_is_refused(shifts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SVDiffError, match=r"cannot: write it in float32"):
        run([shifts["dog"]], tmp_path / "half", operation="scale", weights=[1e9], dtype="fp16")
    assert not (tmp_path / "half").exists()


def test_interpolation_is_a_path(shifts: dict[str, str], tmp_path: Path) -> None:
    result = run([shifts["dog"], shifts["cat"]], tmp_path / "path", operation="interpolate", steps=4)
    assert [folder.name for folder in result.folders] == ["step_00", "step_01", "step_02", "step_03"]
    dog, cat = content(shifts["dog"]), content(shifts["cat"])
    for i, folder in enumerate(result.folders):
        close(content(folder), {key: (1 - i / 3) * dog[key] + i / 3 * cat[key] for key in dog})


def test_style_mixing_takes_each_layer_from_one(shifts: dict[str, str], tmp_path: Path) -> None:
    run([shifts["dog"], shifts["cat"]], tmp_path / "a", operation="style_mix", layers=["up,cross_attn"])
    dog, cat = content(shifts["dog"]), content(shifts["cat"])
    of_cat = {key for key in dog if key.startswith(f"{FILES[0]}/up_blocks") or ".attn2." in key}
    assert 0 < len(of_cat) < len(dog)
    close(content(tmp_path / "a"), {key: cat[key] if key in of_cat else dog[key] for key in dog})
    run([shifts["dog"], shifts["cat"]], tmp_path / "b", operation="style_mix", layers=["text_encoder"])
    close(content(tmp_path / "b"), {key: (cat if key.startswith(FILES[1]) else dog)[key] for key in dog})
    three = [shifts["dog"], shifts["cat"], shifts["dog"]]
    run(three, tmp_path / "c", operation="style_mix", layers=["all", "mid"], weights=[1.0, 1.0, 3.0])
    close(
        content(tmp_path / "c"),
        {
            key: dog[key] if key.startswith(FILES[1]) else 3 * dog[key] if "mid_block" in key else cat[key]
            for key in dog
        },
    )


def test_the_result_is_a_delta_file_with_its_recipe(shifts: dict[str, str], base: Path, tmp_path: Path) -> None:
    run([shifts["dog"], shifts["cat"]], tmp_path / "out", weights=[0.5, 2.0])
    with (
        safe_open(tmp_path / "out" / FILES[0], framework="pt") as file,
        safe_open(Path(shifts["dog"]) / FILES[0], framework="pt") as source,
    ):
        said, before = file.metadata(), source.metadata()
    recipe = json.loads(said.pop("recipe"))
    assert said == before
    assert recipe["operation"] == "add"
    assert recipe["weights"] == [{"weights": [0.5, 2.0], "modules": len(load_file(tmp_path / "out" / FILES[0]))}]
    assert [one["name"] for one in recipe["inputs"]] == [Path(shifts[name]).name for name in ("dog", "cat")]
    assert len({one["sha256"] for one in recipe["inputs"]}) == 2
    adapter = svdiff.load(load_pipeline(str(base)), tmp_path / "out")
    adapter.load_weights(shifts["dog"], "dog")
    assert adapter.get_list_adapters() == ["default", "dog"]


def test_what_is_clamped_is_told(
    shifts: dict[str, str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["combine", "subtract", "--spectral_shifts_ckpt", shifts["dog"], shifts["cat"]]
    arguments += ["--pretrained_model_name_or_path", str(base), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    adapter = svdiff.attach(load_pipeline(str(base)), text_encoder=True)
    adapter.load_weights(tmp_path / "out")
    below = total = 0
    for part in adapter._attached():
        for layer in part._layers.values():
            if not layer.one_dim:
                below, total = below + int((layer.sigma + layer.delta < 0).sum()), total + layer.rank
    assert 0 < below < total
    assert f"{below:,} of {total:,} singular values are clamped at zero" in told
    assert json.loads((tmp_path / "out" / "run.json").read_text())["clamped"][0]["count"] == below
    clamped = adapter.clamped()
    assert 0 < clamped.lost < 1 and (clamped.count, clamped.total) == (below, total)
    adapter.load_deltas({})
    assert adapter.clamped() == type(clamped)(0, total, 0.0)


@pytest.mark.parametrize(("operation", "columns"), [("interpolate", 3), ("add", 3)])
def test_pictures_of_what_was_combined(
    shifts: dict[str, str], base: Path, tmp_path: Path, operation: str, columns: int
) -> None:
    prompts, seed, steps = ["a dog", "a cat"], 3, 2
    result = run(
        [shifts["dog"], shifts["cat"]],
        tmp_path / "out",
        operation=operation,
        steps=3,
        pretrained_model_name_or_path=str(base),
        prompt=prompts,
        num_inference_steps=steps,
        seed=seed,
    )
    assert result.grid == tmp_path / "out" / "grid.png" and len(result.clamped) == len(result.folders)
    pictures = np.asarray(Image.open(result.grid)).astype(int)
    side = pictures.shape[0] // len(prompts)
    assert pictures.shape == (2 * side, columns * side, 3)
    first = [shifts["dog"], shifts["cat"], str(result.folders[0])] if operation == "add" else map(str, result.folders)
    for column, path in enumerate(first):
        alone = svdiff.generate(
            svdiff.GenerateConfig(
                str(base),
                prompts,
                output_dir=str(tmp_path / f"alone{column}"),
                spectral_shifts_ckpt=[path],
                num_inference_steps=steps,
                seed=seed,
            )
        )
        expected = np.concatenate([np.asarray(Image.open(picture)).astype(int) for picture in alone.pictures])
        assert np.abs(pictures[:, column * side : (column + 1) * side] - expected).max() <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ["a dog"]}, "pictures need pretrained_model_name_or_path"),
        ({"prompt": [" "], "pretrained_model_name_or_path": "miniature"}, "a prompt is empty"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"dtype": "fp8"}, "dtype 'fp8' is not one of fp32"),
        ({"operation": "multiply"}, "operation 'multiply' is not one of add"),
        ({"operation": "scale"}, "takes 1 of spectral_shifts_ckpt, not 2"),
        ({"operation": "subtract", "spectral_shifts_ckpt": ["dog"]}, "takes 2 or more"),
        ({"spectral_shifts_ckpt": []}, "takes 1 or more"),
        ({"weights": [1.0]}, "weights: 1 numbers for 2"),
        ({"weights": [1.0, float("inf")]}, "not all finite"),
        ({"operation": "average", "weights": [1.0, -1.0]}, "must not add up to 0"),
        ({"operation": "interpolate", "steps": 1}, "steps must be at least 2"),
        ({"operation": "interpolate", "weights": [1.0, 1.0]}, "takes steps, no weights"),
        ({"operation": "style_mix"}, "layers: 0 expressions; style_mix of 2 takes 1"),
        ({"layers": ["up"]}, "layers: 1 expressions; add of 2 takes 0"),
        ({"operation": "style_mix", "layers": ["sideways"]}, "'sideways' matches no adapted layer"),
        ({"operation": "style_mix", "layers": ["("]}, "neither a subset nor a regular expression"),
        ({"spectral_shifts_ckpt": ["dog", "nowhere"]}, "no delta file"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    shifts: dict[str, str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folders = [shifts.get(name, name) for name in settings.pop("spectral_shifts_ckpt", ["dog", "cat"])]
    with pytest.raises(SVDiffError, match=message) as caught:
        run(folders, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_files_for_different_bases_are_refused(shifts: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with safe_open(Path(shifts["dog"]) / FILES[0], framework="pt") as file:
        said = file.metadata() | {"parts": "denoiser"}
    first, *rest = said["base_hashes"].split()
    tensors = load_file(Path(shifts["dog"]) / FILES[0])
    save_file(tensors, other / FILES[0], said | {"base_hashes": " ".join(["0" * len(first), *rest])})
    with pytest.raises(SVDiffError, match=f"are for different bases: {min(tensors).removesuffix('.delta')} differs"):
        run([shifts["dog"], str(other)], tmp_path / "out")
    save_file(tensors, other / FILES[0], said | {"rank": "4"})
    with pytest.raises(SVDiffError, match="has rank 4, others have full: they cannot be combined"):
        run([shifts["dog"], str(other)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_file(tensors, other / FILES[0])  # as svdiff-pytorch writes them: nobody knows for which base
    run([str(other), str(other)], tmp_path / "out")
    close(content(tmp_path / "out"), {key: 2 * t for key, t in content(other).items()})
    with safe_open(tmp_path / "out" / FILES[0], framework="pt") as file:
        assert file.metadata()["base_hashes"] == ""
