"""Get a few members of a large zip archive: over HTTP only their bytes are transferred, not the archive."""

import functools
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import requests
from fsspec.spec import AbstractBufferedFile

from celldetr.fetch.download import check, fetch, local_path, need_space, stop_if_full, undelivered
from celldetr.fetch.http import TransferError, get, retry
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic, held, link_or_copy

log = logging.getLogger(__name__)

_BLOCK = 8 << 20  # bytes per request

Choose = Callable[[Sequence[str]], Sequence[str]]
"""Names in the archive -> names wanted; raises InputError if one that is needed is missing."""


class NoRanges(Exception):
    """The server does not send parts of files."""


def fetch_members(
    urls: Sequence[str],
    destination: str | os.PathLike[str],
    choose: Choose,
    *,
    marker: str,
    size: int | None = None,
    sha256: str | None = None,
) -> Path:
    """Get members of an archive as a folder, complete and verified, from the first source that has them.

    A local archive is verified by `size` and `sha256`. From a server only the members are transferred: the archive
    is verified by its size, each member by its checksum (CRC) in the archive. Members received so far are kept in
    ``.{name}.part`` beside the destination and not requested again. A server that does not send parts of files sends
    the archive. A local folder is linked or copied.

    `urls` are http(s) or file URLs, or local paths, of a zip archive, or local folders; tried in order. The names that
    `choose` gets are relative to the folder that holds the member `marker`. `size` (bytes) and `sha256` are those of
    the archive.

    Raises
    ------
    InputError
        No source delivered, or the disk is full; names each source with its reason.
    """
    final = Path(destination)
    staging = final.with_name(f".{final.name}.part")
    staging.mkdir(parents=True, exist_ok=True)
    with held(staging):
        _from_first(urls, staging, final, choose, marker, size, sha256)
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
    return final


def _from_first(
    urls: Sequence[str], staging: Path, final: Path, choose: Choose, marker: str, size: int | None, sha256: str | None
) -> None:
    failures = []
    for url in urls:
        try:
            local = local_path(url)
            if local is None:
                _from_server(url, staging, choose, marker, size, sha256)
            elif local.is_dir():
                _from_folder(local, staging, choose)
            else:
                check(local, size, sha256, url, final)
                with local.open("rb") as file:
                    _extract(file, staging, choose, marker)
        except Exception as error:  # zipfile and the decompressors raise errors of many kinds for damaged archives
            stop_if_full(error, final)
            known = isinstance(error, InputError | TransferError)
            failures.append(
                f"  {url}: " + (str(error) if known else f"cannot be read ({type(error).__name__}: {error})")
            )
            log.warning("%s", failures[-1].strip())
            continue
        return
    remedy = "Start again (received members are kept), or get the archive by other means and give its path as a source."
    raise undelivered(f"{final}: no source delivered the files", urls, failures, remedy)


def _from_folder(folder: Path, staging: Path, choose: Choose) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in choose(names):
        with atomic(staging / name) as temporary:
            link_or_copy(folder / name, temporary)


def _from_server(url: str, staging: Path, choose: Choose, marker: str, size: int | None, sha256: str | None) -> None:
    try:
        with requests.Session() as session, RemoteFile(url, session) as file:
            if size is not None and file.size != size:
                raise InputError(f"got an archive of {file.size} bytes, expected {size}: another file or version")
            _extract(file, staging, choose, marker)
    except NoRanges:
        log.warning("%s: the server sends whole files only; getting the archive", url)
        archive = fetch([url], staging / ".archive", size=size, sha256=sha256)
        with archive.open("rb") as whole:
            _extract(whole, staging, choose, marker)
        archive.unlink()


def _extract(file: IO[bytes], staging: Path, choose: Choose, marker: str) -> None:
    """Write the wanted members below `staging`, except members that are already there and complete."""
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
        missing = {}
        for name in choose(sorted(inside)):
            info = archive.getinfo(inside[name])
            target = staging / name
            if staging.resolve() not in target.resolve().parents:
                raise InputError(f"the archive has a member {name!r} that would leave its folder; do not use it")
            if not (target.is_file() and target.stat().st_size == info.file_size and _crc(target) == info.CRC):
                missing[target] = info
        need_space(staging, sum(info.file_size for info in missing.values()))
        for target, info in missing.items():
            log.info("%s, %.1f MB", target.name, info.file_size / 1e6)
            with atomic(target) as temporary, archive.open(info) as member, temporary.open("wb") as out:
                shutil.copyfileobj(member, out, _BLOCK)


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


class RemoteFile(AbstractBufferedFile):
    """A file on a server, read in blocks by range requests; raises `NoRanges` if the server does not answer these.

    The buffer is fsspec's, the requests are ours: fsspec's own HTTP file does not repeat a failed request, does not
    notice that the file changes while it is read, and ignores the proxies and certificates of the environment.
    """

    def __init__(self, url: str, session: requests.Session) -> None:
        self._url, self._session = url, session
        self._version: tuple[str | None, int] | None = None
        self._fetch_range(0, 1)
        assert self._version is not None
        super().__init__(None, url, block_size=_BLOCK, size=self._version[1])

    def _fetch_range(self, start: int, end: int) -> bytes:
        return retry(functools.partial(self._request, start, end), self._url)

    def _request(self, start: int, end: int) -> bytes:
        with get(self._url, {"Range": f"bytes={start}-{end - 1}"}, self._session) as response:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or span is None or int(span[1]) != start:
                raise NoRanges
            version = response.headers.get("ETag") or response.headers.get("Last-Modified"), int(span[2])
            if self._version not in (None, version):
                raise InputError("the file on the server changed while it was read; start again")
            self._version = version
            data = response.raw.read(end - start + 1)  # not more, whatever the server sends
        if len(data) != end - start:
            raise TransferError(f"got {len(data)} of {end - start} bytes", again=True)
        return data
