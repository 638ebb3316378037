"""``diffusionclip import``: a checkpoint of the official codes -> a base model, or an edit model of one."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

WHAT, EDIT = "What the file does not tell", "Edit models"
STRANGERS = 0.5
"""Share of the base weights by which an edit model may differ before it is doubted that it was tuned from them."""

Checkpoint = Annotated[str, typer.Argument(help="A .pt, .pth, .ckpt or .safetensors file: local, hf://, s3:// or https://.")]
Out = Annotated[Path, typer.Argument(help="The folder to write: a diffusers folder, or with --edit one of edit models.")]
ArchitectureName = Annotated[
    str | None,
    typer.Option(
        "--architecture",
        help="ddpm-256, iddpm-256, adm-256, adm-256-conditional or adm-512.",
        show_default="recognised",
        rich_help_panel=WHAT,
    ),
]
HeadChannels = Annotated[
    int | None,
    typer.Option(
        help="Channels of an attention head, the same at every width; 0 is a single head. Networks with a fixed number of heads "
        "(num_heads, like 128x128_diffusion.pt) cannot be imported, and their files do not tell.",
        rich_help_panel=WHAT,
    ),
]
AttentionOrder = Annotated[
    str | None, typer.Option(help="Of query, key and value in one matrix: legacy (by head) or new (by kind).", rich_help_panel=WHAT)
]
ImageSize = Annotated[int | None, typer.Option(help="Height and width of the images.", rich_help_panel=WHAT)]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="Of the noise: linear, or cosine (--noise_schedule of guided-diffusion).", show_default="linear", rich_help_panel=WHAT
    ),
]
OfDomain = Annotated[
    str | None,
    typer.Option(
        "--domain", help="Whose weights they are: its noun, recipe and attributes come along. With --edit its base model, also a folder."
    ),
]
EditName = Annotated[
    str | None, typer.Option("--edit", help="Make it an edit model of this name, of the base model in --domain.", rich_help_panel=EDIT)
]
SourceText = Annotated[str | None, typer.Option(help="What it was tuned from, if --edit is not in the table.", rich_help_panel=EDIT)]
TargetText = Annotated[str | None, typer.Option(help="What it was tuned to.", rich_help_panel=EDIT)]
ReturnStep = Annotated[
    int | None, typer.Option(help="That it was tuned at.", show_default="from a file name like pixar_t601.pth", rich_help_panel=EDIT)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds of the same name.")]


def import_checkpoint(
    checkpoint: Checkpoint,
    out: Out,
    domain: OfDomain = None,
    architecture: ArchitectureName = None,
    head_channels: HeadChannels = None,
    attention_order: AttentionOrder = None,
    image_size: ImageSize = None,
    schedule: Schedule = None,
    edit: EditName = None,
    source_text: SourceText = None,
    target_text: TargetText = None,
    return_step: ReturnStep = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a checkpoint of DiffusionCLIP, SDEdit's DDPM, ILVR or guided-diffusion into a base model or an edit model.

    Code inside the file is never run.

    [bold]Examples[/bold]

    diffusionclip import celeba_hq.ckpt models/celebahq --domain celebahq-256

    diffusionclip import human_pixar_t601.pth models/edits --edit pixar --domain models/celebahq

    diffusionclip import my.pt models/mine --head-channels 64 --attention-order legacy --image-size 128

    diffusionclip import 64x64_diffusion.pt models/small --head-channels 64 --attention-order new --image-size 64 --schedule cosine
    """
    from jobs.progress import console

    with console.status("loading"):
        import models.conversion  # noqa: F401 - takes seconds
    of_edit = {"source-text": source_text, "target-text": target_text, "return-step": return_step}
    refuse_early(out, architecture, (edit, domain), [name for name, value in of_edit.items() if value is not None], overwrite)
    refuse_schedule(schedule, edit)
    asked = {"head_channels": head_channels, "attention_order": attention_order, "image_size": image_size}
    if edit is None:
        import_base(checkpoint, out, domain, architecture, asked, schedule or "linear", overwrite)
    else:
        card = card_of_edit(checkpoint, edit, str(domain), (source_text, target_text), return_step)
        import_edit(checkpoint, out, str(domain), architecture, asked, card)


def refuse_early(
    out: Path, architecture: str | None, edit_and_domain: tuple[str | None, str | None], of_edit: list[str], overwrite: bool
) -> None:
    """Raises ConfigError or WeightsError for what is wrong before a large file is read; ``of_edit`` names given options."""
    from models.conversion import refuse_full
    from models.official import ARCHITECTURES
    from pipeline.config import ConfigError, unknown

    edit, domain = edit_and_domain
    problems = []
    if re.match(r"\w+:/", str(out)):  # a path swallows one of the slashes
        problems.append(f"the output must be a local folder; got {out}")
    if architecture is not None and architecture not in ARCHITECTURES:
        problems.append(unknown("architecture", architecture, list(ARCHITECTURES)))
    if edit is None:
        problems += [f"--{name} belongs to --edit, which is not given" for name in of_edit]
    elif domain is None:
        problems.append("an edit model belongs to a base model; say which with --domain (a name or a folder)")
    if edit is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", edit):
        problems.append(f"a name has letters, digits, - and _ only, at most 64; got {edit!r}")
    if len({"source-text", "target-text"} & {*of_edit}) == 1:
        problems.append("texts of your own need both: --source-text and --target-text")
    if problems:
        raise ConfigError(*problems)
    refuse_full(out, overwrite or edit is not None)
    if edit and (out / f"{edit}.safetensors").exists() and not overwrite:
        raise ConfigError(f"{out} already has an edit model {edit}; give another name or folder, or --overwrite")


def refuse_schedule(schedule: str | None, edit: str | None) -> None:
    """Raises ConfigError for a schedule that is not known, or that is not of a base model."""
    from models.conversion import SCHEDULES
    from pipeline.config import ConfigError, unknown

    if schedule is not None and edit is not None:
        raise ConfigError(
            "an edit model has the noise schedule of its base model; leave --schedule out, or give it when the base is imported"
        )
    if schedule is not None and schedule not in SCHEDULES:
        raise ConfigError(unknown("schedule", schedule, list(SCHEDULES)))


def import_base(
    checkpoint: str, out: Path, domain: str | None, architecture: str | None, asked: dict[str, Any], schedule: str, overwrite: bool
) -> None:
    import json

    from jobs.progress import console
    from models.conversion import save
    from models.domains import DOMAINS
    from models.weights import fingerprint
    from pipeline.config import ConfigError, unknown

    if domain is not None and domain not in DOMAINS:
        raise ConfigError(unknown("domain", domain, sorted(DOMAINS)))
    found, config, state = converted(checkpoint, architecture, asked)
    if domain is not None and DOMAINS[domain].image_size != found.image_size:
        size = DOMAINS[domain].image_size
        raise ConfigError(f"images of {domain} are {size}x{size}, those of this checkpoint {found.image_size}x{found.image_size}")
    more = {"domain.json": json.dumps({"extends": domain, "weights": "."}, indent=2) + "\n"} if domain else {}
    with console.status(f"writing {out}"):
        save(out, config, state, schedule=schedule, more=more, overwrite=overwrite)
    console.print(f"{out}: base model {fingerprint(out)}, {schedule} noise schedule of 1000 steps", markup=False)
    console.print(f"next: diffusionclip invert IMAGES LATENTS --domain {out}", markup=False)


def import_edit(checkpoint: str, out: Path, domain: str, architecture: str | None, asked: dict[str, Any], card: Any) -> None:
    from jobs.progress import console
    from jobs.requests import domain_named
    from models.conversion import distance
    from models.folders import CONFIG, WEIGHTS, folder_of, read_json
    from models.weights import fingerprint, save_edit_model

    base = domain_named(domain)
    folder = folder_of(base.weights)
    of_base = {"image_size": base.image_size, "head_channels": read_json(folder / CONFIG).get("attention_head_dim") or 0}
    _, _, state = converted(checkpoint, architecture, asked | {name: of_base[name] for name in of_base if asked[name] is None})
    with console.status("comparing with the base model"):
        share = distance(state, folder / WEIGHTS)
    if share > STRANGERS:
        console.print(f"warning: it differs from {domain} by {share:.0%}; it was probably tuned from other base weights", markup=False)
    with console.status(f"writing {out}"):
        file = save_edit_model(out, state, card)
    console.print(f"{file}: edit model {fingerprint(file)}, '{card.source}' to '{card.target}', {share:.1%} from its base", markup=False)
    step = card.recipe["return_step"]
    console.print(f"next: diffusionclip invert IMAGES LATENTS --domain {domain} --return-step {step}", markup=False)
    console.print(f"      diffusionclip edit LATENTS EDITS --domain {domain} --models {out} --attribute {card.attribute}", markup=False)


def converted(checkpoint: str, architecture: str | None, asked: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Architecture, configuration and state dict of a checkpoint, with a line for each step."""
    from jobs.progress import console
    from models.checkpoints import read
    from models.conversion import convert
    from models.official import ARCHITECTURES, architecture_of, changed
    from models.references import public
    from models.weights import file_of

    file = file_of(checkpoint)
    console.print(f"reading {public(checkpoint)} ({file.stat().st_size / 1e6:.1f} MB)", markup=False)
    with console.status("reading"):
        state, where = read(file)
    if architecture is None:
        name, found = architecture_of(state, **asked)
    else:
        name, found = architecture, changed(ARCHITECTURES[architecture], **asked)
    with console.status("converting"):
        config, state = convert(state, found, name)
    size, million = found.image_size, sum(tensor.numel() for tensor in state.values()) / 1e6
    console.print(f"{name}, {found.about}: {found.structure}; {size}x{size}, {million:.1f} million parameters", markup=False)
    if where:
        console.print(f"weights taken from {where}", markup=False)
    return found, config, state


def card_of_edit(checkpoint: str, name: str, domain: str, texts: tuple[str | None, str | None], return_step: int | None) -> Any:
    """The card of an imported edit model. Raises ConfigError if its texts or its return step are not known."""
    from dataclasses import replace

    from jobs.requests import domain_named
    from models.attributes import Attribute, attributes_of
    from models.folders import schedule_length
    from models.references import public
    from models.weights import Card, fingerprint
    from pipeline.config import ConfigError, unknown, versions

    base = domain_named(domain)
    known = attributes_of(base.family)
    if texts[0] and texts[1]:
        attribute = Attribute(name=name, family="", source=texts[0], target=texts[1])
    elif name in known:
        attribute = known[name]
    else:
        what = unknown(f"attribute of {base.name}", name, sorted(known))
        raise ConfigError(f"{what}; for your own give --source-text and --target-text")
    file_name = Path(public(checkpoint)).name
    named = re.search(r"_t(\d{3})(?!\d)", file_name)
    step = return_step if return_step is not None else int(named[1]) if named else attribute.return_step
    if step is None:
        raise ConfigError(f"the file name {file_name} does not tell the return step, as pixar_t601.pth would; give --return-step")
    recipe = replace(base.recipe, return_step=step)
    if problems := recipe.problems(schedule_length(base.weights)):
        raise ConfigError(*problems)
    return Card(
        attribute=name,
        domain=base.name,
        domain_fingerprint=fingerprint(base.weights),
        source=attribute.source,
        target=attribute.target,
        recipe=recipe.to_dict(),
        tuning={"imported": file_name},
        images=0,  # how many it was tuned on is not in the file
        steps=0,
        versions=versions(),
    )
