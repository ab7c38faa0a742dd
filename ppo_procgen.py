"""Trains a PPO policy with the IMPALA CNN on one Procgen game; evaluates, checkpoints and resumes exactly.

    python ppo_procgen.py --env-id miner                    # train; Ctrl-C saves
    python ppo_procgen.py --env-id miner --resume           # go on where it stopped, to the same weights bit for bit
    tensorboard --logdir models                             # watch

Everything of a run lies in {model_saving_dir}/{env_id}/{xpid}/; see README.md.
Exit codes: 0 done, 1 failed, 2 bad arguments, 75 stopped by a signal with everything saved.
"""

import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to continue
if __name__ == "__main__":  # until training begins there is nothing to save, and PyTorch takes seconds to load
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, lambda *_: os._exit(EXIT_STOPPED))
# OpenMP threads spin while they wait, GNU's so long by default that two runs on the same two cores did 9 steps/s each.
# With this they do 105, and one run alone is as fast as before. It is read when PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import ast
import contextlib
import csv
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import platform
import random
import re
import sys
import threading
import time
import zlib
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn
from urllib.parse import quote

import filelock
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gym_notices.notices import notices as gym_notices
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym_notices.clear()  # gym prints a notice about its own retirement at import; it is not about this script
import gym
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES


@dataclass
class Args:
    env_id: str = "coinrun"  # the game, one of the 16 of Procgen
    distribution_mode: str = "easy"  # difficulty: easy or hard (all games), extreme, memory or exploration (some games)
    num_levels: int = 200  # number of training levels; 0 means every level from start_level up
    start_level: int = 0  # first training level
    seed: int = 0  # seed of the games, the initial weights, the actions and the minibatches

    total_timesteps: int = 25_000_000  # environment steps in all, rounded down to whole iterations
    num_envs: int = 64  # number of parallel games
    num_steps: int = 256  # steps of every game in one rollout
    learning_rate: float = 5e-4  # learning rate of Adam
    anneal_lr: bool = False  # lower the learning rate linearly to zero over the run
    gamma: float = 0.999  # discount factor of the returns
    norm_reward_gamma: float = 0.99  # discount factor of the reward normaliser's returns
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 3  # epochs over every rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # clipping range of the policy ratio, and of the value if clip_vloss
    clip_vloss: bool = True  # clip the value loss too
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    adam_eps: float = 1e-5  # epsilon of Adam
    target_kl: float | None = None  # stop the epochs of an iteration once the approximate KL divergence exceeds this
    hidden_size: int = 256  # width of the layer between the convolutions and the heads
    bfloat16: bool = False  # compute all layers but the heads in bfloat16, which some CPUs do faster

    xpid: str | None = None  # name of the run; by default made of the hyperparameters and the seed
    model_saving_dir: str = "models"  # checkpoints go to {model_saving_dir}/{env_id}/{xpid}/
    resume: bool = False  # continue the run of this xpid if there is one
    checkpoint: str | None = None  # start a new run from the weights (and Adam's moments) of this checkpoint
    log_interval: int = 10  # iterations between rolling checkpoints, and between lines in a log
    archive_interval: int = 50  # iterations between archived, evaluated checkpoints; 1, 2, 4, 8, 16 and 32 are, too
    save_dataset: bool = False  # keep the whole training as a recording in the run's folder rollouts/
    num_eval_episodes: int = 10  # test episodes per evaluation, one in each of as many parallel games

    cuda: bool = True  # use the GPU if there is one
    torch_deterministic: bool = True  # ask cuDNN for deterministic kernels
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "procgen"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


# Arguments without a part in what is computed: a run's name leaves them out, and a continuation may change them.
FREE_ARGUMENTS = (
    "total_timesteps", "log_interval", "archive_interval", "num_eval_episodes", "cuda", "torch_deterministic",
    "save_dataset", "xpid", "model_saving_dir", "resume", "track", "wandb_project_name", "wandb_entity",
)  # fmt: skip
MAX_LEVEL = 2**31 - 1  # level seeds are int32


class ProcgenVectorEnv(gym.vector.VectorEnv):
    """Procgen through gym 0.26's vector interface, so that gym's wrappers, and your own, fit around it.

    Observations are (num_envs, 64, 64, 3) uint8, rewards (num_envs,) float32. The next episode follows at once: with
    `terminated` comes the first frame of the next level (the terminal frame is never rendered), and `infos` holds the
    arrays prev_level_seed and prev_level_complete of the episodes that ended. Procgen does not tell a time limit from
    another end, so `truncated` stays False. num_levels=0 means every level from start_level up.
    """

    def __init__(self, num_envs, env_id, distribution_mode, start_level, num_levels, seed):
        options = {"distribution_mode": distribution_mode, "rand_seed": seed, "num_threads": torch.get_num_threads()}
        if distribution_mode != "exploration":  # which has one level, fixed by Procgen
            # Procgen's own num_levels=0 would ignore start_level.
            options.update(start_level=start_level, num_levels=num_levels or MAX_LEVEL - start_level)
        self.games = ProcgenGym3Env(num_envs, env_id, **options)
        self.started = False
        super().__init__(num_envs, gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(15))

    def reset_wait(self, seed=None, options=None):
        if seed is not None:
            raise ValueError("Procgen seeds its games when they are made: pass the seed to ProcgenVectorEnv")
        if self.started:  # at first the games are at the first frames of their episodes by themselves
            self.games.act(np.full(self.num_envs, -1))  # Procgen's forced reset
        self.started = True
        return self.games.observe()[1]["rgb"], {}

    def step_async(self, actions):
        self.started = True
        self.games.act(actions)

    def step_wait(self):
        rewards, frames, first = self.games.observe()
        infos = {}
        if first.any():  # get_info is slow
            game_infos = self.games.get_info()
            for key, dtype in (("prev_level_seed", int), ("prev_level_complete", bool)):
                infos[key] = np.array([info[key] for info in game_infos], dtype=dtype)
        return frames["rgb"], rewards, first, np.zeros_like(first), infos

    def get_state(self):
        """States of the games, their level range and mode included, as num_envs uint8 tensors."""
        return [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.games.get_state()]

    def set_state(self, states):
        """Continue from get_state()'s return value. Returns the observations there."""
        self.games.set_state([state.numpy().tobytes() for state in states])
        return self.games.observe()[1]["rgb"]


def make_envs(args: Args) -> gym.Env:
    """The games to train on. A wrapper of your own goes below RecordGames, which keeps what the games were given.

    Its attributes are saved and restored with those of the others.
    """
    levels = (args.distribution_mode, args.start_level, args.num_levels)
    envs = ProcgenVectorEnv(args.num_envs, args.env_id, *levels, args.seed)
    if args.save_dataset:
        envs = RecordGames(envs)
    envs = gym.wrappers.RecordEpisodeStatistics(envs)  # of the raw rewards
    # Divide rewards by the standard deviation of returns. baselines, train-procgen and gen_dgrl discount these by 0.99,
    # whatever PPO's gamma is; with 0.999 (as in CleanRL) frequent rewards are scaled down more.
    envs = gym.wrappers.NormalizeReward(envs, gamma=args.norm_reward_gamma)
    return gym.wrappers.TransformReward(envs, lambda reward: np.clip(reward, -10, 10))


def make_test_envs(args: Args) -> ProcgenVectorEnv:
    """The levels above the training range, all of them. With num_levels=0 there are none, and the two are the same."""
    first_level = args.start_level + args.num_levels
    return ProcgenVectorEnv(args.num_eval_episodes, args.env_id, args.distribution_mode, first_level, 0, args.seed)


def layer_init(layer, std):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(in_channels, out_channels):
    """A 3x3 convolution with Glorot-uniform weights and zero biases, as in train-procgen and gen_dgrl.

    PyTorch's own initial weights have a third of that variance in the 32-channel layers: the features of any two frames
    are then nearly the same at first.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = conv3x3(channels, channels)
        self.conv1 = conv3x3(channels, channels)

    def forward(self, x):
        return x + self.conv1(F.relu_(self.conv0(F.relu(x))))


class ConvSequence(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels)
        self.res_block0 = ResidualBlock(out_channels)
        self.res_block1 = ResidualBlock(out_channels)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x), kernel_size=3, stride=2, padding=1)
        return self.res_block1(self.res_block0(x))


class Agent(nn.Module):
    """Actor-critic on the IMPALA CNN (Espeholt et al. 2018, figure 3): 64x64 RGB frames to 15 logits and a value.

    It reads args.hidden_size and args.bfloat16. With bfloat16, all layers but the heads compute in it; weights,
    gradients and outputs stay float32.
    """

    def __init__(self, args):
        super().__init__()
        self.bfloat16 = args.bfloat16
        self.network = nn.Sequential(
            ConvSequence(3, 16),
            ConvSequence(16, 32),
            ConvSequence(32, 32),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            layer_init(nn.Linear(32 * 8 * 8, args.hidden_size), std=2**0.5),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)
        self.actor = layer_init(nn.Linear(args.hidden_size, 15), std=0.01)
        self.critic = layer_init(nn.Linear(args.hidden_size, 1), std=1.0)

    def forward(self, x):
        """(N, 64, 64, 3) uint8 frames to (N, 15) logits and (N,) values."""
        x = x.permute(0, 3, 1, 2) / 255.0  # already channels_last in memory
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            hidden = self.network(x)
        hidden = hidden.float()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)

    def get_value(self, x):
        return self(x)[1]

    def get_action_and_value(self, x, action=None):
        """Action (sampled unless given), its log-probability, the policy's entropy and the value, each (N,)."""
        logits, value = self(x)
        policy = Categorical(logits=logits, validate_args=False)
        if action is None:
            action = policy.sample()
        return action, policy.log_prob(action), policy.entropy(), value


def compute_gae(rewards, values, dones, next_value, next_done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

    rewards, values, dones are (num_steps, num_envs); next_value, next_done (num_envs,). dones[t] tells that frame t is
    the first of an episode: nothing flows back across it. Returns advantages and returns, each (num_steps, num_envs).
    """
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        continues = 1.0 - next_done.float()
        delta = rewards[t] + gamma * continues * next_value - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * continues * advantage
        next_value, next_done = values[t], dones[t]
    return advantages, advantages + values


LOSSES = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")


def ppo_loss(agent, obs, actions, logprobs, returns, values, advantages, args):
    """PPO's loss (Schulman et al. 2017, equation 9), a mean over N samples, and its parts, (6,), in LOSSES' order.

    obs is (N, 64, 64, 3) uint8, the others (N,); logprobs and values come from the policy that acted.
    """
    _, new_logprobs, entropy, new_values = agent.get_action_and_value(obs, actions)
    logratio = new_logprobs - logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()

    error = (new_values - returns) ** 2
    if args.clip_vloss:  # a value that has already moved by clip_coef gains nothing by moving on
        clipped_values = values + (new_values - values).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max(error, (clipped_values - returns) ** 2)
    value_loss = 0.5 * error.mean()

    entropy = entropy.mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    with torch.no_grad():  # two estimates of the KL divergence, http://joschu.net/blog/kl-approx.html
        approx_kl = ((ratio - 1) - logratio).mean()
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
        parts = torch.stack([policy_loss, value_loss, entropy, -logratio.mean(), approx_kl, clipfrac])
    return loss, parts


@torch.inference_mode()
def evaluate(agent, envs, start_states, seed, device):
    """Play an episode in each of envs with sampled actions. Returns returns, lengths, level_complete, each (num_envs,).

    One in each, because the first N to end would be the short ones. From the same start_states and with a random
    generator of its own it meets the same levels and the same luck every time, and takes nothing from the training.
    """
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs)
    level_complete, playing = np.zeros(envs.num_envs, dtype=bool), np.ones(envs.num_envs, dtype=bool)
    obs = envs.set_state(start_states)
    agent.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while playing.any():
            stop_if_asked()
            action = agent.get_action_and_value(torch.from_numpy(obs).to(device))[0]
            obs, reward, terminated, _, infos = envs.step(action.cpu().numpy())
            returns += reward * playing
            lengths += playing
            if terminated.any():
                level_complete |= playing & terminated & infos["prev_level_complete"]
                playing &= ~terminated
    agent.train()
    return returns, lengths, level_complete


def train(args: Args) -> None:
    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches
    num_iterations = args.total_timesteps // batch_size
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    # ROLLOUT STORAGE. What the network reads is on its device; what the games give is copied there once a rollout.
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, 64, 64, 3), dtype=torch.uint8, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs, values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    rewards, dones = np.zeros(shape, np.float32), np.zeros(shape, bool)

    agent = Agent(args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps)
    envs, test_envs = make_envs(args), make_test_envs(args)
    test_start = test_envs.get_state()
    chunk_size = frames_per_backward(device)

    # STATE: all that an exact continuation needs, named once; it is saved and restored from here. What your loop hands
    # from one iteration to the next belongs into carry, and is used as carry.name.
    carry = SimpleNamespace(
        next_obs=torch.from_numpy(envs.reset()[0]).to(device),
        next_done=np.zeros(args.num_envs, bool),
        level_complete=deque(maxlen=100),  # beside return_queue and length_queue of RecordEpisodeStatistics
        latest_test_return=math.nan,
    )
    state = {"model_state_dict": agent, "optimizer_state_dict": optimizer, "envs": envs, "carry": carry}
    state["random_generators"] = RandomGenerators(device)

    test = None  # returns, lengths and level_complete of the iteration's test episodes, if there were any
    with Run(args, state, num_iterations, device) as run:
        for iteration in range(run.iteration + 1, num_iterations + 1):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate

            # ROLLOUT
            run.bar.set_description("rollout")
            for step in range(args.num_steps):
                stop_if_asked()
                obs[step], dones[step] = carry.next_obs, carry.next_done
                with torch.inference_mode():
                    actions[step], logprobs[step], _, values[step] = agent.get_action_and_value(carry.next_obs)
                next_frames, rewards[step], terminated, _, infos = envs.step(actions[step].cpu().numpy())
                carry.next_obs, carry.next_done = torch.from_numpy(next_frames).to(device), np.array(terminated)
                if "episode" in infos:
                    carry.level_complete.extend(infos["prev_level_complete"][infos["_episode"]].tolist())
                run.bar.update(args.num_envs)
            if args.save_dataset:
                run.record(envs.take_steps(), logprobs)

            # ADVANTAGES
            with torch.inference_mode():
                next_value = agent.get_value(carry.next_obs)
            ends = torch.from_numpy(dones).to(device), next_value, torch.from_numpy(carry.next_done).to(device)
            gae = compute_gae(torch.from_numpy(rewards).to(device), values, *ends, args.gamma, args.gae_lambda)
            b_advantages, b_returns = (x.flatten() for x in gae)
            b_values = values.flatten()
            batch = (obs.flatten(0, 1), actions.flatten(), logprobs.flatten(), b_returns, b_values)

            # UPDATE. Nothing waits for the device, but for target_kl; the losses' sums are read once, at the end.
            loss_sums, updates = torch.zeros(len(LOSSES) + 1, device=device), 0
            for epoch in range(args.update_epochs):
                run.bar.set_description(f"update {epoch + 1}/{args.update_epochs}")
                for minibatch in torch.randperm(batch_size, device=device).split(minibatch_size):
                    advantages = b_advantages[minibatch]
                    if args.norm_adv:
                        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                    mb_losses = torch.zeros(len(LOSSES), device=device)
                    optimizer.zero_grad()
                    for chunk, chunk_advantages in zip(minibatch.split(chunk_size), advantages.split(chunk_size)):
                        stop_if_asked()
                        loss, parts = ppo_loss(agent, *(x[chunk] for x in batch), chunk_advantages, args)
                        share = len(chunk) / minibatch_size
                        (loss * share).backward()
                        mb_losses += parts * share
                    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    loss_sums += torch.cat([mb_losses, grad_norm[None]])
                    updates += 1
                if args.target_kl is not None and mb_losses[LOSSES.index("approx_kl")] > args.target_kl:
                    break
            losses = dict(zip((*LOSSES, "grad_norm"), (loss_sums / updates).tolist()))
            with torch.inference_mode():  # what the last step of the optimizer has done to the weights, no loss tells
                _, *outputs = agent.get_action_and_value(carry.next_obs, actions[-1])
            if not all(map(math.isfinite, losses.values())) or not all(x.isfinite().all() for x in outputs):
                fail(f"training diverged in iteration {iteration}; try a smaller --learning-rate. Losses: {losses}")
            losses["explained_variance"] = (1 - (b_returns - b_values).var() / b_returns.var()).item()

            # EVALUATION
            test = None
            if run.archives(iteration) or iteration == num_iterations:
                run.bar.set_description("evaluate")
                test = evaluate(agent, test_envs, test_start, args.seed, device)
                carry.latest_test_return = float(test[0].mean())
            run.end_iteration(collect_metrics(envs, carry, optimizer, losses, test))

        test = test or evaluate(agent, test_envs, test_start, args.seed, device)
        run.finish(float(test[0].mean()))


def collect_metrics(envs, carry, optimizer, losses, test) -> dict:
    """The row of an iteration in progress.csv and TensorBoard; nan stands for what was not measured.

    charts/episodic_return, episodic_length and level_complete are means over the last 100 training episodes, with raw
    rewards; charts/test_* over the test episodes. The losses are means over the iteration's minibatches: old_approx_kl
    and approx_kl estimate the KL divergence from the policy that acted to the new one, clipfrac is the share of ratios
    outside the clipping range, grad_norm the norm before clipping; explained_variance is the share of the returns'
    variance that the values before the update explain. Run adds charts/SPS, environment steps a second since the start.
    """

    def mean(values):
        return float(np.mean(values, dtype=float)) if len(values) else math.nan

    test_returns, test_lengths, test_complete = test or ((), (), ())
    return {
        "charts/learning_rate": optimizer.param_groups[0]["lr"],
        "charts/episodic_return": mean(envs.return_queue),
        "charts/episodic_length": mean(envs.length_queue),
        "charts/level_complete": mean(carry.level_complete),
        "charts/test_return": mean(test_returns),
        "charts/test_length": mean(test_lengths),
        "charts/test_level_complete": mean(test_complete),
        **{f"losses/{name}": value for name, value in losses.items()},
    }


# ======================================================================================================================
# No fork needs to change anything below: arguments, signals, saving and restoring, files.
# ======================================================================================================================

SCRIPT = Path(__file__).name
ALGORITHM = Path(__file__).stem.removesuffix("_procgen")  # a copy under another name is another algorithm
SOURCE = Path(__file__).read_bytes()
LOCK_PATIENCE = 600  # seconds
# The games that have more modes than easy and hard. Asked for any other, Procgen's library ends the whole process.
EXTRA_MODES = {
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
    "exploration": ("caveflyer", "climber", "coinrun", "heist", "jumper", "leaper", "maze", "ninja"),
}


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; code 2 is for arguments, 1 for the rest."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    sys.exit(code)


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def default_xpid(args: Args) -> str:
    """The name of a run. There is no clock in it: the same arguments name the same run."""
    # What precedes each value. The algorithm has none.
    parts = {"env_id": "", "distribution_mode": "-", "num_levels": "-", "": f"-{ALGORITHM}", "learning_rate": "-lr"}
    parts |= {"update_epochs": "-epoch", "num_minibatches": "-mb", "vf_coef": "-v", "ent_coef": "-ha"}
    unnamed = (*parts, *FREE_ARGUMENTS, "seed")
    values, defaults = {"": "", **asdict(args)}, {field.name: field.default for field in fields(args)}
    parts |= {name: f"-{name}" for name in values if name not in unnamed and values[name] != defaults[name]}
    words = [f"{part}{values[name]}" for name, part in parts.items() if name in values]
    return quote("".join(words) + f"_{args.seed}", safe="+")


def check_args(args: Args) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right."""

    def require(condition, name, wanted):
        if not condition:
            fail(f"{flag(name)} is {getattr(args, name)!r}; it must be {wanted}", 2)

    require(args.env_id in ENV_NAMES, "env_id", f"one of {', '.join(ENV_NAMES)}")
    modes = ["easy", "hard"] + [mode for mode, games in EXTRA_MODES.items() if args.env_id in games]
    require(args.distribution_mode in modes, "distribution_mode", f"one of {', '.join(modes)} for {args.env_id}")
    for names, holds, wanted in (
        ("num_envs num_steps hidden_size num_eval_episodes", lambda x: 1 <= x <= 2**16, "between 1 and 65536"),
        ("num_minibatches update_epochs total_timesteps log_interval archive_interval", lambda x: x >= 1, "at least 1"),
        ("learning_rate adam_eps clip_coef max_grad_norm", lambda x: 0 < x < math.inf, "a number above 0"),
        ("ent_coef vf_coef", lambda x: 0 <= x < math.inf, "a number of 0 or more"),
        ("gamma gae_lambda norm_reward_gamma", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("target_kl", lambda x: x is None or 0 < x < math.inf, "a number above 0, or left out"),
        ("seed start_level num_levels", lambda x: 0 <= x < MAX_LEVEL, f"between 0 and {MAX_LEVEL - 1}"),
        ("checkpoint", lambda x: x != "", "a file, or left out"),
    ):
        for name in names.split():
            if hasattr(args, name):  # a fork may do without
                require(holds(getattr(args, name)), name, wanted)
    most_levels = MAX_LEVEL - 1 - args.start_level  # one is left to test on
    require(args.num_levels <= most_levels, "num_levels", f"at most {most_levels} with this --start-level")
    batch = args.num_envs * args.num_steps
    minibatches = getattr(args, "num_minibatches", 1)
    require(batch % minibatches == 0, "num_minibatches", f"a divisor of num_envs * num_steps = {batch}")
    if getattr(args, "norm_adv", False):  # a single advantage has no standard deviation
        require(batch > minibatches, "num_minibatches", f"at most {batch // 2}, or --no-norm-adv given")
    require(args.total_timesteps >= batch, "total_timesteps", f"at least one iteration, num_envs * num_steps = {batch}")
    plain = args.xpid not in ("", "..") and args.xpid == Path(args.xpid).name and args.xpid.isprintable()
    require(plain and len(args.xpid.encode()) <= 200, "xpid", "a plain folder name of at most 200 bytes")
    if getattr(args, "bfloat16", False) and not has_bfloat16(args):
        fail("--bfloat16 needs a CPU with avx512_bf16 or amx_bf16, or a GPU; it is slower here, so leave it out", 2)
    # A folder wandb/, which that package makes, is found as well, but has no origin.
    if args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:
        fail("--track needs the package wandb, which is not installed: pip install wandb, or leave --track out", 2)


def keep_large_blocks() -> None:
    """Tell glibc's malloc to keep freed memory (other C libraries are left alone).

    By itself it hands every large activation back to the kernel and faults it in again at the next use, which takes as
    long as the arithmetic.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, mmap_threshold, trim_threshold = ctypes.CDLL(None).mallopt, -3, -1  # malloc.h
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # older versions refuse more than 32 MB
        mallopt(trim_threshold, 2**31 - 1)


def frames_per_backward(device: torch.device) -> int:
    """How many frames go through a backward pass at once: a minibatch's gradient is summed over chunks of so many.

    On a CPU 64 and 128 are the fastest of 16 to 256, with AVX2 and AVX-512, on one core and on two, as the activations
    stay in the cache. On a GPU it is what fits: a frame takes some 1.2 MB, and 2 MB leave room. A power of two, so that
    a little more or less free memory after a restart does not change the last bits of the sums.
    """
    if device.type == "cpu":
        return 64
    free_memory, _ = torch.cuda.mem_get_info(device)
    return 2 ** int(math.log2(max(free_memory / 2e6, 1)))


def has_bfloat16(args: Args) -> bool:
    """Whether the run's device computes in bfloat16 by itself. Taken for granted of a GPU."""
    cpu = torch.cpu.get_capabilities()
    return args.cuda and torch.cuda.is_available() or cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


class Stopped(Exception):
    """One of STOP_SIGNALS came."""


signals_received = []


def stop_if_asked() -> None:
    """Raise Stopped after a signal. Called where it is safe: before each step of the games and each backward pass."""
    if signals_received:
        raise Stopped(signal.Signals(signals_received[0]).name)


def ignore_signals() -> None:
    """Once all is saved: while Python ends, it has no handlers any more, and a signal would change the exit code."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)


# STATE


class RandomGenerators:
    """Those of Python, numpy and PyTorch."""

    def __init__(self, device):
        self.device = device

    def get_state(self):
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        return state | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def set_state(self, state):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and "cuda" in state:  # it is not there if the run comes from a CPU
            torch.cuda.set_rng_state(state["cuda"], self.device)


def attributes(x) -> dict:
    """What is saved of an object, a wrapper among them: not its functions, what it was given, or when it was made."""
    given = (gym.Space, Args, torch.device)
    kept = {name: value for name, value in vars(x).items() if name != "t0" and not isinstance(value, given)}
    return {name: value for name, value in kept.items() if not inspect.isroutine(value)}


def freeze(x, name="", device=None):
    """A copy of x in tensors and plain values, which torch.load reads with weights_only=True.

    The tensors stay where they are unless a device is named, so that nothing waits for a GPU.
    """
    if isinstance(x, torch.Tensor):
        return x.detach().to(device or x.device, copy=True)
    if isinstance(x, (np.ndarray, np.generic)):
        return {"numpy": torch.from_numpy(np.array(x))}
    if isinstance(x, np.random.Generator):
        return {"generator": freeze(x.bit_generator.state, name, device)}
    if isinstance(x, dict):
        keys = [key.item() if isinstance(key, np.generic) else key for key in x]
        parts = [part for key in keys for part in (key if isinstance(key, tuple) else (key,))]
        if odd := {type(part).__name__ for part in parts} - {"str", "int", "float", "bool"}:
            raise TypeError(f"state{name} has keys of type {odd.pop()}, which cannot be saved: use text or numbers")
        return {key: freeze(value, f"{name}.{key}", device) for key, value in zip(keys, x.values())}
    if isinstance(x, (list, tuple, deque)):
        return (tuple if isinstance(x, tuple) else list)(freeze(value, name, device) for value in x)
    for get in ("state_dict", "get_state"):
        if hasattr(type(x), get):
            return freeze(getattr(x, get)(), name, device)
    if isinstance(x, SimpleNamespace) or (hasattr(x, "__dict__") and type(x).__reduce__ is object.__reduce__):
        return freeze(attributes(x), name, device)
    if not isinstance(x, (bool, int, float, str, type(None))):
        raise TypeError(f"state{name} is a {type(x).__name__}, which cannot be saved: give it get_state and set_state")
    return x


def thaw(saved, x=None, name=""):
    """What freeze() was given. If x is an object, it takes the state over; if it is a tensor, its device is kept."""
    if isinstance(x, torch.Tensor):
        if not x.requires_grad:
            return saved.to(x.device)
        x.data.copy_(saved)  # an optimizer may hold it
        return x
    if isinstance(saved, dict) and saved.keys() == {"numpy"}:
        return saved["numpy"].numpy()[()]
    if isinstance(x, np.random.Generator):
        x.bit_generator.state = thaw(saved["generator"])
        return x
    for put in ("load_state_dict", "set_state"):
        if hasattr(type(x), put):
            getattr(x, put)(thaw(saved))
            return x
    if isinstance(saved, (list, tuple)):  # what x has in the same places is restored in its own way
        before = list(x) if isinstance(x, (list, tuple, deque)) and len(x) == len(saved) else [None] * len(saved)
        values = [thaw(value, old, f"{name}[{i}]") for i, (value, old) in enumerate(zip(saved, before))]
        return deque(values, x.maxlen) if isinstance(x, deque) else type(saved)(values)
    if isinstance(x, dict):
        values = {key: thaw(value, x.get(key), f"{name}.{key}") for key, value in saved.items()}
        x.clear(), x.update(values)
        return x
    if hasattr(x, "__dict__"):
        mine = attributes(x)
        for key in mine.keys() ^ saved.keys():
            raise KeyError(f"{name}.{key} is known to {'this script' if key in mine else 'the checkpoint'} only")
        for key, value in mine.items():
            setattr(x, key, thaw(saved[key], value, f"{name}.{key}"))
        return x
    return {key: thaw(value) for key, value in saved.items()} if isinstance(saved, dict) else saved


# FILES


def write_file(path: Path, content: bytes) -> None:
    """Replace a file at one stroke: at any instant, killed or not, there is the whole old or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = path  # a failed write does not say of which file
        temporary.unlink(missing_ok=True)
        raise


def write_checkpoint(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(freeze(state, device="cpu"), buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code in it. Exits with code 1 if it is missing, damaged or foreign."""
    types = {"args": dict, "versions": dict, "script": str, "script_sha256": str, "iteration": int}
    types |= {"model_state_dict": dict}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != 1 or any(not isinstance(state[name], wanted) for name, wanted in types.items()):
            raise ValueError(f"it has format {state['format']}, or its {', '.join(types)} are of the wrong types")
    except Exception as error:  # torch.load raises whatever it stumbles over
        fail(f"checkpoint {path} is missing, damaged or none of these scripts ({one_line(error)})")
    return state


def describe_machine(device: torch.device) -> dict:
    """What the last bits of a result depend on, beside source and versions."""
    if device.type == "cuda":
        return {"device": "cuda", "model": torch.cuda.get_device_name(device)}
    names = [line.partition(": ")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    model = f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": "cpu", "model": model, "threads": torch.get_num_threads()}


def agent_sha256(source: bytes) -> str:
    """Hash of the text of class Agent in a script and of everything the script defines that Agent refers to.

    Args is left out, so that its defaults may change.
    """
    text, definitions = source.decode(), {}
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            definitions.update({name.id: statement for name in statement.targets if isinstance(name, ast.Name)})
    definitions.pop("Args", None)
    needed = ["Agent"]
    for name in needed:  # grows on the way
        for node in ast.walk(definitions[name]):
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in needed:
                needed.append(node.id)
    segments = [ast.get_source_segment(text, definitions[name]) for name in needed]
    return hashlib.sha256("\n".join(segments).encode()).hexdigest()


def describe_script() -> dict:
    """Identity of this source, of its networks, and of the packages under it."""
    procgen = importlib.metadata.packages_distributions()["procgen"][0]  # procgen or procgen-mirror
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    versions["procgen"] = f"{procgen} {importlib.metadata.version(procgen)}"
    hashes = {"script_sha256": hashlib.sha256(SOURCE).hexdigest(), "agent_sha256": agent_sha256(SOURCE)}
    return {"script": SCRIPT, **hashes, "versions": versions}


def differences(then: dict, now: dict) -> str:
    """What differs between two dicts, in words."""
    pairs = {name: (then.get(name, "absent"), now.get(name, "absent")) for name in then | now}
    return ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in pairs.items() if old != new)


class RecordGames(gym.Wrapper):
    """Keeps what the games were given and what they gave, with a checksum of the frames in place of the frames."""

    def __init__(self, envs):
        super().__init__(envs)
        self.steps = []

    def get_state(self):  # as if it were not there, so that a run may go on without it
        return freeze(self.env)

    def set_state(self, state):
        thaw(state, self.env)

    def step(self, actions):
        checksum = zlib.crc32(self.unwrapped.games.observe()[1]["rgb"])
        frames, rewards, terminated, *more = self.env.step(actions)
        self.steps.append((actions.astype(np.uint8), rewards.copy(), terminated.copy(), np.uint32(checksum)))
        return frames, rewards, terminated, *more

    def take_steps(self) -> dict:
        """The steps since the last call: actions, rewards, dones, each (T, num_envs), and checksums (T,)."""
        columns, self.steps = zip(*self.steps), []
        return dict(zip(("actions", "rewards", "dones", "checksums"), map(np.stack, columns)))


class Run:
    """A run on disk: its lock, where it goes on, its checkpoints, curves and lines, and what ends it early.

    `with Run(...) as run:` goes around the loop. run.iteration is the number of iterations completed.
    """

    def __init__(self, args: Args, state: dict, num_iterations: int, device: torch.device):
        self.args, self.state, self.num_iterations, self.device = args, state, num_iterations, device
        self.batch_size = args.num_envs * args.num_steps
        self.folder = Path(args.model_saving_dir) / args.env_id / args.xpid
        self.rolling, self.table = self.folder / "rolling" / "model.pt", self.folder / "progress.csv"
        self.recording = self.folder / "rollouts"
        self.iteration, self.rows = 0, []
        self.rollout, self.recorded = [], []  # of the iteration under way; of those completed and not yet saved
        self.header = {"format": 1, "args": asdict(args), **describe_script(), "xpid": args.xpid}

    def __enter__(self):
        """Lock the run, and decide here and only here whether it is new, goes on or is finished."""
        if self.args.checkpoint is not None and not self.rolling.exists():
            self.take_weights()  # before the rest, so that nothing has been written if it fails
        self.lock()
        resumed = None
        if self.args.resume and self.rolling.exists():
            resumed = load_checkpoint(self.rolling)
            self.check_resumed(resumed)
            self.go_on_from(resumed)
        elif self.table.exists() or any(self.folder.glob("*/*.pt")):
            way_out = f"put {self.rolling} back, which is missing," if self.args.resume else "continue it with --resume"
            fail(f"{self.folder} holds a run already; {way_out} or choose another --xpid", 2)
        if self.args.save_dataset:
            self.open_recording()
        if self.args.track:
            self.track()
        self.begin(resumed)
        for stop_signal in STOP_SIGNALS:
            signal.signal(stop_signal, lambda signum, _: signals_received.append(signum))
        return self

    def take_weights(self) -> None:
        """Begin with another run's weights and, if they are in the file, Adam's moments.

        The learning rate and Adam's epsilon are those of the arguments.
        """
        start, names = load_checkpoint(Path(self.args.checkpoint)), ["model_state_dict"]
        settings = self.state["optimizer_state_dict"].state_dict()
        if "optimizer_state_dict" in start:
            start["optimizer_state_dict"]["param_groups"] = settings["param_groups"]
            names.append("optimizer_state_dict")
        else:
            print(f"note: {self.args.checkpoint} holds weights only, so Adam begins afresh")
        self.restore(start, names, self.args.checkpoint)

    def restore(self, saved: dict, names: list, path: str | Path) -> None:
        try:
            for name in names:
                thaw(saved[name], self.state[name], name)
        except Exception as error:  # depends on what is in the file
            fail(f"{path} does not fit this script: {one_line(error)}; put back one that does or begin another --xpid")

    def lock(self) -> None:
        """Hold the run until this process ends, however it ends. On a cluster, whoever holds it may be about to end."""
        (self.folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        self.held, on_cluster = filelock.FileLock(self.folder / ".lock"), "SLURM_JOB_ID" in os.environ
        patience = LOCK_PATIENCE if on_cluster else 1  # sweep.py may be asking whether the run is in use
        try:
            self.held.acquire(timeout=patience)
        except filelock.Timeout:
            in_use = f"{self.folder} is in use by another process, {patience} s long"
            fail(f"{in_use}; wait for it to end or choose another --xpid", EXIT_STOPPED if on_cluster else 1)
        for leftover in (*self.folder.glob(".*.tmp"), *self.folder.glob("*/.*.tmp")):  # of a write that was killed
            leftover.unlink(missing_ok=True)

    def check_resumed(self, saved: dict) -> None:
        """Exit with code 2 if this would compute something else than the run did; tell if only the last bits differ."""
        if saved["script"] != SCRIPT:
            fail(f"{self.folder} is a run of {saved['script']}, not of {SCRIPT}; choose another --xpid", 2)
        free = set(FREE_ARGUMENTS) & saved["args"].keys() & self.header["args"].keys()
        if getattr(self.args, "anneal_lr", False):  # the learning rate is annealed towards the end
            free.discard("total_timesteps")
        now = self.header["args"]
        then = {key: x for key, x in now.items() if x in (False, None)} | saved["args"]  # a switch newer than the run
        then, now = ({flag(key): x for key, x in y.items() if key not in free} for y in (then, now))
        if changes := differences(then, now):
            way_out = "repeat them or choose another --xpid"
            fail(f"--resume cannot change the arguments of {self.folder} ({changes}); {way_out}", 2)

        machine = describe_machine(self.device)
        was = saved.get("machine", machine)
        if was["device"] == "cuda" and self.args.cuda and self.device.type == "cpu":
            fail(f"{self.folder} was on a GPU ({was['model']}), and there is none; --no-cuda goes on without one", 2)
        then = {"the source": saved["script_sha256"][:8], **saved["versions"], **was}
        now = {"the source": self.header["script_sha256"][:8], **self.header["versions"], **machine}
        if changes := differences(then, now):
            print(f"note: from here on the run is not bit for bit what it would have been: {changes}")

    def go_on_from(self, saved: dict) -> None:
        """Restore the state, and cut off what a process that was killed has written beyond it."""
        self.iteration = saved["iteration"]
        finals = self.find_evaluated("final", "model_")
        if self.iteration >= self.num_iterations and finals:
            print(f"{self.folder} is finished after iteration {self.iteration}; to train on, raise --total-timesteps")
            sys.exit(0)
        self.restore(saved, list(self.state), self.rolling)
        for path in finals:  # a longer run has another end
            path.replace(self.folder / "checkpoint" / path.name.replace("_", f"_{self.iteration}_"))
        if self.table.exists():
            with open(self.table, newline="", errors="replace") as file:
                rows = [row for row in csv.DictReader(file) if str(row.get("iteration")).isdecimal()]
            self.rows = [row for row in rows if int(row["iteration"]) <= self.iteration]
            self.write_table()

    def begin(self, resumed: dict | None) -> None:
        """Write what a run has from its start, and open its curves."""
        self.keep(resumed["test_return"] if resumed else None)
        self.save()
        if resumed and resumed["script_sha256"] != self.header["script_sha256"]:
            write_file(self.folder / f"{Path(SCRIPT).stem}_after_{self.iteration}.py", SOURCE)
        elif not (self.folder / SCRIPT).exists():
            write_file(self.folder / SCRIPT, SOURCE)
        step, total = self.iteration * self.batch_size, self.num_iterations * self.batch_size
        # TensorBoard writes in a thread of its own, whose errors come up here as well, at the next flush.
        hook = threading.excepthook
        threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else hook(error)
        # What a process that was killed has logged beyond the step that is resumed, TensorBoard is told to drop.
        self.writer = SummaryWriter(self.folder, purge_step=step + 1 if resumed else 0)
        if not resumed:
            table = "\n".join(f"|{name}|{value}|" for name, value in asdict(self.args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        self.writer.flush()
        size = sum(p.numel() for p in self.state["model_state_dict"].parameters())
        print("device      ", ", ".join(f"{name} {value}" for name, value in describe_machine(self.device).items()))
        print(f"run folder   {self.folder}" + (f", resumed after iteration {self.iteration}" if resumed else ""))
        print(f"steps        {total:,} ({self.num_iterations} iterations of {self.batch_size:,})")
        print(f"parameters   {size:,}", flush=True)
        bar = {"total": total, "initial": step, "unit": " steps", "unit_scale": True, "smoothing": 0}
        self.bar = tqdm(**bar, disable=None)  # on a terminal only
        self.start_time, self.start_step = time.time(), step

    def track(self) -> None:
        """Open Weights & Biases: one run there for each game and xpid."""
        import wandb

        name = f"{self.args.env_id}/{self.args.xpid}"
        run = {"id": hashlib.sha256(name.encode()).hexdigest()[:16], "name": self.args.xpid, "group": self.args.env_id}
        run |= {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "config": asdict(self.args)}
        try:
            wandb.init(**run, resume="allow", sync_tensorboard=True, save_code=True)
        except wandb.Error as error:
            fail(f"--track failed: {one_line(error)}")

    def archives(self, iteration: int) -> bool:
        """Whether an iteration is archived; some early ones are, too, as half of all that is learnt is learnt early."""
        return iteration % self.args.archive_interval == 0 or iteration in (1, 2, 4, 8, 16, 32)

    def record(self, steps: dict, logprobs: torch.Tensor) -> None:
        """Keep a rollout for the recording: take_steps()' and the log-probabilities, (num_steps, num_envs)."""
        if len(steps["actions"]) != len(logprobs):
            raise ValueError("the games took other steps than the policy: --save-dataset does not fit this wrapper")
        self.rollout = [{**steps, "log_probs": logprobs.cpu().numpy().copy()}]

    def end_iteration(self, metrics: dict) -> None:
        """Log an iteration and keep its state in memory; archive and save it when it is time to."""
        self.iteration += 1
        step = self.iteration * self.batch_size
        speed = (step - self.start_step) / (time.time() - self.start_time)
        self.rows.append({"iteration": self.iteration, "global_step": step, "charts/SPS": speed, **metrics})
        for tag, value in {"charts/SPS": speed, **metrics}.items():
            if not math.isnan(value):
                self.writer.add_scalar(tag, value, step)
        self.writer.flush()
        self.write_table()
        test_return = metrics["charts/test_return"]
        self.keep(None if math.isnan(test_return) else test_return)
        self.recorded += self.rollout
        if self.archives(self.iteration):
            self.write_evaluated("checkpoint", f"model_{self.iteration}_", test_return)
        latest = self.state["carry"].latest_test_return
        returns = f"train return {metrics['charts/episodic_return']:.2f}, test return {latest:.2f}"
        self.bar.set_postfix_str(returns)
        if self.iteration % self.args.log_interval == 0 or self.iteration == self.num_iterations:
            self.save()
            left = tqdm.format_interval((self.num_iterations - self.iteration) * self.batch_size / speed)
            done = f"iteration {self.iteration}/{self.num_iterations}, {step:,} steps, {speed:.0f} steps/s"
            self.bar.write(f"{done}, {left} left, {returns}")
            sys.stdout.flush()

    def finish(self, test_return: float) -> None:
        if self.args.save_dataset:  # first, as with its final checkpoint a run is finished
            self.describe_recording(complete=True)
        path = self.write_evaluated("final", "model_", test_return)
        ignore_signals()
        self.bar.close()
        self.writer.close()
        self.held.release()
        print(f"done: {path}, mean return {test_return:.2f} in {self.args.num_eval_episodes} test episodes")

    def __exit__(self, kind, error, _):
        """Whatever ends the run early: save the last complete iteration first."""
        if kind is None:
            return
        self.bar.close()
        if kind is not Stopped:
            with contextlib.suppress(OSError):  # the error that is under way comes first
                self.save()
            return
        self.save()
        saved = f"saved after iteration {self.iteration}; the same command with --resume continues"
        print(f"stopped by {error}, {saved}", flush=True)
        ignore_signals()
        sys.exit(EXIT_STOPPED)

    def keep(self, test_return: float | None) -> None:
        """Copy the state of a completed iteration: what save() writes, now or when something ends the run."""
        counts = {"iteration": self.iteration, "global_step": self.iteration * self.batch_size}
        self.header |= {**counts, "test_return": test_return}
        self.snapshot = {**self.header, "machine": describe_machine(self.device), **freeze(self.state)}

    def save(self) -> None:
        if self.recorded:
            chunk = {name: np.concatenate([part[name] for part in self.recorded]) for name in self.recorded[0]}
            first_step = self.snapshot["iteration"] * self.args.num_steps - len(chunk["actions"])
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **chunk)
            write_file(self.recording / f"0_{first_step:08d}.npz", buffer.getvalue())
            self.recorded = []
        write_checkpoint(self.rolling, self.snapshot)

    def write_table(self) -> None:
        columns = dict.fromkeys(name for row in self.rows for name in row)  # a changed source may have others
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.table, text.getvalue().encode())

    def find_evaluated(self, folder: str, prefix: str) -> list:
        """Checkpoints {prefix}{test return}.pt; whatever else is in the folder is the user's."""
        name = re.compile(prefix + r"-?\d+\.\d\d\.pt")
        return [path for path in self.folder.glob(f"{folder}/*") if name.fullmatch(path.name)]

    def write_evaluated(self, folder: str, prefix: str, test_return: float) -> Path:
        """Write {prefix}{test return}.pt, then remove the one it replaces, whose name may have another return."""
        keys = (*self.header, "model_state_dict", "optimizer_state_dict")
        path = self.folder / folder / f"{prefix}{round(test_return, 2) + 0.0:.2f}.pt"  # + 0.0 turns -0.0 into 0.0
        write_checkpoint(path, {**{key: self.snapshot[key] for key in keys}, "test_return": test_return})
        for other in set(self.find_evaluated(folder, prefix)) - {path}:
            other.unlink()
        return path

    def open_recording(self) -> None:
        """Drop what was recorded beyond the resumed iteration. Exits with code 2 if there is a gap before it."""
        recorded = 0
        for path in sorted(self.recording.glob("0_*.npz")):
            first_step = int(path.stem[2:])
            if first_step >= self.iteration * self.args.num_steps:
                path.unlink()
            else:
                with np.load(path) as chunk:
                    recorded = first_step + len(chunk["checksums"])
        if recorded != self.iteration * self.args.num_steps:
            fail(f"{self.recording} lacks steps before iteration {self.iteration + 1}; --no-save-dataset goes on", 2)
        self.describe_recording(complete=False)

    def describe_recording(self, complete: bool) -> None:
        levels = ("env_id", "distribution_mode", "num_levels", "start_level")
        segment = {"seed": self.args.seed, "num_envs": self.args.num_envs}
        metadata = {"format": 2, **{name: getattr(self.args, name) for name in levels}}
        metadata |= {key: self.header[key] for key in ("args", "xpid", "script", "script_sha256", "versions")}
        if complete:
            sha256 = hashlib.sha256()
            for path in sorted(self.recording.glob("0_*.npz")):
                with np.load(path) as chunk:
                    sha256.update(chunk["log_probs"].tobytes())
            segment["rows"] = self.iteration * self.args.num_steps
            metadata["log_probs_sha256"] = sha256.hexdigest()
        metadata |= {"segments": [segment], "complete": complete}
        write_file(self.recording / "metadata.json", json.dumps(metadata, indent=2).encode())


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    args.xpid = default_xpid(args) if args.xpid is None else args.xpid
    check_args(args)
    keep_large_blocks()
    try:
        train(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail("whoever read the output has gone; the same command with --resume continues")
    except OSError as error:
        if ".so" in str(error):  # Procgen loads shared libraries when its games are made
            packages = "libgl1 and libglib2.0-0 (libglib2.0-0t64 on newer systems)"
            fail(f"Procgen misses a library of the system ({error}); on Debian or Ubuntu install {packages}")
        fail(f"{error.filename or args.model_saving_dir} could not be used: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(out of|enough|allocate) memory", str(error)):
            raise
        fail(f"there is not enough memory ({one_line(error)}); lower --num-envs, --num-steps or --hidden-size")


if __name__ == "__main__":
    main()
