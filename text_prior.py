"""Stage 4: a text prior. One masked-diffusion transformer, shaped like LLaDA, over [L codes | start | text].

It learns three tasks at once (--mix), each the masked diffusion of prior.py on its own part of the sequence:
text → code, where the caption is never hidden:
    − log p(c | w) ≤ E_k  (L / k) · Σ_{l hidden} − log p(c_l | visible codes, w)                        (1)
code → text, where the code is never hidden:
    − log p(w | c) ≤ E_k  (T / k) · Σ_{i hidden} − log p(w_i | c, visible words)                        (2)
joint, where all L + T positions may be hidden: the only task of the paper's release.
Of the n positions that a task may hide (L, T or L + T) k are hidden, k ~ U{1..n}, and the loss is divided by
n. Code positions can only become values, text positions only text. Some captions are dropped in training, so
that sampling can be guided, by g:
    log p_g(c_l) = log p(c_l | visible) + g (log p(c_l | visible, w) − log p(c_l | visible)) + const    (3)
A caption to be written fills a window of T tokens, and pad after its end is a token like others; one that is
only read is padded too, but no token sees the padding.

Reads OUT/<dataset>/codes.pt and the captions; writes OUT/<dataset>/text_prior.pt.
    python text_prior.py                                             # shapes on a CPU
    python text_prior.py --dataset folder --data-dir my/pictures     # captions from metadata.jsonl
    torchrun --nproc-per-node 8 text_prior.py --dataset imagenet --encoding gpt2
"""
import base64
import json
import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import data  # first: it sets the threads' waiting policy before torch starts them
import prior
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = prior.PRESETS | {
    "folder": dict(dropout=0.1, steps=2000, batch_size=128, lr=5e-3, ema=0.995, save_every=500)}

# -------- text: captions to tokens and back ------------------------------------------------------------

PATTERN = r" ?\w+| ?[^\w\s]+|\s+"  # bytes merge inside these: a word or signs, with the space before
MERGES = 1024  # learned from the captions at most
BYTES = {bytes([b]): b for b in range(256)}


def learn_merges(captions, most=MERGES):
    """Byte-pair merges of the captions, {bytes: rank}: the 256 bytes, then the most frequent pair (of several
    the one of greater bytes), again and again, until none occurs twice."""
    pieces = Counter(piece for caption in captions for piece in re.findall(PATTERN, caption))
    words = [[bytes([b]) for b in piece.encode("utf-8", "replace")] for piece in pieces]
    counts = list(pieces.values())
    ranks = dict(BYTES)
    pairs = Counter()  # how often each pair of neighbours occurs
    found_in = defaultdict(set)  # the words that have, or once had, a pair

    def count_pairs(k, sign):
        for pair in zip(words[k], words[k][1:]):
            pairs[pair] += sign * counts[k]
            found_in[pair].add(k)

    for k in range(len(words)):
        count_pairs(k, 1)
    for _ in range(most):
        pair = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if pairs[pair] < 2:
            break
        ranks.setdefault(b"".join(pair), len(ranks))
        for k in found_in.pop(pair):
            count_pairs(k, -1)
            merged = []
            for token in words[k]:
                merged.append(token)
                if tuple(merged[-2:]) == pair:
                    merged[-2:] = [b"".join(pair)]
            words[k] = merged
            count_pairs(k, 1)
    return ranks


class Text:
    """Captions to token ids and back: a tiktoken encoding, and three ids beyond it: pad (also the end of a
    caption), mask, start. Ids below `mask` are what a text position can become; no text is a special token.

    ranks {bytes: rank} and pattern as tiktoken's; ids: the token id of each rank (default: the rank);
    special: the three, where the encoding has its own; words: as from `pieces`, of the training captions;
    folds: texts are read without the differences in blanks and capitals that do not matter (`fold`).
    """

    def __init__(self, ranks, pattern, ids=None, special=None, normal_form=None, words=(), folds=False):
        self.ranks, self.pattern, self.ids = ranks, pattern, ids
        self.normal_form, self.words, self.folds = normal_form, set(words), folds
        self.small = folds and len(words) > 0 and all(word == word.lower() for word in words)
        self.encoding = tiktoken.Encoding("text", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.id_of = dict(enumerate(ids)) if ids else {rank: rank for rank in ranks.values()}
        self.rank_of = {id: rank for rank, id in self.id_of.items()}
        last = max(self.rank_of)
        self.pad, self.mask, self.start = special or (last + 1, last + 2, last + 3)

    def fold(self, text):
        """A text with one space before each word, the first too (" red" is another token than "red"), and,
        where no training caption has a capital, in small letters."""
        text = "".join(f" {word}" for word in text.split()) if self.folds else text
        return text.lower() if self.small else text

    def pieces(self, text):
        """The words of a text; where it folds, signs are words too, and each keeps the space before it."""
        return re.findall(PATTERN if self.folds else r"\w+", self.fold(text))

    def encode(self, captions):
        """Token ids of each caption, lists of any length; "" gives none."""
        captions = [self.fold(caption) for caption in captions]
        if self.normal_form:
            captions = [unicodedata.normalize(self.normal_form, caption) for caption in captions]
        encoded = self.encoding.encode_ordinary_batch(captions)
        return [[self.id_of[rank] for rank in ranks] for ranks in encoded]

    def rows(self, encoded):
        """Lists of token ids as one tensor (n, T) int32, padded; T is the longest's length, at least 1."""
        longest = max([1, *map(len, encoded)])
        rows = [ids + [self.pad] * (longest - len(ids)) for ids in encoded]
        return torch.tensor(rows, dtype=torch.int32)

    def decode(self, ids):
        """The text of token ids (a list) up to the first pad; ids that are no text are left out."""
        if self.pad in ids:
            ids = ids[:ids.index(self.pad)]
        ranks = [self.rank_of[id] for id in ids if id in self.rank_of]
        text = self.encoding.decode(ranks, errors="replace")
        return text.strip() if self.folds else text

    def words_of(self, captions):
        """All pieces of captions, a set."""
        return {piece for caption in captions for piece in self.pieces(caption)}

    def unknown(self, prompt):
        """The words of a prompt of which a piece is in no training caption (where these are known)."""
        if not self.words:
            return []
        return [word for word in prompt.split() if not self.words.issuperset(self.pieces(word))]

    def state(self):
        """Plain values for the checkpoint: the arguments of Text, ranks as `read_ranks` reads them."""
        lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in self.ranks.items()]
        special = [self.pad, self.mask, self.start]
        return {"ranks": "\n".join(lines), "pattern": self.pattern, "ids": self.ids, "special": special,
                "normal_form": self.normal_form, "words": sorted(self.words), "folds": self.folds}


def read_ranks(content):
    """{bytes: rank} from the content of a .tiktoken file: lines of a token in base64, a space and its rank.
    Raises data.Unfit or ValueError."""
    ranks = {}
    for line in content.rstrip().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    if not BYTES.keys() <= ranks.keys() or len(set(ranks.values())) < len(ranks):
        raise data.Unfit(f"not all 256 single bytes among its {len(ranks)} tokens, or two of one rank")
    return ranks


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KNOWN_PARTS = {"BPE", "ByteLevel", "Split", "NFC", "NFD", "NFKC", "NFKD", None}
TRIAL = "It's 2 o'clock,  \n\tplain text: a+b."


def byte_characters():
    """{character: byte} of byte-level BPE, in order of the bytes: those that print stand for themselves, the
    others are written from chr(256) on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(b if b in plain else next(others)): b for b in range(256)}


def read_tokenizer_json(path):
    """The Text of a tokenizer.json with byte-level BPE, which folds nothing: what was trained with one, as
    the authors' release, read texts as they are. Fails with one line where it is of another kind."""
    with data.reading(path, "expected a tokenizer.json with byte-level BPE, as of GPT-2, Llama 3, LLaDA"):
        content = json.loads(path.read_text(encoding="utf-8"))
        model, splitter = content["model"], content["pre_tokenizer"]
        splitters = splitter.get("pretokenizers", [splitter])
        patterns = [part["pattern"]["Regex"] for part in splitters if part["type"] == "Split"]
        normal_form = (content.get("normalizer") or {"type": None})["type"]
        parts = {model.get("type", "BPE"), normal_form, *(part["type"] for part in splitters)}
        if "ByteLevel" not in parts or parts - KNOWN_PARTS or len(patterns) > 1:
            raise data.Unfit(f"made of {', '.join(map(str, parts))}")

        byte_of = byte_characters()
        merged = ("".join(pair).replace(" ", "") for pair in model["merges"])  # of "a b" or ["a", "b"]
        written = [*byte_of, *dict.fromkeys(merged)]
        ranks = {bytes(byte_of[character] for character in token): k for k, token in enumerate(written)}
        ids = [model["vocab"][token] for token in written]
        added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        last = max([*model["vocab"].values(), *added.values()])
        pad, mask, start = (added.get(f"<|{name}|>", -1) for name in ("endoftext", "mdm_mask", "start_sem"))
        if not max(ids) < pad < mask:  # LLaDA's stand above its text; without them, new ones
            pad, mask = last + 1, last + 2
        if start <= mask:
            start = max(last, mask) + 1

        pattern = patterns[0] if patterns else GPT2_PATTERN  # ByteLevel splits as GPT-2 on its own
        text = Text(ranks, pattern, ids, (pad, mask, start), normal_form)
        if not pattern or len(set(ids)) < len(ids) or text.decode(text.encode([TRIAL])[0]) != TRIAL:
            raise data.Unfit("text does not come back whole: a pattern with gaps, or two tokens of one id")
    return text


def fetch_encoding(name):
    """A named encoding of tiktoken, from its cache or the network. Fails with one line when neither has it
    within a few seconds."""
    try:  # in a thread, since tiktoken itself waits without end
        with ThreadPool(1) as thread:
            return thread.apply_async(tiktoken.get_encoding, [name]).get(data.PATIENCE)
    except Exception as problem:  # requests and tiktoken raise their own kinds
        fetch = f"TIKTOKEN_CACHE_DIR=DIR python -c \"import tiktoken; tiktoken.get_encoding('{name}')\""
        data.fail(f"--encoding {name}: cannot be fetched ({type(problem).__name__}); on a machine with a "
                  f"network {fetch} fills DIR: copy DIR here and set TIKTOKEN_CACHE_DIR to it, or name a "
                  ".tiktoken or tokenizer.json file")


def build_text(encoding, captions):
    """The Text of --encoding: "captions" (merges learned from these captions), "bytes", a file, or a name of
    tiktoken's. It knows the words of the captions, and folds, but for a tokenizer.json."""
    path = Path(encoding)
    if path.suffix == ".json":
        text = read_tokenizer_json(path)
        text.words = text.words_of(captions)
        return text
    of_bytes = Text(BYTES, PATTERN, folds=True)
    reading = {"words": of_bytes.words_of(captions), "folds": True}
    if encoding == "captions":
        return Text(learn_merges(map(of_bytes.fold, captions)), PATTERN, **reading)
    if encoding == "bytes":
        return Text(BYTES, PATTERN, **reading)
    if path.suffix == ".tiktoken":
        with data.reading(path, "expected lines of a token in base64, a space and its rank"):
            return Text(read_ranks(path.read_text(encoding="ascii")), PATTERN, **reading)
    names = tiktoken.list_encoding_names()
    if encoding not in names:
        data.fail(f"--encoding {encoding}: expected captions, bytes, {', '.join(names)}, or a file ending in "
                  ".tiktoken or .json")
    fetched = fetch_encoding(encoding)
    return Text(fetched._mergeable_ranks, fetched._pat_str, **reading)


def stored_text(state):
    """The Text of a checkpoint."""
    return Text(**{**state["text"], "ranks": read_ranks(state["text"]["ranks"])})


# -------- model ----------------------------------------------------------------------------------------

class TextPrior(nn.Module):
    """LLaDA's transformer over [L codes | start | T text tokens], with full attention and untied output; its
    parameters are named as in LLaDA's checkpoints. Rows of wte: text tokens and pad, mask, start, values of
    codes, and, for tables "position", hidden codes; ff_out has the same rows but the last kind.

    tables "position": each code position has rows of its own for its V values and for being hidden; "shared":
    V rows for all positions, hidden is the mask token (as in the paper's release).
    """

    def __init__(self, codes, values, pad, mask, start, positions, width, depth, heads, hidden, dropout,
                 tables):
        super().__init__()
        self.L, self.V = codes, values
        self.pad, self.mask, self.start = pad, mask, start
        self.null_is_hidden = False
        own = codes if tables == "position" else 1
        outputs = start + 1 + own * values
        self.wte = nn.Embedding(outputs + own * (own > 1), width)
        self.blocks = nn.ModuleList(
            prior.Block(width, heads, hidden, dropout, causal=False) for _ in range(depth))
        self.ln_f = nn.RMSNorm(width, eps=1e-5)
        self.ff_out = prior.linear(width, outputs)
        nn.init.normal_(self.wte.weight, std=0.1)
        nn.init.zeros_(self.ff_out.weight)
        with torch.device("cpu"):  # also where the weights have no memory yet (load_release)
            rope = prior.rope_table(codes + 1 + positions, width // heads, theta=500_000.0)
            first_row = start + 1 + torch.arange(own) * values  # (L or 1,), of value 0
            hidden_row = outputs + torch.arange(own) if own > 1 else torch.tensor([mask])  # of being hidden
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("first_row", first_row, persistent=False)
        self.register_buffer("hidden_row", hidden_row, persistent=False)

    def forward(self, codes, text, writing, start=None, words=True):
        """codes (B, L) long, V: hidden. text (B, T) long, padded, mask: hidden. writing (B,) bool: padding is
        part of a caption to be written, else no token sees it. start (B, 1): the token between both (default:
        start). → logits of the values (B, L, V) and, if `words`, of the text (B, T, mask)."""
        L = self.L
        code_rows = torch.where(codes == self.V, self.hidden_row, codes + self.first_row)  # (B, L)
        if start is None:
            start = torch.full_like(text[:, :1], self.start)  # (B, 1)
        rows = torch.cat([code_rows, start, text], 1)  # (B, N), N = L + 1 + T
        attend = torch.ones_like(rows, dtype=torch.bool)  # (B, N)
        attend[:, L + 1:] = (text != self.pad) | writing[:, None]
        cos, sin = self.rope[:, :rows.shape[1]]  # 2 × (N, D/H/2)
        x = self.wte(rows)  # (B, N, D)
        for block in self.blocks:
            x = block(x, cos, sin, attend[:, None, None])  # (B, N, D)
        x = self.ln_f(x)
        of_codes = self.ff_out.weight[self.start + 1:].to(x.dtype)  # (L · V or V, D)
        of_codes = of_codes.view(-1, self.V, x.shape[2]).transpose(1, 2)  # (L or 1, D, V): one a position
        values = (x[:, :L].transpose(0, 1) @ of_codes).transpose(0, 1)  # (B, L, V)
        if not words:  # tokens of text are many
            return values, None
        of_text = self.ff_out.weight[:self.mask].to(x.dtype)  # (mask, D)
        return values, F.linear(x[:, L + 1:], of_text)  # (B, T, mask)


# -------- loss -----------------------------------------------------------------------------------------

def tasks_of(text, pad, mix, drop, part):
    """The task of each row of text (B, T), drawn from a data.Part by the shares `mix` of (0) text → code,
    (1) code → text, (2) joint. A share `drop` of the captions of 0 and 2 becomes padding; where there is no
    caption, the task is 0. → text (B, T), task (B,)."""
    edges = torch.tensor(mix, device=text.device).cumsum(0) / sum(mix)  # (3,)
    task = torch.searchsorted(edges, part.uniform(), right=True).clamp(max=2)  # (B,)
    dropped = (part.uniform() < drop) & (task != 1)
    text = torch.where(dropped[:, None], pad, text)
    return text, task.masked_fill((text == pad).all(1), 0)


def text_nll(model, codes, text, task, u, scores, sizes, run):
    """The estimates of (1), (2) or their joint bound for each row, in nats per token. codes (B, L),
    text (B, T) padded, task (B,), u (B,) and scores (B, L + T) as in prior.hide_positions, sizes (V, mask)
    → (B,)."""
    V, mask = sizes
    L = codes.shape[1]
    whole = torch.cat([codes, text], 1)  # (B, L + T)
    at_text = torch.arange(whole.shape[1], device=codes.device) >= L  # (L + T,)
    given = ((task == 0)[:, None] & at_text) | ((task == 1)[:, None] & ~at_text)  # (B, L + T), never hidden
    null = torch.where(at_text, mask, V)  # (L + T,)
    visible, hidden, k = prior.hide_positions(whole, null, u, scores.masked_fill(given, math.inf))
    with run.autocast():
        values, words = model(visible[:, :L], visible[:, L:], task != 0)  # (B, L, V), (B, T, mask)
    nll_codes = F.cross_entropy(values.float().transpose(1, 2), codes, reduction="none")  # (B, L)
    nll_text = F.cross_entropy(words.float().transpose(1, 2), text, reduction="none")  # (B, T)
    nll = torch.cat([nll_codes, nll_text], 1)  # (B, L + T)
    return (nll * hidden).sum(1) / k  # (1), (2) or the joint bound, divided by its L, T or L + T


@torch.no_grad()
def bits_per_token(model, codes, text, task, run, batch=500):
    """Mean bits per token, an upper bound, of codes (n, L) given text (n, T) (task 0) or of text given codes
    (task 1), and its standard error."""
    nll, generator = [], data.step_generator(0, 0)
    for c, w in zip(codes.split(batch), text.split(batch)):
        n = len(c)
        u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n  # over all k
        scores = torch.rand(n, c.shape[1] + w.shape[1], generator=generator)
        inputs = [x.to(run.device) for x in (c, w, torch.full((n,), task), u, scores)]
        nll.append(text_nll(model, *inputs, (model.V, model.mask), run))
    return prior.mean_bits(torch.cat(nll))


# -------- samplers: prior.sample_masked, with the other part as its condition --------------------------

class TextToCode:
    """The network as a masked prior over codes (B, L) given text (B, T), guided as in (3). Without caption
    means all padding, or, in the authors' release (model.null_is_hidden), start and text hidden."""

    def __init__(self, model, guidance):
        self.model, self.V, self.guidance = model, model.V, guidance

    def __call__(self, codes, text):
        model = self.model
        writing = torch.zeros_like(codes[:, 0], dtype=torch.bool)
        if self.guidance == 1:  # no guidance, one call
            return model(codes, text, writing, words=False)[0]  # (B, L, V)
        without = torch.full_like(text, model.pad)  # (B, T)
        start = torch.full_like(text[:, :1], model.start).repeat(2, 1)  # (2B, 1)
        if model.null_is_hidden:
            without = torch.where(text == model.pad, model.pad, model.mask)
            start[len(text):] = model.mask
        both = torch.cat([text, without])  # (2B, T)
        logits, _ = model(codes.repeat(2, 1), both, writing.repeat(2), start, words=False)  # (2B, L, V)
        guided, free = logits.float().log_softmax(-1).chunk(2)
        return free + self.guidance * (guided - free)


class CodeToText:
    """The network as a masked prior over the tokens of a caption (B, T) given codes (B, L)."""

    def __init__(self, model):
        self.model, self.V = model, model.mask  # its ids of text are 0 to V − 1, and V is hidden

    def __call__(self, text, codes):
        writing = torch.ones_like(codes[:, 0], dtype=torch.bool)
        return self.model(codes, text, writing)[1]  # (B, T, mask)


def sample_given(network, tokens, condition, sampler, run, seed):
    """Fill the hidden ones of tokens (n, N) given the condition (n, M) → tokens, network calls (n,)."""
    def draw(rows, generator):
        given = (condition[rows],)
        return prior.sample_masked(network, tokens[rows], sampler, run, generator, condition=given)

    return prior.draw_in_batches(draw, len(tokens), seed)


def codes_from_text(model, text, sampler, guidance, run, seed=0, given=None):
    """Draw codes (n, L) for prompts text (n, T); given (n, L): positions that are not V stay. Returns codes
    and network calls (n,)."""
    if given is None:
        given = torch.full((len(text), model.L), model.V)
    return sample_given(TextToCode(model, guidance), given, text, sampler, run, seed)


def text_from_codes(model, codes, window, sampler, run, seed=0):
    """Write captions (n, window) of token ids for codes (n, L)."""
    hidden = torch.full((len(codes), window), model.mask)
    return sample_given(CodeToText(model), hidden, codes, sampler, run, seed)[0]


# samplers, as prior.SAMPLERS; of a caption: the most likely one, its surest words first
TO_CODE = {"temperature": 0.5, "nucleus": 1.0, "order": "event", "order_noise": 1.0, "per_step": 2}
TO_TEXT = {"temperature": 0.0, "nucleus": 1.0, "order": "confidence", "order_noise": 0.0, "per_step": 1}


# -------- training -------------------------------------------------------------------------------------

def build_text_prior(config, text):
    """The transformer of a dict of settings (a checkpoint's config) and a Text."""
    keys = ("codes", "values", "width", "depth", "heads", "hidden", "dropout", "tables")
    sizes = {key: config[key] for key in keys} | {"positions": config["text_length"]}
    return TextPrior(pad=text.pad, mask=text.mask, start=text.start, **sizes)


def load_text_prior(args, stored, device):
    """The trained text prior with averaged weights, its Text, and its config with the id of its captions;
    refuses one trained on other codes than the `stored` (data.load_codes)."""
    path = data.run_folder(args) / "text_prior.pt"
    remedy = "train it with " + data.script_command("text_prior.py", args)
    state = data.load_trained(path, "text_prior", args.dataset, remedy, codes=stored["id"])
    with data.reading(path, remedy):
        text = stored_text(state)
        config = {**state["config"], "captions": state["made_from"].get("captions")}
        model = build_text_prior(config, text)
        model.load_state_dict(state["ema"])
    return model.to(device).eval(), text, config


def read_release(folder):
    """The weights of the authors' fine-tuned LLaDA (a folder DLC_LLADA_L512) by the names of TextPrior,
    memory-mapped, its Text, and the settings that shapes tell (all but L)."""
    folder = Path(folder)
    state = {name.removeprefix("model.transformer."): x for name, x in data.read_weights(folder).items()}
    text = read_tokenizer_json(folder / "tokenizer.json")
    with data.reading(folder, "expected the authors' fine-tuned LLaDA"):
        rows, width = state["wte.weight"].shape
        config = dict(values=rows - text.start - 1, width=width, tables="shared",  # rows: text, start, values
                      heads=data.released_config(folder).get("n_heads", width // 128),
                      hidden=len(state["blocks.0.up_proj.weight"]),
                      depth=len([name for name in state if name.endswith("up_proj.weight")]))
    return state, text, config


def load_release(folder, stored, device):
    """The authors' text prior, its Text and its config, as load_text_prior, for the L and V of `stored`. The
    weights stay in their type (bfloat16) and go to the device one at a time. The lengths are ours: the
    release says none."""
    state, text, config = read_release(folder)
    config |= {"codes": stored["L"], "text_length": 512, "window": 64, "captions": None, "dropout": 0.0}
    with data.reading(folder, "expected the authors' fine-tuned LLaDA"):
        if config["values"] != stored["V"]:
            raise data.Unfit(f"{config['values']} values a position, the generator has {stored['V']}")
        with torch.device("meta"):
            model = build_text_prior(config, text)
        model.load_state_dict(state, assign=True)
    model.null_is_hidden = True  # as it was trained: without caption, words and start are mask tokens
    return model.to(device).eval(), text, config


def encode_captions(dataset, args, run, text=None):
    """All captions as token ids (n, T), those of an image in a row; of each image the row of the first (N,)
    and how many (N,); and their Text, by default that of the flags. Says how many are missing or cut."""
    captions, train = dataset.captions, dataset.splits["train"]
    missing = captions.count("")
    if missing == len(captions):
        data.fail(f"{args.data_dir}: no captions; write a metadata.jsonl there, a line {{\"file_name\": ..., "
                  "\"text\": ...} for each image, or sort the images into folders by class")
    own = [dataset.all_captions.get(row, [caption]) for row, caption in enumerate(captions)]
    if text is None:
        text = build_text(args.encoding, list(chain(*own[train.start:train.stop])))
    count = torch.tensor([len(texts) for texts in own])  # (N,)
    every = list(chain(*own))
    distinct = list(dict.fromkeys(every))
    ids_of = dict(zip(distinct, text.encode(distinct)))
    encoded = [ids_of[caption] for caption in every]
    cut = sum(len(ids) > args.text_length for ids in encoded)
    if run.main and (missing or cut):
        print(f"{args.dataset}: {missing:,} of {len(dataset):,} images have no caption and train without; "
              f"{cut:,} captions are longer than --text-length {args.text_length} tokens and cut",
              file=sys.stderr)
    tokens = text.rows([ids[:args.text_length] for ids in encoded])
    return tokens, count.cumsum(0) - count, count, text


def caption_rows(part, first, count):
    """The rows of tokens (b,) that a part of a batch is shown: of an image with several captions any one."""
    if (count == 1).all():
        return part.rows
    return first[part.rows] + (part.uniform().cpu().double() * count[part.rows]).long()


def report_bits(split, model, codes, text, log, step, run):
    """Print and log bits per token of a split: of the codes (n, L) and text (n, T) where there is text."""
    pairs = (text != model.pad).any(1)
    if not pairs.any():
        return
    c, w = codes[pairs], text[pairs].long()
    bits = {"code given caption": bits_per_token(model, c, w, 0, run),
            "code alone": bits_per_token(model, c, torch.full_like(w, model.pad), 0, run),
            "caption given code": bits_per_token(model, c, w, 1, run)}
    log.write(step, **{f"{split} bits per token, {what}": round(mean, 4) for what, (mean, _) in bits.items()})
    if run.main:
        shown = ", ".join(f"{what} {mean:.4f} ± {error:.4f}" for what, (mean, error) in bits.items())
        print(f"{split}: bits per token (upper bounds, {len(c):,} pairs): {shown}")


def add_flags(parser):
    """The text prior's own flags; the defaults are the shapes values."""
    add = parser.add_argument_group("model").add_argument
    add("--width", type=data.positive, default=128, help="D, width of the tokens")
    add("--depth", type=data.positive, default=1, help="transformer blocks")
    add("--heads", type=data.positive, default=4, help="attention heads")
    add("--hidden", type=data.positive, help="width inside the SwiGLU (default: 8/3 of --width)")
    add("--tables", choices=("position", "shared"), default="position",
        help="embeddings and outputs of the codes: one set a position, or one for all")
    add("--dropout", type=data.fraction, default=0.0, help="on both residual branches")
    add("--shard", action="store_true",
        help="split the model over all processes (torchrun), for one that does not fit on a device")
    add = parser.add_argument_group("text").add_argument
    add("--encoding", default="captions",
        help="captions: byte pairs learned from them; bytes; a name of tiktoken's (gpt2); or a file "
             "(.tiktoken, split into words as captions are, or a tokenizer.json with byte-level BPE)")
    add("--text-length", type=data.positive, default=64,
        help="tokens that a caption or prompt may have; longer captions are cut")
    add("--mix", type=data.non_negative, nargs=3, default=[0.4, 0.4, 0.2],
        metavar=("TO_CODE", "TO_TEXT", "JOINT"), help="how often each task is trained")
    add("--drop", type=data.fraction, default=0.1, help="probability of reading no caption")
    add = parser.add_argument_group("start of the run").add_argument
    add("--init", metavar="DIR",
        help="start from the authors' weights, the folder DLC_LLADA_L512 (--encoding: its tokenizer.json)")


def parse(argv=None):
    """The flags of this script, checked: their parser and values."""
    parser = data.make_parser(__doc__)
    add_flags(parser)
    data.add_training_flags(parser, steps=600, batch_size=256, lr=1e-2, lr_matrix=0.02, warmup=50, ema=0.99)
    args = data.parse(parser, PRESETS, argv)
    if args.shard and args.lr_matrix > 0:
        parser.error("argument --shard: Muon needs whole matrices; add --lr-matrix 0 (AdamW for all)")
    if args.width % args.heads or args.width // args.heads % 2:
        parser.error(f"argument --heads: --width {args.width} over {args.heads} heads is no even number")
    if sum(args.mix) <= 0:
        parser.error("argument --mix: expected at least one number above 0")
    args.hidden = args.hidden or prior.swiglu_hidden(args.width)
    return parser, args


def main(argv=None, dataset=None):
    """Train the text prior; report bits per token of codes, with and without captions, and of captions."""
    parser, args = parse(argv)
    run = data.Run(args, lock="text_prior")
    dataset = dataset or data.load_dataset(args)
    train_rows = dataset.splits["train"]
    data.fit_batch(parser, args, train_rows)
    remedy = "make it with " + data.script_command("tokenizer.py", args)
    stored = data.load_codes(run.folder / "codes.pt", remedy, images_id=dataset.id)
    path, text = run.folder / "text_prior.pt", None
    if path.exists() and not args.restart and not args.dry_run:  # it goes on with the tokens that it knows
        remedy = "--restart begins anew, another --out keeps it"
        with data.reading(path, remedy):
            text = stored_text(data.read(path, "text_prior", only="ema"))
    tokens, first, count, text = encode_captions(dataset, args, run, text)  # (n, T), (N,), (N,)
    args.codes, args.values, args.window = stored["L"], stored["V"], tokens.shape[1]
    torch.manual_seed(args.seed)
    model = build_text_prior(vars(args), text)
    if args.init:  # a run that goes on loads its own weights over these
        with data.reading(args.init, "expected the authors' DLC_LLADA_L512, and flags that fit it"):
            state, _, sizes = read_release(args.init)
            data.fill_as_flags_say(model, state, sizes, args)
    if args.dry_run:
        data.dry_run(args, model, run)
    if args.shard and run.world == 1:
        data.fail("--shard: one process has no others; start it with torchrun --nproc-per-node 2 or more")
    model.to("cpu" if args.shard else run.device)  # whole, it may not fit on a device
    ema = data.averaged(model, args.ema)
    if args.shard:
        run.shard(model, ema.module)
    optimizers = data.Optimizers(model, args)
    made_from = {"codes": stored["id"], "captions": dataset.captions_id}
    checkpoint = data.Checkpoint("text_prior", args, parser.settings, run, made_from, model, ema, optimizers,
                                 text=text.state())
    start = checkpoint.resume()
    wrapped = run.wrap(model, args)
    length = args.codes + args.window  # L + T
    steps = data.Steps(checkpoint, start, train_rows, args.batch_size * (length + 1), "tokens")

    for step in steps:
        loss = 0.0
        for part in data.batch_parts(step, train_rows, args, run, wrapped):
            c = stored["codes"][part.rows, part.flips().long().cpu()].long().to(run.device)  # (b, L)
            w = tokens[caption_rows(part, first, count)].long().to(run.device)  # (b, T)
            w, task = tasks_of(w, text.pad, args.mix, args.drop, part)  # (b, T), (b,)
            u, scores = part.stratified(), part.uniform(length)  # (b,), (b, L + T)
            nll = text_nll(wrapped, c, w, task, u, scores, (args.values, text.mask), run)  # (b,)
            loss = loss + part.backward(nll.mean())
        loss = run.average(loss)
        norm = optimizers.step(step, loss)
        ema.update_parameters(model)
        steps.show(loss=loss, norm=norm)

    if run.main or args.shard:  # a sharded model is evaluated by all processes together
        for split in ("val", "test"):
            rows = slice(dataset.splits[split].start, dataset.splits[split].stop)
            held_out = stored["codes"][rows, 0].long()
            report_bits(split, ema.module, held_out, tokens[first[rows]], steps.log, args.steps, run)
    run.wait()


if __name__ == "__main__":
    data.run_script(main)
