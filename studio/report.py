"""The evidence as a page: tables and plots from the scores that were kept, without drawing anything again."""

from __future__ import annotations

import json
from pathlib import Path

from .evidence import summary

NAMES = {
    "none": "no personalization",
    "nested": "nested attention",
    "decoupled": "decoupled cross-attention",
    "single": "single token",
    "competition": "nested attention, competition 2",
    "ceiling": "real pictures",
}
COLORS = {"nested": "#d6336c", "decoupled": "#1c7ed6", "single": "#f08c00"}


Pooled = dict[str, dict[str, list[dict[str, float]]]]


def report(results: Path, docs: Path, settings: str) -> Path:
    """docs/evidence.md and its plot, from the score files of one or more seeds in `results`."""
    one, two = (pool(sorted(results.glob(f"{name}-*.json"))) for name in ("people", "pairs"))
    plot(one, docs / "evidence.png")
    columns = {"identity": "identity", "retrieved": "found among 50", "prompt": "prompt"}
    each = {"identity of people": "identity, person", "identity of animals": "identity, pet", "prompt": "prompt"}
    cases = len(next(iter(one["none"].values())))
    page = PAGE.format(settings=settings, cases=cases, one=table(one, columns), two=table(two, each))
    (docs / "evidence.md").write_text(page, encoding="utf-8")
    return docs / "evidence.md"


def pool(scores: list[Path]) -> Pooled:
    """Rows by method and strength, of all files."""
    pooled: Pooled = {}
    for path in scores:
        for method, by_strength in json.loads(path.read_text()).items():
            for strength, rows in by_strength.items():
                pooled.setdefault(method, {}).setdefault(strength, []).extend(rows)
    return pooled


def table(pooled: Pooled, columns: dict[str, str]) -> str:
    lines = [f"| method | strength | {' | '.join(columns.values())} |", "| --- " * (len(columns) + 2) + "|"]
    for method in (name for name in NAMES if name in pooled):
        for strength, rows in pooled[method].items():
            numbers = summary(rows)
            cells = ["{:.1%} ({:.1%} to {:.1%})".format(*numbers[key]) for key in columns]
            shown = "" if method in ("none", "ceiling") else strength
            lines.append(f"| {NAMES[method]} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(pooled: Pooled, path: Path) -> None:
    """Identity against prompt, one curve of strengths per method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), dpi=130)
    for method, color in COLORS.items():
        if method not in pooled:
            continue
        points = [(float(s), summary(rows)) for s, rows in pooled[method].items()]
        x, y = ([numbers[key][0] for _, numbers in points] for key in ("prompt", "identity"))
        axes.plot(x, y, "o-", color=color, label=NAMES[method])
        for (strength, _), a, b in zip(points, x, y, strict=True):
            axes.annotate(f"{strength:g}", (a, b), textcoords="offset points", xytext=(5, 4), fontsize=8, color=color)
    plain = summary(pooled["none"]["1.0"])
    axes.plot(plain["prompt"][0], plain["identity"][0], "kx", label=NAMES["none"])
    axes.axhline(
        summary(pooled["ceiling"]["1.0"])["identity"][0], color="#868e96", ls=":", label="judge on real pictures"
    )
    axes.set(xlabel="what the prompt asked for that is there", ylabel="identity attributes that are right")
    axes.legend(loc="lower left", fontsize=8)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)


PAGE = """# Evidence

Is it the same person, and does the picture do what the prompt says? Measured with the small model that comes with the
pack, on people who were in no training. `python -m studio judge rivals evidence` makes this page; the scores behind it
lie in `studio/results/`.

{settings}

- **Identity**: of hair or headgear, its color, skin, glasses and beard, the part that a judge reads off the picture
  rightly. **Found among 50**: how often the right one of 50 people fits best to what the judge sees. **Prompt**: of
  expression, clothes, their color and the background, the part that is as the prompt asks.
- The judge is a network of its own, trained on rendered pictures of other people. What it scores on rendered pictures
  of the same people that are drawn for ("real pictures") is the ceiling.
- {cases} pictures for each row; in brackets the 95 % interval of the mean (bootstrap over pictures).
- *Nested attention* is this pack's node as it ships. *Decoupled cross-attention* is IP-Adapter's way: attention over
  the same Q-Former's tokens is added to the text's everywhere. *Single token* is one value for the word in each layer,
  the same at every place.

- All start from a Q-Former that has learned to give for a photo the text state of a caption that tells all.

{one}

![Identity against prompt over the strength](evidence.png)

## A person and a pet in one picture

Each scored apart, with one photo of each.

{two}
"""
