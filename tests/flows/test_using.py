"""A finished model asked from the command line. What it says is what was evaluated."""

from __future__ import annotations

import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from flows import using
from flows.cli import app
from graftline.asking.asker import Asker
from graftline.errors import GraftlineError
from graftline.settings.reading import load_recipe
from tasks.models import find_parts
from tests.flows.used import (
    APART,
    EXPORTED,
    MODALITIES,
    QUIET,
    RECIPE,
    asked,
    cli,
    computed,
    evaluated,
    logits_of,
    medium,
)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("in_used")


@pytest.mark.parametrize(
    "overrides",
    [*EXPORTED.values(), {"method": "mmer"}, {**APART, "method": "route"}],
    ids=[*EXPORTED, "mmer, text merged", "route, text apart"],
)
def test_a_row_asked_meets_what_evaluation_meets(overrides, used, tmp_path):
    wanted = evaluated(overrides, tmp_path)
    found = asked(Asker(find_parts(RECIPE, overrides)), used)
    for modality in MODALITIES:
        torch.testing.assert_close(found[modality], wanted[modality], rtol=1e-4, atol=1e-4)
        first, *others = wanted[modality]
        assert all((first - other).abs().max() > 1e-3 for other in others)


def test_threads_that_ask_one_routed_model_get_their_own_answers(used, monkeypatch):
    computed(APART)
    monkeypatch.setattr("graftline.asking.asker.answer_batches", logits_of)
    asker = Asker(find_parts(RECIPE, APART))
    asked_for = [(name, medium(name, number)) for number in range(4) for name in MODALITIES]

    def answer(pair):
        return using.ask(asker, [pair], "What is this?", QUIET)

    alone = [answer(pair) for pair in asked_for]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, asked_for * 3))
    assert all(a.equal(b) for a, b in zip(alone * 3, together, strict=True))


def test_media_stand_in_the_order_of_the_command_line(monkeypatch):
    heard = []
    monkeypatch.setattr(using.Asker, "answer", lambda _self, turns: heard.append(turns) or ["ok"])
    words = ["--audio", medium("audio"), f"--image={medium('image')}", "--points"]
    words += [medium("point_cloud"), "--image", medium("image", 1)]
    result = cli("ask", RECIPE, *words, "What is this?")
    assert result.exit_code == 0, result.output
    assert result.stdout == "ok\n"
    [[[turn]]] = heard
    assert [s.modality for s in turn.media] == ["audio", "image", "point_cloud", "image"]
    assert not turn.media[1].features.equal(turn.media[3].features)


def test_a_model_goes_by_four_names(tmp_path):
    wanted = find_parts(RECIPE, {})
    for name in ("reports/tiny/mera/seed-0", "tiny@mera", "models:/tiny/1"):
        assert find_parts(name, {}) == wanted
    earlier = find_parts(RECIPE, {}, stage=2)
    assert set(earlier.connectors) == {"image", "audio"}
    assert earlier.backbone != wanted.backbone


@pytest.mark.parametrize(
    ("model", "overrides", "words"),
    [
        ("nothing", {}, "no such model.*reports/.*params/"),
        ("params", {}, "neither an exported model nor a report"),
        ("tiny@mmer", {}, "no such registered model.*tiny@mera"),
        ("tiny/7", {}, "no such registered model"),
        ("other@mera", {}, "no such registered model"),
        (RECIPE, {"method": "experts"}, "--method route"),
        (RECIPE, {"seed": 7}, "not in artifacts: .*Run the recipe"),
        ("reports/tiny/mera/seed-0", {"fine_tune.steps": 7}, "not in artifacts"),
        ("reports/tiny/mera/seed-0", {"evaluation.max_new_tokens": 7}, "other settings"),
    ],
)
def test_models_that_cannot_be_asked_say_why(model, overrides, words):
    with pytest.raises(GraftlineError, match=re.compile(words, re.DOTALL)):
        find_parts(model, overrides)


def test_an_unknown_stage_and_an_unlearned_modality_are_named():
    with pytest.raises(GraftlineError, match=r"--stage 5: mera has the stages 1 \(image\)"):
        find_parts(RECIPE, {}, stage=5)
    asker = Asker(find_parts(RECIPE, {}, stage=2))
    with pytest.raises(GraftlineError, match="has not learned video; it knows image, audio"):
        using.ask(asker, [("video", medium("video"))], "What?", QUIET)


def test_all_bad_media_are_named_at_once(tmp_path):
    (tmp_path / "empty.png").touch()
    words = ["--image", tmp_path / "empty.png", "--audio", medium("image"), "--video", "absent"]
    result = cli("ask", RECIPE, *words, "What?")
    assert isinstance(result.exception, GraftlineError)
    for word in ("empty.png: is empty", "image-0.png: not a readable WAV", "absent: there is no"):
        assert word in str(result.exception)


def test_too_long_a_question_is_refused_before_the_model_reads_it():
    asker = Asker(find_parts(RECIPE, {}))
    with pytest.raises(GraftlineError, match="this model reads 1024"):
        using.ask(asker, [], "why " * 300, QUIET)


def test_words_that_do_not_go_together_are_refused():
    for words in (
        ["ask", RECIPE],
        ["ask", RECIPE, "--table", "a.csv"],
        ["ask", RECIPE, "x", "--out", "b"],
    ):
        assert isinstance(cli(*words).exception, GraftlineError)
    result = cli("ask", RECIPE, "What?", "--image", medium("image"), "--table", "a", "--out", "b")
    assert "give nothing else" in str(result.exception)


def test_init_writes_a_recipe_that_can_be_priced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--modalities", "audio, image", "--backbone", "tiny-random", "--out", "mine.yaml"]
    result = cli("init", *words)
    assert result.exit_code == 0, result.output
    assert load_recipe("mine.yaml").name == "mine"
    assert "is there already" in str(cli("init", *words).exception)
    result = cli("plan", "mine.yaml", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["order"] == ["audio", "image"]


def test_the_tutorials_commands_are_commands():
    text = (ROOT / "docs/using.md").read_text()
    found = re.findall(r"^graftline .*$", text, flags=re.MULTILINE)
    assert len(found) >= 9
    group = get_command(app)
    for line in found:
        name, *words = shlex.split(line)[1:]
        command = group.commands[name]
        command.make_context(name, words)  # parses; carries nothing out
