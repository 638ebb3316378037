"""What ends a job although the request was right, in words for people; no Ray here."""

import errno
import pickle
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from models.references import public_text
from models.stores import how_to_be_allowed
from pipeline.config import ConfigError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
AGAIN = "then give the same command again: it goes on where it stopped"


class JobError(RuntimeError):
    """The job cannot go on, and a person can mend it: one sentence. What is written stays, and the same command goes on."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what disks and stores raise into a JobError. ``what`` says what was not possible: ``out/part-1 cannot be written``."""
    try:
        yield
    except Exception as error:
        if not _of_a_store(error):
            raise
        raise JobError(f"{public_text(what)} ({_reason(error)}); {_remedy(error)}, {AGAIN}") from error


@contextmanager
def refused(what: str) -> Iterator[None]:
    """The same before anything has started: a ConfigError, also for addresses that no package knows."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if _of_a_store(error):
            raise ConfigError(f"{what}: {_reason(error)}; {_remedy(error)}") from None
        if isinstance(error, ValueError | ImportError):
            raise ConfigError(f"{what}: {_reason(error)}") from None
        raise


def _of_a_store(error: Exception) -> bool:
    """Errors of the file system, of Parquet files, and of the clients of object stores."""
    return isinstance(error, OSError | pa.ArrowException) or type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp"}


def _reason(error: Exception) -> str:
    """In one line, and without what addresses hold besides the place: a signed one would be in every log."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(public_text((text.splitlines() or [""])[0]).split())[:200] or type(error).__name__


def _remedy(error: Exception) -> str:
    if type(error).__name__ == "NoCredentialsError":
        return how_to_be_allowed("s3")
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL:
        return "make room"
    if number in FORBIDDEN or isinstance(error, PermissionError) or re.search("Credential|Profile", type(error).__name__):
        return "see to the permissions, or renew the credentials"
    return "see that the file is whole, the store can be reached and the credentials are valid"


def to_bytes(error: Exception) -> bytes:
    """An error on its way to the driver, with its traceback as a note; one that cannot travel is told by its words."""
    error.add_note(f"on a worker: {''.join(traceback.format_exception(error))}")
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # whatever the class of the error does when it is taken apart
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.__notes__ = error.__notes__
        return pickle.dumps(told)
    return data


def from_bytes(data: bytes) -> Exception:
    """What ``to_bytes`` was given. Only for what the job's own workers sent."""
    error = pickle.loads(data)
    assert isinstance(error, Exception)
    return error
