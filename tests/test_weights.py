"""What would be lost: an edit model comes back as it was saved, from wherever it was put, and a wrong or hostile file is refused."""

import json
import os
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pytest
import torch
from faulty_s3 import faulty_s3
from safetensors.torch import save_file
from servers import Web, elsewhere, hub_server
from tiny import save_diffusion
from torch import nn

from models.domains import DOMAINS
from models.weights import Card, WeightsError, edit_models_in, file_of, fingerprint, load_card, load_into, save_edit_model

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
    return Path(save_edit_model(tmp_path / "edits", network(1).state_dict(), CARD))


def test_an_edit_model_comes_back_as_it_was_saved_with_its_card(saved: Path) -> None:
    assert saved.name == "smiling.safetensors"
    model = network(2)
    load_into(model, saved)
    for name, tensor in network(1).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().float()), name
    assert load_card(saved) == CARD


def test_others_may_read_an_edit_model_as_they_may_its_card(saved: Path) -> None:
    """On a shared disk the jobs of other users read it; safetensors alone would keep it from them."""
    assert saved.stat().st_mode == saved.with_suffix(".json").stat().st_mode


def test_a_save_that_fails_leaves_the_pair_as_it_was_or_no_card(saved: Path) -> None:
    card, weights = saved.with_suffix(".json").read_bytes(), saved.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_edit_model(saved.parent, network(3).state_dict(), replace(CARD, tuning={"path": Path()}))
    assert (saved.with_suffix(".json").read_bytes(), saved.read_bytes()) == (card, weights)
    saved.unlink()
    (saved / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"smiling\.safetensors"):
        save_edit_model(saved.parent, network(3).state_dict(), CARD)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name], "new weights beside an old card would be a lie"


def test_a_save_into_a_bucket_that_fails_leaves_no_card(s3: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, clients = f"{s3}/saved/in/vain", fsspec.get_filesystem_class("s3")
    assert save_edit_model(folder, network(1).state_dict(), CARD) == f"{folder}/smiling.safetensors"
    store = fsspec.filesystem("s3")
    assert store.cat_file(f"{folder}/smiling.safetensors") == saved.read_bytes()
    assert store.cat_file(f"{folder}/smiling.json") == saved.with_suffix(".json").read_bytes()
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"]) as proxy, monkeypatch.context() as patch:
        proxy.fault = lambda method, path: "denied" if method == "PUT" and ".safetensors" in path else None
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        clients.clear_instance_cache()
        with pytest.raises(PermissionError):
            save_edit_model(folder, network(3).state_dict(), CARD)
    clients.clear_instance_cache()
    assert edit_models_in(folder) == {}
    assert fsspec.filesystem("s3").find(folder) == ["shared/saved/in/vain/smiling.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), 1e6], ids=["not a number", "too large for float16"])
def test_weights_that_are_not_finite_are_never_saved(saved: Path, value: float) -> None:
    before = saved.read_bytes()
    broken = network(3).state_dict()
    broken["2.bias"][0] = value
    with pytest.raises(ArithmeticError, match=r"1 tensors of the edit model smiling are not finite, 2\.bias"):
        save_edit_model(saved.parent, broken, CARD)
    assert saved.read_bytes() == before


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


def test_a_card_from_before_low_rank_models_is_one_of_a_whole_network(saved: Path) -> None:
    old = {key: value for key, value in asdict(CARD).items() if key not in {"rank", "clips"}}
    saved.with_suffix(".json").write_text(json.dumps(old))
    assert load_card(saved) == CARD
    assert load_card(saved).rank is None


def test_a_card_with_keys_too_many_or_too_few_names_them(saved: Path) -> None:
    wrong = {key: value for key, value in asdict(CARD).items() if key not in {"steps", "images"}} | {"more": 1}
    saved.with_suffix(".json").write_text(json.dumps(wrong))
    with pytest.raises(WeightsError, match=r"\(missing images, steps; unknown more\)"):
        load_card(saved)


def test_a_folder_tells_the_edit_models_that_have_cards(saved: Path, tmp_path: Path) -> None:
    save_edit_model(saved.parent, network().state_dict(), replace(CARD, attribute="v1.5 glasses"))
    (saved.parent / "uncarded.safetensors").touch()
    (saved.parent / "unweighted.json").touch()
    found = edit_models_in(saved.parent)
    assert found == {"smiling": str(saved), "v1.5 glasses": str(saved.parent / "v1.5 glasses.safetensors")}
    assert load_card(found["v1.5 glasses"]).attribute == "v1.5 glasses"
    with pytest.raises(WeightsError, match="is not a folder; give a local folder"):
        edit_models_in(tmp_path / "none")


def test_edit_models_in_a_bucket_or_on_the_web_are_used_as_local_ones(saved: Path, s3: str, web: Web, empty_cache: Path) -> None:
    fsspec.filesystem("s3").put(str(saved.parent), "shared/edits", recursive=True)
    shutil.copytree(saved.parent, web.folder / "edits")
    for folder in (f"{s3}/edits", f"{web.url}/edits"):
        reference = edit_models_in(folder)["smiling"]
        assert load_card(reference) == CARD
        assert not list(empty_cache.rglob("*.safetensors")), "names and cards are known before any weights are fetched"
        assert fingerprint(reference) == fingerprint(saved)
        model = network(2)
        load_into(model, file_of(reference))
        assert torch.equal(model.state_dict()["0.weight"], network(1).state_dict()["0.weight"].half().float())
        shutil.rmtree(empty_cache / "files")
    with pytest.raises(WeightsError, match="s3://shared/none does not exist"):
        edit_models_in(f"{s3}/none")


def test_edit_models_on_the_hub_are_used_as_local_ones(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved.parent, tmp_path / "hub" / "me" / "edits" / "faces")
    code = """
from models.weights import edit_models_in, file_of, fingerprint, load_card
reference = edit_models_in("hf://me/edits/faces")["smiling"]
print(reference, load_card(reference).target, fingerprint(reference), file_of(reference).name)
"""
    with hub_server(tmp_path / "hub") as url:
        env = {"HF_ENDPOINT": url, "HF_HOME": tmp_path / "hf", "HF_HUB_DISABLE_PROGRESS_BARS": 1}
        said = elsewhere(code, **env)
        assert said == f"hf://me/edits/faces/smiling.safetensors smiling face {fingerprint(saved)} smiling.safetensors"
    assert elsewhere(code, **env, HF_HUB_OFFLINE=1) == said


def test_weights_in_float16_or_bfloat16_are_loaded_as_float32(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        save_file({k: v.to(dtype) for k, v in network(1).state_dict().items()}, tmp_path / "low.safetensors")
        model = network(2)
        load_into(model, tmp_path / "low.safetensors")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model.state_dict()["0.weight"], network(1).state_dict()["0.weight"].to(dtype).float())


def test_the_fingerprint_of_a_base_model_changes_with_all_that_decides_its_output_and_with_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        fingerprint(tmp_path)
    folder = save_diffusion(tmp_path / "model", 16)
    before = fingerprint(folder)

    def changed(file: str, **values: object) -> str:
        text = (folder / file).read_text()
        said = json.loads(text)
        (folder / file).write_text(json.dumps(dict(reversed((said | values).items()))))
        now = fingerprint(folder)
        (folder / file).write_text(text)
        return now

    (folder / "README.md").touch()
    assert changed("config.json", _diffusers_version="0.1", _name_or_path="somewhere", sample_size=64, dropout=0.1) == before
    assert changed("scheduler_config.json", _class_name="DDIMScheduler", clip_sample=True, steps_offset=1) == before
    for file, values in (
        ("config.json", {"norm_num_groups": 2}),
        ("config.json", {"flip_sin_to_cos": False}),
        ("scheduler_config.json", {"beta_end": 0.03}),
        ("scheduler_config.json", {"num_train_timesteps": 500}),
        ("scheduler_config.json", {"prediction_type": "v_prediction"}),
    ):
        assert changed(file, **values) != before
    save_diffusion(folder, 16, seed=1)
    assert fingerprint(folder) != before


def test_the_ready_made_edit_models_are_of_the_base_model_that_is_shipped() -> None:
    domain = DOMAINS["pixelface"]
    cards = [load_card(file) for file in edit_models_in(str(domain.edits)).values()]
    assert {card.domain_fingerprint for card in cards} == {fingerprint(domain.weights)}
