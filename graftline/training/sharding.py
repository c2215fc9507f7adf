"""Training a backbone that no single device holds: each process keeps a share of its weights.

By torch's FSDP2 (`fully_shard`; Rajbhandari et al., 2020, stage 3). `accelerate` would call the
same function, but on GPUs alone; called here, what the tests run on CPU is what GPUs run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from graftline.model.multimodal import MultimodalModel
from graftline.team import current
from graftline.training.optimizer import ParameterGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardedAdamW:
    """AdamW on fp32 masters, as `MasterAdamW`, of which each process of a team holds a share.

    Splits the model's backbone in place. Connectors are small and stay whole in every process: a
    batch's part may hold no medium of theirs, and then they are not called there.

    Args:
        model: the model, the same in each process; its backbone may lie on the CPU.
        groups: what is trained.
        weight_decay: decoupled weight decay.
        clip_norm: L2 norm over all groups' gradients that a step is scaled down to.
        device: what this process computes on.
    """

    def __init__(
        self,
        model: MultimodalModel,
        groups: Sequence[ParameterGroup],
        weight_decay: float,
        clip_norm: float,
        device: torch.device,
    ) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        named = [[names[id(parameter)] for parameter in group.parameters] for group in groups]
        self._model, self._whole = model, _empty_copy(model.backbone)
        _split(model, device)
        parameters = dict(model.named_parameters())
        self._named = {name: parameters[name] for group in named for name in group}
        self._rates = [group.learning_rate for group in groups]
        self._adamw = torch.optim.AdamW(
            [{"params": [parameters[name] for name in group]} for group in named],
            lr=0.0, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8,
        )  # fmt: skip
        self._clip_norm = clip_norm
        for parameter in self._named.values():
            self._adamw.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, rate_factor: float) -> float:
        """Applies the gradients and clears them.

        Args:
            rate_factor: the schedule's value in 0..1, times each group's learning rate.

        Returns:
            L2 norm of all gradients before clipping.
        """
        split, whole = [], []
        for parameter in self._named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if _is_split(parameter):
                split.append(parameter)  # FSDP has averaged its gradient
            else:
                whole.append(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= current().size
        norm = float(torch.linalg.vector_norm(torch.tensor([_norm(split), _norm(whole)])))
        scale = min(1.0, self._clip_norm / (norm + 1e-6))
        for parameter in self._named.values():
            assert parameter.grad is not None
            parameter.grad *= scale
        for group, rate in zip(self._adamw.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        self._adamw.step()
        self._adamw.zero_grad()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything that this process needs to go on, as named tensors."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._states()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state` gave."""
        with torch.no_grad():
            for name, tensor in self._states():
                tensor.copy_(tensors[name])

    def gather(self) -> None:
        """Gives the model a whole backbone again: in the first process, on the CPU."""
        targets = dict(self._whole.named_parameters())
        with torch.no_grad():
            for name, parameter in self._model.backbone.named_parameters():
                full = parameter.full_tensor() if _is_split(parameter) else parameter
                if current().first:
                    targets[name].copy_(full)
        self._model.backbone = self._whole.eval()

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named.items():
            yield f"{name}.master", _share(parameter.detach())
            for key, value in self._adamw.state[parameter].items():
                yield f"{name}.{key}", _share(value)


def _empty_copy(backbone: Any) -> Any:
    """The same modules with memory for their weights, which takes none before it is written to."""
    memory = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
        for parameter in backbone.parameters()
    }
    return copy.deepcopy(backbone, memory)


def _split(model: MultimodalModel, device: torch.device) -> None:
    """Splits the backbone layer by layer; what is trained becomes float32, the master itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    computing = model.backbone.dtype
    model.connectors.to(device)
    mesh = init_device_mesh(device.type, (current().size,))
    # Inputs stay what they are: media reach the connectors in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=computing, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    kinds = set(getattr(model.backbone, "_no_split_modules", None) or ())
    for module in list(model.backbone.modules()):
        if type(module).__name__ in kinds:
            _widen(module)
            fully_shard(module, mesh=mesh, mp_policy=policy)
    connectors = set(model.connectors.parameters())
    _widen(model)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=connectors)


def _widen(module: nn.Module) -> None:
    """Makes what is trained float32, but for what is split already: its own master."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _norm(parameters: Sequence[Tensor]) -> float:
    """L2 norm of their gradients, over all processes where each holds a share."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    found = torch.nn.utils.get_total_norm(gradients)
    return float(found.full_tensor() if _is_split(found) else found)


def _share(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return tensor.to_local() if _is_split(tensor) else tensor
