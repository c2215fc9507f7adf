"""Fine-tuning against forgetting on the tiny model: what each guard keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftline.data.examples import ExampleSet, TrainingSet, replay_rows
from graftline.data.features import FeatureTable
from graftline.model.backbone import load_backbone
from graftline.model.loading import (
    LoadedModel,
    Misaligned,
    assemble,
    new_connector,
    read_connector,
    read_record,
    save_connector,
)
from graftline.recipe import LoraSettings, PhaseSettings
from graftline.training import guarded, memory, phases
from graftline.training.distillation import answer_logits
from graftline.training.elastic import save_fisher, weighed_parameters
from graftline.training.guarded import GuardCall, guarded_fine_tune
from graftline.training.memory import (
    RecordedLogits,
    RecordedRows,
    RowsBesideMemory,
    record_logits,
)

SETTINGS = PhaseSettings(steps=12, batch_size=4, learning_rate=3e-3)
OLD = "image"
NEW = "audio"


@pytest.fixture
def connectors(tiny, features_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """Aligned connectors of two modalities that share their made-up features."""
    features = FeatureTable(features_folder / "train")[:]
    for number, name in enumerate((OLD, NEW)):
        shape = {"tokens": 2, "hidden": 16}
        record, connector = new_connector(name, tiny[0], features, shape, number, "base")
        (tmp_path / name).mkdir()
        save_connector(tmp_path / name, record, connector)
    return {OLD: tmp_path / OLD, NEW: tmp_path / NEW}


@pytest.fixture
def train(tiny_folder: Path, features_folder: Path, connectors, tmp_path: Path):
    def run(
        guard: GuardCall, modalities=(NEW,), mode: str = "full", name: str = "out", **settings
    ) -> Path:
        out = tmp_path / name
        out.mkdir()
        call = phases.Call(
            backbone=load_backbone(tiny_folder, torch.float32, "eager"),
            backbone_fingerprint="base",
            features=dict.fromkeys(modalities, features_folder),
            system_prompt="",
            seed=3,
            work=tmp_path / f"{name}-work",
            out=out,
            label=name,
        )
        aligned = {each: connectors[each] for each in modalities}
        guarded_fine_tune(
            call, SETTINGS.model_copy(update=settings), aligned, guard,
            mode=mode, lora=LoraSettings(rank=2, alpha=8), connector_learning_rate=1e-3,
            train_embeddings=False, result_fingerprint="tuned",
        )  # fmt: skip
        return out

    return run


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _changed(before: Path, after: Path) -> dict[str, float]:
    """Name -> norm of the change, of tensors that changed."""
    old, new = _weights(before), _weights(after / "backbone")
    norms = {name: (new[name] - old[name].float()).norm().item() for name in old}
    return {name: norm for name, norm in norms.items() if norm > 0}


def test_ewc_holds_what_the_fisher_weighs(train, tiny, tiny_folder, tmp_path: Path) -> None:
    weighed = weighed_parameters(assemble(tiny, [], ""), False)
    held = [name for name in weighed if "layers.0" in name]
    for name, weight in (("strong", 1e6), ("none", 0.0)):
        (tmp_path / f"fisher-{name}").mkdir()
        values = {
            key: torch.full_like(each, weight if key in held else 0.0)
            for key, each in weighed.items()
        }
        save_fisher(tmp_path / f"fisher-{name}", values, None, 1.0, 1)
    moved = {}
    for name in ("strong", "none"):
        guard = GuardCall("ewc", {"strength": 1.0}, fisher=tmp_path / f"fisher-{name}")
        moved[name] = _changed(tiny_folder, train(guard, name=name))
    plain = moved["none"]
    assert set(plain) == set(weighed)  # all but the embeddings
    for name in held:
        assert moved["strong"][name] < 0.5 * plain[name], name


def test_lwf_keeps_saying_what_the_old_model_says(
    train, tiny_folder, features_folder, connectors
) -> None:
    apart = {}
    for strength in (0.0, 300.0):
        guard = GuardCall("lwf", {"strength": strength, "temperature": 2.0})
        out = train(guard, name=f"lwf-{strength}", learning_rate=1e-3)
        logits = []
        for folder, aligned in ((tiny_folder, connectors[NEW]), (out / "backbone", out)):
            record = read_record(aligned, NEW)
            pair = (record, read_connector(aligned, record))
            loaded = assemble(load_backbone(folder, torch.float32, "eager"), [pair], "")
            rows = TrainingSet([ExampleSet(features_folder, NEW, "train", loaded.prompts)], 16, 0)
            logits.append(answer_logits(loaded.model, rows.batch(0)).log_softmax(-1))
        apart[strength] = torch.nn.functional.kl_div(
            logits[1], logits[0], reduction="batchmean", log_target=True
        ).item()
    assert apart[300.0] < 0.3 * apart[0.0]


def test_replay_mixes_the_kept_rows_in_and_realigns_old_connectors(
    train, connectors, monkeypatch
) -> None:
    seen: list[TrainingSet] = []
    original = phases.run_phase
    monkeypatch.setattr(
        guarded, "run_phase", lambda *given: (seen.append(given[3]), original(*given))[1]
    )
    out = train(GuardCall("replay", fraction=0.25), (NEW, OLD))
    [rows] = seen
    assert [examples.modality for examples in rows.sets] == [NEW, OLD]
    assert sorted(row for number, row in rows.places if number == 1) == replay_rows(48, 0.25, 3)
    assert sum(number == 0 for number, _ in rows.places) == 48
    for name in (NEW, OLD):
        assert read_record(out, name).aligned_to == "tuned"
        before, after = (
            load_file(folder / f"connector-{name}.safetensors")
            for folder in (connectors[name], out)
        )
        assert not torch.equal(before["project.weight"], after["project.weight"])


@pytest.fixture
def told(tiny_folder: Path, features_folder: Path, connectors, tmp_path: Path):
    """Records what another LLM than the one that is trained says of kept rows."""

    def recorded(rows: list[int]) -> tuple[Path, LoadedModel]:
        model, tokenizer = load_backbone(tiny_folder, torch.float32, "eager")
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
        records = [read_record(connectors[name], name) for name in (NEW, OLD)]
        pairs = [(each, read_connector(connectors[each.modality], each)) for each in records]
        loaded = assemble((model, tokenizer), pairs, "")
        examples = ExampleSet(features_folder, OLD, "train", loaded.prompts)
        (tmp_path / "told").mkdir()
        record_logits(loaded, examples, rows, 5, tmp_path / "told", "told")
        return tmp_path / "told", loaded

    return recorded


def test_der_shows_as_many_kept_rows_with_what_was_said_of_them(train, told, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_ROWS", 7)  # so that they lie in two files
    seen: list[TrainingSet] = []
    original = phases.run_phase
    monkeypatch.setattr(
        guarded, "run_phase", lambda *given: (seen.append(given[3]), original(*given))[1]
    )
    kept = replay_rows(48, 0.25, 3)
    folder, teacher = told(kept)
    train(
        GuardCall("der", {"alpha": 0.1, "beta": 0.5}, fraction=0.25, logits={OLD: folder}),
        (NEW, OLD),
    )
    assert len(list(folder.glob(memory.FILES))) == 2
    rows = seen[0]
    assert isinstance(rows, RowsBesideMemory)
    assert sorted(row for _, row in rows.memory.places) == kept
    for step in range(6):  # two epochs of the twelve kept rows
        batch = rows.batch(step)
        assert (set(batch.media), set(batch.memory.media)) == ({NEW}, {OLD})
        assert len(batch.token_ids) == len(batch.memory.token_ids) == 4
        expected = answer_logits(teacher.model, batch.memory)
        torch.testing.assert_close(batch.memory.told, expected, rtol=1e-4, atol=1e-5)
    assert batch.tokens == int(batch.attention_mask.sum() + batch.memory.attention_mask.sum())
    assert torch.equal(batch.to("cpu").memory.told, batch.memory.told)


def test_der_keeps_what_was_said_when_a_row_was_learned(
    train, told, features_folder, tiny_folder
) -> None:
    folder, _ = told(replay_rows(48, 0.25, 3))
    recorded = RecordedLogits(folder)
    apart = {}
    for alpha in (0.0, 3000.0):
        guard = GuardCall("der", {"alpha": alpha, "beta": 0.0}, fraction=0.25, logits={OLD: folder})
        out = train(guard, (NEW, OLD), name=f"der-{alpha}", steps=60)
        record = read_record(out, OLD)
        pair = (record, read_connector(out, record))
        loaded = assemble(load_backbone(out / "backbone", torch.float32, "eager"), [pair], "")
        rows = ExampleSet(features_folder, OLD, "train", loaded.prompts)
        shown = RecordedRows([rows], 12, 0, [recorded]).batch(0)
        apart[alpha] = (answer_logits(loaded.model, shown) - shown.told).square().mean().item()
    assert apart[3000.0] < 0.5 * apart[0.0]


def test_attention_only_changes_attention_alone(train, tiny_folder) -> None:
    changed = _changed(tiny_folder, train(GuardCall("attention-only"), mode="attention"))
    expected = {name for name in _weights(tiny_folder) if ".self_attn." in name}
    assert set(changed) == expected
    assert len(expected) == 2 * 4


def test_o_lora_learns_beside_earlier_directions(train, tiny_folder) -> None:
    first = train(GuardCall("o-lora", {"strength": 0.0}), mode="lora", name="first")
    overlaps = {}
    for strength in (0.0, 300.0):
        guard = GuardCall("o-lora", {"strength": strength}, earlier=[first])
        second = train(guard, mode="lora", name=f"second-{strength}")
        old, new = (load_file(each / "subspace.safetensors") for each in (first, second))
        assert old.keys() == new.keys()
        assert len(new) == 2 * 7
        overlaps[strength] = sum((new[k] @ old[k].t()).square().sum().item() for k in new)
    assert overlaps[300.0] < 0.5 * overlaps[0.0]
    changed = _changed(tiny_folder, second)  # folded in, on every linear layer
    assert {f"{name}.weight" for name in new} == set(changed)


def test_a_connector_of_another_backbone_is_refused(train, connectors) -> None:
    record = connectors[OLD] / f"connector-{OLD}.json"
    record.write_text(record.read_text().replace('"base"', '"other"'))
    with pytest.raises(Misaligned, match="image connector was aligned to backbone other"):
        train(GuardCall("replay", fraction=0.5), (NEW, OLD))
