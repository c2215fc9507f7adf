"""Encoders of timm, from pico models in the hub's layout."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graftline.encoders import describe_encoder, encoder_problem, open_encoder, timm_models
from graftline.errors import GraftlineError
from graftline.settings.models import TimmEncoder

SIZE = 32
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": SIZE, "patch_size": 8, "depth": 2}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": SIZE,
            "embed_dim": 12,
            "depths": (1, 1),
            "num_heads": (2, 2),
            "window_size": 4,
        },
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if problem := timm_models.timm_problem():
        pytest.skip(problem)
    import timm
    from timm.models import save_for_hf

    root = tmp_path_factory.mktemp("timm")
    for name, (architecture, settings) in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, pretrained=False, num_classes=5, **settings)
        model.pretrained_cfg["input_size"] = (3, SIZE, SIZE)
        config = {"model_args": settings, "num_classes": 5}
        save_for_hf(model, root / name, model_config=config, safe_serialization=True)
        for pickle in (root / name).glob("*.bin"):
            pickle.unlink()
    return {name: root / name for name in MODELS}


def _open(folder: Path, media: str = "image", **more):
    settings = TimmEncoder(source="timm", folder=str(folder), **more)
    assert encoder_problem(settings, media) is None
    return open_encoder(describe_encoder(settings, media))


def _pictures(count: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (40, 31, 3), dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "settings", "tokens", "width"),
    [
        ("vit", {}, 16, 192),
        ("vit", {"pooling": "all"}, 17, 192),
        ("vit", {"pooling": "mean"}, 1, 192),
        ("vit", {"layer": -2, "tokens": 4}, 4, 192),
        ("convnext", {}, 1, 16),
        ("swin", {}, 16, 24),
    ],
)
def test_pictures_become_tokens(folders, name, settings, tokens, width) -> None:
    encoder = _open(folders[name], **settings)
    assert (encoder.tokens, encoder.width) == (tokens, width)
    pictures = _pictures()
    found = encoder.encode(pictures)
    assert found.shape == (3, tokens, width) and found.dtype == torch.float32
    assert torch.equal(found, encoder.encode(pictures))
    assert not torch.equal(found[0], found[1])


def test_features_are_those_that_timm_itself_gives(folders) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model(f"local-dir:{folders['vit']}", pretrained=True).eval()
    prepare = create_transform(**resolve_data_config({}, model=model))
    pixels = torch.stack([prepare(Image.fromarray(each)) for each in _pictures()])
    with torch.no_grad():
        wanted = model.forward_features(pixels)
    torch.testing.assert_close(_open(folders["vit"], pooling="all").encode(_pictures()), wanted)


def test_a_video_is_its_frames(folders) -> None:
    video = np.stack(_pictures(5))
    encoder = _open(folders["vit"], "video", frames=2)
    single = _open(folders["vit"])
    frames = single.encode([video[0], video[4]]).flatten(0, 1)
    torch.testing.assert_close(encoder.encode([video])[0], frames)


def test_what_is_no_timm_model_is_refused(folders, tmp_path) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "other")
    (folder / "config.json").write_text('{"architecture": "vit_of_nobody"}')
    with pytest.raises(GraftlineError, match="other: cannot be read as a timm model"):
        _open(folder)
    with pytest.raises(GraftlineError, match="no hidden states of layer 7"):
        _open(folders["vit"], layer=7)
    audio = encoder_problem(TimmEncoder(source="timm", folder=str(folder)), "audio")
    assert audio == "source: timm encodes image, video, not audio"


def test_without_timm_the_recipe_is_told_what_to_install(tmp_path, monkeypatch) -> None:
    for name in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, name, None)
    problem = encoder_problem(TimmEncoder(source="timm", folder=str(tmp_path)), "image")
    assert problem is not None and "graftline[timm]" in problem
