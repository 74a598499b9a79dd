"""A stand-in for conda: makes the environments of envs/ from the packages of the environment that the tests run in.

`python stand_in_conda.py install FOLDER` writes FOLDER/bin/conda and FOLDER/bin/activate; with FOLDER/bin on PATH,
`snakemake --sdm conda` uses them. An environment is a virtual environment that links the distributions that the pip
section of its file pins, at exactly these versions, and nothing else; in the environment of `make baselines`, where
torch is another one (envs/lock-baselines.txt), at that version instead. Snakemake appends its own packages to the
search path of every script; there a guard hides all but Snakemake itself, so that what a file lacks cannot be imported.
"""

import importlib.metadata
import json
import re
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import yaml

SITE = Path(sysconfig.get_path("purelib"))
OTHER = Path(__file__).parents[2] / "envs" / "lock-baselines.txt"
CUDA = re.compile(r"^(nvidia-|triton|cuda-)")  # torch's own business: they are in no file
GUARD = '''
"""Hides the packages of {site} from all but Snakemake."""
import sys
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder


class Guard(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and not name.startswith("snakemake") and not by_snakemake():
            path = own(sys.path)
        return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=DistributionFinder.Context()):
        if by_snakemake():
            return super().find_distributions(context)
        return super().find_distributions(DistributionFinder.Context(name=context.name, path=own(context.path)))


def own(path):
    return [entry for entry in path if str(entry) != {site!r}]  # cv2 adds a folder of its own below


def by_snakemake():
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith({site!r})


sys.meta_path[sys.meta_path.index(PathFinder)] = Guard
'''


def canonical(name):
    """Return the name of a distribution as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(lines):
    """Return canonical name -> version of lines that pin one."""
    found = (re.match(r"([\w.-]+)==([^;\s]+)", line) for line in lines)
    return {canonical(pin[1]): pin[2] for pin in found if pin}


def pins(file):
    """Return canonical name -> version of the pip section of a conda file."""
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return versions(next(item["pip"] for item in content["dependencies"] if isinstance(item, dict)))


def create(file, prefix):
    """Make an environment; a version that is not installed here ends it with an error."""
    there = {canonical(found.metadata["Name"]): found for found in importlib.metadata.distributions(path=[str(SITE)])}
    wanted, other = pins(file), versions(OTHER.read_text(encoding="utf-8").splitlines())
    for name, version in wanted.items():
        got = there[name].version.split("+")[0] if name in there else "none"
        if got not in (version, other.get(name)):
            raise SystemExit(f"{file}: {name}=={version} cannot be had, the test's own environment has {got}")
    chosen = [there[name] for name in [*wanted, *filter(CUDA.match, there if "torch" in wanted else ())]]
    venv.create(prefix, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(prefix), "platbase": str(prefix)}))
    owners = {}
    for name, found in there.items():
        for top in tops(found):
            owners.setdefault(top, set()).add(name)
    for found in chosen:
        link(found, site, owners)
    (site / "stand_in_guard.py").write_text(GUARD.format(site=str(SITE)), encoding="utf-8")
    (site / "stand_in_guard.pth").write_text("import stand_in_guard\n", encoding="utf-8")


def tops(found):
    """Return the names in site-packages that files of a distribution lie below."""
    return {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}


def link(found, site, owners):
    """Link a distribution: folders as a whole, or file by file where several distributions share one."""
    shared = {top for top in tops(found) if len(owners[top]) > 1}
    for top in tops(found) - shared:
        (site / top).symlink_to(SITE / top)
    for path in found.files or ():
        if path.parts[0] in shared:
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            if not (site / path).exists():
                (site / path).symlink_to(SITE / path)


def install(folder):
    """Write the programs that Snakemake looks for."""
    programs = Path(folder) / "bin"
    programs.mkdir(parents=True)
    (programs / "conda").write_text(f'#!/bin/sh\nexec "{sys.executable}" -s "{__file__}" "$@"\n', encoding="utf-8")
    (programs / "conda").chmod(0o755)
    (programs / "activate").write_text('export CONDA_PREFIX="$1" PATH="$1/bin:$PATH"\n', encoding="utf-8")


def main(arguments):
    """Answer a call of conda."""
    words = " ".join(arguments)
    if words == "--version":
        return "conda 25.1.1"
    if words == "info --json":
        prefix = Path(shutil.which("conda")).parents[1]
        return json.dumps({"conda_prefix": str(prefix), "platform": "linux-64"})
    if words.startswith("config --get channel_priority"):
        return json.dumps({"get": {"channel_priority": "strict"}})
    if words.startswith("env create"):
        create(arguments[arguments.index("--file") + 1], arguments[arguments.index("--prefix") + 1])
        return ""
    if words.startswith("clean"):
        return ""
    if words.startswith("install "):
        install(arguments[1])
        return ""
    raise SystemExit(f"the stand-in for conda does not know: {words}")


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1:]) + "\n")
