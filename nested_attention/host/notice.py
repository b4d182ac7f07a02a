"""Words to the user while a graph runs: in the log, and on the node that they are about."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NOTICE = "nested_attention.notice"

log = logging.getLogger("nested_attention")


def warn(text: str, node_id: str | None = None) -> None:
    """Log a warning and show it on the node."""
    log.warning("Nested Attention: %s", text)
    show(text, node_id, warning=True)


def show(text: str, node_id: str | None, warning: bool = False) -> None:
    """Show text on a node in place of what stood there, to who queued it; warnings also where the node is not seen.

    By web/notices.js: what the front end shows of the host's own progress texts may go when the run ends.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_sync(NOTICE, {"node_id": node_id, "text": text, "warning": warning}, server.client_id)


class Warnings(logging.Handler):
    """Collects what the log warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What the log warns of meanwhile, as it grows."""
    handler = Warnings()
    log.addHandler(handler)
    try:
        yield handler.texts
    finally:
        log.removeHandler(handler)
