"""DUAL as a program: phases that hand over, runs that are killed or imported, refusals, ablations, metrics, presets.

The planner: test_planner.py. Posterior and acting: test_laplace.py.
"""

import gc
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import Killed, equal_states, final_state, kill_after, log_rows, module, tiny_args
from test_planner import OBS, A, H, a_net, filled

from algorithms import dual
from common import data, run


def test_actor_and_transition_start_as_the_student_and_only_the_actor_moves(dataset, tmp_path):
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path))
    state = final_state(tmp_path)
    (path,) = tmp_path.glob("**/offline.pt")
    offline = torch.load(path, weights_only=True)["objects"]["nets"]
    student = state["planner_teacher"]
    for k, v in state["planner_net"].items():
        assert torch.equal(v, offline[f"transition.net.{k}"])
        assert torch.equal(v, state["nets"][f"transition.net.{k}"])
    assert not torch.equal(student["head.weight"], state["planner_net"]["head.weight"])  # D57
    before, after = ({k: nets[f"actor.net.{k}"] for k in student} for nets in (offline, state["nets"]))
    moved = [k for k in student if not torch.equal(before[k], after[k])]
    assert {"inlet.weight", "head.weight", "norm.weight"} <= set(moved) and "mean" not in moved


KILLS = {  # what dies, after how many calls in each life
    "planner": ("planner_loss", (4, 9, 5)),
    "distill": ("distill_loss", (3, 8, 5, 6)),
    "transition": ("transition_loss", (9, 14, 11)),
    "offline": ("losses", (7, 9)),
    "online": ("awr_weight", (25, 6, 4, 3, 5)),
}


@pytest.fixture(scope="module")
def straight_run(random_rows, tmp_path_factory):
    """The folder of the run that nothing killed, computed once for either way to batch."""

    @cache
    def folder(append: bool) -> Path:
        out = tmp_path_factory.mktemp("straight")
        dual.train(
            tiny_args("dual", dataset=random_rows, out_dir=out, append_online=append, eval_halvings=True)
        )
        return out

    return folder


@pytest.mark.parametrize("phase", KILLS)
@pytest.mark.parametrize("append", [True, False])
def test_a_run_killed_in_any_phase_resumes_exactly(
    phase, append, straight_run, dataset, tmp_path, monkeypatch
):
    """Checkpoints at every step: same log, same final state of everything, online in the middle of episodes."""
    changes, straight = dict(dataset=dataset, append_online=append, eval_halvings=True), straight_run(append)
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    where, limits = KILLS[phase]
    args = tiny_args("dual", out_dir=tmp_path / "killed", **changes)
    for limit in limits:
        with monkeypatch.context() as patch:
            kill_after(patch, dual, where, limit)
            with pytest.raises(Killed):
                dual.train(args)
        gc.collect()
    dual.train(args)
    assert log_rows(straight) == log_rows(tmp_path / "killed")
    assert equal_states(final_state(straight), final_state(tmp_path / "killed"))


def test_a_run_killed_between_its_environment_steps_resumes_exactly(dataset, tmp_path, monkeypatch):
    """During the warm-up, every third step: the shift and the tally go on where they were."""
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path / "straight", warmup_steps=25))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args = tiny_args("dual", dataset=dataset, out_dir=tmp_path / "killed", warmup_steps=25)
    deaths, done = 0, False
    while not done:
        with monkeypatch.context() as patch:
            kill_after(patch, data.Interaction, "step", 4)
            try:
                dual.train(args)
                done = True
            except Killed:
                deaths += 1
        gc.collect()
    assert deaths == 7
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "killed")
    assert equal_states(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))


def test_from_planner_and_from_offline_give_the_run_that_computes_everything(dataset, tmp_path):
    """Bit for bit in what comes after; the online settings may differ; those of the phase may not, and are named."""
    few = dict(dataset=dataset, bc_coef=0.1)
    whole = dual.train(tiny_args("dual", out_dir=tmp_path / "a", **few))
    (source,) = (tmp_path / "a").glob("**/planner.pt")
    second = dual.train(tiny_args("dual", out_dir=tmp_path / "b", from_planner=source, **few))
    third = dual.train(tiny_args("dual", out_dir=tmp_path / "c", from_offline=source.parent, **few))
    assert second["final_score"] == third["final_score"] == whole["final_score"]
    assert "planner_seconds" not in second and "distill_seconds" in second
    assert not {"planner_seconds", "distill_seconds", "offline_seconds"} & set(third)
    rows = [log_rows(tmp_path / x) for x in "abc"]

    def after(log: list[dict], *phases: str) -> list[dict]:
        return [{k: v for k, v in x.items() if v} for x in log if x["phase"] in phases]

    phases = "distill", "offline", "online"
    assert after(rows[0], *phases) == after(rows[1], *phases)
    assert after(rows[0], "online") == after(rows[2], "online")
    states = [final_state(tmp_path / x) for x in "abc"]
    for name in ("nets", "opt", "explorer_offsets", "explorer_n_eff_per_row", "explorer_shift", "online"):
        first, *others = (x[name] for x in states)
        assert all(equal_states(first, x) for x in others), name
    other = dict(out_dir=tmp_path / "d", from_offline=source.parent, overwrite=True)
    dual.train(tiny_args("dual", **few | other, uq="none", shift_weight=0.0))
    for flag, changes, words in [
        ("from_offline", dict(distill_steps=2), "distill_steps 1 -> 2"),
        ("from_offline", dict(inv_temp=5.0), r"inv_temp 3.0 -> 5.0"),
        ("from_offline", dict(bc_coef=0.0), r"bc_coef 0.1 -> 0.0"),
        ("from_planner", dict(horizon=3), "horizon 4 -> 3"),
        ("from_planner", dict(normalize_obs=False), "normalize_obs True -> False"),
    ]:
        anew = dict(out_dir=tmp_path / "e", overwrite=True) | {flag: source.parent}
        with pytest.raises(run.UsageError, match=words):
            dual.train(tiny_args("dual", **few | anew | changes))
        gc.collect()
    with pytest.raises(run.UsageError, match="planner phase is over"):
        dual.train(tiny_args("dual", **few, out_dir=tmp_path / "f", from_planner=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(horizon=1), "--horizon: got 1; allowed: 2 or more, or --shift-weight 0"),
        (dict(distill_steps=3), "--distill-steps: got 3; allowed: 4, or that halved some times"),
        (dict(distill_steps=8), "--distill-steps: got 8"),
        (dict(teacher_steps=12, distill_steps=1), "--distill-steps: got 1; allowed: 12"),
        (dict(laplace_prior=0.0), r"--laplace-prior: got 0.0; allowed: \(0, inf\)"),
        (dict(offline_frac=0.99, append_online=False), "rows of a batch: got 0 own; .*--offline-frac 0.99"),
        (dict(offline_frac=0.0), "--offline-frac: got 0.0; .*no effect unless not append_online"),
        (dict(offline_frac=0.3), "--offline-frac: got 0.3; .*no effect unless not append_online"),
        (dict(offline_frac=1.0), r"--offline-frac: got 1.0; allowed: \[0, 1\)"),
        (dict(laplace_draws=0), "--laplace-draws"),
    ],
)
def test_bad_settings_are_refused(changes, words, dataset, tmp_path):
    with pytest.raises(run.UsageError, match=words):
        dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path, **changes))
    gc.collect()


@pytest.mark.parametrize("stem", ["iql", "calql", "iql_dare"])
def test_own_rows_only_is_still_refused_elsewhere(stem, dataset, tmp_path):
    with pytest.raises(run.UsageError, match=r"rows of a batch: got 0 dataset, 16 own; .*--offline-frac 0"):
        module(stem).train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, offline_frac=0.0))
    gc.collect()


def test_own_rows_only(dataset, tmp_path, monkeypatch):
    """Frozen-Lake's online batches: none of the dataset's rows, rewards scaled like the dataset's."""
    with h5py.File(dataset) as f:
        known = {row.tobytes() for row in f["observations"][()].astype(np.float32)}
        rewards = f["rewards"][()]
    seen, original = [], dual.losses
    monkeypatch.setattr(dual, "losses", lambda n, b, a: seen.append(b) or original(n, b, a))
    changes = dict(append_online=False, offline_frac=0.0, normalize_obs=False)
    changes |= dict(reward_scale=10.0, reward_bias=-1.0)
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path, **changes))
    shares = [sum(o.numpy().tobytes() in known for o in b.obs) / 16 for b in seen]
    assert shares[:20] == [1.0] * 20 and shares[20:] == [0.0] * 20
    allowed = {f"{10 * x - 1:.4f}" for x in rewards}
    assert {f"{x:.4f}" for b in seen[:20] for x in b.rewards.tolist()} <= allowed
    stored = final_state(tmp_path)["online"]["rows"][:, 11 + 3]
    first = next(x for x in log_rows(tmp_path) if x.get("train/episode_length"))
    length = int(first["train/episode_length"])
    expected = 10 * float(first["train/episode_return"]) - length
    assert stored[:length].sum().item() == pytest.approx(expected, rel=1e-4)
    assert {x for b in seen[20:] for x in b.rewards.tolist()} <= set(stored.tolist())


@pytest.mark.parametrize(
    "changes",
    [
        dict(horizon=1, shift_weight=0.0),
        dict(distill_steps=4),
        dict(distill_steps=2, latent="sample"),
        dict(uq="latent"),
        dict(uq="none"),
        dict(fit_transition=False),
        dict(laplace_weights="elbo", append_online=False),
        dict(laplace_noise="sigma", laplace_std=0.0, laplace_prior=1e-6),
        dict(bc_coef=1.0),
        dict(planner_steps=0, online_steps=0),
    ],
    ids=str,
)
def test_ablations_train(changes, dataset, tmp_path):
    result = dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path, **changes))
    assert all(math.isfinite(v) for v in result.values())


def test_score_online_mean_is_the_mean_of_the_online_evaluations(dataset, tmp_path):
    result = dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path, eval_every=7))
    online = [x for x in log_rows(tmp_path) if x["phase"] == "online"]
    scores = [float(x["eval/score"]) for x in online if x["eval/score"]]
    assert len(scores) == 5 and result["score_online_mean"] == pytest.approx(sum(scores) / 5)


def test_metrics_are_those_of_the_docstring(dataset, tmp_path):
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path, eval_halvings=True, bc_coef=0.1))
    rows = log_rows(tmp_path)
    where = {k: {x["phase"] for x in rows if x.get(k)} for k in rows[0]}
    assert where["loss/planner"] == {"planner"}
    assert where["loss/distill"] == {"distill"}
    for k in ("error_2", "action_error_1", "score_1", "score_2"):
        assert where[f"distill/{k}"] == {"distill"}
    assert where["loss/transition"] == {"transition"}
    for k in ("laplace/n_eff", "laplace/condition", "laplace/data_std", "loss/bc"):
        assert where[k] == {"offline", "online"}
    for k in ("epistemic_std", "aleatoric_std", "shift", "shift_ratio"):
        assert where[f"uq/{k}"] == {"online"}
    for k in ("epistemic", "aleatoric", "shift"):
        assert where[f"uq/share_{k}"] == {"online"}
    assert where["shift/offline"] == {"offline"}
    fits = [int(x["step"]) for x in rows if x["phase"] == "online" and x["laplace/n_eff"]]
    assert fits == [7, 14, 21, 28]


def test_first_step_of_an_episode_has_no_shift(dataset, tmp_path, monkeypatch):
    """Zero whenever an episode begins, not zero otherwise; one prediction for each environment step."""
    seen, original = [], dual.Explorer.act

    def act(self, obs):
        seen.append(self.shift.item())
        return original(self, obs)

    monkeypatch.setattr(dual.Explorer, "act", act)
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path, online_steps=60))
    lengths = [int(x["train/episode_length"]) for x in log_rows(tmp_path) if x.get("train/episode_length")]
    starts = np.cumsum([0, *lengths])
    assert len(lengths) >= 2 and len(seen) == 60
    assert [i for i, d in enumerate(seen) if d == 0] == [s for s in starts if s < 60]


def test_time_acting_prints_a_table_and_leaves_nothing(tmp_path, capsys):
    args = tiny_args("dual", out_dir=tmp_path / "runs", time_acting=True, teacher_steps=32)
    assert dual.train(args) == {}
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0] == "milliseconds per action on cpu" and "K = 3 and shift" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "4", "8", "16", "32"]
    times = np.array([[float(x) for x in line.split()[1:]] for line in lines[2:]])
    assert times.shape == (6, 3) and (times > 0).all() and (times[5] > 3 * times[0]).all()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("hopper-medium-v2", dict(horizon=4, planner_width=512, normalize_obs=True, append_online=True)),
        ("antmaze-umaze-v2", dict(horizon=32, expectile=0.9, inv_temp=10.0, reward_bias=-1.0)),
        ("pen-cloned-v1", dict(expectile=0.8, horizon=4)),
        ("frozenlake-4x4", dict(horizon=4, reward_scale=10.0, offline_frac=0.0, append_online=False)),
        ("frozenlake-8x8", dict(horizon=8, planner_width=128, planner_steps=5_000, inv_temp=10.0)),
    ],
)
def test_presets(env, expected):
    args = run.with_presets(dual.Args, dual.ENV_PRESETS, env)
    assert {k: getattr(args, k) for k in expected} == expected


def test_compiled_and_plain_losses_agree():
    """The three that a GPU runs compiled, the distillation at two numbers of steps; same random numbers."""
    args, b = tiny_args("dual"), filled(30)
    x, mask = dual.Windows(b, np.zeros(30, bool), H).take(torch.arange(16))
    for steps in (1, 2):
        torch.manual_seed(0)
        nets = dual.make_dual_nets(a_net(), replace(args, distill_steps=steps), OBS, A)
        batch, teacher, net = b.take(torch.arange(16)), a_net(seed=1), nets["actor"].net
        cases = [(dual.distill_loss, (net, teacher, x, mask, steps, True))]
        if steps == 2:
            cases.append((lambda *a: dual.losses(*a)[0], (nets, batch, args)))
            cases.append((dual.planner_loss, (net, x, mask)))
        for loss, inputs in cases:
            found = []
            for f in (loss, torch.compile(loss, backend="aot_eager")):
                nets.zero_grad()
                torch.manual_seed(1)
                value = f(*inputs)
                value.backward()
                found.append((value.item(), net.head.weight.grad.clone()))
            assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
            assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)
