"""AD2S: ratio, scores, selections, conditions, partial noising against closed forms; who sees which rows, and when."""

import gc
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, Killed, kill_after, log_rows, module, tiny_args

from algorithms import calql_ad2s as ad2s
from algorithms import iql_ad2s, wsrl_ad2s
from common import buffer, edm, judge, run

OBS, ACT = 2, 1  # of the hand-made rows [s, s, a, r, s', s', terminal]


def table(rows: list[list[float]]) -> buffer.ReplayBuffer:
    b = buffer.ReplayBuffer(len(rows) + 3, OBS, ACT, CPU)  # three rows of zeros that are not in use
    b.append(torch.tensor(rows))
    return b


def make_aligner(buffers, agent=None, **settings) -> ad2s.Aligner:
    """With identity moments; w_ψ and g_φ to be replaced."""
    args = ad2s.Args(scorer_hidden=4, diffusion_batch=64, cql_n_actions=3, **settings)
    r = SimpleNamespace(device=CPU, compiled=lambda f: f)
    aligner = ad2s.CriticAligner(r, args, agent, buffers)
    aligner.moments.mean.zero_()
    aligner.moments.std.fill_(1)
    return aligner


class Function(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *x):
        return self.f(*x)


def hand_made(**settings) -> ad2s.Aligner:
    """log w = the first state feature; g predicts s' = s, so that e = |s' - s|²; five offline rows, three online."""
    offline = table([
        [0.1, 0.0, 0.0, 1.0, 1.1, 0.0, 0.0],  # log w .1, r 1, e 1
        [0.2, 0.0, 0.0, 3.0, 0.2, 2.0, 0.0],  # .2, 3, 4
        [0.3, 0.0, 0.0, 2.0, 0.3, 0.5, 0.0],  # .3, 2, .25
        [-1.0, 0.0, 0.0, 0.0, -1.0, 3.0, 0.0],  # -1, 0, 9
        [-2.0, 0.0, 0.0, 2.0, -2.0, 1.0, 1.0],  # -2, 2, 1
    ])  # fmt: skip
    online = table([
        [1.0, 0.0, 0.0, 0.0, 1.0, 0.1, 0.0],  # 1, 0, .01
        [1.5, 0.0, 0.0, 4.0, 1.5, 0.0, 0.0],  # 1.5, 4, 0
        [0.5, 0.0, 0.0, 4.0, 0.5, 4.0, 0.0],  # .5, 4, 16
    ])  # fmt: skip
    aligner = make_aligner([offline, online], **settings)
    aligner.nets["ratio"] = Function(lambda x: x[:, :1])
    aligner.nets["dynamics"] = Function(lambda x: x[:, :OBS])
    return aligner


LOG_W = np.array([0.1, 0.2, 0.3, -1, -2, 1, 1.5, 0.5])
ERROR = np.array([1, 4, 0.25, 9, 1, 0.01, 0, 16])
REWARD = np.array([1.0, 3, 2, 0, 2, 0, 4, 4])
ADVANTAGE = (REWARD - 2) / math.sqrt(2.25)  # mean 2, mean square 50/8 - 4 = 2.25

# ---- the density ratio ----

NORMAL = torch.distributions.Normal(0.0, 1.0)


def gaussians() -> tuple[torch.Tensor, torch.Tensor]:
    """Quantiles of P = N(0.8, 0.7²) and M = N(0, 1): means over them are integrals."""
    z = NORMAL.icdf((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    return 0.8 + 0.7 * z, z


def log_ratio(x: torch.Tensor) -> torch.Tensor:
    """log P/M."""
    return -0.5 * ((x - 0.8) / 0.7) ** 2 - math.log(0.7) + 0.5 * x**2


def test_objective_at_the_true_ratio_is_twice_the_divergence():
    p, m = gaussians()
    j = 2 * math.log(2) - ad2s.ratio_loss(log_ratio(p), log_ratio(m)).item()
    kl = [math.log(2) - torch.log1p(torch.exp(s * log_ratio(x))).mean().item() for s, x in ((-1, p), (1, m))]
    assert j == pytest.approx(0.23361, abs=2e-5) and j == pytest.approx(sum(kl), rel=1e-12)


def test_loss_is_equation_7_for_any_ratio():
    """f(t) = t log(2t/(t+1)) + log(2/(t+1)): f' by autograd, f* by its supremum over a grid."""
    torch.manual_seed(0)
    own, dataset = 2 * torch.randn(5, dtype=torch.float64), 2 * torch.randn(5, dtype=torch.float64)

    def f(t):
        return t * (2 * t / (t + 1)).log() + (2 / (t + 1)).log()

    def slope(t):
        t = t.clone().requires_grad_()
        return torch.autograd.grad(f(t).sum(), t)[0]

    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64).exp()
    conjugate = torch.stack([(v * grid - f(grid)).max() for v in slope(dataset.exp())])
    j = slope(own.exp()).mean() - conjugate.mean()
    assert 2 * math.log(2) - ad2s.ratio_loss(own, dataset).item() == pytest.approx(j.item(), abs=1e-7)


def test_a_small_network_learns_the_ratio(capsys):
    torch.manual_seed(0)
    net = ad2s.scorer_net(1, 64, 1, torch.nn.ReLU, 0.0)
    opt = torch.optim.Adam(net.parameters(), 5e-3, fused=True)
    for step in range(1500):
        opt.param_groups[0]["lr"] = 5e-3 * (1 - step / 1500)
        p, m = 0.8 + 0.7 * torch.randn(512, 1), torch.randn(512, 1)
        loss = ad2s.ratio_loss(net(p)[:, 0], net(m)[:, 0])
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        p, m = (x[::20, None].float() for x in gaussians())
        rmse = (net(m)[:, 0] - log_ratio(m)[:, 0]).square().mean().sqrt().item()
        w_off, inverse_w_on = net(m).exp().mean().item(), (-net(p)).exp().mean().item()
    with capsys.disabled():
        print(f" [log-ratio rmse {rmse:.3f}, E_off[w] {w_off:.3f}, E_on[1/w] {inverse_w_on:.3f}]", end="")
    assert rmse < 0.2 and w_off == pytest.approx(1, abs=0.05) and inverse_w_on == pytest.approx(1, abs=0.15)


def test_few_own_rows_are_not_memorised(capsys):
    """The scorers' own step at the mini preset's numbers, N(m, I) against N(0, I) in 26 dimensions, |m| = 1.

    log w = m·x - 1/2; on fresh rows the net without dropout is off by 2.4 (rms) and has E_on[1/w] = 54.
    """
    torch.manual_seed(0)
    shift = torch.full((26,), 26**-0.5)
    preset = run.with_presets(ad2s.Args, ad2s.ENV_PRESETS, "hopper-mini-v0")
    buffers = [buffer.ReplayBuffer(n, 11, 3, CPU) for n in (20_000, 2_000)]
    for b, mean in zip(buffers, (0, shift), strict=True):
        b.append(F.pad(torch.randn(len(b.table), 26) + mean, (0, 1)))
    aligner = ad2s.CriticAligner(SimpleNamespace(device=CPU, compiled=lambda f: f), preset, None, buffers)
    for _ in range(2_000):
        aligner.scorer_step()
    for b, mean in zip(buffers, (0, shift), strict=True):
        b.table[:, :26] = torch.randn(len(b.table), 26) + mean
    log_w, exact = aligner.scores()["log_w"], torch.cat([b.table[:, :26] for b in buffers]) @ shift - 0.5
    rmse = (log_w - exact)[:20_000].square().mean().sqrt().item()
    w_off, inverse_w_on = log_w[:20_000].exp().mean().item(), (-log_w[20_000:]).exp().mean().item()
    with capsys.disabled():
        print(f" [log-ratio rmse {rmse:.3f}, E_off[w] {w_off:.3f}, E_on[1/w] {inverse_w_on:.3f}]", end="")
    assert rmse < 0.8 and w_off == pytest.approx(1, abs=0.25) and inverse_w_on == pytest.approx(1, abs=0.7)


def test_every_tenth_block_tests_the_ratio_and_does_not_train_it():
    index = torch.arange(2_000).repeat(500)
    aside = ad2s.set_aside(index[:2_000])
    assert aside.nonzero()[:, 0].tolist() == [*range(900, 1_000), *range(1_900, 2_000)]
    torch.manual_seed(0)
    drawn = ad2s.moved_off_aside(index)
    assert torch.equal(drawn[~ad2s.set_aside(index)], index[~ad2s.set_aside(index)])
    counts = drawn.bincount(minlength=2_000)
    assert counts[aside].sum() == 0 and counts.sum() == 1_000_000
    # the others: 500 + Binomial(500, 1/9), 555.6 ± 7
    assert counts[~aside].float().mean().item() == pytest.approx(5_000 / 9)
    assert (counts[~aside] - 5_000 / 9).abs().max() < 5 * 7.03
    seen, rows = [], torch.zeros(1_000, 2 * OBS + ACT + 2)
    rows[:, 0] = torch.arange(1_000) / 1_000
    aligner = make_aligner([table(rows.tolist()), table(rows.tolist())])

    def loss(nets, own, dataset, *rest):
        seen.extend([own, dataset])
        return ad2s.scorer_losses(nets, own, dataset, *rest)

    aligner.loss = loss
    for _ in range(20):
        aligner.scorer_step()
    assert torch.cat(seen)[:, 0].max() < 0.8995 and len(torch.cat(seen)) == 20 * 2 * 256
    aligner.nets["ratio"] = Function(lambda x: 4 * (x[:, :1] - 0.5))
    aligner.select()
    log_w = 4 * (np.arange(900, 1_000) / 1_000 - 0.5)  # of the rows set aside, in both buffers
    assert judge.selected_rows(aligner)["align/w_off"] == pytest.approx(np.exp(log_w).mean(), rel=1e-5)
    assert judge.selected_rows(aligner)["align/inverse_w_on"] == pytest.approx(
        np.exp(-log_w).mean(), rel=1e-5
    )
    balance = (1 / (1 + np.exp(log_w))).mean() / (1 / (1 + np.exp(-log_w))).mean()
    assert judge.selected_rows(aligner)["align/w_balance"] == pytest.approx(balance, rel=1e-5)
    loss = (np.log1p(np.exp(log_w)) + np.log1p(np.exp(-log_w))).mean()
    assert judge.selected_rows(aligner)["align/ratio_loss"] == pytest.approx(loss, rel=1e-5)


def test_checks_are_1_at_the_true_ratio_and_scores_do_not_drop_units():
    p, m = gaussians()
    logs = judge.ratio_checks(log_ratio(p), log_ratio(m))
    assert logs["align/w_balance"] == pytest.approx(1, abs=1e-4)
    assert logs["align/w_off"] == pytest.approx(1, abs=1e-4)
    assert logs["align/inverse_w_on"] == pytest.approx(1, abs=2e-2)  # the integrand has a heavy tail
    aligner = make_aligner(hand_made().buffers)
    assert torch.equal(aligner.scores()["log_w"], aligner.scores()["log_w"])
    assert aligner.nets.training


def test_scorer_losses_by_hand_and_whose_rows_they_are():
    """D_on with softplus(-l), D_off with softplus(l), g_φ on their union; both networks move."""
    aligner = hand_made()
    s = aligner.scores()
    x = [aligner.inputs(b.table[: b.rows]) for b in (aligner.buffers[1], aligner.buffers[0])]
    loss, logs = ad2s.scorer_losses(aligner.nets, *x, torch.cat(x), OBS)
    ratio = np.log1p(np.exp(-LOG_W[5:])).mean() + np.log1p(np.exp(LOG_W[:5])).mean()
    assert logs["loss/ratio"].item() == pytest.approx(ratio, rel=1e-6)
    assert logs["loss/dynamics"].item() == pytest.approx(ERROR.mean(), rel=1e-6)
    assert loss.item() == pytest.approx(ratio + ERROR.mean(), rel=1e-6)
    assert np.allclose(s["error"].numpy(), ERROR, atol=1e-6)
    fresh = make_aligner(aligner.buffers)
    before = [p.clone() for p in fresh.nets.parameters()]
    fresh.scorer_step()
    assert all(not torch.equal(a, b) for a, b in zip(before, fresh.nets.parameters(), strict=True))


def test_a_constant_feature_of_the_dataset_cannot_blow_up_the_inputs():
    offline, online = table([[0.0] * 7, [1.0] + [0.0] * 6]), table([[0.0, 5.0] + [0.0] * 5])
    aligner = make_aligner([offline, online])
    aligner.moments.fit([offline.table[:2, : 2 * OBS + ACT + 1]])
    assert aligner.inputs(online.table[:1])[0].tolist() == pytest.approx([-1, 10, 0, 0, 0, 0], abs=1e-3)


# ---- scores, selections, conditions ----


@pytest.mark.parametrize(("beta_dr", "beta_curi"), [(10.0, 10.0), (1.0, 100.0), (0.0, 0.0)])
def test_scores_by_hand(beta_dr, beta_curi):
    """Eqs. 5, 8, 9; β = 0 is Table 11."""
    s = hand_made(beta_dr=beta_dr, beta_curi=beta_curi).scores()
    expected = dict(
        log_w=LOG_W, error=ERROR, reward=REWARD, advantage=ADVANTAGE, log_u=LOG_W + beta_dr * ADVANTAGE,
        log_y=beta_curi * ADVANTAGE + np.log(ERROR + 1e-8),
    )  # fmt: skip
    assert set(s) == set(expected)
    for k, v in expected.items():
        assert s[k].dtype == torch.float64 and np.allclose(s[k].numpy(), v, rtol=1e-5, atol=1e-6), k


def test_scores_do_not_depend_on_the_chunk(monkeypatch):
    whole = hand_made().scores()
    monkeypatch.setattr(ad2s.Aligner, "CHUNK", 2)
    chunks = hand_made().scores()
    assert all(torch.equal(whole[k], chunks[k]) for k in whole)


def test_relative_advantage_ignores_scale_and_bias_and_survives_rare_and_constant_rewards():
    rewards = torch.tensor([0.0, 1.0, 5.0, 2.0], dtype=torch.float64)
    a = ad2s.relative_advantage(rewards)
    assert torch.allclose(a, ad2s.relative_advantage(10 * rewards - 5))
    assert a.mean().abs() < 1e-12 and a.square().mean() == pytest.approx(1)
    assert ad2s.relative_advantage(torch.ones(5)).tolist() == [0] * 5
    rare = (torch.arange(1_000_000) == 7).double()
    assert ad2s.relative_advantage(rare)[7].item() == pytest.approx(1000, rel=1e-3)


SELECTIONS = [  # settings, D_aligned, D_re
    # log w alone: 1.5, 1, .5, .3 are rows 6, 5, 7, 2; of them the largest e: 16 and .25
    (dict(beta_dr=0.0, beta_curi=0.0), {6, 5, 7, 2}, {7, 2}),
    # β = 10: the rewards 4, 4, 3, 2 (row 2 before row 4 by log w); of them y: rows 7 and 1
    (dict(), {6, 7, 1, 2}, {7, 1}),
    # w/o DA: all rows; y: rows 7, 6 have r = 4 (13.3 + log e: 16.1, -5.1), 1: 8.05, 4: 0, 2: -1.4
    (dict(p_dr=1.0), set(range(8)), {7, 1, 4, 2}),
    (dict(p_dr=1.0, p_curi=1.0), set(range(8)), set(range(8))),
    (dict(p_dr=0.01, p_curi=0.01), {6}, {6}),
    # PGR: e alone, the top quarter
    (dict(p_dr=1.0, p_curi=0.25, beta_curi=0.0), set(range(8)), {7, 3}),
]


@pytest.mark.parametrize(("settings", "aligned", "reused"), SELECTIONS)
def test_selections_on_hand_made_rows(settings, aligned, reused):
    aligner = hand_made(**settings)
    aligner.select()
    rows = torch.cat([b.table[: b.rows] for b in aligner.buffers])
    assert torch.equal(aligner.reused, rows[sorted(reused)])
    assert torch.equal(aligner.reused_conditions, aligner.conditions[sorted(reused)])
    logs = judge.selected_rows(aligner)
    for name, selected in (("aligned", aligned), ("reused", reused)):
        share = len(selected & set(range(5))) / len(selected)
        assert logs[f"align/offline_share_{name}"] == pytest.approx(share)
    assert logs["align/w_off"] == pytest.approx(np.exp(LOG_W[:5]).mean(), rel=1e-5)
    assert logs["align/inverse_w_on"] == pytest.approx(np.exp(-LOG_W[5:]).mean(), rel=1e-5)
    error = logs["align/model_error"]  # e/2: lower median of 1, 1
    assert error == pytest.approx(math.sqrt(0.5), rel=1e-5)


def test_top_fraction_is_the_highest_and_ties_go_to_earlier_rows():
    assert ad2s.top_fraction(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, -torch.inf]), 0.5).tolist() == [1, 2, 4]
    assert ad2s.top_fraction(torch.tensor([1.0, 1.0]), 0.1).tolist() == [0]


def test_condition_is_the_clipped_standard_score_of_log_y():
    log_y = torch.tensor([0.0, 2.0, 4.0, 10.0], dtype=torch.float64)  # mean 4, variance 14
    expected = [x / math.sqrt(14) for x in (-4, -2, 0, 6)]
    assert ad2s.scaled_condition(log_y).tolist() == pytest.approx(expected, rel=1e-6)
    outlier = torch.zeros(1000, dtype=torch.float64)
    outlier[0], outlier[1] = 1e5, -1e5
    c = ad2s.scaled_condition(outlier)
    assert c[:3].tolist() == [5, -5, 0] and c.dtype == torch.float32
    assert ad2s.scaled_condition(torch.full((3,), 7.0)).tolist() == [0, 0, 0]


def test_amplification_raises_every_condition():
    c = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    assert ad2s.amplified(c, 1.2).tolist() == pytest.approx([-1.6, -0.8, 0, 3.6])
    assert ad2s.amplified(c, 2.0).tolist() == [0, 0, 0, 6]
    assert torch.equal(ad2s.amplified(c, 1.0), c)


def test_rank_correlation_with_ties():
    """Ranks 1.5, 1.5, 3, 4 and 1, 2, 4, 3; Pearson's of them."""
    a, b = torch.tensor([5.0, 5.0, 6.0, 9.0]), torch.tensor([-1.0, 0.0, 7.0, 3.0])
    expected = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 4, 3])[0, 1]
    assert judge.rank_correlation(a, b) == pytest.approx(expected)
    assert judge.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert judge.rank_correlation(a, torch.ones(4)) == 0


def test_advantage_from_the_critics_by_hand():
    """min of the two at (s, a) less its mean over the same uniform actions for every state; not standardised."""
    agent = {"qf": lambda obs, a: torch.stack([obs[:, 0] + a[:, 0] ** 2, 100 + 0 * a[:, 0]])}
    aligner = hand_made(agent=agent, advantage="q")
    aligner.buffers[0].table[0, OBS] = 0.5
    s = aligner.scores()
    drawn = aligner.random_actions[:, 0].double()
    assert drawn.shape == (3,) and drawn.abs().max() <= 1
    actions = torch.tensor([0.5] + [0.0] * 7, dtype=torch.float64)
    expected = actions**2 - (drawn**2).mean()
    assert torch.allclose(s["advantage"], expected, atol=1e-6)
    assert torch.allclose(s["log_u"] - s["log_w"], 10 * expected, atol=1e-5)
    agent["qf"] = lambda obs, a: torch.stack([obs[:, 0] + a[:, 0] ** 2, -100 + 3 * a[:, 0]])
    assert torch.allclose(aligner.scores()["advantage"], 3 * (actions - drawn.mean()), atol=1e-4)


def test_on_iql_the_selection_by_its_value_network_by_hand():
    """A = min Q̂(s, a) - V(s), of the targets, whatever the critics say: U88. Four rows, of which the best by u stay.

    log w = s_0, e = |s' - s|², Q̂ = (2 a, 2 a + 5), V = s_1: A = 2 a - s_1; log u = s_0 + A; log y = 2 A + log e.
    """
    rows = [  # s, a, r, s', terminal
        [0.5, 1.0, 0.5, 9.0, 0.5, 3.0, 0.0],  # A 0, log u 0.5, e 4, log y 1.39
        [0.0, 0.0, 0.4, 0.0, 0.0, 1.0, 0.0],  # A 0.8, log u 0.8, e 1, log y 1.6
        [0.3, -1.0, -0.2, 0.0, 0.3, -0.5, 0.0],  # A 0.6, log u 0.9, e 0.25, log y -0.19
        [-1.0, 1.0, 0.9, 0.0, -1.0, 4.0, 0.0],  # A 0.8, log u -0.2, e 9, log y 3.80
    ]
    agent = {
        "q_target": lambda _, a: torch.stack([2 * a[:, 0], 2 * a[:, 0] + 5]),
        "qf": lambda _, a: torch.stack([-50 * a[:, 0]] * 2),
        "vf": lambda obs: obs[:, 1],
    }
    settings = dict(scorer_hidden=4, advantage="q", beta_dr=1.0, beta_curi=2.0, p_dr=0.75, p_curi=2 / 3)
    r, buffers = SimpleNamespace(device=CPU, compiled=lambda f: f), [table(rows[:3]), table(rows[3:])]
    aligner = iql_ad2s.ValueAligner(r, iql_ad2s.Args(**settings), agent, buffers)
    aligner.moments.mean.zero_()
    aligner.moments.std.fill_(1)
    aligner.nets["ratio"] = Function(lambda x: x[:, :1])
    aligner.nets["dynamics"] = Function(lambda x: x[:, :OBS])
    aligner.select()
    s = aligner.scored
    assert s["advantage"].tolist() == pytest.approx([0.0, 0.8, 0.6, 0.8], abs=1e-6)
    assert s["log_u"].tolist() == pytest.approx([0.5, 0.8, 0.9, -0.2], abs=1e-6)
    log_y = [math.log(4), 1.6, 1.2 + math.log(0.25), 1.6 + math.log(9)]
    assert s["log_y"].tolist() == pytest.approx(log_y, abs=1e-5)
    assert aligner.aligned.tolist() == [2, 1, 0]  # the own row, far from the policy, is out
    assert aligner.chosen.tolist() == [0, 1] and torch.equal(aligner.reused, torch.tensor(rows[:2]))


# ---- the conditioned model ----


def test_a_dropped_condition_is_a_learned_vector():
    torch.manual_seed(0)
    net = ad2s.ConditionedNet(ad2s.TransitionNet(3, 8, 2, 4), 4)
    x, noise = torch.randn(5, 3), torch.randn(5)
    yes, no = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    c = torch.randn(5)
    assert torch.equal(net(x, noise, c, no), net(x, noise, c + 1, no))
    assert not torch.allclose(net(x, noise, c, yes), net(x, noise, c + 1, yes))
    assert torch.allclose(net(x, noise, c, no), net.net(x, noise), atol=1e-6)  # it starts at 0
    mixed = torch.tensor([True, False, True, False, False])
    expected = torch.where(mixed[:, None], net(x, noise, c, yes), net(x, noise, c, no))
    assert torch.allclose(net(x, noise, c, mixed), expected, atol=1e-6)
    net(x, noise, c, mixed).square().sum().backward()
    assert net.null.grad.abs().sum() > 0 and net.embed[0].weight.grad.abs().sum() > 0
    net.null.data.fill_(3.0)
    net.reset_parameters()
    assert net.null.abs().max() == 0


def test_training_rows_carry_their_own_conditions_and_a_quarter_is_dropped():
    aligner = hand_made()
    aligner.select()
    g = SimpleNamespace(aligner=aligner, real=aligner.buffers, features=2 * OBS + ACT + 1)
    g.args = ad2s.Args(diffusion_batch=20_000)
    rows, c, keep = ad2s.AlignedGenerator.draw(g)
    assert rows.shape == (20_000, 6) and keep.dtype == torch.bool
    # log w is the first feature
    by_first = dict(zip(LOG_W.round(3), aligner.conditions.tolist(), strict=True))
    assert c.tolist() == [by_first[round(x, 3)] for x in rows[:, 0].tolist()]
    assert keep.float().mean().item() == pytest.approx(0.75, abs=0.01)
    shares = [(rows[:, 0] == x).float().mean().item() for x in rows[:, 0].unique()]
    assert len(shares) == 8 and shares == pytest.approx([1 / 8] * 8, abs=0.01)  # uniform over the union
    g.args = ad2s.Args(diffusion_batch=50, guidance_eta=-1.0)
    assert not ad2s.AlignedGenerator.draw(g)[2].any()  # w/o CG


@pytest.mark.parametrize(
    ("mu", "first", "sigma"),
    [(0.1, 115, 0.015), (0.2, 102, 0.081), (0.3, 89, 0.315), (0.4, 76, 0.981), (0.5, 64, 2.43), (0.8, 25, 24.9),
     (1.0, 0, 80.0)],
)  # fmt: skip
def test_partial_noising_starts_where_the_table_says(mu, first, sigma):
    assert ad2s.first_step(128, mu) == first
    assert edm.sigma_grid(128)[first] == pytest.approx(sigma, rel=0.03)


def test_first_step_is_not_a_victim_of_rounding():
    assert ad2s.first_step(10, 0.9) == 1 and ad2s.first_step(10, 0.7) == 3 and ad2s.first_step(32, 1e-9) == 31


def start_of(n: int, condition: float, **settings) -> tuple:
    """begin() of n reused rows ~ N(-1, 1) with stub denoisers: N(c, 1) told c, N(0, 1) without."""
    torch.manual_seed(1)
    aligner = hand_made(**settings)
    aligner.select()
    aligner.reused = torch.randn(50_000, 7) - 1
    aligner.reused_conditions = torch.full((50_000,), condition)

    def denoiser(rows, c, keep):
        assert len(c) == len(keep) == rows
        mean = torch.where(keep, c, 0.0)[:, None]
        return lambda x, sigma: (x + sigma**2 * mean) / (1 + sigma**2)

    g = SimpleNamespace(aligner=aligner, args=aligner.args, r=aligner.r, denoiser=denoiser, features=6)
    g.moments, g.noise = edm.Moments(6, 0, CPU), lambda n: 80 * torch.randn(n, 6)
    return ad2s.AlignedGenerator.begin(g, n)


GUIDED = [  # settings, wanted mean: (1 + η) ĉ of the condition 0.5 or -0.5
    (0.5, dict(), 3 * 0.6),
    (-0.5, dict(), 3 * -0.4),
    (0.5, dict(guidance_eta=0.0), 0.6),
    (0.5, dict(guidance_eta=-1.0), 0.0),
    (0.5, dict(amplification=2.0, guidance_eta=1.0), 2.0),
    (0.5, ad2s.PGR, 1.5 * 0.5),
]


@pytest.mark.parametrize(("condition", "settings", "mean"), GUIDED)
def test_guided_mean_through_begin(condition, settings, mean, capsys):
    """From pure noise: N((1 + η) ĉ, 1), whose mean the ODE from 80 n reaches but for 1/80."""
    d, x, first = start_of(30_000, condition, **(dict(noising_scale=1.0) | settings))
    assert first == 0 and x.std().item() == pytest.approx(80, rel=0.01)
    x = edm.sample(d, x, 64, 0.0, first)
    with capsys.disabled():
        print(f" [c {condition}, {settings}: mean {x.mean().item():.3f}, wanted {mean:.3f}]", end="")
    assert x.mean().item() == pytest.approx(mean * (1 - 1 / 80), abs=0.012)
    assert x.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("mu", "kept"), [(0.5, 0.379), (0.3, 0.954)])
def test_partial_noising_through_begin_keeps_part_of_the_row(mu, kept):
    """x0 ~ N(-1, 1) noised to σ_i; the ODE leaves M + (x_i - M) / sqrt(1 + σ_i²), M = (1 + η) ĉ."""
    d, x, first = start_of(100_000, 0.5, noising_scale=mu)
    sigma, wanted = edm.sigma_grid(128)[first], 3 * 0.6
    assert first == ad2s.first_step(128, mu)
    assert x.mean().item() == pytest.approx(-1, abs=0.03)
    assert x.std().item() == pytest.approx(math.sqrt(1 + sigma**2), rel=0.01)
    x = edm.sample(d, x, 128, 0.0, first)
    share = 1 / math.sqrt(1 + sigma**2)
    assert share == pytest.approx(kept, abs=2e-3)
    assert x.mean().item() == pytest.approx(wanted + share * (-1 - wanted), abs=0.03)


# ---- settings ----


def test_presets_are_table_4():
    def values(env):
        a = run.with_presets(ad2s.Args, ad2s.ENV_PRESETS, env)
        return a.noising_scale, a.p_dr, a.p_curi

    assert values("maze2d-large-v1") == (0.8, 0.8, 0.8)
    for env in ("walker2d-random-v2", "antmaze-large-play-v2", "pen-cloned-v1", "door-cloned-v1"):
        assert values(env) == (0.5, 0.5, 0.5)
    a = ad2s.Args()
    assert (a.beta_dr, a.beta_curi, a.amplification) == (10, 10, 1.2)
    assert (a.guidance_eta, a.condition_dropout) == (2, 0.25)
    assert (a.scorer_hidden, a.scorer_lr, a.diffusion_width, a.diffusion_depth) == (256, 3e-4, 1024, 6)
    assert (a.sample_steps, a.sample_churn) == (128, 0)
    assert (a.diffusion_steps, a.regenerate_every, a.warmup_steps) == (50_000, 10_000, 5_000)
    calql = module("calql").ENV_PRESETS  # the learner's are Cal-QL's
    for prefix, row in calql.items():
        ours, theirs = ad2s.ENV_PRESETS[prefix], {k: v for k, v in row.items() if k != "offline_frac"}
        assert {k: v for k, v in ours.items() if k in row} == theirs


def test_offline_settings_are_the_backbones():
    assert ad2s.OFFLINE_SETTINGS == module("calql").OFFLINE_SETTINGS


def test_pgr_is_a_choice_of_settings():
    args = ad2s.method_settings(ad2s.Args(pgr=True))
    assert (args.p_dr, args.p_curi, args.beta_curi, args.noising_scale) == (1, 0.25, 0, 1)
    assert (args.guidance_eta, args.amplification, args.synthetic_frac) == (0.5, 1, 0.5)
    given = ad2s.Args(pgr=True, p_curi=0.25)
    assert ad2s.method_settings(given) == ad2s.method_settings(replace(given, env="hopper-medium-v2"))
    ad2s.method_settings(run.with_presets(ad2s.Args, ad2s.ENV_PRESETS, "maze2d-large-v1", pgr=True))
    plain = ad2s.Args(p_curi=0.1)
    assert ad2s.method_settings(plain) is plain


def test_conditions_may_always_or_never_be_dropped_where_one_model_is_enough():
    for changes in (dict(guidance_eta=0.0, condition_dropout=0.0), dict(guidance_eta=-1.0, condition_dropout=1.0),
                    dict(guidance_eta=-1.0, condition_dropout=0.0)):  # fmt: skip
        args = ad2s.Args(**changes)
        assert ad2s.method_settings(args) is args


def test_args_json_says_what_ran_with_pgr(dataset, tmp_path):
    args = tiny_args("calql_ad2s", dataset=dataset, out_dir=tmp_path, online_steps=0, pgr=True)
    ad2s.train(args)
    (path,) = tmp_path.glob("**/args.json")
    settings = run.read_json(path)["settings"]
    assert settings["pgr"] == {"value": True, "origin": "flag"}
    wanted = dict(
        p_dr=1, beta_dr=0, p_curi=0.25, beta_curi=0, noising_scale=1, guidance_eta=0.5, amplification=1
    )
    assert {k: settings[k]["value"] for k in wanted} == wanted
    assert ad2s.train(args)["offline_score"]  # the same command: finished


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(pgr=True, p_curi=0.1), "--p-curi: got 0.1; allowed: 0.25 with --pgr"),
        (dict(pgr=True, guidance_eta=1.0), "--guidance-eta: got 1.0; allowed: 0.5 with --pgr"),
        (dict(pgr=True, beta_dr=5.0), "--beta-dr: got 5.0; allowed: 0.0 with --pgr"),
        (dict(pgr=True, condition_dropout=0.0), "--condition-dropout: got 0.0; allowed: more than 0"),
        (dict(condition_dropout=0.0), "--condition-dropout: got 0.0; allowed: more than 0"),
        (dict(condition_dropout=1.0), "--condition-dropout: got 1.0; allowed: less than 1"),
        (dict(condition_dropout=1.0, guidance_eta=0.0), "--condition-dropout: got 1.0; allowed: less than 1"),
        (dict(warmup_steps=0), "--warmup-steps: got 0; allowed: at least 1"),
        (dict(p_dr=0.0), r"--p-dr: got 0.0; allowed: \(0, 1\]"),
        (dict(noising_scale=0.0), r"--noising-scale: got 0.0; allowed: \(0, 1\]"),
        (dict(guidance_eta=-2.0), "--guidance-eta"),
        (dict(synthetic_frac=0.001), "--synthetic-frac"),
        (dict(calibrate_online=True, calibrate=False), "--calibrate-online"),
    ],
)
def test_bad_settings_are_refused(changes, word, dataset, tmp_path):
    with pytest.raises(run.UsageError, match=word):
        ad2s.train(tiny_args("calql_ad2s", dataset=dataset, out_dir=tmp_path, **changes))


# ---- the loop ----

ABLATIONS = [
    dict(p_dr=1.0),
    dict(noising_scale=1.0),
    dict(guidance_eta=-1.0),
    dict(advantage="q"),
    dict(p_dr=0.1, p_curi=0.1),
    dict(amplification=2.0, sample_churn=80.0),
    dict(beta_dr=100.0, beta_curi=100.0),
    dict(beta_dr=0.0, beta_curi=0.0),
    dict(lagrange=True, max_target_backup=True, reward_scale=10.0, reward_bias=-5.0),
]


@pytest.mark.parametrize("changes", ABLATIONS)
def test_ablations_train(changes, dataset, tmp_path):
    settings = dict(dataset=dataset, online_steps=25, offline_steps=5, eval_every=25, eval_episodes=1)
    result = ad2s.train(tiny_args("calql_ad2s", out_dir=tmp_path, **settings | changes))
    assert all(math.isfinite(result[k]) for k in ("offline_score", "final_score"))
    rows = log_rows(tmp_path / "calql_ad2s")
    assert all(math.isfinite(float(v)) for row in rows for k, v in row.items() if v and k != "phase")
    reports = [r for r in rows if r.get("syn/model_error")]
    assert [int(r["step"]) for r in reports][:3] == [10, 11, 22]


@pytest.mark.parametrize("frac", [0.5, 0.25])
def test_who_sees_which_rows_and_when(frac, dataset, tmp_path, monkeypatch):
    """Scorers at every environment step; regenerations at 10, 11, 22; own and generated rows only, in their shares."""
    seen, scored, regenerated, batches = {}, [], [], []
    registered, losses = run.Run.register, ad2s.losses

    def register(self, **objects):
        seen.update(objects)
        registered(self, **objects)

    def spied_losses(nets, batch, bound, *rest):
        if bound is None:  # online
            batches.append((seen["online"].rows, batch))
        return losses(nets, batch, bound, *rest)

    def spied_step(self):
        scored.append(seen["online"].rows)
        return step(self)

    def spied_regenerate(self, k, sources):
        regenerated.append((k, [b.rows for b in sources]))
        return regenerate(self, k, sources)

    step, regenerate = ad2s.Aligner.scorer_step, ad2s.Generator.regenerate
    monkeypatch.setattr(run.Run, "register", register)
    monkeypatch.setattr(ad2s, "losses", spied_losses)
    monkeypatch.setattr(ad2s.Aligner, "scorer_step", spied_step)
    monkeypatch.setattr(ad2s.Generator, "regenerate", spied_regenerate)
    ad2s.train(tiny_args("calql_ad2s", dataset=dataset, out_dir=tmp_path, synthetic_frac=frac))
    fixed = regenerated[0][1][0]
    assert scored == list(range(1, 31))
    assert regenerated == [(0, [fixed, 10]), (1, [fixed, 11]), (2, [fixed, 22])]
    assert [rows for rows, _ in batches] == list(range(11, 31))
    online, synthetic = seen["online"], seen["generator_synthetic"]
    own = {tuple(x) for x in online.table[: online.rows, : online.widths[0]].tolist()}
    last = {tuple(x) for x in synthetic.table[: synthetic.rows, : synthetic.widths[0]].tolist()}
    n = round(frac * 16)
    for rows, batch in batches:
        obs = [tuple(x) for x in batch.obs.tolist()]
        assert len(obs) == 16 and set(obs[: 16 - n]) <= own and not set(obs[16 - n :]) & own
        if rows > 22:
            assert set(obs[16 - n :]) <= last


@pytest.mark.parametrize(("algorithm", "step", "parts"), [(iql_ad2s, "losses", 1), (wsrl_ad2s, "update", 4)])
def test_on_other_backbones_too_a_batch_is_own_and_generated_rows(
    algorithm, step, parts, dataset, tmp_path, monkeypatch
):
    """A quarter of 16 rows, or of each of the four parts of WSRL's 64 (U89), is generated; none is the dataset's."""
    seen, batches, original = {}, [], getattr(algorithm, step)
    registered = run.Run.register

    def register(self, **objects):
        seen.update(objects)
        registered(self, **objects)

    def spied(nets, *rest):
        batch = next(x for x in rest if isinstance(x, buffer.Batch))
        if seen["online"].rows:
            batches.append(batch)
        return original(nets, *rest)

    monkeypatch.setattr(run.Run, "register", register)
    monkeypatch.setattr(algorithm, step, spied)
    stem = algorithm.__name__.split(".")[1]
    algorithm.train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, synthetic_frac=0.25))
    online = seen["online"]
    own = {tuple(x) for x in online.table[: online.rows, : online.widths[0]].tolist()}
    with h5py.File(dataset) as f:
        theirs = {tuple(x) for x in f["observations"][()].tolist()}
    assert len(batches) == 20
    for batch in batches:
        obs = [tuple(x) for x in batch.obs.tolist()]
        assert len(obs) == 16 * parts and not set(obs) & theirs
        assert [sum(x in own for x in obs[k::parts]) for k in range(parts)] == [12] * parts


@pytest.mark.parametrize("algorithm", [iql_ad2s, wsrl_ad2s])
@pytest.mark.parametrize("changes", [dict(advantage="q"), dict(noising_scale=1.0), dict(pgr=True)])
def test_ablations_train_on_other_backbones(algorithm, changes, dataset, tmp_path):
    stem = algorithm.__name__.split(".")[1]
    settings = dict(dataset=dataset, online_steps=25, offline_steps=5, eval_every=25, eval_episodes=1)
    result = algorithm.train(tiny_args(stem, out_dir=tmp_path, **settings | changes))
    assert all(math.isfinite(result[k]) for k in ("offline_score", "final_score"))
    reports = [int(row["step"]) for row in log_rows(tmp_path / stem) if row.get("syn/model_error")]
    assert reports[:3] == [10, 11, 22]


def test_generated_rows_have_no_bound(dataset, tmp_path, monkeypatch):
    """With calibration online: returns for own rows, -inf for the generated ones."""
    bounds, losses = [], ad2s.losses

    def spied(nets, batch, bound, weight, *rest):
        bounds.append((weight, bound))
        return losses(nets, batch, bound, weight, *rest)

    monkeypatch.setattr(ad2s, "losses", spied)
    settings = dict(calibrate_online=True, online_steps=120, regenerate_every=200, cql_weight_online=7.0)
    ad2s.train(tiny_args("calql_ad2s", dataset=dataset, out_dir=tmp_path, **settings))
    online = [b for w, b in bounds if w == 7.0]
    assert online and all(b[:8].isfinite().all() and (b[8:] == -torch.inf).all() for b in online)


def test_docstring_names_what_is_logged(dataset, tmp_path):
    ad2s.train(tiny_args("calql_ad2s", dataset=dataset, out_dir=tmp_path, online_steps=15))
    rows = log_rows(tmp_path / "calql_ad2s")
    there = {k for row in rows for k, v in row.items() if v and k.split("/")[0] in ("align", "loss")}
    metrics = re.search(r"\nMetrics(.*?)\nRun ", ad2s.__doc__, re.S).group(1)
    words = set(re.findall(r"\w+", metrics))
    assert {k for k in there if k.split("/")[1] not in words} <= {"loss/q", "loss/actor", "loss/alpha"}
    assert set(re.findall(r"\b(?:align|loss)/\w+", metrics)) <= there


def test_a_kill_inside_a_regeneration_changes_nothing(dataset, tmp_path, monkeypatch):
    """In training and in sampling, with checkpoints at every step; the selection is made again, and alike."""
    settings = dict(dataset=dataset, offline_steps=5, online_steps=25, eval_episodes=1)
    ad2s.train(tiny_args("calql_ad2s", out_dir=tmp_path / "straight", **settings))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args = tiny_args("calql_ad2s", out_dir=tmp_path / "killed", **settings)
    for name, calls in (("train_step", 4), ("sample_step", 1), ("train_step", 20), ("sample_step", 0)):
        with monkeypatch.context() as patch:
            kill_after(patch, ad2s.Generator, name, calls)
            with pytest.raises(Killed):
                ad2s.train(args)
        gc.collect()
    ad2s.train(args)
    assert log_rows(tmp_path / "killed" / "calql_ad2s") == log_rows(tmp_path / "straight" / "calql_ad2s")
