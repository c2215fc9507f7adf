"""One step trained by two processes: it learns what one learns, and fails as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from graftline.errors import GraftlineError
from graftline.model.backbone import load_backbone
from graftline.model.loading import assemble, new_connector
from graftline.model.multimodal import collate
from graftline.model.prompts import MediaSlot
from graftline.planning.plan import Reference, Step
from graftline.planning.run import RunPlan, plan_run
from graftline.settings.reading import load_recipe
from graftline.steps.execution import execute
from graftline.steps.together import carried_out_together, check_processes
from graftline.steps.work import Machine
from graftline.store import Store
from graftline.team import Team, joined
from graftline.training.optimizer import ParameterGroup
from graftline.training.sharding import ShardedAdamW
from tests.graftline.made_up import SPLITS, TINY, filled_store, planned, point_clouds

SETTINGS = {
    "order": ["image", "audio"], "evaluation.references": False, "precision": "float32",
    "align.steps": 3, "fine_tune.steps": 4, "realign.steps": 3, "realign.batch_size": 5,
}  # fmt: skip
IN_BFLOAT16 = {"fine_tune.mode": "lora", "precision": "bfloat16"}
# method, kind of step, whether in shares, changes
CASES: dict[str, tuple[str, str, bool, dict[str, object]]] = {
    "fine-tuning": ("mera", "fine-tune", False, {}),
    "fine-tuning-in-shares": ("mera", "fine-tune", True, {"fine_tune.train_embeddings": True}),
    "adapters-in-shares": ("mera", "fine-tune", True, IN_BFLOAT16),
    "realigning-in-shares": ("mera", "realign", True, {}),
    **{
        f"against-forgetting-{name}": (name, "guarded-fine-tune", False, {})
        for name in ("replay", "lwf", "ewc", "der", "o-lora", "attention-only")
    },
    "distilling": ("mera-distilled", "distil", False, {"fine_tune.learning_rate": 3e-2}),
    "in-shares-where-none-can-be": ("lwf", "guarded-fine-tune", True, {}),
}


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs are here"),
        ],
    ),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_learn_what_one_learns(
    device: str, case: str, tmp_path: Path, tiny_folder: Path, features_folder: Path
) -> None:
    method, kind, shard, changes = CASES[case]
    run = planned(method, **{**SETTINGS, **changes})
    step = [each for each in run.steps.values() if each.kind == kind][-1]
    inputs, machine = (tiny_folder, features_folder), Machine(tmp_path, device)
    alone, both = (
        execute(step, _prepared(run, step, tmp_path / str(processes), inputs), machine).folder
        for processes, machine in enumerate(
            (machine, replace(machine, processes=2, shard=shard)), start=1
        )
    )
    history, expected = (json.loads((each / "history.json").read_text()) for each in (both, alone))
    close = 3e-2 if "bfloat16" in changes.values() else 1e-4
    assert history["losses"] == pytest.approx(expected["losses"], rel=close, abs=1e-6)
    assert history["norms"] == pytest.approx(expected["norms"], rel=10 * close, abs=1e-5)
    assert history["tokens"] == expected["tokens"], "every row is seen once"
    for file in sorted(alone.rglob("*.safetensors")):
        wanted, found = load_file(file), load_file(both / file.relative_to(alone))
        assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in wanted.items()}
        apart, size = _norm([found[n].double() - wanted[n] for n in wanted]), _norm(wanted.values())
        assert float(apart / size) < close, file.name


def test_two_processes_answer_as_one_does(
    tmp_path: Path, tiny_folder: Path, features_folder: Path
) -> None:
    learned = {"fine_tune.steps": 60, "fine_tune.learning_rate": 3e-3}  # enough to say something
    run = planned("finetune", **{**SETTINGS, **learned, "evaluation.batch_size": 3})
    step = [each for each in run.steps.values() if each.kind == "evaluate"][-1]
    inputs = (tiny_folder, features_folder)
    tables = []
    for processes in (1, 2):
        store = _prepared(run, step, tmp_path / str(processes), inputs)
        folder = execute(step, store, Machine(tmp_path, "cpu", processes=processes)).folder
        tables.append(pq.read_table(folder / "answers.parquet"))
    assert tables[0].equals(tables[1]) and len(tables[0]) >= 16
    assert any(tables[0]["answer"].to_pylist()), "something was said"


def test_media_reach_a_connector_as_they_are_beside_a_backbone_in_shares(
    tiny_folder: Path, tmp_path: Path
) -> None:
    backbone, tokenizer = load_backbone(tiny_folder, torch.bfloat16, "eager")
    shape = {"tokens": 2, "hidden": 4}
    record, connector = new_connector("image", backbone, torch.randn(6, 3, 8), shape, 0, "base")
    loaded = assemble((backbone, tokenizer), [(record, connector)], "")
    seen = []
    connector.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    prompt = loaded.prompts.encode([MediaSlot("image"), "What?"], "red")
    batch = collate([prompt], [[torch.randn(3, 8)]], loaded.prompts.pad_id)
    group = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=group, rank=0, world_size=1)
    try:
        with joined(Team(0, 1, True)):
            weights = [p for p in backbone.parameters() if p.dim() > 1]
            groups = [
                ParameterGroup("backbone", weights, 1e-3),
                ParameterGroup("connector", list(connector.parameters()), 1e-3),
            ]
            optimizer = ShardedAdamW(loaded.model, groups, 0.0, 1.0, torch.device("cpu"))
            loss = loaded.model(batch)
            loss.backward()
            assert seen == [torch.float32] and optimizer.step(1.0) > 0
            optimizer.gather()
    finally:
        torch.distributed.destroy_process_group()
    assert {p.dtype for p in loaded.model.backbone.parameters()} == {torch.bfloat16}


def test_two_processes_encode_what_one_encodes(tmp_path: Path) -> None:
    files = point_clouds(tmp_path / "data")
    recipe = load_recipe(TINY, {"order": ["point_cloud"], "data.rows": None})
    run = plan_run(recipe, {"point_cloud": files})
    step = next(each for each in run.steps.values() if each.kind == "features")
    for processes in (1, 2):
        machine = Machine(tmp_path / "data", "cpu", processes=processes)
        execute(step, Store(tmp_path / str(processes)), machine)
    alone, both = (
        Store(tmp_path / name).find(step.kind, step.reference.fingerprint) for name in ("1", "2")
    )
    assert alone and both
    for split in SPLITS:
        for name in ("features.safetensors", "rows.json", "rows.parquet"):
            file = Path(split) / name
            assert (alone.folder / file).read_bytes() == (both.folder / file).read_bytes(), file
    assert {file.name for file in (both.folder / "train").iterdir()} == {
        "features.safetensors", "rows.json", "rows.parquet"
    }  # fmt: skip


def _norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


def _losses(folder: Path) -> list[float]:
    return json.loads((folder / "history.json").read_text())["losses"]


def _fine_tuning(run: RunPlan) -> Step:
    return next(step for step in run.steps.values() if step.kind == "fine-tune")


def _prepared(run: RunPlan, step: Step, root: Path, inputs: tuple[Path, Path]) -> Store:
    """A store that holds all that a step needs, computed by one process."""
    store = filled_store(root, run, *inputs)

    def need(reference: Reference) -> None:
        for parent in run.steps[reference].parents.values():
            need(parent)
        execute(run.steps[reference], store, Machine(root, "cpu"))

    for parent in step.parents.values():
        need(parent)
    return store


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "in-shares"])
def test_a_killed_process_ends_the_step_which_goes_on_from_its_checkpoint(
    shard: bool, tmp_path: Path, tiny_folder: Path, features_folder: Path
) -> None:
    changes = {"fine_tune.steps": 60, "fine_tune.checkpoint_every": 2}
    run = planned("finetune", **{**SETTINGS, **changes})
    step, inputs = _fine_tuning(run), (tiny_folder, features_folder)
    machine = Machine(tmp_path, "cpu", processes=2, shard=shard)
    alone = machine if shard else Machine(tmp_path, "cpu")
    undisturbed = execute(step, _prepared(run, step, tmp_path / "1", inputs), alone)
    store = _prepared(run, step, tmp_path / "2", inputs)
    work = store.work_folder(step.kind, step.reference.fingerprint)

    def kill_one() -> None:
        while not list(work.rglob("checkpoint-*[0-9]/record.json")):
            time.sleep(0.01)
        os.kill(max(_members()), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(GraftlineError, match=r"process \d of 2"):
        execute(step, store, machine)
    killer.join()
    assert not _members() and not store.holds(step.kind, step.reference.fingerprint)
    assert list(work.rglob("checkpoint-*")), "what was learned is kept"
    if shard:  # one of them was ahead when the other died
        newest = max((work / "share-1-of-2").glob("checkpoint-*"))
        shutil.copytree(newest, newest.with_name("checkpoint-00000058"))
    again = execute(step, store, machine)
    close = 0.0 if shard else 1e-3  # the same processes give the same bits
    assert _losses(again.folder) == pytest.approx(_losses(undisturbed.folder), rel=close, abs=0)


def _members() -> list[int]:
    """Processes of this test's team."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    lines = [line.split() for line in listed.stdout.splitlines()]
    return [int(line[0]) for line in lines if "graftline.steps.together" in line]


def test_what_stops_one_process_is_said_once_and_names_the_step(
    tmp_path: Path, tiny_folder: Path, features_folder: Path
) -> None:
    run = planned("finetune", **{**SETTINGS, "fine_tune.learning_rate": 1e38})
    machine = Machine(tmp_path, "cpu", processes=2)
    store = _prepared(run, _fine_tuning(run), tmp_path / "1", (tiny_folder, features_folder))
    with pytest.raises(GraftlineError, match=r"process \d of 2: .* has loss .* training stopped"):
        execute(_fine_tuning(run), store, machine)
    assert not _members()


def test_machines_that_cannot_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_processes(Machine(tmp_path, "cpu", processes=3))
    check_processes(Machine(tmp_path, "mps"))
    for device in ("mps", "cuda:1", "cpu:0"):
        with pytest.raises(GraftlineError, match=r"execution\.device is"):
            check_processes(Machine(tmp_path, device, processes=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(GraftlineError, match=r"has 1 GPU\(s\)"):
        check_processes(Machine(tmp_path, "cuda", processes=2))


def test_what_is_shared() -> None:
    methods = ("mera", "ewc", "mera-distilled")
    kinds = {step.kind for name in methods for step in planned(name, **SETTINGS).steps.values()}
    both = Machine(Path(), "cpu", processes=2)
    alone = {"backbone", "merge", "perplexity", "fisher", "statistics"}
    assert {kind for kind in kinds if not carried_out_together(kind, both)} == alone
    in_shares = replace(both, shard=True)
    unshared = {kind for kind in kinds if not carried_out_together(kind, in_shares)}
    assert unshared == alone | {"guarded-fine-tune", "distil"}
    assert not any(carried_out_together(kind, Machine(Path(), "cpu")) for kind in kinds)
