"""Plays trained checkpoints on Procgen: collects, records, draws and verifies datasets, evaluates, makes videos.

    python collect_procgen.py --checkpoint models/coinrun/XPID/final/model_9.50.pt  # a dataset of a million steps
    python collect_procgen.py --env-id coinrun --ratio 0.75                         # of every run, at 75 % of its end
    python collect_procgen.py --random --env-id coinrun                             # random actions
    python collect_procgen.py --checkpoint x.pt --no-frames                         # a recording: a few bytes a step
    python collect_procgen.py --render DIR                                          # draws the episodes that it lacks
    python collect_procgen.py --verify DIR --checkpoint x.pt                        # plays it again and compares all
    python collect_procgen.py --checkpoint x.pt --no-save-dataset --num-episodes 1000 --start-level 200 --num-levels 0
    python collect_procgen.py --checkpoint x.pt --no-save-dataset --num-episodes 9 --video 9
    python collect_procgen.py --checkpoint y.pt --agent-from my_procgen.py          # the checkpoint of a fork

A dataset is a recording of actions. Its frames can be drawn from it at any time: the same actions show the same frames.
Exit codes: 0 done, 1 failed, 2 bad arguments, 75 stopped by a signal with everything saved.
"""

import os

# OpenMP threads spin while they wait, GNU's so long by default that processes on the same cores stall each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when PyTorch is loaded

import ast
import errno
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import platform
import re
import signal
import sys
import time
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import filelock
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gym_notices.notices import notices as gym_notices
from PIL import Image, ImageDraw
from torch.distributions import Categorical
from tqdm import tqdm

gym_notices.clear()  # gym prints a notice about its own retirement at import; it is not about this script
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES


@dataclass
class Args:
    # WHAT TO DO: one of these; --verify also together with --checkpoint
    checkpoint: str | None = None  # play this checkpoint
    ratio: float | None = None  # in each run, play the checkpoint whose return is closest to this part of the final one
    random: bool = False  # play uniformly random actions in the game --env-id
    render: str | None = None  # write the missing episode files of this recording (or of a training's rollouts/)
    verify: str | None = None  # play this dataset or recording again and compare; with --checkpoint its log_probs, too

    # LEVELS: by default the checkpoint's; with --random easy mode, levels 0 to 199 and seed 0
    env_id: str | None = None  # the game
    distribution_mode: str | None = None  # difficulty
    num_levels: int | None = None  # number of levels; 0 means every level from start_level up
    start_level: int | None = None  # first level
    seed: int | None = None  # seed of the environments and the actions

    # COLLECT
    total_timesteps: int = 1_000_000  # start no episode after so many steps; running episodes are played to their end
    num_episodes: int | None = None  # or play exactly so many episodes, spread evenly over the environments
    num_envs: int = 64  # number of parallel environments; on a GPU more are faster
    epsilon: float = 0.0  # probability of a uniformly random action in place of the policy's
    agent_from: str | None = None  # script whose class Agent is the checkpoint's network, if that is not this script's
    cuda: bool = True  # use the GPU if there is one
    capacity: int | None = None  # gen_dgrl's; without effect here, but an error if it is below the time limit

    # FILES
    save_dataset: bool = True  # write what is played; --no-save-dataset only evaluates
    frames: bool = True  # write the episodes with their frames; --no-frames writes the recording only
    dataset_saving_dir: str | None = None  # by default datasets/{env_id}/{xpid}/{name of the checkpoint}
    save_interval: float = 30.0  # seconds between saves, 60 at most
    ratio_checkpoint_dir: str = "models"  # with --ratio: the runs are {ratio_checkpoint_dir}/{env_id}/*
    ratio_dataset_dir: str = "test_dataset"  # with --ratio: datasets go to {run}/{ratio_dataset_dir}/{ratio}
    iterations: tuple[int, int] | None = None  # with --render: the first and last iteration of which to draw episodes

    # VIDEO
    video: int = 0  # show the first episode of each of this many environments, side by side
    video_path: str | None = None  # an .mp4 or .gif file; by default video.mp4 in the dataset's folder


# Arguments that may differ when a dataset is extended. All others, a fork's own among them, have to stay the same.
FREE_ARGUMENTS = (
    "checkpoint", "ratio", "render", "verify", "seed", "total_timesteps", "num_episodes", "num_envs", "agent_from",
    "cuda", "capacity", "save_dataset", "frames", "dataset_saving_dir", "save_interval", "ratio_checkpoint_dir",
    "ratio_dataset_dir", "iterations", "video", "video_path",
)  # fmt: skip
MAX_LEVEL = 2**31 - 1  # level seeds are int32
TIME_LIMITS = {"bigfish": 6000, "bossfight": 4000, "plunder": 4000, "leaper": 500, "maze": 500}  # steps; others 1000
AGENT_OF = "ppo_procgen.py"  # the script that has the same class Agent, word for word
IDLE = 255  # recorded as the action of an environment that has no episode left to play; Procgen gets action 0
# The keys that each action stands for. Most games give the letters no meaning; the README has a table.
ACTIONS = (
    "left+down", "left", "left+up", "down", "nothing", "up", "right+down", "right", "right+up",
    "D", "A", "W", "S", "Q", "E",
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


def time_limit(env_id: str, distribution_mode: str) -> int:
    """Steps after which Procgen ends an episode."""
    if env_id == "jumper" and distribution_mode == "memory":
        return 2000
    return TIME_LIMITS.get(env_id, 1000)


def make_envs(num_envs: int, env_id: str, distribution_mode: str, start_level: int, num_levels: int, seed: int, **more):
    options = {"distribution_mode": distribution_mode, "rand_seed": seed, "num_threads": CORES, **more}
    if distribution_mode != "exploration":  # Procgen fixes the one level of exploration
        # Procgen's own num_levels=0 would ignore start_level.
        options["start_level"] = start_level
        options["num_levels"] = num_levels or MAX_LEVEL - start_level
    try:
        return ProcgenGym3Env(num_envs, env_id, **options)
    except OSError as error:  # Procgen loads shared libraries when its first environments are made
        packages = "libgl1 and libglib2.0-0 (libglib2.0-0t64 on newer systems)"
        fail(f"Procgen misses a library of the system ({error}); on Debian or Ubuntu install {packages}")


class Policy:
    """Plays a checkpoint's network. To play another kind of policy, change this class and give --agent-from.

    PyTorch is seeded before every step, so that what is sampled depends on the step alone. A recurrent policy keeps its
    memory here, a row for each environment. act empties the rows where an episode begins and updates those of envs,
    before it samples an action; explore asks the network a second time and must not update them. With has_memory =
    True, before a collection continues, act is shown the recorded steps of one time limit with their actions, which
    restores the memory.
    """

    has_memory = False

    def __init__(self, agent, args, num_envs, device):
        """args are the arguments of the collection, not those of the training."""
        self.agent = agent
        self.epsilon = args.epsilon
        self.device = device

    @torch.inference_mode()
    def act(self, frames, envs, begins, actions=None):
        """Choose actions, unless they are given. Returns them and their log-probabilities, each (n,).

        frames (n, 64, 64, 3) uint8: what the n playing environments show. envs (n,): the indices of these environments.
        begins (n,) bool: True where an episode begins.
        """
        obs = torch.from_numpy(frames).to(self.device)
        given = None if actions is None else torch.from_numpy(actions).long().to(self.device)
        action, log_prob, _, _ = self.agent.get_action_and_value(obs, action=given)
        if self.epsilon > 0:
            if actions is None:
                self.explore(obs, action, log_prob)
            log_prob = ((1 - self.epsilon) * log_prob.exp() + self.epsilon / len(ACTIONS)).log()
        return action.cpu().numpy(), log_prob.cpu().numpy()

    def explore(self, obs, action, log_prob):
        """With probability epsilon, replace an action by a random one and log_prob by the policy's for it. In place."""
        explores = torch.rand(len(obs), device=self.device) < self.epsilon
        if explores.any():
            action[explores] = torch.randint(len(ACTIONS), (len(obs),), device=self.device)[explores]
            log_prob[explores] = self.agent.get_action_and_value(obs[explores], action=action[explores])[1]


class RandomPolicy:
    """Plays uniformly random actions."""

    has_memory = False

    def act(self, frames, envs, begins, actions=None):
        if actions is None:
            actions = torch.randint(len(ACTIONS), (len(frames),)).numpy()
        return actions, np.full(len(frames), -math.log(len(ACTIONS)), np.float32)


def make_policy(args, agent, num_envs, device):
    return RandomPolicy() if args.random else Policy(agent, args, num_envs, device)


@dataclass
class Episode:
    """A finished or unfinished episode: each list has one entry per step."""

    frames: list = field(default_factory=list)  # (64, 64, 3) uint8, what the policy acted on
    actions: list = field(default_factory=list)
    log_probs: list = field(default_factory=list)
    rewards: list = field(default_factory=list)
    level_seed: int = 0
    level_complete: bool = False


def play(levels, segment, recording=(), policy=None, witness=None, witness_from=0, keep_frames=False):
    """Play the recorded actions of a segment and then, if there is a policy, the actions that it chooses.

    Environments of the same seed, given the same actions, show the same frames. So this one loop collects, continues
    after a stop, draws a recording and verifies it. For each step it yields the new row, the recorded row (or None) and
    the episodes that ended. A witness is a policy that sees the recorded steps from step witness_from on; the new rows
    have its log_probs.
    """
    num_envs = segment["num_envs"]
    steps_left = segment.get("max_steps", math.inf)
    episodes_left = np.full(num_envs, math.inf)
    if "num_episodes" in segment:  # fixed per environment: the first episodes to end would be mostly short
        per_env, rest = divmod(segment["num_episodes"], num_envs)
        episodes_left = per_env + (np.arange(num_envs) < rest)
    envs = make_envs(num_envs, **levels, seed=segment["seed"])
    current = [Episode() for _ in range(num_envs)]
    length = np.zeros(num_envs, int)  # steps of the current episodes
    recording = iter(recording)
    for number in itertools.count():
        frames = envs.observe()[1]["rgb"]
        # Every episode that starts is played to its end: unfinished ones are mostly long, and must not be dropped.
        may_start = (episodes_left > 0) & (steps_left > 0)
        playing = np.flatnonzero((length > 0) | may_start)
        begins = length[playing] == 0
        recorded = next(recording, None)
        seed_torch(segment["seed"], number)
        if recorded is not None:
            was_playing = np.flatnonzero(recorded["actions"] != IDLE)
            if len(playing) == 0 or not np.array_equal(was_playing, playing):
                raise Unfit(f"step {number} of the recording does not play the environments that it should")
            actions = recorded["actions"][playing]
            log_probs = recorded["log_probs"][playing]
        elif policy is not None and len(playing):
            actions, log_probs = policy.act(frames[playing], playing, begins)
        else:
            break

        row = {"actions": np.full(num_envs, IDLE, np.uint8), "log_probs": np.zeros(num_envs, np.float32)}
        row["actions"][playing] = actions
        row["log_probs"][playing] = log_probs
        row["checksums"] = np.uint32(zlib.crc32(frames))
        if recorded is not None and witness is not None and number >= witness_from:
            row["log_probs"][playing] = witness.act(frames[playing], playing, begins, actions)[1]
        for env, action, log_prob in zip(playing, actions, log_probs):
            current[env].actions.append(action)
            current[env].log_probs.append(log_prob)
            if keep_frames:
                current[env].frames.append(frames[env].copy())

        envs.act(np.where(row["actions"] == IDLE, 0, row["actions"]).astype(np.int32))
        rewards, _, first = envs.observe()
        row["rewards"] = rewards.copy()
        row["dones"] = first.copy()
        for env in playing:
            current[env].rewards.append(rewards[env])
        length[playing] += 1
        steps_left -= len(playing)

        ended = playing[first[playing]]
        infos = envs.get_info() if len(ended) else None  # get_info is slow
        episodes = []
        for env in ended:
            episode = current[env]
            episode.level_seed = int(infos[env]["prev_level_seed"])
            episode.level_complete = bool(infos[env]["prev_level_complete"])
            episodes.append(episode)
            current[env] = Episode()
        length[ended] = 0
        episodes_left[ended] -= 1
        yield row, recorded, episodes
    envs.close()


def collect(args: Args, path: Path | None, state: dict, folder: Path, note: dict) -> None:
    """Play a policy into the dataset in folder. path and state are its checkpoint, if it has one."""
    args = fill_in(args, state["args"])
    if not args.save_dataset:
        folder = None
    device = choose_device(args)
    agent = None if args.random else load_agent(args, state, path).to(device)
    played = f"{args.env_id}, {args.distribution_mode}, {path or 'random actions'}"
    print(f"{played} -> {folder or 'evaluation only'}", flush=True)
    with Dataset(args, folder, describe(args, path, state, device, note)) as dataset:
        for number, segment in dataset.segments():
            recording = dataset.read_rows(number)
            policy = make_policy(args, agent, segment["num_envs"], device)
            witness = policy if policy.has_memory else None
            # No episode that continues is longer than the time limit.
            witness_from = dataset.lengths[number] - time_limit(args.env_id, args.distribution_mode)
            for row, recorded, episodes in play(
                dataset.levels, segment, recording, policy, witness, witness_from, keep_frames=dataset.draws
            ):
                dataset.take(row, recorded, episodes)
    if args.video:
        make_video(args, dataset)


def draw(args: Args) -> None:
    """Draw the episodes that a recording lacks, into its own folder."""
    with Dataset(args, Path(args.render)) as dataset:
        for number, segment in dataset.segments():
            recording = itertools.islice(dataset.read_rows(number), dataset.last_row)
            for row, recorded, episodes in play(dataset.levels, segment, recording, keep_frames=True):
                dataset.take(row, recorded, episodes)
    if args.video:
        make_video(args, dataset)


def verify(args: Args) -> int:
    """Play a dataset again and compare everything that is in it. Returns the exit code."""
    dataset = Verification(args, Path(args.verify))
    collected_with = SimpleNamespace(random=False, epsilon=0.0)
    if "collector" in dataset.metadata:  # a training's arguments are others
        vars(collected_with).update(dataset.metadata["args"])
    collected_with.agent_from = args.agent_from
    agent = load_agent_of(dataset, args, collected_with)
    for number, segment in dataset.segments():
        recording = dataset.read_rows(number)
        witness = None
        if agent is not None or collected_with.random:
            witness = make_policy(collected_with, agent, segment["num_envs"], torch.device("cpu"))
        for row, recorded, episodes in play(dataset.levels, segment, recording, witness=witness, keep_frames=True):
            dataset.check(row, recorded, episodes)
    code = dataset.judge()
    if args.video:
        make_video(args, dataset)
    return code


# ======================================================================================================================
# A fork need not change anything below: arguments, checkpoints, files, pictures.
# ======================================================================================================================

SCRIPT = Path(__file__).name
EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again to continue
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
CORES = torch.get_num_threads()  # those that this process may use, or OMP_NUM_THREADS
POOL = ThreadPoolExecutor(CORES)  # zlib and files do not need the GIL
# The games that have more modes than easy and hard. Asked for any other, Procgen's library ends the whole process.
EXTRA_MODES = {
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
    "exploration": ("caveflyer", "climber", "coinrun", "heist", "jumper", "leaper", "maze", "ninja"),
}
LEVELS = ("env_id", "distribution_mode", "start_level", "num_levels")
INHERITED = (*LEVELS, "seed")  # taken from the checkpoint unless given
OF_CHECKPOINT = ("script", "script_sha256", "xpid", "iteration", "global_step", "test_return")
# With --random, in place of a checkpoint.
NO_CHECKPOINT = {
    **dict.fromkeys(OF_CHECKPOINT),
    "sha256": None,
    "args": {"distribution_mode": "easy", "start_level": 0, "num_levels": 200, "seed": 0},
}
GEN_DGRL_FLAGS = {
    "--env-name": "--env-id", "--num-env-steps": "--total-timesteps", "--num-processes": "--num-envs",
    "--checkpoint-path": "--checkpoint",
}  # fmt: skip
MAX_ENVS = 2**16
LOCK_PATIENCE = 600  # seconds
# Return ranges of Cobbe et al. 2020, appendix C, for the normalised return (R - min) / (max - min).
RANGES = {
    "easy": {
        "bigfish": (1, 40), "bossfight": (0.5, 13), "caveflyer": (3.5, 12), "chaser": (0.5, 13), "climber": (2, 12.6),
        "coinrun": (5, 10), "dodgeball": (1.5, 19), "fruitbot": (-1.5, 32.4), "heist": (3.5, 10), "jumper": (3, 10),
        "leaper": (3, 10), "maze": (5, 10), "miner": (1.5, 13), "ninja": (3.5, 10), "plunder": (4.5, 30),
        "starpilot": (2.5, 64),
    },
    "hard": {
        "bigfish": (0, 40), "bossfight": (0.5, 13), "caveflyer": (2, 13.4), "chaser": (0.5, 14.2), "climber": (1, 12.6),
        "coinrun": (5, 10), "dodgeball": (1.5, 19), "fruitbot": (-0.5, 27.2), "heist": (2, 10), "jumper": (1, 10),
        "leaper": (1.5, 10), "maze": (4, 10), "miner": (1.5, 20), "ninja": (2, 10), "plunder": (3, 30),
        "starpilot": (1.5, 35),
    },
}  # fmt: skip
# The only arguments that --render and --verify use, and those that each kind of collection does not use.
USED_BY = {
    "render": ("render", "iterations", "save_interval", "video", "video_path", "cuda"),
    "verify": ("verify", "checkpoint", "agent_from", "video", "video_path", "cuda"),
}
UNUSED_BY = {
    "checkpoint": ("iterations", "ratio_checkpoint_dir", "ratio_dataset_dir"),
    "random": ("iterations", "ratio_checkpoint_dir", "ratio_dataset_dir", "epsilon", "agent_from"),
    "ratio": ("iterations", "dataset_saving_dir", "video_path"),  # each run has a folder of its own
}
EPISODE_NAME = re.compile(r"\d{8}T\d{6}_(\d+)_\d+_\d+_-?\d+\.\d\d\.npz")
CHUNK_NAME = re.compile(r"(\d+)_(\d{8,})\.npz")
EVALUATED = re.compile(r"model_(?:(\d+)_)?(-?\d+\.\d\d)\.pt")  # other files in a run are the user's
ROW = {"actions": "uint8", "log_probs": "float32", "rewards": "float32", "dones": "bool", "checksums": "uint32"}
MAX_UNWRITTEN = 50_000  # steps of finished episodes that may wait in memory until they are written
FRAMES_PER_SECOND = 15  # of videos, as when a person plays Procgen
CARD_MARK = "<!-- Written by collect_procgen.py. Without this line it is yours, and no script replaces it. -->"


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; code 2 is for arguments, 1 for the rest."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    sys.exit(code)


class Unfit(Exception):
    """The files of a checkpoint or a dataset cannot be played. With --ratio, its run is skipped.

    code is the exit code. Code 0 means that the run is intact, but has nothing that --ratio can use.
    """

    def __init__(self, reason: str, code: int = 1):
        super().__init__(reason)
        self.reason = reason
        self.code = code


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def seed_torch(segment_seed: int, step: int) -> None:
    """Seed PyTorch for one step of a segment. torch.manual_seed does more, and is slower than a step of a policy."""
    seed = int(np.random.SeedSequence([segment_seed, step]).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


# SIGNALS


class Stopped(Exception):
    """One of STOP_SIGNALS was received."""


signals_received = []


def handle_signals() -> None:
    """From now on a signal ends the process where everything can be saved."""
    for stop_signal in STOP_SIGNALS:
        if stop_signal == signal.SIGHUP and signal.getsignal(stop_signal) == signal.SIG_IGN:
            continue  # nohup
        signal.signal(stop_signal, lambda signum, _: signals_received.append(signum))


def stop_if_asked() -> None:
    """Raise Stopped after a signal. Called after every step."""
    if signals_received:
        raise Stopped(signal.Signals(signals_received[0]).name)


# ARGUMENTS


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def require(args: Args, condition: bool, name: str, wanted: str) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right, unless condition holds."""
    if not condition:
        fail(f"{flag(name)} is {getattr(args, name)!r}; it must be {wanted}", 2)


def print_help() -> None:
    """Print the arguments in the groups and with the comments of class Args."""
    print(__doc__)
    for line in inspect.getsource(Args).splitlines():
        heading = re.fullmatch(r"    # (.*)", line)
        argument = re.fullmatch(r"    (\w+): .+? = (.+?)  # (.*)", line)
        if heading:
            print(f"\n{heading[1]}")
        if argument:
            name, default, comment = argument.groups()
            shown = "" if default == "None" else f" ({default})"
            print(f"  {flag(name):24} {comment}{shown}")
    print("\nA switch that is True is turned off by --no-, as in --no-cuda.")


def read_args(words: list) -> Args:
    """Parse the command line. Exits with code 2 if it makes no sense."""
    if "--help" in words or "-h" in words:
        print_help()
        sys.exit()
    for place, word in enumerate(words):
        name = word.partition("=")[0].replace("_", "-")
        if name in GEN_DGRL_FLAGS:
            fail(f"{name} is gen_dgrl's name of an argument; here it is {GEN_DGRL_FLAGS[name]}", 2)
        values = list(itertools.takewhile(lambda later: not later.startswith("-"), words[place + 1 :]))
        if name in ("--checkpoint", "--render", "--verify") and len(values) > 1:
            what = "file" if name == "--checkpoint" else "folder"
            fail(f"{name} takes one {what}; yours matched {len(values)}: {' '.join(values)[:200]}", 2)
    args = tyro.cli(Args, args=spell_out(words), description=__doc__)
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


def check_args(args: Args) -> None:
    """Check what needs no checkpoint."""
    given = [name for name in ("checkpoint", "ratio", "render", "verify") if getattr(args, name) is not None]
    if args.random:
        given.append("random")
    if len(given) != 1 and given != ["checkpoint", "verify"]:
        fail("give one of --checkpoint, --ratio, --random, --render and --verify, or --checkpoint with --verify", 2)
    mode = given[-1]
    for argument in fields(args):
        if mode in USED_BY:
            useless = argument.name not in USED_BY[mode]
        else:
            useless = argument.name in UNUSED_BY[mode]
        if useless and getattr(args, argument.name) != argument.default:
            fail(f"{flag(argument.name)} has no effect with {flag(mode)}; leave it out", 2)
    if mode in ("ratio", "random"):
        require(args, args.env_id is not None, "env_id", f"given with {flag(mode)}")
    require(args, args.env_id is None or args.env_id in ENV_NAMES, "env_id", f"one of {', '.join(ENV_NAMES)}")
    require(args, args.ratio is None or 0 < args.ratio <= 1, "ratio", "above 0 and at most 1, such as 0.75")
    require(args, args.total_timesteps >= 1, "total_timesteps", "at least 1")
    require(args, args.num_episodes is None or args.num_episodes >= 1, "num_episodes", "at least 1")
    require(args, 1 <= args.num_envs <= MAX_ENVS, "num_envs", f"between 1 and {MAX_ENVS}")
    require(args, 0 <= args.epsilon <= 1, "epsilon", "a probability, between 0 and 1")
    require(args, 0 < args.save_interval <= 60, "save_interval", "above 0 and at most 60 seconds")
    require(args, 0 <= args.video <= 100, "video", "a number of episodes, up to 100")
    suffix = Path(args.video_path or "video.mp4").suffix
    require(args, suffix in (".mp4", ".gif"), "video_path", "a file that ends in .mp4 or .gif")
    if args.iterations is not None:
        first, last = args.iterations
        require(args, 1 <= first <= last, "iterations", "the first and the last one, counted from 1")


def modes_of(env_id: str) -> list:
    extra = [mode for mode, games in EXTRA_MODES.items() if env_id in games]
    return ["easy", "hard", *extra]


def fill_in(args: Args, trained: dict) -> Args:
    """Take the arguments that are left out from the checkpoint's, and check all that depends on them."""
    missing = [name for name in INHERITED if getattr(args, name) is None]
    args = replace(args, **{name: trained[name] for name in missing})
    game = trained.get("env_id", args.env_id)
    modes = modes_of(args.env_id)
    limit = time_limit(args.env_id, args.distribution_mode)
    most = MAX_LEVEL - args.start_level
    require(args, args.env_id == game, "env_id", f"{game}, the game of the checkpoint")
    require(args, args.distribution_mode in modes, "distribution_mode", f"one of {', '.join(modes)} for {args.env_id}")
    require(args, 0 <= args.seed < MAX_LEVEL, "seed", f"between 0 and {MAX_LEVEL - 1}")
    require(args, 0 <= args.start_level < MAX_LEVEL, "start_level", f"between 0 and {MAX_LEVEL - 1}")
    require(args, 0 <= args.num_levels <= most, "num_levels", f"between 0 and {most} with this --start-level")
    long_enough = args.capacity is None or args.capacity >= limit
    require(args, long_enough, "capacity", f"at least {limit}, the time limit of {args.env_id}")
    return args


def choose_device(args: Args) -> torch.device:
    if args.cuda and torch.cuda.is_available():
        torch.backends.cudnn.deterministic = True
        return torch.device("cuda")
    has_gpus = "SLURM_JOB_GPUS" in os.environ or os.environ.get("CUDA_VISIBLE_DEVICES", "-1") not in ("", "-1")
    if args.cuda and has_gpus:
        fail("this job has GPUs, but PyTorch can use none of them; --no-cuda plays on the CPU")
    return torch.device("cpu")


def describe(args: Args, path: Path | None, state: dict, device: torch.device, note: dict) -> dict:
    """The metadata of a collection."""
    about = {name: getattr(args, name) for name in LEVELS}
    about["collector"] = SCRIPT
    about["args"] = json.loads(json.dumps(asdict(args)))  # as it will be read back: tuples become lists
    about["checkpoint"] = None if path is None else str(path)
    about["checkpoint_sha256"] = state["sha256"]
    for name in OF_CHECKPOINT:
        about[name] = state[name]
    about["agent_from"] = describe_agent_from(args)
    about["action_names"] = ACTIONS
    about["device"] = device.type
    about["threads"] = torch.get_num_threads()
    return {**about, **note}


# CHECKPOINTS


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code in it. Raises Unfit if it is missing, damaged or foreign."""
    if os.path.isdir(path):
        reason = f"--checkpoint {path} is a folder; a checkpoint is a file such as final/model_*.pt in it"
        raise Unfit(reason, 2)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unfit(f"checkpoint {path} cannot be read: {error.strerror}") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            damaged = file.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        check_checkpoint(state)
    except Exception as error:  # torch.load raises anything, and the checks what the content makes them
        raise Unfit(f"checkpoint {path} is damaged, or not written by these scripts ({one_line(error)})") from None
    state.pop("optimizer_state_dict", None)  # large, and of no use here
    state["sha256"] = hashlib.sha256(content).hexdigest()  # of what was read: the file may be replaced
    return state


def check_checkpoint(state: dict) -> None:
    """Raise any exception if a checkpoint holds what no script here writes."""
    trained = state["args"]
    xpid = state["xpid"]
    demand(state["format"] == 1, "format")
    demand(trained["env_id"] in ENV_NAMES, "env_id")
    demand(trained["distribution_mode"] in modes_of(trained["env_id"]), "distribution_mode")
    for name in ("num_levels", "start_level", "seed"):
        demand(is_whole(trained[name], 0), name)
    for name in ("iteration", "global_step"):
        demand(is_whole(state[name], 0), name)
    for name in ("script", "script_sha256"):
        demand(isinstance(state[name], str) and state[name].isprintable(), name)
    demand(xpid not in ("", "..") and xpid == Path(xpid).name and xpid.isprintable(), "xpid")
    demand(state["test_return"] is None or math.isfinite(float(state["test_return"])), "test_return")
    demand(isinstance(state["test_return"], (float, int, type(None))), "test_return")
    for name, weight in state["model_state_dict"].items():
        demand(weight.isfinite().all(), f"{name} (not finite)")


def demand(condition, what: str) -> None:
    if not condition:
        raise ValueError(f"{what} is not what a script here writes")


def is_whole(value, least: int, most: int = 2**63 - 1) -> bool:
    return type(value) is int and least <= value <= most


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


def find_agent(args: Args) -> type:
    """This script's class Agent, or that of --agent-from, which is run as the user's own code."""
    if args.agent_from is None:
        return Agent
    try:
        spec = importlib.util.spec_from_file_location("agent_from", args.agent_from)
        module = importlib.util.module_from_spec(spec)
        sys.modules["agent_from"] = module
        spec.loader.exec_module(module)
        if not issubclass(module.Agent, nn.Module):
            raise TypeError("it is no torch.nn.Module")
        return module.Agent
    except Exception as error:  # depends on the file
        fail(f"--agent-from {args.agent_from} cannot be imported, or has no class Agent ({one_line(error)})", 2)


def describe_agent_from(args: Args) -> dict | None:
    if args.agent_from is None:
        return None
    path = Path(args.agent_from)
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def load_agent(args: Args, state: dict, path: Path) -> nn.Module:
    """The checkpoint's network. Raises Unfit unless its text is that of the class Agent that is used."""
    agent_class = find_agent(args)
    source = Path(args.agent_from or AGENT_OF).name
    same_network = agent_sha256(Path(args.agent_from or __file__).read_bytes()) == state.get("agent_sha256")
    if not same_network or (args.agent_from is None and state["script"] != AGENT_OF):
        writer = f"a {source} with another network" if state["script"] == source else state["script"]
        way_out = "--agent-from FILE names the script whose class Agent it needs; its run folder has a copy"
        raise Unfit(f"checkpoint {path} was written by {writer}: {way_out}", 2)
    if args.agent_from is not None and describe_agent_from(args)["sha256"] != state["script_sha256"]:
        print(f"note: {args.agent_from} is not the file that wrote {path}, but the text of its network is the same")
    try:
        trained = SimpleNamespace(**{**state["args"], "bfloat16": False})  # it plays in float32
        agent = agent_class(trained)
        weights = state["model_state_dict"]
        for name, weight in agent.state_dict().items():
            if weights[name].dtype != weight.dtype:
                raise TypeError(f"{name} is {weights[name].dtype}, not {weight.dtype}")
        agent.load_state_dict(weights)
        agent.eval()  # for the dropout and batch normalisation of a fork
    except Exception as error:  # depends on what is in the file
        raise Unfit(f"checkpoint {path} does not fit the network: {one_line(error)}") from None
    try:
        with torch.random.fork_rng(devices=[]):
            policy = Policy(agent, args, 1, torch.device("cpu"))
            policy.act(np.zeros((1, 64, 64, 3), np.uint8), np.zeros(1, int), np.ones(1, bool))
    except Exception as error:  # the network may need more than a frame
        way_out = f"{one_line(error)}; it needs a fork of this script with a class Policy that fits"
        raise Unfit(f"class Policy cannot play the network of {path}: {way_out}") from None
    return agent


def load_agent_of(dataset, args: Args, collected_with) -> nn.Module | None:
    """The network of --checkpoint, which must be the one that collected the dataset; None without --checkpoint."""
    if args.checkpoint is None:
        return None
    metadata = dataset.metadata
    path = Path(args.checkpoint)
    state = load_checkpoint(path)
    if state["sha256"] != metadata.get("checkpoint_sha256"):
        fail(f"{args.verify} was not collected from --checkpoint {path}: its sha256 is another one")
    if not dataset.same_build:
        fail(f"--checkpoint needs the frames of {metadata['versions']['procgen']}; leave it out, or verify there", 2)
    for name in OF_CHECKPOINT:
        if metadata.get(name) != state[name]:
            wrong = f"{name} is {metadata.get(name)}, in the checkpoint {state[name]}"
            fail(f"{args.verify}/metadata.json does not fit the checkpoint: {wrong}")
    return load_agent(collected_with, state, path)


def choose_checkpoint(run: Path, args: Args) -> tuple:
    """(path, state, note) of the checkpoint of a run whose test return is closest to ratio x that of the final one."""
    finals = find_evaluated(run / "final")
    archived = find_evaluated(run / "checkpoint")
    if not finals:
        raise Unfit("it has no final checkpoint", 0)
    if not archived and args.ratio != 1:
        raise Unfit("it has no archived checkpoint", 0)
    loaded = [(load_of_run(path, args), path) for _, _, path in finals]
    # There are two final ones if the run was killed between two files.
    state, path = max(loaded, key=lambda found: found[0]["iteration"])
    if state["test_return"] is None:
        raise Unfit(f"{path} has no test return", 0)
    target = args.ratio * state["test_return"]
    if args.ratio != 1:
        closest = min(archived, key=lambda found: (abs(found[0] - target), found[1]))
        path = closest[2]
        state = load_of_run(path, args)
        if target <= 0:
            print(f"warning: {run.name}: the final test return is not above 0, so --ratio picks no weaker policy")
    print(f"{run.name}: {path.name} with test return {state['test_return']:.2f}, wanted {target:.2f}")
    return path, state, {"ratio": args.ratio, "target_return": target}


def find_evaluated(folder: Path) -> list:
    """(test return, iteration, path) of the evaluated checkpoints in a folder, by their names."""
    found = []
    for path in sorted(folder.glob("*.pt")):
        match = EVALUATED.fullmatch(path.name)
        if match:
            found.append((float(match[2]), int(match[1] or 0), path))
    return found


def load_of_run(path: Path, args: Args) -> dict:
    """Load a checkpoint of a run. Raises Unfit if it is of another game or another script."""
    state = load_checkpoint(path)
    if state["args"]["env_id"] != args.env_id:
        raise Unfit(f"checkpoint {path} is of the game {state['args']['env_id']}")
    if state["script"] != Path(args.agent_from or AGENT_OF).name:
        raise Unfit(f"it is a run of {state['script']}; --agent-from {state['script']} collects from those", 0)
    return state


# FILES


def write_file(path: Path, content: bytes, temporaries: Path | None = None) -> None:
    """Replace a file atomically: even if the process is killed, the file is wholly the old or wholly the new one."""
    temporary = (temporaries or path.parent) / f".{path.name}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def to_npz(arrays: dict) -> bytes:
    """What np.savez_compressed writes, but at zlib's level 3: 1.4 to 2.4 times as fast, and up to a quarter larger."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=3) as file:
        for key, array in arrays.items():
            with file.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def to_arrays(episode: Episode, levels: dict) -> dict:
    """The content of an episode's file; the README explains the keys."""
    length = len(episode.actions)
    limit = time_limit(levels["env_id"], levels["distribution_mode"])
    observations = np.empty((length + 1, 3, 64, 64), np.uint8)
    for t, frame in enumerate(episode.frames):
        observations[t] = frame.transpose(2, 0, 1)
    observations[-1] = observations[-2]  # Procgen never renders the terminal frame
    last = np.arange(length) == length - 1
    cut = length == limit and not episode.level_complete
    return {
        "observations": observations,
        "actions": np.array(episode.actions, np.int64)[:, None],
        "rewards": np.array(episode.rewards, np.float32)[:, None],
        "dones": last,
        "truncations": last & cut,
        "log_probs": np.array(episode.log_probs, np.float32),
        "level_complete": np.array(episode.level_complete),
        "level_seed": np.array(episode.level_seed, np.int64),
    }


def episode_return(episode: Episode) -> float:
    return float(np.sum(episode.rewards, dtype=float))


def episode_name(index: int, episode: Episode) -> str:
    """The name of an episode's file without the time."""
    rounded = round(episode_return(episode), 2) + 0.0  # turns -0.0 into 0.0
    return f"{index}_{len(episode.actions)}_{episode.level_seed}_{rounded:.2f}.npz"


def name_without_time(path: Path) -> str:
    return path.name.partition("_")[2]


def pack_episode(levels: dict, index: int, episode: Episode) -> tuple:
    """Index, name and content of an episode's file. Runs in a thread: the compressor releases the GIL."""
    name = f"{time.strftime('%Y%m%dT%H%M%S')}_{episode_name(index, episode)}"
    return index, name, to_npz(to_arrays(episode, levels))


def fault_in(path: Path, levels: dict, index: int, episode: Episode, same_build: bool) -> str | None:
    """What is wrong with the file of an episode that was just played again, or None."""
    if name_without_time(path) != episode_name(index, episode):
        return f"{path.name}: by the recording it is {episode_name(index, episode)}"
    expected = to_arrays(episode, levels)
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
    except Exception as error:  # numpy and zipfile raise many kinds
        return f"{path.name} is damaged ({one_line(error)})"
    compared = expected.keys() | found.keys()
    if not same_build:  # the two builds of Procgen draw differently
        compared.discard("observations")
    wrong = [key for key in sorted(compared) if not same_array(found.get(key), expected.get(key))]
    if wrong:
        return f"{path.name}: {', '.join(wrong)} is not what the recording gives"
    return None


def same_array(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype:
        return False
    return np.array_equal(one, other)


def read_chunk(path: Path, num_envs: int) -> dict:
    """The arrays of one file of a recording. Raises Unfit if they are not what a script here writes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            chunk = {key: file[key] for key in file.files}
        demand(chunk.keys() == ROW.keys(), "its set of keys")
        length = len(chunk["checksums"])
        for key, dtype in ROW.items():
            shape = (length,) if key == "checksums" else (length, num_envs)
            demand(chunk[key].dtype == dtype and chunk[key].shape == shape, f"the shape or type of {key}")
        actions = chunk["actions"]
        demand(((actions < len(ACTIONS)) | (actions == IDLE)).all(), "one of its actions")
        demand((chunk["log_probs"] <= 0).all(), "a log-probability above 0")
    except Exception as error:  # numpy and zipfile raise many kinds
        raise Unfit(f"{path} is damaged ({one_line(error)})") from None
    return chunk


def counts(summary: list) -> dict:
    """Numbers of episodes and steps, and mean, standard deviation and range of the returns."""
    returns = [episode[0] for episode in summary]
    found = {"episodes": len(summary), "steps": sum(episode[1] for episode in summary)}
    for name, function in {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}.items():
        found[f"return_{name}"] = float(function(returns)) if returns else None
    return found


def versions() -> dict:
    procgen = importlib.metadata.packages_distributions()["procgen"][0]  # procgen or procgen-mirror
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "procgen": f"{procgen} {importlib.metadata.version(procgen)}",
    }


def read_metadata(folder: Path) -> dict:
    """metadata.json of a dataset. Exits with code 1 if there is none, or no script here can have written it."""
    path = folder / "metadata.json"
    if not path.exists():
        if (folder.parent / "metadata.json").exists():
            fail(f"{folder} lies in a dataset; give the folder above, {folder.parent}")
        if any(folder.glob("**/*.npz")):
            fail(f"{folder} has .npz files, but no metadata.json: without its recording nothing can be played again")
        fail(f"{path} does not exist; give the folder of a dataset or a recording")
    try:
        metadata = json.loads(path.read_text())
        check_metadata(metadata)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{path} cannot be read as that of a dataset or a recording ({one_line(error)})")
    return metadata


def check_metadata(metadata: dict) -> None:
    """Raise an exception if metadata hold what no script here writes: wrong numbers may end Procgen's process."""
    if metadata["format"] == 1:
        raise ValueError("it has format 1; the collect_procgen.py of commit 9b8b484 reads it")
    demand(metadata["format"] == 2, "format")
    demand(metadata["env_id"] in ENV_NAMES, "env_id")
    demand(metadata["distribution_mode"] in modes_of(metadata["env_id"]), "distribution_mode")
    demand(is_whole(metadata["start_level"], 0, MAX_LEVEL - 1), "start_level")
    demand(is_whole(metadata["num_levels"], 0, MAX_LEVEL - metadata["start_level"]), "num_levels")
    demand(isinstance(metadata["versions"]["procgen"], str), "versions")
    demand(isinstance(metadata["complete"], bool), "complete")
    demand(isinstance(metadata["segments"], list), "segments")
    for segment in metadata["segments"]:
        demand(is_whole(segment["seed"], 0, MAX_LEVEL), "a segment's seed")
        demand(is_whole(segment["num_envs"], 1, MAX_ENVS), "a segment's num_envs")
        for name in ("max_steps", "num_episodes"):
            demand(name not in segment or is_whole(segment[name], 1), f"a segment's {name}")
        demand(is_whole(segment.get("rows", 0), 0), "a segment's rows")
        demand("rows" in segment or not metadata["complete"], "a complete segment without rows")
    args = metadata["args"]
    demand(is_whole(args.get("num_steps", 1), 1), "num_steps")
    if "collector" in metadata:  # in a training, epsilon may be anything
        epsilon = args.get("epsilon", 0)
        demand(type(epsilon) in (int, float) and 0 <= epsilon <= 1, "epsilon")
    for name in LEVELS:
        demand(args.get(name) == metadata[name], f"{name} (args has another)")


def identity(metadata: dict) -> dict:
    """What all episodes of a dataset have in common."""
    common = {name: metadata.get(name) for name in ("collector", "checkpoint_sha256", "agent_from")}
    for name, value in metadata["args"].items():
        if name not in FREE_ARGUMENTS:
            common[flag(name)] = value
    return common


def lock_folder(folder: Path) -> filelock.FileLock:
    """Lock a folder for the lifetime of this process. On a cluster the previous holder may still be exiting."""
    on_cluster = "SLURM_JOB_ID" in os.environ
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)
        lock.acquire(timeout=LOCK_PATIENCE if on_cluster else 1)  # a second, as sweep.py holds it for a moment
    except filelock.Timeout:
        in_use = f"{folder} is in use by another process"
        fail(f"{in_use}; wait for it to end or choose another folder", EXIT_STOPPED if on_cluster else 1)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            lacks = "as its file system does not support flock"
            fail(f"{folder / '.lock'} cannot be locked, {lacks}; choose a folder on another one")
        fail(f"{folder} cannot be written: {error.strerror}; choose another folder")
    return lock


class Recording:
    """A recording on disk, and what comes out when it is played again from its first step."""

    def __init__(self, args: Args, folder: Path | None, about: dict | None = None):
        self.args = args
        self.folder = folder
        self.metadata = {"format": 2, **(about or {}), "versions": versions(), "segments": [], "complete": False}
        self.chunks = []  # of each segment, the paths of its files
        self.lengths = []  # of each segment, the number of its recorded steps
        self.recorded = {"episodes": 0, "steps": 0}
        self.drawn = {}  # path of each episode that has its frames, by index
        self.misplaced = []  # a message for each file among the episodes that is not one of them
        self.same_build = True  # whether this is the build of Procgen that drew the frames
        self.summary = []  # (return, length, level_complete, level_seed) of each episode played
        self.number = 0  # of the segment that is being played
        self.rows = 0  # steps played in it
        self.log_probs_hash = hashlib.sha256()
        self.unit = "steps" if args.num_episodes is None else "episodes"  # of progress, and of what is wanted

    def read(self) -> None:
        """Read metadata.json and check that the files of the recording fit together. Raises Unfit if they do not."""
        self.metadata = read_metadata(self.folder)
        self.same_build = self.metadata["versions"]["procgen"] == versions()["procgen"]
        segments = self.metadata["segments"]
        files = []
        for path in self.folder.glob("*.npz"):
            match = CHUNK_NAME.fullmatch(path.name)
            if not match or int(match[1]) >= len(segments):
                raise Unfit(f"{path} does not belong to this recording; move it away")
            files.append((int(match[1]), int(match[2]), path))
        self.chunks = [[] for _ in segments]
        self.lengths = [0 for _ in segments]
        self.recorded = {"episodes": 0, "steps": 0}
        for number, first_step, path in sorted(files):
            chunk = read_chunk(path, segments[number]["num_envs"])
            if first_step != self.lengths[number]:
                raise Unfit(f"{path} does not follow the file before it, which ends at step {self.lengths[number]}")
            playing = chunk["actions"] != IDLE
            self.recorded["episodes"] += int((chunk["dones"] & playing).sum())
            self.recorded["steps"] += int(playing.sum())
            self.chunks[number].append(path)
            self.lengths[number] += len(playing)
        for number, (segment, length) in enumerate(zip(segments, self.lengths)):
            if length != segment.get("rows", length):
                raise Unfit(f"{self.folder}: segment {number} has {length} steps, not {segment['rows']}")
        self.find_episodes()

    def find_episodes(self) -> None:
        self.drawn = {}
        own = self.folder / self.metadata["env_id"]
        elsewhere = [path for path in self.folder.glob("*/*.npz") if path.parent != own]
        self.misplaced = [f"{path} is an episode outside {own.name}/" for path in sorted(elsewhere)]
        for path in sorted(own.glob("*")):
            match = EPISODE_NAME.fullmatch(path.name)
            index = int(match[1]) if match else 0
            if not 1 <= index <= self.recorded["episodes"]:
                self.misplaced.append(f"{path} is not one of the {self.recorded['episodes']} recorded episodes")
            elif index in self.drawn:
                self.misplaced.append(f"{path} is there twice: {self.drawn[index].name}")
            else:
                self.drawn[index] = path

    def read_rows(self, number: int):
        """Yield the recorded steps of a segment, each a dict with the keys of ROW."""
        for path in self.chunks[number]:
            chunk = read_chunk(path, self.metadata["segments"][number]["num_envs"])
            for t in range(len(chunk["actions"])):
                yield {key: chunk[key][t] for key in ROW}

    @property
    def levels(self) -> dict:
        return {name: self.metadata[name] for name in LEVELS}

    def show_progress(self, total: int) -> None:
        self.bar = tqdm(total=total, unit=f" {self.unit}", unit_scale=True, disable=None)  # on a terminal only
        self.start_time = time.monotonic()

    def compare(self, row: dict, recorded: dict) -> None:
        """Raise Unfit if a step that was played again gives something else than recorded."""
        keys = ["rewards", "dones"]
        if self.same_build:  # the two builds of Procgen draw differently
            keys.append("checksums")
        for key in keys:
            if not np.array_equal(row[key], recorded[key]):
                where = f"first at step {self.rows} of segment {self.number}"
                raise Unfit(f"{self.folder}: played again, it gives other {key} than recorded, {where}")

    def count(self, row: dict, episodes: list) -> list:
        """Count a step, and the episodes that it ended. Returns (index, episode) of these."""
        self.rows += 1
        self.log_probs_hash.update(row["log_probs"].tobytes())
        numbered = []
        for episode in episodes:
            length = len(episode.actions)
            self.summary.append((episode_return(episode), length, episode.level_complete, episode.level_seed))
            self.bar.update(1 if self.unit == "episodes" else length)
            numbered.append((len(self.summary), episode))
        return numbered


class Dataset(Recording):
    """A recording that is written to. A collection adds steps to it (about is its metadata); --render only draws.

    If folder is None, the recording stays in memory: the collection is only an evaluation.
    """

    def __init__(self, args: Args, folder: Path | None, about: dict | None = None):
        super().__init__(args, folder, about)
        self.about = about
        self.collects = about is not None
        self.draws = args.frames and folder is not None
        self.wanted = 0  # steps or episodes
        if self.collects:
            self.wanted = args.num_episodes or args.total_timesteps
        self.first_row = 0  # episodes that end before it are not drawn
        self.last_row = None  # number of rows to play; None: all
        self.changes = []  # since the dataset was begun, of what the last digits of log_probs depend on
        self.unsaved = []  # rows that are not on disk yet
        self.packing = []  # futures of the episodes that are not on disk yet
        self.unwritten_steps = 0
        self.lock = None

    def __enter__(self):
        if self.folder is None:
            return self
        self.read()
        if self.is_finished():  # nothing will be written, so the disk may be read-only
            return self
        self.lock = lock_folder(self.folder)
        self.read()  # again: another process may have written until now
        if self.metadata["segments"]:  # a dataset
            for leftover in self.folder.glob(".*.tmp"):  # from a write that was killed
                # The recording of a training may be written just now.
                if self.collects or EPISODE_NAME.fullmatch(leftover.name[1:-4]):
                    leftover.unlink(missing_ok=True)
        if self.draws:
            (self.folder / self.metadata["env_id"]).mkdir(exist_ok=True)
        return self

    def read(self) -> None:
        if self.collects and not (self.folder / "metadata.json").exists():  # a new dataset
            if any(self.folder.glob("*.npz")) or any(self.folder.glob("*/*.npz")):
                fail(f"{self.folder} holds episodes without a metadata.json; choose another folder", 2)
            return
        super().read()
        if not self.same_build:
            here = versions()["procgen"]
            drawn_by = self.metadata["versions"]["procgen"]
            fail(f"{self.folder} was recorded by {drawn_by}, which draws other frames than {here} here", 2)
        if self.misplaced:
            fail(f"{self.misplaced[0]}; move it away")
        if self.collects:
            self.continue_as(self.about)
        if self.args.iterations is not None:
            self.choose_iterations(*self.args.iterations)

    def continue_as(self, about: dict) -> None:
        """Take over the metadata of this command. Exits with code 2 if the dataset is another one."""
        found = self.metadata
        theirs = identity(found)
        ours = identity(about)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                differs = f"whose {name} is {theirs.get(name)}, not {ours.get(name)}"
                fail(f"{self.folder} holds a dataset {differs}; choose another folder", 2)
        now = {"device": about["device"], "threads": about["threads"], **versions()}
        then = {"device": found.get("device"), "threads": found.get("threads"), **found["versions"]}
        self.changes = [f"{name} {then.get(name)} -> {now[name]}" for name in now if now[name] != then.get(name)]
        self.metadata = {**found, **about, "versions": versions()}
        if found.get("device") == "cuda":  # once on a GPU, always marked so: its log_probs are less precise
            self.metadata["device"] = "cuda"

    def choose_iterations(self, first: int, last: int) -> None:
        num_steps = self.metadata["args"].get("num_steps")
        require(self.args, num_steps is not None, "iterations", "left out, as this is not the recording of a training")
        most = sum(self.lengths) // num_steps
        require(self.args, last <= most, "iterations", f"within the {most} iterations that are recorded")
        self.first_row = (first - 1) * num_steps
        self.last_row = last * num_steps

    def is_finished(self) -> bool:
        all_drawn = len(self.drawn) == self.recorded["episodes"] or not self.draws
        return self.metadata["complete"] and all_drawn and self.recorded[self.unit] >= self.wanted

    def segments(self):
        """Yield (number, segment) of every recorded segment, then of new ones as long as more is wanted."""
        if self.is_finished():
            more = "; ask for more to extend it" if self.collects else ""
            print(f"{self.folder} is complete with {self.recorded['episodes']} episodes{more}")
            return
        self.begin()
        while self.number < len(self.metadata["segments"]) or self.extend():
            self.rows = 0
            yield self.number, self.metadata["segments"][self.number]
            self.save()
            if self.collects:
                self.metadata["segments"][self.number]["rows"] = self.rows
            self.number += 1
        self.finish()
        stop_if_asked()

    def begin(self) -> None:
        """Say what comes. From now on a signal waits until everything is saved."""
        if self.changes and not self.metadata["complete"]:
            changes = ", ".join(self.changes)
            print(f"note: the last digits of log_probs, and so actions, may differ from here on: {changes}")
        if self.recorded["steps"]:
            print(f"{self.folder}: playing {self.recorded['steps']:,} recorded steps again", flush=True)
        self.show_progress(max(self.wanted, self.recorded[self.unit]))
        self.next_save = time.monotonic() + self.args.save_interval
        handle_signals()

    def extend(self) -> bool:
        """Begin a segment if more is wanted. It has a seed of its own, so that no episode is collected twice."""
        missing = self.wanted - counts(self.summary)[self.unit]
        if missing <= 0:
            return False
        seed = np.random.SeedSequence([self.args.seed, self.number]).generate_state(1)[0]
        segment = {"seed": int(seed % MAX_LEVEL), "num_envs": self.args.num_envs}
        if self.args.num_episodes is not None:
            segment["num_envs"] = min(self.args.num_envs, missing)
            segment["num_episodes"] = missing
        else:
            segment["max_steps"] = missing
        self.metadata["segments"].append(segment)
        self.metadata["complete"] = False
        self.chunks.append([])
        self.lengths.append(0)
        self.write_metadata()
        return True

    def take(self, row: dict, recorded: dict | None, episodes: list) -> None:
        """Take a step that was played: compare it with what is recorded, or record it; draw the episodes it ended."""
        if recorded is None:
            self.unsaved.append(row)
        else:
            self.compare(row, recorded)
            row = recorded  # it has the log_probs that were recorded, and not a witness's
        for index, episode in self.count(row, episodes):
            if index in self.drawn:
                path = self.drawn[index]
                if name_without_time(path) != episode_name(index, episode):
                    raise Unfit(f"{path} is not episode {index} of the recording; move it away, and it is drawn again")
            elif self.draws and self.rows > self.first_row:
                self.pack(index, episode)
        if signals_received or time.monotonic() > self.next_save or self.unwritten_steps > MAX_UNWRITTEN:
            self.save()
        stop_if_asked()

    def pack(self, index: int, episode: Episode) -> None:
        """Compress an episode in the background. Wait here if many are queued, as their frames take memory."""
        waiting = [job for job in self.packing if not job.done()]
        if len(waiting) > CORES:
            waiting[0].result()
        self.packing.append(POOL.submit(pack_episode, self.levels, index, episode))
        self.unwritten_steps += len(episode.actions)

    def save(self) -> None:
        """Write what is new. The recording is written first, so that no episode on disk is beyond it."""
        if self.folder is not None:
            if self.unsaved:
                first_step = self.rows - len(self.unsaved)
                chunk = {key: np.stack([row[key] for row in self.unsaved]) for key in ROW}
                path = self.folder / f"{self.number}_{first_step:08d}.npz"
                write_file(path, to_npz(chunk))
                self.chunks[self.number].append(path)
                self.unsaved = []
                self.write_metadata()
            packed = [job.result() for job in self.packing]
            writing = [POOL.submit(self.write_episode, episode) for episode in packed]
            wait(writing)  # for all, as after an error none may write on while the folder is unlocked
            for job in writing:
                job.result()  # raises what went wrong
            self.packing = []
            self.unwritten_steps = 0
        self.next_save = time.monotonic() + self.args.save_interval
        if self.bar.disable:  # in a log, a line takes the place of the bar
            steps = counts(self.summary)["steps"]
            print(f"{len(self.summary):,} episodes, {steps:,} steps, {self.speed():.0f} steps/s", flush=True)

    def write_episode(self, packed: tuple) -> None:
        index, name, content = packed
        self.drawn[index] = self.folder / self.metadata["env_id"] / name
        write_file(self.drawn[index], content, temporaries=self.folder)

    def write_metadata(self) -> None:
        if self.folder is not None:
            self.metadata.update(counts(self.summary))
            write_file(self.folder / "metadata.json", json.dumps(self.metadata, indent=2).encode())

    def finish(self) -> None:
        """Write what a complete dataset has, and print the summary."""
        speed = self.speed()
        self.bar.close()
        if self.folder is not None:
            if self.draws:
                contact_sheet(self.folder, [self.drawn[index] for index in sorted(self.drawn)])
            if self.collects:
                self.metadata.update(counts(self.summary))
                self.metadata["log_probs_sha256"] = self.log_probs_hash.hexdigest()
                write_card(self.folder, self.metadata)
                self.metadata["complete"] = True
                self.write_metadata()
        if self.summary:
            print_summary(self.levels, self.summary, speed)

    def speed(self) -> float:
        return counts(self.summary)["steps"] / max(time.monotonic() - self.start_time, 1e-9)

    def __exit__(self, kind, error, traceback):
        if self.lock is not None:
            self.lock.release()
        if kind is Stopped:
            self.bar.close()
            way_out = "" if self.folder is None else "; the same command continues"
            print(f"stopped by {error} after {len(self.summary)} episodes{way_out}", flush=True)
            sys.exit(EXIT_STOPPED)


class Verification(Recording):
    """A recording that is compared with what comes out when it is played again."""

    def __init__(self, args: Args, folder: Path):
        super().__init__(args, folder)
        self.read()
        handle_signals()
        self.faults = []
        self.checking = deque()  # futures of the episodes that are being compared
        self.log_prob_error = 0.0
        for message in self.misplaced:
            self.blame(message)

    def segments(self):
        print(f"{self.folder}: playing {self.recorded['steps']:,} recorded steps again", flush=True)
        self.show_progress(self.recorded["steps"])
        for number, segment in enumerate(self.metadata["segments"]):
            self.number = number
            self.rows = 0
            first = len(self.summary)
            yield number, segment
            lengths = [episode[1] for episode in self.summary[first:]]
            too_few = len(lengths) < segment.get("num_episodes", 0)
            too_short = sum(lengths) < segment.get("max_steps", 0)
            if self.metadata["complete"] and (too_few or too_short):
                self.blame(f"segment {number} ends before its max_steps or num_episodes")
        self.settle(0)
        self.bar.close()

    def check(self, row: dict, recorded: dict, episodes: list) -> None:
        self.compare(row, recorded)
        error = np.abs(row["log_probs"] - recorded["log_probs"]).max()
        self.log_prob_error = float(np.maximum(self.log_prob_error, error))  # nan stays nan
        for index, episode in self.count(recorded, episodes):
            if index in self.drawn:
                self.settle(2 * CORES)
                path = self.drawn[index]
                self.checking.append(POOL.submit(fault_in, path, self.levels, index, episode, self.same_build))
        stop_if_asked()

    def settle(self, number: int) -> None:
        """Wait until at most this number of comparisons are under way."""
        while len(self.checking) > number:
            fault = self.checking.popleft().result()
            if fault is not None:
                self.blame(fault)

    def blame(self, fault: str) -> None:
        self.faults.append(fault)
        tqdm.write(f"{self.folder}: {fault}")

    def judge(self) -> int:
        """Check what is known only at the end, and print what was found. Returns the exit code."""
        metadata = self.metadata
        total = len(self.summary)
        missing = sorted(set(range(1, total + 1)) - self.drawn.keys())
        of_training = "num_steps" in metadata["args"]
        if missing and (self.folder / metadata["env_id"]).exists() and metadata["complete"] and not of_training:
            self.blame(f"{len(missing)} episodes are not drawn, the first is number {missing[0]}; --render draws them")
        found = counts(self.summary)
        found["log_probs_sha256"] = self.log_probs_hash.hexdigest()
        for name, value in found.items():
            stored = metadata.get(name, value)
            if metadata["complete"] and not same_number(stored, value):
                self.blame(f"metadata.json: {name} is {stored} there, {value} by what was played")
        tolerance = 1e-4 if metadata.get("device") == "cpu" else 0.02  # a GPU's convolutions are less precise
        if not self.log_prob_error <= tolerance:
            self.blame(f"log_probs are up to {self.log_prob_error:.3g} from those of the policy")

        proof = "all played again and equal, bit for bit"
        if not self.same_build:
            proof = f"all but the frames is equal: {metadata['versions']['procgen']} draws other frames"
        if self.args.checkpoint is not None:
            proof += f"; all log_probs are those of {self.args.checkpoint}"
        elif metadata.get("checkpoint_sha256") is not None:
            proof += "; with --checkpoint the log_probs and the origin are checked, too"
        if self.faults:
            proof = f"{len(self.faults)} faults"
        if not metadata["complete"]:
            proof += "; but it is unfinished: do not use it before its command has ended"
        print(f"{self.folder}: {total} episodes, {total - len(missing)} of them drawn: {proof}")
        return 0 if metadata["complete"] and total and not self.faults else 1


def same_number(one, other) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
    return one == other


def print_summary(levels: dict, summary: list, speed: float) -> None:
    returns, lengths, completed, level_seeds = map(np.array, zip(*summary))
    error = returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.nan
    print(f"episodes            {len(returns)}, {lengths.sum():,} steps, {speed:.0f} steps/s")
    print(f"mean return         {returns.mean():.2f} +- {error:.2f} (standard error)")
    print(f"median, min, max    {np.median(returns):.2f}, {returns.min():.2f}, {returns.max():.2f}")
    if levels["distribution_mode"] in RANGES:
        low, high = RANGES[levels["distribution_mode"]][levels["env_id"]]
        normalised = (returns.mean() - low) / (high - low)
        print(f"normalised return   {normalised:.3f} (0 = a return of {low}, 1 = {high})")
    print(f"mean length         {lengths.mean():.1f}")
    print(f"levels completed    {100 * np.mean(completed):.1f} %")
    print(f"levels seen         {len(set(level_seeds))}", flush=True)


def write_card(folder: Path, metadata: dict) -> None:
    """Write README.md, a page about the dataset for those who find it, unless the user has a page there."""
    path = folder / "README.md"
    if path.exists() and not path.read_text(errors="replace").startswith(CARD_MARK):
        return
    policy = f"run {metadata['xpid']} of {metadata['script']} after {metadata['global_step']} steps of training"
    policy += f" (checkpoint with sha256 {metadata['checkpoint_sha256']})"
    if metadata["args"]["random"]:
        policy = "uniformly random actions"
    if metadata["args"]["epsilon"]:
        policy += f", but each action is uniformly random with probability {metadata['args']['epsilon']}"
    levels = f"{metadata['num_levels'] or 'all'} levels from level {metadata['start_level']} up"
    packages = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    text = f"""{CARD_MARK}
# {metadata["env_id"]}: episodes of Procgen

| | |
|---|---|
| game | {metadata["env_id"]}, {metadata["distribution_mode"]} mode, {levels} |
| policy | {policy} |
| episodes | {metadata["episodes"]:,}, {metadata["steps"]:,} steps |
| return | mean {metadata["return_mean"]:.2f}, standard deviation {metadata["return_std"]:.2f}, \
from {metadata["return_min"]:.2f} to {metadata["return_max"]:.2f} |
| made with | {packages} |

`*.npz` here is the recording: actions, log_probs, rewards, ends and a checksum of the frames of every step. The
episodes with their frames, if they are here, lie in `{metadata["env_id"]}/`, for `numpy.load` and gen_dgrl's loaders.
metadata.json has all that is known, also what the 15 actions are.

    python {SCRIPT} --render FOLDER    # draws the episodes that are not here
    python {SCRIPT} --verify FOLDER    # plays everything again and compares

The script's README shows how to load them. Its code and Procgen are under the MIT licence; the data are yours.
"""
    write_file(path, text.encode())


# PICTURES


def contact_sheet(folder: Path, paths: list) -> None:
    """Write preview.png: eight frames, from the first to the last, of each of up to eight episodes."""
    if not paths:
        return
    rows = []
    for number in np.unique(np.linspace(0, len(paths) - 1, 8).astype(int)):
        try:
            with np.load(paths[number]) as episode:
                frames = episode["observations"][:-1].transpose(0, 2, 3, 1)
        except Exception as error:  # numpy and zipfile raise many kinds
            damage = f"{paths[number]} is damaged ({one_line(error)})"
            raise Unfit(f"{damage}; delete it, and the same command draws it again") from None
        rows.append(np.hstack(frames[np.linspace(0, len(frames) - 1, 8).astype(int)]))
    buffer = io.BytesIO()
    Image.fromarray(np.vstack(rows)).save(buffer, "PNG")
    write_file(folder / "preview.png", buffer.getvalue())


def make_video(args: Args, recording: Recording) -> None:
    """Play the first episodes of a recording again, side by side, in Procgen's own large rendering.

    What environment i shows does not depend on num_envs, so the first columns of the rows are enough.
    """
    metadata = recording.metadata
    if not metadata["segments"]:
        return
    path = Path(args.video_path or (recording.folder or Path()) / "video.mp4")
    rows = recording.unsaved if recording.folder is None else recording.read_rows(0)
    num = min(args.video, metadata["segments"][0]["num_envs"])
    if num < args.video:
        print(f"note: --video {args.video} shows {num} episodes, the first one of each environment that was played")
    print(f"{path}: playing {num} episodes again for the video", flush=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = math.ceil(math.sqrt(num))
        size = 256 if columns < 4 and path.suffix == ".mp4" else 128
        pictures = video_pictures(metadata, rows, num, columns, size)
        if path.suffix == ".gif":
            write_gif(temporary, pictures)
        else:
            write_mp4(temporary, pictures)
        os.replace(temporary, path)
    except OSError as error:
        fail(f"the video {path} could not be written: {error.strerror}")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{path}: {num} episodes side by side")


def video_pictures(metadata: dict, rows, num: int, columns: int, size: int):
    """Yield the pictures of a video."""
    strip = 26  # height of a caption
    levels = {name: metadata[name] for name in LEVELS}
    limit = time_limit(levels["env_id"], levels["distribution_mode"])
    envs = make_envs(num, **levels, seed=metadata["segments"][0]["seed"], render_mode="rgb_array")
    sheet = Image.new("RGB", (columns * size, math.ceil(num / columns) * (size + strip)))
    returns = np.zeros(num)
    playing = set(range(num))
    for step, row in enumerate(rows, start=1):
        before = envs.get_info()
        actions = row["actions"][:num]
        envs.act(np.where(actions == IDLE, 0, actions).astype(np.int32))
        rewards, _, first = envs.observe()
        after = envs.get_info()
        returns += rewards
        for i in sorted(playing):
            end = ""
            if first[i]:
                end = "time limit" if step == limit else "ended"
            if first[i] and after[i]["prev_level_complete"]:
                end = "completed"
            panel = Image.new("RGB", (size, size + strip))
            frame = Image.fromarray(before[i]["rgb"]).resize((size, size), Image.Resampling.BILINEAR)
            panel.paste(frame, (0, strip))
            caption = f"level {before[i]['level_seed']}  step {step}\nreturn {returns[i]:.2f}  {end}"
            ImageDraw.Draw(panel).text((2, 1), caption)
            sheet.paste(panel, (i % columns * size, i // columns * (size + strip)))
        yield sheet
        stop_if_asked()
        playing.difference_update(np.flatnonzero(first))
        if not playing:
            break
    envs.close()
    for _ in range(FRAMES_PER_SECOND):  # the last picture stays for a second
        yield sheet


def write_gif(path: Path, pictures) -> None:
    first, *more = (picture.quantize(64, Image.Quantize.FASTOCTREE, dither=0) for picture in pictures)
    duration = 1000 / FRAMES_PER_SECOND
    first.save(path, "GIF", save_all=True, append_images=more, duration=duration, loop=0)


def write_mp4(path: Path, pictures) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("h264", rate=FRAMES_PER_SECOND)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            stream.width, stream.height = picture.size
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode(None))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until handle_signals is called, Ctrl-C ends it without a traceback
    args = read_args(sys.argv[1:])
    folder = args.verify or args.render or args.dataset_saving_dir
    try:
        if args.render is not None:
            draw(args)
        elif args.verify is not None:
            sys.exit(verify(args))
        elif args.ratio is not None:
            collect_from_runs(args)
        elif args.random:
            folder = Path(folder or Path("datasets") / args.env_id / "random")
            collect(args, None, NO_CHECKPOINT, folder, {})
        else:
            path = Path(args.checkpoint)
            state = load_checkpoint(path)
            folder = Path(folder or Path("datasets") / state["args"]["env_id"] / state["xpid"] / path.stem)
            collect(args, path, state, folder, {})
    except Unfit as error:
        fail(error.reason, error.code)
    except Stopped as error:
        print(f"stopped by {error}", flush=True)
        sys.exit(EXIT_STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails as well
        fail("the program that read the output has ended; the same command continues")
    except torch.OutOfMemoryError:
        fail("the GPU has too little memory; use fewer --num-envs, or --no-cuda")
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        fail(f"{folder or args.ratio_checkpoint_dir} could not be written: {reason}; the same command continues")


def collect_from_runs(args: Args) -> None:
    """Play one checkpoint of every run of a game. A run that cannot be used does not stop the others."""
    root = Path(args.ratio_checkpoint_dir) / args.env_id
    if not root.is_dir():
        fail(f"{root} does not exist; --ratio-checkpoint-dir and --env-id say where the runs are")
    collected = 0
    damaged = 0
    for run in sorted(path for path in root.iterdir() if path.is_dir()):
        try:
            path, state, note = choose_checkpoint(run, args)
            collect(args, path, state, run / args.ratio_dataset_dir / str(args.ratio), note)
            collected += 1
        except Unfit as error:
            print(f"{run} is skipped: {error.reason}")
            damaged += error.code != 0
        except SystemExit as failure:  # its line is printed already
            if failure.code == EXIT_STOPPED:
                raise
            damaged += 1
    if damaged:
        fail(f"{damaged} runs were skipped, as something in them is wrong; the others are collected")
    if not collected:
        fail(f"no run of {args.env_id} in {args.ratio_checkpoint_dir} has what --ratio {args.ratio} needs")


if __name__ == "__main__":
    main()
