"""Which modality a token has, told to the routed layers of a backbone for each forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftline.errors import GraftlineError

TEXT = 0
ATTRIBUTE = "graftline_router"
"""Where a routed backbone keeps its router."""
Text = Literal["merged", "modality"]
"""What text and generated tokens meet: the backbone's own weights, or those of the last medium
before them (of the first, before all media); where a prompt shows none, the backbone's own."""


@dataclass(frozen=True)
class Group:
    """Rows `start` to `stop` of the ordered tokens, all of one modality."""

    modality: int
    start: int
    stop: int


@dataclass(frozen=True)
class RoutingPlan:
    """Which weights the tokens of one forward pass meet.

    Attributes:
        shape: (batch, length) of the pass.
        groups: the modalities that occur, ascending.
        order: int64 (batch * length,), the tokens' places in order of modality; None if there is
            one group.
        inverse: int64 (batch * length,), where each token went; None if there is one group.
    """

    shape: tuple[int, int]
    groups: tuple[Group, ...]
    order: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, modality_ids: Tensor) -> RoutingPlan:
        """The plan of a pass over tokens of these modalities, int64 (batch, length)."""
        flat = modality_ids.flatten()
        counts = torch.bincount(flat).tolist()
        groups, start = [], 0
        for modality, count in enumerate(counts):
            if count:
                groups.append(Group(modality, start, start + count))
                start += count
        shape = (modality_ids.shape[0], modality_ids.shape[1])
        if len(groups) == 1:
            return cls(shape, tuple(groups))
        order = flat.argsort(stable=True)
        return cls(shape, tuple(groups), order, order.argsort())

    @property
    def is_text(self) -> bool:
        """Whether all tokens meet the backbone's own weights."""
        return len(self.groups) == 1 and self.groups[0].modality == TEXT

    def gather(self, tokens: Tensor) -> Tensor:
        """Puts (batch, length, ...) in order of modality; the shape stays, the places do not."""
        return tokens if self.order is None else self._permuted(tokens, self.order)

    def scatter(self, tokens: Tensor) -> Tensor:
        """Puts tokens in order of modality back in their places."""
        return tokens if self.inverse is None else self._permuted(tokens, self.inverse)

    def _permuted(self, tokens: Tensor, order: Tensor) -> Tensor:
        if tuple(tokens.shape[:2]) != self.shape:
            raise GraftlineError(
                f"A routed layer was given tokens of shape {tuple(tokens.shape[:2])} in a pass "
                f"over {self.shape}; only layers that see every token once can be routed."
            )
        return tokens.flatten(0, 1).index_select(0, order).view(tokens.shape)


class Router:
    """What the routed layers of one backbone share: the pass under way, and one buffer.

    Args:
        modalities: those that have weights of their own.
        text: what text meets.
    """

    def __init__(self, modalities: frozenset[int], text: Text) -> None:
        self.modalities, self.text = modalities, text
        self.modality_ids: Tensor | None = None
        self.plan = RoutingPlan((1, 1), (Group(TEXT, 0, 1),))
        self.scratch: Tensor | None = None
        self.handles: list[Any] = []

    def begin(self, _decoder: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before each pass: which of the prompt's tokens it covers, by what the cache holds."""
        tokens = named.get("inputs_embeds")
        if tokens is None:
            tokens = named.get("input_ids")
        if tokens is None:
            tokens = arguments[0]
        cache = named.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self.plan = RoutingPlan.of(self._pass_ids(tokens, past))
        if not self.plan.is_text and torch.is_grad_enabled():
            raise GraftlineError(
                "Routed weights are for inference: call the model under torch.no_grad()."
            )
        if self.plan.order is not None and named.get("output_hidden_states"):
            raise GraftlineError(
                "Hidden states between routed layers are not in the order of the prompt; call "
                "the model without output_hidden_states."
            )

    def _pass_ids(self, tokens: Tensor, past: int) -> Tensor:
        batch, length = tokens.shape[:2]
        ids = torch.zeros((batch, length), dtype=torch.long, device=tokens.device)
        if self.modality_ids is not None:
            if len(self.modality_ids) != batch:
                raise GraftlineError(
                    f"The backbone sees {batch} rows, but modalities were given for "
                    f"{len(self.modality_ids)}."
                )
            own = self.modality_ids[:, past : past + length]
            ids[:, : own.shape[1]] = own
            if self.text == "modality":  # what is generated stands behind the last medium
                ids[:, own.shape[1] :] = self.modality_ids[:, -1:]
            unknown = sorted(set(own.flatten().tolist()) - self.modalities - {TEXT})
            if unknown:
                raise GraftlineError(
                    f"The batch holds tokens of modality {unknown[0]}, which has no weights of "
                    f"its own (there are: {sorted(self.modalities)}). Route it as well."
                )
        return ids

    def enter(self, _layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the first decoder layer: tokens are put in order."""
        return (self.plan.gather(arguments[0]), *arguments[1:])

    def leave(self, _layer: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Behind the last decoder layer: tokens go back to their places."""
        return self.plan.scatter(output)


@contextmanager
def routed(backbone: Any, modality_ids: Tensor) -> Iterator[None]:
    """Says which modality the tokens of a prompt have, for all passes inside the context.

    A pass covers the positions behind those that its KV cache holds; what lies behind the prompt
    is text. On a backbone that is not routed it does nothing.

    Args:
        backbone: what `route_backbone` was called with.
        modality_ids: int64 (batch, length): 0 on text and padding, k for the k-th modality.
    """
    router: Router | None = getattr(backbone, ATTRIBUTE, None)
    if router is None:
        yield
        return
    whose = _of_media(modality_ids) if router.text == "modality" else modality_ids
    previous, router.modality_ids = router.modality_ids, whose
    idle = router.plan
    try:
        yield
    finally:
        router.modality_ids, router.plan = previous, idle


def _of_media(modality_ids: Tensor) -> Tensor:
    """Gives text, and padding, the modality of the medium before it, or else of the first one."""
    shown = modality_ids != TEXT
    places = torch.arange(shown.shape[1], device=shown.device).expand_as(shown)
    before = places.masked_fill(~shown, -1).cummax(-1).values
    first = shown.int().argmax(-1, keepdim=True)  # 0 where no medium is shown
    return modality_ids.gather(-1, torch.where(before < 0, first, before))
