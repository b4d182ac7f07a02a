"""The folders that the nodes read and write, and the names of files in them."""

from __future__ import annotations

import os
import re

import folder_paths

ADAPTERS = "nested_attention"
SUBJECTS = "nested_attention_subjects"
RUNS = "nested_attention"  # of the output folder: what trainings write
SHIPPED = os.path.join(os.path.dirname(os.path.dirname(__file__)), "weights", "adapters")  # those of the small model
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows, for devices
FILES = {ADAPTERS: {".safetensors", ".sft", ".bin", ".pt", ".pth"}, SUBJECTS: {".safetensors"}}


def register_folders() -> None:
    """Make the folders known to the host, beside any that extra_model_paths.yaml gave for them."""
    for name, extensions in FILES.items():
        own = [os.path.join(folder_paths.models_dir, name), *([SHIPPED] if name == ADAPTERS else [])]
        paths = list(folder_paths.folder_names_and_paths.get(name, ([], set()))[0])
        folder_paths.folder_names_and_paths[name] = ([*paths, *(path for path in own if path not in paths)], extensions)


def choices(folder: str) -> list[str]:
    """Files of a folder for a dropdown; where there is none, one line that says where to put them."""
    return folder_paths.get_filename_list(folder) or [none_found(folder)]


def none_found(folder: str) -> str:
    return f"(none in models/{folder})"


def full_path(folder: str, name: str) -> str:
    """Raises ValueError where there is no such file."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        places = " or ".join(place for place in folder_paths.get_folder_paths(folder) if place != SHIPPED)
        if name == none_found(folder):
            raise ValueError(f"There is no file yet. Put one into {places}, then press R to refresh the list.")
        raise ValueError(f"There is no file '{name}'. Put it into {places}, then press R to refresh the list.")
    return path


def check_file_name(name: str) -> None:
    """Raises ValueError for what Windows or Python has in no name of a file."""
    odd = {letter for letter in name if letter in '<>:"|?*' or not letter.isprintable()}
    if odd:
        found = " ".join(letter if letter.isprintable() else repr(letter) for letter in sorted(odd))
        raise ValueError(f"{name!a} cannot be the name of a file everywhere: leave out {found}")
    for part in re.split(r"[/\\]", name.strip()):
        if RESERVED.fullmatch(part) or (part.endswith((".", " ")) and part.strip(".")):
            raise ValueError(f"'{name}' cannot be the name of a file everywhere: on Windows none is called '{part}'")


def new_file(folder: str, prefix: str) -> tuple[str, str]:
    """A path of a model folder where nothing is yet, numbered as the host's savers do, and its name in the folder.

    Raises ValueError for an empty name, for one that leads elsewhere, and for one that is none on Windows.
    """
    check_file_name(prefix)
    name = os.path.normpath(prefix.strip().replace("\\", "/")).replace("\\", "/")
    if name[0] == "/" or name.split("/")[0] == "..":
        raise ValueError(f"'{prefix}' leads out of models/{folder}: write a name such as anna or friends/anna.")
    if not name.strip(" ."):
        raise ValueError("The file has no name: write one at filename_prefix, such as anna or friends/anna.")
    root = folder_paths.get_folder_paths(folder)[0]
    os.makedirs(root, exist_ok=True)
    # The host finds earlier numbers only by a prefix that is written as it writes it.
    place, name, number, _, _ = folder_paths.get_save_image_path(os.path.normpath(prefix.strip()), root)
    while True:  # where 'Anna' and 'anna' are one file, the host counts them apart
        path = os.path.join(place, f"{name}_{number:05}_.safetensors")
        if not os.path.exists(path):
            return path, os.path.relpath(path, root)
        number += 1


def modified(folder: str, name: str | None) -> float:
    """Changes when the file does, so that the host reads it again. The host gives no name where the input is linked."""
    path = folder_paths.get_full_path(folder, name) if name else None
    return os.path.getmtime(path) if path else 0.0
