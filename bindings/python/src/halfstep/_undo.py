# SPDX-License-Identifier: Apache-2.0
# What undoes a change, for the faces of training frameworks.
"""Handles that put things back as they were."""

from __future__ import annotations

from collections.abc import Callable


class Handle:
    """Undoes a change, once; also at the end of a ``with`` block."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Put everything back as it was; a second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
