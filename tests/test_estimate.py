"""What would be lost: a plan's numbers are those of the run that follows."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import picture

from models.clip import TextDirection
from models.diffusion import linear_alpha_bars
from models.domains import Domain
from models.finetune import Objective, finetune, references, start_training
from models.recipe import Tuning
from models.unet import NoiseUNet
from pipeline.codec import encode_png
from pipeline.config import Source
from pipeline.estimate import Networks, Work, bytes_read, images_of, pass_work, sample, seconds, spread, tuning_work
from pipeline.sources import find, plan_blocks


class NoClip(torch.nn.Module):
    """In place of a CLIP: features that cost nothing."""

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :4]


@pytest.mark.parametrize(
    "changes",
    [{}, {"memory": "stepwise"}, {"memory": "checkpoint"}, {"reference": "reconstruction"}, {"held_out": 2}, {"batch": 3}],
    ids=lambda changes: " ".join(map(str, changes)) or "plain",
)
def test_calls_of_training_are_those_that_training_makes(changes: dict, tiny_domain: Callable[..., Domain]) -> None:
    from models.unet import load_base

    tuning = replace(Tuning(epochs=2, batch=2, images=4, steps_down=2, learning_rate=1e-4), **changes)
    model = NoiseUNet(load_base(tiny_domain(16).weights).unet).requires_grad_(True)
    clip, seen = NoClip(), 0

    def count(module: object, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += len(given[0])

    handle = model.register_forward_pre_hook(count)
    direction = TextDirection(torch.eye(4)[:1], torch.eye(4)[1])
    objective = Objective(clips=((clip, direction),), path=[200, 0, -1], alpha_bars=linear_alpha_bars(), order=1, tuning=tuning)  # type: ignore[arg-type]
    images = torch.randn(tuning.images + tuning.held_out, 3, 16, 16)
    reference = references(model, images, images, objective)
    held_out = (images[tuning.images :], reference[tuning.images :]) if tuning.held_out else None
    training = start_training(model, tuning)
    for _ in finetune(training, images[: tuning.images], reference[: tuning.images], objective, held_out=held_out):
        pass
    handle.remove()
    model.requires_grad_(False)
    work = tuning_work(100, tuning, Networks(call=1.0, training=3.0))
    again = tuning.images * tuning.epochs * 2 if tuning.memory == "checkpoint" else 0
    assert seen == work.calls + again
    assert work.flops == work.calls + again + 2 * tuning.images * tuning.epochs * 2


def test_fewer_latents_than_asked_for_are_fewer_calls() -> None:
    tuning = Tuning(images=48, held_out=10, epochs=1, steps_down=2)
    assert tuning_work(25, tuning, Networks(call=1.0)).images == 15
    assert tuning_work(25, tuning, Networks(call=1.0)).calls == 2 * 25
    assert tuning_work(10_000, tuning, Networks(call=1.0)).images == 48


def test_the_last_batch_of_each_block_is_filled_up() -> None:
    assert images_of([10, 10, 3], 4) == 12 + 12 + 4
    work = pass_work([10, 3], 4, calls=5, networks=Networks(call=2.0, clip=1.0, identity=10.0), scored=(1, 2))
    assert (work.rows, work.images, work.calls, work.parts) == (13, 16, 80, 2)
    assert work.flops == 16 * 5 * 2 + 13 * 2 * (1 + 20)


def test_time_is_that_of_the_busiest_worker() -> None:
    work = Work(rows=6, images=6, calls=6, flops=600.0, cpu_seconds=3.0, parts=3)
    assert seconds(work, 100.0, workers=1, share=1.0) == pytest.approx(9.0)
    assert seconds(work, 100.0, workers=2, share=1.0) == pytest.approx(6.0)  # one of the two takes two of three blocks
    assert seconds(work, 100.0, workers=9, share=1.0) == pytest.approx(3.0)
    assert seconds(work, 100.0, workers=1, share=0.5) == pytest.approx(15.0)
    assert seconds(replace(work, parts=0, flops=0.0), 100.0, workers=2, share=1.0) == 0


def test_a_spread_sample_is_even_and_has_no_more_than_there_is() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread([1, 2], 4) == [1, 2]


def test_a_sample_says_how_large_rows_are_and_which_are_rejects(tmp_path: Path) -> None:
    data = [encode_png(np.asarray(picture(i, 32)).transpose(2, 0, 1)) for i in range(9)]
    rows = pa.table({"id": [str(i) for i in range(10)], "image": [*data, b"text"], "note": ["x" * 100] * 10})
    pq.write_table(rows, tmp_path / "rows.parquet", row_group_size=5)
    found = find(Source(path=str(tmp_path)))
    assert bytes_read(found) == os.path.getsize(tmp_path / "rows.parquet") / 10  # noqa: PTH202
    seen = sample(found, plan_blocks(found, 5), 32, (), 10**6)
    assert seen.rows == 10
    assert len(seen.reasons) == 1
    assert seen.latents > 3 * 32 * 32 * 2 * 0.9
    assert seen.edits[0] < seen.edits[1] < seen.latents
    assert min(seen.decoding, seen.encoding, seen.scoring) >= 0
