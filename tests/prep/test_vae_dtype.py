"""`--vae-dtype float16`: what a cache holds then, and what becomes of loud pictures."""

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from prep.encode import plan
from prep.encoders import vae as prep_vae
from shared.models.vae import load_vae
from tests.support.loud_vae import latents_of, loud_vae, model_with
from tests.support.sources import (
    TINY_SD,
    accounts,
    captioned,
    encode,
    file_of,
    manifest,
    photo,
    prep,
    refusal,
    samples,
    tree,
    units,
    write_tar,
)

CPU = torch.device("cpu")
GREY = np.full((64, 64, 3), 127, np.uint8)  # -0.004 for the VAE
LOUD_INPUT = 2.0**17  # times which, grey is about 500 and a photograph beyond fp16


def contrast_vae():
    """A VAE whose stream is as large as its picture's contrast, for a while."""
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae").requires_grad_(False)
    vae.encoder.conv_in.weight *= LOUD_INPUT
    vae.encoder.conv_in.bias.zero_()
    return vae


def grey_png():
    return file_of(Image.fromarray(GREY))


def greys(numbers):
    return [
        file
        for n in numbers
        for file in ((f"{n:04d}.png", grey_png()), (f"{n:04d}.txt", f"grey {n}".encode()))
    ]


def relative(ours, right):
    return np.linalg.norm(ours - right) / np.linalg.norm(right)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("pictures") / "a.tar", captioned(range(10)))


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    return str(model_with(loud_vae(), tmp_path_factory.mktemp("loud") / "model"))


@pytest.fixture(scope="module")
def right(pictures, loud, tmp_path_factory):
    """The loud model's cache in fp32."""
    return encode(pictures, tmp_path_factory.mktemp("right") / "cache", model=loud)


def test_cpu_encodes_in_fp32_unless_told(right):
    vae = manifest(right)["identity"]["vae"]
    assert (vae["dtype"], vae["rescale"]) == ("float32", 1.0)
    assert "source" not in vae
    assert [unit["notes"] for unit in units(right).values()] == [{}]


def test_fp16_from_the_command_line_to_the_contact_sheet(pictures, loud, right, tmp_path):
    cache = tmp_path / "cache"
    words = ("--shards", pictures, "--model", loud, "--cache", cache, "--threads", 1)
    answer = prep("encode", *words, "--latents", "mean", "--vae-dtype", "float16")
    assert answer.status == 0, answer.err
    assert "float32" not in answer.out  # nothing had to be encoded again
    identity = manifest(cache)["identity"]["vae"]
    assert identity["dtype"] == "float16"
    assert np.log2(identity["rescale"]) in range(-16, -5)
    assert identity["fingerprint"] == manifest(right)["identity"]["vae"]["fingerprint"]
    assert 0 < relative(latents_of(cache), latents_of(right)) < 0.01
    assert prep("verify", "--cache", cache).status == 0
    sheet = tmp_path / "sheet.png"
    assert prep("decode", "--cache", cache, "--output", sheet).status == 0
    assert sheet.exists()


def test_a_second_run_takes_the_recorded_scale(pictures, loud, tmp_path):
    cache = encode(pictures, tmp_path / "cache", model=loud, vae_dtype="float16")
    before = tree(cache)
    encode(pictures, cache, model=loud)  # no flag: as the cache was begun
    assert tree(cache) == before
    # Another scale than calibration finds: a run that calibrated anew would be refused.
    identity = json.loads((cache / "identity.json").read_text())
    identity["vae"]["rescale"] /= 2
    (cache / "identity.json").write_text(json.dumps(identity))
    more = write_tar(tmp_path / "b.tar", captioned(range(20, 24)))
    encode((pictures, more), cache, model=loud)
    assert manifest(cache)["identity"]["vae"]["rescale"] == identity["vae"]["rescale"]
    assert manifest(cache)["totals"]["written"] == 14


def test_fp16_gives_the_same_bytes_whatever_was_interrupted(pictures, loud, tmp_path):
    more = write_tar(tmp_path / "b.tar", captioned(range(20, 24)))
    flags = {"model": loud, "vae_dtype": "float16"}
    once = encode((pictures, more), tmp_path / "once", **flags)
    twice = encode(pictures, tmp_path / "twice", **flags)
    encode((pictures, more), twice, model=loud)
    assert tree(twice, "conditioning.safetensors") == tree(once, "conditioning.safetensors")


def test_dtypes_do_not_mix(pictures, loud, right):
    words = ("--shards", pictures, "--model", loud, "--cache", right, "--latents", "mean")
    line = refusal("encode", *words, "--vae-dtype", "bfloat16")
    assert "vae.dtype is float32 there, bfloat16 here" in line


def test_bfloat16(pictures, loud, right, tmp_path):
    cache = encode(pictures, tmp_path / "cache", model=loud, vae_dtype="bfloat16")
    assert manifest(cache)["identity"]["vae"]["rescale"] == 1.0
    assert 0 < relative(latents_of(cache), latents_of(right)) < 0.05


def test_a_picture_that_overflows_is_encoded_again_alone_in_fp32(tmp_path):
    source = str(model_with(contrast_vae(), tmp_path / "model"))
    encoder = prep_vae.VaeEncoder(source, CPU, 4, "float16")
    encoder.calibrate([GREY] * 3)  # which knows nothing of contrast
    colourful = np.asarray(photo(1, 64, 64))
    found = encoder.finish(encoder.start([GREY, colourful, GREY]))
    batch = found.moments
    assert found.retried.tolist() == [False, True, False]
    alone = torch.from_numpy(np.stack([colourful])).permute(0, 3, 1, 2).float() / 127.5 - 1
    moments = load_vae(source).encode(alone).latent_dist
    assert np.array_equal(batch[1, :4], moments.mean[0].numpy())
    assert np.isfinite(batch).all()
    neighbours = encoder.finish(encoder.start([GREY] * 3))
    assert np.array_equal(batch[[0, 2]], neighbours.moments[[0, 2]])
    assert not neighbours.retried.any()


def test_retries_are_counted_per_unit_and_said(tmp_path):
    source = str(model_with(contrast_vae(), tmp_path / "model"))
    grey = write_tar(tmp_path / "a.tar", greys(range(3)))
    mixed = write_tar(tmp_path / "b.tar", greys([3]) + captioned([5]) + greys([6]))
    words = ("--model", source, "--cache", tmp_path / "cache", "--latents", "mean")
    flags = ("--threads", 1, "--vae-dtype", "float16", "--vae-batch-size", 3)
    answer = prep("encode", "--shards", grey, mixed, *words, *flags)
    assert answer.status == 0, answer.err
    assert "1 picture encoded again in float32" in answer.out
    notes = {unit["source"]: unit["notes"] for unit in units(tmp_path / "cache").values()}
    assert notes == {str(grey): {}, str(mixed): {"fp32_retries": 1}}
    assert manifest(tmp_path / "cache")["totals"]["written"] == 6


def retries_of(cache):
    return {row["source_key"]: row["fp32_retries"] for row in accounts(cache)}


def test_a_copied_sample_keeps_its_count_of_retries(tmp_path):
    source = str(model_with(contrast_vae(), tmp_path / "model"))
    flags = {"model": source, "vae_dtype": "float16", "vae_batch_size": 3}
    tar = write_tar(tmp_path / "a.tar", greys(range(3)) + captioned([5]))
    cache = encode(tar, tmp_path / "cache", **flags)
    assert retries_of(cache) == {"0000": 0, "0001": 0, "0002": 0, "0005": 1}
    write_tar(tar, greys(range(4)) + captioned([5]))
    encode(tar, cache, **flags)
    assert retries_of(cache) == {"0000": 0, "0001": 0, "0002": 0, "0003": 0, "0005": 1}
    assert [unit["notes"] for unit in units(cache).values()] == [{"fp32_retries": 1}]
    scratch = encode(tar, tmp_path / "scratch", **flags)
    assert {(row["key"], row["fp32_retries"]) for row in accounts(cache)} == {
        (row["key"], row["fp32_retries"]) for row in accounts(scratch)
    }
    assert list(units(cache).values()) == list(units(scratch).values())


def test_tables_from_before_retries_were_counted_are_copied_from(pictures, tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", captioned(range(3)))
    cache = encode(tar, tmp_path / "cache")
    ((name, unit),) = units(cache).items()
    table = pq.read_table(cache / unit["samples"]).drop_columns(["fp32_retries"])
    pq.write_table(table, cache / unit["samples"])
    content = (cache / unit["samples"]).read_bytes()
    unit["samples_sha256"] = hashlib.sha256(content).hexdigest()
    (cache / "units" / f"{name}.json").write_text(json.dumps(unit))
    write_tar(tar, captioned(range(4)))
    words = ("--model", "tiny-sd", "--cache", cache, "--threads", 1, "--no-report")
    answer = prep("encode", "--shards", tar, *words)
    assert "1 picture and 1 caption encoded, 3 pictures copied" in answer.out
    assert set(retries_of(cache).values()) == {0}


@pytest.mark.parametrize("other", ["scale", pytest.param("resolution", marks=pytest.mark.slow)])
def test_who_begins_a_cache_second_takes_over_the_scale(
    pictures, loud, tmp_path, monkeypatch, other
):
    """Another process begins the cache while this one calibrates, and finds another scale."""
    first = encode(pictures, tmp_path / "first", model=loud, vae_dtype="float16")
    identity = json.loads((first / "identity.json").read_text())
    identity["vae"]["rescale"] /= 2
    if other == "resolution":
        identity["preprocessing"]["resolution"] = 128
    cache, probe = tmp_path / "cache", plan.probe

    def overtaken(*arguments):
        found = probe(*arguments)
        cache.mkdir(exist_ok=True)
        (cache / "identity.json").write_text(json.dumps(identity))
        return found

    monkeypatch.setattr(plan, "probe", overtaken)
    words = ("--shards", pictures, "--model", loud, "--cache", cache, "--threads", 1)
    flags = ("--latents", "mean", "--vae-dtype", "float16", "--no-report")
    if other == "resolution":
        line = refusal("encode", *words, *flags, "--resolution", 64)  # as flagged, or not at all
        assert "preprocessing.resolution is 128 there, 64 here" in line
        assert "rescale" not in line
        return
    assert prep("encode", *words, *flags).status == 0
    assert json.loads((cache / "identity.json").read_text()) == identity
    monkeypatch.setattr(plan, "probe", probe)
    again = tmp_path / "again"
    again.mkdir()
    (again / "identity.json").write_text(json.dumps(identity))
    encode(pictures, again, model=loud)
    assert np.array_equal(latents_of(cache), latents_of(again))


def test_a_hopeless_picture_is_quarantined_and_its_neighbours_live(tmp_path, monkeypatch):
    def spoil_white(_, inputs, output):
        white = inputs[0].float().mean((1, 2, 3)) > 0.9
        return output.masked_fill(white[:, None, None, None], float("nan"))

    def load(source):
        vae = load_vae(source)
        vae.encoder.register_forward_hook(spoil_white)
        return vae

    white = file_of(Image.new("RGB", (64, 64), "white"))
    white = [("0002.png", white), ("0002.txt", b"nothing")]
    odd = write_tar(tmp_path / "a.tar", captioned(range(2)) + white + captioned([3]))
    monkeypatch.setattr(prep_vae, "load_vae", load)
    cache = encode(odd, tmp_path / "cache", vae_dtype="float16")
    found = {row["source_key"]: row["reason"] for row in accounts(cache)}
    assert found == {"0000": "", "0001": "", "0002": "non-finite latents", "0003": ""}
    assert sorted(samples(cache)) == ["0000", "0001", "0003"]
    assert [unit["notes"] for unit in units(cache).values()] == [{"fp32_retries": 1}]


def test_a_vae_that_fp16_spoils_is_refused(pictures, tmp_path):
    """Weights so small that fp16 has few digits for them."""
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae").requires_grad_(False)
    vae.quant_conv.weight *= 1e-7
    vae.quant_conv.bias *= 1e-7
    source = model_with(vae, tmp_path / "model")
    words = ("--shards", pictures, "--model", source, "--cache", tmp_path / "cache")
    line = refusal("encode", *words, "--vae-dtype", "float16")
    assert "deviate" in line
    assert "--vae-dtype float32" in line
