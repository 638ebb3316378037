"""What would be lost: hours that say whether they were measured, and between what they may lie."""

from collections.abc import Callable

import pytest

from models.domains import Domain
from models.flops import network_config
from models.speed import GPUS, WARM_UP, assumed, measured


def test_an_assumed_speed_is_a_share_of_the_peak_and_says_so() -> None:
    speed = assumed("h100", "bfloat16", 0.3)
    assert speed.flops == pytest.approx(0.3 * 989e12)
    assert speed.slowest < speed.flops < speed.fastest
    assert not speed.measured
    assert "assumed: 30% of the 989 TFLOP/s" in speed.about


@pytest.mark.parametrize("utilisation", [0.01, 0.35, 1.0])
def test_the_range_holds_what_was_asked_for(utilisation: float) -> None:
    speed = assumed("a100", "float32", utilisation)
    assert speed.slowest <= speed.flops <= speed.fastest


def test_lower_precision_is_never_slower() -> None:
    assert all(gpu.float32 <= gpu.float16 and gpu.bfloat16 in (None, gpu.float16) for gpu in GPUS.values())


def test_a_gpu_without_hardware_for_a_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="t4 has no hardware for bfloat16"):
        assumed("t4", "bfloat16")


def test_a_measured_speed_lies_between_its_slowest_and_fastest_call(tiny_domain: Callable[..., Domain]) -> None:
    told: list[int] = []
    speed = measured(network_config(tiny_domain(16)), "cpu", "float32", 2, 0.0, lambda calls, seconds: told.append(calls))
    assert 0 < speed.slowest <= speed.flops <= speed.fastest
    assert speed.measured
    assert told == list(range(1, WARM_UP + 3))
    assert "2 calls of 2 images" in speed.about
