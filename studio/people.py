"""Cartoon people: who they are (identity) is drawn once, how they look in a picture (view) every time anew.

Drawn by DiceBear's avataaars (art by Pablo Stanley, free for personal and commercial use; code MIT).
"""

from __future__ import annotations

from random import Random
from typing import Any

HAIR = {
    "bob": "bob", "bun": "bun", "curly": "curly", "curvy": "wavy", "dreads": "dreadlocks", "fro": "afro",
    "longButNotTooLong": "long", "shavedSides": "shaved", "straight01": "straight", "dreads01": "braided",
    "frizzle": "frizzy", "shaggyMullet": "shaggy", "shortCurly": "curly short", "shortFlat": "flat short",
    "shortRound": "round short", "shortWaved": "wavy short", "theCaesar": "cropped", "bigHair": "big",
}  # fmt: skip
HATS = {"hat": "hat", "turban": "turban", "winterHat02": "beanie", "winterHat1": "winter cap", "hijab": "hijab"}
HAIR_COLORS = {
    "2c1b18": "black", "724133": "brown", "c93305": "red", "d6b370": "blonde", "e8e1e1": "white", "f59797": "pink",
    "5199e4": "blue", "3fa35b": "green",
}  # fmt: skip
HAT_COLORS = {"262e33": "black", "5199e4": "blue", "ff5c5c": "red", "a7ffc4": "mint", "ffffb1": "yellow"}
SKINS = {"614335": "dark", "ae5d29": "brown", "d08b5b": "tan", "edb98a": "light", "ffdbb4": "pale"}
GLASSES = {"round": "round glasses", "prescription02": "big glasses", "kurt": "dark glasses"}
BEARDS = {"beardMedium": "beard", "beardMajestic": "long beard", "moustacheFancy": "moustache"}

# caption: eyes, mouth, eyebrows
EXPRESSIONS = {
    "happy": ("happy", "smile", "defaultNatural"),
    "sad": ("default", "sad", "sadConcernedNatural"),
    "angry": ("squint", "grimace", "angryNatural"),
    "surprised": ("surprised", "screamOpen", "raisedExcitedNatural"),
    "winking": ("wink", "twinkle", "default"),
    "crying": ("cry", "concerned", "sadConcerned"),
    "loving": ("hearts", "smile", "raisedExcited"),
    "sleeping": ("closed", "serious", "flatNatural"),
}
CLOTHES = {"hoodie": "hoodie", "blazerAndShirt": "blazer", "collarAndSweater": "sweater", "overall": "overalls",
           "shirtCrewNeck": "shirt"}  # fmt: skip
CLOTHES_COLORS = {"262e33": "black", "5199e4": "blue", "e6e6e6": "white", "ff5c5c": "red", "ffafb9": "pink",
                  "a7ffc4": "green", "ffffb1": "yellow", "929598": "grey"}  # fmt: skip

IDENTITY = ("top", "hair color", "skin", "glasses", "beard")  # what is scored as identity
TOLD = ("top", "skin", "glasses", "beard")  # in the order in which captions tell of it
VIEW = ("expression", "clothes", "clothes color")  # what the prompt decides


def draw_identity(rng: Random) -> dict[str, str]:
    """Attributes of somebody, by their names in captions; '' where there is none."""
    hat = rng.random() < 0.25
    return {
        "top": rng.choice(list((HATS if hat else HAIR).values())),
        "hair color": rng.choice(list((HAT_COLORS if hat else HAIR_COLORS).values())),
        "skin": rng.choice(list(SKINS.values())),
        "glasses": rng.choice(list(GLASSES.values())) if rng.random() < 0.4 else "",
        "beard": rng.choice(list(BEARDS.values())) if rng.random() < 0.25 else "",
    }


def draw_view(rng: Random) -> dict[str, str]:
    return {
        "expression": rng.choice(list(EXPRESSIONS)),
        "clothes": rng.choice(list(CLOTHES.values())),
        "clothes color": rng.choice(list(CLOTHES_COLORS.values())),
    }


def job(identity: dict[str, str], view: dict[str, str]) -> dict[str, Any]:
    """What `render.mjs` draws."""
    eyes, mouth, eyebrows = EXPRESSIONS[view["expression"]]
    tops = {**HAIR, **HATS}
    hat = identity["top"] in HATS.values()
    color = key_of(HAT_COLORS if hat else HAIR_COLORS, identity["hair color"])
    beard_color = "2c1b18" if hat else color
    options = {
        "top": [key_of(tops, identity["top"])],
        "hairColor": [color], "hatColor": [color], "facialHairColor": [beard_color],
        "skinColor": [key_of(SKINS, identity["skin"])],
        "accessoriesProbability": 100 if identity["glasses"] else 0,
        "facialHairProbability": 100 if identity["beard"] else 0,
        "accessoriesColor": ["262e33"],
        "eyes": [eyes], "mouth": [mouth], "eyebrows": [eyebrows],
        "clothing": [key_of(CLOTHES, view["clothes"])],
        "clothesColor": [key_of(CLOTHES_COLORS, view["clothes color"])],
    }  # fmt: skip
    if identity["glasses"]:
        options["accessories"] = [key_of(GLASSES, identity["glasses"])]
    if identity["beard"]:
        options["facialHair"] = [key_of(BEARDS, identity["beard"])]
    return {"avataaars": options}


def key_of(names: dict[str, str], name: str) -> str:
    return next(key for key, value in names.items() if value == name)


def describe(identity: dict[str, str], rng: Random, chance: float) -> list[str]:
    """'curly red hair', 'pale skin', 'beard': each attribute is told by chance."""
    told = [key for key in TOLD if identity[key] and rng.random() < chance]
    hat = identity["top"] in HATS.values()
    names = {
        "top": f"{identity['hair color']} {identity['top']}"
        if hat
        else f"{identity['top']} {identity['hair color']} hair",
        "skin": f"{identity['skin']} skin",
    }
    return [names.get(key, identity[key]) for key in told]
