"""Reports on disk, tables over seeds, and pictures."""

from __future__ import annotations

import csv
import dataclasses
import json
import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from graftline.evaluation import EvaluationError
from graftline.evaluation.bootstrap import Interval
from graftline.evaluation.cells import JOINT, Point, ScoreCell
from graftline.evaluation.comparison import compare_runs
from graftline.evaluation.pictures import (
    retention_against_storage,
    score_matrix,
    scores_over_stages,
)
from graftline.evaluation.report import (
    CSV_COLUMNS,
    RunScores,
    place_scores,
    read_report,
    split_scores,
    write_report,
)
from graftline.evaluation.style import look
from graftline.evaluation.table import csv_table, label_of, markdown_table, summarise_runs

ORDER = ("image", "audio", "point_cloud")
METRIC = {"question": "exact_match", "caption": "cider_d_over_10"}


def make_run(seed: int = 0, method: str = "mera", level: float = 0.8, n: int = 30) -> RunScores:
    generator = np.random.default_rng(seed)

    def cells(stage: int, modality: str, point: Point) -> list[ScoreCell]:
        added = modality if stage == 0 else ORDER[stage - 1]
        hits = generator.random(n) < level
        by_task = {"question": hits.astype(float), "caption": generator.random(n)}
        return [
            ScoreCell(stage, added, modality, task, point, METRIC[task], tuple(map(float, scores)))
            for task, scores in by_task.items()
        ]

    found: list[ScoreCell] = []
    for stage, added in enumerate(ORDER, start=1):
        found += cells(stage, added, "vanilla")
        found += cells(stage, added, "merged")
        for modality in ORDER[:stage]:
            found += cells(stage, modality, "final")
        found += cells(0, added, "expert")
    return RunScores(
        "tiny",
        method,
        seed,
        ORDER,
        tuple(found),
        12.5,
        11.0,
        1.5,
        10**9,
        "abc",
        "f0",
        20.0,
        21.5,
        16.0,
        step_seconds={"align/a": 1.25, "evaluate/e": 0.5},
        settings="s0",
    )


def test_metrics_and_scores(tmp_path: Path) -> None:
    run = make_run()
    write_report(tmp_path / "r", run, replicates=200)
    text = (tmp_path / "r" / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    wanted = (
        "brg brg_mean brg_per_stage frg frg_mean frg_per_stage retention scores wall_seconds "
        "peak_rss_bytes data_md5 fingerprint order seed text_perplexity_before "
        "text_perplexity_after intervals n"
    )
    assert set(wanted.split()) <= set(metrics)
    stages, vanilla, experts = split_scores(place_scores(run), ORDER)
    assert vanilla is not None
    assert experts is not None
    expected = 50 * sum(stages[3][m] / stages[j][m] for j, m in ((1, "image"), (2, "audio")))
    assert metrics["brg"] == pytest.approx(expected)
    assert metrics["retention"] == pytest.approx(
        100 / 3 * sum(stages[3][m] / experts[m] for m in ORDER)
    )
    assert metrics["frg_per_stage"]["2"] == pytest.approx(
        100 * stages[2]["audio"] / vanilla["audio"]
    )
    assert metrics["scores"] == pytest.approx(stages[3])
    assert metrics["n"] == dict.fromkeys(ORDER, 60)
    assert metrics["undefined"] == {}
    for name in ("brg", "brg_mean", "frg_mean", "retention", "scores.image"):
        each = metrics["intervals"][name]
        assert each["low"] <= each["estimate"] <= each["high"]
        assert (each["n_examples"], each["n_seeds"]) == (180, 1)
    assert metrics["intervals"]["brg"]["estimate"] == pytest.approx(metrics["brg"])
    with (tmp_path / "r" / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == len(run.cells)
    assert {row["point"] for row in rows} == {"vanilla", "merged", "final", "expert"}
    assert all(row["n"] == "30" for row in rows)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "examples.csv",
        "headline.json",
        "metrics.json",
        "scores.csv",
    ]
    headline = json.loads((tmp_path / "r" / "headline.json").read_text())
    assert headline["brg"] == metrics["brg"] and headline["scores"] == metrics["scores"]


def test_a_report_reads_back_exactly_and_writes_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(3)
    write_report(tmp_path / "a", run, 100)
    assert read_report(tmp_path / "a") == run
    write_report(tmp_path / "b", read_report(tmp_path / "a"), 100)
    for name in ("metrics.json", "scores.csv", "examples.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_large_test_set_reads_back(tmp_path: Path) -> None:
    run = make_run(n=8000)
    write_report(tmp_path, run, 2)
    assert read_report(tmp_path) == run


def test_undefined_gains_are_null_with_a_reason(tmp_path: Path) -> None:
    run = make_run()
    zeroed = tuple(
        dataclasses.replace(c, examples=(0.0,) * c.n)
        if (c.point, c.stage, c.modality) == ("final", 1, "image")
        else c
        for c in run.cells
    )
    metrics = write_report(tmp_path, dataclasses.replace(run, cells=zeroed), 50)
    assert metrics["brg"] is None
    assert "image after stage 1 is zero" in metrics["undefined"]["brg"]
    assert metrics["intervals"]["brg"]["estimate"] is None
    joint = tuple(c for c in run.cells if c.point == "expert" or (c.point, c.stage) == ("final", 3))
    metrics = write_report(tmp_path, dataclasses.replace(run, cells=joint), 50)
    assert metrics["brg"] is None
    assert metrics["retention"] is not None
    assert "no stages" in metrics["undefined"]["frg_mean"]


def test_bad_input_is_named(tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(EvaluationError, match="NaN"):
        write_report(tmp_path / "x", dataclasses.replace(run, wall_seconds=float("nan")), 10)
    assert not (tmp_path / "x").exists()
    short = tuple(c for c in run.cells if (c.point, c.stage, c.modality) != ("final", 3, "audio"))
    with pytest.raises(EvaluationError, match="no final score after stage 3 of audio"):
        write_report(tmp_path / "x", dataclasses.replace(run, cells=short), 10)
    with pytest.raises(EvaluationError, match="scored twice"):
        dataclasses.replace(run, cells=(*run.cells, run.cells[0]))
    with pytest.raises(EvaluationError, match="finite"):
        dataclasses.replace(run.cells[0], examples=(float("inf"),))
    with pytest.raises(EvaluationError, match="no readable report"):
        read_report(tmp_path / "absent")


def test_table_over_seeds(tmp_path: Path) -> None:
    folders = []
    for method, level in (("mera", 0.9), ("finetune", 0.5)):
        for seed in range(3):
            folders.append(tmp_path / method / f"seed-{seed}")
            write_report(folders[-1], make_run(seed, method, level), 20)
    rows = summarise_runs(folders, replicates=300)
    assert [(row.method, row.seeds) for row in rows] == [
        ("mera", (0, 1, 2)),
        ("finetune", (0, 1, 2)),
    ]
    singles = [json.loads((f / "metrics.json").read_text())["brg"] for f in folders[:3]]
    assert rows[0].intervals["brg"].estimate == pytest.approx(sum(singles) / 3)
    assert (rows[0].intervals["brg"].n_seeds, rows[0].n_examples) == (3, 180)
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "point cloud" in lines[0]
    assert "0, 1, 2" in lines[2]
    assert "| 16.0 | 1.5 |" in lines[2]
    [headings, *fields] = list(csv.reader(csv_table(rows).splitlines()))
    assert [line.count("|") for line in lines] == [len(headings) + 1] * 4
    assert [line[0] for line in fields] == ["mera", "finetune"]
    assert label_of(dataclasses.replace(rows[0], recipe="other"), "tiny") == "mera (other)"
    with pytest.raises(EvaluationError, match="comes twice"):
        summarise_runs([folders[0], folders[0]])
    write_report(folders[1], dataclasses.replace(make_run(1), data_md5="other"), 20)
    with pytest.raises(EvaluationError, match="different data"):
        summarise_runs(folders[:2])


def test_no_mean_is_taken_over_runs_of_different_settings(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "old")]
    write_report(folders[0], make_run(seed=0), replicates=50)
    others = [dataclasses.replace(make_run(seed=1), settings="s1")]
    others.append(dataclasses.replace(make_run(seed=2), settings=None))  # of an older version
    for folder, run in zip(folders[1:], others, strict=True):
        write_report(folder, run, replicates=50)
    assert summarise_runs([folders[0], folders[2]], replicates=50)[0].seeds == (0, 2)
    with pytest.raises(EvaluationError, match=r"seeds 0, 1\) were made with different settings"):
        summarise_runs(folders, replicates=50)
    with pytest.raises(EvaluationError, match="different settings"):
        compare_runs({"mera": [read_report(folder) for folder in folders[:2]]}, None)


def test_joint_questions_stand_beside_the_gains(tmp_path: Path) -> None:
    run = make_run()
    hits = tuple(float(n % 4 == 0) for n in range(40))
    cell = ScoreCell(3, ORDER[2], JOINT, "two media", "final", "exact_match", hits)
    asked = dataclasses.replace(run, cells=(*run.cells, cell))
    plain = write_report(tmp_path / "plain", run, 50)
    metrics = write_report(tmp_path / "asked", asked, 50)
    assert plain["joint"] is None
    assert metrics["joint"] == 0.25
    assert metrics["scores_per_task"]["joint"]["two media"]["n"] == 40
    assert metrics["intervals"]["joint"]["n_examples"] == 40
    for name, interval in plain["intervals"].items():  # gains are of modalities alone
        assert metrics["intervals"][name] == interval
    assert read_report(tmp_path / "asked") == asked


def test_retention_is_drawn_over_storage(tmp_path: Path) -> None:
    points = [
        ("mmer", 36.0, Interval(98.0, 96.5, 99.5, 1600, 3, 0.0)),
        ("emr", 36.0, Interval(97.0, 95.0, 98.0, 1600, 3, 0.0)),
        ("average", 16.0, Interval(70.0, None, None, 1600, 1, 0.0)),
    ]
    for name in "ab":
        retention_against_storage(tmp_path / f"{name}.png", points, "tiny")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(EvaluationError, match="nothing to draw"):
        retention_against_storage(tmp_path / "c.png", [])


def test_pictures_are_deterministic_and_leave_no_state(tmp_path: Path) -> None:
    stages, vanilla, experts = split_scores(place_scores(make_run()), ORDER)
    before = dict(matplotlib.rcParams)
    for draw in (score_matrix, scores_over_stages):
        a, b = tmp_path / "a.png", tmp_path / "b.png"
        draw(a, ORDER, stages, vanilla=vanilla, experts=experts, title="mera")
        draw(b, ORDER, stages, vanilla=vanilla, experts=experts, title="mera")
        content = a.read_bytes()
        assert content == b.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">I", content[16:20]) == (1200,)
        assert b"Software" not in content
        draw(b, ORDER, {3: stages[3]})
        draw(b, ["image"], {1: {"image": 0.0}})
        with pytest.raises(EvaluationError, match="empty"):
            draw(b, [], {})
    assert dict(matplotlib.rcParams) == before


def test_no_two_of_forty_nine_look_the_same():
    """A comparison has more methods than there are colours that everybody can tell apart."""
    assert len({look(number) for number in range(49)}) == 49
    colours, markers = zip(*(look(number) for number in range(7)), strict=True)
    assert len(set(colours)) == len(set(markers)) == 7  # colour is never the only difference
