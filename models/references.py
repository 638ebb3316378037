"""How the places of weights are written: local paths, Hugging Face names and URLs.

A reference is a local path, a Hugging Face name (``org/name`` or ``hf://org/name[@revision][/path]``) or a URL that
fsspec knows (``s3://``, ``https://`` and others); ``#sha256=HEX`` at its end pins the contents of a single file. A local
path that exists wins over a Hugging Face name.
"""

import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit, urlunsplit

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Of files of weights: what ends so is no folder and no repository."""

_PIN = re.compile(r"#sha256=(.*)$")
_REPOSITORY = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
_NAME = re.compile(_REPOSITORY)
_HUB = re.compile(rf"hf://{_REPOSITORY}(?:@(?P<revision>refs/\w+/[^/]+|[^/]+))?(?:/(?P<path>.*))?")
_PAGE = re.compile(  # what people copy from the browser: blob/ is a page about the file, not the file
    rf"https://(?:huggingface\.co|hf\.co)/{_REPOSITORY}/?(?:(?:blob|resolve|tree)/(?P<revision>[^/?]+)(?:/(?P<path>[^?]+))?)?(?:\?.*)?"
)

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>`]+")


class WeightsError(ValueError):
    """Weights that are missing, damaged or of another domain; the message says which and what to do."""


class MissingError(WeightsError):
    """A file that is not where a reference says, in a place that could be looked at."""


class NotCachedError(MissingError):
    """A file that is not in the cache, where only the cache could be looked at."""


class UnreachableError(WeightsError):
    """A place that does not answer."""


@dataclass(frozen=True)
class Place:
    """A reference taken apart."""

    kind: Literal["local", "hub", "remote"]
    path: str
    """Local path, path in the repository ("" is its top), or URL."""
    repo: str = ""
    revision: str = ""
    """Branch, tag or commit; "" is the default branch."""
    sha256: str | None = None
    bare: bool = False
    """True for ``org/name`` without ``hf://``, which may have been meant as a path."""

    def __str__(self) -> str:
        """For messages: without credentials."""
        return public(self.reference)

    @property
    def reference(self) -> str:
        """As it is written, without the pin."""
        if self.kind != "hub":
            return self.path
        revision = "@" + self.revision.replace("/", "%2F") if self.revision else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.path}" if self.path else "")

    def moved(self, change: Callable[[str], str]) -> "Place":
        """The place with another path, of which no SHA-256 is known."""
        if self.kind != "remote":
            return replace(self, path=change(self.path), sha256=None)
        first, *chained = self.path.split("::")
        parts = urlsplit(first)
        url = urlunsplit(parts._replace(path=change(parts.path.rstrip("/") or "/")))
        return replace(self, path="::".join([url, *chained]), sha256=None)

    def child(self, name: str) -> "Place":
        """The place of a file, by its name or relative path, in this folder."""
        return self.moved(lambda path: posixpath.join(path, name))


def place_of(reference: str | Path) -> Place:
    """Raises WeightsError if a Hugging Face reference or a pin is not well-formed."""
    text = str(reference)
    pin = _PIN.search(text)
    if pin and not re.fullmatch(r"[0-9a-fA-F]{64}", pin[1]):
        raise WeightsError(f"{public(text)} ends with #sha256={pin[1]}, which must have 64 hexadecimal digits")
    text, sha256 = (text[: pin.start()], pin[1].lower()) if pin else (text, None)
    if text.startswith("file://"):
        return Place("local", unquote(urlsplit(text).path), sha256=sha256)
    if "://" not in text:
        local = Path(text).expanduser()
        if local.exists() or not _NAME.fullmatch(text) or text.endswith((*SUFFIXES, ".json")):
            return Place("local", str(local), sha256=sha256)
        return Place("hub", "", repo=text, sha256=sha256, bare=True)
    if on_hub := _HUB.fullmatch(text) or _PAGE.fullmatch(text):
        path, revision = (on_hub["path"] or "").strip("/"), unquote(on_hub["revision"] or "")
        return Place("hub", path, repo=on_hub["repo"], revision=revision, sha256=sha256)
    if text.startswith("hf://"):
        raise WeightsError(f"{text} is not a Hugging Face reference; write hf://org/name[@revision] or hf://org/name[@revision]/path")
    return Place("remote", text, sha256=sha256)


def public(reference: str | Path) -> str:
    """A reference without user, password, query and fragment: fit for messages and files."""
    text = str(reference)
    return "::".join(map(_without_secrets, text.split("::"))) if "://" in text else _PIN.sub("", text)


def public_text(text: str) -> str:
    """A text with each address in it as ``public`` shows it: what other programs say of an error repeats addresses whole."""
    return _ADDRESS.sub(_shown, text)


def _shown(address: re.Match[str]) -> str:
    try:
        return public(address[0])
    except ValueError:  # as of http://[ which is none
        return f"{address[0].partition('://')[0]}://..."


def absolute(reference: str | Path) -> str:
    """A local path as one that every process understands, whatever its working directory; any other reference as it is."""
    place = place_of(reference)
    if place.kind != "local":
        return str(reference)
    return str(Path(place.path).absolute()) + (f"#sha256={place.sha256}" if place.sha256 else "")


EVERY_NODE = "every node must have the file at the same place, or be able to fetch it"
"""What to do about weights that only a worker misses."""
_TOLD = re.compile(r"^\W*(?:\w+\.)*(?:WeightsError|MissingError|NotCachedError|UnreachableError): (.+)$", re.MULTILINE)


def told_in(traceback: str) -> str | None:
    """The last sentence of a WeightsError in the text of a traceback, as other processes send them; None if there is none."""
    told = _TOLD.findall(re.sub(r"\x1b\[[0-9;]*m", "", traceback))
    return told[-1].strip() if told else None


def _without_secrets(url: str) -> str:
    if "://" not in url or url.startswith("hf://"):  # the @ of hf:// is a revision
        return url.partition("#")[0]
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def inside(folder: str | Path, name: str) -> str:
    """Reference of a file, by its name or relative path, in a folder."""
    return place_of(folder).child(name).reference


def beside(file: str | Path, suffix: str) -> str:
    """Reference of the file of another suffix beside a file."""
    return place_of(file).moved(lambda path: posixpath.splitext(path)[0] + suffix).reference


def offline() -> bool:
    """True if only local files and caches may be used: DIFFUSIONCLIP_OFFLINE or HF_HUB_OFFLINE is set."""
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in ("DIFFUSIONCLIP_OFFLINE", "HF_HUB_OFFLINE"))
