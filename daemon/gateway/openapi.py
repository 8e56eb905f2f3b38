"""Serves `/docs`: the gateway's OpenAPI description as one page of plain HTML.

FastAPI's own page loads its script and style from a public CDN. A private network cannot reach that, and the script
would run in the browser of a user with a key. This page uses no script and no other host.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

# Makes the browser enforce that.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

STYLE = """
:root { color-scheme: light dark; --soft: #8884; --accent: light-dark(#0a58ca, #7ab7ff); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 2rem 1rem 6rem; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; text-transform: capitalize }
a { color: var(--accent) } code, pre { font: 0.9em/1.5 ui-monospace, monospace }
details { border: 1px solid var(--soft); border-radius: .5rem; margin: .5rem 0; padding: .5rem .8rem }
summary { cursor: pointer } summary b { color: var(--accent); display: inline-block; min-width: 3.2rem }
summary span { opacity: .75; margin-left: .6rem } pre { background: var(--soft); border-radius: .4rem; padding: .7rem }
pre { overflow-x: auto } table { border-collapse: collapse; width: 100% } h4 { margin: 1rem 0 .2rem }
td, th { border-bottom: 1px solid var(--soft); padding: .25rem .6rem .25rem 0; text-align: left; vertical-align: top }
"""

# The value that an example shows for each type.
_EXAMPLES: Mapping[str, Any] = {"string": "…", "integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}


def add_docs(app: FastAPI) -> None:
    """Serves the page for all routes of `app`, including later ones; it is rendered at the first request."""

    @cache
    def page() -> str:
        return render_page(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(), headers={"Content-Security-Policy": POLICY})


def render_page(description: Mapping[str, Any]) -> str:
    """Renders one OpenAPI document as HTML."""
    info = description["info"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{escape(info['title'])}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])}</h1><p>{_prose(info.get('description', ''))}</p>",
        "<p>Send <code>Authorization: Bearer KEY</code> where a lock is shown. ",
        "The same as a document for programs: <a href='openapi.json'>openapi.json</a>.</p>",
    ]
    for tag, operations in _by_tag(description).items():
        parts.append(f"<h2>{escape(tag)}</h2>")
        parts += [_operation(description, *operation) for operation in operations]
    parts.append(f"<h2>Shapes</h2>{''.join(_shapes(description))}</body></html>")
    return "\n".join(parts)


Operation = tuple[str, str, Mapping[str, Any]]


def _by_tag(description: Mapping[str, Any]) -> dict[str, list[Operation]]:
    found: dict[str, list[Operation]] = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            found.setdefault(operation.get("tags", ["other"])[0], []).append((path, method, operation))
    return found


def _operation(description: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    locked = " 🔒" if operation.get("security") else ""
    says = operation.get("description", operation.get("summary", ""))
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    return "".join(
        [
            f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code>{locked}",
            f"<span>{_prose(says)}</span></summary>",
            _parameters(operation.get("parameters", ())),
            f"<h4>Body: {_type(body)}</h4>" if body else "",
            f"<h4>Try it</h4><pre>{escape(_curl(description, path, method, body, bool(locked)))}</pre>",
            "<h4>Answers</h4><table>",
            *(
                f"<tr><td>{escape(status)}</td><td>{escape(answer['description'])}</td><td>{_answer_type(answer)}</td></tr>"
                for status, answer in sorted(operation["responses"].items())
            ),
            "</table></details>",
        ]
    )


def _parameters(parameters: Sequence[Mapping[str, Any]]) -> str:
    if not parameters:
        return ""
    rows = (
        f"<tr><td><code>{escape(one['name'])}</code></td><td>{escape(one['in'])}</td><td>{_type(one['schema'])}</td>"
        f"<td>{escape(one.get('description', ''))}</td></tr>"
        for one in parameters
    )
    return f"<h4>Parameters</h4><table>{''.join(rows)}</table>"


def _answer_type(answer: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{_type(content.get('schema', {}))} <small>{escape(kind)}</small>"
        for kind, content in answer.get("content", {}).items()
    )


def _curl(description: Mapping[str, Any], path: str, method: str, body: Mapping[str, Any] | None, locked: bool) -> str:
    lines = [f"curl -X {method.upper()} $BASE{path.replace('{', '$').replace('}', '')}"]
    if locked:
        lines.append("  -H 'Authorization: Bearer KEY'")
    if body is not None:
        lines.append(f"  --json '{json.dumps(_example(description, body), ensure_ascii=False)}'")
    return " \\\n".join(lines)


def _shapes(description: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in sorted(description.get("components", {}).get("schemas", {}).items()):
        needed = schema.get("required", ())
        says = _prose(schema.get("description", ""))
        yield f"<details id='{escape(name)}'><summary><b>{escape(name)}</b><span>{says}</span></summary><table>"
        for field, kind in schema.get("properties", {}).items():
            yield (
                f"<tr><td><code>{escape(field)}</code>{'' if field in needed else ' <small>optional</small>'}</td>"
                f"<td>{_type(kind)}</td><td>{_prose(kind.get('description', ''))}</td></tr>"
            )
        yield "</table></details>"


def _type(schema: Mapping[str, Any]) -> str:
    """Describes a schema in a few words, with a link if it has a name."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(_type(one) for one in schema[several])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    limits = [
        f"{word} {schema[key]}"
        for key, word in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
            ("maxLength", "characters ≤"),
        )
        if key in schema
    ]
    return escape(" ".join([str(schema.get("format", schema.get("type", "any"))), *limits]))


def _example(description: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
    """The smallest body of this schema: its required fields."""
    if "$ref" in schema:
        named = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return _example(description, named)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return _example(description, schema[several][0])
    if "examples" in schema or "default" in schema:
        return schema.get("examples", [schema.get("default")])[0]
    if "properties" in schema:
        return {name: _example(description, schema["properties"][name]) for name in schema.get("required", ())}
    return _EXAMPLES.get(schema.get("type", "object"))


def _prose(text: str) -> str:
    """Renders text on one line, with `code` marked up."""
    pieces = escape(" ".join(text.split())).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
