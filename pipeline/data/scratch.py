"""Memory for pixels that each thread reuses: decoding and augmenting allocate nothing per image."""

import math
import threading

import numpy as np

_memory = threading.local()


def scratch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 memory of this thread, reused: valid until the same thread asks for the same name again."""
    size, flat = math.prod(shape), getattr(_memory, name, None)
    if flat is None or flat.size < size:
        flat = np.empty(size, np.uint8)
        setattr(_memory, name, flat)
    return flat[:size].reshape(shape)
