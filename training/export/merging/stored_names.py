"""Finds the stored tensor that each weight of a model comes from.

Checkpoints are older than the library: it renames tensors while it loads them, and fuses some. An adapter names the
modules of the loaded model; a merged model must have the names of the checkpoint. The library's own rules are applied,
on a model without weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from training.base.architecture import architecture_of
from training.events import ErrorCode
from training.failures import TrainingFailed, in_brief
from training.files.model_folder import ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Origin:
    """Where a stored tensor goes: the model's parameter, and how it is converted on the way (None: it is only renamed).

    `part` tells apart the sources of one conversion: its pattern among the conversion's source patterns."""

    parameter: str
    conversion: WeightConverter | None = None
    part: int = 0


class StoredNames:
    """The library's rules for the names of one model."""

    def __init__(self, folder: ModelFolder, name: str) -> None:
        architecture = architecture_of(folder, name)
        try:
            model: PreTrainedModel = architecture.without_weights()
        except (ValueError, KeyError, ImportError, RuntimeError) as error:
            raise TrainingFailed(
                ErrorCode.MODEL_UNSUPPORTED,
                f"{name} cannot be loaded as a causal language model: {in_brief(error)}",
                "choose a text model that transformers supports without remote code",
            ) from error
        self.model = model
        rules: list[Any] = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._known: dict[str, Any] = model.state_dict()

    def origins(self, stored: Iterable[str]) -> dict[str, Origin]:
        """Maps each stored tensor that the model loads to its origin; what it does not load is left out."""
        found = {}
        for name in stored:
            parameter, pattern = self._renamed(name)
            if parameter in self._known:
                found[name] = self._origin(parameter, pattern)
        return found

    def tied(self) -> dict[str, str]:
        """Maps each parameter that is another one as well to that one's name: output layer to embeddings."""
        self.model.tie_weights()
        first: dict[int, str] = {}
        found = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            kept = first.setdefault(id(parameter), name)
            if kept != name:
                found[name] = kept
        return found

    def _renamed(self, name: str) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        renamed: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, prefix, self._known
        )
        if renamed[0] not in self._known and name in self._known:
            # As the library does: the rules must not take away a name that is right.
            renamed = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=self._known)
        return renamed

    def _origin(self, parameter: str, pattern: str | None) -> Origin:
        if pattern is None:
            return Origin(parameter)
        conversion = next(rule for rule in self._converters if pattern in rule.source_patterns)
        return Origin(parameter, conversion, conversion.source_patterns.index(pattern))
