"""Slurm for tests: substitutes for its programs, and its own daemons where they are installed.

Run as a program, this module is the substitute for srun."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.ports import free_port
from tests.submitters import BIN

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
SUBSTITUTES = {
    "scontrol": """test "$1 $2" = "show hostnames" && seq -f node%g "$SLURM_NNODES" """,
    "srun": f'exec {BIN}/python -m tests.slurmcluster "$@"',
}


def allocation(folder: Path, nodes: int) -> dict[str, str]:
    """The environment that Slurm gives to a batch script whose nodes have one CPU and one GPU each."""
    sizes = {"SLURM_NNODES": nodes, "SLURM_CPUS_PER_TASK": 1, "SLURM_GPUS_ON_NODE": 1}
    return {"SLURM_JOB_NODELIST": f"node[1-{nodes}]", "SLURM_SUBMIT_DIR": str(folder)} | {
        name: str(value) for name, value in sizes.items()
    }


CONFIGURATION = """ClusterName=vit
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
"""


@contextlib.contextmanager
def slurm(nodes: int = 2) -> Iterator[dict[str, str]]:
    """Slurm's own daemons, with `nodes` nodes on this machine. Yields the environment of its commands.

    Nodes track processes by their parents (proctrack/linuxproc), so that a signal to a step reaches all of them."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)  # munge refuses a socket that others cannot reach
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    text = CONFIGURATION.format(folder=folder, controller=free_port())
    for number in range(1, nodes + 1):
        place = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()}"
        text += f"NodeName=node{number} {place} CPUs=1 RealMemory=4000 Gres=gpu:1 State=UNKNOWN\n"
    text += "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5\n"
    text += "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2\n"
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    commands = [["munged", "--foreground", "--force", *(f"--{name}={folder}/{file}" for name, file in munge.items())]]
    commands[0].append(f"--log-file={folder}/munge.log")
    commands.append(["slurmctld", "-D", "-f", f"{folder}/slurm.conf"])
    commands += [["slurmd", "-D", "-N", f"node{i}", "-f", f"{folder}/slurm.conf"] for i in range(1, nodes + 1)]
    environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
    processes: list[subprocess.Popen] = []
    try:
        for command in commands:
            with open(folder / "daemons.log", "a") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        wait_for(lambda: subprocess.run(idle, env=environment, capture_output=True).stdout.strip() == b"%d" % nodes)
        yield {"SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
        with contextlib.suppress(AssertionError):  # a daemon that ends during a step waits for the step
            steps = ["squeue", "--noheader", "--steps"]
            wait_for(lambda: not subprocess.run(steps, env=environment, capture_output=True).stdout.strip(), 60)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "Slurm does not answer as expected"
        time.sleep(0.2)


def srun(argv: list[str]) -> int:
    """Runs a command once for each task. When one fails or srun gets SIGTERM, all are killed, as Slurm does."""
    options = argv[: next(i for i, word in enumerate(argv) if not word.startswith("--"))]
    with open(os.environ["CALLS"], "a") as calls:
        calls.writelines(f"{option}\n" for option in options)
    given = dict(option[2:].partition("=")[::2] for option in options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tasks: list[subprocess.Popen] = []
    try:
        for rank in range(int(given.get("ntasks", os.environ["SLURM_NNODES"]))):
            environment = os.environ | {"SLURM_PROCID": str(rank)}
            tasks.append(subprocess.Popen(argv[len(options) :], env=environment))
        while any(task.poll() is None for task in tasks) and not any(task.poll() for task in tasks):
            time.sleep(0.1)
        return max(task.poll() or 0 for task in tasks)
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    sys.exit(srun(sys.argv[1:]))
