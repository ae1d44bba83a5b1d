"""DUAL on Cal-QL: the Gaussian actor in Cal-QL's losses, the posterior's weights, phases shared with dual.py."""

import gc
import math
from itertools import chain

import pytest
import torch
from conftest import CPU, Killed, equal_states, final_state, kill_after, log_rows, module, tiny_args
from torch.distributions import Normal

from algorithms import calql_dual, dual
from common import data, run
from common.buffer import Batch

OBS, A, H = 5, 2, 3


def case(rows: int = 8, n: int = 3, dtype=torch.float64, **settings) -> tuple:
    """Nets whose means leave the box on some rows, a target that differs, a batch, noise, settings, returns."""
    torch.manual_seed(0)
    args = calql_dual.Args(cql_n_actions=n, hidden=16, horizon=H, planner_width=16, **settings)
    net = calql_dual.PlannerNet(H, A, torch.randn(OBS), 0.5 + torch.rand(OBS), 16, 1)
    with torch.no_grad():
        net.head.weight.mul_(3)
    nets = calql_dual.make_calql_dual_nets(net, args, OBS, A).to(dtype)
    with torch.no_grad():
        for p in nets["q_target"].parameters():
            p.add_(0.1 * torch.randn_like(p))
        nets["qf"].weight[-1].mul_(100)  # Q that is not flat
        nets["actor"].log_std.copy_(torch.tensor([-1.0, -0.3]))
    obs, next_obs = torch.randn(2, rows, OBS, dtype=dtype)
    actions, ends = torch.rand(rows, A, dtype=dtype) * 2 - 1, torch.arange(rows) % 3 == 0
    batch = Batch(obs, actions, torch.randn(rows, dtype=dtype), next_obs, ends.to(dtype))
    noise = tuple(x.to(dtype) for x in calql_dual.draw_noise(rows, A, n, CPU))
    return nets, batch, noise, args, torch.randn(rows, dtype=dtype) * 0.1


# ---- the Gaussian head ----


def into_box(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in other words: the action, and log da/du by the hyperbolic cosine; float64."""
    over = torch.where(u.abs() > 0.9, (u.abs() - 0.9) / 0.1, 0.0)
    squashed = u.sign() * (0.9 + 0.1 * torch.tanh(over))
    return torch.where(u.abs() > 0.9, squashed, u), -2 * torch.log(torch.cosh(over))


def test_box_by_hand():
    """0.7 and -0.9 are themselves; 1 is 0.9 + 0.1 tanh 1, with slope sech² 1; never beyond 1."""
    u = torch.tensor([0.7, -0.9, 1.0, -1.0, 1.1, 14.0]).double().requires_grad_()
    actions, log_slope = calql_dual.box(u)
    one, two = math.tanh(1), math.tanh(2)
    expected = [0.7, -0.9, 0.9 + 0.1 * one, -0.9 - 0.1 * one, 0.9 + 0.1 * two, 1]
    assert actions.tolist() == pytest.approx(expected)
    actions.sum().backward()
    slopes = [1.0, 1.0, 1 - one**2, 1 - one**2, 1 - two**2]
    assert u.grad[:5].tolist() == pytest.approx(slopes) and u.grad[5] < 1e-12
    assert log_slope[:5].tolist() == pytest.approx([math.log(x) for x in slopes])
    assert log_slope[5].item() == pytest.approx(2 * (math.log(2) - 131))  # where 1 - tanh² is 0


def test_density_of_actions_integrates_to_one():
    """μ = 0.8, σ = 0.2: mass at the border goes into the last tenth, none is lost; the entropy sees it."""
    mean, log_std = torch.tensor([[0.8]]).double(), torch.tensor([math.log(0.2)]).double()
    noise = torch.linspace(-8, 8, 20_001).double()[None, :, None]
    actions, log_prob = calql_dual.boxed(mean[:, None], log_std, noise)
    a, density = actions[0, :, 0], log_prob[0].exp()
    assert a.max() <= 1 and (a.diff() >= 0).all()
    inner = a < 0.9
    assert torch.trapezoid(density, a).item() == pytest.approx(1.0, abs=1e-3)
    below = Normal(0.8, 0.2).cdf(torch.tensor(0.9)).item()
    assert torch.trapezoid(density[inner], a[inner]).item() == pytest.approx(below, abs=2e-3)
    outer = calql_dual.boxed(torch.full((1, 1), 1.2).double(), log_std, torch.zeros(1, 1).double())[1]
    centre = calql_dual.boxed(torch.zeros(1, 1).double(), log_std, torch.zeros(1, 1).double())[1]
    assert (outer - centre).item() == pytest.approx(2 * math.log(math.cosh(3)))


def test_starting_in_the_box_is_starting_as_the_student():
    """Up to 0.9 nothing changes, whatever the noise; the student's largest action, 1, loses less than 0.024."""
    u = torch.linspace(-1, 1, 201)
    actions, log_slope = calql_dual.box(u)
    inside = u.abs() <= 0.9
    assert torch.equal(actions[inside], u[inside]) and log_slope[inside].abs().max() < 1e-6
    assert (actions - u).abs().max() < 0.024


class Slope(torch.nn.Module):
    """Q = slope · a + curve · a², both critics, the second higher by 1."""

    def __init__(self, slope: float, curve: float):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.curve = torch.nn.Parameter(torch.tensor(curve, dtype=torch.float64))

    def forward(self, _, actions):
        q = (self.slope * actions + self.curve * actions.square()).sum(-1)
        return torch.stack([q, q + 1])


class Means(torch.nn.Module):
    """The given means of rows at s, then s'; log σ per action."""

    def __init__(self, mean: list, log_std: float):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64)[:, None])
        self.log_std = torch.nn.Parameter(torch.tensor([log_std], dtype=torch.float64))

    def forward(self, _):
        return self.mean, self.log_std


def test_actor_loss_by_hand():
    """Two rows, one action, σ = 1, means (0.2, 1.5), Q = 2 a - 3 a², α = e^0.1; ξ = (0.5, -1), then (0.5, -0.5).

    u is 0.7 and 0.5 (the mean is outside, its sample inside), then 1: action 0.9 + 0.1 tanh 1 =: a₁, slope sech² 1.
    """
    args, a1, slope1 = calql_dual.Args(cql_n_actions=1), 0.9 + 0.1 * math.tanh(1), 1 - math.tanh(1) ** 2
    for second, a, slope in ((-1.0, 0.5, 1.0), (-0.5, a1, slope1)):
        nets = torch.nn.ModuleDict(
            {"actor": Means([0.2, 1.5, 0.0, 0.0], 0.0), "qf": Slope(2.0, -3.0), "q_target": Slope(0.0, 0.0)}
        )
        nets["weights"] = torch.nn.ParameterDict(
            {"log_alpha": torch.tensor(0.1).double(), "log_alpha_prime": torch.ones(()).double()}
        )
        zeros = torch.zeros(2, 1).double()
        batch = Batch(zeros, zeros, zeros[:, 0], zeros, zeros[:, 0])
        normal = torch.zeros(2, 4, 1).double()
        normal[:, 3, 0] = torch.tensor([0.5, second])
        loss, logs = calql_dual.dual_losses(nets, batch, None, 0.0, (zeros[:, None], normal), args)
        log_pi = [-0.5 * x * x - 0.5 * math.log(2 * math.pi) for x in (0.5, second)]
        log_pi[1] -= math.log(slope)
        q = [2 * x - 3 * x * x for x in (0.7, a)]
        expected = sum(math.exp(0.1) * p - x for p, x in zip(log_pi, q, strict=True)) / 2
        assert logs["loss/actor"].item() == pytest.approx(expected)
        assert logs["policy/outside"].item() == pytest.approx(0.25)
        loss.backward()
        steep = 0.0 if slope == 1.0 else 2 / 0.1 * math.tanh(1)  # d(-log slope)/du
        by_u = [-(2 - 6 * 0.7), math.exp(0.1) * steep - (2 - 6 * a) * slope]
        assert nets["actor"].mean.grad[:, 0].tolist() == pytest.approx([by_u[0] / 2, by_u[1] / 2, 0, 0])
        std_grad = -math.exp(0.1) + (by_u[0] * 0.5 + by_u[1] * second) / 2  # entropy of u, and σ ξ
        assert nets["actor"].log_std.grad.item() == pytest.approx(std_grad)


def test_a_mean_outside_comes_back_whatever_q_wants():
    """A critic of slope ±100 and |μ| of 14: the entropy alone pulls in; at 1.5 its pull is above the critic's."""
    for start in (14.0, -14.0, 1.5):
        u = torch.tensor([[start]]).double().requires_grad_()
        actions, log_pi = calql_dual.boxed(u, torch.tensor([-2.0]).double(), torch.zeros(1, 1).double())
        (0.05 * log_pi - 100 * math.copysign(1, start) * actions[:, 0]).sum().backward()
        assert u.grad.item() * start > 0  # downhill is inwards


def test_temperature_rests_at_an_entropy_of_minus_the_actions():
    """In the box log π = A exactly at ξ = 0, log σ = -1 - ln(2π) / 2: no gradient; a wider policy lowers α."""
    nets, batch, (uniform, normal), args, _ = case()
    normal[:, -1] = 0
    with torch.no_grad():
        nets["actor"].net.head.weight.mul_(0.01)
        assert nets["actor"](batch.obs)[0].abs().max() < 0.9
    for shift, sign in ((0.0, 0), (0.2, 1), (-0.2, -1)):
        with torch.no_grad():
            nets["actor"].log_std.fill_(-1 - 0.5 * math.log(2 * math.pi) + shift)
        nets.zero_grad()
        loss, logs = calql_dual.dual_losses(nets, batch, None, 5.0, (uniform, normal), args)
        loss.backward()
        assert logs["policy/log_prob"].item() == pytest.approx(A - A * shift)
        assert nets["weights"]["log_alpha"].grad.item() == pytest.approx(A * shift, abs=1e-6)
        assert sign == 0 or nets["weights"]["log_alpha"].grad.sign() == sign


# ---- the whole loss ----


def textbook(nets, batch, bound, weight, noise, args) -> dict[str, torch.Tensor]:
    """One action, one critic at a time, torch's Normal."""
    n, (uniform, normal) = args.cql_n_actions, noise

    def policy(s, z):
        mean, log_std = nets["actor"](s)
        u = mean + log_std.exp() * z
        actions, log_slope = into_box(u)
        return actions, (Normal(mean, log_std.exp()).log_prob(u) - log_slope).sum(-1)

    alpha = nets["weights"]["log_alpha"]
    actions, log_pi = policy(batch.obs, normal[:, 3 * n])
    out = {"alpha": -(alpha * (log_pi - A).detach()).mean()}
    kept = [p.requires_grad_(False) for p in nets["qf"].parameters()]
    out["actor"] = (alpha.exp().detach() * log_pi - torch.minimum(*nets["qf"](batch.obs, actions))).mean()
    for p in kept:
        p.requires_grad_(True)
    with torch.no_grad():
        backups = []
        for k in range(n if args.max_target_backup else 1):
            a, _ = policy(batch.next_obs, normal[:, 2 * n + k])
            backups.append(torch.minimum(*nets["q_target"](batch.next_obs, a)))
        y = batch.rewards + args.gamma * (1 - batch.terminations) * torch.stack(backups).max(0).values
    out["td"] = out["cql"] = out["lagrange"] = torch.zeros((), dtype=torch.float64)
    for critic in range(2):
        q_data = nets["qf"](batch.obs, batch.actions)[critic]
        out["td"] = out["td"] + ((q_data - y) ** 2).mean()
        terms = []
        for k in range(n):
            terms.append(nets["qf"](batch.obs, uniform[:, k])[critic] - math.log(0.5**A))
            for s, z in ((batch.obs, normal[:, k]), (batch.next_obs, normal[:, n + k])):
                with torch.no_grad():
                    a, log_prob = policy(s, z)
                q = nets["qf"](batch.obs, a)[critic]
                terms.append((q if bound is None else torch.maximum(q, bound)) - log_prob)
        gap = (torch.stack(terms).logsumexp(0) - q_data).clamp(min=args.cql_clip_min).mean()
        if args.lagrange:
            prime = nets["weights"]["log_alpha_prime"].exp()
            out["cql"] = out["cql"] + prime.detach() * weight * (gap - args.target_gap)
            out["lagrange"] = out["lagrange"] - 0.5 * prime * weight * (gap.detach() - args.target_gap)
        else:
            out["cql"] = out["cql"] + weight * gap
    return out


@pytest.mark.parametrize(
    "settings", [{}, {"lagrange": True}, {"max_target_backup": True}, {"distill_steps": 2}]
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_losses_and_gradients_equal_the_textbook(settings, calibrated):
    nets, batch, noise, args, returns = case(**settings)
    bound = returns if calibrated else None
    means = nets["actor"](batch.obs)[0]
    assert (means.abs() > 1).any() and (means.abs() < 1).any()
    loss, logs = calql_dual.dual_losses(nets, batch, bound, 5.0, noise, args)
    parts = textbook(nets, batch, bound, 5.0, noise, args)
    assert loss.item() == pytest.approx(sum(parts.values()).item(), rel=1e-7)
    assert logs["loss/actor"].item() == pytest.approx(parts["actor"].item(), rel=1e-7)
    loss.backward()
    owners = {"actor": parts["actor"], "qf": parts["td"] + parts["cql"]}
    for name, own in owners.items():
        params = [*nets[name].parameters()]
        expected = torch.autograd.grad(own, params, retain_graph=True)
        assert all(torch.allclose(p.grad, g, atol=1e-7) for p, g in zip(params, expected, strict=True)), name
    for name, part in (("log_alpha", "alpha"), ("log_alpha_prime", "lagrange")):
        p = nets["weights"][name]
        if parts[part].requires_grad:
            (expected,) = torch.autograd.grad(parts[part], [p], retain_graph=True)
            assert torch.allclose(p.grad, expected)
        else:
            assert p.grad is None
    frozen = chain(nets["q_target"].parameters(), nets["transition"].parameters())
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("backup", [False, True])
def test_actions_of_the_regulariser_and_of_the_target(backup, monkeypatch):
    """30 actions and the data's at s, all in the box; 1 or 10 at s'; weights of uniform, π(s), π(s') by Normal."""
    nets, batch, (uniform, normal), args, _ = case(n=10, max_target_backup=backup)
    asked, weights, original, gap = [], [], calql_dual.q_of_many, calql_dual.conservative_gap

    def q_of_many(qf, s, a):
        asked.append((qf, s, a))
        return original(qf, s, a)

    def conservative_gap(q, data_q, log_probs, *rest):
        weights.append((q, log_probs))
        return gap(q, data_q, log_probs, *rest)

    monkeypatch.setattr(calql_dual, "q_of_many", q_of_many)
    monkeypatch.setattr(calql_dual, "conservative_gap", conservative_gap)
    calql_dual.dual_losses(nets, batch, None, 5.0, (uniform, normal), args)
    (mean, log_std), (next_mean, _) = nets["actor"](batch.obs), nets["actor"](batch.next_obs)

    def at(center: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return center[:, None] + log_std.exp() * z

    (target_net, s, a), (net, s_now, many) = asked
    assert target_net is nets["q_target"] and torch.equal(s, batch.next_obs)
    assert a.shape == (8, 10 if backup else 1, A)
    assert torch.allclose(a, into_box(at(next_mean, normal[:, 20 : 20 + a.shape[1]]))[0])  # σ only
    assert net is nets["qf"] and torch.equal(s_now, batch.obs) and many.shape == (8, 31, A)
    assert 0.9 < many.abs().max() <= 1 and not many.requires_grad
    now, later = at(mean, normal[:, :10]), at(next_mean, normal[:, 10:20])
    expected = torch.cat([batch.actions[:, None], uniform, into_box(now)[0], into_box(later)[0]], 1)
    assert torch.allclose(many, expected)
    ((q, log_probs),) = weights
    assert q.shape == (2, 8, 30) and not log_probs.requires_grad
    densities = []
    for m, u in ((mean, now), (next_mean, later)):
        densities.append((Normal(m[:, None], log_std.exp()).log_prob(u) - into_box(u)[1]).sum(-1))
    expected = torch.cat([torch.full((8, 10), -A * math.log(2)).double(), *densities], 1)
    assert torch.allclose(log_probs, expected, atol=1e-6)


def test_compiled_and_plain_losses_agree():
    nets, batch, noise, args, returns = case(dtype=torch.float32)
    found = []
    for f in (calql_dual.dual_losses, torch.compile(calql_dual.dual_losses, backend="aot_eager")):
        nets.zero_grad()
        loss, _ = f(nets, batch, returns, 5.0, noise, args)
        loss.backward()
        weights = (nets["actor"].net.head.weight, nets["qf"].weight[0])
        found.append((loss.item(), *(w.grad.clone() for w in weights)))
    (plain, *grads), (compiled, *others) = found
    assert plain == pytest.approx(compiled, rel=1e-5)
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(grads, others, strict=True))


# ---- the posterior's weights ----


def test_weights_by_hand():
    """Advantages ±1: std 1, weights 1/e and e; one of 50 stands out by 7 std: clipped to 5; and downwards."""
    q, v = torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -2.0])
    assert calql_dual.bounded_weight(q, v).tolist() == pytest.approx([math.exp(-1), math.exp(1)])
    assert calql_dual.bounded_weight(100 * q, 100 * v).tolist() == pytest.approx([math.exp(-1), math.exp(1)])
    q = torch.zeros(50)
    q[7] = 3.0
    assert 3 / q.std(correction=0) > 5
    for sign in (1, -1):
        w = calql_dual.bounded_weight(sign * q, torch.zeros(50))
        assert w[7].item() == pytest.approx(math.exp(5 * sign)) and w[0] == 1
    uncentred = calql_dual.bounded_weight(torch.tensor([1.0, 3.0]), torch.zeros(2))  # (1, 3), std 1
    assert uncentred.tolist() == pytest.approx([math.exp(1), math.exp(3)])


@pytest.mark.parametrize("level", [0.0, 300.0, -500.0])
def test_a_constant_critic_weighs_all_rows_alike(level):
    q = torch.full((64,), level)
    assert calql_dual.bounded_weight(q, q).tolist() == [1.0] * 64
    rounded = q * (1 + 1e-7 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(calql_dual.bounded_weight(q, rounded), torch.ones(64), atol=0.05)


def test_weights_of_rows_are_those_of_four_drawn_actions():
    """5,000 rows, two chunks, std over both; the critic minds; all positive although Q is negative everywhere."""
    nets, *_ = case(dtype=torch.float32)
    rows = 5_000
    obs, actions = torch.randn(rows, OBS), torch.rand(rows, A) * 2 - 1
    zeros = torch.zeros(rows)
    with torch.no_grad():
        nets["qf"].bias[-1].sub_(1_000.0)
    torch.manual_seed(3)
    got = calql_dual.posterior_weight(nets, Batch(obs, actions, zeros, obs, zeros))
    torch.manual_seed(3)
    noise = torch.cat([torch.randn(k, 4, A) for k in (4_096, rows - 4_096)])

    def least(a: torch.Tensor) -> torch.Tensor:
        return torch.minimum(*nets["qf"](obs, a))

    with torch.no_grad():
        mean, log_std = nets["actor"](obs)
        v = sum(least(into_box(mean + log_std.exp() * noise[:, k])[0]) for k in range(4)) / 4
        adv = least(actions) - v
    assert least(actions).max() < 0 and adv.std() > 0.05
    expected = (adv / adv.std(correction=0)).clip(-5, 5).exp()
    assert torch.allclose(got, expected, rtol=0.02) and (got > 0).all() and got.std() > 0.5


# ---- the whole program ----


def test_targets_of_a_run_know_no_epistemic_noise(dataset, tmp_path, monkeypatch):
    """Draws of the last layer as wide as they get: what acts spreads over the box, what backs up has σ only."""
    loss, q_of_many, asked, checked = calql_dual.dual_losses, calql_dual.q_of_many, [], []
    monkeypatch.setattr(calql_dual, "q_of_many", lambda qf, s, a: asked.append(a) or q_of_many(qf, s, a))

    def spied(nets, batch, bound, weight, noise, args):
        with torch.no_grad():
            mean, log_std = nets["actor"](batch.next_obs)
            expected, _ = into_box(mean + log_std.exp() * noise[1][:, 2 * args.cql_n_actions])
        asked.clear()
        result = loss(nets, batch, bound, weight, noise, args)
        checked.append(torch.allclose(asked[0][:, 0], expected, atol=1e-5))
        return result

    monkeypatch.setattr(calql_dual, "dual_losses", spied)
    calql_dual.train(
        tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path, laplace_std=0.5, laplace_prior=1e-3)
    )
    assert final_state(tmp_path)["explorer_offsets"].abs().max() > 0.1
    assert checked == [True] * 40


@pytest.mark.parametrize("calibrate_online", [False, True])
def test_a_run_killed_online_resumes_exactly(calibrate_online, dataset, tmp_path, monkeypatch):
    """Between environment steps, in the middle of episodes, in the warm-up and after: same log, same final state."""
    changes = dict(dataset=dataset, calibrate_online=calibrate_online, bc_coef=0.1)
    calql_dual.train(tiny_args("calql_dual", out_dir=tmp_path / "straight", **changes))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args = tiny_args("calql_dual", out_dir=tmp_path / "killed", **changes)
    deaths, done = 0, False
    while not done:
        with monkeypatch.context() as patch:
            kill_after(patch, data.Interaction, "step", 7)
            try:
                calql_dual.train(args)
                done = True
            except Killed:
                deaths += 1
        gc.collect()
    assert deaths >= 4
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "killed")
    assert equal_states(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))


@pytest.mark.parametrize(
    ("name", "calls"), [("planner_loss", 9), ("dual_losses", 13), ("posterior_weight", 2)]
)
def test_a_run_killed_in_another_place_resumes_exactly(name, calls, dataset, tmp_path, monkeypatch):
    calql_dual.train(tiny_args("calql_dual", out_dir=tmp_path / "straight", dataset=dataset))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args = tiny_args("calql_dual", out_dir=tmp_path / "killed", dataset=dataset)
    with monkeypatch.context() as patch:
        kill_after(patch, calql_dual, name, calls)
        with pytest.raises(Killed):
            calql_dual.train(args)
    gc.collect()
    calql_dual.train(args)
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "killed")
    assert equal_states(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))


def online_of(folder) -> list[dict]:
    return [{k: v for k, v in x.items() if v} for x in log_rows(folder) if x["phase"] == "online"]


def test_from_offline_gives_the_run_that_computes_everything(dataset, tmp_path):
    """Bit for bit, optimizer included; other settings of the offline phase are refused by name."""
    whole = calql_dual.train(tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path / "a"))
    (source,) = (tmp_path / "a").glob("**/offline.pt")
    again = calql_dual.train(
        tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path / "b", from_offline=source.parent)
    )
    assert again["final_score"] == whole["final_score"] and "planner_seconds" not in again
    assert online_of(tmp_path / "a") == online_of(tmp_path / "b")
    states = [final_state(tmp_path / x) for x in "ab"]
    for name in ("nets", "opt", "online", "explorer_offsets", "explorer_n_eff_per_row", "explorer_shift"):
        assert equal_states(states[0][name], states[1][name]), name
    for changes, words in [
        (dict(cql_weight=3.0), "cql_weight 10.0 -> 3.0"),
        (dict(horizon=3), "horizon 4 -> 3"),
        (dict(bc_coef=0.5), "bc_coef 0.0 -> 0.5"),
    ]:
        with pytest.raises(run.UsageError, match=words):
            calql_dual.train(
                tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path / "c", overwrite=True,
                          from_offline=source.parent, **changes)
            )  # fmt: skip
        gc.collect()


def test_the_planner_is_dual_pys_and_is_taken_from_there(dataset, tmp_path):
    """Same settings, same seed: the same planner and student bit for bit; imported, the same run."""
    whole = calql_dual.train(tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path / "a"))
    dual.train(tiny_args("dual", dataset=dataset, out_dir=tmp_path / "iql"))
    paths = [next((tmp_path / x).glob("**/planner.pt")) for x in ("a", "iql")]
    mine, theirs = (torch.load(p, weights_only=True) for p in paths)
    assert mine["settings"] == theirs["settings"]
    assert equal_states(mine["objects"], theirs["objects"])
    students = [final_state(tmp_path / x)["planner_teacher"] for x in ("a", "iql")]
    assert equal_states(*students)
    taken = calql_dual.train(
        tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path / "b", from_planner=paths[1].parent)
    )
    assert taken["final_score"] == whole["final_score"] and "planner_seconds" not in taken
    assert equal_states(final_state(tmp_path / "a")["nets"], final_state(tmp_path / "b")["nets"])


def test_only_actor_and_critics_move_in_training(dataset, tmp_path):
    calql_dual.train(tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path))
    state = final_state(tmp_path)
    for k, v in state["planner_net"].items():
        assert torch.equal(v, state["nets"][f"transition.net.{k}"])
    moved = [
        k for k, v in state["planner_teacher"].items() if not torch.equal(v, state["nets"][f"actor.net.{k}"])
    ]
    assert {"inlet.weight", "head.weight", "norm.weight"} <= set(moved)
    assert state["nets"]["weights.log_alpha"] != 0
    assert not torch.equal(state["nets"]["actor.log_std"], torch.full((3,), -1.0))


@pytest.mark.parametrize(
    "changes",
    [
        dict(horizon=1, shift_weight=0.0),
        dict(distill_steps=2, latent="sample"),
        dict(uq="latent", lagrange=True),
        dict(laplace_weights="elbo", max_target_backup=True),
        dict(laplace_noise="sigma", laplace_std=0.0, laplace_prior=1e-6),
        dict(sparse_reward=True, reward_scale=10.0, reward_bias=-5.0, online_steps=0),
    ],
    ids=str,
)
def test_ablations_train(changes, dataset, tmp_path):
    result = calql_dual.train(tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path, **changes))
    assert all(math.isfinite(v) for v in result.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(horizon=1), "--horizon: got 1; allowed: 2 or more, or --shift-weight 0"),
        (dict(distill_steps=3), "--distill-steps: got 3; allowed: 4, or that halved some times"),
        (dict(offline_frac=0.0), "rows of a batch: got 0 dataset, 16 own; .*--offline-frac 0"),
        (dict(calibrate=False, calibrate_online=True), "--calibrate-online"),
    ],
)
def test_bad_settings_are_refused(changes, words, dataset, tmp_path):
    with pytest.raises(run.UsageError, match=words):
        calql_dual.train(tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path, **changes))
    gc.collect()


def test_metrics_are_those_of_the_docstring(dataset, tmp_path):
    calql_dual.train(tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path, bc_coef=0.1))
    rows = log_rows(tmp_path)
    where = {k: {x["phase"] for x in rows if x.get(k)} for k in rows[0]}
    both = "loss/q loss/actor loss/alpha loss/bc cql/gap cql/bound_share q/mean alpha/entropy policy/log_prob"
    both += " policy/outside log_std/mean laplace/n_eff laplace/condition laplace/data_std"
    assert all(where[k] == {"offline", "online"} for k in both.split())
    assert where["uq/epistemic_std"] == where["uq/share_shift"] == {"online"}
    assert where["shift/offline"] == {"offline"}


@pytest.mark.parametrize("env", ["hopper-medium-v2", "antmaze-umaze-v2", "pen-cloned-v1", "maze2d-umaze-v1"])
def test_presets_are_cal_qls_and_the_planners(env):
    """Every setting of calql.py as there, but the length of the online phase; the planner's as in dual.py."""
    three = (module(x) for x in ("calql_dual", "calql", "dual"))
    mine, calql_args, dual_args = (run.with_presets(x.Args, x.ENV_PRESETS, env) for x in three)
    for k in calql_args.__dataclass_fields__:
        assert k == "online_steps" or getattr(mine, k) == getattr(calql_args, k), k
    for k in set(mine.__dataclass_fields__) - set(calql_args.__dataclass_fields__):
        assert getattr(mine, k) == getattr(dual_args, k), k
    assert mine.online_steps == 1_000_000 and mine.horizon == (32 if "antmaze" in env else 4)


def test_actions_and_means_of_a_run_are_in_the_box(dataset, tmp_path, monkeypatch):
    """What is stored, what is evaluated, although the Gaussian is as wide as it gets."""
    seen, original = [], data.Evaluator.__call__

    def spied(self, policy, device):
        return original(self, lambda obs: seen.append(policy(obs)) or seen[-1], device)

    monkeypatch.setattr(data.Evaluator, "__call__", spied)
    monkeypatch.setattr(calql_dual, "LOG_STD_START", 0.5)
    calql_dual.train(tiny_args("calql_dual", dataset=dataset, out_dir=tmp_path, policy_lr=0.01))
    stored = final_state(tmp_path)["online"]["rows"][:, 11:14]
    assert 0.9 < stored.abs().max() <= 1 and torch.cat(seen).abs().max() <= 1
    assert ((stored.abs() > 0.9) & (stored.abs() < 1)).any()  # pushed in, not cut off


def test_offline_phase_serves_shifted_dynamics_of_the_same_data(tmp_path):
    """The shift acts online and in evaluation only: --from-offline and --from-planner accept it, other data do not."""
    few = {k: v for k, v in vars(tiny_args("calql_dual")).items() if k not in ("env", "out_dir")}

    def args(env: str, out: str, **changes) -> calql_dual.Args:
        return calql_dual.Args(env=env, out_dir=tmp_path / out, **few | changes)

    calql_dual.train(args("hopper-mini-v0", "a", online_steps=0))
    (source,) = (tmp_path / "a").glob("**/offline.pt")
    env = "hopper-mini-v0-friction-2.0"
    result = calql_dual.train(args(env, "b", from_offline=source.parent))
    assert math.isfinite(result["final_score"])
    calql_dual.train(args(env, "c", from_planner=source.parent, online_steps=0))
