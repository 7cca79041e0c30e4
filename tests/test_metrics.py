"""metrics.py and judges.py against pytorch-fid, torch-fidelity, lpips, NumPy and cases worked out by hand."""

import warnings

import lpips
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torchvision
from PIL import Image
from pytorch_fid import fid_score, inception
from torch_fidelity.metric_kid import kid_features_to_metric

import judges
from config import UserError
from data import build_dataset
from gan import noise
from metrics import (FeatureStatistics, Tally, class_color_errors, class_color_sums, confusion_matrix, evaluate_generator,
                     frechet_distance, kernel_distance, sample_seed, segmentation_scores)

SCENES = {"name": "scenes", "root": None, "size": [32, 32], "classes": None, "void": None, "palette": None,
          "load_scale": 1.0, "flip": False, "workers": 0, "skip_broken": False, "instances": False}
EVAL = {"num_images": 10, "batch_size": 4, "features": "stlpips_alex", "features_weights": None,
        "features_size": 32, "diversity_network": "stlpips_alex", "diversity_weights": None, "diversity_maps": 3,
        "diversity_samples": 2, "diversity_size": None, "kid_subsets": 4, "kid_subset_size": 6}


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A hub folder with random weights under the name of pytorch-fid's file."""
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for name, module in {"Mixed_5b": inception.FIDInceptionA(192, 32), "Mixed_5c": inception.FIDInceptionA(256, 64),
                         "Mixed_5d": inception.FIDInceptionA(288, 64), "Mixed_6b": inception.FIDInceptionC(768, 128),
                         "Mixed_6c": inception.FIDInceptionC(768, 160), "Mixed_6d": inception.FIDInceptionC(768, 160),
                         "Mixed_6e": inception.FIDInceptionC(768, 192), "Mixed_7b": inception.FIDInceptionE_1(1280),
                         "Mixed_7c": inception.FIDInceptionE_2(2048)}.items():
        setattr(network, name, module)
    for module in network.modules():  # PyTorch's own initialisation lets the signal die out over 90 layers
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    torch.save(network.state_dict(), path)
    return path


def png_folder(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return sorted(folder.glob("*.png"))


def test_fid_equals_pytorch_fid(tmp_path, inception_weights, monkeypatch):
    rng = np.random.default_rng(0)
    sets = [rng.integers(0, high, (5, 48, 64, 3), dtype=np.uint8) for high in (256, 160)]
    monkeypatch.setenv("TORCH_HOME", str(inception_weights.parents[1]))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(inception_weights.parents[1]))
    reference_network = inception.InceptionV3()
    ours = judges.feature_network("inception", str(inception_weights))
    references, statistics = [], []
    for name, images in zip("ab", sets):
        files = png_folder(tmp_path / name, images)
        references.append(fid_score.get_activations(files, reference_network, 5, 2048, "cpu", num_workers=0))
        mine = ours(torch.from_numpy(np.stack([np.array(Image.open(f)) for f in files])).permute(0, 3, 1, 2))
        statistics.append(FeatureStatistics())
        statistics[-1].update(mine)
        np.testing.assert_allclose(mine, references[-1], rtol=1e-3, atol=1e-3 * references[-1].std())
    # scipy's root of a 2048 x 2048 matrix takes pytorch-fid half a minute; the root in a basis of all the features
    # (both sets and their means) is the same number
    basis, _ = np.linalg.qr(np.concatenate(references).T)
    small = [activations @ basis for activations in references]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = fid_score.calculate_frechet_distance(small[0].mean(0), np.cov(small[0], rowvar=False),
                                                        small[1].mean(0), np.cov(small[1], rowvar=False))
    got = frechet_distance(*statistics[0].mean_and_covariance(), *statistics[1].mean_and_covariance())
    assert got == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("count", [20, 200])  # fewer and more than dimensions
def test_frechet_distance_equals_the_matrix_square_root(count):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(count, 64)), rng.normal(0.3, 1.5, size=(count, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = fid_score.calculate_frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert distance_of(x, y) == pytest.approx(expected, rel=1e-4)
    assert distance_of(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_by_hand():
    # diagonal covariances 1, 4 and 9, 4 around means 0 and (3, 0): 9 + (1 - 3)^2 + (2 - 2)^2
    cov = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1, 4], [9, 4])]
    mean = [torch.tensor(m, dtype=torch.float64) for m in ([0, 0], [3, 0])]
    assert frechet_distance(mean[0], cov[0], mean[1], cov[1]) == pytest.approx(13)


def distance_of(x, y):
    statistics = FeatureStatistics(), FeatureStatistics()
    for s, features in zip(statistics, (x, y)):
        for part in np.array_split(features, 3):
            s.update(torch.from_numpy(part))
    return frechet_distance(*statistics[0].mean_and_covariance(), *statistics[1].mean_and_covariance())


def test_statistics_in_parts_equal_numpy():
    x = np.random.default_rng(2).normal(100, 1e-2, size=(50, 8))  # a mean far above the spread
    merged = FeatureStatistics()
    for part in np.array_split(x, 4):
        statistics = FeatureStatistics()
        statistics.update(torch.from_numpy(part))
        merged.merge(statistics)
    mean, cov = merged.mean_and_covariance()
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False), atol=1e-9)
    with pytest.raises(UserError, match="at least 2"):
        FeatureStatistics().mean_and_covariance()


@pytest.mark.parametrize("size", [10, 25])  # subsets, and one set used whole
def test_kid_equals_torch_fidelity(size):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 16)).astype(np.float32), rng.normal(0.2, 1, size=(25, 16)).astype(np.float32)
    expected = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), kid_subsets=7, kid_subset_size=size,
                                      verbose=False)
    mean, std = kernel_distance(x, y, subsets=7, subset_size=size)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)


@pytest.mark.parametrize("name", ["lpips_alex", "stlpips_vgg"])
def test_diversity_equals_calling_the_package(name, tmp_path):
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights = None
    if name == "lpips_alex":
        torch.manual_seed(0)
        weights = str(tmp_path / "alexnet.pth")
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), weights)
    network = judges.PerceptualNetwork(name, weights, size=64)
    if name == "lpips_alex":
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        trunk = torch.load(weights, weights_only=True)
        slices = [reference.net.slice1, reference.net.slice2, reference.net.slice3, reference.net.slice4, reference.net.slice5]
        convolutions = [m for s in slices for m in s if isinstance(m, torch.nn.Conv2d)]
        for convolution, place in zip(convolutions, (0, 3, 6, 8, 10)):
            convolution.load_state_dict({k: trunk[f"features.{place}.{k}"] for k in ("weight", "bias")})
    else:
        from stlpips_pytorch import stlpips
        reference = stlpips.LPIPS(net="vgg", variant="shift_tolerant", verbose=False)
    x = torch.nn.functional.interpolate(images.float() / 127.5 - 1, (64, 64), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = np.mean([reference(x[i:i + 1], x[j:j + 1]).item() for i, j in ((0, 1), (0, 2), (1, 2))])
    assert network.mean_pair_distance(images) == pytest.approx(expected, rel=1e-4)


def test_segmentation_scores_by_hand():
    # 2 x 2 map: classes 0, 1, and void (3); one right, one taken for class 1, one right, void never counts
    labels, predictions = torch.tensor([[[0, 0], [1, 3]]]), torch.tensor([[[0, 1], [1, 0]]])
    scores = segmentation_scores(confusion_matrix(labels, predictions, 3), ["a", "b", "c"])
    assert scores["class_iou"] == {"a": 1 / 2, "b": 1 / 2, "c": None}  # no label has c: not part of the mean
    assert scores["miou"] == 1 / 2 and scores["pixel_accuracy"] == 2 / 3


def test_segmentation_scores_equal_numpy():
    rng = np.random.default_rng(4)
    labels, predictions = rng.integers(0, 6, (3, 9, 7)), rng.integers(0, 6, (3, 9, 7))  # 5 = void, or no class predicted
    scores = segmentation_scores(confusion_matrix(torch.tensor(labels), torch.tensor(predictions), 5), list("abcde"))
    known = labels != 5
    iou = [np.sum((labels == c) & (predictions == c)) / np.sum(((labels == c) | (predictions == c)) & known) for c in range(5)]
    assert list(scores["class_iou"].values()) == pytest.approx(iou)
    assert scores["miou"] == pytest.approx(np.mean(iou))
    assert scores["pixel_accuracy"] == pytest.approx(np.mean((labels == predictions)[known]))


def test_nothing_labelled_gives_none():
    void = torch.full((1, 2, 2), 3)
    scores = segmentation_scores(confusion_matrix(void, torch.zeros_like(void), 3), list("abc"))
    assert scores["miou"] is None and scores["pixel_accuracy"] is None


def test_class_colors_by_hand():
    labels = torch.tensor([[[0, 0], [1, 2]]])  # C = 2: the last pixel is void
    images = torch.tensor([10, 30, 100, 255], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    real = torch.tensor([26, 26, 90, 0], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    sums = class_color_sums(images, labels, 2)
    assert sums.tolist() == [[40, 40, 40, 2], [100, 100, 100, 1]]
    errors = class_color_errors(sums, class_color_sums(real, labels, 2), ["a", "b"])
    assert errors == {"color_error": 8.0, "class_color_error": {"a": 6.0, "b": 10.0}}


def test_missing_weights_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("offline")))
    for build in (lambda: judges.feature_network("inception"), lambda: judges.PerceptualNetwork("lpips_vgg")):
        with pytest.raises(UserError) as error:
            build()
        text = str(error.value)
        assert "\n" not in text and str(tmp_path) in text and ("6726825d" in text or "397923af" in text)
    (tmp_path / "broken.pth").write_text("no weights")
    with pytest.raises(UserError, match="broken.pth"):
        judges.feature_network("inception", str(tmp_path / "broken.pth"))


class BlackIsZero:
    """A judge that calls dark pixels class 0 and all others class 1."""

    judges = torch.tensor([True] * 12 + [False])
    description = {"name": "black is zero"}

    def __call__(self, images):
        return (images.float().mean(1) > 100).long()


def painted(label_map, sample_seeds, k):
    """Class number as brightness, plus noise that follows from (seed, k)."""
    grain = noise([(s, k) for s in sample_seeds], 3 * 32 * 32, label_map.device).view(-1, 3, 32, 32)
    return (label_map[:, None] * 20 + 10 * grain).clamp(0, 255).to(torch.uint8)


def measure(cache, rank=0, world_size=1):
    return evaluate_generator(painted, build_dataset(SCENES, "val"), EVAL, "cpu", cache, BlackIsZero(), 5, rank, world_size)


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(measure(folder / "cache2", rank, 2), folder / f"metrics{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    one = measure(tmp_path / "cache1")
    mp.spawn(one_of_two, args=(tmp_path,), nprocs=2)
    for rank in range(2):
        two = torch.load(tmp_path / f"metrics{rank}.pt", weights_only=True)
        assert two.keys() == one.keys()
        for key, value in one.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert two[key] == expected, key


def test_real_images_are_cached_under_their_own_key(tmp_path, monkeypatch):
    first = measure(tmp_path)
    updates, update = [], Tally.update
    monkeypatch.setattr(Tally, "update", lambda self, *args: updates.append(self) or update(self, *args))
    assert measure(tmp_path)["fd_stlpips_alex"] == pytest.approx(first["fd_stlpips_alex"], rel=1e-9)
    assert len(updates) == 3  # batches of generated images only
    monkeypatch.setitem(EVAL, "features_size", 40)
    updates.clear()
    measure(tmp_path)
    assert len(updates) == 6  # another size: the real images are looked at again


def test_noise_depends_on_seed_image_and_sample_alone():
    assert sample_seed(0, 1) != sample_seed(1, 0)
    both = noise([(sample_seed(3, i), 0) for i in (7, 8)], 4, "cpu")
    assert torch.equal(both[1], noise([(sample_seed(3, 8), 0)], 4, "cpu")[0])
