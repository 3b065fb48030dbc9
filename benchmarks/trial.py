"""How far `compare.py` can be trusted: `python -m benchmarks.trial benchmarks/results/trial`.

Runs `svdiff bench unet --quick` again and again on one commit, and a few times with our own step slowed by 15 %. No
pair of the former may be called a regression; every pair of a former and a latter must be. What is in the folder is not
run again: a trial may be interrupted, and one that was committed is judged again in a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

from . import compare

_HANDICAP = 0.15


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="How often is compare.py wrong?")
    parser.add_argument("folder", type=Path, help="of result files; those that are missing are measured")
    parser.add_argument("--runs", type=int, default=20, help="on one commit; default %(default)s")
    parser.add_argument("--planted", type=int, default=4, help="with a slowdown; default %(default)s")
    options = parser.parse_args()
    plain = [_run(options.folder / f"plain_{i:02}.jsonl", 0.0) for i in range(options.runs)]
    slow = [_run(options.folder / f"planted_{i:02}.jsonl", _HANDICAP) for i in range(options.planted)]
    same = [_slowdown(a, b) for a, b in permutations(plain, 2)]
    planted = [_slowdown(a, b) for a, b in product(plain, slow)]
    found = {
        "runs": len(plain),
        "planted_runs": len(slow),
        "planted": _HANDICAP,
        "threshold": compare.RELATIVE,
        "pairs": len(same),
        "false_alarms": sum(s > compare.RELATIVE for s in same),
        "largest_slowdown_without_cause": max(same),
        "planted_pairs": len(planted),
        "missed": sum(s <= compare.RELATIVE for s in planted),
        "smallest_slowdown_seen_of_planted": min(planted),
    }
    print(json.dumps(found, indent=2))
    return 1 if found["false_alarms"] or found["missed"] else 0


def _run(file: Path, handicap: float) -> Path:
    if not file.exists():
        print(f"measuring {file.name}", file=sys.stderr)
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "svdiff.cli", "bench", "unet", "--quick", "--output", str(file)]
        subprocess.run([*command, "--handicap", str(handicap)], check=True, stdout=subprocess.DEVNULL)
    return file


def _slowdown(a: Path, b: Path) -> float:
    (change,) = compare.compare(compare.read(a), compare.read(b))
    return change.slowdown


if __name__ == "__main__":
    sys.exit(main())
