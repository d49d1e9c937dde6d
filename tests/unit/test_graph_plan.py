"""Which stages are done or stale, and why; the runner, with an executor without processes."""

import dataclasses
import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.address import shares
from pipeline.commit import write_commit
from pipeline.data.format import open_dataset, revisions
from pipeline.errors import Unavailable, UserError
from pipeline.graph import file, fingerprints, runner, state
from pipeline.graph.file import Pipeline, Stage
from pipeline.graph.record import PipelineRecord
from pipeline.graph.runner import Runner
from pipeline.tracking import names, search, server
from pipeline.training.recipes import RECIPES
from tests.datasets import write_tinted
from tests.graphs import Fake, chain, go, plan_of, states


@pytest.fixture
def source(tmp_path):
    for name in ("ant/1.png", "bee/2.png"):
        storage.write_bytes(str(tmp_path / "source" / name), name.encode())
    return tmp_path / "source"


ALL = ["data", "pretrain", "transfer[tasks=linear]", "transfer[tasks=knn]"]


def test_done_stages_are_not_repeated(tmp_path, source):
    executor = Fake()
    assert sorted(go(chain(tmp_path / "out", source), executor).done) == sorted(ALL)
    again = go(chain(tmp_path / "out", source))
    assert (again.done, sorted(again.kept)) == ([], sorted(ALL))
    assert {state for state, _ in states(chain(tmp_path / "out", source)).values()} == {"done"}


def test_a_changed_crop_makes_the_transfers_stale_and_a_changed_number_of_workers_does_not(tmp_path, source):
    go(chain(tmp_path / "out", source))
    runtime = chain(
        tmp_path / "out", source, pretrain={"workers": 1, "validate_every": "1steps"}, transfer={"workers": 2}
    )
    assert {state for state, _ in states(runtime).values()} == {"done"}
    crop = chain(tmp_path / "out", source, pretrain={"augment.area": [0.21, 1.0]})
    found, area = states(crop), list(RECIPES["demo"]().augment.area)
    assert found["data"][0] == "done"
    assert found["pretrain"] == ("stale", f"augment.area: {area} -> [0.21, 1.0]")
    assert found["transfer[tasks=knn]"] == ("stale", "after pretrain")
    assert go(crop).kept == ["data"]
    assert {state for state, _ in states(chain(tmp_path / "out", source)).values()} == {
        "done"
    }  # both versions are kept


def test_only_descendants_run_and_equal_output_ends_it(tmp_path, source):
    go(chain(tmp_path / "out", source))
    storage.write_bytes(str(source / "ant" / "3.png"), b"new data")
    assert states(chain(tmp_path / "out", source))["data"] == ("stale", "source has changed")
    outcome = go(chain(tmp_path / "out", source))
    assert outcome.done == ["data"]  # prepare found the same content: nothing after it is done again
    assert len(outcome.kept) == 3


@pytest.mark.parametrize("what", ["output", "source", "both"])
def test_a_folder_that_was_moved_or_touched_changes_nothing(tmp_path, source, what):
    go(chain(tmp_path / "out", source))
    out = tmp_path / "out"
    if what != "source":
        out = Path(shutil.move(tmp_path / "out", tmp_path / "elsewhere"))
    if what != "output":
        source = Path(shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile))
    assert {state for state, _ in states(chain(out, source)).values()} == {"done"}


def test_other_bytes_of_the_same_size_are_new_data(tmp_path, source):
    go(chain(tmp_path / "out", source))
    storage.write_bytes(str(source / "ant" / "1.png"), b"ANT/1.png")
    assert states(chain(tmp_path / "out", source))["data"][0] == "stale"


def test_an_option_that_did_not_exist_had_its_default(tmp_path, source):
    pipeline = chain(tmp_path / "out", source)
    go(pipeline)
    place = Path(state.load(pipeline.root).uri)
    plain = json.loads(place.read_text())
    for record in plain["stages"].values():
        (version,) = record["versions"]
        version["identity"] = "of an earlier program"
        for option in ("deduplicate", "label_smoothing", "l2"):
            version["about"]["config"].pop(option, None)
    place.write_text(json.dumps(plain))
    assert {state for state, _ in states(pipeline).values()} == {"done"}
    other = chain(tmp_path / "out", source, pretrain={"label_smoothing": 0.1})
    assert states(other)["pretrain"][0] == "stale"


def test_a_mixture_depends_on_all_of_its_stages_and_on_their_shares(tmp_path, source):
    """The folders of a matrix have commas and equals signs in their names."""

    def mixed(data):
        sets = {"source": str(source), "splits": ["train=1"]}
        stages = {
            "small": Stage(job="prepare", fields=sets, matrix={"size": [16], "quality": [80]}),
            "large": Stage(job="prepare", fields={**sets, "size": 48}),
            "pretrain": Stage(job="pretrain", recipe="demo", fields={"data": data, "validation": None}),
        }
        return file.check_pipeline(
            Pipeline(name="mixed", output=str(tmp_path / "mixed"), stages=stages, retries=1), "test"
        )

    pipeline = mixed("${small.output}/train=0.7,${large.output}/train=3e-1")
    plan = plan_of(pipeline)
    (name,) = [name for name in plan.instances if name.startswith("pretrain")]
    assert plan.instances[name].needs == ("small[size=16,quality=80]", "large")
    outputs = {need: plan.folder(need) for need in plan.instances[name].needs}
    words = plan.command(name, outputs)
    assert shares(words[words.index("--data") + 1]) == [
        (f"{outputs['small[size=16,quality=80]']}/train", Fraction(7, 10)),
        (f"{outputs['large']}/train", Fraction(3, 10)),
    ]
    (other,) = [
        name for name in plan_of(mixed("${small.output}/train=1,${large.output}/train=1")).instances if "pre" in name
    ]
    identities = {plan.tree(name)}
    for weights in (("0.7", "0.3"), ("7", "3"), ("1", "1")):
        again = plan_of(
            mixed("${small.output}/train=A,${large.output}/train=B".replace("A", weights[0]).replace("B", weights[1]))
        )
        identities.add(again.tree(other))
    assert len(identities) == 2


def test_a_revision_of_a_dataset_is_an_input_of_its_own(tmp_path):
    uri = write_tinted(str(tmp_path / "set"), 6, 16)
    newest = open_dataset(uri).manifest
    revisions.publish(uri, revisions.successor(newest, 2, {"kind": "append"}, fingerprint="other"))
    found = [fingerprints.Fingerprints().fingerprint(text) for text in (uri, f"{uri}@2", f"{uri}@1")]
    assert found == ["other", "other", newest.fingerprint]
    with pytest.raises(UserError, match="nothing is there"):
        fingerprints.Fingerprints().fingerprint(str(tmp_path / "none@1"))


def test_a_new_checkpoint_of_a_run_makes_a_new_version_of_what_follows(tmp_path):
    """A run that is still training, outside the pipeline: its newest checkpoint is the input."""
    storage.write_bytes(str(tmp_path / "data" / "manifest.json"), b'{"fingerprint": "data"}')
    fields = {"checkpoint": str(tmp_path / "run"), "data": str(tmp_path / "data")}
    stages = {"transfer": Stage(job="transfer", recipe="demo", fields=fields)}
    pipeline = file.check_pipeline(Pipeline(name="follow", output=str(tmp_path / "out"), stages=stages), "test")

    def save(step):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        files = {"model.safetensors": {"sha256": f"weights of step {step}", "size": 1}}
        storage.write_bytes(str(folder / "model.safetensors"), b"x")
        write_commit(str(folder), {"step": step, "files": files})

    save(1)
    go(pipeline)
    assert states(pipeline)["transfer"][0] == "done"
    save(2)
    assert states(pipeline)["transfer"] == ("stale", "checkpoint has changed")
    assert go(pipeline).done == ["transfer"]
    assert states(pipeline)["transfer"][0] == "done"


def test_a_lost_output_is_made_again(tmp_path, source):
    go(chain(tmp_path / "out", source))
    (scores,) = (tmp_path / "out" / "transfer").glob("tasks=knn-*/scores.json")
    scores.unlink()
    assert states(chain(tmp_path / "out", source))["transfer[tasks=knn]"][1].endswith("no longer exists")
    assert go(chain(tmp_path / "out", source)).done == ["transfer[tasks=knn]"]


def test_a_failure_stops_what_depends_on_it_and_nothing_else(tmp_path, source):
    executor = Fake({"transfer[tasks=linear]": [1, 1]})
    outcome = go(chain(tmp_path / "out", source), executor)
    assert executor.started.count("transfer[tasks=linear]") == 2  # retries: 1
    assert outcome.failed == ["transfer[tasks=linear]"]
    assert "transfer[tasks=knn]" in outcome.done
    assert states(chain(tmp_path / "out", source))["transfer[tasks=linear]"] == ("failed", "told to")
    assert go(chain(tmp_path / "out", source)).done == ["transfer[tasks=linear]"]
    early = go(chain(tmp_path / "other", source), Fake({"pretrain": [2]}))
    assert early.failed == ["pretrain"]
    assert sorted(early.blocked) == ["transfer[tasks=knn]", "transfer[tasks=linear]"]


def test_attempts_that_are_lost_do_not_count_as_failures(tmp_path, source):
    executor = Fake({"pretrain": [None, None, None, 1, 0]})
    assert go(chain(tmp_path / "out", source), executor).failed == []
    assert executor.started.count("pretrain") == 5
    cost = state.load(str(tmp_path / "out")).records["pretrain"].versions[-1].cost
    assert (cost["attempts"], cost["seconds"]) == (5, 5.0)


class Dies(Exception):
    """Stands for the signal that kills a runner."""


class Dying(Fake):
    """Executor of a runner that is killed when it first looks at a stage."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def look(self, job, log):
        if self.running[job][0] == self.stage:
            raise Dies
        return super().look(job, log)


class Later(Fake):
    """Executor of the next runner, which knows the attempts of the previous one."""

    def __init__(self, before):
        super().__init__()
        self.running, self.stopped = dict(before.running), []

    def stop(self, job):
        self.stopped.append(self.running[job][0])


def killed_at(stage, pipeline, monkeypatch):
    """The executor of a runner that was killed while the stage ran, as another runner would find it."""
    executor = Dying(stage)
    monkeypatch.setattr(runner, "STOP_GRACE", 0.0)  # a killed runner stops nothing
    with pytest.raises(Dies):
        go(pipeline, executor)
    return Later(executor)


def test_the_next_runner_takes_over_a_stage_that_depends_on_others(tmp_path, source, monkeypatch):
    executor = killed_at("pretrain", chain(tmp_path / "out", source), monkeypatch)
    outcome = go(chain(tmp_path / "out", source), executor)
    assert executor.stopped == []
    assert executor.started == ALL[2:]
    assert (outcome.kept, sorted(outcome.done)) == (["data"], sorted(ALL[1:]))
    assert state.load(str(tmp_path / "out")).records["pretrain"].versions[-1].cost["attempts"] == 1


@pytest.mark.parametrize("change", ["settings", "forced input"])
def test_the_next_runner_stops_a_stage_that_is_no_longer_wanted(tmp_path, source, monkeypatch, change):
    executor = killed_at("pretrain", chain(tmp_path / "out", source), monkeypatch)
    changed = {"pretrain": {"optimizer.lr": 0.5}} if change == "settings" else {}
    plan = plan_of(chain(tmp_path / "out", source, **changed))
    plan.forced = {"data"} if change == "forced input" else set()
    outcome = Runner(plan, plan.select(), executor).run()
    assert executor.stopped == ["pretrain"]
    assert executor.started.count("pretrain") == 1
    assert outcome.failed == []


def test_an_output_in_use_is_retried_later_and_is_not_a_failure(tmp_path, source, monkeypatch):
    monkeypatch.setattr(runner, "LATER_PAUSE", 0.05)
    executor = Fake({"pretrain": [75, 75, 75, 1, 75, 0], "transfer[tasks=knn]": [75] * 40})
    outcome = go(chain(tmp_path / "out", source), executor)
    assert "pretrain" in outcome.done
    assert outcome.failed == ["transfer[tasks=knn]"]
    assert executor.started.count("transfer[tasks=knn]") == runner.LATER_AT_MOST + 1


class Away(Fake):
    """A job server that does not answer the first requests to start a stage."""

    def __init__(self, stage, times, error):
        super().__init__()
        self.stage, self.times, self.error = stage, times, error

    def start(self, attempt):
        if attempt.title.endswith(f"/{self.stage}") and self.times:
            self.times -= 1
            raise self.error
        super().start(attempt)


def test_an_outage_at_the_start_of_a_stage_is_not_wrong_input(tmp_path, source, monkeypatch):
    monkeypatch.setattr(runner, "LATER_PAUSE", 0.01)
    error = Unavailable("the job server did not answer in 180 s")
    assert sorted(go(chain(tmp_path / "out", source), Away("pretrain", 3, error)).done) == sorted(ALL)
    assert not any(record.failed for record in state.load(str(tmp_path / "out")).records.values())
    outcome = go(chain(tmp_path / "long", source), Away("pretrain", 99, error))
    assert (outcome.failed, outcome.blocked) == (["pretrain"], ALL[2:])
    failed = state.load(str(tmp_path / "long")).records["pretrain"].failed
    assert (failed.code, failed.reason) == (75, str(error))
    assert go(chain(tmp_path / "wrong", source), Away("data", 1, UserError("wrong"))).failed == ["data"]
    assert state.load(str(tmp_path / "wrong")).records["data"].failed.code == 2


def test_an_outage_at_the_end_of_a_stage_does_not_fail_it(tmp_path, source, monkeypatch):
    monkeypatch.setattr(runner, "LATER_PAUSE", 0.01)
    find_complete, left = fingerprints.complete, [2]

    def complete(output, marker):
        if "pretrain" in output and left[0]:
            left[0] -= 1
            raise Unavailable("the store did not answer")
        return find_complete(output, marker)

    plan = plan_of(chain(tmp_path / "out", source))
    executor = Fake()
    monkeypatch.setattr(fingerprints, "complete", complete)
    assert sorted(Runner(plan, plan.select(), executor).run().done) == sorted(ALL)
    assert (left, executor.started.count("pretrain")) == ([0], 3)


def test_independent_stages_run_in_parallel_as_far_as_resources_allow(tmp_path, source):
    one = {"transfer": {"workers": 1}}
    executor = Fake()
    go(chain(tmp_path / "out", source, **one), executor)
    assert executor.most == 2
    narrow = Fake()
    narrow.cpus = 1.0
    go(chain(tmp_path / "narrow", source, **one), narrow)
    assert narrow.most == 1


def test_equal_stages_are_run_once(tmp_path, source):
    stage = Stage(job="prepare", fields={"source": str(source), "size": 32})
    pipeline = file.check_pipeline(
        Pipeline(name="twins", output=str(tmp_path), stages={"one": stage, "two": stage}), "test"
    )
    executor = Fake()
    outcome = go(pipeline, executor)
    assert (executor.started, outcome.done, outcome.kept) == (["one"], ["one"], ["two"])


def test_transfers_use_the_available_gpus(tmp_path, source):
    one = {"transfer": {"workers": 1}}
    workstation = Fake()
    workstation.gpus = 1.0
    go(chain(tmp_path / "out", source, **one), workstation)
    assert workstation.most == 1  # both would use the only GPU
    cluster = Fake()
    cluster.cpus = cluster.gpus = float("inf")
    go(chain(tmp_path / "cluster", source, **one), cluster)
    for folder, occupied in (("out", 1.0), ("cluster", 2.0)):  # as the scores.json of a cluster says
        versions = state.load(str(tmp_path / folder)).records["transfer[tasks=knn]"].versions
        assert versions[-1].cost["gpu_hours"] == pytest.approx(occupied / 3600)


def test_parts_of_a_pipeline(tmp_path, source):
    pipeline = chain(tmp_path / "out", source)
    assert go(pipeline, last=["pretrain"]).done == ["data", "pretrain"]
    assert go(pipeline, only=["transfer[tasks=knn]"]).done == ["transfer[tasks=knn]"]
    assert sorted(go(pipeline, first=["pretrain"]).kept) == ["pretrain", "transfer[tasks=knn]"]
    with pytest.raises(UserError, match=r'--only: no stage "pretain" \(did you mean "pretrain"\?\)'):
        plan_of(pipeline).select(only=["pretain"])
    alone = go(chain(tmp_path / "empty", source), only=["pretrain"])
    assert alone.blocked == ["pretrain"]


def test_forced_stages_run_again_in_an_empty_folder(tmp_path, source):
    pipeline = chain(tmp_path / "out", source)
    go(pipeline)
    plan = plan_of(pipeline)
    plan.forced = {"data"}
    left = Path(plan.folder("data")) / "left"
    left.write_text("of the first run")
    outcome = Runner(plan, plan.select(), Fake()).run()
    assert outcome.done == ["data"]
    assert not left.exists()


def test_another_setting_does_not_overwrite_an_output_that_the_file_names(tmp_path, source):
    fixed = {"output": str(tmp_path / "data")}
    go(chain(tmp_path / "out", source, data=fixed))
    outcome = go(chain(tmp_path / "out", source, data={**fixed, "quality": 50}))
    assert outcome.failed == ["data"]
    assert "has the output of other settings" in state.load(str(tmp_path / "out")).records["data"].failed.reason


def test_the_state_of_another_program_is_refused(tmp_path, source):
    pipeline = chain(tmp_path / "out", source)
    go(pipeline)
    place = Path(state.load(pipeline.root).uri)
    place.write_text(json.dumps({**json.loads(place.read_text()), "format": 99}))
    with pytest.raises(UserError, match="its format is 99, and this program reads 1"):
        plan_of(pipeline)
    place.write_text("{}")
    with pytest.raises(UserError, match="is not the state of a pipeline"):
        plan_of(pipeline)
    place.unlink()
    assert states(pipeline)["data"][0] == "waiting"


def test_state_and_outputs_on_a_store(s3, source):
    pipeline = dataclasses.replace(chain("x", source), output=f"{s3}/runs/chain")
    assert len(go(pipeline).done) == 4
    assert {state for state, _ in states(pipeline).values()} == {"done"}


def test_fingerprints_are_those_of_the_content(tmp_path):
    storage.write_bytes(str(tmp_path / "vtab/pets/train/manifest.json"), b'{"fingerprint": "p"}')
    storage.write_bytes(str(tmp_path / "vtab/dtd/test/manifest.json"), b'{"fingerprint": "d"}')
    content = fingerprints.content_of(str(tmp_path / "vtab"))
    assert content.parts == {"pets/train": "p", "dtd/test": "d"}
    assert content.below("pets/train") == "p"
    assert content.below("pets") != content.below("dtd")
    shutil.copytree(tmp_path / "vtab", tmp_path / "copy")
    assert fingerprints.content_of(str(tmp_path / "copy")) == content
    assert fingerprints.Fingerprints().fingerprint("timm:vit_base_patch16_224") == "timm:vit_base_patch16_224"


def test_a_runner_that_was_killed_before_it_wrote_its_run_leaves_no_second_one(tmp_path, source):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    pipeline = dataclasses.replace(chain(tmp_path / "out", source), tracking_uri=uri)
    plan = plan_of(pipeline)
    assert not runner.about_run(plan)
    plan.state.save()
    experiment, tags = server.experiment_id(uri, names.PIPELINE), {names.PIPELINE_RUN: plan.state.run["id"]}
    killed = server.client(uri).create_run(experiment, tags=tags).info.run_id
    plan = plan_of(pipeline)
    assert runner.about_run(plan)
    PipelineRecord(plan, continued=True).finish(plan.survey(), [], {}, "FINISHED")
    (run,) = search.search_runs(names.PIPELINE, uri=uri)
    assert (run.id, run.status) == (killed, "FINISHED")
