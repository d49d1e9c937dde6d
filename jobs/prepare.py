"""Images in, shards out: class folders, archives or a bucket become a verified dataset that any loader reads.

    python jobs/prepare.py --source photos/ --output s3://bucket/photos        JPEG shards, for pre-training
    python jobs/prepare.py --recipe patches224 --source eval/ --output sets/eval
    python jobs/prepare.py --vtab all --raw vtab-raw/ --output sets/vtab       the nineteen tasks of VTAB-1k
    python jobs/prepare.py --verify s3://bucket/photos                         checksums, counts, schema
    python jobs/prepare.py --describe s3://bucket/photos                       numbers, contact sheet, histogram
    python jobs/prepare.py                                                     the demo: scikit-learn's digits

A job that is stopped continues when the same command is given again. Inputs that are no usable images are listed with a
reason in rejects.parquet. S3 credentials and endpoint come from the AWS_* environment.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from typing import Any

from pipeline import cluster, config, storage
from pipeline.data.format.shards import Manifest
from pipeline.data.prepare import RECIPES, PrepareConfig
from pipeline.errors import UserError

logger = logging.getLogger("jobs.prepare")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(PrepareConfig):
    """jobs/prepare.py"""

    vtab: tuple[str, ...] = ()
    """Prepare these VTAB-1k tasks (or all) from the published archives in --raw."""
    raw: str | None = None
    """Folder of raw archives for --vtab."""
    vtab_splits: tuple[str, ...] = ("train800", "val200", "train800val200", "test")
    """Splits of --vtab to build; train, val and trainval are the full pools."""
    download: bool = False
    """Fetch the archives of --vtab that are missing in --raw and can be had by URL."""
    no_verify: bool = False
    """Take the archives of --vtab as they are: no checksums, no official counts."""
    verify: str | None = None
    """Check a finished dataset against its manifest, and do nothing else."""
    describe: str | None = None
    """Print what is in a finished dataset; draws into --output, or runs/describe/<name>."""
    address: str | None = None
    """Ray cluster to use: auto or host:port; without it Ray starts inside this process."""
    num_cpus: int | None = None
    """CPUs of an embedded Ray."""
    tracking: bool = True
    """Record the preparation in MLflow."""
    tracking_uri: str | None = None
    """MLflow server; default MLFLOW_TRACKING_URI, or SQLite in this folder."""
    json: bool = False
    """Print the result as JSON, and nothing else, on stdout."""


def command(recipe: Callable[[], PrepareConfig]) -> Callable[[], Command]:
    def make() -> Command:
        base = recipe()
        return Command(**{field.name: getattr(base, field.name) for field in dataclasses.fields(PrepareConfig)})

    make.__doc__ = recipe.__doc__
    return make


def main(argv: list[str]) -> int:
    recipes = {name: command(recipe) for name, recipe in RECIPES.items()}
    default = "jpeg256" if argv else "demo"
    options = config.parse(
        gather(argv, "--source"), recipes, default, prog="jobs/prepare.py", description=__doc__ or ""
    )
    if options.verify:
        return verify(options)
    if options.describe:
        return describe(options)
    if options.vtab:
        return vtab(options)
    from pipeline.data import prepare
    from pipeline.operations import doctor
    from pipeline.tracking import tracking_uri

    settings = PrepareConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(PrepareConfig)}
    )
    cluster.configure(options.address, options.num_cpus, dashboard=False)
    connect = cluster.connect
    server = tracking_uri(options.tracking_uri) if options.tracking else None
    doctor.preflight(options.address, options.tracking_uri, tracking=options.tracking)
    manifests = prepare.prepare(settings, quiet=options.json, connect=connect, tracking_uri=server)
    results = {name or "dataset": summary(settings.output, name, manifest) for name, manifest in manifests.items()}
    if options.json:
        print(json.dumps(results))
    else:
        for name, result in results.items():
            reasons = "".join(f", {count} {reason}" for reason, count in result["rejects_by_reason"].items())
            print(
                f"{name}: prepared={result['prepared']} shards={result['shards']} rejects={result['rejects']}{reasons} "
                f"duplicates={result['duplicates']} classes={result['classes']} "
                f"fingerprint={result['fingerprint']}  {result['uri']}"
            )
    return 0


def summary(output: str, split: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "uri": storage.normalise(storage.join(output, split) if split else output),
        "prepared": manifest.rows,
        "shards": len(manifest.shards),
        "rejects": sum(manifest.rejects.values()),
        "rejects_by_reason": manifest.rejects,
        "duplicates": manifest.duplicates,
        "classes": len(manifest.classes),
        "fingerprint": manifest.fingerprint,
    }


def gather(argv: list[str], flag: str) -> list[str]:
    """`--source a --source b` as `--source a b`."""
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


def verify(options: Command) -> int:
    from pipeline.data.format.describe import verify

    problems = verify(options.verify)
    if options.json:
        print(json.dumps({"uri": options.verify, "ok": not problems, "problems": problems}))
    else:
        print("\n".join(problems) if problems else f"{options.verify}: verified, nothing is wrong")
    return 1 if problems else 0


def describe(options: Command) -> int:
    from pipeline.data.format.describe import describe

    name = storage.normalise(options.describe or "").rpartition("/")[2]
    facts = describe(options.describe, options.output or storage.join("runs", "describe", name))
    print(json.dumps(facts) if options.json else facts["text"])
    return 0


def vtab(options: Command) -> int:
    """The nineteen tasks of VTAB-1k. Exit code 1 when a task or a split could not be prepared; the others are finished then."""
    if not options.raw or not options.output:
        raise UserError("--vtab needs --raw (the folder of published archives) and --output")
    from pipeline import vtab
    from pipeline.tracking import Run, names, start_run, tracking_uri

    tasks = vtab.TASKS if "all" in options.vtab else options.vtab
    preparation = vtab.check_requests(
        tasks,
        options.raw,
        options.output,
        splits=options.vtab_splits,
        download=options.download,
        verify=not options.no_verify,
    )
    about = {
        "vtab": ",".join(tasks),
        "splits": ",".join(options.vtab_splits),
        "raw": options.raw,
        "output": options.output,
    }
    cluster.configure(options.address, options.num_cpus, dashboard=False)
    with contextlib.ExitStack() as stack:
        run: Run | None = None
        if options.tracking and preparation.todo:
            name = storage.normalise(options.output).rpartition("/")[2]
            server = tracking_uri(options.tracking_uri)
            run = stack.enter_context(start_run(names.PREPARE, name, config=about, tracking_uri=server))
        vtab.build_datasets(preparation)
        result = preparation.counts
        splits = [(f"{task}.{split}", made) for task, parts in result.items() for split, made in parts.items()]
        if run is not None:
            totals = ((names.ROWS, "images"), (names.REJECTS, "rejects"))
            run.log({name: sum(made[key] for _, made in splits) for name, key in totals})
            run.log_text(vtab.counts_table(result), "counts.txt")
            for role, made in splits:
                run.log_dataset(made["uri"], {**made, "rows": made["images"]}, role=role, made=True)
    print(json.dumps(result) if options.json else vtab.counts_table(result))
    for problem in preparation.problems:
        logger.error("%s", problem)
    return 1 if preparation.problems else 0


if __name__ == "__main__":
    config.run_job(main)
