"""Rows that hold arrays, and encoders that are a user's class."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from graftline.data.features import FeatureTable
from graftline.encoders import describe_encoder, encoder_problem, open_encoder, same_here
from graftline.encoders.arrays import compute_array_features
from graftline.errors import GraftlineError
from graftline.settings.models import FeatureRows, PythonEncoder


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def rows_of(arrays: list[np.ndarray]) -> dict:
    class Rows:
        def __len__(self):
            return len(arrays)

        def __getitem__(self, part):
            numbers = range(len(arrays))[part]
            return {"id": [f"r{n}" for n in numbers], "media": [npy(arrays[n]) for n in numbers]}

    return Rows()


def _arrays(count: int = 5, tokens: int = 3, width: int = 4) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((tokens, width)).astype(np.float32) for _ in range(count)]


def _features(**settings):
    return open_encoder(describe_encoder(FeatureRows(source="features", **settings), "features"))


def test_features_come_through_as_they_are(tmp_path):
    arrays = _arrays()
    compute_array_features(rows_of(arrays), "sensor", _features(), tmp_path, batch=2)
    table = FeatureTable(tmp_path)
    assert table.shape == (5, 3, 4)
    assert table.ids == [f"r{n}" for n in range(5)]
    torch.testing.assert_close(table[:], torch.from_numpy(np.stack(arrays)), rtol=1e-3, atol=1e-3)


def test_rows_of_any_length_are_averaged_where_tokens_are_said(tmp_path):
    arrays = [_arrays(1, tokens)[0] for tokens in (2, 4, 7)]
    compute_array_features(rows_of(arrays), "sensor", _features(tokens=2), tmp_path)
    table = FeatureTable(tmp_path)
    assert table.shape == (3, 2, 4)
    expected = torch.from_numpy(arrays[1].reshape(2, 2, 4).mean(1))
    torch.testing.assert_close(table[1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "odd", "message"),
    [
        ({}, np.ones((3, 5), np.float32), "row r2: features of width 5; expected 4"),
        ({"width": 9}, np.ones((3, 4), np.float32), "row r0: features of width 4; expected 9"),
        ({}, np.ones((2, 4), np.float32), "row r2: 2 tokens; expected 3"),
        ({}, np.ones((3, 4), np.int64), "row r2: an array of int64"),
        ({}, np.ones(4, np.float32), r"row r2: an array of float32 \(4,\)"),
        ({}, np.full((3, 4), np.nan, np.float32), "row r2: the features hold NaN"),
        ({}, np.full((3, 4), 1e6, np.float32), "r2 hold NaN or values beyond float16"),
        ({}, np.array([[{}]]), "row r2: an array of object"),
    ],
)
def test_an_odd_row_is_named_with_both_figures(tmp_path, settings, odd, message):
    arrays = [*_arrays(2), odd]
    with pytest.raises(GraftlineError, match=message):
        compute_array_features(rows_of(arrays), "sensor", _features(**settings), tmp_path)


def test_the_width_of_the_first_split_holds_for_all(tmp_path):
    encoder = _features()
    compute_array_features(rows_of(_arrays()), "sensor", encoder, tmp_path / "train")
    wider = rows_of(_arrays(width=6))
    with pytest.raises(GraftlineError, match="features of width 6; expected 4"):
        compute_array_features(wider, "sensor", encoder, tmp_path / "validation")


SENSOR = """
import numpy as np

class Averages:
    width = 2

    def __init__(self, tokens=3):
        self.tokens = tokens

    def encode(self, media):
        parts = [np.array_split(values, self.tokens) for values in media]
        return np.array([[(p.mean(), p.std()) for p in each] for each in parts])

class Wider(Averages):
    def encode(self, media):
        return np.zeros((len(media), self.tokens, 5))

class Broken(Averages):
    def encode(self, media):
        raise RuntimeError("no such sensor")

class Windowed(Averages):
    def __init__(self, tokens, windows=4):
        raise RuntimeError("only a run makes it")

class Anything(Averages):
    def __init__(self, **settings):
        raise RuntimeError("only a run makes it")

class Leaving(Averages):
    def encode(self, media):
        raise SystemExit

class Nothing:
    pass
"""


@pytest.fixture
def sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "plant_sensors.py").write_text(SENSOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "plant_sensors", raising=False)
    return tmp_path / "plant_sensors.py"


def _own(reference: str, **settings) -> PythonEncoder:
    return PythonEncoder(source="python", python=reference, settings=settings)


def test_a_class_of_an_installed_package_encodes(sensors, tmp_path):
    recorded = describe_encoder(_own("plant_sensors:Averages", tokens=4), "features")
    encoder = open_encoder(json.loads(json.dumps(recorded)))
    assert (encoder.tokens, encoder.width) == (4, 2)
    features = encoder.encode(_arrays(2, 8, 3))
    assert features.shape == (2, 4, 2) and features.dtype == torch.float32
    assert float(features[0, 0, 0]) == pytest.approx(_arrays(2, 8, 3)[0][:2].mean(), rel=1e-5)
    compute_array_features(rows_of(_arrays(5, 8, 3)), "sensor", encoder, tmp_path / "out")
    assert FeatureTable(tmp_path / "out").shape == (5, 4, 2)
    assert same_here(recorded) == recorded["sha256"]
    sensors.write_text(SENSOR + "# calibrated\n")
    assert same_here(recorded) != recorded["sha256"]
    with pytest.raises(GraftlineError, match="its code changed since"):
        open_encoder(recorded)


def test_an_entry_point_names_a_class(sensors, tmp_path):
    package = tmp_path / "plant_sensors-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plant-sensors\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[graftline.encoders]\nplant-averages = plant_sensors:Averages\n"
    )
    assert open_encoder(describe_encoder(_own("plant-averages"), "features")).tokens == 3
    with pytest.raises(GraftlineError, match="there are: plant-averages"):
        describe_encoder(_own("plant-medians"), "features")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("plant_sensors:Nobody", "has no class Nobody"),
        ("no_such_plant:Averages", "cannot be imported"),
        ("../evil.py:Averages", "not of the form package.module:Class"),
        ("plant-medians", "no installed package has an entry point"),
        ("subprocess:Popen", "subprocess:Popen is no encoder"),
    ],
)
def test_what_cannot_be_found_is_a_problem_of_the_recipe(sensors, reference, message):
    assert message in str(encoder_problem(_own(reference), "features"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Windowed", {"tokens": 3, "windows": 2}, None),
        (
            "Windowed",
            {"tokens": 3, "windoes": 2},
            "'windoes' (given: tokens, windoes; did you mean 'windows'?)",
        ),
        ("Windowed", {"tokns": 2}, "argument: 'tokens' (given: tokns; did you mean 'tokens'?)"),
        ("Windowed", {}, "missing a required argument: 'tokens' (given: nothing)"),
        ("Anything", {"windoes": 2}, None),
        ("Nothing", {"windows": 2}, "is no encoder"),
    ],
)
def test_settings_are_held_against_the_signature_and_nothing_is_made(
    sensors, name, settings, message
):
    found = encoder_problem(_own(f"plant_sensors:{name}", **settings), "features")
    assert (found is None) if message is None else (message in found), found
    assert found is None or f"plant_sensors:{name}" in found


def test_a_module_that_leaves_python_is_a_problem_of_the_recipe(sensors):
    (sensors.parent / "plant_script.py").write_text("import sys\nsys.exit()\n")
    found = encoder_problem(_own("plant_script:Averages"), "features")
    assert "plant_script cannot be imported (SystemExit())" in str(found)


def test_a_class_that_does_not_keep_its_word_is_refused(sensors):
    def opened(name, **settings):
        return open_encoder(describe_encoder(_own(f"plant_sensors:{name}", **settings), "features"))

    with pytest.raises(GraftlineError, match=r"\(2, 3, 5\); expected \(2, 3, 2\)"):
        opened("Wider").encode(_arrays(2))
    with pytest.raises(GraftlineError, match="encode raised RuntimeError"):
        opened("Broken").encode(_arrays(2))
    with pytest.raises(GraftlineError, match="encode raised SystemExit"):
        opened("Leaving").encode(_arrays(2))
    with pytest.raises(GraftlineError, match="an encoder has tokens, width and encode"):
        opened("Nothing")
    with pytest.raises(GraftlineError, match="cannot be made with the settings"):
        opened("Averages", frequency=3)
    with pytest.raises(GraftlineError, match="both are at least 1"):
        opened("Averages", tokens=0)


def test_encoders_and_rows_must_fit():
    assert "takes no features" in str(encoder_problem("basis-point-set", "features"))
    assert encoder_problem("features", "features") is None
    assert "write media: features" in str(encoder_problem("features", "audio"))
    assert encoder_problem("basis-point-set", "point_cloud") is None
    assert "did you mean" in str(encoder_problem("basis-point-sets", "point_cloud"))


def test_a_question_about_an_odd_array_spoils_no_later_one():
    encoder = _features()
    encoder.expect(3, 4)  # as the connector was made
    with pytest.raises(GraftlineError, match="features of width 6; expected 4"):
        encoder.encode(_arrays(1, width=6))
    with pytest.raises(GraftlineError, match="2 tokens; expected 3"):
        encoder.encode(_arrays(1, tokens=2))
    assert encoder.encode(_arrays(1)).shape == (1, 3, 4)
