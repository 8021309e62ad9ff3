"""What the tests start as a process of its own, or by torchrun: scripts by name on a small set of shapes, several with "+" between them."""
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402

SMALL = {"train": 160, "val": 32, "test": 48, "unseen-shape-colour": 16, "unseen-colour-frame": 16}  # of the shapes, instead of 42,000


def poison(where, rank, call, what):
    """Make a loss ("loss") or the gradients alone ("gradient") not a number: in one process, from one call of a function "module.name" on."""
    module, name = importlib.import_module(where.split(".")[0]), where.split(".")[1]
    usual, calls = getattr(module, name), []

    def poisoned(model, *args):
        result = usual(model, *args)
        calls.append(1)
        loss = result[0] if isinstance(result, tuple) else result
        if int(os.environ.get("RANK", 0)) == int(rank) and len(calls) >= int(call):
            loss = loss * float("nan") if what == "loss" else loss + (sum(p.sum() for p in model.parameters()) * 0).sqrt()  # 0, of slope ∞ · 0
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    setattr(module, name, poisoned)


def main(words):
    """Run each script with its flags. The environment may ask for faults: STOP_AFTER=n, each finds after its n-th step that it was asked to
    stop; TIMEOUT=s and PATIENCE=s, processes wait so long for each other and for the network; POISON, the words of `poison`; SLEEP="module.name s", a function takes so long."""
    data.SHAPES_COUNTS = SMALL
    if stop := int(os.environ.get("STOP_AFTER", 0)):
        data.Run.stopping = lambda run, asked=[]: asked.append(1) or len(asked) == stop
    data.TIMEOUT, data.PATIENCE = (int(os.environ.get(name, getattr(data, name))) for name in ("TIMEOUT", "PATIENCE"))
    if "SLEEP" in os.environ:
        where, seconds = os.environ["SLEEP"].split()
        module, name = importlib.import_module(where.split(".")[0]), where.split(".")[1]
        setattr(module, name, lambda *args: time.sleep(float(seconds)))
    if "POISON" in os.environ:
        poison(*os.environ["POISON"].split())
    while words:
        end = words.index("+") if "+" in words else len(words)
        importlib.import_module(words[0]).main(words[1:end])
        words = words[end + 1:]


def child(words, output, environment):
    """As a process forked from one that has everything imported: `main`, what it says in the file `output`."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    data.torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as where users start a script (Linux, before Python 3.14)
    data.command(lambda: main(words))


if __name__ == "__main__":
    data.command(lambda: main(sys.argv[1:]))
