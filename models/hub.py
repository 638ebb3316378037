"""Files of the Hugging Face hub, in the hub's own cache. The client shows its own progress.

Each revision is asked for once a process: its commit, so that all files of a model are of one, and the names of its
files, so that none is tried in vain. What the hub cannot answer, its cache does.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from models.references import MissingError, NotCachedError, Place, UnreachableError, WeightsError, offline

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Revision:
    """What the hub says of a revision; without a commit, why it says nothing."""

    commit: str | None
    files: tuple[str, ...] = ()
    why: str = ""


def hub_file(place: Place) -> Path:
    """Local copy of one file. Raises WeightsError, MissingError if the repository has no such file."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    if _COMMIT.fullmatch(place.revision):  # a commit never changes, so nobody need be asked
        cached = try_to_load_from_cache(place.repo, place.path, revision=place.revision)
        if isinstance(cached, str):
            return Path(cached)
    known = _revision(place.repo, place.revision, place.bare, offline())
    if known.commit and place.path not in known.files:
        raise MissingError(f"hf://{place.repo} has no file {place.path}")
    with _explained(place):
        try:  # by branch and not by commit, since that is what the cache then knows it by without a network
            asked = place.revision or constants.DEFAULT_REVISION
            file = Path(hf_hub_download(place.repo, place.path, revision=asked, local_files_only=known.commit is None))
            if known.commit and known.commit not in file.parts:  # the branch has moved on since
                file = Path(hf_hub_download(place.repo, place.path, revision=known.commit))
            return file
        except LocalEntryNotFoundError as error:
            if known.commit and isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise _not_cached(place, known) from None


def hub_names(place: Place) -> list[str]:
    """Paths of all files of a repository; of those in the cache if the hub cannot be asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    known = _revision(place.repo, place.revision, place.bare, offline())
    if known.commit:
        return list(known.files)
    try:  # a pattern that fits no file asks where the snapshot lies, and not whether it is complete
        folder = Path(snapshot_download(place.repo, revision=place.revision or None, local_files_only=True, allow_patterns=[":"]))
    except LocalEntryNotFoundError:
        raise _not_cached(place, known) from None
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


@lru_cache(maxsize=256)
def _revision(repo: str, revision: str, bare: bool, offline: bool) -> _Revision:
    if offline:
        return _Revision(None, why="offline mode is on (HF_HUB_OFFLINE or DIFFUSIONCLIP_OFFLINE)")
    from huggingface_hub import HfApi

    try:
        with _explained(Place("hub", "", repo=repo, revision=revision, bare=bare)):
            info = HfApi().model_info(repo, revision=revision or None, timeout=20)
    except UnreachableError as error:
        log.warning("%s", error)
        return _Revision(None, why=str(error))
    return _Revision(info.sha, tuple(file.rfilename for file in info.siblings or ()))


def _not_cached(place: Place, known: _Revision) -> NotCachedError:
    return NotCachedError(
        f"{place} is not in the local cache{_or_local(place)} and {known.why}; "
        f"where there is a network, run: hf download {place.repo}, or give the path of a local copy"
    )


def _or_local(place: Place) -> str:
    return f" (nor is there a local path {place.repo})" if place.bare else ""


@contextmanager
def _explained(place: Place) -> Iterator[None]:
    """Turns what the hub's client raises into a WeightsError that says what to do."""
    from huggingface_hub import constants, errors

    name, page = f"hf://{place.repo}", f"{constants.ENDPOINT}/{place.repo}"
    try:
        yield
    except errors.GatedRepoError:
        raise WeightsError(f"{name} is gated; accept its licence at {page}, then run: hf auth login, or set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(
            f"{name} does not exist or is private{_or_local(place)}; check the name at {page}, or run: hf auth login, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise WeightsError(f"{name} has no revision {place.revision}; see {page}") from None
    except errors.DisabledRepoError:
        raise WeightsError(f"{name} has been disabled; use another model") from None
    except errors.HFValidationError:
        raise WeightsError(f"{place.repo} is not a possible Hugging Face name{_or_local(place)}; write org/name") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise UnreachableError(f"the hub cannot serve {name} now (HTTP {status}); try again later") from None
        raise WeightsError(f"the hub refuses {name} (HTTP {status}); run: hf auth login, or set HF_TOKEN to one that may read it") from None
    except (errors.HTTPError, errors.FileMetadataError, errors.OfflineModeIsEnabled, errors.XetDownloadError) as error:
        raise UnreachableError(f"the Hugging Face hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise WeightsError(
            f"cannot write to the hub's cache {constants.HF_HUB_CACHE} ({reason}); make room there, or set HF_HOME to another folder"
        ) from None
