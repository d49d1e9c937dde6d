"""What a pipeline shows: the state of each stage, its progress, and its cost next to the estimate."""

import contextlib
import dataclasses
import time

import pytest

from pipeline import logs, storage
from pipeline.graph import commands, estimate, report, results, runner
from pipeline.graph.file import Prices
from pipeline.graph.runner import Runner
from tests.graphs import Fake, chain, go, plan_of


@pytest.fixture
def source(tmp_path):
    storage.write_bytes(str(tmp_path / "source/ant/1.png"), b"ant")
    return tmp_path / "source"


def shown(pipeline):
    """{stage: the rest of its line} of `status`."""
    plan = plan_of(pipeline)
    text = report.status_table(plan, plan.survey())
    assert all(len(line) <= 80 for line in text.splitlines())
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    return {words[0]: " ".join(words[1].split()) for words in lines if words and words[0] in plan.instances}


def test_status_says_what_is_done_stale_failed_or_stopped_and_why(tmp_path, source):
    pipeline = chain(tmp_path / "out", source)
    assert shown(pipeline)["data"] == "waiting ready"
    go(pipeline, Fake({"transfer[tasks=knn]": [1, 1], "transfer[tasks=linear]": [143]}))
    found = shown(pipeline)
    assert found["data"].startswith("done 1 s")
    assert found["pretrain"] == "done 1 s: 1 step"
    assert found["transfer[tasks=linear]"].startswith("stopped")
    assert found["transfer[tasks=knn]"].startswith("failed told to")
    go(pipeline)
    found = shown(chain(tmp_path / "out", source, pretrain={"augment.area": [0.21, 1.0]}))
    assert found["data"].startswith("done")
    assert found["pretrain"].startswith("stale augment.area: ")
    assert found["transfer[tasks=knn]"] == "stale after pretrain"


class Frozen(Fake):
    """Executor whose first pre-training has done a quarter of its steps in 100 s when its runner is killed."""

    def look(self, job, log):
        if "pretrain" not in job:
            return super().look(job, log)
        now = time.time()
        progress = {"share": 0.25, "first": 0.0, "began": now - 100, "time": now, "note": "step 25 of 100"}
        storage.write_json(results.progress_place(self.root, job), progress)
        raise KeyboardInterrupt


class Slow(Frozen):
    """Reports progress once, and then ends."""

    def look(self, job, log):
        if job not in self.seen:
            self.seen.add(job)
            with contextlib.suppress(KeyboardInterrupt):
                return super().look(job, log)
            return None
        return Fake.look(self, job, log)


def test_a_run_reports_the_progress_of_its_stages(tmp_path, source, monkeypatch, caplog):
    monkeypatch.setattr(runner, "REPORT_EVERY", 0.0)
    pipeline = chain(tmp_path / "out", source)
    executor = Slow()
    executor.root, executor.seen = pipeline.root, set()
    with caplog.at_level("INFO"):
        go(pipeline, executor)
    assert "pretrain: running, 25%, 5 min left: step 25 of 100" in caplog.text


def test_status_of_a_running_stage_has_its_progress_and_the_remaining_time(tmp_path, source):
    pipeline = chain(tmp_path / "out", source)
    executor = Frozen()
    executor.root = pipeline.root
    with pytest.raises(KeyboardInterrupt):
        go(pipeline, executor)
    assert shown(pipeline)["pretrain"].startswith("running 25%, 5 min left: step 25 of 100")
    plan = plan_of(pipeline)
    progress = report.status_json(plan, plan.survey())["stages"]["pretrain"]["progress"]
    assert progress["share"] == 0.25
    assert progress["seconds_left"] == pytest.approx(300, abs=60)


def test_parts_of_a_job_add_up_and_repeated_work_is_estimated_anew(tmp_path, monkeypatch):
    """First like a transfer of two encoders, whose features take an unknown time; then like a restart from a
    checkpoint."""
    place = results.progress_place(str(tmp_path), "job")
    monkeypatch.setenv(logs.PROGRESS, place)
    monkeypatch.setattr(logs, "REPORT_EVERY", 0.0)
    shares = []

    def report(share):
        logs.report_share(share)
        shares.append(results.read_progress(str(tmp_path), "job").share)

    for begin, end in ((0.0, 0.5), (0.5, 1.0)):
        with logs.part_of_job(begin, end):
            with logs.part_of_job(0.0, 0.0):
                report(0.9)
            report(0.5)
    assert shares == [0.0, 0.25, 0.5, 0.75]
    assert storage.read_json(place)["first"] == 0.0
    report(0.6)
    assert storage.read_json(place)["first"] == 0.6
    assert results.read_progress(str(tmp_path), "job").left is None  # no rate yet


def test_the_price_of_each_stage_is_beside_its_estimate(tmp_path, source):
    prices = Prices(cpu_hour=36.0, gpu_hour=360.0)
    given = chain(tmp_path / "out", source, data={"num_cpus": 2}, transfer={"workers": 1})
    pipeline = dataclasses.replace(given, prices=prices)
    plan = plan_of(pipeline)
    estimates = {name: estimate.estimate(plan, name, 4.0).seconds for name in plan.instances}
    executor = Fake()
    executor.gpus = 2.0
    Runner(plan, list(plan.instances), executor).run()
    *rows, total = report.cost_rows(plan, plan.survey(), estimates)
    table = {row[0]: dict(zip(report.HEADER, row, strict=True)) for row in rows}
    # one second of two CPUs at a cent each, and of a GPU at ten cents
    assert (table["data"]["$"], table["data"]["GPU-h"], table["data"]["time"]) == ("0.0200", "", "1 s")
    assert float(table["transfer[tasks=knn]"]["$"]) >= 0.10
    assert all(row["est."] and row["read"] and row["written"] for row in table.values())
    assert float(total[-1]) == pytest.approx(sum(float(row["$"]) for row in table.values()))
    text = report.cost_table([*rows, total])
    assert "CPU-h GPU-h" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_sentence_says_what_is_done_and_found(tmp_path, source):
    pipeline = chain(tmp_path / "out", source)
    plan = plan_of(pipeline)
    assert report.sentence(plan, plan.survey()) == "chain: 0 of 4 stages done."
    go(pipeline)
    plan = plan_of(pipeline)
    text = report.sentence(plan, plan.survey())
    assert text.startswith("chain: 4 of 4 stages done. ")
    assert "transfer[tasks=knn]: linear 90.00" in text


def test_a_dry_run_has_hours_and_dollars_in_all(tmp_path, source):
    place = tmp_path / "p.yaml"
    place.write_text(
        f"name: x\noutput: {tmp_path}/out\nprices: {{cpu_hour: 360000}}\n"
        "stages: {a: {job: prepare, recipe: demo, fields: {num_cpus: 1}, matrix: {seed: [0, 1]}}}\n"
    )
    lines = []
    assert commands.main(["run", str(place), "--dry-run"], "", lines.append) == 0
    header, first, second, whole = [line.split() for line in lines[0].splitlines()[2:]]
    assert header == ["stage", "time", "CPU-h", "GPU-h", "$", "why"]
    seconds, dollars = float(first[1]), float(first[4].replace(",", ""))
    assert (first[0], first[2]) == ("a[seed=0]", "s")
    assert dollars == pytest.approx(100 * seconds, abs=51)  # a second costs 100 dollars
    assert float(whole[5].replace(",", "")) == pytest.approx(2 * dollars, abs=0.02)
    assert second[0] == "a[seed=1]"
    assert not (tmp_path / "out").exists()
