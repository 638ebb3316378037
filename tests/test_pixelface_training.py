"""What would be lost: the shipped networks can be trained again, to the same weights, stopped and resumed at will."""

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_unet
from torch import Tensor, nn

from models.diffusion import linear_alpha_bars
from models.pixelface.avatars import FACTORS
from models.pixelface.judge import Judge
from models.pixelface.training import (
    GROUP,
    Ema,
    batch_indices,
    captions_for_pairs,
    contrastive_loss,
    cosine_rate,
    to_pixels,
    train_clip,
    train_diffusion,
    train_judge,
)
from models.unet import NoiseUNet

NAMES = tuple(FACTORS)


def slow_contrastive_loss(logits: Tensor, satisfies: Tensor) -> float:
    """The same numbers, one picture and one caption at a time."""
    count = len(logits)
    total = 0.0
    for i in range(count):
        partner = (i + count // 2) % count
        captions = [logits[i, j] for j in range(count) if j == i or not satisfies[i, j]]
        pictures = [logits[j, i] for j in range(count) if j == i or not satisfies[j, i]]
        picks_caption = torch.stack(captions).logsumexp(0) - logits[i, i]
        picks_picture = torch.stack(pictures).logsumexp(0) - logits[i, i]
        between_two = -F.log_softmax(logits[i, [i, partner]], 0)[0] - F.log_softmax(logits[[i, partner], i], 0)[0]
        total += float(picks_caption + picks_picture) / 2 + 2 * float(between_two)
    return total / count


def logits(count: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_the_contrastive_loss_is_that_of_a_slow_loop(seed: int) -> None:
    satisfies = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) < 0.3
    satisfies |= torch.eye(8, dtype=torch.bool)
    for i in range(8):
        satisfies[i, (i + 4) % 8] = False  # a counterfactual never fits its partner's caption
    got = contrastive_loss(logits(8, seed), satisfies)
    assert got.item() == pytest.approx(slow_contrastive_loss(logits(8, seed), satisfies))


def test_other_true_captions_of_a_picture_are_no_negatives() -> None:
    own = torch.eye(4, dtype=torch.bool)
    also_true = own.clone()
    also_true[0, 1] = True
    wrong, harmless = logits(4), logits(4)
    harmless[0, 1] = 50.0
    assert contrastive_loss(harmless, own) > 5 + contrastive_loss(wrong, own)
    assert contrastive_loss(harmless, also_true).item() == pytest.approx(contrastive_loss(wrong, also_true).item())


def drawn_factors(groups: int, seed: int = 0) -> np.ndarray:
    """Groups of ``GROUP`` in which each picture after the first differs from it in exactly one factor."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(groups):
        first = np.array([rng.integers(len(values)) for values in FACTORS.values()], np.int8)
        rows.append(first)
        for _ in range(GROUP - 1):
            other, k = first.copy(), int(rng.integers(len(NAMES)))
            other[k] = (other[k] + 1) % len(FACTORS[NAMES[k]])
            rows.append(other)
    return np.stack(rows)


def test_captions_of_a_pair_mention_the_same_factors_and_what_tells_them_apart() -> None:
    factors = drawn_factors(60)
    a, b = np.arange(60) * GROUP, np.arange(60) * GROUP + 1
    texts, mentions = captions_for_pairs(factors, a, b, ["a picture of {}.", "one {}!"], np.random.default_rng(0))
    assert len(texts) == 120
    assert mentions.shape == (120, len(NAMES))
    assert (mentions[:60] == mentions[60:]).all()
    for row in range(60):
        differing = np.flatnonzero(factors[a[row]] != factors[b[row]])
        assert mentions[row, differing].all()
        assert texts[row] != texts[row + 60]
        assert texts[row].split()[:1] == texts[row + 60].split()[:1], "the templates differ"
    assert set(mentions.sum(1).tolist()) == {1, 2, 3, 4}


def test_the_share_of_listed_captions_is_that_asked_for_and_both_of_a_pair_are_alike() -> None:
    factors, a, b = drawn_factors(200), np.arange(200) * GROUP, np.arange(200) * GROUP + 1
    texts, _ = captions_for_pairs(factors, a, b, ["a {}."], np.random.default_rng(0), listed=0.5)
    lists = [not re.search(r"\b(with|in|wearing|on) ", text) and "," in text for text in texts]
    plain, _ = captions_for_pairs(factors, a, b, ["a {}."], np.random.default_rng(0))
    assert 0.3 < np.mean(lists) < 0.5, "half, but for lists of one"
    bare = [not re.search(r"\b(with|in|wearing|on|without) ", text) and "," in text for text in plain]
    assert not any(bare)


def test_captions_depend_on_the_generator_alone() -> None:
    factors, a, b = drawn_factors(9), np.arange(9) * GROUP, np.arange(9) * GROUP + 2
    first, again = (captions_for_pairs(factors, a, b, ["a {}."], np.random.default_rng(3))[0] for _ in range(2))
    assert first == again
    assert first != captions_for_pairs(factors, a, b, ["a {}."], np.random.default_rng(4))[0]


def test_the_learning_rate_warms_up_peaks_at_one_and_ends_at_two_percent() -> None:
    rates = [cosine_rate(step, 1000) for step in range(1001)]
    assert rates[0] == 0.01
    assert max(rates) == rates[99] == rates[100] == 1.0
    assert rates[-1] == pytest.approx(0.02)
    assert rates[550] == pytest.approx(0.51)
    assert all(low < high for low, high in itertools.pairwise(rates[:100]))
    assert all(high > low for high, low in itertools.pairwise(rates[100:]))


def test_a_run_shorter_than_its_warm_up_has_rates_all_the_same() -> None:
    assert [cosine_rate(step, 3) for step in range(3)] == [0.01, 0.02, 0.03]


def test_pixels_span_minus_one_to_one() -> None:
    got = to_pixels(np.array([[[[0, 255, 51]]]], np.uint8).repeat(3, 1))
    torch.testing.assert_close(got[0, :, 0], torch.tensor([[-1.0, 1.0, -0.6]]).expand(3, -1))


def test_the_average_follows_quickly_at_first_and_slowly_later() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(1, 1, bias=False), b=nn.BatchNorm1d(1)))
    nn.init.zeros_(model.a.weight)  # type: ignore[arg-type]
    ema = Ema(model, decay=0.9)
    nn.init.ones_(model.a.weight)  # type: ignore[arg-type]
    model.b.num_batches_tracked.fill_(7)  # type: ignore[union-attr,operator]
    want = 0.0
    for step in range(1, 200):
        ema.update(model)
        decay = min(0.9, (1 + step) / (10 + step))
        want = decay * want + (1 - decay)
        assert ema.weights["a.weight"].item() == pytest.approx(want, rel=1e-5)
    assert ema.weights["b.num_batches_tracked"].item() == 7
    model.load_state_dict(ema.weights)


def test_batches_go_on_after_a_resume_as_without_one() -> None:
    whole = list(itertools.islice(batch_indices(1000, 8, 5, 0), 10))
    resumed = list(itertools.islice(batch_indices(1000, 8, 5, 6), 4))
    assert np.array_equal(whole[6:], resumed)
    assert not np.array_equal(whole[0], whole[1])
    assert not np.array_equal(whole[0], next(batch_indices(1000, 8, 6, 0)))
    assert np.stack(whole).min() >= 0
    assert np.stack(whole).max() < 1000


# ---- the three trainings, a few steps of each ------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), np.uint8)
FACTS = drawn_factors(4)


class Colours(nn.Module):
    """A stand-in for CLIP that sees mean colours and counts letters; the real one is far slower."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3, 4), nn.Linear(128, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.image(pixels.mean((2, 3)))

    def encode_text(self, letters: Tensor) -> Tensor:
        return self.text(letters)


def letters(texts: list[str]) -> Tensor:
    return torch.stack([torch.bincount(torch.tensor([ord(c) % 128 for c in text]), minlength=128) for text in texts]).float()


def training(kind: str, model: Any, optimizer: torch.optim.Optimizer, start: int = 0) -> Iterator[float]:
    """Four steps, but for those before ``start``."""
    if kind == "diffusion":
        return train_diffusion(model, optimizer, IMAGES, linear_alpha_bars(), steps=4, start=start, batch=4)
    if kind == "judge":
        return train_judge(model, optimizer, IMAGES, FACTS, steps=4, start=start, batch=4)
    focus = ("mouth", "skin", "hat", "beard", "glasses")
    return train_clip(model, letters, ["a {}."], optimizer, IMAGES, FACTS, steps=4, start=start, pairs=4, focus=focus)


def network(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = {"diffusion": lambda: NoiseUNet(tiny_unet(32)), "judge": lambda: Judge(4), "clip": Colours}[kind]()
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "initial_lr": 1e-2}], lr=1e-2)
    return model, optimizer


@pytest.mark.parametrize("kind", ["diffusion", "judge", "clip"])
def test_a_training_stopped_and_resumed_ends_bit_for_bit_as_one_that_ran_through(kind: str) -> None:
    whole, optimizer = network(kind)
    expected = list(training(kind, whole, optimizer))
    first, optimizer = network(kind)
    stopped = list(itertools.islice(training(kind, first, optimizer), 2))
    second, other = network(kind)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert stopped + list(training(kind, second, other, start=2)) == expected
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())
