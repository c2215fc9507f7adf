"""The registered model as MLflow loads and serves it."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows import using
from graftline.asking.asker import Asker
from graftline.asking.links import follow_links, links_of
from graftline.errors import GraftlineError
from tasks.models import find_parts
from tasks.ui import free_port
from tests.flows.conftest import Project
from tests.flows.used import QUIET, RECIPE, echo, medium

pytestmark = pytest.mark.usefixtures("in_used")
MODEL = "models:/tiny@mera"
QUESTION = "What is this?"


def _row(folder, *modalities):
    files = {name: (folder / medium(name)).read_bytes() for name in modalities}
    return {**{m: base64.b64encode(c).decode() for m, c in files.items()}, "question": QUESTION}


@pytest.fixture
def loaded(used):
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return mlflow.pyfunc.load_model(MODEL)


def test_it_answers_as_the_model_does(loaded, used, monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", echo)
    shown = [["image"], ["audio", "point_cloud"], []]
    found = loaded.predict(pd.DataFrame([_row(used, *modalities) for modalities in shown]))
    asker = Asker(find_parts(RECIPE, {}))
    for modalities, answer in zip(shown, found["answer"], strict=True):
        media = [(name, medium(name)) for name in modalities]
        assert answer == using.ask(asker, media, QUESTION, QUIET)
    assert len(set(found["answer"])) == 3


def test_the_run_that_made_it_leads_to_it(loaded):
    version = MlflowClient().get_model_version_by_alias("tiny", "mera")
    run = MlflowClient().get_run(version.run_id)
    assert run.data.tags["mlflow.runName"] == "mera seed 0"
    assert loaded.metadata.metadata["run_id"] == version.run_id
    assert version.tags["fingerprint"] == run.data.tags["fingerprint"]
    model = MlflowClient().get_logged_model(loaded.metadata.model_id)
    assert model.status == "READY" and version.source == f"models:/{model.model_id}"


def test_weights_are_linked_and_nothing_is_pickled(loaded):
    location = MlflowClient().get_logged_model(loaded.metadata.model_id).artifact_location
    files = list(Path(location.removeprefix("file://")).rglob("*"))
    assert not [p.name for p in files if p.suffix in (".pkl", ".safetensors", ".bin")]
    names = {p.name for p in files}
    assert {"MLmodel", "served.py"} <= names
    assert sum(p.stat().st_size for p in files if p.is_file()) < 100_000


def test_rows_that_cannot_be_asked_are_all_listed(loaded, used):
    rows = [{"image": "no base64!", "question": QUESTION}, {"question": " "}]
    rows.append({"audio": base64.b64encode(b"RIFF").decode(), "question": QUESTION})
    rows += [{"question": None}, {"image": "é", "question": QUESTION}]
    rows.append({"question": "why " * 600})
    with pytest.raises(MlflowException) as error:
        loaded.predict(pd.DataFrame(rows))
    text = str(error.value)
    for words in (
        "row 1, image: is no base64",
        "row 2: the question is empty",
        "row 3, audio: not a readable",
        "row 4: question: is no text",
        "row 5, image: is no base64",
        "row 6: the conversation takes",
    ):
        assert words in text
    assert "/tmp" not in text


def test_parts_that_are_gone_are_named(tmp_path):
    links = links_of(find_parts(RECIPE, {}))
    assert (
        follow_links(json.loads(json.dumps(links))).connectors.keys() == links["connectors"].keys()
    )
    with pytest.raises(GraftlineError, match="is not there any more"):
        follow_links({**links, "backbone": str(tmp_path / "gone/backbone")})


def _post(port, content):
    url = f"http://127.0.0.1:{port}/invocations"
    body = json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def _wait(port, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("mlflow does not serve")


@pytest.mark.slow
def test_mlflow_serves_it(used):
    port = free_port()
    arguments = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", MODEL]
    arguments += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **Project(used).environment(),
        "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"],
        # MLflow starts uvicorn by its name
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        arguments, cwd=used, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        _wait(port, process)
        found = _post(port, {"dataframe_records": [_row(used, "image", "audio")]})
        media = [("image", medium("image")), ("audio", medium("audio"))]
        wanted = using.ask(Asker(find_parts(RECIPE, {})), media, QUESTION, QUIET)
        assert found == {"predictions": [{"answer": wanted}]}
        with pytest.raises(urllib.error.HTTPError) as error:
            _post(port, {"dataframe_records": [{"image": "?", "question": QUESTION}]})
        assert error.value.code == 400
        assert b"row 1, image: is no base64" in error.value.read()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
