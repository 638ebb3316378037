"""What would be lost: any diffusers DDPM folder is a base model, and what is not is refused in words."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyDomain, TinyEdit
from diffusers import DDIMScheduler, DDPMScheduler
from tiny import save_diffusion, tiny_unet

from models import lora
from models.unet import NoiseUNet, load_alpha_bars, load_base, load_edit_model, trainable
from models.weights import WeightsError, load_card, save_edit_model


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


SCHEDULES = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.1, 0.2, 0.3]},
]


@pytest.mark.parametrize("changed", SCHEDULES, ids=lambda changed: changed.get("beta_schedule", "trained"))
def test_other_schedules_are_diffusers_own(folder: Path, changed: dict[str, Any]) -> None:
    DDPMScheduler(**changed).save_config(folder)
    torch.testing.assert_close(load_alpha_bars(folder), DDPMScheduler.from_pretrained(folder).alphas_cumprod, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_network_that_predicts_something_else_walks_as_diffusers_walks_with_it(folder: Path, prediction: str) -> None:
    """One DDIM step of diffusers, which knows what the network predicts, lands where its step with our noise lands."""
    about = {"beta_end": 0.02, "clip_sample": False, "set_alpha_to_one": False}
    DDIMScheduler(prediction_type=prediction, **about).save_config(folder)
    x, _ = inputs()
    for t in (900, 300, 40):
        steps = torch.full((2,), t)
        theirs, noise_step = (DDIMScheduler(prediction_type=kind, **about) for kind in (prediction, "epsilon"))
        for scheduler in (theirs, noise_step):
            scheduler.set_timesteps(50)
        wanted = theirs.step(load_base(folder).unet(x, steps).sample, t, x).prev_sample
        got = noise_step.step(load_base(folder)(x, steps), t, x).prev_sample
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"beta_schedule": "laplace"}, "the beta schedule 'laplace' is not supported; supported are linear"),
        ({"prediction_type": "flow"}, "predictions of type 'flow' are not supported; supported are epsilon"),
        ({"rescale_betas_zero_snr": True}, "end in pure noise"),
        ({"beta_end": 2.0}, "its betas must lie between 0 and 1"),
        ({"beta_start": "small"}, "impossible numbers"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_followed_is_refused_rather_than_walked_wrongly(folder: Path, changed: dict[str, Any], says: str) -> None:
    file = folder / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(WeightsError, match=says):
        load_alpha_bars(folder)


def test_a_class_is_told_to_every_image_and_none_adds_nothing() -> None:
    """As the official code runs its class-conditional network: without a label."""
    x, t = inputs()
    unet = tiny_unet(16)
    classed = tiny_unet(16, num_class_embeds=5).eval()
    classed.load_state_dict(unet.state_dict(), strict=False)
    label = classed(x, t, torch.tensor([3, 3])).sample
    torch.testing.assert_close(NoiseUNet(classed, class_label=3)(x, t), label)
    torch.testing.assert_close(NoiseUNet(classed)(x, t), unet.eval()(x, t).sample)
    assert not torch.allclose(label, unet(x, t).sample, atol=1e-3)
    with pytest.raises(WeightsError, match="between 0 and 4; got 5"):
        NoiseUNet(classed, class_label=5)
    with pytest.raises(WeightsError, match="knows no classes"):
        NoiseUNet(unet, class_label=0)


def test_a_table_of_sinusoids_is_not_trained() -> None:
    unet = tiny_unet(16, time_embedding_type="learned", num_train_timesteps=1000)
    names = {id(p): name for name, p in unet.named_parameters()}
    assert names.keys() - {id(p) for p in trainable(unet)} == {id(unet.time_proj.weight)}


def test_an_edit_model_is_another_network_and_leaves_the_base_alone(tiny_domain: TinyDomain, tiny_edit: TinyEdit) -> None:
    domain = tiny_domain()
    base, (x, t) = load_base(domain.weights), inputs()
    before = base(x, t)
    edited = load_edit_model(domain.weights, tiny_edit(domain, "smiling").file)
    assert edited is not base
    assert not torch.allclose(edited(x, t), before, atol=1e-3)
    assert torch.equal(load_base(domain.weights)(x, t), before)


def test_an_edit_model_of_another_domain_is_refused(tiny_domain: TinyDomain, tiny_edit: TinyEdit, tmp_path: Path) -> None:
    other = tiny_domain(weights=str(save_diffusion(tmp_path / "other", 16, out_channels=6)), edits=str(tmp_path / "edits"))
    foreign = tiny_edit(other, "smiling").file
    with pytest.raises(WeightsError, match="does not fit the model"):
        load_edit_model(tiny_domain().weights, foreign)


def test_a_low_rank_edit_model_is_added_to_the_base_model(tiny_domain: TinyDomain, tiny_edit: TinyEdit, tmp_path: Path) -> None:
    domain = tiny_domain()
    card = replace(load_card(tiny_edit(domain, "smiling").file), rank=2)
    tuned = deepcopy(load_base(domain.weights))
    lora.add(tuned.unet, 2)
    with torch.no_grad():
        for name, weight in tuned.unet.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    file = save_edit_model(tmp_path, lora.state(tuned.unet), card)
    x, t = inputs()
    merged = load_edit_model(domain.weights, file)
    torch.testing.assert_close(merged(x, t), tuned(x, t), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(merged(x, t), load_base(domain.weights)(x, t), atol=1e-2)
    assert merged.state_dict().keys() == load_base(domain.weights).state_dict().keys()
