"""What would be lost: every domain in the table can be used as it stands there."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from models.attributes import attributes_of
from models.clip import clip_problems
from models.domains import DOMAINS, Domain
from models.recipe import Recipe
from models.references import place_of

REAL = [domain for domain in DOMAINS.values() if domain.name != "pixelface"]


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_a_domain_is_found_by_its_name_and_says_all_that_people_need(domain: Domain) -> None:
    assert DOMAINS[domain.name] is domain
    assert domain.problems() == []
    assert domain.about
    assert domain.origin
    assert domain.licence != "not stated"
    assert attributes_of(domain.family)
    assert clip_problems(domain.clip) == []


def test_the_published_domains_of_the_paper_are_here() -> None:
    sizes = {domain.name: (domain.image_size, domain.noun) for domain in REAL}
    assert sizes == {
        "celebahq-256": (256, "face"),
        "church-256": (256, "church"),
        "bedroom-256": (256, "bedroom"),
        "afhq-dog-256": (256, "dog"),
        "ffhq-256": (256, "face"),
        "imagenet-512": (512, "photo"),
        "imagenet-256": (256, "photo"),
    }


@pytest.mark.parametrize("domain", REAL, ids=lambda d: d.name)
def test_a_real_domain_starts_from_the_papers_clip_and_the_readmes_training(domain: Domain) -> None:
    assert domain.clip == "ViT-B-16/openai"
    assert domain.recipe.return_step == 500
    tuning = domain.tuning
    assert (tuning.images, tuning.epochs, tuning.batch, tuning.steps_down) == (50, 5, 1, 6)
    assert (tuning.learning_rate, tuning.learning_rate_growth, tuning.clip_weight, tuning.l1_weight) == (8e-6, 1.3, 3, 1)


@pytest.mark.parametrize("domain", REAL, ids=lambda d: d.name)
def test_the_weights_of_a_real_domain_are_on_the_hub_or_a_file_to_import(domain: Domain) -> None:
    if domain.weights:
        assert place_of(domain.weights).kind == "hub"
        assert domain.weights in domain.origin
    else:
        assert re.match(r"\S+\.pt, README of github\.com/\S+/\S+$", domain.origin)
    assert domain.architecture == {
        "celebahq-256": "ddpm-256",
        "church-256": "ddpm-256",
        "bedroom-256": "ddpm-256",
        "afhq-dog-256": "iddpm-256",
        "ffhq-256": "iddpm-256",
        "imagenet-512": "adm-512",
        "imagenet-256": "adm-256",
    }.get(domain.name)
    assert domain.learned_variance == (domain.architecture != "ddpm-256")
    assert domain.classes == (1000 if domain.name == "imagenet-512" else None)


def test_the_network_of_pixelface_takes_images_of_its_size() -> None:
    domain = DOMAINS["pixelface"]
    config = json.loads((Path(domain.weights) / "config.json").read_text())
    assert config["sample_size"] == domain.image_size
    assert config["in_channels"] == 3
    timesteps = json.loads((Path(domain.weights) / "scheduler_config.json").read_text())["num_train_timesteps"]
    assert domain.recipe.problems(timesteps) == []


def test_the_embedded_domain_walks_by_the_projects_recipe_and_only_it_trims_edits() -> None:
    assert replace(DOMAINS["pixelface"].recipe, trim=0.0) == Recipe()
    assert [name for name, domain in DOMAINS.items() if domain.recipe.trim] == ["pixelface"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": ""}, "needs a name"),
        ({"image_size": 0}, "at least 8; got 0"),
        ({"family": "humans"}, "human"),
        ({"prediction": "flow"}, "epsilon"),
        ({"classes": 0}, "at least 1"),
        ({"recipe": Recipe(return_step=1000)}, "return step"),
    ],
)
def test_what_is_impossible_about_a_domain_is_said(change: dict[str, object], said: str) -> None:
    (problem,) = replace(DOMAINS["celebahq-256"], **change).problems()  # type: ignore[arg-type]
    assert said in problem
