"""How many images a model is given at once; no Ray here."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.config import Resources
from pipeline.faults import JobError

Result = TypeVar("Result")


class Batches:
    """Model calls on so many images as memory holds: ``resources.batch`` of them, and half as many from where it ran out.

    One shape for all batches means one arithmetic: an image's pixels do not depend on how many rows came with it. Another shape
    may differ in the last bit.
    """

    def __init__(self, resources: Resources):
        self.size, self.device = resources.batch, resources.device

    def each(self, count: int, work: Callable[[int, int], Result]) -> list[Result]:
        """``work(start, stop)`` for consecutive runs of at most ``size`` of ``count`` things. Raises JobError if memory does not
        hold a single one."""
        done, start = [], 0
        while start < count:
            try:
                done.append(work(start, min(start + self.size, count)))
            except torch.OutOfMemoryError as error:
                self._halve(str(error))
            else:
                start += self.size
        return done

    def _halve(self, reason: str) -> None:
        if self.size == 1:
            raise JobError(
                f"a single image does not fit into the memory of the GPU ({reason.split('. ')[0]}); use --precision bfloat16, "
                "fewer actors on a GPU (--gpus 1), or a larger one"
            ) from None
        self.size //= 2

    def walk(self, images: Tensor, ids: Sequence[str], work: Callable[[Tensor, Sequence[str]], Tensor]) -> Tensor:
        """``work`` on batches of exactly ``size`` images with their ids, on the device; the last is filled up."""

        def part(start: int, stop: int) -> Tensor:
            batch, names = images[start:stop], list(ids[start:stop])
            missing = self.size - len(batch)
            full = torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)]) if missing else batch
            return work(full.to(self.device), names + names[-1:] * missing)[: len(batch)].cpu()

        return torch.cat(self.each(len(images), part))
