"""From a conversation turn with media in it to token ids with places for the media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from graftline.errors import GraftlineError


@dataclass(frozen=True)
class MediaSlot:
    """Where a medium of `modality` stands in a prompt."""

    modality: str


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt, and of its answer.

    Attributes:
        token_ids: one id a position; media positions hold the padding id.
        modality_ids: one number a position: 0 for text, k for the k-th modality.
        slots: the modalities of the media, in the order in which they stand.
        answer_ids: ids of the answer and the end-of-turn token; empty when there is none.
    """

    token_ids: tuple[int, ...]
    modality_ids: tuple[int, ...]
    slots: tuple[str, ...]
    answer_ids: tuple[int, ...]


class PromptEncoder:
    """Splices media into a tokenizer's chat template.

    The template is rendered around stand-ins, cut at them, and only its own pieces may hold
    special tokens: what a user writes is always text, even if it looks like a control token.

    Args:
        tokenizer: a `transformers` tokenizer with a chat template.
        media_tokens: modality -> LLM tokens that one medium takes.
        system_prompt: text of the system turn; empty for none.
    """

    def __init__(
        self, tokenizer: Any, media_tokens: Mapping[str, int], system_prompt: str = ""
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise GraftlineError(
                "The backbone's tokenizer has no chat template; Graftline needs one."
            )
        if tokenizer.eos_token_id is None:
            raise GraftlineError("The backbone's tokenizer has no end-of-sequence token.")
        self.tokenizer = tokenizer
        self.media_tokens = dict(media_tokens)
        self.system_prompt = system_prompt
        # A data set asks a few questions thousands of times.
        self._rendered = lru_cache(maxsize=16)(self._render)
        self._template = lru_cache(maxsize=64)(self._read_template)
        self._text = lru_cache(maxsize=65536)(self._read_text)
        self.modality_numbers = {name: 1 + i for i, name in enumerate(sorted(media_tokens))}
        self.pad_id: int = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )

    def encode(self, parts: Sequence[MediaSlot | str], answer: str | None = None) -> EncodedPrompt:
        """Encodes one user turn, and the assistant's answer to it if given.

        Args:
            parts: media and texts in the order in which the user gives them.
            answer: what the assistant is to say.

        Raises:
            GraftlineError: a medium is of a modality that this model does not know.
        """
        token_ids: list[int] = []
        modality_ids: list[int] = []
        slots: list[str] = []
        for piece in self._pieces(parts):
            if isinstance(piece, MediaSlot):
                count = self._count(piece.modality)
                token_ids += [self.pad_id] * count
                modality_ids += [self.modality_numbers[piece.modality]] * count
                slots.append(piece.modality)
            else:
                token_ids += piece
                modality_ids += [0] * len(piece)
        answer_ids = [] if answer is None else [*self._text(answer), self.tokenizer.eos_token_id]
        return EncodedPrompt(tuple(token_ids), tuple(modality_ids), tuple(slots), tuple(answer_ids))

    def _count(self, modality: str) -> int:
        try:
            return self.media_tokens[modality]
        except KeyError:
            known = ", ".join(sorted(self.media_tokens)) or "none"
            raise GraftlineError(
                f"This model has no connector for {modality} (it has: {known})."
            ) from None

    def _pieces(self, parts: Sequence[MediaSlot | str]) -> list[MediaSlot | list[int]]:
        system = [self.system_prompt] if self.system_prompt else []
        contents: list[MediaSlot | str] = [*system, *parts]
        stand_ins = [f"\ue000{number}\ue001" for number in range(len(contents))]
        rest = self._rendered(tuple(stand_ins), bool(system))
        pieces: list[MediaSlot | list[int]] = []
        for stand_in, content in zip(stand_ins, contents, strict=True):
            before, found, rest = rest.partition(stand_in)
            if not found:
                raise GraftlineError("The chat template drops a turn's text; it cannot be used.")
            pieces.append(self._template(before))
            pieces.append(content if isinstance(content, MediaSlot) else self._text(content))
        pieces.append(self._template(rest))
        return pieces

    def _render(self, stand_ins: tuple[str, ...], has_system: bool) -> str:
        messages = [{"role": "user", "content": "".join(stand_ins[has_system:])}]
        if has_system:
            messages.insert(0, {"role": "system", "content": stand_ins[0]})
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def _read_template(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _read_text(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])
