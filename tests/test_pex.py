"""PEX: the composition by hand and in its limits, what is frozen, what begins anew, resume, imports."""

import gc
import math

import pytest
import torch
import torch.nn as nn
from conftest import Killed, equal_states, final_state, kill_after, log_rows, module, tiny_args

from algorithms import pex, pex_cfdg
from common import data, run
from common.buffer import Batch


class Linear(nn.Module):
    """Q = slope · a, the second critic `above` it."""

    def __init__(self, slope: float, above: float = 1.0):
        super().__init__()
        self.slope, self.above = nn.Parameter(torch.tensor(slope)), above

    def forward(self, _, actions: torch.Tensor) -> torch.Tensor:
        q = self.slope * actions.sum(-1)
        return torch.stack([q, q + self.above])


class Mean(nn.Module):
    """One action, the same mean everywhere."""

    def __init__(self, mean: float, log_std: float = 0.0):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor([log_std]))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean.expand(len(obs), 1), self.log_std


class Zero(nn.Module):
    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return obs[:, 0] * 0


def toy(slope: float = 2.0, target_slope: float = 3.0) -> nn.ModuleDict:
    """π_θ has mean 0.5; V is 0."""
    return nn.ModuleDict(
        {"actor": Mean(0.5), "qf": Linear(slope), "q_target": Linear(target_slope), "vf": Zero()}
    )


def drawn(rows: int, noise: float, die: float) -> pex.Draws:
    return torch.full((rows, 1), noise), torch.full((rows,), die)


def test_choice_by_hand():
    """Q of 1 and 2 at κ = 0.5: the second with 1 / (1 + e^-0.5)."""
    second = 1 / (1 + math.exp(-0.5))
    assert pex.choice_probs(torch.tensor([[1.0], [2.0]]), 0.5)[:, 0].tolist() == pytest.approx(
        [1 - second, second]
    )


def test_choice_in_the_limits():
    """κ = 0: even; κ large: the better one, without overflow."""
    q = torch.tensor([[300.0, -5.0], [-200.0, 7.0]])
    assert torch.equal(pex.choice_probs(q, 0.0), torch.full((2, 2), 0.5))
    assert torch.equal(pex.choice_probs(q, 1e6), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_composition_takes_the_new_action_as_often_as_its_probability_says():
    """Actions 0.1 and 0.5, online Q 2 a, κ 1: π_θ's below 1 / (1 + e^-0.8), whatever the targets say."""
    edge = 1 / (1 + math.exp(-0.8))
    for die, action in ((edge - 1e-4, 0.5), (edge + 1e-4, 0.1)):
        actions, chosen = pex.compose(
            toy(target_slope=-9.0), Mean(0.1), torch.zeros(3, 2), drawn(3, 0.0, die), 1.0
        )
        assert actions[:, 0].tolist() == pytest.approx([action] * 3) and (chosen == (action == 0.5)).all()


def test_composition_clips_samples_and_its_centre_is_the_better_mode():
    obs = torch.zeros(1, 2)
    actions, chosen = pex.compose(toy(), Mean(0.1), obs, drawn(1, 2.0, 0.0), 1.0)
    assert actions.item() == 1.0 and chosen.all()
    for slope, action in ((2.0, 0.5), (-2.0, 0.1), (0.0, 0.1)):  # equal: π_β's
        actions, _ = pex.compose(toy(slope), Mean(0.1), obs, drawn(1, 0.0, 0.5), 10.0)
        assert actions.item() == pytest.approx(action)


def test_losses_by_hand():
    """π_β's 0.1 is taken: A = 3 · 0.1 - 0, its weight e^(β A) on -log N(0.1; 0.5, 1); V and Q learn from the batch."""
    zeros = torch.zeros(1, 2)
    batch = Batch(zeros, torch.tensor([[-0.2]]), torch.ones(1), zeros, torch.zeros(1))
    nets, offline_actor = toy(), Mean(0.1).requires_grad_(False)
    args = pex.Args(inv_temp=2.0, expectile=0.7, choice_inv_temp=1.0)
    loss, logs = pex.pex_losses(nets, offline_actor, batch, drawn(1, 0.0, 0.99), args)
    nll = 0.5 * 0.4**2 + 0.5 * math.log(2 * math.pi)
    assert logs["loss/actor"].item() == pytest.approx(math.exp(0.6) * nll, rel=1e-5)
    assert logs["loss/v"].item() == pytest.approx(0.3 * 0.36, rel=1e-5)
    assert logs["loss/q"].item() == pytest.approx((1.4**2 + 0.4**2) / 2, rel=1e-5)
    assert logs["pex/online_share"].item() == 0 and logs["pex/adv"].item() == pytest.approx(0.3)
    loss.backward()
    assert nets["actor"].mean.grad.item() == pytest.approx(math.exp(0.6) * 0.4, rel=1e-5)
    assert nets["qf"].slope.grad.item() == pytest.approx(-0.2 * (-1.4 - 0.4), rel=1e-5)  # of Q's loss alone
    assert offline_actor.mean.grad is None and nets["q_target"].slope.grad is None


def test_the_offline_policy_is_kept_and_the_new_one_begins_at_random(dataset, tmp_path, monkeypatch):
    """After the switch: π_β has the exported weights, to the end; π_θ is a new network of log σ 0, V, Q, Q̂ go on."""
    begun = []

    def spied(actor, offline_actor):
        exchange(actor, offline_actor)
        begun.extend({k: v.clone() for k, v in x.state_dict().items()} for x in (actor, offline_actor, *nets))

    def seen(*args):
        nets.append(make_nets(*args))
        return nets[0]

    nets, make_nets, exchange = [], pex.make_nets, pex.expand
    monkeypatch.setattr(pex, "make_nets", seen)
    monkeypatch.setattr(pex, "expand", spied)
    pex.train(tiny_args("pex", dataset=dataset, out_dir=tmp_path))
    (path,) = tmp_path.glob("**/offline.pt")
    exported = torch.load(path, weights_only=True)["objects"]["nets"]
    end, (fresh, kept, after) = final_state(tmp_path), begun
    assert equal_states(kept, {k[6:]: v for k, v in exported.items() if k.startswith("actor.")})
    others = {k: v for k, v in exported.items() if not k.startswith("actor.")}
    assert {k.split(".")[0] for k in others} == {"qf", "q_target", "vf"}
    assert equal_states(others, {k: v for k, v in after.items() if k in others})
    assert any(not torch.equal(v, end["nets"][k]) for k, v in others.items() if k.startswith("vf."))
    assert equal_states(kept, end["offline_actor"])
    assert not fresh["log_std"].any() and not fresh["layers.0.bias"].any() and kept["log_std"].any()
    learned = {k.removeprefix("actor."): v for k, v in end["nets"].items() if k.startswith("actor.")}
    assert all(not torch.equal(learned[k], fresh[k]) for k in fresh)


def test_a_run_killed_online_resumes_exactly(dataset, tmp_path, monkeypatch):
    """Between environment steps, in the warm-up and after, with random evaluation: same log, same final state."""
    pex.train(tiny_args("pex", dataset=dataset, out_dir=tmp_path / "straight", eval_random=0.5))
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    args = tiny_args("pex", dataset=dataset, out_dir=tmp_path / "killed", eval_random=0.5)
    deaths, done = 0, False
    while not done:
        with monkeypatch.context() as patch:
            kill_after(patch, data.Interaction, "step", 7)
            try:
                pex.train(args)
                done = True
            except Killed:
                deaths += 1
        gc.collect()
    assert deaths >= 4
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "killed")
    assert equal_states(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))


def test_it_starts_from_iql(dataset, tmp_path):
    """The offline phase is iql.py's bit for bit, imported or not; other settings of it are refused by name."""
    base = module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path, online_steps=0))
    (source,) = (tmp_path / "iql").glob("**/offline.pt")
    whole = pex.train(tiny_args("pex", dataset=dataset, out_dir=tmp_path / "a"))
    second = pex.train(tiny_args("pex", dataset=dataset, out_dir=tmp_path / "b", from_offline=source))
    assert whole["offline_score"] == base["offline_score"] and whole["final_score"] == second["final_score"]
    assert equal_states(final_state(tmp_path / "a")["nets"], final_state(tmp_path / "b")["nets"])
    with pytest.raises(run.UsageError, match=r"expectile 0\.7 -> 0\.8"):
        args = tiny_args("pex", dataset=dataset, out_dir=tmp_path / "c", from_offline=source, expectile=0.8)
        pex.train(args)


@pytest.mark.parametrize("wrong", [dict(choice_inv_temp=-1.0), dict(eval_random=1.0)])
def test_wrong_settings_are_refused(wrong, dataset, tmp_path):
    with pytest.raises(run.UsageError, match=run.flag(next(iter(wrong)))):
        pex.train(tiny_args("pex", dataset=dataset, out_dir=tmp_path, **wrong))


# ---- CFDG on PEX ----


def test_the_new_policy_sees_only_the_states_of_generated_rows():
    """Other actions, rewards and successors of a batch leave its gradient as it is, and move the critics'."""
    torch.manual_seed(0)
    obs, draws = torch.randn(8, 2), (torch.randn(8, 1), torch.rand(8))
    gradients = []
    for shift in (0.0, 1.0):
        nets = toy()
        batch = Batch(obs, torch.full((8, 1), shift), torch.full((8,), shift), obs + shift, torch.zeros(8))
        pex_cfdg.pex_losses(nets, Mean(0.1), batch, draws, pex_cfdg.Args())[0].backward()
        gradients.append([nets["actor"].mean.grad.item(), nets["qf"].slope.grad.item()])
    assert gradients[0][0] == gradients[1][0] != 0 and gradients[0][1] != gradients[1][1]


def test_batches_are_thirds_and_the_diffusion_model_learns_from_dataset_and_own_rows(
    random_rows, tmp_path, monkeypatch
):
    """256 rows: half dataset, half own, until there are generated ones; then 86 own, 85 dataset, 68 + 17 generated."""
    seen, batches, sources = {}, [], []
    losses, restart = pex_cfdg.pex_losses, pex_cfdg.Generator.restart
    init = pex_cfdg.LabelledGenerator.__init__

    def spy_init(g, r, args, offline, online):
        init(g, r, args, offline, online)
        seen.update(offline=offline, online=online, generator=g)

    def spy_losses(nets, offline_actor, batch, draws, args):
        end, kept = int(seen["generator"].boundary), seen["generator"].synthetic.obs
        tables = seen["online"].obs, seen["offline"].obs, kept[:end], kept[end:]
        known = [{tuple(row) for row in x.tolist()} for x in tables]
        batches.append([sum(tuple(row) in x for row in batch.obs.tolist()) for x in known])
        return losses(nets, offline_actor, batch, draws, args)

    monkeypatch.setattr(pex_cfdg.LabelledGenerator, "__init__", spy_init)

    def spy_restart(g, buffers, weights):
        sources.append(len(buffers))
        restart(g, buffers, weights)

    monkeypatch.setattr(pex_cfdg.Generator, "restart", spy_restart)
    monkeypatch.setattr(pex_cfdg, "pex_losses", spy_losses)
    args = tiny_args("pex_cfdg", dataset=random_rows, out_dir=tmp_path, batch_size=256, warmup_steps=5)
    pex_cfdg.train(args)
    assert batches == [[128, 128, 0, 0]] * 5 + [[86, 85, 68, 17]] * 20 and sources == [2, 2]


def test_without_a_regeneration_the_run_is_that_of_pex(random_rows, tmp_path):
    ours = pex_cfdg.train(tiny_args("pex_cfdg", dataset=random_rows, out_dir=tmp_path / "a", regenerations=1))
    theirs = pex.train(tiny_args("pex", dataset=random_rows, out_dir=tmp_path / "b"))
    assert all(ours[k] == theirs[k] for k in ("offline_score", "final_score", "score_last4"))
    assert log_rows(tmp_path / "a") == log_rows(tmp_path / "b")
