from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftline.data.examples import ExampleSet, TrainingSet, question_batches
from graftline.data.features import FeatureTable
from graftline.errors import GraftlineError
from graftline.evaluation.answering import answer_all
from graftline.model.connectors import _leading_directions
from graftline.model.loading import (
    Misaligned,
    assemble,
    check_alignment,
    new_connector,
    read_connector,
    read_record,
    save_connector,
)
from graftline.model.multimodal import collate
from graftline.model.prompts import MediaSlot
from graftline.training.optimizer import MasterAdamW, ParameterGroup

SHAPE = {"tokens": 2, "hidden": 16}


@pytest.fixture
def pair(tiny, features_folder: Path):
    features = FeatureTable(features_folder / "train")[:]
    return new_connector("image", tiny[0], features, SHAPE, 0, "backbone1")


@pytest.fixture
def loaded(tiny, pair):
    return assemble(tiny, [pair], "")


def test_loss_is_that_of_the_plain_model_on_the_answer(loaded, features_folder: Path) -> None:
    """Against one unpadded row, all logits, and no tricks."""
    examples = ExampleSet(features_folder, "image", "train", loaded.prompts)
    prompts = [examples.prompt(row, True) for row in (0, 4)]
    media = [[examples.features[row]] for row in (0, 4)]
    batch = collate(prompts, media, loaded.prompts.pad_id)
    total = count = 0.0
    for prompt, own in zip(prompts, media, strict=True):
        single = collate([prompt], [own], loaded.prompts.pad_id)
        logits = loaded.model.backbone(inputs_embeds=loaded.model.embed(single)).logits[0]
        answer = torch.tensor(prompt.answer_ids)
        start = len(prompt.token_ids) - 1
        total += float(
            torch.nn.functional.cross_entropy(
                logits[start : start + len(answer)].float(), answer, reduction="sum"
            )
        )
        count += len(answer)
    assert float(loaded.model(batch)) == pytest.approx(total / count, rel=1e-5)


def test_several_media_of_several_modalities_in_one_prompt(tiny, pair, features_folder) -> None:
    features = FeatureTable(features_folder / "train")[:]
    audio = new_connector("audio", tiny[0], features, SHAPE, 1, "backbone1")
    loaded = assemble(tiny, [pair, audio], "")
    parts = [MediaSlot("audio"), MediaSlot("image"), "then", MediaSlot("audio"), "What?"]
    prompt = loaded.prompts.encode(parts)
    media = [features[0], features[1], features[2]]
    batch = collate([prompt], [media], loaded.prompts.pad_id)
    embedded = loaded.model.embed(batch)[0]
    for modality, rows in (("audio", [0, 2]), ("image", [1])):
        number = loaded.prompts.modality_numbers[modality]
        expected = loaded.model.connectors[modality](features[rows]).flatten(0, 1)
        assert torch.equal(embedded[torch.tensor(prompt.modality_ids) == number], expected)


def test_batched_answers_are_those_of_one_by_one(loaded, features_folder: Path) -> None:
    examples = ExampleSet(features_folder, "image", "test", loaded.prompts)
    _learn(loaded, features_folder)
    together = answer_all(loaded, examples, batch_size=16, max_new_tokens=8, label="")
    alone = answer_all(loaded, examples, batch_size=1, max_new_tokens=8, label="")
    assert together == alone
    asked = [row for row in range(16) if examples.rows[row]["task"] == "question"]
    right = [together[row] in examples.rows[row]["answers"] for row in asked]
    assert sum(right) > len(asked) / 2  # the media matter


def _learn(loaded, features_folder: Path) -> None:
    rows = TrainingSet([ExampleSet(features_folder, "image", "train", loaded.prompts)], 16, 0)
    groups = [ParameterGroup("all", list(loaded.model.parameters()), 3e-3)]
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
    optimizer = MasterAdamW(groups, 0.0, 1.0)
    for step in range(150):
        loaded.model(rows.batch(step)).backward()
        optimizer.step(1.0)


def test_question_batches_hold_every_row_once_and_one_task_each(loaded, features_folder) -> None:
    examples = ExampleSet(features_folder, "image", "test", loaded.prompts)
    batches = question_batches(examples, 5)
    assert sorted(row for rows, _ in batches for row in rows) == list(range(16))
    assert all(len({examples.rows[row]["task"] for row in rows}) == 1 for rows, _ in batches)
    assert all(batch.labels.numel() == 0 for _, batch in batches)


def test_connector_round_trip_is_exact_and_strict(pair, tmp_path: Path) -> None:
    record, connector = pair
    save_connector(tmp_path, record, connector)
    again = read_connector(tmp_path, read_record(tmp_path, "image"))
    assert all(
        torch.equal(value, again.state_dict()[name])
        for name, value in connector.state_dict().items()
    )
    with pytest.raises(GraftlineError, match="no connector for audio"):
        read_record(tmp_path, "audio")


def test_connector_with_nan_is_refused(pair, tmp_path: Path) -> None:
    record, connector = pair
    connector.gain.data[3] = float("nan")
    save_connector(tmp_path, record, connector)
    with pytest.raises(GraftlineError, match="gain holds NaN"):
        read_connector(tmp_path, record)


def test_connector_beside_another_backbone_is_an_error(pair) -> None:
    check_alignment(pair[0], "backbone1", "test")
    with pytest.raises(Misaligned, match="backbone1, not to backbone2"):
        check_alignment(pair[0], "backbone2", "test")


def test_closed_form_start_finds_the_classes(tiny, pair, features_folder: Path) -> None:
    """The first media tokens are nearest to the embedding of their own class."""
    record, connector = pair
    features = FeatureTable(features_folder / "train")[:]
    classes = torch.arange(len(features)) % 4
    words = torch.randn(4, tiny[0].config.hidden_size, generator=torch.Generator().manual_seed(5))
    words -= words.mean(0)
    centre = torch.ones(tiny[0].config.hidden_size)
    targets = words[classes][:, None].repeat(1, connector.tokens, 1)
    connector.fit(features, targets, centre, ridge=0.1)
    with torch.no_grad():
        output = connector(features)[:, 0]
    nearest = (output @ words.T).argmax(1)
    assert (nearest == classes).float().mean() > 0.9
    assert record.modality == "image"


def test_linear_layers_see_contiguous_rows(loaded, features_folder: Path) -> None:
    """A strided slice before the output layer is some 80 times slower in bf16 on CPU."""
    seen = []
    head = loaded.model.backbone.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    examples = ExampleSet(features_folder, "image", "train", loaded.prompts)
    prompts = [examples.prompt(row, True) for row in range(4)]
    media = [[examples.features[row]] for row in range(4)]
    loaded.model(collate(prompts, media, loaded.prompts.pad_id))
    handle.remove()
    assert seen[0].is_contiguous()
    assert seen[0].shape[1] == max(len(prompt.answer_ids) for prompt in prompts) + 1


def test_leading_directions_are_those_of_the_whole_decomposition() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(90, 70, generator=generator, dtype=torch.float64)
    matrix *= torch.logspace(0, -6, 70, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = _leading_directions(matrix, 8)
    torch.testing.assert_close(found[1], values[:8], rtol=1e-9, atol=0)
    wanted = (left[:, :8] * values[:8]) @ right[:8]
    torch.testing.assert_close((found[0] * found[1]) @ found[2], wanted, rtol=0, atol=1e-9)
