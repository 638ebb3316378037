"""What would be lost: any diffusers DDPM folder is a base model, and what is not is refused in words."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyDomain, TinyEdit
from diffusers import DDPMScheduler
from tiny import save_diffusion, tiny_unet

from models.unet import NoiseUNet, load_alpha_bars, load_base, load_edit_model
from models.weights import WeightsError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_diffusion(tmp_path / "diffusion", 16)


def inputs(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(count) * 300


def test_learned_variance_channels_are_cut_off() -> None:
    x, t = inputs()
    unet = tiny_unet(16, out_channels=6)
    noise = NoiseUNet(unet)(x, t)
    assert noise.shape == x.shape
    assert torch.equal(noise, unet(x, t).sample[:, :3])


def test_a_folder_saved_by_diffusers_is_loaded_frozen_and_as_it_was(folder: Path) -> None:
    x, t = inputs()
    model = load_base(folder)
    torch.testing.assert_close(model(x, t), tiny_unet(16).eval()(x, t).sample)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert load_base(folder) is model


def test_the_network_is_told_the_timestep_of_each_image(folder: Path) -> None:
    x, t = inputs()
    model = load_base(folder)
    both = model(x[:1].expand(2, -1, -1, -1), t)
    torch.testing.assert_close(both[1:], model(x[:1], t[1:]))
    assert not torch.allclose(both[0], both[1], atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_leaves_weights_and_walk_in_float32(folder: Path, precision: str) -> None:
    x, t = inputs()
    model, exact = load_base(folder, precision), load_base(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    noise = model(x, t)
    assert noise.dtype == torch.float32
    assert not torch.equal(noise, exact(x, t))
    torch.testing.assert_close(noise, exact(x, t), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"])
def test_an_incomplete_folder_is_refused_with_the_file_that_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=rf"has no {name}; it must be a diffusers UNet2DModel folder"):
        load_base(folder)


def test_the_noise_levels_are_those_of_diffusers(folder: Path) -> None:
    got = load_alpha_bars(folder)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, DDPMScheduler.from_pretrained(folder).alphas_cumprod, rtol=1e-4, atol=0)


def test_the_noise_levels_follow_the_folder_and_not_the_usual_numbers(folder: Path) -> None:
    DDPMScheduler(num_train_timesteps=500, beta_start=2e-4, beta_end=0.03).save_config(folder)
    got = load_alpha_bars(folder)
    assert len(got) == 500
    torch.testing.assert_close(got, DDPMScheduler.from_pretrained(folder).alphas_cumprod, rtol=1e-4, atol=0)


@pytest.mark.parametrize("changed", [{"beta_schedule": "scaled_linear"}, {"prediction_type": "v_prediction"}])
def test_another_schedule_or_prediction_is_refused_rather_than_walked_wrongly(folder: Path, changed: dict[str, str]) -> None:
    file = folder / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(WeightsError, match="only linear betas and noise"):
        load_alpha_bars(folder)


def test_an_edit_model_is_another_network_and_leaves_the_base_alone(tiny_domain: TinyDomain, tiny_edit: TinyEdit) -> None:
    domain = tiny_domain()
    base, (x, t) = load_base(domain.weights), inputs()
    before = base(x, t)
    edited = load_edit_model(domain.weights, tiny_edit(domain, "smiling").file)
    assert edited is not base
    assert not torch.allclose(edited(x, t), before, atol=1e-3)
    assert torch.equal(load_base(domain.weights)(x, t), before)


def test_an_edit_model_of_another_domain_is_refused(tiny_domain: TinyDomain, save_foreign: Callable[[], Path]) -> None:
    with pytest.raises(WeightsError, match="does not fit the model"):
        load_edit_model(tiny_domain().weights, save_foreign())


@pytest.fixture
def save_foreign(tmp_path: Path) -> Callable[[], Path]:
    def saved() -> Path:
        tiny_unet(16, out_channels=6).save_pretrained(tmp_path / "foreign")
        return tmp_path / "foreign" / "diffusion_pytorch_model.safetensors"

    return saved
