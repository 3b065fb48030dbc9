"""The error that a user sees."""

from __future__ import annotations


class SVDiffError(ValueError):
    """Bad input. The message is one line that names the thing and the way out; command lines print it as it is."""
