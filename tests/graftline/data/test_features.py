from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from graftline.data.encoding import encode_ply
from graftline.data.features import FEATURES_FILE, FeatureTable, compute_features
from graftline.errors import GraftlineError
from graftline.model.point_sets import BasisPointSetEncoder


class _Poisoned(BasisPointSetEncoder):
    def encode(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        features = super().encode(media)
        features[0, 2, 5] = float("nan")
        return features


@pytest.fixture
def rows() -> Dataset:
    generator = np.random.default_rng(0)
    clouds = [generator.standard_normal((40, 3)).astype(np.float32) for _ in range(7)]
    ids = [f"point_cloud-train-{index}" for index in range(7)]
    return Dataset.from_dict({"id": ids, "media": [encode_ply(cloud) for cloud in clouds]})


@pytest.fixture
def encoder() -> BasisPointSetEncoder:
    return BasisPointSetEncoder(torch.device("cpu"))


def test_round_trip(rows: Dataset, encoder: BasisPointSetEncoder, tmp_path: Path) -> None:
    seen: list[int] = []
    compute_features(
        rows, "point_cloud", encoder, tmp_path, batch=3,
        progress=seen.append,
    )  # fmt: skip
    assert seen == [3, 3, 1]
    table = FeatureTable(tmp_path)
    assert table.ids == rows["id"][:] and table.shape == (7, 8, 184) and len(table) == 7
    assert table.sha256 == encoder.sha256 and table.encoder == "basis-point-set"
    whole = FeatureTable(tmp_path)[0:7]
    assert torch.equal(table[[6, 1, 1]], whole[[6, 1, 1]]) and torch.equal(table[3], whole[3])
    assert table.read([2], torch.bfloat16).dtype == torch.bfloat16
    from graftline.data.rows import decode

    media = [decode(medium, "point_cloud") for medium in rows["media"]]
    torch.testing.assert_close(whole, encoder.encode(media).half().float(), rtol=0, atol=1e-3)


def test_same_bytes_for_any_batch(
    rows: Dataset, encoder: BasisPointSetEncoder, tmp_path: Path
) -> None:
    for batch in (2, 64):
        compute_features(rows, "point_cloud", encoder, tmp_path / str(batch), batch=batch)
    first, second = ((tmp_path / name / FEATURES_FILE).read_bytes() for name in ("2", "64"))
    assert first == second


def test_nan_names_file_and_row(rows: Dataset, tmp_path: Path) -> None:
    encoder = _Poisoned(torch.device("cpu"))
    with pytest.raises(GraftlineError, match=r"features\.safetensors.*point_cloud-train-0"):
        compute_features(rows, "point_cloud", encoder, tmp_path)


def test_nan_on_disk_names_file_and_row(
    rows: Dataset, encoder: BasisPointSetEncoder, tmp_path: Path
) -> None:
    compute_features(rows, "point_cloud", encoder, tmp_path)
    path = tmp_path / FEATURES_FILE
    data = bytearray(path.read_bytes())
    data[-2:] = np.array([np.inf], dtype="<f2").tobytes()  # the last value of the last row
    path.write_bytes(data)
    table = FeatureTable(tmp_path)
    assert table[0].shape == (8, 184)
    with pytest.raises(GraftlineError, match=r"features\.safetensors.*point_cloud-train-6"):
        table[[1, 6]]


def test_damaged_media_name_the_rows(encoder: BasisPointSetEncoder, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"id": ["a", "b"], "media": [b"ply no", b"ply no"]})
    with pytest.raises(GraftlineError, match="row a"):
        compute_features(rows, "point_cloud", encoder, tmp_path)


def test_truncated_features_are_refused(
    rows: Dataset, encoder: BasisPointSetEncoder, tmp_path: Path
) -> None:
    compute_features(rows, "point_cloud", encoder, tmp_path)
    path = tmp_path / FEATURES_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GraftlineError, match="delete it"):
        FeatureTable(tmp_path)
    with pytest.raises(GraftlineError, match="nowhere"):
        FeatureTable(tmp_path / "nowhere")
