"""Stage 4: a text prior. One masked-diffusion transformer over [L code tokens | start | caption], shaped like LLaDA.

It learns three tasks at once (--mix), each the masked diffusion of prior.py on its own part of the sequence:
    text → code   − log p(c | w) ≤ E_k  (L / k) · Σ_{l hidden} − log p(c_l | visible codes, w)        the caption is never hidden      (1)
    code → text   − log p(w | c) ≤ E_k  (T / k) · Σ_{i hidden} − log p(w_i | c, visible words)        the code is never hidden         (2)
    joint         k of all L + T positions are hidden: the only task of the paper's release
k of the hidden part's positions, k uniform; every loss is divided once, by the number of positions of that part. Code positions can
only become values, text positions only text. Some captions are dropped in training, so that sampling can be guided:
    log p_w(c_l | ·) = log p(c_l | visible) + w (log p(c_l | visible, caption) − log p(c_l | visible)) + const                         (3)
A caption to be written fills a window of T tokens, the rest of which is its end token; a caption to be read is padded, unseen.

Reads OUT/<dataset>/codes.npy and the captions; writes OUT/<dataset>/text_prior.pt.
    python text_prior.py                                                       # shapes on a CPU, 100 seconds
    python text_prior.py --dataset folder --data-dir my/pictures               # captions from metadata.jsonl
    torchrun --nproc-per-node 8 text_prior.py --dataset imagenet --encoding gpt2
"""
import base64
import json
import math
import re
import sys
import threading
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import data  # first: it sets the threads' waiting policy before torch starts them
import numpy as np
import prior
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    "cifar10": dict(steps=20_000, batch_size=256, width=384, depth=8, heads=6, lr=1e-3, warmup=1000, ema=0.999, dropout=0.1),
    "folder": dict(steps=2000, batch_size=128, lr=5e-3, dropout=0.1),
    "imagenet": dict(steps=400_000, batch_size=512, width=1024, depth=24, heads=16, tables="shared", lr=3e-4, lr_matrix=0.0, lr_final=0.1,
                     warmup=2500, ema=0.9999, clip=1.0, dropout=0.1, save_every=5000),
}

# ---------------------------------------------------------------------------------------------------------------------
# text: captions to tokens and back
# ---------------------------------------------------------------------------------------------------------------------

PATTERN = r" ?\w+| ?[^\w\s]+|\s+"  # the pieces inside which bytes are merged: a word or a run of signs, with the space before it
MERGES = 1024  # learned from the captions at most
BYTES = {bytes([b]): b for b in range(256)}


def learn_merges(captions, most=MERGES):
    """Byte-pair merges of the captions: {bytes: rank}, the 256 bytes first, then the most frequent pair, again and again, until
    none occurs twice. Equal counts: the greater bytes first, so that the same captions always give the same merges."""
    pieces = Counter(piece for caption in captions for piece in re.findall(PATTERN, caption))
    words = [[bytes([b]) for b in piece.encode("utf-8", "replace")] for piece in pieces]
    counts, ranks, pairs, places = list(pieces.values()), dict(BYTES), Counter(), defaultdict(set)

    def count(k, sign):
        for pair in zip(words[k], words[k][1:]):
            pairs[pair] += sign * counts[k]
            if not pairs[pair]:
                del pairs[pair]
            places[pair].add(k)

    for k in range(len(words)):
        count(k, 1)
    for _ in range(most):
        pair = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if pair is None or pairs[pair] < 2:
            break
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        for k in places.pop(pair):
            count(k, -1)
            merged, word = [], iter(words[k])
            for part in word:
                if merged and (merged[-1], part) == pair:
                    merged[-1] += part
                else:
                    merged.append(part)
            words[k] = merged
            count(k, 1)
    return ranks


class Text:
    """Captions to token ids (n, T) and back: a tiktoken encoding, and three ids beyond it: pad (also the end of a caption), mask, start.

    ranks {bytes: rank} and pattern as tiktoken's; ids: the token id of each rank (default: the rank); special: ids of the three,
    where the encoding has its own; words: those of the training captions. Whatever text looks like a special token is text. Ids below
    `mask` are what a text position can become.
    """

    def __init__(self, ranks, pattern, ids=None, special=None, normal_form=None, words=()):
        self.ranks, self.pattern, self.ids, self.normal_form, self.words = ranks, pattern, ids, normal_form, sorted(words)
        self.encoding = tiktoken.Encoding("captions", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        last = max(ids or ranks.values())
        self.pad, self.mask, self.start = special or (last + 1, last + 2, last + 3)
        self.rank_of = {id: rank for rank, id in enumerate(ids)} if ids else {rank: rank for rank in ranks.values()}

    def encode(self, captions):
        """Token ids of each caption, lists of any length; "" gives none."""
        if self.normal_form:
            captions = [unicodedata.normalize(self.normal_form, caption) for caption in captions]
        encoded = self.encoding.encode_ordinary_batch(captions)
        return [[self.ids[rank] for rank in ranks] for ranks in encoded] if self.ids else encoded

    def rows(self, encoded):
        """Lists of token ids as one tensor (n, T) int32, padded; T is the longest's length, at least 1."""
        rows = np.full((len(encoded), max([1, *map(len, encoded)])), self.pad, dtype=np.int32)
        for row, ids in zip(rows, encoded):
            row[:len(ids)] = ids
        return torch.from_numpy(rows)

    def decode(self, ids):
        """The text of token ids (a list) up to the first pad; ids that are no text are left out."""
        ids = ids[:ids.index(self.pad)] if self.pad in ids else ids
        return self.encoding.decode([self.rank_of[id] for id in ids if id in self.rank_of], errors="replace")

    def unknown(self, prompt):
        """The words of a prompt that no training caption has."""
        return [word for word in re.findall(r"\w+", prompt) if word not in self.words]

    def state(self):
        """Plain values for the checkpoint: the arguments of Text, ranks as `read_ranks` reads them."""
        ranks = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in self.ranks.items())
        special = [self.pad, self.mask, self.start]
        return {"ranks": ranks, "special": special, **{name: getattr(self, name) for name in ("pattern", "ids", "normal_form", "words")}}


def read_ranks(text, where):
    """{bytes: rank} from the lines of a .tiktoken file (base64 of a token, space, rank); one line where it is not one."""
    ranks = {}
    for number, line in enumerate(text.rstrip().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            data.fail(f"{where} line {number}: expected a token in base64, a space and its rank")
    if not BYTES.keys() <= ranks.keys() or len(set(ranks.values())) < len(ranks) or not 0 <= min(ranks.values()) <= max(ranks.values()) < 2 ** 24:
        data.fail(f"{where}: expected all 256 single bytes among its tokens, each token with a rank of its own; {len(ranks)} tokens found")
    return ranks


def read_tokenizer_json(path):
    """The Text of a tokenizer.json with byte-level BPE (GPT-2's, Llama 3's, LLaDA's); one line where it is of another kind."""
    wrong = lambda what: data.fail(f"{path}: {what}; expected a tokenizer.json with byte-level BPE, as GPT-2, Llama 3 and LLaDA have")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, before, normalizer = content["model"], content["pre_tokenizer"], content.get("normalizer")
        vocab, merges, added = model["vocab"], model["merges"], {t["content"]: t["id"] for t in content.get("added_tokens", ())}
        steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
        kinds = [step["type"] for step in steps]
        form = normalizer["type"] if normalizer else None
        patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
        # byte-level BPE writes bytes as printable characters: those that are printable as themselves, the others from 256 on
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        character = {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(sorted(set(range(256)) - set(plain)))}
        as_bytes = lambda token: bytes(character[c] for c in token)
        tokens = [bytes([b]) for b in range(256)]
        ids = {as_bytes(token): id for token, id in vocab.items() if all(c in character for c in token)}
        tokens += dict.fromkeys(as_bytes("".join(pair if isinstance(pair, list) else pair.split(" "))) for pair in merges)
        ids = [ids[token] for token in tokens]
        if model.get("type", "BPE") != "BPE" or "ByteLevel" not in kinds or set(kinds) - {"ByteLevel", "Split"} or len(patterns) > 1:
            wrong(f"a model of type {model.get('type')} after {', '.join(kinds)}")
        if form not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            wrong(f"a normalizer of type {form}")
        if len(set(ids)) < len(ids) or not all(isinstance(id, int) and 0 <= id < 2 ** 24 for id in [*vocab.values(), *added.values()]):
            wrong("ids that are not whole numbers, one for each token")
        last = max(*vocab.values(), *added.values(), 0)
        pad, mask, start = (added.get(f"<|{name}|>", -1) for name in ("endoftext", "mdm_mask", "start_sem"))
        if not max(ids) < pad < mask:  # LLaDA's stand above its text; without them, new ones
            pad, mask = last + 1, last + 2
        special = pad, mask, start if start > mask else max(last, mask) + 1
        gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel splits by on its own
        pattern = str(patterns[0]) if patterns else gpt2
        text, trial = Text({token: rank for rank, token in enumerate(tokens)}, pattern, ids, special, form), "It's 2 o'clock,  \n\tplain text: a+b."
        if not pattern or text.decode(text.encode([trial])[0]) != trial:
            wrong("a pattern that leaves out part of the text")
        return text
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        wrong(f"not readable as one ({type(problem).__name__}: {problem})")


def fetch_encoding(name):
    """A named encoding of tiktoken, from its cache or the network; one line when neither has it within a few seconds."""
    got = []

    def fetch():
        try:
            got.append(tiktoken.get_encoding(name))
        except Exception as problem:  # requests and tiktoken raise their own kinds
            got.append(problem)

    thread = threading.Thread(target=fetch, daemon=True)  # tiktoken itself waits without end
    thread.start()
    thread.join(data.PATIENCE)
    if not got or isinstance(got[0], Exception):
        reason = type(got[0]).__name__ if got else f"no answer in {data.PATIENCE} seconds"
        data.fail(f"--encoding {name}: cannot be fetched ({reason}); on a machine with network, TIKTOKEN_CACHE_DIR=DIR python -c "
                  f"\"import tiktoken; tiktoken.get_encoding('{name}')\" fills DIR: copy DIR here and set TIKTOKEN_CACHE_DIR to it, "
                  "or name a .tiktoken or tokenizer.json file")
    return Text(got[0]._mergeable_ranks, got[0]._pat_str)


def build_text(encoding, captions):
    """The Text of --encoding: "captions" (merges learned from these captions), "bytes", a file, or a name of tiktoken's."""
    if encoding in ("captions", "bytes"):
        return Text(learn_merges(captions) if encoding == "captions" else BYTES, PATTERN)
    path = Path(encoding)
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    if path.suffix == ".tiktoken":
        try:
            return Text(read_ranks(path.read_text(encoding="ascii"), path), PATTERN)
        except (OSError, UnicodeDecodeError) as problem:
            data.fail(f"{path}: not readable as a .tiktoken file ({problem}); expected lines of a token in base64, a space and its rank")
    if encoding not in tiktoken.list_encoding_names():
        data.fail(f"--encoding {encoding}: expected captions, bytes, {', '.join(tiktoken.list_encoding_names())}, "
                  "or a file ending in .tiktoken or .json")
    return fetch_encoding(encoding)


# ---------------------------------------------------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------------------------------------------------

class TextPrior(nn.Module):
    """LLaDA's transformer over [L codes | start | T text tokens]: full attention, RMSNorm, SwiGLU, RoPE, no biases, untied output; the
    names of its parameters are those of LLaDA's checkpoints. Rows of the tables: text tokens, mask, start, then the codes.

    tables "position": each code position has rows of its own for its V values and for being hidden; "shared": V rows for all
    positions, hidden is the mask token (as in the paper's release).
    """

    def __init__(self, codes, values, pad, mask, start, positions, width, depth, heads, hidden, dropout, tables):
        super().__init__()
        self.L, self.V, self.pad, self.mask, self.start = codes, values, pad, mask, start
        own = codes if tables == "position" else 1
        outputs = start + 1 + own * values
        self.wte = nn.Embedding(outputs + (codes if own > 1 else 0), width)
        self.blocks = nn.ModuleList(prior.Block(width, heads, hidden, dropout, causal=False) for _ in range(depth))
        self.ln_f = nn.RMSNorm(width, eps=1e-5)
        self.ff_out = nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.wte.weight, std=0.1)
        nn.init.zeros_(self.ff_out.weight)
        self.register_buffer("rope", torch.stack(prior.rope_table(codes + 1 + positions, width // heads, theta=500_000.0)), persistent=False)
        row = torch.arange(codes) if own > 1 else torch.zeros(codes, dtype=torch.long)
        self.register_buffer("first", start + 1 + row * values, persistent=False)  # (L,) row of value 0
        self.register_buffer("hidden", outputs + row if own > 1 else torch.full((codes,), mask), persistent=False)  # (L,) row of "hidden"

    def forward(self, codes, text, writing):
        """codes (B, L) long, V: hidden. text (B, T) long, padded, mask: hidden. writing (B,) bool: padding is part of a caption to be
        written, else no token sees it. → logits of the values (B, L, V) and of the text (B, T, mask)."""
        L, start = self.L, torch.full_like(text[:, :1], self.start)
        ids = torch.cat([torch.where(codes == self.V, self.hidden, codes + self.first), start, text], 1)  # (B, N), N = L + 1 + T
        attend = torch.cat([torch.ones_like(ids[:, :L + 1], dtype=torch.bool), (text != self.pad) | writing[:, None]], 1)  # (B, N)
        x, (cos, sin) = self.wte(ids), self.rope[:, :ids.shape[1]]  # (B, N, D)
        for block in self.blocks:
            x = block(x, cos, sin, attend=attend[:, None, None])  # (B, N, D)
        x = self.ln_f(x)
        of_codes = self.ff_out.weight[self.start + 1:].view(-1, self.V, x.shape[2]).to(x.dtype)  # (L or 1, V, D)
        values = (x[:, :L].transpose(0, 1) @ of_codes.transpose(1, 2)).transpose(0, 1)  # (B, L, V), one matrix a position
        return values, F.linear(x[:, L + 1:], self.ff_out.weight[:self.mask].to(x.dtype))  # (B, T, mask)


# ---------------------------------------------------------------------------------------------------------------------
# loss
# ---------------------------------------------------------------------------------------------------------------------

def tasks_of(text, pad, mix, drop, draws):
    """The task of each row of text (B, T), drawn by the shares `mix` of (0) text → code, (1) code → text, (2) joint. A share `drop` of
    the captions of 0 and 2 is not read, only padding; where there is no caption, the task is the code. → text (B, T), task (B,)."""
    edges = torch.tensor(mix, device=text.device).cumsum(0) / sum(mix)  # (3,)
    task = torch.searchsorted(edges, draws.uniform(), right=True).clamp(max=2)  # (B,)
    unread = (draws.uniform() < drop) & (task != 1)
    text = torch.where(unread[:, None], pad, text)
    return text, task.masked_fill((text == pad).all(1), 0)


def text_nll(model, codes, text, task, u, scores, sizes, run):
    """The estimates of (1), (2) or their joint bound in nats per token for each row: codes (B, L), text (B, T) padded, task (B,) long,
    u (B,) and scores (B, L + T) as prior.hide, sizes (V, mask) → (B,)."""
    L, T, (V, mask) = codes.shape[1], text.shape[1], sizes
    at_text = torch.arange(L + T, device=codes.device) >= L  # (L + T,)
    out = ((task == 0)[:, None] & at_text) | ((task == 1)[:, None] & ~at_text)  # (B, L + T), never hidden
    whole = torch.cat([codes, text], 1)  # (B, L + T)
    visible, hidden, k = prior.hide(whole, torch.where(at_text, mask, V), u, scores.masked_fill(out, math.inf))
    with run.autocast():
        values, words = model(visible[:, :L], visible[:, L:], task != 0)  # (B, L, V), (B, T, mask)
    nll = [F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none") for logits, target in ((values, codes), (words, text))]
    return (torch.cat(nll, 1) * hidden).sum(1) / k  # (n / k) Σ, over n, the positions of the task's part


@torch.no_grad()
def bits_per_token(model, codes, text, task, run, batch=500):
    """Mean bits per token, an upper bound, of codes (n, L) given text (n, T) (task 0) or of text given codes (1), and its standard error."""
    values, generator = [], data.step_generator(0, 0)
    for c, w in zip(codes.split(batch), text.split(batch)):
        n = len(c)
        u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n  # spread evenly over all k
        scores = torch.rand(n, c.shape[1] + w.shape[1], generator=generator)
        c, w, u, scores, tasks = (x.to(run.device) for x in (c, w, u, scores, torch.full((n,), task)))
        values.append(text_nll(model, c, w, tasks, u, scores, (model.V, model.mask), run))
    return prior.mean_bits(torch.cat(values))


# ---------------------------------------------------------------------------------------------------------------------
# samplers: prior.sample_masked, with the other part as its condition
# ---------------------------------------------------------------------------------------------------------------------

class TextToCode:
    """The network as a masked prior over codes (B, L) given text (B, T), guided as in (3); guidance 1 is one plain call."""

    def __init__(self, model, guidance):
        self.model, self.guidance, self.L, self.V = model, guidance, model.L, model.V

    def __call__(self, codes, text):
        reading = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
        if self.guidance == 1:
            return self.model(codes, text, reading)[0]  # (B, L, V)
        without = torch.full_like(text, self.model.pad)
        both = self.model(codes.repeat(2, 1), torch.cat([text, without]), reading.repeat(2))[0].float()  # (2B, L, V)
        given, null = both.log_softmax(-1).chunk(2)
        return null + self.guidance * (given - null)


class CodeToText:
    """The network as a masked prior over the tokens of a caption (B, T) given codes (B, L)."""

    def __init__(self, model):
        self.model, self.V = model, model.mask  # what a position can become, and the id that stands for hidden

    def __call__(self, text, codes):
        return self.model(codes, text, torch.ones(len(codes), dtype=torch.bool, device=codes.device))[1]  # (B, T, mask)


def codes_from_text(model, text, sampler, guidance, run, seed=0, given=None, batch=prior.BATCH):
    """Draw codes (n, L) for prompts text (n, T); given (n, L): positions that are not V stay. Returns codes and network calls (n,)."""
    given, parts = torch.full((len(text), model.L), model.V) if given is None else given, []
    for start in range(0, len(text), batch):
        rows = slice(start, start + batch)
        generator = data.step_generator(seed, start)
        parts.append(prior.sample_masked(TextToCode(model, guidance), given[rows], sampler, run, generator, condition=(text[rows],)))
    return torch.cat([c for c, _ in parts]), torch.cat([k for _, k in parts])


def text_from_codes(model, codes, window, sampler, run, seed=0, batch=prior.BATCH):
    """Write captions (n, window) of token ids for codes (n, L)."""
    parts = []
    for start in range(0, len(codes), batch):
        part = codes[start:start + batch]
        hidden = torch.full((len(part), window), model.mask)
        parts.append(prior.sample_masked(CodeToText(model), hidden, sampler, run, data.step_generator(seed, start), condition=(part,))[0])
    return torch.cat(parts)


TO_CODE = {"temperature": 0.5, "nucleus": 1.0, "order": "event", "order_noise": 1.0}  # as prior.SAMPLERS
TO_TEXT = {"temperature": 0.0, "nucleus": 1.0, "order": "confidence", "order_noise": 0.0}  # the most likely caption, its surest words first


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------

def build_text_prior(config, text):
    """The transformer of a dict of settings (a checkpoint's config) and a Text."""
    keys = ("codes", "values", "width", "depth", "heads", "hidden", "dropout", "tables")
    return TextPrior(pad=text.pad, mask=text.mask, start=text.start, positions=config["text_length"], **{k: config[k] for k in keys})


def load_text_prior(args, device):
    """The trained text prior with averaged weights, its Text, and its config with the checksum of its captions; refuses one trained on
    other codes."""
    text_of = lambda state: Text(**{**state["text"], "ranks": read_ranks(state["text"]["ranks"], "text_prior.pt")})
    model, state = data.load_stage("text_prior", args, lambda state: build_text_prior(state["config"], text_of(state)))
    return model.to(device).eval(), text_of(state), {**state["config"], "captions": state["trained_on"].get("captions")}


def read_text(dataset, args, run):
    """The Text of the flags and all captions of the dataset as token ids (N, T); says how many have none or are cut."""
    captions, train = dataset.captions, dataset.splits["train"]
    missing = captions.count("")
    if missing == len(captions):
        data.fail(f"{args.data_dir}: no captions; write a metadata.jsonl there, a line {{\"file_name\": ..., \"text\": ...}} for each image, "
                  "or sort the images into folders by class")
    text = build_text(args.encoding, [captions[k] for k in train])
    text.words = sorted({word for k in train for word in re.findall(r"\w+", captions[k])})
    distinct = list(dict.fromkeys(captions))
    tokens = dict(zip(distinct, text.encode(distinct)))
    tokens = [tokens[caption] for caption in captions]
    cut = sum(len(ids) > args.text_length for ids in tokens)
    if run.main and (missing or cut):
        print(f"{args.dataset}: {missing:,} of {len(captions):,} images have no caption and train without; {cut:,} captions are longer than "
              f"--text-length {args.text_length} tokens and cut", file=sys.stderr)
    return text, text.rows([ids[:args.text_length] for ids in tokens])


def training_flops(args, mask):
    """FLOPs of one step, 3 × forward: blocks and the outputs (`mask` of them for text), on L codes, the start token and a window of text."""
    block = prior.block_flops(args.codes + 1 + args.window, args.width, args.hidden)
    return 3 * args.batch_size * (args.depth * block + 2 * args.width * (args.codes * args.values + args.window * mask))


def add_flags(parser):
    """The text prior's own flags; the defaults are the shapes values."""
    g = parser.add_argument_group("model")
    g.add_argument("--width", type=data.positive, default=128, help="D, width of the tokens")
    g.add_argument("--depth", type=data.positive, default=1, help="transformer blocks")
    g.add_argument("--heads", type=data.positive, default=4, help="attention heads")
    g.add_argument("--hidden", type=data.positive, help="width inside the SwiGLU (default: 8/3 of --width)")
    g.add_argument("--tables", choices=("position", "shared"), default="position",
                   help="embeddings and outputs of the codes: one set a position, or one for all")
    g.add_argument("--dropout", type=data.share, default=0.0, help="on both residual branches")
    g.add_argument("--shard", action="store_true", help="split the model over all processes (torchrun), for one that does not fit on a device")
    g = parser.add_argument_group("text")
    g.add_argument("--encoding", default="captions", help="captions: byte pairs learned from them; bytes; a name of tiktoken's (gpt2); or a file "
                   "(.tiktoken, split into words as captions are, or a tokenizer.json with byte-level BPE)")
    g.add_argument("--text-length", type=data.positive, default=64, help="tokens that a caption or prompt may have; longer captions are cut")
    g.add_argument("--mix", type=data.non_negative, nargs=3, default=[0.4, 0.4, 0.2], metavar=("TO_CODE", "TO_TEXT", "JOINT"),
                   help="how often each task is trained")
    g.add_argument("--drop", type=data.share, default=0.1, help="probability of reading no caption")


def main(argv=None):
    """Train the text prior; report bits per token of codes given captions, without them, and of captions given codes."""
    parser = data.make_parser(__doc__)
    data.add_training_flags(parser, steps=1000, batch_size=256, lr=1e-2, lr_matrix=0.02, warmup=50)
    add_flags(parser)
    args = data.parse(parser, PRESETS, argv)
    if args.shard and args.lr_matrix > 0:
        parser.error("argument --shard: Muon needs whole matrices; add --lr-matrix 0 (AdamW for all)")
    if args.width % args.heads or args.width // args.heads % 2:
        parser.error(f"argument --heads: --width {args.width} over {args.heads} heads is no even whole number; choose others")
    if sum(args.mix) <= 0:
        parser.error("argument --mix: expected at least one number above 0")
    args.hidden = args.hidden or prior.swiglu_hidden(args.width)
    run = data.Run(args, lock="text_prior")
    codes, about = data.open_codes(args)
    dataset, splits = data.load_dataset(args), about["splits"]
    data.check_images(about, dataset, args)
    text, tokens = read_text(dataset, args, run)
    args.codes, args.values, args.window = about["L"], about["V"], tokens.shape[1]
    flops, path = training_flops(args, text.mask), run.folder / "text_prior.pt"

    def nll_of(model, c, w, draws):  # (b,)
        w, task = tasks_of(w, text.pad, args.mix, args.drop, draws)  # (b, T), (b,)
        return text_nll(model, c, w, task, draws.stratified(), draws.uniform(args.codes + args.window), (args.values, text.mask), run)

    if args.dry_run:
        def loss(model):
            b, draws = args.batch_size // run.world // args.accumulate, data.Draws(0, 0, run, args.batch_size, 0, args.accumulate)
            return nll_of(model, torch.zeros(b, args.codes, dtype=torch.long), torch.zeros(b, args.window, dtype=torch.long), draws).mean()

        return data.describe(args, lambda: build_text_prior(vars(args), text), loss, flops, run)
    torch.manual_seed(args.seed)
    if args.shard and run.world == 1:
        data.fail("--shard: one process has nobody to share with; start it with torchrun --nproc-per-node 2 or more")
    model = build_text_prior(vars(args), text)
    model = run.shard(model) if args.shard else model.to(run.device)
    optimizers, ema = data.Optimizers(model, args), data.EMA(model, args.ema)
    trained_on = {"codes": about["sha256"], "captions": data.checksum(dataset.captions), "encoding": data.checksum(text.state())}
    state = data.resume(path, "text_prior", args, **trained_on)
    if state and args.shard:
        data.load_shards(path, state, args, model, optimizers, ema)
    elif state:
        data.restore(path, state, model=model, ema=ema, optimizer=optimizers)

    def save(step):
        what = dict(stage="text_prior", config=vars(args), step=step, ema=ema.state_dict(), trained_on=trained_on, text=text.state())
        if args.shard:
            data.save_shards(path, model, optimizers, run, **what)
        elif run.main:
            data.save_checkpoint(path, model=model.state_dict(), optimizer=optimizers.state_dict(), **what)

    start = state["step"] if state else 0
    trained = run.wrap(model, args)
    log, meter = data.Log(run, "text_prior", start, args.tensorboard), data.Meter(run, args, flops, start, args.batch_size * (args.codes + 1 + args.window), "tokens")
    for step in range(start, args.steps):
        run.seed_step(args.seed, step)
        rows = data.batch_rows(splits["train"], args.batch_size, args.seed, step)[run.share(args.batch_size)]
        loss = 0.0
        for part in range(args.accumulate):
            draws = data.Draws(args.seed, step, run, args.batch_size, part, args.accumulate)
            mine, flip = rows.chunk(args.accumulate)[part], (draws.uniform() < 0.5).long().cpu()
            c = torch.from_numpy(codes[mine.numpy(), flip.numpy()].astype(np.int64)).to(run.device)  # (b, L)
            w = tokens[mine].long().to(run.device)  # (b, T)
            with run.part(trained, last=part == args.accumulate - 1):
                part_loss = nll_of(trained, c, w, draws).mean() / args.accumulate
                part_loss.backward()
            loss = loss + part_loss.detach()
        loss = run.average(loss)
        norm = optimizers.step(data.warmup_cosine(step, args), step, loss)
        ema.update(step)
        meter.tick(step, log, loss=loss, norm=norm)
        stopping = run.stopping()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stopping:
            save(step + 1)
        if stopping:
            return data.stopped(path, step + 1, args, run)
    meter.close()
    if run.main or args.shard:  # a sharded model is evaluated by all processes together
        with data.evaluating(model), ema.applied():
            for split in ("val", "test"):
                rows = splits[split]
                c, w = torch.from_numpy(codes[rows.start:rows.stop, 0].astype(np.int64)), tokens[rows.start:rows.stop].long()
                c, w = (values[(w != text.pad).any(1)] for values in (c, w))
                if not len(c):
                    continue
                bits = {"code given caption": bits_per_token(model, c, w, 0, run),
                        "code alone": bits_per_token(model, c, torch.full_like(w, text.pad), 0, run),
                        "caption given code": bits_per_token(model, c, w, 1, run)}
                log.write(args.steps, **{f"{split} bits per token, {k}": round(v, 4) for k, (v, _) in bits.items()})
                if run.main:
                    print(f"{split}: bits per token (upper bounds, {len(c):,} pairs): "
                          + ", ".join(f"{k} {v:.4f} ± {error:.4f}" for k, (v, error) in bits.items()))
    run.close()


if __name__ == "__main__":
    data.command(main)
