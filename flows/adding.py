"""The flow that adds one modality to an exported model, and exports the model that comes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow

from flows.continual import carry_out_run, opened_run
from flows.data import versioned
from graftline.asking.bundle import refuse_existing
from graftline.errors import GraftlineError
from graftline.exchange.adding import check_recipe, plan_addition, take_in
from graftline.planning.problems import require_possible
from graftline.settings.reading import load_recipe
from graftline.stores import open_store
from tasks.addition import export_addition
from tasks.outputs import addition_folder
from tasks.references import Place
from tasks.report import register_model


@flow(name="add", persist_result=False, validate_parameters=False)
def add(recipe_path: str, model: str, out: str, overrides: Mapping[str, Any] | None = None) -> str:
    """Adds a modality to an exported model by one stage of MERA.

    Args:
        recipe_path: `params/*.yaml`; its `order` names the new modality and the old ones whose rows
            are at hand.
        model: the exported model's folder.
        out: folder to make, for the new model.
        overrides: dotted key -> value; wins over the file.

    Returns:
        The report's folder.

    Raises:
        GraftlineError: `out` is there, the model cannot grow by this recipe, or steps are to go
            out to workers; finished steps are kept.
    """
    recipe = load_recipe(recipe_path, overrides)
    if recipe.execution.where == "workers":
        raise GraftlineError(
            "execution.where: workers plan whole runs, not one more stage of an exported model; "
            "compute it on this machine with --set execution.where=here"
        )
    origin, target = Path(model), Path(out)
    refuse_existing(target)
    known = check_recipe(recipe, origin)
    [new] = [name for name in recipe.order if name not in known.encoders]
    folder = addition_folder(recipe, new)
    started = time.time()
    with opened_run(recipe, folder) as record:
        data = versioned(recipe)
        addition = plan_addition(recipe, data.files, origin)
        require_possible(addition.plan.recipe, data.files, own_start=False)
        take_in(origin, open_store(recipe.store))

        def finish(place: Place, model_id: str | None) -> None:
            export_addition(addition, data, folder, target)
            register_model(addition.plan, place, data, model_id, f"add-{new}", target)

        name = f"add {new} seed {recipe.seed}"
        carry_out_run(addition.plan, data, folder, name, record, started, finish)
    return str(folder)
