"""A fork as the README describes it: a copy with a new loss, argument and width of network, through every script."""

import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_resume import differences, launch, read_run, run_disturbed, run_undisturbed

ROOT = Path(__file__).resolve().parent.parent
NAME = "ppo_drac_procgen.py"
# DrAC (Raileanu et al. 2021): the policy and the value of a shifted frame are pulled towards those of the frame. And,
# as state of its own, a network beside the agent with an optimizer of its own, which learns to predict the values.
LOADED = '        self.next_done = saved["next_done"].to(self.device)\n'
CHANGES = (
    (
        "    vf_coef: float = 0.5",
        "    drac_coef: float = 0.1  # weight of the augmentation loss\n"
        "    width: int = 1  # factor of the numbers of channels\n"
        "    vf_coef: float = 0.5",
    ),
    ("            ConvSequence(3, 16),", "            ConvSequence(3, 16 * args.width),"),
    ("            ConvSequence(16, 32),", "            ConvSequence(16 * args.width, 32),"),
    (
        "    loss = policy_loss -",
        "    shift = int(torch.randint(1, 5, ()))\n"
        "    _, shifted_logprobs, _, shifted_values = agent.get_action_and_value(obs.roll(shift, dims=1), actions)\n"
        "    drac_loss = (0.5 * (shifted_values - new_values.detach()) ** 2 - shifted_logprobs).mean()\n"
        "    loss = args.drac_coef * drac_loss + policy_loss -",
    ),
    ("        terms = {\n", '        terms = {\n            "drac_loss": drac_loss.detach(),\n'),
    (
        "        self.envs = make_envs(args)\n",
        "        self.envs = make_envs(args)\n"
        "        self.predictor = nn.Linear(2, 1).to(device)\n"
        "        self.predictor_optimizer = torch.optim.Adam(self.predictor.parameters(), lr=0.01)\n",
    ),
    (
        '            "next_done": self.next_done,\n',
        '            "next_done": self.next_done,\n'
        '            "predictor": self.predictor.state_dict(),\n'
        '            "predictor_optimizer": self.predictor_optimizer.state_dict(),\n',
    ),
    (
        LOADED,
        LOADED + '        self.predictor.load_state_dict(saved["predictor"])\n'
        '        self.predictor_optimizer.load_state_dict(saved["predictor_optimizer"])\n',
    ),
    (
        "            check_finite(iteration, losses, state)\n",
        "            check_finite(iteration, losses, state)\n"
        "            predicted = state.predictor(torch.stack([b_values, b_logprobs], dim=1)).squeeze(1)\n"
        "            predictor_loss = ((predicted - b_returns) ** 2).mean()\n"
        "            state.predictor_optimizer.zero_grad()\n"
        "            predictor_loss.backward()\n"
        "            state.predictor_optimizer.step()\n"
        '            losses["predictor_loss"] = predictor_loss.item()\n',
    ),
)
ARGUMENTS = ["--drac-coef", "0.2", "--width", "2", "--no-cuda"]


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A folder with the project's scripts, the fork beside them, and the content of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("fork")
    for path in ("ppo_procgen.py", "collect_procgen.py", "sweep.py"):
        shutil.copy(ROOT / path, folder)
    source = (ROOT / "ppo_procgen.py").read_text()
    for old, new in CHANGES:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / NAME).write_text(source)
    counts = run_undisturbed(folder / NAME, ARGUMENTS, folder)
    return folder, counts


def run(folder, *words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_fork_has_runs_of_its_own_and_resumes_exactly(fork, tmp_path):
    folder, counts = fork
    (path,) = folder.glob("models/bossfight/*")
    assert "-ppo_drac-lr" in path.name and path.name.endswith("-drac_coef0.2-width2_0")
    assert (path / NAME).read_text() == (folder / NAME).read_text()
    with open(path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("losses/drac_loss", "losses/predictor_loss"):
        assert all(float(row[name]) > 0 for row in rows)
    for moment in (("backward", 0.6, signal.SIGKILL), ("act", 0.6, signal.SIGTERM)):
        stopped = tmp_path / moment[0]
        assert run_disturbed(folder / NAME, ARGUMENTS, stopped, counts, moment) == []
        assert differences(read_run(stopped), read_run(folder)) == []


def test_a_fork_is_collected_with_its_own_network(fork):
    folder, _ = fork
    (checkpoint,) = folder.glob("models/bossfight/*/final/*.pt")
    options = ["--num-episodes", "2", "--num-envs", "2", "--no-cuda", "--dataset-saving-dir", "dataset"]
    command = [str(folder / "collect_procgen.py"), "--checkpoint", str(checkpoint), *options]
    assert launch(command, folder).code == 2
    process = launch([*command, "--agent-from", NAME], folder)
    assert process.code == 0, process.printed
    metadata = json.loads((folder / "dataset" / "metadata.json").read_text())
    assert metadata["agent_from"]["name"] == metadata["script"] == NAME
    command = [command[0], "--verify", "dataset", "--checkpoint", str(checkpoint), "--agent-from", NAME]
    process = launch(command, folder)
    assert process.code == 0, process.printed
    weight = torch.load(checkpoint, weights_only=True)["model_state_dict"]["network.0.conv.weight"]
    assert len(weight) == 32  # twice the parent's


def test_a_fork_is_swept_by_its_own_arguments(fork):
    folder, _ = fork
    grid = {"env_id": ["bossfight"], "drac_coef": [0.1, 0.3], "num_envs": [4], "num_steps": [16], "cuda": [False]}
    grid |= {"num_minibatches": [2], "update_epochs": [1], "total_timesteps": [64], "num_eval_episodes": [1]}
    (folder / "my_grid.json").write_text(json.dumps({"script": NAME, "grid": grid}))
    sweep = ["sweep.py", "--grid-config", "my_grid.json", "--python", sys.executable]
    lines = run(folder, *sweep).stdout.splitlines()
    assert [("drac_coef0.3" in line.split("--xpid")[1]) for line in lines] == [False, True]
    for line in lines:
        script, *words = shlex.split(line)[1:]
        process = launch([str(folder / script), *words], folder)
        assert process.code == 0, process.printed
    process = run(folder, *sweep, "--action", "status")
    assert process.returncode == 0 and "2 runs: 2 done" in process.stdout, process.stdout + process.stderr
