"""Imports the heavy libraries in about two thirds of the time, by skipping work that no job needs.

Standard library only. It changes no result of a job; without it a trainer only starts later.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Context manager: import torch, transformers, peft and trl inside it.

    Garbage collection is off meanwhile: each collection would walk through everything imported so far, a million
    objects that stay. They are frozen at the end, so that later collections skip them too.

    torch.compile's compiler is not loaded either: bitsandbytes marks five functions for it, and loading it takes a
    second, networkx included. With torch's own switch they stay plain functions. They are its fallbacks for devices
    without kernels and for matrices of odd width; a job calls the library's kernels in C++ or CUDA. The switch is read
    when a function is marked: functions marked later, such as a model's own code, are compiled.
    """
    collects, switch = gc.isenabled(), os.environ.get(_NO_COMPILER)
    gc.disable()
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        if switch is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = switch
        gc.freeze()
        if collects:
            gc.enable()
