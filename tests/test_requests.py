"""Names that people type: every wrong one gets an answer that helps."""

from pathlib import Path

import pytest

from jobs.requests import domain_named, edit_models, make_edits, parse_mix, recipe_for
from models.domains import DOMAINS
from pipeline.config import ConfigError, Source

PIXELFACE = DOMAINS["pixelface"]


def test_a_mix_without_weights_shares_evenly_and_with_weights_keeps_them():
    assert parse_mix("glasses,smiling") == [("glasses", 0.5), ("smiling", 0.5)]
    assert parse_mix(" glasses=0.7 , smiling=-1") == [("glasses", 0.7), ("smiling", -1.0)]


@pytest.mark.parametrize("text", ["glasses", "", "glasses=", "glasses=x,smiling=1", ","])
def test_a_mix_that_makes_no_sense_is_refused(text):
    with pytest.raises(ConfigError):
        parse_mix(text)


def test_every_wrong_name_is_reported_at_once_with_the_nearest_match():
    with pytest.raises(ConfigError) as caught:
        make_edits(PIXELFACE, ["glases", "smilling"], ["beard=1,nothing=1"], [1.0], [])
    assert len(caught.value.problems) == 3
    assert "did you mean 'glasses'?" in str(caught.value)
    assert "did you mean 'smiling'?" in str(caught.value)


def test_edits_are_every_attribute_and_mix_at_every_degree_but_the_reconstruction_once():
    edits = make_edits(PIXELFACE, ["none", "glasses"], ["glasses=1,smiling=1"], [0.5, 1.0], [])
    names = ["none", "glasses_x0.5", "glasses", "glasses_and_smiling_x0.5", "glasses_and_smiling"]
    assert [edit.name for edit in edits] == names
    assert edits[-1].weights == [-1.0, 1.0, 1.0]


def test_ones_own_edit_models_come_before_the_ready_made_ones(tmp_path):
    own = tmp_path / "glasses.safetensors"
    own.touch()
    found = edit_models(PIXELFACE, [tmp_path])
    assert found["glasses"] == own
    assert found["smiling"].parent == Path(PIXELFACE.edits)


def test_the_recipe_is_the_domains_unless_something_is_given():
    source = Source(path=str(PIXELFACE.held_out))
    assert recipe_for(source, PIXELFACE, {}) == PIXELFACE.recipe
    assert recipe_for(source, PIXELFACE, {"steps_up": 7}).steps_up == 7
    assert recipe_for(Source(path=str(Path("nowhere"))), PIXELFACE, {}) == PIXELFACE.recipe


def test_an_unknown_domain_names_the_known_ones():
    with pytest.raises(ConfigError, match="did you mean 'pixelface'"):
        domain_named("pixelfaces")
