"""Shifted dynamics are ODRL's: every edit read back, masses by hand, everything else as it was, names, one file."""

import io
from contextlib import redirect_stdout
from dataclasses import replace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from conftest import module, tiny_args

from common import data, envs, run
from common.run import UsageError

ROBOTS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
LEVELS = ("easy", "medium", "hard")
TORSO = {"easy": (0.48, 0.075), "medium": (0.64, 0.1), "hard": (0.8, 0.125)}  # length of the cylinder, radius


def built(robot: str, kind: str | None = None, level: float | str = 1.0) -> gym.Env:
    env = envs.locomotion(ROBOTS[robot])
    return envs.shift(env, kind, level) if kind else env


def arrays(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Copies of every array of a model, and of its options and statistics."""
    parts = {"": model, "opt.": model.opt, "stat.": model.stat}
    named = {f"{k}{x}": getattr(part, x) for k, part in parts.items() for x in dir(part) if x[0] != "_"}
    return {k: np.array(v) for k, v in named.items() if isinstance(v, np.ndarray | float)}


def changed(robot: str, kind: str, level: float | str) -> set[str]:
    """Names of the arrays in which a shifted model differs from the stock one."""
    before, after = (arrays(x.unwrapped.model) for x in (built(robot), built(robot, kind, level)))
    assert before.keys() == after.keys()
    return {k for k in before if not np.array_equal(before[k], after[k])}


def capsule(radius: float, length: float) -> tuple[float, float, float]:
    """Mass, inertia across and along of a solid capsule of density 1000: cylinder and two half balls."""
    tube, ball = 1000 * np.pi * radius**2 * length, 1000 * np.pi * radius**3 * 4 / 3
    across = tube * (3 * radius**2 + length**2) / 12
    across += ball * (2 / 5 * radius**2 + length**2 / 4 + 3 / 8 * length * radius)
    return tube + ball, across, tube * radius**2 / 2 + 2 / 5 * ball * radius**2


# ---- the edits ----


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 5.0])
def test_gravity(factor):
    for robot in ROBOTS:
        model = built(robot, "gravity", factor).unwrapped.model
        assert model.opt.gravity == pytest.approx([0, 0, -9.81 * factor])
        assert changed(robot, "gravity", factor) == {"opt.gravity"}


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 5.0])
def test_friction(factor):
    """All geoms and coefficients of HalfCheetah and Walker2d; sliding, without the floor, of Hopper."""
    assert all(changed(robot, "friction", factor) == {"geom_friction"} for robot in ROBOTS)
    hopper, cheetah, walker = (built(robot, "friction", factor).unwrapped.model for robot in ROBOTS)
    assert cheetah.geom_friction == pytest.approx(np.tile([0.4, 0.1, 0.1], (9, 1)) * factor)
    by_hand = {"floor": 0.7, "torso_geom": 0.9, "foot_geom": 0.9, "foot_left_geom": 1.9, "leg_left_geom": 0.9}
    for name, sliding in by_hand.items():
        assert walker.geom(name).friction == pytest.approx(np.array([sliding, 0.1, 0.1]) * factor)
    by_hand = {"torso_geom": 0.9, "thigh_geom": 0.9, "leg_geom": 0.9, "foot_geom": 2.0}
    for name, sliding in by_hand.items():
        assert hopper.geom(name).friction == pytest.approx([sliding * factor, 0.005, 0.0001])
    assert hopper.geom("floor").friction == pytest.approx([1, 0.005, 0.0001])


@pytest.mark.parametrize(("level", "factor"), [("easy", 0.8), ("medium", 0.5), ("hard", 0.2)])
def test_kinematic(level, factor):
    """The range of the feet's joints, in radians; the other joints keep theirs."""
    assert all(changed(robot, "kinematic", level) == {"jnt_range"} for robot in ROBOTS)
    right = np.pi / 4
    feet = {"hopper": {"foot_joint": (-right, right)},
            "walker2d": {"foot_joint": (-right, right), "foot_left_joint": (-right, right)},
            "halfcheetah": {"bfoot": (-0.4, 0.785), "ffoot": (-0.5, 0.5)}}  # fmt: skip
    for robot, joints in feet.items():
        stock, model = built(robot).unwrapped.model, built(robot, "kinematic", level).unwrapped.model
        for j in range(model.njnt):
            name = model.joint(j).name
            expected = np.array(joints[name]) * factor if name in joints else stock.joint(j).range
            assert model.joint(j).range == pytest.approx(expected), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("robot", "others"), [("hopper", 12.155), ("walker2d", 20.012)])
def test_morphology_of_hopper_and_walker(robot, others, level):
    """A torso from the hip up to 1.53, 1.69, 1.85 m; mass and inertia of a solid capsule; total mass with it."""
    length, radius = TORSO[level]
    mass, across, along = capsule(radius, length)
    model = built(robot, "morphology", level).unwrapped.model
    torso = model.body("torso")
    assert model.geom("torso_geom").size[:2] == pytest.approx([radius, length / 2])
    assert model.geom("torso_geom").pos == pytest.approx([0, 0, (length - 0.4) / 2]) == torso.ipos
    assert 1.25 + model.geom("torso_geom").pos[2] + length / 2 == pytest.approx(1.05 + length)
    assert torso.mass[0] == pytest.approx(mass) and torso.inertia == pytest.approx([across, across, along])
    assert model.body_mass.sum() == pytest.approx(others + mass, abs=2e-3)
    assert model.body_subtreemass[1] == pytest.approx(model.body_mass.sum())


def test_masses_of_the_reference_by_number():
    """Torso 3.665 -> 24.295 kg with inertia (1.2828, 1.2828, .1173); totals 44.307 and 36.450."""
    assert capsule(0.05, 0.4) == pytest.approx((3.665, 0.0692, 0.00445), rel=1e-3)
    for robot, before, after in (("walker2d", 23.677, 44.307), ("hopper", 15.820, 36.450)):
        stock, model = built(robot).unwrapped.model, built(robot, "morphology", "medium").unwrapped.model
        assert stock.body("torso").mass[0] == pytest.approx(3.665, abs=1e-3)
        assert stock.body_mass.sum() == pytest.approx(before, abs=1e-3)
        assert model.body("torso").mass[0] == pytest.approx(24.295, abs=1e-3)
        assert model.body("torso").inertia == pytest.approx([1.2828, 1.2828, 0.1173], abs=1e-4)
        assert model.body_mass.sum() == pytest.approx(after, abs=1e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("robot", ["hopper", "walker2d"])
def test_morphology_is_what_mujoco_derives_from_the_new_torso(robot, level):
    """The same model by another way: geometry, mass and inertia written by hand, the rest by mj_setConst."""
    length, radius = TORSO[level]
    mass, across, along = capsule(radius, length)
    by_hand, model = built(robot).unwrapped.model, built(robot, "morphology", level).unwrapped.model
    geom, body = by_hand.geom("torso_geom"), by_hand.body("torso")
    geom.size[:2], geom.pos[2], body.ipos[2] = (radius, length / 2), length / 2 - 0.2, length / 2 - 0.2
    geom.rbound[0] = radius + length / 2
    by_hand.geom_aabb[geom.id, 3:] = radius, radius, radius + length / 2
    body.mass[0], body.inertia[:] = mass, (across, across, along)
    mujoco.mj_setConst(by_hand, mujoco.MjData(by_hand))
    expected, found = arrays(by_hand), arrays(model)
    stock = built(robot).unwrapped.model
    compiled = arrays(stock)
    mujoco.mj_setConst(stock, mujoco.MjData(stock))
    for name, again in arrays(stock).items():
        alike = np.allclose(compiled[name], again, rtol=1e-9, atol=1e-12)
        # older compilers have an actuator_acc0 of their own, shifted or not
        assert alike or mujoco.__version__ < "4"
        if alike and name != "bvh_aabb" and not name.startswith("stat."):  # of the compiler alone
            assert np.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12), name
    assert model.stat.meaninertia == pytest.approx(model.dof_M0.mean())  # the solver's scale
    allowed = {"body_mass", "body_inertia", "body_ipos", "body_invweight0", "body_subtreemass", "geom_size", "geom_pos",
               "geom_rbound", "geom_aabb", "bvh_aabb", "dof_M0", "dof_invweight0", "dof_length", "actuator_acc0",
               "cam_poscom0", "light_poscom0", "body_sameframe", "geom_sameframe"}  # fmt: skip
    assert {x for x in changed(robot, "morphology", level) if not x.startswith("stat.")} <= allowed


@pytest.mark.parametrize(("level", "half"), [("easy", 0.4), ("medium", 0.25), ("hard", 0.1)])
def test_morphology_of_halfcheetah(level, half):
    """Half length of the torso, head and thighs at its ends, 14 kg in all, shared by volume."""
    model = built("halfcheetah", "morphology", level).unwrapped.model
    assert model.geom("torso").size[:2] == pytest.approx([0.046, half])
    assert np.allclose(model.geom("torso").pos, 0)
    assert model.geom("head").pos == pytest.approx([half + 0.1, 0, 0.1])
    assert model.body("bthigh").pos == pytest.approx([-half, 0, 0])
    assert model.body("fthigh").pos == pytest.approx([half, 0, 0])
    halves = {"bthigh": 0.145, "bshin": 0.15, "bfoot": 0.094, "fthigh": 0.133, "fshin": 0.106, "ffoot": 0.07}
    mass = {x: capsule(0.046, 2 * h)[0] for x, h in halves.items()}
    mass["torso"] = capsule(0.046, 2 * half)[0] + capsule(0.046, 2 * 0.15)[0]
    for name, own in mass.items():
        assert model.body(name).mass[0] == pytest.approx(14 * own / sum(mass.values()))
    assert model.body_mass.sum() == pytest.approx(14)
    same = {"jnt_range", "jnt_stiffness", "dof_damping", "actuator_gear", "geom_friction", "qpos0"}
    assert not same & changed("halfcheetah", "morphology", level)


@pytest.mark.parametrize("robot", ROBOTS)
def test_a_stock_level_changes_nothing(robot):
    """Factor 1; and a recompiled stock XML is the stock model, so morphology changes what it should alone."""
    assert changed(robot, "gravity", 1.0) == changed(robot, "friction", 1.0) == set()
    env = built(robot)
    with envs.quiet():
        again = mujoco.MjModel.from_xml_path(env.unwrapped.fullpath)
    first, second = arrays(env.unwrapped.model), arrays(again)
    assert all(np.array_equal(first[k], second[k]) for k in first)


def test_one_shift_per_environment_and_known_kinds_alone():
    env = built("hopper", "gravity", 2.0)
    with pytest.raises(ValueError, match="one shift"):
        envs.shift(env, "gravity", 2.0)
    assert env.unwrapped.model.opt.gravity[2] == pytest.approx(-19.62)
    with pytest.raises(ValueError, match="allowed: friction, gravity"):
        envs.shift(built("hopper"), "wind", 2.0)


# ---- what they do ----


def test_hopper_falls_twice_as_fast():
    """Far above the floor, at rest, no torque: the speed after 8 ms is g times 8 ms."""
    for factor in (1.0, 2.0):
        env = built("hopper", "gravity", factor)
        env.reset(seed=0)
        env.unwrapped.set_state(np.array([0, 3.0, 0, 0, 0, 0]), np.zeros(6))
        obs, *_ = env.step(np.zeros(3))
        assert obs[6] == pytest.approx(-9.81 * factor * 0.008, rel=1e-3)


def test_a_foot_turns_half_as_far():
    """Full torque on the foot for a second in the air: it stops at 45 degrees, or a bit beyond half of them."""
    for kind, level, limit in (("gravity", 1.0, np.pi / 4), ("kinematic", "medium", np.pi / 8)):
        env = built("hopper", kind, level)
        env.reset(seed=0)
        env.unwrapped.model.opt.gravity[:] = 0
        env.unwrapped.set_state(np.array([0, 3.0, 0, 0, 0, 0]), np.zeros(6))
        for _ in range(125):
            obs, *_ = env.step(np.array([0.0, 0.0, 0.3]))
        assert limit * 0.98 < obs[4] < limit * 1.15


@pytest.mark.parametrize("name", ["halfcheetah-friction-2.0", "halfcheetah-medium-replay-gravity-2.0",
                                  "hopper-kinematic-2.0", "walker2d-morphology-2.0", "hopper-friction-2.0",
                                  ])  # fmt: skip
def test_the_same_actions_lead_elsewhere(name):
    """Full torque from the same start, 40 steps or until it falls; the shifted path is always the same."""
    task = data.get_task(name)
    stock = replace(task, make=lambda: built(name.split("-")[0]))
    paths = []
    for x in (stock, task, task):
        env = data.make_env(x)
        assert env.spec.max_episode_steps == 1_000 == x.limit
        path = [env.reset(seed=1)[0]]
        for _ in range(40):
            obs, _, terminated, *_ = env.step(np.ones(task.act_dim))
            path.append(obs)
            if terminated:
                break
        paths.append(path)
    assert np.array_equal(paths[0][0], paths[1][0])
    both = min(len(paths[0]), len(paths[1]))
    assert np.abs(np.array(paths[0][:both]) - np.array(paths[1][:both])).max() > 0.01
    assert np.array_equal(paths[1], paths[2])


def test_building_is_quiet_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    data.make_env(data.get_task("halfcheetah-medium-v2-morphology-hard")).reset(seed=0)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


# ---- names ----


@pytest.mark.parametrize(("name", "base", "low", "high"), [
    ("halfcheetah-friction-2.0", "halfcheetah-medium-v2", -280.178953, 11255.9677734375),
    ("halfcheetah-medium-replay-gravity-2.0", "halfcheetah-medium-replay-v2", -280.178953, 9509.15),
    ("hopper-kinematic-2.0", "hopper-medium-v2", -26.3360015397715, 3234.3),
    ("hopper-friction-2.0", "hopper-medium-v2", -26.3360015397715, 3234.3),
    ("walker2d-morphology-2.0", "walker2d-medium-v2", 10.079455055289959, 4592.3),
])  # fmt: skip
def test_duals_tasks_have_unshifted_data_and_odrls_scores(name, base, low, high):
    task, stock = data.get_task(name), data.get_task(base)
    assert task.name == name == data.filed_name(name, None) and task is data.TASKS[name]
    assert task == replace(stock, name=name, ref_min=low, ref_max=high)  # the file and its hash; not `make`
    assert (task.score(low), task.score(high)) == pytest.approx((0, 100))
    model, kind = data.make_env(task).unwrapped.model, name.split("-")[-2]
    expected = built(name.split("-")[0], kind, 2.0 if kind in ("friction", "gravity") else "medium")
    assert all(np.array_equal(v, arrays(expected.unwrapped.model)[k]) for k, v in arrays(model).items())


@pytest.mark.parametrize(("suffix", "kind", "level"), [("gravity-0.5", "gravity", 0.5), ("friction-5", "friction", 5),
                                                       ("gravity-1.25", "gravity", 1.25),
                                                       ("kinematic-easy", "kinematic", "easy"),
                                                       ("kinematic-2.0", "kinematic", "medium"),
                                                       ("morphology-hard", "morphology", "hard")])  # fmt: skip
def test_any_locomotion_name_goes_on_with_a_shift(suffix, kind, level):
    for base in ("hopper-random-v2", "walker2d-medium-expert-v2", "halfcheetah-expert-v2", "hopper-mini-v0"):
        task, stock = data.get_task(f"{base}-{suffix}"), data.get_task(base)
        assert task == replace(stock, name=f"{base}-{suffix}")  # same data and scores; not `make`
    model, expected = (x.unwrapped.model for x in (data.make_env(task), built("hopper", kind, level)))
    assert all(np.array_equal(v, arrays(expected)[k]) for k, v in arrays(model).items())


@pytest.mark.parametrize("name", [
    "hopper-medium-v2-gravity-0", "hopper-medium-v2-gravity--1", "hopper-medium-v2-friction-nan",
    "hopper-medium-v2-friction-inf", "hopper-medium-v2-friction-1e3", "hopper-medium-v2-friction-medium",
    "hopper-medium-v2-kinematic-0.5", "hopper-medium-v2-morphology-huge", "hopper-medium-v2-gravity-",
    "hopper-medium-v2-gravity- 2", "hopper-medium-v2-gravity-100.5", "hopper-medium-v2-gravity-999999",
])  # fmt: skip
def test_levels_that_do_not_exist_are_refused(name):
    with pytest.raises(UsageError, match="a factor up to 100 after friction") as e:
        data.get_task(name)
    assert str(e.value).startswith(f"--env: got {name}; allowed: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["hopper-medium-v2-wind-2.0", "hopper-medium-v2-gravity", "pen-human-v1-gravity-2.0",
                                  "hopper-medium-gravity-2.0", "hopper-gravity-2.0", "hopperxmedium-v2-gravity-2.0",
                                  "hopper-medium-v2-gravity-2.0-friction-2.0x"])  # fmt: skip
def test_names_that_do_not_exist_are_refused(name):
    with pytest.raises(UsageError) as e:
        data.get_task(name)
    assert str(e.value).startswith(f"--env: got {name}; allowed: ") and "\n" not in str(e.value)


def test_presets_go_by_the_name_before_the_shift():
    iql = module("iql")
    for base in ("hopper-mini-v0", "halfcheetah-medium-v2"):
        plain = run.with_presets(iql.Args, iql.ENV_PRESETS, base)
        shifted = run.with_presets(iql.Args, iql.ENV_PRESETS, f"{base}-gravity-0.5")
        assert shifted == replace(plain, env=f"{base}-gravity-0.5")


def test_training_goes_online_and_is_evaluated_under_the_shift(dataset, tmp_path, monkeypatch):
    """The data are the plain task's; every environment the run makes has the gravity of its name."""
    made, make = [], data.make_env
    monkeypatch.setattr(data, "make_env", lambda *args: made.append(make(*args)) or made[-1])
    args = replace(tiny_args("iql", dataset=dataset, out_dir=tmp_path), env="hopper-medium-v2-gravity-2.0")
    with redirect_stdout(io.StringIO()):
        module("iql").train(args)
    assert len(made) >= 3 and all(x.unwrapped.model.opt.gravity[2] == pytest.approx(-19.62) for x in made)
    assert (tmp_path / "iql" / f"{args.env}@{dataset.stem}" / "seed0" / "final.json").is_file()


def test_the_evaluator_plays_the_shifted_task():
    """Twice the weight on Hopper's legs, no torque: it falls sooner."""
    lengths = []
    for name in ("hopper-medium-v2", "hopper-medium-v2-gravity-2.0"):
        evaluate = data.Evaluator(data.get_task(name), 3, 0)
        lengths.append(evaluate(lambda obs: torch.zeros(len(obs), 3), torch.device("cpu"))["eval/length"])
    assert lengths[1] < lengths[0]
