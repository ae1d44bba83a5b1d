"""The behavior model that DARE and StratDiff share: noise levels, networks, sampler, guidance, losses, support actions.

Every formula against a closed form, rows computed by hand, or an independent brute force.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU

from algorithms import iql_dare as dare


def levels(t: float) -> tuple[float, float]:
    """α_t, σ_t from the integral of β(t) = 0.1 + 19.9 t: α² = exp(-∫β)."""
    alpha = math.exp(-0.5 * (0.1 * t + 19.9 * t * t / 2))
    return alpha, math.sqrt(1 - alpha * alpha)


def count(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


def zero(x: torch.Tensor, _t: torch.Tensor, _obs: torch.Tensor) -> torch.Tensor:
    """A behavior model that sees no noise."""
    return 0 * x


# ---- VP-SDE (reference 1.1) ----


def test_vp_sde_numbers():
    """α_1, σ_1, σ(1e-3), λ(1), λ(1e-3) as printed in the reference."""
    alpha, sigma = dare.noise_levels(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    assert alpha[0].item() == pytest.approx(0.006572, abs=5e-7)
    assert sigma.tolist() == pytest.approx([0.999978, 0.010485], abs=5e-7)
    assert dare.half_log_snr(1.0) == pytest.approx(-5.0250, abs=5e-5)
    assert dare.half_log_snr(1e-3) == pytest.approx(4.5577, abs=5e-5)


def test_noise_levels_are_the_integral_of_the_rate():
    """α and σ at many times, and the host version log_alpha, against exp(-½∫β); float32 keeps small σ."""
    times = torch.linspace(1e-3, 1, 97, dtype=torch.float64)
    alpha, sigma = dare.noise_levels(times)
    expected = torch.tensor([levels(t) for t in times.tolist()], dtype=torch.float64)
    assert torch.allclose(torch.stack([alpha, sigma], 1), expected, rtol=1e-9)
    assert math.exp(dare.log_alpha(0.3)) == pytest.approx(levels(0.3)[0], rel=1e-12)
    alpha32, sigma32 = dare.noise_levels(times.float())
    assert torch.allclose(torch.stack([alpha32, sigma32], 1).double(), expected, rtol=2e-5)


def test_half_log_snr_is_the_log_of_alpha_over_sigma():
    times = np.geomspace(1e-3, 1.0, 500)
    lams = [math.log(levels(t)[0] / levels(t)[1]) for t in times]
    assert [dare.half_log_snr(t) for t in times] == pytest.approx(lams, rel=1e-9)


# ---- networks (1.2, 2.1) ----


def test_parameter_counts():
    """The sizes of the official networks."""
    assert count(dare.BehaviorNet(11, 3, 512)) == 1_627_939
    assert count(dare.BehaviorNet(17, 6, 512)) == 1_634_278
    assert count(dare.EnergyNet(17, 6, 256)) == 213_025


def test_fourier_features_by_hand_and_never_trained():
    """[sin 2πtW, cos 2πtW], W ~ N(0, 30²) in the checkpoint, not among the parameters; each net has its own."""
    torch.manual_seed(0)
    net = dare.FourierTime()
    with torch.no_grad():
        net.linear.weight.copy_(torch.eye(32))
        net.linear.bias.zero_()
    t = torch.tensor([0.25, 0.7])
    w = net.frequencies.double().numpy()
    angles = 2 * np.pi * t.double().numpy()[:, None] * w
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    assert np.allclose(net(t).detach().numpy(), expected, atol=2e-4)
    assert net(t[:, None].expand(2, 5)).shape == (2, 5, 32)
    spread = torch.cat([dare.FourierTime().frequencies for _ in range(200)])
    assert spread.std().item() == pytest.approx(30, rel=0.05) and abs(spread.mean().item()) < 2
    for model in (dare.BehaviorNet(5, 2, 16), dare.EnergyNet(5, 2, 16)):
        assert "time.frequencies" in model.state_dict()
        assert "time.frequencies" not in dict(model.named_parameters())
    assert not torch.equal(dare.FourierTime().frequencies, dare.FourierTime().frequencies)


def test_behavior_net_is_the_one_of_the_reference():
    """The forward pass of section 1.2 written out on the same weights."""
    torch.manual_seed(1)
    net = dare.BehaviorNet(5, 2, 16)
    w = net.state_dict()
    x, t, obs = torch.randn(7, 2), torch.rand(7), torch.randn(7, 5)

    def lin(name: str, y: torch.Tensor) -> torch.Tensor:
        return y @ w[name + ".weight"].T + w[name + ".bias"]

    def silu(y: torch.Tensor) -> torch.Tensor:
        return y / (1 + (-y).exp())

    angles = 2 * math.pi * t[:, None] * w["time.frequencies"][None]
    time = lin("time.linear", torch.cat([torch.sin(angles), torch.cos(angles)], 1))
    e = lin("embed.2", silu(lin("embed.0", torch.cat([silu(lin("state", obs)), time], 1))))

    def res(name: str, y: torch.Tensor) -> torch.Tensor:
        h = silu(lin(name + ".first", y)) + lin(name + ".cond", silu(e))
        skip = lin(name + ".skip", y) if name + ".skip.weight" in w else y
        return silu(lin(name + ".second", h)) + skip

    d1 = res("down1", x)
    d2 = res("down2", d1)
    d3 = res("down3", d2)
    u3 = res("up3", torch.cat([d3, res("middle", d3)], 1))
    u2 = res("up2", torch.cat([d2, u3], 1))
    assert [y.shape[1] for y in (d1, d2, d3, u3, u2)] == [16, 8, 4, 8, 16]
    assert torch.allclose(net(x, t, obs), lin("out", torch.cat([d1, u2], 1)), atol=1e-5)
    assert torch.allclose(net(x, t[:1], obs), net(x, t[:1].expand(7), obs), atol=1e-6)


def test_energy_net_is_the_one_of_the_reference():
    """Four SiLU layers on [a_t, τ(t), s] and a linear output, for rows and for (N, K) blocks."""
    torch.manual_seed(1)
    net = dare.EnergyNet(5, 2, 16)
    w = net.state_dict()
    x, t, obs = torch.randn(4, 3, 2), torch.rand(4, 3), torch.randn(4, 3, 5)
    angles = 2 * math.pi * t[..., None] * w["time.frequencies"]
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    time = F.linear(waves, w["time.linear.weight"], w["time.linear.bias"])
    h = torch.cat([x, time, obs], -1)
    for i in (0, 2, 4, 6):
        h = F.silu(F.linear(h, w[f"net.{i}.weight"], w[f"net.{i}.bias"]))
    expected = F.linear(h, w["net.8.weight"], w["net.8.bias"])[..., 0]
    assert torch.allclose(net(obs, x, t), expected, atol=1e-6)
    assert torch.allclose(net(obs[:, 1], x[:, 1], t[:, 1]), expected[:, 1], atol=1e-6)
    one = torch.full((1,), 0.4)
    assert torch.allclose(net(obs[0], x[0], one), net(obs[0], x[0], one.expand(3)), atol=1e-6)


def test_state_reaches_the_output_of_its_own_row_only():
    """Jacobian of each output with respect to every state and every action: diagonal blocks, none zero."""
    torch.manual_seed(2)
    behavior, energy = dare.BehaviorNet(5, 2, 16), dare.EnergyNet(5, 2, 16)
    x, t, obs = torch.randn(4, 2), torch.rand(4), torch.randn(4, 5)
    for net in (lambda x, s: behavior(x, t, s).sum(1), lambda x, s: energy(s, x, t)):
        for jac in torch.autograd.functional.jacobian(net, (x, obs)):  # (4, 4, ·)
            size = jac.abs().sum(-1)
            assert (size.diagonal() > 1e-6).all()
            assert (size - size.diagonal().diag()).abs().max() == 0


# ---- sampler (1.4, 1.5) ----


def gaussian_eps(m: float, v: float, slope: float = 0.0, seen: list | None = None):
    """ε̂ of N(m, v) tilted by exp(slope · a): exact score and exact intermediate guidance."""

    def eps_fn(x: torch.Tensor, t: float) -> torch.Tensor:
        if seen is not None:
            seen.append(t)
        alpha, sigma = levels(t)
        var = alpha * alpha * v + sigma * sigma
        score = -(x - alpha * m) / var
        return -sigma * (score + slope * alpha * v / var)

    return eps_fn


@pytest.mark.parametrize(("sd", "ratio"), [(0.6, 0.91), (0.3, 0.79), (0.1, 0.49)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_sampler_reaches_the_moments_of_a_guided_gaussian(sd, ratio, scale):
    """It is affine in its start x = b + a z: mean b, std |a|, exactly; the mean is m + s β v q, the std too small."""
    m, q, beta = 0.3, 0.7, 3.0
    start = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64)
    out = dare.sample_actions(gaussian_eps(m, sd * sd, scale * beta * q), start)[:, 0].tolist()
    assert out[2] - out[0] == pytest.approx(-2 * (out[1] - out[0]), rel=1e-9)
    assert out[0] == pytest.approx(m + scale * beta * sd * sd * q, rel=0.005)
    assert (out[1] - out[0]) / sd == pytest.approx(ratio, abs=0.01)


def test_sampler_evaluates_15_times_within_the_trained_times():
    """At times falling uniformly from 1, none below 1e-3 or above 1."""
    seen: list[float] = []
    dare.sample_actions(gaussian_eps(0.0, 1.0, seen=seen), torch.zeros(2, 3))
    assert len(seen) == 15 and seen[0] == pytest.approx(1.0) and max(seen) <= 1 + 1e-9 and min(seen) >= 1e-3
    assert np.allclose(np.diff([*seen, 1e-3]), -0.999 / 15, rtol=1e-6)


def mixture_eps(x, t: float):
    """ε̂ of ½ N(-0.5, 0.1²) + ½ N(0.6, 0.2²), numpy or torch: a score that is not linear."""
    alpha, sigma = levels(t)
    v1, v2 = alpha**2 * 0.01 + sigma**2, alpha**2 * 0.04 + sigma**2
    z1, z2 = x + alpha * 0.5, x - alpha * 0.6
    odds = ((z1 * z1 / v1 - z2 * z2 / v2) / 2).clip(-500, 500)
    weight = 1 / (1 + math.sqrt(v2 / v1) * math.e ** (-odds))  # of the second component
    return sigma * ((1 - weight) * z1 / v1 + weight * z2 / v2)


def textbook_sampler(x: np.ndarray) -> np.ndarray:
    """DPM-Solver++ 2S as in section 1.4: seven steps of two grid intervals, then one of first order."""

    def lam(t: float) -> float:
        return math.log(levels(t)[0]) - math.log(levels(t)[1])

    def clean(x, t):
        return (x - levels(t)[1] * mixture_eps(x, t)) / levels(t)[0]

    def first(x, d, s, t):
        return levels(t)[1] / levels(s)[1] * x - levels(t)[0] * (math.exp(lam(s) - lam(t)) - 1) * d

    grid = np.linspace(1, 1e-3, 16)
    for i in range(0, 14, 2):
        s, s1, t = grid[i : i + 3]
        r = (lam(s1) - lam(s)) / (lam(t) - lam(s))
        d = clean(x, s)
        u = first(x, d, s, s1)
        x = first(x, d + (clean(u, s1) - d) / (2 * r), s, t)
    return first(x, clean(x, grid[14]), grid[14], grid[15])


def test_sampler_equals_a_textbook_loop_on_a_nonlinear_score():
    """Two-component mixture in float64, numpy against torch."""
    x = np.random.default_rng(0).normal(size=(50, 2))
    out = dare.sample_actions(mixture_eps, torch.from_numpy(x)).numpy()
    assert np.allclose(out, textbook_sampler(x), atol=1e-7)


# ---- guidance ----


class Linear(nn.Module):
    """f(s, a_t, t) = c · a_t, counting its calls."""

    def __init__(self, c: torch.Tensor):
        super().__init__()
        self.c, self.calls = nn.Parameter(c), 0

    def forward(self, _obs, x, _t):
        self.calls += 1
        return x @ self.c


def test_guided_noise_is_the_noise_minus_s_sigma_gradient():
    """Linear energy: ε̂_g = ε̂ - s σ_t c; with s = 0 or without an energy it is ε̂ and the energy is not called."""
    torch.manual_seed(0)
    behavior, energy = dare.BehaviorNet(5, 2, 16), Linear(torch.tensor([1.5, -0.5]))
    x, obs = torch.randn(6, 2), torch.randn(6, 5)
    with torch.no_grad():
        for t in (1e-3, 0.3, 1.0):
            eps = behavior(x, torch.full((1,), t), obs)
            for s in (1.0, 8.0):
                guided = dare.guided_eps(behavior, energy, obs, s)(x, t)
                expected = eps - s * levels(t)[1] * torch.tensor([1.5, -0.5])
                assert torch.allclose(guided, expected, atol=1e-6 * s)
            calls = energy.calls
            assert torch.equal(dare.guided_eps(behavior, energy, obs, 0.0)(x, t), eps)
            assert energy.calls == calls
            assert torch.equal(dare.guided_eps(behavior, None, obs, 3.0)(x, t), eps)


def test_split_path_has_no_gradient_to_parameters_and_does_not_touch_its_input():
    """Under no_grad the guidance still has its input gradient; nothing requires or receives a gradient."""
    torch.manual_seed(0)
    behavior, energy = dare.BehaviorNet(5, 2, 16), dare.EnergyNet(5, 2, 16)
    x, obs = torch.randn(6, 2), torch.randn(6, 5)
    kept = x.clone()
    with torch.no_grad():
        out = dare.guided_eps(behavior, energy, obs, 5.0)(x, 0.3)
        refs = dare.sample_actions(dare.guided_eps(behavior, energy, obs, 5.0), x)
    assert not out.requires_grad and not refs.requires_grad and not x.requires_grad
    assert torch.equal(x, kept)
    assert all(p.grad is None for p in [*behavior.parameters(), *energy.parameters()])
    assert (out - behavior(x, torch.full((1,), 0.3), obs)).abs().max() > 1e-6


def test_guidance_of_a_row_is_its_own_gradient():
    """Each row against finite differences of its own energy; other rows and states do not matter."""
    torch.manual_seed(0)
    behavior, energy = dare.BehaviorNet(5, 2, 16), dare.EnergyNet(5, 2, 16).double()
    silent = dare.BehaviorNet(5, 2, 16)
    nn.init.zeros_(silent.out.weight)
    nn.init.zeros_(silent.out.bias)
    x, obs = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    t, h = 0.3, 1e-5

    def f(i: int, a: torch.Tensor) -> float:
        return energy(obs[i : i + 1], a[None], torch.full((1,), t, dtype=torch.float64)).item()

    def energy_at(s, a, time):
        return energy(s, a, time.double())

    out = dare.guided_eps(zero, energy_at, obs, 2.0)(x, t)
    for i in range(4):
        for j in range(2):
            step = h * torch.eye(2, dtype=torch.float64)[j]
            slope = (f(i, x[i] + step) - f(i, x[i] - step)) / (2 * h)
            assert out[i, j].item() == pytest.approx(-2 * levels(t)[1] * slope, abs=1e-7)
    energy.float()
    x, obs = x.float(), obs.float()
    before = dare.guided_eps(behavior, energy, obs, 2.0)(x, t)
    x[3], obs[3] = 9.0, -9.0
    after = dare.guided_eps(behavior, energy, obs, 2.0)(x, t)
    assert torch.allclose(before[:3], after[:3], atol=1e-6) and not torch.allclose(before[3], after[3])


def test_guided_samples_of_modules_have_the_exact_mean():
    """guided_eps on modules with exact score and exact energy: mean m + s β v q per dimension."""
    m, v, slope = torch.tensor([0.2, -0.4]), 0.09, torch.tensor([1.0, -2.0])

    def scales(t):
        alpha, sigma = levels(t.item())
        return alpha, sigma, alpha * alpha * v + sigma * sigma

    def behavior(x, t, _obs):
        alpha, sigma, var = scales(t)
        return sigma * (x - alpha * m) / var

    def energy(_obs, x, t):
        alpha, _, var = scales(t)
        return x @ (slope * alpha * v / var)

    for s in (0.0, 1.0, 5.0):
        with torch.no_grad():
            eps_fn = dare.guided_eps(behavior, energy, torch.zeros(1, 1), s)
            mean = dare.sample_actions(eps_fn, torch.zeros(1, 2))[0]
        assert torch.allclose(mean, m + s * v * slope, rtol=0.005)


# ---- energy loss (2.2) ----


class Fixed(nn.Module):
    """An energy that ignores its inputs, recording them: f (N, K) given."""

    def __init__(self, f: torch.Tensor):
        super().__init__()
        self.f, self.seen = nn.Parameter(f), []

    def forward(self, obs, x, t):
        self.seen.append((obs, x, t))
        return self.f


def energy_case(bq, f, has=None, act_dim: int = 1):
    """energy_loss on given βQ and f: loss, logs, the recording energy."""
    bq, net = torch.as_tensor(bq), Fixed(torch.as_tensor(f))
    n, k = bq.shape
    has = torch.ones(n) if has is None else torch.tensor(has)
    loss, logs = dare.energy_loss(net, torch.zeros(n, 2), torch.zeros(n, k, act_dim), bq, has)
    return loss, logs, net


def test_energy_loss_by_hand():
    """Labels (3/4, 1/4), (1/2, 1/2); softmax f (1/2, 1/2), (3/4, 1/4): loss (ln 2 - ½ ln 3/4 - ½ ln 1/4) / 2."""
    log3 = math.log(3)
    loss, logs, _ = energy_case([[log3, 0.0], [0.0, 0.0]], [[0.0, 0.0], [log3, 0.0]])
    first, second = math.log(2), -0.5 * math.log(0.75) - 0.5 * math.log(0.25)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert logs["energy/label_entropy"].item() == pytest.approx((entropy + math.log(2)) / 2, rel=1e-6)
    assert logs["energy/std_bq"].item() == pytest.approx(log3 / 4, rel=1e-6)
    assert logs["energy/loss"].item() == loss.item()


def test_energy_loss_is_cross_entropy_summed_over_actions_averaged_over_states():
    """Random (N, K) against a loop in numpy; the gradient in f is (softmax f - label) / N."""
    rng = np.random.default_rng(0)
    bq, f = rng.normal(size=(2, 7, 5)) * 2
    loss, _, net = energy_case(bq, f)
    expected, gradient = 0.0, np.zeros_like(f)
    for i in range(7):
        label = np.exp(bq[i]) / np.exp(bq[i]).sum()
        soft = np.exp(f[i]) / np.exp(f[i]).sum()
        expected -= (label * np.log(soft)).sum() / 7
        gradient[i] = (soft - label) / 7
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert np.allclose(net.f.grad.numpy(), gradient, atol=1e-7)


def test_energy_loss_ignores_constants_of_a_state():
    """Adding a number per state to βQ or to f changes nothing, also where exp would overflow."""
    rng = np.random.default_rng(1)
    bq, f, c = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), rng.normal(size=(6, 1)) * 1e4
    base = energy_case(bq, f)[0].item()
    assert energy_case(bq + c, f)[0].item() == pytest.approx(base, rel=1e-9)
    assert energy_case(bq, f + c)[0].item() == pytest.approx(base, rel=1e-9)


def test_rows_without_support_do_not_count():
    """One supported row of two gives that row's loss; none gives 0, finite, with zero gradient."""
    bq, f = [[math.log(3), 0.0], [5.0, -5.0]], [[0.0, 0.0], [1.0, 2.0]]
    loss, logs, net = energy_case(bq, f, [1.0, 0.0])
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert logs["energy/label_entropy"].item() == pytest.approx(0.562335, abs=1e-6)
    loss.backward()
    assert not net.f.grad[1].any() and net.f.grad[0].any()
    loss, logs, net = energy_case(bq, f, [0.0, 0.0])
    assert loss.item() == 0 and all(v.item() == 0 for v in logs.values())
    loss.backward()
    assert not net.f.grad.any()


def test_label_entropy_runs_from_ln_k_to_zero():
    """Equal βQ: ln K; one action far ahead: 0, finite."""
    for k in (2, 5, 16):
        _, logs, _ = energy_case(torch.full((3, k), 7.0), torch.zeros(3, k))
        assert logs["energy/label_entropy"].item() == pytest.approx(math.log(k), rel=1e-6)
    entropy = energy_case([[1e4, 0.0, 0.0]], torch.zeros(1, 3))[1]["energy/label_entropy"].item()
    assert entropy == pytest.approx(0.0, abs=1e-6)


def test_one_time_per_state_and_own_noise_per_action():
    """Times differ between states only and fill [1e-3, 1]; x = α_t a + σ_t ε with ε ~ N(0, 1) of its own."""
    torch.manual_seed(0)
    n, k, a = 4_000, 3, 2
    support = torch.rand(n, k, a) * 2 - 1
    obs, net = torch.randn(n, 5), Fixed(torch.zeros(n, k))
    dare.energy_loss(net, obs, support, torch.zeros(n, k), torch.ones(n))
    seen_obs, x, t = net.seen[0]
    assert t.shape == (n, k) and torch.equal(t, t[:, :1].expand(n, k))
    assert len(t[:, 0].unique()) > 0.9 * n and t.min() >= 1e-3 and t.max() <= 1
    assert np.allclose(np.quantile(t[:, 0].numpy(), [0.1, 0.5, 0.9]), [0.101, 0.5005, 0.9], atol=0.025)
    assert torch.equal(seen_obs, obs[:, None].expand(n, k, 5))
    alpha, sigma = (y[..., None] for y in dare.noise_levels(t.double()))
    noise = ((x - alpha * support) / sigma).flatten()
    assert noise.std().item() == pytest.approx(1, abs=0.02) and abs(noise.mean().item()) < 0.02
    correlations = np.corrcoef(noise.view(n, k * a).numpy().T)[np.triu_indices(k * a, 1)]
    assert correlations == pytest.approx(0, abs=0.06)


def test_energy_loss_prefers_f_equal_to_beta_q(monkeypatch):
    """At t -> 0 the loss is least at f = βQ: above it at 0, ½βQ, 2βQ and most at -βQ."""
    support = torch.rand(500, 8, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(*size))
    loss = {}
    for c in (-3.0, 0.0, 1.5, 3.0, 6.0):
        torch.manual_seed(0)

        def energy(_obs, x, _t, c=c):
            return c * x[..., 0]

        args = (torch.zeros(500, 1), support, 3 * support[..., 0], torch.ones(500))
        loss[c] = dare.energy_loss(energy, *args)[0].item()
    assert loss[3.0] < min(loss[1.5], loss[6.0]) and max(loss[1.5], loss[6.0]) < loss[-3.0]
    assert loss[0.0] == pytest.approx(math.log(8), rel=1e-6) and loss[1.5] < loss[0.0] < loss[-3.0]


def test_trained_energy_points_uphill():
    """D11: Q(a) = a on a ~ N(0, ½²), β = 2: df/da > 0, and for small t near the exact β α v / (α² v + σ²)."""
    torch.manual_seed(0)
    energy, v, beta = dare.EnergyNet(1, 1, 32), 0.25, 2.0
    opt = torch.optim.Adam(energy.parameters(), lr=3e-3)
    for i in range(300):
        opt.param_groups[0]["lr"] = 3e-3 * (1 - i / 300)
        support = math.sqrt(v) * torch.randn(128, 16, 1)
        args = torch.zeros(128, 1), support, beta * support[..., 0], torch.ones(128)
        loss, _ = dare.energy_loss(energy, *args)
        opt.zero_grad()
        loss.backward()
        opt.step()
    for t in (0.05, 0.2, 0.4):
        alpha, sigma = levels(t)
        x = (alpha * math.sqrt(v) * torch.randn(500, 1) + sigma * torch.randn(500, 1)).requires_grad_()
        (slope,) = torch.autograd.grad(energy(torch.zeros(500, 1), x, torch.full((1,), t)).sum(), x)
        exact = beta * alpha * v / (alpha**2 * v + sigma**2)
        assert slope.mean().item() > 0
        assert t == 0.4 or slope.mean().item() == pytest.approx(exact, rel=0.3)


# ---- behavior loss (1.3) ----


def test_behavior_loss_of_a_net_that_returns_zero_is_the_action_dimension():
    """E ||ε||² = A: a sum over dimensions, a mean over rows."""
    torch.manual_seed(0)
    for a in (1, 3, 6):
        loss = dare.behavior_loss(zero, torch.zeros(60_000, 2), torch.rand(60_000, a) * 2 - 1)
        assert loss.item() == pytest.approx(a, rel=0.02)


def test_behavior_loss_of_the_true_noise_is_zero():
    """A net that inverts x = α_t a + σ_t ε; one t per row, uniform on [1e-3, 1], and the rows' own states."""
    torch.manual_seed(0)
    actions, obs, seen = torch.rand(5_000, 3) * 2 - 1, torch.randn(5_000, 2), []

    def oracle(x, t, states):
        seen.append((t, states))
        alpha, sigma = (y[:, None] for y in dare.noise_levels(t.double()))
        return ((x - alpha * actions) / sigma).float()

    assert dare.behavior_loss(oracle, obs, actions).item() < 1e-6
    t, states = seen[0]
    assert t.shape == (5_000,) and t.min() >= 1e-3 and t.max() <= 1 and torch.equal(states, obs)
    assert np.quantile(t.numpy(), [0.1, 0.5, 0.9]) == pytest.approx([0.101, 0.5005, 0.9], abs=0.02)


def test_behavior_loss_sums_dimensions_and_averages_rows(monkeypatch):
    """ε = (1, 2), (3, 0), ε̂ = (0, 1) in each row: (1 + 1 + 9 + 1) / 2 = 6."""
    monkeypatch.setattr(torch, "randn_like", lambda _: torch.tensor([[1.0, 2.0], [3.0, 0.0]]))

    def constant(x, _t, _obs):
        return torch.tensor([0.0, 1.0]).expand_as(x)

    assert dare.behavior_loss(constant, torch.zeros(2, 1), torch.zeros(2, 2)).item() == pytest.approx(6.0)


# ---- support actions (2.3) ----


class OwnMean(nn.Module):
    """Exact ε̂ of N(s[:2], v): each state has its own mean."""

    def __init__(self, v: float):
        super().__init__()
        self.v = v

    def forward(self, x, t, obs):
        alpha, sigma = levels(t.item())
        return sigma * (x - alpha * obs[:, :2]) / (alpha**2 * self.v + sigma**2)


def test_support_actions_belong_to_their_states():
    """Row i, all K of them, around the mean of state i with the sampler's own spread; clamped; repeatable."""
    torch.manual_seed(0)
    obs = torch.rand(40, 3) * 1.2 - 0.6
    out = dare.support_actions(OwnMean(0.01), obs, torch.randn(40, 100, 2))
    assert out.shape == (40, 100, 2) and not out.requires_grad
    assert (out.mean(1) - obs[:, :2]).abs().max() < 0.05
    assert out.std(1).mean().item() == pytest.approx(0.0487, rel=0.05)
    far = dare.support_actions(OwnMean(0.01), obs + 3, torch.randn(40, 5, 2))
    assert (far == 1).all()
    noise = torch.randn(40, 100, 2)
    wide = dare.support_actions(OwnMean(1.0), obs, noise)
    assert wide.abs().max() == 1 and (wide.abs() < 1).float().mean() > 0.5
    one = dare.support_actions(OwnMean(1.0), obs[7:8], noise[7:8])
    assert torch.allclose(one, wide[7:8], atol=1e-6)


def test_support_grows_and_survives_a_checkpoint():
    """extend appends own rows, size counts on the device, state_dict holds them alone, loading keeps addresses."""
    data, a, b = torch.rand(2, 2, 1), torch.rand(3, 2, 1), torch.rand(4, 2, 1)
    support = dare.Support(2, 10, 2, 1, CPU)
    assert support.rows == 2 and support.size.item() == 2 and support.actions.shape == (12, 2, 1)
    support.actions[:2] = data
    support.extend(a)
    support.extend(b)
    assert support.rows == 9 and support.size.item() == 9
    assert torch.equal(support.actions[:9], torch.cat([data, a, b])) and not support.actions[9:].any()
    state = support.state_dict()
    assert state["actions"].shape == (7, 2, 1)
    support.extend(a)
    support.actions.zero_()
    other = dare.Support(2, 10, 2, 1, CPU)
    other.actions[:2] = data
    other.extend(b)
    address = other.actions.data_ptr(), other.size.data_ptr()
    other.load_state_dict(state)
    assert other.rows == 9 and other.size.item() == 9
    assert torch.equal(other.actions[:9], torch.cat([data, a, b]))
    assert (other.actions.data_ptr(), other.size.data_ptr()) == address
