"""What merges leave on the disk, for the tests of streaming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftline.merging.compatibility import CannotMergeCheckpoints
from graftline.merging.streaming import MergeRequest, merge_checkpoints


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(base: Path, experts: list[Path], out: Path, **named) -> str:
    """The message of a refusal that left nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(CannotMergeCheckpoints) as error:
        merge_checkpoints(MergeRequest("average", base, tuple(experts), out, **named))
    assert sorted(out.parent.iterdir()) == before
    return str(error.value)
