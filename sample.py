"""Pictures and scores from trained stages.

    python sample.py --train                         # trains what is missing, then all pictures and scores
    python sample.py --score                         # the scores alone, also in OUT/<dataset>/scores.json
    python sample.py unconditional --kind ar         # prior → code → image
    python sample.py reconstruct a.png b.png         # image → code → images, a new noise each
    python sample.py explain a.png                   # its code, and what each position does to the drawing
    python sample.py reveal                          # a GIF: codes as the masked prior writes them, drawn
    python sample.py compose a.png b.png --weights 0.5 0.5      # each position of the code from one of them
    python sample.py compose a.png b.png --inside    # what is inside the first image, in the second one's rim
    python sample.py compose a.png b.png --recolour  # what is inside the first image, in the second's colours
    python sample.py infill a.png --keep 0.5         # half of the code stays, the masked prior draws the rest
    python sample.py text "a red ring" --image a.png # prompt → code → image; half of a.png's code stays
    python sample.py caption a.png b.png             # what the codes of the images say, in words
    python sample.py COMMAND --help                  # its flags; also of --train and --score
    python sample.py compose a.png b.png --release DIR          # most of these with the authors' models
    torchrun --nproc-per-node 8 sample.py --score --inception inception-2015-12-05.pt --dataset imagenet

Images are files of any size; where none are named, pictures of the test split are taken. Grids go to
OUT/<dataset>/samples/, numbered, with all settings inside (PNG: text "settings"; GIF: comment).

Scores use a judge, a small CNN trained to read the factors (for shapes on all their combinations, and to tell
a clean drawing from a blend of two, a blurred and a frayed one); the Fréchet distance is in its features:
    FD² = |m₁ − m₂|² + Tr(C₁ + C₂ − 2 (C₁ C₂)^½)                                                           (1)
With --inception they are those of the literature, FID, Inception Score, precision and recall, in
OUT/<dataset>/inception.json.
"""
import argparse
import functools
import hashlib
import inspect
import itertools
import math
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import data  # first: it sets the threads' waiting policy before torch starts them
import generator
import numpy as np
import prior
import text_prior
import tokenizer
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

PRESETS = {name: {**data.PRESETS.get(name, {}),
                  "sample_steps": preset["sample_steps"], "guidance": preset["guidance"]}
           for name, preset in generator.PRESETS.items()}
PRESETS["imagenet"] |= {"rounds": 0,  # as the paper
                        "workers": generator.PRESETS["imagenet"]["workers"]}
RELEASE = dict(  # the defaults of --release: the paper's settings
    dataset="imagenet", out="out/release", image_size=256, dtype="float32", sample_steps=250, guidance=1.4,
    batch=16, choose="random", text_guidance=[1.0], rounds=0)

# -------- codes in, pictures out -----------------------------------------------------------------------

def mixture_weights(codes, weights, values, positions=None):
    """Log-weights (..., L, V) of the values in a mixture of codes (..., k, L): of a value the sum of the
    `weights` (k) of the codes that have it there, −inf where none has. At `positions` the first code counts
    alone, elsewhere the others."""
    L = codes.shape[-1]
    weights = torch.as_tensor(weights, dtype=torch.float64)[:, None].repeat(1, L)  # (k, L)
    if positions is not None:
        first = torch.isin(torch.arange(L), torch.as_tensor(positions))
        weights[0] = first
        weights[1:] *= ~first
    weights = weights / weights.sum(0)
    return (F.one_hot(codes, values) * weights[..., None]).sum(-3).log().float()


def nearest_share(children, parents):
    """Of the positions where k parents (n, k, L) differ, the share (n,) that a child (n, L) has from the one
    that it is nearest to."""
    differ = (parents != parents[:, :1]).any(1, keepdim=True)  # (n, 1, L)
    equal = ((children[:, None] == parents) & differ).sum(2)  # (n, k)
    return equal.amax(1) / differ.sum(2)[:, 0].clamp(min=1)


def first_positions(stored, but_colours=False):
    """The positions that a mixture takes from its first image: of --inside those of all patches but the
    outermost; of --recolour (but_colours) all but the colours of these."""
    L, side = stored["L"], stored["side"]
    if side < 3:
        data.fail("--inside and --recolour: need codes of --sem-read patches, at least 3 side by side")
    patch = torch.arange(L) // (L // side ** 2)
    row, column = patch // side, patch % side
    inner = (row > 0) & (row < side - 1) & (column > 0) & (column < side - 1)  # (L,)
    if but_colours:
        if not stored["colour_codes"]:
            data.fail("--recolour: needs codes of tokenizer.py --colour-codes")
        inner = ~(inner & data.colour_positions(stored))
    return inner.nonzero()[:, 0]


class Stages:
    """The trained stages of OUT/<dataset>, each loaded when first used, with the samplers of the flags. Where
    one is missing, the run stops with the command that trains it."""

    samplers = prior.SAMPLERS | {"to code": text_prior.TO_CODE, "to text": text_prior.TO_TEXT}

    def __init__(self, args, run):
        self.args, self.run = args, run
        self.models = {}  # priors and generators that are loaded, by stage

    def sampler(self, kind):
        """The settings of a code sampler: its own (`samplers`), and over them the flags."""
        return prior.sampler_settings(self.args, self.samplers[kind])

    @functools.cached_property
    def dataset(self):
        """The dataset of the flags."""
        return data.load_dataset(self.args)

    @functools.cached_property
    def stored(self):
        """The codes, as data.load_codes; where the dataset is loaded, they must be its own."""
        remedy = "make it with " + data.script_command("tokenizer.py", self.args)
        images_id = self.dataset.id if "dataset" in vars(self) else None  # loaded so far?
        return data.load_codes(self.run.folder / "codes.pt", remedy, images_id)

    @functools.cached_property
    def backbone(self):
        """The ViT of tokenizer.pt."""
        return tokenizer.load_tokenizer(self.args, self.run.device)

    @functools.cached_property
    def text_model(self):
        """(model, Text, config) of text_prior.pt."""
        return text_prior.load_text_prior(self.args, self.stored, self.run.device)

    def model(self, stage):
        """The model of a stage: prior-masked, prior-ar, generator or another like these."""
        if stage not in self.models:
            model = self.models[stage] = self.read(stage)
            if isinstance(model, generator.DiT):
                size = model.x_shape[1] * (model.vae.down if model.vae else 1)
                if size != self.args.image_size:
                    data.fail(f"{stage} does not draw {self.args.image_size} pixels: add --image-size {size}")
        return self.models[stage]

    def read(self, stage):
        """Read the model of a stage."""
        if stage.startswith("prior-"):
            kind = stage.removeprefix("prior-")
            return prior.load_prior(self.args, kind, self.stored, self.run.device)
        return generator.load_generator(self.args, self.stored["id"], self.run.device, stage)

    def codes_of(self, rows):
        """The stored codes (n, L) of the unflipped images `rows`."""
        return self.stored["codes"][torch.as_tensor(rows), 0].long()

    def encode(self, images):
        """Codes (n, L) of images (n, 3, S, S) uint8."""
        return tokenizer.encode_images(self.backbone, images, self.run)[0].cpu()

    def draw(self, codes, seed=0, first=0, stage="generator"):
        """Images (n, 3, S, S) uint8 from codes (n, L), of which the first is number `first` of many."""
        return generator.generate(self.model(stage), codes, self.args, self.run, seed, first)

    def sample_codes(self, kind, count, seed=0, first=0):
        """Codes (count, L) and network calls (count,) of a prior; `first` as in `draw`, a multiple of
        prior.BATCH."""
        model = self.model(f"prior-{kind}")
        return prior.sample_codes(model, count, self.sampler(kind), self.run, seed, first)

    def compose(self, codes, weights, rng, choose, positions=None):
        """A child (n, L) of each family of k codes (n, k, L), at every position the value of a parent. choose
        "random": by the weights alone; "prior": by the masked prior times the weights, redrawn in --rounds.

        No code is likelier under the prior than a parent's own. So up to --draws children are drawn (by
        events, whatever --order says), and the first one is taken that has no more than --most, or than the
        largest weight, of the positions where its parents differ from one of them; if none, the one with
        least."""
        log_weights = mixture_weights(codes, weights, self.stored["V"], positions)  # (n, L, V)
        if positions is not None and codes.shape[1] == 2:
            choose = "random"  # nothing is left to choose
        if choose == "random":
            u = torch.rand(log_weights.shape[:2], generator=rng, dtype=torch.float64)
            return prior.draw_values(log_weights, 1.0, 1.0, u)[0]
        model = self.model("prior-masked")
        sampler = self.sampler("masked")
        chosen = weights if positions is None else weights[1:]  # the first has its positions
        most = max(self.args.most, max(chosen) / sum(chosen))
        at_once = max(1, model.L // 16) if sampler["rounds"] else 1  # no round mends these
        begin = sampler | {"order": "event", "per_step": at_once}
        children = codes[:, 0].clone()
        share = torch.full((len(codes),), math.inf)  # of the nearest parent, in the child so far
        for _ in range(self.args.draws):
            rows = (share > most).nonzero()[:, 0]  # (m,), to be drawn again
            if not len(rows):
                break
            hidden = torch.full_like(codes[rows, 0], model.V)
            drawn, _ = prior.sample_masked(model, hidden, begin, self.run, rng, log_weights[rows])
            drawn = prior.redraw_codes(model, drawn, sampler, self.run, rng, log_weights[rows])
            found = nearest_share(drawn, codes[rows])  # (m,)
            better = found < share[rows]
            children[rows[better]] = drawn[better]
            share[rows[better]] = found[better]
        return children

    def codes_from_prompts(self, prompts, guidance, seed=0, given=None):
        """Codes (n, L) for n prompts, and network calls (n,); given (n, L): positions that are not V stay."""
        model, text, config = self.text_model
        most = config["text_length"]
        encoded = text.encode(prompts)
        for prompt, ids in zip(prompts, encoded):
            if not 0 < len(ids) <= most:
                data.fail(f"prompt {prompt[:30]!r}: {len(ids):,} tokens; write at most {most}, not empty")
        rows = text.rows(encoded)
        sampler = self.sampler("to code")
        return text_prior.codes_from_text(model, rows, sampler, guidance, self.run, seed, given)

    def readable_captions(self, rows):
        """{row: caption} of the images `rows`, but for captions that the text prior cannot read."""
        _, text, config = self.text_model
        captions = [self.dataset.captions[row] for row in rows]
        readable = [0 < len(ids) <= config["text_length"] for ids in text.encode(captions)]
        return {row: caption for row, caption, good in zip(rows, captions, readable) if good}

    def captions_from_codes(self, codes, seed=0):
        """Captions, n texts, of codes (n, L)."""
        model, text, config = self.text_model
        sampler = self.sampler("to text")
        ids = text_prior.text_from_codes(model, codes, config["window"], sampler, self.run, seed)
        return [text.decode(row) for row in ids.tolist()]


# -------- the authors' release -------------------------------------------------------------------------

class Release(Stages):
    """The authors' models in the folders of --release DIR, in place of trained stages. They know no dataset:
    codes of its images are made when they are asked for."""

    samplers = Stages.samplers | {
        "masked": prior.SAMPLERS["masked"] | {"nucleus": 1.0},
        "to code": text_prior.TO_CODE | {"temperature": 0.2, "per_step": 1}}

    @functools.cached_property
    def stored(self):
        """L and V alone, as the generator's weights tell them; codes of no grid."""
        _, sizes = generator.read_release(Path(self.args.release, "DLC_DiT_L512"))
        return {"L": sizes["codes"], "V": sizes["values"], "side": 0, "colour_codes": 0}

    @functools.cached_property
    def backbone(self):
        """The authors' encoder."""
        folder = Path(self.args.release, "SEM_dinov2_L512")
        return tokenizer.load_release(folder, self.stored["L"], self.stored["V"], self.run.device)

    @functools.cached_property
    def text_model(self):
        """(model, Text, config) of the authors' fine-tuned LLaDA."""
        folder = Path(self.args.release, "DLC_LLADA_L512")
        return text_prior.load_release(folder, self.stored, self.run.device)

    def read(self, stage):
        """The authors' SEDD, or their DiT with its autoencoder."""
        if stage == "prior-masked":
            return prior.load_release(Path(self.args.release, "DLC_SEDD_L512"), self.run.device)
        for name in ("backbone", "text_model"):  # pictures are drawn last: these are let go
            vars(self).pop(name, None)
        return generator.load_release(Path(self.args.release, "DLC_DiT_L512"), self.run.device)

    def codes_of(self, rows):
        """Codes (n, L) of the images `rows`: of files, cut straight to the encoder's size."""
        if torch.is_tensor(self.dataset.images):  # a small folder
            return self.encode(self.dataset.pixels(rows))
        files = data.ImageFiles([self.dataset.images.paths[row] for row in rows], self.backbone.image_size)
        return self.encode(torch.stack([files[k] for k in range(len(files))]))


# -------- judge ----------------------------------------------------------------------------------------

class Judge(nn.Module):
    """A small CNN that reads `factors` {name: values} off images (B, 3, S, S): features (B, 64), logits
    (B, values) of each factor, and a logit (B,) of being clean."""

    def __init__(self, factors, image_size):
        super().__init__()
        self.sizes = [len(values) for values in factors.values()]
        layers = []
        first = 2 if image_size >= 32 else 1
        for inputs, outputs, stride in ((3, 32, first), (32, 64, 2), (64, 128, 2)):
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.factors = nn.Linear(64, sum(self.sizes))
        self.clean = nn.Linear(64, 1)

    def forward(self, images):
        h = self.body(images)  # (B, 64)
        logits = self.factors(h).split(self.sizes, 1)  # factors × (B, values)
        return h, logits, self.clean(h)[:, 0]


def spoil(a, b, u, noise):
    """Spoil clean images a, b (n, 3, S, S) in [0, 255] → uint8, by uniform u (n, 5) and noise (n, 2, 8, 8).
    A quarter each: a faded into b; a beside b along a line; a blurred; a frayed."""
    n, _, side, _ = a.shape
    u = u[:, :, None, None]  # (n, 5, 1, 1): strength, angle and place of the line, two choices of the kind
    grid = (torch.arange(side) + 0.5) / side - 0.5
    angle = u[:, 1:2] * 6.283
    height = torch.cos(angle) * grid[:, None] + torch.sin(angle) * grid  # (n, 1, S, S)
    half = (height > (u[:, 2:3] - 0.5) * 0.4).float()
    fade = (0.3 + 0.4 * u[:, :1]).expand_as(half)
    w = torch.where(u[:, 3:4] < 0.5, fade, half)
    blended = a * w + b * (1 - w)

    wide = F.avg_pool2d(F.pad(a, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = 0.6 + 0.4 * u[:, :1]
    blurred = a + strength * (wide - a)
    shift = F.interpolate(noise - 0.5, size=(side, side), mode="bicubic") * 5 * (0.5 + u[:, :1]) / side
    straight = F.affine_grid(torch.eye(2, 3).expand(n, -1, -1), a.shape, align_corners=False)
    shifted = straight + shift.permute(0, 2, 3, 1)  # (n, S, S, 2), by a pixel or so
    frayed = F.grid_sample(a, shifted, padding_mode="reflection", align_corners=False)
    one = torch.where(u[:, 3:4] < 0.5, blurred, frayed)
    return torch.where(u[:, 4:5] < 0.5, blended, one).round().clamp(0, 255).to(torch.uint8)


def judge_batch(dataset, args, step, size=128):
    """Real images (b, 3, S, S) uint8, labels (b, factors) and, for shapes, b spoiled ones, of two drawings
    that differ in some factors, not in position and tilt; all a function of (dataset, step)."""
    u = torch.from_numpy(np.random.default_rng((step, 1)).random((size, 160))).float()
    if args.dataset != "shapes":
        rows = data.batch_rows(dataset.splits["train"], size, 1, step)
        images = dataset.pixels(rows, (u[:, 0] < 0.5) & args.flip)
        return images, dataset.labels[rows], images[:0]
    sizes = torch.tensor([len(values) for values in data.SHAPES.values()])
    labels = (u[:, :5] * sizes).long()  # all combinations, also those that training never shows
    others = (u[:, 5:10] * sizes).long()
    others = torch.where(others == labels, (labels + 1) % sizes, others)
    changed = (u[:, 18:23] < 0.4) | F.one_hot((u[:, 23] * 5).long(), 5).bool()
    nuisance = u[:, 10:18]
    a = data.draw_shapes(labels, nuisance, args.image_size)
    b = data.draw_shapes(torch.where(changed, others, labels), nuisance, args.image_size)
    spoiled = spoil(a.float(), b.float(), u[:, 24:29], u[:, 29:157].view(size, 2, 8, 8))
    return a, labels, spoiled


def train_judge(judge, dataset, args, run, steps=600):
    """Train a new judge, in place."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-3, fused=True)
    for step in range(steps):
        images, labels, spoiled = judge_batch(dataset, args, step)
        n = len(images)
        labels = labels.to(run.device)
        x = torch.cat([images, spoiled]).to(run.device)
        with run.autocast():
            _, factors, clean = judge(data.from_bytes(x))
        loss = sum(F.cross_entropy(logits[:n].float(), labels[:, k]) for k, logits in enumerate(factors))
        if len(spoiled):
            real = (torch.arange(len(x), device=run.device) < n).float()
            loss = loss + F.binary_cross_entropy_with_logits(clean.float(), real)
        optimizer.param_groups[0]["lr"] = data.cosine(step, steps, 3e-3, 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def load_judge(dataset, args, run):
    """The judge of OUT/<dataset>/judge.pt, trained and kept there on first use."""
    path = run.folder / "judge.pt"
    labels = data.checksum([dataset.factors, dataset.labels.tolist()])  # of a folder they may change alone
    made_from = {"images": dataset.id, "labels": labels, "image size": args.image_size, "flip": args.flip}
    torch.manual_seed(0)  # whatever --seed is: all runs are judged alike
    judge = Judge(dataset.factors, args.image_size).to(run.device)
    if data.is_made_from(path, "judge", made_from):
        judge.load_state_dict(data.read(path, "judge")["judge"])
    else:
        print("--- scores: training a judge of images", flush=True)
        train_judge(judge, dataset, args, run)
        data.save(path, "judge", judge=judge.state_dict(), made_from=made_from)
    return judge.eval()


def moments(features, batch=10_000):
    """Mean (d,) and covariance (d, d) in float64 of features (n, d) that may not fit in memory."""
    n = len(features)
    centre = sum(part.double().sum(0) for part in features.split(batch)) / n
    centred = (part.double() - centre for part in features.split(batch))
    return centre, sum(part.T @ part for part in centred) / max(1, n - 1)  # of one image: zero


def frechet(a, b):
    """FD² of equation (1) between Gaussians fitted to features a (n, d), b (m, d)."""
    mean_a, cov_a = moments(a)
    mean_b, cov_b = moments(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # C₁^½
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


# -------- scores ---------------------------------------------------------------------------------------

def mean(values):
    """Mean of bools or numbers as a float."""
    return values.double().mean().item()


def nearest_distance(codes, train, batch=100):
    """Hamming distance (n,) of each code (n, L) to the nearest of the training codes (m, L)."""
    train = train.float()
    nearest = [torch.cdist(part.float(), train, p=0).amin(1) for part in codes.split(batch)]
    return torch.cat(nearest)  # the norm of p = 0 counts what differs


def factor_accuracy(seen, labels, names, pair=None):
    """Share of rows where each of the first factors, `names`, is right, all of them, and both of a pair."""
    right = (seen == labels)[:, :len(names)]
    shares = {name: mean(right[:, k]) for k, name in enumerate(names)} | {"all": mean(right.all(1))}
    if pair:
        shares["pair"] = mean(right[:, [names.index(name) for name in pair]].all(1))
    return shares


def read_shapes_caption(text):
    """The factors (5,) in a caption of data.shapes_caption; −1: it leaves them out, or is no such caption."""
    words = {name: f"(?P<{name}>{'|'.join(values)})" for name, values in data.SHAPES.items()}
    pattern = ("an? (?:{size} )?(?:{colour} )?{shape}(?: on a {background} background)?"
               "(?: in an? {frame} frame)?")
    match = re.fullmatch(pattern.format(**words), text)
    said = match.groupdict() if match else {}
    return [values.index(said[name]) if said.get(name) else -1 for name, values in data.SHAPES.items()]


MEANT = {  # by the way of mixing, the parent of whom a child of shapes should have each factor
    "inner patches of the first": [0, 0, 0, 1, 1], "in the colours of the second": [0, 1, 0, 0, 0]}


class Scores:
    """The table of scores.json, of the test split: up to --count pictures for each line (for some a half or a
    quarter of that), --seed for all noise."""

    def __init__(self, stages, args, run):
        self.stages, self.args, self.run = stages, args, run
        self.n = args.count
        self.dataset = stages.dataset
        self.stored = stages.stored  # codes of other images are refused now
        self.names = list(self.dataset.factors)
        self.shapes = args.dataset == "shapes"
        splits = self.dataset.splits
        self.unseen = {split: rows for split, rows in splits.items() if split.startswith("unseen")}
        self.judge = load_judge(self.dataset, args, run) if self.names else None
        self.rows = np.random.default_rng(0).permutation(splits["test"])[:self.n].tolist()
        text_path = run.folder / "text_prior.pt"
        self.texts = text_path.exists()
        self.kinds = [kind for kind in ("masked", "ar") if (run.folder / f"prior-{kind}.pt").exists()]
        if self.texts and stages.text_model[2]["captions"] != self.dataset.captions_id:
            remedy = data.script_command("text_prior.py", args) + " --restart"
            data.fail(f"{text_path}: made from other captions; bring those back, or train it with {remedy}")
        train = np.random.default_rng(1).permutation(splits["train"])[:10_000]
        self.reference = self.judged(self.dataset.pixels(train))[0]

    @torch.no_grad()
    def judged(self, images):
        """What the judge sees in images (n, 3, S, S) uint8: features (n, D) float64, factors (n, factors)
        long, clean (n,) bool; without labels to train a judge on, the tokenizer's features alone."""
        parts = []
        for part in images.split(500):
            clean = torch.ones(len(part))  # what is clean a judge learns of shapes alone
            factors = torch.zeros(len(part), 0).long()
            if self.judge:
                features, logits, found = self.judge(data.from_bytes(part.to(self.run.device)))
                factors = torch.stack([values.argmax(1) for values in logits], 1)
                clean = found if self.shapes else clean
            else:
                _, features = tokenizer.encode_images(self.stages.backbone, part, self.run)
            parts.append((features.cpu().double(), factors.cpu(), clean.cpu() > 0))
        return [torch.cat(tensors) for tensors in zip(*parts)]

    def drawn(self, codes, shift, **more):
        """What the judge sees in images drawn from codes (n, L), with noise of --seed + shift."""
        return self.judged(self.stages.draw(codes, self.args.seed + shift, **more))

    def measure(self, judged, labels=None):
        """Of what `judged` returns: Fréchet distance, cleanness, and with labels (n, factors) the factors."""
        features, factors, clean = judged
        line = {"n": len(features), "frechet": frechet(features, self.reference)}
        if self.shapes:
            line["clean"] = mean(clean)
        if labels is not None and self.names:
            line["factors"] = factor_accuracy(factors, labels, self.names)
        return line

    def run_all(self):
        """Measure all that the trained stages allow; returns the nested dict of scores.json."""
        begin = functools.partial(print, "--- scores:", flush=True)
        labels = self.dataset.labels[self.rows]
        real = self.measure(self.judged(self.dataset.pixels(self.rows)), labels)
        result = {"real images": real}
        if self.shapes:
            spoiled = torch.cat([judge_batch(self.dataset, self.args, 10 ** 6 + k)[2] for k in range(8)])
            result["blended, blurred and frayed images"] = {"clean": mean(self.judged(spoiled)[2])}
        report = self.stored["report"].items()
        result["tokenizer"] = {name: value for name, value in report if not name.endswith("val")}
        begin("images from codes")
        codes = self.stages.codes_of(self.rows)
        usual = self.drawn(codes, 0)
        line = result["reconstruct"] = self.measure(usual, labels)
        if (self.run.folder / "generator-uncond.pt").exists():  # which reads no codes
            without = self.measure(self.drawn(codes, 0, stage="generator-uncond"))
            result["generator without codes"] = without
            line["frechet / without codes"] = line["frechet"] / without["frechet"]
        begin("samples of the priors")
        result |= self.score_priors(codes, line["frechet"], real["frechet"])
        begin("children of two images")
        result["compose"] = self.score_composition()
        for split, rows in self.unseen.items():
            begin(split)
            if self.shapes:
                result[split] = self.score_unseen(split, usual[1])
                result[f"compose, {split}"] = self.score_recombination(data.UNSEEN_PAIRS[split])
            else:  # of a folder; the judge has not seen these combinations either
                labels = self.dataset.labels[rows[:self.n]]
                judged = {"real": self.judged(self.dataset.pixels(rows[:self.n])),
                          "from the code": self.drawn(self.stages.codes_of(rows[:self.n]), 3)}
                result[split] = {name: self.measure(seen, labels) for name, seen in judged.items()}
        if self.texts:
            for guidance in self.args.text_guidance:
                begin(f"text to image, guidance {guidance:g}")
                result[f"text to image, guidance {guidance:g}"] = self.score_text(guidance)
            begin("captions of images")
            result["captions of images"] = self.score_captions()
        return result

    def score_priors(self, true_codes, of_true_codes, of_real):
        """For each trained prior bits per token, calls, how many samples are training codes, and Fréchet
        distance: itself, over that of images of true codes, and this ratio after that of real images is taken
        off both."""
        train = self.dataset.splits["train"]
        train_codes = self.stored["codes"][train.start:train.stop, :1 + self.args.flip].flatten(0, 1)

        def memorised(codes):
            distance = nearest_distance(codes, train_codes)
            return {"n": len(codes), "in training set": mean(distance == 0),
                    "distance to nearest": mean(distance)}

        result = {"held-out codes": memorised(true_codes)}
        for kind in self.kinds:
            sampled, calls = self.stages.sample_codes(kind, len(self.rows), self.args.seed)
            line = self.measure(self.drawn(sampled, 1))
            line["frechet / true codes"] = line["frechet"] / of_true_codes
            line["the same, above real images"] = (line["frechet"] - of_real) / (of_true_codes - of_real)
            bits, error = prior.bits_per_token(self.stages.model(f"prior-{kind}"), true_codes, self.run)
            line |= {"bits per token": bits, "standard error": error, "calls per sample": mean(calls)}
            result[f"prior-{kind}"] = line | memorised(sampled)
        if len(self.kinds) == 2:
            masked, ar = (result[f"prior-{kind}"]["bits per token"] for kind in self.kinds)
            result["masked bound / ar bits"] = masked / ar
        return result

    def children(self, rows):
        """Children of pairs of images `rows` (n, 2) by each way of mixing codes: {way: codes (n, L)}."""
        ways = {"positions by random": ("random", None)}
        if "masked" in self.kinds:
            ways["positions by prior"] = ("prior", None)
        if self.stored["side"] > 2:
            ways["inner patches of the first"] = ("random", first_positions(self.stored))
            if self.stored["colour_codes"]:
                ways["in the colours of the second"] = ("random", first_positions(self.stored, True))
        codes = self.stages.codes_of(rows)  # (n, 2, L)
        found = {"copy of the first parent": codes[:, 0]}
        for way, (choose, positions) in ways.items():
            rng = data.step_generator(self.args.seed, 2)
            found[way] = self.stages.compose(codes, [1, 1], rng, choose, positions)
        return found

    def score_composition(self):
        """Children of pairs of test images: is every factor that of a parent, and is the child no copy?"""
        rows = np.stack([self.rows, np.roll(self.rows, 1)], 1)[:self.n // 2]  # (n, 2)
        labels = self.dataset.labels[rows]  # (n, 2, factors)
        others = self.dataset.labels[np.roll(self.rows, 7)[:len(rows)]]
        result = {}
        if self.names:
            result["right by chance (another test image)"] = mean((others[:, None] == labels).any(1).all(1))
        for way, codes in self.children(rows).items():
            judged = self.drawn(codes, 2)
            line = result[way] = self.measure(judged)
            if self.names:
                line |= self.inheritance(judged, labels, way)
        return result

    def inheritance(self, judged, labels, way):
        """What children of a `way` of mixing (`judged`) have of their parents, labels (n, 2, factors)."""
        _, seen, clean = judged
        inherited = (seen[:, None] == labels).any(1)  # (n, factors)
        right = inherited.all(1) & clean
        new = right & (seen[:, None] != labels).any(2).all(1)
        line = {"right": mean(inherited.all(1)), "right and clean": mean(right),
                "right, clean, unlike both parents": mean(new)}
        if self.shapes and way in MEANT:
            meant = (seen == labels[:, MEANT[way], range(5)]).all(1)
            line |= {"all five factors as meant": mean(meant), "the same, clean": mean(meant & clean)}
        shares = {name: mean(inherited[:, k]) for k, name in enumerate(self.names)}
        return line | {"inherited": {"n": len(seen), **shares}}

    def score_recombination(self, pair):
        """Children of two test images of which the first has the first factor of an unseen combination, the
        second its second: how often does the child show that combination?"""
        first, second = (self.names.index(name) for name in pair)
        labels = self.dataset.labels[self.rows]
        mixed = labels[:self.n // 2, None].repeat(1, len(labels), 1)  # (a, b, factors)
        mixed[:, :, second] = labels[None, :, second]
        fits = data.is_unseen(mixed.flatten(0, 1), pair, self.args.held_out).view(len(mixed), -1)
        partner = (fits * torch.rand(fits.shape, generator=data.step_generator(self.args.seed, 3))).argmax(1)
        firsts = fits.any(1).nonzero()[:self.n // 4, 0]  # of those with a partner
        if not len(firsts):  # no such pair in few pictures
            return {}
        chosen = torch.stack([firsts, partner[firsts]], 1)  # (n, 2)
        wanted = mixed[chosen[:, 0], chosen[:, 1]]
        result = {}
        for way, codes in self.children(torch.tensor(self.rows)[chosen]).items():
            if way in MEANT and (MEANT[way][first], MEANT[way][second]) != (0, 1):
                continue  # it takes these factors from others
            _, seen, clean = self.drawn(codes, 2)
            shown = (seen == wanted)[:, [first, second]].all(1)
            result[way] = {"n": len(shown), "shows the pair": mean(shown),
                           "shows it, clean": mean(shown & clean)}
        return result

    def score_unseen(self, split, usual_factors):
        """Codes of images with a pair never seen in training → images: is the pair kept? Also how often the
        judge sees such a pair by mistake, in `usual_factors` (n, factors) of images of usual codes."""
        pair = data.UNSEEN_PAIRS[split]
        rows = self.unseen[split][:self.n // 2]
        labels = self.dataset.labels[rows]
        guessed = next(name for name in pair if name != "colour")
        by_mistake = mean(data.is_unseen(usual_factors, pair, self.args.held_out))
        line = {"chance (colour right, the other factor guessed)": 1 / len(data.SHAPES[guessed]),
                "unseen pairs among seen codes' images": by_mistake}
        sources = {"from the code": (self.stages.codes_of(rows), "generator")}
        if (self.run.folder / "generator-factors.pt").exists():
            sources["from true factors"] = (labels, "generator-factors")
        for name, (codes, stage) in sources.items():
            _, seen, clean = self.drawn(codes, 3, stage=stage)
            kept = (seen == labels)[:, [self.names.index(factor) for factor in pair]].all(1)
            line[name] = {"n": len(kept), "pair kept": mean(kept), "kept and clean": mean(kept & clean),
                          "clean": mean(clean), **factor_accuracy(seen, labels, self.names)}
        return line

    def captions_of(self, rows, said=(True,) * 4):
        """{row: caption} of images: for shapes what is `said` (as in data.shapes_caption), else their own."""
        if not self.shapes:
            return self.stages.readable_captions(rows)
        return {row: data.shapes_caption(self.dataset.labels[row].tolist(), said) for row in rows}

    def score_text(self, guidance):
        """Caption → code → image: are its factors to be seen? Of the test split and of unseen combinations,
        for shapes also shape and colour alone. And how many codes 16 draws of one prompt give."""
        rows = self.rows[:self.n // 4]
        captions = self.captions_of(rows)
        if not captions:
            return {}
        pair = ("shape", "colour") if self.shapes else None
        asked = {"captions of the test split": (captions, self.names, pair)}  # the first factors, and a pair
        if self.shapes:
            asked["shape and colour alone"] = self.captions_of(rows, (True, False, False, False)), pair, None
        for split, unseen in self.unseen.items():
            captions_of_split = self.captions_of(unseen[:self.n // 4])
            asked[split] = captions_of_split, self.names, data.UNSEEN_PAIRS.get(split)
        line = {}
        for name, (prompts, names, pair) in asked.items():
            if not prompts or not names:
                continue
            codes, _ = self.stages.codes_from_prompts([*prompts.values()], guidance, self.args.seed + 4)
            _, seen, clean = self.drawn(codes, 5)
            shares = factor_accuracy(seen, self.dataset.labels[[*prompts]], names, pair)
            line[name] = {"n": len(seen), **shares}
            if self.shapes:
                line[name]["clean"] = mean(clean)
        prompts = [prompt for prompt in [*captions.values()][:32] for _ in range(16)]
        codes, calls = self.stages.codes_from_prompts(prompts, guidance, self.args.seed + 6)
        distinct = [len(torch.unique(draws, dim=0)) for draws in codes.split(16)]
        line["distinct codes in 16 draws of a prompt"] = sum(distinct) / len(distinct)
        line["calls per sample"] = mean(calls)
        return line

    def score_captions(self):
        """Image → code → caption: how often it names each factor of shapes, else is the image's own."""
        line = {}
        for split, rows in {"test split": self.rows, **self.unseen}.items():
            rows = [row for row in rows[:self.n // 2] if self.dataset.captions[row]]
            if not rows:
                continue
            captions = self.stages.captions_from_codes(self.stages.codes_of(rows), self.args.seed + 7)
            if self.shapes:
                named = torch.tensor([read_shapes_caption(caption) for caption in captions])
                pair = data.UNSEEN_PAIRS.get(split)
                line[split] = factor_accuracy(named, self.dataset.labels[rows], self.names, pair)
            else:
                same = [a.split() == self.dataset.captions[row].split() for a, row in zip(captions, rows)]
                line[split] = {"equal to its own": sum(same) / len(same)}
            line[split]["n"] = len(rows)
        return line


# -------- scores of the literature: Inception ----------------------------------------------------------

class Inception:
    """The public TorchScript Inception: images (n, 3, S, S) uint8 of any size → features (n, 2048) and
    probabilities of its classes (n, 1008), without the output's bias as in the original score."""

    def __init__(self, path, device):
        self.device = device
        with data.reading(f"--inception {path}", "expected the TorchScript file inception-2015-12-05.pt"):
            self.net = torch.jit.load(path, map_location=device).eval()
            self.id = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            found = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        self.shapes = {name: ((values.shape[1],), torch.float32) for name, values in found.items()}

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        features = self.net(images, return_features=True)
        classes = self.net(images, no_output_bias=True)
        return {"features": features.float().cpu(), "classes": classes.float().cpu()}


def inception_score(classes, parts=10):
    """exp E KL(p(y | x) ‖ p(y)) (Salimans et al. 2016) of classes (n, K): mean and deviation over parts."""
    scores = []
    for p in classes.double().chunk(parts):
        log_ratio = p.clamp(min=1e-30).log() - p.mean(0).clamp(min=1e-30).log()
        scores.append((p * log_ratio).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, made, device, k=3, batch=1000):
    """Shares of made features (m, d) near a real one (n, d), and of real near a made one: nearer than its
    k-th nearest neighbour of its own kind (Kynkäänniemi et al. 2019)."""
    distance = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")

    def covered(x, others):
        parts = [distance(part, others).kthvalue(k + 1, 1).values for part in others.split(batch)]
        radii = torch.cat(parts)  # the nearest of each is itself
        return mean(torch.cat([(distance(part, others) <= radii).any(1).cpu() for part in x.split(batch)]))

    real, made = real.to(device), made.to(device)
    return covered(made, real), covered(real, made)


def inception_scores(stages, args):
    """FID, Inception Score, precision and recall of --count samples of the prior --kind, and of as many from
    true codes, on the first process. Processes share the samples; a stopped run goes on."""
    run = stages.run
    net = Inception(args.inception, run.device)
    dataset = stages.dataset
    stages.model("generator")  # what is missing is said now, not after hours
    stages.model(f"prior-{args.kind}")
    models = [run.folder / f"{stage}.pt" for stage in ("generator", f"prior-{args.kind}")]
    if args.release:
        models = sorted(Path(args.release).rglob("*"))
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in models]
    left_out = ("workers", "device", "out", "data_dir")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    train = dataset.splits["train"]
    shuffled = np.random.default_rng(args.seed).permutation(max(len(train), args.count)) % len(train)

    def from_training_images(rows):
        batches = dataset.batches(train[rows.start:rows.stop], 100, args.workers)
        return {"features": torch.cat([net(images)["features"] for images in batches])}

    def from_prior(rows):
        codes, _ = stages.sample_codes(args.kind, len(rows), args.seed, rows.start)
        return net(stages.draw(codes, args.seed + 1, rows.start))

    def from_true_codes(rows):
        codes = stages.codes_of(train.start + shuffled[rows.start:rows.stop])
        return net(stages.draw(codes, args.seed + 1, rows.start))

    folder = run.folder / f"reference-{data.checksum([net.id, dataset.id, args.image_size])[:16]}"
    shapes = {"features": net.shapes["features"]}
    reference = data.fill_rows(folder, len(train), run, from_training_images, shapes)["features"]
    result = {}
    for name, work in ((f"codes of prior-{args.kind}", from_prior), ("true codes", from_true_codes)):
        folder = run.folder / f".samples-{data.checksum([name, settings, net.id, files])[:16]}"
        made = data.fill_rows(folder, args.count, run, work, net.shapes, chunk=prior.BATCH)
        if run.main:
            fid = frechet(made["features"], reference)
            score, deviation = inception_score(made["classes"])
            some = np.random.default_rng(0).permutation(len(train))[:10_000]
            precision, recall = precision_recall(reference[some], made["features"], run.device)
            result[name] = {"FID": fid, "IS": score, "IS deviation": deviation, "precision": precision,
                            "recall": recall, "samples": args.count}
            del made  # Windows removes no file that is mapped
            shutil.rmtree(folder)
        run.wait()
    return result


# -------- pictures -------------------------------------------------------------------------------------
# A command's function takes the stages and the flags, and returns what data.save_grid draws (reveal: frames).

def input_images(stages, args, paths, most=8):
    """Images (n, 3, S, S) uint8 of files (none: `most` of the test split), codes (n, L) and titles."""
    def read(size):
        images = []
        for path in paths:
            with data.reading(path, f"expected an image, one of {', '.join(data.FORMATS)}"):
                images.append(data.read_image(path, size))
        return torch.stack(images)

    if paths:
        images = read(args.image_size)
        seen = read(stages.backbone.image_size) if args.release else images  # cut straight to that size
        return images, stages.encode(seen), [Path(path).stem[:10] for path in paths]
    rows = stages.dataset.splits["test"][:most]
    images = stages.dataset.pixels(rows)
    codes = stages.codes_of(rows) if args.release else stages.encode(images)
    return images, codes, [f"test {k}" for k in range(len(rows))]


def check_mixture(args, k, L):
    """Stop where --weights or --positions do not fit k codes of L positions."""
    if k < 2:
        data.fail("compose: one image; name at least 2")
    weights = args.weights or [1.0] * k
    given = args.positions or args.inside or args.recolour
    others = weights[1:] if given else weights  # the first has its positions
    if len(weights) != k or sum(others) <= 0:
        data.fail(f"--weights: {len(weights)} numbers for {k} codes; give one each, not all zero (with "
                  "--positions, --inside or --recolour: not all but the first)")
    if args.positions and max(args.positions) >= L:
        data.fail(f"--positions: expected numbers from 0 to {L - 1}")


def unconditional(stages, args):
    """Prior → code → image."""
    codes, _ = stages.sample_codes(args.kind, args.columns * args.rows, args.seed)
    return {"images": stages.draw(codes, args.seed), "columns": args.columns}


def reconstruct(stages, args):
    """Image → code → images: a row of inputs, then rows drawn from their codes, a new noise each."""
    inputs, codes, titles = input_images(stages, args, args.inputs)
    rows = [stages.draw(codes, data.mix_seed(args.seed, row)) for row in range(args.rows)]
    return {"images": torch.cat([inputs, *rows]), "columns": len(inputs), "titles": titles}


def compose(stages, args):
    """A row of images, then their children: each position of a child's code is that of one of them. Drawn
    apart, positions contradict each other, so the masked prior chooses (--choose)."""
    inputs, codes, titles = input_images(stages, args, args.inputs, 2)
    k, L = codes.shape
    check_mixture(args, k, L)
    positions = args.positions
    if args.inside or args.recolour:
        positions = first_positions(stages.stored, but_colours=args.recolour)
    columns = max(k, args.columns)
    families = codes.expand(columns * args.rows, k, L)
    rng = data.step_generator(args.seed, 0)
    children = stages.compose(families, args.weights or [1 / k] * k, rng, args.choose, positions)
    blank = torch.full((columns - k, *inputs.shape[1:]), 255, dtype=torch.uint8)
    images = torch.cat([inputs, blank, stages.draw(children, args.seed)])
    return {"images": images, "columns": columns, "titles": titles}


def infill(stages, args):
    """A part of an image's code stays, the masked prior draws the rest: a row of inputs, then of these."""
    inputs, codes, titles = input_images(stages, args, args.inputs)
    model = stages.model("prior-masked")
    rng = data.step_generator(args.seed, 0)
    codes = codes.repeat(args.rows, 1)  # (rows · n, L)
    keep = prior.ranks(torch.rand(codes.shape, generator=rng)) < round(args.keep * model.L)
    given = torch.where(keep, codes, model.V)
    filled, _ = prior.sample_masked(model, given, stages.sampler("masked"), stages.run, rng)
    images = torch.cat([inputs, stages.draw(filled, args.seed)])
    return {"images": images, "columns": len(inputs), "titles": titles}


def read_prompts(stages, args):
    """The prompts of the command line and of --prompts, else four captions of the test split."""
    prompts = [prompt.strip() for prompt in args.inputs or []]
    if args.prompts:
        with data.reading(f"--prompts {args.prompts}", "expected a file with a prompt in each line"):
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
        prompts += [line.strip() for line in lines if line.strip()]
    elif not prompts:
        prompts = list(stages.readable_captions(stages.dataset.splits["test"]).values())[:4]
    if not prompts:
        data.fail("text: no prompts; give some, or --prompts FILE with one in each line")
    return prompts


def text_to_images(stages, args):
    """A row of pictures for each prompt; with --image that picture first, and its code kept in part (--keep,
    --positions) or mixed with the prompt's (--weights)."""
    L, V = stages.stored["L"], stages.stored["V"]
    check_mixture(args, 2, L)
    prompts = read_prompts(stages, args)
    repeated = [prompt for prompt in prompts for _ in range(args.columns)]
    rng = data.step_generator(args.seed, 1)
    given = None
    if args.image is not None:
        image, code, _ = input_images(stages, args, [args.image])
        code = code.expand(len(repeated), L)
        if args.positions:
            keep = torch.isin(torch.arange(L), torch.tensor(args.positions))  # (L,)
            given = torch.where(keep, code, V)
        elif not args.weights:
            order = prior.ranks(torch.rand(code.shape, generator=rng))  # another for each picture
            given = torch.where(order < round(args.keep * L), code, V)
    codes, _ = stages.codes_from_prompts(repeated, args.text_guidance[0], args.seed, given)
    unknown = ", ".join(dict.fromkeys(stages.text_model[1].unknown(" ".join(prompts))))
    if unknown:
        print(f"note: no training caption has {unknown}; expect the model to guess there", file=sys.stderr)
    if args.weights:
        codes = stages.compose(torch.stack([codes, code], 1), args.weights, rng, args.choose)
    images = stages.draw(codes, args.seed)
    if args.image is None:
        return {"images": images, "columns": args.columns, "lines": prompts}
    rows = [torch.cat([image, row]) for row in images.split(args.columns)]
    return {"images": torch.cat(rows), "columns": args.columns + 1, "lines": prompts}


def images_to_captions(stages, args):
    """Image → code → caption; in each row an image and the one drawn from its code."""
    inputs, codes, titles = input_images(stages, args, args.inputs)
    captions = stages.captions_from_codes(codes, args.seed)
    for source, said in zip(args.inputs or titles, captions):
        print(f"{source}: {' '.join(said.split())}")
    images = torch.stack([inputs, stages.draw(codes, args.seed)], 1).flatten(0, 1)
    return {"images": images, "columns": 2, "lines": captions}


def explain(stages, args):
    """A row for each image: itself, its code, the drawing from it, how much that changes where one position
    takes the value of another image, and the drawings that change most."""
    inputs, codes, names = input_images(stages, args, args.inputs, args.rows)
    L, V, side = (stages.stored[name] for name in ("L", "V", "side"))
    columns = 4 + min(L, max(1, args.columns - 4))
    size = max(128, args.image_size)
    others = stages.codes_of(stages.stored["splits"]["train"][:500])  # (m, L)
    values = others.gather(0, (others[:, None] != codes).int().argmax(0))  # (n, L): the first that differ
    drawn = stages.draw(codes, args.seed)  # (n, 3, S, S)
    only = torch.eye(L).bool()  # row l: position l alone
    changed = [stages.draw(torch.where(row, values, codes), args.seed) for row in only]  # the same noise
    changed = torch.stack(changed, 1)  # (n, L, 3, S, S)
    change = (changed.float() - drawn[:, None].float()).abs().mean((2, 3, 4))  # (n, L)
    heat = (255 * change / change.amax(1, keepdim=True).clamp(min=1e-9)).long()
    reds = (255 - torch.linspace(0, 1, 256)[:, None] * torch.tensor([20, 200, 225])).to(torch.uint8)
    pictures, titles = [], []
    for k, name in enumerate(names):
        most = change[k].argsort(descending=True)[:columns - 4].tolist()
        ranks = [str(most.index(position) + 1) if position in most else "" for position in range(L)]
        pictures += [inputs[k], data.draw_code(codes[k], data.code_colours(V), side, size), drawn[k],
                     data.draw_code(heat[k], reds, side, size, ranks), *changed[k, most]]
        titles += [f"image: {name}", f"its code: {L} values", "drawn from its code", "red: matters most"]
        titles += [f"square {rank}: value {codes[k, position]} to {values[k, position]}"
                   for rank, position in enumerate(most, 1)]
    return {"images": pictures, "columns": columns, "titles": titles}


def reveal(stages, args, most=32):
    """A GIF: codes as the masked prior writes them, above the drawings from them, from the same noise."""
    model, side = stages.model("prior-masked"), stages.stored["side"]
    if stages.model("generator").condition != "place":
        print("note: reveal: this generator was not trained on partly hidden codes", file=sys.stderr)
    hidden = torch.full((args.columns, model.L), model.V)
    rng = data.step_generator(args.seed, 0)
    states = []
    codes, _ = prior.sample_masked(model, hidden, stages.sampler("masked"), stages.run, rng, states=states)
    frames = []
    for state in [*states[::math.ceil(len(states) / most)], codes]:
        known = (state != model.V).double().mean()
        lines = [f"the codes: {known:.0%} written by the masked prior (grey: still hidden)",
                 "drawn from what is written so far, always from the same noise"]
        pictures = [data.draw_code(code, data.code_colours(model.V), side, max(128, args.image_size))
                    for code in state]
        pictures += stages.draw(state, args.seed)
        frames.append(data.draw_grid(pictures, args.columns, lines=lines))
    return frames


MIXING = "--choose --draws --most"
COMMANDS = {  # the function of each picture, the last stage that it needs, the flags that it reads
    "unconditional": (unconditional, "prior --kind {kind}", "--kind --columns --rows --release"),
    "reconstruct": (reconstruct, "generator", "inputs --rows --release"),
    "compose": (compose, "prior --kind masked", "inputs --weights --positions --inside --recolour --columns "
                f"--rows {MIXING} --release"),
    "infill": (infill, "prior --kind masked", "inputs --keep --rows --release"),
    "text": (text_to_images, "text_prior", "inputs --prompts --columns --text-guidance --image --keep "
             f"--positions --weights {MIXING} --release"),
    "caption": (images_to_captions, "text_prior", "inputs --release"),
    "explain": (explain, "generator", "inputs --columns --rows"),
    "reveal": (reveal, "prior --kind masked", "--columns")}


def make_pictures(command, stages, args):
    """Write the picture of a command as OUT/<dataset>/samples/<name>-001.png, or the next free number."""
    name = f"{command}-{args.kind}" if command == "unconditional" else command
    end = "gif" if command == "reveal" else "png"
    numbered = (stages.run.folder / "samples" / f"{name}-{k:03d}.{end}" for k in itertools.count(1))
    path = next(path for path in numbered if not path.exists())  # earlier ones stay
    settings = {**vars(args), "command": command}
    drawn = COMMANDS[command][0](stages, args)
    if command == "reveal":
        data.save_animation(path, drawn, settings)
    else:
        data.save_grid(path, **drawn, settings=settings)
    print(f"{command}: {path}")


# -------- all of it ------------------------------------------------------------------------------------

STAGES = ("tokenizer", "generator", "prior --kind masked", "prior --kind ar", "text_prior")  # in order
MODULES = {module.__name__: module for module in (tokenizer, generator, prior, text_prior)}


def call_stage(name, function, *inputs):
    """Call the function of a stage; an error in it is followed by how --train takes that stage's flags."""
    try:
        function(*inputs)
    except SystemExit as stopped:
        how = f'sample.py --train takes flags of {name}.py as --{name.replace("_", "-")}="--flag value"'
        if stopped.code == 2:  # the parser has said what is wrong
            print(f"note: {how}", file=sys.stderr)
        elif "--" in str(stopped.code):  # this is said when the script ends
            raise SystemExit(f"{stopped.code} ({how})") from None
        raise


def write_examples(stages):
    """Two test pictures as small files, to try the commands on."""
    for name, row in zip("ab", stages.dataset.splits["test"]):
        path = stages.run.folder / "samples" / f"{name}.png"
        picture = Image.fromarray(stages.dataset.pixels([row])[0].permute(1, 2, 0).numpy())
        data.write_atomic(path, lambda file: picture.save(file, format="PNG"))
    print(f"pictures to try: a.png and b.png in {path.parent}")


def train_stages(stages, args):
    """Train what has not finished, each stage as its own command with the flags that all have and its own,
    and after it make the pictures that need no later one. At the end, measure everything."""
    start = time.time()
    run, dataset = stages.run, stages.dataset
    shared = ("dataset", "data_dir", "out", "image_size", "seed", "device", "dtype", "workers")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in shared]
    flags += ["--flip" if args.flip else "--no-flip", "--held-out", *map(str, args.held_out)]
    planned = {}
    for stage in STAGES:
        name, *kind = stage.split()
        if name == "text_prior" and not any(dataset.captions):
            print("text_prior: left out, the images have no captions")
            continue
        planned[stage] = [*getattr(args, name), *kind, *flags]  # of the same flag the last counts
        call_stage(name, MODULES[name].parse, planned[stage])  # wrong flags are found before the first trains
    for number, (stage, words) in enumerate(planned.items(), 1):
        later = ", ".join([*list(planned)[number:], "scores"])
        used = (time.time() - start) / 60
        print(f"--- stage {number} of {len(planned)}: {stage}; {used:.1f} minutes so far; then {later}",
              flush=True)
        name = stage.split()[0]
        loaded = [] if name == "prior" else [dataset]  # a prior reads codes alone
        call_stage(name, MODULES[name].main, words, *loaded)
        stages = Stages(args, run)  # anew: an earlier one may hold what this stage replaced
        stages.dataset = dataset
        if stage == "generator" and args.dataset == "shapes":
            write_examples(stages)
        if stage == "text_prior" and not stages.readable_captions(dataset.splits["test"]):
            continue  # text would have nothing to begin with
        for command, (_, last, _) in COMMANDS.items():
            if last.format(kind=args.kind) == stage:
                make_pictures(command, stages, args)


TASKS = {  # as COMMANDS, but of the first only the docstring is used, for --help
    "--train": (train_stages, "", "--tokenizer --generator --prior --text-prior --count --columns --rows "
                f"--kind --keep --text-guidance {MIXING}"),
    "--score": (Scores, "", f"--inception --release --count --kind --text-guidance {MIXING}")}
OF_STAGE = dict(type=shlex.split, default=[], metavar="FLAGS", help='flags for its script, as "--steps 100"')
FLAGS = {
    "inputs": dict(nargs="*", help="image files, or the prompts of text (default: of the test split)"),
    **{f"--{name.replace('_', '-')}": OF_STAGE for name in MODULES},
    "--inception": dict(metavar="FILE", help="FID and others by this TorchScript network instead"),
    "--count": dict(type=data.number(4, 10 ** 9, int),
                    help="pictures for a score, for some a half or a quarter of that (default: 2,000; with "
                    "--inception 50,000)"),
    "--prompts": dict(metavar="FILE", help="a file with a prompt in each line"),
    "--image": dict(metavar="FILE", help="a picture whose code is kept in part, or mixed in (--weights)"),
    "--keep": dict(type=data.fraction, default=0.5, help="share of positions kept"),
    "--weights": dict(type=data.non_negative, nargs="+", help="weight of each image (default: equal); "
                      "text: of prompt and --image"),
    "--positions": dict(type=data.count, nargs="+", help="taken from the first image; text: kept of --image"),
    "--inside": dict(action="store_true", help="what is inside the first image, all else from the others"),
    "--recolour": dict(action="store_true", help="the first image, what is inside it in the colours inside "
                       "the second (codes of tokenizer.py --colour-codes)"),
    "--columns": dict(type=data.positive, default=8, help="pictures in a row"),
    "--rows": dict(type=data.positive, default=4, help="rows of generated pictures; explain: test images"),
    "--kind": dict(choices=("masked", "ar"), default="masked", help="the prior of unconditional samples"),
    "--text-guidance": dict(type=data.number(0, 1e6), nargs="+", default=[2.0], help="g of equation (3) of "
                            "text_prior.py; 1: none; --score measures all, pictures take the first"),
    "--choose": dict(choices=("prior", "random"), default="prior", help="who chooses the image of each "
                     "position, the masked prior or chance"),
    "--draws": dict(type=data.positive, default=8, help="children drawn, of which one is taken"),
    "--most": dict(type=data.fraction, default=0.8, help="largest share of the positions where its parents "
                   "differ that a child has from one"),
    "--release": dict(metavar="DIR", help="draw with the authors' models, the folders of their release")}


def parse(argv):
    """The flags of the first command in the words, checked; other pictures' flags have defaults."""
    words = sys.argv[1:] if argv is None else argv
    tasks = COMMANDS | TASKS
    task = next((word for word in words if word in tasks), None)
    if task is None:
        parser = data.make_parser(__doc__)
        parser.parse_known_args(words)  # which may ask for help
        parser.error(f"say what to do: {', '.join(tasks)}")
    function, last, reads = tasks[task]
    parser = data.make_parser(inspect.getdoc(function))
    parser.usage = f"sample.py {task} [flags]"
    parser.remedy = f"see sample.py {task} --help"
    add = parser.add_argument_group(task).add_argument
    if task in COMMANDS:
        add("command", choices=[task], help=argparse.SUPPRESS)
    else:
        add(task, dest="command", action="store_const", const=task, help=argparse.SUPPRESS)
    for name, how in FLAGS.items():
        if name in reads.split():
            add(name, **how)
        else:
            parser.set_defaults(**{name.lstrip("-").replace("-", "_"): how.get("default")})
    generator.add_sampler_flags(parser)
    if last != "generator":
        prior.add_sampler_flags(parser)
    groups = parser._action_groups
    groups += [groups.pop(2), groups.pop(2)]  # data and run, which all scripts have, come last
    args = data.parse(parser, PRESETS, argv)
    if args.release:
        parser.set_defaults(**RELEASE)
        args = data.parse(parser, {}, argv)
    args.count = args.count or (50_000 if args.inception else 2000)
    if args.release and (args.kind == "ar" or task == "--score" and not args.inception):
        parser.error("argument --release: has no --kind ar, and --score needs --inception with it")
    if sum([args.positions is not None, bool(args.inside), bool(args.recolour)]) > 1:
        parser.error("arguments --positions, --inside and --recolour: one of them")
    if task == "text" and (args.weights or args.positions):
        if args.image is None or (args.weights and args.positions):
            parser.error("arguments --weights and --positions: text takes one of them, and only with --image")
    return args


def main(argv=None):
    """Train what is missing, make pictures, measure."""
    start = time.time()
    args = parse(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not args.inception:
        data.fail("sample.py: several processes share --score --inception alone; start it without torchrun")
    run = data.Run(args, lock="sample" if args.inception else None)
    stages = Release(args, run) if args.release else Stages(args, run)
    if args.command in COMMANDS:
        return make_pictures(args.command, stages, args)
    if args.command == "--train":
        train_stages(stages, args)
    scores = inception_scores(stages, args) if args.inception else Scores(stages, args, run).run_all()
    if run.main:
        data.print_figures(scores)
        print(f"{time.time() - start:.0f} seconds")
        scores |= {"seconds": round(time.time() - start), "settings": vars(args)}
        data.write_json(run.folder / ("inception.json" if args.inception else "scores.json"), scores)
    run.wait()


if __name__ == "__main__":
    data.run_script(main)
