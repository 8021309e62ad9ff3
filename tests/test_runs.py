"""The scripts as commands: every dataset, stops, several processes, one command for all, what is refused."""
import json
import os
import re
import shutil
from contextlib import contextmanager

import data
import generator
import numpy as np
import prior
import pytest
import sample
import text_prior
import tokenizer
import torch
from conftest import (SMALL_IMAGES, STAGES, TINY, FakeRun, call, contents, least, link_codes, prepare, refuse,
                      results, run_pair, same, stopped_after, weights)
from PIL import Image

PICTURES = {f"{name}-001" for name in ("unconditional-masked", *list(sample.COMMANDS)[1:])}
COMPARABLE = "--dtype float32 --lr-matrix 0 --warmup 0".split()  # but for rounding


def train(trained, out, stage, *flags):
    """Train a stage, tiny, on the codes of `trained`; returns its results."""
    call(*prepare(trained, out, stage, *flags)[1])
    return results(out, stage)


def nearly_same(a, b):
    """Equal results, but for rounding, and what AdamW makes of it where a gradient is tiny."""
    assert a["model"].keys() == b["model"].keys() and a["step"] == b["step"]
    distances = [(value - b["model"][name]).abs().flatten() for name, value in a["model"].items()]
    assert a["log"][-1] == pytest.approx(b["log"][-1], rel=1e-2) and torch.cat(distances).mean() < 3e-5


@pytest.mark.parametrize("dataset", ["shapes", "cifar10", "imagenet", "folder"])
def test_every_script_runs_on_every_dataset(places, tmp_path, dataset):
    """A few steps of each stage, over the preset of the dataset, then all pictures."""
    out = tmp_path / "mes résultats 'neu' 数据"
    where = ["--dataset", dataset, *places[dataset], "--out", out, "--image-size", "32"]
    call("data", *where)
    call("tokenizer", *TINY["tokenizer"], *where, *SMALL_IMAGES)
    call("generator", *TINY["generator"], *where, "--patch", "8", "--stem", "2")
    call("prior", *TINY["prior"], *where, "--kind", "masked")
    call("prior", *TINY["prior"], *where, "--kind", "ar")
    call("text_prior", *TINY["text_prior"], *where)
    for command in sample.COMMANDS:
        call("sample", command, *where, *least(command))
    folder = out / "folder" / "pictures" if dataset == "folder" else out / dataset
    assert {path.stem for path in folder.glob("*.pt")} == {*STAGES, "codes"}
    pictures = {path.stem for path in (folder / "samples").iterdir()}
    assert pictures == {"data", "generator-000006", *PICTURES}


@pytest.mark.parametrize("stage", STAGES)
def test_stop_and_resume_equals_one_run_bit_for_bit(trained, tmp_path, stage, monkeypatch, capsys):
    """Asked to stop between two checkpoints, in mid-epoch, then the same command again."""
    random = {"tokenizer": "--drop-path 0.2 --centering centre", "generator": "--drop 0.5"}
    flags = random.get(stage, "--dropout 0.2").split() + ["--steps", "9", "--save-every", "4"]
    cut = tmp_path / "cut"
    with stopped_after(5, monkeypatch):
        train(trained, cut, stage, *flags)
    assert weights(cut, stage)["step"] == 5 and "stopped at step 5 of 9" in capsys.readouterr().err
    whole = train(trained, tmp_path / "whole", stage, *flags)
    same(train(trained, cut, stage, *flags), whole)

    file = cut / "shapes" / f"{stage}.pt"
    before = file.read_bytes()
    capsys.readouterr()
    train(trained, cut, stage, *flags)
    assert f"{stage}.pt is finished (9 steps)" in capsys.readouterr().out and file.read_bytes() == before
    _, changed = prepare(trained, cut, stage, *flags, "--width", "32")
    refuse(*changed, words=["width 16 → 32", file])
    call(*changed, "--restart")
    assert weights(cut, stage)["config"]["width"] == 32


def test_codes_are_the_same_however_they_came_about(trained, tmp_path, monkeypatch):
    """After a stop in the last step, and where codes.pt was lost, as in one run."""
    file = tmp_path / "shapes" / "codes.pt"
    whole = contents(trained / "shapes" / "codes.pt")
    with stopped_after(6, monkeypatch):
        train(trained, tmp_path, "tokenizer")
    assert weights(tmp_path, "tokenizer")["step"] == 6 and not file.exists()
    for _ in ("not written", "lost"):
        train(trained, tmp_path, "tokenizer")
        same(contents(file), whole)
        file.unlink()


@contextmanager
def shown_to(module, name):
    """Inside, what a function of a module is called with is noted: yields a list of its arguments."""
    usual, calls = getattr(module, name), []

    def noted(*args):
        calls.append(args)
        return usual(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, noted)
        yield calls


def test_training_pairs_each_code_with_its_own_flip_and_caption(trained, tmp_path):
    """As the losses of the generator and the text prior are shown them."""
    with shown_to(generator, "flow_loss") as pictures:
        train(trained, tmp_path, "generator", "--drop", "0", "--drop-positions", "0")
    with shown_to(text_prior, "text_nll") as captioned:
        train(trained, tmp_path, "text_prior", "--drop", "0")
    args = sample.parse(["text", "--out", str(tmp_path)])
    stages = sample.Stages(args, data.Run(args))
    for _, x, codes, *_ in pictures:
        assert (stages.encode(data.to_bytes(x)) == codes).double().mean() > 0.98  # but for rounding
    flips = stages.stored["codes"].tolist()
    pairs = {(tuple(code), caption) for both, caption in zip(flips, stages.dataset.captions) for code in both}
    for _, codes, text, *_ in captioned[:6]:  # the steps
        for code, ids in zip(codes.tolist(), text.tolist()):
            assert (tuple(code), stages.text_model[1].decode(ids)) in pairs


def test_without_flips_no_stage_is_shown_a_mirrored_image(tmp_path, monkeypatch):
    """Read from memory and from files; the judge too. A run that was begun so does not go on with flips."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    fading = np.broadcast_to(np.linspace(250, 100, 32)[:, None], (32, 32, 3))  # brighter on the left
    for k in range(30):
        Image.fromarray((fading - k).astype(np.uint8)).save(folder / f"{k}.png")
    where = ["--dataset", "folder", "--data-dir", folder, "--out", tmp_path, "--no-flip"]
    batches = []
    for most in (data.IN_MEMORY_BYTES, 0):  # then as files
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", most)
        with shown_to(tokenizer, "colour_augment") as views:
            call("tokenizer", *TINY["tokenizer"], *where, "--restart")
        assert len(views) == 6 * 3  # two large and a small one in each step
        batches += [images for images, *_ in views]
    with shown_to(generator, "flow_loss") as shown:
        call("generator", *TINY["generator"], *where)
    args = sample.parse([str(word) for word in ["--score", *where]])
    batches += [x for _, x, *_ in shown] + [sample.judge_batch(data.load_dataset(args), args, 0)[0]]
    for images in batches:
        left, right = images.float().chunk(2, 3)
        assert (left.mean((1, 2, 3)) > right.mean((1, 2, 3))).all()
    assert not data.Part(0, 0, 100, FakeRun(), flip=False).flips().any()  # by which the priors choose codes
    refuse("generator", *TINY["generator"], *where[:-1], words=["flip False → True"])


def test_the_references_leave_the_files_of_the_generator_alone(tmp_path):
    """The true factors, and no codes."""
    for flags in ("--factors --condition both --groups 5".split(), ["--condition", "none"]):
        call("generator", *TINY["generator"], *flags, "--out", tmp_path)
    names = {path.name for path in (tmp_path / "shapes").glob("generator*")}
    assert names == {f"generator-{what}.{end}" for what in ("factors", "uncond") for end in ("pt", "jsonl")}


def test_saving_memory_changes_no_result(trained, tmp_path):
    """Activations computed twice: bit for bit, dropout included. A batch in four parts: but for rounding."""
    for stage in STAGES:
        flags = ["--steps", "3", "--depth", "2"] + ["--dropout", "0.2"] * ("prior" in stage)
        plain = train(trained, tmp_path / f"{stage}-plain", stage, *flags)
        same(train(trained, tmp_path / f"{stage}-twice", stage, *flags, "--grad-checkpoint"), plain)
        if stage != "tokenizer":  # it looks at the whole batch
            whole = train(trained, tmp_path / f"{stage}-whole", stage, *COMPARABLE)
            parts = train(trained, tmp_path / f"{stage}-parts", stage, *COMPARABLE, "--accumulate", "4")
            nearly_same(whole, parts)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_prints_the_parameters_and_touches_nothing(trained, tmp_path, stage, capsys):
    """Also beside the checkpoint of a run with other settings."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files]
    with pytest.raises(SystemExit) as stopped:
        train(trained, tmp_path, stage, "--lr", "0.1", "--steps", "50", "--dry-run")
    parameters = sum(values.numel() for values in weights(trained, stage)["model"].values())
    said = capsys.readouterr().out
    assert f"{parameters / 1e6:.2f}M parameters" in said and re.search(r"lr +0.1\n", said)
    assert stopped.value.code == 0 and [path.read_bytes() for path in files] == before


def test_two_processes_equal_one_and_go_on_from_one(trained, tmp_path, monkeypatch):
    """The same batches on one process, on two, and on one for the first step: the same but for rounding."""
    runs = [(stage, stage, []) for stage in STAGES]
    runs += [("no ibot", "tokenizer", ["--ibot", "0"]), ("goes on", "prior-masked", ["--accumulate", "2"])]
    words, one = [], {}
    for title, stage, extra in runs:
        flags = [*COMPARABLE, *extra, "--steps", "3"]
        out = tmp_path / "two" / title
        one[title] = train(trained, tmp_path / "one" / title, stage, *flags)
        if title == "goes on":
            with stopped_after(1, monkeypatch):
                train(trained, out, stage, *flags)
        words += ["+", *prepare(trained, out, stage, *flags)[1]]
    run_pair(tmp_path / "said", *words[1:])
    for title, stage, _ in runs:
        nearly_same(one[title], results(tmp_path / "two" / title, stage))


def test_a_sharded_text_prior_equals_a_whole_one_and_resumes(trained, tmp_path):
    """--shard on two processes leaves one ordinary file, and goes on from it bit for bit."""
    flags = [*COMPARABLE, "--accumulate", "2"]
    for out, stop in (("whole", 0), ("cut", 4), ("cut", 0)):
        _, words = prepare(trained, tmp_path / out, "text_prior", *flags, "--shard")
        said = run_pair(tmp_path / "said", *words, code=143 if stop else 0, STOP_AFTER=stop)
        assert "".join(said).count("stopped at step 4 of 6" if stop else "test: bits per token") == 1
    cut = results(tmp_path / "cut", "text_prior")
    same(cut, results(tmp_path / "whole", "text_prior"))
    nearly_same(cut, train(trained, tmp_path / "one", "text_prior", *flags))
    assert all(type(value) is torch.Tensor for value in cut["model"].values())
    assert [path.name for path in (tmp_path / "cut" / "shapes").glob("text_prior*.pt")] == ["text_prior.pt"]


def test_two_processes_check_encode_and_crop_an_imagenet_tree_as_one(places, tmp_path, capsys):
    """Workers, crops cut from files, a broken file (named once): the codes of one process."""
    tree = tmp_path / "tree"
    shutil.copytree(places["imagenet"][1], tree)
    (tree / "train" / "cats" / "broken.png").write_bytes(b"no picture")
    words = ["tokenizer", *TINY["tokenizer"], *SMALL_IMAGES, *COMPARABLE, "--dataset", "imagenet"]
    words += ["--data-dir", tree, *"--steps 1 --workers 1 --out".split()]
    call(*words, tmp_path / "one")
    both = run_pair(tmp_path / "said", *words, tmp_path / "two")
    for said in (capsys.readouterr().err, "".join(both)):
        assert said.count("1 of 33 files do not open") == said.count("broken.png") == 1, said
    one, two = (results(tmp_path / part, "tokenizer", "imagenet") for part in ("one", "two"))
    nearly_same(one, two)
    one, two = (weights(tmp_path / part, "codes", "imagenet")["codes"] for part in ("one", "two"))
    assert one.shape == two.shape == (32, 2, 16)
    assert (one == two).double().mean() > 0.98  # rounding may turn a tie


def test_scores_by_inception_are_the_same_on_two_processes(trained, tmp_path, inception, monkeypatch):
    """Which share nothing else of sample.py."""
    words = ["sample", *"--score --count 1100 --sample-steps 1 --inception".split(), inception]
    file = trained / "shapes" / "inception.json"
    call(*words, "--out", trained)
    one = json.loads(file.read_text())
    file.unlink()
    run_pair(tmp_path / "said", *words, "--out", trained)
    two = json.loads(file.read_text())
    for name in ("codes of prior-masked", "true codes"):
        assert one[name] == two[name] and one[name]["samples"] == 1100
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse("sample", "--train", "--out", tmp_path, words=["without torchrun"])


def test_one_command_trains_draws_and_scores_and_a_second_trains_nothing(tmp_path, monkeypatch, capsys):
    """sample.py --train: all stages in this process, with flags of their own, on shapes that are drawn once;
    pictures come right after the last stage that they need."""
    def results():
        words = "--train --count 8 --rows 1 --rounds 1 --sample-steps 1 --out".split()
        own = [f"--{name.replace('_', '-')}={' '.join(flags)}" for name, flags in TINY.items()]
        call("sample", *words, tmp_path, *own)
        scores = json.loads((tmp_path / "shapes" / "scores.json").read_text())
        stages = {path.name: path.read_bytes() for path in (tmp_path / "shapes").glob("*.pt")}
        return stages | scores | {"seconds": 0}

    monkeypatch.setattr(sample.train_judge, "__defaults__", (2,))  # its steps
    pictures = tmp_path / "shapes" / "samples"
    with shown_to(data, "draw_shapes") as drawn:
        first = results()
    steps = r"--- stage (\d of 5: [a-z_]+).* minutes so far|^([a-z]+): .*(?:png|gif)"
    said = ["".join(found) for found in re.findall(steps, capsys.readouterr().out, re.MULTILINE)]
    assert said == ["1 of 5: tokenizer", "2 of 5: generator", "reconstruct", "explain", "3 of 5: prior",
                    "unconditional", "compose", "infill", "reveal", "4 of 5: prior", "5 of 5: text_prior",
                    "text", "caption"]
    assert sum(len(labels) == sum(data.SHAPES_COUNTS.values()) for labels, *_ in drawn) == 1
    assert {path.stem for path in pictures.iterdir()} == {"generator-000006", "a", "b", *PICTURES}
    assert results() == first and capsys.readouterr().out.count("is finished") == 5
    assert len(list(pictures.iterdir())) == 3 + 2 * len(PICTURES)  # none is written over


def test_presets_name_flags_that_are_there():
    for module, words in ((tokenizer, []), (generator, []), (prior, ["--kind", "ar"]), (text_prior, [])):
        _, args = module.parse(words)
        for preset in module.PRESETS.values():
            assert set(preset) <= set(vars(args))


def test_flags_that_do_not_fit_are_found_before_the_first_stage_trains(tmp_path, capsys):
    """And what a stage says is to be changed can be given to --train."""
    for size in ("--image-size=36", "--image-size=48", "--text-prior=--heads 3", "--prior=--steps=x"):
        with pytest.raises(SystemExit):
            call("sample", "--train", size, "--out", tmp_path)
        said = capsys.readouterr()
        error, note = said.err.splitlines()
        assert error.startswith("error: ") and note.startswith("note: sample.py --train takes flags of ")
        assert not said.out
    words = ["sample", "--train", "--image-size", "64", "--out", tmp_path]
    refuse(*words, f"--tokenizer={' '.join(TINY['tokenizer'])} --codes 64 --batch-size 500",
           words=["--batch-size 500", "lower it", "flags of tokenizer.py as --tokenizer="])
    assert not list((tmp_path / "shapes").glob("*.pt"))


def test_the_tokenizer_reads_own_pictures_at_the_size_that_is_asked_for():
    for words, size in (("", 32), ("--image-size 64 --codes 256", 64),
                        ("--image-size 64 --global-size 32", 32),
                        ("--dataset folder --image-size 64", 64), ("--dataset cifar10 --image-size 64", 32),
                        ("--dataset imagenet", 224)):
        assert tokenizer.parse(words.split())[1].global_size == size


@pytest.mark.parametrize("command", [
    "tokenizer --steps 0", "tokenizer --lr nan", "tokenizer --drop-path 1.1", "tokenizer --batch 4",
    "tokenizer --accumulate 2",
    "tokenizer --heads 5", "tokenizer --stem 5", "tokenizer --codes 30", "tokenizer --global-size 30",
    "tokenizer --ibot 0.5", "tokenizer --sem-read registers", "tokenizer --weight-decay-final 0.1",
    "tokenizer --init x.pth", "generator --patch 5",
    "generator --factors --condition none", "prior", "prior --kind ar --heads 3", "text_prior --shard",
    "text_prior --mix 0 0 0", "sample", "sample text --train", "sample unconditional --inception x.pt",
    "sample caption --prompts x", "sample explain --release x", "sample text --weights 1 1",
    "data --download"])
def test_wrong_flags_stop_with_one_line_and_exit_code_2(tmp_path, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(*command.split(), "--out", tmp_path)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    flags = [word for word in command.split() if word.startswith("--")]
    assert all(flag in said for flag in flags[-1:]), said


def test_missing_stages_are_named_with_the_command_that_trains_them(trained, tmp_path):
    nothing = tmp_path / "nothing"
    codes = tmp_path / "codes"
    link_codes(trained, codes)
    for out, command, missing, remedy in (
            (nothing, "generator", "codes.pt", "tokenizer.py"),
            (nothing, "prior --kind ar", "codes.pt", "tokenizer.py"),
            (nothing, "text_prior", "codes.pt", "tokenizer.py"),
            (nothing, "sample reconstruct", "tokenizer.pt", "tokenizer.py"),
            (codes, "sample reconstruct", "generator.pt", "generator.py"),
            (codes, "sample unconditional", "prior-masked.pt", "prior.py --kind masked"),
            (codes, "sample unconditional --kind ar", "prior-ar.pt", "prior.py --kind ar"),
            (codes, "sample text ring", "text_prior.pt", "text_prior.py")):
        remedy = f"python {remedy} --dataset shapes --out {out}"
        refuse(*command.split(), "--out", out, words=[f"no {out / 'shapes' / missing}", remedy])


def test_stages_of_another_tokenizer_are_refused(trained, tmp_path):
    """By who would go on with them, and by who uses them."""
    train(trained, tmp_path, "tokenizer", "--seed", "1")
    for stage, command in (("prior-ar", "unconditional --kind ar"), ("prior-masked", "unconditional"),
                           ("generator", "reconstruct"), ("text_prior", "text ring")):
        os.link(trained / "shapes" / f"{stage}.pt", tmp_path / "shapes" / f"{stage}.pt")
        refuse(*prepare(trained, tmp_path, stage)[1], words=[f"{stage}.pt", "other codes"])
        refuse("sample", *command.split(), "--out", tmp_path, words=[f"{stage}.pt", "other codes"])


def test_what_cannot_be_read_or_written_is_one_line(trained, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    for name in ("broken.png", "missing.png"):
        refuse("sample", "reconstruct", tmp_path / name, "--out", trained, words=[name])
    refuse("data", "--out", tmp_path / "broken.png", words=["cannot write", "--out"])
    refuse("generator", "--accumulate", "7", "--out", trained, words=["--batch-size 64", "--accumulate"])
