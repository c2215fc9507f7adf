"""Artifacts for tests of stores: two sizes of files, one of them twice; steps with their times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save_file

from graftline.planning.plan import Step
from graftline.store import Artifact, Store

STEP: dict[str, Any] = {"parameters": {"rate": 0.1}, "parents": {}, "code": "c0de"}


def build(folder: Path) -> None:
    save_file({"w": numpy.arange(600, dtype=numpy.float32)}, folder / "model.safetensors")
    (folder / "scores").mkdir()
    (folder / "scores" / "one.json").write_text('{"score": 1}')
    (folder / "scores" / "same.json").write_text('{"score": 1}')


def publish(store: Any, fingerprint: str = "f1", make: Any = build) -> Artifact:
    return store.publish("merge", fingerprint, **STEP, build=make)


def publish_timed(store: Store, step: Step, seconds: float) -> None:
    """A step of a plan, without its files, that took so many seconds."""

    def build(folder: Path) -> None:
        (folder / "timing.json").write_text(json.dumps({"step_seconds": seconds}))

    step.publish(store, build)
