"""Damaged and hostile checkpoints, encoders and caches: refused in a sentence or made anew, and never executed."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import save_longformer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_table import arguments, best_model, leftovers

import explain_clinicalLF as explain
import train
from clinical_lf.encoders import CLINICAL_LONGFORMER
from clinical_lf.files import InputError


def assert_refused(argv, fragment, capfd, folder):
    assert train.main(argv) == 2
    message = capfd.readouterr().err.split("error: ")[1]
    assert fragment in message and message.count("\n") == 1
    assert not leftovers(folder) and not list(folder.rglob("predictions.csv"))


class Malicious:
    def __reduce__(self):
        return Path.mkdir, (Path("let_in"),)


def changed(**parts):
    """Write a checkpoint with other parts; None takes one away."""
    return lambda state, path: torch.save({n: v for n, v in {**state, **parts}.items() if v is not None}, path)


def cut(state, path):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])


def with_a_flipped_bit(state, path):
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # of a weight
    path.write_bytes(content)


without = lambda parts, name: {key: value for key, value in parts.items() if key != name}
times = lambda tensors, factor: {name: tensor * factor for name, tensor in tensors.items()}
DAMAGED, LACKS = "not a checkpoint of this program, or damaged", "lacks parts"
BAD_CHECKPOINTS = {
    "truncated": (cut, DAMAGED),
    "with a flipped bit": (with_a_flipped_bit, DAMAGED),
    "empty": (lambda state, path: path.write_bytes(b""), DAMAGED),
    "a text file": (lambda state, path: path.write_text("weights"), DAMAGED),
    "a folder": (lambda state, path: path.mkdir(), DAMAGED),
    "malicious, as torch saves it": (changed(evil=Malicious()), DAMAGED),
    "malicious, old": (lambda s, p: torch.save(Malicious(), p, _use_new_zipfile_serialization=False), DAMAGED),
    "malicious, a bare pickle": (lambda state, path: path.write_bytes(pickle.dumps(Malicious(), 2)), DAMAGED),
    "a list": (lambda state, path: torch.save([1, 2], path), "of another program"),
    "with a scale too few": (lambda s, p: changed(preprocessor=s["preprocessor"] | {"scales": [1.0]})(s, p), LACKS),
    "with a mean that is infinite": (lambda s, p: changed(baseline=times(s["baseline"], torch.inf))(s, p), LACKS),
    "with a weight of NaN": (lambda s, p: changed(model=times(s["model"], torch.nan))(s, p), LACKS),
}
CHANGED = yaml.safe_load(Path(__file__).with_name("bad_checkpoints.yaml").read_text("utf-8"))
BAD_CHECKPOINTS |= {name: (changed(**parts), fragment) for name, (parts, fragment) in CHANGED.items()}


@pytest.mark.parametrize("option", ["--evaluate", "--resume"])
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused_and_nothing_in_it_is_executed(name, option, finished, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, fragment = BAD_CHECKPOINTS[name]
    path = tmp_path / "out" / "checkpoints" / "latest_checkpoint.pth"
    path.parent.mkdir(parents=True)
    write(torch.load(finished / "out" / "checkpoints" / path.name, weights_only=True), path)
    options = ["--evaluate", path] if option == "--evaluate" else ["--resume"]
    fragment = "differs from the one to resume" if (name, option) == ("of another encoder", "--resume") else fragment
    argv = arguments(tmp_path, finished / "data.csv", "--cache-dir", finished / "cache", *options)
    assert_refused(argv, fragment, capfd, tmp_path)
    with pytest.raises(InputError, match="trained on vectors of" if "encoder" in name else fragment.split("(")[0]):
        explain.load_unseen(path, finished / "data.csv", explain.ExplainSettings(cache_dir=str(finished / "cache")))
    assert not Path("let_in").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best_model.pth", "latest_checkpoint.pth"])
def test_checkpoint_that_lacks_any_one_part_is_refused(name, finished, tmp_path):
    state = torch.load(finished / "out" / "checkpoints" / name, weights_only=True)
    for part in state:
        lacking = [without(state, part)]
        if part in ("architecture", "model", "preprocessor", "patients", "baseline"):
            lacking += [{**state, part: without(state[part], inner)} for inner in state[part]]
        for number, damaged in enumerate(lacking):
            torch.save(damaged, tmp_path / f"{part}_{number}.pth")
            with pytest.raises(InputError, match="lacks parts|of another program"):
                train.load_checkpoint(tmp_path / f"{part}_{number}.pth")


OF_RESUMING = {
    "an optimizer without its state": lambda state: state["optimizer"].update(state={}),
    "moments that lack one": lambda state: state["optimizer"]["state"][0].pop("exp_avg"),
    "a group without its factors": lambda state: state["optimizer"]["param_groups"][0].pop("betas"),
    "weights in training that lack one": lambda state: state["objective"].popitem(),
}


@pytest.mark.parametrize("what", [*OF_RESUMING, "a damaged best model"])
def test_run_is_not_resumed_from_what_lacks_parts(what, finished, tmp_path, capfd):
    path = best_model(tmp_path).with_name("latest_checkpoint.pth")
    shutil.copytree(best_model(finished).parent, path.parent)
    state = torch.load(path, weights_only=True)
    if what in OF_RESUMING:
        OF_RESUMING[what](state)
        torch.save(state, path)
    else:
        with_a_flipped_bit(state, best_model(tmp_path))
    argv = arguments(tmp_path, finished / "data.csv", "--cache-dir", finished / "cache", "--resume", "--max-epochs", 2)
    assert_refused(argv, LACKS if what in OF_RESUMING else DAMAGED, capfd, tmp_path)


def test_checkpoint_with_a_setting_that_is_no_more_is_read(finished, tmp_path):
    state = torch.load(best_model(finished), weights_only=True)
    changed(settings={**state["settings"], "threads": 4})(state, tmp_path / "old.pth")
    assert train.load_checkpoint(tmp_path / "old.pth").settings == train.load_checkpoint(best_model(finished)).settings


def test_path_inside_a_checkpoint_is_not_followed(finished, tmp_path, capfd):
    state = torch.load(best_model(finished), weights_only=True)
    own = {**state["settings"], "text_encoder": str(save_longformer(tmp_path / "encoder"))}
    changed(text_encoder="encoder@1", settings=own)(state, tmp_path / "evil.pth")
    argv = arguments(tmp_path, finished / "data.csv", "--evaluate", tmp_path / "evil.pth", encoder=CLINICAL_LONGFORMER)
    assert_refused(argv, "paths inside a checkpoint are not followed", capfd, tmp_path)


OTHERS = [("--learning-rate 0.1", "(--learning-rate)"), ("--weight-decay 0.5 --seed 1", "(--seed, --weight-decay, ")]


@pytest.mark.parametrize("options, fragment", [*OTHERS, ("--d-model 64", "--d-model"), ("--no-test", "the split")])
def test_resume_with_other_settings_is_refused_and_leaves_the_run(options, fragment, finished, capfd):
    before = (finished / "out" / "metrics.json").read_bytes()
    assert train.main(arguments(finished, finished / "data.csv", "--resume", *options.split())) == 2
    assert fragment in capfd.readouterr().err and (finished / "out" / "metrics.json").read_bytes() == before


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Six texts, their vectors, the cache that holds them and the encoder that made them, loaded."""
    folder, texts = tmp_path_factory.mktemp("encoded"), [f"text {i}" for i in range(6)]
    encoder = train.ClinicalTextEncoder("hashing", cache_dir=folder / "cache")
    vectors = encoder.encode_event_text_batch(texts)
    encoder.encoder.load = lambda folder: None  # once is enough
    return texts, vectors, folder / "cache", encoder.encoder


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_damage_to_a_cache_part_leaves_right_vectors_or_none(encoded, tmp_path_factory, data):
    """Bytes of the header, the keys or the vectors change: never an exception, never a vector of another length."""
    texts, good, cache, loaded = encoded
    folder = shutil.copytree(cache, tmp_path_factory.mktemp("fuzz") / "cache")
    path = next(folder.rglob(data.draw(st.sampled_from(["keys.npy", "vectors.npy"]))))
    content = bytearray(path.read_bytes())
    reach = data.draw(st.sampled_from([128, len(content)]))  # the header is short: half of the examples aim at it
    for place in data.draw(st.lists(st.integers(0, reach - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), reach // 2]) | st.integers(0, len(content)))])
    again = train.ClinicalTextEncoder("hashing", cache_dir=folder)
    again.encoder = loaded
    vectors = again.encode_event_text_batch(texts)
    assert vectors.shape == good.shape
    assert path.name == "vectors.npy" or all(any(np.array_equal(vector, other) for other in good) for vector in vectors)
