"""Frozen encoders of `transformers`: CLIP, SigLIP, DINO, Whisper, wav2vec 2.0, VideoMAE and so on.

A model of several towers (CLIP, CLAP, Whisper) gives the one that sees the media. Pictures are
prepared by the model's own processor in its PIL variant, sounds by its feature extractor: both are
plain numpy, and need neither torchvision nor torchaudio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftline.data.rows import SAMPLE_RATE
from graftline.encoders.arrays import pooled
from graftline.errors import GraftlineError
from graftline.model.building import BUILDING
from graftline.model.pretrained import needs_remote_code
from graftline.settings.models import TransformersEncoder

_AT_ONCE = 16
"""Pictures, sounds or videos in one forward pass."""
FRAMES = 4
"""Of a video, where the encoder sees single pictures and the recipe says nothing."""
_TOWERS: Mapping[str, tuple[str, ...]] = {
    "image": ("vision_model", "vision_tower", "visual"),
    "video": ("video_model", "vision_model", "vision_tower", "visual"),
    "audio": ("audio_model", "audio_tower"),
}
_UNUSED = ("pooler.", "head.")
"""Parts behind the hidden states; checkpoints often come without them."""


class TransformersTower:
    """Media to the hidden states of one tower of a `transformers` model.

    Args:
        settings: of the recipe.
        media: image, audio or video.
        folder: the model, with its processor's configuration.
        name: what people read.
        sha256: identity of weights and settings.
        device: where to compute.

    Raises:
        GraftlineError: weights are missing or of another shape, the processor's configuration is
            not there, or the model does not take such media.
    """

    MEDIA = ("image", "audio", "video")

    def __init__(
        self,
        settings: TransformersEncoder,
        media: str,
        folder: Path,
        name: str,
        sha256: str,
        device: torch.device,
    ) -> None:
        self.name, self.sha256 = name, sha256
        self._settings, self._media, self._device = settings, media, device
        self._tower = _load_tower(folder, media, settings.trust_remote_code, name).to(device)
        self._sees_videos = media == "video" and hasattr(self._tower.config, "num_frames")
        self._processor = _load_processor(folder, media, settings.trust_remote_code, name)
        if media == "audio" and settings.seconds is None and not _window(self._processor):
            raise GraftlineError(
                f"{name}: takes sounds of any length, and its features would be as many; set "
                "seconds of the encoder"
            )
        probe = self._features([self._silence()])
        self.tokens, self.width = int(probe.shape[1]), int(probe.shape[2])

    @torch.no_grad()
    def encode(self, media: Sequence[np.ndarray]) -> Tensor:
        """Encodes decoded media.

        Args:
            media: as `graftline.data.rows.decode` gives them: uint8 (height, width, 3), float32
                (samples,) at 16 kHz, or uint8 (frames, height, width, 3).

        Returns:
            (batch, tokens, width) float32 on the CPU.

        Raises:
            GraftlineError: a medium has other axes, or becomes another number of tokens.
        """
        found = []
        for start in range(0, len(media), _AT_ONCE):
            features = self._features(media[start : start + _AT_ONCE])
            if features.shape[1:] != (self.tokens, self.width):
                raise GraftlineError(
                    f"{self.name}: gave {tuple(features.shape[1:])} tokens and width; expected "
                    f"{(self.tokens, self.width)}. It sees media of different sizes differently; "
                    "set tokens of the encoder"
                )
            found.append(features)
        return torch.cat(found)

    @torch.no_grad()
    def _features(self, media: Sequence[np.ndarray]) -> Tensor:
        check_axes(media, self._media, self.name)
        prepare = {"image": self._pictures, "video": self._videos, "audio": self._sounds}
        name, inputs, parts = prepare[self._media](media)
        output = self._tower(**{name: inputs.to(self._device)}, output_hidden_states=True)
        layer = self._settings.layer
        hidden = output.last_hidden_state if layer is None else self._layer(output, layer)
        if hidden.ndim != 3:
            raise GraftlineError(
                f"{self.name}: its hidden states have {hidden.ndim} axes; expected (batch, "
                "positions, width). Convolutional encoders are used with source: python"
            )
        chosen = self._chosen(hidden)
        chosen = chosen.reshape(len(media), parts * chosen.shape[1], chosen.shape[2])
        tokens = self._settings.tokens
        return (pooled(chosen, tokens) if tokens else chosen).float().cpu()

    def _layer(self, output: Any, layer: int) -> Tensor:
        states = output.hidden_states
        if not -len(states) <= layer < len(states):
            raise GraftlineError(
                f"{self.name}: layer {layer}; its hidden states are 0 to {len(states) - 1}"
            )
        found: Tensor = states[layer]
        return found

    def _chosen(self, hidden: Tensor) -> Tensor:
        """The positions that the recipe wants, of (batch, positions, width)."""
        if self._media == "audio" and self._settings.seconds and _window(self._processor):
            # A short sound stands at the start of a long window; the rest is silence.
            share = min(1.0, self._settings.seconds / _window(self._processor))
            hidden = hidden[:, : max(1, round(hidden.shape[1] * share))]
        pooling = self._settings.pooling
        if pooling == "patches":
            return hidden[:, 1:]
        if pooling == "first":
            return hidden[:, :1]
        return hidden.mean(1, keepdim=True) if pooling == "mean" else hidden

    def _pictures(self, media: Sequence[np.ndarray]) -> tuple[str, Tensor, int]:
        """Argument, pixel values (batch, 3, height, width), pictures a medium."""
        return "pixel_values", self._pixels(list(media)), 1

    def _videos(self, media: Sequence[np.ndarray]) -> tuple[str, Tensor, int]:
        if not self._sees_videos:
            count = self._settings.frames or FRAMES
            frames = [frame for video in media for frame in evenly(video, count)]
            return "pixel_values", self._pixels(frames), count
        count = int(self._tower.config.num_frames)
        videos = [self._pixels(list(evenly(video, count))) for video in media]
        stacked = torch.cat([each if each.ndim == 5 else each[None] for each in videos])
        return str(self._tower.main_input_name), stacked, 1

    def _pixels(self, pictures: list[NDArray[np.uint8]]) -> Tensor:
        prepared = self._processor(pictures, return_tensors="pt", input_data_format="channels_last")
        pixels: Tensor = prepared["pixel_values"]
        return pixels

    def _sounds(self, media: Sequence[np.ndarray]) -> tuple[str, Tensor, int]:
        rate, seconds = int(self._processor.sampling_rate), self._settings.seconds
        sounds = [_fitted(_at_rate(sound, rate), rate, seconds) for sound in media]
        prepared = self._processor(sounds, sampling_rate=rate, return_tensors="pt")
        name = str(self._processor.model_input_names[0])
        return name, prepared[name], 1

    def _silence(self) -> np.ndarray:
        """A medium that shows how many tokens one becomes."""
        if self._media == "audio":
            return np.zeros(round((self._settings.seconds or 1.0) * SAMPLE_RATE), np.float32)
        return np.zeros((64, 64, 3) if self._media == "image" else (2, 64, 64, 3), np.uint8)


def check_axes(media: Sequence[np.ndarray], kind: str, called: str) -> None:
    """Refuses media that are empty or have other axes than their kind.

    Raises:
        GraftlineError: names the medium's place in the batch and its shape.
    """
    axes = {"image": 3, "video": 4, "audio": 1}[kind]
    for number, values in enumerate(media):
        if values.ndim != axes or 0 in values.shape:
            raise GraftlineError(
                f"medium {number} of the batch has the shape {values.shape}; {called} takes "
                f"{kind} with {axes} axes"
            )


def evenly(video: np.ndarray, count: int) -> np.ndarray:
    """`count` frames of a video, evenly spread from the first to the last; short ones repeat."""
    chosen: np.ndarray = video[np.linspace(0, len(video) - 1, count).round().astype(int)]
    return chosen


def _window(processor: Any) -> float:
    """Seconds that an extractor fills every sound up to; 0 where it takes them as they are."""
    return float(getattr(processor, "chunk_length", 0) or 0)


def _at_rate(sound: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return sound
    from scipy.signal import resample_poly

    common = gcd(rate, SAMPLE_RATE)
    resampled: np.ndarray = resample_poly(sound, rate // common, SAMPLE_RATE // common)
    return resampled.astype(np.float32)


def _fitted(sound: np.ndarray, rate: int, seconds: float | None) -> np.ndarray:
    """A sound cut, or filled with silence, to a length."""
    if seconds is None:
        return sound
    fitted = np.zeros(round(seconds * rate), np.float32)
    kept = sound[: len(fitted)]
    fitted[: len(kept)] = kept
    return fitted


def _load_tower(folder: Path, media: str, code: bool, called: str) -> Any:
    """The tower that sees the media, float32, in eval mode, without gradients, strictly loaded."""
    if needs_remote_code(folder) and not code:
        hint = (
            "; its config.json names Python of its own, which is run only where trust_remote_code "
            "of the recipe and GRAFTLINE_TRUST_REMOTE_CODE=1 both ask for it"
        )
    else:
        hint = ""
    with BUILDING:
        from transformers import AutoModel

        auto: Any = AutoModel
        model, information = attempt(
            lambda: auto.from_pretrained(
                str(folder),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that they are reported below, by name
                output_loading_info=True,
            ),
            f"{called}: cannot be read as a `transformers` model{hint}",
        )
    tower, prefix = _tower_of(model, media)
    _check_weights(information, prefix, called)
    return tower.eval().requires_grad_(False)


def _tower_of(model: Any, media: str) -> tuple[Any, str]:
    """The tower for a kind of media, and how its weights' names begin."""
    for name in _TOWERS[media]:
        if hasattr(model, name):
            return getattr(model, name), f"{name}."
    if getattr(model.config, "is_encoder_decoder", False):
        return model.encoder, "encoder."
    return model, ""


def _check_weights(information: Mapping[str, Any], prefix: str, called: str) -> None:
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(_name(key) for key in information.get(what) or ())
        found = [n for n in names if n.startswith(prefix) and not _unused(n.removeprefix(prefix))]
        if found:
            raise GraftlineError(
                f"{called}: {what.replace('_', ' ')} in the weights of the encoder: "
                f"{', '.join(found[:5])} ({len(found)} in all). They would be random; the weights "
                "do not belong to config.json"
            )


def _name(key: Any) -> str:
    return str(key[0]) if isinstance(key, tuple) else str(key)


def _unused(name: str) -> bool:
    return name.startswith(_UNUSED)


def _load_processor(folder: Path, media: str, code: bool, called: str) -> Any:
    with BUILDING:
        import transformers

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": code}
        if media == "audio":
            loader: Any = transformers.AutoFeatureExtractor
        else:
            loader = transformers.AutoImageProcessor
            options["backend"] = "pil"
        return attempt(
            lambda: loader.from_pretrained(str(folder), **options),
            f"{called}: how its media are prepared cannot be read (preprocessor_config.json)",
        )


def attempt(load: Callable[[], Any], complaint: str) -> Any:
    """What `load` gives; a library's own errors, of many kinds, become one with the complaint."""
    try:
        return load()
    except Exception as error:
        text = str(error).strip().splitlines() or [repr(error)]
        raise GraftlineError(f"{complaint} ({text[0]})") from error
