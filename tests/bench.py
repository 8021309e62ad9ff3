"""Speed of each stage beside public models of the same size, by hand: python tests/bench.py [--device cuda]

Forward passes, training steps (forward, backward, fused AdamW), autoregressive and masked sampling. Ours and
the reference take turns, on the same machine, dtype, threads, batch and number of parameters; three warm-ups,
medians, and the ratio of the medians. TFLOP/s are of the operations that torch counts in ours. On a CPU the
reference runs once as its users run it and once with this project's choice of attention kernel (last column).
With --device cuda the sizes are those of ImageNet, both are compiled, and the peak memory of each is shown.
References: pip install transformers diffusers safetensors.
"""
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (before torch: it sets the threads' waiting policy)
import generator  # noqa: E402
import prior  # noqa: E402
import text_prior  # noqa: E402
import tokenizer  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

SMALL = (384, 6, 6)  # width, depth, heads on a CPU
LARGE = {"tokenizer": (1024, 24, 16), "generator": (1152, 28, 16), "prior": (1024, 24, 16)}  # on a GPU


def millions(model):
    """Parameters of a model in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def timed(run, call, own_kernels):
    """Seconds of a call; on a CPU with this project's choice of attention kernel (data.Run's), or torch's."""
    if run.device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(not own_kernels)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(own_kernels)
    else:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(run, rounds, *calls):
    """Median seconds of several (function, own kernels or not): three warm-ups, then rounds in all of which
    they take turns."""
    seconds = [[timed(run, *call) for call in calls] for _ in range(3 + rounds)]
    return [statistics.median(values) for values in zip(*seconds[3:])]


def ways_of(model, call, run):
    """A forward pass without gradients, and a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def forward():
        model.eval()
        with torch.no_grad(), run.autocast():
            call(model)

    def step():
        model.train()
        with run.autocast():
            loss = call(model).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward, step


def flops_of(call):
    """FLOPs of a call, which runs eagerly: what is compiled cannot be counted."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_of(run, call):
    """GiB of a GPU's memory at the peak of a call; on a CPU not measured."""
    if run.device.type == "cpu":
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2 ** 30


# Of each stage: ours, the reference, what is called of ours, what of the reference.

def tokenizers(run, args):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    width, depth, heads = LARGE["tokenizer"] if args.large else SMALL
    size, patch = (224, 14) if args.large else (32, 4)
    ours = tokenizer.ViT(size, patch, width, depth, heads, 32, 16, 1.0, "registers", 4)
    del ours.sem_embed, ours.sem_norm, ours.sem_out  # the backbone alone, as in the reference
    theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, mlp_ratio=4, image_size=size,
        patch_size=patch, num_register_tokens=4))
    x = torch.randn(args.batch, 3, size, size, device=run.device)
    return ours, theirs, lambda m: m.norm(m.tokens(x)), lambda m: m(x).last_hidden_state


def generators(run, args):
    from diffusers import DiTTransformer2DModel
    width, depth, heads = LARGE["generator"] if args.large else SMALL
    channels, size, patch = (4, 32, 2) if args.large else (3, 32, 4)
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels,
        out_channels=channels, num_layers=depth, sample_size=size, patch_size=patch, num_embeds_ada_norm=1000)

    def build(values):
        return generator.DiT(size, patch, 0, width, depth, heads, 16, values, 4, "mean", "v", channels)

    missing = (millions(theirs) - millions(build(1))) * 1e6
    ours = build(max(1, 1 + round(missing / (16 * width))))  # more rows of the code table make up for it
    x = torch.randn(args.batch, channels, size, size, device=run.device)
    t = torch.rand(args.batch, device=run.device)
    codes = torch.zeros(args.batch, 16, dtype=torch.long, device=run.device)
    return ours, theirs, lambda m: m(x, t, codes), lambda m: m(x, (t * 999).long(), codes[:, 0]).sample


def llama_of(ours, vocabulary):
    """A LlamaModel of the size of one of our priors; given a mask of zeros it sees all positions."""
    from transformers import LlamaConfig, LlamaModel
    width, block = len(ours.ln_f.weight), ours.blocks[0]
    return LlamaModel(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=len(ours.blocks),
        num_attention_heads=block.heads, intermediate_size=block.up_proj.out_features))


def transformed(model, x, *rest):
    """The hidden states (B, N, D) of one of our priors from its embeddings."""
    for block in model.blocks:
        x = block(x, *rest)
    return model.ln_f(x)


def priors(run, args):
    B, L = args.batch, args.length
    ours = prior.Prior(L, 256, *args.prior, 0.0, False, "shared")
    del ours.head  # the hidden states, as in the reference
    theirs = llama_of(ours, 257 + L)
    codes = torch.zeros(B, L, dtype=torch.long, device=run.device)
    mask = torch.zeros(B, 1, L, L, device=run.device)
    return (ours, theirs, lambda m: transformed(m, m.embed(codes), *m.rope),
            lambda m: m(codes, mask).last_hidden_state)


def text_priors(run, args):
    L, T, N = args.length, args.length // 4, args.length + 1 + args.length // 4
    hidden = prior.swiglu_hidden(args.prior[0])
    ours = text_prior.TextPrior(L, 256, 1000, 1001, 1002, T, *args.prior, hidden, 0.0, "shared")
    del ours.ff_out
    cos, sin = ours.rope.to(run.device)
    ids = torch.zeros(args.batch, N, dtype=torch.long, device=run.device)
    unseen = torch.randint(0, T, (args.batch, 1), device=run.device)  # captions of several lengths
    seen = (torch.arange(N, device=run.device) < N - unseen)[:, None, None]  # (B, 1, 1, N)
    mask = torch.zeros(args.batch, 1, N, N, device=run.device).masked_fill(~seen, -1e30)

    def transform(model):
        x = model.wte(ids)
        for block in model.blocks:
            x = block(x, cos, sin, seen)
        return model.ln_f(x)

    theirs = llama_of(ours, ours.wte.num_embeddings)
    return ours, theirs, transform, lambda m: m(ids, mask).last_hidden_state


PAIRS = {"tokenizer ViT": tokenizers, "generator": generators, "masked prior": priors,
         "text prior": text_priors}


def print_pair(name, run, args):
    """The two lines of a pair."""
    with data.needed_package("transformers diffusers safetensors", name):
        ours, theirs, ours_call, theirs_call = PAIRS[name](run, args)
    for model in (ours, theirs):
        model.to(run.device)
        if args.large:
            model.compile()
    pairs = zip(ways_of(ours, ours_call, run), ways_of(theirs, theirs_call, run))
    for kind, (a, b) in zip(("forward", "training step"), pairs):
        mine, other, same = medians(run, args.rounds, (a, True), (b, False), (b, True))
        title = f"{name}, {kind}"
        print(f"{title:28} {mine * 1e3:7.1f} ms {other * 1e3:7.1f} ms {mine / other:6.2f}",
              f"{flops_of(a) / mine / 1e12:8.3f} {peak_of(run, a):8.2f} {peak_of(run, b):8.2f}",
              f"{mine / same:13.2f}",
              f" {millions(ours):.2f}M, {type(theirs).__name__} {millions(theirs):.2f}M", flush=True)


def print_ar_sampling(run, args, L, B):
    """Tokens per second of our decoder and of transformers' GPT-2 with its cache."""
    with data.needed_package("transformers", "AR sampling"):
        from transformers import GPT2Config, GPT2LMHeadModel
    ours = prior.Prior(L, 256, *args.prior, 0.0, True, "shared").to(run.device).eval()
    width, depth, heads = args.prior
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=258, n_embd=width, n_layer=depth, n_head=heads, n_positions=L + 1, bos_token_id=256,
        eos_token_id=None, pad_token_id=257)).to(run.device).eval()
    start = torch.full((B, 1), 256, device=run.device)

    def cached():
        with torch.no_grad(), run.autocast():
            theirs.generate(start, max_new_tokens=L, do_sample=True, top_k=0)

    def own():
        prior.sample_ar(ours, B, prior.SAMPLERS["ar"], run, torch.Generator())

    mine, other = medians(run, args.rounds, (own, True), (cached, False))
    print(f"AR sampling, {L} tokens × {B}: {B * L / mine:,.0f} tokens/s, GPT-2 with its cache "
          f"{B * L / other:,.0f}: {other / mine:.2f} times as fast ({millions(ours):.2f}M and "
          f"{millions(theirs):.2f}M parameters)")


def print_masked_sampling(run, args, steps):
    """Seconds of masked sampling, beside a loop that calls the network in every step asked for."""
    model = prior.Prior(args.length, 256, *args.prior, 0.0, False, "shared").to(run.device).eval()
    hidden = torch.full((args.batch, args.length), 256, device=run.device)
    sampler = {**prior.SAMPLERS["masked"], "order": "ancestral", "steps": steps, "remask": 0.0,
               "remask_window": [0, 1]}

    def one_call():
        with torch.no_grad(), run.autocast():
            prior.draw_values(model(hidden), 1.0, 1.0, torch.zeros(hidden.shape, dtype=torch.float64))

    one = min(timed(run, one_call, True) for _ in range(4))
    start = time.perf_counter()
    _, calls = prior.sample_masked(model, hidden, sampler, run, torch.Generator())
    seconds = time.perf_counter() - start
    print(f"masked sampling, L {args.length} × {args.batch}, {steps:,} steps: {seconds:.1f} s and "
          f"{calls.float().mean():.0f} calls a sample; with a call in every step {steps * one:.1f} s")


def main():
    """Print the table of the rows asked for."""
    parser = data.make_parser(__doc__)
    add = parser.add_argument_group("bench").add_argument
    add("--batch", type=data.positive, default=32)
    add("--length", type=data.positive, help="L, codes (default: 64, on a GPU 512)")
    add("--rounds", type=data.positive, default=9, help="measured rounds")
    add("--masked-steps", type=data.positive, nargs="+", default=[64, 4096])
    add("--only", nargs="+", default=[""], help="rows whose name has one of these words")
    args = data.parse(parser, {})
    run = data.Run(args)
    args.large = run.device.type == "cuda"
    args.prior = LARGE["prior"] if args.large else SMALL
    args.length = args.length or (512 if args.large else 64)
    machine = torch.cuda.get_device_name() if args.large else f"{torch.get_num_threads()} threads"
    print(f"{run.device} ({machine}), {run.dtype}, batch {args.batch}")
    print(f"{'':33} ours  reference  ratio  TFLOP/s {'GiB of both':>17}  same kernels")

    def wanted(name):
        return any(word in name for word in args.only)

    for name in filter(wanted, PAIRS):
        print_pair(name, run, args)
    if wanted("AR sampling"):
        print_ar_sampling(run, args, args.length, args.batch)
    if wanted("masked sampling"):
        for steps in args.masked_steps:
            print_masked_sampling(run, args, steps)
    used = [name for name in ("torch", "transformers", "diffusers") if name in sys.modules]
    print(", ".join(f"{name} {sys.modules[name].__version__}" for name in used))


if __name__ == "__main__":
    data.run_script(main)
