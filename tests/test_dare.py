"""DARE: scores, threshold, exchange and losses against closed forms, rows by hand or brute force; what a run does.

Its behavior model: test_behavior.py.
"""

import math
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import log_rows, tiny_args
from torch.distributions import Normal, kl_divergence

from algorithms import iql_dare as dare
from common.buffer import Batch

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
    offs, ons = (
        [rows_with(*x, torch.float32) for x in zip(m, s, strict=True)] for m, s in ((m1, s1), (m2, s2))
    )
    stored = [torch.stack(x).double().numpy() for x in (offs, ons)]  # as float32 has them
    tau, valid = bisect(*(f(x, 1) for x in stored for f in (np.mean, np.std)))
    for i in range(n):
        out, logs = dare.gaussian_threshold(offs[i], ons[i])
        assert valid[i] and bool(logs["split/root_valid"])
        assert abs(out.item() - tau[i]) <= 1e-5 * abs(m2[i] - m1[i])


def test_threshold_moves_with_the_scores():
    """τ(c d + b) = c τ(d) + b for c > 0: units and offsets of the score do not matter."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        off, on = torch.tensor(rng.gamma(2, size=(2, 40)))
        c, b = 10 ** rng.uniform(-3, 3), rng.normal() * 10
        tau = dare.gaussian_threshold(off, on)[0].item()
        moved = dare.gaussian_threshold(c * off + b, c * on + b)[0].item()
        assert moved == pytest.approx(c * tau + b, rel=1e-6)


def test_threshold_of_degenerate_scores_is_finite_and_between_the_means():
    """No spread on either or both sides, equal means, halves of one row: finite in both precisions."""
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    same, spread = torch.full((8,), 0.7), torch.linspace(0, 1.4, 8)
    nothing, little = torch.zeros(8), torch.full((8,), 1e-12)
    cases = [(same, same), (same, same + 1), (same + 1, same), (same, spread), (spread, same)]
    cases += [(spread, spread), (same, spread + 3), (spread + 3, same), (one, two), (two, one), (one, one)]
    cases += [(one, spread), (nothing, nothing), (nothing, little), (1e4 * same, 1e4 * spread)]
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
    logs = dare.gaps(scores, off, dare.exchange(scores, off, torch.tensor(3.0), -1)[0])
    assert logs["split/gap"] == (3 + 2 + 0 + 2.5) / 4 - (1 + 3 + 5 + 4) / 4
    assert logs["split/gap_after"] == (3 + 5 + 4 + 3) / 4 - (1 + 2 + 0 + 2.5) / 4


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
    intervals = np.array([(a, b) for i, a in enumerate(ends) for b in ends[i + 1 :]])
    low, high = intervals[:, :1], intervals[:, 1:]
    p, q = (np.mean((low < np.array(x)) & (np.array(x) <= high), 1) for x in (off, on))
    return 2 * abs(p - q).max()


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
    actions, rewards = torch.rand(rows, 2, dtype=dtype) * 2 - 1, torch.randn(rows, dtype=dtype)
    batch = Batch(obs, actions, rewards, next_obs, (torch.arange(rows) % 3 == 0).to(dtype))
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
    weights = (dare.Args(sac_alpha=a) for a in (0.0, 0.2, 0.4))
    logs = [dare.dare_losses(nets, batch, off_like, noise, args)[1] for args in weights]
    terms = [x["dare/sac_term"].item() for x in logs]
    mean, log_std = (x.detach() for x in nets["actor"](batch.obs))
    drawn = zip(mean, noise[0], strict=True)
    log_pi = torch.stack([log_normal(m, log_std, m + log_std.exp() * e) for m, e in drawn])
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
        params = [*nets["actor"].layers.parameters()]
        loss, _ = dare.dare_losses(nets, batch, mask, noise, args)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
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
        s = batch.next_obs[i : i + 1]
        q = [nets["q_target"](s, actions[k, i : i + 1])[:, 0].tolist() for k in range(4)]
        assert out[i].item() == pytest.approx(max(min(pair) for pair in q), rel=1e-9)


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
    columns = [
        f"split/{n}" for n in ["exchanged", "root_valid", "gap", "gap_after", "tau", "off_std", "on_std"]
    ]
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
                made = zip(args[1], out.clone(), strict=True)
                self.support |= {row.numpy().tobytes(): x for row, x in made}
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


def test_gain_in_q_is_that_of_each_half_s_own_rows(monkeypatch):
    """Q is the action: references at 1/4, dataset rows at 1/2, own rows at -1; halves of 3 and 1."""
    monkeypatch.setattr(dare, "sample_actions", lambda _, noise: torch.full_like(noise, 0.25))
    actions = torch.tensor([[0.5], [0.5], [0.5], [-1.0]])
    batch = Batch(actions, actions, actions[:, 0], actions, actions[:, 0])
    args = SimpleNamespace(guidance_scale=1.0, score="gauss", offline_frac=0.75, batch_size=4)
    twice = lambda _, a: a.expand(-1, 2).T  # noqa: E731
    guide = SimpleNamespace(args=args, batch_behavior=None, energy=None, q_target=twice)
    scores, logs = dare.Guide.score(guide, batch, torch.zeros(1))
    assert (logs["ref/q_gain_off"].item(), logs["ref/q_gain_on"].item()) == (-0.25, 1.25)
    assert scores.tolist() == [0.25**2 / 2] * 3 + [1.25**2 / 2]


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
