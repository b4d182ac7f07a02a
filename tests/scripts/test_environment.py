"""What the set-up says where it cannot be done, and the scripts that begin with it where they are asked."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.environment import SetupError, check_space

SCRIPTS_FOLDER = Path(__file__).parents[2] / "scripts"
SCRIPTS = [path.name for path in SCRIPTS_FOLDER.glob("*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8")]


def test_a_small_disk_is_said_with_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000_000))
    check_space(tmp_path, 2e9, "A model")
    with pytest.raises(SetupError, match=r"A model needs 2\.1 GB, but the disk of .+ has 2\.0 GB free"):
        check_space(tmp_path, 2.1e9, "A model")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_is_asked_for_help_does_nothing_else(name):
    command = [sys.executable, str(SCRIPTS_FOLDER / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
