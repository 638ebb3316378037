"""What would be lost: a bucket of one's own is reached with options, by the workers too, and no secret gets into a command line."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from fsspec import config
from test_end_to_end import PIXELFACE, TINY, run

from jobs import storage
from pipeline.config import ConfigError


def test_options_become_the_variables_that_the_clients_read() -> None:
    options = ["endpoint_url=http://minio:9000", "region=eu-west-1", "profile=dev", "anon=True", "requester_pays=false"]
    assert storage.parse(options) == {
        "AWS_ENDPOINT_URL_S3": "http://minio:9000",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_PROFILE": "dev",
        "FSSPEC_S3_ANON": "true",
        "FSSPEC_S3_REQUESTER_PAYS": "false",
    }


@pytest.mark.parametrize("name", ["key", "secret", "token", "aws_secret_access_key", "password", "AWS_SESSION_TOKEN", "sas_token"])
def test_secrets_are_refused_with_the_way_that_nobody_sees_and_are_not_repeated(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        storage.parse([f"{name}=hunter2"])
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_every_wrong_option_is_named_at_once() -> None:
    wrong = ["regoin=eu", "anon=maybe", "region=", "endpoint_url=https://me:hunter2@host", "endpoint_url=minio:9000"]
    with pytest.raises(ConfigError) as refused:
        storage.parse(wrong)
    said = str(refused.value)
    assert len(refused.value.problems) == 5
    assert "did you mean 'region'?" in said
    assert "anon must be true or false" in said
    assert "region needs a value" in said
    assert "hunter2" not in said


@pytest.fixture
def kept_settings() -> Iterator[None]:
    """What a command changes in its process is undone."""
    before, settings = dict(os.environ), {name: dict(values) for name, values in config.conf.items()}
    yield
    storage.carried.clear()
    os.environ.clear()
    os.environ.update(before)
    config.conf.clear()
    config.conf.update(settings)


def test_options_reach_the_client_of_this_process(kept_settings: None) -> None:
    storage.use(["anon=true", "endpoint_url=http://127.0.0.1:9"])
    assert fsspec.filesystem("s3").anon is True
    assert storage.carried["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:9"
    assert storage.use(None) is None


def write_partitions(address: str) -> None:
    """Twelve pictures in ``split=train`` and four in ``split=test``, with columns of many kinds."""
    faces = pq.read_table(PIXELFACE.held_out).slice(0, 16).select(["id", "image"])
    more = {
        "age": pa.array(range(16)),
        "tags": pa.array([[{"name": "a", "at": i}, None] if i % 3 else None for i in range(16)]),
        "seen": pa.array([i * 1000 if i % 2 else None for i in range(16)], pa.timestamp("ms", "Europe/Berlin")),
    }
    for name, column in more.items():
        faces = faces.append_column(name, column)
    faces = faces.append_column("split", pa.array(["train"] * 12 + ["test"] * 4))
    fs, root = fsspec.core.url_to_fs(address)
    groups = {"max_rows_per_group": 4, "min_rows_per_group": 4}
    pads.write_dataset(faces, root, filesystem=fs, format="parquet", partitioning=["split"], partitioning_flavor="hive", **groups)


def test_a_partitioned_table_in_a_bucket_of_ones_own_is_inverted_by_condition_and_a_changed_one_is_refused(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_partitions(f"{s3}/storage/faces")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    options = ("--storage-option", f"endpoint_url={endpoint}", "--storage-option", "region=us-east-1")
    words = ("invert", f"{s3}/storage/faces", f"{s3}/storage/latents", *TINY, "--block-rows", "4", "--workers", "1", *options)
    chosen = ("--where", "split == 'train' and age != 5 and age < 8", "--columns", "split,tags,seen")
    run(*words, *chosen)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    files = sorted(file for file in store.ls(f"{s3}/storage/latents", detail=False) if file.endswith(".parquet"))
    assert [file.rpartition("/")[2] for file in files] == ["part-000000000000.parquet", "part-000000000004.parquet"]
    table = pa.concat_tables(pq.read_table(pa.BufferReader(store.cat_file(file))) for file in files)
    source = pq.read_table(PIXELFACE.held_out).slice(0, 8)
    assert table["id"].to_pylist() == [name for i, name in enumerate(source["id"].to_pylist()) if i != 5]
    assert table.column_names == ["id", "image", "tags", "seen", "split", "latent", "error"]
    assert table["latent"].null_count == 0
    assert table["tags"].to_pylist()[:2] == [None, [{"name": "a", "at": 1}, None]]
    assert table.schema.field("seen").type == pa.timestamp("ms", "Europe/Berlin")
    assert set(table["split"].to_pylist()) == {"train"}
    manifest = json.loads(store.cat_file(f"{s3}/storage/latents/_run.json"))
    assert manifest["rows"] == 7
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    refused = run(*words, "--where", "age < 8", "--columns", "split,tags,seen", status=2).stderr
    assert "where was split == 'train' and age != 5 and age < 8, now age < 8" in refused
    assert "finished" in run("status", f"{s3}/storage/latents", *options).stdout


def test_a_secret_on_the_command_line_ends_with_a_line_and_nothing_is_written(tmp_path: Path) -> None:
    words = ("invert", str(tmp_path), str(tmp_path / "out"), "--storage-option", "secret=hunter2")
    refused = run(*words, status=2).stderr
    assert refused.startswith("error: secrets are not taken from the command line")
    assert "hunter2" not in refused
    assert not (tmp_path / "out").exists()


# ---- a store that lets nobody in, does not answer, or has no such bucket ---------------------------------------------


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nothing listens on, and nothing can begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def without_credentials(closed_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"


@pytest.fixture
def out_of_reach(without_credentials: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {"AWS_ACCESS_KEY_ID": "hunter2", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    return f'Could not connect to the endpoint URL: "{os.environ["AWS_ENDPOINT_URL"]}/'


@pytest.mark.parametrize("trouble", ["without_credentials", pytest.param("out_of_reach", marks=pytest.mark.slow)])
def test_a_store_that_lets_nobody_in_or_does_not_answer_is_said_in_one_line_before_anything_starts(
    trouble: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    says, out = request.getfixturevalue(trouble), str(tmp_path / "out")
    for words in (
        ("invert", "s3://faces/deep", out),
        ("edit", "s3://faces", out, "-a", "none"),
        ("invert", str(PIXELFACE.held_out), "s3://latents/deep"),
        ("plan", "invert", "s3://faces/deep", out),
        ("plan", "edit", str(PIXELFACE.held_out), "s3://edits", "-a", "none"),
        ("status", "s3://edits/deep"),
    ):
        (line,) = run(*words, status=2).stderr.splitlines()
        assert line.startswith("error: ")
        assert says in line
        assert "hunter2" not in line
    assert not Path(out).exists()


def test_a_mistyped_bucket_is_refused_and_not_made_and_a_plan_leaves_nothing_in_one_that_is_there(s3: str) -> None:
    store, faces = fsspec.filesystem("s3"), str(PIXELFACE.held_out)
    for words in (("invert", faces, "s3://shraed/out"), ("plan", "invert", faces, "s3://shraed/out")):
        refused = run(*words, *TINY, status=2).stderr
        assert refused == "error: there is no bucket shraed for the output s3://shraed/out; make it first, or see to the name\n"
    run("plan", "invert", faces, f"{s3}/storage/planned", *TINY, "--limit", "4")
    store.invalidate_cache()
    assert not store.exists("shraed")
    assert not store.exists(f"{s3}/storage/planned")
    versions = store.call_s3("list_object_versions", Bucket="shared", Prefix="storage/planned")
    assert not {"Versions", "DeleteMarkers"} & versions.keys()
