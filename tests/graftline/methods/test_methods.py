"""What each method asks for, seen in its plan; nothing is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftline.merging.rules import UnknownRule
from graftline.planning.plan import Reference
from graftline.planning.run import RunPlan, plan_run
from graftline.settings.reading import load_recipe

TINY = Path(__file__).parents[3] / "params" / "tiny.yaml"
SPLITS = ("train", "validation", "test")
FILES = {
    name: {split: f"{name}-{split}" for split in SPLITS}
    for name in ("image", "audio", "video", "point_cloud")
}


def plan(method: str, **changes: object) -> RunPlan:
    return plan_run(load_recipe(TINY, {"method": method, **changes}), FILES)


def kinds(run: RunPlan, kind: str) -> set[Reference]:
    return {reference for reference in run.steps if reference.kind == kind}


@pytest.mark.parametrize(
    ("method", "fine_tunings", "merges", "realignings"),
    [
        ("mera", 7, 3, 9),  # 4 stages + 3 further experts; 2 + 3 + 4 connectors
        ("merge-only", 7, 3, 0),
        ("realign-only", 7, 0, 9),
        ("finetune", 7, 0, 0),
        ("connector-only", 8, 0, 0),  # 4 connectors and 4 experts
        ("joint", 5, 0, 0),
        ("experts", 4, 0, 0),
        ("average", 4, 0, 0),
        ("mmer", 4, 0, 0),
        ("route", 4, 0, 0),
    ],
)
def test_a_method_costs_what_it_says(
    method: str, fine_tunings: int, merges: int, realignings: int
) -> None:
    run = plan(method)
    assert len(kinds(run, "fine-tune")) == fine_tunings
    assert len(kinds(run, "merge")) == merges
    assert len(kinds(run, "realign")) == realignings


def test_mera_may_merge_by_another_rule() -> None:
    changes = {"merge.rule": "ties", "merge.parameters": {"density": 0.5}}
    run = plan("mera", **changes)
    assert not kinds(run, "merge")
    assert len(kinds(run, "compose")) == 3
    for before, stage in zip(run.stages, run.stages[1:], strict=False):
        merge = run.steps[stage.final.backbone]
        assert merge.parameters["parameters"]["density"] == 0.5
        assert merge.parents["expert.before"] == before.final.backbone
        assert merge.parents["expert.vanilla"] == stage.vanilla.backbone
        assert run.steps[merge.parents["base"]].kind == "backbone"
    with pytest.raises(UnknownRule, match="did you mean 'density'"):
        plan("mera", **{**changes, "merge.parameters": {"densty": 0.5}})


def test_vanilla_starts_from_the_model_before_and_the_merge_comes_after() -> None:
    run = plan("mera")
    for before, stage in zip(run.stages, run.stages[1:], strict=False):
        assert stage.vanilla is not None
        vanilla = run.steps[stage.vanilla.backbone]
        assert vanilla.kind == "fine-tune"
        assert vanilla.parents["backbone"] == before.final.backbone
        merge = run.steps[stage.final.backbone]
        assert merge.kind == "merge"
        assert merge.parameters["stage"] == stage.index
        assert merge.parents["previous"] == before.final.backbone
        assert merge.parents["vanilla"] == stage.vanilla.backbone
        for modality, connector in stage.final.connectors.items():
            realign = run.steps[connector]
            assert realign.kind == "realign"
            assert realign.parents["backbone"] == stage.final.backbone
            learned = stage.vanilla if modality == stage.modality else before.final
            assert realign.parents[f"connector.{modality}"] == learned.connectors[modality]
            assert f"features.{modality}" in realign.parents


def test_connectors_alone_are_held_against_fine_tuning_which_the_experts_were() -> None:
    """So their FRG costs no step: the LLM that they leave is the base's at every stage."""
    run = plan("connector-only")
    vanilla = {stage.vanilla.backbone for stage in run.stages if stage.vanilla is not None}
    assert len(vanilla) == 4
    assert vanilla == kinds(plan("experts"), "fine-tune")
    points = {score.point for score in run.scores}
    assert points == {"vanilla", "final", "expert"}


def test_methods_share_what_they_have_in_common() -> None:
    mera, finetune = plan("mera"), plan("finetune")
    shared = kinds(mera, "fine-tune") & kinds(finetune, "fine-tune")
    assert len(shared) == 5  # stages 1 and 2, and the three further experts
    one_percent = plan("mera", **{"replay.fraction": 0.01})
    assert kinds(one_percent, "merge") == kinds(mera, "merge") == kinds(plan("merge-only"), "merge")
    assert not kinds(one_percent, "realign") & kinds(mera, "realign")


def test_a_later_modality_does_not_change_an_earlier_stage() -> None:
    first = plan("mera", order=["image", "audio", "video", "point_cloud"])
    second = plan("mera", order=["image", "audio", "point_cloud", "video"])
    assert first.stages[1].final == second.stages[1].final
    assert first.stages[2].final != second.stages[2].final


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"evaluation.max_new_tokens": 5}, {"fine-tune", "merge", "realign", "align"}),
        ({"fine_tune.checkpoint_every": 7}, {"fine-tune", "merge", "realign", "evaluate"}),
        ({"execution.slots": 3}, {"fine-tune", "evaluate"}),
        ({"realign.steps": 5}, {"fine-tune", "merge", "align"}),
        ({"seed": 7}, {"backbone", "features"}),
    ],
)
def test_only_what_depends_on_a_parameter_is_new(change: dict[str, object], kept: set[str]) -> None:
    before, after = plan("mera"), plan("mera", **change)
    for kind in ("backbone", "features", "align", "fine-tune", "merge", "realign", "evaluate"):
        same = kinds(before, kind) == kinds(after, kind)
        assert same or kind not in kept, kind
    assert before.steps.keys() == after.steps.keys() or kinds(before, "evaluate") != kinds(
        after, "evaluate"
    )


def test_other_data_is_other_features() -> None:
    other = {**FILES, "audio": {**FILES["audio"], "test": "changed"}}
    before = plan("mera")
    after = plan_run(load_recipe(TINY, {"method": "mera"}), other)
    assert len(kinds(before, "features") & kinds(after, "features")) == 3


def test_parents_come_before_children() -> None:
    seen: set[Reference] = set()
    for reference, step in plan("mera").steps.items():
        assert set(step.parents.values()) <= seen, step.label
        seen.add(reference)


def test_every_score_that_the_gains_need_is_planned() -> None:
    run = plan("mera")
    points = {(score.point, score.stage, score.modality) for score in run.scores}
    order = run.recipe.order
    for index, modality in enumerate(order, start=1):
        assert ("vanilla", index, modality) in points
        assert ("expert", 0, modality) in points
        for earlier in order[:index]:
            assert ("final", index, earlier) in points


@pytest.mark.parametrize("method", ["ties", "mmer", "route"])
def test_composition_combines_the_experts_that_every_run_measures(method: str) -> None:
    run = plan(method)
    order = set(run.recipe.order)
    [compose] = [run.steps[reference] for reference in kinds(run, "compose")]
    experts = {s.modality: run.steps[s.reference] for s in run.scores if s.point == "expert"}
    for name, score in experts.items():
        assert compose.parents[f"expert.{name}"] == score.parents["backbone"]
    [stage] = run.stages
    assert stage.final.backbone == compose.reference
    routed = [run.steps[s.reference] for s in run.scores if s.point == "final"]
    assert [step.kind for step in routed] == [*4 * ["evaluate"], "evaluate-joint"]
    for step in routed:
        asked = {role.partition(".")[2] for role in step.parents if role.startswith("connector.")}
        kept = {role.partition(".")[2] for role in step.parents if role.startswith("expert.")}
        assert asked == ({step.parameters["modality"]} if "modality" in step.parameters else order)
        assert ("base" in step.parents) == (method == "mmer")
        assert kept == (asked if method == "route" else set())
        assert ("routing" in step.parameters) == (method != "ties")


@pytest.mark.parametrize("method", ["average", "mmer", "route"])
def test_a_composition_may_grow_by_one_expert_a_stage(method: str) -> None:
    run = plan(method, **{"compose.growing": True})
    order = run.recipe.order
    assert [stage.modality for stage in run.stages] == list(order)
    points = [(score.point, score.stage, score.modality) for score in run.scores]
    experts = {s.modality: s.reference for s in run.scores if s.point == "expert"}
    for index, modality in enumerate(order, start=1):
        assert [m for point, at, m in points if (point, at) == ("final", index)][:index] == list(
            order[:index]
        )
        [vanilla] = [s.reference for s in run.scores if (s.point, s.stage) == ("vanilla", index)]
        assert vanilla == experts[modality]  # nothing more is trained
    at_once = plan(method)
    assert kinds(run, "fine-tune") == kinds(at_once, "fine-tune")
    assert run.stages[-1].final == at_once.stages[-1].final


def test_experts_may_be_kept_as_low_rank_products() -> None:
    run = plan("route", **{"compose.rank": 8})
    made = kinds(run, "adapters")
    assert len(made) == len(run.recipe.order)
    assert not kinds(run, "compose")
    asked = [run.steps[s.reference] for s in run.scores if s.point == "final"]
    for step in asked:  # text meets the mean of all of them
        assert made == {each for each in step.parents.values() if each.kind == "adapters"}
        assert step.parents["backbone"].kind == "backbone"
    other = plan("route", **{"compose.rank": 4})
    assert kinds(run, "fine-tune") == kinds(other, "fine-tune")
    assert not made & kinds(other, "adapters")


def test_parameters_of_a_rule_are_checked_before_anything_runs() -> None:
    with pytest.raises(UnknownRule, match="densty: unknown key.*did you mean 'density'"):
        plan("ties", **{"compose.parameters": {"ties": {"densty": 0.3}}})
    assert plan("ties").fingerprint != (
        plan("ties", **{"compose.parameters": {"ties": {"density": 0.3}}}).fingerprint
    )


def test_joint_is_trained_once_for_all_orders():
    orders = (["image", "audio", "video"], ["video", "image", "audio"])
    first, second = (plan("joint", order=order) for order in orders)
    assert kinds(first, "fine-tune") == kinds(second, "fine-tune")
    assert kinds(first, "evaluate") == kinds(second, "evaluate")


def test_a_method_s_own_settings_are_not_its_measure_s() -> None:
    usual = plan("replay")
    own = plan("replay", **{"methods.replay.fine_tune.learning_rate": 1e-5})
    tuned = [step for step in own.steps.values() if step.kind == "guarded-fine-tune"]
    assert {step.parameters["learning_rate"] for step in tuned} == {1e-5}
    vanilla = [own.steps[stage.vanilla.backbone] for stage in own.stages if stage.vanilla]
    assert {step.parameters["learning_rate"] for step in vanilla} == {3e-4}
    experts = [
        {score.reference for score in run.scores if score.point == "expert"} for run in (usual, own)
    ]
    assert experts[0] == experts[1] != set()
