"""Download or copy one raw file: from mirrors, resumed, verified, and under its final name only when complete."""

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
import urllib3

from celldetr.fetch.http import TransferError, get, retry
from celldetr.runtime import provenance
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic, link_or_copy

log = logging.getLogger(__name__)

BLOCK = 1 << 20
_REPORT_SECONDS = 10.0


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

    Parameters
    ----------
    urls
        http(s) or file URLs, or local paths; tried in order.
    destination
        File to write.
    size
        Expected size in bytes.
    sha256
        Expected checksum in hex, or its first digits (at least 8).
    headers
        Sent with each request, e.g. an authorisation; a redirection to another host does not receive that.

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
                check(local, size, sha256)
                with atomic(final) as temporary:
                    link_or_copy(local, temporary)
            else:
                retry(functools.partial(_download, url, part, headers or {}, size, sha256), url)
                os.replace(part, final)
        except TransferError as failure:
            failures.append(f"  {url}: {failure}")
            log.warning("%s: %s", url, failure)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{final}: the disk is full ({final.parent}); free {_mib(size) if size else 'space'} and start again: "
                "the data received so far is kept and continued"
            ) from error
        _forget(part)
        log.info("%s: %s, %s", final.name, _mib(final.stat().st_size), "verified" if size or sha256 else "complete")
        return final
    raise InputError(
        f"{final}: no source delivered the file:\n" + "\n".join(failures) + "\n"
        "Start again later (received data is kept), or get the file by other means and give its path as a source."
    )


def local_path(url: str) -> Path | None:
    """Return the path that a file URL or a path names; None for an http(s) URL."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return None
    return Path(unquote(parts.path)) if parts.scheme == "file" else Path(url)


def check(path: Path, size: int | None, sha256: str | None, *, again: bool = False) -> None:
    """Compare a file with its expected size and SHA-256 (or the first digits), as far as they are given.

    Raises
    ------
    TransferError
        No such file, or another one; `again` says whether another transfer may help.
    """
    if not path.is_file():
        raise TransferError("no such file", again=False)
    got = path.stat().st_size
    if size is not None and got != size:
        raise TransferError(f"got {got} bytes, expected {size}: another file or version", again=again)
    if sha256 is not None and not (found := provenance.sha256(path)).startswith(sha256):
        raise TransferError(
            f"checksum: got sha256 {found}, expected {sha256}; the file is damaged or another version", again=again
        )


def _download(url: str, part: Path, headers: Mapping[str, str], size: int | None, sha256: str | None) -> None:
    """Receive the missing rest of a file and verify it all; a wrong file is removed: the next try starts anew."""
    continued = part.exists()
    _transfer(url, part, headers, size, checked=sha256 is not None)
    try:
        check(part, size, sha256, again=continued)
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
            _check_end(response, part, start)
            return
        start, total = _extent(response, start)
        if size is not None and total not in (None, size):
            raise TransferError(f"got {total} bytes, expected {size}: another file or version", again=False)
        _need_space(part, (total or size or start) - start)
        _state(part).write_text(json.dumps({"source": source, "validator": _validator(response)}), encoding="utf-8")
        try:
            _receive(response, part, start, total)
        except urllib3.exceptions.ProtocolError:
            if total is None:
                raise
    arrived = part.stat().st_size
    if total is not None and arrived < total:
        raise TransferError(f"the transfer ended after {arrived} of {total} bytes", again=True)


def _check_end(response: requests.Response, part: Path, start: int) -> None:
    """Check that the server has nothing left to send because the part is complete; else remove the part."""
    if response.headers.get("Content-Range") != f"bytes */{start}":
        _forget(part)
        raise TransferError("the data received so far belongs to another version of the file", again=True)


def _validator(response: requests.Response) -> str | None:
    """ETag (if strong) or date, by which the server recognises the file when it is asked again."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _extent(response: requests.Response, start: int) -> tuple[int, int | None]:
    """Where the body starts (0 if the server sends the file from the beginning) and the size of the file, if stated."""
    length = response.headers.get("Content-Length")
    if response.status_code == 206:
        span = response.headers.get("Content-Range", "")
        if not span.startswith(f"bytes {start}-"):
            raise TransferError(f"the server answered with the range {span!r}, expected {start}-", again=False)
        whole = span.rpartition("/")[2]
        return start, int(whole) if whole.isdigit() else None
    if start:
        log.warning("the server sends the whole file again (no ranges, or the file changed)")
    return 0, int(length) if length else None


def _receive(response: requests.Response, part: Path, start: int, total: int | None) -> None:
    arrived, reported = start, time.monotonic()
    with part.open("r+b" if start else "wb") as handle:
        handle.seek(start)
        # read1 returns data as it arrives: if the connection breaks, none is lost in a buffer
        while piece := response.raw.read1(BLOCK):
            handle.write(piece)
            arrived += len(piece)
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                log.info("%s%s", _mib(arrived), f" of {_mib(total)}, {100 * arrived / total:.0f} %" if total else "")


def _need_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{_mib(needed)} needed, {_mib(free)} free", str(part))


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
