"""The commands of jobs/pipeline.py."""

import argparse
import contextlib
import inspect
import json
import logging
import os
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import credentials, lease, storage
from pipeline.config import fingerprint
from pipeline.errors import InUse, JobFailed, Unavailable, UserError, nearest
from pipeline.graph import estimate, file, instances, rayjobs, report, runner, state
from pipeline.graph.executor import Executor
from pipeline.graph.plan import DONE, RUNNING, Plan, Status
from pipeline.graph.recipes import RECIPES
from pipeline.help import ArgumentParser
from pipeline.outputs import check_output, refuse_package_folder

logger = logging.getLogger(__name__)

COMMANDS = ("run", "status", "stop", "export", "schema", "promote")
Show = Callable[[str], None]


def main(argv: list[str], description: str, show: Show) -> int:
    """Runs a command line. Returns its exit code. show: prints a result. Raises UserError for wrong input."""
    argv = credentials.take_from_arguments(argv)
    command = argv[0] if argv and argv[0] in COMMANDS else "run"
    words = argv[1:] if argv and argv[0] in COMMANDS else argv
    if not argv or ({"-h", "--help", "--help-all"} & set(argv) and command != "promote"):
        show(_page(command, description))
        raise SystemExit(0)
    if command == "promote":
        from pipeline.graph import promotion  # MLflow's registry

        return promotion.main(words, show)
    if command == "schema":
        from pipeline.graph import schema

        show(json.dumps(schema.schema(), indent=1))
        return 0
    options, pipeline, where = _read(command, words)
    if command == "status":
        return status(pipeline, where, options, show)
    if command == "stop":
        return stop(pipeline, where, options, show)
    if command == "export":
        from pipeline.graph import export

        plan = _plan(pipeline, where)
        show(export.export(plan, options.to, options.image))
        return 0
    return run(pipeline, where, options, show, again=lambda: _read(command, words)[1])


def _page(command: str, description: str) -> str:
    """The page of --help, 80 columns wide."""
    taken = "" if command == "schema" else " FILE"
    lines = [f"usage: python jobs/pipeline.py {command}{taken} [--flag value ...]", ""]
    for paragraph in inspect.cleandoc(description).split("\n\n"):
        filled = paragraph.splitlines() if paragraph.startswith(" ") else textwrap.wrap(paragraph, report.WIDTH)
        lines += [*filled, ""]
    if command == "schema":
        return "\n".join(lines)
    lines.append("flags:" if command == "run" else f"flags of {command}:")
    for action in _parser(command, with_file=False)._actions:
        flag = action.option_strings[-1] if action.option_strings else action.dest.upper()
        value = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or 'VALUE'}"
        text = textwrap.wrap(action.help or "", report.WIDTH - 26)
        lines.append(f"  {flag + value:23s} {text[0] if text else ''}")
        lines += [" " * 26 + line for line in text[1:]]
    return "\n".join(lines)


def _parser(command: str, with_file: bool) -> argparse.ArgumentParser:
    parser = ArgumentParser(prog=f"jobs/pipeline.py {command}", add_help=False)
    if with_file:
        parser.add_argument("file", help="Pipeline file: .yaml, or .py with a function `pipeline`.")
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"Instead of a file, one of: {', '.join(RECIPES)}. Its parameters are flags."
    )
    if command in ("run", "stop"):
        parser.add_argument("--address", metavar="URL", help="Job server of a Ray cluster, http://HEAD:8265 or auto.")
    if command in ("run", "status"):
        parser.add_argument("--json", action="store_true", help="Print only the result, as JSON.")
    if command == "stop":
        parser.add_argument("stages", nargs="*", help="Default: all that run.")
    if command == "export":
        parser.add_argument(
            "--to",
            required=True,
            choices=("commands", "argo", "airflow", "yaml"),
            metavar="FORMAT",
            help="commands, argo, airflow or yaml.",
        )
        parser.add_argument("--image", default="vit-pipeline", metavar="IMAGE", help="Container image of argo's steps.")
    if command == "run":
        parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="Run these stages.")
        parser.add_argument(
            "--from",
            nargs="+",
            default=[],
            dest="first",
            metavar="STAGE",
            help="Run these stages and all that depend on them.",
        )
        parser.add_argument(
            "--until", nargs="+", default=[], metavar="STAGE", help="Run these stages and all their dependencies."
        )
        parser.add_argument(
            "--force",
            nargs="*",
            metavar="STAGE",
            help="Run these stages again from an empty folder; without a name all selected ones.",
        )
        parser.add_argument("--dry-run", action="store_true", help="Print what would run, with estimates.")
        parser.add_argument("--parallel", type=int, metavar="N", help="Maximum number of concurrent stages.")
        parser.add_argument("--every", metavar="T", help="Run until stopped, one pass every 30m, 1h or 1d.")
        parser.add_argument("--skip-if-running", action="store_true", help="Exit with code 0 if another run is active.")
    return parser


# ---------------------------------------------------------------- the command line


def parse(command: str, words: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options of a command line and the parameters of its recipe. Raises UserError for an invalid command line."""
    first = ArgumentParser(add_help=False)
    first.add_argument("--recipe")
    recipe = first.parse_known_args(words)[0].recipe
    if recipe is None:
        if all(word.startswith("-") for word in words):
            raise UserError(f"no pipeline given: give a file, or --recipe NAME (recipes: {', '.join(RECIPES)})")
        return _known(_parser(command, with_file=True), words), {}
    if recipe not in RECIPES:
        raise UserError(f'unknown recipe "{recipe}"{nearest(recipe, RECIPES)}; recipes: {", ".join(RECIPES)}')
    parameters, others = _parameters(RECIPES[recipe], words)
    options = _known(_parser(command, with_file=False), others)
    options.file = None
    return options, parameters


def _read(command: str, words: Sequence[str]) -> tuple[argparse.Namespace, file.Pipeline, str]:
    """The options of a command line, its pipeline, and the name of the pipeline in errors."""
    options, parameters = parse(command, words)
    if options.file is not None:
        return options, file.load(options.file), options.file
    where = f"recipe {options.recipe}"
    return options, file.check_pipeline(RECIPES[options.recipe](**parameters), where), where


def _known(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses the words. Raises UserError for an unknown flag, with the nearest valid one."""
    options, unknown = parser.parse_known_args(list(words))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown flag {unknown[0]}{nearest(unknown[0], flags)}; --help lists them")
    return options


def _parameters(function: Callable[..., file.Pipeline], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Splits the words into the parameters of a recipe and the rest."""
    hints = typing.get_type_hints(function)
    parser = ArgumentParser(add_help=False)
    for name in inspect.signature(function).parameters:
        kinds = [k for k in typing.get_args(hints[name]) or (hints[name],) if k is not types.NoneType]
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kinds[0], default=argparse.SUPPRESS)
    known, others = parser.parse_known_args(list(words))
    return vars(known), others


def _plan(pipeline: file.Pipeline, where: str) -> Plan:
    """The plan of a pipeline, after all checks that need no work. Raises UserError."""
    found = instances.expand(pipeline, where)
    refuse_package_folder(pipeline.root)
    plan = Plan(pipeline, found, state.load(pipeline.root), where)
    plan.check_inputs()
    return plan


# ---------------------------------------------------------------- run


def run(
    pipeline: file.Pipeline, where: str, options: Any, show: Show, again: Callable[[], file.Pipeline] | None = None
) -> int:
    """Runs one pass, or one per interval of `--every`.

    again: reads the pipeline again for the next pass, because the file or the source may have changed. Wrong input
    ends a schedule only before its first pass; later it may be repaired before the next pass. Raises UserError.
    """
    if options.parallel is not None and options.parallel < 1:
        raise UserError(f"--parallel {options.parallel} must be at least 1")
    if options.every is None:
        return run_once(pipeline, where, options, show)
    from pipeline.operations.evaluation import seconds, ticks

    passes = ticks(seconds(options.every))
    with contextlib.suppress(Unavailable):
        _select(_plan(pipeline, where), options)
    for _ in passes:
        try:
            run_once(again() if again else pipeline, where, options, show)
        except InUse:
            logger.info("%s is being run already; this pass is skipped", pipeline.name)
        except (UserError, JobFailed, OSError) as error:  # a store or a server may be back for the next pass
            logger.error("%s", error)
    return 0


def run_once(pipeline: file.Pipeline, where: str, options: Any, show: Show) -> int:
    """Runs the stages that are not done. Returns the exit code."""
    plan = _plan(pipeline, where)
    selected = _select(plan, options)
    states = plan.survey()
    if options.dry_run:
        cpus = float(len(os.sched_getaffinity(0)))
        todo = [name for name in selected if states[name].state != DONE or name in plan.forced]
        estimates = {name: estimate.estimate(plan, name, cpus) for name in todo}
        show(report.dry_run(plan, states, selected, estimates))
        return 0
    if not plan.forced and all(states[name].state == DONE for name in selected):
        _show_end(plan, states, {}, 0.0, options, show)
        return 0
    check_output(plan.state.root)
    executor = _executor(plan, options.address)
    holder = lease.Lease(
        storage.join(plan.state.root, state.FOLDER),
        pipeline.name,
        doing="being run",
        remedy="wait for that run, or stop it with `jobs/pipeline.py stop`",
    )
    try:
        held = holder.__enter__()
    except InUse:
        if options.skip_if_running:
            logger.info("%s is already running; this run is skipped", pipeline.name)
            return 0
        raise
    try:
        return _run_held(_plan(pipeline, where), executor, options, show)
    finally:
        held.__exit__(None, None, None)


def _select(plan: Plan, options: Any) -> list[str]:
    selected = plan.select(options.only, options.first, options.until)
    if options.force is not None:
        plan.forced = set(plan.named(options.force, "--force")) & set(selected) if options.force else set(selected)
    return selected


def _run_held(plan: Plan, executor: Executor, options: Any, show: Show) -> int:
    """Runs the pipeline while this process holds the lease. Returns the exit code."""
    selected = _select(plan, options)
    states = plan.survey()
    cpus = executor.cpus if executor.cpus != float("inf") else 1.0
    guesses = {name: estimate.estimate(plan, name, cpus) for name in selected if states[name].state != DONE}
    continued = runner.about_run(plan)
    from pipeline.graph.record import PipelineRecord  # MLflow

    record = PipelineRecord(plan, continued)
    plan.done.clear()
    plan.outputs.clear()
    running = runner.Runner(plan, selected, executor, parallel=options.parallel)
    try:
        outcome = running.run()
    except BaseException:
        record.finish(plan.survey(), [], {}, "KILLED")
        plan.state.save()
        raise
    states = plan.survey()
    fresh = set(outcome.done)
    estimates = {name: e.seconds for name, e in guesses.items() if e is not None and name in fresh}
    rows = report.cost_rows(plan, states, estimates)
    failed = bool(outcome.failed or outcome.blocked)
    address = record.finish(states, rows, estimates, "FAILED" if failed else "FINISHED")
    if not failed:
        plan.state.run = {}
    plan.state.save()
    text = report.page(plan, states, rows, {})
    storage.write_bytes(storage.join(plan.state.root, state.FOLDER, "report.md"), text.encode())
    _show_end(plan, states, estimates, outcome.seconds, options, show)
    if address and not options.json:
        logger.info("MLflow: %s", address)
    for name in outcome.failed:
        failure = plan.state.record(name).failed
        if failure is not None:
            logger.error("%s %s: %s", name, "stopped" if failure.stopped else "failed", failure.reason)
    return 1 if failed else 0


def _show_end(
    plan: Plan, states: dict[str, Status], estimates: dict[str, float], seconds: float, options: Any, show: Show
) -> None:
    if options.json:
        show(json.dumps({**report.status_json(plan, states), "seconds": seconds}))
        return
    show(report.status_table(plan, states) + "\n")
    if rows := report.cost_rows(plan, states, estimates):
        show(report.cost_table(rows) + "\n")
    show(report.result_text(plan, states, seconds))


def _executor(plan: Plan, address: str | None) -> Executor:
    if rayjobs.is_wanted(address):
        return rayjobs.RayJobs(address)
    from pipeline.graph.processes import Processes

    root = plan.state.root
    if storage.is_remote(root):
        return Processes(os.path.expanduser(f"~/.cache/vit-pipeline/pipelines/{fingerprint(root)}"))
    return Processes(storage.join(root, state.FOLDER, "processes"))


# ---------------------------------------------------------------- status, stop


def status(pipeline: file.Pipeline, where: str, options: Any, show: Show) -> int:
    """Shows the state of each stage."""
    plan = _plan(pipeline, where)
    states = plan.survey()
    if options.json:
        show(json.dumps(report.status_json(plan, states)))
        return 0
    holder = lease.current_holder(storage.join(plan.state.root, state.FOLDER))
    text = f"run by process {holder['pid']} on {holder['host']}" if holder else None
    if text is None and any(s.state == RUNNING for s in states.values()):
        text = "no runner; the next `run` takes over the running stages"
    show(report.status_table(plan, states, text))
    return 0


def stop(pipeline: file.Pipeline, where: str, options: Any, show: Show) -> int:
    """Stops running stages, which first save their state."""
    plan = _plan(pipeline, where)
    wanted = plan.named(options.stages, "stop") if options.stages else list(plan.instances)
    executor = _executor(plan, options.address)
    stopped = 0
    for name in wanted:
        record = plan.state.records.get(name)
        if record is not None and record.running is not None:
            executor.stop(record.running.job)
            show(f"{name}: asked to stop ({record.running.job})")
            stopped += 1
    if not stopped:
        show("nothing runs")
    return 0
