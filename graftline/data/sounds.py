"""Sounds of the starter: General MIDI instruments and effects from real samples (TimGM6mb)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftline.data import wording
from graftline.data.drawing import check_sizes, class_of, make_row, random_of
from graftline.data.encoding import encode_wav
from graftline.data.parts import TIMGM6MB, fetch
from graftline.data.rows import SAMPLE_RATE, SPLITS, Row
from graftline.errors import GraftlineError

SECONDS = 1.0
PROGRAMS = {
    "piano": 0,
    "bell": 14,
    "organ": 19,
    "guitar": 24,
    "violin": 40,
    "drum": 47,
    "choir": 52,
    "trumpet": 56,
    "saxophone": 66,
    "flute": 73,
    "helicopter": 125,
    "crowd": 126,
}
"""Name and General MIDI program (counted from 0)."""
LOWEST = {"low": 46, "middle": 61, "high": 76}
"""Lowest MIDI key of each register; a gap lies between two registers."""
KEYS = 12
_SHARES = {"train": 7, "validation": 2, "test": 3}
_SOUNDING = {"short": (0.30, 0.40), "long": (0.75, 0.90)}
_LATEST_START = 0.08
_FADE_SECONDS = 0.03
_OVERSAMPLING = 2
_FLUSH_SECONDS = 0.1
_TAPS = 63


def _half_band() -> NDArray[np.float64]:
    """Return a low-pass filter (Blackman window) for halving the sample rate."""
    place = np.arange(_TAPS) - (_TAPS - 1) / 2
    taps: NDArray[np.float64] = np.sinc(place * 0.92 / _OVERSAMPLING) * np.blackman(_TAPS)
    taps /= taps.sum()
    return taps


def keys_of(split: str, program: int, register: str, seed: int) -> list[int]:
    """Return the MIDI keys of a register that one split may use with one program.

    Raises:
        GraftlineError: The split is unknown.
    """
    if split not in _SHARES:
        raise GraftlineError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    order = random_of(seed, "keys", program, register).permutation(KEYS) + LOWEST[register]
    first = sum(
        share for name, share in _SHARES.items() if SPLITS.index(name) < SPLITS.index(split)
    )
    return sorted(int(key) for key in order[first : first + _SHARES[split]])


class Player:
    """Renders single notes; a note does not depend on what was played before.

    Args:
        sound_font: Path of the SoundFont file.

    Raises:
        GraftlineError: tinysoundfont is not installed; says how.
    """

    def __init__(self, sound_font: Path) -> None:
        try:
            from tinysoundfont import Synth
        except ModuleNotFoundError as error:
            raise GraftlineError(
                "the starter's sounds are rendered by tinysoundfont, which is not installed: "
                "pip install --no-deps tinysoundfont==0.3.7 (without the pyaudio that it asks for)"
            ) from error

        self._synth: Any = Synth(samplerate=SAMPLE_RATE * _OVERSAMPLING)
        self._font = self._synth.sfload(str(sound_font))
        self._filter = _half_band()

    def play(self, program: int, key: int, velocity: int) -> NDArray[np.float64]:
        """Render the first second of a held note.

        Args:
            program: General MIDI program, counted from 0.
            key: MIDI key.
            velocity: Strength, 1 to 127.

        Returns:
            float64 (SAMPLE_RATE * SECONDS,), mono, peak 1.

        Raises:
            GraftlineError: The note is silent.
        """
        rate = SAMPLE_RATE * _OVERSAMPLING
        self._synth.sounds_off()
        self._synth.generate(int(_FLUSH_SECONDS * rate))  # the last note's voices still fade
        self._synth.program_select(0, self._font, 0, program)
        self._synth.noteon(0, key, velocity)
        stereo = np.frombuffer(self._synth.generate(int(SECONDS * rate)), dtype=np.float32)
        mono = stereo.reshape(-1, 2).astype(np.float64).mean(axis=1)
        samples = np.convolve(mono, self._filter, mode="same")[::_OVERSAMPLING]
        peak = float(np.abs(samples).max())
        if peak < 1e-4:
            raise GraftlineError(f"program {program} is silent at key {key}")
        return samples / peak


def gate(
    samples: NDArray[np.float64], start: float, sounding: float, level: float
) -> NDArray[np.int16]:
    """Place a note in the clip and cut it off.

    Args:
        samples: float64 (samples,), peak 1.
        start: Seconds of silence before the note.
        sounding: Seconds until the note fades out.
        level: Peak of the clip, 0 to 1.

    Returns:
        int16 (samples,) of the same length.
    """
    count = len(samples)
    seconds = np.arange(count) / SAMPLE_RATE
    shape = np.clip((sounding + _FADE_SECONDS - seconds) / _FADE_SECONDS, 0.0, 1.0)
    silent = round(start * SAMPLE_RATE)
    clip = np.concatenate([np.zeros(silent), samples * shape])[:count]
    return np.round(clip * level * 32767).astype(np.int16)


def generate(split_sizes: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Generate the audio rows: 1 s WAV at 16 kHz, twelve sounds in three registers.

    Args:
        split_sizes: Rows of each split.
        seed: Which notes serve which split, and how they are played.

    Returns:
        The rows of each split; no (program, key) serves two splits.

    Raises:
        GraftlineError: A size is not positive, or a split is unknown.
    """
    check_sizes(split_sizes)
    player = Player(fetch(TIMGM6MB))
    names = list(PROGRAMS)
    rows: dict[str, list[Row]] = {split: [] for split in split_sizes}
    for split, size in split_sizes.items():
        for index in range(size):
            rng = random_of(seed, "audio", split, index)
            name = names[class_of(index, len(names))]
            register = wording.REGISTERS[int(rng.integers(len(wording.REGISTERS)))]
            length = wording.LENGTHS[int(rng.integers(len(wording.LENGTHS)))]
            keys = keys_of(split, PROGRAMS[name], register, seed)
            key, velocity = keys[int(rng.integers(len(keys)))], int(rng.integers(60, 128))
            shortest, longest = _SOUNDING[length]
            clip = gate(
                player.play(PROGRAMS[name], key, velocity),
                start=_LATEST_START * float(rng.random()),
                sounding=shortest + (longest - shortest) * float(rng.random()),
                level=0.3 + 0.6 * float(rng.random()),
            )
            question = (wording.QUESTION, name)
            captions = (wording.CAPTION, wording.audio_captions(name, register, length))
            source = f"timgm6mb:program={PROGRAMS[name]}:key={key}"
            media = encode_wav(clip)
            rows[split].append(make_row("audio", split, index, media, source, question, captions))
    return rows
