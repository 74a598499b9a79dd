"""One of several processes that share a run: python -m celldetr.training.child JOB RANK (see `processes`)."""

import json
import logging
import os
import sys
import threading
from pathlib import Path

from celldetr.runtime.rule import explain
from celldetr.training.loop import run_process
from celldetr.training.run import read_run


def main(job: Path, rank: int) -> int:
    """Do the work of one process; an error for people goes into a file for the process that watches."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    try:
        run_process(read_run(job).of_rank(rank))
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        report = {"kind": type(error).__name__, "message": message}
        (job.parent / f"error{rank}.json").write_text(json.dumps(report), encoding="utf-8")
        return 1
    return 0


def _end_with_parent() -> None:
    """Wait until the process that watches is gone: killed, it cannot end this one, which would train on unseen."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
