#!/usr/bin/env python3
"""Stops the jobs of a Ray head and waits until they have saved their step. This is the preStop hook of the head's pod.

    python infra/stop_jobs.py --grace 75

Kubernetes sends a signal to `ray start`, which would end together with the drivers. This hook runs before that signal.
Exit code: 0 if all jobs have ended, 1 if a job was still running at the deadline or Ray could not be reached.
"""

import argparse
import sys
import time
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="address of the head's job server")
    parser.add_argument("--grace", type=float, default=75, help="seconds for all jobs together")
    options = parser.parse_args()
    deadline = time.time() + options.grace
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(options.address)
        stopped = stop_jobs(client)
        print(f"stop_jobs: {', '.join(stopped) or 'no job runs'}", flush=True)
        left = wait(client, stopped, deadline)
    except (RuntimeError, OSError) as error:  # Ray's client raises plain RuntimeErrors
        print(f"stop_jobs: {options.address}: {error}", file=sys.stderr)
        return 1
    if left:
        print(f"stop_jobs: still running after {options.grace:g} s: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0


def stop_jobs(client: Any) -> list[str]:
    """Stops all running and pending jobs. Returns their ids."""
    jobs = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    for job in jobs:
        client.stop_job(job)
    return jobs


def wait(client: Any, jobs: list[str], deadline: float) -> list[str]:
    """Returns the jobs that are still running at the deadline."""
    while jobs and time.time() < deadline:
        jobs = [job for job in jobs if not client.get_job_status(job).is_terminal()]
        time.sleep(0.5)
    return jobs


if __name__ == "__main__":
    sys.exit(main())
