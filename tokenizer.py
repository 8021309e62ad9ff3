"""Stage 1: images → discrete latent codes. A ViT with a simplicial embedding (SEM), trained by self-distillation (DINOv2).

The SEM turns R read tokens h into L points on a simplex and back (paper, section 3.1):
    z = LayerNorm(W_in · flatten(h)) reshaped (L, V)    p = softmax(z / tau) over V    out = Norm(W_out · flatten(p))      (1)
    code_l = argmax_v z_lv − mean of z_lv over the training images (the mean is ours: without it few values are used)    (2)
Training (DINO on `out`, iBOT on masked patches, KoLeo spreads the batch; the teacher is a moving average of the student):
    loss = − Σ_k t_k log s_k over pairs of views + ibot · the same on masked patches − koleo · mean log nearest distance   (3)

Reads images; writes OUT/<dataset>/tokenizer.pt, codes.npy (N, 2 flips, L), codes.json, tokenizer.json (the report).
    python tokenizer.py                                                        # shapes on a CPU
    python tokenizer.py --dataset cifar10                                      # one GPU
    torchrun --nproc-per-node 8 tokenizer.py --dataset imagenet                # a node
"""
import argparse
import math
import shutil

import data  # first: it sets the threads' waiting policy before torch starts them
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    "cifar10": dict(steps=40_000, batch_size=512, lr=1e-3, momentum=0.992, warmup=2000,
                    patch=4, width=384, depth=8, heads=6, attention=True, registers=4, codes=64, values=64,
                    prototypes=4096, teacher_temperature=0.04, ibot=0.5, koleo=0.1,
                    global_scale=[0.4, 1.0], ratio=0.75, locals=4, local_scale=[0.1, 0.4],
                    jitter=[0.4, 0.4, 0.2, 0.1], grey=0.2, solarise=0.2),
    "folder": dict(steps=2000, batch_size=128, codes=64, prototypes=1024, jitter=[0.2, 0.2, 0.1, 0.05], global_scale=[0.5, 1.0], ratio=0.75),
    "imagenet": dict(steps=125_000, batch_size=256, lr=5e-5, lr_final=0.02, momentum=0.992, warmup=12_500, weight_decay=0.04,
                     image_size=256, workers=12,
                     weight_decay_final=0.4, layer_decay=0.9, patch_lr=0.2,
                     patch=14, stem=0, width=1024, depth=24, heads=16, attention=True, registers=4, layer_scale=1e-5, drop_path=0.3,
                     codes=512, values=256, sem_read="registers", centre_codes=False,
                     head_hidden=2048, bottleneck=256, prototypes=65_536, teacher_temperature=0.07, teacher_start=0.04, teacher_warmup=37_500, ibot=1.0, koleo=0.1,
                     global_size=224, global_scale=[0.32, 1.0], ratio=0.75, locals=8, local_size=98, local_scale=[0.05, 0.32],
                     jitter=[0.4, 0.4, 0.2, 0.1], grey=0.2, blur=[1.0, 0.1, 0.5], solarise=0.2),
}

# ---------------------------------------------------------------------------------------------------------------------
# model (names and arithmetic of DINOv2 with registers)
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention without mask. (B, N, D) → (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 × (B, H, N, D/H)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)


class MLP(nn.Module):
    """Two layers with a GELU between. (..., D) → (..., D)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # (..., D)


class LayerScale(nn.Module):
    """One learned gain a channel, on each residual branch. (..., D) → (..., D)."""

    def __init__(self, width, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x):
        return x * self.gamma  # (..., D)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and drop-path; without attention an MLP on each token. (B, N, D) → (B, N, D)."""

    def __init__(self, width, heads, attention, drop_path, layer_scale):
        super().__init__()
        self.attention, self.drop_path = attention, drop_path
        if attention:
            self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), Attention(width, heads), LayerScale(width, layer_scale)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), MLP(width, 4 * width), LayerScale(width, layer_scale)

    def drop(self, branch):
        """Drop the whole branch of some samples while training, keeping its mean."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)

    def forward(self, x):
        if self.attention:
            x = x + self.drop(self.ls1(self.attn(self.norm1(x))))  # (B, N, D)
        return x + self.drop(self.ls2(self.mlp(self.norm2(x))))  # (B, N, D)


class PatchEmbed(nn.Module):
    """Patches → tokens. (B, 3, S, S) → (B, N, D), N = (S / patch)². `stem` halving convolutions before the projection help small images."""

    def __init__(self, patch, width, stem):
        super().__init__()
        channels, layers = 3, []
        for k in range(stem):
            layers += [nn.Conv2d(channels, 32 << k, 3, stride=2, padding=1), nn.GroupNorm(1, 32 << k), nn.GELU()]
            channels = 32 << k
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(channels, width, patch >> stem, stride=patch >> stem)

    def forward(self, x):
        return self.proj(self.stem(x)).flatten(2).transpose(1, 2)  # (B, N, D)


def resize_positions(positions, side):
    """Positions of CLS and patches (1, 1 + N, D) → (1, 1 + side², D), bicubic with antialias, for another image size."""
    own = math.isqrt(positions.shape[1] - 1)
    if side == own:
        return positions
    grid = positions[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)  # (1, D, own, own)
    grid = F.interpolate(grid.float(), size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


class ViT(nn.Module):
    """Vision transformer with registers and the simplicial embedding. sem_rank: W_in and W_out of equation (1) as products of two
    matrices of that rank; 0: whole."""

    def __init__(self, image_size, patch, width, depth, heads, codes, values, tau, sem_read, registers, stem=0, attention=True,
                 drop_path=0.0, layer_scale=1e-5, sem_rank=0):
        super().__init__()
        self.side, self.L, self.V, self.tau, self.sem_read = image_size // patch, codes, values, tau, sem_read
        self.patch_embed = PatchEmbed(patch, width, stem)
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, attention, drop_path, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        reads = {"registers": 1, "patches": self.side ** 2}[sem_read]  # groups of positions that are read apart
        inputs = (1 + registers) * width if sem_read == "registers" else width
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        project = (lambda a, b: nn.Sequential(linear(a, sem_rank), linear(sem_rank, b))) if sem_rank else linear
        self.sem_embed = project(inputs, codes // reads * values)
        self.sem_norm = nn.LayerNorm(codes // reads * values)
        self.sem_out = project(codes // reads * values, width)
        self.register_buffer("sem_centre", torch.zeros(codes, values))  # set after training by centre_codes
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 if width >= 384 else width ** -0.5 / 1.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for p in (self.pos_embed, self.cls_token, self.register_tokens):
            nn.init.normal_(p, std=0.02)

    def tokens(self, images, mask=None):
        """Un-normalised tokens (B, 1 + R + N, D): CLS, registers, patches. mask (B, N) bool hides patches."""
        x = self.patch_embed(images)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        B, N, _ = x.shape
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1) + resize_positions(self.pos_embed, math.isqrt(N))  # (B, 1 + N, D)
        x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], 1)  # (B, 1 + R + N, D)
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, x):
        """z of equation (1) from un-normalised tokens: (B, reads, L · V / reads)."""
        r = 1 + self.register_tokens.shape[1]
        h = x[:, :r].flatten(1)[:, None] if self.sem_read == "registers" else x[:, r:]  # (B, reads, inputs)
        return self.sem_norm(self.sem_embed(h))

    def forward(self, images, mask=None):
        """Returns out (B, D) of equation (1) and the normalised patch tokens (B, N, D)."""
        x = self.tokens(images, mask)
        z = self.logits(x)
        p = (z.unflatten(-1, (-1, self.V)).float() / self.tau).softmax(-1)  # (B, reads, L / reads, V)
        out = self.sem_out(p.flatten(-2).to(z.dtype)).mean(1)  # (B, D); one read: the mean over it is itself
        return self.norm(out), self.norm(x[:, 1 + self.register_tokens.shape[1]:])

    @torch.no_grad()
    def encode(self, images):
        """Codes (B, L) long of equation (2) and features (B, D) of images (B, 3, S, S) in [-1, 1]: the normalised CLS, or the
        mean of the normalised patches where the SEM reads those."""
        x = self.tokens(images)
        z, normal = self.logits(x).float().view(len(x), self.L, self.V), self.norm(x).float()
        features = normal[:, 0] if self.sem_read == "registers" else normal[:, 1 + self.register_tokens.shape[1]:].mean(1)  # (B, D)
        return (z - self.sem_centre).argmax(-1), features


class DINOHead(nn.Module):
    """MLP, L2 norm, then cosine similarity to prototypes of unit length. (..., D) → (..., K)."""

    def __init__(self, width, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) * bottleneck ** -0.5)

    def forward(self, x):
        x = F.normalize(self.mlp(x).float(), dim=-1, eps=1e-6)  # (..., bottleneck)
        return F.linear(x, F.normalize(self.prototypes, dim=-1))  # (..., K)


class Student(nn.Module):
    """Backbone and head; the teacher is another copy of it. One call does all views, so that DDP sees one forward."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, global_crops, local_crops=None, mask=None, chosen=None):
        """global_crops (2B, 3, S, S), local_crops (K·B, 3, s, s), mask (2B, N), chosen: rows of the flattened (2B · N) patches.

        Returns head outputs of the views (2B or 2B + K·B, prototypes), of the chosen patches (n, prototypes) or None,
        and out (2B, D) of the global crops.
        """
        out, patches = self.backbone(global_crops, mask)  # (2B, D), (2B, N, D)
        views = out if local_crops is None else torch.cat([out, self.backbone(local_crops)[0]])
        masked = None if chosen is None else self.head(patches.flatten(0, 1)[chosen])
        return self.head(views), masked, out


# ---------------------------------------------------------------------------------------------------------------------
# loss
# ---------------------------------------------------------------------------------------------------------------------

def all_reduce_sum(x):
    """Sum over processes, without gradient."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


@torch.no_grad()
def sinkhorn(logits, temperature, iterations=3):
    """Teacher targets (n, K) whose prototypes are used equally often over the whole batch (SwAV, used by DINOv2)."""
    logits = logits.float() / temperature
    top = logits.max()
    if dist.is_initialized():
        dist.all_reduce(top, dist.ReduceOp.MAX)
    q = torch.exp(logits - top)  # (n, K)
    for _ in range(iterations):
        q = q / all_reduce_sum(q.sum(0, keepdim=True)).clamp(min=1e-30)  # each prototype the same mass
        q = q / q.sum(1, keepdim=True)  # each sample a distribution
    return q


class Centering(nn.Module):
    """Teacher targets softmax((logits − centre) / temperature), the centre a moving average of the teacher's mean logits (DINO)."""

    def __init__(self, prototypes, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, logits, temperature):
        """logits (n, K) → targets (n, K)."""
        logits = logits.float()
        targets = ((logits - self.centre) / temperature).softmax(-1)
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.centre.lerp_(all_reduce_sum(logits.mean(0, keepdim=True)) / world, 1 - self.momentum)
        return targets


def cross_entropy(targets, logits, temperature):
    """− Σ_k t_k log s_k of equation (3), s = softmax(logits / temperature): (..., K), (..., K) → (...)."""
    return -(targets * F.log_softmax(logits.float() / temperature, -1)).sum(-1)


def dino_loss(targets, logits, temperature):
    """Mean over all pairs of a teacher's global view i and a student's other view j. targets (2, B, K), logits (views, B, K)."""
    pairs = [cross_entropy(targets[i], logits[j], temperature).mean() for i in range(2) for j in range(len(logits)) if i != j]
    return sum(pairs) / len(pairs)


def koleo_loss(x):
    """− mean log distance to the nearest neighbour on the unit sphere (Sablayrolles et al. 2019), over all processes' samples. x (B, D)."""
    x = F.normalize(x.float(), dim=-1, eps=1e-8)
    if dist.is_initialized():
        x = torch.cat(dist_nn.all_gather(x))
    similarity = x @ x.T
    nearest = similarity.detach().fill_diagonal_(-2).argmax(1)
    return -torch.log((x - x[nearest]).norm(dim=1) + 1e-8).mean()


MASK_RATIOS = (0.1, 0.23, 0.37, 0.5)  # of the patches, in every second image: the same number of masked patches in each batch


def mask_counts(patches, images, first=0):
    """How many of its patches each of `images` images hides, MASK_RATIOS[i mod 4] of them for image 2i, none for odd ones; `first`:
    which image of the whole batch the first is."""
    return [round(MASK_RATIOS[i // 2 % 4] * patches) if i % 2 == 0 else 0 for i in range(first, first + images)]


def patch_masks(scores, first=0):
    """iBOT masks (B, N) bool from uniform scores (B, N), as many a row as mask_counts says."""
    counts = torch.tensor(mask_counts(scores.shape[1], len(scores), first), device=scores.device)
    return scores.argsort(1).argsort(1) < counts[:, None]


def view_sizes(args):
    """(size, scale) of the views of an image: two global crops, then the local ones."""
    return [(args.global_size, args.global_scale)] * 2 + [(args.local_size, args.local_scale)] * args.locals


def teacher_temperature(step, args):
    """Of the teacher's softmax: from --teacher-start, linear over --teacher-warmup steps."""
    share = min(1.0, step / args.teacher_warmup) if args.teacher_warmup else 1.0
    return args.teacher_start + share * (args.teacher_temperature - args.teacher_start)


def step_loss(student, teacher, centering, images, draws, args, run, temperature):
    """Equation (3) on images (b, 3, S, S) in [-1, 1], or on their crops [(b, 3, size, size)] as view_sizes; temperature: the teacher's.
    Returns the loss and its parts. `draws` gives all randomness."""
    def view(k, size, scale):
        crop = data.random_crops(images, size, scale, args.ratio, draws) if torch.is_tensor(images) else images[k]
        return data.colour_augment(crop, args.jitter, args.jitter_p, args.grey, args.blur[min(k, 2)], args.solarise if k == 1 else 0.0, draws)

    views = [view(k, *size) for k, size in enumerate(view_sizes(args))]
    b, global_crops, local_crops = len(views[0]), torch.cat(views[:2]), torch.cat(views[2:]) if args.locals else None
    mask = chosen = None
    if args.ibot > 0:
        first, n = run.share(args.batch_size).start, (args.global_size // args.patch) ** 2
        mask = torch.cat([patch_masks(draws.uniform(n), first) for _ in range(2)])  # (2b, N)
        chosen = torch.nonzero_static(mask.flatten(), size=2 * sum(mask_counts(n, b, first)))[:, 0]  # known size: no wait for the device
    with run.autocast():
        with torch.no_grad():
            t_views, t_patches, _ = teacher(global_crops, chosen=chosen)
        s_views, s_patches, out = student(global_crops, local_crops, mask, chosen)
    targets = lambda logits, kind: (centering[kind] if args.centering == "centre" else sinkhorn)(logits, temperature)
    per_view = lambda x: x.unflatten(0, (-1, b))  # (views · b, K) → (views, b, K)
    parts = {"dino": dino_loss(per_view(targets(t_views, "views")), per_view(s_views), args.student_temperature),
             "koleo": sum(koleo_loss(view) for view in out.chunk(2)) / 2}
    loss = parts["dino"] + args.koleo * parts["koleo"]
    if args.ibot > 0:
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1)  # every masked image counts the same, however many patches
        patches = cross_entropy(targets(t_patches, "patches"), s_patches, args.student_temperature)  # (n,)
        parts["ibot"] = (patches * weight.flatten()[chosen]).sum() / b  # half of the 2b views are masked
        loss = loss + args.ibot * parts["ibot"]
    return loss, parts


# ---------------------------------------------------------------------------------------------------------------------
# codes and report
# ---------------------------------------------------------------------------------------------------------------------

def build_backbone(config):
    """The ViT of a dict of settings (a checkpoint's config, or vars(args))."""
    keys = ("patch", "width", "depth", "heads", "codes", "values", "tau", "sem_read", "registers", "stem", "attention", "drop_path",
            "layer_scale", "sem_rank")
    return ViT(config["global_size"], **{k: config[k] for k in keys if k in config})


def build_student(config):
    """Backbone and head of a dict of settings; the student starts so, the teacher as its copy."""
    model = Student(build_backbone(config), DINOHead(config["width"], config["head_hidden"], config["bottleneck"], config["prototypes"]))
    model.backbone.mask_token.requires_grad_(config["ibot"] > 0)  # DDP waits for the gradient of everything that has one
    return model


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that DINOv2 sees, in [0, 1]


def from_transformers(state):
    """Names of transformers' Dinov2WithRegisters → those of DINOv2's release; queries, keys and values become one matrix."""
    names = {"embeddings.position_embeddings": "pos_embed", "embeddings.patch_embeddings.projection": "patch_embed.proj",
             "attention.output.dense": "attn.proj", "layer_scale": "ls", ".lambda1": ".gamma", "encoder.layer.": "blocks.", "layernorm.": "norm.",
             "embeddings.": ""}
    found, parts = {}, ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    for name, value in state.items():
        if parts[0] in name:
            name, value = name.replace(parts[0], "attn.qkv"), torch.cat([state.get(name.replace(parts[0], part), value[:0]) for part in parts])
        elif parts[1] in name or parts[2] in name:
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return found


def load_init(backbone, path):
    """Start from DINOv2's weights (a ViT with registers, as released or in transformers' names; a simplicial embedding in it is taken too).

    Positions are resized to the images at hand. DINOv2 sees images whose channels have mean 0 and deviation 1 over ImageNet, this ViT
    pixels in [-1, 1]: the difference goes into the patch projection.
    """
    state = data.read_weights(path)
    if any(name.startswith("embeddings.") for name in state):
        state = from_transformers(state)
    state = {name: value.float() for name, value in state.items() if not name.startswith(("dino_head.", "ibot_head.", "sem_cls_norm."))}
    own = backbone.state_dict()
    state = {name: value for name, value in own.items() if name.startswith("sem_")} | state
    if "pos_embed" in state and math.isqrt(state["pos_embed"].shape[1] - 1) ** 2 == state["pos_embed"].shape[1] - 1:
        state["pos_embed"] = resize_positions(state["pos_embed"], backbone.side)
    data.check_weights(path, state, own)
    mean, std, weight = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD), state["patch_embed.proj.weight"]
    state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + (weight * ((0.5 - mean) / std)[:, None, None]).sum((1, 2, 3))
    state["patch_embed.proj.weight"] = weight * (0.5 / std)[:, None, None]
    backbone.load_state_dict(state)


def lr_scale(args):
    """name → what its learning rate is multiplied by: --layer-decay for each block between it and the head, --patch-lr on patches."""
    def scale(name):
        name = name.removeprefix("backbone.")
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 0 if name.startswith(("patch_embed", "pos_embed", "cls_token", "mask_token", "register_tokens")) else args.depth + 1
        return args.layer_decay ** (args.depth + 1 - layer) * (args.patch_lr if name.startswith("patch_embed") else 1.0)

    return scale


def load_tokenizer(args, device):
    """The trained teacher from OUT/<dataset>/tokenizer.pt, ready to encode. Returns (backbone, config)."""
    model, state = data.load_stage("tokenizer", args, lambda state: build_student(state["config"]))
    return model.backbone.to(device).eval(), state["config"]


@torch.no_grad()
def centre_codes(backbone, dataset, config, run, most=4000):
    """Set the mean of z (L, V) that equation (2) subtracts, over training images: each value is chosen where it is unusually likely."""
    rows = torch.as_tensor(np.random.default_rng(0).permutation(dataset.splits["train"])[:most])
    means = []
    for part in rows.split(500):
        with run.autocast():
            z = backbone.logits(backbone.tokens(to_input(dataset.pixels(part), config, run)))
        means.append(z.float().view(len(part), backbone.L, backbone.V).sum(0))
    backbone.sem_centre.copy_(torch.stack(means).sum(0) / len(rows))


def to_input(images, config, run):
    """Bytes (B, 3, S, S) → floats in [-1, 1] on the device, at the size the ViT was trained on."""
    x = data.unit(images.to(run.device))
    if x.shape[-1] == config["global_size"]:
        return x
    return F.interpolate(x, size=config["global_size"], mode="bicubic", antialias=True)


def encode_images(backbone, images, config, run):
    """Codes (B, L) and features (B, D) of images (B, 3, S, S) uint8."""
    with run.autocast():
        return backbone.encode(to_input(images, config, run))


def encode_dataset(backbone, dataset, config, run, batch=500):
    """Codes (N, 2 flips, L) of the whole dataset and features (N, D) float16 of the unflipped images, as chunks that data.in_chunks
    keeps in a folder named after the tokenizer and the splits; returns their files."""
    def work(rows):
        codes, features = [], []
        for images in dataset.batches(rows, batch, config["workers"]):
            both = [encode_images(backbone, x, config, run) for x in (images, images.flip(3))]
            codes.append(torch.stack([c for c, _ in both], 1).cpu())
            features.append(both[0][1].half().cpu())
        return {"codes": torch.cat(codes).numpy().astype(data.code_type(config["values"])), "features": torch.cat(features).numpy()}

    run.wait()  # the first process may still be writing the tokenizer
    key = data.checksum([data.file_checksum(run.folder / "tokenizer.pt"), dataset.checksum])
    return data.in_chunks(run.folder / f".codes-{key[:16]}", len(dataset), run, work)


def linear_probe(x, y, sizes, tests, values=None):
    """Fit one linear softmax classifier a factor by L-BFGS; y (n, F) long, sizes: values a factor; x (n, d) features, or, with `values`,
    codes (n, L) long, which stand for their one-hot vectors (n, L · values) without these being made.

    tests {name: (x, y)} → {name: [accuracy a factor]}. Inputs are standardised by the training mean and deviation.
    """
    if values:
        first = torch.arange(x.shape[1], device=x.device) * values
        mean = torch.bincount((x + first).flatten(), minlength=len(first) * values) / len(x)
        std, times = (mean * (1 - mean)).sqrt(), lambda x, w: F.embedding_bag(x + first, w, mode="sum")
    else:
        mean, std, times = x.mean(0), x.std(0), lambda x, w: x @ w
    weight = torch.zeros(len(mean) + 1, sum(sizes), device=x.device, requires_grad=True)

    def scores(x):
        scaled = weight[1:] / (std + 1e-3)[:, None]
        return (times(x, scaled) - mean @ scaled + weight[0]).split(sizes, 1)

    optimizer = torch.optim.LBFGS([weight], max_iter=60, history_size=5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(s, y[:, k]) for k, s in enumerate(scores(x))) + 1e-4 * weight[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return {name: [(s.argmax(1) == ty[:, k]).float().mean().item() for k, s in enumerate(scores(tx))] for name, (tx, ty) in tests.items()}


def knn(x, y, sizes, tests, values=None, k=20):
    """Accuracy a factor of a vote of the k nearest training rows, by inner product or, for codes, equal positions; arguments as linear_probe."""
    result = {}
    near = (lambda part: -torch.cdist(part.float(), x.float(), p=0)) if values else (lambda part: part @ x.T)
    for name, (tx, ty) in tests.items():
        nearest = torch.cat([near(part).topk(min(k, len(x)), 1).indices for part in tx.split(500)])  # (n, k)
        result[name] = [(F.one_hot(y[nearest, f], sizes[f]).sum(1).argmax(1) == ty[:, f]).float().mean().item() for f in range(len(sizes))]
    return result


def report(dataset, codes, features, values, run, most=10_000):
    """Everything the tokenizer is judged by, on all splits but train: see the README's table for what each line means."""
    rng = np.random.default_rng(0)
    rows = {s: np.sort(rng.choice(r, most, replace=False)) if len(r) > most else np.array(r) for s, r in dataset.splits.items()}
    inputs = {"codes": (lambda r: torch.from_numpy(codes[r, 0].astype(np.int64)), values),
              "features": (lambda r: F.normalize(torch.from_numpy(features[r]).float(), dim=1), None)}
    train = codes[dataset.splits["train"].start:dataset.splits["train"].stop, 0]
    usage = np.stack([np.bincount(train[:, k], minlength=values) for k in range(train.shape[1])]) / len(train)  # (L, V)
    entropy = -(usage * np.log2(np.maximum(usage, 1e-12))).sum(1)
    result = {"values used": float((usage > 0).mean()), "entropy per position": float(entropy.mean()), "lowest entropy": float(entropy.min()),
              "distinct codes": len(np.unique(train, axis=0)) / len(train)}
    sizes = [len(v) for v in dataset.factors.values()]
    for name, (read, of) in inputs.items() if sizes else ():
        x, y = read(rows["train"]).to(run.device), dataset.labels[rows["train"]].to(run.device)
        tests = {s: (read(r).to(run.device), dataset.labels[r].to(run.device)) for s, r in rows.items() if s != "train"}
        for method, accuracies in (("linear", linear_probe(x, y, sizes, tests, of)), ("knn", knn(x, y, sizes, tests, of))):
            for split, values_ in accuracies.items():
                result[f"{method} on {name}, {split}"] = {f: round(a, 4) for f, a in zip(dataset.factors, values_)}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------

def block_flops(tokens, width, attention=True):
    """Forward FLOPs of one transformer block on one sample: MLP, then attention and its projections (a multiply-add counts 2)."""
    return 16 * tokens * width ** 2 + attention * (8 * tokens * width ** 2 + 4 * tokens ** 2 * width)


def training_flops(args):
    """FLOPs of one step: a global crop costs 4 forwards (3 student, 1 teacher), a local crop 3; heads and stem counted, norms not."""
    D, H = args.width, args.head_hidden
    head = 2 * (D * H + H ** 2 + H * args.bottleneck + args.bottleneck * args.prototypes)

    def view(size):
        side = size // args.patch
        n = side ** 2
        stem, channels = 0, 3
        for k in range(args.stem):
            stem, channels = stem + 2 * (size >> k + 1) ** 2 * 9 * channels * (32 << k), 32 << k
        patches = 2 * n * channels * (args.patch >> args.stem) ** 2 * D
        reads, inputs = (1, (1 + args.registers) * D) if args.sem_read == "registers" else (n, D)
        per_read = args.codes * args.values / (1 if args.sem_read == "registers" else (args.global_size // args.patch) ** 2)
        product = lambda a, b: args.sem_rank * (a + b) if args.sem_rank else a * b  # multiply-adds of a projection, whole or of a rank
        sem = reads * 2 * (product(inputs, per_read) + product(per_read, D))
        return stem + patches + args.depth * block_flops(n + 1 + args.registers, D, args.attention) + sem + head

    masked = sum(round(r * (args.global_size // args.patch) ** 2) for r in MASK_RATIOS) / 8 if args.ibot > 0 else 0  # a global view
    return args.batch_size * (2 * 4 * (view(args.global_size) + masked * head) + 3 * args.locals * view(args.local_size))


def add_flags(parser):
    """The tokenizer's own flags; the defaults are the shapes values."""
    g = parser.add_argument_group("model")
    g.add_argument("--patch", type=data.positive, default=8, help="patch side in pixels")
    g.add_argument("--width", type=data.positive, default=128, help="D, width of the tokens")
    g.add_argument("--depth", type=data.positive, default=2, help="transformer blocks")
    g.add_argument("--heads", type=data.positive, default=2, help="attention heads")
    g.add_argument("--attention", action=argparse.BooleanOptionalAction, default=False,
                   help="patches see each other; without it each patch is encoded on its own (only with --sem-read patches)")
    g.add_argument("--stem", type=data.whole, default=2, help="halving convolutions before the patch projection; 0: DINOv2's plain patches")
    g.add_argument("--layer-scale", type=data.number, default=1.0, help="start of the gains on residual branches")
    g.add_argument("--drop-path", type=data.share, default=0.0, help="probability of dropping a residual branch")
    g.add_argument("--codes", type=data.positive, default=16, help="L, code positions")
    g.add_argument("--values", type=data.positive, default=64, help="V, values per position")
    g.add_argument("--tau", type=data.above_zero, default=1.0, help="temperature of the SEM's softmax in training")
    g.add_argument("--registers", type=data.whole, default=0, help="register tokens beside CLS")
    g.add_argument("--sem-read", choices=("registers", "patches"), default="patches",
                   help="what the SEM reads: CLS and registers together (the paper), or each patch token its own positions")
    g.add_argument("--sem-rank", type=data.whole, default=0, help="rank of the SEM's two projections, which may outweigh the ViT; 0: full")
    g.add_argument("--init", metavar="FILE", help="start from DINOv2's weights (.pth, .safetensors, .index.json)")
    g.add_argument("--centre-codes", action=argparse.BooleanOptionalAction, default=True,
                   help="subtract the mean of z in equation (2); the paper does not")
    g = parser.add_argument_group("schedules")
    g.add_argument("--weight-decay-final", type=data.non_negative, help="weight decay at the end, by a cosine (default: constant)")
    g.add_argument("--layer-decay", type=data.share, default=1.0, help="learning rate of a block over that of the next")
    g.add_argument("--patch-lr", type=data.share, default=1.0, help="factor on the learning rate of the patch projection")
    g.add_argument("--teacher-start", type=data.above_zero, default=0.04, help="temperature of the teacher's softmax at the start, with --teacher-warmup")
    g.add_argument("--teacher-warmup", type=data.whole, default=0, help="steps in which it reaches --teacher-temperature")
    g = parser.add_argument_group("loss")
    g.add_argument("--head-hidden", type=data.positive, default=512, help="hidden width of the DINO head")
    g.add_argument("--bottleneck", type=data.positive, default=128, help="output width of the DINO head")
    g.add_argument("--prototypes", type=data.positive, default=512, help="K, prototypes of the DINO head")
    g.add_argument("--student-temperature", type=data.above_zero, default=0.1, help="temperature of the student's softmax")
    g.add_argument("--teacher-temperature", type=data.above_zero, default=0.02, help="temperature of the teacher's softmax")
    g.add_argument("--centering", choices=("sinkhorn", "centre"), default="sinkhorn", help="how the teacher's targets are kept from collapsing")
    g.add_argument("--momentum", type=data.share, default=0.98, help="of the teacher, rising to 1 by a cosine")
    g.add_argument("--ibot", type=data.non_negative, default=0.0, help="weight of the masked-patch loss; 0: none")
    g.add_argument("--koleo", type=data.non_negative, default=1.0, help="weight of KoLeo")
    g = parser.add_argument_group("views")
    g.add_argument("--global-size", type=data.positive, default=32, help="side of global crops in pixels")
    g.add_argument("--global-scale", type=data.share, nargs=2, default=[0.6, 1.0], help="share of the area of a global crop, from and to")
    g.add_argument("--ratio", type=data.share, default=0.9, help="smallest width / height of a crop; the largest is its inverse")
    g.add_argument("--locals", type=data.whole, default=0, help="local crops per image")
    g.add_argument("--local-size", type=data.positive, default=16, help="side of local crops in pixels")
    g.add_argument("--local-scale", type=data.share, nargs=2, default=[0.2, 0.5], help="share of the area of a local crop")
    g.add_argument("--jitter", type=data.share, nargs=4, default=[0.15, 0.15, 0.0, 0.0],
                   help="brightness, contrast, saturation, hue: largest change")
    g.add_argument("--jitter-p", type=data.share, default=0.8, help="probability of the jitter")
    g.add_argument("--grey", type=data.share, default=0.0, help="probability of grey")
    g.add_argument("--blur", type=data.share, nargs=3, default=[0.0] * 3, metavar=("FIRST", "SECOND", "LOCALS"),
                   help="probability of blur, on each global crop and on local ones")
    g.add_argument("--solarise", type=data.share, default=0.0, help="probability of solarisation, on the second global crop")


def check_flags(parser, args):
    """What argparse cannot see: sizes that must divide."""
    if args.width % args.heads:
        parser.error(f"argument --heads: {args.heads} does not divide --width {args.width}")
    if args.stem > 30 or args.patch % (1 << args.stem):
        parser.error(f"argument --stem: {args.stem} halvings do not fit in --patch {args.patch}")
    for name in ("global_size", "local_size"):
        if getattr(args, name) % args.patch:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is no multiple of --patch {args.patch}")
    if args.sem_read == "patches" and args.codes % (args.global_size // args.patch) ** 2:
        patches = (args.global_size // args.patch) ** 2
        parser.error(f"argument --codes: {args.codes} is no multiple of the {patches} patches that --sem-read patches reads")
    if not args.attention and (args.sem_read == "registers" or args.ibot > 0):
        parser.error("argument --attention: without it nothing sees other patches, which --sem-read registers and --ibot need; add --attention")
    if not 2 <= args.values < 2 ** 16:
        parser.error(f"argument --values: expected 2 to 65,535, got {args.values}")
    for name in ("global_scale", "local_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high:
            parser.error(f"argument --{name.replace('_', '-')}: expected two shares above 0, the smaller first, got {low} {high}")
    if args.ratio == 0:
        parser.error("argument --ratio: expected a number above 0")
    if args.weight_decay_final is not None and args.weight_decay == 0:
        parser.error("argument --weight-decay-final: only with a --weight-decay above 0 to start from")
    if args.init and args.stem:
        parser.error(f"argument --init: DINOv2's patches have no convolutions before them; add --stem 0 (it is {args.stem})")
    if args.accumulate != 1:
        parser.error("argument --accumulate: Sinkhorn and KoLeo look at the whole batch; use more processes instead")
    if args.ibot > 0 and args.batch_size % 8:
        parser.error(f"argument --batch-size: {args.batch_size} is no multiple of 8, the cycle of the iBOT masks")


def encoded(args, dataset):
    """Whether the code file and the report are there, whole, of this tokenizer and of these images."""
    try:
        about = data.open_codes(args)[1]
        data.check_images(about, dataset, args)
        return bool(data.read_report(about, args))
    except SystemExit:  # their way to say what is wrong; here it is mended
        return False


def main(argv=None):
    """Train the tokenizer, encode the dataset, report."""
    parser = data.make_parser(__doc__)
    data.add_training_flags(parser, steps=760, batch_size=256, lr=2e-3, lr_matrix=0.0, warmup=40, ema=None)
    add_flags(parser)
    args = data.parse(parser, PRESETS, argv)
    check_flags(parser, args)
    run = data.Run(args, lock="tokenizer")
    dataset = None if args.dry_run else data.load_dataset(args)
    flops, path = training_flops(args), run.folder / "tokenizer.pt"

    if args.dry_run:
        def loss(student):  # the moving average stands for the teacher's weights
            images = torch.zeros(args.batch_size // run.world, 3, args.global_size, args.global_size)
            centering = nn.ModuleDict({k: Centering(args.prototypes) for k in ("views", "patches")})
            return step_loss(student, student, centering, images, data.Draws(0, 0, run, args.batch_size), args, run, 0.05)[0]

        return data.describe(args, lambda: build_student(vars(args)), loss, flops, run)
    torch.manual_seed(args.seed)
    student = build_student(vars(args)).to(run.device)
    centering = nn.ModuleDict({k: Centering(args.prototypes) for k in ("views", "patches")}).to(run.device)
    optimizers = data.Optimizers(student, args, lr_scale(args))
    state = data.resume(path, "tokenizer", args)
    data.agree(**{"checksum of the images": dataset.checksum})
    if state and state["step"] < args.steps and state["trained_on"].get("images") != dataset.checksum:  # a finished one may encode others
        data.fail(f"{path}: begun on other images than {args.data_dir} holds now; bring those back, --restart to begin anew, or choose another --out")
    if args.init and not state:
        load_init(student.backbone, args.init)
    teacher_average = data.EMA(student, args.momentum)
    if state:
        data.restore(path, state, model=student, optimizer=optimizers, centering=centering)
    teacher = build_student(vars(args)).to(run.device)
    teacher_average.into(teacher.requires_grad_(False).eval())  # the averages are the teacher's own parameters from here on
    if state:
        data.restore(path, state, ema=teacher)  # averages and buffers, the centre of the codes among these

    def save(step):
        if run.main:
            data.save_checkpoint(path, stage="tokenizer", config=vars(args), step=step, model=student.state_dict(), ema=teacher.state_dict(),
                                 optimizer=optimizers.state_dict(), centering=centering.state_dict(), trained_on={"images": dataset.checksum})

    start = state["step"] if state else 0
    trained = run.wrap(student, args)
    log, meter = data.Log(run, "tokenizer", start, args.tensorboard), data.Meter(run, args, flops, start, args.batch_size)
    for step, rows, images in data.image_batches(dataset, run, args, start, view_sizes(args)):
        run.seed_step(args.seed, step)
        draws = data.Draws(args.seed, step, run, args.batch_size)
        images = data.unit(images) if torch.is_tensor(images) else [data.unit(crop) for crop in images]
        loss, parts = step_loss(trained, teacher, centering, images, draws, args, run, teacher_temperature(step, args))
        loss.backward()
        decay = None if args.weight_decay_final is None else data.cosine(step, args.steps, args.weight_decay, args.weight_decay_final)
        loss = run.average(loss.detach())
        norm = optimizers.step(data.warmup_cosine(step, args), step, loss, decay)
        teacher_average.decay = data.cosine(step, args.steps, args.momentum, 1.0)
        teacher_average.update(step)
        meter.tick(step, log, loss=loss, norm=norm, **parts)
        stopping = run.stopping()
        if step + 1 == args.steps and args.centre_codes:
            centre_codes(teacher.eval().backbone, dataset, vars(args), run)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stopping:
            save(step + 1)
        if stopping:
            return data.stopped(path, step + 1, args, run)
    meter.close()

    if start < args.steps or not encoded(args, dataset):
        chunks = encode_dataset(teacher.backbone, dataset, vars(args), run)
        if run.main:
            codes, features = (np.concatenate([data.read_chunk(path)[name] for path in chunks]) for name in ("codes", "features"))
            data.write_codes(run.folder, codes, args.values, dataset, report(dataset, codes, features, args.values, run))
            for folder in run.folder.glob(".codes-*"):
                shutil.rmtree(folder)
    if run.main:
        for name, value in data.read_report(data.open_codes(args)[1], args).items():
            line = " ".join(f"{k} {v:.3f}" for k, v in value.items()) if isinstance(value, dict) else f"{value:.3f}"
            print(f"{name:44} {line}")
    run.close()


if __name__ == "__main__":
    data.command(main)
