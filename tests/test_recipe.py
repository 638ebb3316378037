"""What would be lost: an impossible number is named before anything runs, and a latent says by which numbers it was made."""

from dataclasses import fields, replace
from typing import Any

import pytest

from models.diffusion import linear_alpha_bars
from models.recipe import PAPER, Recipe, Tuning

ALPHA_BARS = linear_alpha_bars()


def test_the_default_and_the_papers_recipe_are_possible() -> None:
    assert Recipe().problems() == []
    assert PAPER.problems() == []
    assert PAPER.calls_up + PAPER.calls_down == 239


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"return_step": -5}, "the return step must lie between 1 and 999; got -5"),
        ({"return_step": 1000}, "the return step must lie between 1 and 999; got 1000"),
        ({"steps_up": 1}, r"steps up must lie between 2 and 401 \(return step \+ 1\); got 1"),
        ({"steps_down": 402}, r"steps down must lie between 2 and 401 \(return step \+ 1\); got 402"),
        ({"solver": "euler"}, "solver is one of ddim, ab2; got 'euler'"),
        ({"spacing": "log"}, "spacing is one of linspace, sigma; got 'log'"),
        ({"precision": "int8"}, "precision is one of float32, tf32, bfloat16, float16; got 'int8'"),
        ({"eta": 1.5, "solver": "ddim"}, r"eta must lie between 0 \(deterministic\) and 1 \(DDPM\); got 1.5"),
        ({"trim": 1.0}, r"trim must lie between 0 \(every change stays\) and 1; got 1.0"),
        ({"inversion": "exact"}, "inversion is one of deterministic, stochastic; got 'exact'"),
        ({"projections": -1}, "projections must not be negative; got -1"),
        ({"projections": 1, "projection_step": 1000}, "the projection step must lie between 1 and 999; got 1000"),
        ({"projections": 1, "projection_steps": 1}, "projection steps must lie between 2 and 501; got 1"),
        ({"class_label": -1}, "the class label must not be negative; got -1"),
    ],
)
def test_an_impossible_number_is_named_with_what_is_possible(changed: dict[str, Any], message: str) -> None:
    (problem,) = Recipe(**changed).problems()
    assert pytest.raises(ValueError, match=message).matches(ValueError(problem))


def test_all_impossible_numbers_are_named_at_once() -> None:
    assert len(Recipe(return_step=-1, steps_up=0, steps_down=0, solver="", spacing="", precision="").problems()) == 6


def test_a_wrong_return_step_is_not_blamed_on_the_steps() -> None:
    assert Recipe(return_step=0, steps_up=20).problems() == ["the return step must lie between 1 and 999; got 0"]


def test_a_shorter_schedule_lowers_the_highest_return_step() -> None:
    assert Recipe(return_step=400).problems(timesteps=400) == ["the return step must lie between 1 and 399; got 400"]


@pytest.mark.parametrize("spacing", ["sigma", "linspace"])
@pytest.mark.parametrize("return_step", [1, 2, 10, 400, 999])
def test_every_recipe_without_problems_can_be_walked_at_the_price_it_says(spacing: str, return_step: int) -> None:
    for steps in {2, min(20, return_step + 1), return_step + 1}:
        recipe = Recipe(return_step=return_step, steps_up=steps, steps_down=steps, spacing=spacing)
        assert recipe.problems() == []
        assert len(recipe.up(ALPHA_BARS)) - 1 == recipe.calls_up
        assert len(recipe.down(ALPHA_BARS)) - 1 == recipe.calls_down
        projected = replace(recipe, projections=3, projection_step=return_step, projection_steps=steps)
        assert projected.calls_up - recipe.calls_up == 3 * (len(projected.projection(ALPHA_BARS)) - 1)


def test_the_solver_decides_the_order() -> None:
    assert (Recipe(solver="ddim").order, Recipe(solver="ab2").order) == (1, 2)


def test_a_recipe_survives_being_written_down() -> None:
    recipe = Recipe(return_step=321, steps_up=7, solver="ddim", spacing="linspace", precision="bfloat16")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert set(recipe.to_dict()) == {f.name for f in fields(Recipe)}


def test_a_misspelt_part_of_a_recipe_is_no_silent_default() -> None:
    with pytest.raises(ValueError, match="retrun_step is no part of a recipe; it has return_step"):
        Recipe.from_dict({"retrun_step": 5})


def test_latents_are_told_apart_by_where_they_lie_and_not_by_how_they_will_be_used() -> None:
    other_way_down = Recipe(steps_down=5, precision="float16", solver="ddim", spacing="linspace", eta=0.5, seed=3, trim=0.5)
    assert other_way_down.of_latent() == Recipe().of_latent()
    for other in (
        Recipe(return_step=401),
        Recipe(steps_up=21),
        Recipe(class_label=3),
        Recipe(inversion="stochastic"),
        Recipe(projections=1),
    ):
        assert other.of_latent() != Recipe().of_latent()


def test_how_images_are_projected_makes_a_latent_only_where_they_are() -> None:
    assert Recipe(projection_step=300).of_latent() == Recipe().of_latent()
    made = {tuple(Recipe(projections=2, **other).of_latent().values()) for other in ({}, {"projection_steps": 7}, {"projection_step": 300})}
    assert len(made) == 3


def test_a_seed_decides_something_where_fresh_noise_enters() -> None:
    assert not Recipe().has_noise
    assert all(Recipe(**noise).has_noise for noise in ({"eta": 0.1}, {"projections": 1}, {"inversion": "stochastic"}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"steps_down": 1}, "steps down must be at least 2; got 1"),
        ({"images": 0}, "images must be at least 1; got 0"),
        ({"learning_rate": 0.0}, "the learning rate must lie between 0 and 1; got 0.0"),
        ({"learning_rate": float("nan")}, "the learning rate must lie between 0 and 1; got nan"),
        ({"clip_weight": -1.0}, "loss weights must not be negative nor all 0; got clip -1.0, l1 1.0, id 0.0, choice 0.0"),
        ({"clip_weight": 0.0, "l1_weight": 0.0}, "loss weights must not be negative nor all 0; got clip 0.0, l1 0.0, id 0.0, choice 0.0"),
        ({"l1_weight": float("nan")}, "loss weights must not be negative nor all 0; got clip 3.0, l1 nan, id 0.0, choice 0.0"),
        ({"choice_weight": -0.1}, "loss weights must not be negative nor all 0; got clip 3.0, l1 1.0, id 0.0, choice -0.1"),
        ({"choice_lead": 3.0}, "the lead of the choice must lie between 0 and 2; got 3.0"),
        ({"warmup": -1}, "warmup must be at least 0; got -1"),
        ({"form": "l2"}, "form is one of log, cosine; got 'l2'"),
        ({"reference": "target"}, "reference is one of source, reconstruction; got 'target'"),
        ({"memory": "little"}, "memory is one of full, checkpoint, stepwise; got 'little'"),
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"learning_rate_growth": 0.0}, "the growth of the learning rate must lie between 0 and 10 (1 = constant); got 0.0"),
        ({"rank": 0}, "the rank of low-rank weights must lie between 1 and 256; got 0"),
        ({"ema": 1.0}, "the decay of the moving average must lie between 0 and 1; got 1.0"),
        ({"patience": 2}, "stopping early needs images to measure it on: give held_out as well"),
        ({"stop_at": 0.3}, "stopping early needs images to measure it on: give held_out as well"),
    ],
)
def test_an_impossible_tuning_is_named(changed: dict[str, Any], message: str) -> None:
    assert Tuning().problems() == []
    assert Tuning(**changed).problems() == [message]
