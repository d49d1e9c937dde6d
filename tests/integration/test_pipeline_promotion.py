"""The promotion rule with MLflow's registry: which versions are promoted, which
are not and why, and which is the candidate."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import storage
from pipeline.errors import UserError
from pipeline.graph.promotion import PromoteConfig, promote
from pipeline.tracking import registry
from tests.runs import commit_checkpoint


def transferred(folder, name, score, suite="demo", task="linear", protocol="p"):
    """The output of a transfer of a checkpoint of its own."""
    checkpoint = folder / name / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.zeros(1, np.float32)}, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(
        json.dumps({"model": {"variant": "Ti/16", "image_size": 16}, "classes": ["a"]})
    )
    commit_checkpoint(checkpoint, 1)
    output = folder / f"{name}-{suite}-{task}"
    values = {"name": task, "task": task, "group": "", "values": [score], "images": 400, "mean": score, "test": "e"}
    summary = {"suite": suite, "checkpoint": str(checkpoint), "run_id": "", "failures": {}, "scores": {task: values}}
    storage.write_json(str(output / "scores.json"), summary)
    storage.write_json(str(output / "run.json"), {"tasks": {task: {"protocol": protocol, "train": "t", "test": "e"}}})
    return str(output)


@pytest.fixture
def rule(tmp_path, monkeypatch):
    """Promotes the checkpoints in the folders by a rule. Returns (result, {alias: version})."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(registry, "record_evaluation", _without_run(registry.record_evaluation))

    def run(*scores, **fields):
        config = PromoteConfig(model="letters", scores=scores, output=str(tmp_path / "out"), tracking_uri=uri, **fields)
        answer = promote(config)
        return answer, {alias: v.version for v in registry.versions("letters", uri) for alias in v.aliases}

    return run


def _without_run(record):
    """No MLflow run has these scores, so the promotion creates one."""

    def with_run(version, key, outcome, run_id, uri):
        made = registry.client(uri).create_run(registry.experiment_id(uri, "transfer"))
        return record(version, key, outcome, made.info.run_id, uri)

    return with_run


def test_champion_and_candidate_mean_what_they_say(tmp_path, rule):
    first, second = transferred(tmp_path, "first", 80.0), transferred(tmp_path, "second", 90.0)
    answer, aliases = rule(first, second, no_worse_than="champion")
    assert answer["why"] == "letters version 2 with 90.00 is champion"
    assert aliases == {"champion": 2, "candidate": 1}
    worse = transferred(tmp_path, "worse", 85.0)
    answer, aliases = rule(worse, no_worse_than="champion")
    assert answer["why"] == "letters version 3 with 85.00 is not promoted: the champion, version 2, has 90.00"
    assert aliases == {"champion": 2, "candidate": 3}
    better = transferred(tmp_path, "better", 95.0)
    answer, aliases = rule(better, no_worse_than="champion")
    assert (answer["promoted"], aliases) == (4, {"champion": 4, "candidate": 3})
    again, aliases = rule(better, no_worse_than="champion")  # no second version of the champion
    assert (again["promoted"], aliases) == (4, {"champion": 4, "candidate": 3})
    low, _ = rule(transferred(tmp_path, "low", 99.0), at_least=99.5)
    assert low["why"].endswith("is not promoted: less than 99.5")
    equal, aliases = rule(transferred(tmp_path, "equal", 95.0), no_worse_than="champion")
    assert equal["why"] == "letters version 6 with 95.00 is champion, before version 4"
    assert aliases == {"champion": 6, "candidate": 5}  # version 5 with 99.00 is the best that was never promoted
    other, aliases = rule(transferred(tmp_path, "other", 99.9, protocol="q"), no_worse_than="champion")
    assert other["why"].endswith("has no score with the same protocol and data")
    assert aliases["champion"] == 6


def test_a_margin_accepts_a_score_that_is_lower_only_by_noise(tmp_path, rule):
    rule(transferred(tmp_path, "first", 80.0), no_worse_than="champion")
    below = transferred(tmp_path, "below", 79.0)  # of 400 images: a standard error of 2 points
    assert rule(below, no_worse_than="champion")[0]["promoted"] is None
    assert rule(below, no_worse_than="champion", margin=1.0)[0]["promoted"] == 2


def test_scores_of_one_checkpoint_are_averaged_and_a_metric_is_one_task(tmp_path, rule):
    both = [transferred(tmp_path, "a", 80.0, task="linear"), transferred(tmp_path, "a", 60.0, task="knn")]
    assert rule(*both)[0]["score"] == 70.0
    assert rule(*both, metric="knn")[0]["score"] == 60.0
    with pytest.raises(UserError, match=r'no score "kn" \(did you mean "knn"\?\)'):
        rule(*both, metric="kn")
    with pytest.raises(UserError, match="have scores for different tasks"):
        rule(*both, transferred(tmp_path, "b", 60.0))
    with pytest.raises(UserError, match="no transfer results"):
        rule(str(tmp_path / "nowhere"))


def test_scores_keep_the_names_that_their_run_has(tmp_path, rule):
    """A task under a second name ("demo/linear") would be a row of its own on the leaderboard."""
    rule(transferred(tmp_path, "a", 80.0))
    client = registry.client(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("transfer").experiment_id])
    assert set(run.data.metrics) == {"score_mean", "score/linear"}
    (version,) = client.search_model_versions("name = 'letters'")
    assert version.tags["score/linear"] == "80.00"
