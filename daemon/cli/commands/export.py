"""Exports an adapter for other servers: merged into its base model, or in the form that a reader needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.commands.jobs import AsJson

if TYPE_CHECKING:
    from daemon.base_model.candidates import ResolvedModel


def export(  # noqa: PLR0917 - what, then each form and its choices, as `--help` shows them
    what: Annotated[str, typer.Argument(metavar="ID|FOLDER", help="A completed job, or an adapter's folder.")],
    merged: Annotated[
        Path | None,
        typer.Option("--merged", metavar="DIR", help="A new folder: the base model with the adapter in it."),
    ] = None,
    transformers4: Annotated[
        Path | None,
        typer.Option(
            "--transformers4", metavar="DIR", help="A new folder: the adapter for transformers 4 and old PEFT."
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A new file for llama.cpp, or for Ollama with a Modelfile; or a new folder."),
    ] = None,
    gguf_form: Annotated[
        str, typer.Option(help="adapter: a LoRA beside a GGUF of the base. merged: the whole model, as for Ollama.")
    ] = "adapter",
    gguf_type: Annotated[
        str | None, typer.Option(help="Of a merged GGUF: f32, f16, bf16 or q8_0; default: as published, 16 bits.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The base model's folder; default: found by its name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export a completed job's adapter for other servers. For a merge the base model must be on this host."""
    from daemon.cli.commands.chat import adapter_folder
    from daemon.cli.errors import Misused

    if merged is None and transformers4 is None and gguf is None:
        raise Misused("nothing was asked for", "say what to export: --merged DIR, --transformers4 DIR, --gguf FILE")
    for new in (merged, transformers4, gguf):
        if new is not None and (new.exists() or new.is_symlink()):
            what_it_is = "folder" if new.is_dir() else "file"
            raise Misused(
                f"the {what_it_is} {new} exists already",
                "name a new file or folder" if new == gguf else "name a new folder",
            )
    asked_for = [_without_dots(new) for new in (merged, transformers4, gguf) if new is not None]
    if len(set(asked_for)) < len(asked_for):
        raise Misused("two exports cannot have one name", "name a folder or file of its own for each")
    if gguf is None and (gguf_form != "adapter" or gguf_type is not None):
        raise Misused("--gguf-form and --gguf-type are choices for --gguf", "add --gguf FILE, or leave them out")
    adapter = adapter_folder(what)
    results = {}
    if transformers4 is not None:
        asked: dict[str, Any] = {"kind": "transformers4", "into": transformers4}
        results["transformers4"] = _run("writing", asked, adapter, None, shown=False)
    base = _base_model(adapter, model) if merged is not None or gguf is not None else None
    if merged is not None:
        results["merged"] = _run("merging", {"kind": "merged", "into": merged}, adapter, base, shown=not as_json)
    if gguf is not None:
        asked = {"kind": "gguf", "into": gguf, "form": gguf_form, "type": gguf_type}
        asked["merged"] = None if merged is None else _without_dots(merged)
        results["gguf"] = _run("writing", asked, adapter, base, shown=not as_json)
    _tell(results, as_json)


def _run(verb: str, asked: dict[str, Any], adapter: Path, base: ResolvedModel | None, *, shown: bool) -> dict[str, Any]:
    """Runs one export and shows its progress."""
    import asyncio

    from daemon.terminal.progress_bar import transfer_bar
    from daemon.trainer.export_process import run_export

    # As people read it: the model card's own commands write to `..`.
    into = _without_dots(Path(asked["into"]))
    request = {**asked, "into": into, "adapter": adapter.absolute()}
    if base is not None:
        request |= {"base": base.path.absolute(), "base_model": base.name, "base_revision": base.revision}
    with transfer_bar(into.name, shown=shown, verb=verb) as on_bytes:
        return asyncio.run(run_export(request, on_bytes))


def _without_dots(new: Path) -> Path:
    return new.parent.resolve() / new.name


def _base_model(adapter: Path, model: Path | None) -> ResolvedModel:
    """Finds the model that the adapter was trained on: by the name in its config, or in the folder given."""
    from daemon.base_model.candidates import ResolvedModel, revision_in
    from daemon.base_model.files import read_marker
    from daemon.cli.commands.chat import base_model_name, find_base_model
    from daemon.cli.errors import CommandFailed, Misused

    if model is None:
        return find_base_model(adapter)
    if not (model / "config.json").is_file():
        raise Misused(f"the folder {model} holds no model: there is no config.json in it")
    marker = read_marker(model)
    try:
        name = base_model_name(adapter)
    except CommandFailed:
        # Made elsewhere; whether it fits is seen from the layers' names and shapes.
        name = model.resolve().name if marker is None else marker.model
    if marker is not None and marker.model != name:
        raise Misused(f"the adapter was trained on {name}, and the folder {model} holds {marker.model}")
    return ResolvedModel(name, model, revision_in(model), "model_path")


def _tell(results: dict[str, Any], as_json: bool) -> None:
    import os

    from daemon.terminal.console import print_json, say, say_done
    from daemon.terminal.format import count, size

    if as_json:
        print_json(results)
        return
    if (folder := results.get("transformers4")) is not None:
        differs = f"{', '.join(folder['changed'])} rewritten" if folder["changed"] else "it opens there as it is"
        say_done(f"{folder['path']} ({size(folder['bytes'])}): the adapter for transformers 4; {differs}")
    if (merged := results.get("merged")) is not None:
        layers = count(merged["merged_tensors"], "layer")
        say_done(f"{merged['path']} ({size(merged['bytes'])}): {merged['base_model']} with {layers} changed")
        if merged["is_dequantised"]:
            say("  only the 4-bit copy of the base is kept here: its weights were unpacked from it, and are not the")
            say(f"  published ones. For those: brightrun-trainer models pull {merged['base_model']}, then export again")
        if not merged["revision_is_known"]:
            say("  nobody noted which revision of the base model it is, here or at training: compare if in doubt")
    if (gguf := results.get("gguf")) is not None:
        about = f"{gguf['type']}, {gguf['architecture']}"
        if gguf["form"] == "adapter":
            say_done(f"{gguf['path']} ({size(gguf['bytes'])}, {about}): a LoRA for a GGUF of {gguf['base_model']}")
            say(f"  llama-server --model BASE.gguf --lora {gguf['path']}")
        else:
            say_done(f"{gguf['path']} ({size(gguf['bytes'])}, {about}): {gguf['base_model']} with the adapter in it")
            say(f"  llama-server --model {gguf['path']}")
            written = Path(gguf["path"])
            folder = written if written.is_dir() else written.parent
            say(f"  ollama create NAME --file {os.path.relpath(folder / gguf['modelfile'])}")
        if gguf["lost_window"] is not None:
            window = f"{gguf['lost_window']:,}"
            say(f"  keep chats under {window} tokens: the model looks back no further than that, and llama.cpp does")
