"""Stage 3: a prior over codes. One transformer (RMSNorm, SwiGLU, RoPE, no biases), used in two ways.

--kind masked, masked diffusion without time (MDLM, RADD). k of the L positions are hidden, k ~ U{1..L}, which ones uniformly:
    − log p(c) ≤ E_k  (L / k) · Σ_{l hidden} − log p(c_l | visible)                                                      (1)
    (the same number as E_t (1/t) Σ ... with each position hidden with probability t ~ U(0, 1], but with less variance)
  sampled from all-hidden by revealing positions: ancestral, one event at a time, or the most confident first.
--kind ar, autoregressive, with exact likelihood and a key-value cache for sampling:
    − log p(c) = Σ_l − log p(c_l | c_1 .. c_{l−1})                                                                        (2)
Both are reported in bits per token, − log₂ p(c) / L, on held-out codes.

Reads OUT/<dataset>/codes.npy; writes OUT/<dataset>/prior-masked.pt or prior-ar.pt.
    python prior.py --kind masked                                              # shapes on a CPU
    python prior.py --kind ar --dataset cifar10                                # one GPU
    torchrun --nproc-per-node 8 prior.py --kind masked --dataset imagenet      # a node
"""
import math

import data  # first: it sets the threads' waiting policy before torch starts them
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    "cifar10": dict(steps=20_000, batch_size=256, width=384, depth=8, heads=6, lr=1e-3, warmup=1000, ema=0.999, dropout=0.1),
    "folder": dict(steps=1000, batch_size=128, depth=2, lr=5e-3, dropout=0.1),
    "imagenet": dict(steps=400_000, batch_size=512, width=1024, depth=24, heads=16, tables="shared", lr=3e-4, lr_matrix=0.0, lr_final=0.1,
                     warmup=2500, ema=0.9999, clip=1.0, dropout=0.1, save_every=5000),
}

STEPS = {"masked": 1800, "ar": 1200}  # of shapes; the masked prior has the harder task

# ---------------------------------------------------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------------------------------------------------


def rope_table(length, size, theta=10_000.0):
    """Cosines and sines (length, size / 2) of rotary positions (Su et al. 2021)."""
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate pairs (i, i + size / 2) of the last dimension by the angles of each position. x (B, H, N, size), cos (N, size / 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def swiglu_hidden(width):
    """Hidden width of the SwiGLU: 8/3 of the width, rounded up to a multiple of 64."""
    return (8 * width // 3 + 63) // 64 * 64


class Block(nn.Module):
    """LLaDA's (and Llama's) block: pre-RMSNorm, rotary attention, SwiGLU, no biases; names as in LLaDA's checkpoints."""

    def __init__(self, width, heads, hidden, dropout, causal):
        super().__init__()
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.heads, self.dropout, self.causal = heads, nn.Dropout(dropout), causal
        self.attn_norm, self.ff_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (linear(width, width) for _ in range(4))
        self.ff_proj, self.up_proj, self.ff_out = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def attention(self, x, cos, sin, attend):
        B, N, D = x.shape
        q, k, v = (proj(x).view(B, N, self.heads, -1).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, H, N, D/H)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = F.scaled_dot_product_attention(q, k, v, attend, is_causal=self.causal)  # (B, H, N, D/H)
        return self.attn_out(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)

    def forward(self, x, cos, sin, attend=None):
        """x (B, N, D), cos and sin (N, D/H/2), attend (B, 1, 1, N) bool: which tokens are seen (default: all) → (B, N, D)."""
        x = x + self.dropout(self.attention(self.attn_norm(x), cos, sin, attend))  # (B, N, D)
        h = self.ff_norm(x)
        return x + self.dropout(self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h)))  # (B, N, D)


class Prior(nn.Module):
    """Transformer over the L positions of a code; causal (autoregressive) or not (masked: value V means hidden).

    tables "position": each position has its own V embeddings and outputs (a value means something else in each position);
    "shared": one vocabulary for all positions, with learned positions.
    """

    def __init__(self, codes, values, width, depth, heads, dropout, causal, tables):
        super().__init__()
        self.L, self.V, self.causal = codes, values, causal
        hidden = swiglu_hidden(width)
        self.wte = nn.Parameter(torch.randn((codes if tables == "position" else 1) * (values + 1), width) * 0.1)
        self.wpe = nn.Parameter(torch.randn(codes, width) * 0.05)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout, causal) for _ in range(depth))
        self.ln_f = nn.RMSNorm(width, eps=1e-5)
        self.ff_out = nn.Parameter(torch.zeros(codes if tables == "position" else 1, width, values))
        self.register_buffer("rope", torch.stack(rope_table(codes, width // heads)), persistent=False)
        self.register_buffer("offset", torch.arange(codes) * (values + 1) * (tables == "position"), persistent=False)

    def embed(self, codes, at=slice(None)):
        """Embeddings (B, L, D) of the values (B, L) of all positions, or (B, D) of those (B,) of position `at`."""
        return F.embedding(codes + self.offset[at], self.wte) + self.wpe[at]

    def forward(self, codes):
        """codes (B, L) long → logits (B, L, V). Masked: of each position given all. Causal: of position l given those before it."""
        x = self.embed(codes)
        if self.causal:  # position l sees the embedding of l − 1; the first sees "no value" at the last position as a start token
            start = self.embed(torch.full_like(codes[:, 0], self.V), self.L - 1)  # (B, D)
            x = torch.cat([start[:, None], x[:, :-1]], 1)  # (B, L, D)
        return self.output(self.transform(x))

    def transform(self, x):
        """Blocks and final norm. (B, L, D) → (B, L, D)."""
        for block in self.blocks:
            x = block(x, *self.rope)  # (B, L, D)
        return self.ln_f(x)

    def output(self, x):
        """Logits (B, L, V) from (B, L, D)."""
        return (x.transpose(0, 1) @ self.ff_out.to(x.dtype)).transpose(0, 1)  # one matrix a position


class Decoder:
    """A causal prior one position at a time, for sampling: weights in the run's dtype, those that read the same input in one matrix, and
    a key-value cache that doubles its length when it is full; between, all calls have the same shapes, positions to come are masked."""

    def __init__(self, model, batch, run):
        self.model, self.heads, width = model, model.blocks[0].heads, model.wpe.shape[1]
        scale = torch.ones(3 * width, 1, device=run.device)
        scale[:width] = (width // self.heads) ** -0.5  # of the attention scores, moved into the queries

        def pack(norm, *parts, scale=1.0):
            """Several matrices as one, with the gain of the norm before them."""
            return (torch.cat([p.weight for p in parts]) * norm.weight * scale).detach().to(run.dtype)

        self.layers = [(pack(b.attn_norm, b.q_proj, b.k_proj, b.v_proj, scale=scale), b.attn_out.weight.detach().to(run.dtype),
                        pack(b.ff_norm, b.ff_proj, b.up_proj), b.ff_out.weight.detach().to(run.dtype)) for b in model.blocks]
        self.ff_out = (model.ln_f.weight[:, None] * model.ff_out).detach().to(run.dtype)  # (L or 1, D, V)
        self.cache = torch.zeros(len(self.layers), 2, batch * self.heads, min(32, model.L), width // self.heads, device=run.device, dtype=run.dtype)
        future = torch.ones(model.L, model.L, device=run.device, dtype=torch.bool).triu(1)
        self.mask = torch.zeros(model.L, 1, model.L, device=run.device, dtype=run.dtype).masked_fill(future[:, None], -math.inf)

    def normal(self, x):
        """RMSNorm without gain of x (B, D), in the dtype of the weights."""
        return F.rms_norm(x, x.shape[-1:], eps=1e-5).to(self.ff_out.dtype)

    @torch.no_grad()
    def __call__(self, previous, at):
        """Logits (B, V) of position `at`, from the values before it (B,) (unused at 0); positions come in order."""
        B, H, model = len(previous), self.heads, self.model
        if at == self.cache.shape[3]:
            longer = torch.zeros_like(self.cache[:, :, :, :min(at, model.L - at)])
            self.cache = torch.cat([self.cache, longer], 3)
        cos, sin = (part[at].to(self.ff_out.dtype) for part in model.rope)  # 2 × (D/H/2,)
        x = model.embed(torch.full_like(previous, model.V) if at == 0 else previous, (at or model.L) - 1)  # (B, D)
        mask = self.mask[at, :, :self.cache.shape[3]]  # (1, length)
        for (qkv, attn_out, gate_up, ff_out), (keys, values) in zip(self.layers, self.cache):
            qk, v = F.linear(self.normal(x), qkv).view(B, 3, H, -1).split((2, 1), 1)  # (B, 2, H, D/H), (B, 1, H, D/H)
            q, k = rotate(qk, cos, sin).unbind(1)  # 2 × (B, H, D/H)
            keys[:, at], values[:, at] = k.reshape(B * H, -1), v.reshape(B * H, -1)  # (B · H, length, D/H)
            share = (torch.bmm(q.reshape(B * H, 1, -1), keys.mT) + mask).softmax(-1)  # (B · H, 1, length)
            x = x + F.linear(torch.bmm(share, values).view(B, -1), attn_out)  # (B, D)
            gate, up = F.linear(self.normal(x), gate_up).chunk(2, -1)  # 2 × (B, hidden)
            x = x + F.linear(F.silu(gate) * up, ff_out)  # (B, D)
        return self.normal(x) @ self.ff_out[at if len(self.ff_out) > 1 else 0]  # (B, V)


# ---------------------------------------------------------------------------------------------------------------------
# loss
# ---------------------------------------------------------------------------------------------------------------------

def hide(codes, null, u, scores):
    """Hide k = ⌊u · n⌋ + 1 of the n positions with a finite score, those of the lowest. codes (B, L), u (B,) in [0, 1), scores (B, L),
    `null` a number or one a position (L,) → codes with `null`, which are hidden (B, L) bool, k (B,)."""
    n = scores.isfinite().sum(1)  # (B,)
    k = ((u * n).floor() + 1).minimum(n)  # in float32 the last u can round to 1
    hidden = scores.argsort(1).argsort(1) < k[:, None]
    return torch.where(hidden, null, codes), hidden, k


def masked_nll(model, codes, null, u, scores, run):
    """The estimate of bound (1) for each code, in nats per token: codes (B, L) → (B,); `null` stands for hidden, u and scores as `hide`."""
    visible, hidden, k = hide(codes, null, u, scores)
    with run.autocast():
        logits = model(visible)  # (B, L, V)
    nll = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")  # (B, L)
    return (nll * hidden).sum(1) / k  # (L / k) Σ, over L


def ar_nll(model, codes, run):
    """Equation (2) for each code, in nats per token: codes (B, L) → (B,)."""
    with run.autocast():
        logits = model(codes)  # (B, L, V)
    return F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").mean(1)


def mean_bits(nll):
    """Mean of (n,) nats in bits, and its standard error."""
    bits = nll.double() / math.log(2)
    return bits.mean().item(), (bits.std(correction=0) / len(bits) ** 0.5).item()


@torch.no_grad()
def bits_per_token(model, codes, run, draws=4, batch=500):
    """Mean bits per token on codes (n, L) long and its standard error; exact for AR, the bound (1) for masked.

    The bound is averaged over `draws` random masks a code, with k spread evenly over 1..L.
    """
    values, generator = [], data.step_generator(0, 0)
    for part in codes.split(batch):
        n = len(part)
        part = part.to(run.device)
        if model.causal:
            values.append(ar_nll(model, part, run))
            continue
        each = []
        for d in range(draws):
            u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
            scores = torch.rand(n, model.L, generator=generator)
            each.append(masked_nll(model, part, model.V, u.to(run.device), scores.to(run.device), run))
        values.append(torch.stack(each).mean(0))
    return mean_bits(torch.cat(values))


# ---------------------------------------------------------------------------------------------------------------------
# samplers
# ---------------------------------------------------------------------------------------------------------------------

def draw_values(logits, temperature, nucleus, u):
    """Draw values (...) from logits (..., V) by inverting the distribution function at u (...) uniform in [0, 1), in float64: temperature,
    then nucleus (the smallest set of values holding that probability). Temperature 0 takes the most likely value, whatever u.

    Returns values and their log-probabilities (...) under the model.
    """
    log_p = logits.double().log_softmax(-1)
    if temperature == 0:
        values = log_p.argmax(-1)
    else:
        p = (log_p / temperature).softmax(-1)
        if nucleus < 1:
            ordered, order = p.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # probability of all likelier values
            before[..., 0] = -1  # the most likely one stays, whatever the nucleus
            p = p.masked_fill((before >= nucleus).gather(-1, order.argsort(-1)), 0.0)
        upto = p.cumsum(-1)  # (..., V)
        u = u.clamp(max=1 - 2.0 ** -52)[..., None]  # so that no rounding reaches the last sum
        values = (upto <= u * upto[..., -1:]).sum(-1)  # the first whose sum is above u: never one of probability 0
    return values, log_p.gather(-1, values[..., None])[..., 0]


BATCH = 500  # samples drawn together; their randomness is drawn for as many, so that a sample does not depend on how many are asked for


@torch.no_grad()
def sample_masked(model, codes, sampler, run, generator, log_weights=None, condition=()):
    """Fill the hidden positions (value V) of codes (n, L) long; given positions never change.

    sampler: dict with order ("ancestral", "event", "confidence"), steps (ancestral), per_step, remask, remask_window,
    temperature, nucleus. log_weights (n, L, V): added to the logits, −inf forbids a value. condition: tensors (n, ...) that the
    model is given beside the codes, row by row. Returns codes (n, L) and the network calls each sample took (n,): at most one a
    hidden position unless remasking hides positions again, because a step that reveals nothing costs nothing.
    """
    codes, given, calls = codes.clone().to(run.device), (codes != model.V).to(run.device), torch.zeros(len(codes), dtype=torch.long)
    condition = [c.to(run.device) for c in condition]
    n, L = codes.shape
    uniform = lambda: torch.rand(max(n, BATCH), L, generator=generator, dtype=torch.float64)[:n].to(run.device)  # (n, L)

    def reveal(rows, where, u):
        """Draw values for positions `where` (m, L) of samples `rows` (m,) by u (n, L) in [0, 1); where None: confidence chooses."""
        calls[rows.cpu()] += 1
        part, u = codes[rows], u[rows]  # (m, L)
        with run.autocast():
            logits = model(part, *(c[rows] for c in condition))  # (m, L, V)
        if log_weights is not None:
            logits = logits.float() + log_weights[rows.cpu()].to(run.device)
        if where is None:  # the most likely of the drawn values first, with Gumbel noise so that samples differ
            values, log_p = draw_values(logits, sampler["temperature"], sampler["nucleus"], u)
            score = log_p - sampler["order_noise"] * torch.log(-torch.log(uniform()[rows].clamp(min=1e-300)))
            ranks = score.masked_fill(part != model.V, -math.inf).argsort(1, descending=True).argsort(1)
            where = (ranks < sampler["per_step"]) & (part == model.V)
            part[where] = values[where]
        else:
            part[where] = draw_values(logits[where], sampler["temperature"], sampler["nucleus"], u[where])[0]
        codes[rows] = part

    if sampler["order"] == "ancestral":
        steps = sampler["steps"]
        for step in range(steps):  # t → s: a hidden position is revealed with probability (t − s + σ (1 − t)) / t, a revealed one
            t, s = 1 - step / steps, 1 - (step + 1) / steps  # is hidden again with probability σ (ReMDM; σ = 0: MDLM)
            inside = sampler["remask_window"][0] <= t <= sampler["remask_window"][1]
            sigma = min(sampler["remask"], s / max(1 - t, 1e-9)) if inside and step > 0 else 0.0
            u, hidden = uniform(), codes == model.V
            again = ~hidden & ~given & (u < sigma)
            rate = (t - s + sigma * (1 - t)) / t if s > 0 else 1.0
            where = hidden & (u < rate)
            rows = where.any(1).nonzero()[:, 0]
            if len(rows):
                reveal(rows, where[rows], u / rate)  # where u < rate, u / rate is uniform again
            codes = torch.where(again, model.V, codes)
        return codes.cpu(), calls
    turn = (uniform() + given * 2).argsort(1).argsort(1) // sampler["per_step"]  # event: hidden positions in random order
    while True:
        rows = (codes == model.V).any(1).nonzero()[:, 0]
        if not len(rows):
            return codes.cpu(), calls
        now = calls[rows.cpu()].to(run.device)[:, None]
        reveal(rows, None if sampler["order"] == "confidence" else (turn[rows] == now) & (codes[rows] == model.V), uniform())


@torch.no_grad()
def redraw_codes(model, codes, rounds, share, sampler, run, generator, log_weights=None):
    """Codes (n, L) after `rounds` in each of which a random `share` of the positions is hidden and drawn again given the others
    (one network call a round, each hidden position on its own: Gibbs sampling where there is one, near it where there are more).
    log_weights as sample_masked."""
    hidden = max(1, round(share * model.L))
    at_once = {**sampler, "order": "event", "per_step": hidden}
    for _ in range(rounds):
        again = torch.rand(codes.shape, generator=generator).argsort(1).argsort(1) < hidden
        codes, _ = sample_masked(model, torch.where(again, model.V, codes), at_once, run, generator, log_weights)
    return codes


@torch.no_grad()
def sample_ar(model, count, sampler, run, generator):
    """Draw codes (count, L) from a causal prior, one position a call. Returns codes and calls (count,)."""
    decoder, codes = Decoder(model, count, run), torch.full((count, model.L), model.V, device=run.device)
    for at in range(model.L):
        u = torch.rand(max(count, BATCH), generator=generator, dtype=torch.float64)[:count].to(run.device)
        codes[:, at] = draw_values(decoder(codes[:, at - 1], at), sampler["temperature"], sampler["nucleus"], u)[0]
    return codes.cpu(), torch.full((count,), model.L)


def sample_codes(model, count, sampler, run, seed=0, first=0):
    """Draw codes (count, L) long and network calls (count,) with either kind of prior. Code k of all, of which these are `first` and those
    after it (a multiple of BATCH), follows from (seed, k) alone."""
    parts = []
    for start in range(0, count, BATCH):
        n, generator = min(BATCH, count - start), data.step_generator(seed, first + start)
        hidden = torch.full((n, model.L), model.V)
        parts.append(sample_ar(model, n, sampler, run, generator) if model.causal else sample_masked(model, hidden, sampler, run, generator))
    return torch.cat([c for c, _ in parts]), torch.cat([k for _, k in parts])


SAMPLERS = {"masked": {"temperature": 1.0, "nucleus": 0.95, "order": "event", "order_noise": 1.0},  # it errs in its tails
            "ar": {"temperature": 1.0, "nucleus": 1.0}}  # it loses variety with less than all


def add_sampler_flags(parser):
    """How codes are drawn from a trained prior; where a flag is not given, what suits the kind of prior (SAMPLERS) holds."""
    g = parser.add_argument_group("code sampler")
    g.add_argument("--temperature", type=data.non_negative, help="of the values' distribution; 0: the most likely (default: by kind, mostly 1)")
    g.add_argument("--nucleus", type=data.share, help="draw from the smallest set of values that holds this probability (default: by kind)")
    g.add_argument("--order", choices=("event", "ancestral", "confidence"), help="masked: which positions are revealed when (default: by kind)")
    g.add_argument("--order-noise", type=data.non_negative, help="confidence: Gumbel noise on the order (default: by kind)")
    g.add_argument("--per-step", type=data.positive, default=1, help="event and confidence: positions revealed in one call")
    g.add_argument("--ancestral-steps", type=data.positive, default=64, help="ancestral: steps from all hidden to none")
    g.add_argument("--remask", type=data.share, default=0.0, help="ancestral: probability of hiding a value again in each step")
    g.add_argument("--remask-window", type=data.share, nargs=2, default=[0.3, 0.55], metavar=("FROM", "TO"), help="t in which --remask acts")


def sampler_settings(args, defaults):
    """The sampler flags as the dict that the samplers take; `defaults` (as in SAMPLERS) for those that were not given."""
    given = {name: getattr(args, name) for name in ("temperature", "nucleus", "order", "order_noise")}
    return {**defaults, **{name: value for name, value in given.items() if value is not None}, "per_step": args.per_step,
            "steps": args.ancestral_steps, "remask": args.remask, "remask_window": args.remask_window}


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------

def build_prior(config):
    """The transformer of a dict of settings (a checkpoint's config)."""
    keys = ("codes", "values", "width", "depth", "heads", "dropout", "tables")
    return Prior(**{k: config[k] for k in keys}, causal=config["kind"] == "ar")


def load_prior(args, kind, device):
    """The trained prior with averaged weights from OUT/<dataset>/prior-<kind>.pt; refuses one trained on other codes."""
    return data.load_stage(f"prior-{kind}", args, lambda state: build_prior(state["config"]))[0].to(device).eval()


def block_flops(tokens, width, hidden):
    """FLOPs of one block, forward, on a sequence of so many tokens."""
    return 2 * tokens * (4 * width ** 2 + 3 * hidden * width) + 4 * tokens ** 2 * width


def training_flops(args):
    """FLOPs of one step, 3 × forward: blocks and the output (attention counted in full also where it is causal)."""
    L, D = args.codes, args.width
    return 3 * args.batch_size * (args.depth * block_flops(L, D, swiglu_hidden(D)) + 2 * L * D * args.values)


def add_flags(parser):
    """The prior's own flags; the defaults are the shapes values."""
    g = parser.add_argument_group("model")
    g.add_argument("--kind", choices=("masked", "ar"), required=True, help="masked diffusion or autoregressive")
    g.add_argument("--width", type=data.positive, default=128, help="D, width of the tokens")
    g.add_argument("--depth", type=data.positive, default=1, help="transformer blocks")
    g.add_argument("--heads", type=data.positive, default=2, help="attention heads")
    g.add_argument("--tables", choices=("position", "shared"), default="position",
                   help="embeddings and outputs: one set a position, or one for all")
    g.add_argument("--dropout", type=data.share, default=0.0, help="on both residual branches")
    add_sampler_flags(parser)


def main(argv=None):
    """Train a prior; report bits per token on held-out codes and network calls per sample."""
    parser = data.make_parser(__doc__)
    data.add_training_flags(parser, steps=None, batch_size=256, lr=1e-2, lr_matrix=0.02, warmup=50)
    add_flags(parser)
    args = data.parse(parser, PRESETS, argv)
    args.steps = args.steps or STEPS[args.kind]
    if args.width % args.heads or args.width // args.heads % 2:
        parser.error(f"argument --heads: --width {args.width} over {args.heads} heads is no even whole number; choose others")
    stage = f"prior-{args.kind}"
    run = data.Run(args, lock=stage)
    codes, about = data.open_codes(args)
    args.codes, args.values = about["L"], about["V"]
    flops, path = training_flops(args), run.folder / f"{stage}.pt"

    def nll_of(model, c, draws):  # (b,)
        if args.kind == "ar":
            return ar_nll(model, c, run)
        return masked_nll(model, c, args.values, draws.stratified(), draws.uniform(args.codes), run)

    if args.dry_run:
        def loss(model):
            draws = data.Draws(0, 0, run, args.batch_size, 0, args.accumulate)
            return nll_of(model, torch.zeros(args.batch_size // run.world // args.accumulate, args.codes, dtype=torch.long), draws).mean()

        return data.describe(args, lambda: build_prior(vars(args)), loss, flops, run)
    if args.batch_size > len(about["splits"]["train"]):
        data.fail(f"--batch-size {args.batch_size} is larger than the {len(about['splits']['train'])} training codes; lower it")
    torch.manual_seed(args.seed)
    model = build_prior(vars(args)).to(run.device)
    optimizers, ema = data.Optimizers(model, args), data.EMA(model, args.ema)
    state = data.resume(path, stage, args, codes=about["sha256"])
    if state:
        data.restore(path, state, model=model, ema=ema, optimizer=optimizers)
    start = state["step"] if state else 0
    trained = run.wrap(model, args)
    log, meter = data.Log(run, stage, start, args.tensorboard), data.Meter(run, args, flops, start, args.batch_size * args.codes, "tokens")
    for step in range(start, args.steps):
        run.seed_step(args.seed, step)
        rows = data.batch_rows(about["splits"]["train"], args.batch_size, args.seed, step)[run.share(args.batch_size)]
        loss = 0.0
        for part in range(args.accumulate):
            draws = data.Draws(args.seed, step, run, args.batch_size, part, args.accumulate)
            flip = (draws.uniform() < 0.5).long().cpu()
            c = torch.from_numpy(codes[rows.chunk(args.accumulate)[part].numpy(), flip.numpy()].astype(np.int64)).to(run.device)
            with run.part(trained, last=part == args.accumulate - 1):
                part_loss = nll_of(trained, c, draws).mean() / args.accumulate
                part_loss.backward()
            loss = loss + part_loss.detach()
        loss = run.average(loss)
        norm = optimizers.step(data.warmup_cosine(step, args), step, loss)
        ema.update(step)
        meter.tick(step, log, loss=loss, norm=norm)
        stopping = run.stopping()
        if run.main and ((step + 1) % args.save_every == 0 or step + 1 == args.steps or stopping):
            data.save_checkpoint(path, stage=stage, config=vars(args), step=step + 1, model=model.state_dict(), ema=ema.state_dict(),
                                 optimizer=optimizers.state_dict(), trained_on={"codes": about["sha256"]})
        if stopping:
            return data.stopped(path, step + 1, args, run)
    meter.close()
    if run.main:
        with data.evaluating(model), ema.applied():
            for split in ("val", "test"):
                held_out = torch.from_numpy(codes[about["splits"][split].start:about["splits"][split].stop, 0].astype(np.int64))
                bits, error = bits_per_token(model, held_out, run)
                log.write(args.steps, **{f"{split} bits per token": round(bits, 4), "standard error": round(error, 4)})
                kind = "exact" if args.kind == "ar" else "upper bound"
                print(f"{split}: {bits:.4f} ± {error:.4f} bits per token ({kind}, {len(held_out):,} codes)")
            _, calls = sample_codes(model, 100, sampler_settings(args, SAMPLERS[args.kind]), run)
            print(f"network calls per sample: {calls.float().mean():.1f} for {args.codes} positions")
    run.close()


if __name__ == "__main__":
    data.command(main)
