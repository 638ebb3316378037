"""What would be lost: people see on a terminal of usual width which domains and attributes there are, and what to do to get them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.attributes import attributes_of
from models.domains import DOMAINS

ROOT = Path(__file__).parent.parent


def answer(*arguments: str, status: int = 0) -> str:
    """What the command prints where nothing is a terminal, in a process of its own; no longer than a terminal is wide."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DIFFUSIONCLIP_OFFLINE": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert max(map(len, done.stdout.splitlines()), default=0) <= 120
    return done.stdout if status == 0 else done.stderr


def test_every_domain_is_listed_with_its_licence_and_the_way_to_its_weights() -> None:
    said = answer("domains")
    words = " ".join(said.split())
    for domain in DOMAINS.values():
        assert domain.licence in words
        assert domain.about in words
        assert domain.origin in words
        assert f"{domain.about} network: predicts {domain.prediction}, noise of {domain.schedule} weights: " in words
        assert (f"diffusionclip import FILE OUT --domain {domain.name}" in words) == (domain.weights == "")
    (row,) = (line for line in said.splitlines() if line.startswith(" imagenet-256 ") and "256x256" in line)
    assert "photo" in row
    assert "adm-256, learned variance" in row
    assert "import" in row


@pytest.mark.parametrize("name", ["pixelface", "celebahq-256", "afhq-dog-256"])
def test_every_attribute_of_a_domain_is_listed_with_its_numbers_also_before_the_weights_are_there(name: str) -> None:
    said = answer("attributes", "--domain", name)
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line.strip()}
    for attribute in attributes_of(DOMAINS[name].family).values():
        row = rows[attribute.name]
        assert attribute.source.split()[0] in row
        assert (str(attribute.return_step) in row) == (attribute.return_step is not None)
        assert attribute.learning_rate is None or f"{attribute.learning_rate:g}" in row
        assert ("yes" in row) == (name == "pixelface")


def test_a_wrong_domain_is_answered_with_the_nearest() -> None:
    assert "did you mean 'celebahq-256'" in answer("attributes", "--domain", "celebahq", status=2)
