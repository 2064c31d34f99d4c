"""The embedding cache: parts that are whole or ignored, any number of writers, nothing executed."""

import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train

DIM = 6


def keys_of(*names):
    return train.text_keys(names)


def vectors_of(n, value=1.0):
    return np.full((n, DIM), value, np.float32) * np.arange(1, n + 1, dtype=np.float32)[:, None]


@pytest.fixture
def filled(tmp_path):
    """A cache folder of two parts: a, b, c and d."""
    cache = train.EmbeddingCache(tmp_path / "cache", DIM)
    cache.append(keys_of("a", "b", "c"), vectors_of(3))
    cache.append(keys_of("d"), vectors_of(1, 9.0))
    return cache.folder


def parts(folder):
    return sorted(folder.glob("part-*"))


def test_key_is_the_md5_of_the_utf8_text():
    assert keys_of("abc")[0].tobytes().hex() == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321
    assert [len(keys_of(*names)) for names in (("", "é"), ("\ud800",), ())] == [2, 1, 0]


def test_round_trip_in_any_order(filled):
    cache = train.EmbeddingCache(filled, DIM)
    np.testing.assert_array_equal(cache.gather(keys_of("d", "b", "d"))[:, 0], [9, 2, 9])
    np.testing.assert_array_equal(cache.missing(keys_of("x", "a", "y", "c")), [True, False, True, False])
    assert cache.gather(keys_of()).shape == (0, DIM)


def test_new_cache_is_empty_and_makes_no_folder(tmp_path):
    cache = train.EmbeddingCache(tmp_path / "none", DIM)
    assert cache.missing(keys_of("a")).all() and not (tmp_path / "none").exists()
    with pytest.raises(KeyError, match="1 of 1"):
        cache.gather(keys_of("a"))


def test_thousand_texts_in_many_parts(tmp_path):
    cache, names = train.EmbeddingCache(tmp_path, DIM), [f"text {i}" for i in range(1000)]
    for start in range(0, 1000, 90):
        chunk = names[start : start + 90]
        cache.append(keys_of(*chunk), vectors_of(len(chunk)) + start)
    values = train.EmbeddingCache(tmp_path, DIM).gather(keys_of(*names[::-1]))[:, 0]
    np.testing.assert_array_equal(values[::-1], np.arange(1, 1001))


def test_keys_are_sixteen_bytes_zeros_and_all(tmp_path):
    """Keys that differ in the last byte only, and keys that end in zero bytes, which numpy's own strings would drop."""
    digits = np.zeros((6, 16), np.uint8)
    digits[:, 0] = [0, 0, 0, 200, 200, 9]
    digits[:, 15] = [3, 0, 1, 0, 255, 0]
    keys = digits.view(train.KEY)[:, 0]
    cache = train.EmbeddingCache(tmp_path, DIM)
    cache.append(keys[:5], vectors_of(5))
    np.testing.assert_array_equal(cache.gather(keys[:5])[:, 0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(cache.missing(keys), [False] * 5 + [True])


def test_later_part_wins(filled):
    cache = train.EmbeddingCache(filled, DIM)
    cache.append(keys_of("a"), vectors_of(1, 50.0))
    assert cache.gather(keys_of("a"))[0, 0] == 50
    assert train.EmbeddingCache(filled, DIM).gather(keys_of("a"))[0, 0] == 50


def test_parts_of_others_are_seen_after_refresh_and_rows_stay(filled):
    reader, writer = train.EmbeddingCache(filled, DIM), train.EmbeddingCache(filled, DIM)
    rows = reader.locate(keys_of("a", "d"))
    writer.append(keys_of("e"), vectors_of(1, 70.0))
    reader.refresh()
    assert reader.gather(keys_of("e"))[0, 0] == 70
    np.testing.assert_array_equal(reader.take(rows)[:, 0], [1, 9])


def test_mapped_vectors_are_the_gathered_ones_from_one_file(filled):
    keys = keys_of("d", "b", "d")
    first = train.EmbeddingCache(filled, DIM).mapped(keys)
    np.testing.assert_array_equal(first[:, 0], [9, 2, 9])
    for part in parts(filled):
        train.remove(part)
    again = train.EmbeddingCache(filled, DIM).mapped(keys)  # found again, not gathered
    assert isinstance(again, np.memmap) and np.array_equal(again, first)


def test_mapped_vectors_of_three_sets_of_texts_are_kept(filled):
    cache = train.EmbeddingCache(filled, DIM)
    for names in ("a", "b", "c", "d", "ab"):
        cache.mapped(keys_of(*names))
    assert len(list(filled.glob("gathered-*"))) == 3


def test_vectors_of_a_folder_that_cannot_be_written_are_gathered_in_memory(filled, monkeypatch):
    def not_ours(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", not_ours)
    vectors = train.EmbeddingCache(filled, DIM).mapped(keys_of("d", "b"))
    assert not isinstance(vectors, np.memmap) and vectors[:, 0].tolist() == [9, 2]


# ---- damage ----


def cut_short(part):
    path = part / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-5])


def cut_header(part):
    (part / "vectors.npy").write_bytes(b"\x93NUMPY\x01")


def other_dimension(part):
    np.save(part / "vectors.npy", np.ones((3, DIM + 1), np.float32))


def other_type(part):
    np.save(part / "vectors.npy", np.ones((3, DIM), np.float64))


def fewer_keys(part):
    np.save(part / "keys.npy", keys_of("a"))


def no_vectors(part):
    (part / "vectors.npy").unlink()


def a_file(part):
    for path in part.iterdir():
        path.unlink()
    part.rmdir()
    part.write_text("not a folder")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("let_in",)


def objects(part):
    np.save(part / "vectors.npy", np.array([Malicious()], object), allow_pickle=True)


def pickled_keys(part):
    (part / "keys.npy").write_bytes(pickle.dumps(Malicious()))


DAMAGE = [cut_short, cut_header, other_dimension, other_type, fewer_keys, no_vectors, a_file, objects, pickled_keys]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_part_is_ignored_with_one_warning(filled, damage, caplog, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    damage(parts(filled)[0])
    cache = train.EmbeddingCache(filled, DIM)
    np.testing.assert_array_equal(cache.missing(keys_of("a", "b", "c", "d")), [True, True, True, False])
    assert [record.getMessage()[:9] for record in caplog.records] == ["1 damaged"]
    assert not Path("let_in").exists()


def test_nan_is_never_written(tmp_path):
    with pytest.raises(train.InputError, match="NaN"):
        train.EmbeddingCache(tmp_path, DIM).append(keys_of("a"), vectors_of(1, np.nan))
    assert not parts(tmp_path)


@pytest.mark.parametrize("n, dim", [(2, DIM), (1, DIM + 1)])
def test_append_refuses_shapes_that_do_not_fit(tmp_path, n, dim):
    with pytest.raises(ValueError, match="do not fit"):
        train.EmbeddingCache(tmp_path, DIM).append(keys_of("a"), np.ones((n, dim)))


def test_full_disk_is_a_clear_error_and_leaves_nothing(filled, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(train.InputError, match="No space left"):
        train.EmbeddingCache(filled, DIM).append(keys_of("x"), vectors_of(1))
    assert not list(filled.glob(f"*{train.HALF_WRITTEN}*")) and len(parts(filled)) == 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_byte_changed_is_survived(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    train.EmbeddingCache(folder, DIM).append(keys_of("a", "b"), vectors_of(2))
    path = parts(folder)[0] / data.draw(st.sampled_from(["keys.npy", "vectors.npy"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    cache = train.EmbeddingCache(folder, DIM)
    present = ~cache.missing(keys_of("a", "b"))
    assert cache.gather(keys_of("a", "b")[present]).shape == (present.sum(), DIM)


# ---- earlier layout ----


def single_file(folder, name, array):
    folder.mkdir(exist_ok=True)
    np.save(folder / (keys_of(name).tobytes().hex() + ".npy"), array, allow_pickle=True)


def test_single_files_are_read_as_they_are(tmp_path):
    single_file(tmp_path / "old", "flat", np.full(DIM, 2, np.float32))
    single_file(tmp_path / "new", "row", np.full((1, DIM), 3, np.float64))
    cache = train.EmbeddingCache(tmp_path / "new", DIM, [tmp_path / "old", tmp_path / "none"])
    cache.adopt_legacy(keys_of("flat", "x", "row"))
    np.testing.assert_array_equal(cache.missing(keys_of("flat", "x", "row")), [False, True, False])
    np.testing.assert_array_equal(cache.gather(keys_of("row", "flat"))[:, 0], [3, 2])


BAD_ARRAYS = [np.ones(DIM - 1), np.full(DIM, np.nan), np.array([Malicious()], object), np.array(["x"])]


@pytest.mark.parametrize("array", BAD_ARRAYS)
def test_damaged_single_file_is_ignored(tmp_path, array, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    single_file(tmp_path, "bad", array)
    cache = train.EmbeddingCache(tmp_path, DIM)
    cache.adopt_legacy(keys_of("bad"))
    assert cache.missing(keys_of("bad"))[0] and not parts(tmp_path)
    assert "1 single .npy files are damaged" in caplog.text and not Path("let_in").exists()


# ---- several processes ----


def write_many(folder, first, count):
    cache = train.EmbeddingCache(folder, DIM)
    for i in range(first, first + count):
        cache.append(keys_of(f"text {i}"), vectors_of(1, i + 1.0))


def start(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_two_processes_write_at_once(tmp_path):
    writers = [start(write_many, tmp_path, first, 40) for first in (0, 20)]  # twenty texts are written by both
    for writer in writers:
        writer.join()
    values = train.EmbeddingCache(tmp_path, DIM).gather(keys_of(*(f"text {i}" for i in range(60))))[:, 0]
    np.testing.assert_array_equal(values, np.arange(1, 61))


def test_killed_writer_leaves_nothing_half_written(tmp_path, caplog):
    pause = random.Random(0)
    for _ in range(8):
        n_parts = len(parts(tmp_path))
        writer = start(write_many, tmp_path, 0, 100_000)
        while len(parts(tmp_path)) == n_parts and writer.is_alive():
            time.sleep(0.005)
        time.sleep(0.05 * pause.random())
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    cache = train.EmbeddingCache(tmp_path, DIM)
    cache.append(keys_of("last"), vectors_of(1))
    assert not list(tmp_path.glob(f"*{train.HALF_WRITTEN}*")) and not caplog.records
    assert len(parts(tmp_path)) > 0 and cache.gather(keys_of("text 0"))[0, 0] == 1


def test_what_a_living_writer_holds_is_left_alone_and_a_dead_ones_removed(tmp_path):
    orphan = tmp_path / f".0123{train.HALF_WRITTEN}part-x"
    with train.hold(tmp_path):
        orphan.mkdir()
        writer = start(write_many, tmp_path, 0, 1)
        time.sleep(0.2)
        assert orphan.exists() and not parts(tmp_path)  # the other writer waits
    writer.join()
    assert not orphan.exists() and len(parts(tmp_path)) == 1


def test_folder_that_cannot_lock_is_written_all_the_same(tmp_path, monkeypatch):
    orphan = tmp_path / f".0123{train.HALF_WRITTEN}part-x"
    orphan.mkdir()

    def no_locks(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(train.FileLock, "acquire", no_locks)
    train.EmbeddingCache(tmp_path, DIM).append(keys_of("a"), vectors_of(1))
    assert orphan.exists() and len(parts(tmp_path)) == 1  # it may be a living writer's


def test_folder_held_by_another_run_is_refused_without_waiting(tmp_path):
    with train.hold(tmp_path):
        with pytest.raises(train.InputError, match="another run writes here"):
            with train.hold(tmp_path, wait=False):
                pass
    with train.hold(tmp_path, wait=False):
        pass


def test_half_written_in_a_folder_that_another_holds_is_left(tmp_path):
    inner = tmp_path / "cache"
    with train.hold(inner):
        half = inner / f".0123{train.HALF_WRITTEN}part-x"
        half.mkdir()
        with train.hold(tmp_path):
            assert half.exists()
