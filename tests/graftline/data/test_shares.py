"""Features in shares: the same bytes for any number of processes, and after any interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from graftline.data import shares
from graftline.data.features import FeatureTable
from graftline.data.shares import FEATURES_FILE, encode_share, join_shares, share_of
from graftline.errors import GraftlineError
from graftline.team import Team, joined

ROWS = Dataset.from_dict({"id": [f"row-{i}" for i in range(83)], "media": list(range(83))})
DESCRIBED = {"encoder": "made-up", "sha256": "0" * 64}


class Stopped(Exception):
    """Somebody pulled the plug."""


class Encoder:
    """Each row becomes its number and what it shares a batch with; stops after some batches."""

    def __init__(self, batches: int = 1000) -> None:
        self.batches, self.encoded = batches, 0

    def __call__(self, names: Sequence[str], media: Sequence[int]) -> torch.Tensor:
        if self.batches == 0:
            raise Stopped
        self.batches -= 1
        self.encoded += len(names)
        values = torch.tensor([[number, media[0]] for number in media])
        return values[:, None, :].expand(-1, 3, -1).half()


@pytest.fixture(autouse=True)
def records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_RECORD_EVERY", 3)


def _whole(folder: Path, size: int = 1) -> bytes:
    for rank in reversed(range(size)):
        with joined(Team(rank, size)):
            encode_share(ROWS, Encoder(), folder / str(size), batch=4)
    with joined(Team(0, size)):
        join_shares(folder / str(size), folder / f"out-{size}", DESCRIBED)
    return (folder / f"out-{size}" / FEATURES_FILE).read_bytes()


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    wanted = _whole(tmp_path)
    table = FeatureTable(tmp_path / "out-1")
    assert table.ids == ROWS["id"][:] and table.shape == (83, 3, 2)
    assert table[50].tolist() == [[50.0, 48.0]] * 3
    for size in (2, 3, 30):  # 30: more than there are batches
        assert _whole(tmp_path, size) == wanted, size
        assert FeatureTable(tmp_path / f"out-{size}").ids == table.ids


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_shares_are_whole_batches_and_cover_all_rows(size: int) -> None:
    found: list[int] = []
    for rank in range(size):
        with joined(Team(rank, size)):
            own = share_of(83, 4)
            assert own.start % 4 == 0 or not own
            found += own
    assert found == list(range(83))


def test_whoever_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    wanted, folder, encoded = _whole(tmp_path), tmp_path / "stopped", []
    for batches in (5, 2, 7, 1000):
        encoder, done = Encoder(batches), []
        try:
            encode_share(ROWS, encoder, folder, batch=4, progress=done.append)
        except Stopped:
            pass
        encoded.append(encoder.encoded)
    assert encoded[:3] == [20, 8, 28] and encoded[3] == 83 - 36, "from the last record, 12 + 24"
    assert done[0] == 36 and sum(done) == 83, "what was done before is told"
    join_shares(folder, tmp_path / "out", DESCRIBED)
    assert (tmp_path / "out" / FEATURES_FILE).read_bytes() == wanted


def test_rows_behind_the_record_are_not_trusted_nor_is_a_damaged_record(tmp_path: Path) -> None:
    wanted, folder = _whole(tmp_path), tmp_path / "torn"
    with pytest.raises(Stopped):
        encode_share(ROWS, Encoder(8), folder, batch=4)
    (stem,) = {file.with_suffix("") for file in folder.iterdir()}
    with stem.with_suffix(".bin").open("ab") as values, stem.with_suffix(".ids").open("a") as ids:
        values.write(b"torn")
        ids.write('"half a na')
    encode_share(ROWS, Encoder(), folder, batch=4)
    join_shares(folder, tmp_path / "out", DESCRIBED)
    assert (tmp_path / "out" / FEATURES_FILE).read_bytes() == wanted
    stem.with_suffix(".json").write_text('{"rows": 24')
    again = Encoder()
    encode_share(ROWS, again, folder, batch=4)
    assert again.encoded == 83


def test_a_finished_share_is_not_encoded_again(tmp_path: Path) -> None:
    encode_share(ROWS, Encoder(), tmp_path, batch=4)
    told: list[tuple[int, int]] = []
    encode_share(ROWS, Encoder(0), tmp_path, batch=4, seen=lambda *shape: told.append(shape))
    assert told == [(3, 2)]


def test_shares_of_other_shapes_are_refused(tmp_path: Path) -> None:
    for rank, tokens in enumerate((3, 5)):
        with joined(Team(rank, 2)):
            encode_share(
                ROWS, lambda names, _, t=tokens: torch.ones(len(names), t, 2).half(), tmp_path,
                batch=4,
            )  # fmt: skip
    with joined(Team(0, 2)), pytest.raises(GraftlineError, match="3 tokens .* and 5 tokens"):
        join_shares(tmp_path, tmp_path / "out", DESCRIBED)


def test_what_is_joined_is_plain_safetensors(tmp_path: Path) -> None:
    _whole(tmp_path, 2)
    assert load_file(tmp_path / "out-2" / FEATURES_FILE)["features"].dtype == torch.float16
    described = json.loads((tmp_path / "out-2" / "rows.json").read_text())
    assert described["encoder"] == "made-up" and len(described["ids"]) == 83
