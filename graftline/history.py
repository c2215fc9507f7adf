"""How long steps took: what a store's finished steps say of steps that are still to run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.execution import recorded_seconds
from graftline.manifest import MANIFEST
from graftline.plan import Step
from graftline.store import Store


@dataclass(frozen=True)
class History:
    """What steps of the same LLM took.

    Attributes:
        seconds: kind -> parameters without the seed -> seconds of each step.
    """

    seconds: Mapping[str, Mapping[str, list[float]]]

    def expected(self, step: Step) -> float | None:
        """Seconds: the median of such steps with any seed, else of its kind; None without one."""
        alike = self.seconds.get(step.kind, {})
        every = [seconds for each in alike.values() for seconds in each]
        known = alike.get(_key(step.parameters), every)
        return statistics.median(known) if known else None


def history_of(steps: Iterable[Step], store: Store) -> History:
    """Reads what a store's steps took that come from the LLM of some steps, or from none.

    A step of another LLM says nothing: a tiny one may be a thousand times as fast.

    Args:
        steps: what is to run, with the steps that make the LLM.
        store: what is there; damaged artifacts are passed over.
    """
    own = {step.reference.fingerprint for step in steps if step.kind == "backbone"}
    manifests = _manifests(store)
    sources: dict[str, frozenset[str]] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for folder, manifest in manifests.values():
        seconds = recorded_seconds(folder)
        if seconds is None or not _sources(manifest["fingerprint"], manifests, sources) <= own:
            continue
        alike = found.setdefault(manifest["kind"], {})
        alike.setdefault(_key(manifest.get("parameters", {})), []).append(seconds)
    return History(found)


def _manifests(store: Store) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Fingerprint -> folder and manifest of every published step."""
    found = {}
    for file in sorted(store.root.glob(f"[!.]*/[!.]*/{MANIFEST}")):
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            found[manifest["fingerprint"]] = file.parent, manifest
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: no history, and nobody's input here
    return found


def _sources(
    fingerprint: str,
    manifests: Mapping[str, tuple[Path, Mapping[str, Any]]],
    known: dict[str, frozenset[str]],
) -> frozenset[str]:
    """The LLMs that a step comes from; what is not there any more counts as one."""
    if fingerprint not in known:
        parents: Mapping[str, str] = {}
        if fingerprint in manifests:
            manifest = manifests[fingerprint][1]
            parents = manifest.get("parents", {})
        if fingerprint not in manifests or manifest["kind"] == "backbone":
            known[fingerprint] = frozenset({fingerprint})
        else:
            behind = (_sources(parent, manifests, known) for parent in parents.values())
            known[fingerprint] = frozenset().union(*behind)
    return known[fingerprint]


def _key(parameters: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in parameters.items() if name != "seed"}
    return json.dumps(kept, sort_keys=True, default=dict)
