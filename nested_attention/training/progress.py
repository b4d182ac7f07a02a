"""What a training shows of itself: a line in the log, the losses in a file, their curve as a picture."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .config import TrainingError

log = logging.getLogger("nested_attention")
WIDTH, HEIGHT, MARGIN = 800, 400, 50


class Progress:
    """The record of one training in its folder: loss.jsonl, loss.png, and TensorBoard's files if it is installed.

    Raises TrainingError where they cannot be written: nor could anything else of a training that begins.
    """

    def __init__(self, folder: Path, *, steps: int, step: int, log_every: int):
        self.folder, self.steps, self.log_every = folder, steps, log_every
        self.began, self.first = time.monotonic(), step
        # What came after the last checkpoint is done again.
        self.lines = [line for line in read_losses(folder / "loss.jsonl") if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        try:
            write_atomically(folder / "loss.jsonl", lambda file: file.write(text.encode()))
            if not self.lines:  # an empty file fits on a full disk
                self.draw()
            self.board = tensorboard(folder, step)
        except OSError as error:
            raise TrainingError(
                f"The output folder {folder} cannot be written: {error}. Make room there, or choose another."
            ) from error

    def add(self, step: int, **values: float) -> None:
        """Record values of a step. Raises OSError where they cannot be written."""
        line = {"step": step, **values}
        self.lines.append(line)
        with (self.folder / "loss.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        if step % self.log_every == 0 or step == self.steps:
            log.info("%s", self.line(line))

    def close(self) -> None:
        if self.board:
            self.board.close()

    def line(self, values: dict[str, Any]) -> str:
        seconds = (time.monotonic() - self.began) / max(1, values["step"] - self.first)
        left = round(seconds * (self.steps - values["step"]))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "step")
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        return f"step {values['step']}/{self.steps}  {numbers}  {seconds:.3g} s/step  {clock} left"

    def draw(self) -> None:
        """Write loss.png. Raises OSError where it cannot be written."""
        image = loss_curve(self.lines)
        write_atomically(self.folder / "loss.png", lambda file: image.save(file, "PNG"))


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The lines of a loss file; one that was cut off by the end of a process, or damaged, is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def tensorboard(folder: Path, step: int) -> Any:
    """A writer that puts what comes after this step in the place of what was there, or None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential mean, without a bias to the first value."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        result.append(total / weight)
    return result


def loss_curve(lines: list[dict[str, Any]]) -> Any:
    """A picture of the losses over the steps: each one pale, their running mean dark, validation in red."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    mean = list(zip([step for step, _ in training], smooth([loss for _, loss in training]), strict=True))
    validation = [(line["step"], line["validation"]) for line in lines if "validation" in line]
    if not training:
        return image
    ordered = sorted(loss for _, loss in training + validation)
    low, high, last = ordered[0], ordered[int(0.99 * (len(ordered) - 1))], max(1, training[-1][0])
    high = high if high > low else low + 1e-9

    def place(point: tuple[int, float]) -> tuple[float, float]:
        x, y = point[0] / last, min(1.0, (point[1] - low) / (high - low))
        return MARGIN + x * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - y * (HEIGHT - 2 * MARGIN)

    for points, color in ((training, "#b9cbe6"), (mean, "#1f3f77"), (validation, "#c0392b")):
        draw.line([place(point) for point in points], fill=color, width=2)
    draw.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline="#444444")
    draw.text((8, MARGIN - 6), f"{high:.3g}", fill="#444444")
    draw.text((8, HEIGHT - MARGIN - 6), f"{low:.3g}", fill="#444444")
    draw.text((WIDTH - MARGIN - 40, HEIGHT - MARGIN + 6), f"step {last}", fill="#444444")
    return image
