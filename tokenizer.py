"""Stage 1: images → codes. A ViT with a simplicial embedding (SEM), trained by self-distillation (DINOv2).

The SEM turns the tokens h that it reads into L points on a simplex and back (paper, section 3.1):
    z = LayerNorm(W_in · h) as (L, V)   p = softmax(z / tau) over V   out = Norm(W_out · p)                (1)
The paper reads CLS and registers together (--sem-read registers). On shapes each patch is read on its own,
L / N positions a patch, out = Norm(mean over patches of W_out · p); the last --colour-codes positions of a
patch see which colours are in it and nothing else, the others see it without hue.
    code_l = the nearest of V means of z_l over training images, by k-means (--nearest)                    (2)
or argmax_v z_lv, as in the paper; less the mean of z_lv over training images (--centre-codes), else few
values are used.
Training (DINO on `out`, iBOT on masked patches, KoLeo spreads the batch; t_k, s_k: what the teacher, a moving
average of the student, and the student give the head's prototype k):
    loss = − Σ_k t_k log s_k, mean over pairs of views + ibot · the same on masked patches                 (3)
           − koleo · mean log distance to the nearest other image, summed over the two global crops
With --colour-codes `out` is of form alone for a share --alone of the images, for as many of colour alone.

Reads images; writes OUT/<dataset>/tokenizer.pt and codes.pt: codes (N, 2 flips, L) and a report on them.
    python tokenizer.py                                                      # the dataset shapes, on a CPU
    python tokenizer.py --dataset cifar10                                    # one GPU
    torchrun --nproc-per-node 8 tokenizer.py --dataset imagenet              # a node
"""
import argparse
import functools
import math
import shutil
import sys
from collections import OrderedDict

import data  # first: it sets the threads' waiting policy before torch starts them
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

PRESETS = {
    "cifar10": dict(
        patch=4, width=384, depth=8, heads=6, attention=True, registers=4, codes=64, values=64,
        colour_codes=0, nearest=False, prototypes=4096, teacher_temperature=0.04, ibot=1.0, koleo=0.05,
        global_scale=[0.4, 1.0], ratio=0.75, locals=4, local_scale=[0.1, 0.4],
        jitter=[0.4, 0.4, 0.2, 0.1], grey=0.2, solarise=0.2,
        steps=40_000, batch_size=512, lr=1e-3, momentum=0.992, warmup=2000),
    "folder": dict(
        values=64, colour_codes=0, nearest=False, prototypes=1024,
        global_scale=[0.5, 1.0], ratio=0.75, jitter=[0.2, 0.2, 0.1, 0.05],
        steps=2000, batch_size=128, save_every=250),
    "imagenet": dict(
        image_size=256, patch=14, stem=0, width=1024, depth=24, heads=16, attention=True, registers=4,
        layer_scale=1e-5, drop_path=0.3, codes=512, values=256, sem_read="registers",
        colour_codes=0, nearest=False, centre_codes=False,
        head_hidden=2048, bottleneck=256, prototypes=65_536, ibot=1.0, koleo=0.1,
        centering="centre", teacher_temperature=0.07, teacher_start=0.04, teacher_warmup=37_500,
        global_size=224, global_scale=[0.32, 1.0], ratio=0.75,
        locals=8, local_size=98, local_scale=[0.05, 0.32],
        jitter=[0.4, 0.4, 0.2, 0.1], grey=0.2, blur=[1.0, 0.1, 0.5], solarise=0.2,
        steps=125_000, batch_size=256, lr=5e-5, lr_final=0.02, beta2=0.999, momentum=0.992, warmup=12_500,
        weight_decay=0.04, weight_decay_final=0.4, layer_decay=0.9, patch_lr=0.2,
        save_every=5000, workers=12),
}

# -------- model (names and arithmetic of DINOv2 with registers) ----------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention without mask. (B, N, D) → (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 × (B, H, N, D/H)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block, without attention an MLP on each token. (B, N, D) → (B, N, D)."""

    def __init__(self, width, heads, attention, drop_path, layer_scale):
        super().__init__()
        self.attention, self.drop_path = attention, drop_path
        if attention:
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
            self.attn = Attention(width, heads)
            self.ls1 = nn.ParameterDict({"gamma": torch.full((width,), layer_scale)})  # LayerScale
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width),
            gelu=nn.GELU(),
            fc2=nn.Linear(4 * width, width)))
        self.ls2 = nn.ParameterDict({"gamma": torch.full((width,), layer_scale)})

    def drop(self, branch):
        """In training, drop the whole branch of some samples, keeping the mean (drop-path)."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)

    def forward(self, x):
        if self.attention:
            x = x + self.drop(self.attn(self.norm1(x)) * self.ls1["gamma"])  # (B, N, D)
        return x + self.drop(self.mlp(self.norm2(x)) * self.ls2["gamma"])  # (B, N, D)


def patch_embedding(patch, width, stem, channels=3):
    """Embeds patches: (B, channels, S, S) → (B, D, S / patch, S / patch)."""
    layers = []
    for k in range(stem):  # these help small images
        wider = 32 << k
        halving = nn.Conv2d(channels, wider, 3, stride=2, padding=1)
        layers += [halving, nn.GroupNorm(1, wider), nn.GELU()]
        channels = wider
    proj = nn.Conv2d(channels, width, patch >> stem, stride=patch >> stem)
    return nn.Sequential(OrderedDict(stem=nn.Sequential(*layers), proj=proj))


LUMA = (0.299, 0.587, 0.114)
YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # brightness and two axes of chroma


def luma(x):
    """Perceived brightness (B, 1, S, S) of RGB (B, 3, S, S)."""
    weights = torch.tensor(LUMA, device=x.device)[:, None, None]
    return (x * weights).sum(1, keepdim=True)


def without_hue(x, patch):
    """Images (B, 3, S, S) without their hues, (B, 2, S, S): how coloured a pixel is beside the most
    coloured one of its patch, and how bright where it is grey."""
    spread = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)  # (B, 1, S, S), 0 where grey
    most = F.interpolate(F.max_pool2d(spread, patch), scale_factor=patch)
    coloured = spread / (most + 0.1)
    return torch.cat([coloured, luma(x) * (1 - coloured)], 1)


class ColourEmbedding(nn.Module):
    """Which colours a patch has, not where nor how much of each: the largest values in it of linear functions
    of chroma, then an MLP. (B, 3, S, S) → (B, D, S / patch, S / patch)."""

    def __init__(self, patch, width):
        super().__init__()
        self.patch = patch
        self.axes = nn.Conv2d(2, 64, 1)
        self.mlp = nn.Sequential(nn.Conv2d(64, 256, 1), nn.GELU(), nn.Conv2d(256, width, 1))

    def forward(self, x):
        to_chroma = torch.tensor(YIQ[1:], device=x.device)
        chroma = torch.einsum("cj,bjhw->bchw", to_chroma, F.avg_pool2d(x, 2))  # (B, 2, S / 2, S / 2)
        return self.mlp(F.max_pool2d(self.axes(chroma), self.patch // 2))


def resize_positions(positions, side):
    """Position embeddings of CLS and patches for another image size: (1, 1 + N, D) → (1, 1 + side², D)."""
    own = math.isqrt(positions.shape[1] - 1)
    if side == own:
        return positions
    grid = positions[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)  # (1, D, own, own)
    grid = F.interpolate(grid.float(), size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


class ViT(nn.Module):
    """Vision transformer with registers, and the simplicial embedding of equation (1). The last
    `colour_codes` positions of each patch read its colours, the others see no hue."""

    def __init__(self, image_size, patch, width, depth, heads, codes, values, tau, sem_read, registers,
                 stem=0, attention=True, drop_path=0.0, layer_scale=1e-5, colour_codes=0, nearest=False):
        super().__init__()
        self.L, self.V, self.tau, self.sem_read = codes, values, tau, sem_read
        self.image_size, self.side = image_size, image_size // patch
        self.patch, self.colour_codes = patch, colour_codes
        self.first_patch = 1 + registers  # of the tokens
        self.patch_embed = patch_embedding(patch, width, stem, channels=2 if colour_codes else 3)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side ** 2, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, attention, drop_path, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if sem_read == "registers":  # CLS and registers together
            reads, inputs = 1, (1 + registers) * width
        else:  # each patch on its own
            reads, inputs = self.side ** 2, width
        sem_width = codes // reads * values  # of all simplices of a read
        colour_width = colour_codes * values
        self.sem_embed = nn.Linear(inputs, sem_width - colour_width, bias=False)
        self.sem_norm = nn.LayerNorm(sem_width - colour_width, eps=1e-6)
        if colour_codes:
            self.colour_embed = ColourEmbedding(patch, width)
            self.sem_colour = nn.Sequential(nn.Linear(width, colour_width, bias=False),
                                            nn.LayerNorm(colour_width, eps=1e-6))
        self.sem_out = nn.Linear(sem_width, width, bias=False)
        self.register_buffer("sem_centre", torch.zeros(codes, values))  # of z, set by fit_codes
        self.nearest = nearest
        if nearest:
            self.register_buffer("sem_means", torch.zeros(codes, values, values))  # V means of z
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 if width >= 384 else width ** -0.5 / 1.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for p in (self.pos_embed, self.cls_token, self.register_tokens):
            nn.init.normal_(p, std=0.02)

    def tokens(self, images, mask=None):
        """CLS, R registers and N patches (B, 1 + R + N, D), not normalised; with colour positions also the
        patches' colours (B, 1 + R + 2N, D). mask (B, N) bool hides patches."""
        seen = without_hue(images, self.patch) if self.colour_codes else images
        x = self.patch_embed(seen).flatten(2).transpose(1, 2)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        pos = resize_positions(self.pos_embed, math.isqrt(x.shape[1]))  # (1, 1 + N, D)
        first = torch.cat([self.cls_token + pos[:, :1], self.register_tokens], 1)  # (1, 1 + R, D)
        x = torch.cat([first.expand(len(x), -1, -1), x + pos[:, 1:]], 1)  # (B, 1 + R + N, D)
        for block in self.blocks:
            x = block(x)
        if self.colour_codes:
            colours = self.colour_embed(images).flatten(2).transpose(1, 2)  # (B, N, D)
            x = torch.cat([x, F.gelu(colours + pos[:, 1:])], 1)  # (B, 1 + R + 2N, D)
        return x

    def logits(self, x):
        """z of equation (1) from `tokens`: (B, 1, L · V), or read by patch (B, N, L / N · V)."""
        if self.sem_read == "registers":
            h = x[:, :self.first_patch].flatten(1)[:, None]  # (B, 1, (1 + R) · D)
        else:
            h = x[:, self.first_patch:]  # (B, N, D), with colour positions (B, 2N, D)
        if self.colour_codes:
            h, colours = h.chunk(2, 1)  # 2 × (B, N, D)
            return torch.cat([self.sem_norm(self.sem_embed(h)), self.sem_colour(colours)], 2)
        return self.sem_norm(self.sem_embed(h))

    def forward(self, images, mask=None, shown=None):
        """out (B, D) of equation (1) and the normalised patches (B, N, D), with colour positions (B, 2N, D).
        shown (b, L / N) bool: which positions of a patch count, in all views of b images."""
        x = self.tokens(images, mask)
        z = self.logits(x)
        p = (z.unflatten(-1, (-1, self.V)).float() / self.tau).softmax(-1)  # (B, 1, L, V) or (B, N, L / N, V)
        if shown is not None:
            p = p * shown.repeat(len(p) // len(shown), 1)[:, None, :, None]  # (B, 1, L / N, 1)
        out = self.sem_out(p.flatten(-2).to(z.dtype)).mean(1)  # (B, D)
        return self.norm(out), self.norm(x[:, self.first_patch:])

    @torch.no_grad()
    def encode(self, images):
        """Codes (B, L) long, equation (2), and features (B, D): CLS or the mean patch, as the SEM reads."""
        x = self.tokens(images)
        z = self.logits(x).float().view(len(x), self.L, self.V)
        normal = self.norm(x).float()
        if self.sem_read == "registers":
            features = normal[:, 0]  # (B, D)
        else:
            features = normal[:, self.first_patch:].mean(1)  # (B, D)
        if self.nearest:
            return torch.cdist(z.transpose(0, 1), self.sem_means).argmin(-1).T, features
        return (z - self.sem_centre).argmax(-1), features


class DINOHead(nn.Module):
    """MLP, then cosine similarity to K prototypes. (..., D) → (..., K)."""

    def __init__(self, width, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) * bottleneck ** -0.5)

    def forward(self, x):
        x = F.normalize(self.mlp(x).float(), dim=-1, eps=1e-6)  # (..., bottleneck)
        return F.linear(x, F.normalize(self.prototypes, dim=-1))  # (..., K)


class Student(nn.Module):
    """Backbone and head. One call does all views: DDP allows one a step."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views, mask=None, chosen=None, shown=None):
        """views [(B, 3, size, size), ...], two global crops first, mask (2B, N) bool on these, chosen (n,) of
        their 2B · N patches, shown as in ViT → head outputs of all views (views · B, K) and of the chosen
        patches (n, K) or None, and out (2B, D) of the global crops."""
        out, patches = self.backbone(torch.cat(views[:2]), mask, shown)  # (2B, D), (2B, N, D)
        of_views = out
        if len(views) > 2:
            of_views = torch.cat([out, self.backbone(torch.cat(views[2:]), shown=shown)[0]])
        of_chosen = None if chosen is None else self.head(patches.flatten(0, 1)[chosen])
        return self.head(of_views), of_chosen, out


# -------- views ----------------------------------------------------------------------------------------

def view_sizes(args):
    """[(size, share of the area from and to), ...] of two global crops, then local ones."""
    return [(args.global_size, args.global_scale)] * 2 + [(args.local_size, args.local_scale)] * args.locals


def crop_boxes(u, scale, ratio, aspect=1.0):
    """Random resized crops, from u (..., 5) uniform: centre x, y in [-1, 1], width and height as shares of
    the image's, and whether to mirror, each (...). ratio: least width / height; aspect: the image's."""
    area = scale[0] + (scale[1] - scale[0]) * u[..., 0]
    relative = torch.exp((2 * u[..., 1] - 1) * math.log(ratio)) / aspect  # width / height, in shares
    width = (area * relative).sqrt().clamp(max=1)
    height = (area / relative).sqrt().clamp(max=1)
    x = (1 - width) * (2 * u[..., 2] - 1)
    y = (1 - height) * (2 * u[..., 3] - 1)
    return x, y, width, height, u[..., 4] < 0.5


def read_crops(path, u, views, ratio, flip=True):
    """Random resized crops of an image file, [(3, size, size) uint8, ...], from u (views, 5) uniform, views
    as view_sizes; flip: some mirrored. Raises as data.open_image."""
    def boxes(w, h):
        return [crop_boxes(u_k, scale, ratio, w / h) for u_k, (_, scale) in zip(u, views)]

    def least_scale(w, h):  # at which every crop still has the pixels it needs
        sides = [min(width * w, height * h) for _, _, width, height, _ in boxes(w, h)]
        return min(1.0, max(size / side for side, (size, _) in zip(sides, views)))

    crops = []
    image = data.open_image(path, least_scale)
    w, h = image.size
    for (x, y, width, height, mirror), (size, _) in zip(boxes(w, h), views):
        left = (1 + x - width) / 2 * w
        top = (1 + y - height) / 2 * h
        right = (left + width * w).clamp(max=w)
        bottom = (top + height * h).clamp(max=h)
        box = torch.stack([left, top, right, bottom]).clamp(min=0).tolist()
        crop = data.to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
        crops.append(crop.flip(2) if mirror and flip else crop)
    return crops


def random_crops(images, size, scale, ratio, part):
    """A random resized crop of each image, bilinear: (B, 3, S, S) → (B, 3, size, size)."""
    x, y, width, height, mirror = crop_boxes(part.uniform(5), scale, ratio)
    zero = torch.zeros_like(x)
    width = width * torch.where(mirror & part.flip, -1.0, 1.0)
    box = torch.stack([width, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(box, (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def colour_jitter(x, jitter, part):
    """Change brightness, contrast, saturation, hue of (B, 3, S, S) in [0, 1]."""
    factors = (1 + (2 * part.uniform(1, 1, 1) - 1) * most for most in jitter)  # 4 × (B, 1, 1, 1)
    brightness, contrast, saturation, turn = factors
    y = (x * brightness).clamp(0, 1)
    mean = luma(y).mean((2, 3), keepdim=True)
    y = ((y - mean) * contrast + mean).clamp(0, 1)
    grey = luma(y)
    y = ((y - grey) * saturation + grey).clamp(0, 1)
    if jitter[3] == 0:
        return y
    angle = (turn.flatten() - 1) * 2 * math.pi  # (B,), by which the two axes of chroma are rotated
    rotation = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2] = -angle.sin()
    rotation[:, 2, 1] = angle.sin()
    to_yiq = torch.tensor(YIQ, device=x.device)
    return torch.einsum("bij,bjhw->bihw", to_yiq.inverse() @ rotation @ to_yiq, y).clamp(0, 1)


def blur(x, part):
    """Gaussian blur of images (B, 3, S, S), each of its own width: deviation 0.1 to 2 pixels of 224."""
    b, side = len(x), x.shape[-1]
    sigma = (0.1 + 1.9 * part.uniform(1, 1, 1)) * side / 224
    radius = max(1, round(4 * side / 224))
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-offsets ** 2 / (2 * sigma.view(b, 1) ** 2 + 1e-8))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3B, taps), for each channel
    flat = F.pad(x.reshape(1, 3 * b, side, side), (radius,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=3 * b)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=3 * b)
    return flat.view_as(x)


def colour_augment(images, view, args, part):
    """Jitter, grey, blur and solarise (B, 3, S, S) in [-1, 1], each with its probability in this view."""
    def chosen(probability):
        return part.uniform(1, 1, 1) < probability  # (B, 1, 1, 1)

    x = (images + 1) / 2
    if args.jitter_p > 0 and any(args.jitter):
        x = torch.where(chosen(args.jitter_p), colour_jitter(x, args.jitter, part), x)
    if args.grey > 0:
        x = torch.where(chosen(args.grey), luma(x), x)
    blur_p = args.blur[min(view, 2)]
    if blur_p > 0:
        x = torch.where(chosen(blur_p), blur(x, part), x)
    if args.solarise > 0 and view == 1:
        x = torch.where(chosen(args.solarise) & (x >= 0.5), 1 - x, x)
    return x * 2 - 1


def make_views(images, args, part):
    """The views of view_sizes, [(b, 3, size, size), ...] in [-1, 1], of images (b, 3, S, S) uint8, or of
    [(b, 3, size, size), ...] uint8 that read_crops has cut from them."""
    views = []
    for view, (size, scale) in enumerate(view_sizes(args)):
        if torch.is_tensor(images):
            crop = random_crops(data.from_bytes(images), size, scale, args.ratio, part)
        else:
            crop = data.from_bytes(images[view])
        views.append(colour_augment(crop, view, args, part))
    return views


RECTANGLES = 16  # of a mask, at most


def mask_counts(patches, batch_size, seed, step):
    """How many patches iBOT hides of each image: of one global crop none, of the other 10 to 50 %, evenly
    spread over the batch. (2, batch_size) long, on the CPU."""
    generator = torch.Generator().manual_seed(data.mix_seed(seed, step, "masks"))
    share = 0.1 + 0.4 * (torch.randperm(batch_size, generator=generator) + 0.5) / batch_size
    counts = (share * patches).round().long().clamp(min=1)
    first = torch.rand(batch_size, generator=generator) < 0.5  # whether the first crop is the one
    return torch.stack([counts * first, counts * ~first])


def draw_masks(args, part, step):
    """What iBOT hides of the N = side² patches of the two global crops: (2b, N) bool, and where that is in
    the flattened masks, (n,). Rectangles (BEiT) are hidden one after the other, of the last one some patches,
    until they are as many as mask_counts says."""
    side = args.global_size // args.patch
    counts = mask_counts(side ** 2, args.batch_size, args.seed, step)[:, part.whole].flatten()  # (2b,)
    u = torch.cat([part.uniform(RECTANGLES, 4) for _ in range(2)])  # (2b, RECTANGLES, 4)
    ties = torch.cat([part.uniform(side ** 2) for _ in range(2)])  # (2b, N)
    least = 4 / side ** 2
    area = least + u[..., 0] * max(0.0, 1 / 3 - least)
    ratio = torch.exp((2 * u[..., 1] - 1) * math.log(0.3))
    width = (area * ratio).sqrt().clamp(max=1)[..., None, None]
    height = (area / ratio).sqrt().clamp(max=1)[..., None, None]
    left = (1 - width) * u[..., 2, None, None]
    top = (1 - height) * u[..., 3, None, None]
    grid = (torch.arange(side, device=u.device) + 0.5) / side
    across = (grid - left - width / 2).abs() <= width / 2  # (2b, RECTANGLES, 1, side)
    down = (grid[:, None] - top - height / 2).abs() <= height / 2  # (2b, RECTANGLES, side, 1)
    covers = across & down  # (2b, RECTANGLES, side, side)
    everywhere = torch.ones_like(covers[:, :1])  # after all rectangles
    covers = torch.cat([covers, everywhere], 1)  # (2b, RECTANGLES + 1, side, side)
    first = covers.float().argmax(1).flatten(1)  # (2b, N), the first that covers a patch
    rank = (first + ties).argsort(1).argsort(1)
    mask = rank < counts.to(u.device)[:, None]
    hidden = int(counts.sum())  # known without asking the device
    return mask, torch.nonzero_static(mask.flatten(), size=hidden)[:, 0]


def draw_shown(args, part):
    """Which positions of a patch count, (b, L / N) bool: of a share --alone of the images those of form only,
    of as many those of colour only, else all."""
    per_patch = args.codes // (args.global_size // args.patch) ** 2
    colour = torch.arange(per_patch, device=part.device) >= per_patch - args.colour_codes
    u = part.uniform(1)  # (b, 1)
    return torch.where(colour, u >= args.alone, u < 1 - args.alone)


# -------- loss -----------------------------------------------------------------------------------------

def over_processes(x, operation=dist.ReduceOp.SUM):
    """Sum, or another `operation`, of a tensor over processes, in place, without gradient."""
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


@torch.no_grad()
def sinkhorn(logits, temperature, iterations=3):
    """Teacher targets (n, K) from logits (n, K), all prototypes used equally often (SwAV)."""
    logits = logits.float() / temperature
    q = torch.exp(logits - over_processes(logits.max(), dist.ReduceOp.MAX))  # (n, K)
    for _ in range(iterations):
        q = q / over_processes(q.sum(0, keepdim=True)).clamp(min=1e-30)  # each prototype the same mass
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)  # each sample a distribution
    return q


class Centering(nn.Module):
    """Teacher targets softmax((logits − centre) / temperature), (n, K) → (n, K); the centre is a moving
    average of the teacher's mean logits (DINO)."""

    def __init__(self, prototypes, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, logits, temperature):
        logits = logits.float()
        targets = ((logits - self.centre) / temperature).softmax(-1)
        count = over_processes(logits.new_tensor(float(len(logits))))  # processes hide unequally many patches
        mean = over_processes(logits.sum(0, keepdim=True)) / count
        self.centre.lerp_(mean, 1 - self.momentum)
        return targets


def cross_entropy(targets, logits, temperature):
    """− Σ_k t_k log s_k of equation (3), s = softmax(logits / temperature): (..., K), (..., K) → (...)."""
    return -(targets * F.log_softmax(logits.float() / temperature, -1)).sum(-1)


def dino_loss(targets, logits, temperature):
    """Mean over pairs of a teacher's view (2, B, K) and another of the student (views, B, K)."""
    pairs = [cross_entropy(targets[i], logits[j], temperature).mean()
             for i in range(2) for j in range(len(logits)) if i != j]
    return sum(pairs) / len(pairs)


def koleo_loss(x):
    """− mean log distance of x (B, D) to the nearest on the sphere (Sablayrolles et al. 2019)."""
    x = F.normalize(x.float(), dim=-1, eps=1e-8)
    if dist.is_initialized():
        x = torch.cat(dist_nn.all_gather(x))
    similarity = x @ x.T
    nearest = similarity.detach().fill_diagonal_(-2).argmax(1)
    neighbours = F.embedding(nearest, x)  # x[nearest], whose gradient would add rows in any order
    return -torch.log((x - neighbours).norm(dim=1) + 1e-8).mean()


def teacher_temperature(step, args):
    """Of the teacher's softmax: from --teacher-start, linear over --teacher-warmup steps."""
    progress = step / args.teacher_warmup if step < args.teacher_warmup else 1.0
    return args.teacher_start + progress * (args.teacher_temperature - args.teacher_start)


def step_loss(student, teacher, centering, images, part, args, run, step):
    """Equation (3) and its terms by name, on images as in make_views."""
    def targets_of(logits, kind):
        method = centering[kind] if args.centering == "centre" else sinkhorn
        return method(logits, teacher_temperature(step, args))

    views = make_views(images, args, part)
    b = len(views[0])
    mask, chosen = draw_masks(args, part, step) if args.ibot > 0 else (None, None)  # (2b, N), (n,)
    shown = draw_shown(args, part) if args.colour_codes else None  # (b, L / N)
    with run.autocast():
        with torch.no_grad():
            t_views, t_patches, _ = teacher(views[:2], chosen=chosen, shown=shown)
        s_views, s_patches, out = student(views, mask, chosen, shown)

    targets = targets_of(t_views, "views").unflatten(0, (2, b))  # (2, b, K)
    dino = dino_loss(targets, s_views.unflatten(0, (-1, b)), args.student_temperature)
    koleo = sum(koleo_loss(view) for view in out.chunk(2))
    terms = {"dino": dino, "koleo": koleo}
    loss = dino + args.koleo * koleo
    if args.ibot > 0:
        targets = targets_of(t_patches, "patches")  # (n, K)
        of_patches = cross_entropy(targets, s_patches, args.student_temperature)  # (n,)
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1)  # every masked crop counts the same
        terms["ibot"] = (of_patches * weight.flatten()[chosen]).sum() / (2 * b)
        loss = loss + args.ibot * terms["ibot"]
    return loss, terms


# -------- codes and report -----------------------------------------------------------------------------

def build_student(config):
    """The student of a dict of settings (a checkpoint's config)."""
    keys = ("patch", "width", "depth", "heads", "codes", "values", "tau", "sem_read", "registers", "stem",
            "attention", "drop_path", "layer_scale", "colour_codes", "nearest")
    given = {key: config[key] for key in keys if key in config}  # earlier checkpoints lack the last two
    backbone = ViT(config["global_size"], **given)  # the size of what it sees in training
    backbone.mask_token.requires_grad_(config["ibot"] > 0)  # DDP waits for every gradient
    head = DINOHead(config["width"], config["head_hidden"], config["bottleneck"], config["prototypes"])
    return Student(backbone, head)


def load_tokenizer(args, device):
    """The trained teacher's backbone from OUT/<dataset>/tokenizer.pt."""
    path = data.run_folder(args) / "tokenizer.pt"
    remedy = "train it with " + data.script_command("tokenizer.py", args)
    state = data.load_trained(path, "tokenizer", args.dataset, remedy)
    with data.reading(path, remedy):
        model = build_student(state["config"])
        model.load_state_dict(state["ema"])
    return model.backbone.to(device).eval()


def to_input(images, backbone, run):
    """Bytes (B, 3, S, S) → what the ViT takes: in [-1, 1], of the size it was trained on."""
    x = data.from_bytes(images.to(run.device))
    if x.shape[-1] == backbone.image_size:
        return x
    return F.interpolate(x, size=backbone.image_size, mode="bicubic", antialias=True)


def encode_images(backbone, images, run):
    """Codes (B, L) long and features (B, D) of images (B, 3, S, S) uint8."""
    with run.autocast():
        return backbone.encode(to_input(images, backbone, run))


def k_means(z, count, rounds=25):
    """Means (L, count, V) of z (L, n, V) at each position: k-means++, Lloyd, always the same."""
    rng = torch.Generator().manual_seed(0)
    means = z[:, :1]
    for _ in range(count - 1):  # the next one is a point far from all so far
        far = torch.cdist(z, means).amin(2).square() + 1e-9  # (L, n)
        chosen = torch.multinomial(far, 1, generator=rng)[..., None].expand(-1, -1, z.shape[2])
        means = torch.cat([means, z.gather(1, chosen)], 1)
    for _ in range(rounds):
        member = F.one_hot(torch.cdist(z, means).argmin(2), count).float()  # (L, n, count)
        n = member.sum(1)[..., None]  # (L, count, 1)
        means = torch.where(n > 0, member.transpose(1, 2) @ z / n.clamp(min=1), means)
    return means


@torch.no_grad()
def fit_codes(backbone, dataset, run, most=4000):
    """Set the mean of z (L, V) over `most` training images, and with --nearest the V means that k-means finds
    at each position."""
    rows = torch.as_tensor(np.random.default_rng(0).permutation(dataset.splits["train"])[:most])
    kept = []
    for chunk in rows.split(500):
        with run.autocast():
            z = backbone.logits(backbone.tokens(to_input(dataset.pixels(chunk), backbone, run)))
        kept.append(z.float().view(len(chunk), backbone.L, backbone.V).cpu())
    backbone.sem_centre.copy_(torch.stack([z.sum(0) for z in kept]).sum(0) / len(rows))
    if backbone.nearest:
        backbone.sem_means.copy_(k_means(torch.cat(kept).transpose(0, 1), backbone.V))


def linear_probe(x, y, sizes, values=None):
    """Fit a linear softmax classifier of each factor by L-BFGS to features x (n, d), or to codes (n, L) long
    of so many `values`, as one-hot vectors that are never made. y (n, factors) long; sizes: values a factor.
    Returns a function x → scores, [(n, size), ...] by factor."""
    if values:
        first = torch.arange(x.shape[1], device=x.device) * values  # of each position
        mean = torch.bincount((x + first).flatten(), minlength=len(first) * values) / len(x)
        std = (mean * (1 - mean)).sqrt()
    else:
        mean, std = x.mean(0), x.std(0)
    weight = torch.zeros(len(mean) + 1, sum(sizes), device=x.device, requires_grad=True)

    def scores(x):
        """(x − mean) / std times the weights, plus the bias, which is their first row."""
        scaled = weight[1:] / (std + 1e-3)[:, None]
        product = F.embedding_bag(x + first, scaled, mode="sum") if values else x @ scaled  # (n, Σ sizes)
        return (product - mean @ scaled + weight[0]).split(sizes, 1)  # factors × (n, size)

    def closure():
        optimizer.zero_grad()
        nll = sum(F.cross_entropy(logits, y[:, k]) for k, logits in enumerate(scores(x)))
        loss = nll + 1e-4 * weight[1:].square().sum()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([weight], max_iter=60, history_size=5, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    return scores


def report(dataset, codes, features, values, run, most=10_000):
    """What the tokenizer is judged by: the use of values in train, and the accuracy on the other splits of
    linear probes fitted to train, with up to `most` images of each split. codes (N, 2, L) unsigned, features
    (N, D)."""
    train = dataset.splits["train"]
    train_codes = codes[train.start:train.stop, 0]  # (n, L)
    counts = [torch.bincount(position.long(), minlength=values) for position in train_codes.T]
    usage = torch.stack(counts).double() / len(train)  # (L, V)
    entropy = -(usage * usage.clamp(min=1e-12).log2()).sum(1)  # (L,)
    result = {"values used": (usage > 0).double().mean().item(),
              "entropy per position": entropy.mean().item(),
              "lowest entropy": entropy.min().item(),
              "distinct codes": len(np.unique(train_codes.numpy(), axis=0)) / len(train)}
    if not dataset.factors:
        return result
    rng = np.random.default_rng(0)
    rows = {split: np.sort(rng.choice(whole, min(most, len(whole)), replace=False))
            for split, whole in dataset.splits.items()}
    sizes = [len(names) for names in dataset.factors.values()]
    for name in ("codes", "features"):
        x, y = {}, {}
        for split, chosen in rows.items():
            if name == "codes":
                x[split] = codes[chosen, 0].long().to(run.device)
            else:
                x[split] = F.normalize(features[chosen].float(), dim=1).to(run.device)
            y[split] = dataset.labels[chosen].to(run.device)
        scores = linear_probe(x.pop("train"), y.pop("train"), sizes, values if name == "codes" else None)
        for split in x:
            found = torch.stack([logits.argmax(1) for logits in scores(x[split])], 1)  # (n, factors)
            right = (found == y[split]).float().mean(0).tolist()
            accuracies = {factor: round(value, 4) for factor, value in zip(dataset.factors, right)}
            result[f"linear on {name}, {split}"] = accuracies | {"n": len(y[split])}
    return result


def write_codes(backbone, dataset, run, args, made_from, batch=500):
    """Encode the dataset into OUT/<dataset>/codes.pt, with its report, or go on with that."""
    path = run.folder / "codes.pt"
    if data.is_made_from(path, "codes", made_from):
        return

    def encode(rows):
        codes, features = [], []
        for images in dataset.batches(rows, batch, args.workers):
            straight, straight_features = encode_images(backbone, images, run)
            mirrored, _ = encode_images(backbone, images.flip(3), run)
            codes.append(torch.stack([straight, mirrored], 1).cpu())  # (b, 2, L)
            features.append(straight_features.half().cpu())  # (b, D)
        return {"codes": torch.cat(codes), "features": torch.cat(features)}

    folder = run.folder / f".codes-{data.checksum(made_from)[:16]}"
    shapes = {"codes": ((2, backbone.L), data.code_type(backbone.V)),
              "features": ((args.width,), torch.float16)}
    made = data.fill_rows(folder, len(dataset), run, encode, shapes)
    if run.main:
        found = report(dataset, **made, values=backbone.V, run=run)
        side = backbone.side if backbone.sem_read == "patches" else 0
        data.save_codes(path, made["codes"], backbone.V, side, dataset, found, made_from,
                        backbone.colour_codes)
        del made  # Windows removes no file that is mapped
        shutil.rmtree(folder)


# -------- weights of others (--init, and sample.py --release) ------------------------------------------

NAMES = {  # from those of transformers' Dinov2WithRegisters to ours, which are those of DINOv2's release
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "attention.attention.query": "attn.qkv", "attention.output.dense": "attn.proj",
    "layer_scale": "ls", ".lambda1": ".gamma",
    "encoder.layer.": "blocks.", "layernorm.": "norm.", "embeddings.": "",
}


def backbone_weights(path):
    """Weights for ViT from those of a DINOv2 with registers, by its own names or transformers'. It sees
    pixels normalised as below, ours are in [-1, 1]: the difference goes into the patch projection."""
    theirs = data.read_weights(path)
    with data.reading(path, "expected a DINOv2 with registers"):
        state = {}
        for name, x in theirs.items():
            if name.startswith(("dino_head.", "ibot_head.", "sem_cls_norm.")):
                continue
            if ".key." in name or ".value." in name:
                continue
            if ".query." in name:  # which ours has with those two in one matrix
                x = torch.cat([theirs[name.replace("query", part)] for part in ("query", "key", "value")])
            for old, new in NAMES.items():
                name = name.replace(old, new)
            state[name] = x.float()
        mean = torch.tensor([0.485, 0.456, 0.406])  # of ImageNet's pixels in [0, 1], and deviation
        std = torch.tensor([0.229, 0.224, 0.225])
        weight = state["patch_embed.proj.weight"]  # (D, 3, patch, patch)
        shift = (weight * ((0.5 - mean) / std)[:, None, None]).sum((1, 2, 3))
        state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + shift
        state["patch_embed.proj.weight"] = weight * (0.5 / std)[:, None, None]
    return state


def load_init(backbone, path):
    """Start from a DINOv2 with registers, with or without a simplicial embedding."""
    state = backbone_weights(path)
    with data.reading(path, "expected a DINOv2 with registers, of the sizes that the flags set"):
        own = {name: x for name, x in backbone.state_dict().items() if name.startswith("sem_")}
        state["pos_embed"] = resize_positions(state["pos_embed"], backbone.side)
        backbone.load_state_dict(own | state)


def load_release(folder, codes, values, device):
    """The authors' encoder, for images of 16 × 16 patches (224 pixels), at which they read it."""
    state = backbone_weights(folder)
    with data.reading(folder, "expected the authors' encoder with its sem_ weights"):
        width, _, _, patch = state["patch_embed.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        depth = len([name for name in state if name.endswith("norm1.weight")])
        heads = data.released_config(folder).get("num_attention_heads", width // 64)
        with torch.device("meta"):  # without memory of its own
            model = ViT(side * patch, patch, width, depth, heads, codes, values, tau=1.0,
                        sem_read="registers", registers=state["register_tokens"].shape[1])
        model.sem_out = None  # only training needs it
        state.pop("sem_out.weight", None)
        model.load_state_dict({"sem_centre": torch.zeros(codes, values)} | state, assign=True)
    model.image_size = 16 * patch
    return model.to(device).eval()


# -------- training -------------------------------------------------------------------------------------

def lr_scale(name, args):
    """Factor on the learning rate of a parameter: --layer-decay for each layer above it."""
    name = name.removeprefix("backbone.")
    above = 0
    if name.startswith("blocks."):
        above = args.depth - int(name.split(".")[1])
    elif name.startswith(("patch_embed", "pos_embed", "cls_token", "mask_token", "register_tokens")):
        above = args.depth + 1
    of_patches = args.patch_lr if name.startswith("patch_embed") else 1.0
    return args.layer_decay ** above * of_patches


def add_flags(parser):
    """The tokenizer's own flags; the defaults are the shapes values."""
    add = parser.add_argument_group("model").add_argument
    add("--patch", type=data.positive, default=8, help="patch side in pixels")
    add("--width", type=data.positive, default=128, help="D, width of the tokens")
    add("--depth", type=data.positive, default=2, help="transformer blocks")
    add("--heads", type=data.positive, default=2, help="attention heads")
    add("--attention", action=argparse.BooleanOptionalAction, default=False,
        help="patches attend to each other; without it an MLP sees each token alone")
    add("--stem", type=data.number(0, 30, int), default=2, help="halving convolutions before the patches")
    add("--layer-scale", type=data.number(), default=1.0, help="start of the gains on residual branches")
    add("--drop-path", type=data.fraction, default=0.0, help="probability of dropping a branch")
    add("--codes", type=data.positive, default=64, help="L, code positions")
    add("--values", type=data.number(2, 65_535, int), default=8, help="V, values per position")
    add("--tau", type=data.above_zero, default=1.0, help="temperature of the SEM's softmax in training")
    add("--registers", type=data.count, default=0, help="register tokens beside CLS")
    add("--sem-read", choices=("registers", "patches"), default="patches",
        help="what the SEM reads: CLS and registers together (the paper), or each patch its own positions")
    add("--colour-codes", type=data.count, default=2,
        help="of a patch's positions, how many see its colours alone; the others see no hue (0: all see all)")
    add("--nearest", action=argparse.BooleanOptionalAction, default=True,
        help="a code is the nearest of V means of z (by k-means), else its largest value")
    add("--centre-codes", action=argparse.BooleanOptionalAction, default=True,
        help="without --nearest: subtract the mean of z in equation (2); the paper does not")
    add = parser.add_argument_group("schedules").add_argument
    add("--weight-decay-final", type=data.non_negative, help="weight decay at the end, by a cosine")
    add("--layer-decay", type=data.fraction, default=1.0, help="a block's learning rate over the next one's")
    add("--patch-lr", type=data.fraction, default=1.0, help="factor on the learning rate of patches")
    add = parser.add_argument_group("loss").add_argument
    add("--head-hidden", type=data.positive, default=512, help="hidden width of the DINO head")
    add("--bottleneck", type=data.positive, default=128, help="output width of the DINO head")
    add("--prototypes", type=data.positive, default=512, help="K, prototypes of the DINO head")
    add("--student-temperature", type=data.above_zero, default=0.1, help="of the student's softmax")
    add("--teacher-temperature", type=data.above_zero, default=0.02, help="of the teacher's softmax")
    add("--teacher-warmup", type=data.count, default=0,
        help="steps from --teacher-start to --teacher-temperature")
    add("--teacher-start", type=data.above_zero, default=0.04,
        help="the teacher's temperature at step 0 of --teacher-warmup")
    add("--centering", choices=("sinkhorn", "centre"), default="sinkhorn",
        help="how the teacher's targets are kept from collapsing")
    add("--momentum", type=data.fraction, default=0.98, help="of the teacher, rising to 1 by a cosine")
    add("--ibot", type=data.non_negative, default=0.0, help="weight of the loss on masked patches")
    add("--koleo", type=data.non_negative, default=0.5, help="weight of KoLeo")
    add("--alone", type=data.number(0, 0.5), default=0.25,
        help="--colour-codes: share of the images that train form alone, and as many colour alone")
    add = parser.add_argument_group("views").add_argument
    share = data.number(1e-3, 1)
    add("--global-size", type=data.positive,
        help="side of global crops in pixels (shapes and folder: --image-size, else 32)")
    add("--global-scale", type=share, nargs=2, default=[0.6, 1.0], help="share of the area, from, to")
    add("--ratio", type=share, default=0.9, help="smallest width / height; largest: 1 / RATIO")
    add("--locals", type=data.count, default=0, help="local crops per image")
    add("--local-size", type=data.positive, default=16, help="side of local crops in pixels")
    add("--local-scale", type=share, nargs=2, default=[0.2, 0.5], help="share of the area, from, to")
    add("--jitter", type=data.fraction, nargs=4, default=[0.15, 0.15, 0.0, 0.0],
        help="brightness, contrast, saturation, hue: largest change")
    add("--jitter-p", type=data.fraction, default=0.8, help="probability of the jitter")
    add("--grey", type=data.fraction, default=0.0, help="probability of grey")
    add("--blur", type=data.fraction, nargs=3, default=[0.0] * 3, metavar=("FIRST", "SECOND", "LOCALS"),
        help="probability of blur, on each global crop and on local ones")
    add("--solarise", type=data.fraction, default=0.0, help="probability of it, on the second global crop")
    add = parser.add_argument_group("start of the run").add_argument
    add("--init", metavar="PATH", help="start from DINOv2's weights, or the authors' encoder")


def check_flags(parser, args):
    """What argparse cannot see: sizes that must divide, and what needs what."""
    def expect(holds, flag, message):
        if not holds:
            parser.error(f"argument --{flag}: {message}")

    patch = args.patch
    expect(args.width % args.heads == 0, "heads", f"{args.heads} does not divide --width {args.width}")
    expect(patch % 2 ** args.stem == 0, "stem", f"{args.stem} halvings do not fit in --patch {patch}")
    expect(args.global_size % patch == 0, "global-size", f"no multiple of --patch {patch}")
    expect(args.locals == 0 or args.local_size % patch == 0, "local-size", f"no multiple of --patch {patch}")
    patches = (args.global_size // patch) ** 2
    expect(args.sem_read == "registers" or args.codes % patches == 0,
           "codes", f"{args.codes} is no multiple of {patches} patches; choose {patches} times the positions "
                    "of a patch, or another --patch")
    expect(args.attention or (args.sem_read == "patches" and args.ibot == 0),
           "attention", "needed by --sem-read registers and --ibot; add it")
    fits = args.sem_read == "patches" and args.colour_codes < args.codes // patches and patch % 2 == 0
    expect(args.colour_codes == 0 or (fits and args.ibot == 0 and not args.init),
           "colour-codes", "expected 0; or fewer than the positions of a patch (--codes over "
                           f"{patches} patches), an even --patch, no --sem-read registers, --ibot or --init")
    expect(args.weight_decay_final is None or args.weight_decay > 0,
           "weight-decay-final", "only with a --weight-decay above 0 to start from")
    expect(not (args.init and args.stem),
           "init", "DINOv2's patches have no convolutions before them; add --stem 0")
    expect(args.accumulate == 1,
           "accumulate", "the losses look at the whole batch; use more processes instead")


def parse(argv=None):
    """The flags of this script, checked: their parser and values."""
    parser = data.make_parser(__doc__)
    add_flags(parser)
    data.add_training_flags(parser, steps=400, batch_size=256, lr=2e-3, lr_matrix=0.0, warmup=40)
    args = data.parse(parser, PRESETS, argv)
    if args.global_size is None:
        args.global_size = args.image_size if args.dataset in ("shapes", "folder") else 32
    check_flags(parser, args)
    return parser, args


def main(argv=None, dataset=None):
    """Train the tokenizer, encode the dataset, report."""
    parser, args = parse(argv)
    run = data.Run(args, lock="tokenizer")
    torch.manual_seed(args.seed)
    student = build_student(vars(args)).to(run.device)
    if args.dry_run:
        data.dry_run(args, student, run)
    dataset = dataset or data.load_dataset(args)
    train_rows = dataset.splits["train"]
    data.fit_batch(parser, args, train_rows)
    if args.init and (args.restart or not (run.folder / "tokenizer.pt").exists()):  # else it goes on
        load_init(student.backbone, args.init)
    centering = nn.ModuleDict({kind: Centering(args.prototypes) for kind in ("views", "patches")})
    centering.to(run.device)
    ema = data.averaged(student, lambda n: data.cosine(n - 1, args.steps, args.momentum, 1.0))  # n = step + 1
    teacher = ema.module
    optimizers = data.Optimizers(student, args, lambda name: lr_scale(name, args))
    made_from = {"images": dataset.id}
    checkpoint = data.Checkpoint("tokenizer", args, parser.settings, run, made_from, student, ema,
                                 optimizers, others={"centering": centering})
    start = checkpoint.resume(finished_on_others=True)  # a finished tokenizer may encode other images
    wrapped = run.wrap(student, args)
    steps = data.Steps(checkpoint, start, train_rows, args.batch_size)
    last_decay = args.weight_decay if args.weight_decay_final is None else args.weight_decay_final
    views = view_sizes(args)
    read_views = functools.partial(read_crops, views=views, ratio=args.ratio, flip=args.flip)  # of files
    batches = data.image_batches(dataset, run, args, start, read_views, numbers=(len(views), 5))

    for step in steps:
        images = next(batches)  # of this process; of files the crops
        [part] = data.batch_parts(step, train_rows, args, run, wrapped)  # one, no --accumulate
        loss, terms = step_loss(wrapped, teacher, centering, images, part, args, run, step)
        loss = run.average(part.backward(loss))
        decay = data.cosine(step, args.steps, args.weight_decay, last_decay)
        norm = optimizers.step(step, loss, decay)  # stops where not finite
        ema.update_parameters(student)
        steps.show(loss=loss, norm=norm, **terms)
        if step + 1 == args.steps and (args.centre_codes or args.nearest):
            fit_codes(teacher.backbone, dataset, run)  # last: each update copies the student's buffers, zeros

    write_codes(teacher.backbone, dataset, run, args, made_from | {"tokenizer": checkpoint.id})
    if run.main:
        found = data.read(run.folder / "codes.pt", "codes", only="codes")["report"]
        data.print_figures(found)
        if found["entropy per position"] < 0.1:  # bits
            print("note: all images have nearly the same code; train the tokenizer with --restart and a "
                  f"lower --lr, or bring more images ({parser.remedy})", file=sys.stderr)
    run.wait()


if __name__ == "__main__":
    data.run_script(main)
