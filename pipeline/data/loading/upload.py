"""Batches on their way to the device, on a stream of their own.

    upload = Upload(device)
    batch = upload(batch)      # every tensor of it on the device; what is not a tensor as it was

On a GPU the copy of a batch runs beside the step before it, which is still being computed when the host asks for the next
batch. A copy can do so only from pinned memory: the loader's images are pinned, and small tensors are pinned here. On a CPU
a batch is handed on as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Upload:
    """Copies batches to one device."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its tensors on the device. The current stream waits for the copies; the host does not."""
        if self.stream is None:
            return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            copied = {key: self._copy(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
        current.wait_stream(self.stream)
        for value in copied.values():
            if isinstance(value, Tensor):
                value.record_stream(current)  # the allocator keeps its memory until that stream is done with it
        return copied

    def _copy(self, value: Tensor) -> Tensor:
        if value.device.type == "cpu" and not value.is_pinned():
            value = value.pin_memory()
        return value.to(self.device, non_blocking=True)
