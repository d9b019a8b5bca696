"""Parts of a job that begin one cache at once: whoever is first decides, and all end well.

Any number of processes, in any order and at any moment, on unlike machines, on a disk and on S3.
"""

import json
from pathlib import Path

import pytest

from prep.encode import engine as prep_engine
from shared.cache.conditioning import load_conditioning
from shared.storage.urls import place
from tests.support import warm
from tests.support.s3 import bucket, objects, serving
from tests.support.sources import captioned, encode, manifest, prep, refusal, tree, units, write_tar

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests/support/parts.py"
TARS, PICTURES = 6, 2  # fewer tars than parts: some have nothing to do


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for n in range(TARS):
        write_tar(folder / f"{n}.tar", captioned(range(10 * n, 10 * n + PICTURES)))
    return f"{folder}/*.tar"


def together(folder, sources, *flags, cache=None, encode=()):
    """The rounds' caches, once all their processes have ended with 0."""
    words = ["--cache", cache or folder / "cache", "--logs", folder / "logs", *flags, "--"]
    words += ["--shards", sources, "--model", "tiny-sd", *encode]
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    answer = warm.run([DRIVER, *words], ROOT, **settings)
    assert answer.returncode == 0, answer.stderr[-3000:]
    rounds = json.loads(answer.stdout)
    for played in rounds:
        assert not played["failed"], json.dumps(played, indent=1)
    return [played["cache"] for played in rounds]


def alone(folder, sources, like):
    """The cache that one process makes with the settings that the others came to."""
    shapes = like["shapes"]
    words = ["--shards", sources, "--model", "tiny-sd", "--cache", folder / "alone", "--no-report",
             "--latents", like["latents"], "--threads", shapes["threads"],
             "--vae-batch-size", shapes["vae_batch_size"]]  # fmt: skip
    answer = prep("encode", *words)
    assert answer.status == 0, answer.err
    return tree(folder / "alone")


def assert_one_cache(caches, sources, folder):
    for number, cache in enumerate(caches):
        found = manifest(Path(cache))
        assert found["totals"]["written"] == TARS * PICTURES
        assert len(units(Path(cache))) == TARS
        (folder / f"{number}").mkdir()
        assert tree(Path(cache)) == alone(folder / f"{number}", sources, found["identity"])


def test_parts_on_unlike_machines_begin_a_new_cache_at_once(tmp_path, sources):
    caches = together(tmp_path, sources, "--parts", 4, "--unlike")
    assert_one_cache(caches, sources, tmp_path)


def test_a_part_that_comes_later_takes_over_what_is_recorded_though_it_has_other_defaults(
    tmp_path, sources, monkeypatch
):
    cache = tmp_path / "cache"
    words = ["encode", "--shards", sources, "--model", "tiny-sd", "--cache", cache, "--no-report"]
    monkeypatch.setattr("shared.machine.cpus.threads", lambda *_: 3)
    assert prep(*words, "--part", "0/2", "--resolution", 48).status == 0
    monkeypatch.setattr("shared.machine.cpus.threads", lambda *_: 1)
    monkeypatch.setattr("prep.commands.posterior_matters", lambda moments: False)
    monkeypatch.setattr("prep.encode.networks.default_vae_batch_size", lambda *_: 5)
    answer = prep(*words, "--part", "1/2")
    assert answer.status == 0, answer.err
    assert "was begun with 3 threads, which decide its bytes; they share 1 here" in answer.err
    assert len(units(cache)) == TARS
    answer = prep(*words, "--threads", 1)  # but what is asked for is not ignored
    assert answer.status == 1
    assert "shapes.threads is 3 there, 1 here" in answer.err


def test_parts_without_work_leave_the_prompts_to_the_pictures(tmp_path, sources):
    """Whichever part is the first to write them, they are the first captions of the data."""
    for order in ((7, 0), (0, 7)):
        cache = tmp_path / f"cache{order[0]}"
        for number in order:
            words = ["--shards", sources, "--model", "tiny-sd", "--cache", cache, "--threads", 1]
            assert prep("encode", *words, "--part", f"{number}/8").status == 0
            (cache / "conditioning.safetensors").replace(tmp_path / f"{number}")
    a, b = (load_conditioning(tmp_path / f"{number}") for number in (0, 7))
    assert a.prompts == b.prompts == ("picture number 0", "picture number 1")


def test_prompts_of_several_parts_and_commands_are_all_kept(tmp_path, sources):
    cache = encode(sources, tmp_path / "cache")
    script = (
        "import os, sys; from prep.__main__ import main\n"
        "children = []\n"
        "for n in range(4):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        sys.argv = ['prep', 'embed', '--cache', sys.argv[1], '--prompts', f'prompt {n}']\n"
        "        try: main()\n"
        "        except SystemExit as end: os._exit(end.code)\n"
        "    children.append(child)\n"
        "sys.exit(any(os.waitpid(child, 0)[1] for child in children))\n"
    )
    preload = "import torch, prep.commands; torch.set_num_threads(1)\n"
    answer = warm.run(["-c", preload + script, cache], ROOT, TOKENIZERS_PARALLELISM="false")
    assert answer.returncode == 0, answer.stderr
    prompts = load_conditioning(cache / "conditioning.safetensors").prompts
    assert {f"prompt {n}" for n in range(4)} <= set(prompts)


def test_a_unit_committed_while_another_process_folds_is_in_the_manifest(
    tmp_path, sources, monkeypatch
):
    cache = encode(sources, tmp_path / "cache")
    record, aside = next((cache / "units").iterdir()), tmp_path / "aside"
    wanted = tree(cache)
    record.rename(aside)
    write = prep_engine.write_manifest

    def committing_meanwhile(*args):
        if aside.exists():
            aside.rename(record)
        write(*args)

    monkeypatch.setattr(prep_engine, "write_manifest", committing_meanwhile)
    assert prep("finish", "--cache", cache, "--no-report").status == 0
    assert tree(cache) == wanted


def test_a_cache_of_a_device_that_is_not_here_is_refused_in_a_line(tmp_path, sources):
    words = ["--shards", sources, "--model", "tiny-sd", "--cache", tmp_path, "--threads", 1]
    assert prep("encode", *words, "--part", "0/2").status == 0
    identity = json.loads((tmp_path / "identity.json").read_text())
    identity["shapes"]["device"] = "mps"
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    line = refusal("encode", *words, "--part", "1/2")
    assert "was begun on mps, which decides its bytes, and there is none here" in line


# ---- Many rounds.


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("flags", [("--unlike",), ("--gap", 1.0)])
def test_eight_parts_at_once_in_twenty_rounds(tmp_path, sources, flags):
    caches = together(tmp_path, sources, "--rounds", 20, *flags)
    assert_one_cache(caches, sources, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_parts_and_those_that_sweep_beside_them(tmp_path, sources):
    caches = together(tmp_path, sources, "--rounds", 10, "--kill", "--gap", 0.5, "--unlike")
    assert_one_cache(caches, sources, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whole_commands_at_once_fold_everything(tmp_path, sources):
    """Not told that they are parts: each encodes all, and the last manifest has everything."""
    flags = ["--parts", 1, "--processes", 4, "--gap", 1.0, "--unlike"]
    caches = together(tmp_path, sources, "--rounds", 8, *flags)
    assert_one_cache(caches, sources, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_parts_that_overwrite_at_once(tmp_path, sources, gap):
    """In float16, where the scale is measured anew, and each part finds another one."""
    flags = ["--rounds", 5, "--overwrite", "--unlike", "--gap", gap]
    for cache in together(tmp_path, sources, *flags, encode=["--vae-dtype", "float16"]):
        found = manifest(Path(cache))
        assert found["identity"]["preprocessing"]["resolution"] == 32
        assert {unit["generation"] for unit in units(Path(cache)).values()} == {1}
        assert found["totals"]["written"] == TARS * PICTURES


# ---- Object storage.


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def assert_one_bucket(urls, sources, folder):
    for number, url in enumerate(urls):
        identity = json.loads(bucket().cat_file(f"{url}/identity.json"))
        (folder / f"{number}").mkdir()
        assert objects(url) == alone(folder / f"{number}", sources, identity)


@pytest.mark.slow
def test_parts_begin_a_cache_on_s3_at_once(server, tmp_path, sources):
    flags = ["--parts", 3, "--unlike"]
    urls = together(tmp_path, sources, *flags, cache="s3://bucket/parts")
    assert_one_bucket(urls, sources, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("every", [0, 41])
def test_eight_parts_at_once_on_s3(server, tmp_path, sources, every):
    """Also where one request in 41 fails, before or after it was done.

    The library's own retries are off here, and of thousands of requests no three in a row may fail.
    """
    server.every = every
    try:
        flags = ["--rounds", 5, "--unlike", "--gap", 0.5]
        urls = together(tmp_path, sources, *flags, cache=f"s3://bucket/many{every}")
    finally:
        server.calm()
    assert_one_bucket(urls, sources, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_parts_overwrite_a_cache_on_s3_at_once(server, tmp_path, sources):
    flags = ["--rounds", 3, "--parts", 4, "--overwrite", "--unlike"]
    encode = ["--vae-dtype", "float16"]
    for url in together(tmp_path, sources, *flags, cache="s3://bucket/anew", encode=encode):
        made = [json.loads(bucket().cat_file(name)) for name in bucket().find(f"{url}/units")]
        assert [unit["generation"] for unit in made] == [1] * TARS
        found = json.loads(bucket().cat_file(f"{url}/manifest.json"))
        assert found["totals"]["written"] == TARS * PICTURES
        assert found["identity"]["preprocessing"]["resolution"] == 32


def test_a_prompt_that_was_added_meanwhile_is_kept_on_s3(server, monkeypatch, tmp_path):
    """Two change the file that both have read: the one that comes too late reads it again."""
    from shared.storage.update import update

    url = place("s3://bucket/update/file")

    def adding(text, meanwhile=lambda: None):
        def change(content):
            meanwhile()
            return (content or b"") + text

        return change

    update(url, adding(b"a"), tmp_path)
    turns = iter([lambda: update(url, adding(b"b"), tmp_path), lambda: None])
    update(url, adding(b"c", lambda: next(turns)()), tmp_path)
    assert url.read_bytes() == b"abc"
