"""A block that ended its worker process again and again: which rows do that, and all its other rows done.

It is computed in a process that does nothing else, then its halves, and so on. A row is blamed only if it ends the process alone,
``ALONE`` times, and never when it was the node that went.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from models.references import EVERY_NODE, told_in
from pipeline.config import Resources
from pipeline.faults import AGAIN, JobError, from_bytes, to_bytes
from pipeline.sources import Block, Input
from pipeline.worker import BlockWorker, read

ALONE = 2
"""So often a row alone must end a process before it is rejected."""
MOST_DEATHS = 60
"""Of isolated processes in one run: more are no matter of single rows."""
STARTS = 4
"""So often a constructor may raise, one time after the other."""
MOST_LOST_NODES = 10
"""Under one call."""
SECONDS = 90.0
"""Until Ray must have found out whether a process that does not answer is dead."""
REASON = "the worker process died whenever it came to this row"


class Isolated:
    """A worker of its own; what it computes on trial is not written."""

    def __init__(self, kind: Callable[..., BlockWorker], arguments: tuple[Any, ...], found: Input):
        self.worker, self.found = kind(*arguments), found

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def tried(self, block: Block, rows: list[int]) -> bytes | None:
        """Computes some rows of a block, by position. Returns the error if one is raised."""
        try:
            for _ in self.worker.compute(read(self.found, block).take(rows), {}):
                pass
        except Exception as error:
            return to_bytes(error)
        return None

    def finished(self, block: Block, poisoned: list[int]) -> pa.Table | bytes:
        """Computes and writes a block with these rows as rejects. Returns the receipt, or the error if one is raised."""
        try:
            return self.worker.finish(read(self.found, block), dict.fromkeys(poisoned, REASON))
        except Exception as error:
            return to_bytes(error)


class Attempts:
    """Calls to an ``Isolated``, one after the other; after each death there is a new one."""

    def __init__(self, resources: Resources, *arguments: Any):
        actor = ray.remote(Isolated).options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_restarts=0)
        self.start: Callable[[], Any] = lambda: actor.remote(*arguments)
        self.actor: Any = None
        self.node = ""
        self.deaths = 0
        self.failed_starts = 0
        """Constructors that raised since one did not."""

    def __call__(self, method: str, *arguments: Any) -> tuple[bool, Any]:
        """Whether the process survived it, and what came back. Raises what was raised there, and JobError if it is no matter of rows."""
        for _ in range(MOST_LOST_NODES):
            if self.actor is None and not self._begin():
                continue
            try:
                answer = ray.get(getattr(self.actor, method).remote(*arguments))
            except RayActorError as error:
                actor, self.actor = self.actor, None
                _wait_for_death(actor, error)
                if self.node not in alive_nodes():
                    continue
                self._count(error)
                return False, None
            if isinstance(answer, bytes):
                raise from_bytes(answer)
            return True, answer
        raise JobError(
            f"{MOST_LOST_NODES} times a node went away, or a process while it started, under one block of rows; "
            "run the same command again when there are steadier ones"
        )

    def _begin(self) -> bool:
        """Starts a process; False if it, or its node, died meanwhile. Raises what its constructor raises each time."""
        actor = self.start()
        try:
            self.node = ray.get(actor.node.remote())
        except RayActorError as error:
            _wait_for_death(actor, error)
            self.failed_starts += error.actor_init_failed
            if self.failed_starts < STARTS:
                return False
            if told := told_in(str(error)):
                raise JobError(f"on a worker, {told}; {EVERY_NODE}: mend that, {AGAIN}") from error
            raise
        self.actor, self.failed_starts = actor, 0
        return True

    def _count(self, error: Exception) -> None:
        self.deaths += 1
        if self.deaths > MOST_DEATHS:
            raise JobError(
                f"{self.deaths} processes died one after the other, which is no matter of single rows ({last_line(error)}); "
                "look at the memory and the drivers of the nodes, then give the same command again"
            )

    def end(self) -> None:
        if self.actor is not None:
            ray.kill(self.actor)


def alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _wait_for_death(actor: Any, error: RayActorError) -> None:
    """An actor that cannot be reached may be on a node that is going away: Ray decides."""
    if isinstance(error, ActorUnavailableError):
        try:
            ray.get(actor.node.remote(), timeout=SECONDS)
        except (RayActorError, GetTimeoutError):
            return


def last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]


def finish(attempts: Attempts, block: Block) -> pa.Table:
    """The receipt of a block that is now written, whatever its rows do. Raises JobError if it ends a process even without them."""
    survived, receipt = attempts("finished", block, [])
    if not survived:
        poisoned = fatal_rows(range(block.rows), lambda rows: attempts("tried", block, list(rows))[0])
        survived, receipt = attempts("finished", block, poisoned)
    if not survived:
        raise JobError(
            f"the worker process dies over the rows from {block.start} on of {block.files[0]}, whichever of them are left out; "
            "see that the file is whole, then give the same command again"
        )
    assert isinstance(receipt, pa.Table)
    return receipt


def fatal_rows(rows: Sequence[int], survives: Callable[[Sequence[int]], bool]) -> list[int]:
    """Those of ``rows``, of which some ended a process together, that end it alone, each time. Halves what does not survive."""
    if len(rows) == 1:
        return list(rows) if not any(survives(rows) for _ in range(ALONE)) else []
    middle = len(rows) // 2
    return [row for half in (rows[:middle], rows[middle:]) if len(half) == 1 or not survives(half) for row in fatal_rows(half, survives)]
