"""One more modality for an exported model: what comes of it is what a whole run makes."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from flows import using
from flows.cli_add import added_lines
from graftline.asking.asker import Asker
from graftline.asking.bundle import content_digest, read_bundle, read_description
from graftline.evaluation.report import read_report
from graftline.exchange.adding import check_recipe, plan_addition, take_in
from graftline.exchange.taking_apart import take_apart
from graftline.model.backbone import make_tiny
from graftline.settings.reading import RecipeError, load_recipe
from graftline.store import Store
from tasks.data import known_version
from tasks.models import find_parts
from tests.flows.conftest import Project
from tests.flows.used import QUIET, RECIPE, asked, medium
from tests.graftline.pico_models import pico_llava

pytestmark = pytest.mark.usefixtures("in_used", "one_server")
OLD = ("image", "audio", "video")


@pytest.fixture(scope="module")
def three(used, tmp_path_factory):
    """The model as it was after its third stage, exported."""
    out = tmp_path_factory.mktemp("three") / "three"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(used)
        using.export(RECIPE, {}, 3, out, QUIET)
    return out


@pytest.mark.slow
def test_an_added_modality_is_what_the_run_made(used, three, tmp_path):
    code, text = Project(used).run("add", RECIPE, str(three), "--out", str(tmp_path / "four"))
    assert code == 0, text
    assert f"{tmp_path / 'four'}: the new model" in text
    wanted = find_parts(RECIPE, {})
    made = find_parts(str(tmp_path / "four"), {})
    assert list(made.connectors) == list(wanted.connectors)
    assert made.kinds == wanted.kinds
    pairs = [(made.backbone / "model.safetensors", wanted.backbone / "model.safetensors")]
    for name in wanted.connectors:
        file = f"connector-{name}.safetensors"
        pairs.append((made.connectors[name] / file, wanted.connectors[name] / file))
    for ours, theirs in pairs:
        found, expected = load_file(ours), load_file(theirs)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found), ours
    assert asked(Asker(made), used)["image"].equal(asked(Asker(wanted), used)["image"])
    folder = used / "reports/tiny/add/point_cloud/seed-0"
    run = read_report(used / "reports/tiny/mera/seed-0")
    chain = {c for c in run.cells if c.point in ("final", "vanilla", "merged")}
    assert set(read_report(folder).cells) == chain
    found = json.loads((folder / "addition.json").read_text())
    metrics = json.loads((used / "reports/tiny/mera/seed-0/metrics.json").read_text())
    assert found["stage"] == 4 and found["not_realigned"] == {} == found["not_compared"]
    assert found["after"] == {name: metrics["scores"][name] for name in OLD}
    described = read_description(tmp_path / "four")
    assert described.stage == 4 and described.grown_from == content_digest(three)
    assert "| grown from |" in (tmp_path / "four/README.md").read_text()
    runs = Project(used).mlflow("select name, status from runs where name like 'add%'")
    assert runs == [("add point_cloud seed 0", "FINISHED")]
    registered = find_parts("tiny@add-point_cloud", {})
    assert registered.backbone == tmp_path / "four/backbone"
    assert list(registered.connectors) == list(made.connectors)


@pytest.mark.slow
def test_mera_adds_a_modality_to_a_model_that_was_taken_apart(used, tmp_path):
    make_tiny(tmp_path / "tiny", seed=0)
    pico_llava(tmp_path / "llava", tmp_path / "tiny")
    take_apart(tmp_path / "llava", tmp_path / "parts")
    encoder = f"{{source: transformers, folder: {tmp_path}/parts/encoder, layer: -2, "
    settings = ("order=[image,audio]", f"modalities.image.encoder={encoder}pooling: patches}}")
    options = [part for each in settings for part in ("--set", each)]
    added = ("add", RECIPE, str(tmp_path / "parts"), "--out", str(tmp_path / "grown"), *options)
    code, text = Project(used).run(*added)
    assert code == 0, text
    before, grown = read_bundle(tmp_path / "parts"), read_bundle(tmp_path / "grown")
    assert list(grown.connectors) == ["image", "audio"]
    old = load_file(before.connectors["image"] / "connector-image.safetensors")
    new = load_file(grown.connectors["image"] / "connector-image.safetensors")
    assert {name for name in old if not new[name].equal(old[name])} >= {"linear_2.weight"}
    described = read_description(tmp_path / "grown")
    assert (described.stage, described.order) == (2, ("image", "audio"))
    assert described.grown_from == content_digest(tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts")
    assert (tmp_path / "grown/encoders/image/model.safetensors").is_file()
    assert (
        read_bundle(tmp_path / "grown")
        .encoders["image"]["weights"]["folder"]
        .endswith("/grown/encoders/image")
    )
    assert Asker(grown).read(used / medium("audio"), "audio").modality == "audio"


def _planned(three, **changes):
    recipe = load_recipe(RECIPE, changes)
    return plan_addition(recipe, known_version(recipe.data.folder).files, three)


def test_i_comes_from_the_exported_model(three):
    plan = _planned(three, order=["point_cloud"]).plan
    [merge] = [step for step in plan.steps.values() if step.kind == "merge"]
    assert merge.parameters["stage"] == 4
    assert plan.recipe.order == ("point_cloud",)


def test_what_has_no_rows_is_not_realigned_and_said(three):
    addition = _planned(three, order=["image", "video", "point_cloud"])
    [stage] = addition.plan.stages
    realigned = {name for name, part in stage.final.connectors.items() if part.kind == "realign"}
    assert realigned == {"image", "video", "point_cloud"}
    assert stage.final.connectors["audio"].kind == "bundle"
    assert addition.not_realigned.keys() == addition.not_compared.keys() == {"audio"}
    lines = added_lines(
        {
            "stage": 4, "kept": 50.0, "undefined": None, "before": {"image": 0.5},
            "after": {"image": 0.25}, "not_realigned": dict(addition.not_realigned),
            "not_compared": {},
        }
    )  # fmt: skip
    assert "BRG over stage 4, against recorded scores: 50.00 %" in lines
    assert any(line.startswith("not realigned: audio (the recipe's order") for line in lines)


def test_scores_of_other_rows_are_not_compared(three):
    changes = {"data.rows": {"train": 64, "validation": 16, "test": 8}}
    addition = _planned(three, **changes)
    assert set(addition.not_compared.values()) == {"its recorded score is of other rows"}
    assert addition.before == {} and addition.plan.recorded == ()
    assert addition.kept({"image": 0.5}).value is None
    assert {s.modality for s in addition.plan.scores if s.point == "final"} >= set(OLD)


def test_kept_is_measured_against_recorded_scores(three):
    addition = _planned(three)
    assert set(addition.before) == set(OLD)
    object.__setattr__(addition, "before", {"image": 0.8, "audio": 0.5})
    assert addition.kept({"image": 0.4, "audio": 0.5}).value == pytest.approx(75.0)


def test_all_that_stands_against_an_addition_is_listed(three, exported):
    changes = {
        "method": "ewc", "merge.rule": "ties", "precision": "bfloat16", "order": ["image"],
        "modalities.image.encoder": "efficientnet-lite0-frames",
    }  # fmt: skip
    with pytest.raises(RecipeError) as error:
        check_recipe(load_recipe(RECIPE, changes), three)
    for words in ("ewc adds no stage", "needs theta_0", "precision is", "names nothing that",
                  "the model's is efficientnet-lite0"):  # fmt: skip
        assert words in str(error.value)
    with pytest.raises(RecipeError, match="weights of their own"):
        check_recipe(load_recipe(RECIPE), exported / "route")


def test_nothing_is_taken_in_for_an_addition_that_cannot_be(used, three, tmp_path):
    words = ["--set", "execution.device=gpu", "--set", f"store={tmp_path / 'store'}"]
    code, text = Project(used).run("add", RECIPE, str(three), "--out", str(tmp_path / "x"), *words)
    assert code == 1 and "execution.device: gpu cannot be used here" in text, text
    assert not (tmp_path / "store/bundle").exists()


def test_a_damaged_model_is_not_taken_in(three, tmp_path):
    shutil.copytree(three, tmp_path / "three")
    file = tmp_path / "three/connectors/connector-image.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Exception, match=r"connector-image.*Export the model again"):
        check_recipe(load_recipe(RECIPE), tmp_path / "three")


def test_taking_in_twice_is_once(three, tmp_path):
    store = Store(tmp_path / "store")
    assert take_in(three, store) == take_in(three, store)
    assert len(list((tmp_path / "store/bundle").iterdir())) == 1
