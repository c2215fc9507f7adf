"""The terms that stand against forgetting, on worked examples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graftline.data.examples import ExampleSet, TrainingSet
from graftline.data.features import FeatureTable
from graftline.errors import GraftlineError
from graftline.model.loading import assemble, new_connector
from graftline.training.distillation import (
    answer_logits,
    answer_tokens,
    dark_experience,
    distillation,
)
from graftline.training.elastic import (
    ElasticPenalty,
    fisher_diagonal,
    save_fisher,
    weighed_parameters,
)
from graftline.training.optimizer import PIECE
from graftline.training.orthogonal import Orthogonality


@pytest.fixture
def setting(tiny, features_folder: Path):
    features = FeatureTable(features_folder / "train")[:]
    pair = new_connector("image", tiny[0], features, {"tokens": 2, "hidden": 16}, 0, "x")
    loaded = assemble(tiny, [pair], "")
    return loaded, ExampleSet(features_folder, "image", "train", loaded.prompts)


def _penalty(strength: float) -> tuple[nn.Parameter, nn.Parameter, ElasticPenalty]:
    first, second = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[5.0]]))
    fisher = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([[1.0]])}
    penalty = ElasticPenalty({"a": first, "b": second}, fisher, strength)
    first.data.copy_(torch.tensor([1.5, 1.0]))
    second.data.fill_(8.0)
    return first, second, penalty


def test_elastic_penalty_and_its_gradient() -> None:
    first, second, penalty = _penalty(0.5)
    value = penalty()
    # 0.5 / 2 * (2 * 0.5^2 + 4 * 1^2 + 1 * 3^2)
    assert value.item() == pytest.approx(0.25 * (0.5 + 4.0 + 9.0))
    value.backward()
    assert first.grad.tolist() == pytest.approx([0.5, -2.0])  # 0.5 * F * drift
    assert second.grad.item() == pytest.approx(1.5)


def test_elastic_gradient_follows_what_is_made_of_the_penalty() -> None:
    first, second, penalty = _penalty(0.5)
    (3.0 * penalty() + second.sum()).backward()
    assert first.grad.tolist() == pytest.approx([1.5, -6.0])
    assert second.grad.item() == pytest.approx(5.5)


def test_elastic_penalty_in_pieces_is_autograd_s() -> None:
    generator = torch.Generator().manual_seed(0)
    count = PIECE + 1000
    weight = nn.Parameter(torch.randn(count, generator=generator))
    fisher = torch.rand(count, generator=generator)
    penalty = ElasticPenalty({"w": weight}, {"w": fisher}, 0.3)
    anchor = weight.detach().clone()
    weight.data.add_(torch.randn(count, generator=generator))
    penalty().backward()
    plain = weight.detach().clone().requires_grad_()
    expected = 0.15 * (fisher * (plain - anchor).square()).sum()
    expected.backward()
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(weight.grad, plain.grad, atol=1e-6)


def test_a_fisher_of_another_model_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(3))
    for fisher in ({}, {"w": torch.ones(4)}, {"w": torch.ones(3), "v": torch.ones(1)}):
        with pytest.raises(GraftlineError, match="does not fit the backbone at"):
            ElasticPenalty({"w": weight}, fisher, 1.0)


def test_fisher_is_the_squares_of_batches_gradients(setting) -> None:
    loaded, examples = setting
    rows = TrainingSet([examples], 4, 0)
    weighed = weighed_parameters(loaded, False)
    assert not any("embed" in name for name in weighed)
    parameters = list(weighed.values())
    found = fisher_diagonal(loaded.model, parameters, [rows.batch(step) for step in range(3)])
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(3):
        loss = loaded.model(rows.batch(step))
        for total, gradient in zip(expected, torch.autograd.grad(loss, parameters), strict=True):
            total += 4.0 * gradient.square()
    mean = torch.cat([total.flatten() for total in expected]).mean()
    for name, own, total in zip(weighed, found, expected, strict=True):
        assert torch.allclose(own, total / mean, rtol=1e-3, atol=1e-6), name
    assert torch.cat([own.flatten() for own in found]).mean().item() == pytest.approx(1.0)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_running_fisher_decays(tmp_path: Path) -> None:
    for stage, value in enumerate((1.0, 4.0, 2.0)):
        folder = tmp_path / str(stage)
        folder.mkdir()
        previous = tmp_path / str(stage - 1) if stage else None
        save_fisher(folder, {"w": torch.tensor([value])}, previous, 0.5, 10 + stage)
    assert load_file(folder / "fisher.safetensors")["w"].item() == 2.0 + 0.5 * (4.0 + 0.5 * 1.0)
    assert '"rows": [\n    10,\n    11,\n    12\n  ]' in (folder / "fisher.json").read_text()


def test_distillation_is_the_divergence_at_a_temperature() -> None:
    student = torch.tensor([[2.0, 0.0], [1.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    # at T = 2 the first token's odds are e^1 against e^-1: (p - q) * 1; the second token agrees
    likely = math.e / (1 + math.e)
    loss = distillation(student, teacher, 2.0)
    assert loss.item() == pytest.approx((2 * likely - 1) / 2)
    loss.backward()  # (softmax(student / T) - softmax(teacher / T)) / T / tokens
    assert student.grad[0].tolist() == pytest.approx(
        [(2 * likely - 1) / 4, -(2 * likely - 1) / 4], abs=1e-6
    )
    assert distillation(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-7)


def test_dark_experience_weighs_logits_and_answers() -> None:
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    tokens = torch.tensor([1])
    answers = math.log(1 + math.e)
    assert dark_experience(student, teacher, tokens, 0.1, 0.5).item() == pytest.approx(
        0.1 * 0.5 + 0.5 * answers
    )
    assert dark_experience(student, teacher, tokens, 2.0, 0.0).item() == pytest.approx(1.0)


def test_answer_logits_are_those_that_the_model_learns_from(setting) -> None:
    loaded, examples = setting
    batch = TrainingSet([examples], 48, 0).batch(0)  # questions and captions
    logits = answer_logits(loaded.model, batch)
    assert len(logits) == len(answer_tokens(batch)) < batch.labels.numel()
    loss = nn.functional.cross_entropy(logits, answer_tokens(batch))
    assert loss.item() == pytest.approx(loaded.model(batch).item(), rel=1e-6)


def test_orthogonality_sums_squared_products(tmp_path: Path) -> None:
    for stage, old in (("one", [[1.0, 1.0]]), ("two", [[0.0, 3.0]])):
        (tmp_path / stage).mkdir()
        save_file({"layer": torch.tensor(old)}, tmp_path / stage / "subspace.safetensors")
    own = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    one = Orthogonality({"layer": own}, [tmp_path / "one"], 0.5)
    assert one().item() == pytest.approx(0.5 * (1.0 + 4.0))
    both = Orthogonality({"layer": own}, [tmp_path / "one", tmp_path / "two"], 0.5)
    assert both().item() == pytest.approx(0.5 * (1.0 + 4.0 + 0.0 + 36.0))
    both().backward()  # 2 * strength * (A A_j^T) A_j, over both stages
    assert own.grad.tolist() == [[1.0, 1.0], [2.0, 2.0 + 18.0]]
    with pytest.raises(GraftlineError, match="does not fit the layer other"):
        Orthogonality({"other": own}, [tmp_path / "one"], 0.5)
