"""What docs/models.md tells people to write is a recipe that loads, and a class that encodes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from graftline.encoders import describe_encoder, encoder_problem, open_encoder
from graftline.model.own_backbone import backbone_name, backbone_problem
from graftline.recipe import Recipe
from graftline.settings.reading import RecipeError, load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
RECIPES = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]


def _with(**parts) -> dict:
    content = yaml.safe_load((ROOT / "params/tiny.yaml").read_text())
    content["modalities"] |= parts.pop("modalities", {})
    return content | parts


@pytest.mark.parametrize("parts", RECIPES, ids=lambda parts: "-".join(parts))
def test_every_snippet_is_a_recipe(parts):
    recipe = Recipe.model_validate(_with(**parts))
    for name in parts.get("modalities", {}):
        settings = recipe.modality(name)
        if getattr(settings.encoder, "source", "") == "transformers":
            problem = encoder_problem(settings.encoder, recipe.kind_of(name))
            assert "not pinned" in str(problem)
    if "backbone" in parts:
        assert "not pinned" in str(backbone_problem(recipe.backbone.source))


def test_the_class_of_the_page_encodes(tmp_path, monkeypatch):
    [source] = [text for kind, text in BLOCKS if kind == "python"]
    (tmp_path / "plant_sensors.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "plant_sensors", raising=False)
    [parts] = [r for r in RECIPES if "plant_sensors" in str(r)]
    recipe = Recipe.model_validate(_with(**parts))
    [name] = parts["modalities"]
    described = describe_encoder(recipe.modality(name).encoder, recipe.kind_of(name))
    encoder = open_encoder(described)
    times = np.arange(400, dtype=np.float32)[:, None] / 100
    slow, fast = (np.sin(2 * np.pi * rate * times * [1, 1, 1]) for rate in (2.0, 40.0))
    features = encoder.encode([slow.astype(np.float32), fast.astype(np.float32)])
    assert features.shape == (2, 4, 24)
    bands = features[:, 0].unflatten(1, (8, 3))[..., 0].argmax(1)
    assert bands[0] < bands[1]  # a faster swing lies in a higher band


@pytest.mark.parametrize(
    ("source", "name", "problem"),
    [
        ("a/b@" + "0" * 40, "a/b@" + "0" * 40, None),
        ("a/b", "a/b@unpinned", "not pinned"),
        ("a/b@main", "a/b@main", "'main' is no commit"),
        ("./models/llm", "./models/llm", "no such folder"),
        ("models/llm.gguf", "models/llm.gguf", "cannot be read"),
        ("tiny-random", "tiny-random", None),
    ],
)
def test_a_backbone_in_one_word(source, name, problem):
    recipe = load_recipe(ROOT / "params/tiny.yaml", {"backbone.source": source})
    assert backbone_name(recipe.backbone.source) == name
    found = backbone_problem(recipe.backbone.source)
    assert (problem in str(found)) if problem else found is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "modalities.image.encoder",
            {"source": "vit", "name": "vit"},
            "source: transformers, timm",
        ),
        (
            "modalities.image.encoder",
            {"source": "transformers", "folder": "x", "poolin": "mean"},
            "modalities.image.encoder.poolin: unknown key; did you mean 'pooling'",
        ),
        ("modalities.image.encoder", {"source": "transformers"}, "given: nothing"),
        (
            "modalities.image.encoder",
            {"source": "transformers", "name": "a/b", "folder": "x"},
            "given: name, folder",
        ),
        (
            "modalities.image.encoder",
            {"source": "transformers", "folder": "x", "revision": "0" * 40},
            "revision belongs to a hub name",
        ),
        ("backbone.source", "smollm2-135m", "did you mean 'smollm2-135m-instruct'"),
        ("backbone.source", {"folder": "x", "gguf": "y.gguf"}, "given: folder, gguf"),
        ("backbone.source", {"foldr": "x"}, "unknown key; did you mean 'folder'"),
        ("modalities.image.connector", {"kind": "resampl"}, "did you mean 'resampler'"),
    ],
)
def test_mistakes_are_named_at_their_key(key, value, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(ROOT / "params/tiny.yaml", {key: value})
    assert message in str(caught.value)
    assert key in str(caught.value)
    assert "[" not in str(caught.value).partition("given")[0].replace("[0-9]", "")
