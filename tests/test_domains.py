"""Every algorithm on one task of each domain, with the presets of `--env` alone and tiny sizes; some compiled."""

import math
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import FILES, TINY, log_rows, module, tiny_args

from common import data, run
from common.files import write_d4rl
from common.tools import collect

TASKS = {  # what of the task a run must have met: obs, act
    "door-human-v1": (39, 28),
    "maze2d-umaze-v1": (4, 2),
    "antmaze-umaze-v2": (29, 8),
    "walker2d-medium-v2-gravity-2.0": (17, 6),
    "frozenlake-4x4": (16, 4),
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """600 rows of random actions in each task's environment, episodes of at most 60, some of them with a reward."""
    folder, paths = tmp_path_factory.mktemp("domains"), {}
    for name, (_, act_dim) in TASKS.items():
        env, rng, parts = data.make_env(data.get_task(name)), np.random.default_rng(0), []
        while sum(len(x["rewards"]) for x in parts) < 600:
            part = collect.rollout(env, lambda _, n=act_dim, rng=rng: rng.uniform(-1, 1, n), len(parts), 60)
            if "maze" in name and len(parts) % 3 == 0:  # random ants and balls reach no goal
                part["rewards"][-1] = 1
                part["terminals"][-1] = name.startswith("antmaze")
                part["timeouts"][-1] = not part["terminals"][-1]
            parts.append(part)
        paths[name] = folder / f"{name}.hdf5"
        write_d4rl(paths[name], collect.concatenate(parts, 600), {})
    return paths


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("stem", FILES)
def test_every_file_trains_on_every_domain(stem, name, files, tmp_path, monkeypatch):
    """30 steps offline, 30 online; finite scores. Episodes of 100 steps: the ant's 700 would be most of the time."""
    algorithm, make = module(stem), data.make_env
    monkeypatch.setattr(data, "make_env", lambda *x: gym.wrappers.TimeLimit(make(*x), 100))
    tiny = vars(tiny_args(stem))  # without sizes that have no effect
    known = {k: v for k, v in TINY.items() if tiny.get(k) == v}
    sizes = dict(
        offline_steps=30, online_steps=30, warmup_steps=10, eval_every=30, eval_episodes=1, utd=tiny["utd"]
    )
    sizes |= {k: 10 for k in ("regenerate_every", "laplace_every") if k in known}
    args = run.with_presets(algorithm.Args, algorithm.ENV_PRESETS, name, **known | sizes, dataset=files[name],
                            out_dir=tmp_path)  # fmt: skip
    result = algorithm.train(args)
    assert all(math.isfinite(v) for v in result.values())
    assert (tmp_path / stem / f"{name}@{name}" / "seed0" / "final.json").exists()


@pytest.mark.parametrize("stem", ["iql_dare", "calql_ad2s", "calql_dual"])
def test_compiled_runs_go_through_every_phase(stem, dataset, tmp_path, monkeypatch):
    """--compile, which is the default on a GPU; random numbers drawn inside compiled losses are others than plain.

    DUAL's many losses without C++ code, which takes g++ a minute and a half: traced, differentiated, functionalised.
    """
    if stem == "calql_dual":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = {}
    for on in (False, True):
        args = tiny_args(stem, dataset=dataset, out_dir=tmp_path / str(on), compile=on)
        results[on] = module(stem).train(args)
        last = [r for r in log_rows(tmp_path / str(on)) if r["phase"] == "online" and not r["eval/score"]][-1]
        losses = [float(v) for k, v in last.items() if k.startswith("loss/") and v]
        assert losses and all(map(math.isfinite, losses))
    assert results[True].keys() == results[False].keys()
    if stem != "calql_dual":  # its planner comes first
        assert results[True]["offline_score"] == pytest.approx(results[False]["offline_score"], abs=0.05)
