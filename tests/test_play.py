"""python -m common.tools.play: what a run's policy scores, here and elsewhere; its picture; refusals in one line."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import glfw
import gymnasium as gym
import imageio.v2
import numpy as np
import pytest
import torch
from conftest import HOPPER, ROOT, module, tiny_args
from gymnasium.envs.mujoco import mujoco_rendering

from common import data, envs, policy, run
from common.tools import play

NUMBER = r"(-?\d+\.\d)"
BETWEEN = rf"{NUMBER} \[{NUMBER}, {NUMBER}\]"


@pytest.fixture(scope="module")
def trained(random_rows, tmp_path_factory):
    """Trains algorithms/<stem>.py for a second, once: the run's directory."""
    folders = {}

    def get(stem: str) -> Path:
        if stem not in folders:
            out = tmp_path_factory.mktemp(stem)
            args = tiny_args(stem, dataset=random_rows, out_dir=out, eval_episodes=3, seed=5)
            module(stem).train(args)
            (folders[stem],) = (x.parent for x in out.glob(f"{stem}/*/*/final.json"))
        return folders[stem]

    return get


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """A finished run that a test may damage."""
    return Path(shutil.copytree(trained("iql"), tmp_path / "iql" / HOPPER / "seed5"))


@pytest.fixture
def cli(monkeypatch, capsys):
    """Calls the program as the command line does: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["play", *map(str, words)])
        capsys.readouterr()  # of training
        try:
            run.main(play.main, play.Args)
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A file that is read as the policy of a task which is that function."""

    def put(task: str, act) -> Path:
        known = data.get_task(task)
        about = {"task": task, "obs_dim": known.obs_dim, "act_dim": known.act_dim, "seed": 3}
        monkeypatch.setattr(policy, "load", lambda _: (act, about))
        (path := tmp_path / "any.pt2").touch()
        return path

    return put


class Renderer:
    """Stands for Gymnasium's, which needs OpenGL: its pictures are grey."""

    def __init__(self, model, state, camera=None, *_):
        self.model, self.data, self.camera = model, state, camera

    def render(self, mode: str) -> np.ndarray:
        assert mode == "rgb_array"
        return np.full((48, 64, 3), 99, np.uint8)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def renderers(monkeypatch):
    """The stand-ins that were made; the search for OpenGL finds some."""
    made = []

    def make(*args) -> Renderer:
        made.append(Renderer(*args))
        return made[-1]

    monkeypatch.setattr(mujoco_rendering, "MujocoRenderer", make)
    monkeypatch.setattr(
        play, "subprocess", SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=0))
    )
    monkeypatch.setenv("MUJOCO_GL", "egl")
    return made


# ---- scores ----


@pytest.mark.parametrize("stem", ["iql", "diffql"])
def test_play_repeats_the_runs_last_evaluation(stem, trained, cli):
    """Of a run whose policy is deterministic and of one whose policy draws; from its own episodes and seed."""
    folder = trained(stem)
    code, out, err = cli(folder)
    assert (code, err) == (0, "")
    found = re.fullmatch(
        rf"{HOPPER}, 3 episodes, seed 5: return {BETWEEN}, score {BETWEEN}, length (\d+)\n", out
    )
    result, low, high, score, *_ = (float(x) for x in found.groups())
    final = json.loads((folder / "final.json").read_text())["final_score"]
    task = data.get_task(HOPPER)
    assert score == pytest.approx(final, abs=0.06) and low <= result <= high
    assert task.score(result) == pytest.approx(final, abs=0.06)
    assert cli(folder, "--episodes", 3, "--seed", 5)[1] == out


def test_the_command_line_in_a_process_of_its_own(finished):
    """A file of another kind, of which PyTorch would say more."""
    shutil.copy(finished / "state.pt", finished / "policy.pt2")
    command = [sys.executable, "-m", "common.tools.play", finished, "--seed=9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: policy: got [^\n]+\n", done.stderr)


def test_interval_is_that_of_the_mean_over_episodes():
    """Of numbers whose mean is known; one number has no interval."""
    values = np.arange(100.0)
    mean, low, high = (
        float(x) for x in re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", play.with_interval(values)).groups()
    )
    assert mean == 49.5
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)
    assert play.with_interval(np.array([4.0])) == "4.0"


def test_elsewhere(finished, cli):
    """Another task of these sizes; its own reference returns; a policy's file plays alike, on 20 episodes."""
    code, out, _ = cli(finished, "--env", "hopper-friction-2.0")
    assert code == 0 and out.startswith("hopper-friction-2.0, 3 episodes, seed 5: ")
    words = ("--env", HOPPER, "--episodes", 2)
    assert cli(finished / "policy.pt2", *words)[1] == cli(finished, *words)[1]
    assert cli(finished / "policy.pt2")[1].startswith(f"{HOPPER}, 20 episodes, seed 5: ")
    code, out, err = cli(finished, "--env", "reacher-mini-v0")
    assert (code, out) == (2, "")
    got = "reacher-mini-v0 with 11 observations, 2 actions"
    assert err == f"error: --env: got {got}; allowed: 11 and 3, as the policy of {HOPPER} has\n"


def test_frozen_lake_is_computed_and_has_no_interval(stand_in, cli):
    """Always down, then right along the last row: of slip 0.1, what FrozenLake.exact says."""
    task = data.get_task("frozenlake-4x4-slip-0.1")
    choice = torch.eye(4)[[1, 0, 1, 0, 1, 0, 1, 0, 2, 1, 1, 0, 0, 2, 2, 0]]

    def act(obs: torch.Tensor) -> torch.Tensor:
        return choice[obs.argmax(1)]

    path = stand_in(task.name, act)
    success, length = task.make().exact(choice.numpy())
    assert 0.1 < success < 1
    told = f"return {success:.1f}, score {100 * success:.1f}, length {length:.0f}"
    assert cli(path) == (0, f"{task.name}, expectation over all episodes: {told}\n", "")
    code, out, err = cli(path, "--video", "out.mp4")
    assert (code, out) == (2, "") and err.startswith(
        f"error: --video: got {task.name}; allowed: a task of Mu"
    )


def test_a_policy_acts_in_the_box_of_a_minari_environment():
    """What it says reaches the environment, although envs.Flat takes [-1, 1]; elsewhere nothing is converted."""
    seen = []

    class Box(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        action_space = gym.spaces.Box(np.array([0.0, -3.0]), np.array([4.0, 1.0]), dtype=np.float64)

        def reset(self, **_) -> tuple[np.ndarray, dict]:
            return np.zeros(2), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            seen.append(action)
            return np.zeros(2), 0.0, True, False, {}

    wanted, env = torch.tensor([[3.0, -2.0]], requires_grad=True), envs.Flat(Box())
    act = play.actor(lambda obs: wanted + 0 * obs, env)
    env.step(act(torch.zeros(1, 2))[0].numpy())
    assert seen[0] == pytest.approx([3.0, -2.0])
    act = play.actor(lambda obs: wanted + 0 * obs, env.env)
    assert torch.equal(act(torch.zeros(1, 2)), wanted) and not act(torch.zeros(1, 2)).requires_grad


# ---- mistakes ----


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {  # what happens to a run -> the line's beginning
    "gone": (shutil.rmtree, "run: got .* a run, <out-dir>"),
    "no run": (lambda x: (x / "args.json").unlink(), "run: got .* a run, <out-dir>"),
    "unfinished": (lambda x: (x / "final.json").unlink(), "run: got unfinished .* or the policy.pt2 that it has"),
    "damaged final.json": (lambda x: cut(x / "final.json"), "run directory: got damaged .*final.json"),
    "damaged args.json": (lambda x: cut(x / "args.json"), "run directory: got damaged .*args.json"),
    "other args.json": (lambda x: (x / "args.json").write_text("{}"), "run: got no settings in "),
    "list": (lambda x: (x / "args.json").write_text("[]"), "run: got no settings in "),
    "older version": (lambda x: (x / "policy.pt2").unlink(), "run: got no policy.pt2 .* --overwrite"),
    "damaged policy": (lambda x: cut(x / "policy.pt2"), "policy: got "),
    "no policy": (lambda x: (x / "policy.pt2").write_text("hello"), "policy: got "),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_runs_are_refused_in_one_line(what, finished, cli, tmp_path):
    harm, line = BAD[what]
    harm(finished)
    code, out, err = cli(finished, "--video", tmp_path / "out.mp4")
    assert (code, out) == (2, "") and re.fullmatch(f"error: {line}[^\n]*\n", err)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--episodes", "0"], r"--episodes: got 0; allowed: \[1, inf\)"),
        (["--seed", "-1"], r"--seed: got -1; allowed: \[0, inf\)"),
        (["--env", "nowhere"], "--env: got nowhere; allowed: "),
        (["--video", "out.txt"], r"--video: got out.txt; allowed: a file that ends in .mp4"),
        (["--video", "out.mp4", "--human"], "--human: got --video too; allowed: one of them"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, line, finished, cli):
    code, out, err = cli(finished, *words)
    assert (code, out) == (2, "") and re.fullmatch(f"error: {line}[^\n]*\n", err)


def test_a_file_that_does_not_say_what_it_is_for(monkeypatch, cli, tmp_path):
    monkeypatch.setattr(policy, "load", lambda _: (None, {"task": HOPPER, "act_dim": 3, "seed": 0}))
    (path := tmp_path / "any.pt2").touch()
    code, out, err = cli(path)
    assert (code, out) == (2, "") and err.startswith(f"error: policy: got {path} without obs_dim; allowed: ")


def test_without_codec(finished, cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    code, out, err = cli(finished, "--video", tmp_path / "new" / "out.mp4")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(
        "error: --video: got no codec; allowed: where imageio-ffmpeg is installed: pip install "
    )
    assert not (tmp_path / "new").exists()


def test_without_opengl(finished, cli, monkeypatch, tmp_path):
    """PyOpenGL is told a platform that is neither EGL nor OSMesa, and there is no display."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "none")
    code, out, err = cli(finished, "--video", tmp_path / "new" / "out.mp4")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(
        "error: --video: got no OpenGL (egl, osmesa, glfw); allowed: where EGL or OSMesa works"
    )
    assert not (tmp_path / "new").exists()


def test_without_display(finished, cli, monkeypatch):
    monkeypatch.setattr(glfw, "init", lambda: False)
    code, out, err = cli(finished, "--human")
    assert (code, out) == (2, "") and err.startswith("error: --human: got no display; allowed: ")
    assert len(err.splitlines()) == 1


# ---- pictures ----


def test_a_video_is_written_whole_or_not_at_all(tmp_path):
    """Made-up pictures, read again; when the drawing fails half-way, the older file stays and nothing else is there."""
    path = tmp_path / "out.mp4"
    pictures = [np.full((48, 64, 3), 20 * i, np.uint8) for i in range(10)]
    play.write_video(pictures, 25.0, path)
    with imageio.v2.get_reader(path) as video:
        known, read = video.get_meta_data(), [x for x in video]
    assert known["fps"] == 25 and known["size"] == (64, 48) and len(read) == 10
    assert [x.mean() for x in read] == pytest.approx([20 * i for i in range(10)], abs=4)
    whole = path.read_bytes()

    def failing():
        yield from pictures
        raise RuntimeError("no more")

    for target in (path, tmp_path / "other.mp4"):
        with pytest.raises(RuntimeError, match="no more"):
            play.write_video(failing(), 25.0, target)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "every", "qpos"), [(HOPPER, 3, 6), ("reacher-mini-v0", 1, 4), ("maze2d-umaze-v1", 2, 2)]
)
def test_the_film_is_the_scored_episode(name, every, qpos, renderers):
    """Its states are those that the policy met, in their order, at the pace that the task has."""
    met, drawn = [], []
    task = replace(data.get_task(name), make=lambda: play.Film(data.get_task(name).make()))
    evaluator = data.Evaluator(task, 2, 0)

    def act(obs: torch.Tensor) -> torch.Tensor:
        met.append(evaluator.envs[0].unwrapped.data.qpos.copy())
        return torch.full((len(obs), task.act_dim), 0.3)

    _, lengths = evaluator.returns(act, play.CPU)
    film = evaluator.envs[0]
    assert len(film.states) == lengths[0] + 1
    for _ in play.draw(film, every, "rgb_array"):
        drawn.append(film.unwrapped.data.qpos.copy())
    steps = int(lengths[0])
    assert len(drawn) == steps // every + 1 and drawn[0].shape == (qpos,)
    assert np.array_equal(drawn[: len(met[:steps:every])], met[:steps:every])
    assert renderers and all(hasattr(x, "closed") == (x.data is film.unwrapped.data) for x in renderers)


def test_video_of_a_maze_from_above(renderers, stand_in, cli, tmp_path):
    """100 steps a second are 50 pictures; the camera is over the middle of the walls."""
    maze = stand_in("maze2d-large-v1", lambda obs: torch.full((len(obs), 2), 0.5))
    path = tmp_path / "new" / "out.mp4"
    code, out, err = cli(maze, "--episodes", 2, "--video", path)
    assert (code, err) == (0, "") and out.splitlines()[1].startswith(
        f"{path}: first episode, 800 steps, return "
    )
    with imageio.v2.get_reader(path) as video:
        assert video.get_meta_data()["fps"] == 50 and video.count_frames() == 401
    (renderer,) = renderers
    assert renderer.closed and renderer.camera["lookat"][:2] == pytest.approx([3.8, 5.3])


def test_the_camera_follows_the_ant():
    body = data.get_task("antmaze-umaze-v2").make().unwrapped
    assert body.model.body(play.maze_camera(body)["trackbodyid"]).name == "torso"


@pytest.mark.parametrize("closed", [None, "cross", "esc"])
def test_a_window_shows_all_until_it_is_closed(closed, monkeypatch):
    """In real time; after the cross is clicked, or Esc, nothing is drawn."""
    shown, slept = [], []
    window = object()

    def pictures():
        for i in range(10):
            shown.append(i)
            yield None

    monkeypatch.setattr(
        glfw, "get_current_context", lambda: None if closed == "esc" and len(shown) > 4 else window
    )
    monkeypatch.setattr(glfw, "window_should_close", lambda _: closed == "cross" and len(shown) > 4)
    monkeypatch.setattr(play.time, "sleep", slept.append)
    monkeypatch.setattr(play.time, "monotonic", lambda: 7.0)
    play.show(pictures(), 50.0)
    assert len(shown) == (5 if closed else 10)
    assert slept == pytest.approx([0.02 * (i + 1) for i in range(len(slept))])


# ---- refusals leave nothing behind ----


def test_nothing_is_written_into_a_run(finished, cli):
    before = {x: x.read_bytes() for x in finished.rglob("*") if x.is_file()}
    assert cli(finished, "--episodes", 2)[0] == 0
    assert {x: x.read_bytes() for x in finished.rglob("*") if x.is_file()} == before
