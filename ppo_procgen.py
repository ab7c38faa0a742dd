"""Trains a PPO policy with the IMPALA CNN on one Procgen game; evaluates, checkpoints and resumes exactly.

    python ppo_procgen.py --env-id miner                    # train; Ctrl-C saves
    python ppo_procgen.py --env-id miner --resume           # go on where it stopped, to the same weights bit for bit
    tensorboard --logdir runs                               # watch

Everything of a run lies in {model_saving_dir}/{env_id}/{xpid}/ and runs/{env_id}/{xpid}/; see README.md.
Exit codes: 0 done, 1 failed, 2 bad arguments, 75 stopped by a signal with everything saved.
"""

import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to continue
if __name__ == "__main__":  # a signal while PyTorch is still loading: there is nothing to save yet
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, lambda *_: os._exit(EXIT_STOPPED))
# OpenMP threads spin while they wait, GNU's so long by default that two runs on the same two cores did 9 steps/s each.
# With this they do 105, and one run alone is as fast as before. It is read when PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import io
import math
import platform
import random
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

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
    gamma: float = 0.999  # discount factor, of the returns and of the reward normaliser
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

    xpid: str | None = None  # name of the run; by default made of the hyperparameters and the seed
    model_saving_dir: str = "models"  # checkpoints go to {model_saving_dir}/{env_id}/{xpid}/
    resume: bool = False  # continue the run of this xpid if there is one
    checkpoint: str | None = None  # start a new run from the weights and optimizer state of this checkpoint
    log_interval: int = 10  # iterations between rolling checkpoints, and between lines in a log
    archive_interval: int = 50  # iterations between archived, evaluated checkpoints
    num_eval_episodes: int = 10  # test episodes per evaluation, one in each of as many parallel games

    cuda: bool = True  # use the GPU if there is one
    torch_deterministic: bool = True  # ask cuDNN for deterministic kernels
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "procgen"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


# What a continuation may change: nothing here has a part in what is computed.
FREE_ON_RESUME = ("xpid", "model_saving_dir", "resume", "log_interval", "archive_interval", "num_eval_episodes")
FREE_ON_RESUME += ("track", "wandb_project_name", "wandb_entity")
# The games that have more modes than easy and hard. Asked for any other, Procgen's library ends the whole process.
EXTRA_MODES = {
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
    "exploration": ("caveflyer", "climber", "coinrun", "heist", "jumper", "leaper", "maze", "ninja"),
}
MAX_LEVEL = 2**31 - 1  # level seeds are int32
CPU_CHUNK = 256  # frames per backward pass on a CPU: as fast as 512, in 0.4 GB less


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; code 2 is for arguments, 1 for the rest."""
    print(f"ppo_procgen.py: error: {message}", file=sys.stderr)
    sys.exit(code)


def check_args(args: Args) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right."""

    def require(condition, name, wanted):
        if not condition:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)!r}; it must be {wanted}", 2)

    require(args.env_id in ENV_NAMES, "env_id", f"one of {', '.join(ENV_NAMES)}")
    modes = ["easy", "hard"] + [mode for mode, games in EXTRA_MODES.items() if args.env_id in games]
    require(args.distribution_mode in modes, "distribution_mode", f"one of {', '.join(modes)} for {args.env_id}")
    for names, holds, wanted in (
        ("num_envs num_steps hidden_size num_eval_episodes", lambda x: 1 <= x <= 2**16, "between 1 and 65536"),
        ("num_minibatches update_epochs total_timesteps log_interval archive_interval", lambda x: x >= 1, "at least 1"),
        ("learning_rate adam_eps clip_coef max_grad_norm", lambda x: 0 < x < math.inf, "a number above 0"),
        ("ent_coef vf_coef", lambda x: 0 <= x < math.inf, "a number of 0 or more"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("target_kl", lambda x: x is None or 0 < x < math.inf, "a number above 0, or left out"),
        ("seed start_level num_levels", lambda x: 0 <= x < MAX_LEVEL, f"between 0 and {MAX_LEVEL - 1}"),
    ):
        for name in names.split():
            require(holds(getattr(args, name)), name, wanted)
    most_levels = MAX_LEVEL - 1 - args.start_level  # one is left to test on
    require(args.num_levels <= most_levels, "num_levels", f"at most {most_levels} with this --start-level")
    batch = args.num_envs * args.num_steps
    require(batch % args.num_minibatches == 0, "num_minibatches", f"a divisor of num_envs * num_steps = {batch}")
    if args.norm_adv:  # a single advantage has no standard deviation
        require(batch > args.num_minibatches, "num_minibatches", f"at most {batch // 2}, or --no-norm-adv given")
    require(args.total_timesteps >= batch, "total_timesteps", f"at least one iteration, num_envs * num_steps = {batch}")
    require(args.xpid not in ("", "..") and args.xpid == Path(args.xpid).name, "xpid", "a plain folder name")
    # A folder wandb/, which that package makes, is found as well, but has no origin.
    if args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:
        fail("--track needs the package wandb, which is not installed: pip install wandb, or leave --track out", 2)


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
        super().__init__(num_envs, gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(15))

    def reset_wait(self, seed=None, options=None):
        if seed is not None:
            raise ValueError("Procgen seeds its games when they are made: pass the seed to ProcgenVectorEnv")
        self.games.act(np.full(self.num_envs, -1))  # Procgen's forced reset
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
        """States of the games, their level range and mode included, as num_envs uint8 tensors."""
        return [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.games.get_state()]

    def set_state(self, states):
        """Continue from get_state()'s return value. Returns the observations there."""
        self.games.set_state([state.numpy().tobytes() for state in states])
        return self.games.observe()[1]["rgb"]


def make_envs(args: Args) -> gym.Env:
    """The games to train on. A wrapper of your own goes here, and its state, if it has one, into get_env_state."""
    envs = ProcgenVectorEnv(
        args.num_envs, args.env_id, args.distribution_mode, args.start_level, args.num_levels, args.seed
    )
    envs = gym.wrappers.RecordEpisodeStatistics(envs)  # of the raw rewards
    envs = gym.wrappers.NormalizeReward(envs, gamma=args.gamma)  # with PPO's gamma: these are the returns it learns
    return gym.wrappers.TransformReward(envs, lambda reward: np.clip(reward, -10, 10))


def make_test_envs(args: Args) -> ProcgenVectorEnv:
    """The levels above the training range, all of them. With num_levels=0 there are none, and the two are the same."""
    first_level = args.start_level + args.num_levels
    return ProcgenVectorEnv(args.num_eval_episodes, args.env_id, args.distribution_mode, first_level, 0, args.seed)


def layer_init(layer, std):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, 0.0)
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x):
        return x + self.conv1(F.relu_(self.conv0(F.relu(x))))


class ConvSequence(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.res_block0 = ResidualBlock(out_channels)
        self.res_block1 = ResidualBlock(out_channels)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x), kernel_size=3, stride=2, padding=1)
        return self.res_block1(self.res_block0(x))


class Agent(nn.Module):
    """Actor-critic on the IMPALA CNN (Espeholt et al. 2018, figure 3): 64x64 RGB frames to 15 logits and a value."""

    def __init__(self, hidden_size):
        super().__init__()
        self.network = nn.Sequential(
            ConvSequence(3, 16),
            ConvSequence(16, 32),
            ConvSequence(32, 32),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(32 * 8 * 8, hidden_size),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)
        self.actor = layer_init(nn.Linear(hidden_size, 15), std=0.01)
        self.critic = layer_init(nn.Linear(hidden_size, 1), std=1.0)

    def forward(self, x):
        """(N, 64, 64, 3) uint8 frames to (N, 15) logits and (N,) values. Permuted frames already are channels_last."""
        hidden = self.network(x.permute(0, 3, 1, 2) / 255.0)
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
    return returns, lengths, level_complete


class Stopped(Exception):
    """One of STOP_SIGNALS came."""


signals_received = []


def stop_if_asked() -> None:
    """Raise Stopped after a signal. Called where it is safe: before each step of the games and each backward pass."""
    if signals_received:
        raise Stopped(signal.Signals(signals_received[0]).name)


def serialize(state: dict) -> bytes:
    """The content of a checkpoint file. Tensors go in as the CPU's: it must load on a machine without a GPU."""

    def to_cpu(x):
        if isinstance(x, dict):
            return {key: to_cpu(value) for key, value in x.items()}
        return x.cpu() if isinstance(x, torch.Tensor) else x

    buffer = io.BytesIO()
    torch.save(to_cpu(state), buffer)
    return buffer.getvalue()


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
        with contextlib.suppress(OSError):
            temporary.unlink()
        fail(f"{path} could not be written: {error.strerror}")


def write_evaluated(folder: Path, prefix: str, test_return: float, state: dict) -> Path:
    """Write {prefix}{test return}.pt, then remove the one it replaces, which may carry another return in its name."""
    path = folder / f"{prefix}{round(test_return, 2) + 0.0:.2f}.pt"  # + 0.0 turns -0.0 into 0.0
    write_file(path, serialize(state))
    for other in set(folder.glob(f"{prefix}*.pt")) - {path}:
        other.unlink()
    return path


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code in it. Exits with code 1 if it is missing, damaged or foreign."""
    if not path.is_file():
        fail(f"checkpoint {path} is not there")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever it stumbles over
        fail(f"checkpoint {path} is damaged or holds more than tensors and plain values ({type(error).__name__})")
    if not isinstance(state, dict) or state.get("format") != 1 or not isinstance(state.get("args"), dict):
        fail(f"checkpoint {path} is not one of ppo_procgen.py in format 1")
    return state


def load_agent(agent, optimizer, state: dict, path: Path) -> None:
    """Load weights and Adam's moments; learning rate and epsilon stay those of this run's arguments."""
    settings = optimizer.state_dict()["param_groups"]
    try:
        agent.load_state_dict(state["model_state_dict"])
        optimizer.load_state_dict({"state": state["optimizer_state_dict"]["state"], "param_groups": settings})
    except Exception as error:  # depends on what is in the file
        sizes = f"--hidden-size is {state['args'].get('hidden_size')} there and {agent.actor.in_features} here"
        fail(f"checkpoint {path} does not fit the network ({type(error).__name__}; {sizes})")


def check_resumed_args(args: Args, saved: dict, run_dir: Path) -> None:
    """Exit with code 2 if the continuation would compute something else than the run did."""
    now = asdict(args)
    differing = [name for name in now if name not in FREE_ON_RESUME and now[name] != saved.get(name, now[name])]
    if "total_timesteps" in differing and now["total_timesteps"] > saved["total_timesteps"] and not args.anneal_lr:
        differing.remove("total_timesteps")  # it may grow, unless the learning rate is annealed towards it
    if differing:
        changes = ", ".join(f"--{name.replace('_', '-')} was {saved[name]!r}, is {now[name]!r}" for name in differing)
        fail(f"--resume cannot change the arguments of {run_dir} ({changes}); repeat them or choose another --xpid", 2)


def get_env_state(envs):
    """State of the games and of the wrappers around them, as tensors and plain values."""
    names = ("episode_returns", "episode_lengths", "return_queue", "length_queue", "returns")
    moments = [float(moment) for moment in (envs.return_rms.mean, envs.return_rms.var, envs.return_rms.count)]
    state = {name: np.array(getattr(envs, name)).tolist() for name in names}
    return {"games": envs.unwrapped.get_state(), "return_rms": moments, **state}


def set_env_state(envs, state):
    """Continue from get_env_state's return value."""
    envs.unwrapped.set_state(state["games"])
    for name in ("episode_returns", "episode_lengths", "returns"):
        getattr(envs, name)[:] = state[name]
    envs.return_queue.extend(state["return_queue"])
    envs.length_queue.extend(state["length_queue"])
    envs.return_rms.mean, envs.return_rms.var, envs.return_rms.count = map(np.float64, state["return_rms"])


def get_rng_state(device):
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state, device):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:  # it is not there if the run comes from a CPU
        torch.cuda.set_rng_state(state["cuda"], device)


def keep_large_blocks() -> None:
    """Tell glibc's malloc to keep freed memory (other C libraries are left alone).

    By itself it hands every large activation back to the kernel and faults it in again at the next use, which takes as
    long as the arithmetic.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, mmap_threshold, trim_threshold = ctypes.CDLL(None).mallopt, -3, -1  # malloc.h
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # older versions refuse more than 32 MB
        mallopt(trim_threshold, 2**31 - 1)


def lock_run(run_dir: Path, log_dir: Path) -> filelock.BaseFileLock:
    """Make the run's folders and lock it: until the lock is released or this process ends, however it ends."""
    for folder in (run_dir, log_dir):
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            fail(f"{folder} cannot be written, as {parent} is no folder that can be; see --model-saving-dir")
    lock = filelock.FileLock(run_dir / ".lock")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        log_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # not at once: sweep.py may be asking whether the run is in use
    except filelock.Timeout:
        fail(f"{run_dir} is in use by another process; wait for it to end or choose another --xpid")
    except OSError as error:
        fail(f"{run_dir} cannot be written: {error.strerror}; choose another --model-saving-dir")
    for leftover in [*run_dir.glob(".*.tmp"), *run_dir.glob("*/.*.tmp")]:  # of a write that was killed
        leftover.unlink()
    return lock


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.xpid is None:  # no clock in it: the same arguments name the same run
        levels = f"{args.env_id}-{args.distribution_mode}-{args.num_levels}"
        update = f"lr{args.learning_rate}-epoch{args.update_epochs}-mb{args.num_minibatches}"
        args.xpid = f"{levels}-ppo-{update}-v{args.vf_coef}-ha{args.ent_coef}_{args.seed}"
    check_args(args)
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, lambda signum, _: signals_received.append(signum))
    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches
    num_iterations = args.total_timesteps // batch_size
    total_steps = num_iterations * batch_size
    run_dir = Path(args.model_saving_dir) / args.env_id / args.xpid
    log_dir = Path("runs") / args.env_id / args.xpid
    rolling_path, progress_path = run_dir / "rolling" / "model.pt", run_dir / "progress.csv"
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    keep_large_blocks()

    # AGENT: new, from another run's checkpoint, or where this run stopped
    agent = Agent(args.hidden_size).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps)
    resuming = args.resume and rolling_path.exists()
    if args.checkpoint and not resuming:
        load_agent(agent, optimizer, load_checkpoint(Path(args.checkpoint)), args.checkpoint)
    run_lock = lock_run(run_dir, log_dir)
    resuming = args.resume and rolling_path.exists()  # again: whoever had the lock may have written it
    first_iteration, global_step, progress = 1, 0, []
    if resuming:
        state = load_checkpoint(rolling_path)
        if "envs" not in state:
            fail(f"{rolling_path} lacks the states of the games; put the file back that the run has saved")
        check_resumed_args(args, state["args"], run_dir)
        if state["iteration"] >= num_iterations:
            print(f"{run_dir} is finished; to train on, raise --total-timesteps")
            return
        load_agent(agent, optimizer, state, rolling_path)
        first_iteration, global_step = state["iteration"] + 1, state["global_step"]
        if progress_path.exists():  # its rows beyond the resumed iteration are about to be computed again
            progress = progress_path.read_text(errors="replace").splitlines()[: 1 + state["iteration"]]
            write_file(progress_path, "\n".join([*progress, ""]).encode())
    elif any(run_dir.glob("*/*.pt")) or (not args.resume and (progress_path.exists() or any(log_dir.iterdir()))):
        missing = f", but {rolling_path} is missing" if args.resume else ""
        fail(
            f"{run_dir} or {log_dir} holds a run already{missing}; continue it with --resume or choose another --xpid",
            2,
        )

    # GAMES
    envs, test_envs = make_envs(args), make_test_envs(args)
    test_start = test_envs.get_state()

    # ROLLOUT STORAGE
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, 64, 64, 3), dtype=torch.uint8, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs, rewards, values = (torch.zeros(shape, device=device) for _ in range(3))
    dones = torch.zeros(shape, dtype=torch.bool, device=device)
    next_obs = torch.from_numpy(envs.reset()[0]).to(device)
    next_done = torch.zeros(args.num_envs, dtype=torch.bool, device=device)
    level_complete = deque(maxlen=100)  # beside the wrapper's return_queue and length_queue
    latest_test_return = math.nan
    if resuming:
        set_env_state(envs, state["envs"])
        set_rng_state(state["rng"], device)
        next_obs, next_done = state["next_obs"].to(device), state["next_done"].to(device)
        level_complete.extend(state["level_complete"])
        latest_test_return = state["latest_test_return"]

    # CHECKPOINTS
    procgen = importlib.metadata.packages_distributions()["procgen"][0]  # procgen or procgen-mirror
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    versions["procgen"] = f"{procgen} {importlib.metadata.version(procgen)}"

    def make_checkpoint(iteration, test_return):
        return {
            "format": 1,
            "model_state_dict": agent.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "args": asdict(args),
            "xpid": args.xpid,
            "iteration": iteration,
            "global_step": iteration * batch_size,
            "test_return": test_return,
            "versions": versions,
        }

    def make_snapshot(iteration, test_return=None):
        """The content of rolling/model.pt, some 10 MB: a checkpoint and all else that an exact continuation needs."""
        state = {
            "envs": get_env_state(envs),
            "rng": get_rng_state(device),
            "next_obs": next_obs,
            "next_done": next_done,
        }
        state.update(level_complete=list(level_complete), latest_test_return=latest_test_return)
        return serialize({**make_checkpoint(iteration, test_return), **state})

    # LOGGING
    if args.track:
        import wandb

        run = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": args.xpid, "id": args.xpid}
        try:
            wandb.init(**run, resume="allow", sync_tensorboard=True, config=asdict(args), save_code=True)
        except wandb.Error as error:
            fail(f"--track failed: {' '.join(str(error).split())}")
    # A process that was killed may have logged beyond the step that is resumed: TensorBoard is told to drop that.
    writer = SummaryWriter(log_dir, purge_step=global_step + 1 if resuming else 0)
    if not resuming:
        table = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device       {device_name}")
    print(f"run folder   {run_dir}" + (f", resumed after iteration {first_iteration - 1}" if resuming else ""))
    print(f"steps        {total_steps:,} ({num_iterations} iterations of {batch_size:,})")
    print(f"parameters   {sum(p.numel() for p in agent.parameters()):,}", flush=True)
    in_log = not (sys.stdout.isatty() and sys.stderr.isatty())  # lines there, a bar on a terminal
    bar = tqdm(total=total_steps, initial=global_step, unit=" steps", unit_scale=True, smoothing=0, disable=in_log)
    start_time, start_step = time.time(), global_step
    writer.flush()

    # TRAINING. The state is kept in memory whenever an iteration's checkpoints and row are written. A signal saves the
    # last such state and drops the iteration under way.
    snapshot = make_snapshot(first_iteration - 1, state["test_return"] if resuming else None)
    write_file(rolling_path, snapshot)
    try:
        for iteration in range(first_iteration, num_iterations + 1):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate

            # ROLLOUT
            bar.set_description("rollout")
            for step in range(args.num_steps):
                stop_if_asked()
                obs[step], dones[step] = next_obs, next_done
                with torch.inference_mode():
                    actions[step], logprobs[step], _, values[step] = agent.get_action_and_value(next_obs)
                next_frames, reward, terminated, _, infos = envs.step(actions[step].cpu().numpy())
                rewards[step] = torch.from_numpy(reward)
                next_obs, next_done = torch.from_numpy(next_frames).to(device), torch.tensor(terminated, device=device)
                if "episode" in infos:
                    level_complete.extend(infos["prev_level_complete"][infos["_episode"]].tolist())
                bar.update(args.num_envs)
            global_step += batch_size

            # ADVANTAGES
            with torch.inference_mode():
                next_value = agent.get_value(next_obs)
            gae = compute_gae(rewards, values, dones, next_value, next_done, args.gamma, args.gae_lambda)
            b_advantages, b_returns = (x.flatten() for x in gae)
            b_values = values.flatten()
            batch = (obs.flatten(0, 1), actions.flatten(), logprobs.flatten(), b_returns, b_values)

            # UPDATE. Nothing waits for the device, but for target_kl; the losses' sums are read once, at the end.
            # A minibatch's gradient is summed over chunks of it. On a CPU small chunks stay in the cache.
            chunk_size = minibatch_size if device.type == "cuda" else CPU_CHUNK
            loss_sums, updates = torch.zeros(len(LOSSES) + 1, device=device), 0
            for epoch in range(args.update_epochs):
                bar.set_description(f"update {epoch + 1}/{args.update_epochs}")
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
            if not all(map(math.isfinite, losses.values())):
                fail(f"the losses of iteration {iteration} are not finite: {losses}; try a smaller --learning-rate")
            losses["explained_variance"] = (1 - (b_returns - b_values).var() / b_returns.var()).item()

            # EVALUATION
            test_return = test_length = test_complete = math.nan
            if iteration % args.archive_interval == 0 or iteration == num_iterations:
                bar.set_description("evaluate")
                episodes = evaluate(agent, test_envs, test_start, args.seed, device)
                test_return, test_length, test_complete = (float(x.mean()) for x in episodes)
                latest_test_return = test_return
                evaluated = make_checkpoint(iteration, test_return)
                if iteration % args.archive_interval == 0:
                    write_evaluated(run_dir / "checkpoint", f"model_{iteration}_", test_return, evaluated)
                if iteration == num_iterations:
                    final_path = write_evaluated(run_dir / "final", "model_", test_return, evaluated)

            # METRICS
            speed = (global_step - start_step) / (time.time() - start_time)
            train_return, train_length, train_complete = (
                sum(map(float, last)) / len(last) if last else math.nan  # of the last 100 training episodes
                for last in (envs.return_queue, envs.length_queue, level_complete)
            )
            metrics = {
                "charts/SPS": speed,
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                "charts/episodic_return": train_return,
                "charts/episodic_length": train_length,
                "charts/level_complete": train_complete,
                "charts/test_return": test_return,
                "charts/test_length": test_length,
                "charts/test_level_complete": test_complete,
                **{f"losses/{name}": value for name, value in losses.items()},
            }
            for tag, value in metrics.items():
                if not math.isnan(value):
                    writer.add_scalar(tag, value, global_step)
            writer.flush()
            row = {"iteration": iteration, "global_step": global_step, **metrics}
            progress = progress or [",".join(row)]  # the header
            progress.append(",".join(map(str, row.values())))
            write_file(progress_path, "\n".join([*progress, ""]).encode())
            returns = f"train return {train_return:.2f}, test return {latest_test_return:.2f}"
            bar.set_postfix_str(returns)

            snapshot = make_snapshot(iteration, None if math.isnan(test_return) else test_return)
            if iteration % args.log_interval == 0 or iteration == num_iterations:
                write_file(rolling_path, snapshot)
                if in_log:
                    left = tqdm.format_interval((num_iterations - iteration) * batch_size / speed)
                    done = f"iteration {iteration}/{num_iterations}, {global_step:,} steps, {speed:.0f} steps/s"
                    print(f"{done}, {left} left, {returns}", flush=True)
    except Stopped as stop:
        write_file(rolling_path, snapshot)
        bar.close()
        print(f"stopped by {stop}, saved after iteration {iteration - 1}; the same command with --resume continues")
        sys.exit(EXIT_STOPPED)
    except OSError as error:
        bar.close()
        fail(f"{error.filename or log_dir} could not be written: {error.strerror or error}")
    bar.close()
    writer.close()
    run_lock.release()
    print(f"done: {final_path}, mean return {test_return:.2f} in {args.num_eval_episodes} test episodes")


if __name__ == "__main__":
    main()
