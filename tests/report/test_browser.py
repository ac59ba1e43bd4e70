"""What a person sees, in a real Chromium: JupyterLab, Voila, and the report opened from the disk without a network."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from papermill.iorw import load_notebook_node, write_ipynb
from papermill.parameterize import parameterize_notebook

from qnb.run import NOTEBOOKS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
CHROMIUM = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: install the package chromium, or set BROWSER_PATH"),
]
IDLE = "() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
OUTSIDE = """() => [...document.querySelectorAll('.js-plotly-plot text')].filter(text => {
  const box = text.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1);
}).map(text => text.textContent)"""
COVERED = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
  const bar = plot.querySelector('.modebar').getBoundingClientRect();
  return [...plot.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]).filter(
    ([, box]) => box.left < bar.right && box.right > bar.left && box.top < bar.bottom && box.bottom > bar.top);
})"""
DRAWN = """count => [...document.querySelectorAll('.js-plotly-plot')].filter(
  each => each.querySelector('.cartesianlayer path, .cartesianlayer image')).length === count"""
SCROLLS = """() => [...document.querySelectorAll('.box')].filter(box => box.scrollWidth > box.clientWidth + 1)
  .map(box => box.innerText.slice(0, 60))"""
# the least contrast of a text on its page, as WCAG defines it
CONTRAST = """() => {
  const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll('h1, h2, p, td, th, a, summary')].map(each => {
    const [low, high] = [page, light(getComputedStyle(each).color)].sort((one, other) => one - other);
    return (high + 0.05) / (low + 0.05);
  }));
}"""
OPEN = "open => document.querySelectorAll('details').forEach(each => each.open = open)"
RAN = "() => /\\[\\d+\\]/.test(document.querySelector('.jp-CodeCell .jp-InputPrompt')?.textContent)"
BOOK = "05_figures.ipynb"
SECOND = 1000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as control:
        yield control.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    yield page
    page.close()


@contextlib.contextmanager
def served(command, folder):
    """Run a server on a free port of the loopback until the block ends; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = free.getsockname()
    with (folder / "server.log").open("w") as log:
        command = [sys.executable, "-m", *command, f"--port={place[1]}"]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        with socket.socket() as client:
            deadline = time.monotonic() + 60
            while client.connect_ex(place) and time.monotonic() < deadline:
                assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.25)
        yield "http://{}:{}".format(*place)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # it waits for what never answered; its kernels end with it
            server.kill()
            server.wait()


def prepared(folder, study):
    """Copy 05 with a study's folder behind its parameters cell."""
    notebook = load_notebook_node(str(NOTEBOOKS / "05_figures.ipynb"))
    write_ipynb(parameterize_notebook(notebook, {"output": str(study), "pictures": False}), str(folder / BOOK))


@pytest.fixture(scope="module")
def lab(tmp_path_factory, studied):
    """JupyterLab over a folder with 05 of a study."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(studied.folder, folder / "study")
    prepared(folder, folder / "study")
    settings = folder / "settings"
    settings.mkdir()
    overrides = {
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    }
    (settings / "overrides.json").write_text(json.dumps(overrides))
    command = ["jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--IdentityProvider.token=",
               "--ServerApp.password=", f"--notebook-dir={folder}", f"--LabApp.app_settings_dir={settings}",
               "--LabApp.extension_manager=readonly"]  # fmt: skip
    with served(command, folder) as address:
        yield address


def kernel_state(address):
    """Return what the server says of the notebook's kernel; the page itself looks idle before it asks for one."""
    sessions = json.load(urllib.request.urlopen(f"{address}/api/sessions", timeout=20))
    states = {each["path"]: each["kernel"]["execution_state"] for each in sessions}
    return states.get(BOOK, "none")


def run_all(page, address):
    page.goto(f"{address}/lab/tree/{BOOK}?reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60 * SECOND)
    end = time.monotonic() + 90
    while (state := kernel_state(address)) != "idle":  # cells run before are lost, or ask for another kernel
        assert time.monotonic() < end, f"the kernel is not ready: {state}"
        page.wait_for_timeout(SECOND / 2)
    page.wait_for_function(IDLE, timeout=60 * SECOND)
    in_the_way = page.locator("dialog.jp-Dialog")
    assert in_the_way.count() == 0, in_the_way.all_inner_texts()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(RAN, timeout=90 * SECOND)


def use_chooser(page):
    """Move its sliders with the keyboard; the recommendation and the table must follow."""
    advice = page.get_by_role("status").filter(has_text="Recommended")
    advice.wait_for(timeout=90 * SECOND)
    advice.scroll_into_view_if_needed()
    panel = page.locator(".widget-vbox", has=advice).last
    assert "Recommended: int8 (cuda_graph)" in advice.inner_text()
    handles = panel.get_by_role("slider").or_(panel.locator(".ui-slider-handle"))  # ipywidgets 7 names no role
    assert handles.count() == 3
    handles.nth(0).focus()
    page.keyboard.press("Home")  # no memory at all
    advice.filter(has_text="Recommended: nothing").wait_for(timeout=20 * SECOND)
    assert "no row meets" in advice.inner_text() and panel.get_by_text("✗ ruled out").count() == 10


def test_05_in_jupyterlab_runs_and_its_chooser_follows_the_sliders(page, lab):
    run_all(page, lab)
    use_chooser(page)
    page.wait_for_function(IDLE, timeout=60 * SECOND)
    wrong = page.locator("[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type*='error']")
    assert wrong.all_inner_texts() == []
    drawn = page.locator(".jp-OutputArea .js-plotly-plot")
    assert drawn.count() == 16  # fifteen figures, and the explorer's
    quantity = page.get_by_label("quantity")
    quantity.scroll_into_view_if_needed()
    title = page.locator(".widget-vbox", has=quantity).last.locator("..").locator(".gtitle").first
    was = title.text_content()
    quantity.select_option(label="peak memory, MiB")
    page.wait_for_function(
        "was => ![...document.querySelectorAll('.gtitle')].some(each => each.textContent === was)", arg=was
    )


def test_voila_serves_05_as_an_app(page, studied, tmp_path):
    pytest.importorskip("voila", reason="voila is an extra: pip install -e '.[app]'")
    prepared(tmp_path, studied.folder)
    with served(["voila", BOOK, "--no-browser"], tmp_path) as address:
        for _ in range(2):  # two kernels that start at once may take one port (nteract/papermill issue 511)
            page.goto(address, timeout=120 * SECOND)
            with contextlib.suppress(playwright.TimeoutError):
                page.get_by_role("status").filter(has_text="Recommended").wait_for(timeout=60 * SECOND)
                break
        use_chooser(page)
        assert page.locator("pre", has_text="import qnb").count() == 0  # an app shows no code


def test_the_report_needs_no_network_and_no_mouse_and_fits_screens_and_paper(page, report_page):
    """On a wide screen, on a phone's 390 pixels, and on a sheet of A4 less its margins."""
    said, asked = [], []
    page.context.set_offline(True)
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report_page.as_uri())
    page.wait_for_function(DRAWN, arg=15, timeout=30 * SECOND)
    for width_px in (1280, 390):
        page.set_viewport_size({"width": width_px, "height": 900})
        page.evaluate(OPEN, True)
        page.wait_for_timeout(SECOND)
        assert page.evaluate("document.documentElement.scrollWidth") <= width_px  # nothing is cut off at the side
        assert page.evaluate(SCROLLS) == [] or width_px == 390
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate(COVERED) == []  # by the tools that a touch screen always shows
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(CONTRAST) >= 4.5
    assert not said and set(asked) == {report_page.as_uri()}
    page.evaluate(OPEN, False)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})
    for event, is_open in (("beforeprint", 9), ("afterprint", 0)):
        page.evaluate(f"() => dispatchEvent(new Event('{event}'))")
        assert page.locator("main > details[open]").count() == is_open
        if is_open:
            page.wait_for_timeout(SECOND)
            widths_px = page.locator(".figure .main-svg").evaluate_all("all => all.map(each => each.clientWidth)")
            assert 600 < max(widths_px) < 700 and page.evaluate(SCROLLS) == []
    page.emulate_media(media="screen")
    page.locator("#accuracy > summary").focus()
    page.keyboard.press("Enter")
    page.locator("#accuracy a[download='table2_change.csv']").focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.path().read_text() == (report_page.parent / "tables" / "table2_change.csv").read_text()
