"""Media that several machines encode, each its share: the bytes that one machine makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftline.asking.asker import Asker
from graftline.asking.media import Medium
from graftline.asking.parts import Parts
from graftline.data import shares
from graftline.errors import GraftlineError
from graftline.planning.plan import Step
from graftline.planning.run import plan_run
from graftline.settings.reading import load_recipe
from graftline.steps import features
from graftline.steps.execution import execute
from graftline.steps.features import encode_share, publish_rows
from graftline.steps.work import Machine
from graftline.store import Store
from tests.graftline.made_up import SPLITS, TINY, point_clouds

COUNT = 3


@pytest.fixture
def step(tmp_path: Path) -> Step:
    files = point_clouds(tmp_path / "data")
    recipe = load_recipe(TINY, {"order": ["point_cloud"], "data.rows": None})
    run = plan_run(recipe, {"point_cloud": files})
    return next(each for each in run.steps.values() if each.kind == "features")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the rows that were encoded, as they are."""
    done: list[str] = []
    compute = features.compute_features

    def noting(rows: Any, kind: str, encoder: Any, *others: Any, **named: Any) -> None:
        class Noting:
            name, sha256 = encoder.name, encoder.sha256
            tokens, width = encoder.tokens, encoder.width

            def encode(self, media: Any) -> Any:
                done.append(str(len(media)))
                return encoder.encode(media)

        compute(rows, kind, Noting(), *others, **named)

    monkeypatch.setattr(features, "compute_features", noting)
    return done


def _rows(encoded: list[str]) -> int:
    count = sum(map(int, encoded))
    encoded.clear()
    return count


def _bytes(folder: Path) -> dict[str, bytes]:
    names = ("features.safetensors", "rows.json", "rows.parquet")
    return {
        f"{split}/{name}": (folder / split / name).read_bytes()
        for split in SPLITS
        for name in names
    }


def test_three_machines_make_what_one_makes_and_none_works_twice(
    tmp_path: Path, url: str, elsewhere: Any, step: Step, encoded: list[str]
) -> None:
    alone = execute(step, Store(tmp_path / "alone"), Machine(tmp_path / "data", "cpu"))
    total = _rows(encoded)
    publish_rows(step, elsewhere(url, "laptop"), Machine(tmp_path / "data"))
    worker = Machine(tmp_path / "nowhere", "cpu", feature_shares=COUNT)
    counts = []
    for number in (3, 1, 2):
        store = elsewhere(url, f"machine {number}")
        encode_share(step, store, worker, number)
        counts.append(_rows(encoded))
        assert not list(store.root.glob(".work/*/*/share-*")), "what is sent does not stay here"
        encode_share(step, elsewhere(url, "another"), worker, number)
        assert _rows(encoded) == 0, "another machine finds it done"
    assert sum(counts) == total and all(counts)
    joined = execute(step, elsewhere(url, "fourth"), worker)
    assert _rows(encoded) == 0, "shares are joined, not encoded again"
    assert _bytes(joined.folder) == _bytes(alone.folder)
    assert not store._objects.find(f"{url}/.checkpoints"), "shares go when they are joined"
    encode_share(step, elsewhere(url, "late"), worker, 1)
    assert _rows(encoded) == 0


def test_a_share_that_was_stopped_goes_on_and_what_is_missing_is_encoded(
    tmp_path: Path, url: str, elsewhere: Any, step: Step, encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    alone = execute(step, Store(tmp_path / "alone"), Machine(tmp_path / "data", "cpu"))
    total = _rows(encoded)
    machine = Machine(tmp_path / "data", "cpu", feature_shares=COUNT)
    store = elsewhere(url, "one")
    keep = shares._keep

    def stops(stem: Path, *others: Any) -> None:
        keep(stem, *others)
        if stem.parent.name == "train":
            raise KeyboardInterrupt

    monkeypatch.setattr(shares, "_keep", stops)
    with pytest.raises(KeyboardInterrupt):
        encode_share(step, store, machine, 2)
    monkeypatch.setattr(shares, "_keep", keep)
    before = _rows(encoded)
    assert before
    encode_share(step, store, machine, 2)
    found = execute(step, store, machine)  # shares 1 and 3 went to nobody
    assert before + _rows(encoded) == total
    assert _bytes(found.folder) == _bytes(alone.folder)


@pytest.mark.parametrize("suffix", [".bin", ".ids"])
@pytest.mark.parametrize("left", [None, 0, 10])
def test_a_share_that_holds_less_than_it_says_is_encoded_anew(
    tmp_path: Path, step: Step, suffix: str, left: int | None
) -> None:
    alone = execute(step, Store(tmp_path / "alone"), Machine(tmp_path / "data", "cpu"))
    machine = Machine(tmp_path / "data", "cpu", feature_shares=COUNT)
    store = Store(tmp_path / "store")
    encode_share(step, store, machine, 2)
    (record,) = tmp_path.rglob("train/share-2-*.json")
    if left is None:
        record.with_suffix(suffix).unlink()
    else:
        with record.with_suffix(suffix).open("r+b") as stream:
            stream.truncate(left)
    found = execute(step, store, machine)
    assert _bytes(found.folder) == _bytes(alone.folder)


def test_a_machine_with_other_data_takes_the_rows_of_the_run(
    tmp_path: Path, url: str, elsewhere: Any, step: Step
) -> None:
    publish_rows(step, elsewhere(url, "laptop"), Machine(tmp_path / "data"))
    old = tmp_path / "old"
    point_clouds(old)
    (old / "point_cloud/test.parquet").write_bytes(b"of last year")
    found = execute(step, elsewhere(url, "worker"), Machine(old, "cpu"))
    alone = execute(step, Store(tmp_path / "alone"), Machine(tmp_path / "data", "cpu"))
    assert _bytes(found.folder) == _bytes(alone.folder)
    with pytest.raises(GraftlineError, match=r"point_cloud/test.parquet changed while"):
        execute(step, Store(tmp_path / "other"), Machine(old, "cpu"))


def test_a_machine_without_data_and_rows_says_so(
    tmp_path: Path, url: str, elsewhere: Any, step: Step
) -> None:
    machine = Machine(tmp_path / "nowhere", "cpu", feature_shares=COUNT)
    with pytest.raises(GraftlineError, match="neither in .*nowhere on this machine nor"):
        encode_share(step, elsewhere(url), machine, 1)


def test_rows_that_changed_are_not_published(
    tmp_path: Path, url: str, elsewhere: Any, step: Step
) -> None:
    file = tmp_path / "data/point_cloud/test.parquet"
    file.write_bytes((tmp_path / "data/point_cloud/train.parquet").read_bytes())
    with pytest.raises(GraftlineError, match=r"point_cloud/test.parquet changed while"):
        publish_rows(step, elsewhere(url), Machine(tmp_path / "data"))


def test_features_are_computed_and_asked_for_in_float32(
    tmp_path: Path, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch's own accord a GPU's convolutions would be in TensorFloat-32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    execute(step, Store(tmp_path / "alone"), Machine(tmp_path / "data", "cpu"))
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    name, nowhere = "point_cloud", Path("nowhere")
    encoders = {name: step.parameters["encoder"]}
    asker = Asker(Parts("it", nowhere, {name: nowhere}, encoders, "float32", "auto", "", 4), "cpu")
    asker.show([Medium(name, np.eye(3, dtype=np.float32))], [nowhere])
    assert not torch.backends.cudnn.allow_tf32
