"""What all stages must agree on. Nothing of the method is in here: no model, no loss, no sampler.

In this order: flags, devices, how a script ends; data sets and batches; files, grids of pictures; optimiser,
checkpoints, log.

A dataset is images (N, 3, S, S) as bytes, labels (N, factors), captions, and splits train / val (for
choosing) / test (for reporting). Rows and randomness of a step follow from (seed, step): a stopped run goes
on exactly.

Prepare, check and look at a dataset (writes OUT/<dataset>/samples/data.png; in all files OUT/<dataset> of
--dataset folder is OUT/folder/<name of the folder>):
    python data.py                                            # shapes: drawn on the spot
    python data.py --dataset cifar10 --download               # the official binary archive into data/cifar10
    python data.py --dataset folder --data-dir my/pictures    # any tree of images, a class per sub-folder
    python data.py --dataset imagenet --data-dir /data/imagenet

Letters in all files: B batch, N images or tokens, S image side, L code positions, V values a position, D
width. """
import ctypes
import os
import sys

# Before torch is imported: idle threads sleep, so that two runs on the same cores do not fight, but only
# after a moment, since waking them costs a fifth of a small step. And glibc keeps freed memory: given back
# and faulted in again in every step, it costs up to a quarter of a small one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: 32 MiB, the most it takes
    ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD

import argparse
import colorsys
import csv
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import re
import secrets
import shlex
import signal
import tarfile
import tempfile
import time
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# -------- flags and run --------------------------------------------------------------------------------

PATIENCE = 10  # seconds for an answer from the network
SILENCE = 30  # seconds without a word, where no bar shows that a run is alive
TIMEOUT = 1800  # seconds that processes wait for one of them that does not answer, before they stop
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def fail(message):
    """Stop with one clear line on stderr and exit code 1."""
    raise SystemExit("error: " + " ".join(str(message).split())[:2000])


def note(text):
    """One line on stderr, by the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(" ".join(text.split()), file=sys.stderr)  # a name may hold the end of a line


def print_figures(figures, indent="", digits=3):
    """A nested dict as an indented table, with two digits of what was measured on n < 100 images."""
    for name, value in figures.items():
        values = value if isinstance(value, dict) else {"": value}
        own = 2 if values.get("n", 100) < 100 else digits
        if any(isinstance(figure, dict) for figure in values.values()):
            print(f"{indent}{name}")
            print_figures(values, indent + "  ", own)
        else:
            shown = (f"{key} {figure:.{own}f}" if isinstance(figure, float) else f"{key} {figure}"
                     for key, figure in values.items())
            print(f"{indent}{name:44} {', '.join(shown).strip()}")


class Unfit(Exception):
    """What was read is whole, but not what is expected."""


@contextmanager
def reading(path, remedy):
    """Inside, whatever is wrong with what is read from `path` ends in one line, with what to do about it."""
    try:
        yield
    except Unfit as problem:
        fail(f"{path}: {problem}; {remedy}")
    except FileNotFoundError:
        fail(f"no {path}: {remedy}")
    except PermissionError:
        fail(f"{path}: no permission to read it; see to who may")
    except (MemoryError, torch.OutOfMemoryError):
        raise  # nothing is wrong with the file: see run_script
    except Exception as problem:  # zipfile, pickle, json, torch and Pillow raise many kinds
        fail(f"{path}: not readable ({type(problem).__name__}: {str(problem)[:300]}); {remedy}")


@contextmanager
def needed_package(package, what):
    """Inside, a package is imported that `what` alone needs."""
    try:
        yield
    except (ImportError, RuntimeError) as problem:  # the latter: a package that does not fit this torch
        fail(f"{what}: needs a package, pip install {package} ({str(problem)[:200]})")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, which ends in `remedy`."""

    remedy = "see --help"

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())[:500]}; {self.remedy}\n")


def number(low=-math.inf, high=math.inf, kind=float):
    """An argparse type: a finite number of `kind` from `low` to `high`."""
    def convert(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value):
                return value
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {what} from {low:,} to {high:,}, got {text[:40]!r}")

    return convert


IMAGE_SIZE = 32
PRESETS = {"imagenet": {"image_size": 256}}
HELD_OUT = [1, 0]  # of shapes: the pairs that are reported

count = number(0, 10 ** 9, int)  # the types of most flags
positive = number(1, 10 ** 9, int)
non_negative = number(0)
above_zero = number(1e-30)
fraction = number(0, 1)


def make_parser(doc):
    """A parser with the flags of all scripts. Flags in groups whose title ends in "run" or "sampler" are no
    settings of what is trained: they may differ when a run goes on, and when its checkpoint is used."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("shapes", "cifar10", "imagenet", "folder"), default="shapes",
        help="data and preset together (default: shapes)")
    add("--image-size", type=positive, default=IMAGE_SIZE, help="side of the images in pixels")
    add("--held-out", type=count, nargs=2, default=HELD_OUT, metavar=("NUMBER", "CHOICE"),
        help="shapes: how many of the 8 colours each shape never has, and which (0: the ones reported)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="train on mirrored images too; --no-flip where left and right differ, as in writing")
    add("--seed", type=number(0, 2 ** 63 - 1, int), default=0, help="of everything random (default: 0)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the arithmetic; auto: bfloat16 where it is faster")
    add = parser.add_argument_group("run").add_argument
    add("--data-dir", help="where the images are (default: data/<dataset>)")
    add("--out", default="out",
        help="results go to OUT/<dataset>, those of --dataset folder to OUT/folder/<its name> (default: out)")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add("--device", default=best, help="cpu, cuda, cuda:1, mps (default: the best that is there)")
    add("--workers", type=count, default=2, help="processes that decode images of folders")
    return parser


def add_training_flags(parser, steps, batch_size, lr, lr_matrix, warmup, ema=None):
    """The flags of a training run, with the shapes values of a stage; ema None: it has no flag --ema."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=steps, help="length in optimizer steps")
    add("--batch-size", type=positive, default=batch_size, help="images a step, over all devices")
    add("--accumulate", type=positive, default=1, help="parts that a batch is split into, to save memory")
    add("--lr", type=non_negative, default=lr, help="learning rate of AdamW (biases, norms, embeddings)")
    add("--lr-matrix", type=non_negative, default=lr_matrix,
        help="learning rate of Muon for the blocks' matrices; 0: AdamW for all")
    add("--lr-final", type=fraction, default=0.05, help="share of the learning rates at the end (cosine)")
    add("--beta2", type=number(0, 0.999999), default=0.95,
        help="of AdamW: decay a step of the mean squared gradient")
    add("--warmup", type=count, default=warmup, help="steps of linear warm-up")
    add("--weight-decay", type=non_negative, default=0.0, help="decoupled weight decay")
    add("--clip", type=non_negative, default=3.0, help="largest gradient norm; 0: any")
    if ema is not None:
        add("--ema", type=fraction, default=ema,
            help="decay a step of the averaged weights; n / (9 + n) after n steps where that is less")
    add = parser.add_argument_group("training run").add_argument
    add("--save-every", type=positive, default=1000, help="steps between checkpoints")
    add("--grad-checkpoint", action="store_true", help="compute activations twice to save memory")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA only)")
    add("--dry-run", action="store_true", help="show settings and size (on CUDA the cost of a step) and stop")
    add("--restart", action="store_true", help="begin anew even where a checkpoint lies")


def parse(parser, presets, argv=None, sizes=None):
    """Parse flags with the preset of the dataset as defaults, and over it that of --size where there are
    `sizes`. Sets parser.settings, {name: default without preset} of the flags that say what is trained."""
    parser.settings = {}
    for group in parser._action_groups:
        if not group.title.endswith(("run", "sampler")):
            parser.settings |= {flag.dest: flag.default for flag in group._group_actions}
    del parser.settings["help"]
    # Twice: the first time to learn --dataset and --size. Intermixed: names of images may follow flags.
    args = parser.parse_intermixed_args(argv)
    preset = presets.get(args.dataset, {}) | (sizes[args.size] if sizes and args.size else {})
    parser.set_defaults(**preset)
    args = parser.parse_intermixed_args(argv)
    args.data_dir = args.data_dir or f"data/{args.dataset}"
    return args


def fit_batch(parser, args, rows):
    """Lower the preset's --batch-size to the number of images that are trained on; a given one stays."""
    parts = int(os.environ.get("WORLD_SIZE", "1")) * args.accumulate
    if args.batch_size == parser.get_default("batch_size") and args.batch_size > len(rows) >= parts:
        args.batch_size = len(rows) // parts * parts
        note(f"--batch-size {args.batch_size}: there are {len(rows):,} training images")


def script_command(words, args):
    """The command that runs a script with its own flags, `words`, on the dataset and folders of `args`."""
    flags = ["--dataset", args.dataset, "--out", args.out]
    if args.held_out != HELD_OUT:
        flags += ["--held-out", *map(str, args.held_out)]
    if args.dataset != "shapes":
        flags += ["--data-dir", args.data_dir]
    if args.image_size != PRESETS.get(args.dataset, {}).get("image_size", IMAGE_SIZE):
        flags += ["--image-size", str(args.image_size)]
    flags += ["--no-flip"] * (not args.flip)
    return f"python {words} {shlex.join(flags)}"


def run_folder(args):
    """OUT/<dataset>, of own pictures OUT/folder/<name of their folder>, made if needed. Fails with one line
    when it cannot be written, or holds the results of another folder of that name (data-dir.txt)."""
    folder = Path(args.out) / args.dataset
    if args.dataset == "folder":
        folder /= os.path.basename(os.path.abspath(args.data_dir))
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if args.dataset == "folder" and os.environ.get("RANK", "0") == "0":
            origin, now = folder / "data-dir.txt", os.path.realpath(args.data_dir)
            before = os.fsdecode(origin.read_bytes()) if origin.exists() else now
            if before != now and os.path.isdir(before):  # else it was moved, or this is another machine
                fail(f"{folder}: holds the results of {before}, which is not {now}; choose another --out")
            origin.write_bytes(os.fsencode(now))
    except OSError as problem:
        fail(f"cannot write to {folder} ({problem.strerror}); choose another --out")
    return folder


def find_device(name):
    """The device of --device, set up. Fails with one line when it is not there."""
    try:
        device = torch.device(name)
        if device.type == "cuda":  # each process its own
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.zeros(1, device=device).item()  # "meta" can be made, not read
    except (RuntimeError, AssertionError, ImportError) as problem:
        fail(f"--device {name}: not available here ({str(problem)[:200]}); expected cpu, cuda, cuda:1 or mps")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":  # the plain formula beats the flash kernel 4 times at these lengths
        torch.backends.cuda.enable_flash_sdp(False)  # these two speak for the CPU as well
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return device


def to_float64(x):
    """A tensor in float64, on the CPU where its device has no such numbers."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def gather(value):
    """The plain values of all processes of this run, in their order."""
    everywhere = [value]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, value)
    return everywhere


class Run:
    """One process of a run: its device and dtype, its rank among `world` processes, and the output folder.
    The same on a CPU, one GPU, or under torchrun. lock: the stage at which no second run may be at work in
    that folder."""

    stop_asked = None  # outside the steps of a training; in them whether it was asked to stop

    def __init__(self, args, lock=None):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.main = self.rank == 0
        self.shows_bars = self.main and sys.stderr.isatty()  # progress bars only for people
        self.device = find_device(args.device)
        self.dtype = torch.bfloat16 if self.is_faster_in_bfloat16() else torch.float32
        if args.dtype != "auto":
            self.dtype = getattr(torch, args.dtype)
        self.folder = run_folder(args)
        self.lock = None
        self.sharded = False
        if "batch_size" in args and args.batch_size % (self.world * args.accumulate):
            parts = self.world * args.accumulate
            fail(f"--batch-size {args.batch_size}: not divisible by processes × --accumulate = {parts}")
        if lock and self.main and fcntl:
            self.lock = open(self.folder / f".{lock}.lock", "w")  # the system frees it when the process ends
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as problem:
                if isinstance(problem, BlockingIOError):  # else a file system without locks
                    fail(f"{self.folder}: another run is at work on {lock}; wait or choose another --out")
        if self.world > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))

    def is_faster_in_bfloat16(self):
        """Whether bfloat16 makes a step faster: on CUDA, and on a CPU with AMX, or AVX512-BF16 by AMD.
        (Intel's AVX512-BF16, where a virtual machine hides AMX, takes longer.)"""
        cpu_info = Path("/proc/cpuinfo")
        amd = cpu_info.exists() and "AuthenticAMD" in cpu_info.read_text()
        on_cpu = torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported())
        return on_cpu if self.device.type == "cpu" else self.device.type == "cuda"

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def average(self, value):
        """Mean of a tensor over all processes; the tensor itself is used up."""
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def stopping(self):
        """Whether any process was asked to stop; all processes get the same answer."""
        if self.world == 1:
            return self.stop_asked
        return bool(self.average(torch.tensor(float(self.stop_asked), device=self.device)))

    def own_slice(self, size):
        """The slice of a global batch of `size` that belongs to this process."""
        own = size // self.world
        return slice(self.rank * own, (self.rank + 1) * own)

    def autocast(self):
        """bfloat16 arithmetic where the run uses it, float32 weights always."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def wrap(self, model, args):
        """The module to call in training: with activations computed twice and compiled where asked (in place,
        so that the state dict keeps its keys), under DDP with several processes."""
        if args.grad_checkpoint:  # keep no more than the inputs of each block
            blocks = next(module for name, module in model.named_modules() if name.endswith("blocks"))
            twice = torch.utils.checkpoint.checkpoint
            for block in blocks:
                block.forward = functools.partial(twice, block.forward, use_reentrant=False)
        if args.compile or args.compile is None and self.device.type == "cuda":
            model.compile()
        if self.world == 1 or self.sharded:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

    def shard(self, *models):
        """Split the parameters of models with `blocks` over all processes, block by block (torch's
        fully_shard), in place: with gradients and optimizer they then take a part of each device's memory.
        Sums are in float32."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second to import
        self.sharded = True
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        for model in models:
            for part in (*model.blocks, model):
                fully_shard(part, mp_policy=policy)
            model.to(self.device)


class Unreadable(Exception):
    """An image that opened before and does not any more."""


def ask_to_stop(number, frame):
    """Ctrl-C, SIGTERM and a closed terminal (SIGHUP): in training the step at hand is finished and saved;
    elsewhere, and at a second Ctrl-C, the process ends at once."""
    if Run.stop_asked is None or Run.stop_asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    Run.stop_asked = True


def run_script(main):
    """Run a script's main function. What people and systems do to it ends it with one line: exit code 143
    where it was asked to stop, else 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # captions and paths that the terminal cannot print
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored, as SIGHUP under nohup: stays so
            signal.signal(number, ask_to_stop)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        print("stopped; what was saved before is kept", file=sys.stderr)
        raise SystemExit(143)
    except Unreadable as problem:  # from a loader's worker it comes with the worker's traceback before it
        fail(str(problem).strip().rsplit("Unreadable: ")[-1])
    except OSError as problem:
        where, what = problem.filename or "the output", problem.strerror or problem
        fail(f"{where}: {what}; see to it and run the same command again")
    except (MemoryError, RuntimeError) as problem:  # torch has few kinds of its own
        text = str(problem)
        if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
            fail(f"out of memory ({text[:200]}); lower --batch-size (drawing: --batch) or raise --accumulate")
        if dist.is_initialized() and re.search("timed? ?out|connection|closed by", text, re.IGNORECASE):
            fail(f"another process of this run died or did not answer for {TIMEOUT} seconds; see its own "
                 "message, the same command goes on from the last checkpoint")
        if type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"torch.compile: {text[:300]}; install a C compiler and triton, or add --no-compile")
        raise
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader takes the end of its workers for a fault
        for worker in multiprocessing.active_children():  # Python would wait: they are deaf (ignore_signals)
            worker.kill()


# -------- data sets and batches ------------------------------------------------------------------------

def checksum(value):
    """SHA-256 of a plain value, as hexadecimal text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def consecutive(sizes):
    """{split: its range of rows} of splits that follow each other, {split: size}."""
    ends = itertools.accumulate(sizes.values())
    return {split: range(end - sizes[split], end) for split, end in zip(sizes, ends)}


def ignore_signals(worker=0):
    """For a process that decodes images: be deaf to what is for the process that it serves."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Dataset:
    """Images, labels and captions with their splits.

    images: (N, 3, S, S) uint8, a function that makes them when they are first asked for, or ImageFiles where
    they do not fit in memory; labels (N, factors) long; factors {name: values} in the order of the label
    columns; splits {name: range of rows}; captions: the texts of each image, [""] where there are none, kept
    as the first, captions (N,), and where there are more all_captions {row: texts}; source: plain values that
    say which images these are, in which order. `id` follows from it and splits: codes hold for no others. """

    def __init__(self, name, images, labels, factors, splits, captions, source):
        self._images, self.labels, self.factors = images, labels, factors
        self.splits = splits
        self.captions = [texts[0] for texts in captions]
        self.all_captions = {row: texts for row, texts in enumerate(captions) if len(texts) > 1}
        self.id = checksum([name, source, {split: [rows.start, rows.stop] for split, rows in splits.items()}])

    def __len__(self):
        return len(self.labels)

    @property
    def captions_id(self):
        """What follows from all captions."""
        return checksum([self.captions, self.all_captions] if self.all_captions else self.captions)

    @functools.cached_property
    def images(self):
        """(N, 3, S, S) uint8 tensor, or ImageFiles."""
        return self._images() if callable(self._images) else self._images

    def pixels(self, rows, flip=None):
        """Images `rows` as (B, 3, S, S) uint8 on the CPU; `flip` (B,) bool mirrors left and right."""
        rows = torch.as_tensor(rows)
        if torch.is_tensor(self.images):
            images = self.images[rows]
        else:
            images = torch.stack([self.images[k] for k in rows.tolist()])
        return images if flip is None else torch.where(flip[:, None, None, None], images.flip(3), images)

    def batches(self, rows, size, workers):
        """Yield the images of a range of rows in order, (b, 3, S, S) with b up to `size`; workers decode
        files."""
        if torch.is_tensor(self.images):
            yield from self.images[rows.start:rows.stop].split(size)
        else:
            yield from torch.utils.data.DataLoader(torch.utils.data.Subset(self.images, rows), size,
                                                   num_workers=workers, worker_init_fn=ignore_signals)


# --- shapes: an object in a frame, drawn from known factors ---

SHAPES = {
    "shape": ["circle", "triangle", "cross", "ring", "crescent", "bar"],
    "colour": ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"],
    "size": ["small", "large"],
    "background": ["light", "dark", "striped", "dotted"],
    "frame": ["red", "orange", "yellow", "green", "cyan", "blue", "white", "black"],
}
RGB = {"red": (.88, .13, .13), "orange": (.98, .55, .08), "yellow": (.96, .90, .15), "green": (.15, .65, .22),
       "cyan": (.20, .82, .88), "blue": (.15, .28, .85), "purple": (.48, .15, .68), "pink": (.98, .50, .75),
       "white": (1., 1., 1.), "black": (.05, .05, .05)}
# Pairs of factors with combinations that never occur in train, val and test (see held_out).
UNSEEN_PAIRS = {"unseen-shape-colour": ("shape", "colour"),  # hard: both are seen in the same pixels
                "unseen-colour-frame": ("colour", "frame")}  # easy: in different ones
SHAPES_COUNTS = {"train": 32_000, "val": 2_000, "test": 4_000,
                 "unseen-shape-colour": 2_000, "unseen-colour-frame": 2_000}


def held_out(pair, number, choice):
    """Of a `pair` of factors, for each value of the first: the values of the second that it never meets,
    (first, k), and those that it meets, (first, second − k); k is `number` for (shape, colour), else 1.
    Choice 0: value i never meets i, i + 1, ..; another one seeds a random order."""
    n_first, n_second = (len(SHAPES[name]) for name in pair)
    if pair != UNSEEN_PAIRS["unseen-shape-colour"]:
        number, choice = 1, 0
    order = (torch.arange(n_first)[:, None] + torch.arange(n_second)) % n_second
    if choice:
        rng = np.random.default_rng(choice)
        order = torch.from_numpy(np.stack([rng.permutation(n_second) for _ in range(n_first)]))
    return order.split([number, n_second - number], 1)


def is_unseen(labels, pair, held=HELD_OUT):
    """Which rows of `labels` (N, factors) show a combination of `pair` (two factor names) that training never
    shows, with --held-out as `held`: (N,) bool."""
    first, second = (labels[:, list(SHAPES).index(name)] for name in pair)
    unseen, _ = held_out(pair, *held)
    return (unseen[first] == second[:, None]).any(1)


def signed_distance(shape, x, y):
    """Distance to the outline of `shape` at radius 1, negative inside; x, y (...) in radii, y pointing down.
    Every shape is its own mirror image, so that a flipped drawing is a drawing like any other."""
    def box(width, height):
        return torch.maximum(x.abs() - width, y.abs() - height)

    r = torch.hypot(x, y)
    if shape == "circle":
        return r - 0.95
    if shape == "bar":
        return box(1.05, 0.40)
    if shape == "cross":
        return torch.minimum(box(1.0, 0.32), box(0.32, 1.0))
    if shape == "ring":
        return (r - 0.76).abs() - 0.24
    if shape == "crescent":
        return torch.maximum(r - 1.0, 0.80 - torch.hypot(x, y + 0.50))
    assert shape == "triangle"  # equilateral, pointing up, circumradius 1.15
    return torch.maximum(y - 0.575, (x.abs() * math.sqrt(3) - y) / 2 - 0.575)


def draw_shapes(labels, nuisance, size=32):
    """Draw objects anti-aliased from their factors.

    labels (N, 5) long, columns as in SHAPES; nuisance (N, 8) uniform in [0, 1): shift x, y, tilt, two of
    background phase, three of colour. Returns (N, 3, size, size) uint8. Lengths are in pixels of a 32-pixel
    image. """
    def coverage(distance):  # of a pixel, from the signed distance: anti-aliasing
        return (0.5 - distance * size / 32).clamp(0, 1)

    def palette(names):
        return torch.tensor([RGB[name] for name in names])

    n = len(labels)
    grid = (torch.arange(size) + 0.5) * 32 / size - 16
    y, x = (g.expand(n, size, size) for g in torch.meshgrid(grid, grid, indexing="ij"))

    phase = (nuisance[:, 3:5, None, None] * 2 - 1) * 0.5
    u = x + phase[:, 0]
    v = y + phase[:, 1]
    wave = (u % 8 - 4).abs() - 2  # triangle wave of period 8, zero at the edges of a band of width 4
    striped = 0.72 - 0.24 * coverage(wave)
    dotted = 0.72 - 0.24 * coverage(torch.hypot(u % 8 - 4, v % 8 - 4) - 2.4)
    tones = torch.stack([torch.full_like(u, 0.78), torch.full_like(u, 0.36), striped, dotted], 1)
    image = tones[torch.arange(n), labels[:, 3]][:, None].expand(n, 3, size, size)

    shift = nuisance[:, :2] * 2 - 1
    tilt = (nuisance[:, 2] * 2 - 1) * math.radians(5)
    cos, sin = tilt.cos()[:, None, None], tilt.sin()[:, None, None]
    radius = torch.tensor([7.0, 10.5])[labels[:, 2]][:, None, None]
    cx, cy = x - shift[:, 0, None, None], y - shift[:, 1, None, None]
    cx, cy = (cx * cos + cy * sin) / radius, (cy * cos - cx * sin) / radius
    distance = torch.empty(n, size, size)
    for k, shape in enumerate(SHAPES["shape"]):
        rows = labels[:, 0] == k
        distance[rows] = signed_distance(shape, cx[rows], cy[rows])
    colour = palette(SHAPES["colour"])[labels[:, 1]] + (nuisance[:, 5:8] - 0.5) * 0.04
    alpha = coverage(distance * radius)[:, None]
    image = image * (1 - alpha) + colour.clamp(0, 1)[:, :, None, None] * alpha

    frame = palette(SHAPES["frame"])[labels[:, 4]][:, :, None, None]
    alpha = coverage(13.0 - torch.maximum(x.abs(), y.abs()))[:, None]
    return ((image * (1 - alpha) + frame * alpha) * 255).round().to(torch.uint8)


def shapes_labels(split, size, held=HELD_OUT):
    """Factors (size, 5) of a split, a function of (split, index), uniform nuisances (size, 8), and
    which of colour, size, background and frame the caption says (size, 4) bool: two captions in three say
    all, the others each with probability ½."""
    key = int.from_bytes(hashlib.sha256(f"0/{split}".encode()).digest()[:8], "little")
    uniform = np.random.Generator(np.random.Philox(key=key)).random((size, 29), dtype=np.float64)
    uniform = torch.from_numpy(uniform).float()  # 20 columns are used; another width gives other images
    labels = (uniform[:, :5] * torch.tensor([len(values) for values in SHAPES.values()])).long()
    for k, (name, pair) in enumerate(UNSEEN_PAIRS.items()):
        first, second = (labels[:, list(SHAPES).index(factor)] for factor in pair)
        unseen, seen = held_out(pair, *held)
        allowed = unseen if split == name else seen
        second.copy_(allowed[first, (uniform[:, 13 + k] * allowed.shape[1]).long()])  # into labels
    said = (uniform[:, 15:16] < 2 / 3) | (uniform[:, 16:20] < 0.5)
    return labels, uniform[:, 5:13], said


def with_article(words):
    """Words with their article: "an orange ring", "a red ring"."""
    return f"a{'n' * (words[0].lower() in 'aeiou')} {words}"


def shapes_caption(labels, said=(True,) * 4):
    """The caption of factors (5,), "a small red ring on a dotted background in a blue frame"; `said`: whether
    colour, size, background and frame are said."""
    shape, colour, size, background, frame = (values[k] for values, k in zip(SHAPES.values(), labels))
    caption = with_article(" ".join([size] * said[1] + [colour] * said[0] + [shape]))
    if said[2]:
        caption += f" on a {background} background"
    if said[3]:
        caption += f" in {with_article(frame)} frame"
    return caption


def load_shapes(args):
    """The generated dataset: every image follows from (split, index), whatever --seed is."""
    if not 0 < args.held_out[0] < 8:
        fail(f"--held-out {args.held_out[0]}: expected 1 to 7 of the 8 colours")
    parts = [shapes_labels(split, size, args.held_out) for split, size in SHAPES_COUNTS.items()]
    labels, nuisance, said = (torch.cat(tensors) for tensors in zip(*parts))
    captions = [[shapes_caption(*both)] for both in zip(labels.tolist(), said.tolist())]

    def draw():
        drawn = map(draw_shapes, labels.split(512), nuisance.split(512), itertools.repeat(args.image_size))
        return torch.cat(list(drawn))

    source = SHAPES_COUNTS
    if args.held_out != HELD_OUT:  # the default keeps the id that it always had
        source = source | {"held out": args.held_out}
    return Dataset("shapes", draw, labels, SHAPES, consecutive(SHAPES_COUNTS), captions, source)


# --- cifar10: the official binary archive ---

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_FILES = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
CIFAR_BYTES = 30_730_000  # 10,000 records of a label byte and 3,072 bytes of red, green and blue planes


def fetch_cifar(folder):
    """Download the archive into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "cifar-10-binary.tar.gz"
    try:
        with urllib.request.urlopen(CIFAR_URL, timeout=PATIENCE) as response:
            packed = response.read()
    except (OSError, http.client.HTTPException) as problem:
        fail(f"cannot download {CIFAR_URL} ({problem}); get it on another machine and put it at {target}")
    write_atomic(target, lambda file: file.write(packed))


def load_cifar10(args):
    """CIFAR-10 from --data-dir: the archive cifar-10-binary.tar.gz, or its .bin files. No pickle is read, and
    nothing is unpacked to disk."""
    folder = Path(args.data_dir)
    archive = folder / "cifar-10-binary.tar.gz"
    found = {path.name: path for path in folder.rglob("*.bin")}
    remedy = (f"put {archive.name} (from {CIFAR_URL}) or its .bin files into {folder}, or run "
              + script_command("data.py --download", args))
    with reading(archive, remedy):
        if set(CIFAR_FILES) <= set(found):
            parts = [found[name].read_bytes() for name in CIFAR_FILES]
        else:
            packed = archive.read_bytes()
            if hashlib.md5(packed).hexdigest() != CIFAR_MD5:
                raise Unfit(f"its md5 is not {CIFAR_MD5}")
            with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
                parts = [tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in CIFAR_FILES]
        if {len(part) for part in parts} != {CIFAR_BYTES}:
            raise Unfit(f"a file in it is not of {CIFAR_BYTES:,} bytes")
        records = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).view(-1, 3073)
        labels = records[:, :1].long()
        captions = [[f"a photo of {with_article(CIFAR_CLASSES[k])}"] for k in labels[:, 0].tolist()]

    def resized():
        images, size = records[:, 1:].reshape(-1, 3, 32, 32), (args.image_size, args.image_size)
        if size == (32, 32):
            return images
        parts = (F.interpolate(x.float(), size, mode="bicubic", antialias=True) for x in images.split(1000))
        return torch.cat([x.round().clamp(0, 255).byte() for x in parts])

    tenth = len(records) // 12  # 5,000: nine of them to train, one to choose; the test file has two
    splits = consecutive({"train": 9 * tenth, "val": tenth, "test": 2 * tenth})
    return Dataset("cifar10", resized, labels, {"class": CIFAR_CLASSES}, splits, captions, source=CIFAR_MD5)


# --- folder and imagenet: any tree of images ---

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
                  ".avif"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # no other decoder, whatever the name
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as large is an error, and is said
# Folders, and values of a column `split`, that are no classes, in any letter case.
SPLIT_NAMES = {"train": "train", "seen": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "unseen": "unseen"}
MOST_VALUES = 100  # of a factor
RARE = 3  # fewer training pictures do not show what a value looks like
IN_MEMORY_BYTES = 2 << 30  # a folder whose decoded images exceed this is decoded on the fly by workers


def scaled_to_bytes(image):
    """An image of 16 or 32 bits or floats in 8 bits, which Pillow would clip. White is the least of the usual
    maxima that no pixel exceeds. For 16 bits that is 4095 (12 in use) only where the brightest pixel has at
    least 1024: a darker picture is taken as dark. Raises ValueError where a value is not finite."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    if image.mode.startswith("I;16"):
        usual = [4095, 65535] if values.max() >= 1024 else [65535]
    else:
        usual = [255, 65535] if image.mode == "I" else [1, 255, 65535]
    white = next((value for value in usual if values.max() <= value), values.max())
    return Image.fromarray((values.clip(min=0) * (255 / white)).astype(np.uint8))


def open_image(path, least_scale):
    """An image of any mode and colour profile as RGB, upright, on white. least_scale(width, height), the same
    with both swapped: the least scale at which a JPEG may be decoded, which is faster.
    Raises whatever Pillow does where the file is not a whole image."""
    with Image.open(path, formats=FORMATS) as image:
        profile = image.info.get("icc_profile", b"")
        scale = least_scale(*image.size)
        image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = scaled_to_bytes(image)
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in ("L", "CMYK"):  # which have profiles of their own
            image = image.convert("RGB")
        with suppress(Exception):  # none, a broken one or one of another mode: the colours stay as they are
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            if "sRGB" not in ImageCms.getProfileDescription(source):
                image = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        return image.convert("RGB")


def to_tensor(image):
    """A Pillow image → (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_image(path, size):
    """Read an image as (3, size, size) uint8: centre crop, box then bicubic (ADM). Raises as open_image."""
    image = open_image(path, lambda width, height: min(1.0, 2 * size / min(width, height)))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    while side >= 2 * size:  # halve by averaging before the last bicubic step
        side //= 2
        image, box = image.resize((side, side), Image.Resampling.BOX, box=box), None
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


class ImageFiles(torch.utils.data.Dataset):
    """Images decoded when asked for: item k is (3, S, S) uint8, or None where it does not open and
    `none_if_broken`."""

    def __init__(self, paths, size, none_if_broken=False):
        self.paths, self.size, self.none_if_broken = paths, size, none_if_broken

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, k):
        with suppress(Unreadable if self.none_if_broken else ()):
            return self.read(k, read_image, self.size)

    def read(self, k, function, *more):
        """function(path, *more) of image k. Raises Unreadable."""
        try:
            return function(self.paths[k], *more)
        except Exception as problem:  # each of Pillow's decoders raises its own kinds
            reason = " ".join(str(problem).split())
            raise Unreadable(f"{self.paths[k]}: does not open as an image any more ({reason}); bring it back "
                             "or delete files.json beside the results to check all files again") from None


class Picture:
    """What is known of a picture of a folder; what follows here holds until something else is found."""

    texts = [""]  # its captions
    columns = {}  # {name: text} of its metadata
    split = ""
    folders = []  # that it lies in, below that of its split
    image = None  # (3, S, S) uint8, where all fit in memory

    def __init__(self, folder, name):
        self.name = name
        self.path = os.path.join(folder, name)
        self.bytes = os.path.getsize(self.path)


def kind_of(name):
    """The suffix of a file; "hidden" of what systems and tools leave beside pictures: ._a.png, @eaDir/."""
    *folders, file = name.split(os.sep)
    if file.startswith(".") or any(part[0] in ".@" or part == "__MACOSX" for part in folders):
        return "hidden"
    return os.path.splitext(file)[1].lower() or "without a suffix"


def list_files(folder, out):
    """{path below `folder`: kind} of all files, sorted, but for those below `out`; linked folders are walked
    too, unless they hold the link."""
    names, out = [], Path(out).resolve()
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = Path(parent).absolute()
        closed = {out, *(above.resolve() for above in (here, *here.parents)), *here.resolve().parents}
        folders[:] = [name for name in folders if (here / name).resolve() not in closed]
        inside = os.path.relpath(parent, folder)
        paths = (os.path.normpath(os.path.join(inside, name)) for name in files)
        names += [path for path in paths if os.path.isfile(os.path.join(folder, path))]
    return {name: kind_of(name) for name in sorted(names)}


def listed(texts, most):
    """The first few of some texts."""
    return ", ".join(texts[:most]) + ", ..." * (len(texts) > most)


def count_kinds(files):
    """How many files {path: kind} there are of each kind: "3 .heic, 1 .zip"."""
    return listed([f"{count:,} {kind}" for kind, count in sorted(Counter(files.values()).items())], 10)


def take_pictures(folder, files, args):
    """The pictures among `files`, from which they are taken out; of imagenet those in train/ and val/
    (test/ has no classes)."""
    names = [name for name, kind in files.items() if kind in IMAGE_SUFFIXES]
    if not names:
        fail(f"{folder}: no images found ({', '.join(sorted(IMAGE_SUFFIXES))}), but "
             f"{count_kinds(files) or 'nothing'}; put or unpack some there, or name another --data-dir")
    for name in names:
        del files[name]
    if args.dataset == "imagenet":
        top = {name.split(os.sep)[0] for name in names}
        if not {"train", "val"} <= top:
            fail(f"{folder}: expected train/ and val/, each with a sub-folder of images for each class, "
                 f"found {', '.join(sorted(top)[:5])}; link or move the parts there")
        names = [name for name in names if name.split(os.sep)[0] in ("train", "val")]
    return [Picture(folder, name) for name in names]


METADATA_ROW = ('expected {"file_name": "a.png", "text": "what it shows"}, or in a .csv file_name,text in the'
                " first line and a.png,what it shows in others")


def read_text(path):
    """The text of a file of captions."""
    with reading(path, "save it as UTF-8"):
        return path.read_text(encoding="utf-8-sig")


def folded(path):
    """A path such that names of the same file are equal, whichever system wrote them."""
    return unicodedata.normalize("NFC", path.replace("\\", "/")).casefold()


def read_captions(folder, files, pictures, notes):
    """Give the pictures what metadata.csv and metadata.jsonl say of them; where these say no text of a.png,
    that of a.txt; what was read is taken out of `files`. Paths in metadata start where it lies, or at
    `folder`; rows that name no picture are said in `notes`, and it fails where all are so. Returns in words
    where captions are from."""
    sources, described, missing = set(), set(), []
    tables = [name for name, kind in files.items()
              if kind in (".csv", ".jsonl") and os.path.basename(name).lower() == "metadata" + kind]
    known = {folded(picture.name): picture for picture in pictures if tables}
    for table in tables:
        path, kind = folder / table, files.pop(table)
        text = read_text(path)
        rows = [line.strip() for line in text.split("\n")]
        if kind == ".csv":
            with reading(path, METADATA_ROW):
                rows = list(csv.DictReader(io.StringIO(text)))
        for number, row in enumerate(rows, 1):
            if not row:  # a blank line
                continue
            with reading(f"{path} row {number}", METADATA_ROW):
                row = json.loads(row) if isinstance(row, str) else row
                file_name = row.pop("file_name", None)
                texts = row.pop("text", None) or row.pop("caption", None) or []
                texts = texts if isinstance(texts, list) else [texts]
                if not file_name or None in row:  # csv puts what has no column under None
                    raise Unfit("no file_name, or more values than columns")
                names = [os.path.relpath(path.parent / file_name, folder), os.path.normpath(file_name)]
                found = [known[folded(name)] for name in names if folded(name) in known]
                if not found:
                    missing.append(file_name)
                    continue
                picture = found[0]
                if picture in described:
                    raise Unfit(f"{picture.name} has a row already")
                described.add(picture)
                picture.columns = {key: "" if value is None else str(value) for key, value in row.items()}
                picture.texts = [text.strip() for text in texts if text.strip()] or [""]
                if picture.texts != [""]:
                    sources.add("metadata" + kind)
    if missing and not described:
        fail(f"{folder}: no row of its metadata names a picture that is there, {missing[0]!r} for one; write "
             f"paths from where the metadata lies, here they are like {pictures[0].name}")
    if missing:
        notes.append(f"{len(missing):,} rows of metadata name no picture that is there: {listed(missing, 3)}")
    beside = {os.path.splitext(name)[0]: name for name, kind in files.items() if kind == ".txt"}
    for picture in pictures if beside else ():
        name = beside.get(os.path.splitext(picture.name)[0])
        if name:
            sources.add(".txt files")
            files.pop(name, None)  # of a.png and a.jpg it is the same
            if picture.texts == [""]:
                picture.texts = [read_text(folder / name).strip()]
    return " and ".join(sorted(sources))


def decode(pictures, args):
    """Yield (picture, image (3, S, S) uint8, or None where it does not open)."""
    files = ImageFiles([picture.path for picture in pictures], args.image_size, none_if_broken=True)
    loader = torch.utils.data.DataLoader(files, batch_size=64, num_workers=args.workers, collate_fn=list,
                                         worker_init_fn=ignore_signals)
    bar = tqdm(pictures, "check images", disable=not sys.stderr.isatty())
    yield from zip(bar, itertools.chain.from_iterable(loader))


def find_broken(pictures, args):
    """The names of the pictures that do not open. All are decoded in the first run alone, shared by its
    processes, and again when names or sizes change: files.json beside the results remembers."""
    index, broken = run_folder(args) / "files.json", None
    tree = checksum([(picture.name, picture.bytes) for picture in pictures])
    with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or not whole
        known = json.loads(index.read_text())
        if known["tree"] == tree:
            broken = set(known["broken"])
    broken = gather(broken)[0]
    if broken is None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = [picture.name for picture, image in decode(pictures[rank::world], args) if image is None]
        broken = set(itertools.chain(*gather(mine)))
        if rank == 0:
            index.write_text(json.dumps({"tree": tree, "broken": sorted(broken)}))
    return broken


def leave_broken_out(folder, pictures, args, notes):
    """The pictures that open, with their images where these fit in memory; the others are said in `notes`."""
    if args.dataset == "folder" and len(pictures) * 3 * args.image_size ** 2 <= IN_MEMORY_BYTES:
        for picture, image in decode(pictures, args):
            picture.image = image
        broken = {picture.name for picture in pictures if picture.image is None}
    else:
        broken = find_broken(pictures, args)
    whole = [picture for picture in pictures if picture.name not in broken]
    if len(whole) < len(pictures):
        notes.append(f"{len(broken):,} of {len(pictures):,} files do not open as images and are skipped: "
                     f"{listed(sorted(broken), 10)}")
    if not whole:
        fail(f"{folder}: none of its files opens as an image; expected {', '.join(FORMATS)}")
    return whole


def find_splits(folder, pictures):
    """Give each picture its split, where one is said, and the folders below that of the split (or, where
    there are none, above). Splits are the first level of folders with train beside val or test, with unseen,
    or with train alone; a column `split` goes over them, where it is empty for train."""
    for picture in pictures:
        picture.folders = picture.name.split(os.sep)[:-1]
    for level in range(max(len(picture.folders) for picture in pictures)):
        names = ["".join(picture.folders[level:level + 1]).lower() for picture in pictures]
        here = [SPLIT_NAMES.get(name, "") for name in names]
        kinds = set(here)
        if kinds == {"train"} or "unseen" in kinds or "train" in kinds and kinds & {"val", "test"}:
            for picture, split in zip(pictures, here):
                picture.split = split
                picture.folders = picture.folders[level + bool(split):] or picture.folders[:level]
            break
    given = [picture.columns.get("split", "").strip().lower() for picture in pictures]
    unknown = sorted(set(given) - {"", *SPLIT_NAMES})
    if unknown:
        fail(f"{folder}: {unknown[0]!r} in a column `split`; expected train, val, test or unseen")
    if any(given):
        for picture, value in zip(pictures, given):
            picture.split = SPLIT_NAMES.get(value, "train")


def split_pictures(folder, pictures, notes):
    """{split: pictures}. With train beside test or val those are the splits (where there is one of the two,
    it is for reporting, and a slice of train is for choosing; what is in none is counted in `notes`), else a
    fixed 90/5/5 % of all that are not unseen."""
    said = np.array([picture.split for picture in pictures])
    train, val, test, unseen = (np.flatnonzero(said == name) for name in ("train", "val", "test", "unseen"))
    rng = np.random.default_rng(0)
    if len(train) == 0 or len(test) + len(val) == 0:
        rest = np.flatnonzero(said != "unseen")
        few = max(2, len(rest) // 20)
        test, val, train = np.split(rng.permutation(rest), [few, 2 * few])
    elif len(test) == 0 or len(val) == 0:
        test = np.concatenate([test, val])
        val, train = np.split(rng.permutation(train), [max(2, min(len(train) // 20, 10_000))])
    known = len(pictures) - len(unseen)
    if min(len(test), len(val), len(train)) < 2 or known < 20:
        fail(f"{folder}: {known} images, {len(test)} of them to report on, are too few; "
             "bring at least 20 in all, 2 in each of train/, val/ and test/")
    rows = {"train": train, "val": val, "test": test} | ({"unseen": unseen} if len(unseen) else {})
    in_none = len(pictures) - sum(map(len, rows.values()))
    if in_none:
        notes.append(f"left out {in_none:,} pictures in none of its splits")
    return {split: [pictures[k] for k in np.sort(rows[split])] for split in rows}


def find_factors(pictures, notes):
    """Labels (N, factors) and factors {name: values}: the columns of metadata, but for those with one value
    or very many, which are said in `notes`; without any, the class, the first folder of each."""
    table, others = {}, []
    columns = dict.fromkeys(itertools.chain.from_iterable(picture.columns for picture in pictures))
    columns.pop("split", None)
    for column in columns:
        values = [picture.columns.get(column, "") for picture in pictures]
        count = len(set(values))
        if 1 < count <= min(MOST_VALUES, len(pictures) // 2):
            table[column] = values
        else:
            others.append(f"{column} ({count:,} values)")
    if others:
        notes.append(f"columns that are no factors: {listed(others, 5)}")
    classes = ["".join(picture.folders[:1]) for picture in pictures]
    if not table and len(set(classes)) > 1:
        table["class"] = classes
    labels, factors = torch.zeros(len(pictures), len(table)).long(), {}
    for k, (name, values) in enumerate(table.items()):
        factors[name] = sorted(set(values))
        place = {value: label for label, value in enumerate(factors[name])}
        labels[:, k] = torch.tensor([place[value] for value in values])
    return labels, factors


def factors_caption(labels, factors):
    """The caption of factors (F,): "a photo of a cat", or "role judge, tone dark"; "" where none is known."""
    known = {name: values[k] for (name, values), k in zip(factors.items(), labels) if values[k]}
    if list(known) == ["class"]:
        return f"a photo of {with_article(known['class'].replace('_', ' '))}"
    return ", ".join(f"{name} {value}" for name, value in known.items())


def census(dataset, pictures, source):
    """What to know of own pictures, whose captions are from `source`: a list of texts."""
    train, captioned = dataset.splits["train"], len(dataset) - dataset.captions.count("")
    shares = []
    for picture in pictures[::len(pictures) // 1000 + 1]:  # a thousand tell enough
        with Image.open(picture.path, formats=FORMATS) as image:
            shares.append(1 - min(image.size) / max(image.size))
    said = [f"{len(dataset):,} pictures",
            f"captions from {source} ({captioned:,})" if captioned else "captions: none",
            f"the square crop cuts {np.mean(shares):.0%} of their area"]
    if torch.is_tensor(dataset.images):
        seen = [hash(image.numpy().tobytes()) for image in dataset.images]
        known = set(seen[train.start:train.stop])
        for split, rows in dataset.splits.items():
            copies = sum(seen[row] in known for row in rows)
            if copies and split != "train":
                said.append(f"{copies:,} of {len(rows):,} in {split} are copies of training ones, as cropped")
    for k, (name, values) in enumerate(dataset.factors.items()):
        counts = torch.bincount(dataset.labels[train.start:train.stop, k], minlength=len(values))
        rare = (counts < RARE).sum()
        if rare:
            said.append(f"{rare:,} of {len(values):,} values of {name} have under {RARE} training pictures")
    return said


def load_folder(args):
    """Images under --data-dir. What does not open is left out, the same in every run. One line says what was
    found and what left out; of imagenet only what is wrong."""
    folder, notes = Path(args.data_dir), []
    if not folder.is_dir():
        fail(f"no folder {folder}: link or copy a tree of images there, or name one with --data-dir")
    files = list_files(folder, args.out)
    pictures = take_pictures(folder, files, args)
    source = read_captions(folder, files, pictures, notes)
    if files and args.dataset == "folder":
        notes.append(f"left out {count_kinds(files)}")
    pictures = leave_broken_out(folder, pictures, args, notes)
    find_splits(folder, pictures)
    parts = split_pictures(folder, pictures, notes)
    pictures = list(itertools.chain(*parts.values()))
    labels, factors = find_factors(pictures, notes)
    captions = [picture.texts for picture in pictures]
    if not any(first for first, *_ in captions):
        captions = [[factors_caption(row, factors)] for row in labels.tolist()]
        of_metadata = any(factors.keys() & picture.columns.keys() for picture in pictures)
        source = "columns of metadata" if of_metadata else "folder names"
    if pictures[0].image is None:
        images = ImageFiles([picture.path for picture in pictures], args.image_size)
    else:
        images = torch.stack([picture.image for picture in pictures])
    identity = [[picture.name for picture in pictures], [picture.bytes for picture in pictures]]
    splits = consecutive({split: len(part) for split, part in parts.items()})
    dataset = Dataset(args.dataset, images, labels, factors, splits, captions, identity)
    if args.dataset == "folder":
        notes = census(dataset, pictures, source) + notes
    if notes:
        note(f"{folder}: {'; '.join(notes)}")
    return dataset


def load_dataset(args):
    """The dataset that the flags name. Fails with one line when it is missing or broken."""
    loaders = {"shapes": load_shapes, "cifar10": load_cifar10}
    return loaders.get(args.dataset, load_folder)(args)


# --- the rows and the randomness of a step ---

def mix_seed(*numbers):
    """One 63-bit seed from numbers and words, so that neighbouring steps and seeds have nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def step_generator(seed, step, device="cpu"):
    """The random generator of one step: whatever is drawn from it is a function of (seed, step)."""
    return torch.Generator(device).manual_seed(mix_seed(seed, step))


@functools.lru_cache(4)  # an epoch or two are alive at a time
def permutation(n, seed, epoch):
    """A random order of n rows."""
    return np.random.default_rng(mix_seed(seed, epoch, n)).permutation(n)


def batch_rows(rows, batch_size, seed, step):
    """Rows (batch_size,) of step `step`: walks through a fresh permutation of the range `rows` each epoch."""
    n = len(rows)
    places = range(step * batch_size, (step + 1) * batch_size)
    return torch.tensor([rows.start + int(permutation(n, seed, place // n)[place % n]) for place in places])


class Part:
    """One part of a batch in this process: its rows, its randomness and its backward pass.

    Random numbers are drawn for the whole batch from (seed, step) and cut to this part, so that they depend
    neither on the number of processes nor on the number of parts. flip: are mirrored images shown? """

    def __init__(self, seed, step, batch_size, run, index=0, parts=1, rows=None, flip=True):
        self.generator, self.device = step_generator(seed, step, run.device), run.device
        self.flip = flip
        self.batch_size, self.parts = batch_size, parts
        size = batch_size // run.world // parts
        self.own = slice(index * size, (index + 1) * size)  # its rows among those of this process
        first = run.own_slice(batch_size).start + index * size
        self.whole = slice(first, first + size)  # its rows in the whole batch
        self.rows = None if rows is None else rows[self.whole]  # (b,)

    def uniform(self, *shape):
        """Uniform in [0, 1): (b, *shape) for the b rows of this part."""
        return torch.rand(self.batch_size, *shape, generator=self.generator, device=self.device)[self.whole]

    def normal(self, *shape):
        """Standard normal: (b, *shape)."""
        return torch.randn(self.batch_size, *shape, generator=self.generator, device=self.device)[self.whole]

    def stratified(self):
        """Uniform in [0, 1) for each row, spread evenly over the batch: (b,)."""
        order = torch.arange(self.whole.start, self.whole.stop, device=self.device)
        return (order + self.uniform()) / self.batch_size

    def flips(self):
        """Which rows show the mirrored image: (b,) bool."""
        return (self.uniform() < 0.5) & self.flip

    def backward(self, loss):
        """Add the gradient of the mean `loss` of this part; returns its share of the batch's loss."""
        loss = loss / self.parts
        loss.backward()
        return loss.detach()


def batch_parts(step, rows, args, run, model):
    """The parts of this process's rows of a batch, one after the other (--accumulate). rows: the range that
    is trained on; part.rows: (b,) of this part. Dropout is seeded by (seed, step, rank), and gradients are
    exchanged in the last part's backward pass."""
    torch.manual_seed(mix_seed(args.seed, step, run.rank, "dropout"))
    chosen = batch_rows(rows, args.batch_size, args.seed, step)
    for index in range(args.accumulate):
        last = index == args.accumulate - 1
        if run.sharded:
            model.set_requires_gradient_sync(last)
        elif run.world > 1:
            model.require_backward_grad_sync = last  # what DDP's no_sync sets; the forward pass must know too
        yield Part(args.seed, step, args.batch_size, run, index, args.accumulate, chosen, args.flip)


class StepImages(torch.utils.data.Dataset):
    """Item `step` is what this process reads in that step: loader workers decode whole batches ahead."""

    def __init__(self, dataset, own, args, read_file, numbers):
        self.images, self.rows = dataset.images, dataset.splits["train"]  # the rest is not for workers
        self.own, self.args = own, args
        self.read_file, self.numbers = read_file, numbers

    def __getitem__(self, step):
        args, images = self.args, self.images
        rows = batch_rows(self.rows, args.batch_size, args.seed, step)[self.own]
        if torch.is_tensor(images):
            return images[rows]
        if self.read_file is None:
            return torch.stack([images[k] for k in rows.tolist()])
        generator = torch.Generator().manual_seed(mix_seed(args.seed, step, "files"))
        u = torch.rand(args.batch_size, *self.numbers, generator=generator)[self.own]
        views = [images.read(k, self.read_file, u_k) for k, u_k in zip(rows.tolist(), u)]
        return [torch.stack(view) for view in zip(*views)]


def image_batches(dataset, run, args, start, read_file=None, numbers=()):
    """Yield the images of this process, (B / world, 3, S, S) uint8 on the device, for each step from `start`
    to --steps; or, where they lie in files and read_file(path, u) → several tensors is given, a list of
    batches of these, with u uniform random numbers of shape `numbers`. All follow from (seed, step)."""
    workers = 0 if torch.is_tensor(dataset.images) else args.workers
    own = run.own_slice(args.batch_size)
    items = StepImages(dataset, own, args, read_file, numbers)
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, sampler=range(start, args.steps), num_workers=workers,
        pin_memory=run.device.type == "cuda", worker_init_fn=ignore_signals)
    for images in loader:
        if torch.is_tensor(images):
            yield images.to(run.device, non_blocking=True)
        else:
            yield [view.to(run.device, non_blocking=True) for view in images]


def from_bytes(images):
    """Bytes (..., 3, S, S) → floats in [-1, 1], the range all networks see."""
    return images.float() / 127.5 - 1


def to_bytes(images):
    """Floats in [-1, 1] → bytes, the inverse of `from_bytes`."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# -------- files ----------------------------------------------------------------------------------------

WEIGHT_FILES = ("*.index.json", "*.safetensors", "*.bin", "*.pth", "*.pt")  # the first kind found counts


@contextmanager
def writing(path):
    """Inside, whatever keeps `path` from being written ends in one line."""
    try:
        yield
    except (OSError, RuntimeError) as problem:  # torch.save turns a full disk into a RuntimeError
        fail(f"cannot write {path}: {problem}; what was there is as it was. Make room, or see to who may "
             "write there, and run the same command again")


def write_atomic(path, write):
    """Call write(binary file) on a temporary file, then move it into place, so that a kill at any moment
    leaves the old file or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb+") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a plain value as JSON."""
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def save(path, kind, **state):
    """Write plain values and tensors of this `kind`. `read` brings them back or raises, `load` does or stops
    with one line. What others will use of them comes first."""
    write_atomic(path, lambda file: torch.save({"kind": kind, **state}, file))


def read(path, kind, only=None):
    """What `save` wrote: a dict, no code in it run. only: the tensor or dict of tensors that stands first and
    alone is used; it is memory-mapped, and of all tensors only it is compared with its checksums. Raises
    where the file is missing, damaged or of another kind."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=only is not None)
    if not isinstance(state, dict) or "kind" not in state:
        raise Unfit("of another program, or of an earlier version of this one")
    if state["kind"] != kind:
        raise Unfit(f"expected {kind}, found {state['kind']}")
    used = math.inf  # so many tensors
    if only is not None:
        used = len(state[only]) if isinstance(state[only], dict) else 1
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            tensor = record.filename.partition("/data/")[2]  # its number; the other records are small
            if not tensor or int(tensor) < used:
                with archive.open(record) as file:  # raises at its end where it is damaged
                    while file.read(1 << 20):
                        pass
    return state


def load(path, kind, remedy, only=None):
    """As `read`; stops with one line that ends in `remedy` where that raises."""
    with reading(path, remedy):
        return read(path, kind, only)


def read_weights(path):
    """{name: tensor} of weights made elsewhere: a .pth, .pt or .bin (no code in it is run) or .safetensors
    (memory-mapped), the .index.json of several, or the folder that one of these lies in. A dict inside under
    "teacher" or "model" is taken."""
    path = Path(path)
    with reading(path, "expected .pth, .pt, .bin, .safetensors, an .index.json of several, or their folder"):
        if path.is_dir():
            found = [file for kind in WEIGHT_FILES for file in sorted(path.glob(kind))]
            if not found:
                raise Unfit("has no weights")
            path = found[0]
        if path.suffix == ".json":
            state = {}
            for name in sorted(set(json.loads(path.read_text())["weight_map"].values())):
                state |= read_weights(path.parent / name)
        elif path.suffix == ".safetensors":
            with needed_package("safetensors", path):
                from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        for inside in ("teacher", "model"):
            state = state.get(inside, state)
        if not all(torch.is_tensor(value) for value in state.values()):
            raise Unfit("expected tensors by name")
        return {re.sub(r"^((_orig_mod|module|backbone)\.)+", "", name): x for name, x in state.items()}


def fill_as_flags_say(model, state, sizes, args):
    """Load released weights that training starts from; raises Unfit where `sizes` {name: value} of theirs are
    not those of the flags."""
    not_compared = ("image_size", "down", "groups")  # of latents here, of pixels there, or not used
    differ = [f"{name} {value}" for name, value in sizes.items()
              if name not in not_compared and vars(args).get(name, value) != value]
    if differ:
        raise Unfit(f"is of {', '.join(differ)}")
    model.load_state_dict(state)


def released_config(folder):
    """The config.json of released weights, {} where there is none: for what shapes do not tell."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_made_from(path, kind, made_from):
    """Whether a whole file of `save` is there, made from these ids; its first part is named as its kind."""
    with suppress(Exception):
        return read(path, kind, only=kind)["made_from"] == made_from
    return False


def code_type(values):
    """The narrowest unsigned type that holds codes of so many values."""
    return torch.uint8 if values <= 256 else torch.uint16


def save_codes(path, codes, values, side, dataset, report, made_from, colour_codes=0):
    """Write codes (N, 2 flips, L) with all that later stages need to know of them, for load_codes. side: of
    the grid of patches, where each has positions of its own, else 0; colour_codes: how many of these, the
    last ones, read its colours; made_from: the ids of tokenizer and images, by name."""
    codes = codes.to(code_type(values))
    splits = {name: [rows.start, rows.stop] for name, rows in dataset.splits.items()}
    id = checksum(made_from)[:16]  # the same when they are made again
    save(path, "codes", codes=codes, V=values, side=side, colour_codes=colour_codes, splits=splits,
         report=report, id=id, made_from=made_from)


def load_codes(path, remedy, images_id=None):
    """What save_codes wrote: a dict with codes (N, 2 flips, L) unsigned, memory-mapped; L, splits {name:
    range of rows}; V, side, colour_codes, report, id. images_id: of the dataset whose codes they must be."""
    lacking = {"side": 0, "colour_codes": 0}  # in codes of an earlier version
    state = lacking | load(path, "codes", remedy, only="codes")
    with reading(path, remedy):
        state["L"] = state["codes"].shape[2]
        state["splits"] = {name: range(*rows) for name, rows in state["splits"].items()}
        if images_id is not None and images_id != state["made_from"]["images"]:
            raise Unfit("codes of other images than there are now: other names, sizes, order or parts")
    return state


def colour_positions(stored):
    """Which positions of codes, as from load_codes, read colours: (L,) bool."""
    per_patch = stored["L"] // max(1, stored["side"] ** 2)
    return torch.arange(stored["L"]) % per_patch >= per_patch - stored["colour_codes"]


def fill_rows(folder, size, run, work, shapes, chunk=2000):
    """Large tensors {name: (size, ...)}, memory-mapped, made in chunks: work(range of rows) → {name: (n,
    ...)}, shapes {name: (the rest of the shape, dtype)}. Processes divide the chunks among them and write
    into files in `folder`; a stopped run goes on. Whoever has used them removes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    intact = all((folder / name).exists() for name in shapes)  # else stopped while the folder was removed
    run.wait()  # all processes have looked
    starts = range(run.rank * chunk, size, run.world * chunk)
    for start in tqdm(starts, desc=folder.name.lstrip("."), disable=not run.shows_bars):
        done = folder / f"{start}.done"
        if intact and done.exists():
            continue
        for name, rows in work(range(start, min(size, start + chunk))).items():
            rows = rows.to(shapes[name][1]).numpy()
            with writing(folder / name):
                (folder / name).touch()
                with open(folder / name, "r+b") as file:
                    file.seek(start * rows[0].nbytes)
                    file.write(rows.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
        done.touch()
    run.wait()
    filled = {}
    for name, (shape, dtype) in shapes.items():
        flat = torch.from_file(str(folder / name), size=size * math.prod(shape), dtype=dtype)
        filled[name] = flat.view(size, *shape)
    return filled


FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc",  # Linux
         "Arial Unicode.ttf", "arial.ttf", "msgothic.ttc", "msyh.ttc", "malgun.ttf")  # macOS, Windows


def find_font(text, size):
    """A font that has all characters of a text (Pillow's own has ASCII alone); None where none is found."""
    if text.isascii():
        return ImageFont.load_default(size)
    for name in FONTS:
        with suppress(OSError, ImportError):
            font = ImageFont.truetype(name, size)
            missing = bytes(font.getmask("\uffff"))  # no character: what is drawn in place of one
            if all(character == " " or bytes(font.getmask(character)) != missing for character in text):
                return font
    return None


def code_colours(V):
    """Colours (V + 1, 3) uint8 for the values of a code; the last, "no code", is grey."""
    hues = [colorsys.hsv_to_rgb(k / V, 0.35 if k % 2 else 0.75, 1.0) for k in range(V)]
    return (torch.tensor([*hues, (0.88, 0.88, 0.88)]) * 255).to(torch.uint8)


def draw_code(code, colours, side, size, texts=None):
    """A picture (3, size, size) uint8 of a code (L,), a square for each position: in place where the code is
    read from side² patches (0: line by line), in the colour of its value, colours (V + 1, 3) uint8. In the
    squares, where there is room, the values, or L `texts`."""
    texts = texts or [str(value) if value < len(colours) - 1 else "" for value in code.tolist()]
    side = max(1, side)
    per_patch = len(code) // side ** 2
    rows = max(k for k in range(1, math.isqrt(per_patch) + 1) if per_patch % k == 0)  # of squares in a patch
    columns, patch = per_patch // rows, size / side
    width, height = (patch - 4) / columns, (patch - 4) / rows  # a gap between patches
    has_room = min(width, height) >= max(10, 6 * max(map(len, texts)))
    canvas = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(canvas)
    for k, colour in enumerate(colours[code].tolist()):
        x = 2 + round(k // per_patch % side * patch + k % columns * width)
        y = 2 + round(k // per_patch // side * patch + k % per_patch // columns * height)
        draw.rectangle((x, y, x + max(0, width - 2), y + max(0, height - 2)), fill=tuple(colour))
        if has_room:
            draw.text((x + width / 2 - 1, y + height / 2 - 1), texts[k], fill="black", anchor="mm")
    return to_tensor(canvas)


def draw_grid(images, columns, titles=(), lines=()):
    """Images (3, S, S) uint8, of several sizes or one, as one picture with `columns` a row; `titles` above
    the columns or above all images, or `lines` above the rows. What no font can write is printed."""
    side = max(image.shape[-1] for image in images)
    side *= max(1, 64 // side)  # small ones are enlarged
    space, font = (2, 10) if side < 128 else (8, 12)
    cell, head = side + space, 14 if 0 < len(titles) <= columns else 0
    line = 14 if lines or len(titles) > columns else 0
    rows = math.ceil(len(images) / columns)
    width = max([columns * cell + 2, *(min(1600, 7 * len(text)) for text in lines)])
    canvas = Image.new("RGB", (width, rows * (cell + line) + 2 + head), "white")
    draw = ImageDraw.Draw(canvas)
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        tile = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        tile = tile.resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(tile, (2 + column * cell, 2 + head + line + row * (cell + line)))
    places = [(3 + k % columns * cell, 1 + k // columns * (cell + line)) for k in range(len(titles))]
    places += [(3, 1 + head + k * (cell + line)) for k in range(len(lines))]
    for k, (place, text) in enumerate(zip(places, [*titles, *lines]), 1):
        text = " ".join(text.split())
        letters = find_font(text, font)
        if letters is None:
            print(f"label ({k}), of which no font here has all characters: {text}", file=sys.stderr)
        draw.text(place, text if letters else f"({k})", fill="black", font=letters)
    return canvas


def save_grid(path, images, columns, titles=(), lines=(), settings=None):
    """Write what `draw_grid` draws as a PNG with `settings` stored inside."""
    canvas = draw_grid(images, columns, titles, lines)
    info = PngImagePlugin.PngInfo()
    info.add_text("settings", json.dumps(settings or {}, default=str))
    write_atomic(path, lambda file: canvas.save(file, format="PNG", pnginfo=info))


def save_animation(path, frames, settings):
    """Write pictures as a GIF, a second for the first, three for the last, with `settings` as its comment."""
    first, *others = [frame.quantize(128, Image.Quantize.FASTOCTREE) for frame in frames]
    more = {"append_images": others, "loop": 0, "duration": [1000, *[200] * (len(others) - 1), 3000],
            "comment": json.dumps(settings, default=str).encode()}
    write_atomic(path, lambda file: first.save(file, format="GIF", save_all=True, **more))


# -------- optimiser and log ----------------------------------------------------------------------------

def cosine(step, steps, start, end):
    """Cosine from `start` at step 0 to `end` at `steps`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


class Optimizers:
    """Muon for the matrices of the transformer blocks and AdamW for everything else (or AdamW for all,
    --lr-matrix 0). Each group of parameters carries its peak learning rate; scale(name): a factor on that of
    a parameter."""

    def __init__(self, model, args, scale=None):
        self.args, matrices, others = args, [], {}
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, p in self.named:
            if args.lr_matrix > 0 and p.ndim == 2 and "blocks." in name:
                matrices.append(p)
            else:
                decays = p.ndim >= 2
                peak = args.lr * (scale(name) if scale else 1.0)
                decay = args.weight_decay * decays
                group = {"params": [], "peak": peak, "weight_decay": decay, "decays": decays}
                others.setdefault((decays, peak), group)["params"].append(p)
        groups = list(others.values())
        self.optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)]
        if matrices:
            group = {"params": matrices, "peak": args.lr_matrix, "decays": True}
            muon = torch.optim.Muon([group], args.lr_matrix, weight_decay=args.weight_decay, momentum=0.95)
            self.optimizers.append(muon)

    def step(self, step, loss, weight_decay=None):
        """One update with the learning rates of this step and, where given, another weight decay (of those
        that have one). Fails before it, in all processes, where the loss or a gradient of any of them is not
        finite. Returns the norm of the gradient."""
        parameters = [p for _, p in self.named]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = total.full_tensor() if hasattr(total, "full_tensor") else total  # of a sharded model
        if not math.isfinite(loss) or not math.isfinite(norm):
            bad = [name for name, p in self.named if p.grad is not None and not p.grad.isfinite().all()]
            what = f"the loss is {float(loss)}"
            if math.isfinite(loss):
                what = f"the gradient of {bad[0] if bad else 'all'} is not finite"
            fail(f"step {step}: {what}; stopped before the update, the last checkpoint is intact. Lower --lr "
                 "or --lr-matrix, or try --dtype float32")
        torch.nn.utils.clip_grads_with_norm_(parameters, self.args.clip or math.inf, total)
        warmup = min(1.0, (step + 1) / (self.args.warmup + 1))
        rate = warmup * cosine(step, self.args.steps, 1.0, self.args.lr_final)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
                if weight_decay is not None and group["decays"]:
                    group["weight_decay"] = weight_decay
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def state_dict(self):
        """States of both optimizers, plain values and tensors."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        """Inverse of state_dict."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def averaged(model, decay):
    """A moving average of a model's weights, for evaluation (torch's AveragedModel: update_parameters,
    module). Update n makes it d · average + (1 − d) · weights with d = decay(n), or, where `decay` is a
    number, min(decay, n / (9 + n)), so that short runs forget their start."""
    def update(averages, weights, n):
        n = int(n)
        d = decay(n) if callable(decay) else min(decay, n / (9 + n))
        torch._foreach_lerp_(averages, weights, 1 - d)

    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)
    average.n_averaged.fill_(1)  # at 0 the first update would copy the weights, not average them
    average.module.requires_grad_(False).eval()
    return average


def whole_states(ema, model, optimizers):
    """The states of a sharded model, its averages and optimizers, whole, in the first process."""
    from torch.distributed.checkpoint import state_dict as api
    options = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
    parts = [api.get_optimizer_state_dict(model, part, options=options) for part in optimizers.optimizers]
    return {"ema": api.get_model_state_dict(ema, options=options),
            "model": api.get_model_state_dict(model, options=options), "optimizers": parts}


def split_states(state, ema, model, optimizers):
    """Inverse of whole_states, on any number of processes; state: None in all but the first."""
    from torch.distributed.checkpoint import state_dict as api
    options = api.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = state or {"ema": {}, "model": {}, "optimizers": [{} for _ in optimizers.optimizers]}
    api.set_model_state_dict(ema, state["ema"], options=options)
    api.set_model_state_dict(model, state["model"], options=options)
    for part, values in zip(optimizers.optimizers, state["optimizers"], strict=True):
        api.set_optimizer_state_dict(model, part, values, options=options)


class Checkpoint:
    """OUT/<dataset>/<stage>.pt: what a training run goes on from, and what others use of it (its averaged
    weights). It holds config (all settings), step, the run's id, the ids of what the run was made from,
    `more` plain values, and the states of averages, model, optimizers and `others` (modules by name)."""

    def __init__(self, stage, args, settings, run, made_from, model, average, optimizers,
                 others=None, **more):
        self.stage, self.args, self.settings, self.run = stage, args, settings, run
        self.made_from, self.average, self.more = made_from, average, more
        self.parts = {"ema": average.module, "model": model, "optimizers": optimizers, **(others or {})}
        self.path = run.folder / f"{stage}.pt"
        self.id = gather(secrets.token_hex(8))[0]  # the same in all processes

    def resume(self, finished_on_others=False):
        """The step to go on from, everything loaded; 0 where there is none, or with --restart. Fails where a
        setting or what the run was made from differs, naming it; of a finished run with `finished_on_others`
        the latter may differ."""
        args, state, step = self.args, None, 0
        now = {name: getattr(args, name) for name in self.settings}
        remedy = "--restart begins anew, another --out keeps it"
        if self.path.exists() and not args.restart and not args.dry_run:
            only = "ema" if self.run.sharded and not self.run.main else None  # the first sends them the rest
            state = load(self.path, self.stage, remedy, only)
            with reading(self.path, remedy):
                step = state["step"]
                before = self.settings | state["config"]  # a flag that it does not know counts as its default
                differ = [f"{name} {before[name]} → {now[name]}" for name in now if before[name] != now[name]]
                remade = [name for name, id in self.made_from.items() if state["made_from"][name] != id]
            if differ:
                what = ", ".join(differ)
                fail(f"{self.path}: trained with other settings ({what}); use those, or: {remedy}")
            names = " and ".join(remade)
            if remade and finished_on_others and step >= args.steps:
                note(f"note: {self.path}: made from other {names} than those that it will encode; {remedy}")
            elif remade:
                fail(f"{self.path}: made from other {names} than now; bring those back, or: {remedy}")
        mine = [now, self.made_from, step]
        if any(other != mine for other in gather(mine)):
            fail("the processes of this run differ in settings, data or step; give all the same command and "
                 "files")
        if state:
            with reading(self.path, f"it is of another version of these scripts; {remedy}"):
                self.id = state["id"]
                self.average.n_averaged.fill_(step + 1)
                if self.run.sharded:
                    split_states(state if self.run.main else None, **self.parts)
                else:
                    for name, part in self.parts.items():
                        part.load_state_dict(state[name])
        if step >= args.steps and self.run.main:
            print(f"{self.path} is finished ({step} steps); --restart of its script trains it again")
        return step

    def save(self, step):
        """Write all of it, whole or not at all (by the first process)."""
        if self.run.sharded:
            states = whole_states(**self.parts)
        else:
            states = {name: part.state_dict() for name, part in self.parts.items()}
        if self.run.main:
            save(self.path, self.stage, **states, **self.more, config=vars(self.args), step=step, id=self.id,
                 made_from=self.made_from)


def load_trained(path, stage, dataset, remedy, **made_from):
    """The checkpoint of a stage, for use: its averaged weights under "ema". Refused where it was trained on
    another dataset or made from something of another id; says so where its training has not ended. remedy:
    ends in the command that trains it."""
    state = load(path, stage, remedy, only="ema")
    with reading(path, f"{remedy} --restart"):
        found, step, steps = state["config"]["dataset"], state["step"], state["config"]["steps"]
        if found != dataset:
            raise Unfit(f"trained on {found}, expected {dataset}")
        for name, id in made_from.items():
            if state["made_from"][name] != id:
                raise Unfit(f"made from other {name} than now")
        if step < steps:
            note(f"note: {path} is not finished (step {step} of {steps})")
    return state


class Log:
    """JSON lines in OUT/<dataset>/<stage>.jsonl, one a call, by the first process. Going on from step
    `start`, lines of later steps, which a killed run left, are dropped: they will come again."""

    def __init__(self, run, stage, start=0):
        self.path, self.main = run.folder / f"{stage}.jsonl", run.main
        lines = self.path.read_bytes().split(b"\n") if self.main and self.path.exists() else []
        kept = []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # cut where the run was killed
                record = json.loads(line)
                end = start if "loss" in record else start - 1  # what is measured at the end comes again
                if record["step"] <= end:
                    kept.append(line + b"\n")
        if self.main:
            write_atomic(self.path, lambda file: file.writelines(kept))

    def write(self, step, **values):
        """Append one line of numbers."""
        if self.main:
            line = json.dumps({"step": step, **values, "time": round(time.time(), 1)})
            with writing(self.path), open(self.path, "ab", buffering=0) as file:
                file.write(f"{line}\n".encode())


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the makers' data sheets


class Steps:
    """The steps of a training run. `for step in steps` shows progress, measures speed (on GPUs of PEAK_FLOPS
    also MFU), saves the checkpoint every --save-every steps and at the end, and, where the run was asked to
    stop, saves it after the step at hand and leaves.

    start: the first step; rows: the range that is trained on; size: how many `units` a step takes. """

    def __init__(self, checkpoint, start, rows, size, units="images"):
        run, args = checkpoint.run, checkpoint.args
        if args.batch_size > len(rows):
            fail(f"--batch-size {args.batch_size} is larger than the {len(rows):,} training images; lower it")
        self.checkpoint, self.run, self.args, self.start = checkpoint, run, args, start
        self.size, self.units = size, units
        self.log = None if args.dry_run else Log(run, checkpoint.stage, start)
        gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
        peaks = [peak for name, peak in PEAK_FLOPS.items() if name in gpu and run.dtype == torch.bfloat16]
        self.peak = peaks[0] if peaks else 0
        self.counts_flops = bool(gpu) and (self.peak > 0 or args.dry_run)
        self.flops, self.summary = 0, ""

    def __iter__(self):
        run, args = self.run, self.args
        self.bar = tqdm(total=args.steps, initial=self.start, disable=not run.shows_bars, dynamic_ncols=True)
        self.began = self.said = time.perf_counter()
        self.shown_step, self.shown_at = self.start, self.began
        Run.stop_asked = False
        for self.step in range(self.start, args.steps):
            with self.counting_flops() if self.counts_flops else nullcontext():
                yield self.step
            stop = run.stopping()
            if (stop or self.at_checkpoint) and not args.dry_run:
                self.checkpoint.save(self.step + 1)
            if stop:
                again = "the same command" + " without --restart" * args.restart
                note(f"stopped at step {self.step + 1} of {args.steps}, saved; {again} goes on from it")
                run.wait()
                raise SystemExit(143)  # so that nobody takes it for finished
            if args.dry_run and self.step in (self.start + 1, args.steps - 1):
                memory = torch.cuda.max_memory_allocated() / 2 ** 30
                print(f"{self.flops / 1e12:.3f} TFLOP and {memory:.2f} GiB a step, in each process")
                raise SystemExit(0)
        Run.stop_asked = None
        self.bar.close()
        if self.summary:
            print(self.summary)

    @property
    def at_checkpoint(self):
        """Whether a checkpoint is written after this step, asked to stop or not."""
        done = self.step + 1
        return done % self.args.save_every == 0 or done == self.args.steps

    @contextmanager
    def counting_flops(self):
        """Count the FLOPs of this process in its first step, which runs eagerly: compiled code cannot be
        counted. (So on CUDA a run that goes on rounds its first step otherwise than one never stopped.)"""
        from torch.utils.flop_counter import FlopCounterMode  # seconds to import
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            yield
        self.flops, self.counts_flops = counter.get_total_flops(), False
        torch.cuda.reset_peak_memory_stats()

    def show(self, **values):
        """After each step; every 50 steps the values are averaged over processes, shown and logged. Without a
        bar a line says every SILENCE seconds that the run is alive."""
        self.bar.update(1)
        run, done, now = self.run, self.step + 1, time.perf_counter()
        if run.main and not run.shows_bars and now - self.said > SILENCE:
            self.said, seconds = now, (now - self.began) / (done - self.start)
            left = tqdm.format_interval((self.args.steps - done) * seconds)
            print(f"step {done} of {self.args.steps}, loss {float(values['loss']):.4f}, "
                  f"{seconds * 1e3:.0f} ms a step, {left} left", flush=True)
        if self.args.dry_run or done % 50 and done != self.args.steps:
            return
        for name, value in values.items():
            value = torch.as_tensor(value, device=run.device).detach().float().clone()
            values[name] = run.average(value).item()
        if not run.main:
            return
        now = time.perf_counter()  # the device has finished by now
        seconds = (now - self.shown_at) / (done - self.shown_step)
        self.shown_step, self.shown_at = done, now
        rate = self.size / seconds
        speed = {"ms": round(seconds * 1e3, 1), f"{self.units} per second": round(rate, 1)}
        self.summary = (f"{done} steps, {now - self.began:.0f} s in this run, last {seconds * 1e3:.0f} ms a "
                        f"step, {rate:,.0f} {self.units}/s, {values['loss']:.4f} loss")
        if self.peak:
            speed["mfu"] = round(self.flops / seconds / self.peak, 3)
            self.summary += f", MFU {speed['mfu']:.2f} of {self.peak / 1e12:.0f} TFLOP/s"
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()} | speed)
        self.log.write(done, **{name: round(value, 5) for name, value in values.items()}, **speed)


def dry_run(args, model, run):
    """--dry-run: print settings and parameters, and end; on CUDA go on, for Steps to measure two steps."""
    for name, value in sorted(vars(args).items()):
        print(f"  {name.replace('_', '-'):18} {value}")
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(run.dtype).removeprefix("torch.")
    print(f"{parameters / 1e6:.2f}M parameters; device {run.device}, {dtype}, {run.world} process(es)")
    if run.device.type != "cuda":
        raise SystemExit(0)


def main(argv=None):
    """Prepare, check and show a dataset."""
    parser = make_parser(__doc__)
    parser.add_argument("--download", action="store_true", help="cifar10: fetch the archive into --data-dir")
    args = parse(parser, PRESETS, argv)
    if args.download and args.dataset != "cifar10":
        parser.error("argument --download: only cifar10 can be downloaded")
    if args.download:
        fetch_cifar(Path(args.data_dir))
    dataset, folder = load_dataset(args), run_folder(args)
    splits = ", ".join(f"{name} {len(rows):,}" for name, rows in dataset.splits.items())
    print(f"{args.dataset}: {len(dataset):,} images of {args.image_size}×{args.image_size}; {splits}")
    for k, (name, values) in enumerate(dataset.factors.items()):
        counts = torch.bincount(dataset.labels[:, k], minlength=len(values)).tolist()
        print(f"  {name}: " + listed([f"{value} {n:,}" for value, n in zip(values, counts)], 12))
    rows = [row for split in dataset.splits.values() for row in list(split)[:16]]
    path = folder / "samples" / "data.png"
    save_grid(path, dataset.pixels(rows), 16, settings=vars(args))
    print(f"  e.g. {dataset.captions[0]!r}; 16 pictures of each split in {path}")


if __name__ == "__main__":
    run_script(main)
