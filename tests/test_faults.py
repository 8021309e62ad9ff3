"""Faults, injected for real: kills, full and read-only disks, damaged and foreign files, a process that dies, hangs or meets a NaN, odd flags.

What must hold: a run goes on as if nothing had happened, or it stops with one line that names the file or flag; nothing is lost, and no
code in a file is run. Kills, mutations and flags are random; more of them by hand: pytest tests/test_faults.py --kills 50 --mutations 1000
"""
import fcntl
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import types

import conftest
import data
import generator
import numpy as np
import prior
import pytest
import sample
import test_sample
import text_prior
import tokenizer
import torch
from conftest import ENVIRONMENT, ROOT, TINY, call, command, ended, flags_of, link_codes, refuse, start, start_pair
from PIL import Image
from test_runs import STAGES, same, weights


def arguments(out, dataset="shapes", **more):
    return types.SimpleNamespace(dataset=dataset, out=str(out), data_dir=f"data/{dataset}", **more)


def prepare(trained, out, stage):
    """OUT with what a stage reads; returns its folder, script and flags."""
    folder = out / "shapes"
    folder.mkdir(parents=True) if stage == "tokenizer" else link_codes(trained, out)
    return (folder, *flags_of(stage))


def link_all(trained, out):
    """A new OUT with all that is in `trained`: files are replaced, never changed, so links will do. Returns its shapes folder."""
    return shutil.copytree(trained / "shapes", out / "shapes", copy_function=os.link)


def one_line(said):
    """The last thing said is one line, an error, and nothing else looks like one of Python's."""
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in said and "Exception ignored" not in said, said[-3000:]
    return line


def losses(folder, stage):
    """{step: [loss, gradient norm]} of a log, in which no step comes twice."""
    records = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    assert [record["step"] for record in records] == sorted({record["step"] for record in records})
    return {record["step"]: [record["loss"], record["norm"]] for record in records}


# ---------------------------------------------------------------------------------------------------------------------
# kills and stops
# ---------------------------------------------------------------------------------------------------------------------

def outcome(folder, stage):
    """All that a finished stage leaves, but for times and paths."""
    if stage == "sample":
        return {k: v for k, v in json.loads((folder / "inception.json").read_text()).items() if k not in ("seconds", "settings")}
    state = data.load_checkpoint(folder / f"{stage}.pt", stage, arguments(folder.parent))
    found = {key: value for key, value in state.items() if key != "config"} | {"losses": losses(folder, stage)}
    if stage == "tokenizer":
        found |= {"codes": (folder / "codes.npy").read_bytes(), "report": json.loads((folder / "tokenizer.json").read_text())}
    if stage == "generator":
        found["early"] = data.load_checkpoint(folder / "generator-early.pt", "generator-early", arguments(folder.parent))["ema"]
    return found


@pytest.mark.parametrize("stage", (*STAGES, "sample"))
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(trained, tmp_path, stage, request):
    """SIGKILL, then the same command again: what lies under a final name always loads, and the end is that of the unbroken run, bit for bit."""
    rng, kills, tries, net = random.Random(f"{request.config.getoption('--seed')} {stage}"), 0, 0, tmp_path / "inception.pt"

    def fresh(out):
        if stage != "sample":
            folder, name, flags = prepare(trained, out, stage)
            return folder, [name, *flags, "--steps", "24", "--save-every", "2", *(["--early", "0.5"] if stage == "generator" else []), "--out", out]
        torch.jit.script(test_sample.Net()).save(str(net)) if not net.exists() else None
        return link_all(trained, out), ["sample", "--score", "--inception", net, "--count", "1100", "--sample-steps", "1", "--out", out]

    folder, words = fresh(tmp_path / "whole")
    began = time.time()
    assert ended(start(tmp_path / "said", *words), tmp_path / "said")[0] == 0
    took, whole = time.time() - began, outcome(folder, stage)
    folder, words = fresh(tmp_path / "0")
    while kills < request.config.getoption("--kills"):
        process = start(tmp_path / "said", *words)
        process.join(rng.uniform(0, took))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            for path in folder.glob("*.pt"):
                data.load_checkpoint(path, path.stem, arguments(folder.parent))
        else:  # it was done: another from the start
            assert process.exitcode == 0, (tmp_path / "said").read_text()
            same(outcome(folder, stage), whole)
            tries += 1
            folder, words = fresh(tmp_path / str(tries))
    code, said = ended(start(tmp_path / "said", *words), tmp_path / "said")
    assert code == 0 and "Traceback" not in said, said
    same(outcome(folder, stage), whole)


def test_what_a_kill_leaves_is_never_read(trained, tmp_path):
    """Half a temporary file of a process that has ended is gone after the next run; one of a living process is left alone."""
    folder, name, flags = prepare(trained, tmp_path, "prior-ar")
    ended_before = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout.strip()
    left, alive = (folder / f".prior-ar.pt.{socket.gethostname()}.{pid}.tmp" for pid in (ended_before, os.getppid()))
    left.write_bytes(b"half a checkpoint"), alive.write_bytes(b"of a run that is writing it")
    call(name, *flags, "--out", tmp_path)
    assert not left.exists() and alive.exists() and weights(tmp_path, "prior-ar")["step"] == 6


def test_crops_resume_on_any_number_of_workers(places, tmp_path):
    """Files decoded and cropped by 2 workers, stopped in mid-epoch, by 1, and in one go by none: the same weights and losses, bit for bit."""
    flags = [*TINY["tokenizer"], *"--patch 8 --global-size 32 --local-size 16 --sem-read patches --steps 9 --drop-path 0.2 --save-every 100".split(),
             *"--jitter 0.4 0.4 0.2 0.1 --blur 0.5 0.5 0.5 --dataset imagenet --image-size 32".split(), *places["imagenet"]]
    ended(start(tmp_path / "said", "tokenizer", *flags, "--workers", "0", "--out", tmp_path / "whole"), tmp_path / "said")
    for workers, stop in ((2, 4), (1, 0)):
        code, said = ended(start(tmp_path / "said", "tokenizer", *flags, "--workers", workers, "--out", tmp_path / "cut", STOP_AFTER=stop), tmp_path / "said")
        assert code == (143 if stop else 0), said
    whole, cut = (weights(tmp_path / part, "tokenizer", "imagenet") for part in ("whole", "cut"))
    for key in ("model", "ema", "optimizer", "step"):
        same(whole[key], cut[key], key)
    assert losses(tmp_path / "whole" / "imagenet", "tokenizer") == losses(tmp_path / "cut" / "imagenet", "tokenizer")


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("stage, number", [("tokenizer", signal.SIGINT), ("generator", signal.SIGINT), ("prior-masked", signal.SIGTERM), ("text_prior", signal.SIGTERM)])
def test_a_signal_lets_the_step_end_and_saves(trained, tmp_path, stage, number):
    """Also with loader workers (the tokenizer's images lie in files), and Ctrl-C, which reaches these too, without a traceback; the
    generator is drawing its samples most of the time, after every step."""
    folder, name, flags = prepare(trained, tmp_path / "out", stage)
    flags = [*flags, "--steps", "100000", "--save-every", "1" if stage == "generator" else "3", "--out", tmp_path / "out"]
    if stage == "tokenizer":
        conftest.make_folder(tmp_path / "tree" / "train", 24), conftest.make_folder(tmp_path / "tree" / "val", 8)
        flags += "--patch 8 --global-size 32 --local-size 16 --sem-read patches --dataset imagenet --image-size 32 --workers 2 --data-dir".split() + [tmp_path / "tree"]
        folder = tmp_path / "out" / "imagenet"
    process = start(tmp_path / "said", name, *flags)
    wait_for((folder / f"{stage}.pt").exists)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = [int(pid) for pid in file.read().split()]
    assert len(workers) >= 2 or stage != "tokenizer"
    for pid in (process.pid, *(workers if number == signal.SIGINT else ())):
        os.kill(pid, number)
    code, said = ended(process, tmp_path / "said")
    assert code == 143 and re.search(r"stopped at step \d+ of 100000", said) and "Traceback" not in said, said
    assert data.load_checkpoint(folder / f"{stage}.pt", stage, arguments(tmp_path, folder.name))["step"] == int(re.search(r"at step (\d+)", said)[1])


def test_a_signal_before_the_first_step_ends_at_once(trained, tmp_path):
    """While the data are read (here for 60 seconds) there is nothing to save: no step is waited for, and nothing is written."""
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / number.name
        process = start(tmp_path / "said", "tokenizer", *TINY["tokenizer"], "--out", out, SLEEP="data.load_dataset 60")
        wait_for((out / "shapes" / ".tokenizer.lock").exists)
        time.sleep(0.2)  # the handlers are set after the lock
        os.kill(process.pid, number)
        code, said = ended(process, tmp_path / "said", within=10)
        assert code == 143 and said.startswith("stopped") and said.count("\n") == 1 and not (out / "shapes" / "tokenizer.pt").exists(), said


def test_torchrun_passes_sigterm_on_and_the_run_resumes(trained, tmp_path):
    """Both processes end with the same step, saved; the same command goes on from there."""
    folder, name, flags = prepare(trained, tmp_path, "prior-ar")
    words = command(name, *flags, "--steps", "100000", "--save-every", "5", "--out", tmp_path, launcher="-m torch.distributed.run --standalone --nproc-per-node 2".split())
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for((folder / "prior-ar.pt").exists)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "stopped at step" in said, said
    assert weights(tmp_path, "prior-ar")["step"] == int(re.search(r"stopped at step (\d+)", said)[1])


# ---------------------------------------------------------------------------------------------------------------------
# several processes
# ---------------------------------------------------------------------------------------------------------------------

LOSSES = {"tokenizer": "tokenizer.step_loss", "generator": "generator.flow_loss", "prior-masked": "prior.masked_nll", "prior-ar": "prior.ar_nll",
          "text_prior": "text_prior.text_nll"}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_in_one_process_stops_all_before_the_update(trained, tmp_path, stage, what):
    """Met by the second of two processes in its fourth step: both stop with the same line, and the last checkpoint is that of step 3."""
    folder, name, flags = prepare(trained, tmp_path / "out", stage)
    pair = start_pair(tmp_path / "said", name, *flags, "--save-every", "1", "--out", tmp_path / "out", POISON=f"{LOSSES[stage]} 1 4 {what}")
    for process, output in pair:
        code, said = ended(process, output)
        assert code == 1 and f"step 3: the {what}" in one_line(said), said
    state = weights(tmp_path / "out", stage)
    assert state["step"] == 3 and all(v.isfinite().all() for part in ("model", "ema") for v in state[part].values())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_stops_the_other(trained, tmp_path, number):
    folder, name, flags = prepare(trained, tmp_path / "out", "prior-ar")
    pair = start_pair(tmp_path / "said", name, *flags, "--steps", "100000", "--save-every", "3", "--out", tmp_path / "out", TIMEOUT=3)
    wait_for((folder / "prior-ar.pt").exists)
    os.kill(pair[1][0].pid, number)
    code, said = ended(*pair[0], within=20)
    pair[1][0].kill()
    assert code == 1 and "another process" in one_line(said), said
    assert weights(tmp_path / "out", "prior-ar")["step"] >= 3


def test_waiting_for_the_chunks_of_another_process_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    run = types.SimpleNamespace(rank=0, world=2, bar=False, asked=lambda: False, wait=lambda: None)
    with pytest.raises(SystemExit, match="000001.npz.*no other process"):
        data.in_chunks(tmp_path / ".parts", 4, run, lambda rows: {"x": np.arange(len(rows))}, size=2)


def test_pictures_of_an_unfinished_stage_say_so(trained, tmp_path):
    """The generator stopped after 4 of 9 steps is used with a note; the early checkpoint of the one before it is not its earlier self."""
    folder, (name, flags), said = link_codes(trained, tmp_path), flags_of("generator"), tmp_path / "said"
    call(name, *flags, "--out", tmp_path)
    assert (folder / "generator-early.pt").exists()
    words = [name, *flags, "--steps", "9", "--early", "1", "--out", tmp_path]
    assert ended(start(said, *words, "--restart", STOP_AFTER=4), said)[0] == 143
    refuse("sample", "reconstruct", "--guide", "early", "--out", tmp_path, words=["generator-early.pt is not an earlier self", "steps, early", "--restart"])
    for note in (True, False):
        code, text = ended(start(said, "sample", "reconstruct", "--rows", "1", "--sample-steps", "1", "--out", tmp_path), said)
        assert code == 0 and ("generator.pt is not finished (step 4 of 9)" in text) == note, text
        call(*words)


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_on_the_same_folder_is_refused(trained, tmp_path, stage):
    folder, name, flags = prepare(trained, tmp_path, stage)
    with open(folder / f".{stage}.lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        code, said = ended(start(tmp_path / "said", name, *flags, "--out", tmp_path), tmp_path / "said")
        assert code == 1 and all(word in one_line(said) for word in ("another run", stage, "--out")), said
    call(name, *flags, "--out", tmp_path)


def test_waiting_threads_are_told_to_sleep_before_torch_starts_them():
    """Whichever script comes first. (What two runs on the same cores cost each other is measured by hand: the README.)"""
    code = ("import sys; sys.modules['torch'] = None\ntry:\n    import {}\nexcept ImportError:\n    import os; print(os.environ.get('OMP_WAIT_POLICY'))")
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "OMP_WAIT_POLICY"}
    for name in ("data", "tokenizer", "generator", "prior", "text_prior", "sample"):
        done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.stdout == "PASSIVE\n", (name, done.stdout, done.stderr)


CORES_OF = """
import os, sys, torch, data
args = data.parse(data.make_parser(""), {}, ["--out", sys.argv[1]])
run, cores = data.Run(args), lambda thread=0: sorted(os.sched_getaffinity(int(thread)))
class Item(torch.utils.data.Dataset):
    __len__, __getitem__ = lambda self: 1, lambda self, k: cores()
threads = {thread: cores(thread) for thread in os.listdir("/proc/self/task")}
print(torch.get_num_threads(), sorted(own[0] for own in threads.values() if len(own) == 1),
      next(iter(torch.utils.data.DataLoader(Item(), batch_size=None, num_workers=1, worker_init_fn=data.begin_worker))))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores")
def test_two_runs_share_every_core_and_workers_are_free(tmp_path):
    """Each thread of a run with as many threads as cores is held on a core of its own; with fewer threads none is; loader workers use all cores."""
    cores = sorted(os.sched_getaffinity(0))
    for threads in (len(cores), 1):
        done = subprocess.run([sys.executable, "-c", CORES_OF, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env={**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)})
        assert done.stdout == f"{threads} {cores if threads > 1 else []} {cores}\n", done.stderr


def test_compiling_without_a_compiler_is_said_and_left_out(trained, tmp_path):
    for name in ("plain", "compiled"):
        link_codes(trained, tmp_path / name)
    call("prior", "--kind", "ar", *TINY["prior"], "--out", tmp_path / "plain")
    words = command("prior", "--kind", "ar", *TINY["prior"], "--compile", "--out", tmp_path / "compiled")
    done = subprocess.run(words, capture_output=True, text=True, env={**ENVIRONMENT, "PATH": str(tmp_path / "empty"), "CXX": "no-such-compiler"})
    assert done.returncode == 0 and done.stderr.count("no C++ compiler found") == 1, done.stderr
    same(*(weights(tmp_path / name, "prior-ar")["model"] for name in ("plain", "compiled")))


@pytest.mark.skipif(not data._has_compiler(), reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_run_leaves_the_same_checkpoint(trained, tmp_path):
    """The same keys, the same weights up to rounding, and it goes on without being compiled."""
    flags = ["--kind", "ar", *TINY["prior"], "--dtype", "float32"]
    for name in ("plain", "compiled"):
        link_codes(trained, tmp_path / name)
    call("prior", *flags, "--out", tmp_path / "plain")
    assert ended(start(tmp_path / "said", "prior", *flags, "--compile", "--out", tmp_path / "compiled", STOP_AFTER=4), tmp_path / "said", within=200)[0] == 143
    call("prior", *flags, "--out", tmp_path / "compiled")
    plain, compiled = (weights(tmp_path / name, "prior-ar") for name in ("plain", "compiled"))
    assert plain["model"].keys() == compiled["model"].keys()
    assert all((value - compiled["ema"][k]).abs().max() < 1e-3 for k, value in plain["ema"].items())


# ---------------------------------------------------------------------------------------------------------------------
# disks
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    """An own file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)])


def fill(folder, leave):
    """Fill the file system but for `leave` bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - leave))


@pytest.mark.parametrize("stage", (*STAGES, "sample"))
def test_a_full_disk_costs_nothing(trained, tmp_path, disk, stage):
    """It stops with a line that names the file; what was there is as it was, no half file is left, and with room it goes on."""
    folder, (name, flags) = disk / "shapes", ("sample", ["unconditional", "--rows", "1", "--sample-steps", "1"]) if stage == "sample" else flags_of(stage)
    folder.mkdir()
    for path in (trained / "shapes").glob("*.*"):
        if path.name in ("codes.npy", "codes.json", "tokenizer.pt") and stage != "tokenizer" or stage == "sample" and path.suffix == ".pt":
            shutil.copy(path, folder)
    flags, said = [*flags, "--out", disk], tmp_path / "said"
    if stage != "sample":
        flags += ["--save-every", "2"]
        assert ended(start(said, name, *flags, STOP_AFTER=2), said)[0] == 143
    before = {path.name: path.read_bytes() for path in folder.glob("*.*") if path.suffix != ".jsonl"}
    for leave in (0, 8192):
        fill(disk, leave)
        code, text = ended(start(said, name, *flags), said)
        assert code == 1 and str(folder) in one_line(text) and "Make room" in text, text
        assert {path.name: path.read_bytes() for path in folder.glob("*.*") if path.suffix != ".jsonl"} == before
        (disk / "filler").unlink()
    code, text = ended(start(said, name, *flags), said)
    assert code == 0, text


def test_a_read_only_disk_is_named_before_the_first_step(trained, disk):
    link_codes_to = disk / "shapes"
    link_codes_to.mkdir()
    for name in ("codes.npy", "codes.json", "tokenizer.pt"):
        shutil.copy(trained / "shapes" / name, link_codes_to)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for stage in STAGES:
        name, flags = flags_of(stage)
        refuse(name, *flags, "--out", disk, words=["cannot write", disk, "--out"])
    refuse("data", "--out", disk, words=["cannot write", disk]), refuse("sample", "unconditional", "--out", disk, words=["cannot write", disk])


# ---------------------------------------------------------------------------------------------------------------------
# files of ours: checkpoints, codes, parts
# ---------------------------------------------------------------------------------------------------------------------

LOADERS = {"tokenizer": lambda args: tokenizer.load_tokenizer(args, "cpu"), "generator": lambda args: generator.load_generator(args, "cpu"),
           "prior-masked": lambda args: prior.load_prior(args, "masked", "cpu"), "prior-ar": lambda args: prior.load_prior(args, "ar", "cpu"),
           "text_prior": lambda args: text_prior.load_text_prior(args, "cpu")}


@pytest.mark.parametrize("stage", STAGES)
def test_damaged_checkpoints_are_refused_by_who_reads_and_who_resumes(trained, tmp_path, stage):
    folder, args = link_all(trained, tmp_path), arguments(tmp_path, vae=None)
    path, (name, flags) = folder / f"{stage}.pt", flags_of(stage)
    whole = path.read_bytes()
    for broken in (whole[:len(whole) // 2], b"", bytes(len(whole)), b"PK\x03\x04" + whole[4:4000]):
        path.unlink(), path.write_bytes(broken)
        with pytest.raises(SystemExit, match=f"^error: .*{stage}.pt: not a readable checkpoint"):
            LOADERS[stage](args)
        refuse(name, *flags, "--out", tmp_path, words=[f"{stage}.pt", "--restart"])
        assert path.read_bytes() == broken  # not touched
    call(name, *flags, "--out", tmp_path, "--restart")
    LOADERS[stage](args)


def test_any_flipped_byte_is_refused_or_harmless(trained, tmp_path, request):
    """Whatever byte of a checkpoint is changed: it is refused, or loads the same values (a byte that nothing reads)."""
    path, args, rng = tmp_path / "prior-ar.pt", arguments(tmp_path), random.Random(request.config.getoption("--seed"))
    whole = (trained / "shapes" / "prior-ar.pt").read_bytes()
    path.write_bytes(whole)
    good, refused, tries = data.load_checkpoint(path, "prior-ar", args), 0, request.config.getoption("--mutations")
    for _ in range(tries):
        at, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
        try:
            same(data.load_checkpoint(path, "prior-ar", args), good)
        except SystemExit as problem:
            assert "prior-ar.pt" in str(problem)
            refused += 1
    assert refused > 0.2 * tries  # the rest is padding between its parts


class Bomb:
    """A pickle that, loaded as any pickle, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_file_can_run_code(trained, tmp_path):
    """Pickles in checkpoints, parts of sharded ones, codes, kept parts and weights: refused, nothing executed."""
    folder, executed = link_all(trained, tmp_path), tmp_path / "executed"
    args, bomb = arguments(tmp_path, vae=None), Bomb(executed)
    for stage in STAGES:
        path = folder / f"{stage}.pt"
        path.unlink(), torch.save({**weights(trained, stage), "bomb": bomb}, path)
        with pytest.raises(SystemExit, match=f"{stage}.pt: not a readable"):
            LOADERS[stage](args)
        refuse(flags_of(stage)[0], *flags_of(stage)[1], "--out", tmp_path, words=[f"{stage}.pt"])
        path.unlink(), os.link(trained / "shapes" / path.name, path)
    (folder / "codes.npy").unlink(), np.save(folder / "codes.npy", np.array([bomb], dtype=object), allow_pickle=True)
    with pytest.raises(SystemExit, match="codes.npy"):
        data.open_codes(args)
    np.savez(tmp_path / "part.npz", codes=np.array([bomb], dtype=object))
    with pytest.raises(SystemExit, match="damaged part"):
        data.read_chunk(tmp_path / "part.npz")
    torch.save({"x": bomb}, tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match="weights.pth"):
        data.read_weights(tmp_path / "weights.pth")
    shards = tmp_path / "shapes" / "text_prior-000000006-1of1.pt"
    torch.save({"bomb": bomb}, shards)
    with pytest.raises(SystemExit, match="1of1"):
        data.load_shards(folder / "text_prior.pt", {"shards": [shards.name], "stage": "text_prior"}, args, None, None, None)
    assert not executed.exists()
    torch.load(shards, weights_only=False)
    assert executed.exists()  # the bomb was a real one


def test_checkpoints_of_other_stages_sizes_and_datasets_are_refused(trained, tmp_path):
    folder = link_all(trained, tmp_path)
    os.replace(folder / "prior-ar.pt", folder / "prior-masked.pt")
    refuse("sample", "unconditional", "--out", tmp_path, words=["prior-masked.pt", "found prior-ar"])
    refuse("prior", "--kind", "masked", *TINY["prior"], "--out", tmp_path, words=["prior-masked.pt", "found prior-ar"])
    for stage, change, words in (("tokenizer", ["--codes", "32"], ["codes 16 → 32"]), ("tokenizer", ["--values", "8"], ["values 4 → 8"]),
                                 ("generator", ["--depth", "2"], ["depth 1 → 2"]), ("text_prior", ["--width", "32"], ["width 16 → 32"])):
        name, flags = flags_of(stage)
        refuse(name, *flags, *change, "--out", tmp_path, words=[f"{stage}.pt", *words])
    (tmp_path / "cifar10").mkdir()
    os.link(folder / "generator.pt", tmp_path / "cifar10" / "generator.pt")
    with pytest.raises(SystemExit, match="trained on shapes, expected cifar10"):
        generator.load_generator(arguments(tmp_path, "cifar10", vae=None), "cpu")


def spoil(value, rng):
    """A nested value in which one thing, at any depth, is missing or of another kind."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        copy = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.3:
            del copy[key]
        else:
            copy[key] = spoil(copy[key], rng)
        return copy
    return rng.choice([None, True, -1, 0, 3, 10 ** 30, 0.5, "", "x", "a" * 5000, "\ud800", "\0", [], {}, [[]], {"x": 1}, [None] * 3])


@pytest.mark.parametrize("stage", (*STAGES, "judge"))
def test_checkpoints_of_another_version_are_refused(trained, tmp_path, stage, request, monkeypatch):
    """Whole files in which something is missing or of another kind: what older or changed scripts may have written."""
    rng, args = random.Random(f"{request.config.getoption('--seed')} {stage}"), arguments(tmp_path, vae=None, seed=0, image_size=32, steps=6)
    folder = link_all(trained, tmp_path)
    path = folder / f"{stage}.pt"
    if stage == "judge":
        dataset = types.SimpleNamespace(factors={"a": [0, 1]}, checksum="x")
        judge = sample.Judge([2], 32)
        data.save_checkpoint(path, stage="judge", config={"dataset": "shapes"}, step=1, trained_on={"images": "x", "image size": 32}, ema=judge.state_dict())
        run = types.SimpleNamespace(folder=folder, device="cpu")
        monkeypatch.setattr(sample, "train_judge", lambda *args: judge)  # one of other images is trained again
        read = lambda args: sample.load_judge(dataset, args, run)
    else:
        read = LOADERS[stage]
    whole, refused = torch.load(path, weights_only=True), 0
    read(args)
    for _ in range(request.config.getoption("--mutations") // 3):
        state = spoil(whole, rng)
        path.unlink(), torch.save(state, path)
        try:
            read(args)
        except SystemExit as problem:
            refused += 1
            assert str(problem).startswith("error: ") and f"{stage}.pt" in str(problem), problem
        if isinstance(state, dict) and state.get("stage") == stage and stage != "judge":  # and who resumes finds the difference, or goes on
            try:
                data.resume(path, stage, types.SimpleNamespace(**{**whole["config"], "out": str(tmp_path), "restart": False}), **whole["trained_on"])
            except SystemExit as problem:
                assert str(problem).startswith("error: "), problem
    assert refused


def test_codes_of_changed_images_are_refused(tmp_path):
    """A picture renamed, exchanged or repainted after the codes were made: no stage pairs old codes with other images."""
    folder = conftest.make_folder(tmp_path / "pictures")
    where = ["--dataset", "folder", "--data-dir", folder, "--image-size", "32", "--out", tmp_path]
    train = ["tokenizer", *TINY["tokenizer"], "--patch", "8", "--global-size", "32", "--local-size", "16", *where]
    Image.new("RGB", (40, 40)).save(folder / "cats" / "9.png", compress_level=0)
    size = (folder / "cats" / "9.png").stat().st_size
    call(*train)

    def repaint():
        Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(folder / "cats" / "9.png", compress_level=0)
        assert (folder / "cats" / "9.png").stat().st_size == size

    for change in (lambda: (folder / "cats" / "1.png").rename(folder / "cats" / "100.png"), repaint,
                   lambda: shutil.copy(folder / "cats" / "3.png", folder / "cats" / "5.png")):
        change()
        lines = [json.dumps({"file_name": str(p.relative_to(folder)), "text": "x"}) for p in sorted(folder.rglob("*.png"))]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        for words in (["generator", *TINY["generator"], "--patch", "8"], ["text_prior", *TINY["text_prior"]], ["sample", "--score"]):
            refuse(*words, *where, words=["codes.npy", "other images", "python tokenizer.py"])
        call(*train)  # encodes them
        call("generator", *TINY["generator"], "--patch", "8", *where, "--restart")
    refuse("tokenizer", *train[1:], "--steps", "7", words=["steps 6 → 7"])
    run = tmp_path / "begun"
    assert ended(start(tmp_path / "said", *train[:-1], run, STOP_AFTER=2), tmp_path / "said")[0] == 143
    (folder / "cats" / "7.png").rename(folder / "cats" / "200.png")
    (folder / "metadata.jsonl").unlink()
    refuse(*train[:-1], run, words=["begun on other images"])


def test_damaged_parts_are_removed_and_made_again(trained, tmp_path, run):
    run.asked, run.wait = lambda: False, lambda: None
    work = lambda rows: {"x": np.arange(rows.start, rows.stop)}
    paths = data.in_chunks(tmp_path / ".parts", 10, run, work, size=4)
    whole = paths[1].read_bytes()
    at = whole.index(np.arange(4, 8).tobytes()) + 9
    for broken in (whole[:-5], b"", bytes(100), whole[:at] + b"\x01" + whole[at + 1:]):
        paths[1].write_bytes(broken)
        with pytest.raises(SystemExit, match="000001.npz: a damaged part"):
            data.join_chunks(paths, "x", 10, tmp_path / "x.npy")
        assert not (tmp_path / "x.npy").exists() and not paths[1].exists()
        data.in_chunks(tmp_path / ".parts", 10, run, work, size=4)
    data.join_chunks(paths, "x", 10, tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(10))


# ---------------------------------------------------------------------------------------------------------------------
# files of others: every reader, mutated inputs
# ---------------------------------------------------------------------------------------------------------------------

def mutate(blob, rng):
    """Bytes with a few random changes: bits flipped, parts cut out, doubled, moved or overwritten, the end cut off."""
    blob = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not blob:
            break
        at, size = rng.randrange(len(blob)), rng.choice((1, 2, 4, 16, 256))
        kind = rng.randrange(7)
        if kind < 2:
            blob[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            blob[at:at + size] = bytes(rng.choice((0, 255, 127, 128, rng.randrange(256))) for _ in blob[at:at + size])
        elif kind == 3:
            del blob[at:at + size]
        elif kind == 4:
            blob[at:at] = blob[at:at + size] * rng.choice((1, 3))
        elif kind == 5:
            to = rng.randrange(len(blob))
            blob[to:to + size] = blob[at:at + size]
        elif rng.random() < 0.3:
            del blob[at:]
    return bytes(blob)


def picture_readers(folder):
    """Images of every format and mode."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    modes = {"rgb.png": rgb, "palette.png": rgb.convert("P"), "alpha.png": rgb.convert("RGBA"), "grey.png": rgb.convert("LA"), "one.png": rgb.convert("1"),
             "deep.png": Image.fromarray(rng.integers(0, 65536, (20, 24), dtype=np.uint16)), "a.jpg": rgb, "cmyk.jpg": rgb.convert("CMYK"), "a.webp": rgb,
             "a.gif": rgb, "a.bmp": rgb, "a.tif": rgb, "packed.tif": rgb, "float.tif": Image.fromarray(rng.random((20, 24), dtype=np.float32)), "a.ppm": rgb}
    for name, image in modes.items():
        image.save(folder / name, **({"compression": "tiff_lzw"} if name == "packed.tif" else {}))

    def read(path):
        files = data.ImageFiles([path], 16)
        try:
            crops = files.read(0, lambda path: data.read_crops(path, [(8, (0.3, 1.0))], 0.75, torch.full((1, 5), 0.5)))
        except data.Unreadable as problem:  # as data.command ends
            data.fail(problem)
        assert files[0].shape == (3, 16, 16) and crops[0].shape == (3, 8, 8)

    return {name: (folder / name, read) for name in modes}


def text_readers(folder, trained):
    """Captions, prompts, encodings."""
    conftest.make_folder(folder / "pictures", 3)
    captions = "".join(json.dumps({"file_name": f"{'cats' if k % 2 else 'big dögs'}/{k}.png", "text": f"picture {k}, näher"}) + "\n" for k in range(3))
    (folder / "pictures" / "metadata.jsonl").write_text(captions, encoding="utf-8")
    (folder / "prompts.txt").write_text("a red ring\n\nein großer Kreis\n", encoding="utf-8")
    ranks = text_prior.learn_merges(["a small red ring on a dotted background"] * 3)
    (folder / "a.tiktoken").write_text(text_prior.Text(ranks, text_prior.PATTERN).state()["ranks"])
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {b: chr(b) for b in plain} | {b: chr(256 + k) for k, b in enumerate(sorted(set(range(256)) - set(plain)))}
    vocab = {letter[b]: k for k, b in enumerate(range(256))} | {"ab": 256, "abc": 257}
    (folder / "tokenizer.json").write_text(json.dumps({
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "c"]]}, "normalizer": {"type": "NFC"}, "added_tokens": [{"content": "<|endoftext|>", "id": 258}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": r" ?\w+| ?[^\w\s]+|\s+"}}, {"type": "ByteLevel"}]}}))

    def encode(path):
        text = text_prior.build_text(str(path), ["abc def", "Ünder  the\tsea"])
        assert text.decode(text.encode(["abc, def"])[0]) == "abc, def" and text.state()

    def caption(path):
        found = data.read_captions(path.parent, data.list_files(path.parent))
        text = text_prior.build_text("captions", list(found.values()))
        assert text.rows(text.encode(list(found.values()))).shape[0] == len(found)

    prompts = types.SimpleNamespace(inputs=[], prompts=folder / "prompts.txt")
    return {"metadata.jsonl": (folder / "pictures" / "metadata.jsonl", caption), "a.tiktoken": (folder / "a.tiktoken", encode),
            "tokenizer.json": (folder / "tokenizer.json", encode), "prompts.txt": (folder / "prompts.txt", lambda path: sample.read_prompts(prompts, None))}


def own_readers(folder, trained):
    """Codes, checkpoints, reports, logs, kept parts, lists of broken images, weights, autoencoder folders."""
    out = link_all(trained, folder)
    args = arguments(folder, vae=None)
    weights_file = {"w": torch.arange(20.0), "b": torch.zeros(3)}
    torch.save(weights_file, folder / "w.pth")
    (folder / "w.index.json").write_text(json.dumps({"weight_map": {"w": "w.pth", "b": "w.pth"}}))
    np.savez(folder / "part.npz", x=np.arange(50), y=np.zeros((3, 4), np.uint8))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 16], "scaling_factor": 0.18}))
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"weights")
    conftest.make_folder(folder / "pictures-2", 20)
    listing = types.SimpleNamespace(dataset="folder", data_dir=str(folder / "pictures-2"), out=str(folder), image_size=16, workers=0)
    data.load_folder(listing)
    main = types.SimpleNamespace(folder=out, main=True)
    readers = {f"{stage}.pt": (out / f"{stage}.pt", lambda path, stage=stage: LOADERS[stage](args)) for stage in STAGES}
    for name in ("codes.npy", "codes.json"):
        readers[name] = out / name, lambda path: data.open_codes(args)
    return readers | {
        "tokenizer.json (report)": (out / "tokenizer.json", lambda path: data.read_json(path, "make it again")),
        "prior-ar.jsonl": (out / "prior-ar.jsonl", lambda path: data.Log(main, "prior-ar", 6)),
        "w.pth": (folder / "w.pth", data.read_weights), "w.index.json": (folder / "w.index.json", data.read_weights),
        "part.npz": (folder / "part.npz", data.read_chunk), "config.json": (folder / "vae" / "config.json", lambda path: generator.read_vae(path.parent)),
        "files.json": (folder / "folder" / "files.json", lambda path: data.load_folder(listing))}


def archive_readers(folder, monkeypatch):
    """A CIFAR-10 archive of a few images, the checksum of which is taken for right, so that the reader itself is tried; and loose .bin files."""
    monkeypatch.setattr(data, "CIFAR_BYTES", 3073 * 4)  # four records a file
    rng = np.random.default_rng(0)
    parts = {name: rng.integers(0, 10, 3073 * 4, dtype=np.uint8).tobytes() for name in data.CIFAR_FILES}
    (folder / "loose").mkdir(), (folder / "tar").mkdir()
    with tarfile.open(folder / "tar" / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, part in parts.items():
            (folder / "loose" / name).write_bytes(part)
            about = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            about.size = len(part)
            tar.addfile(about, io.BytesIO(part))

    def read(path):
        if path.suffix == ".gz":
            monkeypatch.setattr(data, "CIFAR_MD5", data.hashlib.md5(path.read_bytes()).hexdigest())
        assert len(data.load_cifar10(types.SimpleNamespace(dataset="cifar10", data_dir=str(path.parent), image_size=32))) == 24

    return {"cifar-10-binary.tar.gz": (folder / "tar" / "cifar-10-binary.tar.gz", read), "test_batch.bin": (folder / "loose" / "test_batch.bin", read)}


@pytest.mark.parametrize("kind", ["pictures", "texts", "ours", "archives"])
def test_mutated_files_are_read_or_refused_with_one_line(trained, tmp_path, monkeypatch, request, kind):
    """Every reader, on files that were changed at random: never another exception, a hang, or memory without measure."""
    readers = {"pictures": lambda: picture_readers(tmp_path), "texts": lambda: text_readers(tmp_path, trained),
               "ours": lambda: own_readers(tmp_path, trained), "archives": lambda: archive_readers(tmp_path, monkeypatch)}[kind]()
    rng, count = random.Random(f"{request.config.getoption('--seed')} {kind}"), request.config.getoption("--mutations")
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    hung = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("a reader hangs")))
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), limits[1]))
    tally = {}
    try:
        for name, (path, read) in readers.items():
            whole = path.read_bytes()
            path.unlink(), path.write_bytes(whole)  # it may be a link to a file of other tests
            read(path)
            for _ in range(count):
                changed = mutate(whole, rng)
                if path.suffix == ".json" and rng.random() < 0.5:
                    changed = json.dumps(spoil(json.loads(whole), rng)).encode()
                path.write_bytes(changed)
                signal.alarm(20)
                try:
                    read(path)
                    verdict = "read"
                except SystemExit as problem:
                    verdict, line = "refused", str(problem)
                    assert line.startswith("error: ") and "\n" not in line and len(line) < 3000, line
                except BaseException:
                    print(f"{name}: {changed[:2000]!r}")
                    raise
                finally:
                    signal.alarm(0)
                tally[name, verdict] = tally.get((name, verdict), 0) + 1
            path.write_bytes(whole)
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, hung)
    assert all(sum(count for (_, verdict), count in tally.items() if verdict == which) for which in ("read", "refused")), tally
    print(kind, tally)


def test_odd_images_are_read_right_or_named(tmp_path, capsys):
    """A picture of 200 megapixels, a program in PostScript, text, nothing and half a JPEG under the names of images; links that lead round."""
    folder = conftest.make_folder(tmp_path / "in", 40)
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill showpage\n%%EOF\n")
    (folder / "text.png").write_text("hello"), (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:300]), (folder / "whole.jpg").unlink()
    (folder / "round").symlink_to(folder), (folder / "cats" / "lost.png").symlink_to(tmp_path / "nowhere")
    conftest.make_folder(tmp_path / "elsewhere", 6)
    (tmp_path / "elsewhere" / "metadata.jsonl").unlink()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    args = types.SimpleNamespace(dataset="folder", data_dir=str(folder), out=str(tmp_path), image_size=16, workers=0)
    dataset = data.load_folder(args)
    said = capsys.readouterr().err
    assert len(dataset) == 46 and said.count("\n") == 1 and all(name in said for name in ("5 of 51", "huge.png", "script.png", "text.png", "empty.jpg", "cut.jpg")), said
    assert "linked" in dataset.factors["class"]
    for path in folder.rglob("*.png"):
        path.unlink() if not path.is_symlink() else None
    (folder / "linked").unlink(), (folder / "metadata.jsonl").unlink()
    with pytest.raises(SystemExit, match="none of its 2 files opens"):
        data.load_folder(args)


def test_an_archive_with_links_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    """Links, devices, paths that lead out, a cut archive: even if their checksum were right, nothing reaches the disk."""
    folder = tmp_path / "data"
    folder.mkdir()
    archive = folder / "cifar-10-binary.tar.gz"

    def member(name, kind, target=""):
        about = tarfile.TarInfo(name)
        about.type, about.linkname = kind, target
        return about

    for members in ([member(f"cifar-10-batches-bin/{name}", tarfile.SYMTYPE, "/etc/passwd") for name in data.CIFAR_FILES],
                    [member(f"cifar-10-batches-bin/{name}", tarfile.CHRTYPE) for name in data.CIFAR_FILES],
                    [member("../escaped", tarfile.REGTYPE), member(str(tmp_path / "absolute"), tarfile.REGTYPE)]):
        with tarfile.open(archive, "w:gz") as tar:
            [tar.addfile(about, io.BytesIO()) for about in members]
        refuse("data", "--dataset", "cifar10", "--data-dir", folder, "--out", tmp_path / "out", words=["cifar-10-binary.tar.gz", "md5"])
        monkeypatch.setattr(data, "CIFAR_MD5", data.hashlib.md5(archive.read_bytes()).hexdigest())
        refuse("data", "--dataset", "cifar10", "--data-dir", folder, "--out", tmp_path / "out", words=["cifar-10-binary.tar.gz"])
    assert [path.name for path in folder.iterdir()] == [archive.name] and not (tmp_path / "escaped").exists() and not (tmp_path / "absolute").exists()


# ---------------------------------------------------------------------------------------------------------------------
# network, flags, paths
# ---------------------------------------------------------------------------------------------------------------------

def test_nothing_on_the_default_path_needs_a_network_nor_plain_paths(tmp_path):
    """All stages and pictures in a network namespace without interfaces, under a path with spaces, quotes and other alphabets."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace needs root")
    out, picture = tmp_path / "mes résultats 'neu' 数据", tmp_path / "ein schönes Bild.png"
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(picture)
    words = []
    for stage in STAGES:
        name, flags = flags_of(stage)
        words += ["+", name, *flags, "--out", out]
    for pictures in (["unconditional"], ["reconstruct", picture], ["text", "a red ring"]):
        words += ["+", "sample", *pictures, "--rows", "1", "--columns", "1", "--sample-steps", "1", "--out", out]
    done = subprocess.run(["unshare", "-n", *command(*words[1:])], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.stem for path in (out / "shapes" / "samples").glob("*.png")} >= {"unconditional-masked", "reconstruct", "text"}
    done = subprocess.run(["unshare", "-n", *command("data", "--dataset", "cifar10", "--download", "--data-dir", tmp_path / "c", "--out", out)], capture_output=True,
                          text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 1 and str(tmp_path / "c" / "cifar-10-binary.tar.gz") in one_line(done.stderr)


@pytest.mark.parametrize("signal_sent", [False, True])
def test_a_picture_or_a_worker_that_vanishes_ends_the_run_with_one_line(tmp_path, signal_sent):
    """A file is removed while workers decode, or one of these is killed: no traceback, no hang, and the lock is free at once."""
    folder, said = conftest.make_folder(tmp_path / "tree" / "train", 24), tmp_path / "said"
    conftest.make_folder(tmp_path / "tree" / "val", 8)
    words = ["tokenizer", *TINY["tokenizer"], *"--patch 8 --global-size 32 --local-size 16 --sem-read patches --dataset imagenet --image-size 32 --workers 2 "
             "--save-every 3 --steps 100000 --data-dir".split(), tmp_path / "tree", "--out", tmp_path / "out"]
    process = start(said, *words)
    wait_for((tmp_path / "out" / "imagenet" / "tokenizer.pt").exists)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = [int(pid) for pid in file.read().split()]
    os.kill(workers[0], signal.SIGKILL) if signal_sent else (folder / "cats" / "1.png").unlink()
    code, text = ended(process, said)
    assert code == 1 and ("decodes images" if signal_sent else "1.png: does not open") in one_line(text) and text.count("\n") <= 2, text
    process = start(said, *words, "--steps", "100001")  # other settings: refused after the lock, which is looked at first
    assert ("100000 → 100001" if signal_sent else "metadata.jsonl line 2") in one_line(ended(process, said)[1])
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))


def test_processes_that_were_started_differently_stop_before_the_first_step(trained, tmp_path):
    """Another flag, another seed, another checkpoint in one of two processes: both name it; and an environment that is not torchrun's."""
    for name in ("one", "two"):
        link_codes(trained, tmp_path / name)
    ran = start_pair(tmp_path / "said", "prior", "--kind", "ar", *TINY["prior"], "--out", tmp_path / "one")
    assert [ended(*process)[0] for process in ran] == [0, 0]
    address = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": 2}
    for change, word in ((["--lr", "0.3"], "lr 0.01 and 0.3"), (["--seed", "9"], "seed 0 and 9"), (["--out", tmp_path / "one"], "prior-ar.pt")):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address["MASTER_PORT"] = s.getsockname()[1]
        flags = ["--kind", "ar", *TINY["prior"], "--out", tmp_path / "two"]
        pair = [start(tmp_path / f"said{rank}", "prior", *flags, *(change if rank else []), **address, RANK=rank, LOCAL_RANK=rank) for rank in (0, 1)]
        for rank, process in enumerate(pair):
            code, said = ended(process, tmp_path / f"said{rank}")
            assert code == 1 and "processes of this run differ" in one_line(said) and word in said, said
    assert not (tmp_path / "two" / "shapes" / "prior-ar.pt").exists()
    for odd in ({"WORLD_SIZE": "2"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"RANK": "1"}):
        process = start(tmp_path / "said", "prior", *flags, **odd)
        assert "torchrun" in one_line(ended(process, tmp_path / "said")[1])


def test_what_belongs_to_other_codes_or_captions_is_not_scored(trained, tmp_path):
    """A report, captions, a part of a stopped encoding that lie where others should: refused, or made again."""
    folder = link_all(trained, tmp_path)
    report = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink(), (folder / "tokenizer.json").write_text(json.dumps({**report, "values used": 0.5}))
    refuse("sample", "--score", "--count", "8", "--out", tmp_path, words=["tokenizer.json", "not the report", "python tokenizer.py"])
    call("tokenizer", *TINY["tokenizer"], "--out", tmp_path)
    assert json.loads((folder / "tokenizer.json").read_text()) == report
    state = weights(tmp_path, "text_prior")
    (folder / "text_prior.pt").unlink(), torch.save({**state, "trained_on": {**state["trained_on"], "captions": "others"}}, folder / "text_prior.pt")
    refuse("sample", "--score", "--count", "8", "--out", tmp_path, words=["text_prior.pt", "other captions"])
    for k in (0, 1):
        np.savez(tmp_path / f"{1 - k:06d}.npz", part=k, x=np.arange(3))
        with pytest.raises(SystemExit, match="damaged part"):
            data.read_chunk(tmp_path / f"{1 - k:06d}.npz")


def test_output_that_nobody_reads_costs_nothing(trained, tmp_path):
    """Standard output closed, full or cut short, standard error closed: the training is saved, and no traceback is seen."""
    for how, codes in ((">&-", (0,)), ("2>&-", (0,)), ("> /dev/full", (1,)), ("| true", (0, 1))):
        out = tmp_path / how.strip("| >/&").replace("/", "")
        link_codes(trained, out)
        words = " ".join(f"'{word}'" for word in command("prior", "--kind", "ar", *TINY["prior"], "--out", out))
        done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{words} {how}"], capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode in codes and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, (how, done.stderr)
        assert weights(out, "prior-ar")["step"] == 6


def test_two_writers_of_one_file_leave_one_of_theirs_whole(tmp_path):
    write = "import sys, data\nfor k in range(150): data.write_atomic(sys.argv[1] + '/file', lambda file: file.write(sys.argv[2].encode() * 100_000))"
    writers = [subprocess.Popen([sys.executable, "-c", write, str(tmp_path), letter], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE) for letter in "ab"]
    wait_for((tmp_path / "file").exists)
    while any(writer.poll() is None for writer in writers):
        assert (tmp_path / "file").read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert all(writer.returncode == 0 for writer in writers) and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_download_that_never_ends_ends_in_one_line(tmp_path, monkeypatch):
    """A server that takes the connection and is silent, and one that stops in the middle: a line in seconds, with the place for the file."""
    monkeypatch.setattr(data, "PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(data, "CIFAR_URL", f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-binary.tar.gz")
        began = time.time()
        refuse("data", "--dataset", "cifar10", "--download", "--data-dir", tmp_path / "c", "--out", tmp_path, words=["cannot download", tmp_path / "c" / "cifar"])
        assert time.time() - began < 10

        def half():
            with server.accept()[0], server.accept()[0] as connection:  # the first is that of the call above
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhalf an archive")
                time.sleep(3)

        thread = threading.Thread(target=half)
        thread.start()
        refuse("data", "--dataset", "cifar10", "--download", "--data-dir", tmp_path / "c", "--out", tmp_path, words=["cannot download", "timed out"])
        thread.join()
    assert not any((tmp_path / "c").iterdir())


VALUES = ["", "x", "-1", "0", "1", "3", "0.5", "1e400", "nan", "inf", "-0", "99999999999999999999", "1" * 5000, "☃", "²", "\n", "0 1", "1 0", "0 0 0", "a b c", "0.5 0.5 0.5 0.5"]
BASE = {"data": [], "tokenizer": TINY["tokenizer"], "generator": TINY["generator"], "prior": ["--kind", "ar", *TINY["prior"]], "text_prior": TINY["text_prior"],
        "sample": ["unconditional", "--rows", "1", "--columns", "1", "--sample-steps", "1"]}


def test_any_value_of_any_flag_runs_or_is_one_line(trained, tmp_path, capsys, monkeypatch, request):
    """Flags as --help lists them, values of wrong kind, sign, size and number: one step is taken, or one line says why not."""
    monkeypatch.setattr(data.Run, "stopping", lambda run: True)
    cases = []
    for name in BASE:
        with pytest.raises(SystemExit):
            call(name, "--help")
        flags = re.findall(r"^  (--[a-z][a-z-]+)", capsys.readouterr().out, re.M)
        assert len(flags) > 8
        cases += [(name, flag, value) for flag in flags for value in VALUES if flag not in ("--out", "--help", "--no-compile", "--compile", "--tensorboard")]
    rng = random.Random(request.config.getoption("--seed"))
    rng.shuffle(cases)
    link_all(trained, tmp_path)
    for name, flag, value in cases[:request.config.getoption("--flag-values")]:
        words = [*BASE[name], "--out", tmp_path, *(["--restart"] if name not in ("data", "sample") else []), flag, *(value.split() if value.strip() else [value])]
        try:
            call(name, *words)
        except SystemExit as stop:
            said = capsys.readouterr().err.strip()
            if stop.code == 2:
                assert said.startswith("error: ") and "\n" not in said and len(said) < 1000, (words, said)
            else:
                assert stop.code in (0, 143) or str(stop.code).startswith("error: ") and "\n" not in str(stop.code), (words, stop.code)
        except BaseException:
            print(name, *map(str, words))
            raise
