"""Ray's message about a process that was ended for its memory use is reported as one line."""

import pytest

from pipeline import cluster, host_memory
from tests.runs import lines_of_log

KILLED = """Task f failed due to oom. There are 4 oom retries remaining, so the task will be retried. Error: 1 worker(s) were \
killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 45e9384891d7138b) was 9.24GB used / 23.54GB \
limit (0.392516)
OOM kill reason: Memory usage 9794658304B exceeded threshold of 252765008B (1.0% of 25276502016B limit)
Object store memory usage: [- objects spillable: 0
Eviction Stats:
(global lru) capacity: 5428505395
Selected to kill: (Task: job ID=01000000, lease ID=01, task name=f, required resources={CPU: 1}, pid=9112, actual memory \
used=1.84GB, worker ID=4bf69a72721f6a37)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
3907\t0.43\tpython jobs/pretrain.py"""
DIED = """A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem, check \
the logs for the dead worker. Lease ID: 01 Worker ID: 02 Node ID: 03 Worker IP address: 10.0.0.7 Worker port: 10007 Worker \
PID: 4711 Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2."""


@pytest.fixture
def remedy():
    cluster.configure(memory_remedy="A smaller --num-cpus runs fewer processes in parallel")
    yield
    cluster.configure()


def test_the_message_names_the_ended_process_and_the_memory_in_use():
    assert host_memory.describe_out_of_memory(KILLED) == (
        "process 9112 (1.8 GB) was ended: node 10.0.0.7 ran out of host memory (9.2 of 23.5 GB in use by all programs)"
    )
    assert host_memory.describe_out_of_memory("2 worker(s) were killed due to the node running low on memory.") == (
        "a process was ended: its node ran out of host memory"
    )
    assert host_memory.describe_out_of_memory(DIED) is None


def test_each_message_is_one_line_with_the_setting_that_helps(remedy):
    with lines_of_log() as lines:
        for message in (KILLED, DIED, "The autoscaler failed with the following error:\nTerminated with signal 15"):
            cluster.report_message(message)
    assert lines == [
        "warning: process 9112 (1.8 GB) was ended: node 10.0.0.7 ran out of host memory (9.2 of 23.5 GB in use by all "
        "programs); its work is repeated. A smaller --num-cpus runs fewer processes in parallel",
        "warning: process 4711 on 10.0.0.7 ended (killed, crashed, or its node out of memory); its work is repeated",
    ]
