"""Speed of each stage beside public models of the same size, by hand: python tests/bench.py [--device cuda]

Forward passes, training steps (forward, backward, fused AdamW) and autoregressive sampling. Ours and the
reference take turns, on the same machine, dtype, threads, batch and number of parameters, eager; three
warm-ups, medians, and the ratio of the medians. The reference runs once as its users run it and once with
this project's choice of attention kernel on a CPU (last column). References: pip install transformers
diffusers safetensors.
"""
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

def millions(model):
    """Parameters of a model in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def timed(run, call, own_kernels):
    """Seconds of a call, on a CPU with this project's choice of attention kernel (data.Run's) or torch's."""
    if run.device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(not own_kernels)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(own_kernels)
    start = time.perf_counter()
    call()
    torch.zeros(1, device=run.device).item()  # waits for a GPU
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


# Of each stage: ours, the reference, what is called of ours, what of the reference.

def tokenizers(run, args):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    size, patch = 32, 4
    ours = tokenizer.ViT(size, patch, args.width, args.depth, args.heads, 32, 16, 1.0, "registers", 4)
    del ours.sem_embed, ours.sem_norm, ours.sem_out  # the backbone alone, as in the reference
    theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=args.width, num_hidden_layers=args.depth, num_attention_heads=args.heads, mlp_ratio=4,
        image_size=size, patch_size=patch, num_register_tokens=4))
    x = torch.randn(args.batch, 3, size, size, device=run.device)
    return ours, theirs, lambda m: m.norm(m.tokens(x)), lambda m: m(x).last_hidden_state


def generators(run, args):
    from diffusers import DiTTransformer2DModel
    width, depth, heads = args.width, args.depth, args.heads
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=3, out_channels=3,
        num_layers=depth, sample_size=32, patch_size=4, num_embeds_ada_norm=1000)

    def build(values):
        return generator.DiT(32, 4, 0, width, depth, heads, 16, values, 4, "mean", "v")

    missing = (millions(theirs) - millions(build(1))) * 1e6
    ours = build(max(1, 1 + round(missing / (16 * width))))  # more rows of the code table make up for it
    x = torch.randn(args.batch, 3, 32, 32, device=run.device)
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
    ours = prior.Prior(L, 256, args.width, args.depth, args.heads, 0.0, False, "shared")
    del ours.head  # the hidden states, as in the reference
    theirs = llama_of(ours, 257 + L)
    codes = torch.zeros(B, L, dtype=torch.long, device=run.device)
    mask = torch.zeros(B, 1, L, L, device=run.device)
    return (ours, theirs, lambda m: transformed(m, m.embed(codes), *m.rope),
            lambda m: m(codes, mask).last_hidden_state)


def text_priors(run, args):
    L, T, N = args.length, args.length // 4, args.length + 1 + args.length // 4
    hidden = prior.swiglu_hidden(args.width)
    ours = text_prior.TextPrior(L, 256, 1000, 1001, 1002, T, args.width, args.depth, args.heads, hidden, 0.0,
                                "shared")
    del ours.ff_out
    cos, sin = ours.rope.to(run.device)
    ids = torch.zeros(args.batch, N, dtype=torch.long, device=run.device)
    unseen = torch.randint(0, T, (args.batch, 1), device=run.device)  # captions of several lengths
    seen = (torch.arange(N, device=run.device) < N - unseen)[:, None, None]  # (B, 1, 1, N)
    mask = torch.zeros(args.batch, 1, N, N, device=run.device).masked_fill(~seen, -1e30)
    theirs = llama_of(ours, ours.wte.num_embeddings)
    return (ours, theirs, lambda m: transformed(m, m.wte(ids), cos, sin, seen),
            lambda m: m(ids, mask).last_hidden_state)


PAIRS = {"tokenizer ViT": tokenizers, "generator": generators, "masked prior": priors,
         "text prior": text_priors}


def print_pair(name, run, args):
    """The two lines of a pair."""
    with data.needed_package("transformers diffusers safetensors", name):
        ours, theirs, ours_call, theirs_call = PAIRS[name](run, args)
    for model in (ours, theirs):
        model.to(run.device)
    pairs = zip(ways_of(ours, ours_call, run), ways_of(theirs, theirs_call, run))
    for kind, (a, b) in zip(("forward", "training step"), pairs):
        mine, other, same = medians(run, args.rounds, (a, True), (b, False), (b, True))
        title = f"{name}, {kind}"
        print(f"{title:28} {mine * 1e3:7.1f} ms {other * 1e3:7.1f} ms {mine / other:6.2f} {mine / same:6.2f}",
              f" {millions(ours):.2f}M, {type(theirs).__name__} {millions(theirs):.2f}M", flush=True)


def print_ar_sampling(run, args):
    """Tokens per second of our decoder and of transformers' GPT-2 with its cache."""
    B, L = args.batch, args.length
    with data.needed_package("transformers", "AR sampling"):
        from transformers import GPT2Config, GPT2LMHeadModel
    ours = prior.Prior(L, 256, args.width, args.depth, args.heads, 0.0, True, "shared").to(run.device).eval()
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=258, n_embd=args.width, n_layer=args.depth, n_head=args.heads, n_positions=L + 1,
        bos_token_id=256, eos_token_id=None, pad_token_id=257)).to(run.device).eval()
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


def main():
    """Print the table of the rows asked for."""
    parser = data.make_parser(__doc__)
    add = parser.add_argument_group("bench").add_argument
    add("--batch", type=data.positive, default=32)
    add("--length", type=data.positive, default=64, help="L, codes")
    add("--width", type=data.positive, default=384)
    add("--depth", type=data.positive, default=6)
    add("--heads", type=data.positive, default=6)
    add("--rounds", type=data.positive, default=9, help="measured rounds")
    add("--only", nargs="+", default=[""], help="rows whose name has one of these words")
    args = data.parse(parser, {})
    run = data.Run(args)
    print(f"{run.device}, {torch.get_num_threads()} threads, {run.dtype}, batch {args.batch}")
    print(f"{'':33} ours  reference  ratio, on the same kernels")
    for name in (*PAIRS, "AR sampling"):
        if not any(word in name for word in args.only):
            continue
        if name in PAIRS:
            print_pair(name, run, args)
        else:
            print_ar_sampling(run, args)
    used = [name for name in ("torch", "transformers", "diffusers") if name in sys.modules]
    print(", ".join(f"{name} {sys.modules[name].__version__}" for name in used))


if __name__ == "__main__":
    data.run_script(main)
