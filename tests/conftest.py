"""Shared by all tests: the scripts on the path, tiny settings, CIFAR-10 and folders of images made on the
spot, and ways to run a script: in this process, or as one of its own."""
import argparse
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import launch  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import sample  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from launch import SMALL, stop_after  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)
# Under nohup or in the background these are ignored, by the scripts that tests start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

CIFAR_RECORDS = 60  # in each file, instead of 10,000
NETWORK = "--steps 6 --batch-size 8 --width 16 --depth 1 --heads 2".split()
TINY = {
    "tokenizer": [*NETWORK, *"--attention --stem 1 --codes 16 --values 4 --prototypes 16".split(),
                  *"--colour-codes 0 --head-hidden 16 --bottleneck 8 --locals 1 --ibot 0.5".split(),
                  *"--registers 2 --workers 0".split()],
    "generator": [*NETWORK, *"--groups 4 --sample-steps 2 --workers 0".split()],
    "prior": NETWORK,
    "text_prior": NETWORK,
}
STAGES = ("tokenizer", "generator", "prior-masked", "prior-ar", "text_prior")
SMALL_IMAGES = "--patch 8 --global-size 32 --local-size 16 --sem-read patches --image-size 32".split()


def pytest_addoption(parser):
    """How long the randomised tests of faults go on."""
    parser.addoption("--kills", type=int, default=2, help="SIGKILLs of each stage")
    parser.addoption("--mutations", type=int, default=30, help="mutated files for each reader")
    parser.addoption("--flag-values", type=int, default=60, help="wrong and odd values of flags tried")
    parser.addoption("--seed", type=int, default=0, help="of kills, mutations and flags")


# --- scripts ----------------------------------------------------------------------------------------------

def least(command):
    """Flags with which a command of sample.py draws least."""
    _, last, reads = sample.COMMANDS[command]
    few = [flag for flag in ("--rows", "--columns") if flag in reads.split()]
    few += ["--rounds"] * (last != "generator")
    return [word for flag in (*few, "--sample-steps") for word in (flag, "1")]


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


@contextmanager
def stopped_after(steps, monkeypatch):
    """Inside, a training script finds after so many steps that it was asked to stop, and does so."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(data.Run, "stopping", stop_after(steps))
        yield
    assert stopped.value.code == 143
    del stopped
    gc.collect()  # the frames of the stopped script, and with them its lock


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for process in multiprocessing.active_children():
        process.kill()


FORKS = multiprocessing.get_context("forkserver")  # has everything imported: a process starts in milliseconds
FORKS.set_forkserver_preload(["launch", "sample", "torch._dynamo", "torch.distributed.tensor"])


def start(output, name, *flags, **environment):
    """Start a script as a process of its own, which writes what it says to the file `output`."""
    words = [str(word) for word in (name, *flags)]
    environment = {key: str(value) for key, value in environment.items()}
    process = FORKS.Process(target=launch.child, args=(words, str(output), environment))
    process.start()
    return process


def end(process, output, code=0, within=60):
    """What a process of `start` said, which ends with this code; where it is 1, its error alone."""
    process.join(within)
    found = process.exitcode  # None where it did not end
    process.kill()
    text = Path(output).read_text(errors="replace")
    assert found == code, (found, text[-3000:])
    assert "Traceback" not in text and "Exception ignored" not in text, text[-3000:]
    last = text.strip().split("\n")[-1]
    assert code != 1 or last.startswith("error: "), text[-3000:]
    return last if code == 1 else text


def finish(output, words, code=0, **environment):
    """Run a script as a process to its end, as `end` says."""
    return end(start(output, *words, **environment), output, code)


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
    return [end(*process, code) for process in start_pair(output, name, *flags, **environment)]


class FakeRun(data.Run):
    """One process on the CPU in float32, that waits for no other."""

    def __init__(self, rank=0, world=1):
        self.rank = rank
        self.world = world
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.main = True
        self.shows_bars = self.sharded = self.stop_asked = False

    def wait(self):
        """There is nobody to wait for."""


@pytest.fixture
def run():
    return FakeRun()


def arguments(**change):
    """Settings as from a parser."""
    settings = dict(
        dataset="folder", data_dir="in", out="out", image_size=16, workers=0, seed=0, held_out=[1, 0],
        flip=True, steps=10, batch_size=16, accumulate=1, lr=0.1, lr_matrix=0.0, lr_final=0.1, beta2=0.95,
        warmup=2, weight_decay=0.0, clip=0.0, save_every=1000, dry_run=False,
        restart=False)
    return argparse.Namespace(**settings | change)


def part(size, seed=0):
    """The randomness of a step with a batch of `size` rows."""
    return data.Part(seed, 0, size, FakeRun())


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


def make_folder(folder, count=40, captions=True):
    """An image folder with two classes, captions, and a name with a space and an accent."""
    rng = np.random.default_rng(0)
    lines = []
    for k in range(count):
        name = f"{'cats' if k % 2 else 'big dögs'}/{k}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 40 + k % 3, 3), dtype=np.uint8)
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


def link_codes(trained, out):
    """A new OUT that shares the tokenizer and codes of `trained`; returns its shapes folder."""
    folder = out / "shapes"
    folder.mkdir(parents=True)
    for file in ("codes.pt", "tokenizer.pt"):
        os.link(trained / "shapes" / file, folder / file)
    return folder


def prepare(trained, out, stage, *flags):
    """OUT with what a stage reads; returns its folder and the words that run the stage there, tiny."""
    if stage == "tokenizer":
        (out / "shapes").mkdir(parents=True, exist_ok=True)
    elif not (out / "shapes").exists():
        link_codes(trained, out)
    name, *kind = stage.split("-")
    kind = ["--kind", *kind] if kind else []
    return out / "shapes", [name, *kind, *TINY[name], *flags, "--out", out]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """OUT with all stages trained for a few steps on shapes (their quality is nil)."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_COUNTS", SMALL)
        for stage in STAGES:
            call(*prepare(out, out, stage)[1])
    return out


# --- results ----------------------------------------------------------------------------------------------

def weights(out, stage, dataset="shapes"):
    """The checkpoint of a stage."""
    return torch.load(out / dataset / f"{stage}.pt", weights_only=True)


def contents(path):
    """A file of a stage, but for settings and ids."""
    state = torch.load(path, weights_only=True)
    return {key: state[key] for key in state.keys() - {"config", "id", "made_from"}}


def results(out, stage, dataset="shapes"):
    """What a run leaves: its checkpoint, and step, loss and norm of its log."""
    lines = (out / dataset / f"{stage}.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    log = [[record[key] for key in ("step", "loss", "norm")] for record in records]
    return contents(out / dataset / f"{stage}.pt") | {"log": log}


def same(a, b, path=""):
    """Deep equality, bit for bit, of nested values."""
    if isinstance(a, (list, tuple)):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path


# --- networks of others ------------------------------------------------------------------------------------

class Net(torch.nn.Module):
    """Stands for the public Inception: bytes → 6 features, or probabilities of 5 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(48, 6))
        self.out = torch.nn.Parameter(torch.randn(6, 5))
        self.bias = torch.nn.Parameter(torch.randn(5))

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ self.weight
        if return_features:
            return x
        logits = x @ self.out * 3
        return (logits if no_output_bias else logits + self.bias).softmax(1)


@pytest.fixture
def inception(tmp_path):
    """The file of a Net, as its users have it."""
    torch.jit.script(Net()).save(str(tmp_path / "net.pt"))
    return tmp_path / "net.pt"


class AutoencoderKL(torch.nn.Module):
    """Stands for diffusers' class: folds 2 × 2 pixels into 12 channels, times its only weight, a gain."""

    @classmethod
    def from_pretrained(cls, path, local_files_only, low_cpu_mem_usage):
        model = cls()
        model.gain = float((Path(path) / "diffusion_pytorch_model.bin").read_text())
        return model

    def enable_slicing(self):
        """Nothing: it takes no memory."""

    def encode(self, x):
        mean = F.pixel_unshuffle(x, 2) * self.gain + 0.25
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean))

    def decode(self, z):
        return SimpleNamespace(sample=F.pixel_shuffle((z - 0.25) / self.gain, 2))


def make_vae(folder, gain):
    """A folder of an autoencoder whose latents are the pixels where the gain is 2."""
    folder.mkdir()
    config = {"_class_name": "AutoencoderKL", "latent_channels": 12, "block_out_channels": [1, 1],
              "scaling_factor": 0.5, "shift_factor": 0.25}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.bin").write_text(str(gain))
    return folder


@pytest.fixture
def vae(tmp_path, monkeypatch):
    """The folder of an autoencoder."""
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=AutoencoderKL))
    return make_vae(tmp_path / "vae", 2.0)
