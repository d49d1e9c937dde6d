"""Retinopathy: photographs of retinas from a Kaggle competition (EyePACS, 2015), graded by a clinician.

TFDS's configuration `btgraham-300` defines the images of the task (pipeline/vtab/retinopathy.py).
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from pipeline import storage
from pipeline.errors import UserError
from pipeline.vtab.datasets.base import ArchiveFile, DataSet, FoundFile, Listing, Member, OfficialFile, read_tree
from pipeline.vtab.retinopathy import btgraham

# TFDS split, table of labels, images, and the value in the table's column Usage
PARTS = (
    ("train", "trainLabels.csv", "train", None),
    ("validation", "retinopathy_solution.csv", "test", "Public"),
    ("test", "retinopathy_solution.csv", "test", "Private"),
)


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    """Kaggle's train images are 'train', its test images 'validation' (public leaderboard) and 'test' (private)."""
    listings = []
    for split, table, folder, usage in PARTS:
        text = storage.read_bytes(files[table].uri).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text)))
        try:
            rows = [row for row in rows if usage is None or row["Usage"] == usage]
            keys, labels = [row["image"] for row in rows], [int(row["level"]) for row in rows]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{files[table].uri}: not a table of image, level and Usage ({error!r})") from error
        found = files[folder]
        file = ArchiveFile(uri=found.uri, prefix=found.prefix, read=read, random_access=found.tree.random_access)
        members = [f"{folder}/{key}.jpeg" for key in keys]
        listings.append(Listing(split=split, file=file, keys=keys, members=members, labels={"retinopathy": labels}))
    return listings


def read(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    for name, data in read_tree(file, members):
        try:
            yield name, btgraham(data, str(name))
        except UserError:
            yield name, b""  # becomes a reject, like other images that cannot be decoded


DATASET = DataSet(
    name="diabetic_retinopathy_detection",
    files=(
        OfficialFile(
            name="retinopathy_solution.csv",
            bytes=1_181_257,
            sha256="a6af3d66804e81887da89b9261bcfb7da4f5bacedb070f1b5db83fa879ab60c9",
            url="https://storage.googleapis.com/kaggle-forum-message-attachments/90528/2877/retinopathy_solution.csv",
        ),
        OfficialFile(
            name="trainLabels.csv",
            manual="kaggle.com/c/diabetic-retinopathy-detection/data (an account that accepted the rules); unpack trainLabels.csv.zip",
        ),
        OfficialFile(
            name="train",
            manual="kaggle.com/c/diabetic-retinopathy-detection/data (an account that accepted the rules); join and unpack train.zip.001 to .005: 35,126 JPEGs",
            instead=("train.zip",),
        ),
        OfficialFile(
            name="test",
            manual="kaggle.com/c/diabetic-retinopathy-detection/data (an account that accepted the rules); join and unpack test.zip.001 to .007: 53,576 JPEGs",
            instead=("test.zip",),
        ),
    ),
    classes={"retinopathy": ["no DR", "mild", "moderate", "severe", "proliferative DR"]},
    index=index,
)
