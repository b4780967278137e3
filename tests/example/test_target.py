"""The example target: tokenizer, template, and a training that can be stopped anywhere."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle_offline.errors import StoppedEarly
from eagle_offline.example import target
from eagle_offline.example.corpus import generate_conversations, read_conversations, write_corpus
from eagle_offline.example.target import (
    ExampleTargetConfig,
    build_tokenizer,
    encode_conversation,
    plan_batches,
    train_target,
)

MICRO = ExampleTargetConfig(
    hidden_size=32,
    num_hidden_layers=4,
    intermediate_size=48,
    vocab_size=400,
    steps=8,
    warmup_steps=2,
    tokens_per_batch=512,
)


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory / "train.jsonl", directory / "heldout.jsonl", 40, 10, seed=0)
    return directory / "train.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    texts = [m["content"] for line in generate_conversations(100, seed=0) for m in line["messages"]]
    return build_tokenizer(texts, 600)


@pytest.fixture(scope="module")
def trained(corpus_file, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained") / "model"
    return output_dir, train_target(corpus_file, output_dir, MICRO)


def test_tokenizer_returns_any_text_unchanged(tokenizer):
    texts = [m["content"] for line in generate_conversations(200, seed=9) for m in line["messages"]]
    for text in [*texts, "  two  spaces\n\n\ttab ", "Zoë says 你好 🙂", "1234.50"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_template_renders_every_role_and_the_generation_prompt(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert rendered == prompt + "Yes.<|im_end|>\n"
    assert "generation %}" not in tokenizer.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_assistant_tokens_are_the_answers_with_their_end_of_turn(tokenizer):
    messages = next(line["messages"] for line in generate_conversations(50, 0) if len(line["messages"]) > 4)
    example = encode_conversation(tokenizer, messages, 10_000)
    chosen = [i for i, supervised in zip(example.input_ids, example.loss_mask, strict=True) if supervised]
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(chosen) == "".join(answers)


def test_batches_stay_below_the_limit_and_an_epoch_holds_everything_once():
    lengths = [10 + 7 * (index % 23) for index in range(100)]
    config = MICRO.model_copy(update={"steps": 200})
    plan = plan_batches(lengths, config)
    assert len(plan) == 200
    assert all(len(batch) * max(lengths[i] for i in batch) <= 512 for batch in plan)
    first_epoch, seen = [], 0
    while seen < 100:
        first_epoch += plan[len(first_epoch) : len(first_epoch) + 1]
        seen += len(first_epoch[-1])
    assert sorted(i for batch in first_epoch for i in batch) == list(range(100))


def test_trained_target_loads_and_ends_at_the_end_of_turn(trained):
    output_dir, summary = trained
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.vocab["<|im_end|>"]
    assert model.config.num_hidden_layers == MICRO.num_hidden_layers
    assert summary["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert tokenizer.chat_template == target.CHAT_TEMPLATE


def test_training_lowers_the_loss(corpus_file, tmp_path):
    losses = []
    config = MICRO.model_copy(update={"steps": 40})
    train_target(corpus_file, tmp_path / "model", config, report=lambda step, steps, loss: losses.append(loss))
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("stops", [[3], [1, 5, 7]])
def test_interrupted_training_gives_the_weights_of_an_uninterrupted_one(corpus_file, trained, tmp_path, stops):
    for stop in stops:
        steps_done = [0]
        with pytest.raises(StoppedEarly):
            train_target(
                corpus_file,
                tmp_path / "model",
                MICRO,
                report=lambda step, steps, loss, done=steps_done: done.__setitem__(0, step),
                should_stop=lambda done=steps_done, stop=stop: done[0] >= stop,
            )
        assert target.read_summary(tmp_path / "model") is None
    resumed_steps = []
    summary = train_target(
        corpus_file, tmp_path / "model", MICRO, report=lambda step, steps, loss: resumed_steps.append(step)
    )
    assert resumed_steps == list(range(stops[-1] + 1, MICRO.steps + 1))
    assert summary["assistant_loss"] == trained[1]["assistant_loss"]
    resumed = load_file(tmp_path / "model" / "model.safetensors")
    uninterrupted = load_file(trained[0] / "model.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_finished_training_is_not_repeated_but_another_setting_or_corpus_is(corpus_file, trained, tmp_path):
    def count_steps(file, config):
        taken = []
        train_target(file, tmp_path / "model", config, report=lambda step, steps, loss: taken.append(step))
        return len(taken)

    assert count_steps(corpus_file, MICRO) == 8
    assert count_steps(corpus_file, MICRO) == 0
    assert count_steps(corpus_file, MICRO.model_copy(update={"steps": 3})) == 3
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"".join(corpus_file.read_bytes().splitlines(keepends=True)[:-1]))
    assert len(read_conversations(other)) == 39
    assert count_steps(other, MICRO.model_copy(update={"steps": 3})) == 3


def test_training_leaves_the_random_state_of_the_caller_alone(corpus_file, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_target(corpus_file, tmp_path / "model", MICRO.model_copy(update={"steps": 1}))
    assert torch.equal(torch.rand(3), expected)
