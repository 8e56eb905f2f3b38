"""How the heavy libraries are imported: without the work that nobody needs, in about two thirds of the time.

Standard library only. Nothing that a job computes depends on it; without it a trainer starts later.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, transformers, peft and trl inside.

    No garbage is collected meanwhile: each collection walks through all that was imported so far, a million objects
    that stay. They are frozen in the end, so that later collections pass them over too.

    Nor is torch.compile's compiler loaded: bitsandbytes marks five functions for it, and that takes a second, networkx
    included. With torch's own switch they stay plain functions. They are its fallbacks for devices without kernels and
    for matrices of odd width; a job calls the library's kernels in C++ or CUDA. The switch is read where a function is
    marked: what is marked later, a model's own code say, is compiled.
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
