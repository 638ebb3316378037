"""What would be lost: the loss of the official code, and a training that does not end in NaN."""

from math import exp, log

import pytest
import torch
from torch import Tensor

from models.losses import choice_loss, directional_loss, directional_similarity, distance


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_similarity_is_the_cosine_of_the_change_with_the_text_direction() -> None:
    before, after, direction = vectors(4, 8), vectors(4, 8, seed=1), vectors(8, seed=2)
    got = directional_similarity(before, after, direction)
    for row in range(4):
        change = after[row] - before[row]
        assert got[row].item() == pytest.approx((change @ direction / (change.norm() * direction.norm())).item(), abs=1e-6)


def test_a_change_along_against_and_across_the_text_direction() -> None:
    direction = torch.tensor([1.0, 0.0])
    change = torch.tensor([[3.0, 0.0], [-0.1, 0.0], [0.0, 5.0]])
    torch.testing.assert_close(directional_similarity(torch.zeros(3, 2), change, direction), torch.tensor([1.0, -1.0, 0.0]))


@pytest.mark.parametrize("cosine", [-0.9, -0.5, 0.0, 0.3, 0.99, 1.0])
def test_the_log_form_is_that_of_the_official_code(cosine: float) -> None:
    assert directional_loss(torch.tensor([cosine])).item() == pytest.approx(-log((1 + cosine) / 2), abs=1e-5)
    assert directional_loss(torch.tensor([cosine])).item() == pytest.approx(-log((2 - (1 - cosine)) / 2), abs=1e-5)


def test_the_cosine_form_is_that_of_the_paper() -> None:
    assert directional_loss(torch.tensor([0.25, -0.75]), "cosine").item() == pytest.approx((0.75 + 1.75) / 2)


@pytest.mark.parametrize("form", ["log", "cosine"])
def test_the_loss_is_the_mean_over_the_batch_zero_at_best_and_falls_with_the_cosine(form: str) -> None:
    assert directional_loss(torch.ones(5), form).item() == pytest.approx(0)
    both = directional_loss(torch.tensor([0.1, -0.6]), form)
    torch.testing.assert_close(both, (directional_loss(torch.tensor([0.1]), form) + directional_loss(torch.tensor([-0.6]), form)) / 2)
    cosines = torch.linspace(-0.99, 1, 50)
    losses = torch.stack([directional_loss(c[None], form) for c in cosines])
    assert (losses.diff() < 0).all()


@pytest.mark.parametrize("form", ["log", "cosine"])
@pytest.mark.parametrize("change", [[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], ids=["no change", "opposite", "perfect"])
def test_no_change_and_the_opposite_change_give_finite_losses_and_gradients(form: str, change: list[float]) -> None:
    after = torch.tensor([change], requires_grad=True)
    loss = directional_loss(directional_similarity(torch.zeros(1, 2), after, torch.tensor([1.0, 0.0])), form)
    loss.backward()
    assert loss.isfinite()
    assert after.grad is not None
    assert after.grad.isfinite().all()


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="one of log, cosine; got 'l2'"):
        directional_loss(torch.zeros(1), "l2")


def test_no_change_at_all_is_similarity_0_with_a_gradient_that_can_be_followed() -> None:
    """Where a training starts if its reference is the base model's own image; a gradient of 1e8 would ruin Adam's averages."""
    features = torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    direction = torch.nn.functional.normalize(torch.ones(8), dim=0)
    after = features.clone().requires_grad_(True)
    similarity = directional_similarity(features, after, direction)
    assert similarity.tolist() == [0, 0]
    directional_loss(similarity).backward()
    assert after.grad is not None
    assert 0 < after.grad.norm() < 1000
    moved = directional_similarity(features, features - 0.1 * after.grad / after.grad.norm(), direction)
    assert (moved > 0.9).all()


def test_the_saturating_distance_is_that_of_l1_at_its_ends_and_dear_for_a_tint() -> None:
    x = torch.zeros(1, 3, 8, 8)
    tint, patch = x + 0.1, x.clone()
    patch[..., :2, :4] = 0.8  # the same L1: an eighth of the pixels, eight times as much
    assert distance(tint, x) == pytest.approx(float(distance(patch, x)))
    assert distance(x + 1, x, "saturating") == pytest.approx(1)
    assert distance(x, x, "saturating") == 0
    assert distance(tint, x, "saturating") > 2.5 * distance(patch, x, "saturating")
    with pytest.raises(ValueError, match="one of l1, saturating"):
        distance(x, x, "l2")


def test_the_choice_is_what_the_log_probability_of_the_target_text_lacks_of_its_lead_over_the_others() -> None:
    target, sources = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    before = torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.8, 0.0]])
    after = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.6, 0.8]])
    had = [log(exp(10) + 1), log(exp(8) + 1) - 6]  # the lead of the sources, with a scale of 10
    now = [log(exp(8) + 1) - 6, log(exp(6) + exp(8))]
    wanted = sum(0.5 * h + n for h, n in zip(had, now, strict=True)) / 2
    assert choice_loss(before, after, target, sources, 10.0, 0.5).item() == pytest.approx(wanted, rel=1e-5)


def test_an_image_that_leads_far_enough_is_asked_for_no_more() -> None:
    texts, before = torch.eye(2), torch.tensor([[0.6, 0.8]])  # the source leads by 2
    there, not_yet = torch.tensor([[0.76, 0.65]]), torch.tensor([[0.72, 0.69]])  # the target by 1.1 and by 0.3
    assert choice_loss(before, there, texts[0], texts[1:], 10.0, 0.5) == 0
    assert choice_loss(before, there, texts[0], texts[1:], 10.0, 1.0) == pytest.approx(0.9, abs=1e-5)
    both = choice_loss(before.expand(2, 2), torch.cat([there, not_yet]), texts[0], texts[1:], 10.0, 0.5)
    assert both == pytest.approx(0.7 / 2, abs=1e-5)


def test_an_image_that_has_the_attribute_must_only_keep_it() -> None:
    texts, has, lost = torch.eye(2), torch.tensor([[0.9, 0.1]]), torch.tensor([[0.4, 0.5]])
    assert choice_loss(has, torch.tensor([[0.6, 0.5]]), texts[0], texts[1:], 10.0, 1.0) == 0
    assert choice_loss(has, lost, texts[0], texts[1:], 10.0, 1.0) == pytest.approx(1)


def test_a_longer_step_the_same_way_lowers_the_choice_and_not_the_directional_loss() -> None:
    source, target = torch.eye(2)
    way, steps = target - source, (0.3, 0.9)
    directional = [directional_loss(directional_similarity(source[None], source[None] + far * way, way)).item() for far in steps]
    choices = [choice_loss(source[None], source[None] + far * way, target, source[None], 5.0, 0.5).item() for far in steps]
    assert directional[0] == pytest.approx(directional[1], abs=1e-5)
    assert choices[1] < choices[0] / 4
