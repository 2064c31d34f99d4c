"""Texts become vectors once each: what the cache holds is whole or ignored, whoever writes it, and never executed."""

import gc
import multiprocessing
import os
import pickle
import random
import signal
import time
import weakref
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
from small_table import arguments, leftovers, small_table
from test_checkpoints import Malicious

import train
from clinical_lf import encoders
from clinical_lf.files import InputError

DIM = 6
keys_of = lambda *names: train.text_keys(names)
vectors_of = lambda n, value=1.0: np.outer(np.arange(1, n + 1), np.full(DIM, value)).astype(np.float32)
cache_in = lambda folder, legacy_folders=(): train.EmbeddingCache(folder, DIM, legacy_folders)
parts = lambda folder: sorted(folder.glob("part-*"))


@pytest.fixture
def filled(tmp_path):
    """A cache folder of two parts: a, b, c and d."""
    cache = cache_in(tmp_path / "cache")
    cache.append(keys_of("a", "b", "c"), vectors_of(3))
    cache.append(keys_of("d"), vectors_of(1, 9.0))
    return cache.folder


def test_keys_are_the_md5_of_the_utf8_text_zeros_and_all(tmp_path):
    """Keys that differ in the last byte only, and keys that end in zero bytes, which numpy's own strings would drop."""
    assert keys_of("abc")[0].tobytes().hex() == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321
    assert [len(keys_of(*names)) for names in (("", "é"), ("\ud800",), ())] == [2, 1, 0]
    digits = np.zeros((6, 16), np.uint8)
    digits[:, 0], digits[:, 15] = [0, 0, 0, 200, 200, 9], [3, 0, 1, 0, 255, 0]
    keys, cache = digits.view(train.KEY)[:, 0], cache_in(tmp_path)
    cache.append(keys[:5], vectors_of(5))
    np.testing.assert_array_equal(cache.gather(keys[:5])[:, 0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(cache.missing(keys), [False] * 5 + [True])


def test_new_cache_is_empty_gives_back_in_any_order_and_later_parts_are_seen_after_refresh_and_win(filled, tmp_path):
    new = cache_in(tmp_path / "none")
    with pytest.raises(KeyError, match="1 of 1"):
        new.gather(keys_of("a"))
    assert new.missing(keys_of("a")).all() and not new.folder.exists()
    reader, writer = cache_in(filled), cache_in(filled)
    np.testing.assert_array_equal(reader.gather(keys_of("d", "b", "d"))[:, 0], [9, 2, 9])
    np.testing.assert_array_equal(reader.missing(keys_of("x", "a", "y", "c")), [True, False, True, False])
    assert reader.gather(keys_of()).shape == (0, DIM)
    writer.append(keys_of("e", "a"), vectors_of(2, 35.0))
    reader.refresh()
    for cache in (reader, writer, cache_in(filled)):
        assert cache.gather(keys_of("e", "a"))[:, 0].tolist() == [35, 70]
    for part in parts(filled):  # as an earlier version named them, without a checksum
        part.rename(part.with_name(part.name[:-8] + 32 * "0"))
    assert cache_in(filled).gather(keys_of("e", "b"))[:, 0].tolist() == [35, 2]


# ---- damage ----
save = lambda name, array: lambda part: np.save(part / name, array, allow_pickle=True)
DAMAGE = {
    "cut short": lambda part: os.truncate(part / "vectors.npy", (part / "vectors.npy").stat().st_size - 5),
    "cut header": lambda part: os.truncate(part / "vectors.npy", 7),
    "other dimension": save("vectors.npy", np.ones((3, DIM + 1), np.float32)),
    "other type": save("vectors.npy", np.ones((3, DIM), np.float64)),
    "fewer keys": save("keys.npy", keys_of("a")),
    "a bit of a vector": lambda part: np.bitwise_xor.at(np.memmap(part / "vectors.npy", np.uint8), -5, 1),
    "a bit of a key": lambda part: np.bitwise_xor.at(np.memmap(part / "keys.npy", np.uint8), -1, 128),
    "zeros": save("vectors.npy", np.zeros((3, DIM), np.float32)),
    "no vectors": lambda part: (part / "vectors.npy").unlink(),
    "a file": lambda part: (part.rename(part.with_name("old")) / "keys.npy").rename(part),
    "objects": save("vectors.npy", np.array([Malicious()], object)),
    "pickled keys": lambda part: (part / "keys.npy").write_bytes(pickle.dumps(Malicious())),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_part_is_ignored_with_one_warning(filled, damage, caplog, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    DAMAGE[damage](parts(filled)[0])
    cache = cache_in(filled)
    np.testing.assert_array_equal(cache.missing(keys_of("a", "b", "c", "d")), [True, True, True, False])
    assert [record.getMessage()[:9] for record in caplog.records] == ["1 damaged"]
    cache.append(keys_of("a"), vectors_of(1, 5.0))  # made anew
    assert cache_in(filled).gather(keys_of("a", "d"))[:, 0].tolist() == [5, 9]
    assert not Path("let_in").exists()


@pytest.mark.parametrize("vectors", [vectors_of(1, np.nan), np.ones((2, DIM)), np.ones((1, DIM + 1))])
def test_what_is_no_vector_of_a_text_is_never_written(tmp_path, vectors):
    with pytest.raises(ValueError, match="NaN|do not fit") as raised:
        cache_in(tmp_path).append(keys_of("a"), vectors)
    assert (raised.type is InputError) == np.isnan(vectors).any() and not parts(tmp_path)


def single_file(folder, name, array):
    folder.mkdir(exist_ok=True)
    np.save(folder / (keys_of(name).tobytes().hex() + ".npy"), array, allow_pickle=True)


def test_single_files_are_read_as_they_are_and_damaged_ones_ignored(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    single_file(tmp_path / "old", "flat", np.full(DIM, 2, np.float32))
    single_file(tmp_path / "new", "row", np.full((1, DIM), 3, np.float64))
    bad = [np.ones(DIM - 1), np.full(DIM, np.nan), np.array([Malicious()], object), np.array(["x"])]
    for number, array in enumerate(bad):
        single_file(tmp_path / "new", str(number), array)
    cache = cache_in(tmp_path / "new", [tmp_path / "old", tmp_path / "none"])
    cache.adopt_legacy(keys_of("flat", "x", "row", *"0123"))
    np.testing.assert_array_equal(cache.missing(keys_of("flat", "row", "x", *"0123")), [False] * 2 + [True] * 5)
    np.testing.assert_array_equal(cache.gather(keys_of("row", "flat"))[:, 0], [3, 2])
    assert "4 single .npy files are damaged" in caplog.text and not Path("let_in").exists()


# ---- several processes ----
def start_writer(folder, first, count):
    cache, numbers = cache_in(folder), range(first, first + count)
    write = lambda: [cache.append(keys_of(f"text {i}"), vectors_of(1, i + 1.0)) for i in numbers]
    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    return process


def test_two_processes_write_at_once(tmp_path):
    for writer in [start_writer(tmp_path, first, 40) for first in (0, 20)]:  # twenty texts are written by both
        writer.join()
    values = cache_in(tmp_path).gather(keys_of(*(f"text {i}" for i in range(60))))[:, 0]
    np.testing.assert_array_equal(values, np.arange(1, 61))


def test_killed_writer_leaves_nothing_half_written(tmp_path, caplog):
    pause = random.Random(0)
    for _ in range(8):
        n_parts = len(parts(tmp_path))
        writer = start_writer(tmp_path, 0, 100_000)
        while len(parts(tmp_path)) == n_parts and writer.is_alive():
            time.sleep(0.005)
        time.sleep(0.05 * pause.random())
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    cache = cache_in(tmp_path)
    cache.append(keys_of("last"), vectors_of(1))
    assert not leftovers(tmp_path) and not caplog.records
    assert len(parts(tmp_path)) > 0 and cache.gather(keys_of("text 0"))[0, 0] == 1


# ---- each text once ----
@pytest.fixture
def make(tiny_longformer, tmp_path):
    """Builds encoders with small batches, which by default share this test's cache folder."""

    def build(cache="cache", budget=400, **options):
        places = {"cache_dir": tmp_path / cache, "devices": ["cpu"], "dtype": "float32"}
        encoder = train.ClinicalTextEncoder(tiny_longformer, **places | options)
        encoder.encoder.budget = budget
        return encoder

    return build


events = lambda count: [f"lab: lactate | value: {i} mmol/l" + " | level: above range" * (i % 5) for i in range(count)]


def test_cached_text_is_never_encoded_again(make):
    first, second = make(), make()
    first.embed([*events(20), *events(20), None], progress=False)
    assert first.n_encoded == 21
    second.embed([*events(30), ""], progress=False)
    assert second.n_encoded == 10
    with pytest.raises(KeyError, match="1 of 1 texts"):
        second.vectors(["never seen"])


def test_stopped_run_keeps_what_is_done_and_ends_with_the_same_bits(make, monkeypatch):
    whole, stopped, again = make("whole", 600), make(budget=600), make(budget=600)
    expected = whole.encode_event_text_batch(events(300))
    four_batches = Mock(wraps=stopped.encoder.forward, side_effect=[*[DEFAULT] * 4, KeyboardInterrupt])
    monkeypatch.setattr(stopped.encoder, "forward", four_batches)
    with pytest.raises(KeyboardInterrupt):
        stopped.embed(events(300), progress=False)
    np.testing.assert_array_equal(again.encode_event_text_batch(events(300)), expected)
    assert 0 < stopped.n_encoded < 300 and stopped.n_encoded + again.n_encoded == 300


def test_two_ranks_share_the_texts_and_two_devices_or_ranks_give_the_vectors_of_one(make):
    ranks, two = [make(), make()], make("two", devices=["cpu", "cpu"])
    expected = make("alone").encode_event_text_batch(events(200))
    two.embed(events(200), progress=False)
    for rank, encoder in enumerate(ranks):
        encoder.embed(events(200), rank, 2, progress=False)
    assert ranks[0].n_encoded + ranks[1].n_encoded == 200 and min(rank.n_encoded for rank in ranks) > 50
    for encoder in (*ranks, two):
        np.testing.assert_array_equal(encoder.vectors(events(200)), expected)


def test_encoder_is_out_of_memory_before_training(tiny_longformer, tmp_path, monkeypatch, capfd):
    convert, in_memory = encoders.longformer_as_roberta, weakref.WeakSet()
    remember = lambda longformer: (model := convert(longformer), in_memory.add(model))[0]

    def count(trainer):
        gc.collect()
        raise InputError(f"{len(in_memory)} encoders")

    monkeypatch.setattr(encoders, "longformer_as_roberta", remember)
    monkeypatch.setattr(train.Trainer, "fit", count)
    small_table().to_csv(tmp_path / "data.csv", index=False)
    assert train.main(arguments(tmp_path, tmp_path / "data.csv", encoder=tiny_longformer)) == 2
    assert "error: 0 encoders" in capfd.readouterr().err
