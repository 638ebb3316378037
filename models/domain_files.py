"""Domains of one's own: from a YAML or JSON file, or from nothing but a folder of weights."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from models.domains import DOMAINS, README_RECIPE, README_TUNING, Domain
from models.fetching import file_of, first_in
from models.folders import SCHEDULE, schedule_length
from models.recipe import Recipe, retuned
from models.references import NotCachedError, WeightsError, inside, public

FILE = "domain.json"
"""In a folder of weights: the domain that it is."""
DECIDED = {
    "prediction": "prediction_type in scheduler_config.json (epsilon where it names none)",
    "schedule": "scheduler_config.json",
    "learned_variance": "out_channels in config.json",
    "classes": "num_class_embeds in config.json",
}
"""Fields that a folder's configurations decide, and where in them; a domain file may repeat them, but not say otherwise."""
Reference = TypeVar("Reference", str, Path)
_DEFAULTS: dict[str, Any] = {"recipe": README_RECIPE, "tuning": README_TUNING}


def load_domain_file(reference: str | Path) -> Domain:
    """A domain from a YAML or JSON file with fields of ``Domain``; ``extends: NAME`` starts from one of the table.

    ``recipe`` and ``tuning`` hold what differs from the extended domain's, or from the official README's. Without a name it
    is called like the file. Paths are relative to the file where something lies there. What the network's configuration says
    need not be said again (size, prediction, schedule, variance, classes); but for the size, it may not be said otherwise. Raises
    WeightsError, one line a problem.
    """
    file = file_of(reference)
    text = str(reference) if "://" in str(reference) else str(file.absolute())
    return _domain(file, text.rpartition("/")[0], {"name": file.stem}, _parsed(file))


def domain_from_folder(reference: str | Path) -> Domain:
    """The domain of any UNet2DModel folder: what its ``domain.json`` says, else its name and what the network's configuration
    says. Raises WeightsError if the folder cannot be had, is none, or is of a kind that cannot be walked with."""
    home = str(reference).rstrip("/")
    if "://" not in home and Path(home).expanduser().exists():
        home = str(Path(home).expanduser().absolute())
    own = {"name": home.rpartition("/")[2], "weights": home}
    file = None
    with suppress(NotCachedError):  # offline, a folder that was fetched may well have none
        _, file = first_in(home, [FILE]) or (FILE, None)
    if file is None:
        facts, length = _facts(home), schedule_length(home)
        recipe = scaled(README_RECIPE, length, {})
        return _checked(Domain(**_DEFAULTS | own | facts | {"about": f"{home}, not in the table", "recipe": recipe}), home, length)
    given = _parsed(file)
    return _domain(file, home, {"weights": home} if "extends" in given else own, given)  # imported weights are of the domain they extend


def _domain(file: Path, home: str, own: dict[str, Any], given: dict[str, Any]) -> Domain:
    """``given``, which may name a domain that it extends, then ``own``, then that domain's. ``home`` is the reference of the
    folder that paths are relative to."""
    extended, problems = given.pop("extends", None), []
    if extended is not None and extended not in DOMAINS:
        problems.append(f"{file}: unknown domain {extended!r} to extend: it is one of {', '.join(DOMAINS)}{_hint(extended, DOMAINS)}")
    values = own | _typed(Domain, given, str(file), problems)
    if problems:
        raise WeightsError("\n".join(problems))
    for name in ("weights", "clip", "edits", "judge", "held_out", "tuning_images"):
        if values.get(name):
            values[name] = _resolved(values[name], home)
    base = {f.name: getattr(DOMAINS[extended], f.name) for f in fields(Domain)} if extended else _DEFAULTS
    length = 1000
    if values.get("weights") and not ("image_size" in values and values.keys().isdisjoint(DECIDED)):
        base, length = base | _facts(values["weights"]), schedule_length(values["weights"])
    if wrong := _contradictions(values, base, str(values.get("weights") or extended)):
        raise WeightsError("\n".join(f"{file}: {problem}" for problem in wrong))
    for name in ("weights", "image_size"):
        if name not in base | values:
            raise WeightsError(f"{file}: {name} is missing")
    values["recipe"] = scaled(base["recipe"], length, values.get("recipe", {}))
    values["tuning"] = retuned(base["tuning"], values.get("tuning", {}))
    return _checked(Domain(**base | values), str(file), length)


def _contradictions(stated: Mapping[str, Any], known: Mapping[str, Any], weights: str) -> list[str]:
    """Sentences about what a file states of its network where the network's own configuration, which is what is computed with, says
    otherwise."""
    return [
        f"it states {name} {_shown(stated[name])}, but {public(weights)} has {_shown(known[name])}; leave {name} out, or correct {where}"
        for name, where in DECIDED.items()
        if name in stated and name in known and stated[name] != known[name]
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def scaled(recipe: Recipe, timesteps: int, given: Mapping[str, Any]) -> Recipe:
    """A recipe made for a schedule of 1000 timesteps, for one of another length, with what was given for that one."""
    steps = {name: max(1, round(getattr(recipe, name) * timesteps / 1000)) for name in ("return_step", "projection_step")}
    return replace(recipe, **{**steps, **given})


def _checked(domain: Domain, where: str, timesteps: int) -> Domain:
    problems = domain.problems(timesteps)
    if problems:
        raise WeightsError("\n".join(f"{where}: {problem}" for problem in problems))
    return domain


def _parsed(file: Path) -> dict[str, Any]:
    """A JSON file by its suffix, else YAML; nothing in it is executed."""
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise WeightsError(f"{file} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{file} must hold names and values, like weights: org/name; it holds {type(values).__name__}")
    return values


def _typed(cls: type, values: Mapping[Any, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Those of ``values`` that are fields of a dataclass, each of its field's type; nested dataclasses stay dicts."""
    hints, found = get_type_hints(cls), {}
    for name, value in values.items():
        if name not in hints:
            problems.append(f"{where}: unknown name {name!r}{_hint(str(name), hints)}; there are {', '.join(hints)}")
        elif is_dataclass(hints[name]) and isinstance(value, Mapping):
            found[name] = _typed(hints[name], value, f"{where}: {name}", problems)
        else:
            try:
                found[name] = _of_type(hints[name], value)
            except (TypeError, ValueError):
                problems.append(f"{where}: {name} must be {_said(hints[name])}; got {value!r}")
    return found


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _of_type(hint: Any, value: Any) -> Any:
    """``value`` as a field of this type holds it; raises TypeError or ValueError if it cannot."""
    kinds = _kinds(hint)
    if value is None and NoneType in kinds:
        return None
    if isinstance(value, bool) and bool not in kinds:
        raise TypeError
    if float in kinds and isinstance(value, int | float | str):
        return float(value)  # YAML reads 8e-6 as text, for want of a point
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if not isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type))):
        raise TypeError
    return value


def _said(hint: Any) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path", NoneType: "null"}
    return " or ".join(words.get(kind, "names and values") for kind in _kinds(hint))


def _resolved(reference: Reference, home: str) -> Reference:
    """A path that starts with a dot, or that is in the folder ``home``, as one of that folder; anything else as it is."""
    text = str(reference)
    if "://" in text or text.startswith(("/", "~")):
        return reference
    if "://" not in home and (text.startswith(".") or isinstance(reference, Path) or Path(home, text).exists()):
        return type(reference)(os.path.normpath(Path(home, text)))
    return type(reference)(inside(home, text.removeprefix("./"))) if text.startswith("./") else reference


def _facts(weights: str) -> dict[str, Any]:
    """What the configurations in a diffusers folder say about a domain; its weights are not fetched for that."""
    network = first_in(weights, ["config.json", "unet/config.json"])
    noise = first_in(weights, ["scheduler_config.json", "scheduler/scheduler_config.json"])
    if network is None or noise is None:
        raise WeightsError(
            f"{weights} has no {'scheduler_config.json' if network else 'config.json'}; it must be a diffusers UNet2DModel folder"
        )
    about, betas = _parsed(network[1]), _parsed(noise[1])
    channels, size = about.get("in_channels", 3), about.get("sample_size")
    if isinstance(size, list) and len(size) == 2:  # height and width, as diffusers allows
        if size[0] != size[1]:
            raise WeightsError(
                f"{weights} is a network for images of {size[0]}x{size[1]} pixels (sample_size {size}); only square ones can be edited"
            )
        size = size[0]
    if channels != 3 or not isinstance(size, int):
        raise WeightsError(f"{weights} is no network for square RGB images: it has in_channels {channels} and sample_size {size}")
    return {
        "image_size": size,
        "learned_variance": about.get("out_channels", 3) == 2 * channels,
        "classes": about.get("num_class_embeds"),
        "prediction": betas.get("prediction_type", "epsilon"),
        "schedule": _schedule(betas),
    }


def _schedule(scheduler: Mapping[str, Any]) -> str:
    """A scheduler's configuration, for people."""
    said = {**SCHEDULE, **scheduler}
    if said["trained_betas"] is not None:
        return f"its own betas, {len(said['trained_betas'])} timesteps"
    span = "" if said["beta_schedule"] == "squaredcos_cap_v2" else f" betas {said['beta_start']}..{said['beta_end']}"
    return f"{said['beta_schedule']}{span}, {said['num_train_timesteps']} timesteps"


def _hint(name: str, allowed: Iterable[str]) -> str:
    near = get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
