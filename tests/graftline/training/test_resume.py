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

    def run(phase: str, folders: list[Path], die_before: int = -1) -> int:
        runner.stdin.write(json.dumps([phase, [str(folder) for folder in folders], die_before]))
        runner.stdin.write("\n")
        runner.stdin.flush()
        answer = runner.stdout.readline()
        assert answer, errors.read_text()[-2000:]
        if die_before < 0:
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


@pytest.mark.parametrize("phase", ["align", "full", "lora", "ewc", "realign"])
def test_killed_twice_and_resumed_is_bit_identical(
    phase: str,
    run_phase: Run,
    tiny_folder: Path,
    features_folder: Path,
    aligned: Path,
    tmp_path: Path,
) -> None:
    inputs = [tiny_folder, features_folder, aligned]
    run_phase(phase, [*inputs, tmp_path / "whole-work", tmp_path / "whole"])
    for step in sorted(random.Random(phase).sample(range(9), 2)):
        out = tmp_path / f"killed-{step}"
        killed = run_phase(phase, [*inputs, tmp_path / "work", out], die_before=step)
        assert killed == -signal.SIGKILL
        kept = sorted((tmp_path / "work").glob("checkpoint-*"))
        last = step // 2 * 2
        assert [path.name for path in kept] == ([f"checkpoint-{last:08d}"] if last else [])
    run_phase(phase, [*inputs, tmp_path / "work", tmp_path / "resumed"])
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "resumed")
    assert whole
    assert whole == resumed
    history = (tmp_path / "whole" / "history.json").read_text()
    assert history == (tmp_path / "resumed" / "history.json").read_text()
