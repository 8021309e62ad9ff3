"""What every stage must agree on: datasets, batches, augmentation, files on disk, start-up, EMA, schedule, log and grids.

There is no model and no loss here. A dataset is images (N, 3, S, S) as bytes, labels (N, F) with one column a factor,
captions, and splits train / val (for choosing) / test (for reporting). Batches and all randomness are functions of
(seed, step), so a run that stopped goes on exactly where it was.

Prepare, check and look at a dataset (writes OUT/<dataset>/samples/data.png):
    python data.py                                              # shapes: drawn on the spot, nothing to download
    python data.py --dataset cifar10 --download                 # the official binary archive into data/cifar10
    python data.py --dataset folder --data-dir my/pictures      # any tree of images, a class per sub-folder
    python data.py --dataset imagenet --data-dir /data/imagenet --image-size 256

Letters used everywhere: B batch, N images or tokens, S image side, F factors, L code positions, V values per position, D width.
"""
import ctypes
import os
import signal
import threading

_on_ctrl_c = signal.getsignal(signal.SIGINT)
if threading.current_thread() is threading.main_thread():  # Ctrl-C in the seconds that torch takes to be imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: two processes on the same cores do not fight,
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # but only after a moment: waking them costs a fifth of a small step
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's allocator would give freed tensors back to the system and
if _mallopt and _mallopt(-3, 1 << 25):  # fault them in again in every step, up to a quarter of a small one: M_MMAP_THRESHOLD,
    _mallopt(-1, 2 ** 31 - 1)  # 32 MiB is the most it takes, and M_TRIM_THRESHOLD: keep them

import argparse
import errno
import fcntl
import functools
import hashlib
import http.client
import json
import math
import multiprocessing
import re
import resource
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import urllib.request
import weakref
import zipfile
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _on_ctrl_c)
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()  # those this process may use (Linux)
PATIENCE = 10  # seconds for an answer from the network
DATASETS = ("shapes", "cifar10", "imagenet", "folder")


def fail(message):
    """Stop with one clear line on stderr and exit code 1."""
    line = " ".join(str(message).split())
    raise SystemExit("error: " + (line if len(line) < 2000 else f"{line[:1200]} ... {line[-600:]}"))


# ---------------------------------------------------------------------------------------------------------------------
# shapes: an object in a frame, drawn from known factors
# ---------------------------------------------------------------------------------------------------------------------

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
# Pairs of factors with combinations that never occur in train, val and test: value i of the first never meets value
# i mod n of the second. The pair in one place (the same pixels) is the hard kind, the pair in two places the easy one.
UNSEEN_PAIRS = {"unseen-shape-colour": ("shape", "colour"), "unseen-colour-frame": ("colour", "frame")}
SHAPES_COUNTS = {"train": 32_000, "val": 2_000, "test": 4_000, "unseen-shape-colour": 2_000, "unseen-colour-frame": 2_000}


def is_unseen(labels, pair):
    """Which rows of `labels` (N, F) show a combination of `pair` (two factor names) that training never shows: (N,) bool."""
    first, second = (list(SHAPES).index(name) for name in pair)
    return labels[:, first] % len(SHAPES[pair[1]]) == labels[:, second]


def signed_distance(shape, x, y):
    """Distance to the outline of `shape` at radius 1, negative inside; x, y (...) in radii, y pointing down.

    Every shape is its own mirror image, so that a flipped drawing is a drawing like any other.
    """
    r, box = torch.hypot(x, y), lambda w, h: torch.maximum(x.abs() - w, y.abs() - h)
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

    labels (N, 5) long, columns as in SHAPES; nuisance (N, 8) uniform in [0, 1): shift x, y, tilt, two of background
    phase, three of colour. Returns (N, 3, size, size) uint8. Lengths are in pixels of a 32-pixel image.
    """
    n = len(labels)
    shift, tilt = (nuisance[:, :2] * 2 - 1) * 1.0, (nuisance[:, 2] * 2 - 1) * math.radians(5)
    grid = (torch.arange(size) + 0.5) * 32 / size - 16
    y, x = (g.expand(n, size, size) for g in torch.meshgrid(grid, grid, indexing="ij"))
    ink = lambda d: (0.5 - d * size / 32).clamp(0, 1)  # signed distance in pixels → coverage (anti-aliasing)

    phase = (nuisance[:, 3:5, None, None] * 2 - 1) * 0.5
    u, v = x + phase[:, :1, 0], y + phase[:, 1:, 0]
    wave = lambda a: (a % 8 - 4).abs() - 2  # triangle wave of period 8, zero at the edges of a band of width 4
    tone = torch.stack([torch.full_like(u, 0.78), torch.full_like(u, 0.36), 0.72 - 0.24 * ink(wave(u)),
                        0.72 - 0.24 * ink(torch.hypot(u % 8 - 4, v % 8 - 4) - 2.4)], 1)  # one of each background
    image = tone[torch.arange(n), labels[:, 3]][:, None].expand(n, 3, size, size)

    radius = torch.tensor([7.0, 10.5])[labels[:, 2]][:, None, None]
    cx, cy = x - shift[:, 0, None, None], y - shift[:, 1, None, None]
    cos, sin = tilt.cos()[:, None, None], tilt.sin()[:, None, None]
    cx, cy = (cx * cos + cy * sin) / radius, (cy * cos - cx * sin) / radius
    distance = torch.empty(n, size, size)
    for k, shape in enumerate(SHAPES["shape"]):
        rows = labels[:, 0] == k
        distance[rows] = signed_distance(shape, cx[rows], cy[rows])
    palette = lambda names: torch.tensor([RGB[name] for name in names])
    colour = palette(SHAPES["colour"])[labels[:, 1]] + (nuisance[:, 5:8] - 0.5) * 0.04
    alpha = ink(distance * radius)[:, None]
    image = image * (1 - alpha) + colour.clamp(0, 1)[:, :, None, None] * alpha

    frame = palette(SHAPES["frame"])[labels[:, 4]][:, :, None, None]
    alpha = ink(13.0 - torch.maximum(x.abs(), y.abs()))[:, None]
    return ((image * (1 - alpha) + frame * alpha) * 255).round().to(torch.uint8)


def shapes_labels(split, count, seed=0):
    """Factors (count, 5) of one split, a function of (seed, split, index), uniform nuisances (count, 8), and which of colour,
    size, background and frame the caption says (count, 4) bool: two captions in three say all, the others each with probability ½."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:8], "little")
    rows = np.random.Generator(np.random.Philox(key=key)).random((count, 13 + 16), dtype=np.float64)
    uniform, sizes = torch.from_numpy(rows).float(), torch.tensor([len(v) for v in SHAPES.values()])
    labels = (uniform[:, :5] * sizes).long()
    names = list(SHAPES)
    for k, (kind, (first, second)) in enumerate(UNSEEN_PAIRS.items()):
        a, b, values = labels[:, names.index(first)], labels[:, names.index(second)], len(SHAPES[second])
        if kind == split:
            b.copy_(a % values)
        else:  # move the second factor away from the excluded value, uniformly over the others
            b.copy_((a % values + 1 + (uniform[:, 13 + k] * (values - 1)).long()) % values)
    return labels, uniform[:, 5:13], (uniform[:, 15:16] < 2 / 3) | (uniform[:, 16:20] < 0.5)


def with_article(words):
    """"an orange ring", "a red ring"."""
    return f"a{'n' * (words[0].lower() in 'aeiou')} {words}"


def shapes_caption(labels, said=(True,) * 4):
    """"a small red ring on a dotted background in a blue frame" from factors (5,); `said`: whether colour, size, background, frame are."""
    shape, colour, size, background, frame = (values[k] for values, k in zip(SHAPES.values(), labels))
    words = [word for word, spoken in zip((size, colour), (said[1], said[0])) if spoken] + [shape]
    return with_article(" ".join(words)) + said[2] * f" on a {background} background" + said[3] * f" in {with_article(frame)} frame"


def read_shapes_caption(text):
    """The factors (5,) that a caption names, −1 for those it does not; None where it is no caption of shapes. Inverse of shapes_caption."""
    shape, colour, size, background, frame = ("|".join(values) for values in SHAPES.values())
    match = re.fullmatch(f"an? (?:({size}) )?(?:({colour}) )?({shape})(?: on a ({background}) background)?(?: in an? ({frame}) frame)?", text)
    if not match:
        return None
    size, colour, shape, background, frame = match.groups()
    said = zip(SHAPES.values(), (shape, colour, size, background, frame))
    return [values.index(word) if word else -1 for values, word in said]


def load_shapes(args):
    """The generated dataset: every image follows from (0, split, index); --seed changes training, not the data."""
    images, labels, captions, splits, start = [], [], [], {}, 0
    for split, count in SHAPES_COUNTS.items():
        factors, nuisance, said = shapes_labels(split, count)
        images += [draw_shapes(f, u, args.image_size) for f, u in zip(factors.split(512), nuisance.split(512))]
        labels.append(factors)
        captions += map(shapes_caption, factors.tolist(), said.tolist())
        splits[split] = range(start, start := start + count)
    return Dataset("shapes", torch.cat(images), torch.cat(labels), SHAPES, splits, captions, source=SHAPES_COUNTS)


# ---------------------------------------------------------------------------------------------------------------------
# cifar10: the official binary archive
# ---------------------------------------------------------------------------------------------------------------------

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_FILES = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
CIFAR_BYTES = 30_730_000  # 10,000 records of a label byte and 3,072 bytes of red, green and blue planes


def fetch_cifar(folder):
    """Download the archive into `folder` (written under a temporary name, checked by load_cifar10)."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "cifar-10-binary.tar.gz"
    try:
        with urllib.request.urlopen(CIFAR_URL, timeout=PATIENCE) as response, open(f"{target}.tmp", "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
        os.replace(f"{target}.tmp", target)
    except (OSError, http.client.HTTPException) as problem:
        Path(f"{target}.tmp").unlink(missing_ok=True)
        fail(f"cannot download {CIFAR_URL} ({problem}); get it on another machine and put it at {target}")


def load_cifar10(args):
    """CIFAR-10 from `--data-dir`: the archive cifar-10-binary.tar.gz, or its .bin files. No pickle is read."""
    folder = Path(args.data_dir)
    found = {path.name: path for path in folder.rglob("*.bin") if path.is_file()} if folder.is_dir() else {}
    archive = folder / "cifar-10-binary.tar.gz"
    if all(name in found for name in CIFAR_FILES):
        parts = [found[name].read_bytes() for name in CIFAR_FILES]
    elif archive.is_file():
        with open(archive, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != CIFAR_MD5:
            fail(f"{archive}: md5 is {md5}, expected {CIFAR_MD5}; delete it and fetch {CIFAR_URL} again")
        try:
            with tarfile.open(archive) as tar:  # members are read in memory by name, nothing is unpacked to disk
                parts = [tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in CIFAR_FILES]
        except Exception as problem:  # tarfile and zlib raise many kinds
            fail(f"{archive}: not the archive of CIFAR-10 ({type(problem).__name__}); fetch {CIFAR_URL} again")
    else:
        fail(f"no CIFAR-10 in {folder}: put {archive.name} (from {CIFAR_URL}) or its .bin files there, "
             "or run python data.py --dataset cifar10 --download")
    for name, part in zip(CIFAR_FILES, parts):
        if len(part) != CIFAR_BYTES:
            fail(f"{name} in {folder}: {len(part):,} bytes, expected {CIFAR_BYTES:,}; fetch {CIFAR_URL} again")
    records = torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(-1, 3073).copy())
    labels, images = records[:, :1].long(), records[:, 1:].reshape(-1, 3, 32, 32)
    if labels.max() > 9:
        fail(f"CIFAR-10 in {folder}: a label of {labels.max()}, expected 0 to 9; fetch {CIFAR_URL} again")
    if args.image_size != 32:
        resize = lambda part: F.interpolate(part.float(), size=args.image_size, mode="bicubic", antialias=True)
        images = torch.cat([resize(part).round().clamp(0, 255).byte() for part in images.split(1000)])
    n = len(images)  # 60,000: 45,000 to train, 5,000 to choose, and the test file
    splits = {"train": range(0, n * 3 // 4), "val": range(n * 3 // 4, n * 5 // 6), "test": range(n * 5 // 6, n)}
    captions = [f"a photo of {with_article(name)}" for name in CIFAR_CLASSES]
    return Dataset("cifar10", images, labels, {"class": CIFAR_CLASSES}, splits, [captions[k] for k in labels[:, 0].tolist()],
                   source=hashlib.sha256(records.numpy()).hexdigest())


# ---------------------------------------------------------------------------------------------------------------------
# folder and imagenet: any tree of images
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
IN_MEMORY_BYTES = 2 << 30  # a folder whose decoded images exceed this is decoded on the fly by workers


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # whatever a file is named: other decoders of Pillow stay out of reach


@contextmanager
def open_image(path, least):
    """An image of any mode as RGB, upright, on white. least(width, height), the same for a lying image: the share of its size at which a
    JPEG may be decoded, which is faster, without losing anything. Raises whatever Pillow does where the file is not a whole image."""
    with Image.open(path, formats=FORMATS) as image:
        share = least(*image.size)
        image.draft("RGB", tuple(math.ceil(side * share) for side in image.size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 and 32 bits, floats: scale to a byte, Pillow would clip
            values = np.asarray(image, dtype=np.float64)
            if not np.isfinite(values).all():
                raise ValueError("values that are not finite")
            whites = (65535,) if image.mode.startswith("I;16") else (255, 65535) if image.mode == "I" else (1, 255, 65535)
            white = next((white for white in whites if values.max() <= white), values.max())  # the least of the usual ones
            image = Image.fromarray((values.clip(min=0) * (255 / white)).astype(np.uint8))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        yield image.convert("RGB")


def to_tensor(image):
    """A Pillow image → (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_image(path, size):
    """Read an image as (3, size, size) uint8: centre crop, box then bicubic (ADM). Raises as open_image."""
    with open_image(path, lambda width, height: min(1.0, 2 * size / min(width, height))) as image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        while side >= 2 * size:  # halve by averaging before the last bicubic step
            side //= 2
            image, box = image.resize((side, side), Image.Resampling.BOX, box=box), None
        return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def read_crops(path, views, ratio, u):
    """Random resized crops of an image, cut from the whole of it: views [(size, scale), ...], u (views, 5) uniform, both as crop_boxes
    → [(3, size, size) uint8, ...]. Raises as open_image."""
    boxes = lambda w, h: [crop_boxes(row, scale, ratio, w / h) for row, (_, scale) in zip(u, views)]

    least = lambda w, h: min(1.0, max(size / min(box[2] * w, box[3] * h) for box, (size, _) in zip(boxes(w, h), views)))
    with open_image(path, least) as image:
        (w, h), crops = image.size, []
        for (x, y, width, height, flip), (size, _) in zip(boxes(w, h), views):
            left, top = (1 + x - width) / 2 * w, (1 + y - height) / 2 * h
            box = (max(0.0, float(left)), max(0.0, float(top)), min(w, float(left + width * w)), min(h, float(top + height * h)))
            crop = to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
            crops.append(crop.flip(2) if flip else crop)
    return crops


class Unreadable(Exception):
    """An image that opened before and does not any more. A loader hands on what happens in its workers as a long text: the last line counts."""

    def __init__(self, text):
        super().__init__(text.strip().rsplit("Unreadable: ")[-1])


class ImageFiles(torch.utils.data.Dataset):
    """Images decoded when asked for: item k is (3, S, S) uint8."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, k):
        return self.read(k, lambda path: read_image(path, self.size))

    def read(self, k, how):
        """how(path) of image k. Raises Unreadable."""
        try:
            return how(self.paths[k])
        except Exception as problem:  # each of Pillow's decoders raises its own kinds
            raise Unreadable(f"{self.paths[k]}: does not open as an image any more ({' '.join(str(problem).split())}); bring it back as it was, or "
                             "delete OUT/<dataset>/files.json to check all files again") from None


class CheckedFiles(ImageFiles):
    """As ImageFiles; item k is (SHA-256 of the file, its image), or None for a broken file."""

    def __getitem__(self, k):
        try:
            return file_checksum(self.paths[k]), read_image(self.paths[k], self.size)
        except Exception:  # each of Pillow's decoders raises its own kinds
            return None


def list_files(folder, out=None):
    """Paths below `folder` of all files, sorted, but for those below `out`; linked folders are walked too, but for a link to a folder
    that holds it."""
    paths, out = [], out and os.path.join(os.path.realpath(out), "")
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = lambda *names: os.path.join(os.path.realpath(os.path.join(parent, *names)), "")
        folders[:] = [name for name in folders if not real().startswith(real(name)) and real(name) != out]
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in files]
    return sorted(path for path in paths if os.path.isfile(folder / path))


def read_captions(folder, files):
    """Captions by path below `folder` from each metadata.jsonl among its `files` (lines with file_name, from where the file lies, and text)."""
    captions = {}
    for path in (folder / name for name in files if os.path.basename(name) == "metadata.jsonl"):
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as problem:
            fail(f"{path}: not readable as UTF-8 text ({problem}); save it as UTF-8")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
                name, text = record["file_name"], record["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                fail(f"{where}: expected one JSON object, {{\"file_name\": \"a.png\", \"text\": \"what it shows\"}}")
            if not isinstance(name, str) or not isinstance(text, str):
                fail(f"{where}: file_name and text must be strings, in quotes")
            if Path(name).is_absolute() or ".." in Path(name).parts:
                fail(f"{where}: {name} leaves the folder; name files inside {path.parent}")
            if not os.path.isfile(path.parent / name):
                fail(f"{where}: {name} is not in {path.parent}; bring it there or remove the line")
            name = str((path.parent / name).relative_to(folder))  # ./a.png is a.png
            if name in captions:
                fail(f"{where}: {name} has a caption already; keep one line for each image")
            captions[name] = text.strip()
    return captions


def load_folder(args):
    """Images under `--data-dir`. With train/ beside test/ or val/ those are the splits (where there is one of the two, it is for
    reporting, and a slice of train/ is for choosing), else a fixed 90/5/5 % of the files.

    The class is the first sub-folder. Captions come from metadata.jsonl (images that it does not name have none), without that file
    from the class. Broken files are named once and skipped the same way in every run: OUT/<dataset>/files.json remembers the good ones.
    """
    folder = Path(args.data_dir)
    if not folder.is_dir():
        tree = "train/ and val/ with a sub-folder for each class" if args.dataset == "imagenet" else "images, in sub-folders or not"
        fail(f"no folder {folder}: link or copy a tree there ({tree}), or name one with --data-dir")
    files = list_files(folder, args.out)
    names = [name for name in files if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if not names:
        fail(f"{folder}: no images found ({', '.join(sorted(IMAGE_SUFFIXES))}); put some there, or name another folder with --data-dir")
    if args.dataset == "imagenet" and not {"train", "val"} <= {Path(name).parts[0] for name in names}:
        fail(f"{folder}: expected train/ and val/, each with a sub-folder of images for each class, found "
             f"{', '.join(sorted({Path(name).parts[0] for name in names})[:5])}; link or move the parts there")
    captions = read_captions(folder, files)
    names, images, contents = check_folder(folder, names, args)

    top = np.array([Path(name).parts[0] for name in names])
    held_out = [part for part in ("test", "val", "valid", "validation") if part in top]
    if held_out and "train" in top:  # ready-made splits
        class_part, train = 1, np.random.default_rng(0).permutation(np.flatnonzero(top == "train"))
        test, few = np.flatnonzero(top == held_out[0]), max(2, min(len(train) // 20, 10_000))
        val, train = (np.flatnonzero(top == held_out[1]), train) if len(held_out) > 1 else (train[:few], train[few:])
    else:
        class_part, few = int(set(top) == {"train"}), max(2, len(names) // 20)
        test, val, train = np.split(np.random.default_rng(0).permutation(len(names)), [few, 2 * few])
    if min(len(test), len(val)) < 2 or len(names) < 20:
        fail(f"{folder}: {len(names)} images are too few, or too few of them to report on ({len(test)}); bring at least 20 in all, 2 in test/ and val/")
    parts = {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}
    order, splits, start = np.concatenate(list(parts.values())), {}, 0
    for split, rows in parts.items():
        splits[split] = range(start, start := start + len(rows))
    names = [names[k] for k in order]
    images = images[torch.from_numpy(order)] if torch.is_tensor(images) else ImageFiles([images.paths[k] for k in order], args.image_size)

    folders = [Path(name).parts[class_part] if len(Path(name).parts) > class_part + 1 else "" for name in names]
    classes = sorted(set(folders))
    labels = torch.tensor([[classes.index(c)] for c in folders]) if len(classes) > 1 else torch.zeros(len(names), 0).long()
    of_class = lambda c: f"a photo of {with_article(c.replace('_', ' '))}" if c and len(classes) > 1 else ""
    texts = [captions.get(name, "") if captions else of_class(c) for name, c in zip(names, folders)]
    return Dataset(args.dataset, images, labels, {"class": classes} if len(classes) > 1 else {}, splits, texts, source=[names, contents])


def check_folder(folder, names, args):
    """Decode every file once. Returns the names of the good ones, their pixels as one tensor or (ImageNet, and a large tree) files to decode
    on demand, and a checksum of their contents.

    Pixels are read by each process at each start. Files to decode on demand are shared by the processes and checked once: their names,
    sizes and times of change, kept in files.json, say that they are the same ones.
    """
    in_memory = args.dataset != "imagenet" and len(names) * 3 * args.image_size ** 2 <= IN_MEMORY_BYTES
    index, stats = run_folder(args) / "files.json", [os.stat(folder / name) for name in names]
    tree = [str(folder.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)]]
    try:
        known = json.loads(index.read_text())
        known = known if known.pop("checksum") == checksum([tree, known]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = None  # none yet, or not whole: all are checked again
    agree(**{"number of images": len(names), "checksum of their names": checksum(names)})
    known = known if all(other == known for other in gather(known)) else None  # all check, or none: copies on several nodes differ in their times
    pixels, before = [], known
    if known is None or in_memory:
        share = dist.is_initialized() and not in_memory
        mine = names[dist.get_rank()::dist.get_world_size()] if share else names
        files = CheckedFiles([folder / name for name in mine], args.image_size)
        loader = torch.utils.data.DataLoader(files, batch_size=64, num_workers=args.workers, collate_fn=list, worker_init_fn=begin_worker)
        found = {}  # name: checksum, None of a broken file
        progress = tqdm(zip((file for batch in loader for file in batch), mine), "check images", len(mine), disable=not sys.stderr.isatty())
        for file, name in progress:
            found[name], image = file or (None, None)
            if file and in_memory:
                pixels.append(image)
        if share:
            found = {name: value for part in gather(found) for name, value in part.items()}
        known = {"bad": [name for name in names if not found[name]], "contents": checksum([found[name] for name in names if found[name]])}
        write_json(index, {**known, "checksum": checksum([tree, known])})
    bad = set(known["bad"])
    if bad and (not before or before["bad"] != known["bad"]) and int(os.environ.get("RANK", 0)) == 0:
        print(f"{folder}: {len(bad)} of {len(names)} files do not open as images and are skipped: {', '.join(known['bad'][:10])}"
              + (", ..." if len(bad) > 10 else ""), file=sys.stderr)
    good = [name for name in names if name not in bad]
    if not good:
        fail(f"{folder}: none of its {len(names)} files opens as an image; expected {', '.join(FORMATS)}")
    images = torch.stack(pixels) if in_memory else ImageFiles([folder / name for name in good], args.image_size)
    return good, images, known["contents"]


# ---------------------------------------------------------------------------------------------------------------------
# a dataset, its batches, its augmentation
# ---------------------------------------------------------------------------------------------------------------------

class Dataset:
    """Images, labels and captions with their splits.

    images (N, 3, S, S) uint8 tensor, or ImageFiles where they do not fit in memory; labels (N, F) long; factors
    {name: values} in the order of the label columns; splits {name: range of rows}; captions (N,) texts, "" where there is none; source:
    plain values that say which images these are, in which order. `checksum` is that of source and splits: codes hold for no other images.
    """

    def __init__(self, name, images, labels, factors, splits, captions, source):
        self.name, self.images, self.labels, self.factors, self.splits, self.captions = name, images, labels, factors, splits, captions
        self.checksum = checksum([name, source, {split: [rows.start, rows.stop] for split, rows in splits.items()}])

    def __len__(self):
        return len(self.images)

    def pixels(self, rows, flip=None):
        """Images `rows` as (B, 3, S, S) uint8 on the CPU; `flip` (B,) bool mirrors left and right."""
        rows = torch.as_tensor(rows)
        images = self.images[rows] if torch.is_tensor(self.images) else torch.stack([self.images[k] for k in rows.tolist()])
        return images if flip is None else torch.where(flip[:, None, None, None], images.flip(3), images)

    def batches(self, rows, size, workers):
        """Yield the images of a range of rows in order, (b, 3, S, S) with b up to `size`; those in files are decoded ahead by `workers`."""
        if torch.is_tensor(self.images):
            yield from self.images[rows.start:rows.stop].split(size)
        else:
            yield from torch.utils.data.DataLoader(torch.utils.data.Subset(self.images, rows), batch_size=size, num_workers=workers,
                                                   worker_init_fn=begin_worker)


def load_dataset(args):
    """The dataset that the flags name. Fails with one line when it is missing or broken."""
    loaders = {"shapes": load_shapes, "cifar10": load_cifar10, "imagenet": load_folder, "folder": load_folder}
    dataset = loaders[args.dataset](args)
    if "batch_size" in args and len(dataset.splits["train"]) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is larger than the {len(dataset.splits['train'])} training images of {args.dataset}; lower it")
    return dataset


def mix_seed(*numbers):
    """One 63-bit seed from several numbers, so that neighbouring steps and seeds share nothing."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def step_generator(seed, step, device="cpu"):
    """The random generator of one step: whatever is drawn from it is a function of (seed, step)."""
    return torch.Generator(device).manual_seed(mix_seed(seed, step))


class Draws:
    """The randomness of one step, a function of (seed, step) alone: drawn for the whole batch, handed out by this process's share."""

    def __init__(self, seed, step, run, batch_size, part=0, parts=1):
        self.generator, self.run = step_generator(seed, step, run.device), run
        self.batch_size, self.part, self.parts = batch_size, part, parts

    def uniform(self, *shape):
        """Uniform in [0, 1): (b, *shape) for the b samples at hand."""
        return self._mine(torch.rand(self.batch_size, *shape, generator=self.generator, device=self.run.device))

    def normal(self, *shape):
        """Standard normal: (b, *shape) for the b samples at hand."""
        return self._mine(torch.randn(self.batch_size, *shape, generator=self.generator, device=self.run.device))

    def stratified(self):
        """Uniform in [0, 1) for each sample, spread evenly over the batch: (b,)."""
        order = torch.arange(self.batch_size, device=self.run.device)
        return self._mine((order + torch.rand(self.batch_size, generator=self.generator, device=self.run.device)) / self.batch_size)

    def _mine(self, values):
        return values[self.run.share(self.batch_size)].chunk(self.parts)[self.part]


def batch_rows(rows, batch_size, seed, step):
    """Rows (batch_size,) of step `step`: walks through a fresh permutation of the range `rows` each epoch."""
    n, places = len(rows), np.arange(step * batch_size, (step + 1) * batch_size)
    order = {epoch: _permutation(n, seed, int(epoch)) for epoch in np.unique(places // n)}
    return torch.tensor([rows.start + int(order[p // n][p % n]) for p in places])


_permutations = {}


def _permutation(n, seed, epoch):
    if (n, seed, epoch) not in _permutations:
        if len(_permutations) > 3:  # an epoch or two are alive at a time
            _permutations.clear()
        _permutations[n, seed, epoch] = np.random.default_rng(mix_seed(seed, epoch, n)).permutation(n)
    return _permutations[n, seed, epoch]


def ignore_signals():
    """Be deaf to Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _begin_worker(cores, worker):
    ignore_signals()  # they may reach all processes of a terminal or job, and are for the one that the worker serves
    if cores:
        os.sched_setaffinity(0, cores)  # not only the one core of the thread that started it


begin_worker = functools.partial(_begin_worker, CORES)  # worker_init_fn of all loaders; the cores go along where workers are not forked


class _StepImages(torch.utils.data.Dataset):
    """Item `step` is this process's share of that step's images (or of their crops), so that loader workers decode whole batches ahead."""

    def __init__(self, dataset, mine, args, views):
        self.images, self.train, self.mine, self.args, self.views = dataset.images, dataset.splits["train"], mine, args, views

    def __getitem__(self, step):
        args, mine = self.args, self.mine
        rows = batch_rows(self.train, args.batch_size, args.seed, step)
        if torch.is_tensor(self.images):
            return rows, self.images[rows[mine]]
        if not self.views:
            return rows, torch.stack([self.images[k] for k in rows[mine].tolist()])
        u = torch.rand(len(rows), len(self.views), 5, generator=step_generator(args.seed, step))[mine]  # whatever the worker
        crops = [self.images.read(k, lambda path, u=u: read_crops(path, self.views, args.ratio, u)) for k, u in zip(rows[mine].tolist(), u)]
        return rows, [torch.stack(view) for view in zip(*crops)]


def image_batches(dataset, run, args, start, views=None):
    """Yield (step, rows (B,), images of this process (B / world, 3, S, S) uint8 on the device) from `start` to --steps.

    views [(size, scale), ...]: where the images lie in files, in place of them a list of random crops [(B / world, 3, size, size)], cut by
    the workers from the whole images. Order and crops are functions of (seed, step), whatever the number of workers.
    """
    in_memory = torch.is_tensor(dataset.images)
    steps = _StepImages(dataset, run.share(args.batch_size), args, views)
    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(start, args.steps), pin_memory=run.device.type == "cuda",
                                         num_workers=0 if in_memory else args.workers, worker_init_fn=begin_worker)
    to = lambda x: x.to(run.device, non_blocking=True)
    for step, (rows, images) in zip(range(start, args.steps), loader):
        yield step, rows, to(images) if torch.is_tensor(images) else [to(view) for view in images]


def row_batches(dataset, args, start):
    """As image_batches, for what is stored row by row: (step, rows (B,), None)."""
    for step in range(start, args.steps):
        yield step, batch_rows(dataset.splits["train"], args.batch_size, args.seed, step), None


def unit(images):
    """Bytes (..., 3, S, S) → floats in [-1, 1], the range all networks see."""
    return images.float() / 127.5 - 1


def to_bytes(images):
    """Floats in [-1, 1] → bytes, the inverse of `unit`."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def crop_boxes(u, scale, ratio, aspect=1.0):
    """Boxes of random resized crops and whether to mirror (p 0.5), from u (..., 5) uniform, for images whose width / height is `aspect`.

    scale: the crop's share of the area, from and to; ratio: smallest width / height, the largest is its inverse. Returns centre x, y
    in [-1, 1], width and height as shares of the image's, mirror: each (...).
    """
    area = scale[0] + (scale[1] - scale[0]) * u[..., 0]
    shape = torch.exp((2 * u[..., 1] - 1) * math.log(ratio)) / aspect
    width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    return (1 - width) * (2 * u[..., 2] - 1), (1 - height) * (2 * u[..., 3] - 1), width, height, u[..., 4] < 0.5


def random_crops(images, size, scale, ratio, draws):
    """Random resized crop and flip of a batch, as crop_boxes, bilinear, all in one grid_sample. images (B, 3, S, S) in [-1, 1]
    → (B, 3, size, size)."""
    b, device = len(images), images.device
    left, top, width, height, mirror = crop_boxes(draws.uniform(5), scale, ratio)
    sign = torch.where(mirror, -1.0, 1.0)
    theta = torch.zeros(b, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = width * sign, left, height, top
    grid = F.affine_grid(theta, (b, 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def colour_augment(images, jitter, jitter_p, grey_p, blur_p, solarise_p, draws):
    """Brightness, contrast, saturation and hue jitter, grey, blur and solarisation, each with its probability per picture.

    images (B, 3, S, S) in [-1, 1] → the same shape; jitter = (brightness, contrast, saturation, hue) as largest
    relative changes (hue as a share of the colour circle). Steps with probability 0 cost nothing.
    """
    b, device = len(images), images.device
    uniform = lambda: draws.uniform(1, 1, 1)
    x = (images + 1) / 2
    luma = torch.tensor([0.299, 0.587, 0.114], device=device)[None, :, None, None]
    if jitter_p > 0 and any(jitter):
        chosen, amount = uniform() < jitter_p, [1 + (2 * uniform() - 1) * j for j in jitter]
        y = (x * amount[0]).clamp(0, 1)
        mean = (y * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        y = ((y - mean) * amount[1] + mean).clamp(0, 1)
        grey = (y * luma).sum(1, keepdim=True)
        y = ((y - grey) * amount[2] + grey).clamp(0, 1)
        if jitter[3]:  # rotate the two chroma axes of YIQ: a hue shift without leaving the batch
            to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], device=device)
            angle = (amount[3].flatten() - 1) * 2 * math.pi
            turn = torch.eye(3, device=device).repeat(b, 1, 1)
            turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
            turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
            y = torch.einsum("bij,bjhw->bihw", to_yiq.inverse() @ turn @ to_yiq, y).clamp(0, 1)
        x = torch.where(chosen, y, x)
    if grey_p > 0:
        x = torch.where(uniform() < grey_p, (x * luma).sum(1, keepdim=True), x)
    if blur_p > 0:
        chosen, sigma = uniform() < blur_p, (0.1 + 1.9 * uniform()) * images.shape[-1] / 224
        radius = max(1, round(4 * images.shape[-1] / 224))
        kernel = torch.exp(-torch.arange(-radius, radius + 1, device=device) ** 2 / (2 * sigma.view(b, 1) ** 2 + 1e-8))
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3B, K), one kernel a picture
        flat = F.pad(x.reshape(1, 3 * b, *x.shape[2:]), (radius,) * 4, mode="reflect")
        flat = F.conv2d(F.conv2d(flat, kernel[:, None, None, :], groups=3 * b), kernel[:, None, :, None], groups=3 * b)
        x = torch.where(chosen, flat.view_as(x), x)
    if solarise_p > 0:
        x = torch.where((uniform() < solarise_p) & (x >= 0.5), 1 - x, x)
    return x * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# files: checkpoints, codes, logs, grids
# ---------------------------------------------------------------------------------------------------------------------

def run_folder(args):
    """OUT/<dataset>, made if needed; fails with one line when it cannot be written."""
    folder = Path(args.out) / args.dataset
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        fail(f"cannot write to {folder} ({problem.strerror}); choose another --out")
    return folder


CANNOT_WRITE = "Make room, or see to who may write there, and run the same command again"


def _is_alive(pid):
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # of another user
        pass
    return True


def write_atomic(path, write):
    """Call write(binary file) on a temporary file, then move it into place, so that a kill at any moment leaves old or new, whole."""
    path, host = Path(path), socket.gethostname()
    temporary = path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")  # its own: other processes and runs may write the same
    try:
        for left in path.parent.glob(f".{path.name}.{host}.*.tmp"):  # by a process that was killed
            if not _is_alive(left.suffixes[-2][1:]):
                left.unlink(missing_ok=True)
        with open(temporary, "wb+") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as problem:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {problem}; what was there is as it was. {CANNOT_WRITE}")


def write_json(path, value):
    """Write a plain value as JSON."""
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def file_checksum(path):
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(value):
    """SHA-256 of a plain value, as hexadecimal text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def save_checkpoint(path, **state):
    """Write a dict of plain values and tensors."""
    write_atomic(path, lambda file: torch.save(state, file))


def in_chunks(folder, count, run, work, size=2000):
    """Make arrays of `count` rows in chunks: work(rows) → {name: array} for a range of rows. Processes share the chunks, and each is kept
    in `folder` once it is done, so that a stopped run goes on, on any number of processes. Returns the chunks' files in order.

    Asked to stop, it ends after the chunk at hand (exit code 143).
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, size)
    paths = [folder / f"{k:06d}.npz" for k in range(len(starts))]
    todo = [k for k in range(run.rank, len(paths), run.world) if not paths[k].exists()]
    for k in tqdm(todo, desc=folder.name.lstrip("."), disable=not run.bar):
        if run.asked():
            print(f"stopped with {sum(path.exists() for path in paths)} of {len(paths)} parts in {folder}; the same command goes on from there",
                  file=sys.stderr)
            raise SystemExit(143)
        arrays = work(range(starts[k], min(count, starts[k] + size)))
        write_atomic(paths[k], lambda file: np.savez(file, part=k, **arrays))
    left, since = None, time.monotonic()
    while left != []:  # chunks of the other processes; where one dies, torchrun ends all
        left, before = [path for path in paths if not path.exists()], left
        since = since if left == before else time.monotonic()
        if time.monotonic() - since > TIMEOUT:
            fail(f"{left[0]}: no other process has finished a part for {TIMEOUT} seconds; the same command goes on from those that are there")
        time.sleep(0.1 * bool(left))
    run.wait()  # nobody still looks for the files when the first process removes them
    return paths


def read_chunk(path):
    """{name: array} of a chunk's file. A damaged one, or one of another name, is removed, so that the same command makes it again."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}  # the zip's checksums are compared
        if path.stem.isdigit() and arrays.pop("part") != int(path.stem):
            raise ValueError("of another name")
        return arrays
    except Exception as problem:  # numpy and zipfile raise many kinds
        path.unlink(missing_ok=True)
        fail(f"{path}: a damaged part ({type(problem).__name__}), removed; the same command makes it again and goes on")


def join_chunks(paths, name, count, target):
    """Write the arrays `name` of all chunks, `count` rows in all, as one file `target` (.npy) that may be larger than the memory."""
    def write(file):  # row after row: a memory-mapped file on a full disk would end the process without a word
        for k, path in enumerate(paths):
            part = read_chunk(path)[name]
            if k == 0:
                about = {"descr": np.lib.format.dtype_to_descr(part.dtype), "fortran_order": False, "shape": (count, *part.shape[1:])}
                np.lib.format.write_array_header_1_0(file, about)
            file.write(part.tobytes())

    write_atomic(target, write)


def read_weights(path):
    """Tensors by name from a file of weights: .pth, .pt or .bin (no code in it is run), .safetensors, or the .index.json of several such
    files. A dict inside under "teacher" or "model" is taken; the prefixes _orig_mod., module. and backbone. are removed."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such file; expected weights as .pth, .pt, .bin, .safetensors, or an .index.json of several such files")
    try:
        if path.suffix == ".json":
            names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            state = {}
            for name in names:
                state |= read_weights(path.parent / name)
        elif path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError:
                fail(f"{path}: needs a package: pip install safetensors")
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SystemExit:
        raise
    except Exception as problem:  # json, pickle, torch and safetensors each raise their own kinds
        fail(f"{path}: not a readable file of weights ({type(problem).__name__}: {str(problem)[:200]}); fetch it again")
    for inside in ("teacher", "model"):
        state = state.get(inside, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        fail(f"{path}: expected tensors by name, found {type(state).__name__}")
    return {re.sub(r"^((_orig_mod|module|backbone)\.)+", "", name): value for name, value in state.items()}


def check_weights(path, state, model_state):
    """Fail, naming it, where a weight is missing in `state` read from `path`, left over, or of another shape than in `model_state`."""
    for name in sorted(model_state.keys() | state.keys()):
        if name not in state:
            fail(f"{path}: lacks {name} {tuple(model_state[name].shape)}; these are weights of another architecture")
        if name not in model_state:
            fail(f"{path}: has {name} {tuple(state[name].shape)}, which this model does not; these are weights of another architecture")
        if state[name].shape != model_state[name].shape:
            fail(f"{path}: {name} is {tuple(state[name].shape)}, expected {tuple(model_state[name].shape)}; set the sizes by the flags, or choose "
                 "other weights")


def save_shards(path, model, optimizers, run, **state):
    """As save_checkpoint, for a model of Run.shard: each process writes its part of weights and optimizer to a file beside `path`, then
    the first one `path`, which names these files and holds the whole averages."""
    local = functools.partial(tree_map, lambda value: value.to_local() if hasattr(value, "to_local") else value)
    names = [f"{path.stem}-{state['step']:09d}-{rank + 1}of{run.world}.pt" for rank in range(run.world)]
    whole = {name: value.full_tensor().cpu() for name, value in state.pop("ema").items()}  # all take part in each
    save_checkpoint(path.with_name(names[run.rank]), model=local(model.state_dict()), optimizer=local(optimizers.state_dict()), **state)
    run.wait()
    if run.main:
        save_checkpoint(path, shards=names, ema=whole, **state)
        for old in path.parent.glob(f"{path.stem}-*of*.pt"):
            if old.name not in names:
                old.unlink()
    run.wait()


def load_shards(path, state, args, model, optimizers, ema):
    """Inverse of save_shards, on any number of processes; state: that of load_checkpoint."""
    from torch.distributed.tensor import distribute_tensor
    parts = [load_checkpoint(path.with_name(name), state["stage"], args, mmap=True) for name in state["shards"]]
    for name, part in zip(state["shards"], parts):
        if (part["step"], part["config"], part["trained_on"]) != (state["step"], state["config"], state["trained_on"]):
            fail(f"{path.with_name(name)}: not a part of {path}; --restart trains again")

    def spread(values, like):
        """One tensor of all processes' parts of it, in the shares of the processes there are now."""
        if not hasattr(like, "placements"):
            return values[0]
        return distribute_tensor(torch.cat(values).to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    own = dict(model.named_parameters())
    model.load_state_dict({name: spread([part["model"][name] for part in parts], p) for name, p in own.items()})
    for k, optimizer in enumerate(optimizers.parts):
        shape = [p for group in optimizer.param_groups for p in group["params"]]
        states = [part["optimizer"][k] for part in parts]
        optimizer.load_state_dict({**states[0], "state": {
            at: {name: spread([other["state"][at][name] for other in states], shape[at] if value.ndim else None) for name, value in first.items()}
            for at, first in states[0]["state"].items()}})
    ema.load_state_dict({name: spread([state["ema"][name]], p) for name, p in own.items()})


STAGE_COMMANDS = {"tokenizer": "tokenizer.py", "generator": "generator.py", "generator-early": "generator.py",
                  "generator-uncond": "generator.py --condition none", "generator-factors": "generator.py --factors --groups 5",
                  "prior-masked": "prior.py --kind masked", "prior-ar": "prior.py --kind ar", "text_prior": "text_prior.py", "judge": "sample.py --score"}


def stage_command(stage, args):
    """The command line that trains `stage` for the dataset and folders of `args`."""
    words = ["python", *STAGE_COMMANDS[stage].split(), "--dataset", args.dataset, "--out", str(args.out)]
    return " ".join(words + (["--data-dir", str(args.data_dir)] if args.dataset != "shapes" else []))


KEYS = {"stage": str, "config": dict, "trained_on": dict, "step": int}  # what every checkpoint holds


def load_checkpoint(path, stage, args, mmap=False):
    """Read the checkpoint of `stage`, refusing anything missing, damaged, unfinished in writing, or of another stage or dataset; mmap: its
    tensors are read when they are used."""
    if not Path(path).exists():
        fail(f"no {path}: train it with {stage_command(stage, args)}{' --restart' if stage == 'generator-early' else ''}")  # on the way there
    again = f"train it again with {stage_command(stage, args)} --restart" if stage != "judge" else "delete it, it is made again"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check these sums
            damaged = archive.testzip()
        if damaged:
            fail(f"{path}: damaged (checksum of {damaged}); {again}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except SystemExit:
        raise
    except PermissionError:
        fail(f"{path}: no permission to read it; see to who may")
    except Exception as problem:  # zipfile, pickle and torch each raise their own kinds
        fail(f"{path}: not a readable checkpoint ({type(problem).__name__}); {again}")
    if not isinstance(state, dict) or state.get("stage") != stage:
        found = state.get("stage") if isinstance(state, dict) else type(state).__name__
        fail(f"{path}: expected a checkpoint of {stage}, found {found}; {again}")
    for key, kind in KEYS.items():
        if not isinstance(state.get(key), kind):
            fail(f"{path}: lacks {key}, it is of another version of this program; {again}")
    if state["config"].get("dataset") != args.dataset:
        fail(f"{path}: trained on {state['config'].get('dataset')}, expected {args.dataset}; choose another --out")
    return state


def load_stage(stage, args, build):
    """(model, state): build(state) with the averaged weights of the checkpoint of `stage` in OUT/<dataset>, which is refused as by
    load_checkpoint, and where it was trained on other codes or images than those there; says so where it is not finished."""
    path = run_folder(args) / f"{stage}.pt"
    state = load_checkpoint(path, stage, args)
    again = f"train it again with {stage_command(stage, args)} --restart"
    if stage not in ("tokenizer", "judge"):  # these read no codes
        about = open_codes(args)[1]
        for what, now in (("codes", about["sha256"]), ("images", about["images"])):
            if state["trained_on"].get(what) not in (None, now):
                fail(f"{path}: trained on other {what} than those of {path.parent / 'codes.npy'}; {again}")
    try:
        model, steps = build(state), state["config"].get("steps", 0)
        unfinished = state["step"] < steps and stage != "generator-early"  # that one is of a step on the way
    except Exception as problem:  # whatever settings of another kind lead to
        fail(f"{path}: no model can be made of its settings ({type(problem).__name__}: {str(problem)[:200]}), it is of another version of this "
             f"program; {again}")
    restore(path, state, ema=model)
    if unfinished:
        print(f"note: {path} is not finished (step {state['step']} of {steps}); {stage_command(stage, args)} goes on with it", file=sys.stderr)
    return model, state


def restore(path, state, **parts):
    """Load what the checkpoint holds under each name into the part of that name (a model, optimizers, averages)."""
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except Exception as problem:  # torch has no kind of its own for what does not fit
            fail(f"{path}: its {name} does not fit ({type(problem).__name__}: {str(problem)[:300]}), it is of another version of this program; train it "
                 "again with --restart")


NOT_SETTINGS = {"out", "data_dir", "device", "workers", "compile", "grad_checkpoint", "dry_run", "restart", "tensorboard", "save_every"}  # or how to run it
NOT_SETTINGS |= {"sample_steps", "method", "guidance", "guidance_interval"}  # nor how to draw images
NOT_SETTINGS |= {"temperature", "nucleus", "order", "per_step", "order_noise", "ancestral_steps", "remask", "remask_window"}  # and codes
NOT_SETTINGS |= {"size", "vae", "init"}  # nor the name of what other settings, or a checksum, say
NOT_SETTINGS |= {"window"}  # nor what follows from the captions, whose own checksum is compared


def gather(value):
    """The plain values of all processes of this run, in their order."""
    everywhere = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(everywhere, value)
    return everywhere


def agree(**values):
    """Fail, in all processes of this run, where they do not have the same plain values, naming what differs."""
    everywhere = gather(values)
    differ = [f"{name} {mine} and {other.get(name)}" for other in everywhere for name, mine in everywhere[0].items() if other.get(name) != mine]
    if differ:
        fail(f"the processes of this run differ ({', '.join(dict.fromkeys(differ))}); start all with the same command, on the same files")


def resume(path, stage, args, **trained_on):
    """The checkpoint to go on from, or None. Fails when its settings or what it was trained on (checksums by name) differ, naming them;
    with --restart there is none."""
    if Path(path).is_dir():
        fail(f"{path}: is a folder, expected a checkpoint or nothing; move it away")
    now = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    state = None if args.restart or not Path(path).exists() else load_checkpoint(path, stage, args)
    agree(**now, **{f"checksum of the {name}": value for name, value in trained_on.items()}, **{f"step in {Path(path).name}": state["step"] if state else 0})
    if state is None:
        return None
    differ = [f"{k} {state['config'].get(k)} → {v}" for k, v in now.items() if state["config"].get(k) != v]
    if differ:
        fail(f"{path}: trained with other settings ({', '.join(differ)}); use those, --restart to begin anew, or another --out")
    others = [name for name, value in trained_on.items() if state["trained_on"].get(name) != value]
    if others:
        fail(f"{path}: trained on other {' and '.join(others)} than are there now; bring those back, --restart to begin anew, or choose another --out")
    if state["step"] >= args.steps:
        print(f"{path} is finished ({state['step']} steps); --restart trains it again")
    return state


def code_type(values):
    """The narrowest unsigned type that holds `values` values and a mask value."""
    return np.uint8 if values < 256 else np.uint16


def write_codes(folder, codes, values, dataset, report):
    """Write codes (N, 2 flips, L), the tokenizer's report on them and what is needed to trust both: OUT/<dataset>/codes.npy, tokenizer.json
    and codes.json."""
    write_json(folder / "tokenizer.json", report)
    write_atomic(folder / "codes.npy", lambda file: np.save(file, codes.astype(code_type(values))))
    about = {"L": codes.shape[2], "V": values, "count": len(codes), "splits": {k: [r.start, r.stop] for k, r in dataset.splits.items()},
             "sha256": file_checksum(folder / "codes.npy"), "tokenizer": file_checksum(folder / "tokenizer.pt"), "images": dataset.checksum,
             "report": checksum(report)}
    write_json(folder / "codes.json", {**about, "checksum": checksum(about)})


def open_codes(args):
    """Memory-map OUT/<dataset>/codes.npy and check it against codes.json and tokenizer.pt.

    Returns (codes (N, 2, L), about); about holds L, V, splits (as ranges) and the checksums.
    """
    folder = Path(args.out) / args.dataset
    path, about_path = folder / "codes.npy", folder / "codes.json"
    again = f"make it again with {stage_command('tokenizer', args)}"
    if not path.exists() or not about_path.exists():
        fail(f"no {path if not path.exists() else about_path}: {again}")
    about = read_json(about_path, again)
    try:
        if about.pop("checksum") != checksum(about):
            fail(f"{about_path}: changed since it was written; {again}")
        L, V, count = about["L"], about["V"], about["count"]
        about["splits"] = {k: range(*r) for k, r in about["splits"].items()}
        codes = np.load(path, mmap_mode="r")
    except PermissionError:
        fail(f"{path}: no permission to read it; see to who may")
    except Exception as problem:  # numpy reads the header of a .npy as Python, which can be wrong in many ways
        fail(f"{path}: not a readable code file ({type(problem).__name__}: {str(problem)[:200]}); {again}")
    if codes.shape != (count, 2, L) or codes.dtype != code_type(V):
        fail(f"{path}: holds {codes.shape} {codes.dtype}, codes.json says {(count, 2, L)} {np.dtype(code_type(V))}; {again}")
    if count and codes.max() >= V:
        fail(f"{path}: a value of {codes.max()}, expected less than V = {V}; {again}")
    if file_checksum(path) != about["sha256"]:
        fail(f"{path}: its checksum is not the one in codes.json; {again}")
    if (folder / "tokenizer.pt").exists() and file_checksum(folder / "tokenizer.pt") != about["tokenizer"]:
        fail(f"{path}: made by another tokenizer than {folder / 'tokenizer.pt'}; {again}")
    return codes, about


def check_images(about, dataset, args):
    """Fail where the codes that open_codes tells `about` are not those of the dataset's images."""
    if about["images"] != dataset.checksum:
        fail(f"{Path(args.out) / args.dataset / 'codes.npy'}: codes of other images ({about['count']:,}) than {args.data_dir} holds now ({len(dataset):,}; other "
             f"names, contents, order or parts); make it again with {stage_command('tokenizer', args)}")


def read_report(about, args):
    """The tokenizer's report of OUT/<dataset>/tokenizer.json, refused where it is not the one on the codes that open_codes tells `about`."""
    path, again = Path(args.out) / args.dataset / "tokenizer.json", f"make it again with {stage_command('tokenizer', args)}"
    report = read_json(path, again)
    if checksum(report) != about.get("report"):
        fail(f"{path}: not the report on the codes beside it; {again}")
    return report


def read_json(path, again):
    """The value in a JSON file of ours; one line with what to do `again` where it is not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        fail(f"{path}: not readable as JSON ({problem}); {again}")


class Log:
    """JSON lines in OUT/<dataset>/<stage>.jsonl, one a call; the first process writes, the others do nothing. Going on from step `start`,
    lines of later steps, which a killed run left, are dropped: they will come again."""

    def __init__(self, run, stage, start=0, tensorboard=False):
        self.path, self.file, self.writer = run.folder / f"{stage}.jsonl", None, None
        if not run.main:
            return
        try:
            kept = [line for line in self.path.read_bytes().split(b"\n") if self._until(line, start)] if self.path.exists() else []
        except OSError as problem:
            fail(f"cannot read {self.path}: {problem}; move it away")
        write_atomic(self.path, lambda file: file.writelines(line + b"\n" for line in kept))
        self.file = open(self.path, "ab", buffering=0)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("--tensorboard needs its package: pip install tensorboard")
            self.writer = SummaryWriter(run.folder / "tensorboard" / stage)

    @staticmethod
    def _until(line, start):
        try:
            record = json.loads(line)
            return record["step"] < start or (record["step"] == start and "loss" in record)  # what is measured at the end comes again
        except (ValueError, KeyError, TypeError, RecursionError):
            return False  # cut where the run was killed

    def write(self, step, **values):
        """Append one line of numbers."""
        if not self.file:
            return
        try:
            self.file.write((json.dumps({"step": step, **values, "time": round(time.time(), 1)}) + "\n").encode())
        except OSError as problem:
            fail(f"cannot write {self.path}: {problem}; the last checkpoint is as it was. {CANNOT_WRITE}")
        for k, v in values.items() if self.writer else ():
            self.writer.add_scalar(k, v, step) if isinstance(v, (int, float)) else None


def save_grid(path, images, columns, titles=(), lines=(), settings=None, scale=None):
    """Write images (n, 3, S, S) uint8 as a PNG with `columns` a row, `titles` above the columns or `lines` above the rows, and
    `settings` stored inside."""
    n, _, size, _ = images.shape
    scale = scale or max(1, 64 // size)
    cell, head = size * scale + 2, 14 if titles else 0
    step = cell + (14 if lines else 0)  # from row to row
    width = max([columns * cell + 2, *(min(1600, 7 * len(line)) for line in lines)])
    canvas = Image.new("RGB", (width, math.ceil(n / columns) * step + 2 + head), "white")
    for k, image in enumerate(images):
        tile = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize((size * scale,) * 2, Image.Resampling.NEAREST)
        canvas.paste(tile, (2 + k % columns * cell, 2 + head + step - cell + k // columns * step))
    draw = ImageDraw.Draw(canvas)
    for k, title in enumerate(titles):
        draw.text((3 + k * cell, 1), title, fill="black")
    for k, line in enumerate(lines):
        draw.text((3, 1 + head + k * step), " ".join(line.split()), fill="black")
    info = PngImagePlugin.PngInfo()
    info.add_text("settings", json.dumps(settings or {}, default=str))
    write_atomic(path, lambda file: canvas.save(file, format="PNG", pnginfo=info))


# ---------------------------------------------------------------------------------------------------------------------
# flags, start-up, optimizer, EMA, schedule
# ---------------------------------------------------------------------------------------------------------------------

def whole(text, least=0, most=10 ** 9):
    """argparse type: a whole number from 0 to a thousand million."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most:,}, got {text[:40]!r}")
    return int(text)


def positive(text):
    """argparse type: a whole number from 1 to a thousand million."""
    return whole(text, 1)


def any_seed(text):
    """argparse type: a whole number from 0 to 2⁶³ − 1."""
    return whole(text, 0, 2 ** 63 - 1)


def number(text):
    """argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text[:40]!r}")
    return value


def non_negative(text):
    """argparse type: a finite number of at least 0."""
    if number(text) < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text[:40]!r}")
    return number(text)


def above_zero(text):
    """argparse type: a finite number above 0."""
    if number(text) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text[:40]!r}")
    return number(text)


def share(text):
    """argparse type: a number from 0 to 1."""
    if not 0 <= number(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text[:40]!r}")
    return number(text)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())[:500]}; see --help\n")


def make_parser(doc):
    """A parser with the flags that all commands share, in one group."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    group = parser.add_argument_group("data and run")
    group.add_argument("--dataset", choices=DATASETS, default="shapes", help="data and preset together (default: shapes)")
    group.add_argument("--data-dir", help="where the images are (default: data/<dataset>)")
    group.add_argument("--out", default="out", help="results go to OUT/<dataset> (default: out)")
    group.add_argument("--image-size", type=positive, default=32, help="side of the images in pixels (shapes: 32)")
    group.add_argument("--seed", type=any_seed, default=0, help="seed of everything random (default: 0)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where it is faster")
    group.add_argument("--workers", type=whole, default=2, help="processes that decode images of folders")
    return parser


def add_training_flags(parser, steps, batch_size, lr, lr_matrix, warmup, ema=0.995):
    """The flags of a training run, with the shapes values of this stage; ema None: the stage averages weights in its own way."""
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive, default=steps, help="length in optimizer steps")
    group.add_argument("--batch-size", type=positive, default=batch_size, help="images per step over all devices")
    group.add_argument("--accumulate", type=positive, default=1, help="split each batch into this many parts to save memory")
    group.add_argument("--lr", type=non_negative, default=lr, help="learning rate of AdamW (biases, norms, embeddings)")
    group.add_argument("--lr-matrix", type=non_negative, default=lr_matrix,
                       help="learning rate of Muon for the blocks' matrices; 0: AdamW for all")
    group.add_argument("--lr-final", type=share, default=0.05, help="share of the learning rate left at the end (cosine); 1: constant")
    group.add_argument("--warmup", type=whole, default=warmup, help="steps of linear warm-up")
    group.add_argument("--weight-decay", type=non_negative, default=0.0, help="decoupled weight decay")
    group.add_argument("--clip", type=non_negative, default=3.0, help="largest gradient norm")
    if ema is not None:
        group.add_argument("--ema", type=share, default=ema, help="decay per step of the averaged weights that are used afterwards")
    group.add_argument("--save-every", type=positive, default=1000, help="steps between checkpoints")
    group.add_argument("--grad-checkpoint", action="store_true", help="compute activations twice to save memory, a third more time a step")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA only)")
    group.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="also log for TensorBoard")
    group.add_argument("--dry-run", action="store_true", help="print settings, parameters, memory and FLOPs, then stop")
    group.add_argument("--restart", action="store_true", help="begin anew even where a checkpoint lies")


def parse(parser, presets, argv=None, sizes=None):
    """Parse flags with the preset of the chosen dataset as defaults, and over it that of --size where there are `sizes`; a preset key
    that is no flag is an error of ours."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = Parser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--dataset", default="shapes")
    chosen.add_argument("--size")
    names = chosen.parse_known_args(argv)[0]
    preset = presets.get(names.dataset, {}) | (sizes or {}).get(names.size, {})
    unknown = set(preset) - {action.dest for action in parser._actions}
    assert not unknown, f"preset names no flag: {unknown}"
    parser.set_defaults(**preset)
    args = parser.parse_intermixed_args(argv)  # image names may follow flags
    args.data_dir = args.data_dir or f"data/{args.dataset}"
    if args.dataset == "shapes" and args.image_size % 32:
        parser.error(f"argument --image-size: shapes are drawn at multiples of 32, got {args.image_size}")
    if getattr(args, "batch_size", 1) % getattr(args, "accumulate", 1):
        parser.error(f"argument --accumulate: {args.accumulate} does not divide --batch-size {args.batch_size}")
    return args


def pin_threads():
    """Give each of torch's threads a core of its own, where there are as many threads as cores (Linux). Beside another run the scheduler
    would let the threads of one run, which wait for each other in each of hundreds of small operations, take turns on one core."""
    if not 1 < torch.get_num_threads() == len(CORES):
        return
    try:
        before = os.listdir("/proc/self/task")
        torch.ones(1 << 20).exp_()  # starts them
        started = set(os.listdir("/proc/self/task")).difference(before)
        for thread, core in zip([0, *sorted(map(int, started))], sorted(CORES)):  # 0: the one that asks
            os.sched_setaffinity(thread, {core})
    except OSError:  # a system that does not let us: nothing but speed is lost
        pass


def bfloat16_is_faster(device):
    """Whether a step in bfloat16 takes less time than one in float32: on CUDA, and on a CPU with AMX, or AVX512-BF16 by AMD. Intel's
    AVX512-BF16, where AMX is missing or hidden (virtual machines), takes longer (README, log)."""
    if device.type != "cpu":
        return device.type == "cuda"
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()


TIMEOUT = 1800  # seconds that processes wait for one of them that does not answer, before they stop


def place():
    """(rank, world) of this process, as torchrun says."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if name in os.environ}
    rank, world = (int(text) if text.isdecimal() else -1 for text in (found.get("RANK", "0"), found.get("WORLD_SIZE", "1")))
    if not 0 <= rank < world or (world > 1 and len(found) < len(names)):
        fail(f"the environment says {', '.join(f'{name}={value}' for name, value in found.items())}, expected {', '.join(names)} as torchrun sets them, or none; "
             "start several processes with torchrun, or unset these")
    return rank, world


class Run:
    """One process of a run: device, dtype, its rank among `world` processes, and the output folder.

    Works the same on a CPU, one GPU, or under torchrun. SIGTERM and Ctrl-C set a flag that the loop reads through
    `stopping`, so that the step is finished and saved; before the loop is reached there is nothing to save, and they end the process.
    """

    def __init__(self, args, lock=None):
        try:
            self.device = torch.device(args.device)
            torch.zeros(1, device=self.device).item()  # "meta" can be made, not read
        except (RuntimeError, AssertionError, ImportError) as problem:
            fail(f"--device {args.device}: not available here ({str(problem)[:200]}); expected cpu, cuda, cuda:1 or mps")
        self.rank, self.world = place()
        self.main, self.sharded = self.rank == 0, False
        self.bar = self.main and sys.stderr.isatty()  # progress bars only for people
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.device.index or 0)))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif self.device.type == "cpu":  # on a CPU the plain formula beats the flash kernel 4 times at these lengths
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            if self.world == 1 and not getattr(args, "compile", False):  # a compiler's processes would share the one core
                pin_threads()
        for size in (getattr(args, "batch_size", self.world), getattr(args, "batch_size", self.world) // getattr(args, "accumulate", 1)):
            if size % self.world:
                fail(f"--batch-size {args.batch_size}: does not divide over {self.world} processes (and --accumulate parts); choose a multiple of "
                     f"{self.world * getattr(args, 'accumulate', 1)}")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT))
        self.dtype = torch.bfloat16 if args.dtype == "bfloat16" or (args.dtype == "auto" and bfloat16_is_faster(self.device)) else torch.float32
        self.folder, self._lock, self._handlers, self._asked, self._looks = run_folder(args), None, {}, [], [self.world > 1]
        if lock and self.main:
            path = self.folder / f".{lock}.lock"
            try:
                self._lock = open(path, "w")
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system when this process ends, whatever its workers do
            except OSError as problem:
                if self._lock and problem.errno in (errno.EACCES, errno.EAGAIN):
                    fail(f"{self.folder}: another run is at work on {lock} there; wait for it or choose another --out")
                if not self._lock:
                    fail(f"cannot write {path}: {problem.strerror}; see to who may write there, or choose another --out")
                print(f"note: {path} cannot be locked ({problem.strerror}); see to it that no second run works there", file=sys.stderr)
        if lock:
            def on_signal(number, frame, asked=self._asked, looks=self._looks):  # no reference to the run: a failed one lets go of its lock
                if not looks[0] or (asked and number == signal.SIGINT):  # nobody will look, or a second Ctrl-C
                    ignore_signals()  # one is enough
                    raise KeyboardInterrupt
                asked.append(number)

            self._handlers = {name: signal.signal(name, on_signal) for name in (signal.SIGTERM, signal.SIGINT)}

    def asked(self):
        """Whether this process was asked to stop."""
        self._looks[0] = True
        return bool(self._asked)

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def stopping(self):
        """Whether any process was asked to stop; all processes get the same answer."""
        if self.world == 1:
            return self.asked()
        flag = torch.tensor(float(self.asked()), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def share(self, size):
        """The slice of a global batch of `size` that belongs to this process."""
        part = size // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def autocast(self):
        """bfloat16 arithmetic where the run uses it, float32 weights always."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def seed_step(self, seed, step):
        """Seed the default generators for one step (dropout), so that nothing but (seed, step, rank) matters."""
        torch.manual_seed(mix_seed(seed, step, self.rank, "dropout"))

    def wrap(self, model, args):
        """The module to call in training: compiled in place where asked, and under DDP with several processes."""
        compile = self.device.type == "cuda" if args.compile is None else args.compile
        if compile and self.device.type == "cpu" and not _has_compiler():
            print("no C++ compiler found: --compile is ignored, training runs eagerly", file=sys.stderr)
            compile = False
        if args.grad_checkpoint:
            forget_activations(model)
        if compile:
            model.compile()  # in place: the state dict keeps its keys
        if self.world == 1 or self.sharded:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def part(self, model, last):
        """Inside, for one part of an accumulated batch: gradients stay in this process until the last part."""
        if self.sharded:
            model.set_requires_gradient_sync(last)
            return nullcontext()
        return model.no_sync() if self.world > 1 and not last else nullcontext()

    def shard(self, model):
        """Split the parameters of a model with `blocks` over all processes, block by block (torch's fully_shard), in place: with its gradients,
        optimizer and averages it then takes a part of the memory of each device. Arithmetic in the run's dtype, sums in float32."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second to import: here and below only for who needs it
        self.sharded = True
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        for part in (*model.blocks, model):
            fully_shard(part, mp_policy=policy)
        return model.to(self.device)

    def average(self, value):
        """Mean of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def close(self):
        """Wait for the others, release the folder and give the signals back. `command` leaves the process group."""
        self.wait()  # the first process may still be writing its report
        if self._lock:
            self._lock.close()
        for name, handler in self._handlers.items():
            signal.signal(name, handler)


def forget_activations(model):
    """Keep no more than the inputs of each of the model's `blocks` for the backward pass, which computes the rest again, in place."""
    for name, module in model.named_modules():
        for block in module if name.split(".")[-1] == "blocks" else ():
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def _has_compiler():
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++"))


@contextmanager
def evaluating(model):
    """Evaluation mode without gradients, and back to training mode after."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


class Optimizers:
    """Muon for the matrices of the transformer blocks and AdamW for everything else (or AdamW for all, --lr-matrix 0).

    scale(name): what the learning rate of a parameter is multiplied by.
    """

    def __init__(self, model, args, scale=lambda name: 1.0):
        parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        muon = [p for n, p in parameters if args.lr_matrix > 0 and p.ndim == 2 and "blocks." in n]
        chosen, groups = {id(p) for p in muon}, {}
        for n, p in sorted(parameters, key=lambda pair: pair[1].ndim < 2):
            if id(p) not in chosen:
                groups.setdefault((p.ndim >= 2, scale(n)), []).append(p)
        self.decayed, self.scales = ([key[k] for key in groups] + [1.0] for k in (0, 1))  # of each group, Muon's the last
        self.parts = [torch.optim.AdamW([{"params": ps, "weight_decay": args.weight_decay * decayed} for (decayed, _), ps in groups.items()],
                                        lr=args.lr, betas=(0.9, 0.95), fused=True)]
        if muon:
            self.parts.append(torch.optim.Muon(muon, lr=args.lr_matrix, weight_decay=args.weight_decay, momentum=0.95))
        self.peaks = [args.lr] * len(groups) + [args.lr_matrix]
        self.names, self.parameters, self.clip = [n for n, _ in parameters], [p for _, p in parameters], args.clip

    def step(self, factor, step, loss, weight_decay=None):
        """One update with all learning rates at `factor` of their peak and, where given, another weight decay (of those that have one).
        Fails before it, in all processes, when the loss (of any of them) or a gradient is not finite."""
        wrong = "" if math.isfinite(loss) else f"the loss is {float(loss)}"
        try:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf, error_if_nonfinite=not wrong)
        except RuntimeError as problem:
            if "non-finite" not in str(problem):  # something else, or of a loader's worker
                raise
            wrong = "the gradient of " + next((n for n, p in zip(self.names, self.parameters) if p.grad is not None and not p.grad.isfinite().all()), "all") \
                    + " is not finite"
        if wrong:
            fail(f"step {step}: {wrong}; stopped before the update, the last checkpoint is intact. Lower --lr or --lr-matrix, or try --dtype float32")
        groups = [group for part in self.parts for group in part.param_groups]
        for group, peak, scale, decayed in zip(groups, self.peaks, self.scales, self.decayed):
            group["lr"] = peak * factor * scale
            if weight_decay is not None and decayed:
                group["weight_decay"] = weight_decay
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model

    def state_dict(self):
        """States of all parts, plain values and tensors."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        """Inverse of state_dict. Raises ValueError where `states` are not those of as many parts."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class EMA:
    """Exponential moving average of a model's parameters; the decay warms up so that short runs forget their start."""

    def __init__(self, model, decay):
        self.source, self.decay = list(model.parameters()), decay
        self.names = [name for name, _ in model.named_parameters()]
        self.values = [p.detach().clone() for p in self.source]

    @torch.no_grad()
    def update(self, step):
        """values ← d · values + (1 − d) · parameters with d = min(decay, (1 + step) / (10 + step))."""
        torch._foreach_lerp_(self.values, self.source, 1 - min(self.decay, (1 + step) / (10 + step)))

    def state_dict(self):
        """Averages by parameter name, loadable into the model."""
        return dict(zip(self.names, self.values))

    @torch.no_grad()
    def load_state_dict(self, state):
        """Inverse of state_dict."""
        for value, name in zip(self.values, self.names):
            value.copy_(state[name])

    def into(self, model):
        """Copy the averages into `model` and keep averaging in place there, so that its weights are the average."""
        model.load_state_dict(self.state_dict(), strict=False)
        self.values = list(model.parameters())

    @contextmanager
    def applied(self):
        """Inside, the model holds the averages; after, its own weights again."""
        def put(values):
            with torch.no_grad():
                for p, value in zip(self.source, values):
                    p.copy_(value)

        own = [p.detach().clone() for p in self.source]
        put(self.values)
        try:
            yield
        finally:
            put(own)


def cosine(step, steps, start, end):
    """Cosine from `start` at step 0 to `end` at `steps`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def warmup_cosine(step, args):
    """Share of the peak learning rate at `step`: linear over --warmup steps, then cosine to --lr-final."""
    return min(1.0, (step + 1) / (args.warmup + 1)) * cosine(step, args.steps, 1.0, args.lr_final)


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the makers' data sheets


def peak_flops(run):
    """Peak FLOP/s of the device in the run's dtype and where the figure is from: data sheet, or a large matmul timed here."""
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
    for key, value in PEAK_FLOPS.items():
        if key in name and run.dtype == torch.bfloat16:
            return value, f"{key} data sheet"
    side = 1024 if run.device.type == "cpu" else 8192
    a = torch.randn(side, side, device=run.device, dtype=run.dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side ** 3 / best, f"{side}³ matmul timed here"


class Meter:
    """Progress bar, log lines and speed of a training run: `unit`s per second, `count` of them a step, and model FLOPs over time over the
    device's peak (MFU)."""

    def __init__(self, run, args, flops, start, count, unit="images", every=50):
        self.run, self.args, self.flops, self.every, self.count, self.unit = run, args, flops, every, count, unit
        self.bar = tqdm(total=args.steps, initial=start, disable=not run.bar, dynamic_ncols=True)
        self.peak, self.source = peak_flops(run) if run.main and start < args.steps else (0, "")
        self.last, self.at, self.began, self.summary = time.perf_counter(), start, time.perf_counter(), ""

    def tick(self, step, log, **values):
        """After each step; every 50 steps the values are averaged over processes, shown and logged."""
        self.bar.update(1)
        done = step + 1
        if done % self.every and done != self.args.steps:
            return
        values = {k: self.run.average(torch.as_tensor(v, device=self.run.device).detach().float().clone()).item() for k, v in values.items()}
        if self.run.main:
            now = time.perf_counter()
            seconds, self.last, self.at = (now - self.last) / (done - self.at), now, done
            mfu = self.flops / seconds / (self.peak * self.run.world)
            rate = self.count / seconds
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()} | {f"{self.unit}/s": f"{rate:,.0f}", "mfu": f"{mfu:.2f}"})
            log.write(done, **{k: round(v, 5) for k, v in values.items()}, ms=round(seconds * 1e3, 1), mfu=round(mfu, 3),
                      **{f"{self.unit} per second": round(rate, 1)})
            self.summary = (f"{done} steps, {now - self.began:.0f} s in this run, last {seconds * 1e3:.0f} ms a step, {rate:,.0f} {self.unit}/s, "
                            f"{values['loss']:.4f} loss, MFU {mfu:.2f} of {self.peak / 1e12:.2f} TFLOP/s ({self.source})")

    def close(self):
        """After the last step and its checkpoint: say how it went."""
        self.bar.close()
        if self.summary:
            print(self.summary)


def stopped(path, step, args, run):
    """Say that the run was asked to stop and is safe; exit code 143, so that no script takes it for finished."""
    if run.main:
        how = "the same command without --restart" if args.restart else "the same command"
        print(f"stopped at step {step} of {args.steps}, saved {path}; {how} goes on from there", file=sys.stderr)
    run.close()
    raise SystemExit(143)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive inside, and the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key):
        self.now -= self.alive.pop(key)


def peak_memory(build, loss, args, run):
    """Bytes of all tensors at the peak of a training step in this process, and parameters, of the model that build() makes.

    Two steps are taken on tensors without values: loss(model) is the loss of one part of a batch. What the libraries and the allocator
    need beside tensors is not in it; torch.compile needs less.
    """
    with FakeTensorMode(), PeakBytes() as memory, run.device:
        model = build()
        if args.grad_checkpoint:
            forget_activations(model)
        optimizers, ema = Optimizers(model, args), EMA(model, 0.9)
        for step in range(2):
            for _ in range(args.accumulate):
                (loss(model) / args.accumulate).backward()
            for part in optimizers.parts:
                part.step()
                part.zero_grad(set_to_none=True)
            ema.update(step)
        return memory.peak, sum(p.numel() for p in model.parameters())


SLACK = 1.25  # memory of a process over that of its tensors: allocators keep holes (1.16 to 1.36 measured on a CPU, README)


def describe(args, build, loss, flops, run):
    """Print settings, parameters, memory and FLOPs per step (the --dry-run page); build and loss as peak_memory."""
    for key, value in sorted(vars(args).items()):
        print(f"  {key.replace('_', '-'):18} {value}")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if run.device.type == "cpu" else 0  # python and its libraries
    peak, count = peak_memory(build, loss, args, run)
    print(f"{count / 1e6:.2f}M parameters; {flops / 1e9:.1f} GFLOP per step; device {run.device}, {run.dtype}, {run.world} process(es); memory at the "
          f"peak of a step, in each process: {peak / 2 ** 30:.2f} GiB of tensors, about {(peak * SLACK + own) / 2 ** 30:.2f} GiB in all".replace("torch.", ""))


def command(main):
    """Run the main function of a script; Ctrl-C, SIGTERM, a lack of memory and what the system refuses end it with one line."""
    while (unused := os.open(os.devnull, os.O_RDWR)) < 3:  # where a standard stream is closed, no other file may take its place
        pass
    os.close(unused)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):  # captions and paths where the terminal's encoding lacks their characters
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; Run takes both for a request to stop
    try:
        main()
        if dist.is_initialized():  # not before main has let go of DDP: as the last owner of the group it would end gloo's threads while it holds
            dist.destroy_process_group()  # Python's lock, for which one of them may be waiting
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped; what was saved before is kept", file=sys.stderr)
        raise SystemExit(143)
    except Unreadable as problem:
        fail(problem)
    except OSError as problem:
        if isinstance(problem, BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # or Python says so once more at the end
        fail(f"{problem.filename or 'the output'}: {problem.strerror or problem}; see to it and run the same command again")
    except (RuntimeError, MemoryError) as problem:  # torch has no kinds of its own for most of these
        if dist.is_initialized() and re.search("timed? ?out|connection|closed by", str(problem), re.I):
            fail(f"another process of this run died or did not answer for {TIMEOUT} seconds; see its own message, the same command goes on from the "
                 "last checkpoint")
        if "DataLoader worker" in str(problem):
            fail(f"a process that decodes images was ended from outside ({' '.join(str(problem).split())[:200]}); the same command goes on from the last "
                 "checkpoint, --workers 0 does without such processes")
        if not isinstance(problem, (MemoryError, torch.OutOfMemoryError)) and not re.search("allocate memory|overflow", str(problem)):
            raise
        fail(f"out of memory ({str(problem)[:200]}); lower --batch-size or the sizes asked for, raise --accumulate or the number of processes; --dry-run of "
             "a stage says what it needs")
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader's handler would take the end of its workers for a fault
        for worker in multiprocessing.active_children():  # deaf to the signal by which Python would end them
            worker.kill()


# ---------------------------------------------------------------------------------------------------------------------

PRESETS = {"imagenet": {"image_size": 256}}


def main(argv=None):
    """Prepare, check and show a dataset."""
    parser = make_parser(__doc__)
    parser.add_argument("--download", action="store_true", help="cifar10: fetch the archive into --data-dir first")
    args = parse(parser, PRESETS, argv)
    if args.download and args.dataset != "cifar10":
        parser.error("argument --download: only cifar10 can be downloaded")
    if args.download:
        fetch_cifar(Path(args.data_dir))
    dataset, folder = load_dataset(args), run_folder(args)
    print(f"{args.dataset}: {len(dataset):,} images of {args.image_size}×{args.image_size}; "
          + ", ".join(f"{name} {len(rows):,}" for name, rows in dataset.splits.items()))
    for k, (name, values) in enumerate(dataset.factors.items()):
        counts = torch.bincount(dataset.labels[:, k], minlength=len(values)).tolist()
        print(f"  {name}: " + ", ".join(f"{v} {c:,}" for v, c in list(zip(values, counts))[:12]) + (", ..." if len(values) > 12 else ""))
    rows = [row for split in dataset.splits.values() for row in list(split)[:16]]
    save_grid(folder / "samples" / "data.png", dataset.pixels(rows), 16, settings=vars(args))
    print(f"  e.g. {dataset.captions[0]!r}; 16 pictures of each split in {folder / 'samples' / 'data.png'}")


if __name__ == "__main__":
    command(main)
