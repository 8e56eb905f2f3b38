"""Proves kernels that are stand-ins, once for each fault that they are told to have. Prints the verdicts as JSON.

transformers chooses its kernels when it is imported: a process of its own has them.
"""

from __future__ import annotations

import json
import os
import sys

from tests.paths import DOUBLES

sys.path.insert(0, str(DOUBLES / "linear_attention"))

from training.preflight import kernel_proof


def main() -> None:
    # Qwen3-Next's own heads take a CPU seconds.
    kernel_proof._KEY_HEADS, kernel_proof._VALUE_HEADS, kernel_proof._HEAD_SIZE = 1, 2, 16
    found: dict[str, str | None] = {}
    for fault in sys.argv[1:]:
        os.environ["KERNEL_FAULT"] = fault
        try:
            found[fault] = kernel_proof.fault_of_linear_attention("cpu")
        except Exception as error:  # noqa: BLE001 - whatever it raises is the answer
            found[fault] = f"raised {type(error).__name__}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
