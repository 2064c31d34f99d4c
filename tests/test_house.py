"""The house's own limits: how many lines the parts may have, what may import what, and that an installed copy works."""

import ast
import importlib.util
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from small_table import TINY, run_python

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "clinical_lf"
SCRIPTS = [ROOT / "train.py", ROOT / "explain_clinicalLF.py"]
CODE = [path for path in sorted(LIBRARY.rglob("*")) if path.suffix in (".py", ".sql", ".j2")]
ONLY_ON_UNIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
NOT_INSTALLED = ".* tests build *.egg-info __pycache__ hf_cache clinical_LF_precomp_emb trained_models runs".split()


def n_lines(paths):
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def imported(path):
    """The modules that a file imports anywhere, by their first name."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


CEILINGS = {"train.py": (SCRIPTS[:1], 1900), "explain_clinicalLF.py": (SCRIPTS[1:], 1500), "clinical_lf": (CODE, 3600)}
CEILINGS["tests"] = (sorted((ROOT / "tests").glob("*.py")), 6500)


@pytest.mark.parametrize("paths, most", CEILINGS.values(), ids=CEILINGS)
def test_lines_stay_below_their_ceiling(paths, most):
    assert 0 < n_lines(paths) <= most


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_file_of_the_library_is_short_and_knows_no_script(path):
    assert n_lines([path]) <= 500
    if path.suffix == ".py":
        assert not imported(path) & {"train", "explain_clinicalLF"}


def test_training_knows_nothing_of_the_explainer_and_nothing_is_imported_that_only_unix_has():
    assert {"torch", "clinical_lf"} <= imported(SCRIPTS[0])
    assert not imported(SCRIPTS[0]) & {"explain_clinicalLF", "captum"}
    everywhere = set.union(*(imported(path) for path in [*SCRIPTS, *LIBRARY.glob("*.py")]))
    assert {"torch", "duckdb", "captum"} <= everywhere and not everywhere & ONLY_ON_UNIX


def test_torch_has_attention_within_stays():
    found = importlib.util.find_spec("torch.nn.attention.varlen")
    assert found, f"torch {torch.__version__} lacks torch.nn.attention.varlen: pip install 'torch>=2.10,<=2.13.0'"


def test_readme_is_short_and_the_citation_is_of_this_version():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1800
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    for name, same in {"title": "description", "version": "version", "license": "license"}.items():
        assert citation[name] == project[same]


@pytest.mark.slow
def test_installed_copy_trains_and_explains_from_another_folder(tmp_path):
    """It finds the sample, its templates and tables; the queries lie where their modules look for them."""
    pytest.importorskip("setuptools", "77")
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_INSTALLED))
    elsewhere.mkdir()
    options = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check --target".split()
    python = lambda *words: run_python(*words, folder=elsewhere, PYTHONPATH=str(target))
    python("-m", "pip", "install", *options, target, source)
    places = "train.__file__, train.SAMPLE, mimic.QUERY_FILE, mimic.VITALS_FILE, meds.QUERY_FILE, reading.QUERY_FILE"
    lookup = f"import train; from clinical_lf import meds, mimic, reading; print({places}, sep='\\n')"
    found = [Path(line) for line in python("-c", lookup).splitlines()]
    wanted = ("train.py", "sample_train.csv", "query.sql", "vitals.sql", "meds.sql", "table.sql")
    for path, name in zip(found, wanted, strict=True):
        assert path == target / name and path.read_bytes() == (ROOT / name).read_bytes()
    python("-m", "train", *TINY, "--text-encoder", "hashing", "--output-dir", "out")
    python("-m", "explain_clinicalLF", "--checkpoint", "out/checkpoints/best_model.pth", "--quick")
    assert (elsewhere / "out" / "explainability" / "report.html").stat().st_size
