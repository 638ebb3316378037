"""How the embedded domain's networks are trained: three generators that yield one number a step.

The caller shows progress, saves checkpoints and stops (``jobs/rebuild.py``). Pictures are uint8 (N, 3, 32, 32); factors
are int8 (N, 9), the index of each factor's value in ``avatars.FACTORS``. Pictures come in groups of ``GROUP``: an avatar,
then counterfactuals of it in which exactly one factor differs.
"""

from collections.abc import Callable, Iterator, Sequence
from math import cos, pi
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pixelface.avatars import FACTORS, caption

GROUP = 3
_NAMES = tuple(FACTORS)


def half_precision() -> torch.autocast:
    """bfloat16 where the processor computes in it; elsewhere it is emulated and some twenty times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def cosine_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup)))


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1


class Ema:
    """Exponential moving average of a network's weights, with the usual shorter memory at the start."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for k, v in model.state_dict().items():
            self.weights[k].lerp_(v, 1 - decay) if v.is_floating_point() else self.weights[k].copy_(v)


def batch_indices(count: int, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Random rows from step ``start`` on; the same rows after a resume as without one."""
    step = start
    while True:
        yield np.random.default_rng((seed, step)).integers(0, count, size)
        step += 1


def train_diffusion(
    model: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: np.ndarray,
    alpha_bars: Tensor,
    *,
    steps: int,
    start: int = 0,
    batch: int = 64,
    focus: tuple[int, int] = (0, 500),
    most_weight: float = 1.0,
    seed: int = 0,
) -> Iterator[float]:
    """Noise prediction loss of Ho et al. 2020 (eq. 14). Half of the timesteps are drawn from ``focus``, the others from all.

    An error of the predicted x0 is sigma times that of the noise, sigma^2 = (1 - alpha_bar) / alpha_bar. Where sigma is large the
    loss hardly sees a wrong colour of the whole picture; each picture's loss counts sigma^2 times, at least once and at most
    ``most_weight`` times.
    """
    rate = optimizer.param_groups[0]["initial_lr"]
    for step, rows in zip(range(start, steps), batch_indices(len(images), batch, seed, start), strict=False):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x0 = to_pixels(images[rows])
        focused = torch.randint(*focus, (batch,), generator=generator)
        anywhere = torch.randint(0, len(alpha_bars), (batch,), generator=generator)
        t = torch.where(torch.rand(batch, generator=generator) < 0.5, focused, anywhere)
        noise = torch.randn(x0.shape, generator=generator)
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        optimizer.param_groups[0]["lr"] = rate * cosine_rate(step, steps)
        with half_precision():
            prediction = model(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, t)
        weight = ((1 - alpha_bar) / alpha_bar).clamp(1, most_weight)
        loss = (weight * (prediction.float() - noise).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def _pairs_that_differ_in(factors: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(P, 2) picture indices of all pairs whose one differing factor is among ``names``, in both orders."""
    first = np.repeat(np.arange(0, len(factors), GROUP), GROUP - 1)
    second = first + np.tile(np.arange(1, GROUP), len(factors) // GROUP)
    columns = [_NAMES.index(name) for name in names]
    differs = (factors[first][:, columns] != factors[second][:, columns]).any(1)
    pairs = np.stack([first[differs], second[differs]], 1)
    return np.concatenate([pairs, pairs[:, ::-1]])


def _pair(rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For groups ``rows``: index of one picture and of a partner that differs from it in one factor."""
    flip = rng.integers(1, GROUP, len(rows))
    first, second = rows * GROUP, rows * GROUP + flip
    swap = rng.random(len(rows)) < 0.5
    return np.where(swap, second, first), np.where(swap, first, second)


def captions_for_pairs(
    factors: np.ndarray, a: np.ndarray, b: np.ndarray, templates: list[str], rng: np.random.Generator, listed: float = 0.0
) -> tuple[list[str], np.ndarray]:
    """Captions of both pictures of each pair, and which factors each mentions (bool, (2P, 9)).

    Both captions of a pair mention the same factors, the differing one among them, in the same template and alike in words.
    ``listed`` is the share of pairs whose captions are lists of what is to be seen.
    """
    texts: tuple[list[str], list[str]] = ([], [])
    mentions = np.zeros((len(a), len(_NAMES)), bool)
    for row, (i, j) in enumerate(zip(a, b, strict=True)):
        differing = int(np.flatnonzero(factors[i] != factors[j])[0])
        others = rng.permutation([k for k in range(len(_NAMES)) if k != differing])[: rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
        mentions[row, [differing, *others]] = True
        words_seed = int(rng.integers(2**32))
        template = str(rng.choice(templates)) if rng.random() < 0.6 else "a {}."
        as_list = bool(listed and rng.random() < listed)
        for side, index in zip(texts, (i, j), strict=True):
            named = {name: FACTORS[name][factors[index, k]] for k, name in enumerate(_NAMES)}
            said = [_NAMES[k] for k in np.flatnonzero(mentions[row])]
            side.append(template.format(caption(named, said, np.random.default_rng(words_seed), listed=as_list)))
    return texts[0] + texts[1], np.concatenate([mentions, mentions])


def contrastive_loss(logits: Tensor, satisfies: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy without false negatives, plus the choice within each pair.

    logits: (2P, 2P) scaled cosines, image rows by caption columns; row i belongs to caption i, and i +- P is its
    counterfactual. satisfies: bool (2P, 2P), True where the caption is true of the picture; other true captions of a
    picture are no negatives and are left out of its softmax.
    """
    count = len(logits)
    target = torch.arange(count)
    masked = logits.masked_fill(satisfies & ~torch.eye(count, dtype=torch.bool), float("-inf"))
    partner = (target + count // 2) % count
    own = logits.diagonal()
    two_way = F.softplus(logits[target, partner] - own).mean() + F.softplus(logits[partner, target] - own).mean()
    return (F.cross_entropy(masked, target) + F.cross_entropy(masked.T, target)) / 2 + 2 * two_way


def tinted(pixels: Tensor, most: float, rng: np.random.Generator) -> Tensor:
    """Pictures (N, 3, H, W) whose channels each have another contrast and brightness, drawn within ``most``."""
    contrast, brightness = torch.from_numpy(rng.uniform(-most, most, (2, len(pixels), 3, 1, 1))).float()
    return (1 + contrast) * pixels + brightness


def train_clip(
    model: Any,
    tokenizer: Callable[[list[str]], Tensor],
    templates: list[str],
    optimizer: torch.optim.Optimizer,
    images: np.ndarray,
    factors: np.ndarray,
    *,
    steps: int,
    start: int = 0,
    pairs: int = 64,
    focus: Sequence[str] = (),
    tint: float = 0.0,
    listed: float = 0.0,
    seed: int = 0,
) -> Iterator[float]:
    """Contrastive training on pairs of counterfactual pictures and their captions; pictures get some noise.

    Half of the pairs differ in one of the ``focus`` factors, if any are given. ``tint`` is the most by which brightness and
    contrast of a picture's channels change, in units of [-1, 1]; ``listed`` the share of pairs whose captions are lists.

    Plain contrastive training takes the easy colours and leaves the mouth at chance; a partner that differs in one
    factor only makes every factor count.
    """
    rate = optimizer.param_groups[0]["initial_lr"]
    focused = _pairs_that_differ_in(factors, focus)
    for step, rows in zip(range(start, steps), batch_indices(len(images) // GROUP, pairs, seed, start), strict=False):
        rng = np.random.default_rng((seed, step, 1))
        a, b = _pair(rows, rng)
        if focus:
            half = pairs // 2
            chosen = rng.integers(0, len(focused), half)
            a[:half], b[:half] = focused[chosen].T
        texts, mentions = captions_for_pairs(factors, a, b, templates, rng, listed)
        which = np.concatenate([a, b])
        satisfies = ((factors[which][:, None] == factors[which][None]) | ~mentions[None]).all(-1)
        pixels = tinted(to_pixels(images[which]), tint, rng) if tint else to_pixels(images[which])
        amount = torch.from_numpy(rng.uniform(0, 0.3, len(which)) * (rng.random(len(which)) < 0.7)).float()
        pixels += amount.view(-1, 1, 1, 1) * torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))
        optimizer.param_groups[0]["lr"] = rate * cosine_rate(step, steps)
        with half_precision():
            image_features = model.encode_image(pixels)
            text_features = model.encode_text(tokenizer(texts))
        image_features = F.normalize(image_features.float(), dim=-1)
        text_features = F.normalize(text_features.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image_features @ text_features.T
        loss = contrastive_loss(logits, torch.from_numpy(satisfies))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def train_judge(
    model: Callable[[Tensor], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    images: np.ndarray,
    factors: np.ndarray,
    *,
    steps: int,
    start: int = 0,
    batch: int = 128,
    seed: int = 0,
) -> Iterator[float]:
    """Cross-entropy of every factor on renders with a little noise and a little blur, as generated pictures have."""
    rate = optimizer.param_groups[0]["initial_lr"]
    for step, rows in zip(range(start, steps), batch_indices(len(images), batch, seed, start), strict=False):
        rng = np.random.default_rng((seed, step, 2))
        pixels = to_pixels(images[rows])
        pixels += torch.from_numpy(rng.standard_normal(pixels.shape, np.float32)) * float(rng.uniform(0, 0.15))
        if rng.random() < 0.3:
            pixels = pixels.lerp(F.avg_pool2d(pixels, 3, 1, 1), float(rng.uniform(0, 0.6)))
        optimizer.param_groups[0]["lr"] = rate * cosine_rate(step, steps)
        logits = model(pixels)
        truth = torch.from_numpy(factors[rows]).long()
        loss = torch.stack([F.cross_entropy(logits[name], truth[:, k]) for k, name in enumerate(_NAMES)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
