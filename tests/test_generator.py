"""The generator's parts: code embedding, DiT, flow loss, ODE solver, guidance, latents."""
import math
import os
import sys
import types

import data
import generator
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, arguments, call, link_codes, make_vae, part, refuse
from PIL import Image


def dit(condition="both", **change):
    """A small DiT without the zeros that it starts with, which would hide everything that is tested here."""
    torch.manual_seed(0)
    settings = dict(size=16, patch=4, stem=1, width=32, depth=2, heads=2, codes=8, values=5, groups=4,
                    condition=condition, predict="x", code_side=2)
    model = generator.DiT(**settings | change).requires_grad_(False).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


def test_it_starts_as_zero_whatever_it_is_shown():
    model = generator.DiT(16, 4, 0, 32, 2, 2, 8, 5, 4, "both", "x")
    assert not model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.zeros(2, 8).long()).any()


@pytest.mark.parametrize("condition", ["both", "mean", "context", "place", "none"])
def test_each_way_of_reading_the_code_sees_every_position_and_the_time(condition):
    codes = torch.cat([torch.zeros(2, 8), torch.eye(8)]).long()
    t = torch.full((10,), 0.3)
    t[1] = 0.7
    images = dit(condition)(torch.randn(1, 3, 16, 16).expand(10, -1, -1, -1), t, codes)
    assert not torch.allclose(images[1], images[0], atol=1e-4)
    for image in images[2:]:
        assert torch.allclose(image, images[0], atol=1e-6) == (condition == "none")


def test_in_place_a_patch_of_the_code_reaches_its_own_pixels_alone():
    """A code of 2 × 2 patches with two positions each, on 4 × 4 tokens that do not see one another."""
    model = dit("place", depth=0, stem=0)
    codes = torch.cat([torch.zeros(1, 8), torch.eye(8)]).long()
    images = model(torch.randn(1, 3, 16, 16).expand(9, -1, -1, -1), torch.full((9,), 0.3), codes)
    changed = (images[1:] != images[0]).any(1)  # (8 positions, 16, 16)
    for position, where in enumerate(changed):
        row, column = divmod(position // 2, 2)
        quarter = where[8 * row:8 * row + 8, 8 * column:8 * column + 8]
        assert quarter.float().mean() > 0.9 and where.sum() == quarter.sum()


def test_code_embedding_is_the_mean_over_each_group_and_deviates_by_point_seven():
    embedding = generator.CodeEmbedding(8, 5, 4, 1000)
    codes = torch.randint(0, 6, (3, 8))
    rows = embedding.table.view(8, 6, 1000)[torch.arange(8), codes]  # (3, 8, 1000)
    assert torch.allclose(embedding(codes), rows.unflatten(1, (4, 2)).mean(2), atol=1e-6)
    assert abs(embedding(codes).std() - 0.7) < 0.05


@pytest.mark.parametrize("name, parameters", [("S", 32_953_488), ("XL", 675_129_632)])
def test_sizes_have_as_many_parameters_as_those_of_dit(name, parameters):
    """DiT-S/2 and DiT-XL/2 with 1,000 classes."""
    with torch.device("meta"):
        model = generator.DiT(32, 2, 0, **generator.SIZES[name], codes=1, values=1000, groups=1,
                              condition="mean", predict="v", channels=4)
    assert abs(sum(p.numel() for p in model.parameters()) / parameters - 1) < 0.02


# --- loss -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t_mean", [-0.4, 3.5])  # also times so late that the weight of x is bounded
@pytest.mark.parametrize("predict", ["x", "v"])
def test_the_loss_is_zero_for_the_true_velocity_and_right_for_a_known_error(run, predict, t_mean):
    args = types.SimpleNamespace(t_mean=t_mean, t_std=0.7, predict=predict)
    x = torch.randn(64, 3, 8, 8)
    times = []

    def loss_with(error):
        def network(z, t, codes):
            times.append(t)
            t = t[:, None, None, None]
            e = (z - t * x) / (1 - t)
            return (x if predict == "x" else x - e) + error

        return generator.flow_loss(network, x, None, part(64), args, run)

    assert loss_with(0.0) < 1e-8
    loss = loss_with(0.1)
    weight = 1 / (1 - times[0]).clamp(min=0.05) if predict == "x" else torch.ones(64)
    assert torch.allclose(loss, (0.1 * weight).square().mean(), rtol=1e-3)
    logit = torch.logit(times[0])
    assert abs(logit.mean() - t_mean) < 0.3 and abs(logit.std() - 0.7) < 0.2  # logit-normal times


COLOURS = data.colour_positions({"L": 16, "side": 2, "colour_codes": 1})


@pytest.mark.parametrize("singly, expected", [
    (0.0, 0.0), (0.25, 0.25), (0.25 * COLOURS, torch.tensor([0, 0, 0, 0.25] * 4))])
def test_codes_are_dropped_whole_and_in_single_positions_as_often_as_said(singly, expected):
    dropped = generator.drop_codes(torch.zeros(20_000, 16).long(), 9, part(20_000), 0.1, singly) == 9
    whole = dropped.all(1)
    assert abs(whole.float().mean() - 0.1) < 0.01
    assert ((dropped[~whole].float().mean(0) - expected).abs() < 0.02).all()


# --- sampler ----------------------------------------------------------------------------------------------

def test_solvers_reach_the_known_solution_at_their_order():
    """That of dz/dt = a z + cos t; halving the step divides Euler's error by 2 and Heun's by 4."""
    a = -1.5
    start = torch.tensor([1.0, -2.0])

    def particular(t):
        return (math.sin(t) - a * math.cos(t)) / (1 + a * a)

    def error(steps, method):
        times = [k / steps for k in range(steps + 1)]
        found = generator.integrate(lambda z, t: a * z + math.cos(t), start, times, method)
        return (found - particular(1.0) - (start - particular(0.0)) * math.exp(a)).abs().max().item()

    assert 1.8 < error(40, "euler") / error(80, "euler") < 2.2
    assert 3 < error(40, "heun") / error(80, "heun") < 5  # its last step is Euler's
    assert error(80, "heun") < error(80, "euler") / 10


def sampler(guidance=1.0, **flags):
    """The flags of the image sampler."""
    return types.SimpleNamespace(guidance=guidance, **{"method": None, "guidance_interval": [0, 1]} | flags)


class Mean:
    """A generator whose velocity is the mean of the code; it notes the sizes of its calls."""
    V = 5
    condition = "both"

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, codes):
        self.calls.append(len(z))
        return torch.ones_like(z) * codes.float().mean(1)[:, None, None, None]


@pytest.mark.parametrize("guidance, t, expected, calls", [
    (1.0, 0.5, 1.0, [2]), (0.0, 0.5, 5.0, [4]), (3.0, 0.5, -7.0, [4]),  # 5: without code
    (3.0, 0.3, -7.0, [4]), (3.0, 0.2, 1.0, [2]), (3.0, 0.7, 1.0, [2])])  # its ends
def test_guidance_is_linear_one_means_none_and_the_interval_holds(run, guidance, t, expected, calls):
    model = Mean()
    codes = torch.ones(2, 8).long()  # of velocity 1
    network = generator.guided_network(model, codes, sampler(guidance, guidance_interval=[0.3, 0.6]), run)
    assert (network(torch.zeros(2, 3, 4, 4), t, t) == expected).all() and model.calls == calls


def test_what_is_not_finite_stops_all_but_a_preview(run, capsys):
    model = dit()
    torch.nn.init.constant_(model.final.bias, math.nan)
    codes = torch.zeros(2, 8).long()
    args = sampler(sample_steps=2, batch=2)
    with pytest.raises(SystemExit, match="not finite"):
        generator.generate(model, codes, args, run)
    assert generator.generate(model, codes, args, run, preview=True).shape == (2, 3, 16, 16)
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("predict, method", [("x", "heun"), ("noise", None)])
def test_images_follow_from_seed_and_number_alone(run, predict, method):
    model = dit(predict=predict, stem=0)
    codes = torch.randint(0, 5, (5, 8))

    def draw(codes, batch=250, seed=4, first=0):
        args = sampler(2.0, method=method, sample_steps=3, batch=batch)
        return generator.generate(model, codes, args, run, seed, first).int()

    whole = draw(codes)
    assert whole.shape == (5, 3, 16, 16)
    assert (draw(codes, batch=2) - whole).abs().max() <= 1
    assert (draw(codes[3:], first=3) - whole[3:]).abs().max() <= 1
    assert not torch.equal(draw(codes, seed=5), whole)


# --- latents ----------------------------------------------------------------------------------------------

LATENT = [*TINY["generator"], "--patch", "4", "--stem", "0"]


def test_latents_hold_both_flips_and_come_back_as_the_images(vae, run, tmp_path):
    args = arguments(image_size=32, dataset="shapes", out=str(tmp_path))
    run.folder = data.run_folder(args)
    dataset = data.load_dataset(args)
    path = run.folder / "latents.pt"
    model = generator.VAE(vae, run.device)

    def load():
        return generator.load_latents(args, model, dataset, run)

    latents = load()
    assert latents.shape == (len(dataset), 2, 12, 16, 16) and latents.dtype == torch.float16
    for flip in (0, 1):
        images = dataset.pixels(range(5), torch.full((5,), bool(flip)))
        pixels = model.decode(latents[:5, flip].float())
        assert (data.to_bytes(pixels).int() - images.int()).abs().max() <= 1
        x = data.from_bytes(images)
        assert torch.allclose(model.encode(x), F.pixel_unshuffle(x, 2))
    made = path.stat().st_mtime_ns
    load()
    assert path.stat().st_mtime_ns == made  # once
    os.truncate(path, path.stat().st_size - 9)
    assert torch.equal(load(), latents)  # made again
    dataset.id = "of other images"
    load()
    assert data.read(path, "latents")["made_from"]["images"] == "of other images"
    assert not list(run.folder.glob(".latents-*"))


def test_a_generator_of_latents_draws_pixels_with_its_own_autoencoder_alone(vae, trained, tmp_path):
    out = tmp_path / "out"
    folder = link_codes(trained, out)
    call("generator", *LATENT, "--vae", vae, "--out", out)
    state = data.read(folder / "generator.pt", "generator")
    assert state["config"]["predict"] == "v" and state["ema"]["x_embed.weight"].shape[1] == 12 * 16
    pictures = ["sample", "reconstruct", "--rows", "1", "--sample-steps", "2", "--out", out]
    call(*pictures)
    picture = Image.open(folder / "samples" / "reconstruct-001.png")
    assert picture.height == 14 + 2 + 2 * 66  # titles, and two rows of pixels
    moved = vae.rename(tmp_path / "elsewhere")
    refuse(*pictures, words=["--vae", "vae"])
    call(*pictures, "--vae", moved)
    other = make_vae(tmp_path / "other", 3.0)
    refuse(*pictures, "--vae", other, words=["other", "not the weights", "generator.pt"])
    refuse("generator", *LATENT, "--vae", other, "--out", out, words=["generator.pt", "other vae"])
    refuse("generator", *LATENT, "--predict", "v", "--out", out, words=["generator.pt", "vae"])
    call("generator", *LATENT, "--vae", moved, "--out", out)  # finished: the folder's name is no setting


def test_folders_that_are_no_vae_are_refused(vae, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    link_codes(trained, out)

    def refused(folder, *words):
        refuse("generator", *LATENT, "--vae", folder, "--out", out, words=["--vae", *words])

    refused(tmp_path / "nowhere", "nowhere", "AutoencoderKL")
    (vae / "diffusion_pytorch_model.bin").unlink()
    refused(vae, vae.name, "AutoencoderKL")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(vae, "pip install diffusers")
    call("generator", *TINY["generator"], "--out", out)
    refuse("sample", "reconstruct", "--out", out, "--vae", vae, words=["trained in pixels"])
