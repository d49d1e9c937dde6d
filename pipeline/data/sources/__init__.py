"""Sources of images: reads every supported layout as one stream of (key, bytes, label names).

    folder     class folders at any level, or any files with a table of file names and labels
    tar        WebDataset samples (.jpg + .cls/.txt/.json), class folders in a tar, ImageNet's tar of tars; compressed or joined
    zip        the same in zip archives
    parquet    an image column (bytes, or Hugging Face's struct of bytes and path) and a label column
    arrow      the same in Arrow files, such as those of Hugging Face's save_to_disk
    tfrecord   tf.train.Example with image/encoded and image/class/label or image/class/text
    urls       lists of addresses (Parquet, CSV, TSV, JSON lines, text), whose images are downloaded
    cifar      CIFAR-10 and CIFAR-100, binary or Python version, as archives or unpacked

`discover` scans a source once, on the driver, and returns a `Source`: a table of *fragments*, each an independent range of the
input (one image file, a stretch of a tar, some row groups) with its size. `read` turns fragments into `Item`s, anywhere.
Label names are text throughout; `Labels` turns them into class indices. Hidden and system files (`words.JUNK`) are
ignored.

    layout     which folders name the classes and the splits        naming     tables and folders together, for every path
    rows       files of tables -> rows                              columns    which column holds what, cells -> label names
    tables     rows -> labels and splits by file name               samples    members of an archive that belong together

Each format is one module with `matches`, `scan` and `read` (`items.SourceFormat`), listed in `discovery.FORMATS`.
"""

from pipeline.data.sources.discovery import FORMATS, discover, discover_unlabelled, key_prefixes, read
from pipeline.data.sources.items import FRAGMENTS, Downloads, Item, ScanOptions, Source, SourceFormat
from pipeline.data.sources.labels import Labels, make_labels, read_label_map
from pipeline.data.sources.listing import SPILL_ROWS, in_batches, list_source, shuffled
from pipeline.data.sources.parallel_listing import ParallelListing
from pipeline.data.sources.prefetch import prefetched
from pipeline.data.sources.tables import Columns, LabelTable, read_label_table

__all__ = [
    "FORMATS",
    "FRAGMENTS",
    "SPILL_ROWS",
    "Columns",
    "Downloads",
    "Item",
    "LabelTable",
    "Labels",
    "ParallelListing",
    "ScanOptions",
    "Source",
    "SourceFormat",
    "discover",
    "discover_unlabelled",
    "in_batches",
    "key_prefixes",
    "list_source",
    "make_labels",
    "prefetched",
    "read",
    "read_label_map",
    "read_label_table",
    "shuffled",
]
