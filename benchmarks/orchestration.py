"""What orchestration costs: many tasks that wait, through the same slots and server as a run's.

Each task stands for a step that computes for some seconds. The floor is what the tasks take with
nothing between them; what is beyond it is orchestration. Memory is that of the process that
sends the tasks out, as it grows while they run.

    python benchmarks/orchestration.py --tasks 1 10 100 1000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

from tasks.server import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=0.25, help="that a task computes")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument(
        "--step", type=float, default=20.0, help="seconds of a real step, for the share"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["PREFECT_HOME"] = home
        with Server() as server:
            server.wait()
            found = [measure(count, arguments) for count in arguments.tasks]
    print(json.dumps(found, indent=2))


def measure(count: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Runs `count` tasks that do not wait for each other."""
    from prefect import flow, task

    from flows.slots import Job, carry_out

    @task(name="waits", persist_result=False)
    def waits(seconds: float) -> None:
        time.sleep(seconds)

    @flow(name="orchestration", persist_result=False)
    def run() -> None:
        jobs = [Job(number, waits, {"seconds": arguments.seconds}, ()) for number in range(count)]
        carry_out([jobs], arguments.slots, {})

    before = resident()
    started, processor = time.perf_counter(), time.process_time()
    run()
    took = time.perf_counter() - started
    floor = math.ceil(count / arguments.slots) * arguments.seconds
    a_task = (took - floor) * min(arguments.slots, count) / count
    return {
        "tasks": count,
        "seconds": round(took, 2),
        "floor_seconds": floor,
        "milliseconds_a_task": round(1000 * a_task, 1),
        "percent_of_a_real_step": round(100 * a_task / arguments.step, 2),
        "processor_milliseconds_a_task": round(1000 * (time.process_time() - processor) / count, 1),
        "parent_grew_bytes": resident() - before,
    }


def resident() -> int:
    """Bytes of this process that are in memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmRSS")


if __name__ == "__main__":
    main()
