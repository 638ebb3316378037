"""What would be lost: a published checkpoint computes after its conversion what it computed before."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from original_unets import SIZE, TIMES, adm, assert_same, ddpm, outputs, real
from tiny import refusal
from torch import Tensor

from models.conversion import config_of, convert, empty_network, learned_time, save
from models.diffusion import linear_alpha_bars
from models.official import ARCHITECTURES, architecture_of
from models.unet import load_alpha_bars, load_base


def imported(state: dict[str, Tensor], **given: Any) -> Any:
    """The converted network, with ``given`` for what the file does not tell."""
    _, architecture = architecture_of(state, **({"image_size": SIZE} | given))
    config, converted = convert(state, architecture)
    network: Any = UNet2DModel.from_config(config)
    network.load_state_dict(converted)
    return network.eval()


@pytest.mark.parametrize(
    "shape",
    [
        {"ch_mult": (1, 1)},
        {"ch_mult": (1, 2), "num_res_blocks": 2},
        {"ch_mult": (1, 2, 4), "attn_levels": (1,)},
        {"ch_mult": (1, 2), "attn_levels": (0, 1), "num_res_blocks": 2, "out_ch": 6},
    ],
    ids=["no_shortcut", "shortcut", "attention_between", "attention_everywhere"],
)
def test_a_ddpm_computes_after_the_conversion_what_it_computed_before(shape):
    original = ddpm(**shape)
    assert_same(original, imported(original.state_dict()))


@pytest.mark.parametrize("new_order", [False, True], ids=["legacy", "new"])
@pytest.mark.parametrize("scale_shift", [False, True], ids=["shift", "scale_shift"])
@pytest.mark.parametrize("resblock_updown", [False, True], ids=["by_convolution", "by_block"])
def test_an_adm_computes_after_the_conversion_what_it_computed_before(resblock_updown, scale_shift, new_order):
    original = adm(
        resblock_updown=resblock_updown,
        scale_shift=scale_shift,
        new_attention_order=new_order,
        head_channels=16,  # two heads on the first level, four on the second
        attention_levels=(0, 1),
        num_res_blocks=1 + scale_shift,
    )
    assert_same(original, imported(original.state_dict(), head_channels=16, attention_order="new" if new_order else "legacy"))


@pytest.mark.parametrize("resblock_updown", [False, True], ids=["by_convolution", "by_block"])
def test_levels_without_attention_between_others_with_it_are_converted(resblock_updown):
    original = adm(channel_mult=(1, 1, 2), attention_levels=(1,), resblock_updown=resblock_updown, scale_shift=True)
    assert_same(original, imported(original.state_dict(), head_channels=32, attention_order="legacy"))


def test_learned_variance_and_classes_are_converted():
    original = adm(out_channels=6, num_classes=7, scale_shift=True, resblock_updown=True)
    converted = imported(original.state_dict(), head_channels=32, attention_order="legacy")
    labels = torch.tensor([0, 6, 3, 1, 1])
    assert_same(original, converted, labels)
    assert outputs(original, converted, labels)[0].shape[1] == 6
    assert not torch.allclose(outputs(original, converted, labels)[0], outputs(original, converted, labels.flip(0))[0], atol=1e-2)


def test_one_head_over_all_channels_of_every_level_is_converted():
    original = adm(channel_mult=(1, 1), attention_levels=(0, 1), head_channels=32)
    assert_same(original, imported(original.state_dict(), head_channels=0, attention_order="new"))


def test_a_first_level_narrower_than_the_sinusoid_gets_a_table_of_timesteps_that_changes_nothing():
    original = adm(model_channels=256, channel_mult=(0.5, 0.5), head_channels=64, scale_shift=True, resblock_updown=True)
    converted = imported(original.state_dict(), head_channels=64, attention_order="legacy")
    assert converted.config.time_embedding_type == "learned"
    assert_same(original, converted)


def test_the_table_is_exact_at_every_timestep():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table, turned = learned_time(weight.float(), 128)
    angles = torch.arange(1000)[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    wanted = torch.cat([angles.cos(), angles.sin()], dim=1) @ weight.T
    torch.testing.assert_close(table @ turned.T, wanted.float(), rtol=0, atol=1e-4)


def test_a_first_level_wider_than_the_sinusoid_is_converted():
    original = adm(channel_mult=(2, 2), head_channels=64)
    assert_same(original, imported(original.state_dict(), head_channels=64, attention_order="legacy"))


@pytest.mark.parametrize("wrong", [{"attention_order": "new"}, {"head_channels": 64}, {"head_channels": 0}], ids=str)
def test_what_the_file_does_not_tell_matters(wrong):
    """So the equalities above hold because the right values were used, not because any would do."""
    original = adm(channel_mult=(2, 2), head_channels=16)
    got, wanted = outputs(original, imported(original.state_dict(), **({"head_channels": 16, "attention_order": "legacy"} | wrong)))
    assert (got - wanted).abs().max() > 1e-2


# --- the real configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_checkpoints_are_recognised_and_fill_a_network_of_their_size_completely(name):
    state = real(name)
    assert architecture_of(state) == (name, ARCHITECTURES[name])
    config, converted = convert(state, ARCHITECTURES[name], name)
    own = empty_network(config).state_dict()
    assert {key: tensor.shape for key, tensor in converted.items()} == {key: tensor.shape for key, tensor in own.items()}


@pytest.mark.parametrize(
    ("name", "million", "levels", "heads"),
    [
        ("ddpm-256", 113.7, 6, {1}),
        ("iddpm-256", 93.6, 6, {8}),
        ("adm-256", 552.8, 6, {8, 16}),
        ("adm-256-conditional", 553.8, 6, {8, 16}),
        ("adm-512", 559.0, 7, {8, 16}),
    ],
)
def test_real_networks_have_the_published_sizes(name, million, levels, heads):
    network = empty_network(config_of(ARCHITECTURES[name]))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(million, abs=0.06)
    assert len(network.down_blocks) == levels
    assert {module.heads for module in network.modules() if hasattr(module, "heads")} == heads


def test_the_ddpm_has_the_configuration_that_its_published_conversion_has():
    """That of google/ddpm-ema-celebahq-256 and its siblings, but for names that later versions of diffusers added."""
    published = {
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    }
    ours, theirs = (dict(empty_network(c).config) for c in (config_of(ARCHITECTURES["ddpm-256"]), published))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name] and not name.startswith("_")} == set()


# --- what does not fit is said ----------------------------------------------------------------------------------------


def test_keys_that_are_missing_left_over_or_of_another_shape_are_counted_and_named():
    state = ddpm().state_dict()
    _, architecture = architecture_of(state, image_size=SIZE)
    state["extra.weight"] = torch.zeros(1)
    for key in ("conv_in.bias", "norm_out.bias", "mid.attn_1.q.bias", "mid.attn_1.k.bias", "mid.attn_1.v.weight"):
        del state[key]
    state["conv_out.weight"] = torch.zeros(3, 32, 1, 1)
    message = refusal(lambda: convert(state, architecture, "my-ddpm"))
    assert "does not fit my-ddpm" in message
    assert "conv_in.bias, mid.attn_1.q.bias, mid.attn_1.k.bias and 2 more are missing" in message
    assert "extra.weight is left over" in message
    assert "conv_out.weight (3, 32, 1, 1) instead of (3, 32, 3, 3) is of another shape" in message


def test_a_named_architecture_says_what_differs_from_it():
    message = refusal(lambda: convert(real("iddpm-256"), ARCHITECTURES["adm-256"], "adm-256"))
    assert "does not fit adm-256" in message
    assert "are missing" in message
    assert "time_embed.0.weight (512, 128) instead of (1024, 256)" in message


def test_a_sinusoid_that_does_not_fit_in_the_first_level_is_refused():
    state = adm(model_channels=64, channel_mult=(0.5, 1)).state_dict()
    assert "would be lost" in refusal(lambda: imported(state, head_channels=32, attention_order="legacy"))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_the_saved_folder_is_a_base_model_of_this_project(tmp_path):
    """New order: its query, key and value are views of one matrix until they are saved."""
    original = adm(out_channels=6, scale_shift=True, resblock_updown=True, new_attention_order=True, head_channels=16)
    state = original.state_dict()
    _, architecture = architecture_of(state, head_channels=16, attention_order="new", image_size=SIZE)
    folder = save(tmp_path / "deep" / "model", *convert(state, architecture))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    model = load_base(folder)
    assert_same(original, model.unet)
    x = torch.zeros(1, 3, SIZE, SIZE)
    assert model(x, TIMES[:1]).shape == x.shape
    assert load_alpha_bars(folder)[[0, 999]].tolist() == pytest.approx([0.9999, 4.04e-5], rel=1e-2)
    scheduler = json.loads((folder / "scheduler_config.json").read_text())
    assert {"variance_type": "learned_range", "clip_sample": False, "prediction_type": "epsilon"}.items() <= scheduler.items()


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = ddpm().state_dict()
    return convert(state, architecture_of(state, image_size=SIZE)[1])


def test_the_noise_levels_of_a_folder_saved_as_cosine_are_those_of_the_formula(small, tmp_path):
    """Nichol and Dhariwal 2021, eq. 17: f(t) / f(0), f(t) = cos((t/T + s) / (1 + s) pi/2)^2, s = 0.008; the last beta is 0.999."""
    t = torch.arange(1001, dtype=torch.float64)
    f = ((t / 1000 + 0.008) / 1.008 * math.pi / 2).cos().square()
    got = load_alpha_bars(save(tmp_path / "model", *small, schedule="cosine"))
    torch.testing.assert_close(got[:-1], (f / f[0])[1:-1].float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got[-1], got[-2] * 0.001)
    linear = load_alpha_bars(save(tmp_path / "other", *small))
    torch.testing.assert_close(linear, linear_alpha_bars())


def test_a_folder_that_holds_something_is_not_touched_without_overwrite(small, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "domain.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    assert "--overwrite" in refusal(lambda: save(folder, *small))
    assert sorted(p.name for p in folder.iterdir()) == ["domain.json", "notes.txt"]
    save(folder, *small, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "domain.json").exists()  # it was about other weights
    assert load_base(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_in_the_folders_place_is_not_replaced(small, tmp_path):
    (tmp_path / "model").write_text("mine")
    assert "is a file" in refusal(lambda: save(tmp_path / "model", *small, overwrite=True))
    assert (tmp_path / "model").read_text() == "mine"


def test_nothing_is_left_of_a_folder_that_could_not_be_completed(small, tmp_path):
    config, state = small
    with pytest.raises(AttributeError):
        save(tmp_path / "model", config, state | {"conv_in.bias": None})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(small, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(lambda: save(tmp_path / "file" / "model", *small))


def test_the_current_folder_can_be_written_to(small, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(Path(), *small)
    assert load_base(tmp_path / "here")
