"""What would be lost: images and their order when memory runs out."""

from collections.abc import Sequence

import pytest
import torch

from pipeline.batches import Batches
from pipeline.config import Resources
from pipeline.faults import JobError


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_batches_have_one_shape_and_lose_and_add_no_image(count: int) -> None:
    x, names = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), [str(i) for i in range(count)]

    def work(batch: torch.Tensor, ids: Sequence[str]) -> torch.Tensor:
        assert batch.shape == (4, 3, 2, 2)
        assert [int(name) for name in ids] == batch[:, 0, 0, 0].int().tolist(), "ids keep to their images"
        return batch + 1

    assert torch.equal(Batches(Resources(batch=4)).walk(x, names, work), x + 1)


def test_memory_that_runs_out_halves_the_batch_for_good_and_every_image_is_walked_once() -> None:
    batches, sizes = Batches(Resources(batch=16)), []

    def work(images: torch.Tensor, ids: Sequence[str]) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert [float(name) for name in ids] == images[:, 0, 0, 0].tolist()
        return images + 1

    for _ in range(2):
        images = torch.arange(10.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        assert torch.equal(batches.walk(images, [str(i) for i in range(10)], work), images + 1)
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 4]


def test_memory_that_does_not_hold_one_image_ends_the_job_with_what_to_do() -> None:
    def work(start: int, stop: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(JobError, match=r"a single image does not fit .*\(CUDA out of memory\); use --precision bfloat16"):
        Batches(Resources(batch=4)).each(4, work)
