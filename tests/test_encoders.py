"""The text encoders: the vectors of the models themselves, nothing executed, nothing mixed, nothing unclear."""

import hashlib
import http.server
import json
import os
import pickle
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import save_longformer
from safetensors.torch import load_file, save_file
from small_table import arguments, small_table
from test_checkpoints import Malicious, assert_refused
from test_train_embedding import events

import train
from clinical_lf import encoders
from clinical_lf.encoders import CLINICAL_LONGFORMER, EncoderUnreachable
from clinical_lf.files import InputError

# Texts of exactly `n` tokens for the tiny tokenizer: capitals, one token each, and the two at the ends.
TEXTS = ["".join(np.random.RandomState(n).choice(list("QXZJKVWY"), n - 2)) for n in (5, 60, 257, 258, 400, 512)]
EVENTS = events(5)


def last_layers(folder, texts, max_length=512):
    """The last layer (L, dim) of each text as the model's own class gives it, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt") for text in texts]
        return [model(**one).last_hidden_state[0].numpy() for one in inputs]


reference = lambda folder, texts: np.stack([tokens[0] for tokens in last_layers(folder, texts)])


@pytest.fixture
def make(tiny_longformer, tmp_path):
    """Builds encoders that share this test's cache folder."""
    usual = {"cache_dir": tmp_path / "cache", "weights_dir": tmp_path / "hf", "dtype": "float32", "devices": ["cpu"]}
    return lambda name=tiny_longformer, **options: train.ClinicalTextEncoder(name, **usual | options)


@pytest.fixture
def copied(tiny_longformer, tmp_path):
    """A copy of the tiny Longformer for a test to change."""
    return shutil.copytree(tiny_longformer, tmp_path / "model")


@pytest.fixture
def home(copied, tmp_path):
    """The tiny Longformer where a downloaded Clinical-Longformer lies."""
    return shutil.copytree(copied, tmp_path / "hf" / "clinical_longformer")


@pytest.fixture
def no_hub(monkeypatch):
    """A machine without network: every question to the hub fails at once."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock(side_effect=ConnectionError("no network")))


@pytest.mark.parametrize("windows, window", [((512, 512), 512), ((512, 256), None)])  # layers that differ stay theirs
def test_vectors_equal_longformer_one_by_one_and_in_one_padded_batch(make, tmp_path, windows, window):
    folder = save_longformer(tmp_path / "model", attention_window=windows)
    encoder, alone, expected = make(folder), make(folder, cache_dir=tmp_path / "alone"), reference(folder, TEXTS)
    vectors = encoder.encode_event_text_batch(TEXTS)
    assert encoder.encoder.window == window and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    np.testing.assert_allclose([alone.encode_event_text_batch([text])[0] for text in TEXTS], expected, atol=1e-4)


def test_vectors_in_bfloat16_point_the_same_way_and_the_band_matters_beyond_257_tokens(make, tmp_path, monkeypatch):
    folder = save_longformer(tmp_path / "model")
    ours, theirs = make(folder, dtype="bfloat16").encode_event_text_batch(TEXTS), reference(folder, TEXTS)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    monkeypatch.setattr(encoders, "band_mask", lambda is_token, window: None)
    without = make(folder, cache_dir=tmp_path / "without").encode_event_text_batch(TEXTS[4:])
    assert cosine.min() >= 0.999 and np.abs(without - theirs[4:]).max() > 1e-3


def test_odd_text_has_a_vector_of_its_own_and_missing_text_that_of_the_empty_string(make):
    odd = ["\ud800 lone", "\x00", "🫀 sepsis", "مريض", "a" * 100_000, "line\r\nbreak", "</s> <pad>", "plain"]
    vectors = make().encode_event_text_batch([*odd, None, float("nan"), np.nan, ""])
    assert np.isfinite(vectors).all() and len(np.unique(vectors, axis=0)) == len(odd) + 1
    np.testing.assert_array_equal(vectors[-4:], vectors[[-1] * 4])


# ---- never mixed ----
@pytest.mark.parametrize("name, end", [(CLINICAL_LONGFORMER, "clinical_longformer"), ("some/model", "some--model")])
def test_full_cache_needs_no_weights(make, tiny_longformer, tmp_path, no_hub, name, end):
    home, pooling = shutil.copytree(tiny_longformer, tmp_path / "hf" / end), "mean" if name == "some/model" else "cls"
    if pooling == "mean":
        ask_for(home, pooling_mode_mean_tokens=True)
    expected = make(name).encode_event_text_batch(EVENTS)
    shutil.rmtree(home)
    again = make(name)
    np.testing.assert_array_equal(again.encode_event_text_batch(EVENTS), expected)
    assert again.encoder.pooling == pooling and again.n_encoded == 0
    with pytest.raises(EncoderUnreachable):
        again.embed(["new"], progress=False)


def test_vectors_go_with_the_weights_and_not_with_the_folder(make, copied, tmp_path):
    first = make(copied)
    vectors = first.encode_event_text_batch(EVENTS)
    for name in (copied.name, "another name"):
        moved = make(shutil.copytree(copied, tmp_path / "elsewhere" / name))
        moved.embed(EVENTS, progress=False)
        assert moved.n_encoded == 0 and moved.identity[1] == first.identity[1] != ""
    save_longformer(copied, seed=1)  # another model at the same path
    second = make(copied)
    assert np.abs(second.encode_event_text_batch(EVENTS) - vectors).max() > 0.1
    assert second.n_encoded == 5 and first.id != second.id


def test_lengths_and_revisions_have_caches_of_their_own_and_other_weights_under_an_id_are_refused(make, home, tmp_path):
    shutil.copytree(home, tmp_path / "hf" / "yikuan8--Clinical-Longformer--abc")
    ways = ("", {}), ("", {"max_tokens": 64}), ("@abc", {})
    first, *others = found = [make(CLINICAL_LONGFORMER + revision, **length) for revision, length in ways]
    assert len({encoder.cache.folder for encoder in found}) == 3
    assert [other.id for other in others] == [CLINICAL_LONGFORMER, f"{CLINICAL_LONGFORMER}@abc"]
    first.embed(EVENTS, progress=False)
    save_longformer(home, seed=1)
    with pytest.raises(InputError, match="other weights"):
        make(CLINICAL_LONGFORMER).embed(["new"], progress=False)


def test_earlier_single_files_serve_the_default_encoder(make, home, tmp_path):
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / (train.text_keys(["old"]).tobytes().hex() + ".npy"), np.ones(32, np.float32))
    encoder, other = make(CLINICAL_LONGFORMER), make()
    encoder.embed(["old", "new"], progress=False)
    other.embed(["old"], progress=False)
    assert encoder.n_encoded == 1 and other.n_encoded == 1
    np.testing.assert_array_equal(encoder.vectors(["old"]), np.ones((1, 32)))


@pytest.mark.parametrize("place", ["hf_cache", "cache/hf_cache"])
def test_weights_lie_in_the_cache_unless_an_earlier_folder_holds_them(tiny_longformer, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_longformer, Path(place) / "clinical_longformer")
    assert train.ClinicalTextEncoder(cache_dir=Path("cache"), devices=["cpu"]).dim == 32


# ---- nobody let in, clear errors ----
def save_pickle(folder, save):
    (folder / "model.safetensors").unlink()
    save({"embeddings.word_embeddings.weight": Malicious()}, folder / "pytorch_model.bin")


def save_code(folder):
    (folder / "evil.py").write_text("open('let_in', 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoModel": "evil.C"}
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


half = lambda weights: {name: value for name, value in weights.items() if "layer.1" not in name}
zeros = lambda weights: {name: 0 * value for name, value in weights.items()}
lose = lambda *names: lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]
dump = lambda evil, path: path.write_bytes(pickle.dumps(evil))
UNUSABLE = "cannot be used as a text encoder"
DAMAGE = {
    "no tokenizer": (lose("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"), "has no tokenizer"),
    "no weights": (lose("model.safetensors"), UNUSABLE),
    "no configuration": (lose("config.json"), "is no text encoder: a folder with config.json"),
    "half the weights": (lambda folder: change_weights(folder, half), "weights are missing"),
    "weights cut short": (lambda folder: os.truncate(folder / "model.safetensors", 50_000), UNUSABLE),
    "malicious, as torch saves it": (lambda folder: save_pickle(folder, torch.save), UNUSABLE),
    "malicious, a bare pickle": (lambda folder: save_pickle(folder, dump), UNUSABLE),
    "code beside weights": (save_code, UNUSABLE),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_model_folder_is_refused_and_nothing_in_it_is_executed(make, copied, tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGE[name]
    damage(copied)
    with pytest.raises(InputError, match=message):
        make(copied).encode_event_text_batch(["x"])
    small_table().to_csv("data.csv", index=False)
    assert_refused(arguments(tmp_path, "data.csv", encoder=copied), message, capfd, tmp_path)
    assert not Path("let_in").exists()


# ---- the hub ----
def test_unreachable_model_names_both_ways_out(make, no_hub, tmp_path):
    with pytest.raises(EncoderUnreachable, match="clinical_longformer(.|\n)*--text-encoder hashing"):
        make(CLINICAL_LONGFORMER)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine that answers as the hub does for one model; its files' folder, and what it was asked."""
    folder, asked, sha = tmp_path / "hub", [], "0" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert "Authorization" not in self.headers
            asked.append(self.path)
            told = lambda name, size: dict(rfilename=name, path=name, type="file", oid="0", size=size)
            files = [told(path.name, path.stat().st_size) for path in folder.iterdir()]
            answer = files if "/tree/" in self.path else {"id": CLINICAL_LONGFORMER, "sha": sha, "siblings": files}
            is_file = "/resolve/" in self.path
            content = (folder / self.path.rsplit("/", 1)[1]).read_bytes() if is_file else json.dumps(answer).encode()
            self.send_response(200)
            headers = {"Content-Length": str(len(content)), "ETag": hashlib.sha256(content).hexdigest()}
            for header in (headers | {"X-Repo-Commit": sha}).items():
                self.send_header(*header)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET
        log_message = lambda *_: None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (("ENDPOINT", address), ("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield folder, asked
    server.shutdown()


@pytest.mark.parametrize("revision, weights", [("", "pytorch_model.bin"), ("@v1", "model.safetensors")])
def test_clinical_longformer_comes_from_the_hub_and_gives_its_own_vectors(make, tmp_path, hub, revision, weights):
    """The hub's file list of Clinical-Longformer, weights random: a LongformerForMaskedLM with its head, as pickle."""
    folder, asked = hub
    save_longformer(folder)
    torch.manual_seed(0)
    config = transformers.LongformerConfig.from_pretrained(folder, initializer_range=0.2)
    masked_lm = transformers.LongformerForMaskedLM(config).eval()
    torch.save(masked_lm.state_dict(), folder / "pytorch_model.bin")
    config.architectures = ["LongformerForMaskedLM"]
    config.save_pretrained(folder)
    (folder / "evil.py").write_text("raise SystemExit")
    for path in [*folder.glob("*token*"), *folder.glob("*.safetensors")]:
        path.unlink()
    if weights == "model.safetensors":
        masked_lm.save_pretrained(folder)  # beside the pickle, which is then left
    vectors = make(CLINICAL_LONGFORMER + revision).encode_event_text_batch(TEXTS)
    home = tmp_path / "hf" / ("yikuan8--Clinical-Longformer--v1" if revision else "clinical_longformer")
    assert {path.name for path in home.parent.iterdir()} == {home.name, ".lock"}
    names = {path.name for path in home.iterdir() if path.is_file()}
    assert names == {"config.json", "vocab.json", "merges.txt", weights}
    assert any("/revision/v1" in path for path in asked) == bool(revision)
    np.testing.assert_allclose(vectors, reference(folder, TEXTS), atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for text, vector in zip(TEXTS, vectors, strict=True):
            last = masked_lm(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1]
            np.testing.assert_allclose(vector, last[0, 0].numpy(), atol=1e-5)


# ---- pooling as sentence-transformers folders ask for it ----
@pytest.fixture
def bert(tmp_path):
    """The folder of a tiny random BERT that knows 16 positions."""
    folder = tmp_path / "bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lab", "lactate", "value", "high", "|", ":", "1", "2"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": len(words), "max_position_embeddings": 16}
    transformers.BertModel(transformers.BertConfig(**sizes, initializer_range=0.2)).save_pretrained(folder)
    return folder


def ask_for(folder, *, modules=("Transformer", "Pooling"), max_seq_length=None, **wishes):
    """Write what a sentence-transformers folder says of pooling, of the modules behind it and of length."""
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **wishes}))
    listed = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))


FOR_BERT = ["lab: lactate | value: 2", "high", "", "lab " * 40]  # the last one is longer than the model's positions
POOLS = {"cls": lambda tokens: tokens[0], "mean": lambda tokens: tokens.mean(0), "last": lambda tokens: tokens[-1]}
WISHES = yaml.safe_load(Path(__file__).with_name("pooling_wishes.yaml").read_text("utf-8"))


@pytest.mark.parametrize("wishes, module, name", WISHES["read"])
def test_pooling_is_the_one_that_the_folder_asks_for_else_cls(make, bert, wishes, module, name):
    if wishes:
        ask_for(bert, modules=[module], **wishes)
    encoder, expected = make(bert), map(POOLS[name], last_layers(bert, FOR_BERT, 16))
    np.testing.assert_allclose(encoder.encode_event_text_batch(FOR_BERT), [*expected], atol=1e-5)
    assert encoder.dim == 24 and encoder.cache.folder.name.endswith(f"-{name}-512")


@pytest.mark.parametrize("wishes, module, message", WISHES["refused"])
def test_pooling_that_is_not_known_is_a_clear_error(make, bert, wishes, module, message):
    ask_for(bert, modules=[module], **wishes)
    with pytest.raises(InputError, match=message):
        make(bert)


@pytest.mark.parametrize("kind, options, name", WISHES["models"])
def test_causal_model_gives_its_last_token_and_one_without_a_limit_reads_all(make, copied, kind, options, name):
    sizes = {"vocab_size": 320, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, intermediate_size=48, initializer_range=0.2, **options)
    (copied / "tokenizer_config.json").unlink()  # its class is Longformer's
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(copied / "tokenizer.json")).save_pretrained(copied)
    transformers.AutoModel.from_config(config).save_pretrained(copied)
    vectors, expected = make(copied).encode_event_text_batch(TEXTS), map(POOLS[name], last_layers(copied, TEXTS))
    np.testing.assert_allclose(vectors, [*expected], atol=1e-4)
    ask_for(copied, pooling_mode="cls")
    with pytest.raises(InputError, match="first token of a causal model") if name == "last" else nullcontext():
        make(copied)


def test_encoder_that_gives_texts_of_different_tokens_one_vector_is_refused_whatever_it_is(make, copied, monkeypatch):
    change_weights(copied, zeros)
    monkeypatch.setattr(encoders.HashingEncoder, "forward", lambda self, device, texts: np.ones((len(texts), 768)))
    for encoder in 2 * [make(copied), make("hashing")]:  # asking again does not help
        with pytest.raises(InputError, match="different texts one vector"):
            encoder.encode_event_text_batch(EVENTS)


def test_texts_are_cut_and_vectors_normalised_as_the_folder_asks_and_equal_tokens_are_no_fault(make, bert):
    same = [*make(bert).encode_event_text_batch(["LAB", "lab", "unheard-of"])]  # in a batch last bits may differ
    assert np.allclose(same[0], same[1], atol=1e-5) and not np.allclose(same[0], same[2], atol=1e-2)
    assert np.ptp(make(max_tokens=2).encode_event_text_batch(EVENTS), 0).max() < 1e-5
    ask_for(bert, pooling_mode_mean_tokens=True, modules=("Transformer", "Pooling", "Normalize"), max_seq_length=8)
    encoder, expected = make(bert), last_layers(bert, ["lab " * 40], 8)[0].mean(0)
    (vector,) = encoder.encode_event_text_batch(["lab " * 40])
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    assert encoder.cache.folder.name.endswith("-mean-unit-512")


def test_tokenizer_of_a_larger_vocabulary_is_a_clear_error(make, bert):
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.add_tokens(["dialysis"])
    tokenizer.save_pretrained(bert)
    encoder = make(bert)
    assert encoder.encode_event_text_batch(["lab"]).shape == (1, 24)  # no harm while the new token is not met
    with pytest.raises(InputError, match="token number 13, its model knows 13"):
        encoder.encode_event_text_batch(["dialysis"])


# ---- the encoder without weights ----
def test_hashing_puts_near_numbers_of_an_item_near_however_spelt_and_items_codes_and_concentrations_apart(make):
    """A level belongs to its item: that of another one is farther away than the same item's other value."""
    alike = lambda texts: np.corrcoef(make("hashing").encode_event_text_batch(texts))
    texts = [f"Lab: pH (Blood) | Value: {value}" for value in ("7.10", "7.12", "7.40", "14.8")]
    to_first = alike([*texts, "Lab: Lactate (Blood) | Value: 7.10"])[0, 1:]
    assert (np.diff(to_first) < -0.02).all() and to_first[0] > 0.98 and to_first[2] > 0.5 > to_first[3]
    said = ("Lactate | Value: 5", "Lactate | Value: 9", "Glucose | Value: 5")
    near = alike([f"Lab: {item_and_value} mmol/L | Level: far above range" for item_and_value in said])
    assert near[0, 1] > 0.7 > 0.4 > near[0, 2]
    # Neighbouring bins share 16; 1.5 lies halfway between 1 and 2, where the magnitude is straight between powers of 2.
    bins = list(encoders.HashingEncoder().numbers_of_item(f"pH | {1.5 - 1 / 64} {2 - 1 / 64}"))
    assert bins[:2] == [("pH # # 0 1 2", 8), ("pH # # 0 1 3", 8)]
    assert bins[8:10] == [("pH # # 1 4 12", 16), ("pH # # 1 4 13", 0)]
    names = "Lab: 50912|Lab: 50931|SNOMED: 3950001|SNOMED: 184099003|NaCl 0.45 %|NaCl 0.9 %".split("|")
    assert (alike(names) - np.eye(6)).max() < 0.9
    doses = ("25,000", "25000", "2.49E+04", "9", "1e999")
    same, close, *far = alike([f"Heparin | Dose: {dose} UNIT" for dose in doses])[0, 1:]
    assert same == pytest.approx(1) and close > 0.98 > 0.9 > max(far)


def test_hashing_depends_on_no_machine_and_no_batch_and_gives_even_lengths(make, tmp_path):
    texts, hashing, alone = events(12), make("hashing"), make("hashing", cache_dir=tmp_path / "alone")
    vectors = hashing.encode_event_text_batch([*texts, "\ud800"])
    found = [alone.encode_event_text_batch([text])[0] for text in texts]
    np.testing.assert_array_equal(found, vectors[:-1])
    assert (np.abs(np.linalg.norm(found, axis=1) / 768**0.5 - 1) < 0.2).all()
    assert vectors.shape == (13, hashing.dim) == (13, 768) and np.isfinite(vectors).all()
    measured, word = hashing.encode_event_text_batch(["Lab: Lactate | Value: 4.1 mmol/L", "a"])
    np.testing.assert_allclose(measured[:6], [0.389928, 0.023462, 2.096205, 0.203758, 1.630365, 1.247953], atol=1e-5)
    # "a" is one item, one word and one 3-gram (" a ")
    sizes = [abs(0.5**0.5 + a * 0.15**0.5 + b * 0.05**0.5) for a in (-1, 1) for b in (-1, 1)]
    np.testing.assert_allclose(np.unique(np.abs(word)), sorted(sizes), rtol=1e-4)
