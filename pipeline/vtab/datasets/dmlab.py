"""DMLab: views from DeepMind Lab, labelled with the distance to the closest reward and its sign. TFRecords in a tar."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.data.sources.tfrecord import parse_example, read_records
from pipeline.errors import UserError
from pipeline.vtab.containers import Tree, damaged
from pipeline.vtab.datasets.base import ArchiveFile, DataSet, FoundFile, Listing, Member, OfficialFile


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    found = files["dmlab.tar.gz"]
    listed: dict[str, list[tuple[str, bytes, int]]] = {"train": [], "validation": [], "test": []}
    for member, example in _records(found.tree, check=False):
        split = member.rpartition("/")[2].removeprefix("dmlab-").partition(".")[0]
        if split in listed:
            try:
                listed[split].append((member, example["filename"][0], int(example["label"][0])))
            except (KeyError, IndexError) as error:
                raise UserError(f"{found.uri}: {member} has no {error}; not a DMLab record") from error
    return [
        Listing(
            split=split,
            file=ArchiveFile(uri=found.uri, prefix=found.prefix, read=read),
            keys=[key.decode() for _, key, _ in rows],
            members=[member for member, _, _ in rows],
            labels={"dmlab": [label for _, _, label in rows]},
        )
        for split, rows in listed.items()
    ]


def read(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    wanted = set(members)
    for member, example in _records(file.tree, check=True):
        if member in wanted:
            yield member, example["image"][0]


def _records(tree: Tree, check: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (member, Example) of all records; a member is <file>#<number of the
    record>. check: verify the checksums of the records."""
    for name, file in tree.walk(lambda name: name.rpartition("/")[2].startswith("dmlab-")):
        where = f"{tree.uri}: {name}"
        with damaged(where):
            for number, record in enumerate(read_records(file, where, check)):
                yield f"{name}#{number}", parse_example(record, where)


DATASET = DataSet(
    name="dmlab",
    files=(
        OfficialFile(
            name="dmlab.tar.gz",
            bytes=3_017_022_789,
            sha256="638b18fa69a5d61bbc310cd0b87ac603a39f41de0fdb07b6e77de274a24480a4",
            url="https://storage.googleapis.com/akolesnikov-dmlab-tfds/dmlab.tar.gz",
            instead=("dmlab-*.tfrecord*",),
        ),
    ),
    # Distance (close, far, very far) x sign of the reward; the records have only numbers, without a documented order.
    classes={"dmlab": [f"distance and reward {label}" for label in range(6)]},
    index=index,
)
