"""Getting a few members of a large zip archive: over HTTP only their bytes travel, not the whole archive."""

import io
import logging
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import requests
import urllib3

from celldetr.fetch.download import TIMEOUT, fetch
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic

log = logging.getLogger(__name__)

_BLOCK = 8 << 20  # bytes of one request
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}

Choose = Callable[[Sequence[str]], Sequence[str]]
"""Names that there are -> names that are wanted; raises InputError when one that is needed is missing."""


class _NoRanges(Exception):
    """The server does not send parts of files."""


def fetch_members(
    urls: Sequence[str],
    destination: str | os.PathLike[str],
    choose: Choose,
    *,
    marker: str,
    size: int | None = None,
    sha256: str | None = None,
    tries: int = 5,
    pause: float = 2.0,
) -> Path:
    """Get members of an archive as a folder, whole and verified, from the first source that has them.

    A local archive is verified against `size` and `sha256`. From a server only the members travel: each is verified
    against the checksum (CRC) in the archive, the archive by its size. Members that have arrived are kept in
    ``.{name}.part`` beside the destination, and the next call goes on after them. A server that does not send parts of
    files sends the archive. A local folder is linked, or copied.

    Parameters
    ----------
    urls
        http(s) or file URLs, or local paths, of a zip archive, or local folders; tried in order.
    destination
        Folder to write.
    choose
        See `Choose`; names are relative to the folder that holds `marker`.
    marker
        Name of a member in the top folder of the data.
    size, sha256
        Size in bytes and checksum of the archive, if known.
    tries, pause
        As in `celldetr.fetch.download.fetch`.

    Raises
    ------
    InputError
        No source delivered: names each with its reason.
    """
    final = Path(destination)
    staging = final.with_name(f".{final.name}.part")
    staging.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        try:
            local = _local(url)
            if local is not None and local.is_dir():
                _take_folder(local, staging, choose)
            elif local is not None:
                if size is not None or sha256 is not None:
                    fetch([str(local)], staging / ".archive", size=size, sha256=sha256)
                    (staging / ".archive").unlink()
                with local.open("rb") as file:
                    _extract(file, staging, choose, marker)
            else:
                _from_server(url, staging, choose, marker, size, sha256, tries, pause)
        except (InputError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            failures.append(f"  {url}: {error}")
            log.warning("%s: %s", url, error)
            continue
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
        return final
    raise InputError(
        f"{final}: no source delivered the files:\n" + "\n".join(failures) + "\n"
        "Start again later (what has arrived is kept), or get the archive by other means and give its path as a source."
    )


def _local(url: str) -> Path | None:
    parts = urlsplit(url)
    if parts.scheme.startswith("http"):
        return None
    path = Path(unquote(parts.path)) if parts.scheme == "file" else Path(url)
    if not path.exists():
        raise InputError("no such file or folder")
    return path


def _take_folder(folder: Path, staging: Path, choose: Choose) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in choose(names):
        with atomic(staging / name) as temporary:
            try:
                os.link((folder / name).resolve(), temporary)
            except OSError:
                shutil.copyfile(folder / name, temporary)


def _from_server(
    url: str,
    staging: Path,
    choose: Choose,
    marker: str,
    size: int | None,
    sha256: str | None,
    tries: int,
    pause: float,
) -> None:
    try:
        with requests.Session() as session, _HttpFile(session, url, tries, pause) as raw:
            if size is not None and raw.size != size:
                raise InputError(f"got an archive of {raw.size} bytes, expected {size}: another file or version")
            with io.BufferedReader(raw, _BLOCK) as file:
                _extract(file, staging, choose, marker)
    except _NoRanges:
        log.warning("%s: the server sends whole files only; getting the archive", url)
        archive = staging / ".archive"
        fetch([url], archive, size=size, sha256=sha256, tries=tries, pause=pause)
        with archive.open("rb") as file:
            _extract(file, staging, choose, marker)
        archive.unlink()


def _extract(file: io.BufferedIOBase | io.BufferedReader, staging: Path, choose: Choose, marker: str) -> None:
    """Write the wanted members below `staging`; those that are there, whole, are left as they are."""
    with zipfile.ZipFile(file) as archive:
        names = {name.replace("\\", "/"): name for name in archive.namelist() if not name.endswith("/")}
        tops = [PurePosixPath(name).parent for name in names if PurePosixPath(name).name == marker]
        if not tops:
            raise InputError(f"the archive has no {marker}, expected it beside the data; is it the right archive?")
        top = min(tops, key=lambda path: len(path.parts))
        inside = {
            PurePosixPath(name).relative_to(top).as_posix(): member
            for name, member in names.items()
            if PurePosixPath(name).is_relative_to(top)
        }
        for name in choose(sorted(inside)):
            info = archive.getinfo(inside[name])
            target = staging / name
            if staging.resolve() not in target.resolve().parents:
                raise InputError(f"the archive has a member {name!r} that would leave its folder; do not use it")
            if target.is_file() and target.stat().st_size == info.file_size and _crc(target) == info.CRC:
                continue
            log.info("%s, %.1f MB", name, info.file_size / 1e6)
            with atomic(target) as temporary, archive.open(info) as member, temporary.open("wb") as out:
                shutil.copyfileobj(member, out, _BLOCK)


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


class _HttpFile(io.RawIOBase):
    """A file on a server, read by ranges."""

    def __init__(self, session: requests.Session, url: str, tries: int, pause: float) -> None:
        self._session, self._url, self._tries, self._pause = session, url, tries, pause
        self._at = 0
        self._tag: str | None = None
        self.size = 1
        self._range(0, 1)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position of the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Position of the next read."""
        return self._at

    def readinto(self, buffer: object) -> int:
        """Read the next bytes."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        count = min(len(view), self.size - self._at)
        if count <= 0:
            return 0
        view[:count] = self._range(self._at, count)
        self._at += count
        return count

    def _range(self, start: int, count: int) -> bytes:
        for attempt in range(1, self._tries + 1):
            try:
                return self._request(start, count)
            except (requests.RequestException, urllib3.exceptions.HTTPError, _Short) as error:
                if attempt == self._tries:
                    raise InputError(f"the connection failed ({error})") from error
                wait = self._pause * 2 ** (attempt - 1)
                log.warning("%s: %s; try %d of %d in %.0f s", self._url, error, attempt + 1, self._tries, wait)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _request(self, start: int, count: int) -> bytes:
        headers = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        with self._session.get(self._url, headers=headers, timeout=TIMEOUT, stream=True) as response:
            if response.status_code in _TRANSIENT:
                raise _Short(f"HTTP {response.status_code} {response.reason}")
            if response.status_code >= 400:
                raise InputError(f"HTTP {response.status_code} {response.reason}")
            if response.status_code != 206:
                raise _NoRanges
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if self._tag not in (None, tag):
                raise InputError("the file on the server changed while it was read; start again")
            self._tag = tag
            self.size = int(response.headers["Content-Range"].rpartition("/")[2])
            data = response.content
        if len(data) != count:
            raise _Short(f"got {len(data)} of {count} bytes")
        return data


class _Short(Exception):
    """An answer that is worth another try."""
