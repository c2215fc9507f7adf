"""Graftline grows a multimodal LLM one modality at a time without hurting what it knows."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("graftline")
except PackageNotFoundError:  # used from its folder without being installed
    __version__ = "0"
