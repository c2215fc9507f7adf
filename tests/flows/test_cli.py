"""The command line's words and exit codes, where nothing is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from graftline.data.build import directory_md5
from graftline.errors import GraftlineError
from tasks.data import build_data, record_version

ROOT = Path(__file__).resolve().parents[2]


def _graftline(*arguments: str, folder: Path = ROOT) -> tuple[int, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_help_is_complete_and_loads_nothing_heavy():
    heavy = "torch", "transformers", "prefect", "mlflow", "matplotlib"
    code = f"import sys, flows.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    code, text = _graftline("--help")
    assert code == 0
    assert all(word in text for word in ("run", "show", "data", "ui"))
    _, text = _graftline("run", "--help")
    assert all(word in text for word in ("--method", "--seed", "--set", "--verbose"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run"], 2, ["Missing argument"]),
        (["rum"], 2, ["No such command"]),
        (["run", "params/tiny.yaml", "--metod", "mera"], 2, ["--method"]),
        (["run", "params/tiny.yaml", "--method", "merra"], 1, ["did you mean 'mera'"]),
        (["run", "params/tinny.yaml"], 1, ["no such recipe", "params/tiny.yaml"]),
        (["run", "params/tiny.yaml", "--set", "replay.fracton=1"], 1, ["did you mean 'fraction'"]),
        (["run", "params/tiny.yaml", "--set", "seed"], 1, ["key=value"]),
        (["run", "params/tiny.yaml", "--set", "align.steps=0"], 1, ["align.steps"]),
        (
            ["compare", "params/tiny.yaml", "--methods", "merra", "--seeds", "x"],
            1,
            ["2 problem(s)", "did you mean 'mera'", "'x'"],
        ),
        (["table", "params/tiny.yaml", "--also", "strater"], 1, ["did you mean 'starter'"]),
        (["ui", "--mlflow-port", "70000"], 1, ["port 70000 cannot be used", "--mlflow-port"]),
        (
            ["merge", "--rule=ties", "--base=b", "--expert=e", "--out=o", "--shard-gigabytes=nan"],
            1,
            ["--shard-gigabytes nan: give a number"],
        ),
        (["ask", "params/tiny.yaml", "Eh?", "--device", "gpu"], 1, ["--device: gpu cannot be"]),
        (["chat", "params/tiny.yaml", "--device", "cuda:99"], 1, ["auto takes what is here"]),
        (["app", "params/tiny.yaml", "--device", "gpu"], 1, ["--device: gpu cannot be used"]),
        (
            ["drift", "params/tiny.yaml", "--set", "execution.device=gpu"],
            1,
            ["execution.device: gpu cannot be used here"],
        ),
    ],
)
def test_mistakes_are_named(arguments, code, words):
    found, text = _graftline(*arguments)
    assert found == code
    assert all(word in text for word in words), text
    assert "Traceback" not in text


def test_init_names_the_option_that_is_wrong(tmp_path):
    (tmp_path / "params").mkdir()
    for words, said in (
        (["--force", "--out", "params"], "params: is a folder"),
        (["--out", "params"], "params: is a folder"),
        (["--source", "photo=my/photos"], "--source: photo not among --modalities"),
    ):
        code, text = _graftline("init", *words, folder=tmp_path)
        assert code == 1
        assert said in text and "Traceback" not in text, text


def test_show_without_report_says_what_to_run(tmp_path):
    recipe = str(ROOT / "params/tiny.yaml")
    code, text = _graftline("show", recipe, "--method", "joint", folder=tmp_path)
    assert code == 1
    assert f"graftline run {recipe} --method joint" in text


def test_show_repeats_what_was_set_in_the_command_that_it_names(tmp_path):
    chosen = ("--seed", "7", "--set", "name=other", "--set", "order=[audio, image]")
    code, text = _graftline("show", str(ROOT / "params/tiny.yaml"), *chosen, folder=tmp_path)
    assert code == 1
    assert "--seed 7 --set name=other --set 'order=[audio, image]'" in text


def test_data_without_record_are_named(tmp_path):
    code, text = _graftline("data", "verify", folder=tmp_path)
    assert code == 1
    assert "data.dvc" in text


@pytest.mark.parametrize("own", [False, True])
def test_rebuilding_is_advised_for_the_starter_s_data_alone(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["image/train.parquet", *(["xray/train.parquet"] if own else [])]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(b"rows")
    (tmp_path / "data.dvc").write_text("outs: [{md5: 0.dir, path: data}]\n")
    text = str(CliRunner().invoke(app, ["data", "verify"]).exception)
    assert "`dvc checkout`" in text
    assert ("`graftline data build --folder data --force`" in text) is not own
    text = str(CliRunner().invoke(app, ["data", "build"]).exception)
    assert ("add --force" in text, "data: holds xray, which" in text) == (not own, own)


@pytest.mark.parametrize(
    ("folder", "started"),
    [(".", "data"), ("..", "data/image"), ("image/..", "data"), ("", "data"), ("data/", "")],
)
def test_a_folder_may_be_called_by_where_it_lies(folder, started, tmp_path, monkeypatch):
    (tmp_path / "data/image").mkdir(parents=True)
    (tmp_path / "data/image/train.parquet").write_bytes(b"rows")
    md5 = directory_md5(tmp_path / "data")
    (tmp_path / "data.dvc").write_text(f"outs: [{{md5: {md5}, path: data}}]\n")
    monkeypatch.chdir(tmp_path / started)
    result = CliRunner().invoke(app, ["data", "verify", "--folder", folder])
    assert result.exception is None
    assert f"md5 {md5}" in result.stdout
    version = record_version.fn(folder, str(tmp_path / "store"))
    assert version.md5 == md5 and version.source.endswith("data.dvc")


def test_the_whole_disk_is_no_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = str(ROOT / "params/tiny.yaml")
    for arguments in (
        ["data", "verify", "--folder", "/"],
        ["plan", tiny, "--set", "data.folder=/"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, GraftlineError)
        assert "/: is the whole disk" in str(result.exception)
    with pytest.raises(GraftlineError, match="is the whole disk"):
        build_data.fn("/", str(tmp_path))
