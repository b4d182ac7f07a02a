"""The evidence as a page: tables and plots from the scores that were kept, without drawing anything again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .evidence import ASKED, ATTRIBUTES, WITHOUT_STRENGTH, Scores, interval

NAMES = {
    "none": "no personalization",
    "told": "told in words",
    "nested": "nested attention",
    "decoupled": "decoupled cross-attention",
    "single": "single token",
    "ceiling": "real pictures",
}
IN_SHORT = {
    "none": "{}, no subject",
    "nested": "**nested attention**",
    "single": "single token",
    "decoupled": "decoupled cross-attention (IP-Adapter's way)",
    "told": "told in words, no photo",
    "ceiling": "the judge on real pictures",
}
PAGE = Path(__file__).with_name("page.md")  # its text, with places for the tables
BEGIN, END = "<!-- scores, by python -m studio evidence -->", "<!-- end of scores -->"
COLORS = {"nested": "#d6336c", "decoupled": "#1c7ed6", "single": "#f08c00"}
SCORES = {"identity": "identity", "retrieved": "found among 50", "prompt": "prompt"}
EACH = {"identity of people": "identity, person", "identity of animals": "identity, pet", "prompt": "prompt"}
ORDER = ["none", "told", "nested", "decoupled", "single"]  # of rows; then others in their own order, "ceiling" last

Pooled = dict[str, dict[str, Scores]]
"""By method and strength, the scores of each case."""


def report(results: Path, docs: Path) -> Path:
    """docs/evidence.md, its plot and the README's table, from the score files in `results`, of one or more seeds each.

    What a person makes of the numbers is in `results/findings.md`, which becomes the page's beginning.
    """
    names = ("people", "pairs", "two-people", "pets", "training", "drawing")
    files = {name: [read(path) for path in sorted(results.glob(f"{name}-seed-*.json"))] for name in names}
    seeds = {name: [run["scores"] for run in runs] for name, runs in files.items()}
    made = {name: runs[0]["made"] for name, runs in files.items()}
    found = {name: pool(runs) for name, runs in seeds.items()}
    plot(found["people"], docs / "evidence.png")
    tables = {name: table(found[name], EACH if name == "pairs" else SCORES) for name in names}
    plain = ["none", "told", "ceiling"]
    pairs = [(["as it is"], plain), (["competition 2", "regions", "both"], ["as it is"])]
    differences = {
        "people": apart(found["people"], [(["nested"], ["decoupled", "single", *plain])]),
        "pets": apart(found["pets"], [(["nested"], plain)]),
        "pairs": apart(found["pairs"], pairs, EACH),
        "two_people": apart(found["two-people"], pairs),
        "training": apart(found["training"], [(found["training"], ["as it ships"])]),
        "drawing": apart(found["drawing"], [(found["drawing"], ["as it is"])]),
    }
    findings, tops = results / "findings.md", json.loads((results / "concentration.json").read_text())
    page = PAGE.read_text(encoding="utf-8").format(
        **{name.replace("-", "_"): text for name, text in tables.items()},
        **{f"{name}_apart": text for name, text in differences.items()},
        seeds=lines(by_seed(seeds["people"]), ["method", "seed", *SCORES.values()]),
        one_by_one=one_by_one(found["people"], "people"),
        one_by_one_pets=one_by_one(found["pets"], "animals"),
        findings=findings.read_text(encoding="utf-8").strip() if findings.exists() else "",
        cases=count(found["people"]),
        pairs_of_people=count(found["two-people"]),
        judge=made["people"]["lengths"]["judge"],
        start=made["people"]["lengths"]["warm start"],
        full=made["people"]["adapters"]["person"],
        part=made["training"]["adapters"]["as-it-ships"],
        concentration=concentration(tops),
        people_inside=len(tops["distinct"]),
        fewest=min(tops["distinct"]),
        most=max(tops["distinct"]),
    )
    (docs / "evidence.md").write_text(page, encoding="utf-8")
    readme = docs.parent / "README.md"
    short = f"{BEGIN}\n\n{in_short(found)}\n\n{END}"
    readme.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: short, readme.read_text("utf-8"), flags=re.S), "utf-8")
    return docs / "evidence.md"


def read(path: Path) -> dict[str, Any]:
    """What the scores were made of, and the scores."""
    return json.loads(path.read_text())


def pool(seeds: list[Pooled]) -> Pooled:
    """Of each case, the mean over the seeds of the training that it was drawn with."""
    pooled: Pooled = {}
    for method in dict.fromkeys(method for found in seeds for method in found):
        of = [found[method] for found in seeds if method in found]
        pooled[method] = {
            strength: {key: np.mean([scores[strength][key] for scores in of], axis=0).tolist() for key in first}
            for strength, first in of[0].items()
        }
    return pooled


def count(pooled: Pooled) -> int:
    return len(pooled["none"]["1.0"]["prompt"])


def ordered(pooled: Pooled) -> list[str]:
    return sorted(pooled, key=lambda name: ORDER.index(name) if name in ORDER else 9 + (name == "ceiling"))


def lines(rows: list[list[str]], columns: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def cells(scores: Scores, columns: Mapping[str, str]) -> list[str]:
    """Whether somebody was found is yes or no, but for means of two trainings or two people."""
    shares = {k: k == "retrieved" and {*scores[k]} <= {0, 1} for k in columns}
    return ["{:.1%} ({:.1%} to {:.1%})".format(*interval(scores[k], share)) for k, share in shares.items()]


def table(pooled: Pooled, columns: Mapping[str, str]) -> str:
    rows = [
        [NAMES.get(method, method), "" if method in WITHOUT_STRENGTH else strength, *cells(scores, columns)]
        for method in ordered(pooled)
        for strength, scores in pooled[method].items()
    ]
    return lines(rows, ["method", "strength", *columns.values()])


def apart(
    pooled: Pooled,
    pairs: Iterable[tuple[Iterable[str], Iterable[str]]],
    columns: Mapping[str, str] = SCORES,
) -> str:
    """What the first ones of each pair score more than the others at the same strength, case by case."""
    rows = [
        [
            NAMES.get(a, a),
            strength,
            NAMES.get(b, b),
            *(signed(scores[key], pooled[b][strength][key]) for key in columns),
        ]
        for first, others in pairs
        for a in first
        for b in others
        if a in pooled and a != b
        for strength, scores in pooled[a].items()
        if strength in pooled[b]
    ]
    return lines(rows, ["method", "strength", "above", *columns.values()])


def signed(first: Sequence[float], second: Sequence[float]) -> str:
    """The mean difference, its interval, and how many cases are higher and lower."""
    each = np.subtract(first, second)
    return "{:+.1%} ({:+.1%} to {:+.1%}) {}/{}".format(*interval(each), (each > 1e-9).sum(), (each < -1e-9).sum())


def by_seed(seeds: list[Pooled]) -> list[list[str]]:
    """At strength 1, by each training apart."""
    return [
        [NAMES[method], str(seed), *cells(found[method]["1.0"], SCORES)]
        for method in ("nested", "decoupled", "single")
        for seed, found in enumerate(seeds)
        if method in found
    ]


def one_by_one(pooled: Pooled, kind: str) -> str:
    """Attributes at strength 1: those of the identity, then what the prompt asks for."""
    keys = [*(f"{kind} {key}" for key in (*ATTRIBUTES[kind].IDENTITY, *ASKED[kind])), "scene place"]
    rows = [
        [NAMES[method], *(f"{np.mean(pooled[method]['1.0'][key]):.0%}" for key in keys)] for method in ordered(pooled)
    ]
    return lines(rows, ["method", *(key.split(" ", 1)[1] for key in keys)])


def in_short(found: dict[str, Pooled]) -> str:
    """Means at strength 1, for the README."""
    rows = [
        [IN_SHORT[method].format(who), *(f"{np.mean(found[name][method]['1.0'][key]):.1%}" for key in SCORES)]
        for name, who in (("people", "person"), ("pets", "pet"))
        for method in IN_SHORT
        if method in found[name]
    ]
    return lines(rows, ["at strength 1", "identity", "right one of 50 found", "prompt"])


def concentration(tops: dict[str, list[float]]) -> str:
    names = {
        "top 1": "the first token has at most",
        "top 2": "the first two have at most",
        "top 1 distinct": "alike taken together: the first",
        "top 2 distinct": "alike taken together: the first two",
        "noun": "those of the plain noun",
    }
    rows = [[name, *(f"{x:.2f}" for x in tops[key])] for key, name in names.items()]
    return lines(rows, ["of all queries", *(f"{q:.0%}" for q in tops["quantile"])])


def plot(pooled: Pooled, path: Path) -> None:
    """Identity against prompt, one curve of strengths per method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), dpi=130)
    for method, color in COLORS.items():
        if method not in pooled:
            continue
        points = [(float(s), scores) for s, scores in pooled[method].items()]
        x, y = ([np.mean(scores[key]) for _, scores in points] for key in ("prompt", "identity"))
        axes.plot(x, y, "o-", color=color, label=NAMES[method])
        for (strength, _), a, b in zip(points, x, y, strict=True):
            axes.annotate(f"{strength:g}", (a, b), textcoords="offset points", xytext=(5, 4), fontsize=8, color=color)
    for name, mark in (("none", "kx"), ("told", "k*"), ("ceiling", "k+")):
        plain = pooled[name]["1.0"]
        axes.plot(np.mean(plain["prompt"]), np.mean(plain["identity"]), mark, label=NAMES[name])
    axes.set(xlabel="what the prompt asked for that is there", ylabel="identity attributes that are right")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)
