"""Adapter files: safetensors with the configuration in the metadata; foreign dialects are read, never written."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapter import NestedAdapter
from .dialects import METADATA_KEY, AdapterFileError, canonical

# Seconds between tries to replace a file: on Windows a virus scanner or a viewer may hold it for a moment.
WAITS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if os.name == "nt" else ()


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Content and metadata of a .safetensors file, or of a .bin or .pt file, which is read with weights_only."""
    if Path(path).suffix.lower() in (".safetensors", ".sft"):
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    return torch.load(path, map_location="cpu", weights_only=True), {}


def build_adapter(state: Mapping[str, Any], metadata: Mapping[str, str], *, operations: Any = nn) -> NestedAdapter:
    """Adapter from a file's content in any dialect; weights keep the file's precision.

    Raises AdapterFileError where anything is missing, left over or of another shape.
    """
    config, tensors = canonical(state, metadata)
    if config.depth + len(config.layers) > len(tensors):  # before so many layers are made
        raise AdapterFileError(
            f"The adapter does not fit its own configuration: {len(tensors)} tensors for a Q-Former of {config.depth} "
            f"layers and {len(config.layers)} nested projections."
        )
    with torch.device("meta"):
        # A host's layers may have no weights until they are loaded: torch's own tell the shapes.
        expected = {name: tuple(tensor.shape) for name, tensor in NestedAdapter(config).state_dict().items()}
        adapter = NestedAdapter(config, operations=operations)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]:
        lines = [f"  {name}: {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}" for name in wrong]
        more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise AdapterFileError("The adapter does not fit its own configuration:\n" + "\n".join(lines[:8] + more))
    adapter.load_state_dict(tensors, assign=True)
    adapter.notes = {name: text for name, text in metadata.items() if name != METADATA_KEY}
    return adapter.requires_grad_(False).eval()


def read_adapter(path: str | Path) -> NestedAdapter:
    """Adapter from a file in any dialect, on the CPU."""
    return build_adapter(*read_tensors(path))


def write_adapter(adapter: NestedAdapter, path: str | Path, *, notes: Mapping[str, str] | None = None) -> None:
    """Write an adapter in the own format. `notes` are further metadata: licence, base model, training record."""
    write_tensors(path, adapter.state_dict(), {**(notes or {}), METADATA_KEY: adapter.config.to_json()})


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, shared: bool = False
) -> None:
    """Write a safetensors file such that it is there whole or not at all. Raises OSError where it cannot be."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        # By a name: for an open file it would be made in memory first.
        place(Path(path), lambda partial: save_file(content, str(partial), dict(metadata)), shared)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written: {error}") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], *, shared: bool = False) -> None:
    """Write such that the file is there whole or not at all; `shared` as for `place`."""

    def fill(partial: Path) -> None:
        with partial.open("wb") as file:
            write(file)

    place(path, fill, shared)


def place(path: Path, fill: Callable[[Path], Any], shared: bool = False) -> None:
    """Have a file filled beside this one, then replace it: a full disk or a killed process leaves the old as it was.

    shared   another process may write the same file at the same time
    """
    # A folder, for what fills it may make further files there, and leave them when it is killed.
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared:
        folder = Path(mkdtemp(".unfinished", f"{path.name}.", path.parent))
    else:
        folder = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        partial = folder / "partial"
        partial.touch()
        mode = partial.stat().st_mode
        fill(partial)
        with suppress(OSError):  # of a file system that knows none
            partial.chmod(mode)  # safetensors puts a file in its place that only its owner can read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        replace_file(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_file(new: Path, old: Path) -> None:
    for wait in (*WAITS, None):
        try:
            return os.replace(new, old)
        except PermissionError:
            if wait is None:
                raise
            time.sleep(wait)
