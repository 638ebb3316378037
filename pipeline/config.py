"""What a run is asked to do: frozen, keyword-only, checked before anything starts."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from typing import TYPE_CHECKING

from models.references import public_text
from pipeline.schema import ALIGNED, MAX_BLOCK_BYTES, MAX_PIXELS

if TYPE_CHECKING:  # so that processes that only read rows need not import torch
    from models.domains import Domain
    from models.recipe import Recipe, Tuning


class ConfigError(ValueError):
    """A request that cannot be carried out; lists every problem at once, addresses in it without credentials. Nothing has been
    started or written."""

    def __init__(self, *problems: str):
        problems = tuple(map(public_text, problems))
        super().__init__("\n".join(problems))
        self.problems = problems


def unknown(kind: str, name: str, allowed: list[str]) -> str:
    """One sentence for a name that is not in a table, with the nearest match."""
    near = get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}: allowed {'is' if len(allowed) == 1 else 'are'} {', '.join(allowed) or 'nothing'}{hint}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from: Parquet files, pictures or webdataset tars, one or a folder of them; any fsspec address."""

    path: str
    id_column: str = "id"
    """Column of unique ids; where the input has no such column, ids are made from file and row."""
    image_column: str = "image"
    limit: int | None = None
    """Only the first so many rows."""
    columns: tuple[str, ...] | None = None
    """The user's columns that pass through; None keeps all. Id and image are always read."""
    where: str | None = None
    """A condition on rows, see ``pipeline.filters``; the others are no part of the input."""
    max_block_bytes: int = MAX_BLOCK_BYTES
    """What one block may take in memory while it is read."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run may use. Whether GPUs are used is said here and nowhere else: the driver may have none."""

    workers: int = 1
    """At most this many actors, each with its own copy of the model."""
    gpus: float = 0.0
    """GPUs an actor; a fraction packs several on one; 0 runs on the CPU."""
    cpus: float = 1.0
    """CPUs an actor, and its number of threads."""
    batch: int = 16
    """Images in one model call; the last batch is padded to this, so that its arithmetic is that of the others."""
    block_rows: int = 64
    """At least so many rows, in whole row groups of the input, are read, edited and written together, as one output file: what a
    crash costs."""
    max_pixels: int = MAX_PIXELS

    @property
    def device(self) -> str:
        return "cuda" if self.gpus > 0 else "cpu"

    def problems(self) -> list[str]:
        """Sentences that say what is impossible about these numbers; empty if nothing is."""
        found = []
        for name in ("workers", "batch", "block_rows", "max_pixels"):
            if getattr(self, name) < 1:
                found.append(f"{name.replace('_', ' ')} must be at least 1; got {getattr(self, name)}")
        return found + machine_problems("actor", self.gpus, self.cpus)


def machine_problems(kind: str, gpus: float, cpus: float) -> list[str]:
    """What is impossible about the GPUs and CPUs of each actor or worker."""
    found = []
    if not (0 <= gpus < 1 or gpus in range(1, 1000)):
        found.append(f"GPUs of each {kind} must be 0, a fraction below 1, or a whole number; got {gpus}")
    if not 0 <= cpus < 10_000:
        found.append(f"CPUs of each {kind} must be a number that is not negative; got {cpus}")
    return found


@dataclass(frozen=True, kw_only=True)
class Part:
    """One edit model of an edit: its weights, how much of it, and the words it was tuned for."""

    name: str
    file: str
    """Reference of its weights, resolved on each worker."""
    weight: float
    """Over the whole walk; the mean over its ranges where an edit has them."""
    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One attribute (one part), a mix (several) or the plain reconstruction (none), and how strongly."""

    parts: tuple[Part, ...] = ()
    degree: float = 1.0
    """0 = reconstruction, 1 = the full edit, also beyond."""
    ranges: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """Weights that change along the walk: from which timestep upwards, and the weight of each part there."""

    @property
    def attribute(self) -> str:
        """``glasses``, ``glasses_and_hat`` or ``none``."""
        return "_and_".join(part.name for part in self.parts) or "none"

    @property
    def name(self) -> str:
        """Of the edit's own folder: the attribute, whether its weights change along the walk, and the degree where it is not 1."""
        stem = f"{self.attribute}_by_timestep" if self.ranges else self.attribute
        return stem if self.degree == 1 else f"{stem}_x{self.degree:g}"

    @property
    def trimmable(self) -> bool:
        """Whether it is of one edit model, and of any weight. In a mix the fainter part would be taken for a tint by the stronger."""
        return len(self.parts) == 1 and any(any(row[1:]) for row in self.weights.values())

    @property
    def weights(self) -> dict[int, list[float]]:
        """From timestep -> weights of the base model and of each part there; each row sums to 1.

        base + degree * sum of weight * (part - base): what the parts leave of 1 is the base model's.
        """
        table = self.ranges or ((0, tuple(part.weight for part in self.parts)),)
        return {start: _with_base([self.degree * weight for weight in row]) for start, row in table}


def _with_base(parts: list[float]) -> list[float]:
    base = 1 - sum(parts)
    return [0.0 if abs(base) < 1e-9 else base, *parts]  # a base that is there by rounding only would cost model calls


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over a dataset, whatever it makes of the rows."""

    source: Source
    output: str
    resources: Resources = field(default_factory=Resources)
    max_reject_rate: float = 0.1
    overwrite: bool = False
    """Start from nothing; else a run of the same request goes on where an earlier one stopped."""
    retry_rejects: bool = False
    """Compute blocks with rejects again, too."""
    command: str = ""
    """The command line that asked for this run, for the record."""

    @property
    def kind(self) -> str:
        """Of the tables that it writes, as ``pipeline.schema`` names them."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """Everything that is impossible in the numbers."""
        found = self.resources.problems()
        if self.overwrite and self.retry_rejects:
            found.append("--overwrite computes everything again, rejects too; leave --retry-rejects out")
        if not 0 <= self.max_reject_rate <= 1:
            found.append(f"the greatest share of rejects must lie between 0 and 1; got {self.max_reject_rate}")
        if self.source.limit is not None and self.source.limit < 1:
            found.append(f"the limit of rows must be at least 1; got {self.source.limit}")
        if self.source.max_block_bytes < 2**20:
            found.append(f"--max-block-bytes must be at least 1048576 (1 MiB); got {self.source.max_block_bytes}")
        return found


@dataclass(frozen=True, kw_only=True)
class AlignRun(Pass):
    """Cuts a face out of each photograph."""

    size: int = 256
    """Height and width of the faces."""
    landmark_model: str | None = None
    """Reference of a 68-point shape predictor of dlib's; that of the extra ``align`` if None."""

    @property
    def kind(self) -> str:
        return ALIGNED

    def problems(self) -> list[str]:
        odd = [] if 16 <= self.size <= 4096 else [f"the size of aligned faces must lie between 16 and 4096; got {self.size}"]
        return super().problems() + odd


@dataclass(frozen=True, kw_only=True)
class Run(Pass):
    """Without edits it makes latents, with edits one dataset for each, in a folder of its own."""

    domain: "Domain"
    recipe: "Recipe"
    edits: tuple[Edit, ...] = ()
    score_clip: str | None = None
    """The CLIP that scores edits; the domain's own if None, no CLIP at all if ``none``."""
    identity: str | None = None
    """Reference of face recognition weights; with them edits are scored for identity."""

    @property
    def kind(self) -> str:
        return "edits" if self.edits else "latents"

    @property
    def clip(self) -> str | None:
        """The reference of the CLIP that scores edits."""
        return None if self.score_clip == "none" else self.score_clip or self.domain.clip

    def problems(self, timesteps: int = 1000) -> list[str]:
        """Everything that is impossible in the numbers, for a base model with a schedule of so many timesteps."""
        found = self.recipe.problems(timesteps) + super().problems()
        for edit in self.edits:
            if not -5 <= edit.degree <= 5:
                found.append(f"the degree must lie between -5 and 5 (0 = reconstruction, 1 = full edit); got {edit.degree}")
            if edit.ranges and edit.ranges[0][0] != 0:
                found.append(f"a mix by ranges of timesteps must say what holds from timestep 0; the lowest given is {edit.ranges[0][0]}")
        if self.score_clip not in {None, "none"} and not any(edit.parts for edit in self.edits):
            found.append(f"CLIP {self.score_clip} has nothing to score, because a reconstruction has no direction; leave --score-clip out")
        names = [edit.name for edit in self.edits]
        found += [f"edit {name!r} is asked for twice" for name in sorted(set(names)) if names.count(name) > 1]
        return found


@dataclass(frozen=True, kw_only=True)
class TuneRun:
    """Fine-tuning one attribute on a latents table."""

    latents: str
    output: str
    """The folder of the edit model; any fsspec address."""
    domain: "Domain"
    attribute: str
    source_text: str
    """One, or several with ``|`` between them, of which each image takes the one that describes it best."""
    target_text: str
    recipe: "Recipe"
    tuning: "Tuning"
    clips: tuple[str, ...] = ()
    """References of the CLIPs in the loss; the domain's own if there are none."""
    identity: str | None = None
    """Reference of face recognition weights, for the identity loss."""
    workers: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    max_pixels: int = MAX_PIXELS
    """As in ``Resources``: the source images are decoded again."""
    overwrite: bool = False
    """Train again and replace an edit model of the same name, whatever made it."""
    storage: str | None = None
    """Where Ray Train keeps checkpoints, any fsspec address that every worker reaches; in the output if None."""

    @property
    def loss_clips(self) -> tuple[str, ...]:
        """References of the CLIPs in the loss."""
        return self.clips or (self.domain.clip,)

    def problems(self, timesteps: int = 1000) -> list[str]:
        """Everything that is impossible in the numbers, for a base model with a schedule of so many timesteps."""
        found = self.recipe.problems(timesteps) + self.tuning.problems() + machine_problems("worker", self.gpus, self.cpus)
        if self.tuning.id_weight and not self.identity:
            found.append("an identity loss needs the weights of a face recognition network (IR-SE50, model_ir_se50.pth): give --identity")
        if self.identity and not self.tuning.id_weight:
            found.append("--identity without a weight does nothing: give --id-weight as well")
        if not self.source_text.strip(" |"):
            found.append("the source text says nothing; give words for the images as they are, like: face")
        if not self.target_text.strip() or "|" in self.target_text:
            found.append(f"the target text must be one text, only source texts may be several; got {self.target_text!r}")
        most = self.recipe.return_step + 1
        if self.tuning.steps_down > most:
            found.append(f"steps down of the training must lie between 2 and {most} (return step + 1); got {self.tuning.steps_down}")
        if self.workers < 1:
            found.append(f"workers must be at least 1; got {self.workers}")
        if self.max_pixels < 1:
            found.append(f"max pixels must be at least 1; got {self.max_pixels}")
        if self.workers > 1 and 0 < self.gpus < 1:
            found.append(f"{self.workers} workers that share an attribute need a GPU each, and not {self.gpus:g} of one")
        return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide the arithmetic and the files."""
    names = ("torch", "diffusers", "open_clip_torch", "ray", "pyarrow", "pillow")
    return {name: version(name) for name in names}
