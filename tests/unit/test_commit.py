"""COMMIT.json of a checkpoint: what it says is what was written, or it is refused."""

import contextlib
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.commit import Damaged, read_commit, write_commit
from pipeline.errors import UserError
from pipeline.weights import checkpoints
from tests.runs import commit_checkpoint


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "run" / "checkpoints" / "step-00000020"
    storage.write_bytes(str(place / "model.safetensors"), b"weights")
    return Path(commit_checkpoint(place, 20, total_steps=30, metrics={"val/top1": 71.5, "loss_last": 1e-7}))


def test_no_flipped_bit_changes_what_a_commit_says(folder):
    """Every bit in turn: the file is refused, or the bit is in white space and says nothing."""
    file = folder / "COMMIT.json"
    content, said = file.read_bytes(), read_commit(str(folder))
    accepted = 0
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        with contextlib.suppress(UserError):
            assert read_commit(str(folder)) == said
            accepted += 1
    assert 0 < accepted < 8 * len(content) / 10


def test_a_commit_belongs_to_the_step_in_the_name_of_its_folder(folder):
    assert checkpoints.read(str(folder)).step == 20
    folder.rename(folder.parent / "step-00000070")
    with pytest.raises(Damaged, match=r"step-00000070: its COMMIT\.json belongs to step 20"):
        read_commit(str(folder.parent / "step-00000070"))
    (folder.parent / "step-00000070").rename(folder.parent / "step-00000020-3f9a01c2b4d5")
    assert read_commit(str(folder.parent / "step-00000020-3f9a01c2b4d5"))["step"] == 20
    (folder.parent / "step-00000020-3f9a01c2b4d5").rename(folder.parent / "best")
    assert read_commit(str(folder.parent / "best"))["step"] == 20


def test_what_is_written_is_what_is_read(tmp_path):
    about = {"step": 1, "files": {}, "metrics": {"ä": 0.1 + 0.2, "b": 1e300}, 3: (1, None)}
    written = write_commit(str(tmp_path), about)
    assert read_commit(str(tmp_path)) == written
    assert written["3"] == [1, None]
