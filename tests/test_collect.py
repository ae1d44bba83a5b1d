"""Collecting: roll-outs and files made of them, the maze's controller, policies from files, shifted robots, workers,
kills, Minari, refusals.

SAC, which trains the policies: test_sac.py.
"""

import contextlib
import json
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import pytest
import torch
from conftest import HOPPER, Killed
from test_interaction import Walk

from common import data, envs, files, judge, run
from common.run import UsageError
from common.tools import cards, collect

# ---- roll-outs ----


def walk_rollout(max_steps: int | None = None, **env) -> dict[str, np.ndarray]:
    more = () if max_steps is None else (max_steps,)
    return collect.rollout(Walk(**env), lambda obs: [obs[0] / 10], 3, *more)


def test_a_rollout_has_true_successors_and_acts_on_what_it_sees():
    part = walk_rollout(limit=4)
    assert part["observations"][:, 0].tolist() == [0, 1, 2, 3]
    assert part["next_observations"][:, 0].tolist() == [1, 2, 3, 4]
    assert np.array_equal(part["observations"][1:], part["next_observations"][:-1])
    assert part["actions"][:, 0].tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert part["rewards"].tolist() == [1, 2, 3, 4]
    assert part["terminals"].tolist() == [False] * 4 and part["timeouts"].tolist() == [False] * 3 + [True]
    kinds = {k: v.dtype.kind for k, v in part.items()}
    assert kinds == {k: "b" if k in ("terminals", "timeouts") else "f" for k in collect.FIELDS}
    assert all(v.dtype.itemsize == 4 for v in part.values() if v.dtype.kind == "f")


@pytest.mark.parametrize(
    "env, max_steps, length, terminal, timeout",
    [
        (dict(limit=9, fall=3), None, 3, True, False),  # a fall
        (dict(limit=3, fall=3), None, 3, False, True),  # on the last allowed step: D4RL stores a timeout
        (dict(limit=9), 3, 3, False, True),  # cut by us
        (dict(limit=9, fall=3), 3, 3, True, False),  # falls where we would have cut
        (dict(limit=9, fall=3), 5, 3, True, False),
        (dict(limit=9), 1, 1, False, True),
    ],
)
def test_how_a_rollout_ends(env, max_steps, length, terminal, timeout):
    part = walk_rollout(max_steps, **env)
    assert len(part["rewards"]) == length
    assert (bool(part["terminals"][-1]), bool(part["timeouts"][-1])) == (terminal, timeout)
    assert not part["terminals"][:-1].any() and not part["timeouts"][:-1].any()
    assert part["next_observations"][-1, 0] == length


def test_concatenate_and_whole():
    """Episodes of 3, 4 and 3 rows, cut at 8: the third has one row left, and `whole` drops it."""
    parts = [walk_rollout(limit=3), walk_rollout(limit=4), walk_rollout(limit=9, fall=3)]
    joined = collect.concatenate(parts)
    assert joined["rewards"].tolist() == [1, 2, 3, 1, 2, 3, 4, 1, 2, 3]
    assert np.flatnonzero(joined["timeouts"]).tolist() == [2, 6]
    assert np.flatnonzero(joined["terminals"]).tolist() == [9]
    cut = collect.concatenate(parts, 8)
    assert {len(v) for v in cut.values()} == {8}
    assert {len(v) for v in collect.whole(cut).values()} == {7}
    assert {len(v) for v in collect.whole(joined).values()} == {10}
    assert {len(v) for v in collect.whole(collect.concatenate(parts, 2)).values()} == {0}


def test_thin_takes_whole_episodes_evenly():
    """Four episodes of 5, at most 10 rows: after 5, 10, 15, 20 rows seen at most 2.5, 5, 7.5, 10 may be kept."""
    parts = [walk_rollout(limit=5) for _ in range(4)]
    for i, p in enumerate(parts):
        p["rewards"][:] = i
    data_of_four = collect.concatenate(parts)
    assert collect.thin(data_of_four, 10)["rewards"].tolist() == [1] * 5 + [3] * 5
    assert collect.thin(data_of_four, 20)["rewards"].tolist() == data_of_four["rewards"].tolist()
    assert len(collect.thin(data_of_four, 14)["rewards"]) == 10


def test_thin_to_less_than_an_episode_is_a_usage_error_or_nothing():
    """`--quality medium-replay --rows 500` where each episode has 1,000."""
    with contextlib.suppress(UsageError):
        assert len(collect.thin(walk_rollout(limit=5), 3)["rewards"]) <= 3


# ---- files of random actions ----


@pytest.fixture(scope="module")
def random_file(tmp_path_factory) -> Path:
    """500 rows as the command line makes them."""
    folder = tmp_path_factory.mktemp("collect")
    path = folder / "deep" / "hopper_random.hdf5"
    collect.main(collect.Args(out=path, quality="random", rows=500, seed=2, work=folder / "work"))
    return path


def test_a_collected_file_is_a_d4rl_file(random_file):
    with h5py.File(random_file) as f:
        raw = {k: f[k][()] for k in f}
        attributes = dict(f.attrs)
    assert set(raw) == {
        "observations", "actions", "rewards", "next_observations", "terminals", "timeouts"
    }  # fmt: skip
    assert {len(v) for v in raw.values()} == {500}
    assert raw["terminals"].dtype == raw["timeouts"].dtype == bool
    d = data.load(HOPPER, random_file)
    assert np.array_equal(d.obs, raw["observations"]) and np.array_equal(d.next_obs, raw["next_observations"])
    inside = ~d.ends[:-1]
    assert np.array_equal(d.next_obs[:-1][inside], d.obs[1:][inside])
    assert not (d.next_obs[:-1][~inside] == d.obs[1:][~inside]).all(1).any()
    assert not d.ends[-1]  # cut at exactly 500 rows, unflagged, as D4RL's files are
    assert 10 < d.ends.sum() < 40 and np.array_equal(d.ends, d.terminations > 0)
    assert np.abs(d.actions).max() <= 1 and np.abs(d.actions.mean()) < 0.05
    assert d.actions.std() == pytest.approx(3**-0.5, abs=0.03)  # uniform on [-1, 1]
    recipe, versions = json.loads(attributes["recipe"]), json.loads(attributes["versions"])
    assert recipe["rows"] == 500 and recipe["episodes"] == recipe["terminals"] == d.ends.sum()
    assert recipe["return_mean"] == pytest.approx(d.episode_returns().mean(), rel=1e-5)
    known = {"env": "hopper", "quality": "random", "seed": "2", "timeouts": 0}
    assert {k: recipe[k] for k in known} == known
    assert attributes["env_id"] == "Hopper-v4"
    words = attributes["made_by"].split()
    assert words[:3] == ["python", "-m", "common.tools.collect"] and words[words.index("--rows") + 1] == "500"
    assert versions["mujoco"] == mujoco.__version__ and versions["torch"] == torch.__version__
    assert versions["gymnasium"] == gym.__version__ and versions["numpy"] == np.__version__
    assert [p.name for p in random_file.parent.iterdir()] == ["hopper_random.hdf5"]


def test_a_collected_episode_replays_on_the_stock_environment(random_file):
    """Same reset, the file's actions: Gymnasium's Hopper-v4 pays the file's rewards and passes its states."""
    d = data.load(HOPPER, random_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make("Hopper-v4")
    obs, _ = env.reset(seed=envs.episode_seed(2, "random", 0))
    for i in range(np.flatnonzero(d.ends)[0] + 1):
        assert np.array_equal(obs.astype(np.float32), d.obs[i])
        obs, reward, terminated, *_ = env.step(d.actions[i])
        assert np.float32(reward) == d.rewards[i] and terminated == d.terminations[i]
    assert np.array_equal(obs.astype(np.float32), d.next_obs[i])


def test_the_same_recipe_makes_the_same_rows(random_file, tmp_path):
    collect.main(collect.Args(out=tmp_path / "b.hdf5", quality="random", rows=200, seed=2))
    collect.main(collect.Args(out=tmp_path / "c.hdf5", quality="random", rows=200, seed=3))
    a, b, c = (data.load(HOPPER, p) for p in (random_file, tmp_path / "b.hdf5", tmp_path / "c.hdf5"))
    assert all(np.array_equal(x[:200], y) for x, y in zip(a[:6], b[:6], strict=True))
    assert not np.array_equal(b.obs, c.obs)


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "mine.hdf5").write_text("precious")
    with pytest.raises(UsageError, match=r"mine\.hdf5"):
        collect.main(collect.Args(out=tmp_path / "mine.hdf5", quality="random", rows=100))
    assert (tmp_path / "mine.hdf5").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": -1}, {"epoch": -1}, {"seed": -1}])
def test_wrong_numbers_are_refused_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(UsageError):
        collect.main(collect.Args(out=tmp_path / "x" / "x.hdf5", quality="random", **wrong))
    assert list(tmp_path.iterdir()) == []


def test_medium_expert_takes_no_epoch(tmp_path):
    with pytest.raises(UsageError):
        collect.main(collect.Args(out=tmp_path / "x.hdf5", quality="medium-expert", epoch=3))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_no_crash(tmp_path):
    """UsageError, or the OSError that `run.main` turns into one line and exit 2."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises((UsageError, NotADirectoryError)):
        collect.main(collect.Args(out=tmp_path / "file" / "x.hdf5", quality="random", rows=50))


def test_whole_episodes_are_whole(tmp_path):
    collect.main(collect.Args(out=tmp_path / "x.hdf5", quality="random", rows=300, whole_episodes=True))
    d = data.load(HOPPER, tmp_path / "x.hdf5")
    assert 200 < len(d.obs) <= 300 and d.ends[-1]


def test_no_room_for_a_whole_episode_is_refused(tmp_path):
    """HalfCheetah's episodes have 1,000 steps: 500 rows of whole episodes are none, and no loader takes them."""
    settings = dict(env="halfcheetah", quality="random", rows=500, whole_episodes=True)
    with pytest.raises(UsageError):
        collect.main(collect.Args(out=tmp_path / "x.hdf5", **settings))
    assert list(tmp_path.iterdir()) == []


# ---- names ----


@pytest.mark.parametrize(
    "env, task",
    [
        ("walker2d", "walker2d-medium-v2"),
        ("maze2d-large", "maze2d-large-v1"),
        ("relocate", "relocate-human-v1"),
        ("halfcheetah-friction-2.0", "halfcheetah-medium-v2-friction-2.0"),
    ],
)
def test_a_name_means_the_task_s_environment(env, task):
    assert collect.task_of(env) == data.get_task(task)


@pytest.mark.parametrize("env", ["ant", "hopper-medium-v2", "maze2d", "maze2d-tiny", "pen-expert", "door-friction-2",
                                 "hopper-gravity-x", ""])  # fmt: skip
def test_other_names_are_refused_in_one_line(env, tmp_path):
    with pytest.raises(UsageError, match="--env") as e:
        collect.main(collect.Args(out=tmp_path / "x.hdf5", env=env, quality="random"))
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []


# ---- Maze2D's controller ----


def made(path: Path, **settings) -> dict[str, np.ndarray]:
    """The arrays of the file that these settings make."""
    collect.main(collect.Args(out=path, work=path.parent / "work", **settings))
    found = {}
    with h5py.File(path) as f:
        f.visititems(lambda name, x: found.update({name: x[()]}) if isinstance(x, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize("size", ["umaze", "medium", "large"])
def test_routes_are_shortest_paths(size):
    """D4RL finds them by value iteration: a cell at distance d is worth γ^d."""
    walls = envs.Maze2D(size).walls
    free = [tuple(map(int, c)) for c in np.argwhere(~walls)]
    for goal in free[:: len(free) // 4]:
        value = np.zeros(walls.shape)
        for _ in range(50):
            around = [np.roll(value, shift, axis) for shift in (-1, 1) for axis in (0, 1)]
            value = np.where(walls, 0.0, 0.99 * np.max(around, axis=0))
            value[goal] = 1.0
        for start in free:
            path = collect.route(walls, start, goal)
            assert path[-1] == goal and not any(walls[c] for c in path)
            steps = [abs(a - c) + abs(b - d) for (a, b), (c, d) in zip([start, *path], path, strict=False)]
            if start == goal:
                assert path == [goal]
            else:
                assert set(steps) == {1} and 0.99 ** len(path) == pytest.approx(value[start])


@pytest.fixture(scope="module")
def maze_rows(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("maze") / "maze2d_umaze.hdf5"
    return path, made(path, env="maze2d-umaze", quality="controller", rows=10_000, seed=3)


def test_the_controller_s_file_is_d4rls(maze_rows, capsys):
    """D4RL's quirks, each from the rows alone."""
    path, d = maze_rows
    obs, next_obs, switch = d["observations"], d["next_observations"], d["timeouts"]
    assert obs.shape == next_obs.shape == (10_000, 4) and not d["terminals"].any()
    # the ball is never put back; at a goal switch the old observation is written once more, and only there
    assert np.array_equal((obs[1:] == obs[:-1]).all(1), switch[:-1])
    assert np.array_equal(next_obs[:-1][~switch[:-1]], obs[1:][~switch[:-1]])
    after = np.flatnonzero(switch[:-1]) + 1
    assert np.array_equal(np.hstack([d["infos/qpos"], d["infos/qvel"]])[after], next_obs[after - 1])
    # the reward is that of the maze's goal, (1, 1), on the observation before the step
    assert np.array_equal(d["rewards"], np.hypot(*(obs[:, :2] - 1).T) <= 0.5)
    # goals: a free cell ± 0.1, one per stretch
    goals, cells = d["infos/goal"], np.round(d["infos/goal"]).astype(int)
    assert np.abs(goals - cells).max() <= 0.1 and not envs.Maze2D("umaze").walls[tuple(cells.T)].any()
    assert {tuple(c) for c in cells} == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}
    assert (goals[1:] != goals[:-1]).any(1).sum() == switch[:-1].sum()
    # a stretch ends within 0.1 m of its cell, steering at it
    last = np.flatnonzero(switch)
    miss = cells[last] - obs[last, :2]
    assert np.hypot(*miss.T).max() < 0.1
    assert np.allclose(d["actions"][last], (10 * miss - obs[last, 2:]).clip(-1, 1), atol=1e-5)
    # 13,700 switches per 10^6 steps in a rebuild of D4RL's program; lengths spread by 0.7 of their mean
    assert switch.sum() == pytest.approx(137, abs=3 * 0.7 * 137**0.5)
    cards.check(str(path))
    assert "0 terminal" in capsys.readouterr().out


def test_the_controller_s_rows_follow_from_the_simulator(maze_rows):
    _, d = maze_rows
    env, rows = data.make_env(data.get_task("maze2d-umaze-v1")), slice(0, 2_000)
    state = np.hstack([d["infos/qpos"], d["infos/qvel"]])[rows]
    next_obs, _ = judge.simulate(env, state, d["actions"][rows])
    assert np.abs(next_obs - d["next_observations"][rows]).max() < 1e-4


@pytest.mark.parametrize("noisy", [False, True])
def test_the_first_action_by_hand(noisy):
    """Towards the first cell less U(0, 0.2), 10 per metre, minus the velocity; then the noise."""
    env = envs.Maze2D("large")
    rows = collect.segment(env, 800, noisy, 5, None)
    start, _ = env.reset(seed=5)
    rng, free = env.np_random, np.argwhere(~env.walls)
    goal = free[rng.integers(len(free))] + rng.uniform(-0.1, 0.1, 2)
    assert np.allclose(rows["infos/goal"], goal) and np.allclose(rows["observations"][0], start)
    path = collect.route(env.walls, tuple(np.round(start[:2]).astype(int)), tuple(np.round(goal).astype(int)))
    assert len(path) > 1
    lessened = rng.uniform(0, 0.2, (len(path) - 1, 2))
    expected = (10 * (path[0] - lessened[0] - start[:2]) - start[2:]).clip(-1, 1)
    if noisy:
        expected = (expected + rng.normal(0, 0.5, 2)).clip(-1, 1)
    assert np.allclose(rows["actions"][0], expected)


def test_a_goal_is_given_up_after_the_limit():
    """A goal farther than 20 steps away: rows 0 to 20, the last one flagged, as D4RL counts them."""
    rows = collect.segment(envs.Maze2D("large"), 20, False, 5, None)
    assert len(rows["rewards"]) == 21 and np.flatnonzero(rows["timeouts"]).tolist() == [20]


def test_random_actions_in_a_maze(tmp_path):
    d = made(tmp_path / "x.hdf5", env="maze2d-medium", quality="random", rows=1_300)
    assert np.flatnonzero(d["timeouts"]).tolist() == [599, 1_199] and not d["terminals"].any()
    assert d["actions"].std() == pytest.approx(3**-0.5, abs=0.03)


# ---- the arm ----


def test_the_embedded_reacher_data_are_what_their_recipe_makes(tmp_path):
    rows = made(tmp_path / "rows.hdf5", env="reacher", quality="controller", rows=500)
    kept = data.load("reacher-mini-v0")
    assert np.allclose(rows["observations"], kept.obs[:500], atol=1e-5)
    assert np.allclose(rows["actions"], kept.actions[:500], atol=1e-5)
    assert np.flatnonzero(rows["timeouts"]).tolist() == [*range(49, 500, 50)] and not rows["terminals"].any()


def test_the_arm_s_torques_by_hand():
    """Arm along x, target 0.05 m above the fingertip: a force of 10 · 0.05 up, on lever arms of 0.21 and 0.11 m."""
    none = type("Still", (), {"standard_normal": lambda _, n: np.zeros(n)})()
    obs = np.array([1, 1, 0, 0, 0.21, 0.05, 2.0, -1.0, 0, -0.05, 0])
    torques = collect.reach(10.0, 0.03, none, obs)
    assert torques == pytest.approx([0.5 * 0.21 - 0.06, 0.5 * 0.11 + 0.03])
    bent = np.array(
        [1, 0, 0, 1, 0.1, 0.16, 0, 0, 0, -0.05, 0]
    )  # elbow at 90 degrees: the fingertip at (0.1, 0.11)
    assert collect.reach(10.0, 0.03, none, bent) == pytest.approx([0.5 * 0.1, 0.0], abs=1e-9)


# ---- policies from files ----


def layers(obs_dim: int, act_dim: int, seed: int, hidden: int = 8) -> dict[str, np.ndarray]:
    """Random weights (out, in) of two hidden layers and a head."""
    rng, sizes = np.random.default_rng(seed), (obs_dim, hidden, hidden, act_dim)
    w = {f"w{i}": rng.normal(size=(sizes[i + 1], sizes[i])) / 3 for i in range(3)}
    return w | {f"b{i}": rng.normal(size=sizes[i + 1]) / 3 for i in range(3)}


def tanh_gaussian(obs_dim: int, act_dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    head = {"w_log_std": np.zeros((act_dim, 8)), "b_log_std": np.full(act_dim, -3.0)}
    return layers(obs_dim, act_dim, seed) | head


def policy_file(path: Path, meta: dict, **policies: dict[str, np.ndarray]) -> Path:
    """An npz file; `hopper__medium=...` stands for the key hopper/medium."""
    arrays = {f"{k.replace('__', '/')}/{n}": v for k, p in policies.items() for n, v in p.items()}
    np.savez(path, meta_json=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    return path


SQUASHED = {"kind": "tanh_gaussian", "hidden_activation": "relu"}


CLIPPED = {"kind": "gaussian_clip", "hidden_activation": "tanh"}


@pytest.fixture
def hopper_file(tmp_path) -> Path:
    meta = {"hopper/medium": SQUASHED | {"env": "Hopper-v4", "source": "a test"}}
    return policy_file(tmp_path / "policies.npz", meta, hopper__medium=tanh_gaussian(11, 3))


class Fixed:
    """A generator whose normal numbers are known."""

    def __init__(self, numbers: list[float]):
        self.numbers = np.array(numbers)

    def standard_normal(self, size: int) -> np.ndarray:
        assert size == len(self.numbers)
        return self.numbers


def torch_mean(w: dict[str, np.ndarray], x: np.ndarray, activation) -> np.ndarray:
    """The head's output (A,), by PyTorch in float64."""
    h = torch.as_tensor(x, dtype=torch.float64)
    for i in range(3):
        h = torch.nn.functional.linear(h, torch.as_tensor(w[f"w{i}"]), torch.as_tensor(w[f"b{i}"]))
        h = activation(h) if i < 2 else h
    return h.numpy()


def test_a_tanh_gaussian_acts_as_its_formula_says():
    """tanh(mean + exp(clip(log_std, -20, 2)) n) for three known n; the log-std is a second head, here -1, 0 and 9."""
    w = tanh_gaussian(5, 3) | {"b_log_std": np.array([-1.0, 0.0, 9.0])}
    obs, n = np.linspace(-2, 2, 5), [0.5, -1.0, 0.01]
    mean = torch_mean(w, obs, torch.relu)
    expected = np.tanh(mean + np.exp([-1.0, 0.0, 2.0]) * n)
    action = collect.sample(collect.standard("tanh_gaussian", "relu", w), obs, Fixed(n))
    assert np.allclose(action, expected, atol=1e-5)


def test_a_clipped_gaussian_acts_as_its_formula_says():
    """Both ways to scale: (obs - mean) / std cut at ±clip; (obs - shift) / (scale + 1e-8) and a scaled output."""
    obs, n = np.linspace(-2, 2, 5), [0.5, -8.0]
    w = layers(5, 2, 1) | {"log_std": np.array([-1.0, 0.5])}
    moments = {"obs_mean": np.full(5, 0.5), "obs_std": np.full(5, 0.25), "obs_clip": np.array(3.0)}
    mean = torch_mean(w, ((obs - 0.5) / 0.25).clip(-3, 3), torch.tanh)
    action = collect.sample(collect.standard("gaussian_clip", "tanh", w | moments), obs, Fixed(n))
    assert np.allclose(action, (mean + np.exp([-1.0, 0.5]) * n).clip(-1, 1), atol=1e-5)
    assert action[1] == -1.0
    scales = {"in_shift": np.full(5, 0.1), "in_scale": np.full(5, 2.0), "out_scale": np.full(2, 0.3),
              "out_shift": np.full(2, -0.2)}  # fmt: skip
    mean = torch_mean(w, (obs - 0.1) / 2.0, torch.tanh) * 0.3 - 0.2
    action = collect.sample(collect.standard("gaussian_clip", "tanh", w | scales), obs, Fixed(n))
    assert np.allclose(action, (mean + np.exp([-1.0, 0.5]) * n).clip(-1, 1), atol=1e-5)


def test_sac_s_actor_is_rolled_out_as_it_is():
    torch.manual_seed(0)
    actor, obs, n = collect.Policy(11, 3), np.linspace(-1, 1, 11), [0.3, -0.7, 1.1]
    mean, log_std = actor.net(torch.as_tensor(obs, dtype=torch.float32)).chunk(2)
    expected = torch.tanh(mean + log_std.exp() * torch.tensor(n)).detach().numpy()
    assert np.allclose(collect.sample(collect.weights(actor), obs, Fixed(n)), expected, atol=1e-5)


def test_a_policy_of_a_file_is_rolled_out(hopper_file, tmp_path):
    """Actions of the network on the rows' own observations plus noise of e^-3; appended, cut at exactly 300 rows."""
    settings = dict(env="hopper", quality="medium", policy=hopper_file, rows=300)
    d = made(tmp_path / "x.hdf5", **settings)
    w = tanh_gaussian(11, 3)
    mean = np.array([torch_mean(w, o, torch.relu) for o in d["observations"]])
    noise = (np.arctanh(d["actions"].astype(np.float64)) - mean) / np.exp(-3)
    assert len(mean) == 300 and abs(noise.mean()) < 0.12 and noise.std() == pytest.approx(1, abs=0.1)
    ends = d["terminals"] | d["timeouts"]
    assert ends.sum() > 1 and not ends[-1]
    first = noise[[0, *(np.flatnonzero(ends) + 1)], 0]
    assert len(set(first)) == ends.sum() + 1  # no noise is drawn twice
    with h5py.File(tmp_path / "x.hdf5") as f:
        recipe, command = json.loads(f.attrs["recipe"]), f.attrs["made_by"]
    assert recipe["policies"]["medium"] == {
        "policy_key": "hopper/medium", "policy_sha256": files.sha256_of(hopper_file), "policy_source": "a test"
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(recipe) + command and "--policy policies.npz" in command
    whole = made(tmp_path / "y.hdf5", **settings, whole_episodes=True)
    last = np.flatnonzero(ends)[-1]
    assert len(whole["rewards"]) == last + 1 and np.array_equal(whole["actions"], d["actions"][: last + 1])


@pytest.mark.parametrize(("clip", "fits"), [(np.inf, True), (0.5, True), (0.0, False), (np.nan, False)])
def test_observations_may_be_cut_nowhere_but_not_to_nothing(clip, fits, tmp_path):
    w = layers(11, 3, 1) | {"log_std": np.full(3, -1.0), "obs_clip": np.array(clip)}
    path = policy_file(tmp_path / "p.npz", CLIPPED, hopper__expert=w)
    read = partial(collect.read_policy, path, data.get_task("hopper-expert-v2"), "hopper/expert")
    if not fits:
        with pytest.raises(UsageError, match="finite arrays"):
            read()
        return
    obs = np.linspace(-1, 1, 11)
    action = collect.sample(read()[0], obs, Fixed([0.0] * 3))
    assert np.allclose(action, torch_mean(w, obs.clip(-clip, clip), torch.tanh).clip(-1, 1), atol=1e-5)


def test_medium_expert_of_a_file_is_both_levels(tmp_path):
    """Medium steers to the one side, expert to the other."""
    still = {k: np.zeros_like(v) for k, v in tanh_gaussian(11, 3).items()} | {"b_log_std": np.full(3, -9.0)}
    levels = {f"hopper__{k}": still | {"b2": np.full(3, v)} for k, v in (("medium", 0.5), ("expert", -0.5))}
    path = policy_file(tmp_path / "p.npz", SQUASHED, **levels)
    d = made(tmp_path / "x.hdf5", quality="medium-expert", policy=path, rows=200)
    first_expert = int(np.argmax(d["actions"][:, 0] < 0))
    assert np.allclose(d["actions"][:first_expert], np.tanh(0.5), atol=1e-3)
    assert np.allclose(d["actions"][first_expert:], np.tanh(-0.5), atol=1e-3)
    assert d["terminals"][first_expert - 1] and len(d["rewards"]) == first_expert + 200


@pytest.mark.parametrize("task", ["door", "pen"])
def test_adroit_s_files_replay_in_the_simulator(task, tmp_path, capsys):
    """The state of `infos`, the stored action, one step: the stored successor and D4RL's reward."""
    known = data.get_task(f"{task}-human-v1")
    w = layers(known.obs_dim, known.act_dim, 0) | {"log_std": np.full(known.act_dim, -1.0)}
    path = policy_file(tmp_path / "hands.npz", CLIPPED, **{task: w})
    d = made(tmp_path / f"{task}_expert.hdf5", env=task, quality="expert", policy=path, rows=250)
    extra = {"door": "door_body_pos", "pen": "desired_orien"}[task]
    assert {k for k in d if k not in collect.FIELDS} == {"infos/qpos", "infos/qvel", f"infos/{extra}"}
    assert all(len(v) == 250 for v in d.values())
    if task == "door":
        assert np.flatnonzero(d["timeouts"]).tolist() == [199]
    infos = {k[6:]: v for k, v in d.items() if k not in collect.FIELDS}
    next_obs, rewards = judge.simulate(known.make(), d["observations"], d["actions"], infos)
    assert np.median(np.abs(next_obs - d["next_observations"])) < 1e-5
    assert np.abs(rewards - d["rewards"]).max() < 1e-3
    cards.check(str(tmp_path / f"{task}_expert.hdf5"))
    assert "250 rows stepped" in capsys.readouterr().out


# ---- shifted robots ----


def test_a_shifted_episode_replays_on_a_robot_shifted_by_hand(tmp_path):
    d = made(tmp_path / "x.hdf5", env="hopper-gravity-0.5", quality="random", rows=60, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make("Hopper-v4")
    env.unwrapped.model.opt.gravity[2] = -9.81 / 2
    obs, _ = env.reset(seed=envs.episode_seed(4, "random", 0))
    ends = np.flatnonzero(d["terminals"])
    for i in range(ends[0] + 1 if len(ends) else 60):
        assert np.array_equal(obs.astype(np.float32), d["observations"][i])
        obs, reward, *_ = env.step(d["actions"][i])
        assert np.float32(reward) == d["rewards"][i]


def test_sac_is_trained_in_the_shifted_environment(tmp_path, monkeypatch):
    """Epoch 0 with a gradient step that does nothing: training rows and roll-out obey the other gravity."""
    monkeypatch.setattr(collect.SAC, "update", lambda *_: None)
    common = dict(env="hopper-gravity-2.0", epoch=1)
    replay = made(tmp_path / "a.hdf5", **common, quality="medium-replay")
    rolled = made(tmp_path / "b.hdf5", **common, quality="medium", rows=100)
    assert len(replay["rewards"]) == 3_000 and len(rolled["rewards"]) == 100
    for d in (replay, rolled):
        obs, acts, next_obs = (d[k][:100] for k in ("observations", "actions", "next_observations"))
        errors = {}
        for name in ("hopper", "hopper-gravity-2.0"):
            simulated, _ = judge.simulate(collect.task_of(name).make(), obs, acts)
            errors[name] = np.abs(simulated - next_obs).max(1)
        assert np.median(errors["hopper-gravity-2.0"]) < 1e-5 and errors["hopper"].max() > 1e-2


# ---- workers, kills ----


def test_the_number_of_workers_does_not_change_a_bit(hopper_file, tmp_path):
    settings = dict(env="hopper", quality="medium", policy=hopper_file, rows=400, seed=7)
    for n in (1, 2):
        made(tmp_path / f"{n}.hdf5", **settings, workers=n)
    assert (tmp_path / "1.hdf5").read_bytes() == (tmp_path / "2.hdf5").read_bytes()


@pytest.mark.parametrize(
    "name, settings",
    [("rollout", {"quality": "random"}), ("segment", {"env": "maze2d-umaze", "quality": "controller"})],
)
def test_a_roll_out_is_taken_up_again_after_a_kill(name, settings, tmp_path, monkeypatch):
    """Killed at the 12th episode with files written meanwhile; the second call repeats none of the kept ones."""
    calls, deadly, real = [0], [0], getattr(collect, name)

    def counted(*args):
        calls[0] += 1
        if calls[0] == deadly[0]:
            raise Killed
        return real(*args)

    monkeypatch.setattr(collect, name, counted)
    monkeypatch.setattr(collect, "KEEP_EVERY", 100)
    whole = made(tmp_path / "a" / "x.hdf5", **settings, rows=1_000)
    all_of_them, calls[0], deadly[0] = calls[0], 0, 12
    with pytest.raises(Killed):
        made(tmp_path / "b" / "x.hdf5", **settings, rows=1_000)
    kept = sorted((tmp_path / "b" / "work").glob("*/*/*.npz"))
    stored = 0
    for path in kept:
        with np.load(path) as f:
            stored += int((f["terminals"] | f["timeouts"]).sum())
    assert kept and 0 < stored <= 11 and not (tmp_path / "b" / "x.hdf5").exists()
    calls[0] = deadly[0] = 0
    again = made(tmp_path / "b" / "x.hdf5", **settings, rows=1_000)
    assert calls[0] == all_of_them - stored
    assert (tmp_path / "a" / "x.hdf5").read_bytes() == (tmp_path / "b" / "x.hdf5").read_bytes()
    assert whole.keys() == again.keys() and not list((tmp_path / "b" / "work").glob("*/*"))


def test_what_is_kept_is_taken_up_by_the_same_recipe_only(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "KEEP_EVERY", 50)
    args = collect.Args(out=tmp_path / "x", quality="random", rows=60, work=tmp_path)
    task = collect.task_of("hopper")
    settings = (args, replace(args, seed=1), replace(args, rows=99))
    folders = [collect.roll(x, task, "random")[1] for x in settings]
    policies = (tanh_gaussian(11, 3, seed) for seed in (0, 1))
    standard = [collect.standard("tanh_gaussian", "relu", w) for w in policies]
    folders += [collect.roll(args, task, "random", p)[1] for p in standard]
    assert folders[0] == folders[2] and len(set(folders)) == 4


@pytest.mark.parametrize("kind", ["cut off", "empty", "something else"])
@pytest.mark.parametrize("what", ["roll-out", "training"])
def test_damaged_work_is_named_and_refused_in_one_line(what, kind, tmp_path, monkeypatch):
    """A kept file of a roll-out and a checkpoint of SAC, cut at half or replaced: nothing is written."""
    monkeypatch.setattr(collect, "KEEP_EVERY", 50)
    monkeypatch.setattr(collect.SAC, "update", lambda *_: None)
    settings = {"quality": "random", "rows": 120} if what == "roll-out" else {"epoch": 1}
    args = collect.Args(out=tmp_path / "x.hdf5", work=tmp_path / "work", **settings)
    if what == "roll-out":
        folder = collect.roll(args, collect.task_of("hopper"), "random")[1]
    else:
        collect.train_sac(args, collect.task_of("hopper").make(), 1)
        folder = tmp_path / "work" / "hopper" / "seed0"
    path = min(p for p in folder.iterdir() if p.is_file())
    content = {
        "cut off": path.read_bytes()[: path.stat().st_size // 2],
        "empty": b"",
        "something else": b"x" * 99,
    }
    path.write_bytes(content[kind])
    with pytest.raises(UsageError, match=f"--work: got .*{path.name}") as e:
        collect.main(args)
    assert "\n" not in str(e.value) and not (tmp_path / "x.hdf5").exists()


# ---- Minari ----


def test_a_minari_dataset_has_the_rows_of_the_file(minari_home, tmp_path):
    made(tmp_path / "x.hdf5", quality="random", rows=300)
    name, settings = "mine/hopper/random-v0", dict(quality="random", rows=300, work=tmp_path / "work")
    collect.main(collect.Args(minari=name, **settings))
    ours, theirs = data.load("hopper-random-v2", tmp_path / "x.hdf5"), data.load(name)
    for k in ("obs", "actions", "rewards", "next_obs", "terminations"):
        assert np.array_equal(getattr(ours, k), getattr(theirs, k)), k
    assert np.array_equal(ours.ends[:-1], theirs.ends[:-1])
    assert theirs.ends[-1]  # Minari's last episode must end
    task = data.get_task(name)
    assert (task.ref_min, task.ref_max, task.limit) == (-20.272305, 3234.3, 1_000)
    assert task.make().unwrapped.spec.id == "Hopper-v4"
    about = minari.load_dataset(name).storage.metadata
    assert about["algorithm_name"] == "random" and "common.tools.collect --env hopper" in about["description"]
    with pytest.raises(UsageError, match="--minari") as e:
        collect.main(collect.Args(minari=name, **settings))
    assert "\n" not in str(e.value) and str(minari_home) in str(e.value)


def test_without_gymnasium_s_environment_minari_gets_the_spaces(minari_home, tmp_path):
    """Maze2D: the episodes can be read, our loader says in one line why the id is no task."""
    name, settings = "mine/maze-v0", dict(env="maze2d-umaze", quality="controller", rows=500)
    d = made(tmp_path / "x.hdf5", **settings)
    collect.main(collect.Args(minari=name, work=tmp_path / "work", **settings))
    dataset = minari.load_dataset(name)
    episodes = list(dataset.iterate_episodes())
    assert np.array_equal(np.concatenate([e.observations[:-1] for e in episodes]), d["observations"])
    assert np.array_equal(np.concatenate([e.observations[1:] for e in episodes]), d["next_observations"])
    assert np.array_equal(np.concatenate([e.rewards for e in episodes]), d["rewards"])
    assert dataset.storage.metadata["ref_max_score"] == 161.86 and minari_home.is_dir()
    with pytest.raises(UsageError, match="without environment") as e:
        data.get_task(name)
    assert "\n" not in str(e.value)


# ---- refusals ----


@pytest.mark.parametrize(
    "wrong",
    [
        dict(out=None),
        dict(minari="mine/x-v0"),  # and out
        dict(out=None, minari="no such id"),
        dict(rows=0),
        dict(workers=0),
        dict(quality="controller"),
        dict(quality="best"),
        dict(noisy=True),
        dict(env="door", quality="expert"),
        dict(env="maze2d-umaze", quality="medium"),
        dict(policy=Path("nothing.npz"), quality="random"),
        dict(policy=Path("nothing.npz"), quality="medium"),
        dict(policy=Path("nothing.npz"), quality="controller", env="maze2d-umaze"),
        dict(policy=Path("nothing.npz"), quality="medium", env="door"),
        dict(policy=Path("nothing.npz"), quality="medium", epoch=3),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(wrong, tmp_path, minari_home):
    settings = dict(out=tmp_path / "deep" / "x.hdf5", quality="random", work=tmp_path / "work")
    with pytest.raises(UsageError) as e:
        collect.main(collect.Args(**settings | wrong))
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == [] and not minari_home.exists()


RIGHT = {"hopper__medium": tanh_gaussian(11, 3)}
BAD_FILES = {  # what is wrong -> the file's meta and arrays, and what the line must say
    "another robot": (SQUASHED, {"walker2d__medium": tanh_gaussian(17, 6)}, "walker2d/medium"),
    "another level": (SQUASHED, {"hopper__expert": tanh_gaussian(11, 3)}, "hopper/expert"),
    "a hand's": (CLIPPED, {"door": layers(39, 28, 0) | {"log_std": np.zeros(28)}}, "door"),
    "another environment": (SQUASHED | {"env": "Hopper-v5"}, RIGHT, "Hopper-v5"),
    "another kind": (SQUASHED | {"kind": "beta"}, RIGHT, "beta"),
    "another activation": (SQUASHED | {"hidden_activation": "elu"}, RIGHT, "elu"),
    "other sizes": (SQUASHED, {"hopper__medium": tanh_gaussian(17, 6)}, "obs 11"),
    "no log-std": (SQUASHED, {"hopper__medium": layers(11, 3, 0)}, "w_log_std|tanh_gaussian"),
    "NaN": (SQUASHED, {"hopper__medium": tanh_gaussian(11, 3) | {"b2": np.full(3, np.nan)}}, "finite"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_policies_that_do_not_fit_are_one_line(what, tmp_path):
    meta, policies, told = BAD_FILES[what]
    path = policy_file(tmp_path / "p.npz", meta, **policies)
    settings = dict(quality="medium", policy=path, work=tmp_path / "w")
    with pytest.raises(UsageError, match=told) as e:
        collect.main(collect.Args(out=tmp_path / "x.hdf5", **settings))
    assert "\n" not in str(e.value) and [p.name for p in tmp_path.iterdir()] == ["p.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"text", None])
def test_files_that_are_no_policies_are_one_line(content, tmp_path):
    path = tmp_path / "p.npz"
    if content is None:
        np.savez(path, w0=np.zeros(3))  # no meta_json
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="unreadable") as e:
        collect.main(collect.Args(out=tmp_path / "x.hdf5", quality="medium", policy=path))
    assert "\n" not in str(e.value)


def test_the_command_refuses_with_exit_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    out = str(tmp_path / "x.hdf5")
    monkeypatch.setattr(sys, "argv", ["collect", "--env", "pen", "--quality", "medium", "--out", out])
    with pytest.raises(SystemExit) as e:
        run.main(collect.main, collect.Args)
    line = capsys.readouterr().err
    assert e.value.code == 2 and line.count("\n") == 1
    assert line.startswith("error: --quality: got medium for pen")
