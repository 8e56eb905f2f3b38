"""A comparison in this process: real tiny models, real trained adapters, the loss that their training measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from daemon.base_model.replace_weights import replace_weights
from tests.chat_templates import tokenizer_of
from tests.tiny_models import conversation, write_conversations, write_dataset
from tests.training.conftest import ModelOf, SpecOf, train
from training.base.make_quantized_copy import Request as CopyRequest
from training.base.make_quantized_copy import quantize
from training.comparison.contest import Contest
from training.comparison.request import Request
from training.data.chat_template import ChatTemplate
from training.data.formats.conversation import Turn
from training.data.formats.read_dataset import read_conversations
from training.data.holding_out import hold_out
from training.failures import TrainingFailed
from training.spec import JobSpec


class Told:
    """What a comparison said, line by line."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.lines = lines
        self.notices = [line["message"] for line in lines if line["kind"] == "notice"]
        self.prompts = next((line["prompts"] for line in lines if line["kind"] == "prompts"), [])
        self.sets = {held["name"]: held for line in lines if line["kind"] == "sets" for held in line["sets"]}
        self.losses = {(line["set"], line["contestant"]): line["loss"] for line in lines if line["kind"] == "loss"}

    def answers(self, who: int) -> list[str]:
        said = [line for line in self.lines if line["kind"] == "answer" and line["contestant"] == who]
        return [line["text"] for line in sorted(said, key=lambda line: int(line["prompt"]))]


def compare(model: Path, *specs: JobSpec, with_data: bool = True, **options: Any) -> Told:
    lines: list[dict[str, Any]] = []
    contestants = [
        {
            "name": spec.job_id,
            "adapter": spec.output_dir,
            **({"dataset": spec.dataset_path, "hyperparameters": spec.hyperparameters} if with_data else {}),
        }
        for spec in specs
    ]
    request = {"base_model": "tiny", "model_path": model, "max_new_tokens": 8, "contestants": contestants, **options}
    Contest(Request.model_validate(request), lines.append).run()
    assert lines[-1] == {"kind": "done"}
    return Told(lines)


@pytest.mark.parametrize("architecture", ["qwen3", pytest.param("qwen3_next", marks=pytest.mark.system)])
def test_the_loss_is_the_one_that_training_measured_and_the_base_is_itself(
    architecture: str, spec_of: SpecOf, tiny: ModelOf
) -> None:
    """A mixture's adapters may differ in their target_parameters: PEFT holds no two of those on one model."""
    one = spec_of(architecture, name="one", num_epochs=2)
    other = spec_of(architecture, name="other", target_modules=["q_proj", "v_proj"], dataset_path=one.dataset_path)
    kept = {spec.job_id: train(spec).all("adapter_saved")[0].summary for spec in (one, other)}
    told = compare(tiny(architecture), one, other, quantize=True)
    assert told.sets["common"]["digest"] == told.sets["1"]["digest"] == told.sets["2"]["digest"]
    assert told.losses["common", 0] == pytest.approx(kept["one"]["initial_validation_loss"], rel=2e-3)
    assert told.losses["common", 1] == pytest.approx(kept["one"]["final_validation_loss"], rel=2e-3)
    assert told.losses["common", 2] == pytest.approx(kept["other"]["final_validation_loss"], rel=2e-3)
    assert told.losses["1", 1] == told.losses["common", 1]
    assert len(told.answers(0)) == len(told.prompts) == told.sets["common"]["conversations"]
    assert told.prompts[0]["reference"].startswith("The ")
    # An adapter taken off leaves nothing: whoever comes first answers as he does when he comes last.
    turned = compare(tiny(architecture), other, one, quantize=True)
    assert turned.answers(0) == told.answers(0)
    assert turned.answers(1) == told.answers(2) and turned.answers(2) == told.answers(1)


def test_the_common_set_is_what_none_was_trained_on(spec_of: SpecOf, tiny: ModelOf, tmp_path: Path) -> None:
    """Two datasets that overlap: what one job held out, the other may have been trained on."""
    one = spec_of(name="one", seed=0, dataset_path=write_conversations(tmp_path / "one.jsonl", 24))
    later = write_dataset(tmp_path / "later.jsonl", [conversation(number) for number in range(8, 40)])
    other = spec_of(name="other", seed=1, dataset_path=later)
    for spec in (one, other):
        train(spec)
    told = compare(tiny("qwen3"), one, other, most_prompts=100)
    assert 0 < told.sets["common"]["conversations"] < told.sets["1"]["conversations"] + told.sets["2"]["conversations"]
    assert "left out of the common set: one of the jobs was trained on them" in told.notices[0]
    # Each adapter is measured on its own set and on the common one, never on the other's.
    assert {key for key in told.losses if key[0] == "1"} == {("1", 0), ("1", 1)}
    assert {key for key in told.losses if key[0] == "2"} == {("2", 0), ("2", 2)}
    assert {key for key in told.losses if key[0] == "common"} == {("common", who) for who in range(3)}
    asked = {prompt["turns"][-1]["content"] for prompt in told.prompts}
    assert len(asked) == told.sets["common"]["conversations"]
    for spec in (one, other):
        rows = read_conversations(spec.dataset_path).conversations
        sides = hold_out(rows, spec.hyperparameters.validation_fraction, spec.hyperparameters.seed)
        assert asked.isdisjoint(row.turns[0].content for row in sides.train)


def test_what_is_not_known_is_said_and_prompts_come_from_a_file(spec_of: SpecOf, tiny: ModelOf, tmp_path: Path) -> None:
    spec = spec_of(name="one")
    train(spec)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What colour is the cat?\n\nAnd the dog?\n")
    told = compare(tiny("qwen3"), spec, with_data=False, prompts=prompts)
    assert [prompt["turns"][-1]["content"] for prompt in told.prompts] == ["What colour is the cat?", "And the dog?"]
    assert told.sets == {} and told.losses == {}
    given = compare(tiny("qwen3"), spec, with_data=False, held_out=spec.dataset_path, most_prompts=3)
    assert given.sets["common"]["unknown"] == [1] and given.sets["common"]["conversations"] == 24
    assert len(given.prompts) == 3
    with pytest.raises(TrainingFailed, match="no held-out conversation to ask"):
        compare(tiny("qwen3"), spec, with_data=False)

    def at(temperature: float, seed: int) -> list[str]:
        asked: dict[str, Any] = {"prompts": prompts, "temperature": temperature, "seed": seed}
        return compare(tiny("qwen3"), spec, with_data=False, **asked).answers(1)

    # Drawn answers are the same for the same seed; greedy ones always.
    assert at(2.0, 1) == at(2.0, 1) != at(2.0, 2)
    assert at(0.0, 1) == at(0.0, 2)


def test_the_prompts_are_made_with_what_the_adapter_s_manifest_says(tmp_path: Path) -> None:
    tokenizer, stops = tokenizer_of("qwen3_6")
    template = ChatTemplate(tokenizer, stops=stops)
    prompts: dict[str | tuple[str, str], str] = {}
    for folder, told in (("a", {"enable_thinking": True}), ("b", {"enable_thinking": False})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").write_text(json.dumps({"serving": {"chat_template_kwargs": told}}))
    # Of an earlier version, which said nothing of this: it is asked as one that is told nothing.
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text("{}")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "manifest.json").write_text(json.dumps({"serving": {"chat_template_kwargs": {}}}))
    for names in ("a", "b", "ba", ("old", "p"), ("p", "old")):
        contestants = [{"name": name, "adapter": tmp_path / name} for name in names]
        request = {"base_model": "tiny", "model_path": tmp_path, "contestants": contestants}
        lines: list[dict[str, Any]] = []
        Contest(Request.model_validate(request), lines.append)._ask_as_trained(template)
        prompts[names] = template.prompt((Turn("user", "Hello?", trained=False),))
        assert len(lines) == (len(names) == 2 and names[0] in "ab")
    assert prompts["p", "old"] == prompts["old", "p"] == prompts["a"]
    assert prompts["a"].endswith("<think>\n") and prompts["b"] == prompts["ba"]
    assert prompts["b"].endswith("</think>\n\n")


def test_a_base_model_of_which_the_4_bit_copy_alone_is_kept_is_loaded_from_it(
    spec_of: SpecOf, tiny: ModelOf, tmp_path: Path
) -> None:
    spec = spec_of("qwen3", name="one")
    train(spec)
    folder = shutil.copytree(tiny("qwen3"), tmp_path / "model")
    copy = quantize(folder, CopyRequest("tiny", "cpu", tmp_path / "copies", spec.compute_type))["path"]
    whole = compare(folder, spec, quantize=True)
    replace_weights(folder, Path(str(copy)))
    kept = compare(folder, spec)
    assert {"kind": "options", "quantize": True} in kept.lines
    assert kept.losses == whole.losses and kept.answers(1) == whole.answers(1)


def test_an_adapter_that_is_not_read_whole_is_refused_before_anything_is_asked(spec_of: SpecOf, tiny: ModelOf) -> None:
    spec = spec_of(name="one")
    train(spec)
    weights = spec.output_dir / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[2:]), weights, {"format": "pt"})
    with pytest.raises(TrainingFailed, match=r"the adapter one cannot be opened .* lacks weights for 2 places"):
        compare(tiny("qwen3"), spec)
    more = {name.replace("layers.0", "layers.7"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, weights, {"format": "pt"})
    with pytest.raises(TrainingFailed, match=rf"reads only {len(tensors)} of its {len(tensors | more)} tensors"):
        compare(tiny("qwen3"), spec)
