"""What would be lost: a hundred attributes on one disk, each of them exactly the network that was trained."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from tiny import tiny_unet
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models import lora
from models.unet import NoiseUNet
from models.weights import WeightsError

CELEBA: dict[str, Any] = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    "attention_head_dim": None,
}
"""The architecture of google/ddpm-ema-celebahq-256."""


def inputs(count: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(count) * 300


def adapted(rank: int = 4, seed: int = 0, **settings: Any) -> UNet2DModel:
    unet = deepcopy(tiny_unet(16, **settings)).eval()
    lora.add(unet, rank, seed)
    return unet


def trained(rank: int = 4) -> UNet2DModel:
    """Adapters as training leaves them: no B is zero any more."""
    unet, noise = adapted(rank), torch.Generator().manual_seed(5)
    lora.load(unet, {key: 0.2 * torch.randn(weight.shape, generator=noise) for key, weight in lora.state(unet).items()})
    return unet


def test_training_starts_from_exactly_the_base_model() -> None:
    x, t = inputs()
    assert torch.equal(adapted()(x, t).sample, tiny_unet(16).eval()(x, t).sample)


@pytest.mark.parametrize("rank", [1, 4])
def test_merged_weights_compute_what_the_adapters_compute_under_the_plain_names(rank: int) -> None:
    x, t = inputs()
    unet, merged = trained(rank), tiny_unet(16).eval()
    before, base = merged(x, t).sample, tiny_unet(16)
    lora.merge_into(merged, lora.state(unet))
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(merged(x, t).sample, unet(x, t).sample, rtol=1e-5, atol=1e-5)
    assert (merged(x, t).sample - before).abs().max() > 0.1


def test_every_convolution_and_linear_layer_is_adapted_and_no_other_weight() -> None:
    unet, merged, base = trained(), tiny_unet(16), tiny_unet(16)
    lora.merge_into(merged, lora.state(unet))
    changed = {key for key, weight in base.state_dict().items() if not torch.equal(weight, merged.state_dict()[key])}
    matrices = {key for key, weight in base.state_dict().items() if weight.dim() > 1}
    assert changed == matrices
    assert {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight", "mid_block.attentions.0.to_q.weight"} <= changed


@pytest.mark.parametrize("kind", ["timestep", None], ids=["linear", "lookup"])
def test_the_embeddings_of_classes_and_of_time_are_left_alone(kind: str | None) -> None:
    settings: dict[str, Any] = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "time_embedding_type": "learned"}
    unet = UNet2DModel(**settings, **blocks, num_class_embeds=7, class_embed_type=kind, num_train_timesteps=1000)
    lora.add(unet, 2)
    paths = {key.split(".lora_")[0] for key in lora.state(unet)}
    assert "time_embedding.linear_1" in paths
    assert not any(path.startswith(("class_embedding", "time_proj")) for path in paths)


def test_only_the_adapters_are_trained_and_a_loss_falls_while_the_base_weights_stay() -> None:
    unet = adapted()
    model, (x, t) = NoiseUNet(unet), inputs()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(w.numel() for w in lora.state(unet).values())
    base = {k: v.clone() for k, v in unet.state_dict().items() if ".lora_" not in k}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model(x, t) - 0.5 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(weight, unet.state_dict()[key]) for key, weight in base.items())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)


def test_the_first_weights_follow_the_seed_and_not_the_global_random_state() -> None:
    torch.manual_seed(1)
    first = lora.state(adapted(seed=3))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second, third = lora.state(adapted(seed=3)), lora.state(adapted(seed=4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())
    assert not torch.equal(first["conv_in.lora_A.weight"], third["conv_in.lora_A.weight"])
    assert all(not weight.any() for key, weight in first.items() if ".lora_B." in key)
    assert all(weight.std() > 0 for key, weight in first.items() if ".lora_A." in key)


def test_names_and_shapes_of_a_file_are_those_that_diffusers_writes() -> None:
    state = lora.state(adapted(rank=3))
    assert state["mid_block.attentions.0.to_out.0.lora_A.weight"].shape == (3, 16)
    assert state["mid_block.attentions.0.to_out.0.lora_B.weight"].shape == (16, 3)
    assert state["conv_in.lora_A.weight"].shape == (3, 3, 3, 3)
    assert state["conv_in.lora_B.weight"].shape == (8, 3, 1, 1)
    assert lora.rank_of(state) == 3


def test_a_file_in_half_precision_gives_the_network_that_was_trained(tmp_path: Path) -> None:
    x, t = inputs()
    unet = trained()
    halves = {k: v.half() for k, v in lora.state(unet).items()}
    save_file(halves, tmp_path / "edit.safetensors")
    state = load_file(tmp_path / "edit.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float16}
    merged, resumed = tiny_unet(16).eval(), adapted()
    lora.merge_into(merged, state)
    lora.load(resumed, state)
    assert {p.dtype for p in (*merged.parameters(), *resumed.parameters())} == {torch.float32}
    torch.testing.assert_close(merged(x, t).sample, resumed(x, t).sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged(x, t).sample, unet(x, t).sample, rtol=0, atol=5e-3)
    expected = tiny_unet(16).conv_in.weight + (  # the product of half-precision numbers in single precision: no product is rounded twice
        halves["conv_in.lora_B.weight"].float().flatten(1) @ halves["conv_in.lora_A.weight"].float().flatten(1)
    ).view(8, 3, 3, 3)
    assert torch.equal(merged.conv_in.weight, expected)


def test_a_state_taken_up_again_goes_on_where_it_was() -> None:
    x, t = inputs()
    unet, other = trained(), adapted(seed=9)
    lora.load(other, lora.state(unet))
    assert torch.equal(other(x, t).sample, unet(x, t).sample)


def test_a_copy_is_a_network_of_its_own() -> None:
    x, t = inputs()
    model = NoiseUNet(trained())
    copy = deepcopy(model)
    assert torch.equal(copy(x, t), model(x, t))
    lora.load(copy.unet, {k: torch.zeros_like(v) for k, v in lora.state(copy.unet).items()})
    torch.testing.assert_close(copy(x, t), NoiseUNet(tiny_unet(16).eval())(x, t))
    assert not torch.allclose(model(x, t), copy(x, t), atol=1e-2)


def test_gradients_are_the_same_with_recomputation() -> None:
    x, t = inputs()
    gradients = []
    for call in (lambda m: m(x, t), lambda m: checkpoint(m, x, t, use_reentrant=False)):
        model = NoiseUNet(trained())
        call(model).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
        assert plain.any()


def test_adapters_are_used_and_trained_in_mixed_precision() -> None:
    x, t = inputs()
    unet = trained()
    mixed, exact = NoiseUNet(unet, "bfloat16"), NoiseUNet(unet)
    noise = mixed(x, t)
    assert not torch.equal(noise, exact(x, t))
    torch.testing.assert_close(noise, exact(x, t), rtol=0.1, atol=0.15)
    noise.square().mean().backward()
    gradients = [p.grad for p in mixed.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("rank", "millions"), [(4, 1.38), (8, 2.76), (16, 5.52)])
def test_a_file_of_the_real_face_network_is_a_fiftieth_of_the_whole(rank: int, millions: float) -> None:
    with torch.device("meta"):
        unet = UNet2DModel(**CELEBA)
        full = sum(p.numel() for p in unet.parameters())
        lora.add(unet, rank)
    assert full == 113_673_219
    state = lora.state(unet)
    assert len(state) == 2 * 154
    assert sum(w.numel() for w in state.values()) == pytest.approx(millions * 1e6, abs=5e3)


def other(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    key = "conv_in.lora_A.weight"
    if how == "missing":
        return {k: v for k, v in state.items() if k != key}
    if how == "left over":
        return state | {"conv_in_2.lora_A.weight": state[key]}
    if how == "shape":
        return state | {key: state[key][:, :2]}
    return lora.state(adapted(out_channels=6))  # another network


@pytest.mark.parametrize("how", ["missing", "left over", "shape", "another network"])
def test_weights_of_another_network_are_refused_before_anything_is_changed(how: str) -> None:
    unet, plain = adapted(), tiny_unet(16)
    state = other(lora.state(trained()), how)
    named = {"another network": "conv_out.lora_B.weight", "left over": "conv_in_2.lora_A.weight"}.get(how, "conv_in.lora_A.weight")
    with pytest.raises(WeightsError, match=f"do not fit the model: {named} missing, left over or of another shape"):
        lora.load(unet, state)
    with pytest.raises(WeightsError, match=f"do not fit the model: {named} missing, left over or of another shape"):
        lora.merge_into(plain, state)
    assert all(torch.equal(w, plain.state_dict()[k]) for k, w in tiny_unet(16).state_dict().items())
    assert all(torch.equal(w, lora.state(unet)[k]) for k, w in lora.state(adapted()).items())


def test_weights_of_another_rank_are_refused_by_adapters_and_merged_by_their_own() -> None:
    state = lora.state(trained(2))
    with pytest.raises(WeightsError, match="and 99 more missing"):
        lora.load(adapted(4), state)
    lora.merge_into(tiny_unet(16), state)


def test_whole_weights_are_no_low_rank_weights_and_adapters_no_plain_network() -> None:
    with pytest.raises(WeightsError, match=r"one rank throughout; these have no lora_A\.weight"):
        lora.merge_into(tiny_unet(16), tiny_unet(16).state_dict())
    mixed = lora.state(adapted(4)) | {"conv_in.lora_A.weight": torch.zeros(2, 3, 3, 3)}
    with pytest.raises(WeightsError, match="these have ranks 2, 4"):
        lora.merge_into(tiny_unet(16), mixed)
    with pytest.raises(WeightsError, match="do not fit the model"):
        lora.merge_into(adapted(), lora.state(trained()))


def test_a_second_set_of_adapters_and_a_rank_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="has low-rank adapters already"):
        lora.add(adapted(), 4)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        lora.add(tiny_unet(16), 0)


def test_merging_needs_no_peft() -> None:
    """Workers that edit must not wait seconds for what only training needs."""
    code = "import sys, models.lora; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, timeout=120).returncode == 0
