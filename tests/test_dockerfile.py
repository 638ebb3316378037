"""What would be lost: an image that can be built again, holds no secrets, runs as nobody in particular and serves as Ray's.

There is no container engine here: the file is read, and what it copies is looked for.
"""

import fnmatch
import json
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}


@dataclass(frozen=True)
class Instruction:
    stage: str
    name: str
    words: tuple[str, ...]
    text: str


def parsed(text: str) -> list[Instruction]:
    """All instructions in order. Lines are joined, comments dropped; nothing here needs more of the language."""
    lines = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    found, stage = [], ""
    for line in filter(None, map(str.strip, lines.splitlines())):
        name, _, rest = line.partition(" ")
        words = tuple(json.loads(rest)) if name == "CMD" else tuple(shlex.split(rest))
        if name == "FROM":
            stage = words[words.index("AS") + 1] if "AS" in words else "final"
        found.append(Instruction(stage, name, words, rest))
    return found


FILE = parsed(TEXT)
STAGES = {i.stage for i in FILE}
FINAL = [i for i in FILE if i.stage == "final"]


def named(name: str) -> list[Instruction]:
    return [i for i in FILE if i.name == name]


def commands() -> list[str]:
    return [part.strip() for i in named("RUN") for part in i.text.split("&&")]


def test_it_is_made_of_instructions_that_fetch_nothing_themselves() -> None:
    assert {i.name for i in FILE} <= INSTRUCTIONS  # ADD, which fetches addresses and unpacks archives, is none of them
    assert "://" not in "\n".join(i.text for i in FILE)
    assert not any(word in TEXT for word in ("--index-url", "--extra-index-url", "--trusted-host", "| sh", "| bash", "curl"))


def test_it_begins_with_one_version_of_one_image() -> None:
    bases = [i.words[0] for i in named("FROM") if i.words[0] not in STAGES]
    assert len(bases) == 1
    image, _, tag = bases[0].partition(":")
    assert image == "python"
    assert re.fullmatch(r"3\.(11|12|13)\.\d+-slim-\w+", tag)


def test_the_same_versions_are_installed_as_in_tests() -> None:
    installs = [c for c in commands() if re.search(r"\bpip install\b", c)]
    for command in installs:
        assert "--constraint constraints.txt" in command or ("--no-deps" in command and "--no-index" in command)
    assert any("--requirement pyproject.toml" in command for command in installs)
    assert any("uv build" in c and "--build-constraint constraints.txt" in c for c in commands())
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    direct = [re.split(r"[\[<>=;! ]", r)[0] for r in requires("diffusionclip-ray") or [] if "extra ==" not in r]
    asked = {re.sub(r"[-_.]+", "-", name).lower() for name in [*direct, "boto3", "uv", "setuptools"]}
    assert asked <= pinned.keys()
    assert pinned["ray"] == version("ray")


def test_what_is_copied_is_here_and_is_let_into_the_build() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {word for i in named("COPY") if not i.words[0].startswith("--from") for word in i.words[:-1]}
    assert copied == set(allowed)
    assert all((ROOT / name).exists() for name in copied)
    packages = {name.split(".")[0] for name in re.findall(r'"([\w.]+)"', package_list())}
    assert packages <= copied


def package_list() -> str:
    found = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize(
    "name", [".git/config", ".venv/bin/python", "out/edits/part.parquet", ".env", "auth_token", "models/__pycache__/a.pyc"]
)
def test_neither_secrets_nor_outputs_get_into_a_build(name: str) -> None:
    """The last rule that fits decides."""
    ignored = False
    for rule in (line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")):
        pattern = rule.removeprefix("!").removeprefix("**/")
        if any(fnmatch.fnmatch(part, pattern) for part in (*name.split("/"), name)):
            ignored = not rule.startswith("!")
    assert ignored


def test_it_runs_as_the_user_that_mounts_and_pods_are_made_for() -> None:
    users = [i.words[0] for i in FINAL if i.name == "USER"]
    assert users[-1:] == ["1000"]
    after = FINAL[[i.name for i in FINAL].index("USER") :]
    assert "RUN" not in {i.name for i in after}
    assert any("useradd --uid 1000" in c for c in commands())
    assert "runAsUser: 1000" in (ROOT / "deploy" / "rayjob.yaml").read_text()
    assert "chown 1000:1000" in (ROOT / "cluster.yaml").read_text()


def test_it_has_what_rays_launcher_and_kuberay_look_for() -> None:
    """The head drives its workers by ssh and rsync and the cloud by boto3; HOME must be stated; older probes use wget."""
    system = next(c for c in commands() if c.startswith("apt-get install"))
    assert {"openssh-client", "rsync", "wget"} <= set(system.split())
    assert any("boto3" in c for c in commands())
    environment = dict(word.split("=", 1) for i in FILE if i.name == "ENV" for word in i.words)
    assert environment["HOME"] == "/home/ray"
    assert environment["PATH"].startswith("/opt/venv/bin:")
    assert not any(re.search("KEY|TOKEN|SECRET|PASSWORD", name) for name in environment)


def test_code_changes_cost_megabytes_and_not_gigabytes() -> None:
    """What is installed from the index is a layer of its own, which no line of the project's code is part of."""
    layers = [i for i in FILE if i.stage == "packages" and i.name == "COPY"]
    assert {word for i in layers for word in i.words[:-1]} == {"constraints.txt", "pyproject.toml"}
    assert [i.words[0] for i in FINAL if i.name == "COPY"] == ["--from=packages"]
    assert any("--mount=type=bind,from=wheel" in i.text for i in FINAL)
    assert "rm -rf /var/lib/apt/lists/*" in commands()
    assert all("--no-cache" in c for c in commands() if "pip install" in c)
