"""The command line. Commands import what they need when they run, so that ``--help`` answers at once."""

import sys

import typer

from jobs import (
    align,
    demo,
    edit,
    evaluate,
    export,
    finetune,
    import_command,
    invert,
    listing,
    optimize,
    plan,
    report_command,
    status,
    submit,
    submitted,
)

app = typer.Typer(
    name="diffusionclip",
    help="Change an attribute of many images by words: DiffusionCLIP as a dataset job on Ray. Start with: diffusionclip demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(demo.demo)
app.command()(align.align)
app.command()(invert.invert)
app.command()(finetune.finetune)
app.command()(edit.edit)
app.command()(optimize.optimize)
app.command()(evaluate.evaluate)
app.command()(report_command.report)
app.command()(export.export)
app.command()(status.status)
app.add_typer(plan.app, name="plan")
app.command(context_settings={"ignore_unknown_options": True})(submit.submit)  # those of the command that it submits
app.add_typer(submitted.app, name="jobs")
app.command("import")(import_command.import_checkpoint)
app.command()(listing.domains)
app.command()(listing.attributes)


def main() -> None:
    """Exit status: 0 all rows accounted for, 1 program or machine, 2 the request, 3 too many rejects."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except Exception as error:
        status = _status(error)
        told = error if status else _from_a_worker(error)
        if told is None:
            raise
        for line in str(told).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(status or 1)


def _status(error: Exception) -> int | None:
    """The exit status of an error that is meant for people; None for one that needs its traceback."""
    from jobs.finetune import TrainingFailedError
    from jobs.running import TooManyRejectsError
    from models.weights import WeightsError
    from pipeline.config import ConfigError
    from pipeline.faults import JobError

    if isinstance(error, ConfigError | WeightsError):
        return 2
    if isinstance(error, TooManyRejectsError):
        return 3
    return 1 if isinstance(error, TrainingFailedError | JobError) else None


def _from_a_worker(error: BaseException | None) -> BaseException | None:
    """The error for people that a worker of Ray raised: weights that only it looked for. It is in one of the wrappers around it, or
    only in their text, where an actor died of it."""
    from models.references import EVERY_NODE, WeightsError, told_in

    texts = []
    while error is not None and not isinstance(error, WeightsError):
        texts.append(str(error))
        error = getattr(error, "cause", None) or error.__cause__
    if error is not None:
        return WeightsError(f"on a worker, {error}; {EVERY_NODE}")
    told = next(filter(None, map(told_in, texts)), None)
    return WeightsError(f"on a worker, {told}; {EVERY_NODE}") if told else None


if __name__ == "__main__":
    main()
