"""One job on several slots: two real processes over gloo do what a single one does, and end in the same way."""

from __future__ import annotations

import math
import os
import signal
import socket
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.daemon_process import eventually
from tests.forked_process import forker
from tests.paths import ROOT, TRAINER_PYTHON
from tests.tiny_models import write_conversations
from tests.training.conftest import IN_BOTH_TYPES, ROUNDING, SpecOf, train
from tests.training.process.child import Child, start
from training.base.architecture import architecture_of
from training.base.sharded import must_be_cut
from training.compute import ComputeType
from training.data.chat_template import ChatTemplate
from training.data.corpus import gather
from training.data.plan import Plan, make_plan
from training.data.sampler import StepOrder
from training.data.tokenizer import load_tokenizer
from training.events import EXIT_STOPPED, ErrorCode, Event, Progress, parse_line
from training.failures import TrainingFailed, failed_event
from training.files.model_folder import open_model_folder
from training.launch.shared_folder import RankFolder
from training.preflight.check import plan_and_estimate
from training.ranks import Ranks
from training.spec import JobSpec

# The processes import torch, on a machine that may be busy.
SECONDS = 500

pytestmark = pytest.mark.timeout(600)


def _steps(events: list[object]) -> list[Progress]:
    return [event for event in events if isinstance(event, Progress)]


def _same_run(ours: list[Progress], theirs: list[Progress], computed_in: ComputeType) -> bool:
    """The same steps, up to rounding: two ranks lay their conversations out differently and add up in another order."""
    return [event.step for event in ours] == [event.step for event in theirs] and all(
        math.isclose(a.loss, b.loss, rel_tol=ROUNDING[computed_in])
        and math.isclose(a.grad_norm or 0, b.grad_norm or 0, rel_tol=10 * ROUNDING[computed_in])
        and (a.learning_rate, a.epoch, a.tokens_seen) == (b.learning_rate, b.epoch, b.tokens_seen)
        for a, b in zip(ours, theirs, strict=True)
    )


# With the launcher, whose ranks each import the libraries, by test-system; without them, in the test that follows.
@pytest.mark.parametrize("is_launched", [False, pytest.param(True, marks=pytest.mark.system)])
@IN_BOTH_TYPES
def test_two_processes_make_the_steps_of_one(
    compute_type: ComputeType, is_launched: bool, spec_of: SpecOf, tmp_path: Path
) -> None:
    """22 conversations (24 less two held out), seven per step: the shares differ, and the last step has only one."""
    chosen = {"batch_size": 7, "num_epochs": 2, "lora_dropout": 0.0, "sample_prompts": None}
    alone = train(spec_of(name="alone", **chosen))
    together = spec_of(name="together", num_gpus=2, **chosen)
    if is_launched:
        with start(together, forked=True) as child:
            assert child.exit_status(SECONDS) == 0
        events = child.events
        assert [event.kind for event in events].count("started") == 1
    else:
        events = _forked_ranks(together, tmp_path)
    assert _same_run(_steps(events), _steps(alone.heard), compute_type)
    for ours, theirs in zip(
        [event for event in events if event.kind == "evaluated"], alone.all("evaluated"), strict=True
    ):
        assert math.isclose(ours.validation_loss, theirs.validation_loss, rel_tol=ROUNDING[compute_type])
    kinds = [event.kind for event in events]
    assert kinds.count("planned") == kinds.count("adapter_saved") == 1
    assert kinds.count("sample") == 4 and kinds[-1] == "adapter_saved"


def test_the_launchers_ranks_meet_and_only_the_first_ones_events_arrive(
    spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks are real but for the recipe: instead of training they exchange their numbers."""
    _in_every_rank(
        tmp_path,
        monkeypatch,
        """
import sys, types

def train_adapter(spec, voice, stop, ranks):
    voice.notice("met", spec.job_id, ranks=ranks.exchange([ranks.index, stop.requested]))

sys.modules["training.recipe"] = recipe = types.ModuleType("training.recipe")
recipe.train_adapter = train_adapter
""",
    )
    with start(spec_of(num_gpus=2), forked=True) as child:
        assert child.exit_status(SECONDS) == 0
    assert [event.kind for event in child.events] == ["started", "stage", "notice"]
    met = child.wait_for("notice")
    assert (met.code, met.message, met.data) == ("met", "job", {"ranks": [[0, 0], [1, 0]]})


def _forked_ranks(spec: JobSpec, folder: Path) -> list[Event]:
    """Runs a job's ranks with what the engine would tell them; returns the events of the first one."""
    desk, told = RankFolder.lay(folder / "desk", spec), folder / "events"
    told.touch()
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    python = forker(str(TRAINER_PYTHON))
    ranks = []
    for rank in range(spec.num_gpus):
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": spec.num_gpus, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "localhost", **{name: str(value) for name, value in named.items()}}
        arguments = ("-m", "training.launch.rank_main", "--launcher", str(python.pid), "--desk", str(desk.folder))
        log = folder / f"rank-{rank}.log"
        ranks.append(python.start_quietly(environment, ROOT, log, *arguments, "--events", str(told)))
    for rank, process in enumerate(ranks):
        assert process.wait(SECONDS) == 0, (folder / f"rank-{rank}.log").read_text()[-4000:]
    events = [parse_line(line) for line in told.read_bytes().splitlines()]
    return [event for event in events if event is not None]


@pytest.mark.system
@IN_BOTH_TYPES
def test_a_checkpoint_of_two_processes_is_continued_by_one_and_one_of_one_by_two(
    compute_type: ComputeType, spec_of: SpecOf
) -> None:
    chosen = {"num_epochs": 2, "lora_dropout": 0.0, "lora_rank": 4}
    whole = spec_of(name="whole", **chosen)
    expected = {event.step: event for event in _steps(train(whole).heard)}
    data = whole.dataset_path

    begun = spec_of(name="two_then_one", num_gpus=2, dataset_path=data, **chosen)
    with start(begun) as child:
        child.wait_for("progress", step=2, seconds=SECONDS)
        child.terminate()
        assert child.exit_status(SECONDS) == EXIT_STOPPED
    saved = child.wait_for("checkpoint_saved")
    assert saved.step >= 2 and child.events[-1].kind == "checkpoint_saved"
    first_half = _steps(child.events)
    second_half = _steps(train(begun.model_copy(update={"num_gpus": 1})).heard)
    assert _same_run([*first_half, *second_half], list(expected.values()), compute_type)

    begun = spec_of(name="one_then_two", dataset_path=data, **chosen)
    with start(begun) as child:
        child.wait_for("progress", step=2, seconds=SECONDS)
        child.terminate()
        assert child.exit_status(SECONDS) == EXIT_STOPPED
    first_half = _steps(child.events)
    with start(begun.model_copy(update={"num_gpus": 2})) as child:
        assert child.exit_status(SECONDS) == 0
    assert _same_run([*first_half, *_steps(child.events)], list(expected.values()), compute_type)


def test_a_killed_process_takes_the_others_with_it_and_is_named(
    spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks sleep instead of training, without torch; by test-system real ones are killed."""
    asleep = "import pathlib, time\n"
    asleep += f"pathlib.Path({str(tmp_path)!r}, 'asleep-' + os.environ['RANK']).touch()\ntime.sleep({SECONDS})"
    _in_every_rank(tmp_path, monkeypatch, asleep)
    with start(spec_of(num_gpus=2), forked=True) as child:
        eventually(lambda: len(list(tmp_path.glob("asleep-*"))) == 2, seconds=SECONDS)
        ranks = _ranks_of(child)
        os.kill(ranks[1], signal.SIGKILL)
        assert child.exit_status(SECONDS) == 1
        _until_gone(ranks.values())
    _assert_named(child, 1)


@pytest.mark.system
@pytest.mark.parametrize("victim", [1, 0, None], ids=["the_second_rank", "the_first_rank", "the_launcher"])
def test_a_process_killed_while_it_trains_takes_the_others_with_it_and_is_named(
    victim: int | None, spec_of: SpecOf, tmp_path: Path
) -> None:
    data = write_conversations(tmp_path / "many.jsonl", 200)
    spec = spec_of(num_gpus=2, num_epochs=50, dataset_path=data, checkpoint_seconds=0.001)
    with start(spec, forked=True) as child:
        child.wait_for("checkpoint_saved", step=2, seconds=SECONDS)
        ranks = _ranks_of(child)
        assert sorted(ranks) == [0, 1]
        os.kill(child.process.pid if victim is None else ranks[victim], signal.SIGKILL)
        status = child.exit_status(SECONDS)
        _until_gone(ranks.values())
    if victim is None:
        assert status == -signal.SIGKILL
        return
    assert status == 1
    _assert_named(child, victim)


def _assert_named(child: Child, victim: int) -> None:
    failed = child.wait_for("failed")
    assert child.events[-1] is failed
    assert failed.code == "rank_lost" and failed.transient
    assert f"rank {victim} of 2" in failed.message and "SIGKILL" in failed.message


@pytest.mark.system
def test_what_all_ranks_refuse_is_said_once_with_its_code(spec_of: SpecOf) -> None:
    with start(spec_of(num_gpus=2, target_modules=["no_such_layer"])) as child:
        assert child.exit_status(SECONDS) == 1
    failed = [event for event in child.events if event.kind == "failed"]
    assert [event.code for event in failed] == ["invalid_spec"]
    assert "no_such_layer" in failed[0].message and failed[0].hint and "choose_targets" in failed[0].stack


@pytest.mark.system
@IN_BOTH_TYPES
def test_a_rank_that_runs_out_of_memory_halves_alone_and_the_others_follow(
    compute_type: ComputeType, spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"batch_size": 8, "num_epochs": 1, "lora_dropout": 0.0, "validation_fraction": 0.0}
    calm = train(spec_of(name="calm", **chosen))
    _make_the_second_card_small(tmp_path, monkeypatch, conversations=2)
    with start(spec_of(name="tight", num_gpus=2, **chosen)) as child:
        assert child.exit_status(SECONDS) == 0
    notices = [e for e in child.events if e.kind == "notice" and e.code == "out_of_memory_recovered"]
    assert notices[0].data["step"] == 1 and "the batch size stays 8" in notices[0].message
    told = [notice.data["micro_batch_tokens"] for notice in notices]
    assert told == sorted(set(told), reverse=True)
    assert _same_run(_steps(child.events), _steps(calm.heard), compute_type)


@pytest.mark.system
def test_what_one_rank_alone_fails_of_is_what_the_job_fails_of(
    spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_the_second_card_small(tmp_path, monkeypatch, conversations=0)
    with start(spec_of(num_gpus=2, validation_fraction=0.0)) as child:
        assert child.exit_status(SECONDS) == 1
    failed = child.wait_for("failed")
    assert failed.code == "out_of_memory" and not failed.transient
    assert "single conversation" in failed.message and "lora_rank (current 4)" in failed.hint


def test_the_cause_is_the_first_failure_with_a_name(spec_of: SpecOf, tmp_path: Path) -> None:
    """A rank whose neighbour ran out of memory fails because the neighbour stops answering, and may report it first."""
    spec = spec_of()
    desk = RankFolder.lay(tmp_path / "desk", spec)
    assert desk.cause() is None and desk.spec() == spec
    for rank, at, error in (
        (0, 1.0, RuntimeError("Connection closed by peer")),
        (1, 2.0, MemoryError()),
        (2, 3.0, TrainingFailed(ErrorCode.DISK_FULL, "full", "free space")),
    ):
        desk.leave_failure(rank, failed_event(error, spec, spec.job_id), at)
    (desk.folder / "failed-3.json").write_text('{"rank": 3, "at"')
    cause = desk.cause()
    assert cause is not None and cause.code is ErrorCode.OUT_OF_MEMORY


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("examples", "batch_size"), [(20, 4), (21, 4), (7, 7), (3, 8), (23, 5)])
def test_every_step_holds_the_same_conversations_for_any_number_of_ranks(
    examples: int, batch_size: int, ranks: int
) -> None:
    def plan(count: int) -> Plan:
        return Plan(batch_size, count, 2048, math.ceil(examples / batch_size), 1, 0, "float32")

    def steps(count: int) -> list[set[int]]:
        """Returns the conversations of each optimizer step, each of them used once."""
        orders = [StepOrder(examples, plan(count), Ranks(index, count), seed=3) for index in range(count)]
        for order in orders:
            order.set_epoch(1)
        shares = [list(order) for order in orders]
        assert {len(share) for share in shares} == {len(orders[0])}
        found = []
        for step in zip(*shares, strict=True):
            real = [row for share in step for row in share if row != examples]
            assert len(real) == len(set(real)) and all(step)
            found.append(set(real))
        return found

    assert steps(ranks) == steps(1)
    assert set().union(*steps(ranks)) == set(range(examples))


def test_a_batch_that_cannot_be_divided_stays_what_was_asked(spec_of: SpecOf) -> None:
    spec = spec_of(batch_size=7, num_gpus=2)
    tokenizer = load_tokenizer(open_model_folder(spec.model_path, spec.base_model))
    corpus = gather(spec.dataset_path, None, spec.hyperparameters, ChatTemplate(tokenizer), 2048)
    plan = make_plan(spec, corpus)
    assert (plan.batch_size, plan.share, plan.idle_ranks) == (7, 4, 0)
    alone = make_plan(spec.model_copy(update={"num_gpus": 1}), corpus)
    assert (plan.total_steps, plan.warmup_steps) == (alone.total_steps, alone.warmup_steps)
    assert make_plan(spec.model_copy(update={"num_gpus": 9}), corpus).idle_ranks == 2


@pytest.mark.system
@IN_BOTH_TYPES
def test_a_model_that_no_place_can_hold_is_cut_and_trains_the_same(
    compute_type: ComputeType, spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"batch_size": 7, "num_epochs": 2, "lora_dropout": 0.0}
    whole = spec_of(name="whole", **chosen)
    expected = train(whole)
    spec = spec_of(name="cut", num_gpus=2, dataset_path=whole.dataset_path, **chosen)
    model_bytes = expected.all("planned")[0].data["estimate"]["model_bytes"]
    # Two slots with memory for 0.6 models each.
    _in_every_rank(
        tmp_path,
        monkeypatch,
        "from training.base import sharded\nfrom training.files.free_memory import Memory\n"
        f"sharded.device_memory = lambda device, wanted_bytes: Memory.all_free({int(model_bytes * 1.2)})\n",
    )
    with start(spec) as child:
        assert child.exit_status(SECONDS) == 0
    assert "model_cut" in [event.code for event in child.events if event.kind == "notice"]
    assert _same_run(_steps(child.events), _steps(expected.heard), compute_type)
    ours, theirs = (load_file(each.output_dir / "adapter_model.safetensors") for each in (spec, whole))
    assert ours.keys() == theirs.keys()
    # The last step's gradients differ in their last bits, and Adam divides small ones by small ones.
    if compute_type == "float32":
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)
    else:
        # In bfloat16 single weights may take another turn; the matrices stay the same.
        apart = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
        assert apart < 10 * ROUNDING[compute_type], apart

    # Drained half way, and continued by a host that can hold the whole model.
    begun = spec_of(name="begun", num_gpus=2, dataset_path=whole.dataset_path, **chosen)
    with start(begun) as child:
        child.wait_for("progress", step=2, seconds=SECONDS)
        child.terminate()
        assert child.exit_status(SECONDS) == EXIT_STOPPED
    assert child.events[-1].kind == "checkpoint_saved" and child.events[-1].step >= 2
    rest = train(begun.model_copy(update={"num_gpus": 1}))
    assert "model_cut" not in [event.code for event in rest.all("notice")]
    assert _same_run([*_steps(child.events), *_steps(rest.heard)], _steps(expected.heard), compute_type)


def test_only_a_model_that_does_not_fit_is_cut_and_a_mixture_of_experts_never(spec_of: SpecOf) -> None:
    def asked(architecture: str, share_of_model: float, cards: int = 2) -> bool:
        spec = spec_of(architecture, name=f"{architecture}{share_of_model}{cards}", num_gpus=cards)
        folder = open_model_folder(spec.model_path, spec.base_model)
        template = ChatTemplate(load_tokenizer(folder))
        reads = architecture_of(folder, spec.base_model).context_length
        corpus = gather(spec.dataset_path, None, spec.hyperparameters, template, reads)
        _, estimate = plan_and_estimate(spec, folder, corpus)
        return must_be_cut(spec, folder, estimate, int(estimate.model_bytes * share_of_model))

    assert asked("qwen3", 1.2) and asked("qwen3", 0.6)
    assert not asked("qwen3", 2.0) and not asked("qwen3", 0.6, cards=1)
    assert not asked("qwen3_moe", 1.2)
    with pytest.raises(TrainingFailed, match="mixture of experts cannot be sharded") as refused:
        asked("qwen3_moe", 0.9)
    assert refused.value.code is ErrorCode.OUT_OF_MEMORY


def _make_the_second_card_small(folder: Path, monkeypatch: pytest.MonkeyPatch, *, conversations: int) -> None:
    """Makes anything too large for the second rank of a job raise what CUDA raises."""
    _in_every_rank(
        folder,
        monkeypatch,
        f"""
import torch
import training.loop.loss

whole = training.loop.loss.AnswerLoss.__call__

def limited(self, inputs):
    ends = inputs.get("cu_seq_lens_q")
    if (len(inputs["input_ids"]) if ends is None else len(ends) - 1) > {conversations}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return whole(self, inputs)

if os.environ["RANK"] == "1":
    training.loop.loss.AnswerLoss.__call__ = limited
""",
    )


def _in_every_rank(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Makes every rank that is started later begin with this code."""
    startup = folder / "startup"
    startup.mkdir()
    body = textwrap.indent(code.strip(), "    ")
    (startup / "sitecustomize.py").write_text(f'import os\n\nif "RANK" in os.environ:\n{body}\n')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(startup), str(ROOT)]))


def _ranks_of(child: Child) -> dict[int, int]:
    """Returns the processes that this trainer's engine has started, as {pid: rank}."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            environment = (stat.parent / "environ").read_bytes().split(b"\0") if parent == child.process.pid else []
        except OSError:
            continue
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry.removeprefix(b"RANK="))] = int(stat.parent.name)
    return found


def _until_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 60
    for pid in pids:
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, f"process {pid} is still there"
            time.sleep(0.02)
