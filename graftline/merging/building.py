"""Building the result of a merge: statistics, then one walk over all weights, then the rest."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftline.durable import write_synced
from graftline.memory import keep_freed_memory
from graftline.merging.checkpoints import DTYPES, INDEX, SINGLE
from graftline.merging.companions import CARD, FORMAT, RECORD, card, copy_companions
from graftline.merging.compatibility import CannotMergeCheckpoints, Job, Plan
from graftline.merging.core import (
    Block,
    Context,
    Found,
    Merged,
    MergeParameters,
    Rule,
    Statistics,
    added,
    rounded_once,
)
from graftline.merging.masks import metadata
from graftline.merging.reading import ReadAhead, Segment, block_of
from graftline.merging.writing import Stored, Writing, header, split
from graftline.progress import track
from graftline.weight_files import Origin

SHARD_BYTES = 5_000_000_000
_WIDTHS = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_EVERYWHERE = "all tensors"  # whose statistics: of a global scope
_ZERO = torch.zeros((), dtype=torch.float64)

Bits = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MergeRequest:
    """What is to be merged.

    Attributes:
        rule: a name in `rules.RULES`.
        base: folder of theta_0.
        experts: folders, in the order that per-expert parameters follow.
        out: folder to make.
        parameters: of the rule; what is left out keeps the paper's default.
        keep: prefix of tensor names -> folder they are taken from unchanged; None: the base.
        seed: of DARE's random choices.
        shard_bytes: most weight bytes in a file of the result.
        names: what the record calls a folder that others may have elsewhere; its path if left out.
        origins: folder -> file name -> where its content is read, of what is not on this machine.
    """

    rule: str
    base: Path
    experts: tuple[Path, ...]
    out: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keep: Mapping[str, Path | None] = field(default_factory=dict)
    seed: int = 0
    shard_bytes: int = SHARD_BYTES
    names: Mapping[Path, str] = field(default_factory=dict)
    origins: Mapping[Path, Mapping[str, Origin]] = field(default_factory=dict)

    def name_of(self, folder: Path) -> str:
        """What the record calls a folder."""
        return self.names.get(folder, str(folder))


class Building:
    """One merge while it runs: `torch.get_num_threads()` threads compute, each its own runs.

    Args:
        request: what was asked for.
        rule: the rule of that name.
        parameters: its parameters, checked.
        plan: what becomes of each tensor.
    """

    def __init__(
        self, request: MergeRequest, rule: Rule, parameters: MergeParameters, plan: Plan
    ) -> None:
        self.request = request
        self._rule = rule
        self._parameters = parameters
        self._plan = plan
        self._ill: set[str] = set()
        self._healthy = False  # whether all that is merged was looked at, and nothing ill found
        self._scales: dict[str, list[float]] = {}
        self._known: dict[str, Statistics] = {}
        self._threads = torch.get_num_threads()
        self._workers = ThreadPoolExecutor(self._threads, "merge", _compute_alone)

    def build(self, folder: Path, asked: Mapping[str, Any]) -> None:
        """Fills the folder: weights, companions and index first, the record last."""
        scope = getattr(self._parameters, "scope", None)
        merged = [job for job in self._plan.jobs if job.experts]
        keep_freed_memory()
        with self._workers, _threads_as_before(self._threads):
            if scope == "global":
                self._gather(_EVERYWHERE, merged, "statistics")
            with Writing(folder) as writing:
                places = self._lay_out(writing)
                self._walk(writing, places, one_by_one=scope == "tensor")
        self._refuse_the_ill()
        copy_companions(self.request.base, folder)
        self._write_index(folder, places)
        record = {
            "format": FORMAT,
            "request": dict(asked),
            "paper": self._rule.paper,
            "statistics": self._known,
            # in the order of the tensors, not in that of the threads
            "scales": {j.name: self._scales[j.name] for j in merged if j.name in self._scales},
            "warnings": list(self._plan.warnings),
            "files": writing.files(),
        }
        text = card(record, len(merged), len(self._plan.jobs) - len(merged))
        write_synced(folder / CARD, text.encode())
        write_synced(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())

    def _write_index(self, folder: Path, places: Mapping[str, str]) -> None:
        """Writes the index of shards; a single file needs none."""
        if set(places.values()) == {SINGLE}:
            return
        size = sum(job.base.size for job in self._plan.jobs)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_synced(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _walk(self, writing: Writing, places: Mapping[str, str], *, one_by_one: bool) -> None:
        """Merges and writes all tensors; one by one where each has statistics of its own."""
        with track(f"merge: {self._rule.name}", len(self._plan.jobs)) as advance:
            for jobs in [[job] for job in self._plan.jobs] if one_by_one else [self._plan.jobs]:
                if one_by_one and jobs[0].experts:
                    self._gather(jobs[0].name, jobs)
                for finished in self._merge(jobs, writing, places):
                    advance(finished)

    def _lay_out(self, writing: Writing) -> dict[str, str]:
        """Writes the heads of the files; tells each tensor's file."""
        stored = [
            Stored(job.name, job.base.dtype, job.base.shape, job.base.size)
            for job in self._plan.jobs
        ]
        shards = split(stored, self.request.shard_bytes, _WIDTHS)
        places = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            name = SINGLE if len(shards) == 1 else name
            writing.write(name, header(shard, {"format": "pt"}))
            places.update({tensor.name: name for tensor in shard})
        if self._rule.one_per_expert:
            merged = [job for job in self._plan.jobs if job.experts]
            shapes = {job.name: list(job.base.shape) for job in merged}
            sizes = {job.name: -(-job.base.elements // 8) for job in merged}
            packed = [Stored(name, "U8", (size,), size) for name, size in sizes.items()]
            for expert in range(len(self.request.experts)):
                writing.write(_mask_file(expert), header(packed, metadata(shapes)))
        return places

    def _gather(self, what: str, jobs: Sequence[Job], label: str | None = None) -> None:
        """Takes the rule's statistics over some tensors."""
        looked: list[bool] = []  # whether each walk was but a sample

        def walk(
            work: Callable[[Iterable[Block]], Found], /, *, sparse: bool = False
        ) -> Iterable[Found]:
            def look(run: Segment) -> Found:
                return work(block for _, block in self._blocks(run))

            bar = nullcontext() if label is None or sparse else track(label, len(jobs))
            with ReadAhead(jobs, sparse=sparse) as reading, bar as advance:
                for segment, found in self._computed(reading, look):
                    yield from found
                    if advance is not None and _ends(segment):
                        advance(segment.job.name)
            looked.append(sparse)

        found = self._rule.statistics(walk, self._parameters)
        if label is not None:
            self._refuse_the_ill()
            self._healthy = False in looked
        if found is not None:
            self._known[what] = {key: tuple(values) for key, values in found.items()}

    def _merge(
        self, jobs: Sequence[Job], writing: Writing, places: Mapping[str, str]
    ) -> Iterator[str]:
        """Merges and writes tensors; yields the name of each that is finished."""
        with ReadAhead(jobs, with_base=self._rule.uses_base) as reading:
            for segment, finished in self._computed(reading, self._finish):
                name = segment.job.name
                for weights, masks in finished:
                    writing.write(places[name], weights)
                    for expert, bits in enumerate(masks):
                        writing.write(_mask_file(expert), bits)
                if _ends(segment):
                    yield name

    def _computed(
        self, reading: ReadAhead, work: Callable[[Segment], Found]
    ) -> Iterator[tuple[Segment, Iterable[Found]]]:
        """Each segment and what `work` makes of its runs; the next one is computed meanwhile."""
        begun: deque[tuple[Segment, Iterable[Found]]] = deque()
        for segment in reading:
            begun.append((segment, self._workers.map(work, segment.runs())))
            if len(begun) > 1:
                yield begun.popleft()
        yield from begun

    def _finish(self, run: Segment) -> tuple[Bytes, list[Bytes]]:
        """A part of a tensor as it will be stored, in the base's dtype, and packed masks."""
        job = run.job
        if not job.experts:
            return run.tensors[0].numpy().copy(), []
        count, dtype = run.tensors[0].numel(), DTYPES[job.base.dtype]
        weights = torch.zeros(count, dtype=dtype)
        masks = [np.zeros(count, np.bool_) for _ in job.experts if self._rule.one_per_expert]
        known = self._known.get(job.name, self._known.get(_EVERYWHERE))
        for start, block in self._blocks(run):
            context = Context(job.name, run.offset + start, self.request.seed, known)
            merged = self._rule.merge(block.base, block.experts, self._parameters, context)
            stop = start + block.base.numel()
            if self._rule.uses_base:
                weights[start:stop] = added(block.base, merged.tau)
            else:
                weights[start:stop] = rounded_once(merged.tau, dtype)
            self._note_masks(job.name, merged, masks, slice(start, stop))
        if not _finite(weights):
            self._ill.add(f"{job.name}: the merged values are too large for {job.base.dtype}")
        return weights.view(torch.uint8).numpy(), [np.packbits(mask) for mask in masks]

    def _note_masks(self, name: str, merged: Merged, masks: list[Bits], place: slice) -> None:
        for expert, mask in enumerate(masks):
            assert merged.masks is not None
            assert merged.scales is not None
            mask[place] = merged.masks[expert].numpy()
            self._scales[name] = list(merged.scales)

    def _blocks(self, run: Segment) -> Iterator[tuple[int, Block]]:
        """A run's blocks and where they begin; notes and leaves out those with NaN."""
        size, tensors = run.job.base.elements, run.tensors
        with_base, length = len(tensors) > len(run.job.experts), block_of(len(tensors))
        for start in range(0, tensors[0].numel(), length):
            pieces = [tensor[start : start + length] for tensor in tensors]
            healthy = True
            for number, piece in enumerate(() if self._healthy else pieces):
                if not _finite(piece):
                    healthy = False
                    entries = (run.job.base, *run.job.experts)
                    entry = entries[number if with_base else number + 1]
                    self._ill.add(f"{entry.file}: {run.job.name} holds NaN or infinity")
            if healthy:
                base = pieces[0] if with_base else _ZERO.expand(pieces[0].shape)
                yield start, Block(base, tuple(pieces[with_base:]), size)

    def _refuse_the_ill(self) -> None:
        if self._ill:
            raise CannotMergeCheckpoints(sorted(self._ill))


def _compute_alone() -> None:
    """Has torch use no further threads in this one: blocks are larger than its grain."""
    torch.set_num_threads(1)


@contextmanager
def _threads_as_before(count: int) -> Iterator[None]:
    """Threads that are begun later get what torch was last told, in whichever thread."""
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _mask_file(expert: int) -> str:
    return f"masks/expert-{expert}.safetensors"


def _ends(segment: Segment) -> bool:
    """Whether a segment is its tensor's last."""
    job = segment.job
    length = job.base.elements if job.experts else job.base.size
    return segment.offset + segment.tensors[0].numel() == length


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; a sum is the quickest to tell, if it is finite."""
    if values.dtype == torch.float16:  # its sum overflows too easily
        return math.isfinite(values.sum(dtype=torch.float32).item())
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())
