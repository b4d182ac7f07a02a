"""How the benchmarks measure: variants in turn within one run, medians, peak memory, a table and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
MB = 1e6

Call = Callable[[], Any]


def now() -> float:
    """Seconds, once the device is done. With one thread on the CPU: processor time, which others hardly disturb."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(call: Call) -> float:
    start = now()
    call()
    return now() - start


def in_turn(calls: Mapping[str, Call], repetitions: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call. All take their turn in every repetition, so that what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(-warm_up, repetitions):
        for name, call in calls.items():
            took = seconds(call)
            if repetition >= 0:
                times[name].append(took)
    return times


def results_file(name: str, quick: bool) -> Path:
    """Where a benchmark's results go that are not asked for elsewhere; quick ones never in the place of full ones."""
    return RESULTS / f"{name}{'-quick' if quick else ''}.json"


def spread(times: Sequence[float]) -> float:
    """Distance of the quartiles, as a part of the median."""
    if len(times) < 4:
        return float("nan")
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def peak_bytes(call: Call) -> int:
    """Most bytes alive at once of all that torch allocates during a call, its result included.

    On CUDA the allocator's own statistics; on the CPU the allocations that torch's profiler records, those inside of
    kernels too.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    peak = alive = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table of rows with the same columns."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows])


def cell(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write_results(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
