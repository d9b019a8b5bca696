"""`prep synthesize`: captions alone become a cache whose latents the teacher draws."""

import hashlib
import io
import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from prep.encoders.text import TextEncoder
from prep.synthesize import teacher
from shared.models.family import load_config, resolve_model
from shared.networks.denoiser import load_unet
from shared.networks.sampling import draw_latents, teacher_predictor, teacher_scheduler
from tests.support.drawn import CAPTIONS, draw, lines
from tests.support.sources import (
    accounts,
    captioned,
    encode,
    manifest,
    prep,
    raw_samples,
    refusal,
    samples,
    shards,
    tree,
    units,
    write_tar,
)

CPU = torch.device("cpu")


def every_sample(cache):
    """(caption, latents, record) of all samples: several may have one key in the source."""
    found = []
    for shard in shards(cache):
        for _, members in raw_samples(shard):
            record = json.loads(members["json"])
            latents = np.load(io.BytesIO(members["latents.npy"]))
            found.append((record["captions"][0], latents, record))
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Ten captions, each drawn twice, in two units."""
    folder = tmp_path_factory.mktemp("drawn")
    source = lines(folder / "captions.txt", CAPTIONS)
    draw(source, folder / "cache", per_caption=2, folder_units=2)
    return source, folder / "cache"


def expected(model, caption, number, sampler="dpmsolver++", steps=2, scale=3.0):
    """What draw_latents gives for a caption, alone, unscaled."""
    resolved = resolve_model(model)
    encoder = TextEncoder(resolved, CPU, 32)
    text, empty = encoder.encode([caption]), encoder.unconditional()
    predict = teacher_predictor(load_unet(resolved.source), text, empty, scale, (64, 64))
    config = load_config(resolved.source, "scheduler/scheduler_config.json")
    digest = hashlib.sha256(f"0\0{number}\0{caption}".encode()).hexdigest()
    solver = teacher_scheduler(sampler, "trailing", config)
    scaling = load_config(resolved.source, "vae/config.json")["scaling_factor"]
    z = draw_latents(predict, solver, steps, (4, 8, 8), [int(digest[:16], 16) >> 1], CPU)
    return digest, (z / scaling).numpy()


def test_the_latents_are_those_that_the_solver_draws(drawn):
    _, cache = drawn
    found = {record["sha256"]: latents for _, latents, record in every_sample(cache)}
    assert len(found) == 20
    for number in range(2):
        digest, latents = expected("tiny-sd", CAPTIONS[3], number)
        np.testing.assert_allclose(found[digest], latents, atol=0.02, rtol=0.01)
    identity = manifest(cache)["identity"]
    assert identity["latents"] == "mean"
    assert identity["drawn"]["sampler"] == "dpmsolver++"
    assert identity["drawn"]["guidance_scale"] == 3.0  # the family's


def test_sdxl_is_told_the_resolution_and_ddim_draws_too(tmp_path):
    draw(lines(tmp_path / "c.txt", CAPTIONS[:2]), tmp_path / "cache", model="tiny-xl",
         sampler="ddim", guidance_scale=2.0)  # fmt: skip
    cached = samples(tmp_path / "cache")[CAPTIONS[1]]
    assert cached.arrays["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    assert cached.arrays["pooled_prompt_embeds"].shape[0] == 1
    _, latents = expected("tiny-xl", CAPTIONS[1], 0, "ddim", scale=2.0)
    np.testing.assert_allclose(cached.arrays["latents"], latents, atol=0.02, rtol=0.01)


def test_parts_and_a_second_run_give_the_same_bytes(drawn, tmp_path):
    source, cache = drawn
    for part in ("1/2", "0/2"):
        draw(source, tmp_path / "cache", per_caption=2, folder_units=2, part=part)
    assert prep("finish", "--cache", tmp_path / "cache", "--no-report").status == 0
    assert tree(tmp_path / "cache") == tree(cache)
    assert draw(source, tmp_path / "cache", per_caption=2, folder_units=2).startswith(
        "nothing had to be drawn"
    )
    assert tree(tmp_path / "cache") == tree(cache)


def test_only_what_is_new_is_drawn(tmp_path):
    cache = tmp_path / "cache"
    source = lines(tmp_path / "captions.txt", CAPTIONS)
    flags = {"per_caption": 2, "folder_units": 1}
    draw(source, cache, **flags)
    lines(source, ["something new", *CAPTIONS[2:], CAPTIONS[2]])  # two gone, one twice
    said = draw(source, cache, **flags)
    assert said.startswith("4 samples drawn, 1 caption encoded, 16 samples copied")
    draw(source, tmp_path / "anew", **flags)
    assert prep("gc", "--cache", cache, "--all").status == 0
    prompts = "conditioning.safetensors"  # which has the first captions that there ever were
    assert tree(cache, prompts) == tree(tmp_path / "anew", prompts)
    numbers = [latents.tobytes() for text, latents, _ in every_sample(cache) if text == CAPTIONS[2]]
    assert len(set(numbers)) == 4  # rows of one caption are drawn from other noise


def table(folder, kind):
    """Captions in a source of this kind, and the flags to read it with."""
    rows = {"id": [5, 6], "caption": CAPTIONS[:2]}
    if kind == "text":
        return lines(folder / "c.txt", ["", f" {CAPTIONS[0]} ", CAPTIONS[1]])
    if kind == "jsonl":
        return lines(folder / "c.jsonl", [json.dumps({"caption": c}) for c in CAPTIONS[:2]])
    if kind == "json list":
        (folder / "c.json").write_text(json.dumps(CAPTIONS[:2]))
        return folder / "c.json"
    if kind == "parquet":
        pq.write_table(pa.table(rows), folder / "c.parquet")
        return folder / "c.parquet"
    if kind == "only text":
        pq.write_table(pa.table({"id": [5, 6], "say": CAPTIONS[:2]}), folder / "c.parquet")
        return folder / "c.parquet"
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("kind", ["text", "jsonl", "json list", "parquet", "only text", "dataset"])
def test_captions_come_from_every_source(tmp_path, kind, capsys):
    out = prep("synthesize", "--captions", table(tmp_path, kind), "--model", "tiny-sd", "--cache",
               tmp_path / "cache", "--steps", 1, "--threads", 1, "--no-report")  # fmt: skip
    assert out.status == 0, out.err
    assert "1 unit to draw, 2 samples: " in out.err
    assert samples(tmp_path / "cache").keys() == set(CAPTIONS[:2])


def test_rows_without_captions_are_accounted_for(tmp_path):
    rows = {"id": ["a", "b", "c"], "text": [CAPTIONS[0], None, " "]}
    pq.write_table(pa.table(rows), tmp_path / "c.parquet")
    flags = {"key_column": "id", "max_reject_fraction": 1.0, "steps": 1}
    draw(tmp_path / "c.parquet", tmp_path / "cache", **flags)
    found = {row["source_key"]: row["reason"] for row in accounts(tmp_path / "cache")}
    assert found == {"a": "", "b": "no caption", "c": "no caption"}


def test_what_is_not_finite_is_drawn_again_and_else_rejected(tmp_path, monkeypatch):
    source = lines(tmp_path / "c.txt", CAPTIONS[:3])
    plain, calls = teacher.draw_latents, []

    def spoiled(predict, scheduler, steps, shape, seeds, device):
        z = plain(predict, scheduler, steps, shape, seeds, device).clone()
        calls.append(len(seeds))
        if len(seeds) == 4 or len(calls) == 3:  # the batch, and of two second tries one
            z[:2] = float("nan")
        return z

    monkeypatch.setattr(teacher, "draw_latents", spoiled)
    flags = {"mixed_precision": "bf16", "steps": 1}
    draw(source, tmp_path / "cache", **flags)
    assert calls == [4, 1, 1]
    totals = manifest(tmp_path / "cache")["totals"]
    assert (totals["written"], totals["rejected"]) == (2, {"non-finite latents": 1})
    assert next(iter(units(tmp_path / "cache").values()))["notes"] == {"fp32_retries": 2}


def test_the_other_commands_know_that_there_are_no_pictures(drawn, tmp_path):
    cache = shutil.copytree(drawn[1], tmp_path / "cache")
    line = "drawn by the teacher (dpmsolver++, 2 steps, guidance scale 3)"
    assert line in prep("stats", "--cache", cache).out
    checked = prep("verify", "--cache", cache, "--reencode", 2)
    assert checked.status == 0
    assert f"nothing encoded again: {line}" in checked.err
    assert "no damage" in checked.out
    assert prep("report", "--cache", cache).status == 0
    page = (cache / "report.html").read_text()
    assert "Drawn by the teacher" in page
    assert "source gone" not in page
    sheet = prep("decode", "--cache", cache, "--output", tmp_path / "sheet.png", "--count", 2)
    assert line in sheet.out
    assert prep("embed", "--cache", cache, "--prompts", "a kite").status == 0
    assert prep("gc", "--cache", cache).status == 0


def test_the_trainer_takes_it_as_it_is(drawn, tmp_path, cli):
    answer = cli("train", "distill", "--model", "tiny-sd", "--cache", drawn[1], "--run",
                 tmp_path / "run", "--max-train-steps", 2, "--train-batch-size", 2,
                 "--lora-rank", 2, "--threads", 1, "--report-to", "none")  # fmt: skip
    assert answer.status == 0, answer.err


def test_webdataset_reads_it(drawn):
    import webdataset

    found = list(webdataset.WebDataset(str(shards(drawn[1])[0]), shardshuffle=False).decode())
    assert {"latents.npy", "prompt_embeds.npy", "json"} <= found[0].keys()


def test_settings_and_kinds_of_caches_do_not_mix(drawn, tmp_path):
    source, cache = drawn
    words = ("synthesize", "--captions", source, "--model", "tiny-sd", "--cache", cache)
    same = ("--per-caption", 2, "--folder-units", 2, "--threads", 1)
    said = refusal(*words, *same, "--steps", 3)
    assert said.startswith(f"{cache} was made with other settings: drawn.steps is 2 there, 3 here")
    tar = write_tar(tmp_path / "a.tar", captioned(range(2)))
    said = refusal("encode", "--shards", tar, "--model", "tiny-sd", "--cache", cache)
    assert said == f"{cache} was drawn by the teacher (`prep synthesize`); choose another --cache"
    pictures = encode(tar, tmp_path / "pictures")
    said = refusal(*words[:-1], pictures, *same)
    assert said == f"{pictures} was made from pictures (`prep encode`); choose another --cache"


MISTAKES = [
    (["nothing.txt"], "--captions: nothing matches 'nothing.txt'"),
    (["empty.txt"], "empty.txt holds no captions; leave it out of --captions"),
    (["."], ". is a folder; name the files of captions in it"),
    (["two.parquet"], "two.parquet has the columns a, b: which one holds the captions? Say "
     "--caption-column NAME"),
    (["two.parquet", "--caption-column", "c"],
     "--caption-column 'c': two.parquet has the columns a, b"),
    (["c.txt", "--caption-column", "c"], "--caption-column is for tables and jsonl; c.txt is text"),
    (["c.csv"], "c.csv is a table of text; text (a caption a line), jsonl and Parquet are read"),
    (["latin.txt"], "latin.txt is not UTF-8; save as UTF-8, or say --caption-encoding cp1252 or "
     "what it is"),
    (["c.txt", "--steps", "1001"], "--steps 1001 must be 1 to 1000, all that the model knows"),
    (["c.txt", "--resolution", "60"], "--resolution 60 is not a multiple of 8"),
    (["c.txt", "--folder-units", "3"], "--folder-units 3 is not a power of two"),
    (["c.txt", "--streaming"],
     "--streaming is for datasets of the hub (hf://); --captions has none"),
    (["c.txt", "--ray-address", "auto"],
     "--ray-address is for --engine ray; add that, or leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "c.txt", CAPTIONS[:2])
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "c.csv").write_text("text\na\n")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "two.parquet")
    said = refusal("synthesize", "--captions", *words, "--model", "tiny-sd", "--cache", "cache")
    assert said == message
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_says_how_much_and_writes_nothing(tmp_path):
    source = lines(tmp_path / "c.txt", CAPTIONS)
    answer = prep("synthesize", "--captions", source, "--model", "tiny-sd", "--cache",
                  tmp_path / "cache", "--per-caption", 3, "--threads", 1, "--dry-run")  # fmt: skip
    assert answer.status == 0, answer.err
    assert "1 unit to draw, 30 samples: " in answer.err
    assert not (tmp_path / "cache").exists()
