"""Routed inference: a token meets the weights of its modality."""

from graftline.model.routing.layers import (
    RoutedLinear,
    RoutedNorm,
    routable_parameters,
    route_backbone,
    unroute_backbone,
)
from graftline.model.routing.model import RoutedModel
from graftline.model.routing.router import routed
from graftline.model.routing.weights import DenseWeight, LowRankWeight, MaskedWeight, Weight

__all__ = [
    "DenseWeight",
    "LowRankWeight",
    "MaskedWeight",
    "RoutedLinear",
    "RoutedModel",
    "RoutedNorm",
    "Weight",
    "routable_parameters",
    "route_backbone",
    "routed",
    "unroute_backbone",
]
