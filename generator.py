"""Stage 2: codes → images. A diffusion transformer (DiT, adaLN-Zero) that reads the code, trained by rectified flow.

A straight path from noise e to image x; the network predicts x and is compared as a velocity:
    z_t = t·x + (1 − t)·e,  t = sigmoid(n), n ~ N(mu, sigma²)         v = x − e = (x − z_t) / (1 − t)                   (1)
    loss = E ‖v_net(z_t, t, c) − v‖²                                                                                    (2)
    dz/dt = v_null + w·(v_c − v_null) while t is in the guidance interval, else v_c;  from t = 0 (noise) to t = 1       (3)
The code c (L positions) enters as the mean of one embedding per position, beside t in adaLN, and as G in-context tokens, each
the mean over L / G positions (paper, section 3.2 has the mean alone). Whole codes are dropped for guidance.

In pixels, or with --vae in the latents of an autoencoder, encoded once into OUT/<dataset>/latents.npy.
Reads images and OUT/<dataset>/codes.npy; writes OUT/<dataset>/generator.pt, generator-early.pt (guidance by a weaker self);
with --condition none, generator-uncond.pt: the baseline without codes; with --factors, generator-factors.pt: the reference
that reads the true factors (shapes) in place of codes.
    python generator.py                                                        # shapes on a CPU
    python generator.py --dataset cifar10                                      # one GPU
    torchrun --nproc-per-node 8 generator.py --dataset imagenet                # a node, pixels, patch 16
    torchrun --nproc-per-node 8 generator.py --dataset imagenet --vae sd-vae-ft-ema --patch 2 --size XL        # the paper's latents
"""
import json
import math
import shutil
from pathlib import Path

import data  # first: it sets the threads' waiting policy before torch starts them
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    "cifar10": dict(steps=100_000, batch_size=256, patch=2, stem=0, width=384, depth=12, heads=6, groups=16, lr=3e-4, warmup=2000, ema=0.9999,
                    sample_steps=10),
    "folder": dict(steps=4000, save_every=500, sample_steps=6),
    "imagenet": dict(steps=500_000, batch_size=256, image_size=256, patch=16, stem=0, width=1152, depth=28, heads=16, groups=32, lr=1e-4,
                     lr_matrix=0.0, lr_final=1.0, warmup=5000, ema=0.9999, clip=1.0, save_every=5000, sample_steps=25, workers=12),
}
SIZES = {"S": dict(width=384, depth=12, heads=6), "B": dict(width=768, depth=12, heads=12), "L": dict(width=1024, depth=24, heads=16),
         "XL": dict(width=1152, depth=28, heads=16)}  # --size, over the preset; the names of DiT

# ---------------------------------------------------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------------------------------------------------


def modulate(x, shift, scale):
    """LayerNorm without weights, then scale and shift each sample: x (B, N, D), shift and scale (B, D)."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale[:, None])


class Attention(nn.Module):
    """Self-attention with normalised queries and keys. (B, N, D) → (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 × (B, H, N, D/H)
        q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)


class SwiGLU(nn.Module):
    """Gated MLP, w2(silu(w1 x) · w3 x), hidden 8/3 of the width. (..., D) → (..., D)."""

    def __init__(self, width):
        super().__init__()
        hidden = swiglu_hidden(width)
        self.w13, self.w2 = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, x = self.w13(x).chunk(2, -1)  # 2 × (..., hidden)
        return self.w2(F.silu(gate) * x)  # (..., D)


def swiglu_hidden(width):
    """8/3 of the width, rounded up to a multiple of 64: as many weights as an MLP of ratio 4."""
    return (8 * width // 3 + 63) // 64 * 64


class Block(nn.Module):
    """DiT block: each branch is shifted, scaled and gated by the condition, and starts as the identity (adaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), SwiGLU(width)
        self.adaLN = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.adaLN.weight), nn.init.zeros_(self.adaLN.bias)

    def forward(self, x, c):
        """x (B, N, D) tokens, c (B, D) condition after its SiLU → (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN(c).chunk(6, -1)  # 6 × (B, D)
        x = torch.addcmul(x, gate_a[:, None], self.attn(modulate(x, shift_a, scale_a)))  # (B, N, D)
        return torch.addcmul(x, gate_m[:, None], self.mlp(modulate(x, shift_m, scale_m)))  # (B, N, D)


class CodeEmbedding(nn.Module):
    """Codes (B, L) with values 0..V (V: no code) → (B, groups, D): the mean of one embedding per position over each group."""

    def __init__(self, codes, values, groups, width):
        super().__init__()
        self.groups, self.per_group = groups, codes // groups
        self.table = nn.Parameter(torch.randn(codes * (values + 1), width) * 0.7 * self.per_group ** 0.5)  # means deviate by 0.7
        self.register_buffer("offset", torch.arange(codes) * (values + 1), persistent=False)

    def forward(self, codes):
        rows = (codes + self.offset).view(-1, self.per_group)  # (B · groups, L / groups)
        return F.embedding_bag(rows, self.table, mode="mean").view(len(codes), self.groups, -1)  # (B, groups, D)


class DiT(nn.Module):
    """Diffusion transformer, with a few halving convolutions before the patches and their mirror image after. What it draws, x, is pixels
    (C = 3) or latents of size × size; `vae` turns latents into pixels (set by whoever draws; None: x is pixels)."""

    def __init__(self, size, patch, stem, width, depth, heads, codes, values, groups, condition, predict, channels=3):
        super().__init__()
        self.patch, self.side, self.V, self.condition, self.predict = patch >> stem, size // patch, values, condition, predict
        self.x_shape, self.vae = (channels, size, size), None
        channels = [channels] + [32 << k for k in range(stem)]
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, channels[1:]))
        self.head = nn.ModuleList(nn.Conv2d(b, 4 * a, 3, padding=1) for a, b in zip(channels, channels[1:]))
        self.x_embed = nn.Linear(channels[-1] * self.patch ** 2, width)
        self.pos_embed = nn.Parameter(torch.randn(1, self.side ** 2, width) * 0.02)
        self.t_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.code_mean = CodeEmbedding(codes, values, 1, width) if condition in ("both", "mean") else None
        self.code_context = CodeEmbedding(codes, values, groups, width) if condition in ("both", "context") else None
        self.context_pos = nn.Parameter(torch.randn(1, groups, width) * 0.02) if self.code_context else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_adaLN = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, channels[-1] * self.patch ** 2)
        for p in (self.final_adaLN.weight, self.final_adaLN.bias, self.final.weight, self.final.bias):
            nn.init.zeros_(p)

    def forward(self, z, t, codes=None):
        """z (B, C, S, S) noisy x, t (B,) in [0, 1], codes (B, L) long with V for "no code" → x or v (B, C, S, S)."""
        c = self.t_embed(timestep_features(t).to(z.dtype))  # (B, D)
        if self.code_mean is not None:
            c = c + self.code_mean(codes)[:, 0]  # (B, D)
        c = F.silu(c)
        skips, h = [], z
        for conv in self.stem:
            h = F.silu(conv(h))  # (B, 32, S / 2, S / 2), (B, 64, S / 4, S / 4), ...
            skips.append(h)
        x = self.x_embed(F.pixel_unshuffle(h, self.patch).flatten(2).transpose(1, 2)) + self.pos_embed  # (B, N, D)
        n = x.shape[1]
        if self.code_context is not None:
            x = torch.cat([x, self.code_context(codes) + self.context_pos], 1)  # (B, N + G, D)
        for block in self.blocks:
            x = block(x, c)  # (B, N + G, D)
        x = self.final(modulate(x[:, :n], *self.final_adaLN(c).chunk(2, -1)))  # (B, N, channels · p²)
        h = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch)  # (B, channels, S / 2^stem, ...)
        for conv, skip in zip(reversed(self.head), reversed(skips)):
            h = F.pixel_shuffle(conv(F.silu(h + skip)), 2)  # half the channels, twice the side, at last (B, C, S, S)
        return h


def timestep_features(t):
    """Sines and cosines (B, 256) of t (B,) in [0, 1] at frequencies from 1000 down to 0.1 (DiT's, with t · 1000)."""
    angles = 1000 * t.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
    return torch.cat([angles.cos(), angles.sin()], 1)


# ---------------------------------------------------------------------------------------------------------------------
# loss
# ---------------------------------------------------------------------------------------------------------------------

NEAREST = 0.05  # 1 − t is not taken below this in equation (2) with x-prediction: the weight of the last moments stays bounded


def velocity(output, z, t, predict, nearest=0.0):
    """The network's output as a velocity, equation (1). output, z (B, C, S, S); t (B,), 1 − t taken as at least `nearest`."""
    output = output.float()
    return output if predict == "v" else (output - z) / (1 - t)[:, None, None, None].clamp(min=nearest)


def drop_codes(codes, null, draws, drop):
    """Codes (B, L) of which a share `drop` of the rows is replaced by "no code" (all `null`), so that guidance has a weak side."""
    return torch.where(draws.uniform(1) < drop, null, codes)


def flow_loss(model, x, codes, draws, args, run):
    """Equation (2) on x (B, C, S, S), images in [-1, 1] or latents; codes (B, L) long or None. `draws` gives all randomness."""
    t = torch.sigmoid(args.t_mean + args.t_std * draws.normal())  # (B,)
    e = draws.normal(*x.shape[1:])
    z = t[:, None, None, None] * x + (1 - t)[:, None, None, None] * e
    with run.autocast():
        output = model(z, t, codes)
    target = x - e if args.predict == "v" else velocity(x, z, t, "x", NEAREST)  # the same where 1 − t ≥ NEAREST
    return (velocity(output, z, t, args.predict, NEAREST) - target).square().mean()


# ---------------------------------------------------------------------------------------------------------------------
# sampler
# ---------------------------------------------------------------------------------------------------------------------

def integrate(field, z, steps, method="heun"):
    """Solve dz/dt = field(z, t) from t = 0 to 1 in equal steps; field takes z (B, ...) and a float t.

    Euler is first order. Heun (second order) averages the slope at both ends of a step; its last step is an Euler step,
    because the velocity of equation (1) is not defined at t = 1. Calls of the field: steps, or 2 · steps − 1.
    """
    for k in range(steps):
        t, dt = k / steps, 1 / steps
        slope = field(z, t)
        if method == "heun" and k < steps - 1:
            slope = (slope + field(z + dt * slope, t + dt)) / 2
        z = z + dt * slope
    return z


def guided_field(model, codes, guidance, interval, run, weak=None):
    """The right-hand side of equation (3) as a function of (z, t).

    The weak velocity is the model's own without code, or, with `weak` (an earlier checkpoint), that model's with the code.
    Guidance 1, t outside the interval, or a model without codes: one network call, no guidance.
    """
    null = None if codes is None else torch.full_like(codes, model.V)

    def call(network, z, t, c):
        t = torch.full((len(z),), t, device=z.device)
        with run.autocast():
            output = network(z, t, c)
        return velocity(output, z, t, network.predict)

    def field(z, t):
        if guidance == 1 or not interval[0] <= t <= interval[1] or (weak is None and model.condition == "none"):
            return call(model, z, t, codes)
        if weak is not None:
            v, v_weak = call(model, z, t, codes), call(weak, z, t, codes)
        else:  # both in one call
            v, v_weak = call(model, z.repeat(2, 1, 1, 1), t, torch.cat([codes, null])).chunk(2)
        return v_weak + guidance * (v - v_weak)

    return field


@torch.no_grad()
def generate(model, codes, count, sampler, run, seed=0, weak=None, first=0, batch=250):
    """Images (count, 3, S, S) uint8 on the CPU, from codes (count, L) long (None: without codes).

    sampler: dict with steps, method, guidance, interval. Image k of all, of which these are `first` and those after it, follows from
    (seed, k) alone, whatever its neighbours.
    """
    images = []
    for start in range(0, count, batch):
        n = min(batch, count - start)
        noise = torch.stack([torch.randn(model.x_shape, generator=data.step_generator(seed, first + start + k)) for k in range(n)])
        c = None if codes is None else codes[start:start + n].to(run.device)
        field = guided_field(model, c, sampler["guidance"], sampler["interval"], run, weak)
        x = integrate(field, noise.to(run.device), sampler["steps"], sampler["method"])  # (n, C, S, S)
        if not x.isfinite().all():
            data.fail(f"images that are not finite were drawn; lower --guidance ({sampler['guidance']:g}) or try --dtype float32")
        images.append(data.to_bytes((model.vae.decode(x) if model.vae else x).clamp(-1, 1)).cpu())
    return torch.cat(images)


def add_sampler_flags(parser):
    """How images are drawn from a trained generator; the one home of these defaults."""
    g = parser.add_argument_group("image sampler")
    g.add_argument("--sample-steps", type=data.positive, default=4, help="steps from noise to image")
    g.add_argument("--method", choices=("heun", "euler"), default="heun", help="ODE solver")
    g.add_argument("--guidance", type=data.non_negative, default=2.0, help="w of equation (3); 1: none")
    g.add_argument("--vae", metavar="PATH", help="work in the latents of this folder of diffusers' AutoencoderKL (default: in pixels; in "
                   "sample.py the folder of the training)")
    g.add_argument("--guidance-interval", type=data.share, nargs=2, default=[0.0, 1.0], metavar=("FROM", "TO"), help="t in which guidance acts")


def sampler_settings(args):
    """The sampler flags as the dict that `generate` takes."""
    return {"steps": args.sample_steps, "method": args.method, "guidance": args.guidance, "interval": args.guidance_interval}


# ---------------------------------------------------------------------------------------------------------------------
# latents
# ---------------------------------------------------------------------------------------------------------------------

def read_vae(path):
    """What the folder of diffusers' AutoencoderKL says of itself: channels, how many pixels are a side of a latent (down), scale and shift
    that bring latents to about unit variance, and a checksum of its weights."""
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text())
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"config.json says {config.get('_class_name')}")
        weights = [file for end in ("safetensors", "bin") if (file := path / f"diffusion_pytorch_model.{end}").is_file()]
        if not weights:
            raise ValueError("no diffusion_pytorch_model.safetensors or .bin")
        channels, blocks, scale, shift = (config.get(key) for key in ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor"))
        if type(channels) is not int or channels < 1 or not isinstance(blocks, list) or not 1 <= len(blocks) < 10 or type(scale) not in (int, float) or \
                type(shift or 0.0) not in (int, float):
            raise ValueError(f"latent_channels {channels}, block_out_channels {blocks}, scaling_factor {scale}, shift_factor {shift}")
        return {"channels": channels, "down": 2 ** (len(blocks) - 1), "scale": scale, "shift": shift or 0.0, "sha256": data.file_checksum(weights[0])}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        data.fail(f"--vae {path}: not a folder of diffusers' AutoencoderKL ({problem}); expected config.json and the weights, as in sd-vae-ft-ema")


class VAE:
    """An AutoencoderKL of diffusers: pixels (B, 3, S, S) in [-1, 1] ↔ scaled latents (B, C, S / down, S / down); about: its read_vae."""

    def __init__(self, path, about, device):
        self.about = about
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            data.fail("--vae needs packages: pip install diffusers transformers")
        try:
            self.model = AutoencoderKL.from_pretrained(path, local_files_only=True).to(device).eval().requires_grad_(False)
        except Exception as problem:  # whatever diffusers raises
            data.fail(f"--vae {path}: diffusers cannot load it ({type(problem).__name__}: {str(problem)[:200]})")

    @torch.no_grad()
    def encode(self, x):
        """The mean of the posterior, scaled."""
        return (self.model.encode(x).latent_dist.mean - self.about["shift"]) * self.about["scale"]

    @torch.no_grad()
    def decode(self, z):
        """Pixels of scaled latents."""
        return self.model.decode(z / self.about["scale"] + self.about["shift"]).sample


def open_latents(args, vae, dataset, run, batch=25):
    """Latents (N, 2 flips, C, S, S) float16 of the whole dataset, memory-mapped from OUT/<dataset>/latents.npy; made there by a VAE, once,
    beside latents.json (what is known of the VAE, image size and images, and the checksum of the latents)."""
    path = run.folder / "latents.npy"
    about = {**vae.about, "image_size": args.image_size, "images": dataset.checksum}
    try:
        latents = np.load(path, mmap_mode="r")
        known = json.loads(path.with_suffix(".json").read_text())
        if known == {**about, "latents": known["latents"]} and known["latents"] == data.file_checksum(path):
            return latents
    except Exception:  # none yet, or not whole (numpy reads the header as Python, which can be wrong in many ways): made again
        pass

    def work(rows):
        parts = []
        for images in dataset.batches(rows, batch, args.workers):
            images = data.unit(images.to(run.device))
            with run.autocast():
                parts.append(torch.stack([vae.encode(x) for x in (images, images.flip(3))], 1).half().cpu().numpy())
        return {"latents": np.concatenate(parts)}

    folder = run.folder / f".latents-{data.checksum(about)[:16]}"
    chunks = data.in_chunks(folder, len(dataset), run, work)
    if run.main:
        path.with_suffix(".json").unlink(missing_ok=True)
        data.join_chunks(chunks, "latents", len(dataset), path)
        data.write_json(path.with_suffix(".json"), {**about, "latents": data.file_checksum(path)})
        shutil.rmtree(folder)
    run.wait()
    return np.load(path, mmap_mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------

def build_generator(config):
    """The DiT of a dict of settings (a checkpoint's config)."""
    keys = ("patch", "stem", "width", "depth", "heads", "codes", "values", "groups", "condition", "predict", "channels")
    return DiT(config["image_size"] // config.get("down", 1), **{k: config[k] for k in keys if k in config})


def load_generator(args, device, stage="generator"):
    """The trained model with averaged weights from OUT/<dataset>/<stage>.pt; refuses one trained on other codes, or with another VAE, and an
    earlier self of another generator."""
    model, state = data.load_stage(stage, args, lambda state: build_generator(state["config"]))
    config = state["config"]
    if stage == "generator-early":
        now = data.load_checkpoint(data.run_folder(args) / "generator.pt", "generator", args)["config"]
        if others := [name for name in now if name not in data.NOT_SETTINGS and now[name] != config.get(name)]:
            data.fail(f"{stage}.pt is not an earlier self of generator.pt: it has another {', '.join(others)}; train both again with "
                      f"{data.stage_command('generator', args)} --restart")
    if config.get("vae_sha256"):
        path = args.vae or config["vae"]
        about = read_vae(path)
        if about["sha256"] != config["vae_sha256"]:
            data.fail(f"--vae {path}: not the weights that {stage}.pt was trained with; name the folder of the training")
        model.vae = VAE(path, about, device)
    elif args.vae:
        data.fail(f"--vae {args.vae}: {stage}.pt was trained in pixels; leave the flag away")
    return model.to(device).eval()


def codes_to_read(args):
    """Codes (N, 2, L) and what is known of them: those of the tokenizer, the true factors (--factors), or none."""
    if args.condition == "none":
        return None, {"L": 1, "V": 1, "sha256": None}
    if not args.factors:
        return data.open_codes(args)
    labels = data.load_dataset(args).labels.numpy()
    return np.stack([labels, labels], 1), {"L": labels.shape[1], "V": int(labels.max()) + 1, "sha256": None}


def training_flops(args):
    """FLOPs of one step, 3 × forward: blocks with their modulation, embeddings, stem and head convolutions."""
    D, n, hidden = args.width, (args.image_size // args.down // args.patch) ** 2, swiglu_hidden(args.width)
    tokens = n + (args.groups if args.condition in ("both", "context") else 0)
    block = 2 * tokens * (4 * D ** 2 + 3 * hidden * D) + 4 * tokens ** 2 * D + 12 * D ** 2
    channels, side, convs = args.channels, args.image_size // args.down, 0
    for k in range(args.stem):
        side //= 2
        convs, channels = convs + 2 * side ** 2 * 9 * channels * (32 << k) * (1 + 4), 32 << k
    pixels = 2 * 2 * n * channels * (args.patch >> args.stem) ** 2 * D
    return 3 * args.batch_size * (args.depth * block + convs + pixels + 2 * (256 * D + D ** 2) + 4 * D ** 2)


def add_flags(parser):
    """The generator's own flags; the defaults are the shapes values."""
    g = parser.add_argument_group("model")
    g.add_argument("--size", choices=SIZES, help=  # data.parse takes it for a preset
                   "width, depth and heads by the name of DiT's size (default: as the dataset's preset says)")
    g.add_argument("--patch", type=data.positive, default=8, help="patch side in pixels, or in latents")
    g.add_argument("--stem", type=data.whole, default=2, help="halving convolutions before the patches, mirrored after; 0: plain patches")
    g.add_argument("--width", type=data.positive, default=192, help="D, width of the tokens")
    g.add_argument("--depth", type=data.positive, default=4, help="transformer blocks")
    g.add_argument("--heads", type=data.positive, default=2, help="attention heads")
    g.add_argument("--condition", choices=("both", "mean", "context", "none"), default="both", help="how the code enters; none: the baseline")
    g.add_argument("--factors", action="store_true", help="read the true factors in place of the code: the reference for shapes")
    g.add_argument("--groups", type=data.positive, default=4, help="G, in-context code tokens")
    g = parser.add_argument_group("flow")
    g.add_argument("--predict", choices=("x", "v"), help="what the network outputs; the loss is on v in both cases (default: x in pixels, v in latents)")
    g.add_argument("--t-mean", type=data.number, default=-0.4, help="mu of equation (1)")
    g.add_argument("--t-std", type=data.non_negative, default=1.0, help="sigma of equation (1)")
    g.add_argument("--drop", type=data.share, default=0.1, help="probability of training without the code")
    g.add_argument("--early", type=data.share, default=0.25, help="share of the steps after which generator-early.pt is kept")
    add_sampler_flags(parser)


def check_flags(parser, args):
    """What argparse cannot see: sizes that must divide."""
    if args.width % args.heads:
        parser.error(f"argument --heads: {args.heads} does not divide --width {args.width}")
    if args.image_size % (args.patch * args.down):
        parser.error(f"argument --patch: {args.patch}{f' times the {args.down} pixels of a latent' if args.vae else ''} does not divide --image-size "
                     f"{args.image_size}")
    if args.factors and (args.dataset != "shapes" or args.condition == "none"):
        parser.error("argument --factors: only shapes has known factors, and --condition must read them")
    if args.stem > 30 or args.patch % (1 << args.stem):
        parser.error(f"argument --stem: {args.stem} halvings do not fit in --patch {args.patch}")


def main(argv=None):
    """Train the generator; write a grid of real images and their reconstructions at every checkpoint."""
    parser = data.make_parser(__doc__)
    data.add_training_flags(parser, steps=2500, batch_size=64, lr=2e-3, lr_matrix=0.0, warmup=50)
    add_flags(parser)
    args = data.parse(parser, PRESETS, argv, SIZES)
    about_x = read_vae(args.vae) if args.vae else {"channels": 3, "down": 1, "sha256": None}  # of what the network draws
    args.channels, args.down, args.vae_sha256 = (about_x[key] for key in ("channels", "down", "sha256"))
    args.predict = args.predict or ("v" if args.vae else "x")
    check_flags(parser, args)
    stage = "generator-uncond" if args.condition == "none" else "generator-factors" if args.factors else "generator"
    run = data.Run(args, lock=stage)
    codes, about = codes_to_read(args)
    args.codes, args.values = about["L"], about["V"]
    if args.condition in ("both", "context") and args.codes % args.groups:
        parser.error(f"argument --groups: {args.groups} does not divide the {args.codes} positions of the codes")
    flops, path = training_flops(args), run.folder / f"{stage}.pt"
    if args.dry_run:
        def loss(model):
            draws = data.Draws(0, 0, run, args.batch_size, 0, args.accumulate)
            b = args.batch_size // run.world // args.accumulate
            return flow_loss(model, torch.zeros(b, *model.x_shape), torch.zeros(b, args.codes, dtype=torch.long), draws, args, run)

        return data.describe(args, lambda: build_generator(vars(args)), loss, flops, run)
    dataset = data.load_dataset(args)
    if "images" in about:
        data.check_images(about, dataset, args)
    vae = VAE(args.vae, about_x, run.device) if args.vae else None
    latents = open_latents(args, vae, dataset, run) if vae else None
    torch.manual_seed(args.seed)
    model = build_generator(vars(args)).to(run.device)
    model.vae = vae
    optimizers, ema = data.Optimizers(model, args), data.EMA(model, args.ema)
    trained_on = {"images": dataset.checksum, "codes": about["sha256"]}
    state = data.resume(path, stage, args, **trained_on)
    if state:
        data.restore(path, state, model=model, ema=ema, optimizer=optimizers)

    def save(step, name=stage):
        if run.main:
            whole = {} if name == "generator-early" else dict(model=model.state_dict(), optimizer=optimizers.state_dict())
            data.save_checkpoint(run.folder / f"{name}.pt", stage=name, config=vars(args), step=step, ema=ema.state_dict(),
                                 trained_on=trained_on, **whole)

    grid = lambda step: run.folder / "samples" / f"{stage}-{step:06d}.png"

    def show(step):
        rows = list(dataset.splits["val"])[:16]
        c = None if codes is None else torch.from_numpy(codes[rows, 0].astype(np.int64))
        with data.evaluating(model), ema.applied():
            samples = generate(model, c, len(rows), sampler_settings(args), run)
        data.save_grid(grid(step), torch.cat([dataset.pixels(rows), samples]), 16,
                       settings={**vars(args), "rows": "real, generated"})

    start = state["step"] if state else 0
    trained = run.wrap(model, args)
    log, meter = data.Log(run, stage, start, args.tensorboard), data.Meter(run, args, flops, start, args.batch_size)
    batches = data.image_batches(dataset, run, args, start) if latents is None else data.row_batches(dataset, args, start)
    for step, rows, images in batches:
        run.seed_step(args.seed, step)
        loss = 0.0
        for part in range(args.accumulate):
            draws = data.Draws(args.seed, step, run, args.batch_size, part, args.accumulate)
            mine = rows[run.share(len(rows))].chunk(args.accumulate)[part]
            flip = draws.uniform() < 0.5
            at, c = (mine.numpy(), flip.long().cpu().numpy()), None
            if latents is None:
                x = data.unit(images.chunk(args.accumulate)[part])
                x = torch.where(flip[:, None, None, None], x.flip(3), x)  # (b, 3, S, S)
            else:
                x = torch.from_numpy(latents[at]).to(run.device).float()  # (b, C, S, S)
            if codes is not None:  # the code of the flip that the network is shown
                c = torch.from_numpy(codes[at].astype(np.int64)).to(run.device)  # (b, L)
                c = drop_codes(c, args.values, draws, args.drop)
            with run.part(trained, last=part == args.accumulate - 1):
                part_loss = flow_loss(trained, x, c, draws, args, run) / args.accumulate
                part_loss.backward()
            loss = loss + part_loss.detach()
        loss = run.average(loss)
        norm = optimizers.step(data.warmup_cosine(step, args), step, loss)
        ema.update(step)
        meter.tick(step, log, loss=loss, norm=norm)
        stopping = run.stopping()
        if stage == "generator" and step + 1 == round(args.early * args.steps):
            save(step + 1, "generator-early")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stopping:
            save(step + 1)
            if run.main and not stopping:
                show(step + 1)
        if stopping:
            return data.stopped(path, step + 1, args, run)
    meter.close()
    if run.main and not grid(args.steps).exists():  # killed between the last checkpoint and its samples
        show(args.steps)
    run.close()


if __name__ == "__main__":
    data.command(main)
