"""What would be lost: one row out for each row in, the same pixels in any company, and rejects that keep their reason."""

import gc
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import TinyDomain, TinyEdit
from PIL import Image
from safetensors.torch import save_file
from tiny import picture

from models.clip import load_clip
from models.diffusion import project, walk
from models.domains import Domain
from models.pixelface.avatars import FACTORS
from models.pixelface.judge import Judge
from models.recipe import Recipe
from models.trim import trimmed
from models.unet import NoiseUNet, load_alpha_bars, load_base, load_edit_model
from pipeline import codec, schema
from pipeline.codec import decode_column
from pipeline.config import Edit, Resources
from pipeline.scoring import Score, mix_direction
from pipeline.stages import Apply, Invert, row_noise

RESOURCES = Resources(batch=4)
BAD = b"no picture at all"


def png(seed: int, side: int = 16) -> bytes:
    out = io.BytesIO()
    picture(seed, side).save(out, "PNG")
    return out.getvalue()


def images(*data: bytes | None) -> pa.Table:
    rows = [{"bytes": d, "path": None} for d in data]
    names = pa.array([f"row {i}" for i in range(len(data))])
    return pa.table({"id": names, "image": pa.array(rows, schema.IMAGE), "caption": names})


@pytest.fixture(scope="module")
def domain(tiny_domain: TinyDomain) -> Domain:
    return tiny_domain(16)


@pytest.fixture(scope="module")
def invert(domain: Domain) -> Invert:
    return Invert(domain, domain.recipe, RESOURCES)


def networks() -> int:
    """How many are in memory."""
    gc.collect()
    return sum(isinstance(thing, NoiseUNet) for thing in gc.get_objects())


def test_all_degrees_and_mixes_of_an_edit_model_share_one_network(domain: Domain, tiny_edit: TinyEdit) -> None:
    load_base(domain.weights)
    hat, beard = tiny_edit(domain, "hat", 0.5), tiny_edit(domain, "beard", 0.5)
    before = networks()
    edits = [Edit(parts=(hat,), degree=degree) for degree in (0.5, 1.0, 1.5)] + [Edit(parts=(hat, beard))]
    stages = [Apply(domain, domain.recipe, edit, RESOURCES) for edit in edits]
    assert networks() == before + 2
    del stages
    assert networks() == before


def apply(domain: Domain, edit: Edit, table: pa.Table, recipe: Recipe | None = None) -> pa.Table:
    return Apply(domain, recipe or domain.recipe, edit, RESOURCES)(table)


def pixels(table: pa.Table, column: str = "edited") -> list[np.ndarray | None]:
    return decode_column(table[column], 16, schema.MAX_PIXELS)[0]


def equal(a: Sequence[np.ndarray | None], b: Sequence[np.ndarray | None]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


def stages(domain: Domain, invert: Invert, edit: Edit, table: pa.Table) -> pa.Table:
    return Score(domain, edit, RESOURCES, domain.clip)(apply(domain, edit, invert(table)))


# ---- rows and rejects ------------------------------------------------------------------------------------------------


def test_every_row_comes_out_of_every_stage_with_its_columns_and_its_reason(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    table = images(png(0), None, b"", BAD, png(1), png(2)[:80], png(3))
    edit = Edit(parts=(tiny_edit(domain, "smiling"),))
    done = stages(domain, invert, edit, table)
    assert done["id"].to_pylist() == table["id"].to_pylist()
    assert done["caption"].to_pylist() == table["caption"].to_pylist()
    assert done["image"].to_pylist() == table["image"].to_pylist()
    errors = done["error"].to_pylist()
    assert [i for i, error in enumerate(errors) if error is None] == [0, 4, 6]
    assert errors[1:4] == ["the image is null", "the image has no bytes", f"not an image in one of the formats {', '.join(codec.FORMATS)}"]
    for column in ("edited", "mae", "ssim", "clip_direction"):
        assert [v is None for v in done[column].to_pylist()] == [error is not None for error in errors], column
    assert set(done["attribute"].to_pylist()) == {"smiling"}
    assert set(done["degree"].to_pylist()) == {1.0}


def test_the_stages_fill_the_tables_that_the_schema_promises(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    user = pa.schema([("caption", pa.string())])
    latents = invert(images(png(0), BAD))
    columns = schema.latents_schema(user, 16, {})
    assert latents.select(columns.names).cast(columns).schema.equals(columns)
    done = stages(domain, invert, Edit(parts=(tiny_edit(domain, "smiling"),)), images(png(0), BAD))
    columns = schema.edits_schema(user, (), {})
    assert done.select(columns.names).cast(columns).schema.equals(columns)


def test_a_table_of_nothing_but_rejects_goes_through(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    done = stages(domain, invert, Edit(parts=(tiny_edit(domain, "smiling"),)), images(BAD, None))
    assert done["edited"].to_pylist() == [None, None]
    assert None not in done["error"].to_pylist()


def test_the_limit_of_pixels_is_that_of_the_run(domain: Domain) -> None:
    done = Invert(domain, domain.recipe, Resources(max_pixels=300))(images(png(0), png(1, side=18)))
    assert done["error"].to_pylist() == [None, "the image has 18x18 pixels; at most 300 are decoded"]


def test_a_fault_of_the_model_is_no_reject(domain: Domain) -> None:
    stage = Invert(domain, domain.recipe, RESOURCES)

    def broken(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    stage.model = broken  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="out of memory"):
        stage(images(png(0)))


# ---- the same pixels in any company ----------------------------------------------------------------------------------


@pytest.mark.parametrize("company", [[], [BAD] * 3, [7, 8, 9], [BAD, 7, None, 8, 9, 10, 11, b""]], ids=["alone", "bad", "good", "mixed"])
def test_a_row_is_edited_bit_for_bit_alike_in_any_company(
    domain: Domain, invert: Invert, tiny_edit: TinyEdit, company: list[int | bytes | None]
) -> None:
    edit = Edit(parts=(tiny_edit(domain, "smiling"),), degree=0.7)
    others = [png(c) if isinstance(c, int) else c for c in company]
    places = [len(others), 2 * len(others) + 1]
    crowd = images(*others, png(0), *others, png(1), *others)
    alone = crowd.take(places)  # with their ids, which fresh noise belongs to
    noisy = replace(domain.recipe, solver="ddim", eta=0.5, projections=2, projection_steps=3)
    for recipe in (domain.recipe, noisy):
        up = Invert(domain, recipe, RESOURCES)
        latents, reference = up(crowd), up(alone)
        assert latents["latent"].take(places).to_pylist() == reference["latent"].to_pylist()
        assert equal(pixels(apply(domain, edit, latents, recipe).take(places)), pixels(apply(domain, edit, reference, recipe)))


def test_rows_of_a_slice_of_a_table_are_those_rows(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    latents = invert(images(*(png(i) for i in range(6))))
    edit = Edit(parts=(tiny_edit(domain, "smiling"),))
    whole, part = apply(domain, edit, latents), apply(domain, edit, latents.slice(2, 3))
    assert equal(pixels(part), pixels(whole)[2:5])
    assert part["id"].to_pylist() == ["row 2", "row 3", "row 4"]


# ---- latents and edits are the walk's --------------------------------------------------------------------------------


def test_latents_are_the_base_models_walk_up(domain: Domain, invert: Invert) -> None:
    bars, recipe = load_alpha_bars(domain.weights), domain.recipe
    x0 = codec.to_tensor([p for p in pixels(images(png(0), png(1)), "image") if p is not None])
    want = walk(load_base(domain.weights), x0, recipe.up(bars), bars, recipe.order)
    got = codec.latents_from_arrow(invert(images(png(0), png(1)))["latent"], 16)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def walked(domain: Domain, latents: pa.Table, noise: Any, recipe: Recipe | None = None) -> list[np.ndarray]:
    recipe = recipe or domain.recipe
    bars, x = load_alpha_bars(domain.weights), codec.latents_from_arrow(latents["latent"], 16)
    with torch.no_grad():
        return codec.to_pictures(walk(noise, x, recipe.down(bars), bars, recipe.order))


def close(a: Sequence[np.ndarray | None], b: Sequence[np.ndarray | None]) -> bool:
    return all(np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1 for x, y in zip(a, b, strict=True))


FOUR = [png(i) for i in range(4)]


def test_degree_zero_and_no_attribute_are_the_base_models_walk_down(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    latents = invert(images(*FOUR))
    want = walked(domain, latents, load_base(domain.weights))
    nothing, none = Edit(parts=(tiny_edit(domain, "smiling"),), degree=0.0), Edit()
    assert equal(pixels(apply(domain, nothing, latents)), want)
    assert equal(pixels(apply(domain, none, latents)), want)
    assert set(apply(domain, none, latents)["attribute"].to_pylist()) == {"none"}


def test_degree_one_is_the_edit_models_walk_and_never_asks_the_base(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    latents, part = invert(images(*FOUR)), tiny_edit(domain, "smiling")
    got = pixels(apply(domain, Edit(parts=(part,)), latents))
    assert equal(got, walked(domain, latents, load_edit_model(domain.weights, part.file)))
    assert not close(got, walked(domain, latents, load_base(domain.weights)))


def test_an_edit_is_trimmed_beside_its_source_and_a_mix_a_reconstruction_or_a_projection_is_not(
    domain: Domain, invert: Invert, tiny_edit: TinyEdit
) -> None:
    latents, part, trim = invert(images(png(0), BAD, png(1))), tiny_edit(domain, "smiling"), replace(domain.recipe, trim=0.9)
    edit = Edit(parts=(part,))
    plain, got = apply(domain, edit, latents), apply(domain, edit, latents, trim)
    sources, before, after = (
        codec.to_tensor([p for p in pixels(t, column) if p is not None])
        for t, column in ((latents, "image"), (plain, "edited"), (got, "edited"))
    )
    assert torch.allclose(after, trimmed(before, sources, 0.9), atol=2 / 127)
    assert (after == sources).float().mean() > 0.1 > (before == sources).float().mean()
    mix = Edit(parts=(replace(part, weight=0.5), tiny_edit(domain, "hat", 0.5)))
    for other in (Edit(), replace(edit, degree=0.0), mix):
        assert equal(pixels(apply(domain, other, latents, trim)), pixels(apply(domain, other, latents)))
    assert equal(pixels(apply(domain, edit, latents, replace(trim, projections=1))), pixels(plain))


@pytest.mark.parametrize("degree", [-0.5, 0.5, 1.5])
def test_degrees_in_between_and_beyond_weigh_the_predictions_of_both(
    domain: Domain, invert: Invert, tiny_edit: TinyEdit, degree: float
) -> None:
    latents, part = invert(images(*FOUR)), tiny_edit(domain, "smiling")
    base, tuned = load_base(domain.weights), load_edit_model(domain.weights, part.file)
    got = apply(domain, Edit(parts=(part,), degree=degree), latents)
    assert close(pixels(got), walked(domain, latents, lambda x, t: (1 - degree) * base(x, t) + degree * tuned(x, t)))
    assert set(got["degree"].to_pylist()) == {degree}


def test_a_mix_weighs_its_parts_and_leaves_the_rest_to_the_base(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    latents = invert(images(*FOUR))
    one, other = tiny_edit(domain, "smiling", 0.5), tiny_edit(domain, "hat", 0.25)
    base = load_base(domain.weights)
    first, second = (load_edit_model(domain.weights, part.file) for part in (one, other))
    got = apply(domain, Edit(parts=(one, other), degree=0.8), latents)
    assert close(pixels(got), walked(domain, latents, lambda x, t: 0.4 * base(x, t) + 0.4 * first(x, t) + 0.2 * second(x, t)))
    assert set(got["attribute"].to_pylist()) == {"smiling_and_hat"}


def test_a_mix_by_timesteps_uses_each_model_in_its_range_only(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    latents = invert(images(*FOUR))
    one, other = tiny_edit(domain, "smiling"), tiny_edit(domain, "hat")
    base = load_base(domain.weights)
    first, second = (load_edit_model(domain.weights, part.file) for part in (one, other))
    got = apply(domain, Edit(parts=(one, other), ranges=((0, (0.2, 0.5)), (100, (1.0, 0.0)))), latents)

    def by_hand(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return first(x, t) if int(t[0]) >= 100 else 0.3 * base(x, t) + 0.2 * first(x, t) + 0.5 * second(x, t)

    assert close(pixels(got), walked(domain, latents, by_hand))
    assert not close(pixels(got), walked(domain, latents, first))


def test_fresh_noise_changes_with_the_seed_and_with_the_row_and_with_nothing_else() -> None:
    like = torch.zeros(2, 3, 4, 4)
    noise = row_noise(["a", "b"], like, 0, "down")(3)
    assert torch.equal(noise, row_noise(["b", "a"], like, 0, "down")(3).flip(0))
    others = [row_noise(["a", "b"], like, 1, "down")(3), row_noise(["a", "b"], like, 0, "down")(4), row_noise(["a", "b"], like, 0, "up")(3)]
    assert not any(torch.equal(noise, other) for other in others)
    many = torch.cat([row_noise([str(i)], torch.zeros(1, 3, 16, 16), 0, "down")(0) for i in range(64)])
    assert abs(float(many.mean())) < 0.02
    assert float(many.std()) == pytest.approx(1, abs=0.02)


def test_stochastic_editing_follows_the_seed(domain: Domain, invert: Invert) -> None:
    latents, recipe = invert(images(*FOUR)), replace(domain.recipe, solver="ddim", eta=1.0)
    first, again, other = (pixels(apply(domain, Edit(), latents, replace(recipe, seed=seed))) for seed in (0, 0, 1))
    assert equal(first, again)
    assert not close(first, other)
    assert not close(first, pixels(apply(domain, Edit(), latents, replace(recipe, eta=0.0))))


def test_a_picture_of_an_unseen_domain_is_projected_before_it_is_inverted(domain: Domain) -> None:
    recipe = replace(domain.recipe, projections=2, projection_steps=3)
    bars, table = load_alpha_bars(domain.weights), images(png(0), BAD, png(1))
    x0 = codec.to_tensor([p for p in pixels(table, "image") if p is not None])
    path, base = recipe.projection(bars), load_base(domain.weights)
    landed = project(base, x0, path, bars, 2, row_noise(["row 0", "row 2"], x0, 0, "projection"))
    want = walk(base, landed, recipe.up(bars), bars, recipe.order)
    got = Invert(domain, recipe, RESOURCES)(table)
    latents = codec.latents_from_arrow(got["latent"].take(pa.array([0, 2])), 16)
    torch.testing.assert_close(latents, want, rtol=2e-3, atol=2e-3)


def test_a_stochastic_latent_is_the_noised_image_and_costs_no_model_call(domain: Domain) -> None:
    recipe, table = replace(domain.recipe, inversion="stochastic", seed=5), images(png(0), png(1))
    stage = Invert(domain, recipe, RESOURCES)
    stage.model = None  # type: ignore[assignment]
    x0 = codec.to_tensor([p for p in pixels(table, "image") if p is not None])
    level = float(load_alpha_bars(domain.weights)[recipe.return_step])
    want = level**0.5 * x0 + (1 - level) ** 0.5 * row_noise(["row 0", "row 1"], x0, 5, "inversion")(0)
    torch.testing.assert_close(codec.latents_from_arrow(stage(table)["latent"], 16), want, rtol=2e-3, atol=2e-3)
    assert recipe.calls_up == 0


def test_the_recipe_of_the_edit_decides_the_way_down(domain: Domain, invert: Invert) -> None:
    latents, recipe = invert(images(*FOUR)), Recipe(return_step=300, steps_down=9, solver="ddim", spacing="linspace")
    got = apply(domain, Edit(), latents, recipe)
    assert equal(pixels(got), walked(domain, latents, load_base(domain.weights), recipe))
    assert not equal(pixels(got), pixels(apply(domain, Edit(), latents)))


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_of_the_pictures_in_the_row(domain: Domain, invert: Invert, tiny_edit: TinyEdit) -> None:
    part = tiny_edit(domain, "smiling")
    done = stages(domain, invert, Edit(parts=(part,)), images(*FOUR))
    clip = load_clip(domain.clip)
    direction = torch.nn.functional.normalize(clip.text_features(part.target) - clip.text_features(part.source), dim=0)
    for row in range(4):
        source, edited = (np.asarray(pixels(done, name)[row]) for name in ("image", "edited"))
        assert done["mae"][row].as_py() == pytest.approx(np.abs(source / 255 - edited / 255).mean(), abs=1e-5)
        features = clip.image_features(codec.to_tensor([source, edited]))
        change = features[1] - features[0]
        assert done["clip_direction"][row].as_py() == pytest.approx(float(change @ direction / change.norm()), abs=1e-3)
        assert -1 <= done["ssim"][row].as_py() < 1


def test_an_unchanged_picture_has_perfect_scores(domain: Domain) -> None:
    table = images(*FOUR).append_column("error", pa.nulls(4, pa.string()))
    done = Score(domain, Edit(), RESOURCES)(table.append_column("edited", table["image"]))
    assert done["mae"].to_pylist() == [0.0] * 4
    assert done["ssim"].to_pylist() == pytest.approx([1.0] * 4)
    assert done["clip_direction"].to_pylist() == [None] * 4, "a reconstruction goes nowhere"


def test_a_source_that_cannot_be_read_any_more_becomes_a_reject_of_the_scores(domain: Domain) -> None:
    table = images(BAD, FOUR[0]).append_column("error", pa.nulls(2, pa.string()))
    done = Score(domain, Edit(), RESOURCES)(table.append_column("edited", images(FOUR[0], FOUR[0])["image"]))
    assert done["error"][0].as_py().startswith("not an image")
    assert done["mae"].to_pylist() == [None, 0.0]


def test_the_judge_reads_source_and_edited_where_the_domain_has_one(tiny_domain: TinyDomain, tmp_path: Path) -> None:
    judge = Judge()
    save_file(judge.state_dict(), tmp_path / "judge.safetensors")
    domain = tiny_domain(32, judge=tmp_path / "judge.safetensors")
    edited = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(edited).save(out, "PNG")
    table = images(png(0, 32), BAD).append_column("error", pa.array([None, "bad"], pa.string()))
    done = Score(domain, Edit(), RESOURCES)(table.append_column("edited", images(out.getvalue(), None)["image"]))
    (read,) = judge.eval().read(codec.to_tensor([edited.transpose(2, 0, 1)]))
    assert done["factors_after"].to_pylist() == [read, None]
    assert set(done["factors_before"][0].as_py()) == set(FACTORS)
    columns = schema.edits_schema(pa.schema([]), tuple(FACTORS), {})
    assert done.schema.field("factors_after").type == columns.field("factors_after").type


def test_the_direction_of_a_mix_is_the_weighted_mean_of_its_parts(domain: Domain, tiny_edit: TinyEdit) -> None:
    clip = load_clip(domain.clip)
    one, other = tiny_edit(domain, "smiling", 0.5), tiny_edit(domain, "hat", 0.25)
    before = clip.image_features(codec.to_tensor([np.zeros((3, 16, 16), np.uint8)]))
    first, second = (clip.text_direction(part.source, part.target)(before) for part in (one, other))
    mean = 0.5 * first + 0.25 * second
    torch.testing.assert_close(mix_direction(clip, Edit(parts=(one, other)))(before), mean / mean.norm())


def test_identity_is_scored_where_there_is_a_network_for_it_and_the_column_is_absent_where_not(domain: Domain, face_weights: Path) -> None:
    table = images(png(0), png(1), BAD).append_column("error", pa.array([None, None, "bad"], pa.string()))
    table = table.append_column("edited", images(png(0), png(5), None)["image"])
    done = Score(domain, Edit(), RESOURCES, None, str(face_weights))(table)
    same, other, bad = done["identity"].to_pylist()
    assert (same, bad) == (pytest.approx(1, abs=1e-4), None)
    assert -1 <= other < 0.9999
    assert "identity" not in Score(domain, Edit(), RESOURCES)(table).column_names


def test_without_a_clip_the_other_scores_are_there_all_the_same(domain: Domain, tiny_edit: TinyEdit) -> None:
    table = images(*FOUR).append_column("error", pa.nulls(4, pa.string())).append_column("edited", images(*FOUR)["image"])
    done = Score(domain, Edit(parts=(tiny_edit(domain, "smiling"),)), RESOURCES, None)(table)
    assert done["clip_direction"].to_pylist() == [None] * 4
    assert done["mae"].to_pylist() == [0.0] * 4
