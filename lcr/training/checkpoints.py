"""Checkpoints that are whole or do not count.

    checkpoints/<step>/params, training     the arrays, written by Orbax
    checkpoints/<step>/run                  JSON: step, data position, configuration, counters
    checkpoints/<step>/manifest.json        size and CRC-32 of every other file, written last

A checkpoint counts once its manifest stands, and is read only if every file still is what the manifest says: Orbax
notices a file that is missing or cut short, but not a changed byte in an array, and a process killed while writing
may leave anything. What does not count is passed over for the newest one that does, and the log says so: a directory
without a manifest is half-written and gets removed when training goes on, one that differs from its manifest is
renamed to `<step>.corrupt` and kept.
"""

import concurrent.futures
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

MANIFEST = "manifest.json"
ITEMS = ("params", "training")
SLACK = 1 << 18  # bytes of a checkpoint beside its arrays

Arrays = Mapping[str, Mapping[str, Any]]  # {"params": {name: array}, "training": {name: array}}

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or there is none that can be read."""


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths, "0.mu.embedding": the form in which a checkpoint holds it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def from_named_arrays(like: Any, named: Mapping[str, Any]) -> Any:
    """The pytree of `like`'s structure with the leaves that `named_arrays` named."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in named_arrays(like)])


def file_sums(path: Path) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every file under `path` but the manifest, by its relative name."""
    sums = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            crc, size = 0, 0
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    crc, size = zlib.crc32(block, crc), size + len(block)
            sums[file.relative_to(path).as_posix()] = [size, crc]
    return sums


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, None where there is none or it cannot be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    manifest = read_manifest(path)
    if manifest is None:
        return "it was not written to the end (no manifest)"
    found = file_sums(path)
    for name, (size, crc) in manifest["files"].items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes instead of {size}"
        if found[name][1] != crc:
            return f"the contents of {name} have changed"
    return None


def list_steps(directory: Path) -> list[int]:
    """The steps with a finished checkpoint, rising. They may have been damaged since (`find_damage`)."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if path.name.isdigit() and read_manifest(path) is not None]
    return sorted(int(path.name) for path in paths)


def newest_good(directory: Path) -> tuple[int | None, dict[int, str]]:
    """The newest step whose files are all there, None if there is none; and what is wrong with the newer ones."""
    damaged = {}
    for step in reversed(list_steps(directory)):
        damage = find_damage(directory / str(step))
        if damage is None:
            return step, damaged
        log.warning("checkpoint %s cannot be used: %s", directory / str(step), damage)
        damaged[step] = damage
    return None, damaged


def check_arrays(path: Path, like: Arrays) -> None:
    """The checkpoint holds arrays of these names, shapes and dtypes. Raises CheckpointError with what differs."""
    held = read_manifest(path)["arrays"]
    for item, arrays in like.items():
        wanted = describe(arrays)
        names = sorted(name for name in {*wanted, *held[item]} if wanted.get(name) != held[item].get(name))
        if names:
            rows = [f"{n}: {held[item].get(n, 'absent')} instead of {wanted.get(n, 'absent')}" for n in names[:5]]
            raise CheckpointError(
                f"checkpoint {path} was written by another version of the model or the optimizer; {len(names)} arrays "
                f"of {item!r} differ: {'; '.join(rows)}. Use the code that wrote it, or train in a new workdir."
            )


def describe(arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [*array.shape, str(array.dtype)] for name, array in arrays.items()}


def read_checkpoint(path: Path, like: Arrays) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The arrays of a whole checkpoint (see `newest_good`) and its `run`.

    like: the items to read, with anything that has `shape` and `dtype` for each array.
    """
    check_arrays(path, like)
    blanks = {
        item: {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in arrays.items()}
        for item, arrays in like.items()
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            path.absolute(),
            args=ocp.args.Composite(
                run=ocp.args.JsonRestore(), **{item: ocp.args.StandardRestore(blank) for item, blank in blanks.items()}
            ),
        )
    return {item: {name: jnp.array(x) for name, x in restored[item].items()} for item in like}, restored["run"]


def check_space(directory: Path, arrays: Arrays) -> None:
    """Raises OSError where the disk has no room for a checkpoint: Orbax would fail half-way, and noisily."""
    needed = sum(x.size * x.dtype.itemsize for item in arrays.values() for x in item.values()) + SLACK
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes needed, {free} free", str(directory))


class CheckpointWriter:
    """Writes checkpoints in the background, keeping the last `keep_last` and the best one (the lowest `loss`).

    A write that fails is reported by the next call of `save`, `check` or `wait`, as a CheckpointError.
    """

    def __init__(self, directory: Path, keep_last: int):
        self.directory = directory
        self.keep_last = keep_last
        directory.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._commit: concurrent.futures.Future | None = None
        self._step: int | None = None

    def save(self, step: int, arrays: Arrays, run: Mapping[str, Any], loss: float | None) -> None:
        """Begins to write a checkpoint; returns once the arrays may be donated. Waits for the one before.

        run: what goes into JSON. loss: by which the best is chosen; None never is the best.
        """
        self.wait()
        self._step = step
        path = (self.directory / str(step)).absolute()
        items = {item: ocp.args.StandardSave(dict(arrays[item])) for item in ITEMS}
        manifest = {"step": step, "loss": loss, "arrays": {item: describe(arrays[item]) for item in ITEMS}}
        try:
            check_space(self.directory, arrays)
            self._orbax.save(path, args=ocp.args.Composite(run=ocp.args.JsonSave(dict(run)), **items))
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from error
        self._commit = self._thread.submit(self._finish, path, manifest)

    def check(self) -> None:
        """Raises CheckpointError if the checkpoint under way has failed; waits for nothing."""
        if self._commit is not None and self._commit.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint under way, if any, is whole. Raises CheckpointError if it failed."""
        if self._commit is None:
            return
        commit, self._commit = self._commit, None
        try:
            commit.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits, and lets the threads go. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def clear_away(self, damaged: Mapping[int, str]) -> None:
        """Makes room before training goes on: removes half-written checkpoints, renames damaged ones."""
        for step in damaged:
            source = self.directory / str(step)
            target = source.with_name(f"{step}.corrupt")
            number = 1
            while target.exists():
                number += 1
                target = source.with_name(f"{step}.corrupt{number}")
            source.rename(target)
            log.warning("checkpoint %s (%s) is kept as %s", source, damaged[step], target.name)
        self._remove_half_written()

    def _remove_half_written(self) -> None:
        for path in sorted(self.directory.iterdir()):
            unfinished = path.name.isdigit() and read_manifest(path) is None
            if unfinished or ".orbax-checkpoint-tmp" in path.name:
                log.warning("checkpoint %s was not written to the end: removed", path)
                shutil.rmtree(path)

    def _finish(self, path: Path, manifest: dict[str, Any]) -> None:
        self._orbax.wait_until_finished()
        text = json.dumps({**manifest, "files": file_sums(path)})
        part = path / (MANIFEST + ".part")
        with part.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(path / MANIFEST)
        self._drop_old()

    def _drop_old(self) -> None:
        steps = list_steps(self.directory)
        losses = {step: (read_manifest(self.directory / str(step)) or {}).get("loss") for step in steps}
        known = [step for step in steps if losses[step] is not None]
        best = min(known, key=lambda step: losses[step], default=None)
        for step in steps[: -self.keep_last]:
            if step != best:
                # the manifest goes first, so that one half removed does not count
                (self.directory / str(step) / MANIFEST).unlink()
                shutil.rmtree(self.directory / str(step))

    def _failed(self, error: Exception) -> CheckpointError:
        steps = [step for step in list_steps(self.directory) if step != self._step]
        last = f"the last good one is {self.directory / str(steps[-1])}" if steps else "there is no earlier one"
        full = "No space left" in str(error)
        remedy = "Free disk space" if full else "Mend the cause"
        cause = "the disk is full" if full else f"{type(error).__name__}: {error}"
        return CheckpointError(
            f"the checkpoint of step {self._step} could not be written to {self.directory}: {cause}. Training has "
            f"stopped; {last}. {remedy} and give the same command again: it goes on from there."
        )
