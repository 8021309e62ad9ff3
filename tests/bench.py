"""Speed of each stage beside public reference models of the same size, run by hand: python tests/bench.py [--device cuda]

Prints milliseconds per training step or sample, best of five after three warm-ups, alternating with the reference, on the same
machine, dtype, threads and batch. The references need: pip install transformers diffusers (they are used here alone).
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import generator  # noqa: E402
import prior  # noqa: E402
import tokenizer  # noqa: E402
import torch  # noqa: E402


def alternate(run, **calls):
    """Best time in milliseconds of each call: three warm-ups, then five rounds in which all take turns."""
    best = dict.fromkeys(calls, math.inf)
    for k in range(8):
        for name, call in calls.items():
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            if k >= 3:
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def training_step(model, forward, run):
    """A forward and backward pass under the run's dtype."""
    def step():
        with run.autocast():
            loss = forward(model).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
    return step


def count(model):
    """Parameters in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def bench_tokenizer(run, args):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    ours = tokenizer.ViT(32, 4, args.width, args.depth, args.heads, 32, 16, 1.0, "registers", 4).to(run.device)
    del ours.sem_embed, ours.sem_norm, ours.sem_out  # the backbone alone, as in the reference
    config = Dinov2WithRegistersConfig(hidden_size=args.width, num_hidden_layers=args.depth, num_attention_heads=args.heads, image_size=32, patch_size=4,
                                       num_register_tokens=4, mlp_ratio=4)
    theirs, x = Dinov2WithRegistersModel(config).to(run.device), torch.randn(args.batch, 3, 32, 32, device=run.device)
    return ours, theirs, lambda m: m.norm(m.tokens(x)), lambda m: m(x).last_hidden_state


def bench_generator(run, args):
    from diffusers import DiTTransformer2DModel
    ours = generator.DiT(32, 4, 0, args.width, args.depth, args.heads, 32, 16, 4, "mean", "v").to(run.device)
    theirs = DiTTransformer2DModel(num_attention_heads=args.heads, attention_head_dim=args.width // args.heads, in_channels=3, out_channels=3,
                                   num_layers=args.depth, sample_size=32, patch_size=4, num_embeds_ada_norm=1000).to(run.device)
    x, t = torch.randn(args.batch, 3, 32, 32, device=run.device), torch.rand(args.batch, device=run.device)
    codes, labels = torch.zeros(args.batch, 32, dtype=torch.long, device=run.device), torch.zeros(args.batch, dtype=torch.long, device=run.device)
    return ours, theirs, lambda m: m(x, t, codes), lambda m: m(x, (t * 999).long(), labels).sample


def bench_masked(run, args):
    from transformers import LlamaConfig, LlamaModel
    ours = prior.Prior(args.length, 256, args.width, args.depth, args.heads, 0.0, False, "shared").to(run.device)
    config = LlamaConfig(vocab_size=257, hidden_size=args.width, num_hidden_layers=args.depth, num_attention_heads=args.heads,
                         intermediate_size=ours.blocks[0].up_proj.out_features, max_position_embeddings=args.length)
    theirs, codes = LlamaModel(config).to(run.device), torch.zeros(args.batch, args.length, dtype=torch.long, device=run.device)
    mask = torch.zeros(args.batch, 1, args.length, args.length, device=run.device)
    return ours, theirs, lambda m: m.transform(m.embed(codes)), lambda m: m(codes, attention_mask=mask).last_hidden_state


def bench_ar_sampling(run, args):
    from transformers import GPT2Config, GPT2LMHeadModel
    ours = prior.Prior(args.length, 256, args.width, args.depth, args.heads, 0.0, True, "shared").to(run.device).eval()
    config = GPT2Config(vocab_size=257, n_embd=args.width, n_layer=args.depth, n_head=args.heads, n_positions=args.length + 1, bos_token_id=256, eos_token_id=None)
    theirs = GPT2LMHeadModel(config).to(run.device).eval()
    settings, start = {"temperature": 1.0, "nucleus": 1.0}, torch.full((args.batch, 1), 256, device=run.device)

    def generate():
        with torch.no_grad(), run.autocast():
            theirs.generate(start, max_new_tokens=args.length, do_sample=True, top_k=0, use_cache=True, pad_token_id=256)

    return ours, theirs, lambda: prior.sample_ar(ours, args.batch, settings, run, torch.Generator()), generate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("--width", 192), ("--depth", 6), ("--heads", 3), ("--batch", 64), ("--length", 64)):
        parser.add_argument(flag, type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default="out")
    parser.add_argument("--dataset", default="shapes")
    args = parser.parse_args()
    run = data.Run(args)
    print(f"torch {torch.__version__}, {run.device}, {run.dtype}, {torch.get_num_threads()} threads, {args}")
    for name, build in (("tokenizer backbone, step", bench_tokenizer), ("generator, step", bench_generator), ("masked prior, step", bench_masked),
                        ("AR prior, sampling", bench_ar_sampling)):
        try:
            ours, theirs, ours_call, theirs_call = build(run, args)
        except ImportError as problem:
            print(f"{name:26} skipped: {problem}")
            continue
        if "step" in name:
            ours_call, theirs_call = training_step(ours, ours_call, run), training_step(theirs, theirs_call, run)
        best = alternate(run, ours=ours_call, reference=theirs_call)
        print(f"{name:26} ours {best['ours']:8.1f} ms ({count(ours):.2f}M)   {type(theirs).__name__} {best['reference']:8.1f} ms ({count(theirs):.2f}M)"
              f"   ratio {best['reference'] / best['ours']:.2f}")


if __name__ == "__main__":
    main()
