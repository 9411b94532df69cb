"""Fetching sources: a package index on this machine, with and without range requests, honest and hostile."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import multiprocessing
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from rlpatch.contracts import cache, fetch, index
from rlpatch.contracts.fetch import source
from rlpatch.errors import SourceError

PYTHON = {"lib/__init__.py": b"x = 1\n", "lib/engine.py": b"def generate(): ...\n" * 400}
OTHER = {"lib/kernels.so": bytes(range(256)) * 4000, "lib/data.json": b"{}", "other/__init__.py": b""}


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sdist(members: dict[str, bytes], *, top: str = "lib-1.0/", links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, to in (links or {}).items():
            info = tarfile.TarInfo(top + name)
            info.type, info.linkname = tarfile.SYMTYPE, to
            archive.addfile(info)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """A simple index with one project, ``lib``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.digests: dict[str, str] = {}
        self.yanked: set[str] = set()
        self.speak_json = True
        self.serve_ranges = True
        self.stop_after: int | None = None  # bytes of a file, then the connection ends
        self.broken = 0  # answers 503 that many times
        self.requests: list[tuple[str, str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, content: bytes, *, digest: str | None = None) -> None:
        self.files[name] = content
        self.digests[name] = hashlib.sha256(content).hexdigest() if digest is None else digest


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted, self.headers.get("Authorization")))
        if server.broken:
            server.broken -= 1
            self.send_error(503)
        elif self.path == "/simple/lib/":
            self._index()
        elif self.path.startswith("/files/") and (name := self.path[7:]) in server.files:
            self._file(server.files[name], wanted)
        else:
            self.send_error(404)

    def _index(self) -> None:
        server = self.server
        if server.speak_json:
            entries = [
                {"filename": n, "url": f"../../files/{n}", "hashes": {"sha256": d}, "yanked": n in server.yanked}
                for n, d in server.digests.items()
            ]
            kind, body = "application/vnd.pypi.simple.v1+json", json.dumps({"files": entries})
        else:
            kind = "text/html"
            body = "<!DOCTYPE html><html><body>" + "".join(
                f'<a href="../../files/{n}#sha256={d}"{" data-yanked=" if n in server.yanked else ""}>{n}</a>'
                for n, d in server.digests.items()
            )
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def _file(self, content: bytes, wanted: str | None) -> None:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
        if match and self.server.serve_ranges:
            first, last = match.groups()
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last) if first and last else len(content) - 1, len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            content = content[start : end + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.stop_after])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    for name in ("PIP_EXTRA_INDEX_URL", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"{found.url}/simple")
    monkeypatch.setenv("RLPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(index.time, "sleep", lambda seconds: None)
    index.pip_settings.cache_clear()
    yield found
    found.shutdown()
    found.server_close()
    index.pip_settings.cache_clear()


def python_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "index.json")


ONE = Version("1.0")


@pytest.mark.parametrize("speak_json", [True, False], ids=["json", "html"])
@pytest.mark.parametrize("kind", ["pure wheel", "sdist", "src sdist", "zip sdist"])
def test_python_files_alone_are_kept(server: Server, kind: str, speak_json: bool) -> None:
    server.speak_json = speak_json
    if kind == "pure wheel":
        server.add("lib-1.0-py3-none-any.whl", wheel({**PYTHON, **OTHER}))
        server.add("lib-1.0.tar.gz", b"not looked at")
    elif kind == "zip sdist":
        server.add("lib-1.0.zip", wheel({f"lib-1.0/{name}": content for name, content in {**PYTHON, **OTHER}.items()}))
    else:
        top = "lib-1.0/src/" if kind == "src sdist" else "lib-1.0/"
        server.add("lib-1.0.tar.gz", sdist({**PYTHON, **OTHER}, top=top))
        server.add("lib-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", b"not looked at")
    path = source("lib", ONE)
    assert python_of(path) == PYTHON
    before = len(server.requests)
    assert source("lib", ONE) == path and len(server.requests) == before


def test_platform_wheels_are_read_by_ranges(server: Server) -> None:
    members = {"lib/__init__.py": PYTHON["lib/__init__.py"], **OTHER, "lib/engine.py": PYTHON["lib/engine.py"]}
    name = "lib-1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    server.add(name, wheel(members))
    server.add("lib-1.0-cp311-cp311-manylinux_2_28_aarch64.whl", b"not looked at")
    seen: list[int] = []
    assert python_of(source("lib", ONE, progress=lambda what, done, whole: seen.append(done))) == PYTHON
    assert all(wanted for path, wanted, _ in server.requests if path == f"/files/{name}")
    assert seen[-1] < len(server.files[name]) / 4


def test_without_ranges_the_whole_wheel_is_read(server: Server) -> None:
    server.serve_ranges = False
    server.add("lib-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", wheel({**OTHER, **PYTHON}))
    assert python_of(source("lib", ONE)) == PYTHON


def test_a_wrong_hash_is_refused_and_nothing_stays(server: Server, tmp_path: Path) -> None:
    server.add("lib-1.0.tar.gz", sdist(PYTHON), digest="0" * 64)
    with pytest.raises(SourceError, match=r"sha256 is [0-9a-f]{64}, the index says 0{64}"):
        source("lib", ONE)
    assert left_behind(tmp_path) == []


def test_after_a_bad_wheel_the_sdist_serves(server: Server) -> None:
    server.add("lib-1.0-py3-none-any.whl", b"PK no zip")
    server.add("lib-1.0.tar.gz", sdist(PYTHON))
    assert python_of(source("lib", ONE)) == PYTHON


@pytest.mark.parametrize("name", ["lib-1.0.tar.gz", "lib-1.0-cp311-cp311-linux_x86_64.whl"])
def test_a_connection_that_ends_early_leaves_nothing(server: Server, tmp_path: Path, name: str) -> None:
    server.add(name, (sdist if name.endswith("gz") else wheel)(PYTHON))
    server.stop_after = 100
    with pytest.raises(SourceError, match=r"the connection ended|download failed|cannot be read by ranges"):
        source("lib", ONE)
    assert left_behind(tmp_path) == []
    server.stop_after = None
    assert python_of(source("lib", ONE)) == PYTHON


def test_an_interrupt_leaves_nothing(server: Server, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, whole: int) -> None:
        raise KeyboardInterrupt

    server.add("lib-1.0.tar.gz", sdist(PYTHON))
    with pytest.raises(KeyboardInterrupt):
        source("lib", ONE, progress=interrupt)
    assert left_behind(tmp_path) == []


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.add("lib-1.0.tar.gz", sdist(PYTHON))
    server.broken = 2
    assert python_of(source("lib", ONE)) == PYTHON
    (cache.folder() / "lib" / "1.0.zip").unlink()
    server.broken = 3
    (cache.folder() / "lib" / "index.json").unlink()
    with pytest.raises(SourceError, match="answers 503"):
        source("lib", ONE)


# ---- hostile archives --------------------------------------------------------------------------------------------------

EVIL = {
    "../lib/evil.py": b"1",
    "/lib/evil.py": b"2",
    "lib/../../evil.py": b"3",
    "lib\\..\\evil.py": b"4",
    "lib.py": b"5",
}


def test_names_that_lead_elsewhere_are_left_out(server: Server, tmp_path: Path) -> None:
    honest = {f"lib-1.0/{name}": content for name, content in PYTHON.items()}
    evil = {**EVIL, **{f"lib-1.0/{name}": content for name, content in EVIL.items() if not name.startswith("/")}}
    links = {"lib-1.0/lib/link.py": "/etc/passwd"}
    server.add("lib-1.0.tar.gz", sdist({**honest, **evil}, top="", links=links))
    assert python_of(source("lib", ONE)) == PYTHON
    server.add("lib-2.0-py3-none-any.whl", wheel({**PYTHON, **EVIL}))
    assert python_of(source("lib", Version("2.0"))) == PYTHON
    assert left_behind(tmp_path) == ["1.0.zip", "2.0.zip"]


@pytest.mark.parametrize("name", ["lib-1.0.tar.gz", "lib-1.0-py3-none-any.whl"])
def test_archives_that_unpack_to_too_much_are_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(fetch, "_MOST_FILE", 1000)
    server.add(name, (sdist if name.endswith("gz") else wheel)({**PYTHON, "lib/big.py": b"#" * 5000}))
    with pytest.raises(SourceError, match="more than source code does"):
        source("lib", ONE)
    monkeypatch.setattr(fetch, "_MOST_FILE", 1 << 20)
    monkeypatch.setattr(fetch, "_MOST_ALL", 6000)
    with pytest.raises(SourceError, match="more than source code does"):
        source("lib", ONE)
    assert left_behind(tmp_path) == []


def test_a_member_that_lies_about_its_size_is_refused(server: Server) -> None:
    content = bytearray(wheel({"lib/__init__.py": b"x" * 100, "lib/a.py": b"y" * 100}))
    place = content.rindex(b"PK\x01\x02") + 24  # the directory's file_size of the last member
    content[place : place + 4] = (50).to_bytes(4, "little")
    server.add("lib-1.0-py3-none-any.whl", bytes(content))
    with pytest.raises(SourceError, match="cannot be had"):
        source("lib", ONE)


def test_a_release_of_another_package_is_refused(server: Server) -> None:
    server.add("lib-1.0.tar.gz", sdist({"other/__init__.py": b""}))
    with pytest.raises(SourceError, match=r"no lib/__init__\.py inside"):
        source("lib", ONE)


# ---- which releases ----------------------------------------------------------------------------------------------------


def test_releases_and_their_neighbours(server: Server) -> None:
    for name in (
        "lib-1.0.tar.gz",
        "lib-1.1.tar.gz",
        "lib-1.10.tar.gz",
        "lib-2.0rc1.tar.gz",
        "lib-x.tar.gz",
        "lib-1.0.exe",
    ):
        server.add(name, b"")
    server.yanked = {"lib-1.1.tar.gz"}
    found = index.releases("lib")
    assert [str(version) for version in found] == ["1.0", "1.1", "1.10", "2.0rc1"]
    assert [file.yanked for files in found.values() for file in files] == [False, True, False, False]
    with pytest.raises(SourceError, match=r"there is no lib 1\.5; nearest releases: 1\.0, 1\.1, 1\.10"):
        source("lib", Version("1.5"))
    with pytest.raises(SourceError, match="no project 'other'"):
        index.releases("other")


def test_without_network_what_is_kept_serves(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.add("lib-1.0.tar.gz", sdist(PYTHON))
    server.add("lib-1.1.tar.gz", sdist(PYTHON))
    path = source("lib", ONE)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    index.pip_settings.cache_clear()
    assert source("lib", ONE) == path and len(index.releases("lib")) == 2
    server.files.clear()
    with pytest.raises(SourceError, match="cannot be had"):
        source("lib", Version("1.1"))
    with pytest.raises(SourceError, match="not kept in"):
        source("lib", Version("1.1"), offline=True)
    monkeypatch.setenv("RLPATCH_CACHE", str(tmp_path / "empty"))
    with pytest.raises(SourceError, match=r"releases of lib are unknown: .*cannot be reached.*PIP_INDEX_URL"):
        index.releases("lib")


def test_pips_configuration_is_followed(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nindex-url = {server.url}/simple\nextra-index-url =\n    http://a/\n    http://b\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.delenv("PIP_INDEX_URL")
    index.pip_settings.cache_clear()
    assert index.indexes()[-3:] == [f"{server.url}/simple", "http://a", "http://b"]
    monkeypatch.setenv("PIP_INDEX_URL", server.url.replace("http://", "http://user:se%40cret@") + "/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "folder").as_uri())
    (tmp_path / "folder" / "lib").mkdir(parents=True)
    (tmp_path / "folder" / "lib" / "index.html").write_text('<a href="lib-3.0.tar.gz">lib-3.0.tar.gz</a>')
    index.pip_settings.cache_clear()
    server.add("lib-1.0.tar.gz", b"")
    assert [str(version) for version in index.releases("lib")] == ["1.0", "3.0"]
    assert server.requests[-1][2] == "Basic dXNlcjpzZUBjcmV0"
    server.broken = 3
    (cache.folder() / "lib" / "index.json").unlink()
    (tmp_path / "folder" / "lib" / "index.html").unlink()
    with pytest.raises(SourceError) as error:
        index.releases("lib")
    assert "cret" not in str(error.value)


# ---- the cache ---------------------------------------------------------------------------------------------------------


def _fetch(cached: str, url: str) -> None:
    import os

    os.environ.update({"RLPATCH_CACHE": cached, "PIP_INDEX_URL": url, "PIP_CONFIG_FILE": "/dev/null"})
    index.pip_settings.cache_clear()
    assert python_of(source("lib", ONE)) == PYTHON


def test_several_processes_fetch_the_same_release(server: Server, tmp_path: Path) -> None:
    server.add("lib-1.0.tar.gz", sdist({**PYTHON, **OTHER}))
    context = multiprocessing.get_context("spawn")
    several = [context.Process(target=_fetch, args=(str(tmp_path), f"{server.url}/simple")) for _ in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0, 0, 0]
    assert left_behind(tmp_path) == ["1.0.zip"]


def test_a_damaged_file_is_fetched_anew_and_dead_parts_are_swept(server: Server) -> None:
    import os

    server.add("lib-1.0.tar.gz", sdist(PYTHON))
    path = source("lib", ONE)
    path.write_bytes(b"damaged")
    dead, young = path.parent / ".part-dead", path.parent / ".part-young"
    for part in (dead, young):
        part.write_bytes(b"")
    os.utime(dead, (0, 0))
    assert python_of(source("lib", ONE)) == PYTHON
    assert not dead.exists() and young.exists()


def test_where_sources_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RLPATCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "rlpatch" / "sources"
    monkeypatch.setenv("RLPATCH_CACHE", str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own" / "sources"
