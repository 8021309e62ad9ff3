"""The scripts as commands: every dataset, resuming, two processes, stops, and what they refuse."""
import importlib
import json
import os
import re
import shutil

import data
import numpy as np
import pytest
import test_sample
import torch
from conftest import TINY, call, flags_of, link_codes, refuse, run_pair, script, train_all

STAGES = ("tokenizer", "generator", "prior-masked", "prior-ar", "text_prior")


def weights(out, stage, dataset="shapes"):
    return torch.load(out / dataset / f"{stage}.pt", weights_only=True)


def same(a, b, path=""):
    """Deep equality, bit for bit, of nested checkpoints."""
    assert type(a) is type(b), path
    if torch.is_tensor(a):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}/{k}")
    else:
        assert a == b, path


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet", "folder"])
def test_every_script_runs_on_every_dataset(places, tmp_path, dataset):
    """A few steps of each stage, then pictures; shapes are covered by the other tests. The preset comes first, tiny flags override it."""
    out, where = tmp_path / "results of a run", ["--dataset", dataset, *places[dataset], "--image-size", "32"]
    call("data", *where, "--out", out)
    tokenizer_only = "--patch 8 --global-size 32 --local-size 16 --sem-read patches".split()
    if dataset == "cifar10":  # encoding all 60,000 images is the long part: the smallest network will do
        tokenizer_only += ["--width", "8"]
    call("tokenizer", *TINY["tokenizer"], *tokenizer_only, *where, "--out", out)
    call("generator", *TINY["generator"], "--patch", "8", "--stem", "2", *where, "--out", out)
    call("prior", "--kind", "masked", *TINY["prior"], "--dataset", dataset, "--out", out)
    call("text_prior", *TINY["text_prior"], *where, "--out", out)
    for pictures in ("infill", "text", "caption"):
        call("sample", pictures, *where, "--out", out, "--rows", "1", "--columns", "2", "--sample-steps", "2")
    names = {path.name for path in (out / dataset).iterdir()}
    assert {"tokenizer.pt", "codes.npy", "codes.json", "tokenizer.json", "generator.pt", "generator-early.pt", "prior-masked.pt", "text_prior.pt", "samples"} <= names
    assert all((out / dataset / "samples" / f"{name}.png").stat().st_size > 1000 for name in ("infill", "text", "caption"))


@pytest.mark.parametrize("stage", STAGES)
def test_stop_and_resume_equals_one_run_bit_for_bit(trained, tmp_path, stage, monkeypatch, capsys):
    """Asked to stop in the middle, then the same command again: weights, averages and optimizer are those of one run."""
    (name, flags), results = flags_of(stage), {}
    extra = ["--dropout", "0.2"] if "prior" in name else ["--drop-path", "0.2", "--centering", "centre"] if name == "tokenizer" else []
    flags = [*flags, *extra, "--steps", "9", "--save-every", "4"]
    for way in ("whole", "resumed"):
        out = tmp_path / way
        if name != "tokenizer":
            link_codes(trained, out)
        if way == "resumed":
            asked = []
            with monkeypatch.context() as patch:
                patch.setattr(data.Run, "stopping", lambda run: asked.append(1) or len(asked) == 5)  # between two checkpoints, mid-epoch
                with pytest.raises(SystemExit) as stop:
                    call(name, *flags, "--out", out)
            assert stop.value.code == 143 and weights(out, stage)["step"] == 5 and "stopped at step 5 of 9" in capsys.readouterr().err
        call(name, *flags, "--out", out)
        results[way] = weights(out, stage)
    assert results["whole"]["step"] == results["resumed"]["step"] == 9
    for key in ("model", "ema", "optimizer"):
        same(results["whole"][key], results["resumed"][key], key)
    before = (tmp_path / "whole" / "shapes" / f"{stage}.pt").read_bytes()  # a finished stage says so and changes nothing
    call(name, *flags, "--out", tmp_path / "whole")
    assert "is finished" in capsys.readouterr().out and (tmp_path / "whole" / "shapes" / f"{stage}.pt").read_bytes() == before
    refuse(name, *flags, "--width", "32", "--out", tmp_path / "whole", words=["width 16 → 32", f"{stage}.pt"])
    call(name, *flags, "--width", "32", "--out", tmp_path / "whole", "--restart")
    assert weights(tmp_path / "whole", stage)["config"]["width"] == 32


def test_codes_are_those_of_the_averaged_tokenizer_however_they_came_about(trained, tmp_path, monkeypatch):
    """After a stop in the last step, and after the code file was lost or cut, the same command writes the codes of an unbroken run."""
    whole, codes = (trained / "shapes" / "codes.npy").read_bytes(), tmp_path / "shapes" / "codes.npy"
    with monkeypatch.context() as patch:
        patch.setattr(data.Run, "stopping", lambda run, asked=[]: asked.append(1) or len(asked) == 6)
        with pytest.raises(SystemExit):
            call("tokenizer", *TINY["tokenizer"], "--out", tmp_path)
    assert weights(tmp_path, "tokenizer")["step"] == 6 and not codes.exists()
    call("tokenizer", *TINY["tokenizer"], "--out", tmp_path)
    assert codes.read_bytes() == whole
    for broken in (None, whole[:-7]):
        codes.unlink() if broken is None else codes.write_bytes(broken)
        call("tokenizer", *TINY["tokenizer"], "--out", tmp_path)
        assert codes.read_bytes() == whole


def test_the_references_leave_the_files_of_the_generator_alone(trained, tmp_path):
    link_codes(trained, tmp_path)
    for flags in (["--factors", "--groups", "5"], ["--condition", "none"]):
        call("generator", *TINY["generator"], *flags, "--out", tmp_path)
    assert {path.name for path in (tmp_path / "shapes").glob("generator*.pt")} == {"generator-factors.pt", "generator-uncond.pt"}


def test_two_processes_equal_one(trained, tmp_path):
    """The same global batch on one process and on two (gloo) gives the same weights up to rounding, in every stage."""
    runs = [(stage, "", []) for stage in STAGES] + [("tokenizer", "-no-ibot", ["--ibot", "0"])]
    common, words = "--steps 3 --batch-size 16 --dtype float32 --lr-matrix 0 --lr 1e-4".split(), []
    for stage, suffix, extra in runs:
        name, flags = flags_of(stage)
        outs = [tmp_path / f"{part}-{stage}{suffix}" for part in ("one", "two")]
        if stage != "tokenizer":
            [link_codes(trained, out) for out in outs]
        call(name, *flags, *extra, *common, "--out", outs[0])
        words += ["+", name, *flags, *extra, *common, "--out", outs[1]]
    run_pair(tmp_path / "said", *words[1:])
    for stage, suffix, _ in runs:
        one, two = (weights(tmp_path / f"{part}-{stage}{suffix}", stage) for part in ("one", "two"))
        assert one["model"].keys() == two["model"].keys() and one["step"] == two["step"] == 3
        assert any(not torch.equal(one["model"][k], one["ema"].get(k, one["model"][k])) for k in one["model"])  # it did move
        for k, value in one["model"].items():  # Adam moves a weight by about lr a step whatever its gradient: rounding of a tiny one shows as a part of 3e-4
            assert (value - two["model"][k]).abs().max() < 1e-4, (stage, k)


def test_a_run_goes_on_with_another_number_of_processes(trained, tmp_path, monkeypatch):
    """Three steps on one process, three on two: the weights of six steps on one, up to rounding."""
    flags = ["--kind", "masked", *TINY["prior"], "--batch-size", "16", "--accumulate", "2", "--dtype", "float32", "--lr-matrix", "0", "--lr", "1e-4"]
    for part in ("one", "changed"):
        link_codes(trained, tmp_path / part)
    call("prior", *flags, "--out", tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(data.Run, "stopping", lambda run, asked=[]: asked.append(1) or len(asked) == 3)
        with pytest.raises(SystemExit):
            call("prior", *flags, "--out", tmp_path / "changed")
    run_pair(tmp_path / "said", "prior", *flags, "--out", tmp_path / "changed")
    one, changed = (weights(tmp_path / part, "prior-masked") for part in ("one", "changed"))
    assert one["step"] == changed["step"] == 6 and all((v - changed["model"][k]).abs().max() < 1e-4 for k, v in one["model"].items())


def test_a_sharded_text_prior_equals_a_whole_one_and_resumes(trained, tmp_path):
    """--shard on two processes: the weights of one process up to rounding; stopped after its first checkpoint, it goes on from the parts."""
    flags = [*TINY["text_prior"], "--batch-size", "16", "--accumulate", "2", "--dtype", "float32", "--lr-matrix", "0", "--lr", "1e-4", "--save-every", "3"]
    for part in ("one", "two", "cut"):
        link_codes(trained, tmp_path / part)
    call("text_prior", *flags, "--out", tmp_path / "one")
    refuse("text_prior", *flags, "--shard", "--out", tmp_path / "cut", words=["--shard", "torchrun"])
    said = run_pair(tmp_path / "said", "text_prior", *flags, "--shard", "--out", tmp_path / "two")
    assert "".join(said).count("test: bits per token") == 1
    assert "stopped at step 4 of 6" in run_pair(tmp_path / "said", "text_prior", *flags, "--shard", "--out", tmp_path / "cut", code=143, STOP_AFTER=4)[0]
    run_pair(tmp_path / "said", "text_prior", *flags, "--shard", "--out", tmp_path / "cut")
    one, two, cut = (weights(tmp_path / part, "text_prior") for part in ("one", "two", "cut"))
    assert one["ema"].keys() == two["ema"].keys() and two["step"] == cut["step"] == 6
    assert all((v - two["ema"][k]).abs().max() < 1e-4 for k, v in one["ema"].items())
    assert all(torch.equal(v, cut["ema"][k]) for k, v in two["ema"].items())  # bit for bit
    assert sorted(path.name for path in (tmp_path / "cut" / "shapes").glob("text_prior*.pt")) == [
        "text_prior-000000006-1of2.pt", "text_prior-000000006-2of2.pt", "text_prior.pt"]


def test_two_processes_check_encode_and_crop_an_imagenet_tree_as_one(places, tmp_path, capsys):
    """Workers, a broken file (named once), crops cut from files, codes encoded in shares: the same codes as one process."""
    tree, tiny = tmp_path / "tree", [*TINY["tokenizer"], *"--patch 8 --global-size 32 --local-size 16 --sem-read patches --batch-size 16".split()]
    shutil.copytree(places["imagenet"][1], tree)
    (tree / "train" / "cats" / "broken.png").write_bytes(b"no picture")
    flags = [*tiny, "--dataset", "imagenet", "--data-dir", tree, "--image-size", "32", "--steps", "2", "--dtype", "float32", "--workers", "1", "--lr", "1e-5"]
    call("tokenizer", *flags, "--out", tmp_path / "one")
    both = run_pair(tmp_path / "said", "tokenizer", *flags, "--out", tmp_path / "two")
    for said in (capsys.readouterr().err, "".join(both)):
        assert said.count("1 of 33 files do not open") == 1 and "broken.png" in said, said[-3000:]
    one, two = (np.load(tmp_path / part / "imagenet" / "codes.npy") for part in ("one", "two"))
    assert one.shape == two.shape == (32, 2, 16) and (one == two).mean() > 0.98  # rounding may turn a tie


def test_scores_by_inception_are_the_same_on_two_processes(trained, tmp_path):
    net = tmp_path / "inception.pt"
    torch.jit.script(test_sample.Net()).save(str(net))
    flags, results = ["--score", "--inception", net, "--count", "1100", "--sample-steps", "1", "--out", trained], []
    for processes in (1, 2):
        if processes == 1:
            call("sample", *flags)
        else:
            run_pair(tmp_path / "said", "sample", *flags)
        results.append(json.loads((trained / "shapes" / "inception.json").read_text()))
    for name in ("codes of prior-masked", "true codes"):
        assert results[0][name] == results[1][name] and results[0][name]["samples"] == 1100


def test_accumulation_equals_one_batch(trained, tmp_path):
    for stage in ("generator", "prior-masked", "text_prior"):
        (name, flags), results = flags_of(stage), []
        for parts in (1, 4):
            out = tmp_path / f"{stage}{parts}"
            link_codes(trained, out)
            call(name, *flags, "--dtype", "float32", "--lr-matrix", "0", "--lr", "1e-4", "--accumulate", parts, "--out", out)
            results.append(weights(out, stage)["model"])
        for k in results[0]:
            assert (results[0][k] - results[1][k]).abs().max() < 1e-4, k


@pytest.mark.parametrize("stage", ["tokenizer", "generator", "prior-ar", "text_prior"])
def test_activations_that_are_computed_twice_give_the_same_weights(trained, tmp_path, stage):
    """Bit for bit, dropout included."""
    (name, flags), results = flags_of(stage), []
    flags = [*flags, "--steps", "3", "--depth", "4", *(["--dropout", "0.2"] if "prior" in name else [])]
    for k, extra in enumerate(([], ["--grad-checkpoint"])):
        if name != "tokenizer":
            link_codes(trained, tmp_path / str(k))
        call(name, *flags, *extra, "--out", tmp_path / str(k))
        results.append(weights(tmp_path / str(k), stage)["model"])
    same(*results)


@pytest.mark.parametrize("stage, less", [("tokenizer", ["--batch-size", "32"]), ("generator", ["--accumulate", "4"]), ("prior-masked", ["--grad-checkpoint"]),
                                         ("text_prior", ["--grad-checkpoint"])])
def test_dry_run_counts_memory_that_falls_with_parts_and_checkpointing(trained, tmp_path, capsys, stage, less):
    link_codes(trained, tmp_path)
    (name, flags), found = flags_of(stage), []
    flags = [*flags, "--batch-size", "128", "--width", "64", "--depth", "4", "--dry-run", "--out", tmp_path]
    for extra in ([], less):
        call(name, *flags, *extra)
        found.append(float(re.search(r"([0-9.]+) GiB of tensors", capsys.readouterr().out)[1]))
    assert found[0] > 1.2 * found[1] > 0, found


def test_a_run_that_turns_to_nan_stops_and_keeps_the_last_checkpoint(trained, tmp_path):
    link_codes(trained, tmp_path)
    flags = [*TINY["prior"], "--kind", "ar", "--out", tmp_path, "--lr", "1e38", "--steps", "60", "--save-every", "1", "--clip", "1e30"]
    refuse("prior", *flags, words=["step"])
    assert all(torch.isfinite(v).all() for v in weights(tmp_path, "prior-ar")["model"].values())


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, flags, words", [
    ("tokenizer", ["--steps", "0"], ["--steps"]), ("tokenizer", ["--batch-size", "-4"], ["--batch-size"]),
    ("tokenizer", ["--dataset", "mnist"], ["--dataset"]), ("tokenizer", ["--heads", "5"], ["--heads", "--width"]),
    ("tokenizer", ["--codes", "30"], ["--codes", "patches"]), ("tokenizer", ["--ibot", "0.5"], ["--attention", "--ibot"]),
    ("tokenizer", ["--sem-read", "registers"], ["--attention", "--sem-read"]), ("sample", ["compose", "--rounds", "-1"], ["--rounds"]),
    ("tokenizer", ["--global-size", "30"], ["--global-size", "--patch"]),
    ("tokenizer", ["--tau", "0"], ["--tau"]), ("tokenizer", ["--batch", "4"], ["--batch"]), ("tokenizer", ["--stem", "5"], ["--stem"]),
    ("tokenizer", ["--lr", "nan"], ["--lr"]), ("tokenizer", ["--image-size", "40"], ["--image-size"]), ("tokenizer", ["--momentum", "2"], ["--momentum"]),
    ("generator", ["--patch", "5"], ["--patch"]), ("generator", ["--drop", "x"], ["--drop"]), ("generator", ["--accumulate", "7"], ["--accumulate"]),
    ("prior", [], ["--kind"]), ("prior", ["--kind", "ar", "--heads", "3"], ["--heads"]),
    ("text_prior", ["--mix", "0", "0", "0"], ["--mix"]), ("text_prior", ["--heads", "3"], ["--heads"]), ("text_prior", ["--mix", "1"], ["--mix"]), ("sample", [], ["say what to do"]),
    ("tokenizer", ["--weight-decay-final", "0.1"], ["--weight-decay-final", "--weight-decay"]), ("tokenizer", ["--init", "x.pth"], ["--init", "--stem"]),
    ("tokenizer", ["--sem-rank", "-1"], ["--sem-rank"]), ("generator", ["--size", "XXL"], ["--size"]), ("text_prior", ["--shard"], ["--shard", "--lr-matrix"]),
    ("sample", ["unconditional", "--inception", "x.pt"], ["--inception", "--score"]), ("sample", ["paint"], ["paint"]), ("sample", ["text", "--text-guidance", "2", "1e300"], ["--text-guidance"]), ("data", ["--download"], ["--download", "cifar10"])])
def test_wrong_flags_stop_with_exit_code_2(tmp_path, name, flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main([*flags, "--out", str(tmp_path)])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error:" in line and all(word in line for word in words), line


def test_missing_stages_are_named_with_the_command_that_trains_them(tmp_path, trained, monkeypatch):
    for name, flags, words in (
            ("generator", TINY["generator"], ["codes.npy", "python tokenizer.py"]), ("prior", ["--kind", "ar"], ["codes.npy", "python tokenizer.py"]),
            ("sample", ["unconditional"], ["prior-masked.pt", "python prior.py --kind masked"]), ("text_prior", [], ["codes.npy", "python tokenizer.py"]),
            ("sample", ["reconstruct"], ["tokenizer.pt", "python tokenizer.py"])):
        refuse(name, *flags, "--out", tmp_path / "empty", words=words)
    link_codes(trained, tmp_path / "codes")
    refuse("sample", "reconstruct", "--out", tmp_path / "codes", words=["generator.pt", "python generator.py"])
    refuse("sample", "unconditional", "--kind", "ar", "--out", tmp_path / "codes", words=["prior-ar.pt", "python prior.py --kind ar"])
    refuse("sample", "text", "a red ring", "--out", tmp_path / "codes", words=["text_prior.pt", "python text_prior.py"])
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "imagenet", "folder"):
        refuse("tokenizer", "--dataset", name, "--out", tmp_path, words=[f"data/{name}"])


def test_stages_of_another_tokenizer_are_refused(trained, tmp_path):
    train_all(tmp_path, "--seed", "1", stages=("tokenizer",))
    for stage in ("generator", "prior-ar"):
        os.link(trained / "shapes" / f"{stage}.pt", tmp_path / "shapes" / f"{stage}.pt")
    refuse("sample", "unconditional", "--kind", "ar", "--out", tmp_path, words=["prior-ar.pt", "other codes"])
    refuse("sample", "reconstruct", "--out", tmp_path, words=["generator.pt", "other codes"])
    refuse("generator", *TINY["generator"], "--out", tmp_path, words=["generator.pt", "other codes"])


def test_pictures_that_do_not_open_and_folders_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    for path in ("broken.png", "missing.png"):
        refuse("sample", "reconstruct", tmp_path / path, "--out", trained, words=[path])
    (tmp_path / "file").write_text("")
    refuse("data", "--out", tmp_path / "file", words=["cannot write", "--out"])


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    done = script("sample", "reconstruct", "--out", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no ") and done.stderr.count("\n") == 1
