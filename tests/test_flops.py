"""What would be lost: plans that count the arithmetic of the network that runs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.domains import DOMAINS, Domain
from models.flops import call_flops, clip_flops, counted, identity_flops, network_config, network_of, training_flops
from models.references import WeightsError


def test_a_convolution_counts_a_multiplication_and_an_addition_for_each_weight_and_place() -> None:
    with torch.device("meta"):
        layer, x = nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 10, 10)
        assert counted(lambda: layer(x)) == 2 * (3 * 3 * 3) * 8 * 100


def test_the_network_of_the_paper_is_counted_without_its_weights() -> None:
    network = network_of(network_config(DOMAINS["celebahq-256"]))
    assert sum(p.numel() for p in network.parameters()) == 113_673_219
    assert call_flops(network) == pytest.approx(497e9, rel=0.001)


def test_training_takes_three_calls_and_low_rank_weights_spare_most_of_one(tiny_domain: Callable[..., Domain]) -> None:
    config = network_config(tiny_domain(16))
    call = call_flops(network_of(config))
    whole, all_numbers = training_flops(network_of(config), None)
    low, few_numbers = training_flops(network_of(config), 1)
    assert 2.8 * call < whole <= 3 * call
    assert 2 * call < low < whole
    assert few_numbers < all_numbers == sum(p.numel() for p in network_of(config).parameters())


def test_a_class_conditional_network_is_counted_too() -> None:
    config = {"sample_size": 16, "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "norm_num_groups": 4}
    config |= {"up_block_types": ["UpBlock2D"] * 2, "layers_per_block": 1}
    assert call_flops(network_of({**config, "num_class_embeds": 5})) == call_flops(network_of(config))


def test_what_looks_at_pictures_is_counted(tiny_domain: Callable[..., Domain]) -> None:
    tiny = clip_flops(tiny_domain(16).clip)
    assert 0 < tiny < clip_flops("RN50") < clip_flops("ViT-B-16/openai")
    assert clip_flops("ViT-B-16/openai") == pytest.approx(35.1e9, rel=0.01)
    assert identity_flops() == pytest.approx(12.6e9, rel=0.1)


def test_a_domain_without_a_configuration_is_refused(tiny_domain: Callable[..., Domain], tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(WeightsError, match=r"config\.json"):
        network_config(replace(tiny_domain(16), weights=str(tmp_path)))
