"""A comparison's page in headless Chromium: narrow and wide, light and dark, and offline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.flows.browser import CHROMIUM, Browser

PAGE = Path(__file__).resolve().parents[2] / "reports/starter/compare/page.html"
COLOURS = "[getComputedStyle({0}).color, getComputedStyle({0}).backgroundColor]"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


def _brightness(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    values = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_is_read_on_a_phone_in_the_dark_and_without_a_network(tmp_path: Path) -> None:
    browser = Browser(tmp_path)
    try:
        grounds = {}
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.call("Emulation.setEmulatedMedia", features=[feature])
            for width in (360, 1200):
                size = {"width": width, "height": 800, "deviceScaleFactor": 1}
                browser.call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
                browser.call("Page.navigate", url=PAGE.as_uri())
                browser.wait_for("document.readyState === 'complete'")
                assert browser.run("innerWidth") == width
                assert browser.run("document.documentElement.scrollWidth") <= width
                drawn = "[...document.querySelectorAll('figure svg')].map(each => each.clientWidth)"
                widths = browser.run(drawn)
                assert len(widths) >= 2 and all(200 < each <= width for each in widths), widths
                text, ground = browser.run(COLOURS.format("document.body"))
                lighter, darker = sorted(map(_brightness, (text, ground)), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 7.0
                grounds[scheme] = _brightness(ground)
                browser.picture(tmp_path / f"{scheme}-{width}.png")
        assert grounds["dark"] < 0.1 < 0.8 < grounds["light"]
        elsewhere = [each for each in browser.requested if not each.startswith(("file:", "data:"))]
        assert elsewhere == []
    finally:
        browser.close()
