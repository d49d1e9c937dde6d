"""Copies batches to the device on a separate CUDA stream.

    upload = Upload(device)
    batch = upload(batch)      # tensors are on the device; other values are unchanged

On a GPU the copy of a batch overlaps the previous step, which is still being computed when the host requests the next
batch. Copies overlap only from pinned memory: the loader pins images, and this module pins small tensors. On a CPU the
batch is returned unchanged.
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
        """The batch with its tensors on the device. The current stream waits for the copies, the host does not."""
        if self.stream is None:
            return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            copied = {key: self._copy(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
        current.wait_stream(self.stream)
        for value in copied.values():
            if isinstance(value, Tensor):
                value.record_stream(current)  # the allocator does not reuse the memory before this stream has used it
        return copied

    def _copy(self, value: Tensor) -> Tensor:
        if value.device.type == "cpu" and not value.is_pinned():
            value = value.pin_memory()
        return value.to(self.device, non_blocking=True)
