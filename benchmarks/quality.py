"""What is learnt, and at what price: ``python -m benchmarks.quality single benchmarks/results/quality``.

Teaches the miniature subjects that it has never seen and has the recogniser judge new pictures, for several seeds (of
subject, pictures, training and noise). Each run is a process of its own, and leaves a JSON file in the folder; what is
there is not run again. Prints a table with means and spreads, and draws the course over steps.

- single: one subject; spectral shifts, LoRA and full fine-tuning, by the same loop.
- precision: one subject; spectral shifts in fp32, bf16 and fp16.
- several: two subjects of one class; joint training, with cut-mix, with cut-mix and unmix; and three subjects.

Each seed has subjects of its own, from three of the miniature's; ``--subjects`` takes others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import svdiff
from svdiff.miniature import load_pipeline, world
from svdiff.miniature.task import Task, agreeing, both_in_place, recognised, unchanged
from svdiff.training import state
from tqdm.auto import tqdm

from . import resident
from .study.teach import PICTURES, config_of, draw_class_pictures, trained

_SUBJECTS = ("mushroom", "house", "robot")
_PROMPTS = 128
_CURVE_PROMPTS = 24  # each new scene of a subject twice


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        label: in the table.
        subjects: how many.
        settings: of `TrainConfig`, beside those that all share.
    """

    label: str
    subjects: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


_LORA = {"method": "lora", "targets": "attention"}  # as diffusers' scripts have it
_MIX = {
    "cut_mix_probability": 0.6,
    "cut_mix_prompts": [
        "{first} on the left and {second} on the right, gray background",
        "{second} on the right and {first} on the left, gray background",
    ],
}
EXPERIMENTS: dict[str, dict[str, Contender]] = {
    "single": {
        "svdiff": Contender("spectral shifts"),
        "lora4": Contender("LoRA r = 4", settings={**_LORA, "lora_rank": 4, "learning_rate": 1e-3}),
        "lora16": Contender("LoRA r = 16", settings={**_LORA, "lora_rank": 16, "learning_rate": 1e-3}),
        "full": Contender("all weights", settings={"method": "full", "learning_rate": 1e-4}),
    },
    "precision": {
        "svdiff": Contender("fp32"),
        "bf16": Contender("bf16", settings={"mixed_precision": "bf16"}),
        "fp16": Contender("fp16", settings={"mixed_precision": "fp16"}),
    },
    "several": {
        "joint": Contender("two, jointly", 2),
        "cutmix": Contender("two, cut-mix", 2, _MIX),
        "unmix": Contender("two, cut-mix and unmix", 2, {**_MIX, "unmix_loss_weight": 1.0}),
        "three": Contender("three, cut-mix and unmix", 3, {**_MIX, "unmix_loss_weight": 1.0}),
    },
}


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="What is learnt, and at what price?")
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("folder", type=Path, help="of result files; those that are missing are made")
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--only", nargs="*", choices=sorted({n for e in EXPERIMENTS.values() for n in e}))
    parser.add_argument("--subjects", nargs="+", choices=world.SUBJECTS, help="default: others for each seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default %(default)s")
    parser.add_argument("--plot", type=Path, help="draw the course into this file")
    parser.add_argument("--run", nargs=2, metavar=("CONTENDER", "SEED"), help=argparse.SUPPRESS)  # in the child
    options = parser.parse_args()
    contenders = EXPERIMENTS[options.experiment]
    if options.run:
        name, seed = options.run
        print(json.dumps(_run(contenders[name], int(seed), options.subjects)))
        return 0
    names = options.only or list(contenders)
    if options.subjects and any(len(options.subjects) != contenders[name].subjects for name in names):
        parser.error(f"--subjects: {len(options.subjects)} for {', '.join(names)}")
    files = {
        (name, seed): options.folder / f"{name}_{seed}.json" for seed in range(options.seeds) for name in names
    }  # fmt: skip
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = ["--subjects", *options.subjects] if options.subjects else []
    missing = [(name, seed, file) for (name, seed), file in files.items() if not file.exists()]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = pool.map(lambda run: _in_a_child(threads, options.experiment, chosen, *run), missing)
        list(tqdm(runs, desc="runs", total=len(missing)))
    found = {name: [json.loads(files[name, seed].read_text()) for seed in range(options.seeds)] for name in names}
    by_label = {contenders[name].label: runs for name, runs in found.items()}
    print(_table(by_label))
    if options.plot:
        _draw(by_label, options.plot)
    return 0


def _in_a_child(threads: int, experiment: str, chosen: Sequence[str], name: str, seed: int, file: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quality", experiment, str(file.parent)]
    command += [*chosen, "--run", name, str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(json.loads(done.stdout.splitlines()[-1]), indent=1) + "\n")
    partial.replace(file)


def _run(contender: Contender, seed: int, subjects: Sequence[str] | None = None) -> dict[str, Any]:
    """Teach, and judge what has been learnt: after all steps, and on the way."""
    subjects = subjects or [_SUBJECTS[(seed + 2 * i) % len(_SUBJECTS)] for i in range(contender.subjects)]
    task = Task(tuple(subjects), seed, PICTURES)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = config_of(task, folder, **contender.settings)
        draw_class_pictures(config, task, folder / "class_images")  # which takes memory that training does not
        resident.forget_peak()
        result = svdiff.train(config)
        figures: dict[str, Any] = {
            "subjects": subjects,
            "seed": seed,
            "seconds": result.seconds,
            "peak_bytes": resident.peak_bytes(),
            "numbers": result.num_parameters,
            "bytes": sum(file.stat().st_size for file in result.files),
        }
        figures |= _judge(trained(config, result.output_dir), task, _PROMPTS)
        base = load_pipeline()
        others = task.other_scenes(_PROMPTS)
        figures["unchanged_base"] = unchanged(task.draw(base, [world.caption(scene) for scene in others]), others)
        figures["curve"] = {
            state.load(path).step: _judge(trained(config, path), task, _CURVE_PROMPTS)
            for path in state.checkpoints(result.output_dir)
        }
    return figures


def _judge(pipeline: Any, task: Task, count: int) -> dict[str, float]:
    scenes, others = task.new_scenes(count), task.other_scenes(count)
    images = task.draw(pipeline, [task.prompt(scene) for scene in scenes])
    found = {
        "recognised": recognised(images, scenes),
        "agreeing": agreeing(images, scenes),
        "unchanged": unchanged(task.draw(pipeline, [world.caption(scene) for scene in others]), others),
    }
    if len(task.subjects) > 1:
        for mark, elsewhere in (("both_in_place", False), ("both_elsewhere", True)):
            prompts, pairs = zip(*task.pairs(count, elsewhere=elsewhere), strict=True)
            found[mark] = both_in_place(task.draw(pipeline, prompts), pairs)
    return found


def _table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Means over seeds, with the smallest and the largest."""
    columns = [
        "recognised",
        "agreeing",
        "both_in_place",
        "both_elsewhere",
        "unchanged",
        "unchanged_base",
        "bytes",
        "seconds",
        "peak_bytes",
    ]
    columns = [name for name in columns if any(name in run for runs in found.values() for run in runs)]
    lines = [["", *columns]]
    for label, runs in found.items():
        lines.append([label, *(_cell([run[name] for run in runs], name) for name in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The course over steps, one panel a mark: means over seeds, and from the worst to the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    titles = {
        "recognised": "subject recognised",
        "agreeing": "subject, place and ground as asked",
        "both_in_place": "both subjects, each on its side",
        "unchanged": "other prompts right",
    }
    marks = [mark for mark in titles if all(mark in run for runs in found.values() for run in runs)]
    figure, axes = plt.subplots(
        1, len(marks), figsize=(3.6 * len(marks), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, mark in zip(axes[0], marks, strict=True):
        for label, runs in found.items():
            steps = list(runs[0]["curve"])
            values = [[run["curve"][step][mark] for run in runs] for step in steps]
            x = [int(step) for step in steps]
            (line,) = ax.plot(x, [statistics.fmean(v) for v in values], marker="o", markersize=3, label=label)
            ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.12, color=line.get_color())
        if mark == "unchanged":
            base = statistics.fmean(run["unchanged_base"] for runs in found.values() for run in runs)
            ax.axhline(base, color="#64748b", linestyle=":", label="base")
        ax.set_title(titles[mark], fontsize=10)
        ax.set_xlabel("steps")
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(fontsize=8, loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cell(values: Sequence[float], name: str) -> str:
    mean = statistics.fmean(values)
    if "bytes" in name:
        return f"{mean / 1e6:.2f} MB"
    if name == "seconds":
        return f"{mean:.0f} s"
    return f"{mean:.1%} ({min(values):.0%}-{max(values):.0%})"


if __name__ == "__main__":
    sys.exit(main())
