"""The diffusion model against denoisers that are known exactly: nothing here is trained."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from conftest import CPU

from common import edm


class Zero(torch.nn.Module):
    """F = 0, the exact network for N(0, I)."""

    def forward(self, x, *_):
        return torch.zeros_like(x)


def gaussian(mean: float, std: float = 1.0) -> edm.Denoiser:
    """E[x | x + σ n] for x ~ N(mean, std²)."""
    return lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def start(rows: int = 200_000, features: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    return edm.SIGMA_MAX * torch.randn(rows, features)


def test_grid_is_karras_with_a_zero():
    grid = edm.sigma_grid(128)
    assert grid[0] == pytest.approx(80) and grid[127] == pytest.approx(0.002) and grid[128] == 0
    assert len(grid) == 129 and all(a > b for a, b in pairwise(grid))
    expected = {115: 0.015, 102: 0.081, 89: 0.315, 76: 0.981, 64: 2.43, 25: 24.9}  # [AD2S]
    for i, sigma in expected.items():
        assert grid[i] == pytest.approx(sigma, rel=0.04)


def test_denoiser_of_the_zero_network_is_the_gaussian_one():
    x, sigma = torch.randn(5, 3), torch.tensor([0.002, 0.3, 1.0, 10.0, 80.0])
    expected = x / (1 + sigma[:, None] ** 2)
    assert torch.allclose(edm.denoise(Zero(), x, sigma), expected, rtol=1e-5)


def test_preconditioning_by_hand():
    """c_in, c_noise reach the network; c_skip, c_out come out."""
    seen = {}

    class Net(torch.nn.Module):
        def forward(self, x, c_noise, condition):
            seen.update(x=x, c_noise=c_noise, condition=condition)
            return torch.full_like(x, 2.0)

    out = edm.denoise(Net(), torch.tensor([[3.0]]), torch.tensor([2.0]), torch.tensor([7.0]))
    assert out.item() == pytest.approx(3 / 5 + 2 * 2 / math.sqrt(5))
    assert seen["x"].item() == pytest.approx(3 / math.sqrt(5)) and seen["condition"].item() == 7
    assert seen["c_noise"].item() == pytest.approx(math.log(2) / 4)


def test_training_noise_is_log_normal():
    torch.manual_seed(0)
    log = edm.draw_sigma(400_000, CPU).log()
    assert log.mean().item() == pytest.approx(-1.2, abs=0.01)
    assert log.std().item() == pytest.approx(1.2, abs=0.01)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0, 20.0])
def test_loss_of_the_exact_network_is_one_at_every_noise_level(sigma):
    torch.manual_seed(0)
    x = torch.randn(100_000, 2)
    assert edm.loss(Zero(), x, torch.full((100_000,), sigma)).item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    ("steps", "churn", "std"),
    [
        (128, 80, 1.013),
        (128, 0, 1.000),
        (64, 80, 1.020),
        (32, 80, 1.049),
        (32, 0, 1.012),
        (16, 0, 1.057),
        (8, 0, 1.297),
    ],
)
def test_sampler_reaches_the_known_spread(steps, churn, std):
    x = edm.sample(gaussian(0.0), start(), steps, churn)
    assert x.std().item() == pytest.approx(std, abs=0.006) and abs(x.mean().item()) < 0.01


@pytest.mark.parametrize("w", [0.0, 0.5, 2.0])
def test_guided_mean_is_one_plus_w_times_the_mean(w, capsys):
    """Guidance at both stages; a sampler that guides the predictor only gets 1 + w/2."""
    d = edm.with_guidance(gaussian(1.0), gaussian(0.0), w)
    x = edm.sample(d, start(), 128, 80)
    with capsys.disabled():
        print(f" [guided mean at w={w}: {x.mean().item():.3f}, std {x.std().item():.3f}]", end="")
    assert x.mean().item() == pytest.approx(1 + w, abs=0.015)
    assert x.std().item() == pytest.approx(1.013, abs=0.01)


@pytest.mark.parametrize(
    ("first", "churn", "correlation"),
    [
        (115, 0, 1.0),
        (89, 0, 0.954),
        (76, 0, 0.714),
        (64, 0, 0.379),
        (25, 0, 0.039),
        (64, 80, 0.005),
        (76, 80, 0.120),
    ],
)
def test_partial_noising_keeps_what_the_noise_level_leaves(first, churn, correlation, capsys):
    """corr(x0, x) = 1 / sqrt(1 + σ²) for the ODE; churn at μ = 0.5 keeps nothing."""
    torch.manual_seed(0)
    x0 = torch.randn(200_000, 1)
    sigma = edm.sigma_grid(128)[first]
    x = edm.sample(gaussian(0.0), x0 + sigma * torch.randn_like(x0), 128, churn, first)
    got = torch.corrcoef(torch.cat([x0, x], 1).T)[0, 1].item()
    with capsys.disabled():
        print(f" [partial noising from {first}, churn {churn}: correlation {got:.3f}]", end="")
    assert got == pytest.approx(correlation, abs=0.01)
    if churn == 0:
        assert got == pytest.approx(1 / math.sqrt(1 + sigma**2), abs=0.01)


def test_energy_guidance_of_two_gaussians_is_exact(capsys):
    """p = N(0, 1), wanted N(1, 1): the energy at σ has slope -1 / (1 + σ²); samples have mean 1, std 1."""
    d = edm.with_energy(gaussian(0.0), lambda x, sigma: torch.full_like(x, -1 / (1 + sigma**2)))
    x = edm.sample(d, start(), 128, 80)
    with capsys.disabled():
        print(f" [energy-guided mean {x.mean().item():.3f}, std {x.std().item():.3f}]", end="")
    assert x.mean().item() == pytest.approx(1.0, abs=0.015)
    assert x.std().item() == pytest.approx(1.013, abs=0.01)


def test_the_ode_remembers_where_it_started():
    """From 80 n, not from m + 80 n: the ODE's mean lacks m / sqrt(1 + 80²); churn forgets it."""
    x = edm.sample(gaussian(1.0), start(), 128, 0)
    assert x.mean().item() == pytest.approx(1 - 1 / math.sqrt(1 + 80**2), abs=0.006)


def test_sampler_evaluates_twice_a_step_but_the_last():
    calls = []
    edm.sample(lambda x, sigma: calls.append(sigma) or 0.9 * x, torch.randn(2, 1), 10, 0)
    assert len(calls) == 19 and calls[0] == pytest.approx(80) and calls[-1] == pytest.approx(0.002)
    calls.clear()
    edm.sample(lambda x, sigma: calls.append(sigma) or 0.9 * x, torch.randn(2, 1), 10, 0, first=6)
    assert len(calls) == 7 and calls[0] == pytest.approx(edm.sigma_grid(10)[6])


def test_churned_steps_are_those_between_the_bounds():
    """At 128 steps gamma is capped at sqrt(2) - 1, on 96 steps (11 to 106)."""
    hats = []
    edm.sample(lambda x, sigma: hats.append(sigma) or x, torch.randn(2, 1), 128, 80)
    grid, firsts = edm.sigma_grid(128), hats[::2]
    churned = [i for i, (a, b) in enumerate(zip(firsts, grid, strict=False)) if a > b * 1.0001]
    assert churned == list(range(11, 107))
    assert firsts[50] == pytest.approx(grid[50] * math.sqrt(2))


# ---- moments ----


def test_moments_by_hand_and_back():
    rows = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 1.0]])
    m = edm.Moments(3, 1, CPU)
    m.fit([rows])
    assert torch.allclose(m.mean, torch.tensor([2.0, 5.0, 0.0]))
    assert torch.allclose(m.std, torch.tensor([1.0, 0.0, 1.0]), atol=2e-5)
    x = m.normalize(rows)
    assert torch.allclose(x[:, 0], torch.tensor([-1.0, 1.0]), atol=1e-4) and x[:, 1].abs().max() == 0
    assert x[:, 2].tolist() == [0.0, 1.0]  # the flag stays raw
    assert torch.allclose(m.denormalize(x), rows, atol=1e-6)


def test_moments_of_several_sources():
    """By rows: those of the union. With equal weights: mean of variances + quarter of the squared difference."""
    torch.manual_seed(0)
    a, b = torch.randn(1000, 2) * 3 + 1, torch.randn(10, 2) - 4
    m = edm.Moments(2, 0, CPU)
    m.fit([a, b])
    both = torch.cat([a, b])
    assert torch.allclose(m.mean, both.mean(0), atol=1e-5)
    assert torch.allclose(m.std, both.std(0, correction=0), atol=1e-4)
    m.fit([a, b], [1, 1])
    assert torch.allclose(m.mean, 0.5 * (a.mean(0) + b.mean(0)), atol=1e-5)
    var = 0.5 * (a.var(0, correction=0) + b.var(0, correction=0)) + 0.25 * (a.mean(0) - b.mean(0)).square()
    assert torch.allclose(m.std, var.sqrt(), atol=1e-4)


def test_a_large_offset_does_not_eat_the_spread():
    rows = 1e4 + torch.randn(10_000, 1)
    m = edm.Moments(1, 0, CPU)
    m.fit([rows])
    assert m.std.item() == pytest.approx(rows.double().std().item(), rel=1e-3)


# ---- EMA ----


def test_ema_decay_at_the_known_steps():
    """After step 110 the average keeps 0.798 of itself, after 200 0.954, later up to 0.995; it copies up to 100."""
    net = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        ema, decays = edm.EMA(net), {}
        for t in range(0, 5010, 10):
            ema.module.weight.fill_(1.0)
            net.weight.fill_(0.0)
            ema.update(net)
            decays[t] = ema.module.weight.item()
    assert decays[0] == decays[90] == decays[100] == 0.0
    known = {110: 0.798, 200: 0.954, 500: 0.982, 1000: 0.989, 5000: 0.995}
    assert {t: decays[t] for t in known} == pytest.approx(known, abs=1.5e-3)


def test_ema_restarts_and_survives_a_checkpoint():
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        ema = edm.EMA(net)
        for _ in range(250):
            net.weight.normal_()
            ema.update(net)
        other = edm.EMA(deepcopy(net))
        other.load_state_dict(ema.state_dict())
        for e in (ema, other):
            e.update(net)
        assert torch.equal(ema.module.weight, other.module.weight)
        assert not torch.equal(ema.module.weight, net.weight)
        ema.restart()
        ema.update(net)
    assert torch.equal(ema.module.weight, net.weight)
