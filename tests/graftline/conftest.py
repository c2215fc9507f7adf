"""A tiny real model with made-up features: everything but the encoders, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from graftline.model.backbone import load_backbone, make_tiny
from graftline.sharing.store import CACHE_VARIABLE, SharedStore
from graftline.stores import open_store
from tests.object_store import BUCKET, s3_server

WORDS = ("red", "green", "blue", "black")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "backbone"
    make_tiny(folder, seed=0)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path):
    return load_backbone(tiny_folder, torch.float32, "eager")


@pytest.fixture(scope="session")
def features_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A features artifact of one modality: four classes, far apart, with noise."""
    folder = tmp_path_factory.mktemp("features")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(len(WORDS), 3, 8, generator=generator)
    for split, count in (("train", 48), ("validation", 16), ("test", 16)):
        classes = [row % len(WORDS) for row in range(count)]
        noise = 0.1 * torch.randn(count, 3, 8, generator=generator)
        target = folder / split
        target.mkdir()
        values = {"features": (centres[classes] + noise).to(torch.float16)}
        save_file(values, target / "features.safetensors")
        ids = [f"image-{split}-{row:05d}" for row in range(count)]
        record = {"encoder": "made-up", "sha256": "0" * 64, "ids": ids}
        (target / "rows.json").write_text(json.dumps(record))
        rows = [
            {
                "id": name,
                "task": ("question", "caption")[(row // len(WORDS)) % 2],
                "question": ("What?", "Tell me.")[(row // len(WORDS)) % 2],
                "answers": [
                    (WORDS[kind], f"It is {WORDS[kind]} all over.")[(row // len(WORDS)) % 2]
                ],
            }
            for row, (name, kind) in enumerate(zip(ids, classes, strict=True))
        ]
        pq.write_table(pa.Table.from_pylist(rows), target / "rows.parquet")
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[dict[str, str]]:
    """The environment that leads to an S3-speaking server."""
    with s3_server() as environment:
        yield environment


@pytest.fixture
def url(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store on that server."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "machine"))
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens the store as another machine does: without this one's copies."""

    def reopen(url: str, name: str = "other") -> SharedStore:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        store = open_store(url)
        assert isinstance(store, SharedStore)
        return store

    return reopen
