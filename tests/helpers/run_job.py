"""Run a rule's script with what Snakemake gave to it, once per fault, each in a process of its own.

    run_job.py JOB REPORT FAULT...

    none               no fault
    kill_change=SHARE  SIGKILL before a change of the file system (a file opened for writing, a rename, a removal, a new
                       folder), after this share of the changes of the first attempt
    kill_seconds=SHARE SIGKILL after this share of the time of the first attempt
    kill_worker        SIGKILL of the first process that the script starts
    file_bytes=N       no file may grow beyond N bytes
    more_memory=N      the process may allocate N bytes more than its imports; if it hangs, it prints where after
                       WAIT_SECONDS and ends with status 1

The outputs are removed before each attempt, as Snakemake does. The report is a JSON list of: fault, status, changes,
seconds, text (all output), outputs (path -> checksum, or null if missing).
"""

import faulthandler
import hashlib
import json
import os
import pickle
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STAMP = ".snakemake_timestamp"  # Snakemake's own, in folders
TIMES = ("started", "written", "wall_seconds")
WAIT_SECONDS = 60


def checksum(path):
    """SHA-256 of an output without its times; of a folder, over the names and contents of its files."""
    path = Path(path)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    inside = sorted(file for file in path.rglob("*") if file.is_file() and file.name != STAMP)
    for file in inside if path.is_dir() else [path]:
        digest.update(file.relative_to(path).as_posix().encode())
        content = file.read_bytes()
        if file.name.endswith("provenance.json"):
            record = json.loads(content)
            content = json.dumps({name: value for name, value in record.items() if name not in TIMES}).encode()
        digest.update(content)
    return digest.hexdigest()


class Changes:
    """Audit hook that counts changes below the working folder and can kill the process before one of them."""

    def __init__(self, kill_at):
        self.kill_at, self.count, self.root = kill_at, 0, os.getcwd()

    def __call__(self, event, arguments):
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & WRITING:
                return
        elif event not in CHANGES:
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or not os.path.abspath(path).startswith(self.root):
            return
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def child(job, script, fault, amount, count):
    """Run the script; never returns."""
    changes = Changes(amount if fault == "kill_change" else None)
    if fault == "file_bytes":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (amount, amount))
    if fault == "more_memory":
        faulthandler.dump_traceback_later(WAIT_SECONDS, exit=True)  # its thread starts before the limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + amount
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.addaudithook(changes)
    status = 0
    try:
        runpy.run_path(script, init_globals={"snakemake": job})
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        status = 99
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(count, str(changes.count).encode())
        os._exit(status)


def kill_worker(process):
    """Kill the first process that a process starts, as the kernel does when memory is used up."""
    children = Path(f"/proc/{process}/task/{process}/children")
    while not (started := children.read_text().split()):
        time.sleep(0.01)
    os.kill(int(started[0]), signal.SIGKILL)


def attempt(job, script, fault, first):
    """Run the script in a child process under a fault and describe the result. `first` is the first attempt."""
    for output in map(Path, job.output):
        if output.is_dir():
            shutil.rmtree(output)
        elif output.exists():
            output.unlink()
        output.parent.mkdir(parents=True, exist_ok=True)
    name, _, given = fault.partition("=")
    amount = float(given or 0)
    if name == "kill_change":
        amount = max(1, round(amount * first["changes"]))
    elif name == "kill_seconds":
        amount *= first["seconds"]
    with tempfile.TemporaryFile() as text, tempfile.TemporaryFile() as count:
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            os.dup2(text.fileno(), 1)
            os.dup2(text.fileno(), 2)
            child(job, script, name, int(amount), count.fileno())
        if name == "kill_seconds":
            time.sleep(amount)
            os.kill(process, signal.SIGKILL)
        if name == "kill_worker":
            kill_worker(process)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        text.seek(0)
        count.seek(0)
        return {
            "fault": fault,
            "status": status,
            "changes": int(count.read() or 0),
            "seconds": time.monotonic() - start,
            "text": text.read().decode(errors="replace"),
            "outputs": {str(output): checksum(output) for output in job.output},
        }


def main(job_file, report, *faults):
    """Import the script once, then run it in a fork per fault."""
    job = pickle.loads(Path(job_file).read_bytes())
    script = str(Path(os.environ["PYTHONPATH"]) / job.script)
    runpy.run_path(script)
    attempts = []
    for fault in faults:
        attempts.append(attempt(job, script, fault, attempts[0] if attempts else None))
    Path(report).write_text(json.dumps(attempts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
