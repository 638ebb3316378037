"""What would be lost: a model is downloaded once, is the one that was asked for, and is still there without a network."""

import hashlib
import json
import os
import threading
from pathlib import Path

import fsspec
import pytest
from servers import Web, elsewhere, ended, start_elsewhere
from tiny import refusal

from models.fetching import cache_folder, check_file, digest, file_of, first_in, names_in
from models.references import MissingError, NotCachedError, UnreachableError, WeightsError

FETCH = "from models.fetching import file_of\nprint(file_of('{}').read_text())"
"""In a process of its own: this one remembers what it has asked."""


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def records(cache: Path) -> list[Path]:
    return list((cache / "references").glob("*.json"))


def copies(cache: Path) -> list[Path]:
    return [file for file in (cache / "files").rglob("*") if file.is_file()]


def test_a_local_file_is_used_where_it_is(tmp_path: Path, empty_cache: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_text("here")
    assert file_of(file) == file_of(str(file)) == file_of(f"file://{file}") == file_of(f"{file}#sha256={sha256('here')}") == file
    assert not empty_cache.exists()
    with pytest.raises(MissingError, match=r"none\.bin does not exist"):
        file_of(tmp_path / "none.bin")
    with pytest.raises(MissingError, match="is a folder, not a file"):
        file_of(tmp_path)
    with pytest.raises(MissingError, match=r"^edits/none\.safetensors does not exist$"):
        file_of("edits/none.safetensors")


def test_a_file_with_another_digest_is_refused_with_both(tmp_path: Path, web: Web, empty_cache: Path) -> None:
    (tmp_path / "a.bin").write_text("local")
    (web.folder / "a.bin").write_text("remote")
    for place, text in ((str(tmp_path / "a.bin"), "local"), (f"{web.url}/a.bin", "remote")):
        with pytest.raises(WeightsError, match=rf"a\.bin should have SHA-256 {sha256('other')} and has {sha256(text)}; get the right file"):
            file_of(f"{place}#sha256={sha256('other')}")
    assert copies(empty_cache) == [], "what was not wanted is not kept"
    assert file_of(f"{web.url}/a.bin#sha256={sha256('remote')}").read_text() == "remote"


def test_a_remote_file_keeps_its_name_and_comes_once(s3: str, web: Web, empty_cache: Path) -> None:
    fsspec.filesystem("s3").pipe("shared/once/a.bin", b"in a bucket")
    (web.folder / "a.bin").write_text("on the web")
    for url, text in ((f"{s3}/once/a.bin", "in a bucket"), (f"{web.url}/a.bin", "on the web")):
        assert file_of(url).name == "a.bin"
        assert file_of(url).read_text() == text
        assert elsewhere(FETCH.format(url)) == text
    assert web.asked.count("GET /a.bin") == 1
    assert len(copies(empty_cache)) == 2


def test_the_next_process_sees_that_a_file_has_changed(s3: str, web: Web, empty_cache: Path) -> None:
    for text in ("old", "new weights"):
        fsspec.filesystem("s3").pipe("shared/changed/a.bin", text.encode())
        (web.folder / "a.bin").write_text(text)
        for url in (f"{s3}/changed/a.bin", f"{web.url}/a.bin"):
            assert elsewhere(FETCH.format(url)) == text


def test_a_store_that_tells_no_more_than_the_size_is_asked_again_for_the_file(web: Web, empty_cache: Path) -> None:
    (web.folder / "silent").mkdir()
    for text in ("old", "new"):
        (web.folder / "silent" / "a.bin").write_text(text)
        assert elsewhere(FETCH.format(f"{web.url}/silent/a.bin")) == text


def test_a_pinned_file_in_the_cache_is_used_without_asking_anybody(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("pinned")
    url = f"{web.url}/a.bin#sha256={sha256('pinned')}"
    assert elsewhere(FETCH.format(url)) == "pinned"
    web.asked.clear()
    assert elsewhere(FETCH.format(url)) == "pinned"
    assert web.asked == []


def test_whether_a_file_can_be_had_is_known_without_fetching_it(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("large")
    check_file(f"{web.url}/a.bin")
    assert "GET /a.bin" not in web.asked
    for name, says in (("none.bin", "does not exist"), ("denied/a.bin", "may not be read"), ("broken/a.bin", "cannot be reached")):
        assert says in refusal(lambda name=name: check_file(f"{web.url}/{name}"))  # type: ignore[misc]


def test_offline_only_the_cache_is_used(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("cached")
    assert elsewhere(FETCH.format(f"{web.url}/a.bin")) == "cached"
    web.asked.clear()
    for name in ("HF_HUB_OFFLINE", "DIFFUSIONCLIP_OFFLINE"):
        assert elsewhere(FETCH.format(f"{web.url}/a.bin"), **{name: 1}) == "cached"
        said = elsewhere(FETCH.format(f"{web.url}/b.bin"), **{name: 1})
        assert said.startswith(f"NotCachedError {web.url}/b.bin is not in the cache {empty_cache} and offline mode is on")
        assert said.endswith("use it once where there is a network, or give the path of a local copy")
    assert web.asked == []


def test_a_store_that_is_down_is_replaced_by_the_cache(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("cached")
    url = f"{web.url}/a.bin"
    assert elsewhere(FETCH.format(url)) == "cached"
    record = json.loads(records(empty_cache)[0].read_text())
    down = "http://127.0.0.1:9/a.bin"
    record_of_down = empty_cache / "references" / f"{sha256(down)}.json"
    with pytest.raises(UnreachableError, match="cannot be reached"):
        file_of(down)
    record_of_down.write_text(json.dumps({**record, "reference": down}))
    assert file_of(down).read_text() == "cached"


def test_a_damaged_copy_is_refused_with_both_digests(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("whole")
    url = f"{web.url}/a.bin"
    elsewhere(FETCH.format(url))
    (copy,) = copies(empty_cache)
    copy.write_text("whale")
    for env in ({}, {"DIFFUSIONCLIP_OFFLINE": 1}):
        said = elsewhere(FETCH.format(url), **env)
        assert f"{copy}, the copy of {url}, is damaged: it should have SHA-256 {sha256('whole')} and has {sha256('whale')}" in said
        assert said.endswith("delete it and run again")
    copy.unlink()
    assert elsewhere(FETCH.format(url)) == "whole"


def test_a_copy_that_was_only_touched_is_read_again_once(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("whole")
    elsewhere(FETCH.format(f"{web.url}/a.bin"))
    (copy,), (record,) = copies(empty_cache), records(empty_cache)
    os.utime(copy, ns=(1, 1))
    assert elsewhere(FETCH.format(f"{web.url}/a.bin")) == "whole"
    assert json.loads(record.read_text())["mtime_ns"] == 1
    assert web.asked.count("GET /a.bin") == 1


def test_the_cache_holds_no_credentials(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("x")
    url = web.url.replace("http://", "http://me:hunter2@") + "/a.bin?X-Amz-Signature=hunter2"
    assert file_of(url).name == "a.bin"
    everything = [str(file) + file.read_text() for file in empty_cache.rglob("*") if file.is_file()]
    assert len(everything) >= 2
    assert not any("hunter2" in text for text in everything)


def test_queries_tell_files_apart_and_users_do_not(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("x")
    for url in (f"{web.url}/a.bin?id=1", f"{web.url}/a.bin?id=2", web.url.replace("http://", "http://me:pw@") + "/a.bin?id=2"):
        file_of(url)
    assert len(records(empty_cache)) == 2


def test_of_two_processes_one_downloads_and_both_have_the_file(web: Web, empty_cache: Path) -> None:
    (web.folder / "a.bin").write_text("shared")
    both_have_asked = threading.Event()

    def hold_the_file_back(request: str) -> None:
        if web.asked.count("HEAD /a.bin") == 2:
            both_have_asked.set()
        if request == "GET /a.bin":
            assert both_have_asked.wait(60), "the processes did not meet"

    web.on_request = hold_the_file_back
    processes = [start_elsewhere(FETCH.format(f"{web.url}/a.bin")) for _ in range(2)]
    assert [ended(process) for process in processes] == ["shared", "shared"]
    assert web.asked.count("GET /a.bin") == 1
    assert not list(empty_cache.rglob("*.part"))


def test_a_cache_that_cannot_be_written_says_what_to_set(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (web.folder / "a.bin").write_text("x")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFUSIONCLIP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WeightsError, match=r"cannot write to the cache .*file/cache \(Not a directory\); .* set DIFFUSIONCLIP_CACHE"):
        file_of(f"{web.url}/a.bin")


def test_a_failed_download_leaves_nothing(web: Web, empty_cache: Path) -> None:
    with pytest.raises(UnreachableError):
        file_of(f"{web.url}/cut/a.bin")
    assert records(empty_cache) == copies(empty_cache) == list(empty_cache.rglob("*.part")) == []


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DIFFUSIONCLIP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "diffusionclip"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/diffusionclip")
    monkeypatch.setenv("DIFFUSIONCLIP_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")


def test_the_first_file_that_a_folder_has_is_found(s3: str, web: Web, tmp_path: Path, empty_cache: Path) -> None:
    for folder in (tmp_path / "local", web.folder / "deep"):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "b.json").write_text("found")
    fsspec.filesystem("s3").pipe("shared/first/unet/b.json", b"found")
    for folder in (str(tmp_path / "local"), f"{web.url}/deep", f"{s3}/first"):
        found = first_in(folder, ["b.json", "unet/b.json"])
        assert found is not None
        assert (found[0], found[1].read_text()) == ("unet/b.json", "found")
        assert first_in(folder, ["c.json"]) is None


def test_a_folder_is_neither_missing_nor_pinned(tmp_path: Path) -> None:
    for ask in (names_in, lambda folder: first_in(folder, ["a"])):
        with pytest.raises(WeightsError, match=r"none is not a folder; give a local folder, a Hugging Face name \(org/name\) or a URL"):
            ask(tmp_path / "none")
        with pytest.raises(WeightsError, match="#sha256= is of a single file"):
            ask(f"{tmp_path}#sha256={sha256('')}")


def test_a_folder_tells_its_files_and_offline_those_that_were_used(
    s3: str, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local" / "deep").mkdir(parents=True)
    (tmp_path / "local" / "a.json").touch()
    assert names_in(tmp_path / "local") == ["a.json"]
    fsspec.filesystem("s3").pipe({f"shared/told/{name}": b"" for name in ("a.json", "b.json", "deep/c.json")})
    assert {"a.json", "b.json"} <= set(names_in(f"{s3}/told"))
    file_of(f"{s3}/told/a.json")
    file_of(f"{s3}/told/deep/c.json")
    monkeypatch.setenv("DIFFUSIONCLIP_OFFLINE", "1")
    assert names_in(f"{s3}/told") == names_in(f"{s3}/told/") == ["a.json"]
    with pytest.raises(MissingError, match="s3://shared/other does not exist, or nothing of it is in the cache"):
        names_in(f"{s3}/other")
    with pytest.raises(NotCachedError, match="offline mode is on"):
        first_in(f"{s3}/told", ["b.json", "d.json"])


def test_a_digest_follows_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for text in ("one", "three", "seven"):
        file.write_text(text)
        os.utime(file, ns=(len(text), sum(text.encode())))
        assert digest(file) == sha256(text)
