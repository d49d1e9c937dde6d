"""Opens MLflow's UI and uploads records that runs could not deliver.

    python -m pipeline.tracking ui       the UI and a leaderboard
    python -m pipeline.tracking upload   uploads records that were not delivered
    python -m pipeline.tracking list     lists records that were not delivered

The UI shows the database that the jobs write. Exit code of upload: 0 if all
records were delivered, 1 if some remain (each is listed with the reason).
"""

import argparse
import sys
from typing import NoReturn

from pipeline import config
from pipeline.credentials import redacted
from pipeline.errors import UserError, plural
from pipeline.help import ArgumentParser
from pipeline.tracking.delivery import deliver_all
from pipeline.tracking.spool import Spool, SpoolFolders, find_spools, spool_root

REASONS = 10  # maximum number of refused records to list for each run


def main() -> NoReturn:
    parser = ArgumentParser(
        prog="python -m pipeline.tracking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["ui", "list", "upload"])
    parser.add_argument("--host", default="127.0.0.1", help="ui: address to listen on")
    parser.add_argument("--port", type=int, default=5000, help="ui: port to listen on")
    parser.add_argument(
        "--tracking-uri", help="ui: database to show; default MLFLOW_TRACKING_URI, or SQLite in this folder"
    )
    try:
        config.hide_passwords()
        sys.exit(run_command(parser.parse_args()))
    except UserError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(2)


def run_command(options: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code."""
    command = options.command
    if command == "ui":
        from pipeline.tracking.ui import serve  # MLflow's server takes seconds to import

        serve(options.host, options.port, options.tracking_uri)
        return 0
    waiting = find_spools()
    if not waiting.abandoned and not waiting.unreadable:
        print(f"no undelivered records in {spool_root()}")
    left = list_waiting(waiting) if command == "list" else upload(waiting)
    for folder in waiting.in_use:
        print(f"in use: {folder} belongs to an active run, which delivers its own records")
    for folder, why in waiting.unreadable.items():
        print(f"cannot be read: {folder}: {why}; the folder was left unchanged", file=sys.stderr)
    return 1 if command == "upload" and (left or waiting.unreadable) else 0


def describe_spool(spool: Spool) -> str:
    header = spool.header
    return f"{header['experiment']}/{header['name']} for {redacted(header['uri'])}"


def list_waiting(waiting: SpoolFolders) -> int:
    for spool in waiting.abandoned:
        print(f"{describe_spool(spool)}: {spool.pending} undelivered, {spool.rejected} refused; in {spool.folder}")
        spool.close()
    return len(waiting.abandoned)


def upload(waiting: SpoolFolders) -> int:
    """Delivers every abandoned spool. Returns the number of records that remain."""
    left = 0
    for spool, done in deliver_all(waiting.abandoned):
        what = describe_spool(spool)
        if not done.left:
            print(f"uploaded {what}: {plural(done.delivered, 'record')}")
            continue
        left += done.left
        print(
            f"uploaded {plural(done.delivered, 'record')} of {what}; remaining: {done.left}, in {spool.folder}",
            file=sys.stderr,
        )
        if done.error:
            print(f"  not sent: {done.error}", file=sys.stderr)
        for reason in done.reasons[:REASONS]:
            print(f"  refused: {reason}", file=sys.stderr)
        if len(done.reasons) > REASONS:
            print(f"  and {len(done.reasons) - REASONS} more, listed in rejected.jsonl", file=sys.stderr)
    return left


if __name__ == "__main__":
    main()
