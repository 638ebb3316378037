"""What would be lost: published checkpoints become base and edit models by one command, and a wrong request writes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from original_unets import assert_same, ddpm, outputs
from test_checkpoints import WEIGHTS, WritesFile

from jobs import import_command
from models.domain_files import domain_from_folder
from models.official import ARCHITECTURES
from models.references import WeightsError
from models.unet import load_base, load_edit_model
from models.weights import fingerprint, load_card
from pipeline.config import ConfigError


def run(*words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DDPM, as CelebA-HQ's is stored, imported as the base model of faces."""
    root = tmp_path_factory.mktemp("official")
    torch.save(ddpm().state_dict(), root / "celeba_hq.ckpt")
    done = run("import", str(root / "celeba_hq.ckpt"), str(root / "base"), "--image-size", "256", "--domain", "celebahq-256")
    told = " ".join(done.stdout.split())  # lines wrap
    assert "custom, not in the table: ddpm of 32 channels" in told
    assert f"{sum(p.numel() for p in ddpm().parameters()) / 1e6:.1f} million parameters" in told
    assert f"next: diffusionclip invert IMAGES LATENTS --domain {root / 'base'}" in told
    return root / "base"


def test_a_checkpoint_becomes_the_weights_of_a_known_domain(base):
    assert json.loads((base / "domain.json").read_text()) == {"extends": "celebahq-256", "weights": "."}
    assert_same(ddpm(), load_base(base).unet)


def test_a_fine_tuned_checkpoint_becomes_an_edit_model_with_the_texts_of_the_table(base, tmp_path):
    tuned = ddpm()
    with torch.no_grad():
        tuned.conv_out.weight += 0.01
    torch.save({f"module.{key}": tensor for key, tensor in tuned.state_dict().items()}, tmp_path / "human_pixar_t601.pth")
    words = ("--edit", "pixar", "--domain", str(base))
    done = run("import", str(tmp_path / "human_pixar_t601.pth"), str(tmp_path / "edits"), *words)
    assert "from its base" in done.stdout
    assert "warning" not in done.stdout
    card = load_card(tmp_path / "edits" / "pixar.safetensors")
    assert (card.source, card.target, card.recipe["return_step"]) == ("Human", "3D render in the style of Pixar", 601)
    assert card.domain_fingerprint == fingerprint(base)
    got, wanted = outputs(tuned, load_edit_model(base, tmp_path / "edits" / "pixar.safetensors").unet)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-2)  # stored as float16


def test_a_base_model_has_the_noise_schedule_that_was_asked_for(tmp_path):
    torch.save(ddpm().state_dict(), tmp_path / "cosine.pt")
    done = run("import", str(tmp_path / "cosine.pt"), str(tmp_path / "base"), "--image-size", "256", "--schedule", "cosine")
    assert "cosine noise schedule of 1000 steps" in " ".join(done.stdout.split())
    assert domain_from_folder(tmp_path / "base").schedule == "squaredcos_cap_v2, 1000 timesteps"


def test_weights_of_another_base_model_are_doubted(base, tmp_path, capsys):
    torch.save(ddpm(seed=1).state_dict(), tmp_path / "elf.pth")
    texts = {"source_text": "person", "target_text": "elf"}
    import_command.import_checkpoint(str(tmp_path / "elf.pth"), tmp_path / "edits", str(base), edit="my_elf", return_step=500, **texts)
    assert "probably tuned from other base weights" in " ".join(capsys.readouterr().out.split())
    assert load_card(tmp_path / "edits" / "my_elf.safetensors").recipe["return_step"] == 500


def test_a_checkpoint_of_another_network_is_no_edit_model_of_a_domain(base, tmp_path):
    torch.save(ddpm(ch_mult=(1, 1)).state_dict(), tmp_path / "x_t601.pth")
    with pytest.raises(WeightsError, match=r"not of the domain's network: .* and \d+ more are missing, left over or of another shape"):
        import_command.import_checkpoint(str(tmp_path / "x_t601.pth"), tmp_path / "edits", str(base), edit="pixar")
    assert not (tmp_path / "edits").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"architecture": "adm-255"}, "did you mean 'adm-256'?"),
        ({"domain": "celebahq"}, "unknown domain 'celebahq'"),
        ({"domain": "imagenet-512"}, "images of imagenet-512 are 512x512, those of this checkpoint 256x256"),
        ({"schedule": "cos"}, "unknown schedule 'cos': allowed are linear, cosine"),
        ({"schedule": "cosine", "edit": "pixar", "domain": "{base}"}, "the noise schedule of its base model"),
        ({"return_step": 5}, "--return-step belongs to --edit"),
        ({"edit": "pixar"}, "say which with --domain"),
        ({"edit": "../up", "domain": "{base}"}, "letters, digits"),
        ({"edit": "ours", "domain": "{base}"}, "unknown attribute of"),
        ({"edit": "ours", "domain": "{base}", "source_text": "face"}, "need both"),
        ({"edit": "pale", "domain": "{base}"}, "does not tell the return step"),
        ({"edit": "pale", "domain": "{base}", "return_step": 1000}, "between 1 and 999"),
        ({"out": Path("s3://bucket/model")}, "must be a local folder"),
    ],
    ids=str,
)
def test_an_impossible_import_is_refused_and_writes_nothing(words, says, base, tmp_path):
    torch.save(ddpm().state_dict(), tmp_path / "plain.pth")
    given = {name: value.format(base=base) if isinstance(value, str) else value for name, value in words.items()}
    with pytest.raises(ConfigError) as caught:
        import_command.import_checkpoint(str(tmp_path / "plain.pth"), **({"out": tmp_path / "out", "image_size": 256} | given))
    assert says in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["plain.pth"]


def test_hostile_and_unknown_files_end_with_status_2_and_one_line(tmp_path):
    torch.save({"state_dict": WEIGHTS, "extra": WritesFile(tmp_path / "ran")}, tmp_path / "evil.pth")
    done = run("import", str(tmp_path / "evil.pth"), str(tmp_path / "out"), status=2)
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth"]


def test_the_help_names_every_architecture():
    named = import_command.ArchitectureName.__metadata__[0].help
    assert named.rstrip(".").replace(" or ", ", ").split(", ") == list(ARCHITECTURES)
