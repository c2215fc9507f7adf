"""What the merge rules share: their shape, sums that forget the order, rounding once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Statistics = Mapping[str, tuple[float, ...]]
"""What a rule has to know of more than one element: name -> one number an expert."""

Scope = Literal["global", "tensor"]


class MergeParameters(BaseModel):
    """Base of all rules' parameters: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ScopedParameters(MergeParameters):
    """Parameters of a rule that looks at more than one element at a time."""

    scope: Scope = Field(
        "global",
        description="global: thresholds over all merged tensors, as in the paper; "
        "tensor: each tensor for itself",
    )


_FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}

PerExpert = float | tuple[float, ...]
"""One number for all experts, or one for each in their order."""


@dataclass(frozen=True)
class Context:
    """Where a piece of a tensor comes from.

    Attributes:
        name: the tensor's name.
        offset: index of the piece's first element in the flattened tensor.
        seed: of all random choices.
        statistics: from `Rule.gather`; None: taken from the given tensors alone, which only
            `scope="tensor"` allows.
    """

    name: str = ""
    offset: int = 0
    seed: int = 0
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Merged:
    """What a rule makes of a tensor.

    Attributes:
        tau: the merged task vector in the base's shape: float32, or float64 where the rule is a
            plain sum; add it with `added`, which rounds once.
        masks: a bool tensor an expert, in the base's shape; None: one model for all.
        scales: what multiplies each expert's masked task vector; None where `masks` is.
    """

    tau: Tensor
    masks: tuple[Tensor, ...] | None = None
    scales: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Block:
    """A piece of one tensor in all models, and how many elements the whole tensor has."""

    base: Tensor
    experts: tuple[Tensor, ...]
    size: int


Found = TypeVar("Found")


class Walk(Protocol):
    """Goes over all blocks once more each time it is called."""

    def __call__(
        self, work: Callable[[Iterable[Block]], Found], /, *, sparse: bool = False
    ) -> Iterable[Found]:
        """Calls `work` with one run of blocks after the other, maybe in several threads.

        Args:
            work: what to do with a run.
            sparse: a sample will do: parts of each tensor, in proportion to its size.

        Returns:
            What `work` found, in the order of the blocks, which is the same each time.
        """


def walk_over(blocks: Sequence[Block]) -> Walk:
    """A walk over blocks that are in memory, all in one run."""

    def walk(
        work: Callable[[Iterable[Block]], Found], /, *, sparse: bool = False
    ) -> Iterable[Found]:
        yield work(blocks)

    return walk


Merge = Callable[[Tensor, Sequence[Tensor], Any, Context], Merged]
Gather = Callable[[Walk, Any], Statistics]


@dataclass(frozen=True)
class Rule:
    """A merge rule.

    Attributes:
        name: as recipes and the command line call it.
        paper: where it comes from.
        parameters: the model of its parameters, defaults from the paper.
        merge: `merge(base, experts, parameters, context)`: a piece of a tensor, element by
            element, so that any way of cutting gives the same bytes.
        gather: takes the statistics that `merge` needs; None: it needs none.
        symmetric: the experts' order does not change one byte of `tau`.
        one_per_expert: the result is a model an expert (shared weights and masks).
        uses_base: False: the result does not depend on the base.
    """

    name: str
    paper: str
    parameters: type[MergeParameters]
    merge: Merge
    gather: Gather | None = None
    symmetric: bool = True
    one_per_expert: bool = False
    uses_base: bool = True

    def statistics(self, walk: Walk, parameters: MergeParameters) -> Statistics | None:
        """Takes the statistics over all blocks; None where the rule needs none."""
        return None if self.gather is None else self.gather(walk, parameters)


def statistics_of(
    gather: Gather,
    base: Tensor,
    experts: Sequence[Tensor],
    parameters: ScopedParameters,
    context: Context,
) -> Statistics:
    """The context's statistics, or those of these tensors alone where the scope is `tensor`.

    Raises:
        ValueError: the scope is global and the context brings no statistics.
    """
    if context.statistics is not None:
        return context.statistics
    if parameters.scope == "global":
        raise ValueError(
            "scope='global' needs Rule.statistics over all tensors first; "
            "choose scope='tensor' for one tensor by itself"
        )
    return gather(walk_over([Block(base, tuple(experts), base.numel())]), parameters)


def per_expert(value: PerExpert, count: int, name: str) -> tuple[float, ...]:
    """One number an expert.

    Raises:
        ValueError: there are not as many numbers as experts.
    """
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} experts")
    return value


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """tau_i = expert_i - base in float32.

    Args:
        base: floating point, any shape.
        experts: of the base's shape, floating point.

    Raises:
        ValueError: there is no expert, or one has another shape.
    """
    check_shapes(base, experts)
    start = base.float()
    return [expert.to(torch.float32, copy=True).sub_(start) for expert in experts]


def check_shapes(base: Tensor, experts: Sequence[Tensor]) -> None:
    """Refuses experts that do not have the base's shape.

    Raises:
        ValueError: there is no expert, or one has another shape.
    """
    if not experts:
        raise ValueError("there is no expert to merge")
    for expert in experts:
        if expert.shape != base.shape:
            raise ValueError(
                f"an expert is {tuple(expert.shape)} where the base is {tuple(base.shape)}"
            )


def ordered(terms: Sequence[Tensor]) -> list[Tensor]:
    """Sorts element by element, so that sums over the rows forget the order of the terms.

    Args:
        terms: tensors of one shape and dtype.

    Returns:
        As many tensors, the smallest elements first; one or two terms as they are, because
        adding two commutes (but more do not associate).
    """
    rows = list(terms)
    if len(rows) > 2:
        for end in range(len(rows) - 1, 0, -1):
            for left in range(end):
                low = torch.minimum(rows[left], rows[left + 1])
                rows[left + 1] = torch.maximum(rows[left], rows[left + 1])
                rows[left] = low
    return rows


def ordered_sum(terms: Sequence[Tensor]) -> Tensor:
    """Sums in float64; the same bytes for every order of the terms.

    Args:
        terms: tensors of one shape and dtype, finite, at least one.
    """
    return gathered(terms if _sum_exactly(terms) else ordered(terms))


def _sum_exactly(terms: Sequence[Tensor]) -> bool:
    """Whether float64 holds every sum of the terms, so that no order rounds; True is certain.

    All terms are multiples of the last bit of the smallest of them that is not 0, and their sum
    is below their number times twice the power of two of the largest.
    """
    fraction = _FRACTION_BITS.get(terms[0].dtype)
    if fraction is None or len(terms) < 3:
        return False
    short = fraction < 23
    most = (1 << 16 if short else 1 << 32) - 1
    low, high = most, 0
    for term in terms:
        signed = term.flatten().view(torch.int16 if short else torch.int32).numpy()
        words: npt.NDArray[Any] = signed.view(np.uint16 if short else np.uint32)
        bits = words & (most >> 1)
        high = max(high, int(bits.max(initial=0)))
        bits -= 1  # 0 turns into the largest number
        low = min(low, int(bits.min(initial=most)) + 1)
    exponents = (high >> fraction) - max(low >> fraction, 1)  # of subnormal numbers: that of 1
    return len(terms) << max(exponents + fraction + 1, 0) <= 1 << 53


def gathered(rows: Sequence[Tensor]) -> Tensor:
    """Sums rows in float64, one after the other."""
    total = rows[0].to(torch.float64, copy=True).add_(0.0)  # no negative zero
    for row in rows[1:]:
        total += row
    return total


def rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float64 to the nearest value of a dtype, halves to even.

    torch goes from float64 to the 16-bit dtypes by way of float32 and so rounds twice. Rounding
    to odd on that way (the bits that float32 lacks leave their trace in its last one) makes the
    second rounding the only one, down to float32's smallest normal number, 1.2e-38.

    Args:
        values: float64, any shape; not changed.
        dtype: a floating dtype.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    lost = np.int64((1 << 29) - 1)  # a double has 29 more fraction bits than a float
    bits = values.contiguous().view(torch.int64).numpy()
    trace = np.empty_like(bits)
    np.bitwise_and(bits, lost, out=trace)  # numpy's integers are twice as fast as torch's
    trace += lost
    trace |= bits
    trace &= ~lost
    return torch.from_numpy(trace).view(torch.float64).float().to(dtype)


def added(base: Tensor, tau: Tensor) -> Tensor:
    """Adds base + tau in float64, rounded once to the base's dtype.

    Args:
        base: floating point, any shape.
        tau: float32 or float64, same shape.

    Returns:
        A tensor in the base's dtype; bit-identical to the base where tau is 0.
    """
    if base.dtype == torch.bfloat16 and tau.dtype == torch.float32:
        return _added_by_float32(base, tau)
    return rounded_once(base.to(torch.float64, copy=True).add_(tau), base.dtype)


def _added_by_float32(base: Tensor, tau: Tensor) -> Tensor:
    """The same in half the time: float64 adds the few sums that float32 puts halfway.

    Rounding twice goes wrong only where the first rounding ends halfway between two bfloat16
    values, that is, with 1000... in the lower half of a float32; anywhere else it stays on the side
    of all such points on which the sum itself lies.
    """
    total = base.flatten().float().add_(tau.flatten())
    rounded = total.to(torch.bfloat16)
    halfway = np.flatnonzero(total.view(torch.int32).numpy() & 0xFFFF == 0x8000)
    if halfway.size:
        few = torch.from_numpy(halfway)
        exact = base.flatten()[few].double() + tau.flatten()[few]
        rounded[few] = rounded_once(exact, torch.bfloat16)
    return rounded.view(base.shape)


def decoupled(base: Tensor, merged: Merged, index: int) -> Tensor:
    """An expert's own tensor, base + scale_i * mask_i * tau (MMER; EMR-Merging).

    Args:
        base: floating point, any shape.
        merged: what the rule made of this tensor.
        index: the expert's place; without masks every expert has the merged tensor.

    Returns:
        A tensor in the base's dtype and shape; the base's own bits where the mask is 0.
    """
    if merged.masks is None or merged.scales is None:
        return added(base, merged.tau)
    return added(base, merged.tau.double() * merged.masks[index] * merged.scales[index])
