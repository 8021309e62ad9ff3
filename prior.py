"""Stage 3: a prior over codes of L positions with V values each. One transformer (RMSNorm, SwiGLU, RoPE, no
biases), used in two ways.

--kind masked, masked diffusion without time (MDLM, RADD). k of the L positions are hidden, k ~ U{1..L}, which
ones uniformly:
    − log p(c) ≤ E_k  (L / k) · Σ_{l hidden} − log p(c_l | visible)                                        (1)
That is the same number as E_t (1/t) Σ ... with each position hidden with probability t ~ U(0, 1], with less
variance. Sampled from all-hidden by revealing positions: ancestral, one event at a time, or the surest first;
then in --rounds a share of them is drawn again, given the others.

--kind ar, autoregressive, with exact likelihood and a key-value cache for sampling:
    − log p(c) = Σ_l − log p(c_l | c_1 .. c_{l−1})                                                         (2)

Both are reported in bits per token, − log₂ p(c) / L, on held-out codes; "token" there is one position. (H:
attention heads.) Where each patch has P positions of its own, the transformer sees them as one of N = L / P
tokens; what is hidden, drawn and counted are positions all the same.

Reads OUT/<dataset>/codes.pt; writes OUT/<dataset>/prior-masked.pt or prior-ar.pt.
    python prior.py --kind masked                                            # the dataset shapes, on a CPU
    python prior.py --kind ar --dataset cifar10                              # one GPU
    torchrun --nproc-per-node 8 prior.py --kind masked --dataset imagenet    # a node
"""
import copy
import math

import data  # first: it sets the threads' waiting policy before torch starts them
import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    "cifar10": dict(
        width=384, depth=8, heads=6, dropout=0.1,
        steps=20_000, batch_size=256, lr=1e-3, warmup=1000, ema=0.999),
    "folder": dict(
        depth=2, token="position", dropout=0.1,
        batch_size=128, lr=5e-3, save_every=500),
    "imagenet": dict(
        width=1024, depth=24, heads=16, tables="shared", dropout=0.1,
        steps=400_000, batch_size=512, lr=3e-4, lr_matrix=0.0, lr_final=0.1, warmup=2500, ema=0.9999,
        clip=1.0, save_every=5000),
}

BY_KIND = {"masked": dict(depth=2, steps=1800), "ar": dict(depth=1, steps=1600)}  # masked is the harder task
FOLDER_STEPS = {"masked": 1000, "ar": 250}  # the codes of few images are soon known by heart

# -------- model ----------------------------------------------------------------------------------------

def rope_table(length, size, theta=10_000.0):
    """Cosines and sines (2, length, size / 2) of rotary positions (Su et al. 2021)."""
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, cos, sin):
    """Rotate pairs (i, i + size / 2) of the last dimension of x (..., N, size) by the angles of each
    position: cos and sin (N, size / 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def swiglu_hidden(width):
    """Hidden width of the SwiGLU: 8/3 of the width, rounded up to a multiple of 64."""
    return (8 * width // 3 + 63) // 64 * 64


def linear(inputs, outputs):
    """A linear layer without bias."""
    return nn.Linear(inputs, outputs, bias=False)


class Block(nn.Module):
    """LLaDA's (and Llama's) block: pre-RMSNorm, rotary attention, SwiGLU, no biases; names as in LLaDA's
    checkpoints."""

    def __init__(self, width, heads, inner, dropout, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.dropout = nn.Dropout(dropout)
        self.attn_norm = nn.RMSNorm(width, eps=1e-5)
        self.ff_norm = nn.RMSNorm(width, eps=1e-5)
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, width)
        self.v_proj = linear(width, width)
        self.attn_out = linear(width, width)
        self.ff_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.ff_out = linear(inner, width)

    def attention(self, x, cos, sin, attend, cache):
        B, N, D = x.shape
        q = self.q_proj(x).view(B, N, self.heads, -1).transpose(1, 2)  # (B, H, N, D/H)
        k = self.k_proj(x).view(B, N, self.heads, -1).transpose(1, 2)  # (B, H, N, D/H)
        v = self.v_proj(x).view(B, N, self.heads, -1).transpose(1, 2)  # (B, H, N, D/H)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            x = F.scaled_dot_product_attention(q, k, v, attend, is_causal=self.causal)  # (B, H, N, D/H)
        else:  # the newest token sees all; written out, as torch's is slow for one on a CPU
            keys, values = cache  # 2 × (B, H, n, D/H)
            keys[:, :, -1:] = k
            values[:, :, -1:] = v
            scores = (keys @ q.mT).mT * q.shape[-1] ** -0.5  # (B, H, 1, n); q @ keys.mT is slow in bfloat16
            x = scores.softmax(-1) @ values  # (B, H, 1, D/H)
        return self.attn_out(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)

    def forward(self, x, cos, sin, attend=None, cache=None):
        """x (B, N, D), cos and sin (N, D/H/2), attend (B, 1, 1, N) bool: which tokens are seen (default: all)
        → (B, N, D). With a cache (2, B, H, n, D/H), the keys and values of n tokens, x (B, 1, D) is the last
        of them: its own are written there."""
        x = x + self.dropout(self.attention(self.attn_norm(x), cos, sin, attend, cache))  # (B, N, D)
        h = self.ff_norm(x)
        return x + self.dropout(self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h)))  # (B, N, D)


class Within(nn.Module):
    """What an autoregressive prior adds where a token stands for P positions: each of them also knows the
    values of those before it in its token, by the sum of their embeddings `earlier` and a SwiGLU."""

    def __init__(self, rows, width, inner):
        super().__init__()
        self.earlier = nn.Parameter(torch.randn(rows, width) * 0.1)
        self.ff_norm = nn.RMSNorm(width, eps=1e-5)
        self.ff_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.ff_out = linear(inner, width)

    def forward(self, x, before):
        """x: the token of each position, before: the sum of `earlier` over those before it in the token, all
        (B, L, D), or (B, 1, D) for one position → the same shape."""
        x = x + before
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))  # (B, L, D)


class Prior(nn.Module):
    """Transformer over the L positions of a code; causal (autoregressive) or not (masked). The value V stands
    for hidden, or, causal, starts the sequence. `per_token` = P neighbouring positions (those of a patch)
    make one of the N = L / P tokens, by the sum of their embeddings.

    tables "position": each position has its own V embeddings and outputs (a value means something else in
    each position); "shared": one vocabulary for all positions."""

    def __init__(self, codes, values, width, depth, heads, dropout, causal, tables, per_token=1):
        super().__init__()
        self.L, self.V, self.P, self.causal = codes, values, per_token, causal
        vocabularies = codes if tables == "position" else 1
        inner = swiglu_hidden(width)
        self.wte = nn.Parameter(torch.randn(vocabularies * (values + 1), width) * 0.1)
        self.wpe = nn.Parameter(torch.randn(codes, width) * 0.05)
        self.blocks = nn.ModuleList(Block(width, heads, inner, dropout, causal) for _ in range(depth))
        self.ln_f = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Parameter(torch.zeros(vocabularies, width, values))
        if causal and per_token > 1:
            self.within = Within(len(self.wte), width, inner)
        first_row = (torch.arange(codes) % vocabularies) * (values + 1)  # of each position, in wte; shared: 0
        self.register_buffer("first_row", first_row, persistent=False)
        rope = rope_table(codes // per_token, width // heads)
        self.register_buffer("rope", rope, persistent=False)

    def embed(self, codes, positions=slice(None)):
        """Embeddings (B, l, D) of the values (B, l) of all positions, or of some."""
        return F.embedding(codes + self.first_row[positions], self.wte) + self.wpe[positions]

    def start(self, codes):
        """The token (B, 1, D) before the first: value V at position L − 1."""
        return self.embed(torch.full_like(codes[:, :1], self.V), slice(self.L - 1, self.L))

    def forward(self, codes):
        """codes (B, L) long → logits (B, L, V). Masked: of each position given all. Causal: of position l
        given those before it."""
        x = self.embed(codes).unflatten(1, (-1, self.P)).sum(2)  # (B, N, D)
        if self.causal:  # shifted by one token
            x = torch.cat([self.start(codes), x[:, :-1]], 1)  # (B, N, D)
        cos, sin = self.rope  # 2 × (N, D/H/2)
        for block in self.blocks:
            x = block(x, cos, sin)  # (B, N, D)
        if self.P > 1:
            x = x.repeat_interleave(self.P, 1)  # (B, L, D)
            if self.causal:  # shifted by one position inside each token
                earlier = F.embedding(codes + self.first_row, self.within.earlier)  # (B, L, D)
                earlier = earlier.unflatten(1, (-1, self.P))  # (B, N, P, D)
                before = F.pad(earlier[:, :, :-1], (0, 0, 1, 0)).cumsum(2)  # (B, N, P, D)
                x = self.within(x, before.flatten(1, 2))  # (B, L, D)
        x = self.ln_f(x).transpose(0, 1)  # (L, B, D)
        return (x @ self.head.to(x.dtype)).transpose(0, 1)  # (B, L, V), by one matrix a position or for all

    def next_token(self, codes, cache):
        """For sampling, what the blocks of a causal prior say of one token, (B, 1, D): the one after those
        already drawn in `codes` (B, L). `cache` (depth, 2, B, H, n, D/H) has the keys and values of the n − 1
        inputs before the newest (the last token drawn, at first the start), whose own are written there."""
        at = cache.shape[4] - 1
        last = slice((at - 1) * self.P, at * self.P)
        x = self.embed(codes[:, last], last).sum(1, keepdim=True) if at else self.start(codes)  # (B, 1, D)
        cos, sin = self.rope[:, at:at + 1]  # 2 × (1, D/H/2)
        for block, own in zip(self.blocks, cache):
            x = block(x, cos, sin, cache=own)  # (B, 1, D)
        return x

    def next_logits(self, x, codes, position):
        """Logits (B, V) of a position of the token x (B, 1, D), of which `codes` (B, L) has those before."""
        if self.P > 1:
            before = slice(position - position % self.P, position)
            earlier = F.embedding(codes[:, before] + self.first_row[before], self.within.earlier)
            x = self.within(x, earlier.sum(1, keepdim=True))  # (B, 1, D)
        x = self.ln_f(x)[:, 0]  # (B, D)
        return x @ self.head[position % len(self.head)].to(x.dtype)  # (B, V); shared: head 0


class SigmaBlock(nn.Module):
    """SEDD's block: pre-LayerNorm, rotary attention, GELU, each branch shifted, scaled and gated by the noise
    (adaLN-Zero)."""

    def __init__(self, width, heads, condition, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.attn_qkv = linear(width, 3 * width)
        self.attn_out = linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(condition, 6 * width)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(self, x, c, cos, sin):
        """x (B, L, D), c (B, 1, condition), cos and sin (L, D/H/2) → (B, L, D)."""
        B, L, D = x.shape
        of_noise = self.adaLN_modulation(c)  # (B, 1, 6 D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = of_noise.chunk(6, -1)  # 6 × (B, 1, D)
        h = self.norm1(x) * (1 + scale_a) + shift_a  # (B, L, D)
        qkv = self.attn_qkv(h).view(B, L, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 × (B, H, L, D/H)
        h = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, H, L, D/H)
        x = x + gate_a * self.dropout(self.attn_out(h.transpose(1, 2).reshape(B, L, D)))
        h = self.norm2(x) * (1 + scale_m) + shift_m  # (B, L, D)
        return x + gate_m * self.dropout(self.mlp(h))


class SEDD(nn.Module):
    """The paper's own prior (--network sedd), the network of score entropy discrete diffusion (Lou et al.
    2024), as a masked prior like the one above; its parameters have the names of the authors' release.

    There a position is hidden at noise σ with probability 1 − e^−σ, and the network says out_v, the score of
    value v at a hidden position being e^out_v / ((e^σ − 1) V). The true score is p(c_l = v | visible) /
    (e^σ − 1), so out_v is log p up to a constant. Score entropy and (1) are least at the same p, which does
    not depend on σ: (1) trains it, and every sampler here draws from it, in at most L calls. As σ it is given
    −log(1 − the share of positions that are hidden)."""

    def __init__(self, codes, values, width, depth, heads, dropout, condition):
        super().__init__()
        self.L, self.V, self.causal = codes, values, False
        self.pos_embed = nn.Parameter(torch.randn(codes, width) * 0.05)
        self.vocab_embed = nn.ParameterDict({"embedding": torch.randn(values + 1, width) * 0.1})  # V: hidden
        self.sigma_map = nn.ModuleDict({"mlp": nn.Sequential(
            nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))})
        self.blocks = nn.ModuleList(SigmaBlock(width, heads, condition, dropout) for _ in range(depth))
        self.output_layer = nn.ModuleDict({
            "norm_final": nn.LayerNorm(width, bias=False),
            "linear": nn.Linear(width, values + 1),  # the last one is never read
            "adaLN_modulation": nn.Linear(condition, 2 * width)})
        for p in self.output_layer["adaLN_modulation"].parameters():
            nn.init.zeros_(p)
        with torch.device("cpu"):  # also where the weights have no memory yet (load_release)
            rope = rope_table(codes, width // heads)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, codes):
        """codes (B, L) long, V: hidden → logits (B, L, V)."""
        hidden_share = (codes == self.V).float().mean(1)  # (B,)
        sigma = -torch.log1p(-hidden_share.clamp(max=0.999))  # (B,), 6.9 in place of ∞ where all are hidden
        return self.outputs(codes, sigma)[..., :self.V]

    def outputs(self, codes, sigma):
        """What the network says of codes (B, L) at noise sigma (B,): (B, L, V + 1)."""
        angles = sigma[:, None] * 10_000.0 ** (-torch.arange(128, device=sigma.device) / 128)
        features = torch.cat([angles.cos(), angles.sin()], 1)  # (B, 256)
        c = F.silu(self.sigma_map["mlp"](features))[:, None]  # (B, 1, condition)
        x = F.embedding(codes, self.vocab_embed["embedding"]) + self.pos_embed  # (B, L, D)
        cos, sin = self.rope  # 2 × (L, D/H/2)
        for block in self.blocks:
            x = block(x, c, cos, sin)  # (B, L, D)
        shift, scale = self.output_layer["adaLN_modulation"](c).chunk(2, -1)  # 2 × (B, 1, D)
        x = self.output_layer["norm_final"](x) * (1 + scale) + shift
        return self.output_layer["linear"](x)


# -------- loss -----------------------------------------------------------------------------------------

def ranks(x, descending=False):
    """The rank of each entry in its row, 0 for the lowest (or, descending, for the highest): (B, L) long."""
    return x.argsort(1, descending=descending).argsort(1)


def hide_positions(codes, null, u, scores):
    """Hide k = ⌊u · n⌋ + 1 of the n positions with a finite score, those with the lowest (text_prior.py gives
    +∞ to what stays visible). codes (B, L), u (B,) in [0, 1), scores (B, L), `null` the value that hides, a
    number or one a position (L,). Returns codes with `null` at the hidden positions (B, L), where these are
    (B, L) bool, and k (B,)."""
    n = scores.isfinite().sum(1)  # (B,)
    k = ((u * n).floor() + 1).minimum(n)  # in float32 the last u can round to 1
    hidden = ranks(scores) < k[:, None]
    return torch.where(hidden, null, codes), hidden, k


def masked_nll(model, codes, null, u, scores, run):
    """The estimate of bound (1) for each code, in nats per token: codes (B, L) → (B,); `null` stands for
    hidden, u and scores as in hide_positions."""
    visible, hidden, k = hide_positions(codes, null, u, scores)
    with run.autocast():
        logits = model(visible)  # (B, L, V)
    nll = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")  # (B, L)
    return (nll * hidden).sum(1) / k  # (1), divided by L


def ar_nll(model, codes, run):
    """Equation (2) for each code, in nats per token: codes (B, L) → (B,)."""
    with run.autocast():
        logits = model(codes)  # (B, L, V)
    return F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").mean(1)


def mean_bits(nll):
    """Mean of (n,) nats in bits, and its standard error."""
    bits = data.to_float64(nll) / math.log(2)
    return bits.mean().item(), (bits.std(correction=0) / len(bits) ** 0.5).item()


@torch.no_grad()
def bits_per_token(model, codes, run):
    """Mean bits per token on codes (n, L) long and its standard error: exact for AR; for masked the bound
    (1), averaged over four random masks a code, with k spread evenly over 1..L."""
    generator = data.step_generator(0, 0)
    nll = []
    for part in codes.split(500):
        n = len(part)
        part = part.to(run.device)
        if model.causal:
            nll.append(ar_nll(model, part, run))
            continue
        estimates = []
        for _ in range(4):
            u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
            scores = torch.rand(n, model.L, generator=generator)
            estimates.append(masked_nll(model, part, model.V, u.to(run.device), scores.to(run.device), run))
        nll.append(torch.stack(estimates).mean(0))
    return mean_bits(torch.cat(nll))


# -------- samplers -------------------------------------------------------------------------------------

def draw_values(logits, temperature, nucleus, u):
    """Draw values (...) from logits (..., V) by inverting the distribution function at u (...) uniform in [0,
    1), in float64: temperature, then nucleus (the smallest set of values holding that probability).
    Temperature 0 takes the most likely value, whatever u.

    Returns values and their log-probabilities (...) under the model.
    """
    log_p = data.to_float64(logits).log_softmax(-1)
    if temperature == 0:
        values = log_p.argmax(-1)
    else:
        p = (log_p / temperature).softmax(-1)
        if nucleus < 1:
            ordered, order = p.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # probability of all likelier values
            before[..., 0] = -1  # the most likely one stays, also where the nucleus is 0
            p = p.masked_fill((before >= nucleus).gather(-1, order.argsort(-1)), 0.0)
        upto = p.cumsum(-1)  # (..., V)
        u = u.to(p.device).clamp(max=1 - 2.0 ** -52)[..., None]  # rounded to 1, no sum would be above it
        values = (upto <= u * upto[..., -1:]).sum(-1)  # the first with a sum above u: none of probability 0
    log_p = log_p.gather(-1, values[..., None])[..., 0]
    return values.to(logits.device), log_p


BATCH = 500  # samples drawn together; random numbers are drawn for all, so that fewer are the first of them


@torch.no_grad()
def sample_masked(model, codes, sampler, run, generator, log_weights=None, condition=(), states=None):
    """Fill the hidden positions (value V) of codes (n, L) long; given positions never change.

    sampler: the dict of sampler_settings. log_weights (n, L, V), from sample.py: added to the logits, −inf
    forbids a value. condition, from text_prior.py: tensors (n, ...) that the model is given beside the codes,
    row by row. states: a list to which the codes (n, L) before each call are added. Returns codes (n, L) and
    the network calls each sample took (n,): at most one a hidden position unless remasking hides positions
    again, because a step that reveals nothing costs nothing."""
    codes = codes.clone()  # on the CPU, as all but the network and its logits
    given = codes != model.V
    n, L = codes.shape
    calls = torch.zeros(n, dtype=torch.long)
    order, per_step = sampler["order"], sampler["per_step"]
    steps = sampler["steps"] if order == "ancestral" else L

    def uniform():
        return torch.rand(max(n, BATCH), L, generator=generator, dtype=torch.float64)[:n]  # (n, L)

    if order != "ancestral":
        turn = ranks(uniform() + given * 2) // per_step  # (n, L), the call that draws each; given ones last
    for step in range(steps):
        hidden = codes == model.V  # (n, L)
        if order != "ancestral" and not hidden.any():
            break
        u = uniform()  # (n, L)
        where = hidden  # of these a value is drawn
        hidden_again = torch.zeros_like(hidden)
        if order == "event":  # a sample's turn is the number of its calls so far
            where = hidden & (turn == calls[:, None])
        elif order == "confidence":  # noise on it, so that samples differ
            gumbel = -torch.log(-torch.log(uniform().clamp(min=1e-300)))  # (n, L)
        else:
            # From a share t that is expected hidden to s: a hidden position is revealed with probability
            # (t − s + σ (1 − t)) / t, a revealed one hidden again with σ (ReMDM; σ = 0: MDLM).
            t, s = 1 - step / steps, 1 - (step + 1) / steps
            inside = sampler["remask_window"][0] <= t <= sampler["remask_window"][1]
            sigma = min(sampler["remask"], s / (1 - t)) if inside and step > 0 else 0.0
            rate = (t - s + sigma * (1 - t)) / t
            hidden_again = ~hidden & ~given & (u < sigma)
            where = hidden & (u < rate)
            u = u / rate  # uniform again where it is below the rate
        rows = where.any(1).nonzero()[:, 0]  # (m,)
        if len(rows):
            calls[rows] += 1
            if states is not None:
                states.append(codes.clone())
            with run.autocast():
                logits = model(*(x[rows].to(run.device) for x in (codes, *condition)))  # (m, L, V)
            if log_weights is not None:
                logits = logits.float() + log_weights[rows].to(run.device)
            logits = logits[where[rows].to(run.device)]  # (k, V)
            values, log_p = draw_values(logits, sampler["temperature"], sampler["nucleus"], u[where])
            values = values.cpu()  # (k,)
            if order == "confidence":  # the surest of them stay
                score = torch.full_like(u, -math.inf)
                score[where] = log_p.cpu() + sampler["order_noise"] * gumbel[where]
                surest = where & (ranks(score, descending=True) < per_step)  # (n, L)
                values = values[surest[where]]
                where = surest
            codes[where] = values
        codes[hidden_again] = model.V
    return codes, calls


@torch.no_grad()
def redraw_codes(model, codes, sampler, run, generator, log_weights=None):
    """Codes (n, L) after --rounds of redrawing, which mend what contradicts itself. In each a random share
    of the positions is hidden and drawn again in one network call, each hidden position on its own: Gibbs
    sampling where there is one, near it where there are more. log_weights as in sample_masked."""
    n, L = codes.shape
    per_round = max(1, round(sampler["round_share"] * L))
    at_once = {**sampler, "order": "event", "per_step": per_round}
    for _ in range(sampler["rounds"]):
        hidden = ranks(torch.rand(max(n, BATCH), L, generator=generator)[:n]) < per_round
        visible = torch.where(hidden, model.V, codes)
        codes, _ = sample_masked(model, visible, at_once, run, generator, log_weights)
    return codes


@torch.no_grad()
def sample_ar(model, count, sampler, run, generator):
    """Draw codes (count, L) from a causal prior, its blocks called once a token. Returns codes and these
    calls (count,)."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.to(run.dtype)  # here, or autocast would do it in every call
    depth, heads, N = len(model.blocks), model.blocks[0].heads, model.L // model.P
    size = (depth, 2, count, heads, N, model.wpe.shape[1] // heads)
    cache = torch.empty(size, dtype=run.dtype, device=run.device)  # of all blocks, as in Block
    codes = torch.zeros(count, model.L, dtype=torch.long, device=run.device)
    for position in range(model.L):
        u = torch.rand(max(count, BATCH), generator=generator, dtype=torch.float64)[:count]
        token, inside = divmod(position, model.P)
        with run.autocast():
            if inside == 0:
                x = model.next_token(codes, cache[..., :token + 1, :])  # (count, 1, D)
            logits = model.next_logits(x, codes, position)  # (count, V)
        codes[:, position] = draw_values(logits, sampler["temperature"], sampler["nucleus"], u)[0]
    return codes.cpu(), torch.full((count,), N)


def draw_in_batches(draw, count, seed, first=0):
    """The codes (count, L) and network calls (count,) of draw(rows, generator) of BATCH samples at a time.
    `first` is a multiple of BATCH: sample k of an endless series follows from (seed, k) alone."""
    drawn = []
    for start in range(0, count, BATCH):
        rows = slice(start, min(start + BATCH, count))
        drawn.append(draw(rows, data.step_generator(seed, first + start)))
    codes, calls = zip(*drawn)
    return torch.cat(codes), torch.cat(calls)


def sample_codes(model, count, sampler, run, seed=0, first=0):
    """Draw codes (count, L) and network calls (count,) with either kind of prior, as draw_in_batches."""
    def draw(rows, generator):
        n = rows.stop - rows.start
        if model.causal:
            return sample_ar(model, n, sampler, run, generator)
        codes, calls = sample_masked(model, torch.full((n, model.L), model.V), sampler, run, generator)
        return redraw_codes(model, codes, sampler, run, generator), calls + sampler["rounds"]

    return draw_in_batches(draw, count, seed, first)


SAMPLERS = {  # unlikely values of the masked prior are often wrong; nucleus < 1 costs the AR prior variety
    "masked": {"temperature": 1.0, "nucleus": 0.99, "order": "event", "order_noise": 1.0, "per_step": 1},
    "ar": {"temperature": 1.0, "nucleus": 1.0},
}


def add_sampler_flags(parser):
    """How codes are drawn from a trained prior; where a flag is not given, what suits the kind of prior
    (SAMPLERS) holds."""
    add = parser.add_argument_group("code sampler").add_argument
    add("--temperature", type=data.non_negative, help="0: the most likely value (default: 1)")
    add("--nucleus", type=data.fraction,
        help="draw from the smallest set of values that holds this probability (default: by kind)")
    add("--order", choices=("event", "ancestral", "confidence"),
        help="masked: which positions are revealed when (default: by kind)")
    add("--order-noise", type=data.non_negative, help="confidence: Gumbel noise on it (default: by kind)")
    add("--per-step", type=data.positive,
        help="event, confidence: positions revealed in a call (default: by kind)")
    add("--ancestral-steps", type=data.positive, default=64, help="ancestral: steps from all hidden to none")
    add("--rounds", type=data.count, default=32,
        help="masked samples, and children of compose: rounds in which a share of the positions is drawn "
             "again")
    add("--round-share", type=data.fraction, default=0.125, help="share of the positions in a round")
    add("--remask", type=data.fraction, default=0.0, help="ancestral: probability of hiding a value again")
    add("--remask-window", type=data.fraction, nargs=2, default=[0.3, 0.55], metavar=("FROM", "TO"),
        help="t in which --remask acts")


def sampler_settings(args, defaults):
    """The flags as the dict that the samplers take; `defaults` (as in SAMPLERS) for those not given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return {**defaults, **given, "steps": args.ancestral_steps}


# -------- training -------------------------------------------------------------------------------------

def build_prior(config):
    """The transformer of a dict of settings (a checkpoint's config)."""
    sizes = {key: config[key] for key in ("codes", "values", "width", "depth", "heads", "dropout")}
    if config.get("network") == "sedd":
        return SEDD(**sizes, condition=config.get("condition", 128))
    per_token = config.get("per_token", 1)  # missing in checkpoints of an earlier version
    return Prior(**sizes, causal=config["kind"] == "ar", tables=config["tables"], per_token=per_token)


def load_prior(args, kind, stored, device):
    """The trained prior with averaged weights from OUT/<dataset>/prior-<kind>.pt; refuses one that was
    trained on other codes than the `stored` (data.load_codes)."""
    path = data.run_folder(args) / f"prior-{kind}.pt"
    remedy = "train it with " + data.script_command(f"prior.py --kind {kind}", args)
    state = data.load_trained(path, f"prior-{kind}", args.dataset, remedy, codes=stored["id"])
    with data.reading(path, remedy):
        model = build_prior(state["config"])
        model.load_state_dict(state["ema"])
    return model.to(device).eval()


def read_release(folder):
    """The weights of the authors' SEDD (a folder DLC_SEDD_L512), and the settings that they tell."""
    state = data.read_weights(folder)
    with data.reading(folder, "expected the authors' SEDD"):
        codes, width = state["pos_embed"].shape
        heads = width // (2 * len(state.pop("rotary_emb.inv_freq")))  # D/H/2 frequencies
        config = dict(codes=codes, values=len(state["vocab_embed.embedding"]) - 1, width=width, heads=heads,
                      depth=len([name for name in state if name.endswith("attn_qkv.weight")]),
                      network="sedd", condition=len(state["sigma_map.mlp.0.weight"]))
    return state, config


def load_release(folder, device):
    """The authors' prior, ready to draw."""
    state, config = read_release(folder)
    with data.reading(folder, "expected the authors' SEDD"):
        with torch.device("meta"):  # without memory of its own
            model = build_prior(config | {"dropout": 0.0})
        model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def add_flags(parser):
    """The prior's own flags; the defaults are the shapes values."""
    add = parser.add_argument_group("model").add_argument
    add("--kind", choices=("masked", "ar"), required=True, help="masked diffusion or autoregressive")
    add("--network", choices=("llada", "sedd"), default="llada",
        help="the transformer: LLaDA's, or, for --kind masked, the paper's")
    add("--width", type=data.positive, default=128, help="D, width of the tokens")
    add("--depth", type=data.positive, help="transformer blocks (default: by kind)")
    add("--heads", type=data.positive, default=2, help="attention heads")
    add("--tables", choices=("position", "shared"), default="position",
        help="embeddings and outputs: one set a position, or one for all")
    add("--token", choices=("patch", "position"), default="patch",
        help="what a token stands for, where codes are read by patch (with shared tables: position)")
    add("--dropout", type=data.fraction, default=0.0, help="on both residual branches")
    add = parser.add_argument_group("start of the run").add_argument
    add("--init", metavar="DIR", help="start from the authors' weights, the folder DLC_SEDD_L512")


def parse(argv=None):
    """The flags of this script, checked: their parser and values."""
    parser = data.make_parser(__doc__)
    add_flags(parser)
    data.add_training_flags(parser, steps=None, batch_size=256, lr=1e-2, lr_matrix=0.02, warmup=50, ema=0.995)
    add_sampler_flags(parser)
    args = data.parse(parser, PRESETS, argv)
    if args.dataset == "folder":
        args.steps = args.steps or FOLDER_STEPS[args.kind]
    for name, value in BY_KIND[args.kind].items():
        setattr(args, name, getattr(args, name) or value)
    if args.width % args.heads or args.width // args.heads % 2:
        parser.error(f"argument --heads: --width {args.width} over {args.heads} heads is no even number")
    if args.kind == "ar" and args.network == "sedd":
        parser.error("argument --network: sedd is a masked prior; choose --kind masked")
    return parser, args


def main(argv=None):
    """Train a prior; report bits per token on held-out codes and network calls per sample."""
    parser, args = parse(argv)
    stage = f"prior-{args.kind}"
    run = data.Run(args, lock=stage)
    remedy = "make it with " + data.script_command("tokenizer.py", args)
    stored = data.load_codes(run.folder / "codes.pt", remedy)
    train_rows = stored["splits"]["train"]
    data.fit_batch(parser, args, train_rows)
    args.codes, args.values = stored["L"], stored["V"]
    by_patch = args.token == "patch" and stored["side"] > 0 and args.tables == "position"
    args.per_token = stored["L"] // stored["side"] ** 2 if by_patch else 1
    torch.manual_seed(args.seed)
    model = build_prior(vars(args)).to(run.device)
    if args.init:  # a run that goes on loads its own weights over these
        with data.reading(args.init, "expected the authors' DLC_SEDD_L512, and flags that fit it"):
            state, sizes = read_release(args.init)
            data.fill_as_flags_say(model, state, sizes, args)
    if args.dry_run:
        data.dry_run(args, model, run)  # ends here; on CUDA after two steps
    ema = data.averaged(model, args.ema)
    optimizers = data.Optimizers(model, args)
    made_from = {"codes": stored["id"]}
    checkpoint = data.Checkpoint(stage, args, parser.settings, run, made_from, model, ema, optimizers)
    start = checkpoint.resume()
    wrapped = run.wrap(model, args)  # after the average was copied from the model
    steps = data.Steps(checkpoint, start, train_rows, args.batch_size * args.codes, "tokens")

    for step in steps:
        loss = 0.0
        for part in data.batch_parts(step, train_rows, args, run, wrapped):
            flip = part.flips().long().cpu()  # (b,) 0 or 1: the codes of images or of their mirror images
            codes = stored["codes"][part.rows, flip].long().to(run.device)  # (b, L)
            if args.kind == "ar":
                nll = ar_nll(wrapped, codes, run)  # (b,)
            else:
                u, scores = part.stratified(), part.uniform(args.codes)  # (b,), (b, L)
                nll = masked_nll(wrapped, codes, args.values, u, scores, run)  # (b,)
            loss = loss + part.backward(nll.mean())
        loss = run.average(loss)
        norm = optimizers.step(step, loss)  # stops where the loss or a gradient is not finite
        ema.update_parameters(model)
        steps.show(loss=loss, norm=norm)

    if run.main:
        meaning = "exact" if args.kind == "ar" else "upper bound"
        for split in ("val", "test"):
            rows = stored["splits"][split]
            held_out = stored["codes"][rows.start:rows.stop, 0].long()
            bits, error = bits_per_token(ema.module, held_out, run)
            found = {f"{split} bits per token": round(bits, 4), "standard error": round(error, 4)}
            steps.log.write(args.steps, **found)
            print(f"{split}: {bits:.4f} ± {error:.4f} bits per token ({meaning}, {len(held_out):,} codes)")
        _, calls = sample_codes(ema.module, 100, sampler_settings(args, SAMPLERS[args.kind]), run)
        print(f"network calls per sample: {calls.float().mean():.1f} for {args.codes} positions")
    run.wait()


if __name__ == "__main__":
    data.run_script(main)
