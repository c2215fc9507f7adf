"""What `graftline data check` says of a modality: counts, a few rows, warnings, problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from graftline.data.rows import SPLITS, split_file
from graftline.data.sheets import contact_sheet, examples_of
from graftline.data.sources.placing import unseen_answers
from graftline.data.validation import validate
from graftline.durable import atomic_write_text
from graftline.errors import GraftlineError

_SHOWN = 3


@dataclass(frozen=True)
class Checked:
    """What was found in the data of one modality.

    Attributes:
        modality: its name.
        kind: what its media are.
        counts: split -> task -> rows.
        rows: a few rows as text.
        warnings: what does not stand in the way.
        problems: `file, row: what`, each.
        sheet: the contact sheet; None where no row could be shown.
    """

    modality: str
    kind: str
    counts: Mapping[str, Mapping[str, int]]
    rows: tuple[str, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]
    sheet: Path | None

    def text(self) -> str:
        """Everything, all of it, for a file."""
        lines = [f"{self.modality} ({self.kind})", ""]
        lines += [
            f"{split}: " + (", ".join(f"{n} {task}" for task, n in tasks.items()) or "no rows")
            for split, tasks in self.counts.items()
        ]
        for title, listed in (
            ("rows", self.rows), ("warnings", self.warnings), ("problems", self.problems),
        ):  # fmt: skip
            lines += ["", f"{title}: {len(listed)}" if title != "rows" else "some rows:"]
            lines += [f"  {line}" for line in listed]
        return "\n".join(lines) + "\n"


def check_folder(folder: Path, modalities: Mapping[str, str], out: Path) -> list[Checked]:
    """Checks modalities whose rows lie in a data folder as parquet files.

    Args:
        folder: holds `<modality>/<split>.parquet`.
        modalities: which, with what their rows hold.
        out: folder of the contact sheets.
    """
    problems = validate(folder, modalities)
    found = []
    for name, kind in modalities.items():
        own = [p for p in problems if Path(p.file).parent.name == name]
        texts = _texts(folder, name)
        warnings = unseen_answers(texts) if len(texts) else []
        counts = {
            split: texts.loc[texts["split"] == split, "task"].value_counts(sort=False).to_dict()
            for split in SPLITS
        }
        found.append(
            checked(name, kind, folder / name, counts, warnings, [str(p) for p in own], out)
        )
    return found


def checked(
    modality: str,
    kind: str,
    folder: Path,
    counts: Mapping[str, Mapping[str, int]],
    warnings: Sequence[str],
    problems: Sequence[str],
    out: Path,
) -> Checked:
    """Draws the contact sheet and writes everything down.

    Args:
        modality: its name.
        kind: what its media are.
        folder: holds `<split>.parquet`.
        counts: split -> task -> rows.
        warnings: what does not stand in the way.
        problems: `file, row: what`, each.
        out: gets `<modality>.png` and `<modality>.txt`.
    """
    sheet: Path | None = out / f"{modality}.png"
    rows: tuple[str, ...] = ()
    try:
        examples = examples_of(folder)
        rows = tuple(
            f"{one.id}: {one.question} -> {' / '.join(one.answers)}"
            for one in examples[:: max(1, len(examples) // _SHOWN)]
        )
        if examples:
            contact_sheet(out / f"{modality}.png", modality, kind, examples)
        else:
            sheet = None
    except (GraftlineError, OSError, ValueError):
        if not problems:
            raise
        sheet = None  # what cannot be read is among the problems
    found = Checked(modality, kind, counts, rows, tuple(warnings), tuple(problems), sheet)
    atomic_write_text(out / f"{modality}.txt", found.text())
    return found


def _texts(folder: Path, modality: str) -> pd.DataFrame:
    """Split, task, answers and place of the rows that can be read."""
    rows: list[tuple[str, str, list[str], str]] = []
    for split in SPLITS:
        path = split_file(folder, modality, split)
        try:
            table = pq.read_table(path, columns=["task", "answers"]).to_pylist()
        except (OSError, ValueError):  # pyarrow's own errors are among these; named already
            continue
        rows += [
            (split, str(row.get("task")), list(row["answers"]), f"{path}, row {number}")
            for number, row in enumerate(table)
            if row.get("answers")
        ]
    return pd.DataFrame(rows, columns=["split", "task", "answers", "place"], dtype=object)
