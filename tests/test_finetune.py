"""What would be lost: the loss of the paper, a training that learns, and a resumed run that ends where the other would have."""

import io
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyDomain
from torch import Tensor, nn

from models.clip import load_clip
from models.diffusion import CLEAN
from models.domains import Domain
from models.finetune import Objective, edit_loss, finetune, make_optimizer
from models.recipe import Tuning
from models.unet import load_alpha_bars, load_base

TUNING = Tuning(epochs=3, batch=2, learning_rate=1e-3, learning_rate_growth=1.3, steps_down=3)
PATH = [300, 150, 0, CLEAN]


@pytest.fixture(scope="module")
def domain(tiny_domain: TinyDomain) -> Domain:
    return tiny_domain(16)


@pytest.fixture(scope="module")
def objective(domain: Domain) -> Objective:
    clip = load_clip(domain.clip)
    return Objective(
        clip=clip,
        direction=clip.text_direction("face", "smiling face"),
        path=PATH,
        alpha_bars=load_alpha_bars(domain.weights),
        order=1,
        tuning=TUNING,
    )


@pytest.fixture
def fresh(domain: Domain) -> Callable[[], nn.Module]:
    return lambda: deepcopy(load_base(domain.weights)).requires_grad_(True)


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)) * 2 - 1


LATENTS, X0 = pictures(5, 1), pictures(5, 2)


def test_the_loss_is_that_of_the_paper_written_out(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    model, x, bars = fresh(), LATENTS, objective.alpha_bars
    for t, level, below in ((300, bars[300], bars[150]), (150, bars[150], bars[0]), (0, bars[0], torch.tensor(1.0))):
        noise = model(x, torch.full((5,), t))
        x = below.sqrt() * (x - (1 - level).sqrt() * noise) / level.sqrt() + (1 - below).sqrt() * noise
    change = objective.clip.image_features(x) - objective.clip.image_features(X0)
    cosine = (change @ objective.direction) / change.norm(dim=1) / objective.direction.norm()
    clip_term, l1_term = -(((1 + cosine) / 2).log()).mean(), (x - X0).abs().mean()
    got = edit_loss(model, LATENTS, X0, objective)
    want = {"loss": 3 * clip_term + 1 * l1_term, "clip": clip_term, "l1": l1_term, "similarity": cosine.mean()}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    cosine_form = replace(objective, tuning=replace(TUNING, form="cosine", clip_weight=2.0, l1_weight=0.0))
    torch.testing.assert_close(edit_loss(model, LATENTS, X0, cosine_form)["loss"], 2 * (1 - cosine).mean(), rtol=1e-4, atol=1e-4)


def run(model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> list[dict[str, float]]:
    optimizer = optimizer or make_optimizer(model, objective.tuning)
    return list(finetune(model, optimizer, LATENTS, X0, objective, **options))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_training_changes_the_copy_and_neither_base_nor_clip_nor_data(
    domain: Domain, objective: Objective, fresh: Callable[[], nn.Module]
) -> None:
    base, clip, model = weights(load_base(domain.weights)), weights(objective.clip), fresh()
    latents, x0 = LATENTS.clone(), X0.clone()
    run(model, objective)
    assert not same(base, weights(model))
    assert same(base, weights(load_base(domain.weights)))
    assert same(clip, weights(objective.clip))
    assert all(p.grad is None for p in objective.clip.parameters())
    assert torch.equal(latents, LATENTS)
    assert torch.equal(x0, X0)


class Watched(nn.Module):
    """A network that remembers which latents it was asked to walk down."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if int(t[0]) == PATH[0]:
            self.seen += [int((x[i] == LATENTS).flatten(1).all(1).nonzero()) for i in range(len(x))]
        return self.model(x, t)


def test_every_image_is_seen_once_in_every_epoch_in_another_order(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    model = Watched(fresh())
    told = run(model, objective)
    epochs = [model.seen[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [(r["epoch"], r["step"]) for r in told] == [(e, 3 * e + i) for e in range(3) for i in (1, 2, 3)]
    assert all(set(r) == {"epoch", "step", "loss", "clip", "l1", "similarity"} for r in told)


@pytest.mark.parametrize("weights_of", [{"clip_weight": 0.0, "l1_weight": 1.0}, {"clip_weight": 1.0, "l1_weight": 0.0}], ids=["l1", "clip"])
def test_either_loss_falls_when_it_is_trained_on(
    objective: Objective, fresh: Callable[[], nn.Module], weights_of: dict[str, float]
) -> None:
    tuning = replace(TUNING, epochs=12, batch=5, learning_rate=3e-3, learning_rate_growth=1.0, **weights_of)
    told = run(fresh(), replace(objective, tuning=tuning))
    assert told[-1]["loss"] < 0.8 * told[0]["loss"]


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    whole, first = fresh(), fresh()
    expected = run(whole, objective)
    optimizer = make_optimizer(first, TUNING)
    stopped = run(first, replace(objective, tuning=replace(TUNING, epochs=1)), optimizer)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    second = fresh()
    second.load_state_dict(checkpoint["model"])
    optimizer = make_optimizer(second, TUNING)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert stopped + run(second, objective, optimizer, start_epoch=1) == expected
    assert same(weights(whole), weights(second))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    runs = []
    for seed in (0, 0, 1):
        model = fresh()
        run(model, replace(objective, tuning=replace(TUNING, epochs=1, seed=seed)))
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_the_learning_rate_grows_with_each_epoch_also_after_a_resume(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    for start in (0, 2):
        model = fresh()
        optimizer = make_optimizer(model, TUNING)
        rates = {r["epoch"]: optimizer.param_groups[0]["lr"] for r in finetune(model, optimizer, LATENTS, X0, objective, start_epoch=start)}
        assert rates == {e: pytest.approx(1e-3 * 1.3**e) for e in range(start, 3)}


def test_gradients_can_be_averaged_between_workers_before_each_step(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    model, calls = fresh(), []

    def silence(given: nn.Module) -> None:
        calls.append(max(p.grad.abs().max() for p in given.parameters() if p.grad is not None))
        for p in given.parameters():
            p.grad = None

    before = weights(model)
    run(model, objective, average_gradients=silence)
    assert len(calls) == 9
    assert min(calls) > 0
    assert same(before, weights(model)), "the step used gradients that were not those of all workers"
