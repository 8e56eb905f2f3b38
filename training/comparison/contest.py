"""The story of a comparison: the base model is loaded once; each adapter is attached, asked, and taken off again.

One adapter at a time, not all side by side: PEFT cannot hold adapters that differ in what they adapt on one model, and
memory need not grow with their number. That the base model is itself again after each is compared, not assumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.adapter.open_adapter import CannotOpen, open_adapter
from training.base.architecture import architecture_of
from training.base.load import load_base_model
from training.comparison.held_out import COMMON, HeldOut, Sets, find_sets
from training.comparison.measuring import Asked, summed_loss
from training.comparison.prompts import Prompt, beginnings, read_prompts, spread
from training.comparison.request import Request
from training.data.chat_template import ChatTemplate
from training.data.template.thinking import Thinking
from training.data.tokenizer import load_tokenizer, stop_tokens
from training.events import ErrorCode
from training.failures import TrainingFailed
from training.files.model_folder import open_model_folder
from training.files.template_options import template_options
from training.json_lines import Say

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

HELD_OUT_PROMPTS = 10


class Contest:
    """One comparison, told line by line."""

    def __init__(self, request: Request, say: Say) -> None:
        self._request = request
        self._say = say

    def run(self) -> None:
        """Raises TrainingFailed."""
        request, say = self._request, self._say
        say({"kind": "stage", "stage": "reading"})
        folder = open_model_folder(request.model_path, request.base_model)
        quantize = request.quantize
        if quantize is None:
            # On a CPU, unpacking 4 bits for every token takes minutes; but there may be nothing else.
            quantize = request.device == "cuda" or folder.kept_copy is not None
        say({"kind": "options", "quantize": quantize})
        context_length = architecture_of(folder, request.base_model).context_length
        tokenizer: Any = load_tokenizer(folder)
        stops = stop_tokens(folder)
        template = ChatTemplate(tokenizer, stops=stops, today=request.today)
        self._sets = find_sets(request, template, context_length, self._note)
        prompts = self._prompts()
        self._ask_as_trained(template)
        self._asked = Asked(request, prompts, tokenizer, template, stops=stops, context_length=context_length)
        self._padding = tokenizer.pad_token_id
        say({"kind": "prompts", "held_out": request.prompts is None, "prompts": list(map(_as_json, prompts))})
        say({"kind": "sets", "sets": _told(self._sets)})

        say({"kind": "stage", "stage": "loading"})
        base = load_base_model(_Loading(request, quantize), folder)
        base.eval()
        itself = _first_logits(base)
        # Each is opened once before anything is asked: a broken one is told at once, not after an hour.
        for place in range(len(request.contestants)):
            base = self._detach(self._attach(base, place), itself)
        self._question(0, base)
        for place in range(len(request.contestants)):
            adapted = self._attach(base, place)
            self._question(place + 1, adapted.get_base_model())
            base = self._detach(adapted, itself)
        say({"kind": "done"})

    def _ask_as_trained(self, template: ChatTemplate) -> None:
        """Gives the template what a server must give it. All are asked alike: the first adapter's way."""
        # Adapters of earlier versions do not say: the template was told nothing then.
        ways = [template_options(contestant.adapter) or {} for contestant in self._request.contestants]
        template.use(Thinking(ways[0]))
        if any(way != ways[0] for way in ways):
            self._note(
                "the adapters were trained on prompts made with different options of the chat template: all are asked "
                f"with those of {self._request.contestants[0].name}"
            )

    def _prompts(self) -> list[Prompt]:
        request = self._request
        if request.prompts is not None:
            given = read_prompts(request.prompts)
            return given if request.most_prompts is None else spread(given, request.most_prompts)
        found = beginnings(self._sets.common.rows)
        if not found:
            raise TrainingFailed(
                ErrorCode.DATASET_INVALID,
                "there is no held-out conversation to ask: "
                + ("none that all jobs have held out" if self._sets.own else _why_none(self._sets)),
                "give prompts with --prompts FILE",
            )
        return spread(found, request.most_prompts or HELD_OUT_PROMPTS)

    def _question(self, who: int, model: PreTrainedModel) -> None:
        """Asks contestant `who`; 0 is the base model."""
        self._say({"kind": "stage", "stage": "answering", "contestant": who})
        for answer in self._asked.answers(model):
            self._say(
                {
                    "kind": "answer",
                    "contestant": who,
                    "prompt": answer.prompt,
                    "text": answer.text,
                    "tokens": answer.tokens,
                    "cut": answer.is_cut,
                }
            )
        measured: dict[str, tuple[float, int]] = {}
        for name, held_out in self._sets_of(who):
            if held_out.digest not in measured:
                self._say({"kind": "stage", "stage": "measuring", "contestant": who})
                measured[held_out.digest] = summed_loss(model, held_out.examples, self._request.device, self._padding)
            summed, tokens = measured[held_out.digest]
            if tokens:
                self._say({"kind": "loss", "contestant": who, "set": name, "loss": summed / tokens, "tokens": tokens})

    def _sets_of(self, who: int) -> list[tuple[str, HeldOut]]:
        """The base model is measured on every set, an adapter on its own and on the common one."""
        own = [(str(place + 1), held_out) for place, held_out in self._sets.own.items() if who in (0, place + 1)]
        return [(COMMON, self._sets.common), *own] if self._sets.common.examples else own

    def _attach(self, base: PreTrainedModel, place: int) -> PeftModel:
        contestant = self._request.contestants[place]
        try:
            return open_adapter(base, contestant.adapter)
        except CannotOpen as error:
            raise TrainingFailed(
                ErrorCode.MODEL_INCOMPLETE,
                f"the adapter {contestant.name} cannot be opened on {self._request.base_model}: {error}",
                "compare adapters of one base model, downloaded whole",
            ) from error

    def _detach(self, adapted: PeftModel, itself: torch.Tensor) -> PreTrainedModel:
        base: PreTrainedModel = adapted.unload()
        if not torch.equal(_first_logits(base), itself):
            raise TrainingFailed(
                ErrorCode.INTERNAL,
                "the base model computes something else after an adapter was taken off",
                "compare one adapter at a time, and report this",
            )
        return base

    def _note(self, message: str) -> None:
        self._say({"kind": "notice", "message": message})


class _Loading:
    """The part of a spec that loading a model reads."""

    def __init__(self, request: Request, quantize: bool) -> None:
        self.base_model = request.base_model
        self.device = request.device
        self.compute_type = request.compute_type
        self.quantize = quantize
        self.quantized_dir: Path | None = request.quantized_dir


def _why_none(sets: Sets) -> str:
    return "no job's held-out data are known" if sets.unknown else "the jobs have held out none"


def _first_logits(model: Any) -> torch.Tensor:
    """Returns what the model says after a fixed text: equal before and after an adapter was attached."""
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(8, device=device)[None], use_cache=False).logits
    return logits.float().cpu()


def _told(sets: Sets) -> list[dict[str, Any]]:
    named = {COMMON: sets.common, **{str(place + 1): held_out for place, held_out in sets.own.items()}}
    return [
        {
            "name": name,
            "conversations": len(held_out.rows),
            "answers": held_out.answers,
            "tokens": held_out.tokens,
            "digest": held_out.digest,
            # Nobody can tell whether these were trained on it.
            "unknown": [place + 1 for place in sets.unknown] if name == COMMON else [],
        }
        for name, held_out in named.items()
        if held_out.examples
    ]


def _as_json(prompt: Prompt) -> dict[str, Any]:
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
    return {"turns": turns, "reference": prompt.reference}
