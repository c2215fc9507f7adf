"""From two fresh folders of files to answers, by the commands of docs/data.md alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from graftline.settings.reading import parse_override
from tasks.choices import choices_of
from tests.flows.conftest import Project
from tests.graftline.data.own_media import make_folder, picture, sound, write_csv

pytestmark = pytest.mark.usefixtures("one_server")
SHORT = (
    "method=finetune", "align.steps=2", "fine_tune.steps=2", "realign.steps=2",
    "precision=float32", "evaluation.max_new_tokens=4", "evaluation.references=false",
)  # fmt: skip
SETTINGS = [word for text in SHORT for word in ("--set", text)]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh folder with photographs and hums, as a user has them."""
    photos = make_folder(tmp_path / "my/photos", count=30)
    write_csv(tmp_path / "my/photos/metadata.csv", photos)
    hums = make_folder(tmp_path / "my/hums", "audio", count=30, answers=("low", "high"))
    rates = ((44_100, 2), (8_000, 1), (16_000, 1))
    for number, row in enumerate(hums):
        rate, channels = rates[number % 3]
        seconds = 0.4 + 0.1 * number
        content = sound(220.0 * (1 + number % 2), rate, channels, seconds=seconds)
        (tmp_path / "my/hums" / row["file_name"]).write_bytes(content)
    return Project(tmp_path)


def tutorial() -> list[list[str]]:
    """The commands of the tutorial in docs/data.md, without `graftline`."""
    text = DOCS.read_text(encoding="utf-8")
    block = text.partition("## From two folders to a model")[2].partition("```sh")[2]
    lines = block.partition("```")[0].replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line)[1:] for line in lines]


def test_two_folders_become_a_model_that_answers(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, check, run, ask = tutorial()
    code, text = project.run(*init)
    assert code == 0, text
    code, text = project.run("compare", "params/own.yaml", "--methods", "finetune", "--budget")
    assert code == 1
    assert "run: graftline data import params/own.yaml" in " ".join(text.split())
    code, text = project.run(*check)
    assert code == 0, text
    assert "photo" in text and "24" in text
    for name in ("photo", "hum"):
        sheet = project.folder / "reports/own/data" / f"{name}.png"
        with Image.open(sheet) as picture_:
            assert min(picture_.size) > 300
        assert "Which? -> " in sheet.with_suffix(".txt").read_text()
    imported = {name for name in project.artifacts() if name.startswith("artifacts/rows/")}
    assert len(imported) == 2
    wrong = ("modalities.photo.encoder=whisper-tiny.en", "execution.device=cuda:99")
    code, text = project.run(*run, *SETTINGS, *(w for each in wrong for w in ("--set", each)))
    assert code == 1 and "Traceback" not in text, text
    flat = " ".join(text.split())
    assert "whisper-tiny.en encodes audio, and the rows hold image" in flat
    assert "execution.device: cuda:99 cannot be used here" in flat
    code, text = project.run(*run, *SETTINGS)
    assert code == 0, text
    metrics = json.loads((project.folder / "reports/own/finetune/seed-0/metrics.json").read_text())
    assert metrics["order"] == ["photo", "hum"]
    assert set(metrics["scores"]) == {"photo", "hum"}
    assert {n for n in project.artifacts() if n.startswith("artifacts/rows/")} == imported
    assert not (project.folder / "data").exists()
    code, text = project.run(*ask, *SETTINGS)
    assert code == 0, text
    monkeypatch.chdir(project.folder)
    offered = choices_of(["params/own.yaml"], dict(map(parse_override, SHORT)))
    assert [choice.stage for choice in offered] == [2, 1]

    code, text = project.run("plan", "params/own.yaml", *SETTINGS)
    assert code == 0, text
    assert "to run" not in text.partition("before it starts")[0]
    (project.folder / "my/photos/003.png").write_bytes(picture(77))
    code, text = project.run("plan", "params/own.yaml", *SETTINGS)
    assert code == 0, text
    [line] = [each for each in text.splitlines() if "photo: rows" in each]
    assert "to run" in line
    [line] = [each for each in text.splitlines() if "hum: rows" in each]
    assert "cached" in line


def test_bad_rows_stop_a_run_before_anything_is_computed(project: Project) -> None:
    init, _, run, _ = tutorial()
    code, text = project.run(*init)
    assert code == 0, text
    (project.folder / "my/photos/004.png").write_bytes(b"")
    (project.folder / "my/hums/002.wav").write_bytes(picture(1))
    code, text = project.run(*run, *SETTINGS)
    assert code == 1
    assert "Traceback" not in text
    flat = " ".join(text.split())
    assert "my/photos/metadata.csv, line 6: 004.png: is empty (0 bytes)" in flat
    assert "my/hums/metadata.csv, line 4: 002.wav: not a readable WAV" in flat
    assert project.artifacts() == {}
    (project.folder / "my/photos/004.png").write_bytes(picture(4))
    (project.folder / "my/hums/002.wav").write_bytes(sound(220.0, 48_000))
    code, text = project.run("data", "import", "params/own.yaml")
    assert code == 0, text
    assert "photo: 24 train, 3 validation, 3 test" in text
    assert {Path(name).parts[1] for name in project.artifacts()} == {"rows"}


def test_all_sources_are_checked_though_some_cannot_be_read(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    init = tutorial()[0]
    assert CliRunner().invoke(app, init).exit_code == 0
    (project.folder / "my/hums/002.wav").write_bytes(picture(1))
    sources = (("photo", "my/photo"), ("scan", "my/scans"), ("hum", "my/hums"))
    data = {name: {"folder": folder, "question": "Which?"} for name, folder in sources}
    scan = {"encoder": "efficientnet-lite0", "media": "image", "data": data["scan"]}
    given = {
        "order": [name for name, _ in sources],
        "modalities.photo.data": data["photo"],
        "modalities.scan": scan,
    }
    words = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, ["data", "check", "params/own.yaml", *words])
    assert "hum" in result.stdout and "24" in result.stdout
    for said in (
        "3 problem(s)",
        "modalities.photo.data: my/photo: there is no such file or folder",
        "modalities.scan.data: my/scans: there is no such file or folder",
        "my/hums/metadata.csv, line 4: 002.wav: not a readable WAV",
    ):
        assert said in str(result.exception)


def test_a_modality_of_captions_alone_is_learned_and_no_conversation_is_made_of_it(
    project: Project,
) -> None:
    init, _, run, _ = tutorial()
    code, text = project.run(*init)
    assert code == 0, text
    captions = [{"file_name": f"{n:03d}.png", "caption": f"number {n % 2}"} for n in range(30)]
    write_csv(project.folder / "my/photos/metadata.csv", captions)
    code, text = project.run(*run, *SETTINGS)
    assert code == 0, text
    metrics = json.loads((project.folder / "reports/own/finetune/seed-0/metrics.json").read_text())
    assert set(metrics["scores"]) == {"photo", "hum"}
    assert "joint" not in metrics or not metrics["joint"]
