"""DINOv2, CLIP and Inception: the same numbers as their own packages give by hand.

With random weights of small networks: no weights can be had here.
"""

import shutil

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from shared.errors import UserError
from shared.models.family import DATA
from tests.support.docs import snapshot
from train.measures.inception import weights_file
from train.measures.scorers import open_scorer
from train.measures.space import open_space

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64}  # fmt: skip
CAPTIONS = ["a red square", "a blue circle on green", "a much longer caption " * 40, ""]


def slow(name: str):
    """transformers' processor that works with PIL."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 12, 16, 3)).astype(np.uint8)
    return images.repeat(7, 1).repeat(7, 2)  # 84 x 112


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, image_size=70, patch_size=14)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    words = CLIPTokenizer.from_pretrained(DATA / "tiny-sd/tokenizer")
    words.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        vision_config={**SMALL, "image_size": 48, "patch_size": 12, "projection_dim": 20},
        text_config={**SMALL, "vocab_size": len(words), "max_position_embeddings": 24, **ends},
        projection_dim=20,
    )
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 48, "width": 48}
    slow("CLIPImageProcessor")(size={"shortest_edge": 48}, crop_size=side).save_pretrained(folder)
    return folder


@torch.inference_mode()
def test_dinov2_is_transformers_own(dinov2_folder, pictures):
    space = open_space(f"dinov2:{dinov2_folder}")
    processor = slow("BitImageProcessor")(
        size={"height": 224, "width": 224}, do_center_crop=False, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    pixels = processor(list(pictures), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, 224, 224)  # squeezed, not cropped
    wanted = Dinov2Model.from_pretrained(dinov2_folder)(pixels).pooler_output.numpy()
    np.testing.assert_allclose(space.features(pictures), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std(0).min() > 1e-4  # pictures differ
    assert (space.name, space.title) == ("dinov2", "FD")  # FD-DINOv2 is that of ViT-L
    assert space.source == str(dinov2_folder)


@torch.inference_mode()
def test_clip_is_transformers_own(clip_folder, pictures):
    space = open_space(f"clip:{clip_folder}")
    processor = slow("CLIPImageProcessor").from_pretrained(clip_folder)
    pixels = processor(list(pictures), return_tensors="pt")["pixel_values"]
    network = CLIPVisionModelWithProjection.from_pretrained(clip_folder)
    wanted = network(pixels).image_embeds.numpy().astype(np.float64)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = space.features(pictures)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert space.title == "MMD"
    assert space.least < 65


@torch.inference_mode()
def test_scores_are_transformers_own(clip_folder, pictures):
    network = CLIPModel.from_pretrained(clip_folder)
    processor = slow("CLIPImageProcessor").from_pretrained(clip_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    cosines = []
    for picture, caption in zip(pictures, CAPTIONS, strict=True):
        pixels = processor([picture], return_tensors="pt")["pixel_values"]
        tokens = tokenizer([caption], truncation=True, max_length=24, return_tensors="pt")
        output = network(pixel_values=pixels, **tokens)
        cosines.append(float((output.image_embeds * output.text_embeds).sum()))
    clip = open_scorer(f"clip-score:{clip_folder}")
    np.testing.assert_allclose(
        clip(pictures, CAPTIONS), 100 * np.maximum(cosines, 0), rtol=1e-4, atol=1e-4
    )
    pick = open_scorer(f"pickscore:{clip_folder}")
    temperature = float(network.logit_scale.exp())
    np.testing.assert_allclose(
        pick(pictures, CAPTIONS), temperature * np.array(cosines), rtol=1e-4, atol=1e-4
    )
    assert (clip.title, pick.title) == ("CLIP score", "PickScore")
    assert clip.weights == pick.weights is not None


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features_and_scores(dinov2_folder, clip_folder, pictures):
    gpu = torch.device("cuda")
    for name in (f"dinov2:{dinov2_folder}", f"clip:{clip_folder}"):
        wanted = open_space(name).features(pictures)
        np.testing.assert_allclose(open_space(name, gpu).features(pictures), wanted, atol=1e-4)
    scorer = f"clip-score:{clip_folder}"
    found = open_scorer(scorer, gpu)(pictures, CAPTIONS)
    np.testing.assert_allclose(found, open_scorer(scorer)(pictures, CAPTIONS), atol=1e-3)


def test_a_fingerprint_tells_weights_apart(dinov2_folder, tmp_path):
    first = open_space(f"dinov2:{dinov2_folder}")
    network = Dinov2Model.from_pretrained(dinov2_folder)
    network.save_pretrained(tmp_path / "copy")
    with torch.no_grad():
        network.layernorm.bias += 1e-3
    network.save_pretrained(tmp_path / "other")
    assert open_space(f"dinov2:{tmp_path / 'copy'}").weights == first.weights
    assert open_space(f"dinov2:{tmp_path / 'other'}").weights != first.weights


def test_missing_files_are_named(dinov2_folder, clip_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    without = tmp_path / "without"
    without.mkdir()
    (without / "config.json").write_text((dinov2_folder / "config.json").read_text())
    for ask, said in (
        (lambda: open_space(f"dinov2:{tmp_path / 'empty'}"), "no config.json and no model.safe"),
        (lambda: open_space(f"dinov2:{without}"), "no model.safetensors"),
        (lambda: open_space(f"dinov2:{without}"), "hf download facebook/dinov2-large"),
        (lambda: open_space(f"clip:{dinov2_folder}"), "weights that its config.json asks for"),
        (lambda: open_scorer(f"pickscore:{dinov2_folder}"), "preprocessor_config.json"),
    ):
        with pytest.raises(UserError) as caught:
            ask()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_damaged_processor_is_said_to_be(clip_folder, tmp_path):
    own = shutil.copytree(clip_folder, tmp_path / "own")
    (own / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"can be read from .*fetch its files anew"):
        open_scorer(f"clip-score:{own}")


def test_out_of_the_hubs_reach(monkeypatch, tmp_path):
    """What to download where there is a network, and what to type then."""
    monkeypatch.setattr("train.measures.weights.unreachable", lambda: "the cable is out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for ask, name, weights in (
        (open_space, "dinov2", "facebook/dinov2-large"),
        (open_space, "clip", "openai/clip-vit-large-patch14-336"),
        (open_scorer, "pickscore", "yuvalkirstain/PickScore_v1"),
    ):
        with pytest.raises(UserError, match="the cable is out") as caught:
            ask(name)
        assert f"hf download {weights} --local-dir FOLDER; then --" in str(caught.value)
        assert str(caught.value).endswith(f"{name}:FOLDER")


def test_what_was_downloaded_before_is_found(dinov2_folder, tmp_path, monkeypatch):
    place = snapshot(tmp_path, "somebody/dinov2-small")
    place.symlink_to(dinov2_folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("train.measures.weights.unreachable", lambda: "HF_HUB_OFFLINE is set")
    space = open_space("dinov2:somebody/dinov2-small")
    assert space.weights == open_space(f"dinov2:{dinov2_folder}").weights
    assert space.source == "somebody/dinov2-small"


def test_where_to_put_the_weights_of_inception(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"no route.*put it at ") as caught:
        weights_file(None)
    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert str(file) in str(caught.value)
    file.touch()
    assert weights_file(None) == file
    with pytest.raises(UserError, match="there is no file"):
        weights_file(str(tmp_path / "elsewhere.pth"))


def test_inception_without_its_package_says_what_to_install():
    try:
        import torch_fidelity  # noqa: F401
    except Exception:
        with pytest.raises(UserError, match=r"needs torch-fidelity.*pip install '.\[metrics\]'"):
            open_space("inception")
    else:
        pytest.skip("torch-fidelity is here")


@pytest.fixture
def inception_file(tmp_path, monkeypatch):
    """Weights of the right shapes, at random; skips where the package cannot be imported."""
    try:
        import torchvision  # noqa: F401
        from torch_fidelity import feature_extractor_inceptionv3 as package
    except Exception as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(package.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(package, "load_state_dict_from_url", lambda *_, **__: {})
        network = package.FeatureExtractorInceptionV3("random", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # else every layer would more than halve all
            layer.weight.fill_(6**0.5)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@torch.inference_mode()
def test_inception_is_torch_fidelitys_own(inception_file, pictures):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    space = open_space(f"inception:{inception_file}")
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception_file)
    )
    (wanted,) = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    found = space.features(pictures)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)
    assert (space.name, space.title, found.shape) == ("inception", "FID", (4, 2048))
    assert found.std(0).max() > 1e-3
    # Their root is of a singular matrix where features are more than pictures: so of three.
    most = np.argsort(-found.std(0))[:3]
    found, other = found[:, most], space.features(255 - pictures)[:, most]
    statistics = [fid_features_to_statistics(torch.from_numpy(one)) for one in (found, other)]
    answer = fid_statistics_to_metric(*statistics, verbose=False)
    assert space.distance(found, other) == pytest.approx(
        answer["frechet_inception_distance"], rel=1e-5
    )


def test_a_file_that_is_no_weights_is_not_unpickled(inception_file, tmp_path):
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch /dev/null'\ntR.")
    with pytest.raises(UserError, match="no file of weights"):
        open_space(f"inception:{tmp_path / 'evil.pth'}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other weights than torch-fidelity's"):
        open_space(f"inception:{tmp_path / 'other.pth'}")
