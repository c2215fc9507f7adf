"""The page of `graftline app`, used in headless Chromium as a person would use it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from flows import page, using
from graftline.asking.asker import Asker
from graftline.errors import GraftlineError
from tasks.choices import Choice, choices_of
from tasks.models import find_parts
from tests.flows.browser import CHROMIUM, Browser
from tests.flows.conftest import Project
from tests.flows.used import QUIET, RECIPE, cli, echo, medium

pytestmark = pytest.mark.usefixtures("in_used")
GRADIO = importlib.util.find_spec("gradio")
MERA = "mera · seed 0 · stage 4: image audio video point cloud"
QUESTION = "What is this?"


def test_every_stage_of_a_finished_run_can_be_chosen(exported, used):
    found = choices_of([RECIPE, str(exported / "mmer")], {})
    assert [choice.label for choice in found] == [
        MERA,
        "mera · seed 0 · stage 3: image audio video",
        "mera · seed 0 · stage 2: image audio",
        "mera · seed 0 · stage 1: image",
        str(exported / "mmer"),
    ]
    assert found[0].parts() == find_parts(RECIPE, {})
    assert set(found[2].parts().connectors) == {"image", "audio"}
    with pytest.raises(GraftlineError, match="none of its runs is finished"):
        choices_of([RECIPE], {"fine_tune.steps": 7})
    with pytest.raises(GraftlineError, match="no such model"):
        choices_of(["nothing"], {})


def test_recipes_are_told_apart_where_several_are_given(used):
    shutil.copytree("reports/tiny/mera", "reports/other/mera")
    text = Path(RECIPE).read_text(encoding="utf-8").replace("name: tiny", "name: other")
    Path("params/other.yaml").write_text(text, encoding="utf-8")
    try:
        labels = [choice.label for choice in choices_of([RECIPE, "params/other.yaml"], {})]
    finally:
        shutil.rmtree("reports/other")
        Path("params/other.yaml").unlink()
    assert len(labels) == 8 and labels[0] == f"tiny · {MERA}" and labels[4] == f"other · {MERA}"


def test_what_a_model_calls_otherwise_is_shown_as_what_it_is(used, monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", echo)
    own = Choice("own", "own", {"photo": "image", "xray": "image"})
    models = page.Models([*choices_of([RECIPE], {}), own], "auto")
    assert list(models.kinds) == ["image", "audio", "video", "point_cloud", "photo", "xray"]
    asked_for = {"xray": str(used / medium("image"))}
    said, notes = page.answers(models, asked_for, QUESTION, [MERA])
    wanted = using.ask(Asker(find_parts(RECIPE, {})), [("image", medium("image"))], QUESTION, QUIET)
    assert (said, notes) == ([wanted], "")


def test_two_models_answer_side_by_side_and_problems_are_notes(used, monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", echo)
    models = page.Models(choices_of([RECIPE], {}), "auto")
    labels = list(models.choices)
    media = {"video": str(used / medium("video"))}
    said, notes = page.answers(models, media, QUESTION, [labels[0], labels[3]])
    asker = Asker(find_parts(RECIPE, {}))
    wanted = using.ask(asker, [("video", used / medium("video"))], QUESTION, QUIET)
    assert said == [wanted, ""]
    assert notes.startswith("video-0.png: tiny · mera · seed 0 · stage 1 has not learned video")
    assert str(used) not in notes
    assert page.answers(models, {}, " ", [labels[0], page.NOBODY])[1].startswith("the question is")
    models.asker(labels[1])
    assert len(models._loaded) == 2


def test_the_page_needs_gradio_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = cli("app", RECIPE)
    assert "requirements-app.lock" in str(result.exception)


@pytest.fixture
def address(used):
    """Where the page is served."""
    process = Project(used).start("app", RECIPE, "--port", "0")
    lines = []
    while not (found := re.search(r"http://127.0.0.1:\d+", "".join(lines))):
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    yield found[0]
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[0]
    assert process.returncode == 0


def _choose(browser, name, label):
    """Takes an entry of a dropdown, with the keyboard and mouse events that it listens to."""
    field = f"document.querySelector('#model-{name} input')"
    browser.run(f"{field}.focus()")
    found = (
        "Array.from(document.querySelectorAll('[role=option], ul.options li'))"
        f".find(e => e.innerText.trim().endsWith({json.dumps(label)}))"
    )
    browser.wait_for(f"!!{found}")
    browser.run(f"{found}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")
    browser.wait_for(f"{field}.value === {json.dumps(label)}")


@pytest.mark.slow
@pytest.mark.skipif(GRADIO is None, reason="Gradio is not installed: requirements-app.lock")
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_media_are_dropped_and_two_answers_are_shown(address, used, tmp_path):
    stages = choices_of([RECIPE], {})
    browser = Browser(tmp_path)
    try:
        browser.call("Page.navigate", url=address)
        browser.wait_for("!!document.querySelector('#file-image input[type=file]')")
        browser.give("#file-image input[type=file]", used / medium("image"))
        browser.wait_for("document.querySelector('#file-image').innerText.includes('image-0')")
        browser.give("#file-audio input[type=file]", used / medium("audio"))
        browser.wait_for("document.querySelector('#file-audio').innerText.includes('audio-0')")
        _choose(browser, "right", stages[2].label)
        browser.run("document.querySelector('#ask').click()")
        answer = "document.querySelector('#answer-{} textarea').value"
        wanted = [
            using.ask(Asker(choice.parts()), [(m, medium(m)) for m in ("image", "audio")],
                      QUESTION, QUIET)
            for choice in (stages[0], stages[2])
        ]  # fmt: skip
        for name, text in zip(("left", "right"), wanted, strict=True):
            shown = json.dumps(text.strip() or page.WORDLESS)
            browser.wait_for(f"{answer.format(name)}.trim() === {shown}")
        assert browser.run("document.querySelector('#notes textarea').value") == ""
        remote = [u for u in browser.requested if not u.startswith((address, "data:", "blob:"))]
        assert not remote
    finally:
        browser.close()
    with urllib.request.urlopen(address, timeout=10) as page_found:
        assert page_found.headers["Content-Security-Policy"] == page.POLICY
    strange = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(strange, timeout=10)
