"""Images into shards, and shards into batches.

open_dataset(uri) -> Dataset       pipeline/data/format/dataset.py
Loader(dataset, batch_size=...)    pipeline/data/loading/loader.py
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.format import Dataset, open_dataset
    from pipeline.data.loading.loader import Loader

__all__ = ["Dataset", "Loader", "open_dataset"]


def __getattr__(name: str) -> Any:
    # On first use: the loader imports torch, which `prepare` workers and --help have no need of.
    if name == "Loader":
        from pipeline.data.loading.loader import Loader

        return Loader
    if name in ("open_dataset", "Dataset"):
        from pipeline.data.format import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
