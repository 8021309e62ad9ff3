"""From trained stages to pictures and scores: unconditional samples, reconstructions, compositions,
infilling, text and captions.

    python sample.py --train                           # trains what is missing, in order, then pictures and scores
    python sample.py --score                           # the scores alone, also in OUT/<dataset>/scores.json
    torchrun --nproc-per-node 8 sample.py --score --inception inception-2015-12-05.pt --dataset imagenet    # FID
    python sample.py unconditional --kind ar           # prior → code → image
    python sample.py reconstruct a.png b.png           # image → code → images, a new noise each
    python sample.py compose a.png b.png --weights 0.5 0.5        # each position of the code from one of the images
    python sample.py compose a.png b.png --positions 0 1 2 3      # these positions from the first image
      Positions drawn apart contradict each other; the masked prior chooses them so that they fit (--choose
      random: drawn apart).
    python sample.py infill a.png --keep 0.5           # keep half of the code, draw the rest from the masked prior
    python sample.py text "a small red ring on a dotted background in a blue frame" "a large blue bar"
    python sample.py text "a green ring" --image a.png --keep 0.5              # half of the picture's code stays
    python sample.py text "a green ring" --image a.png --weights 0.5 0.5       # each position from prompt or picture
    python sample.py caption a.png b.png               # what the codes of the images say, in words
Images are files of any size; where none are named, pictures of the test split are taken. Grids go to
OUT/<dataset>/samples/, with all settings stored inside the PNG (text field "settings").

Scores use a judge, a small CNN trained on all combinations of the factors (and, for shapes, to tell a clean
drawing from a blend of two); the Fréchet distance is taken in its features:
    FD² = |m₁ − m₂|² + Tr(C₁ + C₂ − 2 (C₁ C₂)^½)                                                           (1)
With --inception they are those of the literature instead, FID, Inception Score, precision and recall, in
OUT/<dataset>/inception.json.
"""
import functools
import hashlib
import re
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

PRESETS = {name: {**data.PRESETS.get(name, {}), "sample_steps": preset["sample_steps"]}
           for name, preset in generator.PRESETS.items()}
COMMANDS = ("unconditional", "reconstruct", "compose", "infill", "text", "caption")

# ----------------------------------------------------------------------------------------------------------
# codes in, pictures out
# ----------------------------------------------------------------------------------------------------------


def mixture_weights(codes, weights, values, positions=None):
    """Log-weights (..., L, V) of the values in a mixture of k codes (..., k, L): at each position the weights
    of the images that have the value there, −inf where none has. `positions`: there the first image alone, at
    all others the rest by their weights."""
    k, L = codes.shape[-2:]
    weights = torch.as_tensor(weights, dtype=torch.float64)[:, None].repeat(1, L)  # (k, L)
    if positions is not None:
        first = torch.zeros(L, dtype=torch.bool).index_fill(0, torch.as_tensor(positions), True)
        weights[0] = first.double()
        weights[1:] *= ~first
    weights = weights / weights.sum(0)
    return (F.one_hot(codes, values) * weights[..., None]).sum(-3).log().float()


class Stages:
    """The trained stages of one OUT/<dataset>, each loaded when first used; a missing one stops with the
    command that trains it."""

    def __init__(self, args, run):
        self.args, self.run = args, run

    @functools.cached_property
    def dataset(self):
        """The dataset of the flags."""
        return data.load_dataset(self.args)

    @functools.cached_property
    def codes(self):
        """The codes of the dataset with L, V, splits and report, as data.load_codes."""
        remedy = "make it with " + data.script_command("tokenizer.py", self.args)
        return data.load_codes(self.run.folder / "codes.pt", remedy)

    @functools.cached_property
    def backbone(self):
        """The ViT of tokenizer.pt."""
        return tokenizer.load_tokenizer(self.args, self.run.device)

    @functools.cache
    def prior_model(self, kind):
        """The model of prior-masked.pt or prior-ar.pt."""
        return prior.load_prior(self.args, kind, self.codes, self.run.device)

    @functools.cached_property
    def text_model(self):
        """(model, Text, config) of text_prior.pt."""
        return text_prior.load_text_prior(self.args, self.codes, self.run.device)

    @functools.cache
    def generator_model(self, stage="generator"):
        """The model of generator.pt, or of another stage of the same architecture."""
        stand_ins = {"generator-uncond": "none", "generator-factors": "factors"}
        codes_id = stand_ins.get(stage) or self.codes["id"]
        model = generator.load_generator(self.args, codes_id, self.run.device, stage)
        size = model.x_shape[1] * (model.vae.down if model.vae else 1)
        if size != self.args.image_size:
            data.fail(f"{stage}.pt draws images of {size} pixels, --image-size is {self.args.image_size}: add "
                      f"--image-size {size}")
        return model

    def codes_of(self, rows):
        """The stored codes (n, L) of the unflipped images `rows`."""
        return self.codes["codes"][torch.as_tensor(rows), 0].long()

    def encode(self, images):
        """Codes (B, L) of images (B, 3, S, S) uint8."""
        return tokenizer.encode_images(self.backbone, images, self.run)[0].cpu()

    def draw(self, codes, seed=0, first=0, stage="generator"):
        """Images (n, 3, S, S) uint8 from codes (n, L), with the sampler of the flags; `first`: which of many
        the first is."""
        weak = self.generator_model("generator-early") if self.args.guide == "early" else None
        model, sampler = self.generator_model(stage), generator.sampler_settings(self.args)
        return generator.generate(model, codes, len(codes), sampler, self.run, seed, weak, first)

    def sample_codes(self, kind, count, seed=0, first=0):
        """Codes (count, L) and network calls (count,) of a prior, with the sampler of the flags; `first`:
        which of many the first is."""
        sampler = prior.sampler_settings(self.args, prior.SAMPLERS[kind])
        return prior.sample_codes(self.prior_model(kind), count, sampler, self.run, seed, first)

    def compose(self, codes, weights, rng, choose, positions=None):
        """One child (n, L) of each family of k codes (n, k, L), a value of a parent at every position. choose
        "random": each position on its own, by the weights; "prior": drawn from the masked prior times the
        weights, then redrawn in rounds."""
        log_weights = mixture_weights(codes, weights, self.codes["V"], positions)  # (n, L, V)
        if choose == "random":
            u = torch.rand(log_weights.shape[:2], generator=rng, dtype=torch.float64)
            return prior.draw_values(log_weights, 1.0, 1.0, u)[0]
        model = self.prior_model("masked")
        sampler = prior.sampler_settings(self.args, prior.SAMPLERS["masked"])
        hidden = torch.full_like(codes[:, 0], model.V)
        children, _ = prior.sample_masked(model, hidden, sampler, self.run, rng, log_weights)
        rounds, fraction = self.args.rounds, self.args.round_share
        return prior.redraw_codes(model, children, rounds, fraction, sampler, self.run, rng, log_weights)

    def infill(self, codes, keep, rng):
        """Codes (n, L) of which the positions `keep` (n, L) bool stay and the masked prior draws the
        others."""
        model = self.prior_model("masked")
        sampler = prior.sampler_settings(self.args, prior.SAMPLERS["masked"])
        return prior.sample_masked(model, torch.where(keep, codes, model.V), sampler, self.run, rng)[0]

    def codes_from_prompts(self, prompts, guidance, seed=0, given=None):
        """Codes (n, L) for prompts, n texts, and network calls (n,); given (n, L): positions that are not V
        stay. Fails with one line where a prompt is empty or longer than the text prior reads."""
        model, text, config = self.text_model
        encoded = text.encode(prompts)
        for prompt, ids in zip(prompts, encoded):
            shown = f"prompt {prompt[:30]!r}" + "..." * (len(prompt) > 30)
            if not prompt.strip():
                data.fail(f"{shown}: empty; write what the picture should show")
            most = config["text_length"]
            if len(ids) > most:
                data.fail(f"{shown}: {len(ids):,} tokens, the text prior reads at most {most}; shorten it")
        sampler = prior.sampler_settings(self.args, text_prior.TO_CODE)
        return text_prior.codes_from_text(model, text.rows(encoded), sampler, guidance, self.run, seed, given)

    def readable_captions(self, rows):
        """{row: caption} of those of the images `rows` whose caption the text prior can read."""
        _, text, config = self.text_model
        captions = [self.dataset.captions[row] for row in rows]
        fits = [0 < len(ids) <= config["text_length"] for ids in text.encode(captions)]
        return {row: caption for row, caption, good in zip(rows, captions, fits) if good}

    def captions_from_codes(self, codes, seed=0):
        """Captions, n texts, of codes (n, L)."""
        model, text, config = self.text_model
        sampler = prior.sampler_settings(self.args, text_prior.TO_TEXT)
        ids = text_prior.text_from_codes(model, codes, config["window"], sampler, self.run, seed)
        return [text.decode(row) for row in ids.tolist()]


# ----------------------------------------------------------------------------------------------------------
# judge
# ----------------------------------------------------------------------------------------------------------

class Judge(nn.Module):
    """A small CNN that reads the factors off an image (B, 3, S, S): features (B, 64), logits per factor, and
    whether it is clean."""

    def __init__(self, sizes, image_size):
        super().__init__()
        self.sizes = list(sizes)  # values of each factor
        layers, channels = [], 3
        for k, wider in enumerate((32, 64, 128)):
            stride = 2 if k or image_size >= 32 else 1
            conv = nn.Conv2d(channels, wider, 3, stride=stride, padding=1)
            layers += [conv, nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.factors = nn.Linear(64, sum(sizes))
        self.clean = nn.Linear(64, 1)

    def forward(self, images):
        h = self.body(images)  # (B, 64)
        factors = self.factors(h).split(self.sizes, 1)  # factors × (B, values)
        return h, factors, self.clean(h)[:, 0]


def blend(a, b, u):
    """Images (n, 3, S, S) between a and b, by u (n, 4) uniform: faded into one another, or half of each."""
    side = a.shape[-1]
    fade = (0.3 + 0.4 * u[:, 0])[:, None, None, None].expand_as(a[:, :1])
    grid = (torch.arange(side) + 0.5) / side - 0.5
    angle = u[:, 1, None, None] * 6.283
    edge = (u[:, 2, None, None] - 0.5) * 0.4
    height = torch.cos(angle) * grid[None, :, None] + torch.sin(angle) * grid[None, None, :]
    half = (height > edge).float()[:, None]
    w = torch.where((u[:, 3] < 0.5)[:, None, None, None], fade, half)
    return (a * w + b * (1 - w)).round().to(torch.uint8)


def judge_batch(dataset, args, step, size=128):
    """Real images (b, 3, S, S) uint8 with labels (b, factors), and for shapes as many blends, a function of
    (dataset, step). A blend mixes two drawings that agree in position and tilt and differ in some factors."""
    u = torch.from_numpy(np.random.default_rng((step, 1)).random((size, 40))).float()
    if args.dataset != "shapes":
        rows = data.batch_rows(dataset.splits["train"], size, 1, step)
        return dataset.pixels(rows, u[:, 0] < 0.5), dataset.labels[rows], None
    sizes = torch.tensor([len(values) for values in data.SHAPES.values()])
    labels = (u[:, :5] * sizes).long()  # all combinations, also those that training never shows
    others = (u[:, 5:10] * sizes).long()
    others = torch.where(others == labels, (labels + 1) % sizes, others)
    changed = (u[:, 18:23] < 0.4) | F.one_hot((u[:, 23] * 5).long(), 5).bool()
    nuisance = u[:, 10:18]
    a = data.draw_shapes(labels, nuisance, args.image_size)
    b = data.draw_shapes(torch.where(changed, others, labels), nuisance, args.image_size)
    return a, labels, blend(a.float(), b.float(), u[:, 24:28])


JUDGE_STEPS = 600


def train_judge(dataset, args, run, steps=JUDGE_STEPS):
    """Train the judge (seed 0 always: all runs are judged alike) and return it in evaluation mode."""
    torch.manual_seed(0)
    judge = Judge([len(values) for values in dataset.factors.values()], args.image_size).to(run.device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-3, fused=True)
    for step in range(steps):
        images, labels, blends = judge_batch(dataset, args, step)
        n = len(images)
        labels = labels.to(run.device)
        x = images if blends is None else torch.cat([images, blends])
        with run.autocast():
            _, factors, clean = judge(data.from_bytes(x.to(run.device)))
        loss = sum(F.cross_entropy(logits[:n].float(), labels[:, k]) for k, logits in enumerate(factors))
        if blends is not None:
            real = (torch.arange(len(x), device=run.device) < n).float()
            loss = loss + F.binary_cross_entropy_with_logits(clean.float(), real)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * data.cosine(step, steps, 1.0, 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return judge.eval()


def load_judge(dataset, args, run):
    """The judge of OUT/<dataset>/judge.pt, trained and kept there on first use."""
    path = run.folder / "judge.pt"
    made_from = {"images": dataset.id, "image size": args.image_size}
    if not data.is_made_from(path, "judge", made_from):
        data.save(path, "judge", judge=train_judge(dataset, args, run).state_dict(), made_from=made_from)
    judge = Judge([len(values) for values in dataset.factors.values()], args.image_size)
    with data.reading(path, "delete it, it is made again"):
        judge.load_state_dict(data.read(path, "judge")["judge"])
    return judge.to(run.device).eval()


@torch.no_grad()
def judge_images(judge, images, run, batch=500):
    """What the judge sees in images (n, 3, S, S) uint8: features (n, 64), factors (n, factors) long, clean
    (n,) bool."""
    features, factors, clean = [], [], []
    for part in images.split(batch):
        h, logits, cleanness = judge(data.from_bytes(part.to(run.device)))
        features.append(h.cpu())
        factors.append(torch.stack([values.argmax(1) for values in logits], 1).cpu())
        clean.append(cleanness.cpu() > 0)
    return torch.cat(features).double(), torch.cat(factors), torch.cat(clean)


def matrix_root(c):
    """The square root of a symmetric positive matrix (d, d)."""
    values, vectors = torch.linalg.eigh(c)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_moments(mean_a, cov_a, mean_b, cov_b):
    """FD² of equation (1) from means (d,) and covariances (d, d) in float64."""
    root = matrix_root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def frechet(a, b):
    """FD² of equation (1) between Gaussians fitted to features a (n, d), b (m, d) in float64."""
    return frechet_moments(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


# ----------------------------------------------------------------------------------------------------------
# scores
# ----------------------------------------------------------------------------------------------------------

def mean(values):
    """Mean of bools or numbers as a float."""
    return values.double().mean().item()


def nearest_distance(codes, train, batch=100):
    """Hamming distance (n,) of each code (n, L) to the nearest of the training codes (m, L)."""
    train = train.float()
    nearest = [torch.cdist(part.float(), train, p=0).amin(1) for part in codes.split(batch)]
    return torch.cat(nearest)  # the norm of p = 0 counts what differs


def factor_accuracy(seen, labels, names):
    """Share of rows where each factor is right: {factor: share}, and "all"."""
    right = seen == labels
    return {name: mean(right[:, k]) for k, name in enumerate(names)} | {"all": mean(right.all(1))}


def read_shapes_caption(text):
    """The factors (5,) that a caption of data.shapes_caption names, −1 for those it does not; None where it
    is none."""
    shape, colour, size, background, frame = ("|".join(values) for values in data.SHAPES.values())
    pattern = (f"an? (?:({size}) )?(?:({colour}) )?({shape})(?: on a ({background}) background)?"
               f"(?: in an? ({frame}) frame)?")
    match = re.fullmatch(pattern, text)
    if not match:
        return None
    size, colour, shape, background, frame = match.groups()
    said = zip(data.SHAPES.values(), (shape, colour, size, background, frame))
    return [values.index(word) if word else -1 for values, word in said]


class Scores:
    """The table of what is measured, on the test split; n pictures for each line, --seed for all noise."""

    def __init__(self, stages, args, run):
        self.stages, self.args, self.run, self.n = stages, args, run, args.count
        self.dataset, self.names = stages.dataset, list(stages.dataset.factors)
        self.shapes = args.dataset == "shapes"
        if stages.codes["made_from"]["images"] != self.dataset.id:
            again = data.script_command("tokenizer.py", args)
            data.fail(f"{run.folder / 'codes.pt'}: codes of other images than there are now; make it with {again}")
        self.judge = load_judge(self.dataset, args, run) if self.names else None
        self.rows = np.random.default_rng(0).permutation(self.dataset.splits["test"])[:self.n].tolist()
        self.texts = (run.folder / "text_prior.pt").exists()
        if self.texts and stages.text_model[2]["captions"] != data.checksum(self.dataset.captions):
            again = data.script_command("text_prior.py", args)
            data.fail(f"{run.folder / 'text_prior.pt'}: made from other captions than there are now; bring those "
                      f"back, or train it with {again} --restart")
        train = np.random.default_rng(1).permutation(self.dataset.splits["train"])[:10_000]
        self.reference = self.judged(self.dataset.pixels(train))[0]

    def judged(self, images):
        """Features, factors and cleanness; without labels to train a judge on, the tokenizer's features
        alone."""
        if self.judge:
            return judge_images(self.judge, images, self.run)
        backbone = self.stages.backbone
        features = [tokenizer.encode_images(backbone, part, self.run)[1].cpu() for part in images.split(500)]
        nothing = torch.zeros(len(images), 0).long()
        return torch.cat(features).double(), nothing, torch.ones(len(images)).bool()

    def measure(self, judged, labels=None):
        """What every set of pictures is measured by, from what `judged` says of it: Fréchet distance to
        training images, cleanness and, given labels, factors."""
        features, factors, clean = judged
        line = {"frechet": frechet(features, self.reference)}
        if self.shapes:
            line["clean"] = mean(clean)
        if labels is not None and self.names:
            line["factors"] = factor_accuracy(factors, labels, self.names)
        return line

    def run_all(self):
        """Measure everything that the trained stages allow; returns the nested dict that goes to
        scores.json."""
        dataset, stages, seed = self.dataset, self.stages, self.args.seed
        labels = dataset.labels[self.rows]
        result = {"real images": self.measure(self.judged(dataset.pixels(self.rows)), labels)}
        if self.shapes:
            blends = torch.cat([judge_batch(dataset, self.args, 10 ** 6 + k)[2] for k in range(8)])
            result["blends of two images"] = {"clean": mean(self.judged(blends)[2])}
        report = stages.codes["report"]
        result["tokenizer"] = {name: value for name, value in report.items() if not name.endswith("val")}
        usual = self.judged(stages.draw(stages.codes_of(self.rows), seed))
        line = result["reconstruct"] = self.measure(usual, labels)
        if (self.run.folder / "generator-uncond.pt").exists():
            model = stages.generator_model("generator-uncond")
            sampler = generator.sampler_settings(self.args)
            images = generator.generate(model, None, len(self.rows), sampler, self.run, seed)
            without = result["generator without codes"] = self.measure(self.judged(images))
            line["frechet / without codes"] = line["frechet"] / without["frechet"]
        result |= self.score_priors(line["frechet"])
        if len(self.rows) >= 2:
            result["compose, positions chosen by the prior"] = self.score_composition("prior")
            result["compose, positions at random"] = self.score_composition("random")
        if self.shapes:
            for split, pair in data.UNSEEN_PAIRS.items():
                result[split] = self.score_unseen(split, pair, usual[1])
        if self.texts:
            for guidance in self.args.text_guidance:
                result[f"text to image, guidance {guidance:g}"] = self.score_text(guidance)
            result["captions of images"] = self.score_captions()
        return result

    def score_priors(self, of_true_codes):
        """Bits per token, calls, memorising, and Fréchet distance of each prior's samples, relative to that
        of true codes."""
        train = self.dataset.splits["train"]
        train_codes = self.stages.codes["codes"][train.start:train.stop].flatten(0, 1)  # (2n, L), both flips

        def memorised(codes):
            distance = nearest_distance(codes, train_codes)
            return {"in training set": mean(distance == 0), "distance to nearest": mean(distance)}

        true_codes = self.stages.codes_of(self.rows)
        result = {"held-out codes": memorised(true_codes)}
        for kind in ("masked", "ar"):
            sampled, calls = self.stages.sample_codes(kind, len(self.rows), self.args.seed)
            line = self.measure(self.judged(self.stages.draw(sampled, self.args.seed + 1)))
            line["frechet / true codes"] = line["frechet"] / of_true_codes
            bits, error = prior.bits_per_token(self.stages.prior_model(kind), true_codes, self.run)
            line |= {"bits per token": bits, "standard error": error, "calls per sample": mean(calls)}
            result[f"prior-{kind}"] = line | memorised(sampled)
        masked, ar = (result[f"prior-{kind}"]["bits per token"] for kind in ("masked", "ar"))
        return result | {"masked bound / ar bits": masked / ar}

    def score_composition(self, choose):
        """Children of pairs of test images, each code position from one of the parents: does every factor
        come from a parent?"""
        half = self.n // 2
        a, b = self.rows[:half], np.roll(self.rows, 1)[:half]
        rng = data.step_generator(self.args.seed, 2)
        parents = torch.stack([self.stages.codes_of(a), self.stages.codes_of(b)], 1)  # (n, 2, L)
        children = self.stages.compose(parents, [0.5, 0.5], rng, choose)
        judged = self.judged(self.stages.draw(children, self.args.seed + 2))
        line = self.measure(judged)
        if not self.names:
            return line
        _, seen, clean = judged
        labels_a, labels_b = self.dataset.labels[a], self.dataset.labels[b]
        others = self.dataset.labels[np.roll(self.rows, 7)[:half]]

        def of_a_parent(factors):
            return (factors == labels_a) | (factors == labels_b)  # (n, factors)

        good = of_a_parent(seen).all(1) & clean
        new = good & (seen != labels_a).any(1) & (seen != labels_b).any(1)  # neither parent again
        return line | {
            "every factor from a parent, clean": mean(good),
            "every factor from a parent": mean(of_a_parent(seen).all(1)),
            "of these, unlike both parents": new.sum().item() / max(1, good.sum().item()),
            "chance (another test image)": mean(of_a_parent(others).all(1)),
            "factors": dict(zip(self.names, of_a_parent(seen).double().mean(0).tolist()))}

    def score_unseen(self, split, pair, usual_factors):
        """Images of pairs never seen in training → code → image: is the pair kept? With chance, the
        true-factor reference, and how often images of usual codes, of `usual_factors` (n, factors), hit an
        unseen pair by mistake."""
        rows = list(self.dataset.splits[split])[:self.n // 2]
        labels, columns = self.dataset.labels[rows], [self.names.index(name) for name in pair]

        def kept(factors):
            return mean((factors[:, columns] == labels[:, columns]).all(1))

        images = self.stages.draw(self.stages.codes_of(rows), self.args.seed + 3)
        _, seen, clean = self.judged(images)
        guessed = pair[0] if pair[1] == "colour" else pair[1]
        line = {"pair kept": kept(seen), "clean": mean(clean),
                "factors": factor_accuracy(seen, labels, self.names),
                "chance (colour right, the other factor guessed)": 1 / len(data.SHAPES[guessed]),
                "unseen pairs among seen codes' images": mean(data.is_unseen(usual_factors, pair))}
        if (self.run.folder / "generator-factors.pt").exists():
            images = self.stages.draw(labels, self.args.seed + 3, stage="generator-factors")
            line["pair kept from true factors"] = kept(self.judged(images)[1])
        return line

    def score_prompts(self, prompts, labels, asked, guidance, pair=None):
        """Prompt → code → image: which of the factors `asked` (columns of labels) does the judge see, and
        those of `pair` both?"""
        codes, _ = self.stages.codes_from_prompts(prompts, guidance, self.args.seed + 4)
        _, seen, clean = self.judged(self.stages.draw(codes, self.args.seed + 5))
        line = factor_accuracy(seen[:, asked], labels[:, asked], [self.names[k] for k in asked])
        if self.shapes:
            line["clean"] = mean(clean)
        if pair:
            columns = [self.names.index(name) for name in pair]
            line["pair"] = mean((seen == labels)[:, columns].all(1))
        return line

    def score_text(self, guidance):
        """Captions of the test split and, for shapes, colour and shape alone and pairs never seen in
        training; and how many different codes 16 draws of one prompt give."""
        line, n, everything = {}, self.n // 4, list(range(len(self.names)))
        if self.shapes:
            labels = self.dataset.labels[self.rows[:n]]
            prompts = [data.shapes_caption(row) for row in labels.tolist()]
            short = [data.shapes_caption(row, (True, False, False, False)) for row in labels.tolist()]
            found = self.score_prompts(prompts, labels, everything, guidance, ("shape", "colour"))
            line["captions of the test split"] = found
            line["shape and colour alone"] = self.score_prompts(short, labels, [0, 1], guidance)
            for split, pair in data.UNSEEN_PAIRS.items():
                labels = self.dataset.labels[self.dataset.splits[split]][:n]
                unseen = [data.shapes_caption(row) for row in labels.tolist()]
                line[split] = self.score_prompts(unseen, labels, everything, guidance, pair)
        else:
            captions = self.stages.readable_captions(self.rows[:n])
            prompts = list(captions.values())
            if prompts and self.names:
                labels = self.dataset.labels[list(captions)]
                found = self.score_prompts(prompts, labels, everything, guidance)
                line["captions of the test split"] = found
        if prompts:
            repeated = [prompt for prompt in prompts[:32] for _ in range(16)]
            codes, calls = self.stages.codes_from_prompts(repeated, guidance, self.args.seed + 6)
            draws = codes.view(-1, 16, codes.shape[1])
            distinct = [len(torch.unique(part, dim=0)) for part in draws]
            line["distinct codes in 16 draws of a prompt"] = sum(distinct) / len(distinct)
            line["calls per sample"] = mean(calls)
        return line

    def score_captions(self):
        """Image → code → caption, for test images and pairs never seen: for shapes, which factors are named
        right; else equal captions."""
        line, n = {}, self.n // 2
        splits = {"test split": self.rows[:n]}
        if self.shapes:
            splits |= {split: self.dataset.splits[split][:n] for split in data.UNSEEN_PAIRS}
        for name, rows in splits.items():
            rows = [row for row in rows if self.dataset.captions[row]]
            if not rows:
                continue
            captions = self.stages.captions_from_codes(self.stages.codes_of(rows), self.args.seed + 7)
            if not self.shapes:
                same = [caption == self.dataset.captions[row] for caption, row in zip(captions, rows)]
                line[name] = {"equal to its own": sum(same) / len(same)}
                continue
            nothing = [-1] * len(self.names)
            named = torch.tensor([read_shapes_caption(caption) or nothing for caption in captions])
            labels = self.dataset.labels[rows]
            line[name] = factor_accuracy(named, labels, self.names)
            if name in data.UNSEEN_PAIRS:
                columns = [self.names.index(factor) for factor in data.UNSEEN_PAIRS[name]]
                line[name]["pair"] = mean((named == labels)[:, columns].all(1))
        return line


# ----------------------------------------------------------------------------------------------------------
# scores of the literature: Inception
# ----------------------------------------------------------------------------------------------------------

class Inception:
    """The public TorchScript Inception (inception-2015-12-05.pt), which takes bytes of any size: images (n,
    3, S, S) uint8 → features (n, 2048) and, without the output's bias as in the original score, probabilities
    of its classes (n, 1008)."""

    def __init__(self, path, device):
        self.device = device
        with data.reading(f"--inception {path}", "expected the TorchScript file inception-2015-12-05.pt"):
            self.net = torch.jit.load(path, map_location=device).eval()
            with open(path, "rb") as file:
                self.id = hashlib.file_digest(file, "sha256").hexdigest()
            found = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        self.shapes = {name: ((values.shape[1],), torch.float32) for name, values in found.items()}

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        features = self.net(images, return_features=True)
        classes = self.net(images, no_output_bias=True)
        return {"features": features.float().cpu(), "classes": classes.float().cpu()}


def inception_score(classes, parts=10):
    """Mean and deviation over `parts` parts of exp E KL(p(y | x) ‖ p(y)) (Salimans et al. 2016); classes (n,
    K) probabilities."""
    scores = []
    for p in classes.double().chunk(parts):
        log_ratio = p.clamp(min=1e-30).log() - p.mean(0).clamp(min=1e-30).log()
        scores.append((p * log_ratio).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, made, device, k=3, batch=1000):
    """Shares of made features (m, d) that lie near a real one (n, d) and of real that lie near a made one:
    nearer than its k-th nearest neighbour of its own kind (Kynkäänniemi et al. 2019)."""
    def distances(x, others):
        for part in x.split(batch):
            yield torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist")

    def radii(x):
        return torch.cat([d.kthvalue(k + 1, 1).values for d in distances(x, x)])  # itself is the nearest

    def inside(x, others):
        radius = radii(others)
        return mean(torch.cat([(d <= radius).any(1).cpu() for d in distances(x, others)]))

    real, made = real.to(device), made.to(device)
    return inside(made, real), inside(real, made)


def reference_features(net, stages, args, run):
    """The Inception features (n, d) of all training images, memory-mapped; made once in OUT/<dataset>."""
    dataset = stages.dataset
    train = dataset.splits["train"]

    def work(rows):
        batches = dataset.batches(train[rows.start:rows.stop], 100, args.workers)
        return {"features": torch.cat([net(images)["features"] for images in batches])}

    key = data.checksum([net.id, dataset.id, args.image_size])[:16]
    shapes = {"features": net.shapes["features"]}
    return data.fill_rows(run.folder / f"reference-{key}", len(train), run, work, shapes)["features"]


def moments(features, batch=10_000):
    """Mean (d,) and covariance (d, d) in float64 of features (n, d) that may not fit in memory."""
    n, total, square = len(features), 0.0, 0.0
    for part in features.split(batch):
        part = part.double()
        total, square = total + part.sum(0), square + part.T @ part
    mean = total / n
    return mean, (square - n * torch.outer(mean, mean)) / (n - 1)


def inception_scores(stages, args, run):
    """FID, Inception Score, precision and recall of --count samples with codes of the prior --kind, and with
    true codes of training images. Processes share the samples, each a function of (seed, index); a stopped
    run goes on. Returns the dict on the first process."""
    net = Inception(args.inception, run.device)
    stages.generator_model()  # what is missing is said now, not after hours
    stages.prior_model(args.kind)
    names = ["generator", f"prior-{args.kind}"] + ["generator-early"] * (args.guide == "early")
    states = [data.load(run.folder / f"{name}.pt", name, "train it", only="ema") for name in names]
    made_from = [net.id, *([state["id"], state["step"]] for state in states)]
    left_out = ("workers", "device", "out", "data_dir")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    train, result = list(stages.dataset.splits["train"]), {}
    reference = reference_features(net, stages, args, run)
    shuffled = np.random.default_rng(args.seed).permutation(max(len(train), args.count)) % len(train)

    def from_prior(rows):
        codes, _ = stages.sample_codes(args.kind, len(rows), args.seed, rows.start)
        return net(stages.draw(codes, args.seed + 1, rows.start))

    def from_true_codes(rows):
        codes = stages.codes_of([train[k] for k in shuffled[rows.start:rows.stop]])
        return net(stages.draw(codes, args.seed + 1, rows.start))

    for name, work in ((f"codes of prior-{args.kind}", from_prior), ("true codes", from_true_codes)):
        folder = run.folder / f".samples-{data.checksum([name, settings, made_from])[:16]}"
        made = data.fill_rows(folder, args.count, run, work, net.shapes, chunk=prior.BATCH)
        if run.main:
            score, deviation = inception_score(made["classes"])
            some = np.random.default_rng(0).permutation(len(train))[:10_000]
            precision, recall = precision_recall(reference[some], made["features"], run.device)
            fid = frechet_moments(*moments(made["features"]), *moments(reference))
            result[name] = {"FID": fid, "IS": score, "IS deviation": deviation, "precision": precision,
                            "recall": recall, "samples": args.count}
            shutil.rmtree(folder)
        run.wait()
    return result


def print_scores(result, indent=""):
    """The nested dict as an indented table."""
    for name, value in result.items():
        if not isinstance(value, dict):
            shown = f"{value:.3f}" if isinstance(value, float) else value
            print(f"{indent}{name:44} {shown}")
        elif all(isinstance(number, (int, float)) for number in value.values()):
            print(f"{indent}{name:44} " + ", ".join(f"{key} {number:.3f}" for key, number in value.items()))
        else:
            print(f"{indent}{name}")
            print_scores(value, indent + "  ")


# ----------------------------------------------------------------------------------------------------------
# commands
# ----------------------------------------------------------------------------------------------------------

def train_stages(args, dataset):
    """Train what has not finished, in order, each stage as its own command would, with the flags they all
    have."""
    names = ("dataset", "data_dir", "out", "image_size", "seed", "device", "dtype", "workers")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    stages = [(tokenizer, [], [dataset]), (generator, [], [dataset]), (prior, ["--kind", "masked"], []),
              (prior, ["--kind", "ar"], []), (text_prior, [], [dataset])]
    for module, words, given in stages:
        title = " ".join(["---", f"{module.__name__}.py", *words])
        if module is text_prior and not any(dataset.captions):
            print(f"{title}: left out, the images have no captions", flush=True)
            continue
        print(title, flush=True)
        start = time.time()
        module.main([*words, *flags], *given)
        print(f"--- {time.time() - start:.0f} s", flush=True)


def input_images(paths, stages, args, least):
    """The files named (n, 3, S, S) uint8 and their titles, or `least` test images where none are named."""
    if not paths:
        rows = list(stages.dataset.splits["test"])[:least if least > 1 else 8]
        return stages.dataset.pixels(rows), [f"test {k}" for k in range(len(rows))]
    if len(paths) < least:
        data.fail(f"{args.command}: needs at least {least} images, got {len(paths)}")
    images = []
    for path in paths:
        with data.reading(path, f"expected an image, one of {', '.join(data.FORMATS)}"):
            images.append(data.read_image(path, args.image_size))
    return torch.stack(images), [Path(path).stem[:10] for path in paths]


def read_prompts(args, stages):
    """The prompts of the command line and of --prompts, else four captions of the test split."""
    prompts = [prompt.strip() for prompt in args.inputs]
    if args.prompts:
        with data.reading(f"--prompts {args.prompts}", "expected a file with a prompt in each line"):
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
        prompts += [line.strip() for line in lines if line.strip()]
    elif not prompts:
        prompts = list(stages.readable_captions(stages.dataset.splits["test"]).values())[:4]
    if not prompts:
        data.fail("text: no prompts; give some, or --prompts FILE with one in each line")
    return prompts


def check_mixture(args, k, L):
    """--weights: one number for each of k codes; --positions: from 0 to L − 1."""
    if args.weights and (len(args.weights) != k or sum(args.weights) <= 0):
        data.fail(f"{args.command}: --weights has {len(args.weights)} numbers for {k} codes; give one each, not "
                  "all zero")
    if args.positions and max(args.positions) >= L:
        data.fail(f"{args.command}: --positions has values outside 0 to {L - 1}")


def random_positions(shape, fraction, rng):
    """A fraction of the positions of each row, exactly: (n, L) bool."""
    return torch.rand(shape, generator=rng).argsort(1).argsort(1) < round(fraction * shape[1])


def text_pictures(stages, args):
    """For each prompt a row of pictures; with --image that picture first, and its code kept in part or mixed
    with the prompt's. Returns images (n, 3, S, S), columns, and the prompts."""
    L, V = stages.codes["L"], stages.codes["V"]
    check_mixture(args, 2, L)
    prompts = read_prompts(args, stages)
    repeated = [prompt for prompt in prompts for _ in range(args.columns)]
    rng, given = data.step_generator(args.seed, 1), None
    if args.image is not None:
        image, _ = input_images([args.image], stages, args, least=1)
        code = stages.encode(image).expand(len(repeated), L)
        if not args.weights:  # keep the --positions, or a part of them, new ones for each picture
            keep = random_positions(code.shape, args.keep, rng)
            if args.positions:
                keep = torch.zeros_like(keep).index_fill(1, torch.tensor(args.positions), True)
            given = torch.where(keep, code, V)
    codes, _ = stages.codes_from_prompts(repeated, args.text_guidance[0], args.seed, given)
    unknown = dict.fromkeys(word for prompt in prompts for word in stages.text_model[1].unknown(prompt))
    if unknown:
        words = ", ".join(unknown)
        print(f"note: no training caption has {words}; expect the model to guess there", file=sys.stderr)
    if args.image is not None and args.weights:
        codes = stages.compose(torch.stack([codes, code], 1), args.weights, rng, args.choose)
    images = stages.draw(codes, args.seed)
    if args.image is None:
        return images, args.columns, prompts
    rows = [torch.cat([image, row]) for row in images.split(args.columns)]
    return torch.cat(rows), args.columns + 1, prompts


def compose_pictures(stages, args, inputs, codes):
    """The parents, then children. Returns images (n, 3, S, S) and columns."""
    k = len(inputs)
    check_mixture(args, k, codes.shape[1])
    weights = args.weights or [1 / k] * k
    if args.positions and sum(weights[1:]) <= 0:
        data.fail("compose: --positions takes the other positions from later images, whose weights are all zero")
    columns = max(k, args.columns)
    families = codes.expand(columns * args.rows, -1, -1)  # (n, k, L)
    rng = data.step_generator(args.seed, 0)
    children = stages.compose(families, weights, rng, args.choose, args.positions)
    blank = torch.full((columns - k, *inputs.shape[1:]), 255, dtype=torch.uint8)
    return torch.cat([inputs, blank, stages.draw(children, args.seed)]), columns


def make_pictures(command, stages, args, run):
    """Write one grid for a command."""
    titles, lines, name, seed = (), (), command, args.seed
    if command == "unconditional":
        name, columns = f"{command}-{args.kind}", args.columns
        codes, _ = stages.sample_codes(args.kind, args.columns * args.rows, seed)
        images = stages.draw(codes, seed)
    elif command == "text":
        images, columns, lines = text_pictures(stages, args)
    else:
        inputs, titles = input_images(args.inputs, stages, args, least=2 if command == "compose" else 1)
        codes, columns = stages.encode(inputs), len(inputs)
        if command == "reconstruct":  # a row of inputs, then rows drawn from their codes with different noise
            rows = [stages.draw(codes, data.mix_seed(seed, row)) for row in range(args.rows)]
            images = torch.cat([inputs, *rows])
        elif command == "infill":
            rng = data.step_generator(seed, 0)
            keep = torch.rand(args.rows, *codes.shape, generator=rng) < args.keep
            filled = stages.infill(codes.repeat(args.rows, 1), keep.flatten(0, 1), rng)
            images = torch.cat([inputs, stages.draw(filled, seed)])
        elif command == "caption":  # in each row an image and the one drawn from its code
            lines = stages.captions_from_codes(codes, seed)
            for path, caption in zip(args.inputs or titles, lines):
                print(f"{path}: {' '.join(caption.split())}")
            images = torch.stack([inputs, stages.draw(codes, seed)], 1).flatten(0, 1)
            columns, titles = 2, ()
        else:
            images, columns = compose_pictures(stages, args, inputs, codes)
    path = run.folder / "samples" / f"{name}.png"
    data.save_grid(path, images, columns, titles, lines, settings={**vars(args), "command": command})
    print(f"{command}: {path}")


def parse(argv):
    """The flags of this script, checked."""
    parser = data.make_parser(__doc__)
    add = parser.add_argument_group("what to do").add_argument
    add("command", nargs="?", choices=COMMANDS, help="pictures to make")
    add("inputs", nargs="*", help="image files, or the prompts of text; none: those of the test split")
    add("--prompts", metavar="FILE", help="text: a file with a prompt in each line")
    add("--image", metavar="FILE",
        help="text: a picture of whose code a part is kept (--keep, --positions) or mixed in (--weights)")
    add("--train", action="store_true", help="train what is missing, then make all pictures and scores")
    add("--score", action="store_true", help="measure everything and write scores.json")
    add("--inception", metavar="FILE",
        help="--score: FID, Inception Score, precision and recall by this TorchScript network instead")
    add("--count", type=data.number(4, 10 ** 9, int),
        help="pictures measured for each score (default: 2,000, half as many for compositions and unseen pairs; "
        "with --inception 50,000)")
    add("--kind", choices=("masked", "ar"), default="masked", help="the prior of unconditional samples")
    add("--weights", type=data.non_negative, nargs="+",
        help="compose: share of positions from each image (default: equal); text: from prompt and --image")
    add("--positions", type=data.count, nargs="+",
        help="compose: take these positions from the first image; text: keep these of --image")
    add("--choose", choices=("prior", "random"), default="prior",
        help="compose: who chooses the image of each position, the masked prior or chance")
    add("--rounds", type=data.count, default=32,
        help="compose: rounds in which the masked prior chooses again for some positions")
    add("--round-share", type=data.fraction, default=0.25, help="compose: share of the positions in a round")
    add("--keep", type=data.fraction, default=0.5,
        help="share of the positions that is kept (text with --image: exactly, infill: on average)")
    add("--columns", type=data.positive, default=8, help="pictures in a row (if the inputs do not decide it)")
    add("--rows", type=data.positive, default=4, help="rows of generated pictures")
    add("--guide", choices=("null", "early"), default="null",
        help="guide images by the model without code, or by its earlier checkpoint")
    generator.add_sampler_flags(parser)
    prior.add_sampler_flags(parser)
    add = parser.add_argument_group("text sampler").add_argument
    add("--text-guidance", type=data.number(0, 1e6), nargs="+", default=[2.0],
        help="w of equation (3) of text_prior.py; 1: none; of several --score measures each, pictures take the "
        "first")
    args = data.parse(parser, PRESETS, argv)
    args.count = args.count or (50_000 if args.inception else 2000)
    if args.inception and not args.score:
        parser.error("argument --inception: only --score reads it")
    if not (args.command or args.train or args.score):
        parser.error(f"say what to do: {', '.join(COMMANDS)}, --train or --score")
    if args.train and (args.command or args.inputs):
        parser.error("argument --train: makes pictures of the test split; for others give a command afterwards")
    if args.command != "text" and (args.prompts or args.image is not None):
        parser.error("arguments --prompts and --image: only text reads them")
    both = bool(args.weights and args.positions)
    if args.command == "text" and (args.weights or args.positions) and (args.image is None or both):
        parser.error("arguments --weights and --positions: text takes one of them, and only with --image")
    return args


def main(argv=None):
    """Train what is missing, make pictures, print scores."""
    args, start = parse(argv), time.time()
    dataset = data.load_dataset(args) if args.train else None
    if args.train:
        train_stages(args, dataset)
    run = data.Run(args, lock="sample" if args.inception else None)
    if run.world > 1 and not args.inception:
        data.fail("sample.py: several processes share --score --inception alone; start it without torchrun")
    stages = Stages(args, run)
    if dataset:
        stages.dataset = dataset
    commands = [args.command] if args.command else []
    if args.train:
        captioned = any(dataset.captions) and stages.readable_captions(dataset.splits["test"])
        commands = [command for command in COMMANDS if captioned or command not in ("text", "caption")]
    for command in commands:
        make_pictures(command, stages, args, run)
    if args.train or args.score:
        if args.inception:
            scores = inception_scores(stages, args, run)
        else:
            scores = Scores(stages, args, run).run_all()
        if run.main:
            print_scores(scores)
            print(f"{time.time() - start:.0f} seconds")
            scores |= {"seconds": round(time.time() - start), "settings": vars(args)}
            data.write_json(run.folder / ("inception.json" if args.inception else "scores.json"), scores)
    run.close()


if __name__ == "__main__":
    data.run_script(main)
