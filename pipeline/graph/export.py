"""Exports a pipeline for other schedulers, as a list of repeatable commands with reliable exit codes.

The commands contain the URIs of all outputs, so each command can run alone. The URIs are those at the time of the export.
"""

import json
import re
import shlex
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.graph import file
from pipeline.graph.plan import Plan

FORMATS = ("commands", "argo", "airflow", "yaml")


def export(plan: Plan, to: str, image: str) -> str:
    """The text of the export. image: container image of the steps in Argo."""
    if to == "yaml":
        return file.to_yaml(plan.pipeline).rstrip()
    writers = {"commands": _commands, "argo": lambda plan: _argo(plan, image), "airflow": _airflow}
    return writers[to](plan)


def command_lines(plan: Plan) -> dict[str, list[str]]:
    """{instance: words of its command, starting with the script}. Outputs have the URIs that a run would use."""
    outputs = {name: plan.folder(name) for name in plan.instances}
    return {name: plan.command(name, outputs) for name in plan.instances}


def _commands(plan: Plan) -> str:
    lines = [
        "#!/usr/bin/env bash",
        f"# {plan.pipeline.name}: its stages in order; each command can be repeated.",
        "set -euo pipefail",
    ]
    for name, words in command_lines(plan).items():
        needs = plan.instances[name].needs
        lines += ["", f"# {name}" + (f", after {', '.join(needs)}" if needs else "")]
        lines.append(shlex.join(["python", *words]))
    return "\n".join(lines)


def _names(plan: Plan) -> dict[str, str]:
    """{instance: unique name of at most 63 letters, digits and -}"""
    names: dict[str, str] = {}
    for instance in plan.instances:
        name = re.sub(r"[^a-z0-9-]+", "-", instance.lower()).strip("-")[:55]
        if name in names.values():
            name = f"{name}-{len(names)}"
        names[instance] = name
    return names


def _argo(plan: Plan, image: str) -> str:
    """An Argo Workflow: a DAG of containers."""
    names = _names(plan)
    tasks, templates = [], []
    for instance, words in command_lines(plan).items():
        one = plan.instances[instance]
        tasks.append(
            {"name": names[instance], "template": names[instance], "dependencies": [names[up] for up in one.needs]}
        )
        limits: dict[str, Any] = {"cpu": f"{one.cpus:g}"} if one.cpus else {}
        if one.gpus:
            limits["nvidia.com/gpu"] = f"{one.gpus:g}"
        container: dict[str, Any] = {
            "image": image,
            "command": ["python"],
            "args": [f"/opt/vit/{words[0]}", *words[1:]],
        }
        if limits:
            container["resources"] = {"requests": limits, "limits": limits} if one.gpus else {"requests": limits}
        templates.append({"name": names[instance], "retryStrategy": {"limit": one.retries}, "container": container})
    workflow = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"generateName": f"{_names_of(plan.pipeline.name)}-"},
        "spec": {"entrypoint": "pipeline", "templates": [{"name": "pipeline", "dag": {"tasks": tasks}}, *templates]},
    }
    return yaml.safe_dump(workflow, sort_keys=False, width=120).rstrip()


def _names_of(text: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")


_AIRFLOW = '''"""{name}, exported from a pipeline file of vit-pipeline. PROJECT is the folder of the checkout on the workers."""

import shlex
from datetime import datetime, timedelta

from airflow import DAG
from airflow.providers.standard.operators.bash import BashOperator

PROJECT = "/opt/vit"
COMMANDS = {commands}
NEEDS = {needs}
RETRIES = {retries}

with DAG("{dag}", schedule=None, start_date=datetime(2026, 1, 1), catchup=False, max_active_runs=1) as dag:
    tasks = {{
        name: BashOperator(
            task_id=name,
            bash_command=f"cd {{PROJECT}} && python " + shlex.join(words),
            retries=RETRIES[name],
            retry_delay=timedelta(minutes=1),
        )
        for name, words in COMMANDS.items()
    }}
    for name, needs in NEEDS.items():
        for need in needs:
            tasks[need] >> tasks[name]'''


def _airflow(plan: Plan) -> str:
    """A file for the DAG folder of Airflow 3."""
    names = _names(plan)
    for words in command_lines(plan).values():
        if any("{{" in word or "{%" in word for word in words):
            raise UserError(
                "Airflow treats {{ and {% in a command as templates; rename the folder or field that contains them"
            )
    values = {
        "commands": {names[name]: words for name, words in command_lines(plan).items()},
        "needs": {names[name]: [names[up] for up in instance.needs] for name, instance in plan.instances.items()},
        "retries": {names[name]: instance.retries for name, instance in plan.instances.items()},
    }
    return _AIRFLOW.format(
        name=plan.pipeline.name,
        dag=plan.pipeline.name,
        **{key: json.dumps(value, indent=4) for key, value in values.items()},
    )
