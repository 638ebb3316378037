"""Names that people type: every wrong one gets an answer that helps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_diffusion

from jobs.finetune import tuning_for
from jobs.requests import attribute_named, domain_named, edit_models, make_edits, parse_mix, recipe_for
from models.domains import DOMAINS
from models.recipe import Recipe, retuned
from pipeline.config import ConfigError, Source

PIXELFACE = DOMAINS["pixelface"]


def test_a_mix_without_weights_shares_evenly_and_with_weights_keeps_them():
    assert parse_mix("glasses,smiling") == {0: {"glasses": 0.5, "smiling": 0.5}}
    assert parse_mix(" glasses=0.7 , smiling=-1") == {0: {"glasses": 0.7, "smiling": -1.0}}


def test_a_mix_by_timesteps_says_what_holds_from_where_and_may_name_the_base_model():
    assert parse_mix("300:glasses=1; 0:glasses=0.3,base=0.7") == {0: {"glasses": 0.3, "base": 0.7}, 300: {"glasses": 1.0}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("glasses", "at least two attributes"),
        ("", "at least two attributes"),
        (",", "at least two attributes"),
        ("0:glasses=1;300:glasses=0.5", "at least two attributes"),
        ("glasses=", "must be a number; got ''"),
        ("glasses=x,smiling=1", "must be a number; got 'x'"),
        ("glasses=nan,smiling=1", "between -10 and 10; got nan"),
        ("glasses=1,glasses=1", "names 'glasses' twice"),
        ("high:glasses=1;0:smiling=1", "starts with a timestep, like 300:glasses=1; got 'high'"),
        ("300:glasses=1;300:smiling=1", "says twice what holds from timestep 300"),
        ("glasses=0.7,base=0.7", "must sum to 1; they sum to 1.4"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused_with_what_would(text, says):
    with pytest.raises(ConfigError, match=says):
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
    assert edits[-1].weights == {0: [-1.0, 1.0, 1.0]}


def test_a_mix_by_timesteps_becomes_an_edit_whose_parts_know_their_mean_weight():
    (edit,) = make_edits(PIXELFACE, [], ["0:glasses=0.25,base=0.75;300:glasses=0.75,smiling=0.25"], [1.0], [])
    assert edit.weights == {0: [0.75, 0.25, 0.0], 300: [0.0, 0.75, 0.25]}
    assert [(part.name, part.weight) for part in edit.parts] == [("glasses", 0.5), ("smiling", 0.125)]


def test_ones_own_edit_models_come_before_the_ready_made_ones(tmp_path):
    for file in Path(PIXELFACE.edits).glob("glasses.*"):
        shutil.copy(file, tmp_path)
    found = edit_models(PIXELFACE, [str(tmp_path)])
    assert Path(found["glasses"]) == tmp_path / "glasses.safetensors"
    assert Path(found["smiling"]).parent == Path(PIXELFACE.edits)


def test_the_recipe_is_the_domains_unless_something_is_given():
    source = Source(path=str(PIXELFACE.held_out))
    assert recipe_for(source, PIXELFACE, {}) == PIXELFACE.recipe
    assert recipe_for(source, PIXELFACE, {"steps_up": 7}).steps_up == 7
    assert recipe_for(Source(path=str(Path("nowhere"))), PIXELFACE, {}) == PIXELFACE.recipe


def test_an_unknown_domain_names_the_known_ones():
    with pytest.raises(ConfigError, match="did you mean 'pixelface'"):
        domain_named("pixelfaces")


def test_a_domain_is_found_by_name_by_the_reference_of_its_weights_by_folder_and_by_file(tmp_path, monkeypatch):
    save_diffusion(tmp_path / "cats", 16)
    (tmp_path / "cats.yaml").write_text("noun: cat\nweights: cats\n")
    monkeypatch.chdir(tmp_path)
    assert domain_named("pixelface") is PIXELFACE
    assert domain_named("google/ddpm-ema-church-256") is DOMAINS["church-256"]
    for name in ("cats", "./cats", str(tmp_path / "cats")):
        assert domain_named(name).noun == "image"
    for name in ("cats.yaml", str(tmp_path / "cats.yaml")):
        assert domain_named(name).noun == "cat"


def test_weights_that_must_be_imported_are_asked_for_with_the_command_that_does_it():
    with pytest.raises(ConfigError, match="diffusionclip import FILE OUT --domain afhq-dog-256, and then --domain OUT") as caught:
        domain_named("afhq-dog-256")
    assert "afhq_dog_4m.pt" in str(caught.value)
    assert domain_named("afhq-dog-256", need_weights=False) is DOMAINS["afhq-dog-256"]


@pytest.mark.parametrize("name", ["cats.yaml", "./cats", "no/such/folder"])
def test_a_domain_that_is_not_there_is_a_wrong_request(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        domain_named(name)


def test_every_slip_in_a_domain_file_is_a_problem_of_its_own(tmp_path):
    (tmp_path / "cats.yaml").write_text("nuon: cat\nweights: 3\n")
    with pytest.raises(ConfigError) as caught:
        domain_named(str(tmp_path / "cats.yaml"))
    assert len(caught.value.problems) == 2


def test_attributes_are_those_of_the_domains_family():
    assert attribute_named(DOMAINS["ffhq-256"], "grey_hair").target == "person with grey hair"
    with pytest.raises(ConfigError, match="did you mean 'grey_hair'"):
        attribute_named(DOMAINS["celebahq-256"], "gray_hair")
    with pytest.raises(ConfigError, match="there are no attributes for mine in the table"):
        attribute_named(replace(PIXELFACE, name="mine", family=""), "hat")


def test_images_are_walked_to_the_return_step_that_all_their_edit_models_were_tuned_at(tiny_domain, tiny_edit, save_pictures, tmp_path):
    domain = replace(tiny_domain(), edits=str(tmp_path / "edits"))
    source = Source(path=str(save_pictures("a.png")))
    for name, step in (("smiling", 601), ("sad", 601), ("hat", 400)):
        card = Path(tiny_edit(domain, name).file).with_suffix(".json")
        card.write_text(json.dumps(json.loads(card.read_text()) | {"recipe": {"return_step": step}}))

    def step_for(names, **given):
        return recipe_for(source, domain, given, make_edits(domain, names, [], [], [])).return_step

    assert step_for(["none"]) == domain.recipe.return_step == 300
    assert step_for(["none", "smiling", "sad"]) == 601
    assert step_for(["smiling", "hat"]) == 300, "they do not agree"
    assert step_for(["smiling"], return_step=500) == 500


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"projection_step": 300}, "--project-step belongs to --project"),
        ({"projection_steps": 3}, "--project-steps belongs to --project"),
        ({"seed": 1}, "--seed is of fresh noise, and this walk has none: leave it out, or give --eta, --project or"),
        ({"projections": 2, "trim": 0.2}, "--trim keeps what the source image is like, which an image brought into the domain"),
        ({"inversion": "stochastic", "steps_up": 3}, "--steps-up does nothing with --inversion stochastic"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        recipe_for(Source(path=str(PIXELFACE.held_out)), PIXELFACE, given)


def test_a_trim_is_refused_where_nothing_would_be_trimmed():
    def recipe(*names: str, mixes: tuple[str, ...] = ()) -> Recipe:
        edits = make_edits(PIXELFACE, list(names), list(mixes), [], [])
        return recipe_for(Source(path=str(PIXELFACE.held_out)), PIXELFACE, {"trim": 0.2}, edits)

    assert recipe("none", "glasses").trim == 0.2
    with pytest.raises(ConfigError, match="--trim is of edits with one attribute, and there is none"):
        recipe("none", mixes=("glasses=1,smiling=1",))


def test_options_of_fresh_noise_are_taken_where_there_is_some():
    for noise in ({"projections": 2, "projection_step": 300, "projection_steps": 3}, {"eta": 0.5}, {"inversion": "stochastic"}):
        assert recipe_for(Source(path=str(PIXELFACE.held_out)), PIXELFACE, noise | {"seed": 1}).seed == 1


def test_a_reconstruction_has_no_degree():
    with pytest.raises(ConfigError, match="a reconstruction has no degree"):
        make_edits(PIXELFACE, ["none"], [], [0.5], [])


def test_low_rank_weights_are_trained_at_a_rate_of_their_own_unless_one_is_given():
    celeba, small = DOMAINS["celebahq-256"], DOMAINS["pixelface"]
    full = celeba.tuning.learning_rate
    in_file = replace(celeba, tuning=retuned(celeba.tuning, {"rank": 8}))  # a domain file that asks for a rank
    plain, published = attribute_named(celeba, "pixar"), attribute_named(celeba, "neanderthal")
    for tuning, attribute, numbers, rate in (
        (celeba.tuning, plain, {}, full),
        (celeba.tuning, plain, {"rank": 8}, 20 * full),
        (celeba.tuning, plain, {"rank": 8, "learning_rate": 3e-4}, 3e-4),
        (celeba.tuning, published, {}, published.learning_rate),
        (celeba.tuning, published, {"rank": 8}, 20 * published.learning_rate),
        (in_file.tuning, plain, {}, 20 * full),
        (in_file.tuning, published, {}, 20 * published.learning_rate),
        (in_file.tuning, published, {"rank": None}, published.learning_rate),
        (small.tuning, attribute_named(small, "hat"), {}, 2e-3),
        (small.tuning, attribute_named(small, "hat"), {"rank": None}, 2e-3),
        (small.tuning, attribute_named(small, "hat"), {"rank": 16}, 2e-3),
    ):
        assert tuning_for(tuning, attribute, numbers).learning_rate == pytest.approx(rate)
