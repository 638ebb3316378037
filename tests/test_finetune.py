"""What would be lost: the loss of the paper, a training that learns, and a resumed run that ends where the other would have."""

import io
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyDomain
from tiny import save_clip
from torch import Tensor, nn

from models import lora
from models.clip import TextDirection, load_clip
from models.diffusion import CLEAN, walk
from models.domains import Domain
from models.finetune import (
    Objective,
    Training,
    checkpointed,
    edit_losses,
    finetune,
    image_loss,
    lacking,
    references,
    similarity_of,
    start_training,
    steps_per_epoch,
)
from models.losses import choice_loss
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
        clips=((clip, clip.text_direction("face", "smiling face")),),
        path=PATH,
        alpha_bars=load_alpha_bars(domain.weights),
        order=1,
        tuning=TUNING,
    )


@pytest.fixture
def fresh(domain: Domain) -> Callable[[], nn.Module]:
    return lambda: deepcopy(load_base(domain.weights)).requires_grad_(True)


def low_rank(model: Any) -> Any:
    """The model with adapters of rank 2, which alone are trained."""
    lora.add(model.requires_grad_(False).unet, 2)
    return model


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)) * 2 - 1


LATENTS, X0 = pictures(5, 1), pictures(5, 2)


def with_tuning(objective: Objective, **changes: Any) -> Objective:
    return replace(objective, tuning=replace(objective.tuning, **changes))


# ---- the loss and its gradient, against the equations written out ----------------------------------------------------


def papers_step(model: nn.Module, x: Tensor, t: int, level: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted x0 and the next x of DDIM (eq. 12), written out."""
    noise = model(x, torch.full((len(x),), t))
    x0 = (x - (1 - level).sqrt() * noise) / level.sqrt()
    return x0, below.sqrt() * x0 + (1 - below).sqrt() * noise


def papers_levels(bars: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    return [(300, bars[300], bars[150]), (150, bars[150], bars[0]), (0, bars[0], torch.tensor(1.0))]


def papers_loss(images: Tensor, x0: Tensor, objective: Objective) -> dict[str, Tensor]:
    """Eq. 9 and 10 with the official code's -log((1 + cos) / 2), one CLIP, written out."""
    ((clip, direction),) = objective.clips
    change, way = clip.image_features(images) - clip.image_features(x0), direction.target - direction.sources[0]
    cosine = (change @ way) / change.norm(dim=1) / way.norm()
    clip_term, l1_term = -(((1 + cosine) / 2).log()).mean(), (images - x0).abs().mean()
    return {"loss": 3 * clip_term + 1 * l1_term, "clip": clip_term, "l1": l1_term, "similarity": cosine.mean()}


def gradient(model: nn.Module, loss: Tensor, again: bool = False) -> Tensor:
    """Of all parameters, one after the other; ``again``: others will be asked for from the same graph."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=again)])


def test_loss_and_gradient_are_those_of_the_paper_written_out(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    model, x = fresh(), LATENTS
    for t, level, below in papers_levels(objective.alpha_bars):
        _, x = papers_step(model, x, t, level, below)
    want = papers_loss(x, X0, objective)
    (got,) = list(edit_losses(model, LATENTS, X0, objective))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(model, got["loss"]), gradient(model, want["loss"]), rtol=1e-3, atol=1e-4)
    cosine_form = with_tuning(objective, form="cosine", clip_weight=2.0, l1_weight=0.0)
    (got,) = list(edit_losses(model, LATENTS, X0, cosine_form))
    torch.testing.assert_close(got["loss"], 2 * (1 - want["similarity"]), rtol=1e-4, atol=1e-4)


def test_stepwise_trains_on_the_predicted_x0_of_every_step_with_the_graph_cut_between_them(
    objective: Objective, fresh: Callable[[], nn.Module]
) -> None:
    model, x = fresh(), LATENTS
    steps = edit_losses(model, LATENTS, X0, with_tuning(objective, memory="stepwise"))
    for (t, level, below), got in zip(papers_levels(objective.alpha_bars), steps, strict=True):
        x0, x = papers_step(model, x.detach(), t, level, below)
        want = papers_loss(x0, X0, objective)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient(model, got["loss"]), gradient(model, want["loss"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_recomputing_activations_gives_the_same_gradients(objective: Objective, fresh: Callable[[], nn.Module], order: int) -> None:
    model, objective = fresh(), replace(objective, order=order)
    (whole,) = list(edit_losses(model, LATENTS, X0, objective))
    (again,) = list(edit_losses(model, LATENTS, X0, with_tuning(objective, memory="checkpoint")))
    assert torch.equal(whole["loss"], again["loss"])
    assert torch.equal(gradient(model, whole["loss"]), gradient(model, again["loss"]))


def test_recomputing_gives_low_rank_weights_the_same_gradients_too(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    model = low_rank(fresh())
    adapters = [p for p in model.parameters() if p.requires_grad]
    grads = []
    for memory in ("full", "checkpoint"):
        (losses,) = list(edit_losses(model, LATENTS, X0, with_tuning(objective, memory=memory)))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses["loss"], adapters)]))
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


def kept_numbers(model: nn.Module, losses: Iterator[dict[str, Tensor]]) -> int:
    """The most numbers that are kept for one backward pass, parameters apart."""
    own, most = {p.data_ptr() for p in model.parameters()}, 0
    while True:
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(0 if tensor.data_ptr() in own else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if next(losses, None) is None:
                return most
        most = max(most, sum(kept))


def test_checkpoint_and_stepwise_keep_less_for_the_backward_pass_than_full(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    model = fresh()
    kept = {
        memory: kept_numbers(model, edit_losses(model, LATENTS, X0, with_tuning(objective, memory=memory)))
        for memory in ("full", "checkpoint", "stepwise")
    }
    assert kept["checkpoint"] < 0.5 * kept["full"]
    assert kept["stepwise"] < 0.5 * kept["full"]


def test_several_clips_are_averaged_and_each_has_its_own_direction(
    objective: Objective, fresh: Callable[[], nn.Module], tmp_path: Any
) -> None:
    other = load_clip(str(save_clip(tmp_path / "clip", seed=7)))
    second = (other, other.text_direction("face", "smiling face"))
    edited = walk(fresh(), LATENTS, PATH, objective.alpha_bars)
    alone = [image_loss(edited, X0, replace(objective, clips=(pair,))) for pair in (*objective.clips, second)]
    both = image_loss(edited, X0, replace(objective, clips=(*objective.clips, second)))
    torch.testing.assert_close(both["clip"], (alone[0]["clip"] + alone[1]["clip"]) / 2)
    assert abs(float((alone[0]["clip"] - alone[1]["clip"]).detach())) > 1e-3


class Face(nn.Module):
    """Stands where the recognition network stands: unit features that any pixel moves."""

    def features(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.flatten(1)[:, :64] + 0.1, dim=-1)


@pytest.mark.parametrize("memory", ["full", "stepwise"])
def test_the_identity_loss_reaches_the_network_in_every_memory_mode(
    objective: Objective, fresh: Callable[[], nn.Module], memory: str
) -> None:
    tuning = replace(TUNING, id_weight=0.5, clip_weight=0.0, l1_weight=0.0, memory=memory)
    faces = replace(objective, tuning=tuning, identity=Face())  # type: ignore[arg-type]
    model = fresh()
    for losses in edit_losses(model, LATENTS, X0, faces):
        torch.testing.assert_close(losses["loss"], 0.5 * losses["identity"])
        assert float(gradient(model, losses["loss"]).abs().max()) > 1e-4  # zero in the official code's stepwise way


@pytest.mark.parametrize("memory", ["full", "checkpoint", "stepwise"])
def test_clip_l1_and_identity_together_are_the_papers_loss_and_gradient(
    objective: Objective, fresh: Callable[[], nn.Module], memory: str
) -> None:
    """Eq. 10 with three weights that are neither 0 nor 1, written out; the identity is 1 - cos of the network's features."""
    model, face = fresh(), Face()
    tuning = replace(TUNING, clip_weight=1.7, l1_weight=0.6, id_weight=0.9, memory=memory)
    faces = replace(objective, tuning=tuning, identity=face)  # type: ignore[arg-type]
    got = list(edit_losses(model, LATENTS, X0, faces))
    images, x = [], LATENTS
    for t, level, below in papers_levels(objective.alpha_bars):
        x0, x = papers_step(model, x.detach() if memory == "stepwise" else x, t, level, below)
        images.append(x0)
    for losses, image in zip(got, images if memory == "stepwise" else [x], strict=True):
        ours, theirs = face.features(image), face.features(X0)
        identity = (1 - (ours * theirs).sum(1) / ours.norm(dim=1) / theirs.norm(dim=1)).mean()
        terms = papers_loss(image, X0, objective)
        want = 1.7 * terms["clip"] + 0.6 * terms["l1"] + 0.9 * identity
        torch.testing.assert_close(losses["loss"], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(losses["identity"], identity, rtol=1e-4, atol=1e-4)
        parts = [float(gradient(model, part, again=True).norm()) for part in (1.7 * terms["clip"], 0.6 * terms["l1"], 0.9 * identity)]
        assert min(parts) > 1e-3, "each has a share in it"
        torch.testing.assert_close(gradient(model, losses["loss"]), gradient(model, want, again=True), rtol=1e-3, atol=1e-4)


def test_an_identity_weight_without_a_network_is_refused_and_never_a_silent_zero(objective: Objective) -> None:
    with pytest.raises(ValueError, match="recognises faces"):
        with_tuning(objective, id_weight=0.3)


def test_the_reference_is_the_source_or_what_the_base_model_makes_of_it(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    model = fresh()
    assert references(model, LATENTS, X0, objective) is X0
    got = references(model, LATENTS, X0, with_tuning(objective, reference="reconstruction"))
    torch.testing.assert_close(got, walk(model, LATENTS, PATH, objective.alpha_bars))
    assert not got.requires_grad
    (losses,) = list(edit_losses(model, LATENTS, got, with_tuning(objective, clip_weight=0.0)))
    assert float(losses["l1"].detach()) < 1e-5, "the base model itself is no edit"


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(model: nn.Module, objective: Objective, training: Training | None = None, **options: Any) -> list[dict[str, float]]:
    training = training or start_training(model, objective.tuning)
    return list(finetune(training, LATENTS, X0, objective, **options))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_training_changes_the_copy_and_neither_base_nor_clip_nor_data(
    domain: Domain, objective: Objective, fresh: Callable[[], nn.Module]
) -> None:
    base, clip, model = weights(load_base(domain.weights)), weights(objective.clips[0][0]), fresh()
    latents, x0 = LATENTS.clone(), X0.clone()
    run(model, objective)
    assert not same(base, weights(model))
    assert same(base, weights(load_base(domain.weights)))
    assert same(clip, weights(objective.clips[0][0]))
    assert all(p.grad is None for p in objective.clips[0][0].parameters())
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
    assert all(set(r) == {"epoch", "step", "loss", "clip", "l1", "similarity", "epoch_done"} for r in told)
    assert [r["epoch_done"] for r in told] == [0, 0, 1] * 3


@pytest.mark.parametrize("weights_of", [{"clip_weight": 0.0, "l1_weight": 1.0}, {"clip_weight": 1.0, "l1_weight": 0.0}], ids=["l1", "clip"])
def test_either_loss_falls_when_it_is_trained_on(
    objective: Objective, fresh: Callable[[], nn.Module], weights_of: dict[str, float]
) -> None:
    tuning = replace(TUNING, epochs=12, batch=5, learning_rate=3e-3, learning_rate_growth=1.0, **weights_of)
    told = run(fresh(), replace(objective, tuning=tuning))
    assert told[-1]["loss"] < 0.8 * told[0]["loss"]


def saved(training: Training) -> dict[str, Any]:
    """A checkpoint as it comes back from a file, without running code."""
    file = io.BytesIO()
    torch.save(training.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


EXTRAS = {
    "plain": {},
    "low rank": {"rank": 2},
    "all": {"memory": "stepwise", "ema": 0.9, "held_out": 2, "patience": 5, "accumulate": 2, "warmup": 5, "choice_weight": 0.1},
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    objective: Objective, fresh: Callable[[], nn.Module], extras: dict[str, Any]
) -> None:
    objective, options = with_tuning(objective, **extras), {"held_out": (X0, LATENTS)} if "held_out" in extras else {}
    made = (lambda: low_rank(fresh())) if "rank" in extras else fresh
    whole, first, second = (start_training(made(), objective.tuning) for _ in range(3))
    expected = run(whole.model, objective, whole, **options)
    stopped = []
    for told in finetune(first, LATENTS, X0, objective, **options):  # type: ignore[arg-type]
        stopped.append(told)
        if told["epoch_done"]:
            break
    second.load_state_dict(saved(first))
    assert stopped + run(second.model, objective, second, **options) == expected
    for training in (whole, second):
        training.finish()
    assert same(weights(whole.model), weights(second.model))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    runs = []
    for seed in (0, 0, 1):
        model = fresh()
        run(model, with_tuning(objective, epochs=1, seed=seed))
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_the_learning_rate_grows_with_each_epoch_also_after_a_resume(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    for start in (0, 2):
        training = start_training(fresh(), TUNING)
        training.epoch = start
        rates = {r["epoch"]: training.optimizer.param_groups[0]["lr"] for r in finetune(training, LATENTS, X0, objective)}
        assert rates == {e: pytest.approx(1e-3 * 1.3**e) for e in range(start, 3)}


@pytest.mark.parametrize("memory", ["full", "stepwise"])
def test_batches_that_are_accumulated_have_the_gradient_of_one_large_batch(
    objective: Objective, fresh: Callable[[], nn.Module], memory: str
) -> None:
    gradients = []
    for numbers in ({"batch": 5}, {"batch": 2, "accumulate": 3}):
        seen: list[Tensor] = []
        told = run(
            fresh(),
            with_tuning(objective, epochs=1, memory=memory, **numbers),
            average=lambda tensors, seen=seen: seen.append(torch.cat([tensor.flatten() for tensor in tensors])),
        )
        assert len(told) == len(seen) == steps_per_epoch(5, replace(TUNING, memory=memory, **numbers), PATH)
        gradients.append(seen[0])  # later ones are those of weights that Adam made of the signs of tiny gradients
    assert len(told) == (1 if memory == "full" else 3)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_the_moving_average_is_saved_in_place_of_the_last_weights(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    objective = with_tuning(objective, ema=0.5)
    training = start_training(fresh(), objective.tuning)
    want = weights(training.model)
    for n, _ in enumerate(finetune(training, LATENTS, X0, objective), 1):
        decay = min(0.5, (1 + n) / (10 + n))
        want = {k: decay * v + (1 - decay) * training.model.state_dict()[k] for k, v in want.items()}
    last = weights(training.model)
    training.finish()
    torch.testing.assert_close(weights(training.model), want, rtol=1e-5, atol=1e-6)
    assert not same(last, weights(training.model))


def test_training_stops_when_held_out_images_get_no_better_and_keeps_the_best(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    tuning = replace(TUNING, epochs=30, learning_rate=0.03, learning_rate_growth=1.0, held_out=5, patience=2)
    training, objective = start_training(fresh(), tuning), replace(objective, tuning=tuning)
    told = [r for r in run(training.model, objective, training, held_out=(X0, LATENTS)) if r["epoch_done"]]
    similarities = [r["held_out"] for r in told]
    assert len(told) < 30, "a rate this high does not improve for ever"
    assert similarities.index(max(similarities)) == len(similarities) - 3
    assert training.saved_epoch == len(similarities) - 2, "what is told of the saved weights is of their epoch, not of the last"
    training.finish()
    assert similarity_of(training.model, X0, LATENTS, objective) == pytest.approx(max(similarities), abs=1e-6)


def test_training_stops_at_the_similarity_that_is_enough(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    training = start_training(fresh(), TUNING)
    told = run(training.model, with_tuning(objective, stop_at=-1.0, held_out=5), training, held_out=(X0, LATENTS))
    assert [r["epoch"] for r in told if r["epoch_done"]] == [0]
    assert run(training.model, objective, training) == [], "and a resumed run knows that it was done"


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.1), ("float16", 0.05)])
def test_mixed_precision_trains_float32_weights(
    domain: Domain, objective: Objective, fresh: Callable[[], nn.Module], precision: str, tolerance: float
) -> None:
    exact, model = fresh(), deepcopy(load_base(domain.weights, precision)).requires_grad_(True)
    training = start_training(model, TUNING, "cpu", precision)
    assert training.scaler.is_enabled() == (precision == "float16")
    mixed, full = run(model, objective, training), run(exact, objective)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not same(weights(model), weights(load_base(domain.weights)))
    assert mixed[0]["loss"] == pytest.approx(full[0]["loss"], rel=tolerance)


def test_steps_that_float16_leaves_out_are_not_counted_and_an_epoch_of_them_ends_the_run(domain: Domain, objective: Objective) -> None:
    objective = with_tuning(objective, ema=0.5, batch=1)
    model = deepcopy(load_base(domain.weights, "float16")).requires_grad_(True)
    training, before = start_training(model, objective.tuning, "cpu", "float16"), weights(model)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
    told, seen = finetune(training, LATENTS, X0, objective), 0
    while training.taken == 0:  # halved each time, until the gradients fit
        assert same(before, weights(model))
        next(told)
        seen += 1
    assert 1 < seen < 5
    assert not same(before, weights(model))
    training = start_training(deepcopy(model), objective.tuning, "cpu", "float16")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    with pytest.raises(ArithmeticError, match="every step of epoch 1"):
        list(finetune(training, LATENTS, X0, objective))


def test_checkpointing_works_under_autocast_too(domain: Domain, objective: Objective) -> None:
    model = deepcopy(load_base(domain.weights, "bfloat16")).requires_grad_(True)
    x, t = LATENTS, torch.full((5,), 300)
    torch.testing.assert_close(gradient(model, checkpointed(model)(x, t).sum()), gradient(model, model(x, t).sum()))


def test_gradients_can_be_averaged_between_workers_before_each_step(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    model, calls = fresh(), []

    def silence(tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        calls.append(max(float(tensor.abs().max()) for tensor in tensors))
        for tensor in tensors:
            tensor.zero_()

    before = weights(model)
    run(model, objective, average=silence)
    assert len(calls) == 9
    assert min(calls) > 0
    assert same(before, weights(model)), "the step used gradients that were not those of all workers"


def test_the_choice_counts_beside_the_directional_loss_and_falls_when_it_is_trained_on(
    objective: Objective, fresh: Callable[[], nn.Module]
) -> None:
    ((clip, other),) = objective.clips
    direction = TextDirection(other.target[None], other.sources[0])  # the texts that the pictures are farther from
    alone = with_tuning(replace(objective, clips=((clip, direction),)), clip_weight=0.0, l1_weight=0.0, choice_weight=0.5)
    texts = torch.stack([direction.target, *direction.sources])
    features = clip.image_features(X0)
    chosen = choice_loss(features, features, texts[0], texts[1:], clip.scale, alone.tuning.choice_lead)
    assert chosen > 0
    told = image_loss(X0, X0, alone)
    assert told["choice"].item() == pytest.approx(chosen.item(), rel=1e-5)
    assert told["loss"].item() == pytest.approx(0.5 * chosen.item(), rel=1e-5)
    assert "choice" not in image_loss(X0, X0, objective)
    ends = run(fresh(), with_tuning(alone, epochs=12, batch=5, learning_rate=3e-3, learning_rate_growth=1.0))
    assert ends[-1]["choice"] < 0.8 * ends[0]["choice"]


def test_the_rate_grows_evenly_over_the_warm_up_whatever_the_epochs_are(objective: Objective, fresh: Callable[[], nn.Module]) -> None:
    objective = with_tuning(objective, warmup=4, epochs=3, batch=2, learning_rate=1e-3, learning_rate_growth=0.5)
    training, rates = start_training(fresh(), objective.tuning), []
    for _ in finetune(training, LATENTS, X0, objective):
        rates.append(training.optimizer.param_groups[0]["lr"] * 1e3)
    assert rates == pytest.approx([1 / 5, 2 / 5, 3 / 5, 0.5 * 4 / 5, 0.5, 0.5, 0.25, 0.25, 0.25])


# ---- views and the choice of images ----------------------------------------------------------------------------------


def test_of_many_images_those_that_lack_the_attribute_most_are_trained_on(objective: Objective) -> None:
    ((clip, direction),) = objective.clips
    shown = (clip.image_features(X0) @ (direction.target - direction.sources[0])).tolist()
    assert lacking(X0, objective, 2).tolist() == sorted(sorted(range(5), key=shown.__getitem__)[:2])


class Read(nn.Module):
    """Stands where a CLIP stands: an image's features are its first three values."""

    def image_features(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(images.flatten(1)[:, :3], dim=1)


def test_of_several_source_texts_each_has_its_turn_and_images_with_the_attribute_come_last(objective: Objective) -> None:
    black, brown, grey = torch.eye(3)
    shades = [[1, 0, 0.5], [1, 0, 0.4], [1, 0, 0.3], [1, 0, 0.2], [0, 1, 0.7], [0, 1, 0.6], [0.1, 0, 1]]
    seen = replace(objective, clips=((Read(), TextDirection(torch.stack([black, brown]), grey)),))  # type: ignore[arg-type]
    chosen = [lacking(torch.tensor(shades).view(7, 3, 1, 1), seen, count).tolist() for count in (2, 4, 6)]
    assert chosen == [[3, 5], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_with_views_a_change_that_is_no_change_has_no_similarity_and_training_differs(
    objective: Objective, fresh: Callable[[], nn.Module]
) -> None:
    drawn = replace(with_tuning(objective, views=3), draw=torch.Generator().manual_seed(0))
    assert image_loss(X0, X0, drawn)["similarity"] == pytest.approx(0, abs=1e-4)  # the same views before and after
    ends = []
    for views in (1, 3, 3):
        training = start_training(fresh(), TUNING)
        ends.append([told["loss"] for told in finetune(training, LATENTS, X0, with_tuning(objective, views=views))])
    assert ends[1] == ends[2] != ends[0]
