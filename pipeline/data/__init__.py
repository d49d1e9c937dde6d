"""Images into shards, and shards into batches.

open_dataset(uri) -> Dataset       pipeline/data/format/dataset.py
Loader(dataset, batch_size=...)    pipeline/data/loading/loader.py
"""

from typing import TYPE_CHECKING

from pipeline import lazy

if TYPE_CHECKING:
    from pipeline.data.format import Dataset, open_dataset
    from pipeline.data.loading.loader import Loader

__all__ = ["Dataset", "Loader", "open_dataset"]

# On first use: the loader imports torch, which `prepare` workers and --help have no need of.
__getattr__ = lazy.exports(__name__, {"loading.loader": ("Loader",), "format.dataset": ("Dataset", "open_dataset")})
