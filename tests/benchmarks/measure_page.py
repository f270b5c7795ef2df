"""Measures an exported web page in headless Chromium, with and without threads, and takes a screenshot.

python tests/benchmarks/measure_page.py FOLDER --screenshot page.png
"""

import argparse
import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from playwright.sync_api import expect  # noqa: E402
from support.browser import chromium  # noqa: E402
from support.static_page import IsolatedHandler, PlainHandler, served  # noqa: E402


PATIENCE = 600_000  # milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of `pet-pipeline export --web`")
    parser.add_argument("--num_images", type=int, default=4, help="images of a request")
    parser.add_argument("--screenshot", type=Path, help="PNG file of the page after the last request")
    args = parser.parse_args()
    sizes = {path.name: path.stat().st_size for path in args.folder.iterdir()}
    print(f"{sum(sizes.values()) / 1e6:.1f} MB in all, of which", end=" ")
    print(", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items() if size > 1e6))
    with chromium() as browser:
        for handler in (PlainHandler, IsolatedHandler):
            with served(args.folder, handler) as address:
                page = browser.new_page(viewport={"width": 900, "height": 800})
                page.goto(address)
                page.locator("#classes input").first.check(timeout=PATIENCE)
                page.get_by_label("Images").fill(str(args.num_images))
                for request in range(3):
                    page.get_by_role("spinbutton", name="Seed").fill(str(100 * request))
                    page.get_by_role("button", name="Generate", exact=True).click()
                    expect(page.locator("#status")).to_have_text(re.compile("images? in"), timeout=PATIENCE)
                    print(page.locator("#status").inner_text())
                question = page.get_by_role("button", name="What is it?")
                for index in range(min(3, question.count())):
                    question.nth(index).click()
                    answer = page.locator("#answer")
                    expect(answer).to_have_text(re.compile("^This is"), timeout=PATIENCE)
                    print(answer.inner_text())
        if args.screenshot:
            page.screenshot(path=args.screenshot, full_page=True)


if __name__ == "__main__":
    main()
