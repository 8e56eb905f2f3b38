"""A 4-bit copy of a base model on the volume: written once after the first load, a quarter of the bytes to read later.

It is named by a fingerprint of everything that could change the model: the source files, the settings, the library
versions. Its files are hashed before each use. If anything differs, it is not used but written again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from training.failures import in_brief
from training.files.durable_files import READ_BYTES, beside, put_in_place, sha256_of, sync
from training.files.model_folder import COPY_MANIFEST, ModelFolder, read_header, tensors_in
from training.files.module_names import UNQUANTISED_MODULES
from training.quantization.experts import EXPERTS_FUNCTION, Nf4Config, Nf4Quantizer, expert_states, has_fused_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = 2
_SHARD_BYTES = 2**30
# Never fill the volume completely: checkpoints of running jobs are there, too.
_SPARE_BYTES = 2 * 2**30


# Files that are read at once. More only wait for each other: a volume gives one to two gigabytes a second.
_READERS = 4
# The types that a model and its quantisation are stored in, by safetensors' names.
_TYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


class CopyUnusable(Exception):
    """The copy must not be loaded; the message says why."""


@dataclass(frozen=True)
class QuantizedCopy:
    """Where one model's copy is, or will be. `folder` is the model that it copies."""

    path: Path
    fingerprint: dict[str, Any]
    folder: ModelFolder

    @classmethod
    def of(cls, root: Path, folder: ModelFolder, name: str, dtype: torch.dtype) -> QuantizedCopy:
        fingerprint = _fingerprint(folder, name, dtype)
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        return cls(root / f"{name.replace('/', '--')}-nf4-{digest[:16]}", fingerprint, folder)

    @classmethod
    def kept(cls, folder: ModelFolder, name: str, dtype: torch.dtype) -> QuantizedCopy:
        """Returns the copy whose source weights were deleted; it cannot be compared with them."""
        assert folder.kept_copy is not None
        return cls(folder.kept_copy, _fingerprint(folder, name, dtype), folder)

    @property
    def exists(self) -> bool:
        return self.path.is_dir()

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Builds the model from the copy. Raises CopyUnusable if a file differs from what was written."""
        files = self._files()
        folder = self.folder
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
        settings = Nf4Config(dtype, list(UNQUANTISED_MODULES))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation=EXPERTS_FUNCTION, trust_remote_code=False
            )
        replace_with_bnb_linear(
            model, modules_to_not_convert=list(UNQUANTISED_MODULES), quantization_config=settings, pre_quantized=True
        )
        states: dict[str, dict[str, torch.Tensor]] = {}
        plain: dict[str, torch.Tensor] = {}
        for shard in _read_and_hashed(self.path, files):
            for key, tensor in shard.items():
                kind, path, *part = key.split(":")
                if kind == "state":
                    states.setdefault(path, {})[part[0]] = tensor.to(device)
                else:
                    plain[key] = tensor.to(device)
        for key in list(plain):
            kind, path = key.split(":")
            _put(model, kind, path, plain.pop(key), states.pop(path, None))
        model.tie_weights()
        left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
        if left:
            raise CopyUnusable(f"it lacks {', '.join(left[:5])}")
        if (folder.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder.path)
        quantizer = Nf4Quantizer(settings, pre_quantized=False)
        model.hf_quantizer = quantizer
        model.is_quantized, model.quantization_method = True, settings.quant_method
        quantizer.postprocess_model(model)
        loaded: PreTrainedModel = model.eval()
        return loaded

    def save(self, model: PreTrainedModel) -> bool:
        """Writes the copy to a temporary folder and renames it. False if the volume has no room for it."""
        needed = sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(model))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.path.parent).free < needed + _SPARE_BYTES:
            return False
        with beside(self.path) as staging:
            staging.mkdir()
            files = {}
            for number, shard in enumerate(_shards(model)):
                file = staging / f"weights-{number:05}.safetensors"
                save_file(shard, file)
                files[file.name] = sha256_of(file)
                # Now, while the next shard is made: at the end, all of them would have to be waited for.
                sync(file)
            tensors = {name: list(shape) for name, shape in self.folder.tensors()}
            manifest = {"fingerprint": self.fingerprint, "files": files, "tensors": tensors}
            (staging / COPY_MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
            put_in_place(staging, self.path)
        return True

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _files(self) -> dict[str, str]:
        """Returns the copy's files and their hashes. Raises CopyUnusable if it is not a copy of this model."""
        try:
            manifest: dict[str, Any] = json.loads((self.path / COPY_MANIFEST).read_text(encoding="utf-8"))
            self._compare(manifest["fingerprint"])
            return dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CopyUnusable(f"it cannot be read ({in_brief(error)})") from error

    def _compare(self, written: dict[str, Any]) -> None:
        """Raises CopyUnusable if it was made from other files, with other settings or by other versions."""
        compared = [key for key in self.fingerprint if key != "source" or self.folder.kept_copy is None]
        differing = [key for key in compared if written.get(key) != self.fingerprint[key]]
        if differing:
            short = [key for key in differing if key not in ("source", "config")]
            values = "".join(f"; {key} {written.get(key)}, here {self.fingerprint[key]}" for key in short)
            raise CopyUnusable(f"it was made with other {', '.join(differing)}{values}")


def _read_and_hashed(folder: Path, files: dict[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the tensors of each file, in order. Raises CopyUnusable if one has another hash than `files` says.

    The bytes that are hashed are those that are used: a file is read once, into memory of its own, and whatever
    happens to it afterwards changes nothing. A few files are read and hashed at once, since one core hashes a gigabyte
    in half a second at best, which is slower than a good volume; no more of them than `_READERS` wait in memory.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        waiting = deque[Future[dict[str, torch.Tensor]]]()
        names = iter(files.items())
        for name, expected in islice(names, _READERS):
            waiting.append(readers.submit(_tensors_of, folder / name, expected))
        while waiting:
            shard = waiting.popleft().result()
            for name, expected in islice(names, 1):
                waiting.append(readers.submit(_tensors_of, folder / name, expected))
            yield shard


def _tensors_of(file: Path, expected: str) -> dict[str, torch.Tensor]:
    """Reads a safetensors file into one block of memory, of which the tensors are views."""
    try:
        content = torch.empty(file.stat().st_size, dtype=torch.uint8)
        view = content.numpy().data
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as reader:
            done = 0
            # In pieces that the hash finds in the processor's cache.
            while read := reader.readinto(view[done : done + READ_BYTES]):
                digest.update(view[done : done + read])
                done += read
        if done != len(view) or digest.hexdigest() != expected:
            raise CopyUnusable(f"{file.name} has a different hash than when it was written")
        # The layout of a safetensors file: eight bytes of length, a JSON header of that length, the tensors' bytes.
        begin = 8 + int.from_bytes(view[:8], "little")
        tensors = {}
        for name, entry in tensors_in(json.loads(bytes(view[8:begin]))).items():
            first, end = entry["data_offsets"]
            tensors[name] = content[begin + first : begin + end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    except (OSError, ValueError, KeyError) as error:
        raise CopyUnusable(f"it cannot be read ({in_brief(error)})") from error
    return tensors


def _fingerprint(folder: ModelFolder, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The headers name every tensor, its shape and offset; together with the sizes they identify a checkpoint.

    Contents are not hashed: 160 GB would take minutes at every start, and `models verify` does it once.
    """
    return {
        "format": _FORMAT,
        "model": name,
        "config": hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode()).hexdigest(),
        "source": {
            shard.name: [
                shard.stat().st_size,
                shard.stat().st_mtime_ns,
                hashlib.sha256(json.dumps(read_header(shard), sort_keys=True).encode()).hexdigest(),
            ]
            for shard in folder.shards
        },
        "settings": ["nf4", 64, "double", str(dtype), *UNQUANTISED_MODULES],
        "versions": {library: version(library) for library in ("bitsandbytes", "transformers", "torch")},
    }


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all tensors of the model, by kind and path; buffers too, since loading does not recompute them."""
    for path, parameter in model.named_parameters():
        yield f"parameter:{path}", parameter.detach()
    for path, buffer in model.named_buffers():
        yield f"buffer:{path}", buffer
    for path, module in model.named_modules():
        states = dict(expert_states(module)) if has_fused_experts(module) else {}
        if isinstance(module, bnb.nn.Linear4bit):
            states = {"weight": module.weight.quant_state}
        for name, state in states.items():
            for part, tensor in state.as_dict(packed=True).items():
                yield f"state:{path}.{name}:{part}", tensor


def _shards(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yields tensors on the CPU in shards of about a GiB; never the whole model at once."""
    shard: dict[str, torch.Tensor] = {}
    memories: set[int] = set()
    size = 0
    for key, tensor in _tensors(model):
        there = tensor.to("cpu").contiguous()
        memory = there.untyped_storage().data_ptr()
        # safetensors refuses two names for one memory; anything else can be written without a copy.
        shard[key] = there.clone() if memory in memories else there
        memories.add(memory)
        size += tensor.numel() * tensor.element_size()
        if size >= _SHARD_BYTES:
            yield shard
            shard, memories, size = {}, set(), 0
    if shard:
        yield shard


def _put(model: Any, kind: str, path: str, tensor: torch.Tensor, state: dict[str, torch.Tensor] | None) -> None:
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    if kind == "buffer":
        owner._buffers[name] = tensor
    elif state is None:
        owner._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
    elif isinstance(owner, bnb.nn.Linear4bit):
        owner.weight = bnb.nn.Params4bit.from_prequantized(
            data=tensor, quantized_stats=state, requires_grad=False, device=tensor.device, module=owner
        )
    else:
        expert_states(owner)[name] = QuantState.from_dict(state, device=tensor.device)
        owner._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
