"""Pages in a real browser: no console error, no network, tables sort, images load, nothing wider than the screen.

    pip install -r tests/browser/requirements.txt       # and a Chromium: apt-get install chromium
    python tests/browser/run.py [PAGE.html ...] [--shots DIR]

Without pages it makes reports of made-up studies, and a page broken on purpose which must be found broken. Each is
opened at the width of a phone and of a desk, in light and dark. Exits 1 when something is wrong, and 2, with a line
that says so, when there is no browser: nothing was tested then.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": (390, 844), "desk": (1400, 900)}
# Sorts every column of every table twice and reports what is not in order then; text is compared as people read it.
SORTS = """() => {
  const wrong = [];
  let sorted = 0;
  for (const head of document.querySelectorAll("th button")) {
    const th = head.closest("th"), place = [...th.parentNode.children].indexOf(th);
    const body = th.closest("table").tBodies[0], before = body.rows.length;
    for (const wanted of ["ascending", "descending"]) {
      head.click();
      sorted += 1;
      if (th.getAttribute("aria-sort") !== wanted) wrong.push(head.textContent + ": not " + wanted);
      const keys = [...body.rows].map(row => row.children[place]).map(cell => cell.dataset.value ?? cell.textContent);
      const there = keys.filter(key => key !== "");
      if (keys.slice(0, there.length).includes("")) wrong.push(head.textContent + ": an empty value is not last");
      for (let i = 1; i < there.length; i++) {
        const x = Number(there[i - 1]), y = Number(there[i]);
        const order = Number.isNaN(x) || Number.isNaN(y) ? there[i - 1].localeCompare(there[i]) : x - y;
        const bad = wanted === "ascending" ? order > 0 : order < 0;
        if (bad) wrong.push(`${head.textContent}: ${there[i - 1]}, ${there[i]}`);
      }
    }
    if (body.rows.length !== before) wrong.push(head.textContent + ": rows were lost");
  }
  return [sorted, wrong];
}"""
# Contrast (WCAG 2) of every element with text of its own against what is behind it.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour[3] > 200) return colour;
    }
    return [255, 255, 255, 255];
  };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim());
    if (!own || node.tagName === "SCRIPT") continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${node.tagName} ${ratio.toFixed(1)}: ${node.textContent.trim().slice(0, 30)}`);
  }
  return low;
}"""
WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
IMAGES = """() => [...document.images].map(image =>
  [image.alt, image.complete && image.naturalWidth > 0, image.getBoundingClientRect().width])"""
NAMELESS = """() => [...document.querySelectorAll("table")].filter(table =>
  !table.tHead || [...table.tHead.querySelectorAll("th")].some(th => th.scope !== "col")
  || [...table.tBodies[0].rows].some(row => row.cells[0].scope !== "row")).length"""


def faults(page, uri: str, *, sortable: bool) -> list[str]:
    """Everything wrong with the page at `uri`, as it is shown now. sortable: it should have tables that sort."""
    found: list[str] = []

    def console(message) -> None:
        if message.type in ("error", "warning"):
            found.append(f"console: {message.text}")

    def request(asked) -> None:
        if not asked.url.startswith(("file:", "data:")):
            found.append(f"network: {asked.url[:80]}")

    page.on("console", console)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("request", request)
    page.goto(uri)
    page.wait_for_load_state("networkidle")
    images = page.evaluate(IMAGES)
    found += [f"image does not load: {alt}" for alt, loaded, _ in images if not loaded]
    found += ["image without a description" for alt, _, _ in images if not alt]
    found += [
        f"image too small to read, {width:.0f} px: {alt}"
        for alt, _, width in images if width < 250 and not alt.startswith("example ")
    ]  # fmt: skip
    if page.evaluate(WIDE) > 0:
        found.append(f"{page.evaluate(WIDE)} px wider than the screen")
    if page.evaluate(NAMELESS):
        found.append("a table lacks the heads of its columns or rows")
    found += [f"contrast {each}" for each in page.evaluate(CONTRAST)]
    sorted_, wrong = page.evaluate(SORTS)
    found += [f"sorting {each}" for each in wrong]
    if sortable and not sorted_:
        found.append("no table sorts")
    if page.evaluate(WIDE) > 0:
        found.append("wider than the screen after sorting")
    return found


def broken(page: Path) -> Path:
    """The page with five faults: an image, a script, a row in the wrong place of every sort, width, contrast."""
    text = page.read_text()
    text = text.replace("data:image/svg+xml;base64,", "data:image/svg+xml;base64,AAAA", 1)
    text = text.replace("return (up ? order : -order) || i - j;", "return j - i;")
    text = text.replace("</body>", '<p style="width: 1500px; color: #888">wide</p><script>missing()</script></body>')
    out = page.with_name("broken.html")
    out.write_text(text)
    return out


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="*")
    parser.add_argument("--shots", default="", help="folder for a screenshot of each page, size and scheme")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        browser = None
    if browser is None:
        print("BROWSER TEST NOT RUN: no page was opened. It needs tests/browser/requirements.txt and a Chromium.")
        return 2
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        pages = [Path(page).resolve() for page in args.pages]
        own = not pages
        if own:
            from tests.study.synthetic import write_all

            pages = write_all(Path(folder))
        engine = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        bad = sum(look(engine, page, own, args.shots) for page in pages)
        if own:
            bad += unnoticed(engine, broken(pages[0]))
        engine.close()
    views = len(pages) * 2 * len(SIZES) + own
    print(f"browser test: {views - bad} passed, {bad} failed")
    return int(bad > 0)


def look(engine, path: Path, own: bool, shots: str) -> int:
    """How many of the sizes and schemes show a fault; prints them."""
    bad = 0
    for size, (width, height) in SIZES.items():
        for scheme in ("light", "dark"):
            page = engine.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            found = faults(page, path.as_uri(), sortable=own)
            if shots:
                page.reload()
                name = f"{path.parent.name}-{path.stem}-{size}-{scheme}.png"
                page.screenshot(path=Path(shots) / name, full_page=True)
            page.close()
            bad += bool(found)
            for line in found:
                print(f"{path.parent.name}/{path.name} at {width} px, {scheme}: {line}")
    return bad


def unnoticed(engine, path: Path) -> int:
    """1 if some fault of a page that was broken on purpose goes unnoticed."""
    page = engine.new_page(viewport={"width": 390, "height": 844})
    found = "\n".join(faults(page, path.as_uri(), sortable=True))
    missed = [w for w in ("image does not load", "script:", "sorting", "contrast", "wider than") if w not in found]
    if missed:
        print(f"a page broken on purpose: not noticed: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
