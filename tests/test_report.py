"""What would be lost: a page that anyone can open anywhere, that shows what is in the datasets and runs nothing of it."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import report
from jobs.report import make_page
from pipeline import schema, worker
from pipeline.codec import encode_png
from pipeline.config import ConfigError
from pipeline.manifest import RECORD

HOSTILE = "<script src=https://evil.example/x.js></script><img src=x onerror=alert(1)>\"'</pre></style>"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def png(seed: int, side: int = 32) -> dict[str, Any]:
    return {"bytes": encode_png(np.random.default_rng(seed).integers(0, 256, (3, side, side), np.uint8)), "path": None}


def write_edit(run: Path, parts: Sequence[str], degree: float = 1.0, rows: int = 10, **changed: Any) -> Path:
    """One edits dataset of a run; row 3 is a reject. ``changed``: ``side`` and ``names`` of the rows, ``error``, ``record``."""
    names = changed.get("names") or [f"face-{i}" for i in range(rows)]
    side, error = changed.get("side", 32), changed.get("error", "the image has no bytes")
    attribute = "_and_".join(parts) or "none"
    table = []
    for i, name in enumerate(names):
        row = {"id": name, "image": png(i, side), "attribute": attribute, "degree": degree}
        good = {"edited": png(100 + i, side), "mae": 0.125, "ssim": 0.75, "clip_direction": 0.5}
        table.append(row | ({"image": {"bytes": b""}, "error": error} if i == 3 else good))
    about = {"domain": "pixelface", "family": "pixelface", "edit": [{"name": p, "weight": 1.0} for p in parts], "degree": degree}
    columns = schema.edits_schema(pa.schema([]), (), about)
    folder = run / (attribute[:40] if degree == 1 else f"{attribute}_x{degree:g}")
    folder.mkdir(parents=True)
    worker.write_file(str(folder), "part-000000000000.parquet", pa.Table.from_pylist(table, columns))
    edit = [{"name": p, "weight": 1.0, "file": f"{p}.safetensors", "source": "face", "target": f"face with {p}"} for p in parts]
    record = {"command": "diffusionclip edit faces --attribute glasses", "input": "faces", "domain": "pixelface", "edit": edit}
    record |= {"recipe": {"return_step": 400}, "versions": {"torch": "2"}, "model_calls_per_image": 20, "seconds": 7.25}
    (folder / RECORD).write_text(json.dumps(record | changed.get("record", {})))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_edit(folder, [])
    for degree in (0.5, 1.0, 1.5):
        write_edit(folder, ["glasses"], degree)
    write_edit(folder, ["glasses", "hat"])
    return folder


class Parts(HTMLParser):
    """Tags with their attributes, and the text of each section by the id of its heading."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.section = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs).get("aria-labelledby") or ""

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + f"{data} "

    def images(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]


def page_of(folders: Sequence[Path], out: Path, **options: Any) -> Parts:
    return Parts(make_page([str(f) for f in folders], out, **options).read_text("utf-8"))


def test_a_page_has_scores_pictures_degrees_rejects_and_how_it_was_made(run: Path, tmp_path: Path) -> None:
    page = page_of([run], tmp_path / "new" / "page.html", title="Our faces")
    assert "Our faces" in page.text[""]
    assert "5 edits of 10 images from the domain pixelface" in page.text[""]
    assert re.search(r"glasses \+ hat\s+1.00\s+10\s+9\s+1\s+0.1250\s+0.750\s+0.500\s+–\s+–\s+20\s+7.2", page.text["scores"])  # noqa: RUF001
    assert re.search(r"0\s+reconstruction\s+0.5\s+1\s+1.5", page.text["degrees"])
    assert re.search(r"the image has no bytes\s+1 ", page.text["rejects"])
    assert "face-3" in page.text["rejects"]
    assert "diffusionclip edit faces --attribute glasses" in " ".join(page.text["made"].split())
    assert "“face” → “face with glasses”" in page.text["made"]
    alts = [image["alt"] for image in page.images()]
    assert alts[:4] == [
        "face-0: source",
        "face-0: reconstruction, degree 0",
        "face-0: glasses, degree 1",
        "face-0: glasses + hat, degree 1",
    ]


def test_rows_stand_side_by_side_with_the_reason_where_there_is_no_picture(run: Path, tmp_path: Path) -> None:
    page = page_of([run], tmp_path / "page.html")
    pictures = page.text["pictures"]
    assert "the image has no bytes" in pictures
    assert pictures.count("rejected: the image has no bytes") == 3
    assert len([i for i in page.images() if "source" in (i["alt"] or "")]) == 9
    assert {(i["width"], i["class"]) for i in page.images()} == {("96", "crisp")}


def test_the_same_ids_are_shown_where_another_run_has_them_in_another_order(tmp_path: Path) -> None:
    one = write_edit(tmp_path / "a", [])
    two = write_edit(tmp_path / "b", ["hat"], names=[f"face-{i}" for i in reversed(range(10))])
    three = write_edit(tmp_path / "c", ["beard"], names=["other"])
    page = page_of([one, two, three], tmp_path / "page.html", rows=2)
    shown = {i["alt"]: i["src"] for i in page.images()}
    assert "face-2: hat, degree 1" in shown
    assert shown["face-7: hat, degree 1"] == report._Thumbs({}, {}, 256)._picture(png(102), "", 256).uri
    assert f"{three} holds none of these rows" in " ".join(page.text["pictures"].split())


def test_large_pictures_become_small_ones_and_keep_to_the_number_of_rows(tmp_path: Path) -> None:
    folder = write_edit(tmp_path / "run", ["hat"], rows=12, side=300)
    page = page_of([folder], tmp_path / "page.html", rows=3)
    assert len(page.images()) == 6
    for image in page.images():
        assert (image["class"], image["width"]) == ("photo", "128")
        data = base64.b64decode((image["src"] or "").split(",")[1])
        assert Image.open(io.BytesIO(data)).size == (256, 256)


def test_what_stands_in_the_data_is_shown_and_never_run(tmp_path: Path) -> None:
    names = [HOSTILE, *(f"{i}{HOSTILE}" for i in range(5))]
    record = {"command": f"diffusionclip {HOSTILE} \ud800", "input": HOSTILE, "recipe": {HOSTILE: HOSTILE}, "versions": {"x": HOSTILE}}
    record["edit"] = [{"name": HOSTILE, "weight": HOSTILE, "file": HOSTILE, "source": HOSTILE, "target": HOSTILE}] * 2
    folder = write_edit(tmp_path / "run", ["own<script>"], names=names, error=HOSTILE, record=record)
    page = page_of([folder], tmp_path / "page.html", title=HOSTILE)
    assert not {"script", "iframe", "object", "form", "base"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], (tag, attrs)
        for name in ("src", "href", "srcset", "action"):
            assert (attrs.get(name) or "#").startswith(("data:", "#"))
    assert page.text["rejects"].count(HOSTILE) >= 3
    style = (tmp_path / "page.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_a_page_without_hostile_data_names_no_address(run: Path, tmp_path: Path) -> None:
    page = make_page([str(run)], tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|//[a-z]", re.sub(r'"data:image/png;base64,[^"]*"', "", page))


def test_every_problem_of_a_request_is_named_and_nothing_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_page([f"{tmp_path}/nowhere", str(run)], tmp_path, rows=0)
    assert [p.split(" ")[0:4] for p in caught.value.problems] == [
        ["the", "number", "of", "rows"],
        ["there", "is", "no", "folder"],
        ["the", "page", str(tmp_path), "cannot"],
    ]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        make_page([str(run)], tmp_path / "file" / "page.html")
    with pytest.raises(ConfigError, match="no folder was given"):
        make_page([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_dataset_of_a_run_that_has_not_finished_is_said_to_be_one(tmp_path: Path) -> None:
    folder = write_edit(tmp_path / "run", ["hat"])
    (folder / RECORD).unlink()
    page = page_of([folder], tmp_path / "page.html")
    assert "the run has not finished" in page.text["scores"]
    assert "the run has not finished" in page.text["made"]


def test_a_dataset_without_rows_is_refused_with_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    columns = schema.edits_schema(pa.schema([]), (), {"domain": "pixelface", "edit": [], "degree": 1.0})
    worker.write_file(str(folder), "part-000000000000.parquet", columns.empty_table())
    with pytest.raises(ConfigError, match="has no rows"):
        make_page([str(folder)], tmp_path / "page.html")


# ---- in a browser ----------------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium spoken to in its DevTools protocol over two pipes: JSON messages that end in a zero byte."""

    def __init__(self, profile: Path):
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.fail("the report page is tested in a real browser; install one: apt-get update && apt-get install -y chromium")
        (to_read, self.to), (self.back, to_write) = os.pipe(), os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.number, self.events = b"", 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.back, 1 << 16)
            assert part, "the browser has ended"
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Returns when everything has loaded; ``events`` holds what happened meanwhile."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._receive())

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression in the page; promises are awaited."""
        return self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        os.close(self.to)  # the end of its pipe ends the browser
        os.close(self.back)
        self.process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


LOADED = "Promise.all([...document.images].map(i => i.decode())).then(() => [...document.images].filter(i => i.naturalWidth > 0).length)"
WIDTHS = "[document.scrollingElement.scrollWidth, window.innerWidth]"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_of_it_without_sideways_scrolling_or_network(
    browser: Browser, tmp_path: Path, run: Path, width: int, scheme: str
) -> None:
    names = ["x" * 400, *(f"face-{i}" for i in range(1, 10))]
    extra = write_edit(tmp_path / "extra", ["n" * 300], names=names, side=200, error="e" * 500, record={"command": "c" * 900})
    page = make_page([str(run), str(extra)], tmp_path / "page.html", title="t" * 200)
    expected = len(Parts(page.read_text()).images())
    browser.open(page, width, scheme)
    assert browser.value(LOADED) == expected > 50
    scrolled, window = browser.value(WIDTHS)
    assert scrolled <= window == width
    dark = sum(map(int, re.findall(r"\d+", browser.value("getComputedStyle(document.body).backgroundColor")))) < 384
    assert dark == (scheme == "dark")
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert not [e for e in browser.events if e.get("method") == "Log.entryAdded"]  # what the policy blocked


def test_nothing_in_hostile_data_runs_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    folder = write_edit(tmp_path / "run", ["hat"], names=[HOSTILE, "a", "b", "c", "d"], error=HOSTILE)
    browser.open(make_page([str(folder)], tmp_path / "page.html", title=HOSTILE), 390, "light")
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.querySelector('h1').textContent") == HOSTILE
    assert not [e for e in browser.events if e.get("method") in ("Log.entryAdded", "Page.javascriptDialogOpening")]
