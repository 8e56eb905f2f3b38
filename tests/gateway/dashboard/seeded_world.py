"""A service in full swing, written straight into the tables: three hosts, ten trainings, a queue, two hundred jobs.

The rows are put in with triggers off (a superuser's session_replication_role), because they tell of hours
that nobody wants to wait for. Every job has an owner, a dataset, a story and, where it trained, a curve.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

MODELS = (
    "Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3-8B", "mistralai/Mistral-Small-24B-Instruct",
    "google/gemma-3-12b-it", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct",
)  # fmt: skip
DATASETS = ("Support replies", "Lighthouse keeper", "Contract summaries", "Triage notes", "Tone of voice", "SQL pairs")
FAILURES = (
    ("out_of_memory", "The GPU ran out of memory at one conversation a micro-batch.",
     "reduce lora_rank (current 64) or max_length (current 8192), then try the job again"),
    ("dataset_invalid", "Line 412 has no assistant message; 17 more lines have faults.",
     "give each conversation at least one message with the role assistant, then submit again"),
    ("non_finite_loss", "The loss became infinite at step 220.", "lower learning_rate (current 0.002) and try again"),
)  # fmt: skip


class World:
    """Writes rows; everything random comes from one seed."""

    def __init__(self, connection: psycopg.Connection[Any], seed: int = 7) -> None:
        self._connection = connection
        self._random = random.Random(seed)
        self.now = datetime.now(UTC)
        self.user_id = self._uuid()
        self.insert("auth.users", id=self.user_id, email=f"{self.user_id}@example.test")

    def _uuid(self) -> UUID:
        return UUID(int=self._random.getrandbits(128), version=4)

    def update_job(self, job_id: UUID, **columns: Any) -> None:
        values = {name: Jsonb(value) if isinstance(value, dict) else value for name, value in columns.items()}
        sets = ", ".join(f"{name} = %({name})s" for name in values)
        self._connection.execute(f"UPDATE training_jobs SET {sets} WHERE id = %(id)s".encode(), values | {"id": job_id})

    def insert(self, table: str, **columns: Any) -> None:
        values = {name: Jsonb(value) if isinstance(value, dict) else value for name, value in columns.items()}
        names, marks = ", ".join(values), ", ".join(f"%({name})s" for name in values)
        self._connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})".encode(), values)

    def add_host(self, host: str, gpus: int, gpu_type: str, memory_gb: float, busy: int, **columns: Any) -> UUID:
        worker_id = self._uuid()
        given = {
            "id": worker_id, "host": host, "device": "cuda", "gpu_count": gpus, "gpu_type": gpu_type,
            "gpu_memory_gb": memory_gb, "slots": gpus, "busy": busy, "state": "busy" if busy else "idle",
            "started_at": self.now - timedelta(hours=5), "last_seen_at": self.now - timedelta(seconds=3),
        }  # fmt: skip
        self.insert("training_workers", **(given | columns))
        return worker_id

    def add_job(self, status: str, minutes_ago: float, **columns: Any) -> UUID:
        job_id, dataset_id = self._uuid(), self._uuid()
        model = str(columns.pop("base_model", None) or self._random.choice(MODELS))
        dataset = columns.pop("dataset", None) or self._random.choice(DATASETS)
        self.insert(
            "datasets", id=dataset_id, user_id=self.user_id, name=dataset,
            storage_path=f"{self.user_id}/{dataset_id}/data.jsonl", file_name="data.jsonl", file_size=1_200_000,
        )  # fmt: skip
        asked = {"num_epochs": 3, "learning_rate": 0.0002, "batch_size": 8, "lora_rank": 16}
        given = {
            "id": job_id, "user_id": self.user_id, "dataset_id": dataset_id, "preset_id": "balanced", "status": status,
            # As the app's routes send it: the model is the service's default.
            "hyperparameters": asked, "trained_with": trained_with(model, asked) if status != "queued" else None,
            "gpu_config": {"gpu_type": "H100", "num_gpus": 1}, "base_model": model, "total_epochs": 3,
            "estimated_total_cost": 6.4, "current_stage": status,
            "queued_at": self.now - timedelta(minutes=minutes_ago),
        }  # fmt: skip
        self.insert("training_jobs", **(given | columns))
        self.tell(job_id, minutes_ago, "queued", "Waits for a host.", to="queued")
        return job_id

    def tell(self, job_id: UUID, minutes_ago: float, kind: str, message: str = "", **data: Any) -> None:
        at = self.now - timedelta(minutes=minutes_ago)
        self.insert("training_events", job_id=job_id, epoch=1, kind=kind, message=message, data=data, at=at)

    def draw_curve(
        self, job_id: UUID, steps: int, total: int, start: float = 2.6, end: float = 0.9
    ) -> tuple[float, float]:
        """Points as a training leaves them; returns the last training and validation loss."""
        loss = held = start
        rows = []
        for step in range(1, steps + 1):
            way = step / total
            base = end + (start - end) * math.exp(-4.2 * way)
            loss = base + self._random.gauss(0, 0.045 + 0.03 * math.exp(-3 * way))
            if step % max(total // 8, 1) == 0:
                held = base + 0.06 + 0.04 * way
            rows.append(
                (job_id, int(3 * way), step, round(loss, 6), round(held, 6) if step % max(total // 8, 1) == 0 else None)
            )
        with self._connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO metrics_points (job_id, epoch, step, training_loss, validation_loss, learning_rate) "
                "VALUES (%s, %s, %s, %s, %s, 0.0002)",
                rows,
            )
        return loss, held

    def train(self, worker_id: UUID, way: float, model: str, dataset: str, total: int, speed: float) -> UUID:
        """A job under way on a host, with its lease, its curve and its story."""
        ran = 4 + 60 * way
        steps = max(int(total * way), 1)
        job_id = self.add_job(
            "running", ran + 3, base_model=model, dataset=dataset, current_stage="training", current_step=steps,
            total_steps=total, current_epoch=int(3 * way), progress=round(5 + 90 * way, 2), attempt=1, lease_epoch=1,
            started_at=self.now - timedelta(minutes=ran), current_cost=round(3.5 * ran / 60, 2),
            estimated_completion_at=self.now + timedelta(minutes=60 * (1 - way)), last_progress_at=self.now,
        )  # fmt: skip
        loss, held = self.draw_curve(
            job_id, steps, total, start=self._random.uniform(2.1, 3.1), end=self._random.uniform(0.6, 1.1)
        )
        metrics = {
            "training_loss": round(loss, 4), "validation_loss": round(held, 4), "learning_rate": 0.00018,
            "throughput": speed, "gpu_utilization": self._random.randint(88, 99), "gpu_memory_used_gib": 47.3,
            "gpu_temperature_celsius": 64, "gpu_power_watts": 612, "gradient_norm": 0.42,
        }  # fmt: skip
        self.update_job(job_id, current_metrics=metrics)
        self.insert(
            "training_leases", job_id=job_id, epoch=1, worker_id=worker_id, user_id=self.user_id,
            claimed_at=self.now - timedelta(minutes=ran), expires_at=self.now + timedelta(hours=2),
        )  # fmt: skip
        self.tell(job_id, ran, "claimed", "A host has claimed the job (attempt 1 of 3).", attempt=1, to="initializing")
        self.tell(
            job_id,
            ran - 0.1,
            "planned",
            f"2,140 answers of 540 conversations to train on, 238 answers of 60 conversations held out, {total} steps.",
        )
        self.tell(job_id, ran - 0.3, "stage", "Loading the base model in 4 bits.", stage="loading")
        self.tell(
            job_id, ran - 1, "sample", "Answer before training.", when="before",
            prompt="My parcel has not arrived. What now?",
            answer="I am a language model and cannot track parcels. You may wish to contact the courier or the sender.",
        )  # fmt: skip
        self.tell(job_id, ran - 1.2, "started", "Training has begun: the first step is done.", to="running")
        for part in range(1, int(8 * way) + 1):
            step = part * (total // 8)
            self.tell(
                job_id, ran * (1 - part / (8 * way + 0.01)), "evaluated", f"Validation loss {held:.4f} at step {step}.",
                step=step, validation_loss=held,
            )  # fmt: skip
        return job_id

    def finish(
        self, status: str, hours_ago: float, minutes: float = 34.0, error: tuple[str, str, str] | None = None
    ) -> UUID:
        ended = self.now - timedelta(hours=hours_ago)
        code, message, hint = error or (None, None, None)
        job_id = self.add_job(
            status, hours_ago * 60 + minutes + 4, current_stage=status, attempt=1,
            current_step=320 if status == "completed" else 198, total_steps=320,
            progress=100 if status == "completed" else 61, started_at=ended - timedelta(minutes=minutes),
            completed_at=ended, final_cost=round(3.5 * minutes / 60, 2), error_code=code, error_message=message,
            error_hint=hint, lease_epoch=1, current_epoch=3 if status == "completed" else 1,
        )  # fmt: skip
        loss, held = self.draw_curve(job_id, 320 if status == "completed" else 198, 320)
        metrics = {"training_loss": round(loss, 4), "validation_loss": round(held, 4)}
        self.update_job(job_id, current_metrics=metrics)
        if status == "completed":
            folder = f"adapters/{job_id}"
            self.update_job(
                job_id, adapter_path=f"lora-models/{folder}.tar.gz", adapter_bytes=83_886_080,
                adapter_sha256=f"{self._random.getrandbits(256):064x}",
                result={"artifacts": {
                    "archive": f"{folder}.tar.gz", "adapter_config": f"{folder}/adapter_config.json",
                    "manifest": f"{folder}/manifest.json", "metrics_chart": f"{folder}/metrics_chart.png",
                }},
            )  # fmt: skip
        plain = "Cancelled by request." if status == "cancelled" else "Completed: the adapter is stored and verified."
        self.tell(job_id, hours_ago * 60, status, message or plain, to=status, cost=round(3.5 * minutes / 60, 2))
        return job_id


def trained_with(model: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What a trainer says of a run."""
    resolved = {
        "lora_alpha": 32.0, "lora_dropout": 0.05, "warmup_steps": 9, "weight_decay": 0.0, "max_length": 1024,
        "long_conversations": "cut", "validation_fraction": 0.1, "packing": True, "seed": 0,
        "early_stopping_patience": None, "schedule": "cosine", "optimizer": "adamw_torch_fused", "max_grad_norm": 1.0,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    }  # fmt: skip
    return {
        "base_model": model, "model_revision": "9c4b7a1e5f0d", "hyperparameters": asked | resolved,
        "compute_type": "bfloat16", "quantization": "nf4", "device": "cuda", "num_gpus": 1,
        "gpu_type": "NVIDIA H100 80GB HBM3", "trainable_parameters": 40_370_176,
    }  # fmt: skip


@contextmanager
def open_world(dsn: str) -> Iterator[World]:
    """One transaction with triggers off."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SET LOCAL session_replication_role = replica")
        yield World(connection)


def seed(dsn: str, *, jobs: int = 200) -> dict[str, UUID]:
    """Fill an empty database; returns some jobs by name."""
    with open_world(dsn) as world:
        hosts = [
            world.add_host("pod-atlas-7f2c", 4, "NVIDIA H100 80GB HBM3", 79.6, 4),
            world.add_host("pod-borea-19ad", 4, "NVIDIA H100 80GB HBM3", 79.6, 4),
            world.add_host("pod-ceres-c04e", 2, "NVIDIA L40S", 44.5, 2),
        ]
        named = {}
        for place in range(10):
            host = hosts[0 if place < 4 else 1 if place < 8 else 2]
            way = (0.93, 0.78, 0.66, 0.58, 0.47, 0.39, 0.28, 0.17, 0.09, 0.04)[place]
            total = (320, 480, 640, 900)[place % 4]
            speed = (1840, 9200, 3120, 5480, 21300, 9050)[place % 6] * world._random.uniform(0.97, 1.03)
            named[f"running{place}"] = world.train(
                host, way, MODELS[place % len(MODELS)], DATASETS[place % len(DATASETS)], total, round(speed, 1)
            )
        finished = 100
        for place in range(finished):
            hours = 0.3 + place * 0.41
            match place % 9:
                case 2 | 6:
                    named["failed"] = world.finish("failed", hours, 12.5, FAILURES[place % 3])
                case 4:
                    world.finish("cancelled", hours, 7.0)
                case _:
                    named["completed"] = world.finish("completed", hours, world._random.uniform(18, 75))
        for place in range(jobs - finished - 10):
            extra: dict[str, Any] = {"due": True, "need_gpus": 1}
            if place == 1:
                extra = {"due": True, "need_gpus": 8}
            elif place % 23 == 5:
                extra = {"due": False, "run_after": world.now + timedelta(minutes=20 + place)}
            named.setdefault("queued", world.add_job("queued", 90 - place * 0.9, **extra))
    return named


if __name__ == "__main__":
    import sys

    print(json.dumps({name: str(job_id) for name, job_id in seed(sys.argv[1]).items()}, indent=2))
