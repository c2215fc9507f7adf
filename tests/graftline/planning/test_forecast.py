"""Estimates of what a run will cost, beside what is really there."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftline.planning.forecast import (
    KNOWN_BACKBONES,
    BackboneShape,
    estimate_row_tokens,
    forecast,
    step_memory,
    training_flops,
)
from graftline.planning.plan import Step
from graftline.planning.problems import recipe_problems
from graftline.planning.run import plan_run
from graftline.recipe import Recipe
from graftline.settings.reading import load_recipe
from graftline.store import Store
from graftline.weight_files import read_header
from tests.graftline.stored import publish_timed

ROOT = Path(__file__).resolve().parents[3]
MODALITIES = ("image", "audio", "video", "point_cloud")
FILES = {name: dict.fromkeys(("train", "validation", "test"), name) for name in MODALITIES}


def _tiny(**overrides: object) -> Recipe:
    return load_recipe(ROOT / "params/tiny.yaml", overrides)


def _steps(recipe: Recipe, kind: str) -> list[Step]:
    return [step for step in plan_run(recipe, FILES).steps.values() if step.kind == kind]


def test_shapes_count_every_parameter(tiny_folder):
    stored = sum(
        entry.elements for entry in read_header(tiny_folder / "model.safetensors").values()
    )
    config = json.loads((tiny_folder / "config.json").read_text())
    assert BackboneShape.of_config(config).parameters == stored
    assert KNOWN_BACKBONES["tiny-random"].parameters == stored
    assert KNOWN_BACKBONES["smollm2-135m-instruct"].parameters == 134_515_008


def test_operations_follow_from_steps_rows_and_what_is_trained():
    tokens = dict.fromkeys(MODALITIES, 20.0)
    [align] = [each for each in _steps(_tiny(), "align") if each.label == "image: align"][:1]
    assert training_flops(align, 1000, tokens) == 4 * 1000 * 4 * 8 * 20.0
    [tune] = _steps(_tiny(method="joint"), "fine-tune")[:1]
    assert training_flops(tune, 1000, tokens) == 6 * 1000 * 4 * 6 * 8 * 20.0
    lora = _steps(_tiny(**{"fine_tune.mode": "lora"}), "fine-tune")[0]
    assert training_flops(lora, 1000, tokens) == 4 * 1000 * 6 * 8 * 20.0
    assert training_flops(_steps(_tiny(), "perplexity")[0], 1000, tokens) is None


def test_memory_counts_what_training_holds():
    shape = KNOWN_BACKBONES["tiny-random"]
    trained = shape.parameters - shape.embeddings
    wide = _tiny(precision="bfloat16")
    connector = step_memory(_steps(wide, "align")[0], wide, shape) - 2 * shape.parameters
    assert connector > 0 and connector % 16 == 0
    tune = step_memory(_steps(wide, "fine-tune")[0], wide, shape)
    assert tune == 2 * shape.parameters + trained * (2 + 4 + 8) + connector
    exact = _tiny()
    tune = step_memory(_steps(exact, "fine-tune")[0], exact, shape)
    assert tune == 4 * shape.parameters + trained * (4 + 8) + connector
    kept = _tiny(method="route")
    asked = [step_memory(each, kept, shape) for each in _steps(kept, "evaluate-joint")]
    assert asked == [5 * 4 * shape.parameters]
    assert step_memory(_steps(_tiny(), "merge")[0], exact, shape) is None


def test_rows_are_measured_where_they_are(tmp_path):
    recipe = _tiny(**{"data.folder": str(tmp_path), "data.rows": {"train": 2}})
    assert estimate_row_tokens(recipe, "image") is None
    rows = {"question": ["What?", "Which?", "?" * 999], "answers": [["red"], ["blue"], ["x"]]}
    (tmp_path / "image").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "image/train.parquet")
    # two connector tokens, four marks, and a token a character of template and text
    expected = 2 + 4 + len("user\n\nassistant\n") + (5 + 3 + 6 + 4) / 2
    assert estimate_row_tokens(recipe, "image") == pytest.approx(expected)


def test_time_is_what_such_steps_took_or_unknown(tmp_path):
    plan, store = plan_run(_tiny(), FILES), Store(tmp_path)
    aligned = [step for step in plan.steps.values() if step.kind == "align"]
    for parent in aligned[0].parents.values():
        publish_timed(store, plan.steps[parent], 1.0)
    publish_timed(store, aligned[0], 2.0)
    (tmp_path / "align" / "damaged").mkdir()
    (tmp_path / "align" / "damaged" / "manifest.json").write_text("[]")
    (tmp_path / "align" / "damaged" / "timing.json").write_text("{")
    groups = [(0, list(plan.steps.values()))]
    costs = forecast(plan.recipe, groups, store, dict.fromkeys(MODALITIES, 20.0))
    assert sum(each.step.kind == "align" for each in costs.to_run) == len(aligned) - 1
    assert costs.seconds == 2.0 * (len(aligned) - 1) + 1.0 * 3  # and three more encoders
    assert "fine-tune" in costs.kinds_without_history
    assert "align" not in costs.kinds_without_history


def test_all_problems_come_at_once():
    recipe = _tiny(
        **{
            "modalities.image.encoder": "efficientnet-lite",
            "method": "ties",
            "compose.parameters.ties": {"densty": 0.1},
            "execution.device": "cuda:99",
        }
    )
    files = {name: value for name, value in FILES.items() if name != "video"}
    problems = "\n".join(recipe_problems(recipe, files))
    for words in (
        "modalities.image.encoder", "did you mean 'efficientnet-lite0'",
        "video has no data", "data/video/train.parquet",
        "compose.parameters.ties", "did you mean 'density'",
        "execution.device: cuda:99",
    ):  # fmt: skip
        assert words in problems
    assert recipe_problems(_tiny(), FILES) == []


def test_a_modality_is_not_called_what_torch_calls_a_part_of_models():
    encoder = {"encoder": "efficientnet-lite0", "media": "image"}
    changes = {"order": ["image", "values"], "modalities.values": encoder}
    found = recipe_problems(_tiny(**changes), {**FILES, "values": FILES["image"]})
    assert found == ["modalities.values: torch calls a part of models so; rename it"]


def test_a_device_without_float64_is_refused_for_runs():
    [problem] = recipe_problems(_tiny(**{"execution.device": "mps"}), FILES)
    assert problem.startswith("execution.device: mps has no float64")


@pytest.mark.parametrize(("name", "advised"), [("image", True), ("xray", False)])
def test_only_the_starter_s_modalities_are_rebuilt(name, advised):
    encoder = {"encoder": "efficientnet-lite0", "media": "image"}
    recipe = _tiny(**{"order": [name], f"modalities.{name}": encoder, "data.folder": "mine"})
    [problem] = recipe_problems(recipe, {})
    assert f"{name} has no data: mine/{name}/train.parquet" in problem
    assert ("graftline data build --folder mine --force" in problem) is advised
    assert ("graftline data build" in problem) is advised


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"method": "mera+"}, "method mera+"),
        ({"method": "mera-corrected"}, "method mera-corrected"),
        ({"method": "mera-distilled"}, "method mera-distilled"),
        ({"realign.start": "corrected"}, "realign.start: corrected"),
        ({"method": "realign-only", "realign.start": "corrected"}, "realign.start: corrected"),
        ({"method": "mera-masks", "realign.start": "corrected"}, None),
        ({"method": "mera"}, None),
    ],
)
def test_resamplers_have_no_last_layer_to_correct_or_to_draw_for(changes, cause):
    shape = {"kind": "resampler", "tokens": 2, "hidden": 32, "layers": 1, "heads": 2}
    recipe = _tiny(**{"modalities.audio.connector": shape, **changes})
    problems = recipe_problems(recipe, FILES)
    assert len(problems) == (cause is not None)
    if cause is not None:
        assert problems[0].startswith(f"modalities.audio.connector.kind: resampler: {cause} ")
