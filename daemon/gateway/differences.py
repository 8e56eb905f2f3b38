"""What a repeated submit asks for and the job's row does not say. The row is what runs: a submit changes nothing in it.

The older contract's caller inserts a row and then submits the same values, perhaps in the other spelling, with a signed
URL of the row's own dataset. That is no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from daemon.gateway.schemas import Submission
from training.spec import GpuConfig, Hyperparameters, SpecInvalid, parse_row

_SHOWN = 6
_SHOWN_CHARACTERS = 60


def notice_of(submission: Submission, row: Mapping[str, Any]) -> str | None:
    """Returns what to tell the caller and the job's story; None if the submit asks for what the row says.

    `row` has the columns hyperparameters, gpu_config, dataset_url, storage_bucket, storage_path, callback_url."""
    found = [*_of_the_spec(submission, row), *_of_the_addresses(submission, row)]
    if not found:
        return None
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"The job's row differs from what was submitted, and the row is what runs: {', '.join(found[:_SHOWN])}{more}. "
        "Change the row while it is queued, or submit without this job_id for another job."
    )


def _of_the_spec(submission: Submission, row: Mapping[str, Any]) -> Iterator[str]:
    submitted = (submission.hyperparameters, submission.gpu_config)
    if submitted in ((row["hyperparameters"], row["gpu_config"]), ({}, {})):
        return
    try:
        asked = parse_row(*submitted)
    except SpecInvalid as invalid:
        yield from (f"the submitted {fault.field} is not valid" for fault in invalid.faults)
        return
    try:
        written = parse_row(row["hyperparameters"], row["gpu_config"])
    except SpecInvalid:
        # Its attempt will name every fault.
        yield "the row's values are not valid"
        return
    pairs: tuple[tuple[Hyperparameters, Hyperparameters] | tuple[GpuConfig, GpuConfig], ...] = (
        (asked.hyperparameters, written.hyperparameters),
        (asked.gpu_config, written.gpu_config),
    )
    for wish, truth in pairs:
        for name in sorted(wish.model_fields_set):
            values = [_value(model, name) for model in (wish, truth)]
            if values[0] is not None and values[0] != values[1]:
                yield f"{name} is {_shown(values[1])} there, not {_shown(values[0])}"


def _value(model: Hyperparameters | GpuConfig, name: str) -> Any:
    if isinstance(model, Hyperparameters) and name == "lora_alpha":
        return model.effective_lora_alpha
    value = getattr(model, name)
    return value.lower() if name == "gpu_type" and isinstance(value, str) else value


def _shown(value: Any) -> str:
    text = "the default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _of_the_addresses(submission: Submission, row: Mapping[str, Any]) -> Iterator[str]:
    # By name only: a URL may hold a signature.
    if submission.dataset_url is not None and not _is_same_file(submission.dataset_url, row):
        yield "dataset_url is another file"
    if submission.callback_url is not None and submission.callback_url != row["callback_url"]:
        yield "callback_url is another one" if row["callback_url"] else "it has no callback_url"


def _is_same_file(url: str, row: Mapping[str, Any]) -> bool:
    """Without the query, which holds a signature that is new each time."""
    if row["dataset_url"] is not None:
        return _place(url) == _place(row["dataset_url"])
    stored = f"/{row['storage_bucket']}/{row['storage_path']}"
    return row["storage_path"] is not None and unquote(_place(url)).endswith(stored)


def _place(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return f"{parts.scheme.lower()}://{parts.netloc.lower()}{parts.path}"
