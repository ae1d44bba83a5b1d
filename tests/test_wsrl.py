"""WSRL: networks and updates beside an implementation critic by critic, draws by brute force, what the switch keeps."""

import math
from copy import deepcopy
from itertools import product

import pytest
import torch
import torch.nn as nn
from conftest import CPU, equal_states, final_state, module, tiny_args
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from algorithms import wsrl
from common import data, run
from common.buffer import Batch, ReplayBuffer

OBS, ACT = 5, 2


def make_nets(critics: int = 4, state_std: bool = True, spread: float = 0.3) -> nn.ModuleDict:
    """Nets in float64 whose every parameter is off its start, targets apart from the critics."""
    torch.manual_seed(0)
    nets = wsrl.make_wsrl_nets(OBS, ACT, 16, 3, critics, state_std).double()
    with torch.no_grad():
        for p in nets.parameters():
            p.add_(spread * torch.randn_like(p))
    return nets


def make_batch(rows: int) -> Batch:
    obs, next_obs = torch.randn(2, rows, OBS).double()
    actions, rewards = torch.rand(rows, ACT).double() * 2 - 1, torch.randn(rows).double()
    return Batch(obs, actions, rewards, next_obs, (torch.arange(rows) % 5 == 0).double())


def sequential(net: nn.Module, k: int) -> nn.Sequential:
    """Network k of a stack: linear, LayerNorm, ReLU, and so on to a last linear, with copies of its weights."""
    layers, last = [], len(net.weight) - 1
    for i, (weight, bias) in enumerate(zip(net.weight, net.bias, strict=True)):
        linear = nn.Linear(*weight.shape[1:]).double()
        linear.weight.data, linear.bias.data = weight[k].T.detach().clone(), bias[k, 0].detach().clone()
        layers.append(linear)
        if i < last:
            norm = nn.LayerNorm(weight.shape[2], eps=1e-6).double()
            norm.weight.data = net.gain[i][k, 0].detach().clone()
            norm.bias.data = net.shift[i][k, 0].detach().clone()
            layers += [norm, nn.ReLU()]
    return nn.Sequential(*layers)


class Apart:
    """The same learner as plain modules: a list of critics and of targets, an actor with a state's σ, α, α'."""

    def __init__(self, nets: nn.ModuleDict):
        critics = range(len(nets["qf"].weight[0]))
        self.critics = nn.ModuleList(sequential(nets["qf"], k) for k in critics)
        self.targets = nn.ModuleList(sequential(nets["q_target"], k) for k in critics)
        self.actor = sequential(nets["actor"], 0)
        self.raw_alpha, self.raw_prime = (nn.Parameter(p.detach().clone()) for p in nets["weights"].values())
        self.critic_opt = torch.optim.Adam([*self.critics.parameters(), self.raw_prime], 3e-4)
        self.policy_opt = torch.optim.Adam([*self.actor.parameters(), self.raw_alpha], 1e-4)

    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tanh(mean + σ noise) and its log-density, by PyTorch's distributions."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        std = log_std.exp().clamp(1e-5, 10.0)
        policy = TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1))
        action = torch.tanh(mean + std * noise)
        return action, policy.log_prob(action).sum(-1)

    def td(self, batch: Batch, noise: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, list]:
        best = torch.full((len(batch.rewards),), -torch.inf).double()
        with torch.no_grad():
            for n in range(noise.shape[1]):
                pair = torch.cat([batch.next_obs, self.sample(batch.next_obs, noise[:, n])[0]], 1)
                least = torch.stack([self.targets[k](pair)[:, 0] for k in index.tolist()]).min(0).values
                best = torch.maximum(best, least)
            y = batch.rewards + 0.99 * (1 - batch.terminations) * best
        q = [critic(torch.cat([batch.obs, batch.actions], 1))[:, 0] for critic in self.critics]
        return sum(((x - y) ** 2).mean() for x in q) / len(q), q

    def policy(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        action, log_pi = self.sample(obs, noise)
        q = torch.stack([critic(torch.cat([obs, action], 1))[:, 0] for critic in self.critics]).min(0).values
        alpha = (1 + self.raw_alpha.exp()).log()
        return (alpha.detach() * log_pi - q).mean() + alpha * (-log_pi.detach().mean() + ACT)

    def online(self, batch: Batch, args: wsrl.Args) -> None:
        """utd steps of the critics, each followed by the targets, then one of actor and α on what these steps saw."""
        seen = []
        for k in range(args.utd):
            part = Batch(*(x[k :: args.utd] for x in batch))
            noise = torch.randn(len(part.rewards), 1, ACT, dtype=torch.float64)
            index = torch.randint(len(self.critics), (args.critic_subset,))
            self.critic_opt.zero_grad()
            self.td(part, noise, index)[0].backward()
            self.critic_opt.step()
            for target, critic in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.data = 0.995 * target.data + 0.005 * critic.data
            seen.append(part.obs)
        order = torch.stack(seen, 1).flatten(0, 1)
        noise = torch.randn(len(order), ACT, dtype=torch.float64)
        self.policy_opt.zero_grad()
        self.policy(order, noise).backward()
        self.policy_opt.step()

    def differ(self, nets: nn.ModuleDict) -> float:
        """The largest difference between any two parameters."""
        other, most = Apart(nets), 0.0
        for a, b in (
            (self.critics, other.critics), (self.targets, other.targets), (self.actor, other.actor),
        ):  # fmt: skip
            pairs = zip(a.parameters(), b.parameters(), strict=True)
            most = max(most, *((p - q).abs().max().item() for p, q in pairs))
        return max(most, (self.raw_alpha - other.raw_alpha).abs().item())


@pytest.fixture
def doubles(monkeypatch):
    """torch.randn draws float64 in wsrl.py too, so that one seed gives both implementations the same noise."""
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: randn(*a, **{"dtype": torch.float64} | k))


# ---- networks ----


def test_layer_norms_stand_between_a_linear_layer_and_its_relu():
    nets, batch = make_nets(), make_batch(7)
    q = nets["qf"](batch.obs, batch.actions)
    assert q.shape == (4, 7)
    for k in range(4):
        expected = sequential(nets["qf"], k)(torch.cat([batch.obs, batch.actions], 1))[:, 0]
        assert torch.allclose(q[k], expected, atol=1e-12)
    mean, log_std = nets["actor"](batch.obs)
    expected = sequential(nets["actor"], 0)(batch.obs)
    assert torch.allclose(torch.cat([mean, log_std], 1), expected, atol=1e-12)


def test_networks_as_the_paper_has_them_and_their_start():
    """10 critics of 2 or 4 layers, an actor of 2; α = α' = 1; targets are copies; norms do nothing yet."""
    nets = wsrl.make_wsrl_nets(11, 3, 256, 4, 10, False)
    assert [tuple(w.shape) for w in nets["qf"].weight] == [
        (10, 14, 256), *[(10, 256, 256)] * 3, (10, 256, 1)
    ]  # fmt: skip
    assert [tuple(w.shape) for w in nets["actor"].weight] == [(1, 11, 256), (1, 256, 256), (1, 256, 3)]
    assert [nn.functional.softplus(w).item() for w in nets["weights"].values()] == pytest.approx([1, 1])
    assert equal_states(nets["qf"].state_dict(), nets["q_target"].state_dict())
    assert not any(p.requires_grad for p in nets["q_target"].parameters())
    assert all((x == 1).all() for x in nets["qf"].gain) and not any(x.any() for x in nets["qf"].shift)
    assert not torch.equal(nets["qf"].weight[1][0], nets["qf"].weight[1][1])


@pytest.mark.parametrize("state_std", [True, False])
def test_limits_of_the_std(state_std):
    """Never below 1e-5 nor above 10, whatever the network says; one per dimension, the same everywhere, on AntMaze."""
    actor = wsrl.make_wsrl_nets(OBS, ACT, 16, 2, 2, state_std)["actor"]
    obs = torch.randn(50, OBS)
    assert actor(obs)[1].exp().mean().item() == pytest.approx(1.0, abs=0.05)
    assert (actor(obs)[1] == actor(obs)[1][0]).all().item() is not state_std
    for push, limit in ((1e3, 10.0), (-1e3, 1e-5)):
        with torch.no_grad():
            (actor.bias[-1][..., ACT:] if state_std else actor.log_std).fill_(push)
        std = actor(obs)[1].exp()
        assert torch.allclose(std, torch.full((50, ACT), limit))


# ---- the critics drawn ----


def test_critics_are_drawn_uniformly_with_replacement():
    """All K² pairs alike, those of one critic twice among them: 16 cells of 16,000 draws, χ² of 15 degrees."""
    torch.manual_seed(0)
    args = wsrl.Args(n_critics=4)
    counts = dict.fromkeys(product(range(4), repeat=2), 0)
    for _ in range(16_000):
        counts[tuple(wsrl.draw_critics(args, CPU).tolist())] += 1
    assert sum((n - 1_000) ** 2 / 1_000 for n in counts.values()) < 37.7  # 0.1 %


def test_the_minimum_over_drawn_critics_by_brute_force():
    """For every pair the target is the lesser of the two; over draws its mean is that over all K² pairs."""
    nets, batch = make_nets(), make_batch(6)
    batch = batch._replace(rewards=batch.rewards * 0, terminations=batch.terminations * 0)
    noise = torch.randn(6, 1, ACT).double()
    mean, log_std = nets["actor"](batch.next_obs)
    actions = torch.tanh(mean + log_std.exp() * noise[:, 0])
    all_q = nets["q_target"](batch.next_obs, actions).detach()
    zero = deepcopy(nets)
    for p in zero["qf"].parameters():
        p.data.zero_()  # so that the loss is the mean square of the target

    def loss(pair) -> float:
        return wsrl.td_loss(zero, batch, noise, torch.tensor(pair), 1.0)[0].item()

    every = {
        p: torch.minimum(all_q[p[0]], all_q[p[1]]).square().mean().item() for p in product(range(4), repeat=2)
    }
    for pair, expected in every.items():
        assert loss(pair) == pytest.approx(expected, rel=1e-10)
    torch.manual_seed(0)
    args = wsrl.Args(n_critics=4)
    found = [every[tuple(wsrl.draw_critics(args, CPU).tolist())] for _ in range(8_000)]
    assert sum(found) / 8_000 == pytest.approx(sum(every.values()) / 16, rel=0.03)


def test_drawn_critics_alone_give_what_all_would_and_the_same_gradients():
    """Also with one drawn twice, and where a CPU takes a few states at a time."""
    nets, rows, many = make_nets(), 50, 100
    obs, actions = torch.randn(rows, OBS).double(), torch.rand(rows, many, ACT).double()
    flat = obs.repeat_interleave(many, 0), actions.flatten(0, 1)
    for index in ([2, 0], [1, 1], [3]):
        index = torch.tensor(index)
        whole = nets["qf"](*flat).view(4, rows, many)[index]
        part = wsrl.q_of_drawn(nets["qf"], index, obs, actions)
        assert torch.allclose(part, whole, atol=1e-12)
        params = [*nets["qf"].parameters()]
        weights = torch.randn_like(whole)
        pairs = zip(*(torch.autograd.grad((q * weights).sum(), params) for q in (part, whole)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in pairs)


def test_the_best_of_the_next_actions_is_taken_after_the_minimum():
    """Two targets of Q = a and Q = -a: their minimum -|a|, its maximum over actions that of the smallest |a|."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor([1.0, -1.0]))

        def forward(self, _, actions: torch.Tensor) -> torch.Tensor:
            return self.slope[:, None] * actions[:, 0]

    class Still(nn.Module):
        def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(obs), 1), torch.zeros(len(obs), 1)

    nets = nn.ModuleDict({"actor": Still(), "qf": Both(), "q_target": Both()})
    zeros = torch.zeros(1, 1)
    batch = Batch(zeros, zeros, torch.ones(1), zeros, torch.zeros(1))
    noise = torch.tensor([[[0.5], [-0.2], [1.5]]])
    loss, _ = wsrl.td_loss(nets, batch, noise, torch.tensor([0, 1]), 0.9)
    assert loss.item() == pytest.approx((1 - 0.9 * math.tanh(0.2)) ** 2)
    ended = wsrl.td_loss(nets, batch._replace(terminations=torch.ones(1)), noise, torch.tensor([0, 1]), 0.9)
    assert ended[0].item() == 1.0


# ---- the regulariser ----


@pytest.mark.parametrize("act_dim", [3, 6])
def test_regulariser_of_constant_critics_and_a_uniform_policy(act_dim):
    """d ln 2 + ln 30; a bound of minus infinity changes nothing, one above all leaves the uniform actions free."""
    log_probs = torch.full((4, 30), -act_dim * math.log(2))
    q, q_data = torch.full((2, 4, 30), 7.0, requires_grad=True), torch.full((2, 4), 7.0)
    gap, share = wsrl.conservative_gap(q, q_data, log_probs, None, -math.inf)
    assert torch.allclose(gap, torch.full((2, 4), act_dim * math.log(2) + math.log(30))) and share == 0
    assert torch.equal(
        gap, wsrl.conservative_gap(q, q_data, log_probs, torch.full((4,), -math.inf), -math.inf)[0]
    )
    gap, share = wsrl.conservative_gap(q, q_data, log_probs, torch.full((4,), 9.0), -math.inf)
    gap.sum().backward()
    assert share == 1 and not q.grad[..., 10:].any() and (q.grad[..., :10] > 0).all()


@pytest.mark.parametrize(
    "settings", [dict(), dict(lagrange=True, target_gap=0.8), dict(max_target_backup=False)]
)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.usefixtures("doubles")
def test_the_offline_losses_beside_an_implementation_critic_by_critic(settings, calibrated):
    """Their sum, and every gradient."""
    nets, batch, n = make_nets(), make_batch(12), 3
    args = wsrl.Args(n_critics=4, batch_size=12, cql_n_actions=n, calibrate=calibrated, **settings)
    bound = torch.randn(12) if calibrated else None
    draws = [x.double() if x.is_floating_point() else x for x in wsrl.draw_offline(args, ACT, CPU)]
    total, logs = wsrl.losses(nets, batch, bound, tuple(draws), args)
    total.backward()

    apart = Apart(nets)
    for_target, for_gap, uniform, policy_noise, backup_noise, actor_noise = draws
    td, q_data = apart.td(batch, backup_noise, for_target)
    ood = [[] for _ in for_gap]
    for j in range(3 * n):
        with torch.no_grad():
            action, log_prob = uniform[:, j % n], torch.tensor(-ACT * math.log(2))
            if j >= n:
                where = batch.obs if j < 2 * n else batch.next_obs
                action, log_prob = apart.sample(where, policy_noise[:, j - n])
        for i, k in enumerate(for_gap.tolist()):
            q = apart.critics[k](torch.cat([batch.obs, action], 1))[:, 0]
            q = q if j < n or bound is None else torch.maximum(q, bound)
            ood[i].append(q - log_prob)
    gaps = [torch.stack(x).logsumexp(0) - q_data[k] for x, k in zip(ood, for_gap.tolist(), strict=True)]
    gap = sum(x.mean() for x in gaps) / len(gaps)
    prime = (1 + apart.raw_prime.exp()).log()
    if settings.get("lagrange"):
        expected = td + prime.detach() * (gap - 0.8) - prime * (gap.detach() - 0.8)
    else:
        expected = td + 5.0 * gap
    expected = expected + apart.policy(batch.obs, actor_noise)
    assert logs["cql/gap"].item() == pytest.approx(gap.item(), rel=1e-9)
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    # the policy's loss must not reach the critics: taken away before the comparison
    others = expected - apart.policy(batch.obs, actor_noise)
    others.backward()
    for k, critic in enumerate(apart.critics):
        for i, linear in enumerate(m for m in critic if isinstance(m, nn.Linear)):
            assert torch.allclose(nets["qf"].weight[i].grad[k].T, linear.weight.grad, atol=1e-10)
    apart.actor.zero_grad()
    apart.policy(batch.obs, actor_noise).backward()
    for i, linear in enumerate(m for m in apart.actor if isinstance(m, nn.Linear)):
        assert torch.allclose(nets["actor"].weight[i].grad[0].T, linear.weight.grad, atol=1e-10)
    assert nets["weights"]["raw_alpha"].grad.item() == pytest.approx(apart.raw_alpha.grad.item(), rel=1e-9)
    if settings.get("lagrange"):  # gap above its target: α' grows
        grad = nets["weights"]["raw_alpha_prime"].grad.item()
        assert grad == pytest.approx(apart.raw_prime.grad.item(), rel=1e-9)
        assert (grad < 0) == (gap.item() > 0.8)


# ---- online ----


@pytest.mark.usefixtures("doubles")
def test_an_online_update_beside_a_loop_written_by_hand():
    """Three updates of utd 4: four steps of the critics, then one of the actor on their rows; optimizers remember."""
    nets, args = make_nets(), wsrl.Args(n_critics=4, batch_size=8)
    opt, apart = wsrl.make_wsrl_optimizer(nets, 1e-4, 3e-4, CPU), Apart(nets)
    before = deepcopy(nets)
    for seed in range(3):
        batch = make_batch(32)
        torch.manual_seed(seed)
        wsrl.update(nets, opt, batch, wsrl.critic_losses, wsrl.policy_losses, args)
        torch.manual_seed(seed)
        apart.online(batch, args)
    assert apart.differ(nets) < 1e-9 < 1e-4 < apart.differ(before)
    assert torch.equal(nets["weights"]["raw_alpha_prime"], before["weights"]["raw_alpha_prime"])


def test_the_actor_looks_at_the_least_of_all_critics_and_does_not_move_them():
    nets = make_nets(critics=10)
    obs, noise = torch.randn(6, OBS).double(), torch.randn(6, ACT).double()
    loss, logs = wsrl.policy_losses(nets, obs, noise)
    mean, log_std = nets["actor"](obs)
    actions, log_pi = wsrl.squash(mean, log_std, noise)
    alpha = nn.functional.softplus(nets["weights"]["raw_alpha"])
    least = nets["qf"](obs, actions).min(0).values
    assert logs["loss/actor"].item() == pytest.approx((alpha * log_pi - least).mean().item())
    loss.backward()
    assert all(p.grad is None for p in nets["qf"].parameters())


@pytest.mark.parametrize(("log_std", "rises"), [(-5.0, True), (0.0, False)])
def test_alpha_rises_while_the_entropy_is_below_its_target(log_std, rises):
    """The target is -A, a log π of A: that of a narrow policy is above it, that of nearly uniform actions below."""
    nets = make_nets(spread=0.0)
    with torch.no_grad():
        nets["actor"].bias[-1][..., ACT:].fill_(log_std)
    loss, logs = wsrl.policy_losses(nets, torch.randn(64, OBS).double(), torch.randn(64, ACT).double())
    loss.backward()
    assert (logs["policy/log_prob"] > ACT).item() is rises
    assert (nets["weights"]["raw_alpha"].grad < 0).item() is rises


class Seen:
    """Spies on a tiny run: batches of the online updates, nets and optimizer as the first of them finds these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dataset, out, **settings):
        self.batches, self.first, self.taken, self.online = [], None, [], False
        update, take, step = wsrl.update, ReplayBuffer.take, data.Interaction.step

        def spied_update(nets, opt, batch, *rest):
            self.first = self.first or deepcopy((nets.state_dict(), opt.state_dict()))
            self.batches.append(batch)
            return update(nets, opt, batch, *rest)

        def spied_take(buffer, index):
            if self.online:
                self.taken.append((buffer, index))
            return take(buffer, index)

        def spied_step(interaction, policy):
            self.online, self.policy, self.interaction = True, policy, interaction
            return step(interaction, policy)

        monkeypatch.setattr(wsrl, "update", spied_update)
        monkeypatch.setattr(ReplayBuffer, "take", spied_take)
        monkeypatch.setattr(data.Interaction, "step", spied_step)
        self.args = tiny_args("wsrl", dataset=dataset, out_dir=out, **settings)
        self.result = wsrl.train(self.args)
        (path,) = out.glob("**/offline.pt")
        self.exported = torch.load(path, weights_only=True)["objects"]


def test_no_row_of_the_dataset_is_seen_after_the_switch(dataset, tmp_path, monkeypatch):
    seen = Seen(monkeypatch, dataset, tmp_path)
    assert len(seen.batches) == 20 == len(seen.taken)
    assert all(b.fixed == 0 and b is seen.interaction.buffer for b, _ in seen.taken)
    own = {tuple(row) for row in seen.interaction.buffer.obs.tolist()}
    assert all(tuple(row) in own for batch in seen.batches for row in batch.obs.tolist())
    assert all(len(batch.rewards) == 4 * 16 for batch in seen.batches)


def test_the_warm_up_updates_nothing_and_acts_by_samples(dataset, tmp_path, monkeypatch):
    """The first update comes after warmup_steps own rows; nets and optimizer are still what the offline phase left."""
    rows = []
    add = ReplayBuffer.add
    monkeypatch.setattr(ReplayBuffer, "add", lambda b, *row: (rows.append(row), add(b, *row))[1])
    seen = Seen(monkeypatch, dataset, tmp_path, online_steps=11)
    assert len(rows) == 11 and len(seen.batches) == 1
    nets, opt = seen.first
    assert equal_states(nets, seen.exported["nets"]) and equal_states(opt, seen.exported["opt"])
    obs = torch.zeros(1, 11)
    actions = torch.stack([seen.policy(obs) for _ in range(20)])
    assert actions.std(0).min() > 0 and actions.abs().max() < 1


def test_the_optimizer_goes_on_with_its_moments_and_counts(dataset, tmp_path, monkeypatch):
    """20 offline steps, 20 online: the actor has 40, the critics 20 + 4 · 20, α' none without --lagrange."""
    Seen(monkeypatch, dataset, tmp_path)
    state = final_state(tmp_path)["opt"]
    policy, critic = (group["params"] for group in state["param_groups"])
    assert {int(state["state"][k]["step"]) for k in policy} == {40}
    assert {int(state["state"][k]["step"]) for k in critic[:-1]} == {100}
    assert critic[-1] not in state["state"]


@pytest.mark.parametrize(
    ("settings", "dataset_rows"), [(dict(offline_frac=0.5), 8), (dict(offline_frac=0.25), 4)]
)
def test_retained_rows_have_their_share_in_every_part(settings, dataset_rows, dataset, tmp_path, monkeypatch):
    """RLPD's half, say: of the 16 rows of each of the four steps, not of the 64 alone: D81."""
    seen = Seen(monkeypatch, dataset, tmp_path, **settings)
    own = {tuple(row) for row in seen.interaction.buffer.obs.tolist()}
    for batch in seen.batches:
        for k in range(4):
            of_dataset = [tuple(row) not in own for row in batch.obs[k::4].tolist()]
            assert sum(of_dataset) == dataset_rows and len(of_dataset) == 16


def test_append_draws_from_all_rows_alike(dataset, tmp_path, monkeypatch):
    """600 of the dataset and 10 to 29 own: of 20 batches of 64 rows, about 3 % are own."""
    seen = Seen(monkeypatch, dataset, tmp_path, append_online=True)
    own = sum((index >= 600).sum().item() for _, index in seen.taken)
    assert all(b.fixed == 600 for b, _ in seen.taken) and 0.01 < own / (20 * 64) < 0.06


def test_rlpd_is_the_same_learner_from_scratch(dataset, tmp_path, monkeypatch):
    seen = Seen(monkeypatch, dataset, tmp_path, offline_steps=0, offline_frac=0.5, critic_subset=1)
    assert not seen.exported["opt"]["state"] and len(seen.batches) == 20


def test_it_starts_from_its_own_offline_phase_alone(dataset, tmp_path):
    """Bit for bit what it trains itself; another ensemble and Cal-QL's checkpoint are refused."""
    whole = wsrl.train(tiny_args("wsrl", dataset=dataset, out_dir=tmp_path / "a"))
    (source,) = (tmp_path / "a").glob("**/offline.pt")
    second = wsrl.train(tiny_args("wsrl", dataset=dataset, out_dir=tmp_path / "b", from_offline=source))
    assert whole["final_score"] == second["final_score"]
    assert equal_states(final_state(tmp_path / "a"), final_state(tmp_path / "b"))
    with pytest.raises(run.UsageError, match="n_critics 10 -> 5"):
        args = tiny_args("wsrl", dataset=dataset, out_dir=tmp_path / "c", from_offline=source, n_critics=5)
        wsrl.train(args)
    module("calql").train(tiny_args("calql", dataset=dataset, out_dir=tmp_path / "d", online_steps=0))
    (other,) = (tmp_path / "d").glob("**/offline.pt")
    with pytest.raises(run.UsageError, match=r"--from-offline: .*n_critics None -> 10"):
        wsrl.train(tiny_args("wsrl", dataset=dataset, out_dir=tmp_path / "e", from_offline=other))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [(dict(offline_frac=0.999), "rows of a batch"), (dict(offline_frac=0.001), "rows of a batch"),
     (dict(n_critics=0), "n-critics"), (dict(critic_subset=0), "critic-subset"),
     (dict(append_online=True, offline_frac=0.5), "offline-frac"), (dict(lagrange=True, cql_weight=1.0), "cql-weight")],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong, word, dataset, tmp_path):
    with pytest.raises(run.UsageError, match=word):
        wsrl.train(tiny_args("wsrl", dataset=dataset, out_dir=tmp_path, **wrong))
