"""Who may import whom, what costs nothing to import, and which names and signatures people rely on."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import eagle_offline
from tests.training.caches import shared_cache

PACKAGE = Path(eagle_offline.__file__).parent

# Parts in the sense of DESIGN.md's layout: a package's folder, or a module beside them. Each may import the parts
# named here, those that they may import in turn, and the foundation.
MAY_IMPORT = {
    "training": {"data", "objectives", "draft", "supervision"},
    "data": {"cache", "alignment", "supervision"},
    "objectives": {"alignment", "supervision", "element_attention"},
    "draft": {"alignment", "supervision", "element_attention"},
    "cache": {"supervision", "vocab"},
    "target": {"supervision", "alignment"},
    "text": set(),
    "serving": {"draft", "objectives", "target", "text"},
    "importing": {"precompute", "cache", "target", "text", "vocab"},
}
FOUNDATION = {
    "errors",
    "config",
    "train_settings",
    "capture_settings",
    "durable",
    "interrupts",
    "progress",
    "provenance",
    "amounts",
    "devices",
    "prefetch",
    "launch",
}
FOUNDATION_MAY_IMPORT = {"errors", "config", "durable", "provenance"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = ("eagle_offline", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module that a file imports at any depth, those for type checkers alone left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found.add(node.module)
            if node.module in ("eagle_offline", *(f"eagle_offline.{part}" for part in MAY_IMPORT)):
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return frozenset(found)


def part_of(module: str) -> str | None:
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "eagle_offline" and len(pieces) > 1 else None


def reachable(part: str) -> set[str]:
    found, waiting = set(), [part]
    while waiting:
        for following in MAY_IMPORT.get(waiting.pop(), ()):
            if following not in found:
                found.add(following)
                waiting.append(following)
    return found


def files_of(part: str) -> list[Path]:
    return [path for path in modules() if part_of(name_of(path)) == part]


@pytest.mark.parametrize("part", [part for part in MAY_IMPORT if files_of(part)])
def test_imports_point_downward_only(part):
    allowed = reachable(part) | {part} | FOUNDATION
    for path in files_of(part):
        for module in imports_of(path):
            other = part_of(module)
            assert other is None or other in allowed, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("part", ["alignment", "supervision", "vocab", "element_attention", *sorted(FOUNDATION)])
def test_the_foundation_imports_nothing_above_it(part):
    for path in files_of(part):
        for module in imports_of(path):
            other = part_of(module)
            assert other is None or other in FOUNDATION_MAY_IMPORT, f"{name_of(path)} imports {module}"


def test_the_parts_that_exist_are_looked_at():
    assert all(files_of(part) for part in ("training", "data", "objectives", "draft", "cache", "target", "text"))


def test_a_cache_opens_without_model_code():
    for path in files_of("cache"):
        for module in imports_of(path):
            assert not module.startswith(("transformers", "eagle_offline.draft", "eagle_offline.target")), name_of(path)


def closure(start: str) -> set[str]:
    """Modules of the package that importing `start`, or calling anything in it, can import."""
    by_name = {name_of(path): path for path in modules()}
    found, waiting = set(), [name for name in by_name if name == start or name.startswith(f"{start}.")]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [module for module in imports_of(by_name[name]) if module in by_name]
    return found


def test_training_reaches_neither_target_nor_text_through_anything_it_imports():
    reached = closure("eagle_offline.training")
    assert "eagle_offline.cache.reader" in reached, "the closure is not followed"
    wrong = {name for name in reached if part_of(name) in ("target", "text", "precompute", "stages", "example")}
    assert not wrong


def test_training_names_no_hub():
    for part in ("training", "data", "objectives", "draft", "cache"):
        for path in files_of(part):
            assert not any(module.startswith(("huggingface_hub", "datasets")) for module in imports_of(path)), path
            assert "from_pretrained(" not in path.read_text(), path


def test_no_one_imports_the_command_line():
    for path in modules():
        if path.stem not in ("__main__", "cli"):
            assert "eagle_offline.cli" not in imports_of(path), path


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_every_module_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    empty = path.stem == "__init__" and not tree.body
    assert empty or ast.get_docstring(tree), path


def test_no_module_has_a_name_that_says_nothing():
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "base", "core", "legacy"}
    assert not [path for path in modules() if vague & set(path.relative_to(PACKAGE).with_suffix("").parts)]
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not node.name.startswith("Base"), node.name
                assert not node.name.endswith(("Mixin", "Manager", "Helper")), node.name


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh process has imported after `code`."""
    told = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return set(told.stdout.splitlines()[-1].split()[1:])


def command(*arguments: object) -> str:
    """Code that runs the command line, expecting exit code 0."""
    return (
        "from eagle_offline.cli import main\n"
        f"try:\n    main({[str(argument) for argument in arguments]!r})\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code"
    )


HEAVY = {"torch", "transformers", "datasets", "pandas", "matplotlib"}


def test_importing_the_package_costs_nothing():
    loaded = loaded_after("import eagle_offline; dir(eagle_offline)")
    assert "eagle_offline" in loaded
    assert not loaded & (HEAVY | {"numpy", "pyarrow", "pydantic", "click"})


def test_help_needs_no_torch():
    assert not loaded_after(command("--help")) & (HEAVY | {"numpy", "pyarrow"})
    assert not loaded_after(command("train", "--help")) & (HEAVY | {"numpy", "pyarrow"})


def test_inspecting_a_cache_needs_no_torch():
    assert not loaded_after(command("inspect-manifest", shared_cache(), "--json")) & HEAVY


# DESIGN.md, public Python API: names, parameters in order, and the defaults it gives.
SIGNATURES = {
    "compute_target_distribution": "target_logits, selected_token_ids, selected_token_mask, loss_mask",
    "shift_left_with_zero": "tensor",
    "kl_div_loss": "logits, target_logits",
    "masked_soft_cross_entropy": "logits, target_probs, position_mask",
    "simulated_accept_length": "step_prefix_hits, step_valid",
    "default_aux_layer_ids": "num_layers",
    "Eagle3TrainerModule.forward": (
        "self, input_ids, attention_mask, loss_mask, aux_hidden_states, target_logits=None, target_probs=None, "
        "position_mask=None, position_ids=None, seq_lens=None, doc_remaining=None"
    ),
    "PEagleTrainerModule": (
        "draft_model, selected_token_ids, selected_token_mask, num_depths, mask_token_id, down_sample_ratio=0.7, "
        "down_sample_ratio_min=0.2, sequence_partitions=1"
    ),
    "PEagleTrainerModule.forward": (
        "self, input_ids, attention_mask, loss_mask, aux_hidden_states, target_logits=None, peagle_segment=None, "
        "target_probs=None, position_mask=None, position_ids=None, seq_lens=None, generator=None"
    ),
    "PEagleTrainerModule.build_peagle_plan": (
        "self, loss_mask, attention_mask=None, position_ids=None, seq_lens=None, generator=None"
    ),
    "generate_cod_sample_indices": (
        "seq_length, loss_mask, num_depths=8, down_sample_ratio=0.7, down_sample_ratio_min=0.2, generator=None"
    ),
    "assign_cod_segments": "anchor_pos, depth, seq_length, num_segments",
    "create_peagle_mask_mod": "anchor_pos, depth, lengths, total_seq_len",
    "Eagle3DraftModel.project_hidden_states": "self, aux",
    "Eagle3DraftModel.forward": (
        "self, input_ids, projected_hidden_states, attention_mask, position_ids=None, cache_hidden=None, seq_lens=None"
    ),
    "Eagle3DraftModel.compute_logits": "self, hidden",
    "Eagle3DraftModel": "config",
    "Cache.target_probs": "self, sample",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_names_have_the_signatures_of_the_design(name):
    found = eagle_offline
    for piece in name.split("."):
        found = getattr(found, piece)
    parameters = inspect.signature(found).parameters.values()
    written = ", ".join(
        parameter.name if parameter.default is inspect.Parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in parameters
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    )
    assert written == SIGNATURES[name]


def test_open_cache_takes_a_path_alone():
    parameters = inspect.signature(eagle_offline.open_cache).parameters
    assert next(iter(parameters)) == "path"
    assert all(parameter.default is not inspect.Parameter.empty for parameter in list(parameters.values())[1:])


def test_trainer_module_takes_the_lk_options():
    parameters = inspect.signature(eagle_offline.Eagle3TrainerModule).parameters
    defaults = {"ttt_steps": 7, "lk_loss_type": None, "lk_kl_scale": 1.0, "lk_kl_decay": 3.0}
    assert {name: parameters[name].default for name in defaults} == defaults
    assert {"draft_model", "selected_token_ids", "selected_token_mask"} <= parameters.keys()


def test_step_metrics_have_the_fields_of_the_design():
    fields = set(inspect.signature(eagle_offline.Eagle3StepMetrics).parameters)
    assert {"loss", "accuracy", "step_prefix_hits", "step_valid"} <= fields


def test_every_public_name_is_importable_and_every_other_is_refused():
    for name in eagle_offline.__all__:
        assert getattr(eagle_offline, name) is not None
    assert set(eagle_offline.__all__) >= {name.split(".")[0] for name in SIGNATURES} | {"open_cache"}
    assert dir(eagle_offline) == sorted(eagle_offline.__all__)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = eagle_offline.nothing_of_the_kind


def test_draft_config_has_the_fields_and_defaults_of_the_design():
    config = eagle_offline.Eagle3DraftConfig(vocab_size=11, hidden_size=8, num_attention_heads=2)
    expected = {
        "draft_vocab_size": 11, "target_hidden_size": 8, "num_aux_hidden_states": 3, "fc_norm": False,
        "norm_output": False, "parallel_drafting": False, "mask_token_id": None, "num_hidden_layers": 1,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
