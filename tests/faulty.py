"""Workers on which something goes wrong, and a cluster to try them on. A fault that has happened leaves a file, since processes die."""

import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from models.references import MissingError
from pipeline import codec, schema
from pipeline.batches import Batches
from pipeline.config import Run, Source
from pipeline.sources import find, plan_blocks, read_block
from pipeline.worker import Output, Worker

POISON = b"poison"
"""At the end of a picture's bytes: decoding it kills the process."""
HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent


def happens(run: Run, name: str, times: int) -> bool:
    """Whether a fault that happens so often in a run, in whatever process, happens now; its traces are beside the output."""
    folder = Path(run.output).parent / "faults"
    folder.mkdir(exist_ok=True)
    for i in range(times):
        with suppress(FileExistsError):
            (folder / f"{name}.{i}").touch(exist_ok=False)
            return True
    return False


class Pictures:
    """In place of the networks, which take seconds to import and know nothing of faults: the latent is the picture itself."""

    def __init__(self, run: Run):
        self.size, self.batches, self.most = run.domain.image_size, Batches(run.resources), 1000

    def __call__(self, table: pa.Table) -> pa.Table:
        pictures, errors = codec.decode_column(table["image"], self.size, schema.MAX_PIXELS)
        latents: list[Any] = list(pictures)
        good = [row for row, picture in enumerate(pictures) if picture is not None]
        if good:
            images = self.batches.walk(codec.to_tensor([latents[row] for row in good]), [str(row) for row in good], self.walk)
            for row, image in zip(good, images.numpy(), strict=True):
                latents[row] = image
        column = codec.latents_to_arrow(latents, self.size)
        return table.append_column("latent", column).append_column("error", pa.array(errors, pa.string()))

    def walk(self, images: torch.Tensor, ids: Any) -> torch.Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return images


class Light(Worker):
    def __init__(self, run: Run, outputs: tuple[Output, ...], has_latents: bool):
        self.run, self.chains = run, [(output, []) for output in outputs]
        self.invert = Pictures(run)  # type: ignore[assignment]


class Poisoned(Light):
    """Dies of a signal, as a broken decoder would make it, at pictures that end in ``POISON``."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        decode = codec.decode

        def fatal(data: bytes | None, *more: Any) -> Any:
            if data is not None and data.endswith(POISON):
                happens(self.run, "poison", 1000)
                os.kill(os.getpid(), signal.SIGSEGV)
            return decode(data, *more)

        codec.decode = fatal  # type: ignore[assignment]


class BadDay(Poisoned):
    """Its constructor fails twice, and the process is killed twice in the middle of a block."""

    def __init__(self, run: Run, outputs: tuple[Output, ...], has_latents: bool):
        if happens(run, "constructor", 2):
            raise RuntimeError("the driver of the GPU is not there yet")
        super().__init__(run, outputs, has_latents)

    def compute(self, table: pa.Table, withheld: Any) -> Iterator[tuple[Output, pa.Table]]:
        for output, done in super().compute(table, withheld):
            if table[schema.ROW][0].as_py() == 0 and happens(self.run, f"killed at {table[schema.ROW][0]}", 1):
                os.kill(os.getpid(), signal.SIGKILL)
            yield output, done


class LittleMemory(Light):
    """Holds two images in a model call."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.invert.most = 2  # type: ignore[union-attr]


class Slow(Light):
    """Takes its time, so that something can happen meanwhile."""

    def finish(self, table: pa.Table, withheld: Any = None) -> pa.Table:
        threading.Event().wait(1)
        return super().finish(table, withheld)


class FullDisk(Light):
    """No file of its process may be longer than a kilobyte once two blocks are written."""

    def finish(self, table: pa.Table, withheld: Any = None) -> pa.Table:
        if not happens(self.run, "room", 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().finish(table, withheld)


BALLAST = "ballast"


class Filled(Light):
    """Something else fills the file system of its output once two blocks are written."""

    def finish(self, table: pa.Table, withheld: Any = None) -> pa.Table:
        if not happens(self.run, "room", 2):
            wait_for_parts(self.run.output, 2)
            with suppress(OSError), Path(self.run.output, BALLAST).open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return super().finish(table, withheld)


class LateStarter(Light):
    """Its constructor raises twice, then its process dies in it."""

    def __init__(self, run: Run, outputs: tuple[Output, ...], has_latents: bool):
        if happens(run, "raised", 2):
            raise RuntimeError("the driver of the GPU is not there yet")
        if happens(run, "died", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(run, outputs, has_latents)


class NeverStarts(Light):
    def __init__(self, *arguments: Any):
        raise MissingError("there is no x on this node")


class ReadOnly(Light):
    """The file system that is mounted at its output becomes read-only once two blocks are written."""

    def finish(self, table: pa.Table, withheld: Any = None) -> pa.Table:
        if not happens(self.run, "room", 2):
            wait_for_parts(self.run.output, 2)
            while remount(self.run.output, "ro"):  # busy as long as a file is open for writing
                pass
        return super().finish(table, withheld)


def wait_for_parts(folder: str | Path, count: int) -> None:
    """Until so many blocks are whole: the other worker may still be writing one that it has finished."""
    while len(list(Path(folder).glob("part-*.parquet"))) < count:
        pass


def remount(folder: str | Path, how: str) -> int:
    return subprocess.run(["mount", "-o", f"remount,{how}", folder], capture_output=True, check=False).returncode


class NoWeights(Light):
    """The node of its first process lacks the weights."""

    def __init__(self, run: Run, outputs: tuple[Output, ...], has_latents: bool):
        here = ray.get_runtime_context().get_node_id()
        happens(run, f"first on {here}", 1 if not traces(run) else 0)
        if f"first on {here}.0" in traces(run):
            raise MissingError(f"there is no {run.domain.weights} on node {here}")
        super().__init__(run, outputs, has_latents)


def traces(run: Run) -> list[str]:
    """Names of the faults that have happened."""
    return sorted(file.name for file in (Path(run.output).parent / "faults").glob("*"))


@contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """A head and further nodes with eight CPUs each, as Ray is told; this process is connected to it, which starts it all."""
    quiet = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    size = {"num_cpus": 8, "object_store_memory": 100_000_000}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**quiet, "PYTHONPATH": f"{ROOT}:{HERE}"}.items():
            patch.setenv(name, value)
        made = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
        Path(ray._private.utils.get_ray_address_file(None)).unlink(missing_ok=True)  # or other processes would take it for theirs
        try:
            for _ in range(nodes):
                made.add_node(**size)
            ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def rows_of(folder: str) -> dict[str, dict[str, Any]]:
    """Rows of an output by id; fails if an id is there twice."""
    found = find_rows(folder)
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def find_rows(folder: str) -> list[dict[str, Any]]:
    found = find(Source(path=folder))
    return [row for block in plan_blocks(found, 1000) for row in read_block(found, block).to_pylist()]
