"""Media are shown by a modality's own name, or by their kind where that means one modality."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftline.asking.asker import Asker
from graftline.asking.parts import Parts
from graftline.errors import GraftlineError
from tests.graftline.data.own_media import picture, sound


@pytest.fixture
def asker() -> Asker:
    kinds = {"xray": "image", "photo": "image", "hum": "audio"}
    encoders = {
        "xray": {"name": "efficientnet-lite0"},
        "photo": {"name": "efficientnet-lite0"},
        "hum": {"name": "whisper-tiny.en"},
    }
    nowhere = Path("nowhere")
    connectors = dict.fromkeys(kinds, nowhere)
    return Asker(Parts("it", nowhere, connectors, encoders, "float32", "auto", "", 4, kinds=kinds))


def test_words_mean_modalities(asker: Asker, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "a.wav").write_bytes(sound(440.0, 8_000))
    assert asker.read(tmp_path / "a.png", "xray").modality == "xray"
    heard = asker.read(tmp_path / "a.wav", "audio")
    assert (heard.modality, heard.values.shape) == ("hum", (16_000,))
    with pytest.raises(GraftlineError, match="image may be xray or photo here"):
        asker.read(tmp_path / "a.png", "image")
    with pytest.raises(GraftlineError, match="has not learned video; it knows xray, photo, hum"):
        asker.read(tmp_path / "a.png", "video")
    with pytest.raises(GraftlineError, match=r"a.png: not a readable WAV"):
        asker.read(tmp_path / "a.png", "hum")
    assert [asker.shows(word) for word in ("hum", "image", "note")] == [True, True, False]
