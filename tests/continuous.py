"""Continuous features in the place of codes, by hand, on shapes and a CPU: python tests/continuous.py

After `python sample.py --train` (with --out DIR: in that folder). Codes are made of z, V numbers a position
(tokenizer.py, equation 1). Here a generator reads z itself where ours reads codes, with as many steps, and a
flow over z takes the place of the priors. Both train here; then what sample.py --score says of codes is said
of z, which is also mixed by averages. Nothing is kept.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (before torch: it sets the threads' waiting policy)
import generator  # noqa: E402
import prior  # noqa: E402
import sample  # noqa: E402
import tokenizer  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

NONE = 1e4  # in place of the numbers of a position: it is not there
FLOW_STEPS = 1200


class Reader(nn.Module):
    """In place of generator.CodeEmbedding: z (B, L, V) → (B, N, D), one linear map a position, their mean
    over each patch. What is not there is a learned vector."""

    def __init__(self, L, V, patches, width):
        super().__init__()
        self.patches = patches
        scale = 0.7 * (L / patches / V) ** 0.5  # so that a mean has standard deviation 0.7
        self.weight = nn.Parameter(torch.randn(L, V, width) * scale)
        self.none = nn.Parameter(torch.zeros(L, width))

    def forward(self, z):
        gone = z[..., :1] == NONE  # (B, L, 1)
        x = torch.einsum("blv,lvd->bld", z.masked_fill(gone, 0.0), self.weight)  # (B, L, D)
        x = torch.where(gone, self.none, x)
        return x.unflatten(1, (self.patches, -1)).mean(2)  # (B, N, D)


class Flow(nn.Module):
    """x̂ (B, L, V) from noisy z (B, L, V) at t (B,): a DiT of one token a patch."""

    def __init__(self, L, V, patches, width=192, depth=3, heads=3):
        super().__init__()
        self.patches = patches
        numbers = L // patches * V  # of a patch
        self.x_embed = nn.Linear(numbers, width)
        self.pos_embed = nn.Parameter(torch.randn(1, patches, width) * 0.02)
        self.t_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(generator.Block(width, heads) for _ in range(depth))
        self.final_adaLN = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, numbers)
        for p in (*self.final_adaLN.parameters(), *self.final.parameters()):
            nn.init.zeros_(p)

    def forward(self, z, t):
        c = F.silu(self.t_embed(generator.timestep_features(1000 * t)))  # (B, D)
        x = self.x_embed(z.reshape(len(z), self.patches, -1)) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x, c)  # (B, N, D)
        x = self.final(generator.modulate(x, *self.final_adaLN(c).chunk(2, -1)))  # (B, N, L / N · V)
        return x.view_as(z)


@torch.no_grad()
def read_z(stages, run):
    """z of all images and their mirror images, (images, 2, L, V), each number of mean 0 and deviation 1."""
    backbone, dataset = stages.backbone, stages.dataset
    parts = []
    for rows in torch.arange(len(dataset)).split(1000):
        images = dataset.pixels(rows.tolist())
        for both in (images, images.flip(3)):
            with run.autocast():
                z = backbone.logits(backbone.tokens(tokenizer.to_input(both, backbone, run)))
            parts.append(z.float().view(len(both), backbone.L, backbone.V))
    z = torch.cat([torch.stack(pair, 1) for pair in zip(parts[::2], parts[1::2])])  # (images, 2, L, V)
    train = dataset.splits["train"]
    seen = z[train.start:train.stop, 0]
    return (z - seen.mean(0)) / (seen.std(0) + 1e-3)


def train(model, loss_of, args, rows, run):
    """The averaged weights of a model after --steps of loss_of(part)."""
    optimizers, average = data.Optimizers(model, args), data.averaged(model, args.ema)
    start = time.monotonic()
    for step in range(args.steps):
        [part] = data.batch_parts(step, rows, args, run, model)
        loss = loss_of(part)
        loss.backward()
        optimizers.step(step, loss.detach())
        average.update_parameters(model)
    print(f"{args.steps} steps, {time.monotonic() - start:.0f} s, loss {loss.item():.4f}", flush=True)
    return average.module.eval()


def main():
    """Train both, then print a line for each measure."""
    args = sample.parse(["--score", *sys.argv[1:]])
    run = data.Run(args)
    stages = sample.Stages(args, run)
    scores, dataset, stored = sample.Scores(stages, args, run), stages.dataset, stages.stored
    L, V, side = stored["L"], stored["V"], stored["side"]
    inside, but_colours = (torch.zeros(L, 1).bool() for _ in range(2))
    inside[sample.first_positions(stored)] = True
    but_colours[sample.first_positions(stored, True)] = True  # fails here where colours have no positions
    rows = dataset.splits["train"]
    z = read_z(stages, run)  # (images, 2 flips, L, V)

    settings = generator.parse(["--seed", str(args.seed)])[1]
    torch.manual_seed(args.seed)
    sizes = {"codes": L, "values": V, "code_side": side, "channels": 3, "down": 1}
    model = generator.build_generator({**vars(settings), **sizes})
    model.code_place, model.V = Reader(L, V, side ** 2, settings.width), NONE
    drop_positions = settings.drop_positions * data.colour_positions(stored)  # (L,), as generator.py's

    def draw_loss(part):
        flips = part.flips()
        x = data.from_bytes(dataset.pixels(part.rows))
        x = torch.where(flips[:, None, None, None], x.flip(3), x)
        there = torch.ones(len(x), L)
        there = generator.drop_codes(there, 0, part, settings.drop, drop_positions)  # (b, L)
        shown = torch.where(there[..., None] > 0, z[part.rows, flips.long()], NONE)
        return generator.flow_loss(model, x, shown, part, settings, run)

    drawing = train(model, draw_loss, settings, rows, run)

    words = f"--kind masked --lr 2e-3 --lr-matrix 0 --steps {FLOW_STEPS} --seed {args.seed}"
    flow = Flow(L, V, side ** 2)

    def flow_loss(part):
        x, e = z[part.rows, part.flips().long()], part.normal(L, V)
        t = torch.sigmoid(part.normal()).view(-1, 1, 1)
        with run.autocast():
            output = flow(t * x + (1 - t) * e, t.flatten())
        return ((output.float() - x) / (1 - t).clamp(min=generator.NEAREST)).square().mean()

    sampling = train(flow, flow_loss, prior.parse(words.split())[1], rows, run)

    @torch.no_grad()
    def sampled(steps):
        def field(x, t):
            with run.autocast():
                output = sampling(x, torch.full((len(x),), t))
            return (output.float() - x) / (1 - t)

        noise = torch.randn(scores.n, L, V, generator=data.step_generator(args.seed, 0))
        return generator.integrate(field, noise, [k / steps for k in range(steps + 1)])

    def judged(x, shift):
        return scores.judged(generator.generate(drawing, x, args, run, args.seed + shift))

    def say(name, **found):
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)

    line = scores.measure(judged(z[scores.rows, 0], 0), dataset.labels[scores.rows])
    say("image → z → image", frechet=line["frechet"], clean=line["clean"], **line["factors"])
    for split, pair in data.UNSEEN_PAIRS.items():
        unseen = list(scores.unseen[split])[:scores.n // 2]
        _, factors, clean = judged(z[unseen, 0], 3)
        line = sample.factor_accuracy(factors, dataset.labels[unseen], scores.names, pair)
        say(split, kept=line["pair"], clean=sample.mean(clean))
    for steps in (10, 25, 50):
        line = scores.measure(judged(sampled(steps), 1))
        say(f"samples of the flow, {steps} steps", frechet=line["frechet"], clean=line["clean"])

    pairs = torch.tensor(scores.rows)[:scores.n // 2]
    both = torch.stack([pairs, pairs.roll(1)], 1)  # (n, 2)
    labels = dataset.labels[both]  # (n, 2, factors)
    a, b = z[both[:, 0], 0], z[both[:, 1], 0]  # 2 × (n, L, V)
    u = torch.rand(len(a), L, 1, generator=data.step_generator(args.seed, 2))
    ways = {"average": (a + b) / 2, "average, length kept": (a + b) / 2 ** 0.5,
            "positions at random": torch.where(u < 0.5, a, b),
            "inner patches of the first": torch.where(inside, a, b),
            "in the colours of the second": torch.where(but_colours, a, b)}
    for way, x in ways.items():
        found = scores.inheritance(judged(x, 2), labels, way)
        del found["inherited"]
        say(way, **found)


if __name__ == "__main__":
    data.run_script(main)
