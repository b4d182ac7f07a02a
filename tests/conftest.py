"""Makes ComfyUI importable, where there is one: the tests in `core` need none."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.environ.get("COMFYUI_PATH", str(Path(__file__).parents[1] / ".host" / "ComfyUI")))

torch.set_num_threads(1)  # the models of these tests are small: more threads only wait for each other

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
