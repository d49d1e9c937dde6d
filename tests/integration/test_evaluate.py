"""Scheduled evaluation with a real MLflow (SQLite): once per checkpoint, despite overlapping, failing or killed passes.

Scores come from a replacement suite; the ledger, storage and MLflow are real."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipeline import storage
from pipeline.commit import read_commit, write_commit
from pipeline.errors import UserError
from pipeline.operations import evaluation
from pipeline.operations import ledger as ledger_module
from pipeline.operations.evaluation import EvaluateConfig, EvaluationScores, evaluate_once
from pipeline.tracking import names, registry, search, start_run
from pipeline.tracking.server import client
from pipeline.weights import checkpoints

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    client(uri)
    return uri


@pytest.fixture
def config(tmp_path, database, monkeypatch):
    monkeypatch.setenv("VIT_SPOOL", str(tmp_path / "spool"))
    monkeypatch.delenv("VIT_WEBHOOK", raising=False)
    return EvaluateConfig(
        runs=(str(tmp_path / "run"),),
        output=str(tmp_path / "ledger"),
        tracking_uri=database,
        data=str(tmp_path / "data"),
    )


def commit(run, step, content=None):
    """A committed checkpoint with the files that evaluation reads; `content` replaces the weights."""
    folder = checkpoints.folder(str(run), step)
    weights = (content or f"weights {run} {step}").encode()
    storage.write_bytes(storage.join(folder, "model.safetensors"), weights)
    files = {"model.safetensors": {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}}
    write_commit(folder, {"step": step, "images_seen": step * 64, "metrics": {}, "files": files})
    return folder


def scored(table, calls=None):
    """A suite that returns table[step] and records the evaluated checkpoints."""

    def evaluate(config, target, output, uri):
        if calls is not None:
            calls.append(target.checkpoint)
        mean = table[target.step] if isinstance(table, dict) else table
        return EvaluationScores(mean=mean, spread=0.5, scores={"pets": mean + 1, "dtd": mean - 1})

    return evaluate


def test_every_checkpoint_is_evaluated_once_and_becomes_a_learning_curve(config, tmp_path):
    with start_run(
        "pretrain", "run", config={"runtime": {"output": str(tmp_path / "run")}}, tracking_uri=config.tracking_uri
    ) as training:
        pass
    calls: list = []
    commit(tmp_path / "run", 10)
    first = evaluate_once(config, evaluate=scored({10: 40.0, 20: 50.0}, calls))
    commit(tmp_path / "run", 20)  # training has continued
    second = evaluate_once(config, evaluate=scored({10: 40.0, 20: 50.0}, calls))
    third = evaluate_once(config, evaluate=scored({10: 40.0, 20: 50.0}, calls))
    assert [len(done.evaluated) for done in (first, second, third)] == [1, 1, 0]
    assert len(calls) == 2
    curves = [
        run for run in search.search_runs("evaluate", uri=config.tracking_uri) if run.name.startswith("demo · run · ")
    ]
    assert len(curves) == 1
    for metric, expected in (
        (names.MEAN_SCORE, [(10, 40.0), (20, 50.0)]),
        (names.IMAGES_SEEN, [(10, 640.0), (20, 1280.0)]),
    ):
        points = client(config.tracking_uri).get_metric_history(curves[0].id, metric)
        assert sorted((point.step, point.value) for point in points) == expected
    assert curves[0].tags["lineage.pretrain"] == training.id


def test_the_same_weights_elsewhere_are_not_evaluated_again_and_new_weights_under_an_old_name_are(config, tmp_path):
    calls: list = []
    commit(tmp_path / "run", 10, "same")
    commit(tmp_path / "copy", 10, "same")
    both = dataclasses.replace(config, runs=(str(tmp_path / "run"), str(tmp_path / "copy")))
    evaluate_once(both, evaluate=scored(40.0, calls))
    assert len(calls) == 1
    commit(tmp_path / "run", 10, "other")
    evaluate_once(config, evaluate=scored(40.0, calls))
    assert len(calls) == 2


def test_another_suite_setting_is_another_evaluation_but_more_workers_are_not(config, tmp_path):
    calls: list = []
    commit(tmp_path / "run", 10)
    for transfer in ({}, {"workers": 7}, {"seeds": 3}):
        changed = dataclasses.replace(config, transfer=dataclasses.replace(config.transfer, **transfer))
        evaluate_once(changed, evaluate=scored(40.0, calls))
    assert len(calls) == 2


def test_two_schedulers_share_the_work_without_repeating_it(config, tmp_path):
    for step in range(1, 9):
        commit(tmp_path / "run", step)
    calls: list = []
    barrier = threading.Barrier(2)

    def slow(config, target, output, uri):
        time.sleep(0.05)
        return scored(40.0, calls)(config, target, output, uri)

    def scheduler():
        barrier.wait()
        evaluate_once(config, evaluate=slow)

    threads = [threading.Thread(target=scheduler) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    evaluate_once(config, evaluate=slow)
    assert sorted(calls) == sorted(set(calls))
    assert len(calls) == 8


DIES = """
import os, sys
from pipeline.operations import evaluation
from pipeline.operations import ledger as ledger_module
def die(config, target, output, uri):
    os.kill(os.getpid(), int(sys.argv[4]))
    import time; time.sleep(60)

import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
evaluation.evaluate_once(
    evaluation.EvaluateConfig(runs=(sys.argv[1],), output=sys.argv[2], tracking_uri=sys.argv[3], data=sys.argv[5]), evaluate=die
)
"""


@pytest.mark.parametrize(("number", "waits"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
def test_a_dead_evaluator_is_replaced(config, tmp_path, monkeypatch, number, waits):
    folder = commit(tmp_path / "run", 10)
    arguments = [config.runs[0], config.output, config.tracking_uri, str(int(number)), config.data]
    environment = {**os.environ, "PYTHONPATH": PROJECT}
    dead = subprocess.run([sys.executable, "-c", DIES, *arguments], env=environment, timeout=120, capture_output=True)
    assert dead.returncode != 0
    calls: list = []
    done = evaluate_once(config, evaluate=scored(40.0, calls))
    if waits:  # killed without a message: only the lease shows it
        assert (calls, done.claimed_elsewhere) == ([], [folder])
        monkeypatch.setattr(ledger_module.Ledger.__init__, "__defaults__", (0.0,))
        done = evaluate_once(config, evaluate=scored(40.0, calls))
    assert calls == [folder]
    assert done.evaluated == [folder]


def test_a_failing_suite_is_retried_a_few_times_and_then_waits_for_a_person(config, tmp_path, caplog):
    commit(tmp_path / "run", 10)
    commit(tmp_path / "run", 20)
    calls: list = []

    def failing(config, target, output, uri):
        calls.append(target.step)
        if target.step == 10:
            raise RuntimeError("out of memory")
        return scored(50.0)(config, target, output, uri)

    rounds = [evaluate_once(config, evaluate=failing) for _ in range(5)]
    reported = [record for record in caplog.records if record.levelname == "ERROR"]
    assert reported
    assert all("step-00000010 failed: out of memory" in record.getMessage() for record in reported)
    assert not any(record.exc_info for record in reported)  # no traceback: its reason is one line
    assert calls.count(10) == ledger_module.ATTEMPTS
    assert calls.count(20) == 1  # the other checkpoint is not affected
    assert "out of memory" in rounds[0].failed[0]
    assert "failed 3 times" in rounds[4].failed[0]


def test_a_result_whose_recording_was_interrupted_is_recorded_later_without_evaluating_again(
    config, tmp_path, monkeypatch
):
    commit(tmp_path / "run", 10)
    calls: list = []
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "record", lambda *_: None)
        evaluate_once(config, evaluate=scored(40.0, calls))
    before = len(list(search.search_runs("evaluate", uri=config.tracking_uri)))
    evaluate_once(config, evaluate=scored(40.0, calls))
    assert len(list(search.search_runs("evaluate", uri=config.tracking_uri))) == before + 1
    assert len(calls) == 1


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"null", b'{"alive": "x"}', b'{"alive": 1e999}', b"[" * 100_000])
def test_an_unreadable_claim_is_replaced(config, tmp_path, garbage):
    folder = commit(tmp_path / "run", 10)
    target = evaluation.find_targets(config, config.tracking_uri)[0]
    ledger = storage.join(config.output, f"demo-{evaluation.suite_version(config)}", target.key)
    storage.write_bytes(f"{ledger}/claim-000.json", garbage)
    storage.write_bytes(f"{ledger}/claim-x.json", garbage)
    assert evaluate_once(config, evaluate=scored(40.0)).evaluated == [folder]


def test_an_unreadable_result_fails_only_its_checkpoint(config, tmp_path):
    first, second = commit(tmp_path / "run", 10), commit(tmp_path / "run", 20)
    target = evaluation.find_targets(config, config.tracking_uri)[0]
    ledger = storage.join(config.output, f"demo-{evaluation.suite_version(config)}", target.key)
    storage.write_bytes(f"{ledger}/result.json", b"[]")
    done = evaluate_once(config, evaluate=scored(40.0))
    assert done.evaluated == [second]
    assert len(done.failed) == 1
    assert done.failed[0].startswith(first)


def test_dry_run_changes_nothing(config, tmp_path):
    folder = commit(tmp_path / "run", 10)
    done = evaluate_once(config, dry_run=True, evaluate=scored(40.0))
    assert done.pending == [folder]
    assert not os.path.exists(config.output)


def test_the_version_of_a_suite_depends_on_the_content_of_its_data_and_not_on_the_path(config, tmp_path):
    for place, fingerprint in (("a", "one"), ("moved", "one"), ("other", "two")):
        for split in ("train", "test"):
            storage.write_json(str(tmp_path / place / split / "manifest.json"), {"fingerprint": fingerprint + split})
    version, moved, other = (
        evaluation.suite_version(dataclasses.replace(config, data=str(tmp_path / place)))
        for place in ("a", "moved", "other")
    )
    assert version == moved != other


@pytest.fixture
def model(config, tmp_path, monkeypatch):
    """A registered model whose versions need no real weights."""
    monkeypatch.setattr(
        registry, "save_classifier", lambda checkpoint, folder: storage.write_bytes(folder + "/MLmodel", b"x: 1\n")
    )
    return dataclasses.replace(config, model=f"vit-{tmp_path.name}", register=True)


def champion(config):
    found = [v for v in registry.versions(config.model, config.tracking_uri) if registry.CHAMPION in v.aliases]
    return found[0].step if found else None


def test_champion_moves_only_for_more_than_noise(model, tmp_path):
    table = {10: 50.0, 20: 50.6, 30: 52.0, 40: 45.0}
    seen = []
    for step in table:
        commit(tmp_path / "run", step)
        done = evaluate_once(model, evaluate=scored(table))
        seen.append((champion(model), bool(done.promoted), bool(done.regressions)))
    # 50.6 against 50.0 with 0.5 each is noise (0.71); 52 is not; 45 is a regression
    assert seen == [(10, True, False), (10, False, False), (30, True, False), (30, False, True)]
    versions = registry.versions(model.model, model.tracking_uri)
    assert [v.step for v in versions] == [10, 20, 30, 40]
    assert registry.CANDIDATE in versions[-1].aliases
    key = f"demo:{evaluation.suite_version(model)}"
    assert versions[2].evaluations[key]["mean"] == 52.0


def test_candidate_is_the_best_by_validation_and_each_version_has_a_card(model, tmp_path):
    validation = str(tmp_path / "validation")
    storage.write_json(validation + "/manifest.json", {"fingerprint": "v1", "rows": 100, "config": {}})
    config = {
        "model": {"variant": "Ti/8", "image_size": 32, "num_classes": 2},
        "classes": ["cat", "dog"],
        "pretrain": {"runtime": {"validation": validation, "licence": "MIT"}},
    }
    candidates = []
    for run, step, top1 in (("first", 10, 97.5), ("second", 20, 81.4), ("third", 30, 98.0)):
        folder = commit(tmp_path / run, step)
        storage.write_json(folder + "/config.json", config)
        write_commit(folder, read_commit(folder) | {"metrics": {names.VAL_TOP1: top1}})
        registry.register(folder, name=model.model, uri=model.tracking_uri)
        versions = registry.versions(model.model, model.tracking_uri)
        candidates += [version.step for version in versions if registry.CANDIDATE in version.aliases]
    assert candidates == [10, 10, 30]
    result = {"mean": 61.5, "spread": 0.4, "scores": {"pets": 61.5}}
    with start_run(names.TRANSFER, "scores", tracking_uri=model.tracking_uri) as run:
        run.log({names.MEAN_SCORE: 61.5, names.SCORE + "pets": 61.5})
    registry.record_evaluation(versions[0], "demo:1", result, run.id, model.tracking_uri)
    card = client(model.tracking_uri).get_model_version(model.model, "1").description
    assert "top-1 97.50% on" in card
    assert "mean 61.50% ± 0.40 (standard error): pets 61.50" in card
    assert "\n\nLicence of the weights: MIT." in card  # plain: lists of versions do not render Markdown
    assert "cat, dog" in card


def test_hook_and_webhook_receive_events_and_their_failures_are_harmless(config, tmp_path, monkeypatch, caplog):
    heard = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if len(heard) > 1 else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("VIT_WEBHOOK", f"http://127.0.0.1:{server.server_port}/?token=secret")
    script = tmp_path / "hook.py"
    script.write_text(f"import sys; open({str(tmp_path / 'events')!r}, 'a').write(sys.stdin.read() + '\\n')")
    hooked = dataclasses.replace(config, hook=f"{sys.executable} {script}")
    commit(tmp_path / "run", 10)
    evaluate_once(hooked, evaluate=scored({10: 50.0, 20: 40.0}))
    commit(tmp_path / "run", 20)
    done = evaluate_once(hooked, evaluate=scored({10: 50.0, 20: 40.0}))
    server.shutdown()
    assert [event["event"] for event in heard] == ["evaluated", "evaluated", "regression"]
    told = (tmp_path / "events").read_text().splitlines()
    assert [json.loads(line)["event"] for line in told] == [event["event"] for event in heard]
    assert len(done.regressions) == 1
    assert "webhook failed" in caplog.text
    assert "secret" not in caplog.text


def test_bad_input_is_an_error_before_anything_is_written(config, tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate_once(dataclasses.replace(config, runs=()))
    with pytest.raises(UserError, match="no such run folder"):
        evaluate_once(config)
    with pytest.raises(UserError, match="30m"):
        evaluation.seconds("half an hour")
    assert not os.path.exists(config.output)


def test_missed_times_are_skipped_and_do_not_accumulate():
    now = [0.0]
    waits = []

    def sleep(length):
        waits.append(length)
        now[0] += length

    ticks = evaluation.ticks(10.0, clock=lambda: now[0], sleep=sleep)
    seen = [next(ticks)]
    now[0] += 3  # a short pass
    seen.append(next(ticks))
    now[0] += 25  # a pass over two times
    seen.append(next(ticks))
    assert (seen, waits) == ([0, 1, 4], [7.0, 5.0])


def test_pruning_keeps_referenced_checkpoints(model, tmp_path):
    folders = {step: commit(tmp_path / "run", step) for step in (10, 20, 30, 40, 50)}
    registry.register(folders[20], name=model.model, uri=model.tracking_uri)
    with start_run("transfer", "t", tags={names.CHECKPOINT: folders[30]}, tracking_uri=model.tracking_uri):
        pass
    found = evaluation.prunable(model.runs, 1, model.tracking_uri)
    assert [item.step for item in found] == [10, 40]
    with open(folders[50] + "/model.safetensors", "ab") as file:
        file.write(b"damage")
    found = evaluation.prunable(model.runs, 1, model.tracking_uri)
    assert [item.step for item in found] == [10, 50]  # the newest valid one stays
    assert evaluation.prunable(model.runs, 5, model.tracking_uri) == []
    with pytest.raises(UserError, match="at least 1"):
        evaluation.prunable(model.runs, 0, model.tracking_uri)


@pytest.mark.slow
def test_pruning_lists_by_default_and_deletes_on_request(tmp_path, database):
    folders = [commit(tmp_path / "run", step) for step in (10, 20, 30)]
    job = [
        sys.executable,
        os.path.join(PROJECT, "jobs", "evaluate.py"),
        "--tracking-uri",
        database,
        "--prune",
        "--json",
    ]
    job += ["--runs", str(tmp_path / "run"), "--keep-last", "1"]
    listed = subprocess.run(job, capture_output=True, text=True, timeout=120)
    assert json.loads(listed.stdout) == {"would_delete": folders[:2]}
    assert all(os.path.exists(folder) for folder in folders)
    deleted = subprocess.run([*job, "--delete"], capture_output=True, text=True, timeout=120)
    assert json.loads(deleted.stdout) == {"deleted": folders[:2]}
    assert [os.path.exists(folder) for folder in folders] == [False, False, True]


def test_command_line_exit_codes(tmp_path, database):
    job = [sys.executable, os.path.join(PROJECT, "jobs", "evaluate.py"), "--tracking-uri", database]
    bad = subprocess.run([*job, "--model", "m", "--once", "--every", "1h"], capture_output=True, text=True, timeout=120)
    assert (bad.returncode, bad.stderr.startswith("error: --once and --every")) == (2, True)
    commit(tmp_path / "run", 10)
    pending = subprocess.run(
        [*job, "--runs", str(tmp_path / "run"), "--data", str(tmp_path / "none"), "--dry-run", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert pending.returncode == 2, pending.stderr  # the suite's data is not there, and nothing was claimed
    assert "tasks cannot run" in pending.stderr
    assert pending.stdout == ""


@pytest.mark.slow
def test_the_leaderboard_ranks_runs_by_score_and_knows_their_compute(tmp_path, monkeypatch):
    """Checkpoints of one run, another family, a repeated transfer, and a transfer of fewer tasks."""
    from pipeline.operations import comparison
    from pipeline.tracking.leaderboard import leaderboard

    monkeypatch.setenv("VIT_SPOOL", str(tmp_path / "spool"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def pretrain(name, variant):
        config = {"output": str(tmp_path / name), "model": {"variant": variant}, "image_size": 224}
        with start_run("pretrain", name, config=config, tracking_uri=uri) as run:
            run.log({names.GPU_HOURS: 3.0})
        return run

    def transfer(source, step, mean, **scores):
        folder = commit(tmp_path / source.name, step)
        tags = {names.CHECKPOINT: folder, names.IMAGES_SEEN: step * 64}
        with start_run("transfer", "t", config={"suite": "vtab1k"}, tags=tags, tracking_uri=uri) as run:
            run.link("pretrain", source.id)
            run.log({names.SCORE + task: score for task, score in scores.items()})
            run.log({names.MEAN_SCORE: mean} if mean else {names.PARTIAL_MEAN: 99.0})
        return run

    class Named:
        def __init__(self, run, name):
            self.id, self.name = run.id, name

    vit, hybrid = (Named(pretrain(name, variant), name) for name, variant in (("vit", "S/16"), ("mixed", "R26+S/32")))
    transfer(vit, 10, 50.0, pets=60.0, dtd=40.0)
    transfer(vit, 20, 10.0, pets=10.0, dtd=10.0)  # repeated below: the newer one counts
    transfer(vit, 20, 70.0, pets=80.0, dtd=60.0)
    transfer(hybrid, 20, 60.0, pets=70.0, dtd=50.0)
    transfer(hybrid, 30, None, pets=99.0)
    rows = leaderboard(uri=uri)
    assert [(row.suite, row.name, row.mean) for row in rows] == [
        ("vtab1k", "vit", 70.0),
        ("vtab1k", "mixed", 60.0),
        ("vtab1k", "vit", 50.0),
        ("vtab1k, some tasks", "mixed", 99.0),
    ]
    assert rows[0].images_seen == 20 * 64  # the checkpoint's own
    assert rows[0].train_flops == pytest.approx(2 * rows[2].train_flops)
    text = comparison.to_markdown(rows, inside=True)
    assert f"[vit]({rows[0].pretrain_path})" in text
    assert rows[0].pretrain_path.endswith(f"/runs/{vit.id}")
    assert comparison.to_markdown(rows, limit=1).count("| 1 |") == 2
    panels = comparison.figure(rows).axes
    assert [panel.get_title() for panel in panels] == ["vtab1k (2 tasks)", "vtab1k, some tasks (1 task)"]
    assert {label.get_text() for label in panels[0].get_legend().get_texts()} == {"ViT", "Hybrid"}
    assert all(panel.get_ylim()[1] <= 100 for panel in panels)
    with pytest.raises(UserError, match='of suite "paper"'):
        leaderboard(suite="paper", uri=uri)
