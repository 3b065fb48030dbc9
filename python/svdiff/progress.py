"""Progress bars: on standard output, so that standard error says nothing unless something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from svdiff_kernels.decompose import BAR_FORMAT

from .processes import is_first
from .termination import exit_if_told

T = TypeVar("T")


def progress_bar(
    items: Collection[T], description: str, *, delay: float = 0, done: int = 0, disable: bool = False
) -> tqdm[T]:
    """A bar over `items`, shown once it has taken `delay` seconds; a command told to end does so between two.

    Args:
        items: what is left to do.
        description: what it says.
        delay: in seconds.
        done: how many were done before.
        disable: show nothing.
    """
    total = done + len(items)
    how = progress_options(disable=disable)
    return _Bar(items, desc=description, delay=delay, initial=done, total=total, **how)


def arithmetic_bar(total: float, description: str, *, delay: float = 0, disable: bool = False) -> _ArithmeticBar:
    """A bar over so much arithmetic, to be advanced by hand; otherwise as `progress_bar`."""
    how = progress_options(disable=disable)
    return _ArithmeticBar(total=total, desc=description, bar_format=BAR_FORMAT, delay=delay, **how)


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


def progress_options(*, disable: bool = False) -> dict[str, Any]:
    """How bars look: redrawn on a terminal, a line now and then in a file. Also for bars that diffusers makes.

    Of several processes the first shows them.
    """
    terminal = sys.stdout.isatty()
    how = {"file": sys.stdout, "dynamic_ncols": terminal, "mininterval": 0.1 if terminal else 10.0}
    return how | {"disable": disable or not is_first()}
