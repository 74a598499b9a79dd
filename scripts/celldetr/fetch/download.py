"""Getting raw files: from mirrors or local paths, resumed, verified, and never half there under their final name."""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
import urllib3

from celldetr.runtime.errors import InputError

log = logging.getLogger(__name__)

BLOCK = 1 << 20
TIMEOUT = (15, 60)  # seconds to connect, and between two pieces of data
_REPORT_SECONDS = 10.0
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class _Failed(Exception):
    """A source did not deliver; `again` says whether another try may help."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


def fetch(
    urls: Sequence[str],
    destination: str | os.PathLike[str],
    *,
    size: int | None = None,
    sha256: str | None = None,
    tries: int = 5,
    pause: float = 2.0,
    headers: Mapping[str, str] | None = None,
) -> Path:
    """Get a file from the first source that has it, whole and verified.

    What has arrived is kept in ``.{name}.part`` beside the destination, so that the next call continues a broken
    transfer: from any mirror when a checksum is there to catch a mix of different files, else only from the same URL
    and while its ETag or date says that the file is the same.

    Parameters
    ----------
    urls
        http(s) or file URLs, or local paths; tried in order.
    destination
        File to write.
    size
        Expected size in bytes.
    sha256
        Expected checksum in hex, or the first digits of it (at least 8).
    tries
        Transfers tried per source before the next one.
    pause
        Seconds before the second try; doubled for each further one.
    headers
        Sent with each request, e.g. an authorisation, which a redirection to another host does not get.

    Raises
    ------
    InputError
        No source delivered the file, or the disk is full: names the file, each source and what to do.
    """
    final = Path(destination)
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(f".{final.name}.part")
    failures = []
    for url in urls:
        try:
            if urlsplit(url).scheme.startswith("http"):
                whole = _download(url, part, headers or {}, size=size, sha256=sha256, tries=tries, pause=pause)
            else:
                whole = _copy(url, final.with_name(f".{final.name}.copy"), size=size, sha256=sha256)
        except _Failed as failure:
            failures.append(f"  {url}: {failure}")
            log.warning("%s: %s", url, failure)
            continue
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                needed = _mib(size) if size else "space"
                raise InputError(
                    f"{final}: the disk is full ({part.parent}); free {needed} and start again: "
                    "what has arrived is kept and continued"
                ) from error
            raise
        os.replace(whole, final)
        _forget(part)
        log.info("%s: %s, verified", final.name, _mib(final.stat().st_size))
        return final
    raise InputError(
        f"{final}: no source delivered the file:\n" + "\n".join(failures) + "\n"
        "Start again later (what has arrived is kept), or get the file by other means and give its path as a source."
    )


def _download(
    url: str,
    part: Path,
    headers: Mapping[str, str],
    *,
    size: int | None,
    sha256: str | None,
    tries: int,
    pause: float,
) -> Path:
    """Receive and verify a file in several tries; return where it is."""
    for attempt in range(1, tries + 1):
        continued = part.exists()
        try:
            _transfer(url, part, headers, size, checked=sha256 is not None)
            _verify(part, size, sha256, again=continued)
            break
        except _Failed as failure:
            if not failure.again or attempt == tries:
                raise
            wait = pause * 2 ** (attempt - 1)
            log.warning("%s: %s; try %d of %d in %.0f s", url, failure, attempt + 1, tries, wait)
            time.sleep(wait)
    return part


def _copy(url: str, copy: Path, *, size: int | None, sha256: str | None) -> Path:
    """Link or copy a local file and verify it; the original is never written to. Return where it is."""
    source = Path(unquote(urlsplit(url).path)) if url.startswith("file:") else Path(url)
    if not source.is_file():
        raise _Failed("no such file", again=False)
    copy.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), copy)
    except OSError:
        _need_space(copy, source.stat().st_size)
        try:
            shutil.copyfile(source, copy)
        except OSError:
            copy.unlink(missing_ok=True)
            raise
    _verify(copy, size, sha256, again=False)
    return copy


def _transfer(url: str, part: Path, more: Mapping[str, str], size: int | None, *, checked: bool) -> None:
    """Receive what is missing of a file; raises `_Failed` when the transfer ends early."""
    start = part.stat().st_size if part.exists() else 0
    known = _read_state(part)
    validator = known.get("validator") if known.get("url") == url else None
    if validator is None and not checked:
        start = 0  # nothing would notice a mix of two files
    if size is not None and start > size:
        start = 0
    if size is not None and start == size:
        return
    headers = {**more, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    total: int | None = size
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416:
                _check_end(response, part, start)
                return
            start, total = _check_response(response, start)
            if size is not None and total not in (None, size):
                raise _Failed(f"got {total} bytes, expected {size}: another file or version", again=False)
            _need_space(part, (total or size or start) - start)
            _state(part).write_text(json.dumps({"url": url, "validator": _validator(response)}), encoding="utf-8")
            _receive(response, part, start, total)
    except urllib3.exceptions.ProtocolError as error:
        arrived = part.stat().st_size
        raise _Failed(
            f"the transfer ended after {arrived} of {total or 'an unknown number of'} bytes", again=True
        ) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _Failed(f"the connection failed ({error.__class__.__name__}: {error})", again=True) from error
    arrived = part.stat().st_size
    if total is not None and arrived < total:
        raise _Failed(f"the transfer ended after {arrived} of {total} bytes", again=True)


def _check_end(response: requests.Response, part: Path, start: int) -> None:
    """Nothing is left to send: either all has arrived, or what has arrived is of another file and goes."""
    if response.headers.get("Content-Range") != f"bytes */{start}":
        _forget(part)
        raise _Failed("what has arrived is of another version of the file", again=True)


def _validator(response: requests.Response) -> str | None:
    """ETag (if strong) or date: tells whether the file is still the same when it is asked for again."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _check_response(response: requests.Response, start: int) -> tuple[int, int | None]:
    """Where the body continues (0 when the server sends all of it again), and the size of the whole file."""
    if response.status_code >= 400:
        reason = f"HTTP {response.status_code} {response.reason}"
        raise _Failed(reason, again=response.status_code in _TRANSIENT)
    length = response.headers.get("Content-Length")
    if response.status_code == 206:
        span = response.headers.get("Content-Range", "")
        if not span.startswith(f"bytes {start}-"):
            raise _Failed(f"the server answered with the range {span!r}, asked for {start}-", again=False)
        whole = span.rpartition("/")[2]
        return start, int(whole) if whole.isdigit() else None
    if start:
        log.warning("the server sends the whole file again (no ranges, or the file changed)")
    return 0, int(length) if length else None


def _receive(response: requests.Response, part: Path, start: int, total: int | None) -> None:
    arrived, told = start, time.monotonic()
    with part.open("r+b" if start else "wb") as handle:
        handle.seek(start)
        for piece in _pieces(response):
            handle.write(piece)
            arrived += len(piece)
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                of = f" of {_mib(total)}, {100 * arrived / total:.0f} %" if total else ""
                log.info("%s%s", _mib(arrived), of)


def _pieces(response: requests.Response) -> Iterator[bytes]:
    """Yield data as it arrives: when the connection breaks, nothing that has arrived is lost in a buffer."""
    while piece := response.raw.read1(BLOCK):
        yield piece


def _verify(part: Path, size: int | None, sha256: str | None, *, again: bool) -> None:
    """Compare size and checksum; a wrong file is removed, so that the next try starts afresh."""
    got = part.stat().st_size
    if size is not None and got != size:
        _forget(part)
        raise _Failed(f"got {got} bytes, expected {size}: another file or version", again=again)
    if sha256 is None:
        return
    digest = hashlib.sha256()
    with part.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    if not digest.hexdigest().startswith(sha256):
        _forget(part)
        raise _Failed(
            f"checksum: got sha256 {digest.hexdigest()}, expected {sha256}; the file is damaged or another version",
            again=again,
        )


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
