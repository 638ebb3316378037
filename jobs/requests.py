"""From names that people type to the objects that pipeline/ works with; every wrong name is a ConfigError."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.planning import refuse
from models.attributes import Attribute, attributes_of
from models.domain_files import domain_from_folder, load_domain_file
from models.domains import DOMAINS, Domain
from models.recipe import Recipe
from models.weights import WeightsError, edit_models_in, load_card
from pipeline.checks import parts_of
from pipeline.config import ConfigError, Edit, Part, Source, unknown
from pipeline.finding import metadata_at

DOMAIN_FILES = (".yaml", ".yml", ".json")


def domain_named(name: str, need_weights: bool = True) -> Domain:
    """The domain of a name in the table, of a diffusers folder or hub name, or of a domain file (.yaml, .yml, .json).

    A domain whose weights must be imported first is found too if they are not needed. Raises ConfigError.
    """
    of_weights = {domain.weights: domain for domain in DOMAINS.values() if domain.weights}
    if name in DOMAINS:
        domain = DOMAINS[name]
    elif name in of_weights:
        domain = of_weights[name]
    elif "/" in name or name.endswith(DOMAIN_FILES) or Path(name).exists():
        domain = _own_domain(name)
    else:
        raise ConfigError(unknown("domain", name, sorted(DOMAINS)) + "; a folder, a hub name or a domain file may be given as well")
    if need_weights and not domain.weights:
        refuse(
            f"the weights of {domain.name} must be imported first ({domain.origin}): "
            f"diffusionclip import FILE OUT --domain {domain.name}, and then --domain OUT"
        )
    return domain


def _own_domain(reference: str) -> Domain:
    try:
        return load_domain_file(reference) if reference.endswith(DOMAIN_FILES) else domain_from_folder(reference)
    except WeightsError as error:
        raise ConfigError(*str(error).splitlines()) from None


def attribute_named(domain: Domain, name: str) -> Attribute:
    known = attributes_of(domain.family)
    own = "for your own give --name, --source-text and --target-text"
    if not known:
        raise ConfigError(f"there are no attributes for {domain.name} in the table, so {name!r} is unknown; {own}")
    if name not in known:
        raise ConfigError(unknown(f"attribute of {domain.name}", name, sorted(known)) + f"; {own}")
    return known[name]


def recipe_for(source: Source, domain: Domain, given: dict[str, Any], edits: Sequence[Edit] = ()) -> Recipe:
    """For latents the recipe that made them, else the domain's with the return step that all edit models were tuned at, if it is one;
    with what was given on the command line. Raises ConfigError if something that was given would do nothing."""
    about: dict[str, Any] = {}
    with suppress(ConfigError):  # said with every other problem when the run is planned
        about = metadata_at(source.path)
    of_latents = about.get("kind") == "latents"
    made = about.get("recipe", {}) if of_latents else _common_return_step(edits)
    recipe = Recipe.from_dict(domain.recipe.to_dict() | made | given)
    problems = idle_options(recipe, given, of_latents)
    if "trim" in given and edits and not any(edit.trimmable for edit in edits):
        problems.append("--trim is of edits with one attribute, and there is none: mixes and reconstructions are not trimmed; leave it out")
    if problems:
        raise ConfigError(*problems)
    return recipe


def _common_return_step(edits: Sequence[Edit]) -> dict[str, int]:
    """The return step of all edit models' cards; empty if they name none, or several."""
    recipes = [load_card(part.file).recipe for part in parts_of(edits) if part.file]  # a plan may have parts that are still to be made
    steps = {int(recipe["return_step"]) for recipe in recipes if "return_step" in recipe}
    return {"return_step": steps.pop()} if len(steps) == 1 else {}


def idle_options(recipe: Recipe, given: dict[str, Any], of_latents: bool) -> list[str]:
    """Options of the walk that were given and would change nothing, each in a sentence."""
    found = []
    if not recipe.projections:
        idle = [f"--project-{name.removeprefix('projection_')}" for name in ("projection_step", "projection_steps") if name in given]
        found += [f"{option} belongs to --project, which is not given" for option in idle]
    if "trim" in given and recipe.projections:
        found.append("--trim keeps what the source image is like, which an image brought into the domain is not to be; leave it out")
    if "steps_up" in given and recipe.inversion == "stochastic":
        found.append("--steps-up does nothing with --inversion stochastic, which adds noise in one stroke; leave it out")
    if "seed" in given and not (recipe.eta if of_latents else recipe.has_noise):
        others = "" if of_latents else ", --project or --inversion stochastic"
        found.append(f"--seed is of fresh noise, and this walk has none: leave it out, or give --eta{others}")
    return found


def edit_models(domain: Domain, folders: list[str]) -> dict[str, str]:
    """Name -> reference of every edit model that can be used; earlier folders come first, the ready-made ones last."""
    found: dict[str, str] = {}
    for folder in [*folders, *([domain.edits] if domain.edits else [])]:
        for name, reference in edit_models_in(folder).items():
            found.setdefault(name, reference)
    return found


def part_named(name: str, weight: float, domain: Domain, usable: dict[str, str]) -> Part:
    if name not in usable:
        raise ConfigError(
            unknown(f"edit model of {domain.name}", name, sorted(usable))
            + f"; make one with: diffusionclip finetune LATENTS MODELS --attribute {name}"
        )
    try:
        card = load_card(usable[name])
    except WeightsError as error:
        raise ConfigError(str(error)) from None
    return Part(name=name, file=usable[name], weight=weight, source=card.source, target=card.target)


BASE = "base"
"""Names the base model in a mix."""


def parse_mix(text: str) -> dict[int, dict[str, float]]:
    """From timestep -> name -> weight. ``glasses=0.7,hat=0.3`` holds everywhere; ``0:hat=1;300:hat=0.4,base=0.6`` by ranges.

    Names without weights share evenly. Raises ConfigError. ``base`` may be named where the weights sum to 1.
    """
    ranges: dict[int, dict[str, float]] = {}
    for piece in filter(None, (piece.strip() for piece in text.split(";"))):
        start, colon, members = piece.rpartition(":")
        if colon and not start.strip().isdigit():
            raise ConfigError(f"a range of the mix {text!r} starts with a timestep, like 300:glasses=1; got {start.strip()!r}")
        if int(start or 0) in ranges:
            raise ConfigError(f"the mix {text!r} says twice what holds from timestep {int(start or 0)}")
        ranges[int(start or 0)] = _parse_weights(members, text)
    if len({name for weights in ranges.values() for name in weights}) < 2:
        raise ConfigError(f"a mix names at least two attributes, like glasses=0.5,hat=0.5; got {text!r}")
    return dict(sorted(ranges.items()))


def _parse_weights(members: str, text: str) -> dict[str, float]:
    pieces = [piece.strip() for piece in members.split(",") if piece.strip()]
    weights: dict[str, float] = {}
    for piece in pieces:
        name, equals, weight = (word.strip() for word in piece.partition("="))
        try:
            value = float(weight) if equals else 1 / len(pieces)
        except ValueError:
            raise ConfigError(f"the weight of {name!r} in the mix {text!r} must be a number; got {weight!r}") from None
        if not -10 <= value <= 10:
            raise ConfigError(f"the weight of {name!r} in the mix {text!r} must lie between -10 and 10; got {weight}")
        if name in weights:
            raise ConfigError(f"the mix {text!r} names {name!r} twice")
        weights[name] = value
    if BASE in weights and abs(sum(weights.values()) - 1) > 1e-6:
        raise ConfigError(f"weights of the mix {text!r} that name {BASE} must sum to 1; they sum to {sum(weights.values()):g}")
    return weights


def make_edits(domain: Domain, attributes: list[str], mixes: list[str], degrees: Sequence[float], folders: list[str]) -> tuple[Edit, ...]:
    """Every attribute and mix at every degree, 1 if none is given; ``none`` is the reconstruction. Raises ConfigError with all problems."""
    edits: list[Edit] = []
    problems: list[str] = []
    try:
        usable = edit_models(domain, folders)
    except WeightsError as error:
        refuse(str(error))
        usable = edit_models(domain, [])
    wanted: list[dict[int, dict[str, float]]] = [{0: {name: 1.0} if name != "none" else {}} for name in attributes]
    for text in mixes:
        try:
            wanted.append(parse_mix(text))
        except ConfigError as error:
            problems += error.problems
    for ranges in wanted:
        names = [name for name in dict.fromkeys(name for weights in ranges.values() for name in weights) if name != BASE]
        rows = tuple((start, tuple(weights.get(name, 0.0) for name in names)) for start, weights in ranges.items())
        parts = []
        for i, name in enumerate(names):
            try:
                parts.append(part_named(name, sum(row[i] for _, row in rows) / len(rows), domain, usable))
            except ConfigError as error:
                problems += error.problems
                parts.append(Part(name=name, file="", weight=0.0, source="", target=""))  # stands in where only a plan is made
        by_range = rows if len(rows) > 1 or rows[0][0] else ()
        edits += [Edit(parts=tuple(parts), degree=degree, ranges=by_range) for degree in (degrees if parts and degrees else [1.0])]
    problems += [f"the degree must lie between -5 and 5 (0 = reconstruction, 1 = full edit); got {d}" for d in degrees if not -5 <= d <= 5]
    if degrees and edits and not any(edit.parts for edit in edits):
        problems.append("a reconstruction has no degree; leave --degree out, or name an attribute")
    if not attributes and not mixes:
        problems.append(f"say what to edit with --attribute or --mix; usable are {', '.join(sorted(usable)) or 'no edit models yet'}")
    if problems:
        refuse(*problems)
    return tuple(edits)
