"""Whether a job's adapter could be served by the endpoint: asked before it is trained, and again before it is served.

An endpoint does not say for itself what it can take: vLLM lists its base model, and nothing of rank or modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from daemon.serving.endpoint_api import Endpoint, EndpointError, ServedModel
from daemon.settings import Settings
from training.files.vllm_ranks import smallest_max_lora_rank
from training.spec import Hyperparameters


async def misfits(
    settings: Settings, base_model: str, asked: Hyperparameters, modules: Iterable[str] = ()
) -> tuple[str, ...]:
    """Returns each reason why the endpoint could not serve an adapter of this job; none if none is known.

    An endpoint that does not answer now is no reason. `modules`: what is adapted, if it is known."""
    found = list(misfits_by_settings(settings, asked.lora_rank, [*(asked.target_modules or ()), *modules]))
    if settings.endpoint_dir is None and asked.push_to_hub is None:
        found.append("the endpoint takes adapters from the hub, and the job names no push_to_hub")
    try:
        async with Endpoint(settings) as endpoint:
            served = await endpoint.models()
    except EndpointError:
        return tuple(found)
    if served_base(settings, served, base_model) is None:
        found.append(not_served(served, base_model))
    return tuple(found)


def served_base(settings: Settings, served: Sequence[ServedModel], base_model: str) -> ServedModel | None:
    """Returns the endpoint's line for this base model: by its name on the hub, or by the folder it was loaded from."""
    bases = [model for model in served if model.parent is None]
    if settings.endpoint_base_model is not None:
        return bases[0] if bases and settings.endpoint_base_model == base_model else None
    for model in bases:
        if any(_names(where, base_model) for where in (model.id, model.root) if where is not None):
            return model
    return None


def _names(where: str, base_model: str) -> bool:
    """Whether a name, a path that ends with it, or a folder of the hub's cache is that of this model."""
    path = where.rstrip("/").casefold()
    name = base_model.casefold()
    cached = f"models--{name.replace('/', '--')}"
    return path == name or path.endswith(f"/{name}") or cached in path.split("/")


def misfits_by_settings(settings: Settings, rank: int, modules: Sequence[str]) -> Iterable[str]:
    """Yields what only the operator knows of the endpoint."""
    if rank > settings.endpoint_max_rank:
        yield (
            f"its lora_rank of {rank} is above the endpoint's {settings.endpoint_max_rank} (vLLM: "
            f"--max-lora-rank {smallest_max_lora_rank(rank)}, and TRAINER_ENDPOINT_MAX_RANK)"
        )
    if settings.endpoint_target_modules:
        known = set(settings.endpoint_target_modules)
        others = sorted({module.rpartition(".")[2] for module in modules} - known)
        if others:
            yield f"the endpoint does not adapt the modules {', '.join(others)} (vLLM: --lora-target-modules)"


def not_served(served: Sequence[ServedModel], base_model: str) -> str:
    bases = ", ".join(model.id for model in served if model.parent is None) or "no base model"
    return f"the endpoint serves {bases}, and the adapter is one of {base_model} (see TRAINER_ENDPOINT_BASE_MODEL)"
