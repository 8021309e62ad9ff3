"""Shared by all tests: the scripts on the path, tiny settings, a CIFAR-10 folder and an image folder made on the spot."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)

TINY = {
    "tokenizer": "--steps 6 --batch-size 8 --width 16 --depth 1 --heads 2 --stem 1 --codes 16 --values 4 --prototypes 16 --head-hidden 16 "
                 "--bottleneck 8 --locals 1 --ibot 0.5 --registers 2 --workers 0".split(),
    "generator": "--steps 6 --batch-size 8 --width 16 --depth 1 --heads 2 --groups 4 --sample-steps 2 --workers 0".split(),
    "prior": "--steps 6 --batch-size 8 --width 16 --depth 1 --heads 2".split(),
}


def script(name, *flags, cwd=None, check=True, env=None, launcher=()):
    """Run one of the scripts as a user would; returns the finished process with its output."""
    command = [sys.executable, *launcher, str(ROOT / f"{name}.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})})
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def refused(done, *words):
    """The process stopped with one line that holds all `words`, and no traceback."""
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("error:") or ": error:" in line]
    assert done.returncode != 0 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


class FakeRun:
    """One process on the CPU in float32: what the functions of the stages need of a Run."""
    device, dtype, rank, world, main, bar = torch.device("cpu"), torch.float32, 0, 1, True, False
    share, autocast = data.Run.share, data.Run.autocast


@pytest.fixture
def run():
    return FakeRun()


def make_cifar(folder):
    """A CIFAR-10 folder of the right format: random pixels, labels 0 to 9."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in data.CIFAR_FILES:
        records = rng.integers(0, 256, (10_000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
    return folder


def make_folder(folder, count=40, size=40):
    """An image folder with two classes, captions, and a name with a space and an accent."""
    rng = np.random.default_rng(0)
    lines = []
    for k in range(count):
        name = f"{'cats' if k % 2 else 'big dögs'}/{k}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size + k % 3, 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture {k}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Where each dataset is, as flags; the shapes are drawn in small numbers to be quick."""
    root = tmp_path_factory.mktemp("the data")
    tree = root / "imagenet"
    for split, count in (("train", 24), ("val", 8)):
        make_folder(tree / split, count)
        (tree / split / "metadata.jsonl").unlink()
    return {"shapes": [], "cifar10": ["--data-dir", str(make_cifar(root / "cifar"))],
            "folder": ["--data-dir", str(make_folder(root / "pictures"))],
            "imagenet": ["--data-dir", str(tree)]}


def train_all(out, *flags, stages=("tokenizer", "generator", "prior-masked", "prior-ar")):
    """All stages, tiny, in order."""
    for stage in stages:
        name, *kind = stage.split("-")
        script(name, *(["--kind", *kind] if kind else []), *TINY[name], "--out", out, *flags)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """OUT with all stages trained for a few steps on shapes (their quality is nil)."""
    out = tmp_path_factory.mktemp("trained")
    train_all(out)
    return out
