"""What generated rows are worth: beside real ones, and beside the simulator. Evaluation only: nothing learns from it.

Rows are [s, a, r, s', terminated] in training units, as in a ReplayBuffer's table. Logged of each regeneration, at the
environment step it belongs to:
  syn/clipped_actions, clipped_rewards, nonfinite    shares of what was generated
  syn/terminal, source_terminal                      share of rows that end an episode, generated and learned from
  syn/fallen, flag_share, flag_precision, flag_recall  of flags beside the simulator's rule at s', where s' tells
  syn/sim_error, sim_error_shuffled, reward_error    of (s, a, s') and r against the simulator
  syn/mean_gap (largest), std_ratio (mean)           over features, beside all rows learned from
  syn/nearest, online_l2                             distance to the nearest such row (0: a copy); to the own rows' mean
  syn/js_states, js_actions, js_rows                 Jensen-Shannon divergence from own rows
At the end, of DUAL: its students beside their planner, what its acting is made of, and how long that takes.
"""

import io
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common import data, envs, run
from common.buffer import Batch, ReplayBuffer
from common.edm import Moments


def spread(rows: torch.Tensor, n: int) -> torch.Tensor:
    """At most n of the rows (N, ...), evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).long()]


def divergence(a: torch.Tensor, b: torch.Tensor, bins: int = 50) -> float:
    """Jensen-Shannon divergence in nats between histograms of two samples (N, D), mean over features.  [CFDG §4.2]"""
    both = torch.cat([a, b])
    total = 0.0
    for k in range(a.shape[1]):
        low, high = both[:, k].min().item(), both[:, k].max().item()
        if high <= low:
            continue
        p, q = (torch.histc(x[:, k].float(), bins, low, high) / len(x) for x in (a, b))
        m = (0.5 * (p + q)).clamp(min=1e-30)
        total += 0.5 * sum(torch.where(x > 0, x * (x / m).log(), 0).sum().item() for x in (p, q))
    return total / max(a.shape[1], 1)


def nearest(x: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Distance of each row of x (M, D) to the nearest row of all `tables` (N_i, D) -> (M,)."""
    chunks = [chunk for t in tables for chunk in t.split(20_000)]
    # by differences: the products of the usual shortcut leave an exact copy at 1e-3
    distances = (torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist") for c in chunks)
    return torch.stack([d.amin(1) for d in distances]).amin(0)


def describe(
    rows: torch.Tensor, own: torch.Tensor, sources: Sequence[torch.Tensor], moments: Moments, widths: Sequence
) -> dict[str, float]:
    """What generated rows (N, D) are like, beside own rows and all those learned from (`sources`).

    Moments against the sources, L2 distance to the mean of the own rows [AD2S Fig. 3], median distance of 200 rows to
    the nearest source row (0: copies), both in units of `moments`, Jensen-Shannon divergences from the own rows
    [CFDG Table 2]; features that are constant in the sources have no spread to compare, and are left out.
    """
    (obs_dim, act_dim, *_), width = widths, len(moments.mean)
    x, own, *real = (moments.normalize(t[:, :width]) for t in (rows, own, *sources))
    total = Moments(width, 0, x.device)
    total.fit(real)
    moving = total.std > 1e-2  # not the constant features
    parts = {"states": slice(obs_dim), "actions": slice(obs_dim, obs_dim + act_dim), "rows": slice(width)}
    logs = {
        f"syn/js_{k}": divergence(x[:, c][:, moving[c]], own[:, c][:, moving[c]]) for k, c in parts.items()
    }
    logs["syn/mean_gap"] = (x.mean(0) - total.mean).abs().max().item()
    logs["syn/std_ratio"] = (x.std(0, correction=0) / total.std)[moving].mean().item()
    logs["syn/online_l2"] = (x - own.mean(0)).norm(dim=1).mean().item()
    logs["syn/nearest"] = nearest(spread(x, 200), real).median().item()
    return logs


def is_reacher(env: gym.Env) -> bool:
    return env.spec is not None and env.spec.id.startswith("Reacher")


def simulate(
    env: gym.Env, obs: np.ndarray, actions: np.ndarray, infos: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """What the simulator says of raw obs (N, O), actions (N, A): next obs (N, O), rewards (N,).

    Locomotion: the observation is qpos without x, then qvel (clipped to ±10 in Hopper and Walker2d); dynamics do not
    depend on x. Maze2D's is the whole state, Reacher's tells it. Adroit: from `infos`, D4RL's arrays (N, ·) of the
    simulator's state. None where the state is not known.
    """
    body = env.unwrapped
    env.reset(seed=0)
    if hasattr(body, "_state_space"):  # of Adroit; relocate misplaces its ball when set
        keys = list(body._state_space.spaces)
        if not infos or set(keys) - set(infos) or "obj_pos" in keys:
            return None
        next_obs, rewards = np.empty_like(obs), np.empty(len(obs), dtype=np.float32)
        for i, action in enumerate(actions):
            body.set_env_state({k: infos[k][i].astype(np.float64) for k in keys})
            next_obs[i] = body.step(action)[0]
            rewards[i], _ = env.get_wrapper_attr("reward")()
        return next_obs, rewards
    next_obs, rewards = np.empty_like(obs), np.empty(len(obs), dtype=np.float32)
    if is_reacher(env):
        for i, (o, a) in enumerate(zip(obs.astype(np.float64), actions, strict=True)):
            joints, target = np.arctan2(o[2:4], o[:2]), o[4:6]
            body.set_state(np.append(joints, target), np.append(o[6:8], [0.0, 0.0]))
            next_obs[i], rewards[i], *_ = body.step(np.clip(a, -1, 1))
        return next_obs, rewards
    hidden = 0 if isinstance(body, envs.Maze2D) else 1
    if not hasattr(body, "model") or body.model.nq - hidden + body.model.nv != obs.shape[1]:
        return None
    joints = body.model.nq - hidden
    for i, (o, a) in enumerate(zip(obs.astype(np.float64), actions, strict=True)):
        body.set_state(np.concatenate([np.zeros(hidden), o[:joints]]), o[joints:])
        next_obs[i], rewards[i], *_ = body.step(np.clip(a, -1, 1))
    return next_obs, rewards


def terminal(env: gym.Env, obs: np.ndarray) -> np.ndarray | None:
    """Does an episode end, by the environment's own rule, where it gets to raw obs (N, O)? (N,) bool.

    Locomotion: the observation is qpos without x, then qvel. Maze2D, Reacher and HalfCheetah never end. None where the
    observation does not tell (AntMaze's goal and Adroit's objects are not in it).
    """
    body = env.unwrapped
    if isinstance(body, envs.Maze) or is_reacher(env):
        return None if getattr(body, "ends", False) else np.zeros(len(obs), bool)
    if not hasattr(body, "model") or body.model.nq - 1 + body.model.nv != obs.shape[1]:
        return None
    joints, over = body.model.nq - 1, np.zeros(len(obs), bool)
    if not hasattr(body, "is_healthy"):
        return over
    env.reset(seed=0)
    for i, o in enumerate(obs.astype(np.float64)):
        body.data.qpos[1:], body.data.qvel[:] = o[:joints], o[joints:]
        over[i] = not body.is_healthy
    return over


def moments_of(env: gym.Env) -> tuple:
    """Mean and std of an environment's normalisation of states, 0 and 1 if it has none."""
    return env.units.moments if isinstance(env, data.Normalize) else (0.0, 1.0)


def raw_columns(rows: torch.Tensor, env: gym.Env, widths: Sequence[int]) -> tuple[np.ndarray, ...]:
    """s, a, r, s', terminated of rows (N, D) as arrays, states in raw units: `env` has their normalisation, if any."""
    obs, actions, rewards, next_obs, flags = (x.cpu().numpy() for x in rows.split(widths, 1))
    mean, std = moments_of(env)
    return obs * std + mean, actions, rewards[:, 0], next_obs * std + mean, flags[:, 0] > 0.5


def simulator_error(
    rows: torch.Tensor, env: gym.Env, widths: Sequence[int], std: torch.Tensor, units: data.Units = data.RAW
) -> dict[str, float]:
    """Of (s, a, s') against the simulator: rms over features of (s' - simulated s') / std, median over rows (N, D).

    std (O,) of s' in training units. sim_error_shuffled: the same rows, each with another's s'. reward_error: mean, in
    raw units. Empty where s does not tell the simulator's state.
    """
    obs, actions, theirs, next_obs, _ = raw_columns(rows, env, widths)
    truth, logs = simulate(env, obs, actions), {}
    if truth is None:
        return logs
    unit = std.cpu().numpy() * moments_of(env)[1]
    for name, x in (("", next_obs), ("_shuffled", np.roll(next_obs, len(next_obs) // 2, 0))):
        gap = ((x - truth[0]) / unit) ** 2
        logs[f"sim_error{name}"] = float(np.median(np.sqrt(gap.mean(1))))
    raw = (theirs - units.reward_bias) / units.reward_scale
    return logs | {"reward_error": float(np.abs(raw - truth[1]).mean())}


def flags_of(rows: torch.Tensor, env: gym.Env, widths: Sequence[int]) -> dict[str, float]:
    """Flags of termination of rows (N, D) beside the environment's own rule at s'; empty where it needs more than s'.

    `fallen`: share of rows that end by the rule; `flag_share`: flagged rows per such row; precision and recall.
    """
    *_, next_obs, told = raw_columns(rows, env, widths)
    over = terminal(env, next_obs)
    if over is None:
        return {}
    right, ends = float((over & told).sum()), float(over.sum())
    logs = {"fallen": float(over.mean()), "flag_share": told.sum() / max(ends, 1.0)}
    logs |= {"flag_precision": right / max(told.sum(), 1), "flag_recall": right / max(ends, 1.0)}
    return {k: float(v) for k, v in logs.items()}


def generated_rows(
    generator: Any, k: int, task: data.Task, units: data.Units, offline: ReplayBuffer, online: ReplayBuffer
) -> dict[str, float]:
    """All of the above of a Generator's k-th rows; 2,000 of each kind go to synthetic-<k>.npz.

    Read of the generator: `synthetic`, the buffers `sources` that it learned from, `moments`, `totals`, the run `r`.
    """
    tables = {"synthetic": generator.synthetic, "offline": offline, "online": online}
    tables = {k: b.table[: b.rows] for k, b in tables.items() if b.rows}
    few = {k: spread(t, 2_000) for k, t in tables.items()}
    synthetic, widths, moments = tables["synthetic"], offline.widths, generator.moments
    sources = [b.table[: b.rows] for b in generator.sources]
    logs = describe(few["synthetic"], few.get("online", few["offline"]), sources, moments, widths)
    rows, clipped, outside, dropped = generator.totals.tolist()
    logs |= {"syn/clipped_actions": clipped / rows, "syn/clipped_rewards": outside / rows}
    logs |= {"syn/nonfinite": dropped / rows, "syn/terminal": synthetic[:, -1].mean().item()}
    logs["syn/source_terminal"] = torch.cat([t[:, -1] for t in sources]).mean().item()
    std = moments.std[sum(widths[:3]) : sum(widths[:4])]
    env = data.make_env(task, units)
    judged = simulator_error(spread(synthetic, 200), env, widths, std, units)
    judged |= flags_of(spread(synthetic, 20_000), env, widths)
    file = io.BytesIO()
    np.savez_compressed(file, **{k: x.cpu().numpy() for k, x in few.items()})
    run.write_atomically(file.getvalue(), generator.r.dir / f"synthetic-{k}.npz")
    return logs | {f"syn/{k}": v for k, v in judged.items()}


def labelled_rows(
    generator: Any, k: int, task: data.Task, units: data.Units, offline: ReplayBuffer, online: ReplayBuffer
) -> dict[str, float]:
    """Of a LabelledGenerator: generated_rows, and each label's rows beside their source.  [CFDG Table 2]

    Of the online label beside own rows, in place of `describe`'s of all; of the other, syn/offline_*, beside the
    dataset; syn/dataset_js_* is the dataset's divergence from own rows.
    """
    logs = generated_rows(generator, k, task, units, offline, online)
    end, moments, widths = int(generator.boundary), generator.moments, offline.widths
    kept, own, dataset = (b.table[: b.rows] for b in (generator.synthetic, online, offline))
    some_own = spread(own, 2_000)
    logs |= {"syn/online_rows": end, "syn/offline_rows": len(kept) - end}
    logs |= describe(spread(kept[:end], 2_000), some_own, [own], moments, widths)
    of_dataset = describe(spread(dataset, 2_000), some_own, [own], moments, widths)
    logs |= {k.replace("/", "/dataset_"): v for k, v in of_dataset.items() if "/js_" in k}
    if len(kept) > end:
        of_others = describe(spread(kept[end:], 2_000), spread(dataset, 2_000), [dataset], moments, widths)
        logs |= {k.replace("/", "/offline_"): v for k, v in of_others.items() if k != "syn/online_l2"}
    return logs


def guided_rows(
    energies: Any, k: int, task: data.Task, units: data.Units, offline: ReplayBuffer, online: ReplayBuffer
) -> dict[str, float]:
    """generated_rows, and what EDIS's guidance changed: beside it, if any, 2,000 rows of the model ("unguided").

    energy/*_js_states from own states; *_policy_gap: rms of the action against one of the policy's at that state, in
    units of the moments; *_sim_error as above; energy/clipped: share of guidance clipped; energy/effective: (Σ w)² /
    Σ w² as a share of the real rows that were weighed.
    """
    g = energies.generator
    logs = generated_rows(g, k, task, units, offline, online)
    widths, (o, a, *_), env = online.widths, online.widths, data.make_env(task, units)
    logs["energy/clipped"] = (energies.guided[1] / energies.guided[0].clamp(min=1)).item()
    logs["energy/effective"] = energies.effective.item()
    few = [spread(b.table[: b.rows, : g.features], 2_000) for b in (online, g.synthetic)]
    own, guided = (g.moments.normalize(x) for x in few)
    moving = own[:, :o].std(0) > 1e-2  # as in describe
    compared = {"unguided": spread(energies.pool, 2_000)} if energies.guides else {}
    for name, x in (compared | {"guided": guided}).items():
        logs[f"energy/{name}_js_states"] = divergence(x[:, :o][:, moving], own[:, :o][:, moving])
        gap = (x - energies.with_policy(x))[:, o : o + a]
        logs[f"energy/{name}_policy_gap"] = gap.square().mean().sqrt().item()
        few = g.moments.denormalize(spread(x, 200))[:, : sum(widths[:4])]
        few = torch.nn.functional.pad(few, (0, 1))  # a flag that nothing here reads
        error = simulator_error(few, env, widths, g.moments.std[sum(widths[:3]) : sum(widths[:4])])
        if error:
            logs[f"energy/{name}_sim_error"] = error["sim_error"]
    return logs


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, of (N,) and (N,), equal values sharing their mean rank; 0 if one is constant."""
    ranks = []
    for x in (a, b):
        _, group, size = x.unique(return_inverse=True, return_counts=True)
        rank = (size.cumsum(0) - 0.5 * (size - 1))[group].double()
        ranks.append((rank - rank.mean()) / rank.std(correction=0).clamp(min=1e-8))
    return (ranks[0] * ranks[1]).mean().item()


def ratio_checks(own: torch.Tensor, dataset: torch.Tensor) -> dict[str, float]:
    """log w of own rows and of dataset rows, (N,) and (M,) -> its logistic loss, and what is 1 if w is their ratio."""
    loss = torch.nn.functional.softplus(-own).mean() + torch.nn.functional.softplus(dataset).mean()
    return {
        "align/ratio_loss": loss.item(),
        "align/w_off": dataset.exp().mean().item(),
        "align/inverse_w_on": (-own).exp().mean().item(),
        "align/w_balance": ((-own).sigmoid().mean() / dataset.sigmoid().mean()).item(),
    }


def selected_rows(aligner: Any) -> dict[str, float]:
    """Of AD2S's last selection, all align/*; indices count the rows of the dataset first, then own ones.

    ratio_loss, and what is 1 if w is a ratio, of rows that w did not learn from: w_off, E_off[w]; inverse_w_on,
    E_on[1/w] (of samples only if the buffers overlap: at a loss of 0.12 the exact w, too, has 0.15 to 1.6); w_balance,
    E_on[1/(1+w)] / E_off[w/(1+w)]. u_reward_rank, y_reward_rank: rank correlations with the reward; near 1, A drowns
    the rest. offline_share_aligned, offline_share_reused: of the selected rows. model_error: median over all rows of
    the root mean square error of g, in units of the moments. condition_q10, condition_q50, condition_q90 of the reused
    rows; amplified_q10, amplified_q50, amplified_q90 of what they are regenerated toward.
    """
    s, n = aligner.scored, aligner.buffers[0].rows
    logs = ratio_checks(*aligner.held_out())
    logs["align/u_reward_rank"] = rank_correlation(s["log_u"], s["reward"])
    logs["align/y_reward_rank"] = rank_correlation(s["log_y"], s["reward"])
    logs["align/offline_share_aligned"] = (aligner.aligned < n).float().mean().item()
    logs["align/offline_share_reused"] = (aligner.chosen < n).float().mean().item()
    logs["align/model_error"] = (s["error"] / aligner.obs_dim).sqrt().median().item()
    for name, c in {"condition": aligner.reused_conditions, "amplified": aligner.targets}.items():
        ordered = c.sort().values
        logs |= {f"align/{name}_q{q}": ordered[q * (len(c) - 1) // 100].item() for q in (10, 50, 90)}
    return logs


def aligned_rows(
    generator: Any, k: int, task: data.Task, units: data.Units, offline: ReplayBuffer, online: ReplayBuffer
) -> dict[str, float]:
    """Of an AlignedGenerator: generated_rows, selected_rows, and syn/model_error, of generated rows under g."""
    logs = generated_rows(generator, k, task, units, offline, online) | selected_rows(generator.aligner)
    error = generator.aligner.errors(generator.synthetic.table[: generator.synthetic.rows])
    return logs | {"syn/model_error": (error / generator.obs_dim).sqrt().median().item()}


COMPARED = 512  # windows on which a DUAL student and its planner are compared


@torch.no_grad()
def student(planner: Any, actor: Any, unroll: Callable, score: Callable | None) -> dict[str, float]:
    """A DUAL Planner's student of T denoising steps, as `actor`, beside the planner of teacher_steps.

    Mean square gap between their endpoints, from the same noise on the same windows: distill/error_<T> over all that is
    not given, distill/action_error_<T> over the actions; distill/score_<T> if there is a `score`. `unroll` is the
    sampler. Read of the planner: `average`, `windows`, `act_dim`, `args`; of the actor: its `net`, and T, `steps`.
    """
    windows, device, steps = planner.windows, planner.windows.last.device, actor.steps
    own = torch.Generator(device).manual_seed(0)
    index = torch.randint(len(windows.last), (COMPARED,), generator=own, device=device)
    x, _ = windows.take(index)
    noise = torch.randn(x.shape, generator=own, device=device)
    known = (torch.arange(x.shape[2], device=device) >= planner.act_dim).expand_as(x[:, 0])
    planned = unroll(planner.average, noise, x[:, 0], known, planner.args.teacher_steps)
    gap = (unroll(actor.net, noise, x[:, 0], known, steps) - planned).square()
    logs = {f"distill/error_{steps}": gap.sum().item() / (gap.numel() - known.sum().item())}
    logs[f"distill/action_error_{steps}"] = gap[..., : planner.act_dim].mean().item()
    return logs if score is None else logs | {f"distill/score_{steps}": score(actor)}


def acting(explorer: Any) -> dict[str, torch.Tensor]:
    """Means of a DUAL Explorer's `tally` (steps, sums of three variances and d) since it was cleared.

    uq/{epistemic,aleatoric}_std; uq/share_{epistemic,aleatoric,shift} of the variance; uq/shift d; uq/shift_ratio d /
    shift/offline. Of policies on hopper-mini-v0 that ratio is 1.1 to 2.5 without a shift, 4 to 10 with friction-2.0 or
    morphology-2.0; with kinematic-2.0 or gravity-2.0, 1.5 to 3, which does not tell: P̂ would have to be finer than its
    width of 64.
    """
    steps, aleatoric, epistemic, shift, d = explorer.tally
    total = aleatoric + epistemic + shift
    named = {"aleatoric": aleatoric, "epistemic": epistemic, "shift": shift}
    logs = {f"uq/share_{k}": v / total for k, v in named.items()}
    logs |= {f"uq/{k}_std": (named[k] / steps).sqrt() for k in ("aleatoric", "epistemic")}
    return logs | {"uq/shift": d / steps, "uq/shift_ratio": d / steps / explorer.usual}


@torch.no_grad()
def usual_shift(explorer: Any, dataset: ReplayBuffer) -> dict[str, float]:
    """shift/offline: the mean of d on some rows of the dataset that end no episode; kept as the Explorer's `usual`."""
    parts, errors, rows = explorer.parts([dataset]), 0.0, 0.0
    for b in parts:
        goes_on = 1 - b.terminations
        errors = errors + (goes_on * explorer.transition.prediction_error(b)).mean() * len(goes_on)
        rows = rows + goes_on.sum()
    explorer.usual.copy_(errors / rows.clamp(min=1))
    return {"shift/offline": explorer.usual.item()}


@torch.no_grad()
def error_rank(explorer: Any, own: ReplayBuffer) -> dict[str, float]:
    """uq/error_rank: rank correlation of an Explorer's epistemic variance with P̂'s error d, over rows not fitted yet.

    Those rows of `own`, added last since the last fit, that end no episode; near 1, doubt is where P̂ errs. {} if none.
    """
    batch = own.last(min(explorer.args.laplace_every, len(own)))
    batch = Batch(*(x[batch.terminations == 0] for x in batch))
    if explorer.args.horizon == 1 or not len(batch.obs):
        return {}
    shifts = explorer.offsets @ explorer.actor.features(batch.obs)[0].T  # of the draws' actions, (K, A, N)
    error = explorer.transition.prediction_error(batch)
    return {"uq/error_rank": rank_correlation(shifts.var(0, correction=0).mean(0), error)}


def time_acting(args: Any, task: data.Task, explorer: Callable) -> dict[str, float]:
    """Print milliseconds per action of DUAL, untrained, at the task's sizes: by T, K, shift.  [DUAL Table 4, Fig. 2a]

    explorer(args, task, T, uq) gives one that acts in T denoising steps; refusals of settings are its.
    """
    run.check_limits(args)
    explorer(args, task, 1, "none")  # refuses what cannot be, before anything is printed
    columns = {"K = 0": ("none", False), f"K = {args.laplace_draws}": ("laplace", False)}
    columns |= {f"K = {args.laplace_draws} and shift": ("laplace", True)} if args.horizon > 1 else {}
    device = run.pick_device(args.device)
    obs = torch.zeros(1, task.obs_dim, device=device)
    row = ReplayBuffer(1, task.obs_dim, task.act_dim, device)
    row.append(torch.zeros(1, row.table.shape[1], device=device))
    print(f"milliseconds per action on {device}\nT   " + "   ".join(columns))
    for steps in (2**i for i in range(args.teacher_steps.bit_length())):
        cells = []
        for name, (uq, shift) in columns.items():
            acting = explorer(args, task, steps, uq)
            for i in range(25):
                if i == 5:  # the first few warm up
                    begun = perf_counter()
                acting.act(obs).cpu()
                if shift:
                    acting.observe(row)
            cells.append(f"{(perf_counter() - begun) / 20 * 1_000:{len(name)}.2f}")
        print(f"{steps:<4}" + "   ".join(cells))
    return {}
