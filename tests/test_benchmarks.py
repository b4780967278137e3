"""Every benchmark runs, tiny, so that none rots, and its rows follow the schema."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import (
    ablation,
    ablation_peagle,
    accept_by_encoding,
    accept_lengths,
    cache_size,
    capture_speed,
    data_wait,
    harness,
    interop,
    open_speed,
    quickstart,
    read_speed,
    startup,
    synthetic_cache,
    tokenize_speed,
    train_step,
)
from benchmarks.harness import Row, read_rows
from eagle_offline.pipeline import run_pipeline
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training import corpus


def test_every_benchmark_is_listed_and_says_its_question():
    for name in (*harness.BENCHMARKS, *harness.SEPARATE):
        module = harness.load(name)
        assert name == module.NAME
        assert module.QUESTION.strip().split("\n")[0].endswith("?")


def test_committed_rows_follow_the_schema():
    for path in harness.RESULTS.glob("*.jsonl"):
        if not path.name.startswith("gpu_tests"):
            assert all(row.benchmark in (*harness.BENCHMARKS, *harness.SEPARATE) for row in read_rows(path))


def test_startup_measures_what_it_says():
    figures = startup._measure(repeats=1)
    assert figures["bare_python_seconds"] < figures["help_seconds"]


TINY_SIZES = cache_size.Sizes(
    hidden_size=128, vocab_size=1024, draft_vocab_size=256, seq_length=256, num_samples=3, num_compared=32
)


def test_cache_size_measures_every_choice():
    found = {name: cache_size.measure(choice, TINY_SIZES) for name, choice in cache_size.CHOICES.items()}
    sizes = {name: figures["kib_per_token"] for name, figures in found.items()}
    assert sizes["planes, 2 mantissa bits"] < sizes["planes, 4 mantissa bits"] < sizes["planes"] < sizes["raw"]
    assert sizes["planes, top 64"] < sizes["planes, dense"]
    exact = [figures for name, figures in found.items() if name.startswith(("planes, zarr", "raw"))]
    assert all(figures["aux_error"] == figures["kl_mean"] == 0 for figures in [found["planes"], *exact])
    assert found["fp8"]["aux_error_without_massive"] > 0
    assert 0 < found["planes, 4 mantissa bits"]["kl_mean"] < found["planes, 2 mantissa bits"]["kl_mean"]


def test_cache_size_does_not_depend_on_threads():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cache_size._corpus.cache_clear()
            found.append(cache_size.measure(cache_size.CHOICES["planes, dense"], TINY_SIZES))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_read_speed_reads_every_encoding():
    small = {"num_samples": 2, "hidden_size": 64, "repeats": 1}
    for choice in read_speed._CHOICES.values():
        assert all(value > 0 for value in read_speed.measure(choice, **small).values())
    assert all(value > 0 for value in read_speed.measure_threads(read_speed._CHOICES["planes"], 2, **small).values())
    assert all(value > 0 for value in read_speed.compare_fp8(**small).values())


def test_open_speed_opens_with_the_index_and_without():
    figures = open_speed.measure(num_shards=3, shard_size=5)
    assert figures["samples"] == 15
    assert all(value > 0 for value in figures.values())


TINY = synthetic_cache.Shape(
    hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, draft_vocab_size=64
)


def test_data_wait_delivers_trains_and_grows():
    delivery = data_wait.measure_delivery(TINY, 6, 1024, repeats=1)
    assert all(value > 0 for value in delivery.values())
    assert 0 <= data_wait.measure_training(TINY, 8, 512, max_steps=3)["data_wait_share"] < 1
    sizes = data_wait.measure_sizes(TINY, (4, 8), 1024, num_packs=3, repeats=1)
    assert sizes["reading_4_over_4"] == sizes["training_4_over_4"] == 1
    assert sizes["training_8_over_4"] > 0
    assert data_wait.measure_device("cpu", TINY, 8, 1024, num_steps=4)["tokens_per_second"] > 0


def test_train_step_takes_the_same_step_every_way():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny = train_step.Setting(tuple(shape.items()), draft_vocab_size=64, num_samples=3, seq_length=128, ttt_steps=3)
    work = train_step.Work("cpu", tiny)
    losses = [work.run(way) for way in train_step.WAYS]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


MICRO_PIPELINE = """
stages:
  - make-corpus:
      {train_file: "{work}/train.jsonl", heldout_file: "{work}/heldout.jsonl", num_conversations: 24,
       heldout_conversations: 6}
  - train-target: {train_file: "{work}/train.jsonl", output_dir: "{work}/target", steps: 3}
  - precompute: {target_model: "{work}/target", input_data: "{work}/train.jsonl", output_dir: "{work}/cache"}
  - train:
      {cache: "{work}/cache", output_dir: "{work}/run", ttt_steps: 2, num_epochs: 1, heldout_share: 0.3,
       tokens_per_batch: 1024}
  - evaluate:
      {draft: "{work}/run", target: "{work}/target", prompts: "{work}/heldout.jsonl", max_prompts: 2,
       max_new_tokens: 4, num_draft_tokens: 2, compare_untrained: true, output_dir: "{work}/evaluation"}
  - report:
      {run: "{work}/run", output_dir: "{work}/report", stages_file: "{work}/stages.json",
       evaluation: "{work}/evaluation"}
"""


@pytest.mark.parametrize("shape", [capture_speed.SMALL, capture_speed.QWEN3_30B_A3B], ids=lambda shape: shape.kind)
def test_capture_speed_goes_through_the_same_samples_every_way(shape):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if "num_experts" in shape.config:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    tiny = dataclasses.replace(
        shape, config=sizes, seq_length=128, num_samples=6, shard_size=2, draft_vocab_size=50, dtype=torch.float32
    )
    figures = capture_speed.measure(tiny, "cpu", repeats=1)
    assert figures["padding_of_nemo_like"] > 0.5 > 0.1 > figures["padding_of_ours"] >= 0
    assert figures["ours_over_nemo_like_speed"] > 0
    assert 0 <= figures["waited_for_disk_share"] < 1
    assert figures["written_mb_per_s"] * figures["ours_s"] * 1e6 / figures["tokens"] > 2 * 3 * 64 * 0.5


def test_tokenize_speed_is_of_the_same_rows():
    figures = tokenize_speed.measure(num_conversations=60, repeats=1)
    assert figures["several_over_one_speed"] == pytest.approx(
        figures["several_rows_per_s"] / figures["one_rows_per_s"], rel=1e-6
    )


def test_quickstart_row_reads_what_a_pipeline_achieved(tmp_path):
    pipeline = tmp_path / "micro.yaml"
    pipeline.write_text(MICRO_PIPELINE)
    figures = quickstart.measure(pipeline)
    assert figures["seconds_train"] > 0
    assert 0.5 < figures["share_of_raw_states"] < 1
    assert figures["decoded_same_as_without_draft"] == figures["decoded_answers"] > 0
    assert figures["decoded_real_over_walked"] == 1


def _micro_example(tmp_path, monkeypatch):
    """Return an example with a corpus, a target and a cache that trains and validates."""
    pipeline, example = tmp_path / "micro.yaml", tmp_path / "example"
    pipeline.write_text(MICRO_PIPELINE.split("  - train:")[0])
    run_pipeline(pipeline, example, announce=lambda _: None)
    for made, wanted in (("cache", "heldout-cache"), ("heldout.jsonl", "data/heldout-rewritten.jsonl")):
        (example / wanted).parent.mkdir(exist_ok=True)
        (example / wanted).symlink_to(example / made)
    # The same samples to train and to validate on would be refused: here only decoding is looked at.
    monkeypatch.setattr(corpus, "_refuse_repeated", lambda *_: None)
    return example


@pytest.mark.slow
def test_ablation_judges_every_seed_by_itself(tmp_path, monkeypatch):
    example = _micro_example(tmp_path, monkeypatch)
    training = {**accept_lengths.TRAINING, "ttt_steps": 2, "max_steps": 1, "tokens_per_batch": 512}
    found = [ablation.measure(example, tmp_path, training, "step_decay 1.0", seed) for seed in (0, 1)]
    assert found[0] != found[1]
    assert all(figures["accept_length_greedy"] >= 1 for figures in found)
    assert found[0] == ablation.measure(example, tmp_path, training, "step_decay 1.0", 0), "done once"


@pytest.mark.slow
def test_the_ablation_of_p_eagle_says_what_each_depth_accepts(tmp_path, monkeypatch):
    example = _micro_example(tmp_path, monkeypatch)
    training = {**ablation_peagle.TRAINING, "max_steps": 1, "tokens_per_batch": 512}
    for name in ("depth_weights rising to 2", "depth_mean depths"):
        figures = ablation_peagle.measure(example, tmp_path, training, name, 0)
        for way in accept_lengths.WAYS:
            rates = [figures[f"accept_rate_{way}_{depth}"] for depth in range(1, accept_lengths.CHAIN + 1)]
            assert figures[f"accept_length_{way}"] == pytest.approx(1 + sum(rates))
            assert rates == sorted(rates, reverse=True)


def test_every_option_of_the_ablations_can_be_trained():
    for benchmark, training in ((ablation, accept_lengths.TRAINING), (ablation_peagle, ablation_peagle.TRAINING)):
        for name, options in benchmark.VARIANTS.items():
            placed = {key: value for key, value in options.items() if value not in ("last", "half")}
            settings = TrainSettings(**{**training, "cache": "cache", "output_dir": "run", **placed})
            assert settings.num_steps == options.get("ttt_steps", accept_lengths.CHAIN), name


@pytest.mark.slow
def test_accept_by_encoding_trains_on_what_it_converted(tmp_path, monkeypatch):
    example = _micro_example(tmp_path, monkeypatch)
    training = {**accept_lengths.TRAINING, "ttt_steps": 2, "max_steps": 1, "tokens_per_batch": 512}
    names = ["fp8", "top 8"]
    for _ in ("made", "made before"):
        accept_by_encoding.make_caches(example, tmp_path, names)
    for name in names:
        figures = accept_by_encoding.measure(example, tmp_path, training, name, 0)
        assert figures["accept_length_greedy"] >= 1


class _DoneWork:
    """Accept lengths by seed, as `accept_lengths.Work` gives them."""

    def figures(self, name):
        lengths = (3.0, 3.2, 3.4) if name == accept_lengths.BASELINE else (3.1, 3.4, 3.4)
        figures = {f"accept_length_{way}": sum(lengths) / 3 for way in accept_lengths.WAYS}
        for way in accept_lengths.WAYS:
            figures |= {f"accept_length_{way}_seed{seed}": value for seed, value in enumerate(lengths)}
            figures |= {f"accept_rate_{way}_{depth}": 0.9 / depth for depth in range(1, accept_lengths.CHAIN + 1)}
        return figures


@pytest.mark.parametrize(
    ("benchmark", "case", "rates"),
    [
        (ablation, "fc_norm", ""),
        (accept_by_encoding, "fp8", ""),
        (ablation_peagle, "down_sample_ratio 1.0", " 90%, 45%, 30%, 22%, 18% |"),
    ],
)
def test_tables_of_accept_lengths_pair_seeds(benchmark, case, rates, tmp_path, monkeypatch):
    rest = {"benchmark": benchmark.NAME, "environment": {}, "code": "", "measured_at": ""}
    rows = [Row(case=name, figures=_DoneWork().figures(name), **rest) for name in (accept_lengths.BASELINE, case)]
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.results_file(benchmark.NAME, "cpu").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    lines = benchmark.table().splitlines()
    assert f"| {case} | 3.30 | +0.10 ± 0.10 | 3.30 | +0.10 ± 0.10 |{rates}" in lines
    assert len({line.count("|") for line in lines}) == 1


def test_accept_by_encoding_says_differences_by_seed():
    figures = accept_by_encoding.figures_of("fp8", _DoneWork())
    assert [figures[f"difference_greedy_seed{seed}"] for seed in accept_lengths.SEEDS] == [0.1, 0.2, 0]
    assert (figures["difference_greedy"], figures["difference_greedy_deviation"]) == (0.1, 0.1)
    assert "difference_greedy" not in accept_by_encoding.figures_of(accept_lengths.BASELINE, _DoneWork())


def test_what_interop_compares_is_a_draft_in_both_layouts(tmp_path):
    for name, kind in interop.DRAFTS.items():
        case = tmp_path / name.replace(" ", "-")
        expected = interop._write_case(kind, case)
        assert expected.isfinite().all()
        assert expected.abs().max() > 1
        assert {"flat", "speculators", "target", "inputs.safetensors"} <= {path.name for path in case.iterdir()}


def test_a_case_that_has_its_row_is_not_measured_again(tmp_path, monkeypatch):
    calls = []

    class Module:
        @staticmethod
        def cases(device):
            return {"one": lambda: calls.append(device) or {"ratio": 2.0}}

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "load", lambda name: Module)
    for _ in range(2):
        rows = harness.run("startup", "cpu", say=lambda line: None)
        assert [type(row) for row in rows] == [Row]
    assert calls == ["cpu"]
