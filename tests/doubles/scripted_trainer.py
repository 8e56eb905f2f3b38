"""A trainer whose behaviour is written in its dataset: the real protocol, without a model.

The dataset's first line is `{"script": [[action, ...], ...]}`; without a script it trains twenty steps of a few
milliseconds. It follows the trainer's protocol exactly (spec on stdin, events on a descriptor, checkpoint and exit 75
on TERM, resume from the newest checkpoint), so that the daemon cannot see the difference; the real trainer passes the
same lifecycle tests.

`["steps", count, seconds, gate]` makes its last step only when the file `gate` exists, and from then on does not pause:
a test that needs a job in mid-run has it for as long as it likes, on a machine of any speed, and waits for nothing
afterwards.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

DEFAULT = [["steps", 20, 0.005]]
# What jobs leave behind in this process; the real trainer keeps nothing.
KEPT: list[bytes] = []


class Trainer:
    def __init__(self, events_fd: int, spec: dict[str, object]) -> None:
        self.fd = events_fd
        self.spec = spec
        self.checkpoint = Path(str(spec["checkpoint_dir"])) / "step"
        self.step = int(self.checkpoint.read_text()) if self.checkpoint.exists() else 0
        self.total = 0
        self.weights_mb = 0
        self.asked_to_stop = False
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, _number: int, _frame: object) -> None:
        self.asked_to_stop = True

    def say(self, kind: str, **fields: object) -> None:
        line = json.dumps({"kind": kind, "job_id": self.spec["job_id"], **fields}) + "\n"
        os.write(self.fd, line.encode())

    def save_checkpoint(self) -> None:
        temporary = self.checkpoint.with_name("step.new")
        temporary.write_text(str(self.step))
        temporary.replace(self.checkpoint)
        self.say("checkpoint_saved", step=self.step, path=str(self.checkpoint), bytes=1)

    def stop_if_asked(self) -> None:
        if self.asked_to_stop:
            self.save_checkpoint()
            sys.exit(75)

    def steps(self, count: int, seconds: float, gate: Path | None = None) -> None:
        self.total = max(self.total, count)
        if self.step:
            self.say("notice", code="resumed", message=f"Resumed at step {self.step}.", data={"step": self.step})
        while self.step < count:
            self.pause(seconds, gate, is_last=self.step + 1 == count)
            self.step += 1
            loss = 3.0 / (1 + self.step)
            self.say(
                "progress", step=self.step, total_steps=count, epoch=self.step / count, loss=loss,
                learning_rate=1e-4, grad_norm=1.0,
                # Shows which attempt wrote it: the chaos run compares it with the epoch of the row in which it arrives.
                tokens_per_second=float(str(self.spec["lease_epoch"])),
            )  # fmt: skip
            if self.step % 5 == 0:
                self.save_checkpoint()
            self.stop_if_asked()

    def pause(self, seconds: float, gate: Path | None, is_last: bool) -> None:
        if gate is None:
            time.sleep(seconds)
            return
        ends = time.monotonic() + seconds
        while not (gate.exists() or self.asked_to_stop) and (is_last or time.monotonic() < ends):
            time.sleep(0.01)

    def run(self, script: list[list[object]]) -> None:
        for action, *arguments in script:
            match action:
                case "steps":
                    count, seconds, *gate = map(str, arguments)
                    self.steps(int(count), float(seconds), *map(Path, gate))
                case "say":
                    self.say(str(arguments[0]), **dict(arguments[1]))  # type: ignore[call-overload]
                case "raw":
                    os.write(self.fd, str(arguments[0]).encode())
                case "print":
                    print(arguments[0], flush=True)
                case "sleep":
                    time.sleep(float(str(arguments[0])))
                case "ignore_term":
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                case "grandchild":
                    if os.fork() == 0:
                        signal.signal(signal.SIGTERM, signal.SIG_IGN)
                        time.sleep(600)
                        os._exit(0)
                case "environment":
                    Path(str(arguments[0])).write_text(json.dumps(dict(os.environ)))
                case "tell_date":
                    self.say("notice", code="told_date", message=str(self.spec["today"]))
                case "kill_self":
                    os.kill(os.getpid(), int(str(arguments[0])))
                case "kill_self_once":
                    marker = Path(str(self.spec["checkpoint_dir"])) / "died"
                    if not marker.exists():
                        marker.write_text("once")
                        os.kill(os.getpid(), signal.SIGKILL)
                case "grow":
                    KEPT.append(b"x" * int(str(arguments[0])))
                case "say_once":
                    marker = Path(str(self.spec["checkpoint_dir"])) / "said"
                    if not marker.exists():
                        marker.write_text("once")
                        self.say(str(arguments[0]), **dict(arguments[1]))  # type: ignore[call-overload]
                        sys.exit(1)
                case "weights":  # megabytes that do not compress
                    self.weights_mb = int(str(arguments[0]))
                case "mark":  # a file outside the job's folder, a line for each time that a trainer came by
                    with Path(str(arguments[0])).open("a") as marks:
                        marks.write(f"epoch {self.spec['lease_epoch']}\n")
                case "exit":
                    sys.exit(int(str(arguments[0])))
                case _:
                    raise ValueError(f"unknown action {action}")
        self.save_adapter()

    def save_adapter(self) -> None:
        self.say("stage", stage="saving")
        folder = Path(str(self.spec["output_dir"]))
        temporary = folder.with_name(folder.name + ".new")
        temporary.mkdir(parents=True, exist_ok=True)
        (temporary / "adapter_config.json").write_text(json.dumps({"r": 8, "peft_type": "LORA"}))
        # The bytes differ between attempts, so that a test can tell whose adapter won.
        with (temporary / "adapter_model.safetensors").open("wb") as weights:
            weights.write(f"epoch {self.spec['lease_epoch']}".encode() * 16)
            for _ in range(self.weights_mb):
                weights.write(os.urandom(1_000_000))
        (temporary / "training_log.jsonl").write_text('{"step": 1}\n')
        (temporary / "metrics_chart.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        temporary.replace(folder)
        self.say(
            "adapter_saved", path=str(folder),
            summary={"final_training_loss": 0.1, "total_steps": self.step, "epochs_completed": 1},
            serving={"base_model": self.spec["base_model"], "lora_rank": 8},
        )  # fmt: skip


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, as the real trainer does
    events_fd = int(sys.argv[sys.argv.index("--events-fd") + 1])
    warm = "--warm" in sys.argv
    served = 0
    base_model = None
    while True:
        if warm:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            ready = {"kind": "ready", "served": served, "base_model": base_model, "resident_bytes": resident}
            os.write(events_fd, json.dumps(ready).encode() + b"\n")
        if not (line := sys.stdin.readline()):
            return
        spec = json.loads(line)
        served, base_model = served + 1, spec["base_model"]
        if spec.get("kind") == "hold":
            continue
        trainer = Trainer(events_fd, spec)
        trainer.say("started", pid=os.getpid())
        first = Path(spec["dataset_path"]).read_text().splitlines()[:1]
        script = json.loads(first[0]).get("script", DEFAULT) if first else DEFAULT
        trainer.say("stage", stage="training")
        trainer.run(script)


if __name__ == "__main__":
    main()
