"""The main flow, run by the real command line in working copies of its own."""

from __future__ import annotations

import csv
import json
import shutil
import signal

import pytest

from tests.flows.conftest import PAIR, assert_first_stages_of

pytestmark = pytest.mark.slow

RUNS = "select name, status from runs"


def test_report_is_complete(finished):
    folder = finished.folder / "reports/tiny/mera/seed-0"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"metrics.json", "headline.json", "scores.csv", "scores.png", "stages.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    keys = "brg brg_per_stage frg frg_per_stage retention scores data_md5 fingerprint order seed"
    assert set(keys.split()) <= set(metrics)
    text = (finished.folder / "output.txt").read_text()
    assert "after stage 4" in text
    assert "BRG" in text
    assert "scores.png" in text
    assert "Traceback" not in text
    assert finished.left_over() == []
    assert not list((finished.folder / "artifacts/.runs").iterdir())


def test_mlflow_holds_numbers_and_names(finished):
    runs = finished.mlflow(RUNS)
    assert {status for _, status in runs} == {"FINISHED"}
    assert ("mera seed 0", "FINISHED") in runs
    assert {name for name, _ in runs} >= {"stage 1: image", "stage 4: point_cloud"}
    parent = "(select run_uuid from runs where name = 'mera seed 0')"
    steps = finished.mlflow(
        f"select key, step from metrics where run_uuid = {parent} and key like 'score.image'"
    )
    assert sorted(steps) == [("score.image", step) for step in (1, 2, 3, 4)]
    losses = finished.mlflow("select count(*) from metrics where key = 'loss.align.image'")
    assert losses[0][0] == 4
    [(digest,)] = finished.mlflow("select digest from datasets")
    assert digest == finished.metrics()["data_md5"]
    aliases = finished.mlflow("select name, alias, version from registered_model_aliases")
    assert aliases == [("tiny", "mera", 1)]
    assert finished.mlflow("select count(*) from logged_models")[0][0] == 4


def test_prefect_holds_the_execution(finished):
    assert finished.prefect("select name, state_type from flow_run where name like 'tiny%'") == [
        ("tiny mera seed 0", "COMPLETED")
    ]
    [(flow_run_id,)] = finished.prefect("select id from flow_run where name like 'tiny%'")
    [(linked,)] = finished.mlflow(
        "select value from tags where key = 'prefect_flow_run_id' limit 1"
    )
    assert str(linked).replace("-", "") == str(flow_run_id).replace("-", "")
    [(text,)] = finished.prefect("select data from artifact where key = 'scores-tiny-mera'")
    assert "after stage 4" in str(text)


def test_run_again_reuses_everything(copy):
    before, report = copy.artifacts(), copy.metrics()
    path = copy.folder / "reports/tiny/mera/seed-0/metrics.json"
    content = path.read_bytes()
    code, text = copy.run("run", "params/tiny.yaml")
    assert code == 0, text
    assert copy.artifacts() == before
    assert copy.metrics() == report
    assert path.read_bytes() == content
    assert copy.mlflow("select count(*) from model_versions")[0][0] == 1
    assert copy.left_over() == []


@pytest.mark.usefixtures("one_server")
def test_a_report_that_is_cut_short_while_it_takes_another_s_place_is_none(copy):
    report = copy.folder / "reports/tiny/mera/seed-0"
    (report / "scores.csv").unlink()
    (report / "scores.csv").mkdir()  # in the way of the second file that is written
    other = ("run", "params/tiny.yaml", "--set", "replay.fraction=0.5")
    code, text = copy.run(*other)
    assert code == 1 and "scores.csv" in text
    assert [path.name for path in report.glob("*.png")] == []
    assert not (report / "metrics.json").exists()
    (report / "scores.csv").rmdir()
    code, text = copy.run(*other)
    assert code == 0, text
    assert {"metrics.json", "scores.png", "stages.png"} <= {each.name for each in report.iterdir()}


@pytest.mark.usefixtures("one_server")
def test_methods_share_steps(copy):
    before = copy.artifacts()
    code, text = copy.run("run", "params/tiny.yaml", "--method", "experts")
    assert code == 0, text
    assert copy.artifacts() == before  # every run measures the experts
    code, text = copy.run("show", "params/tiny.yaml", "--method", "experts")
    assert code == 0
    assert "retention" in text


@pytest.mark.usefixtures("one_server")
def test_composition_needs_no_more_training(copy):
    before = set(copy.artifacts())
    for method in ("mmer", "route"):
        code, text = copy.run("run", "params/tiny.yaml", "--method", method)
        assert code == 0, text
        path = copy.folder / f"reports/tiny/{method}/seed-0/metrics.json"
        metrics = json.loads(path.read_text())
        assert set(metrics["scores"]) == {"image", "audio", "video", "point_cloud"}
        assert metrics["brg"] is None
        assert "no stages" in metrics["undefined"]["brg"]
        assert metrics["scores_per_task"]["joint"]["three media"]["n"] == 16
        # theta_0 and what is merged are bf16; the tiny recipe's experts are float32
        stored = 16 + 16 + 4 if method == "mmer" else 16 + 4 * 32
        assert metrics["storage_bits"] == pytest.approx(stored, rel=0.01)
    kinds = [name.split("/")[1] for name in set(copy.artifacts()) - before]
    assert sorted(kinds) == sorted(
        2 * ["compose", *4 * ["evaluate"], "evaluate-joint", "perplexity"]
    )
    code, text = copy.run(
        "run", "params/tiny.yaml", "--method", "route",
        "--set", "compose.rank=4", "--set", "name=tiny-adapters",
    )  # fmt: skip
    assert code == 0, text
    path = copy.folder / "reports/tiny-adapters/route/seed-0/metrics.json"
    # theta_0, and four float32 products of rank 4 beside its small matrices
    assert 16 < json.loads(path.read_text())["storage_bits"] < 48
    records = list(copy.folder.glob("artifacts/compose/*/backbone/merge.json"))
    assert records and all(str(copy.folder) not in record.read_text() for record in records)
    code, text = copy.run("table", "params/tiny.yaml")
    assert code == 0, text
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| m")] == [
        "method", "mera", "mmer"
    ]  # fmt: skip
    code, text = copy.run("table", "params/tiny.yaml", "--composition")
    assert code == 0, text
    assert "| mera |" not in text
    folder = copy.folder / "reports/tiny/compose"
    assert (folder / "table.md").read_text().strip() == text.strip()
    rows = csv.DictReader((folder / "table.csv").read_text().splitlines())
    assert [row["method"] for row in rows] == ["mmer", "route"]
    assert (folder / "storage.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_server")
def test_a_search_looks_at_validation_rows_alone(copy):
    before = set(copy.artifacts())
    wanted = ("search", "params/tiny.yaml", "--rule", "task-arithmetic")
    code, text = copy.run(*wanted, "--budget")
    assert code == 0, text
    assert "6 runs" in text and "6 compose" in text
    assert set(copy.artifacts()) == before
    code, text = copy.run(*wanted, seconds=400)
    assert code == 0, text
    assert "6 compose" in text  # said before it starts
    assert "in the recipe: compose: {parameters: {task-arithmetic:" in text
    record = json.loads(
        (copy.folder / "reports/tiny/search/task-arithmetic-seed-0.json").read_text()
    )
    assert record["chosen"] in [trial["parameters"] for trial in record["trials"]]
    assert len({trial["fingerprint"] for trial in record["trials"]}) == 6  # each its own run's
    added = set(copy.artifacts()) - before
    assert sum("/compose/" in name for name in added) == record["budget"] == 6
    for name in added:
        manifest = json.loads((copy.folder / name / "manifest.json").read_text())
        assert manifest["parameters"].get("split", "validation") == "validation"


@pytest.mark.usefixtures("one_server")
def test_a_rival_runs_on_the_stages_of_others(copy):
    before = set(copy.artifacts())
    rival = ["run", "params/tiny.yaml", "--method", "ewc", *PAIR]
    code, text = copy.run(*rival, "--set", "name=tiny-rival")
    assert code == 0, text
    kinds = [name.split("/")[1] for name in set(copy.artifacts()) - before]
    assert sorted(kinds) == [
        *2 * ["evaluate"], "evaluate-joint", "fisher", "guarded-fine-tune", "perplexity"
    ]  # fmt: skip
    losses = copy.mlflow("select count(*) from metrics where key = 'loss.guarded-fine-tune.audio'")
    assert losses[0][0] == 6
    report, path = copy.folder / "reports", "ewc/order-image-audio/seed-0/metrics.json"
    metrics = json.loads((report / "tiny-rival" / path).read_text())
    assert set(metrics["scores_vanilla"]) == set(metrics["scores_expert"]) == {"image", "audio"}
    code, text = copy.run(*rival, "--set", "name=tiny-s", "--set", "evaluation.references=false")
    assert code == 0, text
    alone = json.loads((report / "tiny-s" / path).read_text())
    assert alone["scores"] == metrics["scores"]
    assert alone["undefined"]["retention"] == "no expert was scored"
    assert alone["undefined"]["frg_mean"] == "no vanilla model was scored"


def test_killed_run_goes_on(fresh, finished):
    process = fresh.start("run", "params/tiny.yaml", *PAIR)
    fresh.wait_for_artifacts(9, process)
    process.kill()
    process.communicate()
    done = fresh.artifacts()
    assert fresh.left_over() == []
    killed = "select count(*) from runs where status = 'RUNNING'"
    assert fresh.mlflow(killed)[0][0] >= 1
    code, text = fresh.run("run", "params/tiny.yaml", *PAIR)
    assert code == 0, text
    assert_first_stages_of(finished, fresh)
    after = fresh.artifacts()
    assert {name: after[name] for name in done} == done
    assert fresh.mlflow(killed)[0][0] == 0
    assert fresh.mlflow("select count(*) from runs where status = 'KILLED'")[0][0] >= 1
    states = fresh.prefect("select state_type from flow_run where name like 'tiny%'")
    assert sorted(state for (state,) in states) == ["COMPLETED", "COMPLETED", "CRASHED"]
    assert fresh.left_over() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_honestly(fresh, number):
    process = fresh.start("run", "params/tiny.yaml")
    fresh.wait_for_artifacts(3, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=40)
    assert process.returncode == 128 + number, text
    assert "the same command goes on" in text
    assert "Traceback" not in text
    assert ("mera seed 0", "KILLED") in fresh.mlflow(RUNS)
    assert fresh.mlflow("select count(*) from runs where status = 'RUNNING'")[0][0] == 0
    assert fresh.left_over() == []


@pytest.mark.usefixtures("one_server")
@pytest.mark.parametrize("command", [("run",), ("compare", "--methods", "mera,finetune")])
def test_what_stands_against_a_run_is_told_before_data_are_built(fresh, command):
    shutil.rmtree(fresh.folder / "data")
    backbone = ("--set", "backbone.source={folder: absent}")
    code, text = fresh.run(command[0], "params/tiny.yaml", *command[1:], *backbone)
    assert code == 1
    assert "backbone.source: absent" in text and "Traceback" not in text
    assert not (fresh.folder / "data").exists()


@pytest.mark.usefixtures("one_server")
def test_a_concurrency_limit_that_nobody_made_is_named_before_anything_is_computed(
    fresh, monkeypatch
):
    monkeypatch.setenv("GRAFTLINE_CONCURRENCY_LIMIT", "absent")
    code, text = fresh.run("run", "params/tiny.yaml")
    assert code == 1
    assert "knows no concurrency limit absent" in text and "Traceback" not in text
    assert fresh.artifacts() == {}


@pytest.mark.usefixtures("one_server")
def test_bad_data_stops_before_training(fresh):
    path = fresh.folder / "data/audio/test.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    code, text = fresh.run("run", "params/tiny.yaml")
    assert code == 1
    assert "audio/test.parquet" in text.replace("\n", "")
    assert "Traceback" not in text
    assert fresh.artifacts() == {}
