from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from graftline.data.examples import ExampleSet, TrainingSet, replay_rows
from graftline.data.features import FeatureTable
from graftline.model.loading import assemble, new_connector
from graftline.recipe import PhaseSettings
from graftline.training import optimizer
from graftline.training.loop import BrokenCheckpoint, NotFinite, rate_factor, train
from graftline.training.optimizer import MasterAdamW, ParameterGroup

SETTINGS = PhaseSettings(steps=4, batch_size=4, learning_rate=1e-3, checkpoint_every=2)


@pytest.fixture
def setting(tiny, features_folder: Path):
    features = FeatureTable(features_folder / "train")[:]
    pair = new_connector("image", tiny[0], features, {"tokens": 2, "hidden": 16}, 0, "x")
    loaded = assemble(tiny, [pair], "")
    examples = ExampleSet(features_folder, "image", "train", loaded.prompts)
    groups = [ParameterGroup("connector", list(pair[1].parameters()), 1e-3)]
    return loaded, examples, groups


def test_master_adamw_equals_torch_adamw_in_float32() -> None:
    torch.manual_seed(0)
    mine, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(mine.state_dict())
    ours = MasterAdamW([ParameterGroup("all", list(mine.parameters()), 0.01)], 0.1, clip_norm=1e9)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(5):
        inputs = torch.randn(3, 7, generator=torch.Generator().manual_seed(step))
        mine(inputs).square().sum().backward()
        ours.step(1.0)
        reference.zero_grad()
        theirs(inputs).square().sum().backward()
        reference.step()
    for left, right in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_change_no_weight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of whole vectors, that is: a lone element's multiply-add may round twice."""
    learned = []
    for piece in (1 << 26, 1 << 9, 1 << 6):
        monkeypatch.setattr(optimizer, "PIECE", piece)
        generator = torch.Generator().manual_seed(0)
        weights = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in ((50, 41), (7,), (1000,))
        ]
        ours = MasterAdamW([ParameterGroup("all", weights, 1e-2)], 0.1, clip_norm=1.0)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
            ours.step(1.0)
        learned.append({**ours.state(), **dict(enumerate(weights))})
    for other in learned[1:]:
        assert all(value.equal(learned[0][name]) for name, value in other.items())


def test_small_updates_are_not_lost_in_bf16() -> None:
    layer = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    ours = MasterAdamW([ParameterGroup("all", [layer.weight], 1e-4)], 0.0, clip_norm=1e9)
    for _ in range(40):
        layer.weight.grad = torch.ones_like(layer.weight)
        ours.step(1.0)
    # 40 steps of 1e-4; one alone is far below bf16's spacing of 0.0039 below 1
    assert layer.weight[0, 0].item() == pytest.approx(0.996, abs=2e-3)
    assert layer.weight[0, 0].item() < 1.0


def test_gradients_are_clipped_over_all_groups() -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    ours = MasterAdamW(
        [ParameterGroup("a", [first], 0.1), ParameterGroup("b", [second], 0.1)], 0.0, clip_norm=1.0
    )
    first.grad, second.grad = torch.full((3,), 30.0), torch.full((3,), 40.0)
    assert ours.step(1.0) == pytest.approx(50.0 * 3**0.5)
    assert first.grad is None
    mean = ours.state()["a.mean"][0].item()
    assert mean == pytest.approx(0.1 * 30.0 / (50.0 * 3**0.5), rel=1e-4)


def test_schedule_warms_up_and_ends_near_zero() -> None:
    settings = PhaseSettings(steps=100, learning_rate=1.0, warmup_fraction=0.1)
    factors = [rate_factor(step, settings) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.001


def test_training_learns_and_leaves_the_rest_alone(setting, tmp_path: Path) -> None:
    loaded, examples, groups = setting
    layer = list(loaded.model.backbone.model.layers[0].parameters())
    before = copy.deepcopy(loaded.model.backbone.state_dict())
    history = train(
        loaded.model,
        [*groups, ParameterGroup("layer", layer, 1e-2)],
        TrainingSet([examples], 16, 0).batch,
        PhaseSettings(steps=40, batch_size=16, learning_rate=1e-2),
        tmp_path,
        "test",
    )
    assert sum(history.losses[-5:]) < 0.9 * sum(history.losses[:5])
    after = loaded.model.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.layers.0.") for name in changed)


def test_nan_stops_names_the_step_and_keeps_the_last_checkpoint(setting, tmp_path: Path) -> None:
    loaded, examples, groups = setting
    rows = TrainingSet([examples], 4, 0)

    def batch(step: int):
        if step == 3:
            groups[0].parameters[0].data.fill_(float("nan"))
        return rows.batch(step)

    with pytest.raises(NotFinite, match=r"step 4 .*checkpoint-00000002"):
        train(loaded.model, groups, batch, SETTINGS, tmp_path, "test")
    assert (tmp_path / "checkpoint-00000002" / "optimizer.safetensors").exists()


def test_a_damaged_checkpoint_is_refused_by_name(setting, tmp_path: Path) -> None:
    loaded, examples, groups = setting
    train(loaded.model, groups, TrainingSet([examples], 4, 0).batch, SETTINGS, tmp_path, "test")
    damaged = tmp_path / "checkpoint-00000002" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match="checkpoint-00000002.*sha256"):
        train(loaded.model, groups, TrainingSet([examples], 4, 0).batch, SETTINGS, tmp_path, "t")


def test_an_epoch_sees_every_row_once_and_seeds_differ(setting) -> None:
    _, examples, _ = setting
    rows = TrainingSet([examples], 5, seed=1)
    epoch = rows._make_epoch(0)
    assert sorted(index for batch in epoch for index in batch) == list(range(len(examples)))
    assert epoch == TrainingSet([examples], 5, seed=1)._make_epoch(0)
    assert epoch != TrainingSet([examples], 5, seed=2)._make_epoch(0)
    assert epoch != rows._make_epoch(1)


@pytest.mark.parametrize(("fraction", "kept"), [(0.1, 160), (0.01, 16), (1e-6, 1), (1.0, 1600)])
def test_replay_is_a_seeded_share(fraction: float, kept: int) -> None:
    rows = replay_rows(1600, fraction, seed=0)
    assert len(rows) == len(set(rows)) == kept
    assert rows == replay_rows(1600, fraction, seed=0)
    assert kept in (1600, 1) or rows != replay_rows(1600, fraction, seed=1)
