"""Examples as people run them: commands, and what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command, and what it prints; its imports are those of this process, and it has one thread."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


def python(script: str, *arguments: str | Path) -> str:
    """What an example prints; it must succeed."""
    done = run(sys.executable, EXAMPLES / script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
