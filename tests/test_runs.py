"""The scripts as commands: every dataset, resuming, two processes, stops, and what they refuse."""
import importlib
import os
import signal
import socket
import subprocess
import sys
import time

import conftest
import pytest
import torch
from conftest import ROOT, TINY, refused, script, train_all

STAGES = ("tokenizer", "generator", "prior-masked", "prior-ar")


def flags_of(stage):
    name, *kind = stage.split("-")
    return name, [*(["--kind", *kind] if kind else []), *TINY[name]]


def weights(out, stage, dataset="shapes"):
    return torch.load(out / dataset / f"{stage}.pt", weights_only=True)


def same(a, b, path=""):
    """Deep equality, bit for bit, of nested checkpoints."""
    assert type(a) is type(b), path
    if torch.is_tensor(a):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}/{k}")
    else:
        assert a == b, path


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet", "folder"])
def test_every_script_runs_on_every_dataset(places, tmp_path, dataset):
    """A few steps of each stage, then pictures; shapes are covered by the other tests. The preset comes first, tiny flags override it."""
    out, where = tmp_path / "results of a run", ["--dataset", dataset, *places[dataset], "--image-size", "32"]
    script("data", *where, "--out", out)
    tokenizer_only = "--patch 8 --global-size 32 --local-size 16 --sem-read patches".split()
    if dataset == "cifar10":  # encoding all 60,000 images is the long part: the smallest network will do
        tokenizer_only += ["--width", "8"]
    script("tokenizer", *TINY["tokenizer"], *tokenizer_only, *where, "--out", out)
    script("generator", *TINY["generator"], "--patch", "8", "--stem", "2", *where, "--out", out)
    script("prior", "--kind", "masked", *TINY["prior"], "--dataset", dataset, "--out", out)
    script("sample", "infill", *where, "--out", out, "--rows", "1", "--sample-steps", "2")
    names = {path.name for path in (out / dataset).iterdir()}
    assert {"tokenizer.pt", "codes.npy", "codes.json", "tokenizer.json", "generator.pt", "generator-early.pt", "prior-masked.pt", "samples"} <= names
    assert (out / dataset / "samples" / "infill.png").stat().st_size > 1000


@pytest.mark.parametrize("stage", STAGES)
def test_stop_and_resume_equals_one_run_bit_for_bit(trained, tmp_path, stage):
    """SIGTERM in the middle of a run, then the same command again: weights, averages and optimizer are those of one run."""
    (name, flags), folder = flags_of(stage), tmp_path / "shapes"
    if name != "tokenizer":
        folder.mkdir(parents=True)
        for file in ("codes.npy", "codes.json", "tokenizer.pt"):
            os.link(trained / "shapes" / file, folder / file)
    extra = ["--dropout", "0.2"] if name == "prior" else ["--drop-path", "0.2", "--centering", "centre"] if name == "tokenizer" else []
    steps = ["--steps", "40", "--save-every", "3"]
    command = [*flags, *extra, *steps, "--out", tmp_path]
    process = subprocess.Popen([sys.executable, str(ROOT / f"{name}.py"), *map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (folder / f"{stage}.pt").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "stopped at step" in said and "Traceback" not in said, said
    stopped_at = weights(tmp_path, stage)["step"]
    assert 3 <= stopped_at < 40
    script(name, *command)
    resumed = weights(tmp_path, stage)
    script(name, *command, "--restart")
    whole = weights(tmp_path, stage)
    assert resumed["step"] == whole["step"] == 40
    for key in ("model", "ema", "optimizer"):
        same(resumed[key], whole[key], key)
    if stage == "prior-ar":  # a finished stage says so and changes nothing; other settings are named
        before = (folder / f"{stage}.pt").read_bytes()
        assert "is finished" in script(name, *command).stdout and (folder / f"{stage}.pt").read_bytes() == before
        refused(script(name, *command, "--width", "32", check=False), "width 16 → 32", "prior-ar.pt")


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(trained, tmp_path, stage):
    """The same global batch on one process and on two (gloo) gives the same weights up to rounding."""
    name, flags = flags_of(stage)
    flags = [*flags, "--steps", "3", "--batch-size", "16", "--dtype", "float32", "--lr-matrix", "0", "--lr", "1e-4"]
    for part in ("one", "two"):
        folder = tmp_path / part / "shapes"
        folder.mkdir(parents=True)
        for file in ("codes.npy", "codes.json", "tokenizer.pt") if name != "tokenizer" else ():
            os.link(trained / "shapes" / file, folder / file)
    script(name, *flags, "--out", tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port())
    script(name, *flags, "--out", tmp_path / "two", launcher=[str(x) for x in launcher])
    one, two = (weights(tmp_path / part, stage)["model"] for part in ("one", "two"))
    assert one.keys() == two.keys()
    start = weights(trained, stage)["model"]
    moved = sum((one[k] - start[k]).abs().sum() for k in one if one[k].is_floating_point() and one[k].shape == start[k].shape)
    assert moved > 0
    for k in one:  # Adam moves a weight by about lr a step whatever its gradient: rounding of a tiny one shows as a fraction of 3e-4
        assert (one[k] - two[k]).abs().max() < 1e-4, k


def test_accumulation_equals_one_batch(trained, tmp_path):
    for stage in ("generator", "prior-masked"):
        name, flags = flags_of(stage)
        results = []
        for parts in (1, 4):
            folder = tmp_path / f"{stage}{parts}" / "shapes"
            folder.mkdir(parents=True)
            for file in ("codes.npy", "codes.json", "tokenizer.pt"):
                os.link(trained / "shapes" / file, folder / file)
            script(name, *flags, "--dtype", "float32", "--lr-matrix", "0", "--lr", "1e-4", "--accumulate", parts, "--out", folder.parent)
            results.append(weights(folder.parent, stage)["model"])
        for k in results[0]:
            assert (results[0][k] - results[1][k]).abs().max() < 1e-4, k


def test_a_run_that_turns_to_nan_stops_and_keeps_the_last_checkpoint(trained, tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for file in ("codes.npy", "codes.json", "tokenizer.pt"):
        os.link(trained / "shapes" / file, folder / file)
    flags = [*TINY["prior"], "--kind", "ar", "--out", tmp_path, "--lr", "1e38", "--steps", "60", "--save-every", "1", "--clip", "1e30"]
    refused(script("prior", *flags, check=False), "step")
    assert all(torch.isfinite(v).all() for v in weights(tmp_path, "prior-ar")["model"].values())


def test_two_runs_on_one_folder_do_not_mix(trained, tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    import fcntl
    with open(folder / ".tokenizer.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(script("tokenizer", *TINY["tokenizer"], "--out", tmp_path, check=False), "another run")


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, flags, words", [
    ("tokenizer", ["--steps", "0"], ["--steps"]), ("tokenizer", ["--batch-size", "-4"], ["--batch-size"]),
    ("tokenizer", ["--dataset", "mnist"], ["--dataset"]), ("tokenizer", ["--heads", "5"], ["--heads", "--width"]),
    ("tokenizer", ["--codes", "30"], ["--codes", "patches"]), ("tokenizer", ["--global-size", "30"], ["--global-size", "--patch"]),
    ("tokenizer", ["--tau", "0"], ["--tau"]), ("tokenizer", ["--batch", "4"], ["--batch"]), ("tokenizer", ["--stem", "5"], ["--stem"]),
    ("tokenizer", ["--lr", "nan"], ["--lr"]), ("tokenizer", ["--image-size", "40"], ["--image-size"]), ("tokenizer", ["--momentum", "2"], ["--momentum"]),
    ("generator", ["--patch", "5"], ["--patch"]), ("generator", ["--drop", "x"], ["--drop"]), ("generator", ["--accumulate", "7"], ["--accumulate"]),
    ("prior", [], ["--kind"]), ("prior", ["--kind", "ar", "--heads", "3"], ["--heads"]), ("sample", [], ["say what to do"]),
    ("sample", ["paint"], ["paint"]), ("data", ["--download"], ["--download", "cifar10"])])
def test_wrong_flags_stop_with_exit_code_2(tmp_path, name, flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main([*flags, "--out", str(tmp_path)])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error:" in line and all(word in line for word in words), line


def test_missing_stages_are_named_with_the_command_that_trains_them(tmp_path, trained):
    for name, flags, words in (
            ("generator", TINY["generator"], ["codes.npy", "python tokenizer.py"]), ("prior", ["--kind", "ar"], ["codes.npy", "python tokenizer.py"]),
            ("sample", ["unconditional"], ["codes.npy", "python tokenizer.py"]), ("sample", ["reconstruct"], ["tokenizer.pt", "python tokenizer.py"])):
        refused(script(name, *flags, "--out", tmp_path, check=False), *words)
    folder = tmp_path / "shapes"
    for file in ("codes.npy", "codes.json", "tokenizer.pt"):
        os.link(trained / "shapes" / file, folder / file)
    refused(script("sample", "reconstruct", "--out", tmp_path, check=False), "generator.pt", "python generator.py")
    refused(script("sample", "unconditional", "--kind", "ar", "--out", tmp_path, check=False), "prior-ar.pt", "python prior.py --kind ar")
    for name, place in (("cifar10", "data/cifar10"), ("imagenet", "data/imagenet"), ("folder", "data/folder")):
        refused(script("tokenizer", "--dataset", name, "--out", tmp_path, cwd=tmp_path, check=False), place)


def test_stages_of_another_tokenizer_are_refused(trained, tmp_path):
    train_all(tmp_path, "--seed", "1", stages=("tokenizer",))
    for stage in ("generator", "prior-ar"):
        os.link(trained / "shapes" / f"{stage}.pt", tmp_path / "shapes" / f"{stage}.pt")
    refused(script("sample", "unconditional", "--kind", "ar", "--out", tmp_path, check=False), "prior-ar.pt", "other codes")
    refused(script("sample", "reconstruct", "--out", tmp_path, check=False), "generator.pt", "other codes")
    refused(script("generator", *TINY["generator"], "--out", tmp_path, check=False), "generator.pt", "other codes")


def test_pictures_that_do_not_open_and_folders_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    for path in ("broken.png", "missing.png"):
        refused(script("sample", "reconstruct", tmp_path / path, "--out", trained, check=False), path)
    (tmp_path / "file").write_text("")
    refused(script("data", "--out", tmp_path / "file", check=False), "cannot write", "--out")
