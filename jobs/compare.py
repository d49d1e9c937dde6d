"""Compare pre-training runs by their transfer scores: a leaderboard, and score against compute.

    python jobs/compare.py                    every suite that has results
    python jobs/compare.py --suite vtab1k --output reports/vtab
    python jobs/compare.py --json | jq '.[0].name'

Prints the leaderboard as a table or as JSON. --output also writes leaderboard.md with more columns, leaderboard.json
and compute.png to a folder. Unless --no-log is given, the same files and an HTML page are logged to the MLflow experiment "compare". The
exit code is 2 when there is nothing to compare."""

import dataclasses
import io
import json

from pipeline import storage
from pipeline.config import parse_command, run_job
from pipeline.errors import plural
from pipeline.operations.options import CompareConfig
from pipeline.outputs import check_output


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(CompareConfig):
    """jobs/compare.py"""

    json: bool = False
    """Print only the leaderboard, as JSON."""


def main(argv: list[str]) -> int:
    options = parse_command(argv, Command, prog="jobs/compare.py", description=__doc__ or "")

    from pipeline.operations import comparison
    from pipeline.tracking import names, resolve_tracking_uri, start_run
    from pipeline.tracking.description import Description
    from pipeline.tracking.leaderboard import leaderboard
    from pipeline.tracking.views import page

    if options.output:
        check_output(options.output)
    uri = resolve_tracking_uri(options.tracking_uri)
    rows = leaderboard(suite=options.suite, uri=uri)
    markdown, values = comparison.to_markdown(rows), comparison.to_json(rows)
    figure = comparison.figure(rows)
    pictures: dict[str, bytes] = {}
    if figure is not None:
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        pictures["compute.png"] = picture.getvalue()
    print(json.dumps(values, indent=1) if options.json else comparison.to_text(rows))
    if options.output:
        storage.write_bytes(storage.join(options.output, "leaderboard.md"), markdown.encode())
        storage.write_json(storage.join(options.output, "leaderboard.json"), values)
        for name, data in pictures.items():
            storage.write_bytes(storage.join(options.output, name), data)
    if options.log:
        inside = comparison.to_markdown(rows, limit=10, inside=True)
        about = Description(
            what=inside,
            data=[f"{plural(len(rows), 'transfer result')} of the same MLflow server"],
            to_continue="repeat the command to make a new leaderboard.",
        )
        with start_run(names.COMPARE, options.suite or "all suites", about=about, tracking_uri=uri) as run:
            run.log_text(markdown, "leaderboard.md")
            run.log_text(page(markdown, pictures), "leaderboard.html")
            run.log_dict(values, "leaderboard.json")
            for name, data in pictures.items():
                run.log_bytes(data, name)
    return 0


if __name__ == "__main__":
    run_job(main)
