"""Loads a mixture of experts in 4 bits: seconds, peak memory, bytes per parameter, compared with their bounds.

    python benchmarks/load_model.py                         4 and 8 layers of the real 80B's dimensions, 32 experts each
    python benchmarks/load_model.py --layers 4 --experts 512    whole layers, if disk and time allow

A checkpoint in the hub's layout (one tensor per expert and projection, bf16) is written to --folder and loaded three
times, each time in a new process: from bf16; from bf16, writing the 4-bit copy; from that copy.

Peaks are what a load adds to a process that has already loaded a tiny model, so that libraries are not counted:
- `peak`: of all resident memory (VmHWM, reset before the load). The bound applies to this one: tensors are read into
  their own memory, so that no page of checkpoint or copy is ever mapped and counted.
- `anonymous`: of the memory that the kernel cannot take back (RssAnon, sampled every 5 ms).
The bound is the memory in use after the load + one layer in bf16 + 0.5 GiB, and 0.53 byte per parameter of the experts.
On a GPU the host's memory is shown beside the GPU's own peak, and the bound applies to the latter. Exit status 1 if a
bound is broken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

_GIB = 2**30
_SPARE_BYTES = _GIB // 2
_MOST_BYTES_PER_PARAMETER = 0.53
# For testing the code alone: a model of a few thousand parameters.
TINY = {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "intermediate_size": 64,
    "vocab_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
WAYS = ("bf16", "bf16, writing the copy", "4-bit copy")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", type=Path, help="where checkpoint and copy are written; removed afterwards")
    arguments = parser.parse_args()
    print(f"{'layers × experts':>18} {'load from':>24} {'s':>7} {'left GiB':>9} {'peak GiB':>9} {'anonymous':>10} "
          f"{'bound GiB':>10} {'bytes/expert parameter':>23}")  # fmt: skip
    broken: list[str] = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
            checkpoint = write_checkpoint(Path(root) / "model", layers=layers, experts=arguments.experts)
            for way in WAYS:
                row = measure(checkpoint, Path(root) / "copies", way, arguments.device)
                if row["peak"] > row["bound"] or row["bytes_per_parameter"] > _MOST_BYTES_PER_PARAMETER:
                    broken.append(f"{layers} layers from {way}")
                print(f"{layers:>9} × {arguments.experts:>6} {way:>24} {row['seconds']:>7.1f} "
                      f"{row['left'] / _GIB:>9.2f} {row['peak'] / _GIB:>9.2f} {row['anonymous'] / _GIB:>10.2f} "
                      f"{row['bound'] / _GIB:>10.2f} {row['bytes_per_parameter']:>23.4f}", flush=True)  # fmt: skip
    if broken:
        sys.exit(f"a bound is broken: {', '.join(broken)}")
    print(f"held: peak at most what is left + a layer in bf16 + 0.5 GiB, experts at most {_MOST_BYTES_PER_PARAMETER} "
          "byte a parameter")  # fmt: skip


def write_checkpoint(folder: Path, *, layers: int, experts: int, **config: Any) -> Path:
    """A model folder in the hub's layout with random numbers. `config` overrides the real 80B's dimensions."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    values = {"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": min(10, experts)}
    settings = Qwen3NextConfig(**{**values, **config, "dtype": "bfloat16", "architectures": ["Qwen3NextForCausalLM"]})
    with torch.device("meta"):
        skeleton = Qwen3NextForCausalLM(settings)
    folder.mkdir(parents=True)
    settings.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    # All tensors are cut from one pool of numbers: drawing billions of them would take minutes.
    pool = torch.empty(1 << 24, dtype=torch.float32).normal_(0, 0.02).bfloat16()
    weight_map: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for path, parameter in skeleton.named_parameters():
        parts = path.split(".")
        shard = f"layer-{int(parts[2]):03}.safetensors" if parts[1] == "layers" else "outside.safetensors"
        for name, shape in _names_on_the_hub(path, parameter.shape):
            shards.setdefault(shard, {})[name] = _cut(pool, shape, len(weight_map))
            weight_map[name] = shard
    for shard in list(shards):
        save_file(shards.pop(shard), folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _names_on_the_hub(path: str, shape: Any) -> list[tuple[str, tuple[int, ...]]]:
    """transformers fuses what the hub stores expert by expert."""
    stem, _, name = path.rpartition(".experts.")
    if name == "gate_up_proj":
        half = (shape[1] // 2, shape[2])
        return [(f"{stem}.experts.{e}.{part}_proj.weight", half) for e in range(shape[0]) for part in ("gate", "up")]
    if name == "down_proj":
        return [(f"{stem}.experts.{e}.down_proj.weight", tuple(shape[1:])) for e in range(shape[0])]
    return [(path, tuple(shape))]


def _cut(pool: Any, shape: tuple[int, ...], number: int) -> Any:
    import math

    import torch

    count = math.prod(shape)
    begin = number * 7919 % max(1, pool.numel() - count)
    long_enough = pool if count < pool.numel() else pool.repeat(count // pool.numel() + 1)
    return torch.clone(long_enough[begin : begin + count] if count < pool.numel() else long_enough[:count]).view(shape)


def measure(checkpoint: Path, copies: Path, way: str, device: str) -> dict[str, float]:
    """One load in a separate process: memory left in use, peaks and bound, in bytes."""
    ended = subprocess.run(
        [sys.executable, __file__, "--child", str(checkpoint), str(copies), way, device],
        stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], check=True, text=True,
    )  # fmt: skip
    row: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return row


def load_once(checkpoint: Path, copies: Path, way: str, device: str) -> dict[str, float]:
    """Loads in this process. The way that uses the copy must come after the one that writes it."""
    from training.quick_imports import quick_imports

    with quick_imports():
        import torch
        from transformers.utils import logging

        from training.base.load import load_base_model
        from training.base.make_quantized_copy import Request
        from training.files.model_folder import open_model_folder
        from training.quantization.experts import expert_states, has_fused_experts

    logging.disable_progress_bar()
    folder = open_model_folder(checkpoint, "measured/model")
    if way == "bf16":
        shutil.rmtree(copies, ignore_errors=True)
    request = Request("measured/model", "cuda" if device == "cuda" else "cpu", None if way == "bf16" else copies)
    with tempfile.TemporaryDirectory() as root:
        tiny = write_checkpoint(Path(root) / "model", layers=1, experts=2, **TINY)
        load_base_model(replace(request, quantized_dir=Path(root) / "copies"), open_model_folder(tiny, "tiny/model"))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with _Memory() as memory:
        began = time.perf_counter()
        model: Any = load_base_model(request, folder)
        seconds = time.perf_counter() - began
    stored = parameters = 0
    for module in (module for module in model.modules() if has_fused_experts(module)):
        for name, state in expert_states(module).items():
            held = (module._parameters[name], state.absmax, state.state2.absmax)
            stored += sum(tensor.numel() * tensor.element_size() for tensor in held)
            parameters += state.shape.numel()
    left = weight_bytes(model)
    layer = max(
        sum(
            2 * (expert_states(module)[name].shape.numel() if name in expert_states(module) else parameter.numel())
            for module in block.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dtype is torch.uint8
        )
        for block in model.model.layers
    )
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory.peak
    return {
        "seconds": seconds,
        "left": left,
        "layer": layer,
        "peak": peak,
        "anonymous": memory.anonymous,
        "bound": left + layer + _SPARE_BYTES,
        "bytes_per_parameter": stored / parameters,
    }


def weight_bytes(model: Any) -> int:
    """Counts the bytes that the model holds: packed weights, their states, weights left in 16 or 32 bits."""
    from training.quantization.disk_copy import _tensors

    return sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(model))


class _Memory:
    """Peaks of this process between entering and leaving, above its memory at the start, in bytes."""

    def __init__(self) -> None:
        self.peak = self.anonymous = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Memory:
        # 5 resets VmHWM to what is resident now (man proc_pid_clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        self._resident, self._began = _status("VmRSS"), _status("RssAnon")
        self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._sampler.join()
        self.peak = _status("VmHWM") - self._resident

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self.anonymous = max(self.anonymous, _status("RssAnon") - self._began)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        print(json.dumps(load_once(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])))
    else:
        main()
