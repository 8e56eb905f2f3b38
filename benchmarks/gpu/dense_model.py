"""Writes a dense model of Qwen3-1.7B's shape with random weights, for machines that cannot reach a hub.

python benchmarks/gpu/dense_model.py FOLDER          --tiny: a rehearsal's size
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.tiny_models import make_model

# Its config.json on the hub.
_QWEN3_1_7B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 28,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def main() -> None:
    # Random numbers of this many parameters take a minute on a CPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        make_model(Path(sys.argv[1]), "qwen3", **({} if "--tiny" in sys.argv else _QWEN3_1_7B))


if __name__ == "__main__":
    main()
