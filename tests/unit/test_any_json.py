"""Arbitrary and invalid JSON in every file that a job reads: one line names the file, or the file is ignored."""

import json

import pytest

from pipeline import storage, workqueue
from pipeline.errors import UserError
from pipeline.graph import results, state
from pipeline.lease import Lease, current_holder
from pipeline.operations.ledger import Ledger, LedgerError, Target, read_record
from pipeline.tracking.spool import find_spools
from pipeline.training import checkpoint
from pipeline.training import run as training_run
from pipeline.transfer import corrections, features, scores
from pipeline.transfer.checkpoint import recorded_run
from pipeline.vtab import archives
from pipeline.weights import checkpoints, description, folders

DEEP = 100_000
TEXTS = {
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
    "open list": "[" * DEEP,
    "list": "[]",
    "null": "null",
    "number": "3",
    "text": '"x"',
    "true": "true",
    "infinity": "1e400",
    "nan": "NaN",
    "a million digits": "1" * 1_000_000,
    "empty": "",
    "no JSON": "{",
    "binary": b"\xff\xfe\0\x80",
    "object": "{}",
    "wrong fields": '{"step": 1e400, "files": [1], "format": 2, "scores": 3, "parts": null, "tasks": [], "stages": 1, "files": 5}',
    "wrong values": '{"step": [], "format": 2, "files": {"x": 1}, "scores": {"a": 1}, "parts": [1], "alive": 1e400}',
    "numbers that are none": '{"started": NaN, "renewed": 1e400, "pid": -1, "id": "a", "name": "b", "host": "c", "alive": NaN}',
}
TARGET = Target(key="step-1", checkpoint="c", step=1, images_seen=None, run="r")


def lease(folder):
    with Lease(folder, "other"):
        pass
    current_holder(folder)


def ledger(folder):
    assert Ledger(folder).claim(TARGET) is not None


# {the file: what reads it, given its folder}
PLACES = {
    "checkpoints/step-00000001/COMMIT.json": lambda folder: (checkpoint.latest(folder), checkpoint.survey(folder)),
    "COMMIT.json": lambda folder: checkpoints.resolve(folder),
    "run.json": lambda folder: (recorded_run(f"{folder}/run.json"), training_run.read_record(f"{folder}/run.json")),
    "launch.json": lease,
    "step-1/claim-000.json": ledger,
    "step-1/result.json": lambda folder: Ledger(folder).result(TARGET),
    "series.json": lambda folder: read_record(f"{folder}/series.json"),
    "scores.json": lambda folder: (scores.read_scores(folder), results.read("transfer", folder)),
    "promotion.json": lambda folder: results.read("promote", folder),
    "_pipeline/state.json": state.load,
    "config.json": description.checkpoint_config,
    "model.safetensors.index.json": lambda folder: folders.read_folder(folder),
    "features.json": lambda folder: features.load_features(folder),
    "real.json": lambda folder: corrections.read_real_labels(f"{folder}/real.json"),
    "seen.json": lambda folder: corrections.read_seen_images(f"{folder}/seen.json", []),
    "MINIATURE.json": lambda folder: archives.verify(folder, "dtd", []),
    "unit-1.json": lambda folder: workqueue.Receipts(folder).read(["unit-1"]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", TEXTS)
def test_any_json_is_one_line_that_names_the_file(tmp_path, place, text):
    content = TEXTS[text]
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = str(tmp_path)
    try:
        PLACES[place](str(tmp_path))
    except (UserError, LedgerError) as error:
        said = str(error)
    assert str(tmp_path) in said
    assert len(said) < 1000


@pytest.mark.parametrize("text", TEXTS)
def test_spool_of_any_json_is_named_and_kept(tmp_path, monkeypatch, text):
    monkeypatch.setenv("VIT_SPOOL", str(tmp_path))
    content = TEXTS[text]
    (tmp_path / "a").mkdir()
    for name in ("lock", "metrics.jsonl"):
        (tmp_path / "a" / name).write_text("")
    (tmp_path / "a" / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert list(find_spools().unreadable) == [str(tmp_path / "a")]


def test_damaged_receipt_is_named_and_its_unit_is_repeated(tmp_path):
    receipts = workqueue.Receipts(str(tmp_path))
    receipt = {"rows": 3, "names": ["ä", 'a"b']}
    receipts.write("unit", receipt)
    assert receipts.read(["unit"]) == [receipt]
    assert storage.read_json(receipts.uri("unit"))["receipt"] == receipt
    changed = storage.read_bytes(receipts.uri("unit")).replace(b"3", b"4")
    storage.write_bytes(receipts.uri("unit"), changed)
    assert json.loads(changed)
    with pytest.raises(UserError, match=r"unit\.json: damaged receipt, now removed"):
        receipts.read(["unit"])
    assert receipts.finished() == set()
