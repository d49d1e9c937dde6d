"""Changes every field of a manifest: verify reports it, or the dataset cannot
be opened, except for listed descriptive fields."""

import copy
import json

import cv2
import numpy as np
import pytest

from jobs.prepare import main
from pipeline.data.format import open_dataset, write_dataset
from pipeline.data.format.verify import verify_dataset, verify_folder
from pipeline.errors import UserError

DESCRIBES = {"history", "mean", "std", "input_fingerprint", "config", "reported_by_reason"}
"""Fields that no reader uses."""
FIELDS = "version encoding image multilabel revision rows inputs deleted deleted_sha256 duplicates duplicates_by_reason rejects fingerprint class_counts classes shards"
SHARD = ("name", "rows", "bytes", "sha256")
COLUMNS = {"rows": 0, "start": 1, "values": 2, "end": 3, "checksum": 4}


def changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, dict):
        return {**value, "other": 1}
    return value[:-1]


@pytest.fixture(params=["jpeg", "patches"])
def place(request, tmp_path):
    """(manifest.json of a dataset of some row groups and shards, its content)."""
    pictures = np.random.default_rng(0).integers(0, 255, (60, 24, 24, 3), dtype=np.uint8)
    geometry = {"height": 24, "width": 24, "channels": 3, "patch_size": 8}
    rows = []
    for i, picture in enumerate(pictures):
        image = cv2.imencode(".jpg", picture)[1].tobytes()
        if request.param == "patches":
            image = picture.reshape(3, 8, 3, 8, 3).swapaxes(1, 2).reshape(9, 192)
        rows.append((f"{i:02d}", image, i % 3, 24, 24))
    about = {"encoding": "patches", "image": geometry} if request.param == "patches" else {}
    write_dataset(str(tmp_path), rows, classes=list("abc"), row_group_bytes=12_000, shard_bytes=30_000, **about)
    path = tmp_path / "manifest.json"
    assert verify_dataset(str(tmp_path)) == []
    return path, json.loads(path.read_text())


def complaints(path, manifest) -> list[str]:
    path.write_text(json.dumps(manifest))
    try:
        return verify_dataset(str(path.parent))
    except UserError as error:
        return [str(error)]


def test_every_field_is_in_the_list(place):
    assert set(place[1]) == {*FIELDS.split(), *DESCRIBES}
    assert set(place[1]["shards"][0]) == {*SHARD, "row_groups"}
    assert len(place[1]["shards"][0]["row_groups"][0]) == len(COLUMNS)


@pytest.mark.parametrize("field", FIELDS.split())
def test_a_changed_field_of_the_manifest(place, field):
    path, manifest = place
    if field == "image" and manifest["encoding"] == "jpeg":
        pytest.skip("empty, and not read")
    value = {**manifest["image"], "height": 32} if field == "image" else changed(manifest[field])
    assert complaints(path, {**manifest, field: value})


@pytest.mark.parametrize("field", SHARD)
def test_a_changed_field_of_a_shard(place, field):
    path, manifest = place
    for number in range(len(manifest["shards"])):
        wrong = copy.deepcopy(manifest)
        wrong["shards"][number][field] = changed(wrong["shards"][number][field])
        assert complaints(path, wrong), number


@pytest.mark.parametrize("column", COLUMNS)
def test_a_changed_number_of_a_row_group(place, column):
    path, manifest = place
    for by in (-1, 1):
        wrong = copy.deepcopy(manifest)
        wrong["shards"][0]["row_groups"][-1][COLUMNS[column]] += by
        assert complaints(path, wrong), by


@pytest.mark.parametrize("field", ["classes", "shards"])
def test_another_order(place, field):
    path, manifest = place
    assert complaints(path, {**manifest, field: manifest[field][::-1]})


def test_a_folder_of_splits_is_verified_as_a_whole(tmp_path, capsys):
    """`verify FOLDER` checks every split, also those below the folders of tasks; a split without its manifest is a
    problem. Other commands name the splits instead of claiming that there is no dataset."""
    for name in ("data/train", "data/val", "tasks/pets/train"):
        rows = [(f"{i}", b"not decoded", i % 2, 8, 8) for i in range(4)]
        write_dataset(str(tmp_path / name), rows, classes=list("ab"))
    assert main(["verify", str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out == "".join(
        f"{tmp_path}/data/{name}: verified, no problems found\n" for name in ("train", "val")
    )
    assert set(verify_folder(str(tmp_path / "tasks"))) == {f"{tmp_path}/tasks/pets/train"}
    (shard,) = (tmp_path / "data" / "val").glob("part-*.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "data" / "train" / "manifest.json").unlink()
    assert main(["verify", str(tmp_path / "data"), "--json"]) == 1
    found = {entry["uri"].rpartition("/")[2]: entry for entry in json.loads(capsys.readouterr().out)["datasets"]}
    assert "bytes, the manifest says" in found["val"]["problems"][0]
    assert "manifest.json: missing, but there are shards" in found["train"]["problems"][0]
    with pytest.raises(UserError, match=r"no dataset here, but in its folders val; name one of them, such as .*/val$"):
        open_dataset(str(tmp_path / "data"))
    with pytest.raises(UserError, match="no dataset here"):
        main(["verify", str(tmp_path / "none")])
