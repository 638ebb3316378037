"""The table of domains: a base diffusion model with everything that belongs to it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.attributes import FAMILIES
from models.recipe import Recipe, Tuning

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a network may predict: the noise, v (Salimans and Ho 2022) or x0, as diffusers calls them."""
_PIXELFACE = Path(__file__).parent / "pixelface" / "weights"


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One base model. References (``weights``, ``clip``, ``edits``) are those of ``models.weights``: a local path, a
    Hugging Face name, or an ``s3://`` or ``https://`` address."""

    name: str
    noun: str = "image"
    """What its images are called in texts: the source text of an attribute unless it says otherwise."""
    family: str = ""
    """Which attributes of the table are for its images; "" for none."""
    image_size: int
    weights: str
    """Reference of a diffusers folder (``config.json``, ``diffusion_pytorch_model.safetensors``, ``scheduler_config.json``); ""
    for published weights that must be imported first."""
    architecture: str | None = None
    """What ``diffusionclip import`` calls the network that the weights were published for."""
    origin: str = ""
    """Where the weights come from, for people."""
    prediction: str = "epsilon"
    """What the network predicts: the noise (``epsilon``), ``v_prediction`` or x0 (``sample``); read from its configuration."""
    schedule: str = "linear betas 0.0001..0.02, 1000 timesteps"
    """Of the noise, for people; what is computed with is in ``scheduler_config.json``."""
    learned_variance: bool = False
    """True if the network has further output channels for the variance; they are not used."""
    classes: int | None = None
    """Number of classes of a class-conditional network."""
    clip: str = "ViT-B-16/openai"
    """``MODEL/PRETRAINED`` of open_clip, or the reference of a folder with ``open_clip_config.json``."""
    scoring_clip: str | None = None
    """A second, differently trained CLIP that takes part in no loss, where there is one."""
    edits: str | None = None
    """Reference of a folder with ready-made edit models."""
    about: str = ""
    licence: str = "not stated"
    recipe: Recipe = field(default_factory=Recipe)
    tuning: Tuning = field(default_factory=Tuning)
    known_words_only: bool = False
    """True if its CLIP has seen few words, so that a text with other words must be refused."""
    judge: Path | None = None
    """A factor classifier, where the domain's images have known factors."""
    held_out: Path | None = None
    """Images that no training has seen."""
    counterfactuals: Path | None = None
    """Parquet with ``id``, ``attribute`` and ``image``: held-out images drawn again with just that factor changed."""
    tuning_images: Path | None = None
    """Images to fine-tune attributes with."""

    def problems(self, timesteps: int = 1000) -> list[str]:
        """Sentences that say what is impossible about this domain; empty if nothing is."""
        found = []
        if not self.name or not self.noun:
            found.append("a domain needs a name and a noun for its images")
        if self.image_size < 8:
            found.append(f"the image size must be at least 8; got {self.image_size}")
        if self.family and self.family not in FAMILIES:
            found.append(f"unknown family of attributes {self.family!r}: it is one of {', '.join(FAMILIES)}, or empty")
        if self.prediction not in PREDICTIONS:
            found.append(f"a network predicts one of {', '.join(PREDICTIONS)}; this one predicts {self.prediction}")
        if self.classes is not None and self.classes < 1:
            found.append(f"the number of classes must be at least 1; got {self.classes}")
        return found + self.recipe.problems(timesteps) + self.tuning.problems()


README_RECIPE = Recipe(return_step=500)
"""The return step of the official README; steps and solver are the project's."""
README_TUNING = Tuning(
    images=50, epochs=5, batch=1, learning_rate=8e-6, learning_rate_growth=1.3, steps_down=6, clip_weight=3.0, l1_weight=1.0
)
"""The fine-tuning command of the official README."""


def _real(name: str, image_size: int, noun: str, family: str, **rest: Any) -> Domain:
    return Domain(name=name, image_size=image_size, noun=noun, family=family, recipe=README_RECIPE, tuning=README_TUNING, **rest)


_APACHE = "weights Apache-2.0 by their model card"
_CELEBA_HQ = "CelebA-HQ images for non-commercial research only"
_LSUN = "LSUN images were collected from the web, check before use"
_NO_LICENCE = "weights offered without a licence, check before use"
_GUIDED = "weights MIT, by their model card for research only; ImageNet images for non-commercial research only"
_ILVR = "README of github.com/jychoi118/ilvr_adm"
_GUIDED_ORIGIN = "README of github.com/openai/guided-diffusion"

_ALL = (
    Domain(
        name="pixelface",
        noun="face",
        family="pixelface",
        image_size=32,
        weights=str(_PIXELFACE / "diffusion"),
        origin="shipped with the project; docs/pixelface.md says how they were trained",
        clip=str(_PIXELFACE / "clip"),
        scoring_clip=str(_PIXELFACE / "scoring_clip"),
        edits=str(_PIXELFACE / "edits"),
        about="32x32 pixel-art faces with known factors; small enough for two cores, shipped with the project",
        licence="drawings CC0 1.0 (DiceBear pixel-art), weights Apache-2.0",
        known_words_only=True,
        judge=_PIXELFACE / "judge.safetensors",
        held_out=_PIXELFACE.parent / "held_out.parquet",
        counterfactuals=_PIXELFACE.parent / "counterfactuals.parquet",
        tuning_images=_PIXELFACE.parent / "tuning.parquet",
        recipe=Recipe(trim=0.8),
        tuning=Tuning(
            epochs=6,
            batch=8,
            learning_rate=2e-3,
            learning_rate_growth=0.83,
            warmup=24,
            steps_down=4,
            form="cosine",
            choice_weight=0.1,
            ema=0.9,
            l1_weight=3.0,
            distance="saturating",
            rank=8,
            images=96,
            choose_from=192,
            views=8,
        ),
    ),
    _real(
        "celebahq-256",
        256,
        "face",
        "human",
        weights="google/ddpm-ema-celebahq-256",
        architecture="ddpm-256",
        origin="huggingface.co/google/ddpm-ema-celebahq-256; published edit models belong to celeba_hq.ckpt of "
        "huggingface.co/gwang-kim/DiffusionCLIP-CelebA_HQ, to be imported",
        about="aligned faces of CelebA-HQ, DDPM",
        licence=f"{_APACHE}; {_CELEBA_HQ}",
    ),
    _real(
        "church-256",
        256,
        "church",
        "church",
        weights="google/ddpm-ema-church-256",
        architecture="ddpm-256",
        origin="huggingface.co/google/ddpm-ema-church-256",
        about="churches from outside of LSUN, DDPM",
        licence=f"{_APACHE}; {_LSUN}",
    ),
    _real(
        "bedroom-256",
        256,
        "bedroom",
        "bedroom",
        weights="google/ddpm-ema-bedroom-256",
        architecture="ddpm-256",
        origin="huggingface.co/google/ddpm-ema-bedroom-256; published edit models belong to the checkpoint in "
        "huggingface.co/gwang-kim/DiffusionCLIP-LSUN_Bedroom, to be imported",
        about="bedrooms of LSUN, DDPM",
        licence=f"{_APACHE}; {_LSUN}",
    ),
    _real(
        "afhq-dog-256",
        256,
        "dog",
        "dog",
        weights="",
        architecture="iddpm-256",
        origin=f"afhq_dog_4m.pt, {_ILVR}",
        learned_variance=True,
        about="dog faces of AFHQ, improved DDPM",
        licence=f"{_NO_LICENCE}; AFHQ images CC BY-NC 4.0",
    ),
    _real(
        "ffhq-256",
        256,
        "face",
        "human",
        weights="",
        architecture="iddpm-256",
        origin=f"ffhq_10m.pt, {_ILVR}",
        learned_variance=True,
        about="aligned faces of FFHQ, improved DDPM",
        licence=f"{_NO_LICENCE}; FFHQ images CC BY-NC-SA 4.0",
    ),
    _real(
        "imagenet-512",
        512,
        "photo",
        "imagenet",
        weights="",
        architecture="adm-512",
        origin=f"512x512_diffusion.pt, {_GUIDED_ORIGIN}",
        learned_variance=True,
        classes=1000,
        about="any photo, ADM, class-conditional",
        licence=_GUIDED,
    ),
    _real(
        "imagenet-256",
        256,
        "photo",
        "imagenet",
        weights="",
        architecture="adm-256",
        origin=f"256x256_diffusion_uncond.pt, {_GUIDED_ORIGIN}",
        learned_variance=True,
        about="any photo, ADM, unconditional",
        licence=_GUIDED,
    ),
)

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in _ALL}
