"""CLIP through open_clip: differentiable image features, averaged text features.

A reference names the CLIP: ``MODEL/PRETRAINED`` of open_clip (``ViT-B-16/openai``, ``convnext_base_w/laion2b_s13b_b82k``), a name of
OpenAI's own code (``ViT-B/16``), or a folder with ``open_clip_config.json`` and its weights: a local one, ``hf://org/name``,
``s3://...``. open_clip takes seconds to import, so only the functions that need it do.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fetching import file_of, first_in, names_in, version_of
from models.references import WeightsError, absolute, inside

OPENAI_NAMES = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
"""Models whose weights are OpenAI's where no others are asked for, as open_clip spells them."""
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")
"""Names of a folder's weights; the first of them that is there is read."""


@cache
def templates() -> list[str]:
    """The 80 ImageNet templates of Radford et al. 2021 with ``{}`` for the text, as the official DiffusionCLIP code uses them."""
    import open_clip

    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def alternatives(text: str) -> list[str]:
    """The texts of ``black hair | brown hair``, of which each image is described by one; a text without ``|`` is the only one."""
    return [part for each in text.split("|") if (part := each.strip())]


@dataclass(frozen=True)
class TextDirection:
    """The way from the source text to the target text, for each image from the source text that describes it best.

    With one source text it is the same for all images (DiffusionCLIP, eq. 8). But black hair becomes grey along another way than
    red hair does, and neither along the way from a face to a face with grey hair, which also leads to hair of any colour.
    """

    sources: Tensor
    """(S, D) of length 1 each."""
    target: Tensor
    """(D,) of length 1."""

    def __call__(self, before: Tensor) -> Tensor:
        """Features of images before the edit (B, D) -> directions (B, D) of length 1."""
        nearest = (before @ self.sources.T).argmax(dim=1)
        return F.normalize(self.target - self.sources[nearest], dim=-1)


@dataclass(frozen=True)
class Preprocessing:
    """How a CLIP wants its pictures; the fields are those of open_clip's ``preprocess_cfg``."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """``shortest`` crops what a square cannot hold, ``longest`` pads, ``squash`` changes the aspect; all one for squares."""
    fill_color: int = 0

    def fit(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in about [0, 1], any H and W -> (B, 3, size, size), not yet normalised. Differentiable.

        Resizes with an antialiased filter, as Pillow does under open_clip's own transform. Values beyond [0, 1] (from the
        filter or from an edit) stay, because a clipped pixel has no gradient; Pillow rounds to 8 bits and so clips them.
        """
        size, (height, width) = self.size, images.shape[-2:]
        if self.resize_mode == "squash":
            scaled = (size, size)
        elif self.resize_mode == "longest":
            scaled = (round(size * height / max(height, width)), round(size * width / max(height, width)))
        else:
            scaled = (size * height // min(height, width), size * width // min(height, width))
        if scaled != (height, width):
            images = F.interpolate(images, scaled, mode=self.interpolation, antialias=True)
        top, left = (round((side - size) / 2) if side > size else 0 for side in scaled)
        images = images[..., top : top + size, left : left + size]
        down, right = size - images.shape[-2], size - images.shape[-1]
        if down or right:
            images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2), value=self.fill_color / 255)
        return images


class Clip(nn.Module):
    """A frozen open_clip model with its tokenizer and the preprocessing of its pictures."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        config = dict(model.visual.preprocess_cfg)
        sides = config["size"] if isinstance(config["size"], tuple | list) else (config["size"],)
        if len(set(sides)) > 1:
            raise WeightsError(f"only CLIPs with square pictures can be used; this one has {sides[0]}x{sides[1]}")
        names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        self.preprocessing = Preprocessing(size=sides[0], **{name: config[name] for name in names})
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))

    @property
    def size(self) -> int:
        """Of the side of the pictures that the model sees."""
        return self.preprocessing.size

    @property
    def scale(self) -> float:
        """The factor on cosines under which the model was trained to choose among texts, at most 100."""
        return float(self.model.logit_scale.exp().clamp(max=100))

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any size -> what the model takes, (B, 3, size, size) with its mean and standard deviation."""
        return (self.preprocessing.fit((images + 1) / 2) - self.mean) / self.std

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1], any size -> (B, D) of length 1. Differentiable."""
        return F.normalize(self.model.encode_image(self.preprocess(images)).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, text: str) -> Tensor:
        """(D,) of length 1: the mean of a text's features over the 80 templates."""
        tokens = self.tokenizer([template.format(text) for template in templates()]).to(self.mean.device)
        features = F.normalize(self.model.encode_text(tokens).float(), dim=-1)
        return F.normalize(features.mean(0), dim=0)

    def text_direction(self, source: str, target: str) -> TextDirection:
        """From the source text, or the best of several (``black hair | brown hair``), to the target text."""
        return TextDirection(torch.stack([self.text_features(text) for text in alternatives(source)]), self.text_features(target))

    def unknown_words(self, text: str) -> list[str]:
        """Words of ``text`` that the model has no trained token for (their embedding is zero); empty for a real CLIP."""
        weight = self.model.token_embedding.weight
        words = re.findall(r"[\w-]+", text.lower())
        return [w for w in words if any(not weight[i].any() for i in self.tokenizer.encode(w))]


def _reference(reference: str | Path) -> str:
    return re.sub("^hf-hub:", "hf://", str(reference))  # open_clip's own way to say it


def is_folder(reference: str) -> bool:
    """True for a folder, here or elsewhere; False for a name of open_clip's tables."""
    return "://" in reference or reference.startswith(("/", ".", "~")) or Path(reference).is_dir()


def absolute_clip(reference: str) -> str:
    """A local folder with its absolute path; any other reference as it is."""
    return absolute(reference) if is_folder(reference) else reference


def model_and_tag(reference: str) -> tuple[str, str]:
    """``ViT-B-16/openai`` -> model and pretrained tag in open_clip's spelling; OpenAI's own names (``ViT-B/16``, ``RN50``) imply
    ``openai``. The tag is empty if there is none."""
    plain = reference.replace("@336px", "-336")
    if plain.replace("/", "-") in OPENAI_NAMES:
        return plain.replace("/", "-"), "openai"
    model, _, tag = plain.rpartition("/")
    return (model.replace("/", "-"), tag) if model else (tag, "")


def clip_problems(reference: str) -> list[str]:
    """Sentences that say why there can be no such CLIP, from its name or its folder's files alone; empty if nothing speaks against it.

    Loads no weights and fetches nothing: a remote folder is taken at its word.
    """
    reference = _reference(reference)
    if "://" in reference:
        return []
    if is_folder(reference):
        return _folder_problems(Path(reference).expanduser())
    import open_clip

    model, tag = model_and_tag(reference)
    if open_clip.get_pretrained_cfg(model, tag):
        return []
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tags:
        lead = f"CLIP {model} has no weights called {tag!r}" if tag else f"CLIP {reference!r} does not say which weights"
        return [f"{lead}: MODEL/PRETRAINED is one of {', '.join(f'{model}/{t}' for t in tags)}{_hint(tag, tags)}"]
    models = list(dict.fromkeys(name for name, _ in open_clip.list_pretrained()))
    return [
        f"unknown CLIP {reference!r}: it is MODEL/PRETRAINED of open_clip.list_pretrained(), like ViT-B-16/openai, "
        f"or a folder with {CONFIG}, also hf://org/name{_hint(model, models)}"
    ]


def check_clip(reference: str) -> None:
    """Raises WeightsError, as ``load_clip`` does, if there is no such CLIP or its weights are not where they should be. Loads and
    fetches none of them."""
    reference = _reference(reference)
    if problems := clip_problems(reference):
        raise WeightsError(" ".join(problems))
    if not is_folder(reference):
        repository, names = _weights_named(*model_and_tag(reference))
        if not {*names} & {*names_in(repository)}:
            raise _gone(repository, reference)
    elif "://" in reference:
        _needed_of(reference)


def clip_fingerprint(reference: str) -> str | None:
    """16 hex digits of all files of a folder's CLIP, as ``version_of`` tells them; None for a published one, which goes by its name, and
    where nothing can be told without fetching."""
    reference = _reference(reference)
    if not is_folder(reference):
        return None
    try:
        versions = {name: version_of(inside(reference, name)) for name in _needed_of(reference)}
    except WeightsError:
        return None
    return None if None in versions.values() else hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:16]


def _hint(name: str, allowed: list[str]) -> str:
    by_lower = {a.lower(): a for a in allowed}
    near = get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def _folder_problems(folder: Path) -> list[str]:
    if not (folder / CONFIG).is_file():
        return [f"there is no CLIP in {folder}: a folder has {CONFIG} and {WEIGHTS[0]}, a name is like ViT-B-16/openai"]
    if not any((folder / name).is_file() for name in WEIGHTS):
        return [f"the CLIP in {folder} has no weights; they are in {WEIGHTS[0]}"]
    if "trust_remote_code" in (folder / CONFIG).read_text(encoding="utf-8", errors="replace"):
        return [f"the CLIP in {folder} asks to run code that comes with it (trust_remote_code), which is never done; take another"]
    return []


@lru_cache(maxsize=4)
def load_clip(reference: str | Path) -> Clip:
    """The CLIP of a reference, frozen, float32, on the CPU; one object however often it is asked for.

    Never runs code from a file: safetensors where there are any, else ``torch.load(weights_only=True)``. Raises WeightsError, in
    one line that says what to do, for an unknown name and for weights that are not here and cannot be had, or do not fit.
    """
    reference = _reference(reference)
    problems = clip_problems(reference)
    if problems:
        raise WeightsError(" ".join(problems))
    if not is_folder(reference):
        model, tag = model_and_tag(reference)
        return _create(reference, model, **creation_arguments(model, tag), pretrained=str(_weights_of(model, tag)))
    if "://" not in reference:
        return _create(reference, f"local-dir:{Path(reference).expanduser()}")
    with TemporaryDirectory() as folder:  # open_clip wants in one folder what the cache keeps in several
        for file in _files_of(reference):
            Path(folder, file.name).symlink_to(file.resolve())
        if problems := _folder_problems(Path(folder)):
            raise WeightsError(problems[0].replace(folder, reference))
        return _create(reference, f"local-dir:{folder}")


def _create(reference: str, name: str, **arguments: Any) -> Clip:
    import open_clip

    try:  # without require_pretrained, a folder without weights gets random ones and a warning
        model = open_clip.create_model(name, **arguments, require_pretrained=True, weights_only=True)
        return Clip(model, open_clip.get_tokenizer(name))
    except WeightsError:
        raise
    except Exception as error:  # whatever is wrong with files that others have made
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"CLIP {reference} cannot be loaded, take another or mend its files: {reason[:400]}") from error


def creation_arguments(model: str, tag: str) -> dict[str, Any]:
    """What ``open_clip.create_model`` must be told about the weights of a tag: their activation and their preprocessing.

    Left alone, open_clip builds plain ``ViT-B-16`` with GELU, loads weights into it that were trained with QuickGELU (all of
    OpenAI's) and only warns; the features are then wrong by a little.
    """
    import open_clip

    about = open_clip.get_pretrained_cfg(model, tag)
    return {"force_quick_gelu": bool(about.get("quick_gelu", False)), "force_preprocess_cfg": about}


def _weights_named(model: str, tag: str) -> tuple[str, tuple[str, ...]]:
    """Where the weights of a tag are, and the names that they may have: all of open_clip's table are on the hub."""
    import open_clip

    repository, _, name = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rpartition("/")
    return f"hf://{repository}", (str(Path(name).with_suffix(".safetensors")), name) if name else WEIGHTS


def _weights_of(model: str, tag: str) -> Path:
    """Local copy of the weights of a tag."""
    repository, names = _weights_named(model, tag)
    found = first_in(repository, names)
    if found is None:
        raise _gone(repository, f"{model}/{tag}")
    return found[1]


def _gone(repository: str, name: str) -> WeightsError:
    return WeightsError(f"{repository} has no weights of CLIP {name} any more; take others, or give a folder with {CONFIG}")


def _files_of(folder: str) -> list[Path]:
    """Local copies of what open_clip needs of a remote folder."""
    return [file_of(inside(folder, name)) for name in _needed_of(folder)]


def _needed_of(folder: str) -> list[str]:
    """Names of what open_clip needs of a folder: configuration, tokenizer, one file of weights."""
    names = names_in(folder)
    weights = [name for name in WEIGHTS if name in names]
    if CONFIG not in names or not weights:
        raise WeightsError(f"there is no CLIP in {folder}: it needs {CONFIG} and {WEIGHTS[0]}, and has {', '.join(names[:8]) or 'nothing'}")
    return [*(name for name in names if name.endswith((".json", ".txt", ".model"))), weights[0]]
