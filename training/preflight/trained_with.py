"""Says what a run is trained with: every setting as it was resolved, whoever chose it."""

from __future__ import annotations

from typing import Any

from training.data.corpus import Corpus
from training.data.plan import MAX_GRAD_NORM, OPTIMIZER, SCHEDULE, Plan
from training.spec import JobSpec

# Not settings of the training: the model stands beside them, the prompts are told as samples, exports come after it.
_ELSEWHERE = {"base_model", "sample_prompts", "trackers", "exports"}


def trained_with(spec: JobSpec, corpus: Corpus, plan: Plan) -> dict[str, Any]:
    """Returns the settings that are known before the model is loaded, as JSON.

    `packing` and `target_modules` are what was asked; the loaded model decides (the event `adapter_attached`)."""
    chosen = spec.hyperparameters
    return {
        "base_model": spec.base_model,
        "model_revision": spec.model_revision,
        "hyperparameters": {
            **chosen.model_dump(mode="json", exclude=_ELSEWHERE),
            "lora_alpha": chosen.effective_lora_alpha,
            "warmup_steps": plan.warmup_steps,
            "max_length": corpus.max_length,
            "schedule": SCHEDULE,
            "optimizer": OPTIMIZER,
            "max_grad_norm": MAX_GRAD_NORM,
        },
        "compute_type": plan.compute_type,
        "quantization": "nf4" if spec.quantize else None,
        "device": spec.device,
        "num_gpus": spec.num_gpus,
    }
