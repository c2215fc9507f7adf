"""Routed inference: in every linear layer and norm, a token meets the weights of its modality.

Text and what is generated meet the backbone's own (merged) weights or, if asked, those of the
medium before them. Attention stays one joint softmax over all tokens; embeddings and the output
layer are shared (MMER, arXiv 2505.17110; token by token as in DAMC, arXiv 2402.12750). DAMC
computes every variant for every token and picks afterwards. Here each token is multiplied once:
tokens stand in order of modality, and each group meets its weights. Norms are routed too where
given (DAMC shares them): fully fine-tuned experts differ there, and only with its own norms is an
expert among others exactly the expert alone.

What it costs: a token's arithmetic is the dense model's, but a modality's weights are read, and
masked ones unpacked, once a pass. One short prompt is bound by that and costs up to one dense pass
a modality; with thousands of tokens in a batch it vanishes. Adapters beside the backbone's own
weights cost little at any size. `benchmarks/routing.py` measures it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from graftline.errors import GraftlineError
from graftline.model.products import multiply
from graftline.model.routing.router import ATTRIBUTE, TEXT, Group, Router, Text
from graftline.model.routing.weights import (
    DenseWeight,
    LowRankWeight,
    MaskedWeight,
    Weight,
)

STREAMED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures (`config.model_type`) known to mix tokens in attention alone.

There, tokens stay in order of modality from the first layer to the last: only queries, keys and
values go to their places, and attention's output comes back. Elsewhere every routed layer puts
its tokens in order and back, which is right for any model and slower.
"""


class RoutedLayer(nn.Module):
    """A layer that treats each token alone, with the weights of the token's modality.

    Args:
        layer: the backbone's own layer; text meets it.
        router: shared by all layers of the backbone.
        ordered: whether tokens come, and whether they leave, in order of modality.
    """

    def __init__(self, layer: nn.Module, router: Router, ordered: tuple[bool, bool]) -> None:
        super().__init__()
        self.layer = layer
        self._router = router
        self._ordered = ordered

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps (batch, length, ...) to (batch, length, ...)."""
        plan = self._router.plan
        if plan.is_text:
            output: Tensor = self.layer(inputs)
            return output
        comes_ordered, leaves_ordered = self._ordered
        rows = (inputs if comes_ordered else plan.gather(inputs)).flatten(0, 1)
        output = self.by_group(rows, plan.groups)
        output = output.view(*inputs.shape[:2], *output.shape[1:])
        return output if leaves_ordered else plan.scatter(output)

    def by_group(self, rows: Tensor, groups: tuple[Group, ...]) -> Tensor:
        """Ordered rows (tokens, ...) to ordered rows, each group with its own weights."""
        raise NotImplementedError


class RoutedLinear(RoutedLayer):
    """A linear layer with a weight, and perhaps a bias, for each modality.

    Args:
        layer: the backbone's own.
        router: shared by all layers of the backbone.
        ordered: whether tokens come, and whether they leave, in order of modality.
        weights: modality -> weight.
        biases: modality -> bias, where it differs from the layer's own.
    """

    layer: nn.Linear

    def __init__(
        self,
        layer: nn.Linear,
        router: Router,
        ordered: tuple[bool, bool],
        weights: Mapping[int, Weight],
        biases: Mapping[int, Tensor],
    ) -> None:
        super().__init__(layer, router, ordered)
        self._weights = dict(weights)
        self._biases = dict(biases)

    def by_group(self, rows: Tensor, groups: tuple[Group, ...]) -> Tensor:
        """Maps ordered rows (tokens, in) to (tokens, out)."""
        output = rows.new_empty(len(rows), self.layer.out_features)
        # Neighbours with one matrix, as adapters beside the backbone's own, share its product.
        for _, run in groupby(groups, key=self._matrix_key):
            members = list(run)
            part = slice(members[0].start, members[-1].stop)
            matrix, bias = self._matrix(members[0].modality), self._bias(members[0].modality)
            multiply(self.layer, rows[part], matrix, bias, output[part])
            for group in members:
                weight = self._weights.get(group.modality)
                if isinstance(weight, LowRankWeight):
                    own = slice(group.start, group.stop)
                    weight.add_to(output[own], rows[own])
        return output

    def _matrix_key(self, group: Group) -> tuple[int, int]:
        weight = self._weights.get(group.modality)
        bias = self._bias(group.modality)
        source = weight.mask if isinstance(weight, MaskedWeight) else self._matrix(group.modality)
        return source.data_ptr(), 0 if bias is None else bias.data_ptr()

    def _matrix(self, modality: int) -> Tensor:
        weight = self._weights.get(modality)
        if weight is None:
            return self.layer.weight
        if isinstance(weight, MaskedWeight):
            assert self._router.scratch is not None
            return weight.unpack(self._router.scratch)
        return weight.base if isinstance(weight, LowRankWeight) else weight.weight

    def _bias(self, modality: int) -> Tensor | None:
        own = self._biases.get(modality)
        return self.layer.bias if own is None else own


class RoutedNorm(RoutedLayer):
    """A norm (or another small layer that treats each token alone) for each modality.

    Args:
        layer: the backbone's own.
        router: shared by all layers of the backbone.
        ordered: whether tokens come, and whether they leave, in order of modality.
        parameters: modality -> parameters of the layer by name.
    """

    def __init__(
        self,
        layer: nn.Module,
        router: Router,
        ordered: tuple[bool, bool],
        parameters: Mapping[int, Mapping[str, Tensor]],
    ) -> None:
        super().__init__(layer, router, ordered)
        # In a plain dictionary: variants are no part of the backbone's state.
        self._layers = {TEXT: layer}
        for modality, values in parameters.items():
            self._layers[modality] = copy.deepcopy(layer).requires_grad_(False)
            for name, value in values.items():
                getattr(self._layers[modality], name).data = value

    def by_group(self, rows: Tensor, groups: tuple[Group, ...]) -> Tensor:
        """Maps ordered rows (tokens, ...) to rows of the same shape."""
        return torch.cat(
            [
                self._layers.get(group.modality, self.layer)(rows[group.start : group.stop])
                for group in groups
            ]
        )


def routable_parameters(backbone: Any) -> list[str]:
    """Names of the backbone's parameters that can be routed: linear layers and norms.

    Embeddings and the output layer are shared by all tokens.
    """
    decoder, embeddings = backbone.get_decoder(), backbone.get_input_embeddings()
    shared = {id(parameter) for parameter in embeddings.parameters()}
    inner = {id(parameter) for parameter in decoder.parameters()} - shared
    return [name for name, value in backbone.named_parameters() if id(value) in inner]


def route_backbone(
    backbone: Any,
    variants: Mapping[int, Mapping[str, Weight]],
    *,
    text: Text = "merged",
    cache: bool = False,
) -> None:
    """Gives each modality's tokens their own weights in a backbone, in place.

    The weights are used as they are, not copied, moved or saved with the backbone: first put the
    backbone where it belongs. `RoutedModel` then routes by its batches' `modality_ids`; for a
    bare backbone see `routed`. Without either, every token is text.

    Args:
        backbone: a `transformers` causal LM; its own weights are the merged ones.
        variants: number of the modality in `Batch.modality_ids` (from 1) -> name of the
            parameter (see `routable_parameters`) -> weight. Every linear layer must be given;
            norms and biases that are not given are the backbone's own for all tokens.
        text: what text and generated tokens meet.
        cache: unpack masked weights now, once, instead of in each pass: fastest, but as much
            memory as a full expert a modality.

    Raises:
        GraftlineError: the backbone is routed already, a parameter is missing, unknown, or a
            weight does not fit it; names it.
    """
    if getattr(backbone, ATTRIBUTE, None) is not None:
        raise GraftlineError("The backbone is routed already; call unroute_backbone first.")
    _check(backbone, variants)
    router = Router(frozenset(variants), text)
    names = {name.rpartition(".")[0] for given in variants.values() for name in given}
    for name in sorted(names):
        own = {
            modality: {
                key: given[f"{name}.{key}"]
                for key, _ in backbone.get_submodule(name).named_parameters(recurse=False)
                if f"{name}.{key}" in given
            }
            for modality, given in variants.items()
        }
        _install(backbone, name, own, router, cache)
    decoder = backbone.get_decoder()
    router.handles.append(decoder.register_forward_pre_hook(router.begin, with_kwargs=True))
    if backbone.config.model_type in STREAMED:
        router.handles.append(decoder.layers[0].register_forward_pre_hook(router.enter))
        router.handles.append(decoder.layers[-1].register_forward_hook(router.leave))
    setattr(backbone, ATTRIBUTE, router)


def _check(backbone: Any, variants: Mapping[int, Mapping[str, Weight]]) -> None:
    parameters = dict(backbone.named_parameters())
    routable = set(routable_parameters(backbone))
    linear = {
        f"{name}.weight"
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in routable
    }
    for modality, given in variants.items():
        if modality < 1:
            raise GraftlineError(f"Modality numbers start at 1 ({TEXT} is text), not {modality}.")
        missing, unknown = sorted(linear - given.keys()), sorted(given.keys() - routable)
        if missing:
            raise GraftlineError(
                f"Modality {modality} has no weight for {missing[0]} ({len(missing)} missing). "
                "Give every linear layer; one that did not change is a DenseWeight of the base's."
            )
        if unknown:
            raise GraftlineError(
                f"Modality {modality}: {unknown[0]} cannot be routed ({len(unknown)} such); "
                "only linear layers and norms inside the decoder can."
            )
        for name, weight in given.items():
            weight.check(f"Modality {modality}, {name}", parameters[name])


def _install(
    backbone: Any, name: str, own: dict[int, dict[str, Weight]], router: Router, cache: bool
) -> None:
    layer = backbone.get_submodule(name)
    parent_name, _, child = name.rpartition(".")
    ordered = _ordered(backbone, name, layer)
    replacement: RoutedLayer
    if isinstance(layer, nn.Linear):
        weights = {modality: given["weight"] for modality, given in own.items()}
        biases = {m: given["bias"].dense() for m, given in own.items() if "bias" in given}
        if cache:
            weights = {
                modality: DenseWeight(weight.dense())
                if isinstance(weight, MaskedWeight)
                else weight
                for modality, weight in weights.items()
            }
        _reserve(router, [w for w in weights.values() if isinstance(w, MaskedWeight)])
        replacement = RoutedLinear(layer, router, ordered, weights, biases)
    else:
        values = {m: {key: w.dense() for key, w in given.items()} for m, given in own.items()}
        replacement = RoutedNorm(layer, router, ordered, values)
    setattr(backbone.get_submodule(parent_name), child, replacement.train(layer.training))


def _ordered(backbone: Any, name: str, layer: nn.Module) -> tuple[bool, bool]:
    """Whether tokens come to a layer in order of modality, and whether they leave it so."""
    if backbone.config.model_type not in STREAMED or ".layers." not in name:
        return False, False
    if ".self_attn." not in name:
        return True, True
    if not isinstance(layer, nn.Linear):  # norms of queries and keys
        return False, False
    leaves = name.endswith(".o_proj")
    return not leaves, leaves


def _reserve(router: Router, weights: list[MaskedWeight]) -> None:
    """Makes the shared buffer large enough for the largest layer."""
    for weight in weights:
        needed = 8 * len(weight.mask)
        if router.scratch is None or len(router.scratch) < needed:
            router.scratch = torch.empty(needed, dtype=weight.base.dtype, device=weight.base.device)


def unroute_backbone(backbone: Any) -> None:
    """Gives a routed backbone its own layers back; on another backbone it does nothing."""
    router: Router | None = getattr(backbone, ATTRIBUTE, None)
    if router is None:
        return
    for name, module in list(backbone.named_modules()):
        if isinstance(module, RoutedLayer):
            parent_name, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent_name), child, module.layer)
    for handle in router.handles:
        handle.remove()
    delattr(backbone, ATTRIBUTE)
