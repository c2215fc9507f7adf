"""Every finished model that can be asked now, for whoever chooses among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graftline.asking.bundle import is_bundle
from graftline.asking.parts import Parts
from graftline.errors import GraftlineError
from graftline.methods import Stage
from graftline.planning.run import plan_run
from graftline.settings.reading import load_recipe
from graftline.store import Store
from graftline.stores import open_store
from tasks.models import find_parts
from tasks.outputs import finished_reports, read_metrics
from tasks.own_data import whole_data

_RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class Choice:
    """A model that can be asked.

    Attributes:
        label: what people choose by.
        model: as `tasks.models.find_parts` takes it.
        overrides: dotted key -> value.
        stage: whose model it is; the last one's where it is None.
        kinds: modality -> what its media are.
    """

    label: str
    model: str
    kinds: Mapping[str, str]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    stage: int | None = None

    def parts(self) -> Parts:
        """Where its parts lie, verified."""
        return find_parts(self.model, self.overrides, self.stage)


def choices_of(models: Sequence[str], overrides: Mapping[str, Any]) -> list[Choice]:
    """All models that some names stand for, whose parts are there.

    Args:
        models: recipes stand for every stage of all their finished runs; exported folders, reports
            and registered names for one model each.
        overrides: dotted key -> value, for recipes.

    Raises:
        GraftlineError: a name stands for nothing that can be asked.
    """
    found: list[Choice] = []
    for model in models:
        path = Path(model)
        if path.suffix in _RECIPES:
            own = _of_recipe(path, overrides)
            if sum(Path(each).suffix in _RECIPES for each in models) > 1:
                name = load_recipe(path, overrides).name
                own = [replace(each, label=f"{name} · {each.label}") for each in own]
            found += own
        else:
            chosen = {} if path.is_dir() and is_bundle(path) else overrides
            parts = find_parts(model, chosen, None)  # what is wrong with it, before anything starts
            kinds = {name: parts.kind_of(name) for name in parts.connectors}
            found.append(Choice(model, model, kinds, chosen))
    return list({choice.label: choice for choice in found}.values())


def _of_recipe(path: Path, overrides: Mapping[str, Any]) -> list[Choice]:
    """Stages of the runs whose reports and artifacts are there; each run's last stage first.

    The run that the recipe itself names comes before the others.
    """
    own = load_recipe(path, overrides)
    reports = [read_metrics(folder) for folder in finished_reports(own.name)]
    reports.sort(key=lambda each: (each["method"] != own.method, each["seed"] != own.seed))
    found: list[Choice] = []
    for metrics in reports:
        changes = {**overrides, **{key: metrics[key] for key in ("method", "seed", "order")}}
        recipe = load_recipe(path, changes)
        data = whole_data(recipe)
        if data is None:
            continue
        plan = plan_run(recipe, data.files)
        if plan.fingerprint != metrics.get("fingerprint"):
            continue  # of other settings, data or code
        for stage in reversed(plan.stages):
            if _is_there(stage, open_store(recipe.store)):
                what = " ".join(stage.final.connectors).replace("_", " ")
                label = f"{recipe.method} · seed {recipe.seed} · stage {stage.index}: {what}"
                kinds = {name: recipe.kind_of(name) for name in stage.final.connectors}
                found.append(Choice(label, str(path), kinds, changes, stage.index))
    if not found:
        raise GraftlineError(
            f"{path}: none of its runs is finished with the settings, data and code that are here "
            f"now. Run: graftline run {path}"
        )
    return found


def _is_there(stage: Stage, store: Store) -> bool:
    model = stage.final
    parts = [model.backbone, *model.connectors.values(), *model.experts.values()]
    parts += [*model.adapters.values(), *([model.base] if model.base else [])]
    return all(store.folder(part.kind, part.fingerprint).is_dir() for part in parts)
