"""What would be lost: distances to the exact counterfactual, where an edit changed what it should not, degrees and mixes."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TinyDomain, TinyEdit
from safetensors.torch import save_file

from jobs.evaluate import overall
from jobs.showpiece import domain_figures, fingerprints
from models.attributes import attributes_of
from models.diffusion import walk
from models.domains import DOMAINS, Domain
from models.pixelface.avatars import FACTORS
from models.pixelface.judge import Judge, load_judge
from models.unet import load_alpha_bars, load_base
from pipeline import codec, schema, truth
from pipeline.quality import held_out_ids, held_out_pictures, round_trip

GLASSES = attributes_of("pixelface")["glasses"]


@pytest.fixture
def domain(tiny_domain: TinyDomain, tiny_edit: TinyEdit, tmp_path: Path) -> Domain:
    """A domain with a random judge, five held-out pictures of noise, and two edit models with three counterfactuals each."""
    rng = np.random.default_rng(0)

    def pictures(count: int) -> pa.Array:
        data = [codec.encode_png(rng.integers(0, 256, (3, 32, 32), np.uint8)) for _ in range(count)]
        return pa.array([{"bytes": d, "path": None} for d in data], schema.IMAGE)

    factors = [{name: str(rng.choice(values)) for name, values in FACTORS.items()} for _ in range(5)]
    held_out = pa.table({"id": list("abcde"), "image": pictures(5), "factors": pa.array(factors)})
    pq.write_table(held_out, tmp_path / "held_out.parquet")
    others = {"id": list("bdeabd"), "attribute": ["glasses"] * 3 + ["smiling"] * 3, "image": pictures(6)}
    pq.write_table(pa.table(others), tmp_path / "counterfactuals.parquet")
    save_file(Judge().state_dict(), tmp_path / "judge.safetensors")
    files = {name: tmp_path / f"{name}.parquet" for name in ("held_out", "counterfactuals")}
    made = tiny_domain(32, family="pixelface", judge=tmp_path / "judge.safetensors", edits=str(tmp_path / "edits"), **files)
    made = replace(made, scoring_clip=made.clip)
    for name in ("glasses", "smiling"):
        tiny_edit(made, name)
    return made


def test_the_counterfactual_itself_is_the_perfect_edit_and_a_tint_is_not(domain: Domain) -> None:
    source = held_out_pictures(domain)[0][:2] / 2
    target = source.clone()
    target[:, :, 4:12, 4:12] *= -1
    perfect = truth.edit_scores(domain, GLASSES, source, target, target)
    assert perfect["outside"] == perfect["to_counterfactual"] == 0
    assert perfect["source_to_counterfactual"] == pytest.approx(perfect["mae"]) != 0
    tint = truth.edit_scores(domain, GLASSES, source, target + 0.1, target)
    assert tint["outside"] == pytest.approx(0.05, rel=1e-4)
    assert tint["to_counterfactual"] == pytest.approx(0.05, rel=1e-4)


def test_counterfactuals_come_with_the_places_of_their_images_and_others_are_left_out(domain: Domain) -> None:
    rows, pictures = truth.targets(domain, "glasses", ["d", "x", "b"])
    assert (rows, pictures.shape) == ([2, 0], (2, 3, 32, 32))


def test_a_sweep_is_monotone_where_the_probability_never_falls_by_more_than_the_slack() -> None:
    columns = [[0.1, 0.5, 0.9], [0.1, 0.9, 0.895], [0.1, 0.9, 0.5], [0.5, 0.1, 0.9]]
    assert truth.monotone(torch.tensor(columns).T) == 0.5


def test_degree_zero_reconstructs_and_a_mix_adds_what_each_model_changes(domain: Domain) -> None:
    base, alpha_bars, recipe = load_base(domain.weights), load_alpha_bars(domain.weights), domain.recipe
    x0 = held_out_pictures(domain)[0][:2]
    latents = round_trip(domain, x0, lambda *_: None).latents
    files = [f"{domain.edits}/{name}.safetensors" for name in ("glasses", "smiling")]
    with torch.no_grad():
        plain = walk(base, latents, recipe.down(alpha_bars), alpha_bars, recipe.order).clamp(-1, 1)
    assert torch.equal(truth.edited(domain, files[:1], 0.0, x0, latents, lambda _: None), plain)
    once, twice = (truth.edited(domain, files[:1] * n, d, x0, latents, lambda _: None) for n, d in ((1, 1.0), (2, 0.5)))
    assert torch.allclose(once, twice, atol=1e-4)
    assert not torch.allclose(once, plain, atol=1e-2)


def test_the_figures_of_a_domain_cover_every_edit_degree_and_mix(domain: Domain) -> None:
    figures = domain_figures(domain, rows=4, each=3, sweep_rows=2, samples=3)
    assert [(e["attribute"], e["images"]) for e in figures["edits"]] == [("glasses", 2), ("smiling", 3)]  # e is beyond the rows
    assert [(s["attribute"], s["images"], len(s["mean_probability"])) for s in figures["sweeps"]] == [("glasses", 2, 3), ("smiling", 2, 3)]
    assert [(m["attributes"], m["images"]) for m in figures["mixes"]] == [(["glasses", "smiling"], 2)]
    assert figures["round_trip"]["errors"].keys() == {"200", "300", "400", "600"}  # 300 is its own
    assert figures["samples"]["images"] == 3
    assert overall(figures["edits"])["least_success"] == min(e["success"] for e in figures["edits"])


def test_committed_figures_are_of_the_shipped_weights() -> None:
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "pixelface.json"
    assert json.loads(results.read_text())["weights"] == fingerprints(DOMAINS["pixelface"])


def test_every_shipped_edit_is_of_one_recipe_the_domains_own() -> None:
    pixelface = DOMAINS["pixelface"]
    for name, attribute in attributes_of("pixelface").items():
        card = json.loads(Path(f"{pixelface.edits}/{name}.json").read_text())
        assert (card["recipe"], card["tuning"]) == (pixelface.recipe.to_dict(), asdict(pixelface.tuning)), name
        assert (card["source"], card["target"]) == (attribute.source, attribute.target)


def test_shipped_counterfactuals_are_what_the_judge_takes_them_for() -> None:
    pixelface = DOMAINS["pixelface"]
    assert pixelface.judge is not None
    ids = [f"avatar-{row:04d}" for row in range(64)]
    known = held_out_pictures(pixelface)[1]
    for name, attribute in attributes_of("pixelface").items():
        assert attribute.changes is not None
        factor, value = attribute.changes
        rows, pictures = truth.targets(pixelface, name, ids)
        assert rows == [row for row in range(64) if known[row][factor] != value]
        wanted = [{**known[row], factor: value} for row in rows]
        read = load_judge(pixelface.judge).read(pictures)
        assert np.mean([r == w for r, w in zip(read, wanted, strict=True)]) > 0.95, name


def test_every_change_can_be_seen_in_every_shipped_picture() -> None:
    pixelface = DOMAINS["pixelface"]
    source = held_out_pictures(pixelface)[0]
    for name in attributes_of("pixelface"):
        rows, pictures = truth.targets(pixelface, name, held_out_ids(pixelface))
        region = truth.own_region(source[rows], pictures)
        change = ((source[rows] - pictures).abs().mean(1, keepdim=True) * region).sum((1, 2, 3)) / region.sum((1, 2, 3))
        assert change.min() > 2 * 10 / 255, name
