"""Makes ComfyUI importable, where there is one, and starts one real server for all tests that want it.

The tests in `core` need neither.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.environ.get("COMFYUI_PATH", str(Path(__file__).parents[1] / ".host" / "ComfyUI")))

MODEL_FOLDERS = ("nested_attention", "nested_attention_subjects")

torch.set_num_threads(1)  # the models of these tests are small: more threads only wait for each other
torch.backends.cudnn.allow_tf32 = False  # convolutions on a GPU are as exact as on a CPU

if importlib.util.find_spec("comfy"):
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()  # before any other import of the host


class _RootIsAFolder:
    """pytest would import the repository's __init__.py as a package of tests, and that needs ComfyUI."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == parent.config.rootpath else None


def pytest_configure(config):
    config.pluginmanager.register(_RootIsAFolder())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What the tests write into the server: input, output, settings, and model folders beside its usual ones."""
    root = tmp_path_factory.mktemp("server")
    for name in ("input", "output", "user", *MODEL_FOLDERS):
        (root / name).mkdir()
    return root


@pytest.fixture(scope="session")
def server(folder):
    """A client of the server, which has our photographs and no generated weights yet."""
    pytest.importorskip("aiohttp")
    from scripts.environment import ROOT, ensure_host
    from scripts.server import running_server

    paths = folder / "extra_model_paths.yaml"
    paths.write_text(json.dumps({"tests": {"base_path": str(folder), **{name: name for name in MODEL_FOLDERS}}}))
    options = [text for name in ("input", "output", "user") for text in (f"--{name}-directory", str(folder / name))]
    options += ["--extra-model-paths-config", str(paths)]
    with running_server(ensure_host(), options, folder / "log.txt") as client:
        for photo in (ROOT / "assets").glob("*.png"):
            client.upload_image(photo)
        yield client
