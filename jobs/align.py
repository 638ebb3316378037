"""``diffusionclip align``: photographs -> faces cut out as CelebA-HQ and FFHQ were, as an images table."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import options as o

if TYPE_CHECKING:  # importing them takes seconds, and --help must not
    import pyarrow as pa

    from pipeline.sources import Input

ERROR = "align_error"
"""Column that says why a row has no picture."""
NO_FACE = "no face was found in the image"

Size = Annotated[int, typer.Option(help="Height and width of the aligned faces: the image size of the domain they are for.")]
LandmarkModel = Annotated[
    str | None,
    typer.Option(help="Another 68-point shape predictor of dlib's than the extra's: a file, s3:// or https://.", show_default=False),
]


def align(
    input: o.Input,
    output: o.Output,
    size: Size = 256,
    landmark_model: LandmarkModel = None,
    id_column: o.IdColumn = "id",
    image_column: o.ImageColumn = "image",
    limit: o.Limit = None,
    columns: o.Columns = None,
    where: o.Where = None,
    block_rows: o.BlockRows = 64,
    max_block_bytes: o.MaxBlockBytes = 2**31,
    max_pixels: o.MaxPixels = 16_000_000,
    max_reject_rate: o.RejectRate = 0.1,
    overwrite: o.Overwrite = False,
    workers: o.Workers = 2,
    cpus: o.Cpus = 1.0,
    address: o.Address = None,
    storage_option: o.StorageOptions = None,
    verbose: o.Verbose = False,
) -> None:
    """Cut faces out of photographs, upright, as the pictures were cut that face models were trained on.

    Needs the extra [bold]align[/bold]. A row without a face keeps its id and columns, has no picture, and says why in the
    column align_error; later commands reject it as a null image.

    [bold]Examples[/bold]

    diffusionclip align photos/ out/aligned

    diffusionclip align s3://bucket/photos.parquet s3://bucket/aligned --size 512 --workers 8
    """
    import pyarrow as pa
    from ray.data import TaskPoolStrategy

    from jobs.progress import console, display
    from jobs.running import TooManyRejectsError
    from jobs.session import ray_session
    from models.alignment import load_landmarker
    from pipeline.config import ConfigError, Resources, Source
    from pipeline.dataset import audit, block_dataset
    from pipeline.ids import check_ids
    from pipeline.sources import absolute, block_problems, find, plan_blocks

    resources = Resources(workers=workers, cpus=cpus, block_rows=block_rows, max_pixels=max_pixels)
    problems = resources.problems()
    if not 16 <= size <= 4096:
        problems.append(f"the size of aligned faces must lie between 16 and 4096; got {size}")
    if not 0 <= max_reject_rate <= 1:
        problems.append(f"the greatest share of rejects must lie between 0 and 1; got {max_reject_rate}")
    if limit is not None and limit < 1:
        problems.append(f"the limit of rows must be at least 1; got {limit}")
    if max_block_bytes < 2**20:
        problems.append(f"--max-block-bytes must be at least 1048576 (1 MiB); got {max_block_bytes}")
    output = absolute(output)
    source = Source(
        path=absolute(input),
        id_column=id_column,
        image_column=image_column,
        limit=limit,
        columns=o.names(columns),
        where=where,
        max_block_bytes=max_block_bytes,
    )
    try:
        found = find(source)
        problems += input_problems(found)
    except ConfigError as error:
        problems += error.problems
    problems += output_problems(source.path, output, overwrite)
    if problems:
        raise ConfigError(*problems)
    blocks = plan_blocks(found, block_rows)
    if problems := block_problems(found, blocks):
        raise ConfigError(*problems)
    if landmark_model and Path(landmark_model.partition("#")[0]).exists():
        landmark_model = absolute(landmark_model)  # workers have another working directory
    load_landmarker(landmark_model)
    input_ids = check_ids(found)
    written = aligned_columns(found, size)
    _clear(output)

    done, reasons = 0, Counter[str]()

    def work(table: pa.Table) -> pa.Table:
        return write_aligned(table, output, written, size, max_pixels, landmark_model)

    with ray_session(address, verbose):
        receipts = block_dataset(found, blocks, cpus).map_batches(
            work,
            compute=TaskPoolStrategy(size=min(workers, len(blocks))),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus,
        )
        with display("align", found.rows) as shown:
            for receipt in receipts.iter_batches(batch_size=None, batch_format="pyarrow"):
                assert isinstance(receipt, pa.Table)
                done += len(receipt)
                reasons.update(error for error in receipt[ERROR].to_pylist() if error is not None)
                shown.update(done, f"{reasons.total()} rejected")
        audit(input_ids, output)
    console.print(f"{output}: {done} rows in, {done - reasons.total()} aligned, {reasons.total()} rejected", markup=False)
    for reason, count in reasons.most_common(5):
        console.print(f"  {count} x {reason}", markup=False)
    if reasons.total() > max_reject_rate * done:
        raise TooManyRejectsError(
            f"{reasons.total()} of {done} rows were rejected, more than --max-reject-rate {max_reject_rate:g} allows; "
            f"the others are written, the reasons are in the column {ERROR}"
        )


# ---- before anything starts ------------------------------------------------------------------------------------------


def input_problems(found: "Input") -> list[str]:
    from pipeline import schema

    if kind := schema.about(found.columns).get("kind"):
        return [f"{found.source.path} is a table of {kind}; faces are aligned before anything else, so give the photographs"]
    clash = [name for name in found.user_columns.names if name in {"id", "image", ERROR, *schema.HIDDEN}]
    return [f"column {name!r} of {found.source.path} has a name that this run writes; rename it first" for name in clash]


def output_problems(input: str, output: str, overwrite: bool) -> list[str]:
    from fsspec.core import url_to_fs

    from models.stores import make_folder, missing_bucket
    from pipeline.config import ConfigError
    from pipeline.faults import refused
    from pipeline.resume import nested

    try:
        with refused(f"the output {output} cannot be used"):
            fs, root = url_to_fs(output)
            if problems := nested(input, output):
                return problems
            if bucket := missing_bucket(fs, root):
                return [f"there is no bucket {bucket} for the output {output}; make it first, or see to the name"]
            if fs.isfile(root):
                return [f"the output {output} is a file; give a folder"]
            files = [f for f in fs.ls(root, detail=False) if str(f).endswith(".parquet")] if fs.isdir(root) else []
            make_folder(fs, root)
    except ConfigError as error:
        return list(error.problems)
    if files and not overwrite:
        return [f"{output} holds {len(files)} Parquet files already; give another folder, or --overwrite"]
    return []


def aligned_columns(found: "Input", size: int) -> "pa.Schema":
    """id, image, the user's columns, align_error."""
    import pyarrow as pa

    from pipeline import schema

    kept = [field.remove_metadata() for field in found.user_columns]
    columns = [pa.field("id", pa.string()), pa.field("image", schema.IMAGE), *kept, pa.field(ERROR, pa.string())]
    return schema.with_metadata(columns, found.user_columns, {"kind": "aligned faces", "size": size})


def _clear(output: str) -> None:
    from fsspec.core import url_to_fs

    from pipeline.resume import OURS

    fs, root = url_to_fs(output)
    for file in map(str, fs.ls(root, detail=False)):
        if OURS.fullmatch(file.rpartition("/")[2]):
            fs.rm_file(file)


# ---- on the workers --------------------------------------------------------------------------------------------------


def write_aligned(
    table: "pa.Table", output: str, columns: "pa.Schema", size: int, max_pixels: int, landmark_model: str | None
) -> "pa.Table":
    """Aligns whole blocks of rows, as ``read_block`` gives them, and writes a file for each; returns their errors."""
    import pyarrow as pa

    from pipeline import schema
    from pipeline.worker import split_blocks, write_file

    written = []
    for block in split_blocks(table):
        done = with_faces(block, size, max_pixels, landmark_model).select(columns.names).cast(columns)
        write_file(output, f"part-{block[schema.ROW][0].as_py():012d}.parquet", done)
        written.append(done.select([ERROR]))
    return pa.concat_tables(written)


def with_faces(table: "pa.Table", size: int, max_pixels: int, landmark_model: str | None = None) -> "pa.Table":
    """The table with each image replaced by its aligned face as PNG, or by null with the reason in ``align_error``."""
    import pyarrow as pa

    from models.alignment import align, find_landmarks
    from pipeline import codec, schema

    images: list[dict[str, bytes | str | None] | None] = []
    errors: list[str | None] = []
    for row, unread in zip(table["image"].to_pylist(), codec.unread_reasons(table), strict=True):
        try:
            picture = codec.decode_whole(row and row["bytes"], max_pixels)
        except codec.ImageError as error:
            images.append(None)
            errors.append(unread or str(error))
            continue
        landmarks = find_landmarks(picture, landmark_model)
        face = None if landmarks is None else codec.encode_png(align(picture, landmarks, size))
        images.append(None if face is None else {"bytes": face, "path": row["path"]})
        errors.append(NO_FACE if face is None else None)
    table = table.set_column(table.column_names.index("image"), "image", pa.array(images, schema.IMAGE))
    return table.append_column(ERROR, pa.array(errors, pa.string()))
