"""Maze2D and AntMaze are D4RL's: maps, physics beside gymnasium-robotics', starts, goals, rewards, ends, limits."""

import contextlib
import io
import tempfile
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from conftest import module, tiny_args

from common import data, envs, files, judge
from common.buffer import ReplayBuffer
from common.tools import collect

with contextlib.redirect_stderr(io.StringIO()):  # a notice
    import gymnasium_robotics
    from gymnasium_robotics.envs.maze import maps

SIZES = ("umaze", "medium", "large")
MAPS = {"umaze": maps.U_MAZE, "medium": maps.MEDIUM_MAZE, "large": maps.LARGE_MAZE}
ANT_GOALS = {"umaze": (0, 8), "medium": (20, 20), "large": (32, 24)}  # of D4RL's mazes, before the noise
ANTS = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")


def packaged(env_id: str, tmp_path: Path, monkeypatch, **kwargs) -> gym.Env:
    """gymnasium-robotics' environment after a reset, its litter in tmp_path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gym.register_envs(gymnasium_robotics)
    with envs.quiet():
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
    env.reset(seed=0)
    return env


def held_actions(rng: np.random.Generator, steps: int, act_dim: int, hold: int) -> np.ndarray:
    """Uniform actions (steps, A), float32, each repeated `hold` times."""
    return np.repeat(rng.uniform(-1, 1, (steps // hold, act_dim)), hold, axis=0).astype(np.float32)


# ---- the table ----


@pytest.mark.parametrize(("size", "limit", "low", "high"),
                         [("umaze", 300, 23.85, 161.86), ("medium", 600, 13.13, 277.39),
                          ("large", 800, 6.7, 273.99)])  # fmt: skip
def test_maze2d_in_the_table(size, limit, low, high):
    task = data.get_task(f"maze2d-{size}-v1")
    assert (task.obs_dim, task.act_dim, task.limit, task.ref_min, task.ref_max) == (4, 2, limit, low, high)
    assert task.file == f"maze2d/maze2d-{size}-sparse-v1.hdf5" and task.size is task.sha256 is None
    assert data.make_env(task).get_wrapper_attr("_max_episode_steps") == limit


@pytest.mark.parametrize("name", ANTS)
def test_antmaze_in_the_table(name):
    task = data.get_task(f"antmaze-{name}-v2")
    limit = 700 if "umaze" in name else 1_000
    assert (task.obs_dim, task.act_dim, task.limit, task.score(0.35)) == (29, 8, limit, pytest.approx(35))
    assert data.make_env(task).get_wrapper_attr("_max_episode_steps") == limit
    plan = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[name.split("-")[0]]
    many_starts, many_goals = name != "umaze", "diverse" in name
    which = f"{plan}_noisy_multistart_{many_starts}_multigoal_{many_goals}"
    assert task.file == f"ant_maze_v2/Ant_maze_{which}_sparse_fixed.hdf5"
    assert (task.sha256 is None) == (task.size is None) == (name == "medium-play")
    assert task.size is None or 230e6 < task.size < 233e6


@pytest.mark.parametrize("size", SIZES)
def test_maps_are_the_packaged_ones(size):
    ball, ant = envs.Maze2D(size), envs.AntMaze(size)
    assert np.array_equal(ball.walls, np.array(MAPS[size]) == 1) and np.array_equal(ant.walls, ball.walls)


def test_building_is_quiet_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("maze2d-large-v1", "antmaze-large-play-v2"):
        env = data.make_env(data.get_task(name))
        env.reset(seed=0)
        env.step(env.action_space.sample())
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["maze2d-medium-v1", "antmaze-medium-play-v2"])
def test_seed_and_actions_fix_an_episode(name):
    """Also in an environment that has played before, and with its draws in between."""
    task = data.get_task(name)
    fresh, used = data.make_env(task), data.make_env(task)
    actions = held_actions(np.random.default_rng(0), 40, task.act_dim, 4)
    used.reset(seed=1)
    for action in actions[::-1]:
        used.step(action)
    used.reset()
    paths, goals = [], []
    for env in (fresh, used):
        first, _ = env.reset(seed=7)
        paths.append(np.stack([first, *(env.step(a)[0] for a in actions)]))
        goals.append(env.unwrapped.goal)
    assert np.array_equal(*paths) and np.array_equal(*goals)
    assert not np.array_equal(fresh.reset(seed=8)[0], paths[0][0])


@pytest.mark.parametrize("name", ["maze2d-umaze-v1", "antmaze-umaze-v2"])
def test_an_interrupted_episode_goes_on_exactly(name):
    task = data.get_task(name)
    actions = torch.from_numpy(held_actions(np.random.default_rng(1), 30, task.act_dim, 3))
    cpu = torch.device("cpu")

    def play(interaction: data.Interaction, first: int, last: int) -> None:
        for i in range(first, last):
            interaction.step(lambda _, i=i: actions[i][None])

    whole, first, second = (ReplayBuffer(30, task.obs_dim, task.act_dim, cpu) for _ in range(3))
    play(data.Interaction(data.make_env(task), whole, 3), 0, 30)
    stopped = data.Interaction(data.make_env(task), first, 3)
    play(stopped, 0, 17)
    second.load_state_dict(first.state_dict())
    resumed = data.Interaction(data.make_env(task), second, 3)
    resumed.load_state_dict(stopped.state_dict())
    play(resumed, 17, 30)
    assert torch.equal(second.table, whole.table)


# ---- Maze2D ----


def ball_at(size: str, x: float, y: float, vx: float = 0.0, vy: float = 0.0) -> envs.Maze2D:
    """The ball's environment after a reset, with the ball put somewhere."""
    env = envs.Maze2D(size)
    env.reset(seed=0)
    env.set_state(np.array([x, y]), np.array([vx, vy]))
    return env


@pytest.mark.parametrize("size", SIZES)
def test_the_ball_moves_like_the_packaged_one(size, tmp_path, monkeypatch):
    """Same states, same actions, same successors, through the map of coordinates; 2,000 steps with many bumps."""
    theirs = packaged("PointMaze_UMaze-v3", tmp_path, monkeypatch, maze_map=MAPS[size])
    point, (rows, columns) = theirs.unwrapped.point_env, np.array(MAPS[size]).shape
    ours, rng = envs.Maze2D(size), np.random.default_rng(2)
    error = bumps = fast = 0.0
    for seed in range(5):
        (x, y, vx, vy), _ = ours.reset(seed=seed)
        point.set_state(np.array([y + 0.7 - columns / 2, rows / 2 - 0.7 - x]), np.array([vy, -vx]))
        for ax, ay in held_actions(rng, 400, 2, 40):
            obs, *_ = ours.step(np.array([ax, ay]))
            theirs_obs, *_ = point.step(np.array([ay, -ax]))
            right, up, v_right, v_up = theirs_obs
            expected = [rows / 2 - up - 0.7, right + columns / 2 - 0.7, -v_up, v_right]
            error = max(error, np.abs(obs - expected).max())
            bumps += ours.data.ncon > 0
            fast += np.abs(obs[2:]).max() > 5
    assert error < 1e-6 and bumps > 100 and fast > 20, (error, bumps, fast)


def test_velocities_of_a_push_by_hand():
    """Mass 4/3 π 0.1³ 1000 kg, force 100 N, damping 1, implicit Euler of 0.01 s, speed cut to 5 before each step."""
    env, mass, y, v = ball_at("large", 1, 1), 4 / 3 * np.pi, 1.0, 0.0
    for _ in range(40):
        obs, *_ = env.step(np.array([0.0, 1.0]))
        v = (mass * min(v, 5.0) + 0.01 * 100) / (mass + 0.01 * 1)
        y += 0.01 * v
        assert obs == pytest.approx([1, y, 0, v], abs=1e-9)
    assert v == pytest.approx((5 * mass + 1) / (mass + 0.01)) and y > 2  # 5.23, the largest there is
    obs, *_ = ball_at("large", 1, 1).step(np.array([0.0, 3.0]))  # an action beyond 1 is 1
    assert obs[3] == pytest.approx(1 / (mass + 0.01))


def test_walls_stop_the_ball_where_d4rl_has_them():
    """In umaze's first corridor, 0.9 wide for its centre's sake: faces at x 0.3 and 1.3, y 0.3 and 3.3, radius 0.1."""
    for push, axis, face in (((0, 1), 1, 3.2), ((0, -1), 1, 0.4), ((-1, 0), 0, 0.4), ((1, 0), 0, 1.2)):
        env = ball_at("umaze", 1, 1)
        for _ in range(300):
            obs, *_ = env.step(np.array(push, float))
        assert obs[axis] == pytest.approx(face, abs=0.02) and obs[1 - axis] == pytest.approx(1, abs=1e-6)
        assert np.abs(obs[2:]).max() < 1e-3


def test_a_straight_line_policy_drives_through_the_corridor_to_the_goal():
    """From (1, 3) to the goal (1, 1) and brake there: a step within 0.5 pays 1, so about 300 less the way."""
    env = gym.wrappers.TimeLimit(envs.Maze2D("umaze"), 300)
    obs, _ = env.reset(seed=0)
    obs = np.array([1.0, 3.0, 0.0, 0.0])
    env.unwrapped.set_state(obs[:2], obs[2:])
    rewards, positions = [], []
    while True:
        action = np.clip(10 * (np.array([1, 1]) - obs[:2]) - obs[2:], -1, 1)
        obs, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        positions.append(obs[:2])
        assert not terminated
        if truncated:
            break
    assert len(rewards) == 300
    by_hand = [float(np.hypot(x - 1, y - 1) <= 0.5) for x, y in positions]
    assert rewards == by_hand and 200 < sum(rewards) < 280


@pytest.mark.parametrize(("y", "pays"), [(1.5, 1.0), (1.5001, 0.0), (0.5, 1.0), (2.0, 0.0)])
def test_a_step_pays_within_half_a_metre(y, pays):
    obs, reward, terminated, truncated, _ = ball_at("umaze", 1, y).step(np.zeros(2))
    assert obs == pytest.approx([1, y, 0, 0], abs=1e-12)
    assert (reward, terminated, truncated) == (pays, False, False)


@pytest.mark.parametrize(("size", "goal", "free"), [("umaze", (1, 1), 7), ("medium", (6, 6), 26),
                                                    ("large", (7, 9), 46)])  # fmt: skip
def test_starts_are_all_free_cells_and_the_goal_stays(size, goal, free):
    env = envs.Maze2D(size)
    starts = np.stack([env.reset(seed=seed)[0] for seed in range(600)])
    cells = np.round(starts[:, :2]).astype(int)
    assert (np.array(MAPS[size])[cells[:, 0], cells[:, 1]] == 0).all()
    assert len(np.unique(cells, axis=0)) == free and tuple(env.goal) == goal
    counts = np.unique(cells, axis=0, return_counts=True)[1]
    chi2 = ((counts - 600 / free) ** 2 / (600 / free)).sum()
    assert chi2 < 2 * free  # uniform draws: about free - 1
    off = starts[:, :2] - cells
    assert np.abs(off).max() < 0.1 and off.std() == pytest.approx(0.1 / 3**0.5, rel=0.1)
    assert starts[:, 2:].std() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(("size", "rounds", "tolerance"), [("umaze", 8, 13), ("medium", 2, 18)])
def test_a_random_policy_gets_about_d4rls_reference_return(size, rounds, tolerance):
    """`rounds` episodes from every free cell.

    Returns spread by twice their mean and more (it matters whether the start is near the goal), and D4RL's reference
    is itself a mean over some episodes: the tolerance is two to three standard errors. In the large maze it would tell
    nothing.
    """
    task, rng = data.get_task(f"maze2d-{size}-v1"), np.random.default_rng(0)
    env, returns = data.make_env(task), []
    for cell in np.argwhere(np.array(MAPS[size]) == 0).repeat(rounds, axis=0):
        env.reset(seed=0)
        env.unwrapped.set_state(cell + rng.uniform(-0.1, 0.1, 2), 0.1 * rng.standard_normal(2))
        returns.append(sum(env.step(action)[1] for action in rng.uniform(-1, 1, (task.limit, 2))))
    assert np.mean(returns) == pytest.approx(task.ref_min, abs=tolerance)
    assert abs(task.score(np.mean(returns))) < 8


@pytest.mark.parametrize(
    ("size", "replanning", "lazy"), [("umaze", 225, 161.86), ("medium", 429, 277.39), ("large", 554, 273.99)]
)
def test_the_controller_returns_what_d4rls_does(size, replanning, lazy):
    """D4RL's highest returns are those of a controller that never plans again, since its goal never changes.

    The other figures are means of another implementation's 100 episodes; D4RL's own number of episodes is not known.
    Three standard errors of the difference.
    """
    task, rng = data.get_task(f"maze2d-{size}-v1"), np.random.default_rng(0)
    assert task.ref_max == lazy
    env = data.make_env(task)
    maze = env.unwrapped

    def returns(episodes: int, again: bool) -> np.ndarray:
        pilot, found = None, np.zeros(episodes)
        for i in range(episodes):
            obs, over = env.reset(seed=i)[0], False
            if pilot is None or again:
                pilot = collect.Pilot(maze.walls, obs[:2], maze.goal, rng)
            while not over:
                obs, reward, _, over, _ = env.step(np.float32(pilot.act(obs)[0]))
                found[i] += reward
        return found

    for again, expected in ((True, replanning), (False, lazy)):
        got = returns(40, again)
        assert abs(got.mean() - expected) < 3 * got.std() * (1 / 40 + 1 / 100) ** 0.5


def test_the_simulator_repeats_maze2d_and_refuses_what_hides_its_goal():
    env, rng = data.make_env(data.get_task("maze2d-umaze-v1")), np.random.default_rng(0)
    rows = collect.rollout(env, lambda _: rng.uniform(-1, 1, 2), 1)
    columns = [rows[k] for k in ("observations", "actions", "next_observations", "rewards")]
    obs, actions, next_obs, rewards = columns
    again = judge.simulate(env, obs, actions)
    assert np.allclose(again[0], next_obs, atol=1e-4) and np.array_equal(again[1], rewards)
    for name in ("antmaze-umaze-v2", "frozenlake-4x4"):
        task = data.get_task(name)
        few = np.zeros((2, task.obs_dim), np.float32), np.zeros((2, task.act_dim), np.float32)
        assert judge.simulate(data.make_env(task), *few) is None


def test_training_on_maze2d(tmp_path):
    env, rng = data.make_env(data.get_task("maze2d-umaze-v1")), np.random.default_rng(0)
    parts = [collect.rollout(env, lambda _: rng.uniform(-1, 1, 2), seed) for seed in range(2)]
    files.write_d4rl(tmp_path / "rows.hdf5", collect.concatenate(parts, 600), {})
    args = tiny_args("iql", dataset=tmp_path / "rows.hdf5", out_dir=tmp_path)
    result = module("iql").train(replace(args, env="maze2d-umaze-v1"))
    assert (tmp_path / "iql" / "maze2d-umaze-v1@rows" / "seed0").is_dir()
    least, most = (100 * (x - 23.85) / (161.86 - 23.85) for x in (0, 300))
    assert least - 1e-3 <= result["final_score"] <= most + 1e-3


# ---- AntMaze ----


def test_the_ant_is_d4rls():
    """20 ms x 5, motors of 30 N m without gear, softer contacts; everything else is the stock ant's."""
    env = envs.AntMaze("umaze")
    ours, stock = env.model, gym.make("Ant-v5").unwrapped.model
    assert ours.opt.timestep * env.frames == pytest.approx(0.1) and ours.opt.timestep == 0.02
    assert ours.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 == stock.opt.integrator
    assert (ours.actuator_ctrlrange == [-30, 30]).all() and (ours.actuator_gear[:, 0] == 1).all()
    assert (ours.geom_solref == [0.02, 1]).all()
    assert (ours.geom_solimp[:, :3] == [0.8, 0.8, 0.01]).all()
    assert ours.nq == 15 and ours.nv == 14 and ours.ngeom == stock.ngeom + 18  # 18 wall cells
    for name in ("body_mass", "body_inertia", "dof_damping", "dof_armature", "jnt_range", "qpos0"):
        assert np.array_equal(getattr(ours, name), getattr(stock, name)), name
    for name in ("geom_size", "geom_friction", "geom_condim", "geom_margin"):
        bodies = ours.geom_bodyid > 0
        assert np.array_equal(getattr(ours, name)[bodies], getattr(stock, name)[stock.geom_bodyid > 0]), name


@pytest.mark.parametrize("size", ["umaze", "large"])
def test_the_ant_moves_like_the_packaged_one_with_d4rls_model(size, tmp_path, monkeypatch):
    """The packaged maze upside down with an XML edited as text: the same path, wall contacts included."""
    text = (Path(gym.__file__).parent / "envs/mujoco/assets/ant.xml").read_text()
    for old, new, times in (('timestep="0.01"', 'timestep="0.02"', 1),
                            ('ctrlrange="-1.0 1.0"', 'ctrlrange="-30 30"', 8), ('gear="150"', "", 8),
                            ('<geom conaffinity="0"', '<geom solref=".02 1" solimp=".8 .8 .01" conaffinity="0"', 1),
                            ):  # fmt: skip
        assert text.count(old) == times
        text = text.replace(old, new)
    (tmp_path / "ant.xml").write_text(text)
    theirs = packaged("AntMaze_UMaze-v5", tmp_path, monkeypatch, xml_file=str(tmp_path / "ant.xml"),
                      maze_map=MAPS[size][::-1], include_cfrc_ext_in_observation=False)  # fmt: skip
    ant, ours = theirs.unwrapped.ant_env, envs.AntMaze(size)
    rows, columns = np.array(MAPS[size]).shape
    middle = np.array([1.5 * 4 - columns / 2 * 4, 1.5 * 4 - rows / 2 * 4])  # of D4RL's cell (1, 1), theirs
    obs, _ = ours.reset(seed=4)
    obs[:2] = -1.2, 0.3  # beside a wall
    shifted = np.concatenate([middle, np.zeros(27)])
    ours.set_state(obs[:15], obs[15:])
    ant.set_state((obs + shifted)[:15], obs[15:])
    touched = 0
    for action in held_actions(np.random.default_rng(3), 24, 8, 2):
        obs, *_ = ours.step(action)
        theirs_obs, *_ = ant.step(30 * action)
        assert np.allclose(obs, theirs_obs - shifted, atol=1e-5)
        touched += touches_wall(ours)
    assert touched > 0


def touches_wall(env: envs.AntMaze) -> bool:
    """Whether the ant touches something of the world other than the floor."""
    floor = env.model.geom("floor").id
    pairs = {tuple(sorted(env.data.contact[i].geom)) for i in range(env.data.ncon)}
    return any(min(env.model.geom_bodyid[list(p)]) == 0 and floor not in p for p in pairs)


@pytest.mark.parametrize("size", SIZES)
def test_walls_are_where_the_map_has_them(size):
    """The ant upright in the middle of every cell: cell (i, j) is at x = 4 (j - 1), y = 4 (i - 1)."""
    env = envs.AntMaze(size)
    env.reset(seed=0)
    for (i, j), wall in np.ndenumerate(MAPS[size]):
        qpos = np.concatenate([[4.0 * (j - 1), 4.0 * (i - 1), 0.75, 1], np.zeros(11)])
        env.set_state(qpos, np.zeros(14))
        assert touches_wall(env) == bool(wall), (i, j)
    for offset, wall in ((0.8, False), (1.8, True)):  # cell (1, 1): faces 2 m from the middle; torso 0.25
        qpos = np.concatenate([[-offset, 0, 0.75, 1], np.zeros(11)])
        env.set_state(qpos, np.zeros(14))
        assert touches_wall(env) == wall


@pytest.mark.parametrize("size", SIZES)
def test_starts_and_goals(size):
    """Start at (0, 0) ± 0.1; the goal's cell plus U(0, 1) + U(0, 0.5), mean 0.75, another at every reset."""
    env = envs.AntMaze(size)
    starts, goals = [], []
    for _ in range(400):
        starts.append(env.reset(seed=None if starts else 0)[0])
        goals.append(env.goal)
    starts, off = np.stack(starts), np.stack(goals) - ANT_GOALS[size]
    assert starts.shape == (400, 29) and len(np.unique(off, axis=0)) == 400
    assert off.min() >= 0 and off.max() <= 1.5 and off.max() > 1.3
    assert off.mean() == pytest.approx(0.75, abs=0.05)
    assert off.std() == pytest.approx(((1 + 0.25) / 12) ** 0.5, rel=0.1)
    assert starts.shape[1] == 29 and np.linalg.norm(starts[:, 3:7], axis=1) == pytest.approx(1)
    still = np.concatenate([[0, 0, 0.75], np.zeros(8)])
    noise = starts[:, [0, 1, 2, *range(7, 15)]] - still
    assert np.abs(noise).max() <= 0.1 and noise.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert starts[:, 15:].std() == pytest.approx(0.1, rel=0.05)


def test_reaching_the_goal_pays_once_and_ends_the_episode():
    """0.48 m away ends it, 0.55 m does not; a step at rest moves the ant by less than a centimetre."""
    env = envs.AntMaze("medium")
    for far, there in ((0.55, False), (0.48, True)):
        env.reset(seed=3)
        x, y = env.goal[0] + far, env.goal[1]
        env.set_state(np.concatenate([[x, y, 0.6, 1], np.zeros(11)]), np.zeros(14))
        obs, reward, terminated, truncated, _ = env.step(np.zeros(8))
        assert np.hypot(obs[0] - x, obs[1] - y) < 0.01
        assert (reward, terminated, truncated) == (float(there), there, False)


def test_nothing_but_the_limit_ends_an_episode_without_success():
    """An ant on its back, doing nothing, 700 steps."""
    env = data.make_env(data.get_task("antmaze-umaze-diverse-v2"))
    env.reset(seed=0)
    env.unwrapped.set_state(np.concatenate([[0, 0, 0.4, 0, 1], np.zeros(10)]), np.zeros(14))
    for step in range(1, 701):
        obs, reward, terminated, truncated, _ = env.step(np.zeros(8))
        assert reward == 0 and not terminated and truncated == (step == 700)
    assert abs(obs[4]) > 0.9  # still on its back


def test_observation_layout_and_scale_of_actions():
    env = envs.AntMaze("umaze")
    first, _ = env.reset(seed=0)
    state = env.data
    assert env.action_space == gym.spaces.Box(-1, 1, (8,), np.float32)
    action = np.array([0.5, -1, 0.25, 2, -0.1, 0, 1, -3])
    obs, *_ = env.step(action)
    names = ["hip_1", "ankle_1", "hip_2", "ankle_2", "hip_3", "ankle_3", "hip_4", "ankle_4"]
    expected = [*state.joint("root").qpos, *(state.joint(x).qpos[0] for x in names)]
    expected += [*state.joint("root").qvel, *(state.joint(x).qvel[0] for x in names)]
    assert np.array_equal(obs, expected) and not np.array_equal(first, obs)
    torque = [15, -30, 7.5, 30, -3, 0, 30, -30]
    assert state.ctrl == pytest.approx(torque) and state.actuator_force == pytest.approx(torque)
    motors = ["hip_4", "ankle_4", "hip_1", "ankle_1", "hip_2", "ankle_2", "hip_3", "ankle_3"]
    assert [state.joint(x).qfrc_actuator[0] for x in motors] == pytest.approx(torque)
