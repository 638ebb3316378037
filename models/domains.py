"""The table of domains: a base diffusion model with everything that belongs to it."""

from dataclasses import dataclass, field
from pathlib import Path

from models.recipe import Recipe, Tuning

_PIXELFACE = Path(__file__).parent / "pixelface" / "weights"


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One base model. References (``weights``, ``clip``, ``edits``) are those of ``models.weights``: a local path, a
    Hugging Face name, or an ``s3://`` or ``https://`` address."""

    name: str
    noun: str
    """What its images are called in texts: the source text of an attribute unless it says otherwise."""
    image_size: int
    weights: str
    """Reference of a diffusers folder (``config.json``, ``diffusion_pytorch_model.safetensors``, ``scheduler_config.json``)."""
    clip: str
    """``MODEL/PRETRAINED`` of open_clip, or the reference of a folder with ``open_clip_config.json``."""
    edits: str | None = None
    """Reference of a folder with ready-made edit models."""
    about: str
    licence: str
    recipe: Recipe = field(default_factory=Recipe)
    tuning: Tuning = field(default_factory=Tuning)
    known_words_only: bool = False
    """True if its CLIP has seen few words, so that a text with other words must be refused."""
    judge: Path | None = None
    """A factor classifier, where the domain's images have known factors."""
    held_out: Path | None = None
    """Images that no training has seen."""
    tuning_images: Path | None = None
    """Images to fine-tune attributes with."""


DOMAINS: dict[str, Domain] = {
    "pixelface": Domain(
        name="pixelface",
        noun="face",
        image_size=32,
        weights=str(_PIXELFACE / "diffusion"),
        clip=str(_PIXELFACE / "clip"),
        edits=str(_PIXELFACE / "edits"),
        about="32x32 pixel-art faces with known factors; small enough for two cores, shipped with the project",
        licence="drawings CC0 1.0 (DiceBear pixel-art), weights Apache-2.0",
        known_words_only=True,
        judge=_PIXELFACE / "judge.safetensors",
        held_out=_PIXELFACE.parent / "held_out.parquet",
        tuning_images=_PIXELFACE.parent / "tuning.parquet",
        tuning=Tuning(l1_weight=6.0),
    ),
}
