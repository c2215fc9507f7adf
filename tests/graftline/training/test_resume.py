"""A phase that is killed and called again ends in the same bits as one that is not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RUNNER = Path(__file__).with_name("phase_runner.py")
Run = Callable[..., int]


@pytest.fixture(scope="module")
def run_phase(tmp_path_factory) -> Iterator[Run]:
    """Runs a phase in a process of its own, and says how that ended."""
    errors = tmp_path_factory.mktemp("runner") / "errors.txt"
    with errors.open("w") as log:
        runner = subprocess.Popen(
            [sys.executable, str(RUNNER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip

    def run(phase: str, folders: list[Path], die: str = "") -> int:
        runner.stdin.write(json.dumps([phase, [str(folder) for folder in folders], die]))
        runner.stdin.write("\n")
        runner.stdin.flush()
        answer = runner.stdout.readline()
        assert answer, errors.read_text()[-2000:]
        if not die:
            assert int(answer) == 0, errors.read_text()[-2000:]
        return int(answer)

    yield run
    runner.communicate()


@pytest.fixture(scope="module")
def aligned(run_phase: Run, tiny_folder: Path, features_folder: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("aligned")
    run_phase("align", [tiny_folder, features_folder, root, root / "work", root / "out"])
    return root / "out"


def _weights(out: Path) -> dict[str, bytes]:
    return {
        f"{path.relative_to(out)}:{name}": value.flatten().view(torch.uint8).numpy().tobytes()
        for path in sorted(out.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


PHASES = ("align", "full", "lora", "ewc", "lwf", "o-lora", "attention-only", "realign")


def _kept(work: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in sorted(work.glob("checkpoint-*"))]


@pytest.mark.parametrize("phase", PHASES)
def test_killed_anywhere_and_resumed_is_bit_identical(
    phase: str,
    run_phase: Run,
    tiny_folder: Path,
    features_folder: Path,
    aligned: Path,
    tmp_path: Path,
) -> None:
    inputs = [tiny_folder, features_folder, aligned]
    run_phase(phase, [*inputs, tmp_path / "whole-work", tmp_path / "whole"])

    def killed(work: str, die: str) -> list[int]:
        """The checkpoints that are left."""
        out = tmp_path / f"{work}-{die.replace(' ', '-')}"
        assert run_phase(phase, [*inputs, tmp_path / work, out], die=die) == -signal.SIGKILL
        return _kept(tmp_path / work)

    for step in sorted(random.Random(phase).sample(range(9), 2)):
        last = step // 2 * 2
        assert killed("steps", f"step {step}") == ([last] if last else [])
    assert killed("torn", "publish 2") == [2]
    assert killed("torn", "remove 1") == [2, 4]
    for work in ("steps", "torn"):
        run_phase(phase, [*inputs, tmp_path / work, tmp_path / f"resumed-{work}"])
        assert _weights(tmp_path / "whole") == _weights(tmp_path / f"resumed-{work}") != {}
        history = (tmp_path / "whole" / "history.json").read_text()
        assert history == (tmp_path / f"resumed-{work}" / "history.json").read_text()
