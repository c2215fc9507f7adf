"""Merging checkpoints on the disk, piece by piece, in memory that does not grow with their number.

Everything that can be seen in headers, configurations and tokenizers is checked before the first
byte is written. NaN and infinity are seen while the weights stream through; then the folder under
construction is removed, and the message names all such tensors. The result appears under its name
in one rename, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.durable import (
    make_folder,
    naming_disk_faults,
    publish_folder,
    remove,
    sweep_siblings,
    temporary_sibling,
)
from graftline.merging.building import SHARD_BYTES, Building, MergeRequest
from graftline.merging.checkpoints import Checkpoint, open_checkpoint
from graftline.merging.companions import read_record
from graftline.merging.compatibility import CannotMergeCheckpoints, Plan, plan_merge
from graftline.merging.core import MergeParameters, Rule
from graftline.merging.rules import parameters_for, rule_named

__all__ = ["SHARD_BYTES", "MergeReport", "MergeRequest", "merge_checkpoints"]

_SPARE_BYTES = 64 << 20  # tokenizer, configuration, headers


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        folder: the result.
        merged: how many tensors were merged.
        kept: how many were copied bit by bit.
        warnings: for people.
        reused: the result of the same request was there already.
    """

    folder: Path
    merged: int
    kept: int
    warnings: tuple[str, ...]
    reused: bool = False


def merge_checkpoints(request: MergeRequest) -> MergeReport:
    """Merges Hugging Face checkpoints into a new folder.

    The result holds the weights in the base's dtypes with an index, the base's configuration and
    tokenizer, a model card, and `merge.json` (request, statistics, scales, sha256 of the weight
    files). For rules with one model an expert the weights are the shared ones, base + tau, and
    `masks/expert-<i>.safetensors` holds each expert's mask (see `masks.decoupled_weight`).

    Memory: four read-ahead buffers of 10 MB each, some pieces that wait to be written, and in
    each thread intermediate results of one block, which has fewer elements the more experts there
    are; none grows with the largest tensor, nor with the number of experts.

    Raises:
        UnknownRule: lists what is wrong with rule and parameters.
        CannotMergeCheckpoints: lists everything else that stands against the merge.
        StoreUnwritable: the disk is full or the folder read-only.
    """
    rule = rule_named(request.rule)
    parameters = parameters_for(rule, request.parameters, len(request.experts))
    base, *experts = (_opened(request, folder) for folder in (request.base, *request.experts))
    keep = {p: None if f is None else _opened(request, f) for p, f in request.keep.items()}
    inputs = [base, *experts, *(c for c in keep.values() if c)]
    problems = _impossible(request)
    try:
        plan = plan_merge(base, experts, keep)
    except CannotMergeCheckpoints as error:
        raise CannotMergeCheckpoints([*problems, *error.problems]) from None
    asked = _asked(request, parameters, inputs)
    done = read_record(request.out)
    merged = sum(bool(job.experts) for job in plan.jobs)
    report = MergeReport(request.out, merged, len(plan.jobs) - merged, plan.warnings)
    if done is not None and done.get("request") == asked:
        return dataclasses.replace(report, reused=True)
    problems += _occupied(request.out) + _too_small(request, plan, rule)
    if problems:
        raise CannotMergeCheckpoints(problems)
    _publish(Building(request, rule, parameters, plan), asked, inputs)
    return report


def _opened(request: MergeRequest, folder: Path) -> Checkpoint:
    return open_checkpoint(folder, request.origins.get(folder))


def _asked(
    request: MergeRequest, parameters: MergeParameters, checkpoints: Sequence[Checkpoint]
) -> dict[str, Any]:
    """The request as the record keeps it; the same inputs and wishes give the same."""
    content = {
        "rule": request.rule,
        "parameters": parameters.model_dump(),
        "base": request.name_of(request.base),
        "experts": [request.name_of(folder) for folder in request.experts],
        "keep": {
            prefix: request.name_of(folder or request.base)
            for prefix, folder in request.keep.items()
        },
        "seed": request.seed,
        "shard_bytes": request.shard_bytes,
        "inputs": [checkpoint.identity() for checkpoint in checkpoints],
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _impossible(request: MergeRequest) -> list[str]:
    """What is wrong with the request itself."""
    problems = []
    if not request.experts:
        problems.append("there is no expert; name at least one with --expert")
    if request.shard_bytes < 1:
        problems.append(f"files of {request.shard_bytes} bytes are impossible")
    inputs = {folder.resolve() for folder in (request.base, *request.experts)}
    inputs |= {folder.resolve() for folder in request.keep.values() if folder is not None}
    if request.out.resolve() in inputs:
        problems.append(f"{request.out}: is an input; choose another folder for the result")
    return problems


def _occupied(out: Path) -> list[str]:
    """Files that are in the way; nothing that exists is ever overwritten."""
    if not out.exists() and not out.is_symlink():
        return []
    if not out.is_dir():
        return [f"{out}: is not a folder"]
    there = sorted(path.name for path in out.iterdir())
    names = ", ".join(there[:5]) + (" ..." if len(there) > 5 else "")
    return [f"{out}: holds {names}; choose an empty folder"] if there else []


def _too_small(request: MergeRequest, plan: Plan, rule: Rule) -> list[str]:
    """A disk that will be full before the end."""
    needed = sum(job.base.size for job in plan.jobs) + _SPARE_BYTES
    if rule.one_per_expert:
        needed += sum(-(-job.base.elements // 8) * len(job.experts) for job in plan.jobs)
    place = next(parent for parent in request.out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    return [f"{place}: has {free / 1e9:.1f} GB free, the result needs {needed / 1e9:.1f} GB"]


def _publish(building: Building, asked: Mapping[str, Any], inputs: Sequence[Checkpoint]) -> None:
    """Builds in a temporary sibling and renames it; removes it if anything goes wrong."""
    out = building.request.out
    with naming_disk_faults(out.parent):
        make_folder(out.parent.absolute())
        sweep_siblings(out)
        temporary = temporary_sibling(out)
        try:
            temporary.mkdir()
            building.build(temporary, asked)
            _refuse_changed(inputs, asked["inputs"])
            publish_folder(temporary, out)
        finally:
            remove(temporary)


def _refuse_changed(inputs: Sequence[Checkpoint], before: Sequence[Any]) -> None:
    pairs = zip(inputs, before, strict=True)
    changed = [checkpoint for checkpoint, was in pairs if checkpoint.identity() != was]
    if changed:
        raise CannotMergeCheckpoints(
            [f"{each.folder}: changed while it was merged; merge again" for each in changed]
        )
