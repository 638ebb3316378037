"""What would be lost: edit models that are trained into a bucket, epochs when a process dies, attributes beside one that fails,
and the latents that were asked for."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faulty
import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TinyDomain
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from servers import ROOT
from test_checks import save_latents
from test_end_to_end import run

from jobs.cli import _status
from jobs.finetune import TrainingFailedError, finetune, train
from models.domains import DOMAINS
from models.recipe import Tuning
from models.weights import edit_models_in, file_of, load_card
from pipeline.config import ConfigError, TuneRun
from pipeline.training import fit_all, rows_wanted
from pipeline.tuning import make_tune_plan


@pytest.fixture(scope="module")
def head(s3: str) -> Iterator[Cluster]:
    """A Ray whose processes know the bucket."""
    with faulty.cluster(0) as cluster:
        yield cluster


@pytest.fixture
def tune(tiny_domain: TinyDomain, tmp_path: Path) -> TuneRun:
    domain = tiny_domain()
    return TuneRun(
        latents=save_latents(tmp_path / "latents", domain, domain.recipe).path,
        output=str(tmp_path / "models"),
        domain=domain,
        attribute="smiling",
        source_text="face",
        target_text="smiling face",
        recipe=domain.recipe,
        tuning=Tuning(steps_down=2, images=2, batch=1, epochs=5),
    )


@pytest.mark.slow
def test_an_edit_model_is_trained_into_a_bucket_once_and_nothing_else_is_left_there(
    s3: str, tune: TuneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domain, models = tmp_path / "tiny.json", f"{s3}/trained/models"
    recipe = {name: getattr(tune.recipe, name) for name in ("return_step", "steps_up", "steps_down")}
    domain.write_text(json.dumps({"weights": tune.domain.weights, "noun": "face", "clip": tune.domain.clip, "recipe": recipe}))
    words = ("--name", "smiling", "--source-text", "face", "--target-text", "smiling face", "--epochs", "2", "--images", "2")
    done = run("finetune", tune.latents, models, "--domain", str(domain), *words, "--steps-down", "2", "--cpus", "1")
    assert f"{models}/smiling.safetensors: smiling in" in " ".join(done.stdout.split())
    store = fsspec.filesystem("s3")
    there = store.find(models, detail=True)
    assert sorted(there) == [f"shared/trained/models/smiling.{suffix}" for suffix in ("json", "safetensors")]
    reference = edit_models_in(models)["smiling"]
    assert (load_card(reference).target, load_card(reference).images) == ("smiling face", 2)
    assert all(tensor.isfinite().all() for tensor in load_file(file_of(reference)).values())
    asked = {"name": "smiling", "source_text": "face", "target_text": "smiling face", "images": 2, "steps_down": 2, "cpus": 1.0}
    finetune(tune.latents, models, domain=str(domain), **asked, epochs=2)  # type: ignore[arg-type]
    assert f"{reference} is there from the same request; nothing to train" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match=rf"{reference} was made by another request \(tuning epochs was 2, now 3\); give another"):
        finetune(tune.latents, models, domain=str(domain), **asked, epochs=3)  # type: ignore[arg-type]
    store.invalidate_cache()
    assert store.find(models, detail=True) == there


class Killer:
    """Kills processes of a cluster by a part of their names, once some epochs are behind."""

    def __init__(self, cluster: Cluster, name: str):
        self.raylet, self.name = psutil.Process(cluster.head_node.all_processes["raylet"][0].process.pid), name
        self.killed = 0
        self.steps: list[float] = []
        """Seen after it."""

    def __call__(self, latest: dict[str, dict[str, float]]) -> None:
        for now in latest.values():
            if self.killed:
                self.steps.append(now["step"])
            elif now["epoch"] >= 2:
                self.kill()

    def kill(self) -> None:
        for process in self.raylet.children(recursive=True):
            if self.name in " ".join(process.cmdline()):
                process.kill()
                self.killed += 1


def same_weights(one: str, other: str) -> bool:
    states = [load_file(file_of(reference)) for reference in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_the_epoch_in_hand_and_neither_the_attribute_nor_a_bit_of_it(
    head: Cluster, s3: str, tune: TuneRun
) -> None:
    calm, killed = make_tune_plan(tune), make_tune_plan(replace(tune, output=f"{s3}/killed/models"))
    train([calm], 1)
    killer = Killer(head, "RayTrainWorker")
    (tuned,) = fit_all([killed], 1, killer)
    assert tuned.error is None
    assert killer.killed == 1
    assert min(killer.steps) > 2, "two images, one a step: it went on after the first epoch at least"
    assert same_weights(killed.file, calm.file)
    assert load_card(killed.file) == load_card(calm.file)
    assert len(fsspec.filesystem("s3").find(f"{s3}/killed")) == 2


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_from_its_checkpoint_in_the_bucket(head: Cluster, s3: str, tune: TuneRun) -> None:
    plan = make_tune_plan(replace(tune, output=f"{s3}/stopped/models"))
    killer = Killer(head, "TrainController")
    (tuned,) = fit_all([plan], 1, killer)
    assert killer.killed
    assert tuned.error
    assert not make_tune_plan(plan.run).done
    steps: list[float] = []
    (tuned,) = fit_all([plan], 1, lambda latest: steps.extend(now["step"] for now in latest.values()))
    assert tuned.error is None
    assert min(steps) > 2
    assert make_tune_plan(plan.run).done
    assert len(fsspec.filesystem("s3").find(f"{s3}/stopped")) == 2


@pytest.mark.slow
def test_an_attribute_that_fails_does_not_take_the_others_along_and_is_told_in_a_line_after_one_try(head: Cluster, tune: TuneRun) -> None:
    good = make_tune_plan(replace(tune, tuning=replace(tune.tuning, epochs=2)))
    bad = make_tune_plan(replace(tune, attribute="broken", max_pixels=10))
    with pytest.raises(TrainingFailedError) as failed:
        train([good, bad], parallel=2)
    assert _status(failed.value) == 1
    (line,) = str(failed.value).splitlines()
    assert line.startswith("broken was not trained: the source of a latent cannot be decoded"), "and no word of Ray's, as after many tries"
    assert line.endswith("give the --max-pixels of invert, or invert again")
    assert sorted(file.name for file in Path(tune.output).iterdir()) == [".training", "smiling.json", "smiling.safetensors"]
    assert make_tune_plan(good.run).done


# ---- which latents ---------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import ray
from pipeline.config import Source
from pipeline.sources import find
from pipeline.training import first_usable

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
rows = first_usable(find(Source(path=sys.argv[1])), int(sys.argv[2])).take_all()
print(",".join(row["id"] for row in rows))
"""


def test_the_first_usable_rows_are_taken_in_order_even_if_most_of_the_beginning_was_rejected(tmp_path: Path) -> None:
    for i in range(5):
        ids = [f"{64 * i + row:03d}" for row in range(64)]
        errors = [None if int(name) % 100 == 3 or int(name) > 310 else "no face" for name in ids]
        table = {"id": ids, "image": [b"x"] * 64, "latent": [[0.0]] * 64, "error": pa.array(errors, pa.string())}
        pq.write_table(pa.table(table), tmp_path / f"part-{64 * i:012d}.parquet")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "6"]
    calm = {**os.environ, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=calm)
    assert done.stdout.split()[-1:] == ["003,103,203,303,311,312"], done.stdout + done.stderr[-3000:]


def test_as_many_latents_are_looked_at_as_the_images_are_to_be_chosen_from() -> None:
    assert rows_wanted(Tuning(images=32, choose_from=96, held_out=4)) == 100
    assert rows_wanted(Tuning(images=48)) == 48
    assert rows_wanted(DOMAINS["pixelface"].tuning) == 192
