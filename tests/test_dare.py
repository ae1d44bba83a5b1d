"""DARE: every formula against a closed form, rows computed by hand, or an independent brute force."""

import math

import h5py
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import log_rows, tiny_args
from torch.distributions import Normal, kl_divergence

from algorithms import iql_dare as dare
from common.buffer import Batch

torch.set_num_threads(1)
CPU = torch.device("cpu")


def levels(t: float) -> tuple[float, float]:
    """α_t, σ_t from the integral of β(t) = 0.1 + 19.9 t: α² = exp(-∫β)."""
    alpha = math.exp(-0.5 * (0.1 * t + 19.9 * t * t / 2))
    return alpha, math.sqrt(1 - alpha * alpha)


def count(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


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
    time = F.linear(
        torch.cat([angles.sin(), angles.cos()], -1), w["time.linear.weight"], w["time.linear.bias"]
    )
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

    def forward(self, obs, x, t):  # noqa: ARG002
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

    energy_at = lambda s, a, time: energy(s, a, time.double())  # noqa: E731
    zero = lambda a, time, s: 0 * a  # noqa: E731, ARG005
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

    def behavior(x, t, obs):  # noqa: ARG001
        alpha, sigma, var = scales(t)
        return sigma * (x - alpha * m) / var

    def energy(obs, x, t):  # noqa: ARG001
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
        assert energy_case(torch.full((3, k), 7.0), torch.zeros(3, k))[1][
            "energy/label_entropy"
        ].item() == pytest.approx(math.log(k), rel=1e-6)
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
    assert np.corrcoef(noise.view(n, k * a).numpy().T)[np.triu_indices(k * a, 1)] == pytest.approx(
        0, abs=0.06
    )


def test_energy_loss_prefers_f_equal_to_beta_q(monkeypatch):
    """At t -> 0 the loss is least at f = βQ: above it at 0, ½βQ, 2βQ and most at -βQ."""
    support = torch.rand(500, 8, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(*size))
    loss = {}
    for c in (-3.0, 0.0, 1.5, 3.0, 6.0):
        torch.manual_seed(0)
        energy = lambda obs, x, t, c=c: c * x[..., 0]  # noqa: E731, ARG005
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
        support = math.sqrt(v) * torch.randn(256, 16, 1)
        args = torch.zeros(256, 1), support, beta * support[..., 0], torch.ones(256)
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
        zero = lambda x, t, obs: 0 * x  # noqa: E731, ARG005
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
    constant = lambda x, t, obs: torch.tensor([0.0, 1.0]).expand_as(x)  # noqa: E731, ARG005
    assert dare.behavior_loss(constant, torch.zeros(2, 1), torch.zeros(2, 2)).item() == pytest.approx(6.0)


# ---- scores (3) ----


def score_case(rows: int = 9, act_dim: int = 3) -> tuple:
    """Actions, references and log-std from a fixed seed."""
    g = torch.Generator().manual_seed(0)
    actions, refs = torch.rand(2, rows, act_dim, generator=g) * 2 - 1
    return actions, refs, torch.tensor([-1.0, 0.2, 0.7])


def test_gauss_score_by_hand():
    """Half the squared distance: a = (1, -1), â = (0, 1): 5/2; with spreads 1/2 and 2: (4 + 4/4) / 2."""
    a, ref = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    assert dare.alignment("gauss", a, ref, torch.zeros(2)).tolist() == [2.5]
    log_std = torch.tensor([0.5, 2.0]).log()
    assert dare.alignment("gauss_std", a, ref, log_std).tolist() == pytest.approx([2.5])


def test_scores_are_divergences_of_gaussians():
    """Both against torch.distributions: KL(N(a, σ²) || N(â, σ²)) summed over dimensions; σ of all rows, or of each."""
    a, refs, log_std = score_case()
    own = log_std + torch.linspace(-1, 1, 9)[:, None]
    for kind, given, std in (
        ("gauss", log_std, torch.ones(3)),
        ("gauss_std", log_std, log_std.exp()),
        ("gauss_std", own, own.exp()),
    ):
        expected = kl_divergence(Normal(a, std), Normal(refs, std)).sum(-1)
        assert torch.allclose(dare.alignment(kind, a, refs, given), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["gauss", "gauss_std"])
def test_scores_grow_with_the_distance(kind):
    """Actions moving away from the reference along a line; shape (N,), 0 only at the reference."""
    steps = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0])
    a = steps[:, None] * torch.tensor([0.9, -0.5, 0.2])
    score = dare.alignment(kind, a, torch.zeros(5, 3), torch.tensor([-1.0, 0.2, 0.7]))
    assert score.shape == (5,) and (score.diff() > 0).all() and score[0] == 0


# ---- threshold (5.1) ----


def rows_with(mean: float, std: float, dtype=torch.float64) -> torch.Tensor:
    """Two scores with exactly this mean and population standard deviation."""
    return torch.tensor([mean - std, mean + std], dtype=dtype)


@pytest.mark.parametrize(
    ("off", "on", "tau", "valid"),
    [
        ((1, 0.3), (2, 0.8), 1.465532, True),
        ((2, 0.3), (1, 0.8), 1.534468, True),
        ((1, 0.1), (1.1, 1.0), 1.05, False),
        ((1, 0.5), (2, 0.5), 1.5, True),
        ((1, 0.5), (1, 2.0), 1.0, False),
    ],
)
def test_threshold_reference_values(off, on, tau, valid):
    """Crossing, swapped means, no root between the means, equal spreads, equal means; and what is logged."""
    for dtype in (torch.float64, torch.float32):
        out, logs = dare.gaussian_threshold(rows_with(*off, dtype), rows_with(*on, dtype))
        assert out.item() == pytest.approx(tau, abs=2e-6) and out.shape == ()
        assert bool(logs["split/root_valid"]) is valid and logs["split/tau"].item() == out.item()
        assert logs["split/mu_gap"].item() == pytest.approx(on[0] - off[0], abs=1e-6)
        stds = [logs["split/off_std"].item(), logs["split/on_std"].item()]
        assert stds == pytest.approx([off[1], on[1]], rel=1e-5)


def bisect(m1, s1, m2, s2) -> tuple[np.ndarray, np.ndarray]:
    """Root of the log-ratio of two Gaussian densities between their means, and whether there is one; arrays."""

    def ratio(x):
        return -((x - m1) ** 2) / (2 * s1**2) + (x - m2) ** 2 / (2 * s2**2) + np.log(s2 / s1)

    valid = (ratio(m1) > 0) & (ratio(m2) < 0)
    low, high = m1.copy(), m2.copy()
    for _ in range(100):
        mid = (low + high) / 2
        right = ratio(mid) > 0
        low, high = np.where(right, mid, low), np.where(right, high, mid)
    return np.where(valid, low, (m1 + m2) / 2), valid


def test_threshold_against_bisection():
    """6,000 cases: spreads over five decades, 20 % near-equal, 10 % equal, means in either order."""
    rng = np.random.default_rng(0)
    n = 6_000
    m1 = rng.normal(size=n)
    m2 = m1 + rng.choice([-1, 1], n) * 10 ** rng.uniform(-2, 1, n)
    s1, s2 = 10 ** rng.uniform(-3, 2, (2, n))
    s2[: n // 5] = s1[: n // 5] * (1 + 1e-4 * rng.normal(size=n // 5))
    s2[n // 5 : 3 * n // 10] = s1[n // 5 : 3 * n // 10]
    tau, valid = bisect(m1, s1, m2, s2)
    assert 0.3 < valid.mean() < 0.9
    for i in range(n):
        out, logs = dare.gaussian_threshold(rows_with(m1[i], s1[i]), rows_with(m2[i], s2[i]))
        assert bool(logs["split/root_valid"]) == valid[i]
        assert abs(out.item() - tau[i]) <= 1e-5 * abs(m2[i] - m1[i])


def test_threshold_in_float32_with_near_equal_spreads():
    """Where the two-root formula loses the root: valid, and right to 1e-5 of the gap."""
    rng = np.random.default_rng(1)
    n = 1_000
    m1, s1 = rng.normal(size=n), rng.uniform(0.3, 1, n)
    m2 = m1 + rng.choice([-1, 1], n) * rng.uniform(0.5, 2, n)
    s2 = s1 * (1 + 10 ** rng.uniform(-8, -3, n) * rng.choice([-1, 0, 1], n))
    for i in range(n):
        off, on = (rows_with(m, s, torch.float32) for m, s in ((m1[i], s1[i]), (m2[i], s2[i])))
        exact = [f(x) for x in (off.double().numpy(), on.double().numpy()) for f in (np.mean, np.std)]
        (tau,), (valid,) = bisect(*(np.array([x]) for x in exact))
        out, logs = dare.gaussian_threshold(off, on)
        assert valid and bool(logs["split/root_valid"])
        assert abs(out.item() - tau) <= 1e-5 * abs(m2[i] - m1[i])


def test_threshold_moves_with_the_scores():
    """τ(c d + b) = c τ(d) + b for c > 0: units and offsets of the score do not matter."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        off, on = torch.tensor(rng.gamma(2, size=(2, 40)))
        c, b = 10 ** rng.uniform(-3, 3), rng.normal() * 10
        tau = dare.gaussian_threshold(off, on)[0].item()
        assert dare.gaussian_threshold(c * off + b, c * on + b)[0].item() == pytest.approx(
            c * tau + b, rel=1e-6
        )


def test_threshold_of_degenerate_scores_is_finite_and_between_the_means():
    """No spread on either or both sides, equal means, halves of one row: finite in both precisions."""
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    same, spread = torch.full((8,), 0.7), torch.linspace(0, 1.4, 8)
    cases = [
        (same, same),
        (same, same + 1),
        (same + 1, same),
        (same, spread),
        (spread, same),
        (spread, spread),
    ]
    cases += [(same, spread + 3), (spread + 3, same), (one, two), (two, one), (one, one), (one, spread)]
    cases += [
        (torch.zeros(8), torch.zeros(8)),
        (torch.zeros(8), torch.full((8,), 1e-12)),
        (1e4 * same, 1e4 * spread),
    ]
    for off, on in cases:
        for a, b in ((off, on), (off.double(), on.double())):
            tau, logs = dare.gaussian_threshold(a, b)
            assert all(torch.isfinite(v.float()) for v in (tau, *logs.values()))
            low, high = sorted([a.mean().item(), b.mean().item()])
            assert low - 1e-6 * abs(low) <= tau.item() <= high + 1e-6 * abs(high)


def test_threshold_of_a_side_without_spread_is_that_side():
    """σ -> 0 on one side: the crossing is valid and at its mean, thanks to the floor; literally it would be NaN."""
    for dtype in (torch.float32, torch.float64):
        same, spread = torch.full((8,), 0.5, dtype=dtype), torch.linspace(2, 4, 8, dtype=dtype)
        for off, on in ((same, spread), (spread, same), (same + 9, spread), (spread, same + 9)):
            tau, logs = dare.gaussian_threshold(off, on)
            constant = off[0].item() if off.std() == 0 else on[0].item()
            assert bool(logs["split/root_valid"]) and tau.item() == pytest.approx(constant, abs=1e-4)


# ---- exchange (5.2, 5.5) ----


def physical_swap(scores: list[float], n_off: int, tau: float, cap: int) -> tuple[set[int], set[int], int]:
    """The exchange with rows that move: row numbers of both halves afterwards, and M."""
    off, on = list(range(n_off)), list(range(n_off, len(scores)))
    high = sorted((i for i in off if scores[i] >= tau), key=lambda i: -scores[i])
    low = sorted((i for i in on if scores[i] < tau), key=lambda i: scores[i])
    m = min(len(high), len(low)) if cap < 0 else min(len(high), len(low), cap)
    for x, y in zip(high[:m], low[:m], strict=True):
        off[off.index(x)], on[on.index(y)] = y, x
    return set(off), set(on), m


def random_batches(n: int, seed: int):
    """Scores (64,) float32 as a tensor, size of the offline part, τ: overlapping, separate, inverted halves."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        n_off = 32 if i % 2 else int(rng.integers(1, 64))
        scores = rng.normal(size=64)
        scores[n_off:] += rng.choice([-3, -1, 0, 0.5, 1, 3])
        tau = rng.normal() if i % 3 else dare.gaussian_threshold(*np_halves(scores, n_off))[0].item()
        yield torch.tensor(scores), n_off, tau


def np_halves(scores: np.ndarray, n_off: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offline and online part."""
    return torch.tensor(scores[:n_off]), torch.tensor(scores[n_off:])


@pytest.mark.parametrize("cap", [0, 8, 16, 32, -1])
def test_exchange_is_the_physical_swap(cap):
    """1,000 batches: the same rows in the same halves, M, sizes; cap 0 leaves origins."""
    total = 0
    for scores, n_off, tau in random_batches(1_000, cap + 1):
        off = torch.arange(64) < n_off
        mask, m = dare.exchange(scores, off, torch.tensor(tau, dtype=scores.dtype), cap)
        off_rows, on_rows, pairs = physical_swap(scores.tolist(), n_off, tau, cap)
        assert set(mask.nonzero()[:, 0].tolist()) == off_rows
        assert set((~mask).nonzero()[:, 0].tolist()) == on_rows
        assert m.item() == pairs and m.shape == () and mask.dtype == torch.bool
        assert mask.sum() == n_off
        assert cap != 0 or torch.equal(mask, off)
        total += pairs
    assert (total > 1_000) == (cap != 0)


def test_exchange_counts_by_hand():
    """d >= τ is high (offline may leave), d < τ is low; M = min(#, #, n); the most extreme pairs go first."""
    scores = torch.tensor([1.0, 3.0, 5.0, 4.0, 3.0, 2.0, 0.0, 2.5])
    off = torch.arange(8) < 4
    for cap, m, rows in [
        (-1, 3, {0, 5, 6, 7}),
        (2, 2, {0, 1, 5, 6}),
        (1, 1, {0, 1, 3, 6}),
        (0, 0, {0, 1, 2, 3}),
    ]:
        mask, pairs = dare.exchange(scores, off, torch.tensor(3.0), cap)
        assert pairs.item() == m and set(mask.nonzero()[:, 0].tolist()) == rows


def test_exchange_keeps_sizes_with_ties_and_extremes():
    """Few distinct scores, τ among them; all rows exchanged; none exchanged."""
    rng = np.random.default_rng(3)
    off = torch.arange(40) < 20
    for _ in range(300):
        scores = torch.tensor(rng.integers(0, 4, 40)).float()
        tau = torch.tensor(float(rng.integers(0, 4)))
        for cap in (-1, 3):
            mask, m = dare.exchange(scores, off, tau, cap)
            high, low = int((off & (scores >= tau)).sum()), int((~off & (scores < tau)).sum())
            assert m.item() == (min(high, low) if cap < 0 else min(high, low, cap))
            assert mask.sum() == 20 and (mask != off).sum() == 2 * m
    scores = torch.where(off, 2.0, 1.0)
    assert torch.equal(dare.exchange(scores, off, torch.tensor(1.5), -1)[0], ~off)
    assert torch.equal(dare.exchange(-scores, off, torch.tensor(-1.5), -1)[0], off)


def test_exchange_at_the_pooled_quantile_is_the_direct_exchange():
    """τ = sorted scores[n_off], no cap: offline-like are the n_off lowest of the pooled scores."""
    for scores, n_off, _ in random_batches(500, 7):
        off = torch.arange(64) < n_off
        mask, _ = dare.exchange(scores, off, scores.sort().values[n_off], -1)
        lowest = sorted(range(64), key=scores.tolist().__getitem__)[:n_off]
        assert set(mask.nonzero()[:, 0].tolist()) == set(lowest)


def cdf_gap(off: list[float], on: list[float], points) -> np.ndarray:
    """F_off - F_on at the points, from its definition."""
    return np.array([np.mean(np.array(off) <= p) - np.mean(np.array(on) <= p) for p in points])


def divergence(off: list[float], on: list[float]) -> float:
    """d_HΔH = 2 sup |P(a, b] - Q(a, b]|, all intervals with ends at scores or infinity (Eq. 20)."""
    ends = [-math.inf, *sorted({*off, *on})]
    off_, on_ = np.array(off), np.array(on)
    inside = [(a, b) for i, a in enumerate(ends) for b in ends[i + 1 :]]
    return 2 * max(
        abs(np.mean((off_ > a) & (off_ <= b)) - np.mean((on_ > a) & (on_ <= b))) for a, b in inside
    )


def test_what_the_exchange_does_to_the_distributions():
    """5.5: ΔF grows by 2M/N just below τ and falls nowhere; means move apart; if ΔF >= 0, so does the divergence."""
    rng = np.random.default_rng(4)
    grew = 0
    for i in range(300):
        n = 12
        off, on = rng.normal(size=n), rng.normal(size=n) + rng.choice([0.3, 1.0])
        if i % 3 == 0:
            off, on = np.sort(off), np.sort(off) + rng.exponential(0.5, n)  # F_off >= F_on everywhere
        scores = torch.tensor(np.concatenate([off, on]))
        tau = dare.gaussian_threshold(*np_halves(scores.numpy(), n))[0]
        mask, m = dare.exchange(scores, torch.arange(2 * n) < n, tau, (-1, 2)[i % 2])
        off2, on2 = scores[mask].numpy(), scores[~mask].numpy()
        assert sorted([*off2, *on2]) == sorted(scores.tolist())
        points = [*scores.tolist(), np.nextafter(tau.item(), -np.inf)]
        before, after = cdf_gap(off, on, points), cdf_gap(off2, on2, points)
        assert after[-1] - before[-1] == pytest.approx(2 * m.item() / n, abs=1e-12)
        assert (after >= before - 1e-12).all()
        assert off2.mean() <= off.mean() + 1e-12 and on2.mean() >= on.mean() - 1e-12
        if (before >= 0).all():
            old, new = divergence(off, on), divergence(off2, on2)
            assert new >= old - 1e-12
            grew += new > old
    assert grew > 50


def test_counter_example_to_theorem_1():
    """N = 2, offline {1, 4}, online {2, 5}: τ = 3, M = 1, the divergence goes 1 -> 2; the theorem says <= 0."""
    scores = torch.tensor([1.0, 4.0, 2.0, 5.0])
    tau, logs = dare.gaussian_threshold(scores[:2], scores[2:])
    assert tau.item() == 3.0 and bool(logs["split/root_valid"])
    mask, m = dare.exchange(scores, torch.tensor([True, True, False, False]), tau, -1)
    assert m.item() == 1 and scores[mask].tolist() == [1.0, 2.0] and scores[~mask].tolist() == [4.0, 5.0]
    before, after = divergence([1, 4], [2, 5]), divergence([1, 2], [4, 5])
    promised = max(0.0, before - 2 * m.item() / 2)
    assert (before, after, promised) == (1.0, 2.0, 0.0)


def test_divergence_may_shrink_in_the_usual_order_of_the_means():
    """Offline {0, 8, 9}, online {5, 6, 7}: means 17/3 < 6, τ = 35/6, M = 1, 2 -> 4/3: only F_off >= F_on forbids it."""
    scores = torch.tensor([0.0, 8.0, 9.0, 5.0, 6.0, 7.0])
    tau, _ = dare.gaussian_threshold(scores[:3], scores[3:])
    assert tau.item() == pytest.approx(35 / 6)
    mask, m = dare.exchange(scores, torch.arange(6) < 3, tau, -1)
    assert m.item() == 1 and sorted(scores[mask].tolist()) == [0.0, 5.0, 8.0]
    assert divergence([0, 8, 9], [5, 6, 7]) == pytest.approx(2.0)
    assert divergence([0, 5, 8], [6, 7, 9]) == pytest.approx(4 / 3)


def test_one_swap_moves_the_mixed_residual_by_theorem_2s_bound():
    """|E'_α - E_α| = |2α - 1| |h(x) - h(y)| / N for one exchanged pair; 0 for α = ½."""
    rng = np.random.default_rng(5)
    n = 16
    off, swaps = torch.arange(2 * n) < n, 0
    for _ in range(200):
        scores, h, alpha = torch.tensor(rng.normal(size=2 * n)), torch.tensor(rng.random(2 * n)), rng.random()
        mask, m = dare.exchange(scores, off, torch.tensor(0.0), 1)
        if m.item() == 0:
            continue
        swaps += 1
        x, y = (mask != off).nonzero()[:, 0].tolist()

        def residual(half, h=h, alpha=alpha):
            return alpha * h[half].mean().item() + (1 - alpha) * h[~half].mean().item()

        moved = abs(residual(mask) - residual(off))
        assert moved == pytest.approx(abs(2 * alpha - 1) * abs(h[x] - h[y]).item() / n, abs=1e-12)
        assert 0.5 * h[mask].mean() + 0.5 * h[~mask].mean() == pytest.approx(h.mean().item())
    assert swaps > 150


# ---- losses (5.4) ----


def loss_case(rows: int = 7, samples: int = 3, dtype=torch.float64) -> tuple:
    """Nets with critics that differ, batch with terminal rows, a mixed mask, noise that leaves the box."""
    torch.manual_seed(0)
    nets = dare.make_nets(5, 2, 8).to(dtype)
    with torch.no_grad():
        nets["actor"].log_std.copy_(torch.tensor([-0.5, 0.3]))
        for p in nets["q_target"].parameters():
            p.add_(0.3 * torch.randn_like(p))
    obs, next_obs = torch.randn(2, rows, 5, dtype=dtype)
    batch = Batch(
        obs,
        torch.rand(rows, 2, dtype=dtype) * 2 - 1,
        torch.randn(rows, dtype=dtype),
        next_obs,
        (torch.arange(rows) % 3 == 0).to(dtype),
    )
    off_like = torch.tensor([True, False, True, False, False, True, False])[:rows]
    return nets, batch, off_like, torch.randn(1 + samples, rows, 2, dtype=dtype)


def log_normal(mean: torch.Tensor, log_std: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """log N(a; mean, diag σ²) of one row."""
    return Normal(mean, log_std.exp()).log_prob(a).sum()


def textbook_losses(nets, batch, off_like, noise, args) -> tuple[torch.Tensor, ...]:
    """V, Q, AWR and SAC parts of Eqs. 2, 15, 16, 35 (signs D14, masks D15, terminals D16), row by row."""
    rows, std = len(off_like), nets["actor"].log_std.exp()
    v_loss, q_loss, awr, sac = torch.zeros(4, dtype=torch.float64)
    for i in range(rows):
        s, a, s2 = batch.obs[i : i + 1], batch.actions[i : i + 1], batch.next_obs[i : i + 1]
        with torch.no_grad():
            q1, q2 = nets["q_target"](s, a)[:, 0]
            q_hat = min(q1, q2)
            if off_like[i]:
                after = nets["vf"](s2)[0]
            else:
                after = torch.tensor(-math.inf)
                for k in range(1, len(noise)):
                    a2 = (nets["actor"](s2)[0] + std * noise[k, i]).clamp(-1, 1)
                    after = max(after, min(*nets["q_target"](s2, a2)[:, 0]))
            done = bool(batch.terminations[i])
            y = batch.rewards[i] + (0 if done else args.gamma * after)
        u = q_hat - nets["vf"](s)[0]
        high = args.online_expectile if args.value_loss == "expectile" and not off_like[i] else args.expectile
        v_loss = v_loss + (high if u > 0 else 1 - high) * u**2 / rows
        for q in nets["qf"](s, a)[:, 0]:
            q_loss = q_loss + (q - y) ** 2 / (2 * rows)
        mean = nets["actor"](s)[0][0]
        if off_like[i] or args.value_loss == "expectile":  # U21
            weight = min(math.exp(args.inv_temp * u.item()), 100.0)
            awr = awr - weight * log_normal(mean, nets["actor"].log_std, a[0]) / rows
        else:
            new = mean + std * noise[0, i]
            entropy = args.sac_alpha * log_normal(mean, nets["actor"].log_std, new)
            sac = sac + (entropy - min(*nets["qf"](s, new.clamp(-1, 1)[None])[:, 0])) / rows
    return v_loss, q_loss, awr, sac


@pytest.mark.parametrize("value_loss", ["iql", "expectile"])
def test_dare_losses_equal_the_textbook(value_loss):
    """Values and gradients: Q from Eq. 15 alone, V from Eq. 2 or 35, the actor from Eq. 16 (DARE-IV: Eq. 4), Q̂ none."""
    nets, batch, off_like, noise = loss_case()
    args = dare.Args(value_loss=value_loss)
    v_loss, q_loss, awr, sac = textbook_losses(nets, batch, off_like, noise, args)
    loss, logs = dare.dare_losses(nets, batch, off_like, noise, args)
    parts = {"loss/v": v_loss, "loss/q": q_loss, "dare/awr_term": awr, "dare/sac_term": sac}
    for k, v in parts.items():
        assert logs[k].item() == pytest.approx(v.item(), rel=1e-6), k
    assert logs["loss/actor"].item() == pytest.approx((awr + sac).item(), rel=1e-6)
    assert loss.item() == pytest.approx((v_loss + q_loss + awr + sac).item(), rel=1e-6)
    loss.backward()
    for name, part in (("qf", q_loss), ("vf", v_loss), ("actor", awr + sac)):
        params = [*nets[name].parameters()]
        for p, g in zip(params, torch.autograd.grad(part, params, retain_graph=True), strict=True):
            assert g.abs().max() > 0 and torch.allclose(p.grad, g, rtol=1e-5, atol=1e-9), name
    assert all(p.grad is None for p in nets["q_target"].parameters())
    assert not any(v.requires_grad for v in logs.values())


def test_value_losses_differ_on_online_like_rows_only():
    """Eq. 35 with every row offline-like is Eq. 2; with none it is the 0.99 expectile."""
    nets, batch, _, noise = loss_case()
    ones = torch.ones(7, dtype=torch.bool)
    for mask, expectile in ((ones, 0.7), (~ones, 0.99)):
        logs = dare.dare_losses(nets, batch, mask, noise, dare.Args(value_loss="expectile"))[1]
        u = (nets["q_target"](batch.obs, batch.actions).amin(0) - nets["vf"](batch.obs)).detach().numpy()
        expected = np.mean(np.where(u > 0, expectile, 1 - expectile) * u**2)
        assert logs["loss/v"].item() == pytest.approx(expected, rel=1e-6)


def test_all_rows_offline_like_is_plain_iql():
    """Loss, logs and gradients bit for bit, in float32."""
    nets, batch, off_like, noise = loss_case(dtype=torch.float32)
    plain, plain_logs = dare.losses(nets, batch, dare.Args())
    params = [p for k in ("actor", "qf", "vf") for p in nets[k].parameters()]
    plain_grads = torch.autograd.grad(plain, params)
    loss, logs = dare.dare_losses(nets, batch, torch.ones_like(off_like), noise, dare.Args())
    assert loss.item() == plain.item() and logs["dare/sac_term"].item() == 0
    assert all(torch.equal(logs[k], v) for k, v in plain_logs.items())
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, params), plain_grads, strict=True))


def test_entropy_weight_enters_linearly():
    """Between α = 0, 0.2, 0.4 the SAC term moves by 0.2 · mean of on_like · log π(ã), and only that term."""
    nets, batch, off_like, noise = loss_case()
    logs = [
        dare.dare_losses(nets, batch, off_like, noise, dare.Args(sac_alpha=a))[1] for a in (0.0, 0.2, 0.4)
    ]
    terms = [x["dare/sac_term"].item() for x in logs]
    mean, log_std = (x.detach() for x in nets["actor"](batch.obs))
    log_pi = torch.stack(
        [log_normal(m, log_std, m + log_std.exp() * e) for m, e in zip(mean, noise[0], strict=True)]
    )
    slope = 0.2 * (~off_like * log_pi).mean().item()
    assert np.diff(terms) == pytest.approx([slope, slope], rel=1e-6)
    assert len({x["dare/awr_term"].item() for x in logs}) == len({x["loss/q"].item() for x in logs}) == 1


def test_signs_of_the_actor_losses():
    """Offline-like rows: a step raises log π(a|s); online-like rows: it raises min Q(s, ã)."""
    for offline in (True, False):
        nets, batch, _, noise = loss_case()
        mask = torch.full((7,), offline)

        def quality(nets=nets, batch=batch, noise=noise, offline=offline) -> float:
            mean, log_std = nets["actor"](batch.obs)
            if offline:
                return Normal(mean, log_std.exp()).log_prob(batch.actions).sum(-1).mean().item()
            return nets["qf"](batch.obs, (mean + log_std.exp() * noise[0]).clamp(-1, 1)).amin(0).mean().item()

        before = quality()
        args = dare.Args(sac_alpha=0.0, inv_temp=0.0)
        grads = torch.autograd.grad(
            dare.dare_losses(nets, batch, mask, noise, args)[0], [*nets["actor"].layers.parameters()]
        )
        with torch.no_grad():
            for p, g in zip(nets["actor"].layers.parameters(), grads, strict=True):
                p.sub_(1e-3 * g)
        assert quality() > before


def test_awr_weight_is_capped_at_100():
    """Q̂ raised by 1,000: the AWR term is -100 · mean of off_like · log π(a|s)."""
    nets, batch, off_like, noise = loss_case()
    with torch.no_grad():
        nets["q_target"].bias[2].add_(1_000)
    logs = dare.dare_losses(nets, batch, off_like, noise, dare.Args())[1]
    mean, log_std = nets["actor"](batch.obs)
    log_pi = Normal(mean, log_std.exp()).log_prob(batch.actions).sum(-1)
    assert logs["dare/awr_term"].item() == pytest.approx(-100 * (off_like * log_pi).mean().item(), rel=1e-6)


def test_max_target_q_is_the_best_of_the_samples_per_row():
    """Loops over samples and rows; min over the twins inside, max over samples outside."""
    nets, batch, *_ = loss_case()
    actions = torch.rand(4, 7, 2, dtype=torch.float64) * 2 - 1
    out = dare.max_target_q(nets["q_target"], batch.next_obs, actions)
    for i in range(7):
        q = [
            nets["q_target"](batch.next_obs[i : i + 1], actions[k, i : i + 1])[:, 0].tolist()
            for k in range(4)
        ]
        assert out[i].item() == pytest.approx(max(min(pair) for pair in q), rel=1e-9)


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


# ---- the whole program ----


def tiny(dataset, tmp_path, **changes) -> dare.Args:
    """Settings of a run of half a second."""
    few = dict(eval_episodes=1, support_every=5)
    if changes.get("guidance_scale") == 0 or changes.get("exchange_cap") == 0:
        del few["support_every"]  # refused where it has no effect
    return tiny_args("iql_dare", dataset=dataset, out_dir=tmp_path, **few | changes)


SWITCHES = [
    {},
    dict(guidance_scale=0.0),
    dict(exchange_cap=0),
    dict(exchange_cap=4),
    dict(threshold="sort"),
    dict(value_loss="expectile"),
    dict(score="gauss_std"),
    dict(utd=3),
    dict(energy_units="reward"),
    dict(normalize_obs=True),
    dict(normalize_reward=True),
]


@pytest.mark.parametrize(
    "changes", SWITCHES, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default"
)
def test_ablation_switches_train(changes, dataset, tmp_path):
    """Finite scores and a log in which every number is finite."""
    result = dare.train(tiny(dataset, tmp_path, **changes))
    assert all(math.isfinite(result[k]) for k in ("offline_score", "final_score", "score_last4"))
    rows = log_rows(tmp_path, times=True)
    numbers = [float(v) for row in rows for k, v in row.items() if v != "" and k != "phase"]
    assert len(numbers) > 90 and all(map(math.isfinite, numbers))


def test_log_has_what_the_docstring_promises(dataset, tmp_path):
    """Columns, filled at every logged online step, with values in their ranges."""
    dare.train(tiny(dataset, tmp_path))
    rows = [r for r in log_rows(tmp_path) if r["phase"] == "online" and r["loss/q"]]
    assert [int(r["step"]) for r in rows] == [15, 20, 25, 30]
    columns = [f"split/{n}" for n in ["exchanged", "root_valid", "mu_gap", "tau", "off_std", "on_std"]]
    columns += ["dare/awr_term", "dare/sac_term"]
    columns += ["energy/loss", "energy/label_entropy", "energy/std_bq", "ref/clip_frac"]
    for row in rows:
        assert all(row[k] != "" for k in columns)
        assert 0 <= float(row["split/exchanged"]) <= 8 and float(row["split/root_valid"]) in (0.0, 1.0)
        assert 0 <= float(row["energy/label_entropy"]) <= math.log(3) + 1e-6
        assert 0 <= float(row["ref/clip_frac"]) <= 1
        total = float(row["dare/awr_term"]) + float(row["dare/sac_term"])
        assert float(row["loss/actor"]) == pytest.approx(total, rel=1e-5)
    assert any(r["loss/behavior"] for r in log_rows(tmp_path))


class Watch:
    """What train hands to the parts of the method, copied as it passes."""

    NAMES = ("split", "exchange", "dare_losses", "energy_loss", "guided_eps", "support_actions")

    def __init__(self, monkeypatch):
        self.exchange, self.losses, self.energy, self.guided, self.nets = [], [], [], [], None
        self.scores: list[torch.Tensor] = []
        self.support: dict[bytes, torch.Tensor] = {}  # state -> its support actions
        for name in self.NAMES:
            monkeypatch.setattr(dare, name, self.wrap(name, getattr(dare, name)))

    def wrap(self, name: str, original):
        def call(*args):
            if name == "exchange":
                self.exchange.append([x.clone() if isinstance(x, torch.Tensor) else x for x in args])
            elif name == "split":
                self.scores.append(args[0].clone())
            elif name == "dare_losses":
                self.nets, batch, off_like, noise, _ = args
                self.losses.append((Batch(*(x.clone() for x in batch)), off_like.clone(), noise.clone()))
            elif name == "energy_loss":
                self.energy.append(([x.clone() for x in args[1:]], self.min_target_q(*args[1:3])))
            elif name == "guided_eps" and args[1] is not None:
                self.guided.append(([p.clone() for p in args[0].parameters()], args[2].clone(), args[3]))
            out = original(*args)
            if name == "support_actions":
                self.support |= {
                    row.numpy().tobytes(): x for row, x in zip(args[1], out.clone(), strict=True)
                }
            return out

        return call

    def min_target_q(self, obs: torch.Tensor, support: torch.Tensor) -> torch.Tensor | None:
        """Per state and action, once the online phase has shown the networks."""
        if self.nets is None:
            return None
        with torch.no_grad():
            q = [self.nets["q_target"](obs, support[:, k]) for k in range(support.shape[1])]
        return torch.stack([torch.minimum(*x) for x in q], 1)


def test_online_steps_are_wired_as_algorithm_1(dataset, tmp_path, monkeypatch):
    """Half dataset, half own rows; references score those rows; the mask that trains is the one exchanged."""
    watch = Watch(monkeypatch)
    monkeypatch.setattr(dare, "sample_actions", lambda _, x: torch.arange(x.numel()).view(x.shape) / 60)
    dare.train(tiny(dataset, tmp_path, guidance_scale=1.5))
    assert len(watch.exchange) == len(watch.losses) == len(watch.guided) == 20  # steps 11 to 30
    refs = torch.arange(48).view(16, 3) / 60
    with h5py.File(dataset) as f:
        known = {row.tobytes() for row in f["observations"][()].astype(np.float32)}
    steps = zip(watch.exchange, watch.losses, watch.guided, strict=True)
    for (scores, off, tau, cap), (batch, off_like, noise), (behavior, obs, scale) in steps:
        assert off.tolist() == [True] * 8 + [False] * 8 and cap == -1
        assert [o.numpy().tobytes() in known for o in batch.obs] == off.tolist()
        assert torch.equal(obs, batch.obs) and scale == 1.5
        expected = 0.5 * (batch.actions - refs).square().sum(-1)
        assert torch.allclose(scores, expected, atol=1e-5)
        halves = scores[:8].double().numpy(), scores[8:].double().numpy()
        exact = [np.array([f(x)]) for x in halves for f in (np.mean, np.std)]
        (mid,), _ = bisect(*exact)
        assert tau.item() == pytest.approx(mid, abs=1e-3 * abs(exact[0] - exact[2]).item())
        rows, _, _ = physical_swap(scores.tolist(), 8, tau.item(), -1)
        assert set(off_like.nonzero()[:, 0].tolist()) == rows
        assert noise.shape == (11, 16, 3)
        assert all(torch.equal(a, b) for a, b in zip(behavior, watch.guided[0][0], strict=True))  # frozen


def test_references_come_from_the_sampler_and_are_clamped(dataset, tmp_path, monkeypatch):
    """Samples far outside the box count as its corner: d = ½ ||a - 1||², clip_frac 1."""
    watch = Watch(monkeypatch)
    monkeypatch.setattr(dare, "sample_actions", lambda _, x: torch.full_like(x, 7.0))
    dare.train(tiny(dataset, tmp_path))
    for (scores, *_), (batch, *_) in zip(watch.exchange, watch.losses, strict=True):
        assert torch.allclose(scores, 0.5 * (batch.actions - 1).square().sum(-1), atol=1e-5)
    assert {float(r["ref/clip_frac"]) for r in log_rows(tmp_path) if r["ref/clip_frac"]} == {1.0}


@pytest.mark.parametrize(
    ("changes", "unit"),
    [(dict(), "range"), (dict(energy_units="reward"), "reward"), (dict(normalize_reward=True), "normalised")],
)
def test_energy_labels_are_target_q_in_qgpos_unit(changes, unit, dataset, tmp_path, monkeypatch):
    """βQ = 3 min Q̂(s, a_k) / c; c = return range / 1000, or 1 in units of raw rewards, or of normalised ones."""
    watch = Watch(monkeypatch)
    dare.train(tiny(dataset, tmp_path, **changes))
    with h5py.File(dataset) as f:
        ends = np.flatnonzero(f["terminals"][()] | f["timeouts"][()]) + 1
        returns = [x.sum() for x in np.split(f["rewards"][()].astype(np.float64), ends)[: len(ends)]]
    c = (max(returns) - min(returns)) / 1_000 if unit == "range" else 1.0
    online = [(args, q) for args, q in watch.energy if q is not None]
    assert len(online) == 20 and len(watch.energy) == 30
    for (_, _, bq, _), q in online:
        assert torch.allclose(bq, 3 * q / c, rtol=1e-4, atol=1e-5)


def test_rows_get_their_support_when_it_exists(dataset, tmp_path, monkeypatch):
    """Dataset rows always, own rows once a chunk has covered them: each the actions generated for its own state."""
    watch = Watch(monkeypatch)
    dare.train(tiny(dataset, tmp_path, support_every=7, batch_size=64))
    assert len(watch.support) == 600 + 28
    flags = []
    for i, ((obs, support, _, has), _) in enumerate(watch.energy):
        assert set(has.tolist()) <= {0.0, 1.0} and len(obs) == (16 if i < 10 else 64)
        for row, actions, flag in zip(obs, support, has, strict=True):
            made = watch.support[row.numpy().tobytes()] if flag else torch.zeros(3, 3)
            assert torch.equal(actions, made)
        assert has[: 16 if i < 10 else 32].all()
        flags.append(has[32:].mean().item())
    assert len(flags) == 30 and 0.3 < min(flags[10:]) < 1
    assert flags[10 + 28 - 11] == 1  # at step 28 all 28 rows have theirs


def test_switched_off_parts_do_not_run(dataset, tmp_path, monkeypatch):
    """s = 0: no energy step; cap 0: neither behavior model nor energy, and origins decide."""
    watch = Watch(monkeypatch)
    dare.train(tiny(dataset, tmp_path / "a", guidance_scale=0.0))
    assert not watch.energy and len(watch.exchange) == 20
    dare.train(tiny(dataset, tmp_path / "b", exchange_cap=0))
    assert not watch.energy and len(watch.exchange) == 20 and len(watch.losses) == 40
    assert all(off_like.tolist() == [True] * 8 + [False] * 8 for _, off_like, _ in watch.losses[20:])
    assert not any(r.get("loss/behavior") for r in log_rows(tmp_path / "b"))
    dare.train(tiny(dataset, tmp_path / "c", utd=3, exchange_cap=2))
    assert len(watch.losses) == 40 + 60
    assert all((off_like[:8] == 0).sum() <= 2 for _, off_like, _ in watch.losses[40:])


def test_direct_exchange_takes_the_lowest_scores(dataset, tmp_path, monkeypatch):
    """--threshold sort: offline-like are the rows with the n_off lowest of the pooled scores."""
    watch = Watch(monkeypatch)
    dare.train(tiny(dataset, tmp_path, threshold="sort", offline_frac=0.25))
    for scores, (_, off_like, _) in zip(watch.scores, watch.losses, strict=True):
        lowest = sorted(range(16), key=scores.tolist().__getitem__)[:4]
        assert set(off_like.nonzero()[:, 0].tolist()) == set(lowest)


@pytest.mark.parametrize("threshold", ["gauss", "sort"])
def test_logged_tau_is_the_one_that_splits(threshold, dataset, tmp_path, monkeypatch):
    """split/tau in the log is the τ given to exchange at that step."""
    watch = Watch(monkeypatch)
    dare.train(tiny(dataset, tmp_path, threshold=threshold))
    rows = {int(r["step"]): float(r["split/tau"]) for r in log_rows(tmp_path) if r.get("split/tau")}
    assert list(rows) == [15, 20, 25, 30]
    if threshold == "gauss":
        taus = {step: watch.exchange[step - 11][2].item() for step in rows}
    else:  # half the batch is below it
        taus = {step: watch.scores[step - 11].sort().values[8].item() for step in rows}
    assert rows == pytest.approx(taus, rel=1e-6)
