"""Delta files: written whole, read whole, or refused with the key's name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from svdiff import checkpoint
from tiny import tiny_unet, unet_inputs
from torch import Tensor, nn

from svdiff_kernels import SVDiffError, __version__

UNET_FILE = checkpoint.FILE_NAMES["denoiser"]
TEXT_FILE = checkpoint.FILE_NAMES["text_encoder"]


def shifts(adapter: svdiff.Adapter) -> list[Tensor]:
    return [p.detach().clone() for group in adapter.param_groups() for p in group["params"]]


def randomise(adapter: svdiff.Adapter) -> None:
    for group in adapter.param_groups():
        for parameter in group["params"]:
            nn.init.normal_(parameter, std=0.01)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@pytest.fixture
def saved(pipeline: Any, tmp_path: Path) -> Path:
    """A folder with shifts of the UNet and of the text encoder."""
    adapter = svdiff.attach(pipeline, text_encoder=True)
    randomise(adapter)
    adapter.save_weights(tmp_path / "saved", instance_prompts=["a dog"])
    adapter.unload()
    return tmp_path / "saved"


@pytest.mark.parametrize("one_dim", ["vector", "scalar", "none"])
@pytest.mark.parametrize("rank", [None, 3])
def test_round_trip(pipeline: Any, tmp_path: Path, rank: int | None, one_dim: Any) -> None:
    adapter = svdiff.attach(pipeline, targets="mid", rank=rank, one_dim=one_dim, text_encoder=True)
    randomise(adapter)
    before = shifts(adapter)
    files = adapter.save_weights(tmp_path)
    assert files == [tmp_path / UNET_FILE, tmp_path / TEXT_FILE]
    assert sorted(tmp_path.glob("*spectral*")) == sorted(files)  # nothing half-written is left
    randomise(adapter)
    adapter.load_weights(tmp_path)
    assert equal(shifts(adapter), before)
    adapter.unload()
    loaded = svdiff.load(pipeline, tmp_path)  # finds out targets, rank and mode by itself
    assert equal(shifts(loaded), before)
    assert loaded.get_active_adapters() == ["default"]


def test_the_file_says_what_it_is(saved: Path, base: Path) -> None:
    for name in (UNET_FILE, TEXT_FILE):
        said = metadata(saved / name)
        assert said["format"] == "svdiff"
        assert said["format_version"] == "1"
        assert said["library_version"] == __version__
        assert said["base_model"] == base.name  # of a folder the name only: files are shared, folders are private
        assert (said["rank"], said["one_dim"], said["conv_reshape"]) == ("full", "vector", "co,ci*kh*kw")
        assert said["instance_prompts"] == '["a dog"]'
        assert len(said["base_hashes"].split()) == len(load_file(saved / name))
    assert all(t.dtype == torch.float32 for t in load_file(saved / UNET_FILE).values())
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.delta" in load_file(saved / UNET_FILE)


def test_text_encoder_keys_have_the_prefix_of_old(saved: Path, pipeline: Any) -> None:
    keys = load_file(saved / TEXT_FILE).keys()
    assert all(key.startswith("text_model.") for key in keys)
    assert "text_model.embeddings.token_embedding.delta" in keys
    bare = {key.removeprefix("text_model."): t for key, t in load_file(saved / TEXT_FILE).items()}
    save_file(bare, saved / TEXT_FILE)
    adapter = svdiff.load(pipeline, saved)
    key = "encoder.layers.1.mlp.fc1"
    assert torch.equal(adapter._parts[1].bank.delta_dict("default")[key], bare[f"{key}.delta"])


def test_files_of_svdiff_pytorch(saved: Path, pipeline: Any) -> None:
    """No metadata; norms are scalars of shape [1]."""
    adapter = svdiff.attach(pipeline, one_dim="scalar", text_encoder=True)
    randomise(adapter)
    adapter.save_weights(saved)
    for name in (UNET_FILE, TEXT_FILE):
        save_file(load_file(saved / name), saved / name)
    before = shifts(adapter)
    adapter.unload()
    assert equal(shifts(svdiff.load(pipeline, saved)), before)


def test_a_small_unet_has_a_file_below_a_hundredth_of_its_size(tmp_path: Path) -> None:
    """4 million parameters, 17 MB; shifts of matrices and norms, names, hashes and all."""
    unet = tiny_unet(
        block_out_channels=(64, 128, 192), norm_num_groups=16, cross_attention_dim=96,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    size = 4 * sum(p.numel() for p in unet.parameters())
    assert size > 16e6
    adapter = svdiff.attach(unet, cache=False)
    (file,) = adapter.save_weights(tmp_path, instance_prompts=["a photo of sks toy"])
    assert file.stat().st_size < size / 100


def test_an_adapter_name_has_a_file_of_its_own(unet: Any, tmp_path: Path) -> None:
    adapter = svdiff.attach(unet, targets="mid")
    randomise(adapter)
    adapter.save_weights(tmp_path / "dog")
    adapter.load_weights(tmp_path / "dog" / UNET_FILE, "dog")
    adapter.save_weights(tmp_path / "again", "dog")
    one, two = (load_file(tmp_path / name / UNET_FILE) for name in ("dog", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


Damage = Callable[[dict[str, Tensor]], Any]
KEY = "mid_block.resnets.0.conv1.delta"


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors[KEY][2] = float("nan")


def _short(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY][:-1].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_nan, "NaN or inf"),
        (_short, "shape"),
        (lambda t: t.pop(KEY), "missing"),
        (lambda t: t.update({"no.such.layer.delta": torch.zeros(3)}), r"no\.such\.layer\.delta"),
        (lambda t: t.update({"lora_A.weight": torch.zeros(3)}), r"lora_A\.weight"),
        (lambda t: t.update({KEY: t[KEY].to(torch.int32)}), "no spectral shift"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_loaded(
    saved: Path, pipeline: Any, damage: Damage, message: str
) -> None:
    tensors = load_file(saved / UNET_FILE)
    said = metadata(saved / UNET_FILE)
    del said["base_hashes"]  # or another count of keys is what is found first
    damage(tensors)
    save_file(tensors, saved / UNET_FILE, said)
    adapter = svdiff.attach(pipeline, text_encoder=True)
    before = shifts(adapter)
    with pytest.raises(SVDiffError, match=message) as caught:
        adapter.load_weights(saved)
    assert "\n" not in str(caught.value)
    if "delta" not in message and "lora" not in message:
        assert KEY in str(caught.value)
    assert equal(shifts(adapter), before)
    adapter.unload()
    if message != "missing":  # load attaches what the file has; a layer that it has not may be what was wanted
        with pytest.raises(SVDiffError):
            svdiff.load(pipeline, saved)
        svdiff.attach(pipeline)  # the failed load has left nothing attached


def test_a_key_that_went_missing_later_is_noticed(saved: Path, pipeline: Any) -> None:
    tensors = load_file(saved / UNET_FILE)
    del tensors[KEY]
    save_file(tensors, saved / UNET_FILE, metadata(saved / UNET_FILE))
    with pytest.raises(SVDiffError, match="base hashes"):
        svdiff.load(pipeline, saved)


def test_another_base_is_refused_by_content(saved: Path, pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(SVDiffError, match=r"mid_block\.resnets\.0\.conv1\.delta was trained on other weights"):
        svdiff.load(pipeline, saved)
    svdiff.attach(pipeline)


def test_the_same_base_in_half_precision_is_the_same_base(tmp_path: Path) -> None:
    unet = tiny_unet().to(torch.float16)
    svdiff.attach(unet).save_weights(tmp_path)
    svdiff.load(tiny_unet().to(torch.float16).float(), tmp_path)


def test_a_bad_text_encoder_file_leaves_the_denoiser_alone(saved: Path, pipeline: Any) -> None:
    (saved / TEXT_FILE).write_bytes((saved / TEXT_FILE).read_bytes()[:-7])
    adapter = svdiff.attach(pipeline, text_encoder=True)
    before = shifts(adapter)
    with pytest.raises(SVDiffError, match="not a readable safetensors file"):
        adapter.load_weights(saved)
    assert equal(shifts(adapter), before)


def test_parts_must_match(saved: Path, pipeline: Any) -> None:
    adapter = svdiff.attach(pipeline)
    with pytest.raises(SVDiffError, match="text_encoder=True"):
        adapter.load_weights(saved)
    adapter.unload()
    adapter = svdiff.attach(pipeline, text_encoder=True)
    (saved / TEXT_FILE).unlink()
    with pytest.raises(SVDiffError, match="saved with a file for the text_encoder"):
        adapter.load_weights(saved)


def test_no_pickle_no_folder_no_version_of_tomorrow(saved: Path, unet: Any, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    pickled = tmp_path / "shifts.bin"
    pickled.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SVDiffError, match="not a readable safetensors file"):
        svdiff.load(unet, pickled)
    with pytest.raises(SVDiffError, match="no delta file"):
        svdiff.load(unet, tmp_path / "nowhere")
    with pytest.raises(SVDiffError, match="no delta file"):
        svdiff.load(unet, tmp_path)
    save_file({}, tmp_path / UNET_FILE)
    with pytest.raises(SVDiffError, match="no spectral shifts"):
        svdiff.load(unet, tmp_path)
    save_file(load_file(saved / UNET_FILE), saved / UNET_FILE, metadata(saved / UNET_FILE) | {"format_version": "2"})
    with pytest.raises(SVDiffError, match="version 2"):
        svdiff.load(unet, saved)


def test_a_place_that_cannot_be_written(unet: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SVDiffError, match="cannot write"):
        svdiff.attach(unet, targets="mid").save_weights(tmp_path / "file" / "below")


def test_shifts_give_the_same_model_again(pipeline: Any, tmp_path: Path) -> None:
    x, t, context = unet_inputs()
    with torch.no_grad():
        adapter = svdiff.attach(pipeline)
        randomise(adapter)
        shifted = pipeline.unet(x, t, context).sample
        adapter.save_weights(tmp_path)
        adapter.unload()
        svdiff.load(pipeline, tmp_path)
        assert torch.equal(pipeline.unet(x, t, context).sample, shifted)
