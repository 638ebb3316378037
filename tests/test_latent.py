"""What would be lost: one picture can be edited with nothing but words and the base model, and nothing else is changed by it."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from conftest import TinyDomain
from torch import Tensor

from models.clip import Clip, load_clip
from models.diffusion import walk
from models.finetune import Objective
from models.latent import Iterate, global_loss, optimize_latent
from models.recipe import Tuning
from models.unet import NoiseUNet, load_alpha_bars, load_base

TARGET = "smiling picture"


class Task:
    """A picture of the tiny domain with its latent, and the objective of a text."""

    def __init__(self, domain: Any, **tuning: Any):
        self.model = load_base(domain.weights)
        self.alpha_bars = load_alpha_bars(domain.weights)
        self.clip: Clip = load_clip(domain.clip)
        self.x0 = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
        self.order = domain.recipe.order
        with torch.no_grad():
            self.latent = walk(self.model, self.x0, domain.recipe.up(self.alpha_bars), self.alpha_bars, self.order)
        self.objective = Objective(
            clips=((self.clip, self.clip.text_direction("face", TARGET)),),
            path=replace(domain.recipe, steps_down=3).down(self.alpha_bars),
            alpha_bars=self.alpha_bars,
            order=self.order,
            tuning=Tuning(**{"steps_down": 3, "l1_weight": 0.1, **tuning}),
        )

    def run(self, steps: int = 6, model: NoiseUNet | None = None) -> list[Iterate]:
        return list(optimize_latent(model or self.model, self.latent, self.x0, self.objective, steps=steps))


MakeTask = Callable[..., Task]


@pytest.fixture
def task(tiny_domain: TinyDomain) -> MakeTask:
    return lambda **tuning: Task(tiny_domain(), **tuning)


def test_the_picture_comes_closer_to_the_text_and_the_loss_falls(task: MakeTask) -> None:
    iterates = task().run(steps=12)
    assert [i.step for i in iterates] == list(range(13))
    best = min(iterates, key=lambda i: i.losses["loss"])
    assert best.losses["loss"] < 0.95 * iterates[0].losses["loss"]
    assert best.losses["similarity"] > iterates[0].losses["similarity"] + 0.05


def test_each_iterate_is_the_latent_that_its_image_and_losses_belong_to(task: MakeTask) -> None:
    one = task()
    iterates = one.run(steps=3)
    assert torch.equal(iterates[0].latent, one.latent)
    for iterate in iterates:
        with torch.no_grad():
            image = walk(one.model, iterate.latent, one.objective.path, one.alpha_bars, one.order)
            losses = global_loss(image, one.x0, one.objective)
        assert torch.equal(image, iterate.image)
        assert iterate.losses == {name: value.item() for name, value in losses.items()}
    assert len({i.losses["loss"] for i in iterates}) == 4


def test_the_first_step_is_adams_along_the_gradient_through_the_whole_walk(task: MakeTask) -> None:
    one = task()
    first, second = one.run(steps=1)
    latent = one.latent.clone().requires_grad_(True)
    global_loss(walk(one.model, latent, one.objective.path, one.alpha_bars, one.order), one.x0, one.objective)["loss"].backward()
    assert latent.grad is not None
    wanted = one.latent - 0.02 * latent.grad / (latent.grad.abs() + 1e-8)  # Adam's first step
    torch.testing.assert_close(second.latent, wanted, rtol=0, atol=1e-6)
    assert not torch.equal(first.latent, second.latent)


def test_no_network_is_changed_and_nothing_but_the_latent_gets_a_gradient(task: MakeTask) -> None:
    one = task()
    model = deepcopy(one.model).requires_grad_(True)  # as a network comes out of fine-tuning
    before = {k: v.clone() for k, v in model.state_dict().items()}
    latent, x0 = one.latent.clone(), one.x0.clone()
    one.run(steps=2, model=model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for network in (model, one.clip) for p in network.parameters())
    assert torch.equal(one.latent, latent)
    assert torch.equal(one.x0, x0)
    assert one.latent.grad is None


def test_the_same_request_gives_the_same_latent_whatever_the_random_state(task: MakeTask) -> None:
    torch.manual_seed(1)
    first = task().run(steps=2)[-1]
    torch.manual_seed(2)
    second = task().run(steps=2)[-1]
    assert torch.equal(first.latent, second.latent)


def test_recomputation_gives_the_same_latents(task: MakeTask) -> None:
    for kept, again in zip(task().run(steps=3), task(memory="checkpoint").run(steps=3), strict=True):
        torch.testing.assert_close(kept.latent, again.latent, rtol=0, atol=1e-6)


def picture(level: float) -> Tensor:
    return torch.full((1, 3, 16, 16), level)


@pytest.mark.parametrize("form", ["log", "cosine"])
def test_the_loss_is_that_of_the_official_code_with_the_text_in_place_of_a_direction(task: MakeTask, form: str) -> None:
    one = task(form=form, clip_weight=3.0, l1_weight=2.0)
    edited = picture(0.25)
    cosine = (one.clip.image_features(edited)[0] @ one.clip.text_features(TARGET)).item()
    clip_term = -log((1 + cosine) / 2) if form == "log" else 1 - cosine
    losses = global_loss(edited, picture(0.0), one.objective)
    assert losses["similarity"].item() == pytest.approx(cosine, abs=1e-6)
    assert losses["clip"].item() == pytest.approx(clip_term, abs=1e-5)
    assert losses["l1"].item() == pytest.approx(0.25)
    assert losses["loss"].item() == pytest.approx(3 * clip_term + 2 * 0.25, abs=1e-5)


def test_several_clips_and_texts_are_averaged(task: MakeTask) -> None:
    one = task()
    texts = [one.clip.text_direction("face", text) for text in (TARGET, "dark forest")]
    alone = [global_loss(picture(0.5), one.x0, replace(one.objective, clips=((one.clip, text),))) for text in texts]
    both = global_loss(picture(0.5), one.x0, replace(one.objective, clips=tuple((one.clip, text) for text in texts)))
    for name in ("clip", "similarity"):
        torch.testing.assert_close(both[name], (alone[0][name] + alone[1][name]) / 2)
    assert abs(alone[0]["similarity"] - alone[1]["similarity"]) > 1e-3


class Brightness(torch.nn.Module):
    """Stands in for the large face network, with the same contract: who is equally bright is the same person."""

    def features(self, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3))
        return torch.stack([level.cos(), level.sin()], 1)


def test_the_identity_loss_counts_where_it_has_a_weight(task: MakeTask) -> None:
    objective = task().objective
    objective = replace(objective, tuning=replace(objective.tuning, id_weight=0.5), identity=Brightness())  # type: ignore[arg-type]
    losses = global_loss(picture(0.5), picture(0.0), objective)
    assert losses["identity"].item() == pytest.approx(1 - torch.tensor(0.5).cos().item(), abs=1e-6)
    without = global_loss(picture(0.5), picture(0.0), replace(objective, tuning=replace(objective.tuning, id_weight=0.0)))
    assert losses["loss"].item() == pytest.approx(without["loss"].item() + 0.5 * losses["identity"].item(), abs=1e-6)
    assert "identity" not in without


def test_a_weight_on_the_source_keeps_the_picture_nearer_to_it(task: MakeTask) -> None:
    free, held = (task(l1_weight=weight).run(steps=8)[-1].losses["l1"] for weight in (0.0, 20.0))
    assert held < 0.8 * free


def test_no_steps_and_the_mode_that_trains_a_network_are_refused(task: MakeTask) -> None:
    with pytest.raises(ValueError, match="at least 1 step; got 0"):
        task().run(steps=0)
    with pytest.raises(ValueError, match="memory is full or checkpoint; got stepwise"):
        task(memory="stepwise").run()
