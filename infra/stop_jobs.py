#!/usr/bin/env python3
"""Stops the jobs of a Ray head and waits until they have saved their step: the preStop hook of the head's pod.

    python infra/stop_jobs.py --grace 75

Kubernetes sends its signal to `ray start`, which would end with the drivers under it. This hook runs before that signal.

Exit code: 0 every job has ended, 1 some had not at the deadline or Ray could not be asked.
"""

import argparse
import sys
import time
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="of the head's job server")
    parser.add_argument("--grace", type=float, default=75, help="seconds that the jobs have together")
    options = parser.parse_args()
    deadline = time.time() + options.grace
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(options.address)
        stopped = stop_jobs(client)
        print(f"stop_jobs: {', '.join(stopped) or 'no job runs'}", flush=True)
        left = wait(client, stopped, deadline)
    except (RuntimeError, OSError) as error:  # Ray's client raises bare ones
        print(f"stop_jobs: {options.address}: {error}", file=sys.stderr)
        return 1
    if left:
        print(f"stop_jobs: still running after {options.grace:g} s: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0


def stop_jobs(client: Any) -> list[str]:
    """Asks every job that runs or waits to stop; their ids."""
    jobs = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    for job in jobs:
        client.stop_job(job)
    return jobs


def wait(client: Any, jobs: list[str], deadline: float) -> list[str]:
    """Those of the jobs that still run at the deadline."""
    while jobs and time.time() < deadline:
        jobs = [job for job in jobs if not client.get_job_status(job).is_terminal()]
        time.sleep(0.5)
    return jobs


if __name__ == "__main__":
    sys.exit(main())
