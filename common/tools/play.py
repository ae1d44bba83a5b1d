"""Play a trained policy: its return and score over some episodes, a video of the first of them, or a window.

    python -m common.tools.play runs/iql/hopper-medium-v2/seed0          the run's own evaluation: its last score again
    python -m common.tools.play runs/iql/hopper-medium-v2/seed0 --episodes 20 --seed 7 --video hopper.mp4
    python -m common.tools.play runs/iql/hopper-medium-v2/seed0 --env hopper-friction-2.0          elsewhere
    python -m common.tools.play policy.pt2 --env hopper-medium-v2 --human

What is played is `policy.pt2`: of a finished run, or the file itself, which an unfinished run has from the end of its
offline phase on. Intervals are Student's 95% intervals of the mean over episodes; Frozen-Lake's mean is computed, of a
policy that draws from 32 draws per state. The picture is that of the first episode which is scored: the simulator's
states are kept, and Gymnasium's renderer draws them afterwards. `--video` needs the package imageio-ffmpeg and OpenGL,
for which EGL or OSMesa will do ($MUJOCO_GL chooses); `--human` needs a display.
"""

import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro

from common import data, envs, policy, run
from common.tools.report import mean_interval

CPU = torch.device("cpu")
SIZE = 480  # of a picture, pixels; Gymnasium's
MAX_FPS = 60  # pictures per second of simulation; an environment of smaller steps is drawn at every second, third...
STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)  # all that a simulation goes on from; its time comes first
TRY_OPENGL = """import mujoco, mujoco.{0}
context = mujoco.{0}.GLContext(64, 64)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_150)"""


@dataclass(frozen=True)
class Args:
    """The score of a trained policy, and what it looks like."""

    run: tyro.conf.Positional[Path]  # directory of a finished run, or a policy.pt2
    env: str = ""  # another task with as many observations and actions; default: the policy's own
    episodes: int | None = None  # default: as many as the run evaluated on; 20 for a policy.pt2
    seed: int | None = None  # of start states and of what the policy draws; default: the run's
    video: Path | None = None  # MP4 file for the first episode
    human: bool = False  # show the first episode in a window


# ---- the policy ----


def find(path: Path) -> tuple[Path, int]:
    """The policy's file and the number of episodes that its run evaluated on; UsageError if it is not finished."""
    if path.is_file():
        return path, 20
    ours = "a run of this version; --overwrite starts it anew"
    if not (path / "args.json").exists():
        raise run.UsageError("run", path, "a run, <out-dir>/<file>/<env>/seed<k>, or a policy.pt2")
    if not (path / "final.json").exists():
        allowed = "a finished run, or the policy.pt2 that it has from the end of its offline phase on"
        raise run.UsageError("run", f"unfinished {path}", allowed)
    run.read_json(path / "final.json")
    try:
        episodes = int(run.read_json(path / "args.json")["settings"]["eval_episodes"]["value"])
    except (KeyError, TypeError) as e:
        raise run.UsageError("run", f"no settings in {path / 'args.json'}", ours) from e
    if not (path / "policy.pt2").exists():
        raise run.UsageError("run", f"no policy.pt2 in {path}", ours)
    return path / "policy.pt2", episodes


def load(path: Path) -> tuple[Callable, dict]:
    """policy.load, and UsageError if the file does not say what is needed here."""
    module, about = policy.load(path)
    if lacking := {"task", "obs_dim", "act_dim", "seed"} - about.keys():
        got = f"{path} without {', '.join(lacking)}"
        raise run.UsageError("policy", got, "a file of this version's runs")
    return module, about


def actor(module: Callable, env: gym.Env) -> Callable[[torch.Tensor], torch.Tensor]:
    """The policy as the Evaluator calls it: obs (B, O) -> actions (B, A) in the units of `env`'s action space."""
    flat = env.has_wrapper_attr(
        "inverse"
    )  # envs.Flat: its [-1, 1] stands for the box that the policy acts in
    units = env.get_wrapper_attr("inverse") if flat else np.asarray

    @torch.no_grad()
    def act(obs: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(units(module(obs).numpy()), dtype=torch.float32)

    return act


def with_interval(values: Sequence[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.1f}" + (f" [{low:.1f}, {high:.1f}]" if len(values) > 1 else "")


# ---- the picture ----


class Film(gym.Wrapper):
    """Keeps the simulator's state after the reset and after each step of an episode."""

    def keep(self) -> np.ndarray:
        body = self.env.unwrapped
        state = np.empty(mujoco.mj_stateSize(body.model, STATE))
        mujoco.mj_getState(body.model, body.data, state, STATE)
        return state

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        result = self.env.reset(**kwargs)
        self.states = [self.keep()]
        return result

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        result = self.env.step(action)
        self.states.append(self.keep())
        return result


def check_window() -> None:
    """UsageError without a display."""
    import glfw

    warnings.simplefilter("ignore", glfw.GLFWError)  # no display here, later no window after Esc
    if not (glfw.init() and glfw.get_primary_monitor()):
        raise run.UsageError("--human", "no display", "a machine that has one, or --video FILE")


def check_video(path: Path) -> None:
    """UsageError unless `path` can be a video, and codec and OpenGL are there; sets $MUJOCO_GL."""
    if path.suffix != ".mp4" or path.is_dir():
        raise run.UsageError("--video", path, "a file that ends in .mp4")
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as e:
        allowed = "where imageio-ffmpeg is installed: pip install 'imageio[ffmpeg]', or uv sync --extra video"
        raise run.UsageError("--video", "no codec", allowed) from e
    names = [os.environ["MUJOCO_GL"]] if os.environ.get("MUJOCO_GL") else ["egl", "osmesa", "glfw"]
    for (
        name
    ) in names:  # in another process: drivers may crash, and PyOpenGL stays with what it is given first
        attempt = [sys.executable, "-c", TRY_OPENGL.format(name)]
        if subprocess.run(attempt, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            break
    else:
        allowed = "where EGL or OSMesa works (Debian, Ubuntu: apt install libegl1 libgl1, or libosmesa6)"
        raise run.UsageError("--video", f"no OpenGL ({', '.join(names)})", allowed)
    path.parent.mkdir(parents=True, exist_ok=True)


def maze_camera(body: envs.Maze) -> dict:
    """All of Maze2D from above, its map's rows going down; the ant from behind and above."""
    if isinstance(body, envs.AntMaze):
        follow = dict(type=mujoco.mjtCamera.mjCAMERA_TRACKING, trackbodyid=body.model.body("torso").id)
        return follow | dict(distance=14.0, elevation=-55.0, azimuth=90.0)
    walls = body.model.geom_pos[body.model.geom_bodyid == 0]
    high = 1.3 * (np.ptp(walls, axis=0).max() + 1)
    return dict(lookat=(walls.min(0) + walls.max(0)) / 2, distance=high, elevation=-90.0, azimuth=180.0)


def draw(film: Film, every: int, mode: str) -> Iterator[np.ndarray | None]:
    """The pictures of every so manieth state; None in "human" mode, which draws into a window."""
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    body, maze = film.unwrapped, isinstance(film.unwrapped, envs.Maze)
    renderer = getattr(body, "mujoco_renderer", None)
    if renderer is None:
        renderer = MujocoRenderer(body.model, body.data, maze_camera(body) if maze else None, SIZE, SIZE)
    if maze:
        body.model.geom_rgba[body.model.geom_bodyid > 0] = (1.0, 0.4, 0.1, 1.0)  # not the walls' colour
        body.model.site("goal").pos[:2] = body.goal
    try:
        for state in film.states[::every]:
            mujoco.mj_setState(body.model, body.data, state, STATE)
            mujoco.mj_forward(body.model, body.data)
            yield renderer.render(mode)
    finally:
        renderer.close()


def write_video(pictures: Iterable[np.ndarray], fps: float, path: Path) -> None:
    """MP4 at `path`, whole or not at all."""
    import imageio.v2

    with imageio.v2.get_writer("<bytes>", format=".mp4", fps=fps) as writer:
        for picture in pictures:
            writer.append_data(picture)
    run.write_atomically(writer.request.get_result(), path)


def show(pictures: Iterable[None], fps: float) -> None:
    """In real time, until the episode is over or the window is closed."""
    import glfw

    due = time.monotonic()
    for _ in pictures:
        window = glfw.get_current_context()  # without one, after Esc, the viewer would draw all the same
        if not window or glfw.window_should_close(window):
            break
        due += 1 / fps
        time.sleep(max(due - time.monotonic(), 0.0))


# ---- program ----


def main(args: Args) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    path, episodes = find(args.run)
    module, about = load(path)
    episodes = episodes if args.episodes is None else args.episodes
    seed = about["seed"] if args.seed is None else args.seed
    for name, value, least in (("--episodes", episodes, 1), ("--seed", seed, 0)):
        if value < least:
            raise run.UsageError(name, value, f"[{least}, inf)")
    task = data.get_task(args.env or about["task"])
    if (about["obs_dim"], about["act_dim"]) != (task.obs_dim, task.act_dim):
        got = f"{task.name} with {task.obs_dim} observations, {task.act_dim} actions"
        allowed = f"{about['obs_dim']} and {about['act_dim']}, as the policy of {about['task']} has"
        raise run.UsageError("--env", got, allowed)
    env, shown = data.make_env(task), bool(args.video or args.human)
    if args.video and args.human:
        raise run.UsageError("--human", "--video too", "one of them")
    if shown and not isinstance(getattr(env.unwrapped, "model", None), mujoco.MjModel):
        allowed = "a task of MuJoCo: others have no picture here"
        raise run.UsageError("--video" if args.video else "--human", task.name, allowed)
    if args.human:
        check_window()
    if args.video:
        check_video(args.video)

    make = (lambda: Film(task.make())) if shown else task.make
    evaluator = data.Evaluator(replace(task, make=make), episodes, seed)
    returns, lengths = evaluator.returns(actor(module, env), CPU)
    counted = f"{episodes} episode{'s'[: episodes > 1]}, seed {seed}"
    counted = "expectation over all episodes" if env.has_wrapper_attr("exact") else counted
    scores = [task.score(x) for x in returns]
    told = f"return {with_interval(returns)}, score {with_interval(scores)}, length {lengths.mean():.0f}"
    print(f"{task.name}, {counted}: {told}", flush=True)
    if not shown:
        return
    film = evaluator.envs[0]
    step = film.states[1][0] - film.states[0][0]  # seconds
    every = math.ceil(1 / (step * MAX_FPS) - 1e-6)
    pictures = draw(film, every, "human" if args.human else "rgb_array")
    if args.human:
        show(pictures, 1 / (step * every))
    else:
        write_video(pictures, 1 / (step * every), args.video)
        print(f"{args.video}: first episode, {lengths[0]:.0f} steps, return {returns[0]:.1f}")


if __name__ == "__main__":
    run.main(main, Args)
