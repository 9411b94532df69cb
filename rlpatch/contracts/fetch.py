"""The Python files of one release, from its sdist or wheel, without installing or running anything.

A release is kept as one zip of its ``.py`` files, so nothing in a foreign archive ever becomes a path on this disk. Taken
from, in this order: a pure Python wheel; the sdist; the Python members alone of a platform wheel (vLLM's have hundreds of
MB), by HTTP range requests; that wheel whole, where ranges are refused. Whole files are checked against the index's
sha256; members read by range carry a CRC-32 each, and come over the same TLS.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.version import Version

from rlpatch.contracts import index
from rlpatch.contracts.cache import folder, part
from rlpatch.contracts.index import File, RequestError
from rlpatch.errors import SourceError

Progress = Callable[[str, int, int], None]  # what is read, bytes done, bytes in all (0: unknown)

_CHUNK = 1 << 20
_TAIL = 1 << 16  # holds the end of a zip's central directory, and mostly all of it
_SPAN = 16 << 20  # most bytes asked for at once
_GAP = 1 << 18  # members that lie closer together are read in one go
_MOST_FILE = 32 << 20  # bytes of one Python file; more is not source code
_MOST_ALL = 1 << 30  # bytes of all Python files of a release
_MOST_ARCHIVE = 16 << 30  # bytes an archive may unpack to
_TRIES = 3


def kept(library: str, version: Version) -> Path:
    """Where the release is kept, whether it is there or not."""
    return folder() / library / f"{version}.zip"


def source(library: str, version: Version, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The zip of the release's Python files, fetched if it is not kept already.

    Raises:
        SourceError: there is no such release (the nearest are named), or it cannot be had or read; nothing is left behind.
    """
    target = kept(library, version)
    if target.is_file():
        if zipfile.is_zipfile(target):
            return target
        target.unlink()  # damaged on the disk
    if offline:
        raise SourceError(f"{library} {version} is not kept in {target.parent}; run this once with network")
    found = index.releases(library)
    files = [file for known, listed in found.items() if known == version for file in listed]
    if not files:
        near = ", ".join(str(v) for v in index.nearest(version, list(found))) or "none"
        raise SourceError(f"there is no {library} {version}; nearest releases: {near}")
    with part(target) as path:
        _collect(library, version, files, path, progress or _silent)
    return target


def _silent(what: str, done: int, whole: int) -> None: ...


def _collect(library: str, version: Version, files: list[File], into: Path, progress: Progress) -> None:
    """Write the release's Python files to the zip `into`, from the first kind of file that has them."""
    pure = [f for f in files if f.name.endswith("-none-any.whl")]
    sdists = [f for f in files if not f.name.endswith(".whl")]
    # Any platform's wheel has the same Python files.
    wheels = sorted(
        (f for f in files if f.name.endswith(".whl") and f not in pure), key=lambda f: "x86_64" not in f.name
    )
    ways: list[tuple[Callable[[File, Path, Progress], dict[str, bytes]], File]] = []
    ways += [(_whole(library), file) for file in (*pure[:1], *sdists[:1])]
    ways += [(way, wheels[0]) for way in (_ranged(library), _whole(library)) if wheels]
    failures = []
    for way, file in ways:
        try:
            members = way(file, into, progress)
        except SourceError as error:
            failures.append(f"{file.name}: {error}")
            continue
        if f"{library}/__init__.py" not in members:
            failures.append(f"{file.name}: no {library}/__init__.py inside")
            continue
        origin = json.dumps({"file": file.name, "sha256": file.sha256 if way.__name__ == "whole" else ""})
        with zipfile.ZipFile(into, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.comment = origin.encode()
            for name in sorted(members):
                archive.writestr(zipfile.ZipInfo(name), members[name], zipfile.ZIP_DEFLATED)
        return
    raise SourceError(f"the sources of {library} {version} cannot be had: {'; '.join(failures) or 'it has no files'}")


# ---- whole files -------------------------------------------------------------------------------------------------------


def _whole(library: str) -> Callable[[File, Path, Progress], dict[str, bytes]]:
    def whole(file: File, into: Path, progress: Progress) -> dict[str, bytes]:
        _download(file, into, progress)
        try:
            if file.name.endswith(".tar.gz"):
                return _from_tar(into, library)
            with zipfile.ZipFile(into) as archive:
                return _from_zip(archive, library)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise SourceError(f"is no archive that can be read ({error})") from None

    return whole


def _download(file: File, into: Path, progress: Progress) -> None:
    for attempt in range(1, _TRIES + 1):
        digest, done, whole = hashlib.sha256(), 0, 0
        try:
            with index.request(file.url) as answer, into.open("wb") as out:
                whole = int(answer.headers.get("Content-Length") or 0)
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress(file.name, done, whole)
            if whole and done != whole:
                raise OSError(f"the connection ended after {done} of {whole} bytes")
        except RequestError:
            raise
        except (OSError, http.client.HTTPException) as error:
            if attempt == _TRIES:
                raise SourceError(f"the download failed ({error})") from None
            continue
        break
    if file.sha256 and digest.hexdigest() != file.sha256.lower():
        raise SourceError(
            f"its sha256 is {digest.hexdigest()}, the index says {file.sha256}: it was damaged or exchanged on the way; "
            "try again, and distrust the mirror if it stays so"
        )


def _wanted(name: str, library: str, *, depth: int) -> str | None:
    """The member's name with the package at the top, or None for what is not a Python file of the library.

    Args:
        depth: 0: the archive has the package at its top (a wheel); 1: one folder down, or in that one's ``src``.
    """
    path = PurePosixPath(name)
    if not name.endswith(".py") or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return None
    parts = path.parts[depth:]
    if depth and parts[:1] == ("src",):
        parts = parts[1:]
    return "/".join(parts) if len(parts) > 1 and parts[0] == library else None


class _Budget:
    """Refuses archives that unpack to more than any library's source code."""

    def __init__(self) -> None:
        self.left = _MOST_ALL

    def spend(self, name: str, size: int) -> None:
        self.left -= size
        if size > _MOST_FILE or self.left < 0:
            raise SourceError(f"{name!r} and what precedes it unpack to more than source code does; refused")


def _from_tar(path: Path, library: str) -> dict[str, bytes]:
    """Of an sdist: ``NAME-VERSION/[src/]library/…``."""
    found: dict[str, bytes] = {}
    budget, whole = _Budget(), 0
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            whole += member.size
            if whole > _MOST_ARCHIVE:
                raise SourceError("it unpacks to more than source code does; refused")
            name = _wanted(member.name, library, depth=1)
            if name is None or not member.isreg():
                continue
            budget.spend(name, member.size)
            reader = archive.extractfile(member)
            if reader is not None:
                found[name] = reader.read(member.size)
    return found


def _from_zip(archive: zipfile.ZipFile, library: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    budget = _Budget()
    for member in sorted(_python_members(archive, library), key=lambda member: member.header_offset):
        budget.spend(member.filename, member.file_size)
        # never more than file_size, whatever the compressed data holds; the CRC-32 is compared
        found[str(_member_name(member, library))] = archive.read(member)
    return found


def _member_name(member: zipfile.ZipInfo, library: str) -> str | None:
    # a wheel has the package at its top; a zipped sdist one folder down
    return _wanted(member.filename, library, depth=0) or _wanted(member.filename, library, depth=1)


def _python_members(archive: zipfile.ZipFile, library: str) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if _member_name(member, library) is not None]


# ---- members by range --------------------------------------------------------------------------------------------------


def _ranged(library: str) -> Callable[[File, Path, Progress], dict[str, bytes]]:
    def ranged(file: File, into: Path, progress: Progress) -> dict[str, bytes]:
        try:
            remote = RemoteFile(file.url, lambda done: progress(f"{file.name} (Python files alone)", done, 0))
            with zipfile.ZipFile(remote) as archive:
                remote.plan(list(_spans(archive, library)))
                return _from_zip(archive, library)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, http.client.HTTPException) as error:
            raise SourceError(f"cannot be read by ranges ({error})") from None

    return ranged


def _spans(archive: zipfile.ZipFile, library: str) -> Iterator[tuple[int, int]]:
    """[start, end) of stretches that hold wanted members, neighbours joined."""
    wanted = {member.header_offset for member in _python_members(archive, library)}
    starts = sorted(member.header_offset for member in archive.infolist())
    ends = [*starts[1:], archive.start_dir]
    current: tuple[int, int] | None = None
    for start, end in zip(starts, ends, strict=True):
        if start not in wanted:
            continue
        if current is not None and start - current[1] <= _GAP and end - current[0] <= _SPAN:
            current = (current[0], end)
            continue
        if current is not None:
            yield current
        current = (start, end)
    if current is not None:
        yield current


class RemoteFile(io.RawIOBase):
    """A file at an HTTP address, read by range requests.

    Args:
        url: Its address.
        progress: Called with the bytes transferred so far.

    Raises:
        SourceError: the server does not serve ranges.
    """

    def __init__(self, url: str, progress: Callable[[int], None]) -> None:
        super().__init__()
        self.url, self.progress = url, progress
        self.transferred = 0
        self._at = 0
        self._planned: list[tuple[int, int]] = []
        self._blocks: list[tuple[int, bytes]] = []
        self.size = 0
        tail, first = self._get(f"bytes=-{_TAIL}")
        self._blocks.append((first, tail))

    def _get(self, wanted: str) -> tuple[bytes, int]:
        """(bytes, position of the first)."""
        problem: Exception | None = None
        for _ in range(_TRIES):
            with contextlib.closing(index.request(self.url, {"Range": wanted})) as answer:
                found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range") or "")
                if answer.status != 206 or found is None:
                    raise SourceError("the server does not serve ranges")
                first, last, size = map(int, found.groups())
                if self.size not in (0, size):
                    raise SourceError("the file changed while it was read")
                self.size = size
                try:
                    content = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    problem = error
                    continue
                if len(content) == last - first + 1:
                    self.transferred += len(content)
                    self.progress(self.transferred)
                    return content, first
                problem = OSError(f"the connection ended after {len(content)} of {last - first + 1} bytes")
        raise SourceError(f"the download failed ({problem})")

    def plan(self, spans: list[tuple[int, int]]) -> None:
        """What will be read: a read that begins in one of these [start, end) transfers it to its end at once."""
        self._planned = spans

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.IOBase.seek`."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def tell(self) -> int:
        """See `io.IOBase.tell`."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """See `io.RawIOBase.read`."""
        end = self.size if size < 0 else min(self.size, self._at + size)
        if end <= self._at:
            return b""
        for start, content in self._blocks:
            if start <= self._at and end <= start + len(content):
                break
        else:
            until = max([end, *(b for a, b in self._planned if a <= self._at < b)])
            content, start = self._get(f"bytes={self._at}-{until - 1}")
            self._blocks = [*self._blocks[:1], (start, content)]  # the directory stays, the span before goes
        found = content[self._at - start : end - start]
        self._at += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase.readinto`."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
