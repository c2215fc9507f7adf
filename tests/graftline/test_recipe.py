from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from graftline.recipe import Recipe
from graftline.settings.reading import RecipeError, load_recipe, parse_override

PARAMS = Path(__file__).parents[2] / "params"


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_are_shipped_are_valid(path: Path) -> None:
    assert load_recipe(path).order == ("image", "audio", "video", "point_cloud")


@pytest.fixture
def recipe_with(tmp_path: Path):
    def write(**changes: object) -> Path:
        content = yaml.safe_load((PARAMS / "tiny.yaml").read_text())
        content.update(changes)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_all_problems_are_listed_at_once_with_nearest_names(recipe_with) -> None:
    path = recipe_with(method="mira", replai={"fraction": 0.1}, seed=-1, replay={"fraction": 2})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert str(path) in message
    assert "did you mean 'mera'" in message
    assert "did you mean 'replay'" in message
    assert "seed" in message
    assert "replay.fraction" in message
    assert message.startswith(f"{path}: 4 problem(s)")


def test_unknown_key_inside_a_part_names_its_neighbour(recipe_with) -> None:
    path = recipe_with(align={"stepz": 3, "steps": 3, "learning_rate": 1e-3})
    with pytest.raises(RecipeError, match=r"align.stepz: unknown key; did you mean 'steps'"):
        load_recipe(path)


def test_order_must_name_described_modalities_once(recipe_with) -> None:
    with pytest.raises(RecipeError, match="image more than once"):
        load_recipe(recipe_with(order=["image", "image"]))
    with pytest.raises(RecipeError, match="which modalities does not describe"):
        load_recipe(recipe_with(modalities={"image": {"encoder": "efficientnet-lite0"}}))


def test_overrides_win_and_are_checked_too() -> None:
    recipe = load_recipe(PARAMS / "tiny.yaml", {"replay.fraction": 0.01, "seed": 5})
    assert (recipe.replay.fraction, recipe.seed) == (0.01, 5)
    with pytest.raises(RecipeError, match="replay.fracton.*fraction"):
        load_recipe(PARAMS / "tiny.yaml", {"replay.fracton": 0.01})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.b=1", ("a.b", 1)), ("x=[1, 2]", ("x", [1, 2])), ("m=mera", ("m", "mera"))],
)
def test_overrides_are_read_as_yaml(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["novalue", "=3", "a=[1", "a={b: 1, b: 2}", "a=2024-13-45"])
def test_bad_overrides_say_what_to_write(text: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        parse_override(text)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    for text in ("a: [1", "name: 2024-13-45", "seed: !!int many"):
        broken.write_text(text)
        with pytest.raises(RecipeError, match="not readable as YAML"):
            load_recipe(broken)


def test_a_key_that_is_there_again_is_named_with_both_lines(tmp_path: Path) -> None:
    plain = (PARAMS / "tiny.yaml").read_text()
    count = len(plain.splitlines())
    path = tmp_path / "mine.yaml"
    path.write_text(
        plain + "seed: 7\nmethods:\n  ewc: {replay: {fraction: 0.5, fraction: 0.2}}\nseed: 8\n"
    )
    seed = next(n for n, line in enumerate(plain.splitlines(), 1) if line.startswith("seed:"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {"replay.fracton": 0.1})
    message = str(caught.value)
    assert message.startswith(f"{path}: 5 problem(s)"), message
    for words in (
        f"line {count + 1}: seed is there again (first in line {seed})",
        f"line {count + 2}: methods is there again",
        f"line {count + 3}: methods.ewc.replay.fraction is there again (first in line {count + 3})",
        f"line {count + 4}: seed is there again (first in line {seed})",
        "replay.fracton",
    ):
        assert words in message, message


def test_anchors_and_what_is_merged_from_them_are_no_repetition(tmp_path: Path) -> None:
    plain = yaml.safe_load((PARAMS / "tiny.yaml").read_text())
    sections = {name: plain.pop(name) for name in ("align", "realign")}
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(plain)
        + f"align: &a {yaml.safe_dump(sections['align'], default_flow_style=True)}"
        + "realign:\n  <<: *a\n  <<: *a\n  steps: 3\n"
    )
    found = load_recipe(path)
    assert (found.realign.steps, found.realign.batch_size) == (3, found.align.batch_size)


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    recipe: Recipe = load_recipe(PARAMS / "tiny.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_modalities_have_names_of_their_own(recipe_with) -> None:
    own = {"xray": {"encoder": "efficientnet-lite0", "media": "image"}}
    recipe = load_recipe(recipe_with(order=["xray"], modalities=own))
    assert recipe.kind_of("xray") == "image"
    assert load_recipe(PARAMS / "tiny.yaml").kind_of("point_cloud") == "point_cloud"
    bad = {
        "xray": {"encoder": "efficientnet-lite0"},
        "joint": {"encoder": "efficientnet-lite0", "media": "image"},
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_with(order=["xrai"], modalities=bad))
    for words in (
        "modalities.xray does not say what its rows hold", "modalities.joint: reports call",
        "order names xrai", "did you mean 'xray'",
    ):  # fmt: skip
        assert words in str(caught.value)
    for name in ("X-Ray", "1st", "a b", "../x", ""):
        with pytest.raises(RecipeError, match="modalities"):
            load_recipe(recipe_with(order=[name], modalities={name: own["xray"]}))


def test_a_source_is_checked_with_the_recipe(recipe_with) -> None:
    def load(**data: object) -> Recipe:
        own = {"image": {"encoder": "efficientnet-lite0", "data": data}}
        return load_recipe(recipe_with(order=["image"], modalities=own))

    assert load(folder="photos").modality("image").data.folder == "photos"
    with pytest.raises(RecipeError, match=r"data.foldr: unknown key; did you mean 'folder'"):
        load(foldr="photos")
    with pytest.raises(RecipeError, match="hub needs a revision"):
        load(hub="lab/photos")


def test_a_tilde_is_the_user_s_home_in_every_place(
    recipe_with, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    encoder = {"source": "transformers", "folder": "~/clip"}
    paths = {"train": ["~/a/*.parquet", "~/b.parquet"], "test": "~/c.parquet"}
    own = {"encoder": encoder, "data": {"parquet": paths, "media_folder": "~/media"}}
    recipe = load_recipe(
        recipe_with(order=["image"], modalities={"image": own}),
        {"store": "~/art", "data.folder": "~/rows", "backbone.source": "~/llm"},
    )
    image = recipe.modality("image")
    assert (recipe.store, recipe.data.folder) == ("/home/me/art", "/home/me/rows")
    assert recipe.backbone.source.folder == "/home/me/llm"
    assert image.encoder.folder == "/home/me/clip"
    assert image.data.parquet == {
        "train": ("/home/me/a/*.parquet", "/home/me/b.parquet"), "test": "/home/me/c.parquet",
    }  # fmt: skip
    assert image.data.media_folder == "/home/me/media"
    for source in ("~/llm.gguf", {"gguf": "~/llm.gguf"}):
        recipe = load_recipe(PARAMS / "tiny.yaml", {"backbone.source": source})
        assert recipe.backbone.source.gguf == "/home/me/llm.gguf"
    for place in ("art~", "a/~/b", "s3://bucket/~x"):
        assert load_recipe(PARAMS / "tiny.yaml", {"store": place}).store == place


@pytest.mark.parametrize("key", ["store", "data.folder"])
def test_a_place_has_a_name(key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}: String should have at least 1 character"):
        load_recipe(PARAMS / "tiny.yaml", {key: ""})


def test_what_was_chosen_for_a_method_holds_for_it_alone(recipe_with) -> None:
    own = {"ewc": {"fine_tune": {"steps": 9}}, "mera": {"fine_tune": {"learning_rate": 1e-5}}}
    path = recipe_with(methods=own)
    plain = load_recipe(PARAMS / "tiny.yaml").fine_tune
    assert load_recipe(path, {"method": "lwf"}).fine_tune == plain
    ewc = load_recipe(path, {"method": "ewc"})
    assert ewc.fine_tune == plain.model_copy(update={"steps": 9})
    assert (ewc.common().fine_tune, ewc.common().method) == (plain, "ewc")
    given = {"method": "ewc", "fine_tune.steps": 3}
    assert load_recipe(path, given).fine_tune.steps == 3, "what is given by hand wins"
    assert load_recipe(path, given).common().fine_tune.steps == 3
    for change in (
        {"methods.lwf.replay.fraction": 0.5},
        {"methods": {"lwf": {"replay": {"fraction": 0.5}}}},
    ):
        assert load_recipe(path, {"method": "lwf", **change}).replay.fraction == 0.5
    sent = load_recipe(path, {"method": "ewc"}).model_dump(mode="json")
    assert "methods" not in sent, "who gets a recipe as it was read does not apply them again"


def test_the_default_method_has_settings_of_its_own_too(recipe_with) -> None:
    path = recipe_with(methods={"mera": {"fine_tune": {"steps": 9}}})
    content = yaml.safe_load(path.read_text())
    del content["method"]
    path.write_text(yaml.safe_dump(content))
    assert load_recipe(path).fine_tune.steps == 9


def test_a_method_s_settings_are_not_checked_against_what_is_given_for_another(recipe_with) -> None:
    path = recipe_with(methods={"experts": {"fine_tune": {"steps": 9}}, "ewc": {}})
    given = {"method": "mera", "evaluation.references": False, "fine_tune.mode": "lora"}
    assert load_recipe(path, given).method == "mera"


def test_problems_of_every_method_s_settings_are_listed_at_once(recipe_with) -> None:
    own = {
        "ewc": {"fine_tune": {"stepz": 9}},
        "joint": {"name": "other", "seed": 4},
        "lwf": {"fine_tune": {"steps": 0}},
        "mira": {},
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_with(methods=own))
    message = str(caught.value)
    assert "4 problem(s)" in message, message
    for words in (
        "methods.ewc: fine_tune.stepz: unknown key; did you mean 'steps'",
        "methods.joint: name, seed: not a method's to set (align, fine_tune,",
        "methods.lwf: fine_tune.steps: ",
        "'mira' is not one of",
    ):
        assert words in message


def test_a_method_s_key_that_is_no_text_is_named(recipe_with) -> None:
    path = recipe_with(methods={"mera": {True: 1, "of": 1}})  # YAML reads `on` as true
    with pytest.raises(RecipeError, match="methods.mera: True, of: not a method's to set"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("file", "words"), [({}, "realign: Field required"), ({"steps": 0}, "realign.steps: ")]
)
def test_what_all_methods_need_is_not_one_method_s_alone(recipe_with, file, words) -> None:
    own = {"realign": {"steps": 4, "learning_rate": 3e-4}}
    path = recipe_with(methods={"mera": own})
    content = yaml.safe_load(path.read_text())
    del content["realign"]
    if file:
        content["realign"] = file
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=f"{words}.*, not under methods.mera alone"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**64),
        ("align.learning_rate", float("inf")),
        ("rivals.ewc.strength", float("inf")),
        ("data.rows.train", -5),
        ("data.rows.train", 0),
        ("estimate.rows.image.train", -1),
        ("estimate.rows.imagee", {"train": 1}),
        ("estimate.row_tokens.image", float("nan")),
        ("estimate.row_tokens.image", 0),
        ("estimate.row_tokens.imagee", 3),
    ],
)
def test_numbers_out_of_bounds_are_named_with_their_key(key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"1 problem.*\n.*{key}: "):
        load_recipe(PARAMS / "tiny.yaml", {key: value})


def test_what_types_say_hides_nothing_of_how_sections_fit_together(recipe_with) -> None:
    path = recipe_with(
        order=["imagee", "audio", "audio"],
        modalities={"image": {"encoder": "basis-point-set"}, "audio": None, "joint": {}},
        replay={"fractoin": 0.1},
        estimate={"rows": {"vide": {"train": 1}}},
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "9 problem(s)" in message, message
    for line in (
        "replay.fraction: Field required",
        "replay.fractoin: unknown key; did you mean 'fraction'?",
        "modalities.audio: ",
        "modalities.joint.encoder: Field required",
        "modalities.joint does not say what its rows hold",
        "modalities.joint: reports call something else so",
        "order names audio more than once",
        "order names imagee, which modalities does not describe; did you mean 'image'?",
        "estimate.rows.vide: modalities does not describe it",
    ):
        assert f"\n  - {line}" in message, message


def test_a_wrong_name_in_order_is_one_problem_and_no_missing_one(recipe_with) -> None:
    own = {"X-ray": {"encoder": "efficientnet-lite0", "media": "image"}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_with(order=["X-ray"], modalities=own))
    assert "order.0: " in str(caught.value)
    assert "at least 1 item" not in str(caught.value)
    with pytest.raises(RecipeError, match="order: .*at least 1 item"):
        load_recipe(recipe_with(order=[]))


def test_a_problem_of_the_method_s_own_settings_is_told_once(recipe_with) -> None:
    path = recipe_with(methods={"mera": {"fine_tune": {"stepz": 9}}})
    with pytest.raises(RecipeError, match="1 problem.*\n.*methods.mera: fine_tune.stepz"):
        load_recipe(path)
