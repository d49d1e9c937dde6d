r"""Turn images into shards: class folders, archives or a bucket become a dataset with checksums.

    python jobs/prepare.py --source photos/ --output runs/photos/data \
        --splits train=0.9 val=0.1
    python jobs/prepare.py --recipe patches224 --source eval/ --output sets/eval
    python jobs/prepare.py vtab all --raw archives/ --output sets/vtab
    python jobs/prepare.py verify s3://bucket/photos     checksums and counts
    python jobs/prepare.py describe s3://bucket/photos   numbers and pictures
    python jobs/prepare.py delete s3://bucket/photos --keys keys.txt
    python jobs/prepare.py                               the demo's data

The subcommands vtab (the nineteen tasks of VTAB-1k), verify, describe and delete have their own --help. To continue a stopped
job, repeat its command. Files that are not usable images are listed in rejects.parquet with a reason. The AWS_*
environment variables set the credentials and the endpoint for s3://. """

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

import tyro

from pipeline import cluster, config, logs, storage
from pipeline.data.prepare.config import RECIPES, PrepareConfig, PrepareJob
from pipeline.errors import UserError, plural
from pipeline.lines import command as command_lines
from pipeline.lines import fit
from pipeline.vtab.config import VtabConfig

if TYPE_CHECKING:
    from pipeline.data.format import Manifest

logger = logging.getLogger("jobs.prepare")
LESS_MEMORY = "A smaller --num-cpus runs fewer processes in parallel"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(PrepareJob):
    """jobs/prepare.py"""

    append: bool = False
    """Add the sources to the finished dataset at --output, as its next revision."""
    json: bool = False
    """Print only the result, as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VtabCommand(VtabConfig):
    """Build the VTAB-1k tasks from the archives that their authors publish."""

    json: bool = False
    """Print only the result, as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VerifyCommand:
    """Check finished datasets against their manifests. Exit code 1 when anything is wrong."""

    uri: tyro.conf.Positional[str]
    """Dataset to check, or a folder of datasets, such as the splits that --splits wrote: all are checked."""
    json: bool = False
    """Print only the result, as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeleteCommand:
    """Delete images by key: the next revision of a dataset is written without them. Repeat a stopped command."""

    uri: tyro.conf.Positional[str]
    """Dataset, or the folder of its splits."""
    keys: str | None = None
    """Text file with one key a line. None: only --purge."""
    purge: bool = False
    """Also remove the older revisions that still have deleted images, and the files that only they use."""
    address: str | None = None
    """Ray cluster to join (auto or host:port). None: the cluster of the submitted job, or an embedded Ray."""
    num_cpus: int | None = None
    """CPU cores for an embedded Ray. None: all."""
    json: bool = False
    """Print only the result, as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DescribeCommand:
    """Print a summary of a finished dataset, and draw a contact sheet and a class histogram."""

    uri: tyro.conf.Positional[str]
    """Dataset to describe: a folder or an s3:// prefix with a manifest.json."""
    output: str | None = None
    """Folder for the plots. None: runs/describe/ and the address, with - in place of /."""
    json: bool = False
    """Print only the result, as JSON."""


def command(recipe: Callable[[], PrepareConfig]) -> Callable[[], Command]:
    def make() -> Command:
        base = recipe()
        return Command(**{field.name: getattr(base, field.name) for field in dataclasses.fields(PrepareConfig)})

    make.__doc__ = recipe.__doc__
    return make


def main(argv: list[str]) -> int:
    commands: dict[str, tuple[Any, Callable[[Any], int]]] = {
        "vtab": (VtabCommand, vtab),
        "verify": (VerifyCommand, verify),
        "delete": (DeleteCommand, delete),
        "describe": (DescribeCommand, describe),
    }
    if argv and argv[0] in commands:
        kind, run = commands[argv[0]]
        return run(
            config.parse_command(argv[1:], kind, prog=f"jobs/prepare.py {argv[0]}", description=kind.__doc__ or "")
        )
    return prepare(argv)


def prepare(argv: list[str]) -> int:
    recipes = {name: command(recipe) for name, recipe in RECIPES.items()}
    default = "jpeg256" if argv else "demo"
    options = config.parse(
        gather(argv, "--source"), recipes, default, prog="jobs/prepare.py", description=__doc__ or ""
    )
    from pipeline.data.prepare import download_images, prepare
    from pipeline.operations import doctor, next_steps
    from pipeline.tracking import resolve_tracking_uri

    settings = PrepareConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(PrepareConfig)}
    )
    cluster.configure(options.address, options.num_cpus, dashboard=False, memory_remedy=LESS_MEMORY)
    server = resolve_tracking_uri(options.tracking_uri) if options.tracking else None
    stdout = logs.reserve_stdout() if options.json else sys.stdout
    doctor.preflight(options.address, options.tracking_uri, tracking=options.tracking)
    if settings.download_only and options.append:
        raise UserError("--append adds images to a dataset, and --download-only writes none; leave one of them out")
    if settings.download_only:
        return show_downloads(options, download_images(settings, tracking_uri=server), stdout)
    manifests = prepare(settings, tracking_uri=server, append=options.append)
    results = {name or "dataset": summary(settings.output, name, manifest) for name, manifest in manifests.items()}
    if options.json:
        print(json.dumps(results), file=stdout)
        return 0
    for name, result in results.items():
        reasons = "".join(f", {count} {reason}" for reason, count in result["rejects_by_reason"].items())
        found = "".join(f", {count} {reason}" for reason, count in result["duplicates_by_reason"].items())
        found += "".join(f", {count} {reason} (reported)" for reason, count in result["reported_by_reason"].items())
        text = (
            f"{name}: prepared={result['prepared']} shards={result['shards']} rejects={result['rejects']}{reasons} "
            f"duplicates={result['duplicates']}{found} classes={result['classes']} "
            f"fingerprint={result['fingerprint']}  {result['uri']}"
        )
        print(fit(text))
    logs.show(
        next_steps.after_preparing(
            {name: storage.join(options.output, name) if name else options.output for name in manifests}
        )
    )
    return 0


def show_downloads(options: Command, result: dict[str, Any], stdout: TextIO) -> int:
    """Prints the counts of --download-only."""
    counts = {name: value for name, value in result.items() if name not in ("config", "archives", "version")}
    counts |= {"uri": storage.normalise(options.output), "archives": len(result["archives"])}
    if options.json:
        print(json.dumps(counts), file=stdout)
        return 0
    reasons = "".join(f", {count} {reason}" for reason, count in result["rejects"].items())
    text = (
        f"downloads: downloaded={counts['downloaded']} archives={counts['archives']} rejects={sum(result['rejects'].values())}"
        f"{reasons} may_pass={counts['may_pass']} bytes={counts['bytes']}  {counts['uri']}"
    )
    print(fit(text))
    if counts["may_pass"]:
        logger.warning("%s failed temporarily; repeat the command to retry", plural(counts["may_pass"], "download"))
    again = command_lines(["python", "jobs/prepare.py", "--source", counts["uri"], "--output", "FOLDER"], indent=6)
    logs.show("next: " + "\n      ".join(again))
    return 0


def summary(output: str, split: str, manifest: "Manifest") -> dict[str, Any]:
    return {
        "uri": storage.normalise(storage.join(output, split) if split else output),
        "prepared": manifest.rows,
        "shards": len(manifest.shards),
        "rejects": sum(manifest.rejects.values()),
        "rejects_by_reason": manifest.rejects,
        "duplicates": manifest.duplicates,
        "duplicates_by_reason": manifest.duplicates_by_reason,
        "reported_by_reason": manifest.reported_by_reason,
        "classes": len(manifest.classes),
        "fingerprint": manifest.fingerprint,
    }


def gather(argv: list[str], flag: str) -> list[str]:
    """`--source a --source b` as `--source a b`. tyro's UseAppendAction would accept only the first form."""
    values, rest, i = [], [], 0
    while i < len(argv):
        if argv[i] == flag or argv[i].startswith(flag + "="):
            values.extend([argv[i].partition("=")[2]] if "=" in argv[i][: len(flag) + 1] else [])
            i += 1
            while i < len(argv) and not argv[i].startswith("--"):
                values.append(argv[i])
                i += 1
        else:
            rest.append(argv[i])
            i += 1
    return [*rest, flag, *values] if values else argv


def verify(options: VerifyCommand) -> int:
    from pipeline.data.format.verify import verify_folder

    found = verify_folder(options.uri)
    is_sound = not any(found.values())
    if options.json:
        datasets = [{"uri": uri, "ok": not problems, "problems": problems} for uri, problems in found.items()]
        print(json.dumps({"uri": options.uri, "ok": is_sound, "datasets": datasets}))
    else:
        for uri, problems in found.items():
            lines = [f"{uri}: {problem}" for problem in problems] or [f"{uri}: verified, no problems found"]
            print(fit("\n".join(lines)))
    return 0 if is_sound else 1


def delete(options: DeleteCommand) -> int:
    if not options.keys and not options.purge:
        raise UserError("delete: give --keys FILE, --purge, or both")
    from pipeline.data.prepare.delete import delete_keys, purge, summary, to_json
    from pipeline.operations import doctor

    doctor.preflight(options.address, None, tracking=False)
    cluster.configure(options.address, options.num_cpus, dashboard=False, memory_remedy=LESS_MEMORY)
    stdout = logs.reserve_stdout() if options.json else sys.stdout
    results = delete_keys(options.uri, options.keys) if options.keys else []
    purged = purge(options.uri) if options.purge else None
    print(to_json(results, purged) if options.json else fit("\n".join(summary(results, purged))), file=stdout)
    return 0


def describe(options: DescribeCommand) -> int:
    from pipeline.data.format.describe import describe_dataset

    place = storage.normalise(options.uri).removeprefix(os.path.join(os.getcwd(), "")).partition("://")
    name = "-".join(part for part in (place[2] or place[0]).split("/") if part)
    facts = describe_dataset(options.uri, options.output or storage.join("runs", "describe", name))
    print(json.dumps(facts) if options.json else fit(facts["text"], indent=12))
    return 0


def vtab(options: VtabCommand) -> int:
    """Builds VTAB-1k tasks. Exit code 1 when a task or a split could not be built; the others are still built."""
    if not options.tasks:
        raise UserError("vtab: name the tasks to build, or all")
    from pipeline import vtab
    from pipeline.tracking import Run, names, resolve_tracking_uri, start_run
    from pipeline.tracking.description import Description

    tasks = vtab.TASKS if "all" in options.tasks else options.tasks
    preparation = vtab.check_requests(
        tasks,
        options.raw,
        options.output,
        splits=options.splits,
        download=options.download,
        verify=not options.no_verify,
    )
    about = {
        "vtab": ",".join(tasks),
        "splits": ",".join(options.splits),
        "raw": options.raw,
        "output": options.output,
    }
    cluster.configure(options.address, options.num_cpus, dashboard=False, memory_remedy=LESS_MEMORY)
    stdout = logs.reserve_stdout() if options.json else sys.stdout
    with contextlib.ExitStack() as stack:
        stack.enter_context(vtab.lock_output(preparation))
        run: Run | None = None
        if options.tracking and preparation.todo:
            name = storage.normalise(options.output).rpartition("/")[2]
            server = resolve_tracking_uri(options.tracking_uri)
            page = Description(
                what=f"VTAB-1k: tasks {', '.join(tasks)} from the archives of their owners.",
                data=[f"archives in {options.raw}", f"data sets in {options.output}"],
                to_continue="repeat the command to build missing splits.",
            )
            run = stack.enter_context(start_run(names.PREPARE, name, config=about, about=page, tracking_uri=server))
        vtab.build_datasets(preparation)
        result = preparation.counts
        splits = [(f"{task}.{split}", made) for task, parts in result.items() for split, made in parts.items()]
        if run is not None:
            totals = ((names.ROWS, "images"), (names.REJECTS, "rejects"))
            run.log({name: sum(made[key] for _, made in splits) for name, key in totals})
            run.log_text(vtab.counts_table(result), "counts.txt")
            for role, made in splits:
                run.log_dataset(made["uri"], {**made, "rows": made["images"]}, role=role, made=True)
    print(json.dumps(result) if options.json else vtab.counts_table(result), file=stdout)
    for problem in preparation.problems:
        logger.error("%s", problem)
    return 1 if preparation.problems else 0


if __name__ == "__main__":
    config.run_job(main)
