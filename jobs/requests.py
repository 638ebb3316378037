"""From names that people type to the objects that pipeline/ works with; every wrong name is a ConfigError."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from models.attributes import Attribute, attributes_of
from models.domains import DOMAINS, Domain
from models.recipe import Recipe
from models.weights import WeightsError, load_card
from pipeline import schema
from pipeline.config import ConfigError, Edit, Part, Source, unknown
from pipeline.sources import find


def domain_named(name: str) -> Domain:
    if name not in DOMAINS:
        raise ConfigError(unknown("domain", name, sorted(DOMAINS)))
    return DOMAINS[name]


def attribute_named(domain: Domain, name: str) -> Attribute:
    known = attributes_of(domain.name)
    if name not in known:
        raise ConfigError(
            unknown(f"attribute of {domain.name}", name, sorted(known)) + "; for your own give --source-text and --target-text"
        )
    return known[name]


def recipe_for(source: Source, domain: Domain, given: dict[str, Any]) -> Recipe:
    """The domain's recipe, or for latents the one that made them, with what was given on the command line."""
    base = domain.recipe.to_dict()
    with suppress(ConfigError):  # said with every other problem when the run is planned
        base |= schema.about(find(source).columns).get("recipe", {})
    return Recipe.from_dict(base | given)


def edit_models(domain: Domain, folders: list[Path]) -> dict[str, Path]:
    """Name -> weights of every edit model that can be used; earlier folders come first, the ready-made ones last."""
    found: dict[str, Path] = {}
    for folder in [*folders, *([Path(domain.edits)] if domain.edits else [])]:
        for file in sorted(folder.glob("*.safetensors")):
            found.setdefault(file.stem, file)
    return found


def part_named(name: str, weight: float, domain: Domain, usable: dict[str, Path]) -> Part:
    if name not in usable:
        raise ConfigError(
            unknown(f"edit model of {domain.name}", name, sorted(usable))
            + f"; make one with: diffusionclip finetune LATENTS MODELS --attribute {name}"
        )
    try:
        card = load_card(usable[name])
    except WeightsError as error:
        raise ConfigError(str(error)) from None
    return Part(name=name, file=str(usable[name]), weight=weight, source=card.source, target=card.target)


def parse_mix(text: str) -> list[tuple[str, float]]:
    """``glasses=0.7,hat=0.3`` -> names and weights; without weights all are equal and sum to 1."""
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if len(pieces) < 2:
        raise ConfigError(f"a mix names at least two attributes, like glasses=0.5,hat=0.5; got {text!r}")
    parsed = []
    for piece in pieces:
        name, _, weight = piece.partition("=")
        try:
            parsed.append((name.strip(), float(weight) if weight else 1 / len(pieces)))
        except ValueError:
            raise ConfigError(f"the weight of {name!r} in the mix {text!r} must be a number; got {weight!r}") from None
    return parsed


def make_edits(domain: Domain, attributes: list[str], mixes: list[str], degrees: list[float], folders: list[Path]) -> tuple[Edit, ...]:
    """Every attribute and mix at every degree; ``none`` is the reconstruction. Raises ConfigError with all wrong names."""
    usable = edit_models(domain, folders)
    edits: list[Edit] = []
    problems: list[str] = []
    wanted = [[(name, 1.0)] if name != "none" else [] for name in attributes]
    for text in mixes:
        try:
            wanted.append(parse_mix(text))
        except ConfigError as error:
            problems += error.problems
    for members in wanted:
        parts = []
        for name, weight in members:
            try:
                parts.append(part_named(name, weight, domain, usable))
            except ConfigError as error:
                problems += error.problems
        edits += [Edit(parts=tuple(parts), degree=degree) for degree in (degrees if parts else [1.0])]
    problems += [f"the degree must lie between -5 and 5 (0 = reconstruction, 1 = full edit); got {d}" for d in degrees if not -5 <= d <= 5]
    if not attributes and not mixes:
        problems.append(f"say what to edit with --attribute or --mix; usable are {', '.join(sorted(usable)) or 'no edit models yet'}")
    if problems:
        raise ConfigError(*problems)
    return tuple(edits)
