"""Recipes to begin with: they run, they say what every key means, and they are the starter's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from graftline.planning.problems import recipe_problems
from graftline.recipe import ConnectorSettings, Recipe
from graftline.settings.drafting import draft
from graftline.settings.models import STARTERS
from graftline.settings.reading import RecipeError, load_recipe

ROOT = Path(__file__).resolve().parents[3]
SMOLLM2 = "smollm2-135m-instruct"


def _loaded(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def _parts(part: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [field.annotation for field in part.model_fields.values()]
    kept = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [part, *(found for kind in kept for found in _parts(kind))]


def test_with_all_modalities_it_is_the_starter(tmp_path):
    found = _loaded(tmp_path, draft("starter", "mera", list(STARTERS), SMOLLM2))
    starter = load_recipe(ROOT / "params/starter.yaml")
    for name in ("compose", "distil", "mera_plus", "rivals", "methods"):
        own = Recipe.model_fields[name].get_default(call_default_factory=True)
        assert getattr(found, name) == own, "what was searched on the starter's data is its own"
        found = found.model_copy(update={name: getattr(starter, name)})
    assert found.model_dump() == starter.model_dump()


def test_defaults_behind_the_mark_are_the_defaults(tmp_path):
    text = draft("mine", "ties", ["audio", "image"], "tiny-random", "rows")
    recipe = _loaded(tmp_path, text)
    assert recipe.order == ("audio", "image")
    files = {name: dict.fromkeys(("train", "validation", "test"), "") for name in recipe.order}
    assert recipe_problems(recipe, files) == []
    open_ = re.sub(r"^(\s*)#(?=\S)", r"\1", text, flags=re.MULTILINE)
    assert open_ != text
    assert _loaded(tmp_path, open_) == recipe


def test_every_key_stands_with_its_description():
    text = draft("mine", "mera", ["image"], SMOLLM2)
    for part in [*_parts(Recipe), ConnectorSettings]:
        for name, field in part.model_fields.items():
            [*lines] = re.findall(rf"^ *#?{name}:.*$", text, flags=re.MULTILINE)
            assert lines, name
            assert not field.description or any(field.description in line for line in lines)


def test_what_does_not_fit_is_named():
    with pytest.raises(RecipeError, match="imge not known; did you mean 'image'"):
        draft("mine", "mera", ["imge"], SMOLLM2)
    with pytest.raises(RecipeError, match="smell not known. There are: image"):
        draft("mine", "mera", ["image", "smell"], SMOLLM2)
    with pytest.raises(RecipeError) as error:
        draft("my recipe", "merra", ["image", "image"], "smollm")
    for words in ("the new recipe", "name", "did you mean 'mera'", "backbone.source"):
        assert words in str(error.value)
    with pytest.raises(RecipeError, match="order"):
        draft("mine", "mera", [], SMOLLM2)


def test_modalities_of_one_s_own_come_with_their_folders(tmp_path):
    wanted = ["xray:image", "hum:audio"]
    text = draft("mine", "mera", wanted, SMOLLM2, sources={"xray": "my/scans"})
    recipe = _loaded(tmp_path, text)
    assert recipe.order == ("xray", "hum")
    assert [recipe.kind_of(name) for name in recipe.order] == ["image", "audio"]
    assert recipe.modality("xray").data.folder == "my/scans"
    assert recipe.modality("hum").data is None
    with pytest.raises(RecipeError, match="scan not known.*name:kind"):
        draft("mine", "mera", ["xray:scan"], SMOLLM2)
    with pytest.raises(RecipeError, match="^--source: other not among.*xray, hum.*other:image"):
        draft("mine", "mera", wanted, SMOLLM2, sources={"other": "x"})
    with pytest.raises(RecipeError, match="scan not known.*\n--source: xrai not among.*xray"):
        draft("mine", "mera", ["xray:scan"], SMOLLM2, sources={"xrai": "x"})


def test_a_brief_recipe_says_the_same_in_few_lines(tmp_path):
    wanted, folders = ["sign:image", "call:audio"], {"sign": "my/signs", "call": "my/calls"}
    brief = draft("mine", "mera", wanted, SMOLLM2, sources=folders, brief=True)
    lines = [line for line in brief.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 25
    assert _loaded(tmp_path, brief) == _loaded(
        tmp_path, draft("mine", "mera", wanted, SMOLLM2, sources=folders)
    )
