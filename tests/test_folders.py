"""What would be lost: base models as diffusers and its older versions have published them, with one fingerprint wherever they lie."""

import inspect
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from servers import COMMIT, Web, elsewhere
from test_weights import Bomb
from tiny import save_diffusion, tiny_unet
from torch import Tensor

from models.fetching import digest
from models.folders import CONFIG, NETWORK, SCHEDULE, SCHEDULER, WEIGHTS, folder_of, network_problems, read_state, schedule_length
from models.references import WeightsError
from models.unet import load_base
from models.weights import fingerprint

BIN = "diffusion_pytorch_model.bin"


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


def old_names(state: dict[str, Tensor], convolutions: bool) -> dict[str, Tensor]:
    """As diffusers wrote attention before 0.12, with linear layers or, first of all, 1x1 convolutions."""
    renamed = {}
    for key, tensor in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{old}.")
        one_by_one = convolutions and any(f".{old}.weight" in key for old in ("query", "key", "value", "proj_attn"))
        renamed[key] = tensor[..., None, None].contiguous() if one_by_one else tensor
    return renamed


def save_old(folder: Path, form: str, convolutions: bool = False) -> Path:
    """A folder as the first published ones are."""
    save_diffusion(folder, 16)
    state = old_names(load_file(folder / WEIGHTS), convolutions)
    (folder / WEIGHTS).unlink()
    if form == BIN:
        torch.save(state, folder / BIN)
    else:
        save_file(state, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_a_folder_in_normal_form_is_used_where_it_is(tmp_path: Path, empty_cache: Path) -> None:
    folder = save_diffusion(tmp_path / "model", 16)
    assert folder_of(folder) == folder
    assert fingerprint(folder / WEIGHTS) == digest(folder / WEIGHTS)[:16]
    assert not empty_cache.exists()


@pytest.mark.parametrize("form", [WEIGHTS, BIN])
def test_the_first_published_folders_are_loaded_as_diffusers_loads_them(tmp_path: Path, empty_cache: Path, form: str) -> None:
    folder, (x, t) = save_old(tmp_path / "old", form), inputs()
    before = sorted(file.name for file in folder.iterdir())
    wanted = UNet2DModel.from_pretrained(folder, use_safetensors=form == WEIGHTS)(x, t).sample
    torch.testing.assert_close(load_base(folder)(x, t), wanted)
    assert sorted(file.name for file in folder.iterdir()) == before, "the folder is left as it was"


def test_attention_by_convolutions_is_the_same_network(tmp_path: Path, empty_cache: Path) -> None:
    folder, (x, t) = save_old(tmp_path / "old", BIN, convolutions=True), inputs()
    torch.testing.assert_close(load_base(folder)(x, t), tiny_unet(16).eval()(x, t).sample)


def test_a_pipeline_that_diffusers_saves_is_a_base_model(tmp_path: Path, empty_cache: Path) -> None:
    DDPMPipeline(tiny_unet(16), DDPMScheduler(num_train_timesteps=500)).save_pretrained(tmp_path / "pipeline")
    folder, (x, t) = folder_of(tmp_path / "pipeline"), inputs()
    assert {CONFIG, SCHEDULER, WEIGHTS} <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / SCHEDULER).read_text())["num_train_timesteps"] == 500
    torch.testing.assert_close(load_base(tmp_path / "pipeline")(x, t % 500), tiny_unet(16).eval()(x, t % 500).sample)
    assert (schedule_length(tmp_path / "pipeline"), network_problems(tmp_path / "pipeline", 16, None)) == (500, [])
    shutil.copytree(folder, tmp_path / "flat")
    assert fingerprint(tmp_path / "pipeline") == fingerprint(tmp_path / "flat")


def test_what_a_configuration_leaves_out_is_what_diffusers_takes_for_it() -> None:
    told = inspect.signature(UNet2DModel.__init__).parameters
    assert {*NETWORK} == {*told} - {"self", "sample_size", "dropout"}
    assert json.loads(json.dumps({name: told[name].default for name in NETWORK})) == NETWORK
    schedule = inspect.signature(DDPMScheduler.__init__).parameters
    assert {name: schedule[name].default for name in SCHEDULE} == SCHEDULE


def test_safetensors_are_preferred_to_what_may_hold_code(tmp_path: Path) -> None:
    folder = save_diffusion(tmp_path / "model", 16)
    (folder / BIN).write_bytes(b"never read")
    assert folder_of(folder) == folder


def test_one_model_has_one_fingerprint_wherever_and_however_it_is_kept(
    tmp_path: Path, s3: str, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = save_diffusion(tmp_path / "normal", 16)
    fsspec.filesystem("s3").put(str(normal), "shared/fingerprints", recursive=True)
    shutil.copytree(normal, web.folder / "model")
    places = [normal, f"{s3}/fingerprints", f"{web.url}/model", save_old(tmp_path / "a", BIN), save_old(tmp_path / "b", WEIGHTS)]
    for cache in ("one", "two"):
        monkeypatch.setenv("DIFFUSIONCLIP_CACHE", str(tmp_path / cache))
        assert {fingerprint(place) for place in places} == {fingerprint(normal)}
        assert len(list((tmp_path / cache / "models").glob("*/"))) == 3, "contents, not places, tell converted folders apart"


def test_a_folder_in_a_bucket_or_on_the_web_is_a_base_model(s3: str, web: Web, tmp_path: Path, empty_cache: Path) -> None:
    folder, (x, t) = save_diffusion(tmp_path / "model", 16), inputs()
    fsspec.filesystem("s3").put(str(folder), "shared/models/tiny", recursive=True)
    shutil.copytree(folder, web.folder / "tiny" / "unet")
    shutil.move(web.folder / "tiny" / "unet" / SCHEDULER, web.folder / "tiny" / SCHEDULER)
    for reference in (f"{s3}/models/tiny", f"{web.url}/tiny"):
        torch.testing.assert_close(load_base(reference)(x, t), tiny_unet(16).eval()(x, t).sample)
    assert web.asked.count(f"GET /tiny/unet/{WEIGHTS}") == 1


def test_offline_a_model_of_the_hub_is_loaded_from_the_hubs_cache(tmp_path: Path, empty_cache: Path) -> None:
    home = tmp_path / "hf"
    for name, unet in (("tiny", ""), ("pipeline", "unet")):
        model = home / "hub" / f"models--google--{name}"
        snapshot = model / "snapshots" / COMMIT
        save_diffusion(snapshot / unet, 16)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(COMMIT)
    code = """
from models.weights import folder_of, fingerprint
for name in ("google/tiny", "google/pipeline", "google/none"):
    print(folder_of(name), fingerprint(name))
"""
    shutil.move(snapshot / "unet" / SCHEDULER, snapshot / SCHEDULER)
    tiny, pipeline, none = elsewhere(code, HF_HOME=home, HF_HUB_OFFLINE=1).splitlines()
    in_place = home / "hub" / "models--google--tiny" / "snapshots" / COMMIT
    assert tiny == f"{in_place} {fingerprint(in_place)}"
    assert pipeline.startswith(f"{empty_cache}/models/")
    assert pipeline.endswith(fingerprint(in_place))
    assert none.startswith("NotCachedError hf://google/none/config.json is not in the local cache (nor is there a local path google/none)")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SCHEDULER])
def test_an_incomplete_folder_is_refused_with_the_file_that_is_missing(tmp_path: Path, name: str) -> None:
    folder = save_diffusion(tmp_path / "model", 16)
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=rf"model has no {name}; it must be a diffusers UNet2DModel folder"):
        folder_of(folder)


def test_weights_in_several_files_say_how_to_save_them_in_one(tmp_path: Path) -> None:
    folder = save_diffusion(tmp_path / "model", 16)
    (folder / WEIGHTS).unlink()
    tiny_unet(16).save_pretrained(folder, max_shard_size="10KB")
    with pytest.raises(WeightsError, match="has its weights in several files; save them in one, with a larger max_shard_size"):
        folder_of(folder)


@pytest.mark.parametrize("coder", ["vae", "vqvae"])
def test_a_latent_diffusion_pipeline_is_refused_though_its_network_would_fit(tmp_path: Path, coder: str) -> None:
    DDPMPipeline(tiny_unet(16), DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {coder: ["diffusers", "VQModel"]}))
    with pytest.raises(WeightsError, match=rf"is a latent diffusion pipeline \(it has a {coder}\); only models of pixels can be used"):
        folder_of(tmp_path / "pipeline")


@pytest.mark.parametrize("damage", ["bomb", "truncated", "garbage", "empty", "no tensors"])
def test_bin_weights_that_are_not_plain_tensors_are_refused_and_never_run(tmp_path: Path, empty_cache: Path, damage: str) -> None:
    folder, mark = save_old(tmp_path / "old", BIN), tmp_path / "exploded"
    data = (folder / BIN).read_bytes()
    if damage in {"bomb", "no tensors"}:
        torch.save({"bomb": Bomb(mark)} if damage == "bomb" else {"step": 3}, folder / BIN)
    else:
        (folder / BIN).write_bytes({"truncated": data[: len(data) // 2], "garbage": b"\x80" * 999, "empty": b""}[damage])
    with pytest.raises(
        WeightsError, match=r"model\.bin is not a (file of plain tensors, and no code is run from it|dictionary of tensors)"
    ):
        folder_of(folder)
    assert not mark.exists()
    assert list((empty_cache / "models").glob("*/")) == []


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    torch.save({"a": shared, "b": shared[1:]}, tmp_path / "a.bin")
    save_file(read_state(tmp_path / "a.bin"), tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["b"], shared[1:])


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_an_index_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    DDPMPipeline(tiny_unet(16), DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "model_index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"model_index\.json is not (JSON|a JSON object)"):
        folder_of(tmp_path / "pipeline")


def test_a_damaged_conversion_is_refused_with_both_digests(tmp_path: Path, empty_cache: Path) -> None:
    folder = save_old(tmp_path / "old", BIN)
    weights = folder_of(folder) / WEIGHTS
    good, data = digest(weights), bytearray(weights.read_bytes())
    data[-1] ^= 1
    data.append(0)
    weights.write_bytes(data)
    with pytest.raises(
        WeightsError, match=rf"is damaged: it should have SHA-256 {good} and has {digest(weights)}; delete it and run again"
    ):
        folder_of(folder)
    weights.unlink()
    assert digest(folder_of(folder) / WEIGHTS) == good


def test_many_at_once_convert_a_folder_once(tmp_path: Path, empty_cache: Path) -> None:
    folder = save_old(tmp_path / "old", BIN)
    with ThreadPoolExecutor(4) as pool:
        (found,) = set(pool.map(folder_of, [folder] * 4))
    assert {file.name for file in found.iterdir()} == {CONFIG, SCHEDULER, WEIGHTS}
    assert len(list((empty_cache / "models").glob("*/"))) == 1
