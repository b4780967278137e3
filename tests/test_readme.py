"""The README tells the truth about the files, and about what it takes to start."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def files_in_tree() -> set[str]:
    """Return the paths that the README's file tree names, directories by their trailing slash left out."""
    tree = README.split("## Files")[1].split("```")[1]
    paths, parents = set(), []
    for line in tree.strip("\n").splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:indent], name]
        if not name.endswith("/"):
            paths.add("".join(parents))
    return paths


def test_file_tree_names_every_module_and_nothing_else():
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("eagle_offline", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    named = files_in_tree()
    assert {path for path in named if path.endswith(".py")} == modules
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_line_of_the_file_tree_says_what_a_file_is_for():
    tree = README.split("## Files")[1].split("```")[1].strip("\n")
    assert [line for line in tree.splitlines() if len(line.split()) < 2] == []


def test_commands_named_exist():
    from eagle_offline.cli import cli

    for command in re.findall(r"eagle-offline ([a-z-]+)", README):
        assert command in cli.commands, command


def test_make_targets_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    assert named <= targets
