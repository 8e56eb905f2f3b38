"""A script is cut where the server itself cuts it: compared with the server, on scripts made up and on our own."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.schema.migrations import migrations
from daemon.schema.sql_script import split_statements
from tests.postgres import Server


@pytest.mark.parametrize(
    ("script", "statements"),
    [
        ("a; b", ["a", "b"]),
        ("a ';' ; b", ["a ';'", "b"]),
        ("a -- ;\n; b", ["a -- ;", "b"]),
        ("a /* ; */ b;", ["a /* ; */ b"]),
        ("DO $$ x; y $$; z", ["DO $$ x; y $$", "z"]),
        ("DO $a$ x; $$ ; $$ $a$; z", ["DO $a$ x; $$ ; $$ $a$", "z"]),
        ('select "a;b", $1; c', ['select "a;b", $1', "c"]),
        ("-- only words\n", []),
        ("select 'it''s; fine'; b", ["select 'it''s; fine'", "b"]),
        ("a /* /* ; */ ; */ b; c", ["a /* /* ; */ ; */ b", "c"]),
        (r"select E'it\'s; fine'; b", [r"select E'it\'s; fine'", "b"]),
        ("select 1 AS a$b$c; select $1", ["select 1 AS a$b$c", "select $1"]),
        (";;a;;", ["a"]),
        ("/* only words */;", []),
        ("-- of a\na; -- of b\nb", ["-- of a\na", "-- of b\nb"]),
        ("a; 'never closed; b", ["a", "'never closed; b"]),
    ],
)
def test_a_script_is_cut_at_its_own_semicolons_only(script: str, statements: list[str]) -> None:
    assert split_statements(script) == statements


# -- the server as the judge ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def connection(postgres: Server) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with (
        postgres.database() as name,
        psycopg.connect(postgres.dsn(name), autocommit=True, prepare_threshold=None) as connection,
    ):
        yield connection


def answers_of_the_whole(connection: psycopg.Connection[tuple[Any, ...]], script: str) -> list[list[tuple[Any, ...]]]:
    """What the server answers to a script in one message: one list of rows for each statement that it found."""
    cursor = connection.execute(script.encode())
    answers: list[list[tuple[Any, ...]]] = []
    # A script without a statement has one answer, without a status.
    while cursor.statusmessage is not None:
        answers.append(cursor.fetchall() if cursor.description is not None else [])
        if not cursor.nextset():
            break
    return answers


def test_our_own_files_have_as_many_statements_as_the_server_finds(
    connection: psycopg.Connection[tuple[Any, ...]],
) -> None:
    """Also where a file holds what only a parser understands (CREATE RULE, BEGIN ATOMIC): then this fails."""
    local = (resources.files("sql.local") / "supabase.sql").read_text(encoding="utf-8")
    for name, script in [("supabase", local), *((migration.name, migration.sql) for migration in migrations())]:
        assert len(answers_of_the_whole(connection, script)) == len(split_statements(script)), name


# What is special to a lexer, and a letter of each kind.
TEXT = st.text(alphabet="'\"\\$;-/*eE1_ b\n\té", max_size=12)
SPACE = st.text(alphabet=" \n\t", max_size=3)
LINE_COMMENT = TEXT.map(lambda text: "--" + text.replace("\n", "") + "\n")
BLOCK_COMMENT = st.recursive(
    TEXT.map(lambda text: "/*" + text.replace("/", "").replace("*", "") + "*/"),
    lambda inner: st.lists(inner | TEXT.map(lambda text: text.replace("/", "").replace("*", "")), max_size=3).map(
        lambda parts: "/* " + " ".join(parts) + " */"
    ),
    max_leaves=4,
)
GAP = st.lists(SPACE | LINE_COMMENT | BLOCK_COMMENT, max_size=3).map(lambda parts: " " + " ".join(parts) + " ")
PLAIN = TEXT.map(lambda text: "'" + text.replace("'", "''") + "'")
ESCAPED = st.tuples(st.sampled_from("eE"), TEXT).map(
    lambda part: part[0] + "'" + part[1].replace("\\", "\\\\").replace("'", "\\'") + "'"
)
TAG = st.sampled_from(["$$", "$a$", "$_1$", "$é$", "$aa$"])
DOLLAR = (
    st.tuples(TAG, TEXT).filter(lambda part: part[0] not in part[1] + "$").map(lambda part: part[0] + part[1] + part[0])
)
# A string goes on behind a line break, and stays of its kind.
CONTINUED = st.tuples(PLAIN, PLAIN).map("\n ".join) | st.tuples(ESCAPED, ESCAPED).map(
    lambda part: part[0] + " \n\t" + part[1][1:]
)
STRING = PLAIN | ESCAPED | DOLLAR | CONTINUED
QUOTED_NAME = TEXT.filter(bool).map(lambda text: '"' + text.replace('"', '""') + '"')
NAME = QUOTED_NAME | st.sampled_from(["a$b$c", "a$$", "é$a$", "_e", "E", "e1"])
STATEMENT = st.tuples(GAP, STRING, GAP, NAME, GAP).map(
    lambda part: f"{part[0]}SELECT {part[1]}{part[2]}AS {part[3]}{part[4]}"
)
END = st.sampled_from(["", ";", ";;", "; -- end"])
SCRIPT = st.tuples(st.lists(STATEMENT | GAP, max_size=5).map(";".join), END).map("".join)


@settings(max_examples=400, deadline=None)
@given(script=SCRIPT)
def test_the_server_cuts_every_script_as_we_do(connection: psycopg.Connection[tuple[Any, ...]], script: str) -> None:
    # Prepared, a text that holds two statements is refused.
    alone = [connection.execute(part.encode(), prepare=True).fetchall() for part in split_statements(script)]
    assert alone == answers_of_the_whole(connection, script)
