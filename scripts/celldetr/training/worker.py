"""One of several processes that share a run: python -m celldetr.training.worker RUN (see `processes.launch`)."""

import logging
import os
import pickle
import sys
from pathlib import Path
from types import TracebackType

from torch.distributed.elastic.multiprocessing.errors import record

from celldetr.runtime.errors import CellDETRError
from celldetr.runtime.rule import LOG_VARIABLE, explain
from celldetr.training.loop import Training
from celldetr.training.processes import join_group


@record
def main(path: str) -> None:
    """Train with the other processes; `record` hands an error to the launcher."""
    run = pickle.loads(Path(path).read_bytes())
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if LOG_VARIABLE in os.environ:
        handlers.append(logging.FileHandler(os.environ[LOG_VARIABLE]))
    level = logging.INFO if os.environ["RANK"] == "0" else logging.WARNING
    logging.basicConfig(handlers=handlers, level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if run.accelerator == "cuda" else "cpu"
    try:
        Training(run, device, join_group(device)).fit()
    except Exception as error:
        message = explain(error)
        if message is None or isinstance(error, CellDETRError):
            raise
        raise CellDETRError(message) from error


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unexpected error; the launcher raises the others again."""
    if not isinstance(error, CellDETRError):
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    sys.excepthook = _report
    main(sys.argv[1])
