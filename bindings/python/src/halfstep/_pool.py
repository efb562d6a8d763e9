# SPDX-License-Identifier: Apache-2.0
# Calls handed to a pool of workers, and their results in order.
"""Pools of workers: executors of `concurrent.futures`, pools of `multiprocessing` and of Ray."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .errors import InvalidArgumentError

#: Calls that wait for a free worker or run, so that memory stays bounded and no core is idle.
_WAITING = max(8, (os.cpu_count() or 1) + 2)
_EXPECTED = (
    "expected a concurrent.futures.Executor, a multiprocessing.Pool or a"
    " ray.util.multiprocessing.Pool"
)


def check_pool(pool: Any, callback: Any, name: str) -> None:
    """Refuse what calls cannot be handed to.

    Raises
    ------
    InvalidArgumentError
        With what to pass instead.
    """
    if hasattr(callback, "remote") and type(callback).__module__.split(".")[0] == "ray":
        raise InvalidArgumentError(
            "eval_callback: expected a function, got a remote one: pass the function that it was"
            f" made of, and as {name} a ray.util.multiprocessing.Pool"
        )
    if pool is not None:
        _starter(pool, name)


def in_order(
    pool: Any, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], name: str
) -> Iterator[Any]:
    """Results of calls in the order of their arguments, which are made as workers get free."""
    if pool is None:
        for arguments in calls:
            yield function(*arguments)
        return
    start = _starter(pool, name)
    waiting: deque[Any] = deque()
    try:
        for arguments in calls:
            waiting.append(start(function, arguments))
            if len(waiting) >= _WAITING:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for future in waiting:
            getattr(future, "cancel", lambda: None)()


def _starter(pool: Any, name: str) -> Callable[[Callable[..., Any], tuple[Any, ...]], Any]:
    """How a pool starts a call; what that gives has ``result`` or ``get``."""
    if hasattr(pool, "get_next"):
        raise InvalidArgumentError(
            f"{name}: got an {type(pool).__name__}, whose actors have methods of their own: pass"
            " ray.util.multiprocessing.Pool(), which runs functions on actors"
        )
    if not isinstance(pool, type):
        if callable(getattr(pool, "submit", None)):
            return lambda function, arguments: pool.submit(function, *arguments)
        if callable(getattr(pool, "apply_async", None)):
            return lambda function, arguments: pool.apply_async(function, arguments)
    got = getattr(pool, "__name__", None) or type(pool).__name__
    raise InvalidArgumentError(f"{name}: {_EXPECTED}, got {got}")


def _result(future: Any) -> Any:
    return future.result() if hasattr(future, "result") else future.get()
