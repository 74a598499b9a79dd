"""How a rule's script runs: output goes to the rule's log as well; a user's error is printed without a traceback."""

import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from celldetr.errors import CellDETRError


class _Tee:
    """A text stream that writes to the terminal and to the log."""

    def __init__(self, *streams: TextIO) -> None:
        self.streams = streams

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
            stream.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.streams[0].fileno()


def run_rule(main: Callable[[Any], None], snakemake: Any) -> None:
    """Run `main(snakemake)` with stdout and stderr copied to the rule's log.

    A `CellDETRError` ends the process with status 1 and its message alone; any other error keeps its traceback.

    Parameters
    ----------
    main
        The script's work.
    snakemake
        The object that Snakemake gives to a script (`input`, `output`, `params`, `log`, `threads`, `resources`).
    """
    if not snakemake.log:
        _run(main, snakemake)
        return
    path = Path(snakemake.log[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as log:
        terminal = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Tee(terminal[0], log), _Tee(terminal[1], log)
        try:
            _run(main, snakemake)
        finally:
            sys.stdout, sys.stderr = terminal


def _run(main: Callable[[Any], None], snakemake: Any) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    try:
        main(snakemake)
    except CellDETRError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the message is for the user's terminal
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
