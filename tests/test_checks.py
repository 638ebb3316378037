"""What would be lost: what a worker would miss, misread or silently do otherwise is said before anything starts, in one sentence."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TinyDomain, TinyEdit
from servers import Web
from tiny import picture, save_clip, save_diffusion

from jobs.prospect import of_tuning
from models.domain_files import domain_from_folder
from models.domains import Domain
from models.folders import SCHEDULER
from models.recipe import Recipe, Tuning
from models.weights import Card, load_card
from pipeline import schema
from pipeline.codec import encode_png, to_pictures, to_tensor
from pipeline.config import ConfigError, Edit, Resources, Run, Source, TuneRun
from pipeline.plan import make_plan
from pipeline.stages import Invert
from pipeline.tuning import TunePlan, make_tune_plan


@pytest.fixture
def domain(tiny_domain: TinyDomain, tmp_path: Path) -> Domain:
    """With a folder of edit models of its own, which may be spoilt."""
    return replace(tiny_domain(), edits=str(tmp_path / "edits"))


@pytest.fixture
def tiny_run(domain: Domain, save_pictures: Callable[..., Path], tmp_path: Path) -> Run:
    pictures = save_pictures(*(f"{i}.png" for i in range(3)))
    return Run(source=Source(path=str(pictures)), output=str(tmp_path / "out"), domain=domain, recipe=domain.recipe)


def save_latents(folder: Path, domain: Domain, recipe: Recipe) -> Source:
    """A table of three latents, made and named as ``invert`` does."""
    from models.weights import fingerprint

    images = [{"bytes": encode_png(to_pictures(to_tensor([_pixels(i)]))[0]), "path": None} for i in range(3)]
    table = pa.table({"id": ["a", "b", "c"], "image": pa.array(images, schema.IMAGE)})
    about = {"domain": domain.name, "domain_fingerprint": fingerprint(domain.weights), "recipe": recipe.to_dict()}
    columns = schema.latents_schema(pa.schema([]), domain.image_size, about)
    folder.mkdir(parents=True)
    pq.write_table(Invert(domain, recipe, Resources())(table).select(columns.names).cast(columns), folder / "part-000000000000.parquet")
    return Source(path=str(folder))


def _pixels(seed: int) -> Any:
    import numpy as np

    return np.asarray(picture(seed)).transpose(2, 0, 1)


@pytest.fixture
def tune(domain: Domain, tmp_path: Path) -> TuneRun:
    return TuneRun(
        latents=save_latents(tmp_path / "latents", domain, domain.recipe).path,
        output=str(tmp_path / "models"),
        domain=domain,
        attribute="smiling",
        source_text="face",
        target_text="smiling face",
        recipe=domain.recipe,
        tuning=Tuning(steps_down=2, images=2),
    )


def refused(make: Callable[[], Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        make()
    return caught.value.problems


# ---- references ------------------------------------------------------------------------------------------------------


def test_local_references_mean_the_same_on_workers_whose_working_directory_is_another(
    tiny_run: Run, tune: TuneRun, tiny_edit: TinyEdit, face_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "clip")
    (tmp_path / "face.safetensors").symlink_to(face_weights)
    part = replace(tiny_edit(tiny_run.domain, "smiling"), file="edits/smiling.safetensors")
    run = make_plan(replace(tiny_run, edits=(Edit(parts=(part,)),), score_clip="clip", identity="face.safetensors")).run
    assert run.edits[0].parts[0].file == str(tmp_path / "edits/smiling.safetensors")
    assert (run.score_clip, run.identity) == (str(tmp_path / "clip"), str(tmp_path / "face.safetensors"))
    tuning = replace(tune.tuning, id_weight=0.5)
    tuned = make_tune_plan(replace(tune, clips=("clip", "./clip"), identity="face.safetensors", tuning=tuning)).run
    assert (set(tuned.clips), tuned.identity) == ({str(tmp_path / "clip")}, str(tmp_path / "face.safetensors"))


def test_missing_clips_and_identity_weights_are_named_before_anything_starts_and_none_is_fetched(
    tiny_run: Run, tune: TuneRun, tiny_edit: TinyEdit, web: Web, empty_cache: Path
) -> None:
    edits = (Edit(parts=(tiny_edit(tiny_run.domain, "smiling"),)),)
    of_edit = refused(lambda: make_plan(replace(tiny_run, edits=edits, score_clip="no/clip/here", identity=f"{web.url}/none.pth")))
    assert [problem.partition(";")[0] for problem in of_edit[1:]] == [f"{web.url}/none.pth does not exist"]
    assert "no/clip/here" in of_edit[0]
    tuning = replace(tune.tuning, id_weight=0.5)
    of_tuning = refused(lambda: make_tune_plan(replace(tune, clips=(f"{web.url}/denied/clip",), identity="none.pth", tuning=tuning)))
    assert len(of_tuning) == 2
    assert "may not be read" in of_tuning[0]
    assert "none.pth does not exist; the identity network is IR-SE50" in of_tuning[1]
    (web.folder / "face.pth").write_bytes(b"x" * 100)
    make_plan(replace(tiny_run, edits=edits, identity=f"{web.url}/face.pth"))
    assert not [asked for asked in web.asked if asked == "GET /face.pth"]


# ---- the base model --------------------------------------------------------------------------------------------------


def test_steps_are_those_of_the_base_models_own_schedule(tiny_run: Run, tune: TuneRun, tmp_path: Path) -> None:
    folder = save_diffusion(tmp_path / "short", 16)
    scheduler = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps(scheduler | {"num_train_timesteps": 200}))
    short = domain_from_folder(folder)
    assert (short.recipe.return_step, short.recipe.projection_step) == (100, 100)
    assert make_plan(replace(tiny_run, domain=short, recipe=short.recipe)).run.recipe.return_step == 100
    said = "the return step must lie between 1 and 199; got 300"
    assert said in refused(lambda: make_plan(replace(tiny_run, domain=short)))
    assert said in refused(lambda: make_tune_plan(replace(tune, domain=short)))
    (folder / "domain.json").write_text(json.dumps({"noun": "cat", "recipe": {"return_step": 150}}))
    assert domain_from_folder(folder).recipe.return_step == 150, "what is said explicitly is meant"
    (folder / SCHEDULER).write_text(json.dumps(scheduler | {"num_train_timesteps": 4000}))
    long = domain_from_folder(folder)
    assert make_plan(replace(tiny_run, domain=long, recipe=replace(long.recipe, return_step=3000))).run.recipe.return_step == 3000


def test_images_that_the_network_cannot_halve_and_labels_that_it_does_not_know_are_refused(tiny_run: Run) -> None:
    odd = replace(tiny_run, domain=replace(tiny_run.domain, image_size=17), recipe=replace(tiny_run.recipe, class_label=3))
    size, label = refused(lambda: make_plan(odd))
    assert "halves images 1 times, so their size must be a multiple of 2; the domain's is 17" in size
    assert "knows no classes; leave the class label 3 out" in label


# ---- edit models -----------------------------------------------------------------------------------------------------


def changed_card(file: str, **changes: Any) -> None:
    card = Path(file).with_suffix(".json")
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))


def test_an_edit_model_of_another_walk_is_noted_and_one_of_another_class_or_base_model_refused(tiny_run: Run, tiny_edit: TinyEdit) -> None:
    part = tiny_edit(tiny_run.domain, "smiling")
    run = replace(tiny_run, edits=(Edit(parts=(part,)), Edit(parts=(part,), degree=0.5)))
    assert make_plan(run).notes == ()
    changed_card(part.file, recipe=tiny_run.recipe.to_dict() | {"return_step": 601})
    (note,) = make_plan(run).notes
    assert "smiling was tuned with return step 601 (here 300)" in note
    changed_card(part.file, recipe=tiny_run.recipe.to_dict() | {"class_label": 7}, domain_fingerprint="0" * 16)
    strange, label = refused(lambda: make_plan(run))
    assert "belongs to base model tiny (0000000000000000)" in strange
    assert "was tuned with class label 7 and this walk has no class label; give --class-label 7" in label


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_latents_may_be_walked_down_otherwise_than_they_were_walked_up_and_the_record_has_both(tiny_run: Run, tmp_path: Path) -> None:
    up = tiny_run.recipe
    source = save_latents(tmp_path / "latents", tiny_run.domain, up)
    down = replace(up, solver="ddim", spacing="linspace", eta=0.5, seed=3)
    (output,) = make_plan(replace(tiny_run, source=source, recipe=down, edits=(Edit(),))).outputs
    about = schema.about(output.columns)
    assert (about["recipe"], about["latents_recipe"]) == (down.to_dict(), up.to_dict())
    for name, value in {"return_step": 301, "steps_up": 6, "inversion": "stochastic"}.items():
        run = replace(tiny_run, source=source, recipe=replace(up, **{name: value}), edits=(Edit(),))  # type: ignore[arg-type]
        (problem,) = refused(partial(make_plan, run))
        assert f"were made with {name} {getattr(up, name)}, but {value} is asked for" in problem


def test_latents_of_the_same_weights_with_another_schedule_are_of_another_base_model(tiny_run: Run, tmp_path: Path) -> None:
    source = save_latents(tmp_path / "latents", tiny_run.domain, tiny_run.recipe)
    other = Path(shutil.copytree(tiny_run.domain.weights, tmp_path / "other"))
    scheduler = json.loads((other / SCHEDULER).read_text())
    (other / SCHEDULER).write_text(json.dumps(scheduler | {"beta_schedule": "scaled_linear"}))
    domain = replace(tiny_run.domain, weights=str(other))
    (problem,) = refused(lambda: make_plan(replace(tiny_run, source=source, domain=domain, edits=(Edit(),))))
    assert "were made by base model tiny" in problem


# ---- an edit model that is there already -----------------------------------------------------------------------------


def saved(plan: TunePlan) -> TunePlan:
    """As training leaves it, but for the weights."""
    Path(plan.run.output).mkdir(exist_ok=True)
    known = {"domain": "tiny", "domain_fingerprint": "", "source": "", "target": "", "recipe": {}, "tuning": {}, "images": 2, "steps": 1}
    card = Card(**{"attribute": plan.run.attribute, **known, "request": plan.request})  # type: ignore[arg-type]
    Path(plan.file).touch()
    Path(plan.file).with_suffix(".json").write_text(json.dumps(card.__dict__))
    return plan


def test_an_edit_model_of_the_same_request_is_done_and_one_of_another_is_not_replaced_unasked(tune: TuneRun) -> None:
    plan = make_tune_plan(tune)
    assert not plan.done
    saved(plan)
    assert load_card(plan.file).request == plan.request
    assert make_tune_plan(tune).done
    assert make_tune_plan(replace(tune, cpus=2.0)).done, "the machine is no part of the request"
    other = replace(tune, target_text="sad face", tuning=replace(tune.tuning, epochs=7))
    (problem,) = refused(lambda: make_tune_plan(other))
    assert "was made by another request (target text was smiling face, now sad face; tuning epochs was 6, now 7)" in problem
    assert "--overwrite" in problem
    assert not make_tune_plan(replace(other, overwrite=True)).done
    assert not make_tune_plan(replace(tune, overwrite=True)).done
    changed_card(plan.file, request={})
    assert "its card does not say which" in refused(lambda: make_tune_plan(tune))[0]
    Path(plan.file).with_suffix(".json").unlink()
    assert not make_tune_plan(tune).done, "weights without a card were never finished"


def test_a_place_where_edit_models_cannot_be_saved_is_refused_before_anything_starts(tune: TuneRun, web: Web) -> None:
    assert "cannot be written to" in refused(lambda: make_tune_plan(replace(tune, output=f"{web.url}/models")))[0]
    (problem,) = refused(lambda: make_tune_plan(replace(tune, output="hf://me/models")))
    assert problem == "edit models are saved in a local folder or a bucket (s3://); got hf://me/models"


def test_what_is_trained_already_costs_nothing_in_a_plan(tune: TuneRun) -> None:
    other = replace(tune, attribute="sad", target_text="sad face")
    both = of_tuning([tune, other], parallel=2)
    saved(make_tune_plan(tune))
    left = of_tuning([tune, other], parallel=2)
    assert left.work.flops == both.work.flops / 2
    assert [Path(file).name for file in left.written] == ["sad.safetensors"]
    assert "1 of 2 edit models are there from the same request" in left.notes
    saved(make_tune_plan(other))
    assert of_tuning([tune, other], parallel=2).work.flops == 0
