"""Runs a contender in a process of its own, where a level wants clean memory or a cold start."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from svdiff.bench import BenchConfig

ROOT = Path(__file__).parents[1]


def call(module: str, bench: BenchConfig, *arguments: str) -> dict[str, Any]:
    """What `main` of a module of this package reports, or ``{"failure": its last words}``."""
    command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(asdict(bench)), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    said = done.stderr.strip().splitlines()
    return {"failure": said[-1] if said else f"exit code {done.returncode}"}


def settings() -> tuple[BenchConfig, list[str]]:
    """In the child: what `call` was given."""
    return BenchConfig(**json.loads(sys.argv[1])), sys.argv[2:]


def report(**found: Any) -> None:
    """In the child: the answer to `call`."""
    print(json.dumps(found))
