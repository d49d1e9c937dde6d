"""Counts images that cannot be decoded and were replaced, over all workers and attempts of a run, with a limit.

replacements = Replacements(limit=100, group=group, state=checkpoint's)
count = replacements.update(loader.replaced)     # at the same steps on every worker; raises UserError above the limit
"""

from collections.abc import Mapping
from typing import Any

from torch import distributed as dist

from pipeline.errors import UserError, plural

NAMED = 1000
"""Maximum number of images that a checkpoint lists; beyond it, only the count is saved."""


class Replacements:
    """The replaced images of a run, the same on every worker. Each image counts once."""

    def __init__(self, *, limit: int | None, group: dist.ProcessGroup | None, state: Any = None):
        """limit: maximum number of replaced images; None: no limit. group: process group; None for a single worker.
        state: the value of `state()` in the checkpoint."""
        state = state or {}
        self.limit = limit
        self.images: dict[str, str] = dict(state.get("images", {}))
        """{key: reason}"""
        self.unnamed = int(state.get("count", 0)) - len(self.images)
        self.group = group
        self._sent = 0

    @property
    def count(self) -> int:
        return self.unnamed + len(self.images)

    def update(self, replaced: Mapping[str, str]) -> int:
        """Adds the images that this worker's loader has replaced. Returns the total of all workers.

        A collective operation. Raises UserError on every worker when the total exceeds the limit.
        """
        new = dict(list(replaced.items())[self._sent :])
        self._sent += len(new)
        parts = [new]
        if self.group is not None:
            parts = [new] * dist.get_world_size(self.group)
            dist.all_gather_object(parts, new, group=self.group)
        for part in parts:
            self.images |= part
        if self.limit is not None and self.count > self.limit:
            key, why = next(reversed(self.images.items()))
            raise UserError(
                f"replaced {plural(self.count, 'image')} that could not be decoded; --max-replaced allows {self.limit}. The last one is "
                f"{key} ({why}); `jobs/prepare.py verify` finds changed shards, otherwise prepare the data again"
            )
        return self.count

    def state(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"count": self.count, "images": dict(list(self.images.items())[:NAMED])}
