"""What would be lost: an impossible request is answered at once, with all that is wrong, before anything starts."""

from dataclasses import replace
from typing import Any

import pytest

from models.domains import DOMAINS
from models.recipe import Recipe, Tuning
from pipeline.config import ConfigError, Edit, Part, Resources, Run, Source, TuneRun, unknown, versions


def part(name: str, weight: float = 1.0) -> Part:
    return Part(name=name, file=f"{name}.safetensors", weight=weight, source="face", target=f"{name} face")


RUN = Run(source=Source(path="in"), output="out", domain=DOMAINS["pixelface"], recipe=Recipe())


def test_the_defaults_are_possible() -> None:
    assert RUN.problems() == []
    assert replace(RUN, edits=(Edit(), Edit(parts=(part("hat"),)), Edit(parts=(part("hat"),), degree=0.5))).problems() == []


def test_every_problem_is_told_at_once() -> None:
    bad = replace(RUN, recipe=Recipe(return_step=0), resources=Resources(batch=0, workers=0), max_reject_rate=2.0)
    assert len(bad.problems()) == 4
    error = ConfigError(*bad.problems())
    assert str(error).splitlines() == list(error.problems) == bad.problems()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"workers": 0}, "workers must be at least 1; got 0"),
        ({"batch": -1}, "batch must be at least 1; got -1"),
        ({"block_rows": 0}, "block rows must be at least 1; got 0"),
        ({"max_pixels": 0}, "max pixels must be at least 1; got 0"),
        ({"gpus": -1.0}, "GPUs of each actor must be 0, a fraction below 1, or a whole number; got -1.0"),
        ({"gpus": 1.5}, "GPUs of each actor must be 0, a fraction below 1, or a whole number; got 1.5"),
        ({"gpus": float("nan")}, "GPUs of each actor must be 0, a fraction below 1, or a whole number; got nan"),
        ({"cpus": -0.5}, "CPUs of each actor must be a number that is not negative; got -0.5"),
    ],
)
def test_resources_that_no_machine_can_give_are_named(changed: dict[str, Any], message: str) -> None:
    assert Resources(**changed).problems() == [message]


def test_gpus_alone_decide_the_device() -> None:
    assert [Resources(gpus=gpus).device for gpus in (0.0, 0.25, 1.0)] == ["cpu", "cuda", "cuda"]


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_share_of_rejects_beyond_all_or_none_is_refused(rate: float) -> None:
    assert replace(RUN, max_reject_rate=rate).problems() == [f"the greatest share of rejects must lie between 0 and 1; got {rate}"]


def test_a_limit_of_no_rows_is_refused() -> None:
    assert replace(RUN, source=Source(path="in", limit=0)).problems() == ["the limit of rows must be at least 1; got 0"]


def test_an_edit_asked_for_twice_would_overwrite_itself() -> None:
    hat = Edit(parts=(part("hat"),), degree=0.5)
    assert replace(RUN, edits=(hat, hat)).problems() == ["edit 'hat_x0.5' is asked for twice"]
    assert "between -5 and 5" in replace(RUN, edits=(replace(hat, degree=6.0),)).problems()[0]


@pytest.mark.parametrize(
    ("edit", "attribute", "name", "weights"),
    [
        (Edit(), "none", "none", [1]),
        (Edit(parts=(part("hat"),)), "hat", "hat", [0, 1]),
        (Edit(parts=(part("hat"),), degree=0.0), "hat", "hat_x0", [1, 0]),
        (Edit(parts=(part("hat"),), degree=1.5), "hat", "hat_x1.5", [-0.5, 1.5]),
        (Edit(parts=(part("hat", 0.5), part("sad", 0.5))), "hat_and_sad", "hat_and_sad", [0, 0.5, 0.5]),
        (Edit(parts=(part("hat", 0.5), part("sad", 0.25)), degree=0.8), "hat_and_sad", "hat_and_sad_x0.8", [0.4, 0.4, 0.2]),
    ],
)
def test_an_edit_has_a_name_and_weights_that_sum_to_one(edit: Edit, attribute: str, name: str, weights: list[float]) -> None:
    assert (edit.attribute, edit.name) == (attribute, name)
    assert edit.weights == {0: pytest.approx(weights)}
    assert sum(edit.weights[0]) == pytest.approx(1)


def test_weights_by_timestep_leave_the_rest_of_each_range_to_the_base_model() -> None:
    edit = Edit(parts=(part("hat"), part("sad")), ranges=((0, (0.15, 0.15)), (300, (0.5, 0.5))), degree=0.5)
    assert edit.weights == {0: pytest.approx([0.85, 0.075, 0.075]), 300: pytest.approx([0.5, 0.25, 0.25])}
    assert edit.name == "hat_and_sad_by_timestep_x0.5"
    assert replace(RUN, edits=(edit,)).problems() == []
    late = replace(edit, ranges=edit.ranges[1:])
    assert "must say what holds from timestep 0; the lowest given is 300" in replace(RUN, edits=(late,)).problems()[0]


def test_the_clip_that_scores_is_the_domains_unless_another_or_none_is_asked_for() -> None:
    assert RUN.clip == RUN.domain.clip
    assert replace(RUN, score_clip="ViT-B-32/openai").clip == "ViT-B-32/openai"
    assert replace(RUN, score_clip="none").clip is None


def test_a_name_that_is_not_in_the_table_is_answered_with_those_that_are() -> None:
    assert unknown("attribute", "smilng", ["hat", "smiling"]) == (
        "unknown attribute 'smilng': allowed are hat, smiling; did you mean 'smiling'?"
    )
    assert unknown("domain", "xyz", ["pixelface"]) == "unknown domain 'xyz': allowed is pixelface"
    assert unknown("domain", "xyz", []) == "unknown domain 'xyz': allowed are nothing"


def test_a_tuning_run_names_the_problems_of_all_its_numbers() -> None:
    run = TuneRun(
        latents="latents",
        output="out",
        domain=DOMAINS["pixelface"],
        attribute="smiling",
        source_text="sad face",
        target_text="smiling face",
        recipe=Recipe(),
        tuning=Tuning(),
    )
    assert run.problems() == []
    assert len(replace(run, recipe=Recipe(solver="x"), tuning=Tuning(epochs=0), workers=0).problems()) == 3
    (problem,) = replace(run, tuning=Tuning(id_weight=0.3)).problems()
    assert "needs the weights of a face recognition network" in problem
    assert replace(run, tuning=Tuning(id_weight=0.3), identity="model_ir_se50.pth").problems() == []
    (problem,) = replace(run, identity="model_ir_se50.pth").problems()
    assert "--identity without a weight does nothing" in problem


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gpus": -1.0}, "GPUs of each worker must be 0, a fraction below 1, or a whole number; got -1.0"),
        ({"gpus": 1.5}, "GPUs of each worker must be 0, a fraction below 1, or a whole number; got 1.5"),
        ({"gpus": 0.5, "workers": 2}, "2 workers that share an attribute need a GPU each, and not 0.5 of one"),
        ({"cpus": float("nan")}, "CPUs of each worker must be a number that is not negative; got nan"),
        ({"workers": 0}, "workers must be at least 1; got 0"),
        ({"source_text": " | "}, "the source text says nothing; give words for the images as they are, like: face"),
        ({"target_text": "hat | cap"}, "the target text must be one text, only source texts may be several; got 'hat | cap'"),
        ({"tuning": Tuning(steps_down=402)}, "steps down of the training must lie between 2 and 401 (return step + 1); got 402"),
    ],
)
def test_a_training_that_no_machine_can_carry_out_is_named(changed: dict[str, Any], message: str) -> None:
    run = TuneRun(
        latents="latents",
        output="out",
        domain=DOMAINS["pixelface"],
        attribute="smiling",
        source_text="sad face",
        target_text="smiling face",
        recipe=Recipe(),
        tuning=Tuning(),
    )
    assert replace(run, gpus=0.5).problems() == replace(run, gpus=2.0, workers=2).problems() == []
    assert replace(run, **changed).problems() == [message]


def test_a_clip_for_what_has_no_direction_is_not_taken_silently() -> None:
    (problem,) = replace(RUN, edits=(Edit(),), score_clip="ViT-B-32/openai").problems()
    assert "leave --score-clip out" in problem
    assert replace(RUN, edits=(Edit(),), score_clip="none").problems() == []


def test_versions_name_what_decides_arithmetic_and_files() -> None:
    assert {"torch", "diffusers", "ray", "pyarrow"} <= set(versions())
