"""Our client of the API v2, and the ways to end one's own pod, against a RunPod on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.logs import configure_logs
from daemon.pod.runpod_api import ApiFault, Key, RunPod, RunPodError
from daemon.pod.shutdown import chosen_end, end_own_pod
from tests.doubles.runpod_api import RunPodDouble

GOOD = Key("TRAINER_RUNPOD_API_KEY", "good-key")
H100 = {"id": "NVIDIA H100 80GB HBM3", "count": 2}


def client(double: RunPodDouble, *keys: Key) -> RunPod:
    return RunPod(keys or (GOOD,), api=double.url)


async def test_a_pod_is_created_read_listed_stopped_and_terminated(runpod: RunPodDouble) -> None:
    async with client(runpod) as api:
        made = await api.create_pod({"name": "one", "image": "trainer", "gpu": H100})
        assert made.cost_per_hour == 6.0 and made.price_per_gpu_hour == 3.0 and made.gpu_count == 2
        for number in range(7):
            runpod.add(f"other{number}")
        assert len(await api.list_pods()) == 8, "every page was read"
        await api.end_pod(made.id, "stop")
        assert (await api.read_pod(made.id)).status == "EXITED"
        await api.end_pod(made.id, "terminate")
        assert len(await api.list_pods()) == 7


async def test_ending_a_pod_that_has_ended_or_is_gone_is_no_error(runpod: RunPodDouble) -> None:
    runpod.add("a", status="EXITED")
    async with client(runpod) as api:
        await api.end_pod("a", "stop")
        await api.end_pod("gone", "terminate")
        assert [call[1] for call in runpod.called("GET")] == ["/v2/pods/a"], "the 409 was looked into"
        runpod.add("b", status="ERROR")
        with pytest.raises(RunPodError) as raised:
            await api.end_pod("b", "stop")
        assert raised.value.fault is ApiFault.CONFLICT


@pytest.mark.parametrize(
    ("status", "detail", "fault", "certain"),
    [
        (400, "There are no longer any instances available with the requested specifications.", "no_capacity", True),
        (500, "This machine does not have the resources to deploy your pod", "no_capacity", True),
        (400, "disk must be at least 1", "invalid", True),
        (422, "image is required", "invalid", True),
        (402, "Your balance is too low", "refused", True),
        (404, "No such pod.", "absent", True),
        (409, "The pod is ERROR.", "conflict", True),
        (429, "Slow down", "away", True),
        (502, "Bad gateway", "away", False),
        (522, "Connection timed out", "away", False),
    ],
)
async def test_each_error_says_what_to_do_next_in_the_servers_words(
    runpod: RunPodDouble, status: int, detail: str, fault: str, certain: bool
) -> None:
    runpod.fail(status, detail=detail, headers={"Retry-After": "7"})
    async with client(runpod) as api:
        with pytest.raises(RunPodError, match=detail.split("(", maxsplit=1)[0]) as raised:
            await api.create_pod({"name": "one", "image": "trainer", "gpu": H100})
    assert (raised.value.fault, raised.value.certain) == (fault, certain)
    assert raised.value.wait_seconds == 7


async def test_a_lost_answer_leaves_it_open_whether_the_pod_exists(runpod: RunPodDouble) -> None:
    runpod.fail(0, cut=True, after=True)
    async with client(runpod) as api:
        with pytest.raises(RunPodError) as raised:
            await api.create_pod({"name": "one", "image": "trainer", "gpu": H100})
        assert not raised.value.certain and raised.value.fault is ApiFault.AWAY
        assert [pod.name for pod in await api.list_pods()] == ["one"]


async def test_a_listing_that_breaks_off_is_an_error_and_not_a_short_list(runpod: RunPodDouble) -> None:
    for number in range(5):
        runpod.add(f"pod{number}")
    async with client(runpod) as api:
        runpod.fail(503, skip=1)
        with pytest.raises(RunPodError):
            await api.list_pods()
        assert len(runpod.calls) == 2
        assert len(await api.list_pods()) == 5


async def test_a_key_without_the_right_gives_way_to_one_that_has_it(runpod: RunPodDouble) -> None:
    runpod.keys["pod-key"] = {"read"}
    runpod.add("a")
    async with client(runpod, Key("RUNPOD_API_KEY", "pod-key"), GOOD) as api:
        await api.end_pod("a", "stop")
        assert len(runpod.calls) == 2
        await api.read_pod("a")
        assert len(runpod.calls) == 3, "the key that worked is tried first"
    async with client(runpod, Key("RUNPOD_API_KEY", "pod-key")) as api:
        with pytest.raises(RunPodError) as raised:
            await api.create_pod({"name": "one", "image": "trainer", "gpu": H100})
        assert raised.value.fault is ApiFault.REFUSED and "pod-key" not in str(raised.value)


# -- ending one's own pod -----------------------------------------------------------------------------------------


def environment(double: RunPodDouble, folder: Path, **more: str) -> dict[str, str]:
    return {"TRAINER_RUNPOD_API": double.url, "PATH": str(folder), **more}


def put_runpodctl(folder: Path, accepts: str) -> None:
    """A runpodctl that knows one spelling only, as the older and the newer do."""
    file = folder / "runpodctl"
    file.write_text(f'#!/bin/sh\necho "$@" >> {folder}/said\n[ "$1 $2" = "{accepts}" ]\n')
    file.chmod(0o755)


async def test_the_api_ends_the_pod_and_rides_out_a_burst_of_errors(runpod: RunPodDouble, tmp_path: Path) -> None:
    runpod.add("me")
    runpod.fail(503)
    runpod.fail(429, headers={"Retry-After": "0"})
    assert await end_own_pod("me", "terminate", environment(runpod, tmp_path, RUNPOD_API_KEY="good-key"))
    assert runpod.pods["me"].status == "TERMINATED"


async def test_the_package_ends_the_pod_where_the_new_api_refuses_the_key(
    runpod: RunPodDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runpod.add("me")
    runpod.fail(403, times=100, only="/v2/")
    monkeypatch.setenv("RUNPOD_API_BASE_URL", runpod.root)
    assert await end_own_pod("me", "stop", environment(runpod, tmp_path, TRAINER_RUNPOD_API_KEY="good-key"))
    assert runpod.pods["me"].status == "EXITED"
    assert runpod.called("POST", "/graphql")


@pytest.mark.parametrize(("action", "accepts"), [("stop", "stop pod"), ("terminate", "pod delete")])
async def test_runpodctl_is_the_last_way_in_either_spelling(
    runpod: RunPodDouble, tmp_path: Path, action: str, accepts: str
) -> None:
    put_runpodctl(tmp_path, accepts)
    assert await end_own_pod("me", action, environment(runpod, tmp_path))  # type: ignore[arg-type]
    assert (tmp_path / "said").read_text().splitlines()[-1] == f"{accepts} me"


async def test_where_no_way_works_the_answer_is_no_and_the_log_is_loud(
    runpod: RunPodDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logs(style="json")
    monkeypatch.setenv("RUNPOD_API_BASE_URL", runpod.root)
    put_runpodctl(tmp_path, "nothing at all")
    assert not await end_own_pod("me", "stop", environment(runpod, tmp_path, RUNPOD_API_KEY="wrong-key"))
    said = "".join(capfd.readouterr())
    assert "pod_idle_and_billing" in said and said.count("pod_end_failed") == 4
    assert "wrong-key" not in said


def test_the_end_is_chosen_by_setting_then_by_where_the_work_lies() -> None:
    assert chosen_end({}) == "stop"
    assert chosen_end({"RUNPOD_VOLUME_ID": "v"}) == "terminate"
    assert chosen_end({"RUNPOD_VOLUME_ID": "v", "TRAINER_POD_END": "stop"}) == "stop"
