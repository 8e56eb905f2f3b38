"""Adapters at an endpoint: told, found, asked, named, superseded. Against a double of vLLM; a real one is asked in
test_real_vllm."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from daemon.errors import JobDelayed, JobFailed
from daemon.serving.deployment import COMPLETE, Order, Taken, deploy, read_adapter
from daemon.serving.fit import misfits
from daemon.settings import Settings
from tests.doubles.endpoint import EndpointDouble
from training.events import ErrorCode
from training.spec import Hyperparameters

KEY = "endpoint-key-of-the-operator"
BASE = "acme/base"
JOB = UUID("11111111-2222-4333-8444-555555555555")


@pytest.fixture
async def endpoint() -> AsyncIterator[EndpointDouble]:
    async with EndpointDouble(key=KEY) as double:
        yield double


@pytest.fixture
def settings(endpoint: EndpointDouble, tmp_path: Path) -> Settings:
    return Settings(
        database_url="postgresql://u:p@h/d", endpoint_url=f"{endpoint.url}/v1", endpoint_key=KEY,
        endpoint_dir=tmp_path / "shared", endpoint_seconds=3,
    )  # fmt: skip


Make = Callable[..., Path]


@pytest.fixture
def adapter(tmp_path: Path) -> Make:
    def make(name: str = "one", *, rank: int = 8) -> Path:
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        config = {"r": rank, "target_modules": ["q_proj"], "target_parameters": ["mlp.shared.down_proj.weight"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
        (folder / "additional").mkdir()
        (folder / "additional" / "template.jinja").write_text("x")
        return folder

    return make


ORDER = Order(JOB, BASE, 8, ("q_proj", "mlp.shared.down_proj"), ("What is it?", "And why?"))


async def test_an_adapter_is_put_into_the_folder_told_and_asked_until_it_answers(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    result = await deploy(ORDER, adapter(), settings)
    place = settings.endpoint_dir / str(JOB)
    assert endpoint.adapters[str(JOB)].path == str(place)
    assert (place / "additional" / "template.jinja").is_file() and (place / COMPLETE).is_file()
    assert place.stat().st_mode & 0o777 == 0o755
    assert result["model"] == str(JOB) and result["prompt"] == "What is it?"
    assert result["answer"] == endpoint.adapters[str(JOB)].answer
    # Done twice it is as done once: nothing is copied or loaded again.
    loads = endpoint.paths.count("/v1/load_lora_adapter")
    assert (await deploy(ORDER, adapter("again"), settings))["answer"] == result["answer"]
    assert endpoint.paths.count("/v1/load_lora_adapter") == loads


async def test_another_adapter_of_the_same_job_takes_the_place_of_the_first(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    async def take(*_: object) -> Taken:
        return Taken(True)

    named = replace(ORDER, name="helper", take_name=take)
    old = await deploy(replace(named, adapter_sha256="1" * 64), adapter(), settings)
    # Only after a restore from a backup: the job was trained again.
    new = await deploy(replace(named, adapter_sha256="2" * 64), adapter("trained-again"), settings)
    assert new["answer"] != old["answer"]
    assert endpoint.adapters["helper"].answer == endpoint.adapters[str(JOB)].answer == new["answer"]
    # The same is so where it comes from the hub, whose repository keeps its name.
    hub = settings.model_copy(update={"endpoint_dir": None})
    order = replace(named, repository="acme/helper")
    endpoint.hub = {"acme/helper": adapter("pushed")}
    pushed = await deploy(order, None, hub)
    endpoint.hub = {"acme/helper": adapter("pushed-again")}
    assert (await deploy(order, None, hub))["answer"] != pushed["answer"]
    assert endpoint.adapters["helper"].answer == endpoint.adapters[str(JOB)].answer


async def test_a_superseded_folder_that_is_half_removed_does_not_pass_for_whole(
    endpoint: EndpointDouble, settings: Settings, adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deploy(ORDER, adapter(), settings)

    async def take(*_: object) -> Taken:
        return Taken(True, superseded=(JOB,))

    remove = shutil.rmtree

    def fail(folder: Path, ignore_errors: bool = False) -> None:
        if folder.name != str(JOB):
            remove(folder, ignore_errors)
            return
        (folder / "adapter_model.safetensors").unlink()
        raise OSError("the share went away")

    monkeypatch.setattr("daemon.serving.deployment.shutil.rmtree", fail)
    await deploy(replace(ORDER, job_id=uuid4(), name="helper", take_name=take), adapter("two"), settings)
    monkeypatch.undo()
    await deploy(ORDER, adapter("again"), settings)
    assert (settings.endpoint_dir / str(JOB) / "adapter_model.safetensors").is_file()


async def test_it_is_asked_as_it_was_trained(endpoint: EndpointDouble, settings: Settings, adapter: Make) -> None:
    told = {"enable_thinking": False}
    result = await deploy(replace(ORDER, template_options=told), adapter(), settings)
    assert result["chat_template_kwargs"] == told
    chats = [body for path, body in endpoint.asked if path == "/v1/chat/completions"]
    assert chats and all(body["chat_template_kwargs"] == told for body in chats)
    # Of servers that know no such key, none is asked for it without need.
    endpoint.asked.clear()
    assert "chat_template_kwargs" not in await deploy(ORDER, adapter("two"), settings)
    assert not [body for _, body in endpoint.asked if body and "chat_template_kwargs" in body]


async def test_a_base_model_is_known_by_its_name_or_its_folder(settings: Settings, endpoint: EndpointDouble) -> None:
    asked = Hyperparameters()
    roots = [BASE, f"/models/{BASE}", f"/cache/hub/models--{BASE.replace('/', '--')}/snapshots/0123", f"/x/{BASE}/"]
    for root in roots:
        endpoint.base, endpoint.root = "served-name", root
        assert await misfits(settings, BASE, asked) == ()
    for root in ("served-name", "/models/other/base", "acme/base-instruct"):
        endpoint.root = root
        assert "serves served-name, and the adapter is one of acme/base" in (await misfits(settings, BASE, asked))[0]
    named = settings.model_copy(update={"endpoint_base_model": BASE})
    assert await misfits(named, BASE, asked) == ()
    assert await misfits(named, "acme/other", asked) != ()


async def test_a_job_that_does_not_fit_is_told_so_before_it_is_trained(
    settings: Settings, endpoint: EndpointDouble
) -> None:
    asked = Hyperparameters(lora_rank=24, target_modules=("model.layers.0.self_attn.q_proj", "in_proj_qkvz"))
    limited = settings.model_copy(update={"endpoint_target_modules": ("q_proj", "v_proj"), "endpoint_dir": None})
    rank, modules, hub, base = await misfits(limited, "acme/other", asked)
    assert "lora_rank of 24 is above the endpoint's 16" in rank and "--max-lora-rank 32" in rank
    assert "does not adapt the modules in_proj_qkvz" in modules
    assert "push_to_hub" in hub
    assert "acme/other" in base
    # What cannot be asked now is no reason.
    await endpoint.server.__aexit__()
    assert await misfits(settings, "acme/other", Hyperparameters()) == ()


@pytest.mark.parametrize("inplace", [True, False])
async def test_a_name_means_the_newest_adapter_once_that_answers(
    endpoint: EndpointDouble, settings: Settings, adapter: Make, inplace: bool
) -> None:
    endpoint.knows_inplace = inplace
    superseded: tuple[UUID, ...] = ()

    async def take(at: str, name: str, in_use: bool) -> Taken:
        assert (at, name, in_use) == (endpoint.host, "support", bool(superseded))
        assert "support" not in endpoint.adapters or superseded, "it is proven first"
        return Taken(True, superseded)

    first = await deploy(replace(ORDER, name="support", take_name=take), adapter(), settings)
    assert (first["model"], first["also"]) == ("support", str(JOB))
    superseded = (JOB,)
    newer = replace(ORDER, job_id=uuid4(), name="support", take_name=take)
    second = await deploy(newer, adapter("newer"), settings)
    assert second["superseded"] == [str(JOB)]
    assert set(endpoint.adapters) == {"support", str(newer.job_id)}
    assert endpoint.adapters["support"].answer == endpoint.adapters[str(newer.job_id)].answer == second["answer"]
    assert not (settings.endpoint_dir / str(JOB)).exists() and (settings.endpoint_dir / str(newer.job_id)).exists()


async def test_a_name_of_somebody_else_is_left_to_him(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    async def refuse(_at: str, _name: str, _in_use: bool) -> Taken:
        return Taken(False, why_not="somebody else's jobs are served as support")

    result = await deploy(replace(ORDER, name="support", take_name=refuse), adapter(), settings)
    assert (result["model"], result["name_refused"]) == (str(JOB), "somebody else's jobs are served as support")
    assert set(endpoint.adapters) == {str(JOB)}


async def test_an_endpoint_on_another_machine_sees_the_folder_elsewhere(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    there = settings.model_copy(update={"endpoint_sees": "/mnt/adapters/"})
    with pytest.raises(JobFailed, match="No adapter found") as failed:
        await deploy(ORDER, adapter(), there)
    assert "TRAINER_ENDPOINT_SEES" in (failed.value.hint or "")
    endpoint.mounts["/mnt/adapters"] = settings.endpoint_dir
    await deploy(ORDER, settings.endpoint_dir / str(JOB), there)
    assert endpoint.adapters[str(JOB)].path == f"/mnt/adapters/{JOB}"


async def test_an_endpoint_that_finds_adapters_itself_is_only_asked(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    endpoint.can_be_told, endpoint.reads = False, settings.endpoint_dir
    itself = settings.model_copy(update={"endpoint_loads": "itself"})
    result = await deploy(replace(ORDER, name="support"), adapter(), itself)
    assert result["model"] == str(JOB) and "no other name" in result["name_refused"]
    assert "/v1/load_lora_adapter" not in endpoint.paths


async def test_an_adapter_on_the_hub_is_loaded_by_its_repository(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    hub = settings.model_copy(update={"endpoint_dir": None})
    endpoint.hub["acme/support"] = adapter()
    await deploy(replace(ORDER, repository="acme/support"), None, hub)
    assert endpoint.adapters[str(JOB)].path == "acme/support"
    with pytest.raises(JobFailed, match="takes adapters from the hub"):
        await deploy(ORDER, None, hub)


@pytest.mark.parametrize("probabilities", [True, False])
@pytest.mark.parametrize("template", [True, False])
async def test_an_adapter_that_is_not_applied_is_found_out(
    endpoint: EndpointDouble, settings: Settings, adapter: Make, probabilities: bool, template: bool
) -> None:
    endpoint.tells_probabilities, endpoint.has_template = probabilities, template
    endpoint.noise = 0.01 if probabilities else 0.0
    assert (await deploy(ORDER, adapter(), settings))["answer"].startswith("I am ")
    endpoint.applies = False
    with pytest.raises(JobFailed, match="exactly what its base model answers"):
        await deploy(replace(ORDER, job_id=uuid4()), adapter("other"), settings)


async def test_a_rank_that_the_settings_do_not_know_is_explained(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    endpoint.max_rank = 8
    with pytest.raises(JobFailed, match="LoRA rank 12 is greater than max_lora_rank 8") as failed:
        await deploy(replace(ORDER, rank=12), adapter(rank=12), settings)
    assert "--max-lora-rank 16" in (failed.value.hint or "")
    assert failed.value.code is ErrorCode.ENDPOINT_FAILED


async def test_an_endpoint_that_cannot_be_told_is_explained(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    endpoint.can_be_told = False
    with pytest.raises(JobFailed, match="did not load the adapter") as failed:
        await deploy(ORDER, adapter(), settings)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in (failed.value.hint or "")


async def test_a_key_that_is_refused_is_explained_and_not_shown(
    endpoint: EndpointDouble, settings: Settings, adapter: Make
) -> None:
    endpoint.key = "another"
    with pytest.raises(JobFailed, match="HTTP 401: Unauthorized") as failed:
        await deploy(ORDER, adapter(), settings)
    assert "TRAINER_ENDPOINT_KEY" in (failed.value.hint or "") and KEY not in str(failed.value)
    endpoint.key = KEY
    endpoint.faults["/v1/models"] = [(400, f"wrong: {KEY}")]
    with pytest.raises(JobFailed) as failed:
        await deploy(ORDER, adapter("other"), settings)
    assert KEY not in failed.value.message and "wrong: …" in failed.value.message


async def test_what_passes_is_waited_for(endpoint: EndpointDouble, settings: Settings, adapter: Make) -> None:
    endpoint.faults = {
        "/v1/models": [(503, "starting")],
        "/v1/load_lora_adapter": [(502, "bad gateway")],
        "/v1/chat/completions": [(429, "busy")],
    }
    assert (await deploy(ORDER, adapter(), settings))["model"] == str(JOB)


async def test_an_endpoint_that_is_away_is_tried_again_later(settings: Settings, adapter: Make) -> None:
    away = settings.model_copy(update={"endpoint_url": "http://127.0.0.1:9", "endpoint_seconds": 0.1})
    with pytest.raises(JobDelayed, match="cannot be reached"):
        await deploy(ORDER, adapter(), away)


@pytest.mark.parametrize("answer", [b"", b"[]", b"<html>", b'{"data": [{}]}', b'{"data": 3}', b"\xff\xfe"])
async def test_what_is_no_such_server_is_said_to_be_none(
    answer: bytes, settings: Settings, adapter: Make, monkeypatch: pytest.MonkeyPatch, endpoint: EndpointDouble
) -> None:
    async def handle(exchange: Any) -> None:
        await exchange.body()
        await exchange.answer(200, answer)

    monkeypatch.setattr(endpoint.server, "handler", handle)
    with pytest.raises(JobFailed, match=r"not an OpenAI-compatible server|serves no base model"):
        await deploy(ORDER, adapter(), settings)


def test_what_an_adapter_needs_stands_in_its_config(adapter: Make) -> None:
    folder = adapter(rank=24)
    assert read_adapter(folder) == (24, ("q_proj", "mlp.shared.down_proj"))
