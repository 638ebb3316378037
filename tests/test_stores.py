"""What would be lost: weights in buckets and on web servers, and one line that says what to do when they are not to be had."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from servers import Web

from models import stores
from models.references import MissingError, UnreachableError, WeightsError


@pytest.fixture
def clients() -> Iterator[None]:
    """S3 clients made from the environment of this test, and forgotten with it."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_file_is_the_same_until_it_changes(s3: str, web: Web) -> None:
    for root in (s3, str(web.folder)):
        fsspec.open(f"{root}/same/a.bin", "wb", auto_mkdir=True).open().close()
    for url in (f"{s3}/same/a.bin", f"{web.url}/same/a.bin"):
        before = stores.identity(url)
        assert before == stores.identity(url)
        with fsspec.open(url.replace(web.url, str(web.folder)), "wb") as stream:
            stream.write(b"other")
        assert stores.identity(url) != before


def test_a_file_comes_whole_and_quietly(s3: str, web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fsspec.filesystem("s3").pipe("shared/whole/a.bin", b"in a bucket")
    (web.folder / "a.bin").write_bytes(b"on the web")
    stores.download(f"{s3}/whole/a.bin", tmp_path / "a", 11)
    stores.download(f"{web.url}/a.bin?token=1", tmp_path / "b", None)
    assert (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"in a bucketon the web"
    assert capfd.readouterr().err == "", "a bar is for terminals"


def test_a_folder_tells_its_names(s3: str, web: Web) -> None:
    fsspec.filesystem("s3").pipe({f"shared/names/{name}": b"" for name in ("b.json", "a.safetensors", "deep/c")})
    assert stores.names(f"{s3}/names") == stores.names(f"{s3}/names/") == ["a.safetensors", "b.json", "deep"]
    (web.folder / "names").mkdir()
    for name in ("b.json", "a.safetensors"):
        (web.folder / "names" / name).touch()
    assert stores.names(f"{web.url}/names/") == ["a.safetensors", "b.json"]


def test_what_is_not_there_is_missing(s3: str, web: Web, tmp_path: Path) -> None:
    fsspec.filesystem("s3").pipe("shared/missing/a/b", b"")
    for url in (f"{s3}/missing/b", "s3://no-such-bucket/a", f"{web.url}/none.bin"):
        with pytest.raises(MissingError, match=rf"^{url} does not exist$"):
            stores.identity(url)
        with pytest.raises(MissingError, match="does not exist"):
            stores.download(url, tmp_path / "none", None)
        with pytest.raises(MissingError, match="does not exist"):
            stores.names(url)
    with pytest.raises(MissingError, match=r"missing/a is a folder, not a file"):
        stores.identity(f"{s3}/missing/a")


def test_a_bucket_without_credentials_says_which_to_set(s3: str, clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(
        WeightsError, match=r"^s3://shared/a may not be read; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
    ):
        stores.identity(f"{s3}/a")


def test_what_is_forbidden_says_how_to_be_allowed(s3: str, web: Web, clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="denied/a may not be read; use an address that needs no login"):
        stores.identity(f"{web.url}/denied/a?signature=expired")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{web.url}/denied")
    with pytest.raises(WeightsError, match="s3://shared/a may not be read; set AWS_ACCESS_KEY_ID"):
        stores.identity(f"{s3}/a")


def test_a_store_that_fails_is_told_from_a_file_that_is_missing(
    s3: str, web: Web, clients: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnreachableError, match=r"cannot be reached \(HTTP 500\); check the address and the network"):
        stores.identity(f"{web.url}/broken/a")
    with pytest.raises(UnreachableError, match=r"cannot be reached \(ConnectionRefusedError\)"):
        stores.identity("http://127.0.0.1:9/a")
    with pytest.raises(UnreachableError, match="cannot be reached"):
        stores.download(f"{web.url}/cut/a", tmp_path / "a", 1000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UnreachableError, match=r"cannot be reached \(EndpointConnectionError\)"):
        stores.identity(f"{s3}/a")


def test_a_file_shorter_than_its_store_said_is_cut(s3: str, tmp_path: Path) -> None:
    fsspec.filesystem("s3").pipe("shared/short/a", b"few")
    with pytest.raises(UnreachableError, match="was cut short: 3 of 1000 bytes came"):
        stores.download(f"{s3}/short/a", tmp_path / "a", 1000)


@pytest.mark.parametrize("path", ["none", "denied/a", "broken/a"])
def test_no_message_repeats_a_password_or_a_signature(web: Web, tmp_path: Path, path: str) -> None:
    url = web.url.replace("http://", "http://me:hunter2@") + f"/{path}?X-Amz-Signature=hunter2"
    for ask in (stores.identity, stores.names, lambda url: stores.download(url, tmp_path / "a", None)):
        with pytest.raises(WeightsError, match=f"^{web.url}/{path} ") as caught:
            ask(url)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__suppress_context__, "the store's own error is not shown"


def test_a_protocol_that_nobody_speaks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"^floppy://a/b cannot be opened: Protocol not known: floppy"):
        stores.identity("floppy://me:secret@a/b")
