"""Conversations of several turns as one prompt; what people and models wrote is always text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graftline.errors import GraftlineError
from graftline.model.prompts import EncodedPrompt, MediaSlot, PromptEncoder


@dataclass(frozen=True)
class Shown:
    """A medium as its encoder sees it.

    Attributes:
        modality: what it is.
        features: float32 (tokens, width).
    """

    modality: str
    features: Tensor


@dataclass(frozen=True)
class Turn:
    """What a user shows and asks, and what the model answered.

    Attributes:
        media: in the order in which they are given, before the question.
        question: the text.
        answer: None for the turn that is to be answered.
    """

    media: tuple[Shown, ...]
    question: str
    answer: str | None = None


def check_question(text: str) -> str:
    """A question without the white space around it.

    Raises:
        GraftlineError: it is blank, or holds bytes that are no text.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GraftlineError("the question is not valid UTF-8; write it as UTF-8 text") from error
    if not text.strip():
        raise GraftlineError("the question is empty; ask something, e.g. 'What is this?'")
    return text.strip()


def encode_conversation(prompts: PromptEncoder, turns: Sequence[Turn]) -> EncodedPrompt:
    """Encodes turns as one prompt that ends where the model's answer to the last one begins.

    One turn is encoded as training and evaluation do. Several are rendered by the chat template
    around stand-ins and cut at them, so that the template alone makes special tokens.

    Args:
        prompts: of the model that is asked.
        turns: all but the last with their answers.

    Raises:
        GraftlineError: a medium is of a modality that this model does not have, or the chat
            template drops a turn.
    """
    if len(turns) == 1:
        return prompts.encode(_contents(turns[0]))
    contents: list[MediaSlot | str] = []
    messages: list[dict[str, str]] = []
    if prompts.system_prompt:
        messages.append({"role": "system", "content": _stand_in(0)})
        contents.append(prompts.system_prompt)
    for turn in turns:
        marks = []
        for content in _contents(turn):
            marks.append(_stand_in(len(contents)))
            contents.append(content)
        messages.append({"role": "user", "content": "".join(marks)})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": _stand_in(len(contents))})
            contents.append(turn.answer)
    rendered = prompts.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return _spliced(prompts, str(rendered), contents)


def _contents(turn: Turn) -> list[MediaSlot | str]:
    return [*(MediaSlot(shown.modality) for shown in turn.media), turn.question]


def _stand_in(number: int) -> str:
    return f"\ue000{number}\ue001"


def _spliced(
    prompts: PromptEncoder, rendered: str, contents: Sequence[MediaSlot | str]
) -> EncodedPrompt:
    token_ids: list[int] = []
    modality_ids: list[int] = []
    rest = rendered
    for number, content in enumerate(contents):
        before, found, rest = rest.partition(_stand_in(number))
        if not found:
            raise GraftlineError(
                "The backbone's chat template drops earlier turns; ask one question at a time."
            )
        for ids, modality in (
            (_template(prompts, before), 0),
            _content(prompts, content),
        ):
            token_ids += ids
            modality_ids += [modality] * len(ids)
    last = _template(prompts, rest)
    slots = tuple(each.modality for each in contents if isinstance(each, MediaSlot))
    return EncodedPrompt((*token_ids, *last), (*modality_ids, *[0] * len(last)), slots, ())


def _template(prompts: PromptEncoder, text: str) -> list[int]:
    return list(prompts.tokenizer(text, add_special_tokens=False)["input_ids"])


def _content(prompts: PromptEncoder, content: MediaSlot | str) -> tuple[list[int], int]:
    """Token ids of a medium or a text, and the modality's number."""
    if isinstance(content, str):
        tokenizer = prompts.tokenizer
        encoded = tokenizer(content, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"]), 0
    slot = prompts.encode([content])  # refuses a modality that the model does not have
    number = prompts.modality_numbers[content.modality]
    return [prompts.pad_id] * slot.modality_ids.count(number), number
