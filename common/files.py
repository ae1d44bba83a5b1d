"""Files of datasets: fetching, checking and reading D4RL's, making Frozen-Lake's, reading Minari's."""

import math
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from tqdm import tqdm

from common import envs
from common.run import UsageError, sha256_of

FIELDS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def verify(path: Path, size: int | None, sha256: str | None) -> str:
    """SHA256 of the file at `path`; UsageError if size or hash are not the registered ones (None: not known)."""
    found = path.stat().st_size
    if size is not None and found != size:
        allowed = f"{size} bytes, as published (cut off? delete it)"
        raise UsageError("dataset", f"{path} of {found} bytes", allowed)
    digest = sha256_of(path)
    if sha256 is not None and digest != sha256:
        raise UsageError("dataset", f"{path} with SHA256 {digest}", f"{sha256}, as published (delete it)")
    return digest


def download(url: str, path: Path, size: int | None, sha256: str | None) -> None:
    """Fetch `url` to `path`: a `.part` of its own first, size and hash checked, then renamed."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    advice = f"a reachable {url}; or put the file at {path}; or --env hopper-mini-v0, which needs no download"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError("D4RL_DATASET_DIR", path.parent, f"a folder that can be made ({e.strerror})") from e
    try:
        with urllib.request.urlopen(url, timeout=20) as source, open(part, "wb") as f:
            length = source.headers.get("Content-Length") or ""
            total = int(length) if length.isdecimal() else size
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := source.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
            if total is not None and f.tell() != total:  # the server hung up: no error of urllib's
                raise ConnectionError(f"{f.tell()} of {total} bytes came")
        verify(part, size, sha256)
        part.replace(path)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as e:
        if isinstance(e, UsageError):  # of verify
            raise
        reason = " ".join(str(getattr(e, "reason", None) or e or type(e).__name__).split())
        raise UsageError("dataset", f"no {path.name} ({reason})", advice) from e
    finally:
        part.unlink(missing_ok=True)


def write_d4rl(path: Path, columns: dict[str, np.ndarray], attributes: dict) -> None:
    """`columns` as HDF5 in D4RL's layout; written aside, then renamed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with h5py.File(part, "w") as f:
        for k, v in columns.items():
            f.create_dataset(k, data=v, compression="gzip", compression_opts=9, shuffle=True)
        f.attrs.update(attributes)
    part.replace(path)


def frozen_lake(path: Path, slip: float = 0.1, seed: int = 0) -> None:
    """Write DUAL's data for frozenlake-4x4 or -8x8 (the stem of `path`): everything a tabular Q-learner did.

    Step size 0.1, γ 0.99, ε from 1 to 0.3 over the first half of 30,000 (8x8: 200,000) steps, ties broken at random.
    """
    size = path.stem.split("-")[1]
    steps, limit = {"4x4": (30_000, 100), "8x8": (200_000, 200)}[size]
    env, rng = envs.FrozenLake(size, limit, slip), np.random.default_rng(seed)
    q, rows, episode, obs = np.zeros((len(env.states), 4)), [], 0, None
    for i in tqdm(range(steps), unit="row", desc=path.name, disable=None):
        if obs is None:
            obs, _ = env.reset(seed=envs.episode_seed(seed, "collect", episode))
            episode += 1
        state = obs.argmax()
        epsilon = max(0.3, 1 - 0.7 * i / (steps / 2))
        best = np.flatnonzero(q[state] == q[state].max())
        move = rng.integers(4) if rng.random() < epsilon else rng.choice(best)
        following, reward, terminated, truncated, _ = env.step(env.moves[move])
        target = reward + 0.99 * (not terminated) * q[following.argmax()].max()
        q[state, move] += 0.1 * (target - q[state, move])
        rows.append((obs, env.moves[move], reward, following, terminated, truncated and not terminated))
        obs = None if terminated or truncated else following
    columns = zip(FIELDS, zip(*rows, strict=True), strict=True)
    data = {k: np.asarray(v, dtype=bool if k[0] == "t" else np.float32) for k, v in columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_d4rl(
        path, data, {"env": path.stem, "slip": slip, "seed": seed, "policy": "epsilon-greedy Q-learning"}
    )


# ---- D4RL ----


def refuse(path: Path, got: str, allowed: str) -> UsageError:
    return UsageError("dataset", f"{path}: {got}", allowed)


def read_columns(path: Path, name: str, obs_dim: int, act_dim: int) -> dict[str, np.ndarray]:
    """An HDF5 file in D4RL layout as finite float32 arrays (N, ·) and (N,), flags 0 or 1; raises UsageError.

    Names, types, shapes and sizes are checked before anything is read.
    """
    widths = {"observations": obs_dim, "actions": act_dim, "next_observations": obs_dim}
    columns = {}
    try:
        with h5py.File(path, "r") as f:
            found = {k: f[k] for k in FIELDS if k in f}
            for k in ("observations", "actions", "rewards", "terminals"):
                if k not in found:
                    raise refuse(path, f"no '{k}'", "an HDF5 file in D4RL layout")
            for k, x in found.items():
                if not isinstance(x, h5py.Dataset) or x.dtype.kind not in "fbiu" or x.shape is None:
                    raise refuse(path, f"'{k}' is not numeric", "numbers")
                if k in widths and (len(x.shape) != 2 or x.shape[1] != widths[k]):
                    raise refuse(path, f"'{k}' of shape {x.shape}", f"(rows, {widths[k]}) for {name}")
                if k not in widths and x.shape != x.shape[:1] and x.shape != (*x.shape[:1], 1):
                    raise refuse(path, f"'{k}' of shape {x.shape}", "(rows,)")
            counts = {k: x.shape[0] if x.shape else 0 for k, x in found.items()}
            if len(set(counts.values())) > 1 or counts["rewards"] < 2:
                allowed = "the same number of rows, at least 2, in every array"
                raise refuse(path, f"rows {counts}", allowed)
            needed = 4 * sum(x.size for x in found.values()) / 2**30  # as float32
            memory = math.inf  # not known on Windows
            if hasattr(os, "sysconf"):
                memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
            if needed > memory / 2:  # a copy on the device comes beside it
                got = f"{counts['rewards']} rows, {needed:.1f} GiB"
                raise refuse(path, got, f"half of this machine's {memory:.1f} GiB at most")
            for k, x in found.items():
                with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
                    columns[k] = x[()].astype(np.float32).reshape(-1, *x.shape[1:][: k in widths])
    except UsageError:
        raise
    except (OSError, RuntimeError, TypeError, AttributeError, KeyError, ValueError, MemoryError) as e:
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        raise refuse(path, f"unreadable ({reason})", "a complete HDF5 file in D4RL layout") from e
    for k, x in columns.items():
        bad = ~np.isfinite(x.reshape(len(x), -1)).all(1)
        if bad.any():
            got = f"{bad.sum()} rows of '{k}' are NaN or infinite, first {bad.argmax()}"
            raise refuse(path, got, "finite numbers")
    for k in sorted({"terminals", "timeouts"} & columns.keys()):
        odd = ~np.isin(columns[k], (0, 1))
        if odd.any():
            first = odd.argmax()
            got = f"{odd.sum()} rows of '{k}' are neither 0 nor 1, first {first}: {columns[k][first]:g}"
            raise refuse(path, got, "0 or 1, or booleans")
    if columns["terminals"].all():  # nothing to bootstrap: none of our tasks is so, but a broken column
        raise refuse(path, "'terminals' is 1 in every row", "1 only where the MDP ended")
    if (excess := np.abs(columns["actions"]).max()) > 1.001:
        raise refuse(path, f"actions up to {excess:.3g}", "actions in [-1, 1]")
    return columns


def read_d4rl(
    path: Path, name: str, obs_dim: int, act_dim: int, limit: int, walks_on: bool
) -> tuple[np.ndarray, ...]:
    """Columns of an HDF5 file in D4RL layout as data.Dataset has them: obs ... known.

    In the file: observations, actions, rewards, terminals, timeouts, [next_observations]; `name` is the task's.

    Rows are kept with their true successor. A file with `next_observations` keeps all its rows; a timeout ends an
    episode and keeps its bootstrap. A file without takes the next row's observation as successor, except:
    the last row of an episode that timed out and the last row of the file are dropped (their successor is unknown),
    and a terminal row gets its own observation and is not `known` (D4RL's rule would give it the next episode's first;
    the TD target masks it, a generative model would learn it), unless the body `walks_on` from a goal
    (AntMaze): there the next row within 1 m is the successor. A file without `timeouts` is cut at `limit` steps.
    """
    raw = read_columns(path, name, obs_dim, act_dim)
    terminals = raw["terminals"] > 0.5
    if "timeouts" in raw:
        timeouts = raw["timeouts"] > 0.5
    else:
        timeouts, age = np.zeros_like(terminals), 0
        for i, terminal in enumerate(terminals):
            age += 1
            timeouts[i] = age == limit
            age = 0 if terminal or timeouts[i] else age
    ends = terminals | timeouts
    obs, keep, known = raw["observations"], np.ones(len(ends), bool), np.ones(len(ends), bool)
    if "next_observations" in raw:
        next_obs = raw["next_observations"]
    else:
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        known = ~terminals
        if walks_on:
            known |= ~timeouts & (np.linalg.norm(next_obs[:, :2] - obs[:, :2], axis=1) < 1)
        known[-1] = False
        next_obs[~known] = obs[~known]
        keep = ~(timeouts & ~terminals)
        keep[-1] &= terminals[-1]
        last_kept = np.append(ends[1:] & ~keep[1:], False)  # the row after it, an end, is dropped
        ends = ends | last_kept
    flags = terminals.astype(np.float32), ends, known
    columns = (obs, raw["actions"].clip(-1, 1), raw["rewards"], next_obs, *flags)
    if not keep.all():
        columns = tuple(x[keep] for x in columns)
    if len(columns[0]) < 2:
        raise refuse(path, f"{len(columns[0])} usable rows", "at least 2")
    return columns


# ---- Minari ----


def minari_folder() -> Path:
    """Where Minari keeps its datasets: $MINARI_DATASETS_PATH or ~/.minari/datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def open_minari(name: str) -> tuple[Callable[[], gym.Env], int, float | None, float | None]:
    """Of a Minari dataset: builder of its evaluation environment as vectors, rows, reference returns if it has them.

    Fetched first if it is not in Minari's folder and HF_HUB_OFFLINE is not set; UsageError if it cannot be had.
    """
    try:
        import minari  # half a second, for those who ask for it

        source = minari.load_dataset(name, download=True)
        if source.env_spec is None:
            got, allowed = f"{name}, a dataset without environment", "one with its environment's spec"
            raise UsageError("--env", got, allowed)
        make = partial(envs.flat, source.recover_environment, eval_env=True)
        facts = source.storage.metadata
    except UsageError:
        raise
    except Exception as e:  # its own errors, and those of whatever it fetches with
        raise minari_error(name, e) from e
    low, high = facts.get("ref_min_score"), facts.get("ref_max_score")
    return make, source.total_steps, low, high


def minari_error(name: str, e: Exception) -> UsageError:
    """What to tell the user when Minari or its environment fails."""
    reason = " ".join(f"{type(e).__name__}: {e}".split())[:160]
    allowed = f"a Minari id that is in {minari_folder()} or can be fetched ({reason})"
    return UsageError("--env", name, allowed)


def read_minari(name: str, env: gym.Env, path: Path) -> tuple[list[np.ndarray], str]:
    """Obs, actions, rewards, next obs, terminations, ends (bool) of all episodes, and the SHA256 of the file at `path`.

    True successors; `env` (envs.Flat) flattens observations and scales actions to [-1, 1].
    """
    import minari

    flatten, scale, parts = env.get_wrapper_attr("flatten"), env.get_wrapper_attr("inverse"), []
    try:
        for episode in minari.load_dataset(name).iterate_episodes():
            obs = flatten(episode.observations)  # (T + 1, O)
            ends = np.asarray(episode.terminations | episode.truncations, dtype=bool)
            ends[-1] = True
            columns = obs[:-1], scale(episode.actions), episode.rewards, obs[1:], episode.terminations, ends
            parts.append(columns)
    except (OSError, RuntimeError, KeyError, ValueError, IndexError) as e:
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        got, allowed = f"{name}, unreadable ({reason})", f"a complete dataset below {path}"
        raise UsageError("--env", got, allowed) from e
    columns = [np.concatenate(x).astype(np.float32) for x in zip(*parts, strict=True)]
    for k, x in zip(("obs", "actions", "rewards", "next_obs"), columns, strict=False):
        if not np.isfinite(x).all():
            raise UsageError("--env", f"{name} with NaN or infinite {k}", "finite numbers")
    columns[1], columns[5] = columns[1].clip(-1, 1), columns[5] > 0.5
    return columns, sha256_of(path)
