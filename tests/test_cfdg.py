"""CFDG on IQL: labels, guidance and shares against closed forms; what a batch is made of; the ablations' switches."""

import csv
import gc
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Killed, equal_states, final_state, kill_after, log_rows, module, tiny_args

from algorithms import iql_cfdg
from algorithms.iql_cfdg import NULL, OFFLINE, ONLINE, LabelledGenerator, LabelledNet, batch_counts
from common import edm, judge, run
from common.buffer import Batch, ReplayBuffer


def rows_of(n: int, value: float) -> Batch:
    """n transitions (2 features of state, 1 of action), every number the same."""
    two, one = torch.full((n, 2), value), torch.full((n,), value)
    return Batch(two, one[:, None], one, two, torch.zeros(n))


def filled(*batches: Batch) -> ReplayBuffer:
    buffer = ReplayBuffer(sum(len(b.rewards) for b in batches), 2, 1, torch.device("cpu"))
    for batch in batches:
        buffer.extend(batch)
    return buffer


def make(out: Path, offline: ReplayBuffer, online: ReplayBuffer, **settings) -> LabelledGenerator:
    """A generator in a run directory of its own."""
    args = tiny_args("iql_cfdg", out_dir=out, **settings)
    r = run.Run(args, "iql_cfdg.py", "toy", {})
    generator = LabelledGenerator(r, args, offline, online)
    r.register(**generator.state())
    return generator


class MeansOfLabels(torch.nn.Module):
    """The exact F for N(m_c, I): D = (x + σ² m) / (1 + σ²), so F = m σ / sqrt(1 + σ²)."""

    def __init__(self, offline: float, online: float, null: float):
        super().__init__()
        self.means, self.seen = torch.tensor([offline, online, null]), []

    def forward(self, x, c_noise, labels):
        self.seen.append(labels)
        sigma = (4 * c_noise).exp()
        return (self.means[labels] * sigma / (1 + sigma**2).sqrt())[:, None].expand_as(x)


# ---- the model ----


def test_the_label_is_a_row_added_to_the_time_embedding():
    torch.manual_seed(0)
    net = LabelledNet(6, 16, 2, 8)
    x, c_noise, labels = torch.randn(3, 6), torch.randn(3), torch.tensor([OFFLINE, ONLINE, NULL])
    out = net(x, c_noise, labels)
    for i in range(3):
        expected = net.net(x[i : i + 1], c_noise[i : i + 1], net.rows.weight[labels[i]][None])
        assert torch.allclose(out[i : i + 1], expected, atol=1e-6)
    assert net.rows.weight.shape == (3, 8) and len({OFFLINE, ONLINE, NULL}) == 3
    before = net.rows.weight.detach().clone()
    net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert not (net.rows.weight == before).any()  # from scratch: the labels' rows too


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25])
def test_a_share_of_labels_is_dropped_and_the_rest_tell_the_source(p, tmp_path, capsys):
    """Half of each source whatever their sizes; p_uncond of each half become ∅."""
    offline, online = filled(rows_of(50, -1.0)), filled(rows_of(3, 1.0))
    generator = make(tmp_path, offline, online, diffusion_batch=40_001, label_dropout=p)
    torch.manual_seed(0)
    rows, labels = generator.draw()
    assert rows.shape == (40_001, 6) and labels.dtype == torch.int64
    assert (rows < 0).all(1).sum() == 20_000 and (rows > 0).all(1).sum() == 20_001
    for value, label in ((-1, OFFLINE), (1, ONLINE)):
        got = labels[rows[:, 0] == value]
        share = (got == NULL).float().mean().item()
        with capsys.disabled():
            print(f" [p_uncond {p}: {share:.3f}]", end="")
        assert share == pytest.approx(p, abs=0.012) and ((got == label) | (got == NULL)).all()


def test_without_labels_every_row_is_null_and_nothing_else_changes(tmp_path):
    offline, online = filled(rows_of(50, -1.0)), filled(rows_of(3, 1.0))
    torch.manual_seed(0)
    rows, labels = make(tmp_path / "a", offline, online, labels=False).draw()
    torch.manual_seed(0)
    assert torch.equal(rows, make(tmp_path / "b", offline, online).draw()[0])
    assert (labels == NULL).all() and (rows < 0).all(1).sum() == 8


def test_moments_weigh_the_sources_alike(tmp_path):
    """Offline mean 1, variance 1; online mean 5, variance 0: together mean 3, variance 1/2 + 1/4 · 4² = 4.5."""
    offline, online = filled(rows_of(450, 0.0), rows_of(450, 2.0)), filled(rows_of(3, 5.0))
    generator = make(tmp_path, offline, online)
    generator.regenerate(0, [offline, online], weights=[1, 1])
    assert torch.allclose(generator.moments.mean, torch.full((6,), 3.0))
    assert torch.allclose(generator.moments.std, torch.full((6,), math.sqrt(4.5)), atol=1e-4)
    assert generator.bounds.tolist() == [0, 5]


# ---- guidance ----


@pytest.mark.parametrize("w", [0.0, 0.5, 2.0])
def test_guided_means_are_one_plus_w_times_the_labels(w, tmp_path, capsys):
    """Exact denoisers of N(±1, I), N(0, I) for ∅, through begin, the sampler and the buffer; both halves of a step."""
    generator = make(
        tmp_path, filled(rows_of(2, 0.0)), filled(rows_of(2, 0.0)), guidance_w=w, sample_steps=128,
        sample_churn=80.0, synthetic_rows=10_000, sample_batch=3_000, online_label_frac=0.8,
    )  # fmt: skip
    generator.ema.module = MeansOfLabels(-1.0, 1.0, 0.0)
    torch.manual_seed(0)
    generator.refill(0)
    assert generator.boundary == 8_000 and generator.synthetic.rows == 10_000
    free = torch.tensor([0, 1, 4, 5])  # states: neither clipped nor in the reward's range
    for part, sign in ((generator.synthetic.table[:8_000], 1), (generator.synthetic.table[8_000:], -1)):
        x = part[:, free]
        with capsys.disabled():
            print(f" [w={w}, label {sign:+d}: mean {x.mean():.3f}, std {x.std():.3f}]", end="")
        assert x.mean().item() == pytest.approx(sign * (1 + w), abs=0.035)
        assert x.std().item() == pytest.approx(1.013, abs=0.03)


def test_guided_denoiser_by_hand(tmp_path):
    """σ = 1, x = 0, so D = m / 2; (1 + 2) · D_c - 2 · D_∅ with m = 4 offline, 6 online, 1 for ∅."""
    generator = make(tmp_path, filled(rows_of(2, 0.0)), filled(rows_of(2, 0.0)), guidance_w=2.0)
    generator.ema.module = net = MeansOfLabels(4.0, 6.0, 1.0)
    generator.totals[0] = 30  # rows generated; 32 of 40 are to have the online label
    denoiser, x, first = generator.begin(4)
    assert x.shape == (4, 6) and first == 0
    assert denoiser(torch.zeros(4, 6), 1.0)[:, 0].tolist() == pytest.approx([8, 8, 5, 5])
    assert [x.tolist() for x in net.seen] == [[ONLINE, ONLINE, OFFLINE, OFFLINE], [NULL] * 4]


def test_without_guidance_or_labels_one_evaluation_is_enough(tmp_path):
    for name, settings, label in (("a", dict(guidance_w=0.0), ONLINE), ("b", dict(labels=False), NULL)):
        generator = make(tmp_path / name, filled(rows_of(2, 0.0)), filled(rows_of(2, 0.0)), **settings)
        generator.ema.module = net = MeansOfLabels(4.0, 6.0, 1.0)
        generator.begin(3)[0](torch.zeros(3, 6), 1.0)
        assert [x.tolist() for x in net.seen] == [[label] * 3]


def toy(n: int, center: float, spread: float) -> Batch:
    """s ~ N(center, spread²) in 2 dimensions, a ~ U(-1, 1), r = -s_0², s' = (s_0 + a / 2, s_1 + s_0 / 2)."""
    s, a = center + spread * torch.randn(n, 2), torch.rand(n, 1) * 2 - 1
    following = torch.stack([s[:, 0] + 0.5 * a[:, 0], s[:, 1] + 0.5 * s[:, 0]], 1)
    return Batch(s, a, -s[:, 0].square(), following, a[:, 0] * 0)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Wasserstein-1 between equally many rows, mean over features but the flag."""
    return (a.sort(0).values - b.sort(0).values).abs()[:, :-1].mean().item()


def test_a_learned_model_matches_each_source_and_guidance_separates_them(tmp_path, capsys):
    """w = 0 is nearest to the online law; the more w, the farther, and the narrower; ∅ is the even mixture."""
    torch.manual_seed(0)
    offline, online = filled(toy(20_000, 0.0, 1.0)), filled(toy(2_000, 1.0, 0.5))
    settings = dict(
        diffusion_steps=1_000, diffusion_width=64, diffusion_depth=3, diffusion_time_dim=32, diffusion_batch=256,
        diffusion_lr=2e-3, sample_steps=32, synthetic_rows=4_000, sample_batch=4_000, online_label_frac=0.5,
    )  # fmt: skip
    generator = make(tmp_path, offline, online, guidance_w=0.0, **settings)
    generator.learn(0, [offline, online], weights=[1, 1])
    own, apart = online.table, distance(online.table, offline.table[:2_000])
    found = {}
    for k, w in enumerate((0.0, 0.5, 2.0)):
        generator.args = replace(generator.args, guidance_w=w)
        generator.refill(k)
        x, others = generator.synthetic.table[:2_000], generator.synthetic.table[2_000:]
        error = (x[:, 4] - x[:, 0] - 0.5 * x[:, 2]).abs().median().item()
        spread = (x.std(0) / own.std(0))[:2].mean().item()
        found[w] = distance(x, own), spread, error, distance(others, offline.table[:2_000])
    generator.args = replace(generator.args, labels=False)
    generator.refill(3)
    null_mean = generator.synthetic.table[:, :2].mean().item()
    with capsys.disabled():
        print(
            f"\n [sources {apart:.3f} apart; w: distance, spread, dynamics error, offline label's distance]"
        )
        print("".join(f" [{w}: " + ", ".join(f"{v:.3f}" for v in row) + "]" for w, row in found.items()))
        print(f" [null mean {null_mean:.3f}, of the mixture 0.5]", end="")
    assert found[0.0][0] < 0.2 * apart and found[0.0][3] < 0.2 * apart
    assert found[0.0][0] < found[0.5][0] < found[2.0][0] and found[2.0][0] > 0.1 * apart
    assert found[0.0][3] < found[2.0][3] and found[2.0][1] < found[0.0][1]
    assert null_mean == pytest.approx(0.5, abs=0.15)


# ---- the buffer of both labels ----


def test_labels_stay_apart_when_rows_are_dropped(tmp_path):
    """40 rows in chunks of 25, 32 with the online label; 3, 30 and 36 are not finite: 30 first, then 7; twice."""
    generator = make(tmp_path, filled(rows_of(2, 0.0)), filled(rows_of(2, 0.0)))
    generator.bounds.copy_(torch.tensor([-100.0, 100.0]))
    for bad in ([3, 30, 36], [31, 32, 33, 34]):
        generator.synthetic.clear()
        generator.totals.zero_()
        rows = torch.arange(50.0)[:, None].repeat(1, 6)
        rows[bad] = math.nan
        generator.keep(rows[:25])
        generator.keep(rows[25:])
        kept = [i for i in range(40) if i not in bad]
        first = [i for i in kept if i < 32]
        assert generator.boundary == len(first) and generator.synthetic.rows == len(kept)
        assert generator.synthetic.table[: len(kept), 0].tolist() == kept
        batch = generator.sample(2_000, 1_000)
        assert batch.obs.shape == (3_000, 2)
        assert set(batch.obs[:2_000, 0].tolist()) == set(first)
        assert set(batch.obs[2_000:, 0].tolist()) == set(kept) - set(first)
    assert generator.state()["generator_boundary"] is generator.boundary  # in checkpoints


@pytest.mark.parametrize("settings", [dict(online_label_frac=1.0), dict(labels=False)])
def test_one_kind_of_generated_rows_fills_the_buffer(settings, tmp_path):
    generator = make(tmp_path, filled(rows_of(2, 0.0)), filled(rows_of(2, 0.0)), **settings)
    generator.refill(0)
    assert generator.boundary == generator.synthetic.rows == 40
    assert len(generator.sample(7, 0).rewards) == 7


def test_the_labels_are_uniform_over_their_rows(tmp_path):
    generator = make(tmp_path, filled(rows_of(2, 0.0)), filled(rows_of(2, 0.0)))
    generator.bounds.copy_(torch.tensor([-100.0, 100.0]))
    generator.keep(torch.arange(40.0)[:, None].repeat(1, 6))
    torch.manual_seed(0)
    x = generator.sample(32_000, 8_000).obs[:, 0].long()
    counts = torch.bincount(x, minlength=40)
    assert (counts - 1_000).abs().max() < 160  # 5 standard deviations of a Poisson count


# ---- batches ----


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, (86, 85, 68, 17)),
        (dict(online_label_frac=1.0), (86, 85, 85, 0)),
        (dict(labels=False), (86, 85, 85, 0)),
        (dict(online_label_frac=0.5, synthetic_frac=0.5), (64, 64, 64, 64)),
        (dict(batch_size=384), (128, 128, 102, 26)),
        (dict(offline_frac=0.25), (128, 43, 68, 17)),
    ],
)
def test_counts_of_a_batch(settings, counts):
    got = batch_counts(iql_cfdg.Args(**settings))
    assert got == counts and sum(got) == settings.get("batch_size", 256)


def test_online_batches_are_made_of_all_four(dataset, tmp_path, monkeypatch):
    """Which rows the losses see: 256 of the dataset, then 128 + 128, then 86 + 85 + 68 + 17; moments weigh alike."""
    made, batches, weights = [], [], []
    init, losses, restart = LabelledGenerator.__init__, iql_cfdg.losses, LabelledGenerator.restart

    def spy_losses(nets, batch, args):
        (generator,) = made
        offline, online = generator.sources
        end = int(generator.boundary)
        kept = generator.synthetic.table[: generator.synthetic.rows]
        parts = [online.table[: online.rows], offline.table, kept[:end], kept[end:]]
        known = [{row.numpy().tobytes() for row in part} for part in parts]
        rows = torch.cat([x if x.ndim == 2 else x[:, None] for x in batch], 1)
        batches.append([sum(row.numpy().tobytes() in part for row in rows) for part in known])
        return losses(nets, batch, args)

    monkeypatch.setattr(LabelledGenerator, "__init__", lambda g, *a: made.append(g) or init(g, *a))
    monkeypatch.setattr(LabelledGenerator, "restart", lambda g, s, w: weights.append(w) or restart(g, s, w))
    monkeypatch.setattr(iql_cfdg, "losses", spy_losses)
    iql_cfdg.train(tiny_args("iql_cfdg", dataset=dataset, out_dir=tmp_path, batch_size=256, warmup_steps=5))
    assert len(batches) == 20 + 25 and weights == [[1, 1], [1, 1]]
    assert all(b == [0, 256, 0, 0] for b in batches[:20])
    assert all(b == [128, 128, 0, 0] for b in batches[20:25])  # until the first regeneration, after step 10
    assert all(b == [86, 85, 68, 17] for b in batches[25:])


# ---- whole runs ----


def log_of(out: Path) -> list[dict[str, str]]:
    (path,) = (out / "iql_cfdg").glob("*/seed0/log.csv")
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if v and k[:5] != "time/"} for row in csv.DictReader(f)]


@pytest.fixture(scope="module")
def default_run(random_rows, tmp_path_factory) -> tuple[Path, dict[str, float], LabelledGenerator]:
    """A tiny run, its result, and its generator with the last rows."""
    out, made, init = tmp_path_factory.mktemp("cfdg"), [], LabelledGenerator.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabelledGenerator, "__init__", lambda g, *a: made.append(g) or init(g, *a))
        patch.setattr(run, "LOG_EVERY", 5)
        result = iql_cfdg.train(tiny_args("iql_cfdg", dataset=random_rows, out_dir=out))
    return out, result, made[0]


ABLATIONS = [
    dict(guidance_w=0.0),
    dict(guidance_w=2.0),
    dict(labels=False),
    dict(online_label_frac=1.0),
    dict(online_label_frac=0.5),
    dict(label_dropout=0.1),
    dict(synthetic_frac=0.5),
    dict(guidance_w=0.0, label_dropout=0.0),
]


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_ablations_train_and_change_the_run(settings, default_run, random_rows, tmp_path):
    result = iql_cfdg.train(tiny_args("iql_cfdg", dataset=random_rows, out_dir=tmp_path, **settings))
    assert abs(result["final_score"]) < 1e4 and result["final_score"] != default_run[1]["final_score"]
    report = [row for row in log_of(tmp_path) if "syn/js_rows" in row][-1]
    both = settings.get("online_label_frac") != 1 and settings.get("labels", True)
    assert ("syn/offline_js_rows" in report) == both
    assert int(report["syn/online_rows"]) + int(report["syn/offline_rows"]) == 40
    assert (int(report["syn/offline_rows"]) > 0) == both


@pytest.mark.parametrize(("online_steps", "parts", "times"), [(30, 3, [10, 20]), (40, 4, [10, 20, 30])])
def test_regenerations_divide_the_online_phase(online_steps, parts, times, random_rows, tmp_path):
    args = tiny_args("iql_cfdg", dataset=random_rows, out_dir=tmp_path)
    iql_cfdg.train(replace(args, online_steps=online_steps, regenerations=parts))
    assert [int(row["step"]) for row in log_of(tmp_path) if "syn/js_rows" in row] == times
    later = [*tmp_path.glob("iql_cfdg/*/seed0/synthetic-*.npz")]
    assert sorted(p.name for p in later) == [f"synthetic-{k}.npz" for k in range(len(times))]


def test_no_regeneration_within_the_warm_up(random_rows, tmp_path):
    args = tiny_args("iql_cfdg", dataset=random_rows, out_dir=tmp_path, warmup_steps=12)
    iql_cfdg.train(args)
    assert [int(row["step"]) for row in log_of(tmp_path) if "syn/js_rows" in row] == [20]


def test_without_a_regeneration_the_run_is_the_backbones(random_rows, tmp_path):
    ours = iql_cfdg.train(tiny_args("iql_cfdg", dataset=random_rows, out_dir=tmp_path, regenerations=1))
    theirs = module("iql").train(tiny_args("iql", dataset=random_rows, out_dir=tmp_path))
    assert all(ours[k] == theirs[k] for k in ("offline_score", "final_score", "score_last4"))
    (path,) = (tmp_path / "iql").glob("*/seed0/log.csv")
    with open(path, newline="") as f:
        plain = [{k: v for k, v in row.items() if v and k[:5] != "time/"} for row in csv.DictReader(f)]
    assert log_of(tmp_path) == plain


def test_a_constant_feature_does_not_part_generated_from_real_rows():
    """States (x, 0): generated ones have 0 but for rounding, where the two histograms would share one bin of fifty."""
    torch.manual_seed(0)
    widths, own = (2, 1, 1, 2), torch.randn(4_000, 6)
    own[:, 1] = 0.0
    generated = own[torch.randperm(4_000)]
    generated[:, 1] = 1e-7 * torch.randn(4_000)
    moments = edm.Moments(6, 0, torch.device("cpu"))
    moments.fit([own])
    x = moments.normalize(generated)
    assert judge.divergence(x[:, :2], moments.normalize(own)[:, :2]) > 0.2
    assert judge.describe(generated, own, [own], moments, widths)["syn/js_states"] == 0.0
    generated[:2_000, 0] += 50.0  # all of them apart from the others: ln 2 less what the other half shares
    js = judge.describe(generated, own, [own], moments, widths)["syn/js_states"]
    assert js == pytest.approx(
        0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) + 0.5 * math.log(4 / 3), rel=0.15
    )


def test_reports_keep_the_promises_of_the_docstring(default_run):
    """Every column; divergences of online-label rows from own rows, of offline-label rows from the dataset."""
    out, _, generator = default_run
    rows = [row for row in log_of(out) if "syn/js_rows" in row]
    names = "clipped_actions clipped_rewards nonfinite terminal source_terminal fallen flag_share"
    names += " flag_precision flag_recall sim_error sim_error_shuffled reward_error mean_gap std_ratio"
    names += " nearest online_l2 js_states js_actions js_rows dataset_js_states dataset_js_actions"
    names += " dataset_js_rows offline_mean_gap offline_std_ratio offline_nearest offline_js_states"
    names += " offline_js_actions offline_js_rows online_rows offline_rows"
    promised = {f"syn/{n}" for n in names.split()}
    assert len(rows) == 2 and {k for k in rows[1] if k[:4] == "syn/"} == promised
    assert any("loss/diffusion" in row for row in log_of(out))
    report = {k: float(v) for k, v in rows[1].items() if k[:4] == "syn/"}
    assert report["syn/online_rows"] == 32 and report["syn/offline_rows"] == 8
    m, (offline, online) = generator.moments, generator.sources
    x = [m.normalize(t[:, : generator.features]) for t in (generator.synthetic.table, offline.table)]
    own = m.normalize(online.table[:20, : generator.features])
    assert report["syn/js_rows"] == pytest.approx(judge.divergence(x[0][:32], own), rel=1e-5)
    actions, states = slice(11, 14), slice(0, 11)
    expected = judge.divergence(x[0][:32, actions], own[:, actions])
    assert report["syn/js_actions"] == pytest.approx(expected, rel=1e-5)
    expected = judge.divergence(x[0][32:, states], x[1][:, states])
    assert report["syn/offline_js_states"] == pytest.approx(expected, rel=1e-5)
    assert report["syn/dataset_js_rows"] == pytest.approx(judge.divergence(x[1], own), rel=1e-5)
    gap = (x[0][:32].mean(0) - own.mean(0)).abs().max().item()
    assert report["syn/mean_gap"] == pytest.approx(gap, rel=1e-5)


def test_files_of_a_report_hold_rows_of_each_kind(default_run):
    out, _, generator = default_run
    (path,) = out.glob("iql_cfdg/*/seed0/synthetic-1.npz")
    with np.load(path) as f:
        assert {k: len(f[k]) for k in f} == {"synthetic": 40, "offline": 600, "online": 20}
        assert np.array_equal(f["synthetic"], generator.synthetic.table.numpy())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(label_dropout=0.0), "--label-dropout"),
        (dict(synthetic_rows=2), "--synthetic-rows"),
        (dict(synthetic_frac=0.01), "--synthetic-frac"),
        (dict(synthetic_frac=0.99), "--synthetic-frac"),
        (dict(online_label_frac=0.0), "--online-label-frac"),
        (dict(guidance_w=-1.0), "--guidance-w"),
        (dict(regenerations=0), "--regenerations"),
    ],
)
def test_mistakes_are_named(settings, named, random_rows, tmp_path):
    with pytest.raises(run.UsageError, match=named):
        iql_cfdg.train(tiny_args("iql_cfdg", dataset=random_rows, out_dir=tmp_path, **settings))


def test_defaults_are_the_papers():
    """Table 5 and §4.1."""
    args = iql_cfdg.Args()
    assert (args.offline_steps, args.online_steps) == (1_000_000, 1_000_000)
    assert args.online_steps // args.regenerations == 100_000
    assert (args.diffusion_depth, args.diffusion_width, args.diffusion_batch) == (6, 1_024, 256)
    assert (args.sample_steps, args.diffusion_lr, args.diffusion_steps) == (128, 3e-4, 100_000)
    assert round(args.online_label_frac * args.synthetic_rows) == 100_000


@pytest.mark.parametrize("stem", ["iql_cfdg", "pex_cfdg", "apl_cfdg"])
def test_a_run_killed_between_online_labels_of_a_later_regeneration_resumes(
    stem, dataset, tmp_path, monkeypatch
):
    """Then the buffer has rows of one label only, which is no reason to give up: four chunks, two of each label."""
    settings = dict(dataset=dataset, sample_batch=10)
    module(stem).train(tiny_args(stem, out_dir=tmp_path / "straight", **settings))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args = tiny_args(stem, out_dir=tmp_path / "killed", **settings)
    with monkeypatch.context() as patch:
        kill_after(patch, edm, "sample", 5)  # one chunk of the second time
        with pytest.raises(Killed):
            module(stem).train(args)
    gc.collect()
    module(stem).train(args)
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "killed")
    assert equal_states(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))
