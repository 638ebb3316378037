"""``diffusionclip finetune``: latents -> an edit model for each attribute."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import options as o

LatentsArg = Annotated[str, typer.Argument(help="A latents table that `diffusionclip invert` made.")]
ModelsArg = Annotated[Path, typer.Argument(help="The folder for NAME.safetensors and NAME.json.")]
SourceText = Annotated[str | None, typer.Option(help="Words for the images as they are; with --target-text and --name.")]
TargetText = Annotated[str | None, typer.Option(help="Words for the images as they should become.")]
Name = Annotated[str | None, typer.Option(help="The name of your own attribute.")]
TRAINING = "Training"
Epochs = Annotated[int | None, typer.Option(help="Passes over the latents.", rich_help_panel=TRAINING)]
Images = Annotated[int | None, typer.Option(help="At most this many latents.", rich_help_panel=TRAINING)]
Rate = Annotated[float | None, typer.Option(help="Of Adam.", rich_help_panel=TRAINING)]
TuneBatch = Annotated[int | None, typer.Option("--batch", help="Images of one optimizer step.", rich_help_panel=TRAINING)]
TuneSteps = Annotated[int | None, typer.Option(help="Rungs that gradients flow through.", rich_help_panel=TRAINING)]
ClipWeight = Annotated[float | None, typer.Option(help="Of the directional CLIP loss.", rich_help_panel=TRAINING)]
L1Weight = Annotated[float | None, typer.Option(help="Of the distance to the source.", rich_help_panel=TRAINING)]
Form = Annotated[str | None, typer.Option(help="Of the directional loss: log (the official code's) or cosine.", rich_help_panel=TRAINING)]
Seed = Annotated[int | None, typer.Option(help="Of the order of images.", rich_help_panel=TRAINING)]
Parallel = Annotated[int, typer.Option(help="Attributes trained side by side.", rich_help_panel=o.MACHINES)]
TuneWorkers = Annotated[int, typer.Option(help="Workers that share one attribute.", rich_help_panel=o.MACHINES)]


class TrainingFailedError(RuntimeError):
    """At least one attribute could not be trained; the others are saved."""


def finetune(
    latents: LatentsArg,
    models: ModelsArg,
    attribute: o.Attributes = None,
    source_text: SourceText = None,
    target_text: TargetText = None,
    name: Name = None,
    domain: o.DomainName = "pixelface",
    epochs: Epochs = None,
    images: Images = None,
    learning_rate: Rate = None,
    batch: TuneBatch = None,
    steps_down: TuneSteps = None,
    clip_weight: ClipWeight = None,
    l1_weight: L1Weight = None,
    form: Form = None,
    seed: Seed = None,
    parallel: Parallel = 1,
    workers: TuneWorkers = 1,
    gpus: o.Gpus = 0.0,
    cpus: o.Cpus = 2.0,
    address: o.Address = None,
    verbose: o.Verbose = False,
) -> None:
    """Teach a copy of the base model one attribute, from words alone; several attributes side by side.

    [bold]Examples[/bold]

    diffusionclip finetune out/latents out/models --attribute smiling

    diffusionclip finetune out/latents out/models -a hat -a beard --parallel 2 --gpus 1

    diffusionclip finetune out/latents out/models --name ginger --source-text face --target-text "face with ginger hair"
    """
    from jobs.session import ray_session
    from pipeline.training import make_tune_plan

    numbers = o.given(
        epochs=epochs,
        images=images,
        learning_rate=learning_rate,
        batch=batch,
        steps_down=steps_down,
        clip_weight=clip_weight,
        l1_weight=l1_weight,
        form=form,
        seed=seed,
    )
    texts = wanted_texts(domain, attribute or [], (name, source_text, target_text))
    machines = {"workers": workers, "gpus": gpus, "cpus": cpus}
    plans = [make_tune_plan(tune_run(latents, models, domain, text, numbers, machines)) for text in texts]
    with ray_session(address, verbose):
        train(plans, parallel)


def wanted_texts(domain: str, attributes: list[str], own: tuple[str | None, str | None, str | None]) -> list[tuple[str, str, str]]:
    """(name, source text, target text) of everything asked for. Raises ConfigError."""
    import re

    from jobs.requests import attribute_named, domain_named
    from pipeline.config import ConfigError

    known = [attribute_named(domain_named(domain), name) for name in attributes]
    texts = [(a.name, a.source, a.target) for a in known]
    if any(own):
        name, source, target = own
        if not (name and source and target):
            raise ConfigError("an attribute of your own needs all three: --name, --source-text and --target-text")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise ConfigError(f"a name has letters, digits, - and _ only, at most 64; got {name!r}")
        texts.append((name, source, target))
    if not texts:
        raise ConfigError("say what to learn with --attribute, or with --name, --source-text and --target-text")
    if len({name for name, _, _ in texts}) < len(texts):
        raise ConfigError("every attribute can be asked for once only")
    return texts


def tune_run(latents: str, models: Path, domain: str, text: tuple[str, str, str], numbers: dict[str, Any], machines: dict[str, Any]) -> Any:
    """The request of one attribute."""
    from dataclasses import replace

    from jobs.requests import domain_named, recipe_for
    from pipeline.config import Source, TuneRun

    chosen = domain_named(domain)
    name, source, target = text
    return TuneRun(
        latents=latents,
        output=models,
        domain=chosen,
        attribute=name,
        source_text=source,
        target_text=target,
        recipe=recipe_for(Source(path=latents), chosen, {}),
        tuning=replace(chosen.tuning, **numbers),
        **machines,
    )


def train(plans: list[Any], parallel: int) -> list[Any]:
    """Trains on the connected Ray with progress. Raises TrainingFailedError at the end if any attribute failed."""
    from jobs.progress import console, display
    from pipeline.training import fit_all

    with display(f"fine-tune {', '.join(plan.run.attribute for plan in plans)}", 100, "%") as shown:

        def update(latest: dict[str, dict[str, float]]) -> None:
            share = sum(now["step"] / now["steps"] for now in latest.values()) / len(plans)
            words = [f"{name} loss {now['loss']:.3f} similarity {now['similarity']:.2f}" for name, now in latest.items()]
            shown.update(round(100 * share), "; ".join(words))

        results = fit_all(plans, parallel, update)
    for tuned in results:
        if tuned.file and tuned.losses:
            console.print(f"{tuned.file}: {tuned.attribute} in {tuned.seconds:.1f} s, similarity {tuned.losses['similarity']:.3f}")
    failed = [f"{tuned.attribute} was not trained: {tuned.error}" for tuned in results if tuned.error]
    if failed:
        raise TrainingFailedError("\n".join(failed))
    return results
