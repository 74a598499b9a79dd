"""A Slurm cluster of one node on this machine, with pretended GPUs, for the tests.

It listens on the loopback device alone, has its own munge key, and keeps all its files in one folder, except
`/etc/slurm/slurm.conf` and `gres.conf`: links that `stop` removes. A machine with a Slurm of its own is left alone.
Needs root and Debian's packages: `python3 tests/slurm/cluster.py install` gets those.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ETC = Path("/etc/slurm")
PROGRAMS = {
    "slurm-wlm": ("slurmctld", "slurmd", "sbatch"),
    "munge": ("munged",),
    "slurmdbd": ("slurmdbd",),
    "mariadb-server": ("mariadbd", "mariadb-install-db"),
}
DAEMONS = ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged")
CPUS, MEMORY_MB, GPUS = 64, 400_000, 4  # what the node pretends to have: jobs ask for what the paper needs

SLURM = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=7200
KillWait=30
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={run}/munge.socket
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={run}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""


class ClusterError(Exception):
    """The cluster cannot be had here."""


def missing():
    """Return the packages that are not installed."""
    return [package for package, programs in PROGRAMS.items() if not all(map(_program, programs))]


def _program(name):
    """Find a program; /usr/sbin is not on everyone's path."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def install():
    """Install what is missing with apt-get."""
    packages = missing()
    if not packages:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise ClusterError(f"not installed: {', '.join(packages)}; installing needs root and apt-get")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ClusterError(f"apt-get {' '.join(command)}: {done.stderr[-1000:]}")


def check():
    """Raise a `ClusterError` that says why no cluster can be started here."""
    if os.geteuid():
        raise ClusterError("starting Slurm needs root")
    if packages := missing():
        raise ClusterError(f"not installed: {', '.join(packages)}; see tests/slurm/cluster.py install")
    for name in ("slurm.conf", "gres.conf"):
        if _left_over(ETC / name):
            (ETC / name).unlink()
        elif os.path.lexists(ETC / name):
            raise ClusterError(f"{ETC / name} exists: this machine has a Slurm already")


def _left_over(link):
    """Tell whether a link was left by a cluster of this script that was killed."""
    if not link.is_symlink() or not link.readlink().is_absolute():
        return False
    folder = link.readlink().parent
    if not folder.exists():
        return True
    pid_file = folder / "run" / "slurmctld.pid"
    return (folder / "munge.key").is_file() and not (pid_file.is_file() and _alive(int(pid_file.read_text())))


def start(folder):
    """Start all daemons and wait until the node takes jobs."""
    check()
    folder = Path(folder).absolute()
    run = folder / "run"
    for name in ("state", "spool", "log", "run"):
        (folder / name).mkdir(parents=True, mode=0o755)
    names = ("ctld_port", "d_port", "dbd_port", "sql_port")
    values = dict(zip(names, _free_ports(len(names)), strict=True)) | {
        "folder": folder,
        "run": run,
        "host": socket.gethostname().split(".")[0],
        "cpus": CPUS,
        "memory": MEMORY_MB,
        "gpus": GPUS,
        "password": secrets.token_hex(16),
    }
    _write(folder / "munge.key", secrets.token_bytes(1024))
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n", encoding="utf-8")
    (folder / "slurm.conf").write_text(SLURM.format(**values), encoding="utf-8")
    # a job step of Snakemake's plugin does not inherit SLURM_CONF: the default place must hold the configuration
    ETC.mkdir(exist_ok=True)
    for name in ("slurm.conf", "gres.conf"):
        (ETC / name).symlink_to(folder / name)
    try:
        _start_daemons(folder, run, values)
    except BaseException:
        stop(folder)
        raise


def _start_daemons(folder, run, values):
    _call(
        *("munged", "--force", f"--key-file={folder}/munge.key", f"--socket={run}/munge.socket"),
        *(f"--pid-file={run}/munged.pid", f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/munge.seed"),
    )
    _start_accounting(folder, run, values)
    _call("slurmctld", "-f", folder / "slurm.conf")
    _call("slurmd", "-f", folder / "slurm.conf", "-N", values["host"])
    _wait_for("the node to be idle", lambda: _call("sinfo", "-h", "-o", "%t", check=False).stdout.strip() == "idle")


def _start_accounting(folder, run, values):
    data, port = folder / "mysql", values["sql_port"]
    socket_file = f"--socket={run}/mysql.sock"
    _call(
        *("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"),
        "--auth-root-authentication-method=socket",
    )
    with open(folder / "log" / "mariadbd.log", "w", encoding="utf-8") as log:
        subprocess.Popen(
            [
                *(_program("mariadbd"), "--no-defaults", "--user=root", f"--datadir={data}", socket_file),
                *(f"--pid-file={run}/mariadbd.pid", "--bind-address=127.0.0.1", f"--port={port}"),
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    ping = ("mariadb-admin", "--no-defaults", socket_file, "ping")
    _wait_for("the database", lambda: _call(*ping, check=False).returncode == 0)
    users = "".join(
        f"create user 'slurm'@'{host}' identified by '{values['password']}';grant all on slurm.* to 'slurm'@'{host}';"
        for host in ("127.0.0.1", "localhost")
    )
    _call("mariadb", "--no-defaults", socket_file, "-e", f"create database slurm;{users}")
    _write(folder / "slurmdbd.conf", SLURMDBD.format(**values).encode())
    _call("slurmdbd", environment={"SLURM_CONF": str(folder / "slurm.conf")})
    listed = ("sacctmgr", "-n", "-i", "list", "cluster")
    _wait_for("slurmdbd", lambda: _call(*listed, check=False).returncode == 0)
    for what in (("cluster", "test"), ("account", "test"), ("user", "root", "Account=test")):
        _call("sacctmgr", "-i", "add", *what)


def stop(folder):
    """Cancel all jobs, end all daemons, and remove the links in /etc/slurm; the folder stays."""
    folder = Path(folder).absolute()
    if (folder / "run" / "slurmctld.pid").exists():
        _call("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        _call("scancel", "--user=root", check=False)
        with contextlib.suppress(ClusterError):
            _wait_for("the jobs to end", lambda: not _call("squeue", "-h", check=False).stdout.strip(), 20)
    for daemon in DAEMONS:
        _end(folder / "run" / f"{daemon}.pid")
    for name in ("slurm.conf", "gres.conf"):
        if (ETC / name).is_symlink() and (ETC / name).readlink() == folder / name:
            (ETC / name).unlink()


def _end(pid_file):
    try:
        pid = int(pid_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, ClusterError):
            os.kill(pid, number)
            _wait_for(f"process {pid} to end", lambda: not _alive(pid), 15)
            return


def _alive(pid):
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _call(program, *arguments, check=True, environment=None):
    done = subprocess.run(
        [_program(program), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | (environment or {}),
        timeout=120,
        check=False,
    )
    if check and done.returncode:
        raise ClusterError(f"{program} ended with status {done.returncode}: {done.stdout[-2000:]}")
    return done


def _wait_for(what, condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise ClusterError(f"waited {seconds} s for {what}")
        time.sleep(0.3)


def _write(path, content):
    """Write a file that its owner alone may read."""
    path.touch(mode=0o600)
    path.write_bytes(content)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit(__doc__)
    try:
        install()
    except ClusterError as error:
        sys.exit(f"error: {error}")
