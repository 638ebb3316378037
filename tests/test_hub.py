"""What would be lost: models by their Hugging Face names, later also without a network, and a way out where they are gated."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import COMMIT, elsewhere, hub_server

Ask = Callable[..., str]

READ = "from models.fetching import file_of\nprint(file_of('{}').read_text())"
LIST = "from models.fetching import names_in\nprint(*names_in('{}'))"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The models of a small hub: google/tiny at COMMIT."""
    folder = tmp_path / "models"
    (folder / "google" / "tiny" / "edits").mkdir(parents=True)
    (folder / "google" / "tiny" / "config.json").write_text("config")
    for name in ("b.json", "a.safetensors"):
        (folder / "google" / "tiny" / "edits" / name).write_text(name)
    return folder


@pytest.fixture
def ask(models: Path, tmp_path: Path) -> Iterator[Ask]:
    """``ask(code, **env)``: what a process of its own says, whose hub is on this machine."""
    with hub_server(models) as url:
        settings = {"HF_ENDPOINT": url, "HF_HOME": tmp_path / "hf", "HF_HUB_DISABLE_PROGRESS_BARS": 1}
        yield lambda code, **env: elsewhere(code, **{**settings, **env})


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """What the hub's client leaves in its cache, laid out by hand; returns HF_HOME."""
    home = tmp_path / "home"
    model = home / "hub" / "models--google--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    snapshot = model / "snapshots" / COMMIT
    (snapshot / "edits").mkdir(parents=True)
    (snapshot / "config.json").write_text("cached config")
    (snapshot / "edits" / "a.safetensors").write_text("weights")
    return home


def test_files_come_from_the_hub_and_then_from_its_cache(ask: Ask, tmp_path: Path) -> None:
    for reference in ("hf://google/tiny/config.json", f"hf://google/tiny@{COMMIT}/config.json", "hf://google/tiny@main/config.json"):
        assert ask(READ.format(reference)) == "config"
        assert ask(READ.format(reference), HF_HUB_OFFLINE=1) == "config"
    assert ask(READ.format(f"hf://google/tiny@{COMMIT}/config.json"), HF_ENDPOINT="http://127.0.0.1:9") == "config"
    assert (tmp_path / "hf" / "hub" / "models--google--tiny" / "snapshots" / COMMIT / "config.json").exists()


def test_a_folder_of_a_model_tells_its_files(ask: Ask) -> None:
    assert ask(LIST.format("google/tiny")) == "config.json"
    assert ask(LIST.format("hf://google/tiny/edits")) == "a.safetensors b.json"
    assert ask(LIST.format("hf://google/tiny/none")) == "MissingError hf://google/tiny/none does not exist"


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "DIFFUSIONCLIP_OFFLINE"])
def test_offline_the_hubs_own_cache_serves(ask: Ask, cached: Path, name: str) -> None:
    env = {"HF_HOME": cached, "HF_ENDPOINT": "http://127.0.0.1:9", name: 1}
    assert ask(READ.format("hf://google/tiny/config.json"), **env) == "cached config"
    assert ask(LIST.format("hf://google/tiny/edits"), **env) == "a.safetensors"
    said = ask(READ.format("hf://google/other/config.json"), **env)
    assert said.startswith("NotCachedError hf://google/other/config.json is not in the local cache and offline mode is on")
    assert said.endswith("run: hf download google/other, or give the path of a local copy")
    said = ask(LIST.format("google/other"), **env)
    assert "hf://google/other is not in the local cache (nor is there a local path google/other) and offline mode is on" in said


def test_a_hub_that_cannot_be_reached_is_replaced_by_its_cache(ask: Ask, cached: Path) -> None:
    gone = {"HF_HOME": cached, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask(READ.format("hf://google/tiny/config.json"), **gone) == "cached config"
    said = ask(READ.format("hf://google/other/config.json"), **gone)
    assert said.startswith("NotCachedError hf://google/other/config.json is not in the local cache and the Hugging Face hub at http://127")
    assert "cannot be reached (ConnectError); where there is a network, run: hf download google/other" in said
    assert "and the hub cannot serve hf://down/tiny now (HTTP 503); try again later;" in ask(READ.format("hf://down/tiny/config.json"))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("hf://google/none/config.json", "hf://google/none does not exist or is private; check the name at "),
        ("hf://gated/model/config.json", "hf://gated/model is gated; accept its licence at "),
        ("hf://forbidden/model/config.json", "the hub refuses hf://forbidden/model (HTTP 403); run: hf auth login, or set HF_TOKEN"),
        ("hf://google/tiny@v9/config.json", "hf://google/tiny has no revision v9; see "),
        ("hf://google/tiny/none.json", "hf://google/tiny has no file none.json"),
        ("hf://google/tiny", "hf://google/tiny is a repository; write hf://google/tiny/FILE"),
        ("hf://google/ti--ny/a", "google/ti--ny is not a possible Hugging Face name"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line_with_what_to_do(ask: Ask, reference: str, said: str) -> None:
    answer = ask(READ.format(reference))
    assert said in answer
    assert "\n" not in answer
    if "gated" in said or "private" in said:
        assert answer.endswith("run: hf auth login, or set HF_TOKEN")


def test_a_mistyped_path_that_looks_like_a_name_is_said_to_be_neither(ask: Ask) -> None:
    assert "hf://my/edits does not exist or is private (nor is there a local path my/edits)" in ask(LIST.format("my/edits"))


def test_all_files_of_a_model_are_of_one_commit_though_the_branch_moves_on(ask: Ask, models: Path) -> None:
    code = """
from models.fetching import file_of
first = file_of("hf://google/tiny@moving/config.json")
second = file_of("hf://google/tiny@moving/edits/b.json")
print(first.parent.name, second.parent.parent.name)
"""
    assert ask(code) == f"{COMMIT} {COMMIT}"


def test_a_pinned_digest_is_checked(ask: Ask) -> None:
    answer = ask(READ.format(f"hf://google/tiny/config.json#sha256={'0' * 64}"))
    assert f"hf://google/tiny/config.json should have SHA-256 {'0' * 64} and has b79606fb3afea5bd" in answer
