"""The README says the truth about every setting, hyperparameter and error code.

`python tests/contract/test_readme.py` rewrites its tables from the code.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from daemon.settings import Settings
from tests.paths import ROOT
from training.events import ErrorCode
from training.spec import Hyperparameters

README = ROOT / "README.md"


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "–"
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _aliases(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []


def settings_table() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        variable = next(iter(_aliases(field)), f"TRAINER_{name.upper()}")
        rows.append(f"| `{variable}` | {_shown(field.default)} | {field.description} |")
    return "\n".join(rows)


def hyperparameters_table() -> str:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in Hyperparameters.model_fields.items():
        spellings = " or ".join(f"`{alias}`" for alias in (_aliases(field) or [name]))
        rows.append(f"| {spellings} | {_shown(field.default)} | {field.description} |")
    return "\n".join(rows)


TABLES = {"settings": settings_table, "hyperparameters": hyperparameters_table}


def _table_in(text: str, name: str) -> re.Match[str]:
    match = re.search(rf"(<!-- {name} -->\n)(.*?)(\n<!-- /{name} -->)", text, re.DOTALL)
    assert match is not None, f"the README has no place for the {name} table"
    return match


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    assert _table_in(README.read_text(), "settings")[2] == settings_table()


def test_every_hyperparameter_stands_in_the_readme_with_both_spellings() -> None:
    assert _table_in(README.read_text(), "hyperparameters")[2] == hyperparameters_table()


def test_every_error_code_stands_in_the_readme() -> None:
    text = README.read_text()
    assert [code for code in ErrorCode if f"`{code}`" not in text] == []


def test_every_field_has_a_description() -> None:
    for model in (Settings, Hyperparameters):
        assert [name for name, field in model.model_fields.items() if not field.description] == []


if __name__ == "__main__":
    text = README.read_text()
    for table, render in TABLES.items():
        place = _table_in(text, table)
        text = text[: place.start()] + place[1] + render() + place[3] + text[place.end() :]
    README.write_text(text)
