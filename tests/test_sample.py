"""Pictures and scores: mixtures of codes, the Fréchet distance, the judge, the table, Inception."""
import json
import shutil
from types import SimpleNamespace

import data
import numpy as np
import pytest
import sample
import torch
import torch.nn.functional as F
from conftest import TINY, Net, arguments, call, link_codes, refuse
from PIL import Image


def test_a_mixture_weighs_the_values_of_its_parents():
    """Chosen positions come from the first parent alone, all others then from the rest."""
    codes = torch.tensor([[0, 1], [0, 2], [3, 2]])
    weights = sample.mixture_weights(codes, [5, 3, 2], 4).exp()
    assert torch.allclose(weights, torch.tensor([[0.8, 0, 0, 0.2], [0, 0.5, 0.5, 0]]))
    weights = sample.mixture_weights(codes, [5, 3, 1], 4, positions=[1]).exp()
    assert torch.allclose(weights, torch.tensor([[0.75, 0, 0, 0.25], [0, 1, 0, 0]]))
    batch = sample.mixture_weights(codes.expand(7, 3, 2), [0, 1, 0], 4).exp()
    assert torch.equal(batch, F.one_hot(codes[1], 4).float().expand(7, 2, 4))


def test_the_share_of_the_nearest_parent_counts_where_parents_differ_alone():
    parents = torch.tensor([[[0, 0, 0, 0, 5], [0, 1, 1, 1, 5]]])  # they differ in three positions
    children = torch.tensor([[0, 0, 0, 0, 5], [0, 1, 1, 0, 5], [0, 2, 2, 1, 5]])
    shares = sample.nearest_share(children, parents.expand(3, -1, -1))
    assert torch.allclose(shares, torch.tensor([1, 2 / 3, 1 / 3]))


def test_inner_positions_are_off_the_rim_and_recolouring_leaves_all_but_their_colours():
    inner = torch.zeros(4, 4, 3).long()
    inner[1:3, 1:3] = 1
    stored = {"L": 48, "side": 4, "colour_codes": 1}
    assert sample.first_positions(stored).tolist() == inner.flatten().nonzero()[:, 0].tolist()
    inner[:, :, :2] = 0
    assert sample.first_positions(stored, True).tolist() == (inner == 0).flatten().nonzero()[:, 0].tolist()


def test_the_first_image_takes_the_colours_inside_the_second_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    apart = "--no-attention --ibot 0 --registers 0 --locals 0 --codes 64 --colour-codes 2".split()
    call("tokenizer", *TINY["tokenizer"], *apart, "--out", out)
    call("generator", *TINY["generator"], "--out", out)
    call("sample", "compose", "--recolour", "--rows", 1, "--sample-steps", 1, "--out", out)
    assert (out / "shapes" / "samples" / "compose-001.png").exists()
    args = sample.parse(["compose", "--recolour", "--out", str(out)])
    stages = sample.Stages(args, data.Run(args))
    parents = stages.codes_of([[0, 1]])  # (1, 2, L)
    kept = sample.first_positions(stages.stored, True)
    child = stages.compose(parents, [1, 1], data.step_generator(0, 0), args.choose, kept)
    exchanged = torch.ones(64).bool()
    exchanged[kept] = False
    assert torch.equal(child, torch.where(exchanged, parents[:, 1], parents[:, 0])) and exchanged.sum() == 8


@pytest.fixture
def scores():
    """Scores of shapes where codes and images are the factors themselves."""
    found = sample.Scores.__new__(sample.Scores)
    found.args = data.make_parser("").parse_args([])
    found.dataset = data.load_shapes(found.args)
    found.names = list(data.SHAPES)
    found.shapes = True
    found.rows = list(found.dataset.splits["test"])
    found.n = len(found.rows)
    found.stages = SimpleNamespace(draw=lambda codes, seed: codes)
    found.judged = lambda codes: (None, codes, torch.ones(len(codes), dtype=torch.bool))
    found.measure = lambda judged: {}
    return found


def test_recombination_asks_for_pairs_that_training_never_shows(scores):
    """A copy never shows the pair, the two factors put together always do."""
    for pair in data.UNSEEN_PAIRS.values():
        second = scores.names.index(pair[1])

        def children(rows):
            labels = scores.dataset.labels[rows]
            mixed = labels[:, 0].clone()
            mixed[:, second] = labels[:, 1, second]
            assert data.is_unseen(mixed, pair).all()
            return {"copy": labels[:, 0], "mixed": mixed, "inner patches of the first": mixed}

        scores.children = children
        found = scores.score_recombination(pair)
        assert found["copy"]["shows the pair"] == 0 and found["mixed"]["shows it, clean"] == 1
        assert ("inner patches of the first" in found) == ("frame" in pair)


def test_composition_is_counted_factor_by_factor(scores):
    """A copy inherits all; with the next colour, where that is the other parent's."""
    def children(rows):
        parents = scores.dataset.labels[rows]  # (n, 2, 5)
        turned = parents[:, 0].clone()
        turned[:, 1] = (turned[:, 1] + 1) % 8
        children.share = (turned[:, 1] == parents[:, 1, 1]).double().mean().item()
        return {"copy": parents[:, 0], "turned": turned}

    scores.children = children
    found = scores.score_composition()
    n = scores.n // 2
    assert found["copy"]["inherited"] == {"n": n, **dict.fromkeys(data.SHAPES, 1)}
    assert found["turned"]["inherited"] == found["copy"]["inherited"] | {"colour": children.share}
    assert found["turned"]["right"] == children.share and found["copy"]["right and clean"] == 1


def test_frechet_distance_of_gaussians_with_known_distance():
    a = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = a.flip(0) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0, 0])
    assert abs(sample.frechet(a, a)) < 1e-9
    assert abs(sample.frechet(a, b) - (1 + 0 + 1 + 4)) < 0.05  # |m₁ − m₂|² + Σ (σ₁ − σ₂)²


def test_moments_taken_in_parts_equal_numpy():
    features = torch.randn(1037, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    mean, covariance = sample.moments(features, batch=100)
    expected = features.double().numpy()
    assert np.allclose(mean, expected.mean(0)) and np.allclose(covariance, np.cov(expected.T))


def test_nearest_distance_counts_differing_positions():
    train = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.uint8)
    codes = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [3, 3, 0, 1]])
    assert sample.nearest_distance(codes, train, batch=2).tolist() == [1, 0, 3]


def test_captions_of_shapes_can_be_read_back():
    labels, _, said = data.shapes_labels("train", 600)
    for row, spoken in zip(labels.tolist(), said.tolist()):
        expected = [value if k == 0 or spoken[k - 1] else -1 for k, value in enumerate(row)]
        assert sample.read_shapes_caption(data.shapes_caption(row, spoken)) == expected
    assert sample.read_shapes_caption("a red") == [-1] * 5


def test_a_batch_of_the_judge_has_blends_and_follows_from_the_step():
    args = arguments(dataset="shapes", image_size=32)
    images, labels, blends = sample.judge_batch(None, args, 5)
    again, _, blends_again = sample.judge_batch(None, args, 5)
    assert torch.equal(images, again) and torch.equal(blends, blends_again)
    assert not torch.equal(images, sample.judge_batch(None, args, 6)[0])
    assert ((images.int() - blends.int()).abs().amax((1, 2, 3)) > 5).double().mean() > 0.95
    for pair in data.UNSEEN_PAIRS.values():  # it also learns the pairs that the stages never see
        assert data.is_unseen(labels, pair).any()


def test_composing_and_infilling_keep_what_they_should_and_stored_codes_fit_their_images(trained):
    """A child's positions are its parents'; a stored code is that of its image by the averaged tokenizer, of
    either flip, but for rounding."""
    args = sample.parse(["compose", "--rounds", "2", "--out", str(trained)])
    stages = sample.Stages(args, data.Run(args))
    parents = stages.codes_of(range(90)).view(30, 3, -1)
    for choose in ("prior", "random"):
        children = stages.compose(parents, [0.5, 0.5, 0], data.step_generator(0, 0), choose)
        first = children == parents[:, 0]
        second = children == parents[:, 1]
        assert (first | second).all() and not first.all() and not second.all()
    shares = {}
    args.most = 0.5
    for draws in (1, 8):
        args.draws = draws
        children = stages.compose(parents[:, :2], [0.5, 0.5], data.step_generator(0, 0), "prior")
        shares[draws] = sample.nearest_share(children, parents[:, :2])
    assert (shares[8] <= shares[1]).all() and (shares[8] < shares[1]).any()
    for flip in (0, 1):
        codes = stages.encode(stages.dataset.pixels(range(90), torch.full((90,), flip == 1)))
        assert (codes == stages.stored["codes"][:90, flip]).double().mean() > 0.98
    drawn = []
    stages.draw = lambda codes, seed: drawn.append(codes) or torch.zeros(len(codes), 3, 32, 32).byte()
    codes = stages.encode(stages.dataset.pixels(stages.dataset.splits["test"][:8]))
    for args.keep in (1, 0.5):
        sample.infill(stages, args)
        kept = drawn[-1].view(args.rows, *codes.shape) == codes  # those drawn again may come out the same
        assert kept.all() if args.keep == 1 else kept.sum(2).min() >= 8 and 0.5 < kept.double().mean() < 0.95
    assert drawn[-1].max() < 4


def test_a_command_shows_and_takes_the_flags_that_it_reads_in_any_order(capsys):
    def shown(*words):
        with pytest.raises(SystemExit):
            sample.parse([*words, "--help"])
        return capsys.readouterr().out

    for command, (function, _, reads) in sample.COMMANDS.items():
        said = shown(command)
        assert f"sample.py {command}" in said and function.__doc__.split()[0] in said
        for flag in sample.FLAGS:
            assert (f"\n  {flag} " in said) == (flag in reads.split()), (command, flag)
        assert said.index("image sampler:") < said.index("\ndata:")
        assert f"python sample.py {command}" in shown()
    assert "--tokenizer FLAGS" in shown("--train") and "--inside" not in shown("--score")
    for words in ("--out x compose a.png b.png --weights .5 .5",
                  "--weights .5 .5 --out x compose a.png b.png"):
        args = sample.parse(words.split())
        assert args.command == "compose" and args.inputs == ["a.png", "b.png"] and args.out == "x"
        assert args.weights == [0.5, 0.5] and args.keep == 0.5 and args.text_guidance == [2.0]
    for words in ("infill a.png --inside", "--train --positions 0", "reveal --rows 2", "compose --score",
                  "explain --order event", "--score --release x", "compose --inside --positions 1",
                  "--out text reveal"):
        with pytest.raises(SystemExit):
            sample.parse(words.split())
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "; see sample.py " in said


def test_two_test_pictures_are_there_to_try(trained, capsys):
    args = sample.parse(["--train", "--out", str(trained)])
    stages = sample.Stages(args, data.Run(args))
    sample.write_examples(stages)
    assert "pictures to try: a.png and b.png in" in capsys.readouterr().out
    pixels = torch.stack([data.read_image(trained / "shapes" / "samples" / f"{x}.png", 32) for x in "ab"])
    assert torch.equal(pixels, stages.dataset.pixels(stages.dataset.splits["test"][:2]))


def test_pictures_store_their_settings(trained):
    for command in ("unconditional --kind ar", "reconstruct", "infill --keep 0.25", "compose --choose random",
                    "compose --weights 0.8 0.2", "compose --positions 0 1", "compose --inside"):
        name = command.split()[0]
        call("sample", *command.split(), *"--rows 2 --sample-steps 2 --out".split(), trained)
        with Image.open(max((trained / "shapes" / "samples").glob(f"{name}-*.png"))) as image:
            settings = json.loads(image.text["settings"])
        assert settings["command"] == name and settings["sample_steps"] == 2


def test_the_picture_of_a_code_has_a_square_for_each_position_in_place():
    """Patch by patch, two lines of two squares each; without patches line by line; no code is grey."""
    code, colours = torch.tensor([0, 1, 2, 3] * 3 + [3, 2, 1, 4]), data.code_colours(4)
    for side, expected in ((2, [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 3, 2], [2, 3, 1, 4]]),
                           (0, [[0, 1, 2, 3]] * 3 + [[3, 2, 1, 4]])):
        picture = data.draw_code(code, colours, side, 128)
        corners = picture[:, 5::32, 5::32].permute(1, 2, 0)  # (4, 4, 3), above and left of the numbers
        assert picture.shape == (3, 128, 128) and torch.equal(corners, colours[torch.tensor(expected)])


def test_explaining_an_image_shows_its_code_and_what_each_position_does(trained):
    flags = ["--rows", "2", "--columns", "7", "--sample-steps", "1", "--out", str(trained)]
    call("sample", "explain", *flags)
    with Image.open(max((trained / "shapes" / "samples").glob("explain-*"))) as image:
        assert image.size == (7 * 136 + 2, 2 * (136 + 14) + 2)
        code = np.array(image.crop((138, 16, 266, 144)))
    args = sample.parse(["explain", *flags])
    stages = sample.Stages(args, data.Run(args))
    first = stages.encode(stages.dataset.pixels(stages.dataset.splits["test"][:1]))[0]
    assert np.array_equal(code[5::32, 5::32].reshape(16, 3), data.code_colours(4)[first].numpy())


def test_a_code_is_revealed_from_all_hidden_to_the_one_that_the_prior_draws(trained):
    flags = ["--columns", "2", "--sample-steps", "1", "--rounds", "0", "--out", str(trained)]
    call("sample", "reveal", *flags)
    args = sample.parse(["unconditional", *flags])
    drawn, _ = sample.Stages(args, data.Run(args)).sample_codes("masked", 2)
    colours = data.code_colours(4).int()
    with Image.open(max((trained / "shapes" / "samples").glob("reveal-*"))) as image:
        assert image.n_frames == 17 and json.loads(image.info["comment"])["command"] == "reveal"
        for frame in range(17):
            image.seek(frame)
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).int()[16:144]
            codes = []
            for left in (2, 138):
                squares = pixels[5::32, left + 5:left + 128:32].reshape(16, 1, 3)
                codes.append((squares - colours).abs().sum(2).argmin(1))
            codes = torch.stack(codes)  # (2, 16), read from the picture
            assert ((codes == 4).sum(1) == 16 - frame).all()
            assert ((codes == 4) | (codes == drawn)).all()


def test_named_images_of_any_size_are_reconstructed_and_composed(trained, tmp_path):
    names = [tmp_path / f"{k}.png" for k in range(3)]
    for name, size in zip(names, ((100, 60), (20, 20), (32, 32))):
        Image.new("RGB", size, (80, 90, 200)).save(name)
    flags = ["--rows", "1", "--sample-steps", "1", "--out", trained]
    for command in (["reconstruct"], ["compose", "--columns", "3"]):
        call("sample", *command, *flags, *names)
        with Image.open(max((trained / "shapes" / "samples").glob(f"{command[0]}-*.png"))) as image:
            assert image.width == 3 * 66 + 2
    refuse("sample", "compose", names[0], *flags, words=["at least 2"])
    refuse("sample", "compose", *names, "--weights", "1", "1", *flags, words=["--weights", "3 codes"])
    refuse("sample", "compose", *names, "--positions", "16", *flags, words=["--positions", "0 to 15"])
    refuse("sample", "reconstruct", *names, "--image-size", "64", *flags, words=["--image-size 32", "64"])


def test_the_table_of_scores_is_complete_and_within_bounds(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "shapes", tmp_path / "shapes")
    monkeypatch.setattr(sample.train_judge, "__defaults__", (3,))  # its steps
    call("sample", *"--score --count 16 --sample-steps 2 --out".split(), tmp_path)
    scores = json.loads((tmp_path / "shapes" / "scores.json").read_text())
    assert scores.keys() == {
        "real images", "blended, blurred and frayed images", "tokenizer", "reconstruct",
        "held-out codes", "prior-masked",
        "prior-ar", "masked bound / ar bits", "compose", "text to image, guidance 2", "captions of images",
        *data.UNSEEN_PAIRS, *(f"compose, {split}" for split in data.UNSEEN_PAIRS), "settings", "seconds"}
    masked = scores["prior-masked"]
    assert scores["prior-ar"]["calls per sample"] == 16 and masked["calls per sample"] == 16 + 32
    ratio = masked["frechet"] / scores["reconstruct"]["frechet"]
    assert masked["frechet / true codes"] == pytest.approx(ratio)
    assert 0 <= scores["compose"]["positions by random"]["right and clean"] <= 1
    assert scores["compose"]["copy of the first parent"]["right, clean, unlike both parents"] <= 1 / 2
    assert scores["compose"]["positions by prior"]["inherited"].keys() == {"n", *data.SHAPES}
    assert 0 <= scores["unseen-colour-frame"]["from the code"]["pair kept"] <= 1
    assert "inner patches of the first" in capsys.readouterr().out


def test_unseen_combinations_of_a_folder_are_scored_beside_its_test_split(tmp_path, monkeypatch):
    """By factors in its metadata; where these change, a new judge learns them."""
    folder = tmp_path / "pictures"
    lines = ["file_name,tone,weight"]
    for number in range(28):
        place = "unseen" if number % 4 == 3 else "seen"
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number * 9, 60, 90)).save(folder / place / f"{number}.png")
        lines.append(f"{place}/{number}.png,{number % 2},{number // 2 % 2}")
    judges = []
    monkeypatch.setattr(sample, "train_judge", lambda judge, *_: judges.append(judge))
    where = ["--dataset", "folder", "--data-dir", folder, "--out", tmp_path]

    def scores():
        call("sample", *"--score --count 8 --sample-steps 1".split(), *where)
        return json.loads((tmp_path / "folder" / "pictures" / "scores.json").read_text())

    (folder / "metadata.csv").write_text("\n".join(lines))
    for stage in ("tokenizer", "generator", "text_prior"):
        call(stage, *TINY[stage], *where)
    found = scores()
    assert found["tokenizer"]["linear on codes, unseen"].keys() == {"n", "tone", "weight"}
    for line in (*found["unseen"].values(), {"factors": found["text to image, guidance 2"]["unseen"]}):
        assert line["factors"].keys() - {"n"} == {"tone", "weight", "all"}
    assert found["captions of images"]["unseen"] == {"n": 4, "equal to its own": 0}
    assert found["compose"]["positions by random"]["inherited"].keys() == {"n", "tone", "weight"}
    assert scores() and len(judges) == 1
    (folder / "metadata.csv").write_text("\n".join([lines[0].replace("weight", "mass"), *lines[1:]]))
    (tmp_path / "folder" / "pictures" / "text_prior.pt").unlink()  # which is of other captions
    assert "mass" in scores()["unseen"]["real"]["factors"] and len(judges) == 2


def numpy_scores(real, made, classes):
    """FID, IS, precision and recall with numpy alone."""
    root = np.sqrt(np.linalg.eigvals(np.cov(real.T) @ np.cov(made.T)).real.clip(0)).sum()
    fid = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(np.cov(real.T) + np.cov(made.T)) - 2 * root
    score = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in np.array_split(classes, 10)]

    def inside(points, others):
        def distances(x):
            return np.linalg.norm(x[:, None] - others, axis=2)

        radii = np.sort(distances(others), axis=0)[3]
        return (distances(points) <= radii).any(1).mean()

    return [fid, np.mean(score), inside(made, real), inside(real, made)]


def test_scores_by_inception_equal_numpy(trained, inception, monkeypatch):
    """Of the images that were really drawn."""
    net = Net()
    drawn, draw = [], sample.Stages.draw

    def noted(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(sample.Stages, "draw", noted)
    monkeypatch.setattr(sample.prior, "BATCH", 20)
    call("sample", "--score", "--inception", inception, *"--count 70 --sample-steps 1 --out".split(), trained)
    assert [len(images) for images in drawn] == [20, 20, 20, 10] * 2
    scores = json.loads((trained / "shapes" / "inception.json").read_text())
    with torch.no_grad():
        shapes = data.load_shapes(arguments(image_size=32)).images[:160]
        real = net(shapes, True).double().numpy()
        for line, images in zip(("codes of prior-masked", "true codes"), torch.cat(drawn).split(70)):
            made = net(images, True).double().numpy()
            classes = net(images, False, True).double().numpy()
            found = [scores[line][name] for name in ("FID", "IS", "precision", "recall")]
            assert np.allclose(found, numpy_scores(real, made, classes), rtol=1e-4, atol=1e-6)
    assert not list((trained / "shapes").glob(".samples-*"))


def test_files_that_are_no_inception_are_refused(trained, tmp_path, inception, monkeypatch):
    """And what is missing, or belongs to other images, is said before anything is drawn."""
    (tmp_path / "text.pt").write_text("no network")
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "relu.pt"))
    link_codes(trained, tmp_path / "codes")
    flags = ["--score", "--out", tmp_path / "codes", "--inception"]
    for name in ("text.pt", "missing.pt", "relu.pt"):
        refuse("sample", *flags, tmp_path / name, words=["--inception", name, "inception-2015-12-05.pt"])
    refuse("sample", *flags, inception, words=["generator.pt", "python generator.py"])
    monkeypatch.setattr(data, "SHAPES_COUNTS", {**data.SHAPES_COUNTS, "train": 150})
    flags[2] = trained
    refuse("sample", *flags, inception, words=["codes.pt", "other images"])
