"""The page in a browser: by clicks and keys in headless Chromium, which asks nobody but the server.

Needs the package playwright and a Chromium of the system (on Debian: ``apt-get install chromium-headless-shell``).
Screenshots are kept in ``.pytest_cache/page`` for people to look at.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import RecordingGenerator
from indexes import open_index

from kvfusion_rag import InvalidInputError, KVFusionGenerator
from kvfusion_rag.serving import Access, create_app, running
from kvfusion_rag.serving.library import Library, UploadSpace

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
ROOT = Path(__file__).parent.parent.parent
SCREENSHOTS = ROOT / ".pytest_cache" / "page"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WAIT = 60_000  # milliseconds, for machines that do other work
KEY = "key-of-the-only-tenant"
QUESTION = "Who was the last keeper of the lighthouse?"
KEEPER = "🗼🌊 The lighthouse was built in 1874. Its last keeper, Thomas Grant, moved to the mainland."
HOSTILE = "The keeper <img src=x onerror=alert(1)><script>alert(2)</script> of the <b>lighthouse</b>."

if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def speaker(speaker_folder: Path) -> KVFusionGenerator:
    """Answers "thomas grant" to every question."""
    return KVFusionGenerator.from_pretrained(speaker_folder, mode="fusion")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        expect.set_options(timeout=WAIT)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # for root
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a URL in a new profile. In the end, all requests must have gone to its host."""
    with ExitStack() as stack:

        def open_page(url: str, **options: Any) -> Any:
            context = stack.enter_context(
                browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            )
            context.set_default_timeout(WAIT)
            page = context.new_page()
            asked: list[str] = []
            broken: list[Any] = []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: broken.append(error))
            page.on("dialog", lambda dialog: broken.append(dialog))
            page.goto(url)
            stack.callback(lambda: _require(asked, broken, url))
            return page

        yield open_page


def _require(asked: list[str], broken: list[Any], url: str) -> None:
    assert not broken
    assert asked and all(one.startswith((f"{url}/", "data:")) for one in asked)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "lighthouse.txt").write_text(KEEPER)
    (folder / "hostile.txt").write_text(HOSTILE)
    (folder / "ferry.md").write_text("# The ferry\n\nThe ferry carries forty cars.")
    return folder


@contextmanager
def served(generator: Any, docs: Path | None, access: Access | None = None) -> Iterator[str]:
    """Serve ``generator`` with the files of ``docs``, if any."""
    with ExitStack() as stack:
        library = None
        if docs is not None:
            index = stack.enter_context(open_index(chunk_tokens=40))
            index.update(docs)
            uploads = UploadSpace(docs.parent / "uploads", index.in_memory)
            library = Library(index, uploads=uploads, top_k=3, questions=[QUESTION, "What does the ferry carry?"])
        yield stack.enter_context(running(create_app(generator, access=access, library=library)))


@pytest.fixture
def url(speaker: KVFusionGenerator, docs: Path) -> Iterator[str]:
    with served(speaker, docs) as url:
        yield url


def ask(page: Any, question: str = QUESTION) -> None:
    page.fill("#question", question)
    page.keyboard.press("Enter")


def answered(page: Any) -> Any:
    """Wait for the end of the newest answer, and return its element."""
    answer = page.locator(".answer").first
    expect(answer.locator(".facts")).not_to_be_empty()
    expect(page.locator("#ask")).to_be_enabled()
    return answer


def picture(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_first_screen_explains_itself_and_offers_questions(open_page, url):
    page = open_page(url)
    expect(page.locator("#about")).to_contain_text("3 files")
    expect(page.locator("#model")).to_contain_text("tiny-speaker · fusion")
    expect(page.locator("#files")).to_contain_text("lighthouse.txt")
    expect(page.locator("#question")).to_be_focused()
    picture(page, "first")
    page.get_by_role("button", name=QUESTION).click()
    expect(answered(page).locator(".text")).to_have_text("thomas grant")


def test_answer_has_a_highlighted_source_bars_and_the_origin_of_its_kvs(open_page, url, speaker):
    speaker.clear()
    page = open_page(url)
    ask(page)
    answer = answered(page)
    expect(answer.locator(".asked")).to_have_text(QUESTION)
    expect(answer.locator(".text")).to_have_text("thomas grant")
    facts = answer.locator(".facts").inner_text()
    assert re.search(r"first token after [\d.]+ s · whole answer [\d.]+ s · mode fusion", facts)
    assert "3 of 3 documents read · 3 × KV computed now" in facts
    cited = answer.locator(".cited")
    expect(cited).to_have_count(1)
    expect(cited.locator(".title")).to_have_text("lighthouse")
    expect(cited.locator("mark")).to_have_text(
        "Thomas Grant"
    )  # although characters before it take two units of UTF-16
    expect(cited.locator(".passage")).to_have_text(KEEPER)
    expect(cited.locator(".place")).to_have_text("lighthouse.txt, line 1")
    expect(answer.locator("meter.attention")).to_have_count(3)
    shares = [float(meter.get_attribute("value")) for meter in answer.locator("meter.attention").all()]
    assert all(share > 0 for share in shares) and sum(shares) <= 1
    expect(answer.locator("meter.effect").first).to_have_attribute(
        "aria-label", re.compile(r"effect [+−]?[\d.]+ nats")
    )
    ask(page)
    expect(answered(page).locator(".facts")).to_contain_text("3 × KV from memory")
    expect(page.locator(".answer")).to_have_count(2)
    picture(page, "answer-light")


def test_question_that_is_asked_before_the_files_are_known_is_answered_from_them(open_page, url):
    page = open_page(url)
    expect(page.locator("#files")).to_contain_text("ferry.md")  # no request of this load is left
    waiting: list[Any] = []
    page.route("**/v1/library", lambda route: waiting.append(route))
    page.reload(wait_until="commit")
    expect(page.locator("#model")).not_to_be_empty()
    ask(page)
    expect(page.locator("#library")).to_be_hidden()  # the page has seen the key, but not the files
    waiting[0].continue_()
    expect(answered(page).locator(".document")).to_have_count(3)


def test_documents_are_shown_as_text(open_page, url):
    page = open_page(url)
    ask(page)
    item = answered(page).locator(".document", has_text="hostile")
    item.locator("summary").click()
    expect(item.locator(".passage")).to_have_text(HOSTILE)
    expect(page.locator(".passage b, .passage img, .passage script")).to_have_count(0)


def test_question_and_answer_are_shown_as_text(open_page, docs):
    with served(RecordingGenerator(pieces=("<b>in</b>", " <img src=x onerror=alert(1)>")), docs) as url:
        page = open_page(url)
        ask(page, HOSTILE)
        answer = answered(page)
        expect(answer.locator(".text")).to_have_text("<b>in</b> <img src=x onerror=alert(1)>")
        expect(answer.locator(".asked")).to_have_text(HOSTILE)
        page.reload()
        expect(page.locator("#history button")).to_have_text(HOSTILE)


def test_comparison_shows_both_orders_in_both_modes(open_page, url):
    page = open_page(url)
    page.get_by_role("switch").focus()
    page.keyboard.press("Space")
    ask(page)
    rows = answered(page).locator(".comparison tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("the same in both orders")
    for row in rows.all():
        assert [cell.split("\n")[0] for cell in row.locator("td").all_inner_texts()] == ["thomas grant"] * 2
    orders = page.locator(".comparison thead small").all_inner_texts()
    assert orders[0] == "documents 1 2 3" != orders[1] and sorted(orders[1]) == sorted(orders[0])
    picture(page, "comparison")


def test_files_are_added_by_button_and_drop_and_removed(open_page, url, tmp_path):
    page = open_page(url)
    file = tmp_path / "mill.md"
    file.write_text("# The mill\n\nThe mill was built in 1902 by Amara Osei.")
    page.set_input_files("#upload", file)
    expect(page.locator("#notice")).to_have_text("mill.md was added.")
    expect(page.locator("#about")).to_contain_text("4 files")
    transfer = page.evaluate_handle(
        "() => { const made = new DataTransfer();"
        "made.items.add(new File(['The bakery opens at six.'], 'bakery.txt')); return made; }"
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    expect(page.locator("body.dropping")).to_have_count(1)
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#notice")).to_have_text("bakery.txt was added.")
    ask(page, "Who built the mill in 1902?")
    expect(answered(page).locator(".document").first.locator(".title")).to_have_text("The mill")
    page.get_by_role("button", name="Remove mill.md").click()
    expect(page.locator("#notice")).to_have_text("mill.md was removed.")
    expect(page.locator("#files")).not_to_contain_text("mill.md")
    file.write_bytes(b"\0" * 100)
    page.set_input_files("#upload", file)
    expect(page.locator("#notice")).to_contain_text("cannot be read")


def test_files_that_come_before_the_page_knows_its_library_wait_for_it(open_page, url, tmp_path):
    page = open_page(url)
    held: list[Any] = []
    page.route("**/v1/library", lambda route: held.append(route), times=1)
    page.reload()
    file = tmp_path / "mill.md"
    file.write_text("# The mill\n\nThe mill was built in 1902.")
    page.set_input_files("#upload", file)
    transfer = page.evaluate_handle(
        "() => { const made = new DataTransfer();"
        "made.items.add(new File(['The bakery opens at six.'], 'bakery.txt')); return made; }"
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    held[0].continue_()
    expect(page.locator("#files")).to_contain_text("mill.md")
    expect(page.locator("#files")).to_contain_text("bakery.txt")


def test_files_that_the_server_finds_meanwhile_are_listed(open_page, speaker, docs):
    with open_index(chunk_tokens=40) as index:
        library = Library(index, docs=[docs])
        library.update()
        library.is_watched = True
        with running(create_app(speaker, library=library)) as url:
            page = open_page(url)
            expect(page.locator("#files")).to_contain_text("ferry.md")
            (docs / "mill.md").write_text("The mill is old.")
            (docs / "ferry.md").unlink()
            library.update()
            expect(page.locator("#files")).to_contain_text("mill.md")
            expect(page.locator("#files")).not_to_contain_text("ferry.md")
            expect(page.locator("#about")).to_contain_text("3 files")


def test_keys_and_history(open_page, url):
    page = open_page(url)
    ask(page)
    answered(page)
    page.locator("#theme").focus()
    page.keyboard.press("/")
    expect(page.locator("#question")).to_be_focused()
    page.fill("#question", "")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#question")).to_have_value(QUESTION)
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".answer")).to_have_count(1)
    page.reload()
    page.locator("#history").get_by_role("button", name=QUESTION).click()
    answered(page)
    expect(page.locator("#history li")).to_have_count(1)
    page.get_by_role("button", name="Clear history").click()
    expect(page.locator("#history li")).to_have_count(0)


def test_answer_is_copied(open_page, url):
    page = open_page(url, permissions=["clipboard-read", "clipboard-write"])
    ask(page)
    answered(page).get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "thomas grant"


def test_escape_stops_an_answer(open_page, docs):
    generator = RecordingGenerator(hold=threading.Event())
    with served(generator, docs) as url:
        page = open_page(url)
        ask(page)
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator(".facts")).to_have_text("Stopped.")
        expect(page.locator("#ask")).to_be_enabled()
        generator.hold.set()


def test_errors_are_shown_in_words(open_page, docs):
    with served(RecordingGenerator(error=InvalidInputError("the question is odd.")), docs) as url:
        page = open_page(url)
        ask(page)
        expect(page.locator(".facts.error")).to_have_text("the question is odd.")


def test_key_is_asked_for_and_kept_in_the_tab_only(open_page, speaker, docs):
    with served(speaker, docs, Access({KEY: None})) as url:
        page = open_page(url)
        expect(page.locator("#key")).to_be_focused()
        expect(page.locator("#question-form")).to_be_hidden()
        picture(page, "key")
        page.fill("#key", "wrong-key-of-nobody")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_contain_text("the API key is missing or wrong")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden()
        ask(page)
        expect(answered(page).locator(".text")).to_have_text("thomas grant")
        page.reload()
        expect(page.locator("#files")).to_contain_text("ferry.md")
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")


def test_documents_are_pasted_if_the_server_has_none(open_page, speaker):
    with served(speaker, None) as url:
        page = open_page(url)
        expect(page.locator("#library")).to_be_hidden()
        page.fill("#documents", f"{KEEPER}\n \n\n  The ferry carries\nforty cars.  ")
        ask(page)
        answer = answered(page)
        expect(answer.locator(".document")).to_have_count(2)
        expect(answer.locator("mark")).to_have_text("Thomas Grant")
        picture(page, "pasted")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("answer-dark", {"color_scheme": "dark"}),
        ("answer-small", {"viewport": {"width": 360, "height": 740}}),
        ("answer-small-dark", {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}),
    ],
)
def test_page_fits_dark_and_small_screens(open_page, url, name, options):
    page = open_page(url, **options)
    page.check("#compare")
    ask(page)
    answered(page)
    picture(page, name)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (options.get("color_scheme") == "dark")


@pytest.mark.default_model
def test_first_user_gets_the_right_answer_with_its_source(open_page):
    """``kvfusion serve --docs examples/lighthouse`` and a browser, as the README says."""
    command = [sys.executable, "-m", "kvfusion_rag.cli", "serve", "--docs", "examples/lighthouse", "--port", "0"]
    server = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert server.stdout is not None
        lines = list(iter(server.stdout.readline, "}\n"))
        page = open_page(json.loads("".join(lines) + "}")["url"])
        page.get_by_role("button", name="Who was the last keeper of the Harrow Point Lighthouse?").click()
        page.locator("#ask:enabled").wait_for()
        answer = page.locator(".answer")
        expect(answer.locator(".text")).to_have_text("Thomas Grant")
        expect(answer.locator(".cited .place")).to_contain_text("harrow_point_lighthouse.md")
        expect(answer.locator(".cited mark")).to_have_text("Thomas Grant")
        picture(page, "lighthouse")
    finally:
        server.terminate()
        assert server.wait(60) == 0


def test_colours_can_be_chosen_and_are_kept(open_page, url):
    page = open_page(url)
    for name in ("light", "dark"):
        page.locator("#theme").click()
        expect(page.locator("#theme")).to_have_attribute("aria-label", f"Colours: {name}")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
