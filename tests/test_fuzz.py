"""The loader on malformed files: a dataset whose numbers are the file's, or one line; never anything else."""

import os
import tempfile
from pathlib import Path

import h5py
import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common import data
from common.run import UsageError

TASK = data.get_task("hopper-medium-v2")
WIDTHS = {"observations": 11, "actions": 3, "next_observations": 11}
WIDTHS |= {"rewards": None, "terminals": None, "timeouts": None}
DTYPES = ("f4", "f8", "f2", "i4", "u1", "?", "S3", "c8", "O", "group", "missing", "empty")
REPEATABLE = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
SHAPES = ("right", "column", "wide", "short", "scalar", "deep", "none")


@st.composite
def trees(draw) -> tuple[int, dict[str, tuple[str, str, int]], bool]:
    """Rows, (dtype, shape, seed) by array, cut off or not; most arrays are right, so that some files are read."""
    kinds = {}
    for name in WIDTHS:
        wrong = draw(st.integers(0, 5)) == 0
        dtype = draw(st.sampled_from(DTYPES if wrong else ("f4", "f8", "f4", "?", "missing")))
        shape = draw(st.sampled_from(SHAPES)) if draw(st.integers(0, 5)) == 0 else "right"
        kinds[name] = (dtype, shape, draw(st.integers(0, 99)))
    return draw(st.integers(0, 40)), kinds, draw(st.integers(0, 12)) == 0


def array_of(name: str, n: int, dtype: str, shape: str, seed: int) -> np.ndarray:
    rng, width = np.random.default_rng(seed), WIDTHS[name]
    right = (n,) if width is None else (n, width)
    sizes = {"right": right, "column": (n, 1), "wide": (n, (width or 1) + 1), "short": (max(n - 1, 0), *right[1:]),
             "scalar": (), "deep": (*right, 2), "none": (0, *right[1:])}  # fmt: skip
    x = rng.uniform(-1, 1, sizes[shape])
    if name in ("terminals", "timeouts"):
        x = np.asarray(rng.random(sizes[shape]) < 0.1, dtype=np.float64)
    if seed % 10 == 0 and x.size:
        x.flat[seed % x.size] = (np.nan, np.inf, 1e30, 5.0, -1.0005)[seed // 20]
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def write(path: Path, n: int, kinds: dict, cut: bool) -> dict[str, np.ndarray]:
    """The file; returns its arrays."""
    arrays = {}
    with h5py.File(path, "w") as f:
        for name, (dtype, shape, seed) in kinds.items():
            if dtype == "missing":
                continue
            if dtype == "group":
                f.create_group(name)
            elif dtype == "empty":
                f.create_dataset(name, data=h5py.Empty("f4"))
            elif dtype == "O":
                f.create_dataset(name, data=["text"] * n, dtype=h5py.string_dtype())
            else:
                arrays[name] = array_of(name, n, dtype, shape, seed)
                f.create_dataset(name, data=arrays[name])
    if cut:
        os.truncate(path, path.stat().st_size // 2)
    return arrays


@settings(max_examples=400, **REPEATABLE)
@given(tree=trees())
@example((3, {k: ("f4", "right", 1) for k in WIDTHS}, False))
@example((0, {k: ("f4", "right", 1) for k in WIDTHS}, False))
@example((1, {k: ("f8", "column" if w is None else "right", 1) for k, w in WIDTHS.items()}, False))
def test_a_file_is_read_exactly_or_refused_in_one_line(tree):
    n, kinds, cut = tree
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.hdf5"
        arrays = write(path, n, kinds, cut)
        try:
            dataset = data.read_d4rl(path, TASK, "")
        except UsageError as e:
            assert "\n" not in str(e) and str(path) in str(e)
            return
    assert not cut and {"observations", "actions", "rewards", "terminals"} <= set(arrays)
    flags = {k: arrays[k].reshape(n) == 1 for k in ("terminals", "timeouts") if k in arrays}
    assert all(np.isin(arrays[k], (0, 1)).all() for k in flags) and not flags["terminals"].all()
    timeouts = flags.get("timeouts", np.zeros(n, bool))  # 40 rows are below the limit
    keep = np.ones(n, bool)
    if "next_observations" not in arrays:  # the rows whose successor the file does not hold
        keep &= ~(timeouts & ~flags["terminals"])
        keep[-1] &= flags["terminals"][-1]
    assert len(dataset.rewards) == keep.sum() >= 2
    for got, name in zip(dataset[:3], ("observations", "actions", "rewards"), strict=True):
        wanted = arrays[name].astype(np.float32)[keep].reshape(got.shape)
        wanted = wanted.clip(-1, 1) if name == "actions" else wanted
        assert got.dtype == np.float32 and np.isfinite(got).all() and np.array_equal(got, wanted)
    assert np.array_equal(dataset.terminations, flags["terminals"][keep])
    successors = arrays.get("next_observations", np.roll(arrays["observations"], -1, 0)).astype(np.float32)
    if "next_observations" not in arrays:
        successors[flags["terminals"]] = arrays["observations"].astype(np.float32)[flags["terminals"]]
    assert np.array_equal(dataset.next_obs, successors[keep])
    assert dataset.ends[dataset.terminations > 0].all()


def test_some_fuzzed_files_are_read_and_some_refused():
    """The strategy reaches both outcomes, or the test above says little."""
    outcomes = []

    @settings(max_examples=150, **REPEATABLE)
    @given(tree=trees())
    def run_one(tree):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "file.hdf5", *tree)
            try:
                data.read_d4rl(Path(folder) / "file.hdf5", TASK, "")
                outcomes.append("read")
            except UsageError as e:
                outcomes.append(str(e).split(": ")[2][:25])

    run_one()
    assert outcomes.count("read") > 10 and len(set(outcomes)) > 10
