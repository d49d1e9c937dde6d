"""The pipeline file: its syntax, an error for each invalid value, and its instances."""

import cProfile
import dataclasses
import json
import pstats
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.graph import commands, file, instances, schema, state
from pipeline.graph.plan import Plan
from pipeline.graph.recipes import RECIPES

ROOT = Path(__file__).parents[2]
SWEEP = """
name: sweep
stages:
  data: {job: prepare, recipe: demo}
  pretrain:
    job: pretrain
    recipe: demo
    fields: {data: "${data.output}/train", validation: "${data.output}/test", optimizer: {weight-decay: 0.1}}
    matrix: {optimizer.lr: [1e-3, 3e-4]}
  transfer:
    job: transfer
    recipe: demo
    fields: {checkpoint: "${pretrain.output}", data: "${data.output}"}
    matrix: {tasks: [finetune, fewshot, [linear, knn]]}
promote: {over: transfer, at_least: 50, no_worse_than: champion}
"""


def values(**changes):
    return {**yaml.safe_load(SWEEP), **changes}


def plan_of(pipeline, root):
    pipeline = dataclasses.replace(pipeline, output=str(root))
    return Plan(pipeline, instances.expand(pipeline), state.load(pipeline.root))


def test_a_sweep_and_its_transfers(tmp_path):
    plan = plan_of(file.from_dict(values()), tmp_path)
    assert list(plan.instances) == [
        "data",
        "pretrain[lr=1e-3]",
        "pretrain[lr=3e-4]",
        *(
            f"transfer[lr={lr},tasks={tasks}]"
            for lr in ("1e-3", "3e-4")
            for tasks in ("finetune", "fewshot", "linear+knn")
        ),
        "promote",
    ]
    transfer = plan.instances["transfer[lr=3e-4,tasks=linear+knn]"]
    assert set(transfer.needs) == {"data", "pretrain[lr=3e-4]"}
    assert transfer.config.tasks == ("linear", "knn")
    pretrain = plan.instances["pretrain[lr=1e-3]"].config
    assert (pretrain.optimizer.lr, pretrain.optimizer.weight_decay) == (0.001, 0.1)
    words = plan.command(transfer.name, {name: plan.folder(name) for name in plan.instances})
    assert words[:3] == ["jobs/transfer.py", "--suite", "demo"]
    assert words[words.index("--checkpoint") + 1] == plan.folder("pretrain[lr=3e-4]")
    assert words[words.index("--tasks") + 1 : words.index("--tasks") + 3] == ["linear", "knn"]


def test_all_instances_of_a_stage_in_one_field(tmp_path):
    more = {"job": "prepare", "fields": {"source": "${parts.*.output}"}}
    parts = {"job": "prepare", "recipe": "demo", "matrix": {"seed": [0, 1, 2]}}
    plan = plan_of(file.from_dict({"name": "all", "stages": {"parts": parts, "more": more}}), tmp_path)
    assert plan.instances["more"].needs == ("parts[seed=0]", "parts[seed=1]", "parts[seed=2]")


def test_an_address_that_is_written_out_is_a_reference_too(tmp_path):
    data = {"job": "prepare", "recipe": "demo", "fields": {"output": str(tmp_path / "data")}}
    pretrain = {
        "job": "pretrain",
        "recipe": "demo",
        "fields": {"data": str(tmp_path / "data" / "train"), "validation": None},
    }
    found = instances.expand(file.from_dict({"name": "out", "stages": {"pretrain": pretrain, "data": data}}))
    assert found["pretrain"].needs == ("data",)
    assert list(found) == ["data", "pretrain"]


STAGES = {
    "unknown key": ({"x": {"job": "prepare", "matrx": {}}}, 'unknown key "matrx" (did you mean "matrix"?)'),
    "no job": ({"x": {"recipe": "demo"}}, "stages.x: the key job is missing"),
    "unknown job": ({"x": {"job": "pretain"}}, 'unknown job "pretain" (did you mean "pretrain"?)'),
    "unknown recipe": (
        {"x": {"job": "prepare", "recipe": "dmeo"}},
        'prepare has no recipe "dmeo" (did you mean "demo"?)',
    ),
    "unknown field": (
        {"x": {"job": "pretrain", "fields": {"optimizer": {"lrr": 1}}}},
        'stage x: unknown field "optimizer.lrr" (did you mean "optimizer.lr"?)',
    ),
    "wrong type": (
        {"x": {"job": "pretrain", "fields": {"batch_size": "many"}}},
        "batch_size: expected int, found 'many'",
    ),
    "wrong value": (
        {"x": {"job": "pretrain", "recipe": "demo", "fields": {"batch_size": -1}}},
        "batch_size -1 must be",
    ),
    "unknown stage": (
        {"data": {"job": "prepare", "recipe": "demo"}, "x": {"job": "pretrain", "fields": {"data": "${dta.output}"}}},
        '${dta.output}: no stage "dta" (did you mean "data"?)',
    ),
    "unknown output": (
        {"data": {"job": "prepare", "recipe": "demo"}, "x": {"job": "pretrain", "fields": {"data": "${data.train}"}}},
        "only the output of a stage can be referenced",
    ),
    "circle": (
        {
            "a": {"job": "prepare", "fields": {"source": "${b.output}"}},
            "b": {"job": "prepare", "fields": {"source": "${c.output}"}},
            "c": {"job": "prepare", "fields": {"source": "${a.output}"}},
        },
        "in a cycle: a -> b -> c -> a",
    ),
    "itself": ({"a": {"job": "prepare", "fields": {"source": "${a.output}"}}}, "in a cycle: a -> a"),
    "output inside another's": (
        {
            "a": {"job": "prepare", "recipe": "demo", "fields": {"output": "/x/data"}},
            "b": {"job": "prepare", "recipe": "demo", "fields": {"output": "/x/data/more"}},
        },
        "the output of b (/x/data/more) lies in that of a (/x/data)",
    ),
    "one output for all": (
        {"a": {"job": "prepare", "recipe": "demo", "fields": {"output": "/x/data"}, "matrix": {"seed": [0, 1]}}},
        "lies in that of a[seed=0]",
    ),
    "output inside its input": (
        {"a": {"job": "prepare", "fields": {"source": "/x", "output": "/x/data"}}},
        "the output of a (/x/data) lies in the input of a (/x)",
    ),
    "many for one": (
        {
            "p": {"job": "pretrain", "recipe": "demo", "matrix": {"seed": [0, 1]}},
            "t": {"job": "transfer", "fields": {"checkpoint": "${p.*.output}", "data": "/x"}},
        },
        "expands to 2 outputs, but this field takes one",
    ),
    "matrix of an unknown field": ({"x": {"job": "pretrain", "matrix": {"lr": [1]}}}, 'matrix: unknown field "lr"'),
    "empty matrix": ({"x": {"job": "pretrain", "matrix": {"seed": []}}}, "matrix.seed has no values"),
    "twice the same": (
        {"x": {"job": "pretrain", "matrix": {"seed": [1, 1]}}},
        "two combinations of the matrix are equal",
    ),
    "in both places": (
        {"x": {"job": "pretrain", "fields": {"seed": 1}, "matrix": {"seed": [1]}}},
        "seed is given both in the matrix and outside it",
    ),
    "missing field": ({"x": {"job": "transfer", "fields": {"data": "/x"}}}, "the field checkpoint is missing"),
    "output in the state": (
        {"a": {"job": "prepare", "recipe": "demo", "fields": {"output": "${pipeline.output}/_pipeline/logs"}}},
        "where the pipeline keeps its state",
    ),
    "output where another stage writes": (
        {
            "a": {"job": "prepare", "recipe": "demo"},
            "b": {"job": "prepare", "recipe": "demo", "fields": {"output": "${pipeline.output}/a/more"}},
        },
        "where stage a writes",
    ),
    "output in another's by reference": (
        {
            "a": {"job": "prepare", "recipe": "demo"},
            "b": {"job": "prepare", "recipe": "demo", "fields": {"output": "${a.output}/more"}},
        },
        "its output lies in the output of another stage",
    ),
    "reference without end": (
        {"x": {"job": "pretrain", "fields": {"data": "${data.output/train"}}},
        "incomplete reference; write ${STAGE.output}",
    ),
    "text that means an instance": (
        {"x": {"job": "pretrain", "fields": {"data": "$<data>/train"}}},
        "a value must not contain $<",
    ),
    "unknown task": (
        {"x": {"job": "transfer", "recipe": "vtab1k", "fields": {"checkpoint": "/x", "data": "/x", "tasks": ["petz"]}}},
        'suite vtab1k has no task "petz" (did you mean "pets"?)',
    ),
    "nothing to evaluate": ({"x": {"job": "evaluate"}}, "give the field runs or model"),
    "resources below nothing": (
        {"x": {"job": "prepare", "recipe": "demo", "resources": {"cpus": -1}}},
        "stages.x.resources.cpus -1.0 must be a number of at least 0",
    ),
    "resources that are no number": (
        {"x": {"job": "prepare", "recipe": "demo", "resources": {"memory": float("nan")}}},
        "resources.memory nan must be",
    ),
    "name of two lines": ({"x\ny": {"job": "prepare"}}, r'invalid name "x\ny"'),
    "default input that is not there": (
        {"x": {"job": "pretrain", "recipe": "demo", "fields": {"data": "demo:digits"}}},
        "nothing is there (the default of validation; give the field)",
    ),
    "bad name": ({"x y": {"job": "prepare"}}, 'invalid name "x y"'),
    "reserved name": ({"promote": {"job": "prepare"}}, 'the stage name "promote" is reserved'),
}


@pytest.mark.parametrize("name", STAGES)
def test_invalid_values_are_one_line_before_anything_starts(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # away from the outputs of `make demo`
    stages, message = STAGES[name]
    place = tmp_path / "pipeline.yaml"
    place.write_text(yaml.safe_dump({"name": "wrong", "output": str(tmp_path / "out"), "stages": stages}))
    with pytest.raises(UserError) as error:
        commands.main(["run", str(place)], "", print)
    assert message in str(error.value)
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


STAGE = "stages: {a: {job: prepare, recipe: demo}}\n"
BOMB = "".join(f"  {new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in ("ab", "bc", "cd", "de", "ef", "fg"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nstages: {a: {job: prepare}\n", "not valid YAML"),
        ("name: x\nstages:\n  a: {job: prepare}\n  a: {job: pretrain}\n", 'line 4: the key "a" is given twice'),
        ("- a\n", "has the keys name, output and stages"),
        ("", "has the keys name, output and stages"),
        ("name: x\n", "the key stages is missing"),
        (f"name: x\n{STAGE}---\nname: y\n", "found another document"),
        (f"x: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\nfields:\n{BOMB}", "more than 100,000 values with expanded aliases"),
        ("name: x\nstages: &s {a: *s}\n", "line 2: an alias refers to a node that contains it"),
        (
            "name: x\nstages: {a: {job: prepare, fields: {source: &s [*s]}}}\n",
            "an alias refers to a node that contains it",
        ),
        (f"1: x\nname: x\n{STAGE}", 'a key must be a string, and YAML does not parse "1" as one; put it in quotes'),
        ("name: x\nstages: {on: {job: prepare}}\n", 'YAML does not parse "on" as one'),
        ("name: x\nstages: {2026-01-01: {job: prepare}}\n", 'YAML does not parse "2026-01-01" as one'),
        ("name: x\nstages: {[a, b]: {job: prepare}}\n", "YAML does not parse a list or mapping as one"),
        ("name: x\nstages: [a]\n", "stages: expected dict, found"),
        ("name: x\nstages: {a: prepare}\n", "stages.a: expected a mapping with the keys of Stage, found"),
        ("name: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("[" * 5000, "not valid YAML"),
        ("#" * (2 << 20), "a pipeline file has at most"),
        (f"name: x\nparallel: 0\n{STAGE}", "parallel 0 must be at least 1"),
        (f"name: x\nprices: {{cpu_hour: -1}}\n{STAGE}", "prices.cpu_hour -1.0 must be a number of at least 0"),
        (f"name: x\nprices: {{gpu: h1000}}\n{STAGE}", 'prices.gpu: unknown GPU "h1000" (did you mean "h100"?)'),
        (f"name: x\n{STAGE}promote: {{over: a}}\n", "over takes transfer stages"),
        (f"name: x\n{STAGE}promote: {{metric: mean}}\n", "the key over is missing"),
        (f"name: x\n{STAGE}promote: {{over: a, atleast: 3}}\n", 'unknown key "atleast" (did you mean "at_least"?)'),
        (SWEEP.replace("at_least: 50", "metric: linaer"), 'transfer has no score "linaer" (did you mean "linear"?)'),
        (
            "name: x\nstages: {a: {job: prepare, fields: {source: /nowhere/at/all}}}\n",
            "source: /nowhere/at/all: nothing is there",
        ),
    ],
)
def test_files_that_are_not_pipelines(tmp_path, text, message):
    place = tmp_path / "p.yaml"
    place.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        commands.main(["run", str(place)], "", print)
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [place]


def test_python_is_checked_as_yaml_is(tmp_path):
    place = tmp_path / "p.py"
    made = "from pipeline.graph.file import Pipeline, Stage\npipeline = Pipeline(name='x', stages={{'a': {stage}}}, {more})\n"
    for stage, more, message in (
        (
            "Stage(job='prepare', fields={'source': 'demo:digits'})",
            "retries='many'",
            "retries: expected int, found 'many'",
        ),
        ("Stage(job='prepare', matrix={'seed': 3})", "", "stages.a.matrix.seed: expected list, found 3"),
        ("'prepare'", "", "stages.a: expected a mapping with the keys of Stage, found 'prepare'"),
    ):
        place.write_text(made.format(stage=stage, more=more))
        with pytest.raises(UserError, match=re.escape(message)):
            file.load(str(place))


def test_yaml_and_python_are_the_same(tmp_path):
    made = RECIPES["demo"](output=str(tmp_path))
    (tmp_path / "p.yaml").write_text(file.to_yaml(made))
    assert file.load(str(tmp_path / "p.yaml")) == made
    (tmp_path / "p.py").write_text("from pipeline.graph.recipes import demo\n\ndef pipeline():\n    return demo()\n")
    assert file.load(str(tmp_path / "p.py")) == RECIPES["demo"]()


def test_the_work_of_planning_a_stage_does_not_grow_with_their_number(tmp_path):
    """1,000 stages take 0.7 s. Calls are counted instead, because a loaded machine is slow."""

    def calls_per_stage(seeds):
        given = values()
        given["stages"]["pretrain"]["matrix"] = {"seed": list(range(seeds))}
        pipeline = file.from_dict(given)
        with cProfile.Profile() as profile:
            plan = plan_of(pipeline, tmp_path)
            plan.check_inputs()
            states = plan.survey()
            folders = {plan.folder(name) for name in states}
        assert len(folders) == len(states) == 4 * seeds + 2
        return pstats.Stats(profile).total_calls / len(states)

    calls_per_stage(1)  # imports modules
    few, many = calls_per_stage(25), calls_per_stage(250)
    assert many < 1.2 * few
    assert many < 4000


def test_a_dry_run_imports_no_library_that_is_slow_to_import(tmp_path):
    """torch alone would take longer than the plan; the estimates of all jobs are formulas."""
    code = (
        "import sys; from pipeline.graph import commands; commands.main(sys.argv[1:], '', print); print(*sys.modules)"
    )
    words = ["run", "--recipe", "demo", "--output", str(tmp_path), "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *table, modules = done.stdout.splitlines()
    assert "?" not in "".join(table)  # every stage has an estimate
    assert not {"torch", "ray", "mlflow", "pandas", "scipy", "matplotlib"} & set(modules.split())


def test_the_schema_accepts_what_the_program_accepts_and_lists_the_fields():
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(schema.schema())
    assert not list(checker.iter_errors(values()))
    wrong = values()
    wrong["stages"]["pretrain"]["fields"]["batch_sise"] = 3
    wrong["stages"]["transfer"]["matrx"] = {}
    assert len(list(checker.iter_errors(wrong))) == 2


def test_every_documented_argument_is_accepted(tmp_path):
    shown = []
    assert commands.main(["schema"], "", shown.append) == 0
    assert json.loads(shown[0])["title"]
    with pytest.raises(UserError, match=r'unknown flag --onyl \(did you mean "--only"\?\)'):
        commands.main(["run", "--recipe", "demo", "--onyl", "data"], "", print)
    with pytest.raises(UserError, match="no pipeline given"):
        commands.main(["status", "--json"], "", print)
    assert sys.modules["pipeline"].__file__ == str(ROOT / "pipeline" / "__init__.py")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--parallel", "many"], "argument --parallel: invalid int value: 'many'"),
        (["run", "--parallel", "0"], "--parallel 0 must be at least 1"),
        (["run", "--every", "often"], 'cannot parse the interval "often"'),
        (["run", "--every", "1h", "--only", "dta"], '--only: no stage "dta" (did you mean "data"?)'),
        (["run", "--every", "1h", "--force", "dta"], '--force: no stage "dta" (did you mean "data"?)'),
        (["run", "--only"], "argument --only: expected at least one argument"),
        (["stop", "dta"], 'no stage "dta" (did you mean "data"?)'),
        (["export"], "the following arguments are required: --to"),
        (["export", "--to", "dagster"], "argument --to: invalid choice: 'dagster'"),
    ],
)
def test_invalid_arguments_are_one_line_before_anything_starts(tmp_path, words, message):
    place = tmp_path / "p.yaml"
    place.write_text(f"name: x\noutput: {tmp_path}/out\nstages: {{data: {{job: prepare, recipe: demo}}}}\n")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        commands.main([words[0], str(place), *words[1:]], "", print)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [place]


def test_a_schedule_of_wrong_input_ends_before_its_first_pass(tmp_path):
    place = tmp_path / "p.yaml"
    place.write_text("name: x\nstages: {a: {job: prepare, fields: {source: /nowhere/at/all}}}\n")
    with pytest.raises(UserError, match="/nowhere/at/all: nothing is there"):
        commands.main(["run", str(place), "--every", "1h"], "", print)
