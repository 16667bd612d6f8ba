"""Decoded and augmented pixels, compared with Pillow and numpy, on the CPU and on a GPU."""

import io
import re

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from PIL import Image

from data_pipeline import augment, decode
from data_pipeline.config import AugmentConfig
from data_pipeline.decode import Decoder

SIZE, COUNT, SEED = 48, 80, 3
LUMA = [0.299, 0.587, 0.114]
CHANGES = [name for name in AugmentConfig.model_fields if name != "flip_probability"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def noisy(seed, size=SIZE):
    """Return a JPEG of an image with all frequencies and 4:2:0 chroma subsampling."""
    rng = np.random.default_rng(seed)
    octaves = [Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)) for n in (3, 6, 12, 24, 48)]
    pixels_HWC = np.mean([image.resize((size, size), Image.Resampling.BICUBIC) for image in octaves], axis=0)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


IMAGES = [noisy(seed) for seed in range(COUNT)]


def pixels(config=None, *, images=IMAGES, batch_size=16, image_size=SIZE, device_id=None):
    """Return the decoder's output as levels from 0 to 255, float [N, H, W, 3]; by default unchanged."""
    config = config or AugmentConfig(flip_probability=0)

    def source(i):
        sample_B = np.arange(i * batch_size, min(len(images), (i + 1) * batch_size))
        if not len(sample_B):
            raise StopIteration
        encoded = [np.frombuffer(images[sample], np.uint8) for sample in sample_B]
        return encoded, augment.of_samples(config, SEED, sample_B)

    decoder = Decoder(
        source,
        lambda i, row: f"{i} {row}",
        batch_size=batch_size,
        image_size=image_size,
        threads=2,
        prefetch_batches=2,
        device_id=device_id,
        changes=config,
    )
    image_NCHW = torch.cat([batch.cpu() for batch in decoder])
    return (image_NCHW * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy()


def only(name, probability=1.0, **keys):
    return AugmentConfig(flip_probability=0, **{name: {"probability": probability, **keys}})


def drawn(config):
    (change,) = augment.of_samples(config, SEED, np.arange(COUNT)).changes.values()
    return change


def by_pillow(encoded):
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def roughness(image_NHWC):
    """Return the mean squared difference of neighbouring pixels, which blur and low resolution reduce."""
    return (np.diff(image_NHWC, axis=1) ** 2).mean((1, 2, 3)) + (np.diff(image_NHWC, axis=2) ** 2).mean(
        (1, 2, 3)
    )


@pytest.fixture(scope="module")
def plain():
    return pixels()


def test_pixels_are_those_of_pillow(plain):
    expected = np.stack([np.asarray(by_pillow(image), float) for image in IMAGES])
    assert np.abs(plain - expected).max() <= 2
    assert np.abs(plain - expected).mean() <= 0.1


@pytest.mark.parametrize("image_size", [32, 80])
def test_pixels_of_another_size_are_those_of_pillow_s_bilinear(image_size):
    mixed = [noisy(0), noisy(1, image_size), noisy(2, 64), noisy(3, image_size)]
    found = pixels(images=mixed, image_size=image_size)
    for image, levels in zip(mixed, found, strict=True):
        expected = by_pillow(image).resize((image_size, image_size), Image.Resampling.BILINEAR)
        assert np.abs(levels - np.asarray(expected, float)).max() <= 3


@pytest.mark.parametrize("name", CHANGES)
def test_a_sample_that_is_not_changed_keeps_every_bit_and_the_others_change(plain, name):
    config = only(name, 0.5)
    is_same_N = (pixels(config) == plain).all((1, 2, 3))
    on_N = drawn(config)["on"]
    assert np.all(is_same_N[~on_N])
    # A crop may keep the entire image.
    assert is_same_N[on_N].mean() < 0.1


@pytest.mark.parametrize("batch_size", [1, 7])
def test_pixels_do_not_depend_on_the_rest_of_the_batch(batch_size):
    everything = AugmentConfig(**{name: {"probability": 0.5} for name in CHANGES})
    assert np.array_equal(pixels(everything, batch_size=batch_size), pixels(everything, batch_size=COUNT))


def inside(top, left, bottom, right):
    """Return the pixels of a rectangle given as shares: bool [H, W]. DALI rounds its ends down."""
    top, left, bottom, right = (np.floor(SIZE * share) for share in (top, left, bottom, right))
    y, x = np.mgrid[:SIZE, :SIZE]
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def test_occlusion_fills_its_rectangle_and_nothing_else(plain):
    config = only("occlusion")
    rectangles = drawn(config)
    for i, levels in enumerate(pixels(config)):
        first, shape = rectangles["anchor"][i], rectangles["shape"][i]
        filled_HW = inside(*first, *(first + shape))
        assert np.all(levels[filled_HW] == rectangles["fill"][i])
        assert np.array_equal(levels[~filled_HW], plain[i][~filled_HW])


def test_crop_keeps_its_rectangle_in_place_and_the_rest_is_black(plain):
    config = only("crop", area=[0.2, 0.7])
    strips = drawn(config)
    for i, levels in enumerate(pixels(config)):
        top, left = strips["shape"][i, [0, 5]]
        bottom, right = strips["anchor"][i, [2, 7]]
        kept_HW = inside(top, left, bottom, right)
        assert 0.1 < kept_HW.mean() < 0.75
        assert np.all(levels[~kept_HW] == 0)
        assert np.array_equal(levels[kept_HW], plain[i][kept_HW])


def test_grey_has_equal_channels_of_the_usual_luma(plain):
    grey = pixels(only("grey"))
    assert np.array_equal(grey[..., 0], grey[..., 1])
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.abs(grey[..., 0] - plain @ LUMA).max() <= 1


def test_low_resolution_removes_fine_detail_and_keeps_the_coarse(plain):
    quarter = pixels(only("low_resolution", scale=[0.25, 0.25]))
    half = pixels(only("low_resolution", scale=[0.5, 0.5]))
    full = pixels(only("low_resolution", scale=[1, 1]))
    assert np.abs(full - plain).max() <= 1
    detail = [roughness(images).mean() for images in (quarter, half, plain)]
    assert detail[0] < 0.6 * detail[1] < 0.6 * detail[2]
    assert np.abs(quarter.mean((1, 2)) - plain.mean((1, 2))).max() < 12


def test_low_resolution_has_the_interpolations_drawn(plain):
    config = only("low_resolution", scale=[0.25, 0.25])
    parameters = drawn(config)
    found = pixels(config)
    nearest = (parameters["down"] == 0) & (parameters["up"] == 0)
    assert nearest.any()
    for i in np.flatnonzero(nearest):
        blocks = found[i].reshape(12, 4, 12, 4, 3)
        assert np.array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))
    # Triangular interpolation averages before it drops pixels, so less fine detail remains.
    left = roughness(found) / roughness(plain)
    assert left[parameters["down"] == 4].mean() < 0.8 * left[parameters["down"] == 0].mean()


def correlated(image_HWC, kernel_KK):
    reach = len(kernel_KK) // 2
    padded = np.pad(image_HWC, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel_KK.shape, (0, 1))
    return (windows * kernel_KK).sum((-2, -1))


def test_motion_blur_is_a_correlation_with_the_line_drawn(plain):
    config = only("motion_blur")
    for levels, image, kernel in zip(pixels(config), plain, drawn(config)["kernel"], strict=True):
        assert np.abs(levels - correlated(image, kernel)).max() <= 1


def test_blur_is_gaussian(plain):
    config = only("blur", sigma=[0.5, 3])
    for levels, image, sigma in zip(pixels(config), plain, drawn(config)["sigma"], strict=True):
        reach = int(np.ceil(3 * sigma))
        line = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
        kernel = np.outer(line, line) / line.sum() ** 2
        assert np.abs(levels - correlated(image, kernel)).max() <= 2


@pytest.mark.parametrize(
    ("factor", "by_definition"),
    [
        ("brightness", lambda image, value: image * value),
        ("contrast", lambda image, value: 127.5 + (image - 127.5) * value),
        (
            "saturation",
            lambda image, value: value * image + (1 - value) * (image @ LUMA)[..., None],
        ),
    ],
)
def test_a_photometric_change_is_the_factor_drawn(plain, factor, by_definition):
    keys = {"brightness": 0, "contrast": 0, "saturation": 0, factor: 0.5}
    config = only("photometric", **keys)
    assert np.ptp(drawn(config)[factor]) > 0.8
    for levels, image, value in zip(pixels(config), plain, drawn(config)[factor], strict=True):
        assert np.abs(levels - by_definition(image, value).clip(0, 255)).max() <= 2


def test_hue_turns_the_colours_and_keeps_the_luma(plain):
    turned = pixels(only("photometric", brightness=0, contrast=0, saturation=0, hue=30))
    assert np.abs(turned - plain).mean() > 3
    assert np.abs((turned - plain).mean((1, 2)) @ LUMA).max() < 3


def test_jpeg_loses_more_at_lower_quality_as_pillow_does(plain):
    losses = []
    for quality in (90, 50, 10):
        found = pixels(only("jpeg", quality=[quality, quality]))
        file = [io.BytesIO() for _ in IMAGES]
        for image, one in zip(plain, file, strict=True):
            Image.fromarray(image.astype(np.uint8)).save(one, "JPEG", quality=quality)
        expected = np.stack([np.asarray(by_pillow(one.getvalue()), float) for one in file])
        losses.append(np.abs(found - plain).mean())
        assert np.abs(found - expected).mean() < 0.2 * losses[-1]
    assert losses[0] < 0.6 * losses[1] < 0.6 * losses[2]


def operators(config, device_id=None):
    """Return (name, specification) of the graph's operators; the graph is not run, so no GPU is needed."""
    names = {name: list(keys) for name, keys in augment.of_samples(config, 0, np.arange(1)).changes.items()}
    graph = decode._graph(lambda i: (), names, SIZE, 0.75, batch_size=4, num_threads=1, device_id=device_id)
    graph._build_graph()
    specs = [operator.spec for operator in graph._ops]
    return [(re.match(r"OpSpec for (\w+):", str(spec))[1], spec) for spec in specs]


def test_the_plain_graph_has_only_the_operators_of_decoding():
    on_samples = {"Split", "Merge", "Not"}
    names = {name.removeprefix("_conditional__") for name, _ in operators(AugmentConfig())}
    assert names - on_samples == {
        "ExternalSource",
        "decoders__Image",
        "PeekImageShape",
        "_TensorSubscript",
        "_ArithmeticGenericOp",
        "Resize",
        "CropMirrorNormalize",
    }


def test_the_graph_for_a_gpu_is_the_same_and_stays_on_it_once_decoded():
    everything = AugmentConfig(**{name: {"probability": 0.5} for name in CHANGES})
    on_cpu, on_gpu = operators(everything), operators(everything, device_id=0)
    assert {name for name, _ in on_cpu} == {name for name, _ in on_gpu} - {"MakeContiguous", "Copy"}
    of_images = {"Erase", "Filter", "GaussianBlur", "Resize", "ColorTwist", "ColorSpaceConversion"}
    of_images |= {"JpegCompressionDistortion", "CropMirrorNormalize"}
    assert of_images <= set(backend.RegisteredGPUOps()) & {name for name, _ in on_gpu}
    for name, spec in on_gpu:
        if name in of_images:
            devices = {spec.InputDevice(i) for i in range(spec.NumRegularInput())} | {spec.OutputDevice(0)}
            assert devices == {"gpu"}, name
    (decoder,) = (str(spec) for name, spec in on_gpu if name == "decoders__Image")
    assert "hw_decoder_load: 0.75" in decoder


@needs_gpu
def test_a_gpu_decodes_as_the_cpu_does_except_for_chroma_upsampling(plain):
    found = pixels(device_id=0)
    # By default nvJPEG repeats the pixels of the subsampled chroma channels; libjpeg interpolates them.
    assert np.abs(found @ LUMA - plain @ LUMA).mean() < 1.5
    assert np.abs(found - plain).mean() < 4


@needs_gpu
@pytest.mark.parametrize("name", CHANGES)
def test_a_gpu_changes_pixels_as_the_cpu_does(plain, name):
    config = only(name, 0.5)
    found, decoded = pixels(config, device_id=0), pixels(device_id=0)
    on_N = drawn(config)["on"]
    assert np.array_equal(found[~on_N], decoded[~on_N])
    # Decoded pixels differ slightly between the devices, and the GPU only models JPEG's loss.
    assert np.abs(found - pixels(config)).mean() < (6 if name == "jpeg" else 4)
    assert np.array_equal(found, pixels(config, batch_size=7, device_id=0))
