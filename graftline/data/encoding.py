"""Encoders whose bytes are the same on every machine: PNG, animated PNG, WAV and PLY.

Compressors differ between versions and processors in what they emit, so that a picture would
have another hash elsewhere. Pixels are therefore stored uncompressed inside the PNG; the
parquet file around it compresses them.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from graftline.data.rows import SAMPLE_RATE

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_STORED_BLOCK = 65_535


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def _stored(data: bytes) -> bytes:
    """Return a zlib stream of stored (uncompressed) blocks, as in RFC 1950 and 1951."""
    blocks = [b"\x78\x01"]
    for start in range(0, len(data), _STORED_BLOCK):
        part = data[start : start + _STORED_BLOCK]
        last = start + _STORED_BLOCK >= len(data)
        blocks.append(struct.pack("<BHH", last, len(part), len(part) ^ 0xFFFF) + part)
    blocks.append(struct.pack(">I", zlib.adler32(data)))
    return b"".join(blocks)


def _pixels(frame: NDArray[np.uint8]) -> bytes:
    """Return the stream of one frame: each line behind its filter byte 0."""
    lines = frame.reshape(frame.shape[0], -1)
    return _stored(np.pad(lines, ((0, 0), (1, 0))).tobytes())


def _header(frame: NDArray[np.uint8]) -> bytes:
    colour = 2 if frame.ndim == 3 else 0
    fields = struct.pack(">IIBBBBB", frame.shape[1], frame.shape[0], 8, colour, 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", fields)


def encode_png(frame: NDArray[np.uint8]) -> bytes:
    """Encode a picture, uint8 (height, width) or (height, width, 3), as a PNG."""
    return _header(frame) + _chunk(b"IDAT", _pixels(frame)) + _chunk(b"IEND", b"")


def encode_animated_png(frames: NDArray[np.uint8], milliseconds: int) -> bytes:
    """Encode a video as an animated PNG that loops for ever.

    Args:
        frames: uint8 (frames, height, width) or (frames, height, width, 3).
        milliseconds: How long each frame is shown.

    Returns:
        The bytes of the file.
    """
    height, width = frames.shape[1:3]
    out = [_header(frames[0]), _chunk(b"acTL", struct.pack(">II", len(frames), 0))]
    sequence = 0
    for index, frame in enumerate(frames):
        control = (sequence, width, height, 0, 0, milliseconds, 1000, 0, 0)
        out.append(_chunk(b"fcTL", struct.pack(">IIIIIHHBB", *control)))
        sequence += 1
        if index == 0:
            out.append(_chunk(b"IDAT", _pixels(frame)))
            continue
        out.append(_chunk(b"fdAT", struct.pack(">I", sequence) + _pixels(frame)))
        sequence += 1
    return b"".join([*out, _chunk(b"IEND", b"")])


def encode_wav(samples: NDArray[np.int16]) -> bytes:
    """Encode mono samples, int16 (samples,) at 16 kHz, as a WAV."""
    data = samples.astype("<i2").tobytes()
    layout = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(layout)) + layout
    body += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def encode_ply(points: NDArray[np.float32]) -> bytes:
    """Encode points, float32 (points, 3), as a binary little-endian PLY."""
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
    header += "property float x\nproperty float y\nproperty float z\nend_header\n"
    return header.encode("ascii") + points.astype("<f4").tobytes()
