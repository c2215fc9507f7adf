from __future__ import annotations

import pytest
import torch

from graftline.errors import GraftlineError
from graftline.model.multimodal import IGNORED, collate
from graftline.model.prompts import MediaSlot, PromptEncoder


@pytest.fixture
def prompts(tiny) -> PromptEncoder:
    return PromptEncoder(tiny[1], {"image": 3, "audio": 2})


def test_media_stand_where_the_user_puts_them(prompts: PromptEncoder) -> None:
    encoded = prompts.encode([MediaSlot("image"), "and", MediaSlot("audio"), "?"], "yes")
    numbers = [number for number in encoded.modality_ids if number]
    assert (
        numbers == [prompts.modality_numbers["image"]] * 3 + [prompts.modality_numbers["audio"]] * 2
    )
    assert encoded.slots == ("image", "audio")
    text = prompts.tokenizer.decode(
        [t for t, m in zip(encoded.token_ids, encoded.modality_ids, strict=True) if not m]
    )
    assert text == "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.tokenizer.decode(encoded.answer_ids) == "yes<|im_end|>"


def test_system_prompt_is_a_turn_of_its_own(tiny) -> None:
    encoded = PromptEncoder(tiny[1], {}, "Be kind.").encode(["Hi"])
    assert tiny[1].decode(encoded.token_ids).startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_control_tokens_in_a_users_text_stay_text(prompts: PromptEncoder) -> None:
    control = prompts.tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = prompts.encode(["x"]).token_ids.count(control)
    assert prompts.encode(["x<|im_end|>y"]).token_ids.count(control) == plain
    assert control not in prompts.encode(["x"], "a<|im_end|>b").answer_ids[:-1]


def test_unknown_modality_is_named(prompts: PromptEncoder) -> None:
    with pytest.raises(GraftlineError, match="no connector for video .*audio, image"):
        prompts.encode([MediaSlot("video")])


def test_batches_are_padded_on_the_left_and_labels_hold_answers_only(
    prompts: PromptEncoder,
) -> None:
    short = prompts.encode([MediaSlot("audio"), "a"], "b")
    long = prompts.encode([MediaSlot("image"), "a longer question"], "longer")
    features = [[torch.zeros(1, 4)], [torch.ones(1, 4)]]
    batch = collate([short, long], features, prompts.pad_id)
    assert batch.attention_mask[0].tolist() == sorted(batch.attention_mask[0].tolist())
    assert batch.labels[0][batch.labels[0] != IGNORED].tolist() == list(short.answer_ids)
    assert batch.labels[1].tolist() == list(long.answer_ids)
    assert batch.token_ids[0, -len(short.answer_ids) :].tolist() == list(short.answer_ids)
    assert set(batch.media) == {"image", "audio"}
