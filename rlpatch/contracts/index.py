"""Which releases of a library exist, and their files: the package index, as pip is configured to use it.

Speaks the simple repository API in JSON (PEP 691) and HTML (PEP 503). The last answer is kept, for use without network.
"""

from __future__ import annotations

import base64
import configparser
import html.parser
import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

from rlpatch.contracts.cache import folder, write
from rlpatch.errors import SourceError
from rlpatch.versions import DISTRIBUTIONS

_DEFAULT = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TRIES = 3
TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class File:
    """One file of a release.

    Attributes:
        name: File name.
        url: Where it is, without fragment.
        sha256: What the index says; empty when it says nothing.
        yanked: Whether the release was withdrawn.
    """

    name: str
    url: str
    sha256: str = ""
    yanked: bool = False

    @property
    def version(self) -> Version | None:
        """The release that it belongs to; None for names that are neither wheel nor sdist."""
        try:
            if self.name.endswith(".whl"):
                return parse_wheel_filename(self.name)[1]
            return parse_sdist_filename(self.name)[1] if self.name.endswith((".tar.gz", ".zip")) else None
        except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
            return None


# ---- pip's configuration -----------------------------------------------------------------------------------------------


@cache
def pip_settings() -> dict[str, str]:
    """pip's options by name (``index-url``, ``cert``, …), read as pip reads them; pip itself need not be there."""
    home = Path.home()
    config = os.environ.get("XDG_CONFIG_HOME")
    files = [
        Path("/etc/xdg/pip/pip.conf"),
        Path("/etc/pip.conf"),
        home / ".pip/pip.conf",
        (Path(config) if config else home / ".config") / "pip/pip.conf",
        Path(sys.prefix) / "pip.conf",
    ]
    named = os.environ.get("PIP_CONFIG_FILE")
    if named:
        files = [] if named == os.devnull else [*files, Path(named)]
    parser = configparser.RawConfigParser()
    found: dict[str, str] = {}
    for file in files:
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue
    for section in ("global", "download", "install"):
        if parser.has_section(section):
            found.update({key.lower().replace("_", "-"): value for key, value in parser.items(section)})
    for key, value in os.environ.items():
        if key.startswith("PIP_") and value:
            found[key.removeprefix("PIP_").lower().replace("_", "-")] = value
    return found


def indexes() -> list[str]:
    """Addresses of the configured indexes (simple API), the main one first."""
    settings = pip_settings()
    extra = settings.get("extra-index-url", "").split()
    return [url.rstrip("/") for url in (settings.get("index-url", _DEFAULT).strip(), *extra)]


# ---- HTTP --------------------------------------------------------------------------------------------------------------


@cache
def _opener() -> urllib.request.OpenerDirector:
    certificates = pip_settings().get("cert")
    context = ssl.create_default_context(cafile=certificates if certificates and Path(certificates).is_file() else None)
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))


def shown(url: str) -> str:
    """`url` without a user's name and password, for messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


class RequestError(SourceError):
    """An address did not answer; `status` is HTTP's, or None when there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def request(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """Open `url`; the response, to be closed by the caller. Tried again when the server is busy or does not answer.

    Raises:
        RequestError: it did not answer, or refused.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "file"):
        raise RequestError(f"{shown(url)} is no address of an index; set PIP_INDEX_URL to an http(s) address")
    sent = {"User-Agent": "rlpatch-contracts", "Accept-Encoding": "identity", **(headers or {})}
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        sent["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    for attempt in range(1, _TRIES + 1):
        try:
            return _opener().open(urllib.request.Request(urllib.parse.urlunsplit(parts), headers=sent), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code != 429:
                raise RequestError(f"{shown(url)} answers {error.code} {error.reason}", error.code) from None
            why, status = f"answers {error.code} {error.reason}", error.code
        except (OSError, http.client.HTTPException) as error:
            why, status = f"cannot be reached ({getattr(error, 'reason', error)})", None
            if parts.scheme == "file" or "Connection refused" in why:
                break
        if attempt < _TRIES:
            time.sleep(attempt)
    raise RequestError(f"{shown(url)} {why}", status)


# ---- releases ----------------------------------------------------------------------------------------------------------


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a" and given.get("href"):
            self.found.append((str(given["href"]), "data-yanked" in given))


def parse(body: bytes, content_type: str, base: str) -> list[File]:
    """The files in one answer of the simple API, JSON or HTML."""
    files = []
    if "json" in content_type:
        for entry in json.loads(body)["files"]:
            url = urllib.parse.urljoin(base, entry["url"])
            digest = (entry.get("hashes") or {}).get("sha256", "")
            files.append(File(entry["filename"], urllib.parse.urldefrag(url).url, digest, bool(entry.get("yanked"))))
        return files
    links = _Links()
    links.feed(body.decode("utf-8", "replace"))
    for href, yanked in links.found:
        url, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(base, href))
        digest = dict(urllib.parse.parse_qsl(fragment)).get("sha256", "")
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
        files.append(File(name, url, digest, yanked))
    return files


def _listing(library: str) -> list[File]:
    """What the configured indexes list, the first index first.

    Raises:
        RequestError: no index could be asked, or none has it.
    """
    project = canonicalize_name(DISTRIBUTIONS.get(library, (library,))[0])
    files: list[File] = []
    failure: RequestError | None = None
    for index in indexes():
        url = f"{index}/{project}/" + ("index.html" if index.startswith("file:") else "")
        try:
            with request(url, {"Accept": _ACCEPT}) as answer:
                files += parse(answer.read(), answer.headers.get("Content-Type") or "text/html", answer.url)
        except RequestError as error:
            if not index.startswith("file:") and (failure is None or failure.status == 404):
                failure = error
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            failure = failure or RequestError(f"{shown(url)} gives no list of files ({error})")
    if not files:
        raise failure or RequestError(f"no index lists {library}")
    return files


def releases(library: str, *, offline: bool = False) -> dict[Version, list[File]]:
    """Every release of `library` with its files, ascending; yanked files are marked, not left out.

    Args:
        offline: Do not ask the index; use what it said last.

    Raises:
        SourceError: the index cannot be asked and was not asked before, or knows no such project.
    """
    kept = folder() / library / "index.json"
    files: list[File] = []
    failure: SourceError | None = None
    if not offline:
        try:
            files = _listing(library)
        except RequestError as error:
            if error.status == 404:
                raise SourceError(f"the index has no project {library!r} ({error})") from None
            failure = error
        else:
            write(kept, json.dumps([file.__dict__ for file in files]).encode())
    if not files:
        try:
            files = [File(**entry) for entry in json.loads(kept.read_bytes())]
        except (OSError, ValueError, TypeError):
            why = failure or "asked to stay offline"
            raise SourceError(
                f"the releases of {library} are unknown: {why}, and nothing is kept in {kept.parent}; connect, or set "
                "PIP_INDEX_URL to an index that can be reached"
            ) from None
    found: dict[Version, list[File]] = {}
    for file in files:
        version = file.version
        if version is not None and file.name not in [known.name for known in found.get(version, ())]:
            found.setdefault(version, []).append(file)
    return dict(sorted(found.items()))


def nearest(wanted: Version, known: list[Version]) -> list[Version]:
    """Up to two releases below and two above `wanted`, pre-releases only when it is one."""
    usual = [version for version in known if wanted.is_prerelease or not version.is_prerelease]
    below = [version for version in usual if version < wanted]
    above = [version for version in usual if version > wanted]
    return [*below[-2:], *above[:2]]
