"""How long steps took: what a store's finished steps say of steps that are still to run."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.manifest import MANIFEST
from graftline.planning.plan import Step
from graftline.store import Store

TIMING = "timing.json"
"""What a finished step took; its name among a step's notes and in its folder."""


@dataclass(frozen=True)
class History:
    """What steps of the same LLM took, in seconds.

    Attributes:
        alike: kind, and parameters without the seed -> the median of such steps.
        of_kind: kind -> the median of its steps.
    """

    alike: Mapping[tuple[str, str], float]
    of_kind: Mapping[str, float]

    def expected(self, step: Step) -> float | None:
        """Seconds: the median of such steps with any seed, else of its kind; None without one."""
        key = step.kind, _without_seed(step.parameters)
        return self.alike.get(key, self.of_kind.get(step.kind))


def history_of(steps: Iterable[Step], store: Store) -> History:
    """Reads what a store's steps took that come from the LLM of some steps, or from none.

    A step of another LLM says nothing: a tiny one may be a thousand times as fast.

    Args:
        steps: what is to run, with the steps that make the LLM.
        store: what is there; damaged artifacts are passed over.
    """
    own = {step.reference.fingerprint for step in steps if step.kind == "backbone"}
    finished = _finished(store)
    sources: dict[str, frozenset[str]] = {}
    alike: dict[tuple[str, str], list[float]] = defaultdict(list)
    of_kind: dict[str, list[float]] = defaultdict(list)
    for fingerprint, step in finished.items():
        seconds = recorded_seconds(step.folder)
        if seconds is not None and _sources(fingerprint, finished, sources) <= own:
            alike[step.kind, _without_seed(step.parameters)].append(seconds)
            of_kind[step.kind].append(seconds)
    return History(
        {key: statistics.median(each) for key, each in alike.items()},
        {kind: statistics.median(each) for kind, each in of_kind.items()},
    )


@dataclass(frozen=True)
class _Finished:
    """What a published step's manifest says of it."""

    folder: Path
    kind: str
    parameters: Mapping[str, Any]
    parents: Mapping[str, str]


def _finished(store: Store) -> dict[str, _Finished]:
    """Fingerprint -> published step."""
    found = {}
    for file in sorted(store.root.glob(f"[!.]*/[!.]*/{MANIFEST}")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            step = _Finished(file.parent, said["kind"], said["parameters"], said["parents"])
            found[said["fingerprint"]] = step
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: no history, and nobody's input here
    return found


def _sources(
    fingerprint: str, finished: Mapping[str, _Finished], known: dict[str, frozenset[str]]
) -> frozenset[str]:
    """The LLMs that a step comes from; what is not there any more counts as one."""
    if fingerprint not in known:
        step = finished.get(fingerprint)
        if step is None or step.kind == "backbone":
            known[fingerprint] = frozenset({fingerprint})
        else:
            behind = (_sources(parent, finished, known) for parent in step.parents.values())
            known[fingerprint] = frozenset().union(*behind)
    return known[fingerprint]


def _without_seed(parameters: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in parameters.items() if name != "seed"}
    return json.dumps(kept, sort_keys=True, default=dict)


def spoken(seconds: float, digits: int = 0) -> str:
    """A duration as people say it; seconds, below a minute and a half, with so many digits."""
    if seconds < 90:
        return f"{seconds:.{digits}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def recorded_seconds(folder: Path) -> float | None:
    """How long the whole step of an artifact's folder took; None if that is not recorded there."""
    try:
        return float(json.loads((folder / TIMING).read_text(encoding="utf-8"))["step_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # of an older version, or damaged: no history, and nobody's input
