"""Weights by reference (``models.references``): fingerprints, and edit models with their cards."""

import hashlib
import json
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from torch import Tensor, nn

from models.fetching import digest, file_of, names_in, write_in_one_stroke
from models.folders import WEIGHTS, decisive, folder_of, read_state, write_state
from models.references import SUFFIXES, MissingError, WeightsError, beside, inside, place_of, public

__all__ = [
    "Card",
    "WeightsError",
    "edit_model_file",
    "edit_models_in",
    "file_of",
    "fingerprint",
    "folder_of",
    "load_card",
    "load_into",
    "parse_card",
    "read_state",
    "save_edit_model",
]


def fingerprint(reference: str | Path) -> str:
    """16 hex digits. Of a weights file: the first of its SHA-256. Of a base model: of its weights and of all that decides an output
    in its configurations, so that another noise schedule is another base model."""
    place = place_of(reference)
    if Path(place.path).is_file() if place.kind == "local" else place.path.partition("?")[0].endswith(SUFFIXES):
        return digest(file_of(reference))[:16]
    folder = folder_of(reference)
    parts = {WEIGHTS: digest(folder / WEIGHTS), **decisive(folder)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
    request: dict[str, Any] = field(default_factory=dict)
    """Everything that decided the weights, by flat names; empty if they were not made by ``diffusionclip finetune``."""


def edit_models_in(folder: str | Path) -> dict[str, str]:
    """Name -> reference of every ``NAME.safetensors`` with a card ``NAME.json`` in a folder; no weights are fetched.
    Raises WeightsError if the folder is missing, may not be read or cannot be reached."""
    names = set(names_in(folder))
    stems = sorted(name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors"))
    return {stem: inside(folder, f"{stem}.safetensors") for stem in stems if f"{stem}.json" in names}


def edit_model_file(folder: str | Path, name: str) -> str:
    """Reference of an edit model's weights in a folder, which need not be there yet."""
    file = f"{name}.safetensors"
    return inside(folder, file) if "://" in str(folder) else str(Path(folder) / file)


def save_edit_model(folder: str | Path, state: dict[str, Tensor], card: Card) -> str:
    """Writes ``NAME.safetensors`` (float16) and ``NAME.json`` into a folder, which may be any address that fsspec knows; returns
    the reference of the weights.

    Whoever reads meanwhile sees both or no card: each file appears whole, and an old card goes before new weights come.
    Raises ArithmeticError, and writes nothing, for weights that are not finite as float16; OSError, or what the client of a
    store raises, if they cannot be written.
    """
    state = {name: tensor.detach().to(torch.float16).contiguous().cpu() for name, tensor in state.items()}
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ArithmeticError(
            f"{len(broken)} tensors of the edit model {card.attribute} are not finite, {broken[0]} for one, so it is not saved; "
            f"lower the learning rate"
        )
    text = json.dumps(asdict(card), indent=2) + "\n"  # before anything is touched: it may hold what JSON does not know
    fs, root = url_to_fs(str(folder))
    if "file" in fs.protocol:
        _save_here(Path(root), state, card.attribute, text.encode())
    else:
        _save_there(fs, root, state, card.attribute, text.encode())
    return edit_model_file(folder, card.attribute)


def _save_here(folder: Path, state: dict[str, Tensor], name: str, card: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.safetensors"
    part = file.with_name(f".{file.name}.{uuid4().hex}.part")
    try:
        write_state(part, state)
        file.with_suffix(".json").unlink(missing_ok=True)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    write_in_one_stroke(file.with_suffix(".json"), card)


def _save_there(fs: AbstractFileSystem, folder: str, state: dict[str, Tensor], name: str, card: bytes) -> None:
    """Object stores show a file when it is complete, so the order is all that is needed."""
    with TemporaryDirectory() as temporary:
        part = Path(temporary, "weights")
        write_state(part, state)
        fs.makedirs(folder, exist_ok=True)
        with suppress(FileNotFoundError):
            fs.rm_file(f"{folder}/{name}.json")
        fs.put_file(str(part), f"{folder}/{name}.safetensors")
    fs.pipe_file(f"{folder}/{name}.json", card)


def load_card(reference: str | Path) -> Card:
    """The card beside an edit model's weights. Raises WeightsError if it is missing or not a card."""
    try:
        file = file_of(beside(reference, ".json"))
    except MissingError as error:
        raise WeightsError(f"the edit model {Path(public(reference)).name} has no card; {error}") from None
    return parse_card(file.read_bytes(), str(file))


def parse_card(text: bytes, file: str) -> Card:
    """Raises WeightsError, which names the file, if it is not a card."""
    try:
        return card_from(json.loads(text))
    except (TypeError, ValueError) as error:
        names = ", ".join(f.name for f in fields(Card))
        raise WeightsError(f"{file} is not the card of an edit model ({error}); it has {names}") from None


def card_from(values: Any) -> Card:
    """Raises TypeError for what is no JSON object, or has keys too many or too few."""
    if not isinstance(values, dict):
        raise TypeError("no JSON object")
    required = {f.name for f in fields(Card) if f.default is MISSING and f.default_factory is MISSING}
    missing, unknown = required - values.keys(), values.keys() - {f.name for f in fields(Card)}
    if missing or unknown:
        wrong = [f"{what} {', '.join(sorted(keys))}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise TypeError("; ".join(wrong))
    return Card(**values)


def load_into(module: nn.Module, file: Path) -> None:
    """Loads weights of any dtype over ``module``'s own. Never runs code from the file. Raises WeightsError, and changes
    nothing, if keys or shapes differ."""
    state = read_state(file)
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise WeightsError(f"{file} does not fit the model: {shown} missing, left over or of another shape")
    module.load_state_dict(state)
