"""What an adapter's config asks of PEFT when somebody opens it. Without torch, so that the daemon may ask as well."""

from __future__ import annotations

from collections.abc import Mapping

# The oldest PEFT that our adapters were opened with.
_OLDEST = "0.12"
# The keys of a LoRA config that came later, with the first version that opens such an adapter as it was trained.
_SINCE: Mapping[str, str] = {
    # Earlier ones raise "unexpected keyword argument".
    "exclude_modules": "0.14",
    # Before 0.17 it is ignored; up to 0.18.0 a name was not matched as a whole.
    "target_parameters": "0.18.1",
}


def peft_floor(config: Mapping[str, object]) -> str:
    """Returns the oldest version of PEFT that opens an adapter with this `adapter_config.json` as it was trained."""
    needed = [since for key, since in _SINCE.items() if config.get(key)]
    return max([_OLDEST, *needed], key=lambda version: tuple(map(int, version.split("."))))
