"""CPU utilisation is reported only if it is meaningful."""

import os
import subprocess
import sys
import time

from pipeline.hardware import CpuShare


def test_a_machine_that_others_use_is_not_quiet():
    share = CpuShare()
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.5)
        assert not share.is_quiet()
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def test_the_time_of_the_processes_of_the_run_is_not_that_of_others():
    share = CpuShare(processes=10**6)  # more processes than any other load of this machine
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        pass
    assert share.is_quiet()
