"""DUAL's planner: windows, rotations and distillation targets, the affine actor that it becomes, its phases."""

import math

import numpy as np
import pytest
import torch
from conftest import CPU, tiny_args

from algorithms import dual
from common import run
from common.buffer import Batch, ReplayBuffer

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

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    ends = (torch.arange(n) % 5 == 4).float()
    b.extend(Batch(draw(n, OBS), draw(n, A).clamp(-1, 1), draw(n), draw(n, OBS), ends))
    return b


# ---- windows ----


@pytest.mark.parametrize("horizon", [1, 2, 4, 9])
def test_windows_by_brute_force(horizon):
    """Episodes of 4, 1, 2 and, unflagged, 5 rows: padding with the last next state, zero actions, no loss there.

    The terminal row of the third has no known successor: there is nothing to learn past it.
    """
    ends = np.zeros(12, bool)
    ends[[3, 4, 6]] = True
    b = filled(12)
    b.table[:12, -1] = torch.from_numpy(ends).float()
    b.table[6, -1 - OBS : -1] = b.table[6, :OBS]  # s' of s
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
                assert mask[i, j].tolist() == [float(inside)] * A + [float(inside or episode[-1] != 6)] * OBS
    if horizon > 1:  # row 1 is the true successor, whatever the row
        stays = ~np.isin(np.arange(12), [3, 4, 6, 11])
        assert np.allclose(x[stays, 1, A:], ((obs - mean) / std)[1:][stays[:-1]], atol=1e-5)
        assert np.allclose(x[~stays, 1, A:], ((next_obs - mean) / std)[~stays], atol=1e-5)
        assert mask[6, 1:].sum() == 0 and mask[3, 1:, A:].all()


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

    def teacher(_z, u, _given):
        return exact_v(tau, eps, u[0].item())

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
    losses = [dual.planner_loss(net, wanted, mask)]
    losses.append(dual.distill_loss(net, a_net(seed=1), wanted, mask, 2, True))
    for some in losses:
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

    def noised(x, u, eps, *rest):
        seen.append((u, eps))
        return original(x, u, eps, *rest)

    monkeypatch.setattr(dual, "noised", noised)
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


# ---- phases ----


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
    teacher, student = (dual.unroll(planner.average, z, x[:, 0], known, steps) for steps in (4, 1))
    gap = teacher - student
    action = gap[..., :A].square().mean().item()
    rest = torch.cat([gap[..., :A].flatten(), gap[:, 1:, A:].flatten()]).square().mean().item()
    assert told[1]["distill/action_error_1"] == pytest.approx(action, rel=1e-4)
    assert told[1]["distill/error_1"] == pytest.approx(rest, rel=1e-4)
