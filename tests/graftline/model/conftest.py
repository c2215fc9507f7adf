"""What tests of routing share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.graftline.model.routing_setting import KINDS, Setting


@pytest.fixture(params=KINDS)
def setting(request, tiny_folder: Path) -> Setting:
    return Setting(tiny_folder, request.param)
