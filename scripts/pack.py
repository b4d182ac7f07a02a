"""Packs what the Comfy registry hands to users: dist/nested-attention.zip."""

from __future__ import annotations

import argparse
import subprocess
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "dist" / "nested-attention.zip"
KNOWN = ("--cached", "--others", "--exclude-standard")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    names = shipped_files()
    pack(ARCHIVE, names)
    megabytes = ARCHIVE.stat().st_size / 1e6
    print(f"Packed {len(names)} files into {ARCHIVE.relative_to(ROOT)} ({megabytes:.1f} MB).")


def shipped_files() -> list[str]:
    """The files that the next commit can hold, less those that .comfyignore names.

    In a fresh checkout these are the tracked ones, which is what `comfy node pack` takes.
    """
    known = _git(*KNOWN)
    left_out = _git("--ignored", "--cached", "--exclude-from=.comfyignore")
    left_out |= _git("--ignored", "--others", "--exclude-from=.comfyignore")
    return sorted(name for name in known - left_out if (ROOT / name).is_file())


def pack(target: Path, names: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(ROOT / name, name)


def _git(*options: str) -> set[str]:
    found = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, check=True, capture_output=True)
    return set(found.stdout.decode().split("\0")) - {""}


if __name__ == "__main__":
    main()
