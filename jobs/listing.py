"""``diffusionclip domains`` and ``diffusionclip attributes``: what there is."""

from pathlib import Path

from rich import box
from rich.table import Table

from jobs import options as o
from jobs.progress import console


def domains() -> None:
    """List the domains: base models with what belongs to them."""
    from models.attributes import attributes_of
    from models.domains import DOMAINS

    table = _table("domain", "images", "of a", "return step", "steps", "attributes", "network", "weights")
    details = _table("domain", "about, network, weights, licence")
    for d in DOMAINS.values():
        steps = f"{d.recipe.steps_up} up, {d.recipe.steps_down} down, {d.recipe.solver}"
        network = ", ".join(
            [d.architecture or "UNet2DModel", *["learned variance"] * d.learned_variance, *[f"{d.classes} classes"] * bool(d.classes)]
        )
        size, count = f"{d.image_size}x{d.image_size}", str(len(attributes_of(d.family)))
        table.add_row(d.name, size, d.noun, str(d.recipe.return_step), steps, count, network, _where(d.weights))
        get = "" if d.weights else f"\n         diffusionclip import FILE OUT --domain {d.name}, then --domain OUT"
        noise = f"predicts {d.prediction}, noise of {d.schedule}"
        details.add_row(d.name, f"{d.about}\nnetwork: {noise}\nweights: {d.origin}{get}\nlicence: {d.licence}")
    console.print(table)
    console.print(details)
    console.print("Besides these, --domain takes a diffusers UNet2DModel folder, a hub name, or a file that describes a domain.")


def attributes(domain: o.DomainName = "pixelface") -> None:
    """List the attributes of a domain: their texts, what they were published with, and whether an edit model comes ready-made."""
    from jobs.requests import domain_named
    from models.attributes import attributes_of
    from models.weights import edit_models_in

    chosen = domain_named(domain, need_weights=False)
    ready = edit_models_in(chosen.edits) if chosen.edits else {}
    table = _table(
        "attribute", "source text", "target text", "return\nstep", "learning\nrate", "ready-\nmade", "published edit model, notes"
    )
    for a in attributes_of(chosen.family).values():
        step = "" if a.return_step is None else str(a.return_step)
        rate = "" if a.learning_rate is None else f"{a.learning_rate:g}"
        table.add_row(a.name, a.source, a.target, step, rate, "yes" if a.name in ready else "", a.note)
    if table.row_count:
        console.print(table)
    else:
        console.print(f"There are no attributes for {chosen.name} in the table.")
    console.print("Others are made with: diffusionclip finetune LATENTS MODELS --name NAME --source-text ... --target-text ...")


def _where(weights: str) -> str:
    if not weights:
        return "import"
    return "here" if Path(weights).is_dir() else "download"


def _table(*names: str) -> Table:
    table = Table(*names, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), show_lines=False)
    for column in table.columns:
        column.overflow = "fold"
    return table
