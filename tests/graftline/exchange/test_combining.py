"""Models that were taken apart become one, by MMER and by plain merging."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from flows.cli import app
from graftline.asking.asker import Asker
from graftline.asking.bundle import read_bundle, read_description
from graftline.asking.conversation import Turn
from graftline.asking.parts import load_parts
from graftline.data.encoding import encode_wav
from graftline.durable import temporary_sibling
from graftline.errors import GraftlineError
from graftline.exchange.combining import combine
from graftline.exchange.taking_apart import take_apart
from graftline.manifest import seal
from graftline.merging.masks import decoupled_weight, load_masks
from graftline.model.backbone import make_tiny
from tests.graftline.pico_models import pico_base, pico_llava, pico_voxtral


def _tuned(model: Any, seed: int) -> Any:
    """The same LLM after it learned something."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    return tuned


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `seeing` and `hearing` that were trained from it and taken apart."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "tiny", seed=0)
    base = pico_base(folder / "base", folder / "tiny")
    pico_llava(folder / "llava", folder / "tiny", _tuned(base, 3))
    pico_voxtral(folder / "voxtral", folder / "tiny", _tuned(base, 4))
    take_apart(folder / "llava", folder / "seeing")
    take_apart(folder / "voxtral", folder / "hearing")
    return folder


def _shown(asker: Asker, folder: Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "picture.png")
    sound = generator.integers(-9000, 9000, 2_560, dtype=np.int16)
    (folder / "sound.wav").write_bytes(encode_wav(sound))
    files = {"image": folder / "picture.png", "audio": folder / "sound.wav"}
    return {name: asker.show([asker.read(file, name)], [file])[0] for name, file in files.items()}


def test_mmer_gives_each_medium_what_its_own_model_learned(made: Path, tmp_path: Path) -> None:
    models = [made / "seeing", made / "hearing"]
    combine(made / "base", models, tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "both")  # encoders are found from the model's own folder
    described = read_description(tmp_path / "both")
    assert (described.method, described.order) == ("mmer", ("image", "audio"))
    assert described.text == "modality", "beside a picture alone, text is the pictures' model's"
    parts = read_bundle(tmp_path / "both")
    assert load_parts(parts).model.modality_numbers.keys() == {"image", "audio"}
    places = json.loads((tmp_path / "both/experts.json").read_text())
    start, shared, *experts = (
        load_file(folder / "model.safetensors")
        for folder in (made / "base", parts.backbone, *(model / "backbone" for model in models))
    )
    scales = json.loads((parts.backbone / "merge.json").read_text())["scales"]
    name = "model.layers.0.mlp.up_proj.weight"
    for own, modality in enumerate(("image", "audio")):
        masks = load_masks(parts.backbone / "masks" / f"expert-{places[modality]}.safetensors")
        scale = scales[name][places[modality]]
        found = decoupled_weight(start[name], shared[name], masks[name], scale)
        distances = [float((found - expert[name]).norm()) for expert in experts]
        assert distances[own] == min(distances), "its tokens meet its own model's weights"
    asker = Asker(parts)
    shown = _shown(asker, tmp_path)
    turns = [[Turn(tuple(shown[name] for name in names), "What is this?")] for names in (
        ("image",), ("audio",), ("image", "audio")
    )]  # fmt: skip
    answers = asker.answer(turns)
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)


def test_a_base_in_shards_and_the_members_own_template(made: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(made / "base").save_pretrained(
        tmp_path / "base", max_shard_size="50KB"
    )
    for file in (made / "base").glob("token*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "base" / "original").mkdir()
    (tmp_path / "base" / "original" / "consolidated.00.pth").write_bytes(b"a pickle")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    models = [made / "seeing", made / "hearing"]
    report = combine(tmp_path / "base", models, tmp_path / "both")
    assert not (tmp_path / "both/base/original").exists()
    assert report.warnings == ()
    asker = Asker(read_bundle(tmp_path / "both"))
    shown = _shown(asker, tmp_path)
    assert len(asker.answer([[Turn((shown["image"],), "What is this?")]])) == 1
    other = tmp_path / "hearing"
    shutil.copytree(made / "hearing", other)
    (other / "backbone/chat_template.jinja").write_text("{{ messages[0].content }}")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").unlink()
    kept = ("format", "kind", "fingerprint", "parameters", "parents", "code")
    seal(other, {key: manifest[key] for key in kept})
    report = combine(made / "base", [made / "seeing", other], tmp_path / "unlike", rule="average")
    assert "hearing: had another chat template than seeing" in report.warnings[-1]
    template = "backbone/chat_template.jinja"
    assert (tmp_path / "unlike" / template).read_text() == (made / "seeing" / template).read_text()


def test_one_backbone_for_all_is_their_average(made: Path, tmp_path: Path) -> None:
    models = [made / "seeing", made / "hearing"]
    combine(made / "base", models, tmp_path / "both", rule="average")
    parts = read_bundle(tmp_path / "both")
    assert parts.base is None
    found = load_file(parts.backbone / "model.safetensors")
    first, second = (load_file(model / "backbone/model.safetensors") for model in models)
    for name, value in found.items():
        wanted = ((first[name].double() + second[name].double()) / 2).to(value.dtype)
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
    asker = Asker(parts)
    shown = _shown(asker, tmp_path)
    assert len(asker.answer([[Turn(tuple(shown.values()), "What is this?")]])) == 1
    for modality, model in zip(("image", "audio"), models, strict=True):
        file = f"connectors/connector-{modality}.safetensors"
        assert (tmp_path / "both" / file).read_bytes() == (model / file).read_bytes()


def test_what_a_killed_combination_left_goes_with_the_next(made: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = temporary_sibling(tmp_path / "both")
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    other = tmp_path / left.name.replace("both", "another")
    for folder in (left, other):
        folder.mkdir()
    combine(made / "base", [made / "seeing", made / "hearing"], tmp_path / "both")
    assert {path.name for path in tmp_path.iterdir()} == {"both", other.name}


def test_what_cannot_become_one_is_refused_at_once(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(GraftlineError, match="image: both .*seeing and .*seeing take it"):
        combine(made / "base", [made / "seeing", made / "seeing"], out)
    with pytest.raises(GraftlineError, match="one model is no combination"):
        combine(made / "base", [made / "seeing"], out)
    combine(made / "base", [made / "seeing", made / "hearing"], tmp_path / "both")
    with pytest.raises(GraftlineError) as both:
        combine(made / "base", [tmp_path / "both", made / "hearing"], out)
    assert "meet weights of their own already" in str(both.value)
    assert "audio: both" in str(both.value), "all problems at once"
    pico_base(tmp_path / "other", made / "tiny")
    weights = load_file(tmp_path / "other/model.safetensors")
    from safetensors.torch import save_file

    torch.manual_seed(9)
    drawn = {name: torch.randn_like(value) * value.std() for name, value in weights.items()}
    save_file(drawn, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraftlineError, match="times the base's norm away"):
        combine(tmp_path / "other", [made / "seeing", made / "hearing"], out)
    assert not out.exists()


def test_the_command_says_what_comes_next(made: Path, tmp_path: Path) -> None:
    folders = [str(made / name) for name in ("base", "seeing", "hearing")]
    out = str(tmp_path / "both")
    result = CliRunner().invoke(app, ["combine", *folders, "--out", out, "--set", "density=0.5"])
    assert result.exit_code == 0, result.output
    assert f"2 models in one; graftline ask {out}" in result.output.replace("\n", "")
    record = json.loads((tmp_path / "both/backbone/merge.json").read_text())
    assert record["request"]["parameters"]["density"] == 0.5


def test_who_has_no_tokenizer_is_told_before_anything_is_merged(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "llava", tmp_path / "llava")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "llava" / name).unlink()
    take_apart(tmp_path / "llava", tmp_path / "mute")
    words = r"mute/backbone: has no tokenizer.*with tokenizer\.json"
    with pytest.raises(GraftlineError, match=words):
        Asker(read_bundle(tmp_path / "mute")).encode([Turn((), "What is this?")])
    merge = "graftline.exchange.combining.merge_checkpoints"
    monkeypatch.setattr(merge, lambda _: pytest.fail("was merged"))
    with pytest.raises(GraftlineError, match=words):
        combine(made / "base", [made / "hearing", tmp_path / "mute"], tmp_path / "both")
    assert not (tmp_path / "both").exists()
