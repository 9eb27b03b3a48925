"""Test bootstrap: quiet threads, no network, seeds, and `slow` tests only on request."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported: spinning OpenMP threads on a busy machine slow small tensors down by orders of magnitude.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A name that is no folder is looked up on the Hugging Face hub: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU, Triton's kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch

# Tiny tensors gain nothing from a second thread, and results then do not depend on the machine's core count.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global seeds, so none depends on the order in which they run."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (for code under test that should not, but might, use it)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("babi/qa1_train.jsonl")`: a file of the folder `data/` beside the package; skips without it.

    Real texts and test sets are nobody's to pass on; whoever has them runs these tests too.
    """
    root = Path(__file__).parents[1] / "data"

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"needs the real data file {root / name}")
        return root / name

    return find


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless browser: Debian's Chromium, or the one that playwright has downloaded. Skips without playwright or browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install 'recollect[dev]')")
    with playwright.sync_playwright() as driver:
        found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
        path = found or driver.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("no Chromium on this machine (apt-get install chromium, or playwright install chromium)")
        launched = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """`open_page(file, width=1200, scheme="light")`: the page of a file. At the end there must have been no error, no warning, no
    dialog, and no request but for the files themselves."""
    pages, complaints, requests, files = [], [], [], set()

    def opened(file: Path, *, width: int = 1200, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        pages.append(page)
        files.add(file.as_uri())
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.split("#")[0]))
        page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
        page.goto(file.as_uri())
        return page

    yield opened
    for page in pages:
        page.close()
    assert complaints == []
    assert [url for url in requests if url not in files and not url.startswith("data:")] == []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `slow` tests unless the command names a marker expression or test ids itself."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
