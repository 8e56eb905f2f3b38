"""Cuts a script of SQL into its statements, where the server's own lexer would.

A migration is applied, recorded and repaired by the statement, and no client library cuts scripts: psql has its own
lexer, and the server sends back answers but not the texts. Not understood are semicolons inside of a statement that
only a parser knows to be there (CREATE RULE … DO (…; …), BEGIN ATOMIC): a test compares our files with the server.
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
    """Cut a script at its top-level semicolons; strings, dollar quotes and comments are left whole.

    What holds no more than comments is no statement; a comment belongs to the statement that follows it."""
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
    """Comments of this kind are nested, unlike those of C."""
    depth = 1
    while depth > 0:
        edge = _COMMENT_EDGE.search(sql, position)
        if edge is None:
            return len(sql)
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return position
