"""Tables of all settings and columns in config/README.md, from the schemas.

`python tests/helpers/settings_tables.py` writes them between the lines ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

import json
import re
from pathlib import Path

from celldetr.config.base import MOST
from celldetr.config.workflow import schemas

README = Path(__file__).parents[2] / "config" / "README.md"
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def kind(prop):
    """Describe the type and the limits of a value."""
    if "enum" in prop:
        return ", ".join(f"`{value}`" for value in prop["enum"])
    if "anyOf" in prop:
        return " or ".join(kind(choice) for choice in prop["anyOf"])
    if "const" in prop:
        return f"`{prop['const']}`"
    if prop["type"] == "array":
        items = prop.get("prefixItems", [])
        return f"list of {len(items)} {TYPES[items[0]['type']]}s" if items else f"list of {kind(prop['items'])}"
    if prop["type"] == "object":
        return "mapping"
    limits = [f"{sign} {prop[name]}" for name, sign in LIMITS.items() if name in prop and prop[name] < MOST]
    return ", ".join([TYPES[prop["type"]], *limits])


def rows(schema, block, prefix=""):
    """Key, type, default and meaning of everything in a block and the blocks inside it."""
    for key, prop in block["properties"].items():
        default = (
            json.dumps(prop["default"]) if "default" in prop else "" if key in block.get("required", ()) else "none"
        )
        choices = [choice for choice in prop.get("anyOf", [prop]) if "$ref" in choice]
        inner = schema["$defs"][choices[0]["$ref"].rpartition("/")[2]] if choices else None
        named = prop.get("additionalProperties") or next(iter(prop.get("patternProperties", {}).values()), {})
        if inner is not None and inner["title"].startswith("Partial"):
            yield f"{prefix}{key}", "mapping", "none", prop["description"]
        elif inner is not None:
            yield from rows(schema, inner, f"{prefix}{key}.")
        elif named and "$ref" in named:
            yield from rows(schema, schema["$defs"][named["$ref"].rpartition("/")[2]], f"{prefix}{key}.NAME.")
        else:
            yield f"{prefix}{key}", kind(prop), default, prop["description"]


def blocks():
    """Rows of the table of each block of the configuration and of each sheet, by name."""
    found = {}
    for name, text in schemas().items():
        schema = json.loads(text)
        if name != "config.schema.json":
            found[name.partition(".")[0] + "_sheet"] = list(rows(schema, schema))
            continue
        for row in rows(schema, schema):
            block, _, key = row[0].partition(".")
            found.setdefault(block if key else "top", []).append((key or block, *row[1:]))
    return found


def table(name):
    """Return the Markdown table of a block or sheet."""
    sheet = name.endswith("_sheet")
    lines = [f"| {'column' if sheet else 'key'} | type | default | meaning |", "|---|---|---|---|"]
    for key, types, default, meaning in blocks()[name]:
        shown = ("required" if not default else "" if sheet else f"`{default}`") if default != "none" else ""
        lines.append(f"| `{key}` | {types} | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"


def filled(text):
    """Return a text with its tables written anew."""
    return TABLE.sub(lambda match: match[1] + table(match[2]) + match[3], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
