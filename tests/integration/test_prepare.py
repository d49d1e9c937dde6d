"""`prepare` on real Ray and over real HTTP to an S3 endpoint: complete, resumable, byte-identical."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage, workqueue
from pipeline.data import sources
from pipeline.data.format import open_dataset
from pipeline.data.format.verify import verify_dataset
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.prepare.checks import check_config
from pipeline.data.prepare.plan import claim_output, make_plan, slice_name
from pipeline.data.prepare.run import prepare_slices
from pipeline.data.prepare.worker import prepare_slice
from pipeline.data.sources import tfrecord
from pipeline.errors import UserError
from pipeline.tracking import start_run
from pipeline.tracking.server import client as tracking_client
from tests.faultproxy import FaultProxy
from tests.images import crop, textured
from tests.objectstore import copy_folder
from tests.prepared import content, job, many

JOB = str(Path(__file__).parents[2] / "jobs" / "prepare.py")


def test_rerun_after_a_stop_gives_the_same_bytes(ray_local, image_folder, tmp_path, caplog):
    source = str(many(image_folder))
    options = {"source": (source,), "splits": ("train=0.8", "test=0.2")}
    whole = prepare(PrepareConfig(output=str(tmp_path / "whole"), **options))
    assert whole["train"].rows + whole["test"].rows == 780
    assert whole["train"].inputs + whole["test"].inputs == 781
    assert verify_dataset(str(tmp_path / "whole" / "train")) == verify_dataset(str(tmp_path / "whole" / "test")) == []

    # A job that died: half of the units have receipts, one more left a shard without a receipt and a half-written file.
    config = check_config(PrepareConfig(output=str(tmp_path / "torn"), **options))
    plan = claim_output(make_plan(config))
    assert len(plan.slices) > 3
    for number in (0, 2, 3):
        receipt = prepare_slice(number, plan)
        if number != 3:
            plan.receipts.write(slice_name(number), receipt)
    (tmp_path / "torn" / "train" / ".part-half.tmp").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="unfinished dataset of another command"):
        prepare(PrepareConfig(output=str(tmp_path / "torn"), **options | {"size": 128}))
    logging.getLogger("pipeline").propagate = True  # an earlier job in this process may have disabled it
    with caplog.at_level(logging.INFO, "pipeline"):
        prepare(config)
    assert f"2 of {len(plan.slices)} units are already done" in caplog.text
    assert content(tmp_path / "torn") == content(tmp_path / "whole")

    # The same command has nothing to do. Other options or another input are refused, and nothing is changed.
    assert prepare(config) == whole
    with pytest.raises(UserError, match=r"already contains another dataset .*quality: 90, now 80"):
        prepare(PrepareConfig(output=str(tmp_path / "torn"), **options | {"quality": 80}))
    os.remove(os.path.join(source, "bee", "001.jpg"))
    with pytest.raises(UserError, match="the source files have changed"):
        prepare(config)
    assert content(tmp_path / "torn") == content(tmp_path / "whole")


def test_a_preparation_is_one_mlflow_run_over_all_attempts(ray_local, image_folder, tmp_path):
    """Counts, rejects and manifest are in the run; the dataset is byte for byte the same as without a run; a run that
    reads a copy of the dataset links back."""
    (image_folder / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    options = {"source": (str(image_folder),), "splits": ("train=0.8", "test=0.2")}
    server = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match="1 of 31 inputs were rejected"):
        prepare(PrepareConfig(output=str(tmp_path / "out"), max_reject_fraction=0, **options), tracking_uri=server)
    first = json.loads((tmp_path / "out" / "_work" / "run.json").read_text())["run_id"]
    manifests = prepare(PrepareConfig(output=str(tmp_path / "out"), **options), tracking_uri=server)
    with workqueue.without_ray():
        prepare(PrepareConfig(output=str(tmp_path / "plain"), **options))
    assert content(tmp_path / "out") == content(tmp_path / "plain")

    mlflow = tracking_client(server)
    experiment = mlflow.get_experiment_by_name("prepare").experiment_id
    (run,) = mlflow.search_runs([experiment])
    assert (run.info.run_id, run.info.status) == (first, "FINISHED")
    assert run.info.run_name == f"out · {first[:4]}"
    expected = {"data/inputs": 31, "data/rows": 30, "data/rejects": 1, "data/rejected/corrupt": 1, "data/duplicates": 0}
    assert {name: run.data.metrics[name] for name in expected} == expected
    assert run.data.metrics["data/inputs_per_second"] > 0
    assert run.data.params["quality"] == "90"
    assert run.data.tags["data.fingerprint.train"] == manifests["train"].fingerprint
    assert {entry.dataset.digest for entry in run.inputs.dataset_inputs} == {m.fingerprint for m in manifests.values()}
    artifacts = tmp_path / "mlruns" / "prepare" / first / "artifacts"
    about = json.loads((artifacts / "data" / "test-manifest.json").read_text())
    assert about["class_counts"] == manifests["test"].class_counts
    rejects = "".join(path.read_text() for path in artifacts.glob("rejects/*.csv"))
    assert "ant/broken.jpg" in rejects

    with start_run("pretrain", "reader", tracking_uri=server) as reader:
        reader.log_dataset("s3://elsewhere/train", {"fingerprint": manifests["train"].fingerprint})
        reader.log_dataset("s3://elsewhere/other", {"fingerprint": "0123456789abcdef"}, role="other")
    assert mlflow.get_run(reader.id).data.tags["lineage.prepare"] == first


def test_a_worker_s_error_reaches_the_user(ray_local, image_folder, tmp_path):
    """An error that stops a worker is raised unchanged on the driver, and the output does not look finished."""
    config = check_config(PrepareConfig(source=(str(image_folder),), output=str(tmp_path / "out")))
    plan = make_plan(config)
    wrong = [dataclasses.replace(source, kind="parquet") for source in plan.sources]
    with pytest.raises(UserError, match="not a Parquet file"):
        prepare_slices(claim_output(dataclasses.replace(plan, sources=wrong)))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_duplicates_and_evaluation_images_are_removed(ray_local, tmp_path):
    photos = [textured(seed) for seed in range(300)]
    corpus, evaluation = tmp_path / "corpus", tmp_path / "evaluation"
    for name in ("a", "b"):
        (corpus / name).mkdir(parents=True)
    for i, pixels in enumerate(photos):
        cv2.imwrite(str(corpus / "ab"[i % 2] / f"{i:03d}.png"), pixels)
    cv2.imwrite(str(corpus / "a" / "zero-again.png"), photos[0])
    cv2.imwrite(str(corpus / "b" / "one-mirrored.jpg"), photos[1][:, ::-1])
    cv2.imwrite(
        str(corpus / "b" / "two-resized.jpg"), cv2.resize(photos[2], None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
    )
    (evaluation / "x").mkdir(parents=True)
    cv2.imwrite(str(evaluation / "x" / "three.png"), cv2.resize(photos[3], (32, 32), interpolation=cv2.INTER_AREA))
    cv2.imwrite(str(evaluation / "x" / "four.jpg"), crop(photos[4], y=0.1)[:, ::-1])
    options = {"deduplicate": "near", "decontaminate": (str(evaluation),), "unit_bytes": 3_000_000, "shuffle": False}
    config = PrepareConfig(source=(str(corpus),), output=str(tmp_path / "out"), **options)
    assert len(make_plan(check_config(config)).slices) > 2
    manifest = prepare(config)[""]
    assert (manifest.inputs, manifest.rows, manifest.duplicates) == (303, 298, 5)
    records = {r["key"]: r for r in pq.read_table(tmp_path / "out" / "duplicates.parquet").to_pylist()}
    assert {key: (r["reason"], r["match"]) for key, r in records.items()} == {
        "a/zero-again.png": ("exact", "a/000.png"),
        "b/one-mirrored.jpg": ("near", "b/001.png"),
        "b/two-resized.jpg": ("near", "a/002.png"),
        "b/003.png": ("near", "x/three.png"),
        "a/004.png": ("near", "x/four.jpg"),
    }
    kept = set(open_dataset(config.output).table()["key"].to_pylist())
    assert len(kept) == 298
    assert not kept & set(records)
    assert verify_dataset(config.output) == []
    assert cv2.imread(str(tmp_path / "out" / "duplicates.png")) is not None
    report = dataclasses.replace(config, deduplicate="report", decontaminate=(), output=str(tmp_path / "report"))
    assert (prepare(report)[""].rows, prepare(report)[""].duplicates) == (303, 0)
    listed = pq.read_table(tmp_path / "report" / "duplicates.parquet")["key"].to_pylist()
    assert sorted(listed) == ["a/zero-again.png", "b/one-mirrored.jpg", "b/two-resized.jpg"]


def test_s3_in_and_out_through_the_job(image_folder, s3):
    (image_folder / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    copy_folder(image_folder, f"{s3}/raw")
    storage.copy_file(image_folder / "ant" / "001.jpg", f"{s3}/raw/ant/a [1]*?#%20é.jpg")
    command = ["--source", f"{s3}/raw", "--output", f"{s3}/set", "--recipe", "patches32", "--json"]
    result = job(*command)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)["dataset"]
    assert (summary["prepared"], summary["rejects"], summary["classes"]) == (31, 1, 3)
    assert summary["rejects_by_reason"] == {"corrupt": 1}
    dataset = open_dataset(f"{s3}/set")
    assert verify_dataset(dataset.uri) == []
    assert {row["image"].shape for row in dataset.read([29, 0, 7])} == {(64, 48)}
    keys = dataset.table()["key"].to_pylist()
    assert keys == [row["key"] for row in dataset.read(range(31))]
    assert "ant/a [1]*?#%20é.jpg" in keys
    assert sorted(file.path for file in storage.list_files(dataset.uri)) == [
        "manifest.json",
        "part-00000-0000.parquet",
        "rejects.parquet",
    ]


@pytest.mark.parametrize("kind", ["parquet", "tfrecord", "tar"])
def test_a_failing_store_is_not_reported_as_a_damaged_file(image_folder, s3, s3_server, tmp_path, monkeypatch, kind):
    data = (image_folder / "ant" / "001.jpg").read_bytes()
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"image": [data] * 9, "label": [1] * 9}), path, row_group_size=3)
    elif kind == "tfrecord":
        with open(path, "wb") as file:
            tfrecord.write_record(file, tfrecord.encode_example({"image/encoded": data, "image/class/label": 1}))
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(image_folder, "images")
    storage.copy_file(str(path), f"{s3}/{path.name}")
    [source] = sources.discover([f"{s3}/{path.name}"])
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.fault = lambda method, path, n: "403" if method == "GET" else None
        with pytest.raises(UserError, match=f"s3://.*a.{kind}: "):
            list(sources.read(source, source.fragments))


def test_invalid_commands_fail_at_once(image_folder, tmp_path):
    begin = time.monotonic()
    for arguments, message in [
        (["--source", image_folder], "no --output"),
        (["--source", tmp_path / "none", "--output", tmp_path / "out"], "no such file or folder"),
        (["--recipe", "jpeg25"], 'did you mean "jpeg256"?'),
        (["verify", tmp_path], "no dataset here"),
    ]:
        result = job(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
    assert time.monotonic() - begin < 40  # none of them started Ray
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_preparation_continues(image_folder, tmp_path):
    """Two runs end by SIGKILL to the whole process group; the third run produces the dataset of an uninterrupted
    run."""
    source = many(image_folder, copies=400)
    command = [sys.executable, JOB, "--source", str(source), "--max-reject-fraction", "1", "--output"]
    for _ in range(2):
        process = subprocess.Popen([*command, str(tmp_path / "torn")], start_new_session=True)
        before = len(list((tmp_path / "torn" / "_work").glob("unit-*"))) if (tmp_path / "torn").exists() else 0
        for _ in range(1200):
            if len(list((tmp_path / "torn" / "_work").glob("unit-*"))) >= before + 3:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "torn" / "manifest.json").exists()
    for name in ("torn", "whole"):
        result = job(*command[2:], tmp_path / name)
        assert result.returncode == 0, result.stderr
    assert content(tmp_path / "torn") == content(tmp_path / "whole")
