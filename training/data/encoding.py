"""Encodes all conversations, names those that cannot be trained on, and says meanwhile how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from training.data.chat_template import ChatTemplate, Encoded
from training.data.formats.conversation import Conversation
from training.data.formats.faults import invalid, list_faults
from training.data.template.rendering import CannotEncode, TemplateRefuses

# Called with the number of conversations that are encoded, and of all.
Tick = Callable[[int, int], None]
_TICK_SECONDS = 5.0


def encode(
    conversations: Sequence[Conversation], template: ChatTemplate, most_tokens: int, tick: Tick
) -> list[Encoded]:
    """Encodes each. Raises TrainingFailed(dataset_invalid) naming those that cannot be trained on, and why."""
    encoded, faults = [], []
    refused = False
    told = time.monotonic()
    for done, conversation in enumerate(conversations):
        if time.monotonic() - told >= _TICK_SECONDS:
            told = time.monotonic()
            tick(done, len(conversations))
        try:
            encoded.append(template.encode(conversation, most_tokens))
        except CannotEncode as error:
            faults.append((conversation.place, str(error)))
            refused = refused or isinstance(error, TemplateRefuses)
    if faults:
        raise invalid(
            f"{len(faults)} conversations cannot be trained on with this model: {list_faults(faults)}",
            "let user and assistant alternate, beginning with the user"
            if refused
            else "correct or remove the named conversations, or choose another base model",
        )
    return encoded
