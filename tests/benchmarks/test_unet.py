"""A whole UNet's step is measured against its rivals, and the result file says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from svdiff.bench import RIVALS, BenchConfig, bench
from svdiff.cli import main

from benchmarks import compare, infer, models, pipeline, runner
from svdiff_kernels import SVDiffError


def lines_of(tmp_path: Path, level: str, config: str, **settings: object) -> list[dict[str, object]]:
    """What a level writes for the tiny UNet."""
    output = tmp_path / "results" / f"{level}.jsonl"
    table = bench(BenchConfig(level, config=config, latents=8, lora_rank=4, output=str(output), **settings))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(line["name"] in table and line["level"] == level for line in lines)
    return lines


def test_a_twin_shares_weights_but_not_parameters(tiny_config: str) -> None:
    model = models.random_unet(Path(tiny_config), torch.float32)
    twin = models.twin(model)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours is not theirs and ours.data_ptr() == theirs.data_ptr()


def test_bench_unet_writes_a_line_per_contender(tiny_config: str, tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "unet", tiny_config, rounds=1)
    names = [line["name"] for line in lines]
    assert names == [runner.OURS, "lora r=4", runner.NAIVE, runner.FROZEN, runner.CONTROL]
    assert all(line["p50"] > 0 and line["ratio_p50"] > 0 and line["torch"] and line["threads"] for line in lines)
    assert all(0 < line["of_roofline"] < 1.5 for line in lines)


def test_every_rival_that_needs_no_compiler_can_be_asked_for(tiny_config: str, tmp_path: Path) -> None:
    rivals = [name for name in RIVALS if name != "lora-compiled"]
    lines = lines_of(tmp_path, "unet", tiny_config, rounds=1, rank=3, rivals=rivals)
    assert len(lines) == 2 + len(rivals) and {line["rank"] for line in lines} == {3}
    flops = {line["name"]: line["flop"] for line in lines}
    assert flops[runner.FROZEN] < flops[runner.OURS] < flops["recomposed by broadcast"] < flops[runner.NAIVE]
    assert flops["lora r=4, attention only"] is None  # not counted, so not claimed


def test_blocks_are_measured_one_by_one(tiny_config: str, tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "block", tiny_config, rounds=1)
    assert {line["subject"] for line in lines} == {
        "mid_block",
        *(f"{s}_blocks.{i}" for s in ("down", "up") for i in (0, 1)),
    }


def test_memory_is_that_of_a_process_of_its_own(tiny_config: str, tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "memory", tiny_config, rounds=1, rivals=["frozen"], device="cpu")
    assert [line["name"] for line in lines] == [runner.OURS, runner.FROZEN]
    assert all(1e8 < line["peak_bytes"] < 2e9 for line in lines)


def test_a_contender_that_does_not_fit_keeps_its_line(
    tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import child, memory

    def call(module: str, config: BenchConfig, name: str) -> dict[str, object]:
        return (
            {"failure": "not enough memory"} if name == "naive" else {"label": name, "seconds": [1.0], "peak_bytes": 2}
        )

    monkeypatch.setattr(child, "call", call)
    failed = memory.run(BenchConfig("memory", config=tiny_config))[-1]
    assert (failed.name, failed.failure) == ("naive", "not enough memory")
    assert "failed: not enough memory" in runner.table([failed], torch.float32)


def test_a_child_says_why_it_failed() -> None:
    """A model that is larger than the limit, which leaves room for what is imported."""
    with pytest.raises(SVDiffError, match=r"our own step failed: .*(?i:memory)"):
        bench(BenchConfig("memory", model="sd15", latents=8, memory_gb=2.0, rounds=1, device="cpu"))


def test_start_up_is_measured_in_four_ways(tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = lines_of(tmp_path, "start", tiny_config, rounds=1)
    assert len(lines) == 4 and all(line["p50"] > 0 for line in lines)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["results"]


def test_what_the_loop_adds_is_measured(tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    step, inside, start, first = lines_of(tmp_path, "loop", tiny_config, rounds=3, batch=2)
    assert step["rounds"] == inside["rounds"] == 3 and start["rounds"] == first["rounds"] == 4
    assert 0 < inside["p50"] < step["p50"] < start["p50"] < first["p50"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["results"]


def test_attaching_is_measured_against_reading(
    tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = lines_of(tmp_path, "attach", tiny_config, rounds=1)
    assert len(lines) == 8 and all(line["p50"] > 0 for line in lines)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["results"]


def test_levers_are_measured_against_what_is_done_now(tiny_config: str, tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "levers", tiny_config, rounds=1)
    names = {line["name"] for line in lines}
    assert names == {runner.OURS, "joined", "recomposed", "channels last", "memory is kept", runner.CONTROL}


@pytest.mark.parametrize(("count", "acting", "per_sample"), [(1, 1, 1), (4, 4, 1), (8, 8, 1), (16, 16, 2)])
def test_a_batch_is_mixed_from_so_many_deltas(count: int, acting: int, per_sample: int) -> None:
    rows = infer.mixes(count, 8)
    assert len(rows) == 8 and len({name for row in rows for name in row}) == acting
    assert {len(row) for row in rows} == {per_sample} and all(sum(row.values()) == 1 for row in rows)


def test_inference_is_measured_against_a_dense_batch(tiny_config: str, tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "infer", tiny_config, rounds=1, batch=8)
    names = {line["name"] for line in lines}
    assert {runner.DENSE, infer.REBUILT, "lora r=4, mixed batch", *map(infer.ours, infer.COUNTS)} <= names


def test_a_pipeline_is_measured_with_an_adapter_for_every_prompt(
    tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_SWITCHES", 3)
    lines = lines_of(tmp_path, "pipeline", tiny_config, rounds=2, batch=2)
    names = ["2 adapters", "one adapter", "the base", runner.CONTROL, "fuse", "unfuse"]
    names += ["one for all", "one for each prompt", "held in float32", "held in float16"]
    assert [line["name"] for line in lines] == names
    assert all(line["p50"] > 0 for line in lines)
    wide, half = (line["peak_bytes"] for line in lines[-2:])
    assert 0.4 * wide < half < 0.6 * wide


def test_quick_brings_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BenchConfig] = []
    monkeypatch.setattr("benchmarks.unet.run", lambda config: seen.append(config) or [])
    bench(BenchConfig("unet", quick=True, latents=64, rounds=1))
    (config,) = seen
    assert (config.latents, config.rounds, config.rivals) == (16, 40, ["lora", "frozen"])
    assert config.config is not None and Path(config.config).is_file()


def test_a_planted_slowdown_is_a_regression(tiny_config: str, tmp_path: Path) -> None:
    files = [tmp_path / "results" / name for name in ("plain.jsonl", "slow.jsonl")]
    for file, handicap in zip(files, (0.0, 1.0), strict=True):
        lines_of(tmp_path, "unet", tiny_config, rounds=9, handicap=handicap)
        (tmp_path / "results" / "unet.jsonl").rename(file)
    assert compare.main([*map(str, files), "--relative", "0.4"]) == 1
    assert compare.main([*map(str, reversed(files)), "--relative", "0.4"]) == 0


def test_rivals_are_chosen_on_the_command_line(tiny_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--config", tiny_config, "--latents", "8", "--rounds", "1"]
    assert main(["bench", "unet", *settings, "--rivals", "frozen", "broadcast"]) == 0
    table = capsys.readouterr().out
    assert runner.FROZEN in table and "recomposed by broadcast" in table and runner.NAIVE not in table
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "unet", *settings, "--rivals", "frozne"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "unet", "rivals": ["frozne"]}, "rival 'frozne' is not one of"),
        ({"level": "block", "model": "clip"}, "clip is not a UNet"),
        ({"level": "layer", "quick": True}, "quick is a way of bench unet"),
        ({"level": "unet", "rank": 0}, "rank must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        bench(BenchConfig(**settings))
