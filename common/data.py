"""Tasks, datasets, the environment loop and D4RL-normalised evaluation.

One table says what a task is; a new domain is a few rows and, if need be, a builder in envs.py.
"""

import hashlib
import os
import re
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from http.client import HTTPException
from itertools import chain, repeat, takewhile
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import envs
from common.buffer import Batch, ReplayBuffer
from common.run import UsageError

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"  # D4RL's own host; override with $D4RL_URL
EMBEDDED = Path(__file__).parent / "datasets"


# ---- tasks ----


@dataclass(frozen=True)
class Task:
    """What `--env` names: environment, dataset file, reference returns."""

    name: str
    make: Callable[[], gym.Env] = field(compare=False)  # builds one environment
    obs_dim: int
    act_dim: int
    limit: int  # steps of an episode
    ref_min: float  # raw return with score 0
    ref_max: float  # raw return with score 100
    file: str  # below the base URL, or in common/datasets
    size: int | None = None  # bytes
    sha256: str | None = None
    rows: int | None = None
    source: str = "d4rl"  # or "package", "collected" (made here, on first use), "minari"

    def score(self, episode_return: float) -> float:
        """D4RL's normalised score, 100 (R - R_min) / (R_max - R_min)."""
        return 100.0 * (episode_return - self.ref_min) / (self.ref_max - self.ref_min)

    @property
    def path(self) -> Path:
        """Where the file belongs: $D4RL_DATASET_DIR (default ~/.d4rl/datasets), the package, Minari's folder."""
        if self.source == "package":
            return EMBEDDED / self.file
        if self.source == "minari":
            return minari_folder() / self.file / "data" / "main_data.hdf5"
        folder = os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets"
        return Path(folder) / Path(self.file).name

    @property
    def url(self) -> str:
        return f"{(os.environ.get('D4RL_URL') or D4RL_URL).rstrip('/')}/{self.file}"


def _locomotion() -> dict[str, Task]:
    """Hopper, HalfCheetah, Walker2d: D4RL v2's fifteen files, and the embedded one."""
    robots = {  # Gymnasium id, obs, act, reference returns
        "hopper": ("Hopper-v4", 11, 3, -20.272305, 3234.3),
        "halfcheetah": ("HalfCheetah-v4", 17, 6, -280.178953, 12135.0),
        "walker2d": ("Walker2d-v4", 17, 6, 1.629008, 4592.3),
    }
    files = """
    hopper random 152525345 1000000 63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054
    hopper medium 152756557 1000000 5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0
    hopper medium-replay 75854457 402000 e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b
    hopper medium-expert 304537315 1999906 9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26
    hopper expert 152427435 1000000 01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b
    halfcheetah random 237338037 1000000 25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba
    halfcheetah medium 237727262 1000000 41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0
    halfcheetah medium-replay 59448533 202000 48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683
    halfcheetah medium-expert 474567252 2000000 015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06
    halfcheetah expert 237464597 1000000 d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f
    walker2d random 216109364 1000000 4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa
    walker2d medium 232254996 1000000 cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda
    walker2d medium-replay 86323963 302000 e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db
    walker2d medium-expert 462197079 1999995 6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04
    walker2d expert 230567195 1000000 2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a
    """
    tasks = {}

    def add(name: str, robot: str, file: str, **known) -> None:
        env_id, obs_dim, act_dim, low, high = robots[robot]
        make = partial(envs.locomotion, env_id)
        tasks[name] = Task(name, make, obs_dim, act_dim, 1_000, low, high, file, **known)

    for line in files.split("\n"):
        if words := line.split():
            robot, quality, size, rows, sha256 = words
            file = f"gym_mujoco_v2/{robot}_{quality.replace('-', '_')}-v2.hdf5"
            add(f"{robot}-{quality}-v2", robot, file, size=int(size), rows=int(rows), sha256=sha256)
    digest = "e6870ea3ac08367f7872b3f09999b3bdc0835585a99691d9d426cf5853a33c52"
    add(
        "hopper-mini-v0",
        "hopper",
        "hopper-mini-v0.hdf5",
        size=7396249,
        rows=89839,
        sha256=digest,
        source="package",
    )
    return tasks


def _adroit() -> dict[str, Task]:
    """Pen, door, hammer, relocate: D4RL v1's twelve files."""
    hands = {  # obs, act, limit, reference returns
        "pen": (45, 24, 100, 96.262799, 3076.8331017826877),
        "door": (39, 28, 200, -56.512833, 2880.5693087298737),
        "hammer": (46, 26, 200, -274.856578, 12794.134825156867),
        "relocate": (39, 30, 200, -6.425911, 4233.877797728884),
    }
    files = """
    pen human 2040573 5000 209e345b2150b633f30a11612612c60f49e941f127ce6c4dc0cd790501c46f9f
    pen cloned 155074191 500000 6d1a982cee1950501bedebbddedbcbb377e6284d379986c83abac8a6c0be0c22
    pen expert 262040663 499206 3791b8ca6a802061770af2977c051ac3ae261488210ce73788760a5b8308f374
    door human 3121206 6729 f9691288c3ddf2b4e7b31bdae0d8444b80ba035515495f8a902d60c43ee09370
    door cloned 294356136 1000000 1f6a60ecc4d2a2e5c02f41dd3412be61bb265a33dcf120ceee9e9682d4fe4d48
    door expert 536056678 1000000 66df4cd4e0a1e0b72ea72653ce088e29ecbfa99bac3cd2b52e64092e9a0aaab4
    hammer human 5606475 11310 3e42f3f49b5c92a901601dfe867c6c62a9651cbe79f6760ec8b402a15816a498
    hammer cloned 446616879 1000000 e48d75b159bdd72f51d3f01448d3eca4d38275714e11e995c14a36f6cf159db3
    hammer expert 557047483 1000000 1c069a0f6e4852493023c77dc3b3a12d8d5ac2e3a034827fea3ab8a161e7185f
    relocate human - 9942 -
    relocate cloned - 1000000 -
    relocate expert - 1000000 -
    """
    tasks = {}
    for words in (line.split() for line in files.split("\n") if line.strip()):
        hand, quality, size, rows, sha256 = (None if word == "-" else word for word in words)
        obs_dim, act_dim, limit, low, high = hands[hand]
        name = f"{hand}-{quality}-v1"
        make = partial(envs.adroit, hand, limit)
        known = dict(size=int(size) if size else None, rows=int(rows), sha256=sha256)
        tasks[name] = Task(
            name, make, obs_dim, act_dim, limit, low, high, f"hand_dapg_v1/{name}.hdf5", **known
        )
    return tasks


def _frozen_lake() -> dict[str, Task]:
    """Frozen-Lake as DUAL uses it: data of slip 0.1, collected on first use; online, slip 0.5 or what the name says.

    4x4 with 100 steps, 8x8 with 200; the score is the success probability in percent.
    """
    tasks = {}
    for size, limit, states in (("4x4", 100, 16), ("8x8", 200, 64)):
        for suffix, slip in (("", 0.5), *((f"-slip-{x}", x) for x in (0.1, 0.2, 0.3, 0.4))):
            name = f"frozenlake-{size}{suffix}"
            make = partial(envs.FrozenLake, size, limit, slip)
            file = f"frozenlake/frozenlake-{size}.hdf5"
            tasks[name] = Task(name, make, states, 4, limit, 0.0, 1.0, file, source="collected")
    return tasks


def _mazes() -> dict[str, Task]:
    """Maze2D: D4RL v1's three sparse files, scored by steps at the goal. AntMaze: v2's six, scored by success."""
    tasks = {}
    for size, limit, low, high, rows in (
        ("umaze", 300, 23.85, 161.86, 1_000_000),
        ("medium", 600, 13.13, 277.39, None),
        ("large", 800, 6.7, 273.99, None),
    ):
        name, file = f"maze2d-{size}-v1", f"maze2d/maze2d-{size}-sparse-v1.hdf5"
        make = partial(envs.maze, envs.Maze2D, size, limit)
        tasks[name] = Task(name, make, 4, 2, limit, low, high, file, rows=rows)
    files = """
    umaze u-maze False False 232532949 5ef15257771c50ef4d23c7de001750e96c8bb5d9b6a5e4a821dcfb3065fbd130
    umaze-diverse u-maze True True 230854272 c771dd63963cd7d9f55f24a6d809064f6b82250a6aeac4c9d13f9a1d06e8c932
    medium-play big-maze True False - -
    medium-diverse big-maze True True 231095166 ad9dcbac05d1f8744a7a216083f513662f43f64f28a4a5eb225e9811902dfae7
    large-play hardest-maze True False 230880653 6d353df2457829925d7f9d4b0215587469908bd57478ea76f16417cfa944f471
    large-diverse hardest-maze True True 231183710 84f775eb7956ea9cc766704710dc520a8ab357adc7522ade47f556f0e335e284
    """
    for words in (line.split() for line in files.split("\n") if line.strip()):
        which, plan, starts, goals, size, sha256 = (None if word == "-" else word for word in words)
        name, maze = f"antmaze-{which}-v2", which.split("-")[0]
        limit = 700 if maze == "umaze" else 1_000
        make = partial(envs.maze, envs.AntMaze, maze, limit)
        file = f"ant_maze_v2/Ant_maze_{plan}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
        known = dict(size=int(size) if size else None, sha256=sha256)
        tasks[name] = Task(name, make, 29, 8, limit, 0.0, 1.0, file, **known)
    return tasks


def _shifted(task: Task, kind: str, level: str, name: str, **changes) -> Task:
    """`task` with its own data and, online and in evaluation, shifted dynamics (envs.shift), under `name`."""
    if kind in ("friction", "gravity"):
        value = float(level) if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?", level) else 0.0
    else:  # 2.0 is DUAL's; ODRL has no number here, and its medium divides the range by 2
        value = {"easy": "easy", "medium": "medium", "2.0": "medium", "hard": "hard"}.get(level)
    if not value or (kind in ("friction", "gravity") and value > 100):
        after = "a factor up to 100 after friction, gravity; easy, medium (or 2.0), hard after kinematic, morphology"
        raise UsageError("--env", name, after)
    return replace(task, name=name, make=partial(envs.shifted, task.make, kind, value), **changes)


def _dual(tasks: dict[str, Task]) -> dict[str, Task]:
    """DUAL's tasks of shifted dynamics and their data; reference returns are ODRL's for the shift, not D4RL's."""
    rows = """
    halfcheetah-friction-2.0 halfcheetah-medium-v2 -280.178953 11255.9677734375
    halfcheetah-medium-replay-gravity-2.0 halfcheetah-medium-replay-v2 -280.178953 9509.15
    hopper-friction-2.0 hopper-medium-v2 -26.3360015397715 3234.3
    hopper-kinematic-2.0 hopper-medium-v2 -26.3360015397715 3234.3
    walker2d-morphology-2.0 walker2d-medium-v2 10.079455055289959 4592.3
    """
    named = {}
    for name, base, low, high in (line.split() for line in rows.split("\n") if line.strip()):
        kind, level = name.split("-")[-2:]
        named[name] = _shifted(tasks[base], kind, level, name, ref_min=float(low), ref_max=float(high))
    return named


LOCOMOTION = _locomotion()
TASKS: dict[str, Task] = LOCOMOTION | _dual(LOCOMOTION) | _adroit() | _mazes() | _frozen_lake()


def get_task(name: str) -> Task:
    """The task called `name`, a Minari id if there is a slash; raises UsageError with the names there are.

    A locomotion name may go on with a shift, as in hopper-medium-v2-gravity-0.5: same data, D4RL's reference returns.
    """
    if "/" in name:
        return _minari(name)
    if name in TASKS:
        return TASKS[name]
    shifts = "friction|gravity|kinematic|morphology"
    found = re.fullmatch(rf"({'|'.join(LOCOMOTION)})-({shifts})-(.*)", name)
    if not found:
        raise UsageError("--env", name, f"{', '.join(TASKS)}; or a locomotion name and -<{shifts}>-<level>")
    base, kind, level = found.groups()
    return _shifted(LOCOMOTION[base], kind, level, name)


@cache
def _minari(name: str) -> Task:
    """A Minari dataset's own task: its evaluation environment with flat observations and actions in [-1, 1].

    Fetched first if it is not in Minari's folder and HF_HUB_OFFLINE is not set. Scores are Minari's, in percent, where
    the dataset has reference returns; otherwise the score is the return.
    """
    try:
        import minari  # half a second, for those who ask for it

        source = minari.load_dataset(name, download=True)
        if source.env_spec is None:
            raise UsageError(
                "--env", f"{name}, a dataset without environment", "one with its environment's spec"
            )
        make = partial(envs.flat, source.recover_environment, eval_env=True)
        env = make()
        facts = source.storage.metadata
    except UsageError:
        raise
    except Exception as e:  # its own errors, and those of whatever it fetches with
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:160]
        allowed = f"a Minari id that is in {minari_folder()} or can be fetched ({reason})"
        raise UsageError("--env", name, allowed) from e
    low, high = facts.get("ref_min_score"), facts.get("ref_max_score")
    low, high = (0.0, 100.0) if low is None or high is None else (float(low), float(high))
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    limit = env.spec.max_episode_steps or 0
    return Task(name, make, *sizes, limit, low, high, name, rows=source.total_steps, source="minari")


def minari_folder() -> Path:
    """Where Minari keeps its datasets: $MINARI_DATASETS_PATH or ~/.minari/datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def filed_name(name: str, dataset: Path | None) -> str:
    """The name under which a run is filed: the task's, or `<task>@<file stem>` with a dataset of one's own.

    A Minari id has underscores for slashes: mujoco_hopper_medium-v0.
    """
    return get_task(name).name.replace("/", "_") + (f"@{dataset.stem}" if dataset else "")


# ---- files ----


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(f)


def _sha256(f) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def download(task: Task) -> None:
    """Fetch the file of `task` to `task.path`: a `.part` of its own first, size and hash checked, then renamed."""
    path, part = task.path, task.path.with_name(f"{task.path.name}.{uuid.uuid4().hex[:8]}.part")
    advice = (
        f"a reachable {task.url}; or put the file at {path}; or --env hopper-mini-v0, which needs no download"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError("D4RL_DATASET_DIR", path.parent, f"a folder that can be made ({e.strerror})") from e
    try:
        with urllib.request.urlopen(task.url, timeout=20) as source, open(part, "wb") as f:
            length = source.headers.get("Content-Length") or ""
            total = int(length) if length.isdecimal() else task.size
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := source.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        verify(task, part)
        part.replace(path)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as e:
        if isinstance(e, UsageError):  # of verify
            raise
        reason = " ".join(str(getattr(e, "reason", None) or e or type(e).__name__).split())
        raise UsageError("dataset", f"no {path.name} ({reason})", advice) from e
    finally:
        part.unlink(missing_ok=True)


def verify(task: Task, path: Path) -> str:
    """SHA256 of the file at `path`; raises UsageError if size or hash are not the registered ones."""
    size = path.stat().st_size
    if task.size is not None and size != task.size:
        raise UsageError(
            "dataset", f"{path} of {size} bytes", f"{task.size} bytes, as published (cut off? delete it)"
        )
    digest = sha256_of(path)
    if task.sha256 is not None and digest != task.sha256:
        raise UsageError(
            "dataset", f"{path} with SHA256 {digest}", f"{task.sha256}, as published (delete it)"
        )
    return digest


# ---- datasets ----


class Dataset(NamedTuple):
    """Transitions of a file in file order: float32 arrays of N rows; `ends` marks the last row of each episode."""

    obs: np.ndarray  # (N, O)
    actions: np.ndarray  # (N, A), in [-1, 1]
    rewards: np.ndarray  # (N,), raw
    next_obs: np.ndarray  # (N, O), the true successor
    terminations: np.ndarray  # (N,), 0 or 1
    ends: np.ndarray  # (N,) bool: termination or truncation
    known: np.ndarray  # (N,) bool: next_obs is the successor; terminal rows of some files do not have it
    sha256: str
    path: Path

    def episode_returns(self) -> np.ndarray:
        """Undiscounted raw return of every finished episode (of the rows there are, if none is finished)."""
        stops = np.flatnonzero(self.ends) + 1
        sums = [x.sum(dtype=np.float64) for x in np.split(self.rewards, stops)]
        return np.array(sums[: len(stops)] or sums)

    def return_range(self) -> float:
        """Largest minus smallest episode return; raises UsageError where there are no two to tell apart."""
        returns = self.episode_returns()
        if (spread := float(returns.max() - returns.min())) <= 0:
            allowed = "two different ones to scale rewards by, or --no-normalize-reward"
            raise UsageError("dataset", f"{len(returns)} episode(s) of return {returns[0]:.6g}", allowed)
        return spread

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std + 1e-3 of the observations, each (O,) float32 (CORL's normalisation of states)."""
        return self.obs.mean(0, dtype=np.float64).astype(np.float32), (
            self.obs.std(0, dtype=np.float64) + 1e-3
        ).astype(np.float32)

    def batch(
        self, reward_scale: float = 1.0, reward_bias: float = 0.0, moments: tuple | None = None
    ) -> Batch:
        """All rows as tensors; rewards become scale · r + bias, observations (obs - mean) / std if asked."""
        obs, next_obs = self.obs, self.next_obs
        if moments is not None:
            obs, next_obs = ((x - moments[0]) / moments[1] for x in (obs, next_obs))
        rewards = np.float32(reward_scale) * self.rewards + np.float32(reward_bias)
        return Batch(
            *(
                torch.from_numpy(np.ascontiguousarray(x))
                for x in (obs, self.actions, rewards, next_obs, self.terminations)
            )
        )


def load(name: str, dataset: Path | None = None) -> Dataset:
    """The dataset of a task, or the file at `dataset` read for that task. Raises UsageError on anything wrong."""
    task = get_task(name)
    if dataset is not None:
        if not dataset.is_file():
            raise UsageError("--dataset", dataset, "an existing HDF5 file in D4RL layout")
        return read_d4rl(dataset, task, sha256_of(dataset))
    if task.source == "minari":
        return read_minari(task)
    if not task.path.exists():
        if task.source == "package":
            raise UsageError(
                "dataset", f"no {task.path}", "a complete installation (this file belongs to the package)"
            )
        if task.source == "collected":
            from common import collect  # a program of its own, needed here alone

            collect.frozen_lake(task.path)
        else:
            download(task)
    return read_d4rl(task.path, task, verify(task, task.path))


def read_d4rl(path: Path, task: Task, sha256: str) -> Dataset:
    """Read an HDF5 file in D4RL layout: observations, actions, rewards, terminals, timeouts, [next_observations].

    Rows are kept with their true successor. A file with `next_observations` keeps all its rows; a timeout ends an
    episode and keeps its bootstrap. A file without takes the next row's observation as successor, except:
    the last row of an episode that timed out and the last row of the file are dropped (their successor is unknown),
    and a terminal row gets its own observation and is not `known` (D4RL's rule would give it the next episode's first;
    the TD target masks it, a generative model would learn it), unless it is AntMaze's, whose ant walks on from a goal:
    there the next row within 1 m is the successor. A file without `timeouts` is cut at the task's step limit.
    """

    def refuse(got: str, allowed: str) -> UsageError:
        return UsageError("dataset", f"{path}: {got}", allowed)

    try:
        with h5py.File(path, "r") as f:
            keys = [
                k
                for k in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
                if k in f
            ]
            raw = {k: f[k][()] for k in keys}
    except (OSError, RuntimeError, TypeError, AttributeError, KeyError, ValueError, MemoryError) as e:
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        raise refuse(f"unreadable ({reason})", "a complete HDF5 file in D4RL layout") from e
    for k in ("observations", "actions", "rewards", "terminals"):
        if k not in raw:
            raise refuse(f"no '{k}'", "an HDF5 file in D4RL layout")
    for k, v in raw.items():
        if not isinstance(v, np.ndarray) or v.dtype.kind not in "fbiu":
            raise refuse(f"'{k}' is not numeric", "numbers")
        if k in ("observations", "actions", "next_observations"):
            width = task.act_dim if k == "actions" else task.obs_dim
            if v.ndim != 2 or v.shape[1] != width:
                raise refuse(f"'{k}' of shape {v.shape}", f"(rows, {width}) for {task.name}")
        elif v.ndim == 2 and v.shape[1] == 1:
            raw[k] = v[:, 0]
        elif v.ndim != 1:
            raise refuse(f"'{k}' of shape {v.shape}", "(rows,)")
    counts = {k: len(v) for k, v in raw.items()}
    if len(set(counts.values())) > 1 or counts["rewards"] < 2:
        raise refuse(f"rows {counts}", "the same number of rows, at least 2, in every array")
    for k in raw:
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
            raw[k] = raw[k].astype(np.float32)
        bad = ~np.isfinite(raw[k].reshape(len(raw[k]), -1)).all(1)
        if bad.any():
            got = f"{bad.sum()} rows of '{k}' are NaN or infinite, first {bad.argmax()}"
            raise refuse(got, "finite numbers")
    if (excess := np.abs(raw["actions"]).max()) > 1.001:
        raise refuse(f"actions up to {excess:.3g}", "actions in [-1, 1]")
    terminals = raw["terminals"] > 0.5
    if "timeouts" in raw:
        timeouts = raw["timeouts"] > 0.5
    else:
        timeouts, age = np.zeros_like(terminals), 0
        for i, terminal in enumerate(terminals):
            age += 1
            timeouts[i] = age == task.limit
            age = 0 if terminal or timeouts[i] else age
    ends = terminals | timeouts
    obs, keep, known = raw["observations"], np.ones(len(ends), bool), np.ones(len(ends), bool)
    if "next_observations" in raw:
        next_obs = raw["next_observations"]
    else:
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        known = ~terminals
        if task.name.startswith("antmaze"):
            known |= ~timeouts & (np.linalg.norm(next_obs[:, :2] - obs[:, :2], axis=1) < 1)
        known[-1] = False
        next_obs[~known] = obs[~known]
        keep = ~(timeouts & ~terminals)
        keep[-1] &= terminals[-1]
        ends = ends | np.concatenate(
            [ends[1:] & ~keep[1:], [False]]
        )  # an episode ends on its last row that is kept
    flags = terminals.astype(np.float32), ends, known
    columns = (obs, raw["actions"].clip(-1, 1), raw["rewards"], next_obs, *flags)
    if not keep.all():
        columns = tuple(x[keep] for x in columns)
    if len(columns[0]) < 2:
        raise refuse(f"{len(columns[0])} usable rows", "at least 2")
    return Dataset(*columns, sha256, path)


def read_minari(task: Task) -> Dataset:
    """The episodes of a Minari dataset as rows: true successors, observations flattened, actions scaled to [-1, 1]."""
    import minari

    env, parts = task.make(), []
    flatten, scale = env.get_wrapper_attr("flatten"), env.get_wrapper_attr("inverse")
    try:
        for episode in minari.load_dataset(task.name).iterate_episodes():
            obs = flatten(episode.observations)  # (T + 1, O)
            ends = np.asarray(episode.terminations | episode.truncations, dtype=bool)
            ends[-1] = True
            columns = obs[:-1], scale(episode.actions), episode.rewards, obs[1:], episode.terminations, ends
            parts.append(columns)
    except (OSError, RuntimeError, KeyError, ValueError, IndexError) as e:
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        raise UsageError(
            "--env", f"{task.name}, unreadable ({reason})", f"a complete dataset below {task.path}"
        ) from e
    columns = [np.concatenate(x).astype(np.float32) for x in zip(*parts, strict=True)]
    columns[5] = columns[5] > 0.5
    for name, x in zip(Dataset._fields, columns, strict=False):
        if not np.isfinite(x).all():
            raise UsageError("--env", f"{task.name} with NaN or infinite {name}", "finite numbers")
    columns[1] = columns[1].clip(-1, 1)
    return Dataset(*columns, np.ones(len(columns[5]), bool), sha256_of(task.path), task.path)


# ---- environments ----


class Normalize(gym.ObservationWrapper):
    """(obs - mean) / std with the dataset's constants, for online steps and evaluation alike."""

    def __init__(self, env: gym.Env, moments: tuple[np.ndarray, np.ndarray]):
        super().__init__(env)
        self.mean, self.std = moments

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return (observation - self.mean) / self.std


def make_env(task: Task, moments: tuple[np.ndarray, np.ndarray] | None = None) -> gym.Env:
    """One environment of the task; checks that it has the dataset's dimensions."""
    env = task.make()
    shapes = env.observation_space.shape, env.action_space.shape
    assert shapes == ((task.obs_dim,), (task.act_dim,)), f"{task.name}: environment of shapes {shapes}"
    return env if moments is None else Normalize(env, moments)


class Interaction:
    """The online phase's environment: steps a policy, stores transitions, resets by episode number.

    Its state is the episode's number and age. Loading it resets the environment with that episode's seed and plays the
    stored actions again, which restores the simulator exactly without asking it for its state.
    """

    def __init__(
        self,
        env: gym.Env,
        buffer: ReplayBuffer,
        seed: int,
        reward_scale: float = 1.0,
        reward_bias: float = 0.0,
    ):
        self.env, self.buffer, self.seed = env, buffer, seed
        self.scale, self.bias = reward_scale, reward_bias
        self.episode = self.age = 0
        self.episode_return = 0.0  # raw
        self.obs: torch.Tensor | None = None

    def _reset(self) -> None:
        obs, _ = self.env.reset(seed=envs.episode_seed(self.seed, "online", self.episode))
        self.obs, self.age, self.episode_return = torch.as_tensor(obs, dtype=torch.float32), 0, 0.0

    def step(self, policy: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float] | None:
        """One step with policy((1, O)) -> (1, A) in [-1, 1]; what to log if the episode is over, else None.

        The reward is stored as scale · r + bias, the return is logged raw.
        """
        if self.obs is None:
            self._reset()
        action = policy(self.obs.to(self.buffer.table.device)[None])[0].cpu()
        next_obs, reward, terminated, truncated, info = self.env.step(action.numpy())
        next_obs = torch.as_tensor(next_obs, dtype=torch.float32)
        if "executed" in info:
            action = torch.from_numpy(info["executed"])
        self.buffer.add(self.obs, action, self.scale * float(reward) + self.bias, next_obs, terminated)
        self.obs, self.age, self.episode_return = next_obs, self.age + 1, self.episode_return + float(reward)
        if not (terminated or truncated):
            return None
        result = {"train/episode_return": self.episode_return, "train/episode_length": self.age}
        self.episode, self.obs = self.episode + 1, None
        return result

    def state_dict(self) -> dict:
        return {"episode": self.episode, "age": self.age if self.obs is not None else 0}

    def load_state_dict(self, state: dict) -> None:
        """Restore; the buffer must have been restored before."""
        self.episode, self.obs = state["episode"], None
        if state["age"] == 0:
            return
        self._reset()
        rows = torch.arange(
            self.buffer.rows - state["age"], self.buffer.rows, device=self.buffer.table.device
        )
        batch = Batch(*(x.cpu() for x in self.buffer.take(rows)))
        for action in batch.actions.numpy():
            obs, reward, *_ = self.env.step(action)
            self.age, self.episode_return = self.age + 1, self.episode_return + float(reward)
        self.obs = torch.as_tensor(obs, dtype=torch.float32)
        if not torch.equal(self.obs, batch.next_obs[-1]):  # another machine or MuJoCo: start the next episode
            print(
                "note: the simulator does not repeat the interrupted episode exactly; going on with a new one"
            )
            self.episode, self.obs = self.episode + 1, None


class Evaluator:
    """D4RL-normalised score of a deterministic policy over a fixed number of episodes.

    Own environments, stepped together so that the actor runs on a batch; start states depend on (seed, episode)
    alone and are disjoint from training; rewards are raw; no random number of the run is used. AntMaze and Adroit are
    stepped by a thread per core (MuJoCo lets the others run; the robots of locomotion are too quick for that to pay).
    """

    THREADED = "antmaze-", "pen-", "door-", "hammer-", "relocate-"

    def __init__(self, task: Task, episodes: int, seed: int, moments: tuple | None = None):
        self.task, self.seed, self.moments = task, seed, moments
        self.episodes, self.envs = episodes, []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = min(cores, episodes) if task.name.startswith(self.THREADED) else 1

    def __call__(
        self, policy: Callable[[torch.Tensor], torch.Tensor], device: torch.device
    ) -> dict[str, float]:
        """`policy` (E, O) -> (E, A), called with all E episodes even when some are over: shapes never change."""
        self.envs = self.envs or [make_env(self.task, self.moments)]
        if self.envs[0].has_wrapper_attr("exact"):
            return self._exactly(policy, device)
        self.envs += [make_env(self.task, self.moments) for _ in range(self.episodes - len(self.envs))]
        seeds = [envs.episode_seed(self.seed, "eval", i) for i in range(self.episodes)]
        obs = np.stack([e.reset(seed=s)[0] for e, s in zip(self.envs, seeds, strict=True)]).astype(np.float32)
        returns, lengths = np.zeros(self.episodes), np.zeros(self.episodes)
        active = list(range(self.episodes))

        def step(some: list[int], actions: np.ndarray) -> list[int]:
            """Those of `some` that go on."""
            left = []
            for i in some:
                obs[i], reward, terminated, truncated, _ = self.envs[i].step(actions[i])
                returns[i] += reward
                lengths[i] += 1
                left += [] if terminated or truncated else [i]
            return left

        with ThreadPoolExecutor(self.threads) as pool:
            each = map if self.threads == 1 else pool.map
            while active:
                actions = policy(torch.from_numpy(obs).to(device)).cpu().numpy()
                shares = (active[k :: self.threads] for k in range(self.threads))
                active = [*chain.from_iterable(each(step, shares, repeat(actions)))]
        return self._named(float(returns.mean()), float(lengths.mean()))

    def _named(self, mean: float, length: float) -> dict[str, float]:
        return {"eval/score": self.task.score(mean), "eval/return": mean, "eval/length": length}

    def _exactly(self, policy: Callable, device: torch.device) -> dict[str, float]:
        """The expectation over all episodes, where the environment can compute it."""
        obs = self.envs[0].get_wrapper_attr("states")
        if self.moments is not None:
            obs = (obs - self.moments[0]) / self.moments[1]
        actions = policy(torch.from_numpy(obs).to(device)).cpu().numpy()
        return self._named(*self.envs[0].get_wrapper_attr("exact")(actions))


# ---- data cards: python -m common.data list | check NAME|FILE [--env TASK] ----

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
    rows = np.random.default_rng(0).permutation(n)[:1_000]
    infos = {}
    with h5py.File(dataset.path, "r") as f:
        if "infos" in f and all(len(x) == n for x in f["infos"].values() if isinstance(x, h5py.Dataset)):
            infos = {k: x[()][rows] for k, x in f["infos"].items() if isinstance(x, h5py.Dataset)}
    result = envs.simulate(make_env(task), dataset.obs[rows], dataset.actions[rows], infos)
    if result is None:
        print("simulator    not replayed: the file does not hold the simulator's state")
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
