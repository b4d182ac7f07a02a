"""Nested attention in one layer against what it could cost: at SDXL's layer shapes, side by side in one run.

unpatched   the layer's text attention, as the host calls it
floor       that, and one fused attention over each subject's nested tokens, for the rows that have a subject
ours        what the host runs with a subject, where we may run the text attention ourselves
beside      the same where another pack or attention backend computes the output; what ours is on GPUs but in fp16 or
            bf16 on CUDA
full        softmax(q K^T) of all text tokens, p_s read from it, then p_s (v* - V_s) added
textbook    a copy of the text values for each query, [B, H, N, T, D]

Times are medians; the variants take turns in every repetition. Memory is the most that is alive at once during the
call beyond its inputs (see measure.peak_bytes). Before anything is timed, all variants have to agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import MB, in_turn, machine, peak_bytes, results_file, spread, table, write_results  # noqa: E402
from nested_attention.attention import (  # noqa: E402
    NestedToken,
    has_fused_lse,
    merge_heads,
    norm_scale,
    per_query_values,
    personalize,
    split_heads,
    text_attention,
)

LAYERS = ((4096, 10), (1024, 20))  # queries, heads of SDXL at 1024 x 1024
TEXT, WIDTH = 77, 64
COLUMNS = (5, 9)
SLOW = ("textbook",)


@dataclass(frozen=True)
class Case:
    queries: int
    heads: int
    nested: int
    subjects: int
    uncond: bool

    @property
    def row(self) -> dict[str, Any]:
        return {
            "queries x heads": f"{self.queries} x {self.heads}",
            "nested": self.nested,
            "subjects": self.subjects,
            "uncond row": "yes" if self.uncond else "no",
        }


@dataclass(frozen=True)
class Problem:
    """Projected queries, keys, values [B, N or T, H*D] of a layer; the last row has the subjects."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    tokens: list[NestedToken]

    @property
    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(x, self.heads) for x in (self.q, self.k, self.v))
        return q, k, v

    @property
    def rows(self) -> slice:
        return slice(len(self.q) - 1, len(self.q))


def make_problem(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    make = torch.Generator().manual_seed(0)

    def draw(rows: int, length: int) -> Tensor:
        return torch.randn(rows, length, case.heads * WIDTH, generator=make).to(device, dtype)

    rows = 1 + case.uncond
    nested = [[split_heads(draw(1, case.nested), case.heads) for _ in "kv"] for _ in range(case.subjects)]
    tokens = [NestedToken((column,), *pair) for column, pair in zip(COLUMNS, nested, strict=False)]
    return Problem(draw(rows, case.queries), draw(rows, TEXT), draw(rows, TEXT), case.heads, tokens)


def unpatched(problem: Problem) -> Tensor:
    return merge_heads(F.scaled_dot_product_attention(*problem.split))


def floor(problem: Problem) -> Tensor:
    out = unpatched(problem)
    for token in problem.tokens:
        per_query_values(problem.split[0][problem.rows], token)
    return out


def ours(problem: Problem) -> Tensor:
    q, k, v = problem.split
    if not has_fused_lse(q):
        return beside(problem)
    out, lse = text_attention(q, k, v)
    rows = problem.rows
    personalize(out[rows], q[rows], k[rows], v[rows], problem.tokens, out[rows], lse[rows])
    return merge_heads(out)


def beside(problem: Problem) -> Tensor:
    out = split_heads(unpatched(problem).clone(), problem.heads)
    q, k, v = (x[problem.rows] for x in problem.split)
    personalize(out[problem.rows], q, k, v, problem.tokens)
    return merge_heads(out)


def full(problem: Problem) -> Tensor:
    q, k, v = problem.split
    p = (q @ k.transpose(-1, -2) * WIDTH**-0.5).softmax(-1)
    out = p @ v
    rows = problem.rows
    for token in problem.tokens:
        star, shared = regularised(q[rows], v[rows], token)
        out[rows] += p[rows][..., token.columns] * (star - shared)
    return merge_heads(out)


def textbook(problem: Problem) -> Tensor:
    q, k, v = problem.split
    out = F.scaled_dot_product_attention(q, k, v)
    rows = problem.rows
    values = v[rows, :, None].repeat(1, 1, q.shape[2], 1, 1)
    for token in problem.tokens:
        values[..., token.columns[0], :] = regularised(q[rows], v[rows], token)[0]
    p = (q[rows] @ k[rows].transpose(-1, -2) * WIDTH**-0.5).softmax(-1)
    out[rows] = (p[..., None, :] @ values)[..., 0, :]
    return merge_heads(out)


def regularised(q: Tensor, v: Tensor, token: NestedToken) -> tuple[Tensor, Tensor]:
    """v* with its norm set, and the value that it replaces."""
    star, shared = per_query_values(q, token), v[:, :, token.columns]
    return star * norm_scale(star, shared, token).to(star.dtype), shared


VARIANTS: dict[str, Callable[[Problem], Tensor]] = {
    "unpatched": unpatched,
    "floor": floor,
    "ours": ours,
    "beside": beside,
    "full": full,
    "textbook": textbook,
}


def check(problem: Problem, names: list[str]) -> None:
    """All variants but the first two give the same change of the unpatched output."""
    plain = unpatched(problem).double()
    expected = full(problem).double() - plain
    tolerance = 1e-4 if problem.q.dtype == torch.float32 else 5e-2
    for name in names[2:]:
        error = (VARIANTS[name](problem).double() - plain - expected).norm() / expected.norm()
        assert error < tolerance, f"{name} differs from the full probabilities by {error:.1e} of the change"


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, repetitions: int, textbook_mb: float
) -> dict[str, Any]:
    problem = make_problem(case, device, dtype)
    fits = case.queries * case.heads * TEXT * WIDTH * dtype.itemsize <= textbook_mb * MB
    names = [name for name in VARIANTS if fits or name not in SLOW]
    check(problem, names)
    calls = {name: partial(VARIANTS[name], problem) for name in names}
    times = in_turn({name: call for name, call in calls.items() if name not in SLOW}, repetitions)
    times |= in_turn({name: call for name, call in calls.items() if name in SLOW}, min(repetitions, 3), warm_up=0)
    return {
        **vars(case),
        "ms": {name: 1e3 * statistics.median(taken) for name, taken in times.items()},
        "spread": {name: spread(taken) for name, taken in times.items() if name not in SLOW},
        "MB": {name: peak_bytes(call) / MB for name, call in calls.items()},
    }


def time_row(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    ms = result["ms"]
    ratios = {name: ms[name] / ms["floor"] if name in ms else None for name in list(VARIANTS)[2:]}
    against = {"floor / unpatched": ms["floor"] / ms["unpatched"], "ours / unpatched": ms["ours"] / ms["unpatched"]}
    return {**case.row, "floor ms": f"{ms['floor']:.1f}", **ratios, **against}


def memory_row(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    return {**case.row, **{name: f"{result['MB'][name]:.0f}" if name in result["MB"] else None for name in VARIANTS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one subject beside an uncond row only, few repetitions")
    parser.add_argument("--repetitions", type=int, help="default 15, quick 5")
    parser.add_argument("--textbook-mb", type=float, default=2000, help="largest per-query copy of the values to make")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/attention-DEVICE.json")
    parser.add_argument(
        "--threads", type=int, help="of torch on the CPU; default all cores. With 1 processor time is measured"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    subjects, uncond = ((1,), (True,)) if arguments.quick else ((1, 2), (True, False))
    cases = [Case(*layer, m, s, u) for layer, u, s, m in product(LAYERS, uncond, subjects, (16, 257, 1024))]
    repetitions = arguments.repetitions or (5 if arguments.quick else 15)
    about = {**machine(), "dtype": str(dtype), "repetitions": repetitions}
    results = []
    with torch.inference_mode():
        for case in cases:
            results.append(measure(case, device, dtype, repetitions, arguments.textbook_mb))
            print(f"{len(results)} of {len(cases)}: {case}", file=sys.stderr)
    pairs = list(zip(cases, results, strict=True))
    print("Times as ratios to the floor:\n\n" + table([time_row(*pair) for pair in pairs]))
    print("\nMemory beyond the inputs, MB:\n\n" + table([memory_row(*pair) for pair in pairs]))
    write_results(
        arguments.output or results_file(f"attention-{device.type}", arguments.quick), machine=about, cases=results
    )


if __name__ == "__main__":
    main()
