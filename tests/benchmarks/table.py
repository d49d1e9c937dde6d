"""Generates two tables of docs/benchmarks.md from results/*.json: all measurements, and the writers of shards.

    python tests/benchmarks/table.py                              prints the tables
    python tests/benchmarks/table.py --write docs/benchmarks.md   writes each between <!-- NAME:begin --> and <!-- NAME:end -->

Each function below reads one result file. Those of the first table return rows of (measurement, this project, others).
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "torch_dataloader": "torch DataLoader",
    "ray_data": "Ray Data",
    "webdataset": "WebDataset",
    "mosaicml_streaming": "mosaicml-streaming",
    "hf_datasets": "Hugging Face datasets",
    "litdata": "litdata",
    "grain": "grain",
    "spdl": "SPDL",
    "mds": "MDSWriter",
    "daft": "Daft",
}

Row = tuple[str, str, str]


def loader(result: dict) -> Iterator[Row]:
    table, plan = result["table"], result["plan"]
    ours = table["ours"]
    peers = {NAMES[tool]: row for tool, row in table.items() if tool in NAMES and "cpu_ms" in row}
    beside = ", ".join(
        f"{name} {row['of_limit']:.0%}" for name, row in sorted(peers.items(), key=lambda p: -p[1]["of_limit"])
    )
    yield (
        "Loading JPEG shards: images per CPU second, as a share of a bare decode and crop loop (higher is better)",
        f"{ours['of_limit']:.0%}",
        beside,
    )
    first = ", ".join(f"{name} {row['first_batch_s']:.1f} s" for name, row in peers.items())
    yield "First batch", f"{ours['first_batch_s']:.1f} s", first
    patches = table["patches_ours"]
    yield (
        "Loading 224 px patches",
        f"{patches['img_s']:,.0f} images/s and core, {patches['of_limit']:.0%} of the copy (CPU time)",
        f"copy of a memory-mapped array {table['patches_copy']['img_s']:,.0f}",
    )
    yield (
        f"Opening, planning and resuming {plan['images']:,} images (CPU time)",
        f"{plan['open_cpu_s'] + plan['plan_and_resume_cpu_s']:.1f} s, {plan['memory_mb']} MB",
        "",
    )


def prepare(result: dict) -> Iterator[Row]:
    table = {
        tuple(name.removesuffix(" CPU").split(", ")): row for name, row in result["table"].items() if "cpu_ms" in row
    }
    peers = {
        tool: (cpus, row) for (tool, cpus), row in sorted(table.items()) if tool in NAMES
    }  # the most CPUs measured
    beside = ", ".join(
        f"{NAMES[tool]} {row['of_limit']:.0%}{' (on one)' if cpus == '1' else ''}"
        for tool, (cpus, row) in peers.items()
    )
    yield (
        "Preparing photographs on two cores: images per CPU second, as a share of a bare decode, resize and encode loop (higher is better)",
        f"{table['job', '2']['of_limit']:.0%}",
        beside,
    )
    rates = ", ".join(f"{NAMES[tool]} {row['images_per_s']:.0f}" for tool, (_, row) in peers.items())
    rates += f", bare loop {table['limit', '2']['images_per_s']:.0f}"
    one, two = (table["job", cpus]["images_per_s"] for cpus in "12")
    yield "The same, images/s after the start", f"{two:.0f}, on one core {one:.0f}", rates
    yield "The same, one unit without Ray (CPU time)", f"{table['unit', '1']['of_limit']:.0%}", ""
    kept = table.get(("kept_job", "2"))
    if kept:
        yield (
            "The same for images that are stored unchanged, as a share of a bare loop that decodes them",
            f"{kept['of_limit']:.0%}, without Ray {table['kept_unit', '1']['of_limit']:.0%}",
            "",
        )


def prepare_memory(result: dict) -> Iterator[Row]:
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        counts, drivers, workers = (
            " / ".join(f"{row[key]:,}" for row in rows) for key in ("images", "driver_mb", "worker_mb")
        )
        yield f"Memory while preparing {counts} small images, {kind}", f"driver {drivers} MB, worker {workers} MB", ""


def loader_threads(result: dict) -> Iterator[Row]:
    for augment in dict.fromkeys(row["augment"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["augment"] == augment]
        threads, rates = (" / ".join(f"{row[key]:,}" for row in rows) for key in ("threads", "images_per_s"))
        yield f"Images per second of {threads} threads in one process, {augment} (simulated cores)", rates, ""


def downloads(result: dict) -> Iterator[Row]:
    """Lists of URLs; of several runs of a tool, the median of its CPU time and of its rate."""

    def of(tool: str, value: str) -> float:
        return statistics.median(row[value] for row in result["results"] if row["tool"] == tool)

    kinds = {
        "prepare": ("Downloading and resizing a list of URLs", "img2dataset"),
        "download_only": ("Downloading a list of URLs into archives", "img2dataset_keep"),
    }
    for tool, (what, peer) in kinds.items():
        ours, theirs = ([f"{of(name, 'cpu_ms'):.1f} ms", f"{of(name, 'per_second'):,.0f}/s"] for name in (tool, peer))
        yield (
            f"{what}, CPU time per image with the start of the command; rate",
            "; ".join(ours),
            f"img2dataset {'; '.join(theirs)}",
        )
    unit, peer = of("unit", "cpu_ms"), of("img2dataset", "cpu_ms")
    yield (
        "Downloading and resizing in one process without Ray, CPU time per image",
        f"{unit:.1f} ms",
        f"img2dataset {peer:.1f} ms",
    )


def decontamination(result: dict) -> Iterator[Row]:
    kinds = ("JPEG quality 50", "shorter side 128, JPEG 90", "crop, 90% of each side", "mirrored", "brightness x 1.3")
    rows = {kind: result["recall"][kind] for kind in kinds}
    recall = ", ".join(f"{kind} {row['evaluation']:.1%}".replace(".0%", "%") for kind, row in rows.items())
    # CIFAR-10 has copies, so a removal there need not be wrong
    posed = [row for name, row in result["posed"].items() if not name.startswith("cifar")]
    removed, images = (sum(row[key] for row in posed) for key in ("removed", "images"))
    (photographs,) = {row["photographs"] for row in rows.values()}
    yield f"Finding changed copies of {photographs} photographs in an evaluation set", recall, ""
    yield f"Wrong removals among {images} images of {len(posed)} posed collections without copies", f"{removed}", ""


def model(result: dict) -> Iterator[Row]:
    for entry in result["results"]:
        name = f"Training step of {entry['variant']}, {entry['precision']}, CPU seconds"
        peers = [("timm", "timm"), ("huggingface", "Hugging Face")]
        beside = ", ".join(f"{label} {entry[key]['fastest_cpu']:.2f}" for key, label in peers if key in entry)
        yield name, f"{entry['ours']['fastest_cpu']:.2f}", beside


def train_step(result: dict) -> Iterator[Row]:
    rows = {entry["row"]: entry for entry in result["results"]}
    ours = rows["ours"]
    beside = ", ".join(
        f"{name} {rows[row]['fastest_cpu']:.2f}" for row, name in (("torch", "plain PyTorch"), ("timm", "timm"))
    )
    name = f"Compiled training step of {ours['variant']} with clipping and AdamW, ZeRO-1 on one worker, CPU seconds"
    yield name, f"{ours['fastest_cpu']:.2f}", beside
    one, two = (rows[row]["images_per_second"] for row in ("one", "two"))
    yield "The same on two workers with one core each", f"{two:.1f} images/s", f"one worker {one:.1f} images/s"


def gpu(result: dict) -> Iterator[Row]:
    steps: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in result["rows"]:
        if row["what"] == "step":
            steps[row["variant"], row["row"]].append(row)

    def mean(variant: str, row: str, column: str) -> float:
        return statistics.mean(step[column] for step in steps[variant, row])

    for variant in ("S/16", "B/16", "L/16", "H/14"):
        beside = ", ".join(
            f"{name} {mean(variant, row, 'images_per_second'):,.0f}"
            for row, name in (("torch", "plain PyTorch"), ("timm", "timm"))
            if (variant, row) in steps
        )
        mfu = mean(variant, "ours", "mfu_architecture")
        rate = f"{mean(variant, 'ours', 'images_per_second'):,.0f} images/s, {mfu:.1%} MFU"
        batch = steps[variant, "ours"][0]["batch"]
        yield f"Compiled training step of {variant}, bf16, one H100, {batch} images", rate, beside


def transfer(result: dict) -> Iterator[Row]:
    features = result["features"]
    yield "Features for probes, relative to a bare torch loop", f"{features['share']:.0%}", ""
    fan_out = result["fan_out"]
    yield (
        "Running the tasks of a suite in parallel",
        f"{fan_out['seconds']:.0f} s, including {fan_out['ray_start']:.0f} s to start Ray",
        f"in sequence {result['in_sequence_seconds']:.0f} s, one process per task "
        f"{result['process_per_task_seconds']:.0f} s",
    )


def pipeline(result: dict) -> Iterator[Row]:
    added, done, planned = (
        result[key]["cpu_seconds"]
        for key in ("added to each of 10 stages", "10 stages, all done", "1,000 stages planned")
    )
    yield "Overhead of a pipeline of ten stages, per job (CPU time)", f"{added:.2f} s", ""
    yield "The same pipeline when all stages are up to date (CPU time)", f"{done:.2f} s", ""
    yield "Planning 1,000 stages, including the start of Python (CPU time)", f"{planned:.2f} s", ""


def listings(result: dict) -> Iterator[Row]:
    alone = {row["files"]: f"one process {row['seconds']:,.0f} s" for row in result["listings"] if not row["tasks"]}
    for row in result["listings"]:
        if row["tasks"]:
            yield (
                f"Listing {row['files']:,} names of a simulated bucket ({row['latency_ms']:.0f} ms a page), {row['tasks']} tasks",
                f"{row['seconds']:,.0f} s; driver {row['driver_mb']} MB, worker {row['worker_mb']} MB",
                alone.get(row["files"], ""),
            )
    for row in result["first"]:
        yield (
            f"From a running Ray to the first prepared unit of {row['files']:,} files there",
            f"{row['first_unit_s']:,.0f} s, of which {row['plan_s']:,.0f} s to the plan",
            "",
        )


SECTIONS = {
    "loader_speed": loader,
    "loader_threads": loader_threads,
    "prepare_speed": prepare,
    "prepare_memory": prepare_memory,
    "download_speed": downloads,
    "listing_speed": listings,
    "decontamination": decontamination,
    "model_speed": model,
    "train_step_cpu": train_step,
    "gpu_h100": gpu,
    "transfer_speed": transfer,
    "pipeline_overhead": pipeline,
}


def measurements() -> str:
    lines = ["| measurement | this project | others |", "| --- | --- | --- |"]
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += [f"| {what} | {ours} | {beside} |" for what, ours, beside in section(json.loads(path.read_text()))]
    return "\n".join(lines)


WRITERS = {
    "limit": "a bare loop, which writes nothing",
    "job": "`prepare`",
    "mds": "MosaicML's MDSWriter",
    "daft": "Daft",
    "webdataset": "WebDataset's ShardWriter",
    "litdata": "litdata's optimize",
    "ray_data": "Ray Data",
    "verify": "images stored unchanged: a bare loop that decodes",
    "kept_job": "images stored unchanged: `prepare`",
}


def writers() -> str:
    """`prepare` and the writers of other tools on two cores."""
    rows = json.loads((RESULTS / "prepare_speed.json").read_text())["table"]
    lines = ["| tool | images/s | of the loop | CPU time, ms an image | of the loop | whole command, s |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for tool, name in WRITERS.items():
        row = rows[f"{tool}, 2 CPU"]
        rate, share, cpu, cpu_share = row["images_per_s"], row["of_limit_rate"], row["cpu_ms"], row["of_limit"]
        lines += [f"| {name} | {rate:,.0f} | {share:.0%} | {cpu:.2f} | {cpu_share:.0%} | {row['seconds']:.0f} |"]
    return "\n".join(lines)


TABLES = {"benchmarks": measurements, "writers": writers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file with two marker lines for each table")
    options = parser.parse_args()
    if options.write is None:
        print("\n\n".join(table() for table in TABLES.values()))
        return
    text = options.write.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise SystemExit(f"{options.write}: no lines {begin} and {end}")
        text = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    options.write.write_text(text)


if __name__ == "__main__":
    main()
