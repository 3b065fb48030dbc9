"""Features: what transformers, lpips and pytorch-fid make of the same pictures, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from svdiff.evaluation import load_clip, load_dino, load_inception, load_lpips
from svdiff.evaluation.inception import InceptionV3
from tiny_encoders import by_rule, lpips_weights, pattern, save_tiny_clip, save_tiny_dino

from svdiff_kernels import SVDiffError

# Of the networks of lpips 0.1.4 and pytorch-fid 0.3.0 with the weights of `by_rule`, on the pictures of `pattern`.
LPIPS_SAID = {"alex": [0.011909505, 0.012130071, 0.012851777], "vgg": [0.008303510, 0.008871308, 0.008836890]}
INCEPTION_SAID = {0: 1.02505, 319: 0.0, 320: 0.13854, 800: 0.11968, 1500: 0.01932, 2047: 30.81240}
INCEPTION_MEAN, INCEPTION_STD = 4.55120, 6.28323


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def prepared(image: Image.Image, shortest: int) -> torch.Tensor:
    """As CLIP was trained: the shorter side to so many pixels, the middle cut out, the colours evened."""
    scale = shortest / min(image.size)
    small = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (small.width - 24) // 2, (small.height - 24) // 2
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = to_tensor(small.crop((left, top, left + 24, top + 24)))
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {n: tuple(v.shape) for n, v in InceptionV3().state_dict().items() if not n.endswith("num_batches_tracked")}
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file({**by_rule(shapes), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, file)
    return file


def test_clip_gives_the_embeddings_of_transformers(clip: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    images, texts = [picture(0), picture(1, (24, 24)), picture(2, (64, 31))], ["a dog", "a cat on a mat", "a dog"]
    encoder = load_clip(str(clip))
    ours = encoder.images(images, batch_size=2), encoder.texts(texts, batch_size=1)
    model, words = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    pixels = torch.stack([prepared(image, 24) for image in images])
    with torch.no_grad():
        out = model(pixel_values=pixels, **words(texts, padding=True, return_tensors="pt"))
    assert encoder.name == "CLIP"
    for found, theirs in zip(ours, (out.image_embeds, out.text_embeds), strict=True):
        torch.testing.assert_close(torch.nn.functional.normalize(found, dim=-1), theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[1][0], ours[1][2])


def test_a_prompt_longer_than_the_model_reads(clip: Path) -> None:
    found = load_clip(str(clip)).texts(["a dog " * 60, "a dog"])
    assert found.shape == (2, 10)
    assert found.isfinite().all()


@pytest.mark.parametrize(("version", "name"), [(1, "DINO"), (2, "DINOv2")])
def test_dino_gives_the_class_token(tmp_path: Path, version: int, name: str) -> None:
    from transformers import AutoModel

    folder = save_tiny_dino(tmp_path, version)
    encoder = load_dino(str(folder))
    images = [picture(0), picture(1, (51, 24))]
    if version == 1:  # squeezed to a square, and from -1 to 1
        square = [image.resize((24, 24), Image.Resampling.BILINEAR) for image in images]
        pixels = torch.stack([to_tensor(image) * 2 - 1 for image in square])
    else:
        pixels = torch.stack([prepared(image, 26) for image in images])
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state
    assert encoder.name == name
    torch.testing.assert_close(encoder.images(images), hidden[:, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(SVDiffError, match=f"{name} reads no texts"):
        encoder.texts(["a dog"])


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_is_that_of_its_authors(network: str, tmp_path: Path) -> None:
    file = tmp_path / "lpips.safetensors"
    save_file(lpips_weights(network), file)
    model = load_lpips(str(file))
    pictures = [Image.fromarray(pattern(72, i)) for i in range(4)]
    found = model.pairs(pictures[:3], pictures[1:])
    assert found.tolist() == pytest.approx(LPIPS_SAID[network], rel=1e-4)
    prompts = ["a", "a", "b", "a"]
    distances = model.distances(pictures, prompts)
    assert distances[0, 1].item() == pytest.approx(LPIPS_SAID[network][0], rel=1e-4)
    assert torch.equal(distances, distances.T)
    assert (distances == 0).tolist() == [[i == j or prompts[i] != prompts[j] for j in range(4)] for i in range(4)]
    assert model.pairs(pictures, pictures).abs().max() == 0


def test_lpips_takes_pictures_of_other_sizes(tmp_path: Path) -> None:
    file = tmp_path / "lpips.safetensors"
    save_file(lpips_weights("alex"), file)
    model = load_lpips(str(file))
    small, large = Image.fromarray(pattern(64, 0)), Image.fromarray(pattern(64, 0)).resize((128, 128))
    assert model.pairs([small], [large]) < 0.2 * model.pairs([small], [Image.fromarray(pattern(64, 1))])
    with pytest.raises(SVDiffError, match="at least 32 pixels a side, not 16x16"):
        model.pairs([picture(0, (16, 16))], [small])
    with pytest.raises(SVDiffError, match="1 pictures cannot be paired with 2"):
        model.pairs([small], [small, small])


def test_inception_is_that_of_fid(inception: Path) -> None:
    """Its picture has the network's own size, so that resizing changes nothing."""
    encoder = load_inception(str(inception))
    (found,) = encoder.images([Image.fromarray(pattern(299, 0))])
    assert {i: found[i].item() for i in INCEPTION_SAID} == pytest.approx(INCEPTION_SAID, rel=1e-3, abs=1e-3)
    assert (found.mean().item(), found.std().item()) == pytest.approx((INCEPTION_MEAN, INCEPTION_STD), rel=1e-4)


def test_inception_resizes_without_aliases() -> None:
    """A fine chequerboard becomes even gray: the filter takes in all pixels."""
    board = np.indices((1196, 1196)).sum(0) % 2 * 255
    pixels = InceptionV3.prepared(Image.fromarray(np.stack([board] * 3, -1).astype(np.uint8)))
    assert pixels.shape == (3, 299, 299)
    assert pixels.abs().max() < 0.02
    same = InceptionV3.prepared(Image.fromarray(pattern(299, 0)))
    assert torch.equal(same * 128 + 128, torch.from_numpy(pattern(299, 0)).permute(2, 0, 1).float())


def other_weights(path: Path) -> None:
    save_file({"fc.weight": torch.zeros(1000, 2048)}, path)


MISTAKES: dict[str, tuple[Any, Any, str]] = {
    "no file": (load_lpips, None, "there is no file"),
    "no safetensors": (load_inception, lambda p: p.write_bytes(b"\x80\x04pickle"), "is no safetensors file"),
    "torchvision's": (load_inception, other_weights, "of 1000 classes"),
    "others": (load_inception, lambda p: save_file({"a": torch.ones(2)}, p), "does not hold the weights of Inception"),
    "not LPIPS": (load_lpips, lambda p: save_file({"a": torch.ones(2)}, p), "does not hold the weights of LPIPS"),
    "no folder": (load_clip, None, "there is no folder"),
    "nothing in it": (load_dino, lambda p: p.mkdir(), "cannot load the model"),
    "no CLIP": (load_clip, lambda p: save_tiny_dino(p, 1), "--clip takes a CLIPModel, but"),
    "no DINO": (load_dino, save_tiny_clip, "--dino takes DINO, DINOv2 or DINOv3, but"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, tmp_path: Path) -> None:
    load, write, said = MISTAKES[name]
    path = tmp_path / "given"
    if write is not None:
        write(path)
    with pytest.raises(SVDiffError) as error:
        load(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(clip: Path, tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SVDiffError, match="has no safetensors weights, and nothing else is read"):
        load_clip(str(folder))


def test_importing_needs_neither_torchvision_nor_torchmetrics() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'torchmetrics', 'lpips']));"
    code = f"{blocked} import svdiff.evaluation, svdiff.evaluate; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
