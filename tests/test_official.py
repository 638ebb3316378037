"""What would be lost: a checkpoint is recognised, and one that cannot be converted is refused in words."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from original_unets import SIZE, adm, ddpm, real
from tiny import refusal
from torch import Tensor

from models.official import ARCHITECTURES, architecture_of, changed


def test_a_structure_that_is_not_in_the_table_is_described_with_the_options_to_give():
    state = adm(attention_levels=(1,), scale_shift=True, num_classes=5, out_channels=6).state_dict()
    message = refusal(lambda: architecture_of(state, attention_order="legacy"))
    assert "adm of 32 channels, levels 32/64, 1 residual blocks each, attention in level 1 and the middle, scale-shift norm" in message
    assert "resampling by convolutions, learned variance, 5 classes" in message
    assert "give --head-channels, --image-size, or" in message
    assert "give --image-size, or" in refusal(lambda: architecture_of(ddpm().state_dict()))  # all else is known of a ddpm


def test_given_values_change_a_recognised_architecture():
    name, architecture = architecture_of(real("adm-256"), image_size=128, attention_order="new")
    assert (name, architecture.image_size, architecture.attention_order, architecture.head_channels) == ("adm-256", 128, "new", 64)


def without(state: dict[str, Tensor], *words: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if not any(word in key for word in words)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: {"weight": torch.zeros(1)}, "of no known family"),
        (lambda: UNet2DModel(block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]).state_dict(),
         "in diffusers' form already"),
        (lambda: without(ddpm().state_dict(), "down.0.block.0.conv1"), "has no down.0.block.0.conv1.weight"),
        (lambda: without(ddpm().state_dict(), "conv_out"), "has no conv_out.weight"),
        (lambda: without(adm().state_dict(), "input_blocks.3."), "has no input_blocks.3.0.in_layers.2.weight"),
        (lambda: without(adm().state_dict(), "output_blocks.1.0."), "has no output_blocks.1.0.in_layers.2.weight"),
        (lambda: adm().state_dict() | {"time_embed.0.weight": torch.zeros(3)}, "too few dimensions"),
        (lambda: without(ddpm().state_dict(), "downsample", "upsample"), "resamples without convolutions"),
        (lambda: without(adm().state_dict(), "input_blocks.2.", "output_blocks.1.1."), "resamples without convolutions"),
        (lambda: ddpm().state_dict() | {"down.1.block.0.conv_shortcut.weight": torch.zeros(64, 32, 3, 3)}, "3x3 convolutions"),
        (lambda: adm().state_dict() | {"input_blocks.3.0.skip_connection.weight": torch.zeros(64, 32, 3, 3)}, "3x3 convolutions"),
        (lambda: adm().state_dict() | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "takes 6 and gives 3 channels"),
        (lambda: ddpm(ch_mult=(2, 2)).state_dict(), "not as wide as its first convolution"),
    ],
)  # fmt: skip
def test_a_state_dict_that_cannot_become_a_network_of_diffusers_says_why(make, says):
    assert says in refusal(lambda: architecture_of(make(), head_channels=32, attention_order="legacy", image_size=SIZE))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"image_size": 100}, "a multiple of 32"),
        ({"image_size": 0}, "a multiple of 32"),
        ({"attention_order": "old"}, "legacy or new"),
        ({"head_channels": 48}, "must divide 512"),
        ({"head_channels": -1}, "must divide 512"),
    ],
)
def test_impossible_values_are_refused(given, says):
    assert says in refusal(lambda: changed(ARCHITECTURES["iddpm-256"], **given))


def test_a_ddpm_has_one_head_and_says_so():
    assert "one attention head" in refusal(lambda: architecture_of(ddpm().state_dict(), image_size=SIZE, head_channels=8))


def test_widths_that_cannot_be_normalised_in_32_groups_are_refused():
    structure = replace(ARCHITECTURES["ddpm-256"].structure, widths=(128, 128, 256, 256, 512, 520))
    assert "multiples of 32" in refusal(lambda: changed(replace(ARCHITECTURES["ddpm-256"], structure=structure)))
