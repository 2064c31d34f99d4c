"""The house's own limits: how many lines the parts may have, what may import what, and that an installed copy works."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_table import TINY

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "clinical_lf"
SCRIPTS = {"train", "explain_clinicalLF"}
CODE = [path for path in sorted(LIBRARY.rglob("*")) if path.suffix in (".py", ".sql", ".j2")]
NOT_INSTALLED = ".* tests build *.egg-info __pycache__ hf_cache clinical_LF_precomp_emb trained_models runs".split()


def n_lines(paths):
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def imported(path):
    """The modules that a file imports anywhere, by their first name."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "paths, most",
    [
        ([ROOT / "train.py"], 1900),
        ([ROOT / "explain_clinicalLF.py"], 1500),
        (CODE, 3600),
        (sorted((ROOT / "tests").glob("*.py")), 6500),
    ],
    ids=["train.py", "explain_clinicalLF.py", "clinical_lf", "tests"],
)
@pytest.mark.xfail(strict=True, reason="the house still stands above its ceilings")
def test_lines_stay_below_their_ceiling(paths, most):
    assert 0 < n_lines(paths) <= most


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_file_of_the_library_is_short_and_knows_no_script(path):
    assert n_lines([path]) <= 500
    if path.suffix == ".py":
        assert not imported(path) & SCRIPTS


def test_training_knows_nothing_of_the_explainer():
    assert {"torch", "clinical_lf"} <= imported(ROOT / "train.py")
    assert not imported(ROOT / "train.py") & {"explain_clinicalLF", "captum"}


@pytest.mark.slow
def test_installed_copy_trains_and_explains_from_another_folder(tmp_path):
    """It finds the sample, its templates and tables; the queries lie where their modules look for them."""
    pytest.importorskip("setuptools", "77")
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_INSTALLED))
    elsewhere.mkdir()
    options = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check --target".split()
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def python(*words):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout

    python("-m", "pip", "install", *options, target, source)
    lookup = (
        "import train, clinical_lf.meds as meds, clinical_lf.mimic as mimic; from pathlib import Path; "
        "print(train.__file__, train.SAMPLE, mimic.QUERY_FILE, Path(meds.__file__).with_name('meds.sql'), sep='\\n')"
    )
    found = [Path(line) for line in python("-c", lookup).splitlines()]
    wanted = ("train.py", "sample_train.csv", "query.sql", "clinical_lf/meds.sql")
    for path, name in zip(found, wanted, strict=True):
        assert path == target / name and path.read_bytes() == (ROOT / name).read_bytes()
    python("-m", "train", *TINY, "--text-encoder", "hashing", "--output-dir", "out")
    python("-m", "explain_clinicalLF", "--checkpoint", "out/checkpoints/best_model.pth", "--quick")
    assert (elsewhere / "out" / "explainability" / "report.html").stat().st_size
