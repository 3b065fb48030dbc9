"""What the launchers hand to Triton compiles, and how often: by `launch.py`, for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMPILED = {
    "frozen": 1,  # three values of alpha
    "expand": 1,
    "expand_backward": 2,  # and the sum over tiles
    "linear": 1,  # two values of alpha
    "group": 2,  # a launch a stage
    "group backward": 3,
    "split": 2,
    "bank": 2,  # eight adapters, then one
    "bank backward": 2,  # the first column of the mix is aligned, others are not
    "tiles": 3,  # with SVDIFF_AUTOTUNE=0 each of the tuned kernels has one
}


def test_launchers_compile_what_they_should() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("launch.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["what"]: line["compiled"] for line in found} == COMPILED
