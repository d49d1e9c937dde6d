"""Joining Ray: the one place that decides between embedded Ray, an existing cluster and a submitted job.

- inside `ray job submit`, RAY_ADDRESS and the working directory come from the job: `ray.init()` joins it;
- `--address auto|host:port` joins an existing cluster and ships this project to its workers;
- otherwise an embedded Ray on this machine, which ends with the process.
"""

import importlib.util
import logging
import os
import sys

# Worker processes run the project from here (embedded), or from the package that Ray ships (cluster).
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Non-secret settings that workers need and do not inherit from a remote driver. Credentials are not among them:
# nodes have their own (instance role, Kubernetes secret), and runtime_env is shown in the dashboard.
FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "MLFLOW_TRACKING_URI",
    "TORCH_EXTENSIONS_DIR",
)
EXCLUDES = [".git", ".venv*", "runs", "mlruns", "mlflow.db*", "**/__pycache__", "docs", "tests/benchmarks/results"]


def runtime_env(ship_project: bool) -> dict:
    """Ray runtime_env of our workers; ships the project folder when they run on other machines."""
    env_vars = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    if importlib.util.find_spec("torch") is not None:
        env_vars["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # ninja
    if ship_project:
        return {"working_dir": PROJECT, "excludes": EXCLUDES, "env_vars": env_vars}
    path = [PROJECT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"env_vars": {**env_vars, "PYTHONPATH": os.pathsep.join(path)}}


def connect(address: str | None = None, num_cpus: int | None = None, quiet: bool = False) -> None:
    """Joins or starts Ray once per process and says which.

    What tasks and workers print stays in Ray's own logs: the jobs report progress and errors themselves.
    Raises UserError when the cluster at `address` cannot be joined.
    """
    import ray

    from pipeline.errors import UserError

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    try:
        if submitted:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
            what = "this job's cluster"
        elif address:
            ray.init(
                address=address,
                runtime_env=runtime_env(ship_project=True),
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            what = f"the cluster at {address}"
        else:
            ray.init(
                address="local",  # never whatever cluster an earlier session left in /tmp
                num_cpus=num_cpus,
                dashboard_host="127.0.0.1",
                runtime_env=runtime_env(ship_project=False),
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            what = "embedded Ray"
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join Ray at {address or 'this job'}: {error}; check the address, and export RAY_AUTH_MODE=token "
            "with the cluster's token when it uses token authentication"
        ) from error
    if not quiet:
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0)
        print(f"ray: {what}, {resources.get('CPU', 0):g} CPUs, {gpus:g} GPUs", flush=True)
