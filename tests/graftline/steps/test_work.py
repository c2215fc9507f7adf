"""How long a realigning step trains, and what a merge may change."""

from __future__ import annotations

import shutil
import weakref
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.data.examples import ROWS
from graftline.errors import GraftlineError
from graftline.planning.run import plan_run
from graftline.settings.reading import load_recipe
from graftline.steps import execution, realigning
from graftline.steps.execution import RUNNERS, execute
from graftline.steps.work import Machine, Work, realign_settings, set_pieces
from graftline.store import Artifact, Store
from graftline.training import elastic, optimizer

TINY = Path(__file__).resolve().parents[3] / "params/tiny.yaml"
FILES = {name: dict.fromkeys(("train", "validation", "test"), "0") for name in ("image", "audio")}


def _work(folder: Path, **changes: object) -> Work:
    """A realigning of 80 steps of 8 rows, beside 320 training rows of which a share was kept."""
    given = {"realign.steps": 80, "realign.batch_size": 8, "replay.fraction": 0.1}
    changes = {**given, "order": ["image", "audio"], **changes}
    plan = plan_run(load_recipe(TINY, changes), FILES)
    step = next(each for each in plan.steps.values() if each.kind == "realign")
    modality = step.parameters["modality"]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(320)}), folder / "train" / ROWS)
    features = Artifact("features", "0" * 64, folder)
    return Work(step, {f"features.{modality}": features}, Machine(folder), folder, folder)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 80),
        ({"realign.passes": 2}, 8),  # 32 rows are four batches
        ({"realign.passes": 0.5}, 2),
        ({"realign.passes": 0.1}, 1),
        ({"realign.passes": 1000}, 80),
        ({"realign.passes": 2, "replay.fraction": 1.0}, 80),
        ({"realign.passes": 2, "replay.fraction": 0.001}, 2),  # one row, a batch of its own
    ],
)
def test_few_rows_are_not_seen_again_and_again(
    tmp_path: Path, changes: dict[str, object], steps: int
) -> None:
    assert realign_settings(_work(tmp_path, **changes)).steps == steps


def test_a_recipe_that_sets_no_passes_has_the_steps_it_had(tmp_path: Path) -> None:
    assert "passes" not in _work(tmp_path).step.parameters
    assert _work(tmp_path, **{"realign.passes": 2}).step.parameters["passes"] == 2


@pytest.mark.parametrize("method", ["mera", "mera with a coefficient"])
def test_a_merge_that_changes_what_was_not_trained_is_not_published(
    method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"order": ["image", "audio"]}
    if method != "mera":
        changes["merge.coefficient"] = 0.3
    plan = plan_run(load_recipe(TINY, changes), FILES)
    step = next(each for each in plan.steps.values() if each.kind.endswith("merge"))
    parents = {}
    for role in ("previous", "vanilla"):
        folder = tmp_path / role
        shutil.copytree(tiny_folder, folder / "backbone")
        parents[role] = Artifact("fine-tune", role, folder)
    weights = tmp_path / "vanilla/backbone/model.safetensors"
    content = load_file(weights)
    content["model.norm.weight"] += 1.0
    save_file(content, weights, metadata={"format": "pt"})
    RUNNERS[step.kind](Work(step, parents, Machine(tmp_path), tmp_path, tmp_path / "good"))

    def careless(*given: object) -> object:
        made = carry_out(*given)
        merged = tmp_path / "bad/backbone/model.safetensors"
        content = load_file(merged)
        content["model.embed_tokens.weight"][0, 0] += 1.0
        save_file(content, merged, metadata={"format": "pt"})
        return made

    module, name = (
        (execution, "merge_backbones") if method == "mera" else (realigning, "merge_weighted")
    )
    carry_out = getattr(module, name)
    monkeypatch.setattr(module, name, careless)
    (tmp_path / "bad").mkdir()
    with pytest.raises(GraftlineError, match=r"changed model.embed_tokens.weight \(1 such\)"):
        RUNNERS[step.kind](Work(step, parents, Machine(tmp_path), tmp_path, tmp_path / "bad"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_leaves_no_memory_of_a_gpu_taken(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    given_back = []

    def compute(work: Work) -> None:
        layer = torch.nn.Linear(2, 2)
        layer.register_forward_hook(layer.forward)  # a cycle, as of a routed model
        held.append(weakref.ref(layer.weight))
        del layer
        if fails:
            raise GraftlineError("no")
        (work.out / "backbone").mkdir()
        (work.out / "backbone/config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setitem(RUNNERS, "backbone", compute)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(held[-1]() is None))
    plan = plan_run(load_recipe(TINY, {"order": ["image", "audio"]}), FILES)
    step = next(each for each in plan.steps.values() if each.kind == "backbone")
    with pytest.raises(GraftlineError, match="no") if fails else nullcontext():
        execute(step, Store(tmp_path), Machine(tmp_path, "cpu"))
    assert given_back == [True]


def test_a_device_without_memory_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(work: Work) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setitem(RUNNERS, "backbone", compute)
    plan = plan_run(load_recipe(TINY, {"order": ["image", "audio"]}), FILES)
    step = next(each for each in plan.steps.values() if each.kind == "backbone")
    with pytest.raises(GraftlineError, match=r"no memory left. Take execution.slots: 1"):
        execute(step, Store(tmp_path), Machine(tmp_path, "cpu"))


def test_a_step_trains_in_pieces_that_suit_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_a_cache = optimizer.PIECE
    for module in (optimizer, elastic):
        monkeypatch.setattr(module, "PIECE", module.PIECE)  # as it was, afterwards
    set_pieces("cuda:1")
    assert optimizer.PIECE == elastic.PIECE > 100 * fit_a_cache
    plan = plan_run(load_recipe(TINY, {"order": ["image", "audio"]}), FILES)
    step = next(each for each in plan.steps.values() if each.kind == "backbone")
    execute(step, Store(tmp_path), Machine(tmp_path, "cpu"))
    assert optimizer.PIECE == elastic.PIECE == fit_a_cache
