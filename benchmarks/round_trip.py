"""Round-trip error against model calls, all recipes on the same held-out images in one run.

python -m benchmarks.round_trip --images 64 --out benchmarks/results/round_trip.json
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from jobs.evaluate import machine
from jobs.progress import console, display
from jobs.tables import count_table
from models.domains import DOMAINS
from models.recipe import PAPER, Recipe
from pipeline.quality import held_out_pictures, round_trip

RECIPES = {
    "paper's test recipe (200, 40)": PAPER,
    "official README (40, 40)": replace(PAPER, steps_up=40),
    "fast (40, 6)": replace(PAPER, steps_up=40, steps_down=6),
    **{f"ab2 on the sigma ladder ({n}, {n})": Recipe(steps_up=n, steps_down=n) for n in (10, 15, 20)},
    "ddim on the sigma ladder (20, 20)": Recipe(solver="ddim"),
    "ab2 on the linspace ladder (20, 20)": Recipe(spacing="linspace"),
}


def main(images: int = 64, threads: int = 2, out: Annotated[Path | None, typer.Option()] = None) -> None:
    """Prints error, model calls and seconds of each recipe, and the ratio to the project's default."""
    torch.set_num_threads(threads)
    domain = DOMAINS["pixelface"]
    pictures = held_out_pictures(domain)[0][:images]
    results = []
    with display("round trips", len(RECIPES), "recipes") as shown:
        for name, recipe in RECIPES.items():
            started = time.perf_counter()
            error = round_trip(replace(domain, recipe=recipe), pictures, lambda done, mean: None).error
            calls = recipe.calls_up + recipe.calls_down
            results.append({"recipe": name, "model_calls": calls, "error": error, "seconds": time.perf_counter() - started})
            shown.update(len(results), name)
    reference = next(r for r in results if r["recipe"] == "ab2 on the sigma ladder (20, 20)")
    for r in results:
        r["error_ratio"], r["time_ratio"] = r["error"] / reference["error"], r["seconds"] / reference["seconds"]
    lines = [(f"{r['recipe']}, {r['model_calls']} calls", f"{r['error']:.5f} ({r['error_ratio']:.1f}x)") for r in results]
    console.print(count_table(f"round-trip error of {images} images", lines))
    if out:
        out.write_text(json.dumps({"machine": machine(), "images": images, "return_step": 400, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
