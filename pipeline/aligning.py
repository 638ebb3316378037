"""Photographs -> faces cut out as CelebA-HQ and FFHQ were: what is checked before anything starts, and what a worker does. No Ray here."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pyarrow as pa

from models.references import WeightsError, public
from models.references import absolute as absolute_reference
from pipeline import schema
from pipeline.config import AlignRun, ConfigError
from pipeline.inputs import Input, OnFile
from pipeline.plan import Plan, folder_problems, name_problems, what_is_left
from pipeline.resume import alignment_request
from pipeline.sources import absolute, find
from pipeline.worker import BlockWorker, Output

NO_FACE = "no face was found in the image"

# ---- before anything starts ------------------------------------------------------------------------------------------


def make_align_plan(run: AlignRun, on_files: OnFile = lambda done, total: None, on_ids: OnFile = lambda done, total: None) -> Plan:
    """Checks everything that can be checked without looking at a photograph. Raises ConfigError with every problem found.

    Both functions are called with how much is looked at and how much there is: files, then rows' ids.
    """
    run = replace(
        run,
        source=replace(run.source, path=absolute(run.source.path)),
        output=absolute(run.output),
        landmark_model=run.landmark_model and absolute_reference(run.landmark_model),
    )
    version, problems = _landmarker(run)
    problems += run.problems()
    try:
        found = find(run.source, on_files)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    problems += (made_problems(found) or name_problems(run, found)) + folder_problems(run, write=True)
    if problems:
        raise ConfigError(*problems)
    output = Output(
        folder=run.output,
        edit=None,
        columns=schema.aligned_schema(found.user_columns, run.size),
        request=alignment_request(run, found),
        model_calls=0,
        record={"size": run.size, "landmark_model": run.landmark_model and public(run.landmark_model), "dlib": version},
    )
    return what_is_left(run, found, (output,), on_ids)


def _landmarker(run: AlignRun) -> tuple[str, list[str]]:
    """The version of dlib, and why no landmarks can be found with it."""
    from models.alignment import load_landmarker

    try:
        return load_landmarker(run.landmark_model).version, []
    except WeightsError as error:
        return "", [str(error)]


def made_problems(found: Input) -> list[str]:
    """Why a table of the project's, finished or not, is no input."""
    kind = schema.about(found.columns).get("kind")
    return [f"{found.source.path} is a table of {kind}; faces are aligned before anything else, so give the photographs"] if kind else []


# ---- on the workers --------------------------------------------------------------------------------------------------


class Aligner(BlockWorker):
    """Cuts the faces out of the photographs of a block."""

    def __init__(self, run: AlignRun, outputs: tuple[Output, ...]):
        from models.alignment import load_landmarker

        load_landmarker(run.landmark_model)  # a node that lacks it says so before any row
        self.run: AlignRun = run
        (self.output,) = outputs

    def compute(self, table: pa.Table, withheld: Mapping[int, str]) -> Iterator[tuple[Output, pa.Table]]:
        columns = self.output.columns
        yield self.output, with_faces(table, self.run, withheld).select(columns.names).cast(columns)


def with_faces(table: pa.Table, run: AlignRun, withheld: Mapping[int, str]) -> pa.Table:
    """The table with each image replaced by its aligned face as PNG, or by null with the reason in ``align_error``. The rows
    ``withheld`` (by position) have these reasons and are not looked at."""
    from models.alignment import align, find_landmarks
    from pipeline import codec  # it imports torch

    images: list[dict[str, bytes | str | None] | None] = []
    errors: list[str | None] = []
    for number, (row, unread) in enumerate(zip(table["image"].to_pylist(), codec.unread_reasons(table), strict=True)):
        face, error = None, withheld.get(number, unread)
        if error is None:
            try:
                picture = codec.decode_whole(row and row["bytes"], run.resources.max_pixels)
                landmarks = find_landmarks(picture, run.landmark_model)
                face = None if landmarks is None else codec.encode_png(align(picture, landmarks, run.size))
                error = NO_FACE if face is None else None
            except codec.ImageError as refused:
                error = str(refused)
        images.append(None if face is None else {"bytes": face, "path": row["path"]})
        errors.append(error)
    table = table.set_column(table.column_names.index("image"), "image", pa.array(images, schema.IMAGE))
    return table.append_column(schema.ALIGN_ERROR, pa.array(errors, pa.string()))
