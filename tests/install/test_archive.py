"""The archive holds what users need, and no more."""

from __future__ import annotations

import json
import zipfile
from pathlib import PurePosixPath

from scripts.environment import ROOT

FOLDERS = set("assets docs locales nested_attention nodes subgraphs web weights workflows".split())
FILES = {"CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml", "requirements.txt", "train.py"}
WEIGHTS = {"studio.safetensors", "adapters/studio_person.safetensors", "adapters/studio_pet.safetensors"}
REGISTRY_LIMIT = 100e6  # bytes; far more would be a mistake


def test_nothing_but_what_users_need(names):
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert tops == FOLDERS | FILES


def test_all_code_texts_and_weights(names):
    for folder in ("nested_attention", "nodes"):
        assert {str(path.relative_to(ROOT).as_posix()) for path in (ROOT / folder).rglob("*.py")} <= set(names)
    assert {f"weights/{name}" for name in WEIGHTS} <= set(names)
    assert {f"locales/{language}/nodeDefs.json" for language in ("en", "zh")} <= set(names)


def test_the_photos_that_workflows_name_and_their_licences(names):
    photos = {photo for path in (ROOT / "workflows").glob("*.json") for photo in loaded_images(path)}
    photos.discard("example.png")  # is ComfyUI's
    shipped = {PurePosixPath(name).name for name in names if name.startswith("assets/")}
    assert shipped == {*photos, "README.md"}


def test_the_archive_is_those_files_unchanged(names, archive):
    with zipfile.ZipFile(archive) as packed:
        assert packed.namelist() == names
        assert all(packed.read(name) == (ROOT / name).read_bytes() for name in names)
    assert archive.stat().st_size < REGISTRY_LIMIT


def loaded_images(workflow) -> set[str]:
    nodes = json.loads(workflow.read_text(encoding="utf-8"))["nodes"]
    return {node["widgets_values"][0] for node in nodes if node["type"] == "LoadImage"}
