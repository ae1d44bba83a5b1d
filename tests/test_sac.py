"""The collector's SAC: density of its policy, a gradient step, critics with a known answer, training after a kill."""

import copy

import numpy as np
import pytest
import torch
from conftest import Killed
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from common import envs
from common.tools import collect


def random_tensors(n: int = 64) -> tuple[torch.Tensor, ...]:
    """Observations, actions, rewards, successors, terminals for SAC on Hopper's dimensions."""
    g = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, n, 11, generator=g)
    actions = torch.rand(n, 3, generator=g) * 2 - 1
    return obs, actions, torch.randn(n, generator=g), next_obs, (torch.arange(n) % 4 == 0).float()


def test_the_policy_s_log_prob_is_the_density_of_its_action():
    """Change of variables through PyTorch's TanhTransform, in float64."""
    torch.manual_seed(0)
    policy = collect.Policy(11, 3).double()
    obs = torch.randn(200, 11, dtype=torch.float64)
    action, log_prob = policy(obs)
    mean, log_std = policy.net(obs).chunk(2, -1)
    density = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    assert action.shape == (200, 3) and log_prob.shape == (200,)
    assert action.abs().max() < 1
    assert torch.allclose(log_prob, density.log_prob(action).sum(-1), atol=1e-9)


def test_the_policy_s_log_prob_is_finite_where_tanh_saturates():
    policy = collect.Policy(11, 3)
    with torch.no_grad():
        policy.net[-1].bias[:3] = 30.0
        policy.net[-1].bias[3:] = -50.0  # below the floor of the log-std
    action, log_prob = policy(torch.zeros(4, 11))
    assert torch.equal(action, torch.ones(4, 3)) and torch.isfinite(log_prob).all()


def test_one_sac_step_moves_everything_it_should():
    """Targets by 5e-3 of the way to the new critics; the temperature by Adam's first step, -3e-4: too much entropy.

    (A fresh policy is nearly uniform, log-density about -3 log 2 = -2.1; the entropy target is -3.)
    """
    torch.manual_seed(0)
    sac = collect.SAC(11, 3)
    before = {k: v.clone() for k, v in sac.nets.state_dict().items()}
    old = {k: v.clone() for k, v in sac.targets.state_dict().items()}
    assert all(torch.equal(old[k], before[k]) for k in old) and {k[:2] for k in old} == {"q1", "q2"}
    assert not torch.equal(before["q1.0.weight"], before["q2.0.weight"])
    sac.update(*random_tensors())
    after, new = sac.nets.state_dict(), sac.targets.state_dict()
    assert all(not torch.equal(after[k], before[k]) for k in before)
    for k in old:
        assert torch.allclose(new[k], old[k] + 0.005 * (after[k] - old[k]), rtol=0, atol=1e-8)
        assert not torch.equal(new[k], old[k])
    assert sac.log_alpha.item() == pytest.approx(-3e-4, rel=1e-3)


def test_sac_critics_learn_the_reward_where_everything_ends():
    """All rows terminal: the TD target is the reward itself, here obs[0], whatever the targets say."""
    torch.manual_seed(0)
    sac, (obs, actions, _, next_obs, _) = collect.SAC(11, 3), random_tensors(128)
    with torch.no_grad():
        for net in sac.targets.values():
            net[-1].bias.fill_(1e3)  # would show if the mask were missing
    for _ in range(150):
        sac.update(obs, actions, obs[:, 0], next_obs, torch.ones(128))
    for k in ("q1", "q2"):
        error = sac.nets[k](torch.cat([obs, actions], -1)).squeeze(-1) - obs[:, 0]
        assert error.square().mean().item() < 0.05  # the reward's own variance is 1


def test_a_restored_sac_goes_on_alike_and_its_temperature_still_trains():
    torch.manual_seed(0)
    a, b = collect.SAC(11, 3), collect.SAC(11, 3)
    a.update(*random_tensors())
    b.load_state_dict(copy.deepcopy(a.state_dict()))  # as from a file: Adam would share its moments
    for sac in (a, b):
        torch.manual_seed(1)
        sac.update(*random_tensors())
    for x, y in ((a.nets, b.nets), (a.targets, b.targets)):
        assert all(torch.equal(v, y.state_dict()[k]) for k, v in x.state_dict().items())
    assert a.log_alpha.item() == b.log_alpha.item() == pytest.approx(-6e-4, rel=1e-2)


def test_sac_training_is_resumed_where_it_was_killed(tmp_path, monkeypatch):
    """Epochs 0 and 1, killed in the middle of 1 and taken up again, give the same replay and policy.

    The gradient step is a cheap one that depends on the batch, so that the order of random numbers matters.
    """
    calls, deadly = [0], [0]

    def cheap_update(self, _obs, _actions, rewards, *_) -> None:
        calls[0] += 1
        if calls[0] == deadly[0]:
            raise Killed
        with torch.no_grad():
            self.policy.net[-1].bias[:3].add_(1e-3 * rewards.mean())

    monkeypatch.setattr(collect.SAC, "update", cheap_update)
    env = envs.locomotion("Hopper-v4")

    def train(work: str, epoch: int = 1, die_at: int = 0):
        calls[0], deadly[0] = 0, die_at
        args = collect.Args(out=tmp_path / "unused.hdf5", work=tmp_path / work)
        return collect.train_sac(args, env, epoch)

    policy, replay = train("straight")
    assert calls[0] == 2_000
    assert {len(v) for v in replay.values()} == {3_000}  # 1,000 first, then 1,000 per epoch
    ends = replay["terminals"] | replay["timeouts"]
    assert ends[[999, 1_999, 2_999]].all()  # a path that is running at the end of an epoch is cut
    assert set(np.flatnonzero(replay["timeouts"])) <= {999, 1_999, 2_999}
    assert len(np.unique(replay["observations"][[0, 1_000, 2_000]], axis=0)) == 3  # no reset is played twice
    inside = ~ends[:-1]
    assert np.array_equal(replay["next_observations"][:-1][inside], replay["observations"][1:][inside])

    with pytest.raises(Killed):
        train("killed", die_at=1_300)
    resumed_policy, resumed = train("killed")
    assert calls[0] == 1_000  # epoch 0 was not repeated
    assert all(np.array_equal(replay[k], resumed[k]) for k in collect.FIELDS)
    for k, v in policy.state_dict().items():
        assert torch.equal(v, resumed_policy.state_dict()[k])

    again_policy, again = train("killed")  # all done: from the snapshot
    assert calls[0] == 0 and all(np.array_equal(replay[k], again[k]) for k in collect.FIELDS)
    assert torch.equal(again_policy.net[-1].bias, policy.net[-1].bias)
