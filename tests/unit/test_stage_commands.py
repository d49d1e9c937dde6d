"""Commands of the stages of a pipeline, as MLflow shows them and `export` writes them: short, and the job reads them back."""

import dataclasses
import shlex

import pytest

from pipeline.errors import UserError
from pipeline.graph import fields, kinds
from pipeline.graph.file import Pipeline, Stage, check_pipeline
from pipeline.graph.recipes import RECIPES
from tests.commandlines import parse_job
from tests.graphs import plan_of

JOBS = [kind for kind in kinds.KINDS.values() if kind.name != "promote"]


def start_of(kind):
    """The config that a command with only the required flags has, and these flags."""
    required = {name: "x" for name in ("checkpoint", "output", "to") if name in fields.paths(kinds.config_class(kind))}
    required |= {"to": "timm"} if "to" in required else {}
    required |= {"tasks": ("dtd",), "raw": "raw"} if kind.name == "vtab" else {}
    start = kinds.start(kind, None, required, kind.name)
    return fields.with_values(start, required, kind.name), required


def values_of(path, default, hint):
    """Values of a field that a pipeline file can give and that are not the default: None, nothing, yes and no."""
    arguments = getattr(hint, "__args__", ())
    found = [None] if type(None) in arguments and default is not None else []
    found += [not default] if isinstance(default, bool) else []
    found += [()] if isinstance(default, tuple) and Ellipsis in arguments and default and path != ("tasks",) else []
    return found


@pytest.mark.parametrize("kind", JOBS, ids=lambda kind: kind.name)
def test_the_job_reads_each_value_that_a_stage_can_have(kind, monkeypatch):
    start, required = start_of(kind)
    positional = required.pop(kind.positional, ()) if kind.positional else ()
    tried = 0
    for name, (path, hint) in fields.paths(type(start)).items():
        for value in values_of(path, fields.get(start, name), hint) if name not in required else ():
            try:
                wanted = fields.with_values(start, {name: value}, name)
            except UserError:  # the value needs another one
                continue
            words = [*kind.words, *positional, *fields.flags({**required, name: value})]
            if kind.name == "prepare":  # without arguments it has another recipe
                words = ["--recipe", kind.default, *words]
            read = parse_job(kind.script[len("jobs/") : -len(".py")], words, monkeypatch)
            common = {field.name for field in dataclasses.fields(wanted)}
            for field in common:
                assert getattr(read, field) == getattr(wanted, field), shlex.join(words)
            tried += 1
    assert tried or kind.name == "export"  # whose other fields have a value


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_a_recipe_can_be_pasted_and_repeat_no_default(name, tmp_path, monkeypatch):
    pipeline = check_pipeline(RECIPES[name](output=str(tmp_path)), name)
    plan = plan_of(pipeline)
    outputs = {one: plan.folder(one) for one in plan.instances}
    for instance in plan.instances.values():
        words = plan.command(instance.name, outputs)
        assert not {"None", "", "[]", "()"} & set(words), words
        assert shlex.split(shlex.join(words)) == words
    (pretrain,) = [i.name for i in plan.instances.values() if i.kind.name == "pretrain"]
    assert "--no-register" in plan.command(pretrain, outputs)


def test_a_stage_command_has_only_what_differs_from_its_recipe(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    (source / "0.jpg").write_bytes(b"x")
    given = {"source": str(source), "size": 256, "splits": [], "deduplicate": "off", "quality": 80, "sample": None}
    stages = {"data": Stage(job="prepare", recipe="jpeg256", fields=given)}
    plan = plan_of(check_pipeline(Pipeline(name="p", output=str(tmp_path / "out"), stages=stages), "test"))
    flags = {word.removeprefix("--").removeprefix("no-") for word in plan.command("data") if word.startswith("--")}
    assert flags == {"recipe", "output", "source", "quality"}
