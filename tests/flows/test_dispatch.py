"""What goes out to workers together, and what it waits for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.adding import add
from flows.dispatch import HERE, sent_out, step_job
from flows.slots import Job
from flows.steps import plan_of
from graftline.errors import GraftlineError
from graftline.planning.run import RunPlan, plan_run
from graftline.settings.reading import load_recipe
from graftline.steps.work import Machine
from tasks.dispatch import place_problems
from tasks.references import DataVersion, Place
from tasks.steps import by_stage, publish_rows

TINY = Path(__file__).resolve().parents[2] / "params/tiny.yaml"
FILES = {
    name: dict.fromkeys(("train", "validation", "test"), "0" * 32)
    for name in ("image", "audio", "video", "point_cloud")
}
PLACE = Place("s3://lab/artifacts", Machine(Path("data"), "cpu"))
DATA = DataVersion("data", "0" * 32, FILES, "data.dvc")


def _jobs(method: str, recipe: Path = TINY) -> tuple[RunPlan, list[Job]]:
    plan = plan_run(load_recipe(recipe, {"method": method}), FILES)
    jobs = [
        step_job(step, PLACE, tuple(step.parents.values()))
        for _, steps in by_stage(plan)
        for step in steps
    ]
    return plan, jobs


def test_every_step_goes_once_after_what_it_needs():
    for method in ("mera", "mmer", "ewc"):
        plan, jobs = _jobs(method)
        sent = sent_out(jobs, dict.fromkeys((job.name for job in jobs), plan.recipe), PLACE, DATA)
        seen, finished = set(), set()
        for job in sent:
            assert set(job.needs) <= {other.name for other in sent}
            assert set(job.needs) <= finished, "a job stands behind what it needs"
            finished.add(job.name)
            if job.task is publish_rows:
                assert job.kind == "here" and job.arguments["step"].kind == "features"
                continue
            if "chain" not in job.arguments:
                seen.add(job.arguments["step"].reference)
                assert (job.arguments["step"].kind, job.kind) in {(kind, "here") for kind in HERE}
                continue
            for step in job.arguments["chain"].steps:
                assert step.kind not in HERE
                assert set(step.parents.values()) <= seen
                assert step.reference not in seen
                seen.add(step.reference)
        assert seen == {job.name for job in jobs}


def test_an_expert_travels_in_one_go_and_realigning_side_by_side():
    plan, jobs = _jobs("mera")
    chains = [
        [step.kind for step in job.arguments["chain"].steps]
        for job in sent_out(
            jobs, dict.fromkeys((job.name for job in jobs), plan.recipe), PLACE, DATA
        )
        if "chain" in job.arguments
    ]
    assert chains.count(["align", "fine-tune", "evaluate"]) == 3  # the first is stage 1's model
    assert ["align", "fine-tune"] in chains
    assert sum(chain[0] == "realign" for chain in chains) == 2 + 3 + 4


def test_features_go_out_in_shares_once_their_rows_are_in_the_store():
    plan, jobs = _jobs("mera")
    place = replace(PLACE, machine=replace(PLACE.machine, feature_shares=3))
    sent = sent_out(jobs, dict.fromkeys((job.name for job in jobs), plan.recipe), place, DATA)
    by_name = {job.name: job for job in sent}
    for step in (step for step in plan.steps.values() if step.kind == "features"):
        whole = by_name[step.reference]
        shares = [by_name[name] for name in whole.needs if by_name[name].task is not publish_rows]
        assert [job.arguments["chain"].share for job in shares] == [1, 2, 3]
        assert {job.needs for job in shares} == {((step.reference, "rows"),)}
        assert [chain.steps for chain in (whole.arguments["chain"],)] == [(step,)]
        assert shares[1].arguments["chain"].title == f"{step.title}, share 2"


def test_a_worker_makes_the_same_plan_where_a_method_has_settings_of_its_own(tmp_path: Path):
    recipe = tmp_path / "own.yaml"
    own = "methods:\n  replay: {fine_tune: {steps: 9}, align: {steps: 3}}"
    recipe.write_text(TINY.read_text(encoding="utf-8").replace("methods: {}", own))
    plan, jobs = _jobs("replay", recipe)
    recipes = dict.fromkeys((job.name for job in jobs), plan.recipe)
    chains = [j for j in sent_out(jobs, recipes, PLACE, DATA) if "chain" in j.arguments]
    assert chains
    for job in chains:
        sent = json.loads(json.dumps({k: job.arguments[k] for k in ("recipe", "common")}))
        there = plan_of(sent["recipe"], sent["common"], job.arguments["data_files"])
        assert {step.reference for step in job.arguments["chain"].steps} <= there.steps.keys()
        assert there.fingerprint == plan.fingerprint


def test_weights_that_only_this_machine_finds_are_told_before_anything_goes_out():
    encoder = {"encoder": {"source": "transformers", "folder": "models/clip"}, "media": "image"}
    changes = {"backbone.source": "./llm", "modalities.photo": encoder, "order": ["photo", "audio"]}
    problems = place_problems(load_recipe(TINY, changes))
    assert [problem.partition(": ")[0] for problem in problems] == [
        "backbone.source.folder", "modalities.photo.encoder.folder",
    ]  # fmt: skip
    encoder["encoder"]["folder"] = "/shared/clip"
    assert place_problems(load_recipe(TINY, {**changes, "backbone.source": "/shared/llm"})) == []


def test_a_stage_that_is_added_to_a_model_does_not_go_out(tmp_path: Path):
    workers = {"execution.where": "workers", "store": str(tmp_path / "store")}
    with pytest.raises(GraftlineError, match="execution.where=here"):
        add.fn(str(TINY), str(tmp_path / "model"), str(tmp_path / "out"), workers)
