"""The processes that torchrun started, which train one adapter together."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """This process's number among how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def joined(backend: str | None = None) -> Iterator[None]:
    """Where torchrun started several processes, join them and leave them in the end; only the first one logs progress.

    backend   NCCL where there are GPUs, of which each process gets its own; Gloo elsewhere

    What trained in it must be gone at its end: Gloo's threads live as long as their group, and one of them that frees a
    tensor while Python shuts down ends the process with SIGABRT.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # DistributedDataParallel imports it, and a default argument in it keeps the group that there is by then for ever.
    from torch.distributed import fsdp  # noqa: F401

    if backend is None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(days=1))  # the others wait while the first one validates
    logging.getLogger().setLevel(logging.INFO if rank_and_size()[0] == 0 else logging.WARNING)
    yield
    # Not after an error: that would wait for processes which wait for this one. torchrun ends them once it is gone.
    gc.collect()
    dist.destroy_process_group()
