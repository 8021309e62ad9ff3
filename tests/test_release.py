"""The authors' models: toy ones in the layout of their release, and the paper's own diffusion and prior."""
import json
import math
import os
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import data
import generator
import prior
import pytest
import text_prior
import tokenizer
import torch
from conftest import (TINY, AutoencoderKL, call, link_codes, make_vae, part, refuse, same, stopped_after,
                      weights)
from PIL import Image
from test_generator import sampler
from test_runs import train
from test_text_prior import write_tokenizer_json
from test_tokenizer import to_transformers, vit

L, V = 16, 4  # as in the other tests, so that tiny codes can train from these weights


def filled(model):
    """A model with random numbers wherever it starts with zeros or ones."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False).eval()


def released_dit(model):
    """The opposite of generator.read_release, by the shapes of the release, pixel by pixel."""
    names = {"x_embed.": "x_embedder.proj.", "t_embed.": "t_embedder.mlp.", "adaLN.": "adaLN_modulation.1.",
             "final_adaLN": "final_layer.adaLN", "final.": "final_layer.linear.",
             "code_mean.table": "sem_embedder.embedding_table"}
    state = {}
    for name, x in model.state_dict().items():
        if name == "x_embed.weight":
            x = x.view(len(x), 12, 4, 4)
        if name == "code_mean.table":
            x = x.view(L, V + 1, -1)
        if name.startswith("final.") and x.shape[0] == 24 * 16:
            rows = [c * 16 + place for place in range(16) for c in range(24)]  # pixel by pixel, 24 channels
            x = x[rows]
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = x
    return state


def write(folder, state, **config):
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))


def write_llada(folder, model):
    """Two shards with an index, bfloat16, and a tokenizer.json."""
    state = {f"model.transformer.{name}": x.bfloat16() for name, x in model.state_dict().items()}
    files = {name: f"part-{k % 2}.bin" for k, name in enumerate(state)}
    folder.mkdir()
    for file in set(files.values()):
        torch.save({name: x for name, x in state.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"n_heads": 2}))
    write_tokenizer_json(folder / "tokenizer.json")


@pytest.fixture(scope="session")
def models():
    """Toy models of the release's four kinds, in our classes."""
    torch.manual_seed(1)
    encoder = filled(vit(image_size=32, patch=4, width=16, heads=2, codes=L, values=V, registers=4))
    text = filled(text_prior.TextPrior(L, V, 300, 305, 306, 512, 16, 2, 2, 24, 0.0, "shared"))
    for p in text.parameters():
        p.copy_(p.bfloat16())
    sedd = filled(prior.SEDD(L, V, 16, 2, 2, 0.0, condition=128))
    dit = filled(generator.DiT(16, 4, 0, 16, 2, 2, L, V, 1, "mean", "noise", channels=12, block="plain"))
    return SimpleNamespace(encoder=encoder, sedd=sedd, dit=dit, text=text)


@pytest.fixture
def release(models, tmp_path, monkeypatch):
    """The four folders on disk, as the authors named them."""
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=AutoencoderKL))
    folder = tmp_path / "release"
    weights = models.encoder.state_dict()
    state = {name: x for name, x in weights.items() if not name.startswith("sem_")}
    of_sem = {name: x for name, x in weights.items() if name.startswith(("sem_embed", "sem_norm"))}
    write(folder / "SEM_dinov2_L512", to_transformers(state) | of_sem, num_attention_heads=2)
    write(folder / "DLC_SEDD_L512", models.sedd.state_dict() | {"rotary_emb.inv_freq": torch.ones(4)})
    write(folder / "DLC_DiT_L512" / "transformer", released_dit(models.dit), num_heads=2)
    make_vae(folder / "DLC_DiT_L512" / "vae", 2.0)
    write_llada(folder / "DLC_LLADA_L512", models.text)
    return folder


# --- the paper's own diffusion ----------------------------------------------------------------------------

def test_a_step_of_the_noise_levels_is_bayes_rule():
    """q(z_b | z_k, x) has the mean and variance of q(z_k | z_b) q(z_b | x), normalised."""
    levels = generator.NoiseLevels(10)
    x, z = torch.tensor(0.3), torch.tensor(-0.8)
    alpha = levels.signal.double().flatten() ** 2
    for i in range(1, 10):
        forward = alpha[i] / alpha[i - 1]  # 1 − β_k
        precision = forward / (1 - forward) + 1 / (1 - alpha[i - 1])
        mean = (forward.sqrt() * z / (1 - forward) + alpha[i - 1].sqrt() * x / (1 - alpha[i - 1])) / precision
        assert torch.allclose(levels.posterior_mean(x, z, i).double(), mean, rtol=1e-3, atol=1e-5)
        assert math.isclose(levels.log_posterior[i].exp(), 1 / precision, rel_tol=1e-3)
    assert levels.numbers == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]


class Knows:
    """A network of pictures N(0, s²) in each pixel: it says the expected noise, and of the variance the share
    u of equation (6)."""
    predict, V, condition = "noise", 5, "none"

    def __init__(self, s, u=-1.0):
        self.s, self.u = s, u
        self.calls = []

    def __call__(self, z, k, codes=None):
        self.calls.append(len(z))
        alpha = generator.NoiseLevels(1000, z.device).signal[k] ** 2  # (B, 1, 1, 1)
        e = z * (1 - alpha).sqrt() / (alpha * self.s ** 2 + 1 - alpha)
        return torch.cat([e, torch.full_like(z, self.u)], 1)


def test_a_network_that_knows_the_noise_draws_the_right_pictures_by_each_method(run):
    """For Gaussian pictures of deviation s the limit of the ODE is z → s z; DDPM draws of that deviation."""
    for method, steps, calls in (("heun", 40, 79), ("euler", 200, 200), (None, 200, 200)):
        model = Knows(s=0.4)
        args = sampler(sample_steps=steps, method=method)
        noises = []

        def draw():
            noises.append(torch.randn(64, 3, 8, 8))
            return noises[-1]

        drawn = generator.solve(model, None, draw, args, run)
        assert len(model.calls) == calls and abs(drawn.std() - 0.4) < 0.02
        if method:
            assert (drawn - 0.4 * noises[0]).abs().max() < 0.05 and len(noises) == 1
        else:
            assert abs((drawn * noises[0]).mean()) < 0.4 / 2  # it adds noise of its own


def test_guidance_leaves_the_learned_variance_of_the_codes_alone(run, models):
    model = models.dit
    z, codes = torch.randn(2, 12, 16, 16), torch.randint(0, V, (2, L))
    drawn = {w: generator.guided_network(model, codes, sampler(w), run)(z, 0.5, 400) for w in (0.0, 1.0, 3.0)}
    null = model(z, torch.full((2,), 400), torch.full_like(codes, V))
    assert torch.allclose(drawn[0.0][:, :12], null[:, :12], atol=1e-6)
    assert torch.allclose(drawn[3.0][:, :12], (3 * drawn[1.0] - 2 * null)[:, :12], atol=1e-5)
    assert torch.allclose(drawn[0.0][:, 12:], drawn[1.0][:, 12:], atol=1e-6)


def test_the_bound_is_zero_where_the_step_is_right_and_counts_bytes_at_the_end():
    levels = generator.NoiseLevels()
    x, z = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    i = torch.tensor([1, 10, 500, 999])
    mean, log_variance = levels.posterior_mean(x, z, i), levels.log_posterior[i].expand_as(x)
    assert levels.bound_bits(x, z, i, mean, log_variance).abs().max() < 1e-5
    off = levels.bound_bits(x, z, i, mean + 0.1, log_variance)
    assert torch.allclose(off, 0.005 / log_variance.exp()[:, 0, 0, 0] / math.log(2), rtol=1e-3)
    wide = torch.full_like(x, 2 * math.log(0.2))
    first = torch.zeros(4).long()
    pixels = data.from_bytes(torch.randint(1, 255, x.shape))
    bits = levels.bound_bits(pixels, z, first, pixels, wide)  # a byte is 2 / 255 wide
    assert torch.allclose(bits, torch.tensor(math.log2(255 / 2 * 0.2 * math.sqrt(2 * math.pi))), atol=0.02)


def test_the_noise_loss_trains_the_noise_by_squares_and_the_variance_by_the_bound(run):
    x = torch.randn(256, 3, 4, 4) * 0.4

    def loss(network):
        return generator.noise_loss(network, x, None, part(256), None, run)

    best = loss(Knows(0.4))
    assert best < loss(Knows(0.4, u=3.0)) and best < loss(Knows(1e-6))


@pytest.mark.parametrize("stage, flags", [
    ("generator", "--block plain --predict noise --condition mean --stem 0"),
    ("prior-masked", "--network sedd --dropout 0.2")])
def test_the_papers_networks_go_on_bit_for_bit_and_draw(trained, tmp_path, stage, flags, monkeypatch):
    flags = [*flags.split(), "--steps", "9", "--save-every", "4"]
    with stopped_after(5, monkeypatch):
        train(trained, tmp_path / "cut", stage, *flags)
    assert weights(tmp_path / "cut", stage)["step"] == 5
    same(train(trained, tmp_path / "cut", stage, *flags), train(trained, tmp_path / "whole", stage, *flags))
    folder = tmp_path / "whole" / "shapes"
    if stage == "generator":
        for method in ([], ["--method", "heun"]):
            call("sample", "reconstruct", "--rows", 1, "--sample-steps", 3, *method, "--out", folder.parent)
    else:
        os.link(trained / "shapes" / "generator.pt", folder / "generator.pt")
        call("sample", "unconditional", "--sample-steps", 1, "--out", folder.parent)


# --- the paper's own prior --------------------------------------------------------------------------------

def test_sedd_is_told_the_noise_at_which_so_many_positions_are_hidden(models):
    model = models.sedd
    codes = torch.randint(0, V, (3, L))
    codes[0, :4] = V
    codes[1] = V
    sigma = -torch.log1p(-torch.tensor([4 / L, 0.999, 0.0]))
    assert torch.allclose(model(codes), model.outputs(codes, sigma)[..., :V])
    assert not torch.allclose(model.outputs(codes, sigma + 1), model.outputs(codes, sigma), atol=1e-3)


def test_sedd_trains_by_the_bound_and_draws_in_a_call_for_each_position_and_round(trained, tmp_path, capsys):
    out = tmp_path / "out"
    link_codes(trained, out)
    flags = ["--kind", "masked", "--network", "sedd", *TINY["prior"], "--out", out]
    call("prior", *flags, "--steps", 60, "--lr", 0.01)
    shown = capsys.readouterr().out
    bits = float(shown.split("test: ")[1].split()[0])
    assert 0 < bits < 2 and "network calls per sample: 48.0 for 16" in shown
    with pytest.raises(SystemExit):
        call("prior", *flags, "--kind", "ar")
    assert "argument --network: sedd is a masked prior" in capsys.readouterr().err


# --- the release ------------------------------------------------------------------------------------------

def test_released_weights_give_what_the_models_they_were_written_from_give(release, models):
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    encoder = tokenizer.load_release(release / "SEM_dinov2_L512", L, V, "cpu")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(encoder.encode(images)[0], models.encoder.encode(normalised)[0])
    assert encoder.image_size == 64  # 16 patches a side

    z, codes = torch.randn(3, 12, 16, 16), torch.randint(0, V + 1, (3, L))
    dit = generator.load_release(release / "DLC_DiT_L512", "cpu")
    k = torch.tensor([999, 400, 0])
    assert torch.equal(dit(z, k, codes), models.dit(z, k, codes))
    sedd = prior.load_release(release / "DLC_SEDD_L512", "cpu")
    assert torch.equal(sedd(codes), models.sedd(codes))

    model, text, _ = text_prior.load_release(release / "DLC_LLADA_L512", {"L": L, "V": V}, "cpu")
    assert model.wte.weight.dtype == torch.bfloat16 and (text.pad, text.mask, text.start) == (300, 305, 306)
    words = text.rows(text.encode(["abcd", "a cat", "cd"])).long()
    reading = torch.zeros(3).bool()
    for found, expected in zip(model.float()(codes, words, reading), models.text(codes, words, reading)):
        assert torch.allclose(found, expected, atol=1e-5)


def test_without_caption_start_and_words_of_the_release_are_hidden(release):
    model, text, _ = text_prior.load_release(release / "DLC_LLADA_L512", {"L": L, "V": V}, "cpu")
    model.float()
    codes, words = torch.full((2, L), V), text.rows(text.encode(["abcd", "cd e"])).long()
    nothing = torch.zeros(2).bool()
    hidden = torch.where(words == text.pad, text.pad, text.mask)
    null = model(codes, hidden, nothing, torch.full((2, 1), text.mask))[0].log_softmax(-1)
    given = model(codes, words, nothing)[0].log_softmax(-1)
    guided = text_prior.TextToCode(model, 3.0)(codes, words)
    assert torch.allclose(guided, null + 3 * (given - null), atol=1e-4)


PICTURES = "--image-size 32 --sample-steps 3 --batch 2 --seed 3".split()


@pytest.mark.parametrize("command", [
    "unconditional --columns 2 --rows 1", "reconstruct FILE FILE --rows 1", "infill FILE --rows 1",
    "compose FILE FILE --columns 2 --rows 1", "compose FILE FILE --choose prior --columns 2 --rows 1",
    "text abcd --columns 2", "text abcd --image FILE --text-guidance 2 --columns 2", "caption FILE"])
def test_every_command_draws_with_the_release_and_calls_no_network_too_often(release, tmp_path, command,
                                                                             monkeypatch):
    calls = Counter()
    for module in (prior.SEDD, generator.DiT, text_prior.TextPrior):
        def counted(model, *inputs, usual=module.forward, **more):
            calls[type(model).__name__] += 1
            return usual(model, *inputs, **more)

        monkeypatch.setattr(module, "forward", counted)
    picture = tmp_path / "a.png"
    Image.effect_noise((70, 60), 80).convert("RGB").save(picture)
    words = [str(picture) if word == "FILE" else word for word in command.split()]
    call("sample", *words, *PICTURES, "--release", release, "--out", tmp_path / "out")
    [drawn] = (tmp_path / "out" / "imagenet" / "samples").glob("*.png")
    assert Image.open(drawn).width >= 66
    assert calls["DiT"] == 3  # a step each, with and without code in one batch
    if command.startswith(("unconditional", "text abcd --columns")):
        assert calls["SEDD"] + calls["TextPrior"] == L


def test_the_release_is_scored_with_inception_on_images_of_a_folder(release, tmp_path, inception, places):
    call("sample", "--score", "--inception", inception, "--release", release, "--count", 8, *PICTURES,
         "--out", tmp_path / "out", *places["imagenet"])
    scores = json.loads((tmp_path / "out" / "imagenet" / "inception.json").read_text())
    assert scores["true codes"]["samples"] == 8 and scores["codes of prior-masked"]["FID"] > 0


NORM = "blocks.0.norm1.weight"


@pytest.mark.parametrize("part, change, words", [
    ("DLC_SEDD_L512", None, ["DLC_SEDD_L512"]), ("DLC_DiT_L512/transformer", None, ["transformer"]),
    ("DLC_DiT_L512/vae", None, ["AutoencoderKL"]),
    ("DLC_DiT_L512/transformer", {"pos_embed": None}, ["transformer", "DiT"]),
    ("DLC_SEDD_L512", {NORM: None}, ["Missing", NORM]),
    ("DLC_SEDD_L512", {NORM: torch.zeros(7)}, [NORM, "[7]"]),
    ("DLC_SEDD_L512", {"more.weight": torch.zeros(7)}, ["Unexpected", "more.weight"])])
def test_a_release_that_is_not_whole_is_refused_with_one_line(release, tmp_path, part, change, words):
    """A folder is gone (None), or weights of it are gone or others."""
    if change is None:
        shutil.rmtree(release / part)
    else:
        file = release / part / "pytorch_model.bin"
        state = torch.load(file, weights_only=True) | change
        torch.save({name: x for name, x in state.items() if x is not None}, file)
    refuse("sample", "unconditional", *PICTURES, "--release", release, "--out", tmp_path / "out", words=words)


def test_a_shard_that_is_missing_a_broken_package_and_flags_that_cannot_be_are_one_line(
        release, tmp_path, monkeypatch, capsys):
    (release / "DLC_LLADA_L512" / "part-1.bin").unlink()
    words = ["sample", "text", "abcd", *PICTURES, "--release", release, "--out", tmp_path / "out"]
    refuse(*words, words=["part-1.bin"])
    for flags in (["--train"], ["--score"], ["unconditional", "--kind", "ar"]):
        with pytest.raises(SystemExit):
            call("sample", *flags, "--release", release)
        assert "--release" in capsys.readouterr().err

    class Broken(dict):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "diffusers", Broken())
    refuse("sample", "unconditional", *PICTURES, "--release", release, "--out", tmp_path / "out",
           words=["diffusers", "nms does not exist"])


# --- going on from the release (--init) -------------------------------------------------------------------

INIT = ["--steps", "1", "--batch-size", "8", "--lr", "0", "--lr-matrix", "0", "--width", "16", "--depth", "2",
        "--heads", "2"]


@pytest.mark.parametrize("command, part, stage", [
    ("generator --block plain --predict noise --condition mean --patch 4 --stem 0 --vae FOLDER/vae",
     "DLC_DiT_L512", "generator"),
    ("prior --kind masked --network sedd", "DLC_SEDD_L512", "prior-masked"),
    ("text_prior --tables shared --hidden 24 --encoding FOLDER/tokenizer.json",
     "DLC_LLADA_L512", "text_prior")])
def test_training_from_the_release_starts_with_its_weights(release, trained, tmp_path, command, part, stage):
    folder = release / part
    name, *flags = [word.replace("FOLDER", str(folder)) for word in command.split()]
    out = tmp_path / "out"
    link_codes(trained, out)
    call(name, *INIT, *flags, "--init", folder, "--out", out)
    for key, x in sys.modules[name].read_release(folder)[0].items():
        assert torch.equal(weights(out, stage)["ema"][key], x.float()), key
    refuse(name, *INIT, *flags, "--heads", "4", "--restart", "--init", folder, "--out", out,
           words=[part, "is of heads 2"])


def test_the_tokenizer_starts_from_the_released_encoder_with_its_simplicial_embedding(release, tmp_path):
    out = tmp_path / "out"
    flags = "--attention --stem 0 --patch 4 --registers 4 --sem-read registers".split()
    flags += "--codes 16 --values 4 --colour-codes 0 --no-nearest".split()
    call("tokenizer", *INIT, *flags, "--init", release / "SEM_dinov2_L512", "--out", out)
    expected = tokenizer.backbone_weights(release / "SEM_dinov2_L512")
    found = weights(out, "tokenizer")["ema"]
    for name in ("sem_embed.weight", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight"):
        assert torch.equal(found[f"backbone.{name}"], expected[name])
