"""Replayed rows beside new ones, with what the model said of them when they were learned.

Dark experience replay (Buzzega et al., arXiv 2004.07211) stores a row's logits when it is learned,
so what later stages lose is not taught on. Only those of the answer's tokens are kept: of a
vocabulary of 49,152 some 100 KB a token in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftline.data.examples import ExampleSet, TrainingSet
from graftline.model.loading import LoadedModel
from graftline.model.multimodal import Batch, collate
from graftline.progress import track
from graftline.training.distillation import answer_logits

FILES = "logits-*.safetensors"
"""Each of some rows: `logits`: (answer tokens of these rows, vocabulary); `rows`: int64 (rows,),
their numbers; `starts`: int64 (rows + 1,), where each row's tokens begin."""
_ROWS = 64  # of a file: what is recorded is written before it fills the memory


@dataclass(frozen=True, kw_only=True)
class RecordedBatch(Batch):
    """Replayed rows with what was said of them when they were learned.

    Attributes:
        told: (answer tokens of the batch, vocabulary), logits in the order of `answer_tokens`.
    """

    told: Tensor

    def to(self, device: torch.device | str) -> RecordedBatch:
        """Moves every tensor to `device`."""
        return replace(self, **vars(super().to(device)), told=self.told.to(device))


@dataclass(frozen=True, kw_only=True)
class MemoryBatch(Batch):
    """A batch of new rows, and one of replayed rows beside it.

    Attributes:
        memory: the replayed rows.
        new_weight: of the new rows' loss; the memory has its own, where processes share both.
    """

    memory: RecordedBatch
    new_weight: float = 1.0

    def to(self, device: torch.device | str) -> MemoryBatch:
        """Moves every tensor of both to `device`."""
        return replace(self, **vars(super().to(device)), memory=self.memory.to(device))

    @property
    def tokens(self) -> int:
        """Positions that are not padding, of both."""
        parts = ((super().tokens, self.new_weight), (self.memory.tokens, self.memory.weight))
        return sum(tokens for tokens, weight in parts if weight)


class RowsBesideMemory(TrainingSet):
    """New rows, and in each step as many replayed ones.

    Args:
        sets: the new modality's examples.
        batch_size: examples a step, of each kind.
        seed: of the order.
        memory: the replayed rows.
    """

    def __init__(
        self, sets: Sequence[ExampleSet], batch_size: int, seed: int, memory: RecordedRows
    ) -> None:
        super().__init__(sets, batch_size, seed)
        self.memory = memory

    def batch(self, step: int) -> MemoryBatch:
        """The two batches of a step: a pure function of data, seed and step."""
        new, memory = super().batch(step), self.memory.batch(step)
        both = {**vars(new), "weight": 1.0}
        return MemoryBatch(**both, memory=memory, new_weight=new.weight)


class RecordedRows(TrainingSet):
    """Replayed rows of old modalities, each with its recorded logits.

    Args:
        sets: the old modalities' examples.
        batch_size: examples a step.
        seed: of the order.
        recorded: of each set; its rows are those that are shown.
    """

    def __init__(
        self,
        sets: Sequence[ExampleSet],
        batch_size: int,
        seed: int,
        recorded: Sequence[RecordedLogits],
    ) -> None:
        super().__init__(sets, batch_size, seed, [each.rows for each in recorded])
        self._recorded = list(recorded)

    def batch(self, step: int) -> RecordedBatch:
        """The batch of a step: a pure function of data, seed and step."""
        batch = super().batch(step)
        assert isinstance(batch, RecordedBatch)
        return batch

    def _collate(self, indices: Sequence[int]) -> RecordedBatch:
        places = [self.places[index] for index in indices]
        told = torch.cat([self._recorded[number][row] for number, row in places])
        return RecordedBatch(**vars(super()._collate(indices)), told=told)


class RecordedLogits:
    """What `record_logits` wrote, read row by row from the disk.

    Args:
        folder: where it is.

    Attributes:
        rows: numbers of the rows, ascending.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[int, tuple[Any, int, int]] = {}
        for path in sorted(folder.glob(FILES)):
            file: Any = safe_open(path, framework="pt")
            spans = pairwise(file.get_tensor("starts").tolist())
            logits = file.get_slice("logits")
            for row, (start, stop) in zip(file.get_tensor("rows").tolist(), spans, strict=True):
                self._places[row] = (logits, start, stop)
        self.rows = list(self._places)

    def __getitem__(self, row: int) -> Tensor:
        """(answer tokens of the row, vocabulary), in the dtype that the model computed."""
        logits, start, stop = self._places[row]
        found: Tensor = logits[start:stop]
        return found


@torch.no_grad()
def record_logits(
    loaded: LoadedModel,
    examples: ExampleSet,
    rows: Sequence[int],
    batch_size: int,
    out: Path,
    title: str,
) -> None:
    """Writes what a model says of some rows' answers, token by token.

    Args:
        loaded: the model.
        examples: of one modality.
        rows: ascending numbers of those that are kept.
        batch_size: examples a pass.
        out: folder for `logits-<n>.safetensors`.
        title: of the progress bar.
    """
    with track(title, len(rows)) as advance:
        for number, first in enumerate(range(0, len(rows), _ROWS)):
            some = rows[first : first + _ROWS]
            said = []
            for start in range(0, len(some), batch_size):
                said.append(_said(loaded, examples, some[start : start + batch_size]))
                advance(rounds=len(some[start : start + batch_size]))
            lengths = [len(examples.prompt(row, True).answer_ids) for row in some]
            starts = torch.tensor([0, *lengths]).cumsum(0)
            kept = {"logits": torch.cat(said), "rows": torch.tensor(some), "starts": starts}
            save_file(kept, out / FILES.replace("*", f"{number:05d}"))


def _said(loaded: LoadedModel, examples: ExampleSet, rows: Sequence[int]) -> Tensor:
    """Logits of some rows' answers, on the CPU and in the dtype of the backbone's weights."""
    prompts = [examples.prompt(row, True) for row in rows]
    media = [[examples.features[row]] for row in rows]
    parameter = next(loaded.model.backbone.parameters())
    batch = collate(prompts, media, examples.pad_id).to(parameter.device)
    return answer_logits(loaded.model, batch).to("cpu", parameter.dtype)
