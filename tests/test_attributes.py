"""What would be lost: ready-made attributes ask for something that their domain can show and its CLIP can understand, under the
names that the official code gave them, with its wrong texts put right."""

import re

import pytest

from models.attributes import ATTRIBUTES, FAMILIES, Attribute, attributes_of
from models.domains import DOMAINS
from models.pixelface.avatars import FACTORS, prompts, vocabulary

OFFICIAL = """
human: tanned: face -> tanned face
human: pale: face -> pale face
human: makeup: person -> person with makeup
human: no_makeup: person -> person without makeup
human: old: person -> old person
human: young: person -> young person
human: beards: person -> person with beards
human: angry: face -> angry face
human: surprised: face -> surprised face
human: smiling: face -> smiling face
human: blond_hair: person -> person with blond hair
human: red_hair: person -> person with red hair
human: grey_hair: person -> person with red hair
human: curly_hair: person -> person with curly hair
human: nicolas: Person -> Nicolas Cage
human: zuckerberg: Person -> Mark Zuckerberg
human: benedict: Person -> Benedict Cumberbatch
human: gogh: photo -> painting by Gogh
human: frida: photo -> self-portrait by Frida Kahlo
human: modigliani: photo -> Painting in Modigliani style
human: sketch: photo -> sketch
human: watercolor: photo -> Watercolor Art with Thick Brushstrokes
human: elf: Human -> Tolkien elf
human: super_saiyan: Human -> Super saiyan
human: pixar: Human -> 3D render in the style of Pixar
human: neanderthal: Human -> Neanderthal
human: zombie: Human -> Zombie
human: jocker: Human -> The Jocker
dog: dog_nicolas: Dog -> Nicolas Cage
dog: dog_yorkshire: Dog -> Yorkshire Terrier
dog: dog_smiling: Dog -> Smiling Dog
dog: dog_zombie: Dog -> Zombie
dog: dog_super_saiyan: Dog -> Super saiyan
dog: dog_venom: Dog -> Venom
dog: dog_bear: Dog -> Bear
dog: dog_fox: Dog -> Fox
dog: dog_wolf: Dog -> Wolf
dog: dog_hamster: Dog -> Hamster
church: church_snow: Church -> Snow Coverd Church
church: church_night: Church -> Church at night
church: church_red_brick: Church -> Red brick wall Church
church: church_golden: Church -> Golden Church
church: church_wooden_house: Church -> Wooden House
church: church_gothic: Church -> Gothic Church
church: church_ancient_tower: Church -> Ancient traditional Asian tower
church: church_temple: Church -> Temple
church: church_factory: church -> factory with chimneys
church: church_department_store: church -> department store
bedroom: bedroom_blue: Bedroom -> Blue tone Bedroom
bedroom: bedroom_green: Bedroom -> Green tone Bedroom
bedroom: bedroom_golden: Bedroom -> Golden Bedroom
bedroom: bedroom_princess: Bedroom -> Princess Bedroom
bedroom: bedroom_palace: Bedroom -> Palace Bedroom
bedroom: bedroom_wooden: Bedroom -> Wooden Bedroom
"""
"""What ``--edit_attr`` of the official code takes, with the texts of its ``utils/text_dic.py``, letter by letter."""
CORRECTED = {
    ("human", "grey_hair"): "person with grey hair",
    ("human", "jocker"): "The Joker",
    ("church", "church_snow"): "Snow Covered Church",
}
"""Targets that are wrong there, put right."""


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


def test_every_attribute_of_the_official_code_is_here_with_its_texts_but_for_those_put_right() -> None:
    official = dict(re.fullmatch(r"(\w+: \w+): (.+)", line).groups() for line in OFFICIAL.split("\n")[1:-1])  # type: ignore[union-attr]
    here = {f"{a.family}: {a.name}": f"{a.source} -> {a.target}" for a in ATTRIBUTES.values()}
    changed = {name: here.get(name) for name, texts in official.items() if here.get(name) != texts}
    assert len(official) == 54
    assert changed == {
        f"{family}: {name}": f"{ATTRIBUTES[family, name].source} -> {target}" for (family, name), target in CORRECTED.items()
    }
    for key in CORRECTED:
        assert "text corrected" in ATTRIBUTES[key].note
    assert {key for key, a in ATTRIBUTES.items() if "corrected" in a.note} == CORRECTED.keys()


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
    assert set(f"{attribute.source} {attribute.target}".split()) - {"|"} <= known


def test_the_attributes_of_a_family_are_found_by_name() -> None:
    assert attributes_of("pixelface")["smiling"].target == "smiling face"
    assert attributes_of("human")["smiling"].source == "face"
    assert attributes_of("") == {}
