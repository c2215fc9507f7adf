"""Connectors of every kind go through the steps that the starter's go through."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from graftline.data.features import FeatureTable
from graftline.model.backbone import load_backbone
from graftline.model.connector_kinds import build_connector, connector_parameters
from graftline.model.connectors import MixerConnector
from graftline.model.loading import read_connector, read_record
from graftline.model.resampler import ResamplerConnector
from graftline.recipe import LoraSettings, PhaseSettings
from graftline.settings.models import ConnectorSettings
from graftline.training import phases, resampling
from graftline.training.resampling import align_resampler, measured

SETTINGS = PhaseSettings(steps=4, batch_size=48, learning_rate=3e-3)
KINDS = {
    "linear": ConnectorSettings(kind="linear", tokens=2),
    "resampler": ConnectorSettings(kind="resampler", tokens=2, hidden=16, layers=2, heads=4),
}


def test_the_defaults_parameters_are_what_they_were():
    assert connector_parameters(ConnectorSettings(tokens=4, hidden=64)) == {
        "tokens": 4, "hidden": 64,
    }  # fmt: skip
    linear, resampler = (connector_parameters(each) for each in KINDS.values())
    assert linear == {"tokens": 2, "hidden": 0}
    assert set(resampler) == {"tokens", "hidden", "kind", "layers", "heads", "code"}


def test_a_large_split_is_measured_by_rows_at_even_distances(features_folder, monkeypatch):
    table = FeatureTable(features_folder / "train")
    assert measured(table).equal(table[:])
    rows, tokens, width = table.shape
    monkeypatch.setattr(resampling, "_MEASURED", 5 * tokens * width + 1)
    assert measured(table).equal(table[[number * rows // 5 for number in range(5)]])


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="hidden 30 is no multiple of heads 8"):
        ConnectorSettings(kind="resampler", hidden=30)
    assert ConnectorSettings(hidden=30).kind == "mlp"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_connector_is_aligned_tuned_realigned_and_read_again(
    kind, tmp_path, tiny_folder, features_folder
):
    def call(name: str) -> phases.Call:
        (tmp_path / name).mkdir()
        return phases.Call(
            backbone=load_backbone(tiny_folder, torch.float32),
            backbone_fingerprint="base",
            features={"image": features_folder},
            system_prompt="",
            seed=0,
            work=tmp_path / f"{name}-work",
            out=tmp_path / name,
            label=name,
        )

    def losses(name: str) -> list[float]:
        return json.loads((tmp_path / name / "history.json").read_text())["losses"]

    shape = connector_parameters(KINDS[kind])
    align = align_resampler if kind == "resampler" else phases.align
    align(call("aligned"), SETTINGS, "image", shape)
    assert losses("aligned")[-1] < losses("aligned")[0]
    align(call("again"), SETTINGS, "image", shape)
    name = "connector-image.safetensors"
    first, second = (load_file(tmp_path / each / name) for each in ("aligned", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)  # the seed alone
    phases.fine_tune(
        call("tuned"), SETTINGS, {"image": tmp_path / "aligned"}, mode="connector",
        lora=LoraSettings(), connector_learning_rate=1e-3, train_embeddings=False,
        result_fingerprint="tuned",
    )  # fmt: skip
    phases.realign(call("realigned"), SETTINGS, "image", tmp_path / "tuned", 0.5, "output")
    tuned, realigned = (load_file(tmp_path / each / name) for each in ("tuned", "realigned"))
    changed = {key for key in tuned if not torch.equal(tuned[key], realigned[key])}
    assert changed == {"project.weight", "project.bias", "gain"}
    record = read_record(tmp_path / "realigned", "image")
    connector = read_connector(tmp_path / "realigned", record)
    assert isinstance(connector, ResamplerConnector if kind == "resampler" else MixerConnector)
    assert connector(torch.randn(5, 3, 8)).shape == (5, 2, 64)


def test_a_resampler_reads_every_token_in_its_place():
    shape = {"encoder_tokens": 6, "encoder_width": 4, "tokens": 3, "hidden": 8, "layers": 1}
    connector = build_connector(
        {**shape, "heads": 2, "embedding_width": 16, "embedding_scale": 0.1}
    )
    features = torch.randn(10, 6, 4, generator=torch.Generator().manual_seed(0)) * 5 + 2
    connector.reset(features, 1)
    given = connector(features)
    assert given.shape == (10, 3, 16)
    assert float(given.detach().square().mean().sqrt()) == pytest.approx(0.1, rel=1e-3)
    assert not torch.allclose(given[:, 0], given[:, 1])  # queries ask different things
    assert not torch.allclose(given, connector(features.flip(1)))  # places count
    given.square().sum().backward()
    silent = {name for name, p in connector.named_parameters() if p.grad is None}
    assert silent == set()
