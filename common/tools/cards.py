"""Data cards: which tasks there are, and whether a file is what it should be.

python -m common.tools.cards list
python -m common.tools.cards check NAME|FILE [--env TASK]
"""

import sys
from functools import partial
from itertools import takewhile
from pathlib import Path

import h5py
import numpy as np
import tyro

from common import judge
from common.data import TASKS, get_task, load, make_env
from common.run import UsageError

MEAN_RETURNS = {  # of D4RL's v2 files, by task without "-v2", as many published runs log them
    "hopper-medium": 1422, "hopper-medium-replay": 467, "hopper-medium-expert": 2090, "hopper-expert": 3511,
    "halfcheetah-medium": 4770, "halfcheetah-medium-replay": 3093, "halfcheetah-medium-expert": 7713,
    "halfcheetah-expert": 10656, "walker2d-medium": 2852, "walker2d-medium-replay": 683,
    "walker2d-medium-expert": 3797, "walker2d-expert": 4920, "hopper-random": 18, "halfcheetah-random": -289,
    "walker2d-random": 2,
}  # fmt: skip


def _call(make: partial) -> str:
    args = (_call(x) if isinstance(x, partial) else getattr(x, "__name__", str(x)) for x in make.args)
    return f"{make.func.__name__}({', '.join(args)})"


def list_tasks() -> None:
    """Print every task: name, source, presence, rows, megabytes, environment, reference returns."""
    print(
        f"{'name':38}{'source':11}{'here':6}{'rows':>9}{'MB':>7}  {'returns of score 0, 100':26}environment"
    )
    for task in TASKS.values():
        here, size = task.path.exists(), task.size
        size = task.path.stat().st_size if here else size
        print(
            f"{task.name:38}{task.source:11}{'yes' if here else 'no':6}{task.rows or '?':>9}"
            f"{f'{size / 1e6:.1f}' if size else '?':>7}  {f'{task.ref_min:g}, {task.ref_max:g}':26}{_call(task.make)}"
        )


def check(what: tyro.conf.Positional[str], env: str = "") -> None:
    """Verify a task's file, or any file, and print what it holds.

    Args:
        what: a task's name, or the path of an HDF5 file in D4RL layout
        env: the task that the file is for, if its name does not begin with the robot's
    """
    path = Path(what)
    if path.suffix in (".hdf5", ".h5") and not path.exists():
        raise UsageError("file", path, "one that exists, or a task's name")
    if path.exists():
        stem = path.stem.replace("_", "-")
        nearest = max(
            TASKS, key=lambda x: sum(1 for _ in takewhile(lambda c: c[0] == c[1], zip(x, stem, strict=False)))
        )
        name = env or (nearest if stem.startswith(nearest.split("-")[0]) else "")
        if not name:
            raise UsageError(
                "--env", f"nothing, and {path.name} does not tell", "the task that the file is for"
            )
        task, dataset = get_task(name), load(name, path)
        known = "the registered file" if task.sha256 == dataset.sha256 else "not the registered file"
    else:
        task, dataset = get_task(what), load(what)
        known = "as registered" if task.sha256 else "no hash is published"
    lengths = np.diff(np.flatnonzero(dataset.ends) + 1, prepend=0)
    returns, n = dataset.episode_returns(), len(dataset.rewards)
    published = MEAN_RETURNS.get(task.name.removesuffix("-v2")) if not path.exists() else None
    print(f"{dataset.path} read as {task.name}: {dataset.path.stat().st_size / 1e6:.1f} MB")
    print(f"sha256       {dataset.sha256} ({known})")
    print(f"rows         {n}, all finite; registered {task.rows or '?'}")
    print(f"obs, actions {dataset.obs.shape[1]}, {dataset.actions.shape[1]}; actions at a bound "
          f"{np.mean(np.abs(dataset.actions) >= 1):.1%}; constant features "
          f"{int((np.ptp(dataset.obs, axis=0) == 0).sum())}")  # fmt: skip
    print(f"episodes     {len(lengths)} finished, {int(dataset.terminations.sum())} terminal; length "
          f"{lengths.min(initial=n)} to {lengths.max(initial=0)}; limit {task.limit}")  # fmt: skip
    print(f"returns      {returns.mean():.1f} ± {returns.std():.1f}, {returns.min():.1f} to {returns.max():.1f}; score "
          f"{task.score(returns.mean()):.1f}" + (f"; D4RL's mean {published}" if published else ""))  # fmt: skip
    rows = np.random.default_rng(0).permutation(np.flatnonzero(dataset.known))[:1_000]
    infos = {}
    with h5py.File(dataset.path, "r") as f:
        if "infos" in f and all(len(x) == n for x in f["infos"].values() if isinstance(x, h5py.Dataset)):
            infos = {k: x[()][rows] for k, x in f["infos"].items() if isinstance(x, h5py.Dataset)}
    result = judge.simulate(make_env(task), dataset.obs[rows], dataset.actions[rows], infos)
    if result is None:
        print("simulator    not replayed: the file does not hold the simulator's state, row by row")
        return
    told = (np.abs(dataset.obs[rows]) != 10).all(
        1
    )  # a velocity at Hopper's and Walker2d's bound is not the state's
    error = np.abs(result[0] - dataset.next_obs[rows]).max(1)[told]
    cost = np.abs(result[1] - dataset.rewards[rows])[told]
    print(f"simulator    {told.sum()} rows stepped: error of next obs, median {np.median(error):.1e}, over 1e-3 in "
          f"{np.mean(error > 1e-3):.1%}, largest {error.max():.1e}; of rewards, median {np.median(cost):.1e}, largest "
          f"{cost.max():.1e}")  # fmt: skip


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"list": list_tasks, "check": check})
    except UsageError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
