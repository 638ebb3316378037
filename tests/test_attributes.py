"""What would be lost: ready-made attributes ask for something that their domain can show and its CLIP can understand, under the
names that the official code gave them, with its wrong texts put right."""

import re

import pytest

from models.attributes import ATTRIBUTES, FAMILIES, Attribute, attributes_of
from models.domains import DOMAINS
from models.pixelface.avatars import FACTORS, prompts, vocabulary

OFFICIAL = {
    "human": "tanned pale makeup no_makeup old young beards angry surprised smiling blond_hair red_hair grey_hair curly_hair nicolas "
    "zuckerberg benedict gogh frida modigliani sketch watercolor elf super_saiyan pixar neanderthal zombie jocker",
    "dog": "dog_nicolas dog_yorkshire dog_smiling dog_zombie dog_super_saiyan dog_venom dog_bear dog_fox dog_wolf dog_hamster",
    "church": "church_snow church_night church_red_brick church_golden church_wooden_house church_gothic church_ancient_tower "
    "church_temple church_factory church_department_store",
    "bedroom": "bedroom_blue bedroom_green bedroom_golden bedroom_princess bedroom_palace bedroom_wooden",
}
"""What ``--edit_attr`` of the official code takes."""


@pytest.mark.parametrize("attribute", ATTRIBUTES.values(), ids=lambda a: f"{a.family}-{a.name}")
def test_an_attribute_has_a_usable_name_two_texts_and_a_domain(attribute: Attribute) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", attribute.name), "names become names of files and folders"
    assert attribute.name != "none", "that is the reconstruction"
    assert attribute.source.strip()
    assert attribute.target.strip()
    assert attribute.source.lower() != attribute.target.lower()
    assert attribute.family in {domain.family for domain in DOMAINS.values()}
    assert attribute.return_step is None or 1 <= attribute.return_step < 1000
    assert attribute.learning_rate is None or 0 < attribute.learning_rate < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_attributes_of_a_family_are_the_same_edit(family: str) -> None:
    texts = [(a.source.lower(), a.target.lower()) for a in attributes_of(family).values()]
    assert len(set(texts)) == len(texts) > 0


@pytest.mark.parametrize("family", OFFICIAL)
def test_every_attribute_of_the_official_code_is_here_under_its_name(family: str) -> None:
    assert set(OFFICIAL[family].split()) <= attributes_of(family).keys()


def test_texts_that_are_wrong_in_the_official_table_are_put_right() -> None:
    assert ATTRIBUTES["human", "grey_hair"].target == "person with grey hair"
    assert ATTRIBUTES["church", "church_snow"].target == "Snow Covered Church"
    assert ATTRIBUTES["human", "jocker"].target == "The Joker"
    for name in (("human", "grey_hair"), ("church", "church_snow"), ("human", "jocker")):
        assert "corrected" in ATTRIBUTES[name].note


def test_numbers_are_those_of_the_published_edit_models() -> None:
    published = {a.note.split(";")[0]: a for a in ATTRIBUTES.values() if a.return_step}
    files = """human_pixar_t601 human_neanderthal_t601 human_gogh_t601 human_tanned_t201 human_male_t401 human_sketch_t601
    human_with_makeup_t301 human_without_makeup_t301 curly_hair_t401 dog_bear_t500 dog_hamster_t601 dog_yorkshire_t601
    dog_nicolas_t601 dog_zombie_t601 dog_venome_t601 dog_gogh_t500 imagenet_watercolor_t601 imagenet_pointillism_t601
    imagenet_gogh_t601 imagenet_cubism_t601"""
    assert published.keys() == {f"{name}.pth" for name in files.split()}
    for file, attribute in published.items():
        assert file.endswith(f"_t{attribute.return_step}.pth")
    assert ATTRIBUTES["human", "neanderthal"].learning_rate == 8e-6


@pytest.mark.parametrize("attribute", attributes_of("pixelface").values(), ids=lambda a: a.name)
def test_an_attribute_of_pixelface_is_judged_by_a_factor_and_uses_words_its_clip_has_seen(attribute: Attribute) -> None:
    assert attribute.changes is not None
    factor, value = attribute.changes
    assert attribute.target == prompts(factor)[FACTORS[factor].index(value)]
    known = {word for phrase in vocabulary() for word in phrase.split()}
    assert set(f"{attribute.source} {attribute.target}".split()) <= known


def test_the_attributes_of_a_family_are_found_by_name() -> None:
    assert attributes_of("pixelface")["smiling"].target == "smiling face"
    assert attributes_of("human")["smiling"].source == "face"
    assert attributes_of("") == {}
