"""What would be lost: the published face network, the same part of a picture of any size, and a word when its file is absent."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.identity import IRSE50, Identity, face_of, identity_loss, load_identity
from models.weights import WeightsError

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Random weights and statistics, none of them at its neutral start, under the published names."""
    noise = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in IRSE50().state_dict().items()}
    made: State = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(3)
        elif name.endswith("running_var"):
            made[name] = 0.5 + torch.rand(shape, generator=noise)
        elif len(shape) == 1:  # biases, means, gains and slopes
            made[name] = 0.2 * torch.randn(shape, generator=noise) + (0.5 if name.endswith("weight") else 0.0)
        else:
            made[name] = torch.randn(shape, generator=noise) / shape[1:].numel() ** 0.5
    return made


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the published one is stored: by torch 0.4, before files of torch.save were archives."""
    file = tmp_path_factory.mktemp("identity") / "model_ir_se50.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file


@pytest.fixture(scope="module")
def net(file: Path) -> Identity:
    return load_identity(file)


def faces(size: int, count: int = 1, seed: int = 0) -> Tensor:
    coarse = torch.rand((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (size, size), mode="bilinear")


def published(state: State, x: Tensor) -> Tensor:
    """The published network, written down from its description with nothing but the weights' names in common."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, gain, shift = (state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gain, shift, training=False)

    x = F.conv2d(x, state["input_layer.0.weight"], padding=1)
    x = F.prelu(norm(x, "input_layer.1"), state["input_layer.2.weight"])
    number = 0
    for channels, units in ((64, 3), (128, 4), (256, 14), (512, 3)):
        for stride in [2] + [1] * (units - 1):
            unit = f"body.{number}"
            if x.shape[1] == channels:
                shortcut = F.max_pool2d(x, 1, stride)
            else:
                shortcut = norm(F.conv2d(x, state[f"{unit}.shortcut_layer.0.weight"], stride=stride), f"{unit}.shortcut_layer.1")
            x = F.conv2d(norm(x, f"{unit}.res_layer.0"), state[f"{unit}.res_layer.1.weight"], padding=1)
            x = F.conv2d(F.prelu(x, state[f"{unit}.res_layer.2.weight"]), state[f"{unit}.res_layer.3.weight"], stride=stride, padding=1)
            x = norm(x, f"{unit}.res_layer.4")
            gate = F.conv2d(F.adaptive_avg_pool2d(x, 1), state[f"{unit}.res_layer.5.fc1.weight"])
            gate = F.conv2d(F.relu(gate), state[f"{unit}.res_layer.5.fc2.weight"])
            x = shortcut + x * torch.sigmoid(gate)
            number += 1
    x = norm(x, "output_layer.0").flatten(1)
    x = F.linear(x, state["output_layer.3.weight"], state["output_layer.3.bias"])
    x = norm(x, "output_layer.4")
    return x / x.norm(dim=1, keepdim=True)


# ---- the network -----------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_published_network_on_the_official_crop(net: Identity, state: State) -> None:
    pictures = faces(256, 2)
    want = published(state, F.adaptive_avg_pool2d(pictures[:, :, 35:223, 32:220], (112, 112)))
    assert (want[0] - want[1]).abs().max() > 1e-3, "the two pictures must be told apart, or equality says little"
    torch.testing.assert_close(net.features(pictures), want, rtol=0, atol=1e-5)


def test_names_of_the_weights_are_the_published_ones(state: State) -> None:
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    assert {"input_layer.0.weight", "body.0.res_layer.1.weight", "body.3.shortcut_layer.1.running_var", "output_layer.3.weight"} <= set(
        names
    )
    assert sum(state[name].numel() for name in names if "running" not in name) == 43_797_696
    assert not any(name.startswith("body.0.shortcut_layer") or name.startswith("body.24.") for name in names)


def test_the_gradient_reaches_the_edited_picture_and_neither_the_source_nor_the_network(net: Identity) -> None:
    source, edited = faces(256, seed=1).requires_grad_(), faces(256, seed=2).requires_grad_()
    loss = identity_loss(net, source, edited)
    loss.backward()
    assert loss.shape == ()
    assert source.grad is None
    assert edited.grad is not None
    assert edited.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_the_loss_is_one_less_the_mean_similarity(net: Identity) -> None:
    a, b = faces(256, 2, seed=1), faces(256, 2, seed=2)
    similarity = net.similarity(a, b)
    assert similarity.shape == (2,)
    torch.testing.assert_close(similarity, F.cosine_similarity(net.features(a), net.features(b)))
    torch.testing.assert_close(identity_loss(net, a, b), 1 - similarity.mean())
    torch.testing.assert_close(net.similarity(a[:1], a[:1]), torch.ones(1))


def test_a_training_loop_cannot_switch_it_to_the_statistics_of_the_batch(net: Identity) -> None:
    picture = faces(256)
    before = net.features(picture)
    torch.nn.ModuleList([net]).train()
    torch.testing.assert_close(net.features(picture), before, rtol=0, atol=0)


# ---- what it looks at ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rows", "columns"), [(256, (35, 223), (32, 220)), (512, (70, 446), (64, 440)), (64, (9, 56), (8, 55))])
def test_the_same_share_of_a_picture_is_seen_whatever_its_size(size: int, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    pictures = faces(size).requires_grad_()
    face = face_of(pictures)
    face.sum().backward()
    assert face.shape == (1, 3, 112, 112)
    assert pictures.grad is not None
    seen = pictures.grad[0].abs().sum(0) > 0
    want = torch.zeros_like(seen)
    want[rows[0] : rows[1], columns[0] : columns[1]] = True
    assert torch.equal(seen, want)


def test_a_face_looks_the_same_at_twice_the_size() -> None:
    torch.testing.assert_close(face_of(faces(512)), face_of(faces(256)), rtol=0, atol=0.03)


def test_large_pictures_are_averaged_and_not_skipped_through() -> None:
    stripes = torch.tensor([-1.0, 1.0]).repeat(512).expand(1, 3, 1024, 1024)
    assert face_of(stripes).abs().max() < 0.2


def test_half_precision_pictures_have_the_features_of_a_single_precision_network(net: Identity) -> None:
    features = net.features(faces(256).half())
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, net.features(faces(256)), rtol=0, atol=0.03)


# ---- files -----------------------------------------------------------------------------------------------------------


def message(reference: Path | str) -> str:
    with pytest.raises(WeightsError) as raised:
        load_identity(reference)
    return str(raised.value)


def test_an_absent_file_says_which_one_is_meant_and_its_licence(tmp_path: Path) -> None:
    said = message(tmp_path / "model_ir_se50.pth")
    assert "does not exist" in said
    assert "TreB1eN/InsightFace_Pytorch" in said
    assert "non-commercial research" in said


def test_safetensors_and_files_without_batch_counters_serve_as_well(net: Identity, state: State, tmp_path: Path) -> None:
    file = tmp_path / "identity.safetensors"
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, file)
    torch.testing.assert_close(load_identity(file).features(faces(256)), net.features(faces(256)), rtol=0, atol=0)


def without_a_weight(state: State) -> State:
    return {k: v for k, v in state.items() if k != "body.7.res_layer.2.weight"}


def with_another_weight(state: State) -> State:
    return {**state, "body.24.res_layer.0.weight": torch.zeros(1)}


def with_another_shape(state: State) -> State:
    return {**state, "output_layer.4.bias": torch.zeros(256)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_weight, "missing: body.7.res_layer.2.weight;"),
        (with_another_weight, "left over: body.24.res_layer.0.weight;"),
        (with_another_shape, "of another shape: output_layer.4.bias;"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(state: State, change: Callable[[State], State], said: str, tmp_path: Path) -> None:
    light = {k: torch.zeros(()).expand(v.shape) for k, v in change(state).items()}  # the names and shapes in a small file
    torch.save(light, tmp_path / "other.pth")
    assert said in message(tmp_path / "other.pth")


class Evil:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, archive: bool) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "was-here"
    torch.save({"weight": Evil(trace)}, file, _use_new_zipfile_serialization=archive)
    assert "could run code" in message(file)
    assert not trace.exists()
    with file.with_name("plain.pkl").open("wb") as stream:
        pickle.dump(Evil(trace), stream, protocol=2)  # torch's own
    message(file.with_name("plain.pkl"))
    assert not trace.exists()


@pytest.mark.parametrize("data", [b"", b"<html>no such file</html>", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert str(tmp_path / name) in message(tmp_path / name)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    assert "does not map names to weights" in message(tmp_path / "list.pth")
