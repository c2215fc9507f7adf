"""Asking a model: media through its encoders, conversations in batches, answers as evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import RLock

import torch

from graftline.asking.conversation import Shown, Turn, encode_conversation
from graftline.asking.media import Medium, named_error, read_medium
from graftline.asking.parts import Parts, load_parts, prompts_of
from graftline.encoders import open_encoder
from graftline.encoders.arrays import ArrayEncoder
from graftline.errors import GraftlineError
from graftline.evaluation.answering import answer_batches
from graftline.model.encoders import Encoder
from graftline.model.loading import LoadedModel, read_record
from graftline.model.multimodal import collate
from graftline.model.opening import device_named, keep_convolutions_in_float32
from graftline.model.prompts import EncodedPrompt, PromptEncoder
from graftline.recipe import KINDS

BATCH = 32
"""Conversations that are answered together."""


class Asker:
    """A model that answers questions about media.

    Backbone and encoders are loaded when they are first needed: what is wrong with a question's
    media is said before.

    Args:
        parts: the model.
        device: as in a recipe.
        max_new_tokens: the longest answer; as evaluated if left out.
    """

    def __init__(
        self, parts: Parts, device: str = "auto", max_new_tokens: int | None = None
    ) -> None:
        self.parts = parts
        self.max_new_tokens = max_new_tokens or parts.max_new_tokens
        self._device = device
        self._encoders: dict[str, Encoder] = {}
        self._loaded: LoadedModel | None = None
        self._one_at_a_time = RLock()  # a routed model is told of one pass at a time

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model can be shown."""
        return tuple(self.parts.connectors)

    def read(self, path: Path, modality: str) -> Medium:
        """Reads a media file as this model needs it.

        Args:
            path: the file.
            modality: its name, or what the media of the only such modality are.

        Raises:
            GraftlineError: the model does not have this modality (says which it has), several are
                meant, or the file cannot be used; names the file.
        """
        name = self.called(modality)
        if name not in self.parts.connectors:
            known = ", ".join(self.modalities) or "no modality at all"
            raise GraftlineError(
                f"{path}: {self.parts.name} has not learned {modality}; it knows {known}."
            )
        encoder = self.parts.encoders[name]["name"]
        return read_medium(path, name, encoder, self.parts.kind_of(name))

    def shows(self, word: str) -> bool:
        """Whether a word names a modality of this model, or a kind of media."""
        return word in (*KINDS, *self.modalities)

    def called(self, word: str) -> str:
        """The modality that a word means: its name, or what the media of just one of them are.

        Raises:
            GraftlineError: it is a kind of media that several modalities have.
        """
        if word in self.parts.connectors:
            return word
        meant = [name for name in self.modalities if self.parts.kind_of(name) == word]
        if len(meant) > 1:
            raise GraftlineError(f"{word} may be {' or '.join(meant)} here; use that name")
        return meant[0] if meant else word

    def show(self, media: Sequence[Medium], paths: Sequence[Path]) -> list[Shown]:
        """Encodes media, each modality's together.

        Features are rounded to float16 as the cached ones are, so that answers are the same.

        Args:
            media: decoded media.
            paths: where they come from, for messages.

        Raises:
            GraftlineError: an encoder refuses a medium; names the file.
        """
        found: list[Shown | None] = [None] * len(media)
        for modality in dict.fromkeys(medium.modality for medium in media):
            places = [place for place, each in enumerate(media) if each.modality == modality]
            with self._one_at_a_time:
                features = self._encode(
                    modality, [media[p] for p in places], [paths[p] for p in places]
                )
            for place, own in zip(places, features, strict=True):
                found[place] = Shown(modality, own)
        return [shown for shown in found if shown is not None]

    def _encode(
        self, modality: str, media: Sequence[Medium], paths: Sequence[Path]
    ) -> list[torch.Tensor]:
        encoder = self._encoder(modality)
        try:
            features = encoder.encode([medium.values for medium in media])
        except GraftlineError as error:
            if len(media) == 1:
                raise named_error(paths[0], error) from error
            # One of several is wrong: alone, it names itself.
            return [self._encode(modality, [m], [p])[0] for m, p in zip(media, paths, strict=True)]
        rounded = features.to(torch.float16).to(torch.float32)
        for own, path in zip(rounded, paths, strict=True):
            if not bool(own.isfinite().all()):
                wrong = GraftlineError("its features are not finite; check the file's content")
                raise named_error(path, wrong)
        return list(rounded)

    def _encoder(self, modality: str) -> Encoder:
        if modality not in self._encoders:
            place = device_named(self._device)
            keep_convolutions_in_float32()
            encoder = open_encoder(self.parts.encoders[modality], place)
            if isinstance(encoder, ArrayEncoder):
                shape = read_record(self.parts.connectors[modality], modality).shape
                encoder.expect(int(shape["encoder_tokens"]), int(shape["encoder_width"]))
            self._encoders[modality] = encoder
        return self._encoders[modality]

    @property
    def loaded(self) -> LoadedModel:
        """The model in memory."""
        if self._loaded is None:
            self._loaded = load_parts(self.parts, self._device)
        return self._loaded

    @cached_property
    def _prompts(self) -> tuple[PromptEncoder, int | None]:
        return prompts_of(self.parts)

    def answer(
        self, conversations: Sequence[Sequence[Turn]], label: str = "answer", batch: int = BATCH
    ) -> list[str]:
        """The model's greedy answer to the last turn of each conversation.

        Args:
            conversations: turns; all but the last with their answers.
            label: what the progress bar says.
            batch: how many are answered together.

        Raises:
            GraftlineError: a conversation is longer than the model can take, or shows a modality
                that it does not have.
        """
        prompts = [self.encode(turns) for turns in conversations]
        places = sorted(range(len(prompts)), key=lambda place: len(prompts[place].token_ids))
        batches = []
        for start in range(0, len(places), batch):
            near = places[start : start + batch]
            media = [[s.features for t in conversations[p] for s in t.media] for p in near]
            collated = collate([prompts[p] for p in near], media, self._prompts[0].pad_id)
            batches.append((near, collated))
        with self._one_at_a_time:
            try:
                return answer_batches(
                    self.loaded, batches, max_new_tokens=self.max_new_tokens, label=label
                )
            except torch.OutOfMemoryError as error:
                raise GraftlineError(
                    f"{device_named(self._device)} has no memory left; ask for fewer at once, or "
                    "take --device cpu"
                ) from error

    def encode(self, turns: Sequence[Turn]) -> EncodedPrompt:
        """A conversation as the model reads it; what its media hold does not matter.

        Raises:
            GraftlineError: it is longer than the model can take, answer included.
        """
        with self._one_at_a_time:
            prompts, limit = self._prompts
            prompt = encode_conversation(prompts, turns)
        if limit is not None and len(prompt.token_ids) + self.max_new_tokens > limit:
            raise TooLong(
                f"the conversation takes {len(prompt.token_ids)} tokens and the answer up to "
                f"{self.max_new_tokens}; this model reads {limit}. Ask with fewer media and words, "
                "or for a shorter answer (--max-new-tokens)."
            )
        return prompt


class TooLong(GraftlineError):
    """A conversation that does not fit into the model's context."""
