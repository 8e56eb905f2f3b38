"""The base model that a job asked for is found, whole, and never another."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from daemon.base_model import hub_download as hub
from daemon.base_model.candidates import checked_name
from daemon.base_model.files import MARKER, Marker
from daemon.base_model.inventory import list_models, verify_model
from daemon.base_model.pull import pull_model
from daemon.base_model.resolve import resolve_model
from daemon.errors import JobDelayed, JobFailed
from daemon.settings import Settings
from tests.doubles.hub import COMMIT, HubDouble
from training.events import ErrorCode
from training.files.model_folder import faults_of_model

NAME = "acme/small-model"


def write_shard(file: Path, tensors: dict[str, int]) -> None:
    """A safetensors file: each tensor so many float32."""
    header, offset = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [offset, offset + 4 * size]}
        offset += 4 * size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def make_model(folder: Path, shards: int = 2, tensor: int = 500, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        write_shard(folder / "model.safetensors", {"a": tensor})
        return folder
    weight_map = {}
    for number in range(1, shards + 1):
        shard = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_shard(folder / shard, {f"layer.{number}.w": tensor, f"layer.{number}.b": 10})
        weight_map |= {f"layer.{number}.w": shard, f"layer.{number}.b": shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def make_cached(root: Path, name: str = NAME, commit: str = COMMIT, ref: str | None = COMMIT) -> Path:
    """The layout of the hub's cache: blobs by hash, snapshots of links, refs."""
    repo = root / f"models--{name.replace('/', '--')}"
    plain = make_model(repo / "plain")
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    for file in plain.iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    plain.rmdir()
    if ref is not None:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(ref + "\n")
    return snapshot


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_of(tmp_path)


def settings_of(tmp_path: Path, **changes: Any) -> Settings:
    facts: dict[str, Any] = {"models_dir": tmp_path / "models", "model_downloads": False, **changes}
    return Settings(_env_file=None, database_url="postgresql://x", **facts)


@pytest.mark.parametrize("inside", ["acme/small-model", "small-model"])
async def test_a_model_is_found_in_the_models_folder(tmp_path: Path, settings: Settings, inside: str) -> None:
    folder = make_model(tmp_path / "models" / inside)
    found = await resolve_model(NAME, settings)
    assert (found.name, found.path, found.where) == (NAME, folder, "models_dir")


async def test_the_default_model_stands_in_for_none(tmp_path: Path) -> None:
    make_model(tmp_path / "models" / NAME)
    assert (await resolve_model(None, settings_of(tmp_path, default_model=NAME))).name == NAME


async def test_the_full_name_wins_over_the_short_one(tmp_path: Path, settings: Settings) -> None:
    make_model(tmp_path / "models" / "small-model")
    folder = make_model(tmp_path / "models" / NAME)
    assert (await resolve_model(NAME, settings)).path == folder


async def test_a_folder_marked_as_another_model_is_never_taken(tmp_path: Path, settings: Settings) -> None:
    folder = make_model(tmp_path / "models" / "small-model")
    Marker("other/small-model").write(folder)
    with pytest.raises(JobFailed) as raised:
        await resolve_model(NAME, settings)
    assert raised.value.code is ErrorCode.MODEL_NOT_FOUND


@pytest.mark.parametrize("below", ["", "hub"])
@pytest.mark.parametrize("setting", ["hf_home", "transformers_cache"])
@pytest.mark.parametrize("ref", [COMMIT, None])
async def test_a_model_is_found_in_the_hubs_cache(tmp_path: Path, setting: str, below: str, ref: str | None) -> None:
    snapshot = make_cached(tmp_path / "cache" / below, ref=ref)
    found = await resolve_model(NAME, settings_of(tmp_path, **{setting: tmp_path / "cache"}))
    assert (found.path, found.revision, found.where) == (snapshot, COMMIT, "cache")


async def test_of_several_snapshots_the_one_that_main_names_is_taken(tmp_path: Path) -> None:
    make_cached(tmp_path / "cache", commit="a" * 40, ref=None)
    newer = make_cached(tmp_path / "cache", commit="b" * 40, ref="b" * 40)
    assert (await resolve_model(NAME, settings_of(tmp_path, hf_home=tmp_path / "cache"))).path == newer


async def test_several_snapshots_without_a_main_are_not_guessed_among(tmp_path: Path) -> None:
    make_cached(tmp_path / "cache", commit="a" * 40, ref=None)
    make_cached(tmp_path / "cache", commit="b" * 40, ref=None)
    with pytest.raises(JobFailed):
        await resolve_model(NAME, settings_of(tmp_path, hf_home=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("folder", "config", "marker", "holds"),
    [
        ("small-model", {}, None, True),
        ("acme/small-model", {}, None, True),
        ("acme--small-model", {}, None, True),
        ("base", {"_name_or_path": NAME}, None, True),
        ("base", {}, NAME, True),
        ("base", {}, None, False),
        ("base", {"_name_or_path": "other/model"}, None, False),
        ("other/small-model", {"_name_or_path": "other/small-model"}, None, False),
        ("small-model", {}, "other/model", False),
        ("Qwen3-Next-80B", {}, None, False),
    ],
)
async def test_model_path_counts_only_when_it_holds_the_requested_model(
    tmp_path: Path, folder: str, config: dict[str, Any], marker: str | None, holds: bool
) -> None:
    path = make_model(tmp_path / "volume" / folder, **config)
    if marker:
        Marker(marker).write(path)
    settings = settings_of(tmp_path, model_path=path, default_model=NAME)
    if holds:
        assert (await resolve_model(NAME, settings)).path == path
    else:
        with pytest.raises(JobFailed) as raised:
            await resolve_model(NAME, settings)
        assert "does not say that it holds this model" in raised.value.for_the_operator


@pytest.mark.parametrize(
    "name",
    [
        "../acme/x", "/workspace/models/x", "acme/../x", "acme/x/y", "C:\\x", "acme//x", "a b", "", ".", "..",
        "acme/..", "x\n", "acme--x", "https://h/x", "-x", "é/x",
    ],
)  # fmt: skip
async def test_a_path_is_no_models_name(settings: Settings, name: str) -> None:
    with pytest.raises(JobFailed) as raised:
        checked_name(name, settings)
    assert raised.value.code is ErrorCode.INVALID_SPEC


async def test_only_models_that_the_operator_allows_are_offered(tmp_path: Path) -> None:
    make_model(tmp_path / "models" / NAME)
    with pytest.raises(JobFailed, match="does not offer") as raised:
        await resolve_model(NAME, settings_of(tmp_path, allowed_models="acme/one,acme/two"))
    assert "acme/one, acme/two" in str(raised.value.hint)


async def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, hf_home=tmp_path / "cache")
    with pytest.raises(JobFailed) as raised:
        await resolve_model(NAME, settings)
    assert raised.value.code is ErrorCode.MODEL_NOT_FOUND
    for place in (tmp_path / "models" / NAME, tmp_path / "models" / "small-model", tmp_path / "cache" / "hub"):
        assert str(place) in raised.value.for_the_operator and str(place) not in raised.value.message
    assert f"models pull {NAME}" in str(raised.value.hint)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def cut_file(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda folder: (folder / SECOND).unlink(), "shard model-00002-of-00002.* is missing"),
        (cut_file, r"shard model-00002-of-00002.safetensors has 2,\d+ bytes of 2,\d+"),
        (lambda folder: (folder / FIRST).write_bytes(b""), "00001-of-00002.* no readable"),
        (lambda folder: (folder / FIRST).write_bytes(b"\xff" * 99), "no readable"),
        (lambda folder: write_shard(folder / FIRST, {"layer.1.b": 10}), "lacks the tensor layer.1.w"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer files"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json cannot be read"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no weights"),
    ],
)  # fmt: skip
async def test_an_incomplete_model_names_what_is_missing(
    tmp_path: Path, settings: Settings, spoil: Any, fault: str
) -> None:
    folder = make_model(tmp_path / "models" / NAME)
    spoil(folder)
    with pytest.raises(JobFailed, match=fault) as raised:
        await resolve_model(NAME, settings)
    assert raised.value.code is ErrorCode.MODEL_INCOMPLETE
    assert f"models pull {NAME}" in str(raised.value.hint)


async def test_a_cache_whose_blob_is_gone_is_incomplete(tmp_path: Path) -> None:
    snapshot = make_cached(tmp_path / "cache")
    (snapshot / "model-00001-of-00002.safetensors").resolve().unlink()
    with pytest.raises(JobFailed, match=f"shard {FIRST} is missing"):
        await resolve_model(NAME, settings_of(tmp_path, hf_home=tmp_path / "cache"))


def test_pickled_weights_are_no_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", shards=1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in faults_of_model(folder)[0]


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert faults_of_model(folder) == [
        "model.safetensors.index.json names a shard outside the folder: ../../etc/passwd"
    ]


def test_models_are_listed_with_their_faults(tmp_path: Path) -> None:
    make_model(tmp_path / "models" / "acme" / "one")
    cut_file(make_model(tmp_path / "models" / "two"))
    (tmp_path / "models" / ".quantized" / "x").mkdir(parents=True)
    make_cached(tmp_path / "cache" / "hub", "acme/three")
    listed = list_models(settings_of(tmp_path, hf_home=tmp_path / "cache"))
    assert [(model.name, model.where, bool(model.faults)) for model in listed] == [
        ("acme/one", "models_dir", False), ("acme/three", "cache", False), ("two", "models_dir", True),
    ]  # fmt: skip
    assert listed[0].bytes > 4000


@pytest.mark.parametrize("cached", [False, True])
def test_a_flipped_byte_is_found_by_verifying(tmp_path: Path, cached: bool) -> None:
    settings = settings_of(tmp_path, hf_home=tmp_path / "cache")
    if cached:
        folder = make_cached(tmp_path / "cache")
    else:
        folder = make_model(tmp_path / "models" / NAME)
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
        Marker(NAME, sha256=hashes).write(folder)
    read: list[str] = []
    assert verify_model(NAME, settings, lambda name, _size: read.append(name)) == []
    assert "model-00001-of-00002.safetensors" in read
    shard = (folder / "model-00001-of-00002.safetensors").resolve()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert faults_of_model(folder) == [], "size and header do not tell"
    assert verify_model(NAME, settings)[0].startswith("model-00001-of-00002.safetensors is damaged")


# -- downloading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "source", tensor=300_000)
    (folder / "pytorch_model.bin").write_bytes(b"\x80 pickle")
    (folder / "modeling_evil.py").write_text("import os")
    (folder / "README.md").write_text("# hello")
    return folder


@pytest.fixture
def quick_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


async def test_a_model_is_pulled_marked_and_found_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    settings = settings_of(tmp_path, model_downloads=True, hf_token="hf_secret-token")
    seen: list[tuple[int, int]] = []
    async with HubDouble(NAME, source, token="hf_secret-token") as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        found = await resolve_model(NAME, settings, lambda done, total: seen.append((done, total)))
    folder = tmp_path / "models" / NAME
    assert (found.path, found.revision, found.where) == (folder, COMMIT, "hub")
    names = {file.name for file in folder.iterdir() if file.is_file()}
    assert names == {
        "config.json", "tokenizer.json", "model.safetensors.index.json", MARKER,
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "README.md",
    }  # fmt: skip
    assert seen and all(done <= total for done, total in seen)
    assert verify_model(NAME, settings) == []
    assert (await resolve_model(NAME, settings)).where == "models_dir", "without the hub now"
    assert "hf_secret-token" not in (folder / MARKER).read_text()


async def test_an_interrupted_pull_is_gone_on_with(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    settings = settings_of(tmp_path, model_downloads=True)
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    async with HubDouble(NAME, source) as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        first = "model-00001-of-00002.safetensors"
        (folder / first).write_bytes((source / first).read_bytes())
        Marker(NAME, COMMIT, complete=False).write(folder)
        found = await resolve_model(NAME, settings)
    assert found.where == "hub"
    assert faults_of_model(folder) == []


async def test_a_file_with_other_bytes_than_the_hubs_is_downloaded_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    """The hub's client goes on by Range after a cut, whatever bytes come, and compares the size alone."""
    settings = settings_of(tmp_path, model_downloads=True)
    shard = "model-00001-of-00002.safetensors"
    content = (source / shard).read_bytes()
    async with HubDouble(NAME, source) as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        double.sent_instead[shard] = content[:1000] + b"\x01" * (len(content) - 1000)
        with pytest.raises(JobDelayed, match="did not arrive as the hub has it"):
            await resolve_model(NAME, settings)
        double.sent_instead = {}
        await resolve_model(NAME, settings)
    assert (tmp_path / "models" / NAME / shard).read_bytes() == content
    assert verify_model(NAME, settings) == []


async def test_a_hub_without_the_model_says_so(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    async with HubDouble("acme/other", source) as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        with pytest.raises(JobFailed, match="the hub has no model acme/small-model") as raised:
            await resolve_model(NAME, settings_of(tmp_path, model_downloads=True))
    assert raised.value.code is ErrorCode.MODEL_NOT_FOUND
    assert not (tmp_path / "models" / NAME / "config.json").exists()


async def test_a_gated_model_says_what_it_needs(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    async with HubDouble(NAME, source) as double:
        double.status, double.error_code = 403, "GatedRepo"
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        with pytest.raises(JobFailed, match=r"gated.*HF_TOKEN"):
            await resolve_model(NAME, settings_of(tmp_path, model_downloads=True))


async def test_a_hub_that_does_not_answer_delays_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(JobDelayed) as raised:
        await resolve_model(NAME, settings_of(tmp_path, model_downloads=True))
    assert raised.value.code is ErrorCode.MODEL_NOT_FOUND


async def test_a_model_of_pickles_only_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    for file in source.glob("*.safetensors"):
        file.unlink()
    async with HubDouble(NAME, source) as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        with pytest.raises(JobFailed, match="no safetensors") as raised:
            await resolve_model(NAME, settings_of(tmp_path, model_downloads=True))
    assert raised.value.code is ErrorCode.MODEL_UNSUPPORTED


async def test_a_model_published_in_8_bits_is_refused_before_its_weights_are_downloaded(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    async with HubDouble(NAME, source) as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        for _again in range(2):
            with pytest.raises(JobFailed, match=r"published in 8 bits \(FP8\), and training needs") as raised:
                await resolve_model(NAME, settings_of(tmp_path, model_downloads=True))
            assert (
                raised.value.code is ErrorCode.MODEL_UNSUPPORTED
                and "copy of this model in 16 bits" in raised.value.hint
            )
        assert not [path for path in double.served if path.endswith(".safetensors")]


async def test_a_disk_that_is_too_small_is_found_before_a_weight_is_loaded(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    # The preflight runs in this process, with a margin that no disk has.
    monkeypatch.setattr(hub, "SPARE_BYTES", 10**18)
    async with HubDouble(NAME, source) as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        # Another test may have imported the hub's client before: with its own address, or, as a trainer does, offline.
        constants = {
            "ENDPOINT": double.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": double.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        order = hub.Order(NAME, str(tmp_path / "models" / NAME))
        answer = await asyncio.to_thread(hub.download, order)
        assert not [path for path in double.served if "/resolve/" in path and not path.endswith("/config.json")]
    assert isinstance(answer, hub.NotDone)
    assert answer.why == "disk"
    assert "GB left" in answer.message


async def test_a_cancelled_download_ends_its_process_at_once(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quick_hub: None
) -> None:
    asked = asyncio.Event()
    async with HubDouble(NAME, source) as double:
        served = double._file

        async def hang(exchange: Any, name: str) -> None:
            asked.set()
            if name.endswith(".safetensors") and exchange.method == "GET":
                await asyncio.Event().wait()
            await served(exchange, name)

        double._file = hang  # type: ignore[method-assign]
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        pulling = asyncio.create_task(pull_model(NAME, settings_of(tmp_path, model_downloads=True)))
        async with asyncio.timeout(60):
            await asked.wait()
        pulling.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(pulling, return_exceptions=True)
    assert pulling.cancelled()
    marker = json.loads((tmp_path / "models" / NAME / MARKER).read_text())
    assert marker["complete"] is False, "what is there is known to be half"
