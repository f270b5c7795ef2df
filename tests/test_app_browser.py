"""The web page in a browser."""

import io
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model
from PIL import Image
from support.browser import chromium
from support.page import decoded, pixels

from pet_pipeline import AdaptiveEDMScheduler, PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.evaluation.reference import load_reference
from pet_pipeline.sampling import SampleSettings, image_settings


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")

gradio = pytest.importorskip("gradio", reason="Gradio is not installed")
from pet_pipeline.app import tasks  # noqa: E402
from pet_pipeline.app.server import serve  # noqa: E402


class Server:
    """The page of a tiny model whose evaluations can be slowed down and are counted."""

    def __init__(self, folder: Path, image_folder: Path) -> None:
        self.folder = folder
        self.delay = 0.0
        self.evaluations = 0
        self.pipeline = PetDiffusionPipeline(
            random_model(), AdaptiveEDMScheduler(), id2label={0: "cat", 1: "dog"}
        )
        self.pipeline.transformer.register_forward_hook(self.count)
        self.reference = load_reference(str(image_folder), ["cat", "dog"], 8, cache_dir=str(folder / "cache"))
        self.connections: list[object] = []

    def count(self, module, args, output) -> None:
        self.evaluations += 1
        time.sleep(self.delay)

    def wait_until_idle(self) -> None:
        """Returns when the model has nothing to do; the slowest work of the tests would take over 10 s."""
        for _ in range(10):
            before = self.evaluations
            time.sleep(0.4)
            if self.evaluations == before:
                return
        raise AssertionError("The work goes on.")

    def uploads(self) -> list[Path]:
        return [path for path in (self.folder / "temporary").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def running(browser, tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("app")
    server = Server(folder, image_folder)
    (folder / "temporary").mkdir()
    active = True

    def audit(event: str, args: tuple) -> None:
        if active and event == "socket.connect":
            server.connections.append(args[1])

    sys.addaudithook(audit)  # for the rest of the process
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        with serve(server.pipeline, server.reference) as server.url:
            yield server
        active = False
        # Nothing stays on disk, and nothing has left this machine.
        assert not list((folder / "temporary").iterdir())
    addresses = [address[0] for address in server.connections if isinstance(address, tuple)]
    assert addresses and set(addresses) <= {"127.0.0.1", "::1"}


@pytest.fixture
def server(running):
    running.delay = 0.0
    running.wait_until_idle()
    running.evaluations = 0
    return running


@pytest.fixture
def open_page(server, browser):
    """Opens the page in a browser of its own; no request may leave this machine, no script may fail."""
    contexts, requests, errors = [], [], []

    def open_page(width: int = 1280, height: int = 800):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.get_by_role("button", name="Generate").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    foreign = [url for url in requests if not url.startswith((server.url, "data:", "blob:"))]
    assert requests and not foreign
    assert not errors


def set_number(page, label: str, value: int) -> None:
    field = page.get_by_label(label, exact=True).locator("visible=true")
    for _ in range(20):  # a component that was just shown takes its first value again
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(300)
        if field.input_value() == str(value):
            return
    raise AssertionError(f"{label} does not keep {value}")


def open_advanced(page) -> None:
    page.get_by_role("button", name="Advanced").locator("visible=true").click()
    page.wait_for_timeout(700)  # in which what it shows takes its first values


def fix_seed(page, seed: int) -> None:
    page.get_by_label("Draw a new seed each time").locator("visible=true").uncheck()
    set_number(page, "Seed", seed)


def test_generate_in_the_page(server, open_page, tmp_path):
    page = open_page()
    server.delay = 0.05
    page.get_by_label("dog", exact=True).uncheck()
    set_number(page, "number input for Images of each class", 2)
    open_advanced(page)
    set_number(page, "number input for Steps", 6)
    fix_seed(page, 5)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile("Step [1-5] of 6")).wait_for()
    assert page.get_by_role("img", name="cat, seed 5").count()  # while it is drawn
    link = page.get_by_role("link", name="Download cat-6.png")
    link.wait_for()
    assert page.get_by_role("link", name="Download").count() == 2
    assert "2 images in" in page.get_by_role("status").first.inner_text()
    expected = tasks.sample(server.pipeline, ["cat"], 2, 5, SampleSettings(6))
    assert f"{expected.evaluations} evaluations" in page.get_by_role("status").first.inner_text()
    with page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "cat-6.png")
    with Image.open(tmp_path / "cat-6.png") as image:
        assert image.tobytes() == expected.rows["cat"][1].tobytes()
    assert image_settings(tmp_path / "cat-6.png")["seed"] == 6
    shown = page.get_by_role("img", name="cat, seed 6", exact=True).first
    assert shown.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert shown.evaluate("image => image.width") >= 160
    page.get_by_role("img", name="training image 1 closest to cat, seed 5").wait_for()


def test_the_plot_of_the_guidance_follows_the_settings(open_page):
    page = open_page()
    open_advanced(page)
    plot = page.get_by_role("img", name=re.compile("Strength of the guidance"))
    before = plot.get_attribute("src")
    page.get_by_text("25 evaluations of the model for each image").wait_for()
    page.get_by_label("Guidance schedule").locator("visible=true").click()
    page.get_by_role("option", name="constant").click()
    page.get_by_text("36 evaluations of the model for each image").wait_for()
    assert plot.get_attribute("src") != before
    assert "from 2.5 to 2.5" in plot.get_attribute("alt")


def test_a_request_that_cannot_be_met_is_explained(open_page):
    page = open_page()
    page.get_by_label("cat", exact=True).uncheck()
    page.get_by_label("dog", exact=True).uncheck()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Choose at least one class.").wait_for()


def test_cancel_stops_the_work(server, open_page):
    page = open_page()
    server.delay = 0.1
    open_advanced(page)
    set_number(page, "number input for Steps", 100)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile(r"Step ([2-9]|\d\d) of 100")).wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    server.wait_until_idle()
    assert server.evaluations < 100
    assert not page.get_by_role("link", name="Download").count()
    server.delay = 0.0
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("img", name="training image 1 closest to cat").first.wait_for()
    assert page.get_by_role("link", name="Download").count()
    # Beside images that are drawn stands nothing of those before.
    server.delay = 0.1
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile(r"Step ([2-9]|\d\d) of 100")).wait_for()
    assert not page.get_by_role("img", name=re.compile("came to be|closest")).count()
    page.get_by_role("button", name="Cancel").click()


def test_a_page_that_is_closed_stops_its_work(server, open_page):
    page = open_page()
    server.delay = 0.1
    open_advanced(page)
    set_number(page, "number input for Steps", 100)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile(r"Step ([2-9]|\d\d) of 100")).wait_for()
    page.close()
    server.wait_until_idle()
    assert server.evaluations < 100


def test_compare_in_the_page(server, open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    open_advanced(page)
    fix_seed(page, 3)
    set_number(page, "number input for Images of each class", 1)
    page.get_by_role("button", name="Compare A and B").click()
    page.get_by_text(re.compile("All use the same seeds, from 3 on")).wait_for()
    links = page.get_by_role("link", name="Download cat-3.png")
    contents = [decoded(link.get_attribute("href")) for link in links.all()]
    for content, scale in zip(contents, (1.0, 2.5), strict=True):
        expected = tasks.sample(server.pipeline, ["cat"], 1, 3, SampleSettings(guidance_scale=scale))
        with Image.open(io.BytesIO(content)) as image:
            assert (pixels(image) - pixels(expected.rows["cat"][0])).abs().max() <= 1
    page.get_by_role("button", name="Compare 5, 10, 20 and 40 steps").click()
    page.get_by_role("heading", name="40 steps").wait_for()
    page.get_by_text(re.compile(r"steps 40, guidance scale 2\.5.* \d+ evaluations")).wait_for()
    assert page.get_by_role("link", name="Download dog-3.png").count() == 4


def upload_field(page):
    return page.get_by_role("tabpanel").locator("visible=true").locator("input[type=file]")


def test_classify_in_the_page(server, open_page, image_folder):
    page = open_page()
    page.get_by_role("tab", name="Classify").click()
    upload_field(page).set_input_files(image_folder / "cat" / "03.png")
    status = page.get_by_role("status").locator("visible=true").first
    page.get_by_text(re.compile("evaluations of the model in")).wait_for()
    classifier = PetClassificationPipeline(
        server.pipeline.transformer, server.pipeline.scheduler, id2label={0: "cat", 1: "dog"}
    )
    generator = torch.Generator().manual_seed(0)
    # The page shows the evidence, for which nothing is stopped early.
    output = classifier(image_folder / "cat" / "03.png", adaptive=False, generator=generator)
    label = output.labels[0]
    assert f"{label}: {output.probabilities[0][label]:.1%}, after {output.num_evaluations[0]}" in (
        status.inner_text()
    )
    assert page.get_by_role("meter").count() == 2
    for name in ("The image as the model sees it", "Where the image speaks for", "Errors of each class"):
        assert page.get_by_role("img", name=re.compile(name)).evaluate("image => image.naturalWidth") > 0
    assert not server.uploads()
    first = status.inner_text()
    page.get_by_role("button", name="Example 4, unseen dog").press("Enter")
    page.wait_for_function("([text, old]) => text.innerText != old", arg=[status.element_handle(), first])


def test_the_image_that_was_chosen_last_is_classified(server, open_page):
    page = open_page()
    page.get_by_role("tab", name="Classify").click()
    server.delay = 0.2
    page.get_by_role("button", name="Example 1,").click()
    page.get_by_text("of 64 evaluations").wait_for()
    page.get_by_role("button", name="Example 4,").click()
    chosen = page.get_by_role("img", name=re.compile("^Example 4,")).get_attribute("src")
    page.wait_for_function("src => document.querySelector('.pet-pixels')?.src == src", arg=chosen)
    page.get_by_text(re.compile("evaluations of the model in")).wait_for()
    before = server.evaluations
    page.get_by_role("button", name="Example 4,").click()  # which is classified again
    page.get_by_text("of 64 evaluations").wait_for()
    page.get_by_text(re.compile("evaluations of the model in")).wait_for()
    assert server.evaluations > before


def test_a_classification_is_cancelled_and_ends_with_its_page(server, open_page):
    page = open_page()
    page.get_by_role("tab", name="Classify").click()
    open_advanced(page)
    set_number(page, "number input for Evaluations for each class", 256)
    server.delay = 0.3  # the whole classification of 32 batches takes 10 seconds
    page.get_by_role("button", name="Example 1,").click()
    page.get_by_text(re.compile(r"\d+ of 512 evaluations")).wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    server.wait_until_idle()
    assert server.evaluations < 20
    before = server.evaluations
    page.get_by_role("button", name="Classify", exact=True).click()
    while server.evaluations < before + 2:  # the page still shows the progress of the first classification
        page.wait_for_timeout(50)
    page.close()
    server.wait_until_idle()
    assert server.evaluations < 40


@pytest.mark.parametrize("tab", ["Edit", "Classify"])
def test_a_bad_upload_is_explained_in_its_tab(server, open_page, tab, tmp_path, capfd):
    (tmp_path / "bad.png").write_bytes(b"no image")
    page = open_page()
    page.get_by_role("tab", name=tab).click()
    upload_field(page).set_input_files(tmp_path / "bad.png")
    status = page.get_by_role("status").locator("visible=true").first
    status.get_by_text("'bad.png' is not an image in JPEG, PNG").wait_for()
    page.get_by_text("Drop File Here").locator("visible=true").wait_for()  # the field is empty again
    assert not page.get_by_test_id("toast-body").count()
    assert "Traceback" not in capfd.readouterr().err
    assert not server.uploads()


def test_a_large_upload_is_explained_in_the_page(server, open_page, tmp_path, capfd):
    (tmp_path / "bad.png").write_bytes(bytes(6 * 2**20))
    page = open_page()
    page.get_by_role("tab", name="Classify").click()
    upload_field(page).set_input_files(tmp_path / "bad.png")
    alert = page.get_by_test_id("toast-body")
    alert.wait_for()
    assert re.search("exceed the maximum allowed size of 5", alert.inner_text())
    assert "Traceback" not in capfd.readouterr().err
    assert not server.uploads()


def test_a_request_that_the_queue_refuses_is_explained_in_its_tab(open_page, monkeypatch):
    page = open_page()
    monkeypatch.setattr("pet_pipeline.app.gate.MAX_VISITOR_JOBS", 0)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("status").get_by_text("The server did not take this request.").wait_for()
    assert not page.get_by_test_id("status-tracker").get_by_text("Error").locator("visible=true").count()
    monkeypatch.undo()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("link", name="Download").first.wait_for()


def test_edit_in_the_page(server, open_page, image_folder):
    page = open_page()
    page.get_by_role("tab", name="Edit").click()
    edit = page.get_by_role("button", name="Edit", exact=True)
    edit.click()
    page.get_by_role("status").get_by_text("Choose an image first.").wait_for()
    upload_field(page).set_input_files(image_folder / "cat" / "03.png")
    page.get_by_role("status").get_by_text("The image is 03.png.").wait_for()
    assert page.get_by_role("img", name="The chosen image").evaluate("image => image.width") >= 160
    assert not server.uploads()
    page.get_by_label("dog", exact=True).locator("visible=true").check()
    set_number(page, "number input for Strength", 0.3)
    set_number(page, "number input for Variants", 2)
    open_advanced(page)
    fix_seed(page, 5)
    edit.click()
    links = page.get_by_role("link", name="Download dog-")
    links.first.wait_for()
    image = server.pipeline.prepare_images(image_folder / "cat" / "03.png")
    expected = server.pipeline(
        ["dog"],
        image=image / 2 + 0.5,
        strength=0.3,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
    ).images
    for link, picture in zip(links.all(), expected, strict=True):
        with Image.open(io.BytesIO(decoded(link.get_attribute("href")))) as edited:
            assert (pixels(edited) - pixels(picture)).abs().max() <= 1
    original = page.get_by_role("img", name="The original").bounding_box()
    beside = page.get_by_role("img", name="dog, seed 5", exact=True).first.bounding_box()
    assert original["y"] == beside["y"] and original["x"] < beside["x"]

    # Another image takes the place of an edit that runs.
    set_number(page, "number input for Strength", 1)
    set_number(page, "number input for Steps", 100)
    server.delay, server.evaluations = 0.1, 0
    edit.click()
    page.get_by_text(re.compile(r"Step ([2-9]|\d\d) of 100")).wait_for()
    page.get_by_role("button", name="Example 1,").locator("visible=true").click()
    page.get_by_role("status").get_by_text("The image is").wait_for()
    server.wait_until_idle()
    assert server.evaluations < 100
    assert page.get_by_role("img", name="The chosen image").is_visible()


def test_a_picture_is_passed_on_to_be_edited_and_classified(server, open_page):
    page = open_page()
    page.get_by_role("button", name="Generate").click()
    button = page.get_by_role("button", name=re.compile("^Edit dog")).nth(1)
    button.wait_for()
    picture = page.get_by_role("img", name=re.compile("^dog")).nth(1)
    source, name = picture.get_attribute("src"), picture.get_attribute("alt")
    button.press("Enter")
    page.get_by_text(f"The image is {name}.").wait_for()
    assert page.get_by_role("img", name="The chosen image").get_attribute("src") == source
    assert page.get_by_label("cat", exact=True).locator("visible=true").is_checked()  # not a dog again
    focused = page.locator(":focus")
    assert focused.get_attribute("role") == "tab" and focused.inner_text() == "Edit"
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_role("link", name="edited.png").first.wait_for()
    assert page.get_by_role("img", name="The original").get_attribute("src") == source
    edited = page.get_by_role("img", name=re.compile("^cat, seed")).locator("visible=true").first
    source = edited.get_attribute("src")
    page.get_by_role("button", name=re.compile("^Classify cat")).first.click()
    page.get_by_text(re.compile("evaluations of the model in")).wait_for()
    assert page.get_by_role("tab", name="Classify").get_attribute("aria-selected") == "true"
    assert page.get_by_role("img", name="The image as the model sees it").get_attribute("src") == source


def test_a_picture_that_is_dropped_on_a_tab_is_handed_over(open_page):
    page = open_page()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name=re.compile("^Edit dog")).nth(1).wait_for()
    picture = page.get_by_role("img", name=re.compile("^dog")).nth(1)
    source, name = picture.get_attribute("src"), picture.get_attribute("alt")
    picture.drag_to(page.get_by_role("tab", name="Compare"))  # which takes no picture
    assert page.get_by_role("tab", name="Generate").get_attribute("aria-selected") == "true"
    picture.drag_to(page.get_by_role("tab", name="Edit"))
    page.get_by_text(f"The image is {name}.").wait_for()  # the picture may be hidden by now
    assert page.get_by_role("img", name="The chosen image").get_attribute("src") == source
    assert page.get_by_role("tab", name="Edit").get_attribute("aria-selected") == "true"


def test_the_chosen_picture_shows_how_it_came_to_be(open_page):
    page = open_page()
    page.get_by_role("button", name="Generate").click()
    strips = page.get_by_role("img", name=re.compile("came to be"))
    strips.first.wait_for()
    assert strips.count() == 1 and strips.get_attribute("alt").startswith("How cat, seed")
    page.get_by_role("radio", name=re.compile("^cat")).first.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.locator(":focus").get_attribute("value") == "4"
    assert strips.count() == 1 and strips.get_attribute("alt").startswith("How dog, seed")
    # The actions of the chosen picture come next.
    page.keyboard.press("Tab")
    assert page.locator(":focus").get_attribute("aria-label").startswith("Edit dog")
    # New pictures begin with the first one again.
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Drawing …").wait_for()
    page.get_by_role("radio", name=re.compile("^cat")).first.wait_for()
    assert page.locator("input[name=pet-chosen]:checked").get_attribute("value") == "0"
    assert strips.count() == 1 and strips.get_attribute("alt").startswith("How cat, seed")


def test_two_clients_at_once(server, open_page):
    pages = [open_page(), open_page()]
    server.delay = 0.02
    for seed, page in enumerate(pages):
        open_advanced(page)
        fix_seed(page, 10 * seed)
        page.get_by_role("button", name="Generate").click()
    for seed, page in enumerate(pages):
        link = page.get_by_role("link", name=f"Download dog-{10 * seed}.png")
        expected = tasks.sample(server.pipeline, ["dog"], 1, 10 * seed, SampleSettings())
        with Image.open(io.BytesIO(decoded(link.get_attribute("href")))) as image:
            assert (pixels(image) - pixels(expected.rows["dog"][0])).abs().max() <= 1


TABS = ("Generate", "Edit", "Compare", "Classify")
UNNAMED = """() => [...document.querySelectorAll("input, textarea, select, button, img, [role=slider]")]
    .filter(e => e.checkVisibility() && !e.closest("[aria-hidden=true]"))
    .filter(e => !(e.labels && e.labels.length && e.labels[0].innerText.trim()) && !e.ariaLabel && !e.title
        && !e.alt && !e.innerText.trim() && !e.ariaLabelledByElements?.length)
    .map(e => e.outerHTML.slice(0, 200))"""


def test_the_page_is_for_keyboards_and_screen_readers(open_page):
    page = open_page()
    assert page.evaluate("document.documentElement.lang") and page.title() == "pet_pipeline"
    for tab in TABS:
        page.get_by_role("tab", name=tab).focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        assert page.get_by_role("tab", name=tab).get_attribute("aria-selected") == "true"
        assert page.evaluate(UNNAMED) == []
        assert page.get_by_role("button", name="Advanced", expanded=False).locator("visible=true").count()
        open_advanced(page)
        page.get_by_role("button", name="Advanced", expanded=True).locator("visible=true").wait_for()
        assert page.evaluate(UNNAMED) == []
        assert page.get_by_role("status").count()
    page.get_by_role("tab", name="Generate").press("Enter")
    page.get_by_label("range slider for Steps").locator("visible=true").press("ArrowLeft")
    # The button is the second stop after the number of images.
    page.get_by_label("range slider for Images of each class").locator("visible=true").press("ArrowLeft")
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Generate"
    page.keyboard.press("Enter")
    link = page.get_by_role("link", name="Download").first
    link.wait_for()
    assert page.get_by_role("link", name="Download").count() == 6
    settings = decoded(link.get_attribute("href"))
    assert b'"steps": 17' in settings


@pytest.mark.parametrize(("width", "height", "columns"), [(1280, 800, 4), (390, 844, 2)])
def test_the_first_screen_shows_what_is_needed_and_then_the_pictures(open_page, width, height, columns):
    page = open_page(width, height)
    for control in (
        page.get_by_label("cat", exact=True),
        page.get_by_label("number input for Images of each class"),
        page.get_by_role("button", name="Generate"),
        *(page.get_by_role("tab", name=tab) for tab in TABS),
    ):
        box = control.bounding_box()
        assert box["y"] + box["height"] <= height and box["x"] + box["width"] <= width
    assert page.get_by_role("tab").all_inner_texts() == list(TABS)
    assert not page.get_by_label("Seed", exact=True).locator("visible=true").count()
    assert not page.get_by_role("img").locator("visible=true").count()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("link", name="Download").first.wait_for()
    boxes = [image.bounding_box() for image in page.locator(".pet-grid img").all()]
    assert len(boxes) == 8 and all(box["width"] >= 160 and box["width"] == box["height"] for box in boxes)
    assert sum(box["y"] == boxes[0]["y"] for box in boxes) == columns
    # Whole pictures are on the first screen, without scrolling.
    assert sum(box["y"] + box["height"] <= height for box in boxes) >= 2
    if columns == 4:
        strip = page.get_by_role("img", name=re.compile("came to be")).bounding_box()
        assert strip["y"] + strip["height"] <= height


def test_the_page_fits_a_phone(open_page):
    page = open_page(390, 844)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("link", name="Download").first.wait_for()
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # What a visitor has chosen and what becomes of it is scrolled to.
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name=re.compile("^Edit dog")).first.click()
    chosen = page.get_by_role("img", name="The chosen image")
    chosen.wait_for()
    page.wait_for_timeout(500)
    box = chosen.bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 844
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_role("link", name="edited.png").first.wait_for()
    box = page.get_by_role("img", name="The original").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 844
