"""`evaluate`: what it counts is what was decoded, and what does not belong together is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from eagle_offline.config import EvaluateSettings
from eagle_offline.evaluation_page import render_text, task_rows
from eagle_offline.serving.evaluate import names_of
from eagle_offline.serving.evaluation import Evaluator
from eagle_offline.serving.results import Evaluation
from eagle_offline.stages import evaluate
from eagle_offline.training.state import best_checkpoint
from tests.builders import CHATML, SCRATCH, run_cli, save_target, shared_target, write_jsonl
from tests.training.caches import latest, settings, train

QUESTIONS = [
    {"task": "colours", "turns": ["red or green?", "and blue?"]},
    {"task": "sums", "prompt": "one two three"},
    {"task": "colours", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "blue"}]},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that learned a little."""
    directory = tmp_path_factory.mktemp("evaluated") / "run"
    train(settings(directory, num_epochs=2))
    return directory


@pytest.fixture(scope="module")
def parallel_run(tmp_path_factory) -> Path:
    """A P-EAGLE draft of the same target: other layers read, another draft vocabulary."""
    directory = tmp_path_factory.mktemp("parallel") / "run"
    changes = {"aux_layer_ids": (1, 3), "draft_vocab_size": 150, "num_draft_layers": 2}
    train(settings(directory, num_epochs=12, objective="peagle", **changes))
    return directory


@pytest.fixture(scope="module")
def compared(run, parallel_run, questions, tmp_path_factory) -> tuple[Evaluation, Path]:
    page = tmp_path_factory.mktemp("compared")
    given = {"compare": (str(parallel_run),), "compare_untrained": True, "output_dir": page}
    return evaluate(chosen(run, questions, **given)), page


@pytest.fixture(scope="module")
def questions() -> Path:
    return write_jsonl(SCRATCH / "questions.jsonl", QUESTIONS)


@pytest.fixture(scope="module")
def found(run, questions, tmp_path_factory) -> tuple[Evaluation, Path]:
    page = tmp_path_factory.mktemp("evaluation")
    return evaluate(chosen(run, questions, compare_untrained=True, output_dir=page)), page


def chosen(run: Path, questions: Path, **changes: object) -> EvaluateSettings:
    values = {
        "draft": str(run), "target": str(shared_target()), "prompts": str(questions), "num_draft_tokens": 3,
        "max_new_tokens": 12, "batch_size": 2, "device": "cpu",
    }  # fmt: skip
    return EvaluateSettings(**{**values, **changes})


def command(run: Path, questions: Path, *more: object):
    return run_cli(
        "evaluate", "--draft", run, "--target", shared_target(), "--prompts", questions, "--max-new-tokens", 6, *more
    )


def one_error(ended) -> str:
    lines = [line for line in ended.err.splitlines() if not line.startswith("evaluate:")]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_greedy_answers_are_those_without_a_draft(found):
    evaluation, _ = found
    assert evaluation.num_answers >= 3
    assert evaluation.num_identical == evaluation.num_answers
    assert {result.num_tokens for result in evaluation.drafters.values()} == {evaluation.plain.num_tokens}


def test_real_accept_length_is_the_walked_one(found):
    for result in found[0].drafters.values():
        assert result.accept_length == pytest.approx(result.walked_accept_length, abs=1e-9)
        for task in result.tasks.values():
            assert task.accept_length == pytest.approx(task.walked_accept_length, abs=1e-9)


def test_figures_add_up(found):
    evaluation, _ = found
    for result in evaluation.drafters.values():
        assert result.accept_length == pytest.approx(1 + sum(result.accept_rate))
        assert sum(task.num_rounds for task in result.tasks.values()) == result.num_rounds
        assert sum(task.num_tokens for task in result.tasks.values()) == result.num_tokens
        assert sum(task.num_answers for task in result.tasks.values()) == evaluation.num_answers
        products = torch.tensor(result.conditional_accept_rate).cumprod(0)
        assert products.tolist() == pytest.approx(result.accept_rate)
        assert result.speedup == pytest.approx(result.tokens_per_second / evaluation.plain.tokens_per_second)
    assert set(evaluation.drafters["trained"].tasks) == {"colours", "sums"}
    assert list(evaluation.drafters) == ["trained", "untrained"]


def test_the_page_and_its_figures_are_on_disk(found):
    evaluation, directory = found
    assert Evaluation.model_validate_json((directory / "evaluation.json").read_bytes()) == evaluation
    page = (directory / "evaluation.html").read_text()
    assert re.findall(r'<img src="([^"]+)"', page) == ["decoding.png"]
    assert (directory / "decoding.png").read_bytes().startswith(b"\x89PNG")
    assert f"{evaluation.drafters['trained'].accept_length:.2f}" in page


def test_drafts_of_both_kinds_are_decoded_beside_one_another(compared, found, run, parallel_run, questions):
    evaluation, _ = compared
    # The draft in question lies in a directory called run, too.
    name = f"{parallel_run.parent.name}/run"
    assert list(evaluation.drafters) == ["trained", "untrained", name]
    assert evaluation.compared == {name: str(parallel_run)}
    assert evaluation.num_identical == evaluation.num_answers
    chain, parallel = evaluation.drafters["trained"], evaluation.drafters[name]
    # Each as it is when it is evaluated by itself.
    alone = evaluate(chosen(parallel_run, questions)).drafters["trained"]
    for name in ("num_rounds", "num_tokens", "accept_rate", "walked_accept_length", "simulated_accept_length"):
        assert getattr(parallel, name) == getattr(alone, name), name
        assert getattr(chain, name) == getattr(found[0].drafters["trained"], name), name
    for result in (chain, parallel):
        assert result.accept_length == pytest.approx(result.walked_accept_length, abs=1e-9)
    assert parallel.accept_rate[0] > 0, "it learned too little to tell"
    assert (chain.draft_forwards_per_round, parallel.draft_forwards_per_round) == (3, 1)
    assert chain.draft_forwards % 3 == 0
    assert 0 < parallel.draft_forwards < chain.draft_forwards


def test_an_untrained_p_eagle_draft_has_its_shape(parallel_run, questions):
    evaluation = evaluate(chosen(parallel_run, questions, compare_untrained=True))
    trained, untrained = evaluation.drafters.values()
    assert untrained.draft_forwards_per_round == 1
    assert untrained.accept_length == pytest.approx(untrained.walked_accept_length, abs=1e-9)
    assert trained.accept_length > untrained.accept_length


def test_the_page_shows_several_drafts_side_by_side(compared, run, tmp_path):
    evaluation, directory = compared
    assert Evaluation.model_validate_json((directory / "evaluation.json").read_bytes()) == evaluation
    page = (directory / "evaluation.html").read_text()
    ((name, compared_directory),) = evaluation.compared.items()
    assert (directory / "decoding.png").read_bytes().startswith(b"\x89PNG")
    for said in (
        f"<th>trained</th><th>untrained</th><th>{name}</th>",
        "draft forwards a round",
        compared_directory,
    ):
        assert said in page
    for result in evaluation.drafters.values():
        assert f"<td>{result.accept_length:.2f}</td>" in page
    ended = run_cli("report", "--run", run, "--output-dir", tmp_path, "--evaluation", directory)
    assert ended.code == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["draft", "forwards", "a", "round", "3.00", "3.00", "1.00"] in lines


def test_figures_of_another_version_are_refused_in_one_line(run, found, tmp_path):
    figures = json.loads((found[1] / "evaluation.json").read_text())
    del figures["drafters"]["trained"]["draft_forwards_per_round"]
    (tmp_path / "evaluation.json").write_text(json.dumps(figures))
    ended = run_cli("report", "--run", run, "--output-dir", tmp_path / "page", "--evaluation", tmp_path)
    assert ended.code == 4
    assert "write one with evaluate" in one_error(ended)


@pytest.mark.parametrize(
    ("directories", "names"),
    [
        (["runs/peagle"], ["peagle"]),
        (["a/export/flat", "b/export/flat", "c/flat"], ["a/export/flat", "b/export/flat", "c/flat"]),
        (["a/one", "b/two/"], ["one", "two"]),
        (["x/trained", "plain"], ["x/trained", "plain (2)"]),
        (["a/b", "a/b", "a/b"], ["b", "b (2)", "b (3)"]),
        (["flat", "x/flat"], ["flat", "x/flat"]),
        (["org/draft", "other/draft"], ["org/draft", "other/draft"]),
        (["."], ["."]),
        ([], []),
    ],
)
def test_names_of_drafts_are_short_and_no_two_alike(directories, names):
    assert names_of(directories, ("plain", "trained", "untrained")) == names


def test_a_compared_draft_of_another_target_is_refused_in_one_line(run, questions, tmp_path):
    other = tmp_path / "other"
    train(settings(other, num_epochs=1))
    origin = best_checkpoint(other) / "origin.json"
    content = json.loads(origin.read_text())
    origin.write_text(json.dumps(content | {"target_digest": "0" * 32}))
    shutil.copytree(best_checkpoint(other), tmp_path / "draft")
    for path in (tmp_path / "draft").glob("*state*"):
        path.unlink()
    ended = command(run, questions, "--compare", tmp_path / "draft")
    assert ended.code == 3, ended.err
    assert f"{tmp_path / 'draft'} was made for" in one_error(ended)
    ended = command(run, questions, "--compare", tmp_path / "nowhere")
    assert ended.code == 2
    assert "--compare" in one_error(ended)


def test_a_report_shows_real_decoding_when_it_is_given(run, found, tmp_path):
    ended = run_cli("report", "--run", run, "--output-dir", tmp_path, "--evaluation", found[1])
    assert ended.code == 0, ended.err
    assert "real decoding, 3 drafts" in ended.out
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"]["num_draft_tokens"] == 3
    assert set(re.findall(r'<img src="([^"]+)"', (tmp_path / "report.html").read_text())) == {
        "decoding.png", "curves.png"
    }  # fmt: skip
    assert (tmp_path / "decoding.png").is_file()
    assert run_cli("report", "--run", run, "--output-dir", tmp_path, "--evaluation", tmp_path / "none").code == 4


def test_sampled_decoding_is_a_function_of_its_seed(run, questions):
    one, same, other = (
        evaluate(chosen(run, questions, temperature=1.0, top_p=0.9, seed=seed)).drafters["trained"]
        for seed in (1, 1, 2)
    )
    assert (one.num_tokens, one.num_rounds, one.accept_rate) == (same.num_tokens, same.num_rounds, same.accept_rate)
    assert (one.num_rounds, one.accept_rate) != (other.num_rounds, other.accept_rate)


def test_predictions_beside_sampled_decoding_are_called_greedy(run, questions, found):
    sampled = evaluate(chosen(run, questions, temperature=1.0, max_prompts=1))
    for evaluation, names in ((found[0], ("walked", "simulated")), (sampled, ("walked, greedy", "simulated, greedy"))):
        lines = [re.split(r"\s{2,}", line.strip()) for line in render_text(evaluation).splitlines()]
        assert [line[0] for line in lines if line[0].startswith(("walked", "simulated"))] == list(names)
        assert task_rows(evaluation.model_dump(mode="json"))[0][4:6] == names


def test_a_temperature_of_next_to_nothing_is_greedy(run, questions, found):
    cold = evaluate(chosen(run, questions, temperature=1e-320)).drafters["trained"]
    assert cold.accept_rate == found[0].drafters["trained"].accept_rate


def test_the_command_prints_the_tables(run, questions):
    ended = command(run, questions, "--max-prompts", 1)
    assert ended.code == 0, ended.err
    for line in ("accept length", "walked", "simulated", "accepted at depth 5", "speed-up", "drafting, s", "colours"):
        assert line in ended.out
    assert "sums" not in ended.out


def test_a_checkpoint_and_both_exports_decode_as_the_run_does(run, questions, found, tmp_path):
    ended = run_cli("export", run, "--target", shared_target(), "--output-dir", tmp_path / "out", "--dtype", "fp32")
    assert ended.code == 0, ended.err
    for draft in (best_checkpoint(run), tmp_path / "out" / "flat", tmp_path / "out" / "speculators"):
        again = evaluate(chosen(draft, questions)).drafters["trained"]
        assert again.accept_rate == found[0].drafters["trained"].accept_rate, draft


def test_exports_of_a_p_eagle_run_are_clean_and_decode_as_the_run_does(parallel_run, questions, tmp_path):
    trained = evaluate(chosen(parallel_run, questions)).drafters["trained"]
    ended = run_cli("export", parallel_run, "--target", shared_target(), "--output-dir", tmp_path, "--dtype", "fp32")
    assert ended.code == 0, ended.err
    for layout in ("flat", "speculators"):
        ended = run_cli("export", "--check", tmp_path / layout, "--engine", "vllm", "--target", shared_target())
        assert ended.code == 0, ended.out
        again = evaluate(chosen(tmp_path / layout, questions)).drafters["trained"]
        assert (again.accept_rate, again.draft_forwards) == (trained.accept_rate, trained.draft_forwards)
    for engine in ("sglang", "eagle"):
        ended = run_cli("export", "--check", tmp_path / "flat", "--engine", engine)
        assert ended.code != 0
        assert "P-EAGLE is not served" in ended.out


def changed_target(directory: Path, **changes: object) -> Path:
    return save_target(directory, template=CHATML, **changes)


def test_a_draft_of_another_target_is_refused_in_one_line(run, questions, tmp_path):
    same_shape = changed_target(tmp_path / "weights", seed=7)
    for target, said in (
        (changed_target(tmp_path / "wide", hidden_size=48), "hidden size"),
        (changed_target(tmp_path / "vocabulary", vocab_size=300), "vocabulary size"),
        (changed_target(tmp_path / "deep", num_hidden_layers=9), "number of layers"),
        (same_shape, "digest"),
    ):
        ended = run_cli("evaluate", "--draft", run, "--target", target, "--prompts", questions)
        assert ended.code == 3, ended.err
        assert said in one_error(ended)
    ended = run_cli("evaluate", "--draft", run, "--target", same_shape, "--prompts", questions, "--any-target",
                    "--max-new-tokens", 3)  # fmt: skip
    assert ended.code == 0, ended.err


def test_bad_input_gives_one_line_and_its_code(run, questions, tmp_path):
    torn = Path(shutil.copytree(latest(run), tmp_path / "torn"))
    content = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(content[: len(content) // 2])
    empty = tmp_path / "empty"
    empty.mkdir()
    no_question = write_jsonl(tmp_path / "bad.jsonl", [{"text": "?"}])
    cases = [
        (("--draft", torn, "--target", shared_target()), 4),
        (("--draft", empty, "--target", shared_target()), 4),
        (("--draft", tmp_path / "nowhere", "--target", shared_target()), 2),
        (("--draft", run, "--target", tmp_path / "nowhere"), 2),
        (("--draft", run, "--target", empty), 4),
        (("--draft", run, "--target", shared_target(), "--prompts", no_question), 4),
        (("--draft", run, "--target", shared_target(), "--top-p", 0), 2),
        (("--draft", run, "--target", shared_target(), "--temperature", -1), 2),
        (("--draft", run, "--target", shared_target(), "--temperature", "nan"), 2),
        (("--draft", run, "--target", shared_target(), "--temperature", 1, "--seed", 10**20), 2),
        (("--draft", run), 2),
    ]
    for arguments, code in cases:
        ended = run_cli("evaluate", *arguments)
        assert ended.code == code, (arguments, ended.err)
        one_error(ended)


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_decoded(run, questions, tmp_path):
    (tmp_path / "file").write_text("x")
    ended = command(run, questions, "--output-dir", tmp_path / "file")
    assert ended.code == 2
    assert "cannot be written" in one_error(ended)
    assert "evaluate:" not in ended.err
    assert run_cli("export", run, "--target", shared_target(), "--output-dir", tmp_path / "file").code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_evaluation_in_one_line(number, run, questions, monkeypatch):
    original = Evaluator._answer

    def interrupted(self, *arguments):
        os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(Evaluator, "_answer", interrupted)
    ended = command(run, questions, "--batch-size", 1)
    assert ended.code == 5
    assert "stopped by a signal after 1 answers" in one_error(ended)


def test_turns_after_an_answer_that_reached_the_limit_are_counted(run, tmp_path):
    rows = [{"turns": ["red?", "blue?", "green?"]}]
    evaluation = evaluate(chosen(run, write_jsonl(tmp_path / "p.jsonl", rows), max_new_tokens=1))
    assert (evaluation.num_answers, evaluation.num_unasked) == (1, 2)


def test_a_run_is_not_checked_as_if_it_were_an_export(run):
    ended = run_cli("export", "--check", run)
    assert ended.code == 3
    assert f"{run}: a run, which no engine reads: export it first" in one_error(ended)


def test_a_run_without_a_best_checkpoint_says_which_is_taken(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    exported = ("--target", shared_target(), "--to", "flat", "--dtype", "fp32")
    assert "none is best" not in run_cli("export", copy, *exported).err
    (copy / "best").unlink()
    ended = run_cli("export", copy, *exported)
    assert ended.code == 0
    assert f"RUN {copy}: nothing was validated, none is best: {latest(copy).name} is taken" in ended.err


def test_export_writes_or_checks_but_not_both(run, tmp_path):
    for arguments in (("export",), ("export", run, "--check", tmp_path)):
        ended = run_cli(*arguments)
        assert ended.code == 2
        assert "one of the two" in one_error(ended)


def test_prompts_longer_than_the_target_takes_are_left_out_and_counted(run, tmp_path):
    rows = [{"prompt": "red " * 2000}, {"prompt": "blue"}]
    questions = write_jsonl(tmp_path / "long.jsonl", rows)
    assert evaluate(chosen(run, questions)).num_left_out == 1
    ended = command(run, write_jsonl(tmp_path / "all.jsonl", rows[:1]))
    assert ended.code == 4
    assert "lower --max-new-tokens" in one_error(ended)
