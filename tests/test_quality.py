"""What would be lost: figures about a domain that are measured on its held-out images, and right."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TinyDomain
from safetensors.torch import save_file

from models.clip import load_clip
from models.domains import Domain
from models.pixelface.avatars import FACTORS, prompts
from models.pixelface.judge import Judge, load_judge
from pipeline import codec, quality, schema


@pytest.fixture
def domain(tiny_domain: TinyDomain, tmp_path: Path) -> Domain:
    """A domain with a random judge and five held-out pictures of noise."""
    rng = np.random.default_rng(0)
    images = [{"bytes": codec.encode_png(rng.integers(0, 256, (3, 32, 32), np.uint8)), "path": None} for _ in range(5)]
    factors = [{name: str(rng.choice(values)) for name, values in FACTORS.items()} for _ in range(5)]
    pq.write_table(pa.table({"image": pa.array(images, schema.IMAGE), "factors": pa.array(factors)}), tmp_path / "held_out.parquet")
    save_file(Judge().state_dict(), tmp_path / "judge.safetensors")
    return tiny_domain(32, held_out=tmp_path / "held_out.parquet", judge=tmp_path / "judge.safetensors")


def test_held_out_pictures_come_with_their_true_factors(domain: Domain) -> None:
    pictures, truth = quality.held_out_pictures(domain)
    assert pictures.shape == (5, 3, 32, 32)
    assert [set(t) for t in truth] == [set(FACTORS)] * 5


def test_the_round_trip_error_is_the_mean_over_all_images_and_is_told_on_the_way(domain: Domain) -> None:
    pictures, _ = quality.held_out_pictures(domain)
    told: list[tuple[int, float]] = []
    latents, back, error = quality.round_trip(domain, pictures, lambda done, so_far: told.append((done, so_far)), batch=2)
    assert latents.shape == back.shape == pictures.shape
    assert [done for done, _ in told] == [2, 4, 5]
    assert told[-1][1] == error
    alone = [quality.round_trip(domain, p[None], lambda *_: None).error for p in pictures]
    assert error == pytest.approx(float(np.mean(alone)), rel=1e-3)


def test_more_steps_bring_images_back_better(domain: Domain) -> None:
    pictures, _ = quality.held_out_pictures(domain)
    finer = replace(domain, recipe=replace(domain.recipe, steps_up=40, steps_down=40))
    ours, better = (quality.round_trip(d, pictures, lambda *_: None).error for d in (domain, finer))
    assert better < ours / 2


def spoil(truth: quality.Truth, name: str, rows: int) -> quality.Truth:
    other = {value: FACTORS[name][i - 1] for i, value in enumerate(FACTORS[name])}
    return [{**t, name: other[t[name]]} if row < rows else t for row, t in enumerate(truth)]


def by_judge(domain: Domain, pictures: torch.Tensor) -> quality.Truth:
    assert domain.judge is not None
    return load_judge(domain.judge).read(pictures)


def by_clip(domain: Domain, pictures: torch.Tensor) -> quality.Truth:
    clip = load_clip(domain.clip)
    read: quality.Truth = [{} for _ in pictures]
    for name, values in FACTORS.items():
        texts = torch.stack([clip.text_features(text) for text in prompts(name)])
        for row, picture in enumerate(pictures):
            read[row][name] = values[int((texts @ clip.image_features(picture[None])[0]).argmax())]
    return read


def zero_shot(domain: Domain, pictures: torch.Tensor, truth: quality.Truth) -> dict[str, float]:
    return quality.zero_shot_accuracy(domain.clip, pictures, truth)


@pytest.mark.parametrize(("measure", "reader"), [(quality.judge_accuracy, by_judge), (zero_shot, by_clip)], ids=["judge", "zero-shot"])
def test_accuracy_is_the_share_of_pictures_read_right_for_each_factor(
    domain: Domain, measure: Callable[..., dict[str, float]], reader: Callable[..., Any]
) -> None:
    pictures, _ = quality.held_out_pictures(domain)
    truth = reader(domain, pictures)
    assert measure(domain, pictures, truth) == dict.fromkeys(FACTORS, 1.0)
    assert measure(domain, pictures, spoil(truth, "mouth", 2)) == dict.fromkeys(FACTORS, 1.0) | {"mouth": 0.6}
