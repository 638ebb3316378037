"""What would be lost: an edit model comes back as it was saved, and a wrong or hostile file is refused by name."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.weights import Card, WeightsError, fingerprint, load_card, load_into, save_edit_model

CARD = Card(
    attribute="smiling",
    domain="tiny",
    domain_fingerprint="0123456789abcdef",
    source="face",
    target="smiling face",
    recipe={"return_step": 300},
    tuning={"epochs": 2},
    images=3,
    steps=4,
    losses={"loss": 0.5},
    versions={"torch": "2"},
)


def network(seed: int = 0, width: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.GroupNorm(2, width), nn.Conv2d(width, 3, 3))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_edit_model(tmp_path / "edits", network(1).state_dict(), CARD)


def test_an_edit_model_comes_back_as_it_was_saved_with_its_card(saved: Path) -> None:
    assert saved.name == "smiling.safetensors"
    model = network(2)
    load_into(model, saved)
    for name, tensor in network(1).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().float()), name
    assert load_card(saved) == CARD


def test_saving_again_replaces_weights_and_card(saved: Path) -> None:
    save_edit_model(saved.parent, network(3).state_dict(), replace(CARD, steps=99))
    model = network(2)
    load_into(model, saved)
    assert torch.equal(model.state_dict()["0.weight"], network(3).state_dict()["0.weight"].half().float())
    assert load_card(saved).steps == 99
    assert len(list(saved.parent.iterdir())) == 2


def test_weights_of_another_network_are_refused_with_the_keys_that_differ(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"smiling\.safetensors does not fit the model: 3\.weight missing, left over"):
        load_into(nn.Sequential(*network(), nn.PReLU()), saved)
    save_file({**network().state_dict(), "extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match="extra missing, left over or of another shape"):
        load_into(network(), tmp_path / "more.safetensors")


def test_weights_of_another_width_are_refused_without_a_list_of_everything(saved: Path) -> None:
    model = network(width=8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"0\.bias, 0\.weight, 1\.bias and 2 more missing, left over or of another shape"):
        load_into(model, saved)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing", "folder"])
def test_a_damaged_file_is_named(saved: Path, damage: str) -> None:
    data = saved.read_bytes()
    saved.unlink()
    if damage == "folder":
        saved.mkdir()
    elif damage != "missing":
        saved.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"\xff" * 999}[damage])
    with pytest.raises(WeightsError, match=r"smiling\.safetensors is not a readable safetensors file"):
        load_into(network(), saved)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    mark, file = tmp_path / "exploded", tmp_path / "smiling.safetensors"
    for write in (lambda: file.write_bytes(pickle.dumps(Bomb(mark))), lambda: torch.save({"bomb": Bomb(mark)}, file)):
        write()
        with pytest.raises(WeightsError, match="not a readable safetensors file"):
            load_into(network(), file)
        assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is none"


def test_weights_without_a_card_are_refused(saved: Path) -> None:
    saved.with_suffix(".json").unlink()
    with pytest.raises(WeightsError, match=r"smiling\.safetensors has no card; .*smiling\.json does not exist"):
        load_card(saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", json.dumps({**asdict(CARD), "more": 1}), json.dumps({"attribute": "x"})], ids=range(7)
)
def test_a_file_that_is_no_card_is_refused_with_what_a_card_has(saved: Path, text: str) -> None:
    saved.with_suffix(".json").write_text(text)
    with pytest.raises(WeightsError, match=r"smiling\.json is not the card of an edit model .* it has attribute, domain"):
        load_card(saved)


def test_the_fingerprint_changes_with_a_single_byte_and_with_nothing_else(saved: Path, tmp_path: Path) -> None:
    data = bytearray(saved.read_bytes())
    first = fingerprint(saved)
    assert len(first) == 16
    assert int(first, 16) >= 0
    (tmp_path / "copy").write_bytes(data)
    assert fingerprint(tmp_path / "copy") == first
    data[-1] ^= 1
    saved.write_bytes(data)
    assert fingerprint(saved) != first


def test_the_fingerprint_of_a_folder_is_that_of_its_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.safetensors does not exist"):
        fingerprint(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(tmp_path) == fingerprint(file)
