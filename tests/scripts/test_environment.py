"""What the set-up says where it cannot be done."""

import shutil
from types import SimpleNamespace

import pytest

from scripts.environment import SetupError, check_space


def test_a_small_disk_is_said_with_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000_000))
    check_space(tmp_path, 2e9, "A model")
    with pytest.raises(SetupError, match=r"A model needs 2\.1 GB, but the disk of .+ has 2\.0 GB free"):
        check_space(tmp_path, 2.1e9, "A model")
