import math
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import random_model
from diffusers import DDPMScheduler
from PIL import Image
from support.oracles import GaussianDenoiser

from pet_pipeline import (
    AdaptiveEDMScheduler,
    PetClassificationPipeline,
    PetDiffusionPipeline,
    pipeline_pet_classification,
)
from pet_pipeline.pipeline_pet_classification import (
    BAND_RANGE,
    NUM_BANDS,
    class_scores,
    still_possible,
    stopping_bounds,
    t_statistic,
    van_der_corput,
)
from pet_pipeline.pipeline_pet_loading import eight_bit_image


def gaussian_pipeline(std=0.3, **kwargs):
    names = {0: "dark", 1: "bright"}
    pipe = PetClassificationPipeline(GaussianDenoiser(std), AdaptiveEDMScheduler(), id2label=names, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_errors_that_are_not_finite_are_one_error(model):
    with torch.no_grad():
        model.proj_out.weight.fill_(torch.inf)
    pipe = PetClassificationPipeline(model, AdaptiveEDMScheduler())
    with pytest.raises(ValueError, match="errors of the model are not finite"):
        pipe(torch.rand(1, 3, 8, 8), 4, weighting="elbo")


def gaussian_images(num_images, mean=0.0, std=0.3, seed=0):
    """Images in [0, 1] of mean 0.5 + mean / 2."""
    noise = torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ((mean + std * noise) / 2 + 0.5).clamp(0, 1)


def test_elbo_gives_the_exact_posterior_of_gaussian_classes():
    # N(±0.5, s²) in each pixel: the log-odds are 2·0.5·Σx / s². Images near the border, where they are of
    # order 1.
    std = 0.3
    images = gaussian_images(6, std=std)
    images += torch.linspace(-2, 2, 6).view(-1, 1, 1, 1) * std**2 / 192 / 2 - (images - 0.5).mean(
        (1, 2, 3), True
    )
    pixels = images * 2 - 1
    expected = torch.sigmoid(pixels.sum((1, 2, 3)) / std**2)
    output = gaussian_pipeline(std)(images, num_evaluations=2048, adaptive=False, weighting="elbo")
    measured = torch.tensor([p["bright"] for p in output.probabilities])
    print("exact", expected.tolist(), "measured", measured.tolist())
    assert expected.min() < 0.2 and expected.max() > 0.8
    torch.testing.assert_close(measured, expected, atol=0.05, rtol=0)
    assert output.num_evaluations == [4096] * 6


def test_paired_noise_lowers_the_variance():
    # The difference of two classes' errors, with the same noise for both and with independent noise.
    pipe = gaussian_pipeline()
    pixels = gaussian_images(1, 0.5) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(512, 3, 8, 8, generator=generator)
    sigmas = torch.full((512,), 1.0)

    def errors(label, draws):
        rows = torch.tensor([(0, label, draw) for draw in draws])
        return pipe.pixel_errors(pixels, noise, sigmas, rows).mean((1, 2))

    same = errors(0, range(256)) - errors(1, range(256))
    independent = errors(0, range(256)) - errors(1, range(256, 512))
    ratio = (same.var() / independent.var()).item()
    print(f"variance of the paired difference: {ratio:.4f} of the unpaired")
    assert ratio < 0.1
    torch.testing.assert_close(same.mean(), independent.mean(), atol=0.01, rtol=0.1)


def test_swapped_classes_swap_the_answer():
    images = torch.cat([gaussian_images(3, -0.1), gaussian_images(3, 0.1, seed=1)])
    pipe = gaussian_pipeline()
    output = pipe(images, generator=torch.Generator().manual_seed(0))
    assert output.labels == ["dark"] * 3 + ["bright"] * 3
    pipe.transformer.mean = lambda labels: -GaussianDenoiser.mean(pipe.transformer, labels)
    swapped = pipe(images, generator=torch.Generator().manual_seed(0))
    assert swapped.labels == ["bright"] * 3 + ["dark"] * 3
    for first, second in zip(output.probabilities, swapped.probabilities):
        assert first["dark"] == pytest.approx(second["bright"], abs=1e-4)


def test_an_answer_is_repeatable_and_does_not_depend_on_its_batch():
    pipe = PetClassificationPipeline(
        random_model(5),  # it decides some images early and some late
        AdaptiveEDMScheduler(),
        id2label={0: "cat", 1: "dog"},
        calibration={"weights": [300.0] * NUM_BANDS},  # answers between sure and unsure
    )
    pipe.set_progress_bar_config(disable=True)
    images = torch.linspace(0, 1, 8).view(8, 1, 1, 1).repeat(1, 3, 8, 8)

    def classify(part, num_evaluations=32, **kwargs):
        return pipe(part, num_evaluations, generator=torch.Generator().manual_seed(3), **kwargs)

    together = classify(images)
    # Some are stopped, each when it would be alone.
    evaluations = together.num_evaluations
    assert min(evaluations) < max(evaluations) == 64
    alone = [classify(image) for image in images]
    assert [output.num_evaluations for output in alone] == [[number] for number in evaluations]
    # What was stopped has the answer of a run that ends there.
    ended = [classify(image, number // 2, adaptive=False) for image, number in zip(images, evaluations)]
    few_at_once = classify(images, batch_size=7).probabilities
    for other in (
        [output.probabilities[0] for output in alone],
        [output.probabilities[0] for output in ended],
        few_at_once,
        classify(list(images)).probabilities,
    ):
        for a, b in zip(together.probabilities, other):
            assert a["cat"] == pytest.approx(b["cat"], abs=1e-4) and 0.001 < a["cat"] < 0.999


def test_easy_images_stop_early_and_hard_ones_do_not():
    easy, hard = gaussian_images(4, 0.5), gaussian_images(4)
    hard -= (hard - 0.5).mean((1, 2, 3), True)
    output = gaussian_pipeline()(torch.cat([easy, hard]), num_evaluations=32)
    assert max(output.num_evaluations[:4]) <= 32 and max(output.num_evaluations[4:]) == 64
    full = gaussian_pipeline()(torch.cat([easy, hard]), num_evaluations=32, adaptive=False)
    assert full.num_evaluations == [64] * 8 and full.labels[:4] == output.labels[:4] == ["bright"] * 4


def stop_early(errors, stages):
    """Returns which classes are left after all stages, and which images were decided before all draws."""
    candidates = torch.ones(errors.shape[:2], dtype=torch.bool)
    for number, stage in enumerate(stages[:-1]):
        seen = errors[..., :stage].masked_fill(~candidates.unsqueeze(-1), torch.nan)
        undecided = candidates.sum(1, keepdim=True) > 1
        candidates = torch.where(undecided, candidates & still_possible(seen, number, stages), candidates)
    return candidates, candidates.sum(1) == 1


@pytest.mark.parametrize("num_classes", [2, 5, 10, 100])
@pytest.mark.parametrize("stages", [(4, 8), (4, 8, 16), (4, 8, 16, 32, 64, 128)])
def test_early_stopping_keeps_its_error_rate_for_any_number_of_classes(num_classes, stages):
    # No class makes a difference: how often is the class given up that is the best after all draws?
    generator = torch.Generator().manual_seed(1)
    contradicted, num_images = 0, 4000
    for _ in range(num_images // 500):
        errors = torch.randn(500, num_classes, stages[-1], generator=generator)
        candidates, _ = stop_early(errors, stages)
        contradicted += (~candidates[torch.arange(500), errors.mean(-1).argmin(1)]).sum().item()
    rate = contradicted / num_images
    print(f"{num_classes} classes, stages {stages}: {rate:.3f} against the decision by all draws")
    assert 0.03 < rate < 0.05 + 3 * (0.05 * 0.95 / num_images) ** 0.5


def test_early_stopping_errs_less_if_classes_make_a_difference():
    stages, num_images = (4, 8, 16), 20_000
    rates = {}
    for delta in (0.0, 0.3, 1.0):  # by which class 0 is better
        errors = torch.zeros(num_images, 2, 16)
        errors[:, 1] = delta + torch.randn(num_images, 16, generator=torch.Generator().manual_seed(1))
        candidates, stopped = stop_early(errors, stages)
        contradicted = stopped & (candidates.float().argmax(1) != errors.mean(-1).argmin(1))
        rates[delta] = stopped.float().mean().item(), contradicted.float().mean().item()
    print("share stopped early, and against the decision by all draws, by the true difference:", rates)
    assert rates[1.0][1] < 0.01 < rates[0.3][1] < rates[0.0][1] < 0.055
    assert rates[1.0][0] > 1.5 * rates[0.0][0]
    bounds = stopping_bounds(stages, 2)
    assert bounds[0] > bounds[1] and stopping_bounds((16,), 2) == ()


def test_draws_are_tested_in_the_order_of_their_noise(monkeypatch):
    # A change with the noise level is no scatter: to its plain variance this would be t = 6.
    assert t_statistic(torch.linspace(0, 2, 16)) > 20
    pipe = gaussian_pipeline(calibration={"weights": [1.0] * NUM_BANDS})
    tested = []

    def watched(weighted_errors, *args):
        tested.append(weighted_errors)
        return still_possible(weighted_errors, *args)

    monkeypatch.setattr(pipeline_pet_classification, "still_possible", watched)
    image = gaussian_images(1, 0.01)
    pipe(image, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    (evidence,) = pipe(image, 16, generator=generator, return_evidence=True).evidence
    drawn = pipe.draw_sigmas(8, "calibrated", torch.Generator().manual_seed(1))
    first = torch.isin(evidence.sigmas, drawn[:4])  # of ascending noise levels
    assert first.sum() == 4 and not torch.equal(drawn[:4], drawn[:4].sort().values)
    torch.testing.assert_close(tested[0][0], evidence.errors[:, first])


def test_many_classes():
    class FourMeans(GaussianDenoiser):
        def mean(self, class_labels):
            means = torch.tensor([-0.6, -0.2, 0.2, 0.6, 0.0], dtype=torch.float64)
            return means[class_labels].reshape(-1, 1, 1, 1)

    pipe = PetClassificationPipeline(FourMeans(num_classes=4), AdaptiveEDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    output = pipe(gaussian_images(6, 0.3, std=0.05), num_evaluations=64)
    assert output.labels == ["2"] * 6
    assert all(len(p) == 4 and sum(p.values()) == pytest.approx(1, abs=1e-5) for p in output.probabilities)
    assert max(output.num_evaluations) < 4 * 64


def test_classes_are_given_up_in_stages():
    # Class 2 is the best, the others are worse by ever less.
    pipe = PetClassificationPipeline(
        GaussianDenoiser(num_classes=4),
        AdaptiveEDMScheduler(),
        calibration={"weights": [1.0] * NUM_BANDS},
    )
    pipe.set_progress_bar_config(disable=True)
    errors = torch.tensor([[4.0], [1.6], [1.0], [1.1]])
    errors = errors + 0.3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    draws = [0] * 4

    def pixel_errors(pixels, noise, sigmas, rows):
        for _, label, draw in rows.tolist():
            draws[label] = draw + 1
        return errors[rows[:, 1], rows[:, 2]].view(-1, 1, 1).expand(-1, 8, 8)

    pipe.pixel_errors = pixel_errors
    output = pipe(gaussian_images(1), num_evaluations=64, generator=torch.Generator().manual_seed(0))
    assert draws[0] < draws[1] < draws[2] == draws[3] == 32
    assert output.labels == ["2"] and output.num_evaluations == [2 * sum(draws)]
    # Each is compared with the best one on the draws that it has had.
    scores = [-(errors[label] - errors[2])[:count].mean() for label, count in enumerate(draws)]
    expected = torch.stack(scores).softmax(0).tolist()
    assert list(output.probabilities[0].values()) == pytest.approx(expected, rel=1e-4)


def test_no_class_is_more_probable_than_the_best():
    # Class 0 was given up for class 2, which is given up for class 1, although class 0 was ahead of class 1.
    nan = torch.nan
    errors = torch.tensor([[[1.0, 1.0, nan, nan], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 4.0]]])
    scores, best = class_scores(errors, torch.tensor([[False, True, True]]))
    assert best.tolist() == [1] and scores.tolist() == [[0.0, 0.0, -0.5]]


def test_levels_are_stratified_at_every_look():
    assert [van_der_corput(i) for i in range(4)] == [0, 0.5, 0.25, 0.75]
    pipe = gaussian_pipeline()
    for weighting, (low, high) in {"calibrated": BAND_RANGE, "elbo": (0.002, 80)}.items():
        sigmas = pipe.draw_sigmas(32, weighting, torch.Generator().manual_seed(0))
        positions = (sigmas / low).log() / math.log(high / low)
        for count in (4, 8, 16, 32):
            assert sorted((positions[:count] * count).floor().tolist()) == list(range(count))


def test_calibration_weights_are_used_and_checked():
    images = gaussian_images(3, 0.05)
    unsure = gaussian_pipeline(calibration={"weights": [0.0] * NUM_BANDS})(images)
    assert [p["dark"] for p in unsure.probabilities] == pytest.approx([0.5] * 3)
    sure = gaussian_pipeline(calibration={"weights": [100.0] * NUM_BANDS})(images, adaptive=False)
    assert sure.labels == ["bright"] * 3 and min(p["bright"] for p in sure.probabilities) > 0.9
    for weights in ([1.0], [math.nan] * NUM_BANDS, [-1.0] * NUM_BANDS, ["1"] * NUM_BANDS, None, 1.0):
        for pipeline_class in (PetClassificationPipeline, PetDiffusionPipeline):
            with pytest.raises(ValueError, match="`calibration` must hold `weights`"):
                pipeline_class(random_model(), AdaptiveEDMScheduler(), calibration={"weights": weights})
    with pytest.raises(ValueError, match="`calibration` must hold `weights`"):
        gaussian_pipeline(calibration=[1.0] * NUM_BANDS)
    with pytest.warns(UserWarning, match="not calibrated"):
        gaussian_pipeline()(images, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not calibrated")
        gaussian_pipeline(calibration={"weights": [1.0] * NUM_BANDS})(images, 2)
        gaussian_pipeline()(images, 2, weighting="elbo")


def test_each_band_has_its_weight():
    low, high = BAND_RANGE
    centres = low * (high / low) ** ((torch.arange(NUM_BANDS) + 0.5) / NUM_BANDS)
    weights = [float(index) for index in range(NUM_BANDS)]
    assert gaussian_pipeline().band_weights(centres, {"weights": weights}, 1).tolist() == weights


def test_velocity_models_are_classified_alike():
    pipe, other = gaussian_pipeline(), gaussian_pipeline()
    other.scheduler = AdaptiveEDMScheduler(prediction_type="v_prediction")
    forward = other.transformer.forward
    other.transformer.forward = lambda *args, **kwargs: (-forward(*args, **kwargs)[0],)
    images = gaussian_images(3)
    first, second = (
        each(images, num_evaluations=8, generator=torch.Generator().manual_seed(0)) for each in (pipe, other)
    )
    assert first.num_evaluations == second.num_evaluations
    for one, two in zip(first.probabilities, second.probabilities):
        assert one == pytest.approx(two, abs=1e-4)


def test_evidence_shows_where_and_at_which_noise():
    images = torch.full((1, 3, 8, 8), 0.5)
    images[..., 4:] = 0.75  # right half: exactly the mean of "bright"; left half: undecided
    calibration = {"weights": [0.25 * (index + 1) for index in range(NUM_BANDS)]}
    output = gaussian_pipeline(calibration=calibration)(images, num_evaluations=64, return_evidence=True)
    evidence = output.evidence[0]
    # Nothing is stopped early, and the map adds up to the answer.
    assert output.num_evaluations == [128] and evidence.errors.isfinite().all()
    ((dark, bright),) = (p.values() for p in output.probabilities)
    assert 0.6 < bright < 0.999
    assert evidence.difference.mean().item() == pytest.approx(math.log(bright / dark), rel=1e-3)
    assert evidence.labels == ("bright", "dark") and output.labels == ["bright"]
    assert evidence.difference.shape == (8, 8) and evidence.errors.shape == (2, 32)
    assert evidence.sigmas.diff().min() >= 0
    assert output["evidence"] is output.evidence and output.to_tuple()[3] is output.evidence
    left, right = evidence.difference[:, :4].mean(), evidence.difference[:, 4:].mean()
    assert right > 0 and abs(left) < 0.1 * right
    assert (evidence.errors[0] > evidence.errors[1]).float().mean() > 0.9


def test_images_of_every_kind(tmp_path, pipeline):
    pipe = PetClassificationPipeline.from_pipe(pipeline)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    rotated = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    rotated.save(tmp_path / "rotated.jpg", quality=95, exif=exif)
    picture.save(tmp_path / "upright.jpg", quality=95)
    picture.save(tmp_path / "damaged.png", exif=b"Exif\0\0no header of TIFF")
    damaged = Image.open(tmp_path / "damaged.png")
    transparent = picture.convert("RGBA")
    transparent.putalpha(0)
    images = [
        picture,
        picture.convert("L"),
        picture.convert("P"),
        transparent,
        tmp_path / "rotated.jpg",
        str(tmp_path / "upright.jpg"),
        Image.new("RGB", (4000, 3000)),
        damaged,
        tmp_path / "damaged.png",
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.rand(3, 50, 20),
    ]
    prepared = pipe.prepare_images(images)
    assert prepared.shape == (11, 3, 8, 8) and prepared.min() >= -1 and prepared.max() <= 1
    assert prepared[3].min() == 1  # transparent is white
    assert (prepared[4] - prepared[5]).abs().max() < 0.1
    assert torch.equal(prepared[7], prepared[0]) and torch.equal(prepared[8], prepared[0])
    output = pipe(images, num_evaluations=2)
    assert len(output.labels) == 11 and set(output.labels) <= {"cat", "dog"}
    assert pipe(images[0], num_evaluations=2, return_dict=False)[0] == output.labels[:1]


def test_grey_levels_of_16_bits_are_scaled():
    levels = np.array([[0, 100 * 257, 65535]], dtype=np.uint16)
    big_endian = Image.frombytes("I;16B", (3, 1), levels.astype(">u2").tobytes())  # of some TIFF files
    for image in (Image.fromarray(levels), big_endian):
        assert np.asarray(eight_bit_image(image, "L")).tolist() == [[0, 100, 255]]


def test_images_are_cropped_at_their_centre(pipeline):
    pipe = PetClassificationPipeline.from_pipe(pipeline)
    for turn in (0, 1):
        wide = torch.zeros(3, 8, 24, dtype=torch.uint8)
        wide[0] = 255  # red, but for a blue square in the middle
        wide[:, :, 8:16] = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1)
        wide = wide.transpose(1, 2) if turn else wide
        picture = Image.fromarray(wide.permute(1, 2, 0).numpy())
        blue = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 8, 8)
        for image in (wide, picture):
            torch.testing.assert_close(pipe.prepare_image(image, "it"), blue)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "There is no image"),
        ("missing.png", "'missing.png' cannot be read"),
        (__file__, "cannot be read as an image"),
        (
            [torch.rand(3, 8, 8), torch.full((3, 8, 8), math.nan)],
            "Image 1 must be in .* from nan to nan",
        ),
        (torch.full((2, 3, 8, 8), 3.0), r"Image 0 must be in \[0, 1\]"),
        (torch.rand(1, 8, 8), "Image 0 must be of shape"),
        ([3], "Image 0 must be a PIL image"),
    ],
)
def test_bad_images_are_named(pipeline, images, message):
    pipe = PetClassificationPipeline.from_pipe(pipeline)
    with pytest.raises(ValueError, match=message):
        pipe(images)


def test_bad_arguments():
    pipe, image = gaussian_pipeline(), gaussian_images(1)
    for kwargs, message in (
        ({"num_evaluations": 3}, "even"),
        ({"num_evaluations": 0}, "`num_evaluations` must be a positive integer"),
        ({"num_evaluations": "8"}, "`num_evaluations` must be a positive integer, but is '8'"),
        ({"generator": [torch.Generator()]}, "`generator` must be one .*, but is a list"),
        ({"weighting": "best"}, "calibrated, elbo"),
        ({"batch_size": 0}, "`batch_size`"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(image, **kwargs)
    alone = PetClassificationPipeline(random_model(num_classes=1), AdaptiveEDMScheduler())
    with pytest.raises(ValueError, match="at least 2 classes"):
        alone(image)
    options = {"generator": torch.Generator().manual_seed(0)}
    expected = pipe(image, 4, **options).probabilities
    options = {"generator": torch.Generator().manual_seed(0), "batch_size": np.int64(64)}
    assert pipe(image, np.int64(4), **options).probabilities == expected
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="of the class DDPMScheduler"):
        pipe(image)


def test_components_are_shared_and_calibration_is_kept(pipeline, tmp_path):
    weights = [float(i) for i in range(NUM_BANDS)]
    pipeline.transformer.to(torch.bfloat16)
    classify = PetClassificationPipeline.from_pipe(pipeline, calibration={"weights": weights})
    assert classify.transformer is pipeline.transformer and classify.transformer.dtype == torch.bfloat16
    classify.save_pretrained(tmp_path)
    drawing = PetDiffusionPipeline.from_pretrained(tmp_path)
    assert drawing.config.calibration == {"weights": weights}
    drawing.save_pretrained(tmp_path / "again")
    again = PetClassificationPipeline.from_pretrained(tmp_path / "again")
    assert again.config.calibration == {"weights": weights} and again.id2label == {0: "cat", 1: "dog"}


def test_an_image_too_large_for_the_memory_is_one_error(model, tmp_path, monkeypatch):
    def load(self):
        raise MemoryError

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    pipe = PetClassificationPipeline(model, AdaptiveEDMScheduler())
    with pytest.raises(ValueError, match="a.png' is too large an image for the available memory"):
        pipe(tmp_path / "a.png", 2, weighting="elbo")


def test_large_files_are_refused_before_they_are_decoded(pipeline, tmp_path, monkeypatch):
    def load(self):
        raise AssertionError("the image was decoded")

    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    pipe = PetClassificationPipeline.from_pipe(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="a.png' .* has 13000×13000 pixels, more than 16,777,216"):
            pipe.prepare_image(tmp_path / "a.png", "")


def test_the_time_step_keeps_its_precision(pipeline):
    timesteps = []
    pipe = PetClassificationPipeline.from_pipe(pipeline, dtype=torch.bfloat16)
    pipe.transformer.register_forward_pre_hook(lambda module, args: timesteps.append(args[1]))
    pipe(torch.rand(3, 8, 8), 8, adaptive=False, generator=torch.Generator().manual_seed(0))
    sigmas = pipe.draw_sigmas(4, "calibrated", torch.Generator().manual_seed(0))
    expected = (sigmas.log() / 4).tolist() * 4
    assert sorted(torch.cat(timesteps).tolist()) == pytest.approx(sorted(expected), abs=1e-6)


def test_sharing_components_warns_of_nothing(pipeline, caplog):
    pipeline.to(torch.float16)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PetClassificationPipeline.from_pipe(pipeline)
    assert not caplog.records
