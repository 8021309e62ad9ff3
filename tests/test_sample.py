"""Pictures and scores: mixing codes, the Fréchet distance, the judge, and the table."""
import gc
import json
import os

import conftest
import data
import numpy as np
import prior
import pytest
import sample
import tokenizer
import torch
from conftest import call, link_codes, refuse
from PIL import Image


def test_a_mixture_weighs_the_values_of_its_parents():
    codes = torch.tensor([[0, 1], [0, 2], [3, 2]])
    weights = sample.mixture_weights(codes, [5, 3, 2], 4).exp()
    assert torch.allclose(weights, torch.tensor([[0.8, 0, 0, 0.2], [0, 0.5, 0.5, 0]]))
    batch = sample.mixture_weights(codes.expand(7, 3, 2), [0, 1, 0], 4).exp()
    assert batch.shape == (7, 2, 4) and (batch[:, 0, 0] == 1).all() and (batch[:, 1, 2] == 1).all()


def test_chosen_positions_come_from_the_first_and_the_others_from_the_rest():
    codes = torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    weights = sample.mixture_weights(codes, [0.5, 0.3, 0.1], 4, [0, 2]).exp()
    assert torch.allclose(weights[[0, 2]], torch.tensor([0.0, 1, 0, 0]))
    assert torch.allclose(weights[[1, 3]], torch.tensor([0.0, 0, 0.75, 0.25]))


@pytest.mark.parametrize("choose", ["prior", "random"])
def test_every_position_of_a_child_is_a_parents(trained, run, choose):
    args = sample.parse(["compose", "--out", str(trained), "--rounds", "2"])
    stages = sample.Stages(args, run)
    parents = torch.from_numpy(stages.codes[0][:90, 0].astype(np.int64)).view(30, 3, -1)
    children = stages.compose(parents, [0.5, 0.5, 0], torch.Generator().manual_seed(0), choose)
    from_first, from_second = children == parents[:, 0], children == parents[:, 1]
    assert (from_first | from_second).all() and not from_first.all() and not from_second.all()


def test_frechet_distance_of_gaussians_with_known_distance():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=rng, dtype=torch.float64)
    assert abs(sample.frechet(a, a)) < 1e-9
    b = torch.randn(200_000, 3, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0, 0])
    assert abs(sample.frechet(a, b) - (1 + 0 + 1 + 4)) < 0.05  # |m|² + Σ (σ₁ − σ₂)²


def test_nearest_distance_counts_differing_positions():
    train = np.array([[0, 0, 0, 0], [1, 1, 1, 1]])
    assert sample.nearest_distance(torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [2, 2, 0, 1]]), train).tolist() == [1, 0, 3]


def test_blends_differ_from_both_of_their_drawings_and_the_batch_is_a_function_of_the_step():
    args = type("Args", (), {"dataset": "shapes", "image_size": 32})
    images, labels, blends = sample.judge_batch(None, args, 5)
    again = sample.judge_batch(None, args, 5)
    assert torch.equal(images, again[0]) and torch.equal(blends, again[2]) and images.shape == blends.shape
    assert ((images.int() - blends.int()).abs().amax((1, 2, 3)) > 5).float().mean() > 0.95
    unseen = sum(data.is_unseen(sample.judge_batch(None, args, k)[1], pair).sum() for k in range(3) for pair in data.UNSEEN_PAIRS.values())
    assert unseen > 20  # the judge also learns the pairs that the stages never see


def test_pictures_store_their_settings(trained):
    for command, flags in (("unconditional", ["--kind", "ar"]), ("reconstruct", []), ("infill", ["--keep", "0.25"]),
                           ("compose", ["--weights", "0.8", "0.2"]), ("compose", ["--positions", "0", "1"]), ("compose", ["--choose", "random"])):
        call("sample", command, *flags, "--out", trained, "--rows", "2", "--sample-steps", "2", "--guide", "early")
        name = "unconditional-ar" if command == "unconditional" else command
        with Image.open(trained / "shapes" / "samples" / f"{name}.png") as image:
            settings = json.loads(image.text["settings"])
        assert settings["command"] == command and settings["sample_steps"] == 2 and settings["guide"] == "early"


def test_named_images_of_any_size_are_reconstructed_and_composed(trained, tmp_path):
    for k, size in enumerate(((100, 60), (20, 20), (32, 32))):
        Image.new("RGB", size, (80 * k, 90, 200)).save(tmp_path / f"{k}.png")
    names = [tmp_path / f"{k}.png" for k in range(3)]
    call("sample", "reconstruct", *names, "--out", trained, "--rows", "1", "--sample-steps", "1")
    with Image.open(trained / "shapes" / "samples" / "reconstruct.png") as image:
        assert image.width == 3 * 66 + 2
    call("sample", "compose", *names, "--out", trained, "--rows", "1", "--sample-steps", "1")
    for flags, words in ((["compose", names[0]], ["at least 2"]), (["compose", *names, "--weights", "1", "1"], ["--weights", "3"]),
                         (["compose", *names, "--positions", "16"], ["--positions", "15"])):
        refuse("sample", *flags, "--out", trained, words=words)


def test_flags_may_come_before_image_names_and_sizes_must_agree(trained):
    assert sample.parse(["compose", "--rows", "1", "a.png", "b.png"]).inputs == ["a.png", "b.png"]
    refuse("sample", "unconditional", "--image-size", "64", "--out", trained, words=["--image-size 32", "64"])


def test_infill_keeps_what_it_is_told_to_keep(trained, run):
    """With everything kept the code is the image's own; the prior is not asked."""
    call("sample", "infill", "--keep", "1", "--out", trained, "--rows", "1", "--sample-steps", "2", "--guidance", "1")
    call("sample", "reconstruct", "--out", trained, "--rows", "1", "--sample-steps", "2", "--guidance", "1")
    read = lambda name: np.asarray(Image.open(trained / "shapes" / "samples" / f"{name}.png"))[:70]  # the inputs
    assert np.array_equal(read("infill"), read("reconstruct"))


def test_the_table_of_scores_is_complete_and_within_bounds(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shapes"
    out.mkdir()
    for path in (trained / "shapes").iterdir():
        if path.is_file():
            os.link(path, out / path.name)
    monkeypatch.setattr(sample, "train_judge", lambda dataset, args, run, train=sample.train_judge: train(dataset, args, run, steps=3))
    sample.main(["--score", "--out", str(tmp_path), "--count", "16", "--sample-steps", "2"])
    scores = json.loads((out / "scores.json").read_text())
    assert {"real images", "blends of two images", "tokenizer", "reconstruct", "held-out codes", "prior-masked", "prior-ar", "masked bound / ar bits",
            "compose, positions chosen by the prior", "compose, positions at random", "unseen-shape-colour", "unseen-colour-frame", "settings", "seconds"} <= scores.keys()
    assert scores["prior-ar"]["calls per sample"] == 16 and scores["prior-masked"]["calls per sample"] <= 16
    for value in (scores["compose, positions at random"]["every factor from a parent, clean"], scores["unseen-colour-frame"]["pair kept"], scores["reconstruct"]["clean"]):
        assert 0 <= value <= 1
    for name in ("frechet / true codes",):
        assert scores["prior-masked"][name] == pytest.approx(scores["prior-masked"]["frechet"] / scores["reconstruct"]["frechet"])
    assert "compose" in capsys.readouterr().out
    assert (out / "judge.pt").exists()  # kept for the next time


def test_stages_read_back_what_was_encoded(trained, run):
    """The code of an image on its own is the code in the file: reading and encoding agree."""
    parser = data.make_parser("")
    args = data.parse(parser, {}, ["--out", str(trained), "--dtype", "float32"])
    backbone, config = tokenizer.load_tokenizer(args, run.device)
    codes, about = data.open_codes(args)
    dataset, rows = data.load_dataset(args), [0, 100, 270]
    for flip in (0, 1):
        images = dataset.pixels(rows, torch.full((3,), bool(flip)))
        again = tokenizer.encode_images(backbone, images, config, run)[0]
        assert (again.numpy() == codes[rows, flip]).mean() > 0.9  # the file was written in bfloat16 where the machine has it
    assert prior.load_prior(args, "ar", run.device).L == about["L"] == config["codes"]


# --- Inception: against a small computation of its own -----------------------------------------------------------------

class Net(torch.nn.Module):
    """Stands for the public Inception: bytes → 6 features, or probabilities of 5 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.out, self.bias = (torch.nn.Parameter(torch.randn(*s)) for s in ((48, 6), (6, 5), (5,)))

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ self.weight
        if return_features:
            return x
        logits = x @ self.out * 3
        return (logits if no_output_bias else logits + self.bias).softmax(1)


def numpy_scores(real, made, classes, parts=10):
    """FID, IS, precision, recall with numpy alone."""
    m1, m2, c1, c2 = real.mean(0), made.mean(0), np.cov(real.T), np.cov(made.T)
    fid = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0)).sum()
    score = [np.exp(np.mean([(p * np.log(p / part.mean(0))).sum() for p in part])) for part in np.array_split(classes, parts)]

    def share(points, of):
        near = 0
        radii = [np.sort(np.linalg.norm(of - center, axis=1))[3] for center in of]
        for point in points:
            near += any(np.linalg.norm(point - center) <= radius for center, radius in zip(of, radii))
        return near / len(points)

    return fid, np.mean(score), share(made, real), share(real, made)


def test_scores_by_inception_equal_numpy(trained, tmp_path, monkeypatch):
    """Of the images that were really drawn; stopped in the middle and continued, the result is that of one run."""
    net = torch.jit.script(Net())
    net.save(str(tmp_path / "inception.pt"))
    drawn, draw = [], sample.Stages.draw
    monkeypatch.setattr(sample.Stages, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    monkeypatch.setattr(sample.prior, "BATCH", 20)
    flags = ["--score", "--inception", tmp_path / "inception.pt", "--count", "70", "--sample-steps", "1", "--out", trained]
    call("sample", *flags)
    whole, images = json.loads((trained / "shapes" / "inception.json").read_text()), torch.cat(drawn)
    assert len(images) == 140 and whole["true codes"]["samples"] == 70
    with torch.no_grad():
        train = data.load_shapes(sample.parse([str(flag) for flag in flags])).images[:conftest.SMALL["train"]]
        real, made, classes = net(train, True).numpy(), net(images, True).numpy(), net(images, False, True).numpy()
    for k, name in enumerate(("codes of prior-masked", "true codes")):
        rows = slice(70 * k, 70 * (k + 1))
        expected = numpy_scores(real.astype(np.float64), made[rows].astype(np.float64), classes[rows].astype(np.float64))
        found = [whole[name][key] for key in ("FID", "IS", "precision", "recall")]
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-6), (found, expected)
    asked = iter([False] * 3 + [True] * 9)
    with monkeypatch.context() as patch:
        patch.setattr(data.Run, "asked", lambda run: next(asked))
        with pytest.raises(SystemExit) as stopped:
            call("sample", *flags)
    assert stopped.value.code == 143
    del stopped
    gc.collect()  # the frames of the stopped run, and with them its lock
    before = len(drawn)
    call("sample", *flags)
    again = json.loads((trained / "shapes" / "inception.json").read_text())
    assert len(drawn) - before == 8 - 3 and all(again[name] == whole[name] for name in ("codes of prior-masked", "true codes"))
    assert not list((trained / "shapes").glob(".samples-*"))


def test_files_that_are_no_inception_are_refused(trained, tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    refuse("sample", "--score", "--inception", tmp_path / "text.pt", "--out", trained, words=["--inception", "text.pt", "TorchScript"])
    refuse("sample", "--score", "--inception", tmp_path / "missing.pt", "--out", trained, words=["missing.pt"])
    torch.jit.script(Net()).save(str(tmp_path / "net.pt"))
    link_codes(trained, tmp_path / "codes")
    refuse("sample", "--score", "--inception", tmp_path / "net.pt", "--out", tmp_path / "codes", words=["generator.pt", "python generator.py"])
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "relu.pt"))
    refuse("sample", "--score", "--inception", tmp_path / "relu.pt", "--out", trained, words=["--inception", "return_features"])
