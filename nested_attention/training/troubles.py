"""What goes wrong in a training and need not end it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .config import TrainingError

log = logging.getLogger("nested_attention")
BROKEN = (OSError, ValueError, RecursionError)  # what is raised for an entry that cannot be used


class BrokenEntry(TrainingError):
    """An entry could not be read; the training is as it was before."""


@dataclass
class Troubles:
    """What goes wrong on the way: the first stops the training, or each is named and counted, as configured."""

    on_error: str
    count: int = 0

    def report(self, problem: str, error: type[TrainingError] = TrainingError) -> None:
        self.count += 1
        if self.on_error == "stop":
            raise error(f"{problem} (To leave such things out and go on, set on_error to skip.)")
        log.warning("Skipped (%d so far): %s", self.count, problem)
