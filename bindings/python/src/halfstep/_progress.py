# SPDX-License-Identifier: Apache-2.0
# How long calls report how far they have come.
"""Progress bars and callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Gets the steps done and their number in all (None if unknown); cancels by returning False.
Progress = Callable[[int, "int | None"], object]


class Reporter:
    """Context with the progress callback to use, if any; closes the bar at the end."""

    def __init__(
        self, progress: bool | Progress, what: str, unit: str, bar_format: str | None = None
    ) -> None:
        self.progress = progress
        self.what = what
        self.unit = unit
        self.bar_format = bar_format
        self.bar: Any = None

    def __enter__(self) -> Progress | None:
        if callable(self.progress):
            return self.progress
        if not self.progress:
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        # disable=None: nothing is printed unless stderr is a terminal.
        self.bar = tqdm(desc=self.what, unit=self.unit, bar_format=self.bar_format, disable=None)
        return self.advance

    def advance(self, completed: int, total: int | None) -> None:
        """Move the bar."""
        self.bar.total = total
        self.bar.update(completed - self.bar.n)

    def note(self, text: str) -> None:
        """Show a text behind the bar."""
        if not self.bar.disable and self.bar.postfix != text:
            self.bar.set_postfix_str(text)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
