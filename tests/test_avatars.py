"""What would be lost: captions that are true, and counterfactuals in which one thing differs. No Node.js is needed."""

import json
import re
from typing import Any

import numpy as np
import pytest

from models.pixelface.avatars import FACTORS, Avatar, caption, draw_avatar, flip_one, options, prompts, vocabulary, with_factor

DRAWN_BY = {
    "skin": {"skinColor"},
    "hair_color": {"hairColor"},
    "hair_length": {"hair"},
    "mouth": {"mouth"},
    "glasses": {"glassesProbability"},
    "beard": {"beardProbability"},
    "hat": {"hatProbability"},
    "clothing": {"clothingColor"},
    "background": {"backgroundColor"},
}
"""Which of DiceBear's options show a factor."""
WORDS = {
    "skin": {"pale": "pale", "tanned": "tanned", "dark": "dark|dark-skinned"},
    "hair_color": {"black": "black", "brown": "brown", "blond": "blonde?", "red": "red|ginger", "grey": "gr[ea]y"},
    "hair_length": {"short": "short", "long": "long"},
    "mouth": {"smiling": "smiling|happy", "sad": "sad|unhappy"},
}
THINGS = {"glasses": "eyeglasses|glasses", "beard": "beard", "hat": "hat|cap"}


def avatars(count: int) -> list[Avatar]:
    rng = np.random.default_rng(0)
    return [draw_avatar(rng) for _ in range(count)]


def drawn(avatar: Avatar) -> dict[str, Any]:
    """What can be seen of an avatar: an option of a thing that is not worn is not."""
    found = options(avatar)
    hidden = {name for name in ("glasses", "beard", "hat") if found[f"{name}Probability"] == 0}
    return {k: v for k, v in found.items() if not any(k in (name, f"{name}Color") for name in hidden)}


@pytest.mark.parametrize("factor", FACTORS)
def test_changing_a_factor_changes_what_shows_it_and_nothing_else(factor: str) -> None:
    for avatar in avatars(30):
        before = options(avatar)
        for value in FACTORS[factor]:
            after = options(with_factor(avatar, factor, value))
            changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
            assert changed == (set() if value == avatar["factors"][factor] else DRAWN_BY[factor])


def test_changing_a_factor_there_and_back_gives_the_same_avatar() -> None:
    for avatar in avatars(30):
        other = with_factor(avatar, "hair_color", "grey")
        assert with_factor(other, "hair_color", avatar["factors"]["hair_color"]) == avatar


def test_a_value_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="mouth is one of smiling, sad; got 'angry'"):
        with_factor(avatars(1)[0], "mouth", "angry")


def test_a_counterfactual_differs_in_just_the_factor_it_names() -> None:
    rng, seen = np.random.default_rng(1), set()
    for avatar in avatars(200):
        other, factor = flip_one(avatar, rng)
        assert {k for k in FACTORS if other["factors"][k] != avatar["factors"][k]} == {factor}
        seen.add(factor)
    assert seen == set(FACTORS)


def test_every_value_of_every_factor_is_drawn_and_factors_are_independent_of_details() -> None:
    many = avatars(2000)
    for factor, values in FACTORS.items():
        shares = [np.mean([a["factors"][factor] == value for a in many]) for value in values]
        assert min(shares) > 0.7 / len(values), factor
    hats = np.array([a["factors"]["hat"] == "yes" for a in many], float)
    beards = np.array([a["factors"]["beard"] == "yes" for a in many], float)
    assert abs(np.corrcoef(hats, beards)[0, 1]) < 0.1


def test_nothing_is_left_to_the_renderers_own_chance() -> None:
    for avatar in avatars(50):
        found = options(avatar)
        assert all(len(v) == 1 if isinstance(v, list) else v in (0, 100) for v in found.values())
        assert json.loads(json.dumps(avatar)) == avatar


def test_the_same_seed_draws_the_same_avatars() -> None:
    assert avatars(5) == avatars(5)
    assert drawn(avatars(5)[0]) != drawn(avatars(5)[1])


def says(text: str, words: str) -> bool:
    return re.search(rf"(?<![\w-])(?:{words})(?![\w-])", text) is not None


def mentions(text: str, factor: str) -> bool:
    if factor in THINGS:
        return says(text, THINGS[factor])
    if factor in ("clothing", "background"):
        return says(text, "clothes" if factor == "clothing" else "background")
    if factor == "hair_color":
        return re.search(r"(black|brown|blonde?|red|ginger|gr[ea]y) hair", text) is not None
    return says(text, "|".join(WORDS[factor].values()))


def test_a_caption_mentions_just_the_factors_asked_for() -> None:
    rng = np.random.default_rng(2)
    for avatar in avatars(300):
        asked = [name for name in FACTORS if rng.random() < 0.4]
        text = caption(avatar["factors"], asked, rng)
        assert [name for name in FACTORS if mentions(text, name)] == asked, text


def test_what_a_caption_says_is_true() -> None:
    rng = np.random.default_rng(3)
    for avatar in avatars(300):
        factors = avatar["factors"]
        text = caption(factors, list(FACTORS), rng)
        for factor, values in WORDS.items():
            place = text if factor in ("skin", "mouth") else re.findall(r"with (?:\S+ )?\S+ hair", text)[0]
            assert [v for v, words in values.items() if says(place, words)] == [factors[factor]], text
        for thing, words in THINGS.items():
            absent = re.search(rf"(?<!\w)(no|without) ({words})(?!\w)", text) is not None
            assert absent == (factors[thing] == "no"), text
        assert re.search(rf"(in|wearing) {factors['clothing']} clothes", text), text
        assert f"on a {factors['background']} background" in text


def test_a_listed_caption_says_the_same_side_by_side_in_any_order() -> None:
    rng, subjects = np.random.default_rng(6), {"face", "person", "portrait", "character"}
    firsts = set()
    for avatar in avatars(300):
        factors = avatar["factors"]
        asked = [name for name in FACTORS if rng.random() < 0.4]
        text = caption(factors, asked, rng, listed=True)
        parts = text.split(", ")
        assert [name for name in FACTORS if mentions(text, name)] == asked, text
        hair = {"hair_color", "hair_length"} <= set(asked)
        assert len(set(parts) - subjects) == len(asked) - hair, text
        assert not any(part.startswith(("with ", "in ", "on ", "wearing ")) for part in parts), text
        for thing, words in THINGS.items():
            if thing in asked:
                absent = re.search(rf"(?<!\w)(no|without) ({words})(?!\w)", text) is not None
                assert absent == (factors[thing] == "no"), text
        firsts.add(parts[0] in subjects)
        assert parts[0] in subjects or asked
    assert firsts == {True, False}


def test_a_caption_without_factors_is_a_bare_noun() -> None:
    rng = np.random.default_rng(4)
    assert {caption(avatars(1)[0]["factors"], [], rng) for _ in range(50)} == {"face", "person", "portrait", "character"}


def test_no_caption_or_prompt_has_a_word_outside_the_vocabulary() -> None:
    known = {word for phrase in vocabulary() for word in re.findall(r"[\w-]+", phrase)}
    rng = np.random.default_rng(5)
    texts = [caption(a["factors"], list(FACTORS), rng) for a in avatars(300)]
    texts += [text for factor in FACTORS for text in prompts(factor)]
    assert {word for text in texts for word in re.findall(r"[\w-]+", text)} <= known


def test_every_value_has_a_prompt_of_its_own_that_names_it() -> None:
    assert prompts("hat") == ["face without hat", "face with a hat"]
    assert prompts("glasses") == ["face without glasses", "face with glasses"]
    for factor, values in FACTORS.items():
        texts = prompts(factor)
        assert len(set(texts)) == len(values)
        if factor not in THINGS:
            assert all(says(text, value) for text, value in zip(texts, values, strict=True))
