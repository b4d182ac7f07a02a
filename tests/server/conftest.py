"""The server with generated weights of full architectures."""

from __future__ import annotations

import pytest

pytest.importorskip("aiohttp")

from served import Studio

from scripts.environment import ensure_host
from scripts.generate_weights import FOR_TESTS, ensure_weights


@pytest.fixture(scope="session")
def studio(server):
    ensure_weights(ensure_host(), *FOR_TESTS)
    return Studio(server, server.object_info())


@pytest.fixture(scope="session")
def reference(studio):
    """What the SD 1.5 workflow draws, and its prompt."""
    prompt = studio.prompt("one_subject_sd15")
    return prompt, studio.draw(prompt)
