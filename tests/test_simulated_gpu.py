"""The scripts on a simulated GPU: what would fail on a real one fails here. See simulated_gpu.py."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from conftest import assert_one_line
from runs import ROOT, run_main

import collect_procgen
import ppo_procgen

# Three iterations of 64 steps, two of which are archived.
ON_GPU = [word for word in runs.SMALL if word != "--no-cuda"] + ["--total-timesteps", "192"]


def run_on_simulated_gpu(script, arguments, folder, **environment):
    """Run a script on the simulated GPU in a process of its own; its .counts are those of copies."""
    command = [sys.executable, str(Path(__file__).parent / "simulated_gpu.py"), str(ROOT / script), *arguments]
    environment = {**os.environ, **environment}
    folder.mkdir(exist_ok=True)
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    process.counts = json.loads(process.stdout.splitlines()[-1]) if process.stdout else {}
    return process


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of three iterations on the simulated GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    process = run_on_simulated_gpu("ppo_procgen.py", ON_GPU, folder)
    assert process.returncode == 0, process.stderr
    assert "fakegpu (model simulated, microbatch 1024" in process.stdout
    return folder, process.counts


def tensors(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        return [tensor for value in x for tensor in tensors(value)]
    return []


def test_a_run_trains_and_its_checkpoints_need_no_gpu(trained):
    folder, _ = trained
    paths = list(runs.run_dir(folder).rglob("*.pt"))
    assert len(paths) == 5  # rolling, three archived, final
    for path in paths:
        assert {tensor.device.type for tensor in tensors(runs.load(path))} == {"cpu"}
    with open(runs.run_dir(folder) / "progress.csv") as file:
        assert [float(row["losses/entropy"]) > 2 for row in csv.DictReader(file)] == [True] * 3


def test_a_run_on_a_gpu_resumes_exactly(trained, tmp_path):
    folder, _ = trained
    short = [*ON_GPU, "--total-timesteps", "128", "--archive-interval", "100"]
    assert run_on_simulated_gpu("ppo_procgen.py", short, tmp_path).returncode == 0
    process = run_on_simulated_gpu("ppo_procgen.py", [*ON_GPU, "--resume"], tmp_path)
    assert process.returncode == 0, process.stderr
    assert "note" not in process.stdout
    ours, expected = runs.final(tmp_path), runs.final(folder)
    for name in ("model_state_dict", "optimizer_state_dict"):
        assert runs.same(ours[name], expected[name])
    assert runs.progress(tmp_path) == runs.progress(folder)


def test_a_run_of_a_gpu_continues_on_a_cpu_and_says_so(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "models").symlink_to(folder / "models")
    path = runs.run_dir(folder) / "rolling" / "model.pt"
    before = path.read_bytes()
    try:
        process = runs.train(tmp_path, "--resume", "--total-timesteps", "256")
        assert process.returncode == 0, process.stderr
        assert "device was fakegpu, is cpu" in process.stdout
        assert runs.final(folder)["iteration"] == 4
    finally:
        path.write_bytes(before)


def test_the_number_of_copies_does_not_grow_with_the_number_of_minibatches(tmp_path):
    copies = []
    for xpid, sizes in (("few", "--num-minibatches 2"), ("many", "--num-minibatches 8 --update-epochs 2")):
        one = [*ON_GPU, *sizes.split(), "--total-timesteps", "64", "--num-eval-episodes", "1", "--xpid", xpid]
        process = run_on_simulated_gpu("ppo_procgen.py", one, tmp_path)
        (row,) = runs.progress(tmp_path, xpid)
        test_steps = int(float(row["charts/test_length"]))  # of a policy that is another one; each copies both ways
        counts = process.counts
        copies.append((counts["to the host"] - test_steps, counts["to the device"] - test_steps))
    assert counts["backward"] == 16
    assert copies[0] == copies[1]


def test_settings_that_change_the_last_bits_on_a_gpu_are_in_the_note(trained, tmp_path):
    more = [*ON_GPU, "--total-timesteps", "64"]
    assert run_on_simulated_gpu("ppo_procgen.py", more, tmp_path).returncode == 0
    more = [*ON_GPU, "--total-timesteps", "128", "--resume", "--no-torch-deterministic"]
    process = run_on_simulated_gpu("ppo_procgen.py", more, tmp_path)
    assert process.returncode == 0, process.stderr
    assert "note: " in process.stdout and "deterministic was True, is False" in process.stdout


def test_a_gpu_that_fails_loses_no_completed_iteration(tmp_path):
    """The state is on the host already: nothing can be read from the GPU any more."""
    arguments = [*ON_GPU, "--log-interval", "100"]  # nothing but the error saves
    process = run_on_simulated_gpu("ppo_procgen.py", arguments, tmp_path, SIMULATED_GPU_FAILS_AT="5")
    assert process.returncode == 1 and "illegal memory access" in process.stderr
    assert runs.load(runs.run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] == 2


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS"])
def test_a_slurm_job_whose_gpu_is_unusable_does_not_train_on_the_cpu_by_accident(variable, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv(variable, "0")
    process = run_main(ppo_procgen, ON_GPU, tmp_path)
    assert process.returncode == 2
    assert_one_line(process.stderr, "this Slurm job has GPU 0", "--no-cuda trains on the CPU")
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv(variable)  # a job without a GPU
    assert run_main(ppo_procgen, [*ON_GPU, "--total-timesteps", "64"], tmp_path).returncode == 0


def test_a_run_that_does_not_fit_into_the_gpu_is_one_line(tmp_path):
    process = run_on_simulated_gpu("ppo_procgen.py", ON_GPU, tmp_path, SIMULATED_GPU_LARGEST_TENSOR="500000")
    assert process.returncode == 1
    assert_one_line(process.stderr, "there is not enough memory", "--num-envs")


def collect_on_simulated_gpu(folder, tmp_path, **environment):
    (checkpoint,) = runs.run_dir(folder).glob("final/*.pt")
    options = ["--checkpoint", str(checkpoint), "--num-episodes", "4", "--num-envs", "4"]
    command = [*options, "--dataset-saving-dir", "dataset"]
    return checkpoint, run_on_simulated_gpu("collect_procgen.py", command, tmp_path, **environment)


def test_a_dataset_that_a_gpu_collected_is_verified_without_one(trained, tmp_path):
    folder, _ = trained
    checkpoint, process = collect_on_simulated_gpu(folder, tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "dataset" / "metadata.json").read_text())["device"] == "fakegpu"
    process = run_main(collect_procgen, ["--verify", "dataset", "--checkpoint", str(checkpoint)], tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr


def test_a_collection_that_does_not_fit_into_the_gpu_is_one_line(trained, tmp_path):
    folder, _ = trained
    _, process = collect_on_simulated_gpu(folder, tmp_path, SIMULATED_GPU_LARGEST_TENSOR="200000")
    assert process.returncode == 1
    assert_one_line(process.stderr, "the GPU has too little memory", "--num-envs")
