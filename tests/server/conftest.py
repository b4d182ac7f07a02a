"""One real server for all tests of this folder, with folders of its own for what the tests write."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("aiohttp")

from served import Studio

from scripts.environment import ROOT, ensure_host
from scripts.generate_weights import ensure_weights
from scripts.server import running_server


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Holds input, output and the model folders that the server searches beside its usual ones."""
    root = tmp_path_factory.mktemp("server")
    for name in ("input", "output", "nested_attention", "nested_attention_subjects"):
        (root / name).mkdir()
    return root


@pytest.fixture(scope="session")
def studio(folder):
    host = ensure_host()
    ensure_weights(host, "sd15", "vit-h", "person-sd15", "person-sdxl")
    paths = folder / "extra_model_paths.yaml"
    names = ("nested_attention", "nested_attention_subjects")
    paths.write_text(json.dumps({"tests": {"base_path": str(folder), **{name: name for name in names}}}))
    options = ["--input-directory", str(folder / "input"), "--output-directory", str(folder / "output")]
    with running_server(host, [*options, "--extra-model-paths-config", str(paths)], folder / "log.txt") as client:
        for photo in (ROOT / "assets").glob("*.png"):
            client.upload_image(photo)
        yield Studio(client, client.object_info())


@pytest.fixture(scope="session")
def reference(studio):
    """What the SD 1.5 workflow draws, and its prompt."""
    prompt = studio.prompt("one_subject_sd15")
    return prompt, studio.draw(prompt)
