"""svdiff info: what is built, what is used, and what is missing and why."""

from __future__ import annotations

from dataclasses import dataclass

from svdiff_kernels.info import main


@dataclass
class InfoConfig:
    """`info` has no settings."""


def info(config: InfoConfig) -> None:
    """Print what ``python -m svdiff_kernels.info`` prints."""
    main()
