"""Download or copy one raw file: from mirrors, resumed, verified, and under its final name only when complete."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
import urllib3

from celldetr.fetch.http import TransferError, get, retry
from celldetr.runtime import provenance
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic, held

log = logging.getLogger(__name__)

BLOCK = 1 << 20
_REPORT_SECONDS = 10.0
_TIFF = ("TIFF", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))
_HDF5 = ("HDF5", (b"\x89HDF\r\n\x1a\n",))
_FORMATS = {
    **dict.fromkeys((".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".qptiff", ".btf"), _TIFF),
    **dict.fromkeys((".h5", ".hdf5", ".h5ad"), _HDF5),
    ".zip": ("zip", (b"PK\x03\x04", b"PK\x05\x06")),
    ".parquet": ("Parquet", (b"PAR1",)),
    ".gz": ("gzip", (b"\x1f\x8b",)),
    ".czi": ("CZI", (b"ZISRAWFILE",)),
}
"""Suffix -> format, and what its files begin with."""
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL)


def fetch(
    urls: Sequence[str],
    destination: str | os.PathLike[str],
    *,
    size: int | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Path:
    """Get a file from the first source that has it, complete and verified.

    Received data is kept in ``.{name}.part`` beside the destination, and the next call continues it. With a checksum it
    is continued from any mirror; without one only from the same URL, and only if the server confirms by ETag or date
    that the file has not changed.

    `urls` are http(s) or file URLs, or local paths; tried in order. `size` (bytes) and `sha256` (hex, or its first
    digits, at least 8) are what is expected; without a checksum the first bytes must fit the suffix. `headers` are sent
    with each request, e.g. an authorisation, which a redirection to another host does not receive.

    Raises
    ------
    InputError
        No source delivered the file, or the disk is full; names the file, each source and what to do.
    """
    final = Path(destination)
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(f".{final.name}.part")
    failures = []
    for url in urls:
        try:
            local = local_path(url)
            if local is not None:
                check(local, size, sha256, url, final)
                _link(local, final)
            else:
                with _only_writer(part):
                    retry(functools.partial(_download, url, part, final, headers or {}, size, sha256), url)
                    os.replace(part, final)
        except TransferError as failure:
            failures.append(f"  {url}: {failure}")
            log.warning("%s: %s", url, failure)
            continue
        except OSError as error:
            stop_if_full(error, final)
            raise
        _forget(part)
        log.info("%s: %s, %s", final.name, _mib(final.stat().st_size), "verified" if size or sha256 else "complete")
        return final
    remedy = "Start again later (received data is kept), or get the file by other means and give its path as a source."
    raise undelivered(f"{final}: no source delivered the file", urls, failures, remedy)


def undelivered(problem: str, urls: Sequence[str], failures: Sequence[str], remedy: str) -> InputError:
    """Return the error that names each source with its reason, and the `remedy`; local files have another one."""
    if all("://" not in url or url.startswith("file:") for url in urls):
        remedy = "These are local files: correct their paths in the sheet, or replace them by complete ones."
    return InputError("\n".join([f"{problem}:", *failures, remedy]))


def _link(source: Path, final: Path) -> None:
    """Make a symbolic link: Snakemake gives its outputs a new time, and a hard link would pass that to the user's file.

    All results of other rows with this file would be made again. A relative path stays one: the folder may move.
    """
    if not (final.exists() and not final.is_symlink() and final.samefile(source)):
        with atomic(final) as temporary:
            full = source.resolve()
            temporary.symlink_to(full if source.is_absolute() else os.path.relpath(full, final.parent.resolve()))


@contextlib.contextmanager
def _only_writer(part: Path) -> Iterator[None]:
    part.touch()
    with held(part):
        try:
            yield
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


def local_path(url: str) -> Path | None:
    """Return the path that a file URL or a path names; None for an http(s) URL.

    Raises
    ------
    TransferError
        The URL is not valid.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise TransferError(f"the address is not valid ({error})", again=False) from error
    if parts.scheme in ("http", "https"):
        return None
    if "://" in url and parts.scheme != "file":
        raise TransferError(f"got {parts.scheme}://, expected http(s)://, file:// or a path", again=False)
    return Path(unquote(parts.path)) if parts.scheme == "file" else Path(url)


def check(
    path: Path, size: int | None, sha256: str | None, url: str, destination: Path, *, again: bool = False
) -> None:
    """Compare a file from `url` with its expected size and SHA-256 (or the first digits).

    Without a checksum it must not be a web page, and begin as the suffix of the URL, or else of its destination, says.

    Raises
    ------
    TransferError
        No such file, or another one; `again` says whether another transfer may help.
    """
    if not path.is_file():
        raise TransferError("no such file", again=False)
    got = path.stat().st_size
    if not got:
        raise TransferError("got an empty file (0 bytes)", again=again)
    if size is not None and got != size:
        raise TransferError(f"got {got} bytes, expected {size}: another file or version", again=again)
    if sha256 is None:
        _check_format(path, url, destination)
    elif not (found := provenance.sha256(path)).startswith(sha256):
        raise TransferError(
            f"checksum: got sha256 {found}, expected {sha256}; the file is damaged or another version", again=again
        )


def _check_format(path: Path, url: str, destination: Path) -> None:
    with path.open("rb") as file:
        start = file.read(1024)
    if _PAGE.match(start):
        raise TransferError("got a web page (HTML), not the file; open the address in a browser", again=False)
    suffixes = [Path(urlsplit(url).path).suffix.lower()]
    if destination.suffix != ".tif":  # the name of every slide
        suffixes.append(destination.suffix.lower())
    for suffix in suffixes:
        if suffix in _FORMATS:
            name, beginnings = _FORMATS[suffix]
            if not start.startswith(beginnings):
                raise TransferError(f"got a file that begins with {start[:16]!r}, expected {name}", again=False)
            return


def stop_if_full(error: Exception, final: Path) -> None:
    """Raise an error for people if the disk is full, or the error itself if the memory is: no other source helps.

    Raises
    ------
    InputError
        The disk is full.
    """
    cause = error.__cause__ or error
    if isinstance(cause, MemoryError):
        raise error
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        raise InputError(
            f"{final}: the disk is full ({cause.strerror}); free some space and start again: what has arrived is kept"
        ) from cause


def need_space(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk if fewer bytes are free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{_mib(needed)} needed in {folder}, {_mib(free)} free")


def _download(
    url: str, part: Path, final: Path, headers: Mapping[str, str], size: int | None, sha256: str | None
) -> None:
    """Receive the missing rest of a file and verify it all; a wrong file is removed: the next try starts anew."""
    continued = part.exists()
    _transfer(url, part, headers, size, checked=sha256 is not None)
    try:
        check(part, size, sha256, url, final, again=continued)
    except TransferError:
        _forget(part)
        raise


def _transfer(url: str, part: Path, headers: Mapping[str, str], size: int | None, *, checked: bool) -> None:
    start = part.stat().st_size if part.exists() else 0
    known = _read_state(part)
    source = hashlib.sha256(url.encode()).hexdigest()  # a URL may hold credentials
    validator = known.get("validator") if known.get("source") == source else None
    if (validator is None and not checked) or (size is not None and start > size):
        start = 0  # without a checksum a mix of two files would go unnoticed
    if size is not None and start == size:
        return
    headers = dict(headers)
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    with get(url, headers) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return  # complete
            _forget(part)
            raise TransferError("the data received so far belongs to another version of the file", again=True)
        start, total = _extent(response, start)
        if size is not None and total not in (None, size):
            raise TransferError(f"got {total} bytes, expected {size}: another file or version", again=False)
        need_space(part.parent, (total or size or start) - start)
        tag = response.headers.get("ETag")  # a weak one does not promise the same bytes
        validator = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
        _state(part).write_text(json.dumps({"source": source, "validator": validator}), encoding="utf-8")
        try:
            _receive(response, part, start, total or size)
        except urllib3.exceptions.ProtocolError:
            if total is None:
                raise
    arrived = part.stat().st_size
    if total is not None and arrived < total:
        raise TransferError(f"the transfer ended after {arrived} of {total} bytes", again=True)


def _extent(response: requests.Response, start: int) -> tuple[int, int | None]:
    """Where the body starts (0 if the server sends the file from the beginning) and the size of the file, if stated."""
    if response.status_code == 206:
        span = response.headers.get("Content-Range", "")
        if not span.startswith(f"bytes {start}-"):
            raise TransferError(f"the server answered with the range {span!r}, expected {start}-", again=False)
        return start, _whole(span.rpartition("/")[2])
    if start:
        log.warning("the server sends the whole file again (no ranges, or the file changed)")
    return 0, _whole(response.headers.get("Content-Length", ""))


def _whole(text: str) -> int | None:
    """Read a number of bytes; None if it is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _receive(response: requests.Response, part: Path, start: int, total: int | None) -> None:
    arrived, reported = start, time.monotonic()
    with part.open("r+b" if start else "wb") as handle:
        handle.seek(start)
        # read1 returns data as it arrives: if the connection breaks, none is lost in a buffer
        while piece := response.raw.read1(BLOCK):
            handle.write(piece)
            arrived += len(piece)
            if total is not None and arrived > total:
                raise TransferError(f"got more than the expected {total} bytes: another file or version", again=False)
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                log.info("%s%s", _mib(arrived), f" of {_mib(total)}, {100 * arrived / total:.0f} %" if total else "")


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_state(part: Path) -> dict[str, str | None]:
    try:
        found: dict[str, str | None] = json.loads(_state(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
