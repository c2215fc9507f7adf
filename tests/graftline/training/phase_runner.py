"""Runs phases on the tiny model; they die by SIGKILL before a given step if asked to.

Each line of the input asks for one, in a process of its own: phase, backbone folder, features
folder, connector folder, work folder, out folder, and where to die: `step 3` (before it),
`publish 2` (the second checkpoint is written and not yet shown), `remove 1` (the second is shown
and the first not yet removed), or nowhere. How it ended is said in a line of the output. The
libraries are loaded once: that takes longer than a phase.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - what each phase would load

from graftline.model.backbone import load_backbone
from graftline.recipe import LoraSettings, PhaseSettings
from graftline.training import guarded, loop, phases
from graftline.training.elastic import save_fisher

SETTINGS = PhaseSettings(steps=9, batch_size=4, learning_rate=1e-3, checkpoint_every=2)

GUARDED = {
    "ewc": ("full", {"strength": 1.0}),
    "lwf": ("full", {"strength": 1.0, "temperature": 2.0}),
    "o-lora": ("lora", {"strength": 0.5}),
    "attention-only": ("attention", {}),
}
"""Method -> what of the backbone learns, and its settings."""


def run(phase: str, folders: list[Path], die: str) -> None:
    backbone, features, connector, work, out = folders
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True)
    dtype = torch.bfloat16 if phase != "align" else torch.float32
    call = phases.Call(
        backbone=load_backbone(backbone, dtype, "eager"),
        backbone_fingerprint="base",
        features={"image": features},
        system_prompt="",
        seed=3,
        work=work,
        out=out,
        label=phase,
    )
    if die:
        _die_at(*die.split())
    if phase == "align":
        phases.align(call, SETTINGS, "image", {"tokens": 2, "hidden": 16})
    elif phase == "realign":
        phases.realign(call, SETTINGS, "image", connector, 0.25, "output")
    elif phase in GUARDED:
        mode, settings = GUARDED[phase]
        fisher = _fisher(call, work) if phase == "ewc" else None
        guarded.guarded_fine_tune(
            call,
            SETTINGS,
            {"image": connector},
            guarded.GuardCall(phase, settings, fisher=fisher),
            mode=mode,
            lora=LoraSettings(rank=4, alpha=4),
            connector_learning_rate=1e-3,
            train_embeddings=False,
            result_fingerprint="tuned",
        )
    else:
        phases.fine_tune(
            call,
            SETTINGS,
            {"image": connector},
            mode=phase,
            lora=LoraSettings(rank=4, alpha=4),
            connector_learning_rate=1e-3,
            train_embeddings=False,
            result_fingerprint="tuned",
        )


def _fisher(call: phases.Call, work: Path) -> Path:
    """A folder of made-up Fisher information."""
    fisher = work.parent / f"{work.name}-fisher"
    fisher.mkdir(exist_ok=True)
    named = call.backbone[0].model.layers.named_parameters(prefix="model.layers")
    ones = {name: torch.full(p.shape, 30.0) for name, p in named}
    ones["model.norm.weight"] = torch.ones(call.backbone[0].model.norm.weight.shape)
    save_fisher(fisher, ones, None, 1.0, 1)
    return fisher


def _die_at(point: str, number: str) -> None:
    module, name = {
        "step": (loop, "rate_factor"),
        "publish": (loop, "publish_folder"),
        "remove": (loop.shutil, "rmtree"),
    }[point]
    original, seen = getattr(module, name), itertools.count(0 if point == "step" else 1)

    def deadly(*given: Any) -> Any:
        now = given[0] if point == "step" else next(seen)
        if now == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    setattr(module, name, deadly)


def _in_a_process(phase: str, folders: list[str], die: str) -> int:
    """Exit code of a phase; the negative number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(phase, [Path(name) for name in folders], die)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(_in_a_process(*json.loads(line)), flush=True)
