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
    "ceiling": "real pictures",
}
COLORS = {"nested": "#d6336c", "decoupled": "#1c7ed6", "single": "#f08c00"}
COLUMNS = ("identity", "retrieved", "prompt")


def report(scores: list[Path], docs: Path, settings: str) -> Path:
    """docs/evidence.md and its plot, from score files of one or more seeds."""
    pooled: dict[str, dict[str, list[dict[str, float]]]] = {}
    for path in scores:
        for method, by_strength in json.loads(path.read_text()).items():
            for strength, rows in by_strength.items():
                pooled.setdefault(method, {}).setdefault(strength, []).extend(rows)
    table = ["| method | strength | identity | found among 50 | prompt |", "| --- | --- | --- | --- | --- |"]
    for method in (name for name in NAMES if name in pooled):
        for strength, rows in pooled[method].items():
            numbers = summary(rows)
            cells = ["{:.1%} ({:.1%} to {:.1%})".format(*numbers[key]) for key in COLUMNS]
            shown = strength if method in COLORS else ""
            table.append(f"| {NAMES[method]} | {shown} | {' | '.join(cells)} |")
    plot(pooled, docs / "evidence.png")
    cases = len(next(iter(pooled["none"].values())))
    page = PAGE.format(settings=settings, cases=cases, table="\n".join(table))
    (docs / "evidence.md").write_text(page, encoding="utf-8")
    return docs / "evidence.md"


def plot(pooled: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
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

{table}

![Identity against prompt over the strength](evidence.png)
"""
