"""AdamW with an fp32 master copy, in flat memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

PIECE = 1 << 18
"""Elements that are updated together: their gradient, weight and moments fit in a core's cache."""
# Of a CPU: `graftline.steps.work.set_pieces` sets more on a GPU.


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate. All have one dtype and one device."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float


class MasterAdamW:
    """AdamW (Loshchilov & Hutter, 2019) on fp32 masters of the model's parameters.

    bf16 has 8 bits of mantissa: an update of 1e-5 on a weight of 1e-2 would be lost. Each group
    lies in one flat buffer, so that a step is a few passes over memory instead of thousands of
    small ones; parameters and gradients are views into it.

    Args:
        groups: what is trained.
        weight_decay: decoupled weight decay.
        clip_norm: L2 norm over all groups' gradients that a step is scaled down to.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], weight_decay: float, clip_norm: float
    ) -> None:
        self.groups = list(groups)
        self.clip_norm = clip_norm
        self._flats = [_flatten(group.parameters) for group in self.groups]
        self._masters = [
            flat if flat.dtype == torch.float32 else flat.float() for flat in self._flats
        ]
        self._means = [torch.zeros_like(master) for master in self._masters]
        self._squares = [torch.zeros_like(master) for master in self._masters]
        self.weight_decay = weight_decay
        self._steps = 0

    def step(self, rate_factor: float) -> float:
        """Applies the parameters' gradients and clears them.

        Args:
            rate_factor: the schedule's value in 0..1, times each group's learning rate.

        Returns:
            L2 norm of all gradients before clipping.
        """
        parameters = [parameter for group in self.groups for parameter in group.parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack([value.cpu() for value in norms])))
        scale = min(1.0, self.clip_norm / (norm + 1e-6))
        self._steps += 1
        for number, group in enumerate(self.groups):
            self._update(number, group, group.learning_rate * rate_factor, scale)
        return norm

    @torch.no_grad()
    def _update(
        self, number: int, group: ParameterGroup, learning_rate: float, scale: float
    ) -> None:
        """One group's step, in pieces that stay in the cache from gradient to new weight."""
        flat, master = self._flats[number], self._masters[number]
        means, squares = self._means[number], self._squares[number]
        before = torch.tensor(float(self._steps - 1), dtype=torch.float32, device=master.device)
        divisor = torch.tensor(1.0 / scale, dtype=torch.float32, device=master.device)
        offset = 0
        for parameter in group.parameters:
            whole = _flat_gradient(parameter)
            for start in range(0, len(whole), PIECE):
                piece = whole[start : start + PIECE]
                place = slice(offset + start, offset + start + len(piece))
                adamw(
                    [master[place]], [piece.float()], [means[place]], [squares[place]], [],
                    [before.clone()], fused=True, amsgrad=False, beta1=0.9, beta2=0.999,
                    lr=learning_rate, weight_decay=self.weight_decay, eps=1e-8, maximize=False,
                    grad_scale=divisor, found_inf=None,
                )  # fmt: skip
                if flat is not master:
                    flat[place].copy_(master[place])
            offset += len(whole)
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as named tensors."""
        tensors = {"steps": torch.tensor(self._steps)}
        for number, group in enumerate(self.groups):
            for name, values in self._named():
                tensors[f"{group.name}.{name}"] = values[number]
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state` gave."""
        self._steps = int(tensors["steps"])
        for number, group in enumerate(self.groups):
            for name, values in self._named():
                values[number].copy_(tensors[f"{group.name}.{name}"])
            if self._flats[number] is not self._masters[number]:
                self._flats[number].copy_(self._masters[number])

    def _named(self) -> list[tuple[str, list[Tensor]]]:
        return [("master", self._masters), ("mean", self._means), ("square", self._squares)]


def _flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Moves parameters into one flat buffer that they become views of."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return flat


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    """Its gradient (elements,), of zeros if the loss does not depend on it."""
    gradient = parameter.grad
    return torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
