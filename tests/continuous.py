"""Continuous features in the place of codes, by hand, on shapes: python tests/continuous.py [--out DIR]

After `python sample.py --train`. A generator reads, in place, the tokens that the tokenizer's SEM reads (of
form and of colour, D numbers each for a patch) where ours reads the codes made of them, and a flow over these
numbers takes the place of the priors. Both train here; then what sample.py --score says of codes is said of
features, which are also mixed by averages. Nothing is kept.
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

NONE = 1e4  # in place of a token's numbers: it is not there
PRIOR_STEPS = 1200


class Tokens(nn.Module):
    """In place of generator.CodeEmbedding: features (B, 2, N, D), form and colour of each patch, → (B, N,
    width). A token that is not there is a learned vector."""

    def __init__(self, inputs, width):
        super().__init__()
        self.kinds = nn.ModuleList([nn.Linear(inputs, width), nn.Linear(inputs, width)])
        self.none = nn.Parameter(torch.zeros(2, 1, width))

    def forward(self, features):
        gone = features[..., :1] == NONE  # (B, 2, N, 1)
        known = features.masked_fill(gone, 0.0)
        x = torch.stack([linear(known[:, k]) for k, linear in enumerate(self.kinds)], 1)  # (B, 2, N, width)
        return torch.where(gone, self.none, x).sum(1)  # (B, N, width)


class FeatureFlow(nn.Module):
    """What the flow predicts of features (B, 2, N, D), from z (B, 2, N, D) at t (B,): a DiT of one token a
    patch."""

    def __init__(self, patches, inputs, width=192, depth=3, heads=3):
        super().__init__()
        self.x_embed = nn.Linear(2 * inputs, width)
        self.pos_embed = nn.Parameter(torch.randn(1, patches, width) * 0.02)
        self.t_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(generator.Block(width, heads) for _ in range(depth))
        self.final_adaLN = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, 2 * inputs)
        for p in (*self.final_adaLN.parameters(), *self.final.parameters()):
            nn.init.zeros_(p)

    def forward(self, z, t):
        c = F.silu(self.t_embed(generator.timestep_features(1000 * t)))  # (B, width)
        x = self.x_embed(z.transpose(1, 2).flatten(2)) + self.pos_embed  # (B, N, width)
        for block in self.blocks:
            x = block(x, c)  # (B, N, width)
        x = self.final(generator.modulate(x, *self.final_adaLN(c).chunk(2, -1)))  # (B, N, 2 D)
        return x.unflatten(2, (2, -1)).transpose(1, 2)  # (B, 2, N, D)


@torch.no_grad()
def read_features(stages, run, flip):
    """The normalised tokens (images, 2, N, D) float16 of all images, or of their mirror images."""
    backbone, dataset = stages.backbone, stages.dataset
    parts = []
    for rows in torch.arange(len(dataset)).split(1000):
        images = dataset.pixels(rows.tolist())
        with run.autocast():
            x = backbone.tokens(tokenizer.to_input(images.flip(3) if flip else images, backbone, run))
            x = backbone.norm(x)[:, backbone.first_patch:]  # (b, 2 N, D)
        parts.append(x.unflatten(1, (2, -1)).half().cpu())
    return torch.cat(parts)


def train(model, loss_of, args, rows, run):
    """The averaged weights of a model after --steps of loss_of(model, part)."""
    optimizers, average = data.Optimizers(model, args), data.averaged(model, args.ema)
    start = time.monotonic()
    for step in range(args.steps):
        [part] = data.batch_parts(step, rows, args, run, model)
        loss = loss_of(model, part)
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
    scores, dataset = sample.Scores(stages, args, run), stages.dataset
    rows = dataset.splits["train"]
    flips = [read_features(stages, run, flip) for flip in (False, True)]
    features = torch.stack(flips, 1)  # (images, 2 flips, 2, N, D)
    seen = features[rows.start:rows.start + 8000, 0].float()  # (8000, 2, N, D)
    mean, std = seen.mean((0, 2), keepdim=True)[0], seen.std((0, 2), keepdim=True)[0] + 1e-3  # (2, 1, D)

    def normalised(rows, flip=0):
        return (features[rows, flip].float() - mean) / std  # (b, 2, N, D)

    def of_part(part):
        return normalised(part.rows, part.flips().long())

    _, _, N, D = seen.shape
    settings = generator.parse(["--seed", str(args.seed)])[1]
    torch.manual_seed(args.seed)
    sizes = {"codes": N, "values": 2, "code_side": int(N ** 0.5), "channels": 3, "down": 1}
    model = generator.build_generator({**vars(settings), **sizes})
    model.code_place, model.V = Tokens(D, settings.width), NONE

    def draw_loss(model, part):
        flips = part.flips()
        x = data.from_bytes(dataset.pixels(part.rows))
        x = torch.where(flips[:, None, None, None], x.flip(3), x)
        dropped = part.uniform(2, N, 1) < settings.drop_positions * torch.tensor([0, 1]).view(2, 1, 1)
        dropped = dropped | (part.uniform(1, 1, 1) < settings.drop)  # single colours, and whole codes
        shown = of_part(part).masked_fill(dropped, NONE)
        return generator.flow_loss(model, x, shown, part, settings, run)

    model = train(model, draw_loss, settings, rows, run)

    flow_settings = prior.parse(["--kind", "masked", "--seed", str(args.seed), "--lr", "2e-3",
                                 "--lr-matrix", "0", "--steps", str(PRIOR_STEPS)])[1]

    def flow_loss(flow, part):
        x, e = of_part(part), part.normal(2, N, D)
        t = torch.sigmoid(part.normal()).view(-1, 1, 1, 1)
        with run.autocast():
            output = flow(t * x + (1 - t) * e, t.flatten())
        return ((output.float() - x) / (1 - t).clamp(min=generator.NEAREST)).square().mean()

    flow = train(FeatureFlow(N, D), flow_loss, flow_settings, rows, run)

    def judged(x, seed):
        return scores.judged(generator.generate(model, x, args, run, seed))

    def say(name, **found):
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)

    @torch.no_grad()
    def sampled(steps):
        def field(z, t):
            with run.autocast():
                output = flow(z, torch.full((len(z),), t))
            return (output.float() - z) / (1 - t)

        noise = torch.randn(scores.n, 2, N, D, generator=data.step_generator(args.seed, 0))
        return generator.integrate(field, noise, [k / steps for k in range(steps + 1)])

    found = judged(normalised(scores.rows), 0)
    line = scores.measure(found, dataset.labels[scores.rows])
    say("image -> features -> image", frechet=line["frechet"], clean=line["clean"], **line["factors"])
    for split, pair in data.UNSEEN_PAIRS.items():
        unseen = list(scores.unseen[split])[:scores.n // 2]
        _, factors, clean = judged(normalised(unseen), 3)
        line = sample.factor_accuracy(factors, dataset.labels[unseen], scores.names, pair)
        say(split, pair=line["pair"], clean=sample.mean(clean))
    for steps in (10, 25, 50):
        line = scores.measure(judged(sampled(steps), 1))
        say(f"samples of the flow, {steps} steps", frechet=line["frechet"], clean=line["clean"])

    pairs = torch.tensor(scores.rows)[:scores.n // 2]
    labels = dataset.labels[torch.stack([pairs, pairs.roll(1)], 1)]  # (n, 2, factors)
    a, b = normalised(pairs), normalised(pairs.roll(1))
    inner = torch.zeros(N, dtype=torch.bool)
    inner[sample.first_positions({"L": N, "side": int(N ** 0.5), "colour_codes": 0})] = True
    colours = torch.tensor([False, True]).view(2, 1) & inner  # (2, N), of the inner patches
    ways = {"average": (a + b) / 2, "average, length kept": (a + b) / 2 ** 0.5,
            "tokens at random": torch.where(torch.rand(len(a), 2, N, 1) < 0.5, a, b),
            "inner patches of the first": torch.where(inner[:, None], a, b),
            "in the colours of the second": torch.where(colours[..., None], b, a)}
    for way, x in ways.items():
        _, factors, clean = judged(x, 2)
        right = (factors[:, None] == labels).any(1).all(1) & clean
        new = right & (factors[:, None] != labels).any(2).all(1)
        found = {"right and clean": sample.mean(right), "unlike both": sample.mean(new)}
        if way in sample.MEANT:
            meant = (factors == labels[:, sample.MEANT[way], range(5)]).all(1)
            found |= {"all five as meant": sample.mean(meant), "and clean": sample.mean(meant & clean)}
        say(way, **found)


if __name__ == "__main__":
    data.run_script(main)
