"""config/README.md: its tables are those of the settings, and the configurations in the texts are valid."""

import re
from pathlib import Path

import pytest
import yaml
from settings_tables import README, TABLE, blocks, filled

from celldetr.config.load import load_config

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
