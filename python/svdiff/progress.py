"""Progress bars: on standard output, so that standard error says nothing unless something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from svdiff_kernels.decompose import BAR_FORMAT

from .termination import exit_if_told

T = TypeVar("T")


def progress_bar(items: Collection[T], description: str, *, delay: float = 0) -> tqdm[T]:
    """A bar over `items`, shown once it has taken `delay` seconds; a command told to end does so between two."""
    return _Bar(items, desc=description, delay=delay, **progress_options())


def arithmetic_bar(total: float, description: str, *, delay: float = 0, disable: bool = False) -> _ArithmeticBar:
    """A bar over so much arithmetic, to be advanced by hand; otherwise as `progress_bar`."""
    how = progress_options() | {"bar_format": BAR_FORMAT, "delay": delay, "disable": disable}
    return _ArithmeticBar(total=total, desc=description, **how)


class _ArithmeticBar(tqdm):
    def advance(self, amount: float) -> None:
        """Show that so much more is done."""
        self.update(amount)
        exit_if_told()


class _Bar(tqdm):
    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            exit_if_told()
            yield item


def progress_options() -> dict[str, Any]:
    """How bars look: redrawn on a terminal, a line now and then in a file. Also for bars that diffusers makes."""
    terminal = sys.stdout.isatty()
    return {"file": sys.stdout, "dynamic_ncols": terminal, "mininterval": 0.1 if terminal else 10.0}
