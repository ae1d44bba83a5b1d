"""DUAL's uncertainty: the last layer's posterior against exact regression, Eqs. 7-8 by brute force, the shift."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import CPU, tiny_args
from scipy import stats
from test_planner import OBS, A, D, H, a_net, an_actor, filled

from algorithms import dual
from common import judge
from common.buffer import ReplayBuffer

# ---- the posterior ----


def weighted_rows(n: int = 40, f: int = 8, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, f, generator=g, dtype=torch.float64)
    return rows, torch.rand(n, generator=g, dtype=torch.float64)


def spectrum_of(f, w) -> tuple[torch.Tensor, torch.Tensor]:
    spectrum, basis = torch.linalg.eigh(dual.second_moment(f, w))
    return spectrum.clamp(min=0), basis


def covariance_of(f, w, n_eff, prior) -> torch.Tensor:
    """G⁻¹ as the draws have it."""
    spectrum, basis = spectrum_of(f, w)
    return basis / dual.precisions(spectrum, n_eff, prior) @ basis.T


def test_hessian_of_the_weighted_likelihood_is_kronecker():
    """By autograd, through the losses' own log_prob: diag(1/σ²) ⊗ Σ w f fᵀ, for 3 actions and 8 features."""
    f, w = weighted_rows()
    log_std, actions = torch.tensor([-1.0, 0.2, -0.4], dtype=torch.float64), torch.randn(40, A).double()

    def loss(flat):
        return -(w * dual.log_prob(f @ flat.view(A, 8).T, log_std, actions)).sum()

    hessian = torch.autograd.functional.hessian(loss, torch.randn(24, dtype=torch.float64))
    expected = torch.kron(torch.diag((-2 * log_std).exp()), w.sum() * dual.second_moment(f, w))
    assert torch.allclose(hessian, expected, atol=1e-9)


def test_posterior_is_that_of_bayesian_weighted_regression():
    """Against numpy's normal equations: unit noise, prior N(0, 1/τ0), repeated rows as weights."""
    f, _ = weighted_rows(30, 5)
    copies = torch.arange(30) % 4
    rows = np.repeat(f.numpy(), copies.numpy(), 0)
    covariance = np.linalg.inv(rows.T @ rows + 2.5 * np.eye(5))
    got = covariance_of(f, copies.double(), copies.sum().item(), 2.5)
    assert np.allclose(got, covariance, atol=1e-12)


def test_draws_have_the_predictive_variance():
    """std of f · offset -> s √(f G⁻¹ f) per action; zero mean; independent rows; nothing along the null direction.

    The data are normal to that direction, as a layer norm's are, so it changes no variance.
    """
    torch.manual_seed(0)
    f, w = weighted_rows()
    null = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64) / 3
    f = f - (f @ null)[:, None] * null
    spectrum, basis = spectrum_of(f, w)
    scales = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    offsets = dual.draw_offsets(basis, dual.precisions(spectrum, 12.0, 0.7), null, scales, 100_000)
    assert (offsets.double() @ null).abs().max() < 1e-6
    assert offsets.shape == (100_000, A, 8) and offsets.dtype == torch.float32
    x = f[0]
    values = offsets.double() @ x
    precision = 12.0 * (f.T * w) @ f / w.sum() + 0.7 * torch.eye(8)
    expected = scales * (x @ torch.linalg.solve(precision, x)).sqrt()
    assert torch.allclose(values.std(0), expected, rtol=0.02)
    assert (values.mean(0).abs() < 0.02 * expected).all()
    correlation = torch.corrcoef(values.T) - torch.eye(A)
    assert correlation.abs().max() < 0.02


def test_scale_of_weights_directions_without_data_and_more_data():
    f, w = weighted_rows()
    f[:, 7] = 0
    moment = dual.second_moment(f, w)
    assert torch.allclose(moment, dual.second_moment(f, 1e6 * w), rtol=1e-12)
    variances = []
    for n_eff in (0.0, 10.0, 1e3, 1e5):
        inverse = covariance_of(f, w, n_eff, 4.0)
        assert inverse[7, 7].item() == pytest.approx(1 / 4.0)  # s² |f|² / τ0
        variances.append(torch.einsum("nf,fg,ng->n", f, inverse, f))
    assert torch.allclose(variances[0], f.square().sum(1) / 4.0)
    assert all((b < a).all() for a, b in pairwise(variances))


@pytest.mark.parametrize("target", [0.03, 0.1, 0.3])
def test_calibration_hits_its_target_on_the_rows_of_the_fit(target):
    f, w = weighted_rows(200)
    n_eff = dual.calibrate(spectrum_of(f, w)[0], target, 1.0)
    inverse = covariance_of(f, w, n_eff, 1.0)
    mean = (w * torch.einsum("nf,fg,ng->n", f, inverse, f)).sum() / w.sum()
    assert mean.sqrt().item() == pytest.approx(target, rel=1e-6)


def test_calibration_of_what_is_certain_anyway_is_zero():
    f, w = weighted_rows()
    assert dual.calibrate(spectrum_of(f, w)[0], 0.1, 1e6) == 0.0


def test_odd_weights_and_features():
    """No weight at all: the prior alone. Constant features: any prior will do, up to float64's end. NaN: an error."""
    f, w = weighted_rows()
    nothing = spectrum_of(f, 0 * w)[0]
    assert (nothing == 0).all() and dual.calibrate(nothing, 0.1, 1.0) == 0.0
    assert torch.equal(dual.precisions(nothing, 0.0, 4.0), torch.full((8,), 4.0).double())
    constant = spectrum_of(torch.ones(40, 8), w)[0]  # 8, and seven times 0
    assert dual.precisions(constant, 100.0, 1.0)[0] == pytest.approx(1.0)
    assert dual.precisions(constant, 100.0, 1e-30)[0] == pytest.approx(8e-12)
    for bad in (float("nan"), float("inf")):
        w[3] = bad
        with pytest.raises(FloatingPointError, match="not finite"):
            dual.second_moment(f, w)


def trained(actor: dual.PlanActor, obs: torch.Tensor, steps: int, lr: float = 1e-4) -> None:
    """Gradient steps of everything in the actor but σ towards targets that do not come from it."""
    opt, target = torch.optim.Adam(actor.net.parameters(), lr=lr), torch.sin(3 * obs[:, :A])
    for _ in range(steps):
        opt.zero_grad()
        (actor(obs)[0] - target).square().mean().backward()
        opt.step()


def an_explorer(actor=None, **changes) -> dual.Explorer:
    args = tiny_args("dual", **changes)
    actor = an_actor() if actor is None else actor
    b = filled(30)
    windows = dual.Windows(b, np.zeros(30, bool), H)
    return dual.Explorer(args, actor, dual.PlanActor(a_net(seed=1), actor.steps, "zero"), windows)


def test_the_null_direction_is_normal_to_all_features():
    """Whatever the layer norm's gains and biases are, and the state; and it is the only one."""
    actor, obs = an_actor(), torch.randn(500, OBS)
    trained(actor, obs, 20, lr=1e-3)
    f1 = actor.features(3 * torch.randn(500, OBS))[0].detach().double()
    assert actor.net.norm.bias.abs().min() > 1e-5 and (f1 @ actor.null()).abs().max() < 1e-5
    spectrum, basis = spectrum_of(f1, torch.ones(500))
    assert spectrum[0] < 1e-10 < 1e-7 < spectrum[1]
    assert (basis[:, 0] @ actor.null()).abs().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("prior", [1e-8, 1.0])
def test_offsets_keep_their_size_between_fits(prior):
    """The literal recipe: rms of offset · f at the fit is s √(f G⁻¹ f), and about that after 1 and 5 updates.

    In a net so narrow that data determine every other direction.
    """
    settings = dict(laplace_noise="sigma", laplace_std=0.0, laplace_prior=prior)
    explorer = an_explorer(an_actor(width=6), laplace_draws=500, laplace_rows=300, **settings)
    b = ReplayBuffer(300, OBS, A, CPU)
    torch.manual_seed(4)
    b.append(torch.randn(300, b.table.shape[1]))
    explorer.fit([b], lambda batch: torch.ones_like(batch.rewards), first=True)
    f1 = explorer.actor.features(b.obs)[0].detach().double()
    inverse = torch.linalg.pinv(f1.T @ f1, rtol=1e-10)
    expected = math.exp(-1.0) * torch.einsum("nf,fg,ng->n", f1, inverse, f1).mean().sqrt().item()
    sizes = []
    for steps in (0, 1, 4):
        trained(explorer.actor, b.obs, steps)
        with torch.no_grad():
            values = explorer.actor.features(b.obs)[0] @ explorer.offsets.mT
        sizes.append(values.square().mean().sqrt().item())
    assert sizes[0] == pytest.approx(expected, rel=0.05)
    assert max(sizes) < 1.5 * min(sizes), sizes


# ---- acting ----


def test_ensemble_by_brute_force_and_identical_draws():
    means = torch.randn(7, 2, A)
    mean, var = dual.ensemble(means)
    for b in range(2):
        for j in range(A):
            values = [means[k, b, j].item() for k in range(7)]
            m = sum(values) / 7
            assert mean[b, j].item() == pytest.approx(m, abs=1e-6)
            assert var[b, j].item() == pytest.approx(sum((v - m) ** 2 for v in values) / 7, abs=1e-6)
    assert (dual.ensemble(means[:1].expand(7, -1, -1))[1] < 1e-12).all()
    far = means + 1_000  # E[μ²] - E[μ]² would lose all digits
    assert torch.allclose(dual.ensemble(far)[1], var, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
def test_action_is_equation_8_with_the_layers_drawn(steps):
    """Sub-policies by really changing the last layer of the last step; variances by hand; one standard normal draw."""
    explorer = an_explorer(an_actor(steps), laplace_draws=5, shift_weight=0.5)
    torch.manual_seed(1)
    explorer.offsets.copy_(0.1 * torch.randn_like(explorer.offsets))
    explorer.shift.fill_(0.3)
    explorer.usual.fill_(0.1)
    obs, actor, means = torch.randn(1, OBS), explorer.actor, []
    f1, base = actor.features(obs)
    kept = actor.net.head.weight.detach().clone(), actor.net.head.bias.detach().clone()
    with torch.no_grad():
        for offset in explorer.offsets:
            actor.net.head.weight[:A] = kept[0][:A] + offset[:, :-1]
            actor.net.head.bias[:A] = kept[1][:A] + offset[:, -1]
            means.append(actor.read(f1, base, slice(A))[0] if steps > 1 else actor(obs)[0][0])
        actor.net.head.weight.copy_(kept[0])
        actor.net.head.bias.copy_(kept[1])
    means = torch.stack(means)
    variance = math.exp(-2.0) + means.var(0, correction=0) + 0.5 * 0.3
    torch.manual_seed(2)
    expected = means.mean(0) + variance.sqrt() * torch.randn(1, A)
    torch.manual_seed(2)
    assert torch.allclose(explorer.act(obs), expected, atol=1e-5)
    logs = judge.acting(explorer)
    total = math.exp(-2.0) + means.var(0, correction=0).mean().item() + 0.15
    assert logs["uq/aleatoric_std"].item() == pytest.approx(math.exp(-1.0), rel=1e-4)
    assert logs["uq/share_shift"].item() == pytest.approx(0.15 / total, rel=1e-4)
    assert logs["uq/shift"].item() == pytest.approx(0.3)
    assert logs["uq/shift_ratio"].item() == pytest.approx(3.0)
    shares = sum(logs[f"uq/share_{k}"] for k in ("aleatoric", "epistemic", "shift"))
    assert shares.item() == pytest.approx(1.0)


def test_error_rank_is_spearman_s_of_doubt_and_error_over_new_rows(monkeypatch):
    """Doubt row by row, as each draw acts; the last rows alone, without those that end an episode."""
    explorer = an_explorer(laplace_draws=5, laplace_every=12)
    explorer.offsets.copy_(0.1 * torch.randn_like(explorer.offsets))
    buffer = filled(30)
    b = buffer.take(torch.arange(30))
    rows = [i for i in range(18, 30) if b.terminations[i] == 0]
    assert 2 < len(rows) < 12
    error, doubt = torch.rand(30), []
    seen = {tuple(b.next_obs[i].tolist()): error[i] for i in range(30)}
    monkeypatch.setattr(
        dual.PlanActor,
        "prediction_error",
        lambda _, x: torch.stack([seen[tuple(s.tolist())] for s in x.next_obs]),
    )
    for i in rows:
        f1, base = explorer.actor.features(b.obs[i : i + 1])
        actions = [base[0, :A] + offset @ f1[0] for offset in explorer.offsets]
        doubt.append(float(np.mean(np.var(torch.stack(actions).detach().numpy(), 0))))
    expected = stats.spearmanr(doubt, error[rows].numpy()).statistic
    assert judge.error_rank(explorer, buffer)["uq/error_rank"] == pytest.approx(expected, abs=1e-4)
    explorer.args = replace(explorer.args, horizon=1)
    assert judge.error_rank(explorer, buffer) == {}


def variance_of(explorer: dual.Explorer, obs: torch.Tensor, monkeypatch) -> torch.Tensor:
    """Of the action's Gaussian: the draw taken out."""
    with monkeypatch.context() as m:
        m.setattr(torch, "randn_like", torch.zeros_like)
        mean = explorer.act(obs)
        m.setattr(torch, "randn_like", torch.ones_like)
        return (explorer.act(obs) - mean).square()[0]


def test_variances_are_capped_and_lambda_zero_is_equation_7(monkeypatch):
    obs = torch.randn(1, OBS)
    explorer = an_explorer(shift_weight=0.5)
    sigma2 = math.exp(-2.0)
    explorer.shift.fill_(100.0)
    assert torch.allclose(variance_of(explorer, obs, monkeypatch), torch.tensor(sigma2 + 1.0))
    explorer.shift.fill_(0.0)
    assert torch.allclose(variance_of(explorer, obs, monkeypatch), torch.tensor(sigma2))
    explorer.offsets.copy_(5 * torch.randn_like(explorer.offsets))
    assert torch.allclose(variance_of(explorer, obs, monkeypatch), torch.tensor(sigma2 + 0.25), rtol=1e-4)
    explorer.shift.fill_(0.6)
    both = variance_of(explorer, obs, monkeypatch)
    assert torch.allclose(both, torch.tensor(sigma2 + 0.25 + 0.3), rtol=1e-4)
    explorer.args = replace(explorer.args, shift_weight=0.0)
    assert torch.allclose(variance_of(explorer, obs, monkeypatch), torch.tensor(sigma2 + 0.25), rtol=1e-4)


def test_epistemic_variance_of_many_draws_is_the_closed_form(monkeypatch):
    explorer = an_explorer(laplace_draws=20_000, laplace_rows=30, laplace_std=0.05, shift_weight=0.0)
    b = filled(30)

    def weigh(batch):
        return 1 + batch.rewards.abs()

    logs = explorer.fit([b], weigh, first=True)
    obs = b.obs[:1]
    f1 = explorer.actor.features(b.obs)[0].detach().double()
    w = 1 + b.table[:30, OBS + A].abs().double()
    precision = logs["laplace/n_eff"] * (f1.T * w) @ f1 / w.sum() + torch.eye(f1.shape[1])
    expected = (f1[0] @ torch.linalg.solve(precision, f1[0])).float()
    got = variance_of(explorer, obs, monkeypatch) - math.exp(-2.0)
    assert torch.allclose(got, expected, rtol=0.05)
    assert logs["laplace/data_std"] == pytest.approx(0.05, rel=1e-4)
    inverse = torch.linalg.inv(precision)
    mean = (w * torch.einsum("nf,fg,ng->n", f1, inverse, f1)).sum() / w.sum()
    assert mean.sqrt().item() == pytest.approx(0.05, rel=1e-4)


def test_noise_sigma_scales_the_draws_with_the_actors_std():
    stds = []
    for log_std in (-1.0, -1.0 - math.log(2)):
        explorer = an_explorer(laplace_noise="sigma", laplace_draws=50)
        with torch.no_grad():
            explorer.actor.log_std.fill_(log_std)
        torch.manual_seed(0)
        logs = explorer.fit([filled(30)], lambda b: torch.ones_like(b.rewards), first=True)
        stds.append((explorer.offsets.clone(), logs["laplace/data_std"]))
    assert torch.allclose(stds[0][0], 2 * stds[1][0], rtol=1e-5)
    assert stds[0][1] == pytest.approx(2 * stds[1][1])


def test_n_eff_grows_with_the_rows_and_literally_is_the_sum_of_weights():

    def weigh(batch):
        return 2 + batch.terminations

    explorer = an_explorer()
    first = explorer.fit([filled(30)], weigh, first=True)
    more = explorer.fit([filled(30), filled(15)], weigh)
    assert more["laplace/n_eff"] == pytest.approx(1.5 * first["laplace/n_eff"])
    literal = an_explorer(laplace_std=0.0)
    assert literal.fit([filled(30)], weigh, first=True)["laplace/n_eff"] == pytest.approx(30 * 2 + 6)
    assert literal.fit([filled(30), filled(15)], weigh)["laplace/n_eff"] == pytest.approx(45 * 2 + 9)


def test_rows_of_a_fit_are_different_and_from_all_buffers():
    explorer = an_explorer(laplace_rows=20)
    rows = torch.cat([b.obs for b in explorer.parts([filled(30, 1), filled(15, 2)])])
    assert len(rows) == 20 and len(rows.unique(dim=0)) == 20
    explorer = an_explorer(laplace_rows=60)
    rows = torch.cat([b.obs for b in explorer.parts([filled(30, 1), filled(15, 2)])])
    assert torch.equal(rows, torch.cat([filled(30, 1).obs, filled(15, 2).obs]))


def test_elbo_posterior_reads_the_planners_inputs(monkeypatch):
    """Features at random noise levels of the windows, weights 1: the critic's weights are never asked for."""
    explorer = an_explorer(laplace_weights="elbo", laplace_rows=25)
    levels, original = [], dual.PlannerNet.features

    def features(self, z, u, given):
        levels.append((u, given, z))
        return original(self, z, u, given)

    monkeypatch.setattr(dual.PlannerNet, "features", features)
    logs = explorer.fit([filled(30)], None, first=True)
    ((u, given, z),) = levels
    assert u.shape == (25,) and 0 < u.min() < 0.2 and u.max() > 0.8 and not given.any()
    known = explorer.windows.take(torch.arange(30))[0][:, 0, A:]
    assert all((known == row).all(1).any() for row in z[:, 0, A:])
    assert logs["laplace/data_std"] == pytest.approx(explorer.args.laplace_std, rel=1e-4)


@pytest.mark.parametrize("append", [True, False])
def test_without_both_terms_it_acts_as_a_plain_gaussian_from_the_same_random_numbers(append):
    explorer = an_explorer(uq="none", shift_weight=0.0, append_online=append)
    explorer.shift.fill_(3.0)
    obs = torch.randn(20, 1, OBS)
    torch.manual_seed(5)
    mine = [explorer.act(o) for o in obs] + [torch.rand(1)]
    torch.manual_seed(5)
    for o, action in zip(obs, mine, strict=False):
        with torch.no_grad():
            mean, log_std = explorer.actor(o)
        assert torch.equal(action, mean + log_std.exp() * torch.randn_like(mean))
    assert torch.equal(mine[-1], torch.rand(1))


def test_latent_sub_policies_differ_in_their_start(monkeypatch):
    explorer = an_explorer(uq="latent", laplace_draws=4, shift_weight=0.0)
    obs = torch.randn(1, OBS)
    torch.manual_seed(0)
    z = torch.randn(4, H, D)
    f1, base = explorer.actor.features(obs.expand(4, -1), z)
    expected = explorer.actor.read(f1, base, slice(A)).var(0, correction=0) + math.exp(-2.0)
    torch.manual_seed(0)
    with monkeypatch.context() as m:
        m.setattr(explorer.actor, "noise", lambda _: z)
        got = variance_of(explorer, obs, monkeypatch)
    assert n_draws(explorer) == 4 and torch.allclose(got, expected, atol=1e-5)


def n_draws(explorer: dual.Explorer) -> int:
    """How many latents one action takes."""
    asked, original = [], explorer.actor.noise
    explorer.actor.noise = lambda n: asked.append(n) or original(n)
    explorer.act(torch.zeros(1, OBS))
    explorer.actor.noise = original
    return sum(asked)


def test_one_latent_is_shared_by_all_draws():
    assert n_draws(an_explorer(an_actor(1, "sample"), latent="sample")) == 1
    assert n_draws(an_explorer()) == 0


# ---- the shift ----


def test_prediction_error_by_hand_and_of_a_perfect_model(monkeypatch):
    explorer, b = an_explorer(), filled(30)
    batch, model = b.take(torch.arange(6)), explorer.transition
    perfect = (batch.next_obs - model.net.mean) / model.net.std
    expected = ((perfect - model.predict(batch.obs, batch.actions)) ** 2).mean(1)
    assert torch.allclose(model.prediction_error(batch), expected, atol=1e-5)
    loss = dual.transition_loss(model, batch)  # the fifth of six rows ends its episode
    assert loss.item() == pytest.approx((expected.sum() - expected[4]).item() / 6, rel=1e-5)
    explorer.observe(b)  # of the row stored last
    last = model.prediction_error(b.take(torch.tensor([29])))[0]
    assert torch.equal(explorer.shift, last) and last > 0
    monkeypatch.setattr(model, "predict", lambda *_: perfect)
    assert (model.prediction_error(batch) == 0).all()


def test_offline_error_leaves_terminal_rows_out_and_is_what_ratios_refer_to():
    explorer, b = an_explorer(laplace_rows=100), filled(30)
    logs = explorer.start(b, lambda x: torch.ones_like(x.rewards))
    every = explorer.transition.prediction_error(b.take(torch.arange(30)))
    going_on = torch.arange(30) % 5 != 4
    assert logs["shift/offline"] == pytest.approx(every[going_on].mean().item(), rel=1e-5)
    assert explorer.usual.item() == pytest.approx(logs["shift/offline"])
    assert {"laplace/n_eff", "laplace/condition"} <= set(logs)
