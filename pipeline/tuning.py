"""What fine-tuning one attribute is asked to do, checked before anything starts; no Ray here."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fsspec.core import url_to_fs

from models.attributes import attributes_of
from models.domains import Domain
from models.references import WeightsError, beside, place_of, public
from models.weights import edit_model_file, parse_card
from pipeline.checks import absolute_tuning_weights, base_problems, latent_mismatch, network_weights_problems, place_problems
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
    def file(self) -> str:
        """Reference of the edit model's weights."""
        return edit_model_file(self.run.output, self.run.attribute)

    @property
    def storage(self) -> str:
        """Address of the training's checkpoints."""
        return self.run.storage or f"{self.run.output.rstrip('/')}/.training"


def make_tune_plan(run: TuneRun, write: bool = True) -> TunePlan:
    """Checks everything that can be checked without a model call. Raises ConfigError with every problem found.

    With ``write`` a store is written to once, to see that it can be; without, nothing is left anywhere.
    """
    run = absolute_tuning_weights(replace(run, latents=absolute(run.latents), output=absolute(run.output)))
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
    problems += network_weights_problems(run.loss_clips, run.identity) + _place_problems(run.output, write)
    if run.domain.clip in run.loss_clips and not problems:
        problems += word_problems(run.domain, run.source_text, run.target_text)
    if problems:
        raise ConfigError(*problems)
    plan = TunePlan(run=run, found=found, request=tuning_request(run, found))
    return replace(plan, done=not run.overwrite and is_done(plan.file, plan.request))


def _place_problems(address: str, write: bool) -> list[str]:
    """Why edit models cannot be saved at an address; empty if they can."""
    if place_of(address).kind == "hub":  # each epoch's checkpoint would be a commit
        return [f"edit models are saved in a local folder or a bucket (s3://); got {public(address)}"]
    return place_problems(address, write and "://" in address and not address.startswith("file:"))


def is_done(file: str, request: Mapping[str, Any]) -> bool:
    """Whether an edit model is there from the same request. Raises ConfigError if it is from another one."""
    fs, weights = url_to_fs(file)
    card = f"{weights.removesuffix('.safetensors')}.json"
    fs.invalidate_cache()
    if not (fs.exists(weights) and fs.exists(card)):  # weights without a card were not saved to the end
        return False
    try:
        before = parse_card(fs.cat_file(card), public(beside(file, ".json"))).request  # of the store itself: a cache may be older
    except WeightsError as error:
        raise ConfigError(f"{error}; remove it, or --overwrite") from None
    changed = "; ".join(differences(before, request)) if before else "its card does not say which"
    if changed:
        raise ConfigError(f"{public(file)} was made by another request ({changed}); give another folder or name, or --overwrite")
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
