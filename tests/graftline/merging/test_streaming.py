"""Merging on the disk: the same bytes as in memory, whole or not at all."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graftline.merging.compatibility import CannotMergeCheckpoints
from graftline.merging.core import Block, Context, added, decoupled
from graftline.merging.masks import decoupled_weight, load_masks
from graftline.merging.reading import BLOCK
from graftline.merging.rules import RULES, parameters_for
from graftline.merging.streaming import MergeRequest, merge_checkpoints

ROOT = Path(__file__).resolve().parents[3]
_MAKER = Path(__file__).with_name("checkpoint_maker.py")
_spec = importlib.util.spec_from_file_location("checkpoint_maker", _MAKER)
maker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(maker)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, list[Path]]:
    return maker.trio(tmp_path_factory.mktemp("models"))


def _load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _refused(base: Path, experts: list[Path], out: Path, **named) -> str:
    """The message of a refusal that left nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(CannotMergeCheckpoints) as error:
        merge_checkpoints(MergeRequest("average", base, tuple(experts), out, **named))
    assert sorted(out.parent.iterdir()) == before
    return str(error.value)


# --- results -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", RULES)
def test_streaming_gives_what_the_rule_gives_in_memory(models, tmp_path, name, scope):
    base, experts = models
    rule = RULES[name]
    scoped = "scope" in rule.parameters.model_fields
    if scope == "tensor" and not scoped:
        pytest.skip("has no scope")
    chosen = {"scope": scope} if scoped else {}
    report = merge_checkpoints(MergeRequest(name, base, tuple(experts), tmp_path / "out", chosen))
    assert (report.merged, report.kept, report.warnings) == (6, 0, ())
    parameters = parameters_for(rule, chosen, 2)
    start, tuned = _load(base), [_load(expert) for expert in experts]
    blocks = [Block(t, tuple(e[n] for e in tuned), t.numel()) for n, t in start.items()]
    found = rule.statistics(lambda: blocks, parameters) if scope == "global" else None
    got = _load(tmp_path / "out")
    assert got.keys() == start.keys()
    masks = [load_masks(p) for p in sorted((tmp_path / "out" / "masks").glob("*"))]
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    for tensor, before in start.items():
        context = Context(tensor, statistics=found)
        merged = rule.merge(before, [e[tensor] for e in tuned], parameters, context)
        assert got[tensor].dtype == before.dtype
        if name == "pcb":  # thresholds on scores, which a vector unit may round in two ways
            torch.testing.assert_close(got[tensor], added(before, merged.tau))
        else:
            assert torch.equal(got[tensor], added(before, merged.tau)), tensor
        for index, mask in enumerate(masks):
            assert torch.equal(mask[tensor], merged.masks[index])
            scale = record["scales"][tensor][index]
            assert scale == pytest.approx(merged.scales[index], rel=1e-9)
            own = decoupled_weight(before, got[tensor], mask[tensor], scale)
            exact = decoupled(before, merged, index)
            torch.testing.assert_close(own, exact, rtol=0.02, atol=1e-4)
    assert len(masks) == (2 if rule.one_per_expert else 0)


def test_average_is_the_nearest_value_in_every_element(models, tmp_path):
    base, experts = models
    merge_checkpoints(MergeRequest("average", base, tuple(experts), tmp_path / "out"))
    first, second = (_load(expert) for expert in experts)
    for name, value in _load(tmp_path / "out").items():
        exact = (first[name].double() + second[name].double()) / 2
        here = (value.double() - exact).abs()
        bits = value.view(torch.int16)
        for neighbour in (bits + 1, bits - 1):
            there = (neighbour.view(torch.bfloat16).double() - exact).abs()
            assert not ((there < here) | ((there == here) & (bits & 1 == 1))).any()


@pytest.mark.parametrize("name", ["average", "ties", "emr", "dare-ties", "mmer"])
def test_neither_shards_nor_threads_nor_order_change_a_byte(models, tmp_path, name):
    base, experts = models
    before, seen = torch.get_num_threads(), []
    try:
        for size, threads, order in ((10**9, 1, 1), (100_000, 3, 1), (20_000, 2, -1)):
            torch.set_num_threads(threads)
            out = tmp_path / str(size)
            chosen = experts[:: order if RULES[name].symmetric else 1]
            merge_checkpoints(
                MergeRequest(name, base, tuple(chosen), out, seed=3, shard_bytes=size)
            )
            seen.append({n: t.view(torch.int16).numpy().tobytes() for n, t in _load(out).items()})
    finally:
        torch.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]


def test_result_is_a_sharded_checkpoint_with_card_and_companions(models, tmp_path):
    base, experts = models
    out = tmp_path / "deep" / "out"
    merge_checkpoints(MergeRequest("ties", base, tuple(experts), out, shard_bytes=100_000))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(maker.SHAPES)
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}
            sizes = [shard.get_tensor(n).numel() * 2 for n in shard.keys()]  # noqa: SIM118
        assert sum(sizes) <= 100_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == 2 * sum(
        int(np.prod(s)) for s in maker.SHAPES.values()
    )
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (out / "tokenizer.json").exists()
    card = (out / "README.md").read_text()
    assert "--rule ties" in card and "arXiv 2306.01708" in card and '"e1"' in card
    record = json.loads((out / "merge.json").read_text())
    import hashlib

    for file, entry in record["files"].items():
        assert hashlib.sha256((out / file).read_bytes()).hexdigest() == entry["sha256"]
    assert not list(out.parent.glob(".tmp-*"))


def test_transformers_reads_the_result(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    tensors = load_file(tiny_folder / "model.safetensors")
    moved = {name: tensor + 0.01 for name, tensor in tensors.items()}
    expert = tmp_path / "expert"
    expert.mkdir()
    save_file(moved, expert / "model.safetensors", metadata={"format": "pt"})
    (expert / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    merge_checkpoints(
        MergeRequest("average", tiny_folder, (expert,), tmp_path / "out", shard_bytes=20_000)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in moved.items())


def test_the_same_request_again_is_a_look(models, tmp_path):
    base, experts = models
    request = MergeRequest("average", base, tuple(experts), tmp_path / "out")
    assert not merge_checkpoints(request).reused
    before = _files(tmp_path / "out")
    assert merge_checkpoints(request).reused
    assert _files(tmp_path / "out") == before
    with pytest.raises(CannotMergeCheckpoints, match="choose an empty folder"):
        merge_checkpoints(dataclasses.replace(request, rule="ties"))
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CannotMergeCheckpoints, match="choose an empty folder"):
        merge_checkpoints(request)


# --- towers, ties, dtypes ------------------------------------------------------------------


def test_what_only_the_base_has_and_kept_prefixes_stay_bit_identical(tmp_path):
    start = maker.weights(0)
    tower = {"tower.w": torch.randn(9, 3), "model.position_ids": torch.arange(7)}
    base = maker.write(tmp_path / "base", {**start, **tower})
    expert = maker.write(tmp_path / "e", maker.weights(1, base=start))
    request = MergeRequest("average", base, (expert,), tmp_path / "o", keep={"model.norm.": None})
    report = merge_checkpoints(request)
    got = _load(tmp_path / "o")
    assert (report.merged, report.kept) == (5, 3)
    for name in ("tower.w", "model.position_ids", "model.norm.weight"):
        assert torch.equal(got[name], {**start, **tower}[name])
        assert got[name].dtype == {**start, **tower}[name].dtype


def test_a_prefix_may_be_kept_from_another_folder(tmp_path):
    start = maker.weights(0)
    tower = {"tower.w": torch.randn(9, 3)}
    base = maker.write(tmp_path / "base", start)
    expert = maker.write(tmp_path / "e", {**maker.weights(1, base=start), **tower})
    assert "tower.w is not in the base" in _refused(base, [expert], tmp_path / "o")
    keep = {"tower.": expert}
    merge_checkpoints(MergeRequest("average", base, (expert,), tmp_path / "o", keep=keep))
    assert torch.equal(_load(tmp_path / "o")["tower.w"], tower["tower.w"])
    text = _refused(base, [expert], tmp_path / "p", keep={"towr.": expert})
    assert "no tensor begins with the kept prefix 'towr.'" in text


def test_a_tied_head_is_understood_whether_stored_or_not(tmp_path):
    tied = {**maker.CONFIG, "tie_word_embeddings": True}
    start = maker.weights(0)
    start["lm_head.weight"] = start["model.embed_tokens.weight"].clone()
    moved = maker.weights(1, base=start)
    moved["lm_head.weight"] = moved["model.embed_tokens.weight"].clone()
    without = {n: t for n, t in start.items() if n != "lm_head.weight"}
    moved_without = {n: t for n, t in moved.items() if n != "lm_head.weight"}
    bare = maker.write(tmp_path / "bare", without, config=tied)
    stored = maker.write(tmp_path / "stored", start, config=tied)
    expert = maker.write(tmp_path / "e", moved, config=tied)
    expert_bare = maker.write(tmp_path / "eb", moved_without, config=tied)
    loose = maker.write(tmp_path / "loose", maker.weights(2, base=start))
    merge_checkpoints(MergeRequest("average", bare, (expert,), tmp_path / "o1"))
    assert _load(tmp_path / "o1").keys() == without.keys()
    merge_checkpoints(MergeRequest("average", stored, (expert_bare,), tmp_path / "o2"))
    got = _load(tmp_path / "o2")
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert "untie the base or tie the expert" in _refused(bare, [loose], tmp_path / "o3")


def test_dtypes_may_differ_and_the_base_decides(tmp_path):
    start = maker.weights(0)
    base = maker.write(tmp_path / "base", start)
    moved = maker.weights(1, torch.float32, base=start)
    expert = maker.write(tmp_path / "e", moved)
    half = maker.write(tmp_path / "h", maker.weights(2, torch.float16, base=start))
    report = merge_checkpoints(MergeRequest("average", base, (expert, half), tmp_path / "o"))
    assert any("holds F32 where the base has BF16" in warning for warning in report.warnings)
    got, halves = _load(tmp_path / "o"), _load(half)
    for name, value in got.items():
        exact = (moved[name].double() + halves[name].double()) / 2
        assert value.dtype == torch.bfloat16
        assert torch.allclose(value.double(), exact, rtol=2**-8, atol=1e-12)


def test_an_expert_that_is_the_base_is_a_warning(models, tmp_path):
    base, experts = models
    copy = maker.write(tmp_path / "copy", _load(base))
    for twin in (base, copy):
        request = MergeRequest("mmer", base, (experts[0], twin), tmp_path / f"out-{twin.name}")
        warnings = merge_checkpoints(request).warnings
        assert len(warnings) == 1 and f"{twin}: equals the base" in warnings[0]


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
    text = _refused(base, experts, tmp_path / "out")
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
    text = _refused(base, [expert], tmp_path / "out")
    assert "tensors begin with 'language_model' where the base has ''" in text
    assert text.startswith("1 problem(s)") or "shares no" in text


def test_an_empty_intersection_is_refused(tmp_path):
    base = maker.write(tmp_path / "base", {"a": torch.zeros(2)})
    expert = maker.write(tmp_path / "e", {"a": torch.zeros(2)})
    text = _refused(base, [expert], tmp_path / "out", keep={"a": None})
    assert "shares no floating-point tensor" in text


def test_damaged_files_are_named(models, tmp_path):
    base, _ = models
    start = _load(base)
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
    text = _refused(base, experts, tmp_path / "out")
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
    ill = _load(experts[0])
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
    text = _refused(base, [expert], tmp_path / "out")
    assert "ids (I64) differs from the base's" in text
    assert "2 tokens ('token0', 'token1' ...) have other numbers" in text


def test_foreign_files_and_inputs_are_never_overwritten(models, tmp_path):
    base, experts = models
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "holds thesis.tex" in _refused(base, experts, out)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert "is an input" in _refused(base, experts, experts[0])
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a folder" in _refused(base, experts, file)


def test_a_full_disk_is_seen_before(models, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "the result needs 0.1 GB" in _refused(*models, tmp_path / "out")


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
        [sys.executable, str(_MAKER), str(tmp_path), "7", "10"],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    killed = json.loads(done.stdout)
    assert len(killed) >= 10
    whole = _files(tmp_path / "whole")
    experts = (tmp_path / "e1", tmp_path / "e3")
    for number in killed:
        out = tmp_path / f"killed-{number}"
        assert not out.exists() or _files(out) == whole  # never a third thing
        merge_checkpoints(
            MergeRequest("mmer", tmp_path / "base", experts, out, shard_bytes=100_000)
        )
        assert _files(out) == whole
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
