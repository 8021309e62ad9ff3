"""Stage 2: codes → images. A diffusion transformer (DiT, adaLN-Zero) that reads the code, by rectified flow.

A straight path from noise e to image x; the network predicts x and is compared as a velocity:
    z_t = t·x + (1 − t)·e,  t = sigmoid(n), n ~ N(mu, sigma²)       v = x − e = (x − z_t) / (1 − t)        (1)
    loss = E ‖v_net(z_t, t, c) − v‖²                                                                       (2)
    dz/dt = v_null + w·(v_c − v_null) in the guidance interval of t, else v_c; from t = 0 (noise) to 1     (3)
The code c (L positions) can enter as the mean of one embedding per position, beside t in adaLN (the paper,
section 3.2), as G in-context tokens, each the mean over L / G positions, and in place: where the tokenizer
reads each patch into positions of its own, their mean is added to the token of that patch. In training whole
codes are dropped, for v_null, and, in place, single positions.

Reads images and OUT/<dataset>/codes.pt; writes generator.pt there and generator-early.pt, for guidance by a
weaker self. --condition none: the baseline without codes, generator-uncond.pt. --factors (with --condition
both --groups 5): the reference that reads the true factors of shapes, generator-factors.pt. --vae: in
latents, kept in latents.pt, not in pixels.
    python generator.py                                                      # the dataset shapes, on a CPU
    python generator.py --dataset cifar10                                    # one GPU
    torchrun --nproc-per-node 8 generator.py --dataset imagenet              # a node, pixels, patch 16
    torchrun --nproc-per-node 8 generator.py --dataset imagenet --vae sd-vae-ft-ema --patch 2 --size XL
"""
import hashlib
import json
import math
import shutil
from pathlib import Path

import data  # first: it sets the threads' waiting policy before torch starts them
import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    "cifar10": dict(
        patch=2, stem=0, width=384, depth=12, heads=6, condition="both", groups=16,
        steps=100_000, batch_size=256, lr=3e-4, warmup=2000, ema=0.9999,
        sample_steps=10, guidance=2.0),
    "folder": dict(condition="both", steps=4000, save_every=500, sample_steps=6, guidance=2.0),
    "imagenet": dict(
        image_size=256, patch=16, stem=0, width=1152, depth=28, heads=16, condition="both", groups=32,
        steps=500_000, batch_size=256, lr=1e-4, lr_matrix=0.0, lr_final=1.0, beta2=0.999, warmup=5000,
        ema=0.9999, clip=1.0, save_every=5000, workers=12, sample_steps=25, guidance=1.4),
}
SIZES = {  # --size, over the preset; the names of DiT
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16),
}

# -------- model ----------------------------------------------------------------------------------------


def modulate(x, shift, scale):
    """LayerNorm of x (B, N, D), then times 1 + scale, plus shift, (B, D) of each sample."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale[:, None])


class Attention(nn.Module):
    """Self-attention with normalised queries and keys. (B, N, D) → (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 × (B, H, N, D/H)
        q = F.layer_norm(q, q.shape[-1:])
        k = F.layer_norm(k, k.shape[-1:])
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)


class SwiGLU(nn.Module):
    """Gated MLP, w2(silu(w1 x) · w3 x), with as many weights as an MLP of ratio 4. (..., D) → (..., D)."""

    def __init__(self, width):
        super().__init__()
        hidden = (8 * width // 3 + 63) // 64 * 64  # a multiple of 64
        self.w13 = nn.Linear(width, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, x = self.w13(x).chunk(2, -1)  # 2 × (..., hidden)
        return self.w2(F.silu(gate) * x)  # (..., D)


class Block(nn.Module):
    """DiT block, adaLN-Zero: the condition shifts, scales and gates each branch. It starts as identity."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.adaLN = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.adaLN.weight)
        nn.init.zeros_(self.adaLN.bias)

    def forward(self, x, c):
        """Tokens x (B, N, D), condition c (B, D) after its SiLU → (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN(c).chunk(6, -1)  # 6 × (B, D)
        h = self.attn(modulate(x, shift_a, scale_a))  # (B, N, D)
        x = torch.addcmul(x, gate_a[:, None], h)  # x + gate · h
        h = self.mlp(modulate(x, shift_m, scale_m))  # (B, N, D)
        return torch.addcmul(x, gate_m[:, None], h)


class CodeEmbedding(nn.Module):
    """codes = L positions of values 0..V (V: no code), (B, L) → (B, groups, D): one embedding per position,
    their mean over each group."""

    def __init__(self, codes, values, groups, width):
        super().__init__()
        self.groups, self.per_group = groups, codes // groups
        scale = 0.7 * self.per_group ** 0.5  # so that a mean has standard deviation 0.7
        self.table = nn.Parameter(torch.randn(codes * (values + 1), width) * scale)
        first_row = torch.arange(codes) * (values + 1)  # of each position, in the table
        self.register_buffer("first_row", first_row, persistent=False)

    def forward(self, codes):
        rows = (codes + self.first_row).view(-1, self.per_group)  # (B · groups, L / groups)
        x = F.embedding_bag(rows, self.table, mode="mean")  # (B · groups, D)
        return x.view(len(codes), self.groups, -1)  # (B, groups, D)


def timestep_features(t):
    """Cosines and sines (B, 256) of t (B,) in [0, 1], as DiT's of 1000 t."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class DiT(nn.Module):
    """Diffusion transformer, with `stem` halving convolutions before the patches and their mirror image
    after. It draws pixels (C = 3) or latents, of side `size`, from codes of `codes` = L positions with
    `values` = V values, read in place on a grid of code_side². `vae` is set from outside for a model of
    latents; only `generate` uses it."""

    def __init__(self, size, patch, stem, width, depth, heads, codes, values, groups, condition, predict,
                 channels=3, code_side=0):
        super().__init__()
        self.side = size // patch
        self.inner_patch = patch >> stem  # side of a patch after the halvings
        self.V, self.condition, self.predict = values, condition, predict
        self.x_shape, self.vae = (channels, size, size), None
        widths = [channels] + [32 << k for k in range(stem)]  # channels of each level, last of patches
        levels = list(zip(widths, widths[1:]))
        patch_width = widths[-1] * self.inner_patch ** 2  # P
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in levels)
        self.head = nn.ModuleList(nn.Conv2d(b, 4 * a, 3, padding=1) for a, b in levels)
        self.x_embed = nn.Linear(patch_width, width)
        self.pos_embed = nn.Parameter(torch.randn(1, self.side ** 2, width) * 0.02)
        self.t_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.code_mean = self.code_context = self.code_place = None
        if condition in ("both", "mean"):
            self.code_mean = CodeEmbedding(codes, values, 1, width)
        if condition == "place":
            self.code_place = CodeEmbedding(codes, values, code_side ** 2, width)
        if condition in ("both", "context"):
            self.code_context = CodeEmbedding(codes, values, groups, width)
            self.context_pos = nn.Parameter(torch.randn(1, groups, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_adaLN = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch_width)
        for p in (self.final_adaLN.weight, self.final_adaLN.bias, self.final.weight, self.final.bias):
            nn.init.zeros_(p)

    def forward(self, z, t, codes=None):
        """Noisy z (B, C, S, S), t (B,) in [0, 1], codes (B, L) long, V: no code → x or v (B, C, S, S)."""
        c = self.t_embed(timestep_features(t))  # (B, D)
        if self.code_mean is not None:
            c = c + self.code_mean(codes)[:, 0]  # (B, D)
        c = F.silu(c)
        skips, h = [], z
        for conv in self.stem:
            h = F.silu(conv(h))  # (B, 32, S / 2, S / 2), (B, 64, S / 4, S / 4), ...
            skips.append(h)
        x = F.pixel_unshuffle(h, self.inner_patch).flatten(2).transpose(1, 2)  # (B, N, P)
        x = self.x_embed(x) + self.pos_embed  # (B, N, D)
        n = x.shape[1]
        if self.code_place is not None:
            side = math.isqrt(self.code_place.groups)  # of the grid of the code
            grid = self.code_place(codes).unflatten(1, (side, side))  # (B, side, side, D)
            zoom = self.side // side
            x = x + grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).flatten(1, 2)  # (B, N, D)
        if self.code_context is not None:
            x = torch.cat([x, self.code_context(codes) + self.context_pos], 1)  # (B, N + G, D)
        for block in self.blocks:
            x = block(x, c)  # (B, N + G, D)
        x = self.final(modulate(x[:, :n], *self.final_adaLN(c).chunk(2, -1)))  # (B, N, P)
        x = x.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, P, side, side)
        h = F.pixel_shuffle(x, self.inner_patch)  # (B, 32 << (stem − 1) or C, S / 2^stem, S / 2^stem)
        for conv, skip in zip(reversed(self.head), reversed(skips)):
            h = F.pixel_shuffle(conv(F.silu(h + skip)), 2)  # twice the side, ..., at last (B, C, S, S)
        return h


# -------- loss -----------------------------------------------------------------------------------------

NEAREST = 0.05  # least 1 − t in the loss with x-prediction: bounds the weight of late t


def velocity(output, z, t, predict, nearest=0.0):
    """Equation (1): an output (B, C, S, S), of the network or the one it should give, at z and t (B,) as a
    velocity; `nearest`: least 1 − t to divide by."""
    output = output.float()
    return output if predict == "v" else (output - z) / (1 - t)[:, None, None, None].clamp(min=nearest)


def drop_codes(codes, null, part, drop, drop_positions):
    """Codes (B, L), each row replaced by "no code" (all `null`) with probability `drop`, each position with
    probability `drop_positions`."""
    dropped = part.uniform(1) < drop  # (B, 1)
    if drop_positions > 0:
        dropped = dropped | (part.uniform(codes.shape[1]) < drop_positions)  # (B, L)
    return torch.where(dropped, null, codes)


def flow_loss(model, x, codes, part, args, run):
    """Equation (2) on x (B, C, S, S), images in [-1, 1] or latents; codes (B, L) long."""
    t = torch.sigmoid(args.t_mean + args.t_std * part.normal())  # (B,)
    e = part.normal(*x.shape[1:])  # (B, C, S, S)
    z = t[:, None, None, None] * x + (1 - t)[:, None, None, None] * e
    with run.autocast():
        output = model(z, t, codes)  # (B, C, S, S)
    if args.predict == "v":
        target = x - e
    else:
        target = velocity(x, z, t, "x", NEAREST)  # the same where 1 − t ≥ NEAREST
    return (velocity(output, z, t, args.predict, NEAREST) - target).square().mean()


# -------- sampler --------------------------------------------------------------------------------------

def integrate(field, z, steps, method="heun"):
    """Solve dz/dt = field(z, t) from t = 0 to 1 in equal steps; z (B, ...), t a float. Heun (second order)
    averages the slope at both ends of a step, but for the last, which is Euler's: velocity (1) is not defined
    at t = 1. The field is called `steps` times by Euler, 2 · steps − 1 times by Heun."""
    for k in range(steps):
        t, dt = k / steps, 1 / steps
        slope = field(z, t)
        if method == "heun" and k < steps - 1:
            slope = (slope + field(z + dt * slope, t + dt)) / 2
        z = z + dt * slope
    return z


def guided_field(model, codes, guidance, interval, run, weak=None):
    """The right-hand side of equation (3) as a function of (z, t). v_null is the model's own without code,
    or, with `weak` (an earlier self), that model's with the code. Without guidance (w = 1, t outside the
    interval, no codes) the network is called once."""
    def call(network, z, t, c):
        t = torch.full((len(z),), t, device=z.device)
        with run.autocast():
            output = network(z, t, c)
        return velocity(output, z, t, network.predict)

    def field(z, t):
        outside = not interval[0] <= t <= interval[1]
        if guidance == 1 or outside or (weak is None and model.condition == "none"):
            return call(model, z, t, codes)
        if weak is not None:
            v = call(model, z, t, codes)
            v_null = call(weak, z, t, codes)
        else:  # both in one call
            both = torch.cat([codes, torch.full_like(codes, model.V)])
            v, v_null = call(model, z.repeat(2, 1, 1, 1), t, both).chunk(2)
        return v_null + guidance * (v - v_null)

    return field


@torch.no_grad()
def generate(model, codes, count, sampler, run, seed=0, weak=None, first=0, batch=250):
    """Images (count, 3, S, S) uint8 on the CPU, from codes (count, L) long (None: without); sampler as
    sampler_settings. The noise of image i follows from (seed, first + i) alone."""
    images = []
    for start in range(0, count, batch):
        numbers = range(first + start, first + min(count, start + batch))  # of these images
        noise = [torch.randn(model.x_shape, generator=data.step_generator(seed, k)) for k in numbers]
        noise = torch.stack(noise).to(run.device)  # (n, C, S, S)
        c = None if codes is None else codes[start:start + batch].to(run.device)
        field = guided_field(model, c, sampler["guidance"], sampler["interval"], run, weak)
        x = integrate(field, noise, sampler["steps"], sampler["method"])  # (n, C, S, S)
        if not x.isfinite().all():
            data.fail("an image that is not finite was drawn; lower --guidance, or try --dtype float32")
        pixels = model.vae.decode(x) if model.vae else x  # (n, 3, S, S)
        images.append(data.to_bytes(pixels.clamp(-1, 1)).cpu())
    return torch.cat(images)


def add_sampler_flags(parser):
    """How images are drawn from a trained generator."""
    add = parser.add_argument_group("image sampler").add_argument
    add("--sample-steps", type=data.positive, default=4, help="steps from noise to image")
    add("--method", choices=("heun", "euler"), default="heun", help="ODE solver")
    add("--guidance", type=data.non_negative, default=1.5, help="w of equation (3); 1: none")
    add("--guidance-interval", type=data.fraction, nargs=2, default=[0.0, 1.0], metavar=("FROM", "TO"),
        help="t in which guidance acts")
    add("--vae", metavar="PATH",
        help="folder of diffusers' AutoencoderKL: work in its latents (sample.py: where it is now, if moved)")


def sampler_settings(args):
    """The sampler flags as the dict that `generate` takes."""
    return {"steps": args.sample_steps, "method": args.method, "guidance": args.guidance,
            "interval": args.guidance_interval}


# -------- latents --------------------------------------------------------------------------------------

class VAE:
    """An AutoencoderKL of diffusers, from the folder of its config.json and weights: pixels (B, 3, S, S) in
    [-1, 1] ↔ scaled latents (B, C, s, s), s = S / down. `id` is the checksum of the weights."""

    def __init__(self, path, device):
        with data.needed_package("diffusers transformers", "--vae"):
            from diffusers import AutoencoderKL
        with data.reading(f"--vae {path}", "expected a folder of diffusers' AutoencoderKL, as sd-vae-ft-ema"):
            path = Path(path)
            config = json.loads((path / "config.json").read_text())
            if config["_class_name"] != "AutoencoderKL":
                raise data.Unfit(f"a {config['_class_name']}")
            self.channels = config["latent_channels"]
            self.down = 2 ** (len(config["block_out_channels"]) - 1)
            self.scale = config["scaling_factor"]  # with the shift it brings latents to about unit variance
            self.shift = config.get("shift_factor") or 0.0
            weights = sorted(path.glob("diffusion_pytorch_model.*"))[-1]  # .safetensors before .bin
            with open(weights, "rb") as file:
                self.id = hashlib.file_digest(file, "sha256").hexdigest()
            self.model = AutoencoderKL.from_pretrained(path, local_files_only=True)
            self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, x):
        """The mean of the posterior, scaled."""
        return (self.model.encode(x).latent_dist.mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z):
        """Pixels of scaled latents."""
        return self.model.decode(z / self.scale + self.shift).sample


def load_latents(args, vae, dataset, run, batch=25):
    """Latents (N, 2 flips, C, s, s) float16 of the dataset, memory-mapped from OUT/<dataset>/latents.pt, and
    made there unless they are of the same images, size and VAE already."""
    path = run.folder / "latents.pt"
    made_from = {"vae": vae.id, "images": dataset.id, "image size": args.image_size, "dtype": "float32"}

    def encode(rows):
        latents = []
        for images in dataset.batches(rows, batch, args.workers):
            x = data.from_bytes(images.to(run.device))  # (b, 3, S, S)
            flips = torch.stack([vae.encode(x), vae.encode(x.flip(3))], 1)  # (b, 2, C, s, s)
            latents.append(flips.half().cpu())
        return {"latents": torch.cat(latents)}

    if not data.is_made_from(path, "latents", made_from):
        folder = run.folder / f".latents-{data.checksum(made_from)[:16]}"
        size = args.image_size // vae.down
        shapes = {"latents": ((2, vae.channels, size, size), torch.float16)}
        made = data.fill_rows(folder, len(dataset), run, encode, shapes)
        if run.main:
            data.save(path, "latents", **made, made_from=made_from)
            del made  # Windows removes no file that is mapped
            shutil.rmtree(folder)
        run.wait()
    return data.read(path, "latents", only="latents")["latents"]


# -------- training -------------------------------------------------------------------------------------

def build_generator(config):
    """The DiT of a dict of settings (a checkpoint's config)."""
    keys = ("patch", "stem", "width", "depth", "heads", "codes", "values", "groups", "condition", "predict",
            "channels")
    return DiT(config["image_size"] // config["down"], **{key: config[key] for key in keys},
               code_side=config.get("code_side", 0))


def load_generator(args, codes_id, device, stage="generator"):
    """The trained model with averaged weights from OUT/<dataset>/<stage>.pt. Refused: one that reads other
    codes, an earlier self of another generator, another VAE than it was trained with."""
    folder = data.run_folder(args)
    path = folder / f"{stage}.pt"
    flags = {"generator-uncond": " --condition none",
             "generator-factors": " --factors --condition both --groups 5"}  # shapes have five
    remedy = "train it with " + data.script_command("generator.py" + flags.get(stage, ""), args)
    state = data.load_trained(path, stage, args.dataset, remedy, codes=codes_id)
    if stage == "generator-early":
        latest = data.load(folder / "generator.pt", "generator", remedy, only="ema")
        if state["id"] != latest["id"]:
            data.fail(f"{path}: not an earlier self of generator.pt; {remedy} --restart")
    with data.reading(path, remedy):
        config, vae_id = state["config"], state["made_from"]["vae"]
        model = build_generator(config)
        model.load_state_dict(state["ema"])
    if args.vae and not vae_id:
        data.fail(f"--vae {args.vae}: {path.name} was trained in pixels; leave the flag away")
    if vae_id:
        vae_path = args.vae or config["vae"]
        model.vae = VAE(vae_path, device)
        if model.vae.id != vae_id:
            data.fail(f"--vae {vae_path}: not the weights that {path.name} was trained with")
    return model.to(device).eval()


def add_flags(parser):
    """The generator's own flags; the defaults are the shapes values."""
    add = parser.add_argument_group("model").add_argument
    add("--size", choices=SIZES, help="width, depth and heads by DiT's name (default: the preset's)")
    add("--patch", type=data.positive, default=8, help="patch side in pixels, or in latents")
    add("--stem", type=data.number(0, 30, int), default=2,
        help="halving convolutions before the patches, mirrored after")
    add("--width", type=data.positive, default=192, help="D, width of the tokens")
    add("--depth", type=data.positive, default=4, help="transformer blocks")
    add("--heads", type=data.positive, default=2, help="attention heads")
    add("--condition", choices=("place", "mean", "context", "both", "none"), default="place",
        help="how the code enters: in place, as a mean, as context tokens, both of these, or not at all (the "
             "baseline)")
    add("--factors", action="store_true", help="read the true factors in place of the code (shapes)")
    add("--groups", type=data.positive, default=4, help="context: G, in-context code tokens")
    add = parser.add_argument_group("flow").add_argument
    add("--predict", choices=("x", "v"),
        help="what the network outputs; the loss is on v in both cases (default: x in pixels, v in latents)")
    add("--t-mean", type=data.number(), default=-0.4, help="mu of equation (1)")
    add("--t-std", type=data.non_negative, default=1.0, help="sigma of equation (1)")
    add("--drop", type=data.fraction, default=0.1, help="probability of training without the code")
    add("--drop-positions", type=data.fraction, default=0.25,
        help="place: probability of training without a position of the code")
    add("--early", type=data.fraction, default=0.25, help="share of the steps before generator-early.pt")


def check_flags(parser, args):
    """What argparse cannot see: sizes that must divide."""
    if args.width % args.heads:
        parser.error(f"argument --heads: {args.heads} does not divide --width {args.width}")
    if args.patch % 2 ** args.stem:
        parser.error(f"argument --stem: {args.stem} halvings do not fit in --patch {args.patch}")
    if args.image_size % args.patch:
        parser.error(f"argument --patch: {args.patch} does not divide --image-size {args.image_size}")
    if args.factors and (args.dataset != "shapes" or args.condition in ("none", "place")):
        parser.error("argument --factors: only for shapes, and with --condition both --groups 5")


def open_inputs(parser, args, stage, dataset, run):
    """Codes, as from data.load_codes: the tokenizer's, the true factors (--factors) or zeros (--condition
    none); and the VAE, or None. What build_generator must know of both is set in `args`."""
    if stage == "generator-uncond":
        stored = {"codes": torch.zeros(len(dataset), 2, 1), "L": 1, "V": 1, "side": 0, "id": "none"}
    elif stage == "generator-factors":
        flips = dataset.labels[:, None].expand(-1, 2, -1)  # (N, 2, factors)
        stored = {"codes": flips, "L": flips.shape[2], "V": int(flips.max()) + 1, "side": 0, "id": "factors"}
    else:
        remedy = "make it with " + data.script_command("tokenizer.py", args)
        stored = data.load_codes(run.folder / "codes.pt", remedy, images_id=dataset.id)
    vae = VAE(args.vae, run.device) if args.vae else None
    args.codes, args.values, args.code_side = stored["L"], stored["V"], stored["side"]
    args.channels, args.down = (vae.channels, vae.down) if vae else (3, 1)
    if args.image_size % (args.patch * args.down):
        parser.error(f"argument --patch: {args.patch} latents of {args.down} pixels do not fit --image-size")
    side = args.image_size // (args.patch * args.down)  # of the grid of tokens
    if args.condition == "place" and (stored["side"] == 0 or side % stored["side"]):
        parser.error("argument --condition: place needs codes of --sem-read patches, on a grid whose side "
                     f"divides that of the generator's tokens, {side}; choose mean, context or both (or make "
                     "codes of an earlier version anew: tokenizer.py --restart)")
    if args.condition in ("both", "context") and args.codes % args.groups:
        parser.error(f"argument --groups: {args.groups} does not divide the {args.codes} code positions")
    return stored, vae


def save_samples(path, model, stored, dataset, args, run):
    """Write a grid of 16 real images and what the model draws from their codes."""
    rows = list(dataset.splits["val"])[:16]
    drawn = generate(model, stored["codes"][rows, 0].long(), len(rows), sampler_settings(args), run)
    images = torch.cat([dataset.pixels(rows), drawn])
    data.save_grid(path, images, 16, settings={**vars(args), "rows": "real, generated"})


def main(argv=None, dataset=None):
    """Train the generator; write a grid of real images and their reconstructions at every checkpoint."""
    parser = data.make_parser(__doc__)
    add_flags(parser)
    data.add_training_flags(parser, steps=2500, batch_size=64, lr=2e-3, lr_matrix=0.0, warmup=50, ema=0.995)
    add_sampler_flags(parser)
    args = data.parse(parser, PRESETS, argv, SIZES)
    check_flags(parser, args)
    args.predict = args.predict or ("v" if args.vae else "x")
    stage = "generator-factors" if args.factors else "generator"
    if args.condition == "none":
        stage = "generator-uncond"

    run = data.Run(args, lock=stage)
    dataset = dataset or data.load_dataset(args)
    train_rows = dataset.splits["train"]
    stored, vae = open_inputs(parser, args, stage, dataset, run)
    torch.manual_seed(args.seed)
    model = build_generator(vars(args)).to(run.device)
    if args.dry_run:
        data.dry_run(args, model, run)  # ends here; on CUDA after two steps
    latents = load_latents(args, vae, dataset, run) if vae else None
    ema = data.averaged(model, args.ema)
    ema.module.vae = vae  # for its samples
    optimizers = data.Optimizers(model, args)
    made_from = {"images": dataset.id, "codes": stored["id"], "vae": vae.id if vae else None}
    checkpoint = data.Checkpoint(stage, args, parser.settings, run, made_from, model, ema, optimizers)
    start = checkpoint.resume()
    wrapped = run.wrap(model, args)
    steps = data.Steps(checkpoint, start, train_rows, args.batch_size)
    batches = None if vae else data.image_batches(dataset, run, args, start)

    for step in steps:
        images = None if vae else next(batches)  # of this process
        loss = 0.0
        for part in data.batch_parts(step, train_rows, args, run, wrapped):
            mirrored = part.flips()  # (b,)
            flip = mirrored.long().cpu()  # (b,) 0 or 1, as latents and codes are stored
            if vae:
                x = latents[part.rows, flip].to(run.device).float()  # (b, C, s, s)
            else:
                x = data.from_bytes(images[part.own])  # (b, 3, S, S)
                x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            c = stored["codes"][part.rows, flip].long().to(run.device)  # (b, L), of the flip that is shown
            if args.condition != "none":
                singly = args.drop_positions if args.condition == "place" else 0.0
                c = drop_codes(c, args.values, part, args.drop, singly)
            loss = loss + part.backward(flow_loss(wrapped, x, c, part, args, run))
        loss = run.average(loss)
        norm = optimizers.step(step, loss)  # stops where the loss or a gradient is not finite
        ema.update_parameters(model)
        steps.show(loss=loss, norm=norm)
        if stage == "generator" and step + 1 == round(args.early * args.steps):
            checkpoint.save_early("generator-early", step + 1)
        if steps.at_checkpoint and run.main and not (args.dry_run or run.stop_asked):
            path = run.folder / "samples" / f"{stage}-{step + 1:06d}.png"
            save_samples(path, ema.module, stored, dataset, args, run)
    run.wait()


if __name__ == "__main__":
    data.run_script(main)
