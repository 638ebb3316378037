"""What would be lost: ready-made attributes ask for something that their domain can show and its CLIP can understand."""

import re

import pytest

from models.attributes import ATTRIBUTES, Attribute, attributes_of
from models.domains import DOMAINS
from models.pixelface.avatars import FACTORS, prompts, vocabulary


@pytest.mark.parametrize("attribute", ATTRIBUTES.values(), ids=lambda a: f"{a.domain}-{a.name}")
def test_an_attribute_belongs_to_a_domain_and_changes_what_it_says(attribute: Attribute) -> None:
    assert attribute.domain in DOMAINS
    assert attribute.source != attribute.target
    assert re.fullmatch(r"[a-z][a-z_]*", attribute.name), "names become names of files and folders"
    assert DOMAINS[attribute.domain].noun in attribute.target.split()


@pytest.mark.parametrize("attribute", attributes_of("pixelface").values(), ids=lambda a: a.name)
def test_an_attribute_of_pixelface_is_judged_by_a_factor_and_uses_words_its_clip_has_seen(attribute: Attribute) -> None:
    assert attribute.changes is not None
    factor, value = attribute.changes
    assert attribute.target == prompts(factor)[FACTORS[factor].index(value)]
    known = {word for phrase in vocabulary() for word in phrase.split()}
    assert set(f"{attribute.source} {attribute.target}".split()) <= known


def test_the_attributes_of_a_domain_are_found_by_name() -> None:
    assert attributes_of("pixelface")["smiling"].target == "smiling face"
    assert attributes_of("nowhere") == {}
