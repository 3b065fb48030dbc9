"""Whether the library got slower between two result files: `python benchmarks/compare.py A.jsonl B.jsonl`.

Absolute seconds of two runs on a shared machine cannot be compared. What can is how our time relates to the rivals'
that were measured in the same rounds: if all of them seem to have become faster, we have become slower. So the slowdown
of a subject is the median, over the rivals that both files have, of how much nearer they came.

Prints one line per subject; exits with 1 if one of them is a regression, 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RELATIVE = 0.06
ABSOLUTE = 20e-6
_CONTROL = "A/A control"
_SETTINGS = ("level", "subject", "dtype", "model", "latents", "batch", "one_dim", "rank", "lora_rank")

Lines = dict[str, dict[str, Any]]
"""Of one subject, by contender; the first is ours."""


@dataclass(frozen=True)
class Change:
    """What became of one subject from A to B.

    Attributes:
        subject: what was measured.
        slowdown: of time, as a share: 0.1 is 10 % slower.
        seconds: the same in seconds of B.
        growth: of peak memory, as a share.
    """

    subject: str
    slowdown: float
    seconds: float
    growth: float

    def is_regression(self, relative: float, absolute: float) -> bool:
        """Is it slower by more than both thresholds, or does it hold so much more memory?"""
        return (self.slowdown > relative and self.seconds > absolute) or self.growth > relative


def read(file: Path) -> dict[tuple[Any, ...], Lines]:
    """The subjects of a result file.

    Raises:
        ValueError: it is no result file.

    Ratios of different devices have nothing to do with one another, so the device is part of what a subject is.
    """
    subjects: dict[tuple[Any, ...], Lines] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            name, key = line["name"], (*(line.get(setting) for setting in _SETTINGS), _device_of(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}, is no result of svdiff bench") from error
        subjects.setdefault(key, {})[name] = line
    return subjects


def _device_of(line: dict[str, Any]) -> str:
    """The kind of GPU; any CPU is as good as another."""
    return str(line["gpu"]) if line.get("device", "cpu") == "cuda" else "cpu"


def compare(a: dict[tuple[Any, ...], Lines], b: dict[tuple[Any, ...], Lines]) -> list[Change]:
    """Every subject that both files have with at least one rival."""
    changes = []
    for key in a.keys() & b.keys():
        before, after = a[key], b[key]
        ours = next(iter(before))
        usable = [
            name
            for name in before.keys() & after.keys() - {ours, _CONTROL}
            if before[name]["ratio_p50"] > 0 and after[name]["ratio_p50"] > 0
        ]
        if not usable or ours not in after:
            continue
        slowdown = statistics.median(before[n]["ratio_p50"] / after[n]["ratio_p50"] for n in usable) - 1
        held = [lines[ours].get("peak_bytes") for lines in (before, after)]
        growth = held[1] / held[0] - 1 if held[0] and held[1] else 0.0
        changes.append(Change(str(key[1]), slowdown, slowdown * after[ours]["p50"], growth))
    return sorted(changes, key=lambda change: change.slowdown, reverse=True)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Has svdiff become slower from result file A to result file B?")
    parser.add_argument("A", type=Path)
    parser.add_argument("B", type=Path)
    parser.add_argument("--relative", type=float, default=RELATIVE, help="share of time or memory; default %(default)s")
    parser.add_argument("--absolute", type=float, default=ABSOLUTE, help="seconds as well; default %(default)s")
    options = parser.parse_args(argv)
    try:
        changes = compare(read(options.A), read(options.B))
    except (OSError, ValueError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    if not changes:
        print(f"compare: error: {options.A} and {options.B} have no subject of one device in common", file=sys.stderr)
        return 2
    regressions = 0
    for change in changes:
        regressed = change.is_regression(options.relative, options.absolute)
        regressions += regressed
        memory = f", memory {change.growth:+.1%}" if change.growth else ""
        mark = "REGRESSION  " if regressed else ""
        print(f"{mark}{change.subject}: time {change.slowdown:+.1%} ({1e3 * change.seconds:+.3f} ms){memory}")
    print(f"{regressions} of {len(changes)} regressed by more than {options.relative:.1%} and {options.absolute:g} s")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
