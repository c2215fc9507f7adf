"""What the methods beyond MERA ask for, seen in their plans; nothing is computed."""

from __future__ import annotations

from typing import get_args

import pytest

from graftline.planning.plan import Reference, Step
from graftline.planning.run import RunPlan
from graftline.recipe import BeyondName
from graftline.settings.reading import RecipeError
from tests.graftline.methods.test_methods import kinds, plan

BEYOND = get_args(BeyondName)


def of_kind(run: RunPlan, kind: str) -> list[Step]:
    return [run.steps[reference] for reference in kinds(run, kind)]


def rows_behind(run: RunPlan, reference: Reference, modality: str) -> list[Step]:
    """Steps behind an artifact that see training rows of a modality, by when they do."""
    waiting, seen = [reference], set()
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += run.steps[current].parents.values()
    return [run.steps[each] for each in seen if f"features.{modality}" in run.steps[each].parents]


@pytest.mark.parametrize("method", BEYOND)
def test_they_stand_on_mera_s_own_chain(method: str) -> None:
    run, mera = plan(method), plan("mera")
    for kind in ("align", "fine-tune", "merge"):
        assert kinds(run, kind) == kinds(mera, kind)
    for step in of_kind(run, "realign"):  # of the new modality, whose rows are at hand
        assert step.parameters["modality"] == run.recipe.order[step.stage - 1]
    assert run.stages[0] == mera.stages[0]
    for own, known in zip(run.stages, mera.stages, strict=True):
        assert own.vanilla is not None
        assert known.vanilla is not None
        assert own.vanilla.backbone == known.vanilla.backbone
        assert own.merged is None or own.merged.backbone == known.merged.backbone
        assert set(own.final.connectors) == set(known.final.connectors)


def test_nothing_old_is_kept_where_nothing_is_replayed() -> None:
    """Rows of a modality are seen at its own stage alone; what is recorded then is no row."""
    for method in ("mera-corrected", "mera-distilled", "mera+"):
        run = plan(method)
        for name, connector in run.stages[-1].final.connectors.items():
            learned = 1 + run.recipe.order.index(name)
            assert {step.stage for step in rows_behind(run, connector, name)} == {learned}
            for step in of_kind(run, "distil"):
                assert "fraction" not in step.parameters
    percent = {"mera_plus.replay": 0.01}
    run = plan("mera+", **{**percent, "distil.own": "drawn"})
    fractions = [step.parameters.get("fraction", 0.0) for step in of_kind(run, "distil")]
    assert fractions == 9 * [0.01]
    own = of_kind(plan("mera+", **{**percent, "distil.own": "rows"}), "distil")
    fractions = [step.parameters.get("fraction", 0.0) for step in own]
    assert sorted(fractions) == 3 * [0.0] + 6 * [0.01]  # the stage's own rows are at hand


def test_the_new_modality_may_be_realigned_as_mera_does_on_rows_that_are_at_hand() -> None:
    run = plan("mera+")
    assert len(of_kind(run, "distil")) == 6
    for stage in run.stages[1:]:
        step = run.steps[stage.final.connectors[stage.modality]]
        assert (step.kind, step.stage) == ("realign", stage.index)
        assert step.parameters["modality"] == stage.modality
        assert step.parents["backbone"] == stage.merged.backbone
        assert "fraction" not in step.parameters  # all rows; none is kept for later


@pytest.mark.parametrize(("part", "ends"), [("output", "vanilla"), ("all", "final")])
def test_what_is_recorded_is_what_the_last_layer_goes_on_to_read(part: str, ends: str) -> None:
    """Where all of a connector is realigned at its own stage, its inner layers are other ones."""
    run = plan("mera+", **{"realign.part": part})
    stages = {stage.modality: stage for stage in run.stages}
    assert len(of_kind(run, "statistics")) == 3
    for step in of_kind(run, "statistics"):
        name = step.parameters["modality"]
        model = getattr(stages[name], ends)
        assert step.parents[f"connector.{name}"] == model.connectors[name]


def test_a_connector_is_taught_by_the_model_that_it_was_trained_in() -> None:
    run = plan("mera-distilled", **{"distil.own": "drawn"})
    for before, stage in zip(run.stages, run.stages[1:], strict=False):
        for name, connector in stage.final.connectors.items():
            step = run.steps[connector]
            taught = stage.vanilla if name == stage.modality else before.final
            assert step.parents["backbone"] == stage.merged.backbone
            assert step.parents["old"] == taught.backbone
            assert step.parents[f"taught.{name}"] == taught.connectors[name]
            assert f"statistics.{name}" in step.parents
    assert len(kinds(run, "statistics")) == 4


def test_it_may_be_taught_by_the_model_that_learned_its_modality() -> None:
    run = plan("mera-distilled", **{"distil.own": "drawn", "distil.teacher": "first"})
    ended = {stage.modality: stage.final for stage in run.stages}
    for stage in run.stages[1:]:
        for name, connector in stage.final.connectors.items():
            taught = stage.vanilla if name == stage.modality else ended[name]
            step = run.steps[connector]
            assert step.parents["old"] == taught.backbone
            assert step.parents[f"taught.{name}"] == taught.connectors[name]
    # in the stage after its own both are one
    assert run.steps[run.stages[1].final.connectors["image"]] in of_kind(
        plan("mera-distilled"), "distil"
    )


def test_the_correction_may_be_the_start_of_distilling() -> None:
    run = plan("mera+", **{"mera_plus.correct": True, "distil.own": "drawn"})
    for before, stage in zip(run.stages, run.stages[1:], strict=False):
        for name, connector in stage.final.connectors.items():
            step = run.steps[connector]
            corrected = run.steps[step.parents[f"connector.{name}"]]
            old = stage.vanilla if name == stage.modality else before.final
            assert corrected.kind == "correct"
            assert corrected.parents["old"] == step.parents["old"] == old.backbone
            assert corrected.parents[f"connector.{name}"] == step.parents[f"taught.{name}"]


def test_the_correction_may_be_the_start_of_realigning() -> None:
    run = plan("mera", **{"realign.start": "corrected"})
    for stage in run.stages[1:]:
        for name, connector in stage.final.connectors.items():
            step = run.steps[connector]
            corrected = run.steps[step.parents[f"connector.{name}"]]
            assert (step.kind, corrected.kind) == ("realign", "correct")
            assert corrected.parents["backbone"] == step.parents["backbone"]
            assert "start" not in step.parameters


def test_masks_are_of_the_chain_and_the_chain_goes_on_without_them() -> None:
    run = plan("mera-masks", **{"compose.parameters": {"mmer": {"density": 0.5}}})
    for before, stage in zip(run.stages, run.stages[1:], strict=False):
        composed = run.steps[stage.final.backbone]
        assert (composed.kind, composed.parameters["rule"]) == ("compose", "mmer")
        assert composed.parameters["parameters"]["density"] == 0.5
        for earlier in run.stages[: stage.index]:
            expert = composed.parents[f"expert.{earlier.modality}"]
            assert expert == earlier.vanilla.backbone
        for connector in stage.final.connectors.values():
            assert run.steps[connector].kind == "realign-masked"
            assert run.steps[connector].parents["base"] == stage.final.base
        assert stage.final.text == "modality"
        tuned = run.steps[stage.vanilla.backbone]
        begun = before.merged or before.vanilla
        assert tuned.parents["backbone"] == begun.backbone


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("mera", {"merge.coefficient": 0.4}, {"coefficient": 0.4, "depth": 0.0}),
        ("mera-distilled", {"merge.coefficient": 0.4}, {"coefficient": 0.4, "depth": 0.0}),
        ("mera+", {"mera_plus.coefficient": 0.3, "mera_plus.depth": 0.5},
         {"coefficient": 0.3, "depth": 0.5}),
    ],
)  # fmt: skip
def test_coefficients_are_chosen_by_the_recipe(
    method: str, changes: dict[str, object], expected: dict[str, float]
) -> None:
    run = plan(method, **changes)
    assert not kinds(run, "merge")
    assert [step.parameters for step in of_kind(run, "weighted-merge")] == 3 * [expected]
    assert run.stages[0] == plan(method).stages[0]


def test_a_slope_alone_keeps_the_mean_of_the_running_average() -> None:
    found = of_kind(plan("merge-only", **{"merge.depth": -0.5}), "weighted-merge")
    assert sorted(step.parameters["coefficient"] for step in found) == [1 / 4, 1 / 3, 1 / 2]
    with pytest.raises(RecipeError, match=r"merge\.coefficient and merge\.depth need"):
        plan("mera", **{"merge.rule": "ties", "merge.depth": 0.5})


def test_at_most_one_per_cent_is_replayed() -> None:
    with pytest.raises(RecipeError, match=r"mera_plus\.replay"):
        plan("mera+", **{"mera_plus.replay": 0.02})
