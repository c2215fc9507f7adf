"""Which faults are retried, and in which order a plan's steps are submitted."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import pytest
from prefect.settings import PREFECT_HOME, PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from rich.console import Console

from flows.showing import print_report
from graftline.data.build import by_modality
from graftline.durable import StoreUnwritable
from graftline.errors import GraftlineError
from graftline.planning.run import plan_run
from graftline.recipe import ContinualName
from graftline.settings.reading import load_recipe
from graftline.sharing.store import StoreUnreachable
from graftline.store import Store
from tasks.choices import choices_of
from tasks.comparing import reports_of
from tasks.data import inside_dvc
from tasks.models import recipe_named
from tasks.outputs import finished_reports, report_folder, reports_also, usual_order
from tasks.preflight import bytes_needed, check_disk, check_folders
from tasks.steps import TASKS, _task, by_stage, is_passing, unfinished
from tasks.tracking import flat, registered_tags
from tasks.ui import free_port

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "params/tiny.yaml"
MODALITIES = ("image", "audio", "video", "point_cloud")
FILES = {name: dict.fromkeys(("train", "validation", "test"), "0") for name in MODALITIES}


def _plan(method: str):
    return plan_run(load_recipe(TINY, {"method": method}), FILES)


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(errno.EIO, "i/o"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (StoreUnreachable("s3://bucket: no answer"), True),
        (OSError("model.safetensors: was cut off while it was read"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (OSError(errno.ENOMEM, "memory"), False),
        (FileNotFoundError(errno.ENOENT, "absent"), False),
        (MemoryError(), False),
        (GraftlineError("loss is NaN"), False),
        (StoreUnwritable(Path("a"), "full", "free some"), False),
        (ValueError("shape"), False),
    ],
)
def test_only_passing_faults_are_retried(error, passing):
    assert is_passing(error) is passing


@pytest.fixture(scope="module")
def own_prefect(tmp_path_factory):
    home = tmp_path_factory.mktemp("prefect")
    ours = {PREFECT_HOME: home, PREFECT_LOCAL_STORAGE_PATH: home / "storage"}
    with temporary_settings(ours), prefect_test_harness():
        yield


@pytest.mark.usefixtures("own_prefect")
@pytest.mark.parametrize(
    ("number", "times", "tries"), [(errno.EIO, 2, 3), (errno.EIO, 9, 3), (errno.ENOSPC, 1, 1)]
)
def test_a_passing_fault_is_tried_twice_more_and_a_lasting_one_not(number, times, tries):
    tried = []

    def work():
        tried.append(number)
        if len(tried) <= times:
            raise OSError(number, "fault")

    soon = _task("trial", work, "trial").with_options(retry_delay_seconds=0)
    with nullcontext() if times < tries else pytest.raises(OSError, match="fault"):
        soon()
    assert len(tried) == tries


@pytest.mark.parametrize(
    "method",
    get_args(ContinualName),
)
def test_order_holds_every_step_once_and_parents_first(method):
    plan = _plan(method)
    groups = by_stage(plan)
    assert groups[-1][0] == 0  # the experts come last
    seen = set()
    for _, steps in groups:
        for step in steps:
            assert step.kind in TASKS
            assert set(step.parents.values()) <= seen
            seen.add(step.reference)
    needed = {score.reference for score in plan.scores} | set(plan.perplexity.values())
    assert needed <= seen
    assert len(seen) == sum(len(steps) for _, steps in groups)


def test_scores_of_a_stage_come_before_the_next_stage_trains():
    kinds = [(stage, step.kind) for stage, steps in by_stage(_plan("mera")) for step in steps]
    first_of_second = next(i for i, (stage, _) in enumerate(kinds) if stage == 2)
    assert "evaluate" in {kind for _, kind in kinds[:first_of_second]}


def test_disk_estimate(tmp_path, monkeypatch):
    plan = _plan("mera")
    store = Store(tmp_path)
    assert unfinished(plan, store) == list(plan.steps.values())
    assert bytes_needed(plan, store) > 0
    check_disk(plan, store)
    full = type("Usage", (), {"free": 10})()
    monkeypatch.setattr("tasks.preflight.shutil.disk_usage", lambda _: full)
    with pytest.raises(GraftlineError, match="GB"):
        check_disk(plan, store)


def test_every_unwritable_folder_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(TINY)
    report = report_folder(recipe, recipe.order)
    check_folders(recipe, report)
    assert list(tmp_path.iterdir()) == []
    for name in ("artifacts", "reports", "mlruns"):
        (tmp_path / name).write_text("in the way")
    with pytest.raises(GraftlineError) as raised:
        check_folders(recipe, report)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "artifacts", "reports/tiny/mera/seed-0", "mlruns"
    ]  # fmt: skip
    assert all("cannot be written" in line for line in lines)


def test_another_order_has_a_report_of_its_own():
    usual = load_recipe(TINY)
    turned = load_recipe(TINY, {"order": ["audio", "image"]})
    assert report_folder(usual, usual.order) == Path("reports/tiny/mera/seed-0")
    assert report_folder(turned, usual.order) == Path("reports/tiny/mera/order-audio-image/seed-0")
    assert report_folder(turned, turned.order) == report_folder(usual, usual.order)
    assert usual_order(TINY) == usual.order


def test_another_recipe_s_trouble_hides_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()
    for file, text in (("bad", "name: 2024-13-45"), ("worse", "name: [1"), ("good", "name: mine")):
        (tmp_path / f"params/{file}.yaml").write_text(text)
    assert recipe_named("mine") == Path("params/good.yaml")


def test_reports_are_of_seeds_alone_and_a_damaged_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = {"recipe": "tiny", "method": "mera", "seed": 0, "order": ["image"]}
    for name in ("seed-0", "seed-0-before", "seed-x"):
        folder = Path("reports/tiny/mera", name)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics))
    report = Path("reports/tiny/mera/seed-0")
    assert finished_reports("tiny") == [report] == reports_also("tiny")
    places = [(("image",), 0)]
    assert reports_of("tiny", places) == {"mera (tiny)": [report]}
    with pytest.raises(GraftlineError, match="--also tinny: no run .*; did you mean 'tiny'"):
        reports_of("tinny", places)
    (report / "scores.csv").write_text("<<<<<<< HEAD\npoint,stage\n")
    with pytest.raises(GraftlineError, match="seed-0/scores.csv: is not readable"):
        print_report(Console(quiet=True), report)
    (report / "metrics.json").write_text(f"<<<<<<< HEAD\n{json.dumps(metrics)}")
    for read in (
        lambda: print_report(Console(quiet=True), report),
        lambda: reports_of("tiny", places),
        lambda: choices_of([str(TINY)], {}),
    ):
        with pytest.raises(GraftlineError, match="seed-0/metrics.json: is not readable"):
            read()


def test_where_mlflow_cannot_be_asked_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    recipe, away = load_recipe(TINY), f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", away)
    check_folders(recipe, tmp_path / "report")  # what it misses is told later
    with pytest.raises(GraftlineError, match=f"MLFLOW_TRACKING_URI: {away} cannot be asked"):
        registered_tags("tiny", "mera", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "localhost:5000")
    with pytest.raises(GraftlineError, match="MLFLOW_TRACKING_URI: localhost:5000 cannot be asked"):
        registered_tags("tiny", "mera", None)
    with pytest.raises(GraftlineError, match="for a server write http://localhost:5000"):
        check_folders(recipe, tmp_path / "report")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgres://me:sec@ret@lab/mlflow")
    for asked in (
        lambda: registered_tags("tiny", "mera", None),
        lambda: check_folders(recipe, tmp_path / "report"),
    ):
        with pytest.raises(GraftlineError, match="postgres://lab/mlflow") as told:
            asked()
        assert "ret@" not in str(told.value)


def test_checksums_by_modality():
    sums = {"image/train.parquet": "a", "image/test.parquet": "b", "notes.txt": "c"}
    assert by_modality(sums) == {"image": {"train": "a", "test": "b"}}


def test_dvc_is_noticed(monkeypatch):
    for name in ("DVC_STAGE", "DVC_ROOT", "DVC_REPRO"):
        monkeypatch.delenv(name, raising=False)
    assert not inside_dvc()
    monkeypatch.setenv("DVC_STAGE", "mera")
    assert inside_dvc()


def test_flat():
    assert flat({"a": {"b": 1, "c": ["x", "y"]}, "d": None}) == {
        "a.b": "1",
        "a.c": "x,y",
        "d": "None",
    }
