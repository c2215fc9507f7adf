"""A whole run with models of the user's own: CLIP, a sensor's class, Llama; all of them pico."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from graftline.asking import bundle
from graftline.data.rows import schema
from graftline.errors import GraftlineError
from graftline.model.backbone import make_tiny
from tests.graftline.pico_models import pico_clip, pico_llm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_server")]
ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 24, "validation": 8, "test": 8}
STATES = ("calm", "shaking")


def _series(generator: np.random.Generator, state: str) -> bytes:
    times = np.arange(64)[:, None] * (0.2 if state == "calm" else 2.5)
    values = np.sin(times + generator.uniform(0, 6, 3)) + generator.normal(0, 0.1, (64, 3))
    stream = io.BytesIO()
    np.save(stream, values.astype(np.float32))
    return stream.getvalue()


def _write_rows(folder: Path) -> None:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for split, count in COUNTS.items():
        rows = [
            {
                "id": f"vibration-{split}-{number:05d}",
                "media": _series(generator, STATES[number % 2]),
                "task": "question",
                "question": "How does the machine run?",
                "answers": [STATES[number % 2]],
                "source": f"{split}-{number}",
            }
            for number in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema()), folder / f"{split}.parquet")


def _recipe() -> dict:
    content = yaml.safe_load((ROOT / "params/tiny.yaml").read_text())
    return content | {
        "name": "own",
        "order": ["image", "vibration"],
        "data": {"rows": COUNTS},
        "backbone": {"source": "./models/llama"},
        "modalities": {
            "image": {
                "encoder": {
                    "source": "transformers", "folder": "models/clip", "layer": -2,
                    "pooling": "patches",
                },
                "connector": {"kind": "resampler", "tokens": 2, "hidden": 16, "heads": 2},
            },
            "vibration": {
                "media": "features",
                "encoder": {"source": "python", "python": "plant_sensors:Spectrum"},
                "connector": {"tokens": 2, "hidden": 16},
            },
        },
    }  # fmt: skip


def _called(*words: str) -> str:
    """What a command prints; what it raises is raised."""
    return CliRunner().invoke(app, list(words), catch_exceptions=False).stdout


def test_a_run_with_models_of_ones_own(fresh, monkeypatch, tmp_path):
    folder = fresh.folder
    for name in ("audio", "video", "point_cloud"):
        shutil.rmtree(folder / "data" / name)
    _write_rows(folder / "data/vibration")
    page = (ROOT / "docs/models.md").read_text()
    [source] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (folder / "plant_sensors.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    pico_clip(folder / "models/clip")
    make_tiny(tmp_path / "tiny", seed=0)
    pico_llm("llama", folder / "models/llama", tmp_path / "tiny")
    (folder / "params/own.yaml").write_text(yaml.safe_dump(_recipe()))
    code, text = fresh.run("run", "params/own.yaml")
    assert code == 0, text
    report = folder / "reports/own/mera/seed-0/metrics.json"
    metrics = json.loads(report.read_text())
    assert set(metrics["scores"]) == {"image", "vibration"}
    shapes = {
        json.loads(path.read_text())["shape"]["encoder_tokens"]
        for path in folder.glob("artifacts/align/*/connector-*.json")
    }
    assert shapes == {9, 4}  # CLIP's patches, the sensor's windows
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "plant_sensors", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlruns/mlflow.db")
    found = json.loads(_called("plan", "params/own.yaml", "--json"))
    assert (found["to_run"], found["fingerprint"]) == (0, metrics["fingerprint"])
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    _called("export", "params/own.yaml", "--out", "bundle")
    assert "the user, transformers" in (folder / "bundle/README.md").read_text()
    question = ("--image", "red.png", "What is this?")
    with pytest.raises(GraftlineError, match="names the Python class plant_sensors:Spectrum"):
        _called("ask", "bundle", *question)
    monkeypatch.setenv("GRAFTLINE_TRUST_REMOTE_CODE", "1")
    assert _called("ask", "bundle", *question) == _called("ask", "params/own.yaml", *question)
    np.save(folder / "machine.npy", np.zeros((64, 3), np.float32))
    sensor = ("--show", "vibration=machine.npy", "How does the machine run?")
    assert _called("ask", "bundle", *sensor) == _called("ask", "params/own.yaml", *sensor)
    answer = _called("ask", "bundle", *question)
    pico_clip(folder / "models/clip", hidden_size=48)
    (folder / "bundle").rename(tmp_path / "moved")  # it holds the encoder that it was made with
    assert _called("ask", str(tmp_path / "moved"), *question) == answer
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "same_here", lambda _: "0" * 64)
        with pytest.raises(GraftlineError, match="its image encoder transformers:.*has the digest"):
            _called("ask", str(tmp_path / "moved"), *question)
    weights = tmp_path / "moved/encoders/image/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(GraftlineError, match="encoders/image/model.safetensors"):
        _called("ask", str(tmp_path / "moved"), *question)
    found = json.loads(_called("plan", "params/own.yaml", "--json"))
    stale = [step for step in found["steps"] if not step["cached"]]
    assert "image: features" in {step["label"] for step in stale}
    assert "vibration: features" not in {step["label"] for step in stale}
