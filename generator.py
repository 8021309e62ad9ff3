"""Stage 2: codes → images. A diffusion transformer (DiT, adaLN-Zero) that reads the code, by rectified flow.

A straight path from noise e to image x; the network predicts x and is compared as a velocity:
    z_t = t·x + (1 − t)·e,  t = sigmoid(n), n ~ N(mu, sigma²)       v = x − e = (x − z_t) / (1 − t)        (1)
    loss = E ‖v_net(z_t, t, c) − v‖², where both v divide by .05 at least                                  (2)
    dz/dt = v_null + w·(v_c − v_null) in the guidance interval of t, else v_c; from t = 0 (noise) to 1     (3)
The code c (L positions) can enter as the mean of one embedding per position, beside t in adaLN (the paper,
section 3.2), as G in-context tokens, each the mean over L / G positions, and in place: where the tokenizer
reads each patch into positions of its own, their mean is added to the token of that patch. In training whole
codes are dropped, for v_null, and, in place, single positions. --predict noise: the paper's own diffusion.

Reads images and OUT/<dataset>/codes.pt; writes generator.pt there. References: --condition none reads no
codes (generator-uncond.pt), --factors the true factors of shapes (generator-factors.pt). With --vae it works
in latents, kept in latents.pt, not in pixels.
    python generator.py                                                      # the dataset shapes, on a CPU
    python generator.py --dataset cifar10                                    # one GPU
    torchrun --nproc-per-node 8 generator.py --dataset imagenet              # a node, pixels, patch 16
    torchrun --nproc-per-node 8 generator.py --dataset imagenet --vae sd-vae-ft-ema --patch 2 --size XL
"""
import functools
import hashlib
import json
import math
import shutil
from collections import OrderedDict
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
    """Self-attention; queries and keys normalised, or `plain`, as DiT's. (B, N, D) → (B, N, D)."""

    def __init__(self, width, heads, plain=False):
        super().__init__()
        self.heads, self.plain = heads, plain
        self.qkv = nn.Linear(width, 3 * width, bias=plain)
        self.proj = nn.Linear(width, width, bias=plain)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 × (B, H, N, D/H)
        if not self.plain:
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


def plain_mlp(width):
    """DiT's own MLP, fc2(gelu(fc1 x)). (..., D) → (..., D)."""
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(width, 4 * width),
        gelu=nn.GELU(approximate="tanh"),
        fc2=nn.Linear(4 * width, width)))


class Block(nn.Module):
    """DiT block, adaLN-Zero: the condition shifts, scales and gates each branch. It starts as identity."""

    def __init__(self, width, heads, plain=False):
        super().__init__()
        self.attn = Attention(width, heads, plain)
        self.mlp = plain_mlp(width) if plain else SwiGLU(width)
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
        first_row = torch.arange(codes, device="cpu") * (values + 1)  # of each position, in the table
        self.register_buffer("first_row", first_row, persistent=False)

    def forward(self, codes):
        rows = (codes + self.first_row).view(-1, self.per_group)  # (B · groups, L / groups)
        x = F.embedding_bag(rows, self.table, mode="mean")  # (B · groups, D)
        return x.view(len(codes), self.groups, -1)  # (B, groups, D)


def timestep_features(k):
    """Cosines and sines (B, 256) of k (B,) from 0 to 1000, as DiT's."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=k.device) / 128)
    angles = k.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class DiT(nn.Module):
    """Diffusion transformer, with `stem` halving convolutions before the patches and their mirror image
    after. It draws pixels (C = 3) or latents, of side `size`, from codes of `codes` = L positions with
    `values` = V values, in place on a grid of code_side². predict "x" or "v", at a time t in [0, 1]; or
    "noise" and its variance, 2 C channels, at a level from 0 to 999. `vae`: set for one of latents."""

    def __init__(self, size, patch, stem, width, depth, heads, codes, values, groups, condition, predict,
                 channels=3, code_side=0, block="gated"):
        super().__init__()
        self.side = size // patch  # of the grid of tokens
        self.code_side = code_side
        self.inner_patch = patch >> stem  # side of a patch after the halvings
        self.V, self.condition, self.predict = values, condition, predict
        self.x_shape = (channels, size, size)
        self.vae = None
        widths = [channels] + [32 << k for k in range(stem)]  # channels of z and after each halving
        patch_width = widths[-1] * self.inner_patch ** 2  # P
        self.stem = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        outputs = [channels * (2 if predict == "noise" else 1)] + widths[1:]
        output_width = outputs[-1] * self.inner_patch ** 2  # Q
        self.head = nn.ModuleList(nn.Conv2d(b, 4 * a, 3, padding=1) for a, b in zip(outputs, outputs[1:]))
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
        self.blocks = nn.ModuleList(Block(width, heads, block == "plain") for _ in range(depth))
        self.final_adaLN = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, output_width)
        for p in (self.final_adaLN.weight, self.final_adaLN.bias, self.final.weight, self.final.bias):
            nn.init.zeros_(p)

    def forward(self, z, t, codes=None):
        """Noisy z (B, C, S, S), time or level t (B,), codes (B, L) long, V: no code → (B, C or 2 C, S, S)."""
        c = self.t_embed(timestep_features(t if self.predict == "noise" else 1000 * t.float()))  # (B, D)
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
            grid = self.code_place(codes).unflatten(1, (self.code_side, -1))  # (B, code_side, code_side, D)
            zoom = self.side // self.code_side
            x = x + grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).flatten(1, 2)  # (B, N, D)
        if self.code_context is not None:
            x = torch.cat([x, self.code_context(codes) + self.context_pos], 1)  # (B, N + G, D)
        for block in self.blocks:
            x = block(x, c)  # (B, N + G, D)
        x = self.final(modulate(x[:, :n], *self.final_adaLN(c).chunk(2, -1)))  # (B, N, Q)
        x = x.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, Q, side, side)
        h = F.pixel_shuffle(x, self.inner_patch)  # (B, Q / inner_patch², S / 2^stem, S / 2^stem)
        for conv, skip in zip(reversed(self.head), reversed(skips)):
            h = F.pixel_shuffle(conv(F.silu(h + skip)), 2)  # twice the side, ..., at last (B, .., S, S)
        return h


# -------- loss -----------------------------------------------------------------------------------------

NEAREST = 0.05  # least 1 − t in the loss with x-prediction: bounds the weight of late t


def velocity(output, z, t, predict, nearest=0.0):
    """The velocity of equation (1) that belongs to an output (B, C, S, S), the network's or the ideal one, at
    z and t (B,), or one number; `nearest`: least 1 − t to divide by."""
    output = output.float()
    if predict == "v":
        return output
    t = torch.as_tensor(t, device=z.device).view(-1, 1, 1, 1)
    if predict == "noise":
        return (z - output) / t
    return (output - z) / (1 - t).clamp(min=nearest)


def drop_codes(codes, null, part, drop, drop_positions):
    """Codes (B, L), each row replaced by "no code" (all `null`) with probability `drop`, each position with
    probability `drop_positions`, a number or (L,)."""
    dropped = part.uniform(1) < drop  # (B, 1)
    if torch.is_tensor(drop_positions) or drop_positions > 0:
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
        target = velocity(x, z, t, "x", NEAREST)  # x − e, but less where 1 − t < NEAREST
    return (velocity(output, z, t, args.predict, NEAREST) - target).square().mean()


# -------- sampler --------------------------------------------------------------------------------------

def integrate(field, z, times, method="heun"):
    """Solve dz/dt = field(z, t) from the first to the last of `times`, which is 1; z (B, ...), t a float.
    Heun (second order) averages the slope at both ends of a step, but for the last, which is Euler's:
    velocity (1) is not defined at t = 1. So n steps call the field 2 n − 1 times, by Euler n times."""
    for t, after in zip(times, times[1:]):
        dt = after - t
        slope = field(z, t)
        if method == "heun" and after < 1:
            slope = (slope + field(z + dt * slope, after)) / 2
        z = z + dt * slope
    return z


def guided_network(model, codes, args, run):
    """network(z, t, level): the model's output at z (B, C, S, S), guided as the velocity is in (3), with and
    without code in one batch. `level` is what the model takes as its time: t, or the level of noise."""
    w = args.guidance
    first, last = args.guidance_interval

    def network(z, t, level):
        C, c = z.shape[1], codes
        guided = w != 1 and first <= t <= last and model.condition != "none"
        if guided:
            z = z.repeat(2, 1, 1, 1)  # (2 B, C, S, S)
            c = torch.cat([codes, torch.full_like(codes, model.V)])  # (2 B, L)
        with run.autocast():
            output = model(z, torch.full((len(z),), level, device=z.device), c).float()
        if guided:
            output, null = output.chunk(2)  # 2 × (B, C or 2 C, S, S)
            output[:, :C] = null[:, :C] + w * (output[:, :C] - null[:, :C])  # a learned variance stays
        return output

    return network


# --- the paper's own diffusion (--predict noise) ---

@functools.lru_cache
class NoiseLevels:
    """DDPM (Ho et al. 2020) with a learned variance (Nichol and Dhariwal 2021), as in DiT. Level k of 1,000:
        z_k = √ᾱ_k x + √(1 − ᾱ_k) e,  ᾱ_k = Π_{j ≤ k} (1 − s_j),  s from 1e-4 to .02 in a line         (4)
    `kept` of them are used, evenly spread: row i of the tables (kept, 1, 1, 1) is level numbers[i]. From k to
    the one kept before it, b (before the first ᾱ_b = 1), with β_k = 1 − ᾱ_k / ᾱ_b:
        q(z_b | z_k, x) = N(mean, β̃_k),  β̃_k = β_k (1 − ᾱ_b) / (1 − ᾱ_k)
        mean = (√ᾱ_b β_k x + √(1 − β_k) (1 − ᾱ_b) z_k) / (1 − ᾱ_k)                                      (5)
    The network says ê and u, (B, C, S, S) each; a step draws from N(mean of (5) at x̂, variance), with
        x̂ = (z_k − √(1 − ᾱ_k) ê) / √ᾱ_k,  log variance = f log β_k + (1 − f) log β̃_k,  f = (u + 1) / 2 (6)
    times[i] is the t of the flow with the same ratio of image to noise, √ᾱ_k / √(1 − ᾱ_k) = t / (1 − t)."""

    def __init__(self, kept=1000, device="cpu"):
        strides = torch.full((kept,), 999 / max(1, kept - 1), dtype=torch.float64)
        strides[0] = 0
        numbers = strides.cumsum(0).round().long()  # summed as DiT's are: multiples may round otherwise
        s = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        alpha = (1 - s).cumprod(0)[numbers]  # ᾱ
        before = F.pad(alpha[:-1], (1, 0), value=1.0)
        beta = 1 - alpha / before
        posterior = beta * (1 - before) / (1 - alpha)  # β̃
        posterior[0] = posterior[min(1, kept - 1)]  # it is 0 at the first

        def spread(table):
            return table.float()[:, None, None, None].to(device)

        self.numbers = numbers.tolist()
        self.times = (alpha.sqrt() / (alpha.sqrt() + (1 - alpha).sqrt())).tolist()
        self.signal, self.noise = spread(alpha.sqrt()), spread((1 - alpha).sqrt())
        self.of_x = spread(before.sqrt() * beta / (1 - alpha))
        self.of_z = spread((1 - beta).sqrt() * (1 - before) / (1 - alpha))
        self.log_beta, self.log_posterior = spread(beta.log()), spread(posterior.log())

    def posterior_mean(self, x, z, i):
        """Equation (5) at rows i, (B,) or one number, from x and z (B, C, S, S)."""
        return self.of_x[i] * x + self.of_z[i] * z

    def step(self, e, u, z, i):
        """Mean and log-variance (B, C, S, S) of equation (6) from what the network says, e and u."""
        x = (z - self.noise[i] * e) / self.signal[i]
        f = (u + 1) / 2
        log_variance = f * self.log_beta[i] + (1 - f) * self.log_posterior[i]
        return self.posterior_mean(x, z, i), log_variance

    def bound_bits(self, x, z, i, mean, log_variance):
        """The variational bound's term of such a step, in bits a dimension (B,): KL(q ‖ step) or, at level 0,
        −log of the probability that it gives to the byte of x (DiT takes latents for bytes too)."""
        ratio = self.log_posterior[i] - log_variance
        squares = (self.posterior_mean(x, z, i) - mean).square() * torch.exp(-log_variance)
        kl = 0.5 * (ratio.exp() - 1 - ratio + squares)

        def normal_cdf(a):  # as nearly as GELU's tanh is: DiT's own
            return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a ** 3)))

        scale = torch.exp(-0.5 * log_variance)
        below = torch.where(x < -0.999, 0.0, normal_cdf((x - mean - 1 / 255) * scale))
        upto = torch.where(x > 0.999, 1.0, normal_cdf((x - mean + 1 / 255) * scale))
        byte = -(upto - below).clamp(min=1e-12).log()
        nats = torch.where((i == 0)[:, None, None, None], byte, kl)
        return nats.flatten(1).mean(1) / math.log(2)


def noise_loss(model, x, codes, part, args, run):
    """mean (ê − e)² + one term of the bound in bits, which trains the variance alone: ê is held fixed there.
    Arguments as flow_loss."""
    levels = NoiseLevels(1000, x.device)
    i = (part.uniform() * 1000).long()  # (B,)
    e = part.normal(*x.shape[1:])  # (B, C, S, S)
    z = levels.signal[i] * x + levels.noise[i] * e
    with run.autocast():
        output = model(z, i, codes)  # (B, 2 C, S, S)
    said, u = output.float().chunk(2, 1)
    bits = levels.bound_bits(x, z, i, *levels.step(said.detach(), u, z, i))  # (B,)
    return (said - e).square().mean() + bits.mean()


def solve(model, codes, draw, args, run):
    """Noise of draw() (B, C, S, S) → x of the same shape, by a model that is guided by codes (B, L)."""
    network = guided_network(model, codes, args, run)
    z = draw()
    steps = args.sample_steps
    if model.predict != "noise":
        times = [k / steps for k in range(steps + 1)]
        return integrate(lambda z, t: velocity(network(z, t, t), z, t, model.predict), z, times,
                         args.method or "heun")
    levels = NoiseLevels(steps, z.device)
    level_at = dict(zip(levels.times, levels.numbers))

    def field(z, t):  # z of the flow: that of (4) times √(t² + (1 − t)²)
        e, _ = network(z / math.hypot(t, 1 - t), t, level_at[t]).chunk(2, 1)  # (B, C, S, S)
        return velocity(e, z, t, "noise")

    if args.method:
        times = [*levels.times[::-1], 1.0]
        start = z * math.hypot(times[0], 1 - times[0])
        return integrate(field, start, times, args.method)
    for i in reversed(range(steps)):  # equation (6)
        said = network(z, levels.times[i], levels.numbers[i])  # (B, 2 C, S, S)
        z, log_variance = levels.step(*said.chunk(2, 1), z, i)
        if i > 0:
            z = z + torch.exp(0.5 * log_variance) * draw()
    return z


@torch.no_grad()
def generate(model, codes, args, run, seed=0, first=0, preview=False):
    """Images (n, 3, S, S) uint8 on the CPU, from codes (n, L) long, as the sampler flags say. The noise of
    image i follows from (seed, first + i) alone."""
    images = []
    for start in range(0, len(codes), args.batch):
        c = codes[start:start + args.batch].to(run.device)  # (b, L)
        generators = [data.step_generator(seed, first + start + k) for k in range(len(c))]

        def draw():
            noise = [torch.randn(model.x_shape, generator=generator) for generator in generators]
            return torch.stack(noise).to(run.device)  # (b, C, S, S)

        x = solve(model, c, draw, args, run)  # (b, C, S, S)
        if not x.isfinite().all():
            wrong = ("what was drawn is not finite everywhere; lower --guidance, try --dtype float32, or "
                     "more --sample-steps with --predict noise")
            if not preview:
                data.fail(wrong)
            data.note(f"note: {wrong}; grey there")
            x = x.nan_to_num(0.0, 0.0, 0.0)
        pixels = model.vae.decode(x) if model.vae else x  # (b, 3, S, S)
        images.append(data.to_bytes(pixels.clamp(-1, 1)).cpu())
    return torch.cat(images)


def add_sampler_flags(parser):
    """How images are drawn from a trained generator."""
    add = parser.add_argument_group("image sampler").add_argument
    add("--sample-steps", type=data.number(1, 1000, int), default=4, help="steps from noise to image")
    add("--method", choices=("heun", "euler"),
        help="ODE solver (default: heun; for --predict noise the steps (6), 100 or more of them)")
    add("--guidance", type=data.non_negative, default=1.5, help="w of equation (3); 1: none")
    add("--batch", type=data.positive, default=250, help="images drawn together")
    add("--guidance-interval", type=data.fraction, nargs=2, default=[0.0, 1.0], metavar=("FROM", "TO"),
        help="t in which guidance acts")
    add("--vae", metavar="PATH",
        help="folder of diffusers' AutoencoderKL: work in its latents (sample.py: where it is now, if moved)")


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
            self.channels = config["latent_channels"]
            self.down = 2 ** (len(config["block_out_channels"]) - 1)
            self.scale = config["scaling_factor"]  # with the shift it brings latents to about unit variance
            self.shift = config.get("shift_factor") or 0.0
            weights = sorted(path.glob("diffusion_pytorch_model.*"))[-1]  # .safetensors rather than .bin
            self.id = hashlib.sha256(weights.read_bytes()).hexdigest()
            self.model = AutoencoderKL.from_pretrained(path, local_files_only=True, low_cpu_mem_usage=False)
            self.model.to(device).eval().requires_grad_(False)
            self.model.enable_slicing()  # one image at a time: a batch takes many gigabytes

    def encode(self, x):
        """The mean of the posterior, scaled."""
        return (self.model.encode(x).latent_dist.mean - self.shift) * self.scale

    def decode(self, z):
        """Pixels of scaled latents."""
        return self.model.decode(z / self.scale + self.shift).sample


def load_latents(args, vae, dataset, run):
    """Latents (N, 2 flips, C, s, s) float16 of the dataset, memory-mapped from latents.pt, made there unless
    they are of these images and this VAE already."""
    path = run.folder / "latents.pt"
    made_from = {"vae": vae.id, "images": dataset.id, "image size": args.image_size, "dtype": "float32"}

    def encode(rows):
        latents = []
        for images in dataset.batches(rows, 25, args.workers):
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


# -------- building and loading -------------------------------------------------------------------------

REFERENCES = {  # stage: what it reads in place of codes, and the flags that train it
    "generator-uncond": ("none", " --condition none"),
    "generator-factors": ("factors", " --factors --condition both --groups 5"),  # shapes have five
}


def build_generator(config):
    """The DiT of a dict of settings (a checkpoint's config)."""
    keys = ("patch", "stem", "width", "depth", "heads", "codes", "values", "groups", "condition", "predict",
            "channels")
    return DiT(config["image_size"] // config["down"], **{key: config[key] for key in keys},
               code_side=config.get("code_side", 0), block=config.get("block", "gated"))


def load_generator(args, codes_id, device, stage="generator"):
    """The trained model with averaged weights. Refused: of other codes or another VAE."""
    path = data.run_folder(args) / f"{stage}.pt"
    reads, flags = REFERENCES.get(stage, (codes_id, ""))
    remedy = "train it with " + data.script_command("generator.py" + flags, args)
    state = data.load_trained(path, stage, args.dataset, remedy, codes=reads)
    with data.reading(path, remedy):
        vae_path = args.vae or state["config"]["vae"]
        vae_id = state["made_from"]["vae"]
        model = build_generator(state["config"])
        model.load_state_dict(state["ema"])
    if vae_path and not vae_id:
        data.fail(f"--vae {vae_path}: {path.name} was trained in pixels; leave the flag away")
    if vae_id:
        model.vae = VAE(vae_path, device)
        if model.vae.id != vae_id:
            data.fail(f"--vae {vae_path}: not the weights that {path.name} was trained with")
    return model.to(device).eval()


# -------- the authors' release (sample.py --release, --init) -------------------------------------------

RELEASED_NAMES = {  # replaced in this order
    "x_embedder.proj": "x_embed", "t_embedder.mlp": "t_embed", "adaLN_modulation.1": "adaLN",
    "sem_embedder.embedding_table": "code_mean.table",
    "final_layer.linear": "final", "final_layer.": "final_"}


def read_release(folder):
    """The weights of the authors' DiT (a folder DLC_DiT_L512 of a diffusers pipeline) by the names of DiT
    above, and its settings, as of a checkpoint's config, which their shapes tell."""
    path = Path(folder) / "transformer"
    state = {}
    for name, x in data.read_weights(path).items():
        for theirs, ours in RELEASED_NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = x
    with data.reading(path, "expected the authors' DiT"):
        codes, rows, width = state["code_mean.table"].shape
        _, channels, patch, _ = state["x_embed.weight"].shape
        state["code_mean.table"] = state["code_mean.table"].flatten(0, 1)
        state["x_embed.weight"] = state["x_embed.weight"].flatten(1)  # channel, row, column: pixel_unshuffle
        for kind in ("weight", "bias"):  # row, column, channel; pixel_shuffle: channel, row, column
            final = state[f"final.{kind}"].unflatten(0, (patch ** 2, 2 * channels))
            state[f"final.{kind}"] = final.transpose(0, 1).flatten(0, 1)
        config = dict(
            image_size=math.isqrt(state["pos_embed"].shape[1]) * patch, down=1,  # of latents
            channels=channels,
            patch=patch, stem=0, width=width, codes=codes, values=rows - 1, groups=1, condition="mean",
            predict="noise", block="plain", heads=data.released_config(path).get("num_heads", 16),
            depth=len([name for name in state if name.endswith("attn.qkv.weight")]))
    return state, config


def load_release(folder, device):
    """The authors' DiT with its autoencoder, ready to draw."""
    state, config = read_release(folder)
    with data.reading(Path(folder) / "transformer", "expected the authors' DiT"):
        with torch.device("meta"):  # without memory of its own
            model = build_generator(config)
        model.load_state_dict(state, assign=True)
    model.vae = VAE(Path(folder) / "vae", device)
    return model.to(device).eval()


# -------- training -------------------------------------------------------------------------------------

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
    add("--block", choices=("gated", "plain"), default="gated",
        help="plain: DiT's own, biases and GELU; gated: normalised queries and keys and SwiGLU")
    add("--condition", choices=("place", "mean", "context", "both", "none"), default="place",
        help="how the code enters: in place, as a mean, as context tokens, both of these, or not at all (the "
             "baseline)")
    add("--factors", action="store_true", help="read the true factors in place of the code (shapes)")
    add("--groups", type=data.positive, default=4, help="context: G, in-context code tokens")
    add = parser.add_argument_group("flow").add_argument
    add("--predict", choices=("x", "v", "noise"),
        help="what the network outputs: x or v, with the loss on v, or noise, as in DDPM (default: x in "
             "pixels, v in latents)")
    add("--t-mean", type=data.number(), default=-0.4, help="mu of equation (1)")
    add("--t-std", type=data.non_negative, default=1.0, help="sigma of equation (1)")
    add("--drop", type=data.fraction, default=0.1, help="probability of training without the code")
    add("--drop-positions", type=data.fraction, default=0.25,
        help="place: probability of training without a position of the code (with --colour-codes: without "
             "one of colour)")
    add = parser.add_argument_group("start of the run").add_argument
    add("--init", metavar="DIR", help="start from the authors' weights, the folder DLC_DiT_L512")


def parse(argv=None):
    """The flags of this script, checked as far as argparse cannot see: their parser and values."""
    parser = data.make_parser(__doc__)
    add_flags(parser)
    data.add_training_flags(parser, steps=2500, batch_size=64, lr=2e-3, lr_matrix=0.0, warmup=50, ema=0.995)
    add_sampler_flags(parser)
    args = data.parse(parser, PRESETS, argv, SIZES)
    if args.width % args.heads:
        parser.error(f"argument --heads: {args.heads} does not divide --width {args.width}")
    if args.patch % 2 ** args.stem:
        parser.error(f"argument --stem: {args.stem} halvings do not fit in --patch {args.patch}")
    if args.factors and (args.dataset != "shapes" or args.condition in ("none", "place")):
        parser.error("argument --factors: only for shapes, and with --condition both --groups 5")
    args.predict = args.predict or ("v" if args.vae else "x")
    return parser, args


def open_inputs(parser, args, stage, dataset, run):
    """Codes, as from data.load_codes, or what a reference reads in their place; and the VAE, or None. What
    build_generator must know of both is set in `args`."""
    if stage in REFERENCES:
        codes = dataset.labels if args.factors else torch.zeros(len(dataset), 1)  # (N, L)
        stored = {"codes": codes[:, None].expand(-1, 2, -1), "L": codes.shape[1], "V": int(codes.max()) + 1,
                  "side": 0, "colour_codes": 0, "id": REFERENCES[stage][0]}
    else:
        remedy = "make it with " + data.script_command("tokenizer.py", args)
        stored = data.load_codes(run.folder / "codes.pt", remedy, images_id=dataset.id)
    vae = VAE(args.vae, run.device) if args.vae else None
    args.codes, args.values, args.code_side = stored["L"], stored["V"], stored["side"]
    args.channels, args.down = (vae.channels, vae.down) if vae else (3, 1)
    side, left = divmod(args.image_size, args.patch * args.down)  # of the grid of tokens
    if left:
        parser.error(f"argument --patch: patches of {args.patch * args.down} pixels do not fit --image-size "
                     f"{args.image_size}")
    if args.condition == "place" and (args.code_side == 0 or side % args.code_side):
        parser.error("argument --condition: place needs codes of --sem-read patches, on a grid whose side "
                     f"divides that of the generator's tokens, {side}; choose mean, context or both")
    if args.condition in ("both", "context") and args.codes % args.groups:
        parser.error(f"argument --groups: {args.groups} does not divide the {args.codes} code positions")
    return stored, vae


def main(argv=None, dataset=None):
    """Train the generator; write a grid of real images and their reconstructions at every checkpoint."""
    parser, args = parse(argv)
    loss_of = noise_loss if args.predict == "noise" else flow_loss
    stage = "generator-factors" if args.factors else "generator"
    if args.condition == "none":
        stage = "generator-uncond"

    run = data.Run(args, lock=stage)
    dataset = dataset or data.load_dataset(args)
    train_rows = dataset.splits["train"]
    data.fit_batch(parser, args, train_rows)
    stored, vae = open_inputs(parser, args, stage, dataset, run)
    torch.manual_seed(args.seed)
    model = build_generator(vars(args)).to(run.device)
    if args.init:  # a run that goes on loads its own weights over these
        with data.reading(args.init, "expected the authors' DLC_DiT_L512, and flags that fit it"):
            state, sizes = read_release(args.init)
            data.fill_as_flags_say(model, state, sizes, args)
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
    drop_positions = args.drop_positions if args.condition == "place" else 0.0
    if stored["colour_codes"] and drop_positions > 0:  # of colour only: else form would be guessed from it
        drop_positions = drop_positions * data.colour_positions(stored).to(run.device)  # (L,)

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
                c = drop_codes(c, args.values, part, args.drop, drop_positions)
            loss = loss + part.backward(loss_of(wrapped, x, c, part, args, run))
        loss = run.average(loss)
        norm = optimizers.step(step, loss)  # stops where the loss or a gradient is not finite
        ema.update_parameters(model)
        steps.show(loss=loss, norm=norm)
        if steps.at_checkpoint and run.main and not (args.dry_run or run.stop_asked):
            rows = list(dataset.splits["val"])[:16]
            codes = stored["codes"][rows, 0].long()  # (16, L)
            drawn = generate(ema.module, codes, args, run, preview=True)
            shown = torch.cat([dataset.pixels(rows), drawn])
            path = run.folder / "samples" / f"{stage}-{step + 1:06d}.png"
            data.save_grid(path, shown, 16, settings={**vars(args), "rows": "real, generated"})
    run.wait()


if __name__ == "__main__":
    data.run_script(main)
