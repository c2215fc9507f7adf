"""How one stage's time, memory and storage grow with the number of modalities, on the tiny recipe.

Up to sixteen modalities: the classes of each of the four are split into quarters, each a modality
of its own with its own encoder features, connector and stage. Stages depend on those before them
alone, so the chain of sixteen holds those of two, four and eight.

    python benchmarks/growth.py --data data --out reports/tiny/growth

Writes `growth.csv` (a row a method and stage) and `growth.png`. Seconds are those of the steps, one
after another with one thread; memory is the most of the process that is anonymous while the stage's
steps run, libraries and what Python keeps included; storage is what the next stage needs: one
backbone, all connectors, and what is kept of each modality (replayed features; or statistics and
the LLM of its stage, which teaches it).
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

from graftline.data.build import by_modality, checksums
from graftline.data.examples import ROWS, replay_rows
from graftline.data.rows import SPLITS
from graftline.methods import method_named
from graftline.planning.history import recorded_seconds
from graftline.planning.plan import Planner, Reference, Step
from graftline.recipe import Recipe
from graftline.settings.reading import load_recipe
from graftline.steps.execution import execute
from graftline.steps.work import Machine
from graftline.store import Store

COUNTS = (2, 4, 8, 16)
PARTS = 4
METHODS = ("mera", "mera+")
GROUPS = {
    "align": "align", "fine-tune": "fine_tune", "merge": "merge", "realign": "realign",
    "distil": "realign", "statistics": "realign",
}  # fmt: skip
COLUMNS = (
    "method", "stage", "modality", "align_seconds", "fine_tune_seconds", "merge_seconds",
    "realign_seconds", "realign_steps", "peak_anonymous_bytes", "kept_bytes", "written_bytes",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("params/tiny.yaml"))
    parser.add_argument("--data", default="data", help="the starter's data")
    parser.add_argument("--out", type=Path, default=Path("reports/tiny/growth"))
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    overrides = {
        "data.folder": arguments.data,
        "data.rows": {"train": 256, "validation": 16, "test": 16},
        "distil.own": "answers",  # as the starter has them
        "distil.teacher": "first",
        "distil.steps": 4,
        "distil.batch_size": 4,
        "distil.samples": 32,
        "distil.clusters": 8,
    }
    recipes = {
        method: load_recipe(arguments.recipe, {**overrides, "method": method})
        for method in arguments.methods.split(",")
    }
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Store(Path(folder) / "whole")
        features = whole_features(next(iter(recipes.values())), whole)
        for method, recipe in recipes.items():
            store = Store(Path(folder) / method)
            rows += grown(many(recipe), features, store)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "growth.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, arguments.out / "growth.png")
    for line in summary(rows):
        print(line)


def whole_features(recipe: Recipe, store: Store) -> dict[str, Path]:
    """The four modalities' features, by their encoders."""
    planner = Planner(recipe, by_modality(checksums(Path(recipe.data.folder))))
    machine = Machine(Path(recipe.data.folder), "cpu")
    found = {}
    for name in recipe.order:
        step = planner.steps[planner.features(name)]
        found[name] = execute(step, store, machine).folder
    return found


def many(recipe: Recipe) -> Recipe:
    """The recipe with each modality in parts, in turn; names are not checked here."""
    settings = {name: recipe.modality(name) for name in recipe.order}
    names = [f"{name}_{part}" for part in range(PARTS) for name in recipe.order]
    return recipe.model_copy(
        update={
            "order": tuple(names[: max(COUNTS)]),
            "modalities": {name: settings[name.rpartition("_")[0]] for name in names},
        }
    )


def publish_part(step: Step, whole: Path, part: int, store: Store) -> None:
    """The part of a modality's rows whose answers come in that quarter of the alphabet."""

    def build(out: Path) -> None:
        for split in SPLITS:
            table = pq.read_table(whole / split / ROWS).to_pylist()
            order = sorted(range(len(table)), key=lambda row: (table[row]["answers"], row))
            share = len(order) // PARTS
            chosen = sorted(order[part * share : (part + 1) * share])
            target = out / split
            target.mkdir(parents=True)
            found = load_file(whole / split / "features.safetensors")["features"]
            save_file({"features": found[chosen]}, target / "features.safetensors")
            record = json.loads((whole / split / "rows.json").read_text(encoding="utf-8"))
            record["ids"] = [record["ids"][row] for row in chosen]
            (target / "rows.json").write_text(json.dumps(record), encoding="utf-8")
            own = pa.Table.from_pylist([table[row] for row in chosen])
            pq.write_table(own, target / ROWS)

    step.publish(store, build)


def grown(recipe: Recipe, features: dict[str, Path], store: Store) -> list[dict[str, object]]:
    """Carries out the chain, stage by stage, and measures each."""
    planner = Planner(
        recipe, {name: {split: f"{name}-{split}" for split in SPLITS} for name in recipe.order}
    )
    stages = method_named(recipe.method)(planner, recipe.order)
    machine = Machine(Path(recipe.data.folder), "cpu", 1)
    for name in recipe.order:
        kind, _, part = name.rpartition("_")
        publish_part(planner.steps[planner.features(name)], features[kind], int(part), store)
    execute(planner.steps[planner.backbone()], store, machine)
    rows = []
    for stage in stages:
        wanted = [stage.final.backbone, *stage.final.connectors.values()]
        steps = missing(planner, store, wanted)
        with Watched() as watched:
            for step in steps:
                execute(step, store, machine)
        row: dict[str, object] = dict.fromkeys(COLUMNS, 0.0)
        row |= {"method": recipe.method, "stage": stage.index, "modality": stage.modality}
        for step in steps:
            column = f"{GROUPS[step.kind]}_seconds"
            folder = store.folder(step.kind, step.reference.fingerprint)
            row[column] += recorded_seconds(folder) or 0.0  # type: ignore[operator]
        row["realign_steps"] = sum(GROUPS[step.kind] == "realign" for step in steps)
        row["peak_anonymous_bytes"] = watched.peak
        learned = recipe.order[: stage.index]
        row["kept_bytes"] = kept_bytes(recipe, planner, store, wanted, learned)
        if recipe.method != "mera":  # the first teachers; the last one is the model itself
            teachers = [earlier.final.backbone for earlier in stages[: stage.index - 1]]
            row["kept_bytes"] += sum(
                size_of(store.folder(part.kind, part.fingerprint) / "backbone") for part in teachers
            )
        row["written_bytes"] = sum(
            size_of(store.folder(step.kind, step.reference.fingerprint)) for step in steps
        )
        rows.append(row)
        print(f"{recipe.method} {stage.index:>2} {stage.modality}", flush=True)
    return rows


def missing(planner: Planner, store: Store, wanted: list[Reference]) -> list[Step]:
    """Steps that are not there yet, parents first."""
    found: dict[Reference, Step] = {}

    def need(reference: Reference) -> None:
        step = planner.steps[reference]
        done = store.find(step.kind, reference.fingerprint) is not None
        if reference not in found and not done:
            for parent in step.parents.values():
                need(parent)
            found[reference] = step

    for reference in wanted:
        need(reference)
    return list(found.values())


def kept_bytes(
    recipe: Recipe,
    planner: Planner,
    store: Store,
    parts: list[Reference],
    learned: tuple[str, ...],
) -> int:
    """What the next stage needs: backbone, connectors, and what is kept of each modality."""
    backbone, *connectors = [store.folder(part.kind, part.fingerprint) for part in parts]
    size = size_of(backbone / "backbone")
    for name, folder in zip(learned, connectors, strict=True):
        size += sum(file.stat().st_size for file in folder.glob(f"connector-{name}.*"))
    if recipe.method == "mera":
        for name in learned:
            part = planner.features(name)
            train = store.folder(part.kind, part.fingerprint) / "train"
            rows = pq.read_metadata(train / ROWS).num_rows
            share = len(replay_rows(rows, recipe.replay.fraction, recipe.seed)) / rows
            size += round(share * size_of(train))
    else:
        recorded = [step for step in planner.steps.values() if step.kind == "statistics"]
        for step in recorded:
            folder = store.folder(step.kind, step.reference.fingerprint)
            if step.parameters["modality"] in learned and folder.is_dir():
                size += size_of(folder)
    return size


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Watched:
    """The most anonymous memory while the context lasts."""

    def __enter__(self) -> Watched:
        gc.collect()
        self.peak, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def summary(rows: list[dict[str, object]]) -> list[str]:
    """What one stage, and all realigning so far, cost at 2, 4, 8 and 16 modalities."""
    lines = [f"{'method':<16}{'N':>4}{'stage s':>9}{'realign s':>11}{'all realign s':>15}"
             f"{'memory MB':>11}{'kept MB':>9}"]  # fmt: skip
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own = [row for row in rows if row["method"] == method]
        for count in COUNTS:
            if count > len(own):
                continue
            row = own[count - 1]
            stage = sum(float(row[name]) for name in COLUMNS if name.endswith("_seconds"))
            total = sum(float(each["realign_seconds"]) for each in own[:count])
            lines.append(
                f"{method:<16}{count:>4}{stage:>9.2f}{float(row['realign_seconds']):>11.2f}"
                f"{total:>15.2f}{float(row['peak_anonymous_bytes']) / 1e6:>11.0f}"
                f"{float(row['kept_bytes']) / 1e6:>9.2f}"
            )
    return lines


def draw(rows: list[dict[str, object]], file: Path) -> None:
    """Three panels: a stage's seconds, its memory, and what is kept behind it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own = [row for row in rows if row["method"] == method]
        stages = [int(row["stage"]) for row in own]
        learning = [sum(float(row[f"{k}_seconds"]) for k in ("align", "fine_tune", "merge"))
                    for row in own]  # fmt: skip
        panels[0].plot(
            stages,
            [float(row["realign_seconds"]) for row in own],
            "o-",
            label=f"{method}: all realigning",
            markersize=3,
        )
        panels[0].plot(stages, learning, "--", label=f"{method}: align, fine-tune, merge")
        memory = [float(row["peak_anonymous_bytes"]) / 1e6 for row in own]
        panels[1].plot(stages, memory, "o-", label=method, markersize=3)
        kept = [float(row["kept_bytes"]) / 1e6 for row in own]
        panels[2].plot(stages, kept, "o-", label=method, markersize=3)
    titles = ("seconds of a stage", "memory of a stage, MB", "kept after a stage, MB")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("modalities")
        panel.set_xticks(COUNTS)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
