"""The tokenizer's parts: ViT and the weights of others, SEM, views, losses, probes."""
import argparse
import math
import re

import data
import numpy as np
import pytest
import tokenizer
import torch
import torch.nn.functional as F
from conftest import TINY, call, part
from PIL import Image


def vit(read="registers", **change):
    """A small ViT."""
    torch.manual_seed(0)
    settings = dict(image_size=16, patch=4, width=32, depth=2, heads=2, codes=16, values=5, tau=1.0,
                    sem_read=read, registers=4)
    return tokenizer.ViT(**settings | change).requires_grad_(False).eval()


def parsed(flags):
    """Settings as from the flags of a tiny tokenizer and these."""
    sizes = "--width 32 --codes 16 --values 4 --colour-codes 0"
    head = "--prototypes 24 --head-hidden 16 --bottleneck 8"
    return tokenizer.parse(f"--batch-size 8 --attention {sizes} {head} {flags}".split())[1]


# --- ViT and simplicial embedding -------------------------------------------------------------------------

def test_names_and_shapes_are_those_of_dinov2_with_registers():
    """The 304,372,736 values of ViT-L/14 with 4 registers, by their public names."""
    with torch.device("meta"):
        model = tokenizer.ViT(518, 14, 1024, 24, 16, 1, 2, 1.0, "registers", 4)
    state = {name: tuple(x.shape) for name, x in model.state_dict().items() if not name.startswith("sem_")}
    expected = {"cls_token": (1, 1, 1024), "register_tokens": (1, 4, 1024), "mask_token": (1, 1024),
                "pos_embed": (1, 1370, 1024), "patch_embed.proj.weight": (1024, 3, 14, 14),
                "patch_embed.proj.bias": (1024,), "norm.weight": (1024,), "norm.bias": (1024,)}
    layers = {"attn.qkv": (3072, 1024), "attn.proj": (1024, 1024),
              "mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
    gains = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    for k in range(24):
        expected |= {f"blocks.{k}.{name}.weight": shape for name, shape in layers.items()}
        expected |= {f"blocks.{k}.{name}.bias": shape[:1] for name, shape in layers.items()}
        expected |= {f"blocks.{k}.{name}": (1024,) for name in gains}
    assert state == expected and sum(map(math.prod, state.values())) == 304_372_736


@pytest.mark.parametrize("read", ["registers", "patches"])
def test_codes_are_the_argmax_of_the_simplices_and_tau_does_not_matter(read):
    model = vit(read)
    images = torch.randn(6, 3, 16, 16)
    codes, features = model.encode(images)
    assert codes.shape == (6, 16) and features.shape == (6, 32)
    assert torch.equal(model.logits(model.tokens(images)).view(6, 16, 5).argmax(-1), codes)
    model.tau = 0.01
    assert torch.equal(model.encode(images)[0], codes)


def test_colour_positions_see_which_colours_a_patch_has_and_the_others_no_hue():
    model = vit("patches", codes=64, registers=0, attention=False, colour_codes=1)
    assert model.encode(torch.randn(6, 3, 16, 16))[0].shape == (6, 64)
    mask = torch.rand(6, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3) < 0.5  # of blocks of 2 × 2
    mask[:, :, ::4, ::4] = mask[:, :, 1::4, ::4] = mask[:, :, ::4, 1::4] = mask[:, :, 1::4, 1::4] = True
    red, blue = torch.tensor([[0.8, -0.6, -0.6], [-0.6, -0.6, 0.8]])[:, :, None, None]

    def kinds(colour, where):
        z = model.logits(model.tokens(torch.where(where, colour, torch.tensor(0.1)[None, None, None])))
        return z.split([15, 5], 2)

    form, colour = kinds(red, mask)
    other_form, other_colour = kinds(blue, mask)
    assert (form - other_form).abs().max() < 0.3 * form.std() and (colour - other_colour).abs().max() > 0.3
    moved = mask.unflatten(3, (4, 4)).flip(4).flatten(3)  # within each patch
    other_form, other_colour = kinds(red, moved)
    assert torch.allclose(colour, other_colour, atol=1e-5) and (form - other_form).abs().max() > 0.3


def test_form_and_colour_have_codes_of_their_own_on_shapes_alone():
    for dataset in ("shapes", "folder", "cifar10", "imagenet"):
        args = tokenizer.parse(["--dataset", dataset])[1]
        assert (args.colour_codes, args.nearest) == ((2, True) if dataset == "shapes" else (0, False))


def test_k_means_finds_groups_and_codes_are_the_nearest_mean():
    centres = torch.randn(16, 5, 5) * 9  # of each position
    groups = torch.randint(5, (16, 200))
    z = centres.gather(1, groups[..., None].expand(-1, -1, 5)) + 0.1 * torch.randn(16, 200, 5)
    means = tokenizer.k_means(z, 5)
    assert torch.cdist(centres, means).amin(2).max() < 0.2
    model = vit("patches", nearest=True)
    model.sem_means.copy_(torch.randn(16, 5, 5))
    images = torch.randn(6, 3, 16, 16)
    z = model.logits(model.tokens(images)).view(6, 16, 1, 5)
    assert torch.equal((z - model.sem_means).square().sum(-1).argmin(-1), model.encode(images)[0])


def test_a_cold_simplex_makes_the_output_a_function_of_the_code():
    model = vit(tau=1e-6)
    images = torch.randn(3, 3, 16, 16)
    one_hot = F.one_hot(model.encode(images)[0], 5).flatten(1).float()
    assert torch.allclose(model(images)[0], model.norm(model.sem_out(one_hot)), atol=1e-4)


def test_patch_reading_gives_each_patch_its_own_positions():
    """Without attention, changing one patch changes its positions of the code alone."""
    model = vit("patches", attention=False)
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[:, :, 4:8, 8:12] += 1  # patch 6 of 4 × 4
    z, z_other = (model.logits(model.tokens(x)) for x in (images, other))
    assert (z != z_other).any(-1)[0].nonzero().tolist() == [[6]]


def test_positions_are_resized_for_other_image_sizes():
    positions = torch.arange(16.0)[None, :, None] // 4 * 4 + 1.5  # of CLS nothing, of patches the row
    resized = tokenizer.resize_positions(F.pad(positions, (0, 0, 1, 0)), 2)[0, :, 0]
    assert torch.allclose(resized, torch.tensor([0.0, 3.5, 3.5, 11.5, 11.5]), atol=0.4)


def test_masked_patches_are_hidden_from_the_network():
    model = vit()
    images = torch.randn(2, 3, 16, 16)
    mask = torch.zeros(2, 16).bool()
    mask[:, 5] = True
    other = images.clone()
    other[:, :, 4:8, 4:8] = 0  # patch 5
    assert torch.allclose(model(images, mask)[0], model(other, mask)[0], atol=1e-6)
    assert not torch.allclose(model(images)[0], model(other)[0], atol=1e-5)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    block = tokenizer.Block(8, 2, attention=True, drop_path=0.4, layer_scale=1.0)
    branch = torch.ones(20_000, 1, 1)
    dropped = block.drop(branch)
    assert abs(dropped.mean() - 1) < 0.03 and torch.allclose(dropped.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert torch.equal(block.eval().drop(branch), branch)


# --- weights of others ------------------------------------------------------------------------------------

def to_transformers(state):
    """Our names → those of transformers' Dinov2WithRegisters, the opposite of tokenizer.NAMES."""
    names = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1",
             "ls2.gamma": "layer_scale2.lambda1", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer.",
             "cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
             "register_tokens": "embeddings.register_tokens"}
    found = {}
    for name, value in state.items():
        name = f"layer{name}" if name.startswith("norm.") else name
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for kind, rows in zip(("query", "key", "value"), value.chunk(3)):
                found[name.replace("attn.qkv", f"attention.attention.{kind}")] = rows
        else:
            found[name] = value
    return found


def assert_same_tokens(model, tokens, size):
    """A ViT that sees pixels in [-1, 1] gives the tokens of one that sees them normalised as DINOv2 does."""
    pixels = torch.rand(2, 3, size, size)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = tokens((pixels - mean) / std)
    assert (model(pixels * 2 - 1) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("whole", [False, True])
def test_init_gives_the_tokens_of_the_released_weights(tmp_path, whole):
    """Of DINOv2's release, or of the authors' file: a teacher with its simplicial embedding and head."""
    theirs = vit()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    state = {name: x for name, x in theirs.state_dict().items() if not name.startswith("sem_")}
    if whole:
        others = {"backbone.sem_cls_norm.weight": torch.zeros(3), "dino_head.mlp.0.weight": torch.zeros(2, 2)}
        state = {"teacher": {f"backbone.{k}": v for k, v in theirs.state_dict().items()} | others, "epoch": 3}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    model = vit()
    model.sem_norm.bias.fill_(7)
    tokenizer.load_init(model, path)
    assert_same_tokens(model.tokens, theirs.tokens, 16)
    assert (model.sem_norm.bias == 7).all() != whole
    larger = vit(image_size=32)
    tokenizer.load_init(larger, path)
    assert larger.pos_embed.shape == (1, 65, 32)


@pytest.mark.parametrize("size", [56, 84])
def test_parity_with_transformers(tmp_path, size):
    """Random weights of transformers' Dinov2WithRegisters for 56 pixels, where that is installed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
        num_register_tokens=4)
    theirs = transformers.Dinov2WithRegistersModel(config).requires_grad_(False).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = vit(image_size=size, patch=14, width=48, depth=3, heads=4)
    tokenizer.load_init(ours, tmp_path / "model.safetensors")
    assert_same_tokens(lambda x: ours.norm(ours.tokens(x)), lambda x: theirs(x).last_hidden_state, size)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(vit().state_dict() | {"cls_token": torch.zeros(1, 1, 7)}, path)
    words = r"weights.pth: .*cls_token.*\[1, 1, 7\].*\[1, 1, 32\]"
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}"):
        tokenizer.load_init(vit(), path)


# --- views ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("from_file", [False, True])
def test_crops_are_what_their_boxes_say(tmp_path, from_file):
    """Of a picture whose colours are its coordinates; also where a JPEG is decoded smaller."""
    w, h = (640, 480) if from_file else (64, 64)
    y, x = np.mgrid[:h, :w]
    pixels = np.stack([x * 255 / (w - 1), y * 255 / (h - 1), x * 0], -1).round().astype(np.uint8)
    u = part(40).uniform(5)
    scale, ratio = (0.1, 1.0), 0.75
    if from_file:
        Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=100, subsampling=0)
        crops = tokenizer.read_crops(tmp_path / "a.jpg", u, [(48, scale)] * 40, ratio)
    else:
        images = torch.from_numpy(pixels).permute(2, 0, 1).expand(40, -1, -1, -1)
        crops = tokenizer.random_crops(images.float(), 48, scale, ratio, part(40))
    for row, crop in zip(u, crops):
        crop = crop / 255
        cx, cy, width, height, mirror = tokenizer.crop_boxes(row, scale, ratio, w / h)
        assert 0.74 < width * w / (height * h) < 1.35 or 1 in (width, height)
        assert 0.099 <= width * height <= 1.001
        crop = crop.flip(2) if mirror else crop
        assert abs(crop[0].mean() - (cx + 1) / 2) < 0.012 and abs(crop[1].mean() - (cy + 1) / 2) < 0.012
        assert abs((crop[0, :, -1] - crop[0, :, 0]).mean() - width * 47 / 48) < 0.04


def augment(images, **change):
    """tokenizer.colour_augment of 8 images, the second global crops."""
    settings = dict(jitter=[0.0] * 4, jitter_p=1.0, grey=0.0, blur=[0.0] * 3, solarise=0.0)
    return tokenizer.colour_augment(images, 1, argparse.Namespace(**settings | change), part(8))


def test_colour_augmentation_does_what_its_probabilities_say():
    images = torch.rand(8, 3, 64, 64) * 1.9 - 0.95
    assert torch.allclose(augment(images, jitter=[0.4] * 4, jitter_p=0.0), images, atol=1e-6)
    grey = augment(images, grey=1.0)
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6)
    for some in (augment(images, grey=0.5), augment(images, jitter=[0.4] * 4, jitter_p=0.5)):
        kept = ((some - images).abs() < 1e-6).flatten(1).float().mean(1)
        assert ((kept < 0.1) | (kept == 1)).all() and 0 < (kept == 1).sum() < 8  # whole pictures
    assert torch.allclose(augment(images, solarise=1.0), -images.abs(), atol=1e-5)
    flat = torch.full((8, 3, 64, 64), 0.2)
    assert torch.allclose(augment(flat, blur=[0.0, 1.0, 0.0]), flat, atol=1e-5)
    assert augment(images, blur=[0.0, 1.0, 0.0]).std() < images.std()
    images = images * 0.3  # far from black and white
    turned = augment(images, jitter=[0.0, 0.0, 0.0, 0.3])
    before, after = (torch.einsum("ij,bjhw->ibhw", torch.tensor(tokenizer.YIQ), x) for x in (images, turned))
    assert torch.allclose(after[0], before[0], atol=0.02) and (turned - images).abs().max() > 0.05
    assert torch.allclose(after[1:].norm(dim=0), before[1:].norm(dim=0), atol=0.02)  # hue keeps both


def test_masks_hide_blocks_of_half_of_the_crops_from_a_tenth_to_a_half_of_each():
    counts = tokenizer.mask_counts(256, 32, seed=0, step=3)  # (2, 32)
    assert ((counts == 0).sum(0) == 1).all()  # of each image one crop
    assert 5 < (counts[0] > 0).sum() < 27
    masked = counts.sum(0).sort().values / 256
    assert torch.allclose(masked, 0.1 + 0.4 * (torch.arange(32) + 0.5) / 32, atol=1 / 256)
    assert not torch.equal(tokenizer.mask_counts(256, 32, 0, 4), counts)
    args = parsed("--ibot 1 --batch-size 640 --global-size 128 --codes 256")
    masks, chosen = tokenizer.draw_masks(args, part(640), step=3)
    assert torch.equal(masks.sum(1), tokenizer.mask_counts(256, 640, 0, 3).flatten())
    assert torch.equal(chosen, masks.flatten().nonzero()[:, 0])
    grid = masks[masks.any(1)].view(640, 16, 16).float()
    beside = (grid[:, :, 1:] * grid[:, :, :-1]).sum() / grid[:, :, 1:].sum()
    assert beside > 0.7  # of hidden patches the left one is hidden too; scattered: a third
    for other in (grid.flip(1), grid.flip(2), grid.mT):  # no side is preferred
        assert (grid.mean(0) - other.mean(0)).abs().mean() < 0.03


# --- losses and schedules ---------------------------------------------------------------------------------

def test_sinkhorn_rows_are_distributions_and_prototypes_are_used_equally():
    logits = torch.randn(64, 16) + torch.linspace(0, 3, 16)  # late prototypes are favoured
    q = tokenizer.sinkhorn(logits, 0.5, iterations=50)
    assert torch.allclose(q.sum(1), torch.ones(64), atol=1e-5) and (q.sum(0) - 4).abs().max() < 0.05
    assert (logits / 0.5).softmax(1).sum(0).max() > 8


def test_centering_follows_the_mean_and_removes_a_constant_preference():
    preference = torch.linspace(-1, 1, 8)
    centering = tokenizer.Centering(8, momentum=0.0)
    centering(torch.randn(1000, 8) * 0.01 + preference, 0.1)
    assert torch.allclose(centering.centre[0], preference, atol=0.01)
    assert (centering(preference.expand(4, 8), 0.1) - 1 / 8).abs().max() < 0.02


def test_dino_loss_pairs_each_teacher_view_with_every_other_student_view():
    targets = torch.rand(2, 3, 4).softmax(-1)
    logits = torch.randn(5, 3, 4)
    pairs = [(i, j) for i in range(2) for j in range(5) if i != j]
    expected = [-(targets[i] * (logits[j] / 0.1).log_softmax(-1)).sum(-1).mean() for i, j in pairs]
    assert torch.allclose(tokenizer.dino_loss(targets, logits, 0.1), torch.stack(expected).mean())


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0]])  # at √2, √2, 0, 0
    expected = -(2 * math.log(math.sqrt(2) + 1e-8) + 2 * math.log(1e-8)) / 4
    assert tokenizer.koleo_loss(x * 7).item() == pytest.approx(expected, rel=1e-4)


def test_the_terms_of_the_loss_are_weighted_as_in_dinov2(run):
    """Where all prototypes are equally likely, a view costs log K: DINO is a mean over pairs of views, iBOT a
    sum over masked crops divided by all crops, half of which are masked; KoLeo a sum over both crops."""
    args = parsed("--attention --ibot 1 --koleo 1 --batch-size 8 --global-size 32")
    out = torch.randn(16, 5)

    def network(views, mask=None, chosen=None, shown=None):
        return torch.zeros(16, 7), torch.zeros(len(chosen), 7), out

    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    loss, terms = tokenizer.step_loss(network, network, {}, images, part(8), args, run, step=0)
    koleo = tokenizer.koleo_loss(out[:8]) + tokenizer.koleo_loss(out[8:])
    assert terms["dino"].item() == pytest.approx(math.log(7), rel=1e-5)
    assert terms["ibot"].item() == pytest.approx(math.log(7) / 2, rel=1e-5)
    assert loss.item() == pytest.approx(1.5 * math.log(7) + koleo.item(), rel=1e-5)


def test_learning_rates_fall_with_the_distance_from_the_head_and_the_teacher_warms_up():
    args = parsed("--layer-decay 0.5 --patch-lr 0.1")
    expected = {"head.mlp.0.weight": 1, "backbone.norm.weight": 1, "backbone.sem_embed.weight": 1,
                "backbone.blocks.1.mlp.fc1.weight": 0.5, "backbone.blocks.0.mlp.fc1.weight": 0.25,
                "backbone.cls_token": 0.125, "backbone.patch_embed.proj.weight": 0.0125}
    assert {name: tokenizer.lr_scale(name, args) for name in expected} == pytest.approx(expected)
    args = parsed("--teacher-start 0.04 --teacher-temperature 0.07 --teacher-warmup 10")
    temperatures = [tokenizer.teacher_temperature(step, args) for step in (0, 5, 10, 50)]
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])


@pytest.mark.parametrize("flags", [
    "--ibot 0.5 --locals 2", "--centering centre", "--no-attention --codes 64 --colour-codes 2",
    "--sem-read registers --registers 4 --locals 3"])
def test_the_loss_falls_and_reaches_every_weight(run, flags):
    args = parsed(flags)
    torch.manual_seed(0)
    student = tokenizer.build_student(vars(args))
    teacher = data.averaged(student, 0.9).module
    centering = torch.nn.ModuleDict({kind: tokenizer.Centering(24) for kind in ("views", "patches")})
    images = data.draw_shapes(*data.shapes_labels("train", 8)[:2])
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss, _ = tokenizer.step_loss(student, teacher, centering, images, part(8), args, run, step=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    idle = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    unused = {"backbone.mask_token": args.ibot == 0, "backbone.cls_token": not args.attention,
              "backbone.register_tokens": args.registers == 0}
    assert idle == {name for name, holds in unused.items() if holds}
    assert args.centering == "centre" or losses[-1] < losses[0] - 0.05  # a moving centre moves the target


# --- codes and report -------------------------------------------------------------------------------------

def test_probes_find_what_is_there_and_nothing_else(run):
    labels = torch.randint(0, 4, (900, 2), generator=torch.Generator().manual_seed(0))
    codes = torch.randint(0, 4, (900, 2, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes[:, 0, 2] = labels[:, 0]  # factor a is value 2 of the code, factor b is nowhere
    codes[:, :, 0] = 0
    features = torch.cat([F.one_hot(labels[:, 0], 4) * 3, torch.randn(900, 4)], 1).half()
    splits = {"train": range(0, 600), "test": range(600, 900)}
    factors = {"a": "0123", "b": "0123"}
    dataset = data.Dataset("toy", None, labels, factors, splits, [], source=None)
    result = tokenizer.report(dataset, codes, features, 4, run)
    for name in ("linear on codes, test", "linear on features, test"):
        assert result[name]["a"] > 0.9 and result[name]["b"] < 0.4, name
    assert result["lowest entropy"] == 0 and result["values used"] == 21 / 24
    assert result["entropy per position"] == pytest.approx(2 * 5 / 6, abs=0.02)


def test_centred_codes_use_values_that_a_constant_preference_would_hide(run):
    model = vit("patches")
    model.sem_norm.bias.view(-1, 5)[:, 0] = 9  # value 0 always wins
    images = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)
    splits = {"train": range(200)}
    dataset = data.Dataset("toy", images, torch.zeros(200, 0), {}, splits, [], source=None)
    assert not tokenizer.encode_images(model, images, run)[0].any()
    tokenizer.fit_codes(model, dataset, run)
    assert tokenizer.encode_images(model, images, run)[0].unique().tolist() == [0, 1, 2, 3, 4]


def test_codes_that_tell_nothing_apart_are_said_with_what_to_do(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for k in range(24):
        Image.new("RGB", (32, 32), (90, 120, 200)).save(tmp_path / "in" / f"{k}.png")
    where = ["--dataset", "folder", "--data-dir", tmp_path / "in", "--out", tmp_path]
    call("tokenizer", *TINY["tokenizer"], *where)
    [line] = re.findall("note: all images have nearly the same code.*", capsys.readouterr().err)
    assert "--restart" in line and "see --help" in line
