"""The tokenizer's parts: ViT, SEM, losses, probes."""
import json
import math

import data
import numpy as np
import pytest
import tokenizer
import torch
import torch.nn.functional as F


def vit(read="registers", **change):
    torch.manual_seed(0)
    settings = dict(image_size=16, patch=4, width=32, depth=2, heads=2, codes=16, values=5, tau=1.0, sem_read=read, registers=4, stem=0) | change
    return tokenizer.ViT(**settings).eval()


def test_names_and_shapes_are_those_of_dinov2_with_registers():
    """The 304,372,736 values of ViT-L/14 with 4 registers, by their public names (on the meta device: no memory)."""
    with torch.device("meta"):
        model = tokenizer.ViT(518, 14, 1024, 24, 16, 1, 2, 1.0, "registers", 4, layer_scale=1e-5)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("sem_")}  # all but the simplicial embedding
    expected = {"cls_token": (1, 1, 1024), "register_tokens": (1, 4, 1024), "mask_token": (1, 1024), "pos_embed": (1, 1370, 1024),
                "patch_embed.proj.weight": (1024, 3, 14, 14), "patch_embed.proj.bias": (1024,), "norm.weight": (1024,), "norm.bias": (1024,)}
    for k in range(24):
        for name, shape in {"attn.qkv": (3072, 1024), "attn.proj": (1024, 1024), "mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}.items():
            expected |= {f"blocks.{k}.{name}.weight": shape, f"blocks.{k}.{name}.bias": shape[:1]}
        expected |= {f"blocks.{k}.{name}": (1024,) for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")}
    assert {k: tuple(v.shape) for k, v in state.items()} == expected
    assert sum(v.numel() for v in state.values()) == 304_372_736


@pytest.mark.parametrize("read", ["registers", "patches"])
def test_codes_are_the_argmax_of_the_simplices_and_tau_does_not_matter(read):
    model, images = vit(read), torch.randn(6, 3, 16, 16)
    codes, features = model.encode(images)
    assert codes.shape == (6, 16) and features.shape == (6, 32) and codes.max() < 5
    z = model.logits(model.tokens(images)).view(6, 16, 5)
    assert torch.equal(z.argmax(-1), codes)
    model.tau = 0.01
    assert torch.equal(model.encode(images)[0], codes)


def test_a_cold_simplex_makes_the_output_a_function_of_the_code():
    model, images = vit(tau=1e-6), torch.randn(3, 3, 16, 16)
    out, _ = model(images)
    codes, _ = model.encode(images)
    one_hot = F.one_hot(codes, 5).flatten(1).float()
    assert torch.allclose(out, model.norm(model.sem_out(one_hot)), atol=1e-4)


def test_patch_reading_gives_each_patch_its_own_positions():
    """Without attention, changing one patch changes its positions of the code alone."""
    model, images = vit("patches", attention=False), torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[:, :, 4:8, 8:12] = torch.randn(1, 3, 4, 4) * 5  # patch 6 of 4 × 4
    z, z_other = (model.logits(model.tokens(x)) for x in (images, other))
    changed = (z != z_other).any(-1)[0]
    assert changed[6] and changed.sum() == 1


def test_positions_are_resized_for_other_image_sizes_and_kept_for_the_own():
    positions = torch.randn(1, 17, 32)
    positions[:, 1:] = 3.0
    assert tokenizer.resize_positions(positions, 4) is positions
    smaller, larger = tokenizer.resize_positions(positions, 2), tokenizer.resize_positions(positions, 7)
    assert smaller.shape == (1, 5, 32) and torch.allclose(smaller[:, 1:], torch.tensor(3.0), atol=1e-5)
    assert larger.shape == (1, 50, 32) and torch.equal(larger[:, :1], positions[:, :1])


def test_masked_patches_are_hidden_from_the_network():
    model, images = vit(), torch.randn(2, 3, 16, 16)
    mask = torch.zeros(2, 16).bool()
    mask[:, 5] = True
    other = images.clone()
    other[:, :, 4:8, 4:8] = 0  # patch 5
    assert torch.allclose(model(images, mask)[0], model(other, mask)[0], atol=1e-6)
    assert (model(images)[0] - model(other)[0]).abs().max() > 1e-5


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    block = tokenizer.Block(8, 2, attention=True, drop_path=0.4, layer_scale=1.0)
    branch = torch.ones(20_000, 1, 1)
    assert abs(block.drop(branch).mean() - 1) < 0.03 and torch.allclose(block.drop(branch).unique(), torch.tensor([0.0, 1 / 0.6]))
    assert torch.equal(block.eval().drop(branch), branch)


def to_transformers(state):
    """Our names → those of transformers' Dinov2WithRegisters, written out by hand: the opposite of tokenizer.from_transformers."""
    found = {}
    for name, value in state.items():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        layer = f"encoder.layer.{block}"
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                found[f"{layer}.attention.attention.{part}.{name.split('.')[-1]}"] = rows
        elif block:
            rest = name.split(".", 2)[2].replace("attn.proj", "attention.output.dense").replace("ls1.gamma", "layer_scale1.lambda1")
            found[f"{layer}.{rest.replace('ls2.gamma', 'layer_scale2.lambda1')}"] = value
        else:
            own = {"pos_embed": "position_embeddings", "patch_embed.proj.weight": "patch_embeddings.projection.weight",
                   "patch_embed.proj.bias": "patch_embeddings.projection.bias"}.get(name, name)
            found[own.replace("norm.", "layernorm.") if name.startswith("norm.") else f"embeddings.{own}"] = value
    return found


@pytest.mark.parametrize("names", ["release", "transformers", "training", "parts"])
def test_init_gives_the_tokens_of_the_released_weights(tmp_path, names):
    """The same un-normalised tokens as the model whose weights they are, which sees images normalised as DINOv2's are."""
    torch.manual_seed(1)
    released = vit()
    for p in released.parameters():
        torch.nn.init.normal_(p, std=0.2)
    state, path = {k: v for k, v in released.state_dict().items() if not k.startswith("sem_")}, tmp_path / "weights.pth"
    if names == "transformers":
        state = to_transformers(state)
    if names == "training":  # the authors' file: a teacher with its simplicial embedding and head
        state = {f"backbone.{k}": v for k, v in released.state_dict().items()} | {"backbone.sem_cls_norm.weight": torch.zeros(3)}
        state = {"teacher": state | {"dino_head.mlp.0.weight": torch.zeros(2, 2)}, "epoch": 3}
    if names == "parts":
        path, keys = tmp_path / "model.index.json", sorted(state)
        files = {k: f"part-{n % 2}.bin" for n, k in enumerate(keys)}
        for file in set(files.values()):
            torch.save({k: state[k] for k in keys if files[k] == file}, tmp_path / file)
        path.write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(state, path)
    model = vit()
    model.load_state_dict(model.state_dict() | {"sem_norm.bias": torch.full_like(model.sem_norm.bias, 7.0)})
    tokenizer.load_init(model, path)
    pixels = torch.rand(2, 3, 16, 16)
    normalised = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        assert torch.allclose(model.tokens(pixels * 2 - 1), released.tokens(normalised), atol=1e-4)
    assert (model.sem_norm.bias == 7).all() != (names == "training")  # the embedding of the file, where it has one
    larger = vit(image_size=32)
    tokenizer.load_init(larger, path)
    assert larger.pos_embed.shape == (1, 65, 32) and torch.equal(larger.pos_embed[:, :1], released.pos_embed[:, :1])


@pytest.mark.parametrize("image_size", [56, 84])
def test_parity_with_transformers(tmp_path, image_size):
    """Random weights of transformers' Dinov2WithRegisters for 56 pixels, read by --init: the same tokens, at other sizes too. (Only where
    transformers is installed, as for tests/bench.py.)"""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, num_register_tokens=4)
    theirs = transformers.Dinov2WithRegistersModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = vit(image_size=image_size, patch=14, width=48, depth=3, heads=4)
    tokenizer.load_init(ours, tmp_path / "model.safetensors")
    pixels = torch.rand(2, 3, image_size, image_size)
    normalised = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected, found = theirs(normalised).last_hidden_state, ours.norm(ours.tokens(pixels * 2 - 1))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    state, path = vit().state_dict(), tmp_path / "weights.pth"

    def refused(state, *words, model=None):
        torch.save(state, path)
        with pytest.raises(SystemExit) as stopped:
            tokenizer.load_init(model or vit(), path)
        assert all(word in str(stopped.value) for word in ("weights.pth", *words)) and "\n" not in str(stopped.value)

    refused({k: v for k, v in state.items() if k != "norm.weight"}, "lacks norm.weight")
    refused(state | {"extra": torch.zeros(1)}, "has extra")
    refused(state, "blocks.1", model=vit(depth=1))
    refused(state, "attn.proj.bias is (32,)", "(64,)", model=vit(width=64))
    refused(state, "register_tokens", model=vit(registers=2))
    refused([1, 2], "expected tensors by name")
    path.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="not a readable file"):
        tokenizer.load_init(vit(), path)


def test_a_factored_embedding_has_fewer_weights_and_the_same_meaning():
    full, factored = vit(codes=64), vit(codes=64, sem_rank=4)
    weights = lambda m: sum(p.numel() for n, p in m.named_parameters() if n.startswith(("sem_embed", "sem_out")))
    assert weights(full) == (5 * 32 + 32) * 320 and weights(factored) == 4 * (5 * 32 + 320) + 4 * (320 + 32)
    assert factored.encode(torch.randn(2, 3, 16, 16))[0].shape == (2, 64)
    assert torch.linalg.matrix_rank(factored.sem_embed[1].weight @ factored.sem_embed[0].weight) == 4


# --- schedules --------------------------------------------------------------------------------------------------------

def test_learning_rates_fall_with_the_distance_from_the_head():
    args = tiny_args("--layer-decay", "0.5", "--patch-lr", "0.1", "--weight-decay", "0.1", "--weight-decay-final", "0.3", "--stem", "0")
    student, scale = make(args), tokenizer.lr_scale(args)
    assert scale("head.mlp.0.weight") == scale("backbone.norm.weight") == scale("backbone.sem_embed.weight") == 1
    assert [scale(f"backbone.blocks.{k}.mlp.fc1.weight") for k in (0, 1)] == [0.25, 0.5] and scale("backbone.cls_token") == 0.125
    assert abs(scale("backbone.patch_embed.proj.weight") - 0.0125) < 1e-9
    optimizers = data.Optimizers(student, args, scale)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    optimizers.step(1.0, 0, torch.tensor(0.0), weight_decay=0.0)  # Adam's first step moves everything by its learning rate
    for n, p in student.named_parameters():
        if p.numel():
            assert abs((before[n] - p).mean().item() / (args.lr * scale(n)) - 1) < 1e-2, n
    optimizers.step(1.0, 1, torch.tensor(0.0), weight_decay=0.3)
    for group in optimizers.parts[0].param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}


def test_the_teacher_warms_up():
    args = tiny_args("--teacher-start", "0.04", "--teacher-temperature", "0.07", "--teacher-warmup", "10")
    assert [round(tokenizer.teacher_temperature(step, args), 4) for step in (0, 5, 10, 50)] == [0.04, 0.055, 0.07, 0.07]
    assert tokenizer.teacher_temperature(0, tiny_args("--teacher-temperature", "0.02")) == 0.02


# --- losses ---------------------------------------------------------------------------------------------------------

def test_sinkhorn_rows_are_distributions_and_prototypes_are_used_equally():
    logits = torch.randn(64, 16) + torch.linspace(0, 3, 16)  # late prototypes are favoured
    q = tokenizer.sinkhorn(logits, 0.5, iterations=50)
    assert torch.allclose(q.sum(1), torch.ones(64), atol=1e-5) and (q.sum(0) - 4).abs().max() < 0.05
    assert (logits / 0.5).softmax(1).sum(0).max() > 8


def test_centering_follows_the_mean_and_removes_a_constant_preference():
    centering, preference = tokenizer.Centering(8, momentum=0.0), torch.linspace(-1, 1, 8)
    centering(torch.randn(1000, 8) * 0.01 + preference, 0.1)
    assert torch.allclose(centering.centre[0], preference, atol=0.01)
    assert (centering(preference.expand(4, 8), 0.1) - 1 / 8).abs().max() < 0.02


def test_dino_loss_pairs_each_teacher_view_with_every_other_student_view():
    targets, logits = torch.rand(2, 3, 4).softmax(-1), torch.randn(5, 3, 4)
    expected = [-(targets[i] * (logits[j] / 0.1).log_softmax(-1)).sum(-1).mean() for i in range(2) for j in range(5) if i != j]
    assert torch.allclose(tokenizer.dino_loss(targets, logits, 0.1), torch.stack(expected).mean())


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest():
    x = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0]])  # nearest distances √2, √2, √2
    assert abs(tokenizer.koleo_loss(x * 7) + math.log(math.sqrt(2))) < 1e-6
    close = torch.tensor([[1.0, 0], [1.0, 0.01], [-1.0, 0]])
    assert tokenizer.koleo_loss(close) > tokenizer.koleo_loss(x)


def test_patch_masks_hide_the_same_number_in_every_batch():
    counts = [tokenizer.patch_masks(torch.rand(16, 100, generator=torch.Generator().manual_seed(k))).sum(1) for k in range(3)]
    assert all(torch.equal(c, counts[0]) for c in counts) and counts[0][:8].tolist() == [10, 0, 23, 0, 37, 0, 50, 0]
    scores = torch.rand(8, 100)  # a process that holds the second half of the batch hides what one process would
    assert torch.equal(tokenizer.patch_masks(scores[4:], first=4), tokenizer.patch_masks(scores)[4:])


def tiny_args(*flags):
    parser = data.make_parser("")
    data.add_training_flags(parser, 4, 8, 1e-3, 0.0, 0)
    tokenizer.add_flags(parser)
    return data.parse(parser, tokenizer.PRESETS, "--attention --width 32 --depth 2 --heads 2 --codes 16 --values 4 --prototypes 24 --head-hidden 16 --bottleneck 8 --batch-size 8".split() + list(flags))


def make(args):
    torch.manual_seed(0)
    return tokenizer.Student(tokenizer.build_backbone(vars(args)), tokenizer.DINOHead(32, 16, 8, 24))


@pytest.mark.parametrize("flags", [("--ibot", "0.5", "--locals", "2"), ("--centering", "centre"), ("--no-attention",),
                                   ("--sem-read", "registers", "--registers", "4", "--locals", "3")])
def test_the_loss_falls_and_reaches_every_weight(run, flags):
    args = tiny_args(*flags)
    student, teacher = make(args), make(args).requires_grad_(False)
    centering = torch.nn.ModuleDict({k: tokenizer.Centering(24) for k in ("views", "patches")})
    images = data.unit(data.draw_shapes(*data.shapes_labels("train", 8)[:2]))
    optimizer, losses = torch.optim.Adam(student.parameters(), 3e-3), []
    for step in range(15):
        loss, parts = tokenizer.step_loss(student, teacher, centering, images, data.Draws(0, 0, run, 8), args, run, 0.02)
        loss.backward()
        if step == 0:  # the mask token is used by iBOT alone, CLS by attention
            idle = [n for n, p in student.named_parameters() if p.numel() and (p.grad is None or not p.grad.abs().sum() > 0)]
            assert all(("mask_token" in n and args.ibot == 0) or ("cls_token" in n and not args.attention) or n.endswith("qkv.bias") for n in idle), idle
            assert ("ibot" in parts) == (args.ibot > 0)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert args.centering == "centre" or losses[-1] < losses[0] - 0.05  # a moving centre moves the target


@pytest.mark.parametrize("read, stem, local, attention, rank", [("registers", 0, 16, "", 0), ("patches", 2, 0, "", 0), ("patches", 2, 0, "no-", 0),
                                                                ("registers", 0, 16, "", 3)])
def test_flops_formula_counts_what_torch_counts(run, read, stem, local, attention, rank):
    from torch.utils.flop_counter import FlopCounterMode
    args = tiny_args("--sem-read", read, "--stem", str(stem), "--locals", str(int(local > 0)), "--ibot", "0", f"--{attention}attention", "--sem-rank", str(rank))
    student = make(args)
    crops = torch.randn(16, 3, 32, 32), (torch.randn(8, 3, local, local) if local else None)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as teacher:
            student(crops[0])
        with FlopCounterMode(display=False) as forward:
            student(*crops)
    counted = teacher.get_total_flops() + 3 * forward.get_total_flops()
    assert abs(counted / tokenizer.training_flops(args) - 1) < 0.02


# --- report ---------------------------------------------------------------------------------------------------------

def test_probes_find_what_is_there_and_nothing_else(run):
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 4, (900, 2)))
    codes = rng.integers(0, 4, (900, 2, 6))
    codes[:, 0, 2] = labels[:, 0]  # factor a is value 2 of the code, factor b is nowhere
    splits = {"train": range(0, 600), "test": range(600, 900)}
    dataset = data.Dataset("x", torch.zeros(900, 3, 4, 4), labels, {"a": list("0123"), "b": list("0123")}, splits, lambda row: "", source=None)
    features = torch.cat([F.one_hot(labels[:, 0], 4).float() * 3, torch.randn(900, 4)], 1).numpy()
    result = tokenizer.report(dataset, codes, features, 4, run)
    for name in ("codes", "features"):
        assert result[f"linear on {name}, test"]["a"] > 0.97 and result[f"linear on {name}, test"]["b"] < 0.4
    assert result["knn on features, test"]["a"] > 0.9
    assert result["values used"] == 1 and abs(result["entropy per position"] - 2) < 0.02
    codes[:, :, 0] = 0
    assert tokenizer.report(dataset, codes, features, 4, run)["lowest entropy"] == 0


def test_centred_codes_use_values_that_a_constant_preference_would_hide(run):
    model = vit("patches")
    with torch.no_grad():
        model.sem_norm.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]).repeat(model.sem_norm.bias.numel() // 5))  # value 0 always wins
    images = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)
    dataset = data.Dataset("x", images, torch.zeros(200, 0).long(), {}, {"train": range(200)}, None, source=None)
    before = tokenizer.encode_images(model, images, {"global_size": 16}, run)[0]
    tokenizer.centre_codes(model, dataset, {"global_size": 16}, run)
    after = tokenizer.encode_images(model, images, {"global_size": 16}, run)[0]
    assert (before == 0).all() and all((after == v).any() for v in range(5))
