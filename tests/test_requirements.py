"""What the scripts need of the machine: torch with fused attention within stays, and nothing that only Unix has."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

import train

ONLY_ON_UNIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}


def test_torch_has_attention_within_stays():
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        pytest.fail(
            f"torch {torch.__version__} lacks torch.nn.attention.varlen, with which bf16 training on a GPU attends "
            "within stays: pip install 'torch>=2.10,<=2.13.0'"
        )


@pytest.mark.parametrize("script", ["train.py", "explain_clinicalLF.py"])
def test_script_imports_nothing_that_only_unix_has(script):
    tree = ast.parse((Path(train.__file__).parent / script).read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    imported = {alias.name for node in imports for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "torch" in imported and not imported & ONLY_ON_UNIX
