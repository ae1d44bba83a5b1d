"""The release methods beyond DARE on IQL: sorting, weights per row, Algorithm 1's order, files between runs."""

import itertools
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import test_calql
import test_dare
import torch
from conftest import CPU, cached, log_rows, module, tiny_args

from algorithms import calql_dare, calql_stratdiff, iql_dare, iql_stratdiff
from common import data, run
from common.buffer import ReplayBuffer
from common.tools import report

RELEASE = ["calql_dare", "calql_stratdiff", "iql_dare", "iql_stratdiff"]


# ---- StratDiff's sort ----


def test_sort_is_the_exchange_at_the_pooled_quantile():
    """1,000 batches: the n_off lowest scores, the count of exchanged pairs, τ, and DARE's exchange at that τ."""
    for scores, n_off, _ in test_dare.random_batches(1_000, 7):
        off = torch.arange(64) < n_off
        off_like, logs = iql_stratdiff.sorted_exchange(scores, off, n_off, -1)
        assert set(off_like.nonzero()[:, 0].tolist()) == set(scores.argsort()[:n_off].tolist())
        assert logs["split/exchanged"] == (off_like & ~off).sum() == (off & ~off_like).sum()
        quantile = scores.sort().values[n_off]
        assert logs["split/tau"] == quantile
        assert torch.equal(off_like, iql_dare.exchange(scores, off, quantile, -1)[0])


@pytest.mark.parametrize("cap", [0, 3, 8, 16])
def test_capped_sort_swaps_the_most_extreme_of_its_pairs(cap):
    """Everyone else keeps their origin; sizes stay."""
    for scores, n_off, _ in test_dare.random_batches(300, cap):
        off = torch.arange(64) < n_off
        full, _ = iql_stratdiff.sorted_exchange(scores, off, n_off, -1)
        capped, logs = iql_stratdiff.sorted_exchange(scores, off, n_off, cap)
        out = sorted((off & ~full).nonzero()[:, 0].tolist(), key=lambda i: -scores[i])[:cap]
        into = sorted((~off & full).nonzero()[:, 0].tolist(), key=lambda i: scores[i])[:cap]
        expected = off.clone()
        expected[out], expected[into] = False, True
        assert torch.equal(capped, expected) and logs["split/exchanged"] == len(out)
        assert capped.sum() == n_off


def test_sort_of_tied_scores_keeps_sizes_and_prefers_dataset_rows():
    off = torch.arange(6) < 3
    for scores in itertools.product([0.0, 1.0], repeat=6):
        off_like, logs = iql_stratdiff.sorted_exchange(torch.tensor(scores), off, 3, -1)
        ranked = sorted(range(6), key=lambda i: (scores[i], i))
        assert set(off_like.nonzero()[:, 0].tolist()) == set(ranked[:3])
        assert logs["split/exchanged"] == sum(i >= 3 for i in ranked[:3])


# ---- Cal-QL: Eq. 14; StratDiff Eq. 11 has half of its TD loss ----


def cal_case(**settings) -> tuple:
    nets, batch, noise, args, _ = test_calql.case()
    known = {k: getattr(args, k) for k in args.__dataclass_fields__}
    args = calql_dare.Args(**known | dict(batch_size=8, cql_weight_online=4.0) | settings)
    return nets, batch, noise, args, torch.tensor([True, False, True, True, False, True, False, False])


@pytest.mark.parametrize("reduction", ["batch", "subset"])
def test_released_losses_are_td_on_all_rows_and_the_regulariser_on_offline_like_ones(reduction):
    """Against R of each row, summed by hand: α/N or α/|b_off| times the sum over b_off, of both critics."""
    nets, batch, noise, args, off_like = cal_case(cql_reduction=reduction)
    weight = calql_dare.released_weight(off_like, args)
    with_r, _ = calql_dare.losses(nets, batch, None, weight, noise, args)
    without, _ = calql_dare.losses(nets, batch, None, 0.0, noise, args)
    by_row = []
    for i in range(8):  # R of row i, both critics: a batch's loss with all weight on that row
        one = (torch.arange(8) == i) * 8.0
        by_row.append((calql_dare.losses(nets, batch, None, one, noise, args)[0] - without).item())
    total = sum(r for r, near in zip(by_row, off_like, strict=True) if near)
    rows = 8 if reduction == "batch" else 4
    assert (with_r - without).item() == pytest.approx(4.0 * total / rows, rel=1e-6)


def test_all_rows_offline_like_is_cal_ql_bit_for_bit():
    """Loss and gradients, with calibration and without."""
    nets, batch, noise, args, _ = cal_case()
    params = [p for p in nets.parameters() if p.requires_grad]
    weight = calql_dare.released_weight(torch.ones(8, dtype=torch.bool), args)
    for bound in (None, torch.zeros(8, dtype=torch.float64)):
        released = calql_dare.losses(nets, batch, bound, weight, noise, args)[0]
        plain = module("calql").losses(nets, batch, bound, 4.0, noise, args)[0]
        assert released.item() == plain.item()
        pairs = (torch.autograd.grad(x, params, allow_unused=True) for x in (released, plain))
        for a, b in zip(*pairs, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("near_gap", "grows"), [(1.0, True), (-1.0, False)])
def test_multiplier_follows_the_gap_of_offline_like_rows_only(near_gap, grows, monkeypatch):
    """Gap far above the target on released rows, near_gap on the others: the latter decide (U23)."""
    nets, batch, noise, args, off_like = cal_case(lagrange=True, target_gap=0.0)
    gap = torch.where(off_like, near_gap, 100.0).double().expand(2, -1)
    monkeypatch.setattr(calql_dare, "conservative_gap", lambda *_: (gap, torch.zeros(())))
    loss, _ = calql_dare.losses(nets, batch, None, calql_dare.released_weight(off_like, args), noise, args)
    (gradient,) = torch.autograd.grad(loss, [nets["weights"]["log_alpha_prime"]])
    assert (gradient < 0) == grows


def test_spread_of_a_squashed_gaussian_is_sigma_times_the_slope_of_tanh():
    mean = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(mean).sum(), mean)
    log_std = torch.linspace(-1, 1, 9, dtype=torch.float64)
    got = calql_dare.squashed_log_std(mean, log_std).exp()
    assert torch.allclose(got, log_std.exp() * slope)


# ---- IQL: StratDiff Eqs. 12-13, App. E ----


def test_stratdiff_losses_are_those_of_dare_iv():
    """Two papers, one equation: Eqs. 12, 13 = DARE Eqs. 35, 15 with AWR everywhere; test_dare.py has these by hand."""
    nets, batch, off_like, noise = test_dare.loss_case()
    ours, logs = iql_stratdiff.stratdiff_losses(nets, batch, off_like, noise[1:], iql_stratdiff.Args())
    theirs, peer = iql_dare.dare_losses(nets, batch, off_like, noise, iql_dare.Args(value_loss="expectile"))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    expected = {k: peer[k].item() for k in logs}
    assert {k: v.item() for k, v in logs.items()} == pytest.approx(expected, rel=1e-9)


def test_without_the_expectile_v_has_the_difference_on_online_like_rows():
    """App. E, row by row; V's gradient on those rows is -1/N, whatever the difference."""
    nets, batch, off_like, noise = test_dare.loss_case()
    args = iql_stratdiff.Args(online_value="advantage")
    _, logs = iql_stratdiff.stratdiff_losses(nets, batch, off_like, noise[1:], args)
    total = 0.0
    for i, near in enumerate(off_like.tolist()):
        s, a = batch.obs[i : i + 1], batch.actions[i : i + 1]
        u = (nets["q_target"](s, a).amin(0) - nets["vf"](s)).item()
        total += abs(args.expectile - (u < 0)) * u * u if near else u
    assert logs["loss/v"].item() == pytest.approx(total / len(off_like), rel=1e-9)


# ---- settings ----


@pytest.mark.parametrize("stem", RELEASE)
def test_offline_settings_are_the_backbones(stem):
    backbone = module(stem.split("_")[0])
    assert module(stem).OFFLINE_SETTINGS == backbone.OFFLINE_SETTINGS  # values: test_presets.py


@pytest.mark.parametrize("stem", RELEASE)
def test_labels_in_antmaze_are_as_soft_as_the_papers(stem, tmp_path):
    """β = 3 on Q of rewards r - 1, K = 32: a spread δ of Q leaves ln K - (1 - 1/K) (3 δ)² / 2 nats, 3.448 of 3.466.

    Other units of Q do not matter: the agent's are divided out.
    """
    algorithm, delta = module(stem), 0.0636
    args = run.with_presets(
        algorithm.Args, algorithm.ENV_PRESETS, "antmaze-medium-play-v2",
        online_steps=1, behavior_width=16, energy_hidden=16,
    )  # fmt: skip
    scale = getattr(args, "reward_scale", 1.0)
    assert scale == (10.0 if stem.startswith("calql") else 1.0)
    dataset = SimpleNamespace(
        obs=np.zeros((2, 29)), actions=np.zeros((2, 8)), sha256="", path=tmp_path / "maze.hdf5",
        episode_returns=lambda: np.array([0.0, 1.0]), return_range=lambda: 1.0,
    )  # fmt: skip
    r = SimpleNamespace(args=args, seed=lambda _: torch.manual_seed(0), device=CPU, compiled=lambda f: f)
    r.settings = dict.fromkeys
    q = scale * (delta * torch.randn(500, args.support_k) - 40)  # of 500 states
    offline = ReplayBuffer(500, 29, 8, r.device)
    offline.append(torch.randn(500, 68))
    guide = algorithm.Guide(r, dataset, offline, lambda *_: q.flatten()[None], scale)
    guide.support.actions.uniform_(-1, 1)
    entropy = guide.energy_step(offline.obs, torch.arange(500))["energy/label_entropy"].item()
    assert entropy == pytest.approx(math.log(32) - (1 - 1 / 32) * (3 * delta) ** 2 / 2, abs=2e-3)
    assert entropy == pytest.approx(3.448, abs=2e-3)


@pytest.mark.parametrize("stem", RELEASE)
def test_a_dataset_without_a_return_range_is_refused_with_advice_that_helps(stem, dataset, tmp_path):
    """One unfinished episode has no range to divide Q by; the unit that the message names trains."""
    with h5py.File(dataset, "r+") as f:
        f["terminals"][()], f["timeouts"][()] = 0, 0
    args = dict(dataset=dataset, online_steps=12)
    words = "--energy-units: got qgpo; allowed: reward: all returns are the same"
    with pytest.raises(run.UsageError, match=words):
        module(stem).train(tiny_args(stem, out_dir=tmp_path / "qgpo", **args))
    result = module(stem).train(tiny_args(stem, out_dir=tmp_path, energy_units="reward", **args))
    assert math.isfinite(result["final_score"])
    if stem.startswith("iql"):  # which divides rewards by the range
        with pytest.raises(run.UsageError, match=r"dataset: got 1 episode\(s\)"):
            module(stem).train(tiny_args(stem, out_dir=tmp_path / "scaled", normalize_reward=True, **args))


@pytest.mark.parametrize(
    ("stem", "changes", "word"),
    [
        ("calql_stratdiff", dict(offline_frac=1.0), r"offline-frac: got 1.0; allowed: \[0, 1\)"),
        (
            "iql_stratdiff",
            dict(offline_frac=0.0),
            "rows of a batch: got 0 dataset, 16 own; .*--offline-frac 0",
        ),
        ("calql_dare", dict(exchange_cap=-2), r"exchange-cap: got -2; allowed: \[-1, inf\)"),
        ("calql_dare", dict(support_k=1), r"support-k: got 1; allowed: \[2, inf\)"),
        ("calql_dare", dict(calibrate_online=True, calibrate=False), "calibrate-online"),
    ],
)
def test_bad_settings_are_refused(stem, changes, word, dataset, tmp_path):
    with pytest.raises(run.UsageError, match=word):
        module(stem).train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, **changes))


ABLATIONS = [
    ("calql_dare", dict(exchange_cap=0)),
    ("calql_dare", dict(exchange_cap=-1, threshold="sort")),
    ("calql_dare", dict(cql_reduction="subset", score="gauss_std")),
    ("calql_dare", dict(lagrange=True, max_target_backup=True, energy_units="reward", reward_scale=10.0)),
    ("calql_dare", dict(calibrate_online=True, online_steps=60)),
    ("calql_stratdiff", dict(exchange_cap=4)),
    ("calql_stratdiff", dict(guidance_scale=0.0)),
    ("calql_stratdiff", dict(cql_reduction="subset", utd=2)),
    ("calql_stratdiff", dict(offline_frac=0.25, score="gauss_std")),
    ("iql_stratdiff", dict(online_value="advantage")),
    ("iql_stratdiff", dict(exchange_cap=0)),
    ("iql_stratdiff", dict(utd=10, online_steps=15)),
    ("iql_stratdiff", dict(guidance_scale=0.0, score="gauss_std")),
]


@pytest.mark.parametrize(("stem", "changes"), ABLATIONS)
def test_ablations_train(stem, changes, dataset, tmp_path):
    """Finite scores and logs; the share of exchanged pairs stays within its cap."""
    args = tiny_args(stem, dataset=dataset, out_dir=tmp_path, **changes)
    result = module(stem).train(args)
    assert all(math.isfinite(result[k]) for k in ("offline_score", "final_score"))
    rows = log_rows(tmp_path / stem)
    assert all(math.isfinite(float(v)) for row in rows for k, v in row.items() if v and k != "phase")
    exchanged = [float(r["split/exchanged"]) for r in rows if r.get("split/exchanged")]
    assert bool(exchanged) == (args.exchange_cap != 0)
    most = min(args.offline_frac, 1 - args.offline_frac) * args.batch_size
    assert all(0 <= x <= (args.exchange_cap if args.exchange_cap > 0 else most) for x in exchanged)


# ---- Algorithm 1 ----


@pytest.mark.parametrize("stem", ["calql_dare", "calql_stratdiff", "iql_stratdiff"])
def test_order_and_wiring_of_an_online_step(stem, dataset, tmp_path, monkeypatch):
    """Score, split, loss with that split; f_φ before Q's update in StratDiff, after it in DARE; half and half rows."""
    algorithm, calls, masks, used = module(stem), [], [], []
    splitter = "split" if stem == "calql_dare" else "sorted_exchange"
    loss_name = "stratdiff_losses" if stem == "iql_stratdiff" else "losses"

    def spy(owner, name, note=lambda *_: None):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            out = original(*args, **kwargs)
            calls.append(name)
            note(args, out)
            return out

        monkeypatch.setattr(owner, name, call)

    spy(algorithm.Guide, "score")
    spy(algorithm.Guide, "energy_step")
    spy(algorithm, splitter, lambda args, out: masks.append((args[1].clone(), out[0].clone())))
    spy(algorithm, loss_name, lambda args, _: used.append(args[2 if stem == "iql_stratdiff" else 3]))
    spy(algorithm, "update")
    args = tiny_args(stem, dataset=dataset, out_dir=tmp_path, offline_frac=0.25)
    algorithm.train(args)
    energy = ["energy_step"]
    before, after = ([], energy) if stem == "calql_dare" else (energy, [])
    step = ["score", *before, splitter, loss_name, "update", *after]
    online = calls[calls.index("score") :]
    assert online == step * 20
    for (off, off_like), weight in zip(masks, used[-20:], strict=True):
        assert off.tolist() == [True] * 4 + [False] * 12 and off_like.sum() == 4
        expected = off_like if stem == "iql_stratdiff" else args.cql_weight_online * off_like
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("stem", ["calql_dare", "calql_stratdiff", "iql_stratdiff"])
def test_docstring_names_what_is_logged(stem, dataset, tmp_path):
    algorithm = module(stem)
    algorithm.train(tiny_args(stem, dataset=dataset, out_dir=tmp_path))
    (row, *_) = [r for r in log_rows(tmp_path / stem) if r["phase"] == "online" and r["loss/q"]]
    metrics = re.search(r"\nMetrics(.*?)\nRun ", algorithm.__doc__, re.S).group(1)
    promised = set(re.findall(r"\b(?:split|energy|ref)/\w+", metrics))
    there = {k for k, v in row.items() if v and k.split("/")[0] in ("split", "energy", "ref")}
    assert promised == there


# ---- files between runs ----


@pytest.mark.parametrize("stem", RELEASE)
def test_an_imported_offline_phase_continues_as_ones_own(stem, dataset, tmp_path):
    """--from-offline saves the time and changes nothing: scores and online logs bit for bit; so does the cache."""
    backbone = stem.split("_")[0]
    few = dict(dataset=dataset, online_steps=20)
    own = module(stem).train(tiny_args(stem, out_dir=tmp_path / "own", **few))
    module(backbone).train(tiny_args(backbone, dataset=dataset, out_dir=tmp_path, online_steps=0))
    (source,) = (tmp_path / backbone).glob("**/offline.pt")
    shutil.copytree(tmp_path / "own" / ".behavior", tmp_path / ".behavior")
    args = tiny_args(stem, out_dir=tmp_path, from_offline=source, **few)
    imported = module(stem).train(args)
    assert "offline_seconds" not in imported and "behavior_seconds" not in imported
    for k in ("offline_score", "final_score"):
        assert imported[k] == own[k]

    def online(out):
        return [{k: v for k, v in r.items() if v} for r in log_rows(out / stem) if r["phase"] == "online"]

    assert online(tmp_path) == online(tmp_path / "own") != []


def test_one_behavior_model_serves_both_backbones(dataset, tmp_path, capsys):
    """The cache is by content: another method finds it, and goes on as if it had trained the model itself."""
    settings = dict(dataset=dataset, normalize_obs=True, online_steps=15)
    trained = calql_dare.train(tiny_args("calql_dare", out_dir=tmp_path / "a", **settings))
    assert "behavior_seconds" in trained and len(cached(tmp_path / "a")) == 1
    iql_dare.train(tiny_args("iql_dare", out_dir=tmp_path / "b", **settings))
    (kept,) = cached(tmp_path / "b")
    assert kept.name.startswith("random-")
    capsys.readouterr()
    found = calql_dare.train(tiny_args("calql_dare", out_dir=tmp_path / "b", **settings))
    assert f"behavior phase of {kept}" in capsys.readouterr().out
    assert "behavior_seconds" not in found and found["final_score"] == trained["final_score"]
    calql_stratdiff.train(tiny_args("calql_stratdiff", out_dir=tmp_path / "b", **settings))
    iql_stratdiff.train(tiny_args("iql_stratdiff", out_dir=tmp_path / "b", **settings))
    assert cached(tmp_path / "b") == [kept] and list(dataset.parent.iterdir()) == [dataset]
    assert len(report.find(tmp_path / "b")[0]) == 4  # which sees the runs and nothing else


def test_whatever_shapes_the_behavior_model_gives_another_key(dataset, tmp_path, monkeypatch):
    """Settings, seed, states, rows of the dataset, code; not the other settings."""
    count = itertools.count()

    def keys(**changes) -> set[str]:
        few = dict(dataset=dataset, offline_steps=2, online_steps=0, behavior_steps=3)
        out = tmp_path / str(next(count))
        iql_dare.train(tiny_args("iql_dare", out_dir=out, **few | changes))
        return {p.name for p in cached(out)}

    first = keys()
    assert len(first) == 1
    assert keys(expectile=0.9, energy_steps=1, energy_beta=1.0, support_k=2) == first
    assert keys(guidance_scale=0.0) == first
    seen = set(first)
    others = dict(behavior_steps=4, behavior_batch=8, behavior_lr=1e-3, behavior_width=8)
    for name, value in (others | dict(normalize_obs=True, seed=1)).items():
        now = keys(**{name: value})
        assert len(now) == 1 and not now & seen, name
        seen |= now
    original = iql_dare.noise_levels

    def noise_levels(t):
        return original(t)

    monkeypatch.setattr(iql_dare, "noise_levels", noise_levels)
    assert not keys() & seen
    other = tmp_path / "more" / dataset.name
    other.parent.mkdir()
    other.write_bytes(dataset.read_bytes() + b"\0")
    monkeypatch.undo()
    assert not keys(dataset=other) & seen


def test_from_behavior_takes_another_runs_model_and_refuses_one_of_other_settings(dataset, tmp_path):
    """Another seed's is allowed, and not kept under this seed's key; a difference is named; so is a missing file."""
    few = dict(dataset=dataset, online_steps=12)
    iql_dare.train(tiny_args("iql_dare", out_dir=tmp_path, seed=1, **few))
    (source,) = (tmp_path / "iql_dare").glob("**/seed1")
    for path in (source, source / "behavior.pt"):
        out = tmp_path / path.name
        args = tiny_args("iql_stratdiff", out_dir=out, from_behavior=path, **few)
        result = iql_stratdiff.train(args)
        assert "behavior_seconds" not in result and cached(out) == []
        (ours,) = out.glob("**/behavior.pt")
        states = (torch.load(p, weights_only=True)["objects"] for p in (source / "behavior.pt", ours))
        theirs, mine = (x["behavior"] for x in states)
        assert all(torch.equal(theirs[k], mine[k]) for k in theirs)
    for i, (changes, words) in enumerate([
        (dict(behavior_width=32), "from-behavior: got behavior_width 16 -> 32"),
        (dict(from_behavior=tmp_path / "nowhere"), "from-behavior: got .*nowhere; allowed: a behavior.pt"),
    ]):  # fmt: skip
        changes = dict(from_behavior=source, out_dir=tmp_path / str(i)) | changes
        with pytest.raises(run.UsageError, match=words):
            iql_dare.train(tiny_args("iql_dare", **few | changes))
        assert not [*(tmp_path / str(i)).glob("**/log.csv")]  # before the offline phase, not after it


def test_a_damaged_cache_is_named(dataset, tmp_path):
    few = dict(dataset=dataset, out_dir=tmp_path, online_steps=0)
    iql_dare.train(tiny_args("iql_dare", **few))
    (kept,) = cached(tmp_path)
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(run.UsageError, match=kept.name):
        iql_stratdiff.train(tiny_args("iql_stratdiff", **few))


def test_the_installed_tree_stays_as_it_is(tmp_path):
    """A run on the embedded task writes below its --out-dir and nowhere else."""
    beside = data.get_task("hopper-mini-v0").path.parent
    before = sorted(beside.iterdir())
    few = dict(offline_steps=2, online_steps=0, behavior_steps=2, guidance_scale=0.0)
    iql_dare.train(replace(tiny_args("iql_dare", out_dir=tmp_path, **few), env="hopper-mini-v0"))
    assert sorted(beside.iterdir()) == before
    (kept,) = cached(tmp_path)
    assert kept.name.startswith("hopper-mini-v0-")


def test_phases_have_random_numbers_of_their_own(tmp_path):
    """From seed and name alone: whatever was drawn before, and unlike each other's."""
    args = tiny_args("iql", out_dir=tmp_path)
    r = run.Run(args, "iql.py", "x", {})
    r.register()
    draws = {}
    for name, waste in [("offline", 3), ("online", 5), ("again", 0)]:
        torch.rand(waste)
        for _ in r.phase(name, 1):
            draws[name] = torch.rand(4).tolist()
    r.seed("offline")
    assert torch.rand(4).tolist() == draws["offline"]
    assert len({tuple(v) for v in draws.values()}) == 3
