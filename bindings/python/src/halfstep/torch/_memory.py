# SPDX-License-Identifier: Apache-2.0
# Memory of large results, which is used again as soon as nobody holds them any more.
"""Memory for large results.

Handing out fresh pages costs the kernel ten times what a kernel of the engine takes to fill them.
A block goes back into the pool when the last tensor over it is gone, never earlier: what watches
over it is a weak reference to the array that torch's storage holds. So views, tensors that autograd
saved and arrays made from a tensor all keep their block.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import torch

#: Elements from which memory comes from the pool; torch's allocator reuses smaller pieces.
LARGE = 1 << 18


class Pool:
    """Blocks of float32 memory that were used and are free.

    Parameters
    ----------
    limit : int
        Bytes that are kept free at most; what was freed first goes first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free: list[numpy.ndarray] = []
        self._free_bytes = 0
        self._lent: dict[int, weakref.ref[numpy.ndarray]] = {}
        # A block may come back at any moment, even while another is looked for in the same thread:
        # nobody waits for the lock; who does not get it does without the pool.
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Bytes that are kept for later."""
        return self._free_bytes

    def empty(self, shape: torch.Size) -> torch.Tensor:
        """Return an uninitialized row-major float32 tensor on the CPU."""
        count = shape.numel()
        if count < LARGE:
            return torch.empty(shape)
        block = self._take(count)
        if block is None:
            # NumPy asks the kernel for huge pages, torch's allocator does not.
            block = numpy.empty(count, numpy.float32)
        lent = block.reshape(tuple(shape))
        reference = weakref.ref(lent, self._taker_back(block))
        self._lent[id(reference)] = reference
        return torch.from_numpy(lent)

    def release(self) -> None:
        """Give free blocks back to the system."""
        with self._lock:
            free, self._free, self._free_bytes = self._free, [], 0
        del free

    def _take(self, count: int) -> numpy.ndarray | None:
        if not self._lock.acquire(blocking=False):
            return None
        try:
            # The last one freed is the likeliest to be in the caches.
            for index in range(len(self._free) - 1, -1, -1):
                if self._free[index].size == count:
                    self._free_bytes -= 4 * count
                    return self._free.pop(index)
            return None
        finally:
            self._lock.release()

    def _taker_back(self, block: numpy.ndarray) -> Callable[[Any], None]:
        def take_back(reference: weakref.ref[numpy.ndarray]) -> None:
            self._lent.pop(id(reference), None)
            if block.nbytes > self.limit or not self._lock.acquire(blocking=False):
                return
            dropped = []
            try:
                self._free.append(block)
                self._free_bytes += block.nbytes
                while self._free_bytes > self.limit:
                    dropped.append(self._free.pop(0))
                    self._free_bytes -= dropped[-1].nbytes
            finally:
                self._lock.release()

        return take_back


#: What the results of fake quantization lie in.
pool = Pool(limit=1 << 29)


def empty_cache() -> None:
    """Give the memory that is kept for later results back to the system.

    Results of 1 MiB and more lie in memory that is used again once they are gone; at most 512 MiB
    are kept for that.
    """
    pool.release()
