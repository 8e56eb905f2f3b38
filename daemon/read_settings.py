"""Reads the settings from the environment. Its error messages name the variable and never quote its value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings

from daemon.database.url import DatabaseUrl
from daemon.errors import HostUnfit
from daemon.settings import Settings


def load_settings(**given: Any) -> Settings:
    """Reads the environment; values in `given` take precedence.

    Raises HostUnfit listing every fault, by the variable's name and never by its value."""
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [
            f"  {_variable(item['loc'])}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_input=False, include_context=False)
        ]
        raise HostUnfit("the configuration is not usable:\n" + "\n".join(lines)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise dotenv_unreadable(error) from None


def dotenv_unreadable(error: OSError | UnicodeDecodeError) -> HostUnfit:
    """Returns the error for a .env file that cannot be read; its text is not quoted."""
    why = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
    return HostUnfit(f"the file .env in this folder {why}: correct it, or remove it")


def secrets_of(settings: BaseSettings) -> Iterator[str]:
    """Yields every value that no output may contain, found by its type, so that a new secret cannot be forgotten."""
    for name in type(settings).model_fields:
        yield from _secrets_in(getattr(settings, name))
    # libpq reads this beside DATABASE_URL.
    yield os.environ.get("PGPASSWORD", "")


def _secrets_in(held: object) -> Iterator[str]:
    if isinstance(held, tuple):
        for one in held:
            yield from _secrets_in(one)
    elif isinstance(held, DatabaseUrl):
        yield from held.secrets
    elif isinstance(held, SecretStr):
        yield held.get_secret_value()


def notices_of(settings: BaseSettings) -> tuple[str, ...]:
    """Lists what was left out of a setting, to be logged once."""
    url = getattr(settings, "database_url", None)
    return url.notices if isinstance(url, DatabaseUrl) else ()


def _variable(location: tuple[int | str, ...]) -> str:
    if not location:
        return "settings"
    name = str(location[0])
    return name if name.isupper() else f"TRAINER_{name.upper()}"
