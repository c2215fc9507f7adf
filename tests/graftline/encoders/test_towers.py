"""Encoders of `transformers`, loaded as a user's are, from pico models of the same classes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.encoders import describe_encoder, encoder_problem, open_encoder
from graftline.errors import GraftlineError
from graftline.settings.models import TransformersEncoder
from tests.graftline.pico_models import (
    WIDTH,
    pickled,
    pico_clip,
    pico_siglip,
    pico_videomae,
    pico_whisper,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    made = {
        "clip": pico_clip, "siglip": pico_siglip, "whisper": pico_whisper, "videomae": pico_videomae
    }  # fmt: skip
    return {name: make(root / name) for name, make in made.items()}


def _settings(folder: Path, **more) -> TransformersEncoder:
    return TransformersEncoder(source="transformers", folder=str(folder), **more)


def _open(folder: Path, media: str, **more):
    return open_encoder(describe_encoder(_settings(folder, **more), media))


def _media(kind: str, count: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    if kind == "audio":
        return [generator.uniform(-0.5, 0.5, 16_000).astype(np.float32) for _ in range(count)]
    shape = (40, 31, 3) if kind == "image" else (7, 20, 31, 3)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "media", "settings", "tokens"),
    [
        ("clip", "image", {}, 10),
        ("clip", "image", {"layer": -2, "pooling": "patches"}, 9),
        ("clip", "image", {"pooling": "first"}, 1),
        ("clip", "image", {"pooling": "patches", "tokens": 3}, 3),
        ("clip", "video", {"frames": 2, "pooling": "first"}, 2),
        ("clip", "video", {"pooling": "mean"}, 4),
        ("siglip", "image", {"pooling": "mean"}, 1),
        ("whisper", "audio", {}, 100),
        ("whisper", "audio", {"seconds": 1, "tokens": 5}, 5),
        ("whisper", "audio", {"seconds": 0.5}, 25),
        ("videomae", "video", {}, 8),
    ],
)
def test_media_become_tokens(folders, name, media, settings, tokens):
    encoder = _open(folders[name], media, **settings)
    given = _media(media)
    features = encoder.encode(given)
    assert (encoder.tokens, encoder.width) == (tokens, WIDTH)
    assert features.shape == (3, tokens, WIDTH)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, encoder.encode(given))
    assert not torch.allclose(features[0], features[1])
    torch.testing.assert_close(encoder.encode(given[1:2])[0], features[1], rtol=1e-4, atol=1e-5)
    assert not any(module.startswith("torchvision") for module in sys.modules)


def test_the_vision_tower_alone_says_what_clip_says(folders):
    from transformers import CLIPModel

    whole = CLIPModel.from_pretrained(folders["clip"]).eval()
    encoder = _open(folders["clip"], "image", layer=-2)
    pixels = encoder._pixels(_media("image"))
    with torch.no_grad():
        states = whole.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.encode(_media("image")), states[-2])


def test_many_media_are_encoded_in_parts(folders):
    encoder = _open(folders["clip"], "image", pooling="first")
    given = _media("image", 35)
    torch.testing.assert_close(
        encoder.encode(given)[33:], encoder.encode(given[33:]), rtol=1e-4, atol=1e-5
    )


def test_identity_follows_content_and_settings(folders, tmp_path):
    def digest(folder, **more):
        return describe_encoder(_settings(folder, **more), "image")["sha256"]

    first = digest(folders["clip"])
    moved = shutil.copytree(folders["clip"], tmp_path / "moved")
    assert digest(moved) == first  # where it lies does not matter
    assert digest(folders["clip"], layer=-2) != first
    expected = {"parameters": 1, "positions": 1, "width": 1}
    assert digest(folders["clip"], expected=expected) == first  # only a plan reads it
    weights = load_file(moved / "model.safetensors")
    weights["visual_projection.weight"] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert digest(moved) != first


def test_a_folder_changed_since_the_plan_is_refused(folders, tmp_path):
    moved = shutil.copytree(folders["clip"], tmp_path / "moved")
    recorded = describe_encoder(_settings(moved), "image")
    pico_clip(tmp_path / "wider", hidden_size=40)
    shutil.rmtree(moved)
    shutil.copytree(tmp_path / "wider", moved)
    with pytest.raises(GraftlineError, match="changed since the run was planned"):
        open_encoder(recorded)


def test_missing_and_foreign_weights_are_named(folders, tmp_path):
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    for what in ("missing", "mismatched"):
        moved = shutil.copytree(folders["clip"], tmp_path / what)
        weights = load_file(moved / "model.safetensors")
        if what == "missing":
            del weights[name]
        else:
            weights[name] = torch.zeros(3, 5)
        save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(GraftlineError, match=f"{what} keys.*{name}"):
            _open(moved, "image")


def test_weights_of_an_unused_tower_may_be_missing(folders, tmp_path):
    moved = shutil.copytree(folders["clip"], tmp_path / "vision")
    weights = load_file(moved / "model.safetensors")
    kept = {name: value for name, value in weights.items() if name.startswith("vision_model.")}
    assert len(kept) < len(weights)
    save_file(kept, moved / "model.safetensors", metadata={"format": "pt"})
    given = _media("image")
    assert torch.equal(
        _open(moved, "image").encode(given), _open(folders["clip"], "image").encode(given)
    )


def test_pickled_weights_are_refused(folders, tmp_path):
    old = pickled(folders["clip"], tmp_path / "old")
    with pytest.raises(GraftlineError, match=r"pickled weights only \(pytorch_model.bin\)"):
        describe_encoder(_settings(old), "image")
    (old / "pytorch_model.bin").unlink()
    with pytest.raises(GraftlineError, match="holds no weights"):
        describe_encoder(_settings(old), "image")


def test_hub_names_are_pinned(folders, tmp_path, monkeypatch):
    free = TransformersEncoder(source="transformers", name="openai/pico-clip")
    assert "not pinned (no revision is given)" in str(encoder_problem(free, "image"))
    branch = free.model_copy(update={"revision": "main"})
    assert "'main' is no commit" in str(encoder_problem(branch, "image"))
    with pytest.raises(GraftlineError, match="not pinned"):
        open_encoder(describe_encoder(branch, "image"))
    pinned = free.model_copy(update={"revision": COMMIT})
    assert encoder_problem(pinned, "image") is None
    cache = tmp_path / "hub"
    snapshot = cache / "models--openai--pico-clip" / "snapshots" / COMMIT
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GraftlineError, match="cannot be fetched from the hub"):
        open_encoder(describe_encoder(pinned, "image"))
    shutil.copytree(folders["clip"], snapshot)
    given = _media("image")
    found = open_encoder(describe_encoder(pinned, "image"))
    assert torch.equal(found.encode(given), _open(folders["clip"], "image").encode(given))


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own-encoder"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, pixel_values, output_hidden_states=False):
        from transformers.modeling_outputs import BaseModelOutput
        return BaseModelOutput(last_hidden_state=pixel_values.flatten(2) * self.scale)
"""


def test_code_beside_weights_runs_only_if_recipe_and_environment_ask(
    folders, tmp_path, monkeypatch
):
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "own_model.py").write_text(REMOTE)
    names = {"AutoConfig": "own_model.OwnConfig", "AutoModel": "own_model.OwnModel"}
    config = {"model_type": "own-encoder", "auto_map": names, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"scale": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folders["clip"] / "preprocessor_config.json", folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.delenv("GRAFTLINE_TRUST_REMOTE_CODE", raising=False)
    with pytest.raises(GraftlineError, match="trust_remote_code of the recipe and GRAFTLINE"):
        _open(folder, "image")
    asked = _settings(folder, trust_remote_code=True)
    assert "the recipe asks to run Python" in str(encoder_problem(asked, "image"))
    with pytest.raises(GraftlineError, match="the recipe asks to run Python"):
        open_encoder(describe_encoder(asked, "image"))
    monkeypatch.setenv("GRAFTLINE_TRUST_REMOTE_CODE", "1")
    with pytest.raises(GraftlineError, match="trust_remote_code of the recipe and GRAFTLINE"):
        _open(folder, "image")
    assert encoder_problem(asked, "image") is None
    recorded = describe_encoder(asked, "image")
    assert open_encoder(recorded).encode(_media("image")).shape == (3, 3, 24 * 24)
    (folder / "own_model.py").write_text(REMOTE + "# changed\n")
    with pytest.raises(GraftlineError, match="changed since the run was planned"):
        open_encoder(recorded)


def test_what_does_not_fit_is_said(folders, tmp_path):
    with pytest.raises(GraftlineError, match="layer 7; its hidden states are 0 to 2"):
        _open(folders["clip"], "image", layer=7)
    with pytest.raises(GraftlineError, match="takes image with 3 axes"):
        _open(folders["clip"], "image").encode([np.zeros((5, 7), np.uint8)])
    assert "not point_cloud" in str(encoder_problem(_settings(folders["clip"]), "point_cloud"))
    bare = shutil.copytree(folders["clip"], tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(GraftlineError, match=r"preprocessor_config\.json"):
        _open(bare, "image")
