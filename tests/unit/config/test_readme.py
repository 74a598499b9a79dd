"""config/README.md: tables are those of the settings; configurations, sheets and commands in the texts are right."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from settings_tables import README, TABLE, blocks, filled
from snakemake.cli import get_argument_parser

from celldetr.config.classes import ST_TYPES
from celldetr.config.load import load_config
from celldetr.config.sheets import ReferenceRow, XeniumRow, read_sheet
from celldetr.xenium.celltypes.mapping import read_mapping

ROOT = Path(__file__).parents[3]
SNIPPETS = [
    pytest.param(snippet, id=f"{path.parent.name}-{number}")
    for path in (ROOT / "README.md", README)
    for number, snippet in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]


def test_every_key_and_every_column_is_explained():
    text = README.read_text(encoding="utf-8")
    assert sorted(name for _, name, _ in TABLE.findall(text)) == sorted(blocks())
    assert filled(text) == text, "run `make format`"
    assert all(meaning for rows in blocks().values() for *_, meaning in rows)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_configurations_in_the_texts_lie_over_the_paper(snippet):
    given = yaml.safe_load(snippet)
    config = load_config(given, ROOT).to_dict()
    for key, value in given.items():
        if isinstance(value, dict):
            assert set(config[key]) >= {name for name, block in value.items() if block is not None}
        else:
            assert config[key] == value


def commands():
    """All commands of Snakemake in blocks, in lines of text and in comments, without the comment behind them."""
    found = []
    for path in (ROOT / "README.md", README, ROOT / "results" / "README.md", ROOT / "config" / "config.yaml"):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = "\n".join(re.findall(r"```(?:bash|yaml)\n(.*?)```", text, re.DOTALL))
        found += re.findall(r"(?:^|: )(snakemake -[^#\n]*)", blocks, re.MULTILINE)
        found += re.findall(r"`(snakemake -[^`]*)`", text)
    return found


def test_commands_in_the_texts_mean_what_they_say():
    """Options that take lists swallow the targets behind them; without --cores or a profile nothing runs."""
    assert len(commands()) > 12
    for command in commands():
        given = get_argument_parser().parse_args(shlex.split(command)[1:])
        if given.unlock:
            continue
        assert given.cores or given.profile, command
        assert [str(path) for path in given.configfile or []] in ([], ["my.yaml"]), command
        assert given.targets, command
        assert all(re.match(r"all$|all_cells$|TARGET$|results/", name) for name in given.targets), command
        if "resources" in command:
            assert given.resources == {"gpu": 1}


def test_sheets_in_the_texts_hold_the_columns_that_are_needed(tmp_path):
    text = README.read_text(encoding="utf-8")
    samples, references, mapping = re.findall(r"```tsv\n(.*?)```", text, re.DOTALL)
    for name, content in (("s.tsv", samples), ("r.tsv", references), ("m.tsv", mapping)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(read_sheet(tmp_path / "s.tsv", XeniumRow, "sample")) == ["lung_a", "lung_b"]
    assert list(read_sheet(tmp_path / "r.tsv", ReferenceRow, "reference")) == ["atlas"]
    assert set(read_mapping(tmp_path / "m.tsv").values()) == {"T", "-"}
    needed = {name for name, field in XeniumRow.model_fields.items() if field.is_required()}
    assert needed == set(samples.split("\n")[0].split("\t")) - {"he_mpp", "alignment"}
    assert f"The ten types, written like this: {', '.join(ST_TYPES)}." in " ".join(text.split())
