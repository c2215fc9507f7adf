"""What the tests of a model in use share: its media, and what stands for its words."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from flows import using
from flows.cli import app
from graftline.model.multimodal import collate
from graftline.model.routing.router import routed
from graftline.planning.run import plan_run
from graftline.settings.reading import load_recipe
from graftline.steps.execution import RUNNERS, execute
from graftline.steps.work import Machine, Work
from graftline.store import Store
from tasks.data import known_version

RECIPE = "params/tiny.yaml"
MODALITIES = ("image", "audio", "video", "point_cloud")
ROWS = 4
ENDINGS = {"image": "png", "audio": "wav", "video": "png", "point_cloud": "ply"}
QUIET = Console(quiet=True)
EXPORTED = {
    "mera": {},
    "mmer": {"method": "mmer"},
    "route": {"method": "route", "compose.text": "merged"},
    "adapters": {"method": "route", "compose.rank": 4},
}
APART = EXPORTED["mmer"]


def rows_of(folder, modality, count=ROWS):
    table = pq.read_table(folder / "data" / modality / "test.parquet")
    return table.slice(0, count).to_pylist()


def medium(modality, number=0):
    return Path("media") / f"{modality}-{number}.{ENDINGS[modality]}"


def logits_of(loaded, batches, **_settings):
    """Stands for `answer_batches`: what the model would say next. The tiny one's words are none."""
    found = {}
    for places, given in batches:
        batch = given.to(loaded.model.device)
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


def echo(loaded, batches, **_settings):
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


def computed(overrides):
    """The plan of a finished run; what it lacks before evaluation is computed."""
    plan = plan_run(load_recipe(RECIPE, overrides), known_version("data").files)
    for step in plan.steps.values():
        if step.kind in ("compose", "adapters"):
            execute(step, Store("artifacts"), Machine(Path("data")))
    return plan


def evaluated(overrides, out):
    """modality -> logits (rows, vocabulary) that the run's own evaluation meets."""
    plan, store, found = computed(overrides), Store("artifacts"), {}

    def answer_all(loaded, examples, **_settings):
        prompts = [examples.prompt(row, False) for row in range(ROWS)]
        media = [[examples.features[row]] for row in range(ROWS)]
        batch = collate(prompts, media, examples.pad_id)
        found[examples.modality] = torch.stack(logits_of(loaded, [(list(range(ROWS)), batch)]))
        return ["" for _ in examples.rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftline.steps.execution.answer_all", answer_all)
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


def asked(asker, folder):
    """modality -> logits (rows, vocabulary) that the same rows' files meet when asked."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftline.asking.asker.answer_batches", logits_of)
        for modality in MODALITIES:
            pairs = [
                ([(modality, folder / medium(modality, number))], row["question"])
                for number, row in enumerate(rows_of(folder, modality))
            ]
            each = [using.ask(asker, media, question, QUIET) for media, question in pairs]
            found[modality] = torch.stack(each)
    return found


def cli(*words):
    return CliRunner().invoke(app, [str(word) for word in words])
