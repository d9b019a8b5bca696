"""The finished cache: layouts, statistics, stock webdataset, prompts, and the plan beforehand."""

import hashlib
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from diffusers import AutoencoderKL
from safetensors import safe_open

from shared.cache.conditioning import load_conditioning
from shared.errors import UserError
from tests.support.sources import (
    TINY_SD,
    captioned,
    encode,
    manifest,
    png,
    prep,
    refusal,
    samples,
    shards,
    tree,
    units,
    write_tar,
)

FEW = captioned(range(5))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [
        write_tar(folder / "a.tar", captioned(range(5))),
        write_tar(folder / "b.tar", captioned(range(5, 12))),
    ]


@pytest.fixture(scope="module")
def sd(tars):
    return encode(tars, tars[0].parent / "sd")


@pytest.fixture(scope="module")
def xl(tars):
    return encode(tars, tars[0].parent / "xl", model="tiny-xl", latents="posterior")


@pytest.fixture(params=["sd", "xl"])
def cache(request):
    return request.getfixturevalue(request.param)


def test_stock_webdataset_decodes_what_the_manifest_says(cache):
    stored = manifest(cache)
    seen = 0
    for row in stored["shards"]:
        layout = stored["layouts"][row["layout"]]
        content = (cache / row["file"]).read_bytes()
        decoded = list(webdataset.WebDataset(str(cache / row["file"]), shardshuffle=False).decode())
        assert len(decoded) == row["count"]
        assert len(content) == row["size"] == row["count"] * layout["stride"] + 1024
        for index, sample in enumerate(decoded):
            start = index * layout["stride"]
            for field in layout["fields"]:
                array = sample[f"{field['name']}.npy"]
                assert array.dtype.str == field["dtype"]
                assert list(array.shape) == field["shape"]
                # ... and a shard is at the same time a flat array.
                at = start + field["offset"]
                assert content[at : at + array.nbytes] == array.tobytes()
            assert sample["json"]["num_captions"] == 1
            seen += 1
    assert seen == stored["totals"]["written"] == 12


def test_members_are_named_ordered_and_owned_by_nobody(cache):
    wanted = {
        "sd": ["json", "latents.npy", "prompt_embeds.npy"],
        "xl": ["json", "latents.npy", "pooled_prompt_embeds.npy", "prompt_embeds.npy",
               "time_ids.npy"],
    }[cache.name]  # fmt: skip
    for shard in shards(cache):
        with tarfile.open(shard) as tar:
            infos = tar.getmembers()
        assert [info.name.partition(".")[2] for info in infos] == wanted * (
            len(infos) // len(wanted)
        )
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {
            (0, 0, 0, "", "", 0o644)
        }
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()[:12]
        assert re.fullmatch(rf"[ab]-[0-9a-f]{{8}}-8x8-{digest}\.tar", shard.name)


def test_statistics_are_those_of_the_latents(cache):
    means = np.stack([s.arrays["latents"][0, :4] for s in samples(cache).values()])
    assert means.shape == (12, 4, 8, 8)
    values = means.astype(np.float64)
    stored = manifest(cache)["statistics"]
    np.testing.assert_allclose(stored["latents_mean"], values.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(stored["latents_std"], values.std((0, 2, 3)), rtol=1e-9)


def test_latents_mean_or_posterior(tars, tmp_path):
    both = samples(encode(tars, tmp_path / "posterior", latents="posterior"))
    mean = samples(encode(tars, tmp_path / "mean", latents="mean"))
    for key, sample in mean.items():
        assert sample.arrays["latents"].shape == (1, 4, 8, 8)
        assert both[key].arrays["latents"].shape == (1, 8, 8, 8)
        assert (both[key].arrays["latents"][:, :4] == sample.arrays["latents"]).all()
    assert manifest(tmp_path / "posterior")["identity"]["latents"] == "posterior"
    with pytest.raises(UserError, match="--latents 'median' is not one of auto, mean, posterior"):
        encode(tars, tmp_path / "none", latents="median")


@pytest.mark.parametrize(("std", "kept"), [(0.03, "posterior"), (0.001, "mean")])
def test_latents_auto_keeps_the_logvar_where_it_matters(tars, tmp_path, std, kept):
    """A VAE whose posterior has a std of 3% (0.1%) of the spread of its latents."""
    spread = np.std([s.arrays["latents"] for s in samples(encode(tars, tmp_path / "m")).values()])
    model = link_model(tmp_path / "model", "vae")
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae")
    vae.quant_conv.weight.data[4:] = 0  # the logvar's channels
    vae.quant_conv.bias.data[4:] = 2 * float(np.log(std * spread))
    vae.save_pretrained(model / "vae")
    flags = {"model": str(model), "latents": "auto"}
    cache = encode(tars[:1], tmp_path / "auto", **flags)
    assert manifest(cache)["identity"]["latents"] == kept
    encode(tars, cache, **flags)  # going on keeps what the cache was begun with
    assert manifest(cache)["identity"]["latents"] == kept
    assert len(units(cache)) == 2


def link_model(folder, *without):
    """tiny-sd by links, less some of its parts."""
    folder.mkdir()
    for part in TINY_SD.iterdir():
        if part.name not in without:
            (folder / part.name).symlink_to(part)
    return folder


def test_embed_adds_prompts_once(tars, tmp_path):
    cache = encode(tars[0], tmp_path / "cache", preview_prompts=("a red circle",))
    before = load_conditioning(cache / "conditioning.safetensors")
    answer = prep("embed", "--cache", cache, "--prompts", "a star", "a red circle", "a star")
    assert answer.status == 0, answer.err
    assert "1 prompt added, 1 was there already" in answer.out
    after = load_conditioning(cache / "conditioning.safetensors")
    assert after.prompts == ("a red circle", "a star")
    rows = after.find(["a red circle"]).prompt_embeds
    assert (rows == before.find(["a red circle"]).prompt_embeds).all()
    assert (after.unconditional.prompt_embeds == before.unconditional.prompt_embeds).all()
    # The same as if the data had had that caption.
    other = encode(tars[0], tmp_path / "other", preview_prompts=("a star",))
    wanted = load_conditioning(other / "conditioning.safetensors").find(["a star"]).prompt_embeds
    assert (after.find(["a star"]).prompt_embeds == wanted).all()
    once = tree(cache)
    assert prep("embed", "--cache", cache, "--prompts", "a star").status == 0
    assert tree(cache) == once
    with safe_open(cache / "conditioning.safetensors", "np") as file:
        assert json.loads(file.metadata()["prompts"]) == ["a red circle", "a star"]


def test_embed_for_an_xl_cache(xl, tmp_path):
    answer = prep("embed", "--cache", xl, "--prompts", "a purple ring")
    assert answer.status == 0, answer.err
    found = load_conditioning(xl / "conditioning.safetensors").find(["a purple ring"])
    assert found.prompt_embeds.shape == (1, 16, 128)
    assert found.pooled_prompt_embeds.shape == (1, 64)


def test_embed_refuses_other_text_encoders(sd, xl):
    before = tree(sd)
    for words in (("--model", "tiny-xl"),):
        line = refusal("embed", "--cache", sd, "--prompts", "a star", *words)
        assert "other text encoders" in line
        assert "--model" in line
    assert tree(sd) == before


def test_embed_wants_a_finished_cache(tmp_path):
    line = refusal("embed", "--cache", tmp_path / "none", "--prompts", "a star")
    assert f"{tmp_path / 'none'} is not a cache" in line
    assert "prep encode" in line


def test_a_missing_prompt_is_named_with_the_command_that_adds_it(sd):
    conditioning = load_conditioning(sd / "conditioning.safetensors")
    said = "no embedding of 'a zebra' .*prep embed --cache 'my caches/sd' --prompts 'a zebra' elk$"
    with pytest.raises(UserError, match=said):
        conditioning.find(["a zebra", "elk"], Path("my caches/sd"))


def plan(answer):
    """units, pictures, kB, free GB of the line that says them."""
    pattern = r"(\d+) units? to encode, about ([\d,]+) pictures: ([\d.]+) (.)B.*; ([\d.]+) GB free"
    found = re.search(pattern, answer.err)
    assert found, answer.err
    kilobytes = float(found[3]) * {"k": 1, "M": 1e3, "G": 1e6}[found[4]]
    return int(found[1]), int(found[2].replace(",", "")), kilobytes, float(found[5])


def test_dry_run_says_what_it_would_do_and_writes_nothing(tars, tmp_path):
    words = ["encode", "--shards", *tars, "--model", "tiny-sd", "--cache", tmp_path / "cache"]
    answer = prep(*words, "--threads", 1, "--dry-run")
    assert answer.status == 0
    assert not (tmp_path / "cache").exists()
    number, pictures, kilobytes, free = plan(answer)
    assert number == 2
    assert 9 <= pictures <= 15  # counted in the first tar, scaled to the second
    assert 10 < kilobytes < 10_000
    assert abs(free - shutil.disk_usage(tmp_path).free / 1e9) < 1


def test_dry_run_of_a_cache_that_is_begun(tars, tmp_path):
    cache = encode(tars[:1], tmp_path / "cache")
    before = tree(cache)
    flags = ["--model", "tiny-sd", "--cache", cache, "--latents", "mean", "--dry-run"]
    answer = prep("encode", "--shards", *tars, *flags, "--threads", 1)
    assert plan(answer)[0] == 1
    assert tree(cache) == before


def test_bytes_are_estimated_from_the_layout(tars, tmp_path):
    """At 256 px the posterior of a picture takes one stride of 22 kB, and the plan says so."""
    flags = ["--latents", "posterior", "--resolution", 256, "--model", "tiny-sd", "--threads", 1]
    picture = png(0, 8, 8)
    files = [f for n in range(3000) for f in ((f"{n}.png", picture), (f"{n}.txt", b"a star"))]
    many = write_tar(tmp_path / "many.tar", files)
    answer = prep("encode", "--shards", many, "--cache", tmp_path / "c", *flags, "--dry-run")
    _, rows, kilobytes, _ = plan(answer)
    assert rows == 3000
    # json 1024 + latents 8*32*32*2 + prompt_embeds 16*64*2, npy headers, tar headers and padding
    stride = 3 * 512 + 1024 + (128 + 16384 + 384) + (128 + 2048 + 384)
    assert kilobytes == pytest.approx(3000 * stride / 1e3, rel=0.001)


@pytest.mark.parametrize("prefix", ["", "./", "a.b/c.d/"])
def test_pictures_are_counted_whatever_their_folder_is_called(tmp_path, prefix):
    tar = write_tar(tmp_path / "a.tar", [(prefix + name, data) for name, data in FEW])
    words = ["encode", "--shards", tar, "--model", "tiny-sd", "--cache", tmp_path / "cache"]
    assert plan(prep(*words, "--threads", 1, "--dry-run"))[1] == 5


def test_npy_headers_are_numpys_own(cache):
    for sample in samples(cache).values():
        for name, content in sample.members.items():
            if name.endswith(".npy"):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.load(io.BytesIO(content)), version=(1, 0))
                assert content == buffer.getvalue()
