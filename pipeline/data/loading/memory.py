"""Memory for batches of images."""

import weakref

import numpy as np


class BatchMemory:
    """Reuses the memory of batches that are no longer referenced. Fresh memory would cost a twentieth of the time that
    JPEG decoding takes, for page faults."""

    def __init__(self, shape: tuple[int, ...], keep: int) -> None:
        self.shape, self.keep = shape, keep
        self._free: list[np.ndarray] = []
        self._lent: dict[int, weakref.ref] = {}

    def take(self, n: int) -> np.ndarray:
        """A uint8 array (n, ...). A tensor created from it keeps a reference to the
        array as long as a view of it exists."""
        memory = self._free.pop() if self._free else np.empty(self.shape, np.uint8)
        lent = memory[:n]
        self._lent[id(memory)] = weakref.ref(lent, lambda _: self._give_back(memory))
        return lent

    def _give_back(self, memory: np.ndarray) -> None:
        del self._lent[id(memory)]
        if len(self._free) < self.keep:
            self._free.append(memory)
