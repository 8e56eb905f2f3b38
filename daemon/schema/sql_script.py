"""Splits an SQL script into statements, as the server's lexer would.

Migrations are applied, recorded and repaired statement by statement. No client library splits scripts: psql has its own
lexer, and the server returns results but not the texts. Semicolons that only a parser recognises as part of a statement
(CREATE RULE … DO (…; …), BEGIN ATOMIC) are not supported; a test compares our files with the server.
"""

from __future__ import annotations

import re

# As in the server's scan.l, with standard_conforming_strings on: any character outside ASCII may be part of a name.
_TOKEN = re.compile(
    r"""
      (?P<nothing> [ \t\n\r\f\v]+ | --[^\n\r]* )
    | (?P<comment> /\* )
      # A backslash escapes in these; and a string goes on behind a line break.
    | [Ee] ' (?: [^'\\] | \\. | '' | '[ \t\f\v]*[\n\r][ \t\n\r\f\v]*' )* '?
      # Two quotes in a row are two strings to us, which is the same.
    | ' [^']* '?
    | " [^"]* "?
    | (?P<dollar> \$ (?: [A-Za-z_\x80-\U0010ffff] [A-Za-z0-9_\x80-\U0010ffff]* )? \$ )
      # A name may hold a dollar, which begins no quote there.
    | [A-Za-z_\x80-\U0010ffff] [A-Za-z0-9_$\x80-\U0010ffff]*
    | (?P<end> ; )
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")


def split_statements(sql: str) -> list[str]:
    """Splits a script at its top-level semicolons; strings, dollar quotes and comments stay whole.

    Comments alone are not a statement; a comment belongs to the statement that follows it."""
    statements: list[str] = []
    start = position = 0
    says_something = False
    while position < len(sql):
        token = _TOKEN.match(sql, position)
        assert token is not None, "the last of the alternatives matches any character"
        position = token.end()
        match token.lastgroup:
            case "nothing":
                continue
            case "comment":
                position = _end_of_comment(sql, position)
                continue
            case "dollar":
                closing = sql.find(token[0], position)
                position = len(sql) if closing == -1 else closing + len(token[0])
            case "end":
                if says_something:
                    statements.append(sql[start : token.start()].strip())
                start, says_something = position, False
                continue
        says_something = True
    return [*statements, sql[start:].strip()] if says_something else statements


def _end_of_comment(sql: str, position: int) -> int:
    """Finds the end of a block comment. Unlike in C, these comments can be nested."""
    depth = 1
    while depth > 0:
        edge = _COMMENT_EDGE.search(sql, position)
        if edge is None:
            return len(sql)
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return position
