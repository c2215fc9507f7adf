"""Encoders that are a Python class of an installed package: `source: python`.

The class has two attributes and one method, and its arguments are the recipe's `settings`:

    class MyEncoder:
        tokens = 4   # that a medium becomes
        width = 32   # of a token

        def encode(self, media):  # a list of decoded media
            ...                   # (batch, tokens, width), a torch tensor or a numpy array
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftline.errors import GraftlineError
from graftline.model.pretrained import TRUST_VARIABLE
from graftline.settings.models import PythonEncoder
from graftline.settings.type_problems import nearest

GROUP = "graftline.encoders"
"""The entry points' group."""
_RAISED = (Exception, SystemExit)
"""Whatever a user's code raises; `sys.exit()` of its own would end Graftline without a word."""
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def find_class(reference: str) -> Any:
    """The class that a recipe names; only what can be imported, never a file's path.

    Args:
        reference: `package.module:Class`, or a name of the entry points' group.

    Raises:
        GraftlineError: there is no such package, class or entry point.
    """
    if ":" in reference:
        return _imported(reference)
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    if reference not in found:
        raise GraftlineError(
            f"python: no installed package has an entry point {reference!r} in the group {GROUP} "
            f"(there are: {', '.join(sorted(found)) or 'none'}); write package.module:Class, or "
            "install the package"
        )
    return _imported(found[reference])


def _imported(reference: str) -> Any:
    if not _REFERENCE.fullmatch(reference):
        raise GraftlineError(f"python: {reference!r} is not of the form package.module:Class")
    module_name, _, class_name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except _RAISED as error:
        raise GraftlineError(
            f"python: {module_name} cannot be imported ({error!r}); install its package into the "
            "environment of graftline"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise GraftlineError(f"python: {module_name} has no class {class_name}")
    if not callable(getattr(found, "encode", None)):  # nothing else is ever made by its name
        raise GraftlineError(
            f"python: {reference} is no encoder: it has no method encode(media); an encoder has "
            "tokens, width and encode(media)"
        )
    return found


def check_stranger(settings: Mapping[str, Any]) -> None:
    """Lets a class that a folder names, and no recipe of the user's, run only where it may.

    An entry point is there because the user installed its package as an encoder.

    Args:
        settings: of an encoder, as the folder has them.

    Raises:
        GraftlineError: the folder alone asks for it.
    """
    reference = str(settings.get("python", ""))
    if ":" in reference and os.environ.get(TRUST_VARIABLE) != "1":
        raise GraftlineError(
            f"it names the Python class {reference} as an encoder, which would be run. If that is "
            f"your own, or you have read it, set {TRUST_VARIABLE}=1 for this command"
        )


def class_identity(reference: str) -> dict[str, str]:
    """The class's full name and the digest of the file that defines it.

    What that file imports is not counted: give the class another name, or change a setting, when
    something beneath it changes what it computes.

    Raises:
        GraftlineError: there is no such class, or no source file of it.
    """
    found = find_class(reference)
    specification = importlib.util.find_spec(found.__module__)
    if specification is None or not specification.origin:
        raise GraftlineError(f"python: {reference} has no source file that could be identified")
    digest = hashlib.sha256(Path(specification.origin).read_bytes()).hexdigest()
    return {"name": f"{found.__module__}:{found.__qualname__}", "sha256": digest}


def settings_problem(encoder: PythonEncoder) -> str | None:
    """What the class's signature says against the settings; nothing is made.

    Raises:
        GraftlineError: there is no such class.
    """
    try:
        signature = inspect.signature(find_class(encoder.python))
    except (TypeError, ValueError):  # a class that does not say what it takes
        return None
    try:
        signature.bind(**encoder.settings)
    except TypeError as error:
        known = list(signature.parameters)
        unknown = [key for key in encoder.settings if key not in known]
        near = nearest(unknown[0], known) if unknown else ""
        given = ", ".join(encoder.settings) or "nothing"
        return f"settings: {encoder.python}: {error} (given: {given}{near})"
    return None


class OwnClassEncoder:
    """A user's class behind the checks that every encoder's features pass.

    Args:
        settings: of the recipe.
        sha256: identity of class and settings.

    Raises:
        GraftlineError: the class cannot be made so, or lacks what an encoder has.
    """

    def __init__(self, settings: PythonEncoder, sha256: str) -> None:
        self.name, self.sha256 = settings.python, sha256
        found = find_class(settings.python)
        try:
            self._own = found(**settings.settings)
            self.tokens, self.width = int(self._own.tokens), int(self._own.width)
            self._encode = self._own.encode
        except _RAISED as error:
            raise GraftlineError(
                f"{self.name}: cannot be made with the settings {settings.settings} ({error!r}); "
                "an encoder has tokens, width and encode(media)"
            ) from error
        if min(self.tokens, self.width) < 1:
            raise GraftlineError(
                f"{self.name}: says {self.tokens} tokens of width {self.width}; both are at least 1"
            )

    @torch.no_grad()
    def encode(self, media: Sequence[np.ndarray]) -> torch.Tensor:
        """Encodes decoded media.

        Returns:
            (batch, tokens, width) float32 on the CPU.

        Raises:
            GraftlineError: the class raises, or gives another shape than it says; gives both.
        """
        try:
            features = torch.as_tensor(self._encode(list(media))).detach().to("cpu", torch.float32)
        except GraftlineError:
            raise
        except _RAISED as error:
            raise GraftlineError(f"{self.name}: encode raised {error!r}") from error
        expected = (len(media), self.tokens, self.width)
        if tuple(features.shape) != expected:
            raise GraftlineError(
                f"{self.name}: gave features {tuple(features.shape)}; expected {expected}: "
                f"{self.tokens} tokens of width {self.width} as the class says"
            )
        return features
