"""Which checkpoints collect_procgen.py takes, alone, by ratio and of forks, and what it says of other input."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile

import pytest
import torch
from check_resume import launch
from conftest import assert_one_line, collect
from datasets import metadata, verify
from runs import ROOT, run_main

import collect_procgen

# RATIOS


def make_run(root, source, xpid, archived, final):
    """A hand-made run: {iteration: test return} of its archived checkpoints, and the final one's (or None)."""
    state = torch.load(source, weights_only=True)
    for iteration, test_return in archived.items():
        path = root / "starpilot" / xpid / "checkpoint" / f"model_{iteration}_{test_return:.2f}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "xpid": xpid, "iteration": iteration, "test_return": test_return}, path)
    if final is not None:
        path = root / "starpilot" / xpid / "final" / f"model_{final:.2f}.pt"
        path.parent.mkdir(parents=True)
        args = {**state["args"], "seed": int(xpid.split("_")[1])}
        torch.save({**state, "xpid": xpid, "iteration": 99, "test_return": final, "args": args}, path)


def test_ratio_choices(starpilot, tmp_path):
    make_run(tmp_path, starpilot, "plain_0", {5: 1.0, 10: 3.0, 50: 5.0}, 6.0)  # 0.5 x 6 = 3
    make_run(tmp_path, starpilot, "tie_1", {40: 4.0, 30: 2.0, 100: 2.0}, 6.0)  # 2 and 4 are as near: the earliest
    make_run(tmp_path, starpilot, "negative_2", {5: -3.0, 10: -1.1, 50: -2.0}, -2.0)  # 0.5 x -2 = -1
    make_run(tmp_path, starpilot, "unfinished_3", {5: 1.0}, None)
    make_run(tmp_path, starpilot, "seed_12", {5: 1.0, 10: 0.4}, 1.0)
    arguments = ["--env-id", "starpilot", "--ratio-checkpoint-dir", str(tmp_path), "--num-episodes", "1"]
    arguments += ["--num-envs", "1", "--no-cuda"]
    process = run_main(collect_procgen, [*arguments, "--ratio", "0.5"], tmp_path)
    assert process.returncode == 0, process.stderr
    chosen = {}
    for path in (tmp_path / "starpilot").glob("*/test_dataset/0.5/metadata.json"):
        found = json.loads(path.read_text())
        chosen[found["xpid"]] = (found["iteration"], found["target_return"])
    assert chosen == {"plain_0": (10, 3.0), "tie_1": (30, 3.0), "negative_2": (10, -1.0), "seed_12": (10, 0.5)}
    assert "unfinished_3 is skipped" in process.stdout
    assert (
        process.stdout.count("warning: ") == 1 and "warning: negative_2: the final test return is not" in process.stdout
    )
    assert "plain_0: model_10_3.00.pt with test return 3.00, wanted 3.00" in process.stdout
    # ratio 1.0 is the final checkpoint itself, with its own seed
    for path in (tmp_path / "starpilot").glob("*_[0-3]"):
        shutil.rmtree(path)
    (final,) = (tmp_path / "starpilot" / "seed_12" / "final").iterdir()
    older = {**torch.load(final, weights_only=True), "iteration": 98, "test_return": 9.0}
    torch.save(older, final.with_name("model_9.00.pt"))  # as a run that is killed between two files may leave it
    assert run_main(collect_procgen, [*arguments, "--ratio", "1.0"], tmp_path).returncode == 0
    found = json.loads((tmp_path / "starpilot/seed_12/test_dataset/1.0/metadata.json").read_text())
    assert (found["iteration"], found["args"]["seed"]) == (99, 12)


def test_no_run_with_a_final_checkpoint(starpilot, tmp_path):
    make_run(tmp_path, starpilot, "unfinished_3", {5: 1.0}, None)
    arguments = ["--env-id", "starpilot", "--ratio-checkpoint-dir", str(tmp_path), "--ratio", "0.5"]
    process = run_main(collect_procgen, arguments, tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "--ratio")


def test_an_unsuitable_run_is_skipped_and_the_others_are_collected(starpilot, tmp_path):
    for xpid in ("good_0", "truncated_1", "fork_2", "misfit_3", "foreign_4"):
        make_run(tmp_path, starpilot, xpid, {5: 1.0, 10: 3.0}, 6.0)
    own = tmp_path / "starpilot" / "good_0" / "final" / "model_keep_me.pt"
    own.write_bytes(b"a copy of the user's")
    root = tmp_path / "starpilot"
    archived = root / "truncated_1" / "checkpoint" / "model_10_3.00.pt"
    archived.write_bytes(archived.read_bytes()[:5000])
    for xpid, change in (
        ("fork_2", {"script": "ppo_drac_procgen.py"}),
        ("misfit_3", {"model_state_dict": {}}),
        ("foreign_4", {"args": {**torch.load(starpilot, weights_only=True)["args"], "env_id": "miner"}}),
    ):
        for path in (root / xpid).glob("*/*.pt"):
            torch.save({**torch.load(path, weights_only=True), **change}, path)
    arguments = ["--env-id", "starpilot", "--ratio-checkpoint-dir", str(tmp_path), "--num-episodes", "2"]
    process = run_main(collect_procgen, [*arguments, "--num-envs", "2", "--no-cuda", "--ratio", "0.5"], tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "3 runs were skipped")  # nothing is wrong with another script's
    skipped = [line for line in process.stdout.splitlines() if "is skipped" in line]
    reasons = {"truncated_1": "is damaged", "fork_2": "ppo_drac_procgen.py", "misfit_3": "does not fit"}
    reasons["foreign_4"] = "is of the game miner"
    assert len(skipped) == 4
    for xpid, reason in reasons.items():
        (line,) = [line for line in skipped if f"{xpid} is skipped" in line]
        assert reason in line
    assert [path.parts[-4] for path in root.glob("*/test_dataset/0.5/metadata.json")] == ["good_0"]
    # the final checkpoint alone is read for a ratio of 1
    process = run_main(collect_procgen, [*arguments, "--num-envs", "2", "--no-cuda", "--ratio", "1.0"], tmp_path)
    assert "2 runs were skipped" in process.stderr
    assert {path.parts[-4] for path in root.glob("*/test_dataset/1.0/metadata.json")} == {"good_0", "truncated_1"}


def test_a_folder_that_one_run_cannot_use_does_not_stop_the_others(starpilot, dataset, tmp_path):
    for xpid in ("a_0", "b_1"):
        make_run(tmp_path, starpilot, xpid, {}, 6.0)
    shutil.copytree(dataset, tmp_path / "starpilot" / "a_0" / "test_dataset" / "1.0")
    arguments = ["--env-id", "starpilot", "--ratio-checkpoint-dir", str(tmp_path), "--num-episodes", "2", "--no-cuda"]
    process = run_main(collect_procgen, [*arguments, "--num-envs", "2", "--ratio", "1.0"], tmp_path)
    assert process.returncode == 1
    assert "holds a dataset whose checkpoint_sha256" in process.stderr and "1 runs were skipped" in process.stderr
    assert metadata(tmp_path / "starpilot" / "b_1" / "test_dataset" / "1.0")["complete"]


# NETWORKS OF OTHER SCRIPTS


OWN = (ROOT / "collect_procgen.py").read_bytes()


@pytest.fixture(scope="module")
def elu(tmp_path_factory):
    """A fork with ELU for ReLU, whose weights have the same names and shapes, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("elu")
    source = (ROOT / "ppo_procgen.py").read_text()
    (folder / "ppo_elu_procgen.py").write_text(source.replace("nn.ReLU(inplace=True)", "nn.ELU()"))
    sizes = "--env-id starpilot --num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 128 --no-cuda"
    options = [*sizes.split(), "--num-eval-episodes", "1", "--learning-rate", "0.001"]
    process = launch([str(folder / "ppo_elu_procgen.py"), *options], folder)
    assert process.code == 0, process.printed
    return folder / "ppo_elu_procgen.py", next(folder.glob("models/starpilot/*/final/*.pt"))


def test_the_checkpoint_of_a_fork_is_refused(elu, tmp_path):
    process = collect(tmp_path / "d", elu[1], "--num-episodes", "2")
    assert process.returncode == 2
    assert_one_line(process.stderr, "was written by ppo_elu_procgen.py", "--agent-from")
    assert not (tmp_path / "d").exists()


def test_a_network_that_was_changed_in_place_is_refused(elu, tmp_path):
    """The script's name is that of the collector's own, its network is not."""
    torch.save({**torch.load(elu[1], weights_only=True), "script": "ppo_procgen.py"}, tmp_path / "same_name.pt")
    process = collect(tmp_path / "d", tmp_path / "same_name.pt", "--num-episodes", "2")
    assert process.returncode == 2
    assert_one_line(process.stderr, "was written by a ppo_procgen.py with another network", "--agent-from")


def test_a_fork_is_collected_and_verified_with_its_own_network(elu, tmp_path):
    folder = tmp_path / "d"
    process = collect(folder, elu[1], "--num-episodes", "4", "--agent-from", str(elu[0]))
    assert process.returncode == 0, process.stderr
    assert "note" not in process.stdout
    sha256 = hashlib.sha256(elu[0].read_bytes()).hexdigest()
    assert metadata(folder)["agent_from"] == {"name": "ppo_elu_procgen.py", "sha256": sha256}
    assert metadata(folder)["script"] == "ppo_elu_procgen.py"
    right = verify(folder, "--checkpoint", str(elu[1]), "--agent-from", str(elu[0]))
    assert right.returncode == 0, right.stdout + right.stderr
    assert f"all log_probs are those of {elu[1]}" in right.stdout
    wrong = verify(folder, "--checkpoint", str(elu[1]), "--agent-from", str(ROOT / "ppo_procgen.py"))
    assert wrong.returncode == 2
    assert_one_line(wrong.stderr, "was written by ppo_elu_procgen.py", "--agent-from")


def test_a_dataset_that_another_network_played_is_noticed(elu, tmp_path, monkeypatch):
    """The collector plays with ReLU what was trained with ELU, as it would if it did not look at the network's text."""
    forged = {**torch.load(elu[1], weights_only=True), "script": "ppo_procgen.py"}
    torch.save({**forged, "agent_sha256": collect_procgen.agent_sha256(OWN)}, tmp_path / "forged.pt")
    assert collect(tmp_path / "d", tmp_path / "forged.pt", "--num-episodes", "4").returncode == 0
    found = metadata(tmp_path / "d")
    sha256 = hashlib.sha256(elu[1].read_bytes()).hexdigest()
    (tmp_path / "d" / "metadata.json").write_text(
        json.dumps({**found, "checkpoint_sha256": sha256, "script": elu[0].name})
    )
    process = verify(tmp_path / "d", "--checkpoint", str(elu[1]), "--agent-from", str(elu[0]))
    assert process.returncode == 1
    assert "from those of the policy" in process.stdout and "1 faults" in process.stdout


def test_a_fork_that_has_changed_around_its_networks_is_named(elu, tmp_path):
    (tmp_path / elu[0].name).write_text(elu[0].read_text() + "\n# a line more\n")
    process = collect(tmp_path / "d", elu[1], "--num-episodes", "1", "--agent-from", str(tmp_path / elu[0].name))
    assert process.returncode == 0 and f"{elu[0].name} is not the file that wrote" in process.stdout


def test_a_helper_beside_agent_that_was_changed_is_another_network(elu, tmp_path):
    source = elu[0].read_text().replace("nn.init.xavier_uniform_(conv.weight)", "nn.init.xavier_normal_(conv.weight)")
    (tmp_path / elu[0].name).write_text(source)
    process = collect(tmp_path / "d", elu[1], "--num-episodes", "1", "--agent-from", str(tmp_path / elu[0].name))
    assert process.returncode == 2 and not (tmp_path / "d").exists()
    assert_one_line(process.stderr, "was written by a ppo_elu_procgen.py with another network")


def test_a_network_that_needs_more_than_a_frame_is_one_line_before_anything_is_written(elu, tmp_path):
    source = elu[0].read_text().replace("(self, x, action=None):", "(self, x, memory, action=None):")
    path = tmp_path / "ppo_lstm_procgen.py"
    path.write_text(source)
    state = torch.load(elu[1], weights_only=True) | {"agent_sha256": collect_procgen.agent_sha256(source.encode())}
    torch.save(state, tmp_path / "lstm.pt")
    process = collect(tmp_path / "d", tmp_path / "lstm.pt", "--num-episodes", "1", "--agent-from", str(path))
    assert process.returncode == 1 and not (tmp_path / "d").exists()
    assert_one_line(process.stderr, "class Policy cannot play the network", "a fork of this script")


def test_of_many_runs_those_of_the_named_network_are_collected(elu, starpilot, tmp_path):
    """By the name of the script: another loss has the network of its parent."""
    root = tmp_path / "models" / "starpilot"
    loss = tmp_path / "ppo_loss_procgen.py"
    shutil.copy(ROOT / "ppo_procgen.py", loss)
    torch.save({**torch.load(starpilot, weights_only=True), "script": loss.name}, tmp_path / starpilot.name)
    for name, checkpoint in (("elu", elu[1]), ("loss", tmp_path / starpilot.name), ("parent", starpilot)):
        (root / name / "final").mkdir(parents=True)
        shutil.copy(checkpoint, root / name / "final")
    options = "--ratio 1.0 --env-id starpilot --num-episodes 1 --num-envs 1 --no-cuda".split()
    collected = set()
    for name, agent_from in (
        ("elu", ["--agent-from", str(elu[0])]),
        ("loss", ["--agent-from", str(loss)]),
        ("parent", []),
    ):
        process = run_main(collect_procgen, [*options, *agent_from], tmp_path)
        assert process.returncode == 0, process.stderr
        collected.add(name)
        assert {path.parts[-4] for path in root.glob("*/test_dataset/1.0/metadata.json")} == collected
    assert f"{root.relative_to(tmp_path) / 'elu'} is skipped: it is a run of ppo_elu_procgen.py" in process.stdout


def test_another_checkpoint_than_the_datasets_is_refused_by_verify(dataset, elu):
    process = verify(dataset, "--checkpoint", str(elu[1]), "--agent-from", str(elu[0]))
    assert process.returncode == 1
    assert_one_line(process.stderr, "was not collected from --checkpoint")


# BAD INPUT


class Intruder:
    """Leaves a folder named `intruded` behind when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("intruded",))


OTHER_DTYPES = {"half": torch.float16, "int8": torch.int8, "complex": torch.complex64}


def cast(state, dtype):
    return {name: weight.to(dtype) for name, weight in state["model_state_dict"].items()}


@pytest.fixture(scope="module")
def bad_files(starpilot, tmp_path_factory):
    """A folder with damaged, foreign and hostile checkpoints, and files where folders or scripts are wanted."""
    folder, good = tmp_path_factory.mktemp("bad"), torch.load(starpilot, weights_only=True)
    (folder / "truncated.pt").write_bytes(starpilot.read_bytes()[:5000])
    weights = {name: weight * float("nan") for name, weight in good["model_state_dict"].items()}
    for name, state in {
        "foreign": {"state_dict": {}},
        "hostile": {**good, "extra": Intruder()},
        "network": {**good, "model_state_dict": {}},
        "nan": {**good, "model_state_dict": weights},
        "sha": {key: value for key, value in good.items() if key != "script_sha256"},
        "xpid": {**good, "xpid": ".."},
        "return": {**good, "test_return": torch.zeros(2)},
        "infinite": {**good, "test_return": float("inf")},
        **{name: {**good, "model_state_dict": cast(good, dtype)} for name, dtype in OTHER_DTYPES.items()},
    }.items():
        torch.save(state, folder / f"{name}.pt")
    content = bytearray(starpilot.read_bytes())
    with zipfile.ZipFile(starpilot) as file:  # the weights of the first big layer, which torch.load does not check
        data = max((x for x in file.infolist()), key=lambda x: x.file_size).header_offset + 1000
    content[data] ^= 1
    (folder / "bit.pt").write_bytes(content)
    content[data : data + 400_000] = bytes(400_000)
    (folder / "zeros.pt").write_bytes(content)
    for name in ("a-file", "a-file.py"):
        (folder / name).write_text("")
    return folder


def test_help_is_in_groups_and_has_every_flag(tmp_path):
    process = run_main(collect_procgen, ["--help"], tmp_path)
    assert process.returncode in (0, None)
    headings = [line.split(":")[0] for line in process.stdout.splitlines() if re.match(r"[A-Z ]{5,}(:|$)", line)]
    assert headings == ["WHAT TO DO", "LEVELS", "COLLECT", "FILES", "VIDEO"]
    flags = re.findall(r"^  --([\w-]+) +\S", process.stdout, re.MULTILINE)
    assert flags == [field.name.replace("_", "-") for field in dataclasses.fields(collect_procgen.Args)]


@pytest.mark.parametrize("text, expected", [("1e6", 1_000_000), ("2.5e4", 25_000), ("3", 3), ("1_000", 1_000)])
@pytest.mark.parametrize("form", ["--total-timesteps {}", "--total_timesteps {}", "--total-timesteps={}"])
def test_a_whole_number_may_have_an_exponent(form, text, expected):
    args = collect_procgen.read_args(["--random", "--env-id", "miner", *form.format(text).split()])
    assert args.total_timesteps == expected


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ("--env_name=coinrun --random", 2, "--env-name is gen_dgrl's name of an argument; here it is --env-id"),
        ("", 2, "give one of --checkpoint"),
        ("--checkpoint CHECKPOINT --ratio 0.5 --env-id starpilot", 2, "give one of --checkpoint"),
        ("--ratio 0.5", 2, "--env-id is None; it must be given with --ratio"),
        ("--ratio nan --env-id starpilot", 2, "--ratio is nan"),
        ("--ratio 0.5 --env-id starpilot --dataset-saving-dir d", 2, "--dataset-saving-dir has no effect with --ratio"),
        ("--ratio 0.5 --env-id miner --ratio-checkpoint-dir no", 1, "no/miner does not exist"),
        ("--checkpoint CHECKPOINT --env-id miner", 2, "--env-id is 'miner'; it must be starpilot"),
        ("--checkpoint CHECKPOINT --env-id pong", 2, "--env-id is 'pong'; it must be one of bigfish"),
        ("--checkpoint CHECKPOINT --distribution-mode memory", 2, "--distribution-mode is 'memory'"),
        ("--checkpoint CHECKPOINT --capacity 999", 2, "--capacity is 999; it must be at least 1000, the time limit"),
        ("--render a-file", 1, "a-file/metadata.json does not exist"),
        ("--render nowhere", 1, "nowhere/metadata.json does not exist"),
        ("--render a --dataset-saving-dir d", 2, "--dataset-saving-dir has no effect with --render"),
        ("--checkpoint CHECKPOINT --iterations 1 2", 2, "--iterations has no effect with --checkpoint"),
        ("--render a --iterations 0 2", 2, "--iterations is (0, 2); it must be the first and the last one"),
        ("--render a --num-episodes 2", 2, "--num-episodes has no effect with --render"),
        ("--verify a --seed 2", 2, "--seed has no effect with --verify"),
        ("--verify a b", 2, "--verify takes one folder; yours matched 2: a b"),
        ("--checkpoint a.pt b.pt c.pt", 2, "--checkpoint takes one file; yours matched 3: a.pt b.pt c.pt"),
        ("--checkpoint .", 2, "--checkpoint . is a folder; a checkpoint is a file such as final/model_*.pt in it"),
        ("--random", 2, "--env-id is None; it must be given with --random"),
        ("--random --env-id miner --epsilon 0.1", 2, "--epsilon has no effect with --random"),
        ("--random --env-id miner --distribution-mode extreme", 2, "--distribution-mode is 'extreme'"),
        ("--random --checkpoint CHECKPOINT", 2, "give one of --checkpoint"),
        ("--checkpoint CHECKPOINT --epsilon 1.5", 2, "--epsilon is 1.5; it must be a probability"),
        ("--checkpoint CHECKPOINT --epsilon nan", 2, "--epsilon is nan; it must be a probability"),
        ("--checkpoint sha.pt", 1, "sha.pt is damaged, or not written by these scripts"),
        ("--checkpoint CHECKPOINT --save-interval 61", 2, "--save-interval is 61"),
        ("--checkpoint CHECKPOINT --video -1", 2, "--video is -1"),
        ("--checkpoint CHECKPOINT --video 1 --video-path v.avi", 2, "--video-path is 'v.avi'"),
        ("--checkpoint CHECKPOINT --num-envs 0", 2, "--num-envs is 0"),
        ("--checkpoint CHECKPOINT --total-timesteps 0", 2, "--total-timesteps is 0"),
        ("--checkpoint CHECKPOINT --num-episodes 0", 2, "--num-episodes is 0"),
        ("--checkpoint CHECKPOINT --seed -1", 2, "--seed is -1"),
        ("--checkpoint CHECKPOINT --num-levels -1", 2, "--num-levels is -1"),
        ("--checkpoint CHECKPOINT --start-level 2147483640 --num-levels 100", 2, "--num-levels is 100"),
        ("--checkpoint missing.pt", 1, "missing.pt cannot be read: No such file"),
        (f"--checkpoint {'x' * 300}", 1, "cannot be read: File name too long"),
        ("--checkpoint truncated.pt", 1, "truncated.pt is damaged"),
        ("--checkpoint foreign.pt", 1, "foreign.pt is damaged, or not written by these scripts"),
        (
            "--checkpoint nan.pt",
            1,
            "network.0.conv.weight (not finite)",
        ),
        ("--checkpoint xpid.pt", 1, "xpid is not what a script here writes"),
        ("--checkpoint return.pt", 1, "return.pt is damaged, or not written by these scripts"),
        ("--checkpoint infinite.pt", 1, "test_return is not what a script here writes"),
        ("--checkpoint half.pt", 1, "network.0.conv.weight is torch.float16, not torch.float32"),
        ("--checkpoint int8.pt", 1, "network.0.conv.weight is torch.int8, not torch.float32"),
        ("--checkpoint complex.pt", 1, "network.0.conv.weight is torch.complex64, not torch.float32"),
        ("--checkpoint bit.pt", 1, "bit.pt is damaged"),
        ("--checkpoint zeros.pt", 1, "zeros.pt is damaged"),
        ("--checkpoint CHECKPOINT --agent-from nowhere.py", 2, "--agent-from nowhere.py cannot be imported"),
        (
            "--checkpoint CHECKPOINT --agent-from a-file.py",
            2,
            "--agent-from a-file.py cannot be imported, or has no class",
        ),
        ("--ratio 1.5 --env-id starpilot", 2, "--ratio is 1.5; it must be above 0 and at most 1"),
        ("--checkpoint hostile.pt", 1, "hostile.pt is damaged, or not written by these scripts (UnpicklingError"),
        ("--checkpoint network.pt", 1, "network.pt does not fit"),
        ("--checkpoint CHECKPOINT --dataset-saving-dir a-file/d", 1, "a-file/d cannot be written"),
        ("--verify nowhere", 1, "nowhere/metadata.json does not exist"),
    ],
)
def test_bad_input_is_one_line(arguments, code, message, starpilot, bad_files, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    if "--checkpoint" in arguments and "--num-episodes" not in arguments:
        arguments += " --num-episodes 1"  # so that what is not refused ends soon
    before = sorted(bad_files.rglob("*"))
    process = run_main(collect_procgen, arguments.replace("CHECKPOINT", str(starpilot)).split(), bad_files)
    assert process.returncode == code
    assert_one_line(process.stderr, message)
    assert sorted(bad_files.rglob("*")) == before
