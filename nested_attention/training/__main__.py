"""Train an adapter: `python -m nested_attention.training --config FILE`, or through torchrun on several devices."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .config import TrainingConfig, TrainingError, from_arguments
from .entries import records
from .processes import joined


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = from_arguments()
        find_host()
        check_paths(config)
        with joined():
            from ..host.base import load_base
            from ..host.train import train

            finished = train(config, load_base(config), stop=stop_signal())
    except (TrainingError, ValueError, OSError) as error:
        sys.exit(f"Training stopped: {error}")
    except KeyboardInterrupt:  # later ones are asked for by stop_signal
        sys.exit("Interrupted before the training began.")
    if not finished:
        sys.exit("Interrupted; checkpoint and adapter hold all steps so far. The same command goes on from there.")


def check_paths(config: TrainingConfig) -> None:
    """Raises TrainingError for what would come up only once the base model is loaded."""
    records(Path(config.data))
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"output = {config.output} cannot be made: {error}.") from error


def find_host() -> None:
    """Make ComfyUI importable: from COMFYUI_PATH, or as the one whose custom_nodes this pack is in."""
    named = os.environ.get("COMFYUI_PATH")
    places = [Path(named)] if named else list(Path(__file__).resolve().parents)
    root = next((place for place in places if (place / "comfy" / "sd.py").exists()), None)
    if root is None:
        raise TrainingError("ComfyUI was not found. Set COMFYUI_PATH to its folder.")
    sys.path.insert(0, str(root))
    from comfy.cli_args import args

    # Before any other import of the host. torch.accelerator, from 2.6 on, also knows of others than CUDA.
    args.cpu = not getattr(torch, "accelerator", torch.cuda).is_available()


def stop_signal() -> Callable[[], bool]:
    """Whether the user or the machine asked to stop; asked once, the step in work is finished and kept first."""
    asked = []

    def ask(number: int, _: object) -> None:
        asked.append(True)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return lambda: bool(asked)


if __name__ == "__main__":
    main()
