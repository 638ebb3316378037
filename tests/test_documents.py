"""What would be lost: whoever follows the documents finds every flag, option, command and link that they name."""

import os
import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
from fsspec import config

from jobs import storage
from jobs.cli import app
from pipeline import schema

ROOT = Path(__file__).parent.parent
OFFICIAL = ROOT / "docs" / "from-diffusionclip.md"
MANUALS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*MANUALS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_of(command: Any) -> set[str]:
    """Those of the command, and of its commands if it is a group."""
    own = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()))


OPTIONS = {name: options_of(command) for name, command in COMMANDS.items()}
FLAGS = {
    "modes": "clip_finetune clip_finetune_eff clip_latent_optim edit_images_from_dataset edit_one_image edit_one_image_eff unseen2unseen",
    "run": "config seed exp comment verbose ni align_face",
    "texts": "edit_attr src_txts trg_txts target_class_num",
    "walk": "t_0 n_inv_step n_train_step n_test_step sample_type eta deterministic_inv",
    "data": "bs_train bs_test n_precomp_img n_train_img n_test_img model_path img_path",
    "tuning": "do_train do_test save_train_image lr_clip_finetune lr_clip_lat_opt n_iter scheduler sch_gamma",
    "loss": "clip_loss_w l1_loss_w id_loss_w clip_model_name",
    "mixing": "hybrid_noise model_ratio",
}
"""Every flag of main.py of the official code."""


# ---- reading Markdown ------------------------------------------------------------------------------------------------

FENCE = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
OURS = re.compile(r"(?:^|[\s/])(?:diffusionclip|python -m jobs\.cli)\s+(.+)")


def command_lines(code: str) -> list[list[str]]:
    """The words after ``diffusionclip`` (or ``python -m jobs.cli``) of each line that has it; comments are left out."""
    found = (OURS.search(line) for line in code.replace("\\\n", " ").splitlines())
    return [words for match in found if match and (words := shlex.split(match[1], comments=True))]


def refused(words: list[str]) -> str | None:
    """Why a command line is impossible, by the command's own parser; nothing is run."""
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]}"
    try:
        COMMANDS[words[0]].make_context(words[0], words[1:])
    except Exception as error:  # typer brings a click of its own, whose classes have no public name
        return f"{' '.join(words)}: {getattr(error, 'message', error) or type(error).__name__}"
    return None


def wrong_options(span: str) -> list[str]:
    """Options in a piece of inline code that its command lacks, or where it names no command that all lack."""
    ours = OURS.search(span)
    words = (ours[1] if ours else span).split()
    if ours and words[0] not in COMMANDS and not words[0].startswith("-"):
        return [f"there is no command {words[0]}"]
    known = OPTIONS.get(words[0], set(chain(*OPTIONS.values())))
    if words[0] not in COMMANDS and not words[0].startswith("--"):
        return []  # of another program
    return [f"{word} in {span!r}" for word in words if re.fullmatch(r"--?[a-z][a-z0-9-]*", word) and word not in known]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As it was before: reading a command line with ``--storage-option`` sets variables."""
    before = dict(os.environ), deepcopy(config.conf), dict(storage.carried)
    yield
    for now, then in zip((os.environ, config.conf, storage.carried), before, strict=True):
        now.clear()
        now.update(then)


def problems(text: str) -> list[str]:
    """What a document says about the command line that is not so."""
    lines = [line for block in FENCE.findall(text) for line in command_lines(block)]
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    return [*filter(None, map(refused, lines)), *chain.from_iterable(map(wrong_options, spans))]


def without_first_column(text: str) -> str:
    """First columns of the page about the official code are the official code's."""
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, home: Path) -> list[str]:
    """Relative links of the document ``home`` to files that are not there, or to headings that they lack."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = home.parent / path if path else home
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def tables(text: str) -> Iterator[list[list[str]]]:
    """Cells of each table of a document, its header first, the line below the header left out."""
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def unmeasured(text: str) -> list[str]:
    """First cells of rows whose measured effect is left out, or that say so without a reason."""
    effects = [rows[1:] for rows in tables(text) if rows[0][-1] == "measured effect"]
    return [row[0] for row in chain.from_iterable(effects) if not row[-1] or re.search(r"not measured(?!: \w)|@", row[-1])]


# ---- the documents ---------------------------------------------------------------------------------------------------


def test_every_flag_of_the_official_code_has_its_row() -> None:
    rows = re.findall(r"^\| `--(\w+)` \|", OFFICIAL.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(" ".join(FLAGS.values()).split())


@pytest.mark.parametrize("file", MANUALS, ids=lambda file: file.name)
def test_commands_and_options_in_the_documents_exist(file: Path) -> None:
    text = file.read_text()
    assert problems(without_first_column(text) if file == OFFICIAL else text) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_can_be_typed(name: str) -> None:
    assert [*filter(None, map(refused, command_lines(COMMANDS[name].help or "")))] == []


@pytest.mark.parametrize("file", LINKED, ids=lambda file: file.name)
def test_links_point_to_files_and_headings_that_are_there(file: Path) -> None:
    assert broken_links(file.read_text(), file) == []


@pytest.mark.parametrize(
    "text",
    [
        "```\ndiffusionclip invent faces/ out\n```",
        "```\ndiffusionclip invert faces/ out \\\n    --eta 1\n```",  # an option of edit
        "```\ndiffusionclip invert faces/\n```",
        "```\nray job submit -- python -m jobs.cli edit faces/ out --steps-down many\n```",
        "say `--smile`",
        "say `invert --eta`",
        "say `diffusionclip invent`",
    ],
)
def test_what_is_wrong_in_a_document_is_found(text: str) -> None:
    assert len(problems(text)) == 1


def test_a_broken_link_is_found_and_a_good_one_is_not() -> None:
    text = "[a](docs/method.md) [b](docs/no.md) [c](README.md#results) [d](README.md#no) [e](https://example.org/) ![f](docs/page.png)"
    assert broken_links(text, ROOT / "README.md") == ["docs/no.md", "README.md#no"]


def test_every_command_that_decodes_pictures_has_the_same_limit() -> None:
    limits = {name: p.default for name, command in COMMANDS.items() for p in command.params if p.name == "max_pixels"}
    assert {"align", "invert", "edit", "finetune"} <= limits.keys()
    assert set(limits.values()) == {schema.MAX_PIXELS}


def test_every_deviation_from_the_paper_has_a_measured_effect_or_says_why_it_has_none() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    assert len([rows for rows in tables(text) if rows[0][-1] == "measured effect"]) == 3
    assert unmeasured(text) == []


def test_a_row_without_a_measured_effect_is_found() -> None:
    head = "| paper | here | measured effect |\n|---|---|---|\n"
    assert unmeasured(f"{head}| a | b | 0.1 |\n| c | d | |\n| e | f | not measured |\n| g | h | not measured: no weights |\n") == ["c", "e"]
