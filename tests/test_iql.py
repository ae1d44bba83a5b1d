"""IQL: every loss against hand-computed rows or an independent implementation."""

import math

import pytest
import torch
import torch.nn as nn
from conftest import final_state, log_rows, tiny_args
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from algorithms import iql
from common import data
from common.buffer import Batch
from common.run import CapturedStep


def batch_of(rows: int, obs_dim: int = 5, act_dim: int = 2, dtype=torch.float32) -> Batch:
    g = torch.Generator().manual_seed(1)
    obs, next_obs = (torch.randn(rows, obs_dim, generator=g, dtype=dtype) for _ in range(2))
    actions = torch.rand(rows, act_dim, generator=g, dtype=dtype) * 2 - 1
    rewards = torch.randn(rows, generator=g, dtype=dtype)
    return Batch(obs, actions, rewards, next_obs, (torch.arange(rows) % 3 == 0).to(dtype))


def nets_of(hidden: int = 16, obs_dim: int = 5, act_dim: int = 2) -> nn.ModuleDict:
    torch.manual_seed(0)
    return iql.make_nets(obs_dim, act_dim, hidden)


def test_value_loss_on_hand_computed_rows():
    """τ = 0.7: 0.7 · 1² for A = 1, 0.3 · 4 for A = -2; mean 0.95."""
    assert iql.value_loss(torch.tensor([1.0, -2.0]), 0.7).item() == pytest.approx((0.7 + 1.2) / 2)


def test_expectile_one_half_is_half_the_squared_error():
    adv = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert iql.value_loss(adv, 0.5).item() == pytest.approx(0.5 * adv.square().mean().item())


def test_value_loss_minimiser_is_the_expectile():
    """Of {0, 1} with equal weight the τ-expectile is τ."""
    x, v = torch.tensor([0.0, 1.0]), torch.tensor(0.5, requires_grad=True)
    opt = torch.optim.SGD([v], lr=0.2)
    for _ in range(500):
        opt.zero_grad()
        iql.value_loss(x - v, 0.9).backward()
        opt.step()
    assert v.item() == pytest.approx(0.9, abs=1e-4)


def test_td_target_masks_terminations_only():
    """Row 1 ends the MDP, row 2 does not (a time limit is no termination)."""
    rewards, terminations, v_next = torch.tensor([[1.0, 2.0], [1.0, 0.0], [10.0, 10.0]])
    target = iql.td_target(rewards, terminations, v_next, 0.99)
    assert target.tolist() == pytest.approx([1.0, 11.9])


def test_log_prob_is_the_normal_density_and_depends_on_the_action():
    mean, log_std = torch.randn(7, 3), torch.tensor([-1.0, 0.0, 0.5])
    actions = torch.rand(7, 3)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    assert torch.allclose(iql.log_prob(mean, log_std, actions), expected, atol=1e-5)
    assert not torch.allclose(iql.log_prob(mean, log_std, actions + 0.1), expected, atol=1e-2)


def test_awr_weight_is_capped_and_has_no_gradient():
    adv = torch.tensor([0.0, 1.0, 50.0], requires_grad=True)
    weight = iql.awr_weight(adv, 3.0)
    assert weight.tolist() == pytest.approx([1.0, math.exp(3.0), 100.0], rel=1e-5)
    assert not weight.requires_grad


def test_twin_q_is_two_plain_networks():
    nets, batch = nets_of(), batch_of(9)
    for k in range(2):
        x = torch.cat([batch.obs, batch.actions], -1)
        for i in range(3):
            x = x @ nets["qf"].weight[i][k] + nets["qf"].bias[i][k]
            x = x.clamp(min=0) if i < 2 else x
        assert torch.allclose(nets["qf"](batch.obs, batch.actions)[k], x[:, 0], atol=1e-6)


def test_initialisation_is_that_of_linear_layers_and_xavier():
    nets = nets_of(hidden=256)
    bound = 1 / math.sqrt(256)
    assert nets["qf"].weight[1].abs().max() <= bound
    assert nets["qf"].weight[1].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    weight = nets["actor"].layers[1].weight
    assert weight.abs().max() <= math.sqrt(6 / 512)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    assert not nets["actor"].layers[1].bias.any()
    pairs = zip(nets["qf"].parameters(), nets["q_target"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_actor_mean_is_squashed_and_log_std_stays_in_bounds_after_a_wild_step():
    nets, batch = nets_of(), batch_of(32)
    opt = iql.make_optimizer(nets, 1e3, torch.device("cpu"))
    loss, _ = iql.losses(nets, batch, iql.Args())
    iql.update(nets, opt, loss, 0.005)
    mean, log_std = nets["actor"](batch.obs)
    assert mean.abs().max() <= 1
    assert nets["actor"].log_std.abs().max() > 5
    assert ((log_std >= -5) & (log_std <= 2)).all()


def test_dropout_works_in_losses_and_never_without_gradients():
    """At rate 0.5 about half of the hidden units are zero, the others doubled; the mean without gradients is plain."""
    torch.manual_seed(0)
    plain, dropping = iql.GaussianActor(5, 2, 400), iql.GaussianActor(5, 2, 400, dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    obs = torch.randn(1, 5)
    with torch.no_grad():
        assert torch.equal(dropping(obs)[0], plain(obs)[0])
    assert not torch.equal(dropping(obs)[0], plain(obs)[0])
    seen = []
    dropping.layers[1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0].detach()))
    dropping(obs)
    hidden = plain.layers[0](obs)[0].relu()
    kept = seen[0] > 0
    assert 0.4 < kept.sum() / (hidden > 0).sum() < 0.6
    assert torch.allclose(seen[0][kept], 2 * hidden[kept])


def test_reward_bias_reaches_stored_rewards_and_no_logged_return(dataset, tmp_path):
    """The first online episode's stored rewards are the raw ones - 1, in the units of the dataset's."""
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path, reward_bias=-1.0, offline_steps=1, warmup_steps=60,
                     online_steps=61)  # fmt: skip
    iql.train(args)
    rows = final_state(tmp_path)["online"]["rows"]
    first = next(x for x in log_rows(tmp_path) if x["train/episode_return"])
    length = int(float(first["train/episode_length"]))
    stored = rows[:length, 11 + 3].sum().item()
    assert stored == pytest.approx(float(first["train/episode_return"]) - length, rel=1e-5)
    raw = data.load("hopper-medium-v2", dataset)
    assert torch.equal(raw.batch(data.Units(1.0, -1.0)).rewards, torch.from_numpy(raw.rewards) - 1)


def test_policy_loss_reaches_no_critic_and_critic_losses_reach_no_actor():
    nets, batch, args = nets_of(), batch_of(8), iql.Args()
    mean, log_std = nets["actor"](batch.obs)
    adv = nets["qf"](batch.obs, batch.actions).amin(0) - nets["vf"](batch.obs)
    actor_loss = -(iql.awr_weight(adv, args.inv_temp) * iql.log_prob(mean, log_std, batch.actions)).mean()
    critics = [*nets["qf"].parameters(), *nets["vf"].parameters()]
    assert all(g is None for g in torch.autograd.grad(actor_loss, critics, allow_unused=True))
    loss, _ = iql.losses(nets, batch, args)
    loss.backward()
    assert all(p.grad is None for p in nets["q_target"].parameters())
    assert all(p.grad is not None for n in ("actor", "qf", "vf") for p in nets[n].parameters())


def test_merged_step_equals_sequential_textbook_steps():
    """200 updates in float64 against PEX's order: V(s') and A from the old V, V step, Q step, target, actor step."""
    args = iql.Args(gamma=0.9, expectile=0.8, inv_temp=2.0)
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = nets_of().double(), nets_of().double()
        opt = iql.make_optimizer(ours, 1e-3, torch.device("cpu"))
        adams = {k: torch.optim.Adam(theirs[k].parameters(), lr=1e-3) for k in ("vf", "qf", "actor")}
        batch = batch_of(16, dtype=torch.float64)
        for _ in range(200):
            loss, _ = iql.losses(ours, batch, args)
            iql.update(ours, opt, loss, 0.05)

            with torch.no_grad():
                q1, q2 = theirs["q_target"](batch.obs, batch.actions)
                q_hat, v_next = torch.minimum(q1, q2), theirs["vf"](batch.next_obs)
            u = q_hat - theirs["vf"](batch.obs)
            step(adams["vf"], (torch.where(u > 0, 0.8, 0.2) * u**2).mean())
            y = batch.rewards + (1.0 - batch.terminations) * 0.9 * v_next
            q1, q2 = theirs["qf"](batch.obs, batch.actions)
            step(adams["qf"], (nn.functional.mse_loss(q1, y) + nn.functional.mse_loss(q2, y)) / 2)
            for a, b in zip(theirs["q_target"].parameters(), theirs["qf"].parameters(), strict=True):
                a.data.mul_(0.95).add_(0.05 * b.data)
            mean, log_std = theirs["actor"](batch.obs)
            log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(batch.actions).sum(-1)
            weight = torch.exp(2.0 * u.detach()).clamp(max=100.0)
            step(adams["actor"], -(weight * log_prob).mean())
    finally:
        torch.set_default_dtype(torch.float32)
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-8


def step(opt: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    opt.step()


def test_actor_learning_rate_follows_the_cosine_and_restarts_constant():
    nets = nets_of()
    opt, updates = iql.make_optimizer(nets, 3e-4, torch.device("cpu")), torch.zeros(())
    seen = []
    for _ in range(5):
        iql.decay_actor_lr(opt, updates, 3e-4, 4)
        seen.append(opt.param_groups[1]["lr"].item())
    half = 1.5e-4
    root = math.sqrt(0.5)
    assert seen == pytest.approx([3e-4, half * (1 + root), half, half * (1 - root), 0.0], abs=1e-9)
    assert opt.param_groups[0]["lr"] == 3e-4
    loss, _ = iql.losses(nets, batch_of(8), iql.Args())
    iql.update(nets, opt, loss, 0.005)
    iql.restart_optimizer(opt, 3e-4)
    assert opt.param_groups[1]["lr"].item() == pytest.approx(3e-4)
    assert all(not x.any() for state in opt.state.values() for x in state.values())


def test_restarted_optimizer_steps_like_a_fresh_one():
    nets, fresh_nets, batch = nets_of(), nets_of(), batch_of(8)
    opt = iql.make_optimizer(nets, 3e-4, torch.device("cpu"))
    for _ in range(3):
        loss, _ = iql.losses(nets, batch, iql.Args())
        iql.update(nets, opt, loss, 0.005)
    fresh_nets.load_state_dict(nets.state_dict())
    iql.restart_optimizer(opt, 3e-4)
    fresh = iql.make_optimizer(fresh_nets, 3e-4, torch.device("cpu"))
    for n, o in ((nets, opt), (fresh_nets, fresh)):
        loss, _ = iql.losses(n, batch, iql.Args())
        iql.update(n, o, loss, 0.005)
    pairs = zip(nets.parameters(), fresh_nets.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class CountDispatches(TorchDispatchMode):
    """Operators that are not views, and scalars read by the host."""

    def __init__(self):
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        name = func.name()
        self.reads += "_local_scalar_dense" in name or "nonzero" in name
        self.operators += not func.is_view
        return func(*args, **(kwargs or {}))


def one_update(hidden: int = 256):
    nets, batch, args = nets_of(hidden, 11, 3), batch_of(256, 11, 3), iql.Args()
    opt = iql.make_optimizer(nets, args.lr, torch.device("cpu"))
    updates = torch.zeros(())

    def gradient_step() -> None:
        iql.decay_actor_lr(opt, updates, args.lr, 100)
        loss, _ = iql.losses(nets, batch, args)
        iql.update(nets, opt, loss, args.polyak)

    gradient_step()  # optimizer state
    return gradient_step


def test_update_stays_within_its_dispatch_budget_and_reads_nothing_back():
    """A budget of operators catches most regressions of GPU speed on a machine without a GPU."""
    gradient_step = one_update()
    with CountDispatches() as count:
        gradient_step()
    assert count.operators <= 165
    assert count.reads == 0


def test_update_does_the_arithmetic_it_should_and_no_more():
    """0.524 GFLOP: forward and backward matmuls of actor, V twice, Q, Q̂ at width 256, batch 256."""
    with FlopCounterMode(display=False) as flops:
        one_update()
    assert flops.get_total_flops() == pytest.approx(0.5243e9, rel=0.01)


def test_compiled_and_plain_losses_agree():
    torch.manual_seed(0)
    nets, batch, args = nets_of(), batch_of(64), iql.Args()
    plain, _ = iql.losses(nets, batch, args)
    grads = torch.autograd.grad(plain, [p for p in nets.parameters() if p.requires_grad])
    compiled, _ = torch.compile(iql.losses)(nets, batch, args)
    compiled_grads = torch.autograd.grad(compiled, [p for p in nets.parameters() if p.requires_grad])
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(grads, compiled_grads, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_and_plain_steps_agree():
    """200 updates from one state on one batch in float64, the graph against plain calls; no host sync in either."""
    results = []
    for captured in (False, True):
        device = torch.device("cuda")
        nets = nets_of().double().to(device)
        batch = Batch(*(x.to(device) for x in batch_of(64, dtype=torch.float64)))
        opt = iql.make_optimizer(nets, 3e-4, device)

        def gradient_step(nets=nets, batch=batch, opt=opt):
            loss, logs = iql.losses(nets, batch, iql.Args())
            iql.update(nets, opt, loss, 0.005)
            return logs

        step_fn = CapturedStep(gradient_step) if captured else gradient_step
        for i in range(200):
            torch.cuda.set_sync_debug_mode("error" if i > 10 else "default")
            step_fn()
        torch.cuda.set_sync_debug_mode("default")
        results.append([p.detach().cpu() for p in nets.parameters()])
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*results, strict=True))
