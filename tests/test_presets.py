"""Settings that `--env` alone resolves to, against tables typed from the papers; methods against their backbones.

`python tests/test_presets.py` prints how many cells there are and what differs. Numbers of tables and sections are the
papers'; [B], [E], [S] and [D] are notes on public code that fill the papers' gaps: backbones, energy-guided behavior,
replay synthesizers, DUAL. Where all are silent the value is ours, and its U# stands beside it.
"""

import math
import re
import subprocess
from dataclasses import fields

import pytest
from conftest import FILES, ROOT, module

from common import data, run

# ---- how the tables are written ----
# A layer is one table of a paper: setting -> value. Later layers of a file win. A value is the same for all tasks; or
# four of them, by FAMILY; or a dict by task, without its version, or by family, which leaves other tasks as they were.

FAMILY = {
    "locomotion": ("hopper-", "halfcheetah-", "walker2d-"), "antmaze": ("antmaze-",),
    "adroit": ("pen-", "door-", "hammer-", "relocate-"), "maze2d": ("maze2d-",), "frozenlake": ("frozenlake-",),
}  # fmt: skip
FIXED = {  # what a file does that has no setting for it
    "backup_entropy": False, "append_online": False, "normalize_reward": False,
    "dropout": 0.0,  # dual.py
    "offline_frac": 0.0,  # EDIS, AD2S
    "mc_tail": "zero",  # returns of what the dataset cuts off, Cal-QL
}  # fmt: skip
NOT_OF_A_PAPER = {  # which run it is, where it runs, what else it logs
    "env", "dataset", "seed", "from_offline", "from_behavior", "from_planner", "device", "compile", "out_dir",
    "overwrite", "wandb", "tensorboard", "eval_halvings", "time_acting",
}  # fmt: skip
EMBEDDED = "hopper-mini-v0", "reacher-mini-v0"  # sizes are ours, the same budget for all: U1

# ---- backbones ----
# Of the same tables, without a setting: buffers of 2M (ours never fill), orthogonal initialisation, automatic entropy,
# importance sampling, temperature 1, target update period 1, two hidden layers of IQL's networks. Their code is tested.

EVALUATION = dict(  # [E §9, 35]: DARE's mean of the last four, episodes of CORL and PEX [B §9]
    eval_every=(5_000, 10_000, 5_000, 5_000), eval_episodes=(10, 100, 10, 100),
)  # fmt: skip

# DARE Table 4 = StratDiff Table 2; Adroit, Maze2D: CORL's fine-tuning and offline CQL files [B §2.6, §9]
CAL_QL = dict(
    offline_steps=1_000_000,  # DARE §7.1, StratDiff B
    online_steps=200_000,  # DARE §7.1, StratDiff B, AD2S §4.1
    batch_size=256,
    gamma=0.99,
    reward_scale=(1.0, 10.0, 1.0, 1.0),
    reward_bias=(0.0, -5.0, 0.0, 0.0),  # "normalize reward: True" of AntMaze is these two [B §2.6]
    normalize_reward=False,
    normalize_obs=(True, False, False, True),
    sparse_reward=(False, True, False, False),
    policy_lr=(1e-4, 1e-4, 1e-4, 3e-5),
    critic_lr=3e-4,
    polyak=0.005,
    backup_entropy=False,
    cql_weight=(10.0, 5.0, 1.0, 10.0),
    cql_weight_online=(10.0, 5.0, 1.0, 10.0),
    lagrange=(False, True, False, True),
    target_gap=(-1.0, 0.8, -1.0, 5.0),  # -1: none
    max_target_backup=(False, True, True, False),
    cql_clip_min=-200.0,
    critic_layers=(3, 5, 3, 3),
    hidden=256,
    cql_n_actions=10,  # CORL [B §2.6]
    calibrate=True,
    calibrate_online=False,  # DARE §3.2: "R reduces to the standard CQL penalty"; CORL [B §2.4]
    warmup_steps=0,  # CORL [B §2.5]
    utd=1,  # StratDiff §4
    offline_frac=0.5,  # CORL [B §2.5]; StratDiff B: ρ
    **EVALUATION,
)

# DARE Table 5 = StratDiff Table 3; Adroit, Maze2D: CORL [B §1.6, §9]; the rest: PEX, which both name [B §1]
IQL = dict(
    offline_steps=1_000_000,  # DARE §7.1, StratDiff B
    online_steps=200_000,  # DARE §7.1, StratDiff B
    gamma=0.99,
    hidden=256,
    batch_size=256,
    lr=3e-4,
    polyak=0.005,
    expectile=(0.7, 0.9, 0.8, 0.7),
    inv_temp=(3.0, 10.0, 3.0, 3.0),
    dropout=(0.0, 0.0, 0.1, 0.0),  # CORL
    normalize_reward=False,  # PEX
    normalize_obs=(False, False, True, True),  # PEX; CORL
    reward_bias=(0.0, -1.0, 0.0, 0.0),  # PEX
    warmup_steps=5_000,  # PEX
    utd=1,
    offline_frac=0.5,  # PEX; StratDiff B: ρ
    append_online=False,  # PEX
    **EVALUATION,
)

PEX = dict(  # its code and README [B §3]; what DARE and StratDiff state of IQL is above
    choice_inv_temp=10.0, eval_random=0.1,
    expectile={"halfcheetah-random": 0.9}, inv_temp={"halfcheetah-random": 10.0},
)  # fmt: skip

# Its code [B §5, §2.6]: locomotion and AntMaze; Adroit, Maze2D: networks of its other Adroit, CORL: U80
WSRL = dict(
    offline_steps=(250_000, 1_000_000, 1_000_000, 250_000), online_steps=500_000, warmup_steps=5_000, utd=4,
    batch_size=256, gamma=0.99, polyak=0.005, policy_lr=1e-4, critic_lr=3e-4,
    n_critics=10, critic_subset=2, hidden=(256, 256, 512, 256), critic_layers=(2, 4, 3, 2),
    state_std=(True, False, True, True),
    calibrate=(False, True, True, False), cql_weight=(5.0, 5.0, 1.0, 5.0), cql_n_actions=10,
    lagrange=(False, True, False, False), target_gap=(-1.0, 0.8, -1.0, -1.0),
    max_target_backup=True, max_target_backup_online=(False, True, False, False), backup_entropy=False,
    normalize_obs=False, reward_scale=(1.0, 10.0, 1.0, 1.0), reward_bias=(0.0, -5.0, 0.0, 0.0),
    sparse_reward=(False, True, False, False), offline_frac=0.0, append_online=False,
    eval_every=20_000, eval_episodes=20,
)  # fmt: skip

APL = dict(  # its code, the form GCQL, which CFDG stands on [B §4]
    offline_steps=1_000_000,  # CFDG §4.1; the code 100,000
    online_steps=100_000,  # CFDG §4.1; code
    batch_size=256, gamma=0.99, polyak=0.005, policy_lr=1e-4, critic_lr=3e-4, hidden=256, critic_layers=3,
    n_critics=5, critic_subset=2, cql_weight=5.0, cql_n_actions=10, normalize_obs=False,
    warmup_steps=1_000, utd=10,  # blocks of 1,000 environment and 10,000 gradient steps
    fifo_prob=0.5, fifo_rows=20_000, fifo_from=10_000,
    **EVALUATION | dict(eval_episodes=5),
)  # fmt: skip

HOPPER, WALKER2D, HALFCHEETAH = (
    [re.sub(r"-v\d$", "", env) for env in data.TASKS if env.startswith(robot)]
    for robot in ("hopper-", "walker2d-", "halfcheetah-")
)
SO2 = dict(  # SO2's code, its branch of the paper; OFF2ON's code [B §6]
    offline_steps=1_000_000,  # OFF2ON's checkpoints; SO2's are EDAC's
    online_steps=150_000, warmup_steps=5_000, utd=10, gamma=0.99, polyak=0.005, hidden=256, normalize_obs=False,
    n_critics=dict.fromkeys(FAMILY, 10) | dict.fromkeys(HOPPER, 50), critic_layers=3,  # SO2
    policy_lr_online=1e-3, critic_lr_online=1e-3, entropy_weight=0.2,  # SO2
    perturbation=True, perturbation_std=0.3, perturbation_clip=0.6, mixed_rows=2_304,  # SO2: 2,560 less 256
    batch_size=256, policy_lr=3e-4, critic_lr=3e-4,  # OFF2ON
    balanced_replay=True, own_frac=0.5, ratio_batch=256, ratio_lr=3e-4, ratio_hidden=256, ratio_temperature=5.0,
    cql_weight=5.0, cql_n_actions=10,  # CQL's code, whose checkpoints OFF2ON starts from
    **EVALUATION | dict(eval_every=1_000, eval_episodes=8),
)  # fmt: skip

# Its code, table of hyperparameters in main.py, whose AntMaze is v0 [D §3.2]; Maze2D, other tasks: U112; online: U110
DIFFQL = dict(
    offline_steps=(2_000_000, 1_000_000, 1_000_000, 1_000_000), online_steps=1_000_000, warmup_steps=5_000, utd=1,
    batch_size=256, gamma=0.99, polyak=0.005, qf_lr=3e-4, hidden=256, denoise_steps=5, candidates=50, backup_actions=10,
    ema_decay=0.995, ema_start=1_000, ema_every=5,
    actor_lr={"locomotion": 3e-4, "antmaze": 3e-4, "antmaze-medium-play": 1e-3, "adroit": 3e-5, "maze2d": 3e-4},
    eta={
        "locomotion": 1.0, "adroit": 0.1, "pen-human": 0.15, "pen-cloned": 0.1, "maze2d": 2.0,
        "antmaze-umaze": 0.5, "antmaze-umaze-diverse": 2.0, "antmaze-medium-play": 2.0,
        "antmaze-medium-diverse": 3.0, "antmaze-large-play": 4.5, "antmaze-large-diverse": 3.5,
    },
    max_q_backup={"locomotion": False, "antmaze": True, "antmaze-umaze": False, "adroit": False, "maze2d": True},
    grad_clip={
        "halfcheetah-medium": 9.0, "hopper-medium": 9.0, "walker2d-medium": 1.0,
        "halfcheetah-medium-replay": 2.0, "hopper-medium-replay": 4.0, "walker2d-medium-replay": 4.0,
        "halfcheetah-medium-expert": 7.0, "hopper-medium-expert": 5.0, "walker2d-medium-expert": 5.0,
        "antmaze-umaze": 2.0, "antmaze-umaze-diverse": 3.0, "antmaze-medium-play": 2.0,
        "antmaze-medium-diverse": 1.0, "antmaze-large-play": 10.0, "antmaze-large-diverse": 7.0,
        "pen-human": 7.0, "pen-cloned": 8.0, "adroit": 8.0, "maze2d": 2.0, "locomotion": 9.0,
        **{f"walker2d-{k}": 1.0 for k in ("random", "expert", "morphology-2.0")},
        "halfcheetah-medium-replay-gravity-2.0": 2.0,
    },
    normalize_obs=False, normalize_reward=False, standardize_reward=(False, False, True, False),
    reward_scale=(1.0, 4.0, 1.0, 1.0), reward_bias=(0.0, -2.0, 0.0, 0.0),  # AntMaze: 4 (r - 0.5)
    eval_every=50_000, eval_episodes=(10, 100, 100, 100),
)  # fmt: skip
D_DIFFQL = dict(  # what dacer.py has not
    distill=False, distill_from=8, halving_steps=20_000, distill_lr=3e-4,  # [D §3.4, 1.5]
    append_online=True, offline_frac=0.5,
)  # fmt: skip

# Its code; the rest of what DUAL compares with is its Diff-QL [D §3.3]: D130
DACER = dict(
    cloning_online=0.0, noise_scale=0.1, alpha_start=3.0, alpha_lr=3e-2, alpha_every=10_000, entropy_target=-0.9,
    entropy_states=256, entropy_samples=200, mixture_components=3,
    em_steps=50,  # D132
)  # fmt: skip
CHEETAHS = (
    "random",
    "medium",
    "medium-replay",
    "medium-expert",
    "expert",
    "friction-2.0",
    "medium-replay-gravity-2.0",
)
# HalfCheetah's is that of Humanoid [its README]
DACER_CHEETAH = dict(noise_scale={f"halfcheetah-{k}": 0.15 for k in CHEETAHS})

# Its code, config/locomotion.py; CleanDiffuser's scales, its H in AntMaze [D §3.1]; other tasks: U123; --distill: U125
DIFFUSER = dict(
    offline_steps=1_000_000, online_steps=1_000_000, warmup_steps=5_000, utd=1, lr=2e-4,
    horizon={"locomotion": 32, "antmaze": 64, "adroit": 4, "maze2d": 40, "frozenlake": 4}
    | dict.fromkeys(HALFCHEETAH, 4),
    normalize_windows=True, planner_batch=64, action_weight=10.0, denoise_steps=20,
    planner_width=512, planner_blocks=3,  # dual.py's network
    temperature=0.5,  # CleanDiffuser
    guide_steps=200_000, gamma=(0.997, 0.99, 0.99, 0.99), reward_bias=(0.0, -1.0, 0.0, 0.0),
    terminal_reward=(-100.0, 0.0, -100.0, -100.0), cutoff_reward=(0.0, -100.0, 0.0, 0.0),
    guide_scale={
        "locomotion": 0.3, "antmaze": 0.001, "adroit": 0.1, "maze2d": 0.001,
        "hopper-medium": 0.3, "hopper-medium-replay": 0.2, "hopper-medium-expert": 1e-5,
        "walker2d-medium": 0.007, "walker2d-medium-replay": 0.01, "walker2d-medium-expert": 0.001,
        **{f"walker2d-{k}": 0.007 for k in ("random", "expert", "morphology-2.0")},
        **{env: 1e-4 for env in HALFCHEETAH},
    },
    guide_repeats=2, guide_stop=dict.fromkeys(FAMILY, 2) | dict.fromkeys(["hopper-medium-expert", *HALFCHEETAH], 4),
    plans=64,
    distill=False, distill_from=32, halving_steps=20_000, distill_lr=3e-4,  # [D §3.4, 1.5]
    **EVALUATION | dict(eval_episodes=(10, 100, 10, 100)),
)  # fmt: skip
FROZEN_PLANNER = {  # [D §1, §5]: U123
    k: {"frozenlake": v} for k, v in dict(
        offline_steps=5_000, guide_steps=5_000, online_steps=20_000, warmup_steps=2_000, eval_every=500,
        eval_episodes=1, normalize_windows=False, planner_width=128, planner_blocks=2, gamma=0.99,
        terminal_reward=0.0, guide_scale=1.0, halving_steps=1_500,
    ).items()
} | {"horizon": {"frozenlake-8x8": 8}}  # fmt: skip

# ---- StratDiff, DARE ----

GUIDED = dict(
    guidance_scale={  # StratDiff Table 4 = DARE Table 7
        "walker2d-medium-expert": 5.0, "halfcheetah-medium-expert": 3.0, "hopper-medium-expert": 2.0,
        "walker2d-medium-replay": 5.0, "halfcheetah-medium-replay": 8.0, "hopper-medium-replay": 3.0,
        "walker2d-medium": 10.0, "halfcheetah-medium": 10.0, "hopper-medium": 8.0,
        "antmaze-umaze": 3.0, "antmaze-medium-play": 4.0, "antmaze-umaze-diverse": 1.0, "antmaze-medium-diverse": 3.0,
        **dict.fromkeys(FAMILY, 3.0),  # others [E §9, 37]: U15
    },
    support_k=(16, 32, 16, 16),  # StratDiff B.3; DARE: the same code base [E §9, 13]; Adroit, Maze2D: U15
    energy_beta=3.0,  # StratDiff B.3 "for all tasks"
    energy_units=("qgpo", "reward", "qgpo", "qgpo"),  # AntMaze: r - 1 is QGPO's own [E §2.5]; Adroit, Maze2D: U15
    behavior_steps=600_000,  # StratDiff B.3, DARE B.5
    behavior_lr=1e-4,  # there
    behavior_batch=4_096,  # there
    behavior_width=512,  # Chen et al. [E §1.2]
    energy_hidden=256,  # StratDiff B.3, DARE B.5
    energy_lr=3e-4,  # there
    energy_batch=256,  # there
    energy_steps=100_000,  # [E §9, 10]: U12
    support_every=250,  # [E §6]: U14
    score="gauss",  # [E §9, 1]
)  # fmt: skip
STRATDIFF = GUIDED | dict(exchange_cap=-1)  # §3.2: the sort, without n_c
STRATDIFF_IQL = STRATDIFF | dict(
    online_value="expectile", online_expectile=0.99,  # Eq. 12
    max_q_samples=10,  # [E §4.3]: U19
)  # fmt: skip
DARE = GUIDED | dict(threshold="gauss")  # Eqs. 8-9
DARE_IQL = DARE | dict(
    exchange_cap=-1,  # B.1: n = ∞
    sac_alpha=(0.2, 0.01, 0.2, 0.2),  # B.1
    value_loss="iql",  # §6.1; App. G is the other
    online_expectile=0.99,  # Eq. 35
    max_q_samples=10,  # [E §4.3]: U19
)
REDUCED = dict(cql_reduction="batch")  # [E §4.2]: U22

# ---- generators ----

EDM = dict(  # CFDG Table 5 = AD2S Table 4 = DARE Table 6 (EDIS); the rest: code of SynthER and EDIS [S §1.2]
    diffusion_depth=6, diffusion_width=1_024, diffusion_lr=3e-4, diffusion_batch=256, sample_steps=128,
    diffusion_time_dim=256, sample_churn=80.0, sample_batch=10_000,
    terminal_flag="joint",  # SynthER [S §1.2]
)  # fmt: skip
SYNTHER = EDM | dict(  # code, online [S §1.2, §2]
    diffusion_steps=100_000, synthetic_rows=200_000, regenerate_every=10_000, synthetic_frac=0.5, utd=20,
    synther_data="online",  # CFDG §4.2: "to augment online data"
    offline_upsample=False,
)  # fmt: skip
CFDG = EDM | dict(
    online_steps=1_000_000,  # §4.1
    synthetic_frac=1 / 3, online_label_frac=0.8,  # §4.1
    diffusion_steps=100_000,  # Table 5
    regenerations=10,  # Table 5: every 100,000 of 1M
    labels=True,
    label_dropout=0.25, guidance_w=0.5, synthetic_rows=125_000,  # silent [S §4.2]: U40, U43
)  # fmt: skip
AD2S = EDM | dict(  # Table 4
    guidance_eta=2.0, condition_dropout=0.25, diffusion_steps=50_000, regenerate_every=10_000, warmup_steps=5_000,
    scorer_hidden=256, scorer_lr=3e-4, amplification=1.2, beta_dr=10.0, beta_curi=10.0,
    noising_scale=(0.5, 0.5, 0.5, 0.8), p_dr=(0.5, 0.5, 0.5, 0.8), p_curi=(0.5, 0.5, 0.5, 0.8),  # Adroit [S §5.5]: U49
    advantage="reward",  # Eq. 8
    offline_frac=0.0,  # Algorithm 1, l. 11
    synthetic_frac=0.5, synthetic_rows=100_000, scorer_batch=256, pgr=False,  # silent [S §5.5]: U40, U30, U44
)  # fmt: skip

# EDIS: its code, file by file [S §3.3], on Cal-QL: share of generated rows, λ of E_s, E_π and E_T, α_cql online
EDIS_TASKS = """
halfcheetah-random        0.2  1     0.2   0.2   10  | antmaze-umaze           0.5  0.01  0.01  0.01  5
halfcheetah-medium-replay 0.2  1     0.2   0.2   10  | antmaze-umaze-diverse   0.5  0.01  0.01  0.01  5
halfcheetah-medium        0.2  1     0.2   0.2   10  | antmaze-medium-play     0.3  0.01  0.01  0.01  5
halfcheetah-medium-expert 0.5  1     0.2   0.2   10  | antmaze-medium-diverse  0.3  0.01  0.01  0.01  5
hopper-random             0.2  1     0.1   0.1   1   | antmaze-large-play      0.5  0.01  0.01  0.01  5
hopper-medium-replay      0.5  1     0.2   0.2   10  | antmaze-large-diverse   0.5  0.01  0.01  0.01  5
hopper-medium             0.2  2     0.01  0.01  0.1 | door-human              0.5  0.01  0.01  0.01  1
hopper-medium-expert      0.5  0.01  0.01  0.01  10  | pen-human               0.3  0.01  0.01  0.01  5
walker2d-random           0.1  2     0.01  0.01  0   | relocate-human          0.2  1     0.01  0.01  2.5
walker2d-medium-replay    0.2  0.1   0.2   0.2   10
walker2d-medium           0.2  0.01  0.01  0.01  0
walker2d-medium-expert    0.2  0.01  0.01  0.01  10
"""
# ... and on IQL: τ, share, thousands of model steps
IQL_EDIS_TASKS = """
halfcheetah-random        0.9  0.2  30 | antmaze-umaze           0.9  0.2  50
halfcheetah-medium-replay 0.7  0.8  50 | antmaze-umaze-diverse   0.7  0.9  50
halfcheetah-medium        0.9  0.5  50 | antmaze-medium-play     0.9  0.2  50
halfcheetah-medium-expert 0.6  0.7  30 | antmaze-medium-diverse  0.9  0.2  50
hopper-random             0.5  0.8  30 | antmaze-large-play      0.9  0.1  30
hopper-medium-replay      0.7  0.2  30 | antmaze-large-diverse   0.9  0.1  30
hopper-medium             0.7  0.2  30 | door-human              0.8  0.2  30
hopper-medium-expert      0.7  0.1  30 | pen-human               0.8  0.2  30
walker2d-random           0.7  0.5  30 | relocate-human          0.8  0.2  30
walker2d-medium-replay    0.7  0.8  50
walker2d-medium           0.7  0.2  30
walker2d-medium-expert    0.7  0.5  30
"""


def columns(table: str) -> list[dict[str, float]]:
    """Columns of a table of EDIS's: task -> number."""
    rows = [row.split() for row in re.split(r"[|\n]", table) if row.strip()]
    return [{row[0]: float(row[k]) for row in rows} for k in range(1, len(rows[0]))]


SHARE, LAMBDA_S, LAMBDA_PI, LAMBDA_T, ALPHA = columns(EDIS_TASKS)
IQL_TAU, IQL_SHARE, IQL_THOUSANDS = columns(IQL_EDIS_TASKS)
EDIS = EDM | dict(  # code [S §1.2, §3.1]; energies: DARE Table 6
    synthetic_rows=100_000, regenerate_every=10_000, energy_lr=1e-3, energy_width=256, energy_groups=256,
    energy_updates=20, energy_form="paper",
    offline_frac=0.0,
    energy_pool=10_000,  # [S §3.5]
    state_energy=1.0, policy_energy=1.0, dynamics_energy=1.0,  # tasks that the code lacks [S §3.5]
    synthetic_frac=0.2,  # such tasks: U45
    warmup_steps=0,  # [S §3.2, 7]
)  # fmt: skip
EDIS_CALQL = EDIS | dict(diffusion_steps=10_000)
EDIS_CALQL_TASKS = dict(
    synthetic_frac=SHARE, state_energy=LAMBDA_S, policy_energy=LAMBDA_PI, dynamics_energy=LAMBDA_T,
    cql_weight_online=ALPHA,
)  # fmt: skip
EDIS_CALQL_LEARNER = dict(  # its own Cal-QL [S §3.3; B §2.6], which has nothing for Maze2D
    offline_steps=300_000,
    backup_entropy=True,
    critic_layers={"locomotion": 2},
    lagrange={"locomotion": True, "adroit": True}
    | {f"relocate-{k}": False for k in ("human", "cloned", "expert")},
    target_gap={"locomotion": 10.0, "adroit": 0.8},
    cql_clip_min={"locomotion": -math.inf},
    cql_weight={f"pen-{k}": 5.0 for k in ("human", "cloned", "expert")},
    normalize_reward={"locomotion": True, "hopper-random": False},  # r · 1000 / range
    reward_scale={"antmaze": 1.0},
    reward_bias={"antmaze": -1.0},
    normalize_obs={"antmaze": True},
    eval_episodes={"locomotion": 10, "antmaze": 10, "adroit": 10},
)
EDIS_IQL = EDIS | dict(
    state_energy=2.0, policy_energy=0.1, dynamics_energy=0.1,  # one set for all tasks
    diffusion_steps=30_000,  # tasks that the code lacks: U45
    append_online=True,  # [S §3.4]
)  # fmt: skip
EDIS_IQL_TASKS = dict(
    synthetic_frac=IQL_SHARE, diffusion_steps={k: int(1_000 * v) for k, v in IQL_THOUSANDS.items()}
)
EDIS_IQL_LEARNER = dict(  # its own IQL [S §3.3; B §1.6], which has nothing for Maze2D
    expectile=IQL_TAU, inv_temp={"locomotion": 10.0, "antmaze": 10.0, "adroit": 10.0},
    normalize_obs=True, dropout=0.0, eval_episodes=100,
)  # fmt: skip

# ---- DUAL: numbers were lost from its text, so nearly all are silent [D §1, §2] ----

PLANNER = dict(
    online_steps=1_000_000,  # "follow exactly" CORL, B.1
    warmup_steps=0,  # CORL
    horizon=(4, 32, 4, 4),  # U51
    normalize_windows=True, planner_steps=500_000, planner_batch=256, planner_lr=3e-4,  # U51, U52
    planner_width=512, planner_blocks=3,  # U50
    teacher_steps=32, distill_steps=1, halving_steps=20_000,  # U52; T also from the latencies of Table 4
    latent="zero", bc_coef=0.0,  # U54, U61
    uq="laplace", laplace_weights="actor",  # §3.2
    laplace_noise="sigma", laplace_std=0.0, laplace_prior=0.0,  # Eqs. 5-6 as they stand: uniform prior, all rows
    laplace_draws=10, laplace_every=5_000, laplace_rows=50_000,  # U56
    shift_weight=0.5,  # Table 5
    fit_transition=False,  # P̂ is the student as it is
)  # fmt: skip
DUAL_IQL = dict(  # CORL, whose locomotion files are its offline ones [B §1.6; D, U22]
    normalize_obs=True, append_online=True, reward_scale=1.0,
    expectile={"hopper-medium-expert": 0.5}, inv_temp={"hopper-medium-expert": 6.0},
    **{k: dict.fromkeys(("hopper-medium", "hopper-medium-replay", "hopper-friction-2.0"), v)  # data of hopper-medium
       for k, v in (("polyak", 0.001), ("normalize_reward", True))},
)  # fmt: skip
DUAL_SO2 = dict(warmup_steps=5_000, policy_lr_online=3e-4)  # the backbone's; [D §1.7]: U141
LAKE_DIFFQL = {  # of DUAL's figure; the lengths of dual.py: U143
    k: {"frozenlake": v} for k, v in dict(
        offline_steps=6_000, online_steps=20_000, warmup_steps=2_000, eval_every=500, eval_episodes=1,
        reward_scale=10.0, append_online=False, offline_frac=0.0, halving_steps=1_500,
        actor_lr=3e-4, eta=2.0, max_q_backup=False, grad_clip=2.0,
    ).items()
}  # fmt: skip
FROZEN_LAKE = {  # [D §5]: U62
    k: {"frozenlake": v} for k, v in dict(
        offline_steps=6_000, online_steps=20_000, warmup_steps=2_000, eval_every=500, eval_episodes=1, expectile=0.7,
        inv_temp=10.0, reward_scale=10.0, normalize_obs=False, append_online=False, offline_frac=0.0,
        normalize_windows=False, planner_steps=5_000, planner_width=128, planner_blocks=2, halving_steps=1_500,
    ).items()
} | {"horizon": {"frozenlake-8x8": 8}}  # fmt: skip

PAPER = {
    "iql": [IQL, dict(normalize_reward={"locomotion": True})],  # IQL's own paper [B §1.4]
    "calql": [CAL_QL, dict(calibrate_online=True)],  # Cal-QL's own code [B §2.4]
    "pex": [IQL, PEX],
    "wsrl": [WSRL],
    "apl": [APL],
    "so2": [SO2],
    "iql_stratdiff": [IQL, STRATDIFF_IQL],
    "calql_stratdiff": [CAL_QL, STRATDIFF, REDUCED],
    "iql_dare": [IQL, DARE_IQL],
    "calql_dare": [CAL_QL, DARE, dict(exchange_cap=32), REDUCED],  # B.1
    "iql_synther": [IQL, SYNTHER],
    "synther": [CAL_QL, SYNTHER],
    "iql_edis": [IQL, EDIS_IQL, EDIS_IQL_TASKS, EDIS_IQL_LEARNER],
    "edis": [CAL_QL, EDIS_CALQL, EDIS_CALQL_TASKS, EDIS_CALQL_LEARNER],
    "iql_cfdg": [IQL, CFDG],
    "pex_cfdg": [IQL, PEX, CFDG],
    "apl_cfdg": [APL, CFDG, dict(online_steps=100_000)],
    "calql_ad2s": [CAL_QL, AD2S],
    "iql_ad2s": [IQL, AD2S],
    "wsrl_ad2s": [WSRL, AD2S],
    "dual": [IQL, PLANNER, DUAL_IQL, FROZEN_LAKE],
    "calql_dual": [CAL_QL, PLANNER],
    "so2_dual": [SO2, PLANNER, DUAL_SO2],
    "diffql": [DIFFQL, D_DIFFQL, LAKE_DIFFQL],
    "dacer": [DIFFQL, DACER, DACER_CHEETAH],
    "diffuser": [DIFFUSER, FROZEN_PLANNER],
}

# ---- where we differ on purpose: (files, tasks, setting) -> (our value, the note that says why) ----

GENERATORS = "iql_synther synther iql_cfdg pex_cfdg apl_cfdg calql_ad2s iql_ad2s wsrl_ad2s iql_edis edis"
DIFFERENCES = {
    ("iql", "locomotion", "normalize_reward"): (False, "D2: raw rewards, as PEX and CORL"),
    ("pex pex_cfdg", "all", "eval_random"): (0.0, "D71: deterministic evaluation, as in every file"),
    ("pex pex_cfdg", "halfcheetah-random", "expectile"): (0.7, "D72: iql.py's offline phase, for this and the next"),
    ("pex pex_cfdg", "halfcheetah-random", "inv_temp"): (3.0, "D72"),
    ("wsrl wsrl_ad2s", "all", "online_steps"): (200_000, "D80: AD2S's budget, for this and the next"),
    ("wsrl wsrl_ad2s", "antmaze", "eval_every"): (10_000, "D80: as the other files"),
    ("wsrl wsrl_ad2s", "antmaze maze2d", "eval_episodes"): (100, "D80"),
    ("wsrl wsrl_ad2s", "locomotion adroit maze2d", "eval_every"): (5_000, "D80"),
    ("wsrl wsrl_ad2s", "locomotion adroit", "eval_episodes"): (10, "D80"),
    ("apl apl_cfdg", "locomotion adroit", "eval_episodes"): (10, "D94: as every file"),
    ("apl apl_cfdg", "antmaze maze2d", "eval_episodes"): (100, "D94: as every file"),
    ("so2 so2_dual", " ".join(HOPPER), "n_critics"): (10, "D103: CQL is pessimistic by itself"),
    ("so2 so2_dual", "locomotion adroit maze2d", "eval_every"): (5_000, "D105: as every file"),
    ("so2 so2_dual", "antmaze", "eval_every"): (10_000, "D105: as every file"),
    ("so2 so2_dual", "locomotion adroit", "eval_episodes"): (10, "D105: as every file"),
    ("so2 so2_dual", "antmaze maze2d", "eval_episodes"): (100, "D105: as every file"),
    ("diffql dacer", "locomotion", "offline_steps"): (1_000_000, "D111: DUAL's budget"),
    ("diffql dacer", "antmaze", "eval_every"): (10_000, "D111: as every file"),
    ("diffql dacer", "locomotion adroit maze2d", "eval_every"): (5_000, "D111: as every file"),
    ("dacer", "all", "cloning_online"): (1.0, "D130: DUAL's stands on its Diff-QL"),
    ("diffuser", " ".join(HOPPER + WALKER2D), "horizon"): (4, "D122: DUAL's, after Lu et al."),
    ("diffuser", "antmaze", "horizon"): (40, "D122: DUAL's, after Lu et al.; CleanDiffuser 64"),
    ("diffuser", "locomotion antmaze adroit maze2d", "offline_steps"): (500_000, "D123: fewer, larger batches"),
    ("diffuser", "all", "planner_batch"): (256, "D123"),
    ("calql", "all", "calibrate_online"): (False, "D3: off online, as in the papers on CORL's code"),
    ("calql calql_stratdiff calql_dare synther", "all", "warmup_steps"): (5_000, "D4: else copies of one row"),
    (GENERATORS, "all", "terminal_flag"): ("classifier", "D21: the joint flag is hardly ever set"),
    ("iql_synther synther", "all", "utd"): (1, "D23: the backbone's"),
    ("iql_synther synther", "all", "diffusion_steps"): (50_000, "U30: AD2S's"),
    ("iql_synther synther", "all", "synthetic_rows"): (100_000, "U30: EDIS's"),
    ("calql_ad2s iql_ad2s wsrl_ad2s", "all", "sample_churn"): (0.0, "D44: churn forgets the noised row"),
    ("edis iql_edis", "all", "state_energy"): (1.0, "D41: the scales were tuned to another guidance"),
    ("edis iql_edis", "all", "policy_energy"): (1.0, "D41"),
    ("edis iql_edis", "all", "dynamics_energy"): (1.0, "D41"),
    ("edis iql_edis", "all", "energy_updates"): (1_000, "U40: 20 cannot fit"),
    ("edis iql_edis", "all", "energy_form"): ("row", "D41: exact for one, two and three energies"),
    ("edis", "all", "warmup_steps"): (5_000, "D46: the code begins with one own transition"),
    ("iql_edis", "all", "warmup_steps"): (5_000, "D47: the code begins with one own transition"),
    ("edis", "all", "backup_entropy"): (False, "D45: as Cal-QL"),
    ("edis", "all", "offline_steps"): (1_000_000, "D45: as Cal-QL"),
    ("edis", "locomotion", "cql_weight_online"): (10.0, "D45: Cal-QL's presets, for this and the next"),
    ("edis", "adroit", "cql_weight_online"): (1.0, "D45"),
    ("edis", "adroit", "cql_weight"): (1.0, "D45"),
    ("edis", "locomotion", "critic_layers"): (3, "D45"),
    ("edis", "locomotion", "lagrange"): (False, "D45"),
    ("edis", "adroit", "lagrange"): (False, "D45"),
    ("edis", "locomotion", "target_gap"): (-1.0, "D45"),
    ("edis", "adroit", "target_gap"): (-1.0, "D45"),
    ("edis", "locomotion", "cql_clip_min"): (-200.0, "D45"),
    ("edis", "locomotion", "normalize_reward"): (False, "D45"),
    ("edis", "antmaze", "reward_scale"): (10.0, "D45"),
    ("edis", "antmaze", "reward_bias"): (-5.0, "D45"),
    ("edis", "antmaze", "normalize_obs"): (False, "D45"),
    ("edis", "antmaze", "eval_episodes"): (100, "D45"),
    ("iql_edis", "locomotion", "expectile"): (0.7, "D45: IQL's presets, for this and the next"),
    ("iql_edis", "antmaze", "expectile"): (0.9, "D45"),
    ("iql_edis", "locomotion", "inv_temp"): (3.0, "D45"),
    ("iql_edis", "adroit", "inv_temp"): (3.0, "D45"),
    ("iql_edis", "locomotion", "normalize_obs"): (False, "D45"),
    ("iql_edis", "antmaze", "normalize_obs"): (False, "D45"),
    ("iql_edis", "adroit", "dropout"): (0.1, "D45"),
    ("iql_edis", "locomotion", "eval_episodes"): (10, "D45"),
    ("iql_edis", "adroit", "eval_episodes"): (10, "D45"),
    ("iql_edis", "all", "append_online"): (False, "D47: no row of the dataset online"),
    ("dual calql_dual", "locomotion antmaze adroit maze2d", "warmup_steps"): (5_000, "D59: CORL has none"),
    ("dual calql_dual so2_dual", "all", "laplace_noise"): ("unit", "D51: Eq. 6 as it stands is a spike"),
    ("dual calql_dual so2_dual", "all", "laplace_std"): (0.1, "D51"),
    ("dual calql_dual so2_dual", "all", "laplace_prior"): (1.0, "D51"),
    ("dual calql_dual so2_dual", "all", "fit_transition"): (True, "D57: the student's own error hides a shift"),
    ("dual", "adroit", "dropout"): (0.0, "U55: the actor has none"),
    ("dual", "hopper-medium-expert", "expectile"): (0.7, "D59: one setting for locomotion"),
    ("dual", "hopper-medium-expert", "inv_temp"): (3.0, "D59"),
    ("dual", "locomotion", "polyak"): (0.005, "D59"),
    ("dual", "locomotion", "normalize_reward"): (False, "D59"),
}  # fmt: skip

# (files, tasks, setting of the backbone) -> (the method's value, the note that says why); the first that fits holds
RELEASE = "calql_dare calql_stratdiff iql_dare iql_stratdiff"
FROM_BACKBONE = {
    ("iql_cfdg pex_cfdg", "all", "online_steps"): (1_000_000, "D40: the paper's budget"),
    ("dual calql_dual so2_dual", "all", "online_steps"): (1_000_000, "D59: the paper's budget"),
    ("so2_dual", "all", "policy_lr_online"): (3e-4, "U141: the offline rate"),
    ("dual", "all", "append_online"): (True, "D59: CORL's flavour"),
    ("dual", "locomotion antmaze", "normalize_obs"): (True, "D59"),
    ("dual", "adroit", "dropout"): (0.0, "U55: the actor has none"),
    ("edis iql_edis", "all", "offline_frac"): (0.0, "D47: batches of own and generated rows"),
    ("calql_ad2s iql_ad2s", "all", "offline_frac"): (0.0, "U40: batches of own and generated rows"),
}
BACKBONE = {stem: stem.split("_")[0] for stem in FILES if "_" in stem}
BACKBONE |= {"synther": "calql", "edis": "calql", "dual": "iql", "pex": "iql", "dacer": "diffql"}
LEFT_OUT = {"dacer": set(D_DIFFQL)}  # settings of the backbone that a method does not have


# ---- comparing ----


def family(env: str) -> str:
    return next(name for name, prefixes in FAMILY.items() if env.startswith(prefixes))


def is_of(env: str, tasks: str) -> bool:
    """Is `env` among `tasks`: "all", families, or tasks without their version?"""
    return tasks == "all" or bool({bare(env), env, family(env)} & set(tasks.split()))


def bare(env: str) -> str:
    return re.sub(r"-v\d$", "", env)


def paper(stem: str, env: str) -> dict[str, object]:
    """Setting -> the paper's value for this task."""
    cells: dict[str, object] = {}
    for setting, value in ((k, v) for layer in PAPER[stem] for k, v in layer.items()):
        if isinstance(value, dict):
            value = value.get(bare(env), value.get(family(env), cells.get(setting)))
        elif isinstance(value, tuple):
            at = list(FAMILY).index(family(env))
            value = value[at % len(value)]  # Frozen-Lake: the first, unless it has its own
        cells[setting] = value
    return cells


def resolved(stem: str, env: str, presets: dict | None = None) -> dict[str, object]:
    """Setting -> what the file makes of `--env`, FIXED included."""
    file = module(stem)
    args = run.with_presets(file.Args, file.ENV_PRESETS if presets is None else presets, env)
    return FIXED | {f.name: getattr(args, f.name) for f in fields(args)}


def covering(table: dict, stem: str, env: str, setting: str) -> tuple | None:
    """The key of `table` that speaks of this cell."""
    return next((k for k in table if stem in k[0].split() and k[2] == setting and is_of(env, k[1])), None)


def wrong_cells(stem: str, env: str, presets: dict | None = None, used: dict | None = None) -> list[str]:
    """Cells without the paper's value, or the one that DIFFERENCES gives; `used` notes where that differs."""
    ours, wrong = resolved(stem, env, presets), []
    for setting, theirs in paper(stem, env).items():
        got, right = ours.get(setting, "no such setting"), theirs
        if key := covering(DIFFERENCES, stem, env, setting):
            right = DIFFERENCES[key][0]
            if used is not None and right != theirs:
                used.setdefault((stem, key), []).append((env, theirs))
        if got != right or type(got) is not type(right):
            wrong.append(f"{stem} {env}: {setting} is {got}, should be {right}; the paper has {theirs}")
    return wrong


def papers_tasks() -> dict[str, list[str]]:
    """File -> tasks of its paper's tables, from run_all.sh."""
    listed = subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), "--list"], capture_output=True, text=True, check=True
    )
    tasks: dict[str, dict[str, None]] = {stem: {} for stem in FILES}
    for stem, env, _ in (line.split()[-3:] for line in listed.stdout.splitlines()):
        tasks[stem][env] = None
    return {stem: list(of_stem) for stem, of_stem in tasks.items()}


def all_tasks(stem: str) -> list[str]:
    """Tasks that the file has settings for, its paper's among them; the embedded one is not from a paper (U1)."""
    lakes = ["frozenlake-4x4", "frozenlake-8x8"] if stem in ("dual", "diffql", "diffuser") else []
    return [env for env in data.TASKS if env not in EMBEDDED and family(env) != "frozenlake"] + lakes


TASKS = papers_tasks()


@pytest.mark.parametrize("stem", FILES)
def test_resolved_settings_are_the_papers(stem):
    """Every setting, on every task: those of the paper's tables, and the others, where the paper is silent."""
    assert TASKS[stem] and set(TASKS[stem]) <= set(all_tasks(stem))
    wrong = [cell for env in all_tasks(stem) for cell in wrong_cells(stem, env)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("stem", FILES)
def test_every_setting_is_in_the_tables(stem):
    settings = {f.name for f in fields(module(stem).Args)} - NOT_OF_A_PAPER
    for env in all_tasks(stem):
        cells = paper(stem, env)
        assert settings <= set(cells) <= settings | set(FIXED), env
        assert None not in cells.values(), env


def changed(value: object) -> object:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else value + "?"


@pytest.mark.parametrize("stem", FILES)
def test_a_missing_or_changed_preset_fails(stem):
    """Each key of ENV_PRESETS: changed or left out, every task that it moves is noticed; and a change moves some."""
    presets = module(stem).ENV_PRESETS
    for prefix, row in presets.items():
        envs = [env for env in all_tasks(stem) if env.startswith(prefix)]
        assert envs or any(env.startswith(prefix) for env in EMBEDDED), prefix
        for key, value in row.items():
            without = {k: v for k, v in row.items() if k != key}
            for other in (without, row | {key: changed(value)}):
                mutant = presets | {prefix: other}
                moved = [e for e in envs if resolved(stem, e, mutant)[key] != resolved(stem, e)[key]]
                assert all(wrong_cells(stem, env, mutant) for env in moved), (prefix, key)
                if other is not without and not overruled(presets, prefix, key, envs):
                    assert moved, (prefix, key)


def overruled(presets: dict, prefix: str, key: str, envs: list[str]) -> bool:
    """Do later rows set `key` for all these tasks?"""
    later = list(presets)[list(presets).index(prefix) + 1 :]
    return all(any(env.startswith(k) and key in presets[k] for k in later) for env in envs)


@pytest.mark.parametrize("stem", FILES)
def test_differences_exist_and_are_told(stem):
    """Each entry is met on some task, and its note is in the file's docstring."""
    used: dict = {}
    for env in all_tasks(stem):
        wrong_cells(stem, env, used=used)
    listed = {(stem, key) for key in DIFFERENCES if stem in key[0].split()}
    assert set(used) == listed
    for table in (DIFFERENCES, FROM_BACKBONE):
        for key, (_, why) in table.items():
            if stem in key[0].split():
                assert re.search(rf"\b{re.match(r'[DU][0-9]+', why)[0]}\b", module(stem).__doc__), (key, why)


@pytest.mark.parametrize("stem", BACKBONE)
def test_methods_have_their_backbones_settings(stem):
    """Class defaults and presets of every setting of the backbone, on every task; else FROM_BACKBONE says why not."""
    base, met = BACKBONE[stem], set()
    shared = {f.name for f in fields(module(base).Args)} - NOT_OF_A_PAPER - LEFT_OUT.get(stem, set())
    for env in [*(env for env in all_tasks(stem) if family(env) != "frozenlake"), *EMBEDDED]:
        theirs, ours = resolved(base, env), resolved(stem, env)
        for setting in sorted(shared):
            if ours[setting] == theirs[setting]:
                continue
            key = covering(FROM_BACKBONE, stem, env, setting)
            told = (env, setting, ours[setting], theirs[setting])
            assert key and ours[setting] == FROM_BACKBONE[key][0], told
            met.add(key)
    assert met == {k for k in FROM_BACKBONE if stem in k[0].split()}


def report() -> str:
    """Count of cells and of differences, and the differences, a line each."""
    cells, others, differing, used = 0, 0, 0, {}
    for stem in FILES:
        for env in all_tasks(stem):
            found: dict = {}
            assert not wrong_cells(stem, env, used=found)
            count = len(paper(stem, env))
            if env in TASKS[stem]:
                cells, differing = cells + count, differing + sum(map(len, found.values()))
                for key, met in found.items():
                    used.setdefault(key, []).extend(met)
            else:
                others += count
    lines = [
        f"{cells} cells, {differing} of them differ, {len({key for _, key in used})} differences: the papers' tasks of "
        f"{len(FILES)} files; {others} more cells on tasks that a paper does not have"
    ]
    for (stem, (_, tasks, setting)), met in used.items():
        ours, why = DIFFERENCES[next(k for s, k in used if s == stem and k[1:] == (tasks, setting))]
        theirs = sorted({str(value) for _, value in met})
        lines.append(
            f"  {stem}, {tasks}: {setting} {ours}, the paper {' or '.join(theirs)} ({len(met)} cells; {why})"
        )
    return "\n".join(lines)


def test_the_report_counts_every_cell():
    cells = sum(len(paper(stem, env)) for stem in FILES for env in TASKS[stem])
    assert report().startswith(f"{cells} cells, ") and cells > 5_000


if __name__ == "__main__":
    print(report())
