"""Trains a PPO policy with the IMPALA CNN on one Procgen game; evaluates, checkpoints and resumes exactly.

    python ppo_procgen.py --env-id miner                    # train; Ctrl-C saves
    python ppo_procgen.py --env-id miner --resume           # continue where it stopped, to the same weights bit for bit
    tensorboard --logdir models                             # watch

Everything of a run lies in {model_saving_dir}/{env_id}/{xpid}/; see README.md.
Exit codes: 0 done, 1 failed, 2 bad arguments, 75 stopped by a signal with everything saved.
"""

import os

# Idle OpenMP threads busy-wait. With GNU's default, two runs sharing two cores made 9 steps/s each; with this, 105.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when PyTorch is loaded

import ast
import contextlib
import csv
import ctypes
import errno
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import pickle
import platform
import random
import re
import signal
import sys
import time
import zipfile
import zlib
from collections import defaultdict, deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path
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
    seed: int = 0  # seed of the environments, the initial weights, the actions and the minibatches

    total_timesteps: int = 25_000_000  # environment steps in all, rounded down to whole iterations
    num_envs: int = 64  # number of parallel environments
    num_steps: int = 256  # steps of every environment in one rollout
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
    log_interval: int = 10  # save the rolling checkpoint and print a line every so many iterations
    archive_interval: int = 50  # evaluate and archive every so many iterations, and after 1, 2, 4, 8, 16 and 32
    save_dataset: bool = False  # record the whole training in the run's folder rollouts/
    num_eval_episodes: int = 10  # number of test environments; each plays one episode per evaluation

    cuda: bool = True  # use the GPU if there is one
    torch_deterministic: bool = True  # ask cuDNN for deterministic kernels
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "procgen"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


# Arguments that do not affect the result: they are not in the run's name and may change on --resume. There are two
# exceptions: with anneal_lr, total_timesteps may not change; save_dataset can be switched off but not on.
FREE_ARGUMENTS = (
    "total_timesteps", "log_interval", "archive_interval", "num_eval_episodes", "cuda", "torch_deterministic",
    "save_dataset", "xpid", "model_saving_dir", "resume", "track", "wandb_project_name", "wandb_entity",
)  # fmt: skip


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

    rewards, values, dones are (num_steps, num_envs); next_value, next_done (num_envs,). dones[t] is True if frame t
    starts an episode: nothing flows back across it. Returns advantages and returns, each (num_steps, num_envs).
    """
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        continues = 1.0 - next_done.float()
        delta = rewards[t] + gamma * continues * next_value - values[t]
        advantage = delta + gamma * gae_lambda * continues * advantage
        advantages[t] = advantage
        next_value, next_done = values[t], dones[t]
    return advantages, advantages + values


def ppo_loss(agent, obs, actions, logprobs, returns, values, advantages, args):
    """PPO's loss (Schulman et al. 2017, equation 9), a mean over N samples, and a dict of its terms, each a tensor ().

    obs is (N, 64, 64, 3) uint8, the others (N,); logprobs and values come from the policy that acted. A term that you
    add to the dict is logged as losses/{name}.
    """
    _, new_logprobs, entropy, new_values = agent.get_action_and_value(obs, actions)
    logratio = new_logprobs - logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()

    error = (new_values - returns) ** 2
    if args.clip_vloss:  # a value that has already moved by clip_coef gains nothing by moving further
        clipped_values = values + (new_values - values).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max(error, (clipped_values - returns) ** 2)
    value_loss = 0.5 * error.mean()

    entropy = entropy.mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    with torch.no_grad():
        # old_approx_kl and approx_kl estimate the KL divergence as in http://joschu.net/blog/kl-approx.html.
        terms = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "old_approx_kl": (-logratio).mean(),
            "approx_kl": ((ratio - 1) - logratio).mean(),
            "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        }
    return loss, terms


def make_envs(args: Args) -> gym.Env:
    """The training environments.

    A wrapper of your own goes after Recorder and needs state_dict and load_state_dict, so that a run resumes exactly.
    One that changes frames must be repeated in make_test_envs and in collect_procgen.py.
    """
    levels = (args.distribution_mode, args.start_level, args.num_levels)
    envs = ProcgenVectorEnv(args.num_envs, args.env_id, *levels, args.seed)
    if args.save_dataset:
        envs = Recorder(envs)
    envs = gym.wrappers.RecordEpisodeStatistics(envs)  # of the raw rewards
    # Divide rewards by the standard deviation of returns. baselines, train-procgen and gen_dgrl discount these by 0.99,
    # whatever PPO's gamma is; with 0.999 (as in CleanRL) frequent rewards are scaled down more.
    envs = gym.wrappers.NormalizeReward(envs, gamma=args.norm_reward_gamma)
    return gym.wrappers.TransformReward(envs, lambda reward: np.clip(reward, -10, 10))


def make_test_envs(args: Args) -> gym.Env:
    """All levels above the training range. With num_levels=0 there are none; the training levels are used then."""
    first_level = args.start_level + args.num_levels
    return ProcgenVectorEnv(args.num_eval_episodes, args.env_id, args.distribution_mode, first_level, 0, args.seed)


class TrainState:
    """Everything that an exact continuation needs. What your fork carries from one iteration to the next belongs here.

    Add a line to each of the three functions, and write state.my_thing where you use it: a local alias goes stale when
    the attribute is replaced. state_dict returns tensors and plain Python values only, which torch.load reads with
    weights_only=True. A module's own state_dict holds only its parameters and buffers; save any other attribute here.
    """

    def __init__(self, args: Args, device: torch.device):
        self.device = device
        self.agent = Agent(args).to(device)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=args.learning_rate, eps=args.adam_eps)
        self.envs = make_envs(args)
        self.next_obs = torch.from_numpy(self.envs.reset()[0]).to(device)
        self.next_done = torch.zeros(args.num_envs, dtype=torch.bool, device=device)
        self.level_complete = deque(maxlen=100)  # like return_queue and length_queue of RecordEpisodeStatistics
        self.test_return = math.nan  # of the latest evaluation

    def state_dict(self) -> dict:
        envs = self.envs
        return {
            "model_state_dict": self.agent.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "environments": envs.unwrapped.get_state(),
            "next_done": self.next_done,
            "discounted_returns": torch.from_numpy(envs.returns),  # of NormalizeReward, like return_rms
            "return_rms": [float(envs.return_rms.mean), float(envs.return_rms.var), float(envs.return_rms.count)],
            "episode_returns": torch.from_numpy(envs.episode_returns),  # of the unfinished episodes
            "episode_lengths": torch.from_numpy(envs.episode_lengths),
            "last_returns": [float(x) for x in envs.return_queue],
            "last_lengths": [int(x) for x in envs.length_queue],
            "last_level_complete": list(self.level_complete),
            "last_test_return": self.test_return,
            "own_wrappers": [wrapper.state_dict() for wrapper in own_wrappers(envs)],
            "random_generators": get_random_state(self.device),
        }

    def load_state_dict(self, saved: dict) -> None:
        envs = self.envs
        self.agent.load_state_dict(saved["model_state_dict"])
        self.optimizer.load_state_dict(saved["optimizer_state_dict"])
        self.next_obs = torch.from_numpy(envs.unwrapped.set_state(saved["environments"])).to(self.device)
        self.next_done = saved["next_done"].to(self.device)
        envs.returns[:] = saved["discounted_returns"].numpy()
        envs.return_rms.mean, envs.return_rms.var, envs.return_rms.count = saved["return_rms"]
        envs.episode_returns[:] = saved["episode_returns"].numpy()
        envs.episode_lengths[:] = saved["episode_lengths"].numpy()
        envs.return_queue.extend(saved["last_returns"])
        envs.length_queue.extend(saved["last_lengths"])
        self.level_complete.extend(saved["last_level_complete"])
        self.test_return = saved["last_test_return"]
        for wrapper, wrapper_state in zip(own_wrappers(envs), saved["own_wrappers"], strict=True):
            wrapper.load_state_dict(wrapper_state)
        set_random_state(saved["random_generators"], self.device)


@torch.inference_mode()
def evaluate(agent, envs, start_states, seed, device) -> dict:
    """Play an episode in each of envs with sampled actions.

    Returns a dict of arrays (num_envs,): returns, lengths, level_complete. Each environment plays one episode, because
    the first N to end would be the short ones. start_states and seed are the same every time, so that evaluations are
    comparable. The random generators of the training stay as they were.
    """
    returns = np.zeros(envs.num_envs)
    lengths = np.zeros(envs.num_envs)
    level_complete = np.zeros(envs.num_envs, dtype=bool)
    playing = np.ones(envs.num_envs, dtype=bool)
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
    return {"returns": returns, "lengths": lengths, "level_complete": level_complete}


def check_finite(iteration: int, losses: dict, state: TrainState) -> None:
    """Exit with code 1 if the losses of an iteration, or the outputs of the new weights, are not finite."""
    with torch.inference_mode():  # the losses were computed before the last optimizer step, so check its effect as well
        logits, values = state.agent(state.next_obs)
    finite = logits.isfinite().all() and values.isfinite().all()
    if not finite or not all(math.isfinite(value) for value in losses.values()):
        fail(f"training diverged in iteration {iteration}; try a smaller --learning-rate. Losses: {losses}")


def train(args: Args) -> None:
    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches
    num_iterations = args.total_timesteps // batch_size
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = choose_device(args)
    microbatch_size = choose_microbatch_size(device)

    # ROLLOUT STORAGE
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, 64, 64, 3), dtype=torch.uint8, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs = torch.zeros(shape, device=device)
    values = torch.zeros(shape, device=device)
    rewards = torch.zeros(shape, device=device)
    dones = torch.zeros(shape, dtype=torch.bool, device=device)

    state = TrainState(args, device)
    agent, optimizer, envs = state.agent, state.optimizer, state.envs  # all three are changed in place
    test_envs = make_test_envs(args)
    test_start = test_envs.get_state()

    test = None
    with Run(args, state, num_iterations) as run:
        for iteration in range(run.iteration + 1, num_iterations + 1):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate

            # ROLLOUT
            for step in range(args.num_steps):
                stop_if_asked()
                obs[step] = state.next_obs
                dones[step] = state.next_done
                with torch.inference_mode():
                    actions[step], logprobs[step], _, values[step] = agent.get_action_and_value(state.next_obs)
                next_obs, reward, terminated, _, infos = envs.step(actions[step].cpu().numpy())
                state.next_obs = torch.from_numpy(next_obs).to(device)
                state.next_done = torch.from_numpy(np.array(terminated)).to(device)  # gym returns a list
                rewards[step] = torch.from_numpy(reward)
                if "episode" in infos:
                    state.level_complete.extend(infos["prev_level_complete"][infos["_episode"]].tolist())
                run.count_steps(args.num_envs)

            # ADVANTAGES
            with torch.inference_mode():
                next_value = agent.get_value(state.next_obs)
            advantages, returns = compute_gae(
                rewards, values, dones, next_value, state.next_done, args.gamma, args.gae_lambda
            )
            b_obs = obs.flatten(0, 1)
            b_actions = actions.flatten()
            b_logprobs = logprobs.flatten()
            b_values = values.flatten()
            b_returns = returns.flatten()
            b_advantages = advantages.flatten()

            # UPDATE. The losses are summed on the device and read once, as reading them would wait for the GPU.
            loss_sums = defaultdict(float)
            num_updates = 0
            for epoch in range(args.update_epochs):
                run.describe(f"update {epoch + 1}/{args.update_epochs}")
                for minibatch in torch.randperm(batch_size, device=device).split(minibatch_size):
                    mb_advantages = b_advantages[minibatch]
                    if args.norm_adv:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    mb_losses = defaultdict(float)
                    optimizer.zero_grad()
                    # Gradient accumulation over microbatches; exact, as ppo_loss is a mean over its samples.
                    for mb, mb_adv in zip(minibatch.split(microbatch_size), mb_advantages.split(microbatch_size)):
                        stop_if_asked()
                        loss, terms = ppo_loss(
                            agent, b_obs[mb], b_actions[mb], b_logprobs[mb], b_returns[mb], b_values[mb], mb_adv, args
                        )
                        weight = len(mb) / minibatch_size
                        (loss * weight).backward()
                        for name, term in terms.items():
                            mb_losses[name] += term * weight
                    mb_losses["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                    for name, value in mb_losses.items():
                        loss_sums[name] += value
                    num_updates += 1
                if args.target_kl is not None and mb_losses["approx_kl"] > args.target_kl:
                    break
            losses = {name: (total / num_updates).item() for name, total in loss_sums.items()}
            check_finite(iteration, losses, state)
            losses["explained_variance"] = (1 - (b_returns - b_values).var() / b_returns.var()).item()

            # EVALUATION
            test = None
            if run.archives(iteration) or iteration == num_iterations:
                with run.evaluation():
                    test = evaluate(agent, test_envs, test_start, args.seed, device)
                state.test_return = float(test["returns"].mean())
            run.end_iteration(collect_metrics(state, losses, test), logprobs)

        # test is None if the run was resumed after its last iteration.
        run.finish(test or evaluate(agent, test_envs, test_start, args.seed, device))


def collect_metrics(state: TrainState, losses: dict, test: dict | None) -> dict:
    """The row of an iteration in progress.csv and TensorBoard; nan stands for what was not measured.

    charts/episodic_return, episodic_length and level_complete are means over the last 100 training episodes, with raw
    rewards; charts/test_* over the test episodes. The losses are means over the iteration's minibatches: old_approx_kl
    and approx_kl estimate the KL divergence from the policy that acted to the new one, clipfrac is the fraction of
    ratios outside the clipping range, grad_norm the norm before clipping; explained_variance is the fraction of the
    returns' variance that the values before the update explain. Run adds charts/SPS, steps a second without evaluation.
    """

    def mean(values):
        return float(np.mean(values, dtype=float)) if len(values) else math.nan

    if test is None:
        test = {"returns": [], "lengths": [], "level_complete": []}
    return {
        "charts/learning_rate": state.optimizer.param_groups[0]["lr"],
        "charts/episodic_return": mean(state.envs.return_queue),
        "charts/episodic_length": mean(state.envs.length_queue),
        "charts/level_complete": mean(state.level_complete),
        "charts/test_return": mean(test["returns"]),
        "charts/test_length": mean(test["lengths"]),
        "charts/test_level_complete": mean(test["level_complete"]),
        **{f"losses/{name}": value for name, value in losses.items()},
    }


# ======================================================================================================================
# No fork needs to change anything below: environments, arguments, devices, signals, files, checkpoints, resuming.
# ======================================================================================================================

SCRIPT = Path(__file__).name
ALGORITHM = Path(__file__).stem.removesuffix("_procgen")  # a copy under another name is another algorithm
SOURCE = Path(__file__).read_bytes()
EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to continue
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
LOCK_PATIENCE = 600  # seconds, on a cluster
MAX_LEVEL = 2**31 - 1  # level seeds are int32
SHORT_NAMES = {  # in run names, as in gen_dgrl's
    "learning_rate": "lr", "update_epochs": "epoch", "num_minibatches": "mb", "vf_coef": "v", "ent_coef": "ha",
}  # fmt: skip
GEN_DGRL_FLAGS = {
    "--env-name": "--env-id", "--num-env-steps": "--total-timesteps", "--num-processes": "--num-envs",
    "--ppo-epoch": "--update-epochs", "--num-mini-batch": "--num-minibatches", "--clip-param": "--clip-coef",
    "--entropy-coef": "--ent-coef", "--value-loss-coef": "--vf-coef", "--lr": "--learning-rate",
    "--eps": "--adam-eps", "--checkpoint-path": "--checkpoint", "--log-wandb": "--track",
}  # fmt: skip
# The games that have more modes than easy and hard. With any other game, Procgen aborts the process.
EXTRA_MODES = {
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
    "exploration": ("caveflyer", "climber", "coinrun", "heist", "jumper", "leaper", "maze", "ninja"),
}


class ProcgenVectorEnv(gym.vector.VectorEnv):
    """Procgen through gym 0.26's vector interface, so that gym's wrappers, and your own, fit around it.

    Observations are (num_envs, 64, 64, 3) uint8, rewards (num_envs,) float32. The next episode follows at once: with
    `terminated` comes the first frame of the next level (the terminal frame is never rendered), and `infos` holds the
    arrays prev_level_seed and prev_level_complete of the episodes that ended. Procgen does not tell a time limit from
    another end, so `truncated` stays False. num_levels=0 means every level from start_level up.
    """

    def __init__(self, num_envs, env_id, distribution_mode, start_level, num_levels, seed):
        options = {"distribution_mode": distribution_mode, "rand_seed": seed, "num_threads": torch.get_num_threads()}
        if distribution_mode != "exploration":  # Procgen fixes the one level of exploration
            # Procgen's own num_levels=0 would ignore start_level.
            options.update(start_level=start_level, num_levels=num_levels or MAX_LEVEL - start_level)
        self.games = ProcgenGym3Env(num_envs, env_id, **options)
        super().__init__(num_envs, gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(15))

    def reset_wait(self, seed=None, options=None):
        """The first observations. There is no other reset: an episode is followed by the next one."""
        if seed is not None:
            raise ValueError("Procgen seeds its environments when they are made: pass the seed to ProcgenVectorEnv")
        return self.games.observe()[1]["rgb"], {}

    def step_async(self, actions):
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
        """States of the environments, their level range and mode included, as num_envs uint8 tensors."""
        return [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.games.get_state()]

    def set_state(self, states):
        """Continue from get_state()'s return value. Returns the observations there."""
        self.games.set_state([state.numpy().tobytes() for state in states])
        return self.games.observe()[1]["rgb"]


class Recorder(gym.Wrapper):
    """Records what the environments were given and what they returned, with a checksum in place of the frames."""

    def __init__(self, envs):
        super().__init__(envs)
        self.rows = []

    def step(self, actions):
        checksum = zlib.crc32(self.unwrapped.games.observe()[1]["rgb"])
        frames, rewards, terminated, truncated, infos = self.env.step(actions)
        row = {"actions": actions.astype(np.uint8), "rewards": rewards.copy(), "dones": terminated.copy()}
        self.rows.append({**row, "checksums": np.uint32(checksum)})
        return frames, rewards, terminated, truncated, infos

    def take_rows(self, logprobs: torch.Tensor) -> dict:
        """The steps since the last call: arrays (T, num_envs), checksums (T,). logprobs are those of the policy."""
        if len(self.rows) != len(logprobs):
            fail("a wrapper repeats or skips steps, which can't be recorded; train without --save-dataset")
        taken = {"log_probs": logprobs.cpu().numpy().copy()}
        for name in self.rows[0]:
            taken[name] = np.stack([row[name] for row in self.rows])
        self.rows = []
        return taken


def own_wrappers(envs: gym.Env) -> list:
    """The wrappers that a fork has added to make_envs. Exits with code 1 if the state of one can't be saved."""
    known = (Recorder, gym.wrappers.RecordEpisodeStatistics, gym.wrappers.NormalizeReward, gym.wrappers.TransformReward)
    wrappers = []
    while not isinstance(envs, ProcgenVectorEnv):
        if type(envs) not in known:
            wrappers.append(envs)
            for method in ("state_dict", "load_state_dict"):
                if not hasattr(type(envs), method):
                    fail(f"the wrapper {type(envs).__name__} has no {method}(); a run needs it to resume exactly")
        envs = envs.env
    return wrappers


# MESSAGES


def fail(message: str, code: int = 1) -> NoReturn:
    """Exit with one line on stderr; code 2 is for arguments, 1 for the rest."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    sys.exit(code)


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def describe_changes(before: dict, now: dict) -> str:
    """In words, what differs between two dicts; empty if nothing does."""
    changes = []
    for name in before | now:
        old = before.get(name, "absent")
        new = now.get(name, "absent")
        if old != new:
            changes.append(f"{name} was {old}, is {new}")
    return ", ".join(changes)


# ARGUMENTS


def parse_args() -> Args:
    """The command line as Args, checked. Exits with code 2 and one line if something is wrong with it."""
    words = sys.argv[1:]
    for place, word in enumerate(words):
        name = word.partition("=")[0].replace("_", "-")
        if name in GEN_DGRL_FLAGS:
            fail(f"{name} is gen_dgrl's name of an argument; here it is {GEN_DGRL_FLAGS[name]}", 2)
        if name == "--checkpoint":
            files = list(itertools.takewhile(lambda later: not later.startswith("-"), words[place + 1 :]))
            if len(files) > 1:
                fail(f"--checkpoint takes one file; yours matched {len(files)}: {' '.join(files)[:200]}", 2)
    args = tyro.cli(Args, description=__doc__, args=spell_out(words))
    for field in fields(args):
        if field.type is float:  # a default of 0 and the argument 0.0 name the same run
            setattr(args, field.name, float(getattr(args, field.name)))
    if args.xpid is None:
        args.xpid = default_xpid(args)
    check_args(args)
    return args


def spell_out(words: list) -> list:
    """The command line with whole numbers such as 1e6 written as 1000000, as argument parsers demand."""
    whole_numbers = [flag(field.name) for field in fields(Args) if field.type in (int, int | None)]
    spelled_out = []
    before = ""
    for word in words:
        name, equals, number = word.rpartition("=")
        argument = name if equals else before
        if argument.replace("_", "-") in whole_numbers and re.fullmatch(r"\d+(\.\d+)?[eE]\d+", number):
            if float(number).is_integer():
                word = f"{name}{equals}{float(number):.0f}"
        spelled_out.append(word)
        before = word
    return spelled_out


def default_xpid(args: Args) -> str:
    """The name of a run. There is no clock in it: the same arguments name the same run."""
    words = [args.env_id, args.distribution_mode, str(args.num_levels), ALGORITHM]
    for name, short_name in SHORT_NAMES.items():
        if hasattr(args, name):  # a fork may drop arguments
            words.append(f"{short_name}{getattr(args, name)}")
    in_every_name = ("env_id", "distribution_mode", "num_levels", "seed", *SHORT_NAMES)
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in in_every_name or field.name in FREE_ARGUMENTS or value == field.default:
            continue
        if field.name == "checkpoint":
            content_hash = hashlib.sha256(read_checkpoint(Path(value))).hexdigest()
            value = f"{Path(value).stem[:40]}-{content_hash[:8]}"
        words.append(f"{field.name}{value}")
    return quote("-".join(words) + f"_{args.seed}", safe="+")


def check_args(args: Args) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right."""

    def require(condition, name, wanted):
        if not condition:
            fail(f"{flag(name)} is {getattr(args, name)!r}; it must be {wanted}", 2)

    def require_each(names, is_valid, wanted):
        for name in names.split():
            if hasattr(args, name):  # a fork may drop arguments
                require(is_valid(getattr(args, name)), name, wanted)

    require(args.env_id in ENV_NAMES, "env_id", f"one of {', '.join(ENV_NAMES)}")
    modes = ["easy", "hard"] + [mode for mode, games in EXTRA_MODES.items() if args.env_id in games]
    require(args.distribution_mode in modes, "distribution_mode", f"one of {', '.join(modes)} for {args.env_id}")
    counts = "num_minibatches update_epochs total_timesteps log_interval archive_interval"
    require_each("num_envs num_steps hidden_size num_eval_episodes", lambda x: 1 <= x <= 2**16, "between 1 and 65536")
    require_each(counts, lambda x: x >= 1, "at least 1")
    require_each("learning_rate adam_eps clip_coef max_grad_norm", lambda x: 0 < x < math.inf, "a number above 0")
    require_each("ent_coef vf_coef", lambda x: 0 <= x < math.inf, "a number of 0 or more")
    require_each("gamma norm_reward_gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1")
    require_each("target_kl", lambda x: x is None or 0 < x < math.inf, "a number above 0, or left out")
    require_each("seed start_level num_levels", lambda x: 0 <= x < MAX_LEVEL, f"between 0 and {MAX_LEVEL - 1}")
    most_levels = MAX_LEVEL - 1 - args.start_level  # one is left to test on
    require(args.num_levels <= most_levels, "num_levels", f"at most {most_levels} with this --start-level")
    batch_size = args.num_envs * args.num_steps
    num_minibatches = getattr(args, "num_minibatches", 1)
    if getattr(args, "norm_adv", False):  # a single advantage has no standard deviation
        require(batch_size > 1, "num_steps", "more than 1 with one environment, or --no-norm-adv given")
        wanted = f"at most {batch_size // 2} for batches of {batch_size}, or --no-norm-adv given"
        require(batch_size > num_minibatches, "num_minibatches", wanted)
    divisor = f"a divisor of num_envs * num_steps = {batch_size}"
    require(batch_size % num_minibatches == 0, "num_minibatches", divisor)
    one_iteration = f"at least one iteration, num_envs * num_steps = {batch_size}"
    require(args.total_timesteps >= batch_size, "total_timesteps", one_iteration)
    is_folder_name = args.xpid not in ("", "..") and args.xpid == Path(args.xpid).name and args.xpid.isprintable()
    is_short = len(args.xpid.encode(errors="replace")) <= 200
    require(is_folder_name and is_short, "xpid", "a plain folder name of at most 200 bytes")
    if getattr(args, "bfloat16", False) and choose_device(args).type == "cpu":
        cpu = torch.cpu.get_capabilities()
        if not cpu.get("avx512_bf16") and not cpu.get("amx_bf16"):
            way_out = "a new run can do without it, one begun with it needs such a machine"
            fail(f"--bfloat16 needs a GPU, or a CPU with avx512_bf16 or amx_bf16, and there is none; {way_out}", 2)
    wandb = importlib.util.find_spec("wandb")
    if args.track and (wandb is None or wandb.origin is None):  # a mere folder wandb/ is found, too, without an origin
        fail("--track needs the package wandb, which is not installed: pip install wandb, or leave --track out", 2)


# DEVICES AND SPEED


def choose_device(args: Args) -> torch.device:
    """A GPU if there is one. Exits with code 2 on a cluster that has given the job a GPU that PyTorch can't use."""
    if args.cuda and torch.cuda.is_available():
        return torch.device("cuda")
    gpus = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if args.cuda and "SLURM_JOB_ID" in os.environ and gpus not in ("", "-1", "NoDevFiles"):
        fail(f"this Slurm job has GPU {gpus}, but PyTorch can use none; --no-cuda trains on the CPU", 2)
    return torch.device("cpu")


def choose_microbatch_size(device: torch.device) -> int:
    """How many frames go through the network at once in the update. The last bits of the result depend on it.

    On a CPU 64 and 128 are the fastest of 16 to 256, as their activations stay in the cache. On a GPU 1,024 frames take
    about 1.2 GB; one with less than 4 GB gets fewer. Total memory decides, because other processes change free memory.
    """
    if device.type == "cpu":
        return 64
    total_memory = torch.cuda.mem_get_info(device)[1]
    return min(1024, 2 ** int(math.log2(total_memory / 4e6)))


def describe_machine(device: torch.device) -> dict:
    """What the last bits of a result depend on, apart from the source and the versions."""
    if device.type == "cuda":
        return {
            "device": "cuda",
            "model": torch.cuda.get_device_name(device),
            "microbatch": choose_microbatch_size(device),
            "deterministic": torch.backends.cudnn.deterministic,
            "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        }
    model = platform.machine()
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"device": "cpu", "model": f"{model} {instructions}", "threads": torch.get_num_threads()}


def keep_large_blocks() -> None:
    """Tell glibc's malloc to keep freed memory instead of returning it to the kernel.

    Otherwise large activations are page-faulted in again at their next use: 4 to 6 times as many faults, and an
    iteration on two threads took a fifth to a half more of the CPU's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mmap_threshold, trim_threshold = -3, -1  # their numbers in malloc.h
    if not mallopt(mmap_threshold, 2**30):
        mallopt(mmap_threshold, 2**25)  # older versions refuse more than 32 MB
    mallopt(trim_threshold, 2**31 - 1)


# SIGNALS


class Stopped(Exception):
    """One of STOP_SIGNALS was received."""


signals_received = []


def handle_signals() -> None:
    """From now on a signal ends the run where its state can be saved."""
    for stop_signal in STOP_SIGNALS:
        if stop_signal == signal.SIGHUP and signal.getsignal(stop_signal) == signal.SIG_IGN:
            continue  # nohup
        signal.signal(stop_signal, lambda signum, _: signals_received.append(signum))


def stop_if_asked() -> None:
    """Raise Stopped after a signal. Called before every environment step and every backward pass."""
    if signals_received:
        raise Stopped(signal.Signals(signals_received[0]).name)


# FILES AND CHECKPOINTS


def write_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: whenever the process is killed, the old or the new file is there, and whole."""
    temporary = path.with_name(f".{path.name}.tmp")  # one that a killed process leaves behind is removed by Run.lock
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = path  # the error of a failed write lacks it
        temporary.unlink(missing_ok=True)
        raise


def copy_to_host(x):
    """A copy of nested dicts, lists and tuples, in which all tensors are in the host's memory."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: copy_to_host(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(copy_to_host(value) for value in x)
    return x


def pack_checkpoint(state: dict) -> bytes:
    """Exits with code 1 if the state holds more than tensors and plain Python values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError:
        types = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
        fail(f"a checkpoint can't hold {types}; TrainState.state_dict may have tensors and plain Python values only")
    return content


def read_checkpoint(path: Path) -> bytes:
    if os.path.isdir(path):
        fail(f"--checkpoint {path} is a folder; a checkpoint is a file such as final/model_*.pt in it", 2)
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"checkpoint {path} cannot be read: {error.strerror}")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code in it. Exits with code 1 if it is missing, damaged or foreign."""
    content = read_checkpoint(path)
    try:
        damaged_member = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load checks no checksums
        if damaged_member is not None:
            raise ValueError(f"the checksum of {damaged_member} is wrong")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state["format"] != 1:
            raise ValueError(f"its format is {state['format']}, not 1")
    except Exception as error:  # zipfile and torch.load raise errors of many kinds
        fail(f"checkpoint {path} is damaged, or not written by these scripts ({one_line(error)})")
    return state


def get_random_state(device: torch.device) -> dict:
    name, key, *more = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, key.tolist(), *more),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict, device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:  # it is None if the run comes from a CPU
        torch.cuda.set_rng_state(state["cuda"], device)


def agent_sha256(source: bytes) -> str:
    """Hash of the text of class Agent in a script and of all definitions there that Agent uses, directly or not.

    Args is left out, so that its defaults may change.
    """
    text = source.decode()
    definitions = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            definitions.update({name.id: statement for name in statement.targets if isinstance(name, ast.Name)})
    definitions.pop("Args", None)
    needed = ["Agent"]
    for name in needed:  # the list grows as it is read
        for node in ast.walk(definitions[name]):
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in needed:
                needed.append(node.id)
    segments = [ast.get_source_segment(text, definitions[name]) for name in needed]
    return hashlib.sha256("\n".join(segments).encode()).hexdigest()


def describe_script() -> dict:
    """Identity of this source, of its network, and of the packages under it."""
    procgen = importlib.metadata.packages_distributions()["procgen"][0]  # procgen or procgen-mirror
    return {
        "script": SCRIPT,
        "script_sha256": hashlib.sha256(SOURCE).hexdigest(),
        "agent_sha256": agent_sha256(SOURCE),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "procgen": f"{procgen} {importlib.metadata.version(procgen)}",
        },
    }


class Run:
    """Owns a run's folder: locks it, begins or resumes the run, logs, checkpoints, and saves if it ends early.

    `with Run(...) as run:` goes around the loop. run.iteration is the number of iterations completed. run.snapshot is
    the state after the last complete one, and the only one that save() writes.
    """

    def __init__(self, args: Args, state: TrainState, num_iterations: int):
        self.args = args
        self.state = state
        self.num_iterations = num_iterations
        self.batch_size = args.num_envs * args.num_steps
        self.folder = Path(args.model_saving_dir) / args.env_id / args.xpid
        self.rolling_path = self.folder / "rolling" / "model.pt"
        self.table_path = self.folder / "progress.csv"
        self.recording = self.folder / "rollouts"
        self.machine = describe_machine(state.device)
        self.header = {"format": 1, "args": asdict(args), **describe_script(), "xpid": args.xpid}
        self.iteration = 0
        self.columns = []  # of progress.csv
        self.unsaved_rollouts = []  # of the recording, one dict per completed iteration
        self.steps_of_iteration = 0  # environment steps of the iteration that is not completed yet

    # BEGINNING

    def __enter__(self):
        """Lock the run, decide whether it is new, resumed or finished, and save the state that it starts from."""
        pack_checkpoint(self.take_snapshot(None))  # first, so that nothing has been written if it can't be saved
        if self.args.checkpoint is not None and not self.rolling_path.exists():
            self.load_weights()
        self.lock()
        saved = None
        if self.args.resume and self.rolling_path.exists():
            saved = load_checkpoint(self.rolling_path)
            self.check_arguments(saved)
            self.resume(saved)
        elif self.table_path.exists() or any(self.folder.glob("*/*.pt")):
            if self.args.resume:
                fail(f"put back {self.rolling_path}, which is missing, or choose another --xpid", 2)
            fail(f"{self.folder} holds a run already; add --resume, or choose another --xpid", 2)
        if self.args.save_dataset:
            self.open_recording()
        if self.args.track:
            self.track()
        self.snapshot = self.take_snapshot(saved["test_return"] if saved else None)
        self.save()
        self.open_logs(saved)
        handle_signals()
        return self

    def load_weights(self) -> None:
        """Start from another run's weights and, if they are in the file, Adam's moments.

        The learning rate and Adam's epsilon are those of the arguments.
        """
        saved = load_checkpoint(Path(self.args.checkpoint))
        with self.explain_misfit(self.args.checkpoint):
            self.state.agent.load_state_dict(saved["model_state_dict"])
            if "optimizer_state_dict" in saved:
                settings = self.state.optimizer.state_dict()["param_groups"]
                moments = saved["optimizer_state_dict"]["state"]
                self.state.optimizer.load_state_dict({"state": moments, "param_groups": settings})
            else:
                print(f"note: {self.args.checkpoint} holds weights only, so Adam begins afresh")

    @contextlib.contextmanager
    def explain_misfit(self, path):
        try:
            yield
        except Exception as error:  # depends on what is in the file
            fail(f"{path} does not fit this script: {one_line(error)}; put back one that does or begin another --xpid")

    def lock(self) -> None:
        """Lock the run for the lifetime of this process."""
        on_cluster = "SLURM_JOB_ID" in os.environ  # where the previous holder may still be exiting
        patience = LOCK_PATIENCE if on_cluster else 1  # a second, as sweep.py --action status holds it for a moment
        (self.folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        self.file_lock = filelock.FileLock(self.folder / ".lock", fallback_to_soft=False)
        try:
            self.file_lock.acquire(timeout=patience)
        except filelock.Timeout:
            in_use = f"{self.folder} has been in use by another process for {patience} s"
            fail(f"{in_use}; wait for it to end or choose another --xpid", EXIT_STOPPED if on_cluster else 1)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            way_out = "choose a --model-saving-dir on another file system"
            fail(f"{self.file_lock.lock_file} cannot be locked, as its file system does not support flock; {way_out}")
        for leftover in (*self.folder.glob(".*.tmp"), *self.folder.glob("*/.*.tmp")):  # of a write that was killed
            leftover.unlink(missing_ok=True)

    def check_arguments(self, saved: dict) -> None:
        """Exit with code 2 if the arguments would change the result. Print a note if only the last bits may differ."""
        if saved["script"] != SCRIPT:
            fail(f"{self.folder} is a run of {saved['script']}, not of {SCRIPT}; choose another --xpid", 2)
        may_change = set(FREE_ARGUMENTS)
        if getattr(self.args, "anneal_lr", False):  # the learning rate is annealed towards the end
            may_change.discard("total_timesteps")
        before = {flag(name): value for name, value in saved["args"].items() if name not in may_change}
        now = {flag(name): value for name, value in self.header["args"].items() if name not in may_change}
        changes = describe_changes(before, now)
        if changes:
            way_out = "repeat them or choose another --xpid"
            fail(f"--resume cannot change the arguments of {self.folder} ({changes}); {way_out}", 2)

        machine = saved.get("machine", self.machine)
        if machine["device"] == "cuda" and self.state.device.type == "cpu" and self.args.cuda:
            was = f"was on a GPU ({machine['model']}), and there is none"
            fail(f"{self.folder} {was}; --no-cuda continues without one", 2)
        before = {"the source": saved["script_sha256"][:8], **saved["versions"], **machine}
        now = {"the source": self.header["script_sha256"][:8], **self.header["versions"], **self.machine}
        changes = describe_changes(before, now)
        if changes:
            print(f"note: from here on the run may differ in the last bits from what it would have been: {changes}")

    def resume(self, saved: dict) -> None:
        """Restore the state, and cut off what a killed process logged beyond it."""
        self.iteration = saved["iteration"]
        finals = self.find_evaluated("final", "model_")
        if self.iteration >= self.num_iterations and finals:
            print(f"{self.folder} is finished after iteration {self.iteration}; to train on, raise --total-timesteps")
            sys.exit(0)
        with self.explain_misfit(self.rolling_path):
            self.state.load_state_dict(saved)
        for path in finals:  # training goes on, so the old end becomes an archived checkpoint
            path.replace(self.folder / "checkpoint" / path.name.replace("_", f"_{self.iteration}_"))
        if self.table_path.exists():
            rows = [row for row in self.read_table() if int(row["iteration"]) <= self.iteration]
            if rows:
                self.write_table(rows)
            else:
                self.table_path.unlink(missing_ok=True)

    def track(self) -> None:
        """Open Weights & Biases: one run there for each game and xpid."""
        import wandb

        name = f"{self.args.env_id}/{self.args.xpid}"
        try:
            wandb.init(
                id=hashlib.sha256(name.encode()).hexdigest()[:16],
                name=self.args.xpid,
                group=self.args.env_id,
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity,
                config=asdict(self.args),
                resume="allow",
                sync_tensorboard=True,
                save_code=True,
            )
        except wandb.Error as error:
            fail(f"--track failed: {one_line(error)}")

    def open_logs(self, saved: dict | None) -> None:
        """Copy the source, open TensorBoard and the progress bar, and say what begins."""
        if saved and saved["script_sha256"] != self.header["script_sha256"]:
            write_file(self.folder / f"{Path(SCRIPT).stem}_after_{self.iteration}.py", SOURCE)
        elif not (self.folder / SCRIPT).exists():
            write_file(self.folder / SCRIPT, SOURCE)
        step = self.iteration * self.batch_size
        total_steps = self.num_iterations * self.batch_size
        # Tell TensorBoard to drop what a killed process logged beyond the resumed step.
        self.writer = SummaryWriter(self.folder, purge_step=(step + 1) if saved else 0)
        if not saved:
            table = "\n".join(f"|{name}|{value}|" for name, value in asdict(self.args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        self.writer.flush()
        machine = [f"{name} {value}" for name, value in self.machine.items() if name != "device"]
        print(f"device       {self.machine['device']} ({', '.join(machine)})")
        print(f"run folder   {self.folder}" + (f", resumed after iteration {self.iteration}" if saved else ""))
        print(f"steps        {total_steps:,} ({self.num_iterations} iterations of {self.batch_size:,})")
        print(f"parameters   {sum(p.numel() for p in self.state.agent.parameters()):,}", flush=True)
        # Shown on a terminal only. The postfix has the speed and the time left, measured over whole iterations.
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        self.bar = tqdm(total=total_steps, initial=step, unit_scale=True, bar_format=bar_format, disable=None)
        self.first_step = step
        self.start_time = time.monotonic()  # evaluation() moves it forward
        self.describe("rollout")

    # ITERATIONS

    def describe(self, phase: str) -> None:
        self.bar.set_description(phase)

    def count_steps(self, number: int) -> None:
        self.steps_of_iteration += number
        self.bar.update(number)

    @contextlib.contextmanager
    def evaluation(self):
        """The time in here does not count for the speed."""
        self.describe("evaluation")
        start = time.monotonic()
        yield
        self.start_time += time.monotonic() - start

    def archives(self, iteration: int) -> bool:
        """Whether an iteration is archived; 1, 2, 4, ... 32 are, too, as learning is fastest early."""
        return iteration % self.args.archive_interval == 0 or iteration in (1, 2, 4, 8, 16, 32)

    def end_iteration(self, metrics: dict, logprobs: torch.Tensor) -> None:
        """Log an iteration and snapshot its state; archive and save it when it is time to."""
        self.iteration += 1
        step = self.iteration * self.batch_size
        speed = (step - self.first_step) / (time.monotonic() - self.start_time)
        metrics = {"charts/SPS": speed, **metrics}
        for tag, value in metrics.items():
            if not math.isnan(value):
                self.writer.add_scalar(tag, value, step)
        self.writer.flush()
        self.append_to_table({"iteration": self.iteration, "global_step": step, **metrics})
        rollout = self.state.envs.take_rows(logprobs) if self.args.save_dataset else None
        test_return = metrics["charts/test_return"]
        snapshot = self.take_snapshot(None if math.isnan(test_return) else test_return)
        if self.archives(self.iteration):
            self.write_evaluated("checkpoint", f"model_{self.iteration}_", snapshot)
        # Only now is the iteration complete: if something above has failed, a resumed run repeats it.
        self.snapshot = snapshot
        self.steps_of_iteration = 0
        if rollout is not None:
            self.unsaved_rollouts.append(rollout)

        time_left = tqdm.format_interval((self.num_iterations - self.iteration) * self.batch_size / speed)
        returns = f"train return {metrics['charts/episodic_return']:.2f}, test return {self.state.test_return:.2f}"
        self.bar.set_postfix_str(f"{speed:.0f} steps/s, {time_left} left, {returns}")
        self.describe("rollout")
        if self.iteration % self.args.log_interval == 0 or self.iteration == self.num_iterations:
            self.save()
            progress = f"iteration {self.iteration}/{self.num_iterations}, {step:,} steps, {speed:.0f} steps/s"
            self.bar.write(f"{progress}, {time_left} left, {returns}")
            sys.stdout.flush()

    # PROGRESS.CSV

    def read_table(self) -> list:
        """The rows of progress.csv. If it can't be read, as after an edit, it is renamed and the table starts empty."""
        content = self.table_path.read_bytes()
        complete_lines = content[: content.rfind(b"\n") + 1]  # a kill or a full disk may have cut the last one
        try:
            rows = list(csv.DictReader(io.StringIO(complete_lines.decode())))
            for row in rows:
                int(row["iteration"])
        except (ValueError, KeyError, TypeError, csv.Error):
            path = self.table_path.with_name(f"progress_unreadable_{self.iteration}.csv")
            self.table_path.replace(path)
            print(f"note: {self.table_path} is not as this script wrote it; it is now {path}, and a new one begins")
            return []
        return rows

    def write_table(self, rows: list) -> None:
        """Write progress.csv anew. A column that some rows lack, as the source has changed, is nan there."""
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.table_path, text.getvalue().encode())

    def append_to_table(self, row: dict) -> None:
        if not set(row) <= set(self.columns):
            rows = self.read_table() if self.table_path.exists() else []
            self.write_table([*rows, row])
            return
        try:
            with open(self.table_path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="nan", lineterminator="\n").writerow(row)
        except OSError as error:
            error.filename = self.table_path
            raise

    # SAVING

    def take_snapshot(self, test_return: float | None) -> dict:
        """The content of rolling/model.pt after this iteration, copied to the host.

        save() writes it now, or later when something ends the run: after a fatal CUDA error the GPU's memory can't be
        read any more.
        """
        return {
            **self.header,
            "iteration": self.iteration,
            "global_step": self.iteration * self.batch_size,
            "test_return": test_return,
            "machine": self.machine,
            **copy_to_host(self.state.state_dict()),
        }

    def save(self) -> None:
        """Write the latest snapshot, and before it the recording up to there."""
        if self.unsaved_rollouts:
            chunk = {}
            for name in self.unsaved_rollouts[0]:
                chunk[name] = np.concatenate([rollout[name] for rollout in self.unsaved_rollouts])
            first_step = self.snapshot["iteration"] * self.args.num_steps - len(chunk["actions"])
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **chunk)
            write_file(self.recording / f"0_{first_step:08d}.npz", buffer.getvalue())
            self.unsaved_rollouts = []
        write_file(self.rolling_path, pack_checkpoint(self.snapshot))

    def find_evaluated(self, folder: str, prefix: str) -> list:
        """Checkpoints {prefix}{test return}.pt; any other file in the folder is the user's."""
        return list(self.folder.glob(f"{folder}/{prefix}*[0-9].[0-9][0-9].pt"))

    def write_evaluated(self, folder: str, prefix: str, snapshot: dict) -> Path:
        """Write {prefix}{test return}.pt, then remove the one it replaces, whose name may have another return."""
        # Enough to play the policy or to start another run: no state of environments, and none that a fork has added.
        names = (*self.header, "iteration", "global_step", "test_return", "model_state_dict", "optimizer_state_dict")
        content = {name: snapshot[name] for name in names}
        shown_return = round(snapshot["test_return"], 2) + 0.0  # + 0.0 turns -0.0 into 0.0
        path = self.folder / folder / f"{prefix}{shown_return:.2f}.pt"
        write_file(path, pack_checkpoint(content))
        for other in self.find_evaluated(folder, prefix):
            if other != path:
                other.unlink()
        return path

    # RECORDING

    def chunks_of_recording(self):
        """Yield (first step, arrays) of every file of the recording in order. Exits with code 1 at a damaged one."""
        for path in sorted(self.recording.glob("0_*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    yield int(path.stem[2:]), dict(file)
            except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
                fail(f"{path} is damaged ({one_line(error)}); put it back, or continue with --no-save-dataset")

    def open_recording(self) -> None:
        """Drop what was recorded beyond the resumed iteration. Exits with code 2 if there is a gap before it."""
        end = self.iteration * self.args.num_steps
        for path in self.recording.glob("0_*.npz"):
            if int(path.stem[2:]) >= end:
                path.unlink()
        recorded = 0
        for first_step, chunk in self.chunks_of_recording():
            if first_step != recorded:
                break
            recorded += len(chunk["actions"])
        if recorded != end:
            lacks = f"{self.recording} lacks steps from {recorded} on"
            fail(f"{lacks}, before iteration {self.iteration + 1}; --no-save-dataset continues without it", 2)
        self.describe_recording(complete=False)

    def describe_recording(self, complete: bool) -> None:
        """Write metadata.json. A recording is a dataset without frames; collect_procgen.py --render draws them."""
        segment = {"seed": self.args.seed, "num_envs": self.args.num_envs}
        metadata = {"format": 2, "args": self.header["args"]}
        for name in ("env_id", "distribution_mode", "num_levels", "start_level"):
            metadata[name] = getattr(self.args, name)
        for name in ("xpid", "script", "script_sha256", "versions"):
            metadata[name] = self.header[name]
        if complete:
            segment["rows"] = self.iteration * self.args.num_steps
            log_probs = hashlib.sha256()
            for _, chunk in self.chunks_of_recording():
                log_probs.update(chunk["log_probs"].tobytes())
            metadata["log_probs_sha256"] = log_probs.hexdigest()
        metadata["segments"] = [segment]
        metadata["complete"] = complete
        write_file(self.recording / "metadata.json", json.dumps(metadata, indent=2).encode())

    # ENDING

    def finish(self, test: dict) -> None:
        test_return = float(test["returns"].mean())
        if self.args.save_dataset:  # before the final checkpoint, which marks the run as finished
            self.describe_recording(complete=True)
        path = self.write_evaluated("final", "model_", {**self.snapshot, "test_return": test_return})
        self.bar.close()
        self.writer.close()
        self.file_lock.release()
        print(f"done: {path}, mean return {test_return:.2f} in {self.args.num_eval_episodes} test episodes")

    def __exit__(self, kind, error, _):
        """Whatever ends the run early: save the last complete iteration first."""
        if kind is None:
            return
        self.bar.close()
        if kind is not Stopped:
            with contextlib.suppress(OSError):  # the error that ended the run is the one to report
                self.save()
            return
        self.save()
        if self.iteration == 0:
            percent = 100 * self.steps_of_iteration // self.batch_size
            saved = (
                f"nothing to save yet: the first rollout was {percent} % done; the same command with --resume starts it"
            )
        else:
            saved = f"saved after iteration {self.iteration}; the same command with --resume continues"
        print(f"stopped by {error}, {saved}", flush=True)
        sys.exit(EXIT_STOPPED)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until handle_signals is called, Ctrl-C ends it without a traceback
    args = parse_args()
    keep_large_blocks()
    try:
        train(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails as well
        fail("stdout was closed (broken pipe); the same command with --resume continues")
    except OSError as error:
        if ".so" in str(error):  # Procgen loads shared libraries when its environments are made
            packages = "libgl1 and libglib2.0-0 (libglib2.0-0t64 on newer systems)"
            fail(f"Procgen misses a library of the system ({error}); on Debian or Ubuntu install {packages}")
        fail(f"{error.filename or args.model_saving_dir} could not be used: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        lack_of_memory = ("out of memory", "not enough memory", "allocate memory")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in lack_of_memory):
            raise
        fail(f"there is not enough memory ({one_line(error)}); lower --num-envs, --num-steps or --hidden-size")


if __name__ == "__main__":
    main()
