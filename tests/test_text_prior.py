"""The text prior: tokens, the three tasks, guidance, what words do to codes and codes to words."""
import base64
import json
import math
import time
import types

import data
import numpy as np
import pytest
import sample
import text_prior
import torch
import torch.nn.functional as F
from conftest import TINY, call, make_folder, part, refuse
from PIL import Image

L, V, T = 4, 3, 5
PAD, MASK, START = 8, 9, 10  # the text ids are 0 to 7
CAPTIONS = ["a small red ring", "a large red bar", "a small blue bar", "a large blue ring"] * 3
ODD = ["", " ", "a  b\n\tc ", "naïve café", "日本語の文", "שלום עולם", "👩🏾‍🌾 farmer 🕶️",
       "<|endoftext|> and <|start_sem|>", "'quotes' -- 3.14 $%", "a" * 10_000]
SAMPLER = {**text_prior.TO_CODE, "per_step": 1, "steps": 64, "remask": 0.0, "remask_window": [0.3, 0.55]}
WRITER = {**SAMPLER, **text_prior.TO_TEXT}


def network(tables="position", **sizes):
    """A tiny text prior with random outputs."""
    torch.manual_seed(0)
    usual = dict(codes=L, values=V, pad=PAD, mask=MASK, start=START, positions=32,
                 width=32, depth=2, heads=2, hidden=64, dropout=0.0)
    model = text_prior.TextPrior(**usual | sizes, tables=tables).eval()
    torch.nn.init.normal_(model.ff_out.weight, std=0.5)
    return model


def some(n=6):
    """Codes (n, L) and text (n, T), padded at different lengths."""
    rng = torch.Generator().manual_seed(0)
    text = torch.randint(0, PAD, (n, T), generator=rng)
    ends = torch.randint(1, T + 1, (n, 1), generator=rng)
    return torch.randint(0, V, (n, L), generator=rng), torch.where(torch.arange(T) < ends, text, PAD)


def write_tokenizer_json(path, pad=300, pattern=r" ?\p{L}+| ?[^\s\p{L}]+|\s+", kind="BPE"):
    """A byte-level tokenizer.json as the tokenizers package writes it, whose ids do not follow the merges;
    returns {token: id}, Ġ a space."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as themselves
    characters = [chr(k) for k in (*plain, *range(256, 512 - len(plain)))]
    tokens = [*characters, "re", "red", "Ġred", "ed"]
    ids = dict(zip(tokens, np.random.default_rng(0).permutation(len(tokens)).tolist()))
    added = [{"content": "<|endoftext|>", "id": pad}, {"content": "<|mdm_mask|>", "id": 305}]
    splits = [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel"}]
    model = {"type": kind, "vocab": ids, "merges": ["r e", "re d", "Ġ red", "e d"]}
    content = {"added_tokens": added, "normalizer": None, "model": model,
               "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return ids


def test_every_encoding_gives_back_what_it_was_given(tmp_path):
    """Nothing in a text is a special token, and what a checkpoint stores is the same encoding."""
    ranks = [*text_prior.BYTES, b" a", b"re", b"red"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (tmp_path / "some.tiktoken").write_text("\n".join(lines))
    write_tokenizer_json(tmp_path / "tokenizer.json")
    for name in ("captions", "bytes", tmp_path / "some.tiktoken", tmp_path / "tokenizer.json"):
        text = text_prior.build_text(str(name), CAPTIONS)
        encoded = text.encode(ODD)
        expected = [" ".join(words.split()) for words in ODD] if text.folds else ODD
        assert [text.decode(row) for row in text.rows(encoded).tolist()] == expected, name
        assert max(map(max, filter(None, encoded))) < text.pad < text.mask < text.start
        again = text_prior.stored_text({"text": text.state()})
        assert again.encode(ODD) == encoded and again.state() == text.state()


def test_blanks_and_capitals_that_do_not_matter_are_not_read():
    """Capitals matter where a training caption has one; what the network has not read is named as written."""
    for caption, same in (("a red, bar", True), ("a red, Bar", False)):
        for encoding in ("captions", "bytes"):
            text = text_prior.build_text(encoding, [caption] * 2)
            spaced = caption.replace(" ", "\t  ") + " \n"
            plain, blanks, capitals, part = text.encode([caption, spaced, caption.upper(), "red,"])
            assert plain == blanks and (plain == capitals) == same
            assert str(part)[1:-1] in str(plain)  # the same tokens as in the middle
            assert text.unknown("red  a, (red bars.") == ["(red", "bars."]
            assert text.unknown("RED") == ["RED"] * (not same)


def test_an_encoding_that_does_not_fold_reads_what_is_written(tmp_path):
    """A tokenizer.json, and what an earlier version trained, which goes on with the tokens that it knows."""
    write_tokenizer_json(tmp_path / "tokenizer.json")
    released = text_prior.build_text(str(tmp_path / "tokenizer.json"), [])
    old = text_prior.Text(text_prior.learn_merges(CAPTIONS), text_prior.PATTERN, words=["red", "a"])
    again = text_prior.stored_text({"text": old.state()})
    for text in (released, old, again):
        assert not text.folds
        assert len({str(ids) for ids in text.encode(["red", " red", "  red", "Red"])}) == 4
    assert again.unknown("a red bar.") == ["bar."] and released.unknown("a red bar") == []


def test_merges_make_words_of_captions_and_are_always_the_same():
    text = text_prior.build_text("captions", CAPTIONS)
    assert [len(ids) for ids in text.encode([*CAPTIONS[:2], "a"])] == [4, 4, 1]
    assert text_prior.learn_merges(CAPTIONS) == text_prior.learn_merges(CAPTIONS[::-1])
    assert text_prior.learn_merges(["aaaa", "aaaa"])[b"aaaa"] == 257  # a pair that overlaps itself


def test_a_tokenizer_json_keeps_its_own_ids(tmp_path):
    for pad, special in ((300, (300, 305, 306)), (0, (306, 307, 308))):  # 0 is among the text: not to be used
        ids = write_tokenizer_json(tmp_path / "tokenizer.json", pad)
        text = text_prior.build_text(str(tmp_path / "tokenizer.json"), [])
        assert text.encode(["red red ed"]) == [[ids["red"], ids["Ġred"], ids["Ġ"], ids["ed"]]]  # re before ed
        assert (text.pad, text.mask, text.start) == special


def test_encodings_that_cannot_be_read_are_refused_with_one_line(tmp_path, monkeypatch):
    """Also one that a server is asked for that never answers."""
    write_tokenizer_json(tmp_path / "gaps.json", pattern=r"\p{L}+")
    write_tokenizer_json(tmp_path / "kind.json", kind="Unigram")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "few.tiktoken").write_text("YQ== 0")
    (tmp_path / "line.tiktoken").write_text("YQ== 0\nno line")
    monkeypatch.setattr(data, "PATIENCE", 0.1)
    monkeypatch.setattr(text_prior.tiktoken, "get_encoding", lambda name: time.sleep(60))
    files = "gaps.json kind.json list.json none.json few.tiktoken line.tiktoken none.tiktoken".split()
    for name in (*(tmp_path / file for file in files), "gpt2", "gpt3"):
        remedy = "TIKTOKEN_CACHE_DIR" if name == "gpt2" else "expected"
        with pytest.raises(SystemExit, match=f"error: .*{name}.*{remedy}"):
            text_prior.build_text(str(name), [])


def test_names_and_sizes_are_those_of_llada_8b():
    with torch.device("meta"):
        model = network("shared", codes=1, values=1, pad=126_081, mask=126_336, start=126_462, positions=4,
                        width=4096, depth=32, heads=32, hidden=12_288)
    parts = "attn_norm ff_norm q_proj k_proj v_proj attn_out ff_proj up_proj ff_out".split()
    blocks = {f"blocks.{k}.{name}.weight" for k in range(32) for name in parts}
    assert set(model.state_dict()) == {"wte.weight", "ln_f.weight", "ff_out.weight"} | blocks
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184  # as many rows as LLaDA has tokens


@pytest.mark.parametrize("tables", ["position", "shared"])
def test_each_part_can_only_become_its_own_kind(tables, run):
    model = network(tables)
    codes, text = some()
    drawn, calls = text_prior.codes_from_text(model, text, SAMPLER, 1.5, run)
    assert drawn.min() >= 0 and drawn.max() < V and (calls == L).all()
    written = text_prior.text_from_codes(model, codes, T, WRITER, run)
    assert written.shape == (6, T) and written.max() <= PAD  # never mask, start or a code


def test_padding_has_no_influence_on_a_prompt():
    """Where a caption is written it is text."""
    model = network()
    codes, text = some()
    longer = F.pad(text, (0, 7), value=PAD)
    for writing in (False, True):
        short, long = (model(codes, words, torch.full((6,), writing))[0] for words in (text, longer))
        assert torch.allclose(short, long, atol=1e-5) != writing


def test_guidance_one_is_none_and_zero_ignores_the_prompt():
    model = network()
    codes, text = some()
    reading = torch.zeros(6, dtype=torch.bool)
    plain = model(codes, text, reading)[0].log_softmax(-1)
    null = model(codes, torch.full_like(text, PAD), reading)[0].log_softmax(-1)
    for guidance in (0, 1, 1 + 1e-9, 2.5):  # 1: one call; beside it two
        guided = text_prior.TextToCode(model, guidance)(codes, text).log_softmax(-1)
        assert torch.allclose(guided, (null + guidance * (plain - null)).log_softmax(-1), atol=1e-5)


def test_tasks_come_in_their_shares_and_captions_are_dropped_where_they_are_read():
    text = some(4000)[1]
    text[:400] = PAD  # no caption
    shown, task = text_prior.tasks_of(text, PAD, [2.0, 1.0, 1.0], 0.2, part(4000))
    shares = torch.bincount(task[400:], minlength=3) / 3600
    expected = torch.tensor([0.5 + 0.2 * 0.25, 0.25, 0.8 * 0.25])  # joint without a caption: the code alone
    assert torch.allclose(shares, expected, atol=0.03) and (task[:400] == 0).all()
    dropped = (shown == PAD).all(1)
    assert torch.equal(shown[~dropped], text[~dropped]) and (task[dropped] == 0).all()
    assert abs(dropped[400:].double().mean() - 0.2 * 0.75) < 0.02


@pytest.mark.parametrize("task", range(3))
def test_each_task_hides_its_own_part_and_divides_once(task, run):
    """The loss of a row is the mean of − log p over its k = ⌊u · n⌋ + 1 hidden positions."""
    codes, text = some(400)
    values, words = torch.randn(400, L, V), torch.randn(400, T, MASK)  # what a network might answer
    shown = []

    def answer(*inputs):
        shown.extend(inputs)
        return values, words

    u = torch.rand(400)
    tasks = torch.full((400,), task)
    nll = text_prior.text_nll(answer, codes, text, tasks, u, torch.rand(400, L + T), (V, MASK), run)
    in_codes = shown[0] == V
    in_text = shown[1] == MASK
    assert torch.equal(torch.where(in_codes, V, codes), shown[0]) and in_codes.any() == (task != 1)
    assert torch.equal(torch.where(in_text, MASK, text), shown[1]) and in_text.any() == (task != 0)
    assert (shown[2] == (task != 0)).all()
    hidden = torch.cat([in_codes, in_text], 1)
    log_p = torch.cat([values.log_softmax(2).gather(2, codes[..., None]),
                       words.log_softmax(2).gather(2, text[..., None])], 1)[..., 0]  # (400, L + T)
    assert torch.equal(hidden.sum(1), (u * (L, T, L + T)[task]).floor().long() + 1)
    assert torch.allclose(nll, -(log_p * hidden).sum(1) / hidden.sum(1), atol=1e-5)


def test_bits_per_token_of_equal_odds_are_those_of_a_choice(run):
    model = network()
    torch.nn.init.zeros_(model.ff_out.weight)
    for task, choices in enumerate((V, MASK)):
        bits, error = text_prior.bits_per_token(model, *some(), task, run)
        assert abs(bits - math.log2(choices)) < 1e-6 and error < 1e-6


def test_it_learns_to_write_codes_for_words_and_words_for_codes(run):
    """Four captions, four codes: each finds its partner, in both directions. Rows with different numbers of
    given positions end at different calls, and each keeps its own prompt."""
    text = text_prior.build_text("captions", CAPTIONS)
    codes = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2], [2, 0, 1, 1], [0, 2, 2, 1]])
    words = text.rows(text.encode(CAPTIONS[:4])).long()
    model = network(pad=text.pad, mask=text.mask, start=text.start).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pairs = (codes.repeat(8, 1), words.repeat(8, 1), torch.arange(32) // 16)  # with the task
    for _ in range(120):
        scores = torch.rand(32, L + words.shape[1])
        nll = text_prior.text_nll(model, *pairs, torch.rand(32), scores, (V, text.mask), run)
        nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    surest = {**SAMPLER, "temperature": 0.0}
    assert torch.equal(text_prior.codes_from_text(model, words, surest, 1.0, run)[0], codes)
    given = torch.where(torch.arange(L) < 3 - torch.arange(4)[:, None], codes, V)  # 3 − k positions of row k
    drawn, calls = text_prior.codes_from_text(model, words, surest, 1.0, run, given=given)
    assert torch.equal(drawn, codes) and calls.tolist() == [1, 2, 3, 4]
    written = text_prior.text_from_codes(model, codes, words.shape[1], WRITER, run)
    assert [text.decode(row) for row in written.tolist()] == CAPTIONS[:4]


@pytest.mark.parametrize("shift", [0, 1])
def test_scores_count_what_was_asked_for(trained, monkeypatch, shift):
    """Factors stand for codes and for what the judge sees. Drawn and written as asked, all scores are 1; with
    the next colour in place of the right one, only those of the other factors."""
    def turned(labels):
        return [labels[0], (labels[1] + shift) % 8, *labels[2:]]

    def from_prompts(prompts, *_):
        factors = [turned(sample.read_shapes_caption(prompt)) for prompt in prompts]
        return torch.tensor(factors), torch.full((len(prompts),), 16)

    def captions(factors, seed):
        return [data.shapes_caption(turned(row)) for row in factors.tolist()]

    args = sample.parse(["--score", "--count", "40", "--out", str(trained)])
    run = data.Run(args)
    monkeypatch.setattr(sample, "load_judge", lambda *_: None)
    scores = sample.Scores(sample.Stages(args, run), args, run)
    scores.judged = lambda seen: (None, seen, torch.ones(len(seen)).bool())
    scores.stages = types.SimpleNamespace(
        codes_from_prompts=from_prompts, captions_from_codes=captions,
        codes_of=lambda rows: scores.dataset.labels[rows], draw=lambda codes, seed: codes)
    drawn = scores.score_text(2.0)
    written = scores.score_captions()
    right = float(shift == 0)
    for line in (drawn["captions of the test split"], written["test split"]):
        assert line["shape"] == line["frame"] == 1 and line["colour"] == line["all"] == right
    assert drawn["shape and colour alone"] == {
        "n": 10, "shape": 1, "colour": right, "all": right, "clean": 1}
    for split in data.UNSEEN_PAIRS:
        assert drawn[split]["pair"] == drawn[split]["colour"] == written[split]["pair"] == right
    assert drawn["distinct codes in 16 draws of a prompt"] == 1


def test_images_without_a_caption_train_without_and_are_counted_once(tmp_path, capsys):
    folder = make_folder(tmp_path / "pictures")
    file = folder / "metadata.jsonl"
    names = [str(path.relative_to(folder)) for path in folder.rglob("*.png")]
    where = ["--dataset", "folder", "--data-dir", folder, "--out", tmp_path]
    call("tokenizer", *TINY["tokenizer"], *where)

    def train(texts, *flags):
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts)]
        file.write_text("\n".join(lines), encoding="utf-8")
        call("text_prior", *TINY["text_prior"], *where, *flags)

    train(["a picture"] * 30)
    assert capsys.readouterr().err.count("10 of 40 images have no caption") == 1
    with pytest.raises(SystemExit, match="other captions"):
        train(["a picture"] * 29 + ["another"])
    train([" ", "x y z " * 60] * 20, "--restart")
    said = capsys.readouterr().err
    assert "20 of 40 images have no caption and train without; 20 captions are longer" in said


def test_of_several_captions_of_an_image_any_one_is_shown(run):
    """The same in a step that comes again, and with merges learned from all."""
    captions = [["a cat"], ["a dog", "a puppy", "it barks"], [""], ["a cat"]]
    dataset = data.Dataset("toy", None, torch.zeros(4, 0), {}, {"train": range(4)}, captions, source=None)
    args = types.SimpleNamespace(dataset="folder", encoding="captions", text_length=20)
    tokens, *choices, text = text_prior.encode_captions(dataset, args, run)
    assert text.unknown("a puppy barks") == []

    def shown(step):
        part = data.Part(0, step, 4, run, rows=torch.tensor([1, 0, 2, 1]))
        return [text.decode(row) for row in tokens[text_prior.caption_rows(part, *choices)].tolist()]

    steps = [shown(step) for step in range(30)]
    assert {(step[1], step[2]) for step in steps} == {("a cat", "")} and shown(3) == steps[3]
    assert {step[0] for step in steps} == {step[3] for step in steps} == set(captions[1])
    assert any(step[0] != step[3] for step in steps)


def test_prompts_that_cannot_be_drawn_are_one_line_and_others_are_text(trained, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n")
    flags = ["--columns", "1", "--sample-steps", "1", "--out", trained]
    refuse("sample", "text", "", *flags, words=["empty"])
    refuse("sample", "text", "a red ring", "x" * 10_000, *flags, words=["tokens", "at most 64"])
    refuse("sample", "text", "--prompts", file, *flags, words=["no prompts"])
    refuse("sample", "text", "--prompts", tmp_path / "none.txt", *flags, words=["none.txt"])
    refuse("sample", "text", "a ring", "--image", tmp_path / "none.png", *flags, words=["none.png"])
    file.write_text("\n".join(ODD[3:-1]) + "\n\n", encoding="utf-8")
    call("sample", "text", "a red ring", "--prompts", file, *flags)
    said = capsys.readouterr().err
    assert said.count("note: no training caption has") == 1 and "naïve" in said and "red" not in said


def test_editing_and_mixing_with_a_picture(trained, tmp_path, monkeypatch):
    """What is kept of the picture's code, and which side a mixture takes its positions from."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    args = sample.parse(["text", "--out", str(trained)])
    own = sample.Stages(args, data.Run(args)).encode(data.read_image(tmp_path / "noise.png", 32)[None])
    drawn, draw = [], sample.Stages.draw

    def noted(stages, codes, *rest):
        drawn.append(codes)
        return draw(stages, codes, *rest)

    monkeypatch.setattr(sample.Stages, "draw", noted)
    words = ["sample", "text", "a red ring", "a blue bar", "--sample-steps", "1", "--out", trained]
    picture = ["--image", tmp_path / "noise.png"]

    def kept(*flags):
        call(*words, *picture, *flags)
        return drawn[-1] == own  # (16, L)

    assert kept("--keep", "1").all() and kept("--weights", "0", "1", "--choose", "random").all()
    half = kept("--keep", "0.5")
    assert (half.sum(1) >= 8).all() and len(half.unique(dim=0)) > 1  # others for each picture
    named = kept("--positions", "0", "5")
    assert named[:, [0, 5]].all() and not named.all()
    kept("--weights", "1", "0", "--choose", "random")
    call(*words)
    assert torch.equal(drawn[-1], drawn[-2])  # the prompt's codes as without a picture
    refuse(*words, *picture, "--weights", "1", words=["--weights", "2 codes"])
