"""Pipelines for other schedulers, read by the parsers of those: bash, Argo's resource definition, Airflow's DagBag.

Argo's definition is picked up from VIT_REAL_DATA/argo-crds (manifests/base/crds/full of its repository), Airflow from this
environment or from the Python that AIRFLOW_PYTHON names.
"""

import dataclasses
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.graph import export, file, instances, state
from pipeline.graph.plan import Plan
from tests.definitions import validator

ROOT = Path(__file__).parents[2]
SWEEP = {
    "name": "sweep",
    "stages": {
        "data": {"job": "prepare", "recipe": "demo"},
        "pretrain": {
            "job": "pretrain",
            "recipe": "demo",
            "fields": {"data": "${data.output}/train", "validation": "${data.output}/test", "gpus": True, "workers": 2},
            "matrix": {"optimizer.lr": [1e-3, 3e-4]},
            "retries": 3,
        },
        "transfer": {
            "job": "transfer",
            "recipe": "demo",
            "fields": {"checkpoint": "${pretrain.output}", "data": "${data.output}"},
            "matrix": {"tasks": ["finetune", ["linear", "knn"]]},
        },
    },
    "promote": {"over": "transfer"},
}


def plan_of(pipeline, root):
    pipeline = dataclasses.replace(pipeline, output=str(root))
    return Plan(pipeline, instances.expand(pipeline), state.load(pipeline.root))


@pytest.fixture(params=["sweep", "b16-imagenet"])
def plan(request, tmp_path):
    if request.param == "sweep":
        return plan_of(file.from_dict(SWEEP), tmp_path)
    return plan_of(file.load(str(ROOT / "infra/pipelines/b16-imagenet.yaml")), tmp_path)


@pytest.fixture
def sweep(tmp_path):
    return plan_of(file.from_dict(SWEEP), tmp_path)


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """The corpora of the file in infra/ are on no store that a test has."""
    monkeypatch.setattr("pipeline.graph.fingerprints.Fingerprints.fingerprint", lambda self, text: text)


def test_commands_are_a_script_of_the_jobs(plan):
    script = export.export(plan, "commands", "image")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("python ")]
    assert len(lines) == len(plan.instances)
    assert all((ROOT / line[1]).is_file() for line in lines)
    seen = []  # each command comes after the commands whose outputs it reads
    for line, name in zip(lines, plan.instances, strict=True):
        assert set(plan.instances[name].needs) <= set(seen)
        assert plan.folder(name) in line
        seen.append(name)


def test_argo_is_a_workflow_of_its_stages(sweep):
    workflow = yaml.safe_load(export.export(sweep, "argo", "image"))
    first, *steps = workflow["spec"]["templates"]
    tasks = {task["name"]: task["dependencies"] for task in first["dag"]["tasks"]}
    assert set(tasks["transfer-lr-0-001-tasks-finetune"]) == {"pretrain-lr-0-001", "data"}
    assert {task["template"] for task in first["dag"]["tasks"]} == {step["name"] for step in steps}
    (trained,) = [step for step in steps if step["name"] == "pretrain-lr-0-001"]
    assert trained["container"]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert trained["retryStrategy"] == {"limit": 3}


def test_argos_definition_accepts_the_workflow(plan, real_data):
    definition = real_data / "argo-crds" / "argoproj.io_workflows.yaml"
    if not definition.exists():
        pytest.skip(f"{definition} is not there")
    kind, checker = validator(definition, "v1alpha1")
    workflow = yaml.safe_load(export.export(plan, "argo", "image"))
    assert workflow["kind"] == kind
    checker.validate(workflow)
    workflow["spec"]["templates"][1]["container"]["comand"] = ["python"]
    assert len(list(checker.iter_errors(workflow))) == 1  # the definition detects a mistake


DAGBAG = """
import json, logging, sys
logging.disable(logging.CRITICAL)
try:
    from airflow.dag_processing.dagbag import DagBag
except ImportError:
    from airflow.models import DagBag
bag = DagBag(dag_folder=sys.argv[1])
dags = {name: {task.task_id: [sorted(task.upstream_task_ids), task.retries, task.bash_command] for task in dag.tasks}
        for name, dag in bag.dags.items()}
print(json.dumps({"errors": bag.import_errors, "dags": dags}))
"""


def airflow_python():
    if importlib.util.find_spec("airflow"):
        return sys.executable
    if python := os.environ.get("AIRFLOW_PYTHON"):
        return python
    pytest.skip("Airflow is not installed here, and AIRFLOW_PYTHON names no Python that has it")


def test_airflows_dagbag_loads_the_dag(sweep, tmp_path):
    folder = tmp_path / "dags"
    folder.mkdir()
    (folder / "sweep.py").write_text(export.export(sweep, "airflow", "image"))
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path / "home"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    environment.pop("PYTHONPATH", None)  # Airflow has a separate environment
    done = subprocess.run(
        [airflow_python(), "-c", DAGBAG, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == {}
    (tasks,) = found["dags"].values()
    assert list(found["dags"]) == ["sweep"]
    upstream, retries, command = tasks["transfer-lr-0-001-tasks-linear-knn"]
    assert (upstream, retries) == (["data", "pretrain-lr-0-001"], 1)
    assert "cd /opt/vit && python jobs/transfer.py --suite demo" in command
    assert tasks["pretrain-lr-0-0003"][1] == 3
    assert len(tasks) == len(sweep.instances)


def test_airflows_dag_is_python_wherever_it_is_not_installed(plan):
    compile(export.export(plan, "airflow", "image"), "dag.py", "exec")


def test_an_address_that_airflow_would_take_for_a_template_is_refused(tmp_path):
    data = {"job": "prepare", "recipe": "demo", "fields": {"output": str(tmp_path / "{{ds}}")}}
    plan = plan_of(file.from_dict({"name": "x", "stages": {"data": data}}), tmp_path)
    with pytest.raises(UserError, match="as templates"):
        export.export(plan, "airflow", "image")
