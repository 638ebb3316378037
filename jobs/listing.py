"""``diffusionclip domains`` and ``diffusionclip attributes``: what there is."""

from pathlib import Path

from rich.table import Table

from jobs import options as o
from jobs.progress import console


def domains() -> None:
    """List the domains: base models with what belongs to them."""
    from models.domains import DOMAINS

    table = Table("domain", "size", "return step", "steps up/down", "ready-made edits", "about", "licence")
    for d in DOMAINS.values():
        edits = sorted(f.stem for f in Path(d.edits).glob("*.safetensors")) if d.edits else []
        recipe = d.recipe
        steps = f"{recipe.steps_up}/{recipe.steps_down} {recipe.solver}"
        table.add_row(d.name, f"{d.image_size}x{d.image_size}", str(recipe.return_step), steps, ", ".join(edits), d.about, d.licence)
    console.print(table)


def attributes(domain: o.DomainName = "pixelface") -> None:
    """List the attributes of a domain, and whether an edit model comes ready-made."""
    from jobs.requests import domain_named
    from models.attributes import attributes_of

    chosen = domain_named(domain)
    table = Table("attribute", "source text", "target text", "ready-made")
    for a in attributes_of(domain).values():
        ready = chosen.edits is not None and Path(chosen.edits, f"{a.name}.safetensors").is_file()
        table.add_row(a.name, a.source, a.target, "yes" if ready else "no: diffusionclip finetune")
    console.print(table)
