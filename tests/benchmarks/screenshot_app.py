"""Takes the pictures of the web page in docs, and measures the time from a click to the images.

python tests/benchmarks/screenshot_app.py --reference uoft-cs/cifar10
"""

import argparse
import io
import re
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pet_pipeline.app import serve
from pet_pipeline.commands.loading import load_pipeline
from pet_pipeline.evaluation.reference import load_reference


sys.path.insert(0, str(Path(__file__).parent.parent))
from support.browser import chromium  # noqa: E402


if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OUT = Path(__file__).parent.parent.parent / "docs" / "images"


def save_screenshot(page: "Page", name: str) -> None:
    """Saves the top of the page with the 256 colours that change it least, which keeps the file small."""
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(500)
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        palette = picture.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
    palette.save(OUT / f"{name}.png", optimize=True)


def open_page(browser: "Browser", url: str, width: int, height: int, **kwargs: Any) -> "Page":
    page = browser.new_page(viewport={"width": width, "height": height}, **kwargs)
    page.set_default_timeout(300_000)
    page.goto(url)
    page.get_by_role("button", name="Generate").wait_for()
    return page


def fix_seed(page: "Page", seed: int) -> None:
    """Sets the seed of the visible tab; closes the advanced settings again."""
    advanced = page.get_by_role("button", name="Advanced").locator("visible=true")
    advanced.click()
    page.get_by_label("Draw a new seed each time").locator("visible=true").uncheck()
    field = page.get_by_label("Seed", exact=True).locator("visible=true")
    field.fill(str(seed))
    field.press("Tab")
    advanced.click()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="saved pipeline; the model of the package if not given")
    parser.add_argument("--reference", required=True, help="the data set it was trained on")
    parser.add_argument("--cache_dir", help="cache of `datasets`")
    args = parser.parse_args()
    pipeline = load_pipeline(args.model)
    resolution = pipeline.transformer.config.sample_size
    names = pipeline.class_names
    reference = load_reference(args.reference, names, resolution, cache_dir=args.cache_dir)
    with serve(pipeline, reference) as url, chromium() as browser:
        page = open_page(browser, url, 1280, 800)
        seconds = []
        for seed in range(3, -1, -1):
            fix_seed(page, seed)
            began = time.perf_counter()
            page.get_by_role("button", name="Generate").click()
            page.get_by_role("link", name=f"Download {names[0]}-{seed}.png").wait_for()
            seconds.append(time.perf_counter() - began)
            neighbor = f"training image 1 closest to {names[0]}, seed {seed}"
            page.get_by_role("img", name=neighbor, exact=True).wait_for()
        count = page.get_by_role("link", name="Download").count()
        print(
            f"{statistics.median(seconds):.1f} s from the click to {count} images, median of {len(seconds)}"
        )
        save_screenshot(page, "app-generate")

        page.get_by_role("button", name=f"Edit {names[1]}, seed 3").click()
        page.get_by_role("img", name="The chosen image").wait_for()
        fix_seed(page, 100)
        page.get_by_role("button", name="Edit", exact=True).click()
        page.get_by_role("link", name="edited.png").first.wait_for()
        save_screenshot(page, "app-edit")

        page.get_by_role("tab", name="Compare").click()
        fix_seed(page, 0)
        page.get_by_role("button", name="Compare A and B").click()
        page.get_by_text(re.compile("the same seeds, from")).wait_for()
        save_screenshot(page, "app-compare")

        page.get_by_role("tab", name="Classify").click()
        page.get_by_role("button", name="Example 3").click()
        page.get_by_role("img", name="Errors of each class").wait_for()
        save_screenshot(page, "app-classify")

        page = open_page(browser, url, 390, 844)
        fix_seed(page, 0)
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("link", name="Download").first.wait_for()
        save_screenshot(page, "app-phone")

        page = open_page(browser, url, 1280, 800, color_scheme="dark")
        page.get_by_role("tab", name="Classify").click()
        page.get_by_role("button", name="Example 7").click()
        page.get_by_role("img", name="Errors of each class").wait_for()
        save_screenshot(page, "app-dark")
    for path in sorted(OUT.glob("app-*.png")):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
