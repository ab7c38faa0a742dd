"""Datasets: what is in them, and what the tests of collect_procgen.py do to them."""

import gc
import json
import os
import re
import sys

import numpy as np
from procgen import ProcgenGym3Env
from runs import ROOT, run_main

import collect_procgen

SCRIPT = [sys.executable, str(ROOT / "collect_procgen.py")]
NAME = re.compile(r"\d{8}T\d{6}_(\d+)_(\d+)_(\d+)_(-?\d+\.\d\d)\.npz")


def verify(folder, *more):
    return run_main(collect_procgen, ["--verify", str(folder), *more], folder.parent)


def episodes(folder):
    """{index: (path, arrays)} of a dataset."""
    found = {}
    for path in folder.glob("*/*.npz"):
        with np.load(path, allow_pickle=False) as file:
            found[int(NAME.fullmatch(path.name)[1])] = (path, dict(file))
    return dict(sorted(found.items()))


def rows(folder):
    """The recorded steps of a dataset's first segment: the arrays of its files, one after the other."""
    chunks = [dict(np.load(path)) for path in sorted(folder.glob("0_*.npz"))]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def metadata(folder):
    return json.loads((folder / "metadata.json").read_text())


class Killed(BaseException):
    """Ends a collection in this process as SIGKILL ends a process: nothing gets to save anything."""


def contents(folder):
    """{name without the time: bytes} of a dataset's episodes."""
    return {path.name[16:]: path.read_bytes() for path in folder.glob("*/*.npz")}


def rewrite(folder, index, **changes):
    path, episode = episodes(folder)[index]
    np.savez_compressed(path, **{**episode, **changes})
    return path


def change_chunk(folder, **changes):
    """Change arrays of a recording's first file: name=function from the array to the new one."""
    path = folder / "0_00000000.npz"
    chunk = dict(np.load(path))
    for key, change in changes.items():
        chunk[key] = change(chunk[key])
    np.savez_compressed(path, **chunk)


def add_one_at(row):
    def change(array):
        array[row] += 1
        return array

    return change


def die_within(monkeypatch, name, call, play, *arguments):
    """Call play, but raise Killed at the nth call of `name`, a step of the games or the renaming of a file."""
    owner = ProcgenGym3Env if name == "act" else os
    calls, original = [], getattr(owner, name)

    def counted(*args):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    try:
        process = play(*arguments)
    except Killed:
        process = None
    monkeypatch.setattr(owner, name, original)
    gc.collect()  # as a dead process, it holds no lock
    return process
