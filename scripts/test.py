"""Checks the style and runs the tests, in the same environment that the quickstart uses.

Without options everything but the tests marked slow; further options go to pytest.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.environment import SetupError, ensure_host, say  # noqa: E402
from scripts.generate_weights import FOR_TESTS, ensure_weights  # noqa: E402

CORE_NEEDS = ("torch", "einops", "safetensors", "numpy", "PIL", "pytest", "ruff")


def main() -> int:
    arguments, passed_on = _parser().parse_known_args()
    python = _python(arguments.core)
    style = _run(python, "ruff", "check", ".") | _run(python, "ruff", "format", "--check", ".")
    selection = [] if arguments.slow else ["-m", "not slow"]
    if not arguments.core and not passed_on:  # all of them: a disk too small is said now, not after twenty minutes
        ensure_weights(ensure_host(), *FOR_TESTS, *["sdxl"] * arguments.slow)
    tests = _run(python, "pytest", "tests/core" if arguments.core else "tests", *selection, *passed_on)
    if style:
        say("The style check failed: see above, ahead of the tests.")
    return tests or style


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--core", action="store_true", help="only the tests that need no ComfyUI")
    parser.add_argument("--slow", action="store_true", help="also the tests marked slow")
    return parser


def _python(core: bool) -> str:
    """The interpreter for the tests; the core lane is content with the running one if it has all that is needed."""
    if core and all(importlib.util.find_spec(name) for name in CORE_NEEDS):
        return sys.executable
    return str(ensure_host().python)


def _run(python: str, *command: str) -> int:
    return subprocess.run([python, "-m", *command], cwd=ROOT).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SetupError as error:
        sys.exit(f"Set-up failed: {error}")
