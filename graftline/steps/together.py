"""One step by several processes, a GPU each: starting them, and what each of them does.

The process that holds the step starts the others on its own machine and waits. They find each other
by a file, talk on loopback, and end with it, however it ends; the first of them writes the result.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from queue import Queue
from subprocess import Popen
from typing import Any
from uuid import uuid4

import torch

from graftline.errors import GraftlineError
from graftline.planning.plan import TOGETHER, Reference, Step
from graftline.progress import relayed, replayed
from graftline.steps.supervised import start_child, stop_child, when_parent_ends
from graftline.steps.work import Machine, Work, set_pieces
from graftline.store import Artifact
from graftline.team import Team, joined

_NEVER_SHARDED = frozenset({"guarded-fine-tune", "distil"})
"""Those that several processes carry out too, but each with the whole backbone: what their losses
compare it with (a teacher, an anchor, earlier subspaces) is whole."""
_FINISHED, _FAILED = "finished", "failed"


def carried_out_together(kind: str, machine: Machine) -> bool:
    """Whether the machine's processes share a step of this kind."""
    if machine.processes == 1:
        return False
    return kind in TOGETHER or (kind in _NEVER_SHARDED and not machine.shard)


def check_processes(machine: Machine) -> None:
    """Refuses more processes than there are GPUs, or a device that has no others beside it.

    Raises:
        GraftlineError: says what to set.
    """
    if machine.processes == 1:
        return
    kind = torch.device(machine.torch_device).type
    wanted = f"execution.processes is {machine.processes}"
    if kind not in ("cpu", "cuda") or ":" in machine.device:
        raise GraftlineError(
            f"{wanted}, but execution.device is {machine.device}: set it to auto, cuda or cpu, so "
            "that each process takes a device of its own, or set execution.processes to 1."
        )
    if kind == "cuda" and torch.cuda.device_count() < machine.processes:
        raise GraftlineError(
            f"{wanted}, but this machine has {torch.cuda.device_count()} GPU(s): a process takes "
            "one each."
        )


def carry_out_together(work: Work) -> None:
    """Carries a step out with `machine.processes` processes.

    Raises:
        GraftlineError: what stopped one of them; the others are stopped too. Checkpoints are kept.
    """
    check_processes(work.machine)
    size = work.machine.processes
    meeting = work.folder / f"meeting-{uuid4().hex}"
    with ExitStack() as stack:
        stack.callback(meeting.unlink, missing_ok=True)
        children = []
        for rank in range(size):
            child = start_child(["-m", __name__], _environment(rank, work.machine), quiet=False)
            stack.callback(stop_child, child)
            children.append(child)
        for rank, child in enumerate(children):
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it has ended; why is heard below
                child.stdin.write(json.dumps(_request(work, rank, meeting)) + "\n")
                child.stdin.flush()
        failed = _wait(children)
    if failed:
        raise GraftlineError(f"{work.step.title}: {failed}")


def _environment(rank: int, machine: Machine) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(machine.processes),
        "LOCAL_WORLD_SIZE": str(machine.processes),
        "OMP_NUM_THREADS": str(max(1, machine.threads // machine.processes)),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def _request(work: Work, rank: int, meeting: Path) -> dict[str, Any]:
    return {
        "rank": rank,
        "meeting": str(meeting.absolute()),
        "step": asdict(work.step),
        "parents": {
            role: [each.kind, each.fingerprint, str(each.folder.absolute())]
            for role, each in work.parents.items()
        },
        "machine": {
            **asdict(work.machine),
            "data_folder": str(work.machine.data_folder.absolute()),
        },
        "folder": str(work.folder.absolute()),
        "out": str(work.out.absolute()),
    }


def _wait(children: list[Popen[str]]) -> str:
    """Waits until all are done or one has failed; returns why, or nothing."""
    ended: Queue[str] = Queue()

    def listen(rank: int, child: Popen[str]) -> None:
        cause = "what it said could not be read"
        try:
            cause = _heard(child)
        finally:
            ended.put(f"process {rank + 1} of {len(children)}: {cause}" if cause else "")

    for rank, child in enumerate(children):
        threading.Thread(target=listen, args=(rank, child), daemon=True).start()
    for _ in children:
        if failure := ended.get():
            return failure
    return ""


def _heard(child: Popen[str]) -> str:
    """Shows how one of them goes on until it ends; returns why it failed, or nothing."""
    said: dict[str, Any] = {}
    assert child.stdout is not None
    with replayed() as show:
        for line in child.stdout:
            said = json.loads(line)
            if _FINISHED in said or _FAILED in said:
                break  # it may not end by itself, where others wait for it
            show(said)
    if _FINISHED in said:
        return ""
    return str(said.get(_FAILED) or f"it ended with exit code {child.wait()}")


def _take_part(request: Mapping[str, Any], say: Any) -> None:
    """What one of the processes does."""
    from graftline.steps.execution import RUNNERS

    machine = Machine(
        **{**request["machine"], "data_folder": Path(request["machine"]["data_folder"])}
    )
    team = Team(request["rank"], machine.processes, machine.shard)
    on_gpus = torch.device(machine.torch_device).type == "cuda"
    if on_gpus:
        torch.cuda.set_device(team.rank)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    set_pieces("cuda" if on_gpus else "cpu")
    torch.distributed.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{request['meeting']}",
        rank=team.rank,
        world_size=team.size,
        timeout=timedelta(days=7),  # one may write long while others wait; a dead one is noticed
    )
    step = dict(request["step"])
    step["parents"] = {role: Reference(**each) for role, each in step["parents"].items()}
    work = Work(
        step=Step(**step),
        parents={
            role: Artifact(kind, fingerprint, Path(folder))
            for role, (kind, fingerprint, folder) in request["parents"].items()
        },
        machine=replace(machine, device=f"cuda:{team.rank}" if on_gpus else "cpu"),
        folder=Path(request["folder"]),
        out=Path(request["out"]),
    )
    with joined(team), ExitStack() as shown:
        if team.first:
            shown.enter_context(relayed(say))
        RUNNERS[work.step.kind](work)
        team.wait()  # a process that leaves early would look like one that failed


def main() -> None:
    """A process of a team: reads its request from standard input, says how it goes on output."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed must not be taken for a message

    def say(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=output, flush=True)

    request = json.loads(sys.stdin.readline())
    when_parent_ends(lambda: None, grace_seconds=0.0)
    try:
        _take_part(request, say)
    except GraftlineError as error:
        say({_FAILED: str(error)})
    except BaseException as error:
        say({_FAILED: f"{type(error).__name__}: {error}"})
        traceback.print_exc()
    else:
        say({_FINISHED: True})
    output.close()
    os._exit(0)  # what is left of the process group has no one to talk to


if __name__ == "__main__":
    main()
