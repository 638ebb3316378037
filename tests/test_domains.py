"""What would be lost: every domain in the table can be used as it stands there."""

import json
from pathlib import Path

import pytest

from models.domains import DOMAINS, Domain
from models.recipe import Recipe


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_a_domain_is_found_by_its_name_with_a_possible_recipe(domain: Domain) -> None:
    assert DOMAINS[domain.name] is domain
    assert domain.recipe.problems() == []
    assert domain.tuning.problems() == []
    assert domain.about
    assert domain.licence


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_the_network_of_a_domain_takes_images_of_its_size(domain: Domain) -> None:
    config = json.loads((Path(domain.weights) / "config.json").read_text())
    assert config["sample_size"] == domain.image_size
    assert config["in_channels"] == 3
    timesteps = json.loads((Path(domain.weights) / "scheduler_config.json").read_text())["num_train_timesteps"]
    assert domain.recipe.problems(timesteps) == []


def test_a_domain_without_a_recipe_of_its_own_has_the_projects() -> None:
    assert DOMAINS["pixelface"].recipe == Recipe()
