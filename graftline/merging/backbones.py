"""Merging the backbones of two model folders, tensor by tensor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from graftline.errors import GraftlineError
from graftline.merging.running_average import running_average

WEIGHTS = "model.safetensors"


class CannotMerge(GraftlineError):
    """Two backbones that do not belong together, or hold what cannot be averaged."""


def merge_backbones(previous: Path, vanilla: Path, stage: int, out: Path) -> None:
    """Writes theta_i beside the previous model's own configuration and tokenizer.

    Args:
        previous: `transformers` folder of theta_{i-1}.
        vanilla: `transformers` folder of theta_i^v.
        stage: i.
        out: folder to fill; must not exist.

    Raises:
        CannotMerge: lists every tensor that is missing, of another shape or not finite; nothing
            is written then.
    """
    with (
        safe_open(previous / WEIGHTS, framework="pt") as old,
        safe_open(vanilla / WEIGHTS, framework="pt") as new,
    ):
        _refuse(_differences(old, new), previous, vanilla)
        merged = {}
        for name in sorted(set(old.keys())):
            before, after = old.get_tensor(name), new.get_tensor(name)
            for tensor, folder in ((before, previous), (after, vanilla)):
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    _refuse([f"{name} in {folder} holds NaN or infinity"], previous, vanilla)
            merged[name] = running_average(before, after, stage)
    out.mkdir(parents=True)
    for file in sorted(previous.iterdir()):
        if file.name != WEIGHTS:
            shutil.copyfile(file, out / file.name)
    save_file(merged, out / WEIGHTS, metadata={"format": "pt"})


def _differences(old: Any, new: Any) -> list[str]:
    first_names, second_names = set(old.keys()), set(new.keys())
    problems = [f"{name} is missing in the vanilla model" for name in first_names - second_names]
    problems += [f"{name} is only in the vanilla model" for name in second_names - first_names]
    for name in first_names & second_names:
        first, second = old.get_slice(name), new.get_slice(name)
        if first.get_shape() != second.get_shape() or first.get_dtype() != second.get_dtype():
            problems.append(
                f"{name} is {first.get_dtype()} {first.get_shape()} in one and "
                f"{second.get_dtype()} {second.get_shape()} in the other"
            )
    return sorted(problems)


def _refuse(problems: list[str], previous: Path, vanilla: Path) -> None:
    if problems:
        raise CannotMerge(
            f"{previous} and {vanilla} cannot be merged:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )


def changed_tensors(before: Path, after: Path) -> list[str]:
    """Names of the tensors whose bits differ between two folders' weights."""
    with (
        safe_open(before / WEIGHTS, framework="pt") as old,
        safe_open(after / WEIGHTS, framework="pt") as new,
    ):
        return [
            name
            for name in sorted(old.keys())
            if not torch.equal(old.get_tensor(name), new.get_tensor(name))
        ]
