"""What the program needs of the machine: torch with fused attention within stays, and nothing that only Unix has."""

import ast
import importlib.util
from pathlib import Path

import torch

import train

ROOT = Path(train.__file__).parent
SCRIPTS = [ROOT / "train.py", ROOT / "explain_clinicalLF.py", *sorted(ROOT.glob("clinical_lf/*.py"))]
ONLY_ON_UNIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}


def test_torch_has_attention_within_stays():
    assert importlib.util.find_spec("torch.nn.attention.varlen"), (
        f"torch {torch.__version__} lacks torch.nn.attention.varlen, with which bf16 training on a GPU attends within "
        "stays: pip install 'torch>=2.10,<=2.13.0'"
    )


def test_nothing_is_imported_that_only_unix_has():
    nodes = [node for script in SCRIPTS for node in ast.walk(ast.parse(script.read_text("utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    assert {"torch", "duckdb", "captum.attr"} <= imported and not imported & ONLY_ON_UNIX
