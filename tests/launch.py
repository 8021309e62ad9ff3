"""What the tests start as a process of its own, or by torchrun: scripts by name on a small set of shapes,
several with "+" between them."""
import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402

SMALL = {"train": 160, "val": 32, "test": 48,  # of the shapes, instead of 42,000
         "unseen-shape-colour": 16, "unseen-colour-frame": 16}


def stop_after(steps):
    """To take the place of data.Run.stopping: it finds after so many steps that the run was asked to stop."""
    calls = []

    def stopping(run):
        calls.append(1)
        return len(calls) == steps

    return stopping


def poison(what):
    """From the fourth step on make the loss ("loss") or the gradients alone ("gradient") not a number."""
    usual = data.Part.backward
    calls = []

    def backward(part, loss):
        calls.append(1)
        if len(calls) > 3:
            loss = loss * float("nan") if what == "loss" else loss + (loss * 0).sqrt()  # + 0, of slope ∞ · 0
        return usual(part, loss)

    data.Part.backward = backward


def main(words):
    """Run each script with its flags. The environment may ask for faults: STOP_AFTER=n, each finds after its
    n-th step that it was asked to stop; TIMEOUT=s, processes wait so long for each other; SLEEP=s, the data
    take so long to be read; and for the second of two processes alone SECOND, more words, and POISON."""
    data.SHAPES_COUNTS = SMALL
    data.TIMEOUT = int(os.environ.get("TIMEOUT", data.TIMEOUT))
    if steps := int(os.environ.get("STOP_AFTER", 0)):
        data.Run.stopping = stop_after(steps)
    if seconds := int(os.environ.get("SLEEP", 0)):
        setattr(data, "load_dataset", lambda args: time.sleep(seconds))
    if os.environ.get("RANK") == "1":
        words = [*words, *os.environ.get("SECOND", "").split()]
        if what := os.environ.get("POISON"):
            poison(what)
    while words:
        end = words.index("+") if "+" in words else len(words)
        importlib.import_module(words[0]).main(words[1:end])
        words = words[end + 1:]


EARLIER = Path(__file__).with_name("checkpoints")  # of an earlier commit
SMALLEST = "--steps 6 --batch-size 8 --width 4 --depth 1 --heads 2 --device cpu".split()
EARLIER_RUNS = {  # by stage: the words that made them
    "tokenizer": ["tokenizer", *SMALLEST, *"--stem 1 --codes 16 --values 4 --colour-codes 0".split(),
                  *"--no-nearest --prototypes 8 --head-hidden 8 --bottleneck 8 --koleo 1".split(),
                  *"--workers 0".split()],
    "generator": ["generator", *SMALLEST, *"--stem 0 --condition both --groups 4".split(),
                  *"--sample-steps 1 --workers 0".split()],
    "prior-masked": ["prior", "--kind", "masked", *SMALLEST],
    "prior-ar": ["prior", "--kind", "ar", *SMALLEST],
    "text_prior": ["text_prior", *SMALLEST, "--ema", "0.995"],
}


def make_checkpoints():
    """Write EARLIER anew: of each stage the checkpoint of a run that was stopped at step 3 of 6, beside the
    codes of the tokenizer at its end. They are made in a temporary folder, by relative paths."""
    data.SHAPES_COUNTS = SMALL
    EARLIER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for stage, (name, *flags) in EARLIER_RUNS.items():
            for stop in (3, 0):
                data.Run.stopping = stop_after(stop)
                with contextlib.suppress(SystemExit):
                    importlib.import_module(name).main(flags)
                if stop:
                    shutil.copy(f"out/shapes/{stage}.pt", EARLIER)
        shutil.copy("out/shapes/codes.pt", EARLIER)


def child(words, output, environment):
    """As a process forked from one that has everything imported: `main`; what it says goes to a file."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    data.torch.set_num_threads(1)
    method = os.environ.get("START", "fork")  # of loader workers; fork as on Linux before Python 3.14
    multiprocessing.set_start_method(method, force=True)
    data.run_script(lambda: main(words))


if __name__ == "__main__":
    if sys.argv[1:] == ["checkpoints"]:
        make_checkpoints()
    else:
        data.run_script(lambda: main(sys.argv[1:]))
