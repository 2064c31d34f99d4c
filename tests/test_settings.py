"""The command line of both scripts: help, limits, a file of settings, places that cannot be written: code 2, a line."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
import yaml
from small_table import arguments, leftovers, small_table
from test_mimic import broken_mimic

import explain_clinicalLF as explain
import train
from clinical_lf.files import InputError
from clinical_lf.settings import check_limits, setting, settings_from


@pytest.fixture
def assert_refused(tmp_path, capfd, monkeypatch):
    """The arguments end a script with code 2 and a line that holds the words, some left out where "..." stands."""

    def check(words, main, *argv):
        try:
            code = main([*map(str, argv)])
        except SystemExit as stop:  # argparse; of it a notebook would show no word
            code = stop.code
            with monkeypatch.context() as notebook, pytest.raises(InputError, match=".--help lists all options.$"):
                notebook.setitem(sys.modules, "ipykernel", sys)
                main([*map(str, argv)])
        output = capfd.readouterr()
        assert code == 2 and output.err.startswith("error: ") and output.err.count("\n") == 1
        assert all(part in output.err for part in words.split("..."))
        assert "Traceback" not in output.out and not leftovers(tmp_path)

    return check


@pytest.mark.parametrize("script, kind", [(train, train.Settings), (explain, explain.ExplainSettings)])
def test_help_names_every_setting_and_its_sentence(script, kind, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        script.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.isascii() and "95 % interval" in shown and script.__doc__.split("\n\n")[0] in shown
    for field in dataclasses.fields(kind):
        assert f"--{field.name}" in shown and field.metadata["help"].replace("%%", "%")[:30] in shown


@pytest.mark.slow
def test_help_takes_less_than_three_seconds_of_cpu_time():
    resource = pytest.importorskip("resource")
    seconds = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = seconds()
    subprocess.run([sys.executable, train.__file__, "--help"], check=True, capture_output=True)
    assert seconds() - before < 3


def test_options_overrule_the_file_and_the_file_the_defaults(tmp_path):
    content = "{max_epochs: 3, learning_rate: 1, item_history: true, static_features: [insurance]}"
    (tmp_path / "s.yml").write_text(content)
    options = "--max-epochs 4 --static-features patient_age patient_race --mixed-precision bf16 --no-test --seed=7"
    argv = [str(tmp_path / "s.yml"), *options.split(), "--cache-dir", "a b", "--vitals", "--n_heads", "1"]
    expected = {"static_features": ["patient_age", "patient_race"], "mixed_precision": "bf16", "item_history": True}
    expected |= {"max_epochs": 4, "learning_rate": 1, "no_test": True, "seed": 7, "n_heads": 1, "cache_dir": "a b"}
    assert settings_from(argv, train.Settings, "") == train.Settings(**expected, vitals="vitals.sql")
    check_limits(train.Settings(**expected))


BAD_OPTIONS = pd.read_csv(Path(__file__).with_name("bad_options.csv"), keep_default_na=False).to_numpy(str).tolist()
BAD = yaml.safe_load(Path(__file__).with_name("bad_inputs.yaml").read_text("utf-8"))


@pytest.mark.parametrize("script, options, words", BAD_OPTIONS)
def test_bad_option_is_refused(script, options, words, tmp_path, assert_refused):
    """An option that is cut short is an unknown one."""
    starts = {"train": arguments(tmp_path, "none.csv"), "explain": ["--save-dir", tmp_path / "out"]}
    assert_refused(words, {"train": train, "explain": explain}[script].main, *starts[script], *options.split())
    assert not (tmp_path / "out" / "evaluation").exists()  # a mistyped path leaves no folder


@dataclasses.dataclass(frozen=True)
class Example:
    size: int = setting(3, "Of something.", low=1, high=5)
    share: float = setting(0.5, "100 % of it.", above=0, below=1)
    names: list[str] = setting([], "Of things.")
    kind: Literal["one", "other"] = setting("one", "Which.")
    is_on: bool = setting(False, "Whether.")
    copied: float = dataclasses.field(default=1.0, metadata=train.Settings.__dataclass_fields__["tau_hours"].metadata)


@pytest.mark.parametrize("name, values, message", BAD["values"])
def test_value_beyond_its_limits_or_of_another_type_is_refused(name, values, message):
    """Values of a notebook or a file of settings, which no argparse has seen."""
    check_limits(Example(size=1, share=0.999, names=["a"], kind="other"))
    for value in values:
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {value}: out of range; {message}\\.$"):
            check_limits(Example(**{name: value}))


@pytest.mark.parametrize("content, words", BAD["settings"])
def test_bad_settings_file_is_refused(content, words, tmp_path, assert_refused):
    if content is not None:
        (tmp_path / "s.yaml").write_text(content)
    assert_refused(words, train.main, tmp_path / "s.yaml")


PLACES = [("--output-dir", place, "data.csv") for place in ("file", "file/below", "/proc/none")]
PLACES += [("--cache-dir", "file", data) for data in ("data.csv", "mimic")]


@pytest.mark.parametrize("option, place, data", PLACES)
def test_unwritable_folder_is_refused(option, place, data, tmp_path, assert_refused):
    small_table().to_csv(tmp_path / "data.csv", index=False)
    broken_mimic(tmp_path / "mimic")
    (tmp_path / "file").write_text("not a folder")
    assert_refused("cannot be written", train.main, *arguments(tmp_path, tmp_path / data, option, tmp_path / place))
    assert (tmp_path / "file").read_text() == "not a folder"
