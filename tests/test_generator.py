"""The generator's parts: code embedding, DiT, flow loss, ODE solver, guidance."""
import argparse
import json
import math
import sys
import types
from pathlib import Path

import data
import generator
import numpy as np
import pytest
import torch
from conftest import TINY, call, link_codes, refuse
from PIL import Image


def dit(condition="both", predict="x", seed=0, **change):
    torch.manual_seed(seed)
    settings = dict(size=16, patch=4, stem=1, width=32, depth=2, heads=2, codes=8, values=5, groups=4, condition=condition, predict=predict)
    model = generator.DiT(**settings | change)
    for p in model.parameters():  # the zero initialisation would hide everything that is tested here
        if not p.abs().sum() > 0:
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def test_starts_as_the_identity_of_nothing():
    torch.manual_seed(0)
    model = generator.DiT(16, 4, 0, 32, 2, 2, 8, 5, 4, "both", "x")
    assert model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.zeros(2, 8).long()).abs().max() == 0


@pytest.mark.parametrize("condition", ["both", "mean", "context", "none"])
def test_each_way_of_reading_the_code_sees_every_position(condition):
    model, z, t, codes = dit(condition), torch.randn(1, 3, 16, 16), torch.rand(1), torch.zeros(1, 8).long()
    for position in range(8):
        other = codes.clone()
        other[0, position] = 3
        assert torch.equal(model(z, t, codes), model(z, t, other)) == (condition == "none")


def test_code_embedding_is_the_mean_over_each_group_and_deviates_by_point_seven():
    torch.manual_seed(0)
    embedding = generator.CodeEmbedding(8, 5, 4, 1000)
    codes = torch.randint(0, 6, (3, 8))
    table = embedding.table.view(8, 6, 1000)
    expected = torch.stack([torch.stack([(table[2 * g, c[2 * g]] + table[2 * g + 1, c[2 * g + 1]]) / 2 for g in range(4)]) for c in codes])
    assert torch.allclose(embedding(codes), expected, atol=1e-6) and abs(embedding(codes).std() - 0.7) < 0.05


def test_time_matters_and_samples_do_not_see_each_other():
    model, z, codes = dit(), torch.randn(3, 3, 16, 16), torch.randint(0, 6, (3, 8))
    t = torch.tensor([0.1, 0.5, 0.9])
    together = model(z, t, codes)
    assert torch.allclose(together[1:2], model(z[1:2], t[1:2], codes[1:2]), atol=1e-5)
    assert not torch.allclose(model(z[:1], t[:1], codes[:1]), model(z[:1], t[1:2], codes[:1]), atol=1e-4)


# --- loss -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t_mean", [-0.4, 3.5])  # also times so late that the weight of x is bounded
@pytest.mark.parametrize("predict", ["x", "v"])
def test_the_loss_is_zero_for_the_true_velocity_and_right_for_a_known_error(run, predict, t_mean):
    args = types.SimpleNamespace(t_mean=t_mean, t_std=0.7, predict=predict)
    x, seen = torch.randn(64, 3, 8, 8), {}

    def perfect(z, t, codes, error=0.0):
        seen["t"] = t
        t = t[:, None, None, None]
        e = (z - t * x) / (1 - t)
        return (x if predict == "x" else x - e) + error

    assert generator.flow_loss(perfect, x, None, data.Draws(0, 0, run, 64), args, run) < 1e-8
    off = generator.flow_loss(lambda *a: perfect(*a, error=0.1), x, None, data.Draws(0, 0, run, 64), args, run)
    weight = 1 / (1 - seen["t"]).clamp(min=0.05) if predict == "x" else torch.ones(64)
    assert torch.allclose(off, (0.1 * weight).square().mean(), rtol=1e-3)


def test_times_are_logit_normal(run):
    args, seen = types.SimpleNamespace(t_mean=-0.4, t_std=1.2, predict="v"), []
    generator.flow_loss(lambda z, t, c: seen.append(t) or z, torch.zeros(20_000, 1, 1, 1), None, data.Draws(0, 0, run, 20_000), args, run)
    logit = torch.logit(seen[0])
    assert abs(logit.mean() + 0.4) < 0.03 and abs(logit.std() - 1.2) < 0.03


def test_codes_are_dropped_whole_and_as_often_as_said(run):
    seen = generator.drop_codes(torch.zeros(20_000, 16).long(), 9, data.Draws(0, 0, run, 20_000), 0.1)
    dropped = (seen == 9).any(1)
    assert torch.equal(dropped, (seen == 9).all(1)) and abs(dropped.float().mean() - 0.1) < 0.01 and (seen[~dropped] == 0).all()


# --- sampler --------------------------------------------------------------------------------------------------------

def test_solvers_reach_the_known_solution_at_their_order():
    """dz/dt = a z + cos t has a closed solution; halving the step divides Euler's error by 2 and Heun's by about 4."""
    a, z0 = -1.5, torch.tensor([1.0, -2.0])
    field = lambda z, t: a * z + math.cos(t)
    particular = lambda t: (math.sin(t) - a * math.cos(t)) / (1 + a * a)
    exact = particular(1.0) + (z0 - particular(0.0)) * math.exp(a)
    error = lambda steps, method: (generator.integrate(field, z0, steps, method) - exact).abs().max().item()
    assert 1.8 < error(40, "euler") / error(80, "euler") < 2.2
    assert error(80, "heun") < error(80, "euler") / 10 and 3 < error(40, "heun") / error(80, "heun") < 5  # its last step is Euler's


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_single_image_is_reached_exactly_and_gaussian_data_keep_their_spread(run, method):
    x = torch.randn(1, 3, 8, 8)
    one_image = lambda z, t: (x - z) / (1 - t)
    assert torch.allclose(generator.integrate(one_image, torch.randn(1, 3, 8, 8), 5, method), x, atol=1e-5)
    sigma = 0.5  # data N(0, sigma²): v = E[x − e | z] = (t sigma² − (1 − t)) / (t² sigma² + (1 − t)²) · z
    field = lambda z, t: (t * sigma ** 2 - (1 - t)) / (t ** 2 * sigma ** 2 + (1 - t) ** 2) * z
    samples = generator.integrate(field, torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 100, method)
    assert abs(samples.std() - sigma) < 0.02


class Counting:
    """A generator whose velocity is a constant that depends on the code, and which counts its calls."""
    V, condition, predict = 5, "both", "v"

    def __init__(self, value=None):
        self.value, self.calls = value, []

    def __call__(self, z, t, codes):
        self.calls.append(len(z))
        value = codes.float().mean(1) if self.value is None else torch.full((len(z),), self.value)
        return value[:, None, None, None].expand_as(z)


def test_guidance_is_linear_one_means_none_and_the_interval_holds(run):
    codes, z = torch.ones(2, 8).long(), torch.zeros(2, 3, 4, 4)  # with code: velocity 1, without: 5
    at = lambda guidance, interval, t, model: generator.guided_field(model, codes, guidance, interval, run)(z, t)[0, 0, 0, 0].item()
    for guidance, expected, calls in ((1.0, 1.0, [2]), (0.0, 5.0, [4]), (3.0, 5 + 3 * (1 - 5), [4])):
        model = Counting()
        assert at(guidance, [0, 1], 0.5, model) == pytest.approx(expected) and model.calls == calls
    for t, expected in ((0.1, 1.0), (0.3, -7.0), (0.6, -7.0), (0.7, 1.0)):
        assert at(3.0, [0.3, 0.6], t, Counting()) == pytest.approx(expected)


def test_guidance_by_a_weaker_model(run):
    codes, z, model, weak = torch.ones(2, 8).long(), torch.zeros(2, 3, 4, 4), Counting(), Counting(0.25)
    v = generator.guided_field(model, codes, 2.0, [0, 1], run, weak)(z, 0.5)
    assert torch.allclose(v, torch.tensor(0.25 + 2 * (1 - 0.25))) and model.calls == weak.calls == [2]


def test_images_follow_from_seed_and_number_alone(run):
    model, codes = dit(), torch.randint(0, 5, (5, 8))
    sampler = {"steps": 3, "method": "heun", "guidance": 2.0, "interval": [0.0, 1.0]}
    whole = generator.generate(model, codes, 5, sampler, run, seed=4)
    split = generator.generate(model, codes, 5, sampler, run, seed=4, batch=2)
    assert whole.dtype == torch.uint8 and whole.shape == (5, 3, 16, 16) and (whole.int() - split.int()).abs().max() <= 1
    assert not torch.equal(generator.generate(model, codes, 5, sampler, run, seed=5), whole)


@pytest.mark.parametrize("patch, stem, condition", [(4, 0, "both"), (8, 2, "mean"), (4, 1, "none")])
def test_flops_formula_counts_what_torch_counts(patch, stem, condition):
    from torch.utils.flop_counter import FlopCounterMode
    parser = data.make_parser("")
    data.add_training_flags(parser, 1, 4, 0.1, 0.0, 0)
    generator.add_flags(parser)
    args = data.parse(parser, {}, ["--patch", str(patch), "--stem", str(stem), "--condition", condition, "--width", "96"])
    args.codes, args.values, args.predict = 16, 8, "x"
    for args.channels, args.down in ((3, 1), (8, 2)):  # pixels, latents
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            generator.build_generator(vars(args))(torch.randn(4, args.channels, 32 // args.down, 32 // args.down), torch.rand(4), torch.zeros(4, 16).long())
        assert abs(counter.get_total_flops() * 3 / (generator.training_flops(args) / args.batch_size * 4) - 1) < 0.03


# --- latents ----------------------------------------------------------------------------------------------------------

class AutoencoderKL(torch.nn.Module):
    """Stands for diffusers' class: an exact, invertible "autoencoder" that folds 2 × 2 pixels into 12 channels, times `gain`."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    @classmethod
    def from_pretrained(cls, path, local_files_only):
        return cls(float((Path(path) / "diffusion_pytorch_model.bin").read_text()))

    def encode(self, x):
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=torch.nn.functional.pixel_unshuffle(x, 2) * self.gain + 0.25))

    def decode(self, z):
        return types.SimpleNamespace(sample=torch.nn.functional.pixel_shuffle((z - 0.25) / self.gain, 2))


@pytest.fixture
def vae(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=AutoencoderKL))
    return make_vae(tmp_path / "vae", 2.0)


def make_vae(folder, gain):
    folder.mkdir()
    config = {"_class_name": "AutoencoderKL", "latent_channels": 12, "block_out_channels": [1, 1], "scaling_factor": 0.5, "shift_factor": 0.25}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.bin").write_text(str(gain))
    return folder


LATENT = [*TINY["generator"], "--patch", "4", "--stem", "0"]


def test_latents_hold_both_flips_and_come_back_as_the_images(vae, run, tmp_path):
    args = argparse.Namespace(vae=str(vae), image_size=32, dataset="shapes", out=str(tmp_path), seed=0, workers=0)
    run.folder, dataset = data.run_folder(args), data.load_dataset(args)
    run.asked, run.wait = lambda: False, lambda: None
    model = generator.VAE(vae, generator.read_vae(vae), run.device)
    latents = generator.open_latents(args, model, dataset, run)
    assert latents.shape == (len(dataset), 2, 12, 16, 16) and latents.dtype == np.float16 and isinstance(latents, np.memmap)
    for flip in (0, 1):
        images = dataset.pixels(range(5), torch.full((5,), bool(flip)))
        x = model.decode(torch.from_numpy(np.array(latents[:5, flip])).float())
        assert (data.to_bytes(x).int() - images.int()).abs().max() <= 1
        assert torch.allclose(model.encode(data.unit(images)), data.unit(images).unflatten(2, (16, 2)).unflatten(4, (16, 2)).permute(0, 1, 3, 5, 2, 4)
                              .reshape(5, 12, 16, 16), atol=1e-6)  # gain 2 times scale ½: the pixels themselves
    before = (run.folder / "latents.npy").stat().st_mtime_ns
    generator.open_latents(args, model, dataset, run)
    assert (run.folder / "latents.npy").stat().st_mtime_ns == before  # made once
    whole = (run.folder / "latents.npy").read_bytes()
    for broken in (whole[:-9], whole[:-9] + bytes(9), b"x" + whole[1:]):
        (run.folder / "latents.npy").write_bytes(broken)
        generator.open_latents(args, model, dataset, run)
        assert (run.folder / "latents.npy").read_bytes() == whole  # made again
    dataset.checksum = "of other images"
    latents = generator.open_latents(args, model, dataset, run)
    assert json.loads((run.folder / "latents.json").read_text())["images"] == "of other images"
    assert not list(run.folder.glob(".latents-*"))


def test_a_generator_of_latents_trains_resumes_and_draws_pixels(vae, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    link_codes(trained, out)
    call("generator", *LATENT, "--vae", vae, "--out", out)
    state = torch.load(out / "shapes" / "generator.pt", weights_only=True)
    assert state["config"]["predict"] == "v" and state["config"]["channels"] == 12 and state["ema"]["x_embed.weight"].shape[1] == 12 * 16
    call("sample", "reconstruct", "--out", out, "--rows", "1", "--sample-steps", "2")
    image = Image.open(out / "shapes" / "samples" / "reconstruct.png")
    assert image.height == 14 + 2 + 2 * 66  # titles and two rows of 32 pixels, drawn twice as large
    moved = vae.rename(tmp_path / "elsewhere")
    refuse("sample", "reconstruct", "--out", out, words=["--vae", "vae"])
    call("sample", "reconstruct", "--out", out, "--rows", "1", "--sample-steps", "2", "--vae", moved)
    other = make_vae(tmp_path / "other", 3.0)
    refuse("sample", "reconstruct", "--out", out, "--vae", other, words=["other", "not the weights", "generator.pt"])
    refuse("generator", *LATENT, "--vae", other, "--out", out, words=["generator.pt", "vae_sha256"])
    refuse("generator", *LATENT, "--out", out, "--predict", "v", words=["generator.pt", "channels 12 → 3"])
    call("generator", *LATENT, "--vae", moved, "--out", out)  # finished: the folder's name is no setting


def test_folders_that_are_no_vae_are_refused(vae, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    link_codes(trained, out)
    refuse("generator", *LATENT, "--vae", tmp_path / "nowhere", "--out", out, words=["--vae", "nowhere", "AutoencoderKL"])
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    refuse("generator", *LATENT, "--vae", tmp_path / "dit", "--out", out, words=["dit", "DiTTransformer2DModel"])
    (vae / "diffusion_pytorch_model.bin").rename(vae / "model.bin")
    refuse("generator", *LATENT, "--vae", vae, "--out", out, words=["no diffusion_pytorch_model"])
    (vae / "model.bin").rename(vae / "diffusion_pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refuse("generator", *LATENT, "--vae", vae, "--out", out, words=["pip install diffusers"])
    call("generator", *TINY["generator"], "--out", out)
    refuse("sample", "reconstruct", "--out", out, "--vae", vae, words=["trained in pixels"])


def test_sizes_are_names_of_width_depth_and_heads():
    for name, values in (("S", 32_953_488), ("XL", 675_129_632)):  # parameters of DiT-S/2 and DiT-XL/2 with 1,000 classes
        parser = data.make_parser("")
        data.add_training_flags(parser, 1, 4, 0.1, 0.0, 0)
        generator.add_flags(parser)
        args = data.parse(parser, generator.PRESETS, ["--dataset", "imagenet", "--size", name, "--patch", "2"], generator.SIZES)
        assert (args.width, args.depth, args.heads) == tuple(generator.SIZES[name].values())
        with torch.device("meta"):
            model = generator.DiT(32, 2, 0, args.width, args.depth, args.heads, 1, 1000, 1, "mean", "v", channels=4)
        assert abs(sum(p.numel() for p in model.parameters()) / values - 1) < 0.02
    args = data.parse(parser, generator.PRESETS, ["--dataset", "imagenet", "--size", "S", "--depth", "3"], generator.SIZES)
    assert (args.width, args.depth) == (384, 3)  # any flag overrides
