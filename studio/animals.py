"""Cartoon pets, drawn here: kind, fur and markings are the identity; what it wears and its face are the view."""

from __future__ import annotations

from random import Random
from typing import Any

KINDS = ("cat", "dog", "rabbit", "bear", "fox", "mouse")
FURS = {"black": "#3d3a40", "brown": "#8a5a3b", "orange": "#e8893a", "cream": "#f0d9b0", "white": "#f4f4f2",
        "grey": "#9aa0a8", "blue": "#6f9fd8", "pink": "#eda6b8"}  # fmt: skip
MARKS = ("plain", "patched", "striped", "spotted", "blazed")
MARK_COLORS = {"white": "#fbfaf5", "dark": "#4b3328", "golden": "#f2b84b"}
EYES = {"green": "#58a04c", "blue": "#4a86c8", "amber": "#d08a1e", "dark": "#2a2320"}
MOODS = ("calm", "happy", "sleepy")
WEARS = ("", "bow tie", "scarf", "party hat", "collar")
WEAR_COLORS = {"red": "#d8383a", "green": "#3f9a4f", "purple": "#8452b8", "yellow": "#f3cf3c"}

IDENTITY = ("kind", "fur", "marks", "mark color", "eyes")
TOLD = ("eyes", "mark color", "marks", "fur", "kind")  # in the order in which captions tell of it
VIEW = ("mood", "wears", "wear color")
OUTLINE = 'stroke="#2b2426" stroke-width="3" stroke-linejoin="round" stroke-linecap="round"'


def draw_identity(rng: Random) -> dict[str, str]:
    fur = rng.choice(list(FURS))
    marks = rng.choice(MARKS)
    colors = [
        c for c in MARK_COLORS if not (c == "white" and fur in ("white", "cream")) and (c, fur) != ("dark", "black")
    ]
    return {
        "kind": rng.choice(KINDS),
        "fur": fur,
        "marks": marks,
        "mark color": "" if marks == "plain" else rng.choice(colors),
        "eyes": rng.choice(list(EYES)),
    }


def draw_view(rng: Random) -> dict[str, str]:
    wears = rng.choice(WEARS)
    return {
        "mood": rng.choice(MOODS),
        "wears": wears,
        "wear color": rng.choice(list(WEAR_COLORS)) if wears else "",
    }


def describe(identity: dict[str, str], rng: Random, chance: float) -> list[str]:
    """'green eyes', 'golden fur', 'spotted', 'white': each attribute is told by chance."""
    names = {
        "eyes": f"{identity['eyes']} eyes",
        "mark color": f"{identity['mark color']} fur",
        "marks": identity["marks"],
        "fur": identity["fur"],
    }
    there = [key for key in TOLD[:-1] if identity[key] not in ("", "plain")]
    return [names[key] for key in there if rng.random() < chance]


def job(identity: dict[str, str], view: dict[str, str]) -> dict[str, Any]:
    """What `render.mjs` draws: a sitting animal on a canvas of 200, seen from the front, the bottom cut off."""
    fur, mark = FURS[identity["fur"]], MARK_COLORS.get(identity["mark color"], "none")
    parts = [
        body(fur, mark, identity["marks"]),
        ears(identity["kind"], fur),
        head(identity["kind"], fur),
        markings(identity["marks"], mark),
        face(identity["kind"], EYES[identity["eyes"]], view["mood"]),
        clothing(view["wears"], WEAR_COLORS.get(view["wear color"], "")),
    ]
    return {"svg": f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 200">{"".join(parts)}</svg>'}


def body(fur: str, mark: str, marks: str) -> str:
    belly = mark if marks in ("patched", "blazed") else "none"
    return (
        f'<path d="M150 190q45-20 22-70" fill="none" stroke="#2b2426" stroke-width="21" stroke-linecap="round"/>'
        f'<path d="M150 190q45-20 22-70" fill="none" stroke="{fur}" stroke-width="15" stroke-linecap="round"/>'
        f'<path d="M48 205q-4-70 52-70t52 70z" fill="{fur}" {OUTLINE}/>'
        f'<ellipse cx="100" cy="190" rx="27" ry="32" fill="{belly}"/>'
    )


def mirrored(shape: str) -> str:
    return f'{shape}<g transform="matrix(-1 0 0 1 200 0)">{shape}</g>'


def ears(kind: str, fur: str) -> str:
    inner = "#f2b7b5"
    shapes = {
        "cat": f'<path d="M54 72L48 18L92 50z" fill="{fur}" {OUTLINE}/><path d="M58 58L56 32L78 48z" fill="{inner}"/>',
        "fox": f'<path d="M48 76L30 8L94 48z" fill="{fur}" {OUTLINE}/><path d="M40 36L30 8L56 24z" fill="#3a2a26"/>',
        "dog": "",
        "rabbit": f'<ellipse cx="72" cy="34" rx="15" ry="40" transform="rotate(-8 72 34)" fill="{fur}" {OUTLINE}/>'
        f'<ellipse cx="72" cy="36" rx="7" ry="28" transform="rotate(-8 72 36)" fill="{inner}"/>',
        "bear": f'<circle cx="58" cy="52" r="19" fill="{fur}" {OUTLINE}/>'
        f'<circle cx="58" cy="52" r="9" fill="{inner}"/>',
        "mouse": f'<circle cx="46" cy="54" r="32" fill="{fur}" {OUTLINE}/>'
        f'<circle cx="46" cy="54" r="21" fill="{inner}"/>',
    }
    return mirrored(shapes[kind])


def head(kind: str, fur: str) -> str:
    shape = f'<ellipse cx="100" cy="96" rx="56" ry="50" fill="{fur}" {OUTLINE}/>'
    if kind == "fox":
        shape = f'<path d="M42 74q58-48 116 0q8 40-58 74q-66-34-58-74z" fill="{fur}" {OUTLINE}/>'
        shape += mirrored('<path d="M44 92q34 4 54 52q-50-22-54-52z" fill="#fdf6ea"/>')
    if kind == "dog":
        shape += mirrored(f'<path d="M60 54q-36 0-34 54q2 22 18 18q14-4 14-42z" fill="{fur}" {OUTLINE}/>')
    return shape


def markings(marks: str, color: str) -> str:
    return {
        "plain": "",
        "patched": f'<ellipse cx="76" cy="88" rx="20" ry="22" fill="{color}"/>',
        "striped": "".join(
            f'<path d="M{x} 50q{(100 - x) // 6} 12 {(100 - x) // 5} 24" fill="none" stroke="{color}" '
            'stroke-width="8" stroke-linecap="round"/>'
            for x in (80, 100, 120)
        ),
        "spotted": "".join(
            f'<circle cx="{x}" cy="{y}" r="{r}" fill="{color}"/>'
            for x, y, r in (
                (72, 66, 8),
                (126, 62, 10),
                (100, 56, 6),
                (138, 112, 7),
                (62, 112, 7),
                (76, 176, 9),
                (122, 166, 8),
            )
        ),
        "blazed": f'<path d="M92 49h16l6 48q-14 12-28 0z" fill="{color}"/>',
    }[marks]


def face(kind: str, eyes: str, mood: str) -> str:
    if mood == "sleepy":
        look = mirrored(
            '<path d="M66 92q10 9 20 0" fill="none" stroke="#2b2426" stroke-width="4" stroke-linecap="round"/>'
        )
    else:
        look = "".join(
            f'<circle cx="{x}" cy="90" r="11.5" fill="#fff" stroke="#2b2426" stroke-width="2"/>'
            f'<circle cx="{x}" cy="90" r="8.5" fill="{eyes}"/><circle cx="{x}" cy="90" r="4" fill="#111"/>'
            for x in (76, 124)
        )
    muzzle = {"dog": (24, 18), "bear": (24, 19), "mouse": (17, 14), "rabbit": (18, 14)}.get(kind)
    snout = f'<ellipse cx="100" cy="118" rx="{muzzle[0]}" ry="{muzzle[1]}" fill="#fff5e6"/>' if muzzle else ""
    nose = {"dog": 9, "bear": 9, "fox": 7}.get(kind, 5)
    top = 138 if kind == "fox" else 110
    snout += f'<ellipse cx="100" cy="{top}" rx="{nose + 1}" ry="{nose - 1}" fill="#2b2426"/>'
    if kind != "fox":
        snout += (
            '<path d="M86 122q7 8 14 0q7 8 14 0" fill="none" stroke="#2b2426" stroke-width="3" stroke-linecap="round"/>'
        )
        if mood == "happy":
            snout += '<path d="M91 126h18v8q-9 10-18 0z" fill="#e2556b" stroke="#2b2426" stroke-width="2"/>'
    elif mood == "happy":
        snout += '<path d="M93 146h14v6q-7 8-14 0z" fill="#e2556b" stroke="#2b2426" stroke-width="2"/>'
    if kind in ("cat", "mouse"):
        snout += mirrored(f'<path d="M66 116l-26-5M66 123l-26 4" {OUTLINE.replace("3", "2", 1)}/>')
    if kind == "rabbit":
        snout += '<path d="M95 127h10v9h-10z" fill="#fff" stroke="#2b2426" stroke-width="2"/>'
    return look + snout


def clothing(wears: str, color: str) -> str:
    return {
        "": "",
        "bow tie": f'<path d="M100 158L70 144V174z M100 158L130 144V174z" fill="{color}" {OUTLINE}/>'
        f'<circle cx="100" cy="159" r="7" fill="{color}" {OUTLINE}/>',
        "scarf": f'<path d="M56 140q44 26 88 0l5 17q-49 28-98 0z" fill="{color}" {OUTLINE}/>'
        f'<path d="M118 160l22-4l6 42h-24z" fill="{color}" {OUTLINE}/>',
        "party hat": f'<path d="M100 2L124 56Q100 66 76 56z" fill="{color}" {OUTLINE}/>'
        f'<circle cx="100" cy="6" r="7" fill="#fff" {OUTLINE}/>',
        "collar": f'<path d="M58 143q42 24 84 0l2 9q-44 24-88 0z" fill="{color}" {OUTLINE}/>'
        f'<circle cx="100" cy="168" r="8" fill="#f7d44a" {OUTLINE}/>',
    }[wears]
