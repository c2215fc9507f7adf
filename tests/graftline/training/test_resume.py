"""A phase that is killed and called again ends in the same bits as one that is not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RUNNER = Path(__file__).with_name("phase_runner.py")


def _run(phase: str, folders: list[Path], die_before: int = -1) -> int:
    command = [sys.executable, str(RUNNER), phase, *map(str, folders), str(die_before)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if die_before < 0:
        assert result.returncode == 0, result.stderr[-2000:]
    return result.returncode


@pytest.fixture(scope="session")
def aligned(tiny_folder: Path, features_folder: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("aligned")
    _run("align", [tiny_folder, features_folder, root, root / "work", root / "out"])
    return root / "out"


def _weights(out: Path) -> dict[str, bytes]:
    return {
        f"{path.relative_to(out)}:{name}": value.flatten().view(torch.uint8).numpy().tobytes()
        for path in sorted(out.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("phase", ["align", "full", "lora", "ewc", "realign"])
def test_killed_twice_and_resumed_is_bit_identical(
    phase: str, tiny_folder: Path, features_folder: Path, aligned: Path, tmp_path: Path
) -> None:
    inputs = [tiny_folder, features_folder, aligned]
    _run(phase, [*inputs, tmp_path / "whole-work", tmp_path / "whole"])
    for step in sorted(random.Random(phase).sample(range(9), 2)):
        out = tmp_path / f"killed-{step}"
        killed = _run(phase, [*inputs, tmp_path / "work", out], die_before=step)
        assert killed == -signal.SIGKILL
        kept = sorted((tmp_path / "work").glob("checkpoint-*"))
        last = step // 2 * 2
        assert [path.name for path in kept] == ([f"checkpoint-{last:08d}"] if last else [])
    _run(phase, [*inputs, tmp_path / "work", tmp_path / "resumed"])
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "resumed")
    assert whole
    assert whole == resumed
    history = (tmp_path / "whole" / "history.json").read_text()
    assert history == (tmp_path / "resumed" / "history.json").read_text()
