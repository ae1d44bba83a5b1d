"""Cal-QL and CQL: every part against a closed form, hand-computed rows or an independent implementation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, final_state, module, tiny_args
from test_iql import CountDispatches
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from algorithms import calql
from common import data
from common.buffer import Batch, ReplayBuffer


def case(rows: int = 8, act_dim: int = 2, n: int = 3, dtype=torch.float64, **settings) -> tuple:
    """Nets with a target that differs, a batch with terminal rows, noise, settings, returns."""
    torch.manual_seed(0)
    nets = calql.make_calql_nets(5, act_dim, 16, 3).to(dtype)
    with torch.no_grad():
        for p in nets["q_target"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    obs, next_obs = torch.randn(2, rows, 5, dtype=dtype)
    actions = torch.rand(rows, act_dim, dtype=dtype) * 2 - 1
    rewards, terminations = torch.randn(rows, dtype=dtype), (torch.arange(rows) % 3 == 0).to(dtype)
    batch = Batch(obs, actions, rewards, next_obs, terminations)
    noise = tuple(x.to(dtype) for x in calql.draw_noise(rows, act_dim, n, CPU))
    return nets, batch, noise, calql.Args(cql_n_actions=n, **settings), torch.randn(rows, dtype=dtype) * 0.1


# ---- Monte-Carlo returns ----


def returns_of(rewards, ends, failure=None) -> list[float]:
    return calql.mc_returns(np.float32(rewards), np.asarray(ends, bool), 0.99, failure).tolist()


def test_failure_of_any_length_returns_as_failing_for_ever():
    """AntMaze, 10 r - 5: -5 / (1 - 0.99) = -500 on every row, whatever the length."""
    for length in (1, 7, 700):
        ends = [0] * (length - 1) + [1]
        assert returns_of([-5.0] * length, ends, failure=-5.0) == pytest.approx([-500.0] * length)


def test_success_of_length_three_by_hand():
    """5 at the goal; -5 + 0.99 · 5 = -0.05; -5 + 0.99 · (-0.05) = -5.0495."""
    assert returns_of([-5.0, -5.0, 5.0], [0, 0, 1], failure=-5.0) == pytest.approx([-5.0495, -0.05, 5.0])


def test_episodes_do_not_leak():
    """Two episodes and an unfinished rest."""
    returns = returns_of([1.0, 1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1, 0])
    assert returns == pytest.approx([1.99, 1.0, 2 + 0.99 * 3, 3.0, 4.0])


# ---- policy ----


def test_squash_is_the_tanh_normal_density():
    mean, log_std, noise = torch.randn(6, 3), torch.randn(6, 3) * 0.3, torch.randn(6, 3)
    actions, log_prob = calql.squash(mean, log_std, noise)
    peer = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    assert torch.allclose(actions, torch.tanh(mean + log_std.exp() * noise))
    assert torch.allclose(log_prob, peer.log_prob(actions).sum(-1), atol=1e-3)


def test_log_prob_of_data_is_of_the_data_and_finite_at_the_border():
    """CORL's function ignores its action; ours moves with it, by a numerical change of variables."""
    mean, log_std = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    grid = torch.linspace(-0.9999, 0.9999, 200_001, dtype=torch.float64)[:, None]
    density = calql.squashed_log_prob(mean, log_std, grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)
    a = torch.tensor([[0.5]], dtype=torch.float64)
    u = math.atanh(0.5)
    expected = -0.5 * u * u - 0.5 * math.log(2 * math.pi) - math.log(1 - 0.25)
    assert calql.squashed_log_prob(mean, log_std, a).item() == pytest.approx(expected)
    ends = torch.tensor([[1.0], [-1.0]]).double()
    assert torch.isfinite(calql.squashed_log_prob(mean, log_std, ends)).all()


def test_initialisation_is_orthogonal_with_a_small_last_layer():
    nets = calql.make_calql_nets(11, 3, 64, 3)
    weight = nets["qf"].weight[1]
    assert torch.allclose(weight[0].T @ weight[0], 2 * torch.eye(64), atol=1e-4)
    assert not torch.equal(weight[0], weight[1])
    assert nets["qf"].weight[-1][0].norm().item() == pytest.approx(1e-2, rel=1e-3)
    assert nets["actor"].weight[-1][0].T.norm(dim=1).tolist() == pytest.approx([1e-2] * 6, rel=1e-3)
    _, log_std = nets["actor"](torch.zeros(1, 11))
    assert log_std.tolist()[0] == pytest.approx([-1.0] * 3)


# ---- regulariser ----


@pytest.mark.parametrize("act_dim", [3, 6, 8])
def test_regulariser_of_constant_critics_and_a_uniform_policy(act_dim, capsys):
    """d ln 2 + ln 30: 7.56 for d = 6, 8.95 for d = 8; clipping and a low bound change nothing."""
    log_probs = torch.full((4, 30), -act_dim * math.log(2))
    q, q_data = torch.full((2, 4, 30), 7.0), torch.full((2, 4), 7.0)
    gap, _ = calql.conservative_gap(q, q_data, log_probs, None, -200.0)
    expected = act_dim * math.log(2) + math.log(30)
    with capsys.disabled():
        found = f"regulariser at d={act_dim}: {gap[0, 0].item():.4f}"
        print(f" [{found}, d ln 2 + ln 30 = {expected:.4f}]", end="")
    assert torch.allclose(gap, torch.full((2, 4), expected))


def test_gap_is_clipped_per_row():
    q, q_data = torch.zeros(2, 2, 3), torch.tensor([[500.0, 0.0], [0.0, 0.0]])
    gap, _ = calql.conservative_gap(q, q_data, torch.zeros(2, 3), None, -200.0)
    assert gap.tolist() == [[-200.0, pytest.approx(math.log(3))], [pytest.approx(math.log(3))] * 2]


def test_bound_of_minus_infinity_is_cql_bit_for_bit():
    nets, batch, noise, args, _ = case(dtype=torch.float32)
    grads = []
    for bound in (None, torch.full((8,), -math.inf)):
        loss, logs = calql.losses(nets, batch, bound, 10.0, noise, args)
        nets.zero_grad()
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in nets.parameters() if p.grad is not None)])
        assert logs["cql/bound_share"].item() == 0
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bound_of_plus_infinity_stops_the_gradient_of_policy_actions_only():
    q = torch.randn(2, 4, 9, requires_grad=True)
    big = torch.full((4,), 50.0)
    gap, share = calql.conservative_gap(q, torch.zeros(2, 4), torch.zeros(4, 9), big, -200.0)
    gap.sum().backward()
    assert share.item() == pytest.approx(1.0)
    assert not q.grad[..., 3:].any() and (q.grad[..., :3] > 0).all()


def test_calibration_by_hand():
    """One row: uniform 1, π(s) 2, π(s') 5 with G = 3: max(2, 3) = 3, max(5, 3) = 5, uniform stays 1."""
    q = torch.tensor([1.0, 2.0, 5.0]).expand(2, 1, 3)
    log_probs = torch.tensor([[-0.5, 0.1, 0.2]])
    gap, share = calql.conservative_gap(q, torch.full((2, 1), 4.0), log_probs, torch.tensor([3.0]), -200.0)
    expected = math.log(math.exp(1.5) + math.exp(2.9) + math.exp(4.8)) - 4.0
    assert gap[0, 0].item() == pytest.approx(expected, rel=1e-5) and share.item() == 0.5


# ---- the whole loss ----


def textbook(nets, batch, bound, weight, noise, args) -> dict[str, torch.Tensor]:
    """CORL's way: one action at a time, one critic at a time; Cal-QL on CQL(H) with importance sampling."""
    n, (uniform, normal) = args.cql_n_actions, noise
    act_dim = batch.actions.shape[1]

    def policy(s, z):
        mean, log_std = nets["actor"](s)
        u = mean + log_std.exp() * z
        log_prob = (Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(-1)
        return torch.tanh(u), log_prob

    alpha = nets["weights"]["log_alpha"]
    new, log_pi = policy(batch.obs, normal[:, 3 * n])
    out = {"alpha": -(alpha * (log_pi - act_dim).detach()).mean()}
    q_new = torch.minimum(*nets["qf"](batch.obs, new))
    out["actor"] = (alpha.exp().detach() * log_pi - q_new).mean()
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
            terms.append(nets["qf"](batch.obs, uniform[:, k])[critic] - math.log(0.5**act_dim))
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
    "settings", [{}, {"lagrange": True}, {"max_target_backup": True}, {"cql_clip_min": 1.0}]
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_losses_and_gradients_equal_the_textbook(settings, calibrated):
    nets, batch, noise, args, returns = case(**settings)
    bound = returns if calibrated else None
    loss, _ = calql.losses(nets, batch, bound, 5.0, noise, args)
    parts = textbook(nets, batch, bound, 5.0, noise, args)
    assert loss.item() == pytest.approx(sum(parts.values()).item(), rel=1e-9)
    loss.backward()
    owners = {"actor": ["actor"], "qf": ["td", "cql"]}
    for name, own in owners.items():
        params = [*nets[name].parameters()]
        expected = torch.autograd.grad(sum(parts[k] for k in own), params, retain_graph=True)
        assert all(torch.allclose(p.grad, g, atol=1e-10) for p, g in zip(params, expected, strict=True)), name
    for name, part in (("log_alpha", "alpha"), ("log_alpha_prime", "lagrange")):
        p = nets["weights"][name]
        if parts[part].requires_grad:
            (expected,) = torch.autograd.grad(parts[part], [p], retain_graph=True)
            assert torch.allclose(p.grad, expected)
        else:
            assert p.grad is None
    assert all(p.grad is None for p in nets["q_target"].parameters())


@pytest.mark.parametrize("lagrange", [False, True])
def test_a_weight_per_row_regularises_those_rows_only(lagrange):
    """Rows of weight 0 keep TD alone: the same as the mean over all rows with their gaps (less the target) at 0."""
    nets, batch, noise, args, _ = case(lagrange=lagrange)
    mask = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0]).double()
    weights = (0.0, 5.0 * mask, 5.0 * (1 - mask), 5.0)
    parts = [calql.losses(nets, batch, None, w, noise, args)[0].item() for w in weights]
    assert parts[1] + parts[2] - parts[0] == pytest.approx(parts[3])
    assert abs(parts[1] - parts[0]) > 1e-3
    half = Batch(*(x[mask > 0] for x in batch))
    noise_half = tuple(x[mask > 0] for x in noise)
    alone = [calql.losses(nets, half, None, w, noise_half, args)[0].item() for w in (0.0, 5.0)]
    assert parts[1] - parts[0] == pytest.approx((alone[1] - alone[0]) * 4 / 8)


@pytest.mark.parametrize(("target", "grows"), [(-1e3, True), (1e3, False)])
def test_lagrange_multiplier_grows_when_the_gap_is_above_its_target(target, grows):
    nets, batch, noise, args, _ = case(lagrange=True, target_gap=target)
    opt = calql.make_calql_optimizer(nets, 1e-3, 1e-3, CPU)
    loss, _ = calql.losses(nets, batch, None, 5.0, noise, args)
    calql.update(nets, opt, loss, 0.005)
    assert (nets["weights"]["log_alpha_prime"].item() > 1.0) is grows


def test_temperature_falls_when_the_policy_is_more_random_than_its_target():
    nets, batch, noise, args, _ = case()
    opt = calql.make_calql_optimizer(nets, 1e-3, 1e-3, CPU)
    loss, logs = calql.losses(nets, batch, None, 5.0, noise, args)
    calql.update(nets, opt, loss, 0.005)
    assert logs["policy/log_prob"].item() < 2  # entropy above -A
    assert nets["weights"]["log_alpha"].item() < 0


def test_learning_rates_belong_to_their_parameters():
    """With policy_lr ten times critic_lr, Adam's first step is ten times as long."""
    nets, batch, noise, args, _ = case()
    before = {k: v.clone() for k, v in nets.state_dict().items()}
    opt = calql.make_calql_optimizer(nets, 1e-2, 1e-3, CPU)
    calql.update(nets, opt, calql.losses(nets, batch, None, 5.0, noise, args)[0], 0.5)
    moved = {k: (v - before[k]).abs().max().item() for k, v in nets.state_dict().items()}
    assert moved["actor.bias.3"] == pytest.approx(1e-2, rel=1e-3) == moved["weights.log_alpha"]
    assert moved["qf.bias.2"] == pytest.approx(1e-3, rel=1e-3)
    target = 0.5 * (before["q_target.weight.0"] + nets["qf"].weight[0])
    assert torch.allclose(nets["q_target"].weight[0], target)


def test_update_stays_within_its_dispatch_budget_and_reads_nothing_back():
    nets, batch, noise, args, returns = case(rows=16, n=10, dtype=torch.float32)
    opt = calql.make_calql_optimizer(nets, 1e-4, 3e-4, CPU)

    def gradient_step() -> None:
        loss, _ = calql.losses(nets, batch, returns, 10.0, noise, args)
        calql.update(nets, opt, loss, 0.005)

    gradient_step()
    with CountDispatches() as count:
        gradient_step()
    assert count.operators <= 300
    assert count.reads == 0


# ---- runs ----


def test_online_returns_are_those_of_finished_episodes(dataset, tmp_path):
    """--calibrate-online: discounted sums of stored rewards, cut where episodes ended, without the running one."""
    args = tiny_args(
        "calql", dataset=dataset, out_dir=tmp_path, calibrate_online=True, online_steps=120, reward_scale=2.0
    )
    calql.train(args)
    state = final_state(tmp_path)
    finished, rows = int(state["finished"]), state["online"]["rows"]
    (log,) = tmp_path.rglob("log.csv")
    lines = [x.split(",") for x in log.read_text().splitlines()]
    column = lines[0].index("train/episode_length")
    lengths = [int(x[column]) for x in lines[1:] if x[column]]
    assert 0 < finished == sum(lengths) <= 120
    rewards, expected = rows[:finished, 14], []
    for length, start in zip(lengths, np.cumsum([0, *lengths]), strict=False):
        episode = rewards[start : start + length].double()
        expected += [sum(0.99**k * x for k, x in enumerate(episode[t:].tolist())) for t in range(length)]
    assert torch.allclose(state["online_mc"][:finished], torch.tensor(expected).float(), rtol=1e-5)
    assert (state["online_mc"][finished:] == -torch.inf).all()


def test_an_episode_that_was_broken_off_bounds_nothing():
    """Its rows are drawn with the next episode's, whose returns are known."""
    buffer = ReplayBuffer(8, 2, 1, torch.device("cpu"))
    args = SimpleNamespace(
        calibrate=True, calibrate_online=True, sparse_reward=False, reward_bias=0.0, gamma=0.5
    )
    dataset = SimpleNamespace(rewards=np.ones(2, np.float32), ends=np.array([False, True]))
    returns = calql.Returns(args, dataset, data.RAW, buffer)
    for _ in range(5):
        buffer.add(torch.zeros(2), torch.zeros(1), 1.0, torch.zeros(2), False)
    returns.add_episode(3)
    assert returns.drawable == 5
    assert returns.own[:5].tolist() == [-math.inf, -math.inf, 1.75, 1.5, 1.0]
    q = torch.full((2, 5, 3), -4.0, requires_grad=True)
    gap, share = calql.conservative_gap(q, torch.zeros(2, 5), torch.zeros(5, 3), returns.own[:5], -200.0)
    gap.sum().backward()
    assert torch.allclose(gap[:, :2], torch.tensor(-4.0 + math.log(3)))  # CQL's
    assert share == 6 / 10 and q.grad.isfinite().all()


def test_settings_that_do_not_go_together_are_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="--calibrate-online"):
        calql.train(
            tiny_args("calql", dataset=dataset, out_dir=tmp_path, calibrate=False, calibrate_online=True)
        )


def test_antmaze_s_settings_train(dataset, tmp_path):
    settings = dict(sparse_reward=True, reward_scale=10.0, reward_bias=-5.0)
    result = module("calql").train(tiny_args("calql", dataset=dataset, out_dir=tmp_path, **settings))
    assert math.isfinite(result["final_score"])
