"""An encoder is more than its weights: its tokenizer and its settings are part of the identity."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from prep.encoders.tokens import tokens_fingerprint
from tests.support.sources import (
    TINY_SD,
    captioned,
    encode,
    refusal,
    samples,
    tree,
    units,
    write_tar,
)

ADDED = {"text": ("tokenizers", "configs"), "vae": ("config",)}


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(TINY_SD, tmp_path / "model")


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "a.tar", captioned(range(2)))


@pytest.fixture
def cache(tar, tmp_path):
    return encode(tar, tmp_path / "cache")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}, "text.tokenizers.tokenizer is "),
        (
            "text_encoder/config.json", {"hidden_act": "gelu"},
            "text.configs.text_encoder.hidden_act is quick_gelu there, gelu here",
        ),
        ("text_encoder/config.json", {"layer_norm_eps": 1e-3}, "text_encoder.layer_norm_eps is"),
        ("vae/config.json", {"norm_num_groups": 4}, "vae.config.norm_num_groups is 2 there, 4"),
    ],
)  # fmt: skip
def test_another_tokenizer_or_setting_is_another_encoder(
    cache, tar, model, tmp_path, file, values, named
):
    more = write_tar(tmp_path / "b.tar", captioned(range(2, 4)))
    words = ["--cache", cache, "--threads", 1, "--model"]
    encode([tar, more], cache, model=str(model))  # a copy of the model is the same one
    before = tree(cache)
    change(model / file, **values)
    assert named in refusal("encode", "--shards", tar, more, *words, model)
    if not file.startswith("vae"):
        assert "other text encoders" in refusal(
            "embed", *words[:2], "--prompts", "a", *words[4:], model
        )
    part = file.partition("/")[0].replace("tokenizer", "text").partition("_")[0]
    line = refusal("verify", "--cache", cache, "--reencode", 1, "--model", model)
    assert f"another {part} encoder" in line
    assert tree(cache) == before


def test_a_cache_that_does_not_say_so_much_is_taken_as_before(cache, tar, tmp_path):
    identity = json.loads((cache / "identity.json").read_text())
    for part, names in ADDED.items():
        for name in names:
            del identity[part][name]
    (cache / "identity.json").write_text(json.dumps(identity))
    more = write_tar(tmp_path / "b.tar", captioned(range(2, 4)))
    encode([tar, more], cache)
    assert len(units(cache)) == 2
    assert len(samples(cache)) == 4
    assert json.loads((cache / "identity.json").read_text()) == identity


def test_a_tokenizers_files_do_not_count_but_its_words_do(model):
    folder = model / "tokenizer"
    original = AutoTokenizer.from_pretrained(folder)
    wanted = tokens_fingerprint(original, 16)
    original.save_pretrained(model / "again")
    assert tokens_fingerprint(AutoTokenizer.from_pretrained(model / "again"), 16) == wanted
    assert tokens_fingerprint(original, 15) != wanted
    original.add_tokens(["<mine>"])
    assert tokens_fingerprint(original, 16) != wanted
