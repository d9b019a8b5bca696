"""Captions, and caches of them that a teacher draws."""

import contextlib
import io
import json
import shutil

import torch

from prep.synthesize.config import SynthesizeConfig
from prep.synthesize_command import synthesize
from shared.cache.answers_store import open_answers
from shared.cache.manifest import open_manifest

CAPTIONS = [f"a red circle above {n} blue squares" for n in range(10)]


def lines(path, captions):
    path.write_text("\n".join(captions) + "\n", "utf-8")
    return path


def draw(captions, cache, **flags):
    """`prep synthesize` in this process, without its words; returns what it printed."""
    settings = {"model": "tiny-sd", "threads": 1, "steps": 2, "batch_size": 4, "report": False}
    out, threads = io.StringIO(), torch.get_num_threads()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(out):
            synthesize(SynthesizeConfig((str(captions),), cache=cache, **{**settings, **flags}))
    finally:
        torch.set_num_threads(threads)
    return out.getvalue()


def model_that_predicts(model, prediction, folder):
    """A copy of a model that predicts epsilon or v_prediction."""
    other = shutil.copytree(model, folder / prediction)
    path = other / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": prediction}))
    return other


def stored(cache):
    """Key -> record, arrays, answers `[K, 3, C, h, w]` and their record, of all samples."""
    beside = {shard.samples: shard for shard in open_answers(cache).shards}
    found = {}
    for shard in open_manifest(cache).shards:
        other = beside[shard.file]
        for number in range(shard.count):
            key, record, arrays = shard.layout.read(cache / shard.file, number)
            same, about, values = other.layout.read(cache / "answers" / other.file, number)
            assert same == key
            found[key] = record, arrays, values["answers"], about
    return found
