"""Measures how fast the scripts are on the machine at hand, and how fast they could be. Prints a Markdown table.

    python tests/benchmark.py                               # 20 minutes on two cores
    python tests/benchmark.py --device cuda --json h200.json

Nothing else should run beside it. Every measurement is a process of its own, as malloc's settings and the peak memory
belong to a process. What is compared is run alternately, and the medians are compared.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TESTS = Path(__file__).resolve().parent
PROJECT = TESTS.parent


@dataclass
class Args:
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks are
    env_id: str = "coinrun"  # the game to train on
    json: str | None = None  # write the figures to this file as well


# WHAT THE CHILD PROCESSES DO. Each function leaves its figures in a file.


class Phases:
    """Seconds of a running program by phase. A phase lasts until the next one begins."""

    def __init__(self, device):
        import torch

        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds, self.phase, self.since, self.nested = {}, "other", time.perf_counter(), False

    def begin(self, phase):
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0) + now - self.since
        self.phase, self.since = phase, now

    def wrap(self, phase, after, function):
        """The function as a phase, followed by the phase after. What is called within belongs to it."""

        def wrapped(*args, **kwargs):
            if self.nested:
                return function(*args, **kwargs)
            self.begin(phase)
            self.nested = True
            try:
                return function(*args, **kwargs)
            finally:
                self.nested = False
                self.begin(after)

        return wrapped


def split(device, arguments, result):
    """Train with the script's own main() and note how long each phase of an iteration takes. The first is left out.

    Arguments must have --log-interval 1: the rolling checkpoints count the iterations. With --resume only the start is
    measured.
    """
    import torch

    import ppo_procgen

    phases, figures, iterations = Phases(device), {}, -1  # the first rolling checkpoint comes before the training
    act, make_envs, write_file = ppo_procgen.Agent.get_action_and_value, ppo_procgen.make_envs, ppo_procgen.write_file
    timed_act = phases.wrap("policy", "transfer", act)

    def get_action_and_value(agent, x, action=None):
        if action is not None:  # this is part of the update
            return act(agent, x, action)
        figures.setdefault("startup", time.time() - float(os.environ["BENCHMARK_STARTED"]))
        if "--resume" in arguments:
            Path(result).write_text(json.dumps(figures))
            os._exit(0)
        return timed_act(agent, x)

    if "--save-dataset" in arguments:
        step, games_step = ppo_procgen.Recorder.step, ppo_procgen.ProcgenVectorEnv.step
        inside = [0.0]

        def timed_step(games, actions):
            start = time.perf_counter()
            outcome = games_step(games, actions)
            inside[0] += time.perf_counter() - start
            return outcome

        def timed_record(recorder, actions):
            start, inside[0] = time.perf_counter(), 0.0
            outcome = step(recorder, actions)
            figures["recording"] = figures.get("recording", 0) + time.perf_counter() - start - inside[0]
            return outcome

        ppo_procgen.ProcgenVectorEnv.step, ppo_procgen.Recorder.step = timed_step, timed_record

    def make_timed_envs(args):
        envs = make_envs(args)
        envs.step = phases.wrap("environment", "transfer", envs.step)
        return envs

    def write_and_count(path, content):
        nonlocal iterations
        write_file(path, content)
        if path.name == "model.pt":
            iterations += 1
            if iterations == 1:  # it has touched memory for the first time
                phases.seconds.clear()
                phases.since = time.perf_counter()

    ppo_procgen.Agent.get_action_and_value = get_action_and_value
    ppo_procgen.Agent.get_value = phases.wrap("policy", "update", ppo_procgen.Agent.get_value)
    ppo_procgen.make_envs = make_timed_envs
    ppo_procgen.compute_gae = phases.wrap("update", "update", ppo_procgen.compute_gae)
    ppo_procgen.evaluate = phases.wrap("evaluation", "other", ppo_procgen.evaluate)
    ppo_procgen.Run.write_evaluated = phases.wrap("evaluation", "other", ppo_procgen.Run.write_evaluated)
    ppo_procgen.Run.archives = lambda run, iteration: False  # only the last iteration is evaluated
    ppo_procgen.Run.take_snapshot = phases.wrap("snapshot", "other", ppo_procgen.Run.take_snapshot)
    ppo_procgen.write_file = phases.wrap("files", "other", write_and_count)
    ppo_procgen.SummaryWriter.add_scalar = phases.wrap("other", "other", ppo_procgen.SummaryWriter.add_scalar)
    sys.argv = ["ppo_procgen.py", *arguments]
    ppo_procgen.main()
    phases.begin("other")
    if "recording" in figures:  # of all iterations; the first one's files and phases are not counted
        figures["recording"] /= iterations
    figures |= {phase: seconds / (iterations - 1) for phase, seconds in phases.seconds.items()}
    figures["gpu_peak"] = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    Path(result).write_text(json.dumps(figures))


def plain(device, env_id, num_steps, num_minibatches, iterations, result):
    """PPO as one writes it first: float32 frames, channels first, whole minibatches.

    Network, loss and games are the script's.
    """
    import numpy as np
    import torch

    import ppo_procgen

    class Agent(ppo_procgen.Agent):
        def forward(self, x):
            hidden = self.network(x / 255.0)
            return self.actor(hidden), self.critic(hidden).squeeze(-1)

    torch.backends.cudnn.deterministic = True  # as in the script
    args = ppo_procgen.Args(env_id=env_id, num_steps=num_steps)
    envs = ppo_procgen.make_envs(args)
    agent = Agent(args).to(device).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps)

    def to_tensor(frames):
        return torch.tensor(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)), dtype=torch.float32, device=device)

    shape = (num_steps, args.num_envs)
    obs = torch.zeros((*shape, 3, 64, 64), device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs, rewards, values, dones = (torch.zeros(shape, device=device) for _ in range(4))
    next_obs, next_done = to_tensor(envs.reset()[0]), torch.zeros(args.num_envs, device=device)
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        for step in range(num_steps):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                actions[step], logprobs[step], _, values[step] = agent.get_action_and_value(next_obs)
            frames, reward, terminated, _, _ = envs.step(actions[step].cpu().numpy())
            rewards[step] = torch.tensor(reward, device=device)
            next_obs, next_done = to_tensor(frames), torch.tensor(terminated, dtype=torch.float32, device=device)
        with torch.no_grad():
            next_value = agent.get_value(next_obs)
        gae = ppo_procgen.compute_gae(rewards, values, dones, next_value, next_done, args.gamma, args.gae_lambda)
        advantages, returns = (x.flatten() for x in gae)
        batch_size = num_steps * args.num_envs
        for _ in range(args.update_epochs):
            for minibatch in torch.randperm(batch_size).to(device).split(batch_size // num_minibatches):
                chosen = advantages[minibatch]
                chosen = (chosen - chosen.mean()) / (chosen.std() + 1e-8)
                batch = (x.flatten(0, 1)[minibatch] for x in (obs, actions, logprobs))
                loss, terms = ppo_procgen.ppo_loss(
                    agent, *batch, returns[minibatch], values.flatten()[minibatch], chosen, args
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                [term.item() for term in terms.values()]
        seconds.append(time.perf_counter() - start)
    Path(result).write_text(json.dumps({"seconds": seconds[1:]}))


def limits(device, env_id, result):
    """The games alone, the arithmetic of the network per frame, and the rate of large matrix products."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import ppo_procgen

    args = ppo_procgen.Args(env_id=env_id)
    envs = ppo_procgen.make_envs(args).unwrapped
    envs.reset()
    actions = np.random.default_rng(0).integers(15, size=(1000, args.num_envs))
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < 5:
        envs.step(actions[steps % 1000])
        steps += 1
    figures = {"epochs": args.update_epochs, "batch_size": args.num_envs * args.num_steps}
    figures |= {"archive_interval": args.archive_interval, "log_interval": args.log_interval}
    cpu = torch.cpu.get_capabilities()
    figures |= {
        "bfloat16": device == "cuda" or cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False),
        "threads": torch.get_num_threads(),
        "environment": steps * args.num_envs / (time.perf_counter() - start),
    }

    agent = ppo_procgen.Agent(args).to(device)
    frames = torch.zeros((64, 64, 64, 3), dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter:
        logits, values = agent(frames)
    figures["forward_flops"] = counter.get_total_flops() / len(frames)
    with FlopCounterMode(display=False) as counter:
        logits, values = agent(frames)
        (logits.sum() + values.sum()).backward()
    figures["update_flops"] = counter.get_total_flops() / len(frames)

    def matrix_rate(dtype, size):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = 0.0
        for _ in range(20):
            start = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
        return best

    size = 8192 if device == "cuda" else 2048
    torch.set_float32_matmul_precision("highest")
    figures["float32"] = matrix_rate(torch.float32, size)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        figures["TF32"] = matrix_rate(torch.float32, size)
        figures["bf16"] = matrix_rate(torch.bfloat16, size)
    Path(result).write_text(json.dumps(figures))


# WHAT THE PARENT DOES


def run(command, folder, threads=None):
    """Run a process. Returns its seconds, its peak memory in bytes and what it printed."""
    environment = {**os.environ, "BENCHMARK_STARTED": str(time.time())}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{printed}")
    unit = 1 if platform.system() == "Darwin" else 1024
    return seconds, usage.ru_maxrss * unit, printed


def run_child(folder, function, *arguments, threads=None):
    """Run one of the functions above in a process of its own. Returns its figures and its peak memory in bytes."""
    code = f"import sys; sys.path[:0] = {[str(TESTS), str(PROJECT)]}; import ppo_procgen, benchmark; benchmark."
    code += f"{function}(*{[*arguments, 'figures.json']!r})"
    _, peak, _ = run([sys.executable, "-c", code], folder, threads)
    return json.loads((folder / "figures.json").read_text()), peak


def main():
    import tyro

    args = tyro.cli(Args, description=__doc__)
    on_gpu = args.device == "cuda"
    if on_gpu and run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], ".")[2] != "True\n":
        sys.exit("--device is cuda, but PyTorch finds no GPU here")
    flags = ["--env-id", args.env_id, "--cuda" if on_gpu else "--no-cuda"]
    script, collector = PROJECT / "ppo_procgen.py", PROJECT / "collect_procgen.py"
    temporary = tempfile.TemporaryDirectory()
    root, began = Path(temporary.name), time.perf_counter()
    table, figures = [], {}

    def say(what):
        print(f"{time.perf_counter() - began:5.0f} s  {what}", file=sys.stderr, flush=True)

    def row(name, value, text):
        figures[name] = value
        table.append(f"| {name} | {text} |")

    def new_folder():
        return Path(tempfile.mkdtemp(dir=root))

    def train(*more, num_envs=64, threads=None):
        """Steps per second of an iteration of the script, of a length that keeps minibatches of 2048."""
        batch_size = num_envs * 256 if on_gpu else 2048
        sizes = ["--num-envs", num_envs, "--num-steps", batch_size // num_envs, "--num-minibatches", batch_size // 2048]
        iterations = 12 if on_gpu else 4
        options = [*flags, *sizes, "--total-timesteps", iterations * batch_size, "--num-eval-episodes", 1, *more]
        folder = new_folder()
        # Without the evaluations after iterations 1, 2, 4 and so on, which a long training hardly notices.
        code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import ppo_procgen"
        code += "; ppo_procgen.Run.archives = lambda *_: False; ppo_procgen.main()"
        run([sys.executable, "-c", code, *map(str, options)], folder, threads)
        (path,) = folder.glob("models/*/*/progress.csv")
        lines = [line.split(",") for line in path.read_text().splitlines()]
        speed = lines[0].index("charts/SPS")
        ends = [int(line[1]) / float(line[speed]) for line in lines[1:]]  # seconds since the start
        # The first iteration touches memory for the first time; the last one ends with an evaluation.
        return batch_size * (len(ends) - 2) / (ends[-2] - ends[0])

    def bytes_in(files, steps):
        return sum(path.stat().st_size for path in files) / steps

    say("limits of the machine")
    limit, _ = run_child(root, "limits", args.device, args.env_id)
    _, baseline, _ = run([sys.executable, "-c", "import torch"], root)

    say("training with the defaults")
    folder, iterations, batch_size = new_folder(), 12 if on_gpu else 3, limit["batch_size"]
    options = [*flags, "--log-interval", "1", "--total-timesteps", str(iterations * batch_size)]
    phase, peak = run_child(folder, "split", args.device, options)
    every = {"evaluation": limit["archive_interval"], "files": limit["log_interval"]}  # iterations
    measured = {**phase, "evaluation": phase["evaluation"] * (iterations - 1)}  # there was one, at the end
    names = ("environment", "policy", "transfer", "update", "snapshot", "files", "evaluation", "other")
    costs = {name: measured.get(name, 0) / every.get(name, 1) for name in names}

    say("training with --save-dataset")
    recorded_folder = new_folder()
    recorded_steps = (iterations if on_gpu else 2) * batch_size
    more = ["--total-timesteps", str(recorded_steps), "--save-dataset"]
    recorded, _ = run_child(recorded_folder, "split", args.device, [*options, *more])
    (rollouts,) = recorded_folder.glob("models/*/*/rollouts")
    log_size = bytes_in(rollouts.glob("*.npz"), recorded_steps)

    say("resuming it")
    options[-1] = str((iterations + 1) * batch_size)
    resumed, _ = run_child(folder, "split", args.device, [*options, "--resume"])

    own, other, rounded = [], [], []
    num_steps, num_minibatches = (256, 8) if on_gpu else (32, 1)
    for i in range(3):
        say(f"the script and the plain loop in turn, {i + 1} of 3")
        own.append(train())
        if limit["bfloat16"]:
            rounded.append(train("--bfloat16"))
        shape = (num_steps, num_minibatches, 6 if on_gpu else 2)
        result, _ = run_child(root, "plain", args.device, args.env_id, *shape)
        other.append(num_steps * 64 / statistics.median(result["seconds"]))

    say("numbers of games")
    by_games = {num_envs: train(num_envs=num_envs) for num_envs in (16, 256)} | {64: statistics.median(own)}
    cores = limit["threads"]
    by_threads = {}
    for threads in [2**i for i in range(10) if 2**i < cores]:
        say(f"threads: {threads}")
        by_threads[threads] = train(threads=threads)
    by_threads[cores] = statistics.median(own)

    (checkpoint,) = recorded_folder.glob("models/*/*/final/*.pt")  # the other run is being continued
    steps = "500000" if on_gpu else "30000"
    collect = [sys.executable, collector, "--checkpoint", checkpoint, flags[-1], "--total-timesteps", steps]
    forms = {"frames": [], "a recording": ["--no-frames"], "nothing": ["--no-save-dataset"]}
    speeds, peaks = {form: [] for form in forms}, {}
    for i in range(3):
        say(f"collecting, {i + 1} of 3")
        for form, form_options in forms.items():
            where = ["--dataset-saving-dir", f"{form} {i}"] if form != "nothing" else []
            _, peaks[form], printed = run([*collect, *form_options, *where], folder)
            speeds[form].append(float(re.findall(r"(\d+) steps/s", printed)[-1]))
    collecting, evaluating = (statistics.median(speeds[form]) for form in ("frames", "nothing"))
    metadata = json.loads((folder / "frames 0" / "metadata.json").read_text())
    size = bytes_in(folder.glob("frames 0/*/*.npz"), metadata["steps"])
    recording_size = bytes_in(folder.glob("a recording 0/*.npz"), metadata["steps"])
    say("verifying and drawing")
    verify_seconds, _, _ = run([sys.executable, collector, "--verify", "frames 0"], folder)
    drawing = [sys.executable, collector, "--render", "a recording 0"]
    drawing_speed = float(re.findall(r"(\d+) steps/s", run(drawing, folder)[2])[-1])

    say("sweep")
    values = [i / 1e5 for i in range(1, 101)]
    grid = {"script": "ppo_procgen.py", "grid": {"learning_rate": values, "gamma": values}}
    (root / "big.json").write_text(json.dumps(grid))
    sweep = [
        sys.executable,
        PROJECT / "sweep.py",
        "--grid-config",
        "big.json",
        "--num-trials",
        "10",
        "--action",
        "save",
    ]
    sweep_seconds = statistics.median(run(sweep, root)[0] for _ in range(3))

    rate = limit["TF32" if on_gpu else "float32"]
    update_floor = limit["epochs"] * limit["update_flops"] / rate
    games_floor, network_floor = 1 / limit["environment"], update_floor + limit["forward_flops"] / rate
    floor = max(games_floor, network_floor) if on_gpu else games_floor + network_floor  # a CPU has to do both
    iteration = sum(costs.values())
    if on_gpu:  # the phases were told apart by waiting for the device at each of their ends
        iteration = batch_size / statistics.median(own) + costs["evaluation"] + costs["files"]
    speed = batch_size / iteration

    def several(values, unit="steps/s"):
        return ", ".join(f"{name}: {value:,.0f}" for name, value in sorted(values.items())) + f" {unit}"

    figures["costs"] = costs
    shares = sorted(((seconds / sum(costs.values()), name) for name, seconds in costs.items()), reverse=True)
    reached = speed * floor, batch_size / costs["update"] * update_floor
    flops = limit["forward_flops"] + limit["epochs"] * limit["update_flops"]
    rates = {name: limit[name] / 1e9 for name in ("float32", "TF32", "bf16") if name in limit}
    ratio = statistics.median(own) / statistics.median(other)
    state_cost = measured["snapshot"] + measured["files"]
    log_cost = recorded["recording"] / sum(recorded[name] for name in names if name in recorded)
    recording = statistics.median(speeds["a recording"])
    verifying = metadata["steps"] / verify_seconds
    row("training, all defaults", speed, f"{speed:,.0f} steps/s")
    row("- where the time goes", None, ", ".join(f"{name} {100 * share:.1f} %" for share, name in shares))
    text = f"{1 / floor:,.0f} steps/s; reached {100 * reached[0]:.0f} %, by the update alone {100 * reached[1]:.0f} %"
    row("- limit by games and matrix rate", (1 / floor, *reached), text)
    text = f"{limit['environment']:,.0f} steps/s; {several(rates, 'GFLOP/s')}; {flops / 1e6:.0f} MFLOP a training step"
    row("games alone; matrix product", (limit["environment"], rates, flops), text)
    row(
        f"a plain loop and the script in turn, {num_steps} steps a rollout",
        (other, own),
        f"{statistics.median(other):,.0f} and {statistics.median(own):,.0f} steps/s, {ratio:.2f} x",
    )
    if rounded:
        values = statistics.median(rounded), statistics.median(rounded) / statistics.median(own)
        row("the script in turn with --bfloat16", values, f"{values[0]:,.0f} steps/s, {values[1]:.2f} x")
    row("training by the number of games", by_games, several(by_games))
    row("training by the number of threads", by_threads, several(by_threads))
    row("memory of training", peak, f"{peak / 1e9:.2f} GB, {(peak - baseline) / 1e9:.2f} above importing PyTorch")
    if on_gpu:
        row("GPU memory of training", phase["gpu_peak"], f"{phase['gpu_peak'] / 1e9:.2f} GB")
    text = f"{phase['startup']:.1f} s; resumed {resumed['startup']:.1f} s"
    row("start of training", (phase["startup"], resumed["startup"]), text)
    text = f"{state_cost:.2f} s; with an evaluation of 10 episodes {measured['evaluation']:.1f} s"
    row("a checkpoint", (state_cost, measured["evaluation"]), text)
    text = f"{100 * log_cost:.2f} % of its time, {log_size:.2f} bytes a step"
    row("recording a training", (log_cost, log_size), text)
    text = f"{collecting:,.0f} steps/s, {size:,.0f} bytes a step, {peaks['frames'] / 1e9:.2f} GB of memory"
    row("collecting", (collecting, size, peaks["frames"]), text)
    text = f"{recording:,.0f} steps/s, {recording_size:.2f} bytes a step; {evaluating:,.0f} steps/s"
    row("collecting without frames; evaluating", (recording, recording_size, evaluating), text)
    text = f"{drawing_speed:,.0f} steps/s; {verifying:,.0f} steps/s"
    row("drawing a recording; verifying a dataset, start included", (drawing_speed, verifying), text)
    row("100,000 commands of a sweep", sweep_seconds, f"{sweep_seconds:.1f} s")
    say("done")

    import torch

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    name = torch.cuda.get_device_name() if on_gpu else cpu[1] if cpu else platform.machine()
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    figures["machine"] = f"{args.env_id}, {name}, {cores} threads, {versions}"
    print(f"\n{figures['machine']}\n")
    print("| what | measured |\n|---|---|", *table, sep="\n")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))
    temporary.cleanup()


if __name__ == "__main__":
    main()
