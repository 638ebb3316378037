"""``diffusionclip optimize``: one picture -> an edited picture, by moving its latent; no network is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import options as o
from jobs.finetune import LOSS, Clips, IdWeight

if TYPE_CHECKING:  # importing them takes seconds, and --help must not
    from torch import Tensor

    from models.domains import Domain
    from models.finetune import Objective
    from models.latent import Iterate
    from models.recipe import Recipe, Tuning
    from models.unet import NoiseUNet

RECORD = "optimize.json"
"""Written last: where it is, everything else is."""
L1_WEIGHT = 2.0
"""The official code has 1, with which the colours of pixelface drift; with the 6 of its fine-tuning half of its faces stay as they are."""
FRAMES = 6
"""Iterates in ``steps.png``."""
SIDE = 128
"""Smaller pictures are enlarged to about this in ``steps.png``."""

Picture = Annotated[str, typer.Argument(help="A picture file; any fsspec address.")]
Out = Annotated[Path, typer.Argument(help="The folder for the pictures, the latent and optimize.json.")]
TargetText = Annotated[str, typer.Option(help='What the picture should show, like "smiling face".')]
Steps = Annotated[int, typer.Option(help="Of Adam.")]
Rate = Annotated[float, typer.Option(help="Of Adam.")]
LossSteps = Annotated[int | None, typer.Option("--loss-steps-down", help="Rungs that gradients flow through.", rich_help_panel=o.WALK)]
Memory = Annotated[str, typer.Option(help="full, or checkpoint: same gradients, less memory, more time.", rich_help_panel=o.MACHINES)]
ClipWeight = Annotated[float | None, typer.Option(help="Of the loss between picture and text.", rich_help_panel=LOSS)]
L1Weight = Annotated[float, typer.Option(help="Of the distance to the source; less changes more.", rich_help_panel=LOSS)]
Form = Annotated[str | None, typer.Option(help="Of the CLIP loss: log (the official code's) or cosine.", rich_help_panel=LOSS)]
Gpu = Annotated[bool, typer.Option("--gpu", help="Run on the CUDA device.", rich_help_panel=o.MACHINES)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT.")]


def optimize(
    image: Picture,
    out: Out,
    target_text: TargetText,
    domain: o.DomainName = "pixelface",
    steps: Steps = 40,
    learning_rate: Rate = 0.02,
    overwrite: Overwrite = False,
    return_step: o.ReturnStep = None,
    steps_up: o.StepsUp = None,
    steps_down: o.StepsDown = None,
    loss_steps_down: LossSteps = None,
    solver: o.Solver = None,
    spacing: o.Spacing = None,
    precision: o.Precision = None,
    class_label: o.ClassLabel = None,
    clip_weight: ClipWeight = None,
    l1_weight: L1Weight = L1_WEIGHT,
    id_weight: IdWeight = None,
    form: Form = None,
    clip: Clips = None,
    identity: o.Identity = None,
    memory: Memory = "full",
    gpu: Gpu = False,
    storage_option: o.StorageOptions = None,
) -> None:
    """Change one picture by words without training anything: its latent is moved until CLIP sees the text in it.

    Runs in this process, without Ray. Each further picture costs as much again, while an edit model that `diffusionclip finetune`
    made serves any number of pictures.

    [bold]Examples[/bold]

    diffusionclip optimize face.png out/glasses --target-text "face with glasses"

    diffusionclip optimize me.jpg out/me --target-text "smiling face" --domain celebahq-256 --memory checkpoint --gpu
    """
    from dataclasses import replace

    from jobs.requests import domain_named
    from models.recipe import Recipe

    chosen = domain_named(domain)
    walk = o.given(
        return_step=return_step,
        steps_up=steps_up,
        steps_down=steps_down,
        solver=solver,
        spacing=spacing,
        precision=precision,
        class_label=class_label,
        eta=0.0,  # a latent decides its picture only where no fresh noise comes in
        projections=0,
        trim=0.0,
    )
    numbers = o.given(steps_down=loss_steps_down, clip_weight=clip_weight, id_weight=id_weight, form=form)
    carry_out(
        Request(
            image=image,
            out=out,
            target_text=target_text,
            domain=chosen,
            recipe=Recipe.from_dict(chosen.recipe.to_dict() | walk),
            tuning=replace(chosen.tuning, memory=memory, learning_rate=learning_rate, l1_weight=l1_weight, **numbers),
            steps=steps,
            clips=tuple(clip or (chosen.clip,)),
            identity=identity,
            device="cuda" if gpu else "cpu",
            overwrite=overwrite,
        )
    )


# ---- the request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture and what it should become."""

    image: str
    out: Path
    target_text: str
    domain: "Domain"
    recipe: "Recipe"
    tuning: "Tuning"
    """Weights and form of the loss, rungs of the walk that it sees, learning rate, memory."""
    steps: int
    clips: tuple[str, ...]
    identity: str | None = None
    device: str = "cpu"
    overwrite: bool = False

    def problems(self) -> list[str]:
        """Everything that is impossible, before any network is loaded."""
        from dataclasses import replace

        from models.folders import schedule_length

        timesteps = schedule_length(self.domain.weights)
        found = self.recipe.problems(timesteps)
        if not found:
            found += [f"for the loss, {p}" for p in replace(self.recipe, steps_down=max(2, self.tuning.steps_down)).problems(timesteps)]
        found += self.tuning.problems()
        if self.tuning.memory == "stepwise":
            found.append("a latent is optimised through the whole walk: memory is full or checkpoint; got 'stepwise'")
        if self.recipe.precision == "float16":
            found.append("float16 loses the small gradients of a latent; precision is float32 or bfloat16 here")
        if self.steps < 1:
            found.append(f"a latent takes at least 1 step; got {self.steps}")
        if self.tuning.id_weight and not self.identity:
            found.append("an identity loss needs the weights of a face recognition network (IR-SE50, model_ir_se50.pth): give --identity")
        if self.identity and not self.tuning.id_weight:
            found.append("--identity without a weight does nothing: give --id-weight as well")
        return found + self._place_problems()

    def _place_problems(self) -> list[str]:
        import torch

        found = []
        if not self.target_text.strip():
            found.append("the target text is empty; say what the picture should show")
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append("there is no CUDA device here; leave --gpu out")
        if (self.out / RECORD).exists() and not self.overwrite:
            found.append(f"{self.out} holds an earlier result; give another folder, or --overwrite")
        if any(place.exists() and not place.is_dir() for place in (self.out, *self.out.parents)):
            found.append(f"{self.out} cannot be a folder: there is a file in its place")
        return found


def read_picture(address: str, size: int) -> "Tensor":
    """float32 (1, 3, size, size). Raises ConfigError if there is no picture that can be used."""
    import fsspec

    from models.references import public
    from pipeline import codec
    from pipeline.config import ConfigError

    try:
        with fsspec.open(address, "rb") as stream:
            return codec.to_tensor([codec.decode(stream.read(), size)])
    except FileNotFoundError:
        raise ConfigError(f"there is no file {public(address)}; give one picture") from None
    except codec.ImageError as error:
        raise ConfigError(f"{public(address)} cannot be used: {error}") from None
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{public(address)} cannot be read: {error}") from None


def make_objective(request: Request, alpha_bars: "Tensor") -> "Objective":
    """The text and the walk; raises ConfigError for words that a small CLIP has never seen."""
    from dataclasses import replace

    from models.clip import load_clip
    from models.finetune import Objective
    from models.identity import load_identity
    from pipeline.config import ConfigError

    clips = [load_clip(reference) for reference in request.clips]
    if request.domain.known_words_only and request.clips == (request.domain.clip,):
        strange = clips[0].unknown_words(request.target_text)
        if strange:
            words = ", ".join(map(repr, strange))
            raise ConfigError(f"the small CLIP of {request.domain.name} has never seen {words}; use the words of docs/pixelface.md")
    return Objective(
        clips=tuple((clip.to(request.device), clip.text_direction(request.domain.noun, request.target_text)) for clip in clips),
        path=replace(request.recipe, steps_down=request.tuning.steps_down).down(alpha_bars),
        alpha_bars=alpha_bars,
        order=request.recipe.order,
        tuning=request.tuning,
        identity=load_identity(request.identity).to(request.device) if request.identity else None,
    )


# ---- the work --------------------------------------------------------------------------------------------------------


def carry_out(request: Request) -> None:
    """Inverts, optimises, walks down, writes. Raises ConfigError or WeightsError before anything is written."""
    import time

    import torch

    from jobs.progress import console
    from models.diffusion import walk
    from models.latent import global_loss
    from models.unet import load_alpha_bars, load_base
    from pipeline.config import ConfigError

    problems = request.problems()
    if problems:
        raise ConfigError(*problems)
    recipe, weights = request.recipe, request.domain.weights
    x0 = read_picture(request.image, request.domain.image_size).to(request.device)
    alpha_bars = load_alpha_bars(weights)
    objective = make_objective(request, alpha_bars)
    model = load_base(weights, recipe.precision, recipe.class_label).to(request.device)

    started = time.monotonic()
    with torch.no_grad():
        latent = walk(model, x0, recipe.up(alpha_bars), alpha_bars, recipe.order)
    told, best, frames = search(request, model, latent, x0, objective)
    pictures, losses = {}, {}
    for name, end in (("reconstruction", latent), ("edited", best.latent)):
        with torch.no_grad():
            pictures[name] = walk(model, end, recipe.down(alpha_bars), alpha_bars, recipe.order)
            losses[name] = {k: v.item() for k, v in global_loss(pictures[name], x0, objective).items()}
    write(request, {"source": x0, **pictures}, frames, best, {"best_step": best.step, **losses, "losses": told})
    before, after = losses["reconstruction"], losses["edited"]
    console.print(
        f"{request.out / 'edited.png'}: similarity to the text {before['similarity']:.3f} -> {after['similarity']:.3f}, "
        f"L1 to the source {before['l1']:.3f} -> {after['l1']:.3f}, from step {best.step} of {request.steps}, "
        f"in {time.monotonic() - started:.1f} s",
        markup=False,
    )
    if best.step == 0:
        console.print("note: no step lowered the loss, so the picture is its reconstruction; try another learning rate or less --l1-weight")


def search(
    request: Request, model: "NoiseUNet", latent: "Tensor", x0: "Tensor", objective: "Objective"
) -> tuple[list[dict[str, float]], "Iterate", list["Tensor"]]:
    """The losses of every step, the iterate with the lowest, and images on the way."""
    from jobs.progress import display
    from models.latent import optimize_latent

    steps = request.steps
    shown_steps = {round(i * steps / (FRAMES - 1)) for i in range(FRAMES)}
    told: list[dict[str, float]] = []
    frames: list[Tensor] = []
    best: Iterate | None = None
    iterates = optimize_latent(model, latent, x0, objective, steps=steps, learning_rate=request.tuning.learning_rate)
    with display("optimize", steps, "steps") as shown:
        for now in iterates:
            told.append(now.losses)
            if best is None or now.losses["loss"] < best.losses["loss"]:
                best = now
            if now.step in shown_steps:
                frames.append(now.image.cpu())
            shown.update(now.step, f"loss {now.losses['loss']:.3f} similarity {now.losses['similarity']:.3f}")
    assert best is not None
    return told, best, frames


def write(request: Request, images: dict[str, "Tensor"], frames: list["Tensor"], best: "Iterate", results: dict[str, Any]) -> None:
    """All files of the result; the record last, so that whoever sees it sees everything."""
    import json
    from dataclasses import asdict

    from safetensors.torch import save_file

    from jobs.session import command_line
    from models.fetching import write_in_one_stroke
    from models.references import public
    from models.weights import fingerprint
    from pipeline import codec
    from pipeline.config import versions

    request.out.mkdir(parents=True, exist_ok=True)
    (request.out / RECORD).unlink(missing_ok=True)
    for name, image in images.items():
        (request.out / f"{name}.png").write_bytes(codec.encode_png(codec.to_pictures(image)[0]))
    (request.out / "steps.png").write_bytes(strip([images["source"], *frames, images["edited"]]))
    save_file({"latent": best.latent.cpu().contiguous()}, request.out / "latent.safetensors")
    tuning = asdict(request.tuning)
    numbers = ("learning_rate", "steps_down", "clip_weight", "l1_weight", "id_weight", "form", "memory")
    record = {
        "command": command_line(),
        "image": public(request.image),
        "domain": request.domain.name,
        "domain_fingerprint": fingerprint(request.domain.weights),
        "target_text": request.target_text,
        "clips": [public(reference) for reference in request.clips],
        "identity": public(request.identity) if request.identity else None,
        "recipe": request.recipe.to_dict(),
        "optimization": {"steps": request.steps, **{name: tuning[name] for name in numbers}},
        **results,
        "device": request.device,
        "versions": versions(),
    }
    write_in_one_stroke(request.out / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def strip(images: list["Tensor"]) -> bytes:
    """PNG bytes: the source, the images on the way and the edited one side by side; small ones enlarged pixel by pixel."""
    import numpy as np

    from pipeline import codec

    side_by_side = np.concatenate([codec.to_pictures(image)[0] for image in images], axis=2)
    times = max(1, SIDE // side_by_side.shape[1])
    return codec.encode_png(side_by_side.repeat(times, 1).repeat(times, 2))
