"""The real front end in a real browser, on the server of all tests."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("playwright")
pytest.importorskip("aiohttp")

from scripts.browser import BrowserError, find_chromium, open_canvas


@pytest.fixture(scope="session")
def chromium():
    """Skips where there is no browser, but fails in CI: there one was asked for."""
    try:
        return find_chromium()
    except BrowserError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


# Not for the session: as long as it is open, an event loop runs, and the client of other tests starts its own.
@pytest.fixture(scope="module")
def canvas(chromium, server):
    with open_canvas(server) as canvas:
        yield canvas
