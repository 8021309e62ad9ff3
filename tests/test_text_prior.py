"""The text prior: tokens, the three tasks, guidance, and what words do to codes."""
import base64
import json
import math
import socket
import time

import data
import numpy as np
import prior
import pytest
import sample
import text_prior
import torch
from conftest import TINY, call, link_codes, make_folder, ended, refuse, start

L, V, T = 4, 3, 5
CAPTIONS = ["a small red ring", "a large red bar", "a small blue bar", "a large blue ring"] * 3
ODD = ["", " ", "a  b\n\tc ", "naïve café", "日本語の文", "שלום עולם", "👩🏾‍🌾 farmer 🕶️", "<|endoftext|> and <|start_sem|>", "'quotes' -- 3.14 $%", "a" * 10_000]
SAMPLER = {**text_prior.TO_CODE, "nucleus": 1.0, "per_step": 1, "steps": 64, "remask": 0.0, "remask_window": [0.3, 0.55]}


def network(tables="position", seed=0, mask=9, **sizes):
    """A tiny text prior with random outputs: text ids 0 to 7, pad 8, mask 9, start 10."""
    torch.manual_seed(seed)
    settings = dict(codes=L, values=V, pad=8, mask=mask, start=10, positions=32, width=16, depth=2, heads=2, hidden=32, dropout=0.0, tables=tables)
    model = text_prior.TextPrior(**{**settings, **sizes}).eval()
    torch.nn.init.normal_(model.ff_out.weight, std=0.5)
    return model


def some(n=6, seed=0):
    """Codes (n, L), text (n, T) padded at different lengths."""
    rng = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 8, (n, T), generator=rng)
    ends = torch.randint(1, T + 1, (n, 1), generator=rng)
    return torch.randint(0, V, (n, L), generator=rng), torch.where(torch.arange(T) < ends, text, 8)


# --- tokens -----------------------------------------------------------------------------------------------------------

def write_tokenizer_json(path, merges, added=(), **changes):
    """A byte-level tokenizer.json as the tokenizers package writes it, with ids that do not follow the merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    character = {b: chr(b) for b in plain} | {b: chr(256 + k) for k, b in enumerate(sorted(set(range(256)) - set(plain)))}
    written = lambda token: "".join(character[b] for b in token)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    ids = np.random.default_rng(0).permutation(len(tokens)).tolist()
    content = {"added_tokens": [{"content": text, "id": id} for text, id in added], "normalizer": None,
               "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                   {"type": "Split", "pattern": {"Regex": r" ?\p{L}+| ?[^\s\p{L}]+|\s+"}, "behavior": "Isolated", "invert": False},
                   {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
               "model": {"type": "BPE", "vocab": {written(t): i for t, i in zip(tokens, ids)}, "merges": [f"{written(a)} {written(b)}" for a, b in merges]}}
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return dict(zip(tokens, ids))


@pytest.fixture
def encodings(tmp_path):
    """One of each kind of encoding."""
    ranks = {**text_prior.BYTES, b" a": 256, b"re": 257, b"red": 258}
    (tmp_path / "some.tiktoken").write_text("\n".join(f"{base64.b64encode(t).decode()} {r}" for t, r in ranks.items()))
    write_tokenizer_json(tmp_path / "tokenizer.json", [(b"r", b"e"), (b"re", b"d"), (b" ", b"red")], [("<|endoftext|>", 300), ("<|mdm_mask|>", 305)])
    return {name: text_prior.build_text(str(name), CAPTIONS) for name in ("captions", "bytes", tmp_path / "some.tiktoken", tmp_path / "tokenizer.json")}


def test_every_encoding_gives_back_what_it_was_given(encodings):
    for name, text in encodings.items():
        for caption, ids in zip(ODD, text.encode(ODD)):
            assert text.decode(ids) == caption, (name, caption)
            assert all(id < text.pad for id in ids) and text.pad < text.mask < text.start  # nothing in a text is a special token
        rows = text.rows(text.encode(["red", "", "a small red ring"]))
        assert [text.decode(row) for row in rows.tolist()] == ["red", "", "a small red ring"] and (rows[1] == text.pad).all()
        again = text_prior.Text(**{**text.state(), "ranks": text_prior.read_ranks(text.state()["ranks"], "here")})
        assert again.encode(ODD) == text.encode(ODD) and again.state() == text.state()


def test_merges_make_words_of_captions_and_are_always_the_same():
    text = text_prior.build_text("captions", CAPTIONS)
    assert [len(ids) for ids in text.encode(CAPTIONS[:2])] == [4, 4] and len(text.encode(["a green ring"])[0]) > 3  # green was never seen
    assert text_prior.learn_merges(CAPTIONS) == text_prior.learn_merges(CAPTIONS[::-1])
    assert text_prior.learn_merges(["ab ab ab"], most=0) == text_prior.BYTES
    assert text_prior.learn_merges(["aaaa", "aaaa"])[b"aaaa"] == 257  # a pair that overlaps itself
    assert text.unknown("a tiny ring") == ["a", "tiny", "ring"]  # it knows the merges alone; the words are noted in training


def test_ids_of_a_tokenizer_json_are_its_own_also_where_they_do_not_follow_the_merges(tmp_path):
    merges = [(b"r", b"e"), (b"re", b"d"), (b" ", b"red"), (b"e", b"d")]
    ids = write_tokenizer_json(tmp_path / "tokenizer.json", merges, [("<|endoftext|>", 300), ("<|mdm_mask|>", 305)])
    text = text_prior.build_text(str(tmp_path / "tokenizer.json"), [])
    assert text.encode(["red red ed"]) == [[ids[b"red"], ids[b" red"], ids[b" "], ids[b"ed"]]]  # "re" is merged before "ed"
    assert (text.pad, text.mask, text.start) == (300, 305, 306)
    write_tokenizer_json(tmp_path / "other.json", merges, [("<|endoftext|>", 0), ("<|mdm_mask|>", 290)])  # below the text: not to be used
    text = text_prior.build_text(str(tmp_path / "other.json"), [])
    assert (text.pad, text.mask, text.start) == (291, 292, 293)
    for wrong in ({"pre_tokenizer": {"type": "Metaspace"}}, {"model": {"type": "Unigram", "vocab": {}, "merges": []}}, {"normalizer": {"type": "Lowercase"}},
                  {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\p{L}+"}}, {"type": "ByteLevel"}]}},
                  {"added_tokens": [{"content": "x", "id": "5"}]}):
        write_tokenizer_json(tmp_path / "wrong.json", merges, **wrong)
        with pytest.raises(SystemExit, match="wrong.json.*byte-level BPE"):
            text_prior.build_text(str(tmp_path / "wrong.json"), [])


def test_encodings_that_cannot_be_read_are_refused_with_one_line(tmp_path):
    for name, content, word in (("a.tiktoken", "YQ== 0\nno line", "line 2"), ("b.tiktoken", "YQ== 0", "256 single bytes"), ("c.tiktoken", None, "c.tiktoken"),
                                ("d.json", "{", "d.json"), ("e.json", "[]", "e.json"), ("f.json", None, "f.json")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit, match=f"error: .*{word}"):
            text_prior.build_text(str(tmp_path / name), [])
    with pytest.raises(SystemExit, match="gpt3.*expected.*gpt2"):
        text_prior.build_text("gpt3", [])


def test_a_server_that_never_answers_ends_in_one_line(trained, tmp_path):
    link_codes(trained, tmp_path)
    proxies = {}
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        for name in ("HTTPS_PROXY", "https_proxy"):
            proxies[name] = f"http://127.0.0.1:{server.getsockname()[1]}"
        begun = time.time()
        process = start(tmp_path / "said", "text_prior", *TINY["text_prior"], "--encoding", "gpt2", "--out", tmp_path, PATIENCE=1,
                        TIKTOKEN_CACHE_DIR=tmp_path / "cache", **proxies)
        code, said = ended(process, tmp_path / "said")
    assert code == 1 and said.startswith("error: --encoding gpt2") and said.count("\n") == 1, said
    assert "TIKTOKEN_CACHE_DIR" in said and time.time() - begun < 20


# --- model and loss ---------------------------------------------------------------------------------------------------

def test_names_and_sizes_are_those_of_llada_8b():
    with torch.device("meta"):
        model = network(tables="shared", codes=1, values=1, pad=126_081, mask=126_336, start=126_462, positions=4, width=4096, depth=32, heads=32, hidden=12_288)
    names = set(model.state_dict())
    block = {f"{part}.weight" for part in ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")}
    assert names == {"wte.weight", "ln_f.weight", "ff_out.weight"} | {f"blocks.{k}.{name}" for k in range(32) for name in block} and len(names) == 291
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184  # with as many rows as LLaDA has tokens


@pytest.mark.parametrize("tables", ["position", "shared"])
def test_each_part_can_only_become_its_own_kind(tables, run):
    model, (codes, text) = network(tables), some()
    values, words = model(codes, text, torch.ones(6, dtype=torch.bool))
    assert values.shape == (6, L, V) and words.shape == (6, T, 9)
    drawn, calls = text_prior.codes_from_text(model, text, SAMPLER, 1.5, run)
    assert drawn.min() >= 0 and drawn.max() < V and (calls == L).all()
    written = text_prior.text_from_codes(model, codes, T, {**SAMPLER, **text_prior.TO_TEXT}, run)
    assert written.shape == (6, T) and written.max() < 9  # text or pad, never mask, start or a code


def test_padding_has_no_influence_on_a_prompt(run):
    model, (codes, text) = network(), some()
    longer = torch.cat([text, torch.full((6, 7), 8)], 1)
    reading = torch.zeros(6, dtype=torch.bool)
    assert torch.allclose(model(codes, text, reading)[0], model(codes, longer, reading)[0], atol=1e-5)
    assert not torch.allclose(model(codes, text, ~reading)[0], model(codes, longer, ~reading)[0], atol=1e-3)  # where it is written it is text
    assert torch.equal(text_prior.codes_from_text(model, text, SAMPLER, 2.0, run)[0], text_prior.codes_from_text(model, longer, SAMPLER, 2.0, run)[0])


def test_guidance_one_is_none_and_zero_ignores_the_prompt():
    model, (codes, text) = network(), some()
    reading, none = torch.zeros(6, dtype=torch.bool), torch.full_like(text, 8)
    plain, null = (model(codes, words, reading)[0].log_softmax(-1) for words in (text, none))
    guided = lambda w: text_prior.TextToCode(model, w)(codes, text).log_softmax(-1)
    assert torch.equal(guided(1), plain) and torch.allclose(guided(1 + 1e-9), plain, atol=1e-5)  # one call and two
    assert torch.allclose(guided(0), null, atol=1e-5)
    assert torch.allclose(guided(2.5), (null + 2.5 * (plain - null)).log_softmax(-1), atol=1e-5)


class Spy:
    """A network that notes what it is shown and answers with equal odds."""

    def __call__(self, codes, text, writing):
        self.codes, self.text, self.writing = codes, text, writing
        return torch.zeros(*codes.shape, V), torch.zeros(*text.shape, 9)


def test_tasks_come_in_their_shares_and_captions_are_dropped_where_they_are_read(run):
    text = some(4000)[1]
    text[:400] = 8  # no caption
    shown, task = text_prior.tasks_of(text, 8, [2.0, 1.0, 1.0], 0.2, data.Draws(0, 0, run, 4000))
    assert (task[:400] == 0).all()
    shares = torch.bincount(task[400:], minlength=3) / 3600
    assert torch.allclose(shares, torch.tensor([0.5 + 0.2 * 0.25, 0.25, 0.8 * 0.25]), atol=0.03)  # a dropped caption makes joint the code alone
    dropped = (shown == 8).all(1)
    assert torch.equal(shown[~dropped], text[~dropped]) and (task[dropped] == 0).all() and abs(dropped[400:].double().mean() - 0.2 * 0.75) < 0.02
    for k in range(3):
        assert (text_prior.tasks_of(text[400:], 8, [float(j == k) for j in range(3)], 0.0, data.Draws(0, 0, run, 3600))[1] == k).all()


def test_training_pairs_each_code_with_its_own_caption(trained, tmp_path, monkeypatch):
    """What the loss is shown in a real run: the stored codes of either flip beside the caption of the same image."""
    link_codes(trained, tmp_path)
    seen, nll = [], text_prior.text_nll
    monkeypatch.setattr(text_prior, "text_nll", lambda model, codes, text, *rest: seen.append((codes, text)) or nll(model, codes, text, *rest))
    call("text_prior", *TINY["text_prior"], "--drop", "0", "--steps", "3", "--out", tmp_path)
    state = torch.load(tmp_path / "shapes" / "text_prior.pt", weights_only=True)["text"]
    text = text_prior.Text(**{**state, "ranks": text_prior.read_ranks(state["ranks"], "")})
    folder, captions = tmp_path / "shapes", data.load_dataset(data.parse(data.make_parser(""), {}, [])).captions
    pairs = {(tuple(row), caption) for flips, caption in zip(np.load(folder / "codes.npy").tolist(), captions) for row in flips}
    for codes, words in seen[:3]:
        assert all((tuple(c), text.decode(w)) in pairs for c, w in zip(codes.tolist(), words.tolist()))


@pytest.mark.parametrize("task", range(3))
def test_each_task_hides_its_own_part_and_divides_once(task, run):
    """With equal odds a hidden position costs log of its choices: the loss per token of a part is that, however many are hidden."""
    spy, (codes, text) = Spy(), some(400)
    u, scores = torch.rand(400), torch.rand(400, L + T)
    nll = text_prior.text_nll(spy, codes, text, torch.full((400,), task), u, scores, (V, 9), run)
    hidden = torch.cat([spy.codes == V, spy.text == 9], 1)
    n = (L, T, L + T)[task]
    assert torch.equal(hidden.sum(1), (u * n).floor().long() + 1)
    assert hidden[:, :L].any() == (task != 1) and hidden[:, L:].any() == (task != 0) and (spy.writing == (task != 0)).all()
    assert torch.equal(torch.where(hidden[:, :L], codes, spy.codes), codes) and torch.equal(torch.where(hidden[:, L:], text, spy.text), text)
    share = hidden[:, :L].sum(1) / hidden.sum(1)
    assert torch.allclose(nll, share * math.log(V) + (1 - share) * math.log(9), atol=1e-5)


def test_the_estimate_is_the_bound_listed_over_all_sets(run):
    """− log p(c | w) ≤ mean over k and over all sets of k hidden positions."""
    import itertools
    model, (codes, text) = network(), some(1)
    exact = 0.0
    for k in range(1, L + 1):
        sets = list(itertools.combinations(range(L), k))
        for hidden in sets:
            visible = codes.clone()
            visible[:, list(hidden)] = V
            with torch.no_grad():
                log_p = model(visible, text, torch.zeros(1, dtype=torch.bool))[0].log_softmax(-1).gather(2, codes[..., None])[0, :, 0]
            exact -= log_p[list(hidden)].sum().item() / k / len(sets) / L
    bits, error = text_prior.bits_per_token(model, codes.expand(4000, L), text.expand(4000, T), 0, run)
    assert abs(bits - exact / math.log(2)) < 4 * error + 1e-3 and error < 0.05


# --- sampling ---------------------------------------------------------------------------------------------------------

def test_given_positions_never_change_and_every_row_keeps_its_own_prompt(run):
    """Rows with different numbers of given positions end at different calls; the condition stays with its row."""
    class Echo:  # the value of a row is its condition
        L, V = L, V

        def __call__(self, codes, condition):
            return torch.nn.functional.one_hot(condition, V)[:, None].expand(-1, L, -1) * 1e4

    rng, condition = torch.Generator().manual_seed(0), torch.arange(60) % V
    given = torch.where(torch.rand(60, L, generator=rng) < 0.5, torch.randint(0, V, (60, L), generator=rng), V)
    for order in ("event", "confidence", "ancestral"):
        drawn, calls = prior.sample_masked(Echo(), given, {**SAMPLER, "order": order}, run, rng, condition=(condition,))
        assert torch.equal(drawn, torch.where(given == V, condition[:, None], given)) and (calls <= (given == V).sum(1)).all()
    model, (_, text) = network(), some(60)
    drawn, _ = text_prior.codes_from_text(model, text, SAMPLER, 1.5, run, given=given)
    assert torch.equal(torch.where(given == V, given, drawn), given) and (drawn < V).all()


def test_it_learns_to_write_codes_for_words_and_words_for_codes(run):
    """Four captions, four codes: after a minute's fraction of training each finds its partner, in both directions."""
    captions = CAPTIONS[:4]
    text = text_prior.build_text("captions", CAPTIONS)
    codes, words = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2], [2, 0, 1, 1], [0, 2, 2, 1]]), text.rows(text.encode(captions)).long()
    model = network(mask=text.mask, pad=text.pad, start=text.start, width=32, hidden=64).train()
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(120):
        rows = torch.arange(32) % 4
        task, u, scores = torch.arange(32) // 16, torch.rand(32, generator=rng), torch.rand(32, L + words.shape[1], generator=rng)
        loss = text_prior.text_nll(model, codes[rows], words[rows], task, u, scores, (V, text.mask), run).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert torch.equal(text_prior.codes_from_text(model, words, {**SAMPLER, "temperature": 0.0}, 1.0, run)[0], codes)
    written = text_prior.text_from_codes(model, codes, words.shape[1], {**SAMPLER, **text_prior.TO_TEXT}, run)
    assert [text.decode(row) for row in written.tolist()] == captions


def test_scores_count_what_was_asked_for(trained, run, monkeypatch):
    """With drawings of exactly what the prompts say all scores are 1; with the next colour drawn instead, only what names no colour."""
    args = sample.parse(["--score", "--count", "40", "--out", str(trained)])
    scores = sample.Scores.__new__(sample.Scores)
    scores.stages, scores.args, scores.run, scores.n = sample.Stages(args, run), args, run, args.count
    scores.dataset, scores.names, scores.rows = scores.stages.dataset, list(data.SHAPES), np.array(scores.stages.dataset.splits["test"])[:40]
    for shift in (0, 1):
        def say(labels):
            return [labels[0], (labels[1] + shift) % 8 if labels[1] >= 0 else -1, *labels[2:]]

        read = lambda stages, prompts, *_: (torch.tensor([say(data.read_shapes_caption(p)) for p in prompts]), torch.full((len(prompts),), 16))
        monkeypatch.setattr(sample.Stages, "read", read)
        monkeypatch.setattr(sample.Stages, "draw", lambda stages, codes, seed: codes)
        monkeypatch.setattr(scores, "look", lambda factors: (None, factors, torch.ones(len(factors)).bool()), raising=False)
        monkeypatch.setattr(scores, "codes_of", lambda rows: scores.dataset.labels[rows], raising=False)
        monkeypatch.setattr(sample.Stages, "captions", lambda stages, labels, seed: [data.shapes_caption(say(row)) for row in labels.tolist()])
        text, captions, right = scores.score_text(2.0), scores.score_captions(), float(shift == 0)
        assert text["captions of the test split"]["shape"] == 1 and text["captions of the test split"]["all"] == right
        assert text["shape and colour alone"] == {"shape": 1, "colour": right, "all": right, "clean": 1}
        for split in data.UNSEEN_PAIRS:
            assert text[split]["pair"] == text[split]["colour"] == captions[split]["pair"] == captions[split]["all"] == right
        assert text["distinct codes in 16 draws of a prompt"] == 1 and captions["test split"]["frame"] == 1


# --- captions of datasets, prompts ------------------------------------------------------------------------------------

def test_images_without_a_caption_train_without_and_are_counted_once(tmp_path, capsys, monkeypatch):
    folder = make_folder(tmp_path / "pictures")
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[:30]), encoding="utf-8")
    where = ["--dataset", "folder", "--data-dir", folder, "--image-size", "32", "--out", tmp_path]
    call("tokenizer", *TINY["tokenizer"], "--patch", "8", "--global-size", "32", "--local-size", "16", *where)
    capsys.readouterr()
    call("text_prior", *TINY["text_prior"], *where)
    assert capsys.readouterr().err.count("10 of 40 images have no caption") == 1
    lines[7] = json.dumps({"file_name": json.loads(lines[7])["file_name"], "text": "another text"})
    (folder / "metadata.jsonl").write_text("\n".join(lines[:30]), encoding="utf-8")
    refuse("text_prior", *TINY["text_prior"], *where, words=["other captions"])
    long = [json.dumps({"file_name": json.loads(line)["file_name"], "text": text}) for line, text in zip(lines, [" ", "x y z " * 60] * 20)]
    (folder / "metadata.jsonl").write_text("\n".join(long), encoding="utf-8")
    call("text_prior", *TINY["text_prior"], *where, "--restart")  # captions that can be no prompts: the scores go without
    assert "20 of 40 images have no caption and train without; 20 captions are longer" in capsys.readouterr().err
    call("generator", *TINY["generator"], "--patch", "8", *where)
    for kind in ("masked", "ar"):
        call("prior", "--kind", kind, *TINY["prior"], *where)
    monkeypatch.setattr(sample.train_judge, "__defaults__", (2,))  # steps: its verdict does not matter here
    call("sample", "--score", *where, "--count", "4", "--sample-steps", "1")
    refuse("sample", "text", *where, words=["no prompts"])
    (folder / "metadata.jsonl").unlink()
    for path in list(folder.rglob("*.png")):
        path.rename(folder / path.name)  # no class either
    call("tokenizer", *TINY["tokenizer"], "--patch", "8", "--global-size", "32", "--local-size", "16", *where)  # encodes them under their new names
    refuse("text_prior", *TINY["text_prior"], *where, words=["metadata.jsonl", "no captions"])


def test_prompts_that_cannot_be_drawn_are_one_line_and_others_are_text(trained, tmp_path, capsys):
    picture = ["--columns", "1", "--sample-steps", "1", "--out", trained]
    refuse("sample", "text", "", *picture, words=["empty"])
    refuse("sample", "text", "a red ring", "x" * 10_000, *picture, words=["tokens", "at most 64"])
    refuse("sample", "text", "--prompts", tmp_path / "none.txt", *picture, words=["none.txt"])
    (tmp_path / "empty.txt").write_text("\n \n")
    refuse("sample", "text", "--prompts", tmp_path / "empty.txt", *picture, words=["no prompts"])
    refuse("sample", "text", "a ring", "--image", tmp_path / "none.png", *picture, words=["none.png"])
    (tmp_path / "prompts.txt").write_text("\n".join(line.replace("\n", " ") for line in ODD[3:-1] if len(line) < 30) + "\n\n", encoding="utf-8")
    call("sample", "text", "a red ring", "--prompts", tmp_path / "prompts.txt", *picture)
    said = capsys.readouterr()
    assert "text.png" in said.out and said.err.count("note: no training caption has") == 1 and "naïve" in said.err
    for flags in (["reconstruct", "--prompts", "x"], ["text", "a ring", "--weights", "1", "1"], ["text", "a ring", "--image", "x", "--weights", "1", "--positions", "1"],
                  ["text", "a ring", "--train"]):
        with pytest.raises(SystemExit) as stopped:
            call("sample", *flags, *picture)
        assert stopped.value.code == 2


def test_editing_and_mixing_with_a_picture(trained, tmp_path, monkeypatch):
    """What is kept of the picture's code, what is drawn anew, and which side a mixture takes its positions from."""
    data.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "grey.png")
    flags, drawn, encoded = ["--image", tmp_path / "grey.png", "--columns", "8", "--sample-steps", "1", "--out", trained], [], []
    draw, encode = sample.Stages.draw, sample.Stages.encode
    monkeypatch.setattr(sample.Stages, "draw", lambda stages, codes, *rest: drawn.append(codes) or draw(stages, codes, *rest))
    monkeypatch.setattr(sample.Stages, "encode", lambda stages, images: encoded.append(encode(stages, images)) or encoded[-1])

    def same(*extra):
        call("sample", "text", "a red ring", "a blue bar", *flags, *extra)
        with data.Image.open(trained / "shapes" / "samples" / "text.png") as grid:
            assert grid.height == 2 * (66 + 14) + 2 and grid.width >= 9 * 66  # a row for each prompt, the picture first
        return drawn[-1] == encoded[-1]  # (16, L)

    assert same("--keep", "1").all() and same("--weights", "0", "1", "--choose", "random").all()
    half = same("--keep", "0.5")
    assert (half.sum(1) >= 8).all() and not half.all() and len(set(map(tuple, half.tolist()))) > 1  # other positions for each picture
    some = same("--positions", "0", "5")
    assert some[:, [0, 5]].all() and not some.all()
    call("sample", "text", "a red ring", "a blue bar", *[flag for flag in flags if flag not in flags[:2]])
    assert torch.equal(same("--weights", "1", "0", "--choose", "random"), drawn[-2] == encoded[-1])  # the prompt's codes as without a picture
    refuse("sample", "text", "a red ring", *flags, "--weights", "1", words=["--weights", "2 codes"])
    refuse("sample", "text", "a red ring", *flags, "--positions", "99", words=["--positions"])


def test_shapes_captions_say_what_they_are_asked_to_and_can_be_read_back():
    labels, _, said = data.shapes_labels("train", 600)
    for row, spoken in zip(labels.tolist(), said.tolist()):
        shape, colour, size, background, frame = row
        wanted = [shape] + [value if spoken[k] else -1 for k, value in enumerate((colour, size, background, frame))]
        assert data.read_shapes_caption(data.shapes_caption(row, spoken)) == wanted
    assert 0.6 < said.all(1).double().mean() < 0.76
    assert data.read_shapes_caption("a red") is None and data.shapes_caption([0, 1, 0, 0, 1], (1, 0, 0, 1)) == "an orange circle in an orange frame"
