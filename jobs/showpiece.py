"""The figures of a domain whose truth is known: what ``diffusionclip evaluate`` without folders measures and prints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from models.domains import Domain

RETURN_STEPS = (200, 400, 600)
"""Of the round trips."""
SAMPLE_STEPS = 200
MIXES = (("glasses", "smiling"), ("hat", "smiling"), ("glasses", "red_hair"))
EDIT_COLUMNS = ("images", "success", "kept", "outside", "to_counterfactual", "source_to_counterfactual", "scoring_clip_direction")


def domain_figures(domain: Domain, rows: int, each: int, sweep_rows: int, samples: int) -> dict[str, Any]:
    """Everything about a domain that can be measured with its held-out images. Raises ConfigError if it has none."""
    from pipeline.config import ConfigError
    from pipeline.quality import held_out_ids, held_out_pictures
    from pipeline.truth import Latents

    if domain.held_out is None or domain.counterfactuals is None or domain.judge is None:
        raise ConfigError(f"domain {domain.name} has no held-out images with known factors; give folders with edits")
    ids, (pictures, truth) = held_out_ids(domain)[:rows], held_out_pictures(domain)
    pictures, truth = pictures[:rows], truth[:rows]
    trip, trips = round_trips(domain, pictures, each)
    return {
        "domain": domain.name,
        "weights": fingerprints(domain),
        "recipe": domain.recipe.to_dict(),
        "held_out_images": len(pictures),
        "round_trip": trips,
        **readings(domain, pictures, trip.back, truth),
        "samples": sample_figures(domain, samples),
        **edit_figures(domain, Latents(ids=ids, x0=pictures, latents=trip.latents), each, sweep_rows),
    }


def fingerprints(domain: Domain) -> dict[str, Any]:
    """16 hex digits of every network that has a part in the figures, so that they can be told from those of other weights."""
    from jobs.requests import edit_models
    from models.clip import clip_fingerprint
    from models.weights import fingerprint

    return {
        "base model": fingerprint(domain.weights),
        "clip": clip_fingerprint(domain.clip),
        "scoring clip": clip_fingerprint(domain.scoring_clip) if domain.scoring_clip else None,
        "judge": fingerprint(domain.judge) if domain.judge else None,
        "edit models": {name: fingerprint(file) for name, file in edit_models(domain, []).items()},
    }


@contextmanager
def shown(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A display that is told how many images more are done."""
    from jobs.progress import display

    with display(name, total, "images") as bar:
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            bar.update(done)

        yield add


def round_trips(domain: Domain, pictures: Any, each: int) -> tuple[Any, dict[str, Any]]:
    """The round trip of all pictures with the domain's recipe, and the errors of that and of other return steps."""
    from dataclasses import replace

    from jobs.progress import display
    from pipeline.quality import round_trip

    errors, images, own = {}, {}, None
    for step in sorted({*RETURN_STEPS, domain.recipe.return_step}):
        is_own = step == domain.recipe.return_step
        at, some = replace(domain, recipe=replace(domain.recipe, return_step=step)), pictures if is_own else pictures[:each]
        with display(f"round trip at {step}", len(some), "images") as bar:
            trip = round_trip(at, some, partial(told, bar))
        errors[str(step)], images[str(step)] = trip.error, len(some)
        own = trip if is_own else own
    return own, {"errors": errors, "images": images, "model_calls": domain.recipe.calls_up + domain.recipe.calls_down}


def told(bar: Any, done: int, mean: float) -> None:
    bar.update(done, f"mean error {mean:.5f}")


def readings(domain: Domain, pictures: Any, back: Any, truth: Any) -> dict[str, Any]:
    """The CLIPs' zero-shot accuracy in every wording, the judge's accuracy on renders and on reconstructions."""
    from models.pixelface.avatars import WORDINGS
    from pipeline.quality import judge_accuracy, zero_shot_accuracy

    clips = {name: clip for name, clip in (("loss", domain.clip), ("scoring", domain.scoring_clip)) if clip is not None}
    return {
        "zero_shot": {name: {w: zero_shot_accuracy(clip, pictures, truth, w) for w in WORDINGS} for name, clip in clips.items()},
        "judge": judge_accuracy(domain, pictures, truth),
        "judge_on_reconstructions": judge_accuracy(domain, back, truth),
    }


def sample_figures(domain: Domain, count: int) -> dict[str, Any]:
    from jobs.progress import display
    from pipeline.quality import recognised, sample

    with display("pictures from noise", count, "images") as bar:
        pictures = sample(domain, count, SAMPLE_STEPS, bar.update)
    return {"images": count, "steps": SAMPLE_STEPS, "recognised": int(recognised(domain, pictures).sum())}


def edit_figures(domain: Domain, found: Any, each: int, sweep_rows: int) -> dict[str, Any]:
    """Every ready-made edit on held-out images that lack it, ``each`` at most; its degrees; two at once."""
    from jobs.requests import edit_models
    from models.attributes import attributes_of
    from pipeline import truth
    from pipeline.summary import spread

    files, known = edit_models(domain, []), attributes_of(domain.family)
    edits, sweeps = [], []
    for name, file in files.items():
        rows, targets = truth.targets(domain, name, found.ids)
        some = spread(len(rows), each)
        lacking, targets = [rows[i] for i in some], targets[some]
        with shown(name, len(lacking) + len(truth.DEGREES) * min(sweep_rows, len(lacking))) as add:
            source, latents, few = found.x0[lacking], found.latents[lacking], slice(sweep_rows)
            after = truth.edited(domain, [file], 1.0, source, latents, add)
            edits.append(truth.edit_scores(domain, known[name], source, after, targets))
            sweeps.append(truth.sweep(domain, known[name], file, source[few], latents[few], add))
    mixes = []
    for names in MIXES:
        if not files.keys() >= set(names):
            continue
        lacking_all = sorted(set.intersection(*(set(truth.targets(domain, n, found.ids)[0]) for n in names)))[: 2 * sweep_rows]
        with shown(" and ".join(names), len(lacking_all)) as add:
            mixes.append(truth.mix(domain, {n: files[n] for n in names}, found, lacking_all, add))
    return {"edits": [rounded(e) for e in edits], "sweeps": [rounded(s) for s in sweeps], "mixes": [rounded(m) for m in mixes]}


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: round(v, 5) if isinstance(v, float) else [round(x, 4) for x in v] if k == "mean_probability" else v for k, v in values.items()
    }


def say_base(figures: dict[str, Any]) -> None:
    from jobs.progress import console
    from jobs.tables import count_table

    trip, made = figures["round_trip"], figures["samples"]
    lines = [(f"round-trip error at {step}, {trip['images'][step]} images", f"{error:.5f}") for step, error in trip["errors"].items()]
    lines.append((f"pictures from noise that the judge is sure of, of {made['images']}", str(made["recognised"])))
    for clip, wordings in figures["zero_shot"].items():
        lines += [(f"{clip} CLIP zero-shot, {w}: least is {least(v)[0]}", f"{least(v)[1]:.3f}") for w, v in wordings.items()]
    for where, name in (("renders", "judge"), ("reconstructions", "judge_on_reconstructions")):
        lines.append((f"judge on {where}: least is {least(figures[name])[0]}", f"{least(figures[name])[1]:.3f}"))
    console.print(count_table("figure", lines))


def least(values: dict[str, float]) -> tuple[str, float]:
    return min(values.items(), key=lambda item: item[1])


def say_edits(figures: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from jobs.progress import console
    from jobs.tables import count_table, number

    table = Table("edit", *(c.replace("_", " ") for c in EDIT_COLUMNS), "monotone", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    monotone = {s["attribute"]: s["monotone"] for s in figures["sweeps"]}
    for e in figures["edits"]:
        table.add_row(e["attribute"], str(e["images"]), *(number(e.get(c)) for c in EDIT_COLUMNS[1:]), number(monotone[e["attribute"]]))
    console.print(table)
    lines = [
        (f"{' and '.join(m['attributes'])}, {m['images']} images", f"both {m['success']:.3f}, kept {m['kept']:.3f}")
        for m in figures["mixes"]
    ]
    if lines:
        console.print(count_table("two at once", lines))
