"""What the methods against forgetting ask for, and one tiny run of each of their chains."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from graftline.planning.plan import Step
from graftline.planning.run import RunPlan
from graftline.recipe import RIVALS
from graftline.settings.reading import RecipeError, load_recipe
from graftline.steps.execution import execute
from graftline.steps.work import Machine
from graftline.store import Store
from tests.graftline.made_up import ORDER, TINY, filled_store
from tests.graftline.made_up import planned as plan

BY_ITSELF = ("attention-only", "o-lora")
"""Whose first stage is not naive fine-tuning."""
CHAINED = [name for name in RIVALS if name != "pathweave"]
"""Whose stages end with the model that the next one starts from."""


def guarded(run: RunPlan) -> list[Step]:
    """The fine-tunings against forgetting, in the stages' order."""
    steps = [run.steps[stage.final.backbone] for stage in run.stages]
    return [step for step in steps if step.kind == "guarded-fine-tune"]


@pytest.mark.parametrize("method", CHAINED)
def test_each_stage_starts_from_the_one_before_and_naive_fine_tuning_stands_beside(method) -> None:
    run = plan(method)
    assert len(guarded(run)) == (4 if method in BY_ITSELF else 3)
    for before, stage in zip(run.stages, run.stages[1:], strict=False):
        step = run.steps[stage.final.backbone]
        naive = run.steps[stage.vanilla.backbone]
        assert (step.kind, naive.kind) == ("guarded-fine-tune", "fine-tune")
        assert step.parents["backbone"] == naive.parents["backbone"] == before.final.backbone
        role = f"connector.{stage.modality}"
        aligned = run.steps[step.parents[role]]
        assert aligned.kind == "align"
        assert naive.parents[role] == step.parents[role]
        assert aligned.parents["backbone"] == before.final.backbone
        assert step.parameters["guard"] == method
    first = run.stages[0]
    assert (first.final == first.vanilla) == (method not in BY_ITSELF)
    assert first.vanilla == plan("finetune").stages[0].final
    points = {(score.point, score.stage, score.modality) for score in run.scores}
    for index, modality in enumerate(ORDER, start=1):
        assert {("vanilla", index, modality), ("expert", 0, modality)} <= points
        assert {("final", index, earlier) for earlier in ORDER[:index]} <= points


@pytest.mark.parametrize("method", ["replay", "der"])
def test_replaying_methods_train_old_connectors_on_their_share(method: str) -> None:
    run = plan(method, **{"fine_tune.steps": 40, "replay.fraction": 0.1})
    for index, step in enumerate(guarded(run), start=2):
        assert step.parameters["modalities"] == [ORDER[index - 1], *ORDER[: index - 1]]
        assert step.parameters["fraction"] == 0.1
        for modality in ORDER[: index - 1]:
            before = run.stages[index - 2].final
            assert step.parents[f"connector.{modality}"] == before.connectors[modality]
            assert run.stages[index - 1].final.connectors[modality] == step.reference
        more = 4 * (index - 1) if method == "replay" else 0
        assert step.parameters["steps"] == 40 + more
    other = guarded(plan(method, **{"fine_tune.steps": 40, "replay.fraction": 0.01}))
    assert other[0].reference != guarded(run)[0].reference


@pytest.mark.parametrize("method", ["ewc", "lwf", "attention-only", "o-lora"])
def test_other_methods_see_no_old_rows(method: str) -> None:
    run = plan(method)
    for step in guarded(run):
        assert len(step.parameters["modalities"]) == 1
        assert sum(role.startswith("features.") for role in step.parents) == 1
    assert plan(method, **{"replay.fraction": 0.9}).fingerprint == run.fingerprint


def test_ewc_weighs_each_finished_stage_once() -> None:
    run = plan("ewc")
    chain = [step for step in run.steps.values() if step.kind == "fisher"]
    assert [step.parameters["modality"] for step in chain] == list(ORDER[:3])  # not the last
    for index, step in enumerate(chain):
        assert step.parents["backbone"] == run.stages[index].final.backbone
        assert step.parents.get("previous") == (chain[index - 1].reference if index else None)
        assert guarded(run)[index].parents["fisher"] == step.reference
    stronger = plan("ewc", **{"rivals.ewc.strength": 3.0})
    assert chain[0].reference in stronger.steps  # candidates share the first stage's
    assert chain[1].reference not in stronger.steps


def test_o_lora_keeps_clear_of_every_earlier_stage() -> None:
    run = plan("o-lora", **{"rivals.o_lora.rank": 3})
    for index, step in enumerate(guarded(run)):
        roles = {role for role in step.parents if role.startswith("subspace.")}
        assert roles == {f"subspace.{name}" for name in ORDER[:index]}
        assert step.parameters["lora"] == {"rank": 3, "alpha": 32.0}
        assert step.parameters["mode"] == "lora"


def test_pathweave_lets_each_modality_keep_its_path() -> None:
    run = plan("pathweave", **{"rivals.pathweave.rank": 3})
    last = run.stages[-1].final
    before = run.steps[last.backbone]
    assert before.kind == "backbone"
    for index, modality in enumerate(ORDER, start=1):
        path = run.steps[last.adapters[modality]]
        assert path.parameters["rank"] == 3 * index  # its own LoRA and those before it
        learned = run.steps[path.parents["expert"]]
        assert learned.parents["backbone"] == before.reference
        assert learned.parameters["lora"] == {"rank": 3, "alpha": 32.0}
        before = learned
        assert run.stages[index - 1].final.adapters[modality] == path.reference
    for score in run.scores:
        if score.point == "final":
            assert run.steps[score.reference].parameters["text"] == "modality"


def test_a_search_goes_without_references() -> None:
    run = plan("ewc", **{"evaluation.references": False})
    assert {score.point for score in run.scores} == {"final"}
    assert sum(step.kind == "fine-tune" for step in run.steps.values()) == 1


@pytest.mark.parametrize("method", ["ewc", "attention-only"])
def test_settings_that_do_not_fit_are_named_at_once(method: str) -> None:
    changes = {"method": method, "fine_tune.mode": "lora", "order": ["image", "image"]}
    both = f"more than once\n.*{method} trains.*fine_tune.mode: full"
    with pytest.raises(RecipeError, match=both):
        load_recipe(TINY, changes)
    with pytest.raises(RecipeError, match="evaluation.references: true"):
        load_recipe(TINY, {"method": "experts", "evaluation.references": False})


@pytest.fixture
def store(tiny_folder: Path, features_folder: Path, tmp_path: Path) -> Store:
    """A store that holds a tiny theta_0 and made-up features of two modalities."""
    run = _two_modalities("finetune")
    return filled_store(tmp_path / "store", run, tiny_folder, features_folder)


def _two_modalities(method: str) -> RunPlan:
    changes = {
        "order": ["image", "audio"], "align.steps": 1, "fine_tune.steps": 2,
        "rivals.ewc.fisher_rows": 8, "evaluation.references": False,
    }  # fmt: skip
    return plan(method, **changes)


def test_every_rival_runs_to_its_end(store: Store, tmp_path: Path) -> None:
    made, asked = {}, []
    for method in RIVALS:
        run = _two_modalities(method)
        for step in run.steps.values():
            if not step.kind.startswith(("evaluate", "perplexity")):
                execute(step, store, Machine(tmp_path))
        later = [s.reference for s in run.scores if s.modality == "image"]  # after both stages
        for reference in later if method == "pathweave" else later[1:]:
            artifact = execute(run.steps[reference], store, Machine(tmp_path))
            asked.append(pq.read_table(artifact.folder / "answers.parquet"))
        [tuned] = [r for r, s in run.steps.items() if (s.kind, s.stage) == ("guarded-fine-tune", 2)]
        folder = store.folder(tuned.kind, tuned.fingerprint)
        assert len(json.loads((folder / "history.json").read_text())["losses"]) >= 2
        made[method] = {path.name for path in folder.iterdir()}
    plain = {"backbone", "connector-audio.json", "connector-audio.safetensors"}
    old = {"connector-image.json", "connector-image.safetensors"}
    kept = {"history.json", "timing.json", "manifest.json"}
    assert made["ewc"] == made["lwf"] == made["attention-only"] == plain | kept
    assert made["replay"] == made["der"] == plain | kept | old
    assert made["pathweave"] == plain | kept
    assert len(asked) == len(RIVALS) + 1
    assert asked[-2].equals(asked[-1])  # nothing that pathweave learned can change
    assert made["o-lora"] == plain | kept | {"subspace.safetensors", "subspace.json"}
