"""Writes generated weights in real architectures, to run the pack where no trained ones are at hand.

The files open like trained ones, and pictures made with them are noise. Only what is missing is written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script, not imported
    sys.path[0] = str(ROOT)

from scripts.environment import Host, SetupError, check_space, ensure_host, enter, say  # noqa: E402

FILES = {
    "sd15": "checkpoints/generated-sd15.safetensors",
    "sdxl": "checkpoints/generated-sdxl.safetensors",
    "vit-h": "clip_vision/generated-vit-h.safetensors",
    "person-sd15": "nested_attention/generated-person-sd15.safetensors",
    "person-sdxl": "nested_attention/generated-person-sdxl.safetensors",
    "dog-sdxl": "nested_attention/generated-dog-sdxl.safetensors",
}

FOR_TESTS = ("sd15", "vit-h", "person-sd15", "person-sdxl")


def paths(models: Path, names: Sequence[str]) -> list[Path]:
    """Where the files of these names are, or will be, in a models folder."""
    return [models / FILES[name] for name in names]


def ensure_weights(host: Host, *names: str) -> list[Path]:
    """Generate the named files that are missing and return the paths of all named.

    A process of its own does it, since ComfyUI's modules settle on a device once for each process.
    """
    wanted = paths(host.models, names)
    if not all(path.is_file() for path in wanted):
        done = subprocess.run([str(host.python), str(Path(__file__).resolve()), *names])
        if done.returncode:
            raise SetupError("Generating the weights failed (the reason stands above).")
    return wanted


def write_missing(models: Path, names: Sequence[str]) -> None:
    """Write those of the named files that are not there yet. Raises SetupError without room for all of them."""
    from scripts.random_weights import size, write_random

    missing = [name for name, path in zip(names, paths(models, names), strict=True) if not path.is_file()]
    contents = {name: _content(name) for name in missing}
    models.mkdir(parents=True, exist_ok=True)
    check_space(models, sum(size(shapes) for shapes, _ in contents.values()), "Generating the weights")
    for name, content in contents.items():
        started = time.monotonic()
        say(f"Generating {FILES[name]}")
        write_random(models / FILES[name], *content)
        say(f"  {(models / FILES[name]).stat().st_size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")


def _content(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata of a file."""
    from scripts import adapter_shapes, architectures

    builders = {"sd15": architectures.sd15, "sdxl": architectures.sdxl, "vit-h": architectures.vit_h}
    return (builders[name](), {}) if name in builders else adapter_shapes.described(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which: {', '.join(FILES)} (default: all)")
    parser.add_argument("--models", type=Path, help="the models folder to write into (default: the development host's)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(FILES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(FILES)}")
    host = ensure_host()
    enter(host)
    sys.path.insert(0, str(host.comfyui))
    write_missing(arguments.models or host.models, arguments.names or list(FILES))


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as error:
        sys.exit(f"Set-up failed: {error}")
