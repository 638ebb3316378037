"""The table of attributes: named edits, from a source text to a target text.

Names and texts of the real domains are those of the official DiffusionCLIP code, so that what its ``--edit_attr`` took works here;
``note`` says where a text was corrected. Return steps are those in the names of its published edit models (``human_pixar_t601.pth``).
"""

from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One edit. ``return_step`` and ``learning_rate`` are what it was published with, None where nothing was."""

    name: str
    family: str
    """The domains it is for: those with the same ``family``."""
    source: str
    """Or several, of which each image takes the one that describes it best: ``pale face | dark face``."""
    target: str
    changes: tuple[str, str] | None = None
    """The factor and the value that the edit should give it, where a domain knows its factors."""
    return_step: int | None = None
    learning_rate: float | None = None
    note: str = ""
    """The file name of the published edit model that the return step is of; how the text was corrected."""


def _pixelface(name: str, source: str, target: str, factor: str, value: str) -> Attribute:
    return Attribute(name=name, family="pixelface", source=source, target=target, changes=(factor, value))


def _official(
    family: str, name: str, source: str, target: str, step: int | None = None, *, file: str = "", rate: float | None = None, note: str = ""
) -> Attribute:
    """``step`` is the return step of the edit model that was published as ``file``, which is FAMILY_NAME where it is not given."""
    file = file or (name if name.startswith(family) else f"{family}_{name}")
    notes = [f"{file}_t{step}.pth"] * (step is not None) + [note] * bool(note)
    return Attribute(name=name, family=family, source=source, target=target, return_step=step, learning_rate=rate, note="; ".join(notes))


_HAIR_COLORS = ("black", "brown", "blond", "red", "grey")
_SKINS = ("pale", "tanned", "dark")


def _others(text: str, value: str, values: tuple[str, ...]) -> str:
    """The source texts of an edit towards one of several values: one for each other value."""
    return " | ".join(text.format(other) for other in values if other != value)


_PIXELFACE = (
    _pixelface("glasses", "face without glasses", "face with glasses", "glasses", "yes"),
    _pixelface("no_glasses", "face with glasses", "face without glasses", "glasses", "no"),
    _pixelface("hat", "face without hat", "face with a hat", "hat", "yes"),
    _pixelface("no_hat", "face with a hat", "face without hat", "hat", "no"),
    _pixelface("beard", "face without beard", "face with a beard", "beard", "yes"),
    _pixelface("no_beard", "face with a beard", "face without beard", "beard", "no"),
    _pixelface("smiling", "sad face", "smiling face", "mouth", "smiling"),
    _pixelface("sad", "smiling face", "sad face", "mouth", "sad"),
    _pixelface("long_hair", "face with short hair", "face with long hair", "hair_length", "long"),
    *(
        _pixelface(f"{color}_hair", _others("face with {} hair", color, _HAIR_COLORS), f"face with {color} hair", "hair_color", color)
        for color in ("red", "blond", "black", "grey")
    ),
    *(_pixelface(skin, _others("{} face", skin, _SKINS), f"{skin} face", "skin", skin) for skin in ("tanned", "pale")),
)

_HUMAN = (
    _official("human", "tanned", "face", "tanned face", 201),
    _official("human", "pale", "face", "pale face"),
    _official("human", "makeup", "person", "person with makeup", 301, file="human_with_makeup"),
    _official("human", "no_makeup", "person", "person without makeup", 301, file="human_without_makeup"),
    _official("human", "old", "person", "old person"),
    _official("human", "young", "person", "young person"),
    _official("human", "beards", "person", "person with beards"),
    _official("human", "angry", "face", "angry face"),
    _official("human", "surprised", "face", "surprised face"),
    _official("human", "smiling", "face", "smiling face"),
    _official("human", "blond_hair", "person", "person with blond hair"),
    _official("human", "red_hair", "person", "person with red hair"),
    _official("human", "grey_hair", "person", "person with grey hair", note="text corrected: the official one says red hair"),
    _official("human", "curly_hair", "person", "person with curly hair", 401, file="curly_hair"),
    _official("human", "nicolas", "Person", "Nicolas Cage"),
    _official("human", "zuckerberg", "Person", "Mark Zuckerberg"),
    _official("human", "benedict", "Person", "Benedict Cumberbatch"),
    _official("human", "gogh", "photo", "painting by Gogh", 601),
    _official("human", "frida", "photo", "self-portrait by Frida Kahlo"),
    _official("human", "modigliani", "photo", "Painting in Modigliani style"),
    _official("human", "sketch", "photo", "sketch", 601),
    _official("human", "watercolor", "photo", "Watercolor Art with Thick Brushstrokes"),
    _official("human", "elf", "Human", "Tolkien elf"),
    _official("human", "super_saiyan", "Human", "Super saiyan"),
    _official("human", "pixar", "Human", "3D render in the style of Pixar", 601),
    _official("human", "neanderthal", "Human", "Neanderthal", 601, rate=8e-6, note="rate of the README, whose return step is 500"),
    _official("human", "zombie", "Human", "Zombie"),
    _official("human", "jocker", "Human", "The Joker", note="text corrected: the official one says Jocker"),
    _official("human", "male", "female face", "male face", 401, note="its texts were not published, these are ours"),
)

_DOG = (
    _official("dog", "dog_nicolas", "Dog", "Nicolas Cage", 601),
    _official("dog", "dog_yorkshire", "Dog", "Yorkshire Terrier", 601),
    _official("dog", "dog_smiling", "Dog", "Smiling Dog"),
    _official("dog", "dog_zombie", "Dog", "Zombie", 601),
    _official("dog", "dog_super_saiyan", "Dog", "Super saiyan"),
    _official("dog", "dog_venom", "Dog", "Venom", 601, file="dog_venome"),
    _official("dog", "dog_bear", "Dog", "Bear", 500),
    _official("dog", "dog_fox", "Dog", "Fox"),
    _official("dog", "dog_wolf", "Dog", "Wolf"),
    _official("dog", "dog_hamster", "Dog", "Hamster", 601),
    _official("dog", "dog_gogh", "photo", "painting by Gogh", 500, note="texts of the human gogh"),
)

_CHURCH = (
    _official("church", "church_snow", "Church", "Snow Covered Church", note="text corrected: the official one says Coverd"),
    _official("church", "church_night", "Church", "Church at night"),
    _official("church", "church_red_brick", "Church", "Red brick wall Church"),
    _official("church", "church_golden", "Church", "Golden Church"),
    _official("church", "church_wooden_house", "Church", "Wooden House"),
    _official("church", "church_gothic", "Church", "Gothic Church"),
    _official("church", "church_ancient_tower", "Church", "Ancient traditional Asian tower"),
    _official("church", "church_temple", "Church", "Temple"),
    _official("church", "church_factory", "church", "factory with chimneys"),
    _official("church", "church_department_store", "church", "department store"),
)

_BEDROOM = (
    _official("bedroom", "bedroom_blue", "Bedroom", "Blue tone Bedroom"),
    _official("bedroom", "bedroom_green", "Bedroom", "Green tone Bedroom"),
    _official("bedroom", "bedroom_golden", "Bedroom", "Golden Bedroom"),
    _official("bedroom", "bedroom_princess", "Bedroom", "Princess Bedroom"),
    _official("bedroom", "bedroom_palace", "Bedroom", "Palace Bedroom"),
    _official("bedroom", "bedroom_wooden", "Bedroom", "Wooden Bedroom"),
)

_IMAGENET = (
    _official(
        "imagenet", "imagenet_watercolor", "photo", "Watercolor Art with Thick Brushstrokes", 601, note="texts of the human watercolor"
    ),
    _official("imagenet", "imagenet_pointillism", "photo", "Pointillism art", 601, note="the text is its label in the official demo"),
    _official("imagenet", "imagenet_gogh", "photo", "painting by Gogh", 601, note="texts of the human gogh"),
    _official("imagenet", "imagenet_cubism", "photo", "Cubism art", 601, note="the text is its label in the official demo"),
)

ATTRIBUTES: dict[tuple[str, str], Attribute] = {
    (a.family, a.name): a for a in chain(_PIXELFACE, _HUMAN, _DOG, _CHURCH, _BEDROOM, _IMAGENET)
}
"""Keyed by (family, name)."""

FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(family for family, _ in ATTRIBUTES))


def attributes_of(family: str) -> dict[str, Attribute]:
    """Name -> attribute of a family of domains; empty for one that is not in the table, such as ""."""
    return {name: a for (where, name), a in ATTRIBUTES.items() if where == family}
