"""`python -m pipeline.tracking upload` delivers what runs could not; `list` shows what is waiting."""

import argparse
import sys
from typing import NoReturn

from pipeline.tracking.run import _brief, deliver_all, redacted
from pipeline.tracking.spool import abandoned, spool_root


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description=__doc__)
    parser.add_argument("command", choices=["list", "upload"])
    command = parser.parse_args().command
    waiting = abandoned()
    if not waiting:
        print(f"nothing is waiting in {spool_root()}")
    failed = 0
    # A child needs its parent on the server, and both may have started offline: parents first.
    for spool in sorted(waiting, key=lambda spool: spool.header["parent_id"] is not None):
        header = spool.header
        what = f"{header['experiment']}/{header['name']} ({spool.pending} records) for {redacted(header['uri'])}"
        if command == "list":
            print(f"{what} in {spool.folder}")
            spool.close()
            continue
        try:
            delivered = deliver_all(spool)
            print(f"{'uploaded' if delivered else 'uploaded, but some records were refused:'} {what}")
        except Exception as error:  # one unreachable server must not keep the others' records
            print(f"not uploaded: {what}: {_brief(error)}", file=sys.stderr)
            delivered = False
        failed += not delivered
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
