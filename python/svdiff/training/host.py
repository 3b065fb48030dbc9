"""accelerate's handle on device, precision, processes and trackers, for the time of one run."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from svdiff_kernels import SVDiffError

from ..outputs import writing
from .config import TrainConfig, installed


@contextmanager
def make_host(config: TrainConfig) -> Iterator[Any]:
    """The handle, an ``accelerate.Accelerator``; its process-wide state is given back.

    Raises:
        SVDiffError: the settings ask for several processes, and there is one.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration, set_seed

    alone = not dist.is_initialized()
    host = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or processes without one would not know of each other
        mixed_precision="no",  # `Loop` has that, also where accelerate would refuse
        log_with=_trackers(config),
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )
    if alone and dist.is_initialized():
        atexit.register(dist.destroy_process_group)  # not before: a process can join only once
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        set_seed(config.seed)
        if config.shard_factors and host.num_processes == 1:
            raise SVDiffError(
                "shard_factors needs several processes: accelerate launch --num_processes 2 -m svdiff train"
            )
        yield host
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for tracker in host.trackers:
            tracker.finish()
        AcceleratorState._reset_state(reset_partial_state=True)  # or the next precision would be refused


def _trackers(config: TrainConfig) -> list[str] | None:
    if config.report_to == "all":
        return ["tensorboard", "wandb"]
    if config.report_to == "auto":
        return ["tensorboard"] if installed("tensorboard") else None
    return None if config.report_to == "none" else [config.report_to]


def start_trackers(config: TrainConfig, host: Any, directory: Path) -> None:
    """Begin to record curves and pictures, under the run's folder.

    Raises:
        SVDiffError: a tracker cannot: it has no key, or its files cannot be written.
    """
    settings = {key: value for key, value in asdict(config).items() if isinstance(value, int | float | str)}
    try:
        with writing(directory / config.logging_dir):
            host.init_trackers("svdiff", config=settings)
    except SVDiffError:
        raise
    except Exception as error:  # of a library that may ask the network, and for a key
        host.trackers = []  # of which some cannot be ended
        raise SVDiffError(f"report_to {config.report_to}: {' '.join(str(error).split())}") from error
