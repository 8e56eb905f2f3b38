"""A warm trainer: the next job finds what loading left, and nothing of the job before."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.daemon_process import alive, children_of, eventually
from tests.tiny_models import conversation, make_model, write_conversations, write_dataset
from tests.training.conftest import ON_A_CARD_TOO, ModelOf, SpecOf, train
from tests.training.process.child import WARM, Child, start
from training.base.dtype import compute_dtype
from training.compute import ComputeType
from training.events import EXIT_STOPPED, Ready
from training.files.model_folder import open_model_folder
from training.preflight.estimate import model_bytes
from training.spec import HoldOrder, JobSpec

SECRET = "marked-e3b0c44298fc1c149afbf4c8996fb924"


def _adapter(spec: JobSpec) -> bytes:
    return (spec.output_dir / "adapter_model.safetensors").read_bytes()


def _do(child: Child, order: JobSpec | HoldOrder) -> Ready:
    """Runs one order and returns the `ready` event that follows."""
    served = child.readies[-1].served
    child.send(order.model_dump_json())
    return child.wait_until_ready(served=served + 1)


@pytest.fixture(scope="module")
def shared() -> Iterator[Callable[[], Child]]:
    """A warm trainer, perhaps already used, for tests that need a ready one. Replaced if the last test ended it."""
    with ExitStack() as stack:
        children: list[Child] = []

        def get() -> Child:
            if not children or children[-1].process.poll() is not None:
                children.append(stack.enter_context(start(arguments=WARM, forked=True)))
                assert children[-1].wait_until_ready().base_model is None
            children[-1].events.clear()
            return children[-1]

        yield get


# Each type once, with one architecture.
@ON_A_CARD_TOO
@pytest.mark.parametrize(("architecture", "compute_type"), [("qwen3", "bfloat16"), ("qwen3_next", "float32")])
def test_a_warm_trainer_makes_the_adapter_of_a_process_of_its_own_bit_for_bit(
    architecture: str, compute_type: ComputeType, spec_of: SpecOf, shared: Callable[[], Child], tmp_path: Path
) -> None:
    # For a card, only what lies on the volume in 4 bits is held: the first job leaves it there.
    chosen = {"num_epochs": 1, "lora_dropout": 0.1, "sample_prompts": None, "quantized_dir": tmp_path / "copies"}
    cold = spec_of(architecture, name="cold", **chosen)
    train(cold)
    first = spec_of(architecture, name="first", **chosen)
    other = spec_of(architecture, name="other", **chosen | {"seed": 7, "lora_rank": 8, "target_modules": ["o_proj"]})
    again = spec_of(architecture, name="again", **chosen)
    child = shared()
    for spec in (first, other, again):
        _do(child, spec)
    assert child.readies[-1].base_model == cold.base_model
    assert _adapter(first) == _adapter(cold) == _adapter(again) != _adapter(other)


def test_nothing_of_a_finished_job_is_left_in_the_warm_trainer_or_around_it(
    spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = tmp_path / "around"
    for name, folder in (("HOME", around / "home"), ("TMPDIR", around / "tmp"), ("HF_HOME", around / "cache")):
        folder.mkdir(parents=True)
        monkeypatch.setenv(name, str(folder))
    rows = [conversation(number) for number in range(24)]
    for row in rows:
        row["messages"][0]["content"] += f" {SECRET}"
    dataset = write_dataset(tmp_path / f"{SECRET}.jsonl", rows)
    spec = spec_of(name=f"job-{SECRET}", dataset_path=dataset, num_epochs=10)
    with start(arguments=WARM) as child:
        child.wait_until_ready()
        warm = child.process.pid
        before, files = _state_of(warm), set(around.rglob("*"))
        child.send(spec.model_dump_json())
        child.wait_for("progress", step=2)
        (fork,) = children_of(warm)
        # The search does find it in the fork while the fork is working.
        os.kill(fork, signal.SIGSTOP)
        marks = {SECRET.encode(), str(spec.model_path).encode()}
        assert _found(fork, marks) == marks
        os.kill(fork, signal.SIGCONT)
        child.wait_until_ready(served=1)
        with safe_open(spec.output_dir / "adapter_model.safetensors", "np") as file:
            weights = next(file.get_tensor(key) for key in file.keys() if "lora_B" in key)  # noqa: SIM118
        assert not alive(fork) and children_of(warm) == []
        marks |= {SECRET.encode("utf-16-le"), weights.tobytes()[:64]}
        assert _found(warm, marks) == {str(spec.model_path).encode()}
        assert _state_of(warm) == before
        assert set(around.rglob("*")) == files
        assert not [file for file in files if file.is_file() and SECRET.encode() in file.read_bytes()]
        child.close_stdin()
        assert child.exit_status() == 0


def test_a_base_model_whose_files_have_changed_is_loaded_anew(
    tiny: ModelOf, spec_of: SpecOf, tmp_path: Path, shared: Callable[[], Child]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny("qwen3"), folder)
    # More than fits into a pipe: the fork's message must still arrive whole.
    for number in range(1200):
        (folder / f"{number:080}.txt").touch()
    before = spec_of(name="before", model_path=folder, num_epochs=1)
    after = spec_of(name="after", model_path=folder, num_epochs=1)
    child = shared()
    # Loaded before a job asks for it.
    order = HoldOrder(base_model=before.base_model, model_path=folder, compute_type=before.compute_type)
    assert _do(child, order).base_model == before.base_model
    _do(child, before)
    shutil.rmtree(folder)
    make_model(folder, "llama")
    _do(child, after)
    cold = spec_of(name="cold", model_path=folder, num_epochs=1)
    train(cold)
    assert _adapter(after) == _adapter(cold) != _adapter(before)


# Either type would show whether freed memory still holds data.
@pytest.mark.parametrize("compute_type", ["bfloat16", pytest.param("float32", marks=pytest.mark.system)])
def test_a_model_too_large_to_keep_has_the_memory_of_the_one_before_and_a_failed_job_ends_the_trainer(
    compute_type: ComputeType, spec_of: SpecOf, tmp_path: Path
) -> None:
    bad = spec_of(name="bad", dataset_path=write_dataset(tmp_path / "bad.jsonl", ["no conversation"]))
    small, large = spec_of("llama", name="small", num_epochs=1), spec_of("qwen3", num_epochs=3)
    room = model_bytes(open_model_folder(small.model_path, "small"), quantize=True, compute_type=compute_type)
    with start(arguments=("--warm", "--keep-bytes", str(room)), forked=True) as child:
        child.wait_until_ready()
        order = HoldOrder(base_model=large.base_model, model_path=large.model_path, compute_type=compute_type)
        assert _do(child, order).base_model is None
        assert _do(child, small).base_model == small.base_model
        with safe_open(small.model_path / "model.safetensors", "pt") as file:
            weights = _bytes_of(file.get_tensor("model.embed_tokens.weight").to(compute_dtype("cpu", compute_type)))
        assert _found(child.process.pid, {weights})
        child.send(large.model_dump_json())
        # More steps than the small job has.
        child.wait_for("progress", step=8)
        assert not _found(child.process.pid, {weights}), "it is still there beside the large one"
        assert child.wait_until_ready(served=3).base_model is None
        child.send(bad.model_dump_json())
        assert child.exit_status() == 1
    assert child.wait_for("failed").code == "dataset_invalid"


def test_a_model_that_cannot_be_loaded_fails_the_job_that_wanted_it(
    tiny: ModelOf, spec_of: SpecOf, tmp_path: Path, shared: Callable[[], Child]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    child = shared()
    child.send(spec_of(model_path=folder).model_dump_json())
    assert child.exit_status() == 1
    failed = child.wait_for("failed")
    assert failed.code == "model_unsupported" and failed.job_id == "job"


def test_sigterm_ends_a_waiting_trainer_at_once(shared: Callable[[], Child]) -> None:
    child = shared()
    child.terminate()
    assert child.exit_status(20) == EXIT_STOPPED


def test_sigterm_ends_a_working_trainer_with_a_checkpoint(spec_of: SpecOf) -> None:
    spec = spec_of(num_epochs=100)
    with start(arguments=WARM, forked=True) as child:
        child.send(spec.model_dump_json())
        child.wait_for("progress", step=2)
        # As the daemon does: SIGTERM to the whole group, so that the fork gets it twice.
        os.killpg(child.process.pid, signal.SIGTERM)
        assert child.exit_status() == EXIT_STOPPED
    assert child.wait_for("checkpoint_saved").step >= 2
    assert "failed" not in [event.kind for event in child.events]


def test_a_wish_to_stop_between_the_forks_of_a_job_is_not_lost(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fork has asked for a base model and can no longer handle it; the second would train to the end."""
    monkeypatch.setenv("LEAVES_AFTER_SECONDS", "2")
    with start(arguments=WARM, forked=True) as child:
        child.send(spec_of(num_epochs=100).model_dump_json())
        child.wait_for("planned")
        (fork,) = children_of(child.process.pid)
        eventually(lambda: int(_status_of(fork)["SigBlk"], 16) & 1 << (signal.SIGTERM - 1))
        os.killpg(child.process.pid, signal.SIGTERM)
        assert child.exit_status() == EXIT_STOPPED
    assert child.events[-1].kind == "stage" and child.events[-1].stage == "loading"


@pytest.mark.parametrize("victim", ["fork", "warm"])
def test_kill_9_of_either_ends_both(victim: str, spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of(num_epochs=100, dataset_path=write_conversations(tmp_path / "many.jsonl", 100))
    with start(arguments=WARM, forked=True) as child:
        child.send(spec.model_dump_json())
        child.wait_for("progress", step=1)
        # Not the fork that reported `started`: another one continued once the base model was loaded.
        warm = child.process.pid
        (fork,) = map(int, Path(f"/proc/{warm}/task/{warm}/children").read_text().split())
        os.kill(fork if victim == "fork" else child.process.pid, signal.SIGKILL)
        assert child.exit_status() == -signal.SIGKILL
        eventually(lambda: not alive(fork))


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """Bytes from its middle, enough to search for: only whole freed pages go back to the kernel."""
    flat = tensor.flatten()
    return flat[len(flat) // 2 :][:64].view(torch.uint8).numpy().tobytes()


def _status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _state_of(pid: int) -> dict[str, object]:
    """What a job could leave behind in a process besides bytes: open and mapped files, threads, signals, folder."""
    process = Path(f"/proc/{pid}")
    status = _status_of(pid)
    mapped = (line.split(maxsplit=5)[5:] for line in (process / "maps").read_text().splitlines())
    return {
        "open": sorted(str(path.readlink()) for path in (process / "fd").iterdir()),
        "mapped": {path[0] for path in mapped if path and path[0].startswith("/")},
        "folder": (process / "cwd").readlink(),
        "children": children_of(pid),
        **{key: status[key] for key in ("Threads", "SigBlk", "SigIgn", "SigCgt", "Uid", "Umask", "NoNewPrivs")},
    }


def _found(pid: int, marks: Set[bytes]) -> set[bytes]:
    """Returns those of `marks` that occur anywhere in a process's writable memory."""
    found: set[bytes] = set()
    for piece in _memory(pid, overlap=max(map(len, marks))):
        found |= {mark for mark in marks - found if mark in piece}
        if found == marks:
            break
    return found


def _memory(pid: int, overlap: int) -> Iterator[bytes]:
    piece_bytes = 8 * 2**20
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, *_ = line.split()
            if not rights.startswith("rw"):
                continue
            begin, end = (int(part, 16) for part in place.split("-"))
            for start_at in range(begin, end, piece_bytes):
                try:
                    memory.seek(start_at)
                    yield memory.read(min(piece_bytes + overlap, end - start_at))
                except (OSError, ValueError, OverflowError):
                    continue  # reserved and never touched
