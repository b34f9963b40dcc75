"""Draws docs/page.png, page-phone.png, chat.svg and top.svg from a server with the default model on the CPU:
``python docs/screenshots.py``, with the extras "http", "demo" and "test", and Chromium. It takes minutes."""

import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from clo import Client
from clo.commands import chat, top
from clo.runtime.wire.errors import CLOError

FOLDER = Path(__file__).resolve().parent
DOCUMENTS = ("http.md", "errors.md", "requests.md", "structure.md")  # in front of a question each
CHARACTERS = 2500  # of a document: enough that its rows do not all stay resident
SERVER = ("--http", "0", "--port", "0", "--device", "cpu", "--resident", "256", "--select-k", "64")
PAGES = {  # of what the browser shows: width, height, colour scheme
    "page.png": (1180, 800, "light"),
    "page-phone.png": (360, 740, "dark"),
}
SHOWN_S = 110.0  # the page's chart is of two minutes
QUESTIONS = ["What is the capital of France?", "And of Italy?"]


@contextmanager
def served() -> Iterator[tuple[str, str]]:
    """The addresses of a server for native and for HTTP clients."""
    command = [sys.executable, str(FOLDER.parent / "launch.py"), *SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            words = process.stdout.readline().split()
            if not words:
                sys.exit("The server did not start.")
            yield words[1], words[-1]
        finally:
            process.terminate()


@contextmanager
def streaming(address: str) -> Iterator[None]:
    """One question after another about each document."""
    enough = threading.Event()

    def ask(document: str) -> None:
        text = (FOLDER / document).read_text()[:CHARACTERS]
        with suppress(CLOError), Client(address) as client:  # in the end the server goes
            while not enough.is_set():
                question = {
                    "role": "user",
                    "content": f"{text}\n\nSay in a few sentences what this is about.",
                }
                client.generate([question], max_tokens=150, ignore_eos=True)

    with ThreadPoolExecutor(len(DOCUMENTS)) as threads:
        for document in DOCUMENTS:
            threads.submit(ask, document)
        try:
            yield
        finally:
            enough.set()


def draw_page(browser: Any, url: str) -> None:
    """Both pages are open side by side, until their charts are full."""
    pages = {}
    for name, (width, height, scheme) in PAGES.items():
        pages[name] = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        pages[name].goto(url)
    time.sleep(SHOWN_S)
    for name, page in pages.items():
        page.wait_for_function("() => Number(document.getElementById('decoding').textContent) > 1")
        page.screenshot(path=FOLDER / name, full_page=True)


def draw_top(address: str) -> None:
    """``clo top`` while answers are streamed."""
    console = recorder(100)
    with Client(address) as client:
        began, before = time.monotonic(), client.info()
        time.sleep(5.0)
        console.print(top.page(client.info(), before, time.monotonic() - began))
    save(console, "top")


def draw_chat(address: str) -> None:
    """``clo chat``, with what a user types."""
    console, questions = recorder(80), iter(QUESTIONS)

    def typed(prompt: str) -> str:
        text = next(questions, "/exit")
        console.print(prompt + text, markup=False)
        return text

    with patch("builtins.input", typed), patch("clo.commands.chat.Console", lambda **_: console):
        chat.main(["--server", address, "--temperature", "0", "--max-tokens", "60"])
    save(console, "chat")


def recorder(width: int) -> Console:
    return Console(record=True, width=width, file=io.StringIO(), highlight=False)


def save(console: Console, name: str) -> None:
    # rich's own form loads a font from elsewhere, which pictures in a document must not do
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(str(FOLDER / f"{name}.svg"), title=f"clo {name}", code_format=form, unique_id=name)


def main() -> None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("The pictures of the page need the package playwright: pip install playwright.")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        sys.exit("The pictures of the page need Chromium: apt-get install chromium.")
    with served() as (address, url), sync_playwright() as started:
        draw_chat(address)
        browser = started.chromium.launch(executable_path=program, chromium_sandbox=os.getuid() != 0)
        with streaming(address):
            draw_page(browser, url)
            draw_top(address)
        browser.close()


if __name__ == "__main__":
    main()
