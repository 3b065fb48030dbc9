"""Optimisers: the rates of what trains, schedules, and what is refused before anything loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from svdiff import TrainConfig, train
from svdiff.training.families import family_of
from svdiff.training.methods import METHODS
from svdiff.training.optimizers import make_optimizer, make_schedule, rehearse
from torch import Tensor, nn

from svdiff_kernels import SVDiffError

CPU = torch.device("cpu")


@pytest.fixture
def config(base: Path, pictures: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        str(base), str(pictures), instance_prompt="a sks dog", output_dir=str(tmp_path / "run"), max_train_steps=4,
        report_to="none", train_text_encoder=True,
    )  # fmt: skip


def rates(config: TrainConfig, pipeline: Any, samples: int = 6) -> dict[str, float]:
    """Of each kind of what trains."""
    method = METHODS[config.method](config, family_of(pipeline))
    optimizer = make_optimizer(config, method, samples_per_step=samples, fused=False)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: by_id[id(p)] for name, p in method.parameters().items()}
    return {
        f"{part} {kind}".strip(): rate
        for name, rate in found.items()
        for part in ["denoiser" if name.startswith("denoiser") else "encoder"]
        for kind in ["one_dim" if "one_dim" in name else ""]
    }


def test_rates(config: TrainConfig, pipeline: Any) -> None:
    config = replace(config, learning_rate=1e-3, learning_rate_1d=1e-5)
    wanted = {"denoiser": 1e-3, "denoiser one_dim": 1e-5, "encoder": 1e-3, "encoder one_dim": 1e-5}
    assert rates(config, pipeline) == wanted


def test_rates_of_text_encoders_scaled_by_the_batch(config: TrainConfig, pipeline: Any) -> None:
    config = replace(config, learning_rate=1e-3, learning_rate_1d=1e-5, text_encoder_lr=1e-4, scale_lr=True)
    found = rates(config, pipeline)
    wanted = {"denoiser": 6e-3, "denoiser one_dim": 6e-5, "encoder": 6e-4, "encoder one_dim": 6e-5}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_rates_of_other_methods(config: TrainConfig, pipeline: Any, method: Any) -> None:
    config = replace(config, method=method, learning_rate=1e-4, text_encoder_lr=1e-5)
    assert rates(config, pipeline) == {"denoiser": 1e-4, "encoder": 1e-5}


@pytest.mark.parametrize(("lr_1d", "wanted"), [(1e-6, 0.0), (1.0, 1.0)])
def test_prodigy_knows_one_rate(config: TrainConfig, pipeline: Any, lr_1d: float, wanted: float) -> None:
    config = replace(config, optimizer="prodigy", learning_rate=1.0, learning_rate_1d=lr_1d)
    found = rates(config, pipeline)
    assert found == {"denoiser": 1.0, "denoiser one_dim": wanted, "encoder": 1.0, "encoder one_dim": wanted}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_8bit_adam": True},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2},
    ],
    ids=["adamw", "8-bit", "prodigy", "prodigy warmed up"],
)
def test_each_optimizer_trains_and_goes_on(config: TrainConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    """As if it had not stopped."""
    config = replace(config, checkpointing_steps=3, max_train_steps=6, **changes)
    whole = train(config)
    for file in whole.files:
        assert max(shift.abs().max().item() for shift in load_file(file).values()) > 1e-6, file.name
    half = Path(config.output_dir) / "checkpoint-3"
    rest = train(replace(config, output_dir=str(tmp_path / "rest"), resume_from_checkpoint=str(half)))
    assert rest.losses == whole.losses
    for file in whole.files:
        one, two = load_file(file), load_file(rest.output_dir / file.name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_moments_in_8_bits(config: TrainConfig) -> None:
    parameter = nn.Parameter(torch.zeros(5000))
    parameter.grad = torch.linspace(-1, 1, 5000)
    method: Any = SimpleNamespace(param_groups=lambda lr, *_: [{"params": [parameter], "lr": lr}])
    eight = make_optimizer(replace(config, use_8bit_adam=True), method, samples_per_step=1, fused=False)
    eight.step()
    state = eight.state[parameter]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    outer = parameter.detach()[[0, 1, -2, -1]]
    torch.testing.assert_close(outer, torch.tensor([1e-3, 1e-3, -1e-3, -1e-3]), rtol=0.05, atol=0)


def course(steps: int, lr: float = 1e-3, **changes: Any) -> list[float]:
    """The rate at each of some steps."""
    config = TrainConfig("base", learning_rate=lr, **changes)
    method: Any = SimpleNamespace(param_groups=lambda lr, *_: [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr}])
    optimizer = make_optimizer(config, method, samples_per_step=1, fused=False)
    set_rates = make_schedule(config, optimizer, steps)
    found = []
    for done in range(steps):
        set_rates(done)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedules() -> None:
    assert course(3) == [1e-3] * 3
    assert course(4, lr_scheduler="constant_with_warmup", lr_warmup_steps=2) == [0, 5e-4, 1e-3, 1e-3]
    assert course(4, lr_scheduler="linear") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    cosine = [1e-3, 8.5355e-4, 5e-4, 1.4645e-4]
    assert course(4, lr_scheduler="cosine") == pytest.approx(cosine, rel=1e-4)
    again = course(8, lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert again == pytest.approx(cosine * 2, rel=1e-4)
    squares = course(4, lr=1.0, lr_scheduler="polynomial", lr_power=2.0)
    assert squares == pytest.approx([1, 0.5625, 0.25, 0.0625], rel=1e-4)
    assert course(4, lr=1e-5, lr_scheduler="polynomial")[3] == pytest.approx(0.25e-5 + 0.75e-7)  # ends at 1e-7
    steps = course(6, lr_scheduler="piecewise_constant", lr_step_rules="1:2,0.1:4,0.5")
    assert steps == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 5e-4, 5e-4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adam_beta1": 1.5}, "adam_beta1 must be at least 0 and below 1, not 1.5"),
        ({"optimizer": "prodigy", "learning_rate": 0.0}, "optimizer prodigy: Invalid learning rate"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:2,x"},
            "lr_scheduler piecewise_constant: could not",
        ),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "lr_scheduler polynomial: lr_end"),
    ],
)
def test_what_is_refused_before_the_model_loads(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        train(replace(config, pretrained_model_name_or_path="not looked for", **changes))


def test_where_8_bit_moments_cannot_be_computed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import AdamW8bit

    def step(self: Any, closure: Any = None) -> None:
        raise NotImplementedError("no such\nkernel")

    monkeypatch.setattr(AdamW8bit, "step", step)
    with pytest.raises(SVDiffError, match="use_8bit_adam: no such kernel"):
        rehearse(replace(config, use_8bit_adam=True), CPU)
    rehearse(config, CPU)


def test_shift_penalty(config: TrainConfig, pipeline: Any, tmp_path: Path) -> None:
    method = METHODS["svdiff"](replace(config, shift_penalty=0.25), family_of(pipeline))
    assert method.penalty() == 0
    matrices = []
    for name, parameter in method.parameters().items():
        nn.init.normal_(parameter)
        matrices += [parameter] if "one_dim" not in name else []
    assert len(matrices) == 2  # of the UNet and the text encoder
    wanted = 0.25 * sum(parameter.square().sum() for parameter in matrices)
    penalty = method.penalty()
    assert isinstance(penalty, Tensor)
    torch.testing.assert_close(penalty, wanted)
    penalty.backward()
    torch.testing.assert_close(matrices[0].grad, 0.5 * matrices[0])


def test_shift_penalty_keeps_shifts_small(config: TrainConfig, tmp_path: Path) -> None:
    def size(**changes: Any) -> float:
        result = train(replace(config, max_train_steps=12, overwrite=True, max_grad_norm=0.0, **changes))
        return sum(
            shift.square().sum().item() for key, shift in load_file(result.files[0]).items() if "norm" not in key
        )

    assert size(shift_penalty=100.0) < 0.7 * size()


@pytest.fixture
def trails(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What trains, after each step of the loop."""
    from svdiff.training.loop import Loop

    found: list[Tensor] = []
    take = Loop._take_step

    def step(self: Loop) -> None:
        take(self)
        found.append(torch.cat([p.detach().flatten().clone() for p in self._parameters.values()]))

    monkeypatch.setattr(Loop, "_take_step", step)
    yield found


def test_the_mean_is_saved_drawn_and_offered(
    config: TrainConfig, trails: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And training goes on from where it was."""
    config = replace(config, train_text_encoder=False, max_train_steps=6, checkpointing_steps=3, learning_rate=0.1)
    plain = train(config)
    path = trails.copy()
    trails.clear()
    drawn = {}

    def validate(config: Any, host: Any, pipeline: Any, directory: Path, step: int, told: Any) -> None:
        drawn[step] = torch.cat([p.detach().flatten() for p in pipeline.unet.parameters() if p.requires_grad])

    monkeypatch.setattr(import_module("svdiff.train"), "validate", validate)
    averaged = train(
        replace(config, use_ema=True, ema_decay=0.7, overwrite=True, validation_prompt=["a dog"], validation_steps=3)
    )
    assert averaged.losses == plain.losses
    assert all(torch.equal(one, other) for one, other in zip(path, trails, strict=True))

    def mean(steps: int) -> Tensor:
        value = torch.zeros_like(path[0])
        for i, shifts in enumerate(path[:steps]):
            decay = min(0.7, (1 + i) / (10 + i)) if i else 0.0  # a young mean forgets sooner
            value = decay * value + (1 - decay) * shifts
        return value

    for folder, steps in ((averaged.output_dir, 6), (averaged.output_dir / "checkpoint-3", 3)):
        torch.testing.assert_close(drawn[steps], mean(steps))
        saved = load_file(folder / "spectral_shifts.safetensors")
        total = sum(shift.double().sum().item() for shift in saved.values())
        assert total == pytest.approx(mean(steps).double().sum().item(), rel=1e-4)
        assert total != pytest.approx(path[steps - 1].double().sum().item(), rel=1e-2)
