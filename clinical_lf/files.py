"""Files that are whole or not there, one writer of a folder at a time, progress in a log, errors a person can mend."""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

logger = logging.getLogger("clinical_LF")

HALF_WRITTEN = "-half-written-"  # in temporary names: the next to lock the folder removes what a killed run left
CHOOSE_ANOTHER_FOLDER = "choose another folder (--output-dir, --cache-dir)"
SECONDS_BETWEEN_LINES = 30  # of progress, in a log
SECONDS_UNTIL_SAID = 5  # that a run waits for another's lock
WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text("utf-8"))


class InputError(ValueError):
    """Something that the person who runs the program can mend: says what is wrong, where, and how to mend it."""


class Progress(tqdm):
    """A bar where somebody watches, a terminal or a notebook; in a log a line every 30 s with the time left."""

    def __init__(self, *arguments: Any, active: bool = True, **options: Any) -> None:
        self.is_watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        if not self.is_watched:
            line = "{desc:12s}{percentage:3.0f} %, {n_fmt} of {total_fmt}{unit}, {remaining} left{postfix}"
            options |= {"file": io.StringIO(), "bar_format": line, "mininterval": SECONDS_BETWEEN_LINES, "delay": 1e-9}
        super().__init__(*arguments, disable=not active, leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.is_watched:
            super().display(msg, pos)
        elif msg is None:  # not the end, which clears a bar
            logger.info(str(self))


def log_to_stdout() -> None:
    """Send the log, plain messages of the first process, to the standard output."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console of cp1252 has no word for every text and path
        sys.stdout.reconfigure(errors="backslashreplace")
    logger.handlers, logger.propagate = [logging.StreamHandler(sys.stdout)], False
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)


def exit_code(work: Callable[[], object], what_is_kept: Callable[[], str]) -> int:
    """Do the work; return 0 if it is done, 2 where a person can mend something, 128 + the signal that stopped it."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # Of several processes, one that ends in its own time leaves the others waiting; only the main thread may listen.
    listens = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if listens else ()
    own = (signal.default_int_handler, signal.SIG_DFL)  # what a shell's background ignores stays ignored
    usual = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) in own}
    try:
        work()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if received or isinstance(error, KeyboardInterrupt):  # DuckDB makes a RuntimeError of it, torch.save too
            print(f"\nInterrupted. {what_is_kept()}", file=sys.stderr)
            return 128 + (*received, signal.SIGINT)[0]
        said = [WORDS["mendable"][kind.__name__] for kind in type(error).__mro__ if kind.__name__ in WORDS["mendable"]]
        if not said:
            raise
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        place = f"{name}: " if (name := getattr(error, "filename", None)) else ""
        print(f"error: {said[0].format(reason=reason, place=place)}", file=sys.stderr)
        return 2
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file, or a folder of them, through a temporary name, which `write` gets. Raises InputError."""
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}{HALF_WRITTEN}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for written in temporary.iterdir() if temporary.is_dir() else [temporary]:
            with open(written, "rb+") as file:
                os.fsync(file.fileno())  # else a power cut may leave the name without the content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise InputError(f"{path}: cannot be written ({reason}). Free space, or {CHOOSE_ANOTHER_FOLDER}.") from None
    finally:
        delete_quietly(temporary)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write plain data, indented; what JSON has no word for as its text."""
    text = json.dumps(content, indent=2, default=str, allow_nan=False) + "\n"
    return write_whole(path, lambda name: name.write_text(text, "utf-8"))


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files below a folder, sorted: links are followed, what begins with a dot or _ is no data."""
    found: dict[Path, Path] = {}  # by where they really are: each once, and no link to a folder above goes on for ever
    folders = [folder] * folder.is_dir()
    while folders:
        for path in sorted(folders.pop().iterdir()):
            real = path.resolve()
            if not real.exists():
                raise InputError(f"{path} is a link to what is not there. Is its disk mounted?")
            if not path.name.startswith((".", "_")) and real not in found:
                found[real] = path
                folders += [path] * path.is_dir()
    return sorted(path for path in found.values() if path.suffix == ".parquet" and path.is_file())


def delete_quietly(path: Path) -> None:
    """Delete a file or a folder, if it is there and ours to delete."""
    with contextlib.suppress(OSError):  # as where its own folder is a file
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder against other runs and remove what killed ones left half-written; InputError if not ours."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}): {CHOOSE_ANOTHER_FOLDER}.") from None
    lock = FileLock(folder / ".lock")  # falls with the process that has it
    with contextlib.suppress(OSError):  # some network disks cannot lock: then nothing is removed
        try:
            lock.acquire(timeout=SECONDS_UNTIL_SAID if wait else 0)
        except Timeout:
            if not wait:
                raise refusal("held_folder", folder=folder) from None
            logger.info(f"Waiting     for another run that writes into {folder}")
            lock.acquire()
        for left in folder.rglob(f".*{HALF_WRITTEN}*"):
            if left.parent == folder or not (left.parent / ".lock").exists():  # else that folder's own holder does it
                delete_quietly(left)
    try:
        yield
    finally:
        if made and not wait and [*folder.glob("*")] == [folder / ".lock"]:  # nothing was written: no trace stays
            delete_quietly(folder / ".lock")  # while it is held: who waits would go on with the deleted file
        lock.release()
        with contextlib.suppress(OSError):  # something is in it
            for place in made:
                place.rmdir()


def parts_of(content: dict[Any, Any], above: str = "") -> Iterator[str]:
    """Yield the names of the parts of nested plain data, such as `model/classifier.0.weight`."""
    for key, value in content.items():
        yield f"{above}{key}"
        is_list = isinstance(value, list) and value and isinstance(value[0], dict)
        if is_list or isinstance(value, dict):
            yield from parts_of(dict(enumerate(value)) if is_list else value, f"{above}{key}/")


def free_disk(folder: Path) -> int:
    """Return how many bytes are free where a folder is, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def refusal(key: str, **found: Any) -> InputError:
    """Return the error that words.yaml has for what a person can mend, filled with what was found."""
    return InputError(WORDS["refusals"][key].format(**found))
