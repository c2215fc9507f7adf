"""Streamed merges of what does not fit, is damaged, or is cut short: refused by name, or whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftline.merging.compatibility import CannotMergeCheckpoints
from graftline.merging.reading import BLOCK
from graftline.merging.streaming import MergeRequest, merge_checkpoints
from tests.graftline.merging import checkpoint_maker as maker
from tests.graftline.merging.folders import files_of, refused, tensors_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, list[Path]]:
    return maker.trio(tmp_path_factory.mktemp("models"))


# --- refusals ------------------------------------------------------------------------------


def test_every_problem_is_named_at_once(tmp_path):
    start = maker.weights(0)
    base = maker.write(tmp_path / "base", start)
    first = maker.weights(1, base=start)
    first["model.norm.weight"] = torch.zeros(17, dtype=torch.bfloat16)
    first["model.embed_tokens.weight"] = torch.zeros(64, 16, dtype=torch.bfloat16)
    first["strange.weight"] = torch.zeros(2)
    second = maker.weights(2, base=start)
    del second["lm_head.weight"]
    experts = [maker.write(tmp_path / "e1", first), maker.write(tmp_path / "e2", second)]
    text = refused(base, experts, tmp_path / "out")
    assert text.startswith("4 problem(s), nothing was written")
    assert "e1: model.norm.weight has shape [17], the base [16]" in text
    assert "e1: model.embed_tokens.weight has shape [64, 16]" in text
    assert "resize_token_embeddings" in text
    assert "e1: strange.weight is not in the base" in text
    assert "e2: lacks lm_head.weight" in text


def test_renamed_keys_are_recognised(tmp_path):
    start = maker.weights(0)
    base = maker.write(tmp_path / "base", start)
    moved = {f"language_model.{n}": t for n, t in maker.weights(1, base=start).items()}
    expert = maker.write(tmp_path / "e", moved)
    text = refused(base, [expert], tmp_path / "out")
    assert "tensors begin with 'language_model' where the base has ''" in text
    assert text.startswith("1 problem(s)") or "shares no" in text


def test_an_empty_intersection_is_refused(tmp_path):
    base = maker.write(tmp_path / "base", {"a": torch.zeros(2)})
    expert = maker.write(tmp_path / "e", {"a": torch.zeros(2)})
    text = refused(base, [expert], tmp_path / "out", keep={"a": None})
    assert "shares no floating-point tensor" in text


def test_damaged_files_are_named(models, tmp_path):
    base, _ = models
    start = tensors_of(base)
    cut = maker.write(tmp_path / "cut", start, shards=2)
    shard = cut / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    absent = maker.write(tmp_path / "absent", start, shards=3)
    (absent / "model-00002-of-00003.safetensors").unlink()
    garbage = maker.write(tmp_path / "garbage", start)
    (garbage / "model.safetensors").write_bytes(b"\xff" * 100)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    index = maker.write(tmp_path / "index", start, shards=2)
    (index / "model.safetensors.index.json").write_text("{")
    experts = [cut, absent, garbage, pickled, index, tmp_path / "nowhere"]
    text = refused(base, experts, tmp_path / "out")
    assert "model-00001-of-00002.safetensors: its tensors need" in text and "cut off?" in text
    assert "model-00002-of-00003.safetensors: is missing" in text
    assert "garbage/model.safetensors: its safetensors header is cut off or damaged" in text
    assert "pytorch_model.bin are pickles" in text
    assert "index.json: is no index of shards" in text
    assert "nowhere: no such folder" in text


@pytest.mark.parametrize("rule", ["average", "ties", "mmer"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_nan_and_infinity_leave_nothing_behind(models, tmp_path, rule, scope):
    base, experts = models
    ill = tensors_of(experts[0])
    ill["model.norm.weight"][3] = float("nan")
    ill["model.layers.0.mlp.up_proj.weight"][-1, -1] = float("-inf")
    expert = maker.write(tmp_path / "ill", ill)
    parameters = {} if rule == "average" else {"scope": scope}
    with pytest.raises(CannotMergeCheckpoints) as error:
        merge_checkpoints(MergeRequest(rule, base, (expert,), tmp_path / "out", parameters))
    assert len(error.value.problems) == 2
    assert "model.norm.weight holds NaN or infinity" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ill"]


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path):
    base = maker.write(tmp_path / "base", {"a": torch.full((3,), 60000.0, dtype=torch.float16)})
    expert = maker.write(tmp_path / "e", {"a": torch.full((3,), 65000.0, dtype=torch.float16)})
    request = MergeRequest("task-arithmetic", base, (expert,), tmp_path / "o", {"scale": 5.0})
    with pytest.raises(CannotMergeCheckpoints, match="too large for F16"):
        merge_checkpoints(request)


def test_integers_must_agree_and_vocabularies_too(tmp_path):
    base = maker.write(tmp_path / "base", {"w": torch.zeros(2), "ids": torch.arange(3)})
    expert = maker.write(tmp_path / "e", {"w": torch.ones(2), "ids": torch.arange(1, 4)})
    swapped = {**maker.VOCABULARY, "token0": 1, "token1": 0}
    tokenizer = {"model": {"vocab": swapped}, "added_tokens": []}
    (expert / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = refused(base, [expert], tmp_path / "out")
    assert "ids (I64) differs from the base's" in text
    assert "2 tokens ('token0', 'token1' ...) have other numbers" in text


def test_foreign_files_and_inputs_are_never_overwritten(models, tmp_path):
    base, experts = models
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "holds thesis.tex" in refused(base, experts, out)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert "is an input" in refused(base, experts, experts[0])
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a folder" in refused(base, experts, file)


def test_a_full_disk_is_seen_before(models, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "the result needs 0.1 GB" in refused(*models, tmp_path / "out")


def test_a_failed_write_stops_the_merge(models, tmp_path, monkeypatch):
    from graftline.errors import GraftlineError
    from graftline.merging.writing import Writing

    def fail(self, name, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writing, "_append", fail)
    with pytest.raises(GraftlineError, match="No space left"):
        merge_checkpoints(MergeRequest("average", models[0], tuple(models[1]), tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# --- crashes and memory --------------------------------------------------------------------


def test_a_merge_killed_anywhere_is_repeated_whole(tmp_path):
    maker.trio(tmp_path)
    done = subprocess.run(
        [sys.executable, maker.__file__, str(tmp_path), "7", "10"],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    killed = json.loads(done.stdout)
    assert len(killed) >= 10
    whole = files_of(tmp_path / "whole")
    experts = (tmp_path / "e1", tmp_path / "e3")
    for number in killed:
        out = tmp_path / f"killed-{number}"
        assert not out.exists() or files_of(out) == whole  # never a third thing
        merge_checkpoints(
            MergeRequest("mmer", tmp_path / "base", experts, out, shard_bytes=100_000)
        )
        assert files_of(out) == whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


_MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from graftline.merging.streaming import *
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1])
folder, rule, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
peak, going = [anonymous()], True
def watch():
    while going:
        peak.append(anonymous()); time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
experts = tuple(folder / f"e{n}" for n in range(count))
merge_checkpoints(MergeRequest(rule, folder / "base", experts, folder / f"{rule}-{count}"))
going = False; thread.join()
print(max(peak) - peak[0])
"""


@pytest.mark.parametrize("rule", ["average", "ties"])
def test_memory_does_not_grow_with_the_number_of_experts(tmp_path, rule):
    """Sparse files of one large tensor: 32 MB in bf16."""
    elements = 1 << 24
    for name in ("base", *(f"e{n}" for n in range(6))):
        folder = maker.write(tmp_path / name, {"w": torch.zeros(1, dtype=torch.bfloat16)})
        header = json.dumps(
            {"w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]}}
        ).encode()
        with open(folder / "model.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write((1 if name == "base" else 2).to_bytes(2, "little"))
            file.truncate(8 + len(header) + 2 * elements)
    peaks = {}
    for count in (1, 6):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(tmp_path), rule, str(count)],
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            check=True,
        )
        peaks[count] = int(done.stdout) / 1024
    assert peaks[6] < 300, peaks
    assert peaks[6] < peaks[1] + 40, peaks
    assert BLOCK % 8 == 0  # masks are packed by the byte
