"""The pack as users get it: the archive, unpacked into a ComfyUI that has nothing else."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.environment import BASE_FOLDERS, Host, ensure_host
from scripts.pack import pack, shipped_files


@pytest.fixture(scope="session")
def names() -> list[str]:
    """What the archive holds: git is asked, so this needs a clone."""
    return shipped_files()


@pytest.fixture(scope="session")
def archive(names, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "pack.zip"
    pack(path, names)
    return path


@pytest.fixture(scope="session")
def install(archive, tmp_path_factory) -> Callable[[str], tuple[Host, Path]]:
    """Unpacks the archive into custom_nodes of a new base folder: gives the host with that base, and the pack there."""

    def installed(folder_name: str) -> tuple[Host, Path]:
        base = tmp_path_factory.mktemp("base")
        for name in BASE_FOLDERS:
            (base / name).mkdir()
        pack_folder = base / "custom_nodes" / folder_name
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(pack_folder)
        return replace(ensure_host(), base=base), pack_folder

    return installed
