"""DUAL: windows, the planner and its halvings, the affine actor, its last layer's posterior, acting, phases."""

import gc
import math
from dataclasses import replace
from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch
from conftest import log_rows, module, tiny_args

from algorithms import dual
from common import data, judge, run
from common.buffer import Batch, ReplayBuffer

CPU = torch.device("cpu")
OBS, A, H = 5, 3, 4
D = OBS + A


def a_net(horizon: int = H, width: int = 16, blocks: int = 1, seed: int = 0) -> dual.PlannerNet:
    torch.manual_seed(seed)
    return dual.PlannerNet(horizon, A, torch.randn(OBS), 0.5 + torch.rand(OBS), width, blocks)


def an_actor(steps: int = 1, latent: str = "zero", **sizes) -> dual.PlanActor:
    return dual.PlanActor(a_net(**sizes), steps, latent)


def filled(n: int, seed: int = 0) -> ReplayBuffer:
    """n random transitions, every fifth terminal."""
    g = torch.Generator().manual_seed(seed)
    b = ReplayBuffer(n + 10, OBS, A, CPU)
    draw = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    b.extend(
        Batch(
            draw(n, OBS), draw(n, A).clamp(-1, 1), draw(n), draw(n, OBS), (torch.arange(n) % 5 == 4).float()
        )
    )
    return b


# ---- windows ----


@pytest.mark.parametrize("horizon", [1, 2, 4, 9])
def test_windows_by_brute_force(horizon):
    """Episodes of 4, 1, 2 and, unflagged, 5 rows: padding with the last next state, zero actions, no loss there."""
    ends = np.zeros(12, bool)
    ends[[3, 4, 6]] = True
    b = filled(12)
    windows = dual.Windows(b, ends, horizon)
    obs, actions, _, next_obs, _ = (x.numpy() for x in b.take(torch.arange(12)))
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    x, mask = windows.take(torch.arange(12))
    episodes = [range(0, 4), range(4, 5), range(5, 7), range(7, 12)]
    for episode in episodes:
        for i in episode:
            for j in range(horizon):
                inside = i + j in episode
                state = obs[i + j] if inside else next_obs[episode[-1]]
                action = actions[i + j] if inside else np.zeros(A)
                assert np.allclose(x[i, j], np.concatenate([action, (state - mean) / std]), atol=1e-5)
                assert mask[i, j].tolist() == [float(inside)] * A + [1.0] * OBS
    if horizon > 1:  # row 1 is the true successor, whatever the row
        stays = ~np.isin(np.arange(12), [3, 4, 6, 11])
        assert np.allclose(x[stays, 1, A:], ((obs - mean) / std)[1:][stays[:-1]], atol=1e-5)
        assert np.allclose(x[~stays, 1, A:], ((next_obs - mean) / std)[~stays], atol=1e-5)


def test_windows_start_in_the_dataset_only():
    """Every row starts one; rows added online never do; statistics are the dataset's."""
    b = filled(12)
    windows = dual.Windows(b, np.zeros(12, bool), 2)
    before = windows.mean.clone()
    b.append(torch.full((10, b.table.shape[1]), 7.0))
    torch.manual_seed(0)
    x, _ = windows.draw(4_000)
    expected, _ = windows.take(torch.arange(12))
    counts = (x[:, None] == expected[None]).flatten(2).all(2).sum(0)
    assert counts.sum() == 4_000 and counts.min() > 250
    assert torch.equal(before, b.table[:12, :OBS].double().mean(0).float())
    raw, _ = dual.Windows(filled(12), np.zeros(12, bool), 2, normalize=False).take(torch.arange(11))
    assert torch.equal(raw[:, 1, A:], b.obs[1:12])  # where states are one-hot: as they are


# ---- diffusion ----


def exact_v(tau, eps, u):
    phi = 0.5 * math.pi * u
    return math.cos(phi) * eps - math.sin(phi) * tau


@pytest.mark.parametrize("cuts", [[1.0], [0.5, 0.5], [0.1, 0.6, 0.3], [1 / 32] * 32])
def test_rotations_with_the_exact_v_return_the_data(cuts):
    tau, eps = torch.randn(2, 50, dtype=torch.float64)
    z, u = eps, 1.0
    for cut in cuts:
        z = dual.rotate(z, exact_v(tau, eps, u), 0.5 * math.pi * cut)
        u -= cut
    assert torch.allclose(z, tau, atol=1e-12)


def test_rotation_and_target_are_salimans_and_hos_formulas():
    """DDIM as α_s x̂ + σ_s ε̂ with x̂ = α z - σ v; the target as their x̃, turned into v."""
    torch.manual_seed(0)
    weight = torch.randn(2, 2, dtype=torch.float64)

    def teacher(z, u, _given):
        return z @ weight + u[:, None, None]

    steps, i = 4, 3
    u = torch.full((6,), i / steps, dtype=torch.float64)
    z = torch.randn(6, 1, 2, dtype=torch.float64)
    first, known = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.bool)
    times = [u[0].item(), u[0].item() - 0.5 / steps, u[0].item() - 1 / steps]
    alpha, sigma = ([f(0.5 * math.pi * t) for t in times] for f in (math.cos, math.sin))
    x = z
    for k in range(2):
        v = teacher(x, torch.full_like(u, times[k]), None)
        clean = alpha[k] * x - sigma[k] * v
        after = alpha[k + 1] * clean + sigma[k + 1] / sigma[k] * (x - alpha[k] * clean)
        assert torch.allclose(dual.rotate(x, v, 0.25 * math.pi / steps), after, atol=1e-12)
        x = after
    ratio = sigma[2] / sigma[0]
    their_x = (x - ratio * z) / (alpha[2] - ratio * alpha[0])
    got = dual.distill_target(teacher, z, u, first, known, steps)
    assert torch.allclose(got, (alpha[0] * z - their_x) / sigma[0], atol=1e-12)


def test_target_of_an_exact_teacher_is_exact_and_at_one_step_minus_its_endpoint():
    tau, eps = torch.randn(2, 5, H, D, dtype=torch.float64)
    first, known = tau[:, 0], torch.zeros(5, D, dtype=torch.bool)
    teacher = lambda _, u, __: exact_v(tau, eps, u[0].item())  # noqa: E731
    for steps in (1, 2, 16):
        u = torch.full((5,), 1.0, dtype=torch.float64)
        got = dual.distill_target(teacher, eps, u, first, known, steps)
        assert torch.allclose(got, exact_v(tau, eps, 1.0), atol=1e-12)
    net = a_net().double()
    z1 = dual.rotate(eps, net(eps, u, 0 * u), 0.25 * math.pi)
    z2 = dual.rotate(z1, net(z1, u / 2, 0 * u), 0.25 * math.pi)
    assert torch.allclose(dual.distill_target(net, eps, u, first, known, 1), -z2, atol=1e-12)


def test_noised_windows_by_hand():
    x, eps = torch.randn(2, 6, H, D)
    u, given = torch.tensor([1e-6, 1 / 3, 0.5, 0.5, 1.0, 1.0]), torch.tensor([0, 1, 0, 1, 0, 1]).bool()
    z, v, known = dual.noised(x, u, eps, given, A)
    assert torch.allclose(z[0, 1:], x[0, 1:], atol=1e-4) and torch.allclose(v[0], eps[0], atol=1e-4)
    assert torch.allclose(z[1, 1:], math.sqrt(3) / 2 * x[1, 1:] + 0.5 * eps[1, 1:], atol=1e-6)
    assert torch.allclose(z[4, 1:], eps[4, 1:], atol=1e-6) and torch.allclose(v[4], -x[4], atol=1e-6)
    assert torch.equal(z[:, 0, A:], x[:, 0, A:])
    assert torch.equal(z[given, 0], x[given, 0]) and not (z[~given, 0, :A] == x[~given, 0, :A]).any()
    assert torch.equal(known, torch.cat([given[:, None].expand(-1, A), torch.ones(6, OBS).bool()], 1))


def test_in_painted_and_padded_entries_have_no_loss():
    """Gradients are exactly zero where the entry is known or padded, nowhere else; the loss is the mean of the rest."""
    torch.manual_seed(0)
    got, wanted = torch.randn(6, H, D).requires_grad_(), torch.randn(6, H, D)
    mask = torch.ones(6, H, D)
    mask[0, 2:, :A] = 0
    given = torch.tensor([1, 0, 0, 1, 0, 0]).bool()
    known = torch.cat([given[:, None].expand(-1, A), torch.ones(6, OBS).bool()], 1)
    loss = dual.masked_error(got, wanted, mask, known)
    loss.backward()
    silent = mask == 0
    silent[:, 0] |= known
    assert torch.equal(got.grad == 0, silent)
    assert loss.item() == pytest.approx((got - wanted).square()[~silent].mean().item(), rel=1e-5)
    net = a_net()
    for some in (
        dual.planner_loss(net, wanted, mask),
        dual.distill_loss(net, a_net(seed=1), wanted, mask, 2, True),
    ):
        net.zero_grad()
        some.backward()
        grad = net.head.bias.grad.view(H, D)
        assert (grad[0, A:] == 0).all() and (grad[0, :A] != 0).all() and (grad[1:] != 0).all()
    one = a_net(horizon=1)
    nothing = dual.masked_error(got[:1, :1], wanted[:1, :1], mask[:1, :1], torch.ones(1, D).bool())
    assert nothing == 0 and dual.planner_loss(one, wanted[:, :1], mask[:, :1]).isfinite()


@pytest.mark.parametrize("steps", [1, 4])
def test_conditions_survive_sampling_bit_for_bit(steps):
    net, x = a_net(), torch.randn(6, H, D)
    for given in (False, True):
        known = torch.ones(6, D).bool()
        known[:, :A] = given
        end = dual.unroll(net, torch.randn(6, H, D), x[:, 0], known, steps)
        assert torch.equal(end[:, 0][known], x[:, 0][known])
        assert given or not (end[:, 0, :A] == x[:, 0, :A]).any()


class GaussianTeacher:
    """E[v | z] for data N(m, C), in closed form."""

    mean, cov = torch.tensor([0.6, -0.3]), torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    spectrum, basis = torch.linalg.eigh(cov)

    def __call__(self, z, u, _given):
        c, s = (f(0.5 * math.pi * u)[:, None, None] for f in (torch.cos, torch.sin))
        gap = ((z - c * self.mean) @ self.basis / (c**2 * self.spectrum + s**2)) @ self.basis.T
        return c * s * gap - s * (self.mean + c * (gap @ self.cov))


def test_one_halving_of_a_gaussian_keeps_its_law():
    """The one-step student's samples have the mean and covariance of the teacher's two steps, to 5 %."""
    torch.manual_seed(0)
    teacher = GaussianTeacher()
    net = dual.PlannerNet(1, 2, torch.zeros(0), torch.ones(0), 32, 1)
    opt = torch.optim.Adam(net.parameters(), lr=5e-3)
    root, mask = torch.linalg.cholesky(teacher.cov), torch.ones(256, 1, 2)
    for k in range(300):
        opt.param_groups[0]["lr"] = 5e-3 * (1 - k / 300)
        x = teacher.mean + torch.randn(256, 1, 2) @ root.T
        loss = dual.distill_loss(net, teacher, x, mask, 1, False)
        opt.zero_grad()
        loss.backward()
        opt.step()
    z, nothing = torch.randn(20_000, 1, 2), torch.zeros(20_000, 2).bool()
    u = torch.ones(20_000)
    with torch.no_grad():
        mine = dual.unroll(net, z, z[:, 0], nothing, 1)[:, 0]
    half = dual.rotate(z, teacher(z, u, None), 0.25 * math.pi)
    theirs = dual.rotate(half, teacher(half, u / 2, None), 0.25 * math.pi)[:, 0]
    spread = theirs.std(0)
    assert ((mine.mean(0) - theirs.mean(0)).abs() < 0.05 * spread).all()
    assert ((torch.cov(mine.T) - torch.cov(theirs.T)).abs() < 0.05 * spread[:, None] * spread).all()
    assert (theirs.mean(0) - teacher.mean).abs().max() < 0.05  # and the teacher's two steps are not nonsense


def test_shrunk_noise_is_a_quarter_of_the_last_halvings_pure_noise(monkeypatch):
    torch.manual_seed(0)
    seen, original = [], dual.noised
    monkeypatch.setattr(
        dual, "noised", lambda x, u, eps, *a: seen.append((u, eps)) or original(x, u, eps, *a)
    )
    x = torch.randn(8_000, H, D)
    for shrink, steps in ((True, 2), (False, 1)):
        dual.distill_loss(a_net(), a_net(), x, torch.ones_like(x), steps, shrink)
        u, eps = seen.pop()
        size = eps.square().mean((1, 2)).sqrt()
        small = size < 0.5  # of 32 normal numbers: 5.5 standard deviations off
        if shrink:
            assert not small[u < 1].any()
            assert small[u == 1].float().mean().item() == pytest.approx(0.125, abs=0.015)
        else:
            assert not small.any()


# ---- the actor ----


@pytest.mark.parametrize("steps", [1, 4])
def test_before_training_the_mean_is_the_plans_first_action(steps):
    actor, obs = an_actor(steps), torch.randn(7, OBS)
    net = actor.net
    first = torch.cat([torch.zeros(7, A), (obs - net.mean) / net.std], 1)
    known = torch.arange(D).expand(7, -1) >= A
    for z in (torch.zeros(7, H, D), torch.randn(7, H, D)):
        plan = dual.unroll(net, z, first, known, steps)
        f1, base = actor.features(obs, z)
        assert torch.allclose(actor.read(f1, base, actor.first_action), plan[:, 0, :A], atol=1e-5)
    mean, log_std = actor(obs)
    plan = dual.unroll(net, torch.zeros(7, H, D), first, known, steps)
    assert torch.allclose(mean, plan[:, 0, :A], atol=1e-5)
    assert torch.equal(log_std, torch.full((A,), -1.0))


@pytest.mark.parametrize("steps", [1, 4])
def test_the_mean_is_affine_in_the_last_layer(steps):
    """mean = base + W f1: its derivative in W is f1, in the biases f1's last entry, and other rows do not matter.

    Only the last step is meant; with one step there is no other.
    """
    actor, obs = an_actor(steps), torch.randn(1, OBS)
    f1, base = actor.features(obs)
    f1, base = f1.detach(), base.detach()
    weight, bias = actor.net.head.weight, actor.net.head.bias
    mean = actor.read(f1, base, actor.first_action)
    assert torch.allclose(mean, base[:, :A] + f1[:, :-1] @ weight[:A].T + f1[:, -1:] * bias[:A], atol=1e-6)
    for j in range(A):
        dw, db = torch.autograd.grad(mean[0, j], (weight, bias), retain_graph=True)
        expected = torch.zeros_like(dw)
        expected[j] = f1[0, :-1]
        assert torch.allclose(dw, expected, atol=1e-6)
        assert db[j].item() == pytest.approx(f1[0, -1].item(), rel=1e-5) and (db != 0).sum() == 1
    if steps == 1:
        assert (base[:, :A] == 0).all() and base.abs().max() < 1e-6 and f1[0, -1] == -1
        whole = torch.autograd.grad(actor(obs)[0][0, 0], weight)[0]
        assert torch.allclose(whole[0], f1[0, :-1], atol=1e-6) and (whole[1:] == 0).all()


def test_gradients_reach_every_layer_through_every_step():
    actor = an_actor(4)
    actor(torch.randn(9, OBS))[0].square().sum().backward()
    silent = [n for n, p in actor.net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert actor.net.head.weight.grad.view(H, D, -1)[1:].any()  # of the steps before the last


def test_latents_are_drawn_in_training_and_not_in_evaluation():
    actor, zero, obs = an_actor(1, "sample"), an_actor(1), torch.randn(500, OBS)
    with torch.no_grad():
        assert torch.equal(actor(obs)[0], zero(obs)[0])
    torch.manual_seed(3)
    mean, _ = actor(obs[:1].expand(500, -1))
    torch.manual_seed(3)
    f1, base = zero.features(obs[:1].expand(500, -1), torch.randn(500, H, D))
    assert torch.equal(mean, zero.read(f1, base, slice(A))) and mean.std(0).min() > 1e-3


def test_log_std_is_clamped():
    actor = an_actor()
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([-9.0, 0.0, 3.0]))
    assert actor(torch.zeros(1, OBS))[1].tolist() == [-5.0, 0.0, 0.5]
    assert torch.allclose(actor.std(), torch.tensor([-5.0, 0.0, 0.5]).exp())


def test_transition_model_reads_the_next_state_of_a_plan_with_state_and_action_given():
    actor, obs, actions = an_actor(2), torch.randn(7, OBS), torch.randn(7, A).clamp(-1, 1)
    net = actor.net
    first = torch.cat([actions, (obs - net.mean) / net.std], 1)
    z = torch.zeros(7, H, D)
    z[:, 0] = first
    for u in (1.0, 0.5):
        z = math.sqrt(0.5) * (z - net(z, torch.full((7,), u), torch.ones(7)))
        z[:, 0] = first
    assert torch.allclose(actor.predict(obs, actions), z[:, 1, A:], atol=1e-5)


# ---- the posterior ----


def weighted_rows(n: int = 40, f: int = 8, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, f, generator=g, dtype=torch.float64), torch.rand(
        n, generator=g, dtype=torch.float64
    )


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
            sizes.append(
                (explorer.actor.features(b.obs)[0] @ explorer.offsets.mT).square().mean().sqrt().item()
            )
    assert sizes[0] == pytest.approx(expected, rel=0.05)
    assert max(sizes) < 1.5 * min(sizes), sizes


# ---- acting ----


def an_explorer(actor=None, **changes) -> dual.Explorer:
    args = tiny_args("dual", **changes)
    actor = an_actor() if actor is None else actor
    b = filled(30)
    windows = dual.Windows(b, np.zeros(30, bool), H)
    return dual.Explorer(args, actor, dual.PlanActor(a_net(seed=1), actor.steps, "zero"), windows)


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
    assert sum(logs[f"uq/share_{k}"] for k in ("aleatoric", "epistemic", "shift")).item() == pytest.approx(
        1.0
    )


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
    assert torch.allclose(
        variance_of(explorer, obs, monkeypatch), torch.tensor(sigma2 + 0.25 + 0.3), rtol=1e-4
    )
    explorer.args = replace(explorer.args, shift_weight=0.0)
    assert torch.allclose(variance_of(explorer, obs, monkeypatch), torch.tensor(sigma2 + 0.25), rtol=1e-4)


def test_epistemic_variance_of_many_draws_is_the_closed_form(monkeypatch):
    explorer = an_explorer(laplace_draws=20_000, laplace_rows=30, laplace_std=0.05, shift_weight=0.0)
    b = filled(30)
    weigh = lambda batch: 1 + batch.rewards.abs()  # noqa: E731
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
    weigh = lambda b: 2 + b.terminations  # noqa: E731
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


# ---- the planner's phases ----


def a_planner(tmp_path, **changes) -> dual.Planner:
    args = tiny_args("dual", out_dir=tmp_path, **changes)
    r = run.Run(args, "dual.py", "x", {})
    b = filled(30)
    planner = dual.Planner(r, args, dual.Windows(b, np.zeros(30, bool), args.horizon), A, "hash")
    r.register(**planner.state())
    return planner


def test_average_copies_then_moves_every_few_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(dual, "EMA_START", 4)
    monkeypatch.setattr(dual, "EMA_EVERY", 3)
    planner = a_planner(tmp_path)
    expected = None
    for n in range(1, 15):
        planner.planner_step()
        live = planner.net.head.weight.detach().clone()
        if n <= 4:
            expected = live
        elif n % 3 == 0:
            share = max(0.005, 1 / ((n - 4) / 3 + 1))
            expected = (1 - share) * expected + share * live
        mine = planner.average.head.weight
        assert torch.equal(mine, live) if n <= 4 else torch.allclose(mine, expected, atol=1e-7)
    assert not torch.equal(mine, live)
    assert (dual.EMA_DECAY, dual.Args.planner_steps) == (0.995, 500_000)


def test_learning_rates_fall_to_zero_in_every_phase(tmp_path):
    """Cosine for the planner, linear and from the top again for every halving; the optimizer starts afresh."""
    planner, rates = a_planner(tmp_path, planner_steps=10, halving_steps=4), []
    original = planner.opt.step

    def step(*a):
        moments = [s["exp_avg"].abs().max().item() for s in planner.opt.state.values()]
        rates.append((planner.opt.param_groups[0]["lr"].item(), not any(moments)))
        return original(*a)

    planner.opt.step = step
    planner.learn(None)
    lr = planner.args.planner_lr
    expected = [0.5 * lr * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    expected += 2 * [lr * (1 - k / 8) for k in range(8)]  # 4 -> 2 -> 1 steps, each of twice 4 updates
    expected += [3 * lr * (1 - k / 20) for k in range(20)]  # P̂
    assert [x for x, _ in rates] == pytest.approx(expected, rel=1e-5)
    assert [k for k, (_, fresh) in enumerate(rates) if fresh] == [0, 10, 18, 26]
    assert planner.count == 20


@pytest.mark.parametrize(
    ("teacher", "student", "ladder"),
    [
        (32, 1, [(16, 5), (8, 5), (4, 5), (2, 10), (1, 10)]),
        (32, 8, [(16, 5), (8, 5)]),
        (32, 32, []),
        (24, 3, [(12, 5), (6, 5), (3, 5)]),
    ],
)
def test_halvings(teacher, student, ladder):
    args = tiny_args("dual", teacher_steps=teacher, distill_steps=student, halving_steps=5)
    assert dual.halvings(args) == ladder


def test_students_come_from_their_teachers_and_errors_compare_with_the_planner(tmp_path, monkeypatch):
    """Without a learning rate the student is the planner with fewer steps; the errors are those of its endpoints."""
    planner = a_planner(tmp_path, planner_lr=1e-30)
    told = []
    monkeypatch.setattr(planner.r, "record", lambda _, row: told.append(row))
    planner.learn(None)
    told = [row for row in told if any(k[:8] == "distill/" for k in row)]  # not the losses
    for a, b in zip(planner.average.parameters(), planner.teacher.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert [set(x) for x in told] == [{f"distill/error_{t}", f"distill/action_error_{t}"} for t in (2, 1)]
    g = torch.Generator().manual_seed(0)
    index = torch.randint(30, (512,), generator=g)
    x, _ = planner.windows.take(index)
    z, known = torch.randn(x.shape, generator=g), (torch.arange(D) >= A).expand(512, -1)
    gap = dual.unroll(planner.average, z, x[:, 0], known, 4) - dual.unroll(
        planner.average, z, x[:, 0], known, 1
    )
    action = gap[..., :A].square().mean().item()
    rest = torch.cat([gap[..., :A].flatten(), gap[:, 1:, A:].flatten()]).square().mean().item()
    assert told[1]["distill/action_error_1"] == pytest.approx(action, rel=1e-4)
    assert told[1]["distill/error_1"] == pytest.approx(rest, rel=1e-4)


# ---- the whole program ----


def final_state(folder) -> dict:
    (path,) = folder.glob("**/state.pt")
    return torch.load(path, weights_only=True)["objects"]


def equal_states(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[k], b[k]) for k in a)
    return a == b if not isinstance(a, list) else all(map(equal_states, a, b))


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
    moved = [
        k for k in student if not torch.equal(offline[f"actor.net.{k}"], state["nets"][f"actor.net.{k}"])
    ]
    assert {"inlet.weight", "head.weight", "norm.weight"} <= set(moved) and "mean" not in moved


KILLS = {  # what dies, after how many calls in each life
    "planner": ("planner_loss", (4, 9, 5)),
    "distill": ("distill_loss", (3, 8, 5, 6)),
    "transition": ("transition_loss", (9, 14, 11)),
    "offline": ("losses", (7, 9)),
    "online": ("awr_weight", (25, 6, 4, 3, 5)),
}


@pytest.mark.parametrize("phase", KILLS)
@pytest.mark.parametrize("append", [True, False])
def test_a_run_killed_in_any_phase_resumes_exactly(phase, append, dataset, tmp_path, monkeypatch):
    """Checkpoints at every step: same log, same final state of everything, online in the middle of episodes."""
    changes = dict(dataset=dataset, append_online=append, eval_halvings=True)
    dual.train(tiny_args("dual", out_dir=tmp_path / "straight", **changes))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    where, limits = KILLS[phase]
    original, args = getattr(dual, where), tiny_args("dual", out_dir=tmp_path / "killed", **changes)
    for limit in limits:
        left = [limit]

        def deadly(*a, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            return original(*a)

        monkeypatch.setattr(dual, where, deadly)
        with pytest.raises(InterruptedError):
            dual.train(args)
        gc.collect()
    monkeypatch.setattr(dual, where, original)
    dual.train(args)
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "killed")
    assert equal_states(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))


def test_a_run_killed_between_its_environment_steps_resumes_exactly(dataset, tmp_path, monkeypatch):
    """During the warm-up, every third step: the shift and the tally go on where they were."""
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path / "straight", warmup_steps=25))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args = tiny_args("dual", dataset=dataset, out_dir=tmp_path / "killed", warmup_steps=25)
    original = data.Interaction.step
    deaths, done = 0, False
    while not done:
        left = [4]

        def deadly(self, policy, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            return original(self, policy)

        monkeypatch.setattr(data.Interaction, "step", deadly)
        try:
            dual.train(args)
            done = True
        except InterruptedError:
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
    after = lambda log, *phases: [{k: v for k, v in x.items() if v} for x in log if x["phase"] in phases]  # noqa: E731
    phases = "distill", "offline", "online"
    assert after(rows[0], *phases) == after(rows[1], *phases)
    assert after(rows[0], "online") == after(rows[2], "online")
    states = [final_state(tmp_path / x) for x in "abc"]
    for name in ("nets", "opt", "explorer_offsets", "explorer_n_eff_per_row", "explorer_shift", "online"):
        assert equal_states(states[0][name], states[1][name]) and equal_states(
            states[0][name], states[2][name]
        )
    other = dict(out_dir=tmp_path / "d", from_offline=source.parent, overwrite=True)
    dual.train(tiny_args("dual", **few | other, uq="none", shift_weight=0.0))
    for flag, changes, words in [
        ("from_offline", dict(distill_steps=2), "distill_steps 1 -> 2"),
        ("from_offline", dict(inv_temp=5.0), r"inv_temp 3.0 -> 5.0"),
        ("from_offline", dict(bc_coef=0.0), r"bc_coef 0.1 -> 0.0"),
        ("from_planner", dict(horizon=3), "horizon 4 -> 3"),
        ("from_planner", dict(normalize_obs=False), "normalize_obs True -> False"),
    ]:
        with pytest.raises(run.UsageError, match=words):
            dual.train(
                tiny_args(
                    "dual",
                    **few | dict(out_dir=tmp_path / "e", overwrite=True) | changes,
                    **{flag: source.parent},
                )
            )
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
    changes = dict(
        append_online=False, offline_frac=0.0, normalize_obs=False, reward_scale=10.0, reward_bias=-1.0
    )
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path, **changes))
    shares = [sum(o.numpy().tobytes() in known for o in b.obs) / 16 for b in seen]
    assert shares[:20] == [1.0] * 20 and shares[20:] == [0.0] * 20
    allowed = {f"{10 * x - 1:.4f}" for x in rewards}
    assert {f"{x:.4f}" for b in seen[:20] for x in b.rewards.tolist()} <= allowed
    stored = final_state(tmp_path)["online"]["rows"][:, 11 + 3]
    first = next(x for x in log_rows(tmp_path) if x.get("train/episode_length"))
    length = int(first["train/episode_length"])
    assert stored[:length].sum().item() == pytest.approx(
        10 * float(first["train/episode_return"]) - length, rel=1e-4
    )
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
    scores = [
        float(x["eval/score"]) for x in log_rows(tmp_path) if x["phase"] == "online" and x["eval/score"]
    ]
    assert len(scores) == 5 and result["score_online_mean"] == pytest.approx(sum(scores) / 5)


def test_metrics_are_those_of_the_docstring(dataset, tmp_path):
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path, eval_halvings=True, bc_coef=0.1))
    rows = log_rows(tmp_path)
    where = {k: {x["phase"] for x in rows if x.get(k)} for k in rows[0]}
    for k in ("loss/planner",):
        assert where[k] == {"planner"}
    for k in (
        "loss/distill",
        "distill/error_2",
        "distill/action_error_1",
        "distill/score_1",
        "distill/score_2",
    ):
        assert where[k] == {"distill"}
    assert where["loss/transition"] == {"transition"}
    for k in ("laplace/n_eff", "laplace/condition", "laplace/data_std", "loss/bc"):
        assert where[k] == {"offline", "online"}
    for k in (
        "epistemic_std",
        "aleatoric_std",
        "shift",
        "shift_ratio",
        "share_epistemic",
        "share_aleatoric",
        "share_shift",
    ):
        assert where[f"uq/{k}"] == {"online"}
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
            cases += [
                (lambda *a: dual.losses(*a)[0], (nets, batch, args)),
                (dual.planner_loss, (net, x, mask)),
            ]
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
