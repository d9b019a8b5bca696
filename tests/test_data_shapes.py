"""The pictures that travel with the repository, and the oracle that reads them."""

import io
import itertools
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data.make_pictures import CANVASES, PER_TAR, SPLITS, square_render, write_tar
from data.oracle import agrees, read, score
from data.shapes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, caption, draw_scene, parse, render
from tests.support.sources import ROOT

PICTURES = ROOT / "data" / "pictures"


def members(path):
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


@pytest.mark.slow
def test_the_script_rebuilds_a_committed_tar_byte_for_byte(tmp_path):
    path = PICTURES / "heldout" / "00001.tar"
    write_tar(tmp_path / "again.tar", "heldout", range(PER_TAR, 2 * PER_TAR))
    again = members(tmp_path / "again.tar")
    # Which member differs says more than that the bytes do.
    assert [name for name, content in members(path).items() if again[name] != content] == []
    assert (tmp_path / "again.tar").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_the_committed_pictures(split):
    """In img2dataset's layout, of several kinds and sizes, and no picture twice."""
    files = {}
    for path in sorted((PICTURES / split).glob("*.tar")):
        files |= members(path)
    records = {n.partition(".")[0]: json.loads(c) for n, c in files.items() if n.endswith(".json")}
    assert len(records) == SPLITS[split][1]
    assert len(files) == 3 * len(records)
    extensions = {name.partition(".")[2] for name in files}
    assert extensions == {"jpg", "png", "webp", "txt", "json"}
    sizes = set()
    for key, record in list(records.items())[::16]:
        extension = record["url"].rpartition(".")[2]
        with Image.open(io.BytesIO(files[f"{key}.{extension}"])) as image:
            assert image.format.lower() == extension.replace("jpg", "jpeg")
            assert image.size == (record["original_width"], record["original_height"])
            sizes.add(image.size)
        assert files[f"{key}.txt"].decode() == record["caption"]
        parse(record["caption"])  # raises for another world's
    assert sizes == set(CANVASES)
    assert len({record["sha256"] for record in records.values()}) == len(records)


def test_every_caption_is_read_back():
    scenes = itertools.product(
        SHAPES, COLOURS, COLOURS, [None, *SIZES], [None, *POSITIONS]
    )  # 6 x 8 x 8 x 3 x 6
    texts = set()
    for words in scenes:
        scene = Scene(*words)
        if scene.colour != scene.background:
            assert parse(caption(scene)) == scene
            texts.add(caption(scene))
    assert len(texts) == 6 * 8 * 7 * 3 * 6


@pytest.mark.parametrize(
    "text", ["", "a photo of a dog", "a red circle", "a red circle and a blue square on a field"]
)
def test_captions_of_another_world_are_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_the_oracle_reads_fresh_renders():
    right = 0
    for index in range(300):
        scene, image = square_render(seed=12345, index=index, side=64)
        seen = read(image)
        right += agrees(scene, seen)
        if seen is not None:
            assert seen.size in SIZES
            assert seen.position in POSITIONS
    assert right >= 297


def test_the_oracle_reads_every_shape_colour_size_and_place():
    rng = np.random.default_rng(5)
    wrong = []
    for number, (shape, size, position) in enumerate(itertools.product(SHAPES, SIZES, POSITIONS)):
        colour, ground = list(COLOURS)[number % 8], list(COLOURS)[(number + 3) % 8]
        scene = Scene(shape, colour, ground, size, position)
        if read(render(scene, rng, 64, 64)) != scene:
            wrong.append(scene)
    assert wrong == []


DRAWN = Scene("triangle", "yellow", "purple", "large", "left")
OTHERS = [colour for colour in COLOURS if colour not in (DRAWN.colour, DRAWN.background)]


@pytest.mark.parametrize(
    "change",
    [
        *({"shape": shape} for shape in SHAPES if shape != DRAWN.shape),
        *({"colour": colour} for colour in OTHERS),
        *({"background": colour} for colour in OTHERS),
        {"size": "small"},
        *({"position": position} for position in POSITIONS if position != DRAWN.position),
    ],
    ids=str,
)
def test_the_oracle_refuses_what_is_not_drawn(change):
    image = render(DRAWN, np.random.default_rng(1), 64, 64)
    said = replace(DRAWN, **change)
    right, wrong = score(np.stack([image, image]), [caption(DRAWN), caption(said)])
    assert (right, wrong) == (1.0, 0.0)


def test_what_a_caption_leaves_open_may_be_anything():
    image = render(DRAWN, np.random.default_rng(2), 64, 64)
    assert score(image[None], ["a yellow triangle on a purple field"]) == [1.0]
    assert score(image[None], ["a yellow triangle on the left of a purple field"]) == [1.0]
    assert score(image[None], ["a small yellow triangle on a purple field"]) == [0.0]


def test_pictures_that_show_nothing_score_nothing():
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flat = np.full((64, 64, 3), 90, np.uint8)
    blurred = render(replace(DRAWN, size="small"), rng, 64, 64)
    blurred = np.asarray(Image.fromarray(blurred).resize((2, 2)).resize((64, 64)))
    for image in (noise, flat, blurred):
        for text in ("a yellow triangle on a purple field", "a red circle on a blue field"):
            assert score(image[None], [text]) == [0.0]


def test_a_scene_is_drawn_in_two_different_colours():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(500)]
    assert all(scene.colour != scene.background for scene in scenes)
    assert {scene.shape for scene in scenes} == set(SHAPES)
    silent = [scene.size is None for scene in scenes], [scene.position is None for scene in scenes]
    assert 0.4 < np.mean(silent[0]) < 0.6
    assert 0.3 < np.mean(silent[1]) < 0.5


def test_the_oracle_agrees_with_the_committed_pictures():
    """After JPEG, WebP and the resize that `prep` does, too."""
    files = members(PICTURES / "heldout" / "00000.tar")
    images, captions = [], []
    for name, content in list(files.items())[: 3 * 100]:
        if name.rpartition(".")[2] not in ("txt", "json"):
            image = Image.open(io.BytesIO(content)).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((64, 64))
            images.append(np.asarray(image))
            captions.append(files[f"{name.partition('.')[0]}.txt"].decode())
    assert len(images) == 100
    assert score(np.stack(images), captions).mean() >= 0.98
