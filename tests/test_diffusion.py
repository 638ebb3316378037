"""What would be lost: latents and edits that are those of the paper, and errors that shrink as the solver's order says."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny import tiny_unet
from torch import Tensor

from models.diffusion import (
    CLEAN,
    SPACINGS,
    NoiseModel,
    alpha_bar_at,
    blend,
    ladder,
    linear_alpha_bars,
    moves,
    noised,
    path_down,
    path_up,
    predicted_x0,
    project,
    stochastic_walk,
    walk,
)
from models.unet import NoiseUNet

ALPHA_BARS = linear_alpha_bars()


@pytest.fixture(scope="module")
def unet() -> NoiseUNet:
    return NoiseUNet(tiny_unet(16)).requires_grad_(False).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A cheap noise model, different at every timestep and in every channel, that remembers when it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == (len(x),)
        self.asked.append(int(t[0]))
        return torch.tanh(x + t.view(-1, 1, 1, 1) / 300) + 0.1 * x.flip(1)


def gaussian(alpha_bars: Tensor, s: float) -> NoiseModel:
    """The exact noise prediction where every pixel of the clean image is drawn from N(0, s^2)."""
    table = alpha_bars.double()

    def model(x: Tensor, t: Tensor) -> Tensor:
        level = table[t].view(-1, 1, 1, 1)
        return ((1 - level).sqrt() * x / (level * s**2 + 1 - level)).to(x.dtype)

    return model


def gaussian_at(x0: Tensor, level: float, s: float) -> Tensor:
    """Where the exact deterministic process of that model takes a clean image: x / sqrt(variance) does not change."""
    return x0 * (level * s**2 + 1 - level) ** 0.5 / s


# ---- ladders ---------------------------------------------------------------------------------------------------------


def ladder_requests() -> Iterator[tuple[int, int]]:
    for top in (*range(1, 30), 47, 99, 100, 301, 399, 400, 401, 500, 600, 998, 999):
        for steps in {2, 3, 6, 7, 20, 40, 41, 200, top // 2, top, top + 1}:
            if 2 <= steps <= top + 1:
                yield top, steps


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_ladder_climbs_from_zero_to_the_return_step_in_just_as_many_rungs_as_asked(spacing: str) -> None:
    for top, steps in ladder_requests():
        rungs = ladder(top, steps, spacing, ALPHA_BARS)
        assert (rungs[0], rungs[-1], len(rungs)) == (0, top, steps)
        assert all(low < high for low, high in pairwise(rungs)), (top, steps)


def official_grid(top: int, steps: int) -> list[int]:
    return [int(v) for v in np.linspace(0, 1, steps) * top]


def test_the_linspace_ladder_is_the_official_grid_digit_by_digit() -> None:
    differing = [
        (top, steps)
        for top in range(1, 1000)
        for steps in (2, 3, 6, 7, 8, 10, 13, 20, 40, 200)
        if steps <= top and ladder(top, steps, "linspace", ALPHA_BARS) != official_grid(top, steps)
    ]
    assert differing == [(top, steps) for top, steps in differing if len(set(official_grid(top, steps))) < steps]
    assert {569, 584} < set(ladder(600, 40, "linspace", ALPHA_BARS))  # 570 and 585 but for int()


def test_a_ladder_of_every_timestep_has_no_rung_twice_where_the_official_one_has() -> None:
    assert len(set(official_grid(18, 19))) < 19
    assert ladder(18, 19, "linspace", ALPHA_BARS) == list(range(19))
    assert ladder(18, 19, "sigma", ALPHA_BARS) == list(range(19))


def test_the_sigma_ladder_is_denser_where_there_is_little_noise() -> None:
    rungs = torch.tensor(ladder(600, 12, "sigma", ALPHA_BARS))
    roots = ((1 - ALPHA_BARS[rungs]) / ALPHA_BARS[rungs]).sqrt() ** (1 / 3)
    assert roots.diff().std() / roots.diff().mean() < 0.05
    sigmas = roots**3
    assert (sigmas.diff().diff() > 0).all()


@pytest.mark.parametrize(
    ("top", "steps", "spacing", "message"),
    [
        (0, 2, "sigma", "between 1 and 999; got 0"),
        (1000, 2, "sigma", "between 1 and 999; got 1000"),
        (400, 1, "linspace", "between 2 and 401 rungs; got 1"),
        (10, 12, "sigma", "between 2 and 11 rungs; got 12"),
        (400, 20, "cubic", "one of linspace, sigma; got 'cubic'"),
    ],
)
def test_an_impossible_ladder_is_refused_with_what_is_possible(top: int, steps: int, spacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ladder(top, steps, spacing, ALPHA_BARS)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_paths_join_at_the_return_step_and_end_in_a_clean_image(spacing: str) -> None:
    up, down = path_up(400, 7, spacing, ALPHA_BARS), path_down(400, 7, spacing, ALPHA_BARS)
    assert up[-1] == down[0] == 400
    assert down[-1] == CLEAN
    assert down[:-1] == ladder(400, 7, spacing, ALPHA_BARS)[::-1]
    assert up[0] == (CLEAN if spacing == "sigma" else 0)
    if spacing == "sigma":
        assert up == down[::-1]


@pytest.mark.parametrize(("spacing", "calls_up"), [("linspace", 6), ("sigma", 7)])
@pytest.mark.parametrize("order", [1, 2])
def test_a_walk_costs_no_more_model_calls_than_it_has_steps(spacing: str, calls_up: int, order: int) -> None:
    model = Recorder()
    walk(model, noise(1, 3, 2, 2), path_up(400, 7, spacing, ALPHA_BARS), ALPHA_BARS, order)
    assert len(model.asked) == calls_up
    walk(model, noise(1, 3, 2, 2), path_down(400, 7, spacing, ALPHA_BARS), ALPHA_BARS, order)
    assert len(model.asked) == calls_up + 7


def test_at_the_clean_rung_the_model_is_asked_at_the_lowest_level_it_knows() -> None:
    model = Recorder()
    walk(model, noise(1, 3, 2, 2), [CLEAN, 0, 5], ALPHA_BARS, 1)
    assert model.asked == [0, 0]


# ---- order 1 is DDIM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_clean", [True, False])
def test_a_walk_of_order_one_is_ddim_of_diffusers(unet: NoiseUNet, to_clean: bool) -> None:
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=to_clean)
    scheduler.set_timesteps(50)
    x = noise(2, 3, 16, 16)
    grid = scheduler.timesteps.tolist()
    assert grid == list(range(980, -1, -20))
    got = walk(unet, x, [*grid, CLEAN] if to_clean else grid, ALPHA_BARS, 1)
    for t in grid:
        x = scheduler.step(unet(x, torch.full((2,), t)), t, x, eta=0.0).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def official_step(x: Tensor, t: int, t_next: int, model: NoiseModel) -> Tensor:
    def level(timestep: int) -> Tensor:
        return torch.tensor(1.0) if timestep == -1 else ALPHA_BARS[timestep]

    at, at_next = level(t), level(t_next)
    e = model(x, torch.full((len(x),), t))
    x0_hat = (x - e * (1 - at).sqrt()) / at.sqrt()
    return at_next.sqrt() * x0_hat + (1 - at_next).sqrt() * e


def official_inversion(x: Tensor, top: int, steps: int, model: NoiseModel) -> Tensor:
    sequence = official_grid(top, steps)
    following = [-1, *sequence[:-1]]
    for low, high in zip(following[1:], sequence[1:], strict=True):
        x = official_step(x, low, high, model)
    return x


def official_generation(x: Tensor, top: int, steps: int, model: NoiseModel) -> Tensor:
    sequence = official_grid(top, steps)
    following = [-1, *sequence[:-1]]
    for high, low in zip(reversed(sequence), reversed(following), strict=True):
        x = official_step(x, high, low, model)
    return x


OFFICIAL: dict[str, tuple[Callable[..., Tensor], Callable[..., list[int]]]] = {
    "up": (official_inversion, path_up),
    "down": (official_generation, path_down),
}


@pytest.mark.parametrize("direction", OFFICIAL)
@pytest.mark.parametrize(("top", "steps"), [(500, 6), (600, 40), (400, 200)])
def test_the_linspace_walk_is_that_of_the_official_code_call_by_call(direction: str, top: int, steps: int) -> None:
    loop, path = OFFICIAL[direction]
    theirs, ours = Recorder(), Recorder()
    x = noise(2, 3, 4, 4)
    torch.testing.assert_close(
        walk(ours, x, path(top, steps, "linspace", ALPHA_BARS), ALPHA_BARS, 1), loop(x, top, steps, theirs), rtol=1e-4, atol=1e-4
    )
    assert ours.asked == theirs.asked
    assert len(ours.asked) == (steps - 1 if direction == "up" else steps)


def test_the_walk_down_evaluates_the_return_step_first_and_zero_last() -> None:
    model = Recorder()
    walk(model, noise(1, 3, 2, 2), path_down(500, 6, "linspace", ALPHA_BARS), ALPHA_BARS, 1)
    assert model.asked == [500, 400, 300, 200, 100, 0]


def test_a_real_network_walks_as_in_the_official_code(unet: NoiseUNet) -> None:
    x = noise(2, 3, 16, 16)
    latent = walk(unet, x, path_up(400, 10, "linspace", ALPHA_BARS), ALPHA_BARS, 1)
    torch.testing.assert_close(latent, official_inversion(x, 400, 10, unet), rtol=1e-4, atol=1e-4)
    image = walk(unet, latent, path_down(400, 6, "linspace", ALPHA_BARS), ALPHA_BARS, 1)
    torch.testing.assert_close(image, official_generation(latent, 400, 6, unet), rtol=1e-4, atol=1e-4)


# ---- the order of the solver, where the exact answer is known --------------------------------------------------------

FINE = linear_alpha_bars(100_000, 1e-6, 2e-4)
"""So many timesteps that rounding rungs to integers is no part of the error."""


def latent_error(order: int, steps: int, s: float, top: int = 50_000) -> float:
    """Greatest error of the latent of exact Gaussian data, walked up from t=0, relative to the latent."""
    start, end = float(FINE[0]), float(FINE[top])
    x0 = noise(1, 3, 4, 4).double()
    got = walk(gaussian(FINE, s), gaussian_at(x0, start, s), ladder(top, steps + 1, "sigma", FINE), FINE, order)
    want = gaussian_at(x0, end, s)
    return float(((got - want) / want).abs().max())


@pytest.mark.parametrize("s", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_twice_the_steps_divide_the_error_of_the_latent_by_two_to_the_order(order: int, s: float) -> None:
    errors = [latent_error(order, steps, s) for steps in (80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert 0.8 * 2**order < coarse / fine < 1.25 * 2**order, errors


@pytest.mark.parametrize("s", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 40])
def test_the_two_step_solver_beats_ddim_at_the_same_number_of_calls(steps: int, s: float) -> None:
    assert latent_error(2, steps, s) < latent_error(1, steps, s)


def round_trip_error(spacing: str, order: int, up: int, down: int, s: float = 0.5) -> float:
    model, x0 = gaussian(ALPHA_BARS, s), s * noise(4, 3, 8, 8)
    latent = walk(model, x0, path_up(400, up, spacing, ALPHA_BARS), ALPHA_BARS, order)
    return float((walk(model, latent, path_down(400, down, spacing, ALPHA_BARS), ALPHA_BARS, order) - x0).abs().mean())


def test_the_default_walk_brings_an_image_back_better_than_the_papers_with_six_times_the_calls() -> None:
    assert round_trip_error("sigma", 2, 20, 20) < 0.002
    assert round_trip_error("sigma", 2, 20, 20) < round_trip_error("linspace", 1, 200, 40)


def test_unequal_steps_are_weighed_by_their_length_in_the_two_step_solver() -> None:
    """Adams-Bashforth of order 2 is exact where the noise prediction is linear in sigma, on any ladder."""
    path = [0, 40, 50, 200, 390]
    sigmas = ((1 - ALPHA_BARS.double()) / ALPHA_BARS.double()).sqrt()

    def linear(x: Tensor, t: Tensor) -> Tensor:
        return sigmas[t].view(-1, 1, 1, 1).expand_as(x)

    first = path[1:]  # after its first step, which is DDIM, the walk must be exact
    y = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for low, high in pairwise(path):
        y = y + (sigmas[high] ** 2 - sigmas[low] ** 2) / 2 if low in first else y + sigmas[low] * (sigmas[high] - sigmas[low])
    got = walk(linear, torch.zeros(1, 1, 1, 1, dtype=torch.float64), path, ALPHA_BARS, 2)
    torch.testing.assert_close(got, y * ALPHA_BARS.double()[path[-1]].sqrt())


# ---- what a walk must leave alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_reach_the_weights_and_the_latent_through_every_step(order: int) -> None:
    def last(x: Tensor, weight: Tensor) -> Tensor:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(weight * x + t.view(-1, 1, 1, 1) / 500)

        return walk(model, x, path_down(400, 4, "sigma", ALPHA_BARS), ALPHA_BARS, order)

    x = noise(2, 3, 2, 2).double().requires_grad_()
    weight = noise(3, 1, 1, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(last, (x, weight))


@pytest.mark.parametrize("order", [1, 2])
def test_an_image_walks_alike_in_any_company(unet: NoiseUNet, order: int) -> None:
    x, path = noise(5, 3, 16, 16), path_up(300, 5, "sigma", ALPHA_BARS)
    together = walk(unet, x, path, ALPHA_BARS, order)
    torch.testing.assert_close(walk(unet, x[2:3], path, ALPHA_BARS, order), together[2:3], rtol=1e-5, atol=1e-5)
    cheap = walk(Recorder(), x, path, ALPHA_BARS, order)
    assert torch.equal(walk(Recorder(), x.flip(0), path, ALPHA_BARS, order).flip(0), cheap)


def test_a_walk_keeps_its_argument_and_a_path_of_one_rung_goes_nowhere() -> None:
    x = noise(1, 3, 4, 4)
    kept = x.clone()
    walk(Recorder(), x, [0, 100], ALPHA_BARS, 1)
    assert torch.equal(x, kept)
    assert torch.equal(walk(Recorder(), x, [7], ALPHA_BARS, 1), x)


def test_an_order_without_a_solver_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 \(DDIM\) or 2 \(Adams-Bashforth\); got 3"):
        walk(Recorder(), noise(1, 3, 2, 2), [0, 1], ALPHA_BARS, 3)


# ---- fresh noise -----------------------------------------------------------------------------------------------------


def draw(i: int) -> Tensor:
    return noise(2, 3, 8, 8, seed=100 + i)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("path", [[500, 400, 137, 60, 0, CLEAN], [3, 2, 1, 0, CLEAN]], ids=["skipped", "adjacent"])
def test_a_stochastic_walk_is_that_of_diffusers_also_over_skipped_steps(eta: float, path: list[int]) -> None:
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True)
    model, x = Recorder(), noise(2, 3, 8, 8)
    got = stochastic_walk(model, x, path, ALPHA_BARS, eta, draw)
    want = x
    for i, (t, below) in enumerate(pairwise(path)):
        scheduler.num_inference_steps = 1000 // (t - below)
        scheduler.config.num_train_timesteps = scheduler.num_inference_steps * (t - below)  # so that it steps to ``below``
        prediction = model(want, torch.full((2,), t))
        want = scheduler.step(prediction, t, want, eta=eta, variance_noise=draw(i)).prev_sample
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(got, stochastic_walk(model, x, path, ALPHA_BARS, eta, draw))


def test_without_fresh_noise_it_is_the_deterministic_walk_and_draws_nothing() -> None:
    def none(i: int) -> Tensor:
        raise AssertionError("drew noise")

    path, x = path_down(300, 7, "sigma", ALPHA_BARS), noise(2, 3, 8, 8)
    got = stochastic_walk(Recorder(), x, path, ALPHA_BARS, 0.0, none)
    torch.testing.assert_close(got, walk(Recorder(), x, path, ALPHA_BARS), rtol=1e-5, atol=1e-5)


def test_full_fresh_noise_over_single_timesteps_is_the_ddpm_posterior() -> None:
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, variance_type="fixed_small")
    x, t = noise(2, 3, 8, 8), 250
    prediction = Recorder()(x, torch.full((2,), t))
    level = float(ALPHA_BARS[t])
    mean = stochastic_walk(Recorder(), x, [t, t - 1], ALPHA_BARS, 1.0, lambda i: torch.zeros_like(x))
    spread = stochastic_walk(Recorder(), x, [t, t - 1], ALPHA_BARS, 1.0, lambda i: torch.ones_like(x)) - mean
    betas, before = scheduler.betas[t], float(ALPHA_BARS[t - 1])
    clean = predicted_x0(x, prediction, level)
    want = (before**0.5 * betas / (1 - level)) * clean + ((1 - betas) ** 0.5 * (1 - before) / (1 - level)) * x
    torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spread.mean(), scheduler._get_variance(t).sqrt(), rtol=1e-3, atol=0)


def test_a_stochastic_walk_up_is_refused() -> None:
    with pytest.raises(ValueError, match="leads down"):
        stochastic_walk(Recorder(), noise(1, 3, 8, 8), [0, 10], ALPHA_BARS, 0.5, draw)


def test_a_projection_noises_to_the_top_of_its_path_and_walks_down_as_often_as_asked() -> None:
    path, x = [500, 250, 0, CLEAN], noise(2, 3, 8, 8)
    want = x
    for i in range(2):
        level = ALPHA_BARS[500]  # the official code noises to the timestep below, and then starts here
        want = walk(Recorder(), level.sqrt() * want + (1 - level).sqrt() * draw(i), path, ALPHA_BARS)
    torch.testing.assert_close(project(Recorder(), x, path, ALPHA_BARS, 2, draw), want)
    assert torch.equal(project(Recorder(), x, path, ALPHA_BARS, 0, draw), x)


def test_projections_bring_an_image_from_far_away_into_the_domain() -> None:
    model, path = gaussian(ALPHA_BARS, 0.5), path_down(500, 40, "sigma", ALPHA_BARS)
    stranger = torch.full((1, 3, 64, 64), 4.0)
    landed = project(model, stranger, path, ALPHA_BARS, 10, lambda i: noise(1, 3, 64, 64, seed=i))
    assert abs(float(landed.mean())) < 0.02
    assert float(landed.std()) == pytest.approx(0.5, rel=0.05)
    once = project(model, stranger, path, ALPHA_BARS, 1, lambda i: noise(1, 3, 64, 64, seed=i))
    assert float(once.mean()) > 0.2, "one projection is not enough"


# ---- single steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_the_moves_of_a_walk_are_its_steps_and_imply_clean_images(order: int) -> None:
    path, x0 = path_down(300, 5, "linspace", ALPHA_BARS), noise(2, 3, 8, 8)
    fresh = noise(2, 3, 8, 8, seed=1)
    true = list(moves(lambda x, t: fresh, noised(x0, fresh, alpha_bar_at(ALPHA_BARS, 300)), path, ALPHA_BARS, order))
    for move in true:  # where the prediction is the noise that was added, every rung implies the image itself
        torch.testing.assert_close(predicted_x0(move.x, move.noise, move.alpha_bar), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(true[-1].next_x, x0, rtol=1e-4, atol=1e-4)
    assert [move.next_x is later.x for move, later in pairwise(true)] == [True] * 4


@pytest.mark.parametrize("order", [1, 2])
def test_detached_moves_have_the_same_values_and_a_graph_of_one_model_call_each(order: int) -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    path, x = path_down(300, 4, "sigma", ALPHA_BARS), noise(1, 3, 8, 8)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return scale * torch.tanh(x)

    whole, cut = list(moves(model, x, path, ALPHA_BARS, order)), list(moves(model, x, path, ALPHA_BARS, order, detached=True))
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one.next_x, other.next_x)
        assert not other.x.requires_grad
        gradient = torch.autograd.grad(other.noise.sum(), scale, retain_graph=True)[0]
        torch.testing.assert_close(gradient, torch.tanh(other.x).sum())


# ---- blend -----------------------------------------------------------------------------------------------------------


def constant(value: float) -> NoiseModel:
    return lambda x, t: torch.full_like(x, value)


def forbidden(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("a model of weight 0 was called")


def test_a_degree_of_zero_is_the_base_model_itself_and_costs_no_second_call() -> None:
    x, t = noise(3, 3, 4, 4), torch.tensor([0, 10, 900])
    assert torch.equal(blend([Recorder(), forbidden], [1, 0])(x, t), Recorder()(x, t))
    assert torch.equal(blend([forbidden, Recorder()], {0: [0, 1], 500: [0, 1]})(x, t), Recorder()(x, t))


def test_predictions_are_summed_by_weight_also_beyond_one() -> None:
    x, t = noise(2, 3, 4, 4), torch.tensor([0, 10])
    mixed = blend([constant(2.0), constant(-1.0), constant(10.0)], [-0.5, 1.25, 0.25])
    torch.testing.assert_close(mixed(x, t), torch.full_like(x, 0.25))
    both = blend([Recorder(), constant(1.0)], [0.3, 0.7])(x, t)
    torch.testing.assert_close(both, 0.3 * Recorder()(x, t) + 0.7)


def test_weights_by_timestep_hold_from_their_key_upwards_for_each_image_of_a_batch() -> None:
    mixed = blend([constant(1.0), constant(100.0)], {0: [1, 0], 200: [0.5, 0.5], 600: [0, 1]})
    t = torch.tensor([0, 199, 200, 599, 600, 999])
    got = mixed(noise(6, 3, 2, 2), t)[:, 0, 0, 0].tolist()
    assert got == [1.0, 1.0, 50.5, 50.5, 100.0, 100.0]
    alone = [mixed(noise(1, 3, 2, 2), t[i : i + 1])[0, 0, 0, 0].item() for i in range(6)]
    assert alone == got


def test_a_model_is_spared_in_the_timesteps_where_its_weight_is_zero() -> None:
    mixed = blend([constant(1.0), forbidden], {0: [1, 0], 200: [0, 1]})
    mixed(noise(1, 3, 2, 2), torch.tensor([199]))
    with pytest.raises(AssertionError):
        mixed(noise(1, 3, 2, 2), torch.tensor([200]))


def test_a_mix_that_says_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="timestep 0"):
        blend([Recorder()], {100: [1.0]})
    with pytest.raises(ValueError, match="2 models needs 2 weights"):
        blend([Recorder(), Recorder()], [1.0])
    with pytest.raises(ValueError, match="2 models needs 2 weights"):
        blend([Recorder(), Recorder()], {0: [1.0, 0.0], 5: [1.0]})


def test_a_blend_walks_and_learns_like_any_model() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    tuned = blend([constant(0.0), lambda x, t: weight * x], [0.5, 0.5])
    walk(tuned, noise(1, 3, 2, 2), [300, 100, CLEAN], ALPHA_BARS, 2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs() > 0
