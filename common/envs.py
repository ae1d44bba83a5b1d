"""Environments that are D4RL's today: builders and wrappers, nothing else.

D4RL's locomotion tasks are gym's Hopper/HalfCheetah/Walker2d-v2 inside a wrapper that clips actions to the box. Their
equal today is Gymnasium's -v4 (same models, reward, termination, reset noise) with `ClipAction`: MuJoCo clamps the
control by itself, but the control cost is charged on what the agent sent. Never -v5: Walker2d's right foot and
Hopper's terminal reward changed there.

Adroit comes from gymnasium-robotics, which has the models, with D4RL's reward, end and time limit put back. Maze2D and
AntMaze are built here: the packaged ones have other coordinates, starts, goals, ends, and another ant.

`shift` is ODRL's change of dynamics, for the locomotion tasks.
"""

import contextlib
import io
import math
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np


@cache
def note(text: str) -> None:
    """A warning of MuJoCo on stderr, once; left to itself it writes MUJOCO_LOG.TXT where the user stands."""
    print(f"note: MuJoCo: {text}", file=sys.stderr)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, of Python or MuJoCo; afterwards MuJoCo's go to `note`."""
    previous = mujoco.get_mju_user_warning() or (lambda text: note(text.split(" Time =")[0]))
    mujoco.set_mju_user_warning(lambda _: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        mujoco.set_mju_user_warning(previous)


def locomotion(env_id: str) -> gym.Env:
    """`env_id` (a Gymnasium -v4 id) with actions clipped to the box; silent about being an old version."""
    with quiet():
        return gym.wrappers.ClipAction(gym.make(env_id))


def shift(env: gym.Env, kind: str, level: float | str) -> gym.Env:
    """`env`, made by `locomotion`, with ODRL's shifted dynamics; call once, before the first reset.  [ODRL]

    friction, gravity: factor `level`. kinematic: the range of the feet's joints x 0.8, 0.5, 0.2 for "easy", "medium",
    "hard". morphology: the torso becomes longer and thicker (Hopper, Walker2d) or shorter (HalfCheetah).
    """
    body = env.unwrapped
    model, robot = body.model, body.spec.id.split("-")[0]
    if hasattr(body, "shifted"):
        raise ValueError(f"shift: got {kind} {level} after {body.shifted}; allowed: one shift")
    body.shifted = f"{kind} {level}"
    if kind == "gravity":
        model.opt.gravity[2] *= level
    elif kind == "friction" and robot == "Hopper":
        model.geom_friction[1:, 0] *= level  # sliding; not the floor's 1, and a contact has the larger
    elif kind == "friction":
        model.geom_friction[:] *= level
    elif kind == "kinematic":
        feet = [j for j in range(model.njnt) if "foot" in model.joint(j).name]
        model.jnt_range[feet] *= {"easy": 0.8, "medium": 0.5, "hard": 0.2}[level]
    elif kind == "morphology":
        with quiet():
            new = mujoco.MjModel.from_xml_string(_other_torso(body.fullpath, robot, level))
        for into, of in ((model, new), (model.stat, new.stat)):  # into the model that the environment has
            for name in (x for x in dir(of) if x[0] != "_"):
                value = getattr(of, name)
                if isinstance(value, np.ndarray):
                    getattr(into, name)[...] = value
                elif isinstance(value, float):
                    setattr(into, name, value)
    else:
        raise ValueError(f"shift: got {kind}; allowed: friction, gravity, kinematic, morphology")
    return env


def shifted(make: Callable[[], gym.Env], kind: str, level: float | str) -> gym.Env:
    """What `make` builds, shifted."""
    return shift(make(), kind, level)


def _other_torso(path: str, robot: str, level: str) -> str:
    """The robot's XML at `path` with ODRL's torso of that level; lengths in metres."""
    xml, i = ET.parse(path).getroot(), ("easy", "medium", "hard").index(level)

    def put(tag: str, name: str, **values: str) -> None:
        xml.find(f".//{tag}[@name='{name}']").attrib.update(values)

    if robot == "HalfCheetah":
        half = (0.4, 0.25, 0.1)[i]  # of its length: 0.5 before
        put("geom", "torso", fromto=f"{-half} 0 0 {half} 0 0")
        put("geom", "head", pos=f"{half + 0.1} 0 0.1")
        put("body", "bthigh", pos=f"{-half} 0 0")
        put("body", "fthigh", pos=f"{half} 0 0")
    else:  # from the hip, 0.2 below the body's origin, up to `top`: 0.2 before, and a radius of 0.05
        top, radius = ((0.28, 0.075), (0.44, 0.1), (0.6, 0.125))[i]
        put("geom", "torso_geom", size=f"{radius} {(top + 0.2) / 2}", pos=f"0 0 {(top - 0.2) / 2}")
    return ET.tostring(xml, encoding="unicode")


class Adroit(gym.Wrapper):
    """D4RL's Adroit: the dense reward from the simulator's state after the step; pen ends when it is dropped.

    gymnasium-robotics 1.2.1 to 1.4.2 pay for staying away from the object (the sign of the first term is wrong), and
    none of its versions ends pen. `info["success"]` stays: D4RL's goal_achieved.
    """

    def __init__(self, env: gym.Env, task: str):
        super().__init__(env)
        self.reward = getattr(self, task)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, _, _, truncated, info = self.env.step(action)
        reward, terminated = self.reward()
        return obs, float(reward), bool(terminated), truncated, info

    def site(self, name: str) -> np.ndarray:
        """Position of a site, (3,) in metres."""
        return self.env.unwrapped.data.site(name).xpos

    @property
    def object(self) -> np.ndarray:
        """Position of the body to be moved, (3,) in metres."""
        return self.env.unwrapped.data.body("Object").xpos

    def door(self) -> tuple[float, bool]:
        state = self.env.unwrapped.data
        angle = state.joint("door_hinge").qpos[0]
        reward = -0.1 * math.dist(self.site("S_grasp"), self.site("S_handle")) - 0.1 * (angle - 1.57) ** 2
        reward -= 1e-5 * np.square(state.qvel).sum()
        return reward + 2 * (angle > 0.2) + 8 * (angle > 1.0) + 10 * (angle > 1.35), False

    def hammer(self) -> tuple[float, bool]:
        head, nail = self.site("tool"), self.site("S_target")
        left = math.dist(nail, self.site("nail_goal"))
        reward = -0.1 * math.dist(self.site("S_grasp"), self.object) - math.dist(head, nail) - 10 * left
        reward -= 0.01 * np.linalg.norm(self.env.unwrapped.data.qvel)
        lifted = self.object[2] > 0.04 and head[2] > 0.04
        return reward + 2 * lifted + 25 * (left < 0.02) + 75 * (left < 0.01), False

    def relocate(self) -> tuple[float, bool]:
        palm, target = self.site("S_grasp"), self.site("target")
        left = math.dist(self.object, target)
        reward = -0.1 * math.dist(palm, self.object)
        if self.object[2] > 0.04:
            reward += 1 - 0.5 * math.dist(palm, target) - 0.5 * left
        return reward + 10 * (left < 0.1) + 20 * (left < 0.05), False

    def pen(self) -> tuple[float, bool]:
        body = self.env.unwrapped
        left = math.dist(self.object, self.site("eps_ball"))
        axis = (self.site("object_top") - self.site("object_bottom")) / body.pen_length
        wanted = (self.site("target_top") - self.site("target_bottom")) / body.tar_length
        alike = axis @ wanted  # 1: parallel
        reward = -left + alike + 10 * (left < 0.075 and alike > 0.9) + 50 * (left < 0.075 and alike > 0.95)
        dropped = self.object[2] < 0.075
        return reward - 5 * dropped, dropped


def adroit(task: str, limit: int) -> gym.Env:
    """ "door", "hammer", "relocate" or "pen" with D4RL's time limit in steps."""
    with contextlib.redirect_stderr(io.StringIO()), quiet():  # a notice at import
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        ids = [f"AdroitHand{task.capitalize()}-{version}" for version in ("v2", "v1")]
        env = gym.make(next(x for x in ids if x in gym.registry), disable_env_checker=True).unwrapped
    return gym.wrappers.TimeLimit(Adroit(env, task), limit)


class FrozenLake(gym.Wrapper):
    """Gymnasium's FrozenLake-v1 as a task with vectors: position and move are one-hot in {-1, 1}.

    obs (S,), actions (4,) of which the largest is the move; `info["executed"]` is that move's own vector, the action to
    store. `slip` is the probability of going perpendicular to the move, half of it to each side; 1 for reaching
    the goal, 0 otherwise.
    """

    def __init__(self, size: str, limit: int, slip: float):
        super().__init__(gym.make("FrozenLake-v1", map_name=size, is_slippery=False, max_episode_steps=limit))
        body, self.limit = self.env.unwrapped, limit
        self.states = 2 * np.eye(body.observation_space.n, dtype=np.float32) - 1  # (S, S)
        self.moves = 2 * np.eye(4, dtype=np.float32) - 1
        self.observation_space = gym.spaces.Box(-1, 1, (len(self.states),), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
        sure = {s: {a: body.P[s][a][0] for a in range(4)} for s in body.P}  # (1.0, next, reward, over)
        for s, moves in sure.items():  # `success_rate` exists in newer versions only
            for a in moves:
                likely = ((a, 1 - slip), ((a - 1) % 4, slip / 2), ((a + 1) % 4, slip / 2))
                body.P[s][a] = [(p, *moves[b][1:]) for b, p in likely]

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        state, info = self.env.reset(**kwargs)
        return self.states[state], info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        move = int(np.argmax(action))
        state, reward, terminated, truncated, info = self.env.step(move)
        return self.states[state], float(reward), terminated, truncated, info | {"executed": self.moves[move]}

    def exact(self, actions: np.ndarray) -> tuple[float, float]:
        """Success probability and mean episode length of a policy, by dynamic programming.

        `actions` (S, 4), or K draws (K, S, 4) of a policy that draws at every visit: its chances are their shares.
        """
        table, moves = self.env.unwrapped.P, actions.reshape(-1, *actions.shape[-2:]).argmax(2)
        shares = np.eye(4)[moves].mean(0)  # (S, 4)
        n = len(self.states)
        step, reach = np.zeros((n, n)), np.zeros(n)  # to states that go on; reward of one step
        for s, move in zip(*shares.nonzero(), strict=True):
            for p, following, reward, over in table[s][move]:
                reach[s] += shares[s, move] * p * reward
                step[s, following] += shares[s, move] * p * (not over)
        here, success, length = np.zeros(n), 0.0, 0.0
        here[0] = 1.0  # both maps start in the corner
        for _ in range(self.limit):
            success, length = success + here @ reach, length + here.sum()
            here = here @ step
        return float(success), float(length)


class Flat(gym.Wrapper):
    """Any environment of boxes (or dicts of them) as the agents know it: obs (O,), actions (A,) in [-1, 1]."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.flatten_space(env.observation_space)
        box = env.action_space
        if not all(isinstance(x, gym.spaces.Box) for x in (box, self.observation_space)):
            raise TypeError(f"observations and actions must be boxes, got {env.observation_space}, {box}")
        if box.shape != box.low.ravel().shape or not box.is_bounded():
            raise TypeError(f"actions must be one bounded vector, got {box}")
        self.center, self.half = (box.high + box.low) / 2, (box.high - box.low) / 2
        self.action_space = gym.spaces.Box(-1, 1, box.shape, np.float32)

    def flatten(self, obs: np.ndarray | dict, space: gym.Space | None = None) -> np.ndarray:
        """Observations with any leading dimensions, (..., O); dicts in the order of their space."""
        space = space or self.env.observation_space
        if isinstance(space, gym.spaces.Dict):
            return np.concatenate([self.flatten(obs[k], space[k]) for k in space.spaces], axis=-1)
        return np.reshape(obs, (*np.shape(obs)[: np.ndim(obs) - len(space.shape)], -1))

    def inverse(self, actions: np.ndarray) -> np.ndarray:
        """The environment's actions (..., A) in the agents' units."""
        return (actions - self.center) / self.half

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        return self.flatten(obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        sent = self.center + self.half * np.clip(action, -1, 1)
        obs, reward, terminated, truncated, info = self.env.step(sent.astype(self.env.action_space.dtype))
        return self.flatten(obs), float(reward), terminated, truncated, info


def flat(make: Callable[..., gym.Env], **kwargs) -> gym.Env:
    """`make(**kwargs)` as vectors; silent about versions."""
    with quiet():
        return Flat(make(**kwargs))


MAZES = {  # D4RL's maps: rows of cells, 1 is wall
    "umaze": "11111 10001 11101 10001 11111",
    "medium": "11111111 10011001 10010001 11000111 10010001 10100101 10001001 11111111",
    "large": "111111111111 100001000001 101101010101 100000010001 101111011101 100101000001 110101010111 "
    "100100010001 111111111111",
}


class Maze(gym.Env):
    """D4RL's mazes: obs is qpos, qvel; the reward is 1 within 0.5 m of the goal after the step, else 0.

    Maze2D and AntMaze say how to start, where a cell is, what an action does. No rendering.
    """

    frames, ends = 1, False  # simulation steps per step; does the goal end the episode?

    def __init__(self, size: str, xml: ET.Element, goal: tuple[int, int], box: tuple[float, float, float]):
        """`goal`: its cell (row, column); `box`: half width, half height and centre's height of a wall, metres."""
        self.walls = np.array([list(row) for row in MAZES[size].split()]) == "1"  # (rows, columns)
        for cell in np.argwhere(self.walls):
            (x, y), (width, height, z) = self.place(cell), box
            geom = {"type": "box", "pos": f"{x} {y} {z}", "size": f"{width} {width} {height}"}
            ET.SubElement(xml.find("worldbody"), "geom", geom, contype="1", conaffinity="1")
        # the goal's place, to be seen and nothing else; not at 0, from where it could not be moved
        mark = {"type": "cylinder", "size": "0.5 0.01", "rgba": "0 1 0 0.5", "pos": "1 1 0"}
        ET.SubElement(xml.find("worldbody"), "site", mark, name="goal")
        self.model = mujoco.MjModel.from_xml_string(ET.tostring(xml, encoding="unicode"))
        self.data = mujoco.MjData(self.model)
        self.goal_cell = self.goal = self.place(np.array(goal))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.model.nq + self.model.nv,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (self.model.nu,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed, options=options)
        mujoco.mj_resetData(self.model, self.data)
        self.set_state(*self.start())
        return self.observe(), {}

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)
        mujoco.mj_forward(self.model, self.data)

    def observe(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.act(np.clip(action, -1, 1))
        mujoco.mj_step(self.model, self.data, nstep=self.frames)
        there = math.dist(self.data.qpos[:2], self.goal) <= 0.5
        return self.observe(), float(there), there and self.ends, False, {}


class Maze2D(Maze):
    """A ball pushed by a force, 100 Hz; the goal stays and the episode goes on. obs x, y, their velocities."""

    xml = """<mujoco><option timestep="0.01" gravity="0 0 0" iterations="20"/>
    <default><geom density="1000" margin="0.002" condim="1" friction="0.5 0.1 0.1"/></default>
    <worldbody><body><geom size="0.1"/><joint name="x" type="slide" axis="1 0 0" damping="1"/>
    <joint name="y" type="slide" axis="0 1 0" damping="1"/></body></worldbody>
    <actuator><motor joint="x" gear="100"/><motor joint="y" gear="100"/></actuator></mujoco>"""

    def __init__(self, size: str):
        goal = {"umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}[size]
        super().__init__(size, ET.fromstring(self.xml), goal, (0.5, 0.2, 0.0))
        self.goal = np.array(goal, float)  # like the start, 0.2 m off the middle of its cell on both axes

    def place(self, cell: np.ndarray) -> np.ndarray:
        return cell - 0.2

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        cells = np.argwhere(~self.walls)
        cell = cells[self.np_random.integers(len(cells))]
        return cell + self.np_random.uniform(-0.1, 0.1, 2), 0.1 * self.np_random.standard_normal(2)

    def act(self, action: np.ndarray) -> None:
        self.data.qvel[:] = self.data.qvel.clip(-5, 5)
        self.data.ctrl[:] = action


class AntMaze(Maze):
    """D4RL's ant, 10 Hz, torques of 30 N m; a new goal near the far cell at every reset, reaching it ends the episode.

    obs 29: x, y, z, quaternion, 8 joints, then velocities; the goal is not in it.
    """

    frames, ends = 5, True

    def __init__(self, size: str):
        xml = ET.parse(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / "ant.xml").getroot()
        xml.find("option").set("timestep", "0.02")
        xml.find("default/geom").attrib.update(solref=".02 1", solimp=".8 .8 .01")
        for motor in xml.iter("motor"):
            motor.attrib.update(ctrlrange="-30 30", gear="1")
        goal = {"umaze": (3, 1), "medium": (6, 6), "large": (7, 9)}[size]
        super().__init__(size, xml, goal, (2.0, 1.0, 1.0))

    def place(self, cell: np.ndarray) -> np.ndarray:
        return 4.0 * (cell[::-1] - 1)  # the ant starts in cell (1, 1), which is (0, 0)

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        draw, model = self.np_random, self.model
        self.goal = self.goal_cell + draw.uniform(0, 1, 2) + draw.uniform(0, 0.5, 2)
        return model.qpos0 + draw.uniform(-0.1, 0.1, model.nq), 0.1 * draw.standard_normal(model.nv)

    def act(self, action: np.ndarray) -> None:
        self.data.ctrl[:] = 30 * action


def maze(kind: type[Maze], size: str, limit: int) -> gym.Env:
    """Maze2D or AntMaze, "umaze", "medium" or "large", with D4RL's time limit in steps."""
    with quiet():
        return gym.wrappers.TimeLimit(kind(size), limit)


def episode_seed(seed: int, purpose: str, episode: int) -> int:
    """Reset seed of one episode; `purpose` ("online", "eval", ...) keeps the streams apart.

    A function of its arguments alone, so that a resumed run and an uninterrupted one see the same episodes.
    """
    return int(np.random.SeedSequence([seed, *purpose.encode(), episode]).generate_state(1)[0])
