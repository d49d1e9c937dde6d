"""infra/monitoring compared with the exported metrics: alerts and dashboards use metrics that a Ray node provides."""

import inspect
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from pipeline import metrics
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
DASHBOARD = json.loads((MONITORING / "grafana" / "vit.json").read_text())
EXPRESSIONS = [rule["expr"] for group in RULES for rule in group["rules"]]
EXPRESSIONS += [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
NAME = re.compile(r"\b(?:ray|autoscaler)_\w+")

PUBLISHER = """
import sys, time
import pipeline, ray
from pipeline import metrics, workqueue
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         _metrics_export_port=int(sys.argv[1]), _system_config={"metrics_report_interval_ms": 500})
metrics.publish({name: 1.5 for name in metrics.DESCRIPTIONS}, run="s3://bucket/runs/b16/_work")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def exported():
    """The output of a node's exporter while a job publishes every live metric."""
    port = free_port()
    command = [sys.executable, "-c", PUBLISHER, str(port)]
    environment = {"PYTHONPATH": str(ROOT), "RAY_enable_metrics_collection": "1", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        try:
            assert job.stdout.readline() == "ready\n"
            names = [f"ray_vit_{name}{{" for name in metrics.DESCRIPTIONS]  # which Ray exports one after another
            yield wait_for(f"http://127.0.0.1:{port}/metrics", *names, "ray_node_disk_free{")
        finally:
            job.stdin.close()


def wait_for(url, *wanted):
    deadline = time.time() + 120
    while time.time() < deadline:
        time.sleep(0.5)
        try:
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            continue
        if all(name in text for name in wanted):
            return text
    raise AssertionError(f"{url} serves no {wanted}")


def test_every_live_metric_is_exported_under_the_name_of_the_run(exported):
    for name, description in metrics.DESCRIPTIONS.items():
        (line,) = [line for line in exported.splitlines() if line.startswith(f"ray_vit_{name}{{")]
        assert 'run="b16"' in line
        assert line.endswith(" 1.5")
        assert f"# HELP ray_vit_{name} {description}" in exported


def test_alarms_and_dashboards_name_metrics_that_exist(exported):
    from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels

    # A machine without GPUs and without an autoscaler exports none of their metrics; Ray's own dashboards contain the
    # names.
    known = exported + inspect.getsource(default_dashboard_panels)
    names = {name for expression in EXPRESSIONS for name in NAME.findall(expression)} - {"ray_node_type"}
    assert len(names) > 15
    for name in names:
        assert re.search(rf"\b{name}\b", known), f"nothing exports {name}"


def test_alarms_use_labels_that_are_exported(exported):
    for group in RULES:
        for rule in group["rules"]:
            (name, *_) = NAME.findall(rule["expr"])
            line = next(line for line in exported.splitlines() if line.startswith(f"{name}{{"))
            for label in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
                assert f'{label}="' in line, f"{rule['alert']}: {name} has no label {label}"


def test_nothing_is_published_outside_ray():
    metrics.publish({metrics.TRAIN_LOSS: 1.0}, run="here")
    with pytest.raises(KeyError, match="train_los"):
        metrics.publish({"train_los": 1.0}, run="here")


def test_each_alarm_has_a_test_case():
    stories = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    raised = {case["alertname"] for story in stories for case in story["alert_rule_test"] if case["exp_alerts"]}
    assert raised == {rule["alert"] for group in RULES for rule in group["rules"]}


def runbook() -> set[str]:
    """The problems in the runbook of docs/operating.md."""
    section = (ROOT / "docs" / "operating.md").read_text().partition("\n## Runbook\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE))


def flags() -> str:
    """The --help-all of the jobs that the alarms are about."""
    jobs = [[sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--help-all"] for name in ("prepare", "pretrain")]
    jobs.append([sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--help"])
    return "".join(subprocess.run(job, capture_output=True, text=True, timeout=200).stdout for job in jobs)


def test_each_alarm_advises_what_exists():
    """A row of the runbook, and flags of the jobs, in the alarms and in the runbook itself."""
    known, advice = flags(), []
    for group in RULES:
        for rule in group["rules"]:
            (row,) = re.findall(r"^docs/operating\.md, '(.*?)': ", rule["annotations"]["runbook"])
            assert row in runbook(), rule["alert"]
            advice.append(rule["annotations"]["runbook"])
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", " ".join(advice))):
        assert re.search(rf"(?<![\w-]){flag}\b(?!-)", known), flag


def test_kubernetes_loads_the_same_alarms():
    kinds = {d["kind"]: d for d in yaml.safe_load_all((MONITORING / "kubernetes.yaml").read_text())}
    assert kinds["PrometheusRule"]["spec"]["groups"] == RULES
    cluster = yaml.safe_load((ROOT / "infra" / "kuberay" / "cluster.yaml").read_text())["spec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]


@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")], ids=" ".join
)
def test_promtool_agrees(arguments):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not here (Debian: apt-get install prometheus)")
    done = subprocess.run(["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_complete():
    """What Grafana requires of a panel: a number of its own, a place on the 24 columns, a data source, a unit."""
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] in range(25 - place["w"])
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_grafana_finds_the_dashboards():
    """What Grafana requires of a provider of dashboards: a name of its own, a type that it knows, and a folder."""
    provisioning = yaml.safe_load((MONITORING / "grafana" / "provisioning.yaml").read_text())
    assert provisioning["apiVersion"] == 1
    assert len({provider["name"] for provider in provisioning["providers"]}) == 2
    for provider in provisioning["providers"]:
        assert provider["type"] == "file"
        assert provider["options"]["path"].startswith("/")
