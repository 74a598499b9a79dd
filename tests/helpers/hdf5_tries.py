"""Read damaged copies of an HDF5 file, each in a process of its own with a limit of time: HDF5 may crash.

    hdf5_tries.py READER FILE COPY SECONDS FIRST COUNT

READER is one of READERS. COPY is written anew for each of COUNT tries, whose damage follows from its number from FIRST
on. Prints a JSON list of [kind of damage, what came of it]: same, different, refused, hang, crash, or the text of an
error that is not ours or does not name the file.
"""

import hashlib
import json
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from pathlib import Path

from celldetr.runtime.errors import CellDETRError
from celldetr.xenium.celltypes.reference import prepare_reference, read_reference
from celldetr.xenium.output import read_counts

MAPPING = {"CD4": "T", "CD8": "T", "tumour": "Malignant"}
READERS = {
    "raw": lambda path: prepare_reference(path, MAPPING, label_column="kind", cells_per_type=10, seed=1)[0],
    "prepared": read_reference,
    "counts": lambda path: read_counts(path.parent),
}
HEAP = b"GCOL"


def damaged(whole, number):
    """Kind of damage, and the damaged bytes: half of it in the first 4 KiB or behind a heap of texts."""
    draw, content = random.Random(number), bytearray(whole)
    heaps = [at for at in range(0, len(whole), 8) if whole.startswith(HEAP, at)] or [0]
    low = draw.choice([0, 0, *heaps])
    place = draw.choice([draw.randrange(len(whole)), min(len(whole) - 1, low + draw.randrange(4096))])
    kind = draw.choice(["flip", "flips", "zeros", "cut"])
    if kind == "cut":
        return kind, content[:place]
    if kind == "zeros":
        end = min(len(content), place + draw.choice([8, 16, 64, 512, 4096]))
        content[place:end] = bytes(end - place)
    for _ in range({"flip": 1, "flips": 4}.get(kind, 0)):
        content[place] ^= 1 << draw.randrange(8)
        place = draw.randrange(len(whole))
    return kind, content


def digest(table):
    """Hash of all that a reader gives."""
    text = table.obs.to_csv() + table.var.to_csv()
    return hashlib.sha256(table.X.toarray().tobytes() + text.encode(errors="replace")).hexdigest()


def outcome(read, path, whole):
    """Read a file and say what came of it."""
    try:
        return "same" if digest(read(path)) == whole else "different"
    except CellDETRError as error:
        return "refused" if str(path.parent) in str(error) else f"no name in: {error}"
    except BaseException:
        return traceback.format_exc()


def attempt(read, path, whole, seconds):
    """Do so in a process of its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        signal.alarm(seconds)
        os.write(writing, outcome(read, path, whole).encode()[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as said:
        text = said.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return text or ("hang" if status == -signal.SIGALRM else "crash")


def main(reader, file, copy, seconds, first, count):
    """Try all damages."""
    logging.disable()
    warnings.simplefilter("ignore")
    read, content, path = READERS[reader], Path(file).read_bytes(), Path(copy)
    path.write_bytes(content)
    whole, found = digest(read(path)), []
    for number in range(int(first), int(first) + int(count)):
        kind, changed = damaged(content, number)
        path.unlink()
        path.write_bytes(changed)
        found.append([kind, attempt(read, path, whole, int(seconds))])
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
