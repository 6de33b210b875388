"""The report page, in a real browser."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from distclip.monitor import read, write_page
from distclip.monitor.notation import parse_strategy
from distclip.monitor.replaying import tally
from tests.monitor import synthetic

INSTALL = "install it, as launch/setup.sh does: apt-get update && apt-get install chromium chromium-driver"
FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage",
    "disable-background-networking", "disable-component-update", "disable-sync", "window-size=1280,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail(f"the report page is tested in Chromium, and it or its driver is missing: {INSTALL}")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driven = webdriver.Chrome(options=options, service=Service(driver))
    yield driven
    driven.quit()


def wait(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)
    return value


class Page:
    def __init__(self, browser: webdriver.Chrome, path: Path, theme: str = "light") -> None:
        self.browser = browser
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        browser.get(path.as_uri())
        browser.execute_script("localStorage.clear()")
        browser.get_log("browser")  # from the last page
        browser.refresh()
        wait(lambda: self.js("return document.documentElement.dataset.drawn"))

    def js(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def click(self, name: str) -> None:
        self.js(f"delete document.documentElement.dataset.drawn; document.getElementById('{name}').click()")
        wait(lambda: self.js("return document.documentElement.dataset.drawn"))

    def size(self, width: int, mobile: bool) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def history(path: Path, steps: int = 5000) -> Path:
    """A warm-up, spikes, non-finite steps, modules, a loss."""
    norms = synthetic.warming_up(400, steps)
    norms[[1500, 2500, 3500]] = 8.0
    norms[2000] = np.nan
    synthetic.write(path, norms, strategy='"GlobalNorm(max_norm=1.0)"')
    rows = path.read_text().splitlines()
    rows.insert(1, '{"names":["embed.weight","blocks.0.weight","</script><b>head"]}')
    for i in range(2, len(rows)):
        extra = f',"loss":{3 - i / steps}'
        if i % 50 == 0:
            extra += ',"param_norms":[0.1,0.2,0.3]'
        rows[i] = rows[i][:-1] + extra + "}"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def one(browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("page")
    write_page(folder / "report.html", [read(history(folder / "run.jsonl"))])
    return Page(browser, folder / "report.html")


def test_whole(one: Page) -> None:
    """Every plot has drawn something, nothing complains, and nothing is fetched from anywhere."""
    assert one.browser.get_log("browser") == []
    plots = one.js("return [...document.querySelectorAll('.plot')].map(p => p.id)")
    assert plots == ["norm", "coefficient", "rate", "histogram", "loss", "heat"]
    selectors = {"heat": "image", "histogram": ".barlayer path"}
    for name in plots:
        drawn = f"document.querySelectorAll('#{name} {selectors.get(name, '.scatterlayer path.js-line')}')"
        widths = one.js(f"return [...{drawn}].map(n => n.getBoundingClientRect().width)")
        assert max(widths, default=0) > 5, name
    fetched = "performance.getEntriesByType('resource').filter(r => r.name.startsWith('http'))"
    assert one.js(f"return {fetched}.length") == 0


def test_what_it_says(one: Page) -> None:
    text = one.js("return document.body.innerText")
    for said in (
        "run.jsonl",
        "GlobalNorm(max_norm=1.0)",
        "5,000",
        "Recommended threshold",
        "warm-up",
        "Copy",
        "1,501",
    ):
        assert said in text
    spikes = one.js(
        "return [...document.querySelectorAll('tbody tr td:first-child')].map(n => n.textContent)"
    )
    assert sorted(spikes) == ["1,501", "2,501", "3,501"]
    # Five thousand steps in fewer points, and the spikes are among them.
    points = one.js(
        "return document.getElementById('norm').data.flatMap(t => t.y).filter(y => y === 8).length"
    )
    assert points >= 3


def test_theme(one: Page) -> None:
    def look() -> Any:
        return one.js(
            "return [document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor,"
            "document.getElementById('norm').layout.font.color]"
        )

    light = look()
    one.click("theme")
    dark = look()
    assert (light[0], dark[0]) == ("light", "dark")
    assert light[1] != dark[1]
    assert light[2] != dark[2]
    one.click("theme")
    assert look() == light


def test_toggles(one: Page) -> None:
    kind = "return document.getElementById('norm').layout.yaxis.type"
    shapes = "return document.getElementById('norm').layout.shapes.length"
    assert (one.js(kind), one.js(shapes)) == ("log", 2)
    one.click("log")
    one.click("advised")
    assert (one.js(kind), one.js(shapes)) == ("linear", 1)
    pressed = "return ['log', 'advised'].map(n => document.getElementById(n).getAttribute('aria-pressed'))"
    assert one.js(pressed) == ["false", "false"]
    one.click("log")
    one.click("advised")
    assert (one.js(kind), one.js(shapes)) == ("log", 2)
    assert one.browser.get_log("browser") == []


def test_phone(one: Page) -> None:
    """Nothing sticks out to the side, and buttons are large enough for a thumb."""
    one.size(390, mobile=True)
    try:
        wait(
            lambda: one.js(
                "return document.querySelector('#norm .main-svg').getBoundingClientRect().width < 390"
            )
        )
        assert one.js("return document.documentElement.scrollWidth") <= 390
        assert (
            one.js("return Math.min(...[...document.querySelectorAll('button')].map(b => b.offsetHeight))")
            >= 32
        )
    finally:
        one.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_by_preference_and_several_runs(browser: webdriver.Chrome, tmp_path: Path) -> None:
    runs = [read(synthetic.write(tmp_path / f"{n}.jsonl", synthetic.stationary(500, n))) for n in (1, 2)]
    write_page(tmp_path / "compare.html", runs)
    page = Page(browser, tmp_path / "compare.html", theme="dark")
    assert page.js("return document.documentElement.dataset.theme") == "dark"
    assert page.js("return document.querySelectorAll('#norm .scatterlayer .trace').length") >= 2
    assert page.js("return document.querySelectorAll('tbody tr').length") == 2
    assert page.browser.get_log("browser") == []


def test_replays(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = read(synthetic.write(tmp_path / "run.jsonl", synthetic.stationary(300)))
    texts = ["global(0.5)", "percentile(90, multiplier=1, warmup=10)"]
    replays = [tally(run, parse_strategy(text), text) for text in texts]
    write_page(tmp_path / "replay.html", [run], replays=replays)
    page = Page(browser, tmp_path / "replay.html")
    assert set(texts) <= set(page.js("return document.getElementById('norm').data.map(t => t.name)"))
    assert all(text in page.js("return document.body.innerText") for text in texts)
    assert page.browser.get_log("browser") == []
