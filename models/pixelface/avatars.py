"""Avatars with known factors: what can be drawn, how it is drawn, and how it is put into words.

The drawings are DiceBear's ``pixel-art`` style (CC0 1.0); ``render.mjs`` draws them and is needed only to rebuild the
domain. Every avatar is a plain dict ``{factor: value}`` plus the free details that no caption mentions, so the same
avatar with exactly one factor changed can be drawn too.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

HERE = Path(__file__).parent
SIZE = 32

FACTORS: dict[str, tuple[str, ...]] = {
    "skin": ("pale", "tanned", "dark"),
    "hair_color": ("black", "brown", "blond", "red", "grey"),
    "hair_length": ("short", "long"),
    "mouth": ("smiling", "sad"),
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
    "hat": ("no", "yes"),
    "clothing": ("blue", "green", "red", "yellow"),
    "background": ("blue", "purple", "pink", "green"),
}

_COLORS: dict[str, dict[str, tuple[str, ...]]] = {
    "skin": {"pale": ("ffdbac", "f5cfa0", "ffe4c4"), "tanned": ("cb9e6e", "b68655"), "dark": ("8d5524", "7a4a20")},
    "hair_color": {
        "black": ("1c1c1c", "28150a"),
        "brown": ("603a14", "734b22"),
        "blond": ("e8c65a", "dcb64a"),
        "red": ("bd1700", "cc3311"),
        "grey": ("a9a9a9", "bcbcbc"),
    },
    "clothing": {
        "blue": ("428bca", "03396c"),
        "green": ("44c585", "00a050"),
        "red": ("d11141", "ae0001"),
        "yellow": ("ffc425", "ffd969"),
    },
    "background": {"blue": ("b6e3f4",), "purple": ("c0aede",), "pink": ("ffd5dc",), "green": ("d1f4d9",)},
}


def _variants(stem: str, numbers: str) -> tuple[str, ...]:
    return tuple(f"{stem}{n}" for n in numbers.split())


# Only drawings that read clearly at 32x32, and hair that shows below every hat, so that each factor can be seen.
_HAIR = {
    "short": _variants("short", "01 13 14 15 17 18"),
    "long": _variants("long", "01 02 03 04 07 09 12 13 20 21"),
}
_MOUTH = {"smiling": _variants("happy", "06 09 11 12 13"), "sad": _variants("sad", "01 02 08 09")}
_DETAILS: dict[str, tuple[str, ...]] = {
    "eyes": _variants("variant", "01 02 03 04 05 06 07 08 09 10 11 12"),
    "eyesColor": ("76778b", "697b94", "647b90", "5b7c8b", "588387", "876658"),
    "mouthColor": ("c8283c", "e05263", "b5303f"),
    "glasses": _variants("light", "01 02 05 06 07") + _variants("dark", "01 02 05 06 07"),
    "glassesColor": ("4b4b4b", "323232", "191919", "43677d", "a04b5d"),
    "beard": _variants("variant", "01 03 05 06 07 08"),
    "hat": _variants("variant", "02 03 05 06 07 08"),
    "hatColor": ("3b3b8b", "2f7d4f", "7a3fa0", "d97b29", "e6e6e6", "3a3a3a"),
    "clothing": _variants("variant", " ".join(f"{n:02d}" for n in range(1, 24))),
}

Avatar = dict[str, Any]


def draw_avatar(rng: Generator) -> Avatar:
    """One avatar: ``{"factors": {factor: value}, "details": {...}}``, every choice uniform and independent."""
    factors = {name: str(rng.choice(values)) for name, values in FACTORS.items()}
    details = {name: str(rng.choice(values)) for name, values in _DETAILS.items()}
    # A random number for each choice that depends on a factor's value, so that changing one factor changes only it.
    luck = {name: float(rng.random()) for name in ("skin", "hair_color", "hair_length", "mouth", "clothing", "background")}
    return {"factors": factors, "details": details, "luck": luck}


def with_factor(avatar: Avatar, factor: str, value: str) -> Avatar:
    """The same avatar with exactly one factor changed (the counterfactual)."""
    if value not in FACTORS[factor]:
        raise ValueError(f"{factor} is one of {', '.join(FACTORS[factor])}; got {value!r}")
    return {**avatar, "factors": {**avatar["factors"], factor: value}}


def flip_one(avatar: Avatar, rng: Generator) -> tuple[Avatar, str]:
    """A counterfactual of a random factor, and the factor's name."""
    factor = str(rng.choice(list(FACTORS)))
    others = [v for v in FACTORS[factor] if v != avatar["factors"][factor]]
    return with_factor(avatar, factor, str(rng.choice(others))), factor


def options(avatar: Avatar) -> dict[str, Any]:
    """DiceBear's options for an avatar: one value a list, probabilities 0 or 100, so nothing is left to its seed."""
    f, d, luck = avatar["factors"], avatar["details"], avatar["luck"]

    def pick(values: Sequence[str], name: str) -> list[str]:
        return [values[int(luck[name] * len(values))]]

    return {
        "skinColor": pick(_COLORS["skin"][f["skin"]], "skin"),
        "hairColor": pick(_COLORS["hair_color"][f["hair_color"]], "hair_color"),
        "hair": pick(_HAIR[f["hair_length"]], "hair_length"),
        "mouth": pick(_MOUTH[f["mouth"]], "mouth"),
        "clothingColor": pick(_COLORS["clothing"][f["clothing"]], "clothing"),
        "backgroundColor": pick(_COLORS["background"][f["background"]], "background"),
        "accessoriesProbability": 0,
        **{f"{name}Probability": 100 if f[name] == "yes" else 0 for name in ("glasses", "beard", "hat")},
        **{name: [value] for name, value in d.items()},
    }


def render(avatars: Sequence[Avatar]) -> Iterator[np.ndarray]:
    """Yields (32, 32, 3) uint8 pictures in order. Needs Node.js and ``npm install`` in this folder."""
    if not (HERE / "node_modules").is_dir():
        raise FileNotFoundError(f"the renderer is not installed; run: npm install --prefix {HERE}")
    lines = "".join(json.dumps(options(a)) + "\n" for a in avatars)
    done = subprocess.run(["node", HERE / "render.mjs"], input=lines.encode(), stdout=subprocess.PIPE, check=True)
    pixels = np.frombuffer(done.stdout, np.uint8)
    yield from pixels.reshape(len(avatars), SIZE, SIZE, 3)


# ---- words ----------------------------------------------------------------------------------------------------------

_SUBJECTS = ("face", "person", "portrait", "character")
_SKIN = {"pale": ("pale",), "tanned": ("tanned",), "dark": ("dark-skinned", "dark")}
_MOUTH_WORDS = {"smiling": ("smiling", "happy"), "sad": ("sad", "unhappy")}
_THINGS = {"glasses": ("glasses", "eyeglasses"), "beard": ("a beard",), "hat": ("a hat", "a cap")}
_HAIR_COLOR = {v: (v,) for v in FACTORS["hair_color"]} | {"blond": ("blond", "blonde"), "grey": ("grey", "gray"), "red": ("red", "ginger")}
_ABSENT = ("no {}", "without {}")


def caption(factors: dict[str, str], mentioned: Sequence[str], rng: Generator, *, listed: bool = False) -> str:
    """A noun phrase without an article that mentions just these factors, e.g. ``smiling face with red hair``.

    Adjectives first (mouth, skin), then hair, then things worn, then clothing and background; order within a group and
    synonyms are random. ``listed``: what is to be seen, set side by side in any order, e.g. ``red hair, no hat, smiling face``.
    """

    def word(options_: Sequence[str]) -> str:
        return str(rng.choice(list(options_)))

    said = set(mentioned)
    adjectives = []
    if "mouth" in said:
        adjectives.append(word(_MOUTH_WORDS[factors["mouth"]]))
    if "skin" in said:
        adjectives.append(word(_SKIN[factors["skin"]]))
    hair = [word(_HAIR_COLOR[factors["hair_color"]])] if "hair_color" in said else []
    if "hair_length" in said:
        hair.insert(0, factors["hair_length"])
    parts = [f"with {' '.join(hair)} hair"] if hair else []
    for name in ("glasses", "beard", "hat"):
        if name in said:
            thing = word(_THINGS[name])
            if factors[name] == "yes":
                parts.append(f"with {thing}")
            else:
                absent = word(_ABSENT).format(thing.removeprefix("a "))
                parts.append(absent if absent.startswith("without") else f"with {absent}")
    if "clothing" in said:
        parts.append(f"{word(('in', 'wearing'))} {factors['clothing']} clothes")
    if "background" in said:
        parts.append(f"on a {factors['background']} background")
    rng.shuffle(adjectives)
    rng.shuffle(parts)
    if listed:
        seen = [_bare(part) for part in parts] + adjectives + [word(_SUBJECTS)] * bool(rng.random() < 0.7 or not (parts or adjectives))
        rng.shuffle(seen)
        return ", ".join(seen)
    return " ".join([*adjectives, word(_SUBJECTS), ", ".join(parts)]).strip()


def _bare(part: str) -> str:
    """``with red hair`` -> ``red hair``, ``on a pink background`` -> ``pink background``; ``without hat`` stays."""
    for start in ("with ", "in ", "wearing ", "on "):
        if part.startswith(start):
            return part.removeprefix(start).removeprefix("a ")
    return part


def vocabulary() -> list[str]:
    """Every word or phrase that a caption can have."""
    groups: tuple[Mapping[str, Sequence[str]], ...] = (_SKIN, _MOUTH_WORDS, _THINGS, _HAIR_COLOR)
    words = [word for group in groups for options_ in group.values() for word in options_]
    colors = [*FACTORS["clothing"], *FACTORS["background"], *FACTORS["hair_length"]]
    return [*_SUBJECTS, *words, *colors, "with without no hair , in wearing clothes on a background hat cap beard"]


_PROMPTS: dict[str, dict[str, str]] = {
    "plain": {
        "skin": "{} face",
        "hair_color": "face with {} hair",
        "hair_length": "face with {} hair",
        "mouth": "{} face",
        "clothing": "face in {} clothes",
        "background": "face on a {} background",
    },
    "person": {
        "skin": "{} person",
        "hair_color": "person with {} hair",
        "hair_length": "person with {} hair",
        "mouth": "{} person",
        "clothing": "person wearing {} clothes",
        "background": "person on a {} background",
    },
    "held out": {
        "skin": "a portrait of a person, {}",
        "hair_color": "{} hair on a face",
        "hair_length": "{} hair on a face",
        "mouth": "portrait of a person, {}",
        "clothing": "{} clothes on a person",
        "background": "a {} background with a face",
    },
}
_WORN = {
    "plain": ("face without {}", "face with {}"),
    "person": ("person with no {}", "person with {}"),
    "held out": ("no {} on a face", "{} on a face"),
}
WORDINGS = tuple(_PROMPTS)
"""Ways to ask for a factor's values; no caption of the training is built like those of ``held out``."""


def prompts(factor: str, wording: str = "plain") -> list[str]:
    """One text for each value of a factor, in order, for zero-shot classification; ``wording`` is one of ``WORDINGS``."""
    if factor in _PROMPTS[wording]:
        return [_PROMPTS[wording][factor].format(value) for value in FACTORS[factor]]
    thing, (absent, present) = _THINGS[factor][0], _WORN[wording]
    return [absent.format(thing.removeprefix("a ")), present.format(thing)]
