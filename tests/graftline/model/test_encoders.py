from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from graftline.data.parts import EFFICIENTNET_LITE0, WHISPER_TINY_EN, fetch
from graftline.errors import GraftlineError
from graftline.model.efficientnet import IMAGE_MAPS, EfficientNetLite0
from graftline.model.encoders import ENCODERS, Encoder, load_encoder
from graftline.model.point_sets import BasisPointSetEncoder
from graftline.model.whisper import read_ctranslate2, whisper_state


def _image(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def _video(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


def _clip(generator: np.random.Generator) -> np.ndarray:
    return generator.uniform(-0.5, 0.5, 16_000).astype(np.float32)


def _cloud(generator: np.random.Generator) -> np.ndarray:
    return generator.standard_normal((200, 3)).astype(np.float32)


MEDIA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "efficientnet-lite0": _image,
    "efficientnet-lite0-frames": _video,
    "whisper-tiny.en": _clip,
    "basis-point-set": _cloud,
}


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    torch.set_num_threads(1)
    return {name: load_encoder(name) for name in ENCODERS}


@pytest.mark.parametrize("name", sorted(MEDIA))
def test_shape_and_determinism(name: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[name]
    generator = np.random.default_rng(0)
    media = [MEDIA[name](generator) for _ in range(3)]
    features = encoder.encode(media)
    assert features.shape == (3, encoder.tokens, encoder.width)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, encoder.encode(media))
    torch.testing.assert_close(encoder.encode(media[1:2])[0], features[1], rtol=1e-4, atol=1e-3)
    assert len(encoder.sha256) == 64


def test_every_encoder_has_another_identity(encoders: dict[str, Encoder]) -> None:
    assert len({encoder.sha256 for encoder in encoders.values()}) == len(encoders)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(GraftlineError, match="did you mean 'whisper-tiny.en'"):
        load_encoder("whisper-tiny")


@pytest.mark.parametrize("name", sorted(MEDIA))
def test_wrong_media_are_refused(name: str, encoders: dict[str, Encoder]) -> None:
    with pytest.raises(GraftlineError):
        encoders[name].encode([np.zeros((5, 7), dtype=np.float64)])


def test_folded_network_equals_the_package(encoders: dict[str, Encoder]) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    weights = fetch(EFFICIENTNET_LITE0)
    network = EfficientNet.from_name("efficientnet-lite0", image_size=IMAGE_MAPS.size)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    pixels = torch.randint(0, 256, (2, 48, 48, 3), generator=torch.Generator().manual_seed(1))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        x = ((pixels / 255 - mean) / deviation).permute(0, 3, 1, 2)
        x = torch.relu(network._bn0(network._conv_stem(x))).clamp(max=6)
        maps = []
        for index, block in enumerate(network._blocks[:11]):
            x = block(x)
            if index in IMAGE_MAPS.blocks:
                maps.append(x)
        ours = EfficientNetLite0(weights, IMAGE_MAPS)(pixels.to(torch.uint8))
    expected = torch.cat(maps, dim=1).flatten(2).transpose(1, 2)  # 48 pixels: 3 x 3 as it is
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_frames_tell_left_from_right(encoders: dict[str, Encoder]) -> None:
    video = np.zeros((6, 64, 64, 3), dtype=np.uint8)
    for index in range(6):
        video[index, 20:44, 6 * index : 6 * index + 24] = 255
    there, back = encoders["efficientnet-lite0-frames"].encode([video, video[::-1].copy()])
    half = there.shape[1] // 2
    torch.testing.assert_close(there[:, :half], back[:, :half], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(there[:, half:], -back[:, half:], rtol=1e-3, atol=1e-3)
    assert there[:, half:].abs().max() > 1


def test_whisper_has_the_encoders_keys_and_trained_values() -> None:
    state = whisper_state(fetch(WHISPER_TINY_EN))
    assert len(state) == 4 + 1 + 2 + 4 * 15
    assert state["embed_positions.weight"].shape == (1500, 384)
    # Whisper's positions are sinusoids: sine in the first half, cosine in the second.
    torch.testing.assert_close(
        state["embed_positions.weight"][0], torch.cat([torch.zeros(192), torch.ones(192)])
    )


def test_whisper_separates_a_tone_from_noise(encoders: dict[str, Encoder]) -> None:
    generator = np.random.default_rng(3)
    seconds = np.arange(16_000) / 16_000
    tones = [0.3 * np.sin(2 * np.pi * pitch * seconds) for pitch in (440, 466)]
    noises = [0.3 * generator.standard_normal(16_000) for _ in range(2)]
    media = [clip.astype(np.float32) for clip in tones + noises]
    features = encoders["whisper-tiny.en"].encode(media).flatten(1)
    distance = torch.cdist(features, features)
    assert max(distance[0, 1], distance[2, 3]) < distance[:2, 2:].min()


def _ctranslate2(names: list[str]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(names))
    for name in names:
        values = np.arange(6, dtype="<f2").tobytes()
        data += text(name) + struct.pack("<BIIBI", 2, 2, 3, 4, len(values)) + values
    return data


def test_ctranslate2_layout(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(_ctranslate2(["encoder/a", "decoder/b"]))
    variables = read_ctranslate2(path, "encoder/")
    assert list(variables) == ["encoder/a"]
    assert variables["encoder/a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_broken_ctranslate2_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(_ctranslate2(["encoder/a"])[:-3])
    with pytest.raises(GraftlineError, match=r"model\.bin.*truncated"):
        read_ctranslate2(path)
    path.write_bytes(b"\x01" * 100)
    with pytest.raises(GraftlineError, match="not a CTranslate2 model"):
        read_ctranslate2(path)
    path.write_bytes(_ctranslate2(["encoder/a"]))
    with pytest.raises(GraftlineError, match="num_heads"):
        whisper_state(path)


def test_foreign_image_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"layer.weight": torch.zeros(2)}, path)
    with pytest.raises(GraftlineError, match=r"weights\.pth"):
        EfficientNetLite0(path, IMAGE_MAPS)


def test_point_sets_ignore_place_size_and_order() -> None:
    encoder = BasisPointSetEncoder(torch.device("cpu"))
    generator = np.random.default_rng(5)
    cloud = _cloud(generator)
    moved = (generator.permutation(cloud) * 4 + np.array([10, -3, 2])).astype(np.float32)
    first, second = encoder.encode([cloud, moved])
    torch.testing.assert_close(first[:, :152], second[:, :152], rtol=1e-3, atol=1e-3)


def test_point_sets_magnitudes_do_not_change_when_turned_by_one_step() -> None:
    encoder = BasisPointSetEncoder(torch.device("cpu"))
    cloud = _cloud(np.random.default_rng(6)) * np.array([3, 1, 1], dtype=np.float32)
    turn = 2 * np.pi * 3 / 16
    matrix = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    first, second = encoder.encode([cloud, (cloud @ np.array(matrix).T).astype(np.float32)])
    torch.testing.assert_close(first[:, 128:152], second[:, 128:152], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(first[:, :128], second[:, :128], atol=0.05)


@pytest.mark.parametrize("cloud", [np.zeros((4, 3)), np.full((4, 3), np.nan), np.zeros((0, 3))])
def test_impossible_clouds_are_refused(cloud: np.ndarray) -> None:
    with pytest.raises(GraftlineError):
        BasisPointSetEncoder(torch.device("cpu")).encode([cloud])
