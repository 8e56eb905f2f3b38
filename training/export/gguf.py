"""The export `gguf`: the adapter as a LoRA for llama.cpp, or the whole model with a Modelfile for Ollama beside it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.data.tokenizer import load_tokenizer, stop_tokens
from training.events import ErrorCode
from training.export.gguf_adapter import write_gguf_adapter
from training.export.gguf_file import need_gguf
from training.export.gguf_model import WrittenGguf, family_of, refuse_unknown_type, write_gguf_model
from training.export.merge import merge_adapter
from training.export.modelfile import modelfile
from training.export.orders import OnBytes
from training.failures import TrainingFailed
from training.files.durable_files import beside, put_in_place, sha256_of, write_whole
from training.files.model_folder import CONFIG, ModelFolder, read_config
from training.files.template_options import template_options

FORMS = ("adapter", "merged")
MODELFILE = "Modelfile"
# In a merged folder that was kept: what it was made from.
_WORK = ".work"


def export_gguf(request: Mapping[str, Any], on_bytes: OnBytes) -> dict[str, Any]:
    """Request: base, adapter (folders); into, a new file whose name ends in .gguf, or a new folder; form, one of FORMS,
    and type, one of TYPES, if not the defaults; base_model and base_revision, if known. `merged`, if given, is the
    folder of the merged model; otherwise it is made for the time of the conversion, beside `into`.

    Raises TrainingFailed: invalid_spec, model_unsupported, model_incomplete, disk_full."""
    base, adapter, into = Path(request["base"]), Path(request["adapter"]), Path(request["into"])
    form, name = str(request.get("form") or "adapter"), str(request.get("base_model") or base.name)
    if form not in FORMS:
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC, f"there is no GGUF form {form[:40]!r}", f"choose one of: {', '.join(FORMS)}"
        )
    is_file = into.suffix == ".gguf"
    recipe_file = into.with_suffix(f".{MODELFILE}") if is_file and form == "merged" else None
    _refuse_existing(into, recipe_file)
    if form == "adapter" and request.get("type") not in (None, "f32"):
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC,
            "a GGUF LoRA is written in f32: it is small, and fits a base of any type",
            "leave the type out, or ask for the form merged",
        )
    _remove_leftovers(into)
    with beside(into) as staging:
        file = staging if is_file else staging / ("adapter.gguf" if form == "adapter" else "model.gguf")
        staging.parent.mkdir(parents=True, exist_ok=True)
        if form == "adapter":
            written = write_gguf_adapter(base, adapter, file, name=f"{name} adapter", on_bytes=on_bytes)
        else:
            written = _merged(request, into, file, name, on_bytes)
        recipe = None if form == "adapter" else _recipe(base, adapter, into.name if is_file else file.name)
        if recipe is not None and not is_file:
            write_whole(staging / MODELFILE, recipe)
        # Hours may have passed.
        _refuse_existing(into, recipe_file)
        if recipe is not None and recipe_file is not None:
            write_whole(recipe_file, recipe)
        put_in_place(staging, into)
    return {
        "path": str(into),
        "form": form,
        "file": into.name if is_file else file.name,
        "modelfile": None if recipe is None else MODELFILE if recipe_file is None else recipe_file.name,
        "base_model": name,
        "architecture": written.architecture,
        "type": written.type,
        "tensors": written.tensors,
        "lost_window": written.lost_window,
        "bytes": written.bytes,
    }


def _merged(request: Mapping[str, Any], into: Path, file: Path, name: str, on_bytes: OnBytes) -> WrittenGguf:
    kind = request.get("type")
    if request.get("merged"):
        return write_gguf_model(Path(request["merged"]), file, type_=kind, name=name, on_bytes=on_bytes)
    # Before hours of merging, not after.
    refuse_unknown_type(kind)
    need_gguf()
    base, adapter = Path(request["base"]), Path(request["adapter"])
    if (base / CONFIG).is_file():
        family_of(ModelFolder(base, read_config(base), ()))
    # Under one name for this file: a merge that was interrupted goes on where it stopped.
    folder, fingerprint = into.with_name(f".{into.name}.merged"), _fingerprint(base, adapter)
    if folder.exists() and _work_of(folder) != fingerprint:
        shutil.rmtree(folder)
    try:
        if not folder.exists():
            merge_adapter(
                base,
                adapter,
                folder,
                base_model=request.get("base_model"),
                base_revision=request.get("base_revision"),
                # Two runs over about as many bytes: the bar is half full when the second begins.
                on_bytes=lambda done, total: on_bytes(done, 2 * total),
            )
            write_whole(folder / _WORK, fingerprint)
        written = write_gguf_model(
            folder, file, type_=kind, name=name, on_bytes=lambda done, total: on_bytes(total + done, 2 * total)
        )
    except TrainingFailed:
        # It would fail again, and the folder is as large as the model.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return written


def _remove_leftovers(into: Path) -> None:
    """Removes what exports to this name left when they were killed: up to the size of the model, under hidden names."""
    name = re.compile(rf"\.{{1,2}}{re.escape(into.name)}\.(\d+)\.part(\.\d+\.part)?")
    for path in into.parent.iterdir() if into.parent.is_dir() else ():
        found = name.fullmatch(path.name)
        if found is None or Path("/proc", found[1]).exists():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _work_of(folder: Path) -> str | None:
    """What was merged into a folder that an earlier process left; None if that is not known."""
    file = folder / _WORK
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _fingerprint(base: Path, adapter: Path) -> str:
    """Changes with anything that goes into a merge: the adapter's files, the base model's folder."""
    of_adapter = {file.name: sha256_of(file) for file in adapter.iterdir() if file.is_file()}
    of_base = {
        file.relative_to(base).as_posix(): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in base.rglob("*")
        if file.is_file()
    }
    return hashlib.sha256(json.dumps([of_adapter, of_base], sort_keys=True).encode()).hexdigest()[:12]


def _refuse_existing(into: Path, recipe_file: Path | None) -> None:
    for new in (into, recipe_file):
        if new is not None and (new.exists() or new.is_symlink()):
            raise TrainingFailed(ErrorCode.INVALID_SPEC, f"{new} exists already", "name a new file or folder")


def _recipe(base: Path, adapter: Path, file: str) -> str:
    """With the template that the adapter was trained with, told what the manifest says; the base's own otherwise."""
    model = ModelFolder.of(base)
    tokenizer = load_tokenizer(model)
    template = adapter / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return modelfile(tokenizer, stop_tokens(model), file, options=template_options(adapter))
