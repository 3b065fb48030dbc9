"""What a step costs: seconds and memory of each contender, alone on the machine, round after round."""

from __future__ import annotations

from pathlib import Path

import svdiff

from .. import resident
from .contenders import CONTENDERS
from .runs import Figures, Run
from .subjects import BATCH
from .teach import config_of, link_class_images, task_of

_STEPS = 60


def run(one: Run, work: Path) -> Figures:
    """Take some steps."""
    contender, folder = CONTENDERS[one.contender], one.folder(work)
    task = task_of((one.case,), 0, new_words=contender.new_words)
    link_class_images(folder, work, task)
    shared = {
        "max_train_steps": _STEPS,
        "train_batch_size": BATCH,
        "checkpointing_steps": 10 * _STEPS,
        "overwrite": True,
    }
    config = config_of(task, folder, **{**shared, **contender.settings})
    resident.forget_peak()
    result = svdiff.train(config)
    return {
        "seconds_per_step": result.seconds / result.steps,
        "peak_bytes": resident.peak_bytes(),
        "samples_per_step": config.train_batch_size * (2 if config.with_prior_preservation else 1),
    }
