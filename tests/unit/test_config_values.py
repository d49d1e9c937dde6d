"""Errors of configuration files show no text of the file, and no number of a configuration is infinite."""

import dataclasses
import re

import pytest

from pipeline import config as configuration
from pipeline.data.prepare.config import PrepareConfig
from pipeline.errors import UserError
from pipeline.graph.file import load
from pipeline.operations.evaluation import EvaluateConfig
from pipeline.operations.options import ExportConfig
from pipeline.operations.planning.config import PlanConfig
from pipeline.training.config import PretrainConfig
from pipeline.training.recipes import RECIPES
from pipeline.transfer.suites import TransferConfig

SECRET = "hunter2-planted"
FILES = {
    "passwd": f"root:x:0:0:{SECRET}:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n",
    "a word": SECRET,
    "an ini file": f"[default]\naws_secret_access_key = {SECRET}\n",
    "an environment": f"PASSWORD={SECRET}\nexport X='{SECRET}\n",
    "an open list": f"data: [{SECRET}",
    "an alias": f"data: *{SECRET}",
    "a tag": f"data: !{SECRET} x",
    "a tab": f"data:\n\t{SECRET}: 1",
    "a list": f"- {SECRET}\n",
    "a long value": f"batch_size: The password is {SECRET}",
    "a mapping": f"batch_size: {{a: {SECRET}}}",
    "a choice": f"loss: the word {SECRET}",
    "a number": f"batch_size: 0x{SECRET}!",
    "a deep list": "[" * 5000 + SECRET,
    "a certificate": f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n",
    "a date": "2020-01-01",
    "a time": "2020-01-01 10:00:00",
    "only a number": "5",
    "a truth": "true",
    "JSON": f'{{"batch_size": "{SECRET} {SECRET}", "x": [}}',
}


@pytest.mark.parametrize("kind", FILES)
def test_errors_of_a_file_do_not_show_its_text(kind, tmp_path):
    (tmp_path / "x.yaml").write_text(FILES[kind])
    for read in (
        lambda text: configuration.from_yaml(PretrainConfig, text, str(tmp_path / "x.yaml")),
        lambda text: load(str(tmp_path / "x.yaml")),
    ):
        with pytest.raises(UserError, match=r"x\.yaml") as caught:
            read(FILES[kind])
        assert SECRET not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_errors_of_yaml_say_where_and_what():
    for text, message in (
        ("steps: 1\nbatch_size: [1, 2", r"line 2, column 18: expected ',' or ']', but got '<stream end>'"),
        ("a: %x", r"line 1, column 4: found character '%' that cannot start any token"),
        ("a: b: c", r"line 1, column 5: mapping values are not allowed here"),
    ):
        with pytest.raises(UserError, match=f"x: not valid YAML: {re.escape(message)}"):
            configuration.from_yaml(PretrainConfig, text, "x")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400"])
def test_no_number_of_any_job_may_be_infinite(number):
    for command in (TransferConfig, EvaluateConfig, PrepareConfig, PlanConfig, PretrainConfig, ExportConfig):
        given = {"checkpoint": "x", "to": "timm", "output": "y"} if command is ExportConfig else {}
        fields = list(float_fields(command(**given)))
        assert fields or command is PlanConfig or command is ExportConfig
        for name in fields:
            flag = "--" + name.replace("runtime.", "").replace("_", "-")
            required = [word for key, value in given.items() for word in (f"--{key}", value)]
            several = 2 if name.endswith(("betas", "area", "aspect")) else 1
            last = name.rpartition(".")[2]
            with pytest.raises(
                UserError, match=rf"{last} -?(nan|inf) must be a finite number|must be.*{last}|{last} .*must be"
            ):
                configuration.parse_command([*required, flag, *[number] * several], command, prog="x", description="x")


def float_fields(config, prefix=""):
    """Names of the fields that are numbers with a fraction."""
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), str(field.type)
        if dataclasses.is_dataclass(value):
            yield from float_fields(value, f"{prefix}{field.name}.")
        elif "float" in hint:
            yield prefix + field.name


def test_a_file_of_a_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "x.yaml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"x\.yaml: more than 1,048,576 bytes"):
        configuration.parse(["--config", str(tmp_path / "x.yaml")], RECIPES, "demo", prog="x", description="x")
    with pytest.raises(UserError, match=r"x\.yaml: a pipeline file has at most"):
        load(str(tmp_path / "x.yaml"))
