"""Which modules a name, an expression or a list of paths chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from svdiff.targets import by_layer, matching, select
from torch import nn

from svdiff_kernels import SVDiffError


def count(model: nn.Module, *kinds: type[nn.Module], within: str = "") -> int:
    return sum(type(m) in kinds for name, m in model.named_modules() if within in name)


def test_all_takes_every_matrix_kernel_and_norm(unet: Any) -> None:
    assert len(select(unet)) == count(unet, nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
    assert len(select(unet, one_dim=False)) == count(unet, nn.Linear, nn.Conv2d)


def test_stable_diffusion_15_has_the_known_counts() -> None:
    """svdiff-pytorch's file for this UNet has 391 keys: 282 matrices and 109 norms."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    assert len(select(unet, one_dim=False)) == 282
    assert len(select(unet)) == 391


@pytest.mark.parametrize(
    ("name", "part"), [("up", "up_blocks."), ("down", "down_blocks."), ("mid", "mid_block."), ("cross_attn", "attn2.")]
)
def test_subsets(unet: Any, name: str, part: str) -> None:
    expected = count(unet, nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, within=part)
    chosen = select(unet, name)
    assert len(chosen) == expected > 0
    assert all(part in path for path in chosen)


def test_cross_attention_keys_and_values(unet: Any) -> None:
    chosen = select(unet, "cross_attn_kv")
    blocks = {path.rsplit(".", 1)[0] for path in select(unet, "cross_attn")}
    assert chosen.keys() == {
        f"{path}.{kind}" for path in blocks for kind in ("to_k", "to_v") if not path.endswith("to_out")
    }


def test_expression_and_paths(unet: Any) -> None:
    assert select(unet, r"^conv_(in|out)$").keys() == {"conv_in", "conv_out"}
    assert select(unet, ["conv_in", "mid_block.resnets.0.norm1"]).keys() == {"conv_in", "mid_block.resnets.0.norm1"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [("no_such_layer", "no_such_layer"), ("(", "neither a subset nor a regular"), (["conv_in", "gone"], "'gone'")],
)
def test_what_matches_nothing_is_an_error(unet: Any, targets: Any, message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        select(unet, targets)


def test_layers_that_only_look_plain_are_left_alone() -> None:
    class Quantised(nn.Linear):
        pass

    whole = nn.Linear(3, 5)
    whole.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 5), "b": Quantised(3, 5), "c": whole, "d": nn.LayerNorm(4, elementwise_affine=False)}
    )
    assert select(model).keys() == {"a"}


def test_embeddings_only_on_request() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(7, 3), "out": nn.Linear(3, 5)})
    assert select(model).keys() == {"out"}
    assert select(model, embeddings=True).keys() == {"words", "out"}


def test_levels_are_the_blocks_of_one_resolution() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    paths, found = list(select(unet)), {}
    for level in range(4):
        found[level] = matching(f"level{level}", paths, "layers")
    assert {path.split(".")[0] for path in found[0]} == {
        "down_blocks", "up_blocks", "conv_in", "conv_norm_out", "conv_out",
    }  # fmt: skip
    for level, blocks in found.items():
        assert {path.split(".")[1] for path in blocks if path.startswith("down")} == {str(level)}
        assert {path.split(".")[1] for path in blocks if path.startswith("up")} == {str(3 - level)}
    assert any(path.startswith("mid_block") for path in found[3])
    rest = set(paths).difference(*found.values())
    assert {path.split(".")[0] for path in rest} == {"time_embedding"}
    with pytest.raises(SVDiffError, match="no level4: the adapted layers have level0 to level3"):
        matching("level4", paths, "layers")
    with pytest.raises(SVDiffError, match="no level0: the adapted layers have no levels"):
        matching("level0", ["blocks.0.to_q"], "layers")


def test_the_last_entry_that_is_about_a_layer_gives_the_value() -> None:
    paths = ["up_blocks.0.attn2.to_q", "up_blocks.0.conv", "mid_block.conv"]

    def values(table: dict[str, Any], part: str = "denoiser", parts: tuple[str, ...] = ("denoiser", "te")) -> list[Any]:
        found = by_layer(table.items(), paths, 1.0, part=part, parts=parts)
        assert list(found) == paths
        return list(found.values())

    assert values({"up": 0.5, "cross_attn": 2}) == [2, 0.5, 1]
    assert values({"cross_attn": 2, "all": 0}) == [0, 0, 0]
    assert values({"up": 0.5, "denoiser": {"cross_attn": 2}, "te": 3}) == [2, 0.5, 1]
    assert values({"up": 0.5, "mid": 3, "denoiser": {"up": 2}}) == [2, 2, 3]
    assert values({"denoiser": 0, "up": 0.5}) == [0.5, 0.5, 0]
    assert values({"up": 0.5, "denoiser": 0}) == [0, 0, 0]
    assert values({"up": 0.5, "te": {"mid": 2}}, part="te") == [1, 1, 2]
    assert values({"up": 0.5}, part="te", parts=("te",)) == [0.5, 0.5, 1]
    for table in ({"down": 1}, {"denoiser": {"down": 1}}, {"text_encoder_9": 1}):
        with pytest.raises(SVDiffError, match="matches no adapted layer"):
            values(table)
