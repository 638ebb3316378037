"""What would be lost: at the paper's own size everything still fits together, and the walk is still diffusers' DDIM.

The architecture of google/ddpm-ema-celebahq-256 and of CLIP ViT-B/16 with random weights, on the CPU: minutes.
"""

import json
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from test_end_to_end import run
from tiny import picture

from models.conversion import config_of
from models.diffusion import CLEAN, linear_alpha_bars, walk
from models.official import ARCHITECTURES
from models.recipe import MEMORY
from models.unet import NoiseUNet, load_alpha_bars, load_base
from models.weights import load_card
from pipeline import codec, schema

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
LITTLE = ("--steps-up", "2", "--steps-down", "2", "--solver", "ddim", "--spacing", "linspace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain file beside a base model and a CLIP of real size."""
    root = tmp_path_factory.mktemp("celebahq")
    torch.manual_seed(0)
    UNet2DModel.from_config(config_of(ARCHITECTURES["ddpm-256"])).save_pretrained(root / "diffusion")
    DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").save_config(root / "diffusion")
    clip = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    (root / "clip").mkdir()
    statistics = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": open_clip.get_model_config("ViT-B-16-quickgelu"), "preprocess_cfg": statistics}
    (root / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, root / "clip" / "open_clip_model.safetensors")
    (root / "domain.json").write_text(json.dumps({"extends": "celebahq-256", "weights": "diffusion", "clip": "clip"}))
    return root


def test_the_walk_at_real_size_is_that_of_diffusers(folder: Path) -> None:
    model, bars = load_base(str(folder / "diffusion")), load_alpha_bars(str(folder / "diffusion"))
    scheduler = DDIMScheduler.from_pretrained(folder / "diffusion", clip_sample=False, set_alpha_to_one=True)
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = walk(model, x, [499, 249, CLEAN], bars)
        scheduler.set_timesteps(4)
        want = x
        for t, steps in ((499, 4), (249, 4)):
            scheduler.num_inference_steps = steps
            want = scheduler.step(model.unet(want, torch.tensor([t])).sample, t, want).prev_sample
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddpm-256", "iddpm-256", "adm-256"])
def test_the_way_up_at_real_size_is_ddim_turned_around_in_both_families(name: str) -> None:
    torch.manual_seed(1)
    unet, bars = UNet2DModel.from_config(config_of(ARCHITECTURES[name])).eval(), linear_alpha_bars()
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        got = walk(NoiseUNet(unet), x, [CLEAN, 100, 499], bars)
        want, level = x, torch.tensor(1.0)
        for t, above in ((0, bars[100]), (100, bars[499])):  # DiffusionCLIP, eq. 11; below t = 0 the network is told t = 0
            noise = unet(want, torch.tensor([t])).sample[:, :3]
            x0 = (want - (1 - level).sqrt() * noise) / level.sqrt()
            want, level = above.sqrt() * x0 + (1 - above).sqrt() * noise, above
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_invert_finetune_in_every_memory_mode_and_edit_at_real_size(folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(2):
        picture(seed, 256).save(pictures / f"{seed}.png")
    domain, latents, models, out = str(folder / "domain.json"), str(tmp_path / "latents"), str(tmp_path / "models"), tmp_path / "edits"
    common = ("--domain", domain, "--cpus", "2")
    run(
        "invert",
        str(pictures),
        latents,
        *common,
        "--workers",
        "1",
        "--batch",
        "1",
        "--return-step",
        "500",
        *LITTLE[:2],
        *LITTLE[4:],
        limit=600,
    )
    assert pq.read_table(latents)["latent"].null_count == 0
    for memory in MEMORY:
        words = ("--name", memory, "--source-text", "face", "--target-text", "smiling face")
        sizes = ("--images", "2", "--epochs", "1", "--batch", "1", "--steps-down", "2", "--memory", memory)
        run("finetune", latents, models, *words, *sizes, *common, limit=900)
        card = load_card(Path(models, f"{memory}.safetensors"))
        assert (card.images, card.steps) == (2, 2 if memory != "stepwise" else 4)
    losses = {memory: load_card(Path(models, f"{memory}.safetensors")).losses for memory in ("full", "checkpoint")}
    assert losses["full"] == pytest.approx(losses["checkpoint"], rel=1e-3, abs=1e-4)
    words = (*(word for memory in MEMORY for word in ("-a", memory)), "--models", models)
    run("edit", latents, str(out), *words, *common, "--workers", "1", "--batch", "1", "--steps-down", "2", limit=600)
    for name in MEMORY:
        table = pq.read_table(out / name)
        assert table["error"].null_count == 2
        edited = [codec.decode(data, 256) for data in schema.image_bytes(table["edited"])]
        assert all(np.std(pixels) > 1 for pixels in edited)
        assert all(-1 <= value <= 1 for value in table["clip_direction"].to_pylist())
