"""Shared by all tests: the scripts on the path, tiny settings, CIFAR-10 and folders of images made on the
spot, and ways to run a script: in this process, or as one of its own."""
import gc
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import launch  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from launch import SMALL  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)

CIFAR_RECORDS = 60  # in each file, instead of 10,000
NETWORK = "--steps 6 --batch-size 8 --width 16 --depth 1 --heads 2".split()
TINY = {
    "tokenizer": [*NETWORK, *"--attention --stem 1 --codes 16 --values 4 --prototypes 16".split(),
                  *"--head-hidden 16 --bottleneck 8 --locals 1 --ibot 0.5 --registers 2 --workers 0".split()],
    "generator": [*NETWORK, *"--groups 4 --sample-steps 2 --workers 0".split()],
    "prior": NETWORK,
    "text_prior": NETWORK,
}


def pytest_addoption(parser):
    """How long the randomised tests of faults go on."""
    parser.addoption("--kills", type=int, default=2, help="SIGKILLs of each stage")
    parser.addoption("--mutations", type=int, default=60, help="mutated files for each reader")
    parser.addoption("--flag-values", type=int, default=60, help="wrong and odd values of flags tried")
    parser.addoption("--seed", type=int, default=0, help="of kills, mutations and flags")


# --- scripts ----------------------------------------------------------------------------------------------

def flags_of(stage):
    """The script of a stage and its tiny flags."""
    name, *kind = stage.split("-")
    return name, [*(["--kind", *kind] if kind else []), *TINY[name]]


def call(name, *flags):
    """Run one of the scripts in this process. Raises SystemExit where it stops with an error."""
    importlib.import_module(name).main([str(flag) for flag in flags])


def refuse(name, *flags, words=()):
    """The script, run in this process, stops with one line that holds all `words`."""
    with pytest.raises(SystemExit) as stopped:
        call(name, *flags)
    line = str(stopped.value)
    del stopped
    gc.collect()  # the frames of the stopped script, and with them its lock
    assert line.startswith("error: ") and "\n" not in line, line
    for word in words:
        assert str(word) in line, line


def train_all(out, *flags, stages=("tokenizer", "generator", "prior-masked", "prior-ar", "text_prior")):
    """All stages, tiny, in order."""
    for stage in stages:
        name, tiny = flags_of(stage)
        call(name, *tiny, "--out", out, *flags)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(name, *flags, launcher=()):
    """The command line of `script`; `launcher` is torchrun's module and flags. A flag "+" starts another
    script in the same process."""
    return [sys.executable, *launcher, str(Path(__file__).with_name("launch.py")), name, *map(str, flags)]


def script(name, *flags):
    """Run one of the scripts as a command; returns the finished process with its output."""
    return subprocess.run(command(name, *flags), capture_output=True, text=True, timeout=240, env=ENVIRONMENT)


FORKS = multiprocessing.get_context("forkserver")  # has everything imported: a process starts in milliseconds
FORKS.set_forkserver_preload(["launch", "sample", "torch._dynamo", "torch.distributed.tensor"])


def start(output, name, *flags, **environment):
    """Start a script as a process of its own, which writes what it says to the file `output`."""
    words = [str(word) for word in (name, *flags)]
    environment = {key: str(value) for key, value in environment.items()}
    process = FORKS.Process(target=launch.child, args=(words, str(output), environment))
    process.start()
    return process


def ended(process, output, within=60):
    """(exit code, what it said) of a process of `start`."""
    process.join(within)
    alive = process.is_alive()
    process.kill()
    said = Path(output).read_text(errors="replace")
    assert not alive, f"no end within {within} seconds: {said[-2000:]}"
    return process.exitcode, said


def start_pair(output, name, *flags, **environment):
    """Two processes of one run, as torchrun would start them: [(process, output), ...]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    pair = []
    for rank in (0, 1):
        said = Path(f"{output}{rank}")
        pair.append((start(said, name, *flags, RANK=rank, LOCAL_RANK=rank, **environment), said))
    return pair


def run_pair(output, name, *flags, code=0, **environment):
    """start_pair to the end, with this exit code; what the first process said and what the second did."""
    texts = []
    for process, said in start_pair(output, name, *flags, **environment):
        found, text = ended(process, said)
        assert found == code, text[-3000:]
        texts.append(text)
    return texts


class FakeRun:
    """One process on the CPU in float32: what the functions of the stages need of a Run."""
    device = torch.device("cpu")
    dtype = torch.float32
    main = True
    shows_bars = sharded = stop_asked = False
    own_slice = data.Run.own_slice
    autocast = data.Run.autocast
    average = data.Run.average
    stopping = data.Run.stopping
    noting_signals = data.Run.noting_signals

    def __init__(self, rank=0, world=1):
        self.rank = rank
        self.world = world

    def wait(self):
        """There is nobody to wait for."""


@pytest.fixture
def run():
    """A FakeRun."""
    return FakeRun()


def part(size, seed=0, step=0):
    """The randomness of a step with a batch of `size` rows."""
    return data.Part(seed, step, size, FakeRun())


# --- data -------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def same_for_all(monkeypatch):
    """All tests see the small set of shapes, take CIFAR-10 for small, and draw the same random numbers."""
    torch.manual_seed(0)
    monkeypatch.setattr(data, "SHAPES_COUNTS", SMALL)
    monkeypatch.setattr(data, "CIFAR_BYTES", CIFAR_RECORDS * 3073)


def make_cifar(folder):
    """A CIFAR-10 folder of the right format: random pixels, labels 0 to 9."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in data.CIFAR_FILES:
        records = rng.integers(0, 256, (CIFAR_RECORDS, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
    return folder


def make_folder(folder, count=40, size=40, captions=True):
    """An image folder with two classes, captions, and a name with a space and an accent."""
    rng = np.random.default_rng(0)
    lines = []
    for k in range(count):
        name = f"{'cats' if k % 2 else 'big dögs'}/{k}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size, size + k % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture {k}"}))
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Where each dataset is, as flags."""
    root = tmp_path_factory.mktemp("the data")
    make_folder(root / "imagenet" / "train", 24, captions=False)
    make_folder(root / "imagenet" / "val", 8, captions=False)
    return {"shapes": [],
            "cifar10": ["--data-dir", str(make_cifar(root / "cifar"))],
            "folder": ["--data-dir", str(make_folder(root / "pictures"))],
            "imagenet": ["--data-dir", str(root / "imagenet")]}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """OUT with all stages trained for a few steps on shapes (their quality is nil)."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_COUNTS", SMALL)
        train_all(out)
    return out


def link_codes(trained, out):
    """A new OUT that shares the tokenizer and codes of `trained`; returns its shapes folder."""
    folder = out / "shapes"
    folder.mkdir(parents=True)
    for file in ("codes.pt", "tokenizer.pt"):
        os.link(trained / "shapes" / file, folder / file)
    return folder
