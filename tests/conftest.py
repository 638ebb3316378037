"""What many tests share: a domain small enough to walk in milliseconds, its edit models, and pictures on disk."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from servers import Web, s3_server, web_server
from tiny import picture, save_clip, save_diffusion

from models.domains import Domain
from models.recipe import Recipe
from models.unet import load_base
from models.weights import Card, fingerprint, save_edit_model
from pipeline.config import Part

torch.set_num_threads(1)  # the networks of these tests are far too small to share

LONG = (
    "test_end_to_end.py",
    "test_lost_nodes.py",
    "test_training.py",
    "test_faults.py",
    "test_submit.py",
    "test_resume.py",
    "test_alignment.py",
    "test_storage.py",
)
"""Files that start Ray, longest first: begun at the end, one of them would go on alone while the other processes have nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


TinyDomain = Callable[..., Domain]


@pytest.fixture(scope="session")
def tiny_domain(tmp_path_factory: pytest.TempPathFactory) -> TinyDomain:
    """``tiny_domain(size=16, **changes)``: a domain with a random UNet and CLIP and without a judge."""

    @cache
    def made(size: int) -> Domain:
        folder = tmp_path_factory.mktemp(f"domain{size}")
        return Domain(
            name="tiny",
            noun="picture",
            image_size=size,
            weights=str(save_diffusion(folder / "diffusion", size)),
            clip=str(save_clip(folder / "clip")),
            edits=str(folder / "edits"),
            about="random weights",
            licence="none",
            recipe=Recipe(return_step=300, steps_up=5, steps_down=4),
        )

    return lambda size=16, **changes: replace(made(size), **changes)


TinyEdit = Callable[..., Part]


@pytest.fixture(scope="session")
def tiny_edit() -> TinyEdit:
    """``tiny_edit(domain, name, weight=1.0)``: an edit model of a domain, its base with other last weights."""

    def made(domain: Domain, name: str, weight: float = 1.0) -> Part:
        state = {k: v.clone() for k, v in load_base(domain.weights).unet.state_dict().items()}
        noise = torch.Generator().manual_seed(sum(map(ord, name)))
        state["conv_out.weight"] += 0.2 * torch.randn(state["conv_out.weight"].shape, generator=noise)
        card = Card(
            attribute=name,
            domain=domain.name,
            domain_fingerprint=fingerprint(domain.weights),
            source="face",
            target=f"{name} face",
            recipe=domain.recipe.to_dict(),
            tuning={},
            images=1,
            steps=1,
        )
        file = save_edit_model(Path(domain.edits or ""), state, card)
        return Part(name=name, file=str(file), weight=weight, source=card.source, target=card.target)

    return made


@pytest.fixture(scope="session")
def face_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the format of the face recognition network."""
    from models.identity import IRSE50

    file = tmp_path_factory.mktemp("identity") / "model_ir_se50.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(IRSE50().eval().state_dict(), file)
    return file


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of downloaded weights, empty; for the processes that a test starts as well."""
    monkeypatch.setenv("DIFFUSIONCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """``s3://BUCKET`` on a server of this machine; fill it through fsspec, in a folder of the test's own."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").makedirs("shared")
        yield "s3://shared"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    """An http server of the folder ``web`` that remembers what it was asked."""
    (tmp_path / "web").mkdir()
    with web_server(tmp_path / "web") as server:
        yield server


@pytest.fixture
def save_pictures(tmp_path: Path) -> Callable[..., Path]:
    """``save_pictures("a.png", "deep/b.jpg", folder="pictures")``: distinct pictures in a folder."""

    def saved(*names: str, folder: str = "pictures", side: int = 16) -> Path:
        root = tmp_path / folder
        for seed, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            picture(seed, side).save(root / name)
        return root

    return saved
