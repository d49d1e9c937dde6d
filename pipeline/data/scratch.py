"""Per-thread scratch buffers for pixels, so that decoding and augmentation do not allocate memory per image."""

import math
import threading

import numpy as np

_memory = threading.local()


def scratch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A reused uint8 buffer of this thread, valid until the thread requests the same name again."""
    size, flat = math.prod(shape), getattr(_memory, name, None)
    if flat is None or flat.size < size:
        flat = np.empty(size, np.uint8)
        setattr(_memory, name, flat)
    return flat[:size].reshape(shape)
