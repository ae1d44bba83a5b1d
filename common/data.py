"""Tasks, datasets, the environment loop and D4RL-normalised evaluation.

One table says what a task is; a new domain is a few rows and, if need be, a builder in envs.py.
"""

import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch

from common import envs, files, policy
from common.buffer import Batch, ReplayBuffer
from common.run import Run, UsageError

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
            return files.minari_folder() / self.file / "data" / "main_data.hdf5"
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
    mini = dict(size=7396249, rows=89839, sha256=digest, source="package")
    add("hopper-mini-v0", "hopper", "hopper-mini-v0.hdf5", **mini)
    return tasks


def _reacher() -> dict[str, Task]:
    """Gymnasium's Reacher-v4 with an embedded dataset: a small task without falls whose scores hardly spread.

    Score 0 is an arm that never moves (mean of 2,000 episodes), 100 Gymnasium's threshold for having solved it.
    """
    digest = "0ca310181922a5f51180f75fe869fa9f51300fc0f033d0a1c643e786752aa05e"
    known = dict(size=936489, rows=12_000, sha256=digest, source="package")
    make, name = partial(envs.locomotion, "Reacher-v4"), "reacher-mini-v0"
    return {name: Task(name, make, 11, 2, 50, -11.87, -3.75, f"{name}.hdf5", **known)}


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
        make, file = partial(envs.adroit, hand, limit), f"hand_dapg_v1/{name}.hdf5"
        known = dict(size=int(size) if size else None, rows=int(rows), sha256=sha256)
        tasks[name] = Task(name, make, obs_dim, act_dim, limit, low, high, file, **known)
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
TASKS: dict[str, Task] = LOCOMOTION | _reacher() | _dual(LOCOMOTION) | _adroit() | _mazes() | _frozen_lake()


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

    Scores are Minari's, in percent, where the dataset has reference returns; otherwise the score is the return.
    """
    make, rows, low, high = files.open_minari(name)
    try:
        env = make()
    except Exception as e:  # whatever the environment needs
        raise files.minari_error(name, e) from e
    low, high = (0.0, 100.0) if low is None or high is None else (float(low), float(high))
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    limit = env.spec.max_episode_steps or 0
    return Task(name, make, *sizes, limit, low, high, name, rows=rows, source="minari")


def filed_name(name: str, dataset: Path | None) -> str:
    """The name under which a run is filed: the task's, or `<task>@<file stem>` with a dataset of one's own.

    A Minari id has underscores for slashes: mujoco_hopper_medium-v0.
    """
    return get_task(name).name.replace("/", "_") + (f"@{dataset.stem}" if dataset else "")


# ---- datasets ----


class Units(NamedTuple):
    """Training units, the same for the dataset, online steps and evaluation; as they are unless told otherwise."""

    reward_scale: float = 1.0  # training reward = scale · r + bias
    reward_bias: float = 0.0
    moments: tuple[np.ndarray, np.ndarray] | None = None  # training obs = (obs - mean) / std, each (O,)

    def obs(self, raw: np.ndarray) -> np.ndarray:
        """Raw observations (..., O) in training units."""
        return raw if self.moments is None else (raw - self.moments[0]) / self.moments[1]

    def rewards(self, raw: np.ndarray) -> np.ndarray:
        """Raw rewards (N,) float32 in training units."""
        return np.float32(self.reward_scale) * raw + np.float32(self.reward_bias)


RAW = Units()


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
        mean, std = self.obs.mean(0, dtype=np.float64), self.obs.std(0, dtype=np.float64)
        return mean.astype(np.float32), (std + 1e-3).astype(np.float32)

    def batch(self, units: Units = RAW) -> Batch:
        """All rows as tensors, in training units."""
        obs, next_obs, rewards = units.obs(self.obs), units.obs(self.next_obs), units.rewards(self.rewards)
        columns = (obs, self.actions, rewards, next_obs, self.terminations)
        return Batch(*(torch.from_numpy(np.ascontiguousarray(x)) for x in columns))

    def buffer(self, units: Units, device: torch.device, room: int = 0) -> ReplayBuffer:
        """A buffer of all rows in training units, with room for so many more."""
        buffer = ReplayBuffer(len(self.rewards) + room, self.obs.shape[1], self.actions.shape[1], device)
        buffer.extend(self.batch(units))
        return buffer


def load(name: str, dataset: Path | None = None) -> Dataset:
    """The dataset of a task, or the file at `dataset` read for that task. Raises UsageError on anything wrong."""
    task = get_task(name)
    if dataset is not None:
        if not dataset.is_file():
            raise UsageError("--dataset", dataset, "an existing HDF5 file in D4RL layout")
        return read_d4rl(dataset, task, files.sha256_of(dataset))
    if task.source == "minari":
        columns, digest = files.read_minari(task.name, task.make(), task.path)
        return Dataset(*columns, np.ones(len(columns[5]), bool), digest, task.path)
    if not task.path.exists():
        if task.source == "package":
            allowed = "a complete installation (this file belongs to the package)"
            raise UsageError("dataset", f"no {task.path}", allowed)
        if task.source == "collected":
            files.frozen_lake(task.path)
        else:
            files.download(task.url, task.path, task.size, task.sha256)
    return read_d4rl(task.path, task, files.verify(task.path, task.size, task.sha256))


def read_d4rl(path: Path, task: Task, sha256: str) -> Dataset:
    """The HDF5 file at `path`, in D4RL's layout, read for `task`: files.read_d4rl says which rows are kept."""
    walks_on = task.name.startswith("antmaze")  # from a goal, so that the next row is the successor
    columns = files.read_d4rl(path, task.name, task.obs_dim, task.act_dim, task.limit, walks_on)
    return Dataset(*columns, sha256, path)


# ---- environments ----


class Normalize(gym.ObservationWrapper):
    """Observations in training units, for online steps and evaluation alike."""

    def __init__(self, env: gym.Env, units: Units):
        super().__init__(env)
        self.units = units

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return self.units.obs(observation)


def make_env(task: Task, units: Units = RAW) -> gym.Env:
    """One environment of the task, its rewards raw; checks that it has the dataset's dimensions."""
    env = task.make()
    shapes = env.observation_space.shape, env.action_space.shape
    assert shapes == ((task.obs_dim,), (task.act_dim,)), f"{task.name}: environment of shapes {shapes}"
    return env if units.moments is None else Normalize(env, units)


class Interaction:
    """The online phase's environment: steps a policy, stores transitions, resets by episode number.

    Its state is the episode's number and age. Loading it resets the environment with that episode's seed and plays the
    stored actions again, which restores the simulator exactly without asking it for its state.
    """

    def __init__(self, env: gym.Env, buffer: ReplayBuffer, seed: int, units: Units = RAW):
        self.env, self.buffer, self.seed, self.units = env, buffer, seed, units
        self.episode = self.age = 0
        self.episode_return = 0.0  # raw
        self.obs: torch.Tensor | None = None

    def _reset(self) -> None:
        obs, _ = self.env.reset(seed=envs.episode_seed(self.seed, "online", self.episode))
        self.obs, self.age, self.episode_return = torch.as_tensor(obs, dtype=torch.float32), 0, 0.0

    def step(self, policy: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float] | None:
        """One step with policy((1, O)) -> (1, A) in [-1, 1]; what to log if the episode is over, else None.

        The reward is stored in training units, the return is logged raw.
        """
        if self.obs is None:
            self._reset()
        action = policy(self.obs.to(self.buffer.table.device)[None])[0].cpu()
        next_obs, reward, terminated, truncated, info = self.env.step(action.numpy())
        next_obs = torch.as_tensor(next_obs, dtype=torch.float32)
        if "executed" in info:
            action = torch.from_numpy(info["executed"])
        stored = self.units.reward_scale * float(reward) + self.units.reward_bias
        self.buffer.add(self.obs, action, stored, next_obs, terminated)
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
        batch = Batch(*(x.cpu() for x in self.buffer.last(state["age"])))
        for action in batch.actions.numpy():
            obs, reward, *_ = self.env.step(action)
            self.age, self.episode_return = self.age + 1, self.episode_return + float(reward)
        self.obs = torch.as_tensor(obs, dtype=torch.float32)
        if not torch.equal(self.obs, batch.next_obs[-1]):  # another machine or MuJoCo: start the next episode
            print("note: the simulator does not repeat the interrupted episode; going on with a new one")
            self.episode, self.obs = self.episode + 1, None


class Evaluator:
    """D4RL-normalised score of a policy over a fixed number of episodes.

    Own environments, stepped together so that the actor runs on a batch; start states depend on (seed, episode)
    alone and are disjoint from training; rewards are raw. What the policy draws depends on the seed alone, and no
    random number of the run is used. AntMaze and Adroit are stepped by a thread per core (MuJoCo lets the others
    run; the robots of locomotion are too quick for that to pay).
    """

    DRAWS = 32  # of a random policy in each state of Frozen-Lake: they stand for its chances
    THREADED = "antmaze-", "pen-", "door-", "hammer-", "relocate-"

    def __init__(self, task: Task, episodes: int, seed: int, units: Units = RAW):
        self.task, self.seed, self.units = task, seed, units
        self.episodes, self.envs = episodes, []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = min(cores, episodes) if task.name.startswith(self.THREADED) else 1

    def __call__(
        self, policy: Callable[[torch.Tensor], torch.Tensor], device: torch.device
    ) -> dict[str, float]:
        """`policy` (E, O) -> (E, A), called with all E episodes even when some are over: shapes never change."""
        returns, lengths = self.returns(policy, device)
        mean, length = float(returns.mean()), float(lengths.mean())
        return {"eval/score": self.task.score(mean), "eval/return": mean, "eval/length": length}

    def returns(self, policy: Callable, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Raw return and length of each episode, (E,); their expectations, (1,), where the environment has them."""
        self.envs = self.envs or [make_env(self.task, self.units)]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            if self.envs[0].has_wrapper_attr("exact"):
                obs = torch.from_numpy(self.units.obs(self.envs[0].get_wrapper_attr("states"))).to(device)
                draws = [policy(obs).cpu().numpy() for _ in range(2)]
                if not np.array_equal(*draws):  # it draws
                    draws += [policy(obs).cpu().numpy() for _ in range(self.DRAWS - 2)]
                exact = self.envs[0].get_wrapper_attr("exact")(np.stack(draws))
                return tuple(np.array([x]) for x in exact)
            return self._play(policy, device)

    def _play(self, policy: Callable, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        self.envs += [make_env(self.task, self.units) for _ in range(self.episodes - len(self.envs))]
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
        return returns, lengths

    def export(self, act: Callable[[torch.Tensor], torch.Tensor], r: Run) -> None:
        """Write the run's policy.pt2: what is evaluated, as a file that needs nothing of this project.

        An `act` that cannot be exported (that reads len(obs), say, instead of obs.shape[0]) stops no run: it says so.
        """
        env = self.envs[0] if self.envs else make_env(self.task, self.units)
        flat = env.has_wrapper_attr("half")  # envs.Flat: its box is not the environment's own
        box = [env.get_wrapper_attr(x) for x in ("center", "half")] if flat else (0.0, 1.0)
        about = {"task": self.task.name, "obs_dim": self.task.obs_dim, "act_dim": self.task.act_dim}
        about |= {"file": r.dir.parts[-3], "phase": r.current, "seed": self.seed, "commit": r.info["commit"]}
        path = r.dir / "policy.pt2"
        try:
            if policy.save(policy.Raw(act, self.units.moments, *box, r.device), about, path):
                print(f"{path}: draws random numbers, it has no deterministic form")
        except OSError:
            raise
        except Exception as e:  # whatever tracing meets
            path.unlink(missing_ok=True)  # of an earlier phase
            print(f"warning: no {path}: {' '.join(str(e).split())[:200]}", file=sys.stderr)
