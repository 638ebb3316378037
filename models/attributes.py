"""The table of attributes: named edits, from a source text to a target text."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """``changes`` names the factor and the value that the edit should give it, where a domain knows its factors."""

    name: str
    domain: str
    source: str
    target: str
    changes: tuple[str, str] | None = None


def _pixelface(name: str, source: str, target: str, factor: str, value: str) -> Attribute:
    return Attribute(name=name, domain="pixelface", source=source, target=target, changes=(factor, value))


_ALL = (
    _pixelface("glasses", "face without glasses", "face with glasses", "glasses", "yes"),
    _pixelface("hat", "face without hat", "face with a hat", "hat", "yes"),
    _pixelface("beard", "face without beard", "face with a beard", "beard", "yes"),
    _pixelface("smiling", "sad face", "smiling face", "mouth", "smiling"),
    _pixelface("sad", "smiling face", "sad face", "mouth", "sad"),
    _pixelface("red_hair", "face", "face with red hair", "hair_color", "red"),
    _pixelface("blond_hair", "face", "face with blond hair", "hair_color", "blond"),
    _pixelface("tanned", "face", "tanned face", "skin", "tanned"),
)

ATTRIBUTES: dict[tuple[str, str], Attribute] = {(a.domain, a.name): a for a in _ALL}
"""Keyed by (domain, name)."""


def attributes_of(domain: str) -> dict[str, Attribute]:
    return {name: a for (where, name), a in ATTRIBUTES.items() if where == domain}
