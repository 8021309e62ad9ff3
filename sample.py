"""From trained stages to pictures and scores: unconditional samples, reconstructions, compositions, infilling, text and captions.

    python sample.py --train                           # trains what is missing, in order, then pictures and scores
    python sample.py --score                           # the scores alone, also in OUT/<dataset>/scores.json
    torchrun --nproc-per-node 8 sample.py --score --inception inception-2015-12-05.pt --dataset imagenet     # FID and its friends
    python sample.py unconditional --kind ar           # prior → code → image
    python sample.py reconstruct a.png b.png           # image → code → images, a new noise each
    python sample.py compose a.png b.png --weights 0.5 0.5        # each position of the code from one of the images
    python sample.py compose a.png b.png --positions 0 1 2 3      # these positions from the first image, the rest from the second
      Positions drawn apart contradict each other; the masked prior chooses them so that they fit (--choose random: drawn apart).
    python sample.py infill a.png --keep 0.5           # keep half of the code, draw the rest from the masked prior
    python sample.py text "a small red ring on a dotted background in a blue frame" "a large blue bar"       # a row of pictures each
    python sample.py text "a green ring" --image a.png --keep 0.5              # half of the picture's code, the rest as the words say
    python sample.py text "a green ring" --image a.png --weights 0.5 0.5       # each position from the prompt's code or the picture's
    python sample.py caption a.png b.png               # what the codes of the images say, in words
Images are files of any size; where none are named, pictures of the test split are taken. Grids go to OUT/<dataset>/samples/,
with all settings stored inside the PNG (text field "settings").

Scores use a judge, a small CNN trained on all combinations of the factors (and, for shapes, to tell a clean drawing from a
blend of two); the Fréchet distance is taken in its features:
    FD² = |m₁ − m₂|² + Tr(C₁ + C₂ − 2 (C₁ C₂)^½)                                                                        (1)
With --inception they are those of the literature instead, FID, Inception Score, precision and recall, in OUT/<dataset>/inception.json.
"""
import shutil
import signal
import subprocess
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

PRESETS = {name: {**data.PRESETS.get(name, {}), "sample_steps": preset["sample_steps"]} for name, preset in generator.PRESETS.items()}
COMMANDS = ("unconditional", "reconstruct", "compose", "infill", "text", "caption")

# ---------------------------------------------------------------------------------------------------------------------
# codes in, pictures out
# ---------------------------------------------------------------------------------------------------------------------


def mixture_weights(codes, weights, values, positions=None):
    """Log-weights (..., L, V) of the values in a mixture of k codes (..., k, L): at each position the weights of the images that have
    the value there, −inf where none has. `positions`: there the first image alone, at all others the rest by their weights."""
    k, L = codes.shape[-2:]
    share = torch.as_tensor(weights, dtype=torch.float64)[:, None].expand(k, L).clone()
    if positions is not None:
        first = torch.zeros(L, dtype=torch.bool).index_fill(0, torch.as_tensor(positions), True)
        share[0], share[1:] = first.float(), share[1:] * ~first
    share = share / share.sum(0)
    return (F.one_hot(codes, values) * share[..., None]).sum(-3).log().float()


class Stages:
    """The trained stages of one OUT/<dataset>, each loaded when first used; a missing one stops with the command that trains it."""

    def __init__(self, args, run):
        self.args, self.run, self._loaded = args, run, {}

    def _get(self, name, load):
        if name not in self._loaded:
            self._loaded[name] = load()
        return self._loaded[name]

    @property
    def tokenizer(self):
        """(backbone, config) of tokenizer.pt."""
        return self._get("tokenizer", lambda: tokenizer.load_tokenizer(self.args, self.run.device))

    @property
    def codes(self):
        """(codes (N, 2, L), about) of codes.npy."""
        return self._get("codes", lambda: data.open_codes(self.args))

    def generator(self, stage="generator"):
        """The model of generator.pt, or of another stage of the same architecture."""
        model = self._get(stage, lambda: generator.load_generator(self.args, self.run.device, stage))
        size = model.x_shape[1] * (model.vae.about["down"] if model.vae else 1)
        if size != self.args.image_size:
            data.fail(f"{stage}.pt draws images of {size} pixels, --image-size is {self.args.image_size}: add --image-size {size}")
        return model

    def prior(self, kind):
        """The model of prior-masked.pt or prior-ar.pt."""
        return self._get(f"prior-{kind}", lambda: prior.load_prior(self.args, kind, self.run.device))

    @property
    def text_prior(self):
        """(model, Text, config) of text_prior.pt."""
        return self._get("text_prior", lambda: text_prior.load_text_prior(self.args, self.run.device))

    @property
    def dataset(self):
        """The dataset of the flags."""
        return self._get("dataset", lambda: data.load_dataset(self.args))

    def encode(self, images):
        """Codes (B, L) of images (B, 3, S, S) uint8."""
        backbone, config = self.tokenizer
        return tokenizer.encode_images(backbone, images, config, self.run)[0].cpu()

    def draw(self, codes, seed=0, first=0):
        """Images (n, 3, S, S) uint8 from codes (n, L), with the sampler of the flags; `first`: which of many the first is."""
        weak = self.generator("generator-early") if self.args.guide == "early" else None
        return generator.generate(self.generator(), codes, len(codes), generator.sampler_settings(self.args), self.run, seed, weak, first)

    def compose(self, codes, weights, rng, choose, positions=None):
        """One child (n, L) of each family of k codes (n, k, L), a value of a parent at every position. choose "random": each position
        on its own, by the weights; "prior": drawn from the masked prior times the weights, then redrawn in rounds."""
        log_weights = mixture_weights(codes, weights, self.codes[1]["V"], positions)  # (n, L, V)
        if choose == "random":
            return prior.draw_values(log_weights, 1.0, 1.0, torch.rand(log_weights.shape[:2], generator=rng, dtype=torch.float64))[0]
        model, sampler = self.prior("masked"), prior.sampler_settings(self.args, prior.SAMPLERS["masked"])
        hidden = torch.full_like(codes[:, 0], model.V)
        children, _ = prior.sample_masked(model, hidden, sampler, self.run, rng, log_weights)
        return prior.redraw_codes(model, children, self.args.rounds, self.args.round_share, sampler, self.run, rng, log_weights)

    def sample_codes(self, kind, count, seed=0, first=0):
        """Codes (count, L) and network calls (count,) of a prior, with the sampler of the flags; `first`: which of many the first is."""
        return prior.sample_codes(self.prior(kind), count, prior.sampler_settings(self.args, prior.SAMPLERS[kind]), self.run, seed, first)

    def read(self, prompts, guidance, seed=0, given=None):
        """Codes (n, L) for prompts, n texts, and network calls (n,); given (n, L): positions that are not V stay. Fails with one
        line where a prompt is empty or longer than the text prior reads."""
        model, text, config = self.text_prior
        encoded = text.encode(prompts)
        for prompt, ids in zip(prompts, encoded):
            start = f"prompt {prompt[:30]!r}" + "..." * (len(prompt) > 30)
            if not prompt.strip():
                data.fail(f"{start}: empty; write what the picture should show (without words: python sample.py unconditional)")
            if len(ids) > config["text_length"]:
                data.fail(f"{start}: {len(ids):,} tokens, the text prior reads at most {config['text_length']}; shorten it")
        sampler = prior.sampler_settings(self.args, text_prior.TO_CODE)
        return text_prior.codes_from_text(model, text.rows(encoded), sampler, guidance, self.run, seed, given)

    def prompts(self, rows):
        """Those of the images `rows` that have a caption which the text prior can read, and these captions."""
        _, text, config = self.text_prior
        captions = [self.dataset.captions[row] for row in rows]
        short = [0 < len(ids) <= config["text_length"] for ids in text.encode(captions)]
        return [row for row, good in zip(rows, short) if good], [caption for caption, good in zip(captions, short) if good]

    def captions(self, codes, seed=0):
        """Captions, n texts, of codes (n, L)."""
        model, text, config = self.text_prior
        ids = text_prior.text_from_codes(model, codes, config["window"], prior.sampler_settings(self.args, text_prior.TO_TEXT), self.run, seed)
        return [text.decode(row) for row in ids.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# judge
# ---------------------------------------------------------------------------------------------------------------------

class Judge(nn.Module):
    """A small CNN that reads the factors off an image (B, 3, S, S): features (B, 64), logits per factor, and whether it is clean."""

    def __init__(self, sizes, size):
        super().__init__()
        self.sizes, layers, channels = list(sizes), [], 3
        for k, out in enumerate((32, 64, 128)):
            layers += [nn.Conv2d(channels, out, 3, stride=2 if k or size >= 32 else 1, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU())
        self.factors, self.clean = nn.Linear(64, sum(sizes)), nn.Linear(64, 1)

    def forward(self, images):
        h = self.body(images)  # (B, 64)
        return h, self.factors(h).split(self.sizes, 1), self.clean(h)[:, 0]  # (B, 64), F × (B, values), (B,)


def judge_batch(dataset, args, step, size=128):
    """Real images (b, 3, S, S) uint8 with labels (b, F), and for shapes as many blends, a function of (dataset, step).

    A blend mixes two drawings that share position and tilt and differ in some factors: faded into one another, or half of each.
    """
    u = torch.from_numpy(np.random.default_rng((step, 1)).random((size, 40))).float()
    if args.dataset != "shapes":
        rows = data.batch_rows(dataset.splits["train"], size, 1, step)
        return dataset.pixels(rows, u[:, 0] < 0.5), dataset.labels[rows], None
    sizes = torch.tensor([len(v) for v in data.SHAPES.values()])
    labels, others, nuisance = (u[:, :5] * sizes).long(), (u[:, 5:10] * sizes).long(), u[:, 10:18]  # all combinations, also the unseen
    changed = (u[:, 18:23] < 0.4) | F.one_hot((u[:, 23] * 5).long(), 5).bool()
    different = torch.where(others == labels, (labels + 1) % sizes, others)
    a, b = (data.draw_shapes(l, nuisance, args.image_size).float() for l in (labels, torch.where(changed, different, labels)))
    w = (0.3 + 0.4 * u[:, 24])[:, None, None, None].expand_as(a[:, :1])
    grid = (torch.arange(args.image_size) + 0.5) / args.image_size - 0.5
    angle, at = u[:, 25, None, None] * 6.283, (u[:, 26, None, None] - 0.5) * 0.4
    half = (torch.cos(angle) * grid[None, :, None] + torch.sin(angle) * grid[None, None, :] > at).float()[:, None]
    w = torch.where((u[:, 27] < 0.5)[:, None, None, None], w, half)
    blends = a * w + b * (1 - w)
    return a.to(torch.uint8), labels, blends.round().to(torch.uint8)


JUDGE_STEPS = 600


def train_judge(dataset, args, run, steps=JUDGE_STEPS):
    """Train the judge (seed 0 always: all runs are judged alike) and return it in evaluation mode."""
    torch.manual_seed(0)
    judge = Judge([len(v) for v in dataset.factors.values()], args.image_size).to(run.device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-3, fused=True)
    for step in range(steps):
        images, labels, blends = judge_batch(dataset, args, step)
        x = data.unit((images if blends is None else torch.cat([images, blends])).to(run.device))
        with run.autocast():
            _, factors, clean = judge(x)
        labels, n = labels.to(run.device), len(images)
        loss = sum(F.cross_entropy(f[:n].float(), labels[:, k]) for k, f in enumerate(factors))
        if blends is not None:
            loss = loss + F.binary_cross_entropy_with_logits(clean.float(), (torch.arange(len(x), device=run.device) < n).float())
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * data.cosine(step, steps, 1.0, 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return judge.eval()


def load_judge(dataset, args, run):
    """The judge of OUT/<dataset>/judge.pt, trained and kept there on first use."""
    path, trained_on = run.folder / "judge.pt", {"images": dataset.checksum, "image size": args.image_size}
    if path.exists():
        build = lambda state: Judge([len(v) for v in dataset.factors.values()], args.image_size)
        if data.load_checkpoint(path, "judge", args)["trained_on"] == trained_on:
            return data.load_stage("judge", args, build)[0].to(run.device).eval()
    judge = train_judge(dataset, args, run)
    data.save_checkpoint(path, stage="judge", config=vars(args), step=JUDGE_STEPS, trained_on=trained_on, ema=judge.state_dict())
    return judge


@torch.no_grad()
def look(judge, images, run, batch=500):
    """What the judge sees in images (n, 3, S, S) uint8: features (n, 64), factors (n, F) long, clean (n,) bool."""
    parts = [judge(data.unit(part.to(run.device))) for part in images.split(batch)]
    factors = torch.cat([torch.stack([f.argmax(1) for f in fs], 1) for _, fs, _ in parts]).cpu()
    return torch.cat([h for h, _, _ in parts]).double().cpu(), factors, (torch.cat([c for _, _, c in parts]) > 0).cpu()


def frechet_moments(mean_a, cov_a, mean_b, cov_b):
    """FD² of equation (1) from means (d,) and covariances (d, d) in float64."""
    root = lambda c: (lambda w, v: (v * w.clamp(min=0).sqrt()) @ v.T)(*torch.linalg.eigh(c))
    ra = root(cov_a)
    cross = torch.linalg.eigvalsh(ra @ cov_b @ ra).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def frechet(a, b):
    """FD² of equation (1) between Gaussians fitted to features a (n, d), b (m, d) in float64."""
    return frechet_moments(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


# ---------------------------------------------------------------------------------------------------------------------
# scores
# ---------------------------------------------------------------------------------------------------------------------

def nearest_distance(codes, train, batch=100):
    """Hamming distance (n,) of each code (n, L) to the nearest of the training codes (m, L)."""
    train = torch.from_numpy(train.astype(np.float32))
    return torch.cat([torch.cdist(part.float(), train, p=0).amin(1) for part in codes.split(batch)])  # p = 0 counts what differs


def factor_accuracy(seen, labels, names):
    """Share of rows where each factor is right: {factor: share}, and "all"."""
    right = seen == labels
    return {name: right[:, k].double().mean().item() for k, name in enumerate(names)} | {"all": right.all(1).double().mean().item()}


class Scores:
    """The table of what is measured, on the test split; n pictures for each line, `seed` for all noise."""

    def __init__(self, stages, args, run):
        self.stages, self.args, self.run, self.n = stages, args, run, args.count
        self.dataset, self.names = stages.dataset, list(stages.dataset.factors)
        data.check_images(stages.codes[1], self.dataset, args)
        self.judge = load_judge(self.dataset, args, run) if self.names else None
        test, train = self.dataset.splits["test"], self.dataset.splits["train"]
        self.rows = np.random.default_rng(0).permutation(test)[:self.n]
        self.texts = (run.folder / "text_prior.pt").exists()
        if self.texts and stages.text_prior[2]["captions"] != data.checksum(self.dataset.captions):  # or it stops here, not after minutes
            data.fail(f"{run.folder / 'text_prior.pt'}: trained on other captions than {args.data_dir} holds now; bring those back, or train it again "
                      f"with {data.stage_command('text_prior', args)} --restart")
        self.report = data.read_report(stages.codes[1], args)
        self.reference = self.look(self.dataset.pixels(np.random.default_rng(1).permutation(train)[:10_000]))[0]
        self.result = {}

    def look(self, images):
        """Features, factors and cleanness; without labels to train a judge on, the tokenizer's features alone."""
        if self.judge:
            return look(self.judge, images, self.run)
        backbone, config = self.stages.tokenizer
        features = torch.cat([tokenizer.encode_images(backbone, part, config, self.run)[1].cpu() for part in images.split(500)])
        return features.double(), torch.zeros(len(images), 0).long(), torch.ones(len(images)).bool()

    def pictures(self, images, labels=None, looked=None):
        """What every set of pictures is measured by: Fréchet distance to training images, cleanness and, given labels, factors.
        `looked`: what `look` said of the images, where the caller needs it too."""
        features, factors, clean = looked or self.look(images)
        line = {"frechet": frechet(features, self.reference)}
        if self.args.dataset == "shapes":
            line["clean"] = clean.double().mean().item()
        if labels is not None and self.names:
            line["factors"] = factor_accuracy(factors, labels, self.names)
        return line

    def codes_of(self, rows):
        """The stored codes (n, L) of unflipped images `rows`."""
        return torch.from_numpy(self.stages.codes[0][rows, 0].astype(np.int64))

    def run_all(self):
        """Measure everything that the trained stages allow; returns the nested dict that goes to scores.json."""
        dataset, result, seed = self.dataset, self.result, self.args.seed
        codes, about = self.stages.codes
        result["real images"] = self.pictures(dataset.pixels(self.rows), dataset.labels[self.rows])
        if self.args.dataset == "shapes":
            blends = torch.cat([judge_batch(dataset, self.args, 10 ** 6 + k)[2] for k in range(8)])
            result["blends of two images"] = {"clean": look(self.judge, blends, self.run)[2].double().mean().item()}
        result["tokenizer"] = {k: v for k, v in self.report.items() if not k.endswith("val")}
        images = self.stages.draw(self.codes_of(self.rows), seed)
        looked = self.look(images)
        result["reconstruct"], seen_usual = self.pictures(images, dataset.labels[self.rows], looked), looked[1]
        if (self.run.folder / "generator-uncond.pt").exists():
            sampler = generator.sampler_settings(self.args)
            images = generator.generate(self.stages.generator("generator-uncond"), None, len(self.rows), sampler, self.run, seed)
            result["generator without codes"] = self.pictures(images)
            result["reconstruct"]["frechet / without codes"] = result["reconstruct"]["frechet"] / result["generator without codes"]["frechet"]
        self.score_priors(codes, about)
        if len(self.rows) >= 2:
            self.score_composition("compose, positions chosen by the prior", "prior")
            self.score_composition("compose, positions at random", "random")
        for split, pair in data.UNSEEN_PAIRS.items() if self.args.dataset == "shapes" else ():
            result[split] = self.score_unseen(split, pair, seen_usual)
        if self.texts:
            for guidance in self.args.text_guidance:
                result[f"text to image, guidance {guidance:g}"] = self.score_text(guidance)
            result["captions of images"] = self.score_captions()
        return result

    def score_priors(self, codes, about):
        """Bits per token, calls, memorising, and Fréchet distance of each prior's samples, relative to that of true codes."""
        train = np.concatenate([codes[about["splits"]["train"].start:about["splits"]["train"].stop, f] for f in (0, 1)])
        near = lambda c: (lambda d: {"in training set": (d == 0).double().mean().item(), "distance to nearest": d.mean().item()})(
            nearest_distance(c, train))
        self.result["held-out codes"] = near(self.codes_of(self.rows))
        for kind in ("masked", "ar"):
            sampled, calls = self.stages.sample_codes(kind, len(self.rows), self.args.seed)
            line = self.pictures(self.stages.draw(sampled, self.args.seed + 1))
            line["frechet / true codes"] = line["frechet"] / self.result["reconstruct"]["frechet"]
            line["bits per token"], line["standard error"] = prior.bits_per_token(self.stages.prior(kind), self.codes_of(self.rows), self.run)
            line["calls per sample"] = calls.double().mean().item()
            self.result[f"prior-{kind}"] = line | near(sampled)
        masked, ar = (self.result[f"prior-{kind}"]["bits per token"] for kind in ("masked", "ar"))
        self.result["masked bound / ar bits"] = masked / ar

    def score_composition(self, name, choose):
        """Children of pairs of test images, each code position from one of the parents: does every factor come from a parent?"""
        a, b = self.rows[:self.n // 2], np.roll(self.rows, 1)[:self.n // 2]
        rng = data.step_generator(self.args.seed, 2)
        parents = torch.stack([self.codes_of(a), self.codes_of(b)], 1)  # (n, 2, L)
        images = self.stages.draw(self.stages.compose(parents, [0.5, 0.5], rng, choose), self.args.seed + 2)
        looked = self.look(images)
        line = self.pictures(images, looked=looked)
        if self.names:
            _, seen, clean = looked
            la, lb = self.dataset.labels[a], self.dataset.labels[b]
            inherited = lambda f: ((f == la) | (f == lb)).all(1)
            both = (seen != la).any(1) & (seen != lb).any(1)  # neither parent again
            good = inherited(seen) & clean
            line |= {"every factor from a parent, clean": good.double().mean().item(),
                     "every factor from a parent": inherited(seen).double().mean().item(),
                     "of these, unlike both parents": (good & both).double().sum().item() / max(1, good.sum().item()),
                     "chance (another test image)": inherited(self.dataset.labels[np.roll(self.rows, 7)[:self.n // 2]]).double().mean().item(),
                     "factors": dict(zip(self.names, ((seen == la) | (seen == lb)).double().mean(0).tolist()))}
        self.result[name] = line

    def score_unseen(self, split, pair, seen_usual):
        """Images of pairs never seen in training → code → image: is the pair kept? With chance, the true-factor reference, and how
        often images of usual codes, read as `seen_usual` (n, F), hit an unseen pair by mistake."""
        rows = np.array(self.dataset.splits[split])[:self.n // 2]
        labels, ks = self.dataset.labels[rows], [self.names.index(name) for name in pair]
        images = self.stages.draw(self.codes_of(rows), self.args.seed + 3)
        _, seen, clean = self.look(images)
        kept = lambda s: (s[:, ks] == labels[:, ks]).all(1).double().mean().item()
        line = {"pair kept": kept(seen), "clean": clean.double().mean().item(), "factors": factor_accuracy(seen, labels, self.names),
                "chance (colour right, the other factor guessed)": 1 / len(data.SHAPES[pair[0] if pair[1] == "colour" else pair[1]]),
                "unseen pairs among seen codes' images": data.is_unseen(seen_usual, pair).double().mean().item()}
        if (self.run.folder / "generator-factors.pt").exists():
            model = self.stages.generator("generator-factors")
            images = generator.generate(model, labels, len(labels), generator.sampler_settings(self.args), self.run, self.args.seed + 3)
            line["pair kept from true factors"] = kept(self.look(images)[1])
        return line

    def score_text(self, guidance):
        """Prompt → code → image: does the judge see all that was asked for? For captions of the test split and, for shapes, for colour and
        shape alone and for pairs never seen in training; and how many different codes 16 draws of one prompt give."""
        line, n, shapes = {}, self.n // 4, self.args.dataset == "shapes"

        def draw(name, prompts, labels, asked, pair=None):
            """Factors `asked` (columns of labels) right, and those of `pair` both."""
            codes, _ = self.stages.read(prompts, guidance, self.args.seed + 4)
            _, seen, clean = self.look(self.stages.draw(codes, self.args.seed + 5))
            line[name] = factor_accuracy(seen[:, asked], labels[:, asked], [self.names[k] for k in asked])
            if shapes:
                line[name] |= {"clean": clean.double().mean().item()}
            if pair:
                line[name]["pair"] = (seen == labels)[:, [self.names.index(name) for name in pair]].all(1).double().mean().item()

        everything, first = list(range(len(self.names))), self.dataset.labels[self.rows[:n]]
        if shapes:
            say = lambda labels, *said: [data.shapes_caption(row, *said) for row in labels.tolist()]
            prompts = say(first)
            draw("captions of the test split", prompts, first, everything, ("shape", "colour"))
            draw("shape and colour alone", say(first, (True, False, False, False)), first, [0, 1])
            for split, pair in data.UNSEEN_PAIRS.items():
                labels = self.dataset.labels[self.dataset.splits[split]][:n]
                draw(split, say(labels), labels, everything, pair)
        else:
            rows, prompts = self.stages.prompts(self.rows[:n])
            if not prompts:
                return line
            if self.names:
                draw("captions of the test split", prompts, self.dataset.labels[rows], everything)
        codes, calls = self.stages.read([prompt for prompt in prompts[:32] for _ in range(16)], guidance, self.args.seed + 6)
        draws = codes.view(-1, 16, codes.shape[1]).tolist()
        line["distinct codes in 16 draws of a prompt"] = sum(len(set(map(tuple, part))) for part in draws) / len(draws)
        line["calls per sample"] = calls.double().mean().item()
        return line

    def score_captions(self):
        """Image → code → caption, for test images and pairs never seen: for shapes, which factors are named right; else equal captions."""
        line, n = {}, self.n // 2
        splits = {"test split": self.rows[:n]}
        if self.args.dataset == "shapes":
            splits |= {split: np.array(self.dataset.splits[split])[:n] for split in data.UNSEEN_PAIRS}
        for name, rows in splits.items():
            rows = [row for row in rows if self.dataset.captions[row]]
            if not rows:
                continue
            captions = self.stages.captions(self.codes_of(rows), self.args.seed + 7)
            if self.args.dataset == "shapes":
                named = torch.tensor([data.read_shapes_caption(caption) or [-1] * len(self.names) for caption in captions])
                line[name] = factor_accuracy(named, self.dataset.labels[rows], self.names)
                if name in data.UNSEEN_PAIRS:
                    columns = [self.names.index(factor) for factor in data.UNSEEN_PAIRS[name]]
                    line[name]["pair"] = (named == self.dataset.labels[rows])[:, columns].all(1).double().mean().item()
            else:
                line[name] = {"equal to its own": float(np.mean([caption == self.dataset.captions[k] for caption, k in zip(captions, rows)]))}
        return line


# ---------------------------------------------------------------------------------------------------------------------
# scores of the literature: Inception
# ---------------------------------------------------------------------------------------------------------------------

class Inception:
    """The public TorchScript Inception (inception-2015-12-05.pt), which takes bytes of any size: images (n, 3, S, S) uint8 → features
    (n, 2048) and, without the output's bias as in the original score, probabilities of its classes (n, 1008)."""

    def __init__(self, path, device):
        try:
            self.net, self.device = torch.jit.load(path, map_location=device).eval(), device
        except (RuntimeError, ValueError, OSError) as problem:
            data.fail(f"--inception {path}: not a TorchScript file ({str(problem)[:200]}); expected inception-2015-12-05.pt")

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        try:
            found = {"features": self.net(images, return_features=True), "classes": self.net(images, no_output_bias=True)}
            found = {name: value.float().cpu().numpy() for name, value in found.items()}
        except (RuntimeError, AttributeError) as problem:
            data.fail(f"--inception: not the public Inception with return_features and no_output_bias ({str(problem)[-200:]})")
        if not all(np.isfinite(value).all() for value in found.values()):
            data.fail("--inception: it says of pictures what is not finite; expected the public Inception, inception-2015-12-05.pt")
        return found


def inception_score(classes, parts=10):
    """Mean and deviation over `parts` parts of exp E KL(p(y | x) ‖ p(y)) (Salimans et al. 2016); classes (n, K) probabilities."""
    p = torch.from_numpy(classes).double()
    scores = torch.stack([(part * (part.clamp(min=1e-30).log() - part.mean(0).clamp(min=1e-30).log())).sum(1).mean().exp() for part in p.chunk(parts)])
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, made, device, k=3, batch=1000):
    """Shares of made features (m, d) that lie near a real one (n, d) and of real that lie near a made one: nearer than its k-th nearest
    neighbour of its own kind (Kynkäänniemi et al. 2019)."""
    real, made = (torch.from_numpy(x).float().to(device) for x in (real, made))
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    radius = lambda x: torch.cat([torch.cdist(part, x, **exact).kthvalue(k + 1, 1).values for part in x.split(batch)])  # itself is the nearest
    inside = lambda x, of, r: torch.cat([(torch.cdist(part, of, **exact) <= r).any(1) for part in x.split(batch)]).double().mean().item()
    return inside(made, real, radius(real)), inside(real, made, radius(made))


def reference_statistics(net, stages, args, run, most=10_000):
    """Mean and covariance of the Inception features of all training images, and the features of `most` of them (of all where there are
    fewer), kept in OUT/<dataset>/reference-<checksum>.npz."""
    dataset, rows = stages.dataset, stages.dataset.splits["train"]
    key = data.checksum([data.file_checksum(args.inception), dataset.checksum, args.image_size])[:16]
    path, chosen = run.folder / f"reference-{key}.npz", np.random.default_rng(0).permutation(len(rows))[:most]
    if not path.exists():
        work = lambda part: {"features": np.concatenate([net(images)["features"] for images in dataset.batches(
            range(rows.start + part.start, rows.start + part.stop), 100, args.workers)])}
        chunks = data.in_chunks(run.folder / f".reference-{key}", len(rows), run, work)
        if run.main:
            total, square, kept, start = 0.0, 0.0, [], 0
            for chunk in chunks:  # one after the other: those of ImageNet do not fit in memory together
                part = data.read_chunk(chunk)["features"]
                double = torch.from_numpy(part).double()
                total, square = total + double.sum(0), square + double.T @ double
                kept.append(part[chosen[(chosen >= start) & (chosen < start + len(part))] - start])
                start += len(part)
            mean = total / len(rows)
            cov = (square - len(rows) * torch.outer(mean, mean)) / (len(rows) - 1)
            data.write_atomic(path, lambda file: np.savez(file, mean=mean.numpy(), cov=cov.numpy(), features=np.concatenate(kept)))
            shutil.rmtree(chunks[0].parent)
        run.wait()
    return data.read_chunk(path)


def inception_scores(stages, args, run):
    """FID, Inception Score, precision and recall of --count samples with codes of the prior --kind, and with true codes of training
    images. Processes share the samples, each a function of (seed, index); a stopped run goes on. Returns the dict on the first process."""
    net = Inception(args.inception, run.device)
    data.check_images(stages.codes[1], stages.dataset, args)
    stages.generator(), stages.prior(args.kind)  # what is missing is said now, not after hours
    files = ["generator.pt", f"prior-{args.kind}.pt"] + ["generator-early.pt"] * (args.guide == "early")
    files = [data.file_checksum(path) for path in (*(run.folder / name for name in files), args.inception)]
    settings = {k: v for k, v in vars(args).items() if k not in ("workers", "device", "out", "data_dir")}
    data.agree(**settings, **{"checksums of the checkpoints": files})
    reference = reference_statistics(net, stages, args, run)
    train, result = np.array(stages.dataset.splits["train"]), {}
    shuffled = np.random.default_rng(args.seed).permutation(max(len(train), args.count)) % len(train)
    for name in (f"codes of prior-{args.kind}", "true codes"):
        def work(rows):
            if name == "true codes":
                codes = torch.from_numpy(stages.codes[0][train[shuffled[rows.start:rows.stop]], 0].astype(np.int64))
            else:
                codes, _ = stages.sample_codes(args.kind, len(rows), args.seed, rows.start)
            return net(stages.draw(codes, args.seed + 1, rows.start))

        key = data.checksum([name, settings, files])[:16]
        chunks = data.in_chunks(run.folder / f".samples-{key}", args.count, run, work, size=prior.BATCH)
        if run.main:
            made, classes = (np.concatenate([data.read_chunk(path)[part] for path in chunks]) for part in ("features", "classes"))
            double = torch.from_numpy(made).double()
            score, deviation = inception_score(classes)
            precision, recall = precision_recall(reference["features"], made, run.device)
            fid = frechet_moments(double.mean(0), torch.cov(double.T), *(torch.from_numpy(reference[part]) for part in ("mean", "cov")))
            result[name] = {"FID": fid, "IS": score, "IS deviation": deviation, "precision": precision, "recall": recall, "samples": len(made)}
            shutil.rmtree(chunks[0].parent)
        run.wait()
    return result


def print_scores(result, indent=""):
    """The nested dict as an indented table."""
    for name, value in result.items():
        if isinstance(value, dict) and all(isinstance(v, (int, float)) for v in value.values()) and name != "settings":
            print(f"{indent}{name:44} " + ", ".join(f"{k} {v:.3f}" for k, v in value.items()))
        elif isinstance(value, dict):
            print(f"{indent}{name}")
            print_scores(value, indent + "  ")
        else:
            print(f"{indent}{name:44} {value:.3f}" if isinstance(value, float) else f"{indent}{name:44} {value}")


# ---------------------------------------------------------------------------------------------------------------------
# commands
# ---------------------------------------------------------------------------------------------------------------------

def train_missing(args):
    """Run the stages that have not finished, in order, each as its own command with the flags they share."""
    folder = Path(args.out) / args.dataset
    names = ("dataset", "data_dir", "out", "image_size", "seed", "device", "dtype", "workers")
    shared = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    for stage in ("tokenizer", "generator", "prior-masked", "prior-ar", "text_prior"):
        script, *words = data.STAGE_COMMANDS[stage].split()
        if stage == "text_prior" and not any(data.load_dataset(args).captions):
            print(f"--- {script}: left out, the images have no captions", flush=True)
            continue
        command = [sys.executable, str(Path(__file__).with_name(script)), *words, *shared]
        print(f"--- {script} {' '.join(words)}", flush=True)
        start = time.time()
        process = subprocess.Popen(command)
        usual = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # asked to stop: the stage saves, then both end
        try:
            failed = process.wait()
        except KeyboardInterrupt:  # the stage got a Ctrl-C of the terminal too, but not one for this process alone
            process.terminate()
            failed = process.wait()
        signal.signal(signal.SIGTERM, usual)
        if failed:
            data.fail(f"{script} stopped (see above); what it saved in {folder} is kept, the same command goes on from there")
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
        try:
            images.append(data.read_image(path, args.image_size))
        except Exception as problem:  # each of Pillow's decoders raises its own kinds
            data.fail(f"{path}: does not open as an image ({problem}); expected one of {', '.join(data.FORMATS)}")
    return torch.stack(images), [Path(path).stem[:10] for path in paths]


def read_prompts(args, stages):
    """The prompts of the command line and of --prompts, else four captions of the test split."""
    prompts = [prompt.strip() for prompt in args.inputs]
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as problem:
            data.fail(f"--prompts {args.prompts}: not readable as text ({problem}); expected a file with a prompt in each line")
        prompts += [line.strip() for line in lines if line.strip()]
    elif not prompts:
        prompts = stages.prompts(stages.dataset.splits["test"])[1][:4]
    if not prompts:
        data.fail("text: no prompts; give some, or --prompts FILE with one in each line")
    return prompts


def text_pictures(stages, args, run):
    """For each prompt a row of pictures; with --image that picture first, and its code kept in part or mixed with the prompt's."""
    L = stages.codes[1]["L"]
    check_weights(args, 2)
    check_positions(args, L)
    prompts = read_prompts(args, stages)
    repeated = [prompt for prompt in prompts for _ in range(args.columns)]
    guidance, rng, given = args.text_guidance[0], data.step_generator(args.seed, 1), None
    if args.image is not None:
        image, _ = input_images([args.image], stages, args, 1)
        code = stages.encode(image).expand(len(repeated), L)
        if not args.weights:  # keep the --positions, or a share of them, new ones for each picture
            keep = torch.rand(code.shape, generator=rng).argsort(1).argsort(1) < round(args.keep * L)
            if args.positions:
                keep = torch.zeros_like(keep).index_fill(1, torch.tensor(args.positions), True)
            given = torch.where(keep, code, stages.codes[1]["V"])
    codes, _ = stages.read(repeated, guidance, args.seed, given)
    unknown = dict.fromkeys(word for prompt in prompts for word in stages.text_prior[1].unknown(prompt))
    if unknown:
        print(f"note: no training caption has {', '.join(unknown)}; expect the model to guess there", file=sys.stderr)
    if args.image is not None and args.weights:
        codes = stages.compose(torch.stack([codes, code], 1), args.weights, rng, args.choose)
    images = stages.draw(codes, args.seed)
    if args.image is not None:
        rows = [torch.cat([image, part]) for part in images.split(args.columns)]
        return torch.cat(rows), args.columns + 1, prompts
    return images, args.columns, prompts


def check_weights(args, k):
    """--weights: one number for each of k codes."""
    if args.weights and (len(args.weights) != k or sum(args.weights) <= 0):
        data.fail(f"{args.command}: --weights has {len(args.weights)} numbers for {k} codes; give one each, not all zero")


def check_positions(args, L):
    """--positions: from 0 to L − 1."""
    if args.positions and not all(0 <= p < L for p in args.positions):
        data.fail(f"{args.command}: --positions has values outside 0 to {L - 1}")


def make_pictures(command, stages, args, run):
    """One grid for a command; returns its path."""
    columns, titles, lines, seed = args.columns, (), (), args.seed
    if command == "unconditional":
        codes, _ = stages.sample_codes(args.kind, args.columns * args.rows, seed)
        images = stages.draw(codes, seed)
    elif command == "text":
        images, columns, lines = text_pictures(stages, args, run)
    else:
        inputs, titles = input_images(args.inputs, stages, args, least=2 if command == "compose" else 1)
        codes, k = stages.encode(inputs), len(inputs)
        repeats = range(args.rows)
        if command == "reconstruct":  # a row of inputs, then rows of images drawn from their codes with different noise
            images = torch.cat([inputs] + [stages.draw(codes, data.mix_seed(seed, r)) for r in repeats])
            columns = k
        elif command == "infill":
            rng = data.step_generator(seed, 0)
            keep = torch.rand(args.rows, k, codes.shape[1], generator=rng) < args.keep
            masked = torch.where(keep, codes, stages.prior("masked").V).flatten(0, 1)
            filled, _ = prior.sample_masked(stages.prior("masked"), masked, prior.sampler_settings(args, prior.SAMPLERS["masked"]), run, rng)
            images, columns = torch.cat([inputs, stages.draw(filled, seed)]), k
        elif command == "caption":  # in each row an image and the one drawn from its code
            captions = stages.captions(codes, seed)
            for path, caption in zip(args.inputs or titles, captions):
                print(f"{path}: {' '.join(caption.split())}")
            images, columns, titles, lines = torch.stack([inputs, stages.draw(codes, seed)], 1).flatten(0, 1), 2, (), captions
        else:  # compose: the parents, then children
            check_weights(args, k)
            check_positions(args, codes.shape[1])
            weights, rng = args.weights or [1 / k] * k, data.step_generator(seed, 0)
            if args.positions and sum(weights[1:]) <= 0:
                data.fail("compose: --positions takes all other positions from the later images, whose weights are all zero")
            columns = max(k, args.columns)
            children = stages.compose(codes.expand(columns * args.rows, -1, -1), weights, rng, args.choose, args.positions)
            blank = torch.full((columns - k, *inputs.shape[1:]), 255, dtype=torch.uint8)
            images = torch.cat([inputs, blank, stages.draw(children, seed)])
    path = run.folder / "samples" / f"{command}{'-' + args.kind if command == 'unconditional' else ''}.png"
    data.save_grid(path, images, columns, titles, lines, settings={**vars(args), "command": command})
    print(f"{command}: {path}")
    return path


def parse(argv):
    """The flags of this script, checked."""
    parser = data.make_parser(__doc__)
    g = parser.add_argument_group("what to do")
    g.add_argument("command", nargs="?", choices=COMMANDS, help="pictures to make")
    g.add_argument("inputs", nargs="*", help="image files, or the prompts of text; none: those of the test split")
    g.add_argument("--prompts", metavar="FILE", help="text: a file with a prompt in each line")
    g.add_argument("--image", metavar="FILE", help="text: a picture of whose code a share is kept (--keep, --positions) or mixed in (--weights)")
    g.add_argument("--train", action="store_true", help="train what is missing by calling the stages, then pictures and scores")
    g.add_argument("--score", action="store_true", help="measure everything and write scores.json")
    g.add_argument("--inception", metavar="FILE", help="--score: FID, Inception Score, precision and recall by this TorchScript network instead")
    g.add_argument("--count", type=data.positive, help="pictures measured for each score (default: 2,000, half as many for compositions and "
                   "unseen pairs; with --inception 50,000)")
    g.add_argument("--kind", choices=("masked", "ar"), default="masked", help="the prior of unconditional samples")
    g.add_argument("--weights", type=data.non_negative, nargs="+",
                   help="compose: share of positions from each image (default: equal); text: from prompt and --image")
    g.add_argument("--positions", type=data.whole, nargs="+", help="compose: take these positions from the first image; text: keep these of --image")
    g.add_argument("--choose", choices=("prior", "random"), default="prior",
                   help="compose: the masked prior chooses which image each position comes from, or each is drawn on its own")
    g.add_argument("--rounds", type=data.whole, default=32, help="compose: rounds in which the masked prior chooses again for some positions")
    g.add_argument("--round-share", type=data.share, default=0.25, help="compose: share of the positions in a round")
    g.add_argument("--keep", type=data.share, default=0.5,
                   help="share of the positions that is kept (text with --image: exactly, infill: on average)")
    g.add_argument("--columns", type=data.positive, default=8, help="pictures in a row (where the inputs do not decide it)")
    g.add_argument("--rows", type=data.positive, default=4, help="rows of generated pictures")
    generator.add_sampler_flags(parser)
    g = parser.add_argument_group("image sampler, of this script")
    g.add_argument("--guide", choices=("null", "early"), default="null", help="guide by the model without code, or by its earlier checkpoint")
    prior.add_sampler_flags(parser)
    g = parser.add_argument_group("text sampler")
    g.add_argument("--text-guidance", type=data.non_negative, nargs="+", default=[2.0], help="w of equation (3) of text_prior.py; 1: none; "
                   "several: --score measures each, pictures take the first")
    args = data.parse(parser, PRESETS, argv)
    args.count = args.count or (50_000 if args.inception else 2000)
    if args.inception and not args.score:
        parser.error("argument --inception: only --score reads it")
    if max(args.text_guidance) > 1e6:  # log-probabilities times more would not be finite
        parser.error(f"argument --text-guidance: expected at most 1,000,000, got {max(args.text_guidance):g}")
    if args.count < 4:
        parser.error(f"argument --count: expected at least 4 pictures, got {args.count}")
    if not (args.command or args.train or args.score):
        parser.error(f"say what to do: {', '.join(COMMANDS)}, --train or --score")
    if args.train and (args.command or args.inputs):
        parser.error("argument --train: makes all pictures, of the test split; for others give a command without it afterwards")
    if args.command != "text" and (args.prompts or args.image is not None):
        parser.error("arguments --prompts and --image: only text reads them")
    if args.command == "text" and (args.weights or args.positions) and (args.image is None or (args.weights and args.positions)):
        parser.error("arguments --weights and --positions: text takes one of them, and only with --image")
    return args


def main(argv=None):
    """Train what is missing, make pictures, print scores."""
    args, start = parse(argv), time.time()
    if data.place()[1] > 1 and not args.inception:
        data.fail("sample.py: several processes share --score --inception alone; start it without torchrun")
    if args.train:
        train_missing(args)
    run = data.Run(args, lock="sample" if args.inception else None)  # with a lock it can be stopped and goes on
    stages = Stages(args, run)
    if args.inception:
        scores = inception_scores(stages, args, run)
        if run.main:
            scores |= {"seconds": round(time.time() - start), "settings": vars(args)}
            data.write_json(run.folder / "inception.json", scores)
            print_scores({k: v for k, v in scores.items() if k != "settings"})
        return run.close()
    commands = [args.command] if args.command else []
    if args.train:
        captioned = (run.folder / "text_prior.pt").exists() and stages.prompts(stages.dataset.splits["test"])[1]
        commands = [command for command in COMMANDS if captioned or command not in ("text", "caption")]
    for command in commands:
        make_pictures(command, stages, args, run)
    if args.train or args.score:
        scores = Scores(stages, args, run).run_all()
        if data.open_codes(args)[1] != stages.codes[1]:  # stages are loaded when they are first used
            data.fail(f"{run.folder}: the codes changed while the scores were taken; wait for what trains there and run the same command again")
        scores["seconds"] = round(time.time() - start)
        scores["settings"] = vars(args)
        data.write_json(run.folder / "scores.json", scores)
        print_scores({k: v for k, v in scores.items() if k != "settings"})


if __name__ == "__main__":
    data.command(main)
