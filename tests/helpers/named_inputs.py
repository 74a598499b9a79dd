"""Jobs whose inputs are files of the user, as `run_rule` gets them."""

from types import SimpleNamespace


class Files(tuple):
    """Inputs or outputs: paths, which may have names."""

    def get(self, name, default=None):
        return self.named.get(name, default)


def files(**named):
    """Return inputs or outputs by their names."""
    found = Files(map(str, named.values()))
    found.named = {name: str(path) for name, path in named.items()}
    return found


def job_with(folder, *own, **parts):
    """Return a job with a log in a folder; the user calls inputs or outputs `own` my/NAME, in row s of sheet.tsv."""
    given = {name: {"path": f"my/{name}", "place": f"row s, column {name} of sheet.tsv"} for name in own}
    return SimpleNamespace(log=[str(folder / "rule.log")], params=SimpleNamespace(given=given), **parts)
