"""``diffusionclip finetune``: latents -> an edit model for each attribute."""

from typing import Annotated, Any

import typer

from jobs import options as o

LatentsArg = Annotated[str, typer.Argument(help="A latents table that `diffusionclip invert` made.")]
ModelsArg = Annotated[str, typer.Argument(help="The folder for NAME.safetensors and NAME.json; any fsspec address.")]
SourceText = Annotated[
    str | None,
    typer.Option(
        help="Words for the images as they are; of several, 'pale face | dark face', each image takes those that describe it best."
    ),
]
TargetText = Annotated[str | None, typer.Option(help="Words for the images as they should become.")]
Name = Annotated[str | None, typer.Option(help="The name of your own attribute.")]
TRAINING, LOSS, STOPPING = "Training", "Loss", "Stopping early"
Epochs = Annotated[int | None, typer.Option(help="Passes over the latents.", rich_help_panel=TRAINING)]
Images = Annotated[int | None, typer.Option(help="At most this many latents.", rich_help_panel=TRAINING)]
ChooseFrom = Annotated[
    int | None,
    typer.Option(help="Look at so many latents; train on those that lack the attribute most, by CLIP.", rich_help_panel=TRAINING),
]
Rate = Annotated[
    float | None,
    typer.Option(help="Of Adam; without it the domain's, with --rank 20 times that of the whole network.", rich_help_panel=TRAINING),
]
Growth = Annotated[
    float | None,
    typer.Option(
        "--learning-rate-growth", help="Factor after each epoch: 1 is constant, the official code has 1.3.", rich_help_panel=TRAINING
    ),
]
Warmup = Annotated[int | None, typer.Option(help="Optimizer steps before the rate is reached.", rich_help_panel=TRAINING)]
TuneBatch = Annotated[int | None, typer.Option("--batch", help="Images of one backward pass.", rich_help_panel=TRAINING)]
Accumulate = Annotated[int | None, typer.Option(help="Batches of one optimizer step.", rich_help_panel=TRAINING)]
TuneSteps = Annotated[int | None, typer.Option(help="Rungs that gradients flow through.", rich_help_panel=TRAINING)]
Memory = Annotated[
    str | None,
    typer.Option(help="full; checkpoint: same gradients, less memory; stepwise: the paper's GPU-efficient way.", rich_help_panel=TRAINING),
]
Rank = Annotated[
    int | None, typer.Option(help="Train low-rank weights of this rank: small files; 0: the whole network.", rich_help_panel=TRAINING)
]
Ema = Annotated[float | None, typer.Option(help="Save a moving average of the weights with this decay.", rich_help_panel=TRAINING)]
Seed = Annotated[int | None, typer.Option(help="Of the order of images.", rich_help_panel=TRAINING)]
ClipWeight = Annotated[float | None, typer.Option(help="Of the directional CLIP loss.", rich_help_panel=LOSS)]
ChoiceWeight = Annotated[
    float | None, typer.Option(help="Of CLIP's choice of the target text over the source texts.", rich_help_panel=LOSS)
]
ChoiceLead = Annotated[
    float | None,
    typer.Option(help="The target text is to lead by so many times the lead that the source texts had.", rich_help_panel=LOSS),
]
L1Weight = Annotated[float | None, typer.Option(help="Of the distance to the source.", rich_help_panel=LOSS)]
Distance = Annotated[
    str | None,
    typer.Option(help="That --l1-weight weighs: l1; saturating: faint changes cost more.", rich_help_panel=LOSS),
]
IdWeight = Annotated[float | None, typer.Option(help="Of the identity loss; needs --identity.", rich_help_panel=LOSS)]
Form = Annotated[str | None, typer.Option(help="Of the directional loss: log (the official code's) or cosine.", rich_help_panel=LOSS)]
Reference = Annotated[str | None, typer.Option(help="What edits are compared with: source or reconstruction.", rich_help_panel=LOSS)]
Clips = Annotated[
    list[str] | None,
    typer.Option(
        "--clip", help="MODEL/PRETRAINED of open_clip or a folder; several are averaged.", rich_help_panel=LOSS, show_default="the domain's"
    ),
]
ViewsOption = Annotated[
    int | None, typer.Option("--views", help="CLIP sees so many noisy, shifted views of each image; 1: the image.", rich_help_panel=LOSS)
]
HeldOut = Annotated[
    int | None, typer.Option(help="Further latents to measure the similarity on, never trained on.", rich_help_panel=STOPPING)
]
Patience = Annotated[int | None, typer.Option(help="Epochs without a better one; the best is kept.", rich_help_panel=STOPPING)]
StopAt = Annotated[float | None, typer.Option(help="Stop at this held-out similarity.", rich_help_panel=STOPPING)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Train again and replace an edit model of the same name.", rich_help_panel=TRAINING)
]
Parallel = Annotated[int, typer.Option(help="Attributes trained side by side.", rich_help_panel=o.MACHINES)]
TuneWorkers = Annotated[int, typer.Option(help="Workers that share one attribute.", rich_help_panel=o.MACHINES)]


READING = 1.0
"""CPUs that must be left for the tasks that read latents: workers that hold all of them would wait for these tasks without end."""


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
    choose_from: ChooseFrom = None,
    learning_rate: Rate = None,
    learning_rate_growth: Growth = None,
    warmup: Warmup = None,
    batch: TuneBatch = None,
    accumulate: Accumulate = None,
    steps_down: TuneSteps = None,
    memory: Memory = None,
    precision: o.Precision = None,
    rank: Rank = None,
    ema: Ema = None,
    seed: Seed = None,
    clip_weight: ClipWeight = None,
    choice_weight: ChoiceWeight = None,
    choice_lead: ChoiceLead = None,
    l1_weight: L1Weight = None,
    distance: Distance = None,
    id_weight: IdWeight = None,
    form: Form = None,
    reference: Reference = None,
    views: ViewsOption = None,
    clip: Clips = None,
    identity: o.Identity = None,
    held_out: HeldOut = None,
    patience: Patience = None,
    stop_at: StopAt = None,
    max_pixels: o.MaxPixels = 16_000_000,
    overwrite: Overwrite = False,
    parallel: Parallel = 1,
    workers: TuneWorkers = 1,
    gpus: o.Gpus = 0.0,
    cpus: o.Cpus = 2.0,
    address: o.Address = None,
    storage_option: o.StorageOptions = None,
    verbose: o.Verbose = False,
) -> None:
    """Teach a copy of the base model one attribute, from words alone; several attributes side by side.

    Training that was stopped goes on when the same command is given again; an edit model that is there from the same request is left.

    [bold]Examples[/bold]

    diffusionclip finetune out/latents out/models --attribute smiling

    diffusionclip finetune out/latents out/models -a hat -a beard --parallel 2 --gpus 1

    diffusionclip finetune out/latents601 out/models -a pixar --domain celebahq-256 --memory checkpoint --rank 8 --gpus 1

    diffusionclip finetune out/latents out/models --name ginger --source-text face --target-text "face with ginger hair"
    """
    from jobs.planning import only_planned
    from jobs.progress import console
    from jobs.session import ray_session, refuse_too_much, side_by_side
    from models.references import public
    from pipeline.faults import explained

    numbers = o.given(
        epochs=epochs,
        images=images,
        choose_from=choose_from,
        learning_rate=learning_rate,
        learning_rate_growth=learning_rate_growth,
        warmup=warmup,
        batch=batch,
        accumulate=accumulate,
        steps_down=steps_down,
        memory=memory,
        rank=rank,
        ema=ema,
        seed=seed,
        clip_weight=clip_weight,
        choice_weight=choice_weight,
        choice_lead=choice_lead,
        l1_weight=l1_weight,
        distance=distance,
        id_weight=id_weight,
        form=form,
        reference=reference,
        views=views,
        held_out=held_out,
        patience=patience,
        stop_at=stop_at,
    )
    if rank == 0:
        numbers["rank"] = None
    chosen = wanted_attributes(domain, attribute or [], (name, source_text, target_text))
    refuse_early(parallel, numbers)
    others = {
        "overwrite": overwrite,
        "workers": workers,
        "gpus": gpus,
        "cpus": cpus,
        "clips": tuple(clip or ()),
        "identity": identity,
        "max_pixels": max_pixels,
    }
    runs = [tune_run(latents, models, domain, wanted, numbers, o.given(precision=precision), others) for wanted in chosen]
    if only_planned(runs):
        return
    with explained(f"{latents} or {models} cannot be used"):
        plans = plan_all(runs)
    for plan in plans:
        if plan.done:
            console.print(f"{public(plan.file)} is there from the same request; nothing to train (--overwrite trains again)", markup=False)
    left = [plan for plan in plans if not plan.done]
    for note in rates([plan.run for plan in left]):
        console.print(note, markup=False)
    advise([plan.run for plan in left], [a for a, plan in zip(chosen, plans, strict=True) if not plan.done])
    if left:
        with ray_session(address, verbose):
            refuse_too_much(address, gpus, cpus, workers, READING)
            train(left, side_by_side(address, parallel, workers * cpus, READING))


def refuse_early(parallel: int, numbers: dict[str, Any]) -> None:
    """Raises ConfigError for what no plan would notice."""
    from pipeline.config import ConfigError

    problems = []
    if parallel < 1:
        problems.append(f"at least 1 attribute must be trained at a time; got --parallel {parallel}")
    if numbers.get("clip_weight") == 0 and "form" in numbers:
        problems.append("--form is of the directional CLIP loss, which --clip-weight 0 leaves out; leave --form out as well")
    if problems:
        raise ConfigError(*problems)


def plan_all(runs: list[Any]) -> list[Any]:
    """The plans of all attributes. Raises ConfigError with the problems of all of them, each told once."""
    from pipeline.config import ConfigError
    from pipeline.tuning import make_tune_plan

    plans: list[Any] = []
    problems: list[str] = []
    for run in runs:
        try:
            plans.append(make_tune_plan(run))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return plans


def wanted_attributes(domain: str, names: list[str], own: tuple[str | None, str | None, str | None]) -> list[Any]:
    """Everything asked for, one's own attribute (name, source text, target text) last. Raises ConfigError."""
    import re

    from jobs.requests import attribute_named, domain_named
    from models.attributes import Attribute
    from pipeline.config import ConfigError

    wanted = [attribute_named(domain_named(domain), name) for name in names]
    if any(own):
        name, source, target = own
        if not (name and source and target):
            raise ConfigError("an attribute of your own needs all three: --name, --source-text and --target-text")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise ConfigError(f"a name has letters, digits, - and _ only, at most 64; got {name!r}")
        wanted.append(Attribute(name=name, family="", source=source, target=target))
    if not wanted:
        raise ConfigError("say what to learn with --attribute, or with --name, --source-text and --target-text")
    if len({a.name for a in wanted}) < len(wanted):
        raise ConfigError("every attribute can be asked for once only")
    return wanted


def tune_run(
    latents: str, models: str, domain: str, attribute: Any, numbers: dict[str, Any], walk: dict[str, Any], others: dict[str, Any]
) -> Any:
    """The request of one attribute; ``numbers`` of the tuning win over the attribute's own, and those over the domain's."""
    from jobs.requests import domain_named, recipe_for
    from pipeline.config import Source, TuneRun

    chosen = domain_named(domain)
    return TuneRun(
        latents=latents,
        output=models,
        domain=chosen,
        attribute=attribute.name,
        source_text=attribute.source,
        target_text=attribute.target,
        recipe=recipe_for(Source(path=latents), chosen, walk),
        tuning=tuning_for(chosen.tuning, attribute, numbers),
        **others,
    )


def tuning_for(tuning: Any, attribute: Any, numbers: dict[str, Any]) -> Any:
    """A domain's tuning with an attribute's rate and the numbers that were given. A rate that an attribute was published with is one of
    the whole network."""
    from dataclasses import replace

    from models.recipe import retuned

    if attribute.learning_rate is None:
        return retuned(tuning, numbers)
    return retuned(replace(tuning, learning_rate=attribute.learning_rate, rank=None), {"rank": tuning.rank, **numbers})


def rates(runs: list[Any]) -> list[str]:
    """A line for each learning rate that is trained at: of which weights, and for which attributes."""
    named: dict[str, list[str]] = {}
    for run in runs:
        weights = "the whole network" if run.tuning.rank is None else f"low-rank weights (rank {run.tuning.rank})"
        named.setdefault(f"learning rate {run.tuning.learning_rate:g} for {weights}", []).append(run.attribute)
    return [f"{words}: {', '.join(names)}" for words, names in named.items()]


def advise(runs: list[Any], attributes: list[Any]) -> None:
    """Says so where the latents' return step is not the one that is known to work for an attribute."""
    from jobs.progress import console

    for run, attribute in zip(runs, attributes, strict=True):
        if attribute.return_step and attribute.return_step != run.recipe.return_step:
            console.print(
                f"note: {attribute.name} is known to work from return step {attribute.return_step}; these latents were made at "
                f"{run.recipe.return_step} (invert --return-step {attribute.return_step} makes others)"
            )


def train(plans: list[Any], parallel: int) -> list[Any]:
    """Trains on the connected Ray with progress. Raises TrainingFailedError at the end if any attribute failed."""
    from jobs.progress import console, display
    from models.references import public
    from pipeline.resume import alone
    from pipeline.training import fit_all

    with alone([plan.file for plan in plans]), display(f"fine-tune {', '.join(plan.run.attribute for plan in plans)}", 100, "%") as shown:

        def update(latest: dict[str, dict[str, float]]) -> None:
            share = sum(now["step"] / now["steps"] for now in latest.values()) / len(plans)
            words = [f"{name} loss {now['loss']:.3f} similarity {now['similarity']:.2f}" for name, now in latest.items()]
            shown.update(round(100 * share), "; ".join(words))

        results = fit_all(plans, parallel, update)
    for tuned in results:
        if tuned.file and tuned.losses:
            held_out = f", {tuned.losses['held_out']:.3f} on held-out images" if "held_out" in tuned.losses else ""
            similarity = f"similarity {tuned.losses['similarity']:.3f}{held_out}"
            console.print(
                f"{public(tuned.file)}: {tuned.attribute} in {tuned.seconds:.1f} s, epoch {tuned.losses['epoch']:.0f}, {similarity}"
            )
    failed = [f"{tuned.attribute} was not trained: {tuned.error}" for tuned in results if tuned.error]
    if failed:
        raise TrainingFailedError("\n".join(failed))
    return results
