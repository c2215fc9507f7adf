"""Checkpoints in an object store: the same merge, and nothing read that it does not need."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flows.merging import merge
from graftline.errors import GraftlineError
from graftline.merging import elsewhere as objects
from graftline.merging.elsewhere import RangedObject
from tests.graftline.merging import checkpoint_maker as maker
from tests.graftline.merging.folders import files_of

QUIET = Console(quiet=True)
TOWER = 4 * 1000 * 500


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A base with a tower, and two experts with towers of their own."""
    start = maker.weights(0)
    made = {}
    for number, name in enumerate(("base", "one", "two")):
        weights = maker.weights(number, base=start) if number else start
        tower = {"tower.w": torch.full((1000, 500), float(number))}
        made[name] = maker.write(tmp_path / name, {**weights, **tower})
    return made


@pytest.fixture
def there(sources: dict[str, Path], url: str) -> dict[str, str]:
    import s3fs

    files = s3fs.S3FileSystem(use_listings_cache=False)
    for name, folder in sources.items():
        files.put(f"{folder}/", f"{url}/{name}/", recursive=True)
    return {name: f"{url}/{name}" for name in sources}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of weights that were read, by URL."""
    found: dict[str, int] = {}
    read = RangedObject.read

    def counting(self: Any, start: int, count: int) -> bytes:
        got = read(self, start, count)
        found[self._url] = found.get(self._url, 0) + len(got)
        return got

    monkeypatch.setattr(RangedObject, "read", counting)
    return found


def _merge(rule: str, named: dict[str, Any], out: Path, keep: tuple[str, ...] = ("tower.",)) -> Any:
    return merge(
        rule, str(named["base"]), [str(named["one"]), str(named["two"])], out,
        settings=[], keep=keep, seed=0, shard_gigabytes=5.0, console=QUIET,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["average", "ties"])
def test_the_result_is_that_of_folders_and_towers_of_experts_stay_there(
    rule: str,
    sources: dict[str, Path],
    there: dict[str, str],
    reads: dict[str, int],
    tmp_path: Path,
) -> None:
    _merge(rule, sources, tmp_path / "here")
    assert not reads
    _merge(rule, there, tmp_path / "out")
    expected, found = files_of(tmp_path / "here"), files_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name in found.keys() - {"merge.json", "README.md"}:  # they name the inputs
        assert found[name] == expected[name], name
    recorded = json.loads(found["merge.json"])["request"]
    assert [recorded["base"], *recorded["experts"]] == list(there.values())
    for name in ("one", "two"):
        size = (sources[name] / "model.safetensors").stat().st_size
        assert size - TOWER - 2000 < reads[f"{there[name]}/model.safetensors"] < TOWER
    assert reads[f"{there['base']}/model.safetensors"] > TOWER, "the base's own is kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*sources, "here", "out", *(["machine"] if (tmp_path / "machine").exists() else [])]
    )
    assert _merge(rule, there, tmp_path / "out").reused


def test_folders_and_stores_may_be_mixed_and_towers_taken_from_one(
    sources: dict[str, Path], there: dict[str, str], tmp_path: Path
) -> None:
    mixed = {**sources, "two": there["two"]}
    _merge("average", sources, tmp_path / "here", (f"tower.={sources['two']}",))
    _merge("average", mixed, tmp_path / "out", (f"tower.={there['two']}",))
    weights = "model.safetensors"
    assert (tmp_path / "here" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_what_changes_while_it_is_merged_is_refused(
    sources: dict[str, Path], there: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, changed = RangedObject.read, []

    def changing(self: Any, start: int, count: int) -> bytes:
        if threading.current_thread().name == "read-ahead" and not changed:
            changed.append(start)
            import s3fs

            files = s3fs.S3FileSystem(use_listings_cache=False)
            files.put_file(
                str(sources["two"] / "model.safetensors"), f"{there['one']}/model.safetensors"
            )
        return read(self, start, count)

    monkeypatch.setattr(RangedObject, "read", changing)
    with pytest.raises(GraftlineError, match=f"{there['one']}/model.safetensors: changed"):
        _merge("average", there, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trouble_names_what_was_given(
    sources: dict[str, Path], there: dict[str, str], url: str, tmp_path: Path
) -> None:
    with pytest.raises(GraftlineError, match=f"{url}/nowhere: "):
        _merge("average", {**there, "one": f"{url}/nowhere"}, tmp_path / "out")
    with pytest.raises(GraftlineError, match="s3://bucket/prefix with its credentials"):
        _merge("average", {**there, "one": "s3://id:secret@lab/x"}, tmp_path / "out")
    with pytest.raises(GraftlineError, match="name a folder, or s3://"):
        _merge("average", {**there, "one": "https://example.org/x"}, tmp_path / "out")
    import s3fs

    files = s3fs.S3FileSystem(use_listings_cache=False)
    whole = files.cat_file(f"{there['two']}/model.safetensors")
    files.pipe_file(f"{there['two']}/model.safetensors", whole[:-9])
    with pytest.raises(GraftlineError, match=f"{there['two']}/model.safetensors: .*cut off"):
        _merge("average", there, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_there_is_added_to_a_base_there(
    url: str, tmp_path: Path, tiny_folder: Path
) -> None:
    import s3fs
    from peft import LoraConfig, get_peft_model

    from graftline.model.backbone import load_backbone

    model, _ = load_backbone(tiny_folder, torch.float32)
    torch.manual_seed(0)
    adapter = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapter.save_pretrained(tmp_path / "adapter")
    files = s3fs.S3FileSystem(use_listings_cache=False)
    for name, folder in (("base", tiny_folder), ("adapter", tmp_path / "adapter")):
        files.put(f"{folder}/", f"{url}/{name}/", recursive=True)

    def merged(base: object, expert: object, out: Path) -> bytes:
        merge(
            "average", str(base), [str(expert)], out, settings=[], keep=[], seed=0,
            shard_gigabytes=5.0, console=QUIET,
        )  # fmt: skip
        return (out / "model.safetensors").read_bytes()

    here = merged(tiny_folder, tmp_path / "adapter", tmp_path / "here")
    assert merged(f"{url}/base", f"{url}/adapter", tmp_path / "there") == here
    assert objects.is_elsewhere(url)
