"""Faults, injected for real: kills, full and read-only disks, damaged and foreign files, a process that dies,
hangs or meets a NaN, odd flags. A run goes on as if nothing had happened, or it stops with one line that
names the file or flag; nothing is lost, and no code in a file is run. More of what is random:
    python -m pytest tests/test_faults.py --kills 50 --mutations 1000 --flag-values 100000 --seed 1
"""
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import data
import launch
import numpy as np
import pytest
import sample
import tokenizer
import torch
from conftest import (ENVIRONMENT, SMALL_IMAGES, STAGES, TINY, call, contents, end, finish, least,
                      make_folder, prepare, refuse, results, same, start, start_pair, stopped_after, weights)
from PIL import Image

SCRIPTS = {"data": [], "tokenizer": TINY["tokenizer"], "generator": TINY["generator"],
           "prior": ["--kind", "ar", *TINY["prior"]], "text_prior": TINY["text_prior"],
           "sample": ["unconditional", *least("unconditional")]}


def wait_for(condition):
    """Until a condition holds, for a minute at most."""
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.01)


def children_of(process):
    """The ids of the processes that a process has started, as text."""
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


# --- kills and stops --------------------------------------------------------------------------------------

def outcome(folder, stage):
    """All that a finished stage leaves."""
    found = {path.name: contents(path) for path in folder.glob("*.pt")}
    found["names"] = sorted(path.name for path in folder.iterdir())
    if stage == "sample":
        scores = json.loads((folder / "inception.json").read_text())
        return found | {name: scores[name] for name in ("codes of prior-masked", "true codes")}
    return found | results(folder.parent, stage, folder.name)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("stage", (*STAGES, "sample"))
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(trained, tmp_path, stage, inception,
                                                                 request):
    """SIGKILL, then the same command again: what lies under a final name always loads, half a file that a
    kill left never does, and the end is that of the unbroken run, bit for bit."""
    rng = random.Random(f"{request.config.getoption('--seed')} {stage}")
    said = tmp_path / "said"
    score = ["sample", "--score", "--inception", inception, *"--count 1100 --sample-steps 1 --out".split()]

    def fresh(name):
        out = tmp_path / name
        if stage == "sample":
            return shutil.copytree(trained / "shapes", out / "shapes"), [*score, out]
        folder, words = prepare(trained, out, stage, "--steps", 24, "--save-every", 2)
        (folder / f".{stage}.pt.tmp").write_bytes(b"half a checkpoint")
        return folder, words

    folder, words = fresh("whole")
    began = time.time()
    finish(said, words)
    took = time.time() - began
    whole = outcome(folder, stage)
    assert not any(name.endswith(".tmp") for name in whole["names"])
    for number in range(request.config.getoption("--kills")):
        folder, words = fresh(str(number))
        process = start(said, *words)
        process.join(rng.uniform(0, took))
        process.kill()
        process.join()
        for path in folder.glob("*.pt"):
            data.read(path, path.stem)
        finish(said, words)
        same(outcome(folder, stage), whole)


def test_crops_resume_on_any_number_of_workers(places, tmp_path):
    """By 2 workers, stopped in mid-epoch, then by 1 that is started afresh, as on macOS and Windows: all is
    that of one go by none, bit for bit."""
    words = ["tokenizer", *TINY["tokenizer"], *SMALL_IMAGES, "--dataset", "imagenet", *places["imagenet"]]
    words += "--steps 9 --drop-path 0.2 --jitter 0.4 0.4 0.2 0.1 --blur 0.5 0.5 0.5".split()
    for out, workers, stop, method in (("whole", 0, 0, "fork"), ("cut", 2, 4, "fork"),
                                       ("cut", 1, 0, "spawn")):
        flags = ["--workers", workers, "--out", tmp_path / out]
        finish(tmp_path / "said", [*words, *flags], code=143 if stop else 0, STOP_AFTER=stop, START=method)
    whole = outcome(tmp_path / "whole" / "imagenet", "tokenizer")
    same(outcome(tmp_path / "cut" / "imagenet", "tokenizer"), whole)


@pytest.mark.parametrize("stage, name", [
    ("tokenizer", "SIGINT"), ("generator", "SIGTERM"), ("text_prior", "SIGHUP")])
def test_a_signal_lets_the_step_end_and_saves(trained, places, tmp_path, stage, name):
    """Also where workers that decode images get it too, as from a terminal: they are deaf to it, even where
    they are started afresh, as on macOS."""
    _, words = prepare(trained, tmp_path, stage, "--steps", 100_000, "--save-every", 3)
    dataset = "imagenet" if stage == "tokenizer" else "shapes"
    if dataset == "imagenet":
        words += [*SMALL_IMAGES, "--dataset", dataset, *places[dataset], "--workers", 1]
    process = start(tmp_path / "said", *words, START="spawn")
    wait_for((tmp_path / dataset / f"{stage}.pt").exists)  # by then the worker is at work
    for pid in (*children_of(process), process.pid):
        os.kill(int(pid), signal.Signals[name])
        time.sleep(0.2)  # a worker that ends is missed
    stopped = re.search(r"stopped at step (\d+) of 100000", end(process, tmp_path / "said", code=143))
    assert weights(tmp_path, stage, dataset)["step"] == int(stopped[1])


def test_a_signal_before_the_first_step_ends_at_once(tmp_path):
    """While the data are read (here for 60 seconds) there is nothing to save, and no step is waited for."""
    words = ["tokenizer", *TINY["tokenizer"], "--out", tmp_path]
    process = start(tmp_path / "said", *words, SLEEP=60)
    wait_for((tmp_path / "shapes" / ".tokenizer.lock").exists)
    time.sleep(1)  # until the data are read: one that came while the model was built was lost, unexplained
    os.kill(process.pid, signal.SIGINT)
    text = end(process, tmp_path / "said", code=143, within=10)
    assert text.startswith("stopped") and text.count("\n") == 1
    assert not (tmp_path / "shapes" / "tokenizer.pt").exists()


@pytest.mark.parametrize("launcher", ["nohup", "torchrun"])
def test_nohup_keeps_sighup_from_a_run_and_torchrun_passes_sigterm_on(trained, tmp_path, launcher):
    steps = 300 if launcher == "nohup" else 100_000
    folder, words = prepare(trained, tmp_path, "prior-ar", "--steps", steps, "--save-every", 5)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    launch_words = ["nohup", sys.executable] if launcher == "nohup" else [sys.executable, *torchrun]
    words = [*launch_words, launch.__file__, *map(str, words)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    wait_for((folder / "prior-ar.pt").exists)
    process.send_signal(signal.SIGHUP if launcher == "nohup" else signal.SIGTERM)
    text = process.communicate(timeout=60)[1].decode()
    stopped = re.search(r"stopped at step (\d+)", text)
    assert bool(stopped) == bool(process.returncode) == (launcher == "torchrun"), text
    assert weights(tmp_path, "prior-ar")["step"] == (int(stopped[1]) if stopped else steps)


# --- several processes, several runs ----------------------------------------------------------------------

@pytest.mark.parametrize("stage, what", [*zip(STAGES, itertools.repeat("loss")), ("prior-ar", "gradient")])
def test_a_nan_in_one_process_stops_all_before_the_update(trained, tmp_path, stage, what):
    """Met by the second of two processes in its fourth step: the last checkpoint is that of step 3."""
    _, words = prepare(trained, tmp_path, stage, "--save-every", 1)
    for process, said in start_pair(tmp_path / "said", *words, POISON=what):
        assert f"step 3: the {what}" in end(process, said, code=1)
    state = weights(tmp_path, stage)
    assert state["step"] == 3
    assert all(value.isfinite().all() for part in ("model", "ema") for value in state[part].values())


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_dies_or_hangs_stops_the_other(trained, tmp_path, name):
    folder, words = prepare(trained, tmp_path, "prior-ar", "--steps", 100_000, "--save-every", 3)
    first, second = start_pair(tmp_path / "said", *words, TIMEOUT=3)
    wait_for((folder / "prior-ar.pt").exists)
    os.kill(second[0].pid, signal.Signals[name])
    assert "another process of this run died or did not answer" in end(*first, code=1, within=20)
    assert weights(tmp_path, "prior-ar")["step"] >= 3


def test_processes_that_were_started_differently_stop_before_the_first_step(trained, tmp_path):
    """Another flag, another seed, another checkpoint in the second of two processes."""
    _, words = prepare(trained, tmp_path / "one", "prior-ar")
    call(*words)
    folder, words = prepare(trained, tmp_path / "two", "prior-ar")
    for second in ("--lr 0.3", "--seed 9", f"--out {tmp_path / 'one'}"):
        for process, said in start_pair(tmp_path / "said", *words, SECOND=second):
            assert "the processes of this run differ" in end(process, said, code=1)
    assert not (folder / "prior-ar.pt").exists()


def test_an_unfinished_generator_is_named(trained, tmp_path, monkeypatch, capsys):
    with stopped_after(4, monkeypatch):
        call(*prepare(trained, tmp_path, "generator")[1])
    call("sample", "reconstruct", *least("reconstruct"), "--out", tmp_path)
    assert re.search(r"generator.pt .*step 4 of 6", capsys.readouterr().err)


@pytest.mark.skipif(data.fcntl is None, reason="no locks here")
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_on_the_same_folder_is_refused(trained, tmp_path, stage):
    folder, words = prepare(trained, tmp_path, stage)
    with open(folder / f".{stage}.lock", "w") as file:
        data.fcntl.lockf(file, data.fcntl.LOCK_EX)
        assert f"another run is at work on {stage}" in finish(tmp_path / "said", words, code=1)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_run_leaves_the_same_checkpoint(trained, tmp_path):
    """It goes on without being compiled."""
    for out in ("plain", "compiled"):
        _, words = prepare(trained, tmp_path / out, "prior-ar", "--dtype", "float32")
        if out == "compiled":
            process = start(tmp_path / "said", *words, "--compile", STOP_AFTER=4)
            end(process, tmp_path / "said", code=143, within=200)
        call(*words)
    plain, compiled = (weights(tmp_path / out, "prior-ar")["ema"] for out in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert all((value - compiled[name]).abs().max() <= 1e-3 for name, value in plain.items())


# --- disks ------------------------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    """An own file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    (folder / "shapes").mkdir()
    yield folder
    subprocess.run(["umount", "-l", folder])


@pytest.mark.parametrize("stage, needed", [("prior-ar", "codes"), ("tokenizer", "tokenizer")])
def test_a_full_disk_costs_nothing(trained, tmp_path, disk, stage, needed):
    """It stops with a line that names the place; what was there is as it was, no half file is left, and with
    room it goes on: in a training, and with the codes where the tokenizer has been trained."""
    folder, said = disk / "shapes", tmp_path / "said"
    shutil.copy(trained / "shapes" / f"{needed}.pt", folder)
    _, words = prepare(trained, disk, stage, "--save-every", 2)
    if stage != needed:
        finish(said, words, code=143, STOP_AFTER=2)
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    for room in (0, 8192):
        with open(disk / "filler", "wb", buffering=0) as file:
            with pytest.raises(OSError):
                while file.write(bytes(4096)):
                    pass
            file.truncate(file.tell() - room)
        line = finish(said, words, code=1)
        assert str(folder) in line and "run the same command again" in line
        assert {path: path.read_bytes() for path in folder.glob("*.pt")} == before
        assert not list(folder.rglob(".*.tmp"))
        (disk / "filler").unlink()
    finish(said, words)


def test_a_read_only_disk_is_named_before_the_first_step(trained, disk):
    shutil.copy(trained / "shapes" / "codes.pt", disk / "shapes")
    (disk / "shapes" / "samples").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name, flags in SCRIPTS.items():
        refuse(name, *flags, "--out", disk, words=["cannot write", disk, "--out"])


# --- files of these scripts -------------------------------------------------------------------------------

USERS = {"tokenizer": "reconstruct", "generator": "reconstruct", "prior-masked": "unconditional",
         "prior-ar": "unconditional --kind ar", "text_prior": "text ring", "codes": "unconditional"}


def of_torch_alone(value):
    """What torch.save writes, as earlier versions did."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Bomb:
    """A pickle that, loaded as any pickle, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("stage", (*STAGES, "codes"))
def test_damaged_files_and_those_of_another_version_are_refused(trained, tmp_path, stage):
    """Cut, empty, with code inside, from before files had kinds. One line, to who uses them as to who goes
    on; they are not touched, no code is run."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path, executed = tmp_path / "shapes" / f"{stage}.pt", tmp_path / "executed"
    whole, state = path.read_bytes(), weights(tmp_path, stage)
    earlier = of_torch_alone({"stage": stage, "ema": {}})
    plain_bomb = pickle.dumps({"kind": stage, "bomb": Bomb(executed)})
    bomb = of_torch_alone({**state, "bomb": Bomb(executed)})
    goes_on = prepare(None, tmp_path, "generator" if stage == "codes" else stage)[1]
    for content in (whole[:len(whole) // 2], b"", earlier, plain_bomb, bomb):
        path.write_bytes(content)
        words = ["of an earlier version"] * (content == earlier)
        uses = USERS[stage].split()
        for command in (goes_on, ["sample", *uses, *least(uses[0]), "--out", tmp_path]):
            refuse(*command, words=[f"{stage}.pt: ", *words])
        assert path.read_bytes() == content
    assert not executed.exists()
    torch.load(path, weights_only=False)
    assert executed.exists()  # the bomb was a real one


def mutations(request, path):
    """Yield a file in which, at random, a bit is turned or a part overwritten, cut out or repeated."""
    rng = random.Random(f"{request.config.getoption('--seed')} {request.node.name}")
    whole = path.read_bytes()
    for _ in range(request.config.getoption("--mutations")):
        at = rng.randrange(len(whole))
        stop = at + rng.choice((1, 16, 256, len(whole)))
        part = whole[at:stop]
        turned = bytes([part[0] ^ 1 << rng.randrange(8), *part[1:]])
        changed = rng.choice((turned, bytes(len(part)), rng.randbytes(len(part)), b"", part * 3))
        path.write_bytes(whole[:at] + changed + whole[stop:])
        yield path


@pytest.mark.filterwarnings("ignore")  # of torch
@pytest.mark.parametrize("stage", (*STAGES, "codes"))
def test_mutated_files_are_refused_or_harmless(trained, tmp_path, stage, request):
    """To who goes on as to who uses the first part alone: a byte that nothing reads changes nothing."""
    good, first = weights(trained, stage), "codes" if stage == "codes" else "ema"
    read, refused = 0, 0
    for path in mutations(request, Path(shutil.copy(trained / "shapes" / f"{stage}.pt", tmp_path))):
        for only, unused in ((None, []), (first, good.keys() - {first, "config", "step", "made_from"})):
            try:
                state = data.load(path, stage, "train it", only)
                same(state | {key: good[key] for key in unused}, good)
                read += 1
            except SystemExit as problem:
                assert re.search(rf"^error: [^\n]*{stage}.pt: [^\n]*train it$", str(problem))
                refused += 1
    assert refused > 0.2 * (read + refused)  # the rest is padding between its parts


def test_checkpoints_of_another_stage_dataset_or_other_captions_are_refused(trained, places, tmp_path,
                                                                             monkeypatch):
    folder = shutil.copytree(trained / "shapes", tmp_path / "shapes")
    state = weights(tmp_path, "text_prior")
    state["made_from"]["captions"] = "others"
    torch.save(state, folder / "text_prior.pt")
    monkeypatch.setattr(sample, "load_judge", lambda *_: None)
    refuse("sample", "--score", "--count", 8, "--out", tmp_path, words=["text_prior.pt", "other captions"])
    os.replace(folder / "prior-ar.pt", folder / "prior-masked.pt")
    for words in (["sample", "unconditional"], ["prior", "--kind", "masked", *TINY["prior"]]):
        refuse(*words, "--out", tmp_path, words=["prior-masked.pt: ", "prior-ar"])
    folder.rename(tmp_path / "cifar10")
    refuse("sample", "reconstruct", "--dataset", "cifar10", *places["cifar10"], "--out", tmp_path,
           words=["trained on shapes, expected cifar10"])


def test_checkpoints_of_an_earlier_commit_go_on_and_are_drawn_from(tmp_path):
    """Of each stage one that was stopped at step 3 of 6; `python tests/launch.py checkpoints` makes them."""
    folder = shutil.copytree(launch.EARLIER, tmp_path / "shapes")
    for stage, words in launch.EARLIER_RUNS.items():
        assert weights(tmp_path, stage)["step"] == 3
        call(*words, "--out", tmp_path)
        assert weights(tmp_path, stage)["step"] == 6
    for words in (["unconditional"], ["unconditional", "--kind", "ar"], ["text", "a red ring"]):
        call("sample", *words, *least(words[0]), "--out", tmp_path)
    names = {path.stem for path in (folder / "samples").iterdir()}
    assert names >= {"unconditional-ar-001", "unconditional-masked-001", "text-001"}


def test_codes_of_changed_images_are_refused_and_made_again(tmp_path, capsys):
    """A picture is renamed: no stage pairs old codes with other images."""
    folder = make_folder(tmp_path / "pictures", captions=False)
    where = ["--dataset", "folder", "--data-dir", folder, "--image-size", 32, "--out", tmp_path]
    train = ["tokenizer", *TINY["tokenizer"], *SMALL_IMAGES, *where]
    draw = ["generator", *TINY["generator"], "--patch", 8, *where]
    call(*train)
    os.rename(folder / "cats" / "1.png", folder / "cats" / "100.png")
    for words in (draw, ["text_prior", *TINY["text_prior"], *where], ["sample", "--score", *where]):
        refuse(*words, words=["codes.pt: codes of other images", "python tokenizer.py"])
    capsys.readouterr()
    call(*train)
    assert "tokenizer.pt: made from other images than those that it will encode" in capsys.readouterr().err
    call(*draw)


@pytest.mark.filterwarnings("ignore")  # of Pillow, on what is odd in them
@pytest.mark.parametrize("name", "RGB.png P.png RGBA.png LA.png I;16.png RGB.jpg CMYK.jpg RGB.webp RGB.gif "
                         "RGB.bmp RGB.ppm F.tif L.tiff".split())
def test_mutated_pictures_of_every_format_and_mode(tmp_path, name, request):
    """Each opens, whole and in crops, or is found not to."""
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8))
    packed = {"compression": "tiff_lzw"} if name == "L.tiff" else {}
    grey.convert(name.split(".")[0]).save(tmp_path / name, **packed)
    files = data.ImageFiles([tmp_path / name], 16)
    assert files[0].shape == (3, 16, 16)
    for _ in mutations(request, tmp_path / name):
        with suppress(data.Unreadable):
            files[0]
            files.read(0, tokenizer.read_crops, torch.full((1, 5), 0.5), [(8, (0.3, 1.0))], 0.75)


def test_a_picture_that_vanishes_ends_the_run_with_one_line(places, tmp_path):
    """Removed while workers decode: no traceback, no hang, the lock is free, and no worker is left."""
    said = tmp_path / "said"
    tree = shutil.copytree(places["imagenet"][1], tmp_path / "tree")
    words = ["tokenizer", *TINY["tokenizer"], *SMALL_IMAGES, "--dataset", "imagenet", "--data-dir", tree,
             *"--workers 2 --save-every 3 --steps 100000 --out".split(), tmp_path]
    process = start(said, *words)
    wait_for((tmp_path / "imagenet" / "tokenizer.pt").exists)
    workers = children_of(process)
    (tree / "train" / "cats" / "1.png").unlink()
    assert "1.png: does not open" in end(process, said, code=1)
    assert "made from other images" in finish(said, words, code=1)  # the lock is taken before
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))


# --- flags ------------------------------------------------------------------------------------------------

VALUES = ["", "x", "-1", "0", "1", "3", "0.5", "1e400", "nan", "inf", "-0", "9" * 20, "1" * 5000, "☃", "²",
          "\n", "0 1", "1 0", "0 0 0", "a b c", "0.5 0.5 0.5 0.5"]


def test_any_value_of_any_flag_runs_or_is_one_line(trained, tmp_path, capsys, monkeypatch, request):
    """Flags as --help lists them, values of wrong kind, sign, size and number."""
    monkeypatch.setattr(data.Run, "stopping", lambda run: True)
    monkeypatch.setattr(sample.train_judge, "__defaults__", (2,))  # its steps
    cases = []
    for name in SCRIPTS:
        with pytest.raises(SystemExit):
            call(name, *SCRIPTS[name][:name == "sample"], "--help")
        flags = set(re.findall(r"^  (--[a-z][a-z-]+)", capsys.readouterr().out, re.M))
        assert len(flags) > 8
        flags -= {"--out", "--help", "--compile", "--no-compile"}
        cases += itertools.product([name], sorted(flags), VALUES)
    random.Random(request.config.getoption("--seed")).shuffle(cases)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for name, flag, value in cases[:request.config.getoption("--flag-values")]:
        anew = [] if name in ("data", "sample") else ["--restart"]
        words = [name, *SCRIPTS[name], *anew, "--out", tmp_path, flag, *(value.split() or [value])]
        capsys.readouterr()
        print(*words)  # shown where something else is raised
        try:
            call(*words)
        except SystemExit as stop:
            text = capsys.readouterr().err.strip() if stop.code == 2 else str(stop.code)
            assert text in ("0", "143") or text.startswith("error: ") and "\n" not in text, (words, text)
            assert len(text) < 3000, (words, text)
