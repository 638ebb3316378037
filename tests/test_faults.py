"""What would be lost: rows, or the right pixels, when processes, nodes, disks and stores fail. On real Ray processes."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import faulty
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TinyDomain
from faulty_s3 import FaultyS3, faulty_s3
from fsspec.implementations.local import LocalFileSystem
from servers import Web

from models.domains import Domain
from models.stores import has_folders
from pipeline import dataset, isolation, schema
from pipeline.config import ConfigError, Resources, Run, Source
from pipeline.faults import JobError, explained, from_bytes, to_bytes
from pipeline.manifest import read_manifest, write_in_one_stroke
from pipeline.plan import make_plan
from pipeline.resume import clear
from pipeline.worker import Worker, read

# ---- without Ray -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[], [0], [63], [5, 6], [0, 21, 42, 63]])
def test_the_rows_that_kill_a_process_are_found_among_64_with_few_deaths(bad: list[int]) -> None:
    deaths = []

    def survives(rows: Sequence[int]) -> bool:
        if dies := bool(set(rows) & set(bad)):
            deaths.append(rows)
        return not dies

    assert isolation.fatal_rows(range(64), survives) == bad
    assert len(deaths) <= len(bad) * (6 + isolation.ALONE)


def test_a_row_is_not_blamed_for_a_death_that_does_not_happen_again() -> None:
    dies = iter([True] * 3)
    assert isolation.fatal_rows(range(8), lambda rows: not next(dies, False)) == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "x cannot be written (No space left on device); make room, then give"),
        (OSError(errno.EROFS, "Read-only file system"), "see to the permissions, or renew the credentials"),
        (PermissionError("The provided token has expired."), "(The provided token has expired.); see to the permissions, or renew"),
        (pa.ArrowInvalid("Couldn't deserialize thrift\nmore"), "(Couldn't deserialize thrift); see that the file is whole"),
    ],
)
def test_what_storage_refuses_is_said_in_one_line_with_what_to_do(error: Exception, says: str) -> None:
    with pytest.raises(JobError) as caught, explained("x cannot be written"):
        raise error
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faults_of_the_program_keep_their_class_and_their_traceback_on_the_way_to_the_driver() -> None:
    class OddError(Exception):
        def __init__(self, a: int, b: int):
            super().__init__(f"{a} and {b}")

    with pytest.raises(ZeroDivisionError), explained("x"):
        raise ZeroDivisionError
    try:
        raise KeyError("here")
    except KeyError as error:
        back = from_bytes(to_bytes(error))
    assert isinstance(back, KeyError)
    assert "test_faults.py" in back.__notes__[0]
    assert str(from_bytes(to_bytes(OddError(1, 2)))) == "OddError: 1 and 2"


def test_a_full_disk_is_not_filled_further_by_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(fsspec.get_filesystem_class("file")):  # type: ignore[misc]
        def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
            Path(path).write_bytes(value[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    fsspec.register_implementation("file", Full, clobber=True)
    try:
        with pytest.raises(OSError, match="No space"):
            write_in_one_stroke(str(tmp_path), "part.parquet", b"whole")
    finally:
        fsspec.register_implementation("file", Full.__base__, clobber=True)
    assert list(tmp_path.iterdir()) == []


class Shelf(LocalFileSystem):
    """Files on a server, as far as its clients can tell: there is no protocol ``file``, and no renaming over what is there."""

    protocol = "shelf"
    room = 1000

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("shelf://")))

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        assert not Path(path).name.startswith("part"), "whoever looks now sees half a file"
        Path(path).write_bytes(value[: self.room])
        if len(value) > self.room:
            raise OSError("the connection broke")

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        if Path(path2).exists():
            raise FileExistsError(path2)
        Path(path1).rename(path2)


@pytest.fixture
def shelf(tmp_path: Path) -> str:
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    return f"shelf://{tmp_path}/out"


def test_a_file_on_a_server_that_is_no_object_store_is_never_seen_half_and_may_be_replaced(shelf: str) -> None:
    folder = Path(shelf.removeprefix("shelf://"))
    clear(shelf, lambda name: False)
    for data in (b"first", b"second"):
        write_in_one_stroke(shelf, "part.parquet", data)
        assert [file.read_bytes() for file in folder.iterdir()] == [data]
    with pytest.raises(OSError, match="the connection broke"):
        write_in_one_stroke(shelf, "part.parquet", bytes(2000))
    assert [file.read_bytes() for file in folder.iterdir()] == [b"second"]


def test_an_object_store_gets_a_file_in_one_stroke_and_no_folders() -> None:
    assert not has_folders(fsspec.filesystem("s3"))
    assert not has_folders(fsspec.filesystem("dir", path="bucket/deep", fs=fsspec.filesystem("s3")))
    write_in_one_stroke("memory://stroke/out", "part.parquet", b"whole")
    assert fsspec.filesystem("memory").find("stroke") == ["/stroke/out/part.parquet"]


def test_a_signed_address_in_what_a_store_says_is_not_told(web: Web) -> None:
    signed = f"{web.url}/denied/part-1?X-Amz-Signature=hunter2".replace("http://", "http://me:hunter2@")
    with pytest.raises(JobError, match="403") as caught, explained(f"{signed} cannot be read"):
        fsspec.filesystem("http").cat_file(signed)
    assert f"{web.url}/denied/part-1" in str(caught.value)
    assert "hunter2" not in str(caught.value)


# ---- with Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(s3: str) -> Iterator[FaultyS3]:
    """The S3 of this module, for the processes of its cluster too: a proxy that a test can make fail."""
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield proxy
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def ray_cluster(store: FaultyS3) -> Iterator[None]:
    with faulty.cluster(0):
        yield


@pytest.fixture(scope="module")
def domain(tiny_domain: TinyDomain) -> Domain:
    return tiny_domain()


Make = Callable[..., Run]


@pytest.fixture
def make_run(domain: Domain, save_pictures: Callable[..., Path], tmp_path: Path) -> Make:
    """``make_run(rows, **changes)``: latents of pictures, three rows a block, on two workers."""

    def made(rows: int, **changes: Any) -> Run:
        pictures = save_pictures(*(f"{i:03}.png" for i in range(rows)))
        resources = Resources(workers=2, cpus=0.5, batch=4, block_rows=3)
        run = Run(source=Source(path=str(pictures)), output=str(tmp_path / "out"), domain=domain, recipe=domain.recipe, resources=resources)
        return replace(run, **changes)

    return made


def calm(run: Run) -> dict[str, Any]:
    """What an uninterrupted run gives: latents by id, computed in this process."""
    plan = make_plan(replace(run, output=f"{run.output}-calm"))
    worker = faulty.Light(plan.run, plan.outputs, False)
    tables = [done for block in plan.blocks for _, done in worker.compute(read(plan.found, block), {})]
    return {row["id"]: row["latent"] for table in tables for row in table.to_pylist()}


def carry_out(run: Run, kind: type[Worker], monkeypatch: pytest.MonkeyPatch) -> dataset.Report:
    monkeypatch.setattr(dataset, "Worker", kind)
    return dataset.execute(make_plan(run))


@pytest.mark.usefixtures("ray_cluster")
def test_after_a_bad_day_every_row_is_there_once_with_its_pixels_and_only_guilty_ones_are_rejects(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constructors that fail twice, workers killed in the middle, corrupt pictures, and one that kills every process."""
    run = make_run(16, resources=Resources(workers=1, cpus=0.5, batch=4, block_rows=2))
    wanted = calm(run)
    pictures = Path(run.source.path)
    (pictures / "007.png").write_bytes((pictures / "007.png").read_bytes()[:40])
    with (pictures / "013.png").open("ab") as file:
        file.write(faulty.POISON)
    report = carry_out(run, faulty.BadDay, monkeypatch)
    rows = faulty.rows_of(run.output)
    errors = {name: row["error"] for name, row in rows.items() if row["error"]}
    assert sorted(rows) == sorted(wanted)
    assert sorted(errors) == ["007.png", "013.png"]
    assert errors["013.png"] == isolation.REASON
    assert {name: row["latent"] for name, row in rows.items() if name not in errors} == {
        name: latent for name, latent in wanted.items() if name not in errors
    }
    assert schema.image_bytes(pq.read_table(run.output, filters=[("id", "=", "013.png")])["image"])[0].endswith(faulty.POISON)
    assert (report.done, report.rejected) == (16, 2)
    assert {"constructor.0", "constructor.1", "killed at 0.0"} <= set(faulty.traces(run))


@pytest.mark.usefixtures("ray_cluster")
def test_a_gpu_with_little_memory_does_the_job_and_the_manifest_says_how(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(6)
    wanted = calm(run)
    report = carry_out(run, faulty.LittleMemory, monkeypatch)
    rows = faulty.rows_of(run.output)
    assert {name: row["latent"] for name, row in rows.items()} == wanted
    assert read_manifest(run.output)["batch"] == report.batch == 2


@pytest.mark.usefixtures("ray_cluster")
def test_a_disk_that_fills_up_ends_the_job_with_one_line_and_afterwards_it_goes_on(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(15)
    wanted = calm(run)
    with pytest.raises(JobError, match=r"part-\d{12}\.parquet cannot be written \(File too large\); make room, then give the same command"):
        carry_out(run, faulty.FullDisk, monkeypatch)
    assert not list(Path(run.output).glob(".part*"))
    report = carry_out(run, faulty.Light, monkeypatch)
    assert report.resumed >= 6
    assert {name: row["latent"] for name, row in faulty.rows_of(run.output).items()} == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_when_rows_are_looked_at_alone_a_constructor_may_fail_or_die_at_first_and_not_for_ever(make_run: Make) -> None:
    plan = make_plan(make_run(3))
    clear(plan.run.output, lambda name: False)
    arguments = (plan.run, plan.outputs, False), plan.found
    attempts = isolation.Attempts(plan.run.resources, faulty.LateStarter, *arguments)
    assert isolation.finish(attempts, plan.blocks[0])["rows"].to_pylist() == [3]
    attempts.end()
    assert (attempts.deaths, set(faulty.traces(plan.run))) == (0, {"raised.0", "raised.1", "died.0"})
    with pytest.raises(JobError, match=r"on a worker, there is no x on this node; every node must have the file .*: mend that, then give"):
        isolation.Attempts(plan.run.resources, faulty.NeverStarts, *arguments)("tried", plan.blocks[0], [0])


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which can be made read-only."""
    (folder := tmp_path / "mounted").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("only who may mount can make a file system read-only")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.usefixtures("ray_cluster")
def test_an_output_that_becomes_read_only_ends_the_job_and_one_that_is_read_only_is_refused_before_it_starts(
    make_run: Make, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(15, output=str(mounted))
    with pytest.raises(JobError, match=r"cannot be written \(Read-only file system\); see to the permissions, or renew"):
        carry_out(run, faulty.ReadOnly, monkeypatch)
    with pytest.raises(ConfigError, match=f"the output {mounted} cannot be written to: .*Read-only file system"):
        make_plan(run)
    assert faulty.remount(mounted, "rw") == 0
    report = carry_out(run, faulty.Light, monkeypatch)
    assert report.resumed >= 6
    assert len(faulty.rows_of(run.output)) == report.done == 15


@pytest.mark.usefixtures("ray_cluster")
def test_a_file_system_without_room_ends_the_job_with_one_line_and_with_room_it_goes_on(
    make_run: Make, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert faulty.remount(mounted, "size=1m") == 0
    run = make_run(15, output=str(mounted))
    wanted = calm(replace(run, output=str(mounted.parent / "out")))
    with pytest.raises(JobError, match=r"cannot be written \(No space left on device\); make room, then give the same command again"):
        carry_out(run, faulty.Filled, monkeypatch)
    assert not list(mounted.glob(".part*"))
    (mounted / faulty.BALLAST).unlink()
    report = carry_out(run, faulty.Light, monkeypatch)
    assert report.resumed >= 6
    assert {name: row["latent"] for name, row in faulty.rows_of(run.output).items()} == wanted


@pytest.mark.usefixtures("ray_cluster")
def test_a_bad_day_of_s3_while_its_rows_are_read_loses_and_doubles_none(
    make_run: Make, store: FaultyS3, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(15)
    wanted = calm(run)
    rows = [{"id": name, "image": {"bytes": Path(run.source.path, name).read_bytes(), "path": None}} for name in sorted(wanted)]
    with fsspec.open(f"{s3}/read/in.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), ("image", schema.IMAGE)])), file, row_group_size=3)
    numbers, kinds = count(), ["busy", "reset", "cut"]

    def fault(method: str, path: str) -> str | None:
        number = next(numbers) if method == "GET" and "in.parquet" in path else 1
        return kinds[number // 2 % len(kinds)] if number % 2 == 0 else None

    store.happened.clear()
    monkeypatch.setattr(store, "fault", fault)
    report = carry_out(replace(run, source=Source(path=f"{s3}/read/in.parquet")), faulty.Light, monkeypatch)
    assert {name: row["latent"] for name, row in faulty.rows_of(run.output).items()} == wanted
    assert (report.done, report.rejected) == (15, 0)
    assert set(store.happened) >= set(kinds)


def bad_day(forbidden: str) -> Callable[[str, str], str | None]:
    """Every third request goes wrong, in every way in turn; one file may not be written at all."""
    numbers, kinds = count(), ["busy", "reset", "lost", "cut", "slow", "down"]

    def fault(method: str, path: str) -> str | None:
        if method == "PUT" and forbidden in path:
            return "expired"
        number = next(numbers)
        return kinds[number // 3 % len(kinds)] if number % 3 == 0 else None

    return fault


@pytest.mark.usefixtures("ray_cluster")
def test_a_bad_day_of_s3_is_waited_out_and_expired_credentials_end_the_job_with_one_line(
    make_run: Make, store: FaultyS3, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(15)
    wanted = calm(run)
    run = replace(run, output=f"{s3}/faults/latents")
    monkeypatch.setattr(store, "fault", bad_day("part-000000000009"))
    with pytest.raises(JobError, match=r"cannot be written \(The provided token has expired\.\); see to the permissions, or renew"):
        carry_out(run, faulty.Light, monkeypatch)
    monkeypatch.setattr(store, "fault", bad_day("none of them"))
    report = carry_out(run, faulty.Light, monkeypatch)
    assert report.resumed >= 3
    assert {name: row["latent"] for name, row in faulty.rows_of(run.output).items()} == wanted
    assert set(store.happened) >= {"busy", "reset", "lost", "cut", "slow", "down", "expired"}
