"""Pushes a completed job's adapter to the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.commands.jobs import AsJson, JobId

if TYPE_CHECKING:
    from daemon.settings import Settings


def push(
    job: JobId,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; it is made if needed.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public, or push to one that is.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what is there from elsewhere.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push a completed job's adapter to the Hugging Face hub, with your own HF_TOKEN or login."""
    import asyncio
    import tempfile
    from pathlib import Path

    from daemon.cli.commands.adapters import completed_job, fetch_adapter
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.queries import find_job
    from daemon.cli.errors import CommandFailed, Misused
    from daemon.errors import JobDelayed
    from daemon.read_settings import load_settings
    from daemon.serving.hub_upload import Push
    from daemon.serving.push import push_adapter
    from daemon.terminal.console import console, print_json, say_done
    from daemon.terminal.format import size
    from training.spec import is_hub_repository

    if not is_hub_repository(repository):
        raise Misused(f"the hub has no repository named {repository!r}", "name it OWNER/NAME")
    with open_database() as connection:
        job_id = find_job(connection, job)
        row, details = completed_job(connection, job_id)
    token = _own_token(load_settings())
    with tempfile.TemporaryDirectory(prefix="brightrun-push-") as scratch:
        folder = Path(scratch) / "adapter"
        with console(stderr=True).status(f"fetching {size(details.adapter_bytes)} …"):
            fetch_adapter(row, details, folder)
        order = Push(
            repository, str(folder), str(job_id), str(details.adapter_sha256), token, public=public, replace=replace
        )
        with console(stderr=True).status(f"pushing to {repository} …"):
            try:
                result = asyncio.run(push_adapter(order))
            except JobDelayed as error:
                # A delivery is tried again by a host; this is not.
                raise CommandFailed(error.message, "nothing was lost: run this command again later") from error
    if as_json:
        print_json({"job_id": job_id, **result})
        return
    kind = "private" if result["private"] else "public"
    say_done(
        f"{result['url']} ({kind})" if result["changed"] else f"{result['url']} ({kind}) holds this adapter already"
    )
    if public and result["private"]:
        from daemon.terminal.console import say

        say("  it was there and is private: publish it in its settings on the hub")


def _own_token(settings: Settings) -> str:
    """The caller's token: HF_TOKEN, else what `hf auth login` has kept. Raises CommandFailed if there is none."""
    if settings.hf_token is not None:
        return settings.hf_token.get_secret_value()
    from huggingface_hub import get_token

    from daemon.cli.errors import CommandFailed

    token = get_token()
    if token is None:
        raise CommandFailed("you have no token for the hub", "set HF_TOKEN, or run `hf auth login`")
    return token
