"""ImageNet's devkit: the labels of the validation images, in ILSVRC2012_devkit_t12.tar.gz."""

import io
import os
import tarfile
import zlib
from typing import IO

from pipeline import storage
from pipeline.errors import UserError
from pipeline.matlab import read_variable
from pipeline.tarheaders import BoundedTarInfo

SYNSETS = "meta.mat"
LABELS = "ILSVRC2012_validation_ground_truth.txt"
MAX_MEMBER_BYTES = 16 << 20  # the official files have less than 1 MB
MAX_MEMBERS = 10_000  # the official archive has less than 100


def is_devkit(uri: str) -> bool:
    """Whether a label table is the devkit, by its name."""
    return "devkit" in uri.lower() and uri.lower().endswith((".tar", ".tar.gz", ".tgz"))


def read_devkit(uri: str) -> dict[str, list[str]]:
    """{file name of a validation image: [WordNet id]}. Raises UserError for a file that is not the devkit, or damaged."""
    try:
        members = _members(uri)
        synsets = read_variable(members[SYNSETS], f"{uri}: {SYNSETS}", "synsets", "ILSVRC2012_ID", "WNID")
        wordnet = {int(number): str(name) for number, name in synsets}
        numbers = [int(number) for number in members[LABELS].read().split()]
        return {f"ILSVRC2012_val_{i:08d}.JPEG": [wordnet[number]] for i, number in enumerate(numbers, 1)}
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    except KeyError as error:
        raise UserError(f"{uri}: not ImageNet's devkit, {error} is missing") from error
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{uri}: not ImageNet's devkit, or damaged ({error}); fetch it again") from error


def _members(uri: str) -> dict[str, IO[bytes]]:
    """The files that have the labels, by base name."""
    found: dict[str, IO[bytes]] = {}
    with (
        storage.open_file(uri) as file,
        tarfile.open(fileobj=file, mode="r|*", tarinfo=BoundedTarInfo) as archive,
    ):
        for count, member in enumerate(archive):
            name = os.path.basename(member.name)
            if count > MAX_MEMBERS:
                raise UserError(f"{uri}: not ImageNet's devkit, it has more than {MAX_MEMBERS:,} members")
            if name in (SYNSETS, LABELS) and (content := archive.extractfile(member)):
                if member.size > MAX_MEMBER_BYTES:
                    raise UserError(f"{uri}: {name} has {member.size:,} bytes; not ImageNet's devkit")
                found[name] = io.BytesIO(content.read())
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
    return found
