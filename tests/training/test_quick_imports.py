"""The libraries are imported without a compiler or garbage collection, and everything is restored afterwards."""

from __future__ import annotations

import gc
import inspect
import os

import pytest
from bitsandbytes.backends.default import ops

from training.quick_imports import quick_imports


def test_bitsandbytes_is_imported_without_the_compiler() -> None:
    # The conftest of these tests imported it this way.
    for function in (ops._dequantize_4bit_compute, ops._dequantize_blockwise_compute):
        assert inspect.getclosurevars(function).nonlocals["compiled_fn"] is function.__wrapped__
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert gc.isenabled() and gc.get_freeze_count() > 100_000


@pytest.mark.parametrize("switch", [None, "0"])
def test_an_import_that_fails_leaves_the_collector_and_torch_s_switch_as_they_were(
    switch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if switch is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", switch)
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled() and os.environ["TORCHDYNAMO_DISABLE"] == "1"
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled() and os.environ.get("TORCHDYNAMO_DISABLE") == switch
