"""Files of weights: safetensors only, fingerprinted, and edit models with their cards."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class WeightsError(ValueError):
    """Weights that are missing, damaged or of another domain; the message says which and what to do."""


def fingerprint(path: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of a weights file, or of the weights file of a diffusers folder."""
    path = Path(path)
    file = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"{file} does not exist")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Card:
    """How an edit model was made; stored as JSON beside its weights."""

    attribute: str
    domain: str
    domain_fingerprint: str
    source: str
    target: str
    recipe: dict[str, Any]
    tuning: dict[str, Any]
    images: int
    steps: int
    rank: int | None = None
    """Of the low-rank weights; None if the file holds the whole network."""
    clips: list[str] = field(default_factory=list)
    """References of the CLIPs whose directional losses trained it."""
    losses: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def save_edit_model(folder: Path, state: dict[str, Tensor], card: Card) -> Path:
    """Writes ``NAME.safetensors`` (float16) and ``NAME.json`` into ``folder``; returns the weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{card.attribute}.safetensors"
    save_file({k: v.detach().to(torch.float16).contiguous().cpu() for k, v in state.items()}, file)
    file.with_suffix(".json").write_text(json.dumps(asdict(card), indent=2) + "\n")
    return file


def load_card(file: str | Path) -> Card:
    """The card beside an edit model's weights. Raises WeightsError if it is missing or not a card."""
    file = Path(file)
    card_file = file.with_suffix(".json")
    try:
        return Card(**json.loads(card_file.read_text()))
    except FileNotFoundError:
        raise WeightsError(f"the edit model {file.name} has no card; {card_file} does not exist") from None
    except (TypeError, ValueError) as error:
        names = ", ".join(f.name for f in fields(Card))
        raise WeightsError(f"{card_file} is not the card of an edit model ({error}); it has {names}") from None


def load_into(model: nn.Module, file: Path) -> None:
    """Loads an edit model's weights over ``model``'s. Never runs code from the file. Raises WeightsError if keys or shapes differ."""
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not a readable safetensors file: {error}") from None
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise WeightsError(f"{file} does not fit the model: {shown} missing, left over or of another shape")
    model.load_state_dict(state)
