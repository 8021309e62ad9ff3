"""Speed of each stage beside public models of the same size, run by hand: python tests/bench.py [--device cuda]

One table: forward passes, training steps (forward, backward, fused AdamW), autoregressive and masked sampling. Ours and the reference
take turns, on the same machine, dtype, threads, batch and number of parameters; three warm-ups, medians, and the ratio of the medians.
On a CPU the reference runs once as its users run it and once with this project's choice of attention kernel (last column). With --device
cuda the sizes are those of ImageNet and both are compiled. References: pip install transformers diffusers safetensors.
"""
import argparse
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

SMALL = {"tokenizer": (384, 6, 6), "generator": (384, 6, 6), "prior": (384, 6, 6)}  # width, depth, heads on a CPU
LARGE = {"tokenizer": (1024, 24, 16), "generator": (1152, 28, 16), "prior": (1024, 24, 16)}  # on a GPU: ViT-L, XL, the paper's prior


def default_kernels(on):
    """torch's own choice of attention kernels on a CPU (on), or that of data.Run (off)."""
    torch.backends.cuda.enable_flash_sdp(on)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(not on)


def alternate(run, rounds, calls):
    """Median seconds of each of calls {name: (function, default kernels or not)}: three warm-ups, then `rounds` in which all take turns."""
    seconds = {name: [] for name in calls}
    for k in range(3 + rounds):
        for name, (call, default) in calls.items():
            if run.device.type == "cpu":
                default_kernels(default)
            else:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            if k >= 3:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward_of(model, call, run):
    """A forward pass without gradients."""
    def forward():
        with torch.no_grad(), run.autocast():
            call(model)
    return forward


def step_of(model, call, run):
    """A training step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step():
        with run.autocast():
            loss = call(model).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def peak(run, call):
    """GiB at the peak of a call: the device's own count on a GPU, the tensors made in it on a CPU."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 2 ** 30
    with data.PeakBytes() as memory:
        call()
    return memory.peak / 2 ** 30


def count(model):
    """Parameters in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


# --- pairs: ours, the reference, what each is called with, FLOPs of a forward pass --------------------------------------

def bench_tokenizer(run, args):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    (width, depth, heads), size, patch = args.sizes["tokenizer"], *((224, 14) if args.large else (32, 4))
    ours = tokenizer.ViT(size, patch, width, depth, heads, 32, 16, 1.0, "registers", 4)
    del ours.sem_embed, ours.sem_norm, ours.sem_out  # the backbone alone, as in the reference
    theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=size,
                                                                patch_size=patch, num_register_tokens=4, mlp_ratio=4))
    x = torch.randn(args.batch, 3, size, size, device=run.device)
    flops = args.batch * depth * tokenizer.block_flops((size // patch) ** 2 + 5, width)
    return ours, theirs, lambda m: m.norm(m.tokens(x)), lambda m: m(x).last_hidden_state, flops


def bench_generator(run, args):
    from diffusers import DiTTransformer2DModel
    (width, depth, heads), channels, size, patch = args.sizes["generator"], *((4, 32, 2) if args.large else (3, 32, 4))
    theirs = DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels, out_channels=channels,
                                   num_layers=depth, sample_size=size, patch_size=patch, num_embeds_ada_norm=1000)
    build = lambda values: generator.DiT(size, patch, 0, width, depth, heads, 16, values, 4, "mean", "v", channels)
    ours = build(max(1, 1 + round((count(theirs) - count(build(1))) * 1e6 / (16 * width))))  # rows of the code table make up for its embeddings
    x, t = torch.randn(args.batch, channels, size, size, device=run.device), torch.rand(args.batch, device=run.device)
    codes, labels = torch.zeros(args.batch, 16, dtype=torch.long, device=run.device), torch.zeros(args.batch, dtype=torch.long, device=run.device)
    n, hidden = (size // patch) ** 2, generator.swiglu_hidden(width)
    flops = args.batch * depth * (prior.block_flops(n, width, hidden) + 12 * width ** 2)
    return ours, theirs, lambda m: m(x, t, codes), lambda m: m(x, (t * 999).long(), labels).sample, flops


def bench_masked(run, args):
    (width, depth, heads), L = args.sizes["prior"], args.length
    ours = prior.Prior(L, 256, width, depth, heads, 0.0, False, "shared")
    theirs, codes = llama(width, depth, heads, 257 + L, ours.blocks[0].up_proj.out_features), torch.zeros(args.batch, L, dtype=torch.long, device=run.device)
    mask, flops = torch.zeros(args.batch, 1, L, L, device=run.device), args.batch * depth * prior.block_flops(L, width, prior.swiglu_hidden(width))
    del ours.ff_out  # the hidden states, as in the reference
    return ours, theirs, lambda m: m.transform(m.embed(codes)), lambda m: m(codes, attention_mask=mask).last_hidden_state, flops


def bench_text(run, args):
    (width, depth, heads), L, T = args.sizes["prior"], args.length, args.length // 4
    hidden, N = prior.swiglu_hidden(width), args.length + 1 + args.length // 4
    ours = text_prior.TextPrior(L, 256, 1000, 1001, 1002, T, width, depth, heads, hidden, 0.0, "shared")
    theirs, (cos, sin) = llama(width, depth, heads, ours.wte.num_embeddings, hidden), (x.to(run.device) for x in ours.rope)
    del ours.ff_out
    ids = torch.zeros(args.batch, N, dtype=torch.long, device=run.device)
    seen = torch.arange(N, device=run.device) < N - torch.randint(0, T, (args.batch, 1), device=run.device)  # captions of several lengths
    mask = torch.zeros(args.batch, 1, N, N, device=run.device).masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)

    def transform(m):
        x = m.wte(ids)
        for block in m.blocks:
            x = block(x, cos, sin, attend=seen[:, None, None])
        return m.ln_f(x)

    return ours, theirs, transform, lambda m: m(ids, attention_mask=mask).last_hidden_state, args.batch * depth * prior.block_flops(N, width, hidden)


def llama(width, depth, heads, vocabulary, hidden):
    """A LlamaModel that sees all positions when given a mask of zeros."""
    from transformers import LlamaConfig, LlamaModel
    return LlamaModel(LlamaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=hidden,
                                  max_position_embeddings=2048))


# --- sampling ---------------------------------------------------------------------------------------------------------

def bench_ar_sampling(run, args, L, B):
    """Tokens per second of our decoder, of transformers' GPT-2 with its cache, and of a loop that recomputes all for each token."""
    from transformers import GPT2Config, GPT2LMHeadModel
    width, depth, heads = args.sizes["prior"]
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=width, n_layer=depth, n_head=heads, n_positions=L + 1, bos_token_id=256, eos_token_id=None,
                                        pad_token_id=257)).to(run.device).eval()
    ours = prior.Prior(L, 256, width, depth, heads, 0.0, True, "shared").to(run.device).eval()
    settings, start = {"temperature": 1.0, "nucleus": 1.0}, torch.full((B, 1), 256, device=run.device)

    def cached():
        with torch.no_grad(), run.autocast():
            theirs.generate(start, max_new_tokens=L, do_sample=True, top_k=0, use_cache=True)

    def recomputed():  # what a loop without a cache does: the whole sequence for each token
        codes = torch.zeros(B, 0, dtype=torch.long, device=run.device)
        with torch.no_grad(), run.autocast():
            for at in range(L):
                x = ours.embed(torch.zeros(B, at + 1, dtype=torch.long, device=run.device), slice(0, at + 1))
                for block in ours.blocks:
                    x = block(x, *ours.rope[:, :at + 1])
                p = (ours.ln_f(x[:, -1]) @ ours.ff_out[0].to(run.dtype)).float().softmax(-1)
                codes = torch.cat([codes, torch.multinomial(p, 1)], 1)

    calls = {"ours": (lambda: prior.sample_ar(ours, B, settings, run, torch.Generator()), False), "GPT-2, cached": (cached, True)}
    seconds = alternate(run, args.rounds, calls)
    default_kernels(args.large)
    start = time.perf_counter()
    recomputed()  # once: it is slow
    seconds["recomputed"] = time.perf_counter() - start
    print(f"AR sampling, {L} tokens × {B}: " + ", ".join(f"{name} {B * L / s:,.0f} tokens/s" for name, s in seconds.items())
          + f"; ours is {seconds['GPT-2, cached'] / seconds['ours']:.2f} and {seconds['recomputed'] / seconds['ours']:.1f} times as fast "
          f"({count(ours):.2f}M and {count(theirs):.2f}M parameters)")


def bench_masked_sampling(run, args):
    """Calls and seconds of masked sampling, beside a loop that calls the network in every step that was asked for."""
    (width, depth, heads), L, B = args.sizes["prior"], args.length, args.batch
    model = prior.Prior(L, 256, width, depth, heads, 0.0, False, "shared").to(run.device).eval()
    for steps in args.masked_steps:
        sampler = {**prior.SAMPLERS["masked"], "order": "ancestral", "steps": steps, "per_step": 1, "remask": 0.0, "remask_window": [0, 1]}
        start = time.perf_counter()
        _, calls = prior.sample_masked(model, torch.full((B, L), 256), sampler, run, torch.Generator())
        ours = time.perf_counter() - start
        one, hidden = math.inf, torch.full((B, L), 256, device=run.device)
        for _ in range(4):
            start = time.perf_counter()
            with torch.no_grad(), run.autocast():
                prior.draw_values(model(hidden), 1.0, 1.0, torch.zeros(B, L, dtype=torch.float64, device=run.device))
            one = min(one, time.perf_counter() - start)
        print(f"masked sampling, L {L} × {B}, {steps:,} steps asked for: {calls.float().mean():.0f} calls a sample (at most {calls.max()}), {ours:.1f} s; "
              f"with a call in every step {steps * one:.1f} s ({steps:,} times a measured call)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, help="L, codes (default: 64, on a GPU 512)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds")
    parser.add_argument("--masked-steps", type=int, nargs="+", default=[64, 4096])
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these words")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default="out")
    parser.add_argument("--dataset", default="shapes")
    args = parser.parse_args()
    run = data.Run(args)
    args.large = run.device.type == "cuda"
    args.sizes, args.length = LARGE if args.large else SMALL, args.length or (512 if args.large else 64)
    name = torch.cuda.get_device_name() if args.large else f"{torch.get_num_threads()} threads"
    versions = [f"torch {torch.__version__}"]
    for package in ("transformers", "diffusers"):
        try:
            versions.append(f"{package} {__import__(package).__version__}")
        except ImportError:
            print(f"no {package}: pip install transformers diffusers safetensors")
            return
    top, source = data.peak_flops(run)
    print(f"{', '.join(versions)}; {run.device} ({name}), {run.dtype}, batch {args.batch}, {'compiled' if args.large else 'eager'}; "
          f"peak {top / 1e12:.2f} TFLOP/s ({source})")
    wanted = lambda name: not args.only or any(word in name for word in args.only)
    print(f"{'':28} {'ours':>10} {'reference':>10} {'ratio':>6} {'MFU':>5} {'peak GiB, ours and reference':>30}  ratio with our kernels")
    for stage, build in (("tokenizer ViT", bench_tokenizer), ("generator", bench_generator), ("masked prior", bench_masked), ("text prior", bench_text)):
        if not wanted(stage):
            continue
        ours, theirs, ours_call, theirs_call, flops = build(run, args)
        ours, theirs = ours.to(run.device), theirs.to(run.device)
        if args.large:
            ours.compile(), theirs.compile()
        for kind, make, times in (("forward", forward_of, 1), ("training step", step_of, 3)):
            a, b = make(ours.train(kind != "forward"), ours_call, run), make(theirs.train(kind != "forward"), theirs_call, run)
            seconds = alternate(run, args.rounds, {"ours": (a, False), "reference": (b, True), "same kernels": (b, False)})
            default_kernels(args.large)
            memory = [peak(run, call) for call in (a, b)]
            print(f"{stage + ', ' + kind:28} {seconds['ours'] * 1e3:7.1f} ms {seconds['reference'] * 1e3:7.1f} ms {seconds['ours'] / seconds['reference']:6.2f} "
                  f"{times * flops / seconds['ours'] / top:5.2f} {memory[0]:15.2f} {memory[1]:14.2f}  {seconds['ours'] / seconds['same kernels']:22.2f}   "
                  f"{count(ours):.2f}M, {type(theirs).__name__} {count(theirs):.2f}M", flush=True)
        del ours, theirs
    if wanted("AR sampling"):
        for L, B in ((args.length, args.batch), (4 * args.length, args.batch // 4))[:1 if args.large else 2]:
            bench_ar_sampling(run, args, L, B)
    if wanted("masked sampling"):
        bench_masked_sampling(run, args)


if __name__ == "__main__":
    main()
