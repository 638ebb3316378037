"""What fine-tuning one attribute is asked to do, checked before anything starts; no Ray here."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.attributes import attributes_of
from models.domains import Domain
from models.references import WeightsError
from models.weights import load_card
from pipeline.checks import absolute_tuning_weights, base_problems, latent_mismatch, network_weights_problems
from pipeline.config import ConfigError, Source, TuneRun
from pipeline.resume import differences, tuning_request
from pipeline.sources import Input, absolute, find
from pipeline.standing import unfinished


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """A checked fine-tuning run: nothing has been started or written yet."""

    run: TuneRun
    found: Input
    request: dict[str, Any]
    """Everything that decides the weights, as ``pipeline.resume`` compares it."""
    done: bool = False
    """Whether the edit model is there from the same request."""

    @property
    def name(self) -> str:
        """Of the Ray Train run: the same request finds its own checkpoints again, any other request starts afresh."""
        hashed = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()
        return f"{self.run.attribute}-{hashed[:12]}"

    @property
    def file(self) -> Path:
        """Of the edit model."""
        return self.run.output / f"{self.run.attribute}.safetensors"


def make_tune_plan(run: TuneRun) -> TunePlan:
    """Checks everything that can be checked without a model call. Raises ConfigError with every problem found."""
    run = absolute_tuning_weights(replace(run, latents=absolute(run.latents), output=run.output.absolute()))
    timesteps, problems = base_problems(run.domain, run.recipe)
    problems += run.problems(timesteps)
    try:
        found = find(Source(path=run.latents))
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    problems += unfinished(found.records)
    if not found.has_latents:
        problems.append(f"{run.latents} holds no latents; make them with: diffusionclip invert {run.latents} LATENTS")
    else:
        problems += latent_mismatch(found, run.domain, run.recipe)
        if found.rows < run.tuning.held_out + run.workers:
            problems.append(
                f"{run.latents} has {found.rows} latents, too few for {run.tuning.held_out} held-out images and at least one to train on "
                f"for each of {run.workers} workers"
            )
    problems += network_weights_problems(run.loss_clips, run.identity) + _place_problems(run.output)
    if run.domain.clip in run.loss_clips and not problems:
        problems += word_problems(run.domain, run.source_text, run.target_text)
    if problems:
        raise ConfigError(*problems)
    plan = TunePlan(run=run, found=found, request=tuning_request(run, found))
    return replace(plan, done=not run.overwrite and is_done(plan.file, plan.request))


def _place_problems(folder: Path) -> list[str]:
    """Why edit models cannot be saved in a folder; empty if they can."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        return [f"{folder} cannot be a folder: {there} is a file; give another"]
    return [] if os.access(there, os.W_OK) else [f"{folder} cannot be written to; give another folder, or see to its permissions"]


def is_done(file: Path, request: Mapping[str, Any]) -> bool:
    """Whether an edit model is there from the same request. Raises ConfigError if it is from another one."""
    if not (file.exists() and file.with_suffix(".json").exists()):  # weights without a card were not saved to the end
        return False
    try:
        before = load_card(file).request
    except WeightsError as error:
        raise ConfigError(f"{error}; remove it, or --overwrite") from None
    changed = "; ".join(differences(before, request)) if before else "its card does not say which"
    if changed:
        raise ConfigError(f"{file} was made by another request ({changed}); give another folder or name, or --overwrite")
    return True


def word_problems(domain: Domain, *texts: str) -> list[str]:
    """Sentences about texts that the domain's CLIP cannot understand; empty for a real CLIP."""
    listed = {text for a in attributes_of(domain.family).values() for text in (a.source, a.target)}
    if not domain.known_words_only or listed.issuperset(texts):
        return []
    from models.clip import load_clip

    unknown = sorted({word for text in texts for word in load_clip(domain.clip).unknown_words(text)})
    if not unknown:
        return []
    return [f"the small CLIP of {domain.name} has never seen {', '.join(map(repr, unknown))}; use the words of docs/pixelface.md"]
