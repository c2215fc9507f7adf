"""Audio encoder: the encoder of Whisper tiny.en, frozen, cut to one-second clips.

The weights come from a file in CTranslate2's layout (``model.bin``), which is parsed here and put
under the names of ``transformers``' ``WhisperEncoder``.

Paper: Robust Speech Recognition via Large-Scale Weak Supervision, Radford et al., 2022
(arXiv 2212.04356).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from graftline.errors import GraftlineError

SAMPLE_RATE = 16_000
CLIP_SECONDS = 1
_WIDTH = 384
_LAYERS = 4
_HEADS = 6
_MELS = 80
_POSITIONS_PER_SECOND = 50  # 100 mel frames a second, halved by the second convolution
_DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # CTranslate2's numbers
_SCALAR = "encoder/num_heads"


class _Cursor:
    """Reads CTranslate2's little-endian fields one after another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = memoryview(path.read_bytes())
        self.offset = 0

    def take(self, count: int) -> memoryview:
        end = self.offset + count
        if end > len(self.data):
            raise GraftlineError(
                f"{self.path}: ends at byte {len(self.data)} in the middle of a variable; "
                "the file is truncated, delete it so that it is fetched again"
            )
        view = self.data[self.offset : end]
        self.offset = end
        return view

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))
        return int(value)

    def string(self) -> str:
        raw = bytes(self.take(self.number("H")))
        return raw.rstrip(b"\0").decode("utf-8", errors="replace")


def read_ctranslate2(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Read the variables of a CTranslate2 ``model.bin``.

    Args:
        path: the file.
        prefix: only variables whose names start so are kept.

    Returns:
        Name to array, in the stored dtype; the arrays are views of one read of the file.

    Raises:
        GraftlineError: the file is truncated or not in this layout.
    """
    cursor = _Cursor(path)
    version = cursor.number("I")
    if not 2 <= version <= 6:
        raise GraftlineError(f"{path}: not a CTranslate2 model (its version would be {version})")
    cursor.string()  # name of the spec
    cursor.number("I")  # revision of the spec
    variables: dict[str, np.ndarray] = {}
    for _ in range(cursor.number("I")):
        name = cursor.string()
        shape = tuple(cursor.number("I") for _ in range(cursor.number("B")))
        kind = cursor.number("B")
        raw = cursor.take(cursor.number("I"))
        if not name.startswith(prefix):
            continue
        if kind not in _DTYPES:
            raise GraftlineError(f"{path}: variable {name} has the unknown dtype number {kind}")
        array = np.frombuffer(raw, dtype=_DTYPES[kind])
        if array.size != int(np.prod(shape)):
            raise GraftlineError(f"{path}: {name} holds {array.size} values for shape {shape}")
        variables[name] = array.reshape(shape)
    return variables


def _key_map() -> dict[str, str]:
    """CTranslate2 name to ``transformers`` name, without the fused attention input."""
    ends = {"weight": "weight", "bias": "bias"}
    norms = {"gamma": "weight", "beta": "bias"}
    keys = {"encoder/position_encodings/encodings": "embed_positions.weight"}
    for there, here, names in [
        ("encoder/conv1", "conv1", ends),
        ("encoder/conv2", "conv2", ends),
        ("encoder/layer_norm", "layer_norm", norms),
    ]:
        keys |= {f"{there}/{a}": f"{here}.{b}" for a, b in names.items()}
    for layer in range(_LAYERS):
        for there, here, names in [
            ("self_attention/layer_norm", "self_attn_layer_norm", norms),
            ("self_attention/linear_1", "self_attn.out_proj", ends),
            ("ffn/layer_norm", "final_layer_norm", norms),
            ("ffn/linear_0", "fc1", ends),
            ("ffn/linear_1", "fc2", ends),
        ]:
            keys |= {
                f"encoder/layer_{layer}/{there}/{a}": f"layers.{layer}.{here}.{b}"
                for a, b in names.items()
            }
    return keys


def _split_attention(
    variables: dict[str, np.ndarray], layer: int, path: Path
) -> dict[str, torch.Tensor]:
    """Take the fused query/key/value projection of a layer apart (Whisper's key has no bias)."""
    there = f"encoder/layer_{layer}/self_attention/linear_0"
    try:
        weight, bias = variables.pop(f"{there}/weight"), variables.pop(f"{there}/bias")
    except KeyError as error:
        raise GraftlineError(f"{path}: the variable {error} is missing") from error
    if weight.shape != (3 * _WIDTH, _WIDTH) or bias.shape != (3 * _WIDTH,):
        raise GraftlineError(f"{path}: {there} has shapes {weight.shape} and {bias.shape}")
    if np.any(bias[_WIDTH : 2 * _WIDTH]):
        raise GraftlineError(f"{path}: {there}/bias is not zero for the keys; not Whisper")
    here = f"layers.{layer}.self_attn"
    state = {}
    for index, letter in enumerate("qkv"):
        rows = slice(index * _WIDTH, (index + 1) * _WIDTH)
        state[f"{here}.{letter}_proj.weight"] = torch.from_numpy(weight[rows].astype(np.float32))
        if letter != "k":
            state[f"{here}.{letter}_proj.bias"] = torch.from_numpy(bias[rows].astype(np.float32))
    return state


def whisper_state(path: Path) -> dict[str, torch.Tensor]:
    """Read the encoder of Whisper tiny.en under the names of ``transformers``.

    Args:
        path: ``model.bin`` in CTranslate2's layout.

    Returns:
        The full state dictionary of ``WhisperEncoder``, float32; position embeddings (1500, 384).

    Raises:
        GraftlineError: a variable is missing or left over, or the number of heads is not 6.
    """
    variables = read_ctranslate2(path, "encoder/")
    heads = variables.pop(_SCALAR, None)
    if heads is None or int(heads) != _HEADS:
        raise GraftlineError(f"{path}: {_SCALAR} is {heads}, Whisper tiny.en has {_HEADS}")
    state: dict[str, torch.Tensor] = {}
    for layer in range(_LAYERS):
        state |= _split_attention(variables, layer, path)
    keys = _key_map()
    missing, unexpected = sorted(keys.keys() - variables), sorted(variables.keys() - keys)
    if missing or unexpected:
        raise GraftlineError(
            f"{path}: not the encoder of Whisper tiny.en; "
            f"missing {missing}, unexpected {unexpected}"
        )
    for there, here in keys.items():
        state[here] = torch.from_numpy(variables[there].astype(np.float32))
    return state


def load_whisper_encoder(path: Path, seconds: int = CLIP_SECONDS, layers: int = _LAYERS) -> Any:
    """Build ``transformers``' ``WhisperEncoder`` for clips of a fixed length.

    Args:
        path: ``model.bin`` in CTranslate2's layout.
        seconds: length of a clip; the position embeddings are cut to 50 a second.
        layers: how many of the four layers to keep. With fewer than four, the output is the
            plain hidden state behind the last kept layer, without the final normalisation.

    Returns:
        The encoder in eval mode, float32, without gradients.

    Raises:
        GraftlineError: the file does not hold exactly this encoder.
    """
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    positions = seconds * _POSITIONS_PER_SECOND
    config: Any = WhisperConfig(
        d_model=_WIDTH,
        encoder_layers=_LAYERS,
        encoder_attention_heads=_HEADS,
        encoder_ffn_dim=4 * _WIDTH,
        num_mel_bins=_MELS,
        max_source_positions=positions,
    )
    config._attn_implementation = "sdpa"
    state = whisper_state(path)
    state["embed_positions.weight"] = state["embed_positions.weight"][:positions].clone()
    encoder: Any = WhisperEncoder(config)
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise GraftlineError(f"{path}: not the encoder of Whisper tiny.en ({error})") from error
    if layers < _LAYERS:
        encoder.layers = encoder.layers[:layers]
        encoder.layer_norm = nn.Identity()
    return encoder.eval().requires_grad_(False)


class WhisperAudioEncoder:
    """One-second clips to five tokens: means over 0.2 s of the second layer's output.

    The kind of a sound is read off more easily behind the second layer than behind the fourth,
    which is tuned to words (linear probe on the starter's question task: .955 against .935), and
    half of the layers cost half of the time.

    Args:
        path: ``model.bin`` in CTranslate2's layout.
        sha256: identity of weights and settings, for fingerprints.
        device: where to compute.
    """

    name = "whisper-tiny.en"
    settings = "1 s, 2 layers, 5 means of 10 positions"
    tokens = 5
    width = _WIDTH

    def __init__(self, path: Path, sha256: str, device: torch.device) -> None:
        from transformers import WhisperFeatureExtractor

        extractor: Any = WhisperFeatureExtractor
        self.sha256 = sha256
        self._device = device
        self._extractor = extractor(feature_size=_MELS, chunk_length=CLIP_SECONDS)
        self._encoder = load_whisper_encoder(path, layers=2).to(device)

    def log_mel(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        """Log-mel spectrograms as Whisper was trained on.

        Args:
            media: clips, float32 mono 16 kHz, exactly one second each.

        Returns:
            (batch, 80, 100) float32.

        Raises:
            GraftlineError: a clip has another shape or dtype.
        """
        samples = SAMPLE_RATE * CLIP_SECONDS
        for index, clip in enumerate(media):
            if clip.shape != (samples,) or clip.dtype != np.float32:
                raise GraftlineError(
                    f"clip {index} of the batch is {clip.dtype} {clip.shape}; {self.name} takes "
                    f"float32 ({samples},): mono, 16 kHz, {CLIP_SECONDS} s"
                )
        batch = self._extractor(list(media), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        mel: torch.Tensor = batch["input_features"]
        return mel

    @torch.no_grad()
    def encode(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        """Encode clips.

        Args:
            media: clips, float32 mono 16 kHz, exactly one second each.

        Returns:
            (batch, 5, 384) float32 on the CPU.

        Raises:
            GraftlineError: a clip has another shape or dtype.
        """
        hidden = self._encoder(self.log_mel(media).to(self._device)).last_hidden_state
        pooled: torch.Tensor = hidden.unflatten(1, (self.tokens, -1)).mean(2)
        return pooled.cpu()
