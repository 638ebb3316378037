"""What can be said against a request before anything starts: from configurations, cards and records, without loading a network.
No Ray here."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from fsspec.core import url_to_fs

from models.domains import Domain
from models.folders import network_problems, schedule_length
from models.recipe import Recipe
from models.references import WeightsError, absolute, public
from models.stores import make_folder, missing_bucket
from models.weights import Card, fingerprint, load_card
from pipeline import schema
from pipeline.config import ConfigError, Edit, Part, Run, TuneRun
from pipeline.faults import refused
from pipeline.sources import Input

# ---- references ------------------------------------------------------------------------------------------------------


def absolute_weights(run: Run) -> Run:
    """The same request with the local paths of its weights made absolute: workers may have another working directory."""
    edits = [replace(edit, parts=tuple(replace(part, file=absolute(part.file)) for part in edit.parts)) for edit in run.edits]
    clip = run.score_clip and _absolute_clip(run.score_clip)
    return replace(run, edits=tuple(edits), score_clip=clip, identity=run.identity and absolute(run.identity))


def absolute_tuning_weights(run: TuneRun) -> TuneRun:
    """The same for fine-tuning."""
    clips = tuple(map(_absolute_clip, run.clips))
    return replace(run, clips=clips, identity=run.identity and absolute(run.identity))


def _absolute_clip(reference: str) -> str:
    from models.clip import absolute_clip

    return reference if reference == "none" else absolute_clip(reference)


def network_weights_problems(clips: Iterable[str], identity: str | None) -> list[str]:
    """Which CLIPs and which face recognition network cannot be had, each in a sentence; nothing is loaded or fetched."""
    from models.clip import check_clip  # they take seconds to import
    from models.identity import check_identity

    looks: list[tuple[Callable[[str], None], str]] = [(check_clip, clip) for clip in clips]
    if identity:
        looks.append((check_identity, identity))
    problems = []
    for look, reference in looks:
        try:
            look(reference)
        except WeightsError as error:
            problems.append(str(error))
    return problems


# ---- the output ------------------------------------------------------------------------------------------------------


# ---- the base model --------------------------------------------------------------------------------------------------


def base_problems(domain: Domain, recipe: Recipe) -> tuple[int, list[str]]:
    """The length of the base model's noise schedule, and why its network cannot take the domain's images or the recipe's label."""
    try:
        return schedule_length(domain.weights), network_problems(domain.weights, domain.image_size, recipe.class_label)
    except WeightsError as error:
        return 1000, [str(error)]


# ---- latents ---------------------------------------------------------------------------------------------------------


def latent_mismatch(found: Input, domain: Domain, recipe: Recipe) -> list[str]:
    """What keeps latents from being used with this domain and recipe, by name; empty if they fit."""
    about = schema.about(found.columns)
    problems = []
    if about.get("domain_fingerprint") != fingerprint(domain.weights):
        problems.append(
            f"the latents at {found.source.path} were made by base model {about.get('domain')} "
            f"({about.get('domain_fingerprint')}), not by {domain.name} ({fingerprint(domain.weights)}); invert the images again"
        )
    made_with = Recipe.from_dict(about.get("recipe", {})).of_latent()  # what an older record does not name was at its default
    for name, value in recipe.of_latent().items():
        made = made_with.get(name)
        if made != value:
            problems.append(f"the latents at {found.source.path} were made with {name} {made}, but {value} is asked for")
    return problems


def latent_problems(run: Run, found: Input) -> list[str]:
    if not found.has_latents:
        return []
    if not run.edits:
        return [f"{run.source.path} holds latents already; give images"]
    return latent_mismatch(found, run.domain, run.recipe)


# ---- edit models -----------------------------------------------------------------------------------------------------


def parts_of(edits: Iterable[Edit]) -> list[Part]:
    """The edit models of several edits, each name once."""
    return list({part.name: part for edit in edits for part in edit.parts}.values())


def card_problems(run: Run) -> tuple[list[str], list[str]]:
    """Why edit models do not belong to a run, and what of them should be known: that they were tuned for another walk."""
    problems, notes = [], []
    for part in parts_of(run.edits):
        try:
            card = load_card(part.file)
        except WeightsError as error:
            problems.append(str(error))
            continue
        problems += _strange(part, card, run)
        notes += _unlike(part, card, run.recipe)
    return problems, notes


def _strange(part: Part, card: Card, run: Run) -> list[str]:
    found, domain, label = [], run.domain, card.recipe.get("class_label")
    if card.domain_fingerprint != fingerprint(domain.weights):
        found.append(
            f"edit model {part.name} ({part.file}) belongs to base model {card.domain} ({card.domain_fingerprint}), "
            f"not to {domain.name} ({fingerprint(domain.weights)}); fine-tune it again"
        )
    if label != run.recipe.class_label:
        need = "leave --class-label out" if label is None else f"give --class-label {label}"
        found.append(
            f"edit model {part.name} ({part.file}) was tuned with {_label(label)} and this walk has {_label(run.recipe.class_label)}; "
            f"{need}, for the latents too, or fine-tune it again"
        )
    return found


def _label(label: int | None) -> str:
    return "no class label" if label is None else f"class label {label}"


def _unlike(part: Part, card: Card, recipe: Recipe) -> list[str]:
    differences = [
        f"{word} {card.recipe[name]} (here {getattr(recipe, name)})"
        for name, word in (("return_step", "return step"), ("spacing", "spacing"))
        if name in card.recipe and card.recipe[name] != getattr(recipe, name)
    ]
    return [f"edit model {part.name} was tuned with {' and '.join(differences)}; the edit may be weaker or stronger"] if differences else []


def place_problems(address: str, write: bool) -> list[str]:
    """Why nothing can be written to a folder or address; empty if it can. With ``write`` it is made and written to once, for
    only that tells of a store; without, nothing is left anywhere."""
    shown = public(address)
    try:
        with refused(f"the output {shown} cannot be used"):
            fs, root = url_to_fs(address)
            if bucket := missing_bucket(fs, root):
                return [f"there is no bucket {bucket} for the output {shown}; make it first, or see to the name"]
        if write:
            with refused(f"the output {shown} cannot be written to"):
                make_folder(fs, root)
                fs.touch(f"{root}/.writable", truncate=True)
                fs.rm_file(f"{root}/.writable")
    except ConfigError as error:
        return list(error.problems)
    except NotImplementedError:  # of a file system that can only be read
        return [f"the output {shown} cannot be written to: its file system is for reading only"]
    return _folder_problems(Path(root)) if "file" in fs.protocol and not write else []


def _folder_problems(folder: Path) -> list[str]:
    """Of a folder of this machine, whether it is there or not."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        return [f"{folder} cannot be a folder: {there} is a file; give another"]
    return [] if os.access(there, os.W_OK) else [f"{folder} cannot be written to; give another folder, or see to its permissions"]
