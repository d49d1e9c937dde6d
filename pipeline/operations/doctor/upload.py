"""Checks the size of the working directory that `ray job submit --working-dir .` and --address upload."""

import collections

from pipeline import cluster, ray_state
from pipeline.operations.doctor.finding import CheckResult, error, ok, warning

NAMED = 3  # number of paths in a message


def working_folder(folder: str | None = None, limit: int | None = None) -> CheckResult:
    """Names the largest paths, because Ray only responds with "413 Request Entity Too Large" or not at all. limit:
    bytes; None: the limit of Ray."""
    folder = folder or cluster.PROJECT
    limit = limit or ray_state.upload_limit()
    files = list(ray_state.packaged_files(folder, cluster.EXCLUDES))
    total = sum(size for _, size in files)
    if total < limit / 2:
        return ok("upload", f"{total / 1e6:,.1f} MB of {limit / 1e6:,.0f} MB")
    by_place: collections.Counter[str] = collections.Counter()
    for path, size in files:
        parts = path.split("/")
        by_place["/".join(parts[:2]) + ("/" if len(parts) > 2 else "")] += size
    largest = ", ".join(f"{place} {size / 1e6:,.0f} MB" for place, size in by_place.most_common(NAMED))
    report = error if total >= limit else warning
    return report(
        "upload",
        f"{folder}: {total / 1e6:,.0f} MB before compression, but Ray accepts at most {limit / 1e6:,.0f} MB ({largest})",
        "move it out, or list it in .rayignore (same syntax as .gitignore)",
    )
