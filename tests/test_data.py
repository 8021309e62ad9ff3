"""Flags, data sets, batches, files, optimiser and log: data.py."""
import csv
import hashlib
import json
import math
import os
import tarfile
import types
from pathlib import Path

import data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, FakeRun, arguments, part
from PIL import EpsImagePlugin, Image, ImageCms


# --- flags ------------------------------------------------------------------------------------------------

def training_parser():
    """A parser with the flags of a training run."""
    parser = data.make_parser("")
    data.add_training_flags(parser, steps=5, batch_size=64, lr=0.1, lr_matrix=0.0, warmup=0)
    return parser


def test_flags_of_the_run_and_of_samplers_are_no_settings():
    parser = training_parser()
    for group, flag in (("model", "--width"), ("image sampler", "--guidance"), ("start of the run", "--at")):
        parser.add_argument_group(group).add_argument(flag, type=int, default=1)
    args = data.parse(parser, {"folder": {"width": 7, "lr": 0.5}}, "--dataset folder --lr 2".split())
    assert (args.width, args.lr, args.data_dir) == (7, 2.0, "data/folder")  # the preset, and a flag over it
    assert parser.settings["width"] == 1  # what a run that did not know the flag was trained with
    assert {"seed", "steps", "batch_size", "image_size"} < set(parser.settings)
    assert not {"guidance", "at", "out", "device", "workers", "save_every", "restart"} & set(parser.settings)


@pytest.mark.parametrize("cuda, mps, device", [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_device_is_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert data.parse(data.make_parser(""), {}, []).device == device


def test_the_batch_follows_the_images_unless_it_was_given(monkeypatch, capsys):
    parser = training_parser()

    def fitted(*flags, images=27):
        args = data.parse(parser, {"folder": {"batch_size": 32}}, ["--dataset", "folder", *flags])
        data.fit_batch(parser, args, range(images))
        return args.batch_size

    assert fitted() == 27 and fitted("--accumulate", "2") == 26
    assert capsys.readouterr().err.count("27 training images") == 2
    assert fitted("--batch-size", "30") == 30 and fitted(images=32) == 32 and not capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert fitted() == 24


# --- shapes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("held", [(1, 0), (4, 0), (1, 1), (6, 2)])
def test_shapes_are_balanced_and_keep_unseen_pairs_out_of_every_other_split(held):
    for split in SMALL:
        labels, nuisance, _ = data.shapes_labels(split, 4000, held)
        for kind, pair in data.UNSEEN_PAIRS.items():
            assert data.is_unseen(labels, pair, held).float().mean() == (split == kind), (split, kind)
        pairs = labels[:, 0] * 8 + labels[:, 1]  # of (shape, colour)
        seen = held[0] if split == "unseen-shape-colour" else 8 - held[0]  # colours of a shape
        assert split == "unseen-colour-frame" or len(pairs.unique()) == 6 * seen
        for k, values in enumerate(data.SHAPES.values()):
            counts = torch.bincount(labels[:, k], minlength=len(values)) / len(labels)
            balanced = (counts * len(values) - 1).abs().max() < 0.5
            assert balanced or split in data.UNSEEN_PAIRS or k == 1 and held[1], (split, k)
        fewer, same, _ = data.shapes_labels(split, 100, held)  # a function of the split and the index
        assert torch.equal(fewer, labels[:100]) and torch.equal(same, nuisance[:100])


def test_every_factor_changes_the_picture_where_it_should():
    labels = torch.zeros(1, 5).long()
    nuisance = torch.full((1, 8), 0.5)
    base = data.draw_shapes(labels, nuisance).int()
    border = torch.ones(32, 32).bool()
    border[3:-3, 3:-3] = False
    for k, name in enumerate(data.SHAPES):
        changed = labels.clone()
        changed[0, k] = 1
        where = (data.draw_shapes(changed, nuisance).int() - base).abs().sum(1)[0] > 0
        assert where.any() and where[border].any() == where[border].all() == (name == "frame"), name


@pytest.mark.parametrize("shape", data.SHAPES["shape"])
def test_signed_distance_has_the_right_sign_and_slope(shape):
    grid = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    distance = data.signed_distance(shape, x, y)
    assert distance.min() < -0.1 and distance[0].min() > 0 and distance[:, 0].min() > 0
    slope = torch.stack(torch.gradient(distance, spacing=0.01)).norm(dim=0)
    assert slope[distance.abs() < 0.05].median().sub(1).abs() < 0.05  # a pixel of ink is a pixel of distance


def test_flipped_and_larger_drawings_are_drawings_of_the_same():
    """So that the codes of flipped images, which the priors also learn, stand for pictures like any other."""
    labels, nuisance, _ = data.shapes_labels("train", 100)
    images = data.draw_shapes(labels, nuisance)
    mirrored = nuisance.clone()
    mirrored[:, [0, 2, 3]] = 1 - nuisance[:, [0, 2, 3]]  # shift in x, tilt, phase in u
    assert (images.flip(3).int() - data.draw_shapes(labels, mirrored).int()).abs().max() <= 1
    large = data.draw_shapes(labels, nuisance, 64).float()
    assert (F.avg_pool2d(large, 2) - images.float()).abs().mean() < 3


# --- batches ----------------------------------------------------------------------------------------------

def parts_of(step, rows, run=FakeRun(), **change):
    """The parts of a process in a step."""
    return list(data.batch_parts(step, rows, arguments(**change), run, types.SimpleNamespace()))


def test_batches_walk_through_every_row_once_an_epoch():
    def rows_of(step, rows=range(10, 45), batch_size=5, seed=0):
        [whole] = parts_of(step, rows, batch_size=batch_size, seed=seed)
        return whole.rows

    seen = torch.cat([rows_of(step) for step in range(14)])
    assert sorted(seen[:35].tolist()) == sorted(seen[35:].tolist()) == list(range(10, 45))
    assert not torch.equal(seen[:35], seen[35:])
    assert torch.equal(rows_of(3), seen[15:20])  # of (seed, step), in any order of calls
    assert len(rows_of(1, range(7))) == 5  # across two epochs
    assert not torch.equal(rows_of(0, batch_size=35, seed=1), rows_of(0, batch_size=35))


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 4), (2, 2)])
def test_randomness_does_not_depend_on_how_a_batch_is_divided(world, accumulate):
    def drawn(part):
        return part.rows, part.uniform(4), part.normal(2), part.stratified(), part.flips()

    pieces = []
    for rank in range(world):
        parts = parts_of(7, range(30), FakeRun(rank, world), batch_size=8, accumulate=accumulate, seed=3)
        pieces += map(drawn, parts)
    [whole] = parts_of(7, range(30), batch_size=8, seed=3)
    for together, expected in zip(map(torch.cat, zip(*pieces)), drawn(whole)):
        assert torch.equal(together, expected)
    assert torch.equal((part(50).stratified() * 50).floor(), torch.arange(50.0))  # one in each equal part


# --- pictures ---------------------------------------------------------------------------------------------

def test_images_of_every_mode_are_read_right_upright_and_from_their_middle(tmp_path):
    """16 bits are a share of 65,535, or of 4,095 where that is what they fill; floats lie from 0 to 1, 255 or
    65,535."""
    def read(image, name, **change):
        image.save(tmp_path / name, **change)
        return data.read_image(tmp_path / name, 8).float()

    red = Image.new("RGB", (50, 40), (200, 30, 40))
    for mode, name in (("RGB", "a.png"), ("RGB", "b.jpg"), ("P", "c.png"), ("CMYK", "d.tif"),
                       ("RGBA", "e.png")):
        pixel = read(red.convert(mode), name)[:, 4, 4]
        assert (pixel - torch.tensor([200.0, 30.0, 40.0])).abs().max() < 12, name
    assert (read(Image.new("L", (20, 20), 77), "grey.png") == 77).all()
    assert (read(Image.new("RGBA", (20, 20)), "transparent.png") == 255).all()  # on white
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for name, values, expected in (
            ("16 bits, dark.png", (ramp * 200).astype(np.uint16), ramp * 200 / 257),
            ("12 bits of 16.png", (ramp * 4000).astype(np.uint16), ramp * 4000 / 4095 * 255),
            ("16 bits.png", (ramp * 60_000).astype(np.uint16), ramp * 60_000 / 257),
            ("32 bits.tif", (ramp * 1000).astype(np.int32), ramp * 1000 / 257),
            ("to 1.tif", ramp, ramp * 255), ("to 255.tif", ramp * 255, ramp * 255)):
        assert np.abs(read(Image.fromarray(values), name)[0].numpy() - expected).max() <= 1, name
    wide = np.zeros((20, 90, 3), dtype=np.uint8)
    wide[:10, 35:55] = 255
    turned = Image.Exif()
    turned[0x0112] = 3  # by 180°
    middle = read(Image.fromarray(wide), "wide.png", exif=turned)
    assert middle[:, :3].mean() < 5 and middle[:, 5:].mean() > 250


def test_colours_of_an_embedded_profile_are_read_as_they_look(tmp_path):
    """By one that swaps red and green; a broken one is as none."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    swapped = swapped.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    for profile, colour in ((swapped, [100, 200, 40]), (srgb, [200, 100, 40]), (b"broken", [200, 100, 40])):
        Image.new("RGB", (20, 20), (200, 100, 40)).save(tmp_path / "a.tif", icc_profile=profile)
        pixel = data.read_image(tmp_path / "a.tif", 8)[:, 4, 4].int()
        assert (pixel - torch.tensor(colour)).abs().max() < 3


# --- folders ----------------------------------------------------------------------------------------------

def paint(folder, name, numbers, size=(24, 24)):
    """Pictures whose red is six times their number: `name` with {0} the number, {1} its class. Returns the
    names."""
    names = [name.format(number, "cats" if number % 2 else "dogs") for number in numbers]
    for path, number in zip(names, numbers):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if path.endswith(".jfif") else None
        Image.new("RGB", size, (number * 6, 90, 40)).save(folder / path, kind)
    return names


def write_metadata(folder, rows, name="metadata.jsonl"):
    """Rows {column: value} as a .jsonl or .csv."""
    if name.lower().endswith(".csv"):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))


def load(tmp_path, **change):
    """The dataset of the folder tmp_path/in."""
    return data.load_dataset(arguments(data_dir=str(tmp_path / "in"), out=str(tmp_path / "out"), **change))


def sizes(dataset):
    """{split: number of rows}."""
    return {name: len(rows) for name, rows in dataset.splits.items()}


def numbers_of(dataset, split=None):
    """The number of each picture, of all or of a split."""
    rows = dataset.splits[split] if split else range(len(dataset))
    return [round(red / 6) for red in dataset.pixels(rows)[:, 0].float().mean((1, 2)).tolist()]


@pytest.mark.parametrize("name, written, metadata, key", [
    ("{1}/{0}.png", "{1}/{0}.png", "metadata.csv", "text"),
    ("{1}/{0}.jfif", "{1}\\{0}.jfif", "Metadata.CSV", "caption"),
    ("{1}/cafe\u0301 {0}.png", "{1}/caf\u00e9 {0}.png", "METADATA.jsonl", "caption"),
    ("{1}/IMG_{0}.PNG", "{1}/img_{0}.png", "metadata.csv", "text"),
    ("{1}/{0}.png", "{1}/{0}.png", "cats/metadata.jsonl", "text")])
def test_labels_captions_and_pixels_stay_together_however_names_are_written(tmp_path, capsys, name, written,
                                                                            metadata, key):
    """With either slash, in composed letters or not, in another case, from the top though they lie below; in
    a folder that is linked."""
    folder = tmp_path / "in"
    paint(folder, name, range(40))
    (folder / "cats").rename(tmp_path / "elsewhere")
    (folder / "cats").symlink_to(tmp_path / "elsewhere")
    rows = [{"file_name": written.format(number, "cats" if number % 2 else "dogs"),
             key: f"picture, {number}"} for number in range(40)]
    write_metadata(folder, rows, metadata)
    dataset = load(tmp_path)
    numbers = numbers_of(dataset)
    assert sizes(dataset) == {"train": 36, "val": 2, "test": 2}
    assert dataset.factors == {"class": ["cats", "dogs"]}
    assert sorted(numbers) == list(range(40))
    assert dataset.labels[:, 0].tolist() == [1 - number % 2 for number in numbers]
    assert dataset.captions == [f"picture, {number}" for number in numbers]
    assert f"captions from {os.path.basename(metadata).lower()} (40)" in capsys.readouterr().err


def test_captions_may_lie_in_text_files_and_be_several(tmp_path, capsys):
    """Where there are several the first counts, and all are kept."""
    names = paint(tmp_path / "in", "{}.png", range(20))
    for number in range(5, 20):
        (tmp_path / "in" / f"{number}.txt").write_text(f" text {number}\n")
    several = [[f"first {number}", "second"] for number in range(6)]
    rows = [{"file_name": name, "text": texts} for name, texts in zip(names, several)]
    write_metadata(tmp_path / "in", rows)
    dataset = load(tmp_path)
    for row, number in enumerate(numbers_of(dataset)):
        assert dataset.captions[row] == (f"first {number}" if number < 6 else f"text {number}")
        assert dataset.all_captions.get(row) == (several[number] if number < 6 else None)
    assert "captions from .txt files and metadata.jsonl (20)" in capsys.readouterr().err


def test_one_line_says_what_was_found_and_what_was_left_out(tmp_path, capsys):
    """What systems and tools leave beside pictures is left out."""
    folder = tmp_path / "in"
    paint(folder, "{1}/{0}.png", range(20), (50, 20))
    for name in (".ipynb_checkpoints/a.png", "cats/@eaDir/a.png", "__MACOSX/cats/a.png", "dogs/._1.png"):
        paint(folder, name, [21])
    for name in ("a.heic", "b.heic", "c.zip", "Notes.TXT", ".DS_Store", "bare"):
        (folder / name).write_text("no picture")
    rows = [{"file_name": f"cats/{number}.png", "text": "a"} for number in range(19, 30)]
    write_metadata(folder, rows)
    write_metadata(folder / ".ipynb_checkpoints", rows)  # an old copy
    assert sorted(numbers_of(load(tmp_path))) == list(range(20))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{folder}: 20 pictures; captions from metadata.jsonl (1); ")
    for words in ("crop cuts 60% of", "left out 2 .heic, 1 .txt, 1 .zip, 6 hidden, 1 without a suffix",
                  "10 rows of metadata name no picture that is there: cats/20.png, cats/21.png, "):
        assert words in said, words


def test_copies_across_splits_and_rare_classes_are_counted(tmp_path, capsys):
    paint(tmp_path / "in", "train/{0}/a.png", range(20))
    paint(tmp_path / "in", "test/{0}/b.png", [0, 1, 2, *range(23, 40)])
    load(tmp_path)
    said = capsys.readouterr().err
    assert "3 of 20 in test are copies of training ones" in said and "in val" not in said
    assert "of class have under 3 training pictures" in said


@pytest.mark.parametrize("name, train, second, third, expected", [
    ("{2}/{1}/{0}.png", "Train", "val", "TEST", {"train": 20, "val": 4, "test": 5}),
    ("images/{2}/{1}/{0}.png", "train", "Validation", "extra", {"train": 18, "val": 2, "test": 4}),
    ("{1}/{0}.png", "Train", "VAL", "test", {"train": 20, "val": 4, "test": 5})])
def test_splits_are_folders_in_any_case_at_any_depth_or_a_column(tmp_path, capsys, name, train, second, third,
                                                                 expected):
    """Where there is one beside train, it is for reporting, and a slice of train for choosing. Pictures in no
    split are left out and counted."""
    rows = []
    for split, numbers in ((train, range(20)), (second, range(20, 24)), (third, range(24, 29))):
        names = paint(tmp_path / "in", name.replace("{2}", split), numbers)
        rows += [{"file_name": name, "split": split} for name in names]
    if not name.count("{2}"):
        write_metadata(tmp_path / "in", rows)
    dataset = load(tmp_path)
    assert sizes(dataset) == expected and dataset.factors == {"class": ["cats", "dogs"]}
    test = range(20, 24) if third == "extra" else range(24, 29)
    assert sorted(numbers_of(dataset, "test")) == list(test)
    assert set(numbers_of(dataset, "train")) <= set(range(20))
    said = capsys.readouterr().err
    assert ("left out 5 pictures in none of its splits" in said) == (third == "extra")


@pytest.mark.parametrize("as_folder", [True, False])
def test_columns_of_metadata_are_factors_and_unseen_combinations_are_a_split(tmp_path, capsys, as_folder):
    """A column of one value or of very many is none; where there are no captions, factors make them."""
    rows = []
    for number in range(24):
        tone = number % 3
        weight = number % 2
        split = "Unseen" if tone == weight == 1 else "seen"
        names = paint(tmp_path / "in", f"{split}/{{}}.png" if as_folder else "{}.png", [number])
        rows.append({"file_name": names[0], "artist": "me", "number": number, "tone": tone,
                     "weight": "heavy" if weight else "light"} | ({} if as_folder else {"split": split}))
    write_metadata(tmp_path / "in", rows, "metadata.csv")
    dataset = load(tmp_path)
    assert dataset.factors == {"tone": ["0", "1", "2"], "weight": ["heavy", "light"]}
    assert sizes(dataset) == {"train": 16, "val": 2, "test": 2, "unseen": 4}
    assert sorted(numbers_of(dataset, "unseen")) == [1, 7, 13, 19]
    for labels, number, caption in zip(dataset.labels.tolist(), numbers_of(dataset), dataset.captions):
        assert labels == [number % 3, (number + 1) % 2]
        assert caption == f"tone {number % 3}, weight {'heavy' if number % 2 else 'light'}"
    said = capsys.readouterr().err
    assert "columns that are no factors: artist (1 values), number (24 values)" in said
    assert "captions from columns of metadata (24)" in said


def test_the_identity_of_a_folder_follows_its_names_and_sizes_not_the_results_inside(tmp_path):
    """Nor is a folder of train/ alone a single class; without captions they are made of the class."""
    paint(tmp_path, "train/{1}/{0}.png", range(24))
    picture = tmp_path / "train" / "cats" / "1.png"
    args = arguments(data_dir=str(tmp_path), out=str(tmp_path / "out"))
    (tmp_path / "train" / "cats" / "all").symlink_to(tmp_path)  # a link to what holds it is not followed
    first = data.load_dataset(args)
    assert len(first) == 24 and set(first.captions) == {"a photo of a cats", "a photo of a dogs"}
    paint(data.run_folder(args), "samples/data.png", [1])
    picture.touch()
    assert data.load_dataset(args).id == first.id
    picture.write_bytes(picture.read_bytes() + b"more")
    larger = data.load_dataset(args)
    picture.rename(picture.with_name("1 .png"))  # which keeps its place in the order
    assert len({first.id, larger.id, data.load_dataset(args).id}) == 3


@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_images_are_named_and_skipped_in_every_run(tmp_path, monkeypatch, capsys, in_memory):
    """What is left is the same in memory and read on demand, where the first run alone decodes all files.
    None is opened as anything but a picture, nor one of 200 megapixels."""
    folder = tmp_path / "in"
    paint(folder, "{1}/{0}.png", range(40))
    whole = load(tmp_path)
    capsys.readouterr()
    picture = (folder / "cats" / "1.png").read_bytes()
    for name, content in (("text.png", b"hello"), ("cut.png", picture[:len(picture) // 2])):
        (folder / name).write_bytes(content)
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")
    Image.new("RGB", (9, 9)).save(folder / "program.png", "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: Image.new("RGB", (9, 9)).im)  # would run it
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 2 ** 30 if in_memory else 0)
    for _ in range(2):
        dataset = load(tmp_path)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "4 of 44" in said
        assert "cut.png, huge.png, program.png, text.png" in said
        assert torch.is_tensor(dataset.images) == in_memory and dataset.id == whole.id
        assert torch.equal(dataset.pixels(range(40)), whole.images)
        assert torch.equal(dataset.labels, whole.labels)
        if not in_memory:
            monkeypatch.setattr(data, "decode", None)  # a call would raise


def test_folders_and_metadata_that_cannot_be_used_are_refused(tmp_path):
    def refused(words, **change):
        with pytest.raises(SystemExit, match=words):
            load(tmp_path, **change)

    folder = tmp_path / "in"
    refused("no folder .*in: ")
    folder.mkdir()
    refused("no images found")
    (folder / "a.png").write_text("no picture")
    refused("none of its files opens")
    paint(folder, "{1}/{0}.png", range(10))
    refused("10 images.* too few")
    refused("expected train/ and val/.*found a.png, cats, dogs", dataset="imagenet")
    write_metadata(folder, [{"file_name": "../elsewhere.png", "text": "a"}])
    refused("no row of its metadata.*elsewhere.png.*like a.png")
    for line, words in (("{broken", "metadata.jsonl row 2"), ('{"text": "a"}', "row 2.*file_name"),
                        ('{"file_name": "cats/3.png", "text": 5}', "row 2.*text"),
                        ('{"file_name": "./cats/1.png", "text": "again"}', "row 2.*already")):
        (folder / "metadata.jsonl").write_text('{"file_name": "cats/1.png", "text": "one"}\n' + line)
        refused(words)
    for path in folder.rglob("*.png"):
        path.rename(path.with_suffix(".zip"))
    refused("no images found.*1 .jsonl, 11 .zip; .*unpack")


def test_results_of_another_folder_of_the_same_name_are_refused(tmp_path):
    """A folder that was moved keeps its results."""
    def run_folder(folder):
        return data.run_folder(arguments(data_dir=str(folder), out=str(tmp_path / "out")))

    for folder in ("a/pictures", "b/pictures"):
        (tmp_path / folder).mkdir(parents=True)
    assert run_folder(tmp_path / "a/../a/pictures/") == tmp_path / "out" / "folder" / "pictures"
    with pytest.raises(SystemExit, match="out/folder/pictures: holds the results of .*a/pictures.*--out"):
        run_folder(tmp_path / "b/pictures")
    (tmp_path / "a/pictures").rename(tmp_path / "moved")
    assert run_folder(tmp_path / "b/pictures") == tmp_path / "out" / "folder" / "pictures"


def test_cifar_is_read_from_its_files_and_from_the_right_archive(places, tmp_path, monkeypatch):
    files = Path(places["cifar10"][1])
    args = arguments(dataset="cifar10", data_dir=str(files), image_size=32)
    dataset = data.load_dataset(args)
    record = np.fromfile(files / "test_batch.bin", dtype=np.uint8)[3073:2 * 3073]
    row = dataset.splits["test"][1]
    assert torch.equal(dataset.images[row].flatten(), torch.from_numpy(record[1:]))
    assert dataset.labels[row, 0] == record[0] and sizes(dataset) == {"train": 270, "val": 30, "test": 60}
    assert dataset.captions[row].endswith(f" {data.CIFAR_CLASSES[record[0]]}")

    args.data_dir = str(tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with pytest.raises(SystemExit, match=f"{archive.name}.*--download"):
        data.load_dataset(args)
    monkeypatch.setattr(data, "CIFAR_URL", "http://127.0.0.1:9/nobody-answers")
    with pytest.raises(SystemExit, match=f"cannot download .*{archive}"):
        data.main(["--dataset", "cifar10", "--download", "--data-dir", str(tmp_path)])
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name in data.CIFAR_FILES:
            tar.add(files / name, f"cifar-10-batches-bin/{name}")
    with pytest.raises(SystemExit, match="md5"):
        data.load_dataset(args)
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert torch.equal(data.load_dataset(args).images, dataset.images)


# --- files ------------------------------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "x.json"
    data.write_json(path, "old")

    def half(file):
        file.write(b"ha")
        raise OSError("disk full")

    with pytest.raises(SystemExit, match="x.json.*disk full"):
        data.write_atomic(path, half)
    assert json.loads(path.read_text()) == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("values, dtype", [(256, torch.uint8), (257, torch.uint16)])
def test_codes_come_back_in_few_bytes(tmp_path, values, dtype):
    dataset = types.SimpleNamespace(splits={"train": range(0, 15), "test": range(15, 20)}, id="these")
    codes = torch.randint(0, values, (20, 2, 5))
    data.save_codes(tmp_path / "codes.pt", codes, values, 2, dataset, {}, {"images": "these"})
    stored = data.load_codes(tmp_path / "codes.pt", "make it", "these")
    assert torch.equal(stored["codes"].long(), codes) and stored["codes"].dtype == dtype
    assert (stored["L"], stored["V"], stored["splits"]) == (5, values, dataset.splits)


def test_rows_are_filled_in_by_any_number_of_processes_that_may_stop(tmp_path):
    """What is finished is not done again."""
    numbers = torch.arange(23)
    whole = {"halves": (numbers / 8).half(), "pairs": torch.stack([numbers, -numbers], 1)}
    shapes = {"halves": ((), torch.float16), "pairs": ((2,), torch.int64)}
    done = []

    def work(rows):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(rows.start)
        return {name: values[list(rows)] for name, values in whole.items()}

    for run, stop in ((FakeRun(), 2), (FakeRun(1, 2), 3)):  # the second of two takes every other chunk
        with pytest.raises(KeyboardInterrupt):
            data.fill_rows(tmp_path / ".rows", 23, run, work, shapes, chunk=4)
    assert done == [0, 4, 12]
    stop = None
    filled = data.fill_rows(tmp_path / ".rows", 23, FakeRun(), work, shapes, chunk=4)
    assert done == [0, 4, 12, 8, 16, 20]
    assert all(torch.equal(filled[name], values) for name, values in whole.items())


# --- optimiser, averages and log --------------------------------------------------------------------------

class Toy(torch.nn.Module):
    """A model with a matrix in its blocks, one outside, and a bias."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Parameter(torch.randn(5, 4))
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    def backward(self):
        self.blocks[0](torch.randn(3, 5) @ self.embed).square().mean().backward()


@pytest.mark.parametrize("lr_matrix", [0.0, 0.3])
def test_learning_rates_follow_warm_up_and_cosine_times_their_peak(lr_matrix):
    args = arguments(steps=10, lr=0.2, lr_matrix=lr_matrix, lr_final=0.1, warmup=3, weight_decay=0.1)
    model = Toy()
    optimizers = data.Optimizers(model, args, lambda name: 0.5 if "embed" in name else 1.0)
    peaks = {"embed": 0.1, "blocks.0.weight": lr_matrix or 0.2, "blocks.0.bias": 0.2}
    muon = [group["params"] for optimizer in optimizers.optimizers[1:] for group in optimizer.param_groups]
    assert muon == ([[model.blocks[0].weight]] if lr_matrix else [])
    for step in range(10):
        rate = min(1, (step + 1) / 4) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2)
        model.backward()
        optimizers.step(step, 1.0, weight_decay=0.1 + step)
        groups = [group for optimizer in optimizers.optimizers for group in optimizer.param_groups]
        for name, p in model.named_parameters():
            group, = (group for group in groups if any(p is member for member in group["params"]))
            assert group["lr"] == pytest.approx(peaks[name] * rate), name
            assert group["weight_decay"] == (0 if name.endswith("bias") else 0.1 + step), name


def test_gradients_are_clipped_and_one_that_is_not_finite_is_named(monkeypatch):
    model = Toy()
    optimizers = data.Optimizers(model, arguments(clip=0.01))
    monkeypatch.setattr(optimizers.optimizers[0], "zero_grad", lambda: None)
    model.backward()
    assert optimizers.step(0, 1.0) > 0.02
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) < 0.0101
    model.blocks[0].bias.grad[2] = torch.nan
    with pytest.raises(SystemExit, match="step 7: the gradient of blocks.0.bias is not finite"):
        optimizers.step(7, 1.0)


@pytest.mark.parametrize("decay", [0.6, lambda n: 0.5 + 0.005 * n], ids=["constant", "of the update"])
def test_averages_follow_their_recursion(decay):
    """average ← d · average + (1 − d) · weights from the model as it starts, d = min(decay, n / (9 + n)) or,
    given as a function, what it says."""
    model = torch.nn.Linear(3, 2).double()
    average = data.averaged(model, decay)
    expected = model.weight.detach().clone()
    assert torch.equal(average.module.weight, expected) and not average.module.training
    for n in range(1, 40):
        with torch.no_grad():
            model.weight += torch.randn(2, 3)
        average.update_parameters(model)
        d = decay(n) if callable(decay) else min(decay, n / (9 + n))
        expected = d * expected + (1 - d) * model.weight.detach()
        assert torch.allclose(average.module.weight, expected, rtol=1e-12, atol=1e-12), n


def steps_of(run, folder, steps):
    """data.Steps of a run in a folder."""
    run.folder = folder
    checkpoint = types.SimpleNamespace(run=run, args=arguments(steps=steps), stage="stage", save=print)
    return data.Steps(checkpoint, 0, range(100), 16)


def test_every_fifty_steps_are_logged_and_a_killed_run_drops_what_comes_again(run, tmp_path):
    def logged():
        return [json.loads(line) for line in (tmp_path / "stage.jsonl").read_text().splitlines()]

    steps = steps_of(run, tmp_path, 120)
    for step in steps:
        steps.show(loss=torch.tensor(float(step)), norm=1.0)
    steps.log.write(120, bits=3.0)
    assert [record["step"] for record in logged()] == [50, 100, 120, 120] and logged()[1]["loss"] == 99
    with open(tmp_path / "stage.jsonl", "a") as file:
        file.write('{"step": 1')  # cut by the kill
    for start, kept in ((120, [50, 100, 120]), (60, [50])):  # what is measured at the end comes again, too
        data.Log(run, "stage", start)
        assert [record["step"] for record in logged()] == kept


def test_a_run_without_a_terminal_speaks_and_its_first_step_is_counted_in_flops(run, tmp_path, monkeypatch,
                                                                                capsys):
    """Forward, and backward to weight and input: three products of 2 m n k. (Elsewhere on CUDA alone.)"""
    monkeypatch.setattr(data, "SILENCE", -1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", int)
    steps = steps_of(run, tmp_path, 4)
    steps.counts_flops = True
    steps.peak = 1e12
    m, n, k = 6, 7, 50
    model = torch.nn.Linear(k, n)
    for _ in steps:
        model(torch.randn(m, k, requires_grad=True)).sum().backward()
        steps.show(loss=torch.tensor(0.25))
    said = capsys.readouterr().out
    assert steps.flops == 3 * 2 * m * n * k and "MFU 0.00 of 1 TFLOP/s" in said
    assert said.count("of 4, loss 0.2500, ") == said.count("left") == 4


def test_labels_are_written_in_the_letters_of_their_language_or_printed(tmp_path, capsys, monkeypatch):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    labels = ("a ring", "une tête, ein Fuß, κύκλος, круг")
    data.save_grid(tmp_path / "a.png", images, 1, lines=labels)
    monkeypatch.setattr(data, "FONTS", ["none.ttf"])
    capsys.readouterr()
    data.save_grid(tmp_path / "b.png", images, 1, lines=labels)
    said = capsys.readouterr().err
    assert f"label (2), of which no font here has all characters: {labels[1]}" in said
    assert labels[0] not in said
