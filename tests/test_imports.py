# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What is imported when, and who imports whom."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import tiny


PACKAGE = Path(__file__).parent.parent / "luffy_trl"


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph():
    """For each module of the package, those of the package that it imports at its top or for type checkers."""
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        imported = set()
        tree = ast.parse(path.read_text())
        inner = {
            node for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)
        }  # what is imported when it is needed
        for node in ast.walk(tree):
            if (
                not isinstance(node, ast.ImportFrom)
                or node in inner
                or (node.level == 0 and node.module != "luffy_trl")
            ):
                continue
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            imported |= {f"{target}.{alias.name}" for alias in node.names if f"{target}.{alias.name}" in paths} or {
                target
            }
        graph[name] = imported & set(paths) - {name}
    return graph


def test_there_is_no_circle():
    graph = import_graph()
    # The package's own names are made when they are asked for
    graph["luffy_trl"] = set()
    order = list(TopologicalSorter(graph).static_order())  # raises a CycleError that names the circle
    assert order.index("luffy_trl.losses") < order.index("luffy_trl.methods") < order.index("luffy_trl.luffy_trainer")
    assert "luffy_trl.groups" in graph["luffy_trl.luffy_trainer"] and len(order) > 30


def test_a_trainer_loads_what_it_needs_alone(tmp_path):
    tiny.save_tiny_model(tmp_path / "model")
    code = """
import sys, luffy_trl
from luffy_trl.rewards import math_verify_reward
assert "torch" not in sys.modules
sys.path.insert(0, sys.argv[2])
import tiny
from datasets import Dataset
args = tiny.make_args(sys.argv[1] + "/out")
rows = Dataset.from_list(tiny.addition_rows(4))
luffy_trl.LuffyTrainer(sys.argv[1] + "/model", math_verify_reward, args, rows)
own = {name for name in sys.modules if name.startswith("luffy_trl.")}
wings = "luffy_trl.eval", "luffy_trl.model_card", "luffy_trl.data"
unwanted = [name for name in own if name.startswith(wings)]
unwanted += {"math_verify", "matplotlib", "openai"} & set(sys.modules)
assert not unwanted, unwanted
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
