"""Datasets, batches, augmentation, files: data.py."""
import argparse
import json
import pickle
import shutil
import tarfile
import types

import conftest
import data
import numpy as np
import pytest
import torch
from PIL import Image


def folder_args(path, out, size=16):
    return types.SimpleNamespace(dataset="folder", data_dir=str(path), out=str(out), image_size=size, workers=0)


# --- shapes ---------------------------------------------------------------------------------------------------------

def test_shapes_keep_unseen_pairs_out_of_every_other_split():
    for split in conftest.SMALL:
        labels, *_ = data.shapes_labels(split, 500)
        for kind, pair in data.UNSEEN_PAIRS.items():
            share = data.is_unseen(labels, pair).float().mean()
            assert share == (1 if split == kind else 0), (split, kind)


def test_shapes_values_are_balanced_and_a_function_of_the_index():
    labels, nuisance, _ = data.shapes_labels("train", 8000)
    for k, values in enumerate(data.SHAPES.values()):
        counts = torch.bincount(labels[:, k], minlength=len(values)) / 8000
        assert (counts * len(values) - 1).abs().max() < 0.25
    again, same, _ = data.shapes_labels("train", 100)
    assert torch.equal(again, labels[:100]) and torch.equal(same, nuisance[:100])
    assert not torch.equal(data.shapes_labels("test", 100)[0], again)


def test_every_factor_changes_the_picture_where_it_should():
    labels, nuisance = torch.zeros(1, 5).long(), torch.full((1, 8), 0.5)
    base = data.draw_shapes(labels, nuisance).int()
    for k, name in enumerate(data.SHAPES):
        changed = labels.clone()
        changed[0, k] = 1
        where = (data.draw_shapes(changed, nuisance).int() - base).abs().sum(1)[0] > 0
        assert where.any()
        border = torch.ones(32, 32).bool()
        border[3:-3, 3:-3] = False
        assert where[border].any() == (name == "frame") and (name == "frame") == bool(where[border].all())


@pytest.mark.parametrize("shape", data.SHAPES["shape"])
def test_signed_distance_has_the_right_sign_and_slope(shape):
    grid = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    d = data.signed_distance(shape, x, y)
    assert d.min() < -0.1 and d[0].min() > 0 and d[:, 0].min() > 0
    slope = torch.stack(torch.gradient(d, spacing=0.01)).norm(dim=0)
    assert slope[d.abs() < 0.05].median().sub(1).abs() < 0.05  # a pixel of ink is a pixel of distance


def test_a_flipped_drawing_is_a_drawing_with_mirrored_nuisance():
    """So that the codes of flipped images, which the priors also learn, stand for pictures like any other."""
    rng = torch.Generator().manual_seed(0)
    labels = (torch.rand(100, 5, generator=rng) * torch.tensor([len(v) for v in data.SHAPES.values()])).long()
    nuisance = torch.rand(100, 8, generator=rng)
    mirrored = nuisance.clone()
    mirrored[:, [0, 2, 3]] = 1 - nuisance[:, [0, 2, 3]]  # shift in x, tilt, phase in u
    difference = data.draw_shapes(labels, nuisance).flip(3).int() - data.draw_shapes(labels, mirrored).int()
    assert difference.abs().max() <= 1


def test_larger_shapes_are_the_same_picture():
    labels, nuisance, _ = data.shapes_labels("train", 8)
    small, large = data.draw_shapes(labels, nuisance).float(), data.draw_shapes(labels, nuisance, 64).float()
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 3


# --- batches --------------------------------------------------------------------------------------------------------

def test_batches_walk_through_every_row_once_an_epoch():
    rows = range(10, 45)
    seen = torch.cat([data.batch_rows(rows, 5, 0, step) for step in range(14)])
    assert sorted(seen[:35].tolist()) == list(rows) and sorted(seen[35:].tolist()) == list(rows)
    assert not torch.equal(seen[:35], seen[35:])
    assert torch.equal(data.batch_rows(rows, 5, 0, 3), seen[15:20])  # a function of (seed, step), in any order of calls
    crossing = data.batch_rows(range(7), 5, 0, 1)
    assert len(crossing) == 5
    assert not torch.equal(data.batch_rows(rows, 35, 1, 0), data.batch_rows(rows, 35, 0, 0))


def test_draws_do_not_depend_on_how_the_batch_is_shared(run):
    whole = data.Draws(3, 7, run, 8)
    first, second = whole.uniform(4), whole.normal(2)
    for world, parts in ((2, 1), (1, 4), (2, 2)):
        pieces = []
        for rank in range(world):
            share = types.SimpleNamespace(device=run.device, world=world, rank=rank)
            share.share = lambda size, r=share: data.Run.share(r, size)
            for part in range(parts):
                draws = data.Draws(3, 7, share, 8, part, parts)
                pieces.append((draws.uniform(4), draws.normal(2)))
        assert torch.equal(torch.cat([a for a, _ in pieces]), first) and torch.equal(torch.cat([b for _, b in pieces]), second)


# --- augmentation ---------------------------------------------------------------------------------------------------

def test_whole_crops_are_the_image_or_its_mirror_image(run):
    images = torch.rand(16, 3, 12, 12) * 2 - 1
    crops = data.random_crops(images, 12, (1.0, 1.0), 1.0, data.Draws(0, 0, run, 16))
    same = (crops - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (crops - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all() and same.any() and mirrored.any()


def test_colour_augmentation_does_what_its_probabilities_say(run):
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    none = data.colour_augment(images, [0.4] * 4, 0.0, 0.0, 0.0, 0.0, data.Draws(0, 0, run, 8))
    assert torch.allclose(none, images, atol=1e-6)
    grey = data.colour_augment(images, [0.0] * 4, 0.0, 1.0, 0.0, 0.0, data.Draws(0, 0, run, 8))
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6)
    solar = data.colour_augment(images, [0.0] * 4, 0.0, 0.0, 0.0, 1.0, data.Draws(0, 0, run, 8))
    assert solar.max() < 1e-6 and torch.allclose(solar.abs(), images.abs(), atol=1e-5)
    flat = torch.full((8, 3, 16, 16), 0.2)
    assert torch.allclose(data.colour_augment(flat, [0.0] * 4, 0.0, 0.0, 1.0, 0.0, data.Draws(0, 0, run, 8)), flat, atol=1e-5)
    blurred = data.colour_augment(images.repeat(1, 1, 8, 8), [0.0] * 4, 0.0, 0.0, 1.0, 0.0, data.Draws(0, 0, run, 8))
    assert blurred.std() < images.std()
    hue = data.colour_augment(images * 0.3, [0.0, 0.0, 0.0, 0.3], 1.0, 0.0, 0.0, 0.0, data.Draws(0, 0, run, 8))
    luma = torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]
    assert (hue - images * 0.3).abs().max() > 0.05 and ((hue - images * 0.3) * luma).sum(1).abs().max() < 0.02  # brightness stays


# --- images of any kind ----------------------------------------------------------------------------------------------

def test_images_of_every_mode_are_read_right(tmp_path):
    red = Image.new("RGB", (50, 40), (200, 30, 40))
    cases = {"a.png": red, "b.jpg": red, "c.png": red.convert("P"), "d.tif": red.convert("CMYK"), "e.png": red.convert("RGBA")}
    for name, image in cases.items():
        image.save(tmp_path / name)
        pixel = data.read_image(tmp_path / name, 16)[:, 8, 8].float()
        assert (pixel - torch.tensor([200.0, 30.0, 40.0])).abs().max() < 12, name
    Image.fromarray(np.full((40, 50), 40_000, dtype=np.uint16)).save(tmp_path / "f.png")
    assert (data.read_image(tmp_path / "f.png", 16).float() - 40_000 / 257).abs().max() < 2
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "g.png")
    assert data.read_image(tmp_path / "g.png", 16).min() == 255  # transparent is white
    Image.new("L", (20, 20), 77).save(tmp_path / "h.png")
    assert (data.read_image(tmp_path / "h.png", 16) == 77).all()


def test_deep_and_float_pictures_keep_their_tones(tmp_path):
    """16 bits are a share of 65,535 however dark the picture; floats lie from 0 to 1, 255 or 65,535; what is below 0 is black, NaN is no picture."""
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    cases = {"a.png": ((ramp * 200).astype(np.uint16), ramp * 200 / 257), "b.png": ((ramp * 60_000).astype(np.uint16), ramp * 60_000 / 257), "c.tif": (ramp, ramp * 255),
             "d.tif": (ramp * 255, ramp * 255), "e.tif": (ramp - 3, ramp * 0), "f.tif": ((ramp * 1000).astype(np.int32), ramp * 1000 / 257)}
    for name, (values, expected) in cases.items():
        Image.fromarray(values).save(tmp_path / name)
        assert np.abs(data.read_image(tmp_path / name, 8)[0].numpy() - expected).max() <= 1, name
    Image.fromarray(np.where(ramp > 0.5, np.nan, ramp)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="not finite"):
        data.read_image(tmp_path / "nan.tif", 8)


def test_results_inside_the_folder_of_pictures_are_not_pictures_of_it(tmp_path):
    """Nor is a folder of train/ alone a single class."""
    folder = conftest.make_folder(tmp_path / "train", 24)
    (folder / "metadata.jsonl").unlink()
    args = folder_args(tmp_path, tmp_path / "out")
    first = data.load_folder(args)
    Image.new("RGB", (20, 20)).save(data.run_folder(args) / "samples" / "data.png")
    assert data.load_folder(args).checksum == first.checksum and len(first) == 24
    assert first.factors == {"class": ["big dögs", "cats"]} and len(first.splits["val"]) == len(first.splits["test"]) == 2


def test_centre_crop_keeps_the_middle(tmp_path):
    wide = np.zeros((30, 90, 3), dtype=np.uint8)
    wide[:, 30:60] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert data.read_image(tmp_path / "wide.png", 10).float().mean() > 250


def test_folder_reads_classes_captions_and_splits(tmp_path):
    conftest.make_folder(tmp_path / "in", 40)
    dataset = data.load_folder(folder_args(tmp_path / "in", tmp_path / "out"))
    assert len(dataset) == 40 and dataset.factors == {"class": ["big dögs", "cats"]} and [len(r) for r in dataset.splits.values()] == [36, 2, 2]
    for row in range(40):  # picture k is of class k mod 2: labels, captions and pixels stay together
        number = int(dataset.captions[row].split()[1])
        assert dataset.labels[row, 0] == number % 2
        name = f"{'cats' if number % 2 else 'big dögs'}/{number}.png"
        assert torch.equal(dataset.pixels([row])[0], data.read_image(tmp_path / "in" / name, 16))


def test_ready_made_splits_are_kept(tmp_path):
    for split, count in (("train", 24), ("val", 4), ("test", 6)):
        conftest.make_folder(tmp_path / "in" / split, count)
        (tmp_path / "in" / split / "metadata.jsonl").unlink()
    sizes = lambda: {k: len(v) for k, v in data.load_folder(folder_args(tmp_path / "in", tmp_path / "out")).splits.items()}
    assert sizes() == {"train": 24, "val": 4, "test": 6}
    shutil.rmtree(tmp_path / "in" / "test")  # then val/ is for reporting, and a slice of train/ for choosing
    assert sizes() == {"train": 22, "val": 2, "test": 4}


def test_a_tree_too_large_for_memory_is_read_on_demand_and_is_the_same(tmp_path, monkeypatch):
    conftest.make_folder(tmp_path / "in", 40)
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    at_once = data.load_folder(folder_args(tmp_path / "in", tmp_path / "out"))
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    later = data.load_folder(folder_args(tmp_path / "in", tmp_path / "out"))
    assert not torch.is_tensor(later.images) and len(later) == len(at_once) == 40
    assert torch.equal(later.pixels(range(40)), at_once.images) and torch.equal(later.labels, at_once.labels)
    sums = [at_once.checksum, later.checksum]
    for change in (lambda path: path.touch(), lambda path: (tmp_path / "out" / "folder" / "files.json").unlink(),  # the same pictures
                   lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x81")):  # another byte, after the end of the picture
        change(tmp_path / "in" / "cats" / "1.png")
        sums.append(data.load_folder(folder_args(tmp_path / "in", tmp_path / "out")).checksum)
    assert len(set(sums[:4])) == 1 and sums[4] != sums[0]


def test_broken_images_are_named_once_and_skipped_every_time(tmp_path, capsys):
    folder = conftest.make_folder(tmp_path / "in", 40)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    whole = (folder / "cats" / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    first = data.load_folder(folder_args(folder, tmp_path / "out"))
    said = capsys.readouterr().err
    assert len(first) == 40 and said.count("\n") == 1 and all(name in said for name in ("3 of 43", "empty.png", "text.png", "cut.png"))
    again = data.load_folder(folder_args(folder, tmp_path / "out"))
    assert capsys.readouterr().err == "" and torch.equal(first.images, again.images)


@pytest.mark.parametrize("line, words", [
    ("{broken", ["metadata.jsonl line 2"]), ('{"file_name": "x.png"}', ["line 2", "text"]),
    ('{"file_name": "../x.png", "text": "a"}', ["line 2", "leaves the folder"]), ('{"file_name": "no.png", "text": "a"}', ["line 2", "no.png"]),
    ('{"file_name": "cats/1.png", "text": "again"}', ["line 2", "already"])])
def test_broken_metadata_is_refused_with_its_line(tmp_path, line, words):
    folder = conftest.make_folder(tmp_path / "in", 4)
    (folder / "metadata.jsonl").write_text('{"file_name": "cats/1.png", "text": "one"}\n' + line)
    with pytest.raises(SystemExit) as problem:
        data.read_captions(folder, data.list_files(folder))
    assert all(word in str(problem.value) for word in words)


def test_missing_or_empty_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, word in ((tmp_path / "none", "no folder"), (tmp_path / "empty", "no images found")):
        with pytest.raises(SystemExit, match=word):
            data.load_folder(folder_args(path, tmp_path / "out"))


# --- cifar ----------------------------------------------------------------------------------------------------------

def test_cifar_planes_labels_and_splits(places):
    folder = places["cifar10"][1]
    dataset = data.load_cifar10(types.SimpleNamespace(dataset="cifar10", data_dir=folder, image_size=32))
    record = np.fromfile(f"{folder}/test_batch.bin", dtype=np.uint8)[3073:2 * 3073]
    row = dataset.splits["test"][1]
    assert dataset.labels[row, 0] == record[0] and torch.equal(dataset.images[row].flatten(), torch.from_numpy(record[1:]))
    assert [len(r) for r in dataset.splits.values()] == [270, 30, 60]
    assert dataset.captions[row] == f"a photo of a {data.CIFAR_CLASSES[record[0]]}"


def test_cifar_archive_is_read_when_its_checksum_is_right_and_refused_otherwise(places, tmp_path, monkeypatch):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name in data.CIFAR_FILES:
            tar.add(f"{places['cifar10'][1]}/{name}", f"cifar-10-batches-bin/{name}")
    args = types.SimpleNamespace(dataset="cifar10", data_dir=str(tmp_path), image_size=32)
    with pytest.raises(SystemExit, match="md5"):
        data.load_cifar10(args)
    monkeypatch.setattr(data, "CIFAR_MD5", data.hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(data.load_cifar10(args)) == 360
    with pytest.raises(SystemExit, match="no CIFAR-10"):
        data.load_cifar10(types.SimpleNamespace(dataset="cifar10", data_dir=str(tmp_path / "none"), image_size=32))


# --- files ----------------------------------------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "x.json"
    data.write_atomic(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ha")
        raise OSError("disk full")

    with pytest.raises(SystemExit, match="x.json.*disk full"):
        data.write_atomic(path, half)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    args, path = types.SimpleNamespace(dataset="shapes", out=str(tmp_path), data_dir="data/shapes"), tmp_path / "generator.pt"
    with pytest.raises(SystemExit, match="train it with python generator.py"):
        data.load_checkpoint(path, "generator", args)
    with pytest.raises(SystemExit, match="lacks trained_on.*another version"):
        data.save_checkpoint(path, stage="generator", config={"dataset": "shapes"}, step=1)
        data.load_checkpoint(path, "generator", args)
    data.save_checkpoint(path, stage="generator", config={"dataset": "shapes"}, step=1, trained_on={}, weights=torch.arange(1000))
    assert data.load_checkpoint(path, "generator", args)["weights"][999] == 999
    with pytest.raises(SystemExit, match="expected a checkpoint of tokenizer, found generator"):
        data.load_checkpoint(path, "tokenizer", args)
    with pytest.raises(SystemExit, match="trained on shapes, expected cifar10"):
        data.load_checkpoint(path, "generator", types.SimpleNamespace(dataset="cifar10", out="o", data_dir="d"))
    whole = path.read_bytes()
    at = whole.index(torch.arange(1000).numpy().tobytes()) + 800
    for broken in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], whole[:1000], b"", bytes(5000)):
        path.write_bytes(broken)
        with pytest.raises(SystemExit, match="generator.pt"):
            data.load_checkpoint(path, "generator", args)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"stage": "generator", "bomb": Bomb()}, tmp_path / "generator.pt")
    with pytest.raises(SystemExit):
        data.load_checkpoint(tmp_path / "generator.pt", "generator", types.SimpleNamespace(dataset="shapes", out="o", data_dir="d"))
    assert not (tmp_path / "executed").exists()


def test_code_files_are_checked_when_opened(tmp_path):
    args, folder = types.SimpleNamespace(dataset="shapes", out=str(tmp_path), data_dir="d"), tmp_path / "shapes"
    folder.mkdir()
    (folder / "tokenizer.pt").write_bytes(b"weights")
    codes = np.random.default_rng(0).integers(0, 7, (20, 2, 5))
    dataset = types.SimpleNamespace(splits={"train": range(0, 15), "test": range(15, 20)}, checksum="those")
    data.write_codes(folder, codes, 7, dataset, {})
    stored, about = data.open_codes(args)
    assert np.array_equal(stored, codes) and about["splits"]["test"] == range(15, 20) and stored.dtype == np.uint8
    good, good_about = (folder / "codes.npy").read_bytes(), (folder / "codes.json").read_text()

    def refuse(word):
        with pytest.raises(SystemExit, match=word):
            data.open_codes(args)
        (folder / "codes.npy").write_bytes(good), (folder / "codes.json").write_text(good_about)

    np.save(folder / "codes.npy", codes[:-1].astype(np.uint8)), refuse("holds")
    (folder / "codes.npy").write_bytes(good[:-3]), refuse("not a readable")
    (folder / "codes.npy").write_bytes(b""), refuse("not a readable")
    np.save(folder / "codes.npy", np.full_like(codes, 9).astype(np.uint8)), refuse("less than V = 7")
    np.save(folder / "codes.npy", codes[::-1].astype(np.uint8)), refuse("checksum")
    for key, value in (("L", 6), ("V", 8), ("images", "others"), ("tokenizer", "x")):
        (folder / "codes.json").write_text(json.dumps({**json.loads(good_about), key: value})), refuse("codes.json: changed")
    (folder / "codes.json").write_text("[]"), refuse("not a readable")
    (folder / "codes.json").write_text(good_about[:-9]), refuse("codes.json: not readable as JSON")
    (folder / "tokenizer.pt").write_bytes(b"other weights")
    refuse("another tokenizer")


def test_width_of_stored_codes_follows_the_values():
    assert data.code_type(16) == np.uint8 and data.code_type(256) == np.uint16  # 256 values and "no value" do not fit a byte


# --- schedule, EMA, grids ---------------------------------------------------------------------------------------------

def test_schedule_warms_up_and_falls():
    args = types.SimpleNamespace(steps=100, warmup=10, lr_final=0.1)
    rates = [data.warmup_cosine(step, args) for step in range(101)]
    assert rates[0] < rates[5] < rates[10] and abs(rates[100] - 0.1) < 1e-6 and all(a >= b for a, b in zip(rates[11:], rates[12:]))


def test_ema_averages_and_gives_the_weights_back():
    model = torch.nn.Linear(2, 2)
    ema, own = data.EMA(model, 0.5), model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(10 ** 6)
    with ema.applied():
        assert torch.allclose(model.weight, own + 0.5)
    assert torch.allclose(model.weight, own + 1)


def test_grid_stores_its_settings(tmp_path):
    data.save_grid(tmp_path / "g.png", torch.zeros(5, 3, 32, 32, dtype=torch.uint8), 3, titles=["a", "b", "c"], settings={"guidance": 2.0})
    with Image.open(tmp_path / "g.png") as image:
        assert json.loads(image.text["settings"]) == {"guidance": 2.0} and image.width == 3 * 66 + 2


# --- ImageNet: a tree of JPEGs, decoded by workers --------------------------------------------------------------------

@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """A tree as ImageNet's: real JPEGs of several shapes in train/ and val/, a folder per class, and one that is cut short."""
    root, rng = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 8)):
        for k in range(count):
            size = [(96, 64), (64, 96), (200, 150), (70, 70)][k % 4]
            path = root / split / f"n0000000{k % 3}" / f"{split}_{k}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            small.resize(size, Image.Resampling.BICUBIC).convert("L" if k == 5 else "RGB").save(path, quality=95)
    whole = (root / "train" / "n00000000" / "train_0.JPEG").read_bytes()
    (root / "train" / "n00000001" / "broken.JPEG").write_bytes(whole[:len(whole) // 2])
    return root


def imagenet_args(root, out, **change):
    settings = dict(dataset="imagenet", data_dir=str(root), out=str(out), image_size=32, workers=0, seed=0, steps=8, batch_size=16, ratio=0.75)
    return argparse.Namespace(**settings | change)


def test_a_broken_jpeg_is_named_once_and_skipped_in_every_run(jpegs, tmp_path, capsys):
    for run_ in range(2):
        dataset = data.load_dataset(imagenet_args(jpegs, tmp_path))
        said = capsys.readouterr().err
        assert ("1 of 57 files do not open" in said and "broken.JPEG" in said) == (run_ == 0)
        assert len(dataset) == 56 and {k: len(v) for k, v in dataset.splits.items()} == {"train": 46, "val": 2, "test": 8}
    assert not torch.is_tensor(dataset.images) and dataset.factors["class"] == ["n00000000", "n00000001", "n00000002"]


def test_what_workers_are_given_can_be_sent_to_them(jpegs, tmp_path, run):
    """Where processes are started afresh (macOS, Python 3.14) it is pickled: a run with its lock could not be."""
    args = imagenet_args(jpegs, tmp_path)
    steps = data._StepImages(data.load_folder(args), run.share(args.batch_size), args, [(8, (0.5, 1.0))])
    again = pickle.loads(pickle.dumps(steps))
    assert all(torch.equal(a, b) for a, b in zip(steps[3][1], again[3][1])) and pickle.dumps(data.ignore_signals)


def test_crops_do_not_depend_on_the_number_of_workers_or_processes(jpegs, tmp_path, run):
    views, seen = [(24, (0.3, 1.0)), (24, (0.3, 1.0)), (8, (0.05, 0.3))], []
    for workers, start in ((0, 0), (1, 0), (2, 0), (2, 3)):
        args = imagenet_args(jpegs, tmp_path, workers=workers)
        batches = list(data.image_batches(data.load_dataset(args), run, args, start, views))
        assert [step for step, _, _ in batches] == list(range(start, 8))
        seen.append({step: (rows, crops) for step, rows, crops in batches})
    for other in seen[1:]:
        for step, (rows, crops) in other.items():
            assert torch.equal(rows, seen[0][step][0]) and all(torch.equal(a, b) for a, b in zip(crops, seen[0][step][1]))
    halves = []
    for rank in range(2):
        half = types.SimpleNamespace(device=run.device, world=2, rank=rank)
        half.share = lambda size, half=half: data.Run.share(half, size)
        args = imagenet_args(jpegs, tmp_path)
        halves.append([crops for _, _, crops in data.image_batches(data.load_dataset(args), half, args, 0, views)])
    for step, (a, b) in enumerate(zip(*halves)):
        assert all(torch.equal(torch.cat(pair), whole) for pair, whole in zip(zip(a, b), seen[0][step][1]))


def test_crops_of_a_file_are_what_their_boxes_say(tmp_path):
    """A picture whose colours are its coordinates: the corners of a crop are those of its box, also where a JPEG is decoded smaller."""
    w, h = 640, 480
    y, x = np.mgrid[:h, :w]
    Image.fromarray(np.stack([x * 255 / (w - 1), y * 255 / (h - 1), x * 0], -1).round().astype(np.uint8)).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    u = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    views = [(48, (0.1, 1.0))] * 40
    for row, crop in zip(u, data.read_crops(tmp_path / "a.jpg", views, 0.75, u)):
        cx, cy, width, height, mirror = data.crop_boxes(row, (0.1, 1.0), 0.75, w / h)
        assert 0.74 < width * w / (height * h) < 1.35 or 1 in (width, height)
        assert 0.099 <= width * height <= 1.001
        crop = crop.flip(2).float() if mirror else crop.float()
        assert abs(crop[0].mean() / 255 - (cx + 1) / 2) < 0.01 and abs(crop[1].mean() / 255 - (cy + 1) / 2) < 0.01
        assert abs((crop[0, :, -1] - crop[0, :, 0]).mean() / 255 - width * 47 / 48) < 0.02


def test_a_tree_without_val_and_too_few_images_are_named(jpegs, tmp_path):
    shutil.copytree(jpegs / "train", tmp_path / "only" / "train")
    with pytest.raises(SystemExit, match="expected train/ and val/.*found train"):
        data.load_dataset(imagenet_args(tmp_path / "only", tmp_path / "out"))
    with pytest.raises(SystemExit, match="--batch-size 64 is larger than the 46 training images"):
        data.load_dataset(imagenet_args(jpegs, tmp_path / "out", batch_size=64))


# --- chunks -----------------------------------------------------------------------------------------------------------

class ChunkRun(conftest.FakeRun):
    """A process that is asked to stop before its `stop`-th chunk."""

    def __init__(self, stop=10 ** 9, rank=0, world=1):
        self.left, self.rank, self.world = stop, rank, world

    def asked(self):
        self.left -= 1
        return self.left < 0

    def wait(self):
        pass


def test_chunks_go_on_where_they_stopped_on_any_number_of_processes(tmp_path):
    done = []

    def work(rows):
        done.append(rows)
        return {"squares": np.arange(rows.start, rows.stop) ** 2, "twice": np.stack([np.array(rows)] * 2, 1)}

    with pytest.raises(SystemExit) as stopped:
        data.in_chunks(tmp_path / "parts", 23, ChunkRun(stop=2), work, size=4)
    assert stopped.value.code == 143 and done == [range(0, 4), range(4, 8)]
    with pytest.raises(SystemExit):  # one of two processes: takes every second of what is left
        data.in_chunks(tmp_path / "parts", 23, ChunkRun(stop=1, rank=1, world=2), work, size=4)
    assert done[2:] == [range(12, 16)]
    paths = data.in_chunks(tmp_path / "parts", 23, ChunkRun(), work, size=4)
    assert done[3:] == [range(8, 12), range(16, 20), range(20, 23)]
    for name, whole in (("squares", np.arange(23) ** 2), ("twice", np.stack([np.arange(23)] * 2, 1))):
        data.join_chunks(paths, name, 23, tmp_path / f"{name}.npy")
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), whole)
